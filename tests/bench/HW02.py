"""HW02: an epoch at n = 19 through a matrix of windows, Dataset and DataLoader, and an epoch by gather."""

import io
from types import SimpleNamespace

import torch
from notebooks import ROOT, pick
from torch import nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

UTTERANCES, LENGTH, N, COLUMNS = 20, 600, 19, 39
FRAMES = UTTERANCES * LENGTH
torch.manual_seed(0)
frames = torch.randn(FRAMES, COLUMNS)
labels = torch.randint(41, (FRAMES,))


def shift(x, n):
    """The official sample's helper: one utterance moved by n frames, the border frame repeated."""
    if n < 0:
        return torch.cat([x[:1].repeat(-n, 1), x[:n]])
    return torch.cat([x[n:], x[-1:].repeat(n, 1)]) if n else x


def written_out():
    """The official way to concatenate: every window of every utterance in one matrix."""
    matrix, at = torch.empty(FRAMES, N * COLUMNS), 0
    for x in frames.split(LENGTH):
        matrix[at : at + len(x)] = torch.cat([shift(x, k) for k in range(-(N // 2), N // 2 + 1)], 1)
        at += len(x)
    return matrix


class Windows(Dataset):
    """The official sample's way: one frame at a time."""

    def __init__(self):
        self.x = written_out()

    def __getitem__(self, index):
        return self.x[index], labels[index]

    def __len__(self):
        return FRAMES


def official_epoch(net, optimizer, loader):
    """The official sample's loop: batches of 512, loss and hits read back after every step."""
    net.train()
    hits, total = 0, 0.0
    for x, y in tqdm(loader, file=io.StringIO()):
        optimizer.zero_grad()
        outputs = net(x)
        loss = nn.functional.cross_entropy(outputs, y)
        loss.backward()
        optimizer.step()
        hits += (outputs.argmax(1) == y).sum().item()
        total += loss.item()
    return FRAMES


def our_epoch(f, net, optimizer):
    """The loop of the notebook."""
    net.train()
    plan, total = dict(net="MLP", frames=N, batch_size=2048), torch.zeros(2)
    for batch in f.make_batches(plan, torch.arange(UTTERANCES), 1):
        x, y = f.get_batch(batch, plan, True)
        logits = net(*x)
        loss = nn.functional.cross_entropy(logits, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += torch.stack([loss.detach(), (logits.argmax(-1) == y).sum()])
    return FRAMES


def functions(columns):
    """The notebook's own functions on the same frames, of which it keeps so many columns."""
    lengths = torch.full((UTTERANCES,), LENGTH)
    alone = SimpleNamespace(num_processes=1, process_index=0)
    given = dict(flat=frames[:, :columns].contiguous(), classes=labels.to(torch.uint8), lengths=lengths)
    given |= dict(offsets=torch.arange(UTTERANCES + 1) * LENGTH, CLASSES=41, SEED=0, accelerator=alone)
    given |= dict(owner=torch.repeat_interleave(torch.arange(UTTERANCES), lengths))
    names = ("windows", "frames_of", "get_batch", "make_batches", "MLP")
    return pick(ROOT / "HW02" / "HW02.py", *names, **given)


def count(batches):
    return sum(len(y) for _, y in batches)


def cases():
    slow, all39, first13 = DataLoader(Windows(), 512, shuffle=True), functions(39), functions(13)
    plan = dict(net="MLP", frames=N, batch_size=2048)

    def net(columns, fused):
        model = all39.MLP(N * columns, 1, 256, False, 0.0)
        return model, torch.optim.AdamW(model.parameters(), lr=1e-4, fused=fused)

    theirs, same, small = net(39, False), net(39, True), net(13, True)

    def load(f):
        batches = f.make_batches(plan, torch.arange(UTTERANCES), 1)
        return count((x, y) for x, y in (f.get_batch(batch, plan, True) for batch in batches))

    return {
        "HW02": (
            "training frames per second at n = 19, the 13 columns that carry something",
            lambda: our_epoch(first13, *small),
            lambda: official_epoch(*theirs, slow),
        ),
        "HW02/39 columns": (
            "training frames per second at n = 19, the same perceptron on all 39 columns",
            lambda: our_epoch(all39, *same),
            lambda: official_epoch(*theirs, slow),
        ),
        "HW02/loading": ("frames per second, loading alone", lambda: load(first13), lambda: count(slow)),
    }
