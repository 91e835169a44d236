"""HW14: an epoch of images turned one by one against one by index; importances one by one or at once."""

import types

import numpy as np
import torch
from notebooks import ROOT, pick
from PIL import Image
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

TRAIN, TEST, BATCH, ANGLE, SEEN = (
    1536,
    256,
    128,
    40,
    3,
)  # 6 to 1 as in MNIST; the third task: three are tested
dice = np.random.default_rng(0)
images = dice.integers(0, 256, (TRAIN, 28, 28), dtype=np.uint8)
labels = torch.tensor(dice.integers(0, 10, TRAIN))
turn = transforms.Compose(
    [transforms.ToTensor(), transforms.Lambda(lambda image: transforms.functional.rotate(image, ANGLE))]
)
kept = [Image.fromarray(image) for image in images]


class Turned(Dataset):
    """The official sample's way: each image turned in Python whenever it is asked for."""

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, k):
        return turn(kept[k]), labels[k]


class Official:
    """Its model with a guard on every tensor, its loop, its evaluation."""

    def __init__(self):
        sizes = [784, 1024, 512, 256, 10]
        layers = [
            part for a, b in zip(sizes, sizes[1:], strict=False) for part in (nn.Linear(a, b), nn.ReLU())
        ]
        self.model = nn.Sequential(nn.Flatten(), *layers[:-1])
        self.guard = {name: torch.rand_like(p) for name, p in self.model.named_parameters()}
        self.anchor = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-4)
        self.loader = DataLoader(Turned(TRAIN), BATCH, shuffle=True)
        self.tests = [DataLoader(Turned(TEST), BATCH, shuffle=True) for _ in range(SEEN)]

    def penalty(self):
        named = self.model.named_parameters()
        return sum((self.guard[name] * (p - self.anchor[name]) ** 2).sum() for name, p in named)

    def epoch(self):
        for x, y in self.loader:
            loss = F.cross_entropy(self.model(x), y) + 0.1 * self.penalty()
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            loss.item()
        for test in self.tests:
            sum((self.model(x).argmax(1) == y).sum().item() for x, y in test)
        return TRAIN


class Ours:
    """The notebook's net, guard, batches and evaluation; so many nets side by side."""

    def __init__(self, nets):
        settings = dict(hidden=(1024, 512, 256), batch_size=BATCH, lr=1e-4)
        given = dict(settings=settings, device=torch.device("cpu"), RANK=0, WORLD=1)
        names = ["Nets", "look", "add_up", "cross_entropy", "batches", "evaluate", "Method", "Guard", "EWC"]
        self.parts = pick(ROOT / "HW14" / "HW14.py", *names, "per_image", **given)
        self.seeds, self.method = list(range(nets)), self.parts.EWC((0.1,) * nets)
        self.model = self.parts.Nets(self.seeds)
        self.method.importance = torch.rand_like(self.model.theta)
        self.method.before_task(self.model)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-4, fused=True)
        self.x = transforms.functional.rotate(torch.tensor(images), ANGLE).flatten(1)  # once

    def epoch(self):
        for numbers in self.parts.batches(self.seeds, 0, 0, TRAIN, TRAIN):
            loss = self.method.loss(self.model, self.parts.look(self.x[numbers]), labels[numbers])
            self.optimizer.zero_grad()
            loss.sum().backward()
            self.method.bend(self.model)
            self.optimizer.step()
        self.parts.evaluate(self.model, self.x[:TEST].expand(SEEN, -1, -1), labels[:TEST])
        return TRAIN * len(self.seeds)


def one_by_one(ours, count):
    """A backward pass for each image, as a loop over a batch size of one would do it."""
    total = torch.zeros_like(ours.model.theta)
    for image, label in zip(ours.x[:count], labels[:count], strict=True):
        loss = ours.parts.cross_entropy(ours.model(ours.parts.look(image[None])), label[None])
        total += torch.autograd.grad(loss.sum(), ours.model.theta)[0] ** 2
    return count


def at_once(ours):
    ours.method.measure(ours.model, ours.x, labels)
    return len(ours.x)


def count(batches):
    return sum(len(y) for _, y in batches)


def cases():
    official, one, three = Official(), Ours(1), Ours(3)
    look = types.MethodType(lambda self, rows: self.parts.look(self.x[rows]), one)
    return {
        "HW14": ("training images per second, one net, with its tests", one.epoch, official.epoch),
        "HW14/three": ("training images per second, three nets at once", three.epoch, official.epoch),
        "HW14/loading": (
            "images per second, loading alone",
            lambda: sum(
                count((look(n), labels[n]) for n in torch.randperm(TRAIN).split(BATCH)) for _ in range(20)
            ),
            lambda: count(official.loader),
        ),
        "HW14/importance": (
            "images per second, squared gradient of every image",
            lambda: at_once(one),
            lambda: one_by_one(one, 64),
        ),
    }
