"""HW07's own invariants."""

import contextlib
import json
import re
import shutil
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import TESTS, one_sentence, outcome, trained_anew
from notebooks import facts, pick, settings_of
from runner import Run
from transformers import BertConfig, BertForQuestionAnswering

SCRIPT = TESTS.parent / "HW07" / "HW07.py"
MIXED = "王明在1982年用iPhone 14寫了《龘海》， 得到12,345元和2本書；Café的2號店在12號旁。"
TEXTS = [MIXED, "王" * 7 + "明" * 70 + "年" * 60, "李華來自北山縣，李華專攻天文學。", "北山縣"]
READ = ["own_tokenizer", "encode", "answer_tokens", "make_corpus"]
SMALL = dict(hidden_size=16, num_attention_heads=2, intermediate_size=32, max_position_embeddings=512)
PLACES = ["between", "centred", "anywhere", "pack", "question_of"]


@pytest.fixture(scope="module")
def tokenizer():
    return pick(SCRIPT, "own_tokenizer").own_tokenizer(
        ["王明李華年用寫得到元和本書的號店在旁《》，。北山縣" * 5]
    )


@pytest.fixture(scope="module")
def functions(tokenizer):
    """functions(names, **given): those of the script, with this tokenizer and its special tokens."""
    special = dict(zip(("PAD", "UNK", "CLS", "SEP", "MASK"), range(5), strict=True))

    def get(*names, **given):
        settings = {"width": 40, "question": 20, "overlap": 0.5, "batch_size": 8} | given.pop("settings", {})
        world = dict(
            tokenizer=tokenizer, types=types, torch=torch, np=np, settings=settings, Stop=RuntimeError
        )
        return pick(SCRIPT, *names, **{**world, "LIMIT": 30, **special, **given})

    return get


def row_of(paragraph, text, start, question="王明是誰？", number=0):
    end = start + len(text) - 1
    row = {"id": number, "paragraph_id": paragraph, "question_text": question}
    return row | {"answer_text": text, "answer_start": start, "answer_end": end}


@pytest.fixture(scope="module")
def corpus(functions):
    """Paragraphs of many lengths with answers at both ends and everywhere between."""
    dice, paragraphs, rows = np.random.default_rng(0), [], []
    for k in range(60):
        text = "".join(dice.choice(list("王明李華年用寫得到元和本書號店在旁"), int(dice.integers(5, 150))))
        size = int(dice.integers(1, min(12, len(text)) + 1))
        start = [0, len(text) - size, int(dice.integers(0, len(text) - size + 1))][k % 3]
        rows.append(row_of(k, text[start : start + size], start, "王明" * (k % 14 + 1), k))
        paragraphs.append(text)
    space = functions(*READ)
    one = space.make_corpus(
        (paragraphs[:30], rows[:30]), (paragraphs[30:], [shifted(row) for row in rows[30:]])
    )
    spans = [
        space.answer_tokens(row, one.offsets[one.p_first[k] :][: one.p_size[k]])
        for row, k in zip(one.rows, one.owner.tolist(), strict=True)
    ]
    one.first, one.last = torch.tensor(spans).T
    return one


def shifted(row):
    """A row of the second part: its paragraphs are counted from 0 again."""
    return row | {"paragraph_id": row["paragraph_id"] - 30}


ALL = torch.arange(60)


def sample_of(straight):
    return straight[2] / "data" / "HW07-sample" / "tiny"


def hidden(straight):
    return json.loads((sample_of(straight) / "answers" / "answers.json").read_text(encoding="utf-8"))


def lines_of(submission):
    return [line.split(",") for line in submission.decode().split("\n")[1:-1]]


@pytest.fixture
def real(straight, tmp_path):
    """The tiny sample where a person would put the real data; change(name, function) edits a file."""
    folder = tmp_path / "given"
    shutil.copytree(sample_of(straight) / "data", folder)
    (folder / ".made-by-this-notebook").unlink(missing_ok=True)

    def change(name, edit):
        path = folder / f"hw7_{name}.json"
        data = json.loads(path.read_text(encoding="utf-8"))
        edit(data)
        path.write_text(json.dumps(data, ensure_ascii=False), encoding="utf-8")

    return types.SimpleNamespace(
        folder=folder, change=change, wanted=dict(HW_DATA="real", HW_DATA_DIR=folder)
    )


# the judge and the file


def test_beats_a_constant_answer(straight):
    answers = hidden(straight)
    assert straight[0]["score"] > 0.1 > 2 * max(answers.count(one) for one in answers) / len(answers)


def test_the_judge_counts_equal_answers_commas_aside(straight):
    rows, answers = lines_of(straight[1]), hidden(straight)
    right = [row[1] == text.replace(",", "") for row, text in zip(rows, answers, strict=True)]
    assert straight[0]["score"] == pytest.approx(np.mean(right)) and any("," in text for text in answers)


def test_every_answer_is_a_short_piece_of_its_paragraph(straight):
    data = json.loads((sample_of(straight) / "data" / "hw7_test.json").read_text(encoding="utf-8"))
    rows = lines_of(straight[1])
    assert straight[1].startswith(b"ID,Answer\n") and all(len(row) == 2 for row in rows)
    assert [int(row[0]) for row in rows] == [row["id"] for row in data["questions"]]
    for (_, text), row in zip(rows, data["questions"], strict=True):
        assert text and text in data["paragraphs"][row["paragraph_id"]].replace(",", "") and len(text) <= 60


def test_the_sample_has_the_layout_and_the_quirks_of_the_real_files(straight):
    for name in ("train", "dev", "test"):
        data = json.loads((sample_of(straight) / "data" / f"hw7_{name}.json").read_text(encoding="utf-8"))
        for number, row in enumerate(data["questions"]):
            assert row["id"] == number and list(row)[:3] == ["id", "paragraph_id", "question_text"]
            if name != "test":
                text = data["paragraphs"][row["paragraph_id"]]
                assert text[row["answer_start"] : row["answer_end"] + 1] == row["answer_text"] != ""
    values = [row["answer_text"] for row in data["questions"]]
    assert set(map(repr, values)) == {"None", "'null'"}, "null, and the text null"


# characters and tokens


def test_offsets_are_right_for_chinese_digits_and_latin(functions):
    space = functions(*READ, "cut")
    for text in ("1982", "1982年", "iPhone", "14", "《龘海》", "12,345元", "Café", "王明", "旁"):
        start = MIXED.index(text)
        one = space.make_corpus(([MIXED], [row_of(0, text, start)]))
        first, last = space.answer_tokens(one.rows[0], one.offsets[: one.p_size[0]])
        assert space.cut(one, 0, first, last) == text
    number = MIXED.index("2本")
    one = space.make_corpus(([MIXED], [row_of(0, "2", number)]))
    assert space.cut(one, 0, *space.answer_tokens(one.rows[0], one.offsets[: one.p_size[0]])) == "2"
    inside = space.answer_tokens(row_of(0, "2", MIXED.index("12號") + 1), one.offsets[: one.p_size[0]])
    assert one.offsets[inside[0]].tolist()[1] == MIXED.index("12號") + 2 and inside[0] == inside[1]


def test_an_answer_is_where_it_is_labelled_and_not_where_its_text_comes_first(functions):
    space, text = functions(*READ, "cut"), "王明和李華，李華和王明。"
    one = space.make_corpus(([text], [row_of(0, "王明", 9)]))
    assert space.answer_tokens(one.rows[0], one.offsets[: one.p_size[0]]) == (9, 10)


def test_a_blank_at_the_end_of_an_answer_is_no_token(functions):
    space = functions(*READ, "cut")
    row = row_of(0, "， 得", MIXED.index("， 得"))
    one = space.make_corpus(([MIXED], [row]))
    span = space.answer_tokens(row_of(0, " 得", MIXED.index(" 得")), one.offsets[: one.p_size[0]])
    assert space.cut(one, 0, *span) == "得" and span[0] == span[1]
    assert space.cut(one, 0, *space.answer_tokens(row, one.offsets[: one.p_size[0]])) == "， 得"


def test_the_vocabulary_knows_what_is_frequent_every_digit_and_every_latin_letter(functions):
    words = functions("own_tokenizer").own_tokenizer(["王" * 5 + "明" * 4]).get_vocab()
    assert "王" in words and "明" not in words and {"7", "##7", "q", "##q"} <= words.keys()
    assert [words[f"[{name}]"] for name in ("PAD", "UNK", "CLS", "SEP", "MASK")] == [0, 1, 2, 3, 4]


def test_two_parts_become_one_corpus(corpus):
    for row in (0, 29, 30, 59):
        at, size = corpus.p_first[corpus.owner[row]], corpus.p_size[corpus.owner[row]]
        assert corpus.paragraphs[corpus.owner[row]][corpus.first[row] :].startswith(
            corpus.rows[row]["answer_text"]
        )
        assert size == len(corpus.paragraphs[corpus.owner[row]]) and corpus.offsets[at][0] == 0
        assert corpus.q_size[row] == len(corpus.rows[row]["question_text"])


# windows


def test_windows_to_learn_from_hold_the_answer(functions, corpus):
    space = functions(*PLACES)
    for rule in (space.centred, space.anywhere):
        for _ in range(20):
            begin = rule(corpus, ALL, 40)
            end = begin + corpus.p_size[corpus.owner].clamp(max=40)
            assert (begin >= 0).all() and (end <= corpus.p_size[corpus.owner]).all()
            assert (corpus.first >= begin).all() and (corpus.last < end).all()


def test_the_answer_is_in_the_middle_or_anywhere(functions):
    space = functions(*PLACES)
    one = types.SimpleNamespace(owner=torch.zeros(4000, dtype=torch.long), p_size=torch.tensor([500]))
    one.first, one.last = torch.full((4000,), 250), torch.full((4000,), 252)
    rows = torch.arange(4000)
    assert set((251 - space.centred(one, rows, 40)).tolist()) == {20}
    place = one.first - space.anywhere(one, rows, 40)
    often = place.bincount(minlength=38)
    assert len(often) == 38 and often.min() > 60, "from the left edge to the right one, equally often"


def test_every_answer_is_whole_in_a_window_that_is_asked(functions, corpus):
    windows = functions("windows_of").windows_of(corpus, ALL)
    for row in range(60):
        mine = windows[windows[:, 0] == row]
        begin, end = mine[:, 1], mine[:, 1] + mine[:, 2]
        assert ((corpus.first[row] >= begin) & (corpus.last[row] < end)).any()
        covered = {k for a, b in zip(begin.tolist(), end.tolist(), strict=True) for k in range(a, b)}
        assert covered == set(range(int(corpus.p_size[corpus.owner[row]])))
        assert set(begin.tolist()) == set(range(0, 20 * len(mine), 20)) and mine[:, 2].max() <= 40
    apart = functions("windows_of", settings={"overlap": 0.0}).windows_of(corpus, ALL)
    assert int(apart[:, 2].sum()) == int(corpus.p_size[corpus.owner].sum()), "side by side, every token once"


def test_pack_by_hand(functions, corpus):
    pack = functions("pack").pack
    tokens = torch.arange(100, 200)
    got = pack(
        tokens, torch.tensor([0, 10]), torch.tensor([2, 3]), torch.tensor([50, 97]), torch.tensor([4, 3])
    )
    assert got["input_ids"].shape == (2, 16), "padded to a multiple of 8"
    assert got["input_ids"][0].tolist() == [2, 100, 101, 3, 150, 151, 152, 153, 3, *[0] * 7]
    assert got["input_ids"][1].tolist() == [2, 110, 111, 112, 3, 197, 198, 199, 3, *[0] * 7]
    assert got["token_type_ids"][0].tolist() == [0] * 4 + [1] * 5 + [0] * 7
    assert got["attention_mask"].sum(1).tolist() == [9, 9]


def test_of_a_long_question_the_end_is_kept(functions, corpus):
    first, size = functions("question_of").question_of(corpus, ALL)
    assert size.max() == 20 and (first + size == corpus.q_first + corpus.q_size).all()


@pytest.mark.parametrize("position", ["centred", "anywhere"])
@pytest.mark.parametrize("blind", [0.0, 1.0])
def test_labels_point_at_the_answer_or_say_not_here(functions, corpus, position, blind):
    space = functions(
        *PLACES, "question_batch", settings={"position": position, "blind": blind, "batch_size": 60}
    )
    absent = 0
    for _ in range(5):
        batch = space.question_batch(corpus, ALL, 0)
        for row in range(60):
            start, end = int(batch["start_positions"][row]), int(batch["end_positions"][row])
            at = corpus.p_first[corpus.owner[row]]
            wanted = corpus.tokens[at + corpus.first[row] : at + corpus.last[row] + 1]
            if start == 0:
                assert end == 0
                absent += 1
            else:
                assert torch.equal(batch["input_ids"][row, start : end + 1], wanted)
                assert batch["token_type_ids"][row, start : end + 1].all()
    assert (absent > 20) == (blind == 1.0) and (absent == 0) == (blind == 0.0)


def test_each_question_is_learned_once_an_epoch(functions, corpus):
    space = functions(*PLACES, "question_batch", settings={"position": "centred", "blind": 0.0})
    order = torch.randperm(60)
    heads = torch.cat([space.question_batch(corpus, order, k)["input_ids"][:, 1] for k in range(7)])
    assert len(heads) == 56
    assert torch.equal(
        space.question_batch(corpus, order, 2)["attention_mask"].sum(1), lengths(corpus, order[16:24])
    )


def lengths(corpus, rows):
    return corpus.q_size[rows].clamp(max=20) + corpus.p_size[corpus.owner[rows]].clamp(max=40) + 3


# reading


def test_first_weights_let_equal_tokens_find_each_other(functions):
    shape = {"hidden": 32, "layers": 2}
    space = functions("small_config", "new_net", settings=shape)
    torch.manual_seed(0)
    net = space.new_net(BertForQuestionAnswering).eval()
    place = net.bert.embeddings.position_embeddings.weight
    assert (
        place[:, 0].abs().max() <= 0.0401 and (place[40] - place[41]).norm() < (place[40] - place[60]).norm()
    )
    ids = torch.tensor([[2, *range(10, 16), 3, *range(20, 30), *range(10, 16), 3]])
    kinds = (torch.arange(ids.shape[1])[None] > 7).long()
    net.set_attn_implementation("eager")
    seen = net.bert(ids, token_type_ids=kinds, output_attentions=True).attentions[0][0].mean(0)
    for k in range(1, 7):
        assert seen[k, 17 + k] > 3 * seen[k, 8:18].mean(), "the same token, further on"


def test_what_is_hidden_is_asked_for_and_nothing_else(functions, corpus):
    space = functions(*PLACES, "hide", "reading_batch", settings={"batch_size": 400})
    for how, shares in (("masked", (0.15, 0.15)), ("matching", (0.21, 0.0))):
        batch = space.reading_batch(corpus, ALL, how, 0)
        if how == "matching":
            assert "labels" not in batch
            batch["labels"] = torch.where(batch["input_ids"] == 4, 9, -100)
        ids, labels, body = batch["input_ids"], batch["labels"], batch["token_type_ids"] == 1
        asked = labels >= 0
        assert torch.equal(asked, ids == 4), "[MASK], and only there a label"
        assert not (set(labels[asked].tolist()) & {0, 2, 3, 4})
        text = batch["attention_mask"].bool() & (ids != 2) & (ids != 3)
        for where, share in ((text & ~body, shares[0]), (text & body, shares[1])):
            assert abs(asked[where].float().mean() - share) < 0.05, how


def test_what_is_to_be_matched_is_a_piece_of_the_window(functions, corpus):
    space = functions(*PLACES, "hide", "reading_batch", settings={"batch_size": 100})
    batch, kinds = space.reading_batch(corpus, ALL, "matching", 0), []
    for row in range(100):
        text, size = batch["input_ids"][row].tolist(), int(batch["attention_mask"][row].sum())
        start, end = int(batch["start_positions"][row]), int(batch["end_positions"][row])
        middle = text.index(3)
        head, window = text[1:middle], text[middle + 1 : size - 1]
        fits = [
            k
            for k in range(len(window) - len(head) + 1)
            if all(one in (4, other) for one, other in zip(head, window[k:], strict=False))
        ]
        first = [start - middle - 1 - k for k in fits]  # where the gap would be in the piece
        assert middle < start <= end < size - 1
        whole = end - start + 1 == len(head) and 0 in first
        gap = end - start < 5 and any(0 <= k and set(head[k : k + end - start + 1]) == {4} for k in first)
        assert whole or gap, (head, window)
        kinds.append(whole)
    assert 15 < sum(kinds) < 45


def test_the_rate_rises_and_falls_to_zero(functions):
    factor = functions("factor").factor
    rates = [factor(step, 100, True) for step in range(100)]
    assert max(rates) == 1.0 and rates.index(1.0) == 9 and rates[0] == 0.1 and rates[-1] < 0.02
    assert all(a > b for a, b in zip(rates[9:], rates[10:], strict=False))
    assert {factor(step, 100, False) for step in range(100)} == {1.0}


# from scores to an answer


def test_the_search_finds_the_best_possible_pair(functions):
    jointly = functions("jointly").jointly
    torch.manual_seed(0)
    start, end = torch.randn(20, 50), torch.randn(20, 50)
    best, first, last = jointly(start, end, 3)
    for k in range(20):
        pairs = {(i, j): float(start[k, i] + end[k, j]) for i in range(50) for j in range(i, min(50, i + 30))}
        wanted = sorted(pairs, key=pairs.get, reverse=True)[:3]
        assert list(zip(first[k].tolist(), last[k].tolist(), strict=True)) == wanted
        assert best[k].tolist() == pytest.approx([pairs[one] for one in wanted])


def test_the_official_rule_takes_each_end_for_itself(functions):
    separate = functions("separate").separate
    start, end = torch.zeros(3, 60), torch.zeros(3, 60)
    start[0, 5] = end[0, 9] = start[1, 9] = end[1, 5] = start[2, 2] = end[2, 50] = 1.0
    score, first, last = separate(start, end)
    assert score.flatten().tolist() == [2.0] * 3 and first.flatten().tolist() == [5, 9, 2]
    assert last.flatten().tolist() == [9, 9, 31], "never before the start, never too long"


def test_windows_vote_or_the_best_one_wins(functions):
    vote = functions("vote").vote
    question, first = np.array([0, 0, 0, 1, 1]), np.array([4, 7, 7, 2, 3])
    score = np.log([0.5, 0.3, 0.3, 0.1, 0.2])
    assert vote(question, first, first + 1, score, True) == {0: (7, 8), 1: (3, 4)}
    assert vote(question, first, first + 1, score, False) == {0: (4, 5), 1: (3, 4)}
    far = np.array([-5000.0, -4000.0])
    assert vote(np.array([0, 0]), np.array([1, 2]), np.array([1, 2]), far, False) == {0: (2, 2)}


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("decode", ["separate", "joint"])
def test_spans_are_counted_from_the_start_of_the_paragraph(functions, corpus, decode, together):
    space = functions("windows_of", "jointly", "separate", "vote", "find_spans")
    windows = space.windows_of(corpus, ALL)
    scores = torch.full((2, len(windows), 41), -5.0)
    for k, (row, begin, size) in enumerate(windows.tolist()):
        scores[:, k, 1 + size :] = -1e4
        if corpus.first[row] >= begin and corpus.last[row] < begin + size:
            scores[0, k, 1 + corpus.first[row] - begin] = scores[1, k, 1 + corpus.last[row] - begin] = 5.0
        else:
            scores[:, k, 0] = 5.0
    spans = space.find_spans(windows, scores, decode, together)
    wanted = zip(corpus.first.tolist(), corpus.last.tolist(), strict=True)
    assert spans == dict(enumerate(wanted))


def test_a_window_that_says_not_here_does_not_vote(functions):
    space = functions("jointly", "separate", "vote", "find_spans")
    windows = torch.tensor([[0, 0, 40], [0, 20, 40]])
    scores = torch.full((2, 2, 41), -9.0)
    scores[:, 0, 0], scores[:, 0, 5] = 20.0, 10.0  # sure that it is not here, with a high second choice
    scores[:, 1, 8] = 3.0
    assert space.find_spans(windows, scores, "joint", True) == {0: (27, 27)}
    assert space.find_spans(windows, scores, "joint", False) == {0: (4, 4)}


def test_brackets_are_completed_only_by_what_stands_there(functions):
    add = functions("PAIRS", "with_brackets").with_brackets
    assert add("他寫了《海石》，", "《海石") == "《海石》" and add("他寫了《海石》，", "海石》") == "《海石》"
    assert add("他寫了《海石", "《海石") == "《海石" and add("（《海》）", "《海》") == "《海》"
    assert add("甲（乙）丙", "甲（乙") == "甲（乙）"


def test_all_windows_at_once_or_one_by_one(functions, corpus):
    torch.manual_seed(0)
    config = BertConfig(**SMALL, vocab_size=200, num_hidden_layers=2, initializer_range=0.3)
    net = BertForQuestionAnswering(config)
    space = functions(*PLACES, "windows_of", "ask", accelerator=Accelerator(cpu=True), device="cpu")
    windows = space.windows_of(corpus, ALL)
    together = space.ask(net.train(), corpus, windows)
    alone = torch.cat([space.ask(net, corpus, one[None]) for one in windows], 1)
    assert together.shape == (2, len(windows), 41)
    assert torch.allclose(together, alone, atol=1e-4), "without dropout, padding changes nothing"
    row, begin, size = windows[7].tolist()
    head, head_size = space.question_of(corpus, windows[7:8, 0])
    at = corpus.p_first[corpus.owner[windows[7:8, 0]]] + begin
    out = net.eval()(**space.pack(corpus.tokens, head, head_size, at, windows[7:8, 2]))
    place = [0, *range(int(head_size) + 2, int(head_size) + 2 + size)]
    assert torch.allclose(together[0, 7, : size + 1], out.start_logits[0, place], atol=1e-4)
    assert torch.allclose(together[1, 7, : size + 1], out.end_logits[0, place], atol=1e-4)
    assert (together[:, 7, size + 1 :] < -1000).all()


# who learns what


def test_groups_are_never_divided(functions):
    rows = [row_of(k, "王", 0, text, k) for k, text in enumerate("甲乙乙丙丁戊己庚")]
    rows += [row_of(3, "王", 0, "丁", 8), row_of(4, "王", 0, "己", 9)]
    one = types.SimpleNamespace(rows=rows, owner=torch.tensor([row["paragraph_id"] for row in rows]))
    group = functions("groups_of", Counter=None).groups_of(one, torch.arange(10)).tolist()
    assert group == [0, 1, 1, 3, 3, 5, 3, 7, 3, 3], "3, 4 and 6 hang together by a chain"
    dev = torch.arange(100, 110)
    big = types.SimpleNamespace(
        rows=[None] * 100 + rows, owner=torch.cat([torch.zeros(100).long(), one.owner])
    )
    given = dict(known=big, given_train=torch.arange(50), given_dev=dev, usable=torch.ones(110).bool())
    given["usable"][107] = False
    space = functions("groups_of", "make_splits", SEED=3, **given)
    assert [part.tolist() for part in space.make_splits(1)[0]] == [list(range(50)), dev.tolist()]
    (learn, check), (learn2, check2) = space.make_splits(2)
    assert sorted(torch.cat([check, check2]).tolist()) == dev.tolist() and len(check) and len(check2)
    for some, checked in ((learn, check), (learn2, check2)):
        assert not set(some.tolist()) & set(checked.tolist()) and set(range(50)) <= set(some.tolist())
        assert 107 not in some.tolist(), "a question without a usable answer is not learned"
    halves = [{group[k - 100] for k in part.tolist()} for part in (check, check2)]
    assert not halves[0] & halves[1]


def test_hidden_answers_are_never_learned(run, straight, tmp_path):
    shutil.copytree(straight[2] / "data", tmp_path / "data")
    path = tmp_path / "data/HW07-sample/tiny/answers/answers.json"
    answers = json.loads(path.read_text(encoding="utf-8"))
    moved = json.dumps([*answers[1:], answers[0]], ensure_ascii=False)
    path.write_text(moved, encoding="utf-8")
    assert run(SCRIPT).wait().code == 0
    result, submission = outcome(tmp_path)
    assert submission == straight[1] and result["score"] != straight[0]["score"]


@pytest.mark.parametrize("what", ["blind", "report"])
def test_what_makes_a_checkpoint_useless(run, straight, changed, tmp_path, what):
    old, new = {
        "blind": ("torch.rand(len(rows)) < settings", "torch.rand(len(rows)) <= settings"),
        "report": ('"of 4 to 6"', '"of four to six"'),
    }[what]
    anew = trained_anew(run, straight, changed(SCRIPT, old, new), tmp_path)
    nets = {"net-0", "net-1", "after nothing", "after masked", "after matching"}
    assert anew == (set() if what == "report" else nets), "what was read stays read"


def test_another_test_part_keeps_the_nets(run, straight, real, tmp_path):
    """Trained on these files as real ones, then asked about a test of two questions."""
    assert run(SCRIPT, **real.wanted, HW_LEVEL="simple").wait().code == 0
    real.change("test", lambda data: data.update(questions=data["questions"][:2]))
    done = run(SCRIPT, **real.wanted, HW_LEVEL="simple").wait()
    assert done.code == 0 and "net-0: going on after" in done.text, done.text
    assert len((tmp_path / "out/HW07/simple-real/result.csv").read_text(encoding="utf-8").splitlines()) == 3


# files


def read(path):
    return pick(SCRIPT, "read_json", json=json, Stop=RuntimeError).read_json(path)


def test_a_mark_at_the_start_and_windows_line_ends_are_read(tmp_path):
    path = tmp_path / "hw7_dev.json"
    path.write_bytes('{"questions": [1],\r\n "paragraphs": ["王明"]}\r\n'.encode("utf-8-sig"))
    assert read(path)["paragraphs"] == ["王明"]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ('{"questions": [],\n "paragraphs": ["王明"]}\n'.encode("big5"), "line 2: it is not UTF-8"),
        (b'{"questions": [1],\n "paragraphs": [\n', "line 3, column 1: "),
        (b"[]", "must be an object with questions and paragraphs"),
        (b'{"questions": [1], "paragraphs": [3]}', "must be an object with questions and paragraphs"),
    ],
)
def test_a_damaged_file_is_named_with_its_line(tmp_path, data, words):
    path = tmp_path / "hw7_dev.json"
    path.write_bytes(data)
    with pytest.raises(RuntimeError, match=f"hw7_dev.json.*{words}.*fetch the file again"):
        read(path)


FAULTS = {
    "its id occurs twice": lambda row: row.update(id=3),
    "paragraph_id 9999 is none of 0 to": lambda row: row.update(paragraph_id=9999),
    "its answer '不在' is not at": lambda row: row.update(answer_text="不在"),
    "it has no question_text": lambda row: row.pop("question_text"),
    "it has no answer_text": lambda row: row.update(answer_start=None),
}


def test_bad_questions_are_named_and_left_out_of_the_test_they_end_the_run(run, real, tmp_path):
    def spoil(data):
        for number, edit in enumerate(FAULTS.values()):
            edit(data["questions"][10 + number])

    real.change("train", spoil)
    done = run(SCRIPT, **real.wanted, HW_LEVEL="simple").wait()
    assert done.code == 0, done.text
    for words in list(FAULTS)[:3]:
        assert words in done.text, done.text
    assert "hw7_train.json, id 11: paragraph_id" in done.text and "5 of " in done.text
    assert "the course's (10524, 31690)" in done.text
    real.change("test", lambda data: data["questions"][7].update(paragraph_id=-1))
    ended = run(SCRIPT, **real.wanted, HW_LEVEL="simple").wait()
    one_sentence(ended, "hw7_test.json, id 7: paragraph_id -1 is none of 0 to .*[Mm]end that question")


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_noticed(fault):
    find = pick(SCRIPT, "KEYS", "fault_of").fault_of
    row = row_of(0, "王明", 0, number=5)
    assert find(row, ["王明是人"], {3}, True) is None
    FAULTS[fault](row)
    assert find(row, ["王明是人"], {3}, True).startswith(fault)


def test_an_end_that_is_not_the_last_character_is_noticed():
    row = row_of(0, "王明", 0) | {"answer_end": 2}
    assert "is not at 0 to 2" in pick(SCRIPT, "KEYS", "fault_of").fault_of(row, ["王明是人"], set(), True)


# models of others


@pytest.fixture
def folder(functions, tokenizer, tmp_path):
    """A folder with a model, as a person would have saved it."""
    config = BertConfig(**SMALL, vocab_size=len(tokenizer), num_hidden_layers=1)
    BertForQuestionAnswering(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_full_runs_with_a_model_from_a_folder(run, real, folder, tmp_path):
    done = run(SCRIPT, **real.wanted, HW_PROFILE="full", HW_LEVEL="strong", HW_MODEL=folder).wait()
    assert done.code == 0, done.text
    assert "reading" not in done.text, "it has read already"
    result = json.loads((tmp_path / "out/HW07/strong-real/result.json").read_text())
    assert result["settings"]["width"] == 384 and result["score"] is None
    assert len((tmp_path / "out/HW07/strong-real/result.csv").read_text(encoding="utf-8").splitlines()) == 121


def fetcher(ring, **given):
    names = ("load_model", "fetch_model", "OR")
    alone = types.SimpleNamespace(main_process_first=contextlib.nullcontext)
    pool = types.SimpleNamespace(submit=lambda work, *a: types.SimpleNamespace(result=lambda s: work(*a)))
    world = dict(accelerator=alone, POOL=pool, ring=ring, DATA_DIR=Path("no"), Stop=RuntimeError, say=print)
    return pick(SCRIPT, *names, Path=Path, **{**world, **given})


def test_without_a_network_a_model_that_is_not_here_is_named(tmp_path):
    asked = []

    def ring(url):
        asked.append(url)
        raise OSError(101, "Network is unreachable")

    space = fetcher(ring, DATA_DIR=tmp_path / "data")
    with pytest.raises(RuntimeError, match="'hfl/none' cannot be had: .*unreachable.*MODEL = its path"):
        space.fetch_model("hfl/none")
    assert len(asked) == 1
    (tmp_path / "empty").mkdir()
    with pytest.raises(RuntimeError, match="empty' cannot be had"):
        space.fetch_model(str(tmp_path / "empty"))
    assert len(asked) == 1, "for a folder nobody is asked"


def test_a_body_without_its_weights_is_refused(folder, tmp_path):
    config = BertConfig.from_pretrained(folder)
    config.num_hidden_layers = 2
    config.save_pretrained(folder)
    with pytest.raises(RuntimeError, match="lacks .*layer.1"):
        fetcher(None, DATA_DIR=tmp_path / "data").fetch_model(str(folder))


@pytest.mark.parametrize("wish", [{"HW_MODEL": "some/where"}, {"HW_PROFILE": "full"}])
def test_a_model_that_was_wished_for_and_cannot_be_had_ends_the_run(run, real, tmp_path, wish):
    one_sentence(run(SCRIPT, **real.wanted | wish).wait(), "The model .* cannot be had")
    asked = (tmp_path / "offline.log").read_text()
    assert "huggingface.co" in asked, "a model comes from the hub, and from nowhere else"
    (tmp_path / "offline.log").unlink()


def test_full_fits_into_15_gigabytes():
    """Weights, gradients and two moments in float32; of each layer some 34 bytes a number are kept."""
    sizes = settings_of(SCRIPT, "boss", profile="full")
    layers, hidden, vocabulary = 24, 1024, 21128
    weights = layers * 12 * hidden**2 + (vocabulary + 512) * hidden
    kept = layers * sizes["micro"] * (sizes["width"] + sizes["question"] + 3) * hidden * 34
    assert sizes["width"] + sizes["question"] + 3 <= 512 and 16 * weights + kept < 15e9
    assert sizes["batch_size"] % sizes["micro"] == 0


def test_models_of_the_levels_are_named():
    known = facts(SCRIPT)
    assert list(known["MODELS"]) == ["simple", "medium", "strong", "boss"]
    assert known["MODELS"]["simple"] == known["MODELS"]["medium"] == "bert-base-chinese"


def test_a_diverged_training_says_so(run, changed):
    wild = changed(SCRIPT, '"rate":       (2e-3,', '"rate":       (1e35,')
    one_sentence(run(wild, HW_LEVEL="simple").wait(), "diverged", "lower `rate`")


def test_the_curves_and_the_log(straight):
    text = (straight[2] / "run.log").read_text(encoding="utf-8")
    assert len(re.findall(r"^net-\d, step", text, re.MULTILINE)) == 4
    assert "windows vote with probabilities" in text


class Weight(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(3))

    def forward(self, x):
        return types.SimpleNamespace(loss=((x * self.weight).sum(1) ** 2).mean())


def learned(functions, micro, decay):
    """(weights, losses) after four steps from the same start."""
    x, history = torch.rand(4, 8, 3, generator=torch.Generator().manual_seed(0)), []
    given = dict(load_checkpoint=lambda *_, **__: 0, save_checkpoint=lambda *_, **__: None, say=print)
    given |= dict(accelerator=Accelerator(cpu=True), device="cpu", history=history, QUIET=True)
    names = ("factor", "share_of", "make_log", "train")
    space = functions(*names, settings={"batch_size": 8, "micro": micro}, **given)
    net = space.train("x", Weight(), 4, 0.1, decay, lambda step: {"x": x[step]}, [])
    return net.weight.tolist(), [row["loss"] for row in history]


def test_a_batch_in_parts_is_the_batch(functions):
    """Loss and gradient do not depend on how many sequences fit into the memory."""
    for one, other in zip(learned(functions, 8, False), learned(functions, 2, False), strict=True):
        assert one == pytest.approx(other, rel=1e-4)


def test_a_falling_rate_moves_the_weights_less(functions):
    (far, _), (near, _) = learned(functions, 8, False), learned(functions, 8, True)
    assert all(0 < 1 - late < 0.9 * (1 - early) for early, late in zip(far, near, strict=True))


def test_all_nets_are_asked(functions):
    each = [torch.rand(2, 5, 41) for _ in range(2)]
    assert torch.allclose(functions("scores", test_scores=each).scores, (each[0] + each[1]) / 2)


def test_every_question_of_dev_is_checked_by_one_net(straight):
    printed = (straight[2] / "run.log").read_text(encoding="utf-8")
    count = sum(
        int(re.search(f"<td>{name}</td>\\s*<td>(\\d+)</td>", printed)[1]) for name in ("written", "heard")
    )
    data = json.loads((sample_of(straight) / "data" / "hw7_dev.json").read_text(encoding="utf-8"))
    assert count == len(data["questions"]) > 10


def test_two_processes_share_a_batch(functions):
    batch = {"x": torch.arange(32)}
    seen = []
    for k in range(2):
        process = types.SimpleNamespace(process_index=k, num_processes=2)
        share = functions("share_of", accelerator=process, device="cpu", settings={"micro": 8}).share_of
        seen += [share(batch, first)["x"].tolist() for first in range(0, 32, 8)]
    assert all(len(part) == 4 for part in seen) and sorted(sum(seen, [])) == list(range(32))


def test_nothing_of_the_run_is_left_over(straight):
    assert Run and not list(straight[2].glob("**/*.part"))


MUTANTS = [
    ("find_answers(known, *checked[-1])", "find_answers(known, *checked[0])"),
    ('right = [line.partition(",")[2] == bare_text(text)', 'right = [line.partition(",")[2] == text'),
    ("zip(test_id, answers)", "zip(test_id, answers[::-1])"),
    ('row["answer_start"], right=True)', 'row["answer_start"])'),
    ('row["answer_end"], right=True)) - 1', 'row["answer_end"], right=True))'),
    (
        "corpus.offsets[at + first][0], corpus.offsets[at + last][1]",
        "corpus.offsets[at + first][0], begin + 1",
    ),
    ("(middle - width // 2).minimum(size - width)", "(middle - width // 2)"),
    ("low = (corpus.last[rows] - width + 1)", "low = (corpus.first[rows] - width + 1)"),
    ("torch.rand(len(low)) * (high - low + 1)", "torch.rand(len(low)) * (high - low)"),
    ('"token_type_ids": ((at > middle)', '"token_type_ids": ((at >= middle)'),
    ("return corpus.q_first[rows] + corpus.q_size[rows] - size, size", "return corpus.q_first[rows], size"),
    ("shift = head_size + 2 - begin", "shift = head_size + 1 - begin"),
    ("(corpus.last[rows] < begin + size)", "(corpus.first[rows] < begin + size)"),
    ("tril(LIMIT - 1)", "tril(LIMIT)"),
    ("torch.ones_like(pair[0]).triu()", "torch.ones_like(pair[0])"),
    ("        scores = scores.log_softmax(-1)\n", "        scores = scores.clone()\n"),
    ("np.add.at(total", "np.maximum.at(total"),
    ("answer.count(right) and answer + right in text", "answer.count(right)"),
    ("more = given_dev[hand != k]", "more = given_dev"),
    ('joined = joined.groupby(frame["paragraph"]).transform("min")', "joined = joined.copy()"),
    ("if bad and (not answered or", "if bad and ("),
    ("    net.eval()\n", "    net.train()\n"),
    ("< share) & ~special", "< share)"),
    ('"labels": ids.where(hidden, -100)', '"labels": ids'),
    ("(steps - step) / (steps - rise + 1)", "(steps - step) / steps"),
    ("head = between(body, body + size - head_size)", "head = body - head_size"),
    ("= head_size + 1 + head - body + gap", "= head_size + 1 + head - body"),
    ("attention.query.weight.data.copy_(attention.key.weight.data)", "attention.query.weight.data.mul_(2.0)"),
    ('data.decode("utf-8-sig")', 'data.decode("utf-8")'),
    ('max(1, size - settings["width"] + step)', 'max(1, size - settings["width"])'),
    ("torch.stack(test_scores).mean(0)", "test_scores[0]"),
    (' * settings["micro"] / settings["batch_size"]', ""),
    ("        net.bert.load_state_dict(body)\n", "        pass\n"),
    ("        scheduler.step()\n", ""),
]
