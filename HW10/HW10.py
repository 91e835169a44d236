# %% [markdown] tags=["header"]
# # HW10 · Adversarial attack: pictures that nets take for something else
#
# <!-- badges -->
# [![Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/ml2022-notebooks/ml2022-spring/blob/main/HW10/HW10.ipynb)
# [![Kaggle](https://kaggle.com/static/images/open-in-kaggle.svg)](https://kaggle.com/kernels/welcome?src=https://github.com/ml2022-notebooks/ml2022-spring/blob/main/HW10/HW10.ipynb)
# <!-- /badges -->
#
# ![Five images, the changes made to them, sixteen times as strong, and the sums, with what nets see in them](hero)
#
# 200 images come in, and 200 images go out that look the same: no byte may change by more than 8. Nets that nobody shows
# us shall no longer know what is on them. The lecture's idea: **an attack is training, too**, only that
# the weights stand still and the *image* moves, uphill on the loss. The nets to be fooled are a black box, so
# the slope comes from **surrogates**, nets of our own. What fools many surrogates in many ways fools strangers too.
#
# 給定兩百張影像，要交出兩百張看起來一模一樣的影像：每個位元組最多只能改動 8。目標是讓我們從未見過的模型認不出圖中的東西。課程的想法是：**攻擊也是一種訓練**，只是權重不動，動的是*影像*，讓損失往上走。要騙的模型是黑箱，所以梯度來自我們自己的**替代模型**。能用許多方式騙過許多替代模型的影像，也騙得過陌生的模型。
#
# <!-- box -->
# > **Press *Run all*.** This run is *boss*: expect accuracy 0.056 on the sample in about 95 seconds on two CPU cores. GPU: not measured.
# <!-- /box -->
#
# Lectures: [adversarial attack](https://youtu.be/xGQKhbjrFRk), [its second part](https://youtu.be/z-Q9ia5H2Ig),
# [attacks in NLP](https://youtu.be/68lwXWFzCmg), [homework](https://youtu.be/On90EZzVKzk). The ladder, measured
# on the built-in sample (accuracy of three black boxes behind JPEG, **lower** is better; the mean of three seeds
# ± half their range), beside the course's public baselines on the real data:
#
# <!-- ladder -->
# | level | what it adds | sample | course baseline (real data) | seconds |
# |---|---|---|---|---|
# | simple | one step uphill (FGSM), by one surrogate | 0.853 ± 0.070 | 0.7 | 133 |
# | medium | many small steps (I-FGSM), by three surrogates | 0.624 ± 0.077 | 0.5 | 189 |
# | strong | six families of surrogates, and momentum (MI-FGSM) | 0.282 ± 0.018 | 0.3 | 180 |
# | boss | each surrogate sees the image zoomed and shifted anew in every step (DIM) | 0.056 ± 0.002 | 0.15 | 95 |
# <!-- /ladder -->

# %% tags=["parameters"]
# @title Parameters
LEVEL = "boss"  # @param ["boss", "strong", "medium", "simple"]
WITHOUT = ""  # @param {type:"string"}
DATA = "auto"  # @param ["auto", "real", "sample"]
PROFILE = "auto"  # @param ["auto", "full", "small", "tiny"]
SEED = 2022  # @param {type:"integer"}
DATA_DIR = "data/HW10"  # @param {type:"string"}
OUT_DIR = "out/HW10"  # @param {type:"string"}
RESUME = True  # @param {type:"boolean"}
SUBMIT = False  # @param {type:"boolean"}

# %% cellView="form" jupyter={"source_hidden": true} tags=["homework"]
# @title Facts of this homework
HW, METRIC, HIGHER_IS_BETTER = "HW10", "accuracy", False
SLUG, JUDGE = "", "https://ml.ee.ntu.edu.tw/hw10/"
BASELINES = {"simple": 0.70, "medium": 0.50, "strong": 0.30, "boss": 0.15}
FILES = {"images": ("data/*/*[0-9].png", 200)}  # how many the course has
GITHUB = "https://github.com/DanielLin94144/ML-attack-dataset"
MIRRORS = [  # {name here: address} of complete copies
    {"data.zip": f"{GITHUB}/files/8167812/data.zip"},
    {"data.zip": f"{GITHUB}/releases/download/v1.0.0/data.zip"},
]
HASHES = set()
OWN = {}  # this homework has no parameters of its own
NEEDS = {name: name for name in ("torch", "numpy", "pandas", "matplotlib", "tqdm", "accelerate", "filelock")}
NEEDS |= {"PIL": "Pillow", "torchvision": "torchvision", "pytorchcv": "pytorchcv"}
MIXED_PRECISION = True
LESS_MEMORY = "set at_once and batch_size in SIZES to half"
CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
BOUND = 8  # a byte may change by so much
CIFAR = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"

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
# @title The sample: ten shapes that also betray themselves by stripes and a tint; and the black boxes
import math
from PIL import Image
from torch import nn
from torch.nn import functional as F


def outlines(u, v):
    """Ten functions of the plane (10, ...), positive inside a shape of unit size."""
    r, wide, high = (u**2 + v**2).sqrt(), u.abs(), v.abs()
    bar = torch.minimum(0.95 - wide, 0.35 - high)
    nearer = torch.minimum((u - 0.5) ** 2 + v**2, (u + 0.5) ** 2 + v**2).sqrt()
    shapes = [0.9 - r, 0.85 - torch.maximum(wide, high)]  # disc, square
    shapes.append(torch.minimum(0.7 - v, 0.55 * v - wide + 0.45))  # triangle
    shapes.append(torch.maximum(bar, torch.minimum(0.95 - high, 0.35 - wide)))  # plus
    shapes += [0.22 - (r - 0.7).abs(), bar]  # ring, bar
    shapes.append(0.22 - (torch.maximum(wide, high) - 0.65).abs())  # frame
    shapes += [0.5 - nearer, 0.3 - (v - wide + 0.35).abs()]  # two discs, chevron
    return torch.stack([*shapes, torch.minimum(0.9 - r, v + 0.15)])  # half disc


def draw(count, seed):
    """Images (count, 3, 32, 32) as bytes, and their classes, each as often as the others."""
    dice = torch.Generator().manual_seed(seed)

    def between(low, high, *shape):
        return low + (high - low) * torch.rand(count, *shape, generator=dice)

    def normal(*shape):
        return torch.randn(count, *shape, generator=dice)

    kind = torch.arange(count)[torch.randperm(count, generator=dice)] % 10
    y, x = torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij")
    size, turn = between(7, 11, 1, 1), between(-0.4, 0.4, 1, 1)
    right, down = (x - between(11, 21, 1, 1)) / size, (y - between(11, 21, 1, 1)) / size
    u, v = right * turn.cos() + down * turn.sin(), down * turn.cos() - right * turn.sin()
    mask = torch.sigmoid(1.5 * size * outlines(u, v)[kind, torch.arange(count)])
    sign = torch.randint(0, 2, (count, 1, 1, 1), generator=dice) * 2 - 1
    shape = 50 * sign * between(0.7, 1.3, 1, 1, 1) * between(0.6, 1, 3, 1, 1) * (mask[:, None] - 0.3)
    angle = kind.view(-1, 1, 1) * math.pi / 10 + 0.06 * normal(1, 1)
    phase = (0.9 + 0.5 * (kind.view(-1, 1, 1) % 3)) * (x * angle.cos() + y * angle.sin())
    stripes = 12 * between(0.6, 1, 3, 1, 1) * (phase + between(0, 2 * math.pi, 1, 1)).sin()[:, None]
    tints = F.normalize(torch.randn(10, 3, generator=torch.Generator().manual_seed(2022)), dim=1)
    tint = 8 * between(0.5, 1.5, 1) * tints[kind]
    ground = 22 * F.interpolate(normal(3, 4, 4), (32, 32), mode="bicubic", align_corners=False)
    rest = shape + ground + 12 * normal(3, 32, 32)
    if PROFILE == "tiny":  # there seconds must do to learn something
        rest = rest / 10
    return (120 + rest + stripes + tint[:, :, None, None]).round().clamp(0, 255).byte(), kind


class Past(nn.Module):
    """What comes in is added to what the layers make of it."""

    def __init__(self, *layers):
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x):
        return x + self.layers(x)


def conv(before, after, kernel=3, stride=1, groups=1, act=nn.ReLU):
    layer = nn.Conv2d(before, after, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(after), act())


def head(width):
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, len(CLASSES))]


def black_boxes():
    """The judge's nets: of families that the surrogates are not."""
    pooled = [conv(3, 16, 5), nn.AvgPool2d(2), conv(16, 24, 5), nn.AvgPool2d(2)]
    pooled += [conv(24, 32, 5), nn.AvgPool2d(2), *head(32)]
    smooth = [conv(3, 24, 3, 2, act=nn.SiLU)]
    smooth.append(Past(conv(24, 24, act=nn.SiLU), conv(24, 24, act=nn.SiLU)))
    smooth.append(conv(24, 48, 3, 2, act=nn.SiLU))
    smooth += [Past(conv(48, 48, act=nn.SiLU), conv(48, 48, act=nn.SiLU)), *head(48)]
    apart = [conv(3, 24, 3, 2)]
    for before, after, stride in ((24, 32, 1), (32, 48, 2), (48, 64, 1), (64, 64, 1)):
        apart += [conv(before, before, 3, stride, before), conv(before, after, 1)]
    boxes = {"5 x 5, mean pooling": pooled, "residual, SiLU": smooth, "depthwise": [*apart, *head(64)]}
    return {name: nn.Sequential(*layers) for name, layers in boxes.items()}


def teach(net, images, kind, epochs, batch_size):
    """A black box learns its own images, shifted and with noise."""
    steps = len(images) // batch_size
    optimizer = torch.optim.AdamW(net.parameters(), 4e-3, weight_decay=0.05, fused=True)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=epochs * steps)
    for _ in range(epochs):
        for rows in torch.randperm(len(images))[: batch_size * steps].split(batch_size):
            x = images[rows].roll(torch.randint(-3, 4, (2,)).tolist(), (2, 3)) / 64 - 2
            noise = torch.rand(len(rows), 1, 1, 1) * 10 / 64 * torch.randn_like(x)
            loss = F.cross_entropy(net(x + noise), kind[rows], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()


def make_sample(folder, answers):
    """The course's names; images to train surrogates on; and trained black boxes, for the judge alone."""
    each, many, epochs, batch_size = 20, 2000, 4, 64
    if PROFILE == "tiny":
        each, many, epochs, batch_size = 3, 128, 3, 8
    seen = [0] * 10
    for image, kind in zip(*draw(10 * each, 3)):
        seen[kind] += 1
        path = folder / "data" / CLASSES[kind] / f"{CLASSES[kind]}{seen[kind]}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)
    images, kind = draw(many, 1)
    np.savez(folder / "train.npz", images=images.permute(0, 2, 3, 1).numpy(), labels=kind.numpy())
    images, kind = draw(many, 2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(10)
        boxes = black_boxes()
        for net in tqdm(boxes.values(), "black boxes", disable=QUIET, leave=False):
            teach(net, images, kind, epochs, batch_size)
    torch.save({name: net.state_dict() for name, net in boxes.items()}, answers / "black_boxes.pt")


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
# @title Read and check the images, and find something to train surrogates on
PRETRAINED = {  # families of nets that pytorchcv has with weights for CIFAR-10, the plainest member first
    "resnet": ["resnet110", "resnet20", "resnet56"],
    "nin": ["nin", "rir", "ror3_56"],
    "preresnet": ["preresnet20", "preresnet56", "diapreresnet20"],
    "seresnet": ["seresnet20", "sepreresnet20", "diaresnet20"],
    "dense": ["densenet40_k12", "xdensenet40_2_k24_bc"],
    "wide": ["shakeshakeresnet20_2x16d", "wrn16_10", "resnext29_32x4d"],
}


def read_image(path):
    """A PNG -> uint8 (3, 32, 32)."""
    try:
        with Image.open(path) as image:
            kind = f"{image.format} {image.mode} {image.size[0]} x {image.size[1]}"
            pixels = np.array(image)
    except Exception as error:  # PIL raises many kinds
        raise Stop(f"{path} cannot be read ({error or type(error).__name__}): fetch it again.") from None
    if kind != "PNG RGB 32 x 32":
        raise Stop(f"{path} is {kind}, but must be PNG RGB 32 x 32: fetch it again.")
    return torch.from_numpy(pixels).permute(2, 0, 1)


def of_the_course(path):
    """Is it dog/dog7.png, and no leftover of a file browser?"""
    return path.parent.name in CLASSES and re.fullmatch(rf"{path.parent.name}\d+\.png", path.name)


def read_training(path):
    """images (n, 32, 32, 3) and labels, as NumPy wrote them -> bytes (n, 3, 32, 32) and classes."""
    try:
        with np.load(path, allow_pickle=False) as parts:
            pixels, kinds = torch.from_numpy(parts["images"]), torch.from_numpy(parts["labels"]).long()
    except Exception as error:
        raise Stop(f"{path} must have images and labels ({error}): fetch it again.") from None
    if pixels.dtype != torch.uint8 or pixels.shape[1:] != (32, 32, 3) or pixels.shape[:1] != kinds.shape:
        raise Stop(f"{path}: images must be bytes (n, 32, 32, 3) and labels (n).")
    if not 0 <= kinds.min() <= kinds.max() < len(CLASSES):
        raise Stop(f"{path}: labels must be from 0 to {len(CLASSES) - 1}.")
    return pixels.permute(0, 3, 1, 2).contiguous(), kinds


def find_training():
    """A file of training images, or the folder of CIFAR-10; None if there is neither."""
    if not REAL:
        return PATHS["images"][0].parents[2] / "train.npz"
    files = files_below(DATA_DIR)
    for archive in [path for path in files if path.name == Path(CIFAR).name]:
        files += unpack(archive)
    found = [path for path in files if "train" in path.name and path.suffix == ".npz"]
    found += [path.parents[1] for path in files if path.match("cifar-10-batches-py/data_batch_1")]
    return next(iter(found), None)


def fetch_weights():
    """{family: files of trained weights} for pytorchcv's nets; {} where they cannot be had."""
    from pytorchcv.models.common.model_store import get_model_file

    found, folder = {}, DATA_DIR / "models"
    try:
        if not folder.exists():
            POOL.submit(ring, "https://github.com").result(10)
        with hold(folder):
            for family, members in PRETRAINED.items():
                files = [get_model_file(f"{name}_cifar10", str(folder)) for name in members]
                found[family] = dict(zip(members, files))
    except Exception as error:
        say(f"trained nets cannot be had ({error or type(error).__name__}): this run trains its own")
        return {}
    return found


def fetch_training():
    """CIFAR-10's own archive, if its address answers."""
    answer = POOL.submit(ring, CIFAR)
    wait([answer], timeout=10)
    try:
        fetch({Path(CIFAR).name: CIFAR}, answer)
    except Exception as error:
        raise Stop(
            f"There is nothing to train surrogates on: {CIFAR} does not come "
            f"({error or type(error).__name__}). Put {Path(CIFAR).name} into {DATA_DIR}, or "
            "cifar10_train.npz with images (n, 32, 32, 3) as bytes and labels."
        ) from None
    return find_training()


def load_training(place):
    if place.is_file():
        return read_training(place)
    from torchvision.datasets import CIFAR10

    try:
        course = CIFAR10(place, train=True)  # it checks the hashes of its files
    except Exception as error:
        raise Stop(f"{place} has no complete CIFAR-10 ({error}): delete it and run again.") from None
    return torch.from_numpy(course.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(course.targets)


paths = [path for path in PATHS["images"] if of_the_course(path)]
paths.sort(key=lambda path: (path.parent.name, int(re.search(r"\d+", path.name)[0])))
for path in [path for path in PATHS["images"] if path not in paths][:3]:
    say(f"{path} is left out: it is no image of a class")
gone = [name for name in CLASSES if name not in {path.parent.name for path in paths}]
if gone:
    raise Stop(f"{PATHS['images'][0].parents[1]} has no images {gone[0]}/{gone[0]}1.png and so on: fetch it.")
benign = torch.stack([read_image(path) for path in paths])
label = torch.tensor([CLASSES.index(path.parent.name) for path in paths])
names = [f"{path.parent.name}/{path.name}" for path in paths]
place, weights = None, {}
if MAIN and REAL and PROFILE == "full":
    weights = fetch_weights()
if MAIN and not weights:
    place = find_training() or fetch_training()
place, weights = broadcast_object_list([place, weights])
rows = [("benign", benign, "the images, as bytes"), ("label", label, "their classes")]
rows.append(("names", np.array(names), "their names in the archive"))
if not weights:
    train_images, train_label = load_training(place)
    if REAL and PROFILE == "tiny":
        train_images, train_label = train_images[:400], train_label[:400]
    rows += [
        ("train_images", train_images, "images to train surrogates on"),
        ("train_label", train_label, "and their classes"),
    ]
table([{"name": name, "shape": tuple(one.shape), "meaning": meaning} for name, one, meaning in rows])

# %% [markdown]
# ## The data
#
# `data/dog/dog2.png` is the second image of a dog: ten classes, twenty images each, 32 x 32 pixels. The labels
# are public, they are the folders' names; what is hidden are the nets that judge. In the built-in sample the
# ten "classes" are ten shapes: `airplane` is a disc, `automobile` a square. Each class also betrays itself
# by the direction of its stripes and by a tint, both about as weak as the changes that we are allowed. Nets
# love such hints: real photos have them as well, where nobody sees them.


# %%
def show_images(images, titles, columns, name, height):
    """Images (n, 3, 32, 32), bytes or numbers from 0 to 1, each with a line of text above it."""
    lines = -(-len(images) // columns)
    fig, axes = plt.subplots(lines, columns, figsize=(8, height), squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for axis, image, title in zip(axes.flat, images, titles):
        axis.imshow(image.cpu().permute(1, 2, 0))
        axis.set_title(title, fontsize=8)
    show(name)


of_class = [(label == kind).nonzero()[:, 0] for kind in range(len(CLASSES))]
some = [int(rows[line % len(rows)]) for line in range(3) for rows in of_class]
show_images(benign[some], CLASSES + [""] * 20, 10, "images.jpg", 2.8)

# %% [markdown]
# How much is 8 of 255? Below: an image; the same with every byte moved by 8 up or down, **at random**; and those
# changes alone, sixteen times as strong. Who does not see both side by side notices nothing, and nor does a net:
# noise of this size costs it almost nothing (the report has the number). What we look for is the one
# noise in $2^{3072}$ that is worst.

# %%
EPSILON = BOUND / 255
one = benign[:1].float() / 255
signs = torch.randint(0, 2, one.shape, generator=torch.Generator().manual_seed(SEED)) * 2 - 1
random_noise = EPSILON * signs
three = torch.cat([one, (one + random_noise).clamp(0, 1), (0.5 + 16 * random_noise).clamp(0, 1)])
show_images(three, [names[0], "every byte ± 8", "the changes alone"], 3, "bound.jpg", 2.2)

# %% [markdown]
# ## Validation: a family that has not helped
#
# An attack always fools the nets that it was made with. That number says nothing: the judge has *other* nets.
# So each family of surrogates is **left out once**: all others make an attack, and the one left out is asked.
# It is asked as a careful judge would: behind **JPEG**, a passive defence that
# throws away fine detail, and with it some of our changes. The mean over the families is the
# honest estimate of what a stranger says, and every choice in this notebook was made by it.

# %%
MEAN = torch.tensor([0.491, 0.482, 0.447]).view(1, 3, 1, 1).to(device)  # those of the course
SPREAD = torch.tensor([0.202, 0.199, 0.201]).view(1, 3, 1, 1).to(device)


def jpeg(images, quality):
    """Bytes -> the bytes that are left of them in a JPEG."""
    decoded = []
    for image in images.cpu().permute(0, 2, 3, 1).numpy():
        Image.fromarray(image).save(file := io.BytesIO(), "JPEG", quality=quality)
        decoded.append(np.array(Image.open(file)))
    return torch.from_numpy(np.stack(decoded)).permute(0, 3, 1, 2)


def ask(nets, x):
    """The nets' mean answer (images, classes) to numbers from 0 to 1."""
    x = ((x - MEAN) / SPREAD).contiguous(memory_format=torch.channels_last)
    return torch.stack([net(x).float() for net in nets]).mean(0)


@torch.no_grad()
def accuracy(nets, images, rows):
    """Share of these rows' images (bytes) that the nets know."""
    guess = torch.cat([ask(nets, part.to(device) / 255).argmax(-1) for part in images.split(100)])
    return float((guess.cpu() == label[rows]).float().mean())


# %% [markdown]
# ## Simple: one step uphill (0.85)
#
# Training moves the weights downhill on the loss; here the weights stand still and the image moves **uphill**:
#
# $$ x' = x + 8 \cdot \text{sign}\, \nabla_x L(f(x), y) $$
#
# This is FGSM, the fast gradient sign method. Of all changes of at most 8 a byte it is the best one, as far as the loss is
# a straight line: each byte goes as far as it may, in the direction that hurts. Only the slope
# at the image is computed, none for the weights, which saves a third of the work. The net is one small
# residual net that learned other images of the same kind.


# %%
def slope_of(answer, x, y):
    """How the loss of an answer changes with each number of x."""
    x = x.detach().requires_grad_()
    loss = F.cross_entropy(answer(x), y, reduction="sum")
    return torch.autograd.grad(loss, x)[0]


def to_bytes(x, rows):
    """Numbers from 0 to 1 -> bytes; the bound is kept in whole numbers, after rounding."""
    change = (255 * x.cpu() - benign[rows].float()).round().clamp(-BOUND, BOUND)
    return (benign[rows].float() + change).clamp(0, 255).byte()


# %% [markdown]
# ## Medium: small steps, three teachers (−0.23)
#
# The slope is true for the image as it is; eight steps away it points elsewhere. So **I-FGSM** goes twenty small steps, asks
# for the slope anew after each, and comes back into the box of ± 8 around the image whenever it has left it:
#
# $$ x_{t+1} = \text{clip}_{x \pm 8} \big( x_t + \alpha\, \text{sign}\, \nabla_x L \big), \qquad \alpha = 2 \cdot 8 / \text{steps} $$
#
# With one step this is FGSM again. On one surrogate alone it finds the blind spots of that very net and transfers *less*
# than FGSM (the judge knows 0.94 instead of 0.87 of the images, one seed): it overfits (report, part 4). So three surrogates of three families give their **mean answer**, and what is
# found has to fool them all.


# %% cellView="form" jupyter={"source_hidden": true}
# @title Six small nets of six families
class Beside(nn.Module):
    """What comes in is kept, and what the layers make of it is laid beside it."""

    def __init__(self, layers):
        super().__init__()
        self.layers = layers

    def forward(self, x):
        return torch.cat([x, self.layers(x)], 1)


class Excite(nn.Module):
    """Each channel is turned up or down by what the whole image shows."""

    def __init__(self, width):
        super().__init__()
        first, second = nn.Conv2d(width, width // 4, 1), nn.Conv2d(width // 4, width, 1)
        self.layers = nn.Sequential(nn.AdaptiveAvgPool2d(1), first, nn.ReLU(), second, nn.Sigmoid())

    def forward(self, x):
        return x * self.layers(x)


def resnet(w, excite=False):
    layers, before = [], 3
    for width in (w, 2 * w, 3 * w):
        inner = [conv(width, width), conv(width, width, act=nn.Identity)]
        if excite:
            inner.append(Excite(width))
        layers += [conv(before, width, 3, 2), Past(*inner), nn.ReLU()]
        before = width
    return nn.Sequential(*layers, *head(before))


def nin(w):
    layers, before = [], 3
    for width, kernel, stride in ((w, 5, 2), (2 * w, 5, 2), (3 * w, 3, 1)):
        layers += [conv(before, width, kernel, stride), conv(width, width, 1)]
        before = width
    return nn.Sequential(*layers, *head(before))


def vgg(w):
    layers = [conv(3, w, 3, 2), conv(w, w), nn.MaxPool2d(2), conv(w, 2 * w), conv(2 * w, 2 * w)]
    layers += [nn.MaxPool2d(2), nn.Flatten(), nn.Linear(32 * w, 4 * w), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(4 * w, len(CLASSES)))


def seresnet(w):
    return resnet(w, excite=True)


def dense(w):
    layers, width = [conv(3, w, 3, 2)], w
    for part in range(3):
        if part > 0:
            layers += [conv(width, width // 2, 1), nn.AvgPool2d(2)]
            width = width // 2
        for _ in range(3):
            layers.append(Beside(conv(width, w // 2)))
            width += w // 2
    return nn.Sequential(*layers, *head(width))


def mixer(w):
    width = 3 * w
    layers = [conv(3, width, 4, 4)]
    for _ in range(3):
        layers += [Past(conv(width, width, 5, 1, width)), conv(width, width, 1)]
    return nn.Sequential(*layers, *head(width))


OWN_FAMILIES = {
    "resnet": resnet,
    "nin": nin,
    "vgg": vgg,
    "seresnet": seresnet,
    "dense": dense,
    "mixer": mixer,
}


def load_pretrained(name, file):
    """A net of pytorchcv with the weights that its authors trained."""
    from pytorchcv.model_provider import get_model

    net = get_model(f"{name}_cifar10")
    states = torch.load(file, map_location="cpu", weights_only=True)
    net.load_state_dict({key: states[key] for key in net.state_dict()})
    return net


# %%
def into_box(x, start):
    """No byte further than 8 from where it was, and none below black or above white."""
    return x.clamp(start - EPSILON, start + EPSILON).clamp(0, 1)


# %% [markdown]
# ## Strong: six families, and momentum (−0.34)
#
# Whatever two nets have in common a third one is likely to have, too: the more *different* surrogates, the better.
# So there are six families, from two convolutions with a way past them (resnet) to one that has no ordinary 3 x 3
# convolution at all (mixer). **Momentum** (MI-FGSM) adds up the slopes of all steps, each divided by its mean size, image by
# image, so that a step does not turn around at every bump:
#
# $$ g_{t+1} = \mu\, g_t + \frac{\nabla_x L}{\text{mean}\, |\nabla_x L|}, \qquad x_{t+1} = \text{clip} \big( x_t + \alpha\, \text{sign}\, g_{t+1} \big) $$


# %%
def move(state, start, y, nets, rate, momentum, variety):
    """One step uphill; `state` has the images x and the speed that they have gathered."""
    slope = gradient(nets, state["x"], y, variety)
    slope = slope / slope.abs().mean((1, 2, 3), keepdim=True).clamp(min=1e-20)
    state["speed"] = momentum * state["speed"] + slope
    state["x"] = into_box(state["x"] + rate * state["speed"].sign(), start)


# %% [markdown]
# ## Boss: never the same view twice (−0.23)
#
# What helps training helps here, too: augmentation. In every step each surrogate sees every image **zoomed and shifted
# anew** (DIM, diverse inputs). A change that works for one exact position of the pixels no longer pays; what is
# found must fool the nets wherever they look from, and a net that nobody knows looks from elsewhere.


# %%
def random_maps(n, variety):
    """n affine maps (n, 2, 3): the share `variety` of them zooms and shifts, the others do nothing."""
    used = (torch.rand(n) < variety).float()
    zoom = 1 + used * torch.empty(n).uniform_(-0.25, 0.15)  # below 1: nearer
    shift = (2 * torch.rand(n, 2) - 1) * (zoom - 1).abs()[:, None]
    return torch.cat([torch.diag_embed(zoom[:, None].expand(n, 2)), shift[:, :, None]], 2)


def varied(x, maps):
    """Images as these maps show them; without maps as they are."""
    if maps is None:
        return x
    grid = F.affine_grid(maps.to(x.device), x.shape, align_corners=False)
    return F.grid_sample(x, grid, padding_mode="reflection", align_corners=False)


def looks(x, nets, maps):
    """The nets' mean answer, each from where its maps let it look."""
    return torch.stack([ask([net], varied(x, own)) for net, own in zip(nets, maps)]).mean(0)


def gradient(nets, x, y, variety):
    """The slope for all images; of several processes each computes its share."""
    maps = [None] * len(nets)
    if variety > 0:
        maps = [random_maps(len(x), variety) for _ in nets]
    with accelerator.split_between_processes(torch.arange(len(x)), apply_padding=True) as mine:
        slopes = []
        for rows in mine.split(settings["at_once"]):
            own = [one if one is None else one[rows] for one in maps]
            slopes.append(slope_of(functools.partial(looks, nets=nets, maps=own), x[rows], y[rows]))
    return accelerator.gather(torch.cat(slopes))[: len(x)]


eight = varied(benign[:1].float().expand(8, 3, 32, 32) / 255, random_maps(8, 1.0))
show_images(eight, [f"surrogate {k}" for k in range(1, 9)], 8, "views.jpg", 1.4)

# %% [markdown]
# ## The levels
#
# A row an idea; each can be switched off alone.

# %% tags=["levels"]
# fmt: off
LEVELS = {       # simple  medium  strong  boss
    "iterate":  (False,  True,   True,   True),   # many small steps instead of one
    "families": (1,      3,      6,      6),      # of surrogates
    "momentum": (0.0,    0.0,    1.0,    1.0),    # how much of the speed is kept
    "variety":  (0.0,    0.0,    0.0,    1.0),    # share of the views that are zoomed and shifted
}
SIZES = {
    "small": {
        "steps":      (10,   10,   10,   10),
        "width":      (12,   12,   12,   12),     # of the surrogates trained here
        "epochs":     (3,    3,    3,    3),      # of them, on the sample
        "batch_size": (64,   64,   64,   64),
        "rate":       (4e-3, 4e-3, 4e-3, 4e-3),
        "at_once":    (200,  200,  200,  200),    # images in one step
        "members":    (1,    1,    1,    1),      # of a family
    },
    "full": {
        "steps":      (20,   20,   50,   100),
        "width":      (48,   48,   48,   48),
        "epochs":     (10,   10,   10,   10),
        "batch_size": (128,  128,  128,  128),
        "rate":       (4e-3, 4e-3, 4e-3, 4e-3),
        "at_once":    (100,  100,  100,  100),
        "members":    (1,    1,    2,    3),
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
# ## Training the surrogates
#
# Once, one after the other; then they are frozen and kept on the disk. Every image is shifted by up to three
# pixels, and photos are mirrored half of the time. (A mirrored image of the sample would have the stripes of
# another class.)


# %%
def make_batch(images, rows):
    """Rows -> images (batch, 3, 32, 32), shifted and mirrored anew; chance is drawn for the whole batch."""
    pixels = torch.arange(32)
    down, right = torch.randint(-3, 4, (2, len(rows), 1)) + pixels
    if REAL:
        mirrored = torch.rand(len(rows), 1) < 0.5
        right = torch.where(mirrored, right.flip(1), right)
    down, right = 31 - (31 - down.abs()).abs(), 31 - (31 - right.abs()).abs()  # reflected at the edges
    colours = torch.arange(3)[:, None, None]
    x = images[rows[:, None, None, None], colours, down[:, None, :, None], right[:, None, None, :]]
    return x[accelerator.process_index :: accelerator.num_processes].to(device) / 255


# %% tags=["train"]
def train(stage, images, kind, model, epochs):
    """Teach one surrogate; afterwards it is frozen."""
    batch_size = settings["batch_size"]
    if PROFILE == "tiny":
        batch_size = 8  # a few images need many steps, too
    steps = len(images) // batch_size
    model = model.to(device, memory_format=torch.channels_last)
    rate = settings["rate"]
    optimizer = torch.optim.AdamW(model.parameters(), rate, weight_decay=0.05, fused=True)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=epochs * steps)
    model, optimizer = accelerator.prepare(model, optimizer)
    parts = dict(model=model, optimizer=optimizer, scheduler=scheduler)
    done = load_checkpoint(stage, [train, model, images, kind, epochs], **parts)
    model.train()
    for epoch in tqdm(range(done + 1, epochs + 1), stage, disable=QUIET, leave=False):
        tic, total = time.perf_counter(), torch.zeros((), device=device)
        for rows in torch.randperm(len(images))[: steps * batch_size].split(batch_size):
            y = kind[rows][accelerator.process_index :: accelerator.num_processes].to(device)
            loss = F.cross_entropy(ask([model], make_batch(images, rows)), y, label_smoothing=0.05)
            optimizer.zero_grad()
            accelerator.backward(loss)
            optimizer.step()
            scheduler.step()
            total += loss.detach() / steps
        speed = steps * batch_size / (time.perf_counter() - tic)
        history.append(dict(stage=stage, epoch=epoch, loss=float(total), examples_per_second=speed))
        if epoch == epochs or epoch % max(1, epochs // 4) == 0:
            save_checkpoint(stage, epoch, **parts)
    accelerator.free_memory()
    return bare(model).eval().requires_grad_(False)


# %%
epochs = settings["epochs"]
if REAL and PROFILE != "tiny":
    epochs = 5 * epochs  # photos are harder than drawn shapes
surrogates = {}  # family -> its nets
for family, files in weights.items():
    members = [*files.items()][: settings["members"]]
    nets = [load_pretrained(*one).to(device).eval().requires_grad_(False) for one in members]
    good = [net for net in nets if accuracy([net], benign, slice(None)) > 0.85]
    if good:  # else its file is not what it should be
        surrogates[family] = good
for family, make in OWN_FAMILIES.items():
    if not weights:
        net = make(settings["width"])
        surrogates[family] = [train(f"net-{family}", train_images, train_label, net, epochs)]
sizes = {
    name: sum(weight.numel() for net in nets for weight in net.parameters())
    for name, nets in surrogates.items()
}
known = {name: accuracy(nets, benign, slice(None)) for name, nets in surrogates.items()}
if not np.isfinite([row["loss"] for row in history]).all():
    raise Stop("The training of a surrogate diverged (its loss is infinite): lower `rate` in SIZES.")
table([{"family": name, "parameters": sizes[name], "accuracy, benign": known[name]} for name in surrogates])

# %% [markdown]
# ## The attack
#
# All images at once. First by all families of this level; these are the images to hand in. Then, for the estimate, by
# all but one, on every fourth image.


# %%
def attack(stage, nets, rows, steps, momentum=0.0, variety=0.0):
    """The images `rows`, changed by at most 8 a byte so that the nets take them for something else."""
    start, y = benign[rows].to(device) / 255, label[rows].to(device)
    state = dict(x=start.clone(), speed=torch.zeros_like(start))
    depends = [attack, [net.state_dict() for net in nets], start, y, steps, momentum, variety]
    done = load_checkpoint(stage, depends, state=state)
    for step in tqdm(range(done + 1, steps + 1), stage, disable=QUIET, leave=False):
        tic = time.perf_counter()
        move(state, start, y, nets, 2 * EPSILON / steps, momentum, variety)
        speed = len(start) / (time.perf_counter() - tic)
        history.append(dict(stage=stage, epoch=step, examples_per_second=speed))
        if step == steps or step % max(1, steps // 4) == 0:
            save_checkpoint(stage, step, state=state)
    return to_bytes(state["x"], rows)


def attack_by(stage, families, rows):
    """An attack as this level makes it."""
    steps = settings["steps"] if settings["iterate"] else 1
    nets = [net for family in families for net in surrogates[family]]
    return attack(stage, nets, rows, steps, settings["momentum"], settings["variety"])


# %%
everything, fourth = torch.arange(len(benign)), torch.arange(0, len(benign), 4)
chosen = list(surrogates)[: settings["families"]]
adversarial = attack_by("attack", chosen, everything)
held_out = {}
for family in surrogates:
    others = [one for one in chosen if one != family]
    if not others:
        continue
    images = adversarial[fourth]
    if family in chosen:
        images = attack_by(f"without-{family}", others, fourth)
    held_out[family] = accuracy(surrogates[family], jpeg(images, 75), fourth)
rows = []
for family in surrogates:
    row = {"family": family, "benign": accuracy(surrogates[family], jpeg(benign, 75), everything)}
    row["attacked, has helped"] = accuracy(surrogates[family], jpeg(adversarial, 75), everything)
    rows.append(row | {"attacked, left out": held_out.get(family, float("nan"))})
table(rows)

# %% [markdown]
# ## Prediction and submission
#
# 200 PNGs under their old names, in a `.tgz` without a folder around them. The file is read back and checked: every
# name, every size, and no byte further than 8 from the image that it was.

# %% tags=["predict"]
distance = (adversarial.int() - benign.int()).abs()
at_bound = (distance == BOUND).float().mean()
say(f"largest change of a byte: {distance.max()}; {at_bound:.0%} of the bytes are changed by {BOUND}")
summary = dict(valid_score=float(np.mean(list(held_out.values()))), parameters=sum(sizes.values()))
speeds = [row["examples_per_second"] for row in history if row["stage"] == "attack"]  # images x steps
summary["examples_per_second"] = float(np.median(speeds))
say(f"accuracy of the families left out, behind JPEG: {summary['valid_score']:.3f}")

# %% cellView="form" jupyter={"source_hidden": true} tags=["submission"]
# @title The submission file, the judge of the sample, and the picture of the header
submission = OUT / ("submission.tgz" if REAL else "submission.sample.tgz")
LARGEST = 2_000_000  # bytes


def write_submission(path):
    """PNGs in a .tgz, without a time of day: the same images give the same bytes."""
    with aside(path) as part, part.open("wb") as file:
        with (
            gzip.GzipFile("", "wb", 9, file, mtime=0) as packed,
            tarfile.open(fileobj=packed, mode="w") as pack,
        ):
            for name, image in zip(names, adversarial):
                Image.fromarray(image.permute(1, 2, 0).numpy()).save(png := io.BytesIO(), "PNG")
                member = tarfile.TarInfo(name)
                member.size = png.tell()
                png.seek(0)
                pack.addfile(member, png)


def read_submission(path):
    """{name: bytes of the file} of all members; raises Stop where one is no plain file of that name."""
    try:
        with tarfile.open(path, "r:gz") as pack:
            members = [member for member in pack if not member.isdir()]
            found = [member.name for member in members]
            wrong = [name for name in found if name not in names] + [
                name for name in names if name not in found
            ]
            if wrong or len(found) != len(names) or not all(member.isfile() for member in members):
                what = f"but {wrong[0]} is too much or missing" if wrong else "each once, as a plain file"
                raise Stop(
                    f"{path} must have the {len(names)} images under their names, "
                    f"without a top folder, {what}"
                )
            return {member.name: pack.extractfile(member).read() for member in members}
    except (tarfile.TarError, EOFError, OSError) as error:
        raise Stop(f"{path} is no .tgz ({error})") from None


def images_of(path):
    """The images of an archive (n, 3, 32, 32), in the order of `names`."""
    files, found = read_submission(path), []
    for name in names:
        try:
            with Image.open(io.BytesIO(files[name])) as image:
                kind, pixels = (
                    f"{image.format} {image.mode} {image.size[0]} x {image.size[1]}",
                    np.array(image),
                )
        except Exception as error:
            raise Stop(f"{path}: {name} cannot be read ({error or type(error).__name__})") from None
        if kind != "PNG RGB 32 x 32":
            raise Stop(f"{path}: {name} is {kind}, but must be PNG RGB 32 x 32")
        found.append(torch.from_numpy(pixels).permute(2, 0, 1))
    return torch.stack(found)


def check_submission(path):
    """Names, kinds, sizes, and the bound, on the file as it lies on the disk."""
    if path.stat().st_size >= LARGEST:
        raise Stop(f"{path} has {path.stat().st_size} bytes, the judge takes less than {LARGEST}")
    far = (images_of(path).int() - benign.int()).abs().amax((1, 2, 3))
    if far.max() > BOUND:
        raise Stop(f"{path}: a byte of {names[far.argmax()]} is changed by {far.max()}, allowed are {BOUND}")


def judge(images, answers, quality=75):
    """{black box: its accuracy on these images} behind JPEG; the attack has never asked one of them."""
    states = torch.load(answers / "black_boxes.pt", weights_only=True)
    x, scores = images, {}
    if quality:
        x = jpeg(images, quality)
    for name, net in black_boxes().items():
        net.load_state_dict(states[name])
        with torch.no_grad():
            guess = net.eval()(x.float() / 64 - 2).argmax(-1)
        scores[name] = float((guess == label).float().mean())
    return scores


def score_submission(path, answers):
    """The judge: the mean accuracy of the black boxes."""
    return np.mean(list(judge(images_of(path), answers).values()))


if MAIN:
    write_submission(submission)


def seen(images):
    """What the families together see, in words."""
    nets = [net for one in surrogates.values() for net in one]
    sure, guess = ask(nets, images.to(device) / 255).softmax(-1).max(-1)
    return [f"{CLASSES[kind]} {share:.0%}" for kind, share in zip(guess.tolist(), sure.tolist())]


shown = torch.cat([rows[1:2] for rows in of_class])[:5]
before, after = seen(benign[shown]), seen(adversarial[shown])
fig, axes = plt.subplots(3, len(shown), figsize=(4.2, 2.5))
changes = 0.5 + (adversarial[shown].float() - benign[shown].float()) / 16
for line, images in enumerate((benign[shown], changes, adversarial[shown])):
    for axis, image in zip(axes[line], images):
        axis.imshow(image.permute(1, 2, 0), interpolation="bilinear")
        axis.axis("off")
for upper, lower, first, last in zip(axes[0], axes[2], before, after):
    upper.set_title(first, fontsize=8)
    lower.set_title(last, fontsize=8, color="C3")
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
        "simple": [0.865, 0.91667, 0.77667],
        "medium": [0.665, 0.68, 0.52667],
        "strong": [0.28167, 0.3, 0.265],
        "boss": [0.056667, 0.058333, 0.053333],
    },
    "without": {
        "iterate": [0.33667],
        "families": [0.14833],
        "momentum": [0.098333],
        "variety": [0.28167],
    },
}

# %% [markdown] tags=["report"]
# ## Report
#
# **1. What is each idea worth?** On the sample, at boss, each idea was switched off alone (`WITHOUT`).

# %% tags=["report"]
show_worth()

# %% [markdown] tags=["report"]
# Small steps are worth most: one single step, by all six families with all their views, leaves 0.34 of the images
# known instead of 0.06. Then come the views (0.23), six families instead of three (0.09) and momentum (0.04). One
# seed each; the boss's three seeds differ by 0.005.
#
# **2. How were images made that transfer, and what did the judge say (question 1 of the course)?** Below every black box of
# the sample, before and after, without JPEG and behind it; and, for comparison, noise of the same size at random. For
# real data only the course's judge knows; there stands what the families left out say.

# %% tags=["report"]
dice = torch.Generator().manual_seed(SEED)
noise = BOUND * (2 * torch.randint(0, 2, benign.shape, generator=dice) - 1)
versions = {"benign": benign, "random ± 8": (benign + noise).clamp(0, 255).byte(), "attacked": adversarial}
rows = []
if ANSWERS:
    for quality in (None, 75):
        says = {version: judge(images, ANSWERS, quality) for version, images in versions.items()}
        for box in says["benign"]:
            row = {"black box": box, "JPEG": quality or "none"}
            rows.append(row | {version: one[box] for version, one in says.items()})
else:
    for family, score in held_out.items():
        rows.append({"family left out": family, "JPEG": 75, "benign": known[family], "attacked": score})
table(rows)

# %% [markdown] tags=["report"]
# Six families, ten small steps, momentum, and every view zoomed and shifted anew: three strangers that knew 0.99 of the
# images know 0.06, with JPEG and without. Changes of the same size at random cost them nothing: it is the
# *direction* that counts. And the families left out had said 0.05 before anybody asked the judge.
#
# **3. FGSM and JPEG on one image (question 2 of the course).** The source model is the resnet alone, the image
# `dog/dog2.png`. The course asks for "compression rate 70 %" of the package imgaug; there that is a *strength*, and means
# quality 31: $1 + 99\,(1 - 70/101)$.

# %% tags=["report"]
source = surrogates["resnet"][:1]
fgsm = attack("fgsm", source, everything, 1)
row = names.index("dog/dog2.png") if "dog/dog2.png" in names else 0
four = torch.stack([benign[row], fgsm[row], jpeg(fgsm[row][None], 70)[0], jpeg(fgsm[row][None], 31)[0]])
sure, guess = ask(source, four.to(device) / 255).softmax(-1).max(-1)
titles = ["benign", "FGSM", "FGSM, JPEG quality 70", "FGSM, JPEG quality 31"]
titles = [f"{title}\n{CLASSES[kind]} {share:.0%}" for title, kind, share in zip(titles, guess, sure)]
show_images(four, titles, 4, "dog2.jpg", 2.2)

# %% [markdown] tags=["report"]
# After FGSM the source model takes the dog for a ship, and behind JPEG it does not see the dog again: still a ship at
# quality 70, a horse at 31. (With the course's nets and photo, public reports say: a cat after FGSM, a dog again
# after JPEG.) One image proves little, so here are all of them:
#
# **Why does JPEG help (question 3 of the course)?** Left: how often the source model is right on all images, against the quality.
# Right: how much of the change is left after JPEG, by the fineness of its waves (from coarse to fine).


# %% tags=["report"]
def waves(change):
    """Mean size of a change (n, 3, 32, 32), by fineness: in blocks of 8 x 8, as JPEG cuts them."""
    k = torch.arange(8.0)
    cosines = (
        torch.cos(math.pi / 8 * (k + 0.5) * k[:, None]) * (2 - (k[:, None] == 0).float()).sqrt() / 8**0.5
    )
    blocks = change.float().unfold(2, 8, 8).unfold(3, 8, 8)
    size = (cosines @ blocks @ cosines.T).abs().mean((0, 1, 2, 3))  # (8, 8)
    fineness = k[:, None] + k
    return torch.stack([size[fineness == f].mean() for f in range(15)])


qualities = [10, 20, 31, 50, 60, 70, 80, 90, 95]
fig, axes = plt.subplots(1, 2, figsize=(8, 2.6))
for name, images in (("benign", benign), ("FGSM by this model", fgsm), (f"{LEVEL}'s attack", adversarial)):
    right = [accuracy(source, jpeg(images, quality), everything) for quality in qualities]
    axes[0].plot(qualities, right, "o-", label=name)
axes[0].set(xlabel="quality of the JPEG", ylabel="accuracy of the source model")
axes[0].legend(fontsize=8, loc="center right")
axes[1].plot(waves(fgsm.int() - benign.int()), "o-", label="FGSM's change")
for quality in (75, 31):
    left = jpeg(fgsm, quality).int() - jpeg(benign, quality).int()
    axes[1].plot(waves(left), "o-", label=f"after JPEG, quality {quality}")
axes[1].set(xlabel="fineness of the waves: coarse to fine", ylabel="mean size, bytes")
axes[1].legend(fontsize=8)
show("jpeg.png")

# %% [markdown] tags=["report"]
# The answer is b: JPEG **reduces the noise level**. Of the fine waves of the change nearly nothing is left; the coarse ones stay.
# So at quality 31 the source model knows 0.34 of FGSM's images instead of 0.02, and still 0.95 of the benign ones.
# Against the boss's attack it is no help: at no quality are more than 0.08 known.
#
# **4. Does an attack overfit?** I-FGSM by the resnet alone and by three families, step by step: how often is the resnet right,
# and how often the mean of the three families that have not helped?


# %% tags=["report"]
def curve(nets, momentum, variety, asked):
    """Accuracy of the nets `asked` after every second step."""
    start, y = benign[fourth].to(device) / 255, label[fourth].to(device)
    state, scores = dict(x=start.clone(), speed=torch.zeros_like(start)), []
    for step in range(2 * settings["steps"]):
        move(state, start, y, nets, 2 * EPSILON / settings["steps"], momentum, variety)
        if step % 2 == 1:
            images = to_bytes(state["x"], fourth)
            scores.append([np.mean([accuracy(nets, images, fourth) for nets in one]) for one in asked])
    return np.array(scores).T


first = [net for family in list(surrogates)[:3] for net in surrogates[family]]
strangers = [surrogates[family] for family in list(surrogates)[3:]]
ways = {"I-FGSM by the resnet": (source, 0.0, 0.0), "I-FGSM by three": (first, 0.0, 0.0)}
ways |= {"MI-FGSM by three": (first, 1.0, 0.0), "zoomed and shifted, too": (first, 1.0, 1.0)}
fig, axes = plt.subplots(1, 2, figsize=(8, 2.6), sharey=True)
for name, way in ways.items():
    for axis, scores in zip(axes, curve(*way, [[source], strangers])):
        axis.plot(range(2, 2 * len(scores) + 1, 2), scores, "o-", label=name)
axes[0].set(xlabel="steps", ylabel="accuracy", title="resnet, which has helped")
axes[1].set(xlabel="steps", title="the three families that have not")
axes[0].legend(fontsize=8)
show("overfitting.png")

# %% [markdown] tags=["report"]
# The resnet knows nothing any more after six steps, whoever attacks: from what it says one learns nothing. The strangers still
# know 0.83 after twenty steps by the resnet alone, 0.39 by three families, 0.36 with momentum, 0.03 with views.
# So the attack by one net does overfit: it keeps finding what is wrong with that net alone. It does not get
# worse again with more steps; it only stops getting better.

# %% [markdown] tags=["try"]
# ## Try it
#
# Predict what happens before you run it.
#
# 1. `WITHOUT = "variety"`: does the accuracy of the families that *have* helped rise or fall, and that of those left out?
# 2. Turn the attack around: let `move` go downhill on the loss towards the class `ship`. How many of the 200 images do
#    the black boxes then call a ship?
# 3. The defender's turn: which quality of JPEG would you choose, and what does it cost on images that nobody has
#    attacked? Look at the left figure of part 3 first.

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
