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
# something, edit a parameter below or a cell, then run again with `RESUME` off.

# %% tags=["parameters"]
# @title Parameters
LEVEL = "boss"  # @param ["boss", "strong", "medium", "simple"]
DATA = "auto"  # @param ["auto", "real", "sample"]
PROFILE = "full"  # @param ["full", "tiny"]
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
OWN = ["EPOCHS", "BATCH_SIZE", "NETS", "METHODS"]  # the parameters that only this homework has
NEEDS = {"accelerate": "accelerate", "sklearn": "scikit-learn", "torchvision": "torchvision"}
MIXED_PRECISION = False  # a step of so small a net waits for its launch, not for its arithmetic

# %% cellView="form" jupyter={"source_hidden": true} tags=["common:setup"]
# @title Setup: packages, parameters, device
import hashlib, importlib.util, inspect, io, json, os, shutil, subprocess, sys, tarfile, time, zipfile
from contextlib import contextmanager
from pathlib import Path

NOTEBOOK, START = "ipykernel" in sys.modules, time.perf_counter()
missing = [package for module, package in NEEDS.items() if importlib.util.find_spec(module) is None]
if missing and subprocess.call([sys.executable, "-m", "pip", "install", "-q", *missing]):
    sys.exit(f"Packages are missing and could not be installed; try by hand: pip install {' '.join(missing)}")

NOTEBOOK or os.environ.setdefault("MPLBACKEND", "Agg")  # a script draws into files and opens no window
import matplotlib.pyplot as plt
import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object, send_to_device, set_seed
from tqdm import tqdm

plt.rcParams["figure.constrained_layout.use"] = True


class Stop(Exception):
    """Ends the run with one sentence that says what a person can do."""


def explain(kind, error, trace):
    """What a person can mend ends in one sentence, all else in the usual traceback."""
    by_hand = "Stopped by hand. Run again to go on from the last checkpoint."
    text = {Stop: str(error), KeyboardInterrupt: by_hand}.get(kind)
    if kind is torch.OutOfMemoryError:
        text = f"Too little memory for batch size {settings.get('batch_size')}: set BATCH_SIZE to half."
    elif isinstance(error, OSError) and error.errno in (1, 13, 17, 20, 27, 28, 30, 122):  # no room, no right
        text = f"{error.filename}: {error.strerror}. Make room or set OUT_DIR; what is complete is kept."
    if NOTEBOOK:
        shell._showtraceback(kind, error, [text]) if text else shell.showtraceback((kind, error, trace))
    else:
        sys.stderr.write(f"{HW}: {text}\n") if text else sys.__excepthook__(kind, error, trace)


sys.excepthook = explain
if NOTEBOOK:
    from IPython import display, get_ipython

    shell = get_ipython()
    shell.set_custom_exc((Exception, KeyboardInterrupt), lambda shell, *error, tb_offset: explain(*error))

YES = (True, False)
CHOICES = {"LEVEL": ("boss", "strong", "medium", "simple"), "DATA": ("auto", "real", "sample")}
CHOICES |= {"PROFILE": ("full", "tiny"), "SEED": range(2**32), "RESUME": YES, "SUBMIT": YES}
PARAMETERS = [*CHOICES, "DATA_DIR", "OUT_DIR", *OWN]
for key, text in [pair for pair in os.environ.items() if pair[0].startswith("HW_")]:
    name = key.removeprefix("HW_")
    if name not in PARAMETERS:
        raise Stop(f"{key} is no parameter of {HW}; these are: HW_{', HW_'.join(PARAMETERS)}.")
    kind = type(globals()[name])
    try:
        globals()[name] = YES[("true", "false").index(text.lower())] if kind is bool else kind(text)
    except ValueError:
        raise Stop(f"{key} is {text!r}, but must be of type {kind.__name__}, not this text.") from None
for name, allowed in CHOICES.items():
    if globals()[name] not in allowed:
        raise Stop(f"{name} is {globals()[name]!r}, but must be one of {allowed}.")

on_gpu = torch.cuda.is_available() and os.environ.get("ACCELERATE_USE_CPU") != "true"
half = "bf16" if on_gpu and torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
accelerator = Accelerator(mixed_precision=half if on_gpu and MIXED_PRECISION else "no")
device, MAIN, print = accelerator.device, accelerator.is_main_process, accelerator.print
QUIET = not MAIN or "TQDM_DISABLE" in os.environ
set_seed(SEED)


@contextmanager
def aside(path):
    """Write to `path`.part, which gets its name when complete: nothing half-written is ever found."""
    part = Path(f"{path}.part")
    part.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(part, ignore_errors=True)  # left by a kill
    try:
        yield part
        shutil.rmtree(path, ignore_errors=True)
        part.replace(path)
    finally:
        shutil.rmtree(part) if part.is_dir() else part.unlink(missing_ok=True)


def show(name):
    """Keep the current figure in OUT/figures; a notebook shows it too."""
    if MAIN:
        with aside(OUT / "figures" / name) as part:
            plt.gcf().savefig(part, dpi=120, format=Path(name).suffix[1:])
        NOTEBOOK and display.display(display.Image(OUT / "figures" / name))
    plt.close()


machine = torch.cuda.get_device_name() if on_gpu else f"{device}, {os.cpu_count()} cores"
software = f"Python {sys.version.split()[0]}, torch {torch.__version__}"
hardware = f"{accelerator.num_processes} x {machine}, precision {accelerator.mixed_precision}"
print(f"{HW} at level {LEVEL}, profile {PROFILE}, seed {SEED}; {software} on {hardware}")

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
from concurrent.futures import ThreadPoolExecutor

import requests
from filelock import FileLock  # of runs side by side, one makes the data and the others wait


def find(*roots):
    """{name: sorted paths} of FILES below the roots, however deep a download nested or packed them."""
    found = {}
    for name, (pattern, _) in FILES.items():
        hits = {path for root in roots for path in Path(root).rglob(pattern) if "__MACOSX" not in path.parts}
        hits = {path for path in hits if path.is_file() and not any(p.endswith(".part") for p in path.parts)}
        if not hits and any([unpack(root) for root in roots]):
            return find(*roots)
        if not hits:
            raise FileNotFoundError(f"there is no {pattern}")
        top = min(len(path.parts) for path in hits)
        found[name] = sorted(path for path in hits if len(path.parts) == top)
    return found


def unpack(root):
    """Unpack the archives below `root` into DATA_DIR, each at one stroke; was there a new one?"""
    new, ends = False, ("zip", "tgz", "tar.gz")
    for archive in sorted(path for end in ends for path in Path(root).rglob(f"*.{end}")):
        target, is_zip = Path(DATA_DIR, f"{archive.name}-unpacked"), archive.suffix == ".zip"
        with FileLock(f"{DATA_DIR}.lock"):
            if target.exists():
                continue
            try:
                with aside(target) as part, (zipfile.ZipFile if is_zip else tarfile.open)(archive) as pack:
                    if is_zip and any(name[0] in "/\\" or ".." in name for name in pack.namelist()):
                        raise OSError("it would write outside its folder")
                    pack.extractall(part, **({} if is_zip else {"filter": "data"}))
                    new = True
            except Exception as error:
                size = archive.stat().st_size
                raise OSError(f"{archive} ({size} bytes) is damaged, fetch it again: {error}") from None
    return new


def known(path):
    """Is it one of the course's own files, byte by byte?"""
    return bool({hashlib.new(kind, path.read_bytes()).hexdigest() for kind in ("md5", "sha256")} & HASHES)


def ask(url):
    (reply := requests.get(url, stream=True, timeout=10)).raise_for_status()
    return reply


def fetch(files):
    """{name: address, or addresses of its pieces} -> DATA_DIR; a broken download leaves nothing."""
    for name, addresses in files.items():
        with FileLock(f"{DATA_DIR}.lock"), aside(Path(DATA_DIR, name)) as part:
            with part.open("wb") as file:
                for url in addresses.split():
                    print(f"fetching {url}")
                    file.writelines(ask(url).iter_content(2**20))
            if HASHES and not known(part):
                raise OSError(f"{name} is not the course's file (its hash differs)")
    return DATA_DIR


def ask_kaggle():
    import kagglehub

    if not kagglehub.config.get_kaggle_credentials():
        raise OSError("no credentials (set KAGGLE_API_TOKEN, see https://www.kaggle.com/settings)")
    return kagglehub.competition_download(SLUG)


def sources():
    """Where the real data may be; a later place is asked only when the earlier ones had none."""
    yield from [(place, lambda: place) for place in (DATA_DIR, "/kaggle/input") if Path(place).is_dir()]
    pool, late = ThreadPoolExecutor(8), time.monotonic() + 10  # mirrors are rung together: 10 seconds in all
    rings = [pool.submit(ask, next(iter(files.values())).split()[0]) for files in MIRRORS]
    if SLUG:
        yield f"https://www.kaggle.com/competitions/{SLUG}", ask_kaggle
    for files, ring in zip(MIRRORS, rings):
        yield ", ".join(files.values()), lambda: ring.result(late - time.monotonic()) and fetch(files)


def choose_data():
    """Is it real, the paths of FILES, the folder of the hidden answers."""
    if not FILES:
        return [DATA != "sample", {}, None]
    why = f"Put {', '.join(pattern for pattern, _ in FILES.values())} into {DATA_DIR}, packed or not. Tried:"
    for place, source in sources() if DATA != "sample" else ():
        try:
            return [True, find(source(), DATA_DIR), None]
        except Exception as error:
            why += f"\n- {place}: {' '.join(str(error).split()) or type(error).__name__}"
    if DATA == "real":
        raise Stop(f"No real data was found. {why}")
    if DATA == "auto":
        print(f"NO REAL DATA WAS FOUND, this run uses the generated SAMPLE. {why}")
    folder, recipe = Path(f"{DATA_DIR}-sample", PROFILE), hashlib.md5(inspect.getsource(make_sample).encode())
    with FileLock(f"{folder}.lock"):
        if not (folder / recipe.hexdigest()).exists():  # never made, or by another make_sample
            with aside(folder) as part:
                [(part / name).mkdir(parents=True) for name in ("data", "answers", recipe.hexdigest())]
                make_sample(part / "data", part / "answers")
    return [False, find(folder / "data"), folder / "answers"]


REAL, PATHS, ANSWERS = broadcast_object_list(choose_data() if MAIN else [None] * 3)
OUT = Path(OUT_DIR, f"{LEVEL}-{'real' if REAL else 'sample'}")
SIZES = [sum(path.stat().st_size for path in hits) for hits in PATHS.values()]
counts = ", ".join(f"{len(hits)} {name} (course: {FILES[name][1]})" for name, hits in PATHS.items())
same = sum(known(hits[0]) for hits in PATHS.values() if HASHES)
print(f"data: {'real' if REAL else 'SAMPLE'}; files: {counts or 'none needed'}; known by their hash: {same}")

# %% [markdown]
# Reading means checking: a download that broke off, or a web page in the place of a file, must not become a
# training set.

# %%
import gzip, zlib


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
if REAL and PROFILE == "tiny":
    train_images, train_labels = train_images[:400], train_labels[:400]
    test_images, test_labels = test_images[:200], test_labels[:200]
print(f"train: {len(train_images)} images, test: {len(test_images)}; a digit:", np.bincount(train_labels))

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
SAMPLE_GRID = {  # ten times the learning rate, weights go longer ways
    "EWC": (300.0, 1e3, 3e3, 1e4),
    "MAS": (0.03, 0.1, 0.3, 1.0),
    "SI": (1.0, 3.0, 10.0, 30.0),
    "RWalk": (3.0, 10.0, 30.0, 100.0),
    "SCP": (30.0, 100.0, 300.0, 1e3),
}
GUARDS = GRID if REAL else SAMPLE_GRID
BOUNDS = ["finetune", "joint"]
MEMORY = ["ER small", "ER middle", "ER", "A-GEM", "DER++ small", "DER++ middle", "DER++", "DER++ & MAS"]
ALL = [*BOUNDS, *COURSE, *GUARDS, "LwF", *MEMORY]

# %% [markdown]
# One dictionary says what each level does. Its score is that of its *headline*; if several methods may be
# the headline, the held-out images decide. `memory` is how many images of each task the three sizes of
# memory hold.

# %% tags=["levels"]
FIXED = {"EWC": (100.0,) if REAL else (300.0,)}  # medium: one strength, not chosen
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
SAMPLE = dict(hidden=(512, 256, 128), lr=1e-3, held_out=197, memory=(10, 20, 40))
SAMPLE |= dict(nets=1 if LEVEL == "boss" else 3)  # one processor core, and boss has 21 methods
TINY = dict(angles=(0, 20, 40), hidden=(64, 32), lr=3e-3, batch_size=64, epochs=4, held_out=100, nets=1)
TINY |= dict(memory=(5, 10, 20), slices=2)
settings = FULL | LEVELS[LEVEL] | (TINY if PROFILE == "tiny" else {} if REAL else SAMPLE)
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
print(*(f"{name}: {value}" for name, value in settings.items()), sep="\n")

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
    print(f"an image and itself, turned by {angle:2d} degrees: cosine {cosine:.2f}")
print(f"two images of the same digit: cosine {alike[same].mean():.2f}")

# %% [markdown]
# For every choice some training images are **held out**. The choices are made on the first three tasks
# only: who may look at all five before he decides is not learning for life.

# %%
order = np.random.default_rng(SEED).permutation(len(y_train))
held, learn = (torch.tensor(part, device=device) for part in np.split(order, [settings["held_out"]]))
EARLY = min(3, TASKS)
x_held, y_held = x_train[:EARLY, held], y_train[held]
x_learn, y_learn = x_train[:EARLY, learn], y_train[learn]
print(f"to choose: {len(learn)} images to learn from, {len(held)} held out, tasks 1 to {EARLY}")
print(f"to report: {len(y_train)} images to learn from, {len(y_test)} to be tested on, tasks 1 to {TASKS}")

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


print(
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
history = []  # one row per epoch or round; it lives in the checkpoints and ends in history.csv


def bare(part):
    return accelerator.unwrap_model(part) if isinstance(part, torch.nn.Module) else part


def made_with(parts):
    """All that a checkpoint must agree with: level, own parameters, settings, data, nets."""
    mine = [globals()[name] for name in ("LEVEL", "PROFILE", "SEED", *OWN)]
    nets = [str(bare(part)) for part in parts.values() if isinstance(part, torch.nn.Module)]
    return json.dumps([mine, settings, SIZES, nets], default=str)


def save_checkpoint(stage, done, **parts):
    """All that `stage` needs to go on after `done` epochs; a part is a dict or has a state_dict."""
    parts |= {"scaler": accelerator.scaler} if accelerator.scaler else {}
    dice = gather_object([[torch.get_rng_state(), torch.cuda.get_rng_state_all() if on_gpu else []]])
    states = {name: p if isinstance(p, dict) else bare(p).state_dict() for name, p in parts.items()}
    if MAIN:
        torch.save([made_with(parts), done, history, dice, states], memory := io.BytesIO())
        with aside(OUT / "checkpoint" / f"{stage}.pt") as part:
            part.write_bytes(memory.getbuffer())
    accelerator.wait_for_everyone()


def load_checkpoint(stage, **parts):
    """Restore parts, history and random numbers; returns the epochs done, 0 without a fitting checkpoint."""
    path = OUT / "checkpoint" / f"{stage}.pt"
    if not path.exists():
        return 0
    try:
        made, done, rows, dice, states = torch.load(path, map_location="cpu", weights_only=True)
        problem = "it has other parameters" if made != made_with(parts) else "" if RESUME else "RESUME is off"
    except Exception as error:
        problem = f"it is damaged ({type(error).__name__})"
    accelerator.wait_for_everyone()
    if problem:
        print(f"{path} is set aside and training starts anew: {problem}")
        MAIN and path.replace(path.with_suffix(".set-aside"))
        return 0
    parts |= {"scaler": accelerator.scaler} if accelerator.scaler else {}
    for name, part in parts.items():
        load = part.update if isinstance(part, dict) else bare(part).load_state_dict
        load(send_to_device(states[name], device) if isinstance(part, dict) else states[name])
    history[:], (cpu, gpus) = rows, dice[accelerator.process_index % len(dice)]
    torch.set_rng_state(cpu)
    torch.cuda.set_rng_state_all(gpus) if gpus else None
    print(f"{stage}: going on after {done} epochs from {path} (RESUME = False starts anew)")
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
        print(f"{text}  lr {settings['lr']:.0e}  {seconds:5.1f} s  {speed:9,.0f} images/s")


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
    for task in range(load_checkpoint(stage, model=model, method=memory, found=found), len(x)):
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
        print(f"{name}: strength {chosen[name]:g}{edge}, held-out accuracy {best:.1f}")
    else:
        chosen.setdefault(name, grid[0])
held_out = {name: float(np.nanmax(sweep[name].mean(0))) for name in settings["headline"]}
headline = max(held_out, key=held_out.get)
print(f"headline: {headline}, by held-out accuracy among {', '.join(settings['headline'])}")

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


table = {name: measures(matrix) for name, matrix in matrices.items()}
STAR = {name: "*" if issubclass(MAKE[name], (ER, Joint)) else "" for name in settings["methods"]}
several, width = len(SEEDS) > 1, 13 if len(SEEDS) > 1 else 11  # with the spread over the nets
print(f"{'':16}{'strength':>9}" + "".join(f"{name:>{width}}" for name in table[headline]))
for name, row in table.items():
    cells = [f"{value.mean():.1f}" + f" ± {value.std():.1f}" * several for value in row.values()]
    print(f"{name + STAR[name]:16}{chosen[name]:9g}" + "".join(f"{cell:>{width}}" for cell in cells))
print(f"* keeps old images: {settings['memory']} of each task (small, middle, all others), joint all")

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
    for name, row in table.items():
        entry = {measure: round(float(value.mean()), 4) for measure, value in row.items()}
        entry |= dict(strength=chosen[name], keeps_images=bool(STAR[name]))
        entry |= dict(curve=curves[name].round(4).tolist(), matrix=matrices[name].round(4).tolist())
        book["methods"][name] = entry
    with aside(path) as part:
        part.write_text(json.dumps(book, indent=1))


if MAIN:
    write_submission(submission)
    print(f"{submission}: {len(table)} methods, {TASKS * settings['epochs']} points a curve")
speeds = [row["examples_per_second"] for row in history]
summary = dict(valid_score=held_out[headline], headline=headline, chosen=chosen, parameters=theta.shape[1])
summary |= dict(examples_per_second=float(np.median(speeds)))
summary["test"] = {
    who: {key: float(value.mean()) for key, value in row.items()} for who, row in table.items()
}

# %% cellView="form" jupyter={"source_hidden": true} tags=["common:submit"]
# @title Submission: check it, score it, send it
score = None
if MAIN:
    try:
        check_submission(submission)  # raises Stop with what is wrong
    except Stop:
        submission.replace(f"{submission}.rejected")
        raise
    score = float(score_submission(submission, ANSWERS)) if ANSWERS or not FILES else None
    print(f"{submission} is valid, {METRIC}: {'only the judge knows' if score is None else round(score, 5)}")
    command = ["kaggle", "competitions", "submit", SLUG, "-f", str(submission), "-m", f"{HW} {LEVEL}"]
    if not REAL:
        print("It belongs to a sample run, nothing is sent: DATA = 'real' makes the file for the judge.")
    elif not SUBMIT or not SLUG:
        print(f"to send it: {' '.join(command)}\nor" * bool(SLUG), f"upload it at {JUDGE}")
    elif subprocess.call(command):
        raise Stop(f"Kaggle did not take {submission}; the file is complete, upload it at {JUDGE}")


def other_levels(here):
    """{level: its result}, simple first: `here` for this level, and the runs that stand beside this one."""
    paths = {level: OUT.parent / OUT.name.replace(LEVEL, level) / "result.json" for level in CHOICES["LEVEL"]}
    there = {level: json.loads(path.read_text()) for level, path in paths.items() if path.exists()}
    found = {level: one for level, one in there.items() if one["profile"] == PROFILE} | {LEVEL: here}
    return {level: found[level] for level in CHOICES["LEVEL"][::-1] if level in found}


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
metric_text += ", ".join(f"{name} {row['ACC'].mean():.1f}" for name, row in table.items())
metric_text += f""". A curve does not say which task suffers, the matrix does. {headline} (test images): """
metric_text += (
    ", ".join(f"task {j + 1} {value:.1f}" for j, value in enumerate(matrices[headline][-1].mean(1))) + "."
)
print(" ".join(metric_text.split()))

# %% [markdown] tags=["report"]
# **3. The MAS importance**: our code, and the proof on eight images, one backward pass for each of them
# alone. Then what the official way, gradients of batch means, finds of it on task 1; for EWC, too.


# %%
def length(out, y):
    return out.square().sum(2)


code = inspect.getsource(MAS.measure) + "\n" + inspect.getsource(per_image)
print(code)
probe = Nets([SEED]).to(device)
probe.load_state_dict({"theta": torch.tensor(theta[:1])})  # the headline's first net
fast, slow = per_image(probe, x_train[0, :8], y_train[:8], length, 1), 0
for image in x_train[0, :8]:
    slow += torch.autograd.grad(length(probe(look(image[None])), None).sum(), probe.theta)[0].abs() / 8
agree = ((fast - slow).norm() / slow.norm()).item()
print(f"8 images, one by one against at once: relative difference {agree:.1e}")
for name, goal, power in (("MAS", length, 1), ("EWC", cross_entropy, 2)):
    official, exact = (way(probe, x_train[0], y_train, goal, power).sum() for way in (per_batch, per_image))
    print(f"{name}: gradients of batch means find {(official / exact).item():.3f} of the importance")

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
for name, row in table.items():
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
    print(f"{what:15}{counts:50}" + "".join(f"{cell:>8}" for cell in cells))

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
    print("the sweep belongs to the levels strong and boss")

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
    print("no method of this level has an importance")

# %% [markdown] tags=["report"]
# **7. How large must a memory be?** ACC against the images kept of each task, beside the two bounds.

# %%
sizes = ["small", "middle", ""]
if all(f"{name} {size}".strip() in table for name in ("ER", "DER++") for size in sizes) and len(bounds) == 2:
    plt.figure(figsize=(6, 2.6))
    for name in ("ER", "DER++"):
        scores = [table[f"{name} {size}".strip()]["ACC"] for size in sizes]
        means, spread = [np.mean(one) for one in scores], [np.std(one) for one in scores]
        plt.errorbar(settings["memory"], means, spread, fmt="o-", capsize=3, label=name + "*")
    for name, color in (("finetune", "black"), ("joint", "grey")):
        plt.axhline(table[name]["ACC"].mean(), color=color, linestyle="--", label=name)
    plt.xscale("log")
    plt.xticks(settings["memory"], settings["memory"], minor=False)
    plt.minorticks_off()
    plt.xlabel("images kept of each task")
    plt.ylabel("ACC")
    plt.legend(fontsize=8, ncol=2)
    show("memory.png")
else:
    print("the memories belong to the boss level")

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
    print(f"{name:24}{speed[name]:12,.0f} images/s{speed[name] / speed['official way, one net']:8.1f} times")

# %% [markdown] tags=["report"]
# **The file to hand in**: curves, tables and answers in one zip.

# %%
import pandas as pd

hand_in, points, cells = OUT / "hand-in", [], []
for name in table:
    for (row, k), value in np.ndenumerate(curves[name].round(4)):
        points.append((name, SEEDS[k], row + 1, row // settings["epochs"] + 1, value))
    for (i, j, k), value in np.ndenumerate(matrices[name].round(4)):
        cells.append((name, SEEDS[k], i, j + 1, value))
points = pd.DataFrame(points, columns=["method", "seed", "epoch", "task_trained", "avg_acc_seen"])
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
    with aside(hand_in) as part:
        part.mkdir()
        points.to_csv(part / "metrics.csv", index=False)
        cells.to_csv(part / "matrix.csv", index=False)
        (part / "answers.md").write_text(answers_text)
        shutil.copy(OUT / "figures" / "acc_summary.png", part)
        shutil.copy(submission, part / "submission.json")
    with aside(OUT / "hand-in.zip") as part, zipfile.ZipFile(part, "w", zipfile.ZIP_DEFLATED) as pack:
        [pack.write(path, path.name) for path in sorted(hand_in.iterdir())]
    print(f"{OUT / 'hand-in.zip'}: {', '.join(path.name for path in sorted(hand_in.iterdir()))}")

# %% cellView="form" jupyter={"source_hidden": true} tags=["common:result"]
# @title Result
result = {"hw": HW, "level": LEVEL, "data": "real" if REAL else "sample", "profile": PROFILE, "seed": SEED}
result |= {"metric": METRIC, "score": score, **summary, "seconds": round(time.perf_counter() - START, 1)}
result |= {"device": machine, "torch": torch.__version__, "settings": settings}
if MAIN:
    import pandas as pd

    with aside(OUT / "history.csv") as part:
        pd.DataFrame(history).to_csv(part, index=False)
    with aside(OUT / "result.json") as part:
        part.write_text(json.dumps(result, indent=1, default=str))
print(f"submission: {submission}\nscore: {METRIC} {score}\nresult: {OUT / 'result.json'}")
