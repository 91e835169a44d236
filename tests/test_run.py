"""Every notebook and every script runs, alone, offline, at every level, and ends in a valid submission."""

import os
import subprocess
import sys

import numpy as np
import pytest
from conftest import one_sentence, outcome
from notebooks import facts, ideas_of, read_script, second_edition
from runner import environment, ranks

# What two processes do to a submission: "equal" up to the last digits (for all not named here), or in
# words why they cannot be compared; those are run at strong.
TWO = {
    "toy": "each process draws its own dropout",
    "HW02": "each process draws its own batches and dropout",
    "HW03": "batch norm sees each process's own share of a batch",
    "HW04": "each process draws its own segments and dropout",
    "HW05": "each process draws its own dropout",
    "HW07": "each process sums the gradients of its own share",
    "HW08": "batch norm sees each process's own share of a batch",
    "HW10": "batch norm sees each process's own share of a batch",
    "HW11": "batch norm sees each process's own share of a batch",
    "HW13": "batch norm sees each process's own share of a batch",
    "HW14": "its file is a report of its run",
    "HW15": "each process draws its own tasks",
}


def test_lone_notebook_runs_offline(notebook):
    executed, folder = notebook
    result, submission = outcome(folder)
    assert submission and result["score"] is not None
    assert result["level"] == "boss" and result["profile"] == "tiny"
    counts = [cell.execution_count for cell in executed.cells if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1))


@pytest.mark.parametrize("level", ["simple", "medium", "strong"])
def test_every_level_runs(run, script, hw, level, tmp_path):
    if level == "strong" and hw in TWO:
        pytest.skip("two processes run it")
    done = run(script, HW_LEVEL=level).wait()
    assert done.code == 0, done.text
    result, submission = outcome(tmp_path)
    assert result["level"] == level and result["score"] is not None and submission
    expected = {"hw", "level", "data", "profile", "metric", "score", "valid_score", "parameters", "seed"}
    assert expected | {"examples_per_second", "seconds", "device", "torch", "settings"} <= set(result)
    if level == "simple":  # that one seed gives one submission, the tests of the kills show
        assert run(script, HW_LEVEL=level, HW_SEED=7).wait().code == 0
        assert outcome(tmp_path)[1] != submission, "another seed changes nothing"


def test_each_idea_can_be_switched_off(run, script, straight, tmp_path):
    """All at once; what is off, and nothing else, has another value."""
    if not second_edition(read_script(script)):
        one_sentence(run(script, HW_WITHOUT="dropout").wait(), "no table of ideas yet")
        return
    names, boss = ideas_of(script), straight[0]["settings"]
    together = run(script, HW_WITHOUT=",".join(names)).wait()
    assert together.code == 0, together.text
    result, _ = outcome(tmp_path)
    assert {name for name in boss if boss[name] != result["settings"][name]} == {*names}
    assert result["without"] == sorted(names)


def answers(submission):
    """The items of a text submission: numbers as numbers."""
    rows = [line.rsplit(b",", 1) for line in submission.splitlines()[1:]]
    try:
        return [row[0] for row in rows], np.array([float(row[-1]) for row in rows])
    except ValueError:
        return [row[0] for row in rows], np.array([row[-1] for row in rows])


def test_two_processes_make_one_submission(script, hw, straight, tmp_path):
    """gloo on the CPU: every test item once, one file, the same answers as one process where that is due."""
    due = TWO.get(hw, "equal")
    level = "boss" if due == "equal" else "strong"
    first, second = (one.wait() for one in ranks(script, tmp_path, HW_LEVEL=level))
    assert (first.code, second.code) == (0, 0), first.text + second.text
    assert not (tmp_path / "offline.log").exists(), (tmp_path / "offline.log").read_text()
    assert "on 2 x cpu" in first.text and first.text.count("is valid") == 1
    assert second.text == "", "only the main process speaks"
    assert not list(tmp_path.glob("out/**/*.part"))
    result, submission = outcome(tmp_path)
    assert result["level"] == level and result["score"] is not None
    if hw == "HW05":  # lines of text, without ids
        assert submission.count(b"\n") == straight[1].count(b"\n")
        return
    if b"\0" in submission or submission.startswith(b"{"):  # no table
        assert due != "equal" or submission == straight[1]
        return
    (names, values), (alone_names, alone) = answers(submission), answers(straight[1])
    assert names == alone_names and len(values) == len(alone)
    if due == "equal" and values.dtype.kind == "f":
        np.testing.assert_allclose(values, alone, rtol=1e-3, atol=1e-5)
    elif due == "equal":
        assert (values == alone).mean() > 0.99


@pytest.mark.common
def test_plain_python(script, straight, tmp_path):
    """Once without the test's own runner: `python TOY.py` in an empty folder."""
    env = environment(HW_PROFILE="tiny", HW_DATA="sample", OFFLINE_LOG=tmp_path / "offline.log")
    subprocess.run([sys.executable, str(script)], cwd=tmp_path, env=env, check=True)
    assert outcome(tmp_path)[1] == straight[1]
    assert sorted(os.listdir(tmp_path)) == ["data", "out"]


@pytest.mark.common
def test_torchrun(script, tmp_path):
    """Once as a cluster starts it."""
    wanted = {"HW_PROFILE": "tiny", "HW_DATA": "sample", "HW_LEVEL": "simple", "ACCELERATE_USE_CPU": "true"}
    env = environment(OFFLINE_LOG=tmp_path / "offline.log", **wanted)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run([*command, str(script)], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "on 2 x cpu" in done.stdout and done.stdout.count("is valid") == 1
    assert outcome(tmp_path)[0]["score"] is not None


def test_facts(script):
    """What the common cells read is there, and NEEDS names packages that are installed here."""
    known = facts(script)
    assert {
        "NEEDS",
        "OWN",
        "LESS_MEMORY",
        "MIXED_PRECISION",
        "MIRRORS",
        "HASHES",
        "SLUG",
        "JUDGE",
    } <= known.keys()
    assert len(known["OWN"]) <= 3 or not second_edition(read_script(script))
    assert "kagglehub" not in known["NEEDS"] and {"torch", "filelock"} <= {*known["NEEDS"]}
