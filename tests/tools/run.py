"""make run HW=03 LEVEL=strong: execute a notebook on its sample data, live, and leave a page to read."""

import importlib
import json
import os
import sys
import threading
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from notebooks import ROOT


class Live(NotebookClient):
    """Prints what a cell prints while it runs."""

    def output(self, outs, msg, display_id, cell_index):
        if msg["msg_type"] == "stream":
            print(msg["content"]["text"], end="", flush=True)
        return super().output(outs, msg, display_id, cell_index)


def execute(notebook, folder):
    client = Live(
        notebook, timeout=None, record_timing=False, store_widget_state=False, coalesce_streams=True
    )
    client.resources = {"metadata": {"path": str(folder)}}
    client.execute()


def main(hw, level):
    os.environ.setdefault("HW_DATA", "sample")
    os.environ["HW_LEVEL"] = level
    notebook = nbformat.read(ROOT / hw / f"{hw}.ipynb", as_version=4)
    threading.Thread(target=importlib.import_module, args=("nbconvert",)).start()  # while the kernel works
    try:
        execute(notebook, ROOT)
    except KeyboardInterrupt:
        sys.exit("Stopped by hand. Run again to go on from the last checkpoint.")
    except CellExecutionError as error:
        sys.exit(f"{error.evalue if error.ename == 'Stop' else error.traceback}")
    from nbconvert import HTMLExporter

    out = Path(os.environ.get("HW_OUT_DIR", ROOT / "out" / hw))
    result = max(out.glob(f"{level}-*/result.json"), key=lambda path: path.stat().st_mtime)
    page = result.with_name(f"{hw}.html")
    for cell in notebook.cells:
        if cell.metadata.get("jupyter", {}).get("source_hidden"):
            cell.source = cell.source.splitlines()[0]  # folded: its title
    page.write_text(HTMLExporter().from_notebook_node(notebook)[0], encoding="utf-8")
    score = json.loads(result.read_text())
    print(f"score: {score['metric']} {score['score']}\npage: {page}")


if __name__ == "__main__":
    number, chosen = sys.argv[1:]
    if not (ROOT / f"HW{number}" / f"HW{number}.ipynb").exists():
        built = ", ".join(path.stem[2:] for path in sorted(ROOT.glob("HW??/HW??.ipynb")))
        sys.exit(f"HW={number} is not here; these are: {built}")
    main(f"HW{number}", chosen)
