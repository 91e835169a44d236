# %% [markdown] tags=["header"]
# # HW02 · Classification: which phoneme is spoken in this frame?
#
# <!-- badges -->
# [![Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/ml2022-notebooks/ml2022-spring/blob/main/HW02/HW02.ipynb)
# [![Kaggle](https://kaggle.com/static/images/open-in-kaggle.svg)](https://kaggle.com/kernels/welcome?src=https://github.com/ml2022-notebooks/ml2022-spring/blob/main/HW02/HW02.ipynb)
# <!-- /badges -->
#
# Speech is cut into **frames**: 25 milliseconds of sound, one every 10 milliseconds, each described by 39
# numbers (MFCC). For every frame, say which of 41 phonemes is spoken. One frame alone is too short to tell;
# its neighbours help, and the whole sentence helps more. On the way from one frame to the sentence we meet
# what the lecture teaches about training that fails: model bias, optimization, over-fitting, and what each
# of them asks for. The last step leaves windows behind and reads **whole utterances** with a recurrent net.
#
# 語音被切成一個個**音框**(每 10 毫秒一個,以 39 維 MFCC 表示),請判斷每個音框屬於 41 個音素中的哪一個。
# 單看一個音框太短,要看前後文。從單一音框到整句話,我們會遇到課堂上談的問題:模型偏差、最佳化失敗、
# 過度擬合,以及各自的對策。最後一步不再切視窗,而是用循環神經網路讀**整段語音**。
#
# The ladder, measured on the built-in sample (accuracy over all test frames, higher is better; the mean of
# three seeds ± half their range), beside the course's public baselines on the real data:
#
# <!-- ladder -->
# | level | what it adds | sample | course baseline (real data) | seconds |
# |---|---|---|---|---|
# | simple | the official recipe: one frame, two small layers | 0.316 ± 0.002 | 0.45797 | 7 |
# | medium | frames side by side, more layers, one-cycle rate | 0.542 ± 0.001 | 0.69747 | 6 |
# | strong | wider context, batch norm, dropout, averaged weights | 0.683 ± 0.001 | 0.75028 | 21 |
# | boss | whole utterances: recurrent nets, augmentation, Viterbi | 0.779 ± 0.006 | 0.82324 | 146 |
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
DATA_DIR = "data/HW02"  # @param {type:"string"}
OUT_DIR = "out/HW02"  # @param {type:"string"}
RESUME = True  # @param {type:"boolean"}
SUBMIT = False  # @param {type:"boolean"}
# this homework's own; 0 stands for the level's own number; REPORT: the boss runs the report's experiments
EPOCHS = 0  # @param {type:"integer"}
BATCH_SIZE = 0  # @param {type:"integer"}
REPORT = True  # @param {type:"boolean"}

# %% tags=["homework"]
HW, METRIC, HIGHER_IS_BETTER = "HW02", "accuracy", True
SLUG, JUDGE = "ml2022spring-hw2", "https://www.kaggle.com/competitions/ml2022spring-hw2"
BASELINES = {"simple": 0.45797, "medium": 0.69747, "strong": 0.75028, "boss": 0.82324}
FILES = {"train_split": ("train_split.txt", 1), "train_labels": ("train_labels.txt", 1)}
FILES |= {"test_split": ("test_split.txt", 1)}  # how many the course has
FILES |= {"train": ("feat/train/*.pt", 4286), "test": ("feat/test/*.pt", 1078)}
DRIVE = "https://drive.usercontent.google.com/download?export=download&confirm=t&id="
COPIES = [
    "https://github.com/xraychen/shiny-robot/releases/download/v1.0/libriphone.zip",
    DRIVE + "1o6Ag-G3qItSmYhTheX6DYiuyNzWyHyTc",
    DRIVE + "1R1uQYi4QpX0tBfUWt2mbZcncdBsJkxeW",
    "https://www.dropbox.com/s/wqww8c5dbrl2ka9/libriphone.zip?dl=1",
    "https://www.dropbox.com/s/p2ljbtb2bam13in/libriphone.zip?dl=1",
    "https://github.com/faterazer/LibriSpeech-Phoneme-Classification/archive/HEAD.zip",
]
MIRRORS = [{"libriphone.zip": address} for address in COPIES]  # {name here: address} of complete copies
HASHES = set()  # none of the course's own is known
OWN = ["EPOCHS", "BATCH_SIZE", "REPORT"]  # the parameters that only this homework has
NEEDS = {"accelerate": "accelerate", "kagglehub": "kagglehub"}
MIXED_PRECISION = True
CLASSES, FRAMES = 41, {"train": 2_644_158, "test": 646_268}  # the course's frames

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
# `libriphone/` holds two lists of utterances (`train_split.txt`, `test_split.txt`), the classes
# (`train_labels.txt`: the utterance's name, then one number a frame) and one file an utterance,
# `feat/train/NAME.pt`, a tensor of (frames, 39). Five things to know:
#
# - a name is `speaker-chapter-utterance`. Nearly all test speakers and chapters also occur in training, so a
#   random split *by utterance* is fair. A random split *by frame* is not: a frame's neighbours say nearly the
#   same;
# - the answer file wants all test frames, in the order of `test_split.txt`, which is **not sorted**;
# - the lists end without a line break, the last name counts all the same;
# - every utterance is already scaled to mean 0 and spread 1 in each column;
# - copies with damaged files go around.
#
# The folded cell below makes the sample, in the same layout: 20 speakers say sentences of 48 invented words.
# A word is 3 to 7 phonemes, the phonemes come in pairs of *near twins*, every phoneme lasts some frames,
# moves while it lasts and blurs into its neighbours. One noisy frame says little; a window shows the
# movement; only who has learned the words can tell the twins apart.


# %% cellView="form" jupyter={"source_hidden": true} tags=["sample"]
# @title The sample: 20 speakers, 48 words, 40 phonemes and silence
def make_sample(folder, answers):
    """Utterances of invented words in the layout of libriphone; the test frames' classes go to `answers`."""
    dice = np.random.default_rng(2022)
    normal = dice.standard_normal
    counts = {"train": 240, "test": 60} if PROFILE == "full" else {"train": 48, "test": 16}
    twins = np.repeat(normal((20, 13)), 2, axis=0) + 0.25 * normal((40, 13))
    target = np.concatenate([normal((1, 13)) - 1, twins])  # (41, 13); class 0 is silence
    slope, usual = 0.8 * normal((41, 13)), dice.uniform(5, 11, 41)  # movement, mean length in frames
    words = [dice.integers(1, 41, dice.integers(3, 8)) for _ in range(48)]
    common = 1 / np.arange(6, 54)  # the first word is said nine times as often as the last
    accents = [(np.eye(13) + 0.06 * normal((13, 13)), 0.4 * normal(13)) for _ in range(20)]
    rates, numbers = dice.uniform(0.85, 1.2, 20), dice.choice(np.arange(100, 9000), 20, replace=False)

    def speak(rate):
        """The classes of one utterance (T,), and where in its segment each frame lies, -0.5 to 0.5."""
        phones = [0]
        for word in dice.choice(48, dice.integers(4, 8), p=common / common.sum()):
            phones += [*words[word], *[0] * (dice.random() < 0.35)]
        phones = np.array(phones if phones[-1] == 0 else [*phones, 0])
        times = np.maximum(3, dice.gamma(8, usual[phones] * rate / 8).round()).astype(int)
        times[[0, -1]] = dice.integers(5, 11, 2)
        place = np.concatenate([(np.arange(n) + 0.5) / n - 0.5 for n in times])
        return np.repeat(phones, times), place

    def record(classes, place, accent):
        """Classes -> 39 columns (T, 39), blurred, noisy, with the speaker's accent, scaled by utterance."""
        track = target[classes] + slope[classes] * place[:, None]
        track = np.pad(track, ((2, 2), (0, 0)), mode="edge")
        track = sum(track[k : k + len(classes)] for k in range(5)) / 5  # the mouth moves slowly
        noise = normal((len(classes) + 1, 13))
        x = track @ accent[0] + accent[1] + 1.8 * (0.954 * noise[1:] + 0.3 * noise[:-1])
        x = np.concatenate([x, np.gradient(x, axis=1), np.gradient(np.gradient(x, axis=1), axis=1)], axis=1)
        return (x - x.mean(0)) / x.std(0, ddof=1)

    root, hidden = folder / "libriphone", []
    for part, count in counts.items():
        (root / "feat" / part).mkdir(parents=True)
        names, lines = [], []
        for k in range(count):
            speaker = dice.integers(20)
            classes, place = speak(rates[speaker])
            name = f"{numbers[speaker]}-{dice.integers(100000, 200000)}-{k:04d}"
            x = torch.tensor(record(classes, place, accents[speaker]), dtype=torch.float32)
            torch.save(x, root / "feat" / part / f"{name}.pt")
            names.append(name)
            lines.append(" ".join([name, *map(str, classes)]))
            hidden += [classes] * (part == "test")
        (root / f"{part}_split.txt").write_text("\n".join(names))
        if part == "train":
            (root / "train_labels.txt").write_text("\n".join(lines))
    np.save(answers / "classes.npy", np.concatenate(hidden).astype(np.uint8))


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
# Reading means checking: lists, classes and files must fit together to the frame. Nothing is ever cut to
# fit; a classifier that learns from shifted labels gives no error, only a bad score.


# %%
def read_split(part):
    """The utterances of a split in its order; every one must have its file, every file its line."""
    split, folder = PATHS[f"{part}_split"][0], PATHS[part][0].parent
    names, files = split.read_text().split(), {path.stem for path in PATHS[part]}
    for name in names:
        if name not in files:
            raise Stop(f"{folder / name}.pt is missing, {split} lists it: the copy is torn, fetch it again.")
    for name in sorted(files - {*names}):
        raise Stop(f"{folder / name}.pt has no line in {split}: fetch the list again or remove the file.")
    if len(names) != len({*names}):
        raise Stop(f"{split} lists {max(names, key=names.count)} more than once: fetch it again.")
    return names


def read_labels(path, names):
    """The classes of every utterance in `names`, one array (T,) each."""
    labels = {}
    for line in path.read_text().splitlines():
        name, *classes = line.split() or [""]
        try:
            labels[name] = np.array(classes, dtype=np.int64)
        except ValueError:
            raise Stop(f"{path}: utterance {name} has a class that is no number; fetch it again.") from None
        if len(classes) and not 0 <= labels[name].min() <= labels[name].max() < CLASSES:
            raise Stop(f"{path}: utterance {name} has a class outside 0 to {CLASSES - 1}; fetch it again.")
    for name in [name for name in names if name not in labels]:
        raise Stop(f"{path} has no line for utterance {name}: it is cut short or of another copy.")
    return [labels[name].astype(np.uint8) for name in names]


# %% [markdown]
# A `.pt` file may be cut short, or hold values like $10^{38}$. A damaged training utterance is dropped, or
# clamped where less than 1 % of it is wild. A test utterance must be answered, so only what cannot be read
# at all stops the run: nobody knows how many frames it has.


# %%
WILD = 30  # healthy values are below 8


def read_file(path):
    """One file -> its frames (T, 39) or None, how much of it is damaged (0 to 1), and a remark on that."""
    try:
        x = torch.load(path, weights_only=True).float()
    except Exception as error:
        return None, 1, f"{path} ({path.stat().st_size} bytes) cannot be read: {type(error).__name__}"
    if x.ndim != 2 or x.shape[1] != 39 or not len(x):
        x = torch.zeros(len(x), 39) if x.ndim == 2 and len(x) else None
        return x, 1, f"{path} does not hold a tensor of (frames, 39)"
    wild = ~(x.abs() <= WILD)  # also true for nan
    share = float(wild.float().mean())
    if not share:
        return x, 0, ""
    return x.nan_to_num(0).clamp(-WILD, WILD), share, f"{path} has {int(wild.sum())} wild values, clamped"


def check_file(part, name, truth, x, share, remark):
    """What becomes of an utterance: (use it, the remark to print); a Stop where nothing can be done."""
    if x is None and part == "test":
        raise Stop(f"{remark}. Its frames must be answered: fetch the file again, see {JUDGE}.")
    if truth is not None and x is not None and len(x) != len(truth):
        labels = PATHS["train_labels"][0]
        raise Stop(f"Utterance {name} has {len(x)} frames, but {len(truth)} classes in {labels}: fetch both.")
    drop = part == "train" and share >= 0.01
    return not drop, remark + ", utterance dropped" * drop


# %% [markdown]
# One more look before reading all: columns 14 to 39 look like the time derivatives that usually stand there,
# but they run along the *coefficients*. In a healthy file they are linear combinations of the first 13
# columns of the same frame, so they say nothing new. We test that by least squares; where it holds, 13
# columns stay: a third of the memory and of the first layer's work. (The official recipe keeps all 39, so
# does *simple*.)


# %%
def unexplained(x):
    """The largest error of columns 14 to 39 as linear combinations of columns 1 to 13."""
    base, rest = x[:, :13].double(), x[:, 13:].double()
    return float((base @ torch.linalg.lstsq(base, rest).solution - rest).abs().max())


some = [read_file(PATHS["train"][k]) for k in np.linspace(0, len(PATHS["train"]) - 1, 16).astype(int)]
rest = max((unexplained(x) for x, share, _ in some if not share and len(x) > 39), default=np.inf)
COLUMNS = 13 if rest < 1e-3 and LEVEL != "simple" else 39
print(f"columns 14 to 39 differ from combinations of the first 13 by at most {rest:.1e}: {COLUMNS} are kept")


# %% [markdown]
# All frames become **one tensor**, utterance after utterance, training first, and `offsets` says where each
# begins. It stays on the device, serves every level, and replaces a `Dataset`: a batch is an index. Files
# are read by eight threads, once; later runs find one cache file.


# %%
def read_all():
    """Every utterance of both splits, checked -> arrays of one cache file."""
    kept = dict(frames=[], classes=[], lengths=[], train=[], remarks=[])
    for part in ("train", "test"):
        names = read_split(part)
        names = names[:48] if REAL and PROFILE == "tiny" and part == "train" else names
        truths = [None] * len(names)
        if part == "train":
            truths = read_labels(PATHS["train_labels"][0], names)
        folder = PATHS[part][0].parent

        def read(name, truth, part=part, folder=folder):
            x, share, remark = read_file(folder / f"{name}.pt")
            use, remark = check_file(part, name, truth, x, share, remark)
            return x[:, :COLUMNS].numpy().copy() if use else None, remark

        with ThreadPoolExecutor(8) as pool:
            for (x, remark), truth in zip(pool.map(read, names, truths), truths):
                kept["remarks"] += [remark] if remark else []
                if x is not None:
                    kept["frames"].append(x)
                    kept["classes"].append(np.full(len(x), 255, np.uint8) if truth is None else truth)
                    kept["lengths"].append(len(x))
                    kept["train"].append(part == "train")
        if part == "train" and len(kept["train"]) < 0.9 * len(names):
            count = f"{len(names) - len(kept['train'])} of {len(names)}"
            raise Stop(f"{count} files in {folder} are damaged: fetch them again. {kept['remarks'][0]}")
    return kept | {key: np.concatenate(kept[key]) for key in ("frames", "classes")}


# %% [markdown]
# The cache is known by the names, sizes and times of all files: change one and all are read again. Class 255
# stands for "unknown", in the test part.

# %%
stamp = [(path.name, path.stat().st_size, path.stat().st_mtime) for hits in PATHS.values() for path in hits]
stamp = hashlib.md5(json.dumps([stamp, COLUMNS, PROFILE]).encode()).hexdigest()
cache = OUT.parent / f"features-{stamp[:12]}.npz"
if MAIN and not cache.exists():
    with aside(cache) as part, part.open("wb") as file:
        np.savez(file, **read_all())
accelerator.wait_for_everyone()
stored = np.load(cache, allow_pickle=False)
print(*stored["remarks"], sep="\n", end="\n" * len(stored["remarks"]))
flat = torch.from_numpy(stored["frames"]).to(device)  # (all frames, columns)
classes = torch.from_numpy(stored["classes"]).to(device)  # (all frames,); 255: unknown
lengths = torch.from_numpy(stored["lengths"]).to(device)  # (utterances,)
offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
TRAIN = int(stored["train"].sum())  # the utterances from here on are the test part
for part, numbers in {"train": slice(0, TRAIN), "test": slice(TRAIN, None)}.items():
    count = int(lengths[numbers].sum())
    print(f"{part}: {len(lengths[numbers])} utterances, {count:,} frames (course: {FRAMES[part]:,})")
    if REAL and PROFILE == "full" and count != FRAMES[part]:
        print(f"NOTE: these are not the {FRAMES[part]:,} frames of the 2022 course: another edition?")

# %% [markdown]
# Look before you fit: the first seconds of an utterance. Above its 13 coefficients over time, below the
# phoneme of each frame. A phoneme is a *segment* of several frames, and what a frame looks like depends on
# its neighbours.


# %%
COLORS = plt.cm.hsv(np.linspace(0, 0.95, CLASSES))[np.random.default_rng(3).permutation(CLASSES)]
COLORS = 0.35 + 0.65 * COLORS  # paler: the numbers stay legible
COLORS[0] = (0.9, 0.9, 0.9, 1)  # silence


def strip(axis, row, name):
    """A band of colours with the class number in each segment that is wide enough."""
    axis.imshow(COLORS[row][None], aspect="auto", interpolation="nearest")
    starts = np.flatnonzero(np.diff(row, prepend=-1))
    for start, end in zip(starts, [*starts[1:], len(row)]):
        if end - start >= 4:
            axis.text((start + end - 1) / 2, 0, row[start], ha="center", va="center", fontsize=7)
    axis.set(yticks=[0], yticklabels=[name])


first = slice(0, min(200, int(lengths[0])))
fig, axes = plt.subplots(2, 1, figsize=(8, 2.8), sharex=True, height_ratios=[4, 1])
axes[0].imshow(flat[first, :13].T.cpu(), aspect="auto", origin="lower", cmap="magma", vmin=-3, vmax=3)
axes[0].set(ylabel="coefficient")
strip(axes[1], classes[first].cpu().numpy().astype(int), "class")
axes[1].set(xlabel="frame (10 ms)")
show("data.png")

# %% [markdown]
# Some utterances are held out for validation: whole ones, never single frames.

# %% tags=["levels"]
PLAIN = dict(net="MLP", frames=1, layers=1, width=256, strong=False, dropout=0.0, lr=1e-4, decay=0.01)
PLAIN |= dict(cycle=False, smoothing=0.0, ema=0.0, batch_size=512, epochs=5, held=0.05)
CYCLE = dict(cycle=True, batch_size=2048, lr=1e-3)  # one-cycle rate
STRONG = dict(strong=True, decay=0.02, smoothing=0.05)
BOSS = dict(cycle=True, decay=0.02, smoothing=0.05, ema=0.9995, batch_size=40, epochs=60, lr=2e-3)
BOSS |= dict(noise=0.1, speed=0.1, time_mask=25, column_mask=2, held=0.05)
RNN = dict(layers=5, width=384, front=256, dropout=0.4)
CONFORMER = dict(net="conformer", layers=10, width=256, heads=4, kernel=31, dropout=0.2, skip=0.1, lr=1e-3)
LEVELS = {  # the full settings, for the real data on a GPU
    "simple": PLAIN,
    "medium": PLAIN | CYCLE | dict(frames=19, layers=2, width=1024, epochs=8),
    "strong": PLAIN | CYCLE | STRONG | dict(frames=31, layers=3, width=2048, dropout=0.4, ema=0.999)
    | dict(batch_size=4096, lr=2e-3, epochs=40),
    "boss": BOSS | dict(report=dict(frames=19, width=1024, batch_size=2048, epochs=8))
    | dict(members=[dict(net="LSTM") | RNN, dict(net="GRU") | RNN, CONFORMER]),
}  # fmt: skip
SMALL = {  # the sample has a fortieth of the frames
    "simple": dict(lr=1e-3, epochs=4),
    "medium": dict(frames=5, width=192, batch_size=512, lr=2e-3, epochs=4),
    "strong": dict(frames=21, width=320, layers=2, batch_size=512, dropout=0.5, ema=0.98, epochs=7),
    "boss": dict(batch_size=16, ema=0.97, epochs=14, lr=5e-3, time_mask=10)
    | dict(report=dict(frames=11, width=128, batch_size=512, epochs=10))
    | dict(members=[dict(net="LSTM", layers=2, width=96, front=96, dropout=0.3)] * 2),
}  # fmt: skip
TINY = {"simple": {}, "medium": dict(width=64), "strong": dict(width=64)}
TINY["boss"] = dict(batch_size=8, epochs=3, ema=0.5)
TINY["boss"] |= dict(report=dict(frames=5, width=32, batch_size=512, epochs=1))
TINY["boss"] |= dict(members=[dict(net="LSTM", layers=1, width=32, front=32, dropout=0.0)])
TINY["boss"]["members"] += [CONFORMER | dict(layers=1, width=32, heads=2, kernel=7, lr=5e-3)]
settings = LEVELS[LEVEL] | ({} if REAL else dict(held=0.125) | SMALL[LEVEL])
settings |= TINY[LEVEL] | dict(held=0.125) if PROFILE == "tiny" else {}
settings |= dict(epochs=EPOCHS or settings["epochs"], batch_size=BATCH_SIZE or settings["batch_size"])
members = [settings | member for member in settings.get("members", [{}])]
print(*(f"{name}: {value}" for name, value in settings.items()), sep=", ")

order = np.random.default_rng(SEED).permutation(TRAIN)
held = max(1, round(settings["held"] * TRAIN))
valid, learn, test = (np.sort(order[:held]), np.sort(order[held:]), np.arange(TRAIN, len(lengths)))
valid, learn, test = (torch.from_numpy(numbers).to(device) for numbers in (valid, learn, test))
print(f"{len(learn)} utterances to learn from, {len(valid)} to check on")

# %% [markdown]
# ## Windows
#
# The medium level puts a frame's neighbours beside it: $n$ frames, the wanted one in the middle. The
# official way writes that matrix out, and at $n = 19$ every number stands in it 19 times: 8.9 GB for the
# real data. Here a window is made when its batch needs it, by **one gather**: the index of the frame plus
# $-9 \dots 9$, clamped to the utterance it belongs to. At the borders the first or last frame repeats.


# %%
owner = torch.repeat_interleave(torch.arange(len(lengths), device=device), lengths)  # (all frames,)


def windows(frames, n):
    """The n frames around each of `frames` (batch,), side by side: (batch, n * columns)."""
    around = frames[:, None] + torch.arange(-(n // 2), n // 2 + 1, device=flat.device)
    low, high = offsets[owner[frames]], offsets[owner[frames] + 1] - 1
    return flat[around.clamp(low[:, None], high[:, None])].flatten(1)


def frames_of(utterances):
    """The numbers of all their frames: utterance after utterance, frame after frame."""
    size = lengths[utterances]
    start = torch.repeat_interleave(offsets[utterances] - (size.cumsum(0) - size), size)
    return start + torch.arange(len(start), device=flat.device)


# %% [markdown]
# ## Whole utterances
#
# At boss a batch is a rectangle of utterances of *about* equal length; the shorter ones are padded, and the
# padding is told apart by class -100, which the loss ignores. The 13 columns get company: their true time
# derivatives $\Delta_t = (x_{t+1} - x_{t-1}) / 2$ and $\Delta\Delta$, which the files do not hold.
#
# Training never sees an utterance twice in the same form. It is spoken up to 10 % faster or slower (features
# interpolated, classes from the nearest frame), stretches of time and single coefficients are blanked, noise
# is added. All of it happens for the whole batch at once, on the device.


# %%
def delta(x):
    """Half the difference of both neighbours in time: (batch, time, columns), the border frames repeat."""
    x = torch.cat([x[:, :1], x, x[:, -1:]], 1)
    return (x[:, 2:] - x[:, :-2]) / 2


def blank(x, dim, size):
    """In each utterance, a random stretch of up to `size` along `dim` becomes 0, the mean of everything."""
    dice = torch.rand(2, len(x), 1, 1, device=x.device)
    place = torch.arange(x.shape[dim], device=x.device).view([-1 if k == dim else 1 for k in range(3)])
    start = dice[0] * x.shape[dim]
    return x.masked_fill((place >= start) & (place < start + dice[1] * size), 0)


def utterances(numbers, plan, training):
    """Whole utterances -> inputs (batch, time, 3 * columns), lengths (batch,), classes (batch, time)."""
    size = lengths[numbers]
    speed = 1 + plan["speed"] * training * (2 * torch.rand(len(size), device=flat.device) - 1)
    length = (size / speed).round().long()
    t = torch.arange(int(length.max()) + 2, device=flat.device)  # 2 more frames: delta sees behind the end
    place = (t * speed[:, None]).minimum(size[:, None] - 1)  # where frame t of the new one lies in the old
    low, start = place.long(), offsets[numbers][:, None]
    high = (low + 1).minimum(size[:, None] - 1)
    x = torch.lerp(flat[start + low], flat[start + high], (place - low)[..., None])
    y = classes[start + place.round().long()].long()
    if training:
        x = x + plan["noise"] * torch.randn_like(x)
        for dim, stretch in ((1, plan["time_mask"]), (1, plan["time_mask"]), (2, plan["column_mask"] + 1)):
            x = blank(x, dim, stretch)
    x = torch.cat([x, delta(x), delta(delta(x))], -1)[:, :-2]
    inside = t[:-2] < length[:, None]
    return x * inside[..., None], length, y[:, :-2].masked_fill(~inside, -100)


# %% [markdown]
# Batches are lists of numbers: of frames below boss, of utterances at boss. Utterances are sorted by length
# first, with 5 % chance in it, so that a batch is nearly free of padding and yet new in every epoch. With
# several processes each takes every k-th of a batch.


# %%
def make_batches(plan, numbers, epoch):
    """This process's share of every batch of the epoch."""
    dice = torch.Generator().manual_seed(SEED * 1000 + epoch)  # the same on all processes
    world, rank = accelerator.num_processes, accelerator.process_index
    numbers = frames_of(numbers) if plan["net"] == "MLP" else numbers
    order = torch.randperm(len(numbers), generator=dice)[: len(numbers) // world * world]
    if plan["net"] != "MLP":
        noise = 0.95 + 0.1 * torch.rand(len(order), generator=dice)
        order = order[(lengths[numbers].cpu()[order] * noise).argsort()]
    batches = order.split(max(1, plan["batch_size"] // world) * world)
    batches = [batches[k] for k in torch.randperm(len(batches), generator=dice)]
    batches = [numbers[batch[rank::world].to(numbers.device)] for batch in batches]
    # one frame alone has no spread, so no batch norm
    return [batch for batch in batches if len(batch) > 1 or plan["net"] != "MLP"]


def get_batch(batch, plan, training):
    """Inputs of the net, and the classes that it should give."""
    if plan["net"] == "MLP":
        return (windows(batch, plan["frames"]),), classes[batch].long()
    x, length, y = utterances(batch, plan, training)
    return (x, length), y


# %% [markdown]
# What the sorting is worth: padding is computed and thrown away.


# %%
def padding(batches):
    """Share of a rectangle that is padding, over all batches."""
    true = sum(int(lengths[batch].sum()) for batch in batches)
    return 1 - true / sum(len(batch) * int(lengths[batch].max()) for batch in batches)


if LEVEL == "boss":
    sorted_batches, mixed = make_batches(members[0], learn, 1), learn[torch.randperm(len(learn))]
    mixed = padding(mixed.split(members[0]["batch_size"]))
    print(f"padding: {padding(sorted_batches):.1%} of the numbers, unsorted it would be {mixed:.1%}")

# %% [markdown]
# ## The nets
#
# Up to *strong* a **multi-layer perceptron**. *Simple* and *medium* have `Linear` and ReLU. *Strong* puts
# batch normalization before the activation, so that no layer has to follow the moods of the one below,
# dropout behind it, so that no unit relies on a single other one, and a short cut around every layer but
# the first.

# %%
from torch import nn


class MLP(nn.Module):
    """(batch, inputs) -> scores (batch, 41). As in the official net, `layers` come after a first one."""

    def __init__(self, inputs, layers, width, strong, dropout):
        super().__init__()
        self.strong = strong
        self.hidden = nn.ModuleList(self.layer(a, width, dropout) for a in [inputs] + [width] * layers)
        self.head = nn.Linear(width, CLASSES)

    def layer(self, inputs, width, dropout):
        if not self.strong:
            return nn.Sequential(nn.Linear(inputs, width), nn.ReLU())
        return nn.Sequential(nn.Linear(inputs, width), nn.BatchNorm1d(width), nn.GELU(), nn.Dropout(dropout))

    def forward(self, x):
        x = self.hidden[0](x)
        for layer in self.hidden[1:]:
            x = x + layer(x) if self.strong else layer(x)
        return self.head(x)


# %% [markdown]
# The boss reads sequences. Two small convolutions look at five frames each, then a **bidirectional
# recurrent net** carries what it has heard along the utterance, once from the left and once from the right:
# frame $t$ is judged from $h_t = [\overrightarrow{h}_t, \overleftarrow{h}_t]$, and $h_t$ may depend on every
# frame there is. A window net reads each frame $n$ times, this one once.
#
# The backward half must not begin in the padding. So it is a net of its own that reads each utterance
# *turned round within its own length*: true frames first, padding last, where it can do no harm. That is
# exact, and a rectangle lets the fast kernels run: on one processor core eight times the speed of a packed
# bidirectional LSTM (0.2 s against 1.6 s, forward and back through one layer, 16 utterances of 250 frames).
# The recurrence stays in float32: rounding errors must not add up over a thousand steps.


# %%
class Recurrent(nn.Module):
    """Bidirectional layers: one net reads forward, the other each utterance from its own end."""

    def __init__(self, kind, inputs, width, layers, dropout):
        super().__init__()
        sizes = [inputs] + [2 * width] * (layers - 1)
        self.right = nn.ModuleList(kind(size, width, batch_first=True) for size in sizes)
        self.left = nn.ModuleList(kind(size, width, batch_first=True) for size in sizes)
        self.drop = nn.Dropout(dropout)

    def forward(self, x, length):
        t, last = torch.arange(x.shape[1], device=x.device), length[:, None] - 1
        turn = torch.where(t <= last, last - t, t)[..., None]  # an utterance backwards, its padding as it is
        with torch.autocast(x.device.type, enabled=False):
            x = x.float()
            for k, (right, left) in enumerate(zip(self.right, self.left)):
                x = self.drop(x) if k else x
                right.flatten_parameters(), left.flatten_parameters()  # for cuDNN: a copy's lie scattered
                back = left(x.gather(1, turn.expand_as(x)))[0]
                x = torch.cat([right(x)[0], back.gather(1, turn.expand_as(back))], -1)
        return x


# %% [markdown]
# Around it: two convolutions before, one `Linear` behind. Whatever stands in the padding is set to zero
# before anything looks at it, as at the end of an utterance alone.


# %%
class Sequence(nn.Module):
    """(batch, time, inputs), lengths -> scores (batch, time, 41); the padding has no effect."""

    def __init__(self, inputs, plan):
        super().__init__()
        front, width = plan.get("front", plan["width"]), plan["width"]
        self.front = nn.ModuleList(nn.Conv1d(a, front, 5, padding=2) for a in (inputs, front))
        self.norms = nn.ModuleList(nn.LayerNorm(front) for _ in range(2))
        if plan["net"] == "conformer":
            self.body = nn.ModuleList(Conformer(plan, front) for _ in range(plan["layers"]))
        else:
            kind = getattr(nn, plan["net"])
            self.body = nn.ModuleList([Recurrent(kind, front, width, plan["layers"], plan["dropout"])])
            width *= 2
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Dropout(plan["dropout"]), nn.Linear(width, CLASSES))

    def forward(self, x, length):
        inside = torch.arange(x.shape[1], device=x.device) < length[:, None]
        for conv, norm in zip(self.front, self.norms):
            x = norm(nn.functional.gelu(conv(x.transpose(1, 2)).transpose(1, 2))) * inside[..., None]
        for part in self.body:
            x = part(x, length)
        return self.head(x)


# %% [markdown]
# Members that err in different ways *can* be worth more together; the lines after the training say whether
# they are. The small sample has two equal nets with different starts. On the real data another kind of
# net joins, a **conformer**: in each block *self-attention* lets every frame ask all others, and a wide
# *depthwise convolution* looks at the neighbourhood. Positions enter by rotation: queries and keys are
# turned by an angle that grows with time, so their product depends on the *distance* of two frames.


# %%
def rotate(x):
    """Turn pairs of numbers by an angle that grows with time: (batch, heads, time, size)."""
    half = x.shape[-1] // 2
    speed = 1e4 ** -(torch.arange(half, device=x.device) / half)
    angle = torch.arange(x.shape[-2], device=x.device)[:, None] * speed
    a, b = x.chunk(2, -1)
    return torch.cat([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], -1).type_as(x)


# %% [markdown]
# A block adds four things to what came in: half a feed-forward net, attention, convolution, the other half.
# In training, *stochastic depth* lets some utterances pass by a part, so that no part relies on another one.


# %%
class Conformer(nn.Module):
    """One block: (batch, time, width) -> the same shape."""

    def __init__(self, plan, width):
        super().__init__()
        self.heads, self.skip, self.drop = plan["heads"], plan["skip"], nn.Dropout(plan["dropout"])
        self.before, self.after = (
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.SiLU(), self.drop,
                          nn.Linear(4 * width, width)) for _ in range(2)
        )  # fmt: skip
        self.ask = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 3 * width))
        self.tell = nn.Linear(width, width)
        self.gate = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GLU())
        self.near = nn.Conv1d(width, width, plan["kernel"], padding=plan["kernel"] // 2, groups=width)
        self.point = nn.Sequential(nn.LayerNorm(width), nn.SiLU(), nn.Linear(width, width))
        self.end = nn.LayerNorm(width)

    def attend(self, x, inside):
        q, k, v = self.ask(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        seen = nn.functional.scaled_dot_product_attention(rotate(q), rotate(k), v, inside[:, None, None])
        return self.tell(seen.transpose(1, 2).flatten(2))

    def convolve(self, x, inside):
        x = self.gate(x) * inside[..., None]  # the padding is silent, as behind the end of an utterance
        return self.point(self.near(x.transpose(1, 2)).transpose(1, 2))

    def add(self, x, more):
        """Stochastic depth: in training, some utterances pass by this part."""
        if self.training and self.skip:
            keep = torch.rand(len(x), 1, 1, device=x.device) >= self.skip
            more = more * keep / (1 - self.skip)
        return x + self.drop(more)

    def forward(self, x, length):
        inside = torch.arange(x.shape[1], device=x.device) < length[:, None]
        x = self.add(x, self.before(x) / 2)
        x = self.add(x, self.attend(x, inside))
        x = self.add(x, self.convolve(x, inside))
        return self.end(self.add(x, self.after(x) / 2))


# %% [markdown]
# One function makes any of them from its settings.


# %%
def make_model(plan):
    if plan["net"] == "MLP":
        names = ("layers", "width", "strong", "dropout")
        return MLP(plan["frames"] * COLUMNS, *(plan[name] for name in names))
    return Sequence(3 * COLUMNS, plan)


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
# Cross-entropy, AdamW. From *medium* on a **one-cycle** rate: up in the first tenth, because Adam's averages
# are still young, then down along a cosine. From *strong* on **label smoothing** (the target is 95 % one
# class, so the net need not be sure beyond reason) and **averaged weights**: a second copy follows the
# trained one slowly, $\bar\theta \leftarrow d\,\bar\theta + (1 - d)\,\theta$. The copy is what predicts.

# %%
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn


def make_training(plan, steps):
    """The net, the copy that follows it, its optimizer and schedule."""
    model = make_model(plan).to(device)
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(plan["ema"]), use_buffers=True)
    optimizer = torch.optim.AdamW(model.parameters(), plan["lr"], weight_decay=plan["decay"], fused=True)
    if plan["cycle"]:
        warm = dict(pct_start=0.1, cycle_momentum=False)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, plan["lr"], total_steps=steps, **warm)
    else:
        scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    model, optimizer = accelerator.prepare(model, optimizer)
    return dict(model=model, ema=ema, optimizer=optimizer, scheduler=scheduler)


def log(row, lr, loud):
    """A row for the curves, a line for the reader."""
    history.append(row | dict(lr=lr))
    text = f"{row['stage']:16} {row['epoch']:3d}  loss {row['loss']:.4f}  train {row['train']:.4f}"
    text += f"  valid {row['valid']:.4f}  lr {lr:.1e}  {row['seconds']:.1f} s"
    if loud:
        print(f"{text}  {row['examples_per_second']:,.0f} frames/s")
    if not np.isfinite(row["loss"]):
        raise Stop(
            f"{row['stage']} diverged (the loss became infinite): choose another SEED or a lower rate."
        )


# %% [markdown]
# The loop of the whole course: take a batch, forward, loss, backward, step. It serves all levels, for a
# batch is a list of numbers whatever they count. The training accuracy is counted on the way, with dropout
# on and before the step that learns from the batch.


# %% tags=["train"]
def train(stage, plan, learn, check, loud=True):
    """One net from beginning to end, or from its last checkpoint; returns the averaged copy."""
    epochs, clip = plan["epochs"], 1.0
    state = make_training(plan, epochs * len(make_batches(plan, learn, 0)))
    model, ema, optimizer, scheduler = state.values()
    done = load_checkpoint(stage, **state)
    for epoch in range(done + 1, epochs + 1):
        model.train()
        tic, total = time.perf_counter(), torch.zeros(3, device=device)
        for batch in tqdm(make_batches(plan, learn, epoch), stage, disable=QUIET, leave=False):
            x, y = get_batch(batch, plan, True)
            logits = model(*x)
            loss = nn.functional.cross_entropy(
                logits.flatten(0, -2), y.flatten(), ignore_index=-100, label_smoothing=plan["smoothing"]
            )
            optimizer.zero_grad()
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            scheduler.step()
            ema.update_parameters(bare(model))
            count = (y >= 0).sum()  # sums stay on the device, they are read once an epoch
            total += torch.stack([loss.detach() * count, (logits.argmax(-1) == y).sum(), count])
        loss, right, count = accelerator.reduce(total).tolist()
        seconds = time.perf_counter() - tic
        row = dict(stage=stage, epoch=epoch, loss=loss / count, train=right / count, seconds=seconds)
        row |= dict(valid=evaluate(ema, plan, check), examples_per_second=count / seconds)
        log(row, scheduler.get_last_lr()[0], loud or epoch == epochs)
        save_checkpoint(stage, epoch, **state)
    return ema


# %% [markdown]
# Prediction cuts the work into chunks: of frames, or of utterances of about equal length. Every process
# takes every k-th chunk and writes its answers where they belong in **one** array, so the order of the
# chunks cannot matter: frame $i$ of the list is row $i$ of the answer.


# %% tags=["predict"]
@torch.no_grad()
def predict(model, plan, numbers):
    """Log-probabilities of all frames of these utterances, in this order: (frames, 41)."""
    model.eval()
    frames, sizes = frames_of(numbers), lengths[numbers]
    start = sizes.cumsum(0) - sizes
    answer = torch.zeros(len(frames), CLASSES, device=device)
    if plan["net"] == "MLP":
        chunks = torch.arange(len(frames), device=device).split(8192)
    else:
        chunks = sizes.argsort(stable=True).split(2 * plan["batch_size"])
    for chunk in chunks[accelerator.process_index :: accelerator.num_processes]:
        with accelerator.autocast():
            x, y = get_batch(frames[chunk] if plan["net"] == "MLP" else numbers[chunk], plan, False)
            logits = model(*x).float().log_softmax(-1)
        if plan["net"] != "MLP":  # undo the bucket: every true frame to its row
            t = torch.arange(y.shape[1], device=device)
            inside = t < sizes[chunk][:, None]
            chunk, logits = (start[chunk][:, None] + t)[inside], logits[inside]
        answer[chunk] = logits
    return accelerator.reduce(answer)


def evaluate(model, plan, numbers):
    """Share of right frames."""
    truth = classes[frames_of(numbers)]
    return float((predict(model, plan, numbers).argmax(-1) == truth).float().mean())


# %% [markdown]
# Now train: one net, or at boss each member in turn. A member that is finished is not trained again.

# %%
nets = [train(f"{k + 1} {plan['net']}", plan, learn, valid) for k, plan in enumerate(members)]
guesses = [predict(net, plan, valid) for net, plan in zip(nets, members)]
truth = classes[frames_of(valid)].long()
valid_logp, test_logp = torch.stack(guesses).mean(0), torch.zeros((), device=device)
for net, plan in zip(nets, members):
    test_logp = test_logp + predict(net, plan, test) / len(nets)


def accuracy(guess):
    return float((guess == truth).float().mean())


for plan, guess in zip(members, guesses):
    print(f"{plan['net']:10} valid {accuracy(guess.argmax(-1)):.4f}")
print(f"{'together':10} valid {accuracy(valid_logp.argmax(-1)):.4f}")

# %% [markdown]
# ## Smoothing
#
# The nets judge every frame for itself; real phonemes do not flicker. The boss asks for the best **path**:
# $\max_{y_1 \dots y_T} \sum_t \log p(y_t \mid x) + w \sum_t \log a(y_t \mid y_{t-1})$, where $a$ counts which
# class follows which in the training utterances. The *Viterbi* recursion finds it exactly: the best score of
# a path that ends in class $c$ at time $t$ needs only those of time $t - 1$. The loop runs over time; all
# utterances and all pairs of classes go at once.


# %%
def count_pairs(numbers):
    """log a(next class | class), from neighbouring frames of these utterances, each pair seen once more."""
    frames = frames_of(numbers)
    y, same = classes[frames].long(), owner[frames[1:]] == owner[frames[:-1]]
    pairs = torch.bincount((y[:-1] * CLASSES + y[1:])[same], minlength=CLASSES**2) + 1.0
    return pairs.view(CLASSES, CLASSES).log().log_softmax(1)


def viterbi(logp, sizes, pairs):
    """The best path through log-probabilities (frames, 41) of utterances of these sizes: (frames,)."""
    t, start = torch.arange(int(sizes.max()), device=logp.device), sizes.cumsum(0) - sizes
    inside = t < sizes[:, None]
    table = logp.new_zeros(*inside.shape, CLASSES)  # (utterances, time, 41)
    table[inside] = logp[(start[:, None] + t)[inside]]
    best, back = table[:, 0], torch.zeros(table.shape, dtype=torch.uint8, device=logp.device)
    for k in t[1:].tolist():
        score, source = (best[:, :, None] + pairs).max(1)  # over the class before
        on = inside[:, k, None]  # behind its end an utterance stands still
        best = torch.where(on, score + table[:, k], best)
        back[:, k] = torch.where(on, source, torch.arange(CLASSES, device=logp.device)).byte()
    path = torch.zeros(inside.shape, dtype=torch.long, device=logp.device)
    path[:, -1] = best.argmax(1)
    for k in t.flip(0)[:-1].tolist():
        path[:, k - 1] = back[:, k].gather(1, path[:, k : k + 1])[:, 0]
    return path[inside]


# %% [markdown]
# The weight $w$ is chosen on the validation utterances; 0 (no smoothing) is among the choices. As the best of
# seven, the gain that is printed is a little too good.

# %%
WEIGHTS = (0.0, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0) if LEVEL == "boss" else (0.0,)
pairs = count_pairs(learn)
smooth = {weight: accuracy(viterbi(valid_logp, lengths[valid], weight * pairs)) for weight in WEIGHTS}
best_weight = max(smooth, key=smooth.get)
valid_guess = viterbi(valid_logp, lengths[valid], best_weight * pairs)
prediction = viterbi(test_logp, lengths[test], best_weight * pairs).cpu().numpy()
print("validation accuracy by weight:", ", ".join(f"{w}: {score:.4f}" for w, score in smooth.items()))
print(f"chosen: {best_weight}, gain {smooth[best_weight] - smooth[0.0]:+.4f}")
summary = dict(valid_score=accuracy(valid_guess), smoothing_weight=best_weight)
summary |= dict(smoothing_gain=smooth[best_weight] - smooth[0.0])
summary |= dict(parameters=sum(weight.numel() for net in nets for weight in net.module.parameters()))
summary |= dict(examples_per_second=float(np.median([row["examples_per_second"] for row in history])))

# %% [markdown]
# The curves. *Train* is counted during training, with dropout and augmentation on: it can lie below
# *valid*, which is counted without.


# %%
def curves(axis, stages, keys=("train", "valid")):
    """Accuracy by epoch; one colour a stage, the training accuracy dotted."""
    for k, stage in enumerate(stages):
        rows = [row for row in history if row["stage"] == stage]
        for key in keys:
            style, line = {"train": ":", "valid": "-"}[key], [row[key] for row in rows]
            axis.plot(
                range(1, len(rows) + 1), line, style, marker=".", color=f"C{k}", label=f"{stage}, {key}"
            )
    axis.set(xlabel="epoch", ylabel="accuracy")
    axis.legend(fontsize=8)


fig, axes = plt.subplots(1, 2, figsize=(8, 2.8))
stages = list(dict.fromkeys(row["stage"] for row in history))
curves(axes[1], stages)
for k, stage in enumerate(stages):
    losses = [row["loss"] for row in history if row["stage"] == stage]
    axes[0].plot(range(1, len(losses) + 1), losses, ".-", color=f"C{k}", label=stage)
axes[0].set(xlabel="epoch", ylabel="training loss")
axes[0].legend(fontsize=8)
show("curves.png")

# %% [markdown]
# ## Submission
#
# `Id,Class`, one line a frame: the utterances in the order of `test_split.txt`, each from its first frame to
# its last, counted through from 0.

# %% tags=["submission"]
submission = OUT / ("prediction.csv" if REAL else "prediction.sample.csv")


def write_submission(path):
    with aside(path) as part, part.open("w", newline="") as file:
        file.write("Id,Class\n")
        file.writelines(f"{row},{guess}\n" for row, guess in enumerate(prediction.tolist()))


def check_submission(path):
    """Raises Stop with what the judge would not take, prints what looks odd."""
    lines, count = path.read_text().split("\n"), int(lengths[test].sum())
    if lines[0] != "Id,Class" or lines[-1]:
        raise Stop(f"{path} must begin with the line Id,Class and end with a line break")
    if [line.split(",")[0] for line in lines[1:-1]] != [str(row) for row in range(count)]:
        raise Stop(f"{path} must have the ids 0 to {count - 1}, one for each test frame, in this order")
    given = [line.partition(",")[2] for line in lines[1:-1]]
    allowed = {str(number) for number in range(CLASSES)}
    for row, guess in enumerate(given):
        if guess not in allowed:
            raise Stop(f"{path}: Id {row} has class {guess!r}, a class is a number from 0 to {CLASSES - 1}")
    silence, never = given.count("0") / count, sorted(allowed - {*given}, key=int)
    if not 0.05 <= silence <= 0.4:
        print(f"NOTE: {silence:.0%} of the frames are class 0 (silence), 5 to 40 % would be usual")
    if never:
        print(f"NOTE: never predicted: class {', '.join(never)}")


def score_submission(path, answers):
    """The judge: share of right frames."""
    guess = np.loadtxt(path, delimiter=",", skiprows=1, dtype=np.int64)[:, 1]
    return np.mean(guess == np.load(answers / "classes.npy"))


if MAIN:
    write_submission(submission)
    print(submission.read_text()[:40].replace("\n", " "), "...")

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
# The homework asks two questions about perceptrons; we add four. The experiments belong to the boss level
# (`REPORT = False` leaves them out). Each is a short training with its own checkpoints, so a kill costs one
# epoch. They share one recipe: windows, one-cycle rate, no regularization but what is asked about.


# %%
def experiment(name, **changes):
    """Train one perceptron on the same utterances -> its accuracies; the last one again, dropout off."""
    plan = PLAIN | CYCLE | dict(batch_size=settings["report"]["batch_size"], layers=2) | settings["report"]
    plan |= changes
    net = train(name, plan, learn, valid, loud=False)  # one line an experiment
    row = [row for row in history if row["stage"] == name][-1]
    found = dict(name=name, parameters=sum(weight.numel() for weight in net.module.parameters()))
    return found | dict(valid=row["valid"], train=row["train"], train_off=evaluate(net, plan, learn))


def table(rows):
    print(f"{'':14}{'parameters':>12}{'train':>10}{'train, off':>12}{'valid':>10}   (off: no dropout)")
    for row in rows:
        print(f"{row['name']:14}{row['parameters']:12,}{row['train']:10.4f}{row['train_off']:12.4f}", end="")
        print(f"{row['valid']:10.4f}")


asked = LEVEL == "boss" and REPORT
if not asked:
    print("the experiments belong to the boss level with REPORT = True")

# %% [markdown] tags=["report"]
# **1. Narrow and deep, or wide and shallow?** A fair question only at equal size. With $d$ inputs, $L$
# layers after the first and $h$ units the net has $(d + 1) h + L (h^2 + h) + 41 (h + 1)$ parameters; for the
# wide one we solve that for $h$.


# %%
def width_for(parameters, inputs, layers):
    """The width at which a net of so many layers has about so many parameters."""
    b = inputs + 1 + layers + CLASSES  # layers h^2 + b h + 41 = parameters
    return round((-b + (b * b + 4 * layers * (parameters - CLASSES)) ** 0.5) / (2 * layers))


if asked:
    inputs = settings["report"]["frames"] * COLUMNS
    deep = experiment("narrow, deep", layers=6)
    wide = width_for(deep["parameters"], inputs, 2)
    shallow = experiment("wide, shallow", layers=2, width=wide)
    print(f"{inputs} inputs; 6 layers of {settings['report']['width']} or 2 layers of {wide} after the first")
    table([deep, shallow])
    better = max(deep, shallow, key=lambda row: row["valid"])
    print(f"better on validation: {better['name']}, by {abs(deep['valid'] - shallow['valid']):.4f}")
    fig, axis = plt.subplots(figsize=(8, 2.8))
    curves(axis, ["narrow, deep", "wide, shallow"])
    show("deep-wide.png")

# %% [markdown] tags=["report"]
# **2. How much dropout?** The *strong* net with three rates. Mind what "training accuracy" means: with
# dropout on, the net is judged with units missing.

# %%
if asked:
    rates = (0.25, 0.5, 0.75)
    rows = [experiment(f"dropout {rate}", strong=True, dropout=rate) for rate in rates]
    table(rows)
    hidden = ", ".join(f"{row['train_off'] - row['train']:+.4f} at {row['name'][8:]}" for row in rows)
    print(f"train is measured with dropout on, in the last epoch; with it off the same frames give {hidden}.")
    fig, axes = plt.subplots(1, 2, figsize=(8, 2.8))
    for k, key in enumerate(("train", "train_off", "valid")):
        axes[0].bar(np.arange(3) + 0.27 * k, [row[key] for row in rows], 0.25, label=key.replace("_", ", "))
    axes[0].set(xticks=np.arange(3) + 0.27, xticklabels=rates, xlabel="dropout", ylabel="accuracy")
    axes[0].legend(fontsize=8, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1))
    curves(axes[1], [row["name"] for row in rows], keys=("valid",))
    show("dropout.png")

# %% [markdown] tags=["report"]
# **3. How much context?** The same small net with 1 to 31 frames, and beside it the boss's members, which
# read the whole utterance.

# %%
if asked:
    sizes = (1, 5, 11, 19, 31)
    rows = [experiment(f"{n} frames", frames=n) for n in sizes]
    table(rows)
    fig, axis = plt.subplots(figsize=(8, 2.6))
    axis.plot(sizes, [row["valid"] for row in rows], "o-", label="perceptron, validation")
    axis.plot(sizes, [row["train_off"] for row in rows], "o:", label="perceptron, training")
    for k, (plan, guess) in enumerate(zip(members, guesses)):
        whole = accuracy(guess.argmax(-1))
        name, dash = f"{k + 1} {plan['net']}, whole utterance", ("-", "--", ":")[k % 3]
        axis.axhline(whole, color=f"C{k + 2}", linestyle=dash, label=name)
    axis.set(xlabel="frames in the window", ylabel="accuracy", xticks=sizes)
    axis.legend(fontsize=8)
    show("context.png")

# %% [markdown] tags=["report"]
# **4. Where is it wrong?** Near the borders of segments, where the mouth is on its way from one phoneme to
# the next and even people disagree on the frame. The lines are the levels that were run in this folder so
# far, on their validation utterances.


# %%
def to_border(y, who):
    """How many frames lie between each frame and the nearer end of its segment: 0 at the border."""
    cut = torch.ones_like(y, dtype=torch.bool)
    cut[1:] = (y[1:] != y[:-1]) | (who[1:] != who[:-1])
    segment, size = cut.cumsum(0) - 1, torch.bincount(cut.cumsum(0) - 1)
    place = torch.arange(len(y), device=y.device) - (size.cumsum(0) - size)[segment]
    return torch.minimum(place, size[segment] - 1 - place)


right, far = (valid_guess == truth).float(), to_border(truth, owner[frames_of(valid)]).clamp(max=6)
counts = torch.bincount(far, minlength=7)
summary["by_distance"] = (torch.bincount(far, right, minlength=7) / counts.clamp(min=1)).tolist()
fig, axis = plt.subplots(figsize=(8, 2.6))
for level, one in other_levels(summary | {"score": score}).items():
    axis.plot(range(7), one["by_distance"], "o-", label=f"{level}, all frames {one['valid_score']:.3f}")
    hidden = "" if one["score"] is None else f"  hidden answers {one['score']:.4f}"
    print(f"{level:8} valid {one['valid_score']:.4f}{hidden}")
axis.set(xlabel="frames to the nearest border of the segment", ylabel="accuracy")
axis.set(xticks=range(7), xticklabels=[*range(6), "6+"])
axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
show("borders.png")

# %% [markdown] tags=["report"]
# **5. Which classes?** The recall of each class, silence (0) included, and the ten pairs that are confused
# most. In the sample the classes 1 and 2, 3 and 4, ... are near twins; in real speech look for pairs that
# sound alike.

# %%
table41 = torch.bincount(truth * CLASSES + valid_guess, minlength=CLASSES**2).view(CLASSES, CLASSES).cpu()
recall = (table41.diag() / table41.sum(1).clamp(min=1)).numpy()
ranks = np.argsort(-recall)
plt.figure(figsize=(8, 2.4))
plt.bar([str(k) for k in ranks], recall[ranks], color=["C7" if k == 0 else "C0" for k in ranks])
plt.xlabel("class")
plt.ylabel("recall")
plt.xticks(fontsize=7)
show("recall.png")
wrong = table41 - torch.diag(table41.diag())
both = torch.triu(wrong + wrong.T).flatten()
print(f"of {int(wrong.sum()):,} wrong frames, most between the classes", end=" ")
print(
    ", ".join(
        f"{int(k) // CLASSES} and {int(k) % CLASSES} ({int(both[k])})" for k in both.argsort()[-10:].flip(0)
    )
)

# %% [markdown] tags=["report"]
# One validation utterance as a strip: the truth, each frame judged for itself, and the best path. Flicker
# inside a segment is what smoothing can remove; a wrong word it cannot.

# %%
shown = slice(0, min(200, int(lengths[valid[0]])))
lines = {"true": truth, "nets": valid_logp.argmax(-1), "path": valid_guess}
fig, axes = plt.subplots(3, 1, figsize=(8, 2.2), sharex=True)
for axis, (name, line) in zip(axes, lines.items()):
    strip(axis, line[shown].cpu().numpy(), name)
axes[-1].set(xlabel="frame of the first validation utterance")
show("strip.png")

# %% [markdown] tags=["report"]
# **6. What does the official way cost?** It writes all windows into one matrix, and a `Dataset` and a
# `DataLoader` hand the frames out one by one. Here both ways feed the same 8,000 frames at $n = 19$, with no
# training step: this is the loading alone. Below it the memory of the real data at $n = 19$. Measured once,
# on files of the real size and number: with reading, some steps of training and predicting, this notebook
# took 1.7 GB of memory at *medium* and 1.9 GB at *strong*, all libraries included.

# %%
from torch.utils.data import DataLoader, TensorDataset


def frames_per_second(batches, count):
    times = []
    for _ in range(3):
        tic = time.perf_counter()
        for _ in batches():
            pass
        times.append(time.perf_counter() - tic)
    return count / float(np.median(times))


some = frames_of(learn)[:8000]
written = TensorDataset(windows(some, 19).cpu(), classes[some].cpu())  # what the official way holds in memory
loader = DataLoader(written, batch_size=512, shuffle=True)
slow = frames_per_second(lambda: loader, len(some))
fast = frames_per_second(lambda: ((windows(part, 19), classes[part]) for part in some.split(2048)), len(some))
print(f"{slow:12,.0f} frames/s through Dataset and DataLoader")
print(f"{fast:12,.0f} frames/s by gather, {fast / slow:.0f} times as many")
all_frames = FRAMES["train"] + FRAMES["test"]
print(f"{3_000_000 * 39 * 19 * 4 / 1e9:12.1f} GB for the official matrix of 3,000,000 x 39 x 19 float32")
print(f"{all_frames * COLUMNS * 4 / 1e9:12.1f} GB for all frames of both parts with {COLUMNS} columns, once")

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
