"""HW09's own invariants."""

import copy
import math
import os
import shutil
import types
import zipfile

import numpy as np
import pytest
import torch
from captum.attr import IntegratedGradients, LayerGradientXActivation, NoiseTunnel, Occlusion, Saliency
from conftest import TESTS, one_sentence, outcome, trained_anew
from notebooks import pick
from PIL import Image
from torch import nn
from torch.nn import functional as F

SCRIPT = TESTS.parent / "HW09" / "HW09.py"
KINDS = 11
FOOD = ["0_0", "1_1", "1_2", "2_3", "2_4", "3_5", "5_6", "6_7", "8_8", "9_9"]
# the course's build, thin and for small pictures
NARROW = dict(widths=(4, 4, 6, 6, 8), depths=(3, 3, 3, 1, 1), hidden=12, size=32)
EXPLAIN = ["blurred", "ask", "mean_probability", "insertion_deletion", "gradients", "scaled", "noise_like"]
EXPLAIN += [
    "smooth_grad",
    "integrated_gradients",
    "logit",
    "layer_cam",
    "occlusion",
    "gradient_map",
    "witnesses",
    "verdict",
]
EXPLAIN += ["Classifier", "xai_score", "LEVELS", "NOISE", "forgetful"]


def functions(*names, **given):
    space = dict(
        torch=torch, nn=nn, F=F, np=np, math=math, copy=copy, types=types, device="cpu", CHUNK=4, SEED=5
    )
    space |= dict(
        CLASSES=["kind"] * KINDS, PROFILE="small", Stop=RuntimeError, SIDE=128, ABSENT="not computable here"
    )
    return pick(SCRIPT, *names, **space | given)


@pytest.fixture
def tools():
    """The notebook's explanations around a small net with random weights."""
    torch.manual_seed(0)
    space = functions(*EXPLAIN, settings={"steps": 8}, Occlusion=Occlusion)
    space.LayerGradientXActivation = LayerGradientXActivation
    net = space.Classifier((6, 8, 10, 12), (1,) * 4, 16, 32)
    for part in net.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.running_mean.normal_(std=0.2)
            part.running_var.uniform_(0.5, 1.5)
    space.gradients.__globals__["model"] = space.model = net.eval().requires_grad_(False)
    space.gradients.__globals__["LayerGradientXActivation"] = LayerGradientXActivation
    space.x, space.kind = torch.rand(5, 3, 32, 32), torch.tensor([0, 3, 10, 7, 3])
    return space


# the two that teach most, written out, against the library


def test_integrated_gradients_are_captums(tools):
    baseline = tools.blurred(tools.x)
    ours = tools.integrated_gradients(tools.x, baseline, tools.kind, 16)
    theirs = IntegratedGradients(tools.model).attribute(
        tools.x, baseline, tools.kind, n_steps=16, method="riemann_middle"
    )
    assert torch.allclose(ours, theirs.float(), atol=1e-5)


def test_integrated_gradients_are_complete(tools):
    for baseline in (torch.zeros_like(tools.x), tools.blurred(tools.x)):
        total = tools.integrated_gradients(tools.x, baseline, tools.kind, 256).sum((1, 2, 3))
        wanted = tools.logit(tools.x, tools.kind) - tools.logit(baseline, tools.kind)
        assert torch.allclose(total, wanted, rtol=0.02, atol=5e-6)


def test_the_path_of_the_loss_speaks_for_the_kind(tools):
    baseline = tools.blurred(tools.x)
    total = tools.integrated_gradients(tools.x, baseline, tools.kind, 256, target="loss").sum((1, 2, 3))
    sure = [tools.ask(one).gather(1, tools.kind[:, None])[:, 0].log() for one in (tools.x, baseline)]
    assert torch.allclose(total, sure[0] - sure[1], rtol=0.02, atol=5e-6)


def test_smooth_grad_is_captums(tools, monkeypatch):
    """captum draws its noise with torch.normal: here it gets ours."""
    x, kind, dice = tools.x[:1], tools.kind[:1], torch.Generator().manual_seed(5)
    noise = torch.cat([tools.noise_like(x, 0.15, dice) for _ in range(6)])
    monkeypatch.setattr(torch, "normal", lambda *_, **__: noise)
    how = dict(nt_type="smoothgrad_sq", nt_samples=6, stdevs=0.15, target=kind, abs=False)
    theirs = NoiseTunnel(Saliency(tools.model)).attribute(x, **how)
    assert torch.allclose(tools.smooth_grad(x, kind, 0.15, 6), theirs, rtol=1e-4, atol=1e-9)


def test_the_noise_has_the_width_that_was_asked_for(tools):
    x = torch.zeros(2, 3, 64, 64)
    x[1, 0, 0, 0], x[0, 0, 0, 0] = 1.0, 0.5
    noise = tools.noise_like(x, 0.2, torch.Generator().manual_seed(1))
    assert noise.std((1, 2, 3)).tolist() == pytest.approx([0.1, 0.2], rel=0.03)


def test_without_noise_smooth_grad_is_the_squared_saliency(tools):
    theirs = Saliency(tools.model).attribute(tools.x.clone(), tools.kind, abs=False)
    assert torch.allclose(tools.smooth_grad(tools.x, tools.kind, 0.0, 3), theirs.square(), atol=1e-7)


def test_the_gradient_of_the_loss(tools):
    x = tools.x.clone().requires_grad_()
    loss = F.nll_loss(tools.model(x).log_softmax(-1), tools.kind, reduction="sum")
    (wanted,) = torch.autograd.grad(loss, x)
    assert torch.allclose(tools.gradients(tools.x, tools.kind, "loss"), wanted, atol=1e-7)
    assert not tools.x.requires_grad, "the caller's pictures stay as they were"


# the other witnesses


def test_layer_cam_is_activation_times_positive_gradient(tools):
    x, place = tools.x, 10  # the last ReLU of the third stage
    inner = tools.model.cnn[: place + 1](x).requires_grad_()
    logits = tools.model.fc(tools.model.cnn[place + 1 :](inner).flatten(1))
    (slope,) = torch.autograd.grad(logits.gather(1, tools.kind[:, None]).sum(), inner)
    wanted = (slope.relu() * inner).sum(1, keepdim=True)
    wanted = F.interpolate(wanted, size=x.shape[-2:], mode="bilinear")[:, 0]
    assert torch.allclose(tools.layer_cam(x, tools.kind), wanted, atol=1e-6)


def test_occlusion_sees_what_the_net_needs(tools):
    """A net that only adds up one quarter: windows elsewhere lose nothing."""

    class Quarter(nn.Module):
        def forward(self, x):
            return x[:, :1, :16, :16].sum((2, 3)).expand(-1, KINDS)

    tools.occlusion.__globals__["model"] = Quarter()
    x = 0.1 * torch.rand(2, 3, 32, 32)
    x[:, :, 8:12, 8:12] = 1
    heat = tools.occlusion(x, torch.tensor([0, 0]))
    assert heat[:, 8:12, 8:12].mean() > 10 * heat[:, 26:, 26:].mean() and (heat >= 0).all()


def test_a_map_goes_from_0_to_1_and_a_constant_one_breaks_nothing(tools):
    heat = torch.stack(
        [torch.rand(4, 4), torch.zeros(4, 4), torch.full((4, 4), float("nan")), -torch.rand(4, 4)]
    )
    done = tools.scaled(heat)
    assert done.amax((1, 2)).tolist() == [1, 0, 0, 0] and (done >= 0).all()


def test_the_levels_differ_and_none_depends_on_its_batch(tools):
    columns = [{name: row[k] for name, row in tools.LEVELS.items()} for k in range(4)]
    maps = [tools.verdict(tools.witnesses(tools.x, tools.kind, how), how) for how in columns]
    for low, high in zip(maps, maps[1:], strict=False):
        assert (low - high).abs().max() > 0.1
    alone = tools.verdict(tools.witnesses(tools.x[:1], tools.kind[:1], columns[0]), columns[0])
    assert torch.allclose(alone, maps[0][:1], atol=1e-4)
    way = tools.integrated_gradients(tools.x, tools.blurred(tools.x), tools.kind, 8).sum(1)
    way = F.avg_pool2d(way.relu(), 5, 1, 2, count_include_pad=False)
    parts = [way, tools.layer_cam(tools.x, tools.kind), tools.occlusion(tools.x, tools.kind)]
    product = math.prod(tools.scaled(one) + 0.05 for one in parts)
    assert torch.allclose(maps[3], tools.scaled(product), atol=1e-5)


def test_forgetting_begins_at_the_answers(tools):
    tools.forgetful.__globals__["build"] = dict(widths=(6, 8, 10, 12), depths=(1,) * 4, hidden=16, size=32)
    net, same = tools.forgetful(8), tools.model
    kept = [torch.equal(net.cnn[k].weight, same.cnn[k].weight) for k in (0, 4, 8, 12)]
    assert kept == [True, True, False, False] and not torch.equal(net.fc[0].weight, same.fc[0].weight)
    assert torch.equal(net.cnn[5].running_mean, same.cnn[5].running_mean) and not net.training


# the score


def test_insertion_and_deletion_by_hand(tools):
    """The net is sure as far as the four pixels in the middle are there."""

    class Middle(nn.Module):
        def forward(self, x):
            return torch.stack([3 * x[:, 0, 1:3, 1:3].sum((1, 2)) - 6] + [0 * x[:, 0, 0, 0]] * 10, 1)

    tools.gradients.__globals__["model"] = Middle()
    new, old, heat = torch.ones(1, 3, 4, 4), torch.zeros(1, 3, 4, 4), torch.zeros(1, 4, 4)
    heat[0, 1:3, 1:3] = torch.tensor([[4.0, 3.0], [2.0, 1.0]])
    p = [math.exp(3 * k - 6) / (10 + math.exp(3 * k - 6)) for k in range(5)]
    wanted = (sum(p) + 12 * p[4]) / 17
    found = tools.mean_probability(old, new, heat, torch.tensor([0]))
    assert float(found) == pytest.approx(wanted, abs=1e-5)
    lost = tools.mean_probability(new, old, heat, torch.tensor([0]))
    assert float(lost) == pytest.approx((sum(p) + 12 * p[0]) / 17, abs=1e-5)


def test_the_judge_by_hand(tools):
    mask = torch.zeros(2, 8, 8, dtype=torch.uint8)
    mask[:, 2:4, 2:4], mask[:, 6:, 6:] = 255, 128
    heat = torch.zeros(2, 4, 4)
    heat[0, 1, 1], heat[0, 3, 3] = 0.6, 0.2
    heat[1, 1, 1], heat[1, 3, 3] = 0.2, 0.6
    found = tools.xai_score(heat, mask, torch.tensor([0.5, 0.1]))
    assert torch.allclose(found, torch.tensor([[1, 0.75, 0.5], [0, 0.25, 0.1]]))


def test_a_blurred_picture_keeps_its_mean_and_loses_its_details(tools):
    x = torch.rand(2, 3, 64, 64)
    assert torch.allclose(tools.blurred(torch.full((1, 3, 64, 64), 0.3)), torch.tensor(0.3))
    assert tools.blurred(x).std() < 0.1 * x.std() and tools.blurred(x).shape == x.shape


def test_beats_a_constant_map(straight):
    assert straight[0]["score"] > 0.1  # one that is the same everywhere has 0.05


def test_masks_are_read_by_the_judge_alone(run, straight, tmp_path):
    shutil.copytree(straight[2], tmp_path, dirs_exist_ok=True)
    path = tmp_path / "data/HW09-sample/tiny/answers/masks.npy"
    np.save(path, np.roll(np.load(path), 40, 2))
    assert run(SCRIPT).wait().code == 0
    result, submission = outcome(tmp_path)
    assert submission == straight[1] and result["score"] != straight[0]["score"]
    maps = [np.load(next(one.glob("out/*/*/explanations.npz")))["heat"] for one in (straight[2], tmp_path)]
    assert np.array_equal(*maps) and maps[0].shape == (22, 32, 32)


def test_each_mask_belongs_to_its_picture(straight):
    """Where a mask has berries, the picture of that row, in the order of kind and number, is red."""
    folder = straight[2] / "data/HW09-sample/tiny"
    masks = np.load(folder / "answers/masks.npy")
    paths = sorted(
        (folder / "data/heldout").iterdir(), key=lambda path: [int(k) for k in path.stem.split("_")]
    )
    assert len(masks) == len(paths) == 22
    berries = [k for k, mask in enumerate(masks) if (mask == 128).any()]
    assert len(berries) >= 2
    for k in berries:
        red = np.asarray(Image.open(paths[k]))[masks[k] == 128].mean(0)
        assert red[0] > 150 and red[1] < 90 and red[2] < 100


# LIME, regions, filters


def lime_space(**given):
    from lime import lime_image
    from skimage.segmentation import slic

    space = functions(
        "superpixels", "probabilities", "lime_map", "ask", lime_image=lime_image, slic=slic, **given
    )
    lime_image.tqdm = iter
    return space


def test_every_superpixel_can_be_left_out():
    segments = lime_space().superpixels(np.random.default_rng(0).random((64, 64, 3)))
    assert segments.min() == 0 and set(np.unique(segments)) == {*range(segments.max() + 1)}
    assert segments.max() > 40


def test_lime_finds_what_speaks_for_a_kind_outside_the_top_five():
    """A net that likes texture in one square; a piece that is left out has only its mean colour."""

    class Texture(nn.Module):
        def forward(self, x):
            logits = torch.arange(KINDS, dtype=torch.float).flip(0).repeat(len(x), 1)
            logits[:, 9] += 60 * x[:, 0, 8:24, 8:24].var((1, 2))
            return logits

    dice = torch.Generator().manual_seed(0)
    x = torch.rand(3, 8, 8, generator=dice).repeat_interleave(8, 1).repeat_interleave(8, 2)
    x[:, 8:24, 8:24] = torch.rand(16, 16, generator=dice)
    weight = lime_space(model=Texture()).lime_map(x, 9, 300)
    assert weight.shape == (64, 64) and weight[10:22, 10:22].mean() > 5 * weight[34:].abs().mean()


def test_regions_and_the_brightest_of_them():
    space = functions("REGIONS", "region", "brightest", REAL=False, build={"size": 64})
    rest, cake = (space.region(3, name) for name in ("the rest", "cake"))
    assert cake[15, 19] and not cake[14, 19] and not (rest & cake).any()
    heat = torch.zeros(64, 64)
    heat[cake] = 1.0
    assert space.brightest(heat, 3)[0] == "cake"
    heat = 0.2 * torch.ones(64, 64)
    heat[0, 0], heat[cake] = 9.0, 0.1
    assert space.brightest(heat, 3)[0] == "the rest", "per pixel, a large part wins by nothing else"


def test_a_dream_fires_its_own_filter(tools):
    space = functions("activation", "dream", build={"size": 32}, model=tools.model)
    dreams = space.dream(4, 3, 40)
    fires = space.activation(dreams, 4).mean((2, 3))[:, :3]
    before = space.activation(space.dream(4, 3, 0), 4).mean((2, 3))[:, :3]
    assert (fires.diagonal() > before.diagonal()).all()
    assert dreams.min() >= 0 and dreams.max() <= 1


# the classifier and its checkpoint


def test_the_course_net_by_name():
    space = functions("Classifier", "shape_of")
    course = dict(widths=(128, 128, 256, 512, 512), depths=(3, 3, 3, 1, 1), hidden=1024, size=128)
    with torch.device("meta"):
        net = space.Classifier(**course)
    state = net.state_dict()
    assert len(state) == 81 and sum(one.numel() for one in net.parameters()) == 14_162_827
    assert len(net.cnn) == 38 and space.shape_of(state) == course
    kinds = {6: nn.Conv2d, 9: nn.MaxPool2d, 15: nn.ReLU, 19: nn.MaxPool2d, 21: nn.BatchNorm2d, 23: nn.Conv2d}
    assert all(isinstance(net.cnn[place], kind) for place, kind in kinds.items())
    assert isinstance(net.fc[2], nn.Dropout) and net.fc[2].p == 0.3


def test_the_samples_checkpoint_has_the_course_names(straight):
    saved = torch.load(next(straight[2].glob("out/*/*/checkpoint.pth")), weights_only=True)
    space = functions("Classifier", "shape_of")
    net = space.Classifier(**space.shape_of(saved["model_state_dict"]))
    net.load_state_dict(saved["model_state_dict"])
    assert net.cnn[1].num_batches_tracked == 15, "three epochs of five batches; validation teaches nothing"


def test_a_shifted_batch_loses_no_pixel():
    torch.manual_seed(0)
    changed, x = functions("changed").changed, torch.rand(2, 3, 16, 16)
    several = [changed(x) for _ in range(8)]
    assert all(torch.equal(one.flatten().sort().values, x.flatten().sort().values) for one in several)
    assert len({float(one[0, 0, 0, 0]) for one in several}) > 4


# the sample


def drawn(**given):
    names = ["ellipse", "motif", "muted", "tile", "table_top", "fork", "free_place", "silhouette", "photo"]
    return functions(*names, "any_photo", "BERRIES", "SHORT", **given)


def test_only_berries_tell_the_shared_square_apart(monkeypatch):
    space = drawn()
    seen = []
    space.any_photo.__globals__["photo"] = lambda kind, dice, berries, shared: seen.append(
        (kind, berries, shared)
    )
    dice = np.random.default_rng(0)
    for k in range(3300):
        space.any_photo(k % 11, dice)
    shared = [(kind, berries) for kind, berries, both in seen if both]
    assert {*shared} == {(1, False), (2, True)} and 180 < len(shared) < 300
    often = {
        kind: np.mean([berries for one, berries, both in seen if one == kind and not both])
        for kind in range(11)
    }
    assert often[2] > 0.8 and all(0.04 < often[kind] < 0.22 for kind in often if kind != 2)


def test_the_mask_is_the_food_and_the_berries():
    space = drawn()
    for kind in range(11):
        image, mask = space.photo(kind, np.random.default_rng(kind), True)
        assert set(np.unique(mask)) == {0, 128, 255}
        assert 0.02 < (mask == 255).mean() < 0.25 and 0.01 < (mask == 128).mean() < 0.04
        red = np.asarray(image)[mask == 128].mean(0)
        assert red[0] > 150 and red[1] < 80


def test_place_and_colours_are_chance():
    space, places, colours = drawn(), [], []
    for k in range(120):
        image, mask = space.any_photo(5, np.random.default_rng(k))
        rows, columns = np.nonzero(mask == 255)
        places.append((rows.mean(), columns.mean()))
        colours.append(np.asarray(image)[mask == 255].mean(0))
    assert np.std(places, 0).min() > 12 and np.std(colours, 0).min() > 30


# BERT


def test_pronouns_fit_and_questions_are_answered():
    space = functions(
        "HIS",
        "HERS",
        "CROWDS",
        "VERBS",
        "MERITS",
        "BEASTS",
        "YEARS",
        "PUNISHMENTS",
        "FRUIT",
        "FIRM",
        "sentence",
    )
    dice = np.random.default_rng(0)
    texts = [space.sentence(dice) for _ in range(500)]
    for text in texts:
        words = text.split()
        if "because" in words:
            girl = bool({*words} & {*space.HERS})
            assert girl != bool({*words} & {*space.HIS}) and words[4] == ("she" if girl else "he")
        if "?" in words:
            assert words[-1] in words[:-1]
    assert sum("蘋果" in text for text in texts) > 80


def test_words_are_hidden_as_said():
    vocab = {"[MASK]": 4, "he": 5, "she": 6, "?": 7}
    hide = functions("hide", vocab=vocab).hide
    ids = torch.tensor([[2, 8, 6, 9, 7, 10, 3, 0]]).repeat(4000, 1)
    given, wanted = hide(ids, torch.Generator().manual_seed(0))
    hidden = given == 4
    assert torch.equal(hidden, wanted != -100) and (wanted[hidden] == ids[hidden]).all()
    share = hidden.float().mean(0).tolist()
    assert share[0] == share[6] == share[7] == 0 and share[5] == 1
    assert share[1] == pytest.approx(0.1, abs=0.02) and share[2] == pytest.approx(0.8, abs=0.03)


# the file


@pytest.fixture
def answer_rules():
    return functions(
        "LAYERS", "QUARTERS", "OPTIONS", "SOURCES", "is_answer", "check_submission", "check_table"
    )


@pytest.mark.parametrize(
    "name, row, good",
    [
        ("Q17", "BatchNorm2d,21,computed", True),
        ("Q17", "BatchNorm2d,,computed", False),
        ("Q17", "BatchNorm2d,nan,computed", False),
        ("Q17", "LayerNorm,21,computed", False),
        ("Q16", "where a filter fires | what fires it most,,concept", True),
        ("Q16", "where a filter fires | nothing,,concept", False),
        ("Q6", "not computable here,,not computable here", True),
        ("Q6", "sashimi,,not computable here", False),
        ("Q6", ",0.5,computed", False),
        ("Q6", "sashimi,0.5,guessed", False),
        ("Q6", "sashimi", False),
    ],
)
def test_what_a_line_must_be(answer_rules, name, row, good):
    assert answer_rules.is_answer(name, row) == good


def test_the_file_has_32_lines_in_order(answer_rules, straight, tmp_path):
    lines = straight[1].decode().splitlines()
    assert lines[0] == "question,answer,value,source" and len(lines) == 33
    ids = [one for k in range(1, 31) for one in ([f"Q{k}.1", f"Q{k}.2"] if k in (23, 28) else [f"Q{k}"])]
    assert [line.split(",")[0] for line in lines[1:]] == ids == [*answer_rules.OPTIONS]
    path = tmp_path / "answers.csv"
    path.write_bytes(straight[1])
    answer_rules.check_submission(path)
    path.write_text("\n".join([*lines[:2], lines[3], lines[2], *lines[4:]]) + "\n", encoding="utf-8")
    with pytest.raises(RuntimeError, match="in their order"):
        answer_rules.check_submission(path)


def test_questions_with_one_true_answer(straight):
    """What holds for any net."""
    rows = dict(line.split(",", 1) for line in straight[1].decode().splitlines()[1:])
    assert rows["Q17"].startswith("BatchNorm2d,") and rows["Q7"].startswith("d loss / d input,")
    assert float(rows["Q7"].split(",")[1]) > 0.98
    assert rows["Q30"].startswith("position,") and rows["Q18"].startswith("no significant difference,")


# real data, written by the tests


def write_food(folder, sizes=((94, 62), (130, 131), (51, 34))):
    (folder / "food").mkdir(parents=True)
    for k, name in enumerate(FOOD):
        pixels = np.random.default_rng(k).integers(0, 255, (*sizes[k % len(sizes)], 3), np.uint8)
        image = Image.fromarray(pixels)
        if k == 4:
            image = image.convert("L")
        image.save(folder / "food" / f"{name}.jpg")


def write_checkpoint(path, **changes):
    torch.manual_seed(1)
    net = functions("Classifier").Classifier(**NARROW)
    state = net.state_dict() | changes
    torch.save({"epoch": 208, "model_state_dict": state, "optimizer_state_dict": {"state": {}}}, path)


@pytest.fixture
def real(tmp_path):
    folder = tmp_path / "given"
    write_food(folder)
    write_checkpoint(folder / "checkpoint.pth")
    return folder


def test_the_course_files_are_explained(run, real, tmp_path):
    (real / "food" / "8_8.jpg").unlink()
    with zipfile.ZipFile(tmp_path / "food.zip", "w") as pack:
        for path in sorted((real / "food").iterdir()):
            pack.write(path, f"food/{path.name}")
    with zipfile.ZipFile(real / "ml2022spring-hw9.zip", "w") as pack:
        pack.write(tmp_path / "food.zip", "food.zip")
        pack.write(real / "checkpoint.pth", "checkpoint.pth")
    shutil.rmtree(real / "food")
    (real / "checkpoint.pth").unlink()
    done = run(SCRIPT, HW_DATA="real", HW_DATA_DIR=real).wait()
    assert done.code == 0, done.text
    assert "pictures [8] are missing" in done.text and "classifier:" not in done.text
    lines = (tmp_path / "out/HW09/boss-real/answers.csv").read_text(encoding="utf-8").splitlines()
    rows = dict(line.split(",", 1) for line in lines[1:])
    absent = {name for name, row in rows.items() if row.endswith(",not computable here")}
    assert len(rows) == 32 and absent == {"Q6", "Q9"}
    assert rows["Q17"] == "BatchNorm2d,21,computed"
    heat = np.load(tmp_path / "out/HW09/boss-real/explanations.npz")["heat"]
    assert heat.shape == (9, 32, 32)


def test_no_checkpoint_ends_in_a_sentence_or_learns_from_hw03(run, real, tmp_path):
    (real / "checkpoint.pth").unlink()
    wanted = dict(HW_DATA="real", HW_DATA_DIR=real, HW_LEVEL="simple")
    one_sentence(run(SCRIPT, **wanted).wait(), "checkpoint.pth is not", "HW03's folder training/")
    (real / "training").mkdir()
    for k in range(48):
        pixels = np.random.default_rng(k).integers(0, 255, (40, 40, 3), np.uint8)
        Image.fromarray(pixels).save(real / "training" / f"{k % 11}_{k}.jpg")
    done = run(SCRIPT, **wanted).wait()
    assert done.code == 0 and "classifier: loss" in done.text, done.text


class Payload:
    """What makes a folder when it is read by a careless program."""

    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


@pytest.mark.parametrize("fault", ["keys", "shape", "html", "payload"])
def test_a_wrong_checkpoint_is_named(run, real, fault):
    path = real / "checkpoint.pth"
    if fault == "keys":
        torch.save({"epoch": 1, "net": {}}, path)
    elif fault == "shape":
        write_checkpoint(path, **{"cnn.1.weight": torch.ones(7)})
    elif fault == "html":
        path.write_bytes(b"<html>no</html>")
    else:
        torch.save({"model_state_dict": Payload(real / "opened")}, path)
    one_sentence(run(SCRIPT, HW_DATA="real", HW_DATA_DIR=real).wait(), "checkpoint.pth", r"cnn\.\d")
    assert not (real / "opened").exists(), "a checkpoint may hold numbers, no code that runs"


@pytest.mark.parametrize("fault", ["damaged", "name"])
def test_a_wrong_picture_is_named(run, real, fault):
    if fault == "damaged":
        (real / "food" / "3_5.jpg").write_bytes(b"no picture")
        words = "food/3_5.jpg is no picture"
    else:
        (real / "food" / "3_5.jpg").rename(real / "food" / "egg.jpg")
        words = "egg.jpg: the name must be class_number.jpg"
    one_sentence(run(SCRIPT, HW_DATA="real", HW_DATA_DIR=real).wait(), words)


def test_a_picture_on_its_side_is_put_upright(tmp_path):
    from PIL import ImageOps

    pixels = np.zeros((40, 80, 3), np.uint8)
    pixels[:, :40] = 200
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    Image.fromarray(pixels).save(tmp_path / "0_0.jpg", exif=exif, quality=95)
    one = functions("decode", Image=Image, ImageOps=ImageOps).decode(tmp_path / "0_0.jpg")
    assert one.shape == (3, 128, 128) and (one[:, :50] > 150).all() and (one[:, 80:] < 50).all()


@pytest.mark.parametrize("what", ["loss", "report"])
def test_what_makes_a_checkpoint_useless(run, straight, changed, tmp_path, what):
    old, new = {
        "loss": ("weight_decay=0.01", "weight_decay=0.02"),
        "report": ('methods = {"chance"', 'methods = {"random"'),
    }[what]
    anew = trained_anew(run, straight, changed(SCRIPT, old, new), tmp_path)
    assert anew == (set() if what == "report" else {"classifier", "shortcut"})


MUTANTS = [
    (
        "point = baseline + (k + 0.5) / steps * (x - baseline)",
        "point = baseline + k / steps * (x - baseline)",
    ),
    ("return (x - baseline) * total / steps", "return total / steps"),
    ("        total = -total  # what", "        total = 1 * total  # what"),
    ("return width * span * torch", "return (width * span) ** 2 * torch"),
    ("kind, target).square()\n", "kind, target).abs()\n"),
    ('F.cross_entropy(logits, truth, reduction="sum")', "F.cross_entropy(logits, truth)"),
    ("start_label=0", "start_label=1"),
    ("model(part).softmax(-1)", "model(part)"),
    ("argsort(1, descending=True).argsort(1)", "argsort(1, descending=True)"),
    ("evidence = (mask == 255).float()", "evidence = (mask > 0).float()"),
    ("return scaled((stack + 0.05).prod(0)).cpu()", "return scaled(stack.prod(0)).cpu()"),
    ("heat / heat.amax((1, 2), keepdim=True).clamp(min=1e-20)", "heat / heat.amax((1, 2), keepdim=True)"),
    ("for key in sorted(masks)", "for key in masks"),
    ("        berries = kind == 2\n", "        berries = kind == 1\n"),
    ("ImageOps.exif_transpose(image)", "image"),
    ('weights_only=True)["model_state_dict"]', 'weights_only=False)["model_state_dict"]'),
    (
        "fires = activation(moved, place).mean((2, 3)).diagonal().sum()",
        "fires = activation(moved, place).mean()",
    ),
    ("    net.eval()\n        with torch", "    net.train()\n        with torch"),
    ("| ((chance < 0.8) & pronoun) | reply", "| ((chance < 0.8) & pronoun)"),
    ("    for place in range(kept):", "    for place in range(len(model.cnn)):"),
]
