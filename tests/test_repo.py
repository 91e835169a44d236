"""What is in the repository: scripts and notebooks agree, outputs are fresh, records and tables are true."""

import json
import re
import shutil
import subprocess
import sys

import nbformat
import pytest
import shape
import tables
from conftest import HOMEWORKS, TESTS
from notebooks import (
    LEVELS,
    METADATA,
    common_cells,
    digest,
    facts,
    ideas_of,
    read_script,
    second_edition,
    settings_of,
    tag_of,
)
from release import HERO

ROOT = TESTS.parent
SHARED = ["LEVEL", "WITHOUT", "DATA", "PROFILE", "SEED", "DATA_DIR", "OUT_DIR", "RESUME", "SUBMIT"]
ORDER = ["header", "parameters", "homework", "common:setup", "sample", "common:data", "read", "levels"]
ORDER += ["common:checkpoint", "train", "predict", "submission", "common:submit", "measured", "report", "try"]
ORDER += ["common:result"]
NEW = {"read", "measured", "try"}  # what the first edition has not
FOLDED = {"homework", "sample", "read", "submission", "measured"}  # and the common cells
SEVERAL = {"report"}  # cells may share these tags


def tool(root, name, *arguments):
    command = [sys.executable, str(root / "tests" / "tools" / name), *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def path_of(hw):
    return ROOT / hw / f"{hw}.py"


@pytest.fixture
def book(hw):
    return nbformat.read(ROOT / hw / f"{hw}.ipynb", as_version=4)


@pytest.fixture
def new(book):
    return second_edition(book)


@pytest.fixture
def record(hw):
    return json.loads((TESTS / "ladder.json").read_text(encoding="utf-8"))[hw]


def text_of(cells):
    return "".join(str(out.get("text", "")) for cell in cells for out in cell.get("outputs", []))


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
    """A repository with one homework in it."""
    for name in ("HW01", "slides", "tests/tools"):
        skip = shutil.ignore_patterns("node_modules", "build", "__pycache__")
        shutil.copytree(ROOT / name, tmp_path / name, ignore=skip)
    for name in ("README.md", "pyproject.toml", "tests/ladder.json", "tests/bench.json"):
        shutil.copy(ROOT / name, tmp_path / name)
    assert tool(tmp_path, "sync.py", "01").returncode == 0
    return tmp_path


def test_check_sees_one_byte_and_sync_mends_it(copy):
    script = copy / "HW01" / "HW01.py"
    good = script.read_text(encoding="utf-8")
    script.write_text(
        good.replace("half-written is ever found", "half-written is ever fount"), encoding="utf-8"
    )
    done = tool(copy, "sync.py", "--check", "01")
    assert done.returncode == 1 and "HW01/HW01.py differs" in done.stdout, done.stdout + done.stderr
    assert tool(copy, "sync.py", "01").returncode == 0 and script.read_text(encoding="utf-8") == good


def test_check_sees_a_missing_and_a_doubled_common_cell(copy):
    script = copy / "HW01" / "HW01.py"
    good = script.read_text(encoding="utf-8")
    start = good.index('# %% cellView="form" jupyter={"source_hidden": true} tags=["common:submit"]')
    cell = good[start : good.index("# %% ", start + 1)]
    for text, times in ((good.replace(cell, ""), 0), (good.replace(cell, cell + cell), 2)):
        script.write_text(text, encoding="utf-8")
        done = tool(copy, "sync.py", "--check", "01")
        assert done.returncode == 1 and f"common:submit, it has {times}" in done.stderr


def test_common_cells_are_few_and_short():
    assert shape.common_lines() <= 490, "more than they are; the budget, not met yet, is shape.COMMON"
    for tag, cell in common_cells().items():
        assert not re.search(r"HW\d\d", cell.source), (
            f"{tag}: what differs between homeworks is data elsewhere"
        )


def test_budgets(hw, new):
    if not new:
        pytest.skip("of the first edition")
    assert shape.over(path_of(hw)) == {}


def test_cells_and_tags(hw, new):
    cells = read_script(path_of(hw)).cells
    tags = [tag_of(cell) for cell in cells]
    order = [tag for tag in ORDER if new or tag not in NEW]
    if not facts(path_of(hw))["FILES"]:
        order.remove("sample")
    assert list(dict.fromkeys(tag for tag in tags if tag)) == order
    assert all(tags.count(tag) == 1 for tag in order if tag not in SEVERAL) and tags[-1] == "common:result"
    for cell in cells:
        folded = cell.metadata.get("cellView") == "form"
        assert folded == (cell.metadata.get("jupyter") == {"source_hidden": True})
        assert cell.source.startswith("# @title") == (folded or tag_of(cell) == "parameters")
        if tag_of(cell).startswith("common:") or (new and tag_of(cell) in FOLDED):
            assert folded, tag_of(cell)
        if cell.cell_type == "code":
            assert not re.search(r"^\s*[%!]", cell.source, re.MULTILINE)
            assert max(len(line) for line in cell.source.splitlines()) <= 110, cell.source[:200]


def test_parameters_and_facts(hw):
    cells = {tag_of(cell): cell.source for cell in read_script(path_of(hw)).cells}
    names = re.findall(r"^([A-Z_]+) = ", cells["parameters"], re.MULTILINE)
    known = facts(path_of(hw))
    assert names == [*SHARED, *known["OWN"]]
    assert all("# @param" in line for line in cells["parameters"].splitlines() if " = " in line)
    assert known["HW"] == hw and known["DATA_DIR"] == f"data/{hw}" and known["OUT_DIR"] == f"out/{hw}"
    shared = {
        "LEVEL": "boss",
        "WITHOUT": "",
        "DATA": "auto",
        "PROFILE": "auto",
        "RESUME": True,
        "SUBMIT": False,
    }
    assert {name: known[name] for name in shared} == shared


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
    text = text_of(code)
    assert f"{hw} at level boss" in text and "data: SAMPLE; profile: small" in text
    assert "Warning" not in text


def test_header(hw, book, new):
    header = book.cells[0].source
    path = f"/{hw}/{hw}.ipynb"
    assert header.count(path) == 2 and "colab.research.google.com/github/" in header
    assert len(re.findall(r"[\u4e00-\u9fff]", header)) > 40, "the same in Traditional Chinese"
    for level in LEVELS:
        assert f"| {level} |" in header and tables.score(hw, level) in header
    if new:
        assert len(re.findall(r"!\[[^]]+\]\(data:image/jpeg;base64,[^)]+\)", header)) == 1, "make release"
        assert (ROOT / "slides" / "figures" / f"{hw}-hero.jpg").stat().st_size <= HERO
        assert "not measured yet" not in header
        headings = [match for cell in book.cells for match in tables.HEADING.finditer(cell.source)]
        assert [match[2].lower() for match in headings] == [*LEVELS]


def test_ladder_is_true(record):
    """Each step is larger than the whole range of the seeds, on both of its sides."""
    sign = 1 if record["higher_is_better"] else -1
    levels = [record["levels"][level] for level in LEVELS]
    for level in levels:
        assert len(level["scores"]) == len(level["seeds"]) == len(level["seconds"]) == 3
    assert levels[-1]["seconds"][0] < 240
    for low, high in zip(levels, levels[1:], strict=False):
        step = sign * (tables.average(high["scores"]) - tables.average(low["scores"]))
        assert step > 2 * max(tables.half_range(low["scores"]), tables.half_range(high["scores"]))


def test_record_is_fresh(hw, book, record, new):
    """The committed notebook was executed anew: its score is one that the record knows, its settings too."""
    found = re.search(r"^score: .* (\S+)$", text_of(book.cells), re.MULTILINE)
    assert found, "the notebook has no outputs: make release"
    score, scores = float(found[1]), record["levels"]["boss"]["scores"]
    reach = max(tables.half_range(scores), 0.02 * abs(tables.average(scores)))
    assert min(scores) - reach <= score <= max(scores) + reach, "the record is of another code: make ladder"
    if new:
        path = path_of(hw)
        for level in LEVELS:
            assert record["levels"][level]["settings"] == settings_of(path, level), level
        assert list(record["without"]) == ideas_of(path)
        for idea, row in record["without"].items():
            assert row["settings"] == settings_of(path, "boss", [idea]), idea


def test_bench_is_there(hw, new):
    source = (TESTS / "bench" / f"{hw}.py").read_text(encoding="utf-8")
    assert hw in json.loads((TESTS / "bench.json").read_text(encoding="utf-8"))
    assert not new or "def race(" in source, "the headline is time to the official sample's own score"


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
