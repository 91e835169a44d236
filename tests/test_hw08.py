"""HW08's own invariants."""

import math
import shutil

import numpy as np
import pytest
import torch
from conftest import TESTS, one_sentence, outcome, trained_anew
from notebooks import pick
from runner import Run
from sklearn.metrics import roc_auc_score
from torch import nn
from torch.nn import functional as F

SCRIPT = TESTS.parent / "HW08" / "HW08.py"
PROBE = """
kept = dict(train_rows=train_rows, usual_rows=usual_rows, exam_rows=exam_rows, exam_bytes=exam_bytes)
kept |= dict(given=given, final=torch.from_numpy(final), weight=weight, mean=mean, directions=directions)
kept |= {f"test {name}": torch.from_numpy(one) for name, one in test_scores.items()}
x = look(test_images, test_rows)
kept |= dict(x=x, rebuilt=autoencoder(x), answered=judges["critic"](x), usual=look(given, usual_rows))
kept |= dict(usual_rebuilt=autoencoder(kept["usual"]), usual_answered=judges["critic"](kept["usual"]))
np.savez("probe.npz", **{name: one.detach().numpy() for name, one in kept.items()})
"""


def sample_of(straight):
    return straight[2] / "data" / "HW08-sample" / "tiny"


@pytest.fixture(scope="session")
def probe(straight, tmp_path_factory):
    """The inner numbers of the straight run: it goes on after its last epoch."""
    folder = tmp_path_factory.mktemp("probe")
    shutil.copytree(straight[2], folder, dirs_exist_ok=True)
    copy = folder / "HW08.py"
    copy.write_text(SCRIPT.read_text(encoding="utf-8") + PROBE, encoding="utf-8")
    done = Run(copy, folder).wait()
    assert done.code == 0, done.text
    return {name: torch.tensor(one) for name, one in np.load(folder / "probe.npz").items()}


@pytest.fixture
def real(straight, tmp_path):
    """The tiny sample where a person would put the real data -> its folder."""
    shutil.copytree(sample_of(straight) / "data", tmp_path / "given")
    return tmp_path / "given" / "data"


def functions(*names, **given):
    space = dict(torch=torch, nn=nn, F=F, np=np, math=math, device="cpu", SIDE=64, Stop=RuntimeError)
    space |= dict(settings={"noise": 0.5}, say=lambda *_: None, roc_auc_score=roc_auc_score)
    return pick(SCRIPT, *names, **space | given)


def photos(n):
    """Smooth images from -1 to 1."""
    dice = torch.Generator().manual_seed(0)
    return F.interpolate(torch.rand(n, 3, 5, 5, generator=dice), (64, 64), mode="bicubic").clamp(0, 1) * 2 - 1


def scores_in(submission):
    return np.array([float(line.split(",")[1]) for line in submission.decode().split()[1:]])


def area(strange, scores):
    """The chance that a strange image has a higher score than a normal one, by counting pairs."""
    pairs = scores[strange][:, None] - scores[~strange][None]
    return float(((pairs > 0) + 0.5 * (pairs == 0)).mean())


def test_the_judge_takes_the_area_under_the_roc_curve(straight):
    kinds = np.load(sample_of(straight) / "answers" / "kind.npy")
    assert straight[0]["score"] == pytest.approx(area(kinds > 0, scores_in(straight[1])))
    assert straight[0]["score"] > 0.55, "a constant answer has 0.5"


def test_submission_is_as_the_judge_wants_it(straight):
    lines = straight[1].decode().split("\n")
    assert lines[0] == "ID,score" and lines[-1] == ""
    assert [line.split(",")[0] for line in lines[1:-1]] == [str(k) for k in range(300)]


@pytest.mark.parametrize("text", ["nan", "inf", "", "high", "1,0"])
def test_a_score_is_a_finite_number(text):
    is_score = functions("is_score").is_score
    assert is_score("-1.5e-3") and not is_score(text)


def test_equal_scores_are_not_sent(tmp_path):
    path = tmp_path / "p.csv"
    path.write_text("ID,score\n" + "".join(f"{k},{k % 3}\n" for k in range(20)))
    given = dict(check_table=lambda *_: None, test_images=range(20))
    with pytest.raises(RuntimeError, match="3 different scores"):
        functions("check_submission", "is_score", **given).check_submission(path)


def test_answers_of_the_test_part_are_never_learned(run, straight, tmp_path):
    """Other answers in the folder that only the judge reads: the same submission."""
    shutil.copytree(straight[2] / "data", tmp_path / "data")
    path = tmp_path / "data/HW08-sample/tiny/answers/kind.npy"
    np.save(path, np.roll(np.load(path), 1))
    before = path.read_bytes()
    assert run(SCRIPT).wait().code == 0 and path.read_bytes() == before
    result, submission = outcome(tmp_path)
    assert submission == straight[1] and result["score"] != straight[0]["score"]


def test_no_weights_come_from_elsewhere():
    text = SCRIPT.read_text(encoding="utf-8")
    for word in ("pretrained", "weights=", "hub.load", "from_pretrained", "timm", "torchvision"):
        assert word not in text


# the sample


def test_the_sample_gives_nothing_away(straight):
    """Kinds in equal parts, in no order; brightness and distance from the mean image tell next to nothing."""
    kinds = np.load(sample_of(straight) / "answers" / "kind.npy")
    assert np.bincount(kinds).tolist() == [150, 30, 30, 30, 30, 30]
    assert 100 < np.count_nonzero(np.diff(kinds > 0)) < 200
    learned, test = (
        np.load(sample_of(straight) / f"data/data/{name}set.npy") for name in ("training", "testing")
    )
    assert learned.shape == (400, 64, 64, 3) and test.shape == (300, 64, 64, 3) and test.dtype == np.uint8
    far = np.square(test.astype(float) - learned.mean(0)).sum((1, 2, 3))
    assert 0.4 < area(kinds > 0, far) < 0.6 and 0.4 < area(kinds > 0, test.mean((1, 2, 3))) < 0.6


# who learns what


def test_parts_do_not_overlap(probe):
    parts = [set(probe[name].tolist()) for name in ("train_rows", "usual_rows", "exam_rows")]
    assert sum(map(len, parts)) == len(set.union(*parts)) == 400 and [len(one) for one in parts] == [
        320,
        40,
        40,
    ]
    rows = probe["exam_rows"]
    assert torch.equal(probe["exam_bytes"][:40], probe["given"][rows]), "the exam's normal images"


def test_the_exam_changes_what_it_says():
    x = photos(6)
    before, papers = x.clone(), functions("exam").exam(x)
    assert torch.equal(x, before) and len(papers) == 6
    for kind, one in papers.items():
        assert one.shape == x.shape and ((one - x).abs().flatten(1).amax(1) > 0.01).all(), kind
    halves = papers["halves of two"]
    assert torch.equal(halves[1, ..., :32], x[1, ..., :32]) and torch.equal(
        halves[1, ..., 32:], x[0, ..., 32:]
    )
    swapped = papers["swapped quarters"]
    assert torch.equal(swapped[..., :32, :32], x[..., 32:, 32:]) and torch.equal(
        swapped[..., 32:, 32:], x[..., :32, :32]
    )
    assert torch.allclose(papers["two in one"][1], (x[0] + x[1]) / 2)
    assert len(papers["few tones"].unique()) == 5


def test_areas_are_of_one_kind_against_the_normal_images():
    kinds, scores = np.array(["normal"] * 3 + ["a"] * 2 + ["b"] * 2), np.array([1, 2, 3, 2.5, 4, 0, 1.5])
    found = functions("auc_by_kind").auc_by_kind(kinds, scores)
    assert found == {"a": pytest.approx(5 / 6), "b": pytest.approx(1 / 6)}


def test_images_of_another_size_are_brought_to_64():
    images = torch.randint(0, 256, (3, 40, 48, 3), dtype=torch.uint8)
    look = functions("look").look
    assert look(images, torch.tensor([2, 0])).shape == (2, 3, 64, 64)
    same = look(
        torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 64, 64, 3), torch.tensor([1, 0])
    )
    assert (same[0] == 1).all() and (same[1] == -1).all()


# nets and judges


def test_two_encoders_start_at_the_principal_components(probe):
    two = (
        functions("down", "up", "zeroed", "DenseAutoencoder", "TwoEncoders")
        .TwoEncoders(probe["mean"], probe["directions"], 8)
        .eval()
    )
    x, size = probe["x"][:5], probe["directions"].shape[1]
    away = x.flatten(1) - probe["mean"]
    wanted = probe["mean"] + away @ probe["directions"] @ probe["directions"].T
    assert torch.allclose(two(x).flatten(1), wanted, atol=1e-4)
    one = functions("zeroed", "DenseAutoencoder").DenseAutoencoder(probe["mean"], probe["directions"], 8)
    assert torch.allclose(one(x).flatten(1), wanted, atol=1e-4)
    assert torch.allclose(probe["directions"].T @ probe["directions"], torch.eye(size), atol=1e-4)
    learned = probe["given"][probe["train_rows"]].permute(0, 3, 1, 2).float() / 127.5 - 1
    learned = torch.cat([learned, learned.flip(3)]).flatten(1)  # the boss looks into the mirror, too
    assert torch.allclose(probe["mean"], learned.mean(0), atol=1e-4)
    spread = torch.linalg.svdvals(learned - probe["mean"])[:4]
    found = ((learned - probe["mean"]) @ probe["directions"][:, :4]).norm(dim=0)
    assert torch.allclose(found, spread, rtol=0.02)
    nn.init.ones_(two.draw[-1].bias)
    assert torch.allclose(two(x).flatten(1), wanted + 1, atol=1e-4), "and can only add"


def test_the_conv_net_is_the_official_one():
    net = functions("down", "up", "ConvAutoencoder").ConvAutoencoder()
    assert net.down(torch.zeros(2, 3, 64, 64)).shape == (2, 48, 8, 8)
    assert net(torch.zeros(2, 3, 64, 64)).shape == (2, 3, 64, 64)
    assert sum(weight.numel() for weight in net.parameters()) == 47_355


def test_errors_are_weighed_by_what_is_usual_at_each_pixel(probe):
    error = (probe["usual_rebuilt"] - probe["usual"]).square().mean(0)
    weight = 1 / (error + 0.01 * error.mean())
    assert torch.allclose(probe["weight"], weight, rtol=1e-3)
    usual = ((probe["usual_rebuilt"] - probe["usual"]).square() * weight).mean((1, 2, 3)).log()
    test = ((probe["rebuilt"] - probe["x"]).square() * weight).mean((1, 2, 3)).log()
    middle = usual.median()
    wanted = (test - middle) / (usual.quantile(0.9) - middle)
    assert torch.allclose(probe["test error"], wanted, rtol=1e-3, atol=1e-2)


def test_the_score_is_the_louder_alarm(probe, straight):
    usual, found = probe["usual_answered"], probe["answered"]
    wanted = (found - usual.median()) / (usual.quantile(0.9) - usual.median())
    assert torch.allclose(probe["test critic"], wanted, rtol=1e-3, atol=1e-3)
    both = torch.stack([probe["test critic"], probe["test error"]])
    assert torch.allclose(probe["final"], both.amax(0), atol=1e-5)
    assert (both.argmax(0) == 0).any() and (both.argmax(0) == 1).any()
    np.testing.assert_allclose(scores_in(straight[1]), probe["final"], rtol=1e-6)


def test_spoiling_fills_an_ellipse_or_all_and_leaves_the_original():
    torch.manual_seed(0)
    space = functions("between", "ellipses", "elsewhere", "spoil")
    x = photos(64)
    before, spoilt = x.clone(), space.spoil(x)
    assert torch.equal(x, before) and spoilt.abs().max() <= 1.001
    touched = (spoilt - x).abs().amax(1).flatten(1) > 0.02
    share = touched.float().mean(1)
    whole = touched[:, [0, 63, -64, -1]].all(1).float().mean()  # an ellipse does not reach all corners
    assert (share > 0).float().mean() > 0.9 and 0.1 < share.median() < 0.5 and 0.1 < whole < 0.45
    masks = space.ellipses(500)
    assert masks.min() >= 0 and masks.max() <= 1 and (masks.flatten(1).amax(1) > 0.9).all()
    middle = (masks * torch.linspace(-1, 1, 64)).sum((1, 2, 3)) / masks.sum((1, 2, 3))
    assert middle.std() > 0.3 and middle.mean().abs() < 0.1


def test_the_critic_is_shown_the_image_and_the_error_in_usual_errors():
    x, usual = torch.rand(2, 3, 4, 4), torch.full((3, 4, 4), 0.25)
    for shown, wrong in (("both", 0.5 / (3 * 0.5)), ("image", 0.0)):
        evidence = functions("evidence", settings={"shown": shown}).evidence
        seen = evidence(lambda x: x + 0.5, usual, x)
        assert torch.equal(seen[:, :3], x) and torch.allclose(seen[:, 3:], torch.full_like(x, wrong))


def test_the_critic_learns_spoilt_from_normal():
    seen = []

    class Model(nn.Module):
        def forward(self, x):
            seen.append(x)
            return torch.tensor([-9.0, -9.0, 9.0, 9.0])

    given = dict(settings={"noise": 0.0}, spoil=lambda x: x + 1, evidence=lambda net, usual, x: x)
    loss_of = functions("between", "noisy", "critic_loss", **given).critic_loss
    loss = loss_of(None, None, Model(), torch.zeros(2, 3, 4, 4))
    assert loss < 0.01 and torch.equal(seen[0][2:], torch.ones(2, 3, 4, 4))


def test_mirrored_images_have_the_same_mean_as_in_the_mirror():
    space = functions("components", look=lambda images, rows: images[rows], SEED=0)
    x = torch.randn(40, 3, 8, 8) + torch.arange(8)
    for mirrored in (False, True):
        mean, directions = space.components(x, torch.arange(40), 5, mirrored)
        mean = mean.view(3, 8, 8)
        assert directions.shape == (192, 5) and torch.allclose(mean, mean.flip(2), atol=1e-4) == mirrored


def test_noise_is_of_a_random_strength_and_the_clean_image_is_asked_for():
    torch.manual_seed(0)
    space = functions("between", "noisy", "rebuild_loss")
    strength = space.noisy(torch.zeros(400, 3, 16, 16)).flatten(1).std(1)
    assert strength.max() < 0.55 and strength.min() < 0.05 and 0.2 < strength.mean() < 0.3
    x = photos(4)
    assert space.rebuild_loss(lambda seen: x, x) == 0 and space.rebuild_loss(lambda seen: seen, x) > 0.001


def test_the_cloud_of_the_variational_autoencoder():
    net = functions("Variational").Variational(True).eval()
    x = photos(3)
    middle, log_spread = net.encode(x).chunk(2, 1)
    cloud = torch.distributions.Normal(middle, log_spread.exp())
    wanted = torch.distributions.kl_divergence(cloud, torch.distributions.Normal(0.0, 1.0))
    assert torch.allclose(net(x)[1], wanted, atol=1e-5) and torch.equal(net(x)[0], net(x)[0])
    assert not torch.equal(net.train()(x)[0], net(x)[0])
    plain = functions("Variational").Variational(False).train()
    assert torch.equal(plain(x)[0], plain(x)[0])


# what goes wrong


@pytest.mark.parametrize("what", ["spoil", "report"])
def test_what_makes_a_checkpoint_useless(run, straight, changed, tmp_path, what):
    old, new = {
        "spoil": ("(8 - 8 * reach).sigmoid()", "(9 - 9 * reach).sigmoid()"),
        "report": ('ylabel="strange images found"', 'ylabel="found"'),
    }[what]
    anew = trained_anew(run, straight, changed(SCRIPT, old, new), tmp_path)
    assert anew == (set() if what == "report" else {"critic"})


def test_a_net_that_diverges_keeps_its_last_sound_round(run, changed, tmp_path):
    """As if the loss ran away in the third round, and took the weights with it."""
    sound = 'return float(accelerator.reduce(total + 0 * weights, "mean"))'
    wild = """
    if len(history) == 2 and isinstance(model, TwoEncoders):
        model.load_state_dict({name: one * math.nan for name, one in model.state_dict().items()})
        weights = math.nan
    """
    done = run(changed(SCRIPT, sound, wild.strip() + "\n    " + sound), HW_LEVEL="strong").wait()
    assert done.code == 0 and "autoencoder DIVERGED in round 3" in done.text, done.text
    assert np.isfinite(scores_in(outcome(tmp_path)[1])).all()


def test_divergence_at_once_is_said(run, changed):
    wild = changed(SCRIPT, "(model(noisy(x)) - x).square().mean()", "(model(noisy(x)) - x).mean() * math.inf")
    one_sentence(run(wild, HW_LEVEL="simple").wait(), "autoencoder diverged at once", "lower `rate`")


def test_a_collapse_is_said():
    said = []
    space = functions("liveliness", "watch", say=said.append)
    x = photos(8)
    space.watch("net", nn.Identity(), x)
    space.watch("net", lambda x: 0.2 * x, x)
    assert not said and space.liveliness(0.2 * x, x) == pytest.approx(0.04)
    space.watch("net", lambda x: x.mean(0).expand_as(x), x)
    assert "net HAS COLLAPSED" in said[0]


GOOD = np.random.default_rng(0).integers(0, 256, (120, 12, 12, 3), np.uint8)
BAD = {
    "channels first": (lambda path: np.save(path, GOOD.transpose(0, 3, 1, 2)), r"transpose\(0, 2, 3, 1\)"),
    "grey": (lambda path: np.save(path, GOOD[..., 0]), "repeat grey images"),
    "flat": (lambda path: np.save(path, GOOD.reshape(120, -1)), "shape .120, 432.*fetch"),
    "none": (lambda path: np.save(path, GOOD[:0]), "nothing to see"),
    "other numbers": (lambda path: np.save(path, GOOD.astype(np.int32)), "int32.*astype"),
    "floats up to 255": (lambda path: np.save(path, GOOD.astype(np.float32)), "broken numbers"),
    "no number": (lambda path: np.save(path, np.full((9, 12, 12, 3), np.nan)), "broken numbers"),
    "objects": (lambda path: np.save(path, np.array([{}, "x"], object), allow_pickle=True), "no plain array"),
    "cut": (lambda path: path.write_bytes(path.read_bytes()[:5000]), "damaged.*fetch"),
    "empty": (lambda path: path.write_bytes(b""), "damaged.*fetch"),
    "a web page": (lambda path: path.write_bytes(b"<html>"), "damaged.*fetch"),
}


@pytest.mark.parametrize("fault", BAD)
def test_a_bad_file_is_named(tmp_path, fault):
    path = tmp_path / "trainingset.npy"
    np.save(path, GOOD)
    read = functions("stop", "as_bytes", "read").read
    assert np.array_equal(read(path), GOOD)
    spoil, words = BAD[fault]
    spoil(path)
    with pytest.raises(RuntimeError, match=f"{path.name}.*{words}"):
        read(path)


def test_shares_become_bytes(tmp_path):
    path = tmp_path / "trainingset.npy"
    np.save(path, (GOOD / 255).astype(np.float32))
    assert np.array_equal(functions("stop", "as_bytes", "read").read(path), GOOD)


def test_real_data_in_another_order_and_of_another_size(run, straight, real, tmp_path):
    """The test part backwards: the same nets, the same scores backwards."""
    path = real / "testingset.npy"
    np.save(path, np.load(path)[::-1])
    training = np.load(real / "trainingset.npy")
    checkpoints = next(straight[2].glob("out/*/*/checkpoint"))
    shutil.copytree(checkpoints, tmp_path / "out/HW08/boss-real/checkpoint")
    done = run(SCRIPT, HW_DATA="real", HW_DATA_DIR=real.parent).wait()
    assert done.code == 0 and done.text.count("going on after") == 5, done.text
    backwards = scores_in((tmp_path / "out/HW08/boss-real/prediction.csv").read_bytes())
    np.testing.assert_allclose(backwards[::-1], scores_in(straight[1]), rtol=1e-4, atol=1e-4)
    training[::7] = 50
    np.save(real / "trainingset.npy", training[:, 8:56, 4:60])
    done = run(SCRIPT, HW_DATA="real", HW_DATA_DIR=real.parent, HW_LEVEL="simple").wait()
    assert done.code == 0 and "58 of 400 images are of one colour and left out" in done.text, done.text
    assert "(274,)" in done.text, "of the 342 others two tenths are not learned"


def test_too_few_images_end_in_a_sentence(run, real):
    np.save(real / "trainingset.npy", np.load(real / "trainingset.npy")[:60])
    ended = run(SCRIPT, HW_DATA="real", HW_DATA_DIR=real.parent).wait()
    one_sentence(ended, "trainingset.npy has 60 usable images, at least 100", "fetch")


MUTANTS = [
    ('np.load(answers / "kind.npy") > 0, guess', 'np.load(answers / "kind.npy") == 0, guess'),
    ("{number},{score:.9g}", "{number},{score:.1g}"),
    ("enumerate(final.tolist())", "enumerate(sorted(final.tolist()))"),
    ("shuffled[2 * tenth :]", "shuffled[tenth:]"),
    ("np.flatnonzero(~empty)", "np.arange(len(empty))"),
    (
        "images[rows.to(images.device)].to(device).permute(0, 3, 1, 2)",
        "images[rows.to(images.device)].to(device).permute(0, 3, 2, 1)",
    ),
    ("x.roll(1, 0), SIDE // 2, x.clone()", "x.roll(1, 0), SIDE // 2, x"),
    ('(kinds == kind) | (kinds == "normal")', "kinds == kinds"),
    ("torch.svd_lowrank(x - mean, ", "torch.svd_lowrank(x, "),
    ("nn.init.zeros_(layer.weight)", "pass"),
    ("linear = first @ self.directions.T + self.mean", "linear = first @ self.directions.T"),
    ("weight = 1 / usual\n", "weight = usual\n"),
    (
        "(middle.square() + (2 * log_spread).exp() - 1 - 2 * log_spread) / 2",
        "(middle.square() + log_spread.exp() - 1 - log_spread) / 2",
    ),
    ("torch.cat([x, x.flip(3)] if mirrored", "torch.cat([x, x] if mirrored"),
    ("(autoencoder(x) - x) / (3 * usual.sqrt())", "(autoencoder(x) - x) / (3 * usual)"),
    ("wrong = 0 * wrong", "pass"),
    (
        "torch.cat([torch.zeros(len(x)), torch.ones(len(x))])",
        "torch.cat([torch.ones(len(x)), torch.zeros(len(x))])",
    ),
    ("(model(noisy(x)) - x).square().mean()", "(model(noisy(x)) - noisy(x)).square().mean()"),
    ("between(0, 1, len(x), 1, 1, 1) * torch.randn_like(x)", "torch.randn_like(x)"),
    ("torch.maximum(ellipses(n), (chance[3] < 0.25).float())", "ellipses(n)"),
    ("(scores - middle) / (usual", "scores / (usual"),
    ("np.maximum.reduce", "np.add.reduce"),
    ("bare(model).load_state_dict(sound)", "pass"),
    ("total + 0 * weights", "total"),
    ("if self.cloud and self.training", "if self.cloud"),
    ("if not (part.min() >= 0 and part.max() <= 1):", "if part.min() < 0 or part.max() > 256:"),
    (
        "alarm(ask(judge, test_images, test_rows), known)",
        "alarm(ask(judge, test_images, test_rows), ask(judge, test_images, test_rows))",
    ),
]
