"""HW14's own invariants."""

import gzip
import json
import shutil
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import TESTS, trained_anew
from notebooks import LEVELS, pick
from PIL import Image
from torch.nn import functional as F
from torchvision.transforms import functional as official

SCRIPT = TESTS.parent / "HW14" / "HW14.py"
GUARDS = ["EWC", "MAS", "SI", "RWalk", "SCP"]
COURSE = ["CourseEWC", "CourseMAS", "CourseSI", "CourseRWalk", "CourseSCP"]
MEMORIES = ["ER", "DER", "AGEM", "DERandMAS"]
TOOLS = ["Nets", "look", "add_up", "cross_entropy", "per_image", "per_batch", "batches", "evaluate", "train"]
KINDS = ["Method", "Joint", "Guard", "InTheCourse", "LwF", "Stop", *GUARDS, *COURSE, *MEMORIES]
SMALL = dict(hidden=(32, 16), lr=3e-3, batch_size=32, epochs=2, slices=3, angles=(0, 40, 80))


@pytest.fixture
def parts():
    """The notebook's classes and loop, alone, on a small net; checkpoints and lines are left out."""
    given = dict(settings=SMALL, device=torch.device("cpu"), RANK=0, WORLD=1, SEED=1, QUIET=True, history=[])
    given |= dict(
        accelerator=SimpleNamespace(backward=lambda loss: loss.backward()), log=lambda *_: None, REAL=False
    )
    given |= dict(load_checkpoint=lambda *_, **__: 0, save_checkpoint=lambda *_, **__: None)
    return pick(SCRIPT, *TOOLS, *KINDS, "rotated", **given)


@pytest.fixture
def data(parts):
    """Three tasks of 96 digits each, and as many to check on."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = np.zeros((192, 28, 28), np.uint8)
    images[:, 6:22, 6:22] = np.kron(digits.images[:192] * 15, np.ones((1, 2, 2)))
    x, y = parts.rotated(images), torch.tensor(digits.target[:192])
    return (x[:, :96], y[:96]), (x[:, 96:], y[96:])


def one_by_one(model, x, y, goal, power):
    """What per_image must find, by a backward pass for each image."""
    total = torch.zeros_like(model.theta)
    for image, label in zip(x, y, strict=True):
        value = goal(model(image[None].float() / 255), label[None]).sum()
        total += torch.autograd.grad(value, model.theta)[0].abs() ** power
    return total / len(x)


def length(out, y):
    return out.square().sum(2)


def test_beats_a_constant_answer(straight):
    result, _, folder = straight
    labels = np.load(folder / "data" / "HW14-sample" / "tiny" / "answers" / "labels.npy")
    assert result["score"] > 300 * np.bincount(labels).max() / len(labels)


def test_ladder_reaches_its_thresholds():
    levels = json.loads((TESTS / "ladder.json").read_text())["HW14"]["levels"]
    scores = {level: levels[level]["scores"] for level in LEVELS}
    for level, least in {"simple": 45, "medium": 68, "strong": 78, "boss": 91}.items():
        assert min(scores[level]) >= least, level
    for low, high in zip(LEVELS, LEVELS[1:], strict=False):
        assert all(b - a >= 3 for a, b in zip(scores[low], scores[high], strict=True)), (low, high)
    assert max(levels["boss"]["seconds"]) < 240


def test_tasks_are_the_official_rotations():
    """Turned at once as bytes, against one by one as in the official sample."""
    dice = np.random.default_rng(0)
    images = dice.integers(0, 256, (10, 28, 28), dtype=np.uint8)
    angles = (0, 20, 40, 60, 80)
    part = pick(SCRIPT, "rotated", "FULL", settings=dict(angles=angles), device="cpu")
    assert part.FULL["angles"] == angles and part.FULL["hidden"] == (1024, 512, 256)
    turned = part.rotated(images)
    assert turned.shape == (5, 10, 784) and turned.dtype == torch.uint8
    for task, angle in enumerate(angles):
        for k, image in enumerate(images):
            wanted = official.rotate(official.to_tensor(Image.fromarray(image)), angle)
            assert (turned[task, k].view(28, 28) == (wanted[0] * 255).round()).all()
    right = np.zeros((1, 28, 28), np.uint8)
    right[0, 14, 24] = 255  # three o'clock
    assert part.rotated(right)[4].view(28, 28).nonzero()[0, 0] < 8, "counter-clockwise"


@pytest.mark.parametrize("goal, power", [("labels", 2), ("length", 1), ("slice", 2)])
def test_importance_equals_a_backward_pass_for_each_image(parts, data, goal, power):
    (x, y), _ = data
    v = torch.nn.functional.normalize(torch.arange(10.0), dim=0)
    goals = {"labels": parts.cross_entropy, "length": length, "slice": lambda out, y: out @ v}
    model = parts.Nets([3, 4])
    fast = parts.per_image(model, x[1, :16], y[:16], goals[goal], power)
    slow = one_by_one(model, x[1, :16], y[:16], goals[goal], power)
    torch.testing.assert_close(fast, slow, rtol=1e-4, atol=1e-8)
    assert not torch.allclose(fast, parts.per_batch(model, x[1, :16], y[:16], goals[goal], power), rtol=0.05)


def test_guards_measure_what_their_formula_says(parts, data):
    (x, y), _ = data
    model = parts.Nets([5])
    torch.testing.assert_close(
        parts.EWC().measure(model, x[0, :16], y[:16]),
        one_by_one(model, x[0, :16], y[:16], parts.cross_entropy, 2),
        rtol=1e-4,
        atol=1e-8,
    )
    wanted = one_by_one(model, x[0, :16], y[:16], length, 1)
    torch.testing.assert_close(parts.MAS().measure(model, x[0, :16], y[:16]), wanted, rtol=1e-4, atol=1e-8)
    wanted = torch.zeros_like(model.theta)  # the official way, written out: one batch of 16, then its mean
    value = model(x[0, :16][None].float() / 255).square().sum(2).mean()
    wanted = torch.autograd.grad(value, model.theta)[0].abs()
    found = parts.CourseMAS().measure(model, x[0, :16], y[:16])
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-8)


def test_work_of_the_weights_is_the_fall_of_the_loss(parts, data):
    """SI: the sum of all weights' shares is what the loss fell by."""
    (x, y), _ = data
    model, method = parts.Nets([7]), parts.SI()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    method.before_task(model)
    losses = []
    for _ in range(60):
        loss = method.loss(model, x[0][None].float() / 255, y[None])
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.sum().backward()
        method.bend(model)
        optimizer.step()
        method.after_step(model)
    fall = losses[0] - method.loss(model, x[0][None].float() / 255, y[None]).item()
    assert fall > 0.1 and abs(method.work.sum().item() - fall) < 0.2 * fall


def test_the_pull_is_the_gradient_of_the_penalty(parts, data):
    (x, y), _ = data
    model, method = parts.Nets([1, 2]), parts.EWC((0.7, 3.0))
    method.before_task(model)
    method.after_task(model, x[0], y)
    method.before_task(model)
    with torch.no_grad():
        model.theta += 0.01 * torch.randn_like(model.theta)
    energy = (method.importance * (model.theta - method.anchor) ** 2).sum(1)
    penalty = torch.tensor([0.7, 3.0]) @ energy
    wanted = torch.autograd.grad(penalty, model.theta)[0]
    model.theta.grad = torch.zeros_like(model.theta)
    method.bend(model)
    torch.testing.assert_close(model.theta.grad, wanted)


@pytest.mark.parametrize("kind", [*GUARDS, *COURSE])
def test_a_guard_of_zero_is_finetune(parts, data, kind):
    free, _ = parts.train("finetune", parts.Method((0.0,)), [1], *data)
    tied, _ = parts.train(kind, getattr(parts, kind)((0.0,)), [1], *data)
    assert (free.theta == tied.theta).all()
    firm, _ = parts.train(kind, getattr(parts, kind)((1e3,)), [1], *data)
    assert not torch.allclose(free.theta, firm.theta)


def test_nets_side_by_side_learn_as_if_alone(parts, data):
    both, found = parts.train("EWC", parts.EWC((1.0, 100.0)), [1, 2], *data)
    alone, single = parts.train("EWC", parts.EWC((100.0,)), [2], *data)
    torch.testing.assert_close(both.theta[1:], alone.theta, rtol=1e-3, atol=1e-4)
    assert len(found["curve"]) == 6 and len(found["matrix"]) == 4 and found["matrix"][0].shape == (3, 2)
    assert abs(found["matrix"][-1][:, 1] - single["matrix"][-1][:, 0]).max() < 3


def test_the_official_sum_counts_the_first_task_four_times(parts):
    """Tasks 1 to 4 in the last guard: 4, 2, 1, 1; our own counts each of them once."""
    for kind, wanted in ((parts.CourseEWC, [4, 2, 1, 1]), (parts.EWC, [1, 1, 1, 1])):
        guard = kind()
        guard.importance = torch.zeros(4)
        for task in range(4):
            guard.importance = guard.merge(torch.eye(4)[task])
        assert guard.importance.tolist() == wanted


def test_a_strength_that_breaks_a_net_leaves_its_neighbour(parts, data):
    """1e38 freezes its net, 1e39 is more than a float32 holds: that net is out, the others go on."""
    _, found = parts.train("EWC", parts.EWC((1.0, 1e38, 1e39)), [1, 1, 1], *data)
    _, alone = parts.train("EWC", parts.EWC((1.0,)), [1], *data)
    matrix, curve = torch.stack(found["matrix"]), torch.stack(found["curve"])
    assert matrix[..., :2].isfinite().all() and curve[:, :2].isfinite().all()
    assert matrix[0].isfinite().all() and matrix[1:, :, 2].isnan().all() and curve[:, 2].isnan().all()
    assert (matrix[..., :1] - torch.stack(alone["matrix"])).abs().max() < 3


def test_an_importance_that_is_no_number_is_rejected(parts, data):
    class Broken(parts.EWC):
        def measure(self, model, x, y):
            return super().measure(model, x, y) * float("nan")

    with pytest.raises(parts.Stop, match="EWC: an importance is not a finite number after task 1"):
        parts.train("EWC", Broken((1.0,)), [1], *data)


@pytest.mark.parametrize("kind", MEMORIES)
def test_a_memory_never_holds_more_than_it_may(parts, data, kind):
    """After each task: at most M images of it, from the training part, with the answers of that moment."""
    method, seen = getattr(parts, kind)((0.01,), 7), []

    class Watched(type(method)):
        def after_task(self, model, x, y):
            super().after_task(model, x, y)
            seen.append((self.images.clone(), self.logits.clone(), model(x[:0].float()).shape[0]))
            new = self.images[-7:]
            assert all((x == image).all(1).any() for image in new), "an image of this task"
            torch.testing.assert_close(self.logits[-7:], model(new.float() / 255).transpose(0, 1).detach())

    method.__class__ = Watched
    parts.train(kind, method, [1, 2], *data)
    assert [len(images) for images, _, _ in seen] == [7, 14, 21]
    assert (seen[2][1][:7] == seen[0][1]).all(), "answers are those of the time of storing"


def test_the_assertion_on_the_memory_can_fail(parts, data):
    (x, y), _ = data
    greedy = parts.ER((0.0,), 5)
    greedy.images, greedy.labels, greedy.logits = x[0, :9], y[:9], torch.zeros(9, 1, 10)
    with pytest.raises(AssertionError, match="more is kept than M images"):
        greedy.after_task(parts.Nets([0]), x[0], y)


def test_agem_never_steps_against_the_memory(parts, data):
    (x, y), _ = data
    model, method = parts.Nets([1, 2]), parts.AGEM((0.0,), 20)
    method.after_task(model, x[0], y)
    clashes = 0
    for _ in range(20):
        xs, ys = x[2, torch.randint(96, (2, 32))].float() / 255, torch.randint(10, (2, 32))
        loss = method.loss(model, xs, ys).sum()
        images, labels, _ = method.memory  # A-GEM looks at this batch in `bend`
        r = torch.autograd.grad(parts.Method.loss(method, model, images, labels).sum(), model.theta)[0]
        model.theta.grad = torch.autograd.grad(loss, model.theta)[0] - 0.5 * r
        clashes += int(((model.theta.grad * r).sum(1) < 0).sum())
        method.bend(model)
        assert ((model.theta.grad * r).sum(1) > -1e-5 * r.square().sum(1)).all()
    assert clashes > 0, "nothing was bent, the test says nothing"


def test_der_and_lwf_losses_are_their_formulas(parts, data):
    (x, y), _ = data
    model, method = parts.Nets([1]), parts.DER((0.0,), 10)
    method.after_task(model, x[0], y)
    method.logits = method.logits + 1
    xs, ys = x[1, :32][None].float() / 255, y[None, :32]
    torch.manual_seed(3)
    found = method.loss(model, xs, ys)
    torch.manual_seed(3)
    (x1, _, z), (x2, labels, _) = method.recall(xs), method.recall(xs)
    wanted = F.cross_entropy(model(xs)[0], ys[0]) + method.alpha * F.mse_loss(model(x1), z)
    wanted += method.beta * F.cross_entropy(model(x2)[0], labels[0])
    torch.testing.assert_close(found[0], wanted)
    lwf = parts.LwF()
    lwf.before_task(model)
    torch.testing.assert_close(lwf.loss(model, xs, ys)[0], F.cross_entropy(model(xs)[0], ys[0]))
    lwf.before_task(model)
    with torch.no_grad():
        model.theta += 0.05 * torch.randn_like(model.theta)
    old, new = (model(xs, theta)[0] / 2 for theta in (lwf.old, model.theta))
    far = 4 * F.kl_div(new.log_softmax(1), old.softmax(1), reduction="batchmean")
    wanted = F.cross_entropy(model(xs)[0], ys[0]) + far
    torch.testing.assert_close(lwf.loss(model, xs, ys)[0], wanted)


def test_measures_of_a_known_matrix():
    matrix = np.array([[10, 10, 10], [90, 30, 20], [60, 80, 40], [30, 50, 70]], float)[..., None]
    found = pick(SCRIPT, "measures", TASKS=3).measures(matrix)
    wanted = {"ACC": 50, "BWT": (-60 - 30) / 2, "forgetting": (60 + 30) / 2, "FWT": (20 + 30) / 2}
    assert {name: found[name].item() for name in wanted} == wanted and found["diagonal"].item() == 80


def test_choices_do_not_depend_on_the_test_labels(run, straight, tmp_path):
    """Other test labels: the same strengths, the same headline, the same weights; only the curves move."""
    result, submission, folder = straight
    given = tmp_path / "given"
    shutil.copytree(folder / "data" / "HW14-sample" / "tiny" / "data", given)
    labels = given / "t10k-labels-idx1-ubyte"
    raw = labels.read_bytes()
    labels.write_bytes(raw[:8] + bytes(9 - label for label in raw[8:]))
    done = run(SCRIPT, HW_DATA="real", HW_DATA_DIR=given).wait()
    assert done.code == 0, done.text
    out = tmp_path / "out" / "HW14" / "boss-real"
    poisoned = json.loads((out / "result.json").read_text())
    for name in ("chosen", "headline", "valid_score"):
        assert poisoned[name] == result[name]
    weights = "boss-sample/weights.npy"
    assert (out / "weights.npy").read_bytes() == (folder / "out" / "HW14" / weights).read_bytes()
    assert poisoned["test"]["joint"]["ACC"] < 40 < result["test"]["joint"]["ACC"]


def test_judge_counts_anew_from_the_weights(straight, tmp_path):
    """Made-up accuracies in the file do not move the score; other weights do, and do not pass."""
    result, submission, folder = straight
    book = json.loads(submission)
    out, answers = folder / "out/HW14/boss-sample", folder / "data/HW14-sample/tiny/answers"
    settings = result["settings"]
    names = ["check_submission", "score_submission", "Stop", "Nets", "look", "rotated"]
    judge = pick(SCRIPT, *names, settings=settings, device="cpu")
    copy = tmp_path / "submission.sample.json"
    shutil.copy(out / "weights.npy", tmp_path)
    copy.write_text(json.dumps(book | {"methods": {}}))
    assert judge.score_submission(copy, answers) == pytest.approx(result["score"])
    assert book["methods"][book["headline"]]["ACC"] == pytest.approx(result["score"], abs=1e-3)
    np.save(tmp_path / "weights.npy", np.load(out / "weights.npy") * 0)
    assert judge.score_submission(copy, answers) < 30
    copy.write_bytes(submission)
    with pytest.raises(judge.Stop, match="weights.npy does not belong to"):
        judge.check_submission(copy)


FAULTS = {
    "method": (lambda book: book["methods"].pop("MAS"), "lacks the method MAS"),
    "headline": (lambda book: book.update(headline="best"), "a headline among its methods"),
    "seeds": (lambda book: book["seeds"].append(3), "must name 1 seeds"),
    "rows": (lambda book: book["methods"]["SI"]["curve"].pop(), "SI must have 12 points and"),
    "matrix": (lambda book: book["methods"]["SI"]["matrix"].pop(0), "a matrix of 4 x 3"),
    "hole": (
        lambda book: book["methods"]["SI"]["matrix"][1][0].__setitem__(0, None),
        "not between 0 and 100",
    ),
    "range": (lambda book: book["methods"]["SI"]["curve"][2].__setitem__(0, 101.0), "not between 0 and 100"),
    "ACC": (lambda book: book["methods"]["SI"].update(ACC=99.0), "SI has ACC 99.0, not its last row's mean"),
}


@pytest.mark.parametrize("fault", [None, *FAULTS])
def test_validator(straight, fault, tmp_path):
    result, submission, folder = straight
    book = json.loads(submission)
    assert set(book["methods"]) == set(result["settings"]["methods"]) and len(book["methods"]) == 21
    shutil.copy(folder / "out" / "HW14" / "boss-sample" / "weights.npy", tmp_path)
    path, check = (
        tmp_path / "submission.json",
        pick(SCRIPT, "check_submission", "Stop", settings=result["settings"]),
    )
    if fault:
        FAULTS[fault][0](book)
    path.write_text(json.dumps(book))
    if not fault:
        return check.check_submission(path)
    with pytest.raises(check.Stop, match=FAULTS[fault][1]):
        check.check_submission(path)


def test_what_is_handed_in(straight):
    """All methods in the tables, the answers with this run's numbers, memories marked, the figures there."""
    result, submission, folder = straight
    out = folder / "out" / "HW14" / "boss-sample"
    with zipfile.ZipFile(out / "hand-in.zip") as pack:
        assert pack.read("submission.json") == submission
        metrics, matrix, answers = (
            pack.read(name).decode() for name in ("metrics.csv", "matrix.csv", "answers.md")
        )
        assert pack.read("acc_summary.png")[1:4] == b"PNG"
    methods, tasks, epochs = 21, 3, 4
    assert metrics.splitlines()[0] == "method,seed,epoch,task_trained,avg_acc_seen"
    assert len(metrics.splitlines()) == 1 + methods * tasks * epochs
    assert len(matrix.splitlines()) == 1 + methods * (tasks + 1) * tasks
    for name, row in result["test"].items():
        star = "*" if name.split(" ")[0] in ("joint", "ER", "A-GEM", "DER++") else ""
        assert f"| {name}{star} | " in answers and f" {row['ACC']:.1f} | {row['BWT']:.1f} |" in answers
    assert "def measure" in answers and "def per_image" in answers
    figures = {path.stem for path in (out / "figures").iterdir()}
    assert figures == {"tasks", "matrix", "acc_summary", "by_task", "strength", "importance", "memory"}
    log = (folder / "run.log").read_text()
    for words in ("official way, one net", "ours, all nets at once", "times", "one by one against at once"):
        assert words in log


def test_all_course_methods_are_in_the_curves(straight):
    book = json.loads(straight[1])
    for name in ("finetune", "course EWC", "course MAS", "course SI", "course RWalk", "course SCP", "joint"):
        curve = np.array(book["methods"][name]["curve"])
        assert curve.shape == (12, 1) and np.ptp(curve) > 0
    course = {name: entry["strength"] for name, entry in book["methods"].items() if name.startswith("course")}
    assert list(course.values()) == [100.0, 0.1, 1.0, 100.0, 100.0]


def test_real_layouts_packed_and_deep(run, straight, tmp_path):
    deep = tmp_path / "given" / "MNIST" / "MNIST" / "raw"
    deep.mkdir(parents=True)
    for path in (straight[2] / "data" / "HW14-sample" / "tiny" / "data").iterdir():
        (deep / f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
    wanted = dict(HW_LEVEL="simple", HW_EPOCHS=1, HW_METHODS="finetune")
    done = run(SCRIPT, HW_DATA="real", HW_DATA_DIR=tmp_path / "given", **wanted).wait()
    assert done.code == 0 and "train: 400 images, test: 200" in done.text, done.text
    assert "data: real" in done.text and (tmp_path / "out/HW14/simple-real/submission.json").exists()


def test_unknown_methods_are_named(run, tmp_path):
    ended = run(SCRIPT, HW_METHODS="EWC, MASS").wait()
    assert ended.code == 1 and "METHODS has MASS; known are finetune, joint, course EWC" in ended.text
    assert "Traceback" not in ended.text
    assert {path.suffix for path in (tmp_path / "out").rglob("*") if path.is_file()} <= {".lock"}


def idx(magic, *sizes, data=None):
    count = int(np.prod(sizes))
    return np.array([magic, *sizes], ">i4").tobytes() + (bytes(count) if data is None else data)


BAD = {  # (file, bytes, what the sentence says)
    "html": ("train-images", b"<!DOCTYPE html><html>not found</html>", "begins with b'<!DOCTYPE html>"),
    "empty": ("train-labels", b"", "begins with b''"),
    "truncated": ("train-images", idx(2051, 5, 28, 28)[:-9], "has 3927 bytes, its head announces 3936"),
    "longer": ("t10k-labels", idx(2049, 5) + b"x", "has 14 bytes, its head announces 13"),
    "swapped": ("train-images", idx(2049, 5), "where an idx file of images has the number 2051"),
    "32 x 32": ("t10k-images", idx(2051, 5, 32, 32), "images of 32 x 32 pixels, expected are 28 x 28"),
    "fewer labels": ("train-labels", idx(2049, 4), "has 5 images, "),
    "label 10": ("t10k-labels", idx(2049, 5, data=bytes([0, 1, 2, 10, 4])), "has the label 10"),
    "damaged gz": ("train-images", gzip.compress(idx(2051, 5, 28, 28))[:-12], "is a damaged archive"),
    "wrong crc": ("t10k-images", gzip.compress(idx(2051, 5, 28, 28))[:-8] + bytes(8), "is a damaged archive"),
}


@pytest.mark.parametrize("fault", BAD)
def test_bad_files_end_in_a_sentence(fault, tmp_path):
    good = {f"{part}-images": idx(2051, 5, 28, 28) for part in ("train", "t10k")}
    good |= {f"{part}-labels": idx(2049, 5) for part in ("train", "t10k")}
    name, spoiled, sentence = BAD[fault]
    for which, raw in (good | {name: spoiled}).items():
        (tmp_path / which).write_bytes(raw)
    part = pick(SCRIPT, "read_idx", "read_part", "Stop", PATHS={which: [tmp_path / which] for which in good})
    with pytest.raises(part.Stop) as error:
        [part.read_part(which) for which in ("train", "t10k")]
    assert sentence in str(error.value) and str(tmp_path / name) in str(error.value)
    (tmp_path / name).write_bytes(good[name])
    assert [part.read_part(which)[0].shape for which in ("train", "t10k")] == [(5, 28, 28)] * 2


def test_a_bad_file_stops_the_run_before_anything_is_written(run, straight, tmp_path):
    given = tmp_path / "given"
    shutil.copytree(straight[2] / "data" / "HW14-sample" / "tiny" / "data", given)
    path = given / "train-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:5000])
    ended = run(SCRIPT, HW_DATA="auto", HW_DATA_DIR=given).wait()
    assert ended.code == 1 and "train-images-idx3-ubyte has 5000 bytes" in ended.text
    assert "Traceback" not in ended.text
    assert {path.suffix for path in (tmp_path / "out").rglob("*") if path.is_file()} <= {".lock"}


def test_what_makes_a_checkpoint_useless(run, straight, changed, tmp_path):
    """A number of one method: those that inherit it learn anew, all others go on."""
    anew = trained_anew(
        run, straight, changed(SCRIPT, "alpha, beta = 0.5, 1.0", "alpha, beta = 0.4, 1.0"), tmp_path
    )
    names = {"DER++ small", "DER++ middle", "DER++", "DER++ & MAS", "choose DER++", "choose DER++ & MAS"}
    assert anew == names
