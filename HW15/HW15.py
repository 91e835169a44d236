# %% [markdown] tags=["header"]
# # HW15 · Meta learning: read an alphabet you have never seen
#
# <!-- badges -->
# [![Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/ml2022-notebooks/ml2022-spring/blob/main/HW15/HW15.ipynb)
# [![Kaggle](https://kaggle.com/static/images/open-in-kaggle.svg)](https://kaggle.com/kernels/welcome?src=https://github.com/ml2022-notebooks/ml2022-spring/blob/main/HW15/HW15.ipynb)
# <!-- /badges -->
#
# Five characters of an unknown alphabet, **one drawing of each**. Then five more drawings: which
# character is which? No network can be trained on five images. But it can be trained on thousands of
# *tasks* of this kind, until it has learned **how to learn** a new one: good first weights, good step
# sizes, a good way to compare. The lecture's three steps stay, one floor higher: the **function** is a
# learning algorithm with unknown numbers in it, the **loss** is how badly it does on the queries of many
# tasks, and the **optimizer** turns the numbers, if need be through the algorithm's own gradient steps.
#
# 每個任務只給五個沒看過的字,**每字一張圖**,接著要認出另外五張圖各是哪個字。五張圖不足以訓練網路,
# 但我們可以用成千上萬個這樣的任務,讓網路**學會如何學習**:好的初始參數、好的步長、好的比較方式。
# 機器學習的三個步驟仍然成立,只是高了一層:**函式**是帶有未知參數的學習演算法,**損失**是它在許多任務的
# 查詢集上錯了多少,**最佳化**則調整這些參數,必要時連演算法自己的梯度步驟也一起微分。
#
# The ladder, measured on the built-in sample (accuracy over all queries, higher is better; the mean of
# three seeds ± half their range), beside the course's public baselines on the real data:
#
# <!-- ladder -->
# | level | what it adds | sample | course baseline (real data) | seconds |
# |---|---|---|---|---|
# | simple | train on five characters, fine-tune on the five of the task | 0.635 ± 0.011 | 0.6 | 33 |
# | medium | FO-MAML: first weights that are good *after* one step | 0.739 ± 0.030 | 0.7 | 46 |
# | strong | second-order MAML with learned step sizes, and ANIL | 0.824 ± 0.011 | 0.9 | 68 |
# | boss | turned classes, a metric start, several nets, one joint answer | 0.935 ± 0.008 | 0.95 | 101 |
# <!-- /ladder -->
#
# **How to use it.** Run all cells: without the real data everything runs on a generated sample. To change
# something, edit a parameter below or a cell, then run again: only what the change concerns is trained anew.

# %% tags=["parameters"]
# @title Parameters
LEVEL = "boss"  # @param ["boss", "strong", "medium", "simple"]
WITHOUT = ""  # @param {type:"string"}
DATA = "auto"  # @param ["auto", "real", "sample"]
PROFILE = "auto"  # @param ["auto", "full", "small", "tiny"]
SEED = 2022  # @param {type:"integer"}
DATA_DIR = "data/HW15"  # @param {type:"string"}
OUT_DIR = "out/HW15"  # @param {type:"string"}
RESUME = True  # @param {type:"boolean"}
SUBMIT = False  # @param {type:"boolean"}
# this homework's own; 0 stands for the level's own number
EPOCHS = 0  # @param {type:"integer"}
BATCH_SIZE = 0  # @param {type:"integer"}
BALANCED_QUERIES = "auto"  # @param ["auto", "on", "off"]

# %% tags=["homework"]
HW, METRIC, HIGHER_IS_BETTER = "HW15", "accuracy", True
SLUG, JUDGE = "ml2022spring-hw15", "https://www.kaggle.com/competitions/ml2022spring-hw15"
BASELINES = {"simple": 0.6, "medium": 0.7, "strong": 0.9, "boss": 0.95}
FILES = {  # how many the course has
    "train": ("images_background/*/character*/*.png", 19280),
    "support": ("support/*/image_*.png", 3200),
    "query": ("query/*/image_*.png", 3200),
}
RELEASE = "https://github.com/xraychen/shiny-disco/releases/download/Latest/"
MIRRORS = [  # {name here: address} of complete copies
    {
        "omniglot.tar.gz": RELEASE + "omniglot.tar.gz",
        "omniglot-test.tar.gz": RELEASE + "omniglot-test.tar.gz",
    },
]
HASHES = set()  # the md5 sums of the course's two archives are not known to us
OWN = {  # name: what it may be
    "EPOCHS": range(100_001),
    "BATCH_SIZE": range(100_001),
    "BALANCED_QUERIES": ("auto", "on", "off"),
}
NEEDS = {"numpy": "numpy", "pandas": "pandas", "matplotlib": "matplotlib", "torch": "torch"}
NEEDS |= {"accelerate": "accelerate", "filelock": "filelock", "tqdm": "tqdm"}
NEEDS |= {"sklearn": "scikit-learn", "PIL": "Pillow"}
MIXED_PRECISION = True  # for passes through the body alone; inner steps and their gradients stay float32
LESS_MEMORY = "set BATCH_SIZE to half of what the settings say"
MEASURED = {}  # what each idea is worth: there is no table of ideas yet
WAYS = 5  # a task: five characters, one drawing each to learn from, one each to recognise

# %% cellView="form" jupyter={"source_hidden": true} tags=["common:setup"]
# @title Setup: packages, parameters, device
import dis, functools, hashlib, importlib.util, inspect, io, json, os, shlex, shutil
import subprocess, sys, time, types
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

NOTEBOOK, START = "ipykernel" in sys.modules, time.perf_counter()
missing = [package for module, package in NEEDS.items() if importlib.util.find_spec(module) is None]
install = [sys.executable, "-m", "pip", "install", "-q", *missing]
if missing and ("WORLD_SIZE" in os.environ or subprocess.call(install)):  # of several processes none installs
    sys.exit(f"{HW}: packages are missing. Install them by hand: pip install {' '.join(missing)}")
if not NOTEBOOK:
    os.environ.setdefault("MPLBACKEND", "Agg")  # a script draws into files and opens no window
    sys.stdout.reconfigure(errors="replace")  # a terminal without Chinese letters shows question marks

import matplotlib.pyplot as plt, numpy as np, pandas as pd, torch
from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast_object_list, gather_object, send_to_device, set_seed
from accelerate.utils import parse_flag_from_env
from tqdm import tqdm

plt.rcParams["figure.constrained_layout.use"] = True


class Stop(Exception):
    """Ends the run with one sentence that says what a person can do."""


SENTENCES = {Stop: "{}", KeyboardInterrupt: "Stopped by hand. Run again to go on from the last checkpoint."}
SENTENCES[torch.OutOfMemoryError] = f"The memory of the GPU is full: {LESS_MEMORY}."


def explain(kind, error, trace):
    """What a person can mend is said in one sentence; all else gets the usual traceback."""
    if kind not in SENTENCES:
        sys.__excepthook__(kind, error, trace)
    elif NOTEBOOK:
        shell._showtraceback(kind, error, [SENTENCES[kind].format(error)])
    else:
        sys.stderr.write(f"{HW}: {SENTENCES[kind].format(error)}\n")


sys.excepthook = explain
if NOTEBOOK:
    from IPython import display, get_ipython

    shell = get_ipython()
    shell.set_custom_exc(tuple(SENTENCES), lambda shell, *error, tb_offset: explain(*error))

CHOICES = {"LEVEL": ("simple", "medium", "strong", "boss"), "DATA": ("auto", "real", "sample")}
CHOICES |= {"PROFILE": ("auto", "full", "small", "tiny"), "SEED": range(2**32)}
CHOICES |= {"RESUME": (True, False), "SUBMIT": (True, False), **OWN}
PARAMETERS = ["WITHOUT", "DATA_DIR", "OUT_DIR", *CHOICES]
for key in [key for key in os.environ if key.startswith("HW_")]:
    name, value = key.removeprefix("HW_"), os.environ[key]
    if name not in PARAMETERS:
        raise Stop(f"{key} is no parameter of {HW}; these are: HW_{', HW_'.join(PARAMETERS)}.")
    if not isinstance(globals()[name], str):
        try:
            value = json.loads(value.lower())
        except ValueError:
            pass  # said below
    globals()[name] = value
for name, allowed in CHOICES.items():
    value = globals()[name]
    if allowed and (type(value) is not type(allowed[0]) or value not in allowed):
        span = f"from {allowed[0]} to {allowed[-1]}" if isinstance(allowed, range) else f"one of {allowed}"
        raise Stop(f"{name} is {value!r}, but must be {span}.")
OFF = sorted({name.strip() for name in WITHOUT.split(",")} - {""})  # the ideas that are switched off
DATA_DIR, OUT_DIR = (Path(os.path.expanduser(folder)) for folder in (DATA_DIR, OUT_DIR))

only_cpu = parse_flag_from_env("ACCELERATE_USE_CPU")
on_gpu = PartialState(only_cpu, timeout=timedelta(hours=12)).device.type == "cuda"  # first steps may be slow
precision = "no"
if on_gpu and MIXED_PRECISION:
    precision = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
accelerator = Accelerator(mixed_precision=precision)
device = accelerator.device
say = accelerator.print  # prints on the main process only
MAIN = accelerator.is_main_process
QUIET = not (MAIN and sys.stderr.isatty())  # progress bars on a terminal only
set_seed(SEED)
machine = torch.cuda.get_device_name() if on_gpu else f"{device.type}, {os.cpu_count()} cores"
say(f"{HW} at level {LEVEL}, seed {SEED}; Python {sys.version.split()[0]}, torch {torch.__version__}")
say(f"on {accelerator.num_processes} x {machine}, mixed precision: {precision}")
MARK = ".made-by-this-notebook"  # lies in every folder that a notebook made: such a one it may replace


def remove(path):
    if path.is_dir():
        shutil.rmtree(path)
    elif path.exists():
        path.unlink()


@contextmanager
def aside(path):
    """Write to `path`.part, which gets its name when complete: nothing half-written is ever found."""
    part = Path(f"{path}.part")
    try:
        part.parent.mkdir(parents=True, exist_ok=True)
        remove(part)  # left by a kill
        yield part
        if part.is_file():
            with part.open("rb+") as file:
                os.fsync(file.fileno())  # onto the disk before it gets its name
        elif Path(path, MARK).exists():
            remove(path)
        part.replace(path)
    except OSError as error:
        if error.errno is None or isinstance(error, (ConnectionError, FileNotFoundError)):  # not the disk's
            raise
        why = f"{path} cannot be written ({error.strerror}); what was complete before is kept."
        raise Stop(f"{why} Make room, move what is in the way, or set DATA_DIR and OUT_DIR.") from None
    finally:
        remove(part)


def show(name):
    """Keep the current figure in OUT/figures; a notebook shows it too."""
    if MAIN:
        with aside(OUT / "figures" / name) as part:
            plt.savefig(part, dpi=120, format=Path(name).suffix[1:])
        if NOTEBOOK:
            display.display(display.Image(OUT / "figures" / name))
    plt.close()


def table(rows):
    """Rows (dicts) as a table: a notebook draws it, a script prints it."""
    frame, options = pd.DataFrame(rows), {"index": False, "float_format": "{:.4g}".format}
    if MAIN and NOTEBOOK:
        display.display(display.HTML(frame.to_html(**options)))
    else:
        say(frame.to_string(**options))


PLUMBING = "MAIN QUIET NOTEBOOK START OUT OUT_DIR DATA_DIR RESUME history say show table aside bare Stop"
PLUMBING += " save_checkpoint load_checkpoint"  # what training code may use and does not depend on


def reads(code):
    """The global names and the texts in a piece of code, inner functions included."""
    steps = [step for step in dis.get_instructions(code) if step.opname in ("LOAD_GLOBAL", "LOAD_NAME")]
    names = {step.argval for step in steps}
    texts = {text for text in code.co_consts if isinstance(text, str)}
    inner = [reads(const) for const in code.co_consts if isinstance(const, types.CodeType)]
    return names.union(*(pair[0] for pair in inner)), texts.union(*(pair[1] for pair in inner))


def own_code(value, skip):
    """A function of the notebook as its text and all that it reads, a class as its bases and parts."""
    if isinstance(value, type):
        parts = [one for name, one in vars(value).items() if name[:2] != "__" or inspect.isfunction(one)]
        return [value.__bases__, parts]
    try:
        text = inspect.getsource(value)
    except OSError:  # written by a library, as a dataclass's __init__
        text = value.__code__.co_code
    names, texts = reads(value.__code__)
    read = {name: globals()[name] for name in sorted(names - {*skip.split()}) if name in globals()}
    if "settings" in read:  # only the rows that this code names
        read["settings"] = {name: settings[name] for name in sorted(texts & {*settings})}
    return [text, read, [cell.cell_contents for cell in value.__closure__ or ()]]


def pieces(value, skip, seen):
    """What a value is, as bytes: data by its content, the notebook's own code by text and what it reads."""
    value = inspect.unwrap(value)
    yield type(value).__name__.encode()
    code = isinstance(value, (type, types.FunctionType))
    own = (value if code else type(value)).__module__ == "__main__"
    if isinstance(value, torch.nn.Module):  # how it is built; its weights: pass its state_dict()
        value = [own and type(value), str(accelerator.unwrap_model(value))]
    elif own and id(value) in seen:
        return
    elif own:
        seen[id(value)] = value
        value = own_code(value, skip) if code else [type(value), getattr(value, "__dict__", None)]
    elif isinstance(value, functools.partial):
        value = [value.func, value.args, value.keywords]
    elif isinstance(value, types.MethodType):
        value = [value.__self__, value.__func__]
    elif isinstance(value, (set, frozenset)):
        value = sorted(value, key=repr)
    elif isinstance(value, pd.DataFrame):
        value = [[*value.columns], pd.util.hash_pandas_object(value).to_numpy()]
    if isinstance(value, torch.Tensor):
        yield str((value.dtype, value.shape)).encode()
        yield value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    elif isinstance(value, np.ndarray) and value.dtype != object:
        yield str((value.dtype, value.shape)).encode()
        yield np.ascontiguousarray(value).reshape(-1).view(np.uint8)
    elif isinstance(value, (str, bytes, int, float, range, np.generic, torch.dtype)):
        yield repr(value).encode()
    elif isinstance(value, (dict, list, tuple, np.ndarray)):
        for one in value.items() if isinstance(value, dict) else value:
            yield from pieces(one, skip, seen)


def fingerprint(value, skip=PLUMBING):
    digest = hashlib.md5()
    for piece in pieces(value, skip, {}):
        digest.update(piece)
    return digest.hexdigest()[:8]


# %% [markdown]
# ## The data
#
# [Omniglot](https://github.com/brendenlake/omniglot): 28 x 28 pixels, one channel, twenty people drew
# every character. Two trees:
#
# - `Omniglot/images_background/<alphabet>/character<NN>/<number>_<drawer>.png`, 30 alphabets with 964
#   characters to learn from;
# - `Omniglot-test/support/0000/image_0.png` to `image_4.png`, one image per class, and `query/0000/...` the
#   same: 640 tasks from **other** alphabets. The folders `support` and `query` of one number belong together.
#
# Quirks: copies exist in black on white and in white on black, some with an alphabet's name ending in
# `.0` (the rotation; folders `.90`, `.180`, `.270` would be rotated copies). Torchvision's `Omniglot`
# with `background=False` is where the test alphabets come from: using it would be cheating, and we never
# do.
#
# The folded cell makes the sample: invented scripts, each with its own taste for directions, turns and
# curves; every drawing by another hand, with another pen, on another sheet of paper. What the paper does
# means nothing, and a net can learn that from *other* alphabets.


# %% cellView="form" jupyter={"source_hidden": true} tags=["sample"]
# @title The sample: invented scripts
def make_sample(folder, answers):
    """Ten invented scripts to learn from, ten others in the test tasks; every drawing is on its own paper."""
    from PIL import Image, ImageDraw

    dice = np.random.default_rng(2022)
    letters, copies, tasks = (6, 8, 30) if PROFILE == "tiny" else (10, 20, 200)
    yy, xx = np.mgrid[-1:1:28j, -1:1:28j]
    t = np.linspace(0, 1, 8)[:, None]

    def make_script():
        """A handwriting style: the directions its strokes like, how far they turn, how many there are."""
        style = dict(angles=dice.uniform(0, 2 * np.pi, 4), turn=dice.uniform(0.3, 1.4), round=dice.random())
        return style | dict(more=dice.uniform(0.1, 0.6))

    def make_letter(style):
        """[(control points, is it round)], centred, in a box from -0.75 to 0.75."""
        strokes, anchors = [], []
        while len(anchors) < 4 or dice.random() < style["more"]:
            tied = anchors and dice.random() < 0.6
            points = [anchors[dice.integers(len(anchors))] if tied else dice.uniform(-1, 1, 2)]
            heading = dice.choice(style["angles"])
            for _ in range(dice.integers(1, 5)):
                way = np.array([np.cos(heading), np.sin(heading)])
                points.append(points[-1] + dice.uniform(0.5, 1.1) * way)
                heading += dice.normal(0, style["turn"])
            anchors += points
            strokes.append((np.array(points), dice.random() < style["round"]))
        low, high = np.min(anchors, 0), np.max(anchors, 0)
        return [((p - (low + high) / 2) * 1.5 / max(high - low), smooth) for p, smooth in strokes]

    def curve(p):
        """Catmull-Rom: a smooth line through all points."""
        p = np.vstack([2 * p[0] - p[1], p, 2 * p[-1] - p[-2]])
        a, b, c, d = (p[k : len(p) - 3 + k, None] for k in range(4))
        q = 2 * b + (c - a) * t + (2 * a - 5 * b + 4 * c - d) * t**2 + (3 * b - a - 3 * c + d) * t**3
        return q.reshape(-1, 2) / 2

    def draw(letter):
        """One drawing: another hand, another pen, another sheet of paper; white is 255."""
        v = 0.7
        turn, slant, size = v * dice.normal(0, (0.22, 0.25, 0.22))
        shift, size = v * dice.normal(0, 0.17, 2), np.exp(size)
        move = size * np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
        move = move @ [[1, slant], [0, 1]]
        image = Image.new("L", (84, 84))
        pen, width = ImageDraw.Draw(image), max(2, round(7 * np.exp(dice.normal(0, 0.3))))
        for points, smooth in letter:
            points = points + dice.normal(0, 0.05, points.shape)
            points = curve(points) if smooth and len(points) > 2 else points
            line = 42 + 42 * (points @ move.T + shift)
            pen.line([tuple(p) for p in line], fill=255, width=width, joint="curve")
        ink = np.asarray(image, float).reshape(28, 3, 28, 3).mean((1, 3)) / 255 * dice.uniform(0.65, 1)
        paper = 0.15 * dice.random() * (1 + np.cos(a := dice.uniform(0, 6.28)) * xx + np.sin(a) * yy) / 2
        if dice.random() < 0.7:  # ruled
            a, period = dice.uniform(0, np.pi), dice.uniform(0.3, 0.7)
            wave = np.cos(2 * np.pi * (np.cos(a) * xx + np.sin(a) * yy) / period + dice.uniform(0, 6.28))
            paper = paper + dice.uniform(0.1, 0.3) * (wave > 0.85)
        page = np.maximum(ink, paper) + dice.uniform(0, 0.19) * dice.standard_normal((28, 28))
        return Image.fromarray((255 * (1 - page.clip(0, 1))).round().astype(np.uint8))

    number = 0
    for k in range(5 if PROFILE == "tiny" else 10):
        style = make_script()
        for c in range(letters):
            home = folder / "Omniglot/images_background" / f"SampleScript{k:02d}.0" / f"character{c + 1:02d}"
            home.mkdir(parents=True)
            letter, number = make_letter(style), number + 1
            for d in range(copies):
                draw(letter).save(home / f"{number:04d}_{d + 1:02d}.png")
    dice = np.random.default_rng(2023)  # other scripts for the test
    unseen = [make_letter(style) for style in [make_script() for _ in range(10)] for _ in range(10)]
    labels = np.stack([dice.permutation(5) for _ in range(tasks)])
    for k, order in enumerate(labels):
        five = [unseen[c] for c in dice.choice(len(unseen), 5, replace=False)]
        for part, numbers in (("support", range(5)), ("query", order)):
            home = folder / "Omniglot-test" / part / f"{k:04d}"
            home.mkdir(parents=True)
            for i, c in enumerate(numbers):
                draw(five[c]).save(home / f"image_{i}.png")
    np.save(answers / "class.npy", labels.ravel())


# %% cellView="form" jupyter={"source_hidden": true} tags=["common:data"]
# @title Data: find it, fetch it, or make the sample
import gzip, re, tarfile, urllib.request, zipfile
from concurrent.futures import ThreadPoolExecutor, wait
from filelock import FileLock, Timeout

ENDINGS = (".zip", ".tar", ".tgz", ".tar.bz2", ".tar.xz", ".gz")
POOL = ThreadPoolExecutor(16)
passed_over = {}  # place or file -> why it was not used


def hold(path, wait=True):
    """Of several runs one works on `path`; the others wait or stop. A `with` gives it back."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(f"{path}.lock", is_singleton=True)
        return lock.acquire(timeout=0)
    except Timeout:
        pass
    except OSError as error:
        raise Stop(f"{path} cannot be written ({error.strerror}): set another folder.") from None
    if not wait:
        raise Stop(f"Another run or open notebook is at work in {path.parent}: end it, or set OUT_DIR.")
    say(f"waiting for another run that is at work on {path}")
    return lock.acquire()


def make_once(folder, recipe, make):
    """make(folder) in one stroke; again only when the recipe is another one or files were touched."""

    def state(folder):
        sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file() and path.name != MARK]
        return f"{recipe}: {len(sizes)} files, {sum(sizes)} bytes"

    with hold(folder):
        if not (folder / MARK).exists() or (folder / MARK).read_text() != state(folder):
            with aside(folder) as part:
                part.mkdir()
                make(part)
                (part / MARK).write_text(state(part))
    return folder


def files_below(root):
    """All files below `root` but half-written ones and those in folders that a notebook made."""
    made = {mark.parent for mark in root.rglob(MARK)} - {root}
    files = [path for path in root.rglob("*") if path.is_file() and not made.intersection(path.parents)]
    junk = re.compile(r"\.part(/|$)|__MACOSX")
    return [path for path in files if not junk.search(path.relative_to(root).as_posix())]


def pick(pattern, count, files):
    """Of a single file all candidates, the plainest name first; of many files those that lie nearest."""
    hits = [path for path in files if Path(str(path).lower()).match(pattern.lower())]
    hits.sort(key=lambda path: (len(path.parts), len(path.name), path))
    return [path for path in hits if count == 1 or len(path.parts) == len(hits[0].parts)]


def unpack(archive):
    """The files in an archive. Only plain ones are taken out: a link could lead outside."""

    def extract(folder):
        if archive.suffix.lower() == ".zip":
            zipfile.ZipFile(archive).extractall(folder)
        elif archive.suffix.lower() == ".gz" and not tarfile.is_tarfile(archive):
            with gzip.open(archive) as source, (folder / archive.stem).open("wb") as file:
                shutil.copyfileobj(source, file)
        else:
            with tarfile.open(archive) as pack:
                plain = [member for member in pack if member.isfile() or member.isdir()]
                pack.extractall(folder, plain, filter="data")

    state = archive.stat()
    folder = DATA_DIR / "unpacked" / hashlib.md5(str(archive).encode()).hexdigest()[:8]
    try:
        return files_below(make_once(folder, f"{state.st_size} {state.st_mtime_ns}", extract))
    except Exception as error:
        passed_over[archive] = f"damaged ({state.st_size} bytes, {error}): fetch it again"
        return []


def find(root):
    """{name: paths} for all FILES below `root`, however deep a download nested or packed them."""
    files = archives = files_below(root)
    while True:
        found = {name: pick(pattern, count, files) for name, (pattern, count) in FILES.items()}
        archives = [path for path in archives if path.name.lower().endswith(ENDINGS)]
        if all(found.values()):
            return found
        if not archives:
            raise OSError(f"there is no {', '.join(FILES[name][0] for name in FILES if not found[name])}")
        inside = unpack(archives[0])
        files, archives = files + inside, archives[1:] + inside


def open_url(url):
    request = urllib.request.Request(url, headers={"User-Agent": "Mozilla/5.0"})
    return urllib.request.urlopen(request, timeout=10)


def ring(url):
    """Does an address answer, if only with a refusal?"""
    try:
        open_url(url).close()
    except urllib.error.HTTPError:
        pass


def download(url, file, sums):
    """Append what an address gives; one that drips, breaks off or sends a web page is given up."""
    say(f"fetching {url}")
    with open_url(url) as reply:
        size, tic, length = 0, time.monotonic(), int(reply.headers.get("Content-Length") or 0)
        bar = tqdm(total=length, unit="B", unit_scale=True, disable=QUIET, leave=False)
        while chunk := reply.read1(2**20):
            if size == 0 and chunk.lstrip()[:5].lower() in (b"<!doc", b"<html"):
                raise OSError("it is a web page, not the file")
            file.write(chunk)
            for one in sums:
                one.update(chunk)
            bar.update(len(chunk))
            size += len(chunk)
            if size < 20_000 * (time.monotonic() - tic - 10):
                raise OSError(f"it is too slow, {size} bytes in {time.monotonic() - tic:.0f} s")
    if size < max(length, 1):
        raise OSError(f"it broke off after {size} of {length or '?'} bytes")


def fetch(files, answer):
    """{name: addresses of its pieces} -> DATA_DIR."""
    answer.result(0)
    with hold(DATA_DIR):
        for name in [name for name in files if not (DATA_DIR / name).exists()]:  # another run may be faster
            sums = [hashlib.md5(), hashlib.sha256()]
            with aside(DATA_DIR / name) as part:
                with part.open("wb") as file:
                    for url in files[name].split():
                        download(url, file, sums)
                if HASHES and not HASHES & {one.hexdigest() for one in sums}:
                    raise OSError(f"{name} is not the course's file (its hash differs)")
    return DATA_DIR


def ask_kaggle():
    import kagglehub

    if not kagglehub.config.get_kaggle_credentials():
        raise OSError("no credentials (set KAGGLE_API_TOKEN, see https://www.kaggle.com/settings)")
    POOL.submit(ring, "https://www.kaggle.com").result(10)
    with hold(DATA_DIR):  # a second run finds what the first one fetched
        return Path(kagglehub.competition_download(SLUG))


def attempt(place, work, *arguments):
    """What FILES mean in the folder that `work` gives; None if that fails, and the reason is kept."""
    try:
        return find(work(*arguments))
    except Exception as error:
        passed_over[place] = str(error) or type(error).__name__


def find_real():
    """The real data of the first place that has them all: folders, Kaggle, the mirrors in their order."""
    for folder in (DATA_DIR, Path("/kaggle/input")):
        found = attempt(folder, Path, folder)
        if found:
            return found
    rings = [POOL.submit(ring, next(iter(files.values())).split()[0]) for files in MIRRORS]  # all at once
    late = time.monotonic() + 10
    if SLUG:
        found = attempt(f"https://www.kaggle.com/competitions/{SLUG}", ask_kaggle)
    if not found:
        wait(rings, timeout=max(0, late - time.monotonic()))
    for files, answer in zip(MIRRORS, rings):
        found = found or attempt(", ".join(files.values()), fetch, files, answer)
    return found


def choose_data():
    """[is it real, {name: paths}, the folder of the hidden answers]"""
    if not FILES:
        return [DATA != "sample", {}, None]
    found = None
    if DATA != "sample":
        found = find_real()
    if found:
        return [True, found, None]
    why = f"Put {', '.join(pattern for pattern, _ in FILES.values())} into {DATA_DIR}, packed or not. Tried:"
    why += "".join(f"\n- {place}: {' '.join(reason.split())}" for place, reason in passed_over.items())
    if DATA == "real":
        raise Stop(f"No real data was found. {why}")
    if DATA == "auto":
        say(f"NO REAL DATA WAS FOUND, this run uses the generated SAMPLE. {why}")

    def make(folder):
        (folder / "data").mkdir()
        (folder / "answers").mkdir()
        make_sample(folder / "data", folder / "answers")

    folder = Path(f"{DATA_DIR}-sample", "tiny" if PROFILE == "tiny" else "full")
    make_once(folder, fingerprint(make_sample, f"{PLUMBING} PROFILE"), make)
    return [False, find(folder / "data"), folder / "answers"]


def choose(levels, sizes):
    """LEVEL's column of both tables; an idea in WITHOUT takes the nearest earlier value that differs."""
    column = CHOICES["LEVEL"].index(LEVEL)
    chosen = {name: row[column] for name, row in levels.items()}
    for name in OFF:
        earlier = [value for value in levels.get(name, ())[:column] if value != chosen[name]]
        if not earlier:
            ideas = ", ".join(levels)
            raise Stop(f"WITHOUT = {name!r} switches nothing off at level {LEVEL}; ideas: {ideas}.")
        chosen[name] = earlier[-1]
    for name, row in sizes["full" if PROFILE == "full" else "small"].items():
        chosen[name] = row[column]
        if PROFILE == "tiny" and name in ("epochs", "steps"):
            chosen[name] = max(3, row[column] // 50)
    return chosen


REAL, PATHS, ANSWERS = broadcast_object_list(choose_data() if MAIN else [None] * 3)
for name, (path, *others) in PATHS.items():
    if not path.exists():
        raise Stop(f"{path} is not on this machine: put DATA_DIR on a disk that all machines share.")
    say(f"{name}: {path}{f' and {len(others)} more' if others else ''} (the course has {FILES[name][1]})")
if PROFILE == "auto":
    PROFILE = "full" if REAL and on_gpu else "small"
say(f"data: {'real' if REAL else 'SAMPLE'}; profile: {PROFILE} (full is for real data on a GPU)")
OUT = OUT_DIR / f"{LEVEL}-{'real' if REAL else 'sample'}"
if OFF:
    OUT = Path(f"{OUT}-without-{'-'.join(OFF)}")
if MAIN:
    LOCK = hold(OUT / "run", wait=False).lock  # two runs must not write into one folder

# %% [markdown]
# ## Read once
#
# The official sample opens twenty files whenever it needs two of them. We decode each drawing **once**
# into one tensor of bytes: 19,280 drawings are 15 MB. The polarity is decided by what the eye would say:
# the background is what most pixels have. After reading, ink is bright.

# %%
from concurrent.futures import ThreadPoolExecutor

from PIL import Image
from torch.nn import functional as F

odd = {"not 28 x 28": 0, "not gray": 0}


def decode(path):
    """One drawing as bytes (28, 28), ink bright."""
    try:
        with Image.open(path) as image:
            odd["not gray"] += image.mode not in ("L", "1")
            odd["not 28 x 28"] += image.size != (28, 28)
            image = image.convert("L")
            page = np.asarray(
                image if image.size == (28, 28) else image.resize((28, 28), Image.Resampling.BOX)
            )
    except Exception as error:
        raise Stop(f"{path} is not a picture ({type(error).__name__}): unpack its archive again.") from None
    return 255 - page if np.median(page) > 127 else page


def read(paths):
    with ThreadPoolExecutor(8) as pool:  # Pillow decodes without holding Python's lock
        return torch.from_numpy(np.stack(list(pool.map(decode, paths))))  # (files, 28, 28)


# %% [markdown]
# The training drawings, character by character. A folder with a single drawing cannot give a support and
# a query image: it is left out. Folders of turned copies are left out as well, we will turn better
# ourselves.

# %%
TURNED = (".90", ".180", ".270")
folders = {}
for path in PATHS["train"]:
    folders.setdefault(path.parent, []).append(path)
copies = [folder for folder in folders if folder.parent.name.endswith(TURNED)]
small = [folder for folder, files in folders.items() if len(files) < 2]
folders = {folder: files for folder, files in folders.items() if folder not in {*copies, *small}}
if copies or small:
    say(f"left out: {len(copies)} characters that are turned copies, {len(small)} with a single drawing")
if len(folders) < WAYS:
    raise Stop(f"{DATA_DIR} has {len(folders)} usable character folders: unpack omniglot.tar.gz again.")
sizes = torch.tensor([len(files) for files in folders.values()])
there = torch.arange(int(sizes.max())) < sizes[:, None]  # (characters, drawings)
drawings = torch.zeros(*there.shape, 28, 28, dtype=torch.uint8)
drawings[there] = read([path for files in folders.values() for path in files])
drawings = drawings.to(device)
alphabet = [folder.parent.name.removesuffix(".0") for folder in folders]
say(f"{len(folders)} characters (course: 964) of {len(set(alphabet))} alphabets, {int(sizes.sum())} drawings")

# %% [markdown]
# The test tasks. Line 5·task + query of the submission belongs to one image, so a missing folder or image
# would shift all answers after it: better to stop.


# %%
def read_tasks(part):
    """(tasks, 5, 1, 28, 28) of Omniglot-test/support or query, float, ink = 1."""
    paths = {f"{path.parent.name}/{path.name}": path for path in PATHS[part]}
    tasks = len({path.parent.name for path in PATHS["support"] + PATHS["query"]})
    wanted = [f"{k:04d}/image_{i}.png" for k in range(tasks) for i in range(WAYS)]
    missing = [name for name in wanted if name not in paths]
    if missing:
        raise Stop(
            f"{len(missing)} images are missing in {part}, {', '.join(missing[:5])} ...: unpack it again."
        )
    images = read([paths[name] for name in wanted]).view(-1, WAYS, 1, 28, 28)
    return images.to(device) / 255


support, query = read_tasks("support"), read_tasks("query")
for reason, count in odd.items():
    if count:
        say(f"warning: {count} images are {reason}, they were converted")
say(f"{len(support)} test tasks (course: 640)")

# %% [markdown]
# One row is one character, one column one person.

# %%
if MAIN:
    chosen = np.linspace(0, len(drawings) - 1, 7).astype(int)
    rows = [np.hstack([*drawings[k, :20].cpu().numpy()]) for k in chosen]
    plt.figure(figsize=(8, 2.9))
    plt.imshow(255 - np.vstack(rows), cmap="gray")
    plt.axis("off")
    show("data.jpg")

# %% [markdown]
# And this is what a test task looks like: above the five characters with their numbers, below the queries
# in an unknown order. Would you get all five?

# %%
if MAIN:
    fig, axes = plt.subplots(2, 11, figsize=(8, 1.9), width_ratios=[1] * 5 + [0.4] + [1] * 5)
    for axis in axes.flat:
        axis.set_axis_off()
    for task in range(2):
        for i in range(WAYS):
            axes[0, 6 * task + i].imshow(1 - support[task, i, 0].cpu(), cmap="gray", vmin=0, vmax=1)
            axes[0, 6 * task + i].set_title(f"class {i}", fontsize=8)
            axes[1, 6 * task + i].imshow(1 - query[task, i, 0].cpu(), cmap="gray", vmin=0, vmax=1)
            axes[1, 6 * task + i].set_title("?", fontsize=8)
    show("task.jpg")

# %% [markdown]
# ## Honest validation
#
# The test has new *alphabets*, so the validation must have new alphabets too: every fifth one is held out
# as a whole. The official sample splits characters at random, and its validation knows the style of every
# script. To see how much that flatters, every tenth character of the other alphabets is held out as well:
# same scripts, new characters. We will report both, and choose by the first.

# %%
names = sorted(set(alphabet))
held = set(names[4::5] or names[-1:])  # the course's 30 alphabets: six
unseen = torch.tensor([k for k, name in enumerate(alphabet) if name in held])
rest = torch.tensor([k for k, name in enumerate(alphabet) if name not in held])
every = max(1, min(10, len(rest) // WAYS))
familiar = rest[every - 1 :: every]
training = rest[~torch.isin(rest, familiar)]
if min(len(pool) for pool in (unseen, familiar, training)) < WAYS:
    raise Stop(f"{len(names)} alphabets are too few to hold any out: unpack omniglot.tar.gz again.")
say(f"{len(training)} characters to learn from, {len(familiar)} new ones of the same alphabets", end=", ")
say(f"{len(unseen)} of {len(held)} new alphabets: {', '.join(sorted(held))}")

# %% [markdown]
# ## The ladder
#
# A level is a list of training stages, and each stage is a *way* to learn how to learn. `inner` is the
# number of gradient steps inside a task in training, `test` the number at test time, `rate` the size of
# these steps.

# %% tags=["levels"]
if OFF:
    raise Stop(f"{HW} has no table of ideas yet: leave WITHOUT empty.")
PLAIN = dict(how="maml", inner=1, test=10, rate=0.4, learned=False, first_order=True, every=False)
PLAIN |= dict(ways=WAYS, augment=False, prototypes=False, lr=1e-3, continues=False)
WAY = {
    "transfer": PLAIN | dict(how="transfer"),
    "FO-MAML": PLAIN,
    "MAML": PLAIN | dict(first_order=False, learned=True, inner=5, every=True, rate=0.1),
    "ANIL": PLAIN | dict(how="anil", learned=True, inner=5, test=20, rate=0.1, lr=2e-3),
    "metric": PLAIN | dict(how="metric", ways=20, augment=True, prototypes=True, inner=0, test=0, lr=2e-3),
    "proto-ANIL": PLAIN | dict(how="anil", augment=True, prototypes=True, learned=True, continues=True),
}
WAY["proto-ANIL"] |= dict(inner=5, test=5, rate=0.1)
BIG = dict(width=64, epochs=30, batch_size=32, episodes=2, members=1, symmetries=1, joint=False)
BIG |= dict(average=0.99, valid_tasks=1000, check=500, curve=(0, 1, 2, 3, 5, 10, 20, 50))
LEVELS = {  # updates: how many an epoch has, stage by stage
    "simple": BIG | dict(updates={"transfer": 5}, epochs=1),
    "medium": BIG | dict(updates={"FO-MAML": 24}),
    "strong": BIG | dict(updates={"MAML": 64, "ANIL": 64}),
    "boss": BIG | dict(updates={"metric": 500, "proto-ANIL": 60}, members=3, symmetries=8, joint=True),
}
LEVELS["boss"] |= dict(counts=(25, 100, 400, 1000), report_updates=33)
SMALL = {  # for the sample; a CPU is enough for these
    "simple": dict(valid_tasks=60, check=20, curve=(0, 1, 2, 3, 5, 10)),
    "medium": dict(valid_tasks=60, check=40, curve=(0, 1, 2, 3, 5, 10), epochs=3, updates={"FO-MAML": 30}),
    "strong": dict(valid_tasks=100, epochs=4, updates={"MAML": 10, "ANIL": 55}),
    "boss": dict(valid_tasks=300, epochs=4, updates={"metric": 200, "proto-ANIL": 20}, members=2),
}
SMALL["boss"] |= dict(counts=(10, 20, 40, 80), report_updates=20)
TINY = dict(width=12, valid_tasks=20, check=20, batch_size=4, members=1, epochs=2, report_updates=2)
settings = LEVELS[LEVEL]
if PROFILE != "full":
    settings |= dict(width=32, check=60, batch_size=16, episodes=1) | SMALL[LEVEL]
    WAY["FO-MAML"] |= dict(lr=4e-3, rate=0.1)
    WAY["MAML"] |= dict(lr=4e-3, inner=2)
if PROFILE == "tiny":
    updates = {name: 25 if name == "metric" else 4 for name in settings["updates"]}
    settings |= TINY | dict(updates=updates, symmetries=min(2, settings["symmetries"]))
settings |= dict(epochs=EPOCHS or settings["epochs"], batch_size=BATCH_SIZE or settings["batch_size"])
say(*(f"{name}: {value}" for name, value in settings.items()), sep=", ")
settings |= dict(stages={name: WAY[name] for name in settings["updates"]})
for name, way in settings["stages"].items():
    say(f"- {name}:", ", ".join(f"{key} {value}" for key, value in way.items()))

# %% [markdown]
# ## Tasks, by the thousand
#
# A task is a handful of numbers: which characters, which of their drawings. All tasks of a batch are
# drawn at once, and one index into the byte tensor fetches their images. No file, no loop.


# %%
def draw_tasks(pool, tasks, ways=WAYS, augment=False, fixed=False, dice=None):
    """Images (tasks, ways, 2, 1, 28, 28): of each character one drawing for support, one for query."""
    numbers = torch.rand(tasks, len(pool), generator=dice).topk(ways).indices  # different ones in a task
    who = pool[numbers.sort().values if fixed else numbers]  # (tasks, ways)
    keys = torch.rand(tasks, ways, there.shape[1], generator=dice).masked_fill(~there[who], -1)
    which = keys.topk(2).indices  # two different drawings
    images = drawings[who[..., None].to(device), which.to(device)].unsqueeze(3)
    if augment:
        images = turn(images, torch.randint(8, (tasks, ways, 1), generator=dice))
    return images.float() / 255


# %% [markdown]
# **boss: more characters out of thin air.** A character turned by 90° or seen in a mirror is another
# character. So each class of a task gets one of the eight symmetries of the square: eight times as many
# classes. The one rule: **support and query of a class turn together**, else the task becomes nonsense. A
# turn only moves pixels, so all turns of a batch are one `gather` with a table of pixel numbers.

# %%
pixels = torch.arange(28 * 28, device=device).view(28, 28)
SYMMETRIES = torch.stack([torch.rot90(p, k).flatten() for p in (pixels, pixels.flip(1)) for k in range(4)])


def turn(images, which):
    """Apply symmetry `which` (0 to 7; its shape is that of the leading axes, or broadcasts) to images."""
    flat = images.flatten(-2)
    table = SYMMETRIES[which.to(device)]
    table = table.view(*table.shape[:-1], *[1] * (flat.dim() - table.dim()), 784)
    return flat.gather(-1, table.expand(flat.shape)).view(images.shape)


# %% [markdown]
# **boss: other hands.** Each *drawing* is also turned a little, shifted, resized, and its strokes
# sometimes become bolder or thinner (the largest, or smallest, value of the 3 x 3 neighbourhood). A whole
# batch at once, on the device.


# %%
def other_hand(images):
    """Small changes, each drawing its own; the shape stays."""
    x = images.flatten(0, 2)  # (drawings, 1, 28, 28)
    dice = torch.rand(5, len(x)).to(device) * 2 - 1
    angle, size, (dx, dy) = dice[0] * np.pi / 18, 1 + 0.1 * dice[1], dice[2:4] * 2 / 14  # 10°, 10 %, 2 pixels
    cos, sin = size * angle.cos(), size * angle.sin()
    move = torch.stack([cos, -sin, dx, sin, cos, dy], 1).view(-1, 2, 3)
    x = F.grid_sample(x, F.affine_grid(move, x.shape, align_corners=False), align_corners=False)
    pen = dice[4].view(-1, 1, 1, 1)
    x = torch.where(pen > 0.8, F.max_pool2d(x, 3, 1, 1), x)
    return torch.where(pen < -0.8, -F.max_pool2d(-x, 3, 1, 1), x).view(images.shape)


# %%
with torch.random.fork_rng(devices=[]):
    plain = drawings[training[:5].to(device), :1].unsqueeze(2)[None]  # (1, 5, 1, 1, 28, 28)
    turned = torch.cat([turn(plain, torch.tensor([[[k]]])) for k in range(8)], 2)  # (1, 5, 8, 1, 28, 28)
    hands = torch.cat([other_hand(plain.float() / 255) for _ in range(6)], 2) * 255
    shown = torch.cat([turned, hands.to(torch.uint8)], 2)[0, :, :, 0].cpu()  # (5, 14, 28, 28)
    plt.figure(figsize=(8, 2.9))
    plt.imshow(255 - shown.permute(0, 2, 1, 3).reshape(5 * 28, -1), cmap="gray")
    plt.axvline(8 * 28 - 0.5, color="C3")
    plt.axis("off")
    plt.title("eight classes from each character      |      one class by six other hands", fontsize=9)
    show("augment.jpg")

# %% [markdown]
# ## The net
#
# The course's Conv4: four times convolution, batch norm, ReLU, pooling; 28 pixels become 14, 7, 3, 1. The
# **body** turns an image into 64 numbers, the linear **head** tells the five classes apart. Batch norm
# always uses the statistics of the images at hand, five support or five query images, in training *and*
# test: it keeps no running averages, so it takes out what the whole task has in common. `rates` are the
# learned step sizes, one for each tensor; `scale` stretches distances (boss).
#
# Why is batch norm written out here? PyTorch's fused one is right in a loop, but its **second derivative is
# wrong under `vmap`** (torch 2.15; [known since 2022](https://github.com/pytorch/functorch/issues/534)), and
# no error says so: MAML would still learn, only worse. We found out by comparing `vmap` with the loop, below.

# %%
from functools import partial

from torch import nn
from torch.func import functional_call, grad, vmap


class BatchNorm(nn.BatchNorm2d):
    """Every five images share their statistics. `fused`: for just five, faster on a CPU, never under vmap."""

    def __init__(self, width, fused):
        super().__init__(width, track_running_stats=False)
        self.fused = fused

    def forward(self, x):
        if self.fused:
            return super().forward(x)
        x = x.to(self.weight.dtype).unflatten(0, (-1, WAYS))  # (sets, 5, channels, height, width)
        var, mean = torch.var_mean(x, (1, 3, 4), correction=0, keepdim=True)
        x = (x - mean) * (var + self.eps).rsqrt() * self.weight[:, None, None] + self.bias[:, None, None]
        return x.flatten(0, 1)


class Conv4(nn.Module):
    def __init__(self, width, rate, fused=not on_gpu):
        super().__init__()
        layers = []
        for channels in (1, width, width, width):
            layers += [nn.Conv2d(channels, width, 3, padding=1)]
            layers += [BatchNorm(width, fused), nn.ReLU(), nn.MaxPool2d(2)]
        self.body = nn.Sequential(*layers, nn.Flatten())
        self.head = nn.Linear(width, WAYS)
        self.rates = nn.Parameter(torch.full((18,), rate))
        self.scale = nn.Parameter(torch.tensor(0.1))

    def forward(self, x):  # (batch, 1, 28, 28) -> (batch, 5)
        return self.head(self.body(x))


def make_model(way, fused=not on_gpu):
    layout = torch.contiguous_format if on_gpu else torch.channels_last  # CPU: 1.5 times as fast
    model = Conv4(settings["width"], way["rate"], fused).to(device, memory_format=layout)
    model.rates.requires_grad_(way["learned"])
    return model


# %% [markdown]
# ## Learning inside a task
#
# **MAML** looks for weights $\theta$ that are good *after* a few steps on the support set,
#
# $$ \theta'_0 = \theta, \qquad \theta'_{k+1} = \theta'_k - \alpha \nabla L_\text{support}(\theta'_k), \qquad
# \min_\theta \sum_\text{tasks} L_\text{query}(\theta'_K). $$
#
# The weights of a task are only a dictionary, and `torch.func` makes the rest short: `functional_call`
# runs the net with the weights of that dictionary, `grad` returns the gradient as one more dictionary,
# and all of it can be differentiated again. That second gradient is what the **first-order** version
# (FO-MAML) leaves out: it takes the inner slope for a constant, so $\partial\theta'/\partial\theta$ is
# simply 1.

# %%
LABELS = torch.arange(WAYS, device=device)  # the class is the position in the support set


def adapted(model, support, at, first_order, **start):
    """All weights learn from the support set: their states after the numbers of steps in `at`."""
    weights = {name: w for name, w in model.named_parameters() if name not in ("rates", "scale")} | start
    rates, states = model.rates.clamp(1e-3, 1), []

    def support_loss(weights):
        return F.cross_entropy(functional_call(model, weights, (support,)), LABELS)

    for step in range(max(at) + 1):
        if step in at:
            states.append(weights)
        if step < max(at):
            here = {name: w.detach() for name, w in weights.items()} if first_order else weights
            slope = grad(support_loss)(here)
            weights = {name: w - rate * slope[name] for rate, (name, w) in zip(rates, weights.items())}
    return states


def adapt_all(model, support, query, at, first_order):
    """Logits of the queries (len(at), 5, 5) after the numbers of steps in `at`."""
    states = adapted(model, support, at, first_order)
    return torch.stack([functional_call(model, weights, (query,)) for weights in states])


# %% [markdown]
# **Many tasks at once.** `vmap` turns a function of one task into one of a whole batch of tasks: 32 nets
# with 32 different sets of weights run side by side as grouped convolutions. On a GPU that is what fills
# it. A CPU has little to fill; its loop keeps the few images of one task in the cache and may use the fused
# batch norm. The results are the same, so the device decides.


# %%
def by_vmap(function, *batches):
    return vmap(function)(*batches)


def by_loop(function, *batches):
    return torch.stack([function(*one) for one in zip(*batches, strict=True)])


each = by_vmap if on_gpu else by_loop


# %% [markdown]
# Is the gradient through the gradient right? A tiny net in double precision, two inner steps, and a small
# push $v$ of all weights: $(L(\theta + \epsilon v) - L(\theta - \epsilon v)) / 2\epsilon$ needs no
# calculus at all and must equal $\nabla L \cdot v$. The second-order gradient has to pass this test, the
# first-order one cannot: it is the slope of something else.


# %%
def outer_loss(model, task, steps, first_order):
    logits = adapt_all(model, task[:, 0], task[:, 1], (steps,), first_order)
    return F.cross_entropy(logits[0], LABELS)


def slopes(model, push, **how):
    """The slope of the outer loss in direction `push`, by gradient and by finite difference."""
    weights = [w for name, w in model.named_parameters() if name not in ("rates", "scale")]
    slope = torch.autograd.grad(outer_loss(model, **how), weights)
    by_gradient = sum((a * b).sum() for a, b in zip(slope, push))
    ends = []
    with torch.no_grad():
        for move in (1e-8, -2e-8, 1e-8):  # there, to the other side, and back
            [w.add_(move * p) for w, p in zip(weights, push)]
            ends.append(outer_loss(model, **how))
    return by_gradient.item(), ((ends[0] - ends[1]) / 2e-8).item()


with torch.random.fork_rng(devices=[]):
    torch.manual_seed(0)
    small = Conv4(4, rate=0.4).to(device, torch.float64)
    how = dict(task=draw_tasks(training, 1)[0].double(), steps=2)
    push = [torch.randn_like(w) for name, w in small.named_parameters() if name not in ("rates", "scale")]
    push = [p / torch.cat([q.flatten() for q in push]).norm() for p in push]  # of length 1
    second, measured = slopes(small, push, **how, first_order=False)
    first, _ = slopes(small, push, **how, first_order=True)
say(f"finite difference {measured:+.6f}, second order {second:+.6f}, first order {first:+.6f}")

# %% [markdown]
# What does the second order cost? The same eight tasks, one inner step, forward and backward, in a loop
# and by `vmap`; and do the two ways agree?


# %%
def milliseconds(work, repeats=3):
    times = []
    for _ in range(repeats + 1):  # the first one warms up
        tic = time.perf_counter()
        work()
        torch.cuda.synchronize() if on_gpu else None
        times.append(time.perf_counter() - tic)
    return 1000 * float(np.median(times[1:]))


def meta_gradient(model, tasks, first_order, run):
    adapt = partial(adapt_all, model, at=(1,), first_order=first_order)
    logits = run(adapt, tasks[:, :, 0], tasks[:, :, 1])
    loss = F.cross_entropy(logits.flatten(0, 2), LABELS.repeat(len(tasks)))
    return torch.autograd.grad(loss, [*model.body.parameters()])


with torch.random.fork_rng(devices=[]):
    tasks, model = draw_tasks(training, 8), make_model(WAY["FO-MAML"], fused=False)
    loop_model = make_model(WAY["FO-MAML"])
    loop_model.load_state_dict(model.state_dict())
pairs = [(loop_model, by_loop), (model, by_vmap)]
for order in ("first", "second"):  # the time is that of float32, the difference that of float64
    cost = [milliseconds(partial(meta_gradient, net, tasks, order == "first", run)) for net, run in pairs]
    slope = [meta_gradient(net.double(), tasks.double(), order == "first", run) for net, run in pairs]
    [net.float() for net, _ in pairs]
    apart = max((a - b).abs().max() for a, b in zip(*slope)) / max(a.abs().max() for a in slope[0])
    say(f"{order:6} order, {len(tasks)} tasks: loop {cost[0]:.0f} ms, vmap {cost[1]:.0f} ms", end="; ")
    say(f"gradients differ by {apart:.0e} of the largest entry")

# %% [markdown]
# **ANIL**, *almost no inner loop*: most of what MAML gains is in reusable features, so only the head
# adapts. Then the body sees each image once, whatever the number of inner steps, and the steps themselves
# are tiny matrix products, all tasks in one `vmap`.
#
# **boss: start the head where a comparison would.** A prototypical net has no head: it gives a query $q$
# to the nearest support feature $p_c$. As $-s\,|q - p_c|^2 = 2s\,p_c \cdot q - s\,|p_c|^2 +
# \text{const}$, that *is* a linear head with weights $2s\,p_c$ and bias $-s\,|p_c|^2$. So the inner steps
# can begin there: with 0 steps it is a prototypical net, with some it is **proto-ANIL**. With one drawing a
# class each support image *is* its prototype, so its loss is small before the first step and the steps have
# little left to do; report question 2 shows how little.


# %%
def embed(model, images):
    """(sets, 5, 1, 28, 28) -> (sets, 5, features); on a GPU in half precision, which vmap would undo."""
    with accelerator.autocast():
        at_once = lambda: model.body(images.flatten(0, 1)).unflatten(0, (-1, WAYS))
        return (at_once() if on_gpu else by_loop(model.body, images)).float()


def adapt_head(weight, bias, support, query, rates, at):
    """As adapt_all, for the head alone and on features."""
    head, seen = (weight, bias), []

    def support_loss(head):
        return F.cross_entropy(F.linear(support, *head), LABELS)

    for step in range(max(at) + 1):
        if step in at:
            seen.append(F.linear(query, *head))
        if step < max(at):
            head = tuple(w - rate * slope for w, rate, slope in zip(head, rates, grad(support_loss)(head)))
    return torch.stack(seen)


def heads_from(way, model, support):
    """First weights and biases of the heads (tasks, 5, features), (tasks, 5)."""
    if way["prototypes"]:
        return 2 * model.scale * support, -model.scale * support.square().sum(-1)
    tasks = len(support)
    return model.head.weight.expand(tasks, -1, -1), model.head.bias.expand(tasks, -1)


def adapt_heads(way, model, support, query, at):
    """ANIL from features (tasks, 5, features): logits (tasks, len(at), 5, 5)."""
    run = partial(adapt_head, rates=model.rates[-2:].clamp(1e-3, 1), at=at)
    return vmap(run)(*heads_from(way, model, support), support, query)


def solve(way, model, support, query, at):
    """Logits (tasks, len(at), 5, 5) of the queries after the numbers of inner steps in `at`."""
    if way["how"] in ("maml", "transfer"):
        return each(partial(adapt_all, model, at=at, first_order=way["first_order"]), support, query)
    return adapt_heads(way, model, embed(model, support), embed(model, query), at)


# %% [markdown]
# ## The outer loss
#
# What a meta-batch is worth, task by task. *Transfer* knows no tasks: it classifies five fixed
# characters. MAML with `every` also counts the queries after the earlier steps, less and less during the
# first third of the training (a long chain of gradients is easier to learn with help on the way). With
# features at hand, support and query can **change places**: a second loss for free.
#
# The *metric* start of the boss plays a harder game with 20 classes instead of five: each drawing must
# find its partner among all others, from both sides.


# %%
def outer_losses(way, model, images, progress):
    """images (tasks, ways, 2, 1, 28, 28) -> one loss for each task."""
    a, b = images[:, :, 0], images[:, :, 1]
    if way["how"] == "transfer":
        return torch.stack([F.cross_entropy(model(x), LABELS) for x in a])
    if way["how"] == "metric":
        sets = (-1, WAYS, *a.shape[2:])  # 20 classes are four sets of five
        a, b = (embed(model, x.reshape(sets)).view(len(x), -1, settings["width"]) for x in (a, b))
        square = a.square().sum(-1)[:, :, None] + b.square().sum(-1)[:, None]
        near = model.scale * (2 * a @ b.mT - square)  # minus the squared distances (tasks, ways, ways)
        right = torch.arange(near.shape[1], device=device).expand(len(a), -1)
        return sum(F.cross_entropy(one, right, reduction="none").mean(1) for one in (near, near.mT)) / 2
    early = max(0.0, 1 - 3 * progress) if way["every"] else 0.0
    at = tuple(range(1, way["inner"] + 1)) if early else (way["inner"],)
    if way["how"] == "anil":
        a, b = embed(model, a), embed(model, b)
        logits = torch.cat([adapt_heads(way, model, a, b, at), adapt_heads(way, model, b, a, at)], 1)
    else:
        logits = solve(way, model, a, b, at)
    losses = F.cross_entropy(logits.flatten(0, 2), LABELS.repeat(logits[..., 0, 0].numel()), reduction="none")
    share = losses.new_tensor([early] * (len(at) - 1) + [1.0])
    return losses.view(len(a), -1, len(at), WAYS).mean((1, 3)) @ (share / share.sum())


# %% cellView="form" jupyter={"source_hidden": true} tags=["common:checkpoint"]
# @title Checkpoints: a killed run goes on where it stopped
import copy

history = []  # one row an epoch or round; it lives in the checkpoints and ends in history.csv
stages = {}  # name -> its file, and where its rows in the history begin


def bare(part):
    """A net without what accelerate wrapped around it."""
    return accelerator.unwrap_model(part) if isinstance(part, torch.nn.Module) else part


def state_of(part):
    return part if isinstance(part, dict) else bare(part).state_dict()


def restore(parts, states):
    for name, part in parts.items():
        if isinstance(part, dict):
            part.update(send_to_device(states[name], device))
        else:
            bare(part).load_state_dict(states[name])


def save_checkpoint(stage, done, **parts):
    """All that `stage` needs to go on after `done` epochs; a part is a dict or has a state_dict."""
    if accelerator.scaler:
        parts["scaler"] = accelerator.scaler
    dice = gather_object([[torch.get_rng_state(), torch.cuda.get_rng_state() if on_gpu else None]])
    if MAIN:
        path, first = stages[stage]
        states = {name: state_of(part) for name, part in parts.items()}
        torch.save([done, history[first:], dice, states], memory := io.BytesIO())
        with aside(path) as part:
            part.write_bytes(memory.getbuffer())
        old = sorted(path.parent.glob(f"{stage}.????????.pt"), key=lambda path: path.stat().st_mtime_ns)
        for path in old[:-3]:  # of each stage the three newest stay
            path.unlink()
    accelerator.wait_for_everyone()


def load_checkpoint(stage, depends, **parts):
    """Restore parts, history and random numbers; returns the epochs done, 0 without a fitting checkpoint.

    `depends`: the functions and data that decide what this stage learns. With others it starts anew."""
    path = OUT / "checkpoint" / f"{stage}.{fingerprint([SEED, depends])}.pt"
    path = broadcast_object_list([path])[0]
    if stage in stages:  # the training cell runs once more
        del history[stages[stage][1] :]
    stages[stage] = [path, len(history)]
    if accelerator.scaler:
        parts["scaler"] = accelerator.scaler
    if not RESUME or not path.exists():
        return 0
    before = copy.deepcopy({name: state_of(part) for name, part in parts.items()})
    problem = None
    try:
        done, rows, dice, states = torch.load(path, map_location="cpu", weights_only=True)
        restore(parts, states)
        cpu, gpu = dice[accelerator.process_index % len(dice)]
        if on_gpu:
            torch.cuda.set_rng_state(gpu)
        torch.set_rng_state(cpu)
    except Exception as error:
        problem = type(error).__name__
    problems = [one for one in gather_object([problem]) if one]  # all processes go on, or none does
    if problems:
        restore(parts, before)
        if MAIN:
            path.replace(path.with_suffix(".damaged"))
        say(f"{path} is damaged ({problems[0]}) and set aside: {stage} starts anew")
        return 0
    history.extend(rows)
    say(f"{stage}: going on after {done} from {path} (RESUME = False starts anew)")
    return done


# %% [markdown]
# ## Training
#
# A fixed set of validation tasks, the same for every epoch and level. Each process solves its share of
# them.

# %%
dice = torch.Generator().manual_seed(2022)
valid = {
    "new alphabets": draw_tasks(unseen, settings["valid_tasks"], dice=dice),
    "known alphabets": draw_tasks(familiar, settings["valid_tasks"], dice=dice),
}


@torch.no_grad()
def answers(way, model, support, query, at):
    """Log-probabilities (tasks, len(at), 5, 5), on the CPU."""
    parts, rank = accelerator.num_processes, accelerator.process_index
    numbers = torch.arange(-(-len(support) // parts) * parts) % len(support)  # all shares are equally long
    mine = numbers.view(parts, -1)[rank].to(device)
    logits = [solve(way, model, support[k], query[k], at) for k in mine.split(64)]
    return accelerator.gather(torch.cat(logits).log_softmax(-1))[: len(support)].cpu()


def right(way, model, tasks, at):
    """Share of right answers, task by task (tasks, len(at))."""
    guess = answers(way, model, tasks[:, :, 0], tasks[:, :, 1], at).argmax(-1)
    return (guess == torch.arange(WAYS)).float().mean(-1)


# %% [markdown]
# Two guards around the outer gradient. A task whose inner loop ran away (a large learned step, then NaN)
# is left out and counted. And second-order gradients keep the graph of every inner step: when the memory
# of a GPU does not hold the whole meta-batch, it goes through in halves, quarters, ... and the gradients
# add up to the same. Several processes each take their tasks, then the gradients are averaged.


# %%
def add_gradients(model, loss_of, images):
    """Backward of the mean loss, finite tasks only: their losses' sum, and how many they are."""
    pieces, total, good = 1, 0.0, 0
    while True:
        try:
            for piece in images.chunk(pieces):
                losses = loss_of(piece)
                finite = losses.isfinite()
                if not finite.all():
                    losses = loss_of(piece[finite]) if finite.any() else losses[:0]
                if len(losses):
                    accelerator.backward(losses.sum() / len(images))
                total, good = total + losses.detach().sum(), good + len(losses)
            return total, good
        except torch.OutOfMemoryError:
            if pieces >= len(images):
                raise
            pieces, total, good = pieces * 2, 0.0, 0
            model.zero_grad()


def average_gradients(model):
    """The mean over the processes, in one message."""
    if accelerator.num_processes > 1:
        wanted = [w for w in model.parameters() if w.requires_grad]
        slopes = [w.grad if w.grad is not None else torch.zeros_like(w) for w in wanted]
        flat = accelerator.reduce(torch.cat([slope.flatten() for slope in slopes]), "mean")
        for w, part in zip(wanted, flat.split([w.numel() for w in wanted])):
            w.grad = part.view(w.shape)


# %% [markdown]
# A meta-batch: the same random numbers on every process, of which each keeps its part. The **average** is
# a second copy of the weights that follows slowly; meta-gradients are noisy, the average is not, and it
# is what is validated and used.


# %%
def draw_meta_batch(way, pool):
    """Images (tasks of this process, ways, 2, 1, 28, 28)."""
    parts, game = accelerator.num_processes, dict(metric=settings["episodes"], transfer=1)
    tasks = -(-game.get(way["how"], settings["batch_size"]) // parts) * parts
    if way["how"] == "transfer":
        images = draw_tasks(pool[:WAYS], tasks, fixed=True)  # simple: always the same five characters
    else:
        ways = min(way["ways"], len(pool) // WAYS * WAYS)
        images = draw_tasks(pool, tasks, ways, way["augment"])
    images = other_hand(images) if way["augment"] else images
    return images[accelerator.process_index :: parts]


@torch.no_grad()
def follow(average, model, step):
    share = max(1 - settings["average"], 1 / (1 + step / 4))  # the first weights are soon forgotten
    torch._foreach_lerp_([*average.parameters()], [*model.parameters()], share)


def log(stage, epoch, total, good, score, lr, seconds, tasks):
    """A line for the reader, a row for the curves."""
    total, good = accelerator.reduce(torch.stack([total, torch.tensor(float(good), device=device)])).tolist()
    loss, speed, skipped = total / max(good, 1), tasks / seconds, int(tasks - good)
    row = dict(stage=stage, epoch=epoch, loss=loss, valid=float(score), lr=lr, seconds=seconds)
    history.append(row | dict(examples_per_second=speed, skipped=skipped))
    text = f"{stage} {epoch:3d}  loss {loss:.4f}  valid {score:.4f}  lr {lr:.1e}  {seconds:.1f} s"
    say(f"{text}  {speed:,.0f} tasks/s" + f"  {skipped} tasks skipped" * (skipped > 0))


# %% [markdown]
# The loop of the whole course, one floor higher: the examples are tasks. Only the best weights by
# validation are kept, and a worse epoch never overwrites them.


# %% tags=["train"]
def train(stage, way, epochs, updates, start=None, pool=training):
    """One stage of a level; returns the averaged model of the best epoch."""
    model = make_model(way)
    if start is not None:  # boss: go on from the metric start
        model.load_state_dict(start.state_dict() | {"rates": model.rates.detach()})
    average = copy.deepcopy(model)
    optimizer = torch.optim.Adam([w for w in model.parameters() if w.requires_grad], way["lr"], foreach=True)
    warm = dict(total_steps=epochs * updates, pct_start=0.1, cycle_momentum=False, final_div_factor=100)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, way["lr"], **warm)
    optimizer = accelerator.prepare(optimizer)
    best = {"score": torch.tensor(-1.0), "weights": {}}
    state = dict(model=model, average=average, optimizer=optimizer, scheduler=scheduler, best=best)
    before = start.state_dict() if start is not None else {}
    done = load_checkpoint(stage, [train, way, epochs, updates, pool, before], **state)
    for epoch in tqdm(range(done + 1, epochs + 1), stage, disable=QUIET, leave=False):
        tic, total, good, tasks = time.perf_counter(), torch.zeros((), device=device), 0, 0
        for step in range((epoch - 1) * updates, epoch * updates):
            images = draw_meta_batch(way, pool)
            loss_of = partial(outer_losses, way, model, progress=step / (epochs * updates))
            loss, count = add_gradients(model, loss_of, images)
            average_gradients(model)
            accelerator.clip_grad_norm_(model.parameters(), 10)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            follow(average, model, step)
            total, good, tasks = total + loss, good + count, tasks + len(images) * accelerator.num_processes
        seconds = time.perf_counter() - tic
        score = right(way, average, valid["new alphabets"][: settings["check"]], (way["test"],)).mean()
        if score > best["score"]:
            best |= {"score": score, "weights": {k: w.clone() for k, w in average.state_dict().items()}}
        log(stage, epoch, total, good, score, scheduler.get_last_lr()[0], seconds, tasks)
        save_checkpoint(stage, epoch, **state)
    average.load_state_dict(best["weights"])
    return average


# %% [markdown]
# Train what the level asks for. *Strong* trains twice, MAML and ANIL, and keeps what does better on new
# alphabets. The boss trains several nets, each with its own metric start, and keeps all.

# %%
solvers = []  # (way, model): who answers the test
for member in range(settings["members"]):
    model = None
    for name in settings["updates"]:
        how = dict(epochs=settings["epochs"], updates=settings["updates"][name])
        model = train(f"{name}-{member}", WAY[name], **how, start=model if WAY[name]["continues"] else None)
        solvers.append((name, model))


def mean_and_error(shares):
    """Mean over tasks (tasks, ...) and half the width of its 95 % interval."""
    return shares.mean(0), 1.96 * shares.std(0) / len(shares) ** 0.5


if LEVEL == "strong":
    found = {name: right(WAY[name], m, valid["new alphabets"], (WAY[name]["test"],)) for name, m in solvers}
    for name, shares in found.items():
        mean, error = mean_and_error(shares[:, 0])
        say(f"{name}: {mean:.3f} ± {error:.3f} on new alphabets")
    solvers = [max(solvers, key=lambda solver: found[solver[0]].mean())]
way, model = WAY[solvers[-1][0]], solvers[-1][1]

# %% [markdown]
# The curves: outer loss while training, and accuracy on new alphabets after every epoch.

# %%
trained = list(dict.fromkeys(row["stage"] for row in history))
fig, axes = plt.subplots(1, 2, figsize=(8, 2.6))
for stage in trained:
    lines = [row for row in history if row["stage"] == stage]
    for axis, key in zip(axes, ("loss", "valid")):
        axis.plot([row["epoch"] for row in lines], [row[key] for row in lines], ".-", label=stage)
axes[0].set(xlabel="epoch", ylabel="outer loss")
axes[1].set(xlabel="epoch", ylabel="accuracy on new alphabets")
axes[1].legend(fontsize=7)
show("curves.png")

# %% [markdown]
# ## How many steps inside a task?
#
# Training used few inner steps. At test time more are free to try; the validation tells how many help.
# The boss uses the best number for its prediction, the lower levels keep theirs.

# %%
steps = settings["curve"]
curve, curve_error = mean_and_error(right(way, model, valid["new alphabets"], steps))
best_steps = steps[int(curve.argmax())] if LEVEL == "boss" else way["test"]
known_score, known_error = mean_and_error(right(way, model, valid["known alphabets"], (best_steps,)))
for count, score, error in zip(steps, curve.tolist(), curve_error.tolist()):
    say(f"{count:3d} inner steps: {score:.3f} ± {error:.3f}" + "  <- used" * (count == best_steps))
say(f"the same on new characters of known alphabets: {known_score[0]:.3f} ± {known_error[0]:.3f}")

# %% [markdown]
# ## Prediction
#
# Each net gives log-probabilities, and they are averaged. The boss averages over all its nets (those of
# the metric start too) and over the eight symmetries: if the **whole task** is turned, the answer must
# not change, so eight answers to one question are there for the asking.


# %% tags=["predict"]
def predict(support, query):
    """Log-probabilities (nets, symmetries, tasks, 5, 5)."""
    rows = []
    for name, model in solvers:
        way = WAY[name]
        at = (best_steps if name == solvers[-1][0] else way["test"],)
        for k in range(settings["symmetries"]):
            turned = [turn(images, torch.tensor(k)) for images in (support, query)]
            rows.append(answers(way, model, *turned, at)[:, 0])
    return torch.stack(rows).unflatten(0, (len(solvers), -1))


# %% [markdown]
# **One answer for the task.** A test task has one query of each class, in mixed order. Answering query by
# query ignores that: class 2 may be given twice and class 4 never. The **joint decision** asks which of
# the 120 *orders* fits best,
#
# $$ \hat\pi = \arg\max_\pi \sum_i \log p(\text{class } \pi_i \mid \text{query } i). $$
#
# Like batch norm over the queries it looks at all given inputs together, no answer is edited by hand. But
# it is only right if the queries really are one per class, so we look for evidence. If answers were
# thrown independently, 3.8 % of the tasks would have five different ones. `BALANCED_QUERIES = "auto"`
# takes the joint decision (at boss) when the share is far above that; `"off"` and `"on"` decide by hand.

# %%
from itertools import permutations

ORDERS = torch.tensor(list(permutations(range(WAYS))))  # (120, 5)
CHANCE = 120 / 5**5


def decide_jointly(scores):
    """Log-probabilities (tasks, 5, 5) -> the best order (tasks, 5)."""
    return ORDERS[scores[:, torch.arange(WAYS), ORDERS].sum(-1).argmax(-1)]


def all_different(guess):
    return float((guess.sort(-1).values == torch.arange(WAYS)).all(-1).float().mean())


scores = predict(support, query)
alone = scores.mean((0, 1)).argmax(-1)
jointly = decide_jointly(scores.mean((0, 1)))
evidence = all_different(alone)
wanted = {"on": True, "off": False, "auto": settings["joint"] and evidence > 4 * CHANCE}
use_joint = wanted[BALANCED_QUERIES]
prediction = (jointly if use_joint else alone).flatten().numpy()
say(f"{evidence:.1%} of the tasks have five different answers (independent chance: {CHANCE:.1%})")
say(f"the submission decides {'jointly' if use_joint else 'query by query'}")
say(f"{(jointly != alone).float().mean():.1%} of the answers differ between the two decisions")
speeds = [row["examples_per_second"] for row in history]
summary = dict(valid_score=curve[steps.index(best_steps)].item(), known_alphabets=known_score.item())
summary |= dict(parameters=sum(w.numel() for w in model.parameters()))
summary |= dict(examples_per_second=float(np.median(speeds)))
summary |= dict(steps=steps, curve=curve.tolist(), curve_error=curve_error.tolist())
if LEVEL == "simple":  # did the five characters teach anything? The same steps from an untrained net
    with torch.random.fork_rng(devices=[]):
        fresh = right(way, make_model(way), valid["new alphabets"], (way["test"],))
    summary |= dict(untrained=fresh.mean().item())

# %% [markdown]
# ## Submission
#
# `id,class`: line 5·task + query, and the number of the support image that shows the same character.

# %% tags=["submission"]
submission = OUT / ("output.csv" if REAL else "output.sample.csv")


def write_submission(path, classes):
    with aside(path) as part, part.open("w", newline="") as file:
        file.write("id,class\n")
        file.writelines(f"{row},{value}\n" for row, value in enumerate(classes))


def check_submission(path):
    """Raises Stop with what the judge would not take."""
    lines = path.read_bytes().decode().split("\n")
    fields = [line.split(",") for line in lines[1:-1]]
    if lines[0] != "id,class" or lines[-1]:
        raise Stop(f"{path} must begin with the line id,class and end with a line break")
    if [field[0] for field in fields] != [str(row) for row in range(WAYS * len(query))]:
        raise Stop(f"{path} must have the ids 0 to {WAYS * len(query) - 1} in order, one line each")
    for field in fields:
        if field[1:] not in (["0"], ["1"], ["2"], ["3"], ["4"]):
            raise Stop(f"{path}: id {field[0]} has the class {field[1:]}, it must be 0, 1, 2, 3 or 4")


def score_submission(path, answers):
    """The judge: the share of right classes."""
    guess = np.loadtxt(path, delimiter=",", skiprows=1)[:, 1]
    return np.mean(guess == np.load(answers / "class.npy"))


if MAIN:
    write_submission(submission, prediction)
    most = np.bincount(prediction, minlength=WAYS).max() / len(prediction)
    if most > 0.4:
        say(f"warning: {most:.0%} of the answers are one class, a fifth is expected")
    say(submission.read_text()[:30].replace("\n", " "), "...")


# %% cellView="form" jupyter={"source_hidden": true} tags=["common:submit"]
# @title Submission: check it, score it, send it
def check_table(path, header, ids, good, what):
    """Raises Stop with what the judge would not take: the header, the ids in their order, a bad value."""
    lines, ids = path.read_bytes().decode().split("\n"), [str(one) for one in ids]
    if lines[0] != header or lines[-1]:
        raise Stop(f"{path} must begin with the line {header} and end with a line break")
    rows = [line.split(",", 1) for line in lines[1:-1]]
    if not ids or [row[0] for row in rows] != ids or len(set(ids)) < len(ids):
        raise Stop(f"{path} must have the {len(ids)} ids of the test data, each once and in their order")
    for row in rows:
        if len(row) < 2 or not good(row[1]):
            raise Stop(f"{path}: id {row[0]} has {row[1:]}, but needs {what}")


def show_worth():
    """What the boss loses when an idea is switched off, as make ladder measured it on the sample."""
    if not MEASURED["without"]:
        return say("Not measured yet: make ladder does it.")
    sign, boss = 1 if HIGHER_IS_BETTER else -1, MEASURED["levels"]["boss"]
    costs = {idea: sign * (np.mean(boss) - np.mean(one)) for idea, one in MEASURED["without"].items()}
    costs = dict(sorted(costs.items(), key=lambda pair: pair[1]))
    plt.figure(figsize=(8, 2.6))
    bars = plt.barh(list(costs), list(costs.values()))
    plt.bar_label(bars, fmt="%.3g", padding=3)
    plt.margins(x=0.12)  # room for the numbers
    half = (max(boss) - min(boss)) / 2
    plt.axvspan(-half, half, color="C7", alpha=0.4, label="half the range of the boss's seeds")
    plt.xlabel(f"{METRIC}: what the boss loses without the idea")
    plt.legend()
    show("worth.png")


score, points = None, "only the judge knows"
if MAIN:
    try:
        check_submission(submission)  # raises Stop with what is wrong
    except Stop:
        submission.replace(f"{submission}.rejected")
        raise
    if ANSWERS or not FILES:
        score = float(score_submission(submission, ANSWERS))
        points = f"{score:.5g}"
    say(f"{submission} is valid, {METRIC}: {points}")
    command = [sys.executable, "-m", "kaggle", "competitions", "submit", SLUG]
    command += ["-f", str(submission), "-m", f"{HW} {LEVEL}"]
    if not REAL:
        say("It belongs to a sample run, nothing is sent: DATA = 'real' makes the file for the judge.")
    elif not SUBMIT or not SLUG:
        say(f"Upload it at {JUDGE}{f', or run: {shlex.join(command)}' if SLUG else ''}")
    elif subprocess.call(command):
        raise Stop(f"Kaggle did not take {submission}; the file is complete, upload it at {JUDGE}")

# %% [markdown] tags=["report"]
# ## Report
#
# **1. How does the number of training tasks matter?** Fewer characters to learn from means fewer
# different tasks. The same net with the same number of updates of the metric start learns from more and
# more characters, once as they are and once with the boss's augmentation. Accuracy on tasks from new
# alphabets; the bars are 95 % intervals over the validation tasks (another training would differ, too).

# %%
if LEVEL == "boss":
    counts = sorted({min(count, len(training)) for count in settings["counts"]})
    order = np.random.default_rng(SEED).permutation(len(training))
    lines = {}
    for augment in (False, True):
        for count in counts:
            how = dict(pool=training[np.sort(order[:count])], epochs=1)
            how |= dict(updates=settings["report_updates"] * settings["epochs"])
            stage = f"{count}-characters{'-augmented' * augment}"
            few = train(stage, WAY["metric"] | dict(augment=augment), **how)
            shares = right(WAY["metric"], few, valid["new alphabets"], (0,))[:, 0]
            lines[augment, count] = [x.item() for x in mean_and_error(shares)]

# %% tags=["report"]
if LEVEL == "boss":
    plt.figure(figsize=(8, 2.7))
    for augment, label in ((False, "as they are"), (True, "with turned classes and other hands")):
        mean, bar = zip(*(lines[augment, count] for count in counts))
        plt.errorbar(counts, mean, bar, fmt="o-", capsize=3, label=label)
        slope = np.polyfit(np.log2(counts), mean, 1)[0]
        say(f"{label}: {mean[0]:.3f} with {counts[0]} characters, {mean[-1]:.3f} with {counts[-1]}", end="; ")
        say(f"each doubling changes the accuracy by {100 * slope:+.1f} points in a straight-line fit")
    plt.xscale("log", base=2)
    plt.xticks(counts, counts)
    plt.xlabel("training characters")
    plt.ylabel("accuracy")
    plt.legend()
    show("characters.png")
else:
    say("this comparison belongs to the boss level")

# %% [markdown] tags=["report"]
# **2. How does the number of inner steps at inference matter?** The same trained net, the same tasks,
# only the number of steps differs. Levels that were run in this folder before are shown beside this one.
# Where a line is flat, the work was done before the first step. The last printed line asks what *simple*
# has learned from its five characters: an untrained net takes the same steps.


# %% tags=["report"]
def other_levels(here, *needed):
    """{level: its result}, simple first: of this level `here`, of others what earlier runs left, if whole."""
    found = {}
    for level in CHOICES["LEVEL"]:
        path = OUT.with_name(OUT.name.replace(LEVEL, level)) / "result.json"
        try:
            one = here if level == LEVEL else json.loads(path.read_text()) | {}
            if level == LEVEL or (one["profile"] == PROFILE and all(name in one for name in needed)):
                found[level] = one
        except (OSError, ValueError, KeyError, TypeError):
            continue  # missing, broken or of an older notebook
    return found


needed = "steps", "curve", "curve_error", "reuse", "support_loss", "valid_score"
levels = other_levels(summary, *needed)
plt.figure(figsize=(8, 2.7))
for level, found in levels.items():
    plt.errorbar(found["steps"], found["curve"], found["curve_error"], fmt="o-", capsize=3, label=level)
plt.xscale("symlog", linthresh=1)
plt.xticks(steps, steps)
plt.xlabel("inner steps at inference")
plt.ylabel("accuracy on new alphabets")
plt.legend()
show("steps.png")
top = int(curve.argmax())
where = "within" if curve[top] - curve[-1] <= curve_error[top] else "below"
say(f"{curve[0]:.3f} before the first step, the best is {curve[top]:.3f} after {steps[top]};", end=" ")
say(f"after {steps[-1]} it is {curve[-1]:.3f}, {where} the error bar of the best")
if "untrained" in levels.get("simple", {}):
    say("simple: {valid_score:.3f}, and {untrained:.3f} from an untrained net".format(**levels["simple"]))

# %% [markdown] tags=["report"]
# **3. Does the inner loop learn features, or reuse them?** We let *all* weights take five steps on a task
# and compare what each block answers to the queries before and after, as a cosine: 1 means untouched.
# The authors of ANIL found that the head moves and the blocks below hardly do; do our nets agree? A head
# of prototypes has little to learn from its support images, as their loss before the first step shows.

# %% tags=["report"]
images = valid["new alphabets"][:20]


def block_outputs(weights, x):
    """What each of the four blocks and the head make of the images, flat."""
    outputs = []
    for number, layer in enumerate(model.body):
        own = {key.split(".")[-1]: w for key, w in weights.items() if key.startswith(f"body.{number}.")}
        x = functional_call(layer, own, (x,))
        outputs += [x] if isinstance(layer, nn.MaxPool2d) else []
    return [*outputs, F.linear(x, weights["head.weight"], weights["head.bias"])]


with torch.no_grad():
    kept, first = [], []
    for task in images:
        start = {}
        if way["prototypes"]:  # the head that the boss starts from
            weight, bias = heads_from(way, model, embed(model, task[None, :, 0]))
            start = {"head.weight": weight[0], "head.bias": bias[0]}
        before, after = adapted(model, task[:, 0], (0, 5), True, **start)
        first.append(F.cross_entropy(block_outputs(before, task[:, 0])[-1], LABELS).item())
        pairs = zip(block_outputs(before, task[:, 1]), block_outputs(after, task[:, 1]))
        kept.append([F.cosine_similarity(a.flatten(), b.flatten(), dim=0).item() for a, b in pairs])
summary |= dict(reuse=np.mean(kept, 0).tolist(), support_loss=float(np.mean(first)))

# %% [markdown] tags=["report"]
# Guessing would cost a support loss of $\ln 5 \approx 1.61$.

# %% tags=["report"]
parts = ["block 1", "block 2", "block 3", "block 4", "head"]
fig, axis = plt.subplots(figsize=(8, 2.4))
for k, (level, found) in enumerate(levels.items()):
    place = np.arange(5) + 0.8 * (k + 0.5) / len(levels) - 0.4
    axis.bar(place, found["reuse"], 0.75 / len(levels), label=level)
    say(f"{level:6} support loss before the first step {found['support_loss']:.3f}; cosines", end=" ")
    say(", ".join(f"{part} {cosine:.3f}" for part, cosine in zip(parts, found["reuse"])))
axis.axhline(0, color="black", linewidth=0.7)
axis.set(xticks=range(5), xticklabels=parts, ylabel="cosine, before and after")
axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
show("reuse.png")

# %% [markdown] tags=["report"]
# **4. What did the body learn?** Ten characters of the new alphabets, all their drawings, as t-SNE sees
# the features of an untrained net and of ours. One colour is one character: none of them was in the
# training.

# %% tags=["report"]
from sklearn.manifold import TSNE


@torch.no_grad()
def map_of(model):
    who = unseen[torch.linspace(0, len(unseen) - 1, min(10, len(unseen) // WAYS * WAYS)).long()]
    most = int(sizes[who].min())
    pages = drawings[who.to(device), :most].transpose(0, 1).float() / 255  # (drawings, characters, 28, 28)
    features = embed(model, pages.reshape(-1, WAYS, 1, 28, 28)).flatten(0, 1).cpu().numpy()
    points = TSNE(init="pca", perplexity=min(15, len(features) // 4), random_state=0).fit_transform(features)
    return points, np.tile(np.arange(len(who)), most)


if MAIN:
    with torch.random.fork_rng(devices=[]):
        nets = {"untrained": make_model(way), "trained": model}
    fig, axes = plt.subplots(1, 2, figsize=(8, 3))
    for axis, (title, net) in zip(axes, nets.items()):
        places, who = map_of(net)
        axis.scatter(*places.T, c=who, cmap="tab10", s=8)
        axis.set(title=title, xticks=[], yticks=[])
    show("tsne.png")

# %% [markdown] tags=["report"]
# **5. Where is it wrong?** Validation tasks with mistakes: above the support images, below the queries
# with the answer that was given; red is wrong.

# %% tags=["report"]
tasks = valid["new alphabets"][: settings["check"]]
shown = answers(way, model, tasks[:, :, 0], tasks[:, :, 1], (best_steps,))[:, 0].argmax(-1)
wrong = (shown != torch.arange(WAYS)).any(-1).nonzero().flatten()[:2].tolist()
if MAIN and wrong:
    fig, axes = plt.subplots(2, 11, figsize=(8, 1.9), width_ratios=[1] * 5 + [0.4] + [1] * 5)
    for axis in axes.flat:
        axis.set_axis_off()
    for place, task in enumerate(wrong):
        for i in range(WAYS):
            for row, text in ((0, f"class {i}"), (1, f"answer {shown[task, i]}")):
                axis, bad = axes[row, 6 * place + i], row == 1 and shown[task, i] != i
                axis.imshow(1 - tasks[task, i, row, 0].cpu(), cmap="gray", vmin=0, vmax=1)
                axis.set_title(text, fontsize=7, color="C3" if bad else "black")
    show("errors.jpg")

# %% [markdown] tags=["report"]
# **6. What is each item of the boss worth?** On validation tasks of new alphabets. There the queries are
# one per class because *we* draw them so: the joint column is no evidence about the test, and nothing was
# chosen by it.

# %% tags=["report"]
truth = torch.arange(WAYS)
if LEVEL == "boss":
    tasks = valid["new alphabets"][: 2 * settings["check"]]
    scores = predict(tasks[:, :, 0], tasks[:, :, 1])
    tuned = torch.tensor([name == "proto-ANIL" for name, _ in solvers])
    worth = {
        "one net, metric start": scores[:1, :1],
        "one net, then proto-ANIL": scores[1:2, :1],
        "the same, all symmetries": scores[1:2],
        "all nets, metric start": scores[~tuned][:, :1],
        "all nets, proto-ANIL": scores[tuned][:, :1],
        "all nets, all symmetries": scores,
    }
    say(f"{len(tasks)} validation tasks            query by query   jointly")
    for name, part in worth.items():
        mean = part.mean((0, 1))
        both = [(guess == truth).float().mean().item() for guess in (mean.argmax(-1), decide_jointly(mean))]
        say(f"{name:32} {both[0]:13.3f} {both[1]:10.3f}")
        worth[name] = both
    summary |= dict(items=worth)

# %% [markdown] tags=["report"]
# Both decisions on the test tasks of the sample, scored by the judge; the submission is one of the two.

# %% tags=["report"]
if MAIN and ANSWERS:
    for name, guess in (("independent", alone), ("joint", jointly)):
        path = OUT / "decisions" / f"{name}.csv"
        write_submission(path, guess.flatten().tolist())
        summary |= {f"score_{name}": float(score_submission(path, ANSWERS))}
        say(f"{name} decision: {summary[f'score_{name}']:.4f}")

# %% [markdown] tags=["report"]
# **7. What is reading once worth?** A training task the official way (list a character's folder, decode
# all its drawings, keep two) and ours (an index into the tensor).

# %% tags=["report"]
paths = list(folders.values())


def by_file(tasks):
    dice = np.random.default_rng(0)
    for _ in range(tasks):
        for k in dice.choice(len(paths), WAYS, replace=False):
            np.stack([decode(path) for path in sorted(paths[k][0].parent.glob("*.png"))])[dice.permutation(2)]


slow, fast = (milliseconds(partial(by_file, 4)) / 4, milliseconds(lambda: draw_tasks(training, 64)) / 64)
say(f"{1000 / slow:10,.0f} tasks/s from files, {1000 / fast:10,.0f} tasks/s by index")
say(f"{summary['examples_per_second']:10,.0f} tasks/s in training (median of all epochs)")

# %% cellView="form" jupyter={"source_hidden": true} tags=["common:result"]
# @title Result
result = {"hw": HW, "level": LEVEL, "without": OFF, "data": "real" if REAL else "sample", "profile": PROFILE}
result |= {"metric": METRIC, "score": score, **summary, "seconds": round(time.perf_counter() - START, 1)}
result |= {"device": machine, "torch": torch.__version__, "seed": SEED, "settings": settings}
if MAIN:
    with aside(OUT / "history.csv") as part:
        pd.DataFrame(history).to_csv(part, index=False)
    with aside(OUT / "result.json") as part:
        part.write_text(json.dumps(result, indent=1, default=str))
    LOCK.release(force=True)
say(f"submission: {submission}\nscore: {METRIC} {points}\nresult: {OUT / 'result.json'}")
