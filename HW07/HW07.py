# %% [markdown] tags=["header"]
# # HW07 · BERT: find the answer in the text
#
# <!-- badges -->
# [![Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/ml2022-notebooks/ml2022-spring/blob/main/HW07/HW07.ipynb)
# [![Kaggle](https://kaggle.com/static/images/open-in-kaggle.svg)](https://kaggle.com/kernels/welcome?src=https://github.com/ml2022-notebooks/ml2022-spring/blob/main/HW07/HW07.ipynb)
# <!-- /badges -->
#
# ![A question, its paragraph, and how likely the answer begins and ends at each character](hero)
#
# A paragraph and a question come in, both in Traditional Chinese; out goes the piece of the paragraph that
# answers the question. The lecture's answer is **self-supervised learning**: a BERT first fills gaps in plain
# text, for which nobody has to label anything. A tiny new head on top of it then learns, from few questions, to
# point at two tokens: where the answer starts and where it ends. What the score is made of: what the body has
# read before, and the care around it. Which windows of a long text is it shown, what do these windows teach by
# accident, and how do two lists of scores become one answer?
#
# 輸入一段文章和一個問題（都是繁體中文），輸出文章中回答問題的那一段文字。課程的答案是**自監督學習**：BERT 先在沒有標註的文字上做填空，再加上一個很小的輸出層，用少量的問題學會指出兩個位置：答案從哪裡開始、到哪裡結束。分數的高低，取決於 BERT 先前讀過什麼，以及它以外的細節：長文章要怎麼切成視窗、這些視窗無意間教了模型什麼，以及怎麼把兩串分數變成一個答案。
#
# <!-- box -->
# > **Press *Run all*.** This run is *boss*: expect exact match 0.921 on the sample in about 3 minutes on two CPU cores. GPU: not measured.
# <!-- /box -->
#
# Lectures: [self-supervised learning](https://youtu.be/e422eloJ0W4), [BERT](https://youtu.be/gh0hewYkjgo),
# [facts about BERT](https://youtu.be/ExXA05i8DEQ), [homework](https://youtu.be/Ezgae3YmGqk). The ladder, measured
# on the built-in sample (exact match, higher is better; the mean of three seeds ± half their range), beside the
# course's public baselines on the real data:
#
# <!-- ladder -->
# | level | what it adds | sample | course baseline (real data) | seconds |
# |---|---|---|---|---|
# | simple | a small BERT that filled gaps, windows around the answer, as in the official sample | 0.204 ± 0.033 | 0.45139 | 50 |
# | medium | four times as many epochs, with a rate that falls, and windows that overlap | 0.397 ± 0.013 | 0.65792 | 74 |
# | strong | another pre-training, answers anywhere in the window, start and end sought together | 0.818 ± 0.050 | 0.78136 | 162 |
# | boss | windows without the answer, votes of windows, two nets that learn the validation part in turns | 0.921 ± 0.041 | 0.84388 | 173 |
# <!-- /ladder -->

# %% tags=["parameters"]
# @title Parameters
LEVEL = "boss"  # @param ["boss", "strong", "medium", "simple"]
WITHOUT = ""  # @param {type:"string"}
DATA = "auto"  # @param ["auto", "real", "sample"]
PROFILE = "auto"  # @param ["auto", "full", "small", "tiny"]
SEED = 2022  # @param {type:"integer"}
DATA_DIR = "data/HW07"  # @param {type:"string"}
OUT_DIR = "out/HW07"  # @param {type:"string"}
RESUME = True  # @param {type:"boolean"}
SUBMIT = False  # @param {type:"boolean"}
MODEL = "auto"  # @param {type:"string"}

# %% cellView="form" jupyter={"source_hidden": true} tags=["homework"]
# @title Facts of this homework
HW, METRIC, HIGHER_IS_BETTER = "HW07", "exact match", True
SLUG, JUDGE = "ml2022spring-hw7", "https://www.kaggle.com/competitions/ml2022spring-hw7"
BASELINES = {"simple": 0.45139, "medium": 0.65792, "strong": 0.78136, "boss": 0.84388}
FILES = {name: (f"hw7_{name}.json", 1) for name in ("train", "dev", "test")}
COUNTS = {"train": (10524, 31690), "dev": (1490, 4131), "test": (1586, 4957)}  # paragraphs, questions
MIRRORS = [  # {name here: address} of complete copies
    {"hw7_data.zip": "https://drive.google.com/uc?export=download&id=1AVgZvy3VFeg0fX-6WQJMHPVrx3A-M1kb"},
    {"hw7_data.zip": "https://drive.google.com/uc?export=download&id=1qwjbRjq481lHsnTrrF4OjKQnxzgoLEFR"},
    {"hw7_data.zip": "https://drive.google.com/uc?export=download&id=1QXuWjNRZH6DscSd6QcRER0cnxmpZvijn"},
]
HASHES = set()  # the course published none
OWN = {"MODEL": ()}  # "auto", a model's name on the hub, or a folder that holds one
NEEDS = {name: name for name in ("torch", "numpy", "pandas", "matplotlib", "tqdm", "accelerate", "filelock")}
NEEDS |= {"transformers": "transformers", "tokenizers": "tokenizers"}
MIXED_PRECISION = True
LESS_MEMORY = "set `micro` in SIZES to half"
MODELS = {"simple": "bert-base-chinese", "medium": "bert-base-chinese"}  # of PROFILE full
MODELS |= {"strong": "hfl/chinese-macbert-base", "boss": "hfl/chinese-macbert-large"}

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
# @title The sample: three people a paragraph, and questions about them
ASKED = PROFILE  # "auto" may fall back to a small model when the large one cannot be had
SURNAMES, GIVEN = "王李張劉陳楊黃趙吳周徐孫馬朱胡郭何林高羅", "志明華美玲文傑雅婷豪淑芬俊宏怡君建國偉強"
PLACES = [a + b for a in "東西南北新安永平長和" for b in ("山", "港", "川", "林", "原", "湖")]
FIELDS = ["天文", "數學", "農業", "醫藥", "地質", "音樂", "法律", "建築", "化學", "歷史", "紡織", "氣象"]
KINDS, LATIN = ["學院", "研究所", "公司", "圖書館", "博物館"], ["NTU", "IBM", "NASA", "MIT", "TSMC"]
WORDS = ["春", "秋", "月", "海", "雲", "石", "花", "夜", "雪", "風", "燈", "橋"]
RARE = "龘鱻麤犇羴猋驫麠鸘齉爨籲麢灪韊鑿饢鼉鸞虪"  # too rare for any vocabulary made of the training text
FACTS = {  # how a text tells it, and how a question asks for it
    "year": (
        ["{n}出生於{v}", "{n}在{v}來到世上", "{v}，{n}誕生"],
        ["{n}是哪一年出生的？", "哪一年是{n}的生年？"],
    ),
    "town": (["{n}來自{v}", "{n}的家鄉是{v}", "{v}是{n}的故鄉"], ["{n}是哪裡人？", "{n}在何處長大？"]),
    "field": (
        ["{n}專攻{v}", "{n}鑽研{v}多年", "{v}是{n}的專長"],
        ["{n}精通哪一門學問？", "哪個領域由{n}研究？"],
    ),
    "place": (
        ["{n}任職於{v}", "{n}在{v}工作", "{v}聘請了{n}"],
        ["{n}在哪個機構上班？", "{n}服務於哪個單位？"],
    ),
    "book": (
        ["{n}寫了{v}", "{n}的著作是{v}", "{v}由{n}寫成"],
        ["{n}出版過哪本書？", "哪一部作品出自{n}之手？"],
    ),
    "money": (
        ["{n}捐出{v}", "{n}獲得獎金{v}", "{v}歸{n}所有"],
        ["{n}有多少錢？", "屬於{n}的金額是多少？"],
    ),
}
FILLERS = ["當地的氣候十分溫和", "那一年的冬天特別冷", "附近的居民都還記得", "後來的事情沒有人知道"]
FILLERS += ["這段往事流傳至今", "消息很快傳開了"]
HEARD = dict(
    zip("出生來自家鄉專攻任職工作寫著作捐獲得年特別後知", "初聲賴字加香磚公認直功做血住做娟或的念特別厚之")
)


def pick_one(dice, values):
    return values[int(dice.integers(len(values)))]


def value_of(fact, dice):
    """What is told of a person: the answer of a question."""
    town = pick_one(dice, PLACES) + pick_one(dice, ["縣", "市", "村"])
    if fact == "year":
        return f"{dice.integers(1600, 2000)}年"
    if fact == "town":
        return town
    if fact == "field":
        return f"{pick_one(dice, FIELDS)}學"
    if fact == "place":
        owner = town if dice.random() < 0.7 else pick_one(dice, LATIN)
        return f"{owner}{pick_one(dice, FIELDS)}{pick_one(dice, KINDS)}"
    if fact == "book":
        title = "".join(pick_one(dice, WORDS) for _ in range(2))
        if dice.random() < 0.3:
            title += pick_one(dice, RARE)
        return f"《{title}》"
    return f"{dice.integers(1, 100)},{dice.integers(0, 1000):03}元"


def write_paragraph(dice, people):
    """[(text, key)]: the parts of a paragraph; the key (name, fact) marks the answer to a question."""
    parts = []
    surnames = dice.permutation(list(SURNAMES))[:people]
    given = dice.permutation(list(GIVEN))[:people]
    for name in (a + b for a, b in zip(surnames, given)):
        for fact in dice.permutation(list(FACTS))[:3].tolist():
            if dice.random() < 0.2:
                parts.append((pick_one(dice, FILLERS) + "，", None))
            before, after = pick_one(dice, FACTS[fact][0]).format(n=name, v="\t").split("\t")
            stop = "，" if dice.random() < 0.6 else "。"
            parts += [(before, None), (value_of(fact, dice), (name, fact)), (after + stop, None)]
    return parts


def heard(parts, dice):
    """As a speech recogniser writes it: no punctuation, some characters sound alike; answers stay."""
    changed = []
    for text, key in parts:
        if key is None:
            letters = [HEARD.get(one, one) if dice.random() < 0.05 else one for one in text]
            text = "".join(letters).replace("，", "").replace("。", "")
        changed.append((text, key))
    return changed


def ask_three(parts, dice):
    """[(question, key)] of three different facts."""
    keys = [key for _, key in parts if key]
    chosen = [keys[k] for k in dice.permutation(len(keys))[:3]]
    return [(pick_one(dice, FACTS[fact][1]).format(n=name), (name, fact)) for name, fact in chosen]


def add(data, parts, asked):
    """A paragraph and its questions in the course's layout."""
    for question, wanted in asked:
        at = 0
        for text, key in parts:
            if key == wanted:
                break
            at += len(text)
        row = {"id": len(data["questions"]), "paragraph_id": len(data["paragraphs"])}
        row |= {"question_text": question, "answer_text": text}
        data["questions"].append(row | {"answer_start": at, "answer_end": at + len(text) - 1})
    data["paragraphs"].append("".join(text for text, _ in parts))


def make_sample(folder, answers):
    """The course's three files. Of the test, the last part is only heard; its answers lie elsewhere."""
    counts, people = {"train": 640, "dev": 120, "test": 400}, 3
    if PROFILE == "tiny":  # there the kind of an answer tells it: seconds must do to learn something
        counts, people = {"train": 100, "dev": 20, "test": 40}, 1
    for number, (name, count) in enumerate(counts.items()):
        dice, data, copies = np.random.default_rng([2022, number]), {"questions": [], "paragraphs": []}, []
        for k in range(count):
            parts = write_paragraph(dice, people)
            asked = ask_three(parts, dice)
            if name == "test" and k >= 0.7 * count:
                parts = heard(parts, dice)
            elif name != "test" and dice.random() < 0.25:
                copies.append((heard(parts, dice), asked))
            add(data, parts, asked)
        for parts, asked in copies:
            add(data, parts, asked)
        if name == "test":
            hidden = [row["answer_text"] for row in data["questions"]]
            (answers / "answers.json").write_text(json.dumps(hidden, ensure_ascii=False), encoding="utf-8")
            for row in data["questions"]:
                null = "null" if row["paragraph_id"] >= 0.7 * count else None  # as in the real file
                row |= {"answer_text": null, "answer_start": null, "answer_end": null}
        text = json.dumps(data, ensure_ascii=False, indent=1)
        (folder / f"hw7_{name}.json").write_text(text, encoding="utf-8")


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
# @title Read and check the texts; find the model and its tokenizer
from collections import Counter

import transformers
from huggingface_hub import constants, snapshot_download
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoModelForQuestionAnswering, AutoTokenizer, PreTrainedTokenizerFast

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
KEYS = {"id": int, "paragraph_id": int, "question_text": str}
LIMIT = 30  # tokens of the longest answer: of 4,131 in the course's dev part 11 have more characters


def read_json(path):
    """The object in a file of UTF-8 text; what is wrong is said with its line."""
    fix = "fetch the file again, or mend that line"
    data = path.read_bytes()
    try:
        found = json.loads(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise Stop(f"{path}, line {line}: it is not UTF-8 ({error.reason}); {fix}.") from None
    except json.JSONDecodeError as error:
        raise Stop(f"{path}, line {error.lineno}, column {error.colno}: {error.msg}; {fix}.") from None
    good = isinstance(found, dict) and {"questions", "paragraphs"} <= found.keys()
    if not good or not found["questions"] or not all(isinstance(one, str) for one in found["paragraphs"]):
        raise Stop(f"{path} must be an object with questions and paragraphs (texts); {fix}.")
    return found


def fault_of(row, paragraphs, seen, answered):
    """What is wrong with a question, or None."""
    for key, kind in KEYS.items():
        if not isinstance(row, dict) or type(row.get(key)) is not kind:
            return f"it has no {key} of kind {kind.__name__}"
    if row["id"] in seen:
        return "its id occurs twice"
    if not 0 <= row["paragraph_id"] < len(paragraphs):
        return f"paragraph_id {row['paragraph_id']} is none of 0 to {len(paragraphs) - 1}"
    if not row["question_text"].strip() or not paragraphs[row["paragraph_id"]].strip():
        return "its question or its paragraph is empty"
    if answered:
        start, end, text = row.get("answer_start"), row.get("answer_end"), row.get("answer_text")
        if type(start) is not int or type(end) is not int or not text or start < 0:
            return "it has no answer_text with whole answer_start and answer_end"
        if paragraphs[row["paragraph_id"]][start : end + 1] != text:
            return f"its answer {text!r} is not at {start} to {end} of paragraph {row['paragraph_id']}"
    return None


def read_part(name):
    """(paragraphs, questions) of a part. Bad questions are left out; of the test none may be."""
    path, answered = PATHS[name][0], name != "test"
    data = read_json(path)
    good, bad, seen = [], {}, set()
    for number, row in enumerate(data["questions"]):
        why = fault_of(row, data["paragraphs"], seen, answered)
        if why is None:
            good.append(row)
            seen.add(row["id"])
        else:
            bad[row.get("id", f"number {number}") if isinstance(row, dict) else number] = why
    for key, why in list(bad.items())[:3]:
        say(f"{path.name}, id {key}: {why}; left out ({len(bad)} of {len(data['questions'])} questions are)")
    if bad and (not answered or 20 * len(bad) > len(data["questions"])):
        key, why = next(iter(bad.items()))
        raise Stop(f"{path}, id {key}: {why}. Mend that question or fetch the file again.")
    counts = (len(data["paragraphs"]), len(data["questions"]))
    if REAL and counts != COUNTS[name]:
        say(f"{path.name} has {counts} paragraphs and questions, the course's {COUNTS[name]}: used as it is")
    return data["paragraphs"], good


def load_model(place):
    """(tokenizer, net, what was lacking) from a folder, or by its name from the hub into the cache."""
    how = dict(cache_dir=f"{DATA_DIR}-models")
    words = AutoTokenizer.from_pretrained(place, use_fast=True, **how)
    return words, *AutoModelForQuestionAnswering.from_pretrained(place, output_loading_info=True, **how)


def fetch_model(name):
    """(tokenizer, net) from a folder, the cache or the hub; what is not to be had ends in a sentence."""
    place, is_folder = name, Path(name).is_dir()
    try:
        with accelerator.main_process_first():
            try:
                if not is_folder:  # as a folder the cache is asked without a network
                    place = snapshot_download(name, cache_dir=f"{DATA_DIR}-models", local_files_only=True)
                words, net, info = load_model(place)
            except (OSError, ValueError):
                if is_folder:
                    raise
                say(f"fetching the model {name}")
                POOL.submit(ring, constants.ENDPOINT).result(10)
                words, net, info = load_model(name)
    except Exception as error:
        why = " ".join(str(error).split())[:200] or type(error).__name__
        raise Stop(f"The model {name!r} cannot be had: {why}. {OR}") from None
    lacking = [key for key in info["missing_keys"] if not key.startswith("qa_outputs")]
    if lacking or not words.is_fast or words.mask_token is None:
        raise Stop(f"The model {name!r} lacks {lacking[:2] or 'a fast tokenizer'}: take another one. {OR}")
    return words, net.float()


OR = "Look at the name and the network. A folder that holds a model will do, too (MODEL = its path),"
OR += " or a small BERT that is made here (MODEL = 'auto' with PROFILE = 'small')."


def own_tokenizer(texts):
    """One token a character: those that the texts have five times, and every digit and Latin letter."""
    counts = Counter("".join(texts).lower())
    known = [one for one in sorted(counts, key=lambda one: (-counts[one], one)) if counts[one] >= 5]
    inside = "0123456789abcdefghijklmnopqrstuvwxyz"
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *inside, *known]
    words += [
        f"##{one}" for one in {**dict.fromkeys(inside), **dict.fromkeys(known)} if not "一" <= one <= "鿿"
    ]
    words = [one for one in dict.fromkeys(words) if one.strip()]
    text = Tokenizer(models.WordPiece({one: k for k, one in enumerate(words)}, unk_token="[UNK]"))
    text.normalizer = normalizers.BertNormalizer(lowercase=True)
    text.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    text.decoder = decoders.WordPiece()
    names = {f"{one}_token": f"[{one.upper()}]" for one in ("pad", "unk", "cls", "sep", "mask")}
    return PreTrainedTokenizerFast(tokenizer_object=text, **names)


def encode(texts):
    """All tokens in one row: (tokens, character offsets (tokens, 2), first token and size of each text)"""
    fast = tokenizer.backend_tokenizer
    fast.no_truncation()
    fast.no_padding()
    found = fast.encode_batch(texts, add_special_tokens=False)
    size = torch.tensor([len(one.ids) for one in found])
    tokens = torch.tensor([k for one in found for k in one.ids])
    offsets = torch.tensor([pair for one in found for pair in one.offsets]).view(-1, 2)
    return tokens, offsets, size.cumsum(0) - size, size


def answer_tokens(row, offsets):
    """Characters -> first and last token of the answer; blanks at its ends belong to no token."""
    first = int(torch.searchsorted(offsets[:, 1].contiguous(), row["answer_start"], right=True))
    last = int(torch.searchsorted(offsets[:, 0].contiguous(), row["answer_end"], right=True)) - 1
    return first, last


def make_corpus(*parts):
    """Parts [(paragraphs, questions)] as tensors of tokens."""
    one, shift = types.SimpleNamespace(paragraphs=[], rows=[]), 0
    for paragraphs, rows in parts:
        one.paragraphs += paragraphs
        one.rows += [row | {"paragraph_id": row["paragraph_id"] + shift} for row in rows]
        shift += len(paragraphs)
    texts = one.paragraphs + [row["question_text"] for row in one.rows]
    one.tokens, one.offsets, first, size = encode(texts)
    one.p_first, one.q_first = first.split([shift, len(one.rows)])
    one.p_size, one.q_size = size.split([shift, len(one.rows)])
    one.owner = torch.tensor([row["paragraph_id"] for row in one.rows])
    if (one.p_size[one.owner] == 0).any():
        raise Stop("A paragraph that is asked about holds no text at all: fetch the data again.")
    return one


given = {name: read_part(name) for name in FILES}
NAMED = "" if MODEL == "auto" else os.path.expanduser(MODEL)
if PROFILE == "full" and not NAMED:
    NAMED = MODELS["medium" if "pretrain" in OFF else LEVEL]
if NAMED:
    try:
        tokenizer, _ = fetch_model(NAMED)
    except Stop as reason:
        if ASKED != "auto" or MODEL != "auto":
            raise
        NAMED, PROFILE = "", "small"
        say(f"{reason} PROFILE is now small.")
if not NAMED:
    train_texts = given["train"][0] + [row["question_text"] for row in given["train"][1]]
    tokenizer = own_tokenizer(train_texts)
known, test = make_corpus(given["train"], given["dev"]), make_corpus(given["test"])
spans = [
    answer_tokens(row, known.offsets[known.p_first[k] :][: known.p_size[k]])
    for row, k in zip(known.rows, known.owner.tolist())
]
if not given["train"][1] or not given["dev"][1]:
    raise Stop(f"{PATHS['train'][0].parent}: training and dev must have questions, each file one at least.")
known.first, known.last = torch.tensor(spans).T
test_id = [row["id"] for row in test.rows]
usable = (known.first <= known.last) & (known.last - known.first < LIMIT)
if not usable.all():
    say(f"{int((~usable).sum())} answers have no token or more than {LIMIT}: not learned")
is_dev = torch.arange(len(known.rows)) >= len(given["train"][1])
given_train, given_dev = (~is_dev & usable).nonzero()[:, 0], is_dev.nonzero()[:, 0]
meanings = {
    "known.tokens": (known.tokens, "all texts of training and dev, in one row"),
    "known.p_first, p_size": (known.p_first, "where each paragraph lies in that row"),
    "known.q_first, q_size": (known.q_first, "where each question lies in it"),
    "known.owner": (known.owner, "the paragraph of each question"),
    "known.first, last": (known.first, "the answer: tokens, counted from the paragraph's first"),
    "given_train": (given_train, "the questions of the training part"),
    "given_dev": (given_dev, "and those of the dev part"),
    "test.owner": (test.owner, "the same for the test part, without answers"),
}
table([{"name": name, "shape": tuple(one.shape), "meaning": what} for name, (one, what) in meanings.items()])

# %% [markdown]
# ## The data
#
# Each file holds paragraphs and questions. An answer is a piece of its paragraph, given by the positions of its
# first and its last character: `text[start : end + 1]`. Some paragraphs are copies, with the same questions: what
# a speech recogniser heard, with wrong characters of the same sound and little punctuation. BERT reads a few hundred
# tokens at most, and its time grows faster than the text: most paragraphs are longer than what it is shown. They
# are read through **windows**.


# %%
def heard_copies(corpus):
    """Which paragraphs are copies: all their questions were asked about an earlier one, too."""
    frame = pd.DataFrame({"paragraph": corpus.owner.numpy()})
    frame["text"] = [row["question_text"] for row in corpus.rows]
    first = frame.groupby("text")["paragraph"].transform("min")
    again = (first < frame["paragraph"]).groupby(frame["paragraph"]).all()
    found = torch.zeros(len(corpus.paragraphs), dtype=torch.bool)
    found[torch.tensor(again.index[again].to_numpy())] = True
    return found


examples = []
for number in (int(given_train[0]), int(given_train[1]), int(given_dev[-1])):
    row = known.rows[number]
    text, start = known.paragraphs[row["paragraph_id"]], row["answer_start"]
    around = (
        f"…{text[max(0, start - 12) : start]}【{row['answer_text']}】{text[row['answer_end'] + 1 :][:12]}…"
    )
    examples.append({"question": row["question_text"], "the answer, where it stands": around})
table(examples)
spoken = heard_copies(known)
plt.figure(figsize=(8, 2.4))
for name, some in (("written", ~spoken), ("heard", spoken)):
    plt.hist(known.p_size[some].numpy(), bins=30, alpha=0.6, label=f"{name}: {int(some.sum())}")
plt.xlabel("tokens of a paragraph")
plt.ylabel("paragraphs")
plt.legend()
show("lengths.png")

# %% [markdown]
# ## Validation: no text on both sides
#
# Many questions occur twice: about a written paragraph and about what was heard of it. A split that tears such a
# pair apart tests what was learned by heart. So paragraphs that share a question form a **group**, and a group is
# never divided. Up to *strong* the dev part is the validation. The boss learns it, too: two nets learn half of
# the groups each, and each net is checked on the half that it has not seen.


# %%
def groups_of(corpus, rows):
    """A number for each question; those with a common paragraph or text, in any chain, have the same."""
    frame = pd.DataFrame({"paragraph": corpus.owner[rows].numpy()})
    frame["text"] = [corpus.rows[k]["question_text"] for k in rows.tolist()]
    group = frame["paragraph"]
    while True:
        joined = group.groupby(frame["text"]).transform("min")
        joined = joined.groupby(frame["paragraph"]).transform("min")
        if joined.equals(group):
            return torch.tensor(group.to_numpy())
        group = joined


def make_splits(nets):
    """Pairs of question rows: to learn from, to check on."""
    if nets == 1:
        return [(given_train, given_dev)]
    names, group = groups_of(known, given_dev).unique(return_inverse=True)
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(SEED))
    hand = order[group] % nets
    splits = []
    for k in range(nets):
        more = given_dev[hand != k]
        splits.append((torch.cat([given_train, more[usable[more]]]), given_dev[hand == k]))
    return splits


table([{"nets": k, "learn": len(make_splits(k)[0][0]), "check": len(make_splits(k)[0][1])} for k in (1, 2)])

# %% [markdown]
# ## Simple: a body that has read, a head that points (0.20)
#
# **The body** is a BERT. With `PROFILE = "full"` it comes from the hub and has read the Chinese Wikipedia. In
# `small` it is made here, of two or three layers, and reads the training texts: some tokens are hidden behind
# `[MASK]`, and it has to say which they were. No label is needed for that.
#
# **The head** is one linear layer: each token gets a score as the start of the answer and one as its end,
#
# $$P(\text{start} = i) = \text{softmax}_i(w_s \cdot h_i), \qquad P(\text{end} = j) = \text{softmax}_j(w_e \cdot h_j).$$
#
# What it reads is `[CLS] question [SEP] window [SEP]`. All texts lie in one long row of tokens, so a whole batch
# is gathered in one stroke, padded to its longest.

# %%
from transformers import BertConfig, BertForMaskedLM, BertForQuestionAnswering

CLS, SEP, PAD, MASK = tokenizer.convert_tokens_to_ids(
    [tokenizer.cls_token, tokenizer.sep_token, tokenizer.pad_token, tokenizer.mask_token]
)


def pack(tokens, head, head_size, body, body_size):
    """[CLS] head [SEP] body [SEP] of a batch; heads and bodies begin at these places of `tokens`."""
    size = (head_size + body_size + 3)[:, None]  # (batch, 1)
    at = torch.arange(-(-int(size.max()) // 8) * 8)[None]  # (1, longest)
    middle = head_size[:, None] + 1  # where the first [SEP] stands
    in_head, in_body = (at >= 1) & (at < middle), (at > middle) & (at < size - 1)
    place = torch.where(in_head, head[:, None] + at - 1, body[:, None] + at - middle - 1)
    ids = tokens[place.clamp(0, len(tokens) - 1)].where(in_head | in_body, SEP)
    ids = ids.where(at < size, PAD)
    ids[:, 0] = CLS
    return {
        "input_ids": ids,
        "attention_mask": (at < size).long(),
        "token_type_ids": ((at > middle) & (at < size)).long(),
    }


def question_of(corpus, rows):
    """First token and size of the questions; of one that is too long the end counts: there it asks."""
    size = corpus.q_size[rows].clamp(max=settings["question"])
    return corpus.q_first[rows] + corpus.q_size[rows] - size, size


# %% [markdown]
# A net so small, and so little text, need three aids that a large one can do without: first weights that are not
# tiny; positions that begin as waves, so that neighbours look alike from the start; and queries that begin equal
# to the keys, so that a token looks first at tokens like itself.


# %%
def small_config():
    hidden = settings["hidden"]
    return BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        num_hidden_layers=settings["layers"],
        num_attention_heads=4,
        intermediate_size=2 * hidden,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.08,
        pad_token_id=PAD,
    )


def new_net(kind):
    """A small BERT with the head of this kind, and first weights that let equal tokens find each other."""
    net = kind(small_config())
    embeddings = net.bert.embeddings
    place = embeddings.position_embeddings.weight.data  # (512, hidden)
    pace = 10000 ** -(torch.arange(0, place.shape[1], 2) / place.shape[1])
    angle = torch.arange(len(place))[:, None] * pace
    place.copy_(0.04 * torch.cat([angle.sin(), angle.cos()], 1))
    embeddings.token_type_embeddings.weight.data.mul_(0.3)
    for layer in net.bert.encoder.layer:
        attention = layer.attention.self
        attention.key.weight.data.mul_(2.0)
        attention.query.weight.data.copy_(attention.key.weight.data)
    return net


def hide(packed, share):
    """Labels for `share` of the tokens of question and window, which [MASK] replaces."""
    ids = packed["input_ids"]
    special = (ids == CLS) | (ids == SEP) | (ids == PAD)
    hidden = (torch.rand(ids.shape) < share) & ~special
    return packed | {"labels": ids.where(hidden, -100), "input_ids": ids.masked_fill(hidden, MASK)}


# %% [markdown]
# **The windows to learn from**, in the official sample: the answer in the middle. Remember that. **And how an
# answer is read off**: the likeliest start, the likeliest end, each for itself; of all windows of a
# paragraph the one whose two scores have the largest sum. An end before the start is taken to be the start. The
# text itself is cut out of the paragraph by the tokens' **offsets**. To spell it from the tokens, as the official
# sample does, would lose rare characters, capitals and blanks.


# %%
def centred(corpus, rows, width):
    """Where the window of each question begins, in tokens of its paragraph."""
    size = corpus.p_size[corpus.owner[rows]]
    middle = (corpus.first[rows] + corpus.last[rows]) // 2
    return (middle - width // 2).minimum(size - width).clamp(min=0)


def separate(start, end):
    """Scores (windows, width) -> score, first and last token of each window's span, each (windows, 1)"""
    (best_start, first), (best_end, last) = start.max(1), end.max(1)
    last = torch.maximum(first, last.minimum(first + LIMIT - 1))
    return (best_start + best_end)[:, None], first[:, None], last[:, None]


def cut(corpus, number, first, last):
    """The characters from token `first` to token `last` of the paragraph."""
    at = corpus.p_first[corpus.owner[number]]
    begin, end = corpus.offsets[at + first][0], corpus.offsets[at + last][1]
    return corpus.paragraphs[corpus.owner[number]][begin:end]


def bare_text(text):
    """What is compared and handed in: without commas, as the judge has it, and in one line."""
    return text.replace(",", "").replace("\r", "").replace("\n", "")


# %% [markdown]
# ## Medium: longer, a rate that falls, windows that overlap (+0.19)
#
# A constant rate never lets the weights come to rest. So it rises for the first tenth of the steps, which
# spares the body a shock by the new head, and then falls to zero in a line. And windows that lie side by side cut
# answers, and show others at the very edge: now each window begins in the middle of the one before. `ask` reads
# them all, and keeps the scores of `[CLS]` and of the window's tokens: nothing else can be an answer.
#
# Which of this pays? On the sample mostly the length, four epochs in place of one. With a constant rate *medium*
# has .404 and .405, with windows side by side .362 and .372, in place of .393 and .387 (two seeds).


# %%
def factor(step, steps, decay):
    """The rate of a step as a share of the highest one."""
    if not decay:
        return 1.0
    rise = max(1, steps // 10)
    return min((step + 1) / rise, (steps - step) / (steps - rise + 1))


def windows_of(corpus, rows):
    """All windows of these questions: (question, first token in the paragraph, size), sorted by size."""
    step = max(1, round(settings["width"] * (1 - settings["overlap"])))
    found = []
    for row, size in zip(rows.tolist(), corpus.p_size[corpus.owner[rows]].tolist()):
        for begin in range(0, max(1, size - settings["width"] + step), step):
            found.append((row, begin, min(settings["width"], size - begin)))
    found = torch.tensor(found)
    return found[(found[:, 2] + corpus.q_size[found[:, 0]]).argsort(stable=True)]


@torch.no_grad()
def ask(net, corpus, windows):
    """Scores (2, windows, 1 + width): start and end, of [CLS] and of the window's tokens."""
    net.eval()
    found = []
    with accelerator.split_between_processes(torch.arange(len(windows)), apply_padding=True) as mine:
        for part in mine.split(128):
            row, begin, size = windows[part].T
            head, head_size = question_of(corpus, row)
            packed = pack(corpus.tokens, head, head_size, corpus.p_first[corpus.owner[row]] + begin, size)
            out = net(**{name: one.to(device) for name, one in packed.items()})
            both = torch.stack([out.start_logits, out.end_logits]).float().cpu()  # (2, batch, longest)
            at = torch.arange(settings["width"])[None]
            place = torch.where(at < size[:, None], head_size[:, None] + 2 + at, 0)
            place = torch.cat([torch.zeros(len(part), 1, dtype=torch.long), place], 1)
            scores = both.gather(2, place.expand(2, -1, -1))
            scores[:, :, 1:].masked_fill_(at >= size[:, None], -1e4)
            found.append(scores.transpose(0, 1))
    found = accelerator.gather(torch.cat(found).to(device))[: len(windows)]
    return found.transpose(0, 1).cpu()


# %% [markdown]
# ## Strong: what the windows teach, what the body has read, and one search (+0.42)
#
# **The answer lies anywhere.** A window around the answer teaches that answers are in the middle, whatever the
# question. So the window begins at any place from which the whole answer is seen, drawn anew in every epoch.


# %%
def between(low, high):
    """Whole numbers from `low` to `high`, both included, each equally likely."""
    return low + (torch.rand(len(low)) * (high - low + 1)).long().minimum(high - low)


def anywhere(corpus, rows, width):
    """As `centred`, but each place that shows the whole answer is equally likely."""
    low = (corpus.last[rows] - width + 1).clamp(min=0)
    high = corpus.first[rows].minimum((corpus.p_size[corpus.owner[rows]] - width).clamp(min=0))
    return between(low, high)


asked = given_train[known.p_size[known.owner[given_train]] > 48]
middle = (known.first[asked] + known.last[asked]) / 2
plt.figure(figsize=(8, 2.2))
for rule in (centred, anywhere):
    place = middle - rule(known, asked, 48)
    plt.hist(place.numpy(), bins=48, range=(0, 48), alpha=0.6, label=rule.__name__)
plt.xlabel("place of the answer in its window of 48 tokens")
plt.ylabel("questions")
plt.legend()
show("positions.png")

# %% [markdown]
# What is left of the middle comes from the ends of a paragraph: nothing lies beyond them.
#
# **Another pre-training.** Gaps can be filled from their neighbours. But a question is answered by finding, in
# another text, the place that speaks of the same thing. So this body learns to find: a piece of the window takes
# the place of the question, and the net points at where it came from. Seven of ten pieces have a gap of one to
# five tokens: then the net points at what fills it. Start and end are known without any label, and a question is
# a gap in other words. On the hub this rung is a body that was trained in another way, too: MacBERT hides words
# behind similar words instead of `[MASK]`.
#
# **One search for both ends.** The best pair is sought among those that can be an answer: the end is not before
# the start, and at most 29 tokens behind it,
#
# $$(\hat\imath, \hat\jmath) = \arg\max_{i \le j < i + 30} \; s_i + e_j .$$
#
# A bracket that stands right outside while its partner is inside is taken in.
#
# Half of the step is the pre-training: *strong* with filled gaps has .565 and .577 in place of .761 and .862 (two
# seeds). The other half is the rest, and a third layer.


# %%
def reading_batch(corpus, rows, how, step):
    """Random windows of the paragraphs of these questions: with gaps to fill, or with a piece to find."""
    rows = rows[torch.randint(len(rows), (settings["batch_size"],))]
    whole = corpus.p_size[corpus.owner[rows]]
    size = whole.clamp(max=settings["width"])
    body = corpus.p_first[corpus.owner[rows]] + between(torch.zeros_like(size), whole - size)
    if how == "masked":
        head, head_size = question_of(corpus, rows)
        return hide(pack(corpus.tokens, head, head_size, body, size), 0.15)
    head_size = torch.randint(6, 15, (len(rows),)).minimum(size)
    head = between(body, body + size - head_size)
    packed = pack(corpus.tokens, head, head_size, body, size)
    no_gap = torch.rand(len(rows)) < 0.3
    gap_size = head_size.where(no_gap, torch.randint(1, 6, (len(rows),)).minimum(head_size))
    gap = between(torch.ones_like(size), head_size - gap_size + 1)  # its place behind [CLS]
    at = torch.arange(packed["input_ids"].shape[1])[None] - gap[:, None]
    inside = (at >= 0) & (at < gap_size[:, None]) & ~no_gap[:, None]
    packed["input_ids"].masked_fill_(inside, MASK)
    packed["start_positions"] = head_size + 1 + head - body + gap
    packed["end_positions"] = packed["start_positions"] + gap_size - 1
    return packed


PAIRS = ["《》", "「」", "『』", "（）", "()", "【】", "〈〉", "“”"]


def jointly(start, end, top):
    """Scores (windows, width) -> the `top` best possible spans of each window."""
    pair = start[:, :, None] + end[:, None, :]  # (windows, width, width)
    possible = torch.ones_like(pair[0]).triu().tril(LIMIT - 1).bool()
    best, place = pair.masked_fill(~possible, -1e9).flatten(1).topk(min(top, pair[0].numel()))
    return best, place // start.shape[1], place % start.shape[1]


def with_brackets(text, answer):
    """The answer, longer by a bracket that stands directly beside it in the text."""
    for left, right in PAIRS:
        if answer.count(left) > answer.count(right) and answer + right in text:
            answer += right
        if answer.count(right) > answer.count(left) and left + answer in text:
            answer = left + answer
    return answer


# %% [markdown]
# ## Boss: windows that say "not here", votes, two nets (+0.10)
#
# So far every window of the training held an answer. In the test most windows hold none, and their best scores
# are noise that may be large. Now a share of the windows is drawn **blindly**; where the answer is not inside,
# start and end are `[CLS]`: "not here". With that, the probabilities of different windows can be compared. And the
# same span seen in two windows gets **both their votes**:
#
# $$\text{score}(i, j) = \sum_{\text{windows}} P(\text{start} = i)\, P(\text{end} = j).$$
#
# Two nets learn different halves of the dev part; the mean of their log-probabilities is what votes. Taken away one
# by one, none of these shows more than the luck of a seed (see the report); together they are the step.


# %%
def question_batch(corpus, order, step):
    """The questions of this step, each with a window and the places of its answer."""
    rows = order[step * settings["batch_size"] :][: settings["batch_size"]]
    whole = corpus.p_size[corpus.owner[rows]]
    size = whole.clamp(max=settings["width"])
    rule = anywhere if settings["position"] == "anywhere" else centred
    begin = rule(corpus, rows, settings["width"])
    blind = between(torch.zeros_like(size), whole - size)
    begin = blind.where(torch.rand(len(rows)) < settings["blind"], begin)
    head, head_size = question_of(corpus, rows)
    packed = pack(corpus.tokens, head, head_size, corpus.p_first[corpus.owner[rows]] + begin, size)
    seen = (corpus.first[rows] >= begin) & (corpus.last[rows] < begin + size)
    shift = head_size + 2 - begin
    packed["start_positions"] = (corpus.first[rows] + shift).where(seen, 0)
    packed["end_positions"] = (corpus.last[rows] + shift).where(seen, 0)
    return packed


def vote(question, first, last, score, together):
    """Candidates of all windows -> {question: (first, last)}; `together`: equal spans add their scores."""
    spans, inverse = np.unique(np.stack([question, first, last], 1), axis=0, return_inverse=True)
    total = np.full(len(spans), 0.0 if together else -np.inf)
    if together:
        np.add.at(total, inverse.reshape(-1), np.exp(score))
    else:
        np.maximum.at(total, inverse.reshape(-1), score)
    order = np.lexsort((total, spans[:, 0]))
    best = order[np.flatnonzero(np.diff(spans[order, 0], append=-1))]  # the last one of each question
    return {int(spans[k, 0]): (int(spans[k, 1]), int(spans[k, 2])) for k in best}


# %% [markdown]
# ## The levels
#
# A row an idea; each can be switched off alone.

# %% tags=["levels"]
# fmt: off
LEVELS = {       # simple      medium      strong      boss
    "decay":    (False,      True,       True,       True),        # the rate rises, then falls to zero
    "overlap":  (0.0,        0.5,        0.5,        0.5),         # of a window, shared with the next one
    "position": ("centred",  "centred",  "anywhere", "anywhere"),  # of the answer in its window
    "pretrain": ("masked",   "masked",   "matching", "matching"),  # what the body has read, and how
    "decode":   ("separate", "separate", "joint",    "joint"),     # how start and end are sought
    "blind":    (0.0,        0.0,        0.0,        0.4),         # windows drawn without the answer in mind
    "nets":     (1,          1,          1,          2),           # two: each learns half of the dev part
}
SIZES = {
    "small": {
        "layers":     (2,    2,    3,    3),
        "hidden":     (64,   64,   64,   64),
        "width":      (40,   40,   48,   48),    # tokens of a window
        "question":   (40,   40,   60,   60),    # tokens of a question, at most
        "steps":      (300,  300,  1000, 1000),   # of the pre-training
        "epochs":     (1,    4,    4,    4),
        "most_steps": (1500, 1500, 1500, 1500),  # however many questions there are
        "batch_size": (32,   32,   32,   32),
        "micro":      (32,   32,   32,   32),    # sequences at a time
        "rate":       (2e-3, 2e-3, 2e-3, 2e-3),
    },
    "full": {
        "width":      (150,  150,  384,  449),
        "question":   (40,   40,   60,   60),
        "epochs":     (1,    1,    2,    2),
        "most_steps": (10**6, 10**6, 10**6, 10**6),
        "batch_size": (32,   32,   32,   32),
        "micro":      (32,   32,   16,   8),
        "rate":       (1e-4, 1e-4, 3e-5, 1.5e-5),
    },
}
# fmt: on
settings = choose(LEVELS, SIZES)


# %% [markdown]
# `find_answers` makes, of the scores of all windows, one answer a question.


# %%
def find_spans(windows, scores, decode, together):
    """{question: its span}; `together`: windows vote with probabilities, else the best score wins."""
    if together:
        scores = scores.log_softmax(-1)
    parts = []
    for part in torch.arange(len(windows)).split(128):
        start, end = scores[:, part, 1:]
        score, first, last = jointly(start, end, 5) if decode == "joint" else separate(start, end)
        row, begin, size = (one[:, None].expand_as(first) for one in windows[part].T)
        first, last = first.minimum(size - 1), last.minimum(size - 1)
        parts.append(torch.stack([row, begin + first, begin + last, score.double()], -1).flatten(0, 1))
    found = torch.cat(parts).numpy()  # (candidates, 4)
    return vote(*found[:, :3].T.astype(int), found[:, 3], together)


def find_answers(corpus, windows, scores):
    """{question: its answer} by the rules of this level."""
    spans = find_spans(windows, scores, settings["decode"], settings["blind"] > 0)
    texts = {row: cut(corpus, row, *span) for row, span in spans.items()}
    if settings["decode"] == "joint":
        for row, text in texts.items():
            texts[row] = with_brackets(corpus.paragraphs[corpus.owner[row]], text)
    return texts


def is_right(row, text):
    """Right to the character, as the course counts."""
    return bare_text(text) == bare_text(known.rows[row]["answer_text"])


def exact_match(texts):
    return float(np.mean([is_right(row, text) for row, text in texts.items()]))


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
# One loop for both, reading and answering. Where memory is small, a batch is split and its gradients are summed.


# %% tags=["train"]
def share_of(batch, first):
    """`micro` sequences of a batch; of several processes each takes its share."""
    mine = slice(accelerator.process_index, None, accelerator.num_processes)
    return {name: one[first : first + settings["micro"]][mine].to(device) for name, one in batch.items()}


def make_log(stage, net, step, steps, loss, tic, windows):
    """What is noted of a quarter of the steps; with windows to check, their exact match, too."""
    log = dict(stage=stage, step=step, loss=float(loss))
    log["examples_per_second"] = steps // 4 * settings["batch_size"] / (time.perf_counter() - tic)
    if windows is not None:
        log["valid"] = exact_match(find_answers(known, windows, ask(net, known, windows)))
    valid = f", exact match {log['valid']:.3f}" if "valid" in log else ""
    if 2 * step >= steps and step % (steps // 2) == 0:
        say(f"{stage}, step {step} of {steps}: loss {loss:.3f}{valid}")
    history.append(log)


def train(stage, net, steps, rate, decay, batch_of, depends, windows=None):
    """Teach a net `steps` batches; it is saved, and its answers to `windows` are checked, four times."""
    net, quarter = net.to(device), max(1, steps // 4)
    optimizer = torch.optim.AdamW(net.parameters(), lr=rate, weight_decay=0.01)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: factor(step, steps, decay))
    net, optimizer = accelerator.prepare(net, optimizer)
    parts = dict(model=net, optimizer=optimizer, scheduler=scheduler)
    done = load_checkpoint(stage, [train, batch_of, net, steps, rate, decay, *depends], **parts)
    total, tic = torch.zeros((), device=device), time.perf_counter()
    for step in tqdm(range(done + 1, steps + 1), stage, disable=QUIET, leave=False):
        net.train()
        batch = batch_of(step - 1)
        for first in range(0, settings["batch_size"], settings["micro"]):
            loss = net(**share_of(batch, first)).loss * settings["micro"] / settings["batch_size"]
            accelerator.backward(loss)
            total += loss.detach() / quarter
        accelerator.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        if step % quarter == 0:
            make_log(stage, net, step, steps, total, tic, windows)
            save_checkpoint(stage, step, **parts)
            total, tic = torch.zeros((), device=device), time.perf_counter()
    return accelerator.unwrap_model(net)


# %% [markdown]
# First the body reads, then each net learns to answer, starting from that body. A net is asked as soon as it has
# learned: about the questions that it was not shown, and about the test.

# %%
READING_RATE = 3e-3


def read_texts(stage, how):
    """The body that pre-training leaves, as a dictionary of weights."""
    batch_of = functools.partial(reading_batch, known, given_train, how)
    kind = BertForMaskedLM if how == "masked" else BertForQuestionAnswering
    reader = train(stage, new_net(kind), settings["steps"] // 4 * 4, READING_RATE, True, batch_of, [])
    body = {name: one.cpu() for name, one in reader.bert.state_dict().items()}
    accelerator.free_memory()
    return body


def make_net(body):
    """A net that points: the model of that name, or a small one with this body."""
    if NAMED:
        return fetch_model(NAMED)[1]
    net = new_net(BertForQuestionAnswering)
    if body:
        net.bert.load_state_dict(body)
    return net


def learn_to_answer(stage, body, learn, check, epochs):
    """A net that has learned the questions `learn`; 200 of `check` show how far it is."""
    steps = min(epochs * len(learn) // settings["batch_size"], settings["most_steps"]) // 4 * 4
    dice = torch.Generator().manual_seed(SEED)
    order = torch.cat([learn[torch.randperm(len(learn), generator=dice)] for _ in range(epochs)])
    batch_of = functools.partial(question_batch, known, order)
    recipe = (settings["rate"], settings["decay"], batch_of, [NAMED, body])
    return train(stage, make_net(body), steps, *recipe, windows_of(known, check[:200]))


body, checked, test_scores, held_out = None, [], [], {}
if not NAMED:
    body = read_texts("reading", settings["pretrain"])
test_windows = windows_of(test, torch.arange(len(test.rows)))
for number, (learn, check) in enumerate(make_splits(settings["nets"])):
    net = learn_to_answer(f"net-{number}", body, learn, check, settings["epochs"])
    windows = windows_of(known, check)
    checked.append((windows, ask(net, known, windows)))
    held_out |= find_answers(known, *checked[-1])
    test_scores.append(ask(net, test, test_windows))
    parameters = sum(weight.numel() for weight in net.parameters())
    accelerator.free_memory()

# %% [markdown]
# ## Prediction and submission
#
# How it went, and what comes out. The nets' scores are averaged before spans are sought: they agree on a span, not
# on two halves of one.

# %% tags=["predict"]
scores = torch.stack(test_scores).mean(0)  # (2, windows, 1 + width)
if not scores.isfinite().all():
    raise Stop(f"The training diverged (a score is infinite): lower `rate` of {LEVEL} in SIZES.")
fig, axes = plt.subplots(1, 2, figsize=(8, 2.4))
for stage in dict.fromkeys(point["stage"] for point in history):
    curve = [point for point in history if point["stage"] == stage]
    steps = [point["step"] for point in curve]
    axes[0].plot(steps, [point["loss"] for point in curve], "o-", label=stage)
    if "valid" in curve[0]:
        axes[1].plot(steps, [point["valid"] for point in curve], "o-", label=stage)
axes[0].set(xlabel="step", ylabel="loss")
axes[1].set(xlabel="step", ylabel="exact match, unseen questions")
axes[0].legend(fontsize=8)
show("curves.png")

answers = find_answers(test, test_windows, scores)
answers = [bare_text(answers[row]) for row in range(len(test.rows))]
summary = dict(valid_score=exact_match(held_out), parameters=parameters * len(checked))
speeds = [point["examples_per_second"] for point in history if "valid" in point]
summary["examples_per_second"] = float(np.median(speeds))
shown = list(range(len(answers)))[:: max(1, len(answers) // 4)]
table([{"question": test.rows[k]["question_text"], "answer": answers[k]} for k in shown[:4]])

# %% cellView="form" jupyter={"source_hidden": true} tags=["submission"]
# @title The submission file, and the picture of the header
from matplotlib import font_manager

submission = OUT / ("result.csv" if REAL else "result.sample.csv")


def write_submission(path):
    with aside(path) as part, part.open("w", encoding="utf-8", newline="") as file:
        file.write("ID,Answer\n")
        file.writelines(f"{one},{text}\n" for one, text in zip(test_id, answers))


def is_answer(text):
    return bool(text.strip()) and not set(text) & set(",\r")


def check_submission(path):
    check_table(path, "ID,Answer", test_id, is_answer, "an answer without commas")
    lines = path.read_text(encoding="utf-8").split("\n")[1:-1]
    for line, row in zip(lines, test.rows):
        if line.partition(",")[2] not in bare_text(test.paragraphs[row["paragraph_id"]]):
            raise Stop(f"{path}: the answer of id {row['id']} is no piece of its paragraph")


def score_submission(path, answers):
    """The judge: the share of answers that are equal, commas aside."""
    truth = json.loads((answers / "answers.json").read_text(encoding="utf-8"))
    lines = path.read_text(encoding="utf-8").split("\n")[1:-1]
    right = [line.partition(",")[2] == bare_text(text) for line, text in zip(lines, truth)]
    return np.mean(right)


def draw_answer(row):
    """A test paragraph with how likely the answer starts (blue) and ends (orange) at each character."""
    text, first = test.paragraphs[test.owner[row]], test.p_first[test.owner[row]]
    start, end = np.zeros(len(text)), np.zeros(len(text))
    chance = scores.softmax(-1)
    for k in (test_windows[:, 0] == row).nonzero()[:, 0].tolist():
        begin, size = test_windows[k, 1:].tolist()
        for token in range(size):
            left, right = test.offsets[first + begin + token].tolist()
            start[left:right] = np.maximum(start[left:right], float(chance[0, k, 1 + token]))
            end[left:right] = np.maximum(end[left:right], float(chance[1, k, 1 + token]))
    wide = 36
    fig, axis = plt.subplots(figsize=(8, 2.6))
    for k, one in enumerate(text[: 6 * wide]):
        x, y = k % wide, k // wide
        axis.add_patch(plt.Rectangle((x, y + 0.75), 1, -0.75 * start[k], color="C0", alpha=0.5, lw=0))
        axis.add_patch(plt.Rectangle((x, y + 0.75), 1, -0.75 * end[k], color="C1", alpha=0.5, lw=0))
        axis.text(x + 0.5, y + 0.5, one, ha="center", va="center", fontsize=11)
    axis.set(xlim=(0, wide), ylim=(min(6, -(-len(text) // wide)) + 0.1, -0.2))
    axis.set_title(f"{test.rows[row]['question_text']}  →  {answers[row]}", fontsize=13)
    axis.axis("off")


if MAIN:
    write_submission(submission)
fonts = [font.name for font in font_manager.fontManager.ttflist if "CJK" in font.name or "Hei" in font.name]
if fonts:  # a machine without Chinese letters draws no picture of them
    with plt.rc_context({"font.sans-serif": [fonts[0], "DejaVu Sans"]}):
        draw_answer(0)
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
        "simple": [0.18417, 0.18167, 0.2475],
        "medium": [0.3925, 0.38667, 0.41333],
        "strong": [0.76083, 0.86167, 0.83],
        "boss": [0.94833, 0.94667, 0.86667],
    },
    "without": {
        "decay": [0.8975, 0.92833, 0.80083],
        "overlap": [0.8675, 0.88, 0.81083],
        "position": [0.92917, 0.92167, 0.73083],
        "pretrain": [0.57083],
        "decode": [0.94167, 0.9425, 0.83833],
        "blind": [0.815, 0.90417, 0.87917],
        "nets": [0.935, 0.93583, 0.81333],
    },
}

# %% [markdown] tags=["report"]
# ## Report
#
# **1. What is each idea worth?** On the sample, at boss, each idea was switched off alone (`WITHOUT`).

# %% tags=["report"]
show_worth()

# %% [markdown] tags=["report"]
# **The pre-training carries the boss**: with a body that filled gaps it has .571 in place of .921. All other bars are
# shorter than twice what a seed does: a body finds out late how to find (its loss falls after step 600), and one
# of the three seeds ends eight points below the others. So of the other ideas this sample can only say that none
# of them is worth more than a seed's luck.
#
# **2. From scores to an answer (question 1 of the course).** The same scores of the same nets on unseen questions,
# read off by other rules. The official one comes first; each line adds one rule.


# %% tags=["report"]
def spelled(row, first, last):
    """The answer as the official sample writes it: tokens put together, blanks out."""
    at = known.p_first[known.owner[row]]
    return tokenizer.decode(known.tokens[at + first : at + last + 1].tolist()).replace(" ", "")


def read_off(decode, together, text_of):
    spans = {}
    for windows, scores in checked:
        spans |= find_spans(windows, scores, decode, together)
    return {row: text_of(row, *span) for row, span in spans.items()}


def cut_known(row, *span):
    return cut(known, row, *span)


def cut_with_brackets(row, *span):
    return with_brackets(known.paragraphs[known.owner[row]], cut(known, row, *span))


rules = {
    "likeliest start, likeliest end, spelled from tokens": ("separate", False, spelled),
    "cut out of the text by offsets": ("separate", False, cut_known),
    "the best possible pair": ("joint", False, cut_known),
    "windows vote with probabilities": ("joint", True, cut_known),
    "brackets completed": ("joint", True, cut_with_brackets),
}
rows, before = [], {}
for name, rule in rules.items():
    now = read_off(*rule)
    changed = sum(now[row] != before.get(row, now[row]) for row in now)
    rows.append({"rule": name, "exact match": exact_match(now), "answers changed": changed})
    before = now
table(rows)

# %% [markdown] tags=["report"]
# To cut the answer out of the text, and to seek the best pair that is possible, are worth some points each on the
# same scores; the votes change most answers and gain least, and no bracket was lost here.
#
# **3. Another pre-training (question 2 of the course).** The same net learns the same questions after three kinds
# of childhood: none, filling gaps, and pointing at what fills them.

# %% tags=["report"]
if NAMED:
    say(f"Set MODEL to another model's name and compare: here it is {NAMED}.")
else:
    learn, check = given_train, given_dev
    bodies = {"nothing": None, "masked": read_texts("reading-masked", "masked")}
    bodies["matching"] = (
        body if settings["pretrain"] == "matching" else read_texts("reading-again", "matching")
    )
    plt.figure(figsize=(8, 2.4))
    for how, childhood in bodies.items():
        stage = f"after {how}"
        learn_to_answer(stage, childhood, learn, check, max(1, settings["epochs"] // 2))
        accelerator.free_memory()
        curve = [point for point in history if point["stage"] == stage]
        plt.plot([p["step"] for p in curve], [p["valid"] for p in curve], "o-", label=how)
    plt.xlabel("step of the fine-tuning")
    plt.ylabel("exact match, unseen")
    plt.legend(title="pre-training")
    show("pretraining.png")

# %% [markdown] tags=["report"]
# All three have the same number of weights, and learn the same questions in the same order, half as long as the
# boss. To have filled gaps helps no more than to have read nothing (.37 and .44): neighbours are enough for a
# gap, and a question needs another text. To have looked for a piece and its gap makes it .80.
#
# **4. Which questions are hard?** Unseen questions again.

# %% tags=["report"]
tokens_of = {row: int(known.last[row] - known.first[row] + 1) for row in held_out}
kinds = {
    "written": [row for row in held_out if not spoken[known.owner[row]]],
    "heard": [row for row in held_out if spoken[known.owner[row]]],
    "answer of 1 to 3 tokens": [row for row in held_out if tokens_of[row] <= 3],
    "of 4 to 6": [row for row in held_out if 4 <= tokens_of[row] <= 6],
    "longer": [row for row in held_out if tokens_of[row] > 6],
}
rows = []
for name, some in kinds.items():
    if some:
        right = exact_match({row: held_out[row] for row in some})
        rows.append({"questions": name, "how many": len(some), "exact match": right})
table(rows)

# %% [markdown] tags=["report"]
# None of these kinds: heard or written, short or long, they lie about a point apart, and a point is one or two
# questions.

# %% [markdown] tags=["try"]
# ## Try it
#
# Predict what happens before you run it.
#
# 1. `WITHOUT = "position"`: how does the picture of the places change, and which answers of the test are lost?
# 2. Set `blind` of boss to 0.9. What does the net say of most windows, and why may that still give good answers?
# 3. Seven of ten pieces have a gap (`< 0.3` in `reading_batch`). Give none of them one, then all. Which is learned
#    faster, and which helps more with the questions?

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
