"""Every notebook and every script runs, alone, offline, at every level, and ends in a valid submission."""

import os
import subprocess
import sys

import pytest
from conftest import outcome
from runner import environment


def test_lone_notebook_runs_offline(notebook, straight):
    executed, folder = notebook
    result, submission = outcome(folder)
    assert result["score"] is not None and result["level"] == "boss" and result["profile"] == "tiny"
    counts = [cell.execution_count for cell in executed.cells if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1))
    assert submission == straight[1], "script and notebook give different submissions"


@pytest.mark.parametrize("level", ["simple", "medium", "strong"])
def test_every_level_runs(run, script, hw, level, tmp_path):
    done = run(script, HW_LEVEL=level).wait()
    assert done.code == 0, done.text
    result, submission = outcome(tmp_path)
    assert result["level"] == level and result["score"] is not None and submission
    expected = {"hw", "level", "data", "profile", "metric", "score", "valid_score", "parameters", "seed"}
    assert expected | {"examples_per_second", "seconds", "device", "torch"} <= set(result)


def test_two_runs_with_one_seed_are_equal_and_another_seed_differs(run, script, hw, straight, tmp_path):
    assert run(script).wait().code == 0
    assert outcome(tmp_path)[1] == straight[1]
    assert run(script, HW_SEED=7).wait().code == 0
    assert outcome(tmp_path)[1] != straight[1]


def test_two_processes_make_one_submission(script, hw, straight, tmp_path):
    """gloo on the CPU: every test item once, one file, the same items in the same order."""
    wanted = {"HW_PROFILE": "tiny", "HW_DATA": "sample", "ACCELERATE_USE_CPU": "true"}
    env = environment(OFFLINE_LOG=tmp_path / "offline.log", **wanted)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run([*command, str(script)], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert not (tmp_path / "offline.log").exists(), (tmp_path / "offline.log").read_text()
    assert done.stdout.count("is valid") == 1, "only the main process speaks"
    result, submission = outcome(tmp_path)
    if b"\0" not in submission:  # a text has a line an item
        assert len(submission.splitlines()) == len(straight[1].splitlines())
    assert result["score"] is not None
    assert not list(tmp_path.glob("out/**/*.part"))


@pytest.mark.common
def test_plain_python(script, hw, straight, tmp_path):
    """Once without the test's own runner: `python HW01.py` in an empty folder."""
    env = environment(HW_PROFILE="tiny", HW_DATA="sample", OFFLINE_LOG=tmp_path / "offline.log")
    subprocess.run([sys.executable, str(script)], cwd=tmp_path, env=env, check=True)
    assert outcome(tmp_path)[1] == straight[1]
    assert sorted(os.listdir(tmp_path)) == ["data", "out"]
