"""Parameters from outside, folders, packages, and the sentence that every mistake ends in."""

import fcntl
import json
import os
import pty
import struct
import termios
import threading

import nbformat
import pytest
from conftest import TESTS, execute, one_sentence, outcome
from runner import ranks

pytestmark = pytest.mark.common
WRONG = {
    "LEVL=boss": r"HW_LEVL is no parameter of TOY; these are: HW_WITHOUT, HW_DATA_DIR, .*HW_ROUNDS",
    "LEVEL=bos": r"LEVEL is 'bos', but must be one of \('simple', 'medium', 'strong', 'boss'\)",
    "DATA=none": r"DATA is 'none', but must be one of",
    "PROFILE=big": r"PROFILE is 'big', but must be one of \('auto', 'full', 'small', 'tiny'\)",
    "SEED=one": r"SEED is 'one', but must be from 0 to 4294967295",
    "SEED=-1": r"SEED is -1, but must be from 0 to",
    "SEED=--1": r"SEED is '--1', but must be from 0 to",
    "SEED=true": r"SEED is True, but must be from 0 to",
    "SEED=": r"SEED is '', but must be from 0 to",
    "RESUME=perhaps": r"RESUME is 'perhaps', but must be one of \(True, False\)",
    "RESUME=1": r"RESUME is 1, but must be one of \(True, False\)",
    "ROUNDS=-1": r"ROUNDS is -1, but must be from 1 to 99",
    "ROUNDS=2.5": r"ROUNDS is 2.5, but must be from 1 to 99",
    "MODE=1": r"MODE is '1', but must be one of \('plain', 'fancy'\)",
    "WITHOUT=drpout": r"WITHOUT = 'drpout' switches nothing off at level boss; ideas: hidden, dropout",
    "WITHOUT=dropout,,x": r"WITHOUT = 'x' switches nothing off",
}


@pytest.mark.parametrize("wrong", WRONG)
def test_bad_parameters_end_in_one_sentence(run, script, wrong, tmp_path):
    name, value = wrong.split("=")
    one_sentence(run(script, **{f"HW_{name}": value}).wait(), WRONG[wrong])
    assert not list(tmp_path.glob("out/**/*.*s*v")) and not list(tmp_path.glob("out/**/*.pt"))


def test_a_form_that_was_edited_badly(run, script, changed):
    """The same check holds for what stands in the cell itself."""
    one_sentence(run(changed(script, "ROUNDS = 1 ", 'ROUNDS = "many" ')).wait(), "ROUNDS is 'many'")


def test_nothing_to_switch_off_at_simple(run, script):
    one_sentence(run(script, HW_LEVEL="simple", HW_WITHOUT="hidden").wait(), "'hidden' switches nothing off")


def test_parameters_are_taken(run, script, tmp_path):
    wanted = {"HW_LEVEL": "medium", "HW_OUT_DIR": tmp_path / "else where", "HW_SEED": 5, "HW_ROUNDS": 7}
    wanted |= {"HW_RATE": "0.25", "HW_RESUME": "False", "HW_MODE": "fancy"}
    done = run(script, **wanted).wait()
    assert done.code == 0, done.text
    assert "level medium, seed 5" in done.text and "RATE: 0.25\n" in done.text
    assert (tmp_path / "else where" / "medium-sample" / "result.json").exists()


def test_an_idea_falls_back_to_the_nearest_earlier_value_that_differs(run, script, tmp_path):
    done = run(script, HW_WITHOUT=" dropout, stages,bins").wait()
    assert done.code == 0, done.text
    result, _ = outcome(tmp_path)
    wanted = {"hidden": 16, "dropout": 0.0, "stages": 1, "bins": 5, "epochs": 4, "rate": 0.05, "steps": 3}
    assert result["settings"] == wanted and result["without"] == ["bins", "dropout", "stages"]
    assert [path.name for path in tmp_path.glob("out/TOY/boss*/")] == [
        "boss-sample-without-bins-dropout-stages"
    ]


@pytest.mark.parametrize("profile, real, wanted", [("small", 0, 200), ("full", 0, 250), ("auto", 1, 200)])
def test_profiles(run, script, changed, straight, profile, real, wanted):
    """The sizes only, without the training; `auto` is small where there is no GPU."""
    stop = changed(script, "nets = [train", "raise Stop(PROFILE)\nnets = [train")
    given = straight[2] / "data/TOY-sample/tiny/data"
    data = {"HW_DATA": "real", "HW_DATA_DIR": given} if real else {}
    ended = run(stop, HW_PROFILE=profile, **data).wait()
    one_sentence(ended, "TOY: small" if profile == "auto" else f"TOY: {profile}", f"'epochs': {wanted},")


HIDE = """
import importlib.util as u
real = u.find_spec
u.find_spec = lambda name, *rest: None if name == "accelerate" else real(name, *rest)
import subprocess
def call(command):
    print("asked for:", *command[1:])
    return 1
subprocess.call = call
"""


def test_a_missing_package_that_cannot_be_installed(run, script):
    ended = run(script, patch=HIDE).wait()
    one_sentence(ended, "pip install accelerate", "asked for: -m pip install -q accelerate")


def test_of_several_processes_none_installs(run, script):
    ended = run(script, patch=HIDE, WORLD_SIZE=2).wait()
    one_sentence(ended, "Install them by hand: pip install accelerate")
    assert "asked for" not in ended.text


def test_the_sample_needs_no_kaggle_client(run, script):
    """Offline, and without kagglehub: the first promise of every notebook."""
    done = run(script, patch="import sys\nsys.modules['kagglehub'] = None", HW_DATA="auto").wait()
    assert done.code == 0 and "data: SAMPLE" in done.text, done.text


def blocked(kind, tmp_path):
    if kind == "file":
        (tmp_path / "out").write_text("a file where the folder should be")
    if kind == "its own folder is a file":
        (tmp_path / "out" / "TOY").mkdir(parents=True)
        (tmp_path / "out" / "TOY" / "boss-sample").write_text("mine")
    if kind == "figures are a file":
        (tmp_path / "out" / "TOY" / "boss-sample").mkdir(parents=True)
        (tmp_path / "out" / "TOY" / "boss-sample" / "figures").write_text("mine")
    return {"too long": "x" * 300, "~": "~/no/where"}.get(kind, "out/TOY")


@pytest.mark.parametrize("kind", ["file", "its own folder is a file", "figures are a file", "too long"])
def test_impossible_out_dir_is_said_before_training(run, script, kind, tmp_path):
    one_sentence(run(script, HW_OUT_DIR=blocked(kind, tmp_path)).wait(), "cannot be written", "set|OUT_DIR")
    assert not list(tmp_path.rglob("*.pt"))


def test_a_tilde_is_the_home_folder(run, script, tmp_path):
    done = run(script, HW_OUT_DIR="~/mine", HW_DATA_DIR="~/data/", HOME=tmp_path / "home").wait()
    assert done.code == 0, done.text
    assert (tmp_path / "home/mine/boss-sample/result.json").exists() and not (tmp_path / "~").exists()
    assert (tmp_path / "home/data-sample/tiny/data").is_dir()


FULL = """
import os
real = os.fsync
def fsync(file):
    name = os.readlink(f"/proc/self/fd/{file.fileno() if hasattr(file, 'fileno') else file}")
    if name.endswith("WORD.part"):
        raise OSError(28, "No space left on device")
    return real(file)
os.fsync = fsync
"""


@pytest.mark.parametrize(
    "file", ["data.png", "pt", "toy.sample.csv", "worth.png", "history.csv", "result.json"]
)
def test_full_disk_names_the_file(run, script, file, tmp_path):
    ended = run(script, patch=FULL.replace("WORD", file)).wait()
    one_sentence(
        ended, rf"out/TOY/boss-sample/\S*{file} cannot be written \(No space left on device\)", "OUT_DIR"
    )
    assert not list(tmp_path.rglob("*.part")) and not list(tmp_path.rglob(file))


def test_full_disk_while_the_sample_is_made(run, script, tmp_path):
    spoil = "import pathlib\ndef write_text(path, text):\n    raise OSError(28, 'No space left on device')\n"
    ended = run(script, patch=spoil + "pathlib.Path.write_text = write_text").wait()
    one_sentence(ended, r"data/TOY-sample/tiny cannot be written \(No space left on device\)", "DATA_DIR")
    assert not list(tmp_path.rglob("*.csv")) and not list(tmp_path.rglob("*.part"))


STUDENT = {
    "PermissionError": "raise PermissionError(13, 'Permission denied', 'mine.txt')",
    "ValueError": "raise ValueError('of mine')",
    "FileNotFoundError": "open('mine.txt')",
}


@pytest.mark.parametrize("kind", STUDENT)
def test_a_students_own_error_keeps_its_line(run, script, changed, kind):
    for place in ("nets = [train", "    random = np.random.default_rng(0)"):
        if kind == "PermissionError" and place.startswith(" "):
            continue  # in make_sample: said as a folder that cannot be written
        indent = place[: len(place) - len(place.lstrip())]
        ended = run(changed(script, place, f"{indent}{STUDENT[kind]}  # mine\n{place}")).wait()
        assert ended.code == 1 and f"{kind}: " in ended.text and "Traceback" in ended.text
        assert "# mine" in ended.text and "another exception" not in ended.text, ended.text


def test_errors_in_a_notebook(script, tmp_path):
    """A Stop is one sentence; what a student did wrong keeps its traceback and its line."""
    book = nbformat.read(script.with_suffix(".ipynb"), as_version=4)
    setup = next(k for k, cell in enumerate(book.cells) if "common:setup" in cell.metadata.get("tags", []))
    book.cells = book.cells[: setup + 1]
    for line in ('raise Stop("Do {this}.")', "np.zeros(2)[3]  # mine", "raise KeyboardInterrupt"):
        cell = nbformat.v4.new_code_cell(line)
        cell.metadata["tags"] = ["raises-exception"]
        book.cells.append(cell)
    nbformat.write(book, tmp_path / "toy.ipynb")
    result = execute(tmp_path / "toy.ipynb")
    stop, own, by_hand = [cell.outputs[0] for cell in result.nb.cells[-3:]]
    assert stop.traceback == ["Do {this}."] and "Stopped by hand" in "".join(by_hand.traceback)
    assert own.ename == "IndexError" and "Traceback" in "".join(own.traceback)
    assert "# mine" in "".join(own.traceback)


def test_out_of_memory_names_what_helps(run, script, changed):
    wild = changed(script, "nets = [train", "raise torch.OutOfMemoryError('CUDA')\nnets = [train")
    one_sentence(run(wild).wait(), "The memory of the GPU is full: set ROUNDS to half")


def test_a_terminal_without_chinese_letters(run, script, changed):
    speaks = changed(script, 'say(f"{len(x)} rows', 'say("人工智慧 ±")\nsay(f"{len(x)} rows')
    done = run(speaks, PYTHONIOENCODING="cp1252").wait()
    assert done.code == 0 and "???? " in done.text, done.text


def test_nothing_is_named_twice_by_two_processes(script, tmp_path):
    """One speaks, one chooses the data, both know where it is; several spellings of "use the CPU"."""
    spell = {"ACCELERATE_USE_CPU": "True"}  # as accelerate launch --cpu does
    first, second = (one.wait() for one in ranks(script, tmp_path, **spell))
    assert (first.code, second.code) == (0, 0), first.text + second.text
    assert "on 2 x cpu" in first.text and second.text == "", second.text
    for word in ("data: SAMPLE", "is valid", "result: "):
        assert first.text.count(word) == 1
    assert "waiting" not in first.text


ON_RANK_1 = "import os, pathlib\nif os.environ['RANK'] == '1':\n"


def test_one_process_chooses_the_data_for_all(script, tmp_path):
    """Rank 1 never looks for data: it would find none in a place that only rank 0 may read."""
    spoil = "def rglob(path, pattern):\n        raise SystemExit('rank 1 looked for data')\n"
    spoil = ON_RANK_1 + f"    {spoil}    pathlib.Path.rglob = rglob"
    both = [one.wait() for one in ranks(script, tmp_path, patch=spoil)]
    assert [one.code for one in both] == [0, 0], both[1].text


def test_a_disk_that_is_not_shared_is_said(script, tmp_path):
    both = ranks(script, tmp_path, patch=ON_RANK_1 + "    pathlib.Path.exists = lambda path: False")
    both[1].wait()
    both[0].wait(0)
    assert both[1].code == 1 and "is not on this machine: put DATA_DIR on a disk" in both[1].text


BARS = 'for _ in tqdm(range(3), disable=QUIET, desc="moving"):\n    pass\n'


def test_bars_move_on_a_terminal_only(run, script, changed):
    bars, shown = changed(script, "nets = [train", f"{BARS}nets = [train"), []
    mine, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))

    def listen():
        try:
            while data := os.read(mine, 4096):
                shown.append(data)
        except OSError:
            pass  # the terminal was closed

    reader = threading.Thread(target=listen)
    reader.start()
    done = run(bars, log=os.ttyname(theirs)).wait()
    os.close(theirs)
    reader.join(10)
    assert done.code == 0 and b"moving: 100%" in b"".join(shown), shown
    assert "moving" not in run(bars, HW_RESUME="false").wait().text


def test_bars_move_on_one_process_only(script, changed, tmp_path):
    bars = changed(script, "nets = [train", f"{BARS}nets = [train")
    terminal = "import sys\nsys.stderr.isatty = lambda: True"
    first, second = (one.wait() for one in ranks(bars, tmp_path, patch=terminal))
    assert "moving" in first.text and second.text == ""


def test_result_says_what_was_run(straight):
    result, _, folder = straight
    wanted = {
        "hw",
        "level",
        "without",
        "data",
        "profile",
        "metric",
        "score",
        "valid_score",
        "parameters",
        "seed",
    }
    assert wanted | {"examples_per_second", "seconds", "device", "torch", "settings"} <= set(result)
    rows = (folder / "out/TOY/boss-sample/history.csv").read_text().splitlines()
    assert len(rows) == 9 and rows[0] == "stage,epoch,loss" and rows[-1].startswith("second,3,")
    assert (folder / "out/TOY/boss-sample/figures/worth.png").read_bytes()[:4] == b"\x89PNG"
    assert json.loads((folder / "out/TOY/boss-sample/result.json").read_text()) == result


def test_the_toy_is_made_of_the_common_cells(script):
    text = script.read_text()
    assert text.count('# %% tags=["common:') == 5 and "def load_checkpoint" in text
    assert "def load_checkpoint" not in (TESTS / "toy.py").read_text()


MUTANTS = [
    (
        'if missing and ("WORLD_SIZE" in os.environ or subprocess.call(install))',
        "if missing and subprocess.call(install)",
    ),
    ('sys.stdout.reconfigure(errors="replace")', "pass"),
    (
        "shell._showtraceback(kind, error, [SENTENCES[kind].format(error)])",
        "shell.showtraceback((kind, error, trace))",
    ),
    ("shell.set_custom_exc(tuple(SENTENCES), ", "shell.set_custom_exc((Exception,), "),
    ("    if kind not in SENTENCES:", "    if False:"),
    ("value = json.loads(value.lower())", "value = json.loads(value)"),
    ("(type(value) is not type(allowed[0]) or value not in allowed)", "value not in allowed"),
    ("Path(os.path.expanduser(folder))", "Path(folder)"),
    ("PartialState(only_cpu, ", "PartialState("),
    ("say = accelerator.print", "say = print"),
    ("not (MAIN and sys.stderr.isatty())", "not sys.stderr.isatty()"),
    ("not (MAIN and sys.stderr.isatty())", "not MAIN"),
    ("os.fsync(file.fileno())", "pass"),
    ("isinstance(error, (ConnectionError, FileNotFoundError))", "isinstance(error, ConnectionError)"),
    ("    finally:\n        remove(part)", "    finally:\n        pass"),
    ("    elif path.exists():\n        path.unlink()", "    else:\n        path.unlink(missing_ok=True)"),
    ("chosen[name] = earlier[-1]", "chosen[name] = earlier[0]"),
    ("        if not earlier:", "        if name not in levels:"),
    ("max(3, row[column] // 50)", "row[column] // 50"),
    ('"full" if PROFILE == "full" else "small"', '"full"'),
    ('PROFILE = "full" if REAL and on_gpu else "small"', 'PROFILE = "full" if REAL else "small"'),
    ("broadcast_object_list(choose_data() if MAIN else [None] * 3)", "choose_data()"),
    (
        '    if not path.exists():\n        raise Stop(f"{path} is not',
        '    if False:\n        raise Stop(f"{path} is not',
    ),
]
