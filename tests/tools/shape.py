"""make shape [HW=03]: how long each notebook is, beside its budget; what is over is marked with "!".

Visible are the code cells that are neither common nor folded. Blank lines are not counted.
"""

import ast
import sys

import nbformat
from notebooks import common_cells, facts, read_script, scripts, tag_of

BUDGET = {
    "code": 400,
    "cells": 50,
    "to figure": 60,
    "function": 30,
    "cell": 40,
    "text": 180,
    "log": 30,
    "own": 3,
}
OTHERS = {"HW01": {"code": 300}, "HW15": {"code": 450}, "HW09": {"code": 600, "cells": 70}}
OTHERS |= {hw: {"code": 480} for hw in ("HW05", "HW07", "HW14")}
COMMON = 320  # all common cells together
WHAT = """code: visible lines; to figure: those up to the first figure; function, cell: the longest visible
one; text: lines of Markdown; log: what the committed run printed; own: this homework's own parameters"""


def budget(hw):
    return BUDGET | OTHERS.get(hw, {})


def lines(text):
    return len([line for line in text.splitlines() if line.strip()])


def visible(cell):
    folded = tag_of(cell).startswith("common:") or cell.metadata.get("cellView") == "form"
    return cell.cell_type == "code" and not folded


def pictures(cells):
    """The sources of the cells that have a picture among their outputs."""
    found = set()
    for cell in cells:
        kinds = [kind for out in cell.get("outputs", []) for kind in out.get("data", {})]
        if any(kind.startswith("image/") for kind in kinds):
            found.add(cell.source)
    return found


def longest_function(source):
    length = 0
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            length = max(length, lines(ast.get_source_segment(source, node)))
    return length


def log_lines(cells):
    streams = [out.text for cell in cells for out in cell.get("outputs", []) if out.get("name") == "stdout"]
    return sum(lines(text) for text in streams)


def shape(path):
    """{what: how much} of one homework; the script as it is, with the outputs of its notebook."""
    cells = read_script(path).cells
    executed = []
    if path.with_suffix(".ipynb").exists():
        executed = nbformat.read(path.with_suffix(".ipynb"), as_version=4).cells
    drawn, code, to_figure = pictures(executed), 0, None
    shown = [cell.source for cell in cells if visible(cell)]
    for source in shown:
        code += lines(source)
        if to_figure is None and ("show(" in source or source in drawn):
            to_figure = code
    return {
        "code": code,
        "cells": len(cells),
        "to figure": code if to_figure is None else to_figure,
        "function": max(longest_function(source) for source in shown),
        "cell": max(lines(source) for source in shown),
        "text": sum(lines(cell.source) for cell in cells if cell.cell_type == "markdown"),
        "log": log_lines(executed),
        "own": len(facts(path).get("OWN", {})),
    }


def over(path):
    """{what: how much} of all that is over its budget."""
    limits = budget(path.stem)
    return {name: count for name, count in shape(path).items() if count > limits[name]}


def common_lines():
    return sum(lines(cell.source) for cell in common_cells().values())


def print_table():
    print(f"{'':6}" + "".join(f"{name:>11}" for name in BUDGET))
    for path in scripts():
        limits, row = budget(path.stem), ""
        for name, count in shape(path).items():
            mark = "!" if count > limits[name] else " "
            row += f"{f'{count}/{limits[name]}{mark}':>11}"
        print(f"{path.stem:6}{row}")
    mark = "!" if common_lines() > COMMON else ""
    print(f"common cells, once: {common_lines()}/{COMMON}{mark} lines\n{WHAT}")


def summary():
    """One line: who keeps the budgets, who does not and where."""
    too_long = {path.stem: over(path) for path in scripts()}
    fine = " ".join(hw for hw, what in too_long.items() if not what)
    text = f"shape: {fine or 'none'} within the budgets"
    parts = [
        f"{hw} ({', '.join(f'{name} {count}' for name, count in what.items())})"
        for hw, what in too_long.items()
        if what
    ]
    return text + ("; over: " + " ".join(parts) if parts else "")


if __name__ == "__main__":
    if "--summary" in sys.argv:
        print(summary())
    else:
        print_table()
