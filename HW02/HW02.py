# %% [markdown] tags=["header"]
# # HW02 · Classification: which phoneme is spoken in this frame?
#
# <!-- badges -->
# [![Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/ml2022-notebooks/ml2022-spring/blob/main/HW02/HW02.ipynb)
# [![Kaggle](https://kaggle.com/static/images/open-in-kaggle.svg)](https://kaggle.com/kernels/welcome?src=https://github.com/ml2022-notebooks/ml2022-spring/blob/main/HW02/HW02.ipynb)
# <!-- /badges -->
#
# ![Sound as 13 numbers over time; below it the spoken phonemes, and what the net hears](hero)
#
# Speech is cut into **frames**: 25 milliseconds of sound, one every 10 milliseconds. For every frame, say which
# of 41 phonemes is spoken. One frame alone is too short to tell; its neighbours help, and the whole sentence
# helps more. On the way from one frame to the sentence we meet what the lecture teaches about training that
# fails, and what each failure asks for: more inputs against **model bias**, a rate that moves for the
# **optimization**, dropout and changed copies against **over-fitting**.
#
# 語音被切成一個個**音框**：每 10 毫秒一個，每個長 25 毫秒。請判斷每個音框屬於 41 個音素中的哪一個。單看一個音框太短，看前後文比較好，看整句話更好。從單一音框到整句話，我們會遇到課堂上談的訓練失敗，以及各自的對策：**模型偏差**要給更多輸入，**最佳化**要會變動的學習率，**過度擬合**要用 dropout 與變化過的資料。
#
# <!-- box -->
# > **Press *Run all*.** This run is *boss*: expect accuracy 0.781 on the sample in about 2 minutes on two CPU cores. GPU: not measured.
# <!-- /box -->
#
# Lectures: [local minima and saddle points](https://youtu.be/QW6uINn7uGk), [batch and momentum](https://youtu.be/zzbr1h9sF54),
# [learning rate](https://youtu.be/HYUXEeh3kwY), [classification](https://youtu.be/O2VkP8dJ5FE),
# [homework](https://youtu.be/FxuPF4vjga4). The ladder, measured on the built-in sample (accuracy over all test frames,
# higher is better; the mean of three seeds ± half their range), beside the course's public baselines on the
# real data:
#
# <!-- ladder -->
# | level | what it adds | sample | course baseline (real data) | seconds |
# |---|---|---|---|---|
# | simple | one frame, two small layers | 0.319 ± 0.002 | 0.45797 | 33 |
# | medium | eleven frames side by side | 0.611 ± 0.001 | 0.69747 | 34 |
# | strong | 21 frames, dropout | 0.688 ± 0.002 | 0.75028 | 71 |
# | boss | the whole utterance at once, two nets | 0.781 ± 0.004 | 0.82324 | 136 |
# <!-- /ladder -->

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

# %% cellView="form" jupyter={"source_hidden": true} tags=["homework"]
# @title Facts of this homework
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
OWN = {}  # this homework has no parameters of its own
NEEDS = {name: name for name in ("torch", "numpy", "pandas", "matplotlib", "tqdm", "accelerate", "filelock")}
MIXED_PRECISION = True
LESS_MEMORY = "set batch in SIZES to half"
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


# %% cellView="form" jupyter={"source_hidden": true} tags=["sample"]
# @title The sample: 20 speakers, 48 words, 40 phonemes and silence
def make_sample(folder, answers):
    """Utterances of invented words in the layout of libriphone; the test frames' classes go to `answers`."""
    dice = np.random.default_rng(2022)
    normal = dice.standard_normal
    counts = {"train": 240, "test": 60}
    if PROFILE == "tiny":
        counts = {"train": 32, "test": 12}
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

# %% cellView="form" jupyter={"source_hidden": true} tags=["read"]
# @title Read and check lists, classes and frames
WILD = 30  # healthy values are below 8


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


def read_file(path):
    """One file -> its frames (T, 39) or None, how much of it is damaged (0 to 1), and a remark on that."""
    try:
        x = torch.load(path, weights_only=True).float()
    except Exception as error:  # torch raises many kinds
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
    if drop:
        remark += ", utterance dropped"
    return not drop, remark


def read_part(part, names, truths):
    """Frames, classes (255: unknown) and sizes of the utterances that can be used; remarks."""
    folder = PATHS[part][0].parent
    files = POOL.map(read_file, [folder / f"{name}.pt" for name in names])
    found, classes, remarks = [], [], []
    for name, truth, (x, share, remark) in zip(names, truths, tqdm(files, part, disable=QUIET, leave=False)):
        use, remark = check_file(part, name, truth, x, share, remark)
        if remark:
            remarks.append(remark)
        if use:
            found.append(x.numpy()[:, :columns])
            classes.append(np.full(len(x), 255, np.uint8) if truth is None else truth)
    if len(found) < 0.9 * len(names):
        count = f"{len(names) - len(found)} of {len(names)}"
        raise Stop(f"{count} files in {folder} are damaged: fetch them again. {remarks[0]}")
    return np.concatenate(found), np.concatenate(classes), [len(x) for x in found], remarks


def read_all(folder):
    """Both splits, each file once, several at a time, into one file a split."""
    for part, names in split.items():
        truths = [None] * len(names)
        if part == "train":
            truths = read_labels(PATHS["train_labels"][0], names)
        x, y, size, remarks = read_part(part, names, truths)
        np.savez(folder / f"{part}.npz", x=x, y=y, size=size, remarks=remarks)


def unexplained(x):
    """The largest error of columns 14 to 39 as linear combinations of columns 1 to 13."""
    base, rest = x[:, :13].double(), x[:, 13:].double()
    return float((base @ torch.linalg.lstsq(base, rest).solution - rest).abs().max())


split = {part: read_split(part) for part in ("train", "test")}
most = {"full": None, "small": 600, "tiny": 32}[PROFILE]  # a CPU learns from so many
if REAL and most:
    say(f"profile {PROFILE}: the first {most} training utterances are used, with full it is all of them")
    split["train"] = split["train"][:most]
some = [read_file(PATHS["train"][k]) for k in np.linspace(0, len(PATHS["train"]) - 1, 16).astype(int)]
rest = max((unexplained(x) for x, share, _ in some if not share and len(x) > 39), default=np.inf)
columns = 39
if rest < 1e-3:
    columns = 13
say(f"columns 14 to 39 differ from combinations of the first 13 by at most {rest:.1e}: {columns} are kept")
cache = Path(f"{DATA_DIR}-decoded", f"{'real' if REAL else 'sample'}-{PROFILE}")
states = [
    (str(path), path.stat().st_size, path.stat().st_mtime_ns) for hits in PATHS.values() for path in hits
]
make_once(cache, fingerprint([read_all, states]), read_all)
rows = []
for part in split:
    stored = np.load(cache / f"{part}.npz", allow_pickle=False)
    for remark in stored["remarks"]:
        say(remark)
    count = len(stored["x"])
    if REAL and PROFILE == "full" and count != FRAMES[part]:
        say(f"NOTE: {part} has {count:,} frames, that of the 2022 course {FRAMES[part]:,}: another edition?")
    found = [torch.from_numpy(stored[name]).to(device) for name in ("x", "y", "size")]
    if part == "train":
        x, y, size = found
    else:
        test_x, test_y, test_size = found
    meanings = (
        "frames, one utterance after the other",
        "their phonemes (test: unknown)",
        "frames of each utterance",
    )
    for name, one, meaning in zip(("x", "y", "size"), found, meanings):
        prefix = "" if part == "train" else "test_"
        rows.append({"name": prefix + name, "shape": tuple(one.shape), "meaning": meaning})
table(rows)

# %% [markdown]
# ## The data
#
# `feat/train/NAME.pt` is one utterance, a tensor of (frames, 39); `train_labels.txt` has its name and one
# class a frame. The 39 numbers (MFCC) look like 13 and their derivatives in time. They are not: columns 14 to
# 39 turn out to be combinations of the first 13 *of the same frame*, so they say nothing new. The cell above
# tests it and keeps 13: a third of the memory. The test utterances must be answered in the order of
# `test_split.txt`, which is **not sorted**.
#
# All frames lie in **one tensor**, utterance after utterance. A `Dataset` is not needed: a batch is an index.
# Look before you fit: two seconds of the first utterance. Above 13 numbers over time, below the class of each
# frame (0 is silence). A phoneme is a *segment* of several frames, and what a frame looks like depends on its
# neighbours. The course tells the numbers of the phonemes, not their names.


# %%
def corpus_of(x, y, size):
    """Utterances one after the other: frames x (n, columns), classes y (n,), sizes (utterances,)."""
    end = size.cumsum(0)
    owner = torch.arange(len(size), device=x.device).repeat_interleave(size)  # (n,)
    return types.SimpleNamespace(x=x, y=y, size=size, start=end - size, end=end, owner=owner)


given, test = corpus_of(x, y, size), corpus_of(test_x, test_y, test_size)
colors = plt.cm.hsv(np.linspace(0, 0.95, CLASSES))[np.random.default_rng(3).permutation(CLASSES)]
colors = 0.35 + 0.65 * colors  # paler: the numbers stay legible
colors[0] = (0.9, 0.9, 0.9, 1)  # silence


def strip(axis, classes, name):
    """A band of colours with the class in each segment that is wide enough."""
    axis.imshow(colors[classes][None], aspect="auto", interpolation="nearest")
    starts = np.flatnonzero(np.diff(classes, prepend=-1))
    for start, end in zip(starts, [*starts[1:], len(classes)]):
        if end - start >= 5:
            axis.text((start + end - 1) / 2, 0, classes[start], ha="center", va="center", fontsize=8)
    axis.set(yticks=[0], yticklabels=[name])


def draw(corpus, strips, name, length=200, row=0.45):
    """The numbers of some frames, and below them bands of classes {name: (n,)}."""
    shown = slice(0, min(length, int(corpus.end[0])))
    heights = [4] + [1] * len(strips)
    fig, axes = plt.subplots(
        len(heights), 1, figsize=(8, row * sum(heights)), sharex=True, height_ratios=heights
    )
    numbers, smooth = corpus.x[shown, :13].T.cpu(), "bilinear"
    axes[0].imshow(numbers, "magma", aspect="auto", origin="lower", vmin=-3, vmax=3, interpolation=smooth)
    axes[0].set_ylabel("number")
    for axis, (label, classes) in zip(axes[1:], strips.items()):
        strip(axis, classes[shown].cpu().numpy().astype(int), label)
    axes[-1].set_xlabel("frame (10 ms)")
    show(name)


draw(given, {"spoken": given.y}, "data.jpg")

# %% [markdown]
# ## Validation: whole utterances, never frames
#
# A frame's neighbours are nearly the frame itself. Split by frames, and the net is asked about what it has
# just learned; so some utterances are held out whole. Speakers may stand on both sides, because those of the
# test do, too: nearly all of them also speak in the training part.


# %%
def part_of(corpus, rows):
    """Some utterances as a corpus of their own."""
    inside = torch.cat([torch.arange(corpus.start[k], corpus.end[k], device=device) for k in rows])
    return corpus_of(corpus.x[inside], corpus.y[inside], corpus.size[rows])


order = np.random.default_rng(SEED).permutation(len(given.size))
held = len(order) // (20 if PROFILE == "full" else 8)
check_rows, learn_rows = (torch.from_numpy(np.sort(part)).to(device) for part in (order[:held], order[held:]))
learn, check = part_of(given, learn_rows), part_of(given, check_rows)
sizes = {"learn": learn, "check": check, "test": test}
table([{"part": name, "utterances": len(one.size), "frames": len(one.x)} for name, one in sizes.items()])

# %% [markdown]
# ## Simple: one frame, one small net (0.32)
#
# The official net: 13 numbers in, two layers of `Linear` and ReLU, 41 scores out. Softmax makes them
# probabilities $p_c = e^{z_c} / \sum_k e^{z_k}$, and **cross-entropy** $-\ln p_y$ asks for more of the right
# one: where the net is sure and wrong, its slope is steep.

# %%
from torch import nn
from torch.nn import functional as F


def layer(inputs, width, norm, dropout):
    """`norm` and dropout come with *strong*."""
    parts = [nn.Linear(inputs, width), nn.ReLU(), nn.Dropout(dropout)]
    if norm:
        parts.insert(1, nn.BatchNorm1d(width))
    return nn.Sequential(*parts)


class Perceptron(nn.Module):
    """(batch, inputs) -> scores (batch, 41). As in the official net, `layers` come after a first one."""

    def __init__(self, inputs, layers, width, norm, dropout):
        super().__init__()
        sizes = [inputs] + [width] * layers
        self.hidden = nn.Sequential(*(layer(size, width, norm, dropout) for size in sizes))
        self.last = nn.Linear(width, CLASSES)

    def forward(self, x):
        return self.last(self.hidden(x))


# %% [markdown]
# ## Medium: look left and right (+0.29)
#
# A phoneme lasts 3 to 20 frames, moves while it lasts and blurs into its neighbours. So the net sees the frame
# with $n / 2$ frames on both sides. The official way writes all these windows into one matrix: at $n = 19$
# every number stands there 19 times, 8.9 GB for the real data. Here a window is made when its batch needs it,
# by **one gather**. At the border of an utterance its first or last frame is repeated: none comes from
# another one.
#
# More inputs are more to learn, and Adam's first steps are its wildest: from here on the **rate** rises for a
# tenth of the steps and then falls to zero. That is good custom, but the window brings the gain: with one frame
# this level stays at 0.32, with a constant rate it is as good (0.618 and 0.611, two seeds).


# %%
def windows(corpus, frames, n):
    """The n frames around each of `frames` (batch,), side by side: (batch, n * columns)."""
    around = frames[:, None] + torch.arange(-(n // 2), n // 2 + 1, device=frames.device)
    owner = corpus.owner[frames]
    around = around.clamp(corpus.start[owner][:, None], corpus.end[owner][:, None] - 1)
    return corpus.x[around].flatten(1)


def make_optimizer(model, how, steps):
    """AdamW; with `cycle` the rate rises for a tenth of the steps and falls to zero."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=how["rate"], weight_decay=0.02)
    if not how["cycle"]:
        return optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    schedule = dict(total_steps=steps, pct_start=0.1, cycle_momentum=False)
    return optimizer, torch.optim.lr_scheduler.OneCycleLR(optimizer, how["rate"], **schedule)


numbers = torch.tensor([0, 60, 64], device=device)
fig, axes = plt.subplots(1, 3, figsize=(8, 2), sharey=True)
for axis, one, number in zip(axes, windows(learn, numbers, 21), numbers.tolist()):
    axis.imshow(
        one.view(21, -1)[:, :13].T.cpu(), aspect="auto", origin="lower", cmap="magma", vmin=-3, vmax=3
    )
    axis.axvline(10, color="white", linestyle=":")
    axis.set(title=f"the window of frame {number}", xlabel="frame of the window")
axes[0].set_ylabel("number")
show("windows.png")

# %% [markdown]
# Left, the first frame of an utterance stands eleven times. The other two are neighbours: almost the same
# picture, shifted by four frames.
#
# ## Strong: wider, and held back (+0.076)
#
# With 21 frames in, a net learns its utterances by heart. **Dropout** switches off three of ten units at
# random in every step: none can rely on a single other one. Two customs come along: **batch normalisation**
# brings what goes into every ReLU to mean 0 and spread 1 of the batch, so that no layer has to follow the moods
# of the one below; **label smoothing** asks for 95 % of the right class and a little of all others. Weighed one
# by one (two seeds): with eleven frames 0.637 and 0.629, without dropout 0.659 and 0.658, without label
# smoothing 0.681 and 0.683, without batch normalisation 0.685 and 0.684, where strong has 0.687 and 0.686. The
# wider window and dropout carry this rung; label smoothing adds a little, batch normalisation nothing that shows.
# `layer` above has all that this rung adds.
#
# ## Boss: the whole utterance at once (+0.093)
#
# A window ends somewhere; a word does not care. A **recurrent net** carries what it has heard along the
# utterance, once from the left and once from the right, and judges frame $t$ from both states,
# $h_t = [\overrightarrow{h}_t, \overleftarrow{h}_t]$. It reads every frame once, where windows read it 21
# times. Utterances of about equal length make one rectangle, the shorter ones filled up.


# %%
def rectangle(corpus, rows):
    """Utterances side by side: frame numbers (batch, time), and which of them are no filling."""
    size, start = corpus.size[rows][:, None], corpus.start[rows][:, None]
    t = torch.arange(int(size.max()), device=size.device)
    return start + t.minimum(size - 1), t < size


class Recurrent(nn.Module):
    """(batch, time, inputs) -> (batch, time, 2 * width): one net reads forward, the other from the end."""

    def __init__(self, inputs, width):
        super().__init__()
        self.forward_net = nn.LSTM(inputs, width, batch_first=True)
        self.backward_net = nn.LSTM(inputs, width, batch_first=True)

    def forward(self, x, inside):
        t, last = torch.arange(x.shape[1], device=x.device), inside.sum(1, keepdim=True) - 1
        turn = torch.where(inside, last - t, t)[..., None]  # backwards, the filling stays behind
        from_left = self.forward_net(x)[0]
        from_right = self.backward_net(x.gather(1, turn.expand_as(x)))[0]
        return torch.cat([from_left, from_right.gather(1, turn.expand_as(from_right))], -1)


# %% [markdown]
# The backward net must not begin in the filling, so it reads each utterance turned round *within its own
# length*. Before both: two small convolutions, each over five frames. Recurrence stays in float32: rounding
# errors must not add up over a thousand steps.


# %%
class Listener(nn.Module):
    """Rectangle (batch, time, inputs) -> scores (frames that are no filling, 41)."""

    def __init__(self, inputs, layers, width, norm, dropout):
        super().__init__()
        self.near = nn.ModuleList(nn.Conv1d(size, width, 5, padding=2) for size in (inputs, width))
        self.norms = nn.ModuleList(nn.LayerNorm(width) if norm else nn.Identity() for _ in range(2))
        self.far = nn.ModuleList(Recurrent(size, width) for size in [width] + [2 * width] * (layers - 1))
        self.drop, self.last = nn.Dropout(dropout), nn.Linear(2 * width, CLASSES)

    def forward(self, x, inside):
        for conv, norm in zip(self.near, self.norms):
            x = F.gelu(norm(conv(x.transpose(1, 2)).transpose(1, 2))) * inside[..., None]
        with torch.autocast(x.device.type, enabled=False):
            x = x.float()
            for layer in self.far:
                x = self.drop(layer(x, inside))
        return self.last(x[inside])


# %% [markdown]
# Four hours of speech are little for such a net. So it never hears an utterance twice: in every epoch all are
# spoken up to 10 % faster or slower (frames interpolated, each with the class of the nearest one), noise is
# added, and stretches of time and neighbouring numbers are blanked. All of it for all utterances at once.


# %%
def between(low, high, count, dice):
    return (low + (high - low) * torch.rand(count, generator=dice)).to(device)


def hidden(place, size, longest, dice):
    """Marks one stretch of up to `longest` in each row; place (rows or frames, places)."""
    begin = between(0, 1, len(size), dice) * size
    return begin, begin + between(0, longest, len(size), dice)


def changed(corpus, blank, dice):
    """Every utterance spoken anew: another speed, noise, blanks in time and in the numbers."""
    speed = between(0.9, 1.1, len(corpus.size), dice)
    new = corpus_of(corpus.x, corpus.y, (corpus.size / speed).round().long())
    who = new.owner
    t = torch.arange(len(who), device=device) - new.start[who]  # a frame's place in its utterance
    old = (t * speed[who]).minimum(corpus.size[who] - 1)  # where it lies in the old one
    low = corpus.start[who] + old.long()
    high = (low + 1).minimum(corpus.end[who] - 1)
    x = torch.lerp(corpus.x[low], corpus.x[high], (old % 1)[:, None])
    x = x + 0.1 * torch.randn(x.shape, generator=dice).to(device)
    for _ in range(2):
        first, last = hidden(t, new.size, blank, dice)
        x = x.masked_fill(((t >= first[who]) & (t < last[who]))[:, None], 0)
    number = torch.arange(x.shape[1], device=device)
    first, last = hidden(number, torch.full_like(new.size, x.shape[1]), 3, dice)
    x = x.masked_fill((number >= first[who][:, None]) & (number < last[who][:, None]), 0)
    new.x, new.y = x, corpus.y[corpus.start[who] + old.round().long()]
    return new


dice = torch.Generator().manual_seed(SEED)
one = changed(part_of(learn, torch.tensor([0])), 25, dice)
draw(one, {"spoken": one.y}, "changed.jpg")

# %% [markdown]
# The first utterance to learn from, in this run the one of the first picture: spoken at another speed, with
# numbers and stretches of time that are blank.
#
# ## The levels
#
# A row an idea; each can be switched off alone.

# %% tags=["levels"]
# fmt: off
LEVELS = {       # simple  medium  strong  boss
    "context": (1,      11,     21,     "all"),  # frames side by side; "all": a recurrent net
    "cycle":   (False,  True,   True,   True),   # the rate rises and falls
    "norm":    (False,  False,  True,   True),   # batch normalisation; if recurrent, by layer
    "dropout": (0.0,    0.0,    0.3,    0.3),
    "smooth":  (0.0,    0.0,    0.05,   0.05),   # share of the answer that goes to all classes
    "augment": (False,  False,  False,  True),   # every epoch spoken anew
    "nets":    (1,      1,      1,      2),      # whose log-probabilities are averaged
}
SIZES = {
    "small": {
        "layers": (1,    2,    2,    2),     # after the first; of a recurrent net: all
        "width":  (256,  192,  320,  96),
        "epochs": (4,    4,    14,   16),
        "batch":  (512,  512,  512,  4096),  # frames
        "rate":   (1e-3, 2e-3, 2e-3, 9e-3),
        "blank":  (0,    0,    0,    10),    # frames, at most
    },
    "full": {
        "layers": (1,    2,    3,    5),
        "width":  (256,  1024, 2048, 384),
        "epochs": (5,    8,    40,   60),
        "batch":  (512,  2048, 4096, 24_000),
        "rate":   (1e-4, 1e-3, 2e-3, 2e-3),
        "blank":  (0,    0,    0,    25),
    },
}
# fmt: on
settings = choose(LEVELS, SIZES)


def make_net(how):
    sizes = (how["layers"], how["width"], how["norm"], how["dropout"])
    inputs = learn.x.shape[1]
    if how["context"] == "all":
        return Listener(inputs, *sizes)
    return Perceptron(how["context"] * inputs, *sizes)


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
# A batch is a list of frames, or for the recurrent net of utterances of about one length; either way it holds
# about as many frames as another. Of several processes each takes every k-th.


# %%
def make_batches(corpus, how, steps, dice):
    """The epoch in `steps` lists: of frames, or of utterances by length, with a little chance in it."""
    if how["context"] != "all":
        return torch.randperm(len(corpus.x), generator=dice).to(device).tensor_split(steps)
    order = (corpus.size * between(0.95, 1.05, len(corpus.size), dice)).argsort()
    number = (corpus.size[order].cumsum(0) - 1) * steps // len(corpus.x)  # of the batch
    batches = order.split(number.bincount(minlength=steps).tolist())
    return [batches[k] for k in torch.randperm(steps, generator=dice)]


def my_share(rows):
    world = accelerator.num_processes
    if len(rows) < world:
        return rows
    return rows[accelerator.process_index :: world]


def make_batch(corpus, rows, how):
    """What the net gets, and the frames (batch,) that it answers for."""
    if how["context"] != "all":
        return (windows(corpus, rows, how["context"]),), rows
    at, inside = rectangle(corpus, rows)
    return (corpus.x[at] * inside[..., None], inside), at[inside]


@torch.no_grad()
def ask(model, corpus, how):
    """Log-probabilities (frames, 41), in the order of the corpus."""
    model = bare(model).eval()  # processes have different numbers of parts to ask about
    rows = torch.arange(len(corpus.x), device=device).split(8192)
    if how["context"] == "all":
        rows = corpus.size.argsort().split(32)
    found = torch.zeros(len(corpus.x), CLASSES, device=device)
    for part in rows[accelerator.process_index :: accelerator.num_processes]:
        inputs, frames = make_batch(corpus, part, how)
        with accelerator.autocast():
            logits = model(*inputs)
        found[frames] = logits.float().log_softmax(-1)
    return accelerator.reduce(found)


def accuracy(logp, corpus):
    return float((logp.argmax(-1) == corpus.y).float().mean())


# %% tags=["train"]
def train(stage, how):
    """A net that has learned the utterances `learn`; those of `check` are only looked at."""
    epochs, steps = how["epochs"], max(12, len(learn.x) // how["batch"])
    model = make_net(how).to(device)
    optimizer, scheduler = make_optimizer(model, how, epochs * steps)
    model, optimizer = accelerator.prepare(model, optimizer)
    parts = dict(model=model, optimizer=optimizer, scheduler=scheduler)
    depends = [train, how | {"nets": "any number"}, learn.x, learn.y, learn.size]
    done = load_checkpoint(stage, depends, **parts)
    for epoch in tqdm(range(done + 1, epochs + 1), stage, disable=QUIET, leave=False):
        tic, total = time.perf_counter(), torch.zeros(2, device=device)
        dice = torch.Generator().manual_seed(int(fingerprint([SEED, stage, epoch]), 16))
        corpus = changed(learn, how["blank"], dice) if how["augment"] else learn
        model.train()
        for rows in make_batches(corpus, how, steps, dice):
            inputs, frames = make_batch(corpus, my_share(rows), how)
            logits, y = model(*inputs), corpus.y[frames].long()
            loss = F.cross_entropy(logits, y, label_smoothing=how["smooth"])
            optimizer.zero_grad()
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            total += torch.stack([loss.detach(), (logits.argmax(-1) == y).float().mean()]) / steps
        log = dict(stage=stage, epoch=epoch, loss=float(total[0]), train=float(total[1]))
        log["examples_per_second"] = len(corpus.x) / (time.perf_counter() - tic)
        if epoch % max(1, epochs // 7) == 0 or epoch == epochs:
            history.append(log | dict(valid=accuracy(ask(model, check, how), check)))
            save_checkpoint(stage, epoch, **parts)
    return model


# %% [markdown]
# A net is asked as soon as it has learned. *Train* is counted while it learns, with dropout on and on
# changed utterances: it may lie below *valid*.


# %%
def curves(axis, stages, keys=("train", "valid")):
    """Accuracy by epoch; one colour a stage, in training dotted."""
    for k, stage in enumerate(stages):
        points = [point for point in history if point["stage"] == stage]
        for key in keys:
            style, line = {"train": ":", "valid": "-"}[key], [point[key] for point in points]
            label = f"{stage}, {key}"
            axis.plot([point["epoch"] for point in points], line, f"o{style}", color=f"C{k}", label=label)
    axis.set(xlabel="epoch", ylabel="accuracy")
    axis.legend(fontsize=8)


held_out, answers, parameters = [], [], 0
for number in range(settings["nets"]):
    model = train(f"net-{number}", settings)
    say("{stage}: loss {loss:.3f}, accuracy {valid:.3f} on unseen utterances".format(**history[-1]))
    held_out.append(ask(model, check, settings))
    answers.append(ask(model, test, settings))
    parameters += sum(weight.numel() for weight in model.parameters())
    accelerator.free_memory()
plt.figure(figsize=(8, 2.6))
curves(plt.gca(), [f"net-{number}" for number in range(settings["nets"])])
show("curves.png")

# %% [markdown]
# ## Prediction and submission
#
# The mean of the log-probabilities decides. The frames never left the order of `test_split.txt`.

# %% tags=["predict"]
checked, answer = torch.stack(held_out).mean(0), torch.stack(answers).mean(0)
if not answer.isfinite().all():
    raise Stop(f"The training diverged (the loss is infinite): lower `rate` of {LEVEL} in SIZES.")
guess, prediction = checked.argmax(-1), answer.argmax(-1).tolist()
summary = dict(valid_score=accuracy(checked, check), parameters=parameters)
summary["examples_per_second"] = float(np.median([point["examples_per_second"] for point in history]))
alone = [f"{accuracy(one, check):.3f}" for one in held_out]
say(f"validation: {summary['valid_score']:.3f}, each net alone: {', '.join(alone)}")

# %% cellView="form" jupyter={"source_hidden": true} tags=["submission"]
# @title The submission file, and the picture of the header
submission = OUT / ("prediction.csv" if REAL else "prediction.sample.csv")


def write_submission(path):
    with aside(path) as part, part.open("w", newline="") as file:
        file.write("Id,Class\n")
        file.writelines(f"{row},{one}\n" for row, one in enumerate(prediction))


def is_class(text):
    return text.isdecimal() and text == str(int(text)) and int(text) < CLASSES


def check_submission(path):
    check_table(path, "Id,Class", range(len(test.x)), is_class, f"a class from 0 to {CLASSES - 1}")


def score_submission(path, answers):
    """The judge: share of right frames."""
    guess = np.loadtxt(path, delimiter=",", skiprows=1, dtype=np.int64)[:, 1]
    return np.mean(guess == np.load(answers / "classes.npy"))


if MAIN:
    write_submission(submission)
    silence = prediction.count(0) / len(prediction)
    if not 0.05 <= silence <= 0.4:
        say(f"NOTE: {silence:.0%} of the frames are class 0 (silence), 5 to 40 % would be usual")
draw(check, {"spoken": check.y, "the net": guess}, "hero.jpg", 100, row=0.32)


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
        "simple": [0.31983, 0.32133, 0.3169],
        "medium": [0.60966, 0.61252, 0.6115],
        "strong": [0.68733, 0.68624, 0.68938],
        "boss": [0.77694, 0.78417, 0.78205],
    },
    "without": {
        "context": [0.62677],
        "cycle": [0.78805, 0.77605, 0.78328],
        "norm": [0.7753, 0.77503, 0.77175],
        "dropout": [0.77871, 0.77878, 0.77673],
        "smooth": [0.77639, 0.77544, 0.77373],
        "augment": [0.7738, 0.78001, 0.77019],
        "nets": [0.76043],
    },
}

# %% [markdown] tags=["report"]
# ## Report
#
# **1. What is each idea worth?** On the sample, at boss, each idea was switched off alone (`WITHOUT`).

# %% tags=["report"]
show_worth()

# %% [markdown] tags=["report"]
# The whole utterance carries this level; a second net brings 0.02. Normalisation, changed utterances and label
# smoothing bring less than 0.01 each: more than half the range of the seeds, hardly more than all of it. Dropout
# and the falling rate bring nothing that shows here. With four hours of real speech that may differ.
#
# **2. Narrow and deep, or wide and shallow (question 1 of the course)?** A fair question only at equal size. With
# $d$ inputs, $L$ layers after the first and $h$ units a net has $(d + 1) h + L (h^2 + h) + 41 (h + 1)$
# numbers; for the wide one we solve that for $h$. Both get windows of eleven frames.


# %% tags=["report"]
PLAIN = settings | dict(context=11, cycle=True, norm=False, dropout=0.0, smooth=0.0, augment=False)
PLAIN |= dict(layers=2, width=128, epochs=min(6, settings["epochs"]), batch=512, rate=2e-3)
if PROFILE == "full":
    PLAIN |= dict(width=1024, batch=2048, rate=1e-3)


def experiment(name, **changes):
    """One row of a table: a perceptron with its accuracies; the first one while it learned."""
    how = PLAIN | changes
    model = train(name, how)
    last = [point for point in history if point["stage"] == name][-1]
    weights = sum(weight.numel() for weight in model.parameters())
    row = {"net": name, "numbers": weights, "while learning": last["train"]}
    row |= {"learned": accuracy(ask(model, learn, how), learn), "unseen": last["valid"]}
    accelerator.free_memory()
    return row


def width_for(numbers, inputs, layers):
    """The width at which a net of so many layers has about so many numbers."""
    b = inputs + 1 + layers + CLASSES  # layers h^2 + b h + 41 = numbers
    return round((-b + (b * b + 4 * layers * (numbers - CLASSES)) ** 0.5) / (2 * layers))


deep = experiment("narrow, deep", layers=6)
wide = width_for(deep["numbers"], 11 * learn.x.shape[1], 2)
table([deep, experiment("wide, shallow", layers=2, width=wide)])
plt.figure(figsize=(8, 2.4))
curves(plt.gca(), ["narrow, deep", "wide, shallow"])
show("deep-wide.png")

# %% [markdown] tags=["report"]
# Wide and shallow, 0.64 against 0.56 on unseen frames, because the deep one is not even good at what it has
# *learned* (0.60 against 0.73): this is no over-fitting but **optimization**. Six layers of plain ReLU pass on
# little of the slope, and six epochs are too few for it.
#
# **3. How much dropout (question 2)?** The same net three times. Mind what "training accuracy" means: *while learning*
# units are missing, *learned* is the same frames with all of them.

# %% tags=["report"]
rates = (0.25, 0.5, 0.75)
rows = [experiment(f"dropout {rate}", dropout=rate) for rate in rates]
table(rows)
plt.figure(figsize=(8, 2.4))
for key in ("while learning", "learned", "unseen"):
    plt.plot(rates, [row[key] for row in rows], "o-", label=key)
plt.xticks(rates)
plt.xlabel("dropout")
plt.ylabel("accuracy")
plt.legend()
show("dropout.png")

# %% [markdown] tags=["report"]
# The more dropout, the worse here, on *unseen* frames as well (0.60, 0.56, 0.40), because a net that has had six
# epochs is far from knowing its frames by heart. Dropout does what it is meant for: the distance from *learned* to
# *unseen* shrinks from 0.036 to 0.002. Only there is not yet anything to cure; at *strong*, with more epochs and a
# wider window, there is. And *while learning* lies below *unseen* in each row: that is no sign of luck, but of
# units that are missing.
#
# **4. How much context?** The same net with 1 to 31 frames, and the nets of this run.

# %% tags=["report"]
counts = (1, 5, 11, 21, 31)
rows = [experiment(f"{n} frames", context=n) for n in counts]
plt.figure(figsize=(8, 2.4))
plt.plot(counts, [row["learned"] for row in rows], "o:", label="perceptron, learned")
plt.plot(counts, [row["unseen"] for row in rows], "o-", label="perceptron, unseen")
plt.axhline(summary["valid_score"], color="C2", label=f"{LEVEL}, unseen")
plt.xticks(counts)
plt.xlabel("frames in the window")
plt.ylabel("accuracy")
plt.legend(fontsize=8)
show("context.png")

# %% [markdown] tags=["report"]
# Up to eleven frames each one helps: a phoneme lasts about eight, and half of it may be blurred. From there on
# *learned* runs away (0.84 with 31 frames) and *unseen* creeps (0.68), because the net begins to know its
# utterances by heart. The whole utterance at once, with fewer numbers a frame, is above them all.
#
# **5. Where is it wrong?** Near the borders of segments, where the mouth is on its way from one phoneme to the
# next and even people disagree on the frame? And which classes are taken for which?


# %% tags=["report"]
def to_border(corpus):
    """How many frames lie between each frame and the nearer end of its segment: 0 at the border."""
    y, who = corpus.y, corpus.owner
    cut = torch.ones_like(y, dtype=torch.bool)
    cut[1:] = (y[1:] != y[:-1]) | (who[1:] != who[:-1])
    segment = cut.cumsum(0) - 1
    size = segment.bincount()
    place = torch.arange(len(y), device=y.device) - (size.cumsum(0) - size)[segment]
    return place.minimum(size[segment] - 1 - place)


right, far = (guess == check.y).float(), to_border(check).clamp(max=6)
by_distance = torch.bincount(far, right, minlength=7) / torch.bincount(far, minlength=7).clamp(min=1)
truth = check.y.long()
confusion = torch.bincount(truth * CLASSES + guess, minlength=CLASSES**2).view(CLASSES, CLASSES).cpu()
share = confusion / confusion.sum(1, keepdim=True).clamp(min=1)
fig, axes = plt.subplots(1, 2, figsize=(8, 3), width_ratios=(1, 1.2))
axes[0].plot(range(7), by_distance.cpu(), "o-")
axes[0].set(xlabel="frames to the border of the segment", ylabel="accuracy", ylim=(0, 1))
axes[0].set(xticks=range(7), xticklabels=[*range(6), "6+"])
picture = axes[1].imshow(share, cmap="Blues", vmin=0, vmax=1)
axes[1].set(xlabel="the net says", ylabel="spoken class")
fig.colorbar(picture, label="share of its frames")
show("errors.png")

wrong = confusion - torch.diag(confusion.diag())
both = torch.triu(wrong + wrong.T).flatten()
rows = []
for k in both.argsort(descending=True)[:6].tolist():
    count = int(both[k])
    row = {"classes": f"{k // CLASSES} and {k % CLASSES}", "wrong frames": count}
    rows.append(row | {"of all wrong": count / int(wrong.sum())})
table(rows)

# %% [markdown] tags=["report"]
# At the border of a segment 0.59 of the frames are right, six frames away from it 0.97, because there the mouth
# is still half at the phoneme before. Next come pairs with neighbouring numbers (31 and 32, 23 and 24): the
# sample has phonemes in pairs that sound alike, and where they do, only the word can tell them apart.

# %% [markdown] tags=["try"]
# ## Try it
#
# Predict what happens before you run it.
#
# 1. `WITHOUT = "augment"`: what happens to the distance between *train* and *valid*?
# 2. In `windows`, leave the `clamp` out and let the window reach into the next utterance. How much does it cost,
#    and why so little?
# 3. Let the backward net begin in the filling (`turn` as `t.flip(0)`). Which utterances of a batch suffer?

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
