"""The maintenance commands, each really run, on a toy repository: its homework needs no time and no torch."""

import ast
import base64
import json
import os
import pty
import re
import shutil
import subprocess
import sys
import time

import nbformat
import pytest
import yaml
from conftest import TESTS
from notebooks import COMMON

pytestmark = pytest.mark.xdist_group("tools")  # they share the toy
ROOT = TESTS.parent
FOLD = 'cellView="form" jupyter={"source_hidden": true}'
SCRIPT = """\
# %% [markdown] tags=["header"]
# # HW99 · The toy
#
# <!-- badges -->
# <!-- /badges -->
#
# ![a grey square](hero)
#
# <!-- box -->
# <!-- /box -->
#
# <!-- ladder -->
# | level | what it adds | sample | course baseline (real data) | seconds |
# |---|---|---|---|---|
# | simple | nothing | | | |
# | medium | depth | | | |
# | strong | width | | | |
# | boss | luck | | | |
# <!-- /ladder -->

# %% tags=["parameters"]
# @title Parameters
LEVEL = "boss"  # @param ["boss", "strong", "medium", "simple"]
WITHOUT = ""  # @param {type:"string"}
DATA = "auto"  # @param ["auto", "real", "sample"]
PROFILE = "auto"  # @param ["auto", "full", "small", "tiny"]
SEED = 2022  # @param {type:"integer"}
OUT_DIR = "out/HW99"  # @param {type:"string"}
PAUSE = 0  # @param {type:"integer"}

# %% tags=["homework"]
HW, METRIC, HIGHER_IS_BETTER = "HW99", "points", True
BASELINES, FILES, OWN = {"boss": 9}, {}, {"PAUSE": range(100)}
SIDE = 8

# %% tags=["common:setup"]

# %% tags=["common:data"]

# %%
def half(number):
    return number / 2


show("hero.jpg")

# %% [markdown]
# ## Simple: nothing (?)

# %% [markdown]
# ## Medium: depth, and (more) depth (?)

# %% tags=["levels"]
LEVELS = {  # simple medium strong boss
    "depth": (1, 2, 2, 2),
    "width": (1, 1, 3, 3),
    "luck": (0, 0, 0, 0.02),
    "same": (7, 7, 7, 7),
}
SIZES = {"full": {"steps": (900, 900, 900, 900)}, "small": {"steps": (100, 100, 100, 100)}}
settings = choose(LEVELS, SIZES)

# %% tags=["train"]
for step in range(3):
    say(f"step {step} 第一步")
    time.sleep(PAUSE)

# %% tags=["common:submit"]

# %% FOLD tags=["measured"]
MEASURED = 0

# %% tags=["common:result"]
"""
COMMON_CELLS = """\
# %% FOLD tags=["common:setup"]
# @title Setup
import json, os, sys, time
from pathlib import Path

say = print
for name in ("LEVEL", "WITHOUT", "DATA", "PROFILE", "OUT_DIR"):
    globals()[name] = os.environ.get(f"HW_{name}", globals()[name])
SEED = int(os.environ.get("HW_SEED", SEED))
PAUSE = int(os.environ.get("HW_PAUSE", PAUSE))
OFF = [name for name in WITHOUT.split(",") if name]
CHOICES = {"LEVEL": ("simple", "medium", "strong", "boss")}
OUT = Path(OUT_DIR) / (f"{LEVEL}-sample" + "-without-".join(["", *OFF]))
(OUT / "figures").mkdir(parents=True, exist_ok=True)


class Stop(Exception):
    pass


def show(name):
    if "ipykernel" in sys.modules:
        from IPython import display
        from PIL import Image

        Image.effect_noise((SIDE, SIDE), 50).save(OUT / "figures" / name)
        display.display(display.Image(OUT / "figures" / name))

# %% FOLD tags=["common:data"]
# @title Data
CHOOSE

# %% FOLD tags=["common:submit"]
# @title Submission
score = settings["depth"] + settings["width"] + settings["luck"] + (SEED - 2023) / 100
submission = OUT / "toy.sample.csv"
submission.write_text("id")

# %% FOLD tags=["common:result"]
# @title Result
result = {"score": score, "seconds": 0.1, "torch": "none", "settings": settings, "metric": METRIC}
(OUT / "result.json").write_text(json.dumps(result))
say(f"submission: {submission}")
say(f"score: {METRIC} {score}")
"""
TESTS_OF_IT = """
from notebooks import pick, ROOT

def test_half():
    assert pick(ROOT / "HW99" / "HW99.py", "half").half(3) == 1.5

MUTANTS = [("number / 2", "number // 3"), ("half(number)", "half(number, spare=0)")]
"""
BENCH = """
from time import sleep
def race():
    return "seconds to 3 points", 2.0, 8.0
def cases():
    return {"HW99/naps": ("naps per second", lambda: sleep(0.001) or 1, lambda: sleep(0.004) or 1)}
"""
README = "".join(f"<!-- {mark} -->\n<!-- /{mark} -->\n" for mark in ("ladder", "homeworks", "bench"))


SLOW = "\nsys.modules['rfc3987_syntax'] = None\n"  # jsonschema would build a grammar with it, 2 s


def real_choose():
    """The text of the common cells' own `choose`."""
    text = COMMON.read_text(encoding="utf-8")
    for node in ast.parse(text).body:
        if getattr(node, "name", "") == "choose":
            return ast.get_source_segment(text, node)


def tool(root, name, *arguments, **wanted):
    """A command of tests/tools, as the Makefile calls it."""
    mine = {key: value for key, value in os.environ.items() if not key.startswith("HW_")}
    mine["PYTHONPATH"] = str(root / "tests" / "offline")
    command = [sys.executable, str(root / "tests" / "tools" / name), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=mine | wanted, cwd=root)


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """A repository with one homework, as make sync leaves it."""
    root = tmp_path_factory.mktemp("toy") / "repo"
    for folder in ("HW99", "slides/figures", "tests/bench", "tests/offline"):
        (root / folder).mkdir(parents=True)
    shutil.copytree(TESTS / "tools", root / "tests" / "tools", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "tests/conftest.py", "tests/runner.py", "tests/offline/sitecustomize.py"):
        shutil.copy(ROOT / name, root / name)
    common = COMMON_CELLS.replace("FOLD", FOLD).replace("CHOOSE", real_choose())
    (root / "tests" / "tools" / "common_cells.py").write_text(common, encoding="utf-8")
    (root / "HW99" / "HW99.py").write_text(SCRIPT.replace("FOLD", FOLD), encoding="utf-8")
    (root / "README.md").write_text(README)
    with (root / "tests" / "offline" / "sitecustomize.py").open("a") as file:
        file.write(SLOW)
    (root / "slides" / "HW99.md").write_text("<!-- ladder -->\n<!-- /ladder -->\n")
    (root / "tests" / "bench" / "HW99.py").write_text(BENCH)
    (root / "tests" / "test_hw99.py").write_text(TESTS_OF_IT)
    assert tool(root, "sync.py").returncode == 0
    return root


@pytest.fixture
def script(toy):
    """The toy's script; what a test changes in it and in its notebook is taken back."""
    path = toy / "HW99" / "HW99.py"
    before = {path: path.read_bytes(), path.with_suffix(".ipynb"): path.with_suffix(".ipynb").read_bytes()}
    yield path
    for file, content in before.items():
        file.write_bytes(content)


def edit(path, old, new):
    text = path.read_text(encoding="utf-8")
    assert text.count(old) == 1, old
    path.write_text(text.replace(old, new), encoding="utf-8")


def test_sync_says_what_is_not_measured_yet(toy):
    text = (toy / "HW99" / "HW99.py").read_text(encoding="utf-8")
    assert "its score and time are not measured yet" in text and "## Simple: nothing (?)" in text
    assert '    "levels": {},\n    "without": {},\n}' in text
    assert tool(toy, "sync.py", "--check").returncode == 0


def test_ladder_measures_levels_and_ideas_once(toy, script):
    done = tool(toy, "ladder.py", "99", HW_LEVEL="medium", HW_NONSENSE="1")
    assert done.returncode == 0, done.stderr
    row = json.loads((toy / "tests" / "ladder.json").read_text())["HW99"]
    assert [len(row["levels"][level]["scores"]) for level in ("simple", "boss")] == [3, 3]
    assert row["levels"]["medium"]["settings"] == {"depth": 2, "width": 1, "luck": 0, "same": 7, "steps": 100}
    assert {idea: len(one["seeds"]) for idea, one in row["without"].items()} == {
        "depth": 1,
        "width": 1,
        "luck": 3,
    }
    assert row["without"]["depth"]["score"] == pytest.approx(4.01) and row["without"]["luck"]["seed"] == 2022
    assert len(re.findall("^HW99 .* in 0 s$", done.stdout, re.MULTILINE)) == 17
    text = script.read_text(encoding="utf-8")
    assert "expect points 5.020 on the sample in about 0 seconds" in text
    assert "## Simple: nothing (2.0)" in text and "## Medium: depth, and (more) depth (+1.0)" in text
    assert '        "luck": [4.99, 5.0, 5.01],' in text
    assert "| boss | luck | 5.020 ± 0.010 | 9 | 0 |" in text
    for name in ("ladder.png", "HW99-ladder.png"):
        assert (toy / "slides" / "figures" / name).stat().st_size > 1000
    assert "5.020 ± 0.010 (9)" in (toy / "README.md").read_text(encoding="utf-8")
    edit(script, "def half(number):", "def half(number):  # a remark")
    assert "seed" not in tool(toy, "ladder.py", "99").stdout, "nothing is measured twice"
    edit(script, "return number / 2", "return 1 * number / 2")
    assert tool(toy, "ladder.py", "99").stdout.count(" seed ") == 17, "other code is measured anew"


def test_release_keeps_outputs_and_the_hero(toy):
    done = tool(toy, "release.py", "99")
    assert done.returncode == 0, done.stderr
    assert "it printed 5 lines, 30 are its budget" in done.stdout
    book = nbformat.read(toy / "HW99" / "HW99.ipynb", as_version=4)
    assert book.metadata["source_sha256"] and [cell.execution_count for cell in book.cells[1:3]] == [1, 2]
    hero = (toy / "slides" / "figures" / "HW99-hero.jpg").read_bytes()
    assert f"(data:image/jpeg;base64,{base64.b64encode(hero).decode()})" in book.cells[0].source
    assert "](hero)" in (toy / "HW99" / "HW99.py").read_text(encoding="utf-8")
    assert tool(toy, "sync.py", "--check").returncode == 0


def test_release_refuses_a_large_hero_and_warnings(toy, script):
    before = (toy / "HW99" / "HW99.py").read_text(encoding="utf-8")
    for old, new, said in (
        ("SIDE = 8", "SIDE = 999", "hero.jpg has"),
        ("def half", "import warnings\n\nwarnings.warn('beware')\n\n\ndef half", "UserWarning: beware"),
    ):
        script.write_text(before, encoding="utf-8")
        edit(script, old, new)
        done = tool(toy, "release.py", "99")
        assert done.returncode == 1 and said in done.stderr and "Traceback" not in done.stderr


def test_run_is_quiet_and_names_what_it_made(toy, tmp_path):
    wanted = {"HW_OUT_DIR": str(tmp_path), "PYTHONIOENCODING": "ascii", "HW_LEVEL": "simple"}
    done = tool(toy, "run.py", "99", **wanted)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    lines = done.stdout.splitlines()
    folder = tmp_path / "simple-sample"
    assert lines[0] == "step 0 ???" and len(lines) <= 30
    assert lines[-3:-1] == [f"submission: {folder / 'toy.sample.csv'}", "score: points 1.99"]
    assert lines[-1] == f"page: {folder / 'HW99.html'}"
    page = (folder / "HW99.html").read_text(encoding="utf-8")
    assert "The toy" in page and "effect_noise" not in page, "folded cells show their titles"
    assert "HW=98 is not here; these are: 99" in tool(toy, "run.py", "98").stderr


def test_run_shows_a_sentence_or_a_traceback(toy, script):
    edit(script, "    time.sleep(PAUSE)", "    raise KeyError('lost')")
    tool(toy, "sync.py")
    done = tool(toy, "run.py", "99")
    assert done.returncode == 1 and "KeyError" in done.stderr and "nbclient" not in done.stderr


@pytest.mark.parametrize("moment", ["step 0", ""])
def test_ctrl_c_ends_a_run_with_one_sentence(toy, moment, tmp_path):
    """In a terminal, while a cell works and while the kernel starts."""
    tool(toy, "sync.py")
    pid, terminal = pty.fork()
    if pid == 0:
        os.environ |= {
            "HW_PAUSE": "60",
            "HW_OUT_DIR": str(tmp_path),
            "PYTHONPATH": str(toy / "tests" / "offline"),
        }
        os.execv(sys.executable, [sys.executable, str(toy / "tests" / "tools" / "run.py"), "99"])
    said, kernel = b"", None
    while kernel is None or moment.encode() not in said:
        if moment:
            said += os.read(terminal, 1000)
        kernel = next(iter(children(pid)), None)
        time.sleep(0.01)
    tic = time.monotonic()
    os.write(terminal, b"\x03")
    while True:
        try:
            said += os.read(terminal, 1000)
        except OSError:  # the terminal is closed
            break
    os.waitpid(pid, 0)
    assert time.monotonic() - tic < 8
    assert "Stopped by hand. Run again to go on" in said.decode() and "Traceback" not in said.decode()
    while os.path.exists(f"/proc/{kernel}"):
        assert time.monotonic() - tic < 8, "the kernel lives on"
        time.sleep(0.1)


def children(pid):
    listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True)
    return [int(word) for word in listed.stdout.split()]


def test_bench_writes_the_headline_first(toy):
    done = tool(toy, "bench.py", "99")
    assert done.returncode == 0, done.stderr
    rows = json.loads((toy / "tests" / "bench.json").read_text())
    assert rows["HW99"]["ratio"] == 4.0 and rows["HW99"]["spread"] == "4.0 to 4.0"
    assert rows["HW99/naps"]["ratio"] > 1.5
    table = (toy / "README.md").read_text(encoding="utf-8")
    assert "| HW99: seconds to 3 points | 2 | 8 | 4.0 | 4.0 to 4.0 |\n| HW99/naps: naps per second" in table


def test_shape_counts_and_marks(toy, script):
    done = tool(toy, "shape.py", "99")
    assert re.search(
        r"^HW99 +25/400 +13/50 +14/60 +2/30 +8/40 +19/180 +[05]/30 +1/3", done.stdout, re.MULTILINE
    ), done.stdout
    assert tool(toy, "shape.py", "--summary").stdout == "shape: HW99 within the budgets\n"
    edit(script, "    return number / 2", "    number /= 1\n" * 40 + "    return number / 2")
    assert "over: HW99 (function 42, cell 43)" in tool(toy, "shape.py", "--summary").stdout


def test_mutants_tells_who_survived(toy, script):
    done = tool(toy, "mutants.py", "99")
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines[:3]] == ["passes", "caught", "SURVIVED"], (
        done.stdout + done.stderr
    )
    assert "test_hw99.py::test_half" in lines[1] and done.returncode == 1
    assert [*json.loads((toy / "out/mutants.json").read_text()).values()] == lines[1].split()[-1:]
    edit(script, "number / 2", "number * 0.5")
    assert "times, not once" in tool(toy, "mutants.py", "99").stderr
    assert "there are some for: HW99" in tool(toy, "mutants.py", "common").stderr


@pytest.mark.parametrize("works", [True, False])
def test_make_mends_a_half_made_environment(tmp_path, works):
    """There is a .venv without pip; a stub stands for Python: its venv has a pip, or cannot be made."""
    for name in ("Makefile", "requirements.txt"):
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    stub = tmp_path / "stub"
    made = f"cp {stub} .venv/bin/python" if works else "exit 1"
    stub.write_text(f'#!/bin/sh\ntest "$2" != venv || {made}\n')
    stub.chmod(0o755)
    done = subprocess.run(
        ["make", ".venv/ready", f"PYTHON={stub}"], cwd=tmp_path, capture_output=True, text=True
    )
    assert (done.returncode == 0) == works == (tmp_path / ".venv" / "ready").exists(), done.stderr
    assert ("python3-venv" in done.stdout) != works


def test_make_hands_parameters_on():
    """Only those of make's own command line: a variable SEED of the shell is not ours."""
    command = ["make", "-n", "run", "HW=12", "LEVEL=simple", "WITHOUT=a,b", "PROFILE=tiny", "DATA=sample"]
    said = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"SEED": "3"}
    ).stdout
    for word in (
        "HW_LEVEL='simple'",
        "HW_WITHOUT='a,b'",
        "HW_PROFILE='tiny'",
        "HW_DATA='sample'",
        "run.py 12",
    ):
        assert word in said
    assert "HW_SEED" not in said


def test_workflow_calls_make_test():
    flow = yaml.safe_load((ROOT / ".github" / "workflows" / "test.yml").read_text())
    job = flow["jobs"]["test"]
    assert flow["permissions"] == {"contents": "read"}
    assert job["strategy"]["matrix"]["python"][0] == "3.10" and len(job["strategy"]["matrix"]["python"]) == 3
    assert job["steps"][-1] == {"run": "make test"}
    assert "make test" in (ROOT / ".ci" / "run").read_text()
