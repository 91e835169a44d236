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
# something, edit a parameter below or a cell, then run again: only what the change concerns is trained anew.

# %% tags=["parameters"]
# @title Parameters
LEVEL = "boss"  # @param ["boss", "strong", "medium", "simple"]
WITHOUT = ""  # @param {type:"string"}
DATA = "auto"  # @param ["auto", "real", "sample"]
PROFILE = "auto"  # @param ["auto", "full", "small", "tiny"]
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
OWN = {  # name: what it may be
    "EPOCHS": range(100_001),
    "BATCH_SIZE": range(1_000_001),
    "REPORT": (True, False),
}
NEEDS = {"numpy": "numpy", "pandas": "pandas", "matplotlib": "matplotlib", "torch": "torch"}
NEEDS |= {"accelerate": "accelerate", "filelock": "filelock", "tqdm": "tqdm"}
MIXED_PRECISION = True
LESS_MEMORY = "set BATCH_SIZE to half of what the settings say"
MEASURED = {}  # what each idea is worth: there is no table of ideas yet
CLASSES, FRAMES = 41, {"train": 2_644_158, "test": 646_268}  # the course's frames

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
    counts = {"train": 48, "test": 16} if PROFILE == "tiny" else {"train": 240, "test": 60}
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
# Reading means checking: lists, classes and files must fit together to the frame. Nothing is ever cut to
# fit; a classifier that learns from shifted labels gives no error, only a bad score.


# %%
from concurrent.futures import ThreadPoolExecutor


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
say(f"columns 14 to 39 differ from combinations of the first 13 by at most {rest:.1e}: {COLUMNS} are kept")


# %% [markdown]
# All frames become **one tensor**, utterance after utterance, training first, and `offsets` says where each
# begins. It stays on the device, serves every level, and replaces a `Dataset`: a batch is an index. Files
# are read by eight threads, once; later runs find one cache file.


# %%
MOST = {"full": None, "small": 600, "tiny": 48}[PROFILE] if REAL else None  # a CPU learns from so many
if MOST:
    say(f"profile {PROFILE}: the first {MOST} training utterances are used, with full it is all of them")


def read_all():
    """Every utterance of both splits, checked -> arrays of one cache file."""
    kept = dict(frames=[], classes=[], lengths=[], train=[], remarks=[])
    for part in ("train", "test"):
        names = read_split(part)
        names = names[:MOST] if part == "train" else names
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
if MAIN:
    with hold(cache):  # of runs side by side one reads
        if not cache.exists():
            with aside(cache) as part, part.open("wb") as file:
                np.savez(file, **read_all())
accelerator.wait_for_everyone()
stored = np.load(cache, allow_pickle=False)
say(*stored["remarks"], sep="\n", end="\n" * len(stored["remarks"]))
flat = torch.from_numpy(stored["frames"]).to(device)  # (all frames, columns)
classes = torch.from_numpy(stored["classes"]).to(device)  # (all frames,); 255: unknown
lengths = torch.from_numpy(stored["lengths"]).to(device)  # (utterances,)
offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
TRAIN = int(stored["train"].sum())  # the utterances from here on are the test part
for part, numbers in {"train": slice(0, TRAIN), "test": slice(TRAIN, None)}.items():
    count = int(lengths[numbers].sum())
    say(f"{part}: {len(lengths[numbers])} utterances, {count:,} frames (course: {FRAMES[part]:,})")
    if REAL and PROFILE == "full" and count != FRAMES[part]:
        say(f"NOTE: these are not the {FRAMES[part]:,} frames of the 2022 course: another edition?")

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
if OFF:
    raise Stop(f"{HW} has no table of ideas yet: leave WITHOUT empty.")
PLAIN = dict(net="MLP", frames=1, layers=1, width=256, strong=False, dropout=0.0, lr=1e-4, decay=0.01)
PLAIN |= dict(cycle=False, smoothing=0.0, ema=0.0, batch_size=512, epochs=5, held=0.05)
CYCLE = dict(cycle=True, batch_size=2048, lr=1e-3)  # one-cycle rate
STRONG = dict(strong=True, decay=0.02, smoothing=0.05)
BOSS = dict(cycle=True, decay=0.02, smoothing=0.05, ema=0.9995, batch_size=40, epochs=60, lr=2e-3)
BOSS |= dict(noise=0.1, speed=0.1, time_mask=25, column_mask=2, held=0.05)
RNN = dict(layers=5, width=384, front=256, dropout=0.4)
CONFORMER = dict(net="conformer", layers=10, width=256, heads=4, kernel=31, dropout=0.2, skip=0.1, lr=1e-3)
LEVELS = {  # profile full, for the real data on a GPU
    "simple": PLAIN,
    "medium": PLAIN | CYCLE | dict(frames=19, layers=2, width=1024, epochs=8),
    "strong": PLAIN | CYCLE | STRONG | dict(frames=31, layers=3, width=2048, dropout=0.4, ema=0.999)
    | dict(batch_size=4096, lr=2e-3, epochs=40),
    "boss": BOSS | dict(report=dict(frames=19, width=1024, batch_size=2048, epochs=8))
    | dict(members=[dict(net="LSTM") | RNN, dict(net="GRU") | RNN, CONFORMER]),
}  # fmt: skip
SMALL = {  # for the sample, which has a fortieth of the frames, and for a CPU
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
settings = LEVELS[LEVEL] | ({} if PROFILE == "full" else dict(held=0.125) | SMALL[LEVEL])
settings |= TINY[LEVEL] | dict(held=0.125) if PROFILE == "tiny" else {}
settings |= dict(epochs=EPOCHS or settings["epochs"], batch_size=BATCH_SIZE or settings["batch_size"])
alone = {name: value for name, value in settings.items() if name not in ("members", "report")}
members = [alone | member for member in settings.get("members", [{}])]
say(*(f"{name}: {value}" for name, value in settings.items()), sep=", ")

order = np.random.default_rng(SEED).permutation(TRAIN)
held = max(1, round(settings["held"] * TRAIN))
valid, learn, test = (np.sort(order[:held]), np.sort(order[held:]), np.arange(TRAIN, len(lengths)))
valid, learn, test = (torch.from_numpy(numbers).to(device) for numbers in (valid, learn, test))
say(f"{len(learn)} utterances to learn from, {len(valid)} to check on")

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
    say(f"padding: {padding(sorted_batches):.1%} of the numbers, unsorted it would be {mixed:.1%}")

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
        say(f"{text}  {row['examples_per_second']:,.0f} frames/s")
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
    done = load_checkpoint(stage, [train, plan, learn, check], **state)
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
    say(f"{plan['net']:10} valid {accuracy(guess.argmax(-1)):.4f}")
say(f"{'together':10} valid {accuracy(valid_logp.argmax(-1)):.4f}")

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
say("validation accuracy by weight:", ", ".join(f"{w}: {score:.4f}" for w, score in smooth.items()))
say(f"chosen: {best_weight}, gain {smooth[best_weight] - smooth[0.0]:+.4f}")
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
trained = list(dict.fromkeys(row["stage"] for row in history))
curves(axes[1], trained)
for k, stage in enumerate(trained):
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
        say(f"NOTE: {silence:.0%} of the frames are class 0 (silence), 5 to 40 % would be usual")
    if never:
        say(f"NOTE: never predicted: class {', '.join(never)}")


def score_submission(path, answers):
    """The judge: share of right frames."""
    guess = np.loadtxt(path, delimiter=",", skiprows=1, dtype=np.int64)[:, 1]
    return np.mean(guess == np.load(answers / "classes.npy"))


if MAIN:
    write_submission(submission)
    say(submission.read_text()[:40].replace("\n", " "), "...")


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


def compare(rows):
    say(f"{'':14}{'parameters':>12}{'train':>10}{'train, off':>12}{'valid':>10}   (off: no dropout)")
    for row in rows:
        say(f"{row['name']:14}{row['parameters']:12,}{row['train']:10.4f}{row['train_off']:12.4f}", end="")
        say(f"{row['valid']:10.4f}")


asked = LEVEL == "boss" and REPORT
if not asked:
    say("the experiments belong to the boss level with REPORT = True")

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
    say(f"{inputs} inputs; 6 layers of {settings['report']['width']} or 2 layers of {wide} after the first")
    compare([deep, shallow])
    better = max(deep, shallow, key=lambda row: row["valid"])
    say(f"better on validation: {better['name']}, by {abs(deep['valid'] - shallow['valid']):.4f}")
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
    compare(rows)
    hidden = ", ".join(f"{row['train_off'] - row['train']:+.4f} at {row['name'][8:]}" for row in rows)
    say(f"train is measured with dropout on, in the last epoch; with it off the same frames give {hidden}.")
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
    compare(rows)
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
for level, one in other_levels(summary | {"score": score}, "valid_score", "by_distance", "score").items():
    axis.plot(range(7), one["by_distance"], "o-", label=f"{level}, all frames {one['valid_score']:.3f}")
    hidden = "" if one["score"] is None else f"  hidden answers {one['score']:.4f}"
    say(f"{level:8} valid {one['valid_score']:.4f}{hidden}")
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
say(f"of {int(wrong.sum()):,} wrong frames, most between the classes", end=" ")
say(
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
say(f"{slow:12,.0f} frames/s through Dataset and DataLoader")
say(f"{fast:12,.0f} frames/s by gather, {fast / slow:.0f} times as many")
all_frames = FRAMES["train"] + FRAMES["test"]
say(f"{3_000_000 * 39 * 19 * 4 / 1e9:12.1f} GB for the official matrix of 3,000,000 x 39 x 19 float32")
say(f"{all_frames * COLUMNS * 4 / 1e9:12.1f} GB for all frames of both parts with {COLUMNS} columns, once")

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
