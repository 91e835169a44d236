"""make sync: common cells, badges and tables into the scripts, decks and README, scripts into notebooks.

With --check nothing is written: every difference is printed, and the exit code is 1 if there was one.
"""

import base64
import re
import sys

import jupytext
import nbformat
import tables
from jupytext.config import load_jupytext_config
from notebooks import LEVELS, METADATA, ROOT, common_cells, fill, read_script, scripts, second_edition, tag_of

CHECK = "--check" in sys.argv
WANTED = [word for word in sys.argv[1:] if not word.startswith("-")]  # 01 03 ...; none: all


def block(text, mark):
    """What stands between <!-- mark --> and <!-- /mark -->."""
    found = re.search(rf"<!-- {mark} -->\n(.*?)<!-- /{mark} -->", text, re.DOTALL)
    if not found:
        raise SystemExit(f"<!-- {mark} --> ... <!-- /{mark} --> is missing in: {text[:60]!r}")
    return found[1]


def script_text(path):
    """The script as it should be."""
    notebook, canonical, hw = read_script(path), common_cells(), path.stem
    tags = [tag_of(cell) for cell in notebook.cells]
    for tag, cell in canonical.items():
        if tags.count(tag) != 1:
            raise SystemExit(f"{path.name} must have one cell tagged {tag}, it has {tags.count(tag)}")
        mine = notebook.cells[tags.index(tag)]
        blank = {name: mine.metadata[name] for name in mine.metadata if name == "lines_to_next_cell"}
        mine.source, mine.metadata = cell.source, cell.metadata | blank
    header = notebook.cells[0]
    header.source = fill(header.source, "badges", tables.badges(hw))
    cells = {2: lambda level: tables.score(hw, level), 3: lambda level: tables.baseline(hw, level)}
    cells[4] = lambda level: tables.seconds(hw, level)
    ladder = tables.refill(block(header.source, "ladder"), LEVELS, cells)
    header.source = fill(header.source, "ladder", ladder)
    if second_edition(notebook):
        header.source = fill(header.source, "box", tables.box(hw))
        for cell in notebook.cells:
            if cell.cell_type == "markdown":
                cell.source = tables.headings(hw, cell.source)
        notebook.cells[tags.index("measured")].source = tables.measured_cell(hw)
    return jupytext.writes(notebook, fmt="py:percent", config=load_jupytext_config(str(path)))


def with_hero(text, hw):
    """The header's picture as a data address: Colab shows no other, and a lone copy has nothing beside it."""
    picture = ROOT / "slides" / "figures" / f"{hw}-hero.jpg"
    if not picture.exists():
        return text
    address = f"data:image/jpeg;base64,{base64.b64encode(picture.read_bytes()).decode()}"
    return re.sub(r"(!\[[^]]*\])\(hero\)", rf"\1({address})", text)


def notebook_text(path, script):
    """The notebook built from the script; cells whose source is unchanged keep their outputs."""
    notebook = jupytext.reads(script, fmt="py:percent")
    old = nbformat.read(path, as_version=4) if path.exists() else nbformat.v4.new_notebook()
    kept = {(cell.cell_type, cell.source): cell for cell in old.cells}
    for number, cell in enumerate(notebook.cells):
        before = kept.get((cell.cell_type, cell.source), {})
        cell.id = f"{path.stem.lower()}-{number:02d}"
        cell.metadata.pop("lines_to_next_cell", None)
        if cell.cell_type == "code" and before:
            cell.outputs, cell.execution_count = before.outputs, before.execution_count
    notebook.cells[0].source = with_hero(notebook.cells[0].source, path.stem)
    notebook.metadata = METADATA | {
        key: old.metadata[key] for key in ("source_sha256",) if key in old.metadata
    }
    return nbformat.writes(notebook) + "\n"


def deck_text(path):
    text, hw = path.read_text(encoding="utf-8"), path.stem
    columns = {2: lambda level: tables.score(hw, level), 3: lambda level: tables.baseline(hw, level)}
    return fill(text, "ladder", tables.refill(block(text, "ladder"), LEVELS, columns))


def readme_text(path):
    text = fill(path.read_text(encoding="utf-8"), "ladder", tables.readme_ladder())
    text = fill(text, "homeworks", tables.readme_homeworks(block(text, "homeworks")))
    return fill(text, "bench", tables.readme_bench())


def main(readme=not WANTED):
    """All homeworks and the README, or the named homeworks alone."""
    stale = []

    def settle(path, text):
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            stale.append(path)
            if not CHECK:
                path.write_text(text, encoding="utf-8")

    for path in scripts(WANTED):
        script = script_text(path)
        settle(path, script)
        settle(path.with_suffix(".ipynb"), notebook_text(path.with_suffix(".ipynb"), script))
        deck = ROOT / "slides" / f"{path.stem}.md"
        if deck.exists():
            settle(deck, deck_text(deck))
    if readme:
        settle(ROOT / "README.md", readme_text(ROOT / "README.md"))
    for path in stale:
        print(f"{path.relative_to(ROOT)} {'differs: run make sync' if CHECK else 'written'}")
    return bool(stale and CHECK)


if __name__ == "__main__":
    sys.exit(main())
