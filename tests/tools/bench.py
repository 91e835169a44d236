"""make bench [HW=03]: our way against the official sample's way -> tests/bench.json and the README's table.

tests/bench/HWxx.py has `cases()`: {name: (what is counted, ours, official)}; a call works and returns how
much it did. Both alternate in one process, five times after a warm-up.
"""

import importlib.util
import json
import statistics
import sys
import time

import sync
import tables
from ladder import machine
from notebooks import ROOT


def speed(work):
    tic = time.perf_counter()
    return work() / (time.perf_counter() - tic)


def measure(what, ours, official):
    ours(), official()
    pairs = [(speed(ours), speed(official)) for _ in range(5)]
    ratios = sorted(a / b for a, b in pairs)
    fast, slow = (statistics.median(side) for side in zip(*pairs, strict=True))
    row = {"what": what, "ours": round(fast, 2), "official": round(slow, 2), "ratio": round(ratios[2], 2)}
    return row | {"spread": f"{ratios[0]:.1f} to {ratios[-1]:.1f}", "machine": machine()}


if __name__ == "__main__":
    records = tables.record(tables.BENCH)
    for path in sorted((ROOT / "tests" / "bench").glob("HW??.py")):
        if sys.argv[1:] and path.stem[2:] not in sys.argv[1:]:
            continue
        spec = importlib.util.spec_from_file_location(path.stem, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        records = {name: row for name, row in records.items() if name.split("/")[0] != path.stem}
        for name, case in module.cases().items():
            records[name] = measure(*case)
            print(name, records[name])
    tables.BENCH.write_text(json.dumps(dict(sorted(records.items())), indent=1) + "\n", encoding="utf-8")
    sync.main()
