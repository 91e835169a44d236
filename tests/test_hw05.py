"""HW05's own invariants."""

import ast
import contextlib
import itertools
import json
import math
import re
import shutil
import unicodedata
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import sacrebleu
import torch
from conftest import TESTS, one_sentence, outcome, trained_anew
from notebooks import pick, settings_of
from runner import Run
from torch import nn
from torch.nn import functional as F

SCRIPT = TESTS.parent / "HW05" / "HW05.py"
PAD, UNKNOWN, START_OF, END, MADE = range(5)
PIECES = 9  # of the tiny nets of these tests
PROBE = """
kept = {"norms": norms, "size": source[1], "learned": packed["learn_en"][1], "made": made[0], "of": made[1]}
kept["chinese"] = chinese[1]
kept["mean"] = torch.cat([weight.flatten() for weight in net.state_dict().values()])
np.savez("probe.npz", **{name: one.detach().numpy() for name, one in kept.items()})
lists = dict(mono=mono_zh, learn_en=learn_en, learn_zh=learn_zh, valid_en=valid_en, valid_zh=valid_zh)
lists |= dict(valid_raw=valid_raw, given=given)
Path("probe.json").write_text(json.dumps(lists))
"""


@pytest.fixture(scope="session")
def probe(straight, tmp_path_factory):
    """The inner numbers of the straight run: it goes on after its last epoch."""
    folder = tmp_path_factory.mktemp("probe")
    shutil.copytree(straight[2], folder, dirs_exist_ok=True)
    copy = folder / "HW05.py"
    copy.write_text(SCRIPT.read_text(encoding="utf-8") + PROBE, encoding="utf-8")
    done = Run(copy, folder).wait()
    assert done.code == 0, done.text
    numbers = {name: torch.tensor(one) for name, one in np.load(folder / "probe.npz").items()}
    return SimpleNamespace(**numbers, **json.loads((folder / "probe.json").read_text()))


def functions(*names, **given):
    space = dict(torch=torch, nn=nn, F=F, np=np, math=math, re=re, unicodedata=unicodedata, Counter=Counter)
    space |= dict(VOCABULARY=PIECES, LONGEST=256, PUNCT="as learned", device="cpu")
    space |= dict(PAD=PAD, UNKNOWN=UNKNOWN, START_OF=START_OF, END=END, MADE=MADE)
    return pick(SCRIPT, *names, **space | given)


NETS = ["Attention", "positions", "Layer", "Transformer", "look_up", "Recurrent", "next_scores", "search"]


def nets(seed=0):
    """One of each kind, small, with weights that make it sure of something."""
    torch.manual_seed(seed)
    space = functions(*NETS)
    both = [space.Transformer(8, 16, 2, 2, 0.0), space.Recurrent(8, 0.0)]
    for net in both:
        for weight in net.parameters():
            weight.data *= 1.5
    return space, [net.eval() for net in both]


SOURCE = torch.tensor([[2, 5, 6, 3, 0, 0], [2, 7, 8, 5, 6, 3], [2, 3, 0, 0, 0, 0]])


# text


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ("Twenty-one  Cats!", "twenty one cats!"),
        ("- It’s “me”. (Applause)", "it's “me”."),
        ("\ufeffＡＢＣ\u200bd", "abcd"),
        ("(Laughter)", ""),
    ],
)
def test_english_is_cleaned(given, wanted):
    assert functions("tidy", "clean_en").clean_en(given) == wanted


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ("我 愛　New York，你呢？", "我愛New York,你呢?"),
        ("（掌聲）－ 他叫Tom Smith。", "他叫Tom Smith。"),
        ("１２ 個", "12個"),
        ("\u200b", ""),
    ],
)
def test_chinese_loses_its_spaces_but_not_those_of_names(given, wanted):
    assert functions("tidy", "clean_zh").clean_zh(given) == wanted


def test_marks_are_written_as_most_of_the_given_translations_have_them():
    space = functions("tidy", "clean_zh", "WIDE", "BETWEEN", "learn_marks", "write_zh")
    learned = space.learn_marks(["你好，我來。", "好,來?", "來?", "他有1,000元，10:30來", "來，"])
    assert learned[","] == "，" and "?" not in learned
    space = functions("tidy", "clean_zh", "BETWEEN", "write_zh", marks=learned)
    assert space.write_zh("他有1,000元,10:30 來,為什麼?") == "他有1,000元，10:30來，為什麼?"
    assert space.write_zh("") == space.write_zh(" ") == "。"
    for choice, wanted in (("full", "好，好？"), ("half", "好,好?")):
        space = functions("WIDE", "BETWEEN", "learn_marks", PUNCT=choice)
        space = functions("tidy", "clean_zh", "BETWEEN", "write_zh", marks=space.learn_marks(["好,"]))
        assert space.write_zh("好，好?") == wanted


def test_pairs_that_cannot_be_translations_are_left_out(probe):
    fits = functions("fits").fits
    assert fits("a b", "好") and not fits("", "好") and not fits("a", "") and not fits("a", "好" * 10)
    assert not fits("a " * 10, "好") and not fits("a " * 201, "好" * 201)
    assert "" not in probe.learn_zh and not any("(" in line for line in probe.learn_en)


def test_nothing_of_validation_is_learned(probe):
    """Neither side of a pair, and no line of the Chinese text that is the answer."""
    assert not set(probe.learn_en) & set(probe.valid_en)
    assert not set(probe.learn_zh) & set(probe.valid_zh)
    assert not set(probe.mono) & {*probe.valid_zh, *probe.learn_zh}
    assert len(set(probe.mono)) == len(probe.mono) >= 300
    assert set(probe.valid_raw) <= set(probe.given["raw.zh"])


def test_a_pair_that_shares_one_side_with_validation_is_not_learned():
    valid, pairs = [("a", "甲", "甲!")], [("a", "乙", "乙"), ("b", "甲", "甲"), ("b", "乙", "乙")]
    space = functions("valid_en", "aside_en", "learn", valid=valid, pairs=[*valid, *pairs])
    assert space.learn == pairs[2:]


def test_bleu_is_taken_against_what_was_given():
    given = dict(packed={"valid_en": "English"}, valid_raw=["甲，乙"], valid_zh=["甲,乙"])
    assert functions("check", **given).check == ("English", ["甲，乙"], "zh")


def test_packed_lines_come_back():
    space = functions("pack", "pad")
    lines = space.pack([[2, 5, 3], [2, 3], [2, 6, 7, 8, 3]])
    assert space.pad(lines, torch.tensor([2, 1])).tolist() == [[2, 6, 7, 8, 3], [2, 3, 0, 0, 0]]
    assert space.pad(lines, torch.tensor([0])).tolist() == [[2, 5, 3]]


# nets


def test_attention_is_the_formula():
    """By hand: heads apart, scaled, masked; and its weights are those of the softmax."""
    torch.manual_seed(0)
    attention = functions("Attention").Attention(8, 2)
    x, other = torch.randn(1, 3, 8), torch.randn(1, 4, 8)
    mask = torch.tensor([True, True, True, False])
    query, (key, value) = attention.ask(x), attention.tell(other).chunk(2, -1)
    heads = []
    for part in (slice(0, 4), slice(4, 8)):
        alike = query[..., part] @ key[..., part].transpose(1, 2) / 2
        heads.append(alike.masked_fill(~mask, -math.inf).softmax(-1) @ value[..., part])
    wanted = attention.out(torch.cat(heads, -1))
    told = attention.keys_values(other)
    assert torch.allclose(attention(x, told, mask[None, None, None]), wanted, atol=1e-6)
    weights = attention.weights(x, told[:, :, :, :3])
    assert torch.allclose(
        attention.out((weights @ told[:, 1, :, :3]).transpose(1, 2).flatten(2)), wanted, atol=1e-6
    )


def test_positions_are_those_of_the_paper():
    table = functions("positions").positions(20, 6)
    for place, wave in itertools.product((0, 3, 19), range(3)):
        angle = place / 10000 ** (2 * wave / 6)
        assert table[place, wave] == pytest.approx(math.sin(angle), abs=1e-5)
        assert table[place, wave + 3] == pytest.approx(math.cos(angle), abs=1e-5)


def test_padding_changes_nothing():
    """A line alone, in a batch of longer ones, and with more padding: the same logits."""
    for net in nets()[1]:
        target = torch.tensor([[2, 5, 7, 6]])
        alone = net(SOURCE[:1, :4], target)
        with_others = net(SOURCE, target.expand(3, -1))
        assert torch.allclose(with_others[0], alone[0], atol=1e-5)
        assert (with_others[0] - with_others[1]).abs().max() > 1e-2, "the source matters"


def test_no_target_token_is_seen_before_its_time():
    for net in nets()[1]:
        one, other = torch.tensor([[2, 5, 7, 6]]), torch.tensor([[2, 5, 8, 8]])
        first, second = net(SOURCE[:1], one), net(SOURCE[:1], other)
        assert torch.allclose(first[:, :2], second[:, :2], atol=1e-6)
        assert (first[:, 2] - second[:, 2]).abs().max() > 1e-3


def test_step_by_step_with_the_cache_is_all_at_once():
    for net in nets()[1]:
        target = torch.tensor([[2, 5, 7, 6, 8]] * 3)
        at_once, (fixed, moving) = net(SOURCE, target), net.start(SOURCE)
        for k in range(5):
            logits, moving = net.step(target[:, k : k + 1], fixed, moving)
            assert torch.allclose(logits[:, 0], at_once[:, k], atol=1e-4), k


def test_order_and_places_matter():
    for net in nets()[1]:
        turned = torch.tensor([[2, 6, 5, 3]])
        target = torch.tensor([[2, 5]])
        assert (net(SOURCE[:1, :4], target) - net(turned, target)).abs().max() > 1e-3


def likelihood(net, source, tokens):
    """log p of a whole translation, its END included, by the net all at once."""
    target = torch.tensor([[START_OF, *tokens, END]])
    logits = net(source[None], target[:, :-1])[0].log_softmax(-1)
    return logits.gather(1, target[0, 1:, None]).sum().item()


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_a_wide_beam_finds_the_best_of_all_translations(alpha):
    """Every translation of at most two tokens by brute force; the search may write as many."""
    for seed in range(3):
        space, both = nets(seed)
        search = pick_search_with_limit(3)
        for net in both:
            every = [list(one) for n in range(3) for one in itertools.product(range(5, PIECES), repeat=n)]
            for source in (SOURCE[0], SOURCE[1]):
                scores = [likelihood(net, source, one) / (len(one) + 1) ** alpha for one in every]
                wanted = every[int(np.argmax(scores))]
                assert search(net, source[None], 50, alpha) == [wanted]


def pick_search_with_limit(limit):
    """`search` with at most `limit` tokens a line, its end included."""
    text = SCRIPT.read_text(encoding="utf-8")
    tree = [node for node in ast.parse(text).body if getattr(node, "name", "") in ("next_scores", "search")]
    code = "\n\n".join(ast.unparse(node) for node in tree)
    old = "((source != PAD).sum(1) * 1.2 + 10).long()[:, None]"
    assert code.count(old) == 1
    code = code.replace(old, f"torch.full((len(source), 1), {limit})")
    space = dict(torch=torch, math=math, PAD=PAD, UNKNOWN=UNKNOWN, START_OF=START_OF, END=END, MADE=MADE)
    exec(code, space)
    return space["search"]


def greedy(net, source):
    """The plainest decoding: no cache, one line, the whole beginning anew for each token."""
    tokens, limit = [START_OF], int((source != PAD).sum() * 1.2 + 10)
    for t in range(1, limit + 1):
        logits = net(source[None], torch.tensor([tokens]))[0, -1].clone()
        logits[[PAD, UNKNOWN, START_OF, MADE]] = -math.inf
        token = END if t == limit else int(logits.argmax())
        if token == END:
            break
        tokens.append(token)
    return tokens[1:]


def test_a_beam_of_one_is_greedy_and_no_line_depends_on_the_others():
    for seed in range(3):
        space, both = nets(seed)
        for net in both:
            wanted = [greedy(net, source) for source in SOURCE]
            assert space.search(net, SOURCE, 1) == wanted
            together, turned = space.search(net, SOURCE, 3), space.search(net, SOURCE.flip(0), 3)
            assert together == turned[::-1]
            assert together == [space.search(net, source[source != PAD][None], 3)[0] for source in SOURCE]
            assert max(map(len, wanted)) <= 1.2 * 6 + 10


def test_translations_come_in_the_order_of_the_lines():
    space, both = nets()
    one_process = SimpleNamespace(process_index=0, num_processes=1, autocast=contextlib.nullcontext)
    given = dict(accelerator=one_process, gather_object=lambda one: one, search=space.search)
    space = functions("pack", "pad", "translate", **given)
    lines = space.pack([row[row != PAD].tolist() for row in SOURCE])
    for net in both:
        wanted = [greedy(net, source) for source in SOURCE]
        assert space.translate(net.train(), lines, 1) == wanted
        assert space.translate(net, lines, 1, torch.tensor([1, 2])) == wanted[1:]


def test_signs_are_never_written():
    space, both = nets()
    logits = torch.zeros(1, 2, PIECES)
    over = torch.tensor([[False, True]])
    scores = space.next_scores(logits, torch.zeros(1, 2), over, torch.tensor([[[False]]]))[0]
    assert torch.isfinite(scores[0]).nonzero().flatten().tolist() == [END, *range(5, PIECES)]
    assert torch.isfinite(scores[1]).nonzero().flatten().tolist() == [PAD] and scores[1, PAD] == 0
    at_limit = space.next_scores(logits, torch.zeros(1, 2), over, torch.tensor([[[True]]]))[0]
    assert torch.isfinite(at_limit[0]).nonzero().flatten().tolist() == [END]


# training


def test_the_loss_is_smoothed_cross_entropy_of_the_real_tokens():
    torch.manual_seed(0)
    loss_of = functions("loss_of", settings={"smooth": 0.1}).loss_of
    logits, target = torch.randn(2, 3, PIECES), torch.tensor([[5, 3, 0], [6, 7, 3]])
    logp, total = logits.log_softmax(-1), 0.0
    for line, place in ((0, 0), (0, 1), (1, 0), (1, 1), (1, 2)):
        row = logp[line, place]
        total -= float(0.9 * row[target[line, place]] + 0.1 * row.mean())
    assert float(loss_of(logits, target)) == pytest.approx(total / 5, rel=1e-5)


def test_the_rate_rises_then_falls_with_the_inverse_square_root():
    rate_at = functions("rate_at").rate_at
    assert rate_at(50, 100) == pytest.approx(0.5) and rate_at(100, 100) == 1
    assert rate_at(400, 100) == pytest.approx(0.5) and rate_at(7, 0) == 1


def test_batches_have_every_pair_once_and_keep_the_budget():
    space = dict(settings={"tokens": 200}, SEED=1, accelerator=SimpleNamespace(num_processes=1))
    make_batches = functions("make_batches", **space).make_batches
    size = torch.randint(3, 30, (500,), generator=torch.Generator().manual_seed(0))
    lines = None, size
    first, again, next_one = (make_batches(lines, lines, epoch) for epoch in (1, 1, 2))
    assert sorted(torch.cat(first).tolist()) == list(range(500))
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
    assert torch.cat(first).tolist() != torch.cat(next_one).tolist()
    assert max(len(rows) * int(size[rows].max()) for rows in first) <= 260
    real = sum(int(size[rows].sum()) for rows in first)
    assert real / sum(len(rows) * int(size[rows].max()) for rows in first) > 0.85
    firsts = [int(size[rows].max()) for rows in first]
    assert firsts != sorted(firsts) and firsts != sorted(firsts, reverse=True)


def test_the_translator_is_the_mean_of_its_last_epochs(run, straight, probe, tmp_path):
    add_weights = functions("add_weights").add_weights
    net, mean = nn.Linear(1, 1), {}
    for value in (1.0, 3.0):
        net.weight.data.fill_(value)
        add_weights(mean, net, 2)
    assert float(mean["weight"]) == 2.0
    (path,) = straight[2].glob("out/*/*/checkpoint/translator.*.pt")
    states = torch.load(path, weights_only=True)[3]
    assert torch.equal(torch.cat([weight.flatten() for weight in states["mean"].values()]), probe.mean)
    (path,) = straight[2].glob("out/*/*/checkpoint/way-back.*.pt")  # it has enough epochs for a mean
    states = torch.load(path, weights_only=True)[3]
    last = torch.cat([weight.flatten() for weight in states["model"].values()])
    mean = torch.cat([weight.flatten() for weight in states["mean"].values()])
    assert not torch.equal(mean, last) and (mean - last).norm() < 0.3 * last.norm()


def test_the_boss_learns_true_pairs_several_times_and_made_ones_once(probe):
    settings = settings_of(SCRIPT, "boss")
    true = probe.learned.repeat(settings["copies"])
    assert torch.equal(probe.size, torch.cat([true, probe.of]))
    assert len(probe.of) == len(probe.mono) == len(probe.chinese)
    starts = probe.of.cumsum(0) - probe.of
    assert (probe.made[starts] == MADE).all() and (probe.made == MADE).sum() == len(starts)
    assert (probe.made[starts + probe.of - 1] == END).all()


def test_gradient_norms_are_kept_of_every_step(probe):
    assert len(probe.norms) >= 30 and (probe.norms > 0).all()


# the file


def test_one_line_for_each_line_with_the_score_of_sacrebleu(straight, probe):
    lines = straight[1].decode().split("\n")
    assert lines[-1] == "" and len(lines) - 1 == len(probe.given["test.en"]) == 60 and all(lines[:-1])
    path = straight[2] / "data/HW05-sample/tiny/answers/test.zh"
    references = path.read_text().split("\n")[:-1]
    score = sacrebleu.corpus_bleu(lines[:-1], [references], tokenize="zh").score
    assert straight[0]["score"] == pytest.approx(score)
    guess = Counter(references).most_common(1)[0][0]
    constant = sacrebleu.corpus_bleu([guess] * 60, [references], tokenize="zh").score
    assert score > constant


@pytest.fixture
def real(straight, tmp_path):
    """The tiny sample where a person would put the real data -> the folder."""
    shutil.copytree(straight[2] / "data/HW05-sample/tiny/data", tmp_path / "given")
    return tmp_path / "given"


def test_odd_lines_of_the_test_get_their_line_and_windows_files_are_read(run, real, tmp_path):
    """Empty, very long, nothing but signs; CR LF, a byte order mark, a strange line separator."""
    path = real / "test/test.en"
    lines = path.read_text().split("\n")[:-1]
    lines[2], lines[3], lines[4], lines[5] = "", "tom saw " * 400, "( ) ♪", "Tom saw\u2028a cup.\x85"
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode() + b"\r\n")
    done = run(SCRIPT, HW_DATA="real", HW_DATA_DIR=real, HW_LEVEL="simple").wait()
    assert done.code == 0, done.text
    for words in ("line 1 begins with a byte order mark", "line 1 ends with CR LF", "line 3 is empty"):
        assert f"test.en, {words}" in done.text, done.text
    assert "1 lines were cut" in done.text
    answers = (tmp_path / "out/HW05/simple-real/prediction.txt").read_text().split("\n")
    assert len(answers) == len(lines) + 1 and answers[2] == answers[4] == "。" and all(answers[:-1])


@pytest.mark.parametrize("fault", ["bytes", "counts", "empty", "few"])
def test_files_that_cannot_be_used_are_named(run, real, tmp_path, fault):
    path = real / "raw.zh"
    lines = path.read_bytes().split(b"\n")
    if fault == "bytes":
        lines[6] = b"\xa7A\xa6n"  # Big5
        words = ["raw.zh, line 7 is not UTF-8 .byte 0xa7.: save the file as UTF-8"]
    elif fault == "counts":
        del lines[9]
        words = ["raw.en has 220 lines and .*raw.zh has 219 lines", "fetch both of them again"]
    elif fault == "empty":
        lines, words = [], ["raw.zh is empty: delete it"]
    else:
        lines, words = [b""] * 150 + lines[150:], ["usable pairs: too few"]
    path.write_bytes(b"\n".join(lines))
    one_sentence(run(SCRIPT, HW_DATA="real", HW_DATA_DIR=real).wait(), *words)
    assert not list((tmp_path / "out").rglob("*.pt"))


BAD = {
    "a line is missing": lambda lines: lines[:-1],
    "a line is empty": lambda lines: ["", *lines[1:]],
    "a sign of the pieces": lambda lines: ["\u2581好", *lines[1:]],
    "an end": lambda lines: ["好</s>", *lines[1:]],
    "too large": lambda lines: ["好" * 240_000, *lines[1:]],
}


@pytest.mark.parametrize("what", BAD)
def test_the_validator_refuses(tmp_path, what):
    given = {"test.en": ["a"] * 4}
    space = functions("NOT_TEXT", "check_submission", Stop=RuntimeError, given=given, say=lambda *_: None)
    good = ["好。", "他來了。", "不。", "是。"]
    path = tmp_path / "prediction.txt"
    path.write_text("\n".join([*good, ""]))
    space.check_submission(path)
    path.write_text("\n".join([*BAD[what](good), ""]))
    with pytest.raises(RuntimeError):
        space.check_submission(path)


def test_a_wild_rate_ends_in_a_sentence(run, changed):
    wild = changed(
        SCRIPT,
        '"rate":    (1e-3, 3e-3, 3e-3, 3e-3),  # tokens',
        '"rate":    (1e35, 3e-3, 3e-3, 3e-3),  # tokens',
    )
    one_sentence(run(wild, HW_LEVEL="simple").wait(), "diverged", "lower `rate`")


@pytest.mark.parametrize("what", ["smoothing", "report", "sign"])
def test_what_makes_a_checkpoint_useless(run, straight, changed, tmp_path, what):
    old, new, wanted = {
        "smoothing": ("label_smoothing=settings", "label_smoothing=0 * settings", "all"),
        "report": ("semilogy(norms, linewidth=0.6)", "semilogy(norms, linewidth=0.8)", set()),
        "sign": ("[[MADE, *tokens", "[[START_OF, *tokens", {"translations", "translator"}),
    }[what]
    if wanted == "all":
        wanted = {"way-back", "translations", "translator"}
    assert trained_anew(run, straight, changed(SCRIPT, old, new), tmp_path) == wanted


def test_answers_of_the_test_part_are_never_learned(run, straight, tmp_path):
    shutil.copytree(straight[2] / "data", tmp_path / "data")
    path = tmp_path / "data/HW05-sample/tiny/answers/test.zh"
    lines = path.read_text().split("\n")[:-1]
    path.write_text("\n".join([*lines[1:], lines[0], ""]))
    assert run(SCRIPT).wait().code == 0
    result, submission = outcome(tmp_path)
    assert submission == straight[1] and result["score"] != straight[0]["score"]


def test_full_builds_learns_a_step_and_fits_a_gpu_of_15_gb():
    """By count: weights, gradients, Adam's two averages, the mean; and the activations of a batch."""
    for level in ("medium", "boss"):
        settings = settings_of(SCRIPT, level, profile="full")
        space = functions(*NETS, "make_net", "loss_of", VOCABULARY=10_000, settings=settings)
        net = space.make_net()
        count = sum(weight.numel() for weight in net.parameters())
        layers, width, tokens = settings["layers"], settings["width"], settings["tokens"]
        activations = tokens * (2 * layers * 34 * width + 3 * 10_000)
        assert 4 * (5 * count + activations) < 12e9
        target = torch.tensor([[2, 9, 8, 3]] * 2)
        loss = space.loss_of(net(torch.tensor([[2, 5, 6, 3], [2, 5, 3, 0]]), target[:, :-1]), target[:, 1:])
        loss.backward()
        assert all(torch.isfinite(weight.grad).all() for weight in net.parameters())


def test_translations_of_the_levels_that_ran_stand_side_by_side(straight):
    printed = (straight[2] / "run.log").read_text(encoding="utf-8")
    columns = re.search(r"<th>English</th>\s*<th>given</th>(.*?)</tr>(.*?)</table>", printed, re.DOTALL)
    assert re.findall(r"<th>(\w+)</th>", columns[1]) == ["boss"], "no other level ran in this folder"
    written = re.findall(r"<td>([^<]*)</td>\s*</tr>", columns[2])
    assert written == straight[1].decode().split("\n")[:10]


MUTANTS = [
    ('OUT_DIR.glob(f"{level}-', 'OUT_DIR.glob(f"{LEVEL}-'),
    ("tidy(text).lower()", "tidy(text)"),
    ('re.sub(r"[-–—]", " ", text)', 're.sub(r"[-–—]", "", text)'),
    (r"(?<![!-~])\s+|\s+(?![!-~])", r"\s+"),
    ("text.count(wide) >= half[mark]", "text.count(wide) < half[mark]"),
    ("pair[0] not in aside_en and pair[1] not in aside_zh", "pair not in valid"),
    ("and line not in known]", "]"),
    ('valid_raw, "zh"', 'valid_zh, "zh"'),
    ("y.shape[1] > 1", "False"),
    ("told = torch.cat([past, self.own.keys_values(seen)], 3)", "told = self.own.keys_values(seen)"),
    ("self.vectors(target, moving[0].shape[3])", "self.vectors(target)"),
    ("x = layer.encode(x, mask)", "x = layer.encode(x, None)"),
    ("size.cpu(), batch_first=True", "torch.full_like(size, source.shape[1]).cpu(), batch_first=True"),
    ("states, states, mask[:, None])", "states, states)"),
    ("score[:, 1:] = -math.inf", "score[:, 1:] = 0"),
    ("never | (at_limit", "(at_limit"),
    ("(score / limit**alpha)", "(score / length**alpha)"),
    ("rows = (alive[:, None] * beam + parent[alive])", "rows = (alive[:, None] * beam + 0 * parent[alive])"),
    ("sorted(gather_object(found))", "gather_object(found)"),
    ("[[MADE, *tokens", "[[START_OF, *tokens"),
    ("logits[real], target[real]", "logits.flatten(0, 1), target.flatten()"),
    ("model(x, y[:, :-1]), y[:, 1:]", "model(x, y[:, :-1]), y[:, :-1]"),
    ("if epoch > epochs - average:", "if epoch == epochs:"),
    ('join([source] * settings["copies"] + [made])', "join([source] + [made])"),
    ("(warm / step) ** 0.5", "warm / step"),
    ("torch.randperm(len(batches), generator=dice).tolist()", "range(len(batches))"),
]
