"""HW02's own invariants."""

import itertools
import json
import shutil
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import TESTS, outcome, trained_anew
from notebooks import pick
from runner import ranks
from torch.utils._python_dispatch import TorchDispatchMode

SCRIPT = TESTS.parent / "HW02" / "HW02.py"
MEMBERS = {
    "GRU": dict(net="GRU", layers=2, width=8, front=8, dropout=0.5),
    "LSTM": dict(net="LSTM", layers=1, width=8, front=8, dropout=0.5),
    "conformer": dict(net="conformer", layers=2, width=8, heads=2, kernel=5, dropout=0.5, skip=0.1),
}
STILL = dict(noise=0.0, speed=0.0, time_mask=0, column_mask=-1, batch_size=4)


def corpus(sizes, columns=13, seed=0):
    """What the notebook's functions find on the device: utterances of these sizes, with random frames."""
    dice, lengths = torch.Generator().manual_seed(seed), torch.tensor(sizes)
    frames = int(lengths.sum())
    return dict(
        flat=torch.randn(frames, columns, generator=dice),
        classes=torch.randint(41, (frames,), generator=dice).to(torch.uint8),
        lengths=lengths,
        offsets=torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)]),
        owner=torch.repeat_interleave(torch.arange(len(sizes)), lengths),
        device="cpu",
        COLUMNS=columns,
        CLASSES=41,
        SEED=5,
    )


def process(rank=0, world=1):
    alone = dict(process_index=rank, num_processes=world, reduce=lambda x: x, autocast=nullcontext)
    return SimpleNamespace(**alone)


def functions(*names, rank=0, world=1, sizes=(9, 4, 17, 4, 12, 1, 30), **given):
    store = corpus(sizes)
    wanted = {"frames_of", "windows", "utterances", "delta", "blank", "get_batch", *names}
    return pick(SCRIPT, *wanted, accelerator=process(rank, world), **store, **given)


def copy_of_the_sample(straight, target):
    """The tiny sample's files, where real files are expected."""
    return shutil.copytree(straight[2] / "data" / "HW02-sample" / "tiny" / "data" / "libriphone", target)


def test_beats_a_constant_answer(straight):
    result, _, folder = straight
    answers = np.load(folder / "data" / "HW02-sample" / "tiny" / "answers" / "classes.npy")
    assert result["score"] > 2 * np.bincount(answers).max() / len(answers)


def test_windows_stay_in_their_utterance():
    """The gather against the plain way: cut the utterance out, repeat its border frames."""
    f = functions()
    for n in (1, 5, 19):
        found = f.windows(torch.arange(len(f.flat)), n).view(len(f.flat), n, 13)
        for k, size in enumerate(f.lengths.tolist()):
            alone = f.flat[f.offsets[k] : f.offsets[k + 1]]
            padded = torch.cat([alone[:1].expand(n // 2, -1), alone, alone[-1:].expand(n // 2, -1)])
            for t in range(size):
                assert torch.equal(found[f.offsets[k] + t], padded[t : t + n])


class Largest(TorchDispatchMode):
    """Remembers how many numbers the largest new tensor holds."""

    numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for one in out if isinstance(out, (list, tuple)) else [out]:
            self.numbers = max(self.numbers, one.numel() if isinstance(one, torch.Tensor) else 0)
        return out


def test_no_matrix_of_all_windows_is_ever_made():
    f = functions("make_batches", "predict", sizes=[400] * 100)
    plan, n = dict(net="MLP", frames=19, batch_size=512), 40000
    net = torch.nn.Linear(19 * 13, 41)
    with Largest() as seen:
        for batch in f.make_batches(plan, torch.arange(100), 1):
            f.get_batch(batch, plan, True)
        f.predict(net, plan, torch.arange(100))
    assert 512 * 19 * 13 <= seen.numbers <= 8192 * 19 * 13 < 0.3 * n * 19 * 13


def test_frames_of_keeps_the_order_of_the_utterances():
    f = functions()
    wanted = [range(f.offsets[k], f.offsets[k + 1]) for k in (4, 0, 6)]
    assert f.frames_of(torch.tensor([4, 0, 6])).tolist() == [*itertools.chain(*wanted)]


def test_utterances_are_padded_and_their_true_derivatives_added():
    f, numbers = functions(), torch.tensor([1, 6, 5, 0])
    x, length, y = f.utterances(numbers, STILL, False)
    assert x.shape == (4, 30, 39) and length.tolist() == [4, 30, 1, 9]
    for row, k in enumerate(numbers.tolist()):
        alone, size = f.flat[f.offsets[k] : f.offsets[k + 1]], int(f.lengths[k])
        longer = torch.cat([alone[:1], alone, alone[-1:]])
        assert torch.equal(x[row, :size, :13], alone)
        assert torch.allclose(x[row, :size, 13:26], (longer[2:] - longer[:-2]) / 2)
        assert (x[row, size:] == 0).all() and (y[row, size:] == -100).all()
        assert torch.equal(y[row, :size], f.classes[f.offsets[k] : f.offsets[k + 1]].long())


def test_other_speed_keeps_frames_and_classes_together():
    """Frames that carry their class as a value: wherever two equal frames are mixed, the class must fit."""
    f = functions(sizes=[60, 80])
    f.flat[:] = f.classes[:, None].float()
    for _ in range(20):
        x, length, y = f.utterances(torch.tensor([0, 1]), STILL | dict(speed=0.1), True)
        assert (length >= torch.tensor([54, 72])).all() and (length <= torch.tensor([67, 89])).all()
        whole, low, high = x[..., 0], f.classes.min(), f.classes.max()
        inside = y >= 0
        assert (inside.sum(1) == length).all() and whole[inside].min() >= low and whole[inside].max() <= high
        # the nearest frame has the larger share: the mixture lies on its side of the middle or on it
        kinds = torch.arange(41)
        assert all(kind in kinds for kind in y[inside])
        start = f.classes[f.offsets[:2]].long()
        assert (y[:, 0] == start).all() and torch.equal(whole[:, 0], start.float())
    changed = {tuple(f.utterances(torch.tensor([0]), STILL | dict(speed=0.1), True)[1]) for _ in range(20)}
    assert len(changed) > 3


def test_blank_hides_one_short_stretch():
    f = functions()
    x = torch.ones(200, 50, 13)
    hidden = (f.blank(x, 1, 10) == 0).all(2)
    assert hidden.sum(1).max() <= 10 and hidden.sum() > 200
    assert all(len(set(np.diff(np.flatnonzero(row)))) <= 1 for row in hidden.numpy())
    hidden = (f.blank(x, 2, 3) == 0).all(1)
    assert 0 < hidden.sum(1).max() <= 3
    assert (x == 1).all(), "the frames themselves stay as they are"


@pytest.mark.parametrize("net", ["MLP", "GRU"])
@pytest.mark.parametrize("world", [1, 2])
def test_every_item_is_learned_once_an_epoch(net, world):
    sizes = [10 + k % 7 for k in range(50)]
    plan = dict(net=net, batch_size=8 if net == "GRU" else 64)
    shares = [
        functions("make_batches", rank=rank, world=world, sizes=sizes).make_batches(plan, torch.arange(50), 3)
        for rank in range(world)
    ]
    items = torch.cat([batch for share in shares for batch in share]).tolist()
    assert len(items) == len({*items}) and len(items) > (46 if net == "GRU" else sum(sizes) - 66)
    assert len({len(share) for share in shares}) == 1, "each process takes as many steps"


@pytest.mark.parametrize("net", MEMBERS)
def test_predictions_are_the_same_with_and_without_buckets(net):
    sizes = [31, 8, 22, 8, 40, 9, 30, 25, 3]
    f = functions("predict", "make_model", "Sequence", "Recurrent", "Conformer", "rotate", sizes=sizes)
    torch.manual_seed(0)
    plan = MEMBERS[net] | STILL
    model = f.make_model(plan)
    order = torch.tensor([4, 8, 0, 3, 7, 1, 2, 6, 5])
    bucketed = f.predict(model, plan | dict(batch_size=2), order)
    alone = torch.cat([f.predict(model, plan, one[None]) for one in order])
    assert bucketed.shape == (sum(sizes), 41) and torch.allclose(bucketed, alone, atol=1e-5)
    assert torch.equal(bucketed.argmax(1), alone.argmax(1))
    assert not torch.allclose(bucketed, f.predict(model, plan, torch.arange(9)), atol=1e-3), "order matters"


@pytest.mark.parametrize("net", ["MLP", "GRU"])
def test_processes_share_the_frames_without_gap_or_overlap(net):
    plan = MEMBERS.get(net, dict(net="MLP", frames=3, layers=1, width=8, strong=False, dropout=0.0)) | STILL
    parts, names = [], ("predict", "make_model", "MLP", "Sequence", "Recurrent")
    for rank, world in ((0, 1), (0, 3), (1, 3), (2, 3)):
        f = functions(*names, rank=rank, world=world, sizes=[5000, 7000, 9000, 3, 60, 80, 20])
        torch.manual_seed(0)
        parts.append(f.predict(f.make_model(plan | dict(batch_size=1)), plan, torch.arange(3, 7)))
    mine = torch.stack([(part != 0).any(1) for part in parts[1:]]).sum(0)
    assert (mine == 1).all() and torch.equal(parts[0], sum(parts[1:]))


def test_viterbi_finds_the_best_path():
    """Against all paths, for utterances of different length side by side."""
    f = pick(SCRIPT, "viterbi", CLASSES=3)
    dice = torch.Generator().manual_seed(1)
    sizes = torch.tensor([5, 1, 4])
    logp, pairs = (torch.randn(n, 3, generator=dice).log_softmax(1) for n in (10, 3))
    found = f.viterbi(logp, sizes, 2 * pairs).split(sizes.tolist())
    for alone, path in zip(logp.split(sizes.tolist()), found, strict=True):

        def score(way, alone=alone):
            steps = sum(2 * pairs[a, b] for a, b in itertools.pairwise(way))
            return float(sum(alone[t, c] for t, c in enumerate(way)) + steps)

        assert tuple(path.tolist()) == max(itertools.product(range(3), repeat=len(alone)), key=score)
    assert torch.equal(f.viterbi(logp, sizes, 0 * pairs), logp.argmax(1))


def test_pairs_are_counted_within_utterances():
    f = functions("count_pairs", sizes=[3, 2])
    f.classes[:] = torch.tensor([1, 1, 2, 7, 7])
    pairs = f.count_pairs(torch.tensor([0, 1])).exp()
    assert torch.allclose(pairs.sum(1), torch.ones(41))
    assert pairs[1, 1] == pairs[1, 2] > pairs[1, 3] and pairs[2, 7] == pairs[2, 8], "no pair across"


def test_distance_to_the_border_of_a_segment():
    f = pick(SCRIPT, "to_border")
    y, who = torch.tensor([0, 0, 0, 4, 4, 4, 4, 4, 9, 9]), torch.tensor([0] * 9 + [1])
    assert f.to_border(y, who).tolist() == [0, 1, 0, 0, 1, 2, 1, 0, 0, 0]


def test_width_of_equal_size():
    f = functions("width_for", "MLP")
    assert abs(f.width_for(6_380_585, 39, 2) - 1765) <= 1
    for inputs, width in ((39, 1024), (143, 128), (247, 1024), (65, 32)):
        deep = f.MLP(inputs, 6, width, False, 0)
        count = sum(weight.numel() for weight in deep.parameters())
        assert count == (inputs + 1) * width + 6 * (width**2 + width) + 41 * (width + 1)
        wide = f.MLP(inputs, 2, f.width_for(count, inputs, 2), False, 0)
        assert abs(sum(weight.numel() for weight in wide.parameters()) / count - 1) < 0.01


def test_report_and_figures(straight):
    result, _, folder = straight
    text = (folder / "run.log").read_text()
    names = "data curves deep-wide dropout context borders recall strip"
    assert {path.stem for path in (folder / "out/HW02/boss-sample/figures").iterdir()} == {*names.split()}
    assert "13 are kept" in text and "42 utterances to learn from, 6 to check on" in text
    for stage in (
        "narrow, deep",
        "wide, shallow",
        "dropout 0.25",
        "dropout 0.5",
        "dropout 0.75",
        "31 frames",
    ):
        kept = (folder / "out/HW02/boss-sample/checkpoint").glob(f"{stage}.????????.pt")
        assert len(list(kept)) == 1, stage
        assert text.count(f"\n{stage} ") == 2, "its epoch and its row in the table"
    assert len(result["by_distance"]) == 7 and result["smoothing_gain"] >= 0


def test_submission_has_all_frames_in_order(straight):
    _, submission, folder = straight
    answers = np.load(folder / "data" / "HW02-sample" / "tiny" / "answers" / "classes.npy")
    lines = submission.decode().split("\n")
    assert lines[0] == "Id,Class" and lines[-1] == ""
    assert [line.split(",")[0] for line in lines[1:-1]] == [str(row) for row in range(len(answers))]


def test_utterances_in_another_order_are_another_file(straight, tmp_path):
    """The judge notices when the order of the buckets is not undone."""
    _, submission, folder = straight
    data = folder / "data" / "HW02-sample" / "tiny"
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


@pytest.mark.parametrize("fault", ["header", "missing", "nan", "order", "blank", "class 41", "end"])
def test_validator_rejects(straight, fault, tmp_path):
    lines = straight[1].decode().split("\n")
    lines = {
        "header": ["id,class", *lines[1:]],
        "missing": [*lines[:5], *lines[6:]],
        "nan": [*lines[:5], "4,nan", *lines[6:]],
        "order": [lines[0], lines[2], lines[1], *lines[3:]],
        "blank": [*lines[:5], "", *lines[5:]],
        "class 41": [*lines[:5], "4,41", *lines[6:]],
        "end": lines[:-1],
    }[fault]
    path, count = tmp_path / "prediction.csv", len(straight[1].split()) - 1
    path.write_text("\n".join(lines))
    given = dict(test=torch.tensor([0]), lengths=torch.tensor([count]), CLASSES=41, say=print)
    check = pick(SCRIPT, "check_submission", "Stop", **given)
    with pytest.raises(check.Stop, match="prediction.csv"):
        check.check_submission(path)
    path.write_bytes(straight[1])
    check.check_submission(path)


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
        done = run(SCRIPT, HW_REPORT="false", HW_EPOCHS=1, **wanted).wait()
        assert done.code == 0 and "data: real" in done.text, done.text
        found.append(classes_by_name(tmp_path / f"out{k}" / "boss-real" / "prediction.csv", root))
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
        line = next(line for line in done.text.splitlines(True) if path.name in line)
        assert note in line, line
    assert "train: 46 utterances" in done.text and f"test: {before} utterances" in done.text
    found = classes_by_name(tmp_path / "out/HW02/medium-real/prediction.csv", root)
    assert len(found) == before
    losses = [float(line.split()[4]) for line in done.text.splitlines() if line.startswith("1 MLP")]
    assert losses and np.isfinite(losses).all()


def test_columns_that_carry_more_are_kept(run, straight, tmp_path):
    root = copy_of_the_sample(straight, tmp_path / "given")
    for path in (root / "feat").glob("*/*.pt"):
        x = torch.load(path)
        x[:, 20] = torch.roll(x[:, 20], 1)
        torch.save(x, path)
    done = run(SCRIPT, HW_DATA="real", HW_DATA_DIR=root, HW_LEVEL="medium").wait()
    assert done.code == 0 and "39 are kept" in done.text, done.text
    assert outcome_columns(tmp_path) == 39 * 5 * 64 + 64 + 2 * (64 * 64 + 64) + 41 * 65


def outcome_columns(folder):
    return json.loads((folder / "out/HW02/medium-real/result.json").read_text())["parameters"]


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


def test_a_diverged_training_says_so(run, changed, tmp_path):
    wild = changed(SCRIPT, "width=192, batch_size=512, lr=2e-3", "width=192, batch_size=512, lr=1e30")
    ended = run(wild, HW_LEVEL="medium").wait()
    assert ended.code == 1 and "diverged" in ended.text and "Traceback" not in ended.text


def test_two_processes_gather_the_same_answers(straight, tmp_path):
    """From the finished checkpoints, two processes on the CPU write the very same file."""
    for name in ("data", "out"):
        shutil.copytree(straight[2] / name, tmp_path / name)
    (tmp_path / "out/HW02/boss-sample/prediction.sample.csv").unlink()
    first, second = (one.wait() for one in ranks(SCRIPT, tmp_path))
    assert (first.code, second.code) == (0, 0), first.text + second.text
    assert "\non 2 x cpu" in first.text and first.text.count("going on after") >= 2
    assert not [line for line in first.text.splitlines() if "loss" in line], "nothing was to be trained"
    assert outcome(tmp_path)[1] == straight[1]


@pytest.mark.parametrize("what", ["loss", "report"])
def test_what_makes_a_checkpoint_useless(run, straight, changed, tmp_path, what):
    old, new = {
        "loss": ('label_smoothing=plan["smoothing"]', "label_smoothing=0.3"),
        "report": ("rates = (0.25, 0.5, 0.75)", "rates = (0.25, 0.5, 0.7)"),
    }[what]
    anew = trained_anew(run, straight, changed(SCRIPT, old, new), tmp_path)
    assert len(anew) == 12 if what == "loss" else anew == {"dropout 0.75"}, anew
