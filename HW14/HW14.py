# %% [markdown] tags=["header"]
# # HW14 · Life-long learning: five tasks in turn, and none forgotten
#
# <!-- badges -->
# [![Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/ml2022-notebooks/ml2022-spring/blob/main/HW14/HW14.ipynb)
# [![Kaggle](https://kaggle.com/static/images/open-in-kaggle.svg)](https://kaggle.com/kernels/welcome?src=https://github.com/ml2022-notebooks/ml2022-spring/blob/main/HW14/HW14.ipynb)
# <!-- /badges -->
#
# A net learns to read digits. Then it has to read digits that are turned by 20 degrees, then by 40, by
# 60, by 80: five tasks **one after another**, and while it learns one, the images of the others are gone.
# At the end it is asked about all five. An ordinary net has then forgotten most of the first task. Its
# size is not the reason: the same net learns all five *at once* with ease. The lecture's remedy is
# **selective plasticity**: find the weights that mattered for the old tasks and tie them down,
# $L' = L + \lambda \sum_i b_i (\theta_i - \theta_i^*)^2$. Five methods of the course (EWC, MAS, SI,
# RWalk, SCP) differ in one line only, how they compute the importance $b_i$. This notebook has that line
# for each of them, chooses $\lambda$ honestly, and compares them with what a **small memory** of old
# images achieves.
#
# 網路先學會辨認數字,接著依序學習旋轉 20、40、60、80 度的數字:五個任務**一個接一個**,學新任務時看不到舊
# 資料,最後五個任務一起考。一般的網路會忘掉大部分的第一個任務,這叫做**災難性遺忘**;原因不是網路太小,因為
# 同時學五個任務並不難。課程的解法是替重要的參數加上「守衛」$b_i$,不讓它們任意移動。EWC、MAS、SI、RWalk、
# SCP 只差在 $b_i$ 怎麼算;本筆記本把每個公式寫在程式旁邊,用保留資料挑選 $\lambda$,再與只存少量舊圖片的方
# 法比較。
#
# The ladder, measured on the built-in sample (average accuracy over the five tasks after the last one, in
# percent, higher is better; the mean of three seeds ± half their range). The course had no leaderboard
# here:
#
# <!-- ladder -->
# | level | what it adds | sample | course baseline (real data) | seconds |
# |---|---|---|---|---|
# | simple | nothing is protected: the lower bound | 46.9 ± 0.5 |  | 34 |
# | medium | EWC: guards from the squared gradients of every image | 71.0 ± 0.6 |  | 79 |
# | strong | five kinds of guard, each with the strength that held-out images choose | 79.7 ± 0.3 |  | 235 |
# | boss | a small memory of images and answers (DER++), with or without a guard | 92.8 ± 0.1 |  | 182 |
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
DATA_DIR = "data/HW14"  # @param {type:"string"}
OUT_DIR = "out/HW14"  # @param {type:"string"}
RESUME = True  # @param {type:"boolean"}
SUBMIT = False  # @param {type:"boolean"}
# this homework's own; 0 or nothing stands for the level's own
EPOCHS = 0  # @param {type:"integer"}
BATCH_SIZE = 0  # @param {type:"integer"}
NETS = 0  # @param {type:"integer"}
METHODS = ""  # @param {type:"string"}

# %% tags=["homework"]
HW, METRIC, HIGHER_IS_BETTER = "HW14", "average accuracy", True
SLUG, JUDGE = "", "the course's site: curves, answers and code went there, there was no leaderboard"
BASELINES = {}  # the course published none
FILES = {  # packed (.gz) or not; how many the course has
    "train-images": ("train-images?idx3-ubyte*", 1),
    "train-labels": ("train-labels?idx1-ubyte*", 1),
    "t10k-images": ("t10k-images?idx3-ubyte*", 1),
    "t10k-labels": ("t10k-labels?idx1-ubyte*", 1),
}
MIRRORS = []  # {name here: address} of complete copies
for host in (
    "https://ossci-datasets.s3.amazonaws.com/mnist/",
    "https://storage.googleapis.com/cvdf-datasets/mnist/",
    "http://yann.lecun.com/exdb/mnist/",
):
    MIRRORS.append({})
    for name in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"):
        MIRRORS[-1][f"{name}-ubyte.gz"] = f"{host}{name}-ubyte.gz"
HASHES = {  # md5 of the four packed files
    "f68b3c2dcbeaaa9fbdd348bbdeb94873",
    "d53e105ee54ea40749a09fcbcd1e9432",
    "9fb629c4189551a2d022fa330f9573f3",
    "ec29112dd5afa0611ce80d1b7f02629c",
}
OWN = {  # name: what it may be
    "EPOCHS": range(100_001),
    "BATCH_SIZE": range(100_001),
    "NETS": range(1001),
    "METHODS": None,
}
NEEDS = {"numpy": "numpy", "pandas": "pandas", "matplotlib": "matplotlib", "torch": "torch"}
NEEDS |= {"accelerate": "accelerate", "filelock": "filelock", "tqdm": "tqdm"}
NEEDS |= {"sklearn": "scikit-learn", "torchvision": "torchvision", "PIL": "Pillow"}
MIXED_PRECISION = False  # a step of so small a net waits for its launch, not for its arithmetic
LESS_MEMORY = "set NETS or BATCH_SIZE to half of what the settings say"
MEASURED = {}  # what each idea is worth: there is no table of ideas yet

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
# MNIST: 60,000 handwritten digits to learn from, 10,000 to be tested on, 28 x 28 pixels of grey. The four
# files are in the *idx* format: a magic number, the sizes, then the bytes; packed with gzip or not. The
# labels of the test part are public, so nothing but our own discipline keeps us from choosing by them: in
# this notebook they are read, but **only the final evaluation uses them**. Whatever is chosen, is chosen
# on images that we hold out of the training part.
#
# The folded cell below makes the sample from real digits that come with scikit-learn (1,797 of 8 x 8
# pixels), brought to MNIST's size, format and file names.


# %% cellView="form" jupyter={"source_hidden": true} tags=["sample"]
# @title The sample: scikit-learn's digits as small idx files
def make_sample(folder, answers):
    """1,297 digits to learn from, 500 to be tested on, in MNIST's files; the judge has a copy of the test."""
    from PIL import Image
    from sklearn.datasets import load_digits

    digits = load_digits()
    small = (digits.images * (255 / 16)).astype(np.uint8)
    images = np.zeros((len(small), 28, 28), np.uint8)  # a margin of 4 pixels, as in MNIST
    for image, one in zip(images, small):
        image[4:24, 4:24] = Image.fromarray(one).resize((20, 20), Image.Resampling.BICUBIC)
    order, labels = np.random.default_rng(2022).permutation(len(images)), digits.target.astype(np.uint8)
    split = dict(train=order[500:], t10k=order[:500])
    if PROFILE == "tiny":
        split = dict(train=order[500:900], t10k=order[:200])
    for part, rows in split.items():
        head = np.array([2051, len(rows), 28, 28], ">i4").tobytes()
        (folder / f"{part}-images-idx3-ubyte").write_bytes(head + images[rows].tobytes())
        head = np.array([2049, len(rows)], ">i4").tobytes()
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(head + labels[rows].tobytes())
    np.save(answers / "images.npy", images[split["t10k"]])
    np.save(answers / "labels.npy", labels[split["t10k"]])


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
# Reading means checking: a download that broke off, or a web page in the place of a file, must not become a
# training set.

# %%
import zlib


def read_idx(path, dims, magic):
    """One idx file -> array of bytes; raises Stop with what is wrong with it."""
    advice = "delete it, then it is fetched again or made anew"
    raw, kind = path.read_bytes(), "images" if dims == 3 else "labels"
    try:
        raw = gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise Stop(f"{path} ({len(raw)} bytes) is a damaged archive ({error}): {advice}.") from None
    head = np.frombuffer(raw[: 4 + 4 * dims], ">i4") if len(raw) >= 4 + 4 * dims else np.zeros(1, int)
    if head[0] != magic:
        raise Stop(
            f"{path} begins with {raw[:16]}, where an idx file of {kind} has the number {magic}: {advice}."
        )
    if dims == 3 and tuple(head[2:]) != (28, 28):
        raise Stop(f"{path} has images of {head[2]} x {head[3]} pixels, expected are 28 x 28: {advice}.")
    if len(raw) != 4 + 4 * dims + head[1:].prod():
        wanted = 4 + 4 * dims + head[1:].prod()
        raise Stop(f"{path} has {len(raw)} bytes, its head announces {wanted}: {advice}.")
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * dims).reshape(head[1:])


def read_part(part):
    """Images and labels of `train` or `t10k`, checked against each other."""
    at, names = PATHS[f"{part}-images"][0], PATHS[f"{part}-labels"][0]
    images, labels = read_idx(at, 3, 2051), read_idx(names, 1, 2049)
    if len(images) != len(labels) or not len(images):
        raise Stop(
            f"{at} has {len(images)} images, {names} has {len(labels)} labels: one of them is no part of it."
        )
    if labels.max() > 9:
        raise Stop(f"{names} has the label {labels.max()}, but digits are 0 to 9: fetch it again.")
    return images, labels


(train_images, train_labels), (test_images, test_labels) = read_part("train"), read_part("t10k")
most = (400, 200) if PROFILE == "tiny" else (5000, 1000)
if REAL and PROFILE != "full" and len(train_images) > most[0]:
    train_images, train_labels = train_images[: most[0]], train_labels[: most[0]]
    test_images, test_labels = test_images[: most[1]], test_labels[: most[1]]
    say(f"profile {PROFILE}: the first {most[0]} and {most[1]} images are used, with full it is all of them")
say(f"train: {len(train_images)} images, test: {len(test_images)}; a digit:", np.bincount(train_labels))

# %% [markdown]
# ## The ladder
#
# A run is known by its name: `course MAS` has the official sample's formula and strength, `MAS` the paper's
# formula with a strength that held-out images choose from a grid. `ER`, `DER++` and `A-GEM` keep images.

# %%
COURSE = {"course EWC": 100.0, "course MAS": 0.1, "course SI": 1.0}
COURSE |= {"course RWalk": 100.0, "course SCP": 100.0}
GRID = {  # weakest first
    "EWC": (10.0, 30.0, 100.0, 300.0, 1e3, 3e3),
    "MAS": (0.01, 0.03, 0.1, 0.3, 1.0, 3.0),
    "SI": (0.1, 0.3, 1.0, 3.0, 10.0, 30.0),
    "RWalk": (0.1, 0.3, 1.0, 3.0, 10.0, 30.0),
    "SCP": (1.0, 3.0, 10.0, 30.0, 100.0, 300.0),
}
SMALL_GRID = {  # ten times the learning rate, weights go longer ways
    "EWC": (300.0, 1e3, 3e3, 1e4),
    "MAS": (0.03, 0.1, 0.3, 1.0),
    "SI": (1.0, 3.0, 10.0, 30.0),
    "RWalk": (3.0, 10.0, 30.0, 100.0),
    "SCP": (30.0, 100.0, 300.0, 1e3),
}
GUARDS = GRID if PROFILE == "full" else SMALL_GRID
BOUNDS = ["finetune", "joint"]
MEMORY = ["ER small", "ER middle", "ER", "A-GEM", "DER++ small", "DER++ middle", "DER++", "DER++ & MAS"]
ALL = [*BOUNDS, *COURSE, *GUARDS, "LwF", *MEMORY]

# %% [markdown]
# One dictionary says what each level does. Its score is that of its *headline*; if several methods may be
# the headline, the held-out images decide. `memory` is how many images of each task the three sizes of
# memory hold.

# %% tags=["levels"]
if OFF:
    raise Stop(f"{HW} has no table of ideas yet: leave WITHOUT empty.")
FIXED = {"EWC": (100.0,) if PROFILE == "full" else (300.0,)}  # medium: one strength, not chosen
LEVELS = {
    "simple": dict(methods=BOUNDS, headline=["finetune"], grid={}),
    "medium": dict(methods=[*BOUNDS, "course EWC", "EWC"], headline=["EWC"], grid=FIXED),
    "strong": dict(methods=[*BOUNDS, *GUARDS], headline=[*GUARDS], grid=GUARDS),
    "boss": dict(
        methods=ALL, headline=["DER++", "DER++ & MAS"], grid=GUARDS | {"DER++ & MAS": (0.001, 0.01)}
    ),
}
FULL = dict(angles=(0, 20, 40, 60, 80), hidden=(1024, 512, 256), lr=1e-4, batch_size=128, epochs=10, nets=3)
FULL |= dict(held_out=5000, memory=(50, 200, 1000), slices=10)
SMALL = dict(hidden=(512, 256, 128), lr=1e-3, held_out=197, memory=(10, 20, 40))
SMALL |= dict(nets=1 if LEVEL == "boss" else 3)  # one processor core, and boss has 21 methods
TINY = dict(angles=(0, 20, 40), hidden=(64, 32), lr=3e-3, batch_size=64, epochs=4, held_out=100, nets=1)
TINY |= dict(memory=(5, 10, 20), slices=2)
settings = FULL | LEVELS[LEVEL] | {"full": {}, "small": SMALL, "tiny": TINY}[PROFILE]
if PROFILE == "tiny":
    settings["grid"] = {name: grid[len(grid) // 2 :][:2] for name, grid in settings["grid"].items()}
settings |= dict(epochs=EPOCHS or settings["epochs"], batch_size=BATCH_SIZE or settings["batch_size"])
settings |= dict(nets=NETS or settings["nets"])
if METHODS:  # fewer or others than the level has
    settings["methods"] = [name.strip() for name in METHODS.split(",")]
    if unknown := {*settings["methods"]} - {*ALL}:
        raise Stop(f"METHODS has {', '.join(sorted(unknown))}; known are {', '.join(ALL)}.")
    names = [name for name in settings["headline"] if name in settings["methods"]]
    settings |= dict(headline=names or settings["methods"][-1:])
if len(train_images) <= 2 * settings["held_out"]:
    settings["held_out"] = len(train_images) // 8  # a small set of one's own
say(*(f"{name}: {value}" for name, value in settings.items()), sep="\n")

# %% [markdown]
# ## Five tasks out of one
#
# Task $k$ shows the same digits turned counter-clockwise by 0, 20, 40, 60 or 80 degrees. The official
# sample turns every image anew in every epoch, one by one, in Python. Here all images are turned **once,
# in one call**, and stay on the device as bytes: for the real data 235 MB, and a batch is an index into
# them.

# %%
from torchvision.transforms.v2 import functional as TF


def rotated(images):
    """(n, 28, 28) bytes -> (tasks, n, 784) bytes on the device: the n images as n channels of one."""
    images = torch.tensor(images, device=device)
    return torch.stack([TF.rotate(images, angle).flatten(1) for angle in settings["angles"]])


x_train, y_train = rotated(train_images), torch.tensor(train_labels, device=device).long()
x_test, y_test = rotated(test_images), torch.tensor(test_labels, device=device).long()
TASKS = len(settings["angles"])
fig, axes = plt.subplots(TASKS, 12, figsize=(8, 0.7 * TASKS))
for task, row in enumerate(axes):
    for axis, image in zip(row, x_train[task].cpu()):
        axis.imshow(image.view(28, 28), cmap="gray_r")
        axis.axis("off")
    row[0].set_title(f"task {task + 1}: {settings['angles'][task]} degrees", loc="left", fontsize=8)
show("tasks.jpg")

# %% [markdown]
# How far apart are the tasks? Take an image and its own rotation, and the cosine of the angle between
# them as vectors. For comparison: two different images of one digit, both upright. From which angle on
# does an image resemble a stranger's digit more than its own rotation?

# %%
unit = torch.nn.functional.normalize(x_train[:, :2000].float(), dim=2)
itself = (unit * unit[:1]).sum(2).mean(1)
alike = unit[0] @ unit[0].T
same = (y_train[:2000, None] == y_train[:2000]) & ~torch.eye(len(alike), dtype=torch.bool, device=device)
for angle, cosine in zip(settings["angles"], itself.tolist()):
    say(f"an image and itself, turned by {angle:2d} degrees: cosine {cosine:.2f}")
say(f"two images of the same digit: cosine {alike[same].mean():.2f}")

# %% [markdown]
# For every choice some training images are **held out**. The choices are made on the first three tasks
# only: who may look at all five before he decides is not learning for life.

# %%
order = np.random.default_rng(SEED).permutation(len(y_train))
held, learn = (torch.tensor(part, device=device) for part in np.split(order, [settings["held_out"]]))
EARLY = min(3, TASKS)
x_held, y_held = x_train[:EARLY, held], y_train[held]
x_learn, y_learn = x_train[:EARLY, learn], y_train[learn]
say(f"to choose: {len(learn)} images to learn from, {len(held)} held out, tasks 1 to {EARLY}")
say(f"to report: {len(y_train)} images to learn from, {len(y_test)} to be tested on, tasks 1 to {TASKS}")

# %% [markdown]
# ## The net, as one vector
#
# The course's net, 784-1024-512-256-10 with ReLU (half as wide on the sample), but its weights are
# kept as **one flat vector** $\theta$. Every formula of this homework speaks of $\theta_i$, and can now
# be written down as it stands: no loop over layers. And several nets are stacked as rows of one matrix:
# other seeds, or other strengths $\lambda$. They share nothing but the clock; one batched product moves
# them all.

# %%
from itertools import pairwise

from torch import nn
from torch.nn import functional as F


class Nets(nn.Module):
    """Nets side by side: (nets or 1, batch, 784) -> (nets, batch, 10)."""

    def __init__(self, seeds):
        super().__init__()
        self.sizes = [*pairwise([784, *settings["hidden"], 10])]
        self.theta = nn.Parameter(torch.stack([self.fresh(seed) for seed in seeds]))  # (nets, weights)

    def fresh(self, seed):
        torch.manual_seed(seed)
        layers = [nn.Linear(a, b) for a, b in self.sizes]  # PyTorch's usual start
        return torch.cat([part for one in layers for part in (one.weight.T.flatten(), one.bias)]).detach()

    def trace(self, x, theta=None):
        """The input and the output of every layer; gradients may be asked for at each of them."""
        theta = self.theta if theta is None else theta
        inputs, outputs = [x.expand(len(theta), -1, -1)], []
        parts = theta.split([n for a, b in self.sizes for n in (a * b, b)], dim=1)
        for (a, b), weight, bias in zip(self.sizes, parts[::2], parts[1::2]):
            if outputs:
                inputs.append(outputs[-1].relu())
            outputs.append(torch.baddbmm(bias[:, None], inputs[-1], weight.view(-1, a, b)))
        return inputs, outputs

    def forward(self, x, theta=None):
        return self.trace(x, theta)[1][-1]

    def extra_repr(self):
        return f"{len(self.theta)} x {self.sizes}"


say(
    f"{Nets([0]).theta.numel():,} weights a net, {settings['nets']} nets with seeds of their own side by side"
)

# %% [markdown]
# Small helpers. Bytes become numbers when they are used. Processes on several GPUs take every $k$-th
# image and add up what they found.


# %%
RANK, WORLD = accelerator.process_index, accelerator.num_processes


def look(images):
    return images.float() / 255


def add_up(found):
    """The sum over all processes."""
    return accelerator.reduce(found, "sum") if WORLD > 1 else found


def cross_entropy(logits, y):
    """(nets, batch, 10), (batch) or (nets, batch) -> (nets, batch)."""
    y = y.expand(logits.shape[:2])
    return F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="none").view(y.shape)


# %% [markdown]
# ## What a method is
#
# One training loop serves all methods. A method may change five moments of it; whoever changes nothing is
# **finetune**, the lower bound. **Joint**, the upper bound, is no life-long learning: it keeps everything
# and draws its batches from all tasks so far, as many as the others.


# %%
class Method:
    """Finetune: nothing is protected. All that a method remembers are its attributes."""

    def __init__(self, strength=(0.0,), size=0):
        self.strength, self.size = torch.tensor(strength, device=device)[:, None], size  # (nets, 1)

    def pool(self, x, y, task):
        """The images it may draw from while it learns `task`."""
        return x[task], y

    def before_task(self, model):
        pass

    def loss(self, model, x, y):
        return cross_entropy(model(x), y).mean(1)  # (nets,)

    def bend(self, model):
        """The gradient is there, the step not yet done."""

    def after_step(self, model):
        pass

    def after_task(self, model, x, y):
        pass


class Joint(Method):
    def pool(self, x, y, task):
        return x[: task + 1].flatten(0, 1), y.repeat(task + 1)


# %% [markdown]
# A **guard** ties each weight to its old value $\theta^*$ with a spring. The spring's energy is the
# penalty $\lambda \sum_i b_i (\theta_i - \theta_i^*)^2$, and its pull the gradient of that:
# $2 \lambda b_i (\theta_i - \theta_i^*)$. We add the pull to the gradient of the task's loss, which is
# the same as adding the penalty to the loss, but saves autograd half a dozen passes over all weights: a
# step is about 1.3 times as fast. $b_i = 0$ forgets, $b_i = \infty$ refuses to learn.


# %%
class Guard(Method):
    def before_task(self, model):
        theta = model.theta.detach()
        self.anchor = theta.clone()  # theta*
        self.importance = getattr(self, "importance", torch.zeros_like(theta))  # b
        self.stiffness = 2 * self.strength * self.importance

    def bend(self, model):
        model.theta.grad.addcmul_(self.stiffness, model.theta.detach() - self.anchor)

    def after_task(self, model, x, y):
        self.importance = self.merge(self.measure(model, x, y))

    def merge(self, new):
        return self.importance + new  # importances of the tasks add up


# %% [markdown]
# ### The gradient of every single image
#
# EWC, MAS and SCP need the mean over images of $|g_{n,i}|^p$, where $g_n$ is the gradient for image $n$
# *alone*. The official sample takes the gradient of a **batch's mean** instead: there the images cancel
# each other out; question 3 of the report measures by how much. One backward pass an image would be slow.
# But the gradient of a linear layer's weight matrix is the product of its input $a$ and the gradient
# $\delta$ at its output, so
#
# $$ \sum_n |g_n|^p = \sum_n |a_n|^p \, (|\delta_n|^p)^\top $$
#
# is one matrix product for a whole batch, and exact.


# %%
def per_image(model, x, y, goal, power):
    """The mean over images of |d goal / d theta| ** power (nets, weights), exactly."""
    total = torch.zeros_like(model.theta)
    for xs, ys in zip(x[RANK::WORLD].split(512), y[RANK::WORLD].split(512)):
        inputs, outputs = model.trace(look(xs))
        deltas = torch.autograd.grad(goal(outputs[-1], ys).sum(), outputs)
        parts = []
        for a, delta in zip(inputs, deltas):
            delta = delta.abs().pow(power)  # (nets, batch, out)
            parts += [(a.detach().abs().pow(power).mT @ delta).flatten(1), delta.sum(1)]
        total += torch.cat(parts, 1)
    return add_up(total.detach()) / len(x)


def per_batch(model, x, y, goal, power):
    """The official way: the gradient of a batch's mean, its power, and the mean over the batches."""
    total, batches = torch.zeros_like(model.theta), x.split(settings["batch_size"])
    for xs, ys in zip(batches, y.split(settings["batch_size"])):
        value = goal(model(look(xs)), ys).mean(1).sum()
        total += torch.autograd.grad(value, model.theta)[0].abs().pow(power)
    return total.detach() / len(batches)


# %% [markdown]
# ### Three guards that look at the finished net
#
# - **EWC**, the diagonal of the Fisher information:
#   $b_i = \frac1N \sum_n \big( \partial \log p(y_n | x_n) / \partial \theta_i \big)^2$. It needs labels.
# - **MAS**: how much does the output's length move with a weight?
#   $b_i = \frac1N \sum_n \big| \partial \lVert f(x_n) \rVert^2 / \partial \theta_i \big|$. It needs no
#   labels. This is the line that the homework asks for.
# - **SCP**: the output seen along random directions $v_l$ of length one:
#   $b_i = \frac{1}{NL} \sum_n \sum_l \big( \partial (v_l^\top f(x_n)) / \partial \theta_i \big)^2$. No
#   labels either.


# %%
class EWC(Guard):
    mean = staticmethod(per_image)

    def measure(self, model, x, y):
        return self.mean(model, x, y, cross_entropy, 2)


class MAS(Guard):
    mean = staticmethod(per_image)

    def measure(self, model, x, y):
        return self.mean(model, x, y, lambda out, y: out.square().sum(2), 1)


class SCP(Guard):
    mean = staticmethod(per_image)

    def directions(self):
        return F.normalize(torch.randn(settings["slices"], 10), dim=1).to(device)

    def measure(self, model, x, y):
        slices = self.directions()
        return sum(self.mean(model, x, y, lambda out, y, v=v: out @ v, 2) for v in slices) / len(slices)


# %% [markdown]
# ### Two guards that watch the training
#
# - **SI**: who did the work? Each step lowers the loss by about $-g_i \Delta\theta_i$ per weight. Summed
#   over a task this is the weight's share $W_i$ of the fall, and over the whole way $\Delta_i$ it went:
#   $b_i = \max(W_i, 0) / (\Delta_i^2 + \varepsilon)$. The gradient is the *task's*, taken before the
#   spring pulls.
# - **RWalk**: distance as the Fisher information measures it, and both added: $b_i = F_i + s_i$ with
#   $s_i \leftarrow \frac12 \big( s_i + \max(W_i, 0) / (\frac12 F_i \Delta_i^2 + \varepsilon) \big)$, $F$
#   a moving average over tasks.


# %%
class SI(Guard):
    epsilon = 1e-3

    def before_task(self, model):
        super().before_task(model)
        self.work = torch.zeros_like(self.anchor)  # W

    def bend(self, model):
        self.gradient, self.place = model.theta.grad.clone(), model.theta.detach().clone()
        super().bend(model)

    def after_step(self, model):
        self.work.addcmul_(self.gradient, model.theta.detach() - self.place, value=-1)

    def after_task(self, model, x, y):
        super().after_task(model, x, y)
        del self.gradient, self.place  # a checkpoint need not have them

    def measure(self, model, x, y):
        way = model.theta.detach() - self.anchor  # Delta
        return self.work.clamp(min=0) / (way.square() + self.epsilon)


class RWalk(SI):
    mean = staticmethod(per_image)

    def measure(self, model, x, y):
        fisher = self.mean(model, x, y, cross_entropy, 2)
        self.fisher = 0.6 * self.old_fisher() + 0.4 * fisher
        way = model.theta.detach() - self.anchor
        score = self.work.clamp(min=0) / (0.5 * self.fisher * way.square() + self.epsilon)
        self.score = (getattr(self, "score", 0) + score) / 2
        return self.fisher + self.score

    def old_fisher(self):
        return getattr(self, "fisher", torch.zeros_like(self.anchor))

    def merge(self, new):
        return new  # the averages hold the earlier tasks


# %% [markdown]
# ### The same five as in the official sample
#
# The curves that the report asks for have the official formulas and strengths. They differ from the
# papers: gradients of batch means; each guard is the sum of *all* earlier guards, which are sums already,
# so the first task counts four times in the end; SI and RWalk take the gradient after the spring has
# pulled and keep negative work; SCP averages its 100 directions first, so that it measures along a single
# short one.


# %%
class InTheCourse:
    """Batch means, and earlier guards added once more."""

    mean = staticmethod(per_batch)

    def merge(self, new):
        self.earlier = getattr(self, "earlier", 0) + self.importance
        return new + self.earlier


class CourseEWC(InTheCourse, EWC):
    pass


class CourseMAS(InTheCourse, MAS):
    pass


class CourseSCP(InTheCourse, SCP):
    def directions(self):
        return F.normalize(torch.randn(100, 10), dim=1).mean(0, keepdim=True).to(device)


class CourseSI(SI):
    epsilon = 0.1

    def bend(self, model):
        super().bend(model)
        self.gradient = model.theta.grad.clone()  # after the spring has pulled

    def measure(self, model, x, y):
        return self.work / ((model.theta.detach() - self.anchor).square() + self.epsilon)


class CourseRWalk(CourseSI):
    def measure(self, model, x, y):
        new = per_batch(model, x, y, cross_entropy, 2)
        self.fisher = 0.6 * getattr(self, "fishers", 0) + 0.4 * new
        self.fishers = getattr(self, "fishers", 0) + self.fisher  # added once more here, too
        way = model.theta.detach() - self.anchor
        self.score = (getattr(self, "score", 0) + self.work / (0.5 * self.fisher * way.square() + 0.1)) / 2
        return self.fisher + self.score

    def merge(self, new):
        return new


# %% [markdown]
# ### Methods that keep something
#
# The guards keep only weights. **LwF** keeps the old net and asks the new one to answer as the old one
# did, on the *new* images: $L + T^2 \, \mathrm{KL}(p_{old}^{1/T} \,\Vert\, p_{new}^{1/T})$.
#
# The others break the homework's rule and keep $M$ **old images of each task**, never more; tables and
# plots mark them with a star. **ER** adds a batch of memory to every step.


# %%
class LwF(Method):
    temperature = 2.0

    def before_task(self, model):
        self.started = hasattr(self, "old")
        self.old = model.theta.detach().clone()

    def loss(self, model, x, y):
        logits = model(x)
        with torch.no_grad():
            old = (model(x, self.old) / self.temperature).softmax(2)
        new = (logits / self.temperature).log_softmax(2)
        far = F.kl_div(new, old, reduction="none").sum(2).mean(1) * self.temperature**2
        return cross_entropy(logits, y).mean(1) + self.started * far


class ER(Method):
    def after_task(self, model, x, y):
        super().after_task(model, x, y)
        kept = torch.randperm(len(x))[: self.size].to(device)
        for name, new in dict(images=x[kept], labels=y[kept], logits=self.answers(model, x[kept])).items():
            setattr(self, name, torch.cat([getattr(self, name, new[:0]), new]))
        self.tasks = getattr(self, "tasks", 0) + 1
        assert len(self.images) <= self.size * self.tasks, "more is kept than M images of each task"

    @torch.no_grad()
    def answers(self, model, x):
        return model(look(x)).transpose(0, 1)  # (images, nets, 10)

    def recall(self, x):
        """A batch of memory for every net, as large as x: images, labels, the answers of then."""
        nets, batch = x.shape[:2]
        pick = torch.randint(len(self.images), (nets, batch * WORLD))[:, RANK::WORLD].to(device)
        own = torch.arange(nets, device=device)[:, None]
        return look(self.images[pick]), self.labels[pick], self.logits[pick, own]

    def loss(self, model, x, y):
        if not hasattr(self, "images"):
            return super().loss(model, x, y)
        old, labels, _ = self.recall(x)
        loss = cross_entropy(model(torch.cat([x, old], 1)), torch.cat([y, labels], 1))
        return sum(part.mean(1) for part in loss.chunk(2, 1))  # the new batch and the old one


# %% [markdown]
# DER++ also keeps the *answers* $z$ that the net gave when it stored the images:
# $L + \alpha \lVert f(x') - z' \rVert^2 + \beta L(x'', y'')$. An answer tells more than a label: it says
# what a 3 has in common with an 8. **A-GEM** only looks whether the step would hurt the memory,
# $g^\top r < 0$, and takes that part out: $g - \frac{g^\top r}{r^\top r} r$.


# %%
class DER(ER):
    alpha, beta = 0.5, 1.0

    def loss(self, model, x, y):
        if not hasattr(self, "images"):
            return super().loss(model, x, y)
        (x1, _, z), (x2, labels, _) = self.recall(x), self.recall(x)
        new, first, second = model(torch.cat([x, x1, x2], 1)).chunk(3, 1)  # one pass for the three batches
        near = (first - z).square().mean((1, 2))
        again = cross_entropy(second, labels).mean(1)
        return cross_entropy(new, y).mean(1) + self.alpha * near + self.beta * again


class DERandMAS(DER, MAS):  # the loss of one, the spring of the other
    pass


class AGEM(ER):
    def loss(self, model, x, y):
        self.memory = self.recall(x) if hasattr(self, "images") else None
        return Method.loss(self, model, x, y)

    def bend(self, model):
        if self.memory:
            x, y, _ = self.memory
            r = torch.autograd.grad(Method.loss(self, model, x, y).sum(), model.theta)[0]
            r, g = add_up(r) / WORLD, model.theta.grad
            along = (g * r).sum(1, keepdim=True).clamp(max=0)  # 0: they agree
            self.memory = None  # used up
            g -= along / r.square().sum(1, keepdim=True).clamp(min=1e-12) * r


# %% [markdown]
# All methods by name. `small` and `middle` stand for the smaller memories.

# %%
MAKE = {"finetune": Method, "joint": Joint, "LwF": LwF, "A-GEM": AGEM, "DER++ & MAS": DERandMAS}
MAKE |= {"course EWC": CourseEWC, "course MAS": CourseMAS, "course SI": CourseSI}
MAKE |= {"course RWalk": CourseRWalk, "course SCP": CourseSCP}
MAKE |= {"EWC": EWC, "MAS": MAS, "SI": SI, "RWalk": RWalk, "SCP": SCP}
MAKE |= {
    f"{name}{size}": kind for name, kind in (("ER", ER), ("DER++", DER)) for size in (" small", " middle", "")
}


def make(name, strengths):
    """The method `name` for nets side by side; strengths: one number a net."""
    size = settings["memory"][0 if name.endswith("small") else 1 if name.endswith("middle") else 2]
    return MAKE[name](strengths, size if issubclass(MAKE[name], ER) else 0)


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
# The order of the images depends on seed, task and epoch and on nothing else: all methods with one seed
# see the same batches in the same order, and a run that goes on after a kill does too. Accuracies are
# counted for all nets and tasks at once, without graphs.


# %%
def batches(seeds, task, epoch, pool, count):
    """Numbers (nets, batch) of one epoch: `count` images of the `pool`, an order for every seed."""
    dice = {seed: torch.Generator().manual_seed((seed * 100 + task) * 10_000 + epoch) for seed in seeds}
    order = {seed: torch.randperm(pool, generator=one)[:count] for seed, one in dice.items()}
    whole = torch.stack([order[seed] for seed in seeds])[:, : count // WORLD * WORLD]
    mine = whole[:, RANK::WORLD].to(device)
    return mine.split(max(1, settings["batch_size"] // WORLD), dim=1)


@torch.no_grad()
def evaluate(model, x, y):
    """Accuracy in percent (tasks, nets); every process counts its share of the images."""
    hits = torch.zeros(len(x), len(model.theta), device=device)
    for task, images in enumerate(x):
        for xs, ys in zip(images[RANK::WORLD].split(2000), y[RANK::WORLD].split(2000)):
            hits[task] += (model(look(xs)).argmax(2) == ys).sum(1)
    return 100 * add_up(hits) / len(y)


def log(stage, task, loss, accuracy, seconds, images, loud):
    """A row for history.csv, if loud a line for the reader: medians over the nets; `images` of one epoch."""
    speed = settings["epochs"] * images / seconds
    row = dict(stage=stage, epoch=task + 1, loss=loss.nanmedian().item(), valid=accuracy.nanmedian().item())
    history.append(row | dict(lr=settings["lr"], seconds=seconds, examples_per_second=speed))
    text = f"{stage:18} task {task + 1}  loss {row['loss']:7.4f}  accuracy {row['valid']:5.1f}"
    if loud:
        say(f"{text}  lr {settings['lr']:.0e}  {seconds:5.1f} s  {speed:9,.0f} images/s")


# %% [markdown]
# The loop of the whole course, with a method's five moments in it. Adam starts anew with every task, as
# in the official sample. After each epoch we note the course's metric, the mean accuracy over the tasks
# *seen so far*; after each task the accuracy on *all* tasks, one row of the **matrix** $R_{ij}$: accuracy
# on task $j$ after task $i$. Row 0 belongs to the untrained net. A net whose loss is no longer finite is
# out (`nan`), its neighbours go on.


# %% tags=["train"]
def train(stage, method, seeds, data, check):
    """All tasks of `data` in turn -> nets, {"curve": [(nets,)], "matrix": [(tasks, nets)]}."""
    model, (x, y) = Nets(seeds).to(device), data
    torch.manual_seed(SEED)  # so that no method depends on those before it
    found = dict(curve=[], matrix=[evaluate(model, *check)])
    memory = vars(method)
    depends = [train, method, seeds, rotated, len(x), x[0], y]
    depends += [check[0][0], check[1]]  # accuracies on these images are a part of the checkpoint
    for task in range(load_checkpoint(stage, depends, model=model, method=memory, found=found), len(x)):
        tic = time.perf_counter()
        # fused: one kernel for all weights, a step is about 1.2 times as fast
        optimizer = torch.optim.Adam(model.parameters(), lr=settings["lr"], fused=True)
        method.before_task(model)
        images, labels = method.pool(x, y, task)
        for epoch in tqdm(range(settings["epochs"]), f"{stage} {task + 1}", disable=QUIET, leave=False):
            total = torch.zeros(len(seeds), device=device)
            for numbers in batches(seeds, task, epoch, len(images), len(y)):
                loss = method.loss(model, look(images[numbers]), labels[numbers])  # (nets,)
                optimizer.zero_grad()
                accelerator.backward(loss.sum())  # nets share no weight: each gets its own gradient
                if WORLD > 1:  # one vector, so this is all that several GPUs need
                    model.theta.grad = add_up(model.theta.grad) / WORLD
                method.bend(model)
                optimizer.step()
                method.after_step(model)
                total += loss.detach() * numbers.shape[1] * WORLD / len(y)
            if epoch + 1 == settings["epochs"]:
                method.after_task(model, x[task], y)
            alive = total.isfinite() & model.theta.isfinite().all(1)
            accuracy = evaluate(model, check[0][: task + 1], check[1])
            found["curve"].append(torch.where(alive, accuracy.mean(0), torch.nan))
        found["matrix"].append(torch.where(alive, evaluate(model, *check), torch.nan))
        if not getattr(method, "importance", total[:, None])[alive].isfinite().all():
            raise Stop(
                f"{stage}: an importance is not a finite number after task {task + 1}: lower its strength."
            )
        last, seconds = task + 1 == len(x), time.perf_counter() - tic
        loud = last or REAL  # on the sample a task takes a second
        log(stage, task, total, accuracy.mean(0), seconds, len(y) * len(seeds), loud)
        if last:  # what the report needs, nothing more
            [memory.pop(name) for name in {*memory} - {"strength", "size", "importance"}]
        save_checkpoint(stage, task + 1, model=model, method=memory, found=found)
    return model, found


# %% [markdown]
# ## How strong should a guard be?
#
# Strengths of different methods cannot be compared, their importances have different sizes. So each
# method is asked separately: all strengths of its grid, each with all nets, learn tasks 1 to 3 side by side,
# and the held-out images of these tasks decide by the mean over the nets. No test image takes part.

# %%
SEEDS = [1000 * SEED + k for k in range(settings["nets"])]
sweep, chosen = {}, dict(COURSE)  # {method: accuracies (tasks, strengths)}, {method: strength}
to_learn, to_check = (x_learn, y_learn), (x_held, y_held)
for name in settings["methods"]:
    grid = settings["grid"].get(name, (chosen.get(name, 0.0),))
    if name in settings["grid"] or name in settings["headline"]:
        method = make(name, [strength for strength in grid for _ in SEEDS])
        nets, found = train(f"choose {name}", method, SEEDS * len(grid), to_learn, to_check)
        sweep[name] = found["matrix"][-1].view(EARLY, len(grid), -1).mean(2).cpu().numpy()
        if np.isnan(sweep[name]).all():
            raise Stop(f"{name}: the loss became infinite with every strength in {grid}: lower them.")
        chosen[name] = grid[int(np.nanargmax(sweep[name].mean(0)))]
        edge = ", the edge of its grid" * (len(grid) > 1 and chosen[name] in (grid[0], grid[-1]))
        best = np.nanmax(sweep[name].mean(0))
        say(f"{name}: strength {chosen[name]:g}{edge}, held-out accuracy {best:.1f}")
    else:
        chosen.setdefault(name, grid[0])
held_out = {name: float(np.nanmax(sweep[name].mean(0))) for name in settings["headline"]}
headline = max(held_out, key=held_out.get)
say(f"headline: {headline}, by held-out accuracy among {', '.join(settings['headline'])}")

# %% [markdown]
# ## The five tasks
#
# Now every method learns all five tasks, from all training images, with the strength chosen above. This is
# the first and only time that the test images are looked at.

# %% tags=["predict"]
curves, matrices, seconds, importance = {}, {}, {}, {}
for name in settings["methods"]:
    method = make(name, [chosen[name]] * len(SEEDS))
    nets, found = train(name, method, SEEDS, (x_train, y_train), (x_test, y_test))
    curves[name] = torch.stack(found["curve"]).cpu().numpy()  # (tasks * epochs, nets)
    matrices[name] = torch.stack(found["matrix"]).cpu().numpy()  # (tasks + 1, tasks, nets)
    if not np.isfinite(matrices[name]).all():
        raise Stop(
            f"{name}: the loss became infinite, lower its strength {chosen[name]:g} or the learning rate."
        )
    seconds[name] = sum(row["seconds"] for row in history if row["stage"] == name)
    if hasattr(method, "importance"):
        importance[name] = method.importance[0, : 784 * settings["hidden"][0]].view(784, -1).sum(1).cpu()
    if name == headline:
        theta = nets.theta.detach().cpu().numpy()


# %% [markdown]
# ## What the matrix says
#
# With $T$ tasks and $R_{ij}$ as above:
#
# - **ACC** $= \frac1T \sum_j R_{Tj}$, the average at the end: our score;
# - **BWT** $= \frac{1}{T-1} \sum_{j<T} (R_{Tj} - R_{jj})$, backward transfer: negative when old tasks
#   suffer;
# - **forgetting**, the mean over old tasks of the best accuracy there ever was, minus the last;
# - **FWT** $= \frac{1}{T-1} \sum_{j>1} (R_{j-1,j} - R_{0j})$, forward transfer: what earlier tasks bring
#   to one not yet learned, compared with an untrained net;
# - **diagonal** $= \frac1T \sum_j R_{jj}$, plasticity: how well is a task learned when it is its turn?


# %%
def measures(matrix):
    """(tasks + 1, tasks, nets) -> {measure: (nets,)}."""
    last, now = matrix[-1], np.stack([matrix[j + 1, j] for j in range(TASKS)])  # (tasks, nets)
    before = np.stack([matrix[j, j] - matrix[0, j] for j in range(1, TASKS)])
    best = matrix[1:-1, :-1].max(0)
    return {
        "ACC": last.mean(0),
        "BWT": (last - now)[:-1].mean(0),
        "forgetting": (best - last[:-1]).mean(0),
        "FWT": before.mean(0),
        "diagonal": now.mean(0),
    }


results = {name: measures(matrix) for name, matrix in matrices.items()}
STAR = {name: "*" if issubclass(MAKE[name], (ER, Joint)) else "" for name in settings["methods"]}
several, width = len(SEEDS) > 1, 13 if len(SEEDS) > 1 else 11  # with the spread over the nets
say(f"{'':16}{'strength':>9}" + "".join(f"{name:>{width}}" for name in results[headline]))
for name, row in results.items():
    cells = [f"{value.mean():.1f}" + f" ± {value.std():.1f}" * several for value in row.values()]
    say(f"{name + STAR[name]:16}{chosen[name]:9g}" + "".join(f"{cell:>{width}}" for cell in cells))
say(f"* keeps old images: {settings['memory']} of each task (small, middle, all others), joint all")

# %% [markdown]
# And the matrix itself. A row is a moment (after task 1, 2, ...), a column is a task. Below the diagonal
# stands what was kept, above it what came for free.

# %%
shown = [name for name in dict.fromkeys([*BOUNDS, "EWC", headline]) if name in matrices]
fig, axes = plt.subplots(1, len(shown), figsize=(2 * len(shown), 2.4), squeeze=False)
for axis, name in zip(axes[0], shown):
    grid = matrices[name][1:].mean(2)
    axis.imshow(grid, vmin=0, vmax=100)
    for (row, column), value in np.ndenumerate(grid):
        color = "white" if value < 60 else "black"
        axis.text(column, row, f"{value:.0f}", ha="center", va="center", fontsize=8, color=color)
    axis.set(title=name + STAR[name], xlabel="task", xticks=range(TASKS), yticks=range(TASKS))
    axis.set(xticklabels=range(1, TASKS + 1), yticklabels=range(1, TASKS + 1))
axes[0, 0].set_ylabel("after task")
show("matrix.png")

# %% [markdown]
# ## Submission
#
# One json file with all curves and matrices, and beside it the headline's final weights. The check looks
# whether everything is there and agrees. The sample's judge believes no number in the file: it counts the
# score anew, from the weights, on its own copy of the test images.


# %%
def check_submission(path):
    """Raises Stop with what is missing or cannot be."""
    book, weights = json.loads(path.read_text()), path.with_name("weights.npy")
    nets, tasks, rows = len(book["seeds"]), book["tasks"], book["tasks"] * book["epochs"]
    if absent := [name for name in settings["methods"] if name not in book["methods"]]:
        raise Stop(f"{path} lacks the method {absent[0]}")
    if nets != settings["nets"] or book["headline"] not in book["methods"]:
        raise Stop(f"{path} must name {settings['nets']} seeds and a headline among its methods")
    for name, entry in book["methods"].items():
        curve, matrix = np.array(entry["curve"], float), np.array(entry["matrix"], float)
        if curve.shape != (rows, nets) or matrix.shape != (tasks + 1, tasks, nets):
            raise Stop(f"{path}: {name} must have {rows} points and a matrix of {tasks + 1} x {tasks}")
        if not ((curve >= 0) & (curve <= 100)).all() or not ((matrix >= 0) & (matrix <= 100)).all():
            raise Stop(f"{path}: {name} has an accuracy that is not between 0 and 100")
        if abs(matrix[-1].mean() - entry["ACC"]) > 1e-3 or abs(curve[-1].mean() - entry["ACC"]) > 1e-3:
            raise Stop(f"{path}: {name} has ACC {entry['ACC']}, not its last row's mean")
    if hashlib.md5(np.load(weights, allow_pickle=False).tobytes()).hexdigest() != book["weights"]:
        raise Stop(f"{weights} does not belong to {path}")


@torch.no_grad()
def score_submission(path, answers):
    """The judge: the headline's average accuracy, from its weights and the hidden answers."""
    weights = torch.tensor(np.load(path.with_name("weights.npy"), allow_pickle=False), device=device)
    nets, y = Nets([0]), torch.tensor(np.load(answers / "labels.npy"), device=device)
    right = [nets(look(x), weights).argmax(2) == y for x in rotated(np.load(answers / "images.npy"))]
    return 100 * torch.stack(right).float().mean().item()


# %% [markdown]
# Written down: every method with its measures, its curve and its matrix.

# %% tags=["submission"]
submission = OUT / ("submission.json" if REAL else "submission.sample.json")


def write_submission(path):
    with aside(path.with_name("weights.npy")) as part, part.open("wb") as file:
        np.save(file, theta)
    book = dict(homework=HW, level=LEVEL, headline=headline, angles=settings["angles"], seeds=SEEDS)
    book |= dict(epochs=settings["epochs"], tasks=TASKS, weights=hashlib.md5(theta.tobytes()).hexdigest())
    book["methods"] = {}
    for name, row in results.items():
        entry = {measure: round(float(value.mean()), 4) for measure, value in row.items()}
        entry |= dict(strength=chosen[name], keeps_images=bool(STAR[name]))
        entry |= dict(curve=curves[name].round(4).tolist(), matrix=matrices[name].round(4).tolist())
        book["methods"][name] = entry
    with aside(path) as part:
        part.write_text(json.dumps(book, indent=1))


if MAIN:
    write_submission(submission)
    say(f"{submission}: {len(results)} methods, {TASKS * settings['epochs']} points a curve")
speeds = [row["examples_per_second"] for row in history]
summary = dict(valid_score=held_out[headline], headline=headline, chosen=chosen, parameters=theta.shape[1])
summary |= dict(examples_per_second=float(np.median(speeds)))
summary["test"] = {
    who: {key: float(value.mean()) for key, value in row.items()} for who, row in results.items()
}


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
# **1. Learning curves of all methods**, in the course's metric. A dotted line marks the end of a task.
# Left the course's own settings, right the papers' formulas and the methods that keep images (dashed);
# the same two bounds in both.


# %%
def plot_curves(axis, names):
    """Course metric against epochs, the mean over the nets."""
    for name in names:
        bound = {"finetune": "black", "joint": "grey"}.get(name)
        style = dict(color=bound, linewidth=2 if bound else 1.2, linestyle="--" if STAR[name] else "-")
        line = curves[name].mean(1)
        axis.plot(np.arange(1, len(line) + 1), line, label=name + STAR[name], **style)
    for task in range(1, TASKS):
        axis.axvline(task * settings["epochs"], color="black", linestyle=":", linewidth=0.7)
    axis.set(xlabel="epoch", ylim=(0, 100))
    axis.legend(fontsize=6, ncol=2, loc="lower left")


course = [name for name in curves if name in COURSE]
others = [name for name in curves if name not in COURSE and name not in BOUNDS]
bounds = [name for name in BOUNDS if name in curves]
groups = [bounds + names for names in (course, others) if names] or [bounds]
fig, axes = plt.subplots(1, len(groups), figsize=(8, 3), sharey=True, squeeze=False)
for axis, names in zip(axes[0], groups):
    plot_curves(axis, names)
axes[0, 0].set_ylabel("accuracy, tasks so far")
show("acc_summary.png")

# %% [markdown] tags=["report"]
# The same runs task by task, from the matrix: each panel follows one task, from before it was learned to
# the end.

# %%
lines = dict.fromkeys([*bounds, "EWC", "MAS", "LwF", "ER", headline])
lines = [name for name in lines if name in matrices]
fig, axes = plt.subplots(1, TASKS, figsize=(8, 2.2), sharey=True)
for task, axis in enumerate(axes):
    for name in lines:
        color = {"finetune": "black", "joint": "grey"}.get(name)
        axis.plot(matrices[name][:, task].mean(1), ".-", color=color, label=name + STAR[name])
    axis.axvline(task + 1, color="black", linestyle=":", linewidth=0.7)
    axis.set(title=f"task {task + 1}", xlabel="tasks learned", xticks=range(0, TASKS + 1))
axes[0].set_ylabel("accuracy")
fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncol=len(lines), fontsize=8)
show("by_task.png")

# %% [markdown] tags=["report"]
# **2. The metric, in words and numbers.**

# %%
first = settings["epochs"] - 1


def drop(name):
    """How much the curve falls between the end of task 1 and the first epoch of task 2."""
    return curves[name].mean(1)[first] - curves[name].mean(1)[first + 1]


metric_text = f"""After every epoch the accuracy on each task seen so far is measured on the test
images, and averaged. A curve has {TASKS} x {settings["epochs"]} points. When a task begins the average
gets one more term, a task just begun: so curves may jump at a border with nothing forgotten. """
for name in bounds:
    metric_text += f"From task 1 to the first epoch of task 2, {name} changes by {-drop(name):+.1f} points. "
metric_text += """The last point is ACC, the mean over all tasks at the end: """
metric_text += ", ".join(f"{name} {row['ACC'].mean():.1f}" for name, row in results.items())
metric_text += f""". A curve does not say which task suffers, the matrix does. {headline} (test images): """
metric_text += (
    ", ".join(f"task {j + 1} {value:.1f}" for j, value in enumerate(matrices[headline][-1].mean(1))) + "."
)
say(" ".join(metric_text.split()))

# %% [markdown] tags=["report"]
# **3. The MAS importance**: our code, and the proof on eight images, one backward pass for each of them
# alone. Then what the official way, gradients of batch means, finds of it on task 1; for EWC, too.


# %%
def length(out, y):
    return out.square().sum(2)


code = inspect.getsource(MAS.measure) + "\n" + inspect.getsource(per_image)
say(code)
probe = Nets([SEED]).to(device)
probe.load_state_dict({"theta": torch.tensor(theta[:1])})  # the headline's first net
fast, slow = per_image(probe, x_train[0, :8], y_train[:8], length, 1), 0
for image in x_train[0, :8]:
    slow += torch.autograd.grad(length(probe(look(image[None])), None).sum(), probe.theta)[0].abs() / 8
agree = ((fast - slow).norm() / slow.norm()).item()
say(f"8 images, one by one against at once: relative difference {agree:.1e}")
for name, goal, power in (("MAS", length, 1), ("EWC", cross_entropy, 2)):
    official, exact = (way(probe, x_train[0], y_train, goal, power).sum() for way in (per_batch, per_image))
    say(f"{name}: gradients of batch means find {(official / exact).item():.3f} of the importance")

# %% [markdown] tags=["report"]
# **4. The questionnaire's themes**, one row a method. *Memory* counts the numbers kept
# while a task is learned, beside net and optimizer, in units of the net's size; *time* compares the whole
# run with that of the first row.

# %%
ABOUT = {  # name: (what counts, does it need labels, numbers kept while a task is learned)
    "finetune": ("nothing", "no", 0),
    "joint": ("all old images", "yes", 0),
    "EWC": ("squared gradient of the log-likelihood", "yes", 2),  # importance and anchor
    "MAS": ("gradient of the output's squared length", "no", 2),
    "SCP": ("squared gradient along random directions", "no", 2),
    "SI": ("share of the fall of the loss, by way", "yes", 3),  # and the work
    "RWalk": ("Fisher information and the path's score", "yes", 5),  # and Fisher, score
    "LwF": ("the old net's answers on new images", "no", 1),
    "ER": ("old images and labels", "yes", 0),
    "A-GEM": ("old images: no step against them", "yes", 0),
    "DER++": ("old images, labels and answers", "yes", 0),
}
titles = ["method", "what counts", "labels", "memory", "time", "ACC", "BWT"]
rows = [f"| {' | '.join(titles)} |", "|" + "---|" * len(titles)]
for name, row in results.items():
    what, labels, kept = ABOUT[name.split(" ")[-1 if name in COURSE else 0]]
    what += ", and MAS" if name.endswith("& MAS") else ""
    kept += 2 * name.endswith("& MAS") + (name in COURSE and name != "course SI")  # the earlier sums
    images = len(y_train) if name == "joint" else make(name, [0.0]).size
    kept += (TASKS - 1) * images * 784 / 4 / theta.shape[1]  # four bytes make a number
    slower = seconds[name] / seconds[settings["methods"][0]]
    cells = [name + STAR[name], what, labels, f"{kept:.2f}", f"{slower:.1f}"]
    cells += [f"{row['ACC'].mean():.1f}", f"{row['BWT'].mean():.1f}"]
    rows.append(f"| {' | '.join(cells)} |")
for line in rows[:1] + rows[2:]:
    what, counts, *cells = [cell.strip() for cell in line.strip("|").split("|")]
    say(f"{what:15}{counts:50}" + "".join(f"{cell:>8}" for cell in cells))

# %% [markdown] tags=["report"]
# Relatives, in a sentence each. **iCaRL** keeps exemplars chosen to lie near their class mean, distils as
# LwF does, and classifies by the nearest mean. **GEM** is A-GEM with one condition for each old task in
# place of one for all. **DGR** (deep generative replay) trains a generator and lets it dream old images,
# so no image is kept. **Progressive networks** and **PackNet** give each task weights of its own.
#
# Three scenarios: in *task-incremental* learning the test says which task an image is from; in
# *domain-incremental* learning it does not, and the classes stay the same; in *class-incremental*
# learning new classes come. Ours is the **second**: the digits stay, the angle changes, and nobody names
# the angle.
#
# **5. Stability against plasticity.** Accuracy on the held-out images of tasks 1 to 3 against the
# strength: all of them (the line that chose), the first task (stability) and the last one (plasticity).

# %%
grids = [name for name in settings["grid"] if len(settings["grid"][name]) > 1 and name in sweep]
if grids:
    fig, axes = plt.subplots(1, len(grids), figsize=(8, 2.3), sharey=True, squeeze=False)
    for axis, name in zip(axes[0], grids):
        for label, line in zip(("first task", "last task"), sweep[name][[0, -1]]):
            axis.plot(settings["grid"][name], line, ".--", linewidth=1, label=label)
        axis.plot(settings["grid"][name], sweep[name].mean(0), "k.-", label="mean")
        axis.axvline(chosen[name], color="grey", linewidth=0.7)
        axis.set(xscale="log", title=name, xlabel="strength")
    axes[0, 0].set_ylabel("held-out accuracy")
    fig.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncol=3, fontsize=8)
    show("strength.png")
else:
    say("the sweep belongs to the levels strong and boss")

# %% [markdown] tags=["report"]
# **6. What do the guards protect?** The importance of the first layer's weights, summed over its units: one
# number a pixel, after all tasks, each picture on its own scale.

# %%
if importance:
    fig, axes = plt.subplots(1, max(2, len(importance)), figsize=(8, 1.4))
    for axis in axes:
        axis.axis("off")
    for axis, (name, pixels) in zip(axes, importance.items()):
        axis.imshow(pixels.view(28, 28), cmap="magma", vmin=0)
        axis.set_title(name.replace("course ", "course\n").replace("& ", "\n& "), fontsize=7)
    show("importance.png")
else:
    say("no method of this level has an importance")

# %% [markdown] tags=["report"]
# **7. How large must a memory be?** ACC against the images kept of each task, beside the two bounds.

# %%
sizes = ["small", "middle", ""]
if (
    all(f"{name} {size}".strip() in results for name in ("ER", "DER++") for size in sizes)
    and len(bounds) == 2
):
    plt.figure(figsize=(6, 2.6))
    for name in ("ER", "DER++"):
        scores = [results[f"{name} {size}".strip()]["ACC"] for size in sizes]
        means, spread = [np.mean(one) for one in scores], [np.std(one) for one in scores]
        plt.errorbar(settings["memory"], means, spread, fmt="o-", capsize=3, label=name + "*")
    for name, color in (("finetune", "black"), ("joint", "grey")):
        plt.axhline(results[name]["ACC"].mean(), color=color, linestyle="--", label=name)
    plt.xscale("log")
    plt.xticks(settings["memory"], settings["memory"], minor=False)
    plt.minorticks_off()
    plt.xlabel("images kept of each task")
    plt.ylabel("ACC")
    plt.legend(fontsize=8, ncol=2)
    show("memory.png")
else:
    say("the memories belong to the boss level")

# %% [markdown] tags=["report"]
# **8. What is turning the images once worth?** The official loop turns each image in Python whenever it
# is needed and feeds one net; ours takes an index into bytes and feeds all nets at once. The same net,
# batch and optimizer, a dozen batches each.

# %%
from PIL import Image
from torch.utils.data import DataLoader, Dataset


class Turned(Dataset):
    """One image at a time, the official way."""

    def __len__(self):
        return 12 * settings["batch_size"]

    def __getitem__(self, k):
        image = TF.to_dtype(TF.to_image(Image.fromarray(train_images[k % len(train_images)])), scale=True)
        return TF.rotate(image, 20), int(train_labels[k % len(train_labels)])


def images_a_second(loader, count):
    """Training steps over the batches of a loader; images of all nets."""
    model, images, tic = Nets(SEEDS[:count]).to(device), 0, time.perf_counter()
    optimizer = torch.optim.Adam(model.parameters(), lr=settings["lr"], fused=True)
    for x, y in loader:
        loss = cross_entropy(model(x.to(device).reshape(count, -1, 784)), y.to(device).reshape(count, -1))
        optimizer.zero_grad()
        loss.mean(1).sum().backward()
        optimizer.step()
        images += loss.numel()
    return images / (time.perf_counter() - tic)


order = torch.randint(len(y_train), (12, len(SEEDS), settings["batch_size"]), device=device)
speed = {}
ways = {  # name: (its batches, the nets that learn from them)
    "official way, one net": (lambda: DataLoader(Turned(), settings["batch_size"], shuffle=True), 1),
    "ours, one net": (lambda: ((look(x_train[1, rows[0]]), y_train[rows[0]]) for rows in order), 1),
    "ours, all nets at once": (lambda: ((look(x_train[1, n]), y_train[n]) for n in order), len(SEEDS)),
}
for name, (loader, count) in ways.items():
    speed[name] = max(images_a_second(loader(), count) for _ in range(2))
    say(f"{name:24}{speed[name]:12,.0f} images/s{speed[name] / speed['official way, one net']:8.1f} times")

# %% [markdown] tags=["report"]
# **The file to hand in**: curves, tables and answers in one zip.

# %%
curve_rows, cells = [], []
for name in results:
    for (row, k), value in np.ndenumerate(curves[name].round(4)):
        curve_rows.append((name, SEEDS[k], row + 1, row // settings["epochs"] + 1, value))
    for (i, j, k), value in np.ndenumerate(matrices[name].round(4)):
        cells.append((name, SEEDS[k], i, j + 1, value))
curve_rows = pd.DataFrame(curve_rows, columns=["method", "seed", "epoch", "task_trained", "avg_acc_seen"])
cells = pd.DataFrame(cells, columns=["method", "seed", "after_task", "on_task", "acc"])
answers_text = f"""# {HW}, level {LEVEL}, {"real" if REAL else "sample"} data

1. The curves of all methods are in acc_summary.png. * marks methods that keep old images.
2. {" ".join(metric_text.split())}
3. Our MAS importance; the relative difference to one backward pass an image is {agree:.1e} on 8 images:

```python
{code}```

4. Of this run, with {len(SEEDS)} nets a method:

{chr(10).join(rows)}
"""
if MAIN:
    with aside(OUT / "hand-in.zip") as part, zipfile.ZipFile(part, "w", zipfile.ZIP_DEFLATED) as pack:
        pack.write(OUT / "figures" / "acc_summary.png", "acc_summary.png")
        pack.writestr("answers.md", answers_text)
        pack.writestr("matrix.csv", cells.to_csv(index=False))
        pack.writestr("metrics.csv", curve_rows.to_csv(index=False))
        pack.write(submission, "submission.json")
        packed = pack.namelist()
    say(f"{OUT / 'hand-in.zip'}: {', '.join(packed)}")

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
