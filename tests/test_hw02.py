"""HW02's own invariants."""

import itertools
import json
import re
import shutil
import time
import types
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from accelerate import Accelerator
from conftest import TESTS, one_sentence, outcome, trained_anew
from notebooks import pick
from runner import ranks
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm import tqdm

SCRIPT = TESTS.parent / "HW02" / "HW02.py"
WINDOWS, WHOLE = dict(context=3), dict(context="all")
PLAIN = dict(layers=2, width=8, norm=True, dropout=0.5, augment=False, blank=10, nets=1)
NETS = ["layer", "Perceptron", "rectangle", "Recurrent", "Listener", "make_net"]
BATCHES = ["windows", "make_batches", "make_batch", "my_share", "bare", "ask", "between"]
CHANGES = ["hidden", "between", "changed"]


def functions(*names, rank=0, world=1, **given):
    alone = dict(process_index=rank, num_processes=world, reduce=lambda x: x, autocast=nullcontext)
    alone["unwrap_model"] = lambda model: model
    space = dict(torch=torch, nn=nn, F=F, np=np, types=types, device="cpu", CLASSES=41)
    space["accelerator"] = SimpleNamespace(**alone)
    return pick(SCRIPT, "corpus_of", *names, **space | given)


def speech(sizes=(9, 4, 17, 4, 12, 1, 30), columns=13, seed=0):
    """Utterances of these sizes with random frames and classes."""
    dice = torch.Generator().manual_seed(seed)
    x = torch.randn(sum(sizes), columns, generator=dice)
    y = torch.randint(41, (sum(sizes),), generator=dice).to(torch.uint8)
    return functions().corpus_of(x, y, torch.tensor(sizes))


def sample_of(straight):
    return straight[2] / "data" / "HW02-sample" / "tiny"


def copy_of_the_sample(straight, target):
    """The tiny sample's files, where real files are expected."""
    return shutil.copytree(sample_of(straight) / "data" / "libriphone", target)


def test_beats_a_constant_answer(straight):
    answers = np.load(sample_of(straight) / "answers" / "classes.npy")
    assert straight[0]["score"] > 1.5 * np.bincount(answers).max() / len(answers)


def test_the_judge_takes_the_share_of_right_frames(straight):
    answers = np.load(sample_of(straight) / "answers" / "classes.npy")
    guess = [int(line.split(",")[1]) for line in straight[1].decode().split()[1:]]
    assert straight[0]["score"] == pytest.approx(np.mean(np.array(guess) == answers))


# frames and windows


def test_a_corpus_knows_where_its_utterances_lie():
    corpus = speech((3, 1, 2))
    assert corpus.start.tolist() == [0, 3, 4] and corpus.end.tolist() == [3, 4, 6]
    assert corpus.owner.tolist() == [0, 0, 0, 1, 2, 2]
    some = functions("part_of").part_of(corpus, torch.tensor([2, 0]))
    assert torch.equal(some.x, corpus.x[[4, 5, 0, 1, 2]]) and some.size.tolist() == [2, 3]
    assert torch.equal(some.y, corpus.y[[4, 5, 0, 1, 2]])


def test_windows_stay_in_their_utterance():
    """The gather against the plain way: cut the utterance out, repeat its border frames."""
    corpus, f = speech(), functions("windows")
    for n in (1, 5, 19):
        found = f.windows(corpus, torch.arange(len(corpus.x)), n).view(len(corpus.x), n, 13)
        for start, end in zip(corpus.start.tolist(), corpus.end.tolist(), strict=True):
            alone = corpus.x[start:end]
            padded = torch.cat([alone[:1].expand(n // 2, -1), alone, alone[-1:].expand(n // 2, -1)])
            for t in range(end - start):
                assert torch.equal(found[start + t], padded[t : t + n])


class Largest(TorchDispatchMode):
    """Remembers how many numbers the largest new tensor holds."""

    numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for one in out if isinstance(out, (list, tuple)) else [out]:
            self.numbers = max(self.numbers, one.numel() if isinstance(one, torch.Tensor) else 0)
        return out


def test_no_matrix_of_all_windows_is_ever_made():
    f, corpus = functions(*BATCHES), speech([400] * 100)
    how, net = PLAIN | dict(context=19), nn.Linear(19 * 13, 41)
    with Largest() as seen:
        for rows in f.make_batches(corpus, how, 80, torch.Generator()):
            f.make_batch(corpus, rows, how)
        f.ask(net, corpus, how)
    assert 500 * 19 * 13 <= seen.numbers <= 8192 * 19 * 13 < 0.3 * len(corpus.x) * 19 * 13


def test_utterances_side_by_side():
    corpus = speech()
    at, inside = functions("rectangle").rectangle(corpus, torch.tensor([1, 6, 5, 0]))
    assert at.shape == inside.shape == (4, 30) and inside.sum(1).tolist() == [4, 30, 1, 9]
    for row, k in enumerate((1, 6, 5, 0)):
        size = int(corpus.size[k])
        assert at[row, :size].tolist() == [*range(corpus.start[k], corpus.end[k])]
        assert inside[row, :size].all() and (at[row] < corpus.end[k]).all()


# every epoch spoken anew


def test_other_speed_keeps_frames_and_classes_together():
    """Frames that carry their class as a value: the mixture of two frames has the nearer one's class."""
    corpus, f = speech([60, 80]), functions(*CHANGES[1:], hidden=lambda *_: [torch.zeros(2)] * 2)
    corpus.x[:] = 100.0 * corpus.y[:, None]
    sizes = set()
    for seed in range(20):
        new = f.changed(corpus, 10, torch.Generator().manual_seed(seed))
        sizes.add(tuple(new.size.tolist()))
        assert (new.size >= torch.tensor([54, 72])).all() and (new.size <= torch.tensor([67, 89])).all()
        for k in range(2):
            x, y = (one[new.start[k] : new.end[k]] for one in (new.x[:, 0], new.y.float()))
            old = corpus.y[corpus.start[k] : corpus.end[k]].float()
            assert y[0] == old[0] and abs(float(x[0]) / 100 - y[0]) < 0.01
            pairs = torch.stack([old, old.roll(-1)], 1)
            far = (x / 100 - y).abs()
            assert (far <= (pairs[:, 0] - pairs[:, 1]).abs().max() / 2 + 0.01).all()
            # where a frame lies between a and b, its class is one of them
            assert set(y.tolist()) <= set(old.tolist())
    assert len(sizes) > 10
    assert torch.equal(corpus.x[:, 5], 100.0 * corpus.y), "what was given stays as it is"


def test_another_speed_goes_from_the_first_frame_to_the_last():
    corpus, f = speech([100] * 20), functions(*CHANGES[1:], hidden=lambda *_: [torch.zeros(20)] * 2)
    corpus.x[:] = (torch.arange(2000) % 100)[:, None]  # a frame's number in its utterance
    new = f.changed(corpus, 10, torch.Generator().manual_seed(0))
    for k in range(20):
        x = new.x[new.start[k] : new.end[k]].mean(1)
        assert x[0] < 0.5 and x[-1] > 97 and x[-8] < 95 and (x.diff()[:-1] > 0.5).all()


def test_noise_is_a_tenth():
    corpus, f = speech([400]), functions(*CHANGES[1:], hidden=lambda *_: [torch.zeros(1)] * 2)
    corpus.x[:] = 0
    new = f.changed(corpus, 10, torch.Generator().manual_seed(0))
    assert float(new.x.std()) == pytest.approx(0.1, rel=0.05)


def test_blanks_are_short_and_within_one_utterance():
    corpus, f = speech([50] * 100), functions(*CHANGES)
    corpus.x[:] = 9.0
    new = f.changed(corpus, 10, torch.Generator().manual_seed(0))
    blank = new.x == 0
    assert 0 < blank.float().mean() < 0.35
    for start, end in zip(new.start.tolist(), new.end.tolist(), strict=True):
        times, numbers = blank[start:end].all(1), blank[start:end].all(0)
        assert times.sum() <= 2 * 11 and numbers.sum() <= 3
        assert len([*itertools.groupby(times.tolist())]) <= 5, "two stretches"
        expected = times[:, None] | numbers[None]
        assert torch.equal(blank[start:end], expected)
    assert blank.any(1).sum() > 200 and (blank.all(1)).sum() > 200


@pytest.mark.parametrize("augment", [True, False])
def test_only_training_is_changed(augment):
    """What the net learns is changed anew in every epoch, if the level wants it; what it is asked is not."""
    corpus, seen, asked = speech([20, 30]), [], []
    f = functions(*NETS, *BATCHES, *CHANGES, "make_optimizer", "train", learn=corpus, check=corpus)
    space, make_batch, accelerator = f.train.__globals__, f.make_batch, Accelerator(cpu=True)

    def spy(given, rows, how):
        (seen if torch.is_grad_enabled() else asked).append(given.x)
        return make_batch(given, rows, how)

    space |= dict(make_batch=spy, accelerator=accelerator, time=time, tqdm=tqdm, QUIET=True, history=[])
    space |= dict(SEED=0, accuracy=lambda *_: 0.0, fingerprint=lambda one: f"{one[-1]}")
    space |= dict(load_checkpoint=lambda *_, **__: 0, save_checkpoint=lambda *_, **__: None)
    how = PLAIN | dict(context=3, augment=augment, epochs=2, batch=50, rate=1e-3, cycle=True, smooth=0.0)
    f.train("net", how)
    same = [torch.equal(x, corpus.x) for x in seen]
    assert asked and all(torch.equal(x, corpus.x) for x in asked)
    if augment:
        assert not any(same) and len({float(x.sum()) for x in seen}) == 2, "another change in each epoch"
    else:
        assert all(same)


# batches and nets


@pytest.mark.parametrize("context", [3, "all"])
@pytest.mark.parametrize("world", [1, 2])
def test_every_item_is_learned_once_an_epoch(context, world):
    corpus, how = speech([10 + k % 7 for k in range(50)]), dict(context=context)
    shares = []
    for rank in range(world):
        f = functions(*BATCHES, rank=rank, world=world)
        batches = f.make_batches(corpus, how, 6, torch.Generator().manual_seed(3))
        shares.append([f.my_share(rows) for rows in batches])
    items = torch.cat([rows for share in shares for rows in share]).tolist()
    count = 50 if context == "all" else len(corpus.x)
    assert sorted(items) == [*range(count)] and {len(share) for share in shares} == {6}


def test_batches_hold_about_as_many_frames_of_about_one_length():
    sizes = np.random.default_rng(0).integers(100, 1000, 200).tolist()
    corpus, f = speech(sizes, columns=1), functions(*BATCHES)
    batches = f.make_batches(corpus, dict(context="all"), 20, torch.Generator().manual_seed(0))
    frames = torch.stack([corpus.size[rows].sum() for rows in batches])
    longest = torch.stack([corpus.size[rows].max() * len(rows) for rows in batches])
    assert frames.max() < 1.5 * frames.min() and longest.sum() < 1.12 * frames.sum()
    mean = torch.stack([corpus.size[rows].float().mean() for rows in batches])
    order = torch.corrcoef(torch.stack([mean, torch.arange(20.0)]))[0, 1]
    assert abs(order) < 0.7, "not from short to long"


@pytest.mark.parametrize("context", [3, "all"])
def test_an_utterance_is_answered_as_if_it_were_alone(context):
    """Neither filling nor the order of the batches may be seen in the answers."""
    corpus = speech([31, 8, 22, 8, 40, 9, 30, 25, 3])
    f, how = functions(*NETS, *BATCHES, learn=corpus), PLAIN | dict(context=context)
    torch.manual_seed(0)
    net = f.make_net(how)
    together = f.ask(net, corpus, how)
    part_of = functions("part_of").part_of
    alone = torch.cat([f.ask(net, part_of(corpus, torch.tensor([k])), how) for k in range(9)])
    assert together.shape == (176, 41) and torch.allclose(together, alone, atol=1e-5)
    assert torch.allclose(together.exp().sum(1), torch.ones(176), atol=1e-5) and not net.training


def test_the_recurrent_net_hears_the_whole_utterance():
    """What comes later is heard, and what came before."""
    corpus = speech([30, 20])
    f, how = functions(*NETS, *BATCHES, learn=corpus), PLAIN | dict(context="all", dropout=0.0)
    torch.manual_seed(0)
    net = f.make_net(how)
    before = f.ask(net, corpus, how)
    for changed, seen in ((20, 9), (9, 20)):  # the two convolutions reach four frames
        other = functions().corpus_of(corpus.x.clone(), corpus.y, corpus.size)
        other.x[changed] += 3
        after = f.ask(net, other, how)
        assert (after[seen] - before[seen]).abs().max() > 1e-5
        assert torch.allclose(after[30:], before[30:], atol=1e-6)


def test_each_half_of_the_state_has_heard_one_side():
    """A frame that changes is heard by the forward net after it, by the backward net before it."""
    torch.manual_seed(0)
    net, x = functions("Recurrent").Recurrent(3, 4), torch.randn(2, 6, 3)
    inside = torch.arange(6) < torch.tensor([[6], [5]])
    other = x.clone()
    other[:, 2] += 3
    with torch.no_grad():
        moved = (net(other, inside) - net(x, inside)).abs() > 1e-6
    left, right = (half.any(2).tolist() for half in moved.split(4, dim=2))
    assert left == [[False] * 2 + [True] * 4] * 2
    assert [row[:5] for row in right] == [[True] * 3 + [False] * 2] * 2


@pytest.mark.parametrize("context", [3, "all"])
def test_processes_share_the_frames_without_gap_or_overlap(context):
    corpus, how = speech([60, 300, 80, 20] * 40), PLAIN | dict(context=context)
    parts = []
    for rank, world in ((0, 1), (0, 2), (1, 2)):
        f = functions(*NETS, *BATCHES, rank=rank, world=world, learn=corpus)
        torch.manual_seed(0)
        parts.append(f.ask(f.make_net(how), corpus, how))
    mine = torch.stack([(part != 0).any(1) for part in parts[1:]])
    assert (mine.sum(0) == 1).all() and mine.any(1).all() and torch.equal(parts[0], sum(parts[1:]))


def test_what_each_idea_does_to_a_net():
    corpus = speech()
    f = functions(*NETS, learn=corpus)
    kinds = [type(one) for one in f.make_net(PLAIN | dict(context=3)).modules()]
    assert kinds.count(nn.BatchNorm1d) == 3 and kinds.count(nn.Linear) == 4
    plain = [type(one) for one in f.make_net(PLAIN | dict(context=3, norm=False)).modules()]
    assert nn.BatchNorm1d not in plain
    assert f.make_net(PLAIN | dict(context=3)).hidden[0][0].in_features == 39
    whole = [type(one) for one in f.make_net(PLAIN | dict(context="all")).modules()]
    assert whole.count(nn.LSTM) == 4 and whole.count(nn.LayerNorm) == 2


@pytest.mark.parametrize("cycle", [True, False])
def test_the_rate_rises_for_a_tenth_and_falls_to_zero(cycle):
    f = functions("make_optimizer")
    optimizer, scheduler = f.make_optimizer(nn.Linear(2, 2), dict(cycle=cycle, rate=0.01), 100)
    rates = []
    for _ in range(100):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    if cycle:
        assert rates.index(max(rates)) in (9, 10) and max(rates) == pytest.approx(0.01)
        assert rates[0] < 0.001 and rates[-1] < 1e-5
    else:
        assert set(rates) == {0.01}


# report


def test_distance_to_the_border_of_a_segment():
    y = torch.tensor([0, 0, 0, 4, 4, 4, 4, 4, 9, 9], dtype=torch.uint8)
    corpus = functions().corpus_of(torch.zeros(10, 1), y, torch.tensor([9, 1]))
    found = functions("to_border").to_border(corpus)
    assert found.tolist() == [0, 1, 0, 0, 1, 2, 1, 0, 0, 0]


def test_width_of_equal_size():
    f = functions("width_for", "layer", "Perceptron")
    assert abs(f.width_for(6_380_585, 39, 2) - 1765) <= 1
    for inputs, width in ((39, 1024), (143, 128), (247, 1024), (65, 32)):
        deep = f.Perceptron(inputs, 6, width, False, 0)
        count = sum(weight.numel() for weight in deep.parameters())
        assert count == (inputs + 1) * width + 6 * (width**2 + width) + 41 * (width + 1)
        wide = f.Perceptron(inputs, 2, f.width_for(count, inputs, 2), False, 0)
        assert abs(sum(weight.numel() for weight in wide.parameters()) / count - 1) < 0.01


# files


def test_submission_has_all_frames_in_order(straight):
    answers = np.load(sample_of(straight) / "answers" / "classes.npy")
    lines = straight[1].decode().split("\n")
    assert lines[0] == "Id,Class" and lines[-1] == ""
    assert [line.split(",")[0] for line in lines[1:-1]] == [str(row) for row in range(len(answers))]


@pytest.mark.parametrize("value", ["41", "-1", "", "3.0", "03", "nan", "²"])
def test_a_class_is_a_whole_number_from_0_to_40(value):
    is_class = functions("is_class").is_class
    assert is_class("0") and is_class("40") and not is_class(value)


def test_utterances_in_another_order_are_another_file(straight, tmp_path):
    """The judge notices when the order of the buckets is not undone."""
    submission = straight[1]
    data = sample_of(straight)
    names = (data / "data/libriphone/test_split.txt").read_text().split()
    assert names != sorted(names), "the list is not sorted, as in the course's data"
    sizes = [len(torch.load(data / f"data/libriphone/feat/test/{name}.pt")) for name in names]
    guess = np.loadtxt(submission.decode().splitlines(), delimiter=",", skiprows=1, dtype=int)[:, 1]
    parts = np.split(guess, np.cumsum(sizes)[:-1])
    judge, scores = pick(SCRIPT, "score_submission"), []
    for order in (range(len(names)), np.argsort(sizes)):
        mixed = np.concatenate([parts[k] for k in order])
        path = tmp_path / "prediction.csv"
        path.write_text("Id,Class\n" + "".join(f"{k},{c}\n" for k, c in enumerate(mixed)))
        scores.append(judge.score_submission(path, data / "answers"))
    assert scores[0] == straight[0]["score"] and scores[1] < 0.6 * scores[0]


def classes_by_name(submission, root):
    """{utterance: its predicted classes}, read with nothing but the files."""
    guess = [int(line.split(",")[1]) for line in submission.read_text().split("\n")[1:-1]]
    found = {}
    for name in (root / "test_split.txt").read_text().split():
        size = len(torch.load(root / "feat" / "test" / f"{name}.pt"))
        found[name], guess = guess[:size], guess[size:]
    assert not guess, "more rows than frames"
    return found


def test_nested_layouts_and_the_order_of_the_list(run, straight, tmp_path):
    """One `libriphone`, or two in a zip, the list in reverse: each utterance keeps its own prediction."""
    found = []
    for k, inside in enumerate(("libriphone", "libriphone/libriphone")):
        root = copy_of_the_sample(straight, tmp_path / f"given{k}" / inside)
        names = (root / "test_split.txt").read_text().split()
        (root / "test_split.txt").write_text("\n".join(names[:: 1 - 2 * k]) + "\n" * k)
        if k:
            shutil.make_archive(tmp_path / "packed" / "libriphone", "zip", tmp_path / "given1")
        folder = tmp_path / ("packed" if k else "given0")
        wanted = dict(HW_DATA="real", HW_DATA_DIR=folder, HW_OUT_DIR=f"out{k}")
        done = run(SCRIPT, HW_LEVEL="simple", **wanted).wait()
        assert done.code == 0 and "data: real" in done.text, done.text
        found.append(classes_by_name(tmp_path / f"out{k}" / "simple-real" / "prediction.csv", root))
    assert list(found[0]) == list(found[1])[::-1] and found[0] == found[1]
    assert len({tuple(line) for line in found[0].values()}) > 10, "not all the same"


def spoil(root, part, k, change):
    """Load, change and store the k-th file of a split; returns its path."""
    path = root / "feat" / part / f"{(root / f'{part}_split.txt').read_text().split()[k]}.pt"
    if isinstance(change, int):
        path.write_bytes(path.read_bytes()[:change])
    else:
        torch.save(change(torch.load(path)), path)
    return path


def with_value(value, count):
    def change(x):
        x.view(-1)[7 : 7 + count] = value
        return x

    return change


def test_damaged_files_are_named_dropped_or_clamped(run, straight, tmp_path):
    root = copy_of_the_sample(straight, tmp_path / "given")
    before = len(list((root / "feat" / "test").iterdir()))
    notes = {
        spoil(root, "train", 3, 900): "cannot be read",
        spoil(root, "train", 5, with_value(1e38, 4)): "has 4 wild values, clamped\n",
        spoil(root, "train", 6, with_value(-2e38, 2000)): "has 2000 wild values, clamped, utterance dropped",
        spoil(root, "test", 0, with_value(float("nan"), 3000)): "has 3000 wild values, clamped\n",
        spoil(root, "test", 1, lambda x: x[:, :13]): "does not hold a tensor of (frames, 39)\n",
    }
    done = run(SCRIPT, HW_DATA="real", HW_DATA_DIR=root, HW_LEVEL="medium").wait()
    assert done.code == 0, done.text
    for path, note in notes.items():
        line = next(
            line for line in done.text.splitlines(True) if path.name in line and " more (" not in line
        )
        assert note in line, line
    assert re.search(r"size +\(30,\)", done.text) and re.search(rf"test_size +\({before},\)", done.text)
    found = classes_by_name(tmp_path / "out/HW02/medium-real/prediction.csv", root)
    assert len(found) == before
    losses = pd.read_csv(tmp_path / "out/HW02/medium-real/history.csv")["loss"]
    assert len(losses) and np.isfinite(losses).all()


def test_columns_that_carry_more_are_kept(run, straight, tmp_path):
    root = copy_of_the_sample(straight, tmp_path / "given")
    for path in (root / "feat").glob("*/*.pt"):
        x = torch.load(path)
        x[:, 20] = torch.roll(x[:, 20], 1)
        torch.save(x, path)
    done = run(SCRIPT, HW_DATA="real", HW_DATA_DIR=root, HW_LEVEL="simple").wait()
    assert done.code == 0 and "39 are kept" in done.text, done.text
    result = json.loads((tmp_path / "out/HW02/simple-real/result.json").read_text())
    assert result["parameters"] == 39 * 256 + 256 + 256**2 + 256 + 41 * 257


def relabel(root, change):
    path = root / "train_labels.txt"
    lines = path.read_text().split("\n")
    lines[2] = change(lines[2])
    path.write_text("\n".join(line for line in lines if line))
    return (root / "train_split.txt").read_text().split()[2]


def without(root, part, k):
    path = spoil(root, part, k, 0)
    path.unlink()
    return path.name


def one_more(root, part):
    some = next((root / "feat" / part).iterdir())
    return shutil.copy(some, some.with_name("1-2-3.pt")).name


def twice(root):
    path = root / "test_split.txt"
    name = path.read_text().split()[4]
    path.write_text(f"{path.read_text()}\n{name}")
    return name


FAULTS = {  # what happens to the folder -> the name that must be said; and what the sentence says
    "wrong T": (lambda root: spoil(root, "train", 4, lambda x: x[:-1]).stem, "frames, but"),
    "short labels": (lambda root: relabel(root, lambda line: line.rsplit(" ", 3)[0]), "frames, but"),
    "class 41": (lambda root: relabel(root, lambda line: f"{line.rsplit(' ', 1)[0]} 41"), "outside 0 to 40"),
    "class x": (lambda root: relabel(root, lambda line: f"{line.rsplit(' ', 1)[0]} x"), "that is no number"),
    "no labels": (lambda root: relabel(root, lambda line: ""), "has no line for utterance"),
    "missing train": (lambda root: without(root, "train", 9), "is missing"),
    "missing test": (lambda root: without(root, "test", 9), "is missing"),
    "truncated test": (lambda root: spoil(root, "test", 3, 700).name, "must be answered"),
    "one more": (lambda root: one_more(root, "train"), "has no line in"),
    "twice": (twice, "more than once"),
    "all damaged": (lambda root: [spoil(root, "train", k, 99).name for k in range(9)][0], "are damaged"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_files_that_do_not_fit_together(run, straight, tmp_path, fault):
    root = copy_of_the_sample(straight, tmp_path / "given")
    spoiled, sentence = FAULTS[fault]
    name = spoiled(root)
    ended = run(SCRIPT, HW_DATA="real", HW_DATA_DIR=tmp_path / "given", HW_LEVEL="medium").wait()
    assert ended.code == 1 and "Traceback" not in ended.text, ended.text
    last = ended.text.strip().splitlines()[-1]
    assert sentence in last and name in last, last
    assert {path.suffix for path in (tmp_path / "out").rglob("*") if path.is_file()} <= {".lock"}


def test_a_diverged_training_says_so(run, changed):
    wild = changed(SCRIPT, "(1e-3, 2e-3, 2e-3, 9e-3)", "(1e-3, 1e35, 2e-3, 9e-3)")
    one_sentence(run(wild, HW_LEVEL="medium").wait(), "diverged", "lower `rate` of medium in SIZES")


def test_two_processes_gather_the_same_answers(straight, tmp_path):
    """From the finished checkpoints, two processes on the CPU write the very same file."""
    for name in ("data", "out"):
        shutil.copytree(straight[2] / name, tmp_path / name)
    (tmp_path / "out/HW02/boss-sample/prediction.sample.csv").unlink()
    first, second = (one.wait() for one in ranks(SCRIPT, tmp_path))
    assert (first.code, second.code) == (0, 0), first.text + second.text
    assert "\non 2 x cpu" in first.text and first.text.count("going on after 3") >= 12
    assert outcome(tmp_path)[1] == straight[1]


@pytest.mark.parametrize("what", ["loss", "report", "nets", "changed"])
def test_what_makes_a_checkpoint_useless(run, straight, changed, tmp_path, what):
    """A third net leaves the two that are there as they are; the report concerns only itself."""
    old, new, stages = {
        "loss": ('label_smoothing=how["smooth"]', "label_smoothing=0.3", 12),
        "report": ("rates = (0.25, 0.5, 0.75)", "rates = (0.25, 0.5, 0.7)", {"dropout 0.75"}),
        "nets": ('"nets":    (1,      1,      1,      2),', '"nets":    (1,      1,      1,      3),', set()),
        "changed": ("between(0.9, 1.1", "between(0.8, 1.1", 12),
    }[what]
    anew = trained_anew(run, straight, changed(SCRIPT, old, new), tmp_path)
    assert anew == stages or len(anew) == stages, anew


MUTANTS = [
    ("start=end - size, end=end, owner", "start=end - size + 1, end=end, owner"),
    ("around.clamp(corpus.start[owner][:, None]", "around.clamp(0 * owner[:, None]"),
    ("rest < 1e-3", "rest < 1e3"),
    ("        parts.insert(1, nn.BatchNorm1d(width))", "        parts.insert(0, nn.BatchNorm1d(inputs))"),
    ("torch.where(inside, last - t, t)[..., None]", "t.flip(0).expand(inside.shape)[..., None]"),
    ("transpose(1, 2))) * inside[..., None]", "transpose(1, 2)))"),
    ("from_right.gather(1, turn.expand_as(from_right))", "from_right"),
    ('changed(learn, how["blank"], dice) if how["augment"] else learn', "learn"),
    ("x = x + 0.1 * torch.randn", "x = x + 0.3 * torch.randn"),
    ("corpus.y[corpus.start[who] + old.round().long()]", "corpus.y[low]"),
    ("old = (t * speed[who]).minimum", "old = (t / speed[who]).minimum"),
    ("    for _ in range(2):\n", "    for _ in range(3):\n"),
    ("pct_start=0.1", "pct_start=0.3"),
    (".split(number.bincount(minlength=steps).tolist())", ".tensor_split(steps)"),
    ("return [batches[k] for k in torch.randperm(steps, generator=dice)]", "return batches"),
    ("return rows[accelerator.process_index :: world]", "return rows[::world]"),
    ("for part in rows[accelerator.process_index :: accelerator.num_processes]:", "for part in rows:"),
    ("found[frames] = logits", "found[: len(frames)] = logits"),
    ("bare(model).eval()", "bare(model)"),
    ("model = bare(model).eval()", "model.eval()"),
    ('how | {"nets": "any number"}', "how"),
    ("np.mean(guess == np.load", "np.mean(guess != np.load"),
    ('drop = part == "train" and share >= 0.01', 'drop = part == "train" and share >= 1'),
    ("return place.minimum(size[segment] - 1 - place)", "return place"),
]
