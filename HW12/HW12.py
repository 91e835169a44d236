# %% [markdown] tags=["header"]
# # HW12 · Reinforcement learning: land on the moon
#
# <!-- badges -->
# [![Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/ml2022-notebooks/ml2022-spring/blob/main/HW12/HW12.ipynb)
# [![Kaggle](https://kaggle.com/static/images/open-in-kaggle.svg)](https://kaggle.com/kernels/welcome?src=https://github.com/ml2022-notebooks/ml2022-spring/blob/main/HW12/HW12.ipynb)
# <!-- /badges -->
#
# ![The same lander before and after training: it tumbles onto the moon, it comes down on the pad](hero)
#
# A lander falls towards the moon and has four moves: nothing, left engine, main engine, right engine. Nobody
# can say which one is right at a given moment: there are no labels. There is a **reward**, a little for every
# step that brings the craft nearer to a soft landing, a lot for the end of the flight. The lecture's three
# steps still hold: the **function** is a policy $\pi_\theta(a|s)$ that says how likely each move is, the
# **loss** is minus the total reward, the **optimizer** is the usual one. New is that moves are drawn by
# chance and the moon is a black box: no gradient flows through it. *Policy gradient* makes each move that was
# flown more or less likely, by a **number that multiplies** $\log\pi$. The homework is: which number?
#
# 登月小艇正往月球墜落，每一刻有四個動作可選：不動、左引擎、主引擎、右引擎。沒有人能標註哪個動作才正確，只有**獎勵**：越接近平穩降落，每一步得到的獎勵越多，最後一步則大加或大扣。機器學習的三個步驟依然成立：**函式**是策略$\pi_\theta(a|s)$，**損失**是負的總獎勵，**最佳化**照舊。困難在於動作是抽樣得來，環境又是黑盒子，梯度傳不過去。策略梯度的作法是拿一個**數字**去乘$\log\pi$，讓好的動作機率變大，壞的變小。這份作業要問的就是：該乘上哪個數字？
#
# <!-- box -->
# > **Press *Run all*.** This run is *boss*: expect mean return 274.9 on the sample in about 85 seconds on two CPU cores. GPU: not measured.
# <!-- /box -->
#
# Lectures: [three steps](https://youtu.be/XWukX-ayIrs)
# ([B](https://www.bilibili.com/video/BV1Wv411h7kN?p=114)), [policy gradient](https://youtu.be/US8DFaAZcp4)
# ([B](https://www.bilibili.com/video/BV1Wv411h7kN?p=115)), [actor-critic](https://youtu.be/kk6DqWreLeU)
# ([B](https://www.bilibili.com/video/BV1Wv411h7kN?p=116)),
# [PPO](https://www.bilibili.com/video/BV1Wv411h7kN?p=121) · homework: [video](https://youtu.be/GXiUsPtXL_s)
# ([B](https://www.bilibili.com/video/BV1Wv411h7kN?p=120)),
# [slides](https://speech.ee.ntu.edu.tw/~hylee/ml/ml2022-course-data/hw12_RL_slides_english_version.pdf)
#
# The score is the mean return of the policy over 100 flights from seeds that it has never seen (higher is
# better). The course's baselines are means of the judge's five flights.
#
# <!-- ladder -->
# | level | what it adds | sample | course baseline (real data) | seconds |
# |---|---|---|---|---|
# | simple | the weight of $\log\pi$ is the reward of this step, as in the official sample | 37.9 ± 15.2 | 0 | 70 |
# | medium | the weight is all reward to come, discounted; a bonus for being undecided | 106.4 ± 4.0 | 100 | 88 |
# | strong | a critic: the weight is the advantage, and a batch is a piece of many flights | 226.3 ± 8.0 | 170 | 78 |
# | boss | PPO: each batch is used five times | 274.9 ± 1.6 | 270 | 85 |
# <!-- /ladder -->

# %% tags=["parameters"]
# @title Parameters
LEVEL = "boss"  # @param ["boss", "strong", "medium", "simple"]
WITHOUT = ""  # @param {type:"string"}
DATA = "auto"  # @param ["auto", "real", "sample"]
PROFILE = "auto"  # @param ["auto", "full", "small", "tiny"]
SEED = 2022  # @param {type:"integer"}
DATA_DIR = "data/HW12"  # @param {type:"string"}
OUT_DIR = "out/HW12"  # @param {type:"string"}
RESUME = True  # @param {type:"boolean"}
SUBMIT = False  # @param {type:"boolean"}
# only at boss: fly each of the judge's episodes so often, hand in the best
BEST_OF_N = 16  # @param {type:"integer"}

# %% cellView="form" jupyter={"source_hidden": true} tags=["homework"]
# @title The homework's facts
HW = "HW12"
METRIC = "mean return"
HIGHER_IS_BETTER = True
SLUG = ""  # the course judges on its own server, not on Kaggle
JUDGE = "https://ml.ee.ntu.edu.tw/hw12/"
BASELINES = {"simple": 0, "medium": 100, "strong": 170, "boss": 270}
FILES = {}  # the data is an environment, it comes in a package
MIRRORS = []
HASHES = set()
OWN = {"BEST_OF_N": range(1, 1001)}
NEEDS = {"torch": "torch", "numpy": "numpy", "matplotlib": "matplotlib", "pandas": "pandas", "tqdm": "tqdm"}
NEEDS |= {"accelerate": "accelerate", "filelock": "filelock", "PIL": "pillow"}
NEEDS |= {"gymnasium": "gymnasium[box2d]", "Box2D": "gymnasium[box2d]", "pygame": "gymnasium[box2d]"}
MIXED_PRECISION = False  # nets of 5,000 numbers: half precision would gain nothing
LESS_MEMORY = "this homework hardly uses it, so another program does; end that one"
ENVIRONMENT = "LunarLander-v3"
LIMIT = 1000  # a flight is cut off after so many steps
JUDGE_SEED = 543  # this and the number of flights are the course's own: do not change
EPISODES = 5
FINGERPRINT = [-0.0012620, 1.3984586, -0.1278409, -0.5538412, 0.0014691, 0.0289579, 0, 0]

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
# @title The environment: make it, and see that it flies as known
import gymnasium as gym
from torch import nn


def make_env(**options):
    """The environment as the judge makes it, with its limit of 1000 steps."""
    try:
        return gym.make(ENVIRONMENT, **options)
    except (ImportError, gym.error.Error) as error:
        why = f"gymnasium {gym.__version__} cannot make {ENVIRONMENT} ({' '.join(str(error).split())})"
        raise Stop(f'{why}: pip install --upgrade "gymnasium[box2d]"') from None


torch.set_num_threads(1)  # the nets are tiny: a second thread would only wait for the first
first, _ = make_env().reset(seed=JUDGE_SEED)
import Box2D  # after make_env, which says what to do where it is missing

VERSIONS = {"gymnasium": gym.__version__, "Box2D": vars(Box2D).get("__version__", "unknown")}
software = " and ".join(f"{name} {version}" for name, version in VERSIONS.items())
COMPARABLE = bool(np.allclose(first, FINGERPRINT, atol=1e-6))
if COMPARABLE:
    say(f"The judge's first observation is the known one: {software} fly as expected.")
else:
    say(f"THE JUDGE'S FIRST OBSERVATION IS NOT THE KNOWN ONE: {software} fly otherwise.")
    say("Training works, but the submission is not comparable: elsewhere its flights will crash.")
numbers = ["x", "y", "speed in x", "speed in y", "angle", "turning", "left leg", "right leg"]
meanings = ["the pad is at 0", "the pad is at 0", "", "downwards is negative", "0 is upright", ""]
meanings += ["1: it touches the ground"] * 2
table(
    [
        {"number": name, "at the judge's start": value, "meaning": text}
        for name, value, text in zip(numbers, first, meanings)
    ]
)

# %% [markdown]
# ## The data: an environment
#
# `LunarLander-v3` of Gymnasium, with the Box2D physics engine. The pilot sees the eight numbers above. The
# reward of a step is how much nearer, slower and more upright the craft became, plus 10 for a leg on the
# ground, minus 0.3 when the main engine burns and 0.03 when a side engine does. The last step is worth
# **-100** for a crash and **+100** for coming to rest. A flight has at most 1000 steps; a good landing
# collects 200 to 300. Three quirks:
#
# - all chance (terrain, first push, engine noise) comes from one generator. A reset draws 16 numbers, every
#   step draws 2. So the terrain of the judge's second flight depends on *how long* the first one was;
# - after a crash `step` raises no error, it goes on paying -100. Who replays has to look at `terminated`;
# - being cut off after 1000 steps (`truncated`) is no crash: the flight would have gone on.
#
# The moon is a program: nothing to download, sample and real thing, `small` and `full` are the same. Only the
# file is called `Action_List.sample.npy` for the one and `Action_List.npy` for the other.


# %%
def film(moves, seed, every=8):
    """A flight with the camera on -> its pictures (pictures, 400, 600, 3), and the reward of each step."""
    env = make_env(render_mode="rgb_array")
    env.reset(seed=seed)
    pictures, rewards = [env.render()], []
    for step, move in enumerate(moves):
        _, reward, ended, _, _ = env.step(move)
        rewards.append(float(reward))
        if ended or step % every == 0:
            pictures.append(env.render())
        if ended:
            break
    return np.stack(pictures), np.array(rewards)


by_chance = np.random.default_rng(3).integers(4, size=LIMIT).tolist()
crash, crash_rewards = film(by_chance, seed=4000)
fig, axes = plt.subplots(1, 2, figsize=(8, 2.7))
axes[0].imshow(crash[::2].max(0))  # the brightest of all pictures: the craft is many times in one
axes[0].set(xticks=[], yticks=[], title="a flight with moves drawn by chance")
axes[1].plot(crash_rewards, ".-", markersize=3, linewidth=0.6)
axes[1].set(xlabel="step", ylabel="reward", title=f"its rewards: {crash_rewards.sum():.0f} in all")
show("random.png")

# %% [markdown]
# A few points a step for falling nearer to the pad, less and less as it falls faster, and -100 for the crash.
# Which of the moves was to blame? Not the last one. That is the difficulty of this homework in one picture.
#
# ## Many landers at once
#
# The official sample flies one lander and asks the net for one move at a time; the net then costs several
# times as much as the physics. Here a whole **fleet** is in the air: one matrix product chooses the moves of
# all of them, in plain numpy and always on the CPU (for nets of 5,000 numbers a GPU would only wait), and the
# gradient is computed later, in one batch. `(logits + noise).argmax()` with Gumbel noise *is* a draw from
# $\text{softmax}(\text{logits})$, and without the noise it is the greedy move, the likeliest one. So all
# chance of a flight can be drawn beforehand.
#
# A flight has **ended** when the craft has crashed or come to rest. It is **over** when it has ended or its
# 1000 steps are used up. The difference will matter at *strong*.


# %%
def think(pilot, x):
    """The policy net in numpy: (landers, 8) -> logits (landers, 4)."""
    for weight, bias in pilot[:-1]:
        x = np.tanh(x @ weight + bias)
    weight, bias = pilot[-1]
    return x @ weight + bias


class Fleet:
    """Several landers in the air at once, each in an environment of its own."""

    def __init__(self, size):
        self.envs = [make_env().unwrapped for _ in range(size)]
        self.landings = []  # of each flight that is over: total reward, last reward

    def start(self, states):
        """New flights; states[k] is the seed of lander k, or the state of its random generator."""
        self.x = np.zeros((len(states), 8), np.float32)
        self.age = [0] * len(states)
        self.total = [0.0] * len(states)
        for k, state in enumerate(states):
            seed = None
            if isinstance(state, dict):
                self.envs[k].np_random.bit_generator.state = state
            else:
                seed = int(state)
            self.x[k], _ = self.envs[k].reset(seed=seed)

    def step(self, k, move):
        """A move of lander k -> what it sees, its reward; has the flight ended, is it over?"""
        x, reward, ended, _, _ = self.envs[k].step(move)
        self.age[k] += 1
        self.total[k] += float(reward)
        over = ended or self.age[k] == LIMIT
        if over:
            self.landings.append((self.total[k], float(reward)))
            self.age[k] = 0
            self.total[k] = 0.0
        return x, reward, ended, over


# %%
def fly(fleet, pilot, noise, again=False):
    """Noise (steps, landers, 4) -> arrays (steps, landers); who is down stays down or starts `again`."""
    shape = noise.shape[:2]
    flights = {name: np.zeros((*shape, 8), np.float32) for name in ("x", "after")}
    flights |= {name: np.zeros(shape, bool) for name in ("flown", "ended", "over")}
    flights |= {"action": np.zeros(shape, int), "reward": np.zeros(shape)}
    flying = list(range(shape[1]))
    for t in range(shape[0]):
        flights["x"][t] = fleet.x
        moves = (think(pilot, fleet.x) + noise[t]).argmax(1).tolist()
        flights["action"][t] = moves
        for k in list(flying):
            x, reward, ended, over = fleet.step(k, moves[k])
            flights["flown"][t, k] = True
            flights["ended"][t, k], flights["over"][t, k] = ended, over
            flights["after"][t, k], flights["reward"][t, k] = x, reward
            if over and again:
                x, _ = fleet.envs[k].reset()
            elif over:
                flying.remove(k)
            fleet.x[k] = x
        if not flying:
            break
    return {name: values[: t + 1] for name, values in flights.items()}


# %% [markdown]
# ## Validation: seeds are the split
#
# There is no data set to split, but there are seeds. Training, the choice of the pilot, the judge and the 100
# unseen flights of the score share none. A trial flight takes terrain *and* dice from its seed, so it comes
# out the same whoever flies it. The judge's own five flights choose nothing: a mean of five is a lottery.


# %%
TRAIN_SEEDS = range(1_000_000, 2**31)
VALID_SEEDS = range(5000, 5020)  # after each epoch
CHOICE_SEEDS = range(5100, 5200)  # the last epochs once more
UNSEEN_SEEDS = range(40_000, 40_100)  # once, at the end


def trial(pilot, seeds, greedy):
    """One flight from each seed -> arrays (steps, flights)."""
    if PROFILE == "tiny":
        seeds = seeds[:12]
    noise = np.stack([np.random.default_rng([seed, 12]).gumbel(size=(LIMIT, 4)) for seed in seeds], 1)
    if greedy:
        noise = np.zeros_like(noise)
    fleet = Fleet(len(seeds))
    fleet.start(seeds)
    return fly(fleet, pilot, noise)


def evaluate(pilot):
    """Mean return on the validation seeds."""
    return float(trial(pilot, VALID_SEEDS, greedy=False)["reward"].sum(0).mean())


nobody = [(np.zeros((8, 4)), np.zeros(4))]  # all moves equally likely
guesses = trial(nobody, VALID_SEEDS, greedy=False)
guess_returns = guesses["reward"].sum(0)
fig, axes = plt.subplots(1, 2, figsize=(8, 2.6))
for k in range(len(guess_returns)):
    path = guesses["x"][guesses["flown"][:, k], k]
    axes[0].plot(path[:, 0], path[:, 1], linewidth=0.7)
axes[0].set(xlabel="x (the pad is at 0)", ylabel="y", title="flights by chance")
axes[1].hist(guess_returns, bins=15)
axes[1].axvline(guess_returns.mean(), color="black", label=f"mean {guess_returns.mean():.0f}")
axes[1].set(xlabel="return: all rewards of a flight", ylabel="flights")
axes[1].legend()
show("chance.png")

# %% [markdown]
# That mean is what any training has to beat.
#
# ## Simple: the reward of this step (38)
#
# The gradient of the mean return is a mean over what was flown,
#
# $$\nabla_\theta \bar R = \mathbb{E}\Big[\sum_t A_t\, \nabla_\theta \log \pi_\theta(a_t|s_t)\Big],$$
#
# and the rungs differ in the weight $A_t$. It looks like classification: the move that was flown is the
# label, and its cross-entropy is weighed. Version 0 of the lecture, and the official sample, take $A_t =
# r_t$, the **reward of this very step**. Who brakes now for a soft landing later is not paid for it.
#
# At every level the weights are normalised over the batch: half of the moves are "better than usual" then.
# The net has two hidden layers and starts with orthogonal weights, the last of them nearly zero: all moves
# equally likely.


# %%
def make_net(outputs, gain):
    """8 numbers -> two hidden layers with tanh -> outputs."""
    net = nn.Sequential(nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, outputs))
    for layer, scale in zip(net[::2], (2**0.5, 2**0.5, gain)):
        nn.init.orthogonal_(layer.weight, scale)
        nn.init.zeros_(layer.bias)
    return net


def as_pilot(weights):
    """The weights of a net for `think`."""
    pairs = [(weights[f"{k}.weight"], weights[f"{k}.bias"]) for k in (0, 2, 4)]
    return [(np.ascontiguousarray(weight.cpu().numpy().T), bias.cpu().numpy()) for weight, bias in pairs]


def reward_now(flights, gamma):
    return flights["reward"]


def normalise(weight):
    """Mean 0 and spread 1 over the batch: the simplest baseline."""
    return (weight - weight.mean()) / (weight.std() + 1e-8)


def log_pi(logits, action):
    return logits.log_softmax(-1).gather(1, action[:, None]).squeeze(1)


# %% [markdown]
# ## Medium: all reward to come (+68)
#
# A move is to blame for what comes *after* it. Versions 1 and 2 weigh it with the **reward to go**,
# discounted because what is far away was hardly its doing: $G_t = \sum_{n \ge t} \gamma^{n-t} r_n$. The sum
# runs backwards, and it starts anew where a flight was over. A small bonus for **entropy**, from here on,
# keeps the policy trying: one that is sure of a poor habit has stopped to learn.


# %%
def add_up(values, over, factor):
    """Of each step: its value, plus factor times that sum of the next step, to the end of the flight."""
    sums = np.zeros_like(values)
    later = 0.0
    for t in reversed(range(len(values))):
        later = values[t] + factor * ~over[t] * later
        sums[t] = later
    return sums


def reward_to_go(flights, gamma):
    return add_up(flights["reward"], flights["over"], gamma)


plt.figure(figsize=(8, 2.4))
only_end = np.arange(len(crash_rewards)) == len(crash_rewards) - 1
for gamma in (0.99, 0.999):
    to_go = add_up(crash_rewards, only_end, gamma)
    plt.plot(to_go, label=f"reward to go, discount {gamma}")
plt.plot(crash_rewards, linewidth=0.6, color="black", label="reward of the step")
plt.xlabel("step of the flight by chance")
plt.ylabel("weight")
plt.ylim(top=130)
plt.legend(ncols=3, loc="upper center")
show("to-go.png")

# %% [markdown]
# Now every move of this flight is to blame, not only the last ones. With $\gamma = 0.99$ a step in 250 steps
# counts $0.99^{250} = 0.08$: from high up the +100 for landing can hardly be seen. With 0.999 it counts 0.78,
# but then all luck of the rest of the flight is in the sum.
#
# ## Strong: better than expected? (+120)
#
# A **critic** $V(s)$, a second net, learns by regression how much reward is still to come from a state.
# Versions 3.5 and 4 ask it what was to be expected. $\delta_t$ says how much better one step went than that,
# and the **advantage** adds up these surprises:
#
# $$\delta_t = r_t + \gamma V(s_{t+1}) - V(s_t),\qquad A_t = \sum_{n \ge t} (\gamma\lambda)^{n-t} \delta_n .$$
#
# $\lambda = 0$ is version 4 (little luck in it, but wrong while the critic is), $\lambda = 1$ version 3.5
# (right on average, all luck in it); here $\lambda = 0.98$. After an **ended** flight there is no future,
# $V(s_{t+1})$ counts 0. A flight that was only cut off has one, and $V(s_{t+1})$ stands for it. Whoever takes
# the one for the other teaches the pilot to fear the clock.


# %%
def advantage(flights, gamma, lam=0.98):
    """Generalised advantage; `value` and `later` are V of the states before and after each step."""
    future = gamma * flights["later"] * ~flights["ended"]
    surprise = flights["reward"] + future - flights["value"]
    return add_up(surprise, flights["over"], gamma * lam)


@torch.no_grad()
def ask(critic, states):
    """The critic's numbers for states (steps, landers, 8)."""
    return critic(torch.tensor(states)).squeeze(-1).numpy()


# %% [markdown]
# The critic buys two more things. With less luck in the weight the discount can rise to 0.999, and the
# landing comes into sight. And a flight need not be over to be judged: a batch is a short **piece** of the
# flights in the air, so the policy learns many times as often. Up to *medium* it is one **whole** flight of
# each lander: what comes after the end of a piece would be lost there. The critic sees rewards times 0.1, a
# size that a fresh net can reach.


# %%
def collect(fleet, actor, fresh):
    """The next flights to learn from; `fresh`: begin anew, with seeds that torch's generator draws."""
    steps = LIMIT
    if settings["pieces"]:
        steps = settings["piece"]
    if fresh or not settings["pieces"]:
        fleet.start(torch.randint(TRAIN_SEEDS[0], TRAIN_SEEDS[-1], (len(fleet.envs),)).tolist())
    noise = -torch.empty(steps, len(fleet.envs), 4).exponential_().log()  # Gumbel
    flights = fly(fleet, as_pilot(actor.state_dict()), noise.numpy(), again=settings["pieces"])
    flights["reward"] = flights["reward"] * settings["scale"]
    return flights


# %% [markdown]
# ## Boss: use a batch five times (+49)
#
# After one step of gradient descent a batch is stale: the policy has moved, the flights are those of the old
# one. **PPO** weighs with the ratio $\rho = \pi_\theta(a|s) / \pi_\text{old}(a|s)$, which is 1 at first and
# has the same gradient there. So a batch can be used several times, in small parts, until $\rho$ has left $1
# \pm 0.2$: there the clip takes away what could still be gained, and nothing else. But five times the steps
# make a policy sure of itself five times as fast, now and then of a poor habit: here the bonus for entropy is
# needed most.
#
# $$L = -\min\big(\rho A,\ \text{clip}(\rho,\, 0.8,\, 1.2)\, A\big)$$


# %%
def clipped(now, old, weight):
    """The loss of PPO; `now` and `old` are log pi of the flown moves."""
    ratio = (now - old).exp()
    safe = ratio.clamp(0.8, 1.2)
    return -torch.min(ratio * weight, safe * weight)


ratios = torch.linspace(0.5, 1.5, 101)
plt.figure(figsize=(8, 2.2))
for weight, name in ((1.0, "better than expected"), (-1.0, "worse than expected")):
    plt.plot(ratios, clipped(ratios.log(), torch.zeros(101), weight), label=f"A = {weight:.0f}: {name}")
plt.xlabel("how much likelier the move has become")
plt.ylabel("loss")
plt.legend()
show("clip.png")

# %% [markdown]
# Flat means no gradient: a good move is not made ever likelier, a bad one not ever rarer, from one and the
# same batch.
#
# ## The levels
#
# A row an idea. All levels fly a million steps, 16 landers at once, with the same nets of 5,000 numbers each;
# the learning rate was tuned for each on the validation seeds.

# %% tags=["levels"]
# fmt: off
LEVELS = {       # simple    medium          strong       boss
    "weight":   ("reward",  "reward to go", "advantage", "advantage"),  # what multiplies log pi
    "discount": (0.99,      0.99,           0.999,       0.999),        # of a reward a step later
    "pieces":   (False,     False,          True,        True),         # a batch: pieces, or whole flights
    "scale":    (1.0,       1.0,            0.1,         0.1),          # of the rewards
    "ppo":      (False,     False,          False,       True),         # five times, with a clip; or once
    "entropy":  (0.0,       0.01,           0.01,        0.01),         # bonus for being undecided
}
SIZES = {"small": {
    "steps":  (1_000_000, 1_000_000, 1_000_000, 1_000_000),
    "epochs": (10, 10, 10, 10),  # a validation and a checkpoint after each
    "rate":   (5e-3, 5e-3, 2e-3, 1.5e-3),
    "piece":  (512, 512, 64, 512),  # steps of each lander in a batch
}}
# fmt: on
SIZES["full"] = SIZES["small"]  # there is only one moon
settings = choose(LEVELS, SIZES)
WEIGHTS = {"reward": reward_now, "reward to go": reward_to_go, "advantage": advantage}

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
# Fly, learn, fly, learn. The critic is asked about all states in two calls, long after the flight; nothing in
# the air waits for a gradient.


# %%
def make_batch(flights, actor, critic):
    """Flights (steps, landers) -> tensors (batch,): x, action, weight, log pi then, target of the critic."""
    flights["value"] = ask(critic, flights["x"])
    flights["later"] = ask(critic, flights["after"])
    weight = WEIGHTS[settings["weight"]](flights, settings["discount"])
    flown = flights["flown"]
    batch = {name: torch.tensor(flights[name][flown]) for name in ("x", "action")}
    batch["weight"] = normalise(torch.tensor(weight[flown], dtype=torch.float32))
    batch["target"] = torch.tensor((weight + flights["value"])[flown], dtype=torch.float32)
    with torch.no_grad():
        batch["old"] = log_pi(actor(batch["x"]), batch["action"])
    return batch


def shuffled(batch):
    """The batch in random order: for PPO in parts of about 512 steps, else in one."""
    count = len(batch["x"])
    parts = 1
    if settings["ppo"]:
        parts = max(1, count // 512)
    for rows in torch.randperm(count).tensor_split(parts):
        yield {name: values[rows] for name, values in batch.items()}


def descend(net, optimizer, loss, rate):
    """One step of gradient descent; a gradient longer than 0.5 is shortened."""
    optimizer.param_groups[0]["lr"] = rate
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(net.parameters(), 0.5)
    optimizer.step()


# %%
def teach_actor(actor, optimizer, batch, rate):
    """Policy gradient; the mean loss, and the entropy of the policy (1.39: undecided, 0: one move only)."""
    losses, passes = [], 1
    if settings["ppo"]:
        passes = 5
    for _ in range(passes):
        for part in shuffled(batch):
            logits = actor(part["x"])
            now = log_pi(logits, part["action"])
            loss = (-part["weight"] * now).mean()
            if settings["ppo"]:
                loss = clipped(now, part["old"], part["weight"]).mean()
            entropy = -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1).mean()
            descend(actor, optimizer, loss - settings["entropy"] * entropy, rate)
            losses.append([loss.item(), entropy.item()])
    return np.mean(losses, axis=0)


def teach_critic(critic, optimizer, batch, rate):
    for _ in range(5):
        for part in shuffled(batch):
            error = critic(part["x"]).squeeze(-1) - part["target"]
            descend(critic, optimizer, error.square().mean(), rate)


def fly_and_learn(fleet, nets, optimizers, progress, goal):
    """Until `goal` steps are flown in all; returns the means of loss and entropy."""
    losses, fresh = [], True
    while progress["steps"] < goal:
        rate = settings["rate"] * (1 - progress["steps"] / settings["steps"])
        batch = make_batch(collect(fleet, nets["actor"], fresh), **nets)
        losses.append(teach_actor(nets["actor"], optimizers["actor"], batch, rate))
        if settings["weight"] == "advantage":
            teach_critic(nets["critic"], optimizers["critic"], batch, rate)
        progress["steps"] += len(batch["x"])
        progress["landings"] += [[progress["steps"], *landing] for landing in fleet.landings]
        fleet.landings, fresh = [], False
    return np.mean(losses, axis=0).tolist()


# %% [markdown]
# An **epoch** is a tenth of all steps and ends with a validation, a line and a checkpoint.
#
# A Box2D world cannot be saved. So every epoch begins with new flights from new seeds; torch's generator
# draws them, its state is in the checkpoint, and a run that was killed repeats the broken epoch exactly.
# Under `torchrun` every process does the same work: 5,000 weights need no second computer, and the answer
# stays the same to the byte.
#
# The curves below, against steps in the environment: the return of every training flight (dots) and of the
# validation; on the right how many training flights end with the +100 of a landing or the -100 of a crash.
# The rest hovers until it is cut off.


# %% tags=["train"]
def train():
    """Returns the weights of each epoch's actor, the critic, and all landings."""
    torch.manual_seed(SEED)
    nets = {"actor": make_net(4, 0.01), "critic": make_net(1, 1.0)}
    optimizers = {
        name: torch.optim.Adam(net.parameters(), eps=1e-5, fused=True) for name, net in nets.items()
    }
    pilots, progress = {}, {"steps": 0, "landings": []}
    parts = {"actor_optimizer": optimizers["actor"], "critic_optimizer": optimizers["critic"]}
    parts |= {**nets, "pilots": pilots, "progress": progress}
    done = load_checkpoint("train", [train], **parts)
    for epoch in tqdm(range(done + 1, settings["epochs"] + 1), "epochs", disable=QUIET, leave=False):
        before, tic = progress["steps"], time.perf_counter()
        goal = settings["steps"] * epoch / settings["epochs"]
        loss, entropy = fly_and_learn(Fleet(16), nets, optimizers, progress, goal)
        if not np.isfinite(loss):
            raise Stop(f"The training diverged in epoch {epoch}. What was saved is kept; set another SEED.")
        speed = (progress["steps"] - before) / (time.perf_counter() - tic)
        pilots[f"{epoch}"] = {name: weight.clone() for name, weight in nets["actor"].state_dict().items()}
        valid = evaluate(as_pilot(pilots[f"{epoch}"]))
        row = {"epoch": epoch, "steps": progress["steps"], "loss": loss, "entropy": entropy, "valid": valid}
        history.append(row | {"examples_per_second": speed})
        say(f"epoch {epoch:2d}: {row['steps']:9,d} steps, entropy {entropy:.2f}, valid {valid:4.0f}")
        save_checkpoint("train", epoch, **parts)
    return pilots, nets["critic"], np.array(progress["landings"])


pilots, critic, landings = train()
fig, axes = plt.subplots(1, 2, figsize=(8, 2.8))
axes[0].plot(landings[:, 0] / 1e6, landings[:, 1], ".", markersize=1, color="C7", label="training flights")
millions = [row["steps"] / 1e6 for row in history]
axes[0].plot(millions, [row["valid"] for row in history], "o-", label="validation")
axes[0].set(xlabel="million steps", ylabel="return", ylim=(-500, 330))
axes[0].legend(loc="lower right")
groups = np.array_split(landings, 20)
for name, last in (("landed", 100), ("crashed", -100)):
    share = [np.mean(group[:, 2] == last) for group in groups]
    axes[1].plot([group[-1, 0] / 1e6 for group in groups], share, ".-", label=name)
axes[1].set(xlabel="million steps", ylabel="share of the flights", ylim=(-0.05, 1.05))
axes[1].legend()
show("curves.png")

# %% [markdown]
# ## Prediction: which pilot, and its honest score
#
# Twenty validation flights are few: a pilot that crashes one time in fifteen often passes them. The learning
# rate has fallen to almost nothing, so the last three epochs are the most settled. They are asked again, with
# 100 flights from seeds not used so far, drawn by chance and greedy: a half-trained policy, nearly undecided,
# often hovers for ever when it must always take its favourite move, a good one flies more safely so. The
# choice goes by the mean **minus its standard error**: what hangs on luck counts less. The chosen pilot then
# flies once from each of the 100 unseen seeds. Their mean is the score of this run.


# %% tags=["predict"]
def choose_pilot():
    """One of the last three epochs, with drawn or greedy moves."""
    rows = []
    for row in history[-3:]:
        for greedy in (False, True):
            returns = trial(as_pilot(pilots[f"{row['epoch']}"]), CHOICE_SEEDS, greedy)["reward"].sum(0)
            error = returns.std() / len(returns) ** 0.5
            one = {"epoch": row["epoch"], "greedy": greedy, "mean return": returns.mean()}
            rows.append(one | {"less its standard error": returns.mean() - error})
    table(rows)
    return max(rows, key=lambda one: one["less its standard error"])


best = choose_pilot()
pilot = as_pilot(pilots[f"{best['epoch']}"])
unseen = trial(pilot, UNSEEN_SEEDS, best["greedy"])
returns, lengths = unseen["reward"].sum(0), unseen["flown"].sum(0)
last = unseen["reward"][lengths - 1, np.arange(len(returns))]
row = {"unseen flights": len(returns), "mean return": returns.mean()}
row |= {"standard error": returns.std() / len(returns) ** 0.5, "worst": returns.min(), "best": returns.max()}
row |= {"landed": np.mean(last == 100), "crashed": np.mean(last == -100), "mean steps": lengths.mean()}
table([row])

# %% [markdown]
# ## Five flights for the judge
#
# The judge seeds its environment **once** with 543 and flies five episodes in a row. So the terrain of each
# hangs on the length of the ones before, and the lists must be made in the same order with the same
# generator.
#
# As the test is seeded, one may fly every episode `BEST_OF_N` times, with other dice but from the same start,
# and hand in the best. Public solutions did so by hand. It is no better pilot, only a better lottery ticket,
# so only the boss does it, and it stands *beside* the honest mean; `BEST_OF_N = 1` hands in the plain
# flights.


# %%
def fly_for_judge(pilot, greedy, tries):
    """Lists of moves, their returns: of each episode the best of some tries; try 0 is the plain policy."""
    fleet, lists, totals = Fleet(tries), [], []
    state = np.random.PCG64(JUDGE_SEED).state  # what reset(seed=543) would begin with
    for episode in range(EPISODES):
        noise = np.random.default_rng([JUDGE_SEED, episode]).gumbel(size=(tries, LIMIT, 4))
        if greedy:
            noise[0] = 0
        fleet.start([state] * tries)
        flights = fly(fleet, pilot, noise.swapaxes(0, 1))
        chosen = int(flights["reward"].sum(0).argmax())
        flown = flights["flown"][:, chosen]
        lists.append(flights["action"][flown, chosen].tolist())
        totals.append(float(flights["reward"][:, chosen].sum()))
        state = fleet.envs[chosen].np_random.bit_generator.state  # the next episode goes on from here
    return lists, totals


tries = 1
if LEVEL == "boss":
    tries = BEST_OF_N
plain, plain_totals = fly_for_judge(pilot, best["greedy"], 1)
lists, totals = fly_for_judge(pilot, best["greedy"], tries)
if np.mean(totals) < np.mean(plain_totals):  # another first flight changes all later starts
    lists, totals = plain, plain_totals
plt.figure(figsize=(8, 2.2))
plt.hist(returns, bins=40, color="C7", label=f"{len(returns)} unseen seeds, mean {returns.mean():.0f}")
plt.plot(plain_totals, [1] * EPISODES, "o", label=f"judge, plain: mean {np.mean(plain_totals):.0f}")
plt.plot(totals, [2.5] * EPISODES, "o", label=f"judge, best of {tries}: mean {np.mean(totals):.0f}")
plt.xlabel("return of a flight")
plt.ylabel("flights")
plt.legend(loc="upper left")
show("returns.png")

# %% cellView="form" jupyter={"source_hidden": true} tags=["submission"]
# @title The file: write it, read it safely, fly it again as the judge does
import pickle

submission = OUT / ("Action_List.npy" if REAL else "Action_List.sample.npy")


def write_submission(path):
    """An object array of five plain lists; np.array(lists) fails, for they are not equally long."""
    array = np.empty(EPISODES, dtype=object)
    for number, moves in enumerate(lists):
        array[number] = moves
    with aside(path) as part:
        with part.open("wb") as file:
            np.save(file, array)
    about = {"environment": ENVIRONMENT, "seed": JUDGE_SEED, "comparable": COMPARABLE, **VERSIONS}
    about |= {"numpy": np.__version__, "lengths": [len(moves) for moves in lists], "totals": totals}
    with aside(path.with_name("Action_List.json")) as part:
        part.write_text(json.dumps(about, indent=1))


class OnlyLists(pickle.Unpickler):
    """An object array is a pickle, and a pickle from elsewhere may run any program when it is loaded.

    This one knows three names of numpy and refuses all others; lists and numbers need no name."""

    def find_class(self, module, name):
        known = {"_reconstruct": np.empty(0).__reduce__()[0], "ndarray": np.ndarray, "dtype": np.dtype}
        if name not in known or module not in ("numpy", "numpy.core.multiarray", "numpy._core.multiarray"):
            raise pickle.UnpicklingError(f"it holds {module}.{name}, not plain lists of int")
        return known[name]


def read_actions(path):
    """The lists of an Action_List.npy, from wherever it comes."""
    if path.suffix != ".npy":
        raise Stop(f"{path} must be a .npy file")
    if path.stat().st_size >= 2_000_000:
        raise Stop(f"{path} has {path.stat().st_size} bytes, the judge takes less than 2 MB")
    try:
        with path.open("rb") as file:
            np.lib.format.read_magic(file)
            _, _, dtype = np.lib.format.read_array_header_1_0(file)
            if dtype.hasobject:
                array = OnlyLists(file).load()
            else:
                array = np.load(path, allow_pickle=False)
        return [list(moves) for moves in array.tolist()]
    except Exception as error:
        raise Stop(f"{path} is no array of five lists of moves: {' '.join(str(error).split())}") from None


def replay(flown, **options):
    """The judge: seed once, fly the lists one after the other; the returns, or Stop with what is wrong."""
    env, returns = make_env(**options), []
    for number, moves in enumerate(flown, 1):
        env.reset(seed=JUDGE_SEED if number == 1 else None)
        total, over = 0.0, False
        for step, move in enumerate(moves, 1):
            if over:
                raise Stop(f"episode {number} is over after {step - 1} moves, but its list has {len(moves)}")
            _, reward, ended, truncated, _ = env.step(move)
            total += float(reward)
            over = ended or truncated
        if not over:
            raise Stop(f"episode {number} is not over after the {len(moves)} moves of its list")
        returns.append(total)
    return returns


def check_submission(path):
    """Raises Stop with what the judge would not take; else the returns of the five flights."""
    flown = read_actions(path)
    if len(flown) != EPISODES:
        raise Stop(f"{path} has {len(flown)} lists, the judge flies {EPISODES} episodes")
    for number, moves in enumerate(flown, 1):
        if not 1 <= len(moves) <= LIMIT:
            raise Stop(f"{path}: episode {number} has {len(moves)} moves, 1 to {LIMIT} are possible")
        for move in moves:
            if type(move) is not int or move not in range(4):
                raise Stop(f"{path}: episode {number} has the move {move!r}, a move is an int from 0 to 3")
    try:
        return replay(flown)
    except Stop as problem:
        raise Stop(f"{path}: {problem}") from None


def score_submission(path, answers):
    """The file's flights were chosen by who wrote it, so the score is the policy's mean on unseen seeds."""
    judged = float(np.mean(check_submission(path)))
    points = sum(judged >= line for line in BASELINES.values())
    table(
        [
            {"flights": f"{len(returns)} unseen seeds: the score", "mean return": returns.mean()},
            {"flights": "the judge's five, plain policy", "mean return": np.mean(plain_totals)},
            {"flights": f"the judge's five, best of {tries}: the file", "mean return": judged},
        ]
    )
    say(f"the judge gives {judged:.2f}: {points} of 4 points")
    return float(returns.mean())


parameters = sum(weight.numel() for weight in pilots["1"].values())
parameters += sum(weight.numel() for weight in critic.parameters())
summary = {"valid_score": float(best["mean return"]), "epoch": best["epoch"], "parameters": parameters}
summary |= {"examples_per_second": float(np.median([row["examples_per_second"] for row in history]))}
summary |= {"spread": float(returns.std()), "judge_plain": float(np.mean(plain_totals)), "best_of": tries}
summary |= {"judge_file": float(np.mean(totals)), "greedy": best["greedy"], "comparable": COMPARABLE}
if MAIN:
    write_submission(submission)


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
        "simple": [46.655, 48.806, 18.341],
        "medium": [111.18, 103.19, 104.77],
        "strong": [229.09, 233.0, 216.93],
        "boss": [273.27, 274.88, 276.52],
    },
    "without": {
        "weight": [149.21],
        "discount": [266.5, 272.06, 252.66],
        "pieces": [267.05, 277.97, 276.38],
        "scale": [227.55],
        "ppo": [-1.5707],
        "entropy": [201.58, 279.13, 274.54],
    },
}

# %% [markdown] tags=["report"]
# ## Report
#
# **What is each idea worth?** The boss, and the boss without each idea, each measured on the 100 unseen
# flights.

# %% tags=["report"]
show_worth()
rows = []
for level, scores in MEASURED["levels"].items():
    rows.append({"run": level, "mean return": np.mean(scores), "lowest": min(scores), "highest": max(scores)})
for idea, scores in MEASURED["without"].items():
    row = {"run": f"boss without {idea}", "mean return": np.mean(scores)}
    rows.append(row | {"lowest": min(scores), "highest": max(scores)})
table(rows)

# %% [markdown] tags=["report"]
# **The clip and the critic are the homework.** Without PPO the boss makes one step for each batch of 8,192
# steps, 122 in all, and hardly learns (*strong* takes batches of 1,024 and lands). With the reward to go for
# the advantage it lands two times in three. Without the small rewards the critic's target is ten times as
# large, and the critic comes too late. The entropy bonus is an insurance: without it one of three seeds
# stayed at 200, the others lost nothing. The long discount is worth eleven points. Pieces instead of whole
# flights are all of *strong*, which uses a batch once (67 to 75 without them), and nothing to the boss.
#
# **1. The algorithm, and how it differs from plain policy gradient.** Plain policy gradient flies some whole
# flights, weighs $\log\pi$ of each move with all reward to come, makes one step and throws the flights away.
# The boss is PPO with a critic:
#
# - the weight is the generalised advantage ($\gamma = 0.999$, $\lambda = 0.98$); the critic learns by
#   regression, five passes a batch, from rewards times 0.1;
# - a batch is 512 steps of 16 landers, over or not; the critic's value stands for what comes after its end;
# - it is used five times in parts of 512 steps, with the ratio clipped at $1 \pm 0.2$ and 0.01 times the
#   entropy as a bonus; Adam, a learning rate of 0.0015 that falls to 0, gradients shortened to 0.5.
#
# **So both climb the same gradient; PPO makes eighty careful steps where plain policy gradient makes one, and
# it can because the clip keeps the policy near the one that flew, and the critic keeps the luck out of the
# weight.** How much luck is in each weight, measured on 32 flights of the last pilot:

# %% tags=["report"]
sample = trial(as_pilot(pilots[max(pilots, key=int)]), range(4000, 4032), greedy=False)
sample["value"] = ask(critic, sample["x"]) / settings["scale"]  # in units of the reward
sample["later"] = ask(critic, sample["after"]) / settings["scale"]
weights = {"reward of the step": (reward_now(sample, 1.0), "wrong: biased, blind to what follows")}
for gamma in (0.99, 0.999):
    weights[f"reward to go, discount {gamma}"] = (reward_to_go(sample, gamma), "right, up to the discount")
if settings["weight"] == "advantage":
    weights["advantage, discount 0.999"] = (advantage(sample, 0.999), "nearly right, as far as the critic is")
table(
    [
        {"what multiplies log pi": name, "its spread": weight[sample["flown"]].std(), "on average": text}
        for name, (weight, text) in weights.items()
    ]
)

# %% [markdown] tags=["report"]
# Two things matter, and only one of them is the spread. The reward of the step is calm, and yet the worst
# teacher: it has **bias**, on average it points elsewhere, because what a move leads to is not in it. The
# reward to go has no such bias but all the luck of the flight, the more the further it looks. **The advantage
# has the least spread and hardly any bias, as far as the critic is right: that is what the critic is for.**
#
# **One landing**, beside the first picture of this notebook: the first flight of the file, flown again with
# the camera on. Drawing changes nothing, the returns are the judge's.

# %% tags=["report"]
landing, landing_rewards = film(lists[0], JUDGE_SEED)
fig, axes = plt.subplots(1, 2, figsize=(8, 2.8))
pairs = [(crash, crash_rewards, "moves by chance"), (landing, landing_rewards, f"the pilot of level {LEVEL}")]
for axis, (pictures, rewards, name) in zip(axes, pairs):
    axis.imshow(pictures[::2].max(0))
    axis.set(xticks=[], yticks=[], title=f"{name}: return {rewards.sum():.0f}")
show("hero.jpg")

# %% cellView="form" jupyter={"source_hidden": true} tags=["report"]
# @title The landing as a moving picture
import base64
from PIL import Image

if MAIN:
    wanted = np.linspace(0, len(landing) - 1, min(40, len(landing))).astype(int)
    frames = [Image.fromarray(landing[k]).resize((300, 200)).quantize(32) for k in wanted]
    path = OUT / "figures" / "landing.gif"
    with aside(path) as part:
        frames[0].save(part, "GIF", save_all=True, append_images=frames[1:], duration=100, loop=0)
    if NOTEBOOK:
        data = base64.b64encode(path.read_bytes()).decode()
        display.display(
            display.HTML(
                f'<img alt="a landing" style="border: 1px solid" src="data:image/gif;base64,{data}">'
            )
        )

# %% [markdown] tags=["report"]
# **2. MuZero** ([Schrittwieser and others, 2019](https://arxiv.org/abs/1911.08265)): which of four statements
# is false?
#
# - *(a) It joins a tree search with a learned model.* So the abstract says.
# - *(b) The agent does not know how the environment really moves from state to state.* It learns a dynamics
#   function of its own hidden states, which only has to predict reward, policy and value.
# - *(c) It uses Monte Carlo tree search in training.* The search chooses the moves of the games that it
#   learns from, and the policy is trained towards its visit counts; the gradient step itself runs no search,
#   it unrolls the learned model along the moves that were played.
# - *(d) It does not need the rules of the game.* It plays Go, chess and shogi without them, its model is
#   learned.
#
# **(a), (b) and (d) are claims of the paper itself; if one statement is meant to be false it can only be (c),
# read narrowly, because the search makes the training data and not the gradient.** No official key is public.

# %% [markdown] tags=["try"]
# ## Try it
#
# Change one thing, say what you expect, run.
#
# 1. `WITHOUT = "discount"`: the boss looks 100 steps ahead instead of 1000. Will it crash, hover or land?
#    Look at the right-hand curves and at the mean length of the unseen flights before you look at its score.
# 2. In `advantage` write `flights["over"]` for `flights["ended"]`: the time limit counts as a crash. Does the
#    pilot become hasty, or does the limit come too seldom to matter? Compare the mean lengths.
# 3. Weather: when all is done, run the cell of `Fleet` again with `make_env(enable_wind=True)` and fly
#    `trial(pilot, UNSEEN_SEEDS, greedy)` in a new cell. How much of its return does a pilot lose that never
#    felt wind, greedy and with drawn moves?

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
