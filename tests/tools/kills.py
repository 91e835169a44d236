"""20 SIGKILLs at random moments of a tiny run, each followed by a restart: 20 equal submissions.

python tests/tools/kills.py HW01 [20]
"""

import hashlib
import random
import sys
import tempfile
import time
from pathlib import Path

from notebooks import ROOT

sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "offline")]
from runner import Run


def submission(folder):
    return next(
        file for file in Path(folder).glob("out/*/*/*.sample.*") if file.suffix != ".part"
    ).read_bytes()


def main(hw, times):
    script, dice = ROOT / hw / f"{hw}.py", random.Random(hw)
    with tempfile.TemporaryDirectory() as folder:
        run = Run(script, folder).wait()
        assert run.code == 0, run.text
        wanted = submission(folder)
    with tempfile.TemporaryDirectory() as folder:  # once more: now the server is warm
        tic = time.monotonic()
        Run(script, folder).wait()
        seconds = time.monotonic() - tic
    equal = 0
    for k in range(times):
        with tempfile.TemporaryDirectory() as folder:
            moment = dice.random() * seconds
            killed = Run(script, folder).kill_after(moment)
            again = Run(script, folder).wait()
            assert again.code == 0, again.text
            equal += submission(folder) == wanted
            state = "killed" if killed else "had ended"
            print(f"{k + 1:3d}: {state} at {moment:.2f} s, restarted, equal so far {equal}", flush=True)
    print(f"{hw}: {equal} of {times} submissions are equal, md5 {hashlib.md5(wanted).hexdigest()}")
    return equal != times


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 20))
