"""HW09: seconds for the same explanations of ten pictures: saliency, SmoothGrad, integrated gradients, LIME.

The official way, written anew: one picture, one noisy copy and one point of a path at a time, with gradients
for the weights, too; LIME asks in batches of ten. Ours: all pictures at once, weights frozen, large batches.
Both with the net of the sample, as it is before training (the time is the same), and with the same numbers of
copies, points and samples.
"""

import math
import time

import numpy as np
import torch
from lime import lime_image
from notebooks import ROOT, pick
from skimage.segmentation import slic
from torch import nn
from torch.nn import functional as F

SCRIPT = ROOT / "HW09" / "HW09.py"
COPIES, POINTS, SAMPLES, CHUNK = 32, 10, 200, 128
OURS = ["Classifier", "ask", "gradients", "noise_like", "smooth_grad", "integrated_gradients"]
OURS += ["superpixels", "probabilities", "lime_map"]

torch.manual_seed(0)
lime_image.tqdm = iter
given = dict(torch=torch, nn=nn, F=F, np=np, math=math, CLASSES=range(11), CHUNK=CHUNK, SEED=0, device="cpu")
space = pick(SCRIPT, *OURS, **given, lime_image=lime_image, slic=slic)
net = space.Classifier((8, 16, 32, 64, 64), (1,) * 5, 64, 64).eval()
blocks = torch.rand(10, 3, 8, 8).repeat_interleave(8, 2).repeat_interleave(8, 3)
pictures, kinds = (blocks + 0.05 * torch.rand(10, 3, 64, 64)).clamp(0, 1), torch.arange(10)


def slope(x, kind):
    """As in the sample: backward through the whole net, weights included."""
    x = x.clone().requires_grad_()
    net.zero_grad()
    F.cross_entropy(net(x), kind).backward()
    return x.grad


def cut(picture):
    return slic(picture, n_segments=200, compactness=1, sigma=1, start_label=1)


def official():
    net.requires_grad_(True)
    for x, kind in zip(pictures.split(1), kinds.split(1), strict=True):
        slope(x, kind)
        for _ in range(COPIES):
            slope(x + 0.16 * torch.randn_like(x), kind)
        for k in range(POINTS):
            slope(x * k / POINTS, kind)

        def answer(some):
            with torch.no_grad():
                return net(torch.tensor(np.stack(some), dtype=torch.float32).permute(0, 3, 1, 2)).numpy()

        explainer = lime_image.LimeImageExplainer(random_state=16)
        picture = x[0].permute(1, 2, 0).double().numpy()
        how = dict(labels=(int(kind),), top_labels=None, num_samples=SAMPLES, batch_size=10)
        explainer.explain_instance(picture, answer, segmentation_fn=cut, **how)


def ours():
    net.requires_grad_(False)
    space.gradients.__globals__["model"] = net
    space.gradients(pictures, kinds, "loss")
    space.smooth_grad(pictures, kinds, 0.15, COPIES)
    space.integrated_gradients(pictures, 0 * pictures, kinds, POINTS)
    for picture, kind in zip(pictures, kinds, strict=True):
        space.lime_map(picture, int(kind), SAMPLES)


def seconds(work):
    tic = time.perf_counter()
    work()
    return time.perf_counter() - tic


def race():
    return "seconds for the same explanations of ten pictures", seconds(ours), seconds(official)


def cases():
    return {}
