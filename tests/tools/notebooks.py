"""What the maintenance commands share: where the notebooks are, how a script becomes a notebook."""

import ast
import hashlib
import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import jupytext
from jupytext.config import load_jupytext_config

ROOT = Path(__file__).resolve().parents[2]
COMMON = ROOT / "tests" / "tools" / "common_cells.py"
REPOSITORY = "ml2022-notebooks/ml2022-spring"  # on GitHub, for the badges: the one place that names it
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
    unknown = {word for word in wanted if not word.startswith("-")} - {path.stem[2:] for path in found}
    if unknown:
        here = ", ".join(path.stem[2:] for path in found)
        raise SystemExit(f"HW={' '.join(sorted(unknown))} is not here; these are: {here}")
    named = [path for path in found if path.stem[2:] in wanted]
    return named or found


def read_script(path):
    return jupytext.read(path, config=load_jupytext_config(str(path)))


def common_cells():
    """{tag: cell} from the one canonical copy."""
    cells = {tag_of(cell): cell for cell in read_script(COMMON).cells if tag_of(cell)}
    for cell in cells.values():
        cell.metadata.pop("lines_to_next_cell", None)  # that is a matter of the neighbour
    return cells


def tag_of(cell):
    return next(iter(cell.metadata.get("tags", [])), "")


def second_edition(notebook):
    return "measured" in [tag_of(cell) for cell in notebook.cells]


def facts(path):
    """The literals of a script's parameters and homework cells, by name."""
    values = {}
    for cell in read_script(path).cells:
        if tag_of(cell) in ("parameters", "homework"):
            exec(cell.source, {}, values)
    return values


def run_alone(path, names, imports, given):
    """The namespace after the script's top-level definitions of `names`, and of nothing else."""
    wanted = []
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        targets = getattr(node, "targets", None) or [getattr(node, "target", node)]
        targets = [one for target in targets for one in getattr(target, "elts", [target])]  # A, B = ...
        defined = {getattr(target, "name", getattr(target, "id", "")) for target in targets}
        if defined & {*names} or (imports and isinstance(node, (ast.Import, ast.ImportFrom))):
            wanted.append(node)
    space = {"__name__": path.stem, **given}
    exec(compile(ast.Module(wanted, []), str(path), "exec"), space)
    return space


def pick(path, *names, **given):
    """The named top-level definitions of a script, run alone: a homework's functions without its training."""
    return SimpleNamespace(**run_alone(path, names, True, given))


def settings_of(path, level, without=(), profile="small"):
    """What a run would have as `settings`: the script's own tables through its own `choose`."""
    outside = {"LEVEL": level, "CHOICES": {"LEVEL": LEVELS}, "OFF": without, "PROFILE": profile}
    space = run_alone(path, ("LEVELS", "SIZES", "choose"), False, {**outside, "Stop": SystemExit})
    return plain(space["choose"](space["LEVELS"], space["SIZES"]))


def ideas_of(path):
    """The rows of LEVELS that can be switched off at boss: an earlier level has another value."""
    table = run_alone(path, ("LEVELS",), False, {})["LEVELS"]
    return [idea for idea, row in table.items() if any(value != row[-1] for value in row[:-1])]


def plain(value):
    """As it comes back from a JSON file."""
    return json.loads(json.dumps(value, default=str))


def digest(notebook):
    """Fingerprint of the code: outputs are fresh when the executed notebook carries the same one."""
    code = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    return hashlib.sha256("\0".join(code).encode()).hexdigest()


def recipe(path):
    """Fingerprint of what decides the score: the homework's own code up to the submission, comments aside."""
    code = ""
    for cell in read_script(path).cells:
        if tag_of(cell) == "common:submit":
            break
        if cell.cell_type == "code" and not tag_of(cell).startswith("common:"):
            code += ast.dump(ast.parse(cell.source))
    return hashlib.sha256(code.encode()).hexdigest()[:12]


def fill(text, mark, content):
    """Put `content` between <!-- mark --> and <!-- /mark -->."""
    pattern = re.compile(rf"(<!-- {mark} -->\n).*?(<!-- /{mark} -->)", re.DOTALL)
    if not pattern.search(text):
        raise SystemExit(f"<!-- {mark} --> ... <!-- /{mark} --> is missing")
    return pattern.sub(lambda match: match[1] + content + match[2], text)
