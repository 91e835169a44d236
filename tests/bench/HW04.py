"""HW04: segments from 64 k small files against segments from one packed array; batch 1 against buckets."""

import io
import random
import tempfile
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import torch
from notebooks import ROOT, pick
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

FILES, SPEAKERS, CROP, MANY = 512, 600, 128, 64
torch.manual_seed(0)
sizes = torch.randint(300, 1000, (FILES,))  # the course's mean is 657 frames
labels = torch.arange(FILES) % SPEAKERS
mels = [torch.randn(n, 40) for n in sizes.tolist()]
folder = tempfile.TemporaryDirectory()
for number, mel in enumerate(mels):
    torch.save(mel, Path(folder.name, f"{number}.pt"))

SCRIPT = ROOT / "HW04" / "HW04.py"
NAMES = ["rotate", "SelfAttention", "feed_forward", "SampleBlock", "TransformerBlock", "Convolution", "Pool"]
NAMES += [
    "ConformerBlock",
    "Stem",
    "statistics",
    "CosineHead",
    "make_embedding",
    "SpeakerNet",
    "gather",
    "segments",
]
NAMES += ["buckets", "stretches", "predict", "prepare", "normalise"]
SETTINGS = dict(block="sample", width=80, layers=1, heads=2, ff=256, dropout=0.1, pool="mean", mfa=False)
SETTINGS |= dict(margin=0.0, drop=0.0, crop=(CROP, CROP), augment=False, normalise=False)
alone = SimpleNamespace(process_index=0, num_processes=1, autocast=nullcontext, reduce=lambda x: x)
pack = dict(frames=torch.cat(mels).half(), size=sizes, begin=sizes.cumsum(0) - sizes, device="cpu")
given = dict(settings=SETTINGS, accelerator=alone, speakers=range(SPEAKERS), CAP=16_000, torch=torch)
ours = pick(SCRIPT, *NAMES, **pack, **given)
BOSS = dict(block="conformer", width=64, layers=2, heads=4, ff=128, kernel=15, channels=16, mfa=True)
BOSS |= dict(margin=0.2, pool="asp", normalise=True)  # the boss's net for small data
conformer = pick(SCRIPT, *NAMES, **pack, **given | {"settings": SETTINGS | BOSS})


class Utterances(Dataset):
    """The official sample's way: open a file for every segment."""

    def __getitem__(self, index):
        mel = torch.load(Path(folder.name, f"{index}.pt"), weights_only=True)
        start = random.randint(0, len(mel) - CROP)
        return mel[start : start + CROP], labels[index]

    def __len__(self):
        return FILES


def collate(items):
    mels, who = zip(*items, strict=True)
    return nn.utils.rnn.pad_sequence(mels, batch_first=True, padding_value=-20), torch.stack(who)


def official_epoch(loader, net=None, optimizer=None):
    """Its loop: one batch, loss and accuracy read back, a bar."""
    bar = tqdm(total=FILES, file=io.StringIO())
    for x, y in loader:
        if net:
            scores = net(x, torch.ones(x.shape[:2], dtype=torch.bool))
            loss = F.cross_entropy(scores, y)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            bar.set_postfix(loss=loss.item(), accuracy=(scores.argmax(1) == y).float().mean().item())
        bar.update(len(y))
    return FILES


def our_epoch(batch, net=None, optimizer=None):
    dice = torch.Generator().manual_seed(0)
    for numbers in torch.randperm(FILES).split(batch):
        x, mask = ours.segments(numbers, dice)
        if net:
            loss = F.cross_entropy(net(x, mask), labels[numbers])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return FILES


@torch.no_grad()
def one_by_one(net):
    net.eval()
    for number in range(MANY):
        mel = torch.load(Path(folder.name, f"{number}.pt"), weights_only=True)[None]
        mask = torch.ones(mel.shape[:2], dtype=torch.bool)
        net(conformer.prepare(mel, mask), mask).argmax(1)
    return MANY


def in_buckets(net):
    conformer.predict(net, torch.arange(MANY)).argmax(1)
    return MANY


def cases():
    loader = DataLoader(Utterances(), 32, shuffle=True, collate_fn=collate, drop_last=True)
    slow, fast = ours.SpeakerNet(40, SPEAKERS), ours.SpeakerNet(40, SPEAKERS)
    boss = conformer.SpeakerNet(40, SPEAKERS)
    plain = torch.optim.AdamW(slow.parameters(), 1e-3)
    fused = torch.optim.AdamW(fast.parameters(), 1e-3, fused=True)
    return {
        "HW04": (
            "segments per second, loading alone",
            lambda: sum(our_epoch(32) for _ in range(10)),
            lambda: official_epoch(loader),
        ),
        "HW04/training": (
            "segments per second, loading and training the same net with batches of 32",
            lambda: our_epoch(32, fast.train(), fused),
            lambda: official_epoch(loader, slow.train(), plain),
        ),
        "HW04/inference": (
            "whole utterances per second, the boss's net, buckets against one by one",
            lambda: in_buckets(boss),
            lambda: one_by_one(boss),
        ),
    }
