"""make ladder [HW=03]: four levels, three seeds, full sample -> tests/ladder.json, tables, charts."""

import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

import matplotlib
import sync
import tables
from notebooks import LEVELS, ROOT, facts, scripts

matplotlib.use("Agg")
import matplotlib.pyplot as plt

SEEDS = [2022, 2023, 2024]


def measure(path):
    """The record of one homework."""
    known, levels = facts(path), {}
    for level in LEVELS:
        levels[level] = {"scores": [], "seeds": SEEDS, "seconds": []}
        for seed in SEEDS:
            with tempfile.TemporaryDirectory() as folder:
                wanted = {"HW_LEVEL": level, "HW_SEED": str(seed), "HW_DATA": "sample", "TQDM_DISABLE": "1"}
                subprocess.run([sys.executable, str(path)], cwd=folder, env=os.environ | wanted, check=True)
                result = Path(folder, "out", path.stem, f"{level}-sample", "result.json")
                result = json.loads(result.read_text())
            levels[level]["scores"].append(result["score"])
            levels[level]["seconds"].append(result["seconds"])
    about = {"metric": known["METRIC"], "higher_is_better": known["HIGHER_IS_BETTER"], "data": "sample"}
    return about | {"machine": machine(), "torch": result["torch"], "levels": levels}


def machine():
    return f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}"


def panel(axis, hw, row):
    """One bar a level, the seeds as dots."""
    levels = [row["levels"][level]["scores"] for level in LEVELS]
    axis.bar(
        LEVELS, [sum(scores) / len(scores) for scores in levels], color=plt.cm.Blues([0.35, 0.5, 0.7, 0.9])
    )
    for k, scores in enumerate(levels):
        axis.plot([k] * len(scores), scores, "k.", markersize=5)
    axis.set(title=f"{hw}: {row['metric']}, {'higher' if row['higher_is_better'] else 'lower'} is better")
    axis.spines[["top", "right"]].set_visible(False)


def charts(records):
    folder = ROOT / "slides" / "figures"
    for hw, row in records.items():
        fig, axis = plt.subplots(figsize=(8, 2.6), layout="constrained")
        panel(axis, hw, row)
        fig.savefig(folder / f"{hw}-ladder.png", dpi=100)
        plt.close(fig)
    lines, width = -(-len(records) // 3), min(3, len(records))
    fig, axes = plt.subplots(lines, width, figsize=(8, 2.4 * lines), layout="constrained", squeeze=False)
    for axis in axes.flat[len(records) :]:
        axis.set_axis_off()
    for axis, (hw, row) in zip(axes.flat, records.items(), strict=False):
        panel(axis, hw, row)
    fig.savefig(folder / "ladder.png", dpi=100)


if __name__ == "__main__":
    for script in scripts():
        records = tables.record(tables.LADDER) | {script.stem: measure(script)}
        text = json.dumps(dict(sorted(records.items())), indent=1)
        tables.LADDER.write_text(text + "\n", encoding="utf-8")
    charts(tables.record(tables.LADDER))
    sync.main()
