"""The measured numbers as text: tables for headers, headings, decks and README.md from the two records."""

import json
import math
import re

from notebooks import LEVELS, REPOSITORY, ROOT, facts, scripts

LADDER, BENCH = ROOT / "tests" / "ladder.json", ROOT / "tests" / "bench.json"
HEADING = re.compile(r"^(## (Simple|Medium|Strong|Boss)\b.*)\([^()]*\)$", re.MULTILINE)


def record(path):
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def measured(hw, level):
    """(scores, seconds) of a level, one a seed; both empty before the ladder was run."""
    row = record(LADDER).get(hw, {}).get("levels", {}).get(level, {})
    return row.get("scores", []), row.get("seconds", [])


def average(numbers):
    return sum(numbers) / len(numbers)


def half_range(numbers):
    return (max(numbers) - min(numbers)) / 2


def number(value, least):
    """One digit after the point from ten on, else three; more only where `least` would show as zero."""
    digits = 1 if abs(value) >= 10 else 3
    return f"{value:.{digits + (0 < least < 0.5 * 10**-digits)}f}"


def two_digits(value, sign=""):
    """Two significant digits, but whole numbers whole: 0.23, 1.5, 82, 107."""
    digits = max(0, 1 - math.floor(math.log10(abs(value)))) if value else 0
    return f"{value:{sign}.{digits}f}".replace("-", "−")


def mean(hw, level):
    scores, _ = measured(hw, level)
    return number(average(scores), half_range(scores)) if scores else ""


def score(hw, level):
    """The mean over the seeds, and half their range: 0.123 ± 0.001; empty before the ladder was run."""
    scores, _ = measured(hw, level)
    if not scores:
        return ""
    half, decimals = half_range(scores), len(mean(hw, level).partition(".")[2])
    return f"{mean(hw, level)} ± {half:.{decimals}f}"


def seconds(hw, level):
    _, times = measured(hw, level)
    return f"{average(times):.0f}" if times else ""


def box(hw):
    """What a reader may expect who presses Run all."""
    expect = "its score and time are not measured yet."
    scores, times = measured(hw, "boss")
    if scores:
        took = (
            f"{average(times):.0f} seconds" if average(times) < 100 else f"{average(times) / 60:.0f} minutes"
        )
        metric = facts(ROOT / hw / f"{hw}.py")["METRIC"]
        expect = f"expect {metric} {mean(hw, 'boss')} on the sample in about {took} on two CPU cores."
    return f"> **Press *Run all*.** This run is *boss*: {expect} GPU: not measured.\n"


def gain(hw, level):
    """What a heading says of its rung: the score of simple, of the others what they add to the one before."""
    here, _ = measured(hw, level)
    before, _ = measured(hw, LEVELS[LEVELS.index(level) - 1])
    if not here or not before:
        return "?"
    if level == "simple":
        return two_digits(average(here))
    return two_digits(average(here) - average(before), "+")


def headings(hw, text):
    return HEADING.sub(lambda match: f"{match[1]}({gain(hw, match[2].lower())})", text)


def measured_cell(hw):
    """The record as a literal, laid out as ruff does."""
    row = record(LADDER).get(hw, {})
    text = "# @title What was measured: written by make ladder\nMEASURED = {\n"
    for name in ("levels", "without"):
        scores = {key: one["scores"] for key, one in row.get(name, {}).items()}
        lines = [
            f"        {json.dumps(key, ensure_ascii=False)}: {rounded(scores[key])},\n" for key in scores
        ]
        text += f'    "{name}": {{{chr(10) if lines else ""}{"".join(lines)}{"    " if lines else ""}}},\n'
    return text + "}"


def rounded(scores):
    return [float(f"{score:.5g}") for score in scores]


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
    """The last two columns of the homeworks' table: the sample's ladder, and what to open."""
    built = [path.stem for path in scripts([])]

    def ladder(hw):
        return f"{mean(hw, 'simple')} → {mean(hw, 'boss')}" if hw in built else ""

    def links(hw):
        colab = f"https://colab.research.google.com/github/{REPOSITORY}/blob/main/{hw}/{hw}.ipynb"
        here = f"[Colab]({colab}) [notebook]({hw}/{hw}.ipynb) [slides](slides/{hw}.md)"
        return here if hw in built else "not built yet"

    return refill(table, [f"HW{number:02d}" for number in range(1, 16)], {4: ladder, 5: links})


def readme_ladder():
    """One row a homework that is built: sample score of each level beside the course's baseline."""
    text = "| homework | metric | simple | medium | strong | boss | seeds |\n|---|---|---|---|---|---|---|\n"
    for path in scripts([]):
        hw, known = path.stem, facts(path)
        better = "higher" if known["HIGHER_IS_BETTER"] else "lower"
        cells = [f"{score(hw, level)} ({baseline(hw, level) or 'none'})" for level in LEVELS]
        scores, _ = measured(hw, "boss")
        text += f"| [{hw}]({hw}/{hw}.ipynb) | {known['METRIC']}, {better} is better | "
        text += f"{' | '.join(cells)} | {len(scores)} |\n"
    return text


def amount(value):
    """Three significant digits, thousands whole."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def readme_bench():
    """The headlines first, one a homework; then the further rows."""
    text = "| what | ours | the official way | ratio | spread |\n|---|---|---|---|---|\n"
    for name, row in sorted(record(BENCH).items(), key=lambda pair: ("/" in pair[0], pair[0])):
        numbers = f"{amount(row['ours'])} | {amount(row['official'])} | {row['ratio']:.1f} | {row['spread']}"
        text += f"| {name}: {row['what']} | {numbers} |\n"
    return text
