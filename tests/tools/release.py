"""make release HW=03: execute a notebook at boss on the full sample and keep clean outputs and the figures.

The lower levels run first, in the same folder, for the report compares what it finds there.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import nbformat
import sync
from notebooks import LEVELS, ROOT, digest, scripts
from run import execute


def clean(notebook):
    """Nothing but text and pictures: no widgets, no progress bars, no times of day."""
    notebook.metadata.pop("widgets", None)
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell.outputs = [out for out in cell.outputs if out.get("name") != "stderr"]
            for out in cell.outputs:
                out.get("data", {}).pop("application/vnd.jupyter.widget-view+json", None)


def release(path):
    for name in [name for name in os.environ if name.startswith("HW_")]:
        del os.environ[name]
    os.environ |= {"TQDM_DISABLE": "1", "HW_DATA": "sample"}
    with tempfile.TemporaryDirectory() as folder:
        for level in LEVELS[:-1]:
            command = [sys.executable, str(path)]
            subprocess.run(command, cwd=folder, env=os.environ | {"HW_LEVEL": level}, check=True)
        notebook = nbformat.read(path.with_suffix(".ipynb"), as_version=4)
        execute(notebook, folder)
        clean(notebook)
        notebook.metadata["source_sha256"] = digest(notebook)
        path.with_suffix(".ipynb").write_text(nbformat.writes(notebook) + "\n", encoding="utf-8")
        deck = ROOT / "slides" / f"{path.stem}.md"
        for figure in sorted(Path(folder, "out", path.stem, "boss-sample", "figures").iterdir()):
            name = f"figures/{path.stem}-{figure.name}"
            if deck.exists() and name in deck.read_text(encoding="utf-8"):
                shutil.copy(figure, ROOT / "slides" / name)


if __name__ == "__main__":
    sync.main()
    for script in scripts():
        release(script)
    sync.main()
