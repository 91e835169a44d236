# %% [markdown] tags=["header"]
# # HW04 · Self-attention: who is speaking?
#
# <!-- badges -->
# [![Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/ml2022-notebooks/ml2022-spring/blob/main/HW04/HW04.ipynb)
# [![Kaggle](https://kaggle.com/static/images/open-in-kaggle.svg)](https://kaggle.com/kernels/welcome?src=https://github.com/ml2022-notebooks/ml2022-spring/blob/main/HW04/HW04.ipynb)
# <!-- /badges -->
#
# A voice is a sequence of vectors: one spectrum every 10 milliseconds, as many as the person talks. Given one
# such sequence, say **which of 600 speakers** it is. This is the homework of the lecture on *self-attention*,
# the layer in which every frame looks at every other frame. We begin with a single such layer, build the
# **Conformer** (attention for what is far apart, convolution for what is near), learn to **pool** a sequence
# into one vector, and train with a **margin** that pushes the speakers apart on a sphere. The same speaker
# sounds different in another room, through another microphone: what the score depends on is whether a net has
# learned the voice or the recording, and whether the validation notices.
#
# 語音是一串向量:每 10 毫秒一個頻譜。給定一段長短不一的語音,請判斷是 600 位語者中的**哪一位**。
# 這是**自注意力**一課的作業:從一層自注意力開始,寫出 **Conformer**(注意力看遠處,卷積看近處),
# 學會把一串向量**池化**成一個向量,再用帶**間距**的 softmax 把語者在球面上推開。
# 同一個人換了房間或麥克風聲音就不同:模型學到的是人還是錄音環境,驗證集看不看得出來,決定了分數。
#
# The ladder, measured on the built-in sample (accuracy, higher is better; the mean of three seeds ± half
# their range), beside the course's public baselines on the real data:
#
# <!-- ladder -->
# | level | what it adds | sample | course baseline (real data) | seconds |
# |---|---|---|---|---|
# | simple | the official sample's net, with a mask and whole utterances | 0.178 ± 0.042 | 0.60824 | 30 |
# | medium | a deeper Transformer with positions, longer segments | 0.279 ± 0.037 | 0.70375 | 58 |
# | strong | Conformer: convolution inside every block | 0.441 ± 0.022 | 0.7775 | 89 |
# | boss | mean normalisation, attentive pooling, additive margin softmax | 0.915 ± 0.013 | 0.865 | 134 |
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
DATA_DIR = "data/HW04"  # @param {type:"string"}
OUT_DIR = "out/HW04"  # @param {type:"string"}
RESUME = True  # @param {type:"boolean"}
SUBMIT = False  # @param {type:"boolean"}
# this homework's own; 0 and "" stand for the level's own choice
EPOCHS = 0  # @param {type:"integer"}
BATCH_SIZE = 0  # @param {type:"integer"}
POOLING = ""  # @param ["", "mean", "sap", "asp"]
ABLATION = True  # @param {type:"boolean"}

# %% tags=["homework"]
HW, METRIC, HIGHER_IS_BETTER = "HW04", "accuracy", True
SLUG, JUDGE = "ml2022spring-hw4", "https://www.kaggle.com/competitions/ml2022spring-hw4"
BASELINES = {"simple": 0.60824, "medium": 0.70375, "strong": 0.77750, "boss": 0.86500}
FILES = {name: (f"{name}.json", 1) for name in ("metadata", "mapping", "testdata")}  # they name all others
AT = "https://github.com/MachineLearningHW/ML_HW4_Dataset/releases/latest/download/Dataset.tar.gz.part"
DRIVE = "https://drive.usercontent.google.com/download?export=download&confirm=t&id="
MIRRORS = [  # {name here: address, or addresses of its pieces} of complete copies
    {"Dataset.tar.gz": f"{AT}aa {AT}ab {AT}ac {AT}ad"},
    {"Dataset.tar.gz": DRIVE + "1bmVAabVkUcZ-zwVrvfaZ7zJhWjmanDy8"},
]
HASHES = set()  # the course published none
COURSE = dict(speakers=600, train=56_666, test=8_000, n_mels=40)
OWN = {  # name: what it may be
    "EPOCHS": range(100_001),
    "BATCH_SIZE": range(100_001),
    "POOLING": ("", "mean", "sap", "asp"),
    "ABLATION": (True, False),
}
NEEDS = {"numpy": "numpy", "pandas": "pandas", "matplotlib": "matplotlib", "torch": "torch"}
NEEDS |= {"accelerate": "accelerate", "filelock": "filelock", "tqdm": "tqdm", "sklearn": "scikit-learn"}
MIXED_PRECISION = True
LESS_MEMORY = "set BATCH_SIZE to half of what the settings say"
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
# One folder, `Dataset/`: 64,666 files `uttr-<32 hex digits>.pt`, each one tensor `(frames, 40)`: the
# logarithm of the energy in 40 *mel* bands, low tones first, one row every 10 ms. Training and test files lie
# there mixed; three lists say what is what: `metadata.json` (the training files of each speaker),
# `testdata.json` (the test files), `mapping.json` (speaker names to numbers). Three quirks to know:
#
# - other `.pt` files lie there too, so the lists decide, not the folder;
# - utterances last from 22 to about 5,000 frames, half of them more than 540;
# - a recording's room and microphone add a constant to each band. The test utterances seem to come from
#   *other recordings* than the training utterances: models that score 0.91 on held-out random utterances
#   have scored 0.77 on the leaderboard.
#
# The folded cell makes the sample: 24 invented voices that differ in the places of their vowels and in the
# speed of a tremor, four recordings each to learn from and four *other* recordings as the test, with silence
# and music in between.


# %% cellView="form" jupyter={"source_hidden": true} tags=["sample"]
# @title The sample: 24 voices in miniature
def make_sample(folder, answers):
    """Voices with vowels and a tremor of their own, in rooms that colour them; test rooms are new."""
    dice = np.random.default_rng(2022)
    full = PROFILE != "tiny"
    speakers, (each, later), (short, long) = (24, (8, 5), (110, 500)) if full else (12, (5, 3), (120, 200))
    channel, talk, bins, phones = 0.7, 0.6, np.arange(40), 20
    centre, wide = dice.uniform(3, 36, (phones, 3)), dice.uniform(1.2, 2.2, (phones, 3))
    high, music = dice.uniform(2, 4, (phones, 3)), dice.normal(0, 1.2, (6, 40))
    names = dice.choice(np.arange(10_000), speakers, replace=False)
    home, waves = folder / "Dataset", np.cos(np.pi * np.outer(np.arange(1, 5), bins + 0.5) / 40)
    home.mkdir()

    def voice():
        place = centre * dice.uniform(0.93, 1.07) + dice.normal(0, 0.5, (phones, 1))
        bumps = high[..., None] * np.exp(-(((bins - place[..., None]) / wide[..., None]) ** 2) / 2)
        tilt = dice.normal(0, 0.6) * (bins / 39 - 0.5)
        return bumps.sum(1) - 3 + tilt, dice.uniform(5, 9), dice.uniform(4, 11), dice.uniform(0.6, 1.4)

    def room():
        curve = channel * (dice.normal(0, 1, 4) / np.arange(1, 5)) @ waves + dice.normal(0, 0.7 * channel)
        noise = dice.normal(-4.5, 0.7) + (dice.normal(0, 0.8, 4) / np.arange(1, 5)) @ waves
        return curve, noise

    def say(voice, room):
        (sounds, pace, period, depth), (curve, noise) = voice, room
        frames = int(short + (long - short) * dice.beta(1, 2.6)) if full else dice.integers(short, long)
        x, t = np.empty((frames, 40)), 0
        tremor = depth * np.sin(2 * np.pi * (np.arange(frames) / period + dice.random()))
        while t < frames:
            end = min(t + dice.integers(18, 41), frames)
            if dice.random() < talk:
                steps = np.maximum(2, dice.poisson(pace, end - t))
                which = np.repeat(dice.integers(0, phones, end - t), steps)[: end - t]
                x[t:end] = sounds[which] + tremor[t:end, None]
            else:
                loud = dice.random() < 0.5
                x[t:end] = music[dice.integers(0, 6)] - 0.5 if loud else dice.normal(-7, 0.3)
            t = end
        x = x + curve + dice.normal(0, 0.4, x.shape)
        return np.logaddexp(x, noise + dice.normal(0, 0.3, x.shape))

    items = []
    for name in names:
        who = voice()
        for session in range(8):
            where = room()
            items += [
                (f"id{name:05d}", session, say(who, where)) for _ in range(each if session < 4 else later)
            ]
    train, test, truth = {f"id{name:05d}": [] for name in dice.permutation(names)}, [], ["Id,Category"]
    for k in dice.permutation(len(items)):
        name, session, x = items[k]
        file = f"uttr-{hashlib.md5(f'2022 {k}'.encode()).hexdigest()}.pt"
        torch.save(torch.tensor(x, dtype=torch.float32), home / file)
        (train[name] if session < 4 else test).append({"feature_path": file, "mel_len": len(x)})
        truth += [f"{file},{name}"] if session >= 4 else []
    number = {f"id{name:05d}": k for k, name in enumerate(sorted(names))}
    lists = {"mapping": {"speaker2id": number, "id2speaker": {str(k): name for name, k in number.items()}}}
    lists |= {"metadata": {"n_mels": 40, "speakers": train}, "testdata": {"n_mels": 40, "utterances": test}}
    for name, content in lists.items():
        (home / f"{name}.json").write_text(json.dumps(content, indent=2))
    (home / "wav2mel.pt").write_bytes(b"the course's folder has such files too: this is no utterance")
    (answers / "answers.csv").write_text("\n".join(truth) + "\n")


# %% [markdown]
# The course's archive comes in four pieces. Whoever has put them into `DATA_DIR` by hand gets them joined
# here; everything else about finding the data is in the folded cell below.


# %%
def join_pieces(folder):
    """Dataset.tar.gz.partaa, .partab, ... -> Dataset.tar.gz, and again when a piece has been replaced."""
    pieces = sorted(folder.glob("Dataset.tar.gz.parta?"))
    whole = folder / "Dataset.tar.gz"
    missing = [
        f"{whole.name}.parta{x}"
        for x in "abcd"[: len(pieces)]
        if not (folder / f"{whole.name}.parta{x}").exists()
    ]
    if missing:
        raise Stop(f"{folder} has pieces of {whole.name}, but not {', '.join(missing)}: fetch it too.")
    newest = max((piece.stat().st_mtime for piece in pieces), default=0)
    if pieces and (not whole.exists() or whole.stat().st_mtime < newest):
        with aside(whole) as part, part.open("wb") as file:
            for piece in pieces:
                with piece.open("rb") as source:
                    shutil.copyfileobj(source, file, 2**20)


if MAIN and DATA != "sample":
    join_pieces(DATA_DIR)

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
# Reading means checking. What the lists say is compared with each other and with the course's counts; a
# smaller data set is as good, the net adapts to it.


# %%
def read_list(name, *keys):
    """The dictionary in one of the three json files."""
    path = PATHS[name][0]
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
        return [content[key] for key in keys]
    except (ValueError, KeyError, TypeError) as error:
        raise Stop(f"{path} is damaged, fetch it again: {type(error).__name__} {error}") from None


def read_lists():
    """Numbers of the speakers, and the files of both parts with what the lists say of them."""
    [number], [asked] = read_list("mapping", "speaker2id"), read_list("testdata", "utterances")
    n_mels, spoken = read_list("metadata", "n_mels", "speakers")
    lists, known = PATHS["metadata"][0], ("feature_path", "mel_len")
    try:
        train = [(*(item[key] for key in known), number[who]) for who in spoken for item in spoken[who]]
        test = [(*(item[key] for key in known), -1) for item in asked]
    except (KeyError, TypeError) as error:
        raise Stop(f"{lists} or a list beside it lacks the entry {error}: fetch them again.") from None
    files = [item[0] for item in train + test]
    if len(set(files)) < len(files):
        twice = next(name for name in files if files.count(name) > 1)
        raise Stop(f"{lists.parent}: {twice} stands twice in the lists, fetch them again.")
    if sorted(number.values()) != list(range(len(number))):
        raise Stop(f"{PATHS['mapping'][0]} must number the speakers 0 to {len(number) - 1}, fetch it again.")
    return number, n_mels, train, test


number, n_mels, train, test = read_lists()
speakers = sorted(number, key=number.get)  # number -> name
counts = dict(speakers=len(speakers), train=len(train), test=len(test), n_mels=n_mels)
say(*(f"{name}: {count} (course: {COURSE[name]})" for name, count in counts.items()), sep=", ")

# %% [markdown]
# ## Pack once, then never open a file again
#
# The official sample opens a file for every example of every epoch, unpickles 100 kB and uses 20 kB. Here all
# utterances are read once, by 16 threads, checked, and laid end to end in **one** array of float16,
# `(all frames, 40)`, with the place where each begins. It is memory-mapped: the system loads what is touched.
# On a GPU with room the array lies there. A batch is then one index, `frames[begin + arange(length)]`. The
# pack is named after a hash of the lists, and is built in parts, so a stopped run goes on with the next part.
# It lies in `DATA_DIR`, or in `OUT_DIR` where that cannot be written.

# %%
from concurrent.futures import ThreadPoolExecutor

HOME = PATHS["metadata"][0].parent
stamp = PATHS["metadata"][0].stat().st_mtime_ns  # what was made or unpacked anew is packed anew
KEY = hashlib.md5(json.dumps([n_mels, train, test, stamp]).encode()).hexdigest()[:12]
PACK = (DATA_DIR if os.access(DATA_DIR, os.W_OK) else OUT_DIR) / f"packed-{KEY}"


def read_utterance(name):
    """One file -> float16 (frames, n_mels), or what is wrong with it."""
    try:
        mel = torch.load(HOME / name, weights_only=True)
    except FileNotFoundError:
        return "is missing"
    except Exception as error:
        return f"is damaged ({type(error).__name__})"
    if not isinstance(mel, torch.Tensor) or mel.ndim != 2 or mel.shape[1] != n_mels or not len(mel):
        return f"has shape {tuple(getattr(mel, 'shape', ()))}, not (frames, {n_mels})"
    return mel.half().numpy() if bool(mel.isfinite().all()) else "has values that are no numbers"


# %%
def pack(names, size=2048):
    """All utterances -> PACK: frames.npy (all frames, n_mels), sizes.npy, sound.npy (mean and spread)."""
    parts, bad = [], []
    with ThreadPoolExecutor(16) as pool:
        for k in tqdm(range(0, len(names), size), "pack", disable=QUIET, leave=False):
            parts.append(Path(f"{PACK}-parts", f"{k}.npz"))
            if not parts[-1].exists():
                mels = list(pool.map(read_utterance, names[k : k + size]))
                bad += [f"{name} {mel}" for name, mel in zip(names[k:], mels) if isinstance(mel, str)]
                if bad:
                    continue
                sound = [np.r_[mel.mean(0, dtype=np.float32), mel.std(0, dtype=np.float32)] for mel in mels]
                with aside(parts[-1]) as part, part.open("wb") as file:
                    np.savez(file, frames=np.concatenate(mels), sizes=[len(m) for m in mels], sound=sound)
    if bad:
        raise Stop(f"{HOME}: {len(bad)} files cannot be used, fetch them again: {'; '.join(bad[:10])}")
    with aside(PACK) as folder:
        folder.mkdir()
        sizes = np.concatenate([np.load(part)["sizes"] for part in parts])
        np.save(folder / "sizes.npy", sizes)
        np.save(folder / "sound.npy", np.concatenate([np.load(part)["sound"] for part in parts]))
        shape = (int(sizes.sum()), n_mels)
        whole, at = np.lib.format.open_memmap(folder / "frames.npy", "w+", np.float16, shape), 0
        for part in parts:  # one part in memory at a time
            piece = np.load(part)["frames"]
            whole[at : at + len(piece)], at = piece, at + len(piece)
    shutil.rmtree(f"{PACK}-parts")


# %% [markdown]
# With the pack at hand: `gather` cuts any stretches out of it, as one batch. Shorter utterances are filled
# with zeros, and a **mask** says which frames are real. Everything after this respects the mask.

# %%
tic = time.perf_counter()
if MAIN:
    with hold(PACK):
        if not PACK.exists():
            pack([item[0] for item in train + test])
accelerator.wait_for_everyone()
frames = torch.from_numpy(np.load(PACK / "frames.npy", mmap_mode="c"))  # (all frames, n_mels) float16
size, sound = torch.from_numpy(np.load(PACK / "sizes.npy")), np.load(PACK / "sound.npy")
begin = size.cumsum(0) - size
y = torch.tensor([item[2] for item in train], device=device)
if on_gpu and torch.cuda.mem_get_info()[0] > 3 * frames.nbytes:
    frames = frames.to(device)
megabytes, seconds = frames.nbytes / 2**20, time.perf_counter() - tic
say(f"{len(frames):,} frames, {megabytes:,.0f} MB on {frames.device}, {seconds:.1f} s")
other = sum(int(told != found) for (_, told, _), found in zip(train + test, size.tolist()))
other and say(f"{other} utterances are longer or shorter than the lists say; the files are believed")


def gather(first, length, frames=frames):  # a default value: no checkpoint goes through the gigabytes
    """Stretches of `length` frames from `first` on -> x (batch, time, mel), mask (batch, time)."""
    place = torch.arange(int(length.max()))
    mask = place < length[:, None]
    rows = first[:, None] + torch.where(mask, place, 0)
    mask = mask.to(device)
    return frames[rows.to(frames.device)].to(device).float() * mask[..., None], mask


# %% [markdown]
# Look before you fit. Two utterances of one person and one of another: bright bands are the resonances of the
# mouth, they move with the vowels. Below, the mean spectra of one person's utterances. They fall into groups,
# and it is not the person who changes.

# %%
busiest = int(torch.bincount(y).argmax())
mine, others = (y == busiest).nonzero().ravel().cpu(), (y != busiest).nonzero().ravel().cpu()
fig, axes = plt.subplots(1, 3, figsize=(8, 2.2), sharey=True)
for axis, k in zip(axes, (mine[0], mine[-1], others[0])):
    x, _ = gather(begin[k, None], size[k, None].clamp(max=200))
    axis.imshow(x[0].T.cpu(), origin="lower", aspect="auto", vmin=-6, vmax=4)
    axis.set(title=speakers[int(y[k])], xlabel="frame (10 ms)")
axes[0].set_ylabel("mel band")
show("data.jpg")

# %% [markdown]
# ## Two ways to validate
#
# *Random*: any utterances are held out; their neighbours, from the same recording, stay in the training part.
# *Session-like*: the utterances of each speaker are clustered by their mean and spread in every band
# ($k$-means, $k = \max(2, n/10)$), so a cluster is more or less a recording, and **whole clusters** are held
# out: the speakers are known, the rooms are not, as in the test. Both are printed all along; everything is
# chosen by the session-like one.

# %%
from sklearn.cluster import KMeans


def split_sessions(y, sound, share, dice):
    """Hold out whole clusters of some speakers' utterances until `share` of all is reached."""
    held = np.zeros(len(y), bool)
    for speaker in dice.permutation(np.unique(y)):
        mine = np.flatnonzero(y == speaker)
        if held.sum() < share * len(y) and len(mine) > 3:
            groups = KMeans(max(2, len(mine) // 10), n_init=3, random_state=0).fit_predict(sound[mine])
            small = [k for k in np.unique(groups) if 2 * np.sum(groups == k) <= len(mine)]
            held[mine[groups == dice.choice(small)]] = True
    return held


def make_splits():
    """{"learn", "random", "session"}: numbers of training utterances."""
    dice, who = np.random.default_rng(SEED), y.cpu().numpy()
    session = split_sessions(who, sound[: len(who)].astype(float), 0.08, dice)
    rest = dice.permutation(np.flatnonzero(~session))
    random = np.sort(rest[: max(1, len(who) // 20)])
    learn = np.sort(rest[len(random) :])
    return dict(learn=learn, random=random, session=np.flatnonzero(session) if session.any() else random)


[splits] = broadcast_object_list([make_splits() if MAIN else None])
say(*(f"{name}: {len(numbers)} utterances" for name, numbers in splits.items()), sep=", ")
CHANNEL = bool(np.ptp(sound[:, :n_mels], 0).max() > 0.1)  # do recordings differ in their mean at all?
if not CHANNEL:
    say("Every utterance has the same mean: no channel is left, and the clusters mean little.")

# %%
groups = KMeans(max(2, len(mine) // 10), n_init=3, random_state=0).fit_predict(sound[mine].astype(float))
fig, axes = plt.subplots(1, 2, figsize=(8, 2.4))
for k, group in zip(mine, groups):
    axes[0].plot(sound[k, :n_mels], color=f"C{group}", linewidth=0.7)
axes[0].set(xlabel="mel band", ylabel="mean", title=f"{speakers[busiest]}, colour: cluster")
axes[1].hist(size.numpy(), bins=40)
axes[1].set(xlabel="frames", title="lengths of all utterances")
show("sessions.png")

# %% [markdown]
# ## The ladder
#
# One dictionary says what each level does. A data set of fewer than 5,000 utterances, such as the sample,
# gets smaller nets (so does a CPU: `PROFILE` small), and its training is counted in **steps**: its epochs are
# as many as make up that number, because a net learns by steps, however few utterances an epoch has.

# %% tags=["levels"]
if OFF:
    raise Stop(f"{HW} has no table of ideas yet: leave WITHOUT empty.")
PLAIN = dict(block="sample", width=80, layers=1, heads=2, ff=256, dropout=0.1, pool="mean", mfa=False)
PLAIN |= dict(normalise=False, augment=False, margin=0.0, smoothing=0.0, drop=0.0, crop=(128, 128), views=1)
PLAIN |= dict(batch_size=256, lr=2e-3, decay=0.01, epochs=12, steps=0, kernel=15, channels=64)
MEDIUM = dict(block="transformer", width=256, layers=4, heads=4, ff=512, dropout=0.2, crop=(192, 320))
MEDIUM |= dict(lr=1e-3, decay=0.05, epochs=30)
STRONG = MEDIUM | dict(block="conformer", dropout=0.15, crop=(200, 400), smoothing=0.1, epochs=40)
BOSS = STRONG | dict(layers=6, drop=0.1, mfa=True, pool="asp", normalise=True, augment=True, smoothing=0.0)
BOSS |= dict(margin=0.2, views=5, epochs=60)
LEVELS = {"simple": PLAIN, "medium": PLAIN | MEDIUM, "strong": PLAIN | STRONG, "boss": PLAIN | BOSS}
SMALL = dict(batch_size=64, lr=2e-3, channels=16, epochs=1, drop=0.0, views=1)
LESS = {
    "simple": SMALL | dict(width=40, crop=(64, 64), steps=300),
    "medium": SMALL | dict(width=64, layers=2, ff=128, dropout=0.1, crop=(64, 96), steps=300),
    "strong": SMALL | dict(width=64, layers=2, ff=128, dropout=0.1, crop=(80, 120), steps=400),
    "boss": SMALL | dict(width=64, layers=2, ff=128, dropout=0.1, crop=(80, 112), steps=400),
}
settings = LEVELS[LEVEL] | (LESS[LEVEL] if PROFILE != "full" or len(train) < 5000 else {})
if PROFILE == "full":
    settings |= dict(steps=4 * settings["steps"])  # the sample's runs are kept to two minutes
if PROFILE == "tiny":
    settings |= dict(width=32, ff=64, heads=2, channels=8, crop=(64, 80), batch_size=32, steps=100)
    settings |= dict(lr=2e-3, margin=min(settings["margin"], 0.1))
settings |= dict(batch_size=min(BATCH_SIZE or settings["batch_size"], len(splits["learn"])))
settings |= dict(pool=POOLING or settings["pool"])
each_epoch = -(-len(splits["learn"]) // settings["batch_size"])
settings |= dict(epochs=EPOCHS or max(settings["epochs"], -(-settings["steps"] // each_epoch)))
say(*(f"{name}: {value}" for name, value in settings.items()), sep=", ")

# %% [markdown]
# ## Self-attention
#
# Every frame makes a query, a key and a value; the query of one frame asks the keys of all:
#
# $$ Q, K, V = X W_q, X W_k, X W_v \qquad \mathrm{Attention}(X) =
# \mathrm{softmax}\Big( \frac{Q K^\top}{\sqrt{k}} \Big) V $$
#
# A frame outside the mask gets the score $-\infty$, so its weight is zero. What attention cannot see is
# **order**. The simple level ignores it, as the official sample does. From *medium* on, *rotary positions*
# turn each pair of query (and key) components by an angle in proportion to the frame's place: the product of
# a query and a key then knows how far apart they are, and nothing else about where they stand.

# %%
from torch import nn
from torch.nn import functional as F


def rotate(x):
    """Rotary positions: (batch, heads, time, k), each pair of components turned by time x its own speed."""
    half = x.shape[-1] // 2
    speed = 1000 ** (-torch.arange(half, device=x.device) / half)
    angle = torch.arange(x.shape[-2], device=x.device)[:, None] * speed  # (time, k / 2)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1).to(x.dtype)


class SelfAttention(nn.Module):
    def __init__(self, width, heads, dropout):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def split(self, x):
        """-> queries, keys, values (batch, heads, time, k)"""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return rotate(q), rotate(k), v

    def forward(self, x, mask):
        drop = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(*self.split(x), attn_mask=mask[:, None, None], dropout_p=drop)
        return self.out(y.transpose(1, 2).flatten(2))  # (batch, time, width)

    def weights(self, x):
        """The attention matrix, for looking at: (batch, heads, time, time)"""
        q, k, _ = self.split(x)
        return (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)


# %% [markdown]
# ## Blocks
#
# Simple: the official sample's layer, `nn.TransformerEncoderLayer`. Medium: attention, then a small net for
# each frame, both on *normalised* input and added to what was there (*pre-norm*, easier to train deep).


# %%
def feed_forward(width, inner, dropout):
    layers = nn.LayerNorm(width), nn.Linear(width, inner), nn.SiLU(), nn.Dropout(dropout)
    return nn.Sequential(*layers, nn.Linear(inner, width), nn.Dropout(dropout))


class SampleBlock(nn.TransformerEncoderLayer):  # simple
    def forward(self, x, mask):
        return super().forward(x, src_key_padding_mask=~mask)


class TransformerBlock(nn.Module):  # medium
    def __init__(self, width, heads, ff, dropout):
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(width), SelfAttention(width, heads, dropout)
        self.frame = feed_forward(width, ff, dropout)

    def forward(self, x, mask):
        x = x + self.attention(self.norm(x), mask)
        return x + self.frame(x)


# %% [markdown]
# Strong: the **Conformer** block (Gulati et al., 2020). Attention relates any two frames but has to learn
# from data that neighbours matter; a *depthwise* convolution, one small filter per channel, knows it from the
# start. The block puts attention and convolution between two half feed-forward nets:
#
# $$ \begin{aligned} x &\leftarrow x + \tfrac12 \mathrm{FFN}(x) &
# x &\leftarrow x + \mathrm{MHSA}(x) \\
# x &\leftarrow x + \mathrm{Conv}(x) &
# x &\leftarrow \mathrm{LN}(x + \tfrac12 \mathrm{FFN}(x)) \end{aligned} $$
#
# Padded frames are set to zero *before* the convolution, or they would leak into the last real frames. The
# paper has a BatchNorm inside; we take LayerNorm, whose statistics no padded frame can enter.


# %%
class Convolution(nn.Module):  # strong
    def __init__(self, width, kernel, dropout):
        super().__init__()
        self.norm, self.gate = nn.LayerNorm(width), nn.Linear(width, 2 * width)
        self.depthwise = nn.Conv1d(width, width, kernel, padding=kernel // 2, groups=width)
        self.after, self.out, self.dropout = nn.LayerNorm(width), nn.Linear(width, width), nn.Dropout(dropout)

    def forward(self, x, mask):
        x = F.glu(self.gate(self.norm(x)), -1) * mask[..., None]
        x = self.depthwise(x.transpose(1, 2)).transpose(1, 2)  # (batch, time, width)
        return self.dropout(self.out(F.silu(self.after(x))))


class ConformerBlock(nn.Module):  # strong
    def __init__(self, width, heads, ff, dropout, kernel, attention=True, convolution=True):
        super().__init__()
        self.first, self.last = feed_forward(width, ff, dropout), feed_forward(width, ff, dropout)
        self.before, self.norm = nn.LayerNorm(width) if attention else None, nn.LayerNorm(width)
        self.attention = SelfAttention(width, heads, dropout) if attention else None
        self.convolution = Convolution(width, kernel, dropout) if convolution else None

    def forward(self, x, mask):
        x = x + self.first(x) / 2
        if self.attention is not None:
            x = x + self.attention(self.before(x), mask)
        if self.convolution is not None:
            x = x + self.convolution(x, mask)
        return self.norm(x + self.last(x) / 2)


# %% [markdown]
# Before its blocks the Conformer looks at the spectrum as a picture: two 3 x 3 convolutions find edges in
# time and pitch, and halve the number of frames, so attention costs a quarter.


# %%
class Stem(nn.Module):  # strong
    def __init__(self, n_mels, channels, width):
        super().__init__()
        self.one = nn.Conv2d(1, channels, 3, stride=(1, 2), padding=1)
        self.two = nn.Conv2d(channels, channels, 3, stride=(2, 2), padding=1)
        self.out = nn.Linear(channels * -(-n_mels // 4), width)

    def forward(self, x, mask):
        x = F.silu(self.one(x[:, None])) * mask[:, None, :, None]  # (batch, channels, time, mel / 2)
        x = F.silu(self.two(x))  # (batch, channels, time / 2, mel / 4)
        return self.out(x.transpose(1, 2).flatten(2)), mask[:, ::2]


# %% [markdown]
# ## Pooling: from many vectors to one
#
# The mean of the frames gives silence and music the same say as speech. **Self-attentive pooling** (`sap`, on
# the homework's slides) learns one weight per frame, $e = \sum_t \alpha_t h_t$ with
# $\alpha = \mathrm{softmax}_t(w^\top \tanh(W h_t))$. **Attentive statistics pooling** (`asp`, boss) gives
# each channel weights of its own, shows the scorer the utterance's mean and spread, and returns the weighted
# mean *and* the weighted standard deviation. The weights sum to 1 over the real frames.


# %%
class Pool(nn.Module):
    """(batch, time, width) -> (batch, width), or twice the width for asp."""

    def __init__(self, kind, width, inner=128):
        super().__init__()
        self.kind, wanted = kind, {"mean": 0, "sap": 1, "asp": width}[kind]
        if wanted:
            seen = nn.Linear(width * 3 if kind == "asp" else width, inner)
            self.score = nn.Sequential(seen, nn.Tanh(), nn.Linear(inner, wanted))

    def weights(self, h, mask):
        """(batch, time, 1 or width), zero outside the mask, sum 1 over time"""
        mask = mask[..., None]
        even = mask / mask.sum(1, keepdim=True)
        if self.kind == "mean":
            return even
        if self.kind == "asp":
            h = torch.cat([h, *(part[:, None].expand_as(h) for part in statistics(h, even))], -1)
        return self.score(h).float().masked_fill(~mask, -1e4).softmax(1)  # finite: no nan, even in float16

    def forward(self, h, mask):
        mean, spread = statistics(h.float(), self.weights(h, mask))
        return torch.cat([mean, spread], -1) if self.kind == "asp" else mean


def statistics(h, weights):
    """Weighted mean and standard deviation over time."""
    mean = (weights * h).sum(1)
    return mean, ((weights * (h - mean[:, None]).square()).sum(1) + 1e-5).sqrt()


# %% [markdown]
# ## A loss with a margin
#
# Boss: speakers as directions. The embedding $e$ and one vector $w_j$ per speaker are scaled to length 1, so
# their product is the cosine of the angle between them. **Additive margin softmax** demands that the right
# speaker wins by a margin $m$:
#
# $$ L = -\log \frac{e^{s (\cos\theta_y - m)}}
# {e^{s (\cos\theta_y - m)} + \sum_{j \ne y} e^{s \cos\theta_j}} $$
#
# The picture says what the two numbers do. Left: without a margin the border between two speakers lies in the
# middle; with it, each must stay in a narrower sector, and a gap opens. Right: cosines end at 1, so without
# the **scale** ($s = 1$) the loss cannot come near zero, however good the angle. With $s = 30$ and no margin
# it is content too early; the margin keeps pulling. A large margin from the start would pull before there is
# anything to pull at: it grows during the first 30 % of the training.

# %%
SCALE = 30.0


def margin_loss(cosine, y, margin):
    """Additive margin softmax of cosines (batch, speakers); with margin 0 cross-entropy of scaled cosines."""
    return F.cross_entropy(SCALE * (cosine - margin * F.one_hot(y, cosine.shape[1])), y)


def margin_at(progress):
    """Up to its full size during the first 30 % of the training, half as much again in the last 10 %."""
    return settings["margin"] * (min(1.0, progress / 0.3) if progress < 0.9 else 1.5)


fig, axes = plt.subplots(1, 2, figsize=(8, 2.9), width_ratios=(1, 1.6))
angle, (one, two) = np.linspace(-np.pi, np.pi, 2001), np.radians([75, -5])
lead = np.cos(angle - one) - np.cos(angle - two)
for margin, radius in ((0.0, 0.9), (0.2, 1.0), (0.4, 1.1)):
    for k, wins in enumerate((lead > margin, -lead > margin)):
        there = np.where(wins, radius, np.nan)
        axes[0].plot(there * np.cos(angle), there * np.sin(angle), color=f"C{k}", linewidth=3)
for k, direction in enumerate((one, two)):
    end = 0.8 * np.cos(direction), 0.8 * np.sin(direction)
    axes[0].annotate("", end, (0, 0), arrowprops={"color": f"C{k}", "width": 1.5})
    axes[0].text(end[0] / 2 - 0.3, end[1] / 2 + 0.1, f"$w_{k + 1}$")
axes[0].set(aspect="equal", title="who may sit where:\n$m$ = 0, 0.2, 0.4 from inside")
axes[0].set_axis_off()
degrees = torch.linspace(0, 120, 121)
rivals = torch.zeros(len(degrees), len(speakers) - 1)  # all others at a right angle
for scale, margin in ((1, 0.0), (10, 0.0), (30, 0.0), (30, 0.2)):
    cosine = torch.cat([(degrees.deg2rad().cos() - margin)[:, None], rivals], 1)
    axes[1].plot(degrees, -(scale * cosine).log_softmax(1)[:, 0], label=f"$s$ = {scale}, $m$ = {margin}")
axes[1].set(xlabel="angle to the right speaker (degrees)", ylabel="loss", ylim=(-0.3, 8))
axes[1].legend()
show("margin.png")

# %% [markdown]
# ## The whole net
#
# First the head: from the pooled vector to an embedding, from the embedding to one score per speaker. The
# boss's scores are cosines.


# %%
class CosineHead(nn.Linear):  # boss: no bias, lengths do not count
    def forward(self, x):
        return F.linear(F.normalize(x.float()), F.normalize(self.weight.float()))


def make_embedding(pooled, width):
    if settings["margin"]:  # boss
        return nn.Sequential(nn.BatchNorm1d(pooled), nn.Linear(pooled, width), nn.BatchNorm1d(width))
    norm = nn.Identity() if settings["block"] == "sample" else nn.BatchNorm1d(width)  # medium
    return nn.Sequential(nn.Linear(pooled, width), norm, nn.ReLU())


# %% [markdown]
# Then all together: stem, blocks, pooling, embedding, head. The boss hands the output of *every* block to the
# pooling (the idea of MFA-Conformer: early blocks keep what later ones forget), and on large data skips a
# block now and then during training (*stochastic depth*).


# %%
class SpeakerNet(nn.Module):
    """Spectra (batch, time, mel) and a mask -> one score per speaker (batch, speakers)"""

    def __init__(self, n_mels, n_speakers, attention=True, convolution=True):
        super().__init__()
        s, width = settings, settings["width"]
        sizes, self.drop, self.mfa = (width, s["heads"], s["ff"], s["dropout"]), s["drop"], s["mfa"]
        make = {
            "sample": lambda: SampleBlock(*sizes, batch_first=True),
            "transformer": lambda: TransformerBlock(*sizes),
            "conformer": lambda: ConformerBlock(*sizes, s["kernel"], attention, convolution),
        }[s["block"]]
        conformer, seen = s["block"] == "conformer", width * (s["layers"] if s["mfa"] else 1)
        self.stem = Stem(n_mels, s["channels"], width) if conformer else nn.Linear(n_mels, width)
        self.blocks = nn.ModuleList(make() for _ in range(s["layers"]))
        self.norm = nn.Identity() if s["block"] == "sample" else nn.LayerNorm(seen)
        self.pool = Pool(s["pool"], seen)
        self.embed = make_embedding(seen * (2 if s["pool"] == "asp" else 1), width)
        self.head = (CosineHead if s["margin"] else nn.Linear)(width, n_speakers, bias=not s["margin"])

    def frames(self, x, mask):
        """What the pooling sees: (batch, time or half of it, width), and its mask"""
        h, mask = self.stem(x, mask) if isinstance(self.stem, Stem) else (self.stem(x), mask)
        outputs = []
        for block in self.blocks:
            new = block(h, mask)
            if self.training and self.drop:
                keep = torch.rand(len(h), 1, 1, device=h.device) >= self.drop
                new = h + keep * (new - h) / (1 - self.drop)
            outputs.append(h := new)
        return self.norm(torch.cat(outputs, -1) if self.mfa else h), mask

    def embedding(self, x, mask):
        return self.embed(self.pool(*self.frames(x, mask)))

    def forward(self, x, mask):
        return self.head(self.embedding(x, mask))


# %% [markdown]
# ## Rooms: take them out, or put many in
#
# A room adds a constant to each band. **Mean normalisation** subtracts each band's mean over the utterance:
# every constant is gone, no net needed. What is left depends on the noise, so the boss also *augments*, on
# the device and for the whole batch at once: a random smooth channel curve, another utterance as background
# noise (energies add up, so logarithms combine by `logaddexp`), and stripes of bands and frames set to zero
# (SpecAugment). No shift along the bands: that would make another speaker.


# %%
def normalise(x, mask):
    mean = x.sum(1, keepdim=True) / mask.sum(1)[:, None, None]  # frames outside the mask are zero
    return (x - mean) * mask[..., None]


def stripes(batch, size, widest, count=2):
    """`count` random stretches per example: (batch, size), true inside"""
    start, width = torch.rand(2, batch, count, 1, device=device)
    start, width = size * start, widest * width
    place = torch.arange(size, device=device)
    return ((start <= place) & (place < start + width)).any(1)


def augment(x):
    """Another channel for every example, other voices behind some."""
    batch, _, mels = x.shape
    k = torch.arange(1, 5, device=device)
    waves = torch.cos(torch.pi * k[:, None] * (torch.arange(mels, device=device) + 0.5) / mels)  # (4, mel)
    curve = (0.7 * torch.randn(batch, 4, device=device) / k) @ waves
    x = x + curve[:, None] + 0.5 * torch.randn(batch, 1, 1, device=device)
    softer = 1.15 + 2.3 * torch.rand(batch, 1, 1, device=device)  # 5 to 15 dB
    noisy = torch.rand(batch, 1, 1, device=device) < 0.3
    return torch.where(noisy, torch.logaddexp(x, x.roll(1, 0) - softer), x)


def prepare(x, mask, training=False, stripe=True):
    """What the net sees of a batch, by level."""
    if training and settings["augment"] and CHANNEL:
        x = augment(x) * mask[..., None]
    if settings["normalise"]:
        x = normalise(x, mask)
    if training and settings["augment"] and stripe:
        bands, times = stripes(len(x), n_mels, 8), stripes(len(x), x.shape[1], 0.1 * x.shape[1])
        x = x.masked_fill(bands[:, None] | times[..., None], 0)
    return x


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
# ## Whole utterances
#
# Training sees segments, the test asks about whole utterances. `predict` sorts them by length, so a batch
# needs little padding, and limits a batch by its *frames*: one utterance of 5,000 frames costs more than
# fifty of 100. On large data the boss adds five windows of each long utterance and averages the cosines (on
# the sample's short ones that did not help in validation). Every process does its share.

# %%
CAP = 200_000 if on_gpu else 16_000  # frames in a batch, padding included


def buckets(length):
    """Numbers sorted by length, cut so that no batch has more than CAP frames, one utterance at least."""
    parts, part = [], []
    for k in length.argsort(stable=True).tolist():
        if part and (len(part) + 1) * length[k] > CAP:
            parts, part = [*parts, torch.tensor(part)], []
        part.append(k)
    return [*parts, torch.tensor(part)] if part else parts


def stretches(numbers, views):
    """Whole utterances, and `views` windows of the long ones: row, first frame, length."""
    window, every = settings["crop"][1], torch.arange(len(numbers))
    first, length = begin[numbers], size[numbers]
    long = every[length > window] if views > 1 else every[:0]
    shift = ((length[long] - window)[:, None] * torch.linspace(0, 1, max(views, 2))).long()
    rows = torch.cat([every, long.repeat_interleave(shift.shape[1])])
    first = torch.cat([first, (first[long][:, None] + shift).ravel()])
    return rows, first, torch.cat([length, torch.full((len(rows) - len(every),), window)])


@torch.no_grad()
def predict(net, numbers, views=1):
    """Mean scores of utterances (numbers, speakers), the same on every process."""
    net.eval()
    row, first, length = stretches(torch.as_tensor(numbers), views)
    scores = torch.zeros(len(numbers), len(speakers), device=device)
    for part in buckets(length)[accelerator.process_index :: accelerator.num_processes]:
        x, mask = gather(first[part], length[part])
        with accelerator.autocast():
            scores.index_add_(0, row[part].to(device), net(prepare(x, mask), mask).float())
    return accelerator.reduce(scores) / row.bincount()[:, None].to(device)


def evaluate(net, views=1):
    """Accuracy on both validation parts."""
    guess = {name: predict(net, splits[name], views).argmax(1) for name in ("random", "session")}
    return {name: float((guess[name] == y[splits[name]]).float().mean()) for name in guess}


# %% [markdown]
# ## Training
#
# Around the loop: AdamW that shrinks matrices only, a rate that warms up and falls along a cosine, and an
# **exponential moving average** of the weights, which is what gets evaluated. The best average so far is kept
# as a *copy*; the official sample keeps a reference, which goes on changing, so its "best" is its newest.


# %%
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn


def make_training(net, total):
    """Optimizer, schedule and average for `total` steps."""
    matrices = [weight for weight in net.parameters() if weight.ndim > 1]
    others = [weight for weight in net.parameters() if weight.ndim <= 1]
    groups = [{"params": matrices}, {"params": others, "weight_decay": 0.0}]
    how = dict(betas=(0.9, 0.98), weight_decay=settings["decay"], fused=True)
    optimizer, warm = torch.optim.AdamW(groups, settings["lr"], **how), max(1, total // 10)
    rate = lambda step: float(min(1, (step + 1) / warm) * (1 + np.cos(np.pi * step / total)) / 2)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    smooth = get_ema_multi_avg_fn(1 - min(0.1, 10 / total))  # it forgets in a tenth of the training
    return optimizer, scheduler, AveragedModel(net, device, multi_avg_fn=smooth, use_buffers=True)


def keep_best(best, score, net):
    """Copies, not references."""
    if score >= best["score"]:
        best |= {name: weight.clone() for name, weight in net.state_dict().items()}
        best["score"] = torch.tensor(score)


# %% [markdown]
# What one step needs: random segments, all in a batch equally long, but not from batch to batch; the loss of
# the level; and a look at what comes out.


# %%
def loss_of(scores, y, progress, ease):
    """The margin loss, or cross-entropy with some doubt about the label."""
    if settings["margin"]:
        return margin_loss(scores, y, margin_at(progress) * ease)
    return F.cross_entropy(scores, y, label_smoothing=settings["smoothing"])


def segments(numbers, dice, longer=1.0):
    """A random stretch of each utterance (all of it, if it is shorter)."""
    low, high = settings["crop"]
    length = int(longer * torch.randint(low, high + 1, (), generator=dice))
    room = (size[numbers] - length).clamp(min=0) + 1
    return gather(begin[numbers] + (torch.rand(len(numbers)) * room).long(), size[numbers].clamp(max=length))


def log(stage, epoch, loss, valid, lr, seconds, examples, loud):
    """A line for the reader, a row for the curves."""
    row = dict(stage=stage, epoch=epoch, loss=loss, **valid, lr=lr)
    history.append(row | dict(seconds=seconds, examples_per_second=examples / seconds))
    scores = "  ".join(f"{name} {value:.3f}" for name, value in valid.items())
    text = f"{stage} {epoch:3d}  loss {loss:.3f}  {scores}"
    if loud:
        say(f"{text}  lr {lr:.1e}  {seconds:.1f} s  {examples / seconds:,.0f} segments/s")


def check(stage, guard, loss, progress):
    """Is the training in order?"""
    if guard["bad"] >= 20:
        raise Stop(f"{stage} diverged, no finite gradient in 20 steps: take another SEED or BATCH_SIZE.")
    others = len(speakers) - 1  # below: the loss if all cosines are equal
    blind = np.log1p(others * np.exp(SCALE * margin_at(progress)))
    if stage == "train" and settings["margin"] and 0.2 <= progress < 0.5 and loss > blind:
        say("The loss is no better than guessing: the margin is halved.")
        guard["ease"] = guard["ease"] / 2


# %% [markdown]
# The loop. A step with a gradient that is not finite is skipped on the device (`found_inf`); twenty in a row
# end the run with a sentence. If the loss is no better than guessing after a fifth of the training, the
# margin was too much: it is halved.


# %% tags=["train"]
def train_net(stage, net, epochs):
    """Train `net`; returns it with the best averaged weights, and their validation scores."""
    parts, learn = accelerator.num_processes, torch.as_tensor(splits["learn"])
    share = len(learn) // parts
    steps = -(-share // max(1, settings["batch_size"] // parts))
    every, total = -(-epochs // 12), epochs * steps
    optimizer, scheduler, ema = make_training(net.to(device), total)
    model, optimizer = accelerator.prepare(net, optimizer)
    ease = torch.tensor(float(stage == "train"))  # the experiment has no margin: too short for one
    guard = {"bad": torch.zeros((), device=device), "ease": ease}
    best = {"score": torch.tensor(-1.0)}
    state = dict(model=model, ema=ema, optimizer=optimizer, scheduler=scheduler, guard=guard, best=best)
    learned = sound[: len(train)]  # mean and spread of the utterances stand for their frames: see gather
    done = load_checkpoint(stage, [train_net, net, epochs, learned], **state)
    tic, since, total_loss = time.perf_counter(), done, torch.zeros((), device=device)
    for epoch in tqdm(range(done + 1, epochs + 1), stage, disable=QUIET, leave=False):
        model.train()
        dice = torch.Generator().manual_seed(SEED + epoch)  # the same order in every process
        order = learn[torch.randperm(len(learn), generator=dice)]
        order = order[: share * parts][accelerator.process_index :: parts]
        for step, numbers in enumerate(order.tensor_split(steps), (epoch - 1) * steps):
            final = step >= 0.9 * total  # the last tenth: longer segments, no stripes
            x, mask = segments(numbers, dice, 1.5 if final else 1.0)
            scores = model(prepare(x, mask, training=True, stripe=not final), mask)
            loss = loss_of(scores, y[numbers], step / total, float(guard["ease"]))
            optimizer.zero_grad()
            accelerator.backward(loss)
            good = torch.isfinite(accelerator.clip_grad_norm_(model.parameters(), 5.0))
            optimizer.optimizer.found_inf = 1.0 - good.float()
            optimizer.step()
            scheduler.step()
            ema.update_parameters(bare(model))
            guard["bad"] = torch.where(good, 0.0, guard["bad"] + 1)
            total_loss += torch.where(good, loss.detach(), 0.0) / steps
        if epoch % every == 0 or epoch == epochs:
            valid = evaluate(ema.module)
            keep_best(best, valid["session"], ema.module)
            seconds, loss = time.perf_counter() - tic, total_loss.item() / (epoch - since)
            speed = scheduler.get_last_lr()[0], seconds, (epoch - since) * len(learn)
            log(stage, epoch, loss, valid, *speed, loud=stage == "train" or epoch == epochs)
            check(stage, guard, loss, epoch / epochs)
            save_checkpoint(stage, epoch, **state)
            tic, since, total_loss = time.perf_counter(), epoch, torch.zeros_like(total_loss)
    bare(model).load_state_dict({name: best[name] for name in bare(model).state_dict()})
    return bare(model)


# %% [markdown]
# Train, and look at both validations of the weights that were kept.

# %%
set_seed(SEED)
net = train_net("train", SpeakerNet(n_mels, len(speakers)), settings["epochs"])
valid = evaluate(net, settings["views"])
speeds = [row["examples_per_second"] for row in history if row["stage"] == "train"]
summary = dict(valid_score=valid["session"], validation=valid, examples_per_second=float(np.median(speeds)))
summary |= dict(parameters=sum(weight.numel() for weight in net.parameters()))
say(f"{summary['parameters']:,} parameters; accuracy on whole utterances held out:", end=" ")
say(f"random {valid['random']:.3f}, session-like {valid['session']:.3f}")

# %%
lines = [row for row in history if row["stage"] == "train"]
fig, axes = plt.subplots(1, 2, figsize=(8, 2.4))
axes[0].plot([row["epoch"] for row in lines], [row["loss"] for row in lines], ".-")
axes[0].set(xlabel="epoch", title="loss on segments")
for name in ("random", "session"):
    axes[1].plot([row["epoch"] for row in lines], [row[name] for row in lines], ".-", label=name)
axes[1].set(xlabel="epoch", title="accuracy on whole utterances", ylim=(0, 1.02))
axes[1].legend()
show("curves.png")

# %% [markdown]
# The test utterances, whole, and the one speaker with the highest mean score. No margin here: it is a demand
# on training.

# %% tags=["predict"]
scores = predict(net, np.arange(len(train), len(train) + len(test)), settings["views"]).cpu()
prediction = [speakers[k] for k in scores.argmax(1).tolist()]
say(f"{len(prediction)} utterances, {len(set(prediction))} of {len(speakers)} speakers named")

# %% [markdown]
# ## Submission

# %% tags=["submission"]
submission = OUT / ("submission.csv" if REAL else "submission.sample.csv")
test_files = [item[0] for item in test]


def write_submission(path):
    with aside(path) as part, part.open("w", newline="") as file:
        file.write("Id,Category\n")
        file.writelines(f"{name},{who}\n" for name, who in zip(test_files, prediction))


def check_submission(path):
    """Raises Stop with what the judge would not take."""
    lines = path.read_bytes().decode().split("\n")
    rows = [line.split(",") for line in lines[1:-1]]
    if lines[0] != "Id,Category" or lines[-1]:
        raise Stop(f"{path} must begin with the line Id,Category and end with a line break")
    for line, row in zip(lines[1:], rows):
        if len(row) != 2 or row[1] not in number:
            raise Stop(f"{path}: {line!r} must be a file and a speaker's name such as {speakers[0]}")
    names = [row[0] for row in rows]
    if len(set(names)) < len(names):
        raise Stop(f"{path} names {next(name for name in names if names.count(name) > 1)} twice")
    if names != test_files:
        raise Stop(f"{path} must have the {len(test_files)} files of testdata.json, in its order")
    if 2 * len({row[1] for row in rows}) < min(len(number), len(rows)):
        say(f"WARNING: {path} names only {len({row[1] for row in rows})} of {len(number)} speakers")


def score_submission(path, answers):
    """The judge: the share of right names."""
    truth = dict(line.split(",") for line in (answers / "answers.csv").read_text().split()[1:])
    rows = [line.split(",") for line in path.read_text().split()[1:]]
    return np.mean([truth[name] == who for name, who in rows])


if MAIN:
    write_submission(submission)
    say(submission.read_text()[:120], "...")


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
# The homework asks two questions. **1. Introduce one variant of the Transformer.** We take the Conformer, the
# block above: the picture shows it, the table counts its parameters against a plain block of the same width.

# %%
names = ["frames", "½ feed-\nforward", "self-\nattention", "convo-\nlution", "½ feed-\nforward", "LayerNorm"]
fig, axis = plt.subplots(figsize=(8, 1.6))
around = dict(arrowstyle="->", connectionstyle="arc3,rad=-0.5")
for k, name in enumerate(names):
    color = {2: "#cfe3f7", 3: "#fbd9c4"}.get(k, "#eeeeee")
    axis.text(k, 0, name, ha="center", va="center", bbox=dict(boxstyle="round,pad=0.5", fc=color))
    if k:
        axis.annotate(
            "", (k - 0.33, 0), (k - 0.67 if k == 1 else k - 0.45, 0), arrowprops={"arrowstyle": "->"}
        )
    if 1 <= k <= 4:  # the way around each part
        axis.annotate("", (k + 0.5, 0.16), (k - 0.5, 0.05), arrowprops=around)
        axis.text(k + 0.5, 0, "+", ha="center", va="center", fontsize=15)
axis.set(xlim=(-0.5, 5.5), ylim=(-0.6, 1.2))
axis.set_axis_off()
show("conformer.png")
sizes = settings["width"], settings["heads"], settings["ff"], settings["dropout"]
for block in (SampleBlock(*sizes), TransformerBlock(*sizes), ConformerBlock(*sizes, settings["kernel"])):
    say(f"{type(block).__name__:17} {sum(weight.numel() for weight in block.parameters()):9,} parameters")

# %% [markdown] tags=["report"]
# One more variant, for its cost. Softmax attention compares all pairs of frames: twice the frames, four times
# the work. *Linear attention* (Katharopoulos et al., 2020) replaces $\exp(q^\top k)$ by
# $\phi(q)^\top \phi(k)$ with $\phi = \mathrm{elu} + 1$, and then brackets can move:
# $\phi(Q)\,(\phi(K)^\top V)$ never builds the big matrix.


# %%
def softmax_attention(q, k, v):
    return (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1) @ v


def linear_attention(q, k, v):
    q, k = F.elu(q) + 1, F.elu(k) + 1
    return q @ (k.transpose(-1, -2) @ v) / (q @ k.sum(-2)[..., None])


def seconds_for(work, repeats=5):
    times = []
    for _ in range(repeats):
        tic = time.perf_counter()
        work()
        on_gpu and torch.cuda.synchronize()
        times.append(time.perf_counter() - tic)
    return float(np.median(times))


lengths = [100, 200, 400, 800, 1600]
plt.figure(figsize=(8, 2.4))
for attend in (softmax_attention, linear_attention):
    qkv = {n: torch.randn(3, 1, 4, n, 32, device=device) for n in lengths}
    cost = [1e3 * seconds_for(lambda: attend(*qkv[n])) for n in lengths]
    grows = f"800 to 1,600 frames: {cost[-1] / cost[-2]:.1f} times as long"
    plt.plot(lengths, cost, ".-", label=f"{attend.__name__}, {grows}")
plt.loglog()
plt.xticks(lengths, lengths)
plt.xlabel("frames")
plt.ylabel("milliseconds")
plt.legend()
show("cost.png")

# %% [markdown] tags=["report"]
# **2. Why does convolution help in a Transformer?** An experiment: the boss's net with both, without the
# convolution in its blocks, and without the attention; each trained for a quarter of the epochs, with the
# same seed and no margin. (The two convolutions of the stem are in all three.)

# %%
if ABLATION and LEVEL == "boss":
    kinds = {"both": (True, True), "attention only": (True, False), "convolution only": (False, True)}
    ablation = {}
    for name, (attention, convolution) in kinds.items():
        set_seed(SEED)
        part = SpeakerNet(n_mels, len(speakers), attention, convolution)
        ablation[name] = evaluate(train_net(f"ablation {name}", part, -(-settings["epochs"] // 4)))
    fig, axis = plt.subplots(figsize=(8, 2.2))
    for k, split in enumerate(("random", "session")):
        bars = axis.bar(np.arange(3) + 0.4 * k, [row[split] for row in ablation.values()], 0.38, label=split)
        axis.bar_label(bars, fmt="%.2f")
    axis.set_xticks(np.arange(3) + 0.2, ablation)
    axis.set(ylabel="accuracy", ylim=(0, 1.15))
    axis.legend(loc="upper right", ncols=2)
    show("ablation.png")
    summary["ablation"] = ablation
else:
    say("the experiment belongs to the boss level, with ABLATION on")

# %% [markdown] tags=["report"]
# What the two have learned, in the first block: one head's attention over one utterance, and the filters of
# the depthwise convolution, one row per channel. Why convolution helps, in words: what tells voices apart (a
# vowel, a tremor) is a *local pattern* that may come at any time; a filter that is the same everywhere has
# this built in, needs fewer examples, and knows the order of the frames without being told positions.
# Attention brings what a filter of 15 frames cannot reach.

# %%
if settings["block"] == "conformer":
    seen, block = [], net.blocks[0]
    hook = block.attention.register_forward_hook(lambda layer, given, out: seen.append(given[0]))
    chosen = torch.as_tensor(splits["session"][:1])
    with torch.no_grad():
        net.embedding(prepare(*(given := gather(begin[chosen], size[chosen].clamp(max=400)))), given[1])
        matrix = block.attention.weights(seen[0])[0, 0].float().cpu()
    hook.remove()
    fig, axes = plt.subplots(1, 2, figsize=(8, 2.8))
    axes[0].imshow(matrix, aspect="auto", vmax=float(matrix.quantile(0.99)))
    axes[0].set(xlabel="looks at position", ylabel="position", title="attention, block 1, head 1")
    filters = block.convolution.depthwise.weight[:, 0].detach().cpu()
    limit = float(filters.abs().max())
    axes[1].imshow(filters, aspect="auto", cmap="RdBu", vmin=-limit, vmax=limit)
    axes[1].set(xlabel="frame of the filter", ylabel="channel", title="depthwise filters, block 1")
    show("inside.jpg")
else:
    say("there are no such blocks at this level")

# %% [markdown] tags=["report"]
# **Which validation tells the truth?** The levels that were run in this folder so far. With the same rooms in
# both parts, the random split can look good for the wrong reason. The session-like one is strict: a speaker
# who lost a whole cluster has fewer rooms to learn from than in the test.


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


beside = other_levels({"validation": valid, "score": score}, "validation", "score")
for level, row in beside.items():
    there = "" if row["score"] is None else f"   hidden answers {row['score']:.3f}"
    say(f"{level:8}", *(f"  {name} {value:.3f}" for name, value in row["validation"].items()), there)
fig, axis = plt.subplots(figsize=(8, 2.4))
for name in ("random", "session"):
    line = [row["validation"][name] for row in beside.values()]
    axis.plot(list(beside), line, "o--", label=f"validation, {name}")
if score is not None:
    line = [row["score"] for row in beside.values()]
    axis.plot(list(beside), line, "k*", markersize=11, label="hidden answers")
axis.set(ylabel="accuracy", ylim=(0, 1.05))
axis.legend()
show("validation.png")

# %% [markdown] tags=["report"]
# **Where is it wrong, and what does the embedding look like?** Left: held-out utterances by length. Right:
# the embeddings of ten speakers along their two main directions; crosses are utterances from clusters that
# the net has not learned from.

# %%
held = np.concatenate([splits["random"], splits["session"]])
right = (predict(net, held, settings["views"]).argmax(1) == y[held]).cpu().numpy()
order = np.argsort(size[held].numpy(), kind="stable")
fig, axes = plt.subplots(1, 2, figsize=(8, 2.8))
for part in np.array_split(order, 5):
    span = size[held[part]]
    axes[0].bar(f"{span.min()}-\n{span.max()}", right[part].mean(), color="C0") if len(part) else None
axes[0].set(xlabel="frames", ylabel="accuracy", ylim=(0, 1.05))
ten = np.unique(y[splits["session"]].cpu())[:10]
ten = np.r_[ten, np.setdiff1d(np.arange(len(speakers)), ten)][:10]
chosen = np.concatenate([np.flatnonzero((y == k).cpu())[:24] for k in ten.tolist()])
with torch.no_grad():
    given = gather(begin[chosen], size[chosen].clamp(max=600))
    places = F.normalize(net.embedding(prepare(*given), given[1])).float().cpu().numpy()
places = (places - places.mean(0)) @ np.linalg.svd(places - places.mean(0), full_matrices=False)[2][:2].T
fresh = np.isin(chosen, splits["session"])
for mark, part in ((".", ~fresh), ("x", fresh)):
    colors = [f"C{list(ten).index(k)}" for k in y[chosen[part]].tolist()]
    axes[1].scatter(*places[part].T, c=colors, marker=mark, s=22)
axes[1].set(title="10 speakers", xticks=[], yticks=[])
show("errors.png")

# %% [markdown] tags=["report"]
# **What is it worth to pack and to batch?** Loading segments the official way (open the file, cut a stretch)
# and ours (one index); whole utterances one by one and in buckets. Padding must not change an answer: the two
# ways are compared.

# %%
some = torch.as_tensor(np.random.default_rng(SEED).permutation(splits["learn"])[:256])
tail = torch.as_tensor(np.arange(len(train), len(train) + len(test))[:100])


def load_files():
    for k in some.tolist():
        mel = torch.load(HOME / train[k][0], weights_only=True)
        start = int(torch.rand(()) * max(1, len(mel) - 128))
        mel[start : start + 128].clone()


@torch.no_grad()
def one_by_one():
    given = (gather(begin[k, None], size[k, None]) for k in tail)
    return torch.cat([net(prepare(x, mask), mask).argmax(1) for x, mask in given])


dice = torch.Generator().manual_seed(SEED)
speed = {"segments/s by torch.load": len(some) / seconds_for(load_files)}
speed["segments/s by one index"] = len(some) / seconds_for(lambda: segments(some, dice))
speed["utterances/s one by one"] = len(tail) / seconds_for(one_by_one, 1)
speed["utterances/s in buckets"] = len(tail) / seconds_for(lambda: predict(net, tail), 1)
for name, value in speed.items():
    say(f"{value:12,.0f} {name}")
summary["agreement"] = float((one_by_one() == predict(net, tail).argmax(1)).float().mean())
say(f"the same answer for {summary['agreement']:.1%} of {len(tail)} utterances")

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
