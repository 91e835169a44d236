"""The measured numbers as text: tables for headers, decks and README.md from the two records."""

import json

from notebooks import LEVELS, REPOSITORY, ROOT, facts, scripts

LADDER, BENCH = ROOT / "tests" / "ladder.json", ROOT / "tests" / "bench.json"


def record(path):
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def score(hw, level):
    """The mean over the seeds, and half their range: 0.123 ± 0.001; empty before the ladder was run."""
    scores = record(LADDER).get(hw, {}).get("levels", {}).get(level, {}).get("scores", [])
    if not scores:
        return ""
    mean, half = sum(scores) / len(scores), (max(scores) - min(scores)) / 2
    return f"{mean:.1f} ± {half:.1f}" if abs(mean) >= 10 else f"{mean:.3f} ± {half:.3f}"


def seconds(hw, level):
    times = record(LADDER).get(hw, {}).get("levels", {}).get(level, {}).get("seconds", [])
    return f"{sum(times) / len(times):.0f}" if times else ""


def refill(table, keys, cells):
    """A table whose rows begin with a key: column k of its row becomes cells[k](key), the rest stays."""
    lines = []
    for line in table.splitlines():
        fields = [field.strip() for field in line.strip("|").split("|")]
        if fields[0] in keys:
            for column, value in cells.items():
                fields[column] = value(fields[0])
            line = f"| {' | '.join(fields)} |"
        lines.append(line)
    return "\n".join(lines) + "\n"


def baseline(hw, level):
    return f"{facts(ROOT / hw / f'{hw}.py')['BASELINES'].get(level, '')}"


def badges(hw):
    at = f"{REPOSITORY}/blob/main/{hw}/{hw}.ipynb"
    colab, kaggle = "https://colab.research.google.com", "https://kaggle.com"
    return (
        f"[![Colab]({colab}/assets/colab-badge.svg)]({colab}/github/{at})\n"
        f"[![Kaggle]({kaggle}/static/images/open-in-kaggle.svg)]"
        f"({kaggle}/kernels/welcome?src=https://github.com/{at})\n"
    )


def readme_homeworks(table):
    """The last three columns of the homeworks' table: sample ladder, notebook, slides."""
    built = [path.stem for path in scripts([])]
    cells = {
        6: lambda hw: " / ".join(score(hw, level).split(" ")[0] for level in LEVELS) if hw in built else "",
        7: lambda hw: f"[notebook]({hw}/{hw}.ipynb)" if hw in built else "not built yet",
        8: lambda hw: f"[slides](slides/{hw}.md)" if hw in built else "",
    }
    return refill(table, [f"HW{number:02d}" for number in range(1, 16)], cells)


def readme_ladder():
    """One row a homework that is built: sample score of each level beside the course's baseline."""
    text = "| homework | metric | simple | medium | strong | boss | seeds |\n|---|---|---|---|---|---|---|\n"
    for path in scripts([]):
        hw, known = path.stem, facts(path)
        better = "higher" if known["HIGHER_IS_BETTER"] else "lower"
        cells = [f"{score(hw, level)} ({baseline(hw, level) or 'none'})" for level in LEVELS]
        seeds = record(LADDER).get(hw, {}).get("levels", {}).get("boss", {}).get("seeds", [])
        text += f"| [{hw}]({hw}/{hw}.ipynb) | {known['METRIC']}, {better} is better | "
        text += f"{' | '.join(cells)} | {len(seeds)} |\n"
    return text


def readme_bench():
    text = "| what | ours | the official way | ratio | spread |\n|---|---|---|---|---|\n"
    for name, row in sorted(record(BENCH).items()):
        numbers = f"{row['ours']:,.0f} | {row['official']:,.0f} | {row['ratio']:.1f} | {row['spread']}"
        text += f"| {name}: {row['what']} | {numbers} |\n"
    return text
