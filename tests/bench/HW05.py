"""HW05: seconds until the official sample's own validation score; and decoding with and without a cache.

The official recipe, written anew, its widths divided by four and its batch by sixteen so that a CPU and
a thousand pairs can carry it: a GRU encoder in both directions, a GRU decoder whose attention asks with
the last token, dropout 0.3, label smoothing 0.1, a constant rate of 2e-3, batches of 512 tokens, 15 epochs.
Ours: the notebook's own loop with the settings of level strong. Both on the same pairs in the same pieces; a
validation after every epoch (greedy), the best one counts.
"""

import functools
import math
import re
import tempfile
import time
import unicodedata
from collections import Counter
from pathlib import Path

import numpy as np
import sacrebleu
import sentencepiece
import torch
from accelerate import Accelerator
from notebooks import ROOT, pick, settings_of
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

SCRIPT = ROOT / "HW05" / "HW05.py"
GENERATE = "NOUNS VERBS ADJECTIVES PERSONS PLACES TIMES NUMBERS OWNERS LINKS PLURAL".split()
GENERATE += ["rows_of", "Speaker", "spoil", "make_sample"]
TEXT = ["tidy", "clean_en", "clean_zh", "fits", "WIDE", "BETWEEN", "learn_marks", "write_zh", "bleu"]
OURS = "PAD LONGEST train_pieces pack tokens_of pad look_up Recurrent rate_at Attention".split()
OURS += "positions Layer Transformer next_scores search translate make_batches make_net".split()
OURS += ["CLIP", "loss_of", "make_training", "add_weights", "evaluate", "keep_track", "train"]


@functools.cache
def texts():
    """(pairs to learn from, pairs to check on) of the sample, made once."""
    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp())
    given = dict(np=np, functools=functools, PROFILE="small")
    pick(SCRIPT, *GENERATE, **given).make_sample(folder, folder)
    space = pick(SCRIPT, *TEXT, re=re, unicodedata=unicodedata, Counter=Counter, PUNCT="full")
    lines = [(folder / name).read_text(encoding="utf-8").split("\n")[:-1] for name in ("raw.en", "raw.zh")]
    rows = [(space.clean_en(en), space.clean_zh(zh), zh) for en, zh in zip(*lines, strict=True)]
    rows = [row for row in dict.fromkeys(rows) if space.fits(*row[:2])]
    return rows[100:], rows[:100]


def notebook(**more):
    """The notebook's functions, after its pieces were made from these pairs."""
    learn, valid = texts()
    given = dict(
        torch=torch, nn=nn, F=F, np=np, math=math, time=time, tqdm=tqdm, re=re, unicodedata=unicodedata
    )
    given |= dict(Counter=Counter, sacrebleu=sacrebleu, sentencepiece=sentencepiece, SEED=0, PUNCT="full")
    given |= dict(learn_en=[row[0] for row in learn], learn_zh=[row[1] for row in learn], mono_zh=[])
    given |= dict(accelerator=Accelerator(cpu=True), gather_object=lambda one: one, device="cpu", QUIET=True)
    given |= dict(
        say=lambda *_: None, load_checkpoint=lambda *_, **__: 0, save_checkpoint=lambda *_, **__: None
    )
    given |= dict(history=[], settings=settings_of(SCRIPT, "strong"), Stop=RuntimeError) | more
    given["marks"] = pick(SCRIPT, *TEXT, **given).WIDE
    folder = Path(tempfile.mkdtemp())
    pick(SCRIPT, "PAD", *OURS, **given).train_pieces(folder)
    spm = sentencepiece.SentencePieceProcessor(model_file=str(folder / "pieces.model"))
    given |= dict(spm=spm, VOCABULARY=spm.get_piece_size())
    space = pick(SCRIPT, *TEXT, *OURS, **given)
    sides = [[row[side] for row in rows] for rows in (learn, valid) for side in (0, 1)]
    return space, [space.tokens_of(side) for side in sides], [row[2] for row in valid]


class Official(nn.Module):
    """The official sample's net, a quarter as wide, with the interface of the notebook's decoding."""

    def __init__(self, vocabulary):
        super().__init__()
        self.embed, self.drop = nn.Embedding(vocabulary, 64, padding_idx=0), nn.Dropout(0.3)
        self.encoder = nn.GRU(64, 128, batch_first=True, bidirectional=True)
        self.decoder, self.first = nn.GRU(64, 256, batch_first=True), nn.Linear(256, 256)
        self.ask, self.merge, self.out = nn.Linear(64, 256), nn.Linear(320, 64), nn.Linear(256, 64)

    def start(self, source):
        states, last = self.encoder(self.drop(self.embed(source)))  # through the padding, as the sample does
        return [states, source != 0], [torch.tanh(self.first(last.transpose(0, 1).flatten(1)))]

    def step(self, target, fixed, moving):
        y, (states, mask) = self.drop(self.embed(target)), fixed
        context = F.scaled_dot_product_attention(self.ask(y), states, states, mask[:, None])
        y, last = self.decoder(self.merge(torch.cat([y, context], -1)), moving[0][None].contiguous())
        return self.out(self.drop(y)) @ self.embed.weight.T, [last[0]]

    def forward(self, source, target):
        return self.step(target, *self.start(source))[0]


def official():
    """(best validation BLEU, seconds until then)"""
    tic = time.perf_counter()
    settings = settings_of(SCRIPT, "strong") | {"tokens": 512}
    space, (source, target, valid_source, _), references = notebook(settings=settings)
    torch.manual_seed(0)
    net, best, seconds = Official(len(space.spm)), 0.0, 0.0
    optimizer = torch.optim.AdamW(net.parameters(), 2e-3, betas=(0.9, 0.98), eps=1e-9, weight_decay=1e-4)
    for epoch in range(15):
        net.train()
        for rows in space.make_batches(source, target, epoch):
            x, y = space.pad(source, rows), space.pad(target, rows)
            loss = space.loss_of(net(x, y[:, :-1]), y[:, 1:])
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
        score = space.evaluate(net, (valid_source, references, "zh"), 1)
        if score > best:
            best, seconds = score, time.perf_counter() - tic
    return best, seconds


class Reached(Exception):
    """Our net has the official score."""


def ours(goal):
    """Seconds from opening the first file until the notebook's own loop has that score."""
    tic, reached = time.perf_counter(), []

    def compare(stage, epoch, epochs, row, net, check, parts):
        reached.append(evaluate(net, check, 1))
        if reached[-1] >= goal:
            raise Reached

    space, (source, target, valid_source, _), references = notebook()
    evaluate = space.evaluate
    space.train.__globals__["keep_track"] = compare
    torch.manual_seed(0)
    try:
        space.train("bench", source, target, (valid_source, references, "zh"), 40)
    except Reached:
        return time.perf_counter() - tic
    raise RuntimeError(f"the official score {goal:.2f} was not reached: {max(reached):.2f}")


def race():
    score, theirs = official()
    return f"seconds to the official sample's score (BLEU {score:.1f})", ours(score), theirs


class Forgetful:
    """A Transformer that keeps nothing: each step computes the whole beginning anew."""

    def __init__(self, net):
        self.net = net

    def start(self, source):
        fixed, _ = self.net.start(source)
        return fixed, [torch.zeros(len(source), 0, dtype=torch.long)]

    def step(self, target, fixed, moving):
        tokens = torch.cat([moving[0], target], 1)
        empty = [torch.zeros(len(tokens), *self.net.empty) for _ in self.net.decoder]
        return self.net.step(tokens, fixed, empty)[0][:, -1:], [tokens]


def cases():
    """Beam 5: 64 lines whose translations all have 32 tokens."""
    space, (source, *_), _ = notebook()
    torch.manual_seed(0)
    net = space.make_net().eval()
    lines = space.pad(source, source[1].argsort(descending=True)[:64])

    def decode(net):
        space.search(net, lines, 5)
        return len(lines)

    return {
        "HW05/decode": (
            "lines translated a second, beam 5",
            lambda: decode(net),
            lambda: decode(Forgetful(net)),
        )
    }
