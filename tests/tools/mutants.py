"""make mutants HW=01, or HW=common: do the tests notice plausible mistakes?

A test module ends with MUTANTS, a list of pairs (old text, new text). Each pair goes into a copy of the
repository, into the homework's script or (of a module of no homework) into the common cells; then the tests
run there, the module's own first. The first line is the copy as it is, which must pass. Two copies are at
work at a time. A mutant that no test catches has survived: exit code 1. Which test caught a mutant stands in
out/mutants.json: the next time it is asked first.
"""

import ast
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from notebooks import ROOT, scripts

TESTS = ROOT / "tests"
SKIP = shutil.ignore_patterns(
    ".git", ".venv", "out", "data", "node_modules", "build", "__pycache__", ".*_cache"
)
NOT_ASKED = ("test_repo", "test_tools")  # they look at the committed outputs and at the tools
CAUGHT = ROOT / "out" / "mutants.json"  # {mutant: the test that caught it}: the next time it is asked first
LIMIT = 900  # seconds; a mutant that runs for ever is noticed, too
AS_IT_IS = ("", "")


def mutants_of(module):
    """The literal MUTANTS of a test module, which is not run for it."""
    for node in ast.parse(module.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "MUTANTS":
            return ast.literal_eval(node.value)
    return []


def homework_of(module):
    """HW01 of test_hw01.py; of a module of no homework: common."""
    found = re.fullmatch(r"test_(hw\d\d)", module.stem)
    return found[1].upper() if found else "common"


def tests_for(module):
    """pytest's arguments: the module; after it those of no homework as far as they concern its homework."""
    hw = homework_of(module)
    others = [path for path in sorted(TESTS.glob("test_*.py")) if homework_of(path) == "common"]
    files = [path for path in others if path != module and path.stem not in NOT_ASKED]
    chosen = ["-k", "not HW"] if hw == "common" else ["-m", "not common", "-k", hw]
    return [[*chosen, f"tests/{module.name}"], [*chosen, *(f"tests/{path.name}" for path in files)]]


def copy_with(folder, target, hw, old, new):
    """The repository with one homework in it and one text changed, its notebook built again."""
    shutil.copytree(ROOT, folder, ignore=SKIP)
    for other in folder.glob("HW??"):
        if other.name != hw:
            shutil.rmtree(other)
    text = (folder / target).read_text(encoding="utf-8")
    (folder / target).write_text(text.replace(old, new), encoding="utf-8")
    subprocess.run(
        [sys.executable, "tests/tools/sync.py", hw[2:]], cwd=folder, check=True, capture_output=True
    )


def run_tests(folder, tests):
    """(passes, caught or broken; the first test that failed) in that copy of the repository."""
    command = [sys.executable, "-m", "pytest", "-x", "-rfE", "-p", "no:cacheprovider", *tests]
    command += ["--basetemp", f"{folder.parent}/tmp"]
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=LIMIT)
    except subprocess.TimeoutExpired:
        return "caught", f"it runs for more than {LIMIT} s"
    failed = re.search(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE)
    said = {0: "passes", 1: "caught"}.get(done.returncode, "broken")
    if said == "broken":
        return said, done.stdout[-1500:] + done.stderr[-1500:]
    return said, failed[1] if failed else ""


def ask(module, target, old, new, last):
    """(passes, caught or broken; the first test that failed; seconds); `last`: who caught it last time."""
    tic, hw = time.monotonic(), homework_of(module)
    if hw == "common":
        hw = scripts([])[0].stem
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place, "repo")
        copy_with(folder, target, hw, old, new)
        if last:
            said, by = run_tests(folder, [last])
        if not last or said != "caught":
            for tests in tests_for(module):
                said, by = run_tests(folder, tests)
                if said != "passes":
                    break
    return said, by, time.monotonic() - tic


def short(text):
    line = " ".join(text.split())
    return line if len(line) < 50 else f"{line[:47]}..."


def judge(module):
    """One line a mutant; how many did the tests not notice?"""
    hw = homework_of(module)
    target = "tests/tools/common_cells.py" if hw == "common" else f"{hw}/{hw}.py"
    text, pairs = (ROOT / target).read_text(encoding="utf-8"), mutants_of(module)
    for old, _ in pairs:
        if text.count(old) != 1:
            raise SystemExit(f"{module.name}: {old!r} is in {target} {text.count(old)} times, not once")
    pairs, bad = [AS_IT_IS, *pairs], 0
    caught = json.loads(CAUGHT.read_text()) if CAUGHT.exists() else {}
    with ThreadPoolExecutor(2) as pool:
        answers = pool.map(lambda pair: ask(module, target, *pair, caught.get(" -> ".join(pair))), pairs)
        for pair, (said, by, seconds) in zip(pairs, answers, strict=True):
            what = "as it is" if pair == AS_IT_IS else f"{short(pair[0])} -> {short(pair[1])}"
            good = said == ("passes" if pair == AS_IT_IS else "caught")
            if not good:
                bad, said = bad + 1, {"passes": "SURVIVED", "caught": "FAILS"}.get(said, said)
            elif said == "caught" and "::" in by:
                caught[" -> ".join(pair)] = by
                CAUGHT.parent.mkdir(exist_ok=True)
                CAUGHT.write_text(json.dumps(caught, indent=1))
            print(f"{said:8} {seconds:4.0f} s  {what}  {by}", flush=True)
    print(f"{module.name}: {len(pairs) - 1} mutants, {bad} lines are not as they should be")
    return bad


if __name__ == "__main__":
    wanted = {word if word == "common" else f"HW{word}" for word in sys.argv[1:]}
    modules = [path for path in sorted(TESTS.glob("test_*.py")) if mutants_of(path)]
    chosen = [path for path in modules if not wanted or homework_of(path) in wanted]
    if not chosen:
        here = " ".join(homework_of(path) for path in modules)
        sys.exit(f"no MUTANTS for {' '.join(sorted(wanted))}; there are some for: {here}")
    sys.exit(any([judge(module) for module in chosen]))
