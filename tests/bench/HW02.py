"""HW02: seconds until the official sample's own validation score is reached.

The official recipe, written anew: all frames of the split in one matrix filled in advance, a Dataset and a
DataLoader that hand them out one by one, two layers of 256 units on one frame of 39 numbers, AdamW with a
rate of 1e-4, batches of 512, five epochs, the best of five validations. Ours: the functions of the notebook
at level medium with a schedule of two epochs, a validation after each. The second row counts frames alone.
"""

import functools
import tempfile
import time
import types
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from notebooks import ROOT, pick, settings_of
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from tqdm import tqdm

SCRIPT = ROOT / "HW02" / "HW02.py"
OURS = [
    "corpus_of",
    "windows",
    "layer",
    "Perceptron",
    "make_optimizer",
    "make_net",
    "make_batches",
    "my_share",
]
OURS += ["make_batch", "bare", "ask", "accuracy", "train"]


@functools.cache
def sample():
    """Frames and classes of every training utterance of the sample, as the files have them."""
    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp())
    pick(SCRIPT, "make_sample", np=np, torch=torch, PROFILE="small").make_sample(folder, folder)
    lines = (folder / "libriphone" / "train_labels.txt").read_text().splitlines()
    y = [torch.tensor([int(one) for one in line.split()[1:]], dtype=torch.uint8) for line in lines]
    x = [torch.load(folder / "libriphone/feat/train" / f"{line.split()[0]}.pt") for line in lines]
    return x, y


def written_out(x, y, n):
    """The official helper: every window of every frame in one matrix, edges repeated."""
    matrix, at = torch.empty(sum(map(len, x)), n * 39), 0
    for one in x:
        padded = torch.cat([one[:1].expand(n // 2, -1), one, one[-1:].expand(n // 2, -1)])
        matrix[at : at + len(one)] = torch.cat([padded[k : k + len(one)] for k in range(n)], 1)
        at += len(one)
    return TensorDataset(matrix, torch.cat(y).long())


def official():
    """(best validation accuracy, seconds until then)"""
    x, y = sample()
    tic = time.perf_counter()
    parts = (written_out(x[:192], y[:192], 1), written_out(x[192:], y[192:], 1))
    train, valid = (DataLoader(part, 512, shuffle=True) for part in parts)
    torch.manual_seed(0)
    layers = [nn.Linear(39, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 41)]
    net = nn.Sequential(*layers)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4)
    best, seconds = 0.0, 0.0
    for _ in range(5):
        for some, truth in train:
            loss = F.cross_entropy(net(some), truth)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            right = sum((net(some).argmax(-1) == truth).sum().item() for some, truth in valid)
        if right / len(valid.dataset) > best:
            best, seconds = right / len(valid.dataset), time.perf_counter() - tic
    return best, seconds


class Reached(Exception):
    """Our net has the official score."""


def functions(**given):
    space = dict(torch=torch, nn=nn, F=F, np=np, time=time, tqdm=tqdm, types=types, device="cpu", CLASSES=41)
    space |= dict(SEED=0, QUIET=True, accelerator=Accelerator(cpu=True), fingerprint=lambda _: "5")
    return pick(SCRIPT, *OURS, **space | given)


def ours(target):
    """Seconds from the frames in memory until the notebook's own loop has that score."""
    x, y = sample()
    history = []

    def compare(*_, **__):
        if history[-1]["valid"] >= target:
            raise Reached

    tic = time.perf_counter()
    space = functions(history=history, save_checkpoint=compare, load_checkpoint=lambda *_, **__: 0)
    for name, some in (("learn", slice(192)), ("check", slice(192, None))):
        frames, sizes = torch.cat(x[some])[:, :13], torch.tensor([len(one) for one in x[some]])
        space.train.__globals__[name] = space.corpus_of(frames, torch.cat(y[some]), sizes)
    torch.manual_seed(0)
    try:
        space.train("bench", settings_of(SCRIPT, "medium") | dict(epochs=2))
    except Reached:
        return time.perf_counter() - tic
    raise RuntimeError(f"the official score {target:.3f} was not reached: {history[-1]['valid']:.3f}")


def race():
    score, theirs = official()
    return f"seconds to the official sample's score (accuracy {score:.3f})", ours(score), theirs


def cases():
    x, y = sample()
    loader = DataLoader(written_out(x[:50], y[:50], 19), 512, shuffle=True)
    space = functions()
    corpus = space.corpus_of(
        torch.cat(x[:50])[:, :13], torch.cat(y[:50]), torch.tensor([len(one) for one in x[:50]])
    )

    def gather():
        batches = space.make_batches(corpus, dict(context=19), 12, torch.Generator())
        return sum(len(space.make_batch(corpus, rows, dict(context=19))[0][0]) for rows in batches)

    what = "frames a second, windows of 19 frames, without a net"
    return {"HW02/frames": (what, gather, lambda: sum(len(truth) for _, truth in loader))}
