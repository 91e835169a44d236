"""A run can be stopped at any moment, in any way: the next one ends in the same bytes."""

import os
import random
import signal

import pytest
from conftest import outcome

SPOIL = """
import os, pathlib
real, count = pathlib.Path.write_bytes, 0
def write_bytes(path, data):
    global count
    if path.name.endswith(".pt.part"):
        count += 1
        if count == {number}:
            real(path, bytes(data)[: len(bytes(data)) // 2])
            {end}
    return real(path, data)
pathlib.Path.write_bytes = write_bytes
"""
KILL = "os.kill(os.getpid(), 9)"
FULL = "raise OSError(28, 'No space left on device', str(path))"


def checkpoints(folder):
    return sorted(path for path in folder.glob("out/*/*/checkpoint/*") if path.suffix == ".pt")


def finish(run, script, straight, tmp_path):
    """Run to the end and compare with the undisturbed run."""
    last = run(script).wait()
    assert last.code == 0, last.text
    assert outcome(tmp_path)[1] == straight[1]
    assert not list(tmp_path.glob("**/*.part"))
    return last


def test_killed_after_the_first_checkpoint(run, script, hw, straight, tmp_path):
    first = run(script)
    assert first.until(lambda: checkpoints(tmp_path)), first.text
    os.kill(first.process.pid, signal.SIGKILL)
    assert first.wait().code == -signal.SIGKILL
    assert "going on after" in finish(run, script, straight, tmp_path).text


@pytest.mark.parametrize("number", [1, 3])
def test_killed_in_the_middle_of_a_checkpoint(run, script, hw, straight, tmp_path, number):
    first = run(script, patch=SPOIL.format(number=number, end=KILL)).wait()
    assert first.code == -signal.SIGKILL, first.text
    assert len(list(tmp_path.glob("out/**/*.pt.part"))) == 1, "it was not in the middle"
    assert ("going on after" in finish(run, script, straight, tmp_path).text) == (number > 1)


@pytest.mark.common
def test_killed_at_random_moments(run, script, hw, straight, tmp_path):
    """The short version of tests/tools/kills.py."""
    dice = random.Random(hw)
    for _ in range(3):
        run(script).kill_after(dice.random() * straight[0]["seconds"])
    finish(run, script, straight, tmp_path)


@pytest.mark.common
def test_resume_after_the_last_epoch_trains_nothing(run, script, hw, straight, tmp_path):
    finish(run, script, straight, tmp_path)
    before = {path: path.read_bytes() for path in checkpoints(tmp_path)}
    finish(run, script, straight, tmp_path)
    assert before == {path: path.read_bytes() for path in checkpoints(tmp_path)}


@pytest.mark.common
def test_full_disk_keeps_the_last_checkpoint(run, script, hw, straight, tmp_path):
    first = run(script, patch=SPOIL.format(number=3, end=FULL)).wait()
    assert first.code == 1 and "No space left on device" in first.text and "Traceback" not in first.text
    assert checkpoints(tmp_path) and not list(tmp_path.glob("out/**/*.part"))
    assert "going on after" in finish(run, script, straight, tmp_path).text


@pytest.mark.common
def test_ctrl_c_ends_in_one_sentence(run, script, hw, straight, tmp_path):
    first = run(script)
    assert first.until(lambda: checkpoints(tmp_path)), first.text
    os.kill(first.process.pid, signal.SIGINT)
    assert first.wait().code == 1
    assert "Stopped by hand" in first.text and "Traceback" not in first.text
    finish(run, script, straight, tmp_path)


@pytest.mark.common
@pytest.mark.parametrize("spoiled", [b"", b"nonsense", None], ids=["empty", "nonsense", "truncated"])
def test_damaged_checkpoint_is_set_aside(run, script, hw, straight, tmp_path, spoiled):
    finish(run, script, straight, tmp_path)
    for path in checkpoints(tmp_path):
        path.write_bytes(path.read_bytes()[:1000] if spoiled is None else spoiled)
    text = finish(run, script, straight, tmp_path).text
    assert "is set aside" in text and "damaged" in text
    assert list(tmp_path.glob("out/*/*/checkpoint/*.set-aside"))


@pytest.mark.common
def test_checkpoint_of_other_parameters_is_set_aside(run, script, hw, straight, tmp_path):
    assert run(script, HW_SEED=7).wait().code == 0
    assert "it has other parameters" in finish(run, script, straight, tmp_path).text


@pytest.mark.common
def test_resume_off_starts_anew(run, script, hw, straight, tmp_path):
    finish(run, script, straight, tmp_path)
    again = run(script, HW_RESUME="false").wait()
    assert again.code == 0 and "RESUME is off" in again.text
    assert outcome(tmp_path)[1] == straight[1]


@pytest.mark.common
def test_output_folder_that_cannot_be_written(run, script, hw, tmp_path):
    (tmp_path / "out").write_text("a file where the folder should be")
    ended = run(script).wait()
    assert ended.code == 1 and "OUT_DIR" in ended.text and "Traceback" not in ended.text
