"""make run HW=03 LEVEL=strong: execute a notebook on its sample data, live, and leave a page to read."""

import os
import signal
import sys


def leave(*_):
    """The end after Ctrl-C, from the first moment on: the imports below take seconds."""
    print("Stopped by hand. Run again to go on from the last checkpoint.", file=sys.stderr, flush=True)
    os._exit(130)  # at once: the client would complain about its kernel


if __name__ == "__main__":
    signal.signal(signal.SIGINT, leave)

import tempfile
import threading
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from notebooks import ROOT, scripts
from traitlets.config import Config


class Live(NotebookClient):
    """Prints what a cell prints while it runs."""

    def output(self, outs, msg, display_id, cell_index):
        if msg["msg_type"] == "stream":
            print(msg["content"]["text"], end="", flush=True)
        return super().output(outs, msg, display_id, cell_index)


def client_of(notebook, folder, sockets):
    """A client that speaks to its kernel through files, where there are such: no port, and no warning."""
    config = Config()
    if os.name == "posix":
        config.KernelManager.transport = "ipc"
        config.KernelManager.ip = f"{sockets}/kernel"
    quiet = {"record_timing": False, "store_widget_state": False, "coalesce_streams": True}
    client = Live(notebook, timeout=None, config=config, **quiet)
    client.resources = {"metadata": {"path": str(folder)}}
    return client


def stop(client):
    """Kill the kernel: what it has written stays whole, and a checkpoint is never half-written."""
    if client.km and client.km.has_kernel:
        process = client.km.provisioner.process
        process.kill()
        process.wait()


def execute(notebook, folder):
    """Run all cells. The client works in a thread of its own: Ctrl-C is ours and not its event loop's."""
    errors, before = [], signal.signal(signal.SIGINT, signal.default_int_handler)
    with tempfile.TemporaryDirectory() as sockets:
        client = client_of(notebook, folder, sockets)

        def work():
            try:
                client.execute()
            except Exception as error:
                errors.append(error)

        worker = threading.Thread(target=work, daemon=True)
        worker.start()
        try:
            while worker.is_alive():
                worker.join(0.2)
        except KeyboardInterrupt:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # once is enough
            stop(client)
            raise
    signal.signal(signal.SIGINT, before)
    if errors:
        raise errors[0]


def write_page(notebook, page):
    """The executed notebook as HTML; of a folded cell only the title."""
    from nbconvert import HTMLExporter

    for cell in notebook.cells:
        if cell.metadata.get("jupyter", {}).get("source_hidden"):
            cell.source = cell.source.splitlines()[0]
    page.write_text(HTMLExporter().from_notebook_node(notebook)[0], encoding="utf-8")


def main(path):
    sys.stdout.reconfigure(errors="replace")  # a terminal without Chinese letters shows question marks
    sys.stderr.reconfigure(errors="replace")
    os.environ.setdefault("HW_DATA", "sample")
    os.environ.setdefault("TQDM_DISABLE", "1")
    notebook = nbformat.read(path.with_suffix(".ipynb"), as_version=4)
    try:
        execute(notebook, ROOT)
    except KeyboardInterrupt:
        leave()
    except CellExecutionError as error:
        sys.exit(error.traceback)
    out = ROOT / Path(os.environ.get("HW_OUT_DIR", f"out/{path.stem}")).expanduser()
    result = max(out.glob("*/result.json"), key=lambda found: found.stat().st_mtime)
    page = result.with_name(f"{path.stem}.html")
    write_page(notebook, page)
    print(f"page: {page}")  # the notebook itself has said where the submission lies, and the score


if __name__ == "__main__":
    for script in scripts():
        main(script)
