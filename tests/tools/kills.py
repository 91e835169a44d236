"""SIGKILLs at random moments of a tiny run, each followed by a restart: equal submissions every time.

python tests/tools/kills.py HW01 [20]: 20 anywhere in the run, and 20 more spread over
its stages, each of which gets one at least.
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

# In the run: notes when a checkpoint is written, and kills `delay` seconds after number so and so.
WATCH = """
import os, pathlib, threading, time
real, count = pathlib.Path.write_bytes, 0
def arm():
    if count == {number}:
        threading.Timer({delay}, os.kill, (os.getpid(), 9)).start()
def write_bytes(path, data):
    global count
    written = real(path, data)
    if path.name.endswith(".pt.part"):
        count += 1
        with open("saves.log", "a") as log:
            log.write(f"{{path.name.rsplit('.', 3)[0]}} {{time.monotonic()}}\\n")
        arm()
    return written
pathlib.Path.write_bytes = write_bytes
arm()
"""


def submission(folder):
    found = [file for file in Path(folder).glob("out/*/*/*.sample.*") if file.suffix != ".part"]
    assert len(found) == 1, found
    return found[0].read_bytes()


def watch(number, delay):
    return WATCH.format(number=number, delay=delay)


def straight(script):
    """(submission, seconds, [(stage, number of the checkpoint before, seconds from there to this one)])"""
    with tempfile.TemporaryDirectory() as folder:
        assert Run(script, folder).wait().code == 0  # the server gets warm
    with tempfile.TemporaryDirectory() as folder:
        before = tic = time.monotonic()
        run = Run(script, folder, patch=watch(-1, 0)).wait()
        seconds = time.monotonic() - tic
        assert run.code == 0, run.text
        gaps = []
        for number, line in enumerate(Path(folder, "saves.log").read_text().splitlines()):
            stage, _, moment = line.rpartition(" ")  # a stage may have blanks in its name
            gaps.append((stage, number, float(moment) - before))
            before = float(moment)
        return submission(folder), seconds, gaps


def restarted(script, wanted, kill):
    """Kill one run, finish it with a second one: (was it killed, is the submission equal)"""
    with tempfile.TemporaryDirectory() as folder:
        killed = kill(folder)
        again = Run(script, folder).wait()
        assert again.code == 0, again.text
        return killed, submission(folder) == wanted


def main(hw, times):
    script, dice = ROOT / hw / f"{hw}.py", random.Random(hw)
    wanted, seconds, gaps = straight(script)
    stages, bad = list(dict.fromkeys(stage for stage, _, _ in gaps)), 0
    for stage in ["anywhere", *stages]:
        mine = [gap for gap in gaps if gap[0] == stage]
        count = times if stage == "anywhere" else max(1, times // len(stages))
        killed = equal = 0
        for _ in range(count):
            if stage == "anywhere":
                moment = dice.random() * seconds
                kill = lambda folder, moment=moment: Run(script, folder).kill_after(moment)
            else:
                _, number, gap = dice.choices(mine, weights=[gap[2] for gap in mine])[0]
                patch = watch(number, gap * dice.random())
                kill = lambda folder, patch=patch: Run(script, folder, patch=patch).wait().code == -9
            was, same = restarted(script, wanted, kill)
            killed, equal = killed + was, equal + same
        print(f"{hw}, {stage}: {killed} of {count} killed, {equal} submissions equal", flush=True)
        bad += count - equal
    print(f"{hw}: md5 {hashlib.md5(wanted).hexdigest()}")
    return bad > 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 20))
