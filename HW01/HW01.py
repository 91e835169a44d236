# %% [markdown] tags=["header"]
# # HW01 · Regression: how many people have COVID-19 today?
#
# <!-- badges -->
# [![Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/ml2022-notebooks/ml2022-spring/blob/main/HW01/HW01.ipynb)
# [![Kaggle](https://kaggle.com/static/images/open-in-kaggle.svg)](https://kaggle.com/kernels/welcome?src=https://github.com/ml2022-notebooks/ml2022-spring/blob/main/HW01/HW01.ipynb)
# <!-- /badges -->
#
# Every day thousands of people in the United States tell a survey how they feel, what they do and whether a
# test was positive. One row of our data is one state on five days in a row; the positive rate of the
# **fifth day** is missing and has to be guessed. This is the first homework of the course, and the
# lecture's three steps are all there is to it: a **function** with unknown numbers in it, a **loss** that
# says how wrong it is, an **optimizer** that turns the numbers until the loss is small. What decides the
# score is what comes around the three steps: which columns the function sees, *what* it predicts, how it is
# kept from learning noise, and a validation that tells the truth.
#
# 每一列是美國一個州連續五天的問卷結果,請預測**第五天**的檢驗陽性率。這是課程的第一個作業,
# 只用到機器學習的三個步驟:找一個帶有未知參數的**函式**、定義**損失**、再**最佳化**。
# 分數的高低取決於三個步驟之外的事:看哪些欄位、預測什麼、如何避免學到雜訊,以及驗證集是否誠實。
#
# The ladder, measured on the built-in sample (mean squared error, lower is better; the mean of three seeds
# ± half their range), beside the course's public baselines on the real data:
#
# <!-- ladder -->
# | level | what it adds | sample | course baseline (real data) | seconds |
# |---|---|---|---|---|
# | simple | the official recipe: all 117 raw columns, SGD | 1.475 ± 0.202 | 2.28371 | 14 |
# | medium | four chosen columns, brought to one scale | 0.598 ± 0.082 | 1.4943 | 7 |
# | strong | 24 columns chosen by a test, the *change* as target, AdamW | 0.195 ± 0.027 | 1.05728 | 6 |
# | boss | weight decay by honest validation, more windows, 24 nets + ridge | 0.129 ± 0.000 | 0.86161 | 9 |
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
DATA_DIR = "data/HW01"  # @param {type:"string"}
OUT_DIR = "out/HW01"  # @param {type:"string"}
RESUME = True  # @param {type:"boolean"}
SUBMIT = False  # @param {type:"boolean"}
# this homework's own; 0 stands for the level's own number
EPOCHS = 0  # @param {type:"integer"}
BATCH_SIZE = 0  # @param {type:"integer"}
USE_TEST_WINDOWS = True  # @param {type:"boolean"}

# %% tags=["homework"]
HW, METRIC, HIGHER_IS_BETTER = "HW01", "mse", False
SLUG, JUDGE = "ml2022spring-hw1", "https://www.kaggle.com/competitions/ml2022spring-hw1"
BASELINES = {"simple": 2.28371, "medium": 1.49430, "strong": 1.05728, "boss": 0.86161}
FILES = {"train": ("covid*train*.csv", 1), "test": ("covid*test*.csv", 1)}  # how many the course has
DRIVE = "https://drive.usercontent.google.com/download?export=download&id="
TRAIN, TEST = "1kLSW_-cW2Huj7bh84YTdimGBOJaODiOS", "1iiI5qROrAhZn-o4FPqsE97bMzDEFvIdg"
COPY = "https://github.com/FortisCK/ML2022-Spring/raw/HEAD/HW01/"
MIRRORS = [  # {name here: address} of complete copies
    {"covid.train.csv": DRIVE + TRAIN, "covid.test.csv": DRIVE + TEST},
    {"covid.train.csv": COPY + "covid.train.csv", "covid.test.csv": COPY + "covid.test.csv"},
]
HASHES = {  # md5 of the course's files: train and test with LF, train and test with CRLF
    "82397623e4ca6421284746a94b41eb03",
    "f4226a424565760e4c40709fb526e9a5",
    "d4fb8462f55935039f5a1a65796e726f",
    "1d540c42eaaab2f9a3c876c3d6570b7a",
}
OWN = ["EPOCHS", "BATCH_SIZE", "USE_TEST_WINDOWS"]  # the parameters that only this homework has
NEEDS = {"accelerate": "accelerate", "kagglehub": "kagglehub", "sklearn": "scikit-learn"}
MIXED_PRECISION = False  # tiny nets, sums of squares: float32 everywhere
DAY = ["cli", "ili", "hh_cmnty_cli", "nohh_cmnty_cli"]  # COVID-like illness, in the family and around
DAY += ["wearing_mask", "travel_outside_state", "work_outside_home", "shop", "restaurant", "spent_time"]
DAY += ["large_event", "public_transit", "anxious", "depressed", "worried_finances", "tested_positive"]
STATES = "AL AK AZ AR CA CO CT FL GA ID IL IN IA KS KY LA MD MA MI "
STATES += "MN MS MO NE NV NJ NM NY NC OH OK OR RI SC TX UT VA WA"
COLUMNS = ["id", *STATES.split(), *DAY * 5]

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
# Two csv files. A row begins with `id` and 37 columns of zeros with a single one, the **state**. Then come
# **five days of 16 columns**: four about illness (`cli` and `ili` are COVID-like and flu-like illness),
# eight about behaviour, three about mood, and `tested_positive`. In the test file the very last column, day
# 5's `tested_positive`, is missing; the other 15 columns of day 5 are there. Three quirks to know:
#
# - the header repeats the 16 names five times: a column is known by its *day and name*, never by its name
#   alone;
# - `id` counts rows. It starts again at 0 in the test file, and the official sample still feeds it to the
#   net;
# - windows of one state overlap, so most day-5 values of the training file also stand in other rows as a
#   day 1 to 4.
#
# The folded cell below makes the sample: 37 states, an epidemic that grows and doubles towards the test
# rows, illness answers that share the day's chance with the tests but slowly change their meaning,
# behaviour that wanders. Like the real data, only smaller.


# %% cellView="form" jupyter={"source_hidden": true} tags=["sample"]
# @title The sample: a survey of 37 states in miniature
def make_sample(folder, answers):
    """Five-day windows of an epidemic that grows: the test rows come later and show twice the infections."""
    dice = np.random.default_rng(2022)
    states, steps, later = 37, *((24, 8) if PROFILE == "full" else (12, 4))
    days = 12 + 24 + 40 + 8
    t, week = np.arange(days), np.ones(7) / 7

    def noise(scale):
        return scale * dice.standard_normal((states, days))

    def mean7(x):  # the survey reports the mean of the last seven days
        return np.apply_along_axis(lambda row: np.convolve(np.r_[[row[0]] * 6, row], week, "valid"), 1, x)

    drift = noise(0.09)
    for d in range(1, days):
        drift[:, d] += 0.9 * drift[:, d - 1]
    own = dice.normal(0, 0.35, (states, 1))
    wave = np.sin(2 * np.pi * (t / 45 + dice.random((states, 1))))
    logit = -1.6 + own + 1.7 / (1 + np.exp(-(t - 0.55 * days) / 9)) + 0.5 * wave + drift
    rate = 32 / (1 + np.exp(-logit))
    raw = rate + noise(dice.gamma(3, 0.8, (states, 1)))  # what was tested on one day
    ill = 0.6 * raw + 0.4 * rate  # what people feel: it shares the chance of the day
    meaning = 1.05 - 0.1 / (1 + np.exp(-(t - 0.5 * days) / 5))  # later the same answers mean more infections
    illness = [(0.055, 0.4, 0.16), (0.056, 0.4, 0.16), (1.15, 4, 3.2), (0.95, 1, 2.8)]
    table = [mean7(a * meaning * ill + b + noise(c)) for a, b, c in illness]
    usual = [52, 16, 33, 66, 35, 45, 20, 4.7, 12, 10, 35], [12, 4, 3.5, 2.5, 4, 3.5, 3.5, 2, 2, 1.5, 3.5]
    for column, (mean, spread) in enumerate(zip(*usual)):  # behaviour and mood wander, with a trend
        walk = np.cumsum(noise(0.12), 1) + dice.normal(0, 0.7, (states, 1))
        trend = dice.normal(0, 1) * (t - 36) / days
        home = 0.3 * ill if 2 <= column <= 6 else 0  # who is ill does not go out
        table.append(mean + spread * (walk + trend) + mean7(noise(2) - home))
    table = np.stack([*table, mean7(raw).clip(0.2)], axis=-1)  # (states, days, 16)
    starts = {"train": 12 + 24 - steps + np.arange(steps), "test": 44 + 5 * np.arange(later)}
    for name, first in starts.items():
        rows = [(state, table[state, d : d + 5].ravel()) for state in range(states) for d in first]
        rows = [rows[k] for k in dice.permutation(len(rows))]
        cut = len(COLUMNS) - (name == "test")
        with open(folder / f"covid.{name}.csv", "w", newline="") as file:
            file.write(",".join(COLUMNS[:cut]) + "\n")
            for k, (state, values) in enumerate(rows):
                row = [str(k), *(str(int(s == state)) for s in range(states)), *(f"{v:.6f}" for v in values)]
                file.write(",".join(row[:cut]) + "\n")
    np.save(answers / "tested_positive.npy", [values[-1] for _, values in rows])


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
# Reading means checking. Other years' files have the same names and other columns, so the edition is told
# by the columns.

# %%
import pandas as pd


def read(path, width):
    """One csv -> ids (rows,), states (rows,), days (rows, 5, 16); what the test file lacks is nan."""
    advice = f"get the 2022 file from {JUDGE} or delete it. It begins with {path.read_bytes()[:80]}"
    try:
        frame = pd.read_csv(path, encoding="utf-8-sig")
    except ValueError as error:  # html, nothing, half a line
        raise Stop(f"{path} is not a table ({error}): {advice}") from None
    names = [name.split(".")[0] for name in frame.columns]  # pandas numbers repeated names: cli, cli.1, ...
    if names != COLUMNS[:width]:
        swapped = "train and test seem to be swapped: " if names in (COLUMNS, COLUMNS[:-1]) else ""
        raise Stop(
            f"{path} has {len(names)} columns where the 2022 edition has other {width}: {swapped}{advice}"
        )
    values = frame.apply(pd.to_numeric, errors="coerce").to_numpy(float)
    for row, column in np.argwhere(~np.isfinite(values))[:1]:
        raise Stop(
            f"{path}: row id {frame.iat[row, 0]} has no number in column {frame.columns[column]}: {advice}"
        )
    days = np.full((len(values), 80), np.nan)
    days[:, : width - 38] = values[:, 38:]
    return values[:, 0].astype(int), values[:, 1:38].argmax(1), days.reshape(-1, 5, 16)


train_id, train_state, train_days = read(PATHS["train"][0], 118)
test_id, test_state, test_days = read(PATHS["test"][0], 117)
if REAL and PROFILE == "tiny":
    train_id, train_state, train_days = train_id[:400], train_state[:400], train_days[:400]
print(f"train: {len(train_id)} rows x 118 columns, test: {len(test_id)} rows x 117 columns")

# %% [markdown]
# Look before you fit. Day 5's answers about illness, which we *are* given, say much about day 5's rate
# (left), and so does the rate of the day before (right).

# %%
fig, axes = plt.subplots(1, 2, figsize=(8, 2.6), sharey=True)
axes[0].plot(train_days[:, 4, 0], train_days[:, 4, 15], ".", markersize=2)
axes[0].set(xlabel="cli on day 5", ylabel="tested_positive on day 5")
axes[1].plot(train_days[:, 3, 15], train_days[:, 4, 15], ".", markersize=2)
axes[1].set(xlabel="tested_positive on day 4")
show("data.png")

# %% [markdown]
# But the test rows are not like the training rows: **they come later**, when more tests are positive (left,
# the rate of day 4, which is known in both). A model that has learned how high the rate usually is will be
# wrong, and even the relation between an answer and the rate may have moved (right). Keep that in mind when a
# validation score looks good.

# %%
fig, axes = plt.subplots(1, 2, figsize=(8, 2.6))
for name, part in (("train", train_days), ("test", test_days)):
    mean = part[:, 3, 15].mean()
    axes[0].hist(part[:, 3, 15], bins=40, density=True, alpha=0.6, label=f"{name}, mean {mean:.1f} %")
    axes[1].plot(part[:, 3, 0], part[:, 3, 15], ".", markersize=2, alpha=0.6, label=name)
axes[0].set(xlabel="tested_positive on day 4")
axes[1].set(xlabel="cli on day 4", ylabel="tested_positive on day 4")
axes[0].legend()
axes[1].legend(markerscale=5)
show("shift.png")

# %% [markdown]
# ## Windows and validation
#
# A **window** is everything known before one day's rate: that day's survey, and surveys and rates of the
# days before. It need not end on day 5. The window that ends on **day 4** has a known answer in *every*
# row, the test rows too. So the test rows can tell us, with nothing hidden used, how well a model does in
# the later period they come from: we call this the **day-4 check**.


# %%
def window(days, day, history):
    """What is known before the rate of `day` (0 to 4): its survey, and `history` days with their rates."""
    past = [max(day - k, 0) for k in range(1, history + 1)]  # there is no day before the first: it stands in
    return days[:, [day, *past], :15], days[:, past, 15]  # (rows, history + 1, 15), (rows, history)


# %% [markdown]
# Rows that share a day are pieces of one series, a **chain**. A random split puts neighbours of a
# validation row, with four of its five days, into the training part: the net has nearly seen the answer.
# Splitting by whole chains does not.

# %%
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components


def find_chains(days, state):
    """Number the chains: rows are linked when they hold the same day of the same state."""
    key = np.c_[np.repeat(state, 5), days[:, :, :15].reshape(-1, 15).round(4)]
    day = np.unique(key, axis=0, return_inverse=True)[1].ravel()
    row, size = np.repeat(np.arange(len(days)), 5), len(days) + day.max() + 1
    links = coo_matrix((np.ones(len(day)), (row, len(days) + day)), shape=(size, size))
    return connected_components(links, directed=False)[1][: len(days)]


chain = find_chains(np.concatenate([train_days, test_days]), np.concatenate([train_state, test_state]))
print(f"{len(np.unique(chain[: len(train_id)]))} chains in {len(train_id)} training rows")

# %% [markdown]
# ## The ladder
#
# One dictionary says what each level does. The rest of the notebook is the same for all of them.

# %% tags=["levels"]
PLAIN = dict(change=False, hidden=(16, 8), activation="relu", dropout=0.0, skip=False, split="random")
PLAIN |= dict(optimizer="SGD", batch_size=256, decay=(0.0,))
BETTER = dict(change=True, activation="silu", optimizer="AdamW", lr=2e-3, batch_size=64)
STRONG = dict(columns="best 24", hidden=(64, 32), dropout=0.3, skip=False, split="grouped", decay=(0.01,))
BOSS = dict(columns="differences", hidden=(64,), dropout=0.2, skip=True, split="day 4", members=24)
BOSS |= dict(lr=5e-3, batch_size=128)
LEVELS = {
    "simple": PLAIN | dict(columns="all raw", lr=1e-5, epochs=3000, patience=400),
    "medium": PLAIN | dict(columns="positive rates", lr=1e-3, epochs=600, patience=100),
    "strong": BETTER | STRONG | dict(epochs=150, patience=50),
    "boss": BETTER | BOSS | dict(epochs=40, patience=0, decay=(0.03, 0.1, 0.3, 1.0, 3.0, 10.0)),
}
settings = LEVELS[LEVEL]
if PROFILE == "tiny":
    settings |= dict(epochs=min(settings["epochs"], 20), members=4)  # the sample is smaller, too
settings |= dict(epochs=EPOCHS or settings["epochs"], batch_size=BATCH_SIZE or settings["batch_size"])
print(*(f"{name}: {value}" for name, value in settings.items()), sep=", ")

# %% [markdown]
# ## Features
#
# What the net sees, level by level. *Strong* ranks the 79 columns that are left without `id` and states by
# a test of each one alone, and keeps 24. The boss sees today's survey, yesterday's rate and how both
# *moved* from day to day: the same information as the raw days, but a penalty on large weights now pulls
# towards "it goes on as it was". No `id`, no state: they cannot help in a period that no training row comes
# from.

# %%
from sklearn.feature_selection import f_regression

SURVEY = DAY[:15]
BACK = ["today", "1 back", "2 back", "3 back", "4 back"]
ALL79 = [f"{name}, {back}" for back in BACK for name in SURVEY] + [f"positive, {back}" for back in BACK[1:]]


def all79(days, day):
    survey, positive = window(days, day, 4)
    return np.concatenate([survey.reshape(len(days), -1), positive], 1)  # (rows, 79)


strength = np.nan_to_num(f_regression(all79(train_days, 4), train_days[:, 4, 15])[0])
best24 = np.sort(np.argsort(-strength)[:24])


def features(ids, state, days, day):
    """The columns (rows, features) from which the rate of `day` is guessed."""
    if settings["columns"] == "all raw":  # simple: with id and state, as in the official sample
        return np.concatenate([ids[:, None], np.eye(37)[state], all79(days, day)], 1)
    if settings["columns"] == "positive rates":  # medium
        return all79(days, day)[:, -4:]
    if settings["columns"] == "best 24":  # strong
        return all79(days, day)[:, best24]
    survey, positive = window(days, day, 3)  # boss: today, and the moves of the days before
    moves = [(survey[:, :-1] - survey[:, 1:]).reshape(len(days), -1), positive[:, :-1] - positive[:, 1:]]
    return np.concatenate([survey[:, 0], positive[:, :1], *moves], 1)


# %% [markdown]
# Now the windows become one table. The training windows end on day 5. The day-4 windows of the test rows
# are there for the check. The boss also *learns* from day-4 windows, of the training rows and
# (`USE_TEST_WINDOWS`) of the test rows: they use only what is given, and they are the only examples from
# the later period. A window that stands there twice counts once.

# %%
ids, state = np.concatenate([train_id, test_id]), np.concatenate([train_state, test_state])
days = np.concatenate([train_days, test_days])
rows = np.concatenate([np.arange(len(train_id)), np.arange(len(days))])
day = np.repeat([4, 3], [len(train_id), len(days)])
twins = np.c_[state[rows], days[rows, day].round(4)]
once = np.sort(np.unique(twins, axis=0, return_index=True)[1])
rows, day = rows[once], day[once]
later = rows >= len(train_id)  # a window of a test row
learnable = (day == 4) | (LEVEL == "boss") & (~later | USE_TEST_WINDOWS)

at4, at5 = (features(ids, state, days, which) for which in (3, 4))
table = np.where(day[:, None] == 4, at5[rows], at4[rows])  # (windows, features)
rate, before = days[rows, day, 15], days[rows, day - 1, 15]
print(f"{len(table)} windows x {table.shape[1]} features, {learnable.sum()} to learn from")

# %% [markdown]
# Two decisions that cost nothing. **Scale**: every column to mean 0 and spread 1, else one large column
# (`id`!) forces a learning rate of 0.00001 on all of them. **Target**: from *strong* on the net guesses the
# *change* since the day before. The rate itself is much higher in the test rows, a net would have to
# extrapolate; changes look alike in both.

# %%
mean, spread = table[learnable].mean(0), table[learnable].std(0) + 1e-6  # 1e-6: for constant columns
if LEVEL == "simple":
    mean, spread = 0.0, 1.0
target = rate - before if settings["change"] else rate
x = torch.tensor((table - mean) / spread, dtype=torch.float32, device=device)  # (windows, features)
y = torch.tensor(target, dtype=torch.float32, device=device)
x_test = torch.tensor((at5[len(train_id) :] - mean) / spread, dtype=torch.float32, device=device)
base_test = test_days[:, 3, 15] if settings["change"] else np.zeros(len(test_id))

# %% [markdown]
# ## Three ways to validate
#
# *Random* rows, whole *chains*, and *day 4* of the test rows. Each split is a pair: windows to learn from,
# windows to check on. A third of the chains, or of the test rows, is held out at a time.


# %%
def make_splits():
    """{name: [(learn, check), ...]} as numbers of windows."""
    dice = np.random.default_rng(SEED)  # of their own: a resumed run splits alike
    third = dice.permutation(chain.max() + 1)[chain[rows]] % 3
    held = (dice.random(len(rows)) < 0.2) & ~later & (day == 4)
    number, splits = np.flatnonzero, {"random": [], "grouped": [], "day 4": []}
    splits["random"].append((number(learnable & ~held), number(held)))
    for k in range(3):
        check = (third == k) & ~later & (day == 4)
        splits["grouped"].append((number(learnable & ((third != k) | later)), number(check)))
        splits["day 4"].append((number(learnable & ~(later & (third == k))), number(later & (third == k))))
    return splits


splits = make_splits()

# %% [markdown]
# ## The net
#
# A plain multi-layer perceptron, $\hat y = W_2\,\sigma(W_1 x + b_1) + b_2$; one alone would be
# `nn.Sequential(nn.Linear(...), nn.ReLU(), ..., nn.Linear(..., 1))`. But a net this small leaves even one
# processor core bored, and we want many of them. So the weights of all nets are stacked, `(nets, in, out)`,
# and one batched matrix product moves them together. They share nothing but the clock. The boss adds a
# straight line from input to output: the net only has to learn what a linear model cannot say.

# %%
from itertools import pairwise

from torch import nn
from torch.nn import functional as F


class Members(nn.Module):
    """`members` small nets side by side: (members, batch, features) -> (members, batch)."""

    def __init__(self, members, inputs):
        super().__init__()
        sizes = [inputs, *settings["hidden"], 1]
        nets = [[nn.Linear(a, b) for a, b in pairwise(sizes)] for _ in range(members)]
        self.weights = nn.ParameterList(
            torch.stack([layer.weight.T for layer in same]) for same in zip(*nets)
        )
        self.biases = nn.ParameterList(
            torch.stack([layer.bias[None] for layer in same]) for same in zip(*nets)
        )
        self.skip = nn.Parameter(torch.zeros(members, inputs, 1)) if settings["skip"] else None  # boss

    def forward(self, x):
        straight = torch.bmm(x, self.skip) if self.skip is not None else 0
        activate = getattr(F, settings["activation"])
        for weight, bias in zip(self.weights[:-1], self.biases[:-1]):
            x = F.dropout(activate(torch.baddbmm(bias, x, weight)), settings["dropout"], self.training)
        return (torch.baddbmm(self.biases[-1], x, self.weights[-1]) + straight).squeeze(-1)


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
# Some helpers first: equally long lists of windows for all nets, the error of each net on its own check
# windows, and **early stopping** net by net (keep the weights of the best epoch). `shrink` is *weight
# decay*: after every step each weight gives up a share of itself. It is written out because every net has
# its own strength of it.


# %%
def rectangle(lists):
    """Lists of window numbers -> (members, longest); shorter ones begin again."""
    longest = max(len(numbers) for numbers in lists)
    return torch.tensor(np.stack([np.resize(numbers, longest) for numbers in lists]), device=device)


@torch.no_grad()
def evaluate(model, check):
    """The mean squared error of each net on its own windows (members,)."""
    model.eval()
    return (model(x[check]) - y[check]).square().mean(1)


@torch.no_grad()
def keep_best(best, error, model, epoch):
    better = error < best["error"]
    for name, weight in bare(model).state_dict().items():
        best[name] = torch.where(better.view(-1, 1, 1), weight, best.get(name, weight))
    best["error"] = torch.where(better, error, best["error"])
    best["epoch"] = torch.where(better, epoch, best["epoch"])


@torch.no_grad()
def shrink(model, lr, decay):
    for name, weight in bare(model).named_parameters():
        if "biases" not in name:
            weight.mul_(1 - lr * decay)  # (members, in, out) times (members, 1, 1)


# %% [markdown]
# Stochastic gradient descent as in the lecture, or AdamW with a rate that warms up and falls along a half
# cosine.


# %%
def make_training(members, steps):
    """Model, optimizer and schedule of one run of `steps` steps."""
    model = Members(members, x.shape[1])
    if settings["optimizer"] == "SGD":
        optimizer = torch.optim.SGD(model.parameters(), lr=settings["lr"], momentum=0.9)
        scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    else:  # strong
        optimizer = torch.optim.AdamW(model.parameters(), lr=settings["lr"], weight_decay=0, fused=True)
        warm = dict(pct_start=0.05, cycle_momentum=False)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, settings["lr"], total_steps=steps, **warm)
    model, optimizer = accelerator.prepare(model, optimizer)
    return model, optimizer, scheduler


def log(stage, epoch, loss, error, lr, seconds, examples):
    """A line for the reader, a row for the curves."""
    row = dict(stage=stage, epoch=epoch, loss=loss.nanmedian().item(), valid=error.nanmedian().item(), lr=lr)
    history.append(row | dict(seconds=seconds, examples_per_second=examples / seconds))
    text = f"{stage} {epoch:4d}  loss {row['loss']:.4f}  valid {row['valid']:.4f}  lr {lr:.1e}"
    print(f"{text}  {seconds:.1f} s  {examples / seconds:,.0f} examples/s")


# %% [markdown]
# The loop of the whole course: take a batch, forward, loss, backward, step. Everything lies on the device
# as one tensor, so a batch is just an index. The losses of the nets are added up; as they share no weight,
# each gets its own gradient.


# %% tags=["train"]
def train_members(stage, jobs):
    """Net m learns the windows jobs[m][0], is checked on jobs[m][1], and its weights decay by jobs[m][2]."""
    learn, check = (rectangle([job[k] for job in jobs]) for k in (0, 1))  # (members, windows)
    decay = torch.tensor([job[2] for job in jobs], device=device).view(-1, 1, 1)
    parts, epochs = accelerator.num_processes, settings["epochs"]  # each process takes every parts-th window
    share = learn.shape[1] // parts
    batch = max(1, settings["batch_size"] // parts)
    every = max(1, epochs // 10)
    model, optimizer, scheduler = make_training(len(jobs), epochs * -(-share // batch))
    best = {"error": torch.full((len(jobs),), torch.inf, device=device)}
    best["epoch"] = torch.zeros(len(jobs), dtype=torch.long, device=device)
    state = dict(model=model, optimizer=optimizer, scheduler=scheduler, best=best)
    done = load_checkpoint(stage, **state)
    tic, since = time.perf_counter(), done
    for epoch in tqdm(range(done + 1, epochs + 1), stage, disable=QUIET, leave=False):
        model.train()
        order = learn.gather(
            1, torch.rand(learn.shape, device=device).argsort(1)
        )  # every net shuffles for itself
        order = order[:, : share * parts][:, accelerator.process_index :: parts]
        total = torch.zeros(len(jobs), device=device)
        for numbers in order.split(batch, dim=1):
            loss = (model(x[numbers]) - y[numbers]).square().mean(1)  # (members,)
            optimizer.zero_grad()
            accelerator.backward(loss.sum())
            optimizer.step()
            scheduler.step()
            shrink(model, scheduler.get_last_lr()[0], decay)
            total += loss.detach() * numbers.shape[1] / share
        error = evaluate(model, check)
        keep_best(best, error, model, epoch)
        if settings["patience"] and bool((epoch - best["epoch"] >= settings["patience"]).all()):
            epochs = epoch  # no net has become better for long
        if epoch % every == 0 or epoch == epochs:
            now, lr = time.perf_counter(), scheduler.get_last_lr()[0]
            log(stage, epoch, total, error, lr, now - tic, (epoch - since) * share * parts * len(jobs))
            tic, since = now, epoch
            save_checkpoint(stage, settings["epochs"] if epoch == epochs else epoch, **state)
        if epoch == epochs:
            break
    if settings["patience"]:
        bare(model).load_state_dict({name: best[name] for name in bare(model).state_dict()})
    return model, torch.isfinite(evaluate(model, check))


# %% [markdown]
# Every process guesses its share of the rows, then all shares are gathered: the same answers on one
# processor or eight.


# %% tags=["predict"]
@torch.no_grad()
def predict(model, x):
    """(windows, features) -> guesses of every net (members, windows)."""
    model.eval()
    nets, parts, rank = len(bare(model).weights[0]), accelerator.num_processes, accelerator.process_index
    mine = torch.arange(-(-len(x) // parts) * parts, device=device).view(parts, -1)[rank] % len(x)
    guess = [model(part.expand(nets, -1, -1)).T for part in x[mine].split(512)]  # in parts: less memory
    return accelerator.gather(torch.cat(guess).contiguous())[: len(x)].T.cpu().numpy()


# %% [markdown]
# Up to *strong* two nets are trained: one on the random split, one on the grouped split. One of them
# predicts, the other one shows what the split does to the validation score.


# %%
def error_on(guess, numbers):
    """Mean squared error of guesses for some windows."""
    base = before[numbers] if settings["change"] else 0
    return float(np.mean((guess + base - rate[numbers]) ** 2))


scores = {"yesterday's rate": {}, "nets": {}}  # who -> {split: mean squared error}
for name, pairs in splits.items():
    error = (before - rate) ** 2
    scores["yesterday's rate"][name] = float(np.mean([error[check].mean() for _, check in pairs]))
if LEVEL != "boss":
    jobs = [(*splits[name][0], settings["decay"][0]) for name in ("random", "grouped")]
    model, alive = train_members("train", jobs)
    chosen = ["random", "grouped"].index(settings["split"])
    if not alive[chosen]:
        raise Stop(f"The training diverged with seed {SEED} (the loss became infinite): choose another SEED.")
    guess, members = predict(model, x), predict(model, x_test)[[chosen]]
    scores["nets"] = {
        name: error_on(guess[k, jobs[k][1]], jobs[k][1]) for k, name in enumerate(("random", "grouped"))
    }
    scores["nets"]["day 4"] = error_on(guess[chosen, later], np.flatnonzero(later))

# %% [markdown]
# The boss first asks the three validations which **weight decay** is right, all strengths and all splits in
# one batched run. Then it trains 24 nets with it, each on its own *bootstrap* (windows drawn with
# replacement), and a **ridge regression** on the same columns. Nets and ridge err differently; their mean
# is the prediction.

# %%
from sklearn.linear_model import RidgeCV

if LEVEL == "boss":
    trials = [
        (name, k, decay) for decay in settings["decay"] for name in splits for k in range(len(splits[name]))
    ]
    model, _ = train_members("select", [(*splits[name][k], decay) for name, k, decay in trials])
    guess = predict(model, x)
    sweep = {name: np.zeros(len(settings["decay"])) for name in splits}
    for m, (name, k, decay) in enumerate(trials):
        check = splits[name][k][1]
        sweep[name][settings["decay"].index(decay)] += error_on(guess[m, check], check) / len(splits[name])
    best_decay = settings["decay"][int(np.nanargmin(sweep["day 4"]))]
    print(f"weight decay {best_decay}, chosen by the day-4 check")


# %% [markdown]
# Now the two models and their mean are compared on all splits, each time on windows that they have not
# learned from. For the prediction the nets then learn from everything; the windows of test rows that a
# bootstrap happened to leave out are that net's own honest check.


# %%
def ridge(learn, wanted):
    """A linear model of the windows `learn`; its penalty is chosen by leave-one-out validation."""
    model = RidgeCV(np.logspace(0, 4, 17)).fit(x[learn].cpu().numpy(), target[learn])
    return model.predict(wanted.cpu().numpy())


if LEVEL == "boss":
    scores |= {"ridge": {}, "nets + ridge": {}}
    for name, pairs in splits.items():
        guesses = {
            "nets": [guess[trials.index((name, k, best_decay)), pair[1]] for k, pair in enumerate(pairs)]
        }
        guesses["ridge"] = [ridge(learn, x[check]) for learn, check in pairs]
        guesses["nets + ridge"] = [(a + b) / 2 for a, b in zip(guesses["nets"], guesses["ridge"])]
        for who, parts in guesses.items():
            scores[who][name] = float(np.mean([error_on(part, pair[1]) for part, pair in zip(parts, pairs)]))
    dice, pool = np.random.default_rng(SEED), np.flatnonzero(learnable)
    bags = [dice.choice(pool, len(pool)) for _ in range(settings["members"])]
    left_out = [np.setdiff1d(np.flatnonzero(later), bag) for bag in bags]  # an honest check for each net
    model, alive = train_members("train", [(bag, out, best_decay) for bag, out in zip(bags, left_out)])
    if not alive.any():
        raise Stop(f"All nets diverged with seed {SEED} (the loss became infinite): choose another SEED.")
    members = predict(model, x_test)[alive.cpu().numpy()]
    print(f"{alive.sum()} of {len(alive)} nets are used")

# %% [markdown]
# The prediction, and the three validations side by side. The last column is the closest to the task. At
# boss it also chose the weight decay, one of six, so there it is a little too good. Compare the last three
# rows: how much of the score do the nets add to a ridge regression on the same columns and windows?

# %%
prediction = members.mean(0)
if LEVEL == "boss":
    prediction = (prediction + ridge(np.flatnonzero(learnable), x_test)) / 2
prediction = (base_test + prediction).clip(0, 100)  # a rate is between 0 and 100 %
who = "nets + ridge" if LEVEL == "boss" else "nets"
print("validation    " + "".join(f"{name:>10}" for name in splits))
for name, row in scores.items():
    print(f"{name:16}" + "".join(f"{row[split]:10.4f}" for split in splits))
speeds = [row["examples_per_second"] for row in history]
summary = dict(
    valid_score=scores[who]["day 4"], validation=scores[who], examples_per_second=float(np.median(speeds))
)
summary |= dict(parameters=sum(weight.numel() for weight in model.parameters()))

# %% [markdown]
# The curves of all runs: loss on the windows learned from, error on the held-out ones.

# %%
stages = list(dict.fromkeys(row["stage"] for row in history))
fig, axes = plt.subplots(1, len(stages), figsize=(4 * len(stages), 2.6), squeeze=False)
for axis, stage in zip(axes[0], stages):
    lines = [row for row in history if row["stage"] == stage]
    for key in ("loss", "valid"):
        axis.plot([row["epoch"] for row in lines], [row[key] for row in lines], ".-", label=key)
    axis.set(xlabel="epoch", title=f"{stage}: median over the nets", ylim=(0, None))
    axis.legend()
axes[0, 0].set_ylabel("mean squared error")
show("curves.png")

# %% [markdown]
# ## Submission
#
# `id,tested_positive`, one line per test row. The file's ids travel with their predictions, so no order can
# get lost.

# %% tags=["submission"]
submission = OUT / ("pred.csv" if REAL else "pred.sample.csv")


def write_submission(path):
    with aside(path) as part, part.open("w", newline="") as file:
        file.write("id,tested_positive\n")
        file.writelines(f"{row},{value:.8g}\n" for row, value in zip(test_id, prediction))


def check_submission(path):
    """Raises Stop with what the judge would not take."""
    lines = path.read_bytes().decode().split("\n")
    fields = [line.split(",") for line in lines[1:-1]]
    if lines[0] != "id,tested_positive" or lines[-1]:
        raise Stop(f"{path} must begin with the line id,tested_positive and end with a line break")
    if [field[0] for field in fields] != [str(row) for row in test_id]:
        raise Stop(
            f"{path} must have the {len(test_id)} ids of the test file, in its order, and no empty line"
        )
    for row, value in fields:
        if not 0 <= float(value) <= 100:  # also false for nan
            raise Stop(f"{path}: id {row} has {value}, a rate lies between 0 and 100")


def score_submission(path, answers):
    """The judge: mean squared error against the hidden answers."""
    guess = np.loadtxt(path, delimiter=",", skiprows=1)[:, 1]
    return np.mean((guess - np.load(answers / "tested_positive.npy")) ** 2)


if MAIN:
    write_submission(submission)
    print(submission.read_text()[:60], "...")

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
# The homework has no graded report; the course asks its best three for their methods in 200 words. We ask
# six questions and answer them with the numbers of this run.
#
# **1. Which validation tells the truth?** The table above. Random rows flatter a model, because neighbours
# of the held-out rows are in the training part. Chains are stricter, but they come from the early period.
# The day-4 check looks at the period of the test rows. The dots are the levels that were run in this folder
# so far.


# %%
levels = other_levels({"validation": scores[who], "score": score})
fig, axis = plt.subplots(figsize=(8, 2.6))
for name in splits:
    axis.plot(
        list(levels), [one["validation"][name] for one in levels.values()], "o--", label=f"validation, {name}"
    )
if score is not None:
    axis.plot(
        list(levels), [one["score"] for one in levels.values()], "k*", markersize=11, label="hidden answers"
    )
axis.set(ylabel="mean squared error", yscale="log")
axis.legend()
show("validation.png")

# %% [markdown] tags=["report"]
# **2. Which columns matter?** `f_regression` tests each column alone against the rate. The columns right of
# the line would be dropped at *strong*, which keeps 24.

# %%
shown = np.argsort(-strength)[:32]
plt.figure(figsize=(8, 3))
plt.bar([ALL79[k] for k in shown], strength[shown], color=["C0"] * 24 + ["C7"] * 8)
plt.axvline(23.5, color="black")
plt.ylabel("f_regression score")
plt.xticks(rotation=90, fontsize=7)
show("features.png")

# %% [markdown] tags=["report"]
# **3. How much weight decay?** Too little and the nets learn noise, too much and they learn nothing. The
# splits need not agree on where the bottom is, so it matters which one is asked: the legend tells what each
# would choose, the black line what was chosen.

# %%
if LEVEL == "boss":
    plt.figure(figsize=(8, 2.6))
    for name, line in sweep.items():
        plt.plot(
            settings["decay"],
            line,
            "o-",
            label=f"{name}: best at {settings['decay'][int(np.nanargmin(line))]}",
        )
    plt.axvline(best_decay, color="black", linewidth=0.8)
    plt.xscale("log")
    plt.xlabel("weight decay")
    plt.ylabel("mean squared error")
    plt.legend()
    show("sweep.png")
else:
    print("the sweep belongs to the boss level")

# %% [markdown] tags=["report"]
# **4. Where is it wrong?** Left: the day-4 windows of the test rows, each guessed by nets that had not
# learned from it. Right: the ten states with the largest mean error there.

# %%
if LEVEL == "boss":
    held = np.zeros(len(rows))
    for k, (_, check) in enumerate(splits["day 4"]):
        held[check] = guess[trials.index(("day 4", k, best_decay)), check]
else:
    held = guess[chosen]
held = (held + before if settings["change"] else held)[later]
miss = np.abs(held - rate[later])
fig, axes = plt.subplots(1, 2, figsize=(8, 2.8))
axes[0].plot(rate[later], held, ".", markersize=3)
axes[0].axline((10, 10), slope=1, color="black", linewidth=0.8)
axes[0].set(xlabel="true rate of day 4", ylabel="guess")
by_state = {STATES.split()[k]: miss[state[rows[later]] == k].mean() for k in np.unique(state[rows[later]])}
worst = sorted(by_state, key=by_state.get)[-10:]
axes[1].bar(worst, [by_state[name] for name in worst])
axes[1].set(ylabel="mean absolute error", title=f"all states: {miss.mean():.2f}")
show("errors.png")

# %% [markdown] tags=["report"]
# **5. What is a `DataLoader` worth here?** One epoch over the training rows, the official way (a `Dataset`
# that returns one row, a `DataLoader` that collates 256 of them) and ours (an index into one tensor), with
# the same small net and no training step: this is the loading alone.

# %%
from torch.utils.data import DataLoader, TensorDataset


def seconds_for(batches):
    times = []
    for _ in range(5):
        tic = time.perf_counter()
        for _ in batches():
            pass
        times.append(time.perf_counter() - tic)
    return float(np.median(times))


loader = DataLoader(TensorDataset(x.cpu(), y.cpu()), batch_size=256, shuffle=True)
slow = seconds_for(lambda: loader)
fast = seconds_for(lambda: ((x[rows], y[rows]) for rows in torch.randperm(len(x), device=device).split(256)))
print(f"{len(x) / slow:12,.0f} rows/s through Dataset and DataLoader")
print(f"{len(x) / fast:12,.0f} rows/s by index, {slow / fast:.0f} times as many")

# %% [markdown] tags=["report"]
# **6. The method in 200 words.**

# %%
text = f"""Level {LEVEL} on the {"real" if REAL else "sample"} data. The nets see {table.shape[1]} features
({settings["columns"]}) and guess {"the change of the rate" if settings["change"] else "the rate itself"};
hidden layers of {" and ".join(map(str, settings["hidden"]))} units ({settings["activation"]}, dropout
{settings["dropout"]}), {settings["optimizer"]} with learning rate {settings["lr"]}, batches of
{settings["batch_size"]}, at most {settings["epochs"]} epochs. """
if LEVEL == "boss":
    text += f"""They learn from windows that end on day 5 and on day 4, day-4 windows of the test rows
{"included" if USE_TEST_WINDOWS else "left out"}. Weight decay {best_decay} was chosen among
{settings["decay"]} by the day-4 check. The prediction is the mean of {len(members)} nets, each on a
bootstrap, averaged with a ridge regression. """
text += f"""Mean squared error in validation: random rows {scores[who]["random"]:.3f}, whole chains
{scores[who]["grouped"]:.3f}, day-4 check {scores[who]["day 4"]:.3f}, where repeating yesterday's rate has
{scores["yesterday's rate"]["day 4"]:.3f}. """
if score is not None:
    text += f"On the hidden answers of the sample: {score:.3f}."
print(" ".join(text.split()))

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
