"""HW01's own invariants."""

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import TESTS, one_sentence
from notebooks import pick
from runner import Run

SCRIPT = TESTS.parent / "HW01" / "HW01.py"
DAYS = np.random.default_rng(0).normal(size=(50, 5, 16))
PROBE = """
kept = dict(row=row, day=day, later=later, rate=rate, before=before, learnable=learnable, chain=chain)
kept |= dict(x_test=x_test, prediction=prediction, line=ridge(np.flatnonzero(learnable), x_test))
kept |= dict(net=predict(model, x_test), base_test=base_test, errors=list(sweep_error.values()), N=N)
kept |= dict(days=days, values=values, decay=best_decay)
for name in splits:
    for k, (learn, check) in enumerate(splits[name]):
        kept |= {f"{name} {k} 0": learn, f"{name} {k} 1": check}
kept |= {f"held {name}": np.stack(parts) for name, parts in held_out.items()}
kept["again"] = [predict(model, x_test), predict(model.train(), x_test)]
np.savez("probe.npz", **kept)
"""


def probe_of(folder, **wanted):
    """The inner numbers of a tiny run."""
    copy = folder / "HW01.py"
    copy.write_text(SCRIPT.read_text(encoding="utf-8") + PROBE, encoding="utf-8")
    done = Run(copy, folder, **wanted).wait()
    assert done.code == 0, done.text
    return dict(np.load(folder / "probe.npz"))


@pytest.fixture(scope="session")
def probe(tmp_path_factory):
    return probe_of(tmp_path_factory.mktemp("probe"))


@pytest.fixture
def real(straight, tmp_path):
    """The tiny sample's files where a person would put the real ones -> the folder."""
    data = straight[2] / "data" / "HW01-sample" / "tiny" / "data"
    (tmp_path / "given").mkdir()
    for path in data.iterdir():
        (tmp_path / "given" / path.name).write_bytes(path.read_bytes())
    return tmp_path / "given"


def test_beats_a_constant_answer(straight):
    """The best constant guess on the hidden answers, which a tiny boss run must beat by far."""
    result, _, folder = straight
    answers = np.load(folder / "data" / "HW01-sample" / "tiny" / "answers" / "tested_positive.npy")
    assert result["score"] < 0.1 * np.var(answers)


def test_the_judge_takes_the_mean_of_squares(straight):
    """By hand, from the file and the answers."""
    result, submission, folder = straight
    answers = np.load(folder / "data" / "HW01-sample" / "tiny" / "answers" / "tested_positive.npy")
    guess = np.array([float(line.split(",")[1]) for line in submission.decode().split()[1:]])
    assert result["score"] == pytest.approx(((guess - answers) ** 2).sum() / len(answers), rel=1e-6)


def test_window_never_sees_the_day_it_guesses():
    window = pick(SCRIPT, "window").window
    for day in (3, 4):
        for back in (3, 4):
            spoiled = DAYS.copy()
            spoiled[:, day, 15] = np.nan  # the answer
            spoiled[:, day + 1 :] = np.nan  # the future
            for part in window(spoiled, day, back):
                assert np.isfinite(part).all()


def test_windows_of_both_days_have_the_same_columns_in_the_same_order():
    window = pick(SCRIPT, "window").window
    survey, rates = window(DAYS, 4, 3)
    assert (survey[:, 0] == DAYS[:, 4, :15]).all() and (rates[:, 0] == DAYS[:, 3, 15]).all()
    shifted_survey, shifted_rates = window(np.roll(DAYS, -1, axis=1), 3, 3)
    assert (survey == shifted_survey).all() and (rates == shifted_rates).all()


def test_differences_are_a_change_of_coordinates():
    """Today, and the moves: adding the moves up again gives the earlier days."""
    parts = pick(SCRIPT, "window", "differences")
    survey, rates = parts.window(DAYS, 4, 3)
    columns = parts.differences(DAYS, 4)
    moves = columns[:, 16:61].reshape(len(DAYS), 3, 15)
    assert np.allclose(columns[:, :15] - moves[:, 0], survey[:, 1])
    assert np.allclose(columns[:, :15] - moves.sum(1), survey[:, 3])
    assert np.allclose(columns[:, 15] - columns[:, 61:].sum(1), rates[:, 2])


def test_the_best_24_columns_are_those_that_say_most(probe):
    """A column that is the rate itself is among them, twelve of noise are not."""
    space = pick(
        SCRIPT, "window", "answers_and_rates", "strength", "best24", days=probe["days"], N=int(probe["N"])
    )
    everything = space.answers_and_rates(probe["days"], 4)[: int(probe["N"])]
    answer = probe["days"][: int(probe["N"]), 4, 15]
    by_hand = [abs(np.corrcoef(column, answer)[0, 1]) for column in everything.T]
    assert set(space.best24) == set(np.argsort(by_hand)[-24:])


def test_chains_link_rows_that_share_a_day_of_one_state():
    find_chains = pick(SCRIPT, "find_chains").find_chains
    series = np.random.default_rng(1).normal(size=(9, 16))
    rows = np.stack([series[0:5], series[4:9], DAYS[0], series[2:7]])
    assert list(find_chains(rows, np.array([3, 3, 3, 3]))) == [0, 0, 1, 0]
    assert list(find_chains(rows, np.array([3, 5, 3, 5]))) == [0, 1, 2, 1]


def test_rows_of_a_chain_come_in_the_order_of_time():
    series = np.random.default_rng(1).normal(size=(9, 16))
    days = np.stack([series[k : k + 5] for k in (2, 0, 3, 1)])
    assert pick(SCRIPT, "in_order", days=days).in_order(np.arange(4)) == [1, 3, 0, 2]


def test_windows_stand_there_once_and_have_their_answers(probe):
    for k in range(len(probe["row"])):
        day = probe["days"][probe["row"][k], :, 15]
        assert probe["rate"][k] == day[probe["day"][k]] and probe["before"][k] == day[probe["day"][k] - 1]
    answers = np.c_[probe["rate"], probe["before"], probe["values"][:, :15]]
    assert len(np.unique(answers, axis=0)) == len(answers)
    assert (probe["day"][probe["later"]] == 3).all() and np.isfinite(probe["rate"]).all()


def test_splits_do_not_leak(probe):
    """No window is on both sides, no chain either; every test row is held out once."""
    for name, count in (("random", 1), ("chains", 3), ("day 4", 3)):
        for k in range(count):
            learn, check = probe[f"{name} {k} 0"], probe[f"{name} {k} 1"]
            assert len(learn) and len(check) and not set(learn) & set(check)
            if name == "chains":
                chains = probe["chain"][probe["row"]]
                assert not set(chains[learn]) & set(chains[check])
    held = np.concatenate([probe[f"day 4 {k} 1"] for k in range(3)])
    assert sorted(held) == list(np.flatnonzero(probe["later"]))


def test_the_guess_is_the_mean_of_net_and_ridge_plus_the_day_before(probe):
    mean = (probe["net"] + probe["line"]) / 2 + probe["days"][int(probe["N"]) :, 3, 15]
    assert np.allclose(probe["prediction"], mean.clip(0, 100), atol=1e-5)
    assert np.abs(probe["net"] - probe["line"]).max() > 1e-3


def test_the_net_sees_today_s_survey_of_the_test_rows(probe):
    """The first 15 columns are day 5's, on the scale of the windows that were learned."""
    today = probe["days"][int(probe["N"]) :, 4, :15]
    mean, spread = probe["values"].mean(0), probe["values"].std(0)
    assert np.allclose(probe["x_test"][:, :15], (today - mean[:15]) / spread[:15], atol=1e-3)


def test_guesses_are_made_without_dropout(probe):
    assert (probe["again"][0] == probe["again"][1]).all()


def test_the_best_weight_decay_is_chosen_and_every_strength_differs(probe):
    decays = pick(SCRIPT, "DECAYS").DECAYS
    assert probe["decay"] == decays[int(probe["errors"].argmin())]
    assert len({f"{error:.5f}" for error in probe["errors"]}) == len(decays)
    numbers, net, line = probe["held day 4"]
    numbers = numbers.astype(int)
    by_hand = np.mean(((net + line) / 2 + probe["before"][numbers] - probe["rate"][numbers]) ** 2)
    assert by_hand == pytest.approx(probe["errors"].min(), rel=1e-4)


def test_below_the_boss_nothing_of_the_later_period_is_learned(tmp_path):
    probe = probe_of(tmp_path, HW_LEVEL="strong")
    assert not (probe["learnable"] & probe["later"]).any()
    assert np.allclose(probe["prediction"], (probe["net"] + probe["base_test"]).clip(0, 100), atol=1e-5)


def test_the_rate_of_learning_ends_at_zero(straight):
    """The schedule was stepped once a batch."""
    path = next(straight[2].glob("out/HW01/boss-sample/checkpoint/all.*.pt"))
    states = torch.load(path, weights_only=True)[3]
    assert states["scheduler"]["last_epoch"] == states["scheduler"]["total_steps"] - 0
    assert states["optimizer"]["param_groups"][0]["lr"] < 1e-4


def test_ids_are_no_feature_of_the_boss_and_travel_with_their_guesses(run, real, changed, tmp_path):
    """Other ids in the files: the predictions, row by row, stay the same."""
    cut = changed(SCRIPT, "if REAL and PROFILE", "if False and PROFILE")
    guesses = []
    for _ in range(2):
        done = run(cut, HW_DATA="real", HW_DATA_DIR=real, HW_RESUME="false").wait()
        assert done.code == 0, done.text
        guesses.append(pd.read_csv(tmp_path / "out/HW01/boss-real/pred.csv"))
        dice = np.random.default_rng(0)
        for path in real.iterdir():
            lines = path.read_text().splitlines()
            numbers = dice.permutation(len(lines) - 1)
            mixed = [f"{k},{line.split(',', 1)[1]}" for k, line in zip(numbers, lines[1:], strict=True)]
            path.write_text("\n".join([lines[0], *mixed]) + "\n")
            wanted = numbers
    assert np.allclose(guesses[0]["tested_positive"], guesses[1]["tested_positive"])
    assert set(guesses[1]["id"]) == set(range(148)) and list(guesses[1]["id"]) != list(range(148))
    assert len(wanted)


def test_submission_has_the_test_ids_in_order(straight):
    lines = straight[1].decode().split("\n")
    assert lines[0] == "id,tested_positive" and lines[-1] == ""
    assert [line.split(",")[0] for line in lines[1:-1]] == [str(k) for k in range(148)]
    assert len({line.split(",")[1] for line in lines[1:-1]}) > 100, "6 significant digits at least"


@pytest.mark.parametrize("value", ["nan", "101", "-1", "", "much"])
def test_a_rate_is_a_number_from_0_to_100(value):
    is_rate = pick(SCRIPT, "is_rate").is_rate
    assert is_rate("0") and is_rate("100") and not is_rate(value)


def line_of(table, number, change):
    lines = table.decode().split("\n")
    lines[number] = change(lines[number])
    return "\n".join(lines).encode()


def with_value(column, value):
    def change(line):
        fields = line.split(",")
        fields[column] = value
        return ",".join(fields)

    return change


FAULTS = {  # what happens to the training file, and what the sentence says
    "empty": (lambda table: b"", "cannot be read as a table"),
    "html": (lambda table: b"<!DOCTYPE html><html>no</html>", "1 columns, it begins with <!DOCTYPE html>"),
    "half": (lambda table: table[: len(table) // 2], "no usable number in row id"),
    "semicolons": (lambda table: table.replace(b",", b";"), "has not the 118 columns of the 2022 edition"),
    "edition": (
        lambda table: line_of(table, 0, lambda line: line.replace("cli", "flu")),
        "of the 2022 edition",
    ),
    "text": (lambda table: line_of(table, 8, with_value(50, "?")), "no usable number in row id 7, column"),
    "huge": (lambda table: line_of(table, 8, with_value(50, "1e30")), "no usable number in row id 7"),
    "id": (lambda table: line_of(table, 8, with_value(0, "0.5")), "no whole numbers or stand there twice"),
    "twice": (lambda table: line_of(table, 8, with_value(0, "3")), "no whole numbers or stand there twice"),
    "rate": (lambda table: line_of(table, 8, with_value(117, "130")), "not between 0 and 100"),
    "header only": (lambda table: table.split(b"\n")[0] + b"\n", "has 0 rows, at least 30 are needed"),
    "five rows": (lambda table: b"\n".join(table.split(b"\n")[:6]) + b"\n", "has 5 rows, at least 30"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_bad_table_ends_in_a_sentence(fault, tmp_path):
    """The reading cell alone, on the sample's own file with one fault."""
    names = ["read", "read_best", "COLUMNS", "DAY", "STATES"]
    space = pick(SCRIPT, *names, "Stop", "ROWS", pd=pd, np=np, say=print, JUDGE="https://judge")
    make = pick(SCRIPT, "make_sample", "COLUMNS", "DAY", "STATES", np=np, PROFILE="tiny").make_sample
    make(tmp_path, tmp_path)
    good, bad = tmp_path / "covid.train.csv", tmp_path / "covid.train (1).csv"
    spoil, sentence = FAULTS[fault]
    bad.write_bytes(spoil(good.read_bytes()))
    paths = {"train": [bad]}
    space.read_best.__globals__["PATHS"] = paths
    with pytest.raises(space.Stop) as stop:
        space.read_best("train", 118, 30)
    assert sentence in str(stop.value) and "covid.train (1).csv" in str(stop.value)
    paths["train"].append(good)  # a good file beside it is taken
    assert len(space.read_best("train", 118, 30)[0]) == 444


def test_swapped_files_and_an_empty_test_file_end_in_a_sentence(run, real):
    train, test = (real / f"covid.{part}.csv" for part in ("train", "test"))
    header = test.read_bytes().split(b"\n")[0] + b"\n"
    for files, sentence in (((test, train), "seem to be swapped"), ((train, None), "has 0 rows, at least 1")):
        contents = [path.read_bytes() if path else header for path in files]
        before = [path.read_bytes() for path in (train, test)]
        train.write_bytes(contents[0]), test.write_bytes(contents[1])
        one_sentence(run(SCRIPT, HW_DATA="real", HW_DATA_DIR=real).wait(), sentence, "covid.t")
        train.write_bytes(before[0]), test.write_bytes(before[1])


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_a_test_file_of_few_rows_is_answered(run, real, tmp_path, rows):
    path = real / "covid.test.csv"
    path.write_bytes(b"\n".join(path.read_bytes().split(b"\n")[: rows + 1]) + b"\n")
    done = run(SCRIPT, HW_DATA="real", HW_DATA_DIR=real).wait()
    assert done.code == 0, done.text
    assert len((tmp_path / "out/HW01/boss-real/pred.csv").read_text().splitlines()) == rows + 1


def test_constant_rates_are_learned_without_a_traceback(run, real):
    for path in real.iterdir():
        last = path.name == "covid.train.csv"
        lines = path.read_text().splitlines()
        changed = [lines[0]]
        for line in lines[1:]:
            fields = line.split(",")
            for column in (53, 69, 85, 101, *([117] if last else [])):
                fields[column] = "5.0"
            changed.append(",".join(fields))
        path.write_text("\n".join(changed) + "\n")
    done = run(SCRIPT, HW_DATA="real", HW_DATA_DIR=real, HW_LEVEL="strong").wait()
    assert done.code == 0 and "Traceback" not in done.text, done.text


def test_a_diverged_training_says_so(run, changed):
    wild = changed(SCRIPT, "(2e-5,", "(2e5,")
    one_sentence(run(wild, HW_LEVEL="simple").wait(), "diverged", "lower `rate`")


MUTANTS = [
    (
        'np.mean((guess - np.load(answers / "tested_positive.npy")) ** 2)',
        'np.mean(np.abs(guess - np.load(answers / "tested_positive.npy")))',
    ),
    ("np.flatnonzero(learnable & ~unseen)", "np.flatnonzero(learnable)"),
    ('unseen = (third == k) if name == "chains" else check', "unseen = check"),
    ("best_decay = min(decays", "best_decay = max(decays"),
    ('return (net + line) / 2 if settings["ridge"] else net', "return net"),
    ("def predict(model, x):\n    model.eval()", "def predict(model, x):\n    model.train()"),
    ("past = [max(day - k, 0)", "past = [max(day - k + 1, 0)"),
    ("base, base_test = before, days[N:, 3, 15]", "base, base_test = before, days[N:, 2, 15]"),
    ("((on_day5[N:] - mean) / spread", "((on_day4[N:] - mean) / spread"),
    ("row, day = row[once], day[once]", "once = slice(None)"),
    ("(survey[:, :-1] - survey[:, 1:])", "(survey[:, :-1] + survey[:, 1:])"),
    ("best24 = np.argsort(-strength)[:24]", "best24 = np.argsort(strength)[:24]"),
    ('learnable = (day == 4) | (settings["windows"] == "days 4 and 5")', "learnable = day > 0"),
    (
        "torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=decay)",
        "torch.optim.AdamW(model.parameters(), lr=rate)",
    ),
    ("            scheduler.step()\n", ""),
    ("zip(test_id, prediction)", "zip(sorted(test_id), prediction)"),
    ("return 0 <= float(text) <= 100", "return float(text) is not None"),
    ("(ids != values[:, 0]).any() or len(set(ids)) < len(ids)", "False"),
    ("for k in range(3)]\n    if not learnable", "for k in range(2)]\n    if not learnable"),
    (
        "rate, before = days[row, day, 15], days[row, day - 1, 15]",
        "rate, before = days[row, day, 15], days[row, day - 2, 15]",
    ),
]
