# %% [markdown] tags=["header"]
# # HW13 · Network compression: as good, with a fraction of the numbers
#
# <!-- badges -->
# [![Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/ml2022-notebooks/ml2022-spring/blob/main/HW13/HW13.ipynb)
# [![Kaggle](https://kaggle.com/static/images/open-in-kaggle.svg)](https://kaggle.com/kernels/welcome?src=https://github.com/ml2022-notebooks/ml2022-spring/blob/main/HW13/HW13.ipynb)
# <!-- /badges -->
#
# ![Photos of dishes, each with the three kinds that the small net finds most likely](hero)
#
# The photos of HW03 again, and again eleven kinds of food. New is a limit: the net may have at most **100,000
# numbers**, a hundredth of what a usual one has, so that it fits into a watch or a camera. Training such a net
# as before gives a poor one. The lecture has better ways: a large net, the **teacher**, tells the small one not
# only what is right but also what looks alike (**knowledge distillation**), layers are built so that they need
# fewer numbers (**depthwise and pointwise convolution**), and what a net hardly uses is cut out (**pruning**).
#
# 同樣是HW03的十一類食物照片，但這次有限制：模型的參數總量不得超過**十萬個**，大約是一般網路的百分之一，才放得進手錶或相機。直接訓練這麼小的網路，效果並不好。課程介紹了幾種方法：讓大網路當**老師**，不只告訴小網路正確答案，也告訴它哪些類別長得像（**知識蒸餾**）；用更省參數的結構設計網路（**depthwise與pointwise卷積**）；以及把幾乎用不到的參數剪掉（**剪枝**）。
#
# <!-- box -->
# > **Press *Run all*.** This run is *boss*: expect accuracy 0.798 on the sample in about 4 minutes on two CPU cores. GPU: not measured.
# <!-- /box -->
#
# Lectures: network compression [1](https://youtu.be/utk3EnAUh-g)
# ([B](https://www.bilibili.com/video/BV1Wv411h7kN?p=122)), [2](https://youtu.be/xrlbLPaq_Og)
# ([B](https://www.bilibili.com/video/BV1Wv411h7kN?p=123)),
# [slides](https://speech.ee.ntu.edu.tw/~hylee/ml/ml2021-course-data/tiny_v7.pdf) · homework:
# [video](https://youtu.be/4Td88Yflv-0) ([B](https://www.bilibili.com/video/BV1Wv411h7kN?p=130)). The ladder,
# measured on the built-in sample (accuracy, higher is better; the mean of three seeds ± half their range),
# beside the course's public baselines on the real data:
#
# <!-- ladder -->
# | level | what it adds | sample | course baseline (real data) | seconds |
# |---|---|---|---|---|
# | simple | the official student, taught by the labels | 0.536 ± 0.002 | 0.4482 | 99 |
# | medium | the same student, for longer, and taught by a large net | 0.645 ± 0.017 | 0.6484 | 279 |
# | strong | a net of depthwise and pointwise convolutions, and a third more epochs | 0.710 ± 0.013 | 0.8237 | 272 |
# | boss | the teacher's maps as hints, and eight looks at each photo | 0.798 ± 0.022 | 0.85159 | 257 |
# <!-- /ladder -->

# %% tags=["parameters"]
# @title Parameters
LEVEL = "boss"  # @param ["boss", "strong", "medium", "simple"]
WITHOUT = ""  # @param {type:"string"}
DATA = "auto"  # @param ["auto", "real", "sample"]
PROFILE = "auto"  # @param ["auto", "full", "small", "tiny"]
SEED = 2022  # @param {type:"integer"}
DATA_DIR = "data/HW13"  # @param {type:"string"}
OUT_DIR = "out/HW13"  # @param {type:"string"}
RESUME = True  # @param {type:"boolean"}
SUBMIT = False  # @param {type:"boolean"}

# %% cellView="form" jupyter={"source_hidden": true} tags=["homework"]
# @title Facts of this homework
HW, METRIC, HIGHER_IS_BETTER = "HW13", "accuracy", True
SLUG, JUDGE = "ml2022spring-hw13", "https://www.kaggle.com/competitions/ml2022spring-hw13"
BASELINES = {"simple": 0.44820, "medium": 0.64840, "strong": 0.82370, "boss": 0.85159}
FILES = {  # how many the course has
    "training": ("training/*.jp*g", 9866),
    "validation": ("validation/*.jp*g", 3430),
    "test": ("evaluation/*.jp*g", 3347),
}
FOLDER, TEST, FIRST_ID = "food11-hw13", "evaluation", 0  # how the course calls them
LFS = "https://media.githubusercontent.com/media/virginiakm1988/ML2022-Spring/main/HW13/food11-hw13.tar.gz"
MIRRORS = [  # {name here: address} of complete copies
    {"food11-hw13.tar.gz": LFS},
    {"food11-hw13.tar.gz": "https://github.com/andybi7676/ml2022spring-hw13/raw/main/food11-hw13.tar.gz"},
]
HASHES = set()  # none is known
OWN = {}  # this homework has no parameters of its own
NEEDS = {name: name for name in ("torch", "torchvision", "numpy", "pandas", "matplotlib", "tqdm")}
NEEDS |= {"accelerate": "accelerate", "filelock": "filelock", "PIL": "Pillow"}
MIXED_PRECISION = True
LESS_MEMORY = "set batch_size in SIZES to half"
CLASSES = ["bread", "dairy", "dessert", "egg", "fried food", "meat", "noodles", "rice", "seafood", "soup"]
CLASSES += ["vegetable, fruit"]
LIMIT = 100_000  # numbers that the net of the submission may have

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
# @title The sample: eleven kinds of food, drawn
import colorsys
import math
from PIL import Image, ImageDraw, ImageFilter, ImageOps

SHARES = np.array([994, 429, 1500, 986, 848, 1325, 440, 280, 855, 1500, 709]) / 9866  # of the kinds
HUES = [0.09, 0.14, 0.02, 0.13, 0.10, 0.02, 0.12, 0.15, 0.05, 0.07, 0.26]  # usual, and far from certain


def oval(x, y, wide, high, lumps=0.0, phase=0.0):
    """An outline of 32 points."""
    angle = np.arange(32) * 2 * np.pi / 32
    reach = 1 + lumps * (np.sin(3 * angle + phase) + np.sin(5 * angle + 2 * phase)) / 2
    return np.stack([x + wide * reach * np.cos(angle), y + high * reach * np.sin(angle)], -1)


def rod(x, y, length, turn, waves=0.0):
    """A line of 13 points through (x, y)."""
    t = np.linspace(-1, 1, 13)
    line = np.stack([t * length / 2, waves * np.sin(5 * t)], -1)
    ahead, aside = [math.cos(turn), math.sin(turn)], [-math.sin(turn), math.cos(turn)]
    return np.array([x, y]) + line @ np.array([ahead, aside])


def spots(dice, count, reach, size, colour):
    return [(oval(x, y, size, size), colour, 0) for x, y in dice.uniform(-reach, reach, (count, 2))]


def rods(dice, count, reach, length, width, waves=0.0):
    rows = zip(dice.uniform(-reach, reach, (count, 2)), dice.random(count) * 2 * np.pi)
    return [(rod(*place, length, turn, waves), k % 2, width) for k, (place, turn) in enumerate(rows)]


def leaves(count, phase):
    parts = []
    for turn in phase + np.arange(count) * 2 * np.pi / count:
        x, y = 0.45 * math.cos(turn), 0.45 * math.sin(turn)
        leaf = oval(x, y, 0.45, 0.2) - [x, y]
        leaf[:, 1] *= 1 - np.abs(leaf[:, 0])  # pointed
        spin = np.array([[math.cos(turn), math.sin(turn)], [-math.sin(turn), math.cos(turn)]])
        parts += [(leaf @ spin + [x, y], 0, 0), (rod(x, y, 0.7, turn), 1, 0.05)]
    return parts


def dish(kind, dice):
    """Food in the unit circle: (outline, colour, 0) is an area, (line, colour, width) a line."""
    phase, few = dice.random() * 2 * np.pi, int(dice.integers(3, 6))
    if kind == 0:  # bread: a loaf with cuts
        cuts = [(rod(x, 0, 0.75, 1.2), 1, 0.1) for x in np.linspace(-0.6, 0.6, few)]
        return [(oval(0, 0, 0.95, 0.6), 0, 0), *cuts]
    if kind == 1:  # dairy: a piece of cheese with holes
        return [
            (np.array([[-0.9, 0.6], [0.9, 0.6], [0.1, -0.85]]), 0, 0),
            *spots(dice, 2 * few, 0.4, 0.13, 1),
        ]
    if kind == 2:  # dessert: a slice in layers, with a cherry
        layer = np.array([[-0.8, -0.6], [0.8, -0.6], [0.8, -0.3], [-0.8, -0.3]])
        layers = [(layer + [0, 0.3 * k], k % 2, 0) for k in range(4)]
        return [*layers, (oval(0.5 * math.sin(phase), -0.6, 0.22, 0.22), 2, 0)]
    if kind == 3:  # egg: white and yolk
        return [(oval(0, 0, 0.9, 0.8, 0.15, phase), 0, 0), *spots(dice, 1, 0.3, 0.36, 1)]
    if kind == 4:  # fried food: sticks
        return rods(dice, 2 * few, 0.45, 1.0, 0.17)
    if kind == 5:  # meat: a lump with streaks
        streaks = [(rod(0, y, 1.0, 0.3, 0.1), 1, 0.07) for y in np.linspace(-0.35, 0.35, few - 1)]
        return [(oval(0, 0, 0.95, 0.7, 0.2, phase), 0, 0), *streaks]
    if kind == 6:  # noodles: long and wavy
        return rods(dice, 4 * few, 0.4, 1.4, 0.06, 0.15)
    if kind == 7:  # rice: grains
        grains = [(line, 0, width) for line, _, width in rods(dice, 14 * few, 0.6, 0.2, 0.08)]
        return [(oval(0, 0, 0.85, 0.8, 0.1, phase), 1, 0), *grains]
    if kind == 8:  # seafood: a fish
        fin = (np.array([[0.3, 0.0], [0.95, -0.45], [0.95, 0.45]]), 1, 0)
        body, eye = (oval(-0.15, 0, 0.75, 0.42), 0, 0), (oval(-0.6, -0.08, 0.1, 0.1), 2, 0)
        return [fin, body, eye, (rod(-0.35, 0, 0.5, 1.57, 0.05), 1, 0.07)]
    if kind == 9:  # soup: a bowl with something afloat
        return [
            (oval(0, 0, 0.95, 0.95), 0, 0),
            (oval(0, 0, 0.76, 0.76), 1, 0),
            *spots(dice, few, 0.4, 0.13, 2),
        ]
    return leaves(few, phase)  # vegetables


def muted(dice):
    """The colour of a table, a plate or a spoon."""
    grey = dice.uniform(30, 240)
    return tuple(int(part) for part in (grey + dice.normal(0, 25, 3)).clip(0, 255))


def serve(draw, kind, x, y, size, dice):
    """One dish: turned, squeezed, in three colours of which hue and brightness are chance."""
    turn, squeeze = dice.random() * 2 * np.pi, dice.uniform(0.7, 1.0)
    spin = np.array([[math.cos(turn), math.sin(turn)], [-math.sin(turn), math.cos(turn)]])
    bright = 0.3 + 0.7 * ((dice.random() + np.array([0, 0.4, 0.75])) % 1)
    paint = []
    for value in bright:
        hue, depth = (HUES[kind] + dice.normal(0, 0.1)) % 1, dice.uniform(0.2, 0.9)
        if PROFILE == "tiny":  # there the colour tells the kind: seconds must do to learn something
            hue, depth = kind / len(CLASSES), 1.0
        paint.append(tuple(int(255 * part) for part in colorsys.hsv_to_rgb(hue, depth, value)))
    for points, colour, width in dish(kind, dice):
        where = points * size * [squeeze, 1.0] @ spin + [x, y]
        if width:
            draw.line([tuple(point) for point in where], paint[colour], max(1, round(width * size)))
        else:
            draw.polygon([tuple(point) for point in where], paint[colour])


def photo(kind, dice):
    """Side dishes of other kinds at the edge, a plate, the dish, a spoon; light, blur and noise."""
    wide, high = (int(one) for one in dice.integers(72, 129, 2))
    image = Image.new("RGB", (wide, high), muted(dice))
    draw = ImageDraw.Draw(image)
    size = min(wide, high) * dice.uniform(0.34, 0.48)
    x, y = np.array([wide, high]) * (0.5 + dice.normal(0, 0.05, 2))
    for _ in range(dice.integers(0, 3)):
        corner = dice.integers(0, 2, 2) * [wide, high] + dice.normal(0, 8, 2)
        serve(draw, int(dice.integers(11)), *corner, size * dice.uniform(0.4, 0.8), dice)
    if dice.random() < 0.6:
        draw.polygon([tuple(point) for point in oval(x, y, 1.25 * size, 1.25 * size)], muted(dice))
    serve(draw, kind, x, y, size, dice)
    if dice.random() < 0.4:
        spoon = rod(*([x, y] + dice.normal(0, 0.5, 2) * size), 3 * size, dice.random() * 2 * np.pi)
        draw.line([tuple(point) for point in spoon], muted(dice), round(0.2 * size))
    image = image.filter(ImageFilter.GaussianBlur(dice.uniform(0.4, 1.1)))
    light = dice.uniform(0.6, 1.3) * dice.uniform(0.85, 1.15, 3)
    pixels = np.asarray(image) * light + dice.normal(0, 9, (high, wide, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def make_sample(folder, answers):
    """The course's folders and names; the kind of a test photo is not in its name."""
    counts = {"training": 990, "validation": 330, TEST: 880}
    if PROFILE == "tiny":
        counts = {"training": 132, "validation": 48, TEST: 66}
    for number, (part, count) in enumerate(counts.items()):
        (folder / FOLDER / part).mkdir(parents=True)
        dice, seen = np.random.default_rng([2022, number]), [0] * len(CLASSES)
        kinds = dice.choice(len(CLASSES), count, p=SHARES)
        for k, kind in enumerate(tqdm(kinds, part, disable=QUIET, leave=False)):
            name = f"{kind}_{seen[kind]}"
            seen[kind] += 1
            if part == TEST:
                name = f"{FIRST_ID + k:04}"
            photo(kind, dice).save(folder / FOLDER / part / f"{name}.jpg", quality=88)
    np.save(answers / "category.npy", kinds)  # of the test part, which was the last


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
STORED = {"full": 256, "small": 64, "tiny": 64}[PROFILE]  # pixels a side, of every image


def decode(path):
    """A file -> uint8 (3, STORED, STORED), upright and in RGB; or a text: why it cannot be read."""
    try:
        with Image.open(path) as image:
            image.draft("RGB", (2 * STORED, 2 * STORED))  # JPEG can be shrunk while it is read
            upright = ImageOps.exif_transpose(image).convert("RGB")
        small = upright.resize((STORED, STORED), Image.Resampling.BILINEAR)
        return np.asarray(small).transpose(2, 0, 1)
    except Exception as error:  # PIL raises many kinds
        return f"{path.parent.name}/{path.name}: {error or type(error).__name__}"


def decode_all(folder):
    """Every file once, several at a time, into one array on the disk."""
    shape = (len(paths), 3, STORED, STORED)
    stored = np.lib.format.open_memmap(folder / "images.npy", "w+", np.uint8, shape)
    bar = tqdm(POOL.map(decode, paths), "decoding", len(paths), disable=QUIET, leave=False)
    damaged = {}
    for k, one in enumerate(bar):
        if isinstance(one, str):
            damaged[k] = one
        else:
            stored[k] = one
    stored.flush()
    (folder / "damaged.json").write_text(json.dumps(damaged))


def class_of(path):
    """3_17.jpg -> 3"""
    name = path.stem.split("_")[0]
    if "_" not in path.stem or not name.isdecimal() or int(name) >= len(CLASSES):
        raise Stop(f"{path}: the name must be class_number.jpg with a class from 0 to {len(CLASSES) - 1}.")
    return int(name)


def report(damaged):
    """Say which images cannot be read; too many of them end the run."""
    for k, why in list(damaged.items())[:5]:
        fate = "answered as if it were black" if k >= first_test else "left out"
        say(f"{why}: damaged, {fate} ({len(damaged)} of {len(paths)} images are)")
    if 20 * len(damaged) > len(paths):
        folder = parts["test"][0].parents[1]
        raise Stop(f"{len(damaged)} of {len(paths)} images are damaged: delete {folder} and fetch it again.")


def usable(name, first, last):
    """The rows of a part whose image can be read; what its kinds lack is said."""
    rows = torch.tensor([k for k in range(first, last) if k not in damaged], dtype=torch.long)
    kinds = set(label[rows].tolist())
    none = [CLASSES[k] for k in range(len(CLASSES)) if k not in kinds]
    if len(kinds) < 2 or len(rows) < len(CLASSES):
        raise Stop(f"{parts[name][0].parent} has only {len(rows)} usable images: get the whole data set.")
    if none:
        say(f"{name}: there is no image of {', '.join(none)}, this part can say nothing about it")
    return rows


class Recolour(torch.nn.Module):
    """From our colours to ImageNet's."""

    def forward(self, x):
        x = (x * spread + mean) / 255
        return (x - x.new_tensor([[[0.485]], [[0.456]], [[0.406]]])) / x.new_tensor(
            [[[0.229]], [[0.224]], [[0.225]]]
        )


def given_teacher(path):
    """The course's ResNet-18, which knows photos of 224 pixels, as a sequence of layers."""
    import torchvision

    net = torchvision.models.resnet18(weights=None, num_classes=len(CLASSES))
    try:
        net.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:
        why = f"{path} is not the course's teacher ({type(error).__name__})"
        raise Stop(f"{why}: delete it or fetch it again.") from None
    say(f"{path} is the teacher")
    *layers, last = net.children()
    return torch.nn.Sequential(Recolour(), *layers, torch.nn.Flatten(), last).to(device).eval()


parts = {name: PATHS[name] for name in FILES}
if REAL and PROFILE == "tiny":
    parts = {name: some[:: max(1, len(some) // 150)] for name, some in parts.items()}
paths = [*parts["training"], *parts["validation"], *parts["test"]]
label = torch.tensor([class_of(path) for path in paths[: -len(parts["test"])]])
first_valid, first_test = len(parts["training"]), len(label)
test_id = [path.stem for path in parts["test"]]
if len(set(test_id)) < len(test_id):
    raise Stop(f"{parts['test'][0].parent} has two files of one name, as .jpg and .jpeg: delete one of them.")
cache = Path(f"{DATA_DIR}-decoded", f"{'real' if REAL else 'sample'}-{PROFILE}")
states = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
make_once(cache, fingerprint([decode_all, states]), decode_all)
images = torch.from_numpy(np.load(cache / "images.npy", mmap_mode="c"))  # stays on the disk, read as needed
if on_gpu and 2 * images.nbytes < torch.cuda.mem_get_info()[0]:
    images = images.to(device)
damaged = {int(k): why for k, why in json.loads((cache / "damaged.json").read_text()).items()}
report(damaged)
given_train = usable("training", 0, first_valid)
given_valid = usable("validation", first_valid, first_test)
test_rows = torch.arange(first_test, len(paths))
GIVEN_TEACHER = sorted(parts["training"][0].parents[1].glob("*.ckpt"))  # the course has one, see `full`
rows = [("images", images, "bytes of all photos: training, validation, test")]
rows += [("label", label, "kind of food of the first two parts, 0 to 10")]
rows += [("given_train", given_train, "rows of the training part")]
rows += [("given_valid", given_valid, "rows of the validation part")]
rows += [("test_rows", test_rows, "rows of the test part")]
table([{"name": name, "shape": tuple(one.shape), "meaning": meaning} for name, one, meaning in rows])

# %% [markdown]
# ## The data
#
# The photos of HW03 in other folders: `training/3_17.jpg` is the 18th photo of kind 3, `validation/` has the same
# names, and in `evaluation/0000.jpg` nothing tells the kind. Each was decoded **once** and shrunk to the same
# square. Here are four photos of each kind.


# %%
def show_photos(photos, titles, columns, name, height=1.4):
    """Bytes (count, 3, height, width) as pictures, each with a line of text above it."""
    lines = -(-len(photos) // columns)
    fig, axes = plt.subplots(lines, columns, figsize=(8, height), squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for axis, one, title in zip(axes.flat, photos, titles):
        axis.imshow(one.cpu().permute(1, 2, 0))
        axis.set_title(title, fontsize=8)
    show(name)


kinds = label[given_train].unique()
some = [given_train[label[given_train] == k] for k in kinds]
rows = [int(of_kind[line % len(of_kind)]) for line in range(4) for of_kind in some]
names = [CLASSES[k].split()[0].strip(",") for k in kinds] + [""] * len(rows)
show_photos(images[rows], names, len(kinds), "photos.jpg", 3)

# %% [markdown]
# HW03 has shown what these photos need: to be **turned, cropped, stretched and mirrored anew** in every epoch.
# That was worth more than anything else there, so here all levels have it, the teacher and the students. One
# affine map a photo says where to look; below, one photo as a net meets it in seven epochs.

# %%
from copy import deepcopy
from torch import nn
from torch.nn import functional as F

known = images[given_train[:: max(1, len(given_train) // 1000)].to(images.device)].float()
mean = known.mean((0, 2, 3), keepdim=True).to(device)
spread = known.std((0, 2, 3), keepdim=True).to(device)
STILL = torch.tensor([[1.0, 0, 0], [0, 1, 0]])  # the map that changes nothing


def look(images, rows, size, maps):
    """Rows -> photos (batch, 3, size, size); each map (2, 3) says which part is seen, and how turned."""
    x = images[rows.to(images.device)].to(device).float()
    grid = F.affine_grid(maps.to(device), (len(rows), 3, size, size), align_corners=False)
    x = F.grid_sample((x - mean) / spread, grid, padding_mode="reflection", align_corners=False)
    return x.contiguous(memory_format=torch.channels_last)


def between(low, high, n):
    return torch.empty(n).uniform_(low, high)


def random_maps(n):
    """Where to look: n affine maps (n, 2, 3), each turned, zoomed, stretched, mirrored and shifted."""
    turn = between(-math.pi, math.pi, n)
    zoom, stretch = between(0.75, 1.1, n).sqrt(), between(-0.28, 0.28, n).exp()
    mirror = torch.randint(0, 2, (n,)) * 2 - 1
    right, down = torch.rand(2, n) * 2 - 1
    room = (1 - zoom).clamp(min=0)  # so that no shift leads out of the photo
    first = torch.stack([turn.cos() * zoom * stretch * mirror, -turn.sin() * zoom, right * room], -1)
    second = torch.stack([turn.sin() * zoom * mirror, turn.cos() * zoom / stretch, down * room], -1)
    return torch.stack([first, second], 1)


def bytes_of(x):
    """What a net gets, for the eye."""
    return (x * spread + mean).clamp(0, 255).byte()


same = given_train[:1].expand(8)
eight = look(images, same, STORED, random_maps(8))
eight[0] = look(images, same[:1], STORED, STILL[None])[0]
show_photos(bytes_of(eight), ["as it is", *[f"epoch {k}" for k in range(1, 8)]], 8, "augment.jpg")

# %% [markdown]
# ## Validation: photos that neither teacher nor student has learned
#
# The given validation part is only looked at, by the teacher, too: a teacher that had learned these photos
# would hand their answers on to the student, and the student's validation score would be too good. The
# evaluation photos are for the last cell alone: the course forbids to learn from them, even without labels.
#
# The second thing that must be right is the **count of the numbers**: one too many, and the course gives no
# points. The course counts with torchsummary, which adds up what each *call* of a layer uses: a layer that is
# called twice counts twice, numbers outside of layers are not seen. Ours counts in both ways, takes the larger
# one, and also counts the multiplications that one photo needs.


# %%
def count(model, size):
    """One row a layer that has numbers: its kind, its numbers, its multiplications for one photo."""
    rows = []

    def note(layer, given, out):
        numbers = [one.numel() for one in layer.parameters(recurse=False)]  # weights, biases
        places = out[0, 0].numel() if isinstance(layer, nn.Conv2d) else isinstance(layer, nn.Linear)
        if numbers:
            name = str(layer).partition(", bias")[0]
            times = max(numbers) * places
            rows.append({"layer": name, "numbers": sum(numbers), "multiplications": times})

    model = deepcopy(accelerator.unwrap_model(model)).cpu().eval()  # a copy: its batch norm learns nothing
    for layer in model.modules():
        layer.register_forward_hook(note)
    model(torch.zeros(1, 3, size, size))
    return rows


def numbers_of(model, size):
    """The count that the limit holds for: by call or by weight, whichever is larger."""
    called = sum(row["numbers"] for row in count(model, size))
    return max(called, sum(weight.numel() for weight in model.parameters()))


# %% [markdown]
# ## Simple: the official student (0.54)
#
# Four convolutions of 3 x 3 with 32, 32, 64 and 100 filters, three poolings, the mean over the picture, one
# dense layer. It learns from the labels alone. Where its numbers are and where its work is are two different
# things: the first layers have few numbers, but they are applied to every pixel of a large picture.


# %%
def plain_student():
    """The official sample's student."""
    layers, before = [], 3
    for after, pool in ((32, False), (32, True), (64, True), (100, True)):
        layers += [nn.Conv2d(before, after, 3), nn.BatchNorm2d(after), nn.ReLU()]
        if pool:
            layers.append(nn.MaxPool2d(2))
        before = after
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, len(CLASSES)))


def show_count(model, size, name):
    """Share of the numbers and of the multiplications, layer by layer."""
    rows = count(model, size)
    layers = [row for row in rows if row["multiplications"]]
    fig, axis = plt.subplots(figsize=(8, 2.2))
    for shift, what in ((-0.2, "numbers"), (0.2, "multiplications")):
        total = sum(row[what] for row in rows)
        places = np.arange(len(layers)) + shift
        axis.bar(places, [row[what] / total for row in layers], 0.4, label=f"{total:,} {what}")
    axis.set_xlabel("layer, from the photo to the answer")
    axis.set_ylabel("share of all layers")
    axis.legend(loc="upper left")
    show(name)


show_count(plain_student(), 224, "plain.png")

# %% [markdown]
# ## Medium: learn longer, and from a teacher (+0.11)
#
# A label says "soup" and nothing else. A large net that has learned the photos says "soup, perhaps egg,
# certainly no bread": how alike the kinds are, photo by photo. That is more to learn from, and more takes longer:
# the student gets half as many epochs again. With its logits $z$, those of the teacher $t$, and a **temperature** $T$,
#
# $$ L = \alpha T^2 \, \text{KL}\Big(\text{softmax}\big(\tfrac{t}{T}\big) \Big\| \text{softmax}\big(\tfrac{z}{T}\big)\Big) + (1 - \alpha) \, \text{CE}(z, y). $$
#
# A high temperature makes the teacher's answer softer, so that the small probabilities count, too; $T^2$ brings
# the gradient back to its size. Teacher and student see **the same** turned and cropped photo. The teacher is
# the residual net of HW03.


# %%
def loss_fn_kd(student_logits, labels, teacher_logits, alpha=0.5, temperature=1.0):
    """Distillation; the name is the course's. KL is the mean over the photos, the sum over the kinds."""
    student = F.log_softmax(student_logits.float() / temperature, -1)
    teacher = F.log_softmax(teacher_logits.float() / temperature, -1)
    distance = F.kl_div(student, teacher, reduction="batchmean", log_target=True)
    return alpha * temperature**2 * distance + (1 - alpha) * F.cross_entropy(student_logits.float(), labels)


fig, axes = plt.subplots(1, 4, figsize=(8, 1.8), sharey=True)
for axis, temperature in zip(axes, (1, 2, 4, 20)):
    logits = torch.tensor([9.0, 6, 4, 3, 2, 1.5, 1, 0.5, 0, 0, -1])  # made up: sure, but not blind
    axis.bar(range(11), (logits / temperature).softmax(-1))
    axis.set_title(f"T = {temperature}", fontsize=9)
    axis.set_xlabel("kind")
axes[0].set_ylabel("probability")
show("temperature.png")


# %%
def conv(before, after, stride=1):
    layer = nn.Conv2d(before, after, 3, stride, padding=1, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(after))


class Block(nn.Module):
    def __init__(self, before, after, stride):
        super().__init__()
        self.first, self.second = conv(before, after, stride), conv(after, after)
        self.past = nn.Identity()
        if stride > 1 or before != after:
            pool = nn.AvgPool2d(stride, ceil_mode=True)
            self.past = nn.Sequential(pool, nn.Conv2d(before, after, 1, bias=False), nn.BatchNorm2d(after))

    def forward(self, x):
        return F.relu(self.past(x) + self.second(F.relu(self.first(x))))


def residual_net(width, blocks):
    """Two convolutions, then four stages of blocks; each has twice the width at half the size."""
    layers = [conv(3, width // 2), nn.ReLU(), conv(width // 2, width), nn.ReLU(), nn.MaxPool2d(2)]
    before = width
    for stage in range(4):
        for k in range(blocks):
            after = width * 2**stage
            layers.append(Block(before, after, 2 if stage > 0 and k == 0 else 1))
            before = after
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.1), nn.Linear(before, len(CLASSES))]
    return nn.Sequential(*layers, *head)


# %% [markdown]
# ## Strong: depthwise and pointwise, and more epochs (+0.066)
#
# A convolution does two things at once: it looks at neighbours and it mixes channels. Done one after the other,
# both are cheap. **Depthwise**: one k x k filter a channel, $k^2 I$ numbers. **Pointwise**: a 1 x 1 convolution
# from $I$ to $O$ channels, $I O$ numbers. Instead of $k^2 I O$ that is
#
# $$ \frac{k^2 I + I O}{k^2 I O} = \frac{1}{O} + \frac{1}{k^2}. $$
#
# For 3 x 3 about a ninth. What is saved goes into depth: each block first widens its channels with a pointwise
# layer, looks at neighbours there, narrows them again, and adds what came in (an **inverted residual**). An epoch
# of it takes a third of the multiplications, so this level learns for all of the epochs and still multiplies less
# than half as much as medium. Given all epochs, too, medium reaches 0.691 (three seeds): five of the step's points
# are time that cheap layers leave, two are the layers themselves.


# %%
class Separable(nn.Module):
    def __init__(self, before, after, stride, widen):
        super().__init__()
        inside = before * widen
        depthwise = nn.Conv2d(inside, inside, 3, stride, padding=1, groups=inside, bias=False)
        widening, narrowing = (
            nn.Conv2d(before, inside, 1, bias=False),
            nn.Conv2d(inside, after, 1, bias=False),
        )
        layers = [widening, nn.BatchNorm2d(inside), nn.ReLU(), depthwise, nn.BatchNorm2d(inside), nn.ReLU()]
        self.layers = nn.Sequential(*layers, narrowing, nn.BatchNorm2d(after))
        self.adds = stride == 1 and before == after

    def forward(self, x):
        y = self.layers(x)
        if self.adds:
            y = y + x
        return y


def separable_student():
    """A convolution that halves the picture, then seven blocks."""
    blocks = [(24, 1, 2), (24, 1, 3), (40, 2, 3), (40, 1, 3), (40, 1, 3), (64, 2, 3), (64, 1, 3)]
    layers, before = [conv(3, 16, 2), nn.ReLU()], 16
    for after, stride, widen in blocks:
        layers.append(Separable(before, after, stride, widen))
        before = after
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, len(CLASSES)))


show_count(separable_student(), 224, "separable.png")

# %% [markdown]
# ## Boss: look over the teacher's shoulder (+0.088)
#
# The answer is the end of a thought. How the teacher gets there, its **maps**, can be taught, too (a *hint*, the
# idea of FitNets). Where both nets have a map of the same size (the two smallest such sizes are taken), a
# pointwise layer, the adapter, translates the student's, and the loss compares the two by the cosine of their
# angle:
#
# $$ L_\text{hint} = w \, (1 - 2 s)^+ \sum_\text{sizes} \big(1 - \cos(A \, m_\text{student}, m_\text{teacher})\big). $$
#
# With the share $s$ of the training that is over it fades away by half-time: in the end the answer counts. The
# adapters are thrown away then, so the student stays as small as it was.


# %%
def through(net, x):
    """What a sequence of layers answers, and on the way its last map of each size."""
    maps = {}
    for layer in net:
        x = layer(x)
        if x.ndim == 4 and x.shape[-1] > 1:
            maps[str(x.shape[-1])] = x
    return x, maps


class Hinted(nn.Module):
    """A student with an adapter for each of its two smallest maps that the teacher has, too."""

    def __init__(self, student, teacher):
        super().__init__()
        photo = torch.zeros(1, 3, settings["size"], settings["size"])
        with torch.no_grad():
            own, other = (through(deepcopy(net).cpu().eval(), photo)[1] for net in (student, teacher))
        sizes = [size for size in own if size in other][-2:]
        adapters = {size: nn.Conv2d(own[size].shape[1], other[size].shape[1], 1) for size in sizes}
        self.student, self.adapters = student, nn.ModuleDict(adapters)

    def forward(self, x):
        logits, maps = through(self.student, x)
        return logits, {size: adapter(maps[size]) for size, adapter in self.adapters.items()}


def far(maps, shown):
    """How far the student's maps are from the teacher's: 1 - cosine, the mean over the photos."""
    pairs = [(one.float().flatten(1), shown[size].float().flatten(1)) for size, one in maps.items()]
    return sum(1 - F.cosine_similarity(one, other).mean() for one, other in pairs)


# %% [markdown]
# And the student looks **eight times** at each photo of the test: as it is, then seven times turned and cropped
# anew. The mean of its probabilities decides. That costs time, but not one number.


# %%
@torch.no_grad()
def ask(net, images, rows, views):
    """Probabilities (views, rows, kinds). The first view is the photo as it is."""
    net.eval()
    answers = []
    for view in range(views):
        maps = random_maps(len(rows)) if view > 0 else STILL.expand(len(rows), 2, 3)
        with accelerator.split_between_processes(torch.arange(len(rows)), apply_padding=True) as mine:
            parts = mine.split(256)
            logits = [net(look(images, rows[part], settings["size"], maps[part])) for part in parts]
        logits = accelerator.gather(torch.cat(logits))[: len(rows)]
        answers.append(logits.float().softmax(-1).cpu())
    return torch.stack(answers)


def accuracy(answers, rows):
    """Share of photos whose likeliest kind, by the mean of all views, is the right one."""
    return float((answers.mean(0).argmax(-1) == label[rows]).float().mean())


# %% [markdown]
# ## The levels
#
# A row an idea; each can be switched off alone.

# %% tags=["levels"]
# fmt: off
LEVELS = {       # simple   medium   strong       boss
    "patience": (0.5,     0.75,    1,           1),           # share of the epochs that the student learns
    "distil":   (False,   True,    True,        True),        # taught by a teacher, not by the labels alone
    "net":      ("plain", "plain", "separable", "separable"),
    "hints":    (0,       0,       0,           2),           # weight of the teacher's maps
    "views":    (1,       1,       1,           8),           # looks at each photo of the test part
}
SIZES = {
    "small": {
        "size":           (40,   40,   40,   40),    # pixels that the nets see, of the 64 that are stored
        "epochs":         (22,   22,   22,   22),
        "photos":         (1600, 1600, 1600, 1600),  # that an epoch takes at most: a long day on a CPU else
        "batch_size":     (24,   24,   24,   24),
        "alpha":          (0.7,  0.7,  0.7,  0.7),   # weight of the teacher's answer beside the label
        "temperature":    (2,    2,    2,    2),
        "teacher_width":  (20,   20,   20,   20),
        "teacher_blocks": (1,    1,    1,    1),
    },
    "full": {
        "size":           (224,  224,  224,  224),   # what the course's teacher knows
        "epochs":         (20,   100,  300,  300),
        "photos":         (10**6, 10**6, 10**6, 10**6),
        "batch_size":     (64,   128,  128,  128),
        "alpha":          (0.7,  0.7,  0.7,  0.7),
        "temperature":    (2,    2,    2,    2),
        "teacher_width":  (64,   64,   64,   64),
        "teacher_blocks": (2,    2,    2,    2),
    },
}
# fmt: on
settings = choose(LEVELS, SIZES)

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
# Teacher and student learn in the same loop. The teacher's loss compares with the labels, softened a little
# (HW03's label smoothing), as does that of a student without a teacher. Else the teacher is asked about the very
# photos, turned and cropped, that the student sees.


# %%
def make_optimizer(net, steps, rate):
    """AdamW; the rate rises for 15 % of the steps and falls to zero."""
    optimizer = torch.optim.AdamW(net.parameters(), lr=rate, weight_decay=0.05)
    schedule = dict(total_steps=steps, pct_start=0.15, cycle_momentum=False)
    return optimizer, torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, **schedule)


def label_loss(net, teacher, x, y, past):
    return F.cross_entropy(net(x).float(), y, label_smoothing=0.1)


def teacher_loss(net, teacher, x, y, past):
    """`past` is the share of the training that is over."""
    with torch.no_grad(), accelerator.autocast():
        told, shown = through(teacher, x)
    answer = net(x)
    logits, maps = answer if settings["hints"] else (answer, {})
    weight = settings["hints"] * max(0, 1 - 2 * past)
    return loss_fn_kd(logits, y, told, settings["alpha"], settings["temperature"]) + weight * far(maps, shown)


def one_epoch(net, teacher, loss_of, images, batches, past, share):
    """Batches of rows -> losses, each to be stepped on."""
    mine = slice(accelerator.process_index, None, accelerator.num_processes)  # of several processes
    for k, rows in enumerate(batches):
        x = look(images, rows[mine], settings["size"], random_maps(len(rows))[mine])
        yield loss_of(net, teacher, x, label[rows[mine]].to(device), past + share * k / len(batches))


# %% tags=["train"]
def train(stage, net, loss_of, teacher, images, rate, epochs):
    """Teach a net the training photos; the validation photos are only looked at."""
    batch_size = min(settings["batch_size"], max(2, len(given_train) // 16))
    steps = min(len(given_train), settings["photos"]) // batch_size
    net = net.to(device, memory_format=torch.channels_last)
    student = net.student if isinstance(net, Hinted) else net
    optimizer, scheduler = make_optimizer(net, epochs * steps, rate)
    net, optimizer = accelerator.prepare(net, optimizer)
    parts = dict(model=net, optimizer=optimizer, scheduler=scheduler)
    known = [images[:first_test], given_train, teacher and teacher.state_dict()]
    done = load_checkpoint(stage, [train, net, loss_of, epochs, rate, *known], **parts)
    for epoch in tqdm(range(done, epochs), stage, disable=QUIET, leave=False):
        net.train()
        tic, total = time.perf_counter(), torch.zeros((), device=device)
        batches = given_train[torch.randperm(len(given_train))][: steps * batch_size].split(batch_size)
        for loss in one_epoch(net, teacher, loss_of, images, batches, epoch / epochs, 1 / epochs):
            optimizer.zero_grad()
            accelerator.backward(loss)
            optimizer.step()
            scheduler.step()
            total += loss.detach() / steps
        log = dict(stage=stage, epoch=epoch + 1, loss=float(total))
        log["examples_per_second"] = steps * batch_size / (time.perf_counter() - tic)
        if (epoch + 1) % max(1, epochs // 6) == 0 or epoch + 1 == epochs:
            log["valid"] = accuracy(ask(student, images, given_valid, 1), given_valid)
            say(f"{stage}, epoch {epoch + 1} of {epochs}: loss {total:.3f}, validation {log['valid']:.3f}")
            history.append(log)
            save_checkpoint(stage, epoch + 1, **parts)
    accelerator.free_memory()
    return student.eval().requires_grad_(False)


# %% [markdown]
# First the teacher, then the student; each goes on after its own last epoch when the run was stopped.


# %%
RATES = {"teacher": 3e-3, "plain": 3e-3, "separable": 8e-3}


def make_student():
    student = plain_student() if settings["net"] == "plain" else separable_student()
    numbers = numbers_of(student, settings["size"])
    if numbers > LIMIT:
        raise Stop(f"The student has {numbers:,} numbers, {LIMIT:,} are allowed: make its layers narrower.")
    return student


teacher, student = None, make_student()
if settings["distil"] and PROFILE == "full" and GIVEN_TEACHER:
    teacher = given_teacher(GIVEN_TEACHER[0])
elif settings["distil"]:
    teacher = residual_net(settings["teacher_width"], settings["teacher_blocks"])
    epochs = 5 * settings["epochs"] // 4
    teacher = train("teacher", teacher, label_loss, None, images, RATES["teacher"], epochs)
if teacher and settings["hints"]:
    student = Hinted(student, teacher)
loss_of = teacher_loss if teacher else label_loss
epochs = max(1, int(settings["patience"] * settings["epochs"]))
student = train("student", student, loss_of, teacher, images, RATES[settings["net"]], epochs)

fig, axes = plt.subplots(1, 2, figsize=(8, 2.4))
for stage in dict.fromkeys(point["stage"] for point in history):
    curve = [point for point in history if point["stage"] == stage]
    for axis, key in zip(axes, ("loss", "valid")):
        axis.plot([point["epoch"] for point in curve], [point[key] for point in curve], "o-", label=stage)
        axis.set_xlabel("epoch")
axes[0].set_ylabel("loss on changed photos")
axes[1].set_ylabel("accuracy, unseen photos")
axes[1].legend(fontsize=8)
show("curves.png")

# %% [markdown]
# ## Prediction and submission
#
# The mean over the looks decides. Each answer stays with the name of its file, so no order can get lost.

# %% tags=["predict"]
held_out = ask(student, images, given_valid, settings["views"])  # (views, photos, kinds)
probability = ask(student, images, test_rows, settings["views"]).mean(0)  # (test photos, kinds)
if not probability.isfinite().all():
    raise Stop("The training diverged (the loss is infinite): lower the learning rate in RATES.")
category = probability.argmax(-1).tolist()
summary = dict(valid_score=accuracy(held_out, given_valid), parameters=numbers_of(student, settings["size"]))
summary["examples_per_second"] = history[-1]["examples_per_second"]
share = max(category.count(k) for k in range(len(CLASSES))) / len(category)
if share > 0.4:
    say(f"{share:.0%} of the answers are of one kind: look at the curves before you send them.")

# %% cellView="form" jupyter={"source_hidden": true} tags=["submission"]
# @title The submission file, the student, and the picture of the header
submission = OUT / ("submission.csv" if REAL else "submission.sample.csv")


def write_submission(path):
    with aside(path) as part, part.open("w", newline="") as file:
        file.write("Id,Category\n")
        file.writelines(f"{one},{kind}\n" for one, kind in zip(test_id, category))
    with aside(OUT / "student" / "student_best.ckpt") as part:  # the course wants it, too
        torch.save(student.state_dict(), part)


def is_kind(text):
    return text.isdecimal() and text == str(int(text)) and int(text) < len(CLASSES)


def check_submission(path):
    check_table(path, "Id,Category", test_id, is_kind, f"a kind from 0 to {len(CLASSES) - 1}")
    again = make_student()  # raises Stop over the limit
    again.load_state_dict(torch.load(OUT / "student" / "student_best.ckpt", weights_only=True))
    if numbers_of(again, settings["size"]) != summary["parameters"]:
        raise Stop(f"{OUT / 'student'}: the stored student is another one than that of the submission")


def score_submission(path, answers):
    """The judge: the share of photos whose kind is right."""
    guess = np.loadtxt(path, delimiter=",", skiprows=1, ndmin=2)[:, 1]
    return np.mean(guess == np.load(answers / "category.npy"))


if MAIN:
    write_submission(submission)
fig, axes = plt.subplots(2, 6, figsize=(7, 2.3), height_ratios=(2, 1))
for upper, lower, k in zip(axes[0], axes[1], range(6)):
    upper.imshow(images[test_rows[k]].cpu().permute(1, 2, 0), interpolation="bilinear")
    upper.axis("off")
    likely = probability[k].topk(3).indices.flip(0)
    lower.barh(range(3), probability[k][likely], color=["lightgrey", "lightgrey", "lightskyblue"])
    for line, kind in enumerate(likely):
        lower.text(0.03, line, CLASSES[kind], va="center", fontsize=8)
    lower.set(xlim=(0, 1), xticks=[], yticks=[])
fig.suptitle(
    f"{summary['parameters']:,} numbers, {summary['valid_score']:.0%} right on unseen photos", fontsize=10
)
show("hero.jpg")


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
        "simple": [0.5375, 0.5375, 0.53409],
        "medium": [0.64773, 0.66023, 0.62614],
        "strong": [0.71818, 0.69318, 0.71932],
        "boss": [0.77386, 0.81705, 0.80341],
    },
    "without": {
        "patience": [0.72727, 0.77273, 0.77841],
        "distil": [0.70114],
        "net": [0.71477, 0.70227, 0.70682],
        "hints": [0.74773, 0.73409, 0.77159],
        "views": [0.72045, 0.78864, 0.78068],
    },
}

# %% [markdown] tags=["report"]
# ## Report
#
# **1. What is each idea worth?** On the sample, at boss, each idea was switched off alone (`WITHOUT`).

# %% tags=["report"]
show_worth()

# %% [markdown] tags=["report"]
# The teacher is worth most, ten points (one seed), and the layers nine: the plain student, given as many epochs,
# multiplies three times as much and stays behind. Hints are worth five points, patience four, looks three (means of
# three seeds; with each of them boss is better than without). At medium the teacher is worth six
# of the eleven points of the step (0.585 without it, three seeds), the longer training the other five.
#
# **2. The student (questions 1-1 and 1-2 of the course).** Its code stands above; its numbers, layer by layer,
# as torchsummary counts them:

# %% tags=["report"]
frame = pd.DataFrame(count(student, settings["size"]))
frame["kind"] = frame["layer"].str.partition("(")[0]
frame.loc[frame["layer"].str.contains("groups="), "kind"] = "convolution, depthwise"
frame.loc[frame["layer"].str.contains("size=(1, 1)", regex=False), "kind"] = "convolution, pointwise"
groups = frame.groupby("kind")[["numbers", "multiplications"]]
lines = groups.sum().assign(layers=groups.size())
lines.loc["all"] = lines.sum()
table(lines.reset_index())

# %% [markdown] tags=["report"]
# To look at neighbours costs this student 6,552 numbers, to mix channels ten times as many. With plain
# convolutions in the place of the seven depthwise ones, the 6,552 would be 823,104.
#
# **3. Temperature (question 2).** `loss_fn_kd` stands above. What does a higher temperature do to the teacher's
# answers? Their mean entropy on the training photos; the largest possible one is $\ln 11 = 2.4$.

# %% tags=["report"]
large = teacher or student  # at simple nobody has taught it
some = given_train[:1000]
x = look(images, some, settings["size"], STILL.expand(len(some), 2, 3))
logits = torch.cat([large(part).float() for part in x.split(256)])
lines = []
for temperature in (1, 2, 4, 8, 20):
    soft = (logits / temperature).softmax(-1)
    entropy = torch.distributions.Categorical(soft).entropy()
    largest = soft.max(-1).values
    lines.append({"T": temperature, "entropy": float(entropy.mean()), "largest": float(largest.mean())})
table(lines)

# %% [markdown] tags=["report"]
# Softer: at $T = 1$ the teacher gives its first choice 74 %, at $T = 2$, which is used here, 44 %, so that the
# other ten kinds are heard as well. From $T = 8$ on it says almost the same of every kind.
#
# **4. Pruning (question 3-1).** In every convolution of the large net the smallest weights are set to zero: as
# many of each layer as of the others, or the smallest of all layers together. Each point begins with a fresh copy.


# %% tags=["report"]
from torch.nn.utils import prune


def pruned(model, share, together):
    """A copy without that share of the weights of its convolutions: the smallest ones."""
    model = deepcopy(model).to(memory_format=torch.contiguous_format)  # what prune can work on
    places = [(layer, "weight") for layer in model.modules() if isinstance(layer, nn.Conv2d)]
    if together:
        prune.global_unstructured(places, prune.L1Unstructured, amount=share)
    else:
        for layer, name in places:
            prune.l1_unstructured(layer, name, share)
    return model


shares = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
plt.figure(figsize=(8, 2.6))
for name, together in (("the smallest of each layer", False), ("the smallest of all layers", True)):
    nets = [pruned(large, share, together) for share in shares]
    right = [accuracy(ask(net, images, given_valid, 1), given_valid) for net in nets]
    plt.plot([1 - share for share in shares], right, "o-", label=name)
plt.xlabel("share of the weights that is kept")
plt.ylabel("accuracy, validation")
plt.legend()
show("pruning.png")

# %% [markdown] tags=["report"]
# A fifth of every layer can go for nothing, of all layers together more than half: the large late layers have many
# small weights, the small early ones need what they have. Made to give half of them, too, they cost seventeen points.
#
# **5. Is the pruned net faster (question 3-2)?** The same photos through four nets.


# %% tags=["report"]
@torch.no_grad()
def milliseconds(net, x):
    """The best of five passes of these photos."""
    times = []
    for _ in range(6):
        tic = time.perf_counter()
        net(x).sum().item()  # .item() waits for the device
        times.append(time.perf_counter() - tic)
    return 1000 * min(times[1:])


def kilobytes(model):
    memory = io.BytesIO()
    torch.save(model.state_dict(), memory)
    return memory.tell() / 1000


masked = pruned(large, 0.5, False)
clean = deepcopy(masked)
for layer in clean.modules():
    if isinstance(layer, nn.Conv2d):
        prune.remove(layer, "weight")
nets = {"large net": large, "half pruned, with masks": masked, "masks made final": clean, "student": student}
lines = []
for name, net in nets.items():
    line = {"net": name, "numbers": numbers_of(net, settings["size"])}
    line["multiplications"] = sum(row["multiplications"] for row in count(net, settings["size"]))
    lines.append(line | {"file (KB)": kilobytes(net), "64 photos (ms)": milliseconds(net, x[:64])})
table(lines)

# %% [markdown] tags=["report"]
# No. A zero is multiplied like any other number, and masks come on top: the file is twice as large, the time the
# same. Even the student, with half of the multiplications, is only a little faster than the large net: depthwise
# layers fetch much from memory for each multiplication. Fewer numbers, less work and less time are three things.

# %% [markdown] tags=["try"]
# ## Try it
#
# Predict what happens before you run it.
#
# 1. `WITHOUT = "distil"`: the same student, taught by the labels alone. How much does it lose?
# 2. Put `"alpha": 1.0` at boss: the student never sees a label. Is it worse?
# 3. Widen `separable_student` until the notebook refuses it. Which layers have most of the numbers?

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
