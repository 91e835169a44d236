"""What is in the repository: scripts and notebooks agree, outputs are fresh, records and tables are true."""

import json
import re
import shutil
import subprocess
import sys

import nbformat
import pytest
import tables
from conftest import HOMEWORKS, TESTS
from notebooks import COMMON, LEVELS, METADATA, common_cells, digest, facts, read_script, tag_of

ROOT = TESTS.parent
SHARED = ["LEVEL", "DATA", "PROFILE", "SEED", "DATA_DIR", "OUT_DIR", "RESUME", "SUBMIT"]
ORDER = ["header", "parameters", "homework", "common:setup", "sample", "common:data", "levels"]
ORDER += ["common:checkpoint", "train", "predict", "submission", "common:submit", "report", "common:result"]


def tool(root, name, *arguments):
    command = [sys.executable, str(root / "tests" / "tools" / name), *arguments]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.fixture
def book(hw):
    return nbformat.read(ROOT / hw / f"{hw}.ipynb", as_version=4)


def test_there_is_something_to_check():
    assert [path.name for path in sorted(ROOT.glob("HW??"))] == HOMEWORKS
    assert len(HOMEWORKS) >= 1
    assert list(common_cells()) == [tag for tag in ORDER if tag.startswith("common:")]


def test_style():
    for command in (["check", "."], ["format", "--check", "."]):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *command], cwd=ROOT, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout


def test_everything_is_in_step():
    done = tool(ROOT, "sync.py", "--check")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture
def copy(tmp_path):
    for name in (*HOMEWORKS, "slides", "tests/tools"):
        skip = shutil.ignore_patterns("node_modules", "build", "__pycache__")
        shutil.copytree(ROOT / name, tmp_path / name, ignore=skip)
    for name in ("README.md", "pyproject.toml", "tests/ladder.json", "tests/bench.json"):
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def test_check_sees_one_byte_and_sync_mends_it(copy):
    script = copy / "HW01" / "HW01.py"
    good = script.read_text()
    script.write_text(good.replace("half-written is ever found", "half-written is ever fount"))
    done = tool(copy, "sync.py", "--check")
    assert done.returncode == 1 and "HW01/HW01.py differs" in done.stdout, done.stdout + done.stderr
    assert tool(copy, "sync.py").returncode == 0 and script.read_text() == good


def test_check_sees_a_missing_and_a_doubled_common_cell(copy):
    script = copy / "HW01" / "HW01.py"
    good = script.read_text()
    start = good.index('# %% cellView="form" jupyter={"source_hidden": true} tags=["common:submit"]')
    cell = good[start : good.index("# %% [markdown]", start)]
    for text, times in ((good.replace(cell, ""), 0), (good.replace(cell, cell + cell), 2)):
        script.write_text(text)
        done = tool(copy, "sync.py", "--check")
        assert done.returncode == 1 and f"common:submit, it has {times}" in done.stderr


def test_common_cells_are_few_and_short():
    lines = [line for cell in common_cells().values() for line in cell.source.splitlines() if line.strip()]
    assert len(lines) <= 250
    assert "HW01" not in COMMON.read_text(), "what differs between homeworks is no part of a common cell"


def test_cells_and_tags(hw):
    cells = read_script(ROOT / hw / f"{hw}.py").cells
    tags = [tag_of(cell) for cell in cells]
    order = [tag for tag in ORDER if tag != "sample" or facts(ROOT / hw / f"{hw}.py")["FILES"]]
    assert list(dict.fromkeys(tag for tag in tags if tag)) == order
    assert all(tags.count(tag) == 1 for tag in order if tag != "report") and tags[-1] == "common:result"
    for cell in cells[1:]:
        folded = tag_of(cell).startswith("common:") or tag_of(cell) == "sample"
        assert folded or len(cell.source.splitlines()) <= 47, cell.source[:200]
        assert cell.cell_type == "markdown" or not re.search(r"^\s*[%!]", cell.source, re.MULTILINE)
        assert (cell.metadata.get("cellView") == "form") == folded
        assert cell.source.startswith("# @title") == (folded or tag_of(cell) == "parameters")


def test_parameters_and_facts(hw):
    cells = {tag_of(cell): cell.source for cell in read_script(ROOT / hw / f"{hw}.py").cells}
    names = re.findall(r"^([A-Z_]+) = ", cells["parameters"], re.MULTILINE)
    known = facts(ROOT / hw / f"{hw}.py")
    assert names == [*SHARED, *known["OWN"]]
    assert all("# @param" in line for line in cells["parameters"].splitlines() if " = " in line)
    assert known["HW"] == hw and known["DATA_DIR"] == f"data/{hw}" and known["OUT_DIR"] == f"out/{hw}"
    assert (known["LEVEL"], known["DATA"], known["PROFILE"]) == ("boss", "auto", "full")
    assert known["RESUME"] is True and known["SUBMIT"] is False


def test_notebook_is_fresh_and_clean(hw, book):
    path = ROOT / hw / f"{hw}.ipynb"
    assert path.stat().st_size < 1_000_000
    assert book.metadata.get("source_sha256") == digest(book), "outputs are older than the code: make release"
    assert set(book.metadata) == {*METADATA, "source_sha256"}
    code = [cell for cell in book.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    for cell in book.cells:
        assert set(cell.metadata) <= {"tags", "cellView", "jupyter"}
        for out in cell.get("outputs", []):
            assert out.output_type != "error" and out.get("name") != "stderr"
            assert not any("widget" in kind for kind in out.get("data", {}))
            assert not re.search(r"(/home/|/root/|/tmp/|/Users/)", str(out.get("text", "")))
    text = "".join(str(out.get("text", "")) for cell in code for out in cell.outputs)
    assert f"{hw} at level boss, profile full" in text and "data: SAMPLE" in text


def test_header(hw, book):
    header = book.cells[0].source
    path = f"/{hw}/{hw}.ipynb"
    assert header.count(path) == 2 and "colab.research.google.com/github/" in header
    assert len(re.findall(r"[\u4e00-\u9fff]", header)) > 40, "the same in Traditional Chinese"
    for level in LEVELS:
        assert f"| {level} |" in header and tables.score(hw, level) in header


def test_ladder_is_true(hw):
    """Strictly better from level to level, by more than the seeds' spread at the default seed."""
    row = json.loads((TESTS / "ladder.json").read_text())[hw]
    sign = 1 if row["higher_is_better"] else -1
    levels = [row["levels"][level] for level in LEVELS]
    for level in levels:
        assert len(level["scores"]) == len(level["seeds"]) == len(level["seconds"]) == 3
    assert levels[-1]["seconds"][0] < 240
    for low, high in zip(levels, levels[1:], strict=False):
        step = sign * (sum(high["scores"]) - sum(low["scores"])) / 3
        spread = max(max(level["scores"]) - min(level["scores"]) for level in (low, high))
        assert step > spread
        assert sign * high["scores"][0] > sign * low["scores"][0]


def test_bench_is_there(hw):
    assert json.loads((TESTS / "bench.json").read_text())[hw]["ratio"] > 1


def test_slides(hw):
    deck = (ROOT / "slides" / f"{hw}.md").read_text()
    slides = deck.split("\n---\n")[1:]
    assert 10 <= len(slides) <= 14
    for slide in slides:
        title = re.search(r"^## (.+)$", slide, re.MULTILINE)[1]
        assert re.search(r" · .*[\u4e00-\u9fff]", title), title
    for figure in re.findall(r"\]\((figures/[^)]+)\)", deck):
        assert (ROOT / "slides" / figure).exists(), figure
    assert "youtu.be" in deck and "bilibili.com" in deck


def test_readme():
    text = (ROOT / "README.md").read_text()
    for number in range(1, 16):
        assert f"HW{number:02d}" in text
    for command in ("make run HW=01", "make test", "torchrun --", "accelerate launch"):
        assert command in text
    for figure in re.findall(r"\]\(((?:slides|HW)[^)#]+)\)", text):
        assert (ROOT / figure).exists(), figure
