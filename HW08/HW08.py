# %% [markdown] tags=["header"]
# # HW08 · Anomaly detection: which picture is no normal face?
#
# <!-- badges -->
# [![Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/ml2022-notebooks/ml2022-spring/blob/main/HW08/HW08.ipynb)
# [![Kaggle](https://kaggle.com/static/images/open-in-kaggle.svg)](https://kaggle.com/kernels/welcome?src=https://github.com/ml2022-notebooks/ml2022-spring/blob/main/HW08/HW08.ipynb)
# <!-- /badges -->
#
# ![The test images that the detector finds most normal, and those that it finds least normal](hero)
#
# There are only normal faces to learn from, and each test image needs a number: how strange is it? The
# lecture's answer is the **autoencoder**. It squeezes an image into a short code and rebuilds it; what it has
# never seen, it rebuilds badly, so the error is the score. The trap: an autoencoder that is too good rebuilds
# everything, strange things too. How narrow the code is, what the encoders see and an extra classifier decide.
#
# 訓練資料只有正常的人臉，每張測試影像都要給一個分數：它有多異常？課程的答案是**自編碼器**：把影像壓成很短的編碼再還原，沒看過的東西還原得差，誤差就是異常分數。陷阱在於太強的自編碼器什麼都還原得了，連異常也不例外。關鍵在於瓶頸有多窄、編碼器看到什麼，以及額外的分類器。
#
# <!-- box -->
# > **Press *Run all*.** This run is *boss*: expect AUC 0.882 on the sample in about 2 minutes on two CPU cores. GPU: not measured.
# <!-- /box -->
#
# Lectures: [auto-encoder](https://youtu.be/3oHlf8-J3Nc), [more about it](https://youtu.be/JZvEzb5PV3U),
# [anomaly detection](https://youtu.be/gDp2LXGnVLQ), [homework](https://youtu.be/qIHPBXl2BZU). The ladder, measured
# on the built-in sample (area under the ROC curve, AUC: 1 is perfect, 0.5 is chance; the mean of three seeds ±
# half their range), beside the course's public baselines on the real data:
#
# <!-- ladder -->
# | level | what it adds | sample | course baseline (real data) | seconds |
# |---|---|---|---|---|
# | simple | a convolutional autoencoder, as in the official sample | 0.5260 ± 0.0004 | 0.5315 | 61 |
# | medium | a narrow bottleneck | 0.6063 ± 0.0005 | 0.73171 | 38 |
# | strong | two encoders | 0.831 ± 0.002 | 0.77196 | 37 |
# | boss | mirrored images, and a critic that is shown the error | 0.882 ± 0.005 | 0.79506 | 114 |
# <!-- /ladder -->

# %% tags=["parameters"]
# @title Parameters
LEVEL = "boss"  # @param ["boss", "strong", "medium", "simple"]
WITHOUT = ""  # @param {type:"string"}
DATA = "auto"  # @param ["auto", "real", "sample"]
PROFILE = "auto"  # @param ["auto", "full", "small", "tiny"]
SEED = 2022  # @param {type:"integer"}
DATA_DIR = "data/HW08"  # @param {type:"string"}
OUT_DIR = "out/HW08"  # @param {type:"string"}
RESUME = True  # @param {type:"boolean"}
SUBMIT = False  # @param {type:"boolean"}

# %% cellView="form" jupyter={"source_hidden": true} tags=["homework"]
# @title Facts of this homework
HW, METRIC, HIGHER_IS_BETTER = "HW08", "AUC", True
SLUG, JUDGE = "ml2022spring-hw8", "https://www.kaggle.com/competitions/ml2022spring-hw8"
BASELINES = {"simple": 0.5315, "medium": 0.73171, "strong": 0.77196, "boss": 0.79506}
FILES = {  # images in the course's files
    "training": ("*training*.npy", 100000),
    "test": ("*testing*.npy", 19636),
}
MIRRORS = [  # {name here: address} of complete copies
    {"data.zip": "https://github.com/MachineLearningHW/HW8_Dataset/releases/download/v1.0.0/data.zip"},
]
HASHES = set()
OWN = {}  # this homework has no parameters of its own
NEEDS = {name: name for name in ("torch", "numpy", "pandas", "matplotlib", "tqdm", "accelerate", "filelock")}
NEEDS["sklearn"] = "scikit-learn"
MIXED_PRECISION = True
LESS_MEMORY = "set batch_size in SIZES to half"
KINDS = ["normal", "scrambled", "upside down", "third eye", "odd skin", "second mouth"]  # of the sample

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


# %% cellView="form" jupyter={"source_hidden": true} tags=["sample"]
# @title The sample: drawn faces, and five kinds of strange ones
import math

LINE = torch.linspace(-1, 1, 64)  # the places of the pixels, across and down


def column(numbers):
    return torch.as_tensor(np.asarray(numbers, np.float32)).view(-1, 1, 1)


def oval(place, x, y, wide, high, sharp):
    """Soft masks (n, 64, 64), near 1 inside an ellipse; `place`: where the pixels are in the face's frame."""
    across, down = (place[0] - column(x)) / column(wide), (place[1] - column(y)) / column(high)
    return (sharp - sharp * (across.square() + down.square()).sqrt()).sigmoid()


def paint(image, mask, colour):
    colour = torch.as_tensor(np.asarray(colour, np.float32))[:, :, None, None]
    image += mask[:, None] * (colour - image)


def backgrounds(n, dice):
    """A colour and three gratings: nobody can foretell them, and they say nothing."""
    image = torch.from_numpy(dice.uniform(0.15, 0.85, (n, 3, 1, 1)).astype(np.float32)).repeat(1, 1, 64, 64)
    for _ in range(3):
        turn, wave, phase = (
            column(dice.uniform(low, high, n)) for low, high in ((0, 3.14), (2, 9), (0, 6.28))
        )
        grating = torch.sin(wave * (turn.cos() * LINE + turn.sin() * LINE[:, None]) + phase)
        image += torch.from_numpy(dice.normal(0, 0.13, (n, 3, 1, 1)).astype(np.float32)) * grating[:, None]
    return image


def draw_parts(image, place, skin, hair, kind, dice):
    """Eyes, brows, nose and mouth, each where its kind wants it."""
    n = len(image)
    apart, level, third = dice.uniform(0.19, 0.25, n), dice.uniform(-0.16, -0.06, n), dice.uniform(0, 1, n)
    gape, nose, smile = dice.uniform(0.04, 0.1, n), dice.uniform(0.05, 0.08, n), dice.uniform(0.13, 0.22, n)
    iris, side = dice.uniform(0.05, 0.6, (n, 3)), dice.choice([-0.22, 0.22], n)
    move = dice.normal(0, 0.1, (2, 6, n)) * (kind == 1)
    mouth, white = skin * [0.8, 0.45, 0.45], np.full((n, 3), 0.95)

    def at(y):
        return np.where(kind == 2, 0.16 - y, y)  # upside down about the middle of the face

    def draw_eye(x, y):
        paint(image, oval(place, x, y, 0.1 + 0 * apart, 0.06, 8), white)
        paint(image, oval(place, x, y, 0.045 + 0 * apart, 0.05, 6), iris)

    for k, hand in enumerate((-1, 1)):
        draw_eye(hand * apart + move[0, k], at(level) + move[1, k])
        brow = oval(place, hand * apart + move[0, k + 2], at(level - 0.13) + move[1, k + 2], 0.12, 0.025, 5)
        paint(image, brow, hair)
    paint(image, oval(place, move[0, 4], at(level + 0.24) + move[1, 4], nose, 0.13, 5), skin * 0.85)
    paint(image, oval(place, move[0, 5], at(level + 0.47) + move[1, 5], smile, gape, 6), mouth)
    x, y = np.where(third < 0.5, 0, side), np.where(third < 0.5, -0.33, 0.2)  # forehead or cheek
    draw_eye(np.where(kind == 3, x, 9), y)
    paint(image, oval(place, np.where(kind == 5, x, 9), y, smile * 0.8, gape, 6), mouth)


def faces(kind, dice):
    """Pictures (n, 64, 64, 3) of these kinds: the numbers of KINDS."""
    n = len(kind)
    image, tone = backgrounds(n, dice), dice.uniform(0, 1, (n, 1))
    turn, right, down = column(dice.normal(0, 0.12, n)), *(column(dice.normal(0, 0.06, n)) for _ in range(2))
    x, y = LINE - right, LINE[:, None] - down
    place = [turn.cos() * x + turn.sin() * y, turn.cos() * y - turn.sin() * x]
    wide, high = dice.uniform(0.42, 0.52, n), dice.uniform(0.55, 0.68, n)
    skin = [0.95, 0.78, 0.65] - tone * [0.45, 0.45, 0.42]  # all tones of skin lie on one line
    skin = skin + dice.choice([-0.2, 0.2], (n, 3)) * (kind == 4)[:, None]
    hair = dice.uniform(0.05, 0.5, (n, 1)) * [1, 0.8, 0.6]
    light, (first, second) = dice.uniform(0.8, 1.15, n), dice.normal(0, 0.1, (2, n))
    paint(image, oval(place, 0 * wide, -0.12, wide * 1.18, high * 1.15, 12), hair)
    face = oval(place, 0 * wide, 0.05, wide, high, 12)
    paint(image, face, skin)
    image *= (1 + face * (column(first) * x + column(second) * y))[:, None]
    draw_parts(image, place, skin, hair, kind, dice)
    image = image * column(light)[:, None] + torch.from_numpy(dice.normal(0, 0.03, image.shape)).float()
    return (image.clamp(0, 1) * 255).byte().permute(0, 2, 3, 1).numpy()


def make_sample(folder, answers):
    """The course's two files; the kinds of the test part lie elsewhere."""
    counts = (400, 300) if PROFILE == "tiny" else (3000, 1600)
    (folder / "data").mkdir()
    for name, count in zip(("training", "testing"), counts):
        dice = np.random.default_rng([2022, count])
        kind = np.zeros(count, int)
        if name == "testing":
            kind[: count // 2] = 1 + np.arange(count // 2) % 5
            kind = dice.permutation(kind)
        parts = [faces(part, dice) for part in np.array_split(kind, count // 100)]
        np.save(folder / "data" / f"{name}set.npy", np.concatenate(parts))
    np.save(answers / "kind.npy", kind)  # of the test part, which was the last


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

# %% cellView="form" jupyter={"source_hidden": true} tags=["read"]
# @title Read and check the images
LEAST = 100  # images to learn from


def stop(path, why):
    raise Stop(f"{path} {why}: delete it and fetch the course's file again.")


def as_bytes(path, images):
    """Numbers from 0 to 1 as bytes, said aloud."""
    for part in np.array_split(images, -(-len(images) // 1000)):
        if not (part.min() >= 0 and part.max() <= 1):
            stop(path, "has broken numbers, or others than bytes (0 to 255) or shares (0 to 1)")
    say(f"{path} has numbers from 0 to 1 in place of bytes: converted")
    return np.concatenate([(part * 255).round().astype(np.uint8) for part in np.array_split(images, 100)])


def read(path):
    """The bytes of all images (n, height, width, 3): mapped, so they stay on the disk until looked at."""
    try:
        images = np.load(path, mmap_mode="c", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        stop(path, f"is damaged or no plain array ({' '.join(str(error).split())})")
    if not isinstance(images, np.ndarray) or images.ndim != 4 or images.shape[3] != 3:
        found = f"has the shape {np.shape(images)}, but must be (images, height, width, 3)"
        if np.ndim(images) == 4 and images.shape[1] == 3:
            raise Stop(f"{path} {found}: bring the colours to the end with images.transpose(0, 2, 3, 1).")
        if np.ndim(images) == 3:
            raise Stop(f"{path} {found}: repeat grey images three times, np.stack([images] * 3, -1).")
        stop(path, found)
    if len(images) == 0 or min(images.shape[1:3]) < 8:
        stop(path, f"has the shape {images.shape}, so there is nothing to see")
    if images.dtype.kind == "f":
        return as_bytes(path, images)
    if images.dtype != np.uint8:
        raise Stop(
            f"{path} has numbers of type {images.dtype}, but must have uint8: use images.astype('uint8')."
        )
    return images


def one_colour(images):
    """Which images are a single colour?"""
    flat = [
        (part == part[:, :1, :1]).all((1, 2, 3)) for part in np.array_split(images, -(-len(images) // 500))
    ]
    return np.concatenate(flat)


given, test_images = (torch.from_numpy(read(PATHS[name][0])) for name in FILES)
empty = one_colour(given.numpy())
if empty.any():
    say(f"{PATHS['training'][0]}: {empty.sum()} of {len(empty)} images are of one colour and left out")
usable = torch.from_numpy(np.flatnonzero(~empty))
if len(usable) < LEAST:
    stop(PATHS["training"][0], f"has {len(usable)} usable images, at least {LEAST} are needed to learn")
if one_colour(test_images.numpy()).mean() > 0.1:
    say(f"{PATHS['test'][0]}: more than a tenth of the images are of one colour. Is the file whole?")
shuffled = usable[torch.randperm(len(usable), generator=torch.Generator().manual_seed(SEED))]
tenth = min(500, len(usable) // 10)
usual_rows, exam_rows, train_rows = shuffled[:tenth], shuffled[tenth : 2 * tenth], shuffled[2 * tenth :]
test_rows = torch.arange(len(test_images))
data_key = fingerprint([given, SEED])  # what training depends on, counted once
if on_gpu and 3 * given.nbytes < torch.cuda.mem_get_info()[0]:
    given = given.to(device)
rows = [("given", given, "bytes of the training images, all normal")]
rows += [("train_rows", train_rows, "those of them that are learned")]
rows += [("usual_rows", usual_rows, "tell what scores are usual"), ("exam_rows", exam_rows, "for the exam")]
rows += [("test_images", test_images, "bytes of the test images, normal and strange")]
table([{"name": name, "shape": tuple(one.shape), "meaning": meaning} for name, one, meaning in rows])

# %% [markdown]
# ## The data
#
# Two files: `trainingset.npy` holds normal faces as bytes, `testingset.npy` normal and strange images in any
# order. The course's arrays have 1.2 GB: they are mapped, and a batch becomes numbers from -1 to 1 only when
# it is looked at, on the device. (The official sample turns each image into floats, one by one.) First line:
# training images. Second line: test images.


# %%
from torch import nn
from torch.nn import functional as F
from sklearn.metrics import roc_auc_score, roc_curve

SIDE = 64  # pixels: images of another size are brought to it


def look(images, rows):
    """Rows of the bytes -> images (batch, 3, SIDE, SIDE) from -1 to 1, on the device."""
    x = images[rows.to(images.device)].to(device).permute(0, 3, 1, 2).float() / 127.5 - 1
    if x.shape[2:] != (SIDE, SIDE):
        x = F.interpolate(x, (SIDE, SIDE), mode="bilinear", antialias=True)
    return x


def show_images(lines, titles, name):
    """Each line of images (count, 3, SIDE, SIDE) with a text before it, as one wall of images."""
    wall = torch.cat([torch.cat([*line], -1) for line in lines], 1).cpu() / 2 + 0.5
    plt.figure(figsize=(8, 0.85 * len(lines)))
    plt.imshow(wall.clamp(0, 1).permute(1, 2, 0))
    plt.yticks([SIDE * (k + 0.5) for k in range(len(lines))], titles)
    plt.xticks([])
    show(name)


first = [look(given, train_rows[:10]), look(test_images, test_rows[:10])]
show_images(first, ["training", "test"], "data.jpg")

# %% [markdown]
# ## Validation: an exam of home-made anomalies
#
# Nobody labels anomalies, and the test part must not be asked. What can be asked: normal images that the model
# has not learned. A tenth of the training images is **changed in six ways** that no model below learns from,
# and a good detector tells them from the unchanged ones. The exam is not the judge: it has other anomalies. It
# ranks models; it does not foretell the score. (A second tenth tells which scores are usual.) Two images of
# the exam, from left to right: unchanged, halves of two, upside down, swapped quarters, a wave, few tones, two
# in one.


# %%
def exam(x):
    """Normal images -> {kind: changed images}."""
    other, half, swapped, bent = x.roll(1, 0), SIDE // 2, x.clone(), x.clone()
    swapped[..., :half, :half], swapped[..., half:, half:] = x[..., half:, half:], x[..., :half, :half]
    for line in range(SIDE):  # each row of pixels is pushed aside, in a wave
        bent[..., line, :] = x[..., line, :].roll(round(4 * math.sin(line / 6)), -1)
    return {
        "halves of two": torch.cat([x[..., :half], other[..., half:]], -1),
        "upside down": x.flip(2),
        "swapped quarters": swapped,
        "wave": bent,
        "few tones": (2.5 * x).round() / 2.5,
        "two in one": (x + other) / 2,
    }


normal = look(given, exam_rows)
papers = {"normal": normal} | exam(normal)
exam_kind = np.repeat([*papers], len(normal))
exam_bytes = (torch.cat([*papers.values()]) * 127.5 + 127.5).round().byte().permute(0, 2, 3, 1).cpu()
show_images([torch.stack([one[k] for one in papers.values()]) for k in (0, 1)], ["exam", "exam"], "exam.jpg")


def auc_by_kind(kinds, scores):
    """{kind: area under the ROC curve of this kind against the normal images}"""
    areas = {}
    for kind in dict.fromkeys(kinds[kinds != "normal"]):
        both = (kinds == kind) | (kinds == "normal")
        areas[kind] = roc_auc_score(kinds[both] == kind, scores[both])
    return areas


# %% [markdown]
# ## Simple: a convolutional autoencoder (0.53)
#
# The official sample's net: three convolutions down, three up, and the sum of squared errors as score. Its
# code has 3,072 numbers for the 12,288 of an image. So it hardly has to understand: it copies, and it copies
# strange things as well.


# %%
def down(before, after):  # half the size
    return nn.Sequential(nn.Conv2d(before, after, 4, stride=2, padding=1), nn.ReLU())


def up(before, after):  # twice the size
    return nn.ConvTranspose2d(before, after, 4, stride=2, padding=1)


class ConvAutoencoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.down = nn.Sequential(down(3, 12), down(12, 24), down(24, 48))
        self.up = nn.Sequential(up(48, 24), nn.ReLU(), up(24, 12), nn.ReLU(), up(12, 3), nn.Tanh())

    def forward(self, x):
        return self.up(self.down(x))  # the code: (batch, 48, 8, 8)


def squared_error(model, x):
    return (model(x) - x).float().square()  # (batch, 3, SIDE, SIDE)


# %% [markdown]
# ## Medium: a narrow bottleneck (+0.080)
#
# The image has to pass through a **code of 64 numbers**. Faces vary in few ways (light, pose, hair), so a few
# numbers rebuild them; for another thing these numbers have no place. How few? The best *linear* autoencoder
# is known without any training, the **principal components**. The exam with codes of 2 to 256 numbers:


# %%
def components(images, rows, count, mirrored=False):
    """The mean image, and the `count` directions in which images differ most (3 * SIDE * SIDE, count)."""
    x = torch.cat([look(images, part) for part in rows[:3000].split(500)])
    count = min(count, len(x) // 4)
    x = torch.cat([x, x.flip(3)] if mirrored else [x]).flatten(1)
    mean = x.mean(0)
    with torch.random.fork_rng([]):
        torch.manual_seed(SEED)
        return mean, torch.svd_lowrank(x - mean, count, niter=2)[2]


mean, directions = components(given, train_rows, 256)
away = look(exam_bytes, torch.arange(len(exam_bytes))).flatten(1) - mean
sizes = [size for size in (2, 4, 8, 16, 32, 64, 128, 256) if size <= directions.shape[1]]
areas = []
for size in sizes:
    rebuilt = away @ directions[:, :size] @ directions[:, :size].T
    areas.append(auc_by_kind(exam_kind, (away - rebuilt).square().sum(1).cpu().numpy()))
plt.figure(figsize=(8, 2.6))
for kind in areas[0]:
    plt.semilogx(sizes, [one[kind] for one in areas], "o-", base=2, label=kind)
plt.gca().set(xlabel="numbers in the code of the linear autoencoder", ylabel="AUC, exam")
plt.xticks(sizes, sizes)
plt.legend(fontsize=8, ncols=3, loc=(0.3, 0.2))
show("code_size.png")

# %% [markdown]
# Longer codes help up to a point, and against one kind they never do: **two images in one** are smoother than
# any face, so they are rebuilt *better* than a normal one (AUC below 0.5). Whoever only measures errors is
# blind to what is too simple.
#
# *Medium* takes 64 components as its encoder: dense layers that start from chance need far more than a few
# thousand images to get there. They draw what the linear answer lacks. The last of them starts at zero, so
# training begins at the linear answer and can only add.


# %%
def zeroed(layer):
    """A layer that adds nothing at first."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class DenseAutoencoder(nn.Module):
    def __init__(self, mean, directions, width):
        super().__init__()
        self.register_buffer("mean", mean.clone())
        self.register_buffer("directions", directions.clone())
        count = directions.shape[1]
        self.scale = nn.LayerNorm(count)
        self.draw = nn.Sequential(nn.Linear(count, width), nn.ReLU(), zeroed(nn.Linear(width, len(mean))))

    def codes(self, x, first):
        return self.scale(first)

    def forward(self, x):
        first = (x.flatten(1) - self.mean) @ self.directions  # the code: (batch, 64)
        linear = first @ self.directions.T + self.mean
        return linear.view_as(x) + self.draw(self.codes(x, first)).view_as(x)


# %% [markdown]
# ## Strong: two encoders (+0.22)
#
# **Multi-encoder.** The first encoder stays: 256 components now, which see the whole image at once. A second,
# convolutional one sees what is near each other. A convolutional decoder draws from *both* codes what the
# linear answer lacks.
#
# **By pixel.** A background pixel is always rebuilt badly, whatever the image; an eye is not. So each squared
# error is divided by what is usual at its pixel, $s = \frac{1}{n}\sum_p e_p^2 / \overline{e_p^2}$, with the means
# from normal images that were not learned.
#
# **Weighed** (two seeds each): with medium's net *strong* has 0.66, so the encoders carry this step. Without the
# weights of the pixels it has 0.84 for 0.83: they show nothing on the sample, where backgrounds fill every corner.


# %%
class TwoEncoders(DenseAutoencoder):
    def __init__(self, mean, directions, code):
        super().__init__(mean, directions, 1)
        end = (64, SIDE // 8, SIDE // 8)
        stairs = [down(3, 16), down(16, 32), down(32, 64)]
        self.second = nn.Sequential(*stairs, nn.Flatten(), nn.Linear(math.prod(end), code))
        stairs = [up(64, 32), nn.ReLU(), up(32, 16), nn.ReLU(), zeroed(up(16, 3))]
        both = nn.Linear(directions.shape[1] + code, math.prod(end))
        self.draw = nn.Sequential(both, nn.Unflatten(1, end), *stairs)  # in place of the dense layers

    def codes(self, x, first):
        return torch.cat([self.scale(first), self.second(x)], 1)


@torch.no_grad()
def usual_error(model, images, rows):
    """The mean squared error of normal images at each place (3, SIDE, SIDE)."""
    model.eval()
    total = sum(squared_error(model, look(images, part)).sum(0) for part in rows.split(250))
    error = total / len(rows)
    return error + 0.01 * error.mean()  # a pixel that never changes must not decide alone


# %% [markdown]
# ## Boss: mirrored images, and a critic who is shown the error (+0.051)
#
# **Mirrored.** A face in the mirror is a face. So each image counts twice, and what the autoencoder learned fits
# images better that it has not seen.
#
# **Noise** is what the course recommends: what is looked at gets noise of a random strength, and the clean image is
# asked for, so that to copy no longer works. On the sample it shows nothing (report, 1).
#
# **An extra classifier**, the *critic*, learns to tell normal images from spoilt ones. We spoil them ourselves:
# in a soft ellipse or all over, the image shows another place (of itself or of another image, turned, zoomed),
# or other colours. That is no list of the anomalies to come: it teaches what belongs where. What the critic is sure
# is spoilt, is strange.


# %%
def between(low, high, *shape):
    return torch.empty(shape, device=device).uniform_(low, high)


def noisy(x):
    return x + settings["noise"] * between(0, 1, len(x), 1, 1, 1) * torch.randn_like(x)


def ellipses(n):
    """Soft masks (n, 1, SIDE, SIDE): where an image is spoilt."""
    line = torch.linspace(-1, 1, SIDE, device=device)
    x, y = between(-0.8, 0.8, 2, n, 1, 1)
    wide, high = between(0.12, 0.7, 2, n, 1, 1)
    reach = (((line - x) / wide).square() + ((line[:, None] - y) / high).square()).sqrt()
    return (8 - 8 * reach).sigmoid()[:, None]


def elsewhere(x):
    """Each image turned by any angle, zoomed and pushed aside."""
    turn, zoom = between(-math.pi, math.pi, len(x)), between(-0.3, 0.3, len(x)).exp()
    right, down = between(-0.6, 0.6, 2, len(x))
    first = torch.stack([turn.cos() * zoom, -turn.sin() * zoom, right], -1)
    second = torch.stack([turn.sin() * zoom, turn.cos() * zoom, down], -1)
    grid = F.affine_grid(torch.stack([first, second], 1), x.shape, align_corners=False)
    return F.grid_sample(x, grid, padding_mode="reflection", align_corners=False)


def spoil(x):
    """A quarter of the images gets other colours, the others another place, some both; a quarter all over."""
    n = len(x)
    chance = between(0, 1, 4, n, 1, 1, 1)
    other = torch.where(chance[0] < 0.5, x, x.roll(1, 0))
    tinted = chance[1] < 0.25
    patch = torch.where(tinted, x, elsewhere(other))
    colours = (patch * between(0.6, 1.4, n, 3, 1, 1) + between(-0.4, 0.4, n, 3, 1, 1)).clamp(-1, 1)
    patch = torch.where(tinted | (chance[2] < 0.3), colours, patch)
    return torch.lerp(x, patch, torch.maximum(ellipses(n), (chance[3] < 0.25).float()))


show_images([first[0], spoil(first[0])], ["normal", "spoilt"], "spoilt.jpg")


# %% [markdown]
# **What the critic is shown.** The image, and beside it what the autoencoder got wrong, each pixel in units of what
# is usual there. The sum over all pixels does not care *where* an image is wrong and what is there instead;
# the critic does.
#
# **Two judges.** The autoencoder's error and the critic's answer have different units. What is usual on normal images
# becomes the unit: $a = (s - q_{50}) / (q_{90} - q_{50})$, with the quantiles of normal images that were not learned.
# The **louder** of the two alarms is the score: a judge who sees nothing strange acquits nobody.


# %%
def make_critic():
    layers, before = [], 6
    for after in [settings["filters"] * 2**k for k in range(4)]:
        layers += [nn.Conv2d(before, after, 3, 2, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
        before = after
    ends = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, 1), nn.Flatten(0)
    return nn.Sequential(*layers, *ends)  # (batch, 6, SIDE, SIDE) -> (batch,), high: spoilt


@torch.no_grad()
def evidence(autoencoder, usual, x):
    """The image, and what the autoencoder gets wrong in usual errors (batch, 6, SIDE, SIDE)."""
    wrong = (autoencoder(x) - x) / (3 * usual.sqrt())
    if settings["shown"] == "image":
        wrong = 0 * wrong
    return torch.cat([x, wrong], 1)


def alarm(scores, usual):
    """How far above the median of normal images; 1 is what one of ten normal images exceeds."""
    middle = usual.median()
    return (scores - middle) / (usual.quantile(0.9) - middle).clamp(min=1e-6)


# %% [markdown]
# ## The levels
#
# A row an idea; each can be switched off alone. Steps, not epochs: a hundred thousand images take no longer
# than three thousand.

# %% tags=["levels"]
# fmt: off
LEVELS = {         # simple   medium   strong      boss
    "encoders":    ("conv",  "dense", "two",      "two"),
    "error":       ("sum",   "sum",   "by pixel", "by pixel"),
    "mirror":      (False,   False,   False,      True),       # each image counts mirrored, too
    "noise":       (0.0,     0.0,     0.0,        0.05),       # the strongest, before encoders and critic
    "critic":      (False,   False,   False,      True),       # a second judge
    "shown":       ("image", "image", "image",    "both"),     # to the critic: the error, too?
}
SIZES = {
    "small": {
        "steps":      (300,  300,  200,  200),    # of an autoencoder; the critic takes twice as many
        "batch_size": (32,   32,   32,   32),
        "width":      (256,  256,  256,  256),    # of the dense net
        "code":       (64,   64,   64,   64),     # numbers of the second encoder
        "filters":    (16,   16,   16,   16),     # of the critic's first layer
        "rate":       (1e-3, 1e-3, 1e-3, 1e-3),   # the critic takes four times as much
    },
    "full": {
        "steps":      (5000, 20000, 10000, 10000),
        "batch_size": (128,  128,   128,   128),
        "width":      (1024, 1024,  1024,  1024),
        "code":       (128,  128,   128,   128),
        "filters":    (48,   48,    48,    48),
        "rate":       (1e-3, 1e-3,  1e-3,  1e-3),
    },
}
# fmt: on
settings = choose(LEVELS, SIZES)
LONGER = 4 if REAL and PROFILE == "small" else 1  # real photos have more to teach; 20 minutes allow it
if settings["mirror"]:
    mean, directions = components(given, train_rows, 256, mirrored=True)


def make_autoencoder():
    if settings["encoders"] == "conv":
        return ConvAutoencoder()
    if settings["encoders"] == "dense":
        return DenseAutoencoder(mean, directions[:, :64], settings["width"])
    return TwoEncoders(mean, directions, settings["code"])


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
# One loop for all nets; what differs is the loss. Each sixth of a training is kept. If the loss runs away, the last
# sound sixth counts, and this is said.


# %%
def draw_batch(images):
    """Any images to learn from; of several processes each takes its share of a batch."""
    rows = train_rows[torch.randint(len(train_rows), (settings["batch_size"],))]
    x = look(images, rows[accelerator.process_index :: accelerator.num_processes])
    if settings["mirror"]:
        x = torch.where(between(0, 1, len(x), 1, 1, 1) < 0.5, x, x.flip(3))
    return x


def rebuild_loss(model, x):
    return (model(noisy(x)) - x).square().mean()


def critic_loss(autoencoder, usual, model, x):
    seen = evidence(autoencoder, usual, noisy(torch.cat([x, spoil(x)])))
    wanted = torch.cat([torch.zeros(len(x)), torch.ones(len(x))]).to(device)
    return F.binary_cross_entropy_with_logits(model(seen).float(), wanted)


def make_optimizer(model, steps, rate):
    """AdamW; the rate rises for 15 % of the steps and falls to zero."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01)
    schedule = dict(total_steps=steps, pct_start=0.15, cycle_momentum=False)
    return optimizer, torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, **schedule)


# %% tags=["train"]
def train_round(model, images, loss_of, steps, optimizer, scheduler):
    """The mean loss of so many steps."""
    total = torch.zeros((), device=device)
    model.train()
    for _ in range(steps):
        loss = loss_of(model, draw_batch(images))
        optimizer.zero_grad()
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        total += loss.detach() / steps
    weights = sum(part.detach().sum() for part in model.parameters())
    return float(accelerator.reduce(total + 0 * weights, "mean"))  # no number if any of them is none


def train(stage, images, make, loss_of, steps, rate):
    """Teach a new net; the last sound round is what stays of one whose loss runs away."""
    torch.manual_seed(SEED)
    model, rounds = make().to(device), min(6, steps)
    optimizer, scheduler = make_optimizer(model, steps, rate)
    model, optimizer = accelerator.prepare(model, optimizer)
    parts = dict(model=model, optimizer=optimizer, scheduler=scheduler)
    done = load_checkpoint(stage, [train, make, loss_of, data_key, steps, rate], **parts)
    for number in tqdm(range(done + 1, rounds + 1), stage, disable=QUIET, leave=False):
        tic, sound = time.perf_counter(), copy.deepcopy(bare(model).state_dict())
        loss = train_round(model, images, loss_of, steps // rounds, optimizer, scheduler)
        if not math.isfinite(loss):
            if number == 1:
                raise Stop(f"{stage} diverged at once, its loss is {loss}: lower `rate` of {LEVEL} in SIZES.")
            bare(model).load_state_dict(sound)
            say(f"{stage} DIVERGED in round {number}: the round before is used. Lower `rate` in SIZES.")
            break
        speed = steps // rounds * settings["batch_size"] / (time.perf_counter() - tic)
        history.append(dict(stage=stage, epoch=number, loss=loss, examples_per_second=speed))
        save_checkpoint(stage, number, **parts)
    say(f"{stage}: {steps} steps, loss {history[-1]['loss']:.4g}")
    model = bare(model).eval()
    accelerator.free_memory()  # nothing of it takes part in the next training
    return model


# %% [markdown]
# Each net is watched for a **collapse**: one that gives the same picture whatever it sees measures only the
# distance from a mean image.


# %%
def liveliness(rebuilt, x):
    """How much the rebuilt images differ from each other, as a share of how much the images do."""
    return float(rebuilt.float().var(0).mean() / x.var(0).mean())


@torch.no_grad()
def watch(stage, model, x):
    share = liveliness(model(x), x)
    if share < 0.01:
        say(f"{stage} HAS COLLAPSED: its pictures differ by {share:.1%} of what the images do.")


steps, rate = LONGER * settings["steps"], settings["rate"]
autoencoder = train("autoencoder", given, make_autoencoder, rebuild_loss, steps, rate)
watch("autoencoder", autoencoder, look(given, usual_rows))
usual, nets = usual_error(autoencoder, given, usual_rows), [autoencoder]
if settings["critic"]:
    make, loss_of = make_critic, functools.partial(critic_loss, autoencoder, usual)
    nets.append(train("critic", given, make, loss_of, 2 * steps, 4 * rate))

fig, axes = plt.subplots(1, len(nets), figsize=(8, 2.4), squeeze=False)
for axis, stage in zip(axes[0], ("autoencoder", "critic")):
    curve = [point for point in history if point["stage"] == stage]
    axis.plot([point["epoch"] for point in curve], [point["loss"] for point in curve], "o-")
    axis.set(xlabel=f"round of {stage}", ylabel="loss")
show("curves.png")

# %% [markdown]
# ## Prediction and submission
#
# Every judge sees the normal images that tell what is usual, the exam, and the test part. An image's score
# does not depend on the other test images, nor on their order.

# %% tags=["predict"]
weight = torch.ones(3, SIDE, SIDE, device=device)
if settings["error"] == "by pixel":
    weight = 1 / usual


@torch.no_grad()
def ask(judge, images, rows):
    """One number an image, in the order of `rows`; several processes share the work."""
    with accelerator.split_between_processes(rows, apply_padding=True) as mine:
        parts = [judge(look(images, part)) for part in mine.split(250)]
    return accelerator.gather(torch.cat(parts))[: len(rows)].float().cpu()


judges = {"error": lambda x: (squared_error(autoencoder, x) * weight).mean((1, 2, 3)).log()}
if settings["critic"]:
    judges["critic"] = lambda x: nets[1](evidence(autoencoder, usual, x))
exam_scores, test_scores = {}, {}
for name, judge in judges.items():
    known = ask(judge, given, usual_rows)
    exam_scores[name] = alarm(ask(judge, exam_bytes, torch.arange(len(exam_bytes))), known).numpy()
    test_scores[name] = alarm(ask(judge, test_images, test_rows), known).numpy()
for scores in (exam_scores, test_scores):
    scores["loudest"] = np.maximum.reduce([*scores.values()])
examined = auc_by_kind(exam_kind, exam_scores["loudest"])
valid_score = float(np.mean([*examined.values()]))
say(f"exam: AUC {valid_score:.3f}, the mean over {len(examined)} kinds of home-made anomalies")
summary = {"valid_score": valid_score}
summary["parameters"] = sum(part.numel() for net in nets for part in net.parameters())
summary["examples_per_second"] = float(np.median([point["examples_per_second"] for point in history]))

# %% cellView="form" jupyter={"source_hidden": true} tags=["submission"]
# @title The submission file, and the picture of the header
submission = OUT / ("prediction.csv" if REAL else "prediction.sample.csv")
final = test_scores["loudest"]
if not np.isfinite(final).all():
    raise Stop(f"The training diverged (a score is no number): lower `rate` of {LEVEL} in SIZES.")
if valid_score < 0.5:
    say("The exam says worse than chance: look at the images below before you send the file.")


def write_submission(path):
    with aside(path) as part, part.open("w", newline="") as file:
        file.write("ID,score\n")
        file.writelines(f"{number},{score:.9g}\n" for number, score in enumerate(final.tolist()))


def is_score(text):
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def check_submission(path):
    check_table(path, "ID,score", range(len(test_images)), is_score, "a finite number")
    scores = [line.split(",")[1] for line in path.read_text().splitlines()[1:]]
    if len(set(scores)) < 0.5 * len(scores):
        raise Stop(f"{path} has only {len(set(scores))} different scores: equal ones cannot be ranked.")


def score_submission(path, answers):
    """The judge: the area under the ROC curve of strange against normal."""
    guess = np.loadtxt(path, delimiter=",", skiprows=1, ndmin=2)[:, 1]
    return roc_auc_score(np.load(answers / "kind.npy") > 0, guess)


if MAIN:
    write_submission(submission)
order = torch.from_numpy(final).argsort()
ends = {"most normal": order[:9], "least normal": order[-9:].flip(0)}
show_images([look(test_images, rows) for rows in ends.values()], [*ends], "hero.jpg")


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

# %% cellView="form" jupyter={"source_hidden": true} tags=["measured"]
# @title What was measured: written by make ladder
MEASURED = {
    "levels": {
        "simple": [0.52639, 0.52601, 0.52566],
        "medium": [0.60568, 0.60653, 0.60666],
        "strong": [0.83297, 0.83032, 0.82824],
        "boss": [0.88603, 0.88448, 0.87512],
    },
    "without": {
        "encoders": [0.76338],
        "error": [0.88764, 0.88518, 0.87871],
        "mirror": [0.86401, 0.85942, 0.86295],
        "noise": [0.8885, 0.88732, 0.87594],
        "critic": [0.84744],
        "shown": [0.82383],
    },
}

# %% [markdown] tags=["report"]
# ## Report
#
# **1. What is each idea worth?** On the sample, at boss, each idea was switched off alone (`WITHOUT`).

# %% tags=["report"]
show_worth()

# %% [markdown] tags=["report"]
# The critic pays for one reason: **it is shown the error**. With the image alone it knows so little that the louder
# alarm is often a false one, and the boss would be better without any critic. A bar that ends inside the grey band
# is worth nothing that three seeds can show: that is true of the noise, which the course recommends, and of the
# weights of the pixels.
#
# **2. Which judge finds what?** On the sample the answers are at hand, once the file is written; with real data
# the exam stands in for them. The ROC curve goes through all thresholds: how many of the strange images are
# found, if so many of the normal ones may be suspected.

# %% tags=["report"]
if ANSWERS:
    kinds, scores = np.array(KINDS)[np.load(ANSWERS / "kind.npy")], test_scores
else:
    kinds, scores = exam_kind, exam_scores
plt.figure(figsize=(8, 2.8))
for name in scores:
    false, found, _ = roc_curve(kinds != "normal", scores[name])
    plt.plot(false, found, label=f"{name}: {roc_auc_score(kinds != 'normal', scores[name]):.3f}")
plt.gca().set(xlabel="share of the normal images that are suspected", ylabel="strange images found")
plt.legend(title="AUC", fontsize=8)
show("roc.png")
table([{"judge": name} | auc_by_kind(kinds, one) for name, one in scores.items()])

# %% [markdown] tags=["report"]
# **The judges see different things.** The error finds best what changes many pixels, the features upside down
# and the odd skin, and worst the second mouth, which is small. The critic asks whether a part belongs where it
# is. What one of them misses, the other may find; so the louder alarm counts.
#
# **3. What does the detector find most and least normal?** The test images of the lowest and of the highest
# scores, with what the autoencoder makes of them.

# %% tags=["report"]
lines, titles = [], []
for title, rows in ends.items():
    x = look(test_images, rows)
    with torch.no_grad():
        rebuilt = autoencoder(x).float()
        error = (squared_error(autoencoder, x) * weight).mean(1, keepdim=True)
    bright = (error / error.flatten().quantile(0.99)).expand(-1, 3, -1, -1)
    lines += [x, rebuilt, 2 * bright - 1]
    titles += [title, "rebuilt", "error"]
show_images(lines, titles, "ends.jpg")

# %% [markdown] tags=["report"]
# **Bright in the error lines** is what was rebuilt worse than usual at its place. At the normal end the error is
# even; at the other end, look whether it marks the strange part or only a loud background: the second is a
# wrong reason, even where the answer is right.
#
# **4. The variational autoencoder (question 1 of the course).** Its encoder gives a cloud, mean $\mu$ and spread
# $\sigma$ for each number of the code; the decoder rebuilds from a point of the cloud. The loss asks for two
# things: rebuild well, and keep all clouds near the standard normal one,
#
# $$L = \frac{1}{2 v} \lVert x - \hat x \rVert^2 + \beta \cdot \tfrac12 \sum_d (\mu_d^2 + \sigma_d^2 - 1 - \ln \sigma_d^2).$$
#
# Three nets of the same layers: $\beta = 1$; a plain autoencoder ($\beta = 0$, no cloud); and the official
# sample's loss, where the error is a *mean* over pixels and the second term a *sum* over the batch.


# %% tags=["report"]
class Variational(nn.Module):
    def __init__(self, cloud):
        super().__init__()
        self.cloud, size = cloud, 3 * SIDE * SIDE
        self.encode = nn.Sequential(nn.Flatten(), nn.Linear(size, 64), nn.ReLU(), nn.Linear(64, 64))
        back = nn.Unflatten(1, (3, SIDE, SIDE))
        self.decode = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, size), back)

    def forward(self, x):
        middle, log_spread = self.encode(x).chunk(2, 1)  # (batch, 32)
        code = middle
        if self.cloud and self.training:
            code = middle + log_spread.clamp(-8, 4).exp() * torch.randn_like(middle)
        excess = (middle.square() + (2 * log_spread).exp() - 1 - 2 * log_spread) / 2
        return self.decode(code), excess


def plain_loss(model, x):
    return (model(x)[0] - x).square().mean()


def variational_loss(model, x):
    rebuilt, excess = model(x)
    return ((rebuilt - x).square().sum((1, 2, 3)) / 0.1 + excess.sum(1)).mean() / x[0].numel()


def official_loss(model, x):
    rebuilt, excess = model(x)
    return (rebuilt - x).square().mean() + excess.sum()


losses = {"plain": plain_loss, "variational": variational_loss, "official": official_loss}
x, small = look(given, exam_rows), {}
for name, loss_of in losses.items():
    make = functools.partial(Variational, name != "plain")
    small[name] = train(name, given, make, loss_of, steps, rate)


# %% tags=["report"]
def sharpness(x):
    """Mean squared step from a pixel to its neighbour."""
    return float(x.diff(dim=-1).square().mean())


with torch.no_grad(), torch.random.fork_rng():
    torch.manual_seed(SEED)
    dice = torch.randn(10, 32, device=device)
    lines, titles, facts = [x[:10]], ["images"], []
    for name, model in small.items():
        rebuilt, excess = model(x)
        lines += [rebuilt[:10], model.decode(dice)]
        titles += [f"{name}:\nrebuilt", "chance"]
        row = {"net": name, "numbers in use": int((excess.mean(0) > 0.01).sum())}
        row |= {"pictures differ": liveliness(rebuilt, x), "sharpness": sharpness(rebuilt) / sharpness(x)}
        facts.append(row | {"error": float((rebuilt - x).square().mean())})
show_images(lines, titles, "variational.jpg")
table(facts)

# %% [markdown] tags=["report"]
# **An advantage**: the variational code can be drawn from. Its clouds lie near the standard normal one, so a
# code of chance is one that the decoder knows; the plain net's codes lie anywhere. **A problem**: two aims pull
# against each other, and the picture gets blurred (*sharpness*, of 1 in the images). With the official sample's
# mean beside a sum the second aim wins, and all pictures become one (*pictures differ*).
#
# **5. Changing the code (question 2 of the course).** The dense autoencoder of question 4 (12,288 → 64 → 32 →
# 64 → 12,288 numbers). Of its code the two numbers are changed that move the picture most: multiplied by -2,
# 0, 2 and 5, everything else left alone, in the image in which that number is largest. From left to right: the
# image, rebuilt, and the four changes.

# %% tags=["report"]
with torch.no_grad():
    codes = small["plain"].encode(x)[:, :32]
    middle, away = codes.mean(0, keepdim=True), codes.std(0).diag()  # each number alone by its spread
    moved = (small["plain"].decode(middle + away) - small["plain"].decode(middle)).square().mean((1, 2, 3))
    lines, facts, factors = [], [], (1, -2, 0, 2, 5)
    for number in moved.topk(2).indices.tolist():
        far = int(codes[:, number].abs().argmax())  # the image in which this number is largest
        changed = codes[far].repeat(len(factors), 1)
        changed[:, number] *= torch.tensor(factors, device=device)
        pictures = small["plain"].decode(changed)
        lines += [torch.cat([x[far][None], pictures]), torch.cat([0 * x[:1], pictures - pictures[:1]])]
        for factor, change in zip(factors[1:], (pictures - pictures[:1])[1:]):
            row, column = divmod(int(change.abs().mean(0).argmax()), SIDE)
            fact = {"number": number, "times": factor, "most at row": row, "column": column}
            facts.append(fact | {"brighter by": float(change.mean())})
show_images(lines, ["first number", "difference", "second", "difference"], "code.jpg")
table(facts)

# %% [markdown] tags=["report"]
# **One number moves the whole picture**, not one part of the face: nothing in the loss asks a number to mean one
# thing. Twice the number goes twice as far along the same way, -2 goes back; at 5 the code is one that no face
# has, and the decoder draws what it has never been asked for.

# %% [markdown] tags=["try"]
# ## Try it
#
# Predict what happens before you run it.
#
# 1. `WITHOUT = "critic"`: which kinds of anomaly are lost, by the table of question 2?
# 2. Give the net of *medium* 16 components in place of 64 (`make_autoencoder`). Which kinds does it find
#    better, and which worse?
# 3. Spoil images by a black bar in place of the ellipse. What happens to the exam, and why is a critic that
#    has only seen black bars never wrong and of no use?

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
