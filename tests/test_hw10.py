"""HW10's own invariants."""

import functools
import gzip
import io
import math
import re
import shutil
import tarfile
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import TESTS, one_sentence, outcome, trained_anew
from notebooks import pick, read_script, tag_of
from PIL import Image
from torch import nn
from torch.nn import functional as F

SCRIPT = TESTS.parent / "HW10" / "HW10.py"
CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
EPSILON = 8 / 255
FAMILIES = ["resnet", "nin", "vgg", "seresnet", "dense", "mixer"]


class Refused(Exception):
    """In place of the notebook's Stop."""


class Alone:
    """In place of the accelerator: one process."""

    def split_between_processes(self, rows, apply_padding):
        assert apply_padding
        self.rows = rows
        return self

    def __enter__(self):
        return self.rows

    def __exit__(self, *_):
        pass

    def gather(self, one):
        return one


def functions(*names, **given):
    space = dict(torch=torch, nn=nn, F=F, np=np, math=math, Image=Image, io=io, re=re, gzip=gzip)
    space |= dict(
        tarfile=tarfile,
        functools=functools,
        device="cpu",
        CLASSES=CLASSES,
        BOUND=8,
        EPSILON=EPSILON,
        Stop=Refused,
    )
    return pick(SCRIPT, *names, **space | given)


ATTACK = [
    "MEAN",
    "SPREAD",
    "ask",
    "slope_of",
    "varied",
    "random_maps",
    "looks",
    "gradient",
    "into_box",
    "move",
]


def attacker(**given):
    return functions(*ATTACK, accelerator=Alone(), settings={"at_once": 3}, **given)


def small_net(seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 4, 5, 4), nn.Tanh(), nn.Flatten(), nn.Linear(4 * 49, 10)).double()


@pytest.fixture
def images():
    torch.manual_seed(1)
    return torch.rand(5, 3, 32, 32, dtype=torch.float64), torch.tensor([3, 1, 4, 1, 5])


def sample_of(straight):
    return straight[2] / "data" / "HW10-sample" / "tiny"


def members(path):
    """{name: image} of an archive, read as anybody would."""
    with tarfile.open(path, "r:gz") as pack:
        return {
            one.name: np.array(Image.open(io.BytesIO(pack.extractfile(one).read()))).astype(int)
            for one in pack
        }


def submission_of(straight):
    return next(straight[2].glob("out/HW10/boss-sample/submission.sample.tgz"))


# the file


def test_no_byte_is_changed_by_more_than_8_and_nearly_all_are_changed(straight):
    sent, far = members(submission_of(straight)), []
    for name, pixels in sent.items():
        benign = np.array(Image.open(sample_of(straight) / "data" / "data" / name)).astype(int)
        assert pixels.shape == (32, 32, 3)
        far.append(np.abs(pixels - benign))
    assert np.max(far) == 8 and np.mean(np.array(far) > 0) > 0.8


def test_names_are_those_of_the_images_without_a_top_folder(straight):
    given = {
        path.relative_to(sample_of(straight) / "data/data").as_posix()
        for path in sample_of(straight).rglob("*.png")
    }
    assert given == {f"{name}/{name}{k}.png" for name in CLASSES for k in (1, 2, 3)}
    assert set(members(submission_of(straight))) == given
    head = submission_of(straight).read_bytes()[:10]
    assert head[:2] == b"\x1f\x8b" and head[4:8] == bytes(4), "no time of day in it"


def archive(path, files):
    with tarfile.open(path, "w:gz") as pack:
        for name, data in files:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            pack.addfile(member, io.BytesIO(data))
    return path


def png(pixels, kind="PNG"):
    Image.fromarray(np.asarray(pixels, np.uint8)).save(file := io.BytesIO(), kind)
    return file.getvalue()


GREY = np.full((32, 32, 3), 100)
FAULTS = {
    "a byte too far": (
        lambda files: files[:2] + [(files[2][0], png(GREY + 9))],
        "changed by 9, allowed are 8",
    ),
    "one is missing": (lambda files: files[:-1], "dog/dog3.png is too much or missing"),
    "another name": (lambda files: files[:-1] + [("dog/dog4.png", files[2][1])], "dog4.png is too much"),
    "a top folder": (
        lambda files: [(f"data/{name}", data) for name, data in files],
        "data/dog/dog1.png is too much",
    ),
    "one too many": (lambda files: [*files, ("dog/notes.txt", b"?")], "notes.txt is too much"),
    "one twice": (lambda files: [*files, files[0]], "each once"),
    "a way out": (lambda files: [*files[:-1], ("../dog/dog3.png", files[2][1])], "too much or missing"),
    "another size": (
        lambda files: files[:2] + [(files[2][0], png(np.zeros((32, 33, 3))))],
        "PNG RGB 33 x 32",
    ),
    "a JPEG": (
        lambda files: files[:2] + [(files[2][0], png(GREY, "JPEG"))],
        "JPEG RGB 32 x 32, but must be PNG",
    ),
    "grey": (lambda files: files[:2] + [(files[2][0], png(GREY[:, :, 0]))], "PNG L 32 x 32"),
    "no image": (lambda files: files[:2] + [(files[2][0], b"what")], "dog3.png cannot be read"),
}


def checker(**given):
    names = [f"dog/dog{k}.png" for k in (1, 2, 3)]
    benign = torch.full((3, 3, 32, 32), 100, dtype=torch.uint8)
    parts = ("read_submission", "images_of", "check_submission", "LARGEST", "write_submission")
    return functions(*parts, names=names, benign=benign, **given)


@pytest.mark.parametrize("fault", [None, *FAULTS])
def test_the_validator_says_what_is_wrong(tmp_path, fault):
    files = [(f"dog/dog{k}.png", png(GREY + shift)) for k, shift in ((1, 8), (2, -8), (3, 0))]
    if fault is None:
        return checker().check_submission(archive(tmp_path / "good.tgz", files))
    change, words = FAULTS[fault]
    with pytest.raises(Refused, match=words):
        checker().check_submission(archive(tmp_path / "bad.tgz", change(files)))


def test_no_archive_and_a_large_one_are_refused(tmp_path):
    (tmp_path / "bad.tgz").write_bytes(b"no archive")
    with pytest.raises(Refused, match="is no .tgz"):
        checker().check_submission(tmp_path / "bad.tgz")
    (tmp_path / "large.tgz").write_bytes(bytes(2_100_000))
    with pytest.raises(Refused, match="2100000 bytes, the judge takes less than 2000000"):
        checker().check_submission(tmp_path / "large.tgz")


def test_what_is_written_is_what_was_made(tmp_path):
    class Aside:
        def __init__(self, path):
            self.path = path

        def __enter__(self):
            return self.path

        def __exit__(self, *_):
            pass

    sent = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    space = checker(aside=Aside, adversarial=sent)
    space.write_submission(tmp_path / "one.tgz")
    space.write_submission(tmp_path / "two.tgz")
    assert torch.equal(space.images_of(tmp_path / "one.tgz"), sent)
    assert (tmp_path / "one.tgz").read_bytes() == (tmp_path / "two.tgz").read_bytes()


def test_the_bound_is_kept_in_bytes_after_rounding():
    benign = torch.tensor([0, 3, 100, 250, 255, 100], dtype=torch.uint8).view(6, 1, 1, 1)
    space = functions("to_bytes", benign=benign)
    far = space.to_bytes(benign.double() / 255 + 8.6 / 255, slice(None)).flatten()
    assert far.tolist() == [8, 11, 108, 255, 255, 108]
    near = space.to_bytes(benign.double() / 255 - 8.4 / 255, torch.arange(6)).flatten()
    assert near.tolist() == [0, 0, 92, 242, 247, 92]
    assert space.to_bytes(benign[2:3].double() / 255 + 2.6 / 255, torch.tensor([2])).item() == 103


# the attack


def test_one_step_is_fgsm(images):
    x, y = images
    net, space = small_net(0), attacker()
    state = dict(x=x.clone(), speed=torch.zeros_like(x))
    space.move(state, x, y, [net], 2 * EPSILON, 1.0, 0.0)
    leaf = x.clone().requires_grad_()
    F.cross_entropy(net((leaf - space.MEAN) / space.SPREAD), y, reduction="sum").backward()
    fgsm = (x + EPSILON * leaf.grad.sign()).clamp(0, 1)
    assert torch.allclose(state["x"], fgsm, atol=1e-12)


def test_the_loss_rises_and_the_box_is_never_left(images):
    x, y = images
    x[:, :, :8] = 0.0
    net, space = small_net(0), attacker()
    state, losses = dict(x=x.clone(), speed=torch.zeros_like(x)), []
    for _ in range(12):
        losses.append(F.cross_entropy(space.ask([net], state["x"]), y).item())
        space.move(state, x, y, [net], EPSILON / 4, 1.0, 0.0)
        assert (state["x"] - x).abs().max() <= EPSILON + 1e-12
        assert state["x"].min() >= 0 and state["x"].max() <= 1
    assert losses[-1] > losses[0] + 0.1 and losses[1] > losses[0]


def test_slopes_are_divided_image_by_image_and_added_up(images):
    x, y = images
    space, slopes = attacker(), []
    sizes = torch.tensor([1e-6, 1.0, 1e3, 5.0, 1e-3], dtype=torch.float64).view(5, 1, 1, 1)

    def gradient(nets, x, y, variety):
        slopes.append(torch.randn(x.shape, dtype=torch.float64) * sizes)
        return slopes[-1]

    space = attacker(gradient=gradient)
    space = functions("move", "into_box", gradient=gradient)
    state = dict(x=x.clone(), speed=torch.zeros_like(x))
    for _ in range(3):
        space.move(state, x, y, [], 0.01, 0.9, 0.0)
    unit = [slope / slope.abs().mean((1, 2, 3), keepdim=True) for slope in slopes]
    assert torch.allclose(state["speed"], unit[2] + 0.9 * (unit[1] + 0.9 * unit[0]))
    still = dict(x=x.clone(), speed=torch.zeros_like(x))
    space.move(still, x, y, [], 0.01, 0.0, 0.0)
    assert torch.equal(still["x"], (x + 0.01 * slopes[3].sign()).clamp(0, 1)), "without momentum: I-FGSM"


def test_an_image_without_a_slope_stays_until_it_has_one(images):
    x, y = images
    slopes = [torch.zeros_like(x), torch.ones_like(x)]
    space = functions("move", "into_box", gradient=lambda *_: slopes.pop(0))
    state = dict(x=x.clone(), speed=torch.zeros_like(x))
    space.move(state, x, y, [], 0.01, 1.0, 0.0)
    assert torch.equal(state["x"], x)
    space.move(state, x, y, [], 0.01, 1.0, 0.0)
    assert torch.equal(state["x"], (x + 0.01).clamp(0, 1))


def test_the_ensemble_is_the_mean_of_the_answers(images):
    x, y = images
    nets, space = [small_net(1), small_net(2), small_net(3)], attacker()
    leaf = x.clone().requires_grad_()
    logits = sum(net((leaf - space.MEAN) / space.SPREAD) for net in nets) / 3
    F.cross_entropy(logits, y, reduction="sum").backward()
    found = space.gradient(nets, x, y, 0.0)
    assert torch.allclose(found, leaf.grad, rtol=1e-4, atol=1e-7), "in parts of at_once images, too"
    assert torch.allclose(space.ask(nets, x).double(), logits, atol=1e-5)


def test_only_the_image_gets_a_slope(images):
    x, y = images
    net = small_net(1)
    attacker().gradient([net], x, y, 0.0)
    assert all(weight.grad is None for weight in net.parameters())


# input diversity


def test_maps_zoom_and_shift_and_the_share_is_kept():
    torch.manual_seed(0)
    random_maps = functions("random_maps").random_maps
    still = torch.tensor([[1.0, 0, 0], [0, 1, 0]])
    assert torch.equal(random_maps(50, 0.0), still.expand(50, 2, 3))
    maps = random_maps(4000, 1.0)
    zoom, shift = maps[:, 0, 0], maps[:, :, 2]
    assert torch.equal(zoom, maps[:, 1, 1]) and (maps[:, 0, 1] == 0).all() and (maps[:, 1, 0] == 0).all()
    assert 0.75 <= zoom.min() < 0.76 and 1.14 < zoom.max() <= 1.15
    assert (shift.abs() <= (zoom - 1).abs()[:, None] + 1e-6).all() and shift.std() > 0.05
    half = (random_maps(4000, 0.5) != still).any(2).any(1).float().mean()
    assert 0.45 < half < 0.55


def test_views_keep_the_shape_and_the_slope_goes_through(images):
    space = functions("varied", "random_maps")
    x = images[0].float().requires_grad_()
    assert space.varied(x, None) is x
    same = space.varied(x, space.random_maps(5, 0.0))
    assert torch.allclose(same, x, atol=1e-5)
    other = space.varied(x, space.random_maps(5, 1.0))
    assert other.shape == x.shape and (other - x).abs().mean() > 0.05
    (slope,) = torch.autograd.grad(other.sum(), x)
    assert (slope != 0).float().mean() > 0.3


def test_each_surrogate_sees_every_image_in_its_own_way(images):
    x, y = images[0].float(), images[1]
    seen = []

    def slope_of(answer, x, y):
        seen.append(answer.keywords["maps"])
        return torch.zeros_like(x)

    given = dict(accelerator=Alone(), settings={"at_once": 3}, slope_of=slope_of, functools=functools)
    gradient = functions("gradient", "random_maps", "looks", **given).gradient
    gradient(["one", "two"], x, y, 1.0)
    gradient(["one", "two"], x, y, 1.0)
    assert [[len(one) for one in maps] for maps in seen] == [[3, 3], [2, 2], [3, 3], [2, 2]]
    rows = torch.cat([torch.cat(maps) for maps in seen]).flatten(1)
    assert len(rows.unique(dim=0)) == 20, "two steps, two nets, five images"


# JPEG and the judge


def test_jpeg_is_pillows(images):
    pixels = (images[0] * 255).byte()
    coarse, fine = (functions("jpeg").jpeg(pixels, quality) for quality in (31, 95))
    Image.fromarray(pixels[1].permute(1, 2, 0).numpy()).save(file := io.BytesIO(), "JPEG", quality=31)
    assert torch.equal(coarse[1], torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1))
    far = [(one.int() - pixels.int()).abs().float().mean() for one in (coarse, fine)]
    assert far[0] > far[1] > 0 and coarse.dtype == torch.uint8


def test_waves_are_those_of_jpegs_cosines():
    waves = functions("waves").waves
    flat = waves(torch.full((1, 3, 32, 32), 5.0))
    assert flat[0] == pytest.approx(40, rel=1e-4) and flat[1:].abs().max() < 1e-4
    checks = torch.tensor([[1.0, -1], [-1, 1]]).repeat(16, 16).expand(1, 3, 32, 32)
    assert waves(checks).argmax() == 14, "a chessboard is the finest"


def test_the_judge_is_the_mean_accuracy_of_the_black_boxes_behind_jpeg(straight):
    space = functions("Past", "conv", "head", "black_boxes", PROFILE="tiny")
    states = torch.load(sample_of(straight) / "answers" / "black_boxes.pt", weights_only=True)
    sent, scores = members(submission_of(straight)), []
    decoded = []
    for pixels in sent.values():
        Image.fromarray(pixels.astype(np.uint8)).save(file := io.BytesIO(), "JPEG", quality=75)
        decoded.append(np.array(Image.open(file)))
    x = torch.from_numpy(np.stack(decoded)).permute(0, 3, 1, 2).float() / 64 - 2
    kinds = torch.tensor([CLASSES.index(name.split("/")[0]) for name in sent])
    for name, net in space.black_boxes().items():
        net.load_state_dict(states[name])
        scores.append(float((net.eval()(x).argmax(-1) == kinds).float().mean()))
    assert len(scores) == 3 and straight[0]["score"] == pytest.approx(np.mean(scores), abs=1e-6)


def test_beats_doing_nothing(straight):
    assert straight[0]["score"] < 0.6 and straight[0]["valid_score"] < 0.6


def test_the_attack_never_asks_the_black_boxes(run, straight, tmp_path):
    """Other weights in the folder that only the judge reads: the same submission."""
    shutil.copytree(straight[2] / "data", tmp_path / "data")
    path = tmp_path / "data/HW10-sample/tiny/answers/black_boxes.pt"
    size, states = path.stat().st_size, torch.load(path, weights_only=True)
    for state in states.values():
        state[[*state][-1]] += torch.eye(10)[3] * 100  # everything is a cat
    torch.save(states, path)
    assert path.stat().st_size == size, "else the sample would be made anew"
    assert run(SCRIPT).wait().code == 0
    result, submission = outcome(tmp_path)
    assert submission == straight[1] and result["score"] == pytest.approx(0.1)


def test_the_black_boxes_are_named_in_no_cell_that_trains_or_attacks():
    named = set()
    for cell in read_script(SCRIPT).cells:
        if cell.cell_type == "code" and re.search(r"black_boxes|ANSWERS|\bjudge\(", cell.source):
            named.add(tag_of(cell))
    assert named == {"sample", "common:data", "submission", "common:submit", "report"}


def test_black_boxes_and_surrogates_are_other_nets_on_other_images(straight):
    space = functions("outlines", "draw", "Past", "conv", "head", "black_boxes", PROFILE="tiny")
    for seeds in ((1, 2), (1, 3), (2, 3)):
        one, other = (space.draw(30, seed)[0].flatten(1) for seed in seeds)
        assert not (one[:, None] == other).all(2).any()
    parts = ["OWN_FAMILIES", *FAMILIES, "Beside", "Excite", "Past", "conv", "head"]
    theirs = {str(net) for net in space.black_boxes().values()}
    ours = {str(make(12)) for make in functions(*parts).OWN_FAMILIES.values()}
    assert len(theirs) == 3 and len(ours) == 6 and not theirs & ours


def test_black_boxes_learn_from_images_of_their_own(tmp_path):
    taught = []

    def draw(count, seed):
        return torch.full((count, 3, 32, 32), seed, dtype=torch.uint8), torch.arange(count) % 10

    given = dict(draw=draw, black_boxes=lambda: {"box": nn.Linear(1, 1)}, QUIET=True, PROFILE="tiny")
    given["teach"] = lambda net, images, *_: taught.append(int(images.max()))
    functions("make_sample", **given).make_sample(tmp_path, tmp_path)
    known = {int(np.asarray(Image.open(path)).max()) for path in tmp_path.rglob("*.png")}
    known.add(int(np.load(tmp_path / "train.npz")["images"].max()))
    assert len(known) == 2 and len(taught) == 1 and taught[0] not in known


# surrogates and the estimate


@pytest.mark.parametrize("family", FAMILIES)
def test_families(family):
    parts = ["OWN_FAMILIES", *FAMILIES, "Beside", "Excite", "Past", "conv", "head"]
    net = functions(*parts).OWN_FAMILIES[family](6)
    assert net(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


def test_shifted_and_mirrored_batches():
    pixels = torch.arange(32).view(1, 1, 1, 32).expand(200, 3, 32, 32).byte()
    one = SimpleNamespace(process_index=0, num_processes=1)
    for real in (False, True):
        make_batch = functions("make_batch", REAL=real, accelerator=one).make_batch
        torch.manual_seed(0)
        x = (make_batch(pixels, torch.arange(200)) * 255).round()
        middle = x[:, 0, 5, 16]
        assert x.shape == (200, 3, 32, 32) and (x >= 0).all() and (x <= 31).all()
        slopes = (x[:, 0, 5, 20] - x[:, 0, 5, 10]).sign()
        assert (slopes < 0).any() == real and len(middle.unique()) >= 7
    down = torch.arange(32).view(1, 1, 32, 1).expand(200, 3, 32, 32).byte()
    moved = (make_batch(down, torch.arange(200)) * 255).round()[:, 0, 16, 16]
    assert sorted(moved.unique().tolist()) == [13, 14, 15, 16, 17, 18, 19]


def test_the_family_that_is_asked_has_not_helped(run, tmp_path):
    """At strong there is no chance in an attack: with the same nets it would be the same images."""
    assert run(SCRIPT, HW_LEVEL="strong").wait().code == 0
    states = {}
    for path in tmp_path.glob("out/HW10/strong-sample/checkpoint/*.pt"):
        name = path.name.rsplit(".", 2)[0]
        if not name.startswith("net-"):
            states[name] = torch.load(path, weights_only=True)[3]["state"]["x"]
    assert set(states) == {"attack", "fgsm", *(f"without-{family}" for family in FAMILIES)}
    everyone = states["attack"][::4]
    others = [states[f"without-{family}"] for family in FAMILIES]
    assert all((one - everyone).abs().max() > 1e-3 for one in others)
    assert len({one.numpy().tobytes() for one in others}) == 6


def test_what_starts_anew(run, straight, changed, tmp_path):
    """Another step: all attacks and no surrogate."""
    script = changed(SCRIPT, "rate * state", "0.9 * rate * state")
    attacks = {"attack", "fgsm", *(f"without-{family}" for family in FAMILIES)}
    assert trained_anew(run, straight, script, tmp_path) == attacks


def test_another_report_starts_nothing_anew(run, straight, changed, tmp_path):
    script = changed(SCRIPT, "qualities = [10, 20, 31,", "qualities = [10, 31,")
    assert trained_anew(run, straight, script, tmp_path) == set()


# real data


@pytest.fixture
def real(straight, tmp_path):
    """The tiny sample where a person would put the real data -> the folder of the classes."""
    shutil.copytree(sample_of(straight) / "data", tmp_path / "given")
    (tmp_path / "given" / "train.npz").rename(tmp_path / "given" / "cifar10_train_10k.npz")
    return tmp_path / "given" / "data"


def test_real_data_in_the_courses_layout(run, real, tmp_path):
    """Leftovers of a file browser are no images of a class."""
    (real / ".ipynb_checkpoints").mkdir()
    shutil.copy(real / "dog" / "dog1.png", real / ".ipynb_checkpoints" / "dog1.png")
    shutil.copy(real / "dog" / "dog1.png", real / "dog" / "copy of dog1.png")
    wanted = dict(HW_DATA="real", HW_DATA_DIR=real.parent, HW_LEVEL="simple")
    done = run(SCRIPT, **wanted).wait()
    assert done.code == 0 and done.text.count("is left out") == 2, done.text
    sent = members(tmp_path / "out/HW10/simple-real/submission.tgz")
    assert len(sent) == 30 and "dog/dog2.png" in sent
    assert "only the judge knows" in done.text
    shutil.rmtree(real / "ship")
    one_sentence(run(SCRIPT, **wanted).wait(), "has no images ship/ship1.png")


def test_a_grey_image_ends_in_a_sentence(tmp_path):
    read_image = functions("read_image").read_image
    Image.new("L", (32, 32)).save(tmp_path / "cat1.png")
    with pytest.raises(Refused, match="cat1.png is PNG L 32 x 32, but must be PNG RGB 32 x 32"):
        read_image(tmp_path / "cat1.png")
    (tmp_path / "cat2.png").write_bytes(b"<html>")
    with pytest.raises(Refused, match="cat2.png cannot be read"):
        read_image(tmp_path / "cat2.png")
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "cat3.png")
    assert (read_image(tmp_path / "cat3.png").permute(1, 2, 0).numpy() == pixels).all()


def test_names_of_the_course():
    of_the_course = functions("of_the_course").of_the_course
    assert of_the_course(Path("data/dog/dog12.png"))
    for name in ("data/dog/cat1.png", "data/wolf/wolf1.png", "data/dog/dog.png", "data/dog/dog1a.png"):
        assert not of_the_course(Path(name)), name


@pytest.mark.parametrize("fault", ["names", "floats", "labels", "lengths", "nonsense"])
def test_training_images_are_checked(tmp_path, fault):
    pixels, kinds = np.zeros((4, 32, 32, 3), np.uint8), np.array([0, 9, 1, 2])
    parts = {"names": dict(x=pixels), "floats": dict(images=pixels / 2.0, labels=kinds)}
    parts |= {
        "labels": dict(images=pixels, labels=kinds + 1),
        "lengths": dict(images=pixels[1:], labels=kinds),
    }
    if fault == "nonsense":
        (tmp_path / "train.npz").write_bytes(b"nonsense")
    else:
        np.savez(tmp_path / "train.npz", **parts[fault])
    with pytest.raises(Refused, match="train.npz"):
        functions("read_training").read_training(tmp_path / "train.npz")


def test_without_anything_to_train_on_a_sentence_says_what_to_do():
    def fetch(*_):
        raise OSError("no network")

    class Pool:
        def submit(self, *_):
            answer = Future()
            answer.set_result(None)
            return answer

    given = dict(
        fetch=fetch,
        POOL=Pool(),
        ring=None,
        CIFAR="https://x/cifar-10-python.tar.gz",
        Path=Path,
    )
    space = functions("fetch_training", DATA_DIR=Path("data/HW10"), **given)
    with pytest.raises(
        Refused, match="nothing to train surrogates on.*no network.*Put cifar-10-python.tar.gz into"
    ):
        space.fetch_training()


MUTANTS = [
    (
        "change = (255 * x.cpu() - benign[rows].float()).round().clamp(-BOUND, BOUND)",
        "change = (255 * x.cpu() - benign[rows].float()).round()",
    ),
    ('into_box(state["x"] + rate', 'into_box(state["x"] - rate'),
    ("x.clamp(start - EPSILON, start + EPSILON).clamp(0, 1)", "x.clamp(start - EPSILON, start + EPSILON)"),
    ("x.clamp(start - EPSILON, start + EPSILON).clamp(0, 1)", "x.clamp(0, 1)"),
    ("slope.abs().mean((1, 2, 3), keepdim=True)", "slope.abs().mean()"),
    ('momentum * state["speed"] + slope', 'momentum * slope + state["speed"]'),
    (".clamp(min=1e-20)", ""),
    (
        "maps = [random_maps(len(x), variety) for _ in nets]",
        "maps = [random_maps(len(x), variety)] * len(nets)",
    ),
    ("for net, own in zip(nets, maps)]).mean(0)", "for net, own in zip(nets, maps)])[0]"),
    ("used = (torch.rand(n) < variety).float()", "used = torch.ones(n)"),
    ("others = [one for one in chosen if one != family]", "others = [one for one in chosen]"),
    ("if far.max() > BOUND:", "if far.max() > BOUND + 1:"),
    ("zip(names, adversarial):", "zip(names, adversarial.flip(0)):"),
    ('"wb", 9, file, mtime=0)', '"wb", 9, file)'),
    ("    if REAL:\n        mirrored", "    if True:\n        mirrored"),
    ("def judge(images, answers, quality=75)", "def judge(images, answers, quality=0)"),
    ("images, kind = draw(many, 2)", "images, kind = draw(many, 1)"),
    ("guess = net.eval()(x.float() / 64 - 2)", "guess = net.eval()(x.float() / 255)"),
    ("if wrong or len(found) != len(names)", "if wrong"),
    ('"JPEG", quality=quality)', '"JPEG")'),
    (
        'if kind != "PNG RGB 32 x 32":\n        raise Stop(f"{path} is {kind}',
        'if False:\n        raise Stop(f"{path} is {kind}',
    ),
    (
        "label = torch.tensor([CLASSES.index(path.parent.name) for path in paths])",
        'label = torch.tensor([CLASSES.index(path.parent.name) for path in PATHS["images"]])',
    ),
    (
        "depends = [attack, [net.state_dict() for net in nets], start",
        "depends = [[net.state_dict() for net in nets], start",
    ),
    ("cosines @ blocks @ cosines.T", "cosines @ blocks"),
]
