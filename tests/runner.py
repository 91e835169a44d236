"""Runs a homework's script in a fresh process that has imported torch and friends already: seconds saved.

Every process is forked from a clean server that imported the packages and did nothing else, so a run is as
good as `python HW01.py`, and can be killed like it.
"""

import functools
import gc
import multiprocessing
import os
import runpy
import signal
import socket
import sys
import tempfile
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
    "transformers.models.bert.modeling_bert",
    "captum.attr",
    "lime.lime_image",
    "sklearn.decomposition",
]
os.environ["OMP_NUM_THREADS"] = "1"  # two test workers on two cores: more threads would only wait
os.environ["MPLCONFIGDIR"] = str(Path(tempfile.gettempdir(), "matplotlib-of-the-tests"))  # fonts, listed once
context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload([*PACKAGES, "sklearn.feature_selection", "scipy.sparse.csgraph"])


@functools.cache
def home():
    """Nobody's ~/.kaggle, ~/.ipython, ~/.cache; made by the tests, not by each run that imports this file."""
    return tempfile.TemporaryDirectory(prefix="home-of-the-tests-")


def environment(**wanted):
    """What a run inherits: no HW_ settings and no credentials but those a test gives, and no network."""
    banned = ("HW_", "KAGGLE", "PYTEST", "COLAB", "ACCELERATE", "WORLD_SIZE", "RANK", "LOCAL_RANK", "TQDM")
    mine = {name: value for name, value in os.environ.items() if not name.startswith(banned)}
    mine |= {"PYTHONPATH": str(TESTS / "offline"), "OMP_NUM_THREADS": "1", "HOME": home().name}
    return mine | {name: str(value) for name, value in wanted.items()}


def no_pictures():
    """A file instead of each picture: drawing takes half of a tiny run, and the notebook's run does it."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    draw = FigureCanvasAgg.print_figure

    def print_figure(canvas, path, *args, **how):
        if "acc_summary" in str(path):  # HW14 hands it in
            draw(canvas, path, *args, **how)
        else:
            Path(path).write_bytes(b"no picture: only a notebook's run draws")

    FigureCanvasAgg.print_figure = print_figure
    FigureCanvasAgg.draw_idle = lambda canvas: None


def child(script, folder, log, env, patch):
    """In the new process: become `python script`."""
    gc.freeze()  # what the server imported is never garbage
    no_pictures()
    os.environ.clear()
    os.environ.update(env)
    os.chdir(folder)
    sys.path.insert(0, str(TESTS / "offline"))
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    encoding = env.get("PYTHONIOENCODING", "utf-8")
    sys.stdout = os.fdopen(1, "w", buffering=1, encoding=encoding)
    sys.stderr = os.fdopen(2, "w", buffering=1, encoding=encoding, errors="backslashreplace")
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

    def __init__(self, script, folder, patch="", log="run.log", **wanted):
        self.folder, self.log = Path(folder), Path(folder, log)
        if self.log.is_file():  # it may be a terminal
            self.log.unlink()
        offline = self.folder / "offline.log"
        wanted = {"HW_PROFILE": "tiny", "HW_DATA": "sample", "OFFLINE_LOG": offline} | wanted
        arguments = (script, self.folder, self.log, environment(**wanted), patch)
        self.process = context.Process(target=child, args=arguments)
        self.process.start()
        self.started = time.monotonic()

    def age(self):
        return time.monotonic() - self.started

    def kill_after(self, seconds):
        """SIGKILL at that age, wherever the run is then; did it still live?"""
        self.until(lambda: self.age() > seconds)
        self.process.kill()
        return self.wait().code == -9

    def wait(self, seconds=240):
        """Until it ends; one that hangs is killed, and the test sees its code."""
        self.process.join(seconds)
        if self.process.is_alive():
            self.process.kill()
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
        return self.log.read_text(encoding="utf-8", errors="replace") if self.log.exists() else ""

    @property
    def code(self):
        return self.process.exitcode


def ranks(script, folder, count=2, **wanted):
    """One run on several processes (gloo on the CPU), as torchrun would start it; rank 1 writes run1.log."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    wanted = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "ACCELERATE_USE_CPU": "true"} | wanted
    wanted |= {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    both = []
    for rank in range(count):
        log = f"run{rank or ''}.log"
        both.append(Run(script, folder, log=log, RANK=rank, LOCAL_RANK=rank, **wanted))
    return both
