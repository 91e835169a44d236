"""Runs a homework's script in a fresh process that has imported torch and friends already: seconds saved.

Every process is forked from a clean server that imported the packages and did nothing else, so a run is as
good as `python HW01.py`, and can be killed like it.
"""

import multiprocessing
import os
import runpy
import signal
import sys
import time
from pathlib import Path

TESTS = Path(__file__).resolve().parent
PACKAGES = [
    "torch",
    "torch._dynamo",
    "accelerate",
    "matplotlib.pyplot",
    "pandas",
    "sklearn.cluster",
    "sklearn.datasets",
    "sklearn.linear_model",
    "requests",
    "torchvision.transforms.v2",
    "gymnasium.envs.box2d.lunar_lander",
]
os.environ["OMP_NUM_THREADS"] = (
    "1"  # two test workers on two cores: more threads would only wait for each other
)
context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload([*PACKAGES, "sklearn.feature_selection", "scipy.sparse.csgraph"])


def environment(**wanted):
    """What a run inherits: no HW_ settings and no credentials but those a test gives, and no network."""
    banned = ("HW_", "KAGGLE", "PYTEST", "COLAB")
    mine = {name: value for name, value in os.environ.items() if not name.startswith(banned)}
    mine |= {"PYTHONPATH": str(TESTS / "offline"), "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    return mine | {name: str(value) for name, value in wanted.items()}


def child(script, folder, env, patch):
    """In the new process: become `python script`."""
    os.environ.clear()
    os.environ.update(env)
    os.chdir(folder)
    sys.path.insert(0, str(TESTS / "offline"))
    out = os.open("run.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    sys.argv = [str(script)]
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background would ignore it
    import sitecustomize

    sys.addaudithook(sitecustomize.guard)
    sys.excepthook, code = sys.__excepthook__, 0
    try:
        exec(patch, {})
        runpy.run_path(str(script), run_name="__main__")
    except SystemExit as error:
        code = error.code or 0
        if isinstance(code, str):
            sys.stderr.write(f"{code}\n")
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    sys.stdout.flush()
    os._exit(code if isinstance(code, int) else 1)


class Run:
    """One run of a script in `folder`; `patch` is Python code that spoils something first."""

    def __init__(self, script, folder, patch="", **wanted):
        self.folder, self.log = Path(folder), Path(folder, "run.log")
        self.log.unlink(missing_ok=True)
        wanted = {
            "HW_PROFILE": "tiny",
            "HW_DATA": "sample",
            "OFFLINE_LOG": self.folder / "offline.log",
        } | wanted
        arguments = (script, self.folder, environment(**wanted), patch)
        self.process = context.Process(target=child, args=arguments)
        self.process.start()
        self.started = time.monotonic()
        self.started = time.monotonic()

    def age(self):
        return time.monotonic() - self.started

    def kill_after(self, seconds):
        """SIGKILL at that age, wherever the run is then; did it still live?"""
        self.until(lambda: time.monotonic() - self.started > seconds)
        self.process.kill()
        return self.wait().code == -9

    def wait(self):
        self.process.join()
        return self

    def until(self, condition, seconds=120):
        """Poll; False when the process ended before the condition came true."""
        late = time.monotonic() + seconds
        while not condition():
            if not self.process.is_alive() or time.monotonic() > late:
                return False
            time.sleep(0.002)
        return True

    @property
    def text(self):
        return self.log.read_text() if self.log.exists() else ""

    @property
    def code(self):
        return self.process.exitcode
