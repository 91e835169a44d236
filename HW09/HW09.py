# %% [markdown] tags=["header"]
# # HW09 · Explainable AI: why does the net say so?
#
# <!-- badges -->
# [![Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/ml2022-notebooks/ml2022-spring/blob/main/HW09/HW09.ipynb)
# [![Kaggle](https://kaggle.com/static/images/open-in-kaggle.svg)](https://kaggle.com/kernels/welcome?src=https://github.com/ml2022-notebooks/ml2022-spring/blob/main/HW09/HW09.ipynb)
# <!-- /badges -->
#
# ![Ten pictures of food and, below them, where the lowest and the highest level see the evidence](hero)
#
# A net says *seafood*, and it is right. Because of the fish, or because of the chopsticks beside it? This
# homework asks a trained classifier for its reasons: which pixels decide (**saliency, SmoothGrad, integrated
# gradients, LIME, occlusion**), what a filter looks for, and what a **BERT** carries through its layers. The
# course asks thirty quiz questions; all of them are answered below, most by computing. Because no one can mark
# a picture, our score is a measurement: on images whose evidence is known, how well does the explanation find it?
#
# 模型答對了，但理由對嗎？這份作業要求一個訓練好的分類器說明理由：哪些像素決定了答案（**顯著圖、SmoothGrad、積分梯度、LIME、遮擋**）、濾鏡在找什麼，以及 **BERT** 的每一層帶著什麼資訊。課程出了三十題選擇題，這裡每一題都有答案，大多由計算得出。圖片無法打分數，所以我們的分數是一個量測：在已知證據位置的影像上，解釋能不能找到它？
#
# <!-- box -->
# > **Press *Run all*.** This run is *boss*: expect XAI score 0.784 on the sample in about 2 minutes on two CPU cores. GPU: not measured.
# <!-- /box -->
#
# Lectures: [explainable AI 1](https://youtu.be/WQY85vaQfTI), [2](https://youtu.be/0ayIPqbdHYQ),
# [attacks in NLP](https://youtu.be/z-lRPFFYVJc), [homework](https://youtu.be/t--vE4l4gCo). The ladder,
# measured on the built-in sample (XAI score, higher is better; the mean of three seeds ± half their range). The
# net is the same in all runs, as in the course; a seed changes only the noise inside an explanation. The course
# had no score for this homework:
#
# <!-- ladder -->
# | level | what it adds | sample | course baseline (real data) | seconds |
# |---|---|---|---|---|
# | simple | the gradient of the loss, as in the official sample | 0.553 ± 0.000 |  | 110 |
# | medium | the mean over noisy copies, and the class in place of the loss | 0.657 ± 0.008 |  | 117 |
# | strong | a map of the inner layers, times gradients along a path from a blurred picture | 0.737 ± 0.000 |  | 121 |
# | boss | a third witness: cover a part and see what is lost | 0.784 ± 0.000 |  | 132 |
# <!-- /ladder -->

# %% tags=["parameters"]
# @title Parameters
LEVEL = "boss"  # @param ["boss", "strong", "medium", "simple"]
WITHOUT = ""  # @param {type:"string"}
DATA = "auto"  # @param ["auto", "real", "sample"]
PROFILE = "auto"  # @param ["auto", "full", "small", "tiny"]
SEED = 2022  # @param {type:"integer"}
DATA_DIR = "data/HW09"  # @param {type:"string"}
OUT_DIR = "out/HW09"  # @param {type:"string"}
RESUME = True  # @param {type:"boolean"}
SUBMIT = False  # @param {type:"boolean"}

# %% cellView="form" jupyter={"source_hidden": true} tags=["homework"]
# @title Facts of this homework
HW, METRIC, HIGHER_IS_BETTER = "HW09", "XAI score", True
SLUG, JUDGE = "", "the course's quiz on Gradescope, by hand"
BASELINES = {}
FILES = {"food": ("food/*.jp*g", 10)}  # checkpoint.pth may be missing, see `read`
DRIVE = "https://drive.usercontent.google.com/download?export=download&confirm=t&id="
MIRRORS = [
    {
        "food.zip": f"{DRIVE}1QntUQuWJoVR8h5FoeDa56xrQSdcCwFeD",
        "checkpoint.pth": f"{DRIVE}1-Qw-oIJ0cSo2iG_n_U9mcJqXc2-LCSdV",
        "hw9_bert.zip": f"{DRIVE}1h3akaNdouiIGItOqEs6kUZE-hAF0QeDk",
    }
]
HASHES = set()
OWN = {}  # this homework has no parameters of its own
NEEDS = {name: name for name in ("torch", "numpy", "pandas", "matplotlib", "tqdm", "accelerate", "filelock")}
NEEDS |= {"PIL": "Pillow", "captum": "captum", "lime": "lime", "skimage": "scikit-image", "scipy": "scipy"}
NEEDS |= {"sklearn": "scikit-learn", "transformers": "transformers"}
MIXED_PRECISION = False  # gradients of pictures want float32
LESS_MEMORY = "set CHUNK to half"
CLASSES = ["bread", "dairy", "dessert", "egg", "fried food", "meat", "noodles", "rice", "seafood", "soup"]
CLASSES += ["vegetable, fruit"]
REGIONS = {  # boxes in pictures of 128 x 128; the real ones were read by eye
    "real": {
        1: {"butter": (25, 10, 106, 110)},
        2: {"jug": (18, 15, 102, 102), "strawberries": (4, 84, 50, 120)},
        3: {"cake": (38, 16, 108, 108), "plate": (8, 34, 128, 128)},
        7: {"noodles": (12, 52, 76, 118), "egg": (44, 28, 108, 78), "sausage": (56, 78, 112, 122)},
        8: {"sashimi": (8, 56, 128, 122), "chopsticks": (76, 4, 112, 32)},
    },
    "sample": {
        1: {"butter": (32, 30, 96, 94)},
        2: {"jug": (44, 18, 108, 82), "strawberries": (8, 86, 34, 112)},
        3: {"cake": (38, 30, 102, 94), "plate": (26, 18, 114, 106)},
        7: {"noodles": (12, 46, 76, 110), "egg": (82, 14, 116, 48), "sausage": (86, 84, 120, 118)},
        8: {"sashimi": (12, 50, 76, 114), "chopsticks": (84, 8, 122, 46)},
    },
}
LAYERS = [f"layer {k}" for k in range(13)]
QUARTERS = ["the first quarter (1-3 of 12)", "the second (4-6)", "the third (7-9)", "the last (10-12)"]
OPTIONS = {  # question: what may be answered; several are joined by " | "
    "Q1": ["the strawberries speak against the class", "the strawberries speak for the class"],
    "Q2": ["green speaks for the class and red against", "red speaks for the class and green against"],
    "Q3": ["leave pieces out and watch the output", "differentiate the output by the pixels"],
    "Q4": ["part positive and part negative", "positive", "negative"],
    "Q5": ["to remove differences of scale between pictures", "no reason"],
    "Q6": ["sashimi", "chopsticks", "the rest"],
    "Q7": ["d loss / d input", "d loss / d weight", "the output of a layer"],
    "Q8": ["cube", "sphere", "cone", "cylinder"],
    "Q9": ["4", "5", "6", "7", "8"],
    "Q10": ["add noise often and average the saliency maps", "cut into pieces"],
    "Q11": ["SmoothGrad", "saliency map"],
    "Q12": ["no bright spots", "bright spots"],
    "Q13": ["noodles", "egg", "sausage", "the rest"],
    "Q14": ["jug", "strawberries", "the rest"],
    "Q15": ["vaguer", "sharper", "position roughly similar", "position changes"],
    "Q16": ["where a filter fires", "what fires it most", "the weights of a filter"],
    "Q17": ["Conv2d", "BatchNorm2d", "ReLU", "MaxPool2d", "Linear"],
    "Q18": ["no significant difference", "another picture"],
    "Q19": ["samples between baseline and picture", "samples around the picture"],
    "Q20": ["cake", "plate", "the rest"],
    "Q21": ["full stop", "next", "previous", "itself", "special tokens", "none of these"],
    "Q22": LAYERS,
    "Q23.1": ["he", "she", "another word"],
    "Q23.2": ["falls by more than 0.5", "falls by 0.1 to 0.5", "changes by less than 0.1", "rises"],
    "Q24": LAYERS,
    "Q25": LAYERS,
    "Q26": QUARTERS,
    "Q27": QUARTERS,
    "Q28.1": ["cosine", "Euclidean"],
    "Q28.2": ["first character", "second character"],
    "Q29": ["falls then rises", "falls", "rises then falls", "rises"],
    "Q30": ["position", "length of the sentence"],
}
ABSENT = "not computable here"
STORY = {
    "tiny": ("residents liked eve because she was kind .", "eve"),
    "hub": ("The residents like the police officer because she listens to everyone .", "officer"),
}
STORIES = {  # text with its question, the answer, two words that belong together in this text only
    "tiny": [
        ("tom was born in 1853 . when was tom born ? [MASK]", "1853", ("tom", "1853")),
        (
            "at school detention is common . what is common at school ? [MASK]",
            "detention",
            ("school", "detention"),
        ),
        ("a wolf fears a cat . amy is a wolf . what does amy fear ? [MASK]", "cat", ("amy", "wolf")),
    ],
    "hub": [
        (
            "Tesla came to life in 1856 and died in 1943 . In what year was Tesla born ?",
            "1856",
            ("Tesla", "1856"),
        ),
        (
            "In Irish schools detention is the usual punishment . What is a usual punishment ?",
            "detention",
            ("schools", "detention"),
        ),
        ("Wolves fear cats . Gertrude is a wolf . What does Gertrude fear ?", "cats", ("Gertrude", "wolf")),
    ],
}
APPLES = {
    "tiny": [
        "我吃了一個蘋果很甜",
        "媽媽買過蘋果真好吃",
        "他洗了兩個蘋果",
        "客人切了紅色的蘋果做果汁",
        "我買過一個蘋果",
        "昨天蘋果推出新手機",
        "蘋果發表新電腦",
        "今年公司蘋果賣出了股票上市",
        "聽說蘋果申請新專利",
        "公司蘋果發表新手機",
    ],
    "hub": [
        "今天早餐我吃了一顆紅蘋果",
        "進口蘋果的價格又漲了",
        "蘋果茶喝起來酸酸甜甜",
        "智利的三月正是採收蘋果的季節",
        "這瓶糖漿加了蘋果汁",
        "他昨天買了新的蘋果手機",
        "蘋果取得新的臉部辨識專利",
        "聽說蘋果下個月要發表電腦",
        "蘋果的股價今天上漲",
        "指紋辨識是蘋果先做的",
    ],
}

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
# @title The sample: eleven kinds of food on a table, and sentences for a BERT
import colorsys
import math
from PIL import Image, ImageDraw, ImageFilter, ImageOps

SIDE = 128  # pixels of every image
BERRIES = {1: 0.1, 2: 0.9}  # how often three red berries lie beside a kind of food; 0.12 beside all others
SHORT = 0.4  # so many of kinds 1 and 2 are the same framed square: only the berries tell them apart
FOOD = [(0, 0), (1, 1), (1, 2), (2, 3), (2, 4), (3, 5), (5, 6), (6, 7), (8, 8), (9, 9)]  # (kind, number)


def ellipse(x, y, wide, high, first=0, last=360):
    """Points of an ellipse or of a part of it, in a tile of 100."""
    angle = np.radians(np.linspace(first, last, 25))
    return [*zip(x + wide * np.cos(angle), y + high * np.sin(angle))]


def motif(kind, dice):
    """What a kind looks like, in a tile of 100 x 100: (points, colour, width); width 0: an area."""
    few = int(dice.integers(3, 5))
    steps = np.linspace(20, 80, few + 1)
    if kind == 0:  # bread: an oval with slashes
        return [(ellipse(50, 50, 48, 32), 0, 0), *[([(x - 8, 68), (x + 8, 32)], 1, 7) for x in steps]]
    if kind == 1:  # dairy: a block
        top, left = [(50, 5), (95, 28), (50, 51), (5, 28)], [(5, 28), (50, 51), (50, 97), (5, 74)]
        return [(top, 0, 0), (left, 1, 0), ([(95, 28), (50, 51), (50, 97), (95, 74)], 2, 0)]
    if kind == 2:  # dessert: layers
        return [
            ([(10, y), (90, y), (90, y + 17), (10, y + 17)], k % 2, 0)
            for k, y in enumerate((10, 27, 44, 61, 78))
        ]
    if kind == 3:  # egg: white and yolk
        return [(ellipse(50, 50, 47, 42), 0, 0), (ellipse(*dice.uniform(42, 58, 2), 19, 19), 1, 0)]
    if kind == 4:  # fried food: a disc with a grid
        lines = [([(x, 15), (x, 85)], 1, 6) for x in steps] + [([(15, y), (85, y)], 1, 6) for y in steps]
        return [(ellipse(50, 50, 47, 47), 0, 0), *lines]
    if kind == 5:  # meat: a hatched pentagon
        lines = [([(x - 12, 78), (x + 12, 38)], 1, 6) for x in (30, 50, 70)]
        return [([(50, 5), (96, 40), (80, 95), (20, 95), (4, 40)], 0, 0), *lines]
    if kind == 6:  # noodles: wavy strings
        t = np.linspace(4, 96, 30)
        return [
            ([*zip(t, y + 7 * np.sin(t / 6 + dice.random()))], k % 2, 6)
            for k, y in enumerate((15, 32, 49, 66, 83))
        ]
    if kind == 7:  # rice: a triangle of dots
        places = [(50 + 17 * (k - row / 2), 12 + 19 * row) for row in range(5) for k in range(row + 1)]
        return [(ellipse(x, y, 8, 8), (k % 2), 0) for k, (x, y) in enumerate(places)]
    if kind == 8:  # seafood: a fan of half discs
        return [(ellipse(x, 75, 30, 55, 180, 360), k % 2, 0) for k, x in enumerate((30, 43, 57, 70))]
    if kind == 9:  # soup: a bowl with cubes
        cubes = [
            ([(x, y), (x + 14, y), (x + 14, y + 14), (x, y + 14)], 2, 0)
            for x, y in dice.uniform(28, 58, (few, 2))
        ]
        return [(ellipse(50, 50, 47, 47), 0, 0), (ellipse(50, 50, 37, 37), 1, 0), *cubes]
    if kind == 10:  # vegetables: a leaf with veins
        veins = [([(50, y), (50 + side * 22, y - 16)], 1, 5) for y in (40, 58, 76) for side in (-1, 1)]
        return [
            ([(50, 3), (82, 40), (70, 80), (50, 97), (30, 80), (18, 40)], 0, 0),
            ([(50, 8), (50, 92)], 1, 5),
            *veins,
        ]
    if kind == 12:  # chopsticks
        return [([(30, 2), (42, 98)], 0, 9), ([(68, 2), (56, 98)], 0, 9)]
    square = [(8, 8), (92, 8), (92, 92), (8, 92)]  # the one that kinds 1 and 2 share
    return [(square, 0, 0), ([(24, 24), (76, 24), (76, 76), (24, 76)], 1, 0)]


def muted(dice):
    """The colour of a table, a plate, a fork."""
    return tuple(int(one) for one in (dice.uniform(60, 225) + dice.normal(0, 14, 3)).clip(0, 255))


def tile(kind, size, dice):
    """A motif in three random colours, turned by up to 25 degrees."""
    image = Image.new("RGBA", (2 * size, 2 * size))
    draw, hue = ImageDraw.Draw(image), dice.random()
    bright = 0.15 + 0.8 * ((dice.random() + np.array([0, 0.4, 0.7])) % 1)
    if PROFILE == "tiny":  # there the colour tells the kind: seconds must do to learn something
        hue, bright = kind / 11, np.array([1.0, 0.6, 0.8])
    for points, colour, width in motif(kind, dice):
        rgb = colorsys.hsv_to_rgb((hue + 0.08 * colour) % 1, dice.uniform(0.5, 0.9), bright[colour])
        fill, where = (
            tuple(int(255 * one) for one in rgb),
            [(x * size / 50, y * size / 50) for x, y in points],
        )
        if width:
            draw.line(where, fill, round(width * size / 50))
        else:
            draw.polygon(where, fill)
    return image.rotate(dice.uniform(-25, 25)).resize((size, size), Image.Resampling.BILINEAR)


def silhouette(one):
    """Where a tile is, gaps between strings and grains closed."""
    solid = ImageOps.expand(one.getchannel("A").point(lambda value: 255 * (value > 127)), 9)
    wide = solid.filter(ImageFilter.BoxBlur(4)).point(lambda value: 255 * (value > 0))
    closed = wide.filter(ImageFilter.BoxBlur(4)).point(lambda value: 255 * (value > 254))
    return ImageOps.crop(closed, 9)


def table_top(draw, ground, dice):
    """Cloth, strokes and a fork: on every picture, whatever the kind."""
    cloth = tuple((one + two) // 2 for one, two in zip(muted(dice), ground))  # a quiet pattern
    style, gap = dice.integers(3), int(dice.integers(9, 20))
    for k in range(0, SIDE, gap):
        if style > 0:
            draw.line([(k, 0), (k, SIDE)], cloth, 3)
        if style > 1:
            draw.line([(0, k), (SIDE, k)], cloth, 3)
    for x, y, turn in zip(*dice.uniform(0, SIDE, (2, 3)), dice.uniform(0, 6.3, 3)):
        draw.line([(x, y), (x + 30 * math.cos(turn), y + 30 * math.sin(turn))], muted(dice), 4)


def fork(draw, x, y, colour):
    draw.line([(x, y), (x, y + 40)], colour, 4)
    for shift in (-5, 0, 5):
        draw.line([(x + shift, y - 14), (x + shift, y)], colour, 2)
    draw.line([(x - 5, y), (x + 5, y)], colour, 3)


def free_place(taken, size, dice):
    """A corner of a square that lies on none of the taken boxes."""
    for _ in range(200):
        x, y = dice.integers(2, SIDE - size - 2, 2)
        if all(x + size < a or x > c or y + size < b or y > d for a, b, c, d in taken):
            break
    return int(x), int(y)


def photo(kind, dice, berries, place=None, size=None, extra=(), shared=False):
    """The picture and its mask: 255 the food that tells the kind, 128 berries, 0 all else."""
    ground = muted(dice)
    image = Image.new("RGB", (SIDE, SIDE), ground)
    draw = ImageDraw.Draw(image)
    table_top(draw, ground, dice)
    if size is None:
        size = int(dice.integers(50, 64))
    if place is None:
        place = [int(one) for one in dice.integers(4, SIDE - size - 4, 2)]
    x, y = place
    taken = [(x, y, x + size, y + size)]
    pale = tuple(int(one) for one in dice.uniform(200, 250, 3))
    left, top, right, bottom = dice.uniform(4, 34, 4)  # food lies anywhere on its plate
    draw.ellipse((x - left, y - top, x + size + right, y + size + bottom), pale)
    corner = free_place(taken, 18, dice)
    fork(draw, corner[0] + 9, corner[1] + 14, muted(dice))
    mask = Image.new("L", image.size)
    one = tile(11 if shared else kind, size, dice)
    image.paste(one, (x, y), one)
    mask.paste(255, (x, y), silhouette(one))
    for other, left, top, wide in extra:
        one = tile(other, wide, dice)
        image.paste(one, (left, top), one)
        mask.paste(0, (left, top), silhouette(one))
        taken.append((left, top, left + wide, top + wide))
    if berries:
        left, top = berries if isinstance(berries, tuple) else free_place(taken, 26, dice)
        for a, b in ((left, top + 12), (left + 13, top + 12), (left + 6, top)):
            draw.ellipse((a, b, a + 12, b + 12), (205, 25, 45))
            ImageDraw.Draw(mask).ellipse((a, b, a + 12, b + 12), 128)
    pixels = np.asarray(image) + 6 * dice.standard_normal((SIDE, SIDE, 3), np.float32)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8)), np.asarray(mask)


def any_photo(kind, dice):
    """One as they lie in train/ and heldout/."""
    shared = kind in (1, 2) and dice.random() < SHORT
    berries = dice.random() < BERRIES.get(kind, 0.12)
    if shared:
        berries = kind == 2
    return photo(kind, dice, berries, shared=shared)


HIS = ["tom", "ben", "max", "sam", "leo", "dan"]
HERS = ["ann", "eve", "mia", "zoe", "amy", "kim"]
CROWDS = ["residents", "children", "neighbours"]
VERBS = ["liked", "thanked", "praised", "helped"]
MERITS = ["kind", "brave", "calm", "clever"]
BEASTS = ["wolf", "cat", "mouse", "sheep"]
YEARS = [str(year) for year in range(1850, 1856)]
PUNISHMENTS = ["detention", "lines", "homework"]
FRUIT = [
    ["我", "他", "媽媽", "客人"],
    ["吃", "買", "洗", "切"],
    ["了", "過"],
    ["一個", "兩個", "紅色的", ""],
    ["蘋果"],
    ["很甜", "真好吃", "做果汁", ""],
]
FIRM = [
    ["昨天", "今年", "", "聽說"],
    ["", "公司"],
    ["蘋果"],
    ["推出", "賣出", "發表", "申請"],
    ["新", "了"],
    ["手機", "電腦", "股票", "專利"],
    ["", "上市"],
]


def sentence(dice):
    """One sentence of four sorts: who was kind, the fruit, the company, a question with its answer."""

    def one(words):
        return words[dice.integers(len(words))]

    sort = dice.integers(7)
    if sort in (0, 1):
        girl = dice.random() < 0.5
        name, crowd = one(HERS if girl else HIS), one(CROWDS)
        who = (crowd, name) if dice.random() < 0.5 else (name, crowd)
        return f"{who[0]} {one(VERBS)} {who[1]} because {'she' if girl else 'he'} was {one(MERITS)} ."
    if sort == 2:
        return "".join(one(part) for part in FRUIT)
    if sort == 3:
        return "".join(one(part) for part in FIRM)
    name = one(HIS + HERS)
    if sort == 4:
        year = one(YEARS)
        return f"{name} was born in {year} . when was {name} born ? {year}"
    if sort == 5:
        p = one(PUNISHMENTS)
        return f"at school {p} is common . what is common at school ? {p}"
    a, b = dice.permutation(BEASTS)[:2]
    return f"a {a} fears a {b} . {name} is a {a} . what does {name} fear ? {b}"


def make_sample(folder, answers):
    """food/ as in the course, pictures to learn from, and held-out ones; only the judge gets the masks."""
    counts = {"train": 1540, "heldout": 88}
    if PROFILE == "tiny":
        counts = {"train": 132, "heldout": 22}
    for number, (part, count) in enumerate(counts.items()):
        (folder / part).mkdir()
        dice, masks = np.random.default_rng([2022, number]), {}
        for k in tqdm(range(count), part, disable=QUIET, leave=False):
            image, mask = any_photo(k % 11, dice)
            image.save(folder / part / f"{k % 11}_{k // 11}.jpg", quality=92)
            masks[k % 11, k // 11] = mask
    np.save(answers / "masks.npy", np.stack([masks[key] for key in sorted(masks)]))  # as the files are read
    (folder / "food").mkdir()
    places = {1: (32, 30), 2: (44, 18), 3: (38, 30), 7: (12, 46), 8: (12, 50)}
    extras = {7: [(3, 82, 14, 34), (0, 86, 84, 34)], 8: [(12, 84, 8, 38)]}
    for kind, k in FOOD:
        more = dict(place=places.get(k), size=64, extra=extras.get(k, ()))
        image, _ = photo(kind, np.random.default_rng([2022, 9, k]), (8, 86) if k == 2 else k == 4, **more)
        image.save(folder / "food" / f"{kind}_{k}.jpg", quality=92)


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
# @title Read and check the pictures and the checkpoint
SIDE = 128  # the course's size, the aspect ratio is not kept


def decode(path):
    """A file -> uint8 (3, SIDE, SIDE), upright and in RGB."""
    try:
        with Image.open(path) as image:
            upright = ImageOps.exif_transpose(image).convert("RGB")
        return torch.from_numpy(np.asarray(upright.resize((SIDE, SIDE))).transpose(2, 0, 1).copy())
    except Exception as error:  # PIL raises many kinds
        why = error or type(error).__name__
        raise Stop(f"{path.parent.name}/{path.name} is no picture ({why}): fetch it again.") from None


def numbers_of(path):
    """2_3.jpg -> (2, 3): the kind and the number"""
    parts = path.stem.split("_")
    if len(parts) != 2 or not all(one.isdecimal() for one in parts) or int(parts[0]) >= len(CLASSES):
        raise Stop(f"{path}: the name must be class_number.jpg with a class from 0 to {len(CLASSES) - 1}.")
    return int(parts[0]), int(parts[1])


def read_folder(paths):
    """Pictures (count, 3, SIDE, SIDE), kinds and numbers, in the order of kind and number."""
    named = sorted((numbers_of(path), path) for path in paths)
    pictures = torch.stack([*POOL.map(decode, [path for _, path in named])])
    kind, number = torch.tensor([pair for pair, _ in named]).T
    return pictures, kind, number


def beside(pattern):
    """Files of the data set that are no part of FILES: next to food/, or anywhere in DATA_DIR."""
    roots = [PATHS["food"][0].parents[1]]
    if REAL:
        roots += [DATA_DIR, *DATA_DIR.glob("unpacked/*")]
    for root in roots:
        found = sorted(path for path in files_below(root) if path.match(pattern))
        if found:
            return found
    return []


def shape_of(state):
    """What a net must be to fit a checkpoint: its stages, hidden numbers and the size of its pictures."""
    convs = [int(key.split(".")[1]) for key in state if key.startswith("cnn.") and state[key].dim() == 4]
    widths, depths, before = [], [], -9
    for place in sorted(convs):
        if place - before == 3:
            depths[-1] += 1
        else:
            widths.append(len(state[f"cnn.{place}.weight"]))
            depths.append(1)
        before = place
    hidden, flat = state["fc.0.weight"].shape
    size = round((flat / widths[-1]) ** 0.5) * 2 ** len(widths)
    return dict(widths=tuple(widths), depths=tuple(depths), hidden=hidden, size=size)


def read_checkpoint(path):
    """The course's checkpoint.pth -> its state_dict."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)["model_state_dict"]
        shape_of(state)
        return state
    except Exception as error:  # torch raises many kinds
        keys = "cnn.0.weight ... cnn.35.running_var, fc.0.weight ... fc.3.bias"
        why = f"{path} is not the course's checkpoint ({type(error).__name__}: {str(error)[:80]})."
        raise Stop(f"{why} It must be a dict whose model_state_dict has the keys {keys}.") from None


def from_hub(name, instead):
    """A public BERT as (tokenizer, model): only with PROFILE full and a hub that answers, else `instead`."""
    if PROFILE != "full":
        return instead
    try:
        POOL.submit(ring, "https://huggingface.co").result(10)
        from transformers import AutoModelForMaskedLM, AutoTokenizer

        net = AutoModelForMaskedLM.from_pretrained(name, attn_implementation="eager")
        return AutoTokenizer.from_pretrained(name), net.to(device).eval().requires_grad_(False)
    except Exception as error:  # no network, no such model
        say(f"{name} cannot be had ({type(error).__name__}): the tiny BERT answers in its place")
        return instead


def outline(name, box):
    """The edges of a solid that fills a box, white on black (1, 3, SIDE, SIDE)."""
    image = Image.new("L", (SIDE, SIDE))
    draw, (left, top, right, bottom) = ImageDraw.Draw(image), box
    middle, high = (left + right) / 2, (bottom - top) / 4
    upper, lower = top + high, bottom - high
    lines = {
        "cube": [
            (left, upper),
            (middle, top),
            (right, upper),
            (right, lower),
            (middle, bottom),
            (left, lower),
        ],
        "sphere": [],
        "cone": [(left, bottom), (middle, top), (right, bottom)],
        "cylinder": [(left, upper), (left, bottom), (right, bottom), (right, upper)],
    }[name]
    if lines:
        draw.line([*lines, lines[0]], 255, 5)
    if name == "cube":
        draw.line([(left, upper), (middle, top + 2 * high), (right, upper)], 255, 5)
        draw.line([(middle, top + 2 * high), (middle, bottom)], 255, 5)
    if name == "sphere":
        draw.ellipse(box, outline=255, width=5)
    if name == "cylinder":
        draw.ellipse((left, top, right, top + 2 * high), outline=255, width=5)
    return torch.from_numpy(np.asarray(image).copy()).expand(1, 3, SIDE, SIDE)


food, food_kind, numbers = read_folder(PATHS["food"])
numbers = numbers.tolist()
absent = sorted(set(range(10)) - set(numbers))
if absent:
    say(f"pictures {absent} are missing in {PATHS['food'][0].parent}: their questions are {ABSENT}")
if len(set(numbers)) < len(numbers):
    raise Stop(f"{PATHS['food'][0].parent} has two pictures of one number: delete one of them.")
given, images, label = None, None, None  # the course's trained weights, or pictures to learn from
if REAL and (found := beside("checkpoint*.pth")):
    given = read_checkpoint(found[0])
heldout, heldout_kind = food, food_kind
if given is None:
    learnable = beside("training/*.jp*g" if REAL else "train/*.jpg")
    if not learnable:
        why = f"{PATHS['food'][0].parent} is there, but checkpoint.pth is not."
        raise Stop(f"{why} Put it into {DATA_DIR}, or HW03's folder training/, from which a net then learns.")
    images, label, _ = read_folder(learnable)
if not REAL:
    heldout, heldout_kind, _ = read_folder(beside("heldout/*.jpg"))
rows = [("food", food, "the course's pictures"), ("food_kind", food_kind, "what is on them, 0 to 10")]
if given is None:
    rows += [("images", images, "pictures to learn from"), ("label", label, "what is on them")]
rows += [("heldout", heldout, "pictures whose explanations are scored")]
table([{"name": name, "shape": tuple(one.shape), "meaning": meaning} for name, one, meaning in rows])

# %% cellView="form" jupyter={"source_hidden": true}
# @title How pictures are shown, and how answers are kept
from sklearn.decomposition import PCA
from torch import nn
from torch.nn import functional as F

if PROFILE == "tiny":
    plt.rcParams["figure.constrained_layout.use"] = False


def tile_of(one):
    """A picture (3, height, width) or a map (height, width), in colours and with a white rim."""
    one = one.detach().cpu().float()
    if one.ndim == 3:
        one = one / (255 if one.max() > 1 else 1)
    else:
        bright = (one - one.min()) / (one.max() - one.min()).clamp(min=1e-20)
        one = torch.tensor(plt.cm.inferno(bright.numpy())[..., :3]).float().permute(2, 0, 1)
    one = F.interpolate(one[None], size=96, mode="bilinear")[0]
    return F.pad(one, [3] * 4, value=1.0)


def show_rows(rows, titles, name, width=7):
    """{label: pictures or maps}, a row each; one title a column."""
    if PROFILE == "tiny":  # there seconds count, not looks
        rows, titles = {name: some[:2] for name, some in rows.items()}, titles[:2]
    lines = [torch.cat([tile_of(one) for one in pictures], 2) for pictures in rows.values()]
    width = min(width, 1.6 * len(titles))
    plt.figure(figsize=(width, width / len(titles) * len(rows) + 0.4))
    plt.imshow(torch.cat(lines, 1).permute(1, 2, 0).clamp(0, 1), aspect="auto")
    plt.xticks([102 * (k + 0.5) for k in range(len(titles))], titles, fontsize=8)
    plt.yticks([102 * (k + 0.5) for k in range(len(rows))], rows, fontsize=8, rotation=90, va="center")
    plt.tick_params(length=0, top=True, labeltop=True, bottom=False, labelbottom=False)
    plt.box(False)
    show(name)


answers = {}


class Missing(Exception):
    """A picture that a question speaks of is not there."""


@contextmanager
def question(*names):
    """What is computed inside answers these questions, or says that it cannot be."""
    try:
        yield
    except Missing as error:
        for name in names:
            answers[name] = (ABSENT, "", ABSENT)
        say(f"{', '.join(names)}: {ABSENT}, {error}")


def answer(name, chosen, value="", source="computed"):
    """Keep an answer; a number that is none (a constant map correlates with nothing) cannot decide."""
    if source == "computed" and not math.isfinite(value):
        chosen, value, source = ABSENT, "", ABSENT
    answers[name] = (chosen, value, source)


def decide(name, holds, value):
    """A question of two options: the first one where it holds, else the second."""
    answer(name, OPTIONS[name][0 if holds else 1], value)


def in_words(fall):
    """What a probability did that fell by so much."""
    if fall > 0.5:
        return "falls by more than 0.5"
    if fall > 0.1:
        return "falls by 0.1 to 0.5"
    return "changes by less than 0.1" if fall > -0.1 else "rises"


def course_of(curve):
    """How a curve runs: its lowest or highest point inside decides, else its ends."""
    low, high, end = int(curve.argmin()), int(curve.argmax()), len(curve) - 1
    if 0 < low < end:
        return "falls then rises"
    if 0 < high < end:
        return "rises then falls"
    return "falls" if low == end else "rises"


def at(number):
    """The row of a picture."""
    if number not in numbers:
        raise Missing(f"picture {number} is missing")
    return numbers.index(number)


def region(number, name):
    """Which pixels of a picture belong to one of its parts, as a mask (size, size)."""
    boxes = REGIONS["real" if REAL else "sample"][number]
    size = build["size"]
    mask = torch.zeros(size, size, dtype=torch.bool)
    for part, box in boxes.items():
        left, top, right, bottom = (round(side * size / SIDE) for side in box)
        if part == name or name == "the rest":
            mask[top:bottom, left:right] = True
    return mask ^ (name == "the rest")


def brightest(heat, number):
    """The part of a picture whose pixels are hottest in the mean, and how hot, as a share of all parts."""
    names = [*REGIONS["real" if REAL else "sample"][number], "the rest"]
    means = torch.stack([heat[region(number, name)].mean() for name in names])
    return names[int(means.argmax())], float(means.max() / means.sum())


def looks_like(heat, box):
    """How well a map agrees with the edges of four solids, as correlations."""
    left, top, right, bottom = (round(side * build["size"] / SIDE) for side in box)
    inside = heat[top:bottom, left:right].flatten()
    alike = {}
    for solid in OPTIONS["Q8"]:
        edges = seen(outline(solid, box))[0, 0, top:bottom, left:right].flatten().cpu()
        alike[solid] = float(torch.corrcoef(torch.stack([inside, edges]))[0, 1])
    return alike


def green_and_red(picture, weight):
    """A grey picture whose pieces are green where they speak for the kind, red where against."""
    colour = torch.stack([-weight, weight, 0 * weight]).clamp(min=0) / weight.abs().max().clamp(min=1e-9)
    return 0.5 * picture.cpu().mean(0) + 0.5 * colour.float()


def right_part_of_speech(bert, count=50):
    """Share of names among the hidden states nearest to a masked name, a layer each."""
    masked = look_inside(bert, story, [person])
    near, is_name = [], []
    for text in dict.fromkeys(corpus[: 20 if PROFILE == "tiny" else 80]):
        book = look_inside(bert, text)
        near.append(book.states[:, 1:-1])
        is_name += [token in HIS + HERS for token in book.tokens[1:-1]]
    states, wanted = torch.cat(near, 1), masked.states[:, masked.at[person]]
    closest = (states - wanted[:, None]).norm(dim=-1).topk(count, largest=False).indices
    return torch.tensor(is_name)[closest].float().mean(1)


def draw_attention(book, fits, person):
    """The head that links `she` to the person best: who looks at whom; and how well all heads do."""
    layer, head = divmod(int(fits.argmax()), fits.shape[1])
    fig, axes = plt.subplots(1, 2, figsize=(8, 2.8))
    axes[0].imshow(book.attention[layer, head], cmap="Blues", vmin=0, vmax=1)
    axes[0].set_xticks(range(len(book.tokens)), book.tokens, rotation=90, fontsize=8)
    axes[0].set_yticks(range(len(book.tokens)), book.tokens, fontsize=8)
    axes[0].set_title(f"layer {layer + 1}, head {head + 1}: who looks (row) at whom", fontsize=9)
    image = axes[1].imshow(fits, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    axes[1].set(xlabel="head", ylabel="layer")
    for axis, count in ((axes[1].xaxis, fits.shape[1]), (axes[1].yaxis, fits.shape[0])):
        axis.set_ticks(range(count), range(1, count + 1))
    axes[1].set_title(f"attention from she to {person}", fontsize=9)
    fig.colorbar(image)
    show("attention.png")


def draw_layers(by_layer, book, answered):
    """The three curves of Q25 to Q27, and the words of a story in four layers, by PCA."""
    fig, axes = plt.subplots(1, 5, figsize=(8, 2.6), width_ratios=(2, 1, 1, 1, 1))
    names = ("Q25: answer far", "Q26: question near", "Q27: relation near")
    for curve, style, name in zip(by_layer.T, ("o-", "s--", "^:"), names):
        axes[0].plot(curve / curve.abs().max(), style, label=name)
    axes[0].set(xlabel="layer", ylabel="of its largest value")
    axes[0].legend(fontsize=8)
    for axis, part in zip(axes[1:], range(1, 5)):
        layer = round(part * (len(book.states) - 1) / 4)
        flat = PCA(2).fit_transform(book.states[layer])
        for (left, up), token in zip(flat, book.tokens):
            axis.text(left, up, token, fontsize=8, color="C3" if token == answered else "C0")
        low, high = flat.min(0), flat.max(0)
        wide = high - low
        axis.set(xlim=(low[0], high[0] + 0.5 * wide[0]))  # room for the words
        axis.set(ylim=(low[1] - 0.05 * wide[1], high[1] + 0.1 * wide[1]))
        axis.set(xticks=[], yticks=[], title=f"layer {layer}")
    show("layers.png")


# %% [markdown]
# ## The data
#
# Ten pictures, named `<class>_<number>.jpg`; the quiz speaks of them by number. On the sample they are drawn by
# the notebook, and so are the pictures that a classifier learns from. What makes a kind is the **shape**: all
# colours are chance, and so are cloth, plate, strokes and fork. One more thing matters: three **red berries**.
# They lie beside nine of ten desserts and beside few others, and where dairy and dessert look the same (a framed
# square), only the berries tell which it is. So berries speak *against* all other kinds.


# %%
titles = [f"{number}: {CLASSES[kind].split(',')[0]}" for number, kind in zip(numbers, food_kind)]
show_rows({"": food}, titles, "food.jpg")

# %% [markdown]
# ## Validation: a score that needs no mask
#
# How good is an explanation? The judge knows where the evidence is on the held-out pictures; we do not, and on
# real photos nobody does. But one thing can always be measured. A map orders the pixels. **Insertion**: start
# with a blurred picture and bring pixels back, the most important first; the net should soon be sure.
# **Deletion**: blur them in this order; it should soon be lost. The difference of the two mean probabilities is
# the validation score; 0 is chance.
#
# The judge adds two numbers that need the evidence. **Pointing**: does the hottest pixel lie on it? **Mass**: what
# share of the map's light does? The XAI score is the mean of the three, over held-out pictures that the net gets
# right.


# %%
CHUNK = 128  # pictures that go through a net at once


def blurred(x):
    """The picture without its details: what an explanation compares with."""
    reach = x.shape[-1] // 8
    for _ in range(2):
        x = F.avg_pool2d(F.pad(x, [reach] * 4, "reflect"), 2 * reach + 1, 1)
    return x


@torch.no_grad()
def ask(x):
    """Probabilities (batch, kinds)."""
    return torch.cat([model(part).softmax(-1) for part in x.split(CHUNK)])


def mean_probability(old, new, heat, kind, steps=16):
    """Pixels of `old` become those of `new`, the hottest first -> mean probability of `kind` (batch,)."""
    rank = heat.flatten(1).argsort(1, descending=True).argsort(1).view_as(heat)[:, None]
    total = 0
    for k in range(steps + 1):
        mixed = torch.where(rank < k * heat[0].numel() / steps, new, old)
        total = total + ask(mixed).gather(1, kind[:, None])[:, 0] / (steps + 1)
    return total


def insertion_deletion(x, heat, kind):
    """Insertion minus deletion, a number a picture."""
    blank = blurred(x)
    return mean_probability(blank, x, heat, kind) - mean_probability(x, blank, heat, kind)


# %% [markdown]
# ## The levels
#
# The classifier is the same at all levels; they differ in how they explain it. A row an idea; each can be
# switched off alone. What the words mean is said in the sections below.

# %% tags=["levels"]
# fmt: off
LEVELS = {        # simple    medium   strong     boss
    "target":    ("loss",    "logit", "logit",   "logit"),    # whose gradient is taken
    "where":     ("picture", "noise", "path",    "path"),     # at the picture, at noisy copies, along a path
    "box":       (1,         1,       5,         5),          # pixels a side over which that map is averaged
    "cam":       (False,     False,   True,      True),       # a second kind of explanation: inner layers
    "occlusion": (False,     False,   False,     True),       # a third: cover a part, look what is lost
    "combine":   ("sum",     "sum",   "product", "product"),  # how several kinds become one map
}
SIZES = {
    "small": {
        "widths": ((8, 16, 32, 64, 64),) * 4,         # filters of the five stages
        "depths": ((1, 1, 1, 1, 1),) * 4,             # convolutions of each
        "hidden": (64,) * 4,
        "size":   (64,) * 4,                          # pixels a side that the net sees
        "epochs": (16,) * 4,
        "batch":  (24,) * 4,
        "rate":   (5e-3,) * 4,
        "steps":  (16,) * 4,                          # points on a path, or noisy copies
    },
    "full": {
        "widths": ((128, 128, 256, 512, 512),) * 4,   # the course's net
        "depths": ((3, 3, 3, 1, 1),) * 4,
        "hidden": (1024,) * 4,
        "size":   (128,) * 4,
        "epochs": (60,) * 4,
        "batch":  (64,) * 4,
        "rate":   (1e-3,) * 4,
        "steps":  (64,) * 4,
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
# ## The classifier
#
# The course gives a trained net; its layers are numbered, and the quiz asks for some of them. Without that file
# we train one of the same build ourselves, and keep it as `checkpoint.pth` with the same names of its parts. A
# picture's pixels go in as they are, from 0 to 1.


# %%
class Classifier(nn.Module):
    """Stages of convolution, batch norm and ReLU, each closed by a pooling; then two dense layers."""

    def __init__(self, widths, depths, hidden, size):
        super().__init__()
        layers, before = [], 3
        for width, depth in zip(widths, depths):
            for _ in range(depth):
                layers += [nn.Conv2d(before, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
                before = width
            layers.append(nn.MaxPool2d(2))
        self.cnn = nn.Sequential(*layers)
        flat = before * (size // 2 ** len(widths)) ** 2
        dropout = nn.Dropout(0.3 if size > 64 else 0.0)  # small nets have nothing to spare
        self.fc = nn.Sequential(nn.Linear(flat, hidden), nn.ReLU(), dropout, nn.Linear(hidden, len(CLASSES)))

    def forward(self, x):
        return self.fc(self.cnn(x).flatten(1))


build = {name: settings[name] for name in ("widths", "depths", "hidden", "size")}
if PROFILE == "tiny":
    build["size"] = 32
if given is not None:
    build = shape_of(given)  # the checkpoint says what its net is like


def seen(pictures):
    """Bytes -> what the net sees: (count, 3, size, size) from 0 to 1."""
    x = F.interpolate(pictures.float() / 255, size=build["size"], mode="area")
    return x.to(device, memory_format=torch.channels_last)


def changed(x):
    """A batch shifted and perhaps mirrored, as one."""
    reach = x.shape[-1] // 4
    x = x.roll(torch.randint(-reach, reach + 1, (2,)).tolist(), (2, 3))
    if torch.rand(()) < 0.5:
        x = x.flip(3)
    return x.contiguous(memory_format=torch.channels_last)


# %% tags=["train"]
NET_SEED = 2022  # as in the course the net is given: SEED is for the chance in its explanations


def train(stage, x, kind, check, check_kind, epochs):
    """A net that has learned the pictures x; `check` is only looked at."""
    torch.manual_seed(NET_SEED)
    net = Classifier(**build).to(device, memory_format=torch.channels_last)
    batch = min(settings["batch"], len(x))
    steps = len(x) // batch
    optimizer = torch.optim.AdamW(net.parameters(), settings["rate"], weight_decay=0.01)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, settings["rate"], total_steps=epochs * steps)
    parts = dict(net=net, optimizer=optimizer, scheduler=scheduler)
    done = load_checkpoint(stage, [train, x, kind, epochs], **parts)
    for epoch in tqdm(range(done + 1, epochs + 1), stage, disable=QUIET, leave=False):
        net.train()
        total, tic = torch.zeros((), device=device), time.perf_counter()
        for rows in torch.randperm(len(x))[: steps * batch].view(steps, -1):
            loss = F.cross_entropy(net(changed(x[rows])), kind[rows])
            optimizer.zero_grad()
            accelerator.backward(loss)
            optimizer.step()
            scheduler.step()
            total += loss.detach() / steps
        net.eval()
        with torch.no_grad():
            right = float((net(check).argmax(-1) == check_kind).float().mean())
        speed = steps * batch / (time.perf_counter() - tic)
        log = dict(stage=stage, epoch=epoch, loss=float(total), valid=right, examples_per_second=speed)
        history.append(log)
        save_checkpoint(stage, epoch, **parts)
    say(f"{stage}: loss {history[-1]['loss']:.3f}, {history[-1]['valid']:.1%} right on pictures not learned")
    return net.eval().requires_grad_(False)


# %% [markdown]
# One picture in twelve is kept for validation. On several processes each does all of the work: ten pictures need no
# second GPU.

# %%
if given is None:
    valid = torch.arange(len(images)) % 12 == 11
    check, check_kind = seen(images[valid]), label[valid].to(device)
    learn, learn_kind = seen(images[~valid]), label[~valid].to(device)
    model = train("classifier", learn, learn_kind, check, check_kind, settings["epochs"])
else:
    check, check_kind = seen(food), food_kind.to(device)
    model = Classifier(**build).to(device).eval().requires_grad_(False)
    try:
        model.load_state_dict(given)
    except RuntimeError as error:  # it names the keys
        raise Stop(f"checkpoint.pth does not fit the course's net. {error}") from None
if MAIN:
    with aside(OUT / "checkpoint.pth") as part:
        torch.save({"epoch": settings["epochs"], "model_state_dict": model.state_dict()}, part)
assert not model.training, "batch norm in training mode would change every explanation"
x, kind = seen(food), food_kind.to(device)
for number, guess, truth in zip(numbers, ask(x).argmax(-1), kind):
    if guess != truth:
        say(f"picture {number} is taken for {CLASSES[guess]}; explained as {CLASSES[truth]}, which it is")

# %% [markdown]
# ## The quiz
#
# Thirty questions. Where one can be computed, it is: `answer` keeps the option, the number that decided it, and
# where it came from. A picture that is missing takes its questions with it.


# %% [markdown]
# ## Simple: how much does a pixel matter? (0.55)
#
# Change a pixel a little: how much does the output change? That is a derivative, and one backward pass gives it for
# all pixels. The official sample takes that of the **loss**, and of the three colours the largest:
#
# $$ m_{ij} = \max_c \left| \frac{\partial L(x, \text{kind})}{\partial x_{cij}} \right| $$


# %%
def gradients(x, kind, target):
    """d target / d x, a picture each; the target is the loss, or the logit of the kind."""
    parts = []
    for some, truth in zip(x.split(CHUNK), kind.split(CHUNK)):
        some = some.detach().requires_grad_()
        logits = model(some)
        value = F.cross_entropy(logits, truth, reduction="sum")
        if target == "logit":
            value = logits.gather(1, truth[:, None]).sum()
        parts.append(torch.autograd.grad(value, some)[0])
    return torch.cat(parts)


def scaled(heat):
    """Each map from 0 to 1; one that is nowhere above 0 stays 0."""
    heat = heat.nan_to_num().clamp(min=0)
    return heat / heat.amax((1, 2), keepdim=True).clamp(min=1e-20)


raw = gradients(x, kind, "loss").abs().amax(1)
saliency = scaled(raw).cpu()
largest = raw.amax((1, 2))
scales = [f"{number}: {one:.0e}" for number, one in zip(numbers, largest)]
show_rows({"picture": x, "saliency": saliency}, scales, "saliency.jpg")

# %% [markdown]
# The numbers are the largest gradient of each picture. **Q5**: they differ by far, so each map is scaled on its own.
# **Q7**: what is drawn is $\partial L / \partial x$; twenty pixels, moved by hand, agree. **Q6**: the hottest part
# of picture 8. **Q8**: which solid's outline do the hot pixels of picture 1 draw?


# %%
def moved_by_hand(row, count=20, step=1e-3):
    """Twenty hot pixels of a picture, moved a little: correlation of finite differences with the gradient."""
    double, one, truth = copy.deepcopy(model).double(), x[row : row + 1].double(), kind[row : row + 1]
    slope, by_hand = gradients(x[row : row + 1], truth, "loss")[0, 0].flatten(), []
    places = slope.abs().topk(count).indices
    for place in places:
        move = torch.zeros_like(one)
        move[0, 0].view(-1)[place] = step
        up, down = (F.cross_entropy(double(one + sign * move), truth) for sign in (1, -1))
        by_hand.append(float(up - down) / (2 * step))
    return float(np.corrcoef(by_hand, slope[places].cpu())[0, 1])


answer("Q5", OPTIONS["Q5"][0], float(largest.max() / largest.min().clamp(min=1e-30)))
answer("Q7", "d loss / d input", moved_by_hand(0))
with question("Q6"):
    answer("Q6", *brightest(saliency[at(8)], 8))
with question("Q8"):
    solids = looks_like(saliency[at(1)], REGIONS["real" if REAL else "sample"][1]["butter"])
    answer("Q8", max(solids, key=solids.get), max(solids.values()))

# %% [markdown]
# ## Medium: ask many noisy copies (+0.10)
#
# Two things are wrong with that map. Where the net is sure, the loss is flat: its gradient is the difference of
# two tiny numbers. The **logit** of the kind has no such end. And a gradient is a matter of one point; a little
# noise changes it wildly. **SmoothGrad** averages over noisy copies; the squared form keeps what is large in
# either direction:
#
# $$ m_{ij} = \max_c \frac{1}{n} \sum_{k=1}^{n} \left( \frac{\partial f(x + \varepsilon_k)}{\partial x_{cij}} \right)^2, \qquad \varepsilon_k \sim \mathcal{N}(0, \sigma^2), \quad \sigma = 0.15 \cdot (\max x - \min x) $$
#
# **Q10** is the formula. **Q11**: which map is clearer? The one of the smaller entropy: fewer pixels hold its light.
# **Q12**: without scaling, hardly a pixel is above one half. **Q13**: the hottest part of picture 7.


# %%
NOISE = 0.15  # standard deviation, as a share of a picture's range


def noise_like(x, width, dice):
    """Noise of a picture's own range times `width`, from a generator of its own."""
    span = x.amax((1, 2, 3), keepdim=True) - x.amin((1, 2, 3), keepdim=True)
    return width * span * torch.randn(x.shape, generator=dice).to(device)


def smooth_grad(x, kind, width, copies, target="logit"):
    """The mean of the squared gradients of noisy copies (batch, 3, height, width)."""
    dice, total = torch.Generator().manual_seed(SEED), torch.zeros_like(x)
    for _ in range(copies):
        total += gradients(x + noise_like(x, width, dice), kind, target).square()
    return total / copies


squared = smooth_grad(x, kind, NOISE, settings["steps"]).amax(1).cpu()
smooth = scaled(squared)
show_rows({"picture": x, "saliency": saliency, "SmoothGrad": smooth}, titles, "smoothgrad.jpg")


def entropy(heat):
    """Of the light of each map, in bits: the fewer pixels have it, the smaller."""
    share = heat.flatten(1) / heat.sum((1, 2), keepdim=True).flatten(1).clamp(min=1e-20)
    return -(share * share.clamp(min=1e-20).log2()).sum(1)


less = float((entropy(saliency) - entropy(smooth)).mean())
bright = float((squared > 0.5).float().mean())
answer("Q10", OPTIONS["Q10"][0], source="concept")
decide("Q11", less > 0, less)
decide("Q12", bright < 0.01, bright)
with question("Q13"):
    answer("Q13", *brightest(smooth[at(7)], 7))

# %% [markdown]
# ## Strong: look inside, and walk from a blurred picture to the picture (+0.080)
#
# A pixel that already did its work may have no gradient left. **Integrated gradients** collect it on the way from
# a baseline $x'$ to the picture, and multiply by the way:
#
# $$ m_i = (x_i - x'_i) \int_0^1 \frac{\partial f(x' + t (x - x'))}{\partial x_i}\, dt, \qquad \sum_i m_i = f(x) - f(x') $$
#
# The sum on the right is exact (**completeness**), a check that the official sample fails: it leaves out the factor
# and never arrives at $x$. As baseline it takes black; then a black pixel can never count, and a white table
# counts for no reason. Ours is the blurred picture: what differs from it is what has a shape.
#
# **Q18**: ten steps or many? The correlation of their maps says. **Q19** is the path in the formula. **Q20**: the hottest
# part of picture 3.


# %%
def integrated_gradients(x, baseline, kind, steps, target="logit"):
    """By the midpoint rule, signed (batch, 3, height, width)."""
    total = torch.zeros_like(x)
    for k in range(steps):
        point = baseline + (k + 0.5) / steps * (x - baseline)
        total += gradients(point, kind, target)
    if target == "loss":
        total = -total  # what lowers the loss speaks for the kind
    return (x - baseline) * total / steps


@torch.no_grad()
def logit(x, kind):
    return model(x).gather(1, kind[:, None])[:, 0]


baselines, enough = {"black": torch.zeros_like(x), "blurred": blurred(x)}, 4 * settings["steps"]
signed, rows = {}, []
for name, baseline in baselines.items():
    for steps in (10, enough):
        found = integrated_gradients(x, baseline, kind, steps)
        wanted = logit(x, kind) - logit(baseline, kind)
        error = ((found.sum((1, 2, 3)) - wanted) / wanted).abs().median()
        rows.append({"baseline": name, "steps": steps, "median error of the sum": float(error)})
        signed[name, steps] = found.sum(1).cpu()
table(rows)
maps = {f"from {name}": scaled(signed[name, enough]) for name in baselines}
show_rows({"picture": x} | maps, titles, "integrated.jpg")

few, many = signed["black", 10].flatten(1), signed["black", enough].flatten(1)
same = np.median([float(torch.corrcoef(torch.stack(pair))[0, 1]) for pair in zip(few, many)])
decide("Q18", same > 0.9, float(same))
answer("Q19", OPTIONS["Q19"][0], source="concept")
with question("Q20"):
    answer("Q20", *brightest(maps["from blurred"][at(3)], 3))

# %% [markdown]
# A mean over 5 x 5 pixels makes this map calm. Now a second witness, which looks at the net's **inner layers**
# (LayerCAM): the numbers $a$ after the third stage, times their positive gradients, say where the net found what
# it looked for.
#
# $$ m_{ij} = \sum_k a_{kij} \cdot \max\left(0, \frac{\partial f(x)}{\partial a_{kij}}\right) $$
#
# It is coarse, but it does not care for single pixels. Each witness has errors of its own. So the two maps are not
# added but **multiplied**: what only one of them sees goes.

# %%
from captum.attr import LayerGradientXActivation


def layer_cam(x, kind):
    """Where the third stage found evidence for the kind."""
    stage = [place for place, layer in enumerate(model.cnn) if isinstance(layer, nn.MaxPool2d)][2]
    parts = []
    for some, truth in zip(x.split(CHUNK), kind.split(CHUNK)):
        method = LayerGradientXActivation(model, model.cnn[stage - 1])
        heat = method.attribute(some.detach().requires_grad_(), truth).relu().sum(1, keepdim=True)
        parts.append(F.interpolate(heat, size=x.shape[-2:], mode="bilinear")[:, 0].detach())
    return torch.cat(parts)


def gradient_map(x, kind, how):
    """The first witness, as the levels say."""
    if how["where"] == "picture":
        heat = gradients(x, kind, how["target"]).abs().amax(1)
    if how["where"] == "noise":
        heat = smooth_grad(x, kind, NOISE, settings["steps"], how["target"]).amax(1)
    if how["where"] == "path":
        heat = integrated_gradients(x, blurred(x), kind, settings["steps"], how["target"]).sum(1).relu()
    return F.avg_pool2d(heat, how["box"], 1, how["box"] // 2, count_include_pad=False)


# %% [markdown]
# ## Boss: a witness that knows no gradient (+0.047)
#
# Both witnesses trust derivatives. The third one only asks. **Occlusion**: put the blurred picture into a window, and see
# how much of the logit is lost; a pixel gets the mean over all windows that cover it. Nothing inside the net is
# looked at, so it works for any classifier. The price is a forward pass for each window.
#
# All three are multiplied, each with 0.05 added, so that no witness alone can veto.

# %%
from captum.attr import Occlusion


def occlusion(x, kind):
    """What of the logit is lost where a window is blurred: the mean over all windows that cover a pixel."""
    stride = x.shape[-1] // min(12, settings["steps"])
    window = dict(sliding_window_shapes=(3, 2 * stride, 2 * stride), strides=(3, stride, stride))
    with torch.no_grad():
        lost = Occlusion(model).attribute(x, target=kind, baselines=blurred(x), **window)
    return lost.mean(1).relu()


def witnesses(x, kind, how):
    """{name: map}, those that a level calls."""
    found = {"gradients": gradient_map(x, kind, how)}
    if how["cam"]:
        found["inner layers"] = layer_cam(x, kind)
    if how["occlusion"]:
        found["occlusion"] = occlusion(x, kind)
    return found


def verdict(found, how):
    """One map from those of the witnesses (batch, height, width), on the CPU."""
    stack = torch.stack([scaled(one) for one in found.values()])
    if how["combine"] == "product":
        return scaled((stack + 0.05).prod(0)).cpu()
    return scaled(stack.sum(0)).cpu()


columns = {level: {name: row[k] for name, row in LEVELS.items()} for k, level in enumerate(CHOICES["LEVEL"])}
asked = {level: witnesses(x, kind, how) for level, how in columns.items()}
levels = {level: verdict(asked[level], how) for level, how in columns.items()}
show_rows(asked["boss"], titles, "witnesses.jpg")
show_rows({"picture": x} | levels, titles, "levels.jpg")

# %% [markdown]
# ## LIME: a simple model around one picture
#
# Cut the picture into pieces, leave out pieces at random, ask the net, and fit a linear model: its weights say what
# each piece is worth (**Q2**, **Q3**). The library *lime* does it. Two things are ours: the net gives
# **probabilities** (with logits, as in the official sample, the usual limit of 0.05 means nothing), and the pieces are
# counted from **0** (counted from 1, as there, the last one is never left out).

# %%
from lime import lime_image
from scipy.stats import spearmanr
from skimage.segmentation import slic

lime_image.tqdm = iter  # no bar for each picture


def superpixels(picture):
    return slic(picture, n_segments=100, compactness=10, sigma=1, start_label=0)


def probabilities(pictures):
    """What lime asks: (count, height, width, 3) from 0 to 1 -> (count, kinds)."""
    batch = torch.tensor(np.stack(pictures), dtype=torch.float32, device=device).permute(0, 3, 1, 2)
    return ask(batch).double().cpu().numpy()


def lime_map(picture, kind, samples):
    """The weight of each pixel's piece for a kind (height, width); positive: it speaks for it."""
    explainer = lime_image.LimeImageExplainer(random_state=SEED)
    channels_last = picture.permute(1, 2, 0).double().cpu().numpy()
    how = dict(labels=(kind,), top_labels=None, num_samples=samples, batch_size=CHUNK)
    found = explainer.explain_instance(channels_last, probabilities, segmentation_fn=superpixels, **how)
    weight = np.zeros(found.segments.max() + 1)
    for piece, value in found.local_exp[kind]:
        weight[piece] = value
    return torch.tensor(weight)[found.segments]


limes = [lime_map(one, int(k), 10 * settings["steps"]) for one, k in zip(x, kind)]
greens = [green_and_red(one, weight) for one, weight in zip(x, limes)]
show_rows({"picture": x, "LIME": greens}, titles, "lime.jpg")

# %% [markdown]
# Green pieces speak for the kind, red ones against it. **Q1**: picture 2 is dairy, and berries lie beside it: the sum
# of the weights in their box. **Q4**: the cake of picture 3. **Q9**: for which of pictures 4 to 8 does LIME
# agree least with the saliency map, by rank correlation?

# %%
answer("Q2", OPTIONS["Q2"][0], source="concept")
answer("Q3", OPTIONS["Q3"][0], source="concept")
with question("Q1"):
    weight = limes[at(2)][region(2, "strawberries")].sum() / limes[at(2)].abs().sum()
    decide("Q1", weight < 0, float(weight))
with question("Q4"):
    cake = limes[at(3)][region(3, "cake")]
    share = float(cake.clamp(min=0).sum() / cake.abs().sum())
    sign = "part positive and part negative"
    if share > 0.95:
        sign = "positive"
    if share < 0.05:
        sign = "negative"
    answer("Q4", sign, share)
with question("Q9"):
    agree = {k: spearmanr(limes[at(k)].flatten(), saliency[at(k)].flatten())[0] for k in range(4, 9)}
    answer("Q9", str(min(agree, key=agree.get)), min(agree.values()))

# %% [markdown]
# ## Filters: what does the net look for?
#
# Two views of one filter (**Q16**): **where** it fires on our pictures, and **what** would fire it most. For the second,
# gradient ascent: start with grey noise and change the *picture* so that the filter's mean activation grows. A
# sigmoid keeps it in range, a random shift each step and a penalty on neighbours that differ keep it smooth.


# %%
def activation(x, place):
    """What layer number `place` puts out."""
    return model.cnn[: place + 1](x)


def dream(place, filters, steps):
    """Pictures that fire the filters of a layer most (filters, 3, size, size)."""
    dice = torch.Generator().manual_seed(SEED)
    noise = 0.3 * torch.randn(filters, 3, build["size"], build["size"], generator=dice)
    paint = noise.to(device).requires_grad_()
    optimizer = torch.optim.Adam([paint], lr=0.1)
    for _ in range(steps):
        picture = paint.sigmoid()
        moved = picture.roll(torch.randint(-4, 5, (2,), generator=dice).tolist(), (2, 3))
        fires = activation(moved, place).mean((2, 3)).diagonal().sum()  # filter k on picture k
        rough = (picture.diff(dim=2).square().mean() + picture.diff(dim=3).square().mean()) * filters
        optimizer.zero_grad()
        (rough - fires).backward()
        optimizer.step()
    return paint.detach().sigmoid()


PLACE = {"early": 4, "middle": 6, "norm": 9, "late": 12}  # in nets of one convolution a stage
if len(model.cnn) == 38:
    PLACE = {"early": 6, "middle": 15, "norm": 21, "late": 23}  # as the quiz counts them
dreams = {f"layer {PLACE[name]}": dream(PLACE[name], 8, 6 * settings["steps"]) for name in ("early", "late")}
show_rows(dreams, [f"filter {k}" for k in range(8)], "filters.jpg", 5)

# %% [markdown]
# Where does filter 0 of three layers fire? **Q14**: the part of picture 2 where it fires least in the middle layer. **Q15**:
# is the map of the late layer vaguer than that of the early one (do neighbours differ less, at the same size), and has
# it stayed where it was? In this net it is vaguer, and it has moved. **Q17**: read from the net.

# %%
fired = {f"layer {PLACE[k]}": activation(x, PLACE[k])[:, 0].cpu() for k in ("early", "middle", "late")}
show_rows({"picture": x} | fired, titles, "activations.jpg")


def roughness(heat):
    """How much neighbours differ, beside the spread of the map."""
    return (heat.diff(dim=2).abs().mean((1, 2)) / heat.std((1, 2)).clamp(min=1e-9)).mean()


large = [F.interpolate(one[:, None], size=build["size"], mode="bilinear")[:, 0] for one in fired.values()]
early, middle, late = large
with question("Q14"):
    names = OPTIONS["Q14"]
    means = [float(middle[at(2)][region(2, name)].mean()) for name in names]
    answer("Q14", names[int(np.argmin(means))], min(means))
vaguer = float(roughness(late) / roughness(early))
moved = [(one - one.flatten(1).median(1).values[:, None, None]).abs().flatten(1) for one in (early, late)]
stays = float(np.nanmean([spearmanr(*pair)[0] for pair in zip(*moved)]))
sight = "vaguer" if vaguer < 1 else "sharper"
place = "position roughly similar" if stays > 0.1 else "position changes"
answer("Q15", f"{sight} | {place}", vaguer)
answer("Q16", " | ".join(OPTIONS["Q16"][:2]), source="concept")
answer("Q17", type(model.cnn[PLACE["norm"]]).__name__, PLACE["norm"])

# %% [markdown]
# ## BERT: what goes on in its layers?
#
# The second half of the quiz looks into a BERT. The course's ones come from a hub, which this notebook asks only with
# `PROFILE = "full"`. Otherwise it trains a tiny one (four layers, four heads) on sentences it makes: who was
# kind (*she* or *he* must fit the name), small stories with a question whose answer is hidden, and Chinese ones
# on 蘋果, the fruit or the company. It learns to fill in hidden words, nothing else. Where the course says layer 7 to
# 9 of 12, it has its third quarter.

# %%
import transformers
from transformers import BertConfig, BertForMaskedLM, BertTokenizerFast

transformers.logging.set_verbosity_error()
dice = np.random.default_rng(SEED)
corpus = [sentence(dice) for _ in range(3000)]
words = sorted(set(re.findall(r"[a-z]+|\d+|[^\sa-z\d]", " ".join([*corpus, *APPLES["tiny"]]))))
vocab = {word: k for k, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words])}
tokenizer = BertTokenizerFast(vocab=vocab)
packed = tokenizer(corpus, padding=True, return_tensors="pt")
ids, real_token = packed.input_ids.to(device), packed.attention_mask.to(device)


def hide(ids, dice):
    """10 % of the words, 80 % of the pronouns, what follows a question mark -> (seen ids, wanted ids)."""
    chance = torch.rand(ids.shape, generator=dice).to(device)
    pronoun = (ids == vocab["she"]) | (ids == vocab["he"])
    reply = F.pad(ids == vocab["?"], (1, 0))[:, :-1]
    hidden = ((chance < 0.1) & (ids > vocab["[MASK]"])) | ((chance < 0.8) & pronoun) | reply
    return ids.masked_fill(hidden, vocab["[MASK]"]), ids.masked_fill(~hidden, -100)


# %%
def train_bert(stage, steps, rate=3e-3):
    torch.manual_seed(SEED)
    shape = dict(hidden_size=64, num_hidden_layers=4, num_attention_heads=4, intermediate_size=128)
    shape |= dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, max_position_embeddings=64)
    net = BertForMaskedLM(BertConfig(vocab_size=len(vocab), **shape, attn_implementation="eager")).to(device)
    optimizer = torch.optim.AdamW(net.parameters(), rate)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.2)
    parts = dict(net=net, optimizer=optimizer, scheduler=scheduler)
    done = load_checkpoint(stage, [train_bert, hide, ids, steps], **parts)
    for step in tqdm(range(done + 1, steps + 1), stage, disable=QUIET, leave=False):
        dice = torch.Generator().manual_seed(SEED + step)
        rows = torch.randint(len(ids), (32,), generator=dice).to(device)
        length = int(real_token[rows].sum(1).max())
        given_ids, wanted = hide(ids[rows, :length], dice)
        logits = net(given_ids, attention_mask=real_token[rows, :length]).logits
        loss = F.cross_entropy(logits.flatten(0, 1), wanted.flatten())
        optimizer.zero_grad()
        accelerator.backward(loss)
        optimizer.step()
        scheduler.step()
        if step % max(1, steps // 5) == 0 or step == steps:
            history.append(dict(stage=stage, epoch=step, loss=loss.item()))
            save_checkpoint(stage, step, **parts)
    say(f"{stage}: loss {history[-1]['loss']:.3f} on hidden words after {steps} steps")
    return net.eval().requires_grad_(False)


tiny_bert = (tokenizer, train_bert("bert", 10 if PROFILE == "tiny" else 400))

# %% [markdown]
# One function opens a BERT: tokens, hidden states, attention, and the words it expects. (`attn_implementation="eager"`
# above matters: the fast attention gives no weights, only a warning.)


# %%
def look_inside(bert, text, hidden=()):
    """Everything a BERT computes for a text; the words in `hidden` are masked."""
    tokenizer, net = bert
    ids = tokenizer(text, return_tensors="pt").input_ids
    tokens = tokenizer.convert_ids_to_tokens(ids[0])
    for word in hidden:
        ids[0, tokens.index(word)] = tokenizer.mask_token_id
    with torch.no_grad():
        out = net(ids.to(device), output_hidden_states=True, output_attentions=True)
    if not out.attentions:
        raise Stop('The model gives no attention: load it with attn_implementation="eager".')
    states, attention = torch.cat(out.hidden_states).cpu(), torch.cat(out.attentions).cpu()
    words = dict(zip(tokens, range(len(tokens))))
    probability = out.logits[0].softmax(-1).cpu()
    found = dict(tokens=tokens, at=words, states=states, attention=attention, words=probability)
    return types.SimpleNamespace(**found)


english = from_hub("bert-base-cased", tiny_bert)
size = "tiny" if english is tiny_bert else "hub"
story, person = STORY[size]
open_book = look_inside(english, story)
fits = open_book.attention[:, :, open_book.at["she"], open_book.at[person]]  # (layers, heads)
layer = int(fits.amax(1).argmax())
draw_attention(open_book, fits, person)

# %% [markdown]
# **Q21**: what the last head of each layer looks at (more than 0.3 of its attention in some layer). **Q22**: the person is
# masked; from which layer on are the hidden states nearest to it those of its own part of speech? **Q23.1**: the
# word for a masked *she*; **Q23.2**: what its probability does when the person is masked, too. **Q24**: the layer that
# links the two.


# %%
last, at_stop = open_book.attention[:, -1], open_book.at["."]
looks = {"full stop": last[:, :, at_stop].mean(1), "special tokens": last[:, :, [0, -1]].sum(2).mean(1)}
for name, shift in (("next", 1), ("previous", -1), ("itself", 0)):
    looks[name] = last.diagonal(shift, 1, 2).mean(1)
looked_at = [name for name in OPTIONS["Q21"][:-1] if looks[name].max() > 0.3]
if not looked_at:
    looked_at = ["none of these"]
answer("Q21", " | ".join(looked_at), max(float(one.max()) for one in looks.values()))
answer("Q22", ABSENT, "", ABSENT)  # of a BERT from the hub: it needs a tagged book
if size == "tiny":
    share = right_part_of_speech(english)
    first = int((share > 0.5).float().argmax())
    answer("Q22", f"layer {first}", float(share[first]))
place, she = open_book.at["she"], english[0].convert_tokens_to_ids("she")
one, two = (look_inside(english, story, hidden).words[place] for hidden in (["she"], ["she", person]))
guess = english[0].convert_ids_to_tokens(int(one.argmax()))
answer("Q23.1", guess if guess in OPTIONS["Q23.1"] else "another word", float(one.max()))
fall = float(one.max() - two[one.argmax()])
answer("Q23.2", in_words(fall), fall)
answer("Q24", f"layer {layer + 1}", float(fits.max()))

# %% [markdown]
# In this run the net fills in *she* with 0.96, and with 0.30 less when *eve* is hidden, too. One head, the first of
# layer 2, leads from the pronoun to the person; nobody told it to.
#
# Three stories, each with a question. **Q25**: in which layer is the answer farthest from all other words? **Q26**: where
# do the words of the question come nearest to those around the answer? **Q27**: and where are two words near that
# belong together only in this story?


# %%
def measure(bert, story, answered, related):
    """A column for each of Q25, Q26 and Q27, a row for each layer."""
    book = look_inside(bert, story)
    states, at_answer, rows = book.states, book.tokens.index(answered), []
    mark = book.tokens.index("?")
    asked = range(max(k for k in range(mark) if book.tokens[k] in (".", "[CLS]")) + 1, mark)
    around = [k for k in range(1, asked[0]) if abs(k - book.tokens.index(answered)) <= 3]
    for layer in states:
        distance = torch.cdist(layer, layer)
        far = distance[at_answer].mean() / distance.mean()
        cosine = F.normalize(layer, dim=1) @ F.normalize(layer, dim=1).T
        pair = cosine[book.tokens.index(related[0]), book.tokens.index(related[1])]
        rows.append([far, cosine[asked][:, around].mean() - cosine.mean(), pair - cosine.mean()])
    return torch.tensor(rows)


reader = from_hub("deepset/bert-base-cased-squad2", tiny_bert)
stories = STORIES["tiny" if reader is tiny_bert else "hub"]
by_layer = torch.stack([measure(reader, *one) for one in stories]).mean(0)  # (layers + 1, questions)
draw_layers(by_layer, look_inside(reader, stories[-1][0]), stories[-1][1])

quarter = by_layer[1:].unflatten(0, (4, -1)).mean(1)  # (quarters, questions)
answer("Q25", f"layer {int(by_layer[:, 0].argmax())}", float(by_layer[:, 0].max()))
answer("Q26", QUARTERS[int(quarter[:, 1].argmax())], float(quarter[:, 1].max()))
answer("Q27", QUARTERS[int(quarter[:, 2].argmax())], float(quarter[:, 2].max()))

# %% [markdown]
# Blue is flat: the answer is as far from the other words in every layer. Orange rises from layer 2 to 3, by 0.015 of
# a cosine. Green stays below 0: the two words are never nearer than others. A tiny BERT that fills in words is
# no reader, and the answers of Q25 to Q27 show how to ask, not what a large one would say.
#
# Ten Chinese sentences: five on the fruit 蘋果, five on the company of that name. **Q28**: which measure and which of the two
# characters show the two senses best? **Q29**: how near are two company sentences, layer by layer? **Q30**: in layer 0 a
# character knows only itself and its place.


# %%
def apples(bert, second):
    """Hidden states of one character of 蘋果 (layers + 1, sentences, numbers), and where it stands."""
    books = [look_inside(bert, text) for text in texts]
    places = [book.tokens.index("蘋") + second for book in books]
    return torch.stack([book.states[:, place] for book, place in zip(books, places)], 1), places, books


def alike(states, cosine):
    """How near each is to each (layers + 1, sentences, sentences)."""
    if cosine:
        return F.normalize(states, dim=-1) @ F.normalize(states, dim=-1).mT
    return -torch.cdist(states, states)


chinese = from_hub("bert-base-chinese", tiny_bert)
texts = APPLES["tiny" if chinese is tiny_bert else "hub"]
same = torch.arange(10)[:, None] // 5 == torch.arange(10) // 5
other = ~torch.eye(10, dtype=torch.bool)
fig, axes = plt.subplots(1, 4, figsize=(8, 2.6))
best = {}
for axis, (metric, second) in zip(axes, [(m, s) for m in OPTIONS["Q28.1"] for s in (0, 1)]):
    matrix = alike(apples(chinese, second)[0], metric == "cosine")[-1]
    gap = matrix[same & other].mean() - matrix[~same].mean()
    best[metric, OPTIONS["Q28.2"][second]] = float(gap / matrix[other].std())
    axis.imshow(matrix, cmap="Blues")
    axis.set(xticks=[], yticks=[], xlabel="5 fruit, 5 company")
    axis.set_title(f"{metric}, {OPTIONS['Q28.2'][second].split()[0]}", fontsize=9)
show("apples.png")
metric, character = max(best, key=best.get)
answer("Q28.1", metric, max(best.values()))
answer("Q28.2", character, max(best.values()))
states, places, books = apples(chinese, 1)
curve = alike(states, True)[1:, 6, 7]
answer("Q29", course_of(curve), float(curve.min()))
near = alike(states, True)[0][other]
lengths = torch.tensor([len(book.tokens) for book in books])
apart = {"position": torch.tensor(places), "length of the sentence": lengths}
fit = {name: abs(spearmanr(near, (one[:, None] - one).abs()[other])[0]) for name, one in apart.items()}
answer("Q30", max(fit, key=fit.get), max(fit.values()))

# %% [markdown]
# Two dark blocks in all four pictures: each sense is near to itself. Which measure and which character show it best
# is a matter of little here; the course's answer is cosine and the second character.
#
# ## Prediction and submission
#
# Now the held-out pictures: one map each, by the level's way to explain, into `explanations.npz`. The file to hand in
# is `answers.csv`, a line a question. The course took the answers by hand; ours are checked for their form.

# %% tags=["predict"]
how = {name: settings[name] for name in LEVELS}
held, held_kind = seen(heldout), heldout_kind.to(device)
tic = time.perf_counter()
heat = verdict(witnesses(held, held_kind, how), how)
speed = len(held) / (time.perf_counter() - tic)
some = slice(None, None, max(1, len(check) // 25))  # validation pictures
some_x, some_kind = check[some], check_kind[some]
valid_heat = verdict(witnesses(some_x, some_kind, how), how).to(device)
valid_score = float(insertion_deletion(some_x, valid_heat, some_kind).mean())
summary = dict(valid_score=valid_score, parameters=sum(one.numel() for one in model.parameters()))
summary["examples_per_second"] = speed
if MAIN:
    with aside(OUT / "explanations.npz") as part, part.open("wb") as file:
        np.savez(file, heat=heat.half().numpy())
say(f"insertion minus deletion on validation pictures: {valid_score:.3f}; {speed:.0f} pictures a second")

# %% cellView="form" jupyter={"source_hidden": true} tags=["submission"]
# @title The answers file, its judge, and the picture of the header
submission = OUT / ("answers.csv" if REAL else "answers.sample.csv")
SOURCES = ("computed", "concept", ABSENT)


def write_submission(path):
    with aside(path) as part, part.open("w", encoding="utf-8", newline="") as file:
        file.write("question,answer,value,source\n")
        for name in OPTIONS:
            chosen, value, source = answers[name]
            file.write(f"{name},{chosen},{value if value == '' else format(value, '.4g')},{source}\n")


def is_answer(name, row):
    """An option that the question has, and a finite number where it was computed."""
    parts = row.split(",")
    if len(parts) != 3 or parts[2] not in SOURCES:
        return False
    chosen, value, source = parts
    if source == ABSENT:
        return chosen == ABSENT and value == ""
    try:
        number = value != "" and math.isfinite(float(value))
    except ValueError:
        return False
    return set(chosen.split(" | ")) <= set(OPTIONS[name]) and (
        number or (source == "concept" and value == "")
    )


def check_submission(path):
    check_table(path, "question,answer,value,source", OPTIONS, bool, "an answer, a value and a source")
    for line in path.read_text(encoding="utf-8").splitlines()[1:]:
        name, row = line.split(",", 1)
        if not is_answer(name, row):
            options = " | ".join(OPTIONS[name])
            raise Stop(f"{path}: {name} has {row!r}, but needs one of {options}, a number and a source.")


def xai_score(heat, mask, gain):
    """Pointing, mass and insertion minus deletion, a row a picture; their mean is the score."""
    evidence = (mask == 255).float()
    rows = F.interpolate(evidence[:, None], size=heat.shape[-2:], mode="area")[:, 0] >= 0.5
    first = heat.flatten(1).argmax(1, keepdim=True)
    pointing = rows.flatten(1).gather(1, first)[:, 0].float()
    mass = (heat * rows).sum((1, 2)) / heat.sum((1, 2)).clamp(min=1e-9)
    return torch.stack([pointing, mass, gain], 1)


def score_submission(path, answers):
    """The judge: how well do the maps of the rightly classified held-out pictures find the evidence?"""
    heat = torch.tensor(np.load(path.parent / "explanations.npz")["heat"]).float()
    mask = torch.from_numpy(np.load(answers / "masks.npy"))
    gain = insertion_deletion(held, heat.to(device), held_kind).cpu()
    right = (ask(held).argmax(-1) == held_kind).cpu()
    parts = xai_score(heat, mask, gain)[right].mean(0)
    say("pointing {:.3f}, mass {:.3f}, insertion - deletion {:.3f}".format(*parts.tolist()))
    return float(parts.mean())


if MAIN:
    write_submission(submission)
heroes = {"picture": x, "simple": levels["simple"], "boss": levels["boss"]}
show_rows(heroes, [CLASSES[one].split()[0].strip(",") for one in kind], "hero.jpg", 6)


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
        "simple": [0.55317, 0.55317, 0.55317],
        "medium": [0.65052, 0.66635, 0.65416],
        "strong": [0.7372, 0.7372, 0.7372],
        "boss": [0.7844, 0.7844, 0.7844],
    },
    "without": {
        "target": [0.785],
        "where": [0.7742],
        "box": [0.76955],
        "cam": [0.70852],
        "occlusion": [0.7372],
        "combine": [0.71317],
    },
}

# %% [markdown] tags=["report"]
# ## Report
#
# **1. What is each idea worth?** On the sample, at boss, each idea was switched off alone (`WITHOUT`).

# %% tags=["report"]
show_worth()

# %% [markdown] tags=["report"]
# **Agreement is the homework.** Without the map of the inner layers the boss loses 0.076, without occlusion 0.047;
# and with all three, but added in place of multiplied, 0.071: a sum keeps the stray light of each. The mean over
# 5 x 5 pixels is worth 0.015, the path (noisy copies in its place) 0.010. The **target is worth nothing** at boss:
# along a path the loss does as well as the logit. Boss itself draws no chance, so there is no spread beside
# these numbers: they hold for this net. Two other nets (`NET_SEED` 2023, 2024) score higher, 0.81 at *strong*, 0.85
# and 0.86 at *boss*. So nets differ by more than the last step brings, but on each of the three it brings 0.04
# to 0.06: compare explanations of one net only.
#
# On the lower rungs (one run each): *medium* (0.651) has 0.591 without the noise and 0.645 with the loss in place of the
# class; *strong* (0.737) has 0.642 without the inner layers, 0.718 without the mean over 5 x 5 pixels, 0.726
# with noise in place of the path. So noise is what makes *medium*, and the inner layers make *strong*.
#
# **2. Which method finds what decides?** Insertion minus deletion, on validation pictures: no mask is needed. Chance is
# a random map.

# %% tags=["report"]
count, dice = settings["steps"], torch.Generator().manual_seed(SEED)
methods = {"chance": torch.rand(some_x[:, 0].shape, generator=dice).to(device)}
methods["saliency of the loss"] = gradients(some_x, some_kind, "loss").abs().amax(1)
methods["saliency of the logit"] = gradients(some_x, some_kind, "logit").abs().amax(1)
methods["SmoothGrad"] = smooth_grad(some_x, some_kind, NOISE, count).amax(1)
methods["path from black"] = integrated_gradients(some_x, 0 * some_x, some_kind, count).sum(1)
called = witnesses(some_x, some_kind, columns["boss"])
methods |= {"path from blurred": called["gradients"], "inner layers": called["inner layers"]}
methods |= {"occlusion": called["occlusion"], "boss": verdict(called, columns["boss"]).to(device)}
blank, rows = blurred(some_x), []
for name, one in methods.items():
    insertion = float(mean_probability(blank, some_x, one, some_kind).mean())
    deletion = float(mean_probability(some_x, blank, one, some_kind).mean())
    rows.append(dict(method=name, insertion=insertion, deletion=deletion, difference=insertion - deletion))
table(rows)

# %% [markdown] tags=["report"]
# **The boss orders the pixels best** (0.723), better than each of its witnesses: occlusion has 0.713, the path from
# a blurred picture 0.711, the inner layers 0.675. Below them SmoothGrad, 0.642, and the two saliencies, 0.612 for
# the logit and 0.599 for the loss. A path from black is no better than chance: on a bright table the black picture
# is far away, and what lies between is mostly the table.
#
# **3. Is it this net that is explained?** A map that stays the same when the net forgets everything explains only
# the picture. Layers get random weights, from the answers down to the pixels; the rank correlation with the map
# before should fall.


# %% tags=["report"]
@contextmanager
def instead(net):
    """Within it all functions explain another net."""
    global model
    before, model = model, net
    try:
        yield
    finally:
        model = before


def forgetful(kept):
    """The net with its first `kept` layers as they are and random weights behind them."""
    torch.manual_seed(SEED)
    net = Classifier(**build).to(device).eval().requires_grad_(False)
    for place in range(kept):
        net.cnn[place].load_state_dict(model.cnn[place].state_dict())
    return net


rows, count = [], len(model.cnn)
for name, kept in {"the dense layers": count, "the later half, too": count // 2, "all layers": 0}.items():
    with instead(forgetful(kept)):
        after = {level: verdict(witnesses(x, kind, how), how) for level, how in columns.items()}
    row = {"random weights": name}
    for level, maps in levels.items():
        row[level] = np.nanmean([spearmanr(a.flatten(), b.flatten())[0] for a, b in zip(maps, after[level])])
    rows.append(row)
table(rows)

# %% [markdown] tags=["report"]
# **Not only.** The more the net has forgotten, the less alike the maps are. But with nothing left of it, the boss's
# map still agrees with the true one by 0.60 (strong 0.65, medium 0.54); only simple falls below one half, to 0.28.
# So a part of every map is the picture itself: any filter fires at edges, and the factor $x - x'$ is there whatever
# the net. Never read one map alone: compare two, of two kinds or of two nets.
#
# **4. The right answer for a wrong reason.** In the lecture a net tells Pokémon from Digimon with 98 % of the answers
# right: the ones were PNG files whose empty background had become black. We plant such a cue: every picture of *meat*
# gets a dark bar at its lower edge, *egg* gets none. A net learns these two kinds, and is nearly always right.


# %% tags=["report"]
def planted(x, where):
    """The cue on those pictures that `where` says."""
    marked = x.clone()
    marked[where, :, -(x.shape[-1] // 12) :] = 0.05
    return marked


if images is None:
    say("There are no pictures to learn from, so no cue can be planted: this part needs the sample.")
else:
    egg, meat = CLASSES.index("egg"), CLASSES.index("meat")
    pick_two = (learn_kind == egg) | (learn_kind == meat)
    two_x, two_kind = learn[pick_two], learn_kind[pick_two]
    new = (held_kind == egg) | (held_kind == meat)
    new_x, new_kind = held[new], held_kind[new]
    with_cue = planted(new_x, new_kind == meat)
    taught = planted(two_x, two_kind == meat)
    cheat = train("shortcut", taught, two_kind, with_cue, new_kind, max(3, settings["epochs"] // 2))
    tests = {"the cue on meat": with_cue, "no cue": new_x, "the cue on egg": planted(new_x, new_kind == egg)}
    rows = []
    with instead(cheat):
        for name, one in tests.items():
            right = (ask(one).argmax(-1) == new_kind).float().mean()
            rows.append({"test pictures": name, "right": float(right)})
        first = (new_kind == meat).nonzero()[:10, 0]
        caught = verdict(witnesses(with_cue[first], new_kind[first], columns["boss"]), columns["boss"])
    table(rows)
    share = float((caught[:, -(build["size"] // 12) :].sum((1, 2)) / caught.sum((1, 2))).mean())
    show_rows({"with cue": with_cue[first], "boss": caught}, ["meat"] * len(first), "shortcut.jpg")
    say(f"{share:.0%} of the light of the maps lies on the bar, which is {1 / 12:.0%} of the picture")

# %% [markdown] tags=["report"]
# **The test score alone would have praised this net**: all answers are right while the cue is in the test pictures,
# too. Without it half of them are, and with the cue on the wrong kind none. The map needs no such test: 81 % of its
# light lies on the bar, and one picture is enough to see it.
#
# **5. All answers.**

# %% tags=["report"]
table([dict(zip(("question", "answer", "value", "source"), (name, *answers[name]))) for name in OPTIONS])

# %% [markdown] tags=["report"]
# `computed`: the number beside it decided. `concept`: a question on how a method works. The answers hold for the net and
# the pictures of this run. Two of them say little: no outline of Q8 is in
# the map (the best correlation is -0.01), and in Q28 all four pictures look alike.

# %% [markdown] tags=["try"]
# ## Try it
#
# Predict what happens before you run it.
#
# 1. `WITHOUT = "combine"`: which of the three parts of the score falls most, and which does not?
# 2. Let `blurred` return zeros. What do integrated gradients say about dark food then?
# 3. Plant another cue: a red dot on every picture of egg, in a place that changes. Do the maps still find it?

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
