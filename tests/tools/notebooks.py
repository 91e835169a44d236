"""What the maintenance commands share: where the notebooks are, how a script becomes a notebook."""

import ast
import hashlib
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import jupytext
from jupytext.config import load_jupytext_config

ROOT = Path(__file__).resolve().parents[2]
COMMON = ROOT / "tests" / "tools" / "common_cells.py"
REPOSITORY = "ml2022-notebooks/ml2022-spring"  # on GitHub, for the badges
LEVELS = ("simple", "medium", "strong", "boss")
METADATA = {
    "accelerator": "GPU",
    "colab": {"provenance": [], "toc_visible": True},
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def scripts(wanted=sys.argv[1:]):
    """HW*/HW*.py, or those named as 01 03 ... on the command line."""
    found = sorted(path for path in ROOT.glob("HW??/HW??.py") if path.stem == path.parent.name)
    return [path for path in found if not wanted or path.stem[2:] in wanted]


def read_script(path):
    return jupytext.read(path, config=load_jupytext_config(str(path)))


def write_script(notebook, path):
    text = jupytext.writes(notebook, fmt="py:percent", config=load_jupytext_config(str(path)))
    if text != path.read_text(encoding="utf-8"):
        path.write_text(text, encoding="utf-8")


def common_cells():
    """{tag: cell} from the one canonical copy."""
    cells = {tag_of(cell): cell for cell in read_script(COMMON).cells if tag_of(cell)}
    for cell in cells.values():
        cell.metadata.pop("lines_to_next_cell", None)  # that is a matter of the neighbour
    return cells


def tag_of(cell):
    return next(iter(cell.metadata.get("tags", [])), "")


def facts(path):
    """The literals of a script's parameters and homework cells, by name."""
    values = {}
    for cell in read_script(path).cells:
        if tag_of(cell) in ("parameters", "homework"):
            exec(cell.source, {}, values)
    return values


def pick(path, *names, **given):
    """The named top-level definitions of a script, run alone: a homework's functions without its training."""
    wanted = []
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        targets = getattr(node, "targets", None) or [getattr(node, "target", node)]
        if isinstance(node, (ast.Import, ast.ImportFrom)) or {
            getattr(t, "name", getattr(t, "id", "")) for t in targets
        } & {*names}:
            wanted.append(node)
    space = {"__name__": path.stem, **given}
    exec(compile(ast.Module(wanted, []), str(path), "exec"), space)
    return SimpleNamespace(**space)


def digest(notebook):
    """Fingerprint of the code: outputs are fresh when the executed notebook carries the same one."""
    code = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    return hashlib.sha256("\0".join(code).encode()).hexdigest()


def fill(text, mark, content):
    """Put `content` between <!-- mark --> and <!-- /mark -->."""
    pattern = re.compile(rf"(<!-- {mark} -->\n).*?(<!-- /{mark} -->)", re.DOTALL)
    if not pattern.search(text):
        raise SystemExit(f"<!-- {mark} --> ... <!-- /{mark} --> is missing")
    return pattern.sub(lambda match: match[1] + content + match[2], text)
