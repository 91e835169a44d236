"""HW01's own invariants."""

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import TESTS
from notebooks import pick

SCRIPT = TESTS.parent / "HW01" / "HW01.py"
DAYS = np.random.default_rng(0).normal(size=(50, 5, 16))


@pytest.fixture
def parts():
    return pick(SCRIPT, "window", "find_chains")


def test_beats_a_constant_answer(straight):
    """The best constant guess on the hidden answers, which a tiny boss run must beat by far."""
    result, _, folder = straight
    answers = np.load(folder / "data" / "HW01-sample" / "tiny" / "answers" / "tested_positive.npy")
    assert result["score"] < 0.1 * np.var(answers)


def test_window_never_sees_the_day_it_guesses(parts):
    for day in (3, 4):
        for history in (3, 4):
            spoiled = DAYS.copy()
            spoiled[:, day, 15] = np.nan  # the answer
            spoiled[:, day + 1 :] = np.nan  # the future
            for part in parts.window(spoiled, day, history):
                assert np.isfinite(part).all()


def test_windows_of_both_days_have_the_same_columns_in_the_same_order(parts):
    survey, positive = parts.window(DAYS, 4, 3)
    assert (survey[:, 0] == DAYS[:, 4, :15]).all() and (positive[:, 0] == DAYS[:, 3, 15]).all()
    shifted_survey, shifted_positive = parts.window(np.roll(DAYS, -1, axis=1), 3, 3)
    assert (survey == shifted_survey).all() and (positive == shifted_positive).all()


def test_chains_link_rows_that_share_a_day_of_one_state(parts):
    series = np.random.default_rng(1).normal(size=(9, 16))
    rows = np.stack([series[0:5], series[4:9], DAYS[0], series[2:7]])
    assert list(parts.find_chains(rows, np.array([3, 3, 3, 3]))) == [0, 0, 1, 0]
    assert list(parts.find_chains(rows, np.array([3, 5, 3, 5]))) == [0, 1, 2, 1]


@pytest.mark.parametrize("processes", [1, 2, 3, 8])
def test_every_process_count_gives_the_rows_in_order(processes):
    """Seven rows on three processes do not come out even; the gathered guesses must."""
    rows, shares = torch.arange(7.0)[:, None], []

    class Row(torch.nn.Module):
        weights = [torch.zeros(2, 1, 1)]  # two nets

        def forward(self, x):
            return x[..., 0]

    class Processes:
        num_processes, process_index = processes, 0

        def gather(self, guess):
            shares.append(guess)
            return torch.cat(shares)

    one = Processes()
    predict = pick(
        SCRIPT, "predict", torch=torch, device="cpu", bare=lambda net: net, accelerator=one
    ).predict
    for one.process_index in range(processes):
        guess = predict(Row(), rows)
    assert guess.tolist() == [list(range(7))] * 2


def test_ids_are_no_feature_of_the_boss(run, straight, changed, tmp_path):
    """Other ids in the files: the predictions, row by row, stay the same."""
    data = straight[2] / "data" / "HW01-sample" / "tiny" / "data"
    (tmp_path / "given").mkdir()
    dice = np.random.default_rng(0)
    for name in ("covid.train.csv", "covid.test.csv"):
        lines = (data / name).read_text().splitlines()
        ids = dice.permutation(len(lines) - 1)
        mixed = [f"{k},{line.split(',', 1)[1]}" for k, line in zip(ids, lines[1:], strict=True)]
        (tmp_path / "given" / name).write_text("\n".join([lines[0], *mixed]) + "\n")
    guesses = []
    for folder in (data, tmp_path / "given"):
        cut = changed(SCRIPT, "if REAL and PROFILE", "if False and PROFILE")
        done = run(cut, HW_DATA="real", HW_DATA_DIR=folder, HW_RESUME="false").wait()
        assert done.code == 0, done.text
        guesses.append(pd.read_csv(tmp_path / "out/HW01/boss-real/pred.csv"))
    assert (guesses[0]["tested_positive"] == guesses[1]["tested_positive"]).all()
    assert (guesses[0]["id"] != guesses[1]["id"]).any()


def test_submission_has_the_test_ids_in_order(straight):
    result, submission, folder = straight
    lines = submission.decode().split("\n")
    assert lines[0] == "id,tested_positive" and lines[-1] == ""
    assert [line.split(",")[0] for line in lines[1:-1]] == [str(k) for k in range(148)]
    assert all(0 <= float(line.split(",")[1]) <= 100 for line in lines[1:-1])
    assert len({line.split(",")[1] for line in lines[1:-1]}) > 100, "6 significant digits at least"


@pytest.mark.parametrize("fault", ["header", "missing", "nan", "order", "blank", "large"])
def test_validator_rejects(straight, fault, tmp_path):
    lines = straight[1].decode().split("\n")
    lines = {
        "header": ["id,positive", *lines[1:]],
        "missing": [*lines[:5], *lines[6:]],
        "nan": [*lines[:5], lines[5].split(",")[0] + ",nan", *lines[6:]],
        "order": [lines[0], lines[2], lines[1], *lines[3:]],
        "blank": [*lines[:5], "", *lines[5:]],
        "large": [*lines[:5], lines[5].split(",")[0] + ",101", *lines[6:]],
    }[fault]
    path = tmp_path / "pred.csv"
    path.write_text("\n".join(lines))
    check = pick(SCRIPT, "check_submission", "Stop", test_id=np.arange(148))
    with pytest.raises(check.Stop, match="pred.csv"):
        check.check_submission(path)
    path.write_bytes(straight[1])
    check.check_submission(path)


def test_three_validations_are_printed_and_kept(straight):
    result, _, folder = straight
    assert set(result["validation"]) == {"random", "grouped", "day 4"}
    for word in ("validation", "random", "grouped", "day 4", "yesterday's rate", "ridge", "rows/s"):
        assert word in (folder / "run.log").read_text()


def test_figures_of_the_report(straight):
    folder = straight[2] / "out" / "HW01" / "boss-sample"
    names = {"data", "shift", "curves", "validation", "features", "sweep", "errors"}
    assert {path.stem for path in (folder / "figures").iterdir()} == names
    assert len((folder / "history.csv").read_text().splitlines()) == 21


def test_a_diverged_training_says_so(run, changed, tmp_path):
    wild = changed(SCRIPT, 'columns="positive rates", lr=1e-3', 'columns="positive rates", lr=1e30')
    ended = run(wild, HW_LEVEL="medium").wait()
    assert ended.code == 1 and "diverged" in ended.text and "Traceback" not in ended.text
