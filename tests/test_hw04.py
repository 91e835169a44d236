"""HW04's own invariants."""

import io
import json
import shutil
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import TESTS, outcome, trained_anew
from notebooks import pick
from torch.nn import functional as F

SCRIPT = TESTS.parent / "HW04" / "HW04.py"
NETS = ["rotate", "SelfAttention", "feed_forward", "SampleBlock", "TransformerBlock", "Convolution"]
NETS += ["ConformerBlock", "Stem", "Pool", "statistics", "CosineHead", "make_embedding", "SpeakerNet"]
SIZES = dict(width=32, layers=2, heads=2, ff=64, dropout=0.1, kernel=7, channels=4, drop=0.2)
SIMPLE = dict(block="sample", pool="mean", mfa=False, margin=0.0)
MEDIUM = SIMPLE | dict(block="transformer")
STRONG = SIMPLE | dict(block="conformer")
BOSS = dict(block="conformer", pool="asp", mfa=True, margin=0.2)
KINDS = {"simple": SIMPLE, "medium": MEDIUM, "strong": STRONG, "boss": BOSS, "sap": BOSS | {"pool": "sap"}}


def net_of(kind):
    torch.manual_seed(0)
    parts = pick(SCRIPT, *NETS, settings=SIZES | KINDS[kind])
    net = parts.SpeakerNet(40, 7)
    for layer in net.modules():  # statistics that are not the identity
        if isinstance(layer, torch.nn.BatchNorm1d):
            layer.running_mean.normal_()
    return net.eval()


def batch(frames=(61, 38, 9)):
    x = torch.randn(len(frames), max(frames), 40, generator=torch.Generator().manual_seed(1))
    mask = torch.arange(max(frames)) < torch.tensor(frames)[:, None]
    return x * mask[..., None], mask


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_padding_changes_nothing(kind):
    """More padding, or the same utterance alone: the scores stay."""
    net, (x, mask) = net_of(kind), batch()
    scores = net(x, mask)
    padded = net(F.pad(x, (0, 0, 0, 24)), F.pad(mask, (0, 24)))
    assert (padded - scores).abs().max() < 1e-4
    for k, frames in enumerate(mask.sum(1)):
        alone = net(x[k : k + 1, :frames], mask[k : k + 1, :frames])
        assert (alone - scores[k]).abs().max() < 1e-4
    unmasked = net(x, torch.ones_like(mask))
    assert (unmasked[1:] - scores[1:]).abs().max() > 1e-3, "the mask must matter"


@pytest.mark.parametrize("kind", ["mean", "sap", "asp"])
@torch.no_grad()
def test_pooling_weights_sum_to_one(kind):
    pool = pick(SCRIPT, "Pool", "statistics").Pool(kind, 40)
    x, mask = batch()
    weights = pool.weights(x, mask)
    assert weights.shape == (3, 61, 40 if kind == "asp" else 1)
    torch.testing.assert_close(weights.sum(1), torch.ones(3, weights.shape[2]))
    assert (weights[~mask] == 0).all() and (weights[mask] > 0).all()
    e = pool(x, mask)
    torch.testing.assert_close(e[:, :40], (weights * x).sum(1))
    if kind == "asp":
        assert e.shape == (3, 80)
        spread = ((weights * x.square()).sum(1) - (weights * x).sum(1).square() + 1e-5).sqrt()
        torch.testing.assert_close(e[:, 40:], spread, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_self_attentive_pooling_is_the_formula():
    pool = pick(SCRIPT, "Pool", "statistics").Pool("sap", 40)
    x, mask = batch((30, 30))
    hidden = torch.tanh(x @ pool.score[0].weight.T + pool.score[0].bias)
    alpha = (hidden @ pool.score[2].weight.T + pool.score[2].bias).softmax(1)
    torch.testing.assert_close(pool(x, mask), (alpha * x).sum(1))


def test_margin_loss():
    loss = pick(SCRIPT, "margin_loss", "SCALE", F=F)
    head = pick(SCRIPT, "CosineHead").CosineHead(16, 5, bias=False)
    x, y = torch.randn(8, 16), torch.arange(8) % 5
    cosine = head(x)
    assert cosine.abs().max() <= 1 + 1e-6 and head.bias is None
    torch.testing.assert_close(head(3 * x), cosine)  # lengths do not count
    torch.testing.assert_close(loss.margin_loss(cosine, y, 0.0), F.cross_entropy(30 * cosine, y))
    lower = cosine.clone()
    lower[torch.arange(8), y] -= 0.2
    torch.testing.assert_close(loss.margin_loss(cosine, y, 0.2), F.cross_entropy(30 * lower, y))


def test_margin_grows_and_a_collapse_halves_it():
    given = dict(settings={"margin": 0.2}, speakers=range(24))
    parts = pick(SCRIPT, "margin_at", "check", "Stop", "SCALE", np=np, say=print, **given)
    assert parts.margin_at(0) == 0 and parts.margin_at(0.15) == pytest.approx(0.1)
    assert parts.margin_at(0.5) == 0.2 and parts.margin_at(0.95) == pytest.approx(0.3)
    guard = {"bad": torch.tensor(0.0), "ease": torch.tensor(1.0)}
    for stage, loss, progress in (("train", 5.0, 0.25), ("train", 9.0, 0.05), ("ablation", 9.0, 0.25)):
        parts.check(stage, guard, loss, progress)
        assert guard["ease"] == 1
    parts.check("train", guard, 9.0, 0.25)  # equal cosines: log(1 + 23 exp(30 m)) = 8.1 with m = 0.167
    assert guard["ease"] == 0.5
    with pytest.raises(parts.Stop, match="diverged"):
        parts.check("train", {"bad": torch.tensor(20.0)}, 1.0, 0.5)


@torch.no_grad()
def test_rotary_positions_tell_distances_only():
    rotate = pick(SCRIPT, "rotate", torch=torch).rotate
    q, k = torch.randn(2, 1, 1, 1, 8).expand(2, 1, 1, 20, 8)
    product = (rotate(q) @ rotate(k).transpose(-1, -2))[0, 0]  # one query and one key at 20 places
    for distance in (0, 3, -5):
        line = product.diagonal(distance)
        torch.testing.assert_close(line, line[:1].expand_as(line))
    assert (product.diagonal(3)[0] - product.diagonal(-3)[0]).abs() > 1e-3


@torch.no_grad()
def test_only_the_simple_level_ignores_the_order():
    x, mask = batch((40,))
    for kind, blind in (("simple", True), ("medium", False), ("strong", False)):
        net = net_of(kind)
        assert torch.allclose(net(x, mask), net(x.flip(1), mask), atol=1e-5) == blind, kind


def test_parts_of_the_conformer_can_be_left_out():
    parts = pick(SCRIPT, *NETS, settings=SIZES | STRONG)
    whole, lame, local = (parts.SpeakerNet(40, 7, *on) for on in ((1, 1), (1, 0), (0, 1)))
    assert whole.blocks[0].convolution and whole.blocks[0].attention
    assert lame.blocks[0].convolution is None and local.blocks[0].attention is None
    scores = [net.eval()(*batch()) for net in (whole, lame, local)]
    assert all(score.isfinite().all() for score in scores)


@torch.no_grad()
def test_linear_attention_is_the_slow_formula_in_another_order():
    linear = pick(SCRIPT, "linear_attention", F=F).linear_attention
    q, k, v = torch.randn(3, 1, 2, 30, 8)
    matrix = (F.elu(q) + 1) @ (F.elu(k) + 1).transpose(-1, -2)
    torch.testing.assert_close(linear(q, k, v), matrix / matrix.sum(-1, keepdim=True) @ v)


@torch.no_grad()
def test_best_weights_are_copies():
    keep_best = pick(SCRIPT, "keep_best", torch=torch).keep_best
    net, best = torch.nn.Linear(3, 2), {"score": torch.tensor(-1.0)}
    keep_best(best, 0.5, net)
    before = net.weight.clone()
    net.weight += 1
    keep_best(best, 0.4, net)
    assert best["score"] == 0.5 and (best["weight"] == before).all()
    keep_best(best, 0.6, net)
    assert (best["weight"] == net.weight).all() and best["score"].item() == pytest.approx(0.6)


def packed(sizes, mels=3):
    """gather and friends over a small pack whose value is the frame's number."""
    size = torch.tensor(sizes)
    frames = (torch.arange(int(size.sum())).float()[:, None].expand(-1, mels) / 8).half()
    return dict(size=size, begin=size.cumsum(0) - size, frames=frames, device="cpu", torch=torch)


def test_gather_masks_and_never_reads_a_neighbour():
    given = packed([5, 30, 12])
    gather = pick(SCRIPT, "gather", **given).gather
    x, mask = gather(given["begin"], given["size"])
    assert mask.sum(1).tolist() == [5, 30, 12] and x.shape == (3, 30, 3)
    assert x[0, :, 0].tolist() == [k / 8 for k in range(5)] + [0] * 25
    assert x[2, :12, 0].tolist() == [(35 + k) / 8 for k in range(12)]


def test_segments_vary_and_stay_inside():
    given = packed([5, 300, 120])
    parts = pick(SCRIPT, "gather", "segments", settings={"crop": (20, 60)}, **given)
    dice, numbers = torch.Generator().manual_seed(0), torch.tensor([0, 1, 2])
    lengths, starts = set(), set()
    for _ in range(60):
        x, mask = parts.segments(numbers, dice)
        lengths.add(x.shape[1])
        starts.add(float(x[1, 0, 0]))
        assert mask[0].sum() == 5 and mask[1:].all()
        assert 5 / 8 <= x[1].min() and x[1].max() < 305 / 8 and x[2].min() >= 305 / 8
    assert min(lengths) >= 20 and max(lengths) <= 60 and len(lengths) > 15 and len(starts) > 30


def test_buckets_hold_every_utterance_once_and_not_too_many_frames():
    buckets = pick(SCRIPT, "buckets", CAP=1000, torch=torch).buckets
    length = torch.randint(20, 900, (200,), generator=torch.Generator().manual_seed(0))
    length[7] = 5000
    parts = buckets(length)
    assert sorted(torch.cat(parts).tolist()) == list(range(200))
    assert all(len(part) == 1 or len(part) * length[part].max() <= 1000 for part in parts)
    assert len(parts) < 150 and buckets(length[:0]) == []


def test_views_cover_long_utterances_and_leave_short_ones():
    given = packed([50, 130, 700])
    stretches = pick(SCRIPT, "stretches", settings={"crop": (40, 120)}, **given).stretches
    row, first, length = stretches(torch.tensor([0, 1, 2]), 5)
    assert row.bincount().tolist() == [1, 6, 6] and length[3:].eq(120).all()
    assert first[row == 2].tolist() == [180, 180, 325, 470, 615, 760]
    assert stretches(torch.tensor([2]), 1)[1].tolist() == [180]


def test_session_split_holds_out_whole_clusters():
    from sklearn.cluster import KMeans

    split = pick(SCRIPT, "split_sessions", np=np, KMeans=KMeans).split_sessions
    dice = np.random.default_rng(0)
    y = np.repeat(np.arange(20), 30)
    room = np.tile(np.repeat([0, 1, 2], 10), 20)
    sound = dice.normal(size=(20, 3, 8))[y, room] * 10 + dice.normal(0, 0.1, (600, 8))
    held = split(y, sound, 0.08, dice)
    assert 48 <= held.sum() <= 58  # at least 8 %, and at most one cluster more
    for who in range(20):
        rooms = {(int(r), bool(held[(y == who) & (room == r)].all())) for r in range(3)}
        parts = [held[(y == who) & (room == r)].mean() for r in range(3)]
        assert set(parts) <= {0.0, 1.0}, "a cluster is cut in two"
        assert sum(whole for _, whole in rooms) <= 1, "the speaker must stay in the training part"
    assert not split(np.array([0, 0, 1]), sound[:3], 0.08, dice).any()


@torch.no_grad()
def test_normalisation_takes_the_channel_out():
    normalise = pick(SCRIPT, "normalise").normalise
    x, mask = batch()
    room = torch.randn(3, 1, 40) * mask[..., None]
    torch.testing.assert_close(normalise(x + room, mask), normalise(x, mask), rtol=1e-4, atol=1e-4)
    assert (normalise(x + room, mask)[~mask] == 0).all()


def test_augmentation_only_when_training_and_stripes_are_narrow():
    names = ["normalise", "stripes", "augment", "prepare"]
    given = dict(device="cpu", n_mels=40, CHANNEL=True, torch=torch)
    parts = pick(SCRIPT, *names, settings=dict(augment=True, normalise=True), **given)
    x, mask = batch((200,) * 64)
    torch.testing.assert_close(parts.prepare(x, mask), parts.normalise(x, mask))
    loud = parts.prepare(x, mask, training=True)
    bands = (loud == 0).all(1).sum(1)  # (batch,) bands set to zero
    frames = (loud == 0).all(2).sum(1)
    assert 0 < bands.max() <= 18 and 0 < frames.max() <= 42
    calm = parts.prepare(x, mask, training=True, stripe=False)
    assert not (calm == 0).any() and not torch.allclose(calm, parts.normalise(x, mask))


def given_data(folder, n_mels=40, speakers=5, each=6, tests=7):
    """A small data set in the course's layout; the lists say each utterance has its true length."""
    dice, home = torch.Generator().manual_seed(0), folder / "Dataset"
    home.mkdir(parents=True)
    names = [f"id{k:05d}" for k in range(speakers)]

    def write(k, level):
        frames = 22 if k == 3 else 60 + 10 * (k % 7)
        name = f"uttr-{k:032x}.pt"
        torch.save(level + torch.randn(frames, n_mels, generator=dice), home / name)
        return {"feature_path": name, "mel_len": frames}

    lists = {"mapping": {"speaker2id": {name: k for k, name in enumerate(names)}}}
    train = {name: [write(each * k + m, k) for m in range(each)] for k, name in enumerate(names)}
    lists["metadata"] = {"n_mels": n_mels, "speakers": train}
    test = [write(1000 + k, k % speakers) for k in range(tests)]
    lists["testdata"] = {"n_mels": n_mels, "utterances": test}
    for name, content in lists.items():
        (home / f"{name}.json").write_text(json.dumps(content))
    return home


def change_list(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_split_archive_of_another_edition(run, tmp_path):
    """39 columns, 5 speakers, a short utterance, a wrong length in the list, the archive in three pieces."""
    home = given_data(tmp_path / "made", n_mels=39)
    change_list(home / "metadata.json", lambda c: c["speakers"]["id00001"][0].update(mel_len=999))
    memory = io.BytesIO()
    with tarfile.open(fileobj=memory, mode="w:gz") as archive:
        archive.add(home, "Dataset")
    data, folder = memory.getvalue(), tmp_path / "given"
    folder.mkdir()
    for k, piece in enumerate(("aa", "ab", "ac")):
        third = slice(k * len(data) // 3, (k + 1) * len(data) // 3)
        (folder / f"Dataset.tar.gz.part{piece}").write_bytes(data[third])
    wanted = {"HW_DATA": "real", "HW_DATA_DIR": folder, "HW_EPOCHS": 2, "HW_POOLING": "sap"}
    done = run(SCRIPT, HW_ABLATION="false", **wanted).wait()
    assert done.code == 0, done.text
    assert "speakers: 5 (course: 600), train: 30 (course: 56666), test: 7" in done.text
    assert "n_mels: 39 (course: 40)" in done.text and "1 utterances are longer or shorter" in done.text
    lines = (tmp_path / "out/HW04/boss-real/submission.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in lines[1:]] == [f"uttr-{1000 + k:032x}.pt" for k in range(7)]
    assert not list(tmp_path.glob("**/*.part"))
    (folder / "Dataset.tar.gz.partab").unlink()
    ended = run(SCRIPT, **wanted).wait()
    assert ended.code == 1 and "Dataset.tar.gz.partab" in ended.text and "Traceback" not in ended.text


def test_bad_files_are_named_before_any_training(run, tmp_path):
    home = given_data(tmp_path / "given")
    names = [f"uttr-{k:032x}.pt" for k in range(16)]
    (home / names[0]).unlink()
    (home / names[1]).write_bytes((home / names[1]).read_bytes()[:300])
    torch.save(torch.randn(50, 39), home / names[2])
    torch.save(torch.full((50, 40), torch.nan), home / names[4])
    torch.save({"mel": [1]}, home / names[5])
    for name in names[6:13]:
        (home / name).write_bytes(b"")
    ended = run(SCRIPT, HW_DATA="real", HW_DATA_DIR=home).wait()
    assert ended.code == 1 and "Traceback" not in ended.text and "12 files cannot be used" in ended.text
    for number, fault in ((0, "is missing"), (1, "is damaged"), (2, "has shape (50, 39), not (frames, 40)")):
        assert f"{names[number]} {fault}" in ended.text
    assert f"{names[4]} has values that are no numbers" in ended.text
    assert ended.text.count(".pt ") == 10, "the first ten, not all"
    assert {path.suffix for path in (tmp_path / "out").rglob("*") if path.is_file()} <= {".lock"}
    assert not list(home.glob("packed-*/*"))


def packing(home, **more):
    names = ["read_utterance", "pack"]
    stop = pick(SCRIPT, "Stop", "aside", "remove", "MARK")
    plumbing = dict(Stop=stop.Stop, aside=stop.aside, ThreadPoolExecutor=ThreadPoolExecutor, Path=Path)
    plumbing |= dict(np=np, torch=torch, shutil=shutil, tqdm=lambda over, *a, **k: over, QUIET=True)
    return pick(SCRIPT, *names, HOME=home, PACK=home / "packed", n_mels=40, **plumbing | more)


def test_a_stopped_pack_goes_on_with_the_next_part(tmp_path):
    home = given_data(tmp_path)
    names = sorted(path.name for path in home.glob("*.pt"))
    spoiled = home / names[25]
    good = spoiled.read_bytes()
    spoiled.write_bytes(good[:100])
    parts = packing(home)
    with pytest.raises(parts.Stop, match=names[25]):
        parts.pack(names, size=10)
    assert not (home / "packed").exists()
    spoiled.write_bytes(good)
    for name in names[:20]:
        (home / name).rename(home / f"gone-{name}")  # the first two parts must not be read again
    parts.pack(names, size=10)
    assert not list(home.glob("packed-parts*"))
    sizes, frames = np.load(home / "packed/sizes.npy"), np.load(home / "packed/frames.npy", mmap_mode="r")
    assert frames.dtype == np.float16 and frames.shape == (sizes.sum(), 40)
    begin, sound = np.cumsum(sizes) - sizes, np.load(home / "packed/sound.npy")
    for k, name in enumerate(names):
        mel = torch.load(home / (name if k >= 20 else f"gone-{name}"), weights_only=True).numpy()
        assert sizes[k] == len(mel)
        np.testing.assert_allclose(frames[begin[k] : begin[k] + sizes[k]], mel, atol=2e-3)
        np.testing.assert_allclose(sound[k], np.r_[mel.mean(0), mel.std(0)], atol=2e-3)


LIST_FAULTS = {
    "no json": ("metadata", lambda path: path.write_text("<html>no</html>"), "metadata.json is damaged"),
    "no entry": ("testdata", lambda path: path.write_text("{}"), "testdata.json is damaged"),
    "unknown speaker": (
        "metadata",
        lambda path: change_list(path, lambda c: c["speakers"].update(id77777=c["speakers"].pop("id00001"))),
        "id77777",
    ),
    "twice": (
        "testdata",
        lambda path: change_list(path, lambda c: c["utterances"].append(c["utterances"][0])),
        "stands twice",
    ),
    "gap": (
        "mapping",
        lambda path: change_list(path, lambda c: c["speaker2id"].update(id00001=9)),
        "0 to 4",
    ),
}


@pytest.mark.parametrize("fault", LIST_FAULTS)
def test_damaged_lists(fault, tmp_path):
    home = given_data(tmp_path)
    name, spoil, sentence = LIST_FAULTS[fault]
    paths = {name: [home / f"{name}.json"] for name in ("metadata", "mapping", "testdata")}
    parts = pick(SCRIPT, "read_list", "read_lists", "Stop", PATHS=paths, json=json)
    number, n_mels, train, test = parts.read_lists()
    assert (len(number), n_mels, len(train), len(test)) == (5, 40, 30, 7)
    assert {who for _, _, who in train} == set(range(5)) and train[6][2] == 1
    spoil(paths[name][0])
    with pytest.raises(parts.Stop, match=sentence):
        parts.read_lists()


@pytest.mark.parametrize("fault", ["header", "missing", "integer", "unknown", "duplicate", "blank", "order"])
def test_validator_rejects(straight, fault, tmp_path):
    lines = straight[1].decode().split("\n")
    name, who = lines[5].split(",")
    number = {speaker: k for k, speaker in enumerate(sorted({line[-7:] for line in lines[1:-1]}))}
    given = dict(
        number=number,
        speakers=list(number),
        test_files=[line.split(",")[0] for line in lines[1:-1]],
        say=print,
    )
    check = pick(SCRIPT, "check_submission", "Stop", **given)
    lines = {
        "header": ["id,category", *lines[1:]],
        "missing": [*lines[:5], *lines[6:]],
        "integer": [*lines[:5], f"{name},{number[who]}", *lines[6:]],
        "unknown": [*lines[:5], f"{name},id99999", *lines[6:]],
        "duplicate": [*lines[:5], lines[6], *lines[6:]],
        "blank": [*lines[:5], f"{name},", *lines[6:]],
        "order": [lines[0], lines[2], lines[1], *lines[3:]],
    }[fault]
    path = tmp_path / "submission.csv"
    path.write_text("\n".join(lines))
    with pytest.raises(check.Stop, match="submission.csv"):
        check.check_submission(path)
    path.write_bytes(straight[1])
    check.check_submission(path)


def test_few_speakers_are_only_a_warning(straight, tmp_path, capsys):
    lines = straight[1].decode().split("\n")
    names = [line.split(",")[0] for line in lines[1:-1]]
    number = {f"id{k:05d}": k for k in range(12)}
    given = dict(number=number, speakers=list(number), test_files=names, say=print)
    check = pick(SCRIPT, "check_submission", "Stop", **given)
    path = tmp_path / "submission.csv"
    path.write_text("\n".join(["Id,Category", *(f"{name},id00003" for name in names), ""]))
    check.check_submission(path)
    assert "WARNING" in capsys.readouterr().out


def test_boss_beats_a_constant_answer_and_batches_like_one_by_one(straight):
    result, _, folder = straight
    truth = (folder / "data/HW04-sample/tiny/answers/answers.csv").read_text().split()[1:]
    most = pd.Series([line.split(",")[1] for line in truth]).value_counts(normalize=True).max()
    assert result["score"] > 2 * most
    assert result["agreement"] >= 0.999
    assert set(result["validation"]) == {"random", "session"}
    assert set(result["ablation"]) == {"both", "attention only", "convolution only"}


def test_loading_is_five_times_as_fast(straight):
    text = (straight[2] / "run.log").read_text()
    speed = {
        line[13:]: float(line[:12].replace(",", "")) for line in text.splitlines() if "ments/s by " in line
    }
    assert speed["segments/s by one index"] > 5 * speed["segments/s by torch.load"]
    for word in ("random", "session-like", "utterances/s in buckets", "ConformerBlock"):
        assert word in text


def test_answers_and_recordings_do_not_leak(straight):
    """No answers in the data folder; lengths, names and order say nothing about the speaker."""
    home = straight[2] / "data/HW04-sample/tiny/data"
    assert not list(home.rglob("*answer*"))
    [home] = home.iterdir()
    lists = {name: json.loads((home / f"{name}.json").read_text()) for name in ("metadata", "testdata")}
    items = [(item, who) for who, mine in lists["metadata"]["speakers"].items() for item in mine]
    assert len(items) == 12 * 4 * 5 and len(lists["testdata"]["utterances"]) == 12 * 4 * 3
    frame = pd.DataFrame([(item["mel_len"], item["feature_path"], who) for item, who in items])
    assert frame.groupby(2)[0].mean().std() < frame[0].std()
    for item, _ in items[::40]:
        assert torch.load(home / item["feature_path"], weights_only=True).shape == (item["mel_len"], 40)


def test_figures_and_history(straight):
    folder = straight[2] / "out" / "HW04" / "boss-sample"
    names = {"data", "sessions", "margin", "curves", "conformer", "cost", "ablation", "inside", "validation"}
    assert {path.stem for path in (folder / "figures").iterdir()} == names | {"errors"}
    rows = pd.read_csv(folder / "history.csv")
    assert (rows["stage"] == "train").sum() >= 3 and rows["stage"].nunique() == 4


def test_kept_weights_have_the_recorded_score_and_random_flatters(run, tmp_path):
    """Strong: the validation after reloading the best weights is the best one in the history."""
    done = run(SCRIPT, HW_LEVEL="strong").wait()
    assert done.code == 0, done.text
    result, _ = outcome(tmp_path)
    rows = pd.read_csv(tmp_path / "out/HW04/strong-sample/history.csv")
    assert result["valid_score"] == rows["session"].max()
    assert result["validation"]["random"] > result["score"], "without normalisation the random split flatters"


def test_a_diverged_training_says_so(run, changed, tmp_path):
    wild = changed(SCRIPT, "settings |= dict(lr=2e-3", "settings |= dict(lr=1e30")
    ended = run(wild, HW_LEVEL="strong").wait()
    assert ended.code == 1 and "diverged" in ended.text and "Traceback" not in ended.text
    assert "BATCH_SIZE" in ended.text


def test_unknown_pool(run, tmp_path):
    ended = run(SCRIPT, HW_POOLING="max").wait()
    assert ended.code == 1 and "POOLING is 'max'" in ended.text and "Traceback" not in ended.text


@pytest.mark.parametrize("what", ["loss", "report"])
def test_what_makes_a_checkpoint_useless(run, straight, changed, tmp_path, what):
    old, new = {
        "loss": ("SCALE = 30.0", "SCALE = 25.0"),
        "report": ('"attention only": (True, False)', '"attention only": (True, True)'),
    }[what]
    anew = trained_anew(run, straight, changed(SCRIPT, old, new), tmp_path)
    assert len(anew) == 4 if what == "loss" else anew == {"ablation attention only"}, anew
