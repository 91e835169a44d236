"""What is accepted as a submission, and sending it, with a stub in the place of Kaggle's client."""

import os
import re
import shlex
import shutil
import signal
import sys
import time

import pytest
from conftest import TESTS, one_sentence
from notebooks import common_cells

pytestmark = pytest.mark.common
STUB = """
import pathlib, sys
pathlib.Path({log!r}).write_text(repr(sys.argv[1:]))
sys.exit({code})
"""


def with_stub(tmp_path, code, folder):
    """A package kaggle whose __main__ writes down what it is asked for."""
    stub = tmp_path / "stub" / "kaggle" / "__main__.py"
    stub.parent.mkdir(parents=True)
    stub.with_name("__init__.py").touch()
    stub.write_text(STUB.format(log=str(tmp_path / "kaggle.log"), code=code))
    return {"PYTHONPATH": f"{stub.parents[1]}{os.pathsep}{folder}"}


@pytest.fixture
def sent(tmp_path):
    """sent(code) -> environment in which the stub answers with that code."""
    return lambda code: with_stub(tmp_path, code, TESTS / "offline")


@pytest.fixture
def as_real(straight, tmp_path):
    """The sample's files where real files are expected."""
    shutil.copytree(straight[2] / "data/TOY-sample/tiny/data", tmp_path / "real")
    return {"HW_DATA": "real", "HW_DATA_DIR": tmp_path / "real", "HW_LEVEL": "medium"}


WANTED = ["competitions", "submit", "toy-slug", "-f", "out/my TOY/medium-real/toy.csv", "-m", "TOY medium"]


def test_submit_sends_the_file(run, script, as_real, sent, tmp_path):
    done = run(script, HW_SUBMIT="true", HW_OUT_DIR="out/my TOY", **as_real, **sent(0)).wait()
    assert done.code == 0, done.text
    assert (tmp_path / "kaggle.log").read_text() == repr(WANTED)
    assert (tmp_path / "out/my TOY/medium-real/toy.csv").exists()


def test_a_refusal_is_said_and_the_file_stays(run, script, as_real, sent, tmp_path):
    ended = run(script, HW_SUBMIT="true", **as_real, **sent(1)).wait()
    one_sentence(ended, "Kaggle did not take out/TOY/medium-real/toy.csv", "upload it at https")
    assert (tmp_path / "kaggle.log").exists()
    assert (tmp_path / "out/TOY/medium-real/toy.csv").exists()


def test_without_submit_a_command_is_printed_that_can_be_pasted(run, script, as_real, sent, tmp_path):
    done = run(script, HW_OUT_DIR="out/my TOY", **as_real, **sent(0)).wait()
    assert done.code == 0 and not (tmp_path / "kaggle.log").exists(), done.text
    command = re.search(r"or run: (.*)", done.text)[1]
    assert shlex.split(command) == [sys.executable, "-m", "kaggle", *WANTED]
    assert "only the judge knows" in done.text


def test_a_homework_without_kaggle(run, script, changed, as_real, sent, tmp_path):
    copy = changed(script, 'SLUG, JUDGE = "toy-slug",', "SLUG, JUDGE = None,")
    done = run(copy, HW_SUBMIT="true", **as_real, **sent(0)).wait()
    assert done.code == 0 and "Upload it at https" in done.text and "or run" not in done.text
    assert not (tmp_path / "kaggle.log").exists()


def test_the_sample_is_never_sent(run, script, sent, tmp_path):
    done = run(script, HW_SUBMIT="true", HW_LEVEL="medium", **sent(0)).wait()
    assert done.code == 0 and not (tmp_path / "kaggle.log").exists()
    assert "nothing is sent" in done.text
    assert (tmp_path / "out/TOY/medium-sample/toy.sample.csv").exists()


ROWS = '"\\n".join(["id,y", *rows]) + "\\n"'
FAULTS = {  # what is written instead, and what the sentence says
    "header": (ROWS.replace("id,y", "id,Y"), "must begin with the line id,y"),
    "no end": (ROWS.removesuffix(' + "\\n"'), "end with a line break"),
    "crlf": (ROWS.replace('"\\n"', '"\\r\\n"'), "must begin with the line id,y"),
    "missing": (ROWS.replace("*rows", "*rows[1:]"), "must have the 32 ids"),
    "duplicate": (ROWS.replace("*rows", "*rows[:-1], rows[0]"), "each once and in their order"),
    "reordered": (ROWS.replace("*rows", "*rows[::-1]"), "each once and in their order"),
    "extra": (ROWS.replace("*rows", '*rows, "32,1"'), "must have the 32 ids"),
    "blank": (ROWS.replace("*rows", '*rows[:5], "", *rows[5:]'), "must have the 32 ids"),
    "float id": (ROWS.replace("*rows", '"0.0,1", *rows[1:]'), "must have the 32 ids"),
    "nan": (ROWS.replace("*rows", '"0,nan", *rows[1:]'), r"id 0 has \['nan'\], but needs a number below 100"),
    "large": (ROWS.replace("*rows", '"0,100", *rows[1:]'), "needs a number below 100"),
    "no value": (ROWS.replace("*rows", '"0", *rows[1:]'), r"id 0 has \[\], but needs a number"),
    "two values": (ROWS.replace("*rows", '"0,1,2", *rows[1:]'), r"id 0 has \['1,2'\], but needs"),
}


@pytest.fixture(scope="module")
def trained(script, tmp_path_factory):
    """A finished run, whose copy the next one goes on from."""
    from runner import Run

    folder = tmp_path_factory.mktemp("trained")
    assert Run(script, folder, HW_LEVEL="simple").wait().code == 0
    return folder


@pytest.mark.parametrize("fault", FAULTS)
def test_a_bad_file_is_rejected_and_set_aside(run, script, changed, trained, tmp_path, fault):
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    folder = tmp_path / "out/TOY/simple-sample"
    (folder / "result.json").unlink()
    instead, sentence = FAULTS[fault]
    ended = run(
        changed(script, f"part.write_text({ROWS})", f"part.write_bytes(({instead}).encode())"),
        HW_LEVEL="simple",
    )
    one_sentence(ended.wait(), "toy.sample.csv", sentence)
    assert not (folder / "toy.sample.csv").exists() and (folder / "toy.sample.csv.rejected").exists()
    assert not (folder / "result.json").exists()


def check_table(*arguments):
    space = {"Stop": ValueError}
    text = common_cells()["common:submit"].source
    exec(re.search(r"def check_table\(.*?\n\n\n", text, re.DOTALL)[0], space)
    space["check_table"](*arguments)


def test_no_test_data_and_ids_that_are_there_twice(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("id,y\n")
    with pytest.raises(ValueError, match="the 0 ids of the test data"):
        check_table(path, "id,y", [], str.isdigit, "a digit")
    path.write_text("id,y\na,1\na,1\n")
    with pytest.raises(ValueError, match="each once"):
        check_table(path, "id,y", ["a", "a"], str.isdigit, "a digit")
    path.write_text("id,y\na,1\nb,2\n")
    check_table(path, "id,y", ["a", "b"], str.isdigit, "a digit")


def test_a_test_file_without_rows(run, script, straight, tmp_path):
    shutil.copytree(straight[2] / "data/TOY-sample/tiny/data", tmp_path / "real")
    (tmp_path / "real" / "toy.test.csv").write_text("id,x\n")
    one_sentence(run(script, HW_DATA="real", HW_DATA_DIR="real").wait(), "toy.test.csv is not a table")


def test_a_result_is_never_half_written(run, script, tmp_path):
    assert run(script).wait().code == 0
    path = tmp_path / "out/TOY/boss-sample/result.json"
    before = path.read_bytes()
    spoil = "import os, pathlib\nreal = pathlib.Path.write_text\ndef write_text(path, text):\n"
    spoil += "    if 'result.json' in path.name:\n        real(path, text[:99])\n        os._exit(9)\n"
    spoil += "    return real(path, text)\npathlib.Path.write_text = write_text"
    assert run(script, patch=spoil).wait().code == 9
    assert path.read_bytes() == before
    assert run(script).wait().code == 0 and not list(tmp_path.rglob("*.part"))


HOLD = ("nets = [train", 'while not Path("go").exists():\n    time.sleep(0.01)\nnets = [train')


def test_a_second_run_on_one_folder_stops_with_a_sentence(run, script, changed, tmp_path):
    """And it may begin when the first has ended, or was killed."""
    waits = changed(script, *HOLD)
    first = run(waits, log="first.log")
    assert first.until(lambda: "settings:" in first.text), first.text
    one_sentence(run(script).wait(), "Another run or open notebook is at work in out/TOY/boss-sample: end it")
    assert run(script, HW_LEVEL="medium").wait().code == 0
    os.kill(first.process.pid, signal.SIGKILL)
    first.wait()
    assert run(script).wait().code == 0
    (tmp_path / "go").touch()
    assert first.code == -9 and run(waits).wait().code == 0


def test_the_folder_is_given_back_at_the_end(run, script, changed, tmp_path):
    """A notebook stays open after its last cell: the next run needs not wait for that."""
    stays = tmp_path / "stays.py"
    stays.write_text(script.read_text() + '\nwhile not Path("go").exists():\n    time.sleep(0.01)\n')
    first = run(stays, log="first.log")
    assert first.until(lambda: "result: " in first.text), first.text
    time.sleep(0.1)
    assert first.process.is_alive() and run(script).wait().code == 0
    (tmp_path / "go").touch()
    assert first.wait().code == 0


MUTANTS = [
    ("if lines[0] != header or lines[-1]:", "if lines[0] != header:"),
    ("if lines[0] != header or lines[-1]:", "if lines[-1]:"),
    ("if not ids or [row[0] for row in rows] != ids or", "if [row[0] for row in rows] != ids or"),
    ("[row[0] for row in rows] != ids", "sorted(row[0] for row in rows) != sorted(ids)"),
    ("[row[0] for row in rows] != ids", "{row[0] for row in rows} != {*ids}"),
    ("[row[0] for row in rows] != ids", "False"),
    (" or len(set(ids)) < len(ids)", ""),
    ("if len(row) < 2 or not good(row[1]):", "if len(row) < 2:"),
    ("check_submission(submission)  #", "pass  #"),
    ('submission.replace(f"{submission}.rejected")', "pass"),
    ("    if not REAL:", "    if False:"),
    ("elif not SUBMIT or not SLUG:", "elif not SLUG:"),
    ("shlex.join(command)", "' '.join(command)"),
    ('[sys.executable, "-m", "kaggle", ', '["kaggle", '),
    ("elif subprocess.call(command):", "elif subprocess.call(command) > 1:"),
    ('hold(OUT / "run", wait=False)', 'hold(OUT / f"run{os.getpid()}", wait=False)'),
    ("    LOCK.release(force=True)", "    pass"),
    (
        '    with aside(OUT / "result.json") as part:\n        part.',
        '    if True:\n        (OUT / "result.json").',
    ),
]
