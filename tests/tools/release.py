"""make release HW=03: execute a notebook at boss on the sample; keep clean outputs, figures and the hero.

The lower levels run before it, in the same folder, where the report compares what lies in OUT_DIR.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import nbformat
import sync
from notebooks import LEVELS, ROOT, digest, read_script, scripts, second_edition, tag_of
from run import execute
from shape import budget, log_lines

HERO = 40_000  # bytes: it is in every copy of the notebook


def clean(notebook, hw):
    """Nothing but text and pictures: no widgets, no times of day, and no warnings."""
    notebook.metadata.pop("widgets", None)
    complaints = ""
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        for out in cell.get("outputs", []):
            if out.get("name") == "stderr":
                complaints += out.text
            out.get("data", {}).pop("application/vnd.jupyter.widget-view+json", None)
    if complaints:
        raise SystemExit(f"{hw} wrote warnings, nothing is kept: mend what causes them.\n{complaints}")


def keep_figures(hw, figures):
    """The hero and those that the deck names."""
    deck = ROOT / "slides" / f"{hw}.md"
    named = deck.read_text(encoding="utf-8") if deck.exists() else ""
    hero = figures / "hero.jpg"
    if hero.exists() and hero.stat().st_size > HERO:
        raise SystemExit(f"{hw}: hero.jpg has {hero.stat().st_size} bytes, at most {HERO} are kept")
    for figure in sorted(figures.glob("*")):
        name = f"figures/{hw}-{figure.name}"
        if figure == hero or name in named:
            shutil.copy(figure, ROOT / "slides" / name)


def compares_levels(script):
    """Does the report read what other levels have left? Every first edition does."""
    report = [cell.source for cell in script.cells if cell.cell_type == "code" and tag_of(cell) == "report"]
    return not second_edition(script) or "OUT_DIR" in " ".join(report)


def release(path):
    hw = path.stem
    for name in [name for name in os.environ if name.startswith("HW_")]:
        del os.environ[name]
    os.environ |= {"TQDM_DISABLE": "1", "HW_DATA": "sample"}
    with tempfile.TemporaryDirectory() as folder:
        if compares_levels(read_script(path)):
            for level in LEVELS[:-1]:
                command = [sys.executable, str(path)]
                subprocess.run(command, cwd=folder, env=os.environ | {"HW_LEVEL": level}, check=True)
        notebook = nbformat.read(path.with_suffix(".ipynb"), as_version=4)
        execute(notebook, folder)
        clean(notebook, hw)
        keep_figures(hw, Path(folder, "out", hw, "boss-sample", "figures"))
    notebook.metadata["source_sha256"] = digest(notebook)
    path.with_suffix(".ipynb").write_text(nbformat.writes(notebook) + "\n", encoding="utf-8")
    print(f"{hw}: released; it printed {log_lines(notebook.cells)} lines, {budget(hw)['log']} are its budget")


if __name__ == "__main__":
    sync.main()
    for script in scripts():
        release(script)
    sync.main()
