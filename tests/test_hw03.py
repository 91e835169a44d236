"""HW03's own invariants."""

import io
import json
import math
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import TESTS, one_sentence, outcome, trained_anew
from notebooks import pick
from PIL import Image
from runner import Run
from torch import nn
from torch.nn import functional as F

SCRIPT = TESTS.parent / "HW03" / "HW03.py"
KINDS = 11
PROBE = """
kept = dict(probability=probability, held_out=held_out, checked=checked, label=label, test_rows=test_rows)
kept |= dict(given_train=given_train, given_valid=given_valid, images=images, mean=mean, spread=spread)
for k, (learn, check) in enumerate(splits):
    kept |= {f"learn {k}": learn, f"check {k}": check}
still = STILL.expand(4, 2, 3)
kept["looked"] = look(images, test_rows[:4], STORED, still)
net = accelerator.unwrap_model(model)
kept["asked"] = torch.stack([ask(net, images, test_rows, 3), ask(net.train(), images, test_rows, 3)])
straight_look = look(images, test_rows, settings["size"], STILL.expand(len(test_rows), 2, 3))
kept["by_hand"] = net.eval()(straight_look).softmax(-1)
kept["last"] = torch.tensor([p["valid"] for p in history if p["stage"][:3] == "net" and p["epoch"] == 3])
np.savez("probe.npz", **{name: one.detach().numpy() for name, one in kept.items()})
"""


@pytest.fixture(scope="session")
def probe(straight, tmp_path_factory):
    """The inner numbers of the straight run: it goes on after its last epoch."""
    folder = tmp_path_factory.mktemp("probe")
    shutil.copytree(straight[2], folder, dirs_exist_ok=True)
    copy = folder / "HW03.py"
    copy.write_text(SCRIPT.read_text(encoding="utf-8") + PROBE, encoding="utf-8")
    done = Run(copy, folder).wait()
    assert done.code == 0, done.text
    numbers = {name: torch.tensor(one) for name, one in np.load(folder / "probe.npz").items()}
    return numbers | {"folder": folder}


def sample_of(straight):
    return straight[2] / "data" / "HW03-sample" / "tiny"


@pytest.fixture
def real(straight, tmp_path):
    """The tiny sample where a person would put the real data -> the folder food11."""
    shutil.copytree(sample_of(straight) / "data", tmp_path / "given")
    return tmp_path / "given" / "food11"


def functions(*names, **given):
    space = dict(torch=torch, nn=nn, F=F, np=np, math=math, device="cpu", CLASSES=["kind"] * KINDS)
    return pick(SCRIPT, *names, **space | given)


def test_beats_a_constant_answer(straight):
    answers = np.load(sample_of(straight) / "answers" / "category.npy")
    assert straight[0]["score"] > 2 * np.bincount(answers).max() / len(answers)


def test_the_judge_takes_the_share_of_right_answers(straight):
    answers = np.load(sample_of(straight) / "answers" / "category.npy")
    guess = [int(line.split(",")[1]) for line in straight[1].decode().split()[1:]]
    right = sum(one == other for one, other in zip(guess, answers, strict=True))
    assert straight[0]["score"] == pytest.approx(right / len(answers))


def test_submission_has_the_names_of_the_test_files(straight):
    lines = straight[1].decode().split("\n")
    assert lines[0] == "Id,Category" and lines[-1] == ""
    assert [line.split(",")[0] for line in lines[1:-1]] == [f"{k:04}" for k in range(1, 67)]


@pytest.mark.parametrize("value", ["11", "-1", "", "3.0", "03", "bread", "²"])
def test_a_kind_is_a_whole_number_from_0_to_10(value):
    is_kind = functions("is_kind").is_kind
    assert is_kind("0") and is_kind("10") and not is_kind(value)


def test_no_weights_come_from_elsewhere():
    text = SCRIPT.read_text(encoding="utf-8")
    for word in ("pretrained", "weights=", "hub.load", "from_pretrained", "timm", "torchvision"):
        assert word not in text


# what a net gets


def test_looking_straight_changes_nothing(probe):
    rows = probe["test_rows"][:4]
    wanted = (probe["images"][rows].float() - probe["mean"]) / probe["spread"]
    assert torch.allclose(probe["looked"], wanted, atol=1e-3)
    learned = probe["images"][probe["given_train"]].float()
    assert torch.allclose(probe["mean"], learned.mean((0, 2, 3), keepdim=True), atol=1e-2)
    assert torch.allclose(probe["spread"], learned.std((0, 2, 3), keepdim=True), rtol=1e-3)


def test_random_maps_turn_mirror_zoom_and_stay_inside():
    torch.manual_seed(0)
    maps = functions("CLOSEST", "between", "random_maps", PROFILE="small").random_maps(4000)
    turned, shift = maps[:, :, :2], maps[:, :, 2]
    area = turned.det()
    assert 0.45 < (area < 0).float().mean() < 0.55, "half of them are mirrored"
    assert area.abs().min() > 0.74 and area.abs().max() < 1.11 and area.abs().std() > 0.08
    room = (1 - area.abs().sqrt()).clamp(min=0)
    assert (shift.abs() <= room[:, None] + 1e-5).all() and shift.abs().max() > 0.1
    quarter = (torch.atan2(-turned[:, 0, 1], turned[:, 1, 1]) / (math.pi / 2)).floor()
    assert (quarter.long().add(2).bincount() > 850).all(), "turned any way round"
    assert len(maps.flatten(1).unique(dim=0)) == 4000


def test_mixup_mixes_photos_and_answers_in_the_same_shares():
    torch.manual_seed(0)
    mixed, shares = functions("mixed").mixed, []
    x, target = torch.arange(4.0).view(4, 1, 1, 1), torch.eye(4)
    for _ in range(200):
        laid, wanted = mixed(x, target, 0.2)
        assert torch.allclose(laid.flatten(), wanted @ torch.arange(4.0), atol=1e-5)
        assert torch.allclose(wanted.sum(1), torch.ones(4)) and wanted[0, 1] == wanted[0, 2] == 0
        shares.append(float(wanted[0, 0]))
    assert 0.4 < np.mean(shares) < 0.6 and np.mean([0.1 < share < 0.9 for share in shares]) < 0.45


# nets


def test_the_plain_net_is_the_official_one():
    net = functions("plain_net").plain_net(64, 128)
    assert sum(weight.numel() for weight in net.parameters()) == 12_833_803
    assert net(torch.zeros(2, 3, 128, 128)).shape == (2, KINDS)


def test_a_block_adds_to_what_came_in():
    block = functions("conv", "Block").Block(8, 8, 1).eval()
    x = torch.randn(2, 8, 6, 6)
    nn.init.zeros_(block.second[1].weight)
    assert torch.allclose(block(x), x.relu())
    space = functions("conv", "Block", "residual_net")
    assert space.Block(8, 16, 2)(x).shape == (2, 16, 3, 3)
    net = space.residual_net(8, 2)
    assert sum(isinstance(part, space.Block) for part in net) == 8
    assert net(torch.zeros(2, 3, 40, 40)).shape == net(torch.zeros(2, 3, 48, 48)).shape == (2, KINDS)


def test_question_2_adds_the_input_of_layers_2_4_and_6_and_no_weight():
    SixLayers = functions("conv", "SixLayers").SixLayers
    nets = [SixLayers(4, 16, residual).eval() for residual in (False, True)]
    nets[1].load_state_dict(nets[0].state_dict())
    x = torch.randn(2, 3, 16, 16)
    for net, added in zip(nets, ((), (1, 3, 5)), strict=True):
        y = x
        for number, layer in enumerate(net.layers):
            y = F.relu(layer(y) + y * (number in added) if number in added else layer(y))
        assert torch.allclose(net(x), net.last(net.head(y)), atol=1e-6)
    shapes = [layer[0].weight.shape[:2] for layer in SixLayers(64, 16, True).layers]
    assert shapes == [(64, 3), (64, 64), (128, 64), (128, 128), (256, 128), (256, 256)]
    assert [layer[0].stride[0] for layer in nets[0].layers] == [1, 1, 2, 1, 2, 1]


# who learns what, and who is asked about what


def test_splits_do_not_leak(probe):
    """Each photo is checked once, by a net that has not learned it; the mix of kinds is kept."""
    both = torch.cat([probe["given_train"], probe["given_valid"]])
    parts = [(probe[f"learn {k}"], probe[f"check {k}"]) for k in range(4)]
    assert sorted(torch.cat([check for _, check in parts]).tolist()) == sorted(both.tolist())
    for learn, check in parts:
        assert sorted(torch.cat([learn, check]).tolist()) == sorted(both.tolist())
        often = torch.stack([probe["label"][rows].bincount(minlength=KINDS) for rows in (both, check)])
        assert (often[0] / 4 - often[1]).abs().max() < 1
    assert not set(both.tolist()) & set(probe["test_rows"].tolist())


def test_below_the_boss_the_given_validation_part_is_not_learned():
    rows = dict(given_train=torch.arange(5), given_valid=torch.arange(5, 8))
    assert [one.tolist() for one in functions("make_splits", **rows).make_splits(1)[0]] == [
        [0, 1, 2, 3, 4],
        [5, 6, 7],
    ]


def test_held_out_answers_are_those_of_the_net_that_had_not_learned_the_photo(probe, straight):
    first, start = probe["held_out"][0], 0
    for k in range(4):
        check = probe[f"check {k}"]
        guess = first[start : start + len(check)].argmax(-1)
        right = (guess == probe["label"][check]).float().mean()
        assert right == pytest.approx(float(probe["last"][k]), abs=1e-6)
        start += len(check)
    checked = torch.cat([probe[f"check {k}"] for k in range(4)])
    assert start == len(checked)
    guess = probe["held_out"].mean(0).argmax(-1)
    right = (guess == probe["label"][checked]).float().mean()
    assert straight[0]["valid_score"] == pytest.approx(float(right))


def test_the_first_look_is_straight_and_the_others_are_not(probe):
    one, again = probe["asked"]
    assert torch.allclose(one[0], probe["by_hand"], atol=1e-5) and torch.equal(one[0], again[0])
    assert (one[1] - one[0]).abs().max() > 1e-3 and (one[2] - one[1]).abs().max() > 1e-3
    assert torch.allclose(one.sum(-1), torch.ones_like(one.sum(-1)), atol=1e-5)


def test_the_answer_is_the_likeliest_kind_of_the_mean(probe, straight):
    assert torch.allclose(probe["probability"].sum(-1), torch.ones(66), atol=1e-4)
    guess = [int(line.split(",")[1]) for line in straight[1].decode().split()[1:]]
    assert guess == probe["probability"].argmax(-1).tolist()


def test_all_nets_and_all_looks_count():
    answers = list(torch.rand(4, 3, 5, KINDS))  # nets, looks, photos
    found = functions("probability", answers=answers).probability
    assert torch.allclose(found, sum(one.sum(0) for one in answers) / 12)


def test_answers_of_the_test_part_are_never_learned(run, straight, tmp_path):
    """Other answers in the folder that only the judge reads: the same submission."""
    shutil.copytree(straight[2] / "data", tmp_path / "data")
    path = tmp_path / "data/HW03-sample/tiny/answers/category.npy"
    np.save(path, np.roll(np.load(path), 1))
    before = path.read_bytes()
    assert run(SCRIPT).wait().code == 0 and path.read_bytes() == before
    result, submission = outcome(tmp_path)
    assert submission == straight[1] and result["score"] != straight[0]["score"]


@pytest.mark.parametrize("what", ["turns", "report"])
def test_what_makes_a_checkpoint_useless(run, straight, changed, tmp_path, what):
    old, new = {
        "turns": ('if settings["geometry"]:', 'if settings["geometry"] is True:'),
        "report": ("confusion >= 0.05", "confusion >= 0.06"),
    }[what]
    anew = trained_anew(run, straight, changed(SCRIPT, old, new), tmp_path)
    assert anew == (set() if what == "report" else {f"net-{k}" for k in range(4)})


# files


def picture(mode="RGB", size=(40, 20)):
    """Left half bright, right half dark."""
    pixels = np.zeros((size[1], size[0], 3), np.uint8)
    pixels[:, : size[0] // 2] = 200
    return Image.fromarray(pixels).convert(mode)


def decoded(path):
    return functions("decode", STORED=8, Image=Image, SimpleNamespace=SimpleNamespace).decode(path)


@pytest.mark.parametrize("mode", ["L", "CMYK", "RGB"])
def test_grey_and_cmyk_photos_are_read_as_rgb(tmp_path, mode):
    picture(mode).save(tmp_path / "0_0.jpg", quality=95)
    one = decoded(tmp_path / "0_0.jpg")
    assert one.shape == (3, 8, 8) and one.dtype == np.uint8
    assert (np.abs(one[:, :, :3].astype(int) - 200) < 12).all() and (one[:, :, 5:] < 12).all()


def test_a_photo_that_lies_on_its_side_is_put_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    picture().save(tmp_path / "0_0.jpg", exif=exif, quality=95)
    one = decoded(tmp_path / "0_0.jpg")
    assert (one[:, :3] > 150).all() and (one[:, 5:] < 50).all(), "left has become top"


@pytest.mark.parametrize("fault", ["cut", "html", "empty"])
def test_a_damaged_photo_is_named(tmp_path, fault):
    good = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(good, "JPEG")
    data = {"cut": good.getvalue()[:600], "html": b"<html>no</html>", "empty": b""}[fault]
    (tmp_path / "3_7.jpg").write_bytes(data)
    assert f"{tmp_path.name}/3_7.jpg: " in decoded(tmp_path / "3_7.jpg")


def test_the_kind_is_the_number_before_the_line():
    space = functions("class_of", Stop=RuntimeError)
    assert [space.class_of(TESTS / name) for name in ("10_3.jpg", "1_0.jpg", "0_10.jpg")] == [10, 1, 0]
    for name in ("11_0.jpg", "-1_0.jpg", "bread_0.jpg", "7.jpg", "_3.jpg"):
        with pytest.raises(RuntimeError, match=f"{name}.*class from 0 to 10"):
            space.class_of(TESTS / name)


def test_few_damaged_photos_are_left_out_many_end_the_run(run, real, tmp_path):
    cut = real / "training" / "0_0.jpg"
    cut.write_bytes(cut.read_bytes()[:300])
    (real / "test" / "0003.jpg").write_bytes(b"no photo")
    for path in (real / "validation").glob("10_*.jpg"):
        path.unlink()
    wanted = dict(HW_DATA="real", HW_DATA_DIR=real.parent, HW_LEVEL="simple")
    done = run(SCRIPT, **wanted).wait()
    assert done.code == 0, done.text
    assert "training/0_0.jpg" in done.text and "left out" in done.text
    assert "test/0003.jpg" in done.text and "answered" in done.text
    assert re.search("validation: there is no image of .*vegetable, fruit", done.text)
    rows = (tmp_path / "out/HW03/simple-real/submission.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in rows[1:]] == [f"{k:04}" for k in range(1, 67)]
    for path in (real / "training").glob("1_*.jpg"):
        path.write_bytes(b"<html>")
    for path in (real / "test").glob("00[1-3]?.jpg"):
        path.write_bytes(b"<html>")
    before = sorted(path for path in (tmp_path / "out").rglob("*"))
    one_sentence(run(SCRIPT, **wanted).wait(), "images are damaged: delete .*food11 and fetch it again")
    assert before == sorted(path for path in (tmp_path / "out").rglob("*"))


def test_a_damaged_photo_is_not_learned():
    given = dict(label=torch.arange(20) % KINDS, damaged={13: "x"}, parts={}, say=print)
    rows = functions("usable", **given).usable("validation", 4, 20)
    assert rows.tolist() == [*range(4, 13), *range(14, 20)]


def test_a_part_without_photos_to_learn_ends_in_a_sentence(run, real):
    for path in [*(real / "validation").iterdir()][5:]:
        path.unlink()
    ended = run(SCRIPT, HW_DATA="real", HW_DATA_DIR=real.parent).wait()
    one_sentence(ended, "validation has only [45] usable images")


def test_photos_are_decoded_once_until_one_is_touched(run, straight, probe, tmp_path):
    name = "data/HW03-decoded/sample-tiny/images.npy"
    first, again = straight[2] / name, probe["folder"] / name
    assert first.stat().st_mtime_ns == again.stat().st_mtime_ns, "the second run reads what the first made"
    assert np.load(first).shape == (246, 3, 64, 64) and np.load(first).any((1, 2, 3)).all()
    assert json.loads((first.parent / "damaged.json").read_text()) == {}
    shutil.copytree(straight[2], tmp_path, dirs_exist_ok=True)
    picture().save(tmp_path / "data/HW03-sample/tiny/data/food11/test/0001.jpg")
    nets = sorted(path.name for path in tmp_path.rglob("checkpoint/*.pt"))
    assert run(SCRIPT).wait().code == 0
    assert (tmp_path / name).stat().st_mtime_ns != first.stat().st_mtime_ns
    assert nets == sorted(path.name for path in tmp_path.rglob("checkpoint/*.pt")), (
        "a test photo is not learned"
    )


def test_a_diverged_training_says_so(run, changed):
    wild = changed(SCRIPT, "(3e-4, 1e-3, 3e-3, 3e-3)", "(1e35, 1e-3, 3e-3, 3e-3)")
    one_sentence(run(wild, HW_LEVEL="simple").wait(), "diverged", "lower `rate`")


MUTANTS = [
    (
        'np.mean(guess == np.load(answers / "category.npy"))',
        'np.mean(guess != np.load(answers / "category.npy"))',
    ),
    ("zip(test_id, category)", "zip(test_id, category[::-1])"),
    ("return int(name)\n", "return int(name[0])\n"),
    ("mirror = torch.randint(0, 2, (n,)) * 2 - 1", "mirror = torch.ones(n)"),
    ("turn = between(-math.pi, math.pi, n)", "turn = between(-math.pi, math.pi, 1).expand(n)"),
    ("share * target + (1 - share) * target.flip(0)", "target"),
    ("x.flip(0), share * target", "x.flip(1), share * target"),
    ("F.relu(self.past(x) + self.second", "F.relu(self.second"),
    ("if self.residual and number % 2 == 0", "if self.residual and number % 2 == 1"),
    ("    model.eval()\n", "    model.train()\n"),
    ("        if view > 0:\n", "        if view >= 0:\n"),
    ("[(given_train, given_valid)]", "[(torch.cat([given_train, given_valid]), given_valid)]"),
    ("[(torch.cat(hands[:k] + hands[k + 1 :]), hand)", "[(both, hand)"),
    ("by_kind = both[label[both].argsort(stable=True)]", "by_kind = both"),
    ("probability = torch.stack(answers).mean((0, 1))", "probability = answers[0].mean(0)"),
    (
        "checked = torch.cat([check for _, check in splits])",
        "checked = torch.cat([check for _, check in splits]).sort().values",
    ),
    ("ImageOps.exif_transpose(image)", "image"),
    ('.convert("RGB")\n', "\n"),
    ("if k not in damaged], dtype", "], dtype"),
    ("path.stat().st_mtime_ns) for path in paths", "0) for path in paths"),
    ("20 * len(damaged) > len(paths)", "False"),
    ("images[:first_test], learn", "images, learn"),
    ("known.std((0, 2, 3), keepdim=True)", "known.std()"),
    ("F.one_hot(label[rows], len(CLASSES))", "F.one_hot(label[rows.flip(0)], len(CLASSES))"),
]
