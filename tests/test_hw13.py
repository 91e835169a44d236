"""HW13's own invariants."""

import math
import re
import shutil
from copy import deepcopy

import numpy as np
import pytest
import torch
import torchsummary
import torchvision
from conftest import TESTS, one_sentence, outcome, trained_anew
from notebooks import pick
from runner import Run
from torch import nn
from torch.nn import functional as F

SCRIPT = TESTS.parent / "HW13" / "HW13.py"
KINDS = 11
PROBE = """
kept = dict(probability=probability, held_out=held_out, label=label, given_valid=given_valid)
asked = [ask(student, images, test_rows, 3), ask(student.train(), images, test_rows, 3)]
kept["asked"] = torch.stack(asked)
straight_look = look(images, test_rows, settings["size"], STILL.expand(len(test_rows), 2, 3))
kept["by_hand"] = student.eval()(straight_look).softmax(-1)
kept["last"] = torch.tensor(history[-1]["valid"])
np.savez("probe.npz", **{name: one.detach().numpy() for name, one in kept.items()})
"""


@pytest.fixture(scope="session")
def probe(straight, tmp_path_factory):
    """The inner numbers of the straight run: it goes on after its last epoch."""
    folder = tmp_path_factory.mktemp("probe")
    shutil.copytree(straight[2], folder, dirs_exist_ok=True)
    copy = folder / "HW13.py"
    copy.write_text(SCRIPT.read_text(encoding="utf-8") + PROBE, encoding="utf-8")
    done = Run(copy, folder).wait()
    assert done.code == 0, done.text
    return {name: torch.tensor(one) for name, one in np.load(folder / "probe.npz").items()}


def sample_of(straight):
    return straight[2] / "data" / "HW13-sample" / "tiny"


def functions(*names, **given):
    class Plain:
        def unwrap_model(self, model):
            return model

    space = dict(torch=torch, nn=nn, F=F, np=np, math=math, device="cpu", CLASSES=["kind"] * KINDS)
    space |= dict(accelerator=Plain(), Stop=RuntimeError, LIMIT=100_000, say=print)
    return pick(SCRIPT, *names, **space | given)


def test_beats_a_constant_answer(straight):
    answers = np.load(sample_of(straight) / "answers" / "category.npy")
    assert straight[0]["score"] > 1.5 * np.bincount(answers).max() / len(answers)


def test_the_judge_takes_the_share_of_right_answers(straight):
    answers = np.load(sample_of(straight) / "answers" / "category.npy")
    guess = [int(line.split(",")[1]) for line in straight[1].decode().split()[1:]]
    right = sum(one == other for one, other in zip(guess, answers, strict=True))
    assert straight[0]["score"] == pytest.approx(right / len(answers))


def test_submission_has_the_names_of_the_test_files(straight):
    lines = straight[1].decode().split("\n")
    assert lines[0] == "Id,Category" and lines[-1] == ""
    assert [line.split(",")[0] for line in lines[1:-1]] == [f"{k:04}" for k in range(66)]


@pytest.mark.parametrize("value", ["11", "-1", "", "3.0", "03", "bread", "²"])
def test_a_kind_is_a_whole_number_from_0_to_10(value):
    is_kind = functions("is_kind").is_kind
    assert is_kind("0") and is_kind("10") and not is_kind(value)


def test_no_weights_come_from_elsewhere():
    text = SCRIPT.read_text(encoding="utf-8")
    for word in ("pretrained", "hub.load", "from_pretrained", "timm"):
        assert word not in text
    assert re.findall(r"weights=(\w+)", text) == ["None"]


# the limit


def summary_total(model, capsys):
    """What the course's counter prints."""
    capsys.readouterr()
    torchsummary.summary(model.eval(), (3, 64, 64), device="cpu")
    return int(re.search(r"Total params: ([\d,]+)", capsys.readouterr().out)[1].replace(",", ""))


def test_students_keep_the_limit_by_both_counts(capsys):
    space = functions("conv", "Separable", "plain_student", "separable_student", "count", "numbers_of")
    for make, numbers in ((space.plain_student, 87_907), (space.separable_student, 76_835)):
        assert space.numbers_of(make(), 64) == numbers <= 100_000
        assert sum(weight.numel() for weight in make().parameters()) == numbers
        assert summary_total(make(), capsys) == numbers
        assert make()(torch.zeros(2, 3, 40, 40)).shape == (2, KINDS)


def test_the_official_student_multiplies_859_million_times():
    space = functions("plain_student", "count")
    rows = space.count(space.plain_student(), 224)
    times = [row["multiplications"] for row in rows]
    assert sum(times) == pytest.approx(859e6, rel=0.005)
    assert max(times) / sum(times) == pytest.approx(0.52, abs=0.01)


class Cheat(nn.Module):
    """One layer, used twice; numbers outside of a layer; and a layer that is not used."""

    def __init__(self, free, idle):
        super().__init__()
        self.layer = nn.Conv2d(3, 3, 3, padding=1)
        self.free = nn.Parameter(torch.zeros(free))
        self.idle = nn.Linear(1, idle)

    def forward(self, x):
        return self.layer(self.layer(x)) + self.free.sum()


def test_shared_layers_free_numbers_and_idle_layers_are_counted():
    numbers_of = functions("count", "numbers_of").numbers_of
    own = 3 * 3 * 9 + 3
    assert numbers_of(Cheat(500, 1), 16) == 2 * own + 500
    assert numbers_of(Cheat(500, 1000), 16) == own + 500 + 2000


def test_counting_teaches_batch_norm_nothing():
    space = functions("plain_student", "count")
    model = space.plain_student().train()
    before = {name: one.clone() for name, one in model.state_dict().items()}
    space.count(model, 32)
    assert model.training and all(torch.equal(before[name], one) for name, one in model.state_dict().items())


def test_a_student_over_the_limit_is_refused(run, changed):
    wide = changed(SCRIPT, "(64, 2, 3), (64, 1, 3)]", "(96, 2, 3), (96, 1, 3)]")
    one_sentence(run(wide).wait(), r"The student has 1\d\d,\d+ numbers, 100,000 are allowed")


# distillation


def test_the_loss_is_that_of_the_course():
    torch.manual_seed(0)
    loss_fn_kd = functions("loss_fn_kd").loss_fn_kd
    student, teacher, labels = (
        torch.randn(5, KINDS),
        3 * torch.randn(5, KINDS),
        torch.tensor([0, 3, 10, 2, 2]),
    )
    p, q = (teacher / 4).softmax(-1).double(), (student / 4).softmax(-1).double()
    distance = sum(float(a * math.log(a / b)) for a, b in zip(p.flatten(), q.flatten(), strict=True)) / 5
    right = F.cross_entropy(student, labels)
    loss = float(loss_fn_kd(student, labels, teacher, 0.3, 4.0))
    assert loss == pytest.approx(0.3 * 16 * distance + 0.7 * float(right), abs=1e-5)
    assert torch.allclose(loss_fn_kd(student, labels, teacher, 0.0, 4.0), right, atol=1e-6)
    assert float(loss_fn_kd(student, labels, student, 1.0, 2.0)) == pytest.approx(0, abs=1e-6)


def losses(hints):
    """teacher_loss with a net that is both teacher and student, and the photos that it saw."""
    seen = []

    class Net(nn.Module):
        def forward(self, x):
            seen.append(x)
            return x.flatten(1)[:, :KINDS]

    class Auto:
        def autocast(self):
            return torch.autocast("cpu", enabled=False)

    names = ("loss_fn_kd", "through", "far", "teacher_loss")
    given = dict(accelerator=Auto(), settings={"alpha": 0.5, "temperature": 2, "hints": hints})
    return functions(*names, **given).teacher_loss, Net(), seen


def test_teacher_and_student_see_the_same_photos():
    teacher_loss, net, seen = losses(0)
    x, y = torch.randn(3, 3, 4, 4), torch.tensor([1, 2, 3])
    loss = teacher_loss(net, nn.Sequential(net), x, y, 0.0)
    assert len(seen) == 2 and all(one is x for one in seen)
    right = F.cross_entropy(x.flatten(1)[:, :KINDS], y)
    assert float(loss) == pytest.approx(0.5 * float(right), abs=1e-6)


def test_hints_fade_away_by_half_time():
    teacher_loss, net, _ = losses(2)
    x, y = torch.randn(3, 3, 4, 4), torch.tensor([1, 2, 3])
    teacher = nn.Sequential(nn.Identity(), net)  # its map is the photo
    hinted = [lambda x, sign=sign: (net(x), {"4": sign * x}) for sign in (1, -1)]
    same, other = (
        [float(teacher_loss(one, teacher, x, y, s)) for s in (0, 0.25, 0.5, 0.9)] for one in hinted
    )
    assert max(same) == pytest.approx(min(same), abs=1e-5)
    gain = [two - one for one, two in zip(same, other, strict=True)]
    assert gain == pytest.approx([4, 2, 0, 0], abs=1e-5)  # opposite maps: 1 - cosine is 2


def test_the_distance_of_maps_knows_no_scale():
    far = functions("far").far
    one = torch.randn(2, 3, 4, 4)
    assert float(far({"4": one}, {"4": 5 * one, "9": one})) == pytest.approx(0, abs=1e-6)
    half = torch.cat([one[:1], -one[1:]])
    assert float(far({"4": one, "2": one}, {"4": half, "2": one})) == pytest.approx(1, abs=1e-6)


def test_maps_are_the_last_of_each_size():
    space = functions("conv", "Separable", "separable_student", "through")
    net, x = space.separable_student().eval(), torch.randn(2, 3, 40, 40)
    logits, maps = space.through(net, x)
    assert torch.equal(logits, net(x))
    assert {size: one.shape[1] for size, one in maps.items()} == {"20": 24, "10": 40, "5": 64}
    assert torch.equal(maps["10"], net[:7](x))


def test_adapters_translate_and_are_no_part_of_the_student():
    names = ("conv", "Separable", "separable_student", "Block", "residual_net", "through", "Hinted", "far")
    space = functions(*names, settings={"size": 40}, deepcopy=deepcopy)
    student, teacher = space.separable_student(), space.residual_net(20, 1).eval()
    before = {name: one.clone() for name, one in student.state_dict().items()}
    hinted = space.Hinted(student, teacher)
    assert hinted.student is student
    assert all(torch.equal(one, before[name]) for name, one in student.state_dict().items())
    assert {name: tuple(one.weight.shape) for name, one in hinted.adapters.items()} == {
        "10": (40, 40, 1, 1),
        "5": (80, 64, 1, 1),
    }
    logits, maps = hinted(torch.randn(2, 3, 40, 40))
    space.far(maps, space.through(teacher, torch.randn(2, 3, 40, 40))[1]).backward()
    assert logits.shape == (2, KINDS) and student[3].layers[0].weight.grad.abs().max() > 0


def test_validation_photos_teach_nobody(run, straight, tmp_path):
    """Other pixels in the validation part: the same submission, another validation score."""
    shutil.copytree(sample_of(straight) / "data", tmp_path / "given")
    photos = sorted((tmp_path / "given" / "food11-hw13" / "validation").iterdir())
    last = photos[-1].read_bytes()
    for path in photos[:-1]:
        path.write_bytes(last)
    assert run(SCRIPT, HW_DATA="real", HW_DATA_DIR=tmp_path / "given").wait().code == 0
    assert (tmp_path / "out/HW13/boss-real/submission.csv").read_bytes() == straight[1]


def test_answers_of_the_test_part_are_never_learned(run, straight, tmp_path):
    """Other answers in the folder that only the judge reads: the same submission."""
    shutil.copytree(straight[2] / "data", tmp_path / "data")
    path = tmp_path / "data/HW13-sample/tiny/answers/category.npy"
    np.save(path, np.roll(np.load(path), 1))
    assert run(SCRIPT).wait().code == 0
    result, submission = outcome(tmp_path)
    assert submission == straight[1] and result["score"] != straight[0]["score"]


def test_without_distillation_no_teacher_is_trained(run, tmp_path):
    assert run(SCRIPT, HW_WITHOUT="distil").wait().code == 0
    assert {path.name.split(".")[0] for path in tmp_path.rglob("checkpoint/*.pt")} == {"student"}


@pytest.mark.parametrize("what", ["alpha", "report", "widths", "teacher"])
def test_what_makes_a_checkpoint_useless(run, straight, changed, tmp_path, what):
    """The weight of the teachers' word does not concern the teachers, the report concerns nobody."""
    old, new, stages = {
        "alpha": ('told, settings["alpha"]', 'told, 0.9 * settings["alpha"]', {"student"}),
        "report": ("(1, 2, 4, 8, 20)", "(1, 2, 4, 8, 16)", set()),
        "teacher": ("nn.Dropout(0.1), nn.Linear", "nn.Dropout(0.2), nn.Linear", {"teacher", "student"}),
        "widths": ("(64, 2, 3), (64, 1, 3)]", "(56, 2, 3), (56, 1, 3)]", {"student"}),
    }[what]
    assert trained_anew(run, straight, changed(SCRIPT, old, new), tmp_path) == stages


# nets


def test_a_separable_block_adds_only_where_shapes_agree():
    space = functions("conv", "Separable", "separable_student")
    block = space.Separable(8, 8, 1, 3).eval()
    x = torch.randn(2, 8, 6, 6)
    nn.init.zeros_(block.layers[-1].weight)
    assert torch.allclose(block(x), x, atol=1e-6)
    assert space.Separable(8, 8, 2, 3)(x).shape == (2, 8, 3, 3)
    assert space.Separable(8, 12, 1, 3)(x).shape[1] == 12
    layers = [one for one in space.separable_student().modules() if isinstance(one, nn.Conv2d)]
    depthwise = [one for one in layers if one.groups > 1]
    assert len(depthwise) == 7 and all(one.groups == one.in_channels for one in depthwise)


def test_pruning_takes_the_smallest_of_a_fresh_copy():
    torch.manual_seed(0)
    pruned = functions("pruned", prune=torch.nn.utils.prune).pruned
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3))
    nn.init.normal_(model[2].weight, std=0.001)
    before = {name: one.clone() for name, one in model.state_dict().items()}
    each, together = pruned(model, 0.5, False), pruned(model, 0.5, True)
    shares = [[float((net[k].weight == 0).float().mean()) for k in (0, 2)] for net in (each, together)]
    assert shares[0] == pytest.approx([0.5, 0.5], abs=0.01) and shares[1][1] > 0.65 > 0.1 > shares[1][0]
    kept = each[0].weight != 0
    assert model[0].weight[kept].abs().min() >= model[0].weight[~kept].abs().max()
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(before[name], one) for name, one in model.state_dict().items())


# who is asked about what


def test_the_first_look_is_straight_and_the_others_are_not(probe):
    one, again = probe["asked"]
    assert torch.allclose(one[0], probe["by_hand"], atol=1e-5) and torch.allclose(one[0], again[0], atol=1e-6)
    assert (one[1] - one[0]).abs().max() > 1e-3 and (one[2] - one[1]).abs().max() > 1e-3


def test_the_answer_is_the_likeliest_kind_of_the_mean(probe, straight):
    assert torch.allclose(probe["probability"].sum(-1), torch.ones(66), atol=1e-4)
    guess = [int(line.split(",")[1]) for line in straight[1].decode().split()[1:]]
    assert guess == probe["probability"].argmax(-1).tolist()


def test_all_looks_at_a_photo_count():
    looks = torch.rand(3, 4, KINDS)
    given = dict(ask=lambda *_: looks, student=None, images=None, test_rows=None, settings={"views": 3})
    assert torch.allclose(functions("probability", **given).probability, looks.mean(0))


def test_scores_of_validation(probe, straight):
    truth = probe["label"][probe["given_valid"]]
    straight_looks = (probe["held_out"][0].argmax(-1) == truth).float().mean()
    assert float(straight_looks) == pytest.approx(float(probe["last"]))
    right = (probe["held_out"].mean(0).argmax(-1) == truth).float().mean()
    assert straight[0]["valid_score"] == pytest.approx(float(right))


def test_the_stored_student_gives_the_submission_again(straight):
    stored = torch.load(straight[2] / "out/HW13/boss-sample/student/student_best.ckpt", weights_only=True)
    student = functions("conv", "Separable", "separable_student").separable_student()
    student.load_state_dict(stored)
    assert straight[0]["parameters"] == sum(weight.numel() for weight in student.parameters())


# files


def course_teacher(**given):
    given = dict(mean=torch.zeros(1, 3, 1, 1), spread=torch.ones(1, 3, 1, 1)) | given
    return functions("Recolour", "given_teacher", **given)


def test_the_courses_teacher_gets_photos_as_it_knows_them(tmp_path):
    torch.manual_seed(0)
    net = torchvision.models.resnet18(weights=None, num_classes=KINDS).eval()
    torch.save(net.state_dict(), tmp_path / "resnet18_teacher.ckpt")
    given = dict(mean=torch.full((1, 3, 1, 1), 100.0), spread=torch.full((1, 3, 1, 1), 50.0))
    teacher = course_teacher(**given).given_teacher(tmp_path / "resnet18_teacher.ckpt")
    photo = torch.randint(0, 255, (2, 3, 224, 224)).float()
    colours = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    known = torchvision.transforms.functional.normalize(photo / 255, *colours)
    assert torch.allclose(teacher((photo - 100) / 50), net(known), atol=1e-4)
    assert not teacher.training


@pytest.mark.parametrize("fault", ["cut", "other"])
def test_another_teacher_is_refused(tmp_path, fault):
    path = tmp_path / "resnet18_teacher.ckpt"
    torch.save(nn.Linear(2, 2).state_dict(), path)
    if fault == "cut":
        path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(
        RuntimeError, match="resnet18_teacher.ckpt is not the course's teacher.*fetch it again"
    ):
        course_teacher().given_teacher(path)


def test_damaged_photos_and_absent_kinds_are_named(run, straight, tmp_path):
    shutil.copytree(sample_of(straight) / "data", tmp_path / "given")
    real = tmp_path / "given" / "food11-hw13"
    (real / "training" / "0_0.jpg").write_bytes((real / "training" / "0_0.jpg").read_bytes()[:300])
    (real / "evaluation" / "0003.jpg").write_bytes(b"no photo")
    for path in (real / "validation").glob("10_*.jpg"):
        path.unlink()
    done = run(SCRIPT, HW_DATA="real", HW_DATA_DIR=real.parent, HW_LEVEL="simple").wait()
    assert done.code == 0, done.text
    assert "training/0_0.jpg" in done.text and "left out" in done.text
    assert "evaluation/0003.jpg" in done.text and "answered" in done.text
    assert re.search("validation: there is no image of .*vegetable, fruit", done.text)
    rows = (tmp_path / "out/HW13/simple-real/submission.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in rows[1:]] == [f"{k:04}" for k in range(66)]
    (real / "training" / "bread_0.jpg").write_bytes(b"")
    wrong = run(SCRIPT, HW_DATA="real", HW_DATA_DIR=real.parent).wait()
    one_sentence(wrong, "bread_0.jpg: the name must be class_number.jpg")


def test_a_diverged_training_says_so(run, changed):
    wild = changed(SCRIPT, '"plain": 3e-3', '"plain": 1e35')
    one_sentence(run(wild, HW_LEVEL="simple").wait(), "diverged", "lower the learning rate in RATES")


MUTANTS = [
    (
        'np.mean(guess == np.load(answers / "category.npy"))',
        'np.mean(guess != np.load(answers / "category.npy"))',
    ),
    ("zip(test_id, category)", "zip(test_id, category[::-1])"),
    ("F.kl_div(student, teacher,", "F.kl_div(teacher, student,"),
    ("alpha * temperature**2 * distance", "alpha * distance"),
    ("(1 - alpha) * F.cross_entropy(student_logits", "1 * F.cross_entropy(student_logits"),
    ('reduction="batchmean"', 'reduction="mean"'),
    ("told, shown = through(teacher, x)", "told, shown = through(teacher, x.flip(0))"),
    ("max(0, 1 - 2 * past)", "max(0, 1 - past)"),
    ("sum(1 - F.cosine_similarity(one, other).mean()", "sum(F.mse_loss(one, other)"),
    ("maps[str(x.shape[-1])] = x", "maps.setdefault(str(x.shape[-1]), x)"),
    ("if size in other][-2:]", "if size in other][-1:]"),
    ("return max(called, sum(weight.numel() for weight in model.parameters()))", "return called"),
    (
        "return max(called, sum(weight.numel() for weight in model.parameters()))",
        "return sum(weight.numel() for weight in model.parameters())",
    ),
    ("    if numbers > LIMIT:", "    if numbers > 10 * LIMIT:"),
    ("deepcopy(accelerator.unwrap_model(model)).cpu().eval()", "model"),
    ("times = max(numbers) * places", "times = max(numbers)"),
    ("groups=inside, bias=False)", "bias=False)"),
    ("            y = y + x\n", "            y = y * 1\n"),
    (
        "deepcopy(model).to(memory_format=torch.contiguous_format)",
        "model.to(memory_format=torch.contiguous_format)",
    ),
    ("    if together:\n", "    if not together:\n"),
    ("batches = given_train[torch.randperm(len(given_train))]", "batches = torch.randperm(first_test)"),
    ("    net.eval()\n    answers", "    net.train()\n    answers"),
    ("if view > 0 else", "if view >= 0 else"),
    ('settings["views"]).mean(0)', 'settings["views"])[-1]'),
    ('"evaluation", 0  # how', '"evaluation", 1  # how'),
    ("x = (x * spread + mean) / 255\n", "x = x * spread + mean\n"),
    ("[train, net, loss_of, epochs, rate, *known]", "[net, epochs, rate, *known]"),
    ("given_train, teacher and teacher.state_dict()]", "given_train]"),
]
