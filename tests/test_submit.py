"""Sending the file, with a stub in the place of Kaggle's client, and what happens to a bad file."""

import os
import shutil

import pytest

pytestmark = pytest.mark.common
STUB = """#!/bin/sh
echo "$@" >> "{log}"
exit {code}
"""


def with_stub(tmp_path, code):
    stub = tmp_path / "bin" / "kaggle"
    stub.parent.mkdir()
    stub.write_text(STUB.format(log=tmp_path / "kaggle.log", code=code))
    stub.chmod(0o755)
    return {"PATH": f"{stub.parent}{os.pathsep}{os.environ['PATH']}"}


@pytest.fixture
def as_real(straight, tmp_path):
    """The sample's files where real files are expected."""
    shutil.copytree(straight[2] / "data" / "HW01-sample" / "tiny" / "data", tmp_path / "real")
    return {"HW_DATA": "real", "HW_DATA_DIR": tmp_path / "real", "HW_LEVEL": "medium"}


def test_submit_sends_the_file(run, script, hw, as_real, tmp_path):
    done = run(script, HW_SUBMIT="true", **as_real, **with_stub(tmp_path, 0)).wait()
    assert done.code == 0, done.text
    wanted = "competitions submit ml2022spring-hw1 -f out/HW01/medium-real/pred.csv -m HW01 medium"
    assert (tmp_path / "kaggle.log").read_text().strip() == wanted
    assert (tmp_path / "out/HW01/medium-real/pred.csv").exists()


def test_a_refusal_is_said_and_the_file_stays(run, script, hw, as_real, tmp_path):
    ended = run(script, HW_SUBMIT="true", **as_real, **with_stub(tmp_path, 1)).wait()
    assert ended.code == 1 and "Kaggle did not take" in ended.text and "upload it at https" in ended.text
    assert "Traceback" not in ended.text
    assert (tmp_path / "out/HW01/medium-real/pred.csv").exists()


def test_without_submit_the_command_is_printed(run, script, hw, as_real, tmp_path):
    done = run(script, **as_real, **with_stub(tmp_path, 0)).wait()
    assert done.code == 0 and "kaggle competitions submit ml2022spring-hw1" in done.text
    assert not (tmp_path / "kaggle.log").exists()


def test_the_sample_is_never_sent(run, script, hw, tmp_path):
    done = run(script, HW_SUBMIT="true", HW_LEVEL="medium", **with_stub(tmp_path, 0)).wait()
    assert done.code == 0 and not (tmp_path / "kaggle.log").exists()
    assert (tmp_path / "out/HW01/medium-sample/pred.sample.csv").exists()


def test_a_bad_file_is_rejected_and_set_aside(run, script, hw, changed, tmp_path):
    short = changed(script, "zip(test_id, prediction)", "zip(test_id[1:], prediction)")
    ended = run(short, HW_LEVEL="medium").wait()
    assert ended.code == 1 and "must have the 148 ids" in ended.text and "Traceback" not in ended.text
    folder = tmp_path / "out/HW01/medium-sample"
    assert not (folder / "pred.sample.csv").exists() and (folder / "pred.sample.csv.rejected").exists()
    assert not (folder / "result.json").exists()
