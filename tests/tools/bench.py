"""make bench [HW=03]: our way against the official sample's way -> tests/bench.json and the README's table.

tests/bench/HWxx.py has `race()`, the headline: (what, our seconds, the official seconds) until the official
sample's own score is reached. It is called three times, in one process. Further rows come from `cases()`:
{name: (what is counted, ours, official)}; a call works and returns how much it did; both in turn, five times.
"""

import importlib.util
import json
import statistics
import time

import sync
import tables
from ladder import machine
from notebooks import ROOT, scripts


def row(what, ours, official, ratios):
    """`ratios`: how many times ours is better, one a repeat."""
    ours, official, ratio = statistics.median(ours), statistics.median(official), statistics.median(ratios)
    numbers = {"ours": round(ours, 2), "official": round(official, 2), "ratio": round(ratio, 2)}
    spread = f"{min(ratios):.1f} to {max(ratios):.1f}"
    return {"what": what, **numbers, "spread": spread, "machine": machine()}


def headline(race):
    """Seconds to a score: less is better."""
    what, ours, official = zip(*[race() for _ in range(3)], strict=True)
    return row(what[0], ours, official, [b / a for a, b in zip(ours, official, strict=True)])


def speed(work):
    tic = time.perf_counter()
    return work() / (time.perf_counter() - tic)


def measure(what, ours, official):
    """How much a second: more is better."""
    ours(), official()
    pairs = [(speed(ours), speed(official)) for _ in range(5)]
    fast, slow = zip(*pairs, strict=True)
    return row(what, fast, slow, [a / b for a, b in pairs])


def bench(path):
    """{name: row} of tests/bench/HWxx.py."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    rows = {}
    if hasattr(module, "race"):
        rows[path.stem] = headline(module.race)
    if hasattr(module, "cases"):
        rows |= {name: measure(*case) for name, case in module.cases().items()}
    for name, one in rows.items():
        print(name, one)
    return rows


if __name__ == "__main__":
    for script in scripts():
        path = ROOT / "tests" / "bench" / f"{script.stem}.py"
        if not path.exists():
            print(f"{script.stem} has no tests/bench/{script.stem}.py yet")
            continue
        rows = bench(path)
        others = {
            name: one
            for name, one in tables.record(tables.BENCH).items()
            if name.partition("/")[0] != script.stem
        }
        text = json.dumps(dict(sorted((others | rows).items())), indent=1)
        tables.BENCH.write_text(text + "\n", encoding="utf-8")
    sync.main(readme=True)
