"""HW01: an epoch through Dataset and DataLoader against an epoch by index; 24 nets in turn or at once."""

import io

import torch
from notebooks import ROOT, pick
from torch import nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

ROWS, INPUTS, BATCH = 2160, 117, 256  # 80 % of the course's training rows
torch.manual_seed(0)
x, y = torch.randn(ROWS, INPUTS), torch.randn(ROWS)


class Rows(Dataset):
    """The official sample's way: one row at a time."""

    def __getitem__(self, index):
        return x[index], y[index]

    def __len__(self):
        return ROWS


def official_epoch(net, optimizer, loader):
    """The official sample's loop: a bar a batch, the loss read back after every step."""
    net.train()
    bar = tqdm(loader, file=io.StringIO())
    for features, target in bar:
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(net(features).squeeze(1), target)
        loss.backward()
        optimizer.step()
        bar.set_postfix({"loss": loss.detach().item()})
    return 1


def our_epoch(net, optimizer, members):
    """The loop of the notebook."""
    net.train()
    order = torch.rand(members, ROWS).argsort(1)
    total = torch.zeros(members)
    for numbers in order.split(BATCH, dim=1):
        loss = (net(x[numbers]) - y[numbers]).square().mean(1)
        optimizer.zero_grad()
        loss.sum().backward()
        optimizer.step()
        total += loss.detach()
    return members


def count(batches):
    return sum(len(target) for _, target in batches)


def sgd(net):
    return torch.optim.SGD(net.parameters(), lr=1e-5, momentum=0.9)


def cases():
    settings = dict(hidden=(16, 8), activation="relu", dropout=0.0, skip=False)
    members = pick(ROOT / "HW01" / "HW01.py", "Members", settings=settings).Members
    slow = nn.Sequential(nn.Linear(INPUTS, 16), nn.ReLU(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 1))
    one, many, loader = members(1, INPUTS), members(24, INPUTS), DataLoader(Rows(), BATCH, shuffle=True)
    steps = {net: sgd(net) for net in (slow, one, many)}
    return {
        "HW01": (
            "training epochs per second, 24 nets",
            lambda: sum(our_epoch(many, steps[many], 24) for _ in range(5)),
            lambda: sum(official_epoch(slow, steps[slow], loader) for _ in range(24)),
        ),
        "HW01/one": (
            "training epochs per second, a single net",
            lambda: sum(our_epoch(one, steps[one], 1) for _ in range(20)),
            lambda: sum(official_epoch(slow, steps[slow], loader) for _ in range(20)),
        ),
        "HW01/loading": (
            "rows per second, loading alone",
            lambda: sum(count((x[n], y[n]) for n in torch.randperm(ROWS).split(BATCH)) for _ in range(20)),
            lambda: sum(count(loader) for _ in range(20)),
        ),
    }
