# %% [markdown] tags=["header"]
# # HW05 · Machine translation: from English to Traditional Chinese
#
# <!-- badges -->
# [![Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/ml2022-notebooks/ml2022-spring/blob/main/HW05/HW05.ipynb)
# [![Kaggle](https://kaggle.com/static/images/open-in-kaggle.svg)](https://kaggle.com/kernels/welcome?src=https://github.com/ml2022-notebooks/ml2022-spring/blob/main/HW05/HW05.ipynb)
# <!-- /badges -->
#
# ![An English sentence, its translation by this notebook, and which word looked at which](hero)
#
# A sentence comes in, a sentence of another length and order goes out. The lecture's answer is the
# **Transformer**: an encoder reads the English sentence, a decoder writes the Chinese one token by token, and
# **attention** lets every token that is written look at every token that was read. Here it is written out on
# a page. And as there are never enough translated sentences, the boss makes some: it learns the way back from
# Chinese to English, translates plain Chinese text with it, and learns from what comes out
# (**back-translation**).
#
# 輸入一句英文，輸出一句中文；兩句的長度與語序都不同。課程的答案是 **Transformer**：編碼器讀完英文句子，解碼器逐一寫出中文，而**注意力**讓每個要寫的詞都能看到每個讀過的詞。這份筆記本把它完整寫在一頁之內。翻譯好的句子永遠不夠，所以最後一級自己造：先學會從中文譯回英文，拿它去翻譯大量的中文單語句子，再從譯出來的句對學習，這就是**回譯**。
#
# <!-- box -->
# > **Press *Run all*.** This run is *boss*: expect BLEU 92.7 on the sample in about 2 minutes on two CPU cores. GPU: not measured.
# <!-- /box -->
#
# Lectures: [Transformer, part 1](https://youtu.be/n9TlOhRjYoc), [part 2](https://youtu.be/N6aRv06iv2g),
# [homework](https://youtu.be/f8ahfk2T0kE). The ladder, measured on the built-in sample (BLEU, higher is better;
# the mean of three seeds ± half their range), beside the course's public baselines on the real data:
#
# <!-- ladder -->
# | level | what it adds | sample | course baseline (real data) | seconds |
# |---|---|---|---|---|
# | simple | a recurrent net with attention, as the official sample has it | 41.4 ± 4.9 | 14.58 | 20 |
# | medium | twice as many epochs, at a higher rate that rises first and then falls | 66.4 ± 2.4 | 18.04 | 31 |
# | strong | the Transformer | 79.0 ± 0.6 | 25.2 | 52 |
# | boss | back-translation of Chinese text that nobody translated | 92.7 ± 0.8 | 29.13 | 110 |
# <!-- /ladder -->

# %% tags=["parameters"]
# @title Parameters
LEVEL = "boss"  # @param ["boss", "strong", "medium", "simple"]
WITHOUT = ""  # @param {type:"string"}
DATA = "auto"  # @param ["auto", "real", "sample"]
PROFILE = "auto"  # @param ["auto", "full", "small", "tiny"]
SEED = 2022  # @param {type:"integer"}
DATA_DIR = "data/HW05"  # @param {type:"string"}
OUT_DIR = "out/HW05"  # @param {type:"string"}
RESUME = True  # @param {type:"boolean"}
SUBMIT = False  # @param {type:"boolean"}
PUNCT = "as learned"  # @param ["as learned", "full", "half"]

# %% cellView="form" jupyter={"source_hidden": true} tags=["homework"]
# @title Facts of this homework
HW, METRIC, HIGHER_IS_BETTER = "HW05", "BLEU", True
SLUG, JUDGE = "", "https://ml.ee.ntu.edu.tw/hw5/"
BASELINES = {"simple": 14.58, "medium": 18.04, "strong": 25.20, "boss": 29.13}
FILES = {  # one of each, in the course's archives or taken out of them
    "raw.en": ("raw.en", 1),
    "raw.zh": ("raw.zh", 1),
    "test.en": ("test.en", 1),
    "mono.zh": ("ted_zh_corpus.deduped", 1),
}
PAIRS, TEST_LINES = 398066, 4000  # of the course's data
MIRRORS = [  # {name here: address} of complete copies
    {
        "ted2020.tgz": f"{place}/ted2020.tgz",
        "test.tgz": f"{place}/test.tgz",
        "ted_zh_corpus.deduped.gz": f"{place}/ted_zh_corpus.deduped.gz",
    }
    for place in (
        "https://github.com/yuhsinchan/ML2022-HW5Dataset/releases/download/v1.0.2",
        "https://github.com/Aaricis/Hung-yi-Lee-ML2022/releases/download/v0.1",
    )
]
HASHES = set()  # the course published none
OWN = {"PUNCT": ("as learned", "full", "half")}  # which marks the submission has: ，or ,
NEEDS = {name: name for name in ("torch", "numpy", "pandas", "matplotlib", "tqdm", "accelerate", "filelock")}
NEEDS |= {"sentencepiece": "sentencepiece", "sacrebleu": "sacrebleu"}
MIXED_PRECISION = True
LESS_MEMORY = "set tokens in SIZES to half"

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
# @title The sample: a small language and its translation
NOUNS = """book=書=本, pen=筆=枝, car=汽車=輛, cup=杯子=個, knife=刀子=把, umbrella=雨傘=把, chair=椅子=張,
map=地圖=張, photo=照片=張, letter=信=封, picture=圖畫=幅, song=歌=首, poem=詩=首, film=電影=部, camera=相機=台,
computer=電腦=台, radio=收音機=台, bicycle=腳踏車=輛, train=火車=列, ship=船=艘, plane=飛機=架, piano=鋼琴=架,
guitar=吉他=把, drum=鼓=面, mirror=鏡子=面, flag=旗子=面, door=門=扇, window=窗戶=扇, lamp=燈=盞, clock=鐘=座,
bridge=橋=座, mountain=山=座, tower=塔=座, house=房子=棟, shop=商店=家, hotel=旅館=家, tree=樹=棵, flower=花=朵,
apple=蘋果=顆, egg=雞蛋=顆, ball=球=顆, star=星星=顆, horse=馬=匹, cow=牛=頭, pig=豬=頭, dog=狗=隻, cat=貓=隻,
bird=鳥=隻, duck=鴨子=隻, fish=魚=條, snake=蛇=條, river=河=條, road=路=條, rope=繩子=條, towel=毛巾=條,
shirt=襯衫=件, coat=外套=件, gift=禮物=份, newspaper=報紙=份, cake=蛋糕=塊, stone=石頭=塊, blanket=毯子=床,
key=鑰匙=把, table=桌子=張"""
VERBS = """see=saw=seeing=看見/看到/瞧見/目睹, find=found=finding=找到/發現/尋獲/覓得, buy=bought=buying=買/購買/選購/採購,
sell=sold=selling=賣/出售/販賣/變賣, draw=drew=drawing=畫/描繪/繪製/勾勒, carry=carried=carrying=搬/攜帶/扛/運送,
wash=washed=washing=洗/清洗/刷洗/沖洗, remember=remembered=remembering=記得/想起/記住/惦記,
choose=chose=choosing=選/挑選/選擇/選定, borrow=borrowed=borrowing=借/借用/租借/商借"""
ADJECTIVES = """big=大/巨大/龐大, small=小/迷你/細小, old=舊/老/古老, new=新/嶄新/全新, beautiful=漂亮/美麗/好看,
expensive=昂貴/貴/高價, cheap=便宜/廉價/平價, heavy=重/沉重/厚重, clean=乾淨/整潔/潔淨, strange=奇怪/古怪/怪異,
famous=有名/著名/知名, red=紅色/鮮紅/紅"""
PERSONS = """I=我, you=你, he=他, she=她, we=我們, they=他們, my mother=我媽媽, his father=他爸爸, the teacher=老師,
the doctor=醫生, our neighbour=我們的鄰居, the students=學生們, Tom=Tom, Mary=Mary, Tom Smith=Tom Smith"""
PLACES = """at school=在學校, in the park=在公園, at home=在家裡, in the library=在圖書館, at the station=在車站,
in the kitchen=在廚房, at the market=在市場, on the street=在街上, in the office=在辦公室, in the garden=在花園"""
TIMES = {
    "past": "yesterday=昨天, last week=上個星期, this morning=今天早上, two days ago=兩天前, last year=去年",
    "future": "tomorrow=明天, next week=下個星期, tonight=今天晚上, next year=明年, this weekend=這個週末",
    "now": "now=現在, at the moment=此刻, today=今天",
}
NUMBERS = "two=兩, three=三, four=四, five=五, six=六, seven=七, eight=八, nine=九, ten=十"
OWNERS = "my=我的, your=你的, his=他的, her=她的, our=我們的, their=他們的"
LINKS = "but=但是, and=而且, because=因為"
PLURAL = ("you", "we", "they", "the students")


@functools.cache
def rows_of(text):
    return [tuple(part.strip() for part in one.split("=")) for one in text.replace("\n", " ").split(",")]


class Speaker:
    """Draws pairs of sentences. Which near-synonym goes with which noun is a habit, not a rule."""

    def __init__(self, dice, nouns=64, verbs=10, adjectives=12, plain=False):
        habits = np.random.default_rng(2022)
        self.dice, self.plain = dice, plain  # plain: short sentences only
        self.nouns, self.verbs = rows_of(NOUNS)[:nouns], rows_of(VERBS)[:verbs]
        self.adjectives = rows_of(ADJECTIVES)[:adjectives]
        self.of_verb = habits.integers(4, size=(10, 64))
        self.of_adjective = habits.integers(3, size=(12, 64))
        often = np.arange(1, nouns + 1) ** -0.3
        self.often = often / often.sum()

    def one_of(self, text):
        rows = rows_of(text)
        return rows[self.dice.integers(len(rows))]

    def chance(self, share):
        return self.dice.random() < share

    def verb(self, verb, noun):
        return self.verbs[verb][3].split("/")[self.of_verb[verb, noun]]

    def thing(self, noun):
        """two old books = 兩本舊書"""
        english, chinese, measure = self.nouns[noun]
        if self.chance(0.5):
            k = self.dice.integers(len(self.adjectives))
            word, synonyms = self.adjectives[k]
            near = synonyms.split("/")[self.of_adjective[k, noun]]
            english, chinese = f"{word} {english}", f"{near}{'的' if len(near) > 1 else ''}{chinese}"
        kind = self.dice.random()
        if kind < 0.35:
            number, sign = self.one_of(NUMBERS)
            return f"{number} {english}s", f"{sign}{measure}{chinese}"
        if kind < 0.6:
            which, sign = self.one_of("this=這, that=那")
            return f"{which} {english}", f"{sign}{measure}{chinese}"
        if kind < 0.8:
            return f"{'an' if english[0] in 'aeiou' else 'a'} {english}", f"一{measure}{chinese}"
        owner, sign = self.one_of(OWNERS)
        return f"{owner} {english}", f"{sign}{chinese}"

    def clause(self, short=False):
        """English ends with the time, Chinese begins with it; the place stands before the verb."""
        tense = ("past", "future", "now")[self.dice.choice(3, p=[0.5, 0.3, 0.2])]
        who, person = self.one_of(PERSONS)
        verb, noun = self.dice.integers(len(self.verbs)), self.dice.choice(len(self.nouns), p=self.often)
        base, past, ing, _ = self.verbs[verb]
        what, thing = self.thing(noun)
        if self.chance(0.06) and not short:
            english, chinese, measure = self.nouns[noun]
            other, another = self.one_of(PERSONS)
            what = f"the {english} that {other} {past}"
            thing = f"{another}{self.verb(verb, noun)}的那{measure}{chinese}"
            verb = self.dice.integers(len(self.verbs))
            base, past, ing, _ = self.verbs[verb]
        where = place = when = time = ""
        if self.chance(0.35) and not short:
            where, place = self.one_of(PLACES)
        if self.chance(0.6) and not short:
            when, time = self.one_of(TIMES[tense])
        no, ask = self.chance(0.2), self.chance(0.15) and not short
        be = "am" if who == "I" else "are" if who in PLURAL else "is"
        help_verb, form = {"past": ("did", base), "future": ("will", base), "now": (be, ing)}[tense]
        middle = [help_verb, who] if ask else [who, help_verb]
        if no:
            middle.append("not")
        if tense == "past" and not (ask or no):
            middle, form = [who], past
        english = " ".join([*middle, form, what, where, when]).split()
        aspect = {
            "past": "沒有" if no else "",
            "future": "不會" if no else "會",
            "now": "沒有在" if no else "正在",
        }
        before = aspect[tense]
        if tense == "now" and place:
            before = before[:-1]  # 正在 + 在公園 = 正在公園
        done = "了" if tense == "past" and not no else ""
        return " ".join(english), f"{time}{person}{before}{place}{self.verb(verb, noun)}{done}{thing}", ask

    def sentence(self):
        english, chinese, ask = self.clause(self.plain)
        if self.chance(0.12) and not self.plain:
            link, sign = self.one_of(LINKS)
            more, other, _ = self.clause(short=True)
            english, chinese = f"{english}, {link} {more}", f"{chinese}，{sign}{other}"
        english = english[0].upper() + english[1:] + ("?" if ask else ".")
        return english, chinese + ("嗎？" if ask else "。")


def spoil(pairs, dice):
    """What real subtitles have: wrong neighbours, noises, half-width marks, dashes, repetitions, gaps."""
    rows = []
    for k, (english, chinese) in enumerate(pairs):
        kind = dice.random()
        if kind < 0.01:
            chinese = pairs[k - 1][1]
        elif kind < 0.03:
            english, chinese = f"(Applause) {english}", f"（掌聲）{chinese}"
        elif kind < 0.13:
            chinese = chinese.replace("，", ",").replace("？", "?")
        elif kind < 0.15:
            english, chinese = f"- {english}", f"- {chinese}"
        rows += [(english, chinese)] * (2 if kind > 0.99 else 1)
    rows[len(rows) // 3] = (rows[len(rows) // 3][0], "")
    return rows[: len(pairs)]


def make_sample(folder, answers):
    """The course's files; the translations of the test part lie elsewhere."""
    counts, some = {"raw": 1100, "mono": 5000, "test": 300}, {}
    if PROFILE == "tiny":
        counts, some = {"raw": 220, "mono": 300, "test": 60}, dict(nouns=4, verbs=2, adjectives=1, plain=True)
    parts, seen = {}, set()
    for number, (part, count) in enumerate(counts.items()):
        speaker, parts[part] = Speaker(np.random.default_rng([2022, number]), **some), {}
        while len(parts[part]) < count:
            english, chinese = speaker.sentence()
            if not seen & {english, chinese}:
                parts[part][english] = chinese
        seen |= {*parts[part], *parts[part].values()}
    dice = np.random.default_rng(2022)
    raw = spoil([*parts["raw"].items()], dice)
    mono = [*parts["mono"].values()]
    mono += [raw[k][1] for k in dice.choice(len(raw), len(raw) // 3, replace=False) if raw[k][1]]
    (folder / "test").mkdir()
    test = parts["test"]
    files = {"raw.en": [one for one, _ in raw], "raw.zh": [one for _, one in raw], "test/test.en": test}
    files |= {"test/test.zh": ["。"] * len(test), "ted_zh_corpus.deduped": mono}
    for name, lines in files.items():
        (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    (answers / "test.zh").write_text("\n".join(test.values()) + "\n", encoding="utf-8")


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
# @title Read and check the text
import math, unicodedata
from collections import Counter
import sacrebleu, sentencepiece

pd.options.display.max_colwidth = 120
TRADITIONAL = ["Noto Sans CJK TC", "Noto Sans CJK JP", "Noto Sans TC", "Microsoft JhengHei", "PingFang TC"]
TRADITIONAL += ["Heiti TC", "Noto Serif CJK TC", "Noto Serif CJK JP", "AR PL UMing TW", "WenQuanYi Zen Hei"]
fonts = plt.matplotlib.font_manager.get_font_names()
CHINESE_FONT = next((name for name in TRADITIONAL if name in fonts), None)  # none: pictures show numbers
if CHINESE_FONT:
    plt.rcParams["font.family"] = [*plt.rcParams["font.family"], CHINESE_FONT]


def read_lines(path):
    """The lines of a text file. Only a line feed ends one: all other breaks stand inside a sentence."""
    data = path.read_bytes()
    if data.startswith(b"\xef\xbb\xbf"):
        say(f"{path.name}, line 1 begins with a byte order mark: taken off")
        data = data[3:]
    try:
        lines = data.decode().split("\n")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        why = f"{path}, line {line} is not UTF-8 (byte 0x{data[error.start]:02x})"
        raise Stop(f"{why}: save the file as UTF-8, or delete it and fetch it again.") from None
    if not lines[-1]:
        lines.pop()
    if not lines:
        raise Stop(f"{path} is empty: delete it and fetch it again.")
    returns = [k for k, line in enumerate(lines, 1) if line.endswith("\r")]
    if returns:
        say(f"{path.name}, line {returns[0]} ends with CR LF ({len(returns)} lines do): the CR is taken off")
    lines = [line.strip() for line in lines]
    empty = [k for k, line in enumerate(lines, 1) if not line]
    if empty:
        fate = "answered with 。" if name == "test.en" else "left out, its partner too"
        say(f"{path.name}, line {empty[0]} is empty ({len(empty)} lines are): {fate}")
    return lines


def pack(rows):
    """Lists of tokens -> all of them in one tensor, and the size of each."""
    flat = torch.tensor([token for row in rows for token in row], dtype=torch.int32)
    return flat, torch.tensor([len(row) for row in rows])


def pad(lines, rows):
    """Some of the packed lines -> (rows, longest), filled up with PAD."""
    flat, size = lines
    place = torch.arange(int(size[rows].max()))
    where = (size.cumsum(0) - size)[rows][:, None] + place
    return torch.where(place < size[rows][:, None], flat[where.clamp(max=len(flat) - 1)], PAD).long()


def bleu(texts, references, tokenize="zh"):
    return sacrebleu.corpus_bleu(texts, [references], tokenize=tokenize).score


given = {}
for name, (path, *_) in PATHS.items():
    given[name] = read_lines(path)
if len(given["raw.en"]) != len(given["raw.zh"]):
    counts = " and ".join(f"{PATHS[name][0]} has {len(given[name])} lines" for name in ("raw.en", "raw.zh"))
    raise Stop(f"{counts}: line k of one translates line k of the other, so fetch both of them again.")
if REAL and PROFILE == "tiny":
    given = {name: lines if name == "test.en" else lines[:400] for name, lines in given.items()}
if REAL and len(given["test.en"]) != TEST_LINES:
    count = len(given["test.en"])
    say(f"test.en has {count} lines, the course's has {TEST_LINES}: another edition, used as it is")
rows = zip(given, ("English, to learn from", "its translations", "English, to translate", "Chinese alone"))
rows = [
    {"name": name, "lines": len(given[name]), "what": what, "line 2": given[name][1]} for name, what in rows
]
table(rows)

# %% [markdown]
# ## The data
#
# Line $k$ of `raw.en` and line $k$ of `raw.zh` are translations of each other; `test.en` waits for its own, and
# `ted_zh_corpus.deduped` has Chinese sentences that nobody translated. Chinese writes no spaces, so its lines
# are counted in characters.

# %%
lengths = {"English words": [len(line.split()) for line in given["raw.en"]]}
lengths["Chinese characters"] = [len(line) for line in given["raw.zh"]]
longest = max(5, int(np.percentile(lengths["Chinese characters"], 99)))
plt.figure(figsize=(8, 2))
plt.hist([*lengths.values()], bins=range(longest), label=[*lengths])
plt.xlabel("length of a line")
plt.ylabel("lines")
plt.legend()
show("lengths.png")
table([{"English": given["raw.en"][k], "Chinese": given["raw.zh"][k]} for k in range(5)])

# %% [markdown]
# Subtitles are not clean. The same comma comes as `，` and as `,`, a speaker's dash stands before the sentence,
# (Applause) behind it, and some lines have got the wrong neighbour. So both sides are brought to **one form**
# (Unicode's NFKC makes `，` a `,` and `Ａ` an `A`), and what is no translation is left out. English is written
# small; a dash becomes a space, or *twenty-one* would be *twentyone*. Chinese loses its spaces, but not those
# between two Latin words, and a name keeps its capital: the judge sees it.
#
# What is translated has to be written in *some* form, and the judge counts `,` for `，` as a wrong sign. The marks
# of the submission are those that most of the given translations have; `PUNCT` can say otherwise. (The course's
# own judge took half-width marks: `PUNCT = "half"`.)


# %%
def tidy(text):
    """One form of each sign, nothing invisible, no (applause), no dash of a speaker."""
    text = unicodedata.normalize("NFKC", text)
    text = "".join(sign for sign in text if unicodedata.category(sign) != "Cf")
    text = re.sub(r"\([^()]*\)|https?://[!-~]+|♪", " ", text)
    return re.sub(r"^[\s\-–—]+", "", text)


def clean_en(text):
    text = tidy(text).lower().replace("’", "'")
    return " ".join(re.sub(r"[-–—]", " ", text).split())


def clean_zh(text):
    return re.sub(r"(?<![!-~])\s+|\s+(?![!-~])", "", tidy(text))


def fits(english, chinese):
    """Can one be the translation of the other?"""
    words, signs = len(english.split()), len(chinese)
    return 0 < words <= 200 and 0 < signs <= 400 and signs <= 9 * words and words <= 9 * signs


both = zip(map(clean_en, given["raw.en"]), map(clean_zh, given["raw.zh"]), given["raw.zh"])
pairs = list(dict.fromkeys((en, zh, raw) for en, zh, raw in both if fits(en, zh) and en != zh))
if len(pairs) < 100:
    raise Stop(f"{PATHS['raw.en'][0]} has {len(pairs)} usable pairs: too few to learn from, fetch it again.")
say(f"{len(pairs)} of {len(given['raw.en'])} pairs are usable and different from each other")
WIDE = dict(zip(",?!:;()", "，？！：；（）"))
BETWEEN = re.compile(r"(?<![0-9A-Za-z])[,?!:;()]|[,?!:;()](?![0-9A-Za-z])")  # 1,000 and 10:30 stay


def learn_marks(lines):
    """{half-width mark: full-width mark} for those that are to be written so."""
    text = "\n".join(lines)
    half = Counter(BETWEEN.findall(text))
    usual = {mark: wide for mark, wide in WIDE.items() if text.count(wide) >= half[mark]}
    return {"as learned": usual, "full": WIDE, "half": {}}[PUNCT]


def write_zh(text):
    """A translation as it is handed in: never empty, with the marks of the judge."""
    text = clean_zh(text) or "。"
    return BETWEEN.sub(lambda mark: marks.get(mark[0], mark[0]), text)


marks = learn_marks(given["raw.zh"])
say(f"marks that are written full-width: {' '.join(marks.values()) or 'none'}")

# %% [markdown]
# ## Validation: pairs that nothing has seen
#
# A share of the pairs is set aside. A sentence often occurs twice, once with this translation and once with
# that, so the pairs that share *a side* with one of them go, too. And so does every line of the Chinese text
# that is the answer to a validation sentence: the boss would learn it by heart, and the score would lie.
# BLEU compares with the translations **as they were given**, not with a cleaned form of them.

# %%
size = max(len(pairs) // 100, min(400, len(pairs) // 11))
order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(SEED)).tolist()
valid = [pairs[k] for k in order[:size]]
valid_en, valid_zh, valid_raw = ([pair[side] for pair in valid] for side in range(3))
aside_en, aside_zh = {*valid_en}, {*valid_zh}
learn = [pair for pair in pairs if pair[0] not in aside_en and pair[1] not in aside_zh]
learn_en, learn_zh = ([pair[side] for pair in learn] for side in range(2))
known = aside_zh.union(learn_zh)
mono = dict.fromkeys(clean_zh(line) for line in given["mono.zh"])
mono_zh = [line for line in mono if 0 < len(line) <= 200 and line not in known]
rows = {"pairs to learn from": learn, "pairs to check on": valid, "Chinese alone": mono_zh}
rows["Chinese alone, left out: translated already"] = known.intersection(mono)
table([{"what": what, "lines": len(lines)} for what, lines in rows.items()])


# %% [markdown]
# ## Pieces: the alphabet of the net
#
# Words are too many, characters too short. **SentencePiece** makes pieces of the text itself: the two neighbours
# that stand together most often become one piece, again and again (*byte-pair encoding*). Frequent words end up
# whole, rare ones in parts. Both languages share one vocabulary, and its size follows from the text: all
# characters, and a piece more for every 300 of them. (The official sample's *unigram* model was tried, too: on
# a text as small as the sample it left most Chinese words in single characters.)

# %%
PAD, UNKNOWN, START_OF, END, MADE = range(5)  # MADE: begins a source that a net wrote, at boss
LONGEST = 256  # pieces of a line; what is longer is cut


def train_pieces(folder):
    """Byte-pair encoding: the most frequent pair of neighbours becomes one piece, again and again."""
    texts = [*learn_en, *learn_zh, *mono_zh]
    signs = Counter("".join(texts))
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_prefix=str(folder / "pieces"),
        vocab_size=len(signs) + min(4000, signs.total() // 300) + 5,
        model_type="bpe",
        hard_vocab_limit=False,  # a small text has fewer
        character_coverage=0.9998,
        normalization_rule_name="identity",
        pad_id=PAD, unk_id=UNKNOWN, bos_id=START_OF, eos_id=END, control_symbols=["<made>"],
        input_sentence_size=1_000_000, shuffle_input_sentence=True, minloglevel=2,
    )  # fmt: skip


folder = Path(f"{DATA_DIR}-pieces", f"{'real' if REAL else 'sample'}-{PROFILE}-{SEED}")
make_once(folder, fingerprint([train_pieces, learn, mono_zh]), train_pieces)
spm = sentencepiece.SentencePieceProcessor(model_file=str(folder / "pieces.model"))
VOCABULARY = spm.get_piece_size()


def tokens_of(lines):
    """Texts -> tokens; each line has its start and its end."""
    return pack([[START_OF, *row[:LONGEST], END] for row in spm.encode(lines)])


for line in (learn_en[0], learn_zh[0]):
    say(" | ".join(spm.encode(line, out_type=str)), "=", spm.encode(line))
say(f"{VOCABULARY} pieces")

# %% [markdown]
# ## Simple: two recurrent nets and attention (41)
#
# The official sample's net. An **encoder** (a GRU in both directions) reads the sentence and leaves one state a
# token. A **decoder** (another GRU) starts from the last of them and writes: each token that it wrote is its
# next input. Before it chooses, it asks all encoder states: its own state $q_t$ is compared with each $h_s$,
#
# $$\alpha_{ts} = \operatorname{softmax}_s(q_t \cdot h_s), \qquad c_t = \sum_s \alpha_{ts} h_s,$$
#
# and $c_t$ is what it needs of the source now. (The official sample asks with the last token alone, which
# cannot know what has been said already.) While it learns, the right tokens go in, all at once (**teacher
# forcing**): `forward`. When it translates, it goes on from its own: `start`, then `step` by `step`.

# %%
from torch import nn
from torch.nn import functional as F


def look_up(query, states, mask):
    """Attention with one head: for each query the weighted mean of the states."""
    return F.scaled_dot_product_attention(query, states, states, mask[:, None])  # (batch, time, width)


class Recurrent(nn.Module):
    """Encoder and decoder are GRUs (the official sizes: 512 and 1024)."""

    def __init__(self, width, dropout):
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, width, padding_idx=PAD)
        self.encoder = nn.GRU(width, width // 2, batch_first=True, bidirectional=True)
        self.decoder = nn.GRU(width, width, batch_first=True)
        self.merge, self.dropout = nn.Linear(2 * width, width), nn.Dropout(dropout)
        nn.init.normal_(self.embed.weight, std=width**-0.5)

    def start(self, source):
        """What `step` needs: the encoder's states and their mask; and what moves on, the decoder's state."""
        x, size = self.dropout(self.embed(source) * self.embed.embedding_dim**0.5), (source != PAD).sum(1)
        x = nn.utils.rnn.pack_padded_sequence(x, size.cpu(), batch_first=True, enforce_sorted=False)
        states, last = self.encoder(x)  # packed: the last state is not one of a PAD
        states, _ = nn.utils.rnn.pad_packed_sequence(states, True, total_length=source.shape[1])
        return [states, source != PAD], [last.transpose(0, 1).flatten(1)]

    def step(self, target, fixed, moving):
        """Logits (batch, time, pieces) of what follows each target token."""
        y = self.dropout(self.embed(target) * self.embed.embedding_dim**0.5)
        y, last = self.decoder(y, moving[0][None].contiguous())
        context = look_up(y, *fixed)
        y = self.dropout(torch.tanh(self.merge(torch.cat([y, context], -1))))
        return y @ self.embed.weight.T, [last[0]]

    def forward(self, source, target):
        return self.step(target, *self.start(source))[0]


# %% [markdown]
# ## Medium: longer, and faster (+25)
#
# Twice as many epochs, at three times the rate. At first the weights are noise, and Adam's averages of the
# gradient are, too: large steps lead astray. So the rate **warms up** to its peak $\hat\eta$, and then falls with
# the inverse square root of the step (Vaswani et al.'s, often called Noam):
#
# $$\eta_n = \hat\eta \cdot \min\big(n / w,\ \sqrt{w / n}\big).$$
#
# Which of these pays? On the sample it is the length and the height: with a constant rate of that height,
# *medium* has 69.2 and 68.1 (two seeds), no less. The shape is for nets that are deeper than this one.


# %%
def rate_at(step, warm):
    """The share of the peak rate at step 1, 2, ...; a warm-up of 0 steps: constant."""
    if warm == 0:
        return 1.0
    return min(step / warm, (warm / step) ** 0.5)


plt.figure(figsize=(8, 2))
for warm, style in ((0, "constant"), (200, "warm-up of 200 steps"), (400, "warm-up of 400 steps")):
    plt.plot([rate_at(step, warm) for step in range(1, 2001)], label=style)
plt.xlabel("step")
plt.ylabel("share of the peak rate")
plt.legend(loc="lower right")
show("rate.png")

# %% [markdown]
# ## Strong: the Transformer (+13)
#
# A GRU hands everything on through one state, step by step. In the Transformer each token looks at every other
# **directly**, all at the same time. What a token asks is its query $q$, what the others answer to are their
# keys $k$, what they hand over are their values $v$:
#
# $$\text{Attention}(Q, K, V) = \operatorname{softmax}\!\big(Q K^\top / \sqrt{d}\big)\, V .$$
#
# Several **heads** do so side by side, each on its own slice of the vector. PyTorch has the formula as one fast
# function; what remains is three linear maps and cutting into heads.


# %%
class Attention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.ask, self.tell, self.out = (nn.Linear(width, n * width) for n in (1, 2, 1))

    def split(self, x):
        """(batch, time, width) -> (batch, heads, time, width of a head)"""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def keys_values(self, x):
        """What can be looked at: (batch, 2, heads, time, width of a head)"""
        key, value = self.tell(x).chunk(2, -1)
        return torch.stack([self.split(key), self.split(value)], 1)

    def forward(self, x, told, mask=None, causal=False):
        """Each place of x looks at what was told: where mask is true, or with `causal` not ahead."""
        key, value = told.unbind(1)
        query = self.split(self.ask(x))
        y = F.scaled_dot_product_attention(query, key, value, mask, is_causal=causal)
        return self.out(y.transpose(1, 2).flatten(2))

    def weights(self, x, told):
        """The softmax alone, to look at: (batch, heads, places of x, places told)"""
        query, (key, _) = self.split(self.ask(x)), told.unbind(1)
        return (query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5).softmax(-1)


# %% [markdown]
# Attention does not know who stands where, so a **position** is added to each token: sines and cosines of many
# wavelengths. A layer adds what it finds to what came in, and normalises before it looks (*pre-norm*). The
# encoder looks at itself, then a small net works on each token alone. The decoder looks at what it has
# written, **never ahead**, then at the encoder.
#
# The keys and values of what has been written never change. So they are kept (`past`), and a step computes
# those of the one new token only: a sentence of $n$ tokens costs $n$ of them, not $1 + 2 + \dots + n$. One table
# of vectors serves as input of both sides and as output.


# %%
def positions(count, width):
    """The table of the paper: (count, width), sines in the first half, cosines in the second."""
    frequency = torch.exp(torch.arange(0, width, 2) * (-math.log(10000) / width))
    angle = torch.arange(count)[:, None] * frequency
    return torch.cat([angle.sin(), angle.cos()], 1)


class Layer(nn.Module):
    """Of the encoder; with `cross` of the decoder, which looks at the encoder, too."""

    def __init__(self, width, inner, heads, dropout, cross):
        super().__init__()
        self.own, self.norm = Attention(width, heads), nn.LayerNorm(width)
        if cross:
            self.cross, self.cross_norm = Attention(width, heads), nn.LayerNorm(width)
        layers = nn.Linear(width, inner), nn.ReLU(), nn.Dropout(dropout), nn.Linear(inner, width)
        self.words, self.dropout = nn.Sequential(nn.LayerNorm(width), *layers), nn.Dropout(dropout)

    def encode(self, x, mask):
        seen = self.norm(x)
        x = x + self.dropout(self.own(seen, self.own.keys_values(seen), mask))
        return x + self.dropout(self.words(x))

    def decode(self, y, memory, mask, past):
        """New target tokens, after those whose keys and values are in `past`; returns past and new ones."""
        seen = self.norm(y)
        told = torch.cat([past, self.own.keys_values(seen)], 3)
        y = y + self.dropout(self.own(seen, told, causal=y.shape[1] > 1))
        y = y + self.dropout(self.cross(self.cross_norm(y), memory, mask))
        return y + self.dropout(self.words(y)), told


# %%
class Transformer(nn.Module):
    def __init__(self, width, inner, heads, layers, dropout):
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, width, padding_idx=PAD)
        nn.init.normal_(self.embed.weight, std=width**-0.5)
        sizes = width, inner, heads, dropout
        self.encoder = nn.ModuleList(Layer(*sizes, cross=False) for _ in range(layers))
        self.decoder = nn.ModuleList(Layer(*sizes, cross=True) for _ in range(layers))
        self.norm, self.last_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.dropout, self.empty = nn.Dropout(dropout), (2, heads, 0, width // heads)
        self.register_buffer("table", positions(512, width), persistent=False)

    def vectors(self, tokens, first=0):
        """Tokens as vectors; the first one stands at place `first`."""
        x = self.embed(tokens) * self.embed.embedding_dim**0.5
        return self.dropout(x + self.table[first : first + tokens.shape[1]])

    def start(self, source):
        mask = (source != PAD)[:, None, None]  # (batch, 1, 1, time): for all heads and all queries
        x = self.vectors(source)
        for layer in self.encoder:
            x = layer.encode(x, mask)
        x = self.norm(x)
        memory = [layer.cross.keys_values(x) for layer in self.decoder]
        return [mask, *memory], [x.new_zeros(len(x), *self.empty) for _ in self.decoder]

    def step(self, target, fixed, moving):
        """Logits (batch, time, pieces) of what follows each target token, and the longer past."""
        y, (mask, *memory), longer = self.vectors(target, moving[0].shape[3]), fixed, []
        for layer, told, past in zip(self.decoder, memory, moving):
            y, past = layer.decode(y, told, mask, past)
            longer.append(past)
        return self.last_norm(y) @ self.embed.weight.T, longer

    def forward(self, source, target):
        return self.step(target, *self.start(source))[0]


# %% [markdown]
# **Beam search.** The likeliest next token is not always the first of the likeliest sentence. So the best few
# beginnings are kept (the *beam*), all of them grow by one token, and the best few of what comes out stay. Long
# sentences have more factors below 1, so the sum of logarithms is divided by $\text{length}^\alpha$. All
# sentences and all their beams are one batch; a sentence that nothing can improve any more leaves it.


# %%
def next_scores(logits, score, over, at_limit):
    """Sums of log-probabilities (lines, beam, pieces), each beam with each next token."""
    new = logits.float().log_softmax(-1)
    tokens = torch.arange(new.shape[2], device=new.device)
    never = (tokens < END) | (tokens == MADE)
    new = new.masked_fill(never | (at_limit & (tokens != END)), -math.inf)
    stay = torch.where(tokens == PAD, 0.0, -math.inf)  # a beam that is over stays as it is
    return score[:, :, None] + torch.where(over[:, :, None], stay, new)


@torch.no_grad()
def search(net, source, beam, alpha=1.0):
    """The best translation of each line of source (lines, time): a list of lists of tokens."""
    line, best = torch.arange(len(source), device=source.device), [[] for _ in source]
    limit = ((source != PAD).sum(1) * 1.2 + 10).long()[:, None]  # of each line, whatever else is in the batch
    state = [[one.repeat_interleave(beam, 0) for one in part] for part in net.start(source)]
    tokens = torch.full((len(source), beam, 1), START_OF, device=source.device)
    score = torch.zeros(len(source), beam, device=source.device)
    score[:, 1:] = -math.inf  # at first all beams are the same: one is enough
    length, over = torch.zeros_like(score), torch.zeros_like(score, dtype=torch.bool)
    for t in range(1, int(limit.max()) + 1):
        logits, moving = net.step(tokens[:, :, -1].reshape(-1, 1), *state)
        total = next_scores(logits.unflatten(0, (-1, beam))[:, :, 0], score, over, (t >= limit)[:, :, None])
        length = torch.where(over, length, t)
        value, top = (total / length[:, :, None] ** alpha).flatten(1).topk(beam)
        parent, token = top // total.shape[2], top % total.shape[2]
        score, length = total.flatten(1).gather(1, top), length.gather(1, parent)
        tokens = torch.cat([tokens.gather(1, parent[:, :, None].expand_as(tokens)), token[:, :, None]], 2)
        over = over.gather(1, parent) | (token == END)
        hope = (score / limit**alpha).masked_fill(over, -math.inf)  # the most that a growing beam can reach
        done = over[:, 0] & (value[:, 0] >= hope.amax(1))
        for k in done.nonzero().flatten().tolist():
            best[int(line[k])] = [one for one in tokens[k, 0, 1:].tolist() if one not in (PAD, END)]
        alive = (~done).nonzero().flatten()
        if len(alive) == 0:
            break
        rows = (alive[:, None] * beam + parent[alive]).flatten()
        state = [[one[rows] for one in part] for part in (state[0], moving)]
        line, limit, tokens = line[alive], limit[alive], tokens[alive]
        score, length, over = score[alive], length[alive], over[alive]
    return best


# %% [markdown]
# ## Boss: pairs that nobody made (+14)
#
# Of Chinese text without a translation there is plenty. **Back-translation** makes pairs of it: a first net
# learns the way back, from Chinese to English, and translates every line. Its English has mistakes, but it is
# only the *source*; the target is real Chinese, and from that the decoder learns to write. A sign at the start
# of such a source says that a net has made it, and the true pairs are shown several times in an epoch, so that
# they are not drowned.
#
# That takes hours on the real data. So it is two stages of their own: the net for the way back with a
# checkpoint an epoch, then the translations with one a shard. A killed run goes on where it was.


# %%
@torch.no_grad()
def translate(net, lines, beam, rows=None, alpha=1.0):
    """The translations (tokens) of packed lines, or of some rows of them, in their order."""
    net.eval()
    if rows is None:
        rows = torch.arange(len(lines[1]))
    order = rows[lines[1][rows].argsort(descending=True, stable=True)]  # lines of one length together
    found = []
    for some in order.split(max(1, 512 // beam))[accelerator.process_index :: accelerator.num_processes]:
        with accelerator.autocast():
            found += zip(some.tolist(), search(net, pad(lines, some).to(device), beam, alpha))
    return [tokens for _, tokens in sorted(gather_object(found))]


def back_translate(net, lines):
    """Packed Chinese lines -> packed English lines, each with the sign of a made source."""
    shards = torch.arange(len(lines[1])).split(max(1, min(10_000, len(lines[1]) // 2)))
    made = {"flat": torch.zeros(0, dtype=torch.int32), "size": torch.zeros(0, dtype=torch.long)}
    done = load_checkpoint("translations", [back_translate, net.state_dict(), lines], made=made)
    for k in tqdm(range(done, len(shards)), "translations", disable=QUIET, leave=False):
        new = pack([[MADE, *tokens[:LONGEST], END] for tokens in translate(net, lines, 1, shards[k])])
        for name, part in zip(made, new):
            made[name] = torch.cat([made[name].cpu(), part])
        save_checkpoint("translations", k + 1, made=made)
    return made["flat"].cpu(), made["size"].cpu()


# %% [markdown]
# ## The levels
#
# A row an idea; each can be switched off alone.

# %% tags=["levels"]
# fmt: off
LEVELS = {       # simple       medium       strong         boss
    "schedule": ("constant",  "warm-up",   "warm-up",     "warm-up"),      # of the learning rate
    "net":      ("recurrent", "recurrent", "transformer", "transformer"),
    "smooth":   (0.0,         0.0,         0.1,           0.1),    # of the answer goes to all pieces
    "average":  (1,           1,           5,             5),      # the mean weights of so many last epochs
    "beam":     (1,           1,           5,             5),
    "made":     (False,       False,       False,         True),   # back-translation
}
SIZES = {
    "small": {
        "width":  (96,   96,   96,   96),   "layers":  (1,   1,   2,   2),
        "inner":  (0,    0,    256,  256),  "heads":   (0,   0,   4,   4),
        "epochs": (15,   30,   30,   6),    "dropout": (0.1, 0.1, 0.1, 0.1),
        "tokens": (600,  600,  600,  600),  "rate":    (1e-3, 3e-3, 3e-3, 3e-3),  # tokens of a batch
        "copies": (1,    1,    1,    3),    # of each true pair in an epoch
        "way_back": (0,  0,    0,    3),    # so many times the epochs for the net from Chinese to English
    },
    "two cores": {  # the real data without a GPU
        "width":  (256,  256,  256,  256),  "layers":  (1,   1,   3,   3),
        "inner":  (0,    0,    512,  512),  "heads":   (0,   0,   4,   4),
        "epochs": (8,    16,   20,   8),    "dropout": (0.3, 0.3, 0.3, 0.3),
        "tokens": (2000, 2000, 2000, 2000), "rate":    (1e-3, 2e-3, 2e-3, 2e-3),
        "copies": (1,    1,    1,    2),    "way_back": (0,  0,   0,   2),
    },
    "full": {
        "width":  (512,  512,  512,  512),  "layers":  (1,   1,   6,   6),
        "inner":  (0,    0,    2048, 2048), "heads":   (0,   0,   8,   8),
        "epochs": (12,   30,   30,   20),   "dropout": (0.3, 0.3, 0.2, 0.2),
        "tokens": (8000, 8000, 8000, 8000), "rate":    (1e-3, 2e-3, 1e-3, 1e-3),
        "copies": (1,    1,    1,    2),    "way_back": (0,  0,   0,   1),
    },
}
# fmt: on
if REAL:
    SIZES["small"] = SIZES["two cores"]
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
# A batch is not a number of sentences but a **budget of tokens**: many short ones or a few long ones. Sentences
# of about one length go together, so that little of a batch is padding.
#
# The loss is the cross-entropy of the right next token. With **label smoothing** the right one is asked for 90 %
# of the probability, all pieces share the rest: no net can be sure of anything, and a beam has a choice left.
# Gradients longer than 1 are **clipped** to length 1; how long each one was is kept for the report. What
# translates in the end is the **mean of the weights** after the last epochs, which lies nearer to the middle of
# the valley than any of them.
#
# Up to *strong* one net learns. The boss has three stages: the net for the way back, its translations, and the
# net that learns from true and made pairs together.


# %%
def make_batches(source, target, epoch):
    """Rows of an epoch's batches: sorted by length, a little shaken, cut by the budget, shuffled."""
    dice = torch.Generator().manual_seed(1000 * SEED + epoch)
    size = torch.maximum(source[1], target[1])
    budget = min(settings["tokens"], max(200, int(size.sum()) // 16))  # a few pairs need many steps, too
    order = (size + 2 * torch.rand(len(size), generator=dice)).argsort(descending=True)
    batches = []
    while len(order) >= accelerator.num_processes:  # each process needs a pair
        count = max(accelerator.num_processes, budget // int(size[order[0]]))
        batches.append(order[:count])
        order = order[count:]
    return [batches[k] for k in torch.randperm(len(batches), generator=dice).tolist()]


packed = {"learn_en": learn_en, "learn_zh": learn_zh, "valid_en": valid_en, "valid_zh": valid_zh}
packed = {name: tokens_of(lines) for name, lines in packed.items()}
batches = make_batches(packed["learn_en"], packed["learn_zh"], 0)
size = packed["learn_zh"][1]
real = size[torch.cat(batches)].sum() / sum(len(rows) * size[rows].max() for rows in batches)
say(f"{len(batches)} batches an epoch; {1 - real:.0%} of them is padding")


# %%
CLIP = 1.0


def loss_of(logits, target):
    """Cross-entropy over the real tokens; logits (batch, time, pieces), target (batch, time)."""
    real = target != PAD
    return F.cross_entropy(logits[real], target[real], label_smoothing=settings["smooth"])


def make_net():
    if settings["net"] == "recurrent":
        return Recurrent(settings["width"], settings["dropout"]).to(device)
    names = ("width", "inner", "heads", "layers", "dropout")
    return Transformer(*(settings[name] for name in names)).to(device)


def make_training(net, steps):
    """AdamW, whose rate follows the schedule; the net as accelerate wraps it."""
    optimizer = torch.optim.AdamW(net.parameters(), settings["rate"], betas=(0.9, 0.98), weight_decay=0.01)
    warm = max(1, steps // 6) if settings["schedule"] == "warm-up" else 0
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_at(step + 1, warm))
    return *accelerator.prepare(net, optimizer), scheduler


def add_weights(mean, net, count):
    """One of `count` sets of weights into their mean."""
    for name, weight in net.state_dict().items():
        mean[name] = mean.get(name, 0) + weight / count


def evaluate(net, check, beam):
    """BLEU of the translations of packed lines."""
    lines, references, tokenize = check
    texts = spm.decode(translate(net, lines, beam))
    if tokenize == "zh":
        texts = [write_zh(text) for text in texts]
    return bleu(texts, references, tokenize)


def keep_track(stage, epoch, epochs, row, net, check, parts):
    """A row of the history; the score at about six epochs, a checkpoint at up to thirty."""
    if not math.isfinite(row["loss"]):
        raise Stop(f"The training diverged (the loss is {row['loss']}): lower `rate` of {LEVEL} in SIZES.")
    row = dict(stage=stage, epoch=epoch, **row)
    if epoch % max(1, epochs // 6) == 0 or epoch == epochs:
        row["valid"] = evaluate(net, check, 1)
    if epoch in (epochs // 2, epochs):
        say(f"{stage}, epoch {epoch} of {epochs}: loss {row['loss']:.3f}")
    history.append(row)
    if epoch % max(1, epochs // 30) == 0 or epoch == epochs:
        save_checkpoint(stage, epoch, **parts)


# %% tags=["train"]
def train(stage, source, target, check, epochs):
    """A new net that turns packed source lines into target lines, and the norm of each step's gradient."""
    net = make_net()
    average = max(1, min(settings["average"], epochs // 3))  # the first epochs would spoil it
    model, optimizer, scheduler = make_training(net, epochs * len(make_batches(source, target, 0)))
    mean, norms = {}, {"all": torch.zeros(0, device=device)}
    parts = dict(model=model, optimizer=optimizer, scheduler=scheduler, mean=mean, norms=norms)
    done = load_checkpoint(stage, [train, net, source, target, check, epochs], **parts)
    for epoch in tqdm(range(done + 1, epochs + 1), stage, disable=QUIET, leave=False):
        tic, losses, lengths = time.perf_counter(), [], []
        model.train()
        for rows in make_batches(source, target, epoch):
            mine = rows[accelerator.process_index :: accelerator.num_processes]
            x, y = pad(source, mine).to(device), pad(target, mine).to(device)
            loss = loss_of(model(x, y[:, :-1]), y[:, 1:])
            optimizer.zero_grad()
            accelerator.backward(loss)
            lengths.append(accelerator.clip_grad_norm_(model.parameters(), CLIP))
            optimizer.step()
            scheduler.step()
            losses.append(loss.detach())
        norms["all"] = torch.cat([norms["all"], torch.stack(lengths)])
        if epoch > epochs - average:
            add_weights(mean, net, average)
        speed = len(source[1]) / (time.perf_counter() - tic)
        row = dict(loss=float(torch.stack(losses).mean()), examples_per_second=speed)
        keep_track(stage, epoch, epochs, row, net, check, parts)
    net.load_state_dict(mean)
    return net, norms["all"].cpu()


# %%
def join(parts):
    """Packed lines, one after the other."""
    return tuple(torch.cat(one) for one in zip(*parts))


check = packed["valid_en"], valid_raw, "zh"
source, target = packed["learn_en"], packed["learn_zh"]
if settings["made"]:
    back_check = packed["valid_zh"], valid_en, "13a"
    epochs = settings["epochs"] * settings["way_back"]
    back_net, _ = train("way-back", target, source, back_check, epochs)
    chinese = tokens_of(mono_zh)
    made = back_translate(back_net, chinese)
    accelerator.free_memory()
    english = spm.decode(pad(made, torch.arange(4)).tolist())
    table([{"Chinese, as found": zh, "English, made": en} for zh, en in zip(mono_zh, english)])
    source = join([source] * settings["copies"] + [made])
    target = join([target] * settings["copies"] + [chinese])
net, norms = train("translator", source, target, check, settings["epochs"])

fig, axes = plt.subplots(1, 2, figsize=(8, 2.4))
for stage in dict.fromkeys(point["stage"] for point in history):
    for axis, key in zip(axes, ("loss", "valid")):
        curve = [point for point in history if point["stage"] == stage and key in point]
        axis.plot([point["epoch"] for point in curve], [point[key] for point in curve], ".-", label=stage)
        axis.set_xlabel("epoch")
axes[0].set_ylabel("training loss")
axes[1].set_ylabel("BLEU, validation, greedy")
axes[1].legend()
show("curves.png")

# %% [markdown]
# ## Prediction and submission
#
# Every line of the test gets one line, in its place; an empty one gets a full stop. **BLEU** counts which runs
# of one to four signs of the translation stand in the reference, too, and punishes what is too short.
# Characters are its signs (`tokenize="zh"`): with another rule a Chinese sentence would be one single word.

# %% tags=["predict"]
questions = [clean_en(line) for line in given["test.en"]]
tokens = tokens_of(questions)
texts = spm.decode(translate(net, tokens, settings["beam"]))
prediction = [write_zh(text) if question else "。" for question, text in zip(questions, texts)]
unknown, cut = int((tokens[0] == UNKNOWN).sum()), int((tokens[1] == LONGEST + 2).sum())
say(f"of the {len(tokens[0])} test tokens {unknown} are unknown; {cut} lines were cut at {LONGEST} pieces")
summary = dict(valid_score=evaluate(net, check, settings["beam"]))
summary["parameters"] = sum(weight.numel() for weight in net.parameters())
summary["examples_per_second"] = float(np.median([point["examples_per_second"] for point in history]))
say(f"validation: BLEU {summary['valid_score']:.2f} (sacrebleu {sacrebleu.__version__}, tokenize=zh)")

# %% cellView="form" jupyter={"source_hidden": true} tags=["submission"]
# @title The submission file, and the picture of the header
submission = OUT / ("prediction.txt" if REAL else "prediction.sample.txt")
NOT_TEXT = ("\u2581", "\u2047", "\ufffd", "<s>", "</s>", "<pad>", "<unk>", "<made>")  # signs of the pieces


def write_submission(path):
    with aside(path) as part:
        part.write_text("".join(f"{line}\n" for line in prediction), encoding="utf-8", newline="\n")


def check_submission(path):
    """Raises Stop with what the judge would not take; prints what looks odd."""
    data = path.read_bytes()
    *lines, last = data.decode().split("\n")
    if last or len(lines) != len(given["test.en"]):
        raise Stop(
            f"{path} has {len(lines)} lines, test.en has {len(given['test.en'])}: one for each, no more"
        )
    if len(data) >= 700_000:
        raise Stop(
            f"{path} has {len(data)} bytes, the judge takes less than 700,000: some lines repeat themselves"
        )
    for k, line in enumerate(lines, 1):
        if not line.strip():
            raise Stop(f"{path}, line {k} is empty: write 。 there")
        wrong = [sign for sign in NOT_TEXT if sign in line]
        if wrong:
            raise Stop(f"{path}, line {k} has {wrong[0]!r}, which is no text but a sign of the pieces")
    foreign = sum(not re.search("[\u3400-\u9fff]", line) for line in lines) / len(lines)
    most, times = Counter(lines).most_common(1)[0]
    if foreign > 0.01:
        say(f"NOTE: {foreign:.0%} of the lines have no Chinese character")
    if times > max(2, 0.02 * len(lines)):
        say(f"NOTE: {times} lines are the same: {most[:30]}")


def score_submission(path, answers):
    """The judge: BLEU of the file against the translations that lie aside."""
    references = (answers / "test.zh").read_text(encoding="utf-8").split("\n")[:-1]
    return bleu(path.read_text(encoding="utf-8").split("\n")[:-1], references)


if MAIN:
    write_submission(submission)


@torch.no_grad()
def gaze(net, english, chinese):
    """Whom each target token asked: weights (target, source) of the last layer, and both lines' tokens."""
    x, y = (tokens_of([line])[0][None].long().to(device) for line in (english, chinese))
    net.eval()
    if isinstance(net, Recurrent):
        (states, _), (last,) = net.start(x)
        written, _ = net.decoder(net.embed(y[:, :-1]) * net.embed.embedding_dim**0.5, last[None].contiguous())
        weights = (written @ states.transpose(1, 2) / states.shape[2] ** 0.5).softmax(-1)[0]
    else:
        seen, cross = [], net.decoder[-1].cross
        hook = cross.register_forward_pre_hook(lambda module, inputs: seen.append(inputs))
        net(x, y[:, :-1])
        hook.remove()
        weights = cross.weights(*seen[0][:2])[0].mean(0)  # the mean of the heads
    return weights.float().cpu(), x[0].tolist(), y[0].tolist()


def draw_gaze(axis, english, chinese):
    weights, x, y = gaze(net, english, chinese)
    names = [[spm.id_to_piece(token).replace("\u2581", "") or "_" for token in row] for row in (x, y[1:])]
    if not CHINESE_FONT:  # numbers in place of Chinese signs
        names[1] = [name if name.isascii() else str(k) for k, name in enumerate(names[1], 1)]
    axis.imshow(weights, cmap="Blues", vmin=0, aspect="auto")
    axis.set_xticks(range(len(x)), names[0], rotation=60, fontsize=8)
    axis.set_yticks(range(len(y) - 1), names[1], fontsize=8)


fitting = [k for k, question in enumerate(questions) if 6 <= len(question.split()) <= 11] or [0]
fig, (axis, side) = plt.subplots(1, 2, figsize=(8, 3), width_ratios=(3, 2))
draw_gaze(axis, questions[fitting[0]], clean_zh(prediction[fitting[0]]))
lines = [f"{given['test.en'][k]}\n   {prediction[k] if CHINESE_FONT else ''}" for k in fitting[:4]]
side.text(0, 0.5, "\n\n".join(lines), va="center", fontsize=8)
side.axis("off")
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
        "simple": [46.377, 36.652, 41.03],
        "medium": [68.044, 63.313, 67.761],
        "strong": [79.427, 79.173, 78.302],
        "boss": [93.226, 91.68, 93.156],
    },
    "without": {
        "schedule": [95.392, 92.871, 92.47],
        "net": [75.186],
        "smooth": [92.707, 90.048, 91.598],
        "average": [92.581, 89.817, 92.842],
        "beam": [93.147, 91.49, 93.111],
        "made": [7.0816],
    },
}

# %% [markdown] tags=["report"]
# ## Report
#
# **1. What is each idea worth?** On the sample, at boss, each idea was switched off alone (`WITHOUT`).

# %% tags=["report"]
show_worth()

# %% [markdown] tags=["report"]
# Each bar is what the boss loses when that idea alone is taken away; what lies inside the grey band cannot be told
# from the luck of a seed. **Two ideas carry the boss**: the Transformer, and the pairs that a net made. Without
# those it has one fifth of the steps, and 7 points: fairer is *strong*, which learns the true pairs for as long
# as they can teach anything and ends at 79. Smoothing, the mean of the weights, the beam and the
# shape of the rate are worth nothing that this sample could show: its sentences are short and regular.
#
# **2. Where is a token? (question 1 of the course)** The decoder's table of positions, and how alike its rows
# are: the cosine of the angle between each two of them.
#
# **3. Where does clipping help? (question 2)** The norm of each step's gradient, before it was clipped; the two
# largest after the warm-up are marked.

# %% tags=["report"]
places = F.normalize(positions(128, settings["width"]), dim=1)
alike = places @ places.T
fig, axes = plt.subplots(1, 2, figsize=(8, 2.8), width_ratios=(2, 3))
fig.colorbar(axes[0].imshow(alike, cmap="Blues"), ax=axes[0], label="cosine")
axes[0].set(xlabel="position", ylabel="position")
for row in (0, 32, 64):
    axes[1].plot(torch.arange(128) - row, alike[row], label=f"position {row} and others")
axes[1].set(xlabel="offset", ylabel="cosine", xlim=(-64, 64))
axes[1].legend(fontsize=8)
show("positions.png")

late = len(norms) // 6
spikes = norms[late:].topk(2).indices + late
plt.figure(figsize=(8, 2.4))
plt.semilogy(norms, linewidth=0.6)
plt.axhline(CLIP, color="black", linestyle=":", label="clipped above")
plt.semilogy(spikes, norms[spikes], "o", markersize=12, fillstyle="none", color="C3", label="shortened most")
plt.gca().set(xlabel="step", ylabel="norm of the gradient")
plt.legend()
show("norms.png")
clipped = [float((some > CLIP).float().mean()) for some in (norms[:late], norms[late:])]
say(f"clipped: {clipped[0]:.0%} of the {late} steps of the warm-up, {clipped[1]:.1%} of the later ones")

# %% [markdown] tags=["report"]
# **The nearer, the more alike, and only the distance counts**: the matrix is the same along each diagonal, the
# three curves lie on one another. The reason is one line of algebra: the product of two rows is $\sum_i
# \sin(\omega_i a) \sin(\omega_i b) + \cos(\omega_i a) \cos(\omega_i b) = \sum_i \cos(\omega_i (a - b))$, in
# which $a$ and $b$ stand only as a difference. The fast waves tell neighbours apart, the slow ones tell near
# from far.
#
# **In the warm-up**: while the weights are noise, one gradient in five is longer than 1 and is cut. Later it is one
# in twenty: a batch that the net finds strange. Its direction stays, only its length is cut, so one such batch
# cannot throw the weights far away.
#
# **4. Whom does the decoder ask?** The weights of the last layer's attention to the source, the mean of its
# heads, for a validation sentence and its given translation: each row is one token to be written, and adds up
# to 1.
#
# **5. Ten translations side by side**: the first test sentences by each level that has run in this folder. (Here all
# four have; run the others with `LEVEL`, then this one again.) And what the width of the beam and the exponent
# $\alpha$ of the length do to BLEU on the validation sentences.

# %% tags=["report"]
fitting = [k for k, line in enumerate(valid_en) if 7 <= len(line.split()) <= 12] or [0]
fig, axis = plt.subplots(figsize=(8, 3))
draw_gaze(axis, valid_en[fitting[0]], valid_zh[fitting[0]])
axis.set(xlabel="source, and its end", ylabel="to be written")
show("attention.png")
say(valid_en[fitting[0]], "=", valid_zh[fitting[0]])

some = torch.arange(min(400, len(valid)))
rows = {"English": given["test.en"][:10]}
if ANSWERS:
    rows["given"] = (ANSWERS / "test.zh").read_text(encoding="utf-8").split("\n")[:10]
for level in CHOICES["LEVEL"]:
    for path in OUT_DIR.glob(f"{level}-{'real' if REAL else 'sample'}/{submission.name}"):
        rows[level] = path.read_text(encoding="utf-8").split("\n")[:10]
table(rows)
table_rows = []
for beam, alpha in ((1, 1.0), (2, 1.0), (5, 0.0), (5, 1.0), (5, 2.0)):
    found = [write_zh(text) for text in spm.decode(translate(net, packed["valid_en"], beam, some, alpha))]
    here = bleu(found, valid_raw[: len(some)])
    table_rows.append({"beam": beam, "alpha": alpha, "BLEU": here, "characters": sum(map(len, found))})
table(table_rows)

# %% [markdown] tags=["report"]
# Each row is brightest where the words stand that it has to translate, so the bright cells are the alignment, and
# where they leave the diagonal, the languages order their words differently. Reading the ten lines from left to
# right: *simple* forgets the library and makes a cat a cake, because one state has to carry the whole sentence;
# *medium* keeps the words of a short sentence and still swaps its verb; *strong* loses half of the longest one;
# *boss* has all of it, down to the rarer word for a thing. What it misses is mostly another synonym, which BLEU
# counts as wrong. A wider beam changes nothing here; $\alpha$ decides how long a translation gets to be, and 0
# prefers short ones.

# %% [markdown] tags=["try"]
# ## Try it
#
# Predict what happens before you run it.
#
# 1. `WITHOUT = "net"`: the boss with a recurrent net. Which sentences suffer most, the short or the long ones?
# 2. Take the positions out (`return self.dropout(x)` in `vectors`). The encoder then sees a bag of words; what
#    about the decoder, which looks only back?
# 3. Set `copies` of boss to 1, then to 10. When do the made pairs drown the true ones, when do the true ones
#    drown the made?

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
