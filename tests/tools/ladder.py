"""make ladder [HW=03]: what a level reaches, what an idea is worth -> tests/ladder.json, tables, charts.

Four levels with three seeds on the sample; then, in homeworks of the second edition, the boss without each of
its ideas: one seed, and three where the cost is within twice the range of the boss's seeds. The record is
written after every run. What is in it already, of the same code, is not run again, but with FRESH=1 set.
"""

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
from notebooks import LEVELS, facts, ideas_of, read_script, recipe, scripts, second_edition

matplotlib.use("Agg")
import matplotlib.pyplot as plt

SEEDS = [2022, 2023, 2024]
MOST_IDEAS = 8
SHADES = [plt.cm.Blues(shade) for shade in (0.3, 0.5, 0.7, 0.95)]


def machine():
    return f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}"


def run(path, **wanted):
    """result.json of one run in an empty folder, with no other HW_ variable than these."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("HW_")}
    env |= {"HW_DATA": "sample", "HW_PROFILE": "small", "TQDM_DISABLE": "1"} | wanted
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [sys.executable, str(path)], cwd=folder, env=env, capture_output=True, text=True
        )
        if done.returncode:
            raise SystemExit(f"{path.stem} failed with {wanted}\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
        return json.loads(next(Path(folder, "out").glob("*/*/result.json")).read_text(encoding="utf-8"))


def keep(hw, **changes):
    """Change one homework's record; others may be measured meanwhile, so the file is read anew."""
    records = tables.record(tables.LADDER)
    records[hw] = records.get(hw, {"levels": {}}) | changes
    part = tables.LADDER.with_suffix(".part")
    part.write_text(json.dumps(dict(sorted(records.items())), indent=1) + "\n", encoding="utf-8")
    part.replace(tables.LADDER)


def measure(path, kind, name, seeds, **wanted):
    """The row of a level, or of the boss without an idea; what is not in the record yet is run."""
    hw, code, known = path.stem, recipe(path), facts(path)
    rows = tables.record(tables.LADDER).get(hw, {}).get(kind, {})
    row = rows.get(name, {})
    if row.get("code") != code:
        row = {"scores": [], "seeds": [], "seconds": [] if kind == "levels" else 0.0, "code": code}
    for seed in [seed for seed in seeds if seed not in row["seeds"]]:
        result = run(path, HW_SEED=str(seed), **wanted)
        row["scores"].append(result["score"])
        row["seeds"].append(seed)
        row["settings"] = result.get("settings")
        if kind == "levels":
            row["seconds"].append(result["seconds"])
        else:
            more = (result["seconds"] - row["seconds"]) / len(row["seeds"])
            row |= {"score": tables.average(row["scores"]), "seed": row["seeds"][0]}
            row["seconds"] = round(row["seconds"] + more, 1)
        about = {"metric": known["METRIC"], "higher_is_better": known["HIGHER_IS_BETTER"], "data": "sample"}
        about |= {"machine": machine(), "torch": result["torch"]}
        keep(hw, **about, **{kind: rows | {name: row}})
        what = name if kind == "levels" else f"boss without {name}"
        print(f"{hw} {what}, seed {seed}: {result['score']:.5g} in {result['seconds']:.0f} s", flush=True)
    return row


def climb(path):
    """All runs of one homework."""
    if os.environ.get("FRESH"):
        keep(path.stem, levels={}, without={})
    rows = [measure(path, "levels", level, SEEDS, HW_LEVEL=level) for level in LEVELS]
    if not second_edition(read_script(path)):
        return
    boss, ideas = rows[-1]["scores"], ideas_of(path)
    if len(ideas) > MOST_IDEAS:
        raise SystemExit(f"{path.stem} has {len(ideas)} ideas, at most {MOST_IDEAS} are weighed: {ideas}")
    for idea in ideas:
        wanted = {"HW_LEVEL": "boss", "HW_WITHOUT": idea}
        row = measure(path, "without", idea, SEEDS[:1], **wanted)
        cost = abs(row["scores"][0] - tables.average(boss))
        if cost <= 2 * (max(boss) - min(boss)):
            measure(path, "without", idea, SEEDS, **wanted)
    rows = tables.record(tables.LADDER)[path.stem].get("without", {})
    keep(path.stem, without={idea: rows[idea] for idea in ideas})  # those of other days go


def panel(axis, row):
    """One bar a level, the seeds as dots."""
    for k, level in enumerate(LEVELS):
        scores = row["levels"][level]["scores"]
        axis.bar(k, tables.average(scores), color=SHADES[k], label=level)
        axis.plot([k] * len(scores), scores, "k.", markersize=4)
    axis.spines[["top", "right"]].set_visible(False)


def chart(hw, row):
    """The four levels of one homework, for its deck."""
    better = "higher" if row["higher_is_better"] else "lower"
    fig, axis = plt.subplots(figsize=(8, 2.6), layout="constrained")
    panel(axis, row)
    axis.set_xticks(range(len(LEVELS)), LEVELS)
    axis.set_ylabel(f"{row['metric']}, {better} is better")
    return fig


def overview(records):
    """A small panel a homework, readable for fifteen."""
    columns = 5 if len(records) > 9 else 3
    height = -(-len(records) // columns)
    fig, axes = plt.subplots(
        height, columns, figsize=(8, 1.5 * height + 0.4), layout="constrained", squeeze=False
    )
    for axis in axes.flat[len(records) :]:
        axis.set_axis_off()
    for axis, (hw, row) in zip(axes.flat, records.items(), strict=False):
        panel(axis, row)
        axis.set_title(f"{hw}\n{row['metric']} {'↑' if row['higher_is_better'] else '↓'}", fontsize=9)
        axis.set_xticks([])
        axis.locator_params(axis="y", nbins=3)
        axis.tick_params(labelsize=8)
    names = axes.flat[0].get_legend_handles_labels()
    fig.legend(*names, loc="outside upper center", ncols=4, frameon=False, fontsize=9)
    return fig


def charts(hws=()):
    """The overview, and the charts of the named homeworks; a record that is not complete yet is left out."""
    records = {hw: row for hw, row in tables.record(tables.LADDER).items() if set(row["levels"]) == {*LEVELS}}
    figures = {"ladder": overview(records)} if records else {}
    figures |= {f"{hw}-ladder": chart(hw, records[hw]) for hw in hws if hw in records}
    for name, fig in figures.items():
        fig.savefig(tables.ROOT / "slides" / "figures" / f"{name}.png", dpi=120)
        plt.close(fig)


if __name__ == "__main__":
    for script in scripts():
        climb(script)
        charts([script.stem])
    sync.main(readme=True)
