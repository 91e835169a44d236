# %% [markdown] tags=["header"]
# # HW12 · Reinforcement learning: land on the moon
#
# <!-- badges -->
# [![Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/ml2022-notebooks/ml2022-spring/blob/main/HW12/HW12.ipynb)
# [![Kaggle](https://kaggle.com/static/images/open-in-kaggle.svg)](https://kaggle.com/kernels/welcome?src=https://github.com/ml2022-notebooks/ml2022-spring/blob/main/HW12/HW12.ipynb)
# <!-- /badges -->
#
# A lander falls towards the moon and has four moves: nothing, left engine, main engine, right engine.
# Nobody can say which one is right at a given moment, so there are no labels. All there is is a
# **reward**: a little for every step that brings the craft nearer to a soft landing, a lot for the end
# of the flight. The lecture's three steps still hold: the **function** is a policy $\pi_\theta(a|s)$
# that says how likely each move is, the **loss** is minus the total reward, and the **optimizer** is
# the usual one. New is that the moves are drawn by chance and the moon is a black box: no gradient
# flows through it. *Policy gradient* gets one all the same: it makes each move that was flown more or
# less likely, by a **number that multiplies** $\log\pi$. The four levels are four choices of that
# number.
#
# 登月小艇正往月球墜落,每一刻有四個動作可選:不動、左引擎、主引擎、右引擎。沒有人能標註正確答案,
# 只有**獎勵**。機器學習的三個步驟依然成立:**函式**是策略 $\pi_\theta(a|s)$,**損失**是負的總獎勵,
# **最佳化**照舊。困難在於動作是抽樣得來、環境是黑盒子,梯度傳不過去。策略梯度的作法是拿一個**數字**
# **去乘** $\log\pi$,讓好的動作機率變大、壞的變小。四個等級就是這個數字的四種選擇。
#
# The ladder: the mean return of the trained policy over 100 flights from seeds it has never seen
# (higher is better; the mean of three seeds ± half their range), beside the course's public baselines,
# which are means over the judge's five flights:
#
# <!-- ladder -->
# | level | what multiplies $\log\pi$ | sample | course baseline (judge) | seconds |
# |---|---|---|---|---|
# | simple | the reward of this one step, as in the official sample | 29.9 ± 11.7 | 0 | 79 |
# | medium | the reward to go: all later rewards, discounted | 112.0 ± 9.2 | 100 | 98 |
# | strong | the advantage: how much better than a critic expected | 219.0 ± 12.4 | 170 | 79 |
# | boss | the advantage, and each batch used five times: PPO | 275.3 ± 0.8 | 270 | 96 |
# <!-- /ladder -->
#
# **How to use it.** Run all cells. There is nothing to download: the moon is a program, the same for
# the sample and for the real submission. To change something, edit a parameter below or a cell, then
# run again with `RESUME` off.

# %% tags=["parameters"]
# @title Parameters
LEVEL = "boss"  # @param ["boss", "strong", "medium", "simple"]
DATA = "auto"  # @param ["auto", "real", "sample"]
PROFILE = "full"  # @param ["full", "tiny"]
SEED = 2022  # @param {type:"integer"}
DATA_DIR = "data/HW12"  # @param {type:"string"}
OUT_DIR = "out/HW12"  # @param {type:"string"}
RESUME = True  # @param {type:"boolean"}
SUBMIT = False  # @param {type:"boolean"}
# this homework's own; 0 stands for the level's own number
STEPS = 0  # @param {type:"integer"}
BATCH_SIZE = 0  # @param {type:"integer"}
BEST_OF_N = 16  # @param {type:"integer"}

# %% tags=["homework"]
HW, METRIC, HIGHER_IS_BETTER = "HW12", "mean return", True
SLUG, JUDGE = "", "https://ml.ee.ntu.edu.tw/hw12/"
BASELINES = {"simple": 0, "medium": 100, "strong": 170, "boss": 270}
FILES, MIRRORS, HASHES, make_sample = {}, [], set(), None  # the data is an environment, it comes in a package
OWN = ["STEPS", "BATCH_SIZE", "BEST_OF_N"]  # the parameters that only this homework has
NEEDS = {"accelerate": "accelerate"} | dict.fromkeys(["gymnasium", "Box2D", "pygame"], "gymnasium[box2d]")
MIXED_PRECISION = False  # nets of 5,000 numbers: half precision would gain nothing
ENVIRONMENT, LIMIT = "LunarLander-v3", 1000  # a flight is cut off after 1000 steps
MOVES = ["nothing", "left", "main", "right"]
JUDGE_SEED, EPISODES = 543, 5  # the course's own: do not change
FINGERPRINT = [-0.0012620, 1.3984586, -0.1278409, -0.5538412, 0.0014691, 0.0289579, 0, 0]
TRAIN_SEEDS = range(1_000_000, 2**31)  # no seed is in two of these
VALID_SEEDS, UNSEEN_SEEDS = range(5000, 5080), range(40_000, 40_100)

# %% cellView="form" jupyter={"source_hidden": true} tags=["common:setup"]
# @title Setup: packages, parameters, device
import hashlib, importlib.util, inspect, io, json, os, shutil, subprocess, sys, tarfile, time, zipfile
from contextlib import contextmanager
from pathlib import Path

NOTEBOOK, START = "ipykernel" in sys.modules, time.perf_counter()
missing = [package for module, package in NEEDS.items() if importlib.util.find_spec(module) is None]
if missing and subprocess.call([sys.executable, "-m", "pip", "install", "-q", *missing]):
    sys.exit(f"Packages are missing and could not be installed; try by hand: pip install {' '.join(missing)}")

NOTEBOOK or os.environ.setdefault("MPLBACKEND", "Agg")  # a script draws into files and opens no window
import matplotlib.pyplot as plt
import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object, send_to_device, set_seed
from tqdm import tqdm

plt.rcParams["figure.constrained_layout.use"] = True


class Stop(Exception):
    """Ends the run with one sentence that says what a person can do."""


def explain(kind, error, trace):
    """What a person can mend ends in one sentence, all else in the usual traceback."""
    by_hand = "Stopped by hand. Run again to go on from the last checkpoint."
    text = {Stop: str(error), KeyboardInterrupt: by_hand}.get(kind)
    if kind is torch.OutOfMemoryError:
        text = f"Too little memory for batch size {settings.get('batch_size')}: set BATCH_SIZE to half."
    elif isinstance(error, OSError) and error.errno in (1, 13, 17, 20, 27, 28, 30, 122):  # no room, no right
        text = f"{error.filename}: {error.strerror}. Make room or set OUT_DIR; what is complete is kept."
    if NOTEBOOK:
        shell._showtraceback(kind, error, [text]) if text else shell.showtraceback((kind, error, trace))
    else:
        sys.stderr.write(f"{HW}: {text}\n") if text else sys.__excepthook__(kind, error, trace)


sys.excepthook = explain
if NOTEBOOK:
    from IPython import display, get_ipython

    shell = get_ipython()
    shell.set_custom_exc((Exception, KeyboardInterrupt), lambda shell, *error, tb_offset: explain(*error))

YES = (True, False)
CHOICES = {"LEVEL": ("boss", "strong", "medium", "simple"), "DATA": ("auto", "real", "sample")}
CHOICES |= {"PROFILE": ("full", "tiny"), "SEED": range(2**32), "RESUME": YES, "SUBMIT": YES}
PARAMETERS = [*CHOICES, "DATA_DIR", "OUT_DIR", *OWN]
for key, text in [pair for pair in os.environ.items() if pair[0].startswith("HW_")]:
    name = key.removeprefix("HW_")
    if name not in PARAMETERS:
        raise Stop(f"{key} is no parameter of {HW}; these are: HW_{', HW_'.join(PARAMETERS)}.")
    kind = type(globals()[name])
    try:
        globals()[name] = YES[("true", "false").index(text.lower())] if kind is bool else kind(text)
    except ValueError:
        raise Stop(f"{key} is {text!r}, but must be of type {kind.__name__}, not this text.") from None
for name, allowed in CHOICES.items():
    if globals()[name] not in allowed:
        raise Stop(f"{name} is {globals()[name]!r}, but must be one of {allowed}.")

on_gpu = torch.cuda.is_available() and os.environ.get("ACCELERATE_USE_CPU") != "true"
half = "bf16" if on_gpu and torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
accelerator = Accelerator(mixed_precision=half if on_gpu and MIXED_PRECISION else "no")
device, MAIN, print = accelerator.device, accelerator.is_main_process, accelerator.print
QUIET = not MAIN or "TQDM_DISABLE" in os.environ
set_seed(SEED)


@contextmanager
def aside(path):
    """Write to `path`.part, which gets its name when complete: nothing half-written is ever found."""
    part = Path(f"{path}.part")
    part.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(part, ignore_errors=True)  # left by a kill
    try:
        yield part
        shutil.rmtree(path, ignore_errors=True)
        part.replace(path)
    finally:
        shutil.rmtree(part) if part.is_dir() else part.unlink(missing_ok=True)


def show(name):
    """Keep the current figure in OUT/figures; a notebook shows it too."""
    if MAIN:
        with aside(OUT / "figures" / name) as part:
            plt.gcf().savefig(part, dpi=120, format=Path(name).suffix[1:])
        NOTEBOOK and display.display(display.Image(OUT / "figures" / name))
    plt.close()


machine = torch.cuda.get_device_name() if on_gpu else f"{device}, {os.cpu_count()} cores"
software = f"Python {sys.version.split()[0]}, torch {torch.__version__}"
hardware = f"{accelerator.num_processes} x {machine}, precision {accelerator.mixed_precision}"
print(f"{HW} at level {LEVEL}, profile {PROFILE}, seed {SEED}; {software} on {hardware}")

# %% [markdown]
# ## The environment
#
# `LunarLander-v3` of Gymnasium, with the Box2D physics engine. What the pilot sees is eight numbers:
# place $x, y$ (the pad is at 0, 0), speed, angle, angular speed, and whether each leg touches the
# ground. The reward of a step is how much nearer, slower and more upright the craft became, plus 10 for
# a leg on the ground, minus 0.3 when the main engine burns and 0.03 when a side engine does. The last
# step is worth **-100** for a crash and **+100** for coming to rest. A flight has at most 1000 steps; a
# good landing collects 200 to 300.
#
# Three quirks to know:
#
# - all chance (terrain, first push, engine noise) comes from one generator. A reset draws 16 numbers
#   from it, every step draws 2. So the terrain of the judge's second flight depends on *how long* the
#   first one was;
# - after a crash `step` raises no error, it goes on paying -100. Who replays has to look at
#   `terminated`;
# - being cut off after 1000 steps (`truncated`) is no crash: the flight would have gone on, and its
#   last state still has a value.
#
# There is no sample to generate and nothing to download: `DATA` only decides whether the file is called
# `Action_List.npy` or `Action_List.sample.npy`.

# %% cellView="form" jupyter={"source_hidden": true} tags=["common:data"]
# @title Data: find it, fetch it, or make the sample
from concurrent.futures import ThreadPoolExecutor

import requests
from filelock import FileLock  # of runs side by side, one makes the data and the others wait


def find(*roots):
    """{name: sorted paths} of FILES below the roots, however deep a download nested or packed them."""
    found = {}
    for name, (pattern, _) in FILES.items():
        hits = {path for root in roots for path in Path(root).rglob(pattern) if "__MACOSX" not in path.parts}
        hits = {path for path in hits if path.is_file() and not any(p.endswith(".part") for p in path.parts)}
        if not hits and any([unpack(root) for root in roots]):
            return find(*roots)
        if not hits:
            raise FileNotFoundError(f"there is no {pattern}")
        top = min(len(path.parts) for path in hits)
        found[name] = sorted(path for path in hits if len(path.parts) == top)
    return found


def unpack(root):
    """Unpack the archives below `root` into DATA_DIR, each at one stroke; was there a new one?"""
    new, ends = False, ("zip", "tgz", "tar.gz")
    for archive in sorted(path for end in ends for path in Path(root).rglob(f"*.{end}")):
        target, is_zip = Path(DATA_DIR, f"{archive.name}-unpacked"), archive.suffix == ".zip"
        with FileLock(f"{DATA_DIR}.lock"):
            if target.exists():
                continue
            try:
                with aside(target) as part, (zipfile.ZipFile if is_zip else tarfile.open)(archive) as pack:
                    if is_zip and any(name[0] in "/\\" or ".." in name for name in pack.namelist()):
                        raise OSError("it would write outside its folder")
                    pack.extractall(part, **({} if is_zip else {"filter": "data"}))
                    new = True
            except Exception as error:
                size = archive.stat().st_size
                raise OSError(f"{archive} ({size} bytes) is damaged, fetch it again: {error}") from None
    return new


def known(path):
    """Is it one of the course's own files, byte by byte?"""
    return bool({hashlib.new(kind, path.read_bytes()).hexdigest() for kind in ("md5", "sha256")} & HASHES)


def ask(url):
    (reply := requests.get(url, stream=True, timeout=10)).raise_for_status()
    return reply


def fetch(files):
    """{name: address, or addresses of its pieces} -> DATA_DIR; a broken download leaves nothing."""
    for name, addresses in files.items():
        with FileLock(f"{DATA_DIR}.lock"), aside(Path(DATA_DIR, name)) as part:
            with part.open("wb") as file:
                for url in addresses.split():
                    print(f"fetching {url}")
                    file.writelines(ask(url).iter_content(2**20))
            if HASHES and not known(part):
                raise OSError(f"{name} is not the course's file (its hash differs)")
    return DATA_DIR


def ask_kaggle():
    import kagglehub

    if not kagglehub.config.get_kaggle_credentials():
        raise OSError("no credentials (set KAGGLE_API_TOKEN, see https://www.kaggle.com/settings)")
    return kagglehub.competition_download(SLUG)


def sources():
    """Where the real data may be; a later place is asked only when the earlier ones had none."""
    yield from [(place, lambda: place) for place in (DATA_DIR, "/kaggle/input") if Path(place).is_dir()]
    pool, late = ThreadPoolExecutor(8), time.monotonic() + 10  # mirrors are rung together: 10 seconds in all
    rings = [pool.submit(ask, next(iter(files.values())).split()[0]) for files in MIRRORS]
    if SLUG:
        yield f"https://www.kaggle.com/competitions/{SLUG}", ask_kaggle
    for files, ring in zip(MIRRORS, rings):
        yield ", ".join(files.values()), lambda: ring.result(late - time.monotonic()) and fetch(files)


def choose_data():
    """Is it real, the paths of FILES, the folder of the hidden answers."""
    if not FILES:
        return [DATA != "sample", {}, None]
    why = f"Put {', '.join(pattern for pattern, _ in FILES.values())} into {DATA_DIR}, packed or not. Tried:"
    for place, source in sources() if DATA != "sample" else ():
        try:
            return [True, find(source(), DATA_DIR), None]
        except Exception as error:
            why += f"\n- {place}: {' '.join(str(error).split()) or type(error).__name__}"
    if DATA == "real":
        raise Stop(f"No real data was found. {why}")
    if DATA == "auto":
        print(f"NO REAL DATA WAS FOUND, this run uses the generated SAMPLE. {why}")
    folder, recipe = Path(f"{DATA_DIR}-sample", PROFILE), hashlib.md5(inspect.getsource(make_sample).encode())
    with FileLock(f"{folder}.lock"):
        if not (folder / recipe.hexdigest()).exists():  # never made, or by another make_sample
            with aside(folder) as part:
                [(part / name).mkdir(parents=True) for name in ("data", "answers", recipe.hexdigest())]
                make_sample(part / "data", part / "answers")
    return [False, find(folder / "data"), folder / "answers"]


REAL, PATHS, ANSWERS = broadcast_object_list(choose_data() if MAIN else [None] * 3)
OUT = Path(OUT_DIR, f"{LEVEL}-{'real' if REAL else 'sample'}")
SIZES = [sum(path.stat().st_size for path in hits) for hits in PATHS.values()]
counts = ", ".join(f"{len(hits)} {name} (course: {FILES[name][1]})" for name, hits in PATHS.items())
same = sum(known(hits[0]) for hits in PATHS.values() if HASHES)
print(f"data: {'real' if REAL else 'SAMPLE'}; files: {counts or 'none needed'}; known by their hash: {same}")

# %% [markdown]
# Another version of the physics makes other flights from the same seeds: a list of moves that lands
# here crashes there. The judge's very first observation tells whether this machine flies like the one
# that these notes were written on.

# %%
import gymnasium as gym


def make_env(**options):
    """The environment as the judge makes it, with its limit of 1000 steps."""
    try:
        return gym.make(ENVIRONMENT, **options)
    except (ImportError, gym.error.Error) as error:
        why = f"gymnasium {gym.__version__} cannot make {ENVIRONMENT} ({' '.join(str(error).split())})"
        raise Stop(f'{why}: pip install --upgrade "gymnasium[box2d]"') from None


torch.set_num_threads(1)  # the nets are tiny: a second thread would only wait for the first
first, _ = make_env().reset(seed=JUDGE_SEED)
COMPARABLE = bool(np.allclose(first, FINGERPRINT, atol=1e-6))
print("first observation of the judge:", *(f"{value:.4f}" for value in first))
if COMPARABLE:
    print(f"it is the known one: gymnasium {gym.__version__} flies as expected")
else:
    print(f"IT IS NOT THE KNOWN ONE: gymnasium {gym.__version__} makes other flights here. Training works,")
    print("but the submission is not comparable, a judge with another version will see it crash.")

# %% [markdown]
# ## Many landers at once
#
# The official sample flies one lander and asks the net for one move at a time, with a graph kept for
# the gradient. The net then costs several times as much as the physics. Here a whole **fleet** is in
# the air: one matrix product chooses the moves of all of them, in plain numpy, and the gradient is
# computed later, in one batch.
#
# `(logits + noise).argmax()` with Gumbel noise *is* a draw from $\text{softmax}(\text{logits})$, and
# without the noise it is the greedy move. So one line serves both, and all chance of a flight can be
# drawn beforehand.


# %%
def think(pilot, x):
    """The policy net in numpy: (landers, 8) -> logits (landers, 4)."""
    for weight, bias in pilot[:-1]:
        x = np.tanh(x @ weight + bias)
    return x @ pilot[-1][0] + pilot[-1][1]


# %% [markdown]
# A plain list of environments does what a vector environment does (the last report cell compares their
# speed), and it has no autoreset whose extra step would have to be masked. Who has landed costs
# nothing more.


# %%
class Fleet:
    """Several landers in the air at once."""

    envs = ()

    def start(self, dice):
        """New flights; dice[k] is the seed of lander k, or the state of a random generator."""
        self.envs = self.envs or [make_env().unwrapped for _ in dice]
        for env, state in zip(self.envs, dice):
            if isinstance(state, dict):
                env.np_random.bit_generator.state = state
        seeds = [None if isinstance(state, dict) else int(state) for state in dice]
        self.x = np.stack([env.reset(seed=seed)[0] for env, seed in zip(self.envs, seeds)])
        self.age, self.total = [0] * len(dice), [0.0] * len(dice)
        return self

    def fly(self, pilot, noise, again=False):
        """len(noise) steps of all -> arrays (time, landers); who is down stays down, or starts `again`."""
        shape = noise.shape[:2]
        log = {name: np.zeros((*shape, 8), np.float32) for name in ("x", "after")}
        log |= {name: np.zeros(shape, bool) for name in ("flown", "ended", "cut")}
        log |= {"action": np.zeros(shape, int), "reward": np.zeros(shape)}
        up, self.landings = range(shape[1]), []
        for t in range(shape[0]):
            log["x"][t] = self.x
            moves = (think(pilot, self.x) + noise[t]).argmax(1).tolist()
            log["action"][t] = moves
            for k in up:
                x, reward, ended, _, _ = self.envs[k].step(moves[k])
                self.age[k], self.total[k] = self.age[k] + 1, self.total[k] + float(reward)
                over = ended or self.age[k] == LIMIT
                log["flown"][t, k], log["ended"][t, k], log["cut"][t, k] = True, ended, over
                log["after"][t, k], log["reward"][t, k] = x, reward
                if over:
                    self.landings.append((self.total[k], float(reward)))
                    self.age[k], self.total[k] = 0, 0.0
                    x = self.envs[k].reset()[0] if again else x
                self.x[k] = x
            up = up if again else [k for k in up if not log["cut"][t, k]]
            if not up:
                break
        log["cut"][t] = True  # what comes later is not in this batch
        return {name: values[: t + 1] for name, values in log.items()}


# %% [markdown]
# **Seeds are the data split.** Training seeds, validation seeds (they choose the checkpoint), the
# judge's seed and the 100 unseen seeds of the honest score share no number. A trial flight takes
# terrain *and* dice from its seed, so it comes out the same whoever flies it; several processes share
# the flights.


# %%
everything = [JUDGE_SEED, *VALID_SEEDS, *UNSEEN_SEEDS]
assert len({*everything}) == len(everything) and not any(seed in TRAIN_SEEDS for seed in everything)


def fly_from(seeds, pilot, greedy):
    """One flight from each seed -> rows: total reward, steps, last reward, how often each move."""
    noise = np.stack([np.random.default_rng([seed, 12]).gumbel(size=(LIMIT, 4)) for seed in seeds], 1)
    flights = Fleet().start(seeds).fly(pilot, noise * (not greedy))
    steps = flights["flown"].sum(0)
    last = flights["reward"][steps - 1, range(len(seeds))]
    moves = [(flights["flown"] & (flights["action"] == move)).sum(0) for move in range(4)]
    return np.stack([flights["reward"].sum(0), steps, last, *moves], 1).tolist()


def trial(pilot, seeds, greedy):
    """The same, shared by all processes -> (flights, 7)."""
    with accelerator.split_between_processes(list(seeds)) as mine:
        rows = fly_from(mine, pilot, greedy) if mine else []  # there may be more processes than seeds
    return np.array(gather_object(rows))


# %% [markdown]
# Look before you learn: forty pilots who move at random. The best of them are lucky, most crash, and
# their mean is what any training has to beat.

# %%
dice = np.random.default_rng(0).gumbel(size=(LIMIT, 40, 4))
anyone = [(np.zeros((8, 4)), np.zeros(4))]  # all moves equally likely
flights = Fleet().start(range(4000, 4040)).fly(anyone, dice)
random_returns = flights["reward"].sum(0)
fig, axes = plt.subplots(1, 2, figsize=(8, 2.6))
for k in range(40):
    path = flights["x"][flights["flown"][:, k], k]
    axes[0].plot(path[:, 0], path[:, 1], linewidth=0.7)
axes[0].axhline(0, color="black", linewidth=0.8)
axes[0].set(xlabel="x", ylabel="y", title="paths; the pad is at 0, 0")
axes[1].hist(random_returns, bins=20)
axes[1].axvline(random_returns.mean(), color="black", label=f"mean {random_returns.mean():.0f}")
axes[1].set(xlabel="total reward of a flight")
axes[1].legend()
show("random.png")

# %% [markdown]
# ## The ladder
#
# All levels have the same two-layer net, the same optimizer and the same number of steps in the
# environment. What changes is the number that multiplies $\log\pi$, and with it how soon a policy may
# learn: a critic can judge a flight that is not over yet, so from *strong* on a batch is a short piece
# of many flights. Learning rate, discount and batch were tuned for each level on the validation seeds.

# %% tags=["levels"]
COMMON = dict(steps=1_000_000, rounds=10, landers=16, hidden=64, entropy=0.01, scale=0.1, lr=5e-3)
COMMON |= dict(gamma=0.99, lam=1.0, piece=0, epochs=1, batch_size=0, clip=0.0)  # 0: whole, or none
COMMON |= dict(valid=20, choose=60, unseen=100)  # flights of a round, of the last choice, of the score
CRITIC = dict(weight="advantage", gamma=0.999, lam=0.98)
LEVELS = {
    "simple": COMMON | dict(weight="reward"),
    "medium": COMMON | dict(weight="reward to go"),
    "strong": COMMON | CRITIC | dict(lr=2e-3, piece=64),
    "boss": COMMON | CRITIC | dict(lr=1.5e-3, piece=512, epochs=5, batch_size=512, clip=0.2),
}
settings = LEVELS[LEVEL]
if PROFILE == "tiny":
    settings |= dict(
        steps=18_000, rounds=3, landers=8, piece=min(256, settings["piece"]), valid=3, choose=6, unseen=12
    )
settings |= dict(steps=STEPS or settings["steps"], batch_size=BATCH_SIZE or settings["batch_size"])
settings["landers"] = max(1, settings["landers"] // accelerator.num_processes)  # each process flies its share
print(*(f"{name}: {value}" for name, value in settings.items()), sep=", ")

# %% [markdown]
# ## What multiplies log π
#
# The gradient of the expected total reward is a mean over what was flown,
#
# $$\nabla_\theta \bar R = \mathbb{E}\Big[\sum_t A_t\, \nabla_\theta \log \pi_\theta(a_t|s_t)\Big],$$
#
# and the lecture's versions differ in $A_t$. Version 0 takes the **reward** $r_t$ of this step alone:
# who brakes now for a landing later is not paid for it. Versions 1 and 2 take the **reward to go**,
# $G_t = \sum_{n \ge t} \gamma^{n-t} r_n$: right on average, but all luck of the rest of the flight is
# in it. Versions 3.5 and 4 ask a **critic** $V(s)$ what was to be expected: $\delta_t$ is how much
# better one step went than that, and the **advantage** adds up the surprises,
#
# $$\delta_t = r_t + \gamma V(s_{t+1}) - V(s_t),\quad A_t = \sum_{n \ge t} (\gamma\lambda)^{n-t} \delta_n .$$
#
# $\lambda = 0$ is version 4, $\lambda = 1$ version 3.5; $V = 0$ and $\lambda = 1$ is the reward to go.
# One function does them all. Its two masks matter: after an **ended** flight there is no future,
# $V(s_{t+1})$ counts 0. A flight that was only **cut** (the limit of 1000 steps, the end of the piece)
# has one, and its last $V(s_{t+1})$ stands for it.


# %%
def advantage(reward, value, after, ended, cut, gamma, lam):
    """All arrays are (time, landers); `after` is V of the state that a step leads to."""
    result, later = np.zeros_like(reward), 0.0
    for t in reversed(range(len(reward))):
        surprise = reward[t] + gamma * after[t] * ~ended[t] - value[t]
        result[t] = later = surprise + gamma * lam * ~cut[t] * later
    return result


def weigh(flights, value, after):
    """The number that multiplies log pi of each step, at this level."""
    reward = settings["scale"] * flights["reward"]
    if settings["weight"] == "reward":  # simple
        return reward
    if settings["weight"] == "reward to go":  # medium: nobody to ask
        value, after = np.zeros_like(reward), np.zeros_like(reward)
    return advantage(
        reward, value, after, flights["ended"], flights["cut"], settings["gamma"], settings["lam"]
    )


def normalise(weight):
    """Mean 0 and spread 1 over the batch of all processes: the simplest baseline, at every level."""

    def mean(values):
        total, count = accelerator.reduce(torch.stack([values.sum(), values.new_tensor(len(values))]), "sum")
        return total / count

    weight = weight - mean(weight)
    return weight / (mean(weight.square()).sqrt() + 1e-8)


# %% cellView="form" jupyter={"source_hidden": true} tags=["common:checkpoint"]
# @title Checkpoints: a killed run goes on where it stopped
history = []  # one row per epoch or round; it lives in the checkpoints and ends in history.csv


def bare(part):
    return accelerator.unwrap_model(part) if isinstance(part, torch.nn.Module) else part


def made_with(parts):
    """All that a checkpoint must agree with: level, own parameters, settings, data, nets."""
    mine = [globals()[name] for name in ("LEVEL", "PROFILE", "SEED", *OWN)]
    nets = [str(bare(part)) for part in parts.values() if isinstance(part, torch.nn.Module)]
    return json.dumps([mine, settings, SIZES, nets], default=str)


def save_checkpoint(stage, done, **parts):
    """All that `stage` needs to go on after `done` epochs; a part is a dict or has a state_dict."""
    parts |= {"scaler": accelerator.scaler} if accelerator.scaler else {}
    dice = gather_object([[torch.get_rng_state(), torch.cuda.get_rng_state_all() if on_gpu else []]])
    states = {name: p if isinstance(p, dict) else bare(p).state_dict() for name, p in parts.items()}
    if MAIN:
        torch.save([made_with(parts), done, history, dice, states], memory := io.BytesIO())
        with aside(OUT / "checkpoint" / f"{stage}.pt") as part:
            part.write_bytes(memory.getbuffer())
    accelerator.wait_for_everyone()


def load_checkpoint(stage, **parts):
    """Restore parts, history and random numbers; returns the epochs done, 0 without a fitting checkpoint."""
    path = OUT / "checkpoint" / f"{stage}.pt"
    if not path.exists():
        return 0
    try:
        made, done, rows, dice, states = torch.load(path, map_location="cpu", weights_only=True)
        problem = "it has other parameters" if made != made_with(parts) else "" if RESUME else "RESUME is off"
    except Exception as error:
        problem = f"it is damaged ({type(error).__name__})"
    accelerator.wait_for_everyone()
    if problem:
        print(f"{path} is set aside and training starts anew: {problem}")
        MAIN and path.replace(path.with_suffix(".set-aside"))
        return 0
    parts |= {"scaler": accelerator.scaler} if accelerator.scaler else {}
    for name, part in parts.items():
        load = part.update if isinstance(part, dict) else bare(part).load_state_dict
        load(send_to_device(states[name], device) if isinstance(part, dict) else states[name])
    history[:], (cpu, gpus) = rows, dice[accelerator.process_index % len(dice)]
    torch.set_rng_state(cpu)
    torch.cuda.set_rng_state_all(gpus) if gpus else None
    print(f"{stage}: going on after {done} epochs from {path} (RESUME = False starts anew)")
    return done


# %% [markdown]
# Actor and critic are two nets that share nothing. They start with orthogonal weights; the actor's last
# layer is nearly zero, so at first all moves are equally likely.

# %%
from torch import nn


def make_net(outputs, gain):
    """8 numbers -> two hidden layers with tanh -> outputs."""
    hidden = settings["hidden"]
    net = nn.Sequential(nn.Linear(8, hidden), nn.Tanh(), nn.Linear(hidden, hidden), nn.Tanh())
    net.append(nn.Linear(hidden, outputs))
    for layer, scale in zip(net[::2], (2**0.5, 2**0.5, gain)):
        nn.init.orthogonal_(layer.weight, scale)
        nn.init.zeros_(layer.bias)
    return net


def as_pilot(weights):
    """The actor's weights for `think`."""
    pairs = [(weights[f"{k}.weight"], weights[f"{k}.bias"]) for k in (0, 2, 4)]
    return [(np.ascontiguousarray(weight.cpu().numpy().T), bias.cpu().numpy()) for weight, bias in pairs]


actor, critic = make_net(4, 0.01), make_net(1, 1.0)
parameters = sum(weight.numel() for net in (actor, critic) for weight in net.parameters())
optimizers = [torch.optim.Adam(net.parameters(), eps=1e-5) for net in (actor, critic)]
actor, critic, actor_optimizer, critic_optimizer = accelerator.prepare(actor, critic, *optimizers)

# %% [markdown]
# ## Training
#
# **The loss.** Minus the weighted $\log\pi$ of the moves that were flown, up to *strong*. But a batch
# is good for a single step then: the policy has moved, and the flights are those of the old one. The
# boss's **PPO** weighs with the ratio $\rho = \pi_\theta(a|s) / \pi_\text{old}(a|s)$ instead, which is
# 1 at first and has the same gradient there. So it can use a batch many times, and a clip takes the
# gain away once $\rho$ has left $1 \pm 0.2$:
#
# $$L = -\min\big(\rho A,\ \text{clip}(\rho,\, 0.8,\, 1.2)\, A\big).$$
#
# A small bonus for entropy keeps the policy curious. The critic learns by plain regression what the
# flights paid.


# %%
def log_pi(logits, action):
    return logits.log_softmax(-1).gather(1, action[:, None]).squeeze(1)


def policy_loss(logits, action, weight, old):
    """One number a step (batch,), and the mean entropy of the policy."""
    now = log_pi(logits, action)
    if settings["clip"]:  # boss
        ratio = (now - old).exp()
        safe = ratio.clamp(1 - settings["clip"], 1 + settings["clip"])
        loss = -torch.min(ratio * weight, safe * weight)
    else:
        loss = -weight * now
    entropy = -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1).mean()
    return loss, entropy


def descend(net, optimizer, loss, lr):
    """One step of gradient descent; a gradient longer than 0.5 is shortened."""
    optimizer.param_groups[0]["lr"] = lr
    optimizer.zero_grad()
    accelerator.backward(loss)
    accelerator.clip_grad_norm_(net.parameters(), 0.5)
    optimizer.step()


# %% [markdown]
# A batch: what the fleet has flown, as flat tensors. The critic is asked about all states in two calls,
# long after the flight; nothing in the air waits for a gradient. `share` makes the mean over several
# processes a mean over all steps, when one process flew longer flights than another.


# %%
@torch.no_grad()
def make_batch(flights):
    """Flights (time, landers) -> tensors (steps,) on the device."""
    flown = flights["flown"]
    x, after = (torch.tensor(flights[name], device=device) for name in ("x", "after"))
    value, later = (bare(critic)(states).squeeze(-1).cpu().numpy() for states in (x, after))
    weight = weigh(flights, value, later)
    flat = {"x": x[torch.tensor(flown, device=device)]}
    flat["action"] = torch.tensor(flights["action"][flown], device=device)
    flat["weight"] = normalise(torch.tensor(weight[flown], dtype=torch.float32, device=device))
    flat["target"] = torch.tensor((weight + value)[flown], dtype=torch.float32, device=device)
    flat["old"] = log_pi(bare(actor)(flat["x"]), flat["action"])
    steps = accelerator.reduce(torch.tensor(len(flat["x"]), device=device), "sum").item()
    return flat, steps, len(flat["x"]) * accelerator.num_processes / steps


def learn(flat, steps, share, lr):
    """Actor and critic learn from one batch; returns the mean loss and entropy of the actor."""
    count, log = len(flat["x"]), []
    parts = max(1, steps // settings["batch_size"]) if settings["batch_size"] else 1
    for _ in range(settings["epochs"]):
        for rows in torch.randperm(count, device=device).tensor_split(parts):
            logits = actor(flat["x"][rows])
            loss, entropy = policy_loss(logits, *(flat[name][rows] for name in ("action", "weight", "old")))
            descend(actor, actor_optimizer, share * (loss.mean() - settings["entropy"] * entropy), lr)
            log.append(torch.stack([loss.mean().detach(), entropy.detach()]))
    for _ in range(5 if settings["weight"] == "advantage" else 0):  # strong
        for rows in torch.randperm(count, device=device).tensor_split(parts):
            error = critic(flat["x"][rows]).squeeze(-1) - flat["target"][rows]
            descend(critic, critic_optimizer, share * error.square().mean(), lr)
    return torch.stack(log).mean(0)


# %% [markdown]
# What a pilot is worth is told by flights from the validation seeds, once with drawn moves and once
# greedy. A half-trained policy, nearly undecided, often hovers for ever when it must always take its
# favourite move; a good one flies more safely that way. The better way counts.


# %%
def evaluate(pilot):
    """Mean return on the validation seeds -> (return, is it the greedy one?)."""
    seeds = VALID_SEEDS[: settings["valid"]]
    drawn, greedy = (float(trial(pilot, seeds, way)[:, 0].mean()) for way in (False, True))
    return max(drawn, greedy), greedy > drawn


def check_health(loss, entropy, value, number):
    """A policy that is lost ends the run; what was saved before stays."""
    kept = f"The checkpoint of round {number - 1} is kept; choose another SEED"
    if not np.isfinite(loss + entropy):
        raise Stop(f"The training diverged in round {number} (the loss became {loss}). {kept}.")
    if entropy < 0.05 and value < 0:
        raise Stop(f"The policy collapsed in round {number} to one move (entropy {entropy:.3f}). {kept}.")


def log(row, used):
    """A line for the reader, a row for the curves."""
    row["examples_per_second"] = used / row["seconds"]
    history.append(row)
    text = "round {round:2d} {steps:10,d} steps  loss {loss:6.3f}  entropy {entropy:.2f}  train {train:4.0f}"
    text += "  valid {valid:4.0f} {pilot:6}  lr {lr:.0e}  {seconds:.0f} s {examples_per_second:7,.0f}/s"
    print(text.format(**row))


# %% [markdown]
# Flights for learning. Up to *medium* a batch is one **whole** flight of every lander: the first
# flights to end are the crashes, so stopping at a number of steps would teach from crashes. With a
# critic a batch is a **piece** of the flights that are in the air.


# %%
def collect(fleet, fresh):
    """The next flights to learn from; `fresh`: begin anew, from seeds that torch's generator draws."""
    piece, landers = settings["piece"], settings["landers"]
    if fresh or not piece:
        fleet.start(torch.randint(TRAIN_SEEDS[0], TRAIN_SEEDS[-1], (landers,)).tolist())
    noise = -torch.empty(piece or LIMIT, landers, 4).exponential_().log()  # Gumbel
    return fleet.fly(as_pilot(bare(actor).state_dict()), noise.numpy(), again=bool(piece))


# %% [markdown]
# The loop: fly, learn, fly, learn. A **round** is a tenth of all steps and ends with an evaluation, a
# line and a checkpoint. The physics cannot be saved, a Box2D world has no state dict. So every round
# begins with new flights from new seeds; torch's generator draws them, its state is in the checkpoint,
# and a run that was killed repeats the broken round exactly. Several processes fly with different dice
# and average their gradients.


# %% tags=["train"]
def train():
    """Trains actor and critic; returns the pilot of every round, and all landings."""
    torch.manual_seed(SEED + accelerator.process_index)
    pilots, progress, fleet = {}, {"steps": 0, "landings": []}, Fleet()
    state = dict(actor=actor, critic=critic, pilots=pilots, progress=progress)
    state |= dict(actor_optimizer=actor_optimizer, critic_optimizer=critic_optimizer)
    done, rounds = load_checkpoint("train", **state), settings["rounds"]
    for number in tqdm(range(done + 1, rounds + 1), "rounds", disable=QUIET, leave=False):
        tic, losses, landings = time.perf_counter(), [], []
        steps = start = progress["steps"]
        while steps < settings["steps"] * number / rounds:
            lr = settings["lr"] * (1 - steps / settings["steps"])
            flat, count, share = make_batch(collect(fleet, fresh=steps == start))
            losses.append(learn(flat, count, share, lr))
            steps += count
            landings += [[steps, total, last] for total, last in fleet.landings]
        seconds = time.perf_counter() - tic
        loss, entropy = accelerator.reduce(torch.stack(losses).mean(0), "mean").tolist()
        pilots[f"{number}"] = {name: weight.clone() for name, weight in bare(actor).state_dict().items()}
        valid, greedy = evaluate(as_pilot(pilots[f"{number}"]))
        check_health(loss, entropy, valid, number)
        progress.update(steps=steps, landings=progress["landings"] + landings)
        row = dict(round=number, steps=steps, loss=loss, entropy=entropy, valid=valid, lr=lr, seconds=seconds)
        flown = np.mean([total for _, total, _ in landings] or [np.nan])
        row |= dict(train=float(flown), pilot="greedy" if greedy else "drawn")
        log(row, steps - start)
        save_checkpoint("train", number, **state)
    return pilots, np.array(progress["landings"])


pilots, landings = train()

# %% [markdown]
# Twenty flights a round are few: a pilot that crashes one time in fifteen often passes them. So the three
# best rounds are asked again, with more flights from validation seeds not used so far. The choice goes by
# the mean **minus its standard error**: what hangs on luck counts less.


# %%
def choose(pilots):
    """Which of the three best rounds, and which way: many flights from validation seeds not used so far."""
    best, seeds = {"sure": -np.inf}, VALID_SEEDS[settings["valid"] :][: settings["choose"]]
    for row in sorted(history, key=lambda row: row["valid"])[-3:]:
        for way in (False, True):
            returns = trial(as_pilot(pilots[f"{row['round']}"]), seeds, way)[:, 0]
            one = dict(round=row["round"], greedy=way, valid=float(returns.mean()))
            one["sure"] = one["valid"] - float(returns.std()) / len(returns) ** 0.5
            best = max(best, one, key=lambda one: one["sure"])
            text = f"round {one['round']:2d} {'greedy' if way else 'drawn':6}  mean {one['valid']:6.1f}"
            print(f"{text}, less its standard error {one['sure']:6.1f}")
    return best


best = choose(pilots)
print(f"chosen: round {best['round']}, {'greedy' if best['greedy'] else 'with drawn moves'}")

# %% [markdown]
# The curves of this run against steps in the environment: the total reward of every training flight
# (dots) and the validation; on the right how many flights end with the **+100** of a landing and the
# **-100** of a crash. The rest was cut off after 1000 steps: it hovers.

# %%
fig, axes = plt.subplots(1, 2, figsize=(8, 2.8))
landings = landings[np.argsort(landings[:, 0], kind="stable")]
axes[0].plot(landings[:, 0] / 1e6, landings[:, 1], ".", markersize=1, color="C7", label="training flights")
steps, valid = ([row[name] for row in history] for name in ("steps", "valid"))
axes[0].plot(np.array(steps) / 1e6, valid, "o-", label="validation")
axes[0].set(xlabel="million steps", ylabel="total reward", ylim=(-500, 330))
axes[0].legend(loc="lower right")
parts = [part for part in np.array_split(landings, 20) if len(part)]
for name, value in (("landed", 100), ("crashed", -100)):
    share = [np.mean(part[:, 2] == value) for part in parts]
    axes[1].plot([part[-1, 0] / 1e6 for part in parts], share, ".-", label=name)
axes[1].set(xlabel="million steps", ylabel="share of the flights", ylim=(-0.05, 1.05))
axes[1].legend()
show("curves.png")

# %% [markdown]
# ## The honest score
#
# The best pilot flies once from each of 100 seeds that had no part in anything so far. Their **mean**
# is the score of this run, and it comes with its spread: two means of 100 flights differ by about 1.4
# times the standard error by luck alone.

# %% tags=["predict"]
pilot = as_pilot(pilots[f"{best['round']}"])
unseen = trial(pilot, UNSEEN_SEEDS[: settings["unseen"]], best["greedy"])  # (flights, 7)
returns, lengths = unseen[:, 0], unseen[:, 1]
honest, spread = float(returns.mean()), float(returns.std(ddof=1))
error = spread / len(returns) ** 0.5
print(f"{len(returns)} unseen seeds: mean return {honest:.1f}, standard deviation {spread:.1f}", end=", ")
print(f"standard error {error:.1f}, worst {returns.min():.0f}, best {returns.max():.0f}")
ends = {name: f"{np.mean(unseen[:, 2] == value):.0%}" for name, value in (("landed", 100), ("crashed", -100))}
ends["cut off"] = f"{np.mean(np.abs(unseen[:, 2]) != 100):.0%}"
print(
    *(f"{name}: {share}" for name, share in ends.items()),
    f"mean length: {lengths.mean():.0f} steps",
    sep=", ",
)

# %% [markdown]
# ## Five flights for the judge
#
# The judge seeds its environment **once** with 543 and flies five episodes in a row. So the terrain of
# each hangs on the length of the ones before, and the lists must be made in the same order with the
# same generator.
#
# As the test is seeded, one may also fly every episode `BEST_OF_N` times, with other dice but from the
# same start, and hand in the best. Public solutions did so by hand. It says nothing about the policy,
# so it is shown *beside* the honest mean. It is no better pilot, only a better lottery ticket;
# `BEST_OF_N = 1` hands in the plain flights.


# %%
def fly_for_judge(pilot, greedy, tries):
    """Five lists of moves: of each episode the best of some tries, of which number 0 is the plain policy."""
    fleet, lists = Fleet(), []
    state = np.random.PCG64(JUDGE_SEED).state  # what reset(seed=543) would begin with
    for episode in range(EPISODES):
        noise = np.random.default_rng([JUDGE_SEED, episode]).gumbel(size=(tries, LIMIT, 4))
        noise[0] *= not greedy
        flights = fleet.start([state] * tries).fly(pilot, noise.swapaxes(0, 1))
        chosen = int(flights["reward"].sum(0).argmax())
        lists.append(flights["action"][flights["flown"][:, chosen], chosen].tolist())
        state = fleet.envs[chosen].np_random.bit_generator.state  # the next episode goes on from here
    return lists


def replay(lists, env=None):
    """The judge: seed once, fly the lists one after the other; the totals, or Stop with what is not valid."""
    env, totals = env or make_env(), []
    for number, moves in enumerate(lists, 1):
        env.reset(seed=JUDGE_SEED if number == 1 else None)
        total, over = 0.0, False
        for step, move in enumerate(moves, 1):
            if over:
                raise Stop(f"episode {number} is over after {step - 1} moves, but its list has {len(moves)}")
            _, reward, ended, truncated, _ = env.step(move)
            total, over = total + float(reward), ended or truncated
        if not over:
            raise Stop(f"episode {number} is not over after the {len(moves)} moves of its list")
        totals.append(total)
    return totals


# %% [markdown]
# Each choice is flown again in a fresh environment before it is written down.

# %%
plain = fly_for_judge(pilot, best["greedy"], 1)
lists, judge_plain = plain, replay(plain)
judge_file = judge_plain
tries = min(BEST_OF_N, 2) if PROFILE == "tiny" else BEST_OF_N
if tries > 1:
    chosen = fly_for_judge(pilot, best["greedy"], tries)
    try:
        totals = replay(chosen)
        if np.mean(totals) > np.mean(judge_plain):  # another first flight changes all later starts
            lists, judge_file = chosen, totals
    except Stop as problem:
        print(f"the best of {tries} does not replay ({problem}), the plain flights are used")
table = {"policy, honest mean of unseen seeds": honest, "policy, the judge's five": np.mean(judge_plain)}
table[f"best of {tries}, the judge's five"] = np.mean(judge_file)
for name, value in table.items():
    print(f"{name:40} {value:8.2f}")
print("the five in the file:", *(f"{total:.2f}" for total in judge_file))
plt.figure(figsize=(8, 2.2))
plt.hist(returns, bins=40, color="C7", label=f"{len(returns)} unseen seeds")
plt.axvline(honest, color="black", label="their mean")
for height, (name, totals) in enumerate((("judge, plain", judge_plain), ("judge, in the file", judge_file))):
    plt.plot(totals, [1 + 1.5 * height] * EPISODES, "o", label=name)
plt.xlabel("return of a flight")
plt.legend(loc="upper left")
show("returns.png")

# %% [markdown]
# ## Submission
#
# `Action_List.npy`: an object array of five plain Python lists. `np.array(lists)` would fail, the lists
# are not equally long; so an empty array is filled one by one. Beside it lies `Action_List.json`:
# versions, lengths and totals. Whoever replays the file elsewhere and gets other totals finds the
# reason there.

# %% tags=["submission"]
submission = OUT / ("Action_List.npy" if REAL else "Action_List.sample.npy")


def write_submission(path):
    array = np.empty(EPISODES, dtype=object)
    for number, moves in enumerate(lists):
        array[number] = moves
    with aside(path) as part, part.open("wb") as file:
        np.save(file, array)
    about = {"environment": ENVIRONMENT, "seed": JUDGE_SEED, "comparable": COMPARABLE}
    about |= {"gymnasium": gym.__version__, "Box2D": version("Box2D"), "numpy": np.__version__}
    about |= {"lengths": [len(moves) for moves in lists], "totals": judge_file}
    with aside(path.with_name("Action_List.json")) as part:
        part.write_text(json.dumps(about, indent=1))


# %% [markdown]
# An object array is a *pickle*, and a pickle from elsewhere may run any program when it is loaded. So
# the file is read by an unpickler that knows three names of numpy and refuses all others; lists and
# numbers need no name.

# %%
import pickle
from importlib.metadata import version


class OnlyLists(pickle.Unpickler):
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
            array = OnlyLists(file).load() if dtype.hasobject else np.load(path, allow_pickle=False)
        return [list(moves) for moves in array.tolist()]
    except Exception as error:
        raise Stop(f"{path} is no array of five lists of moves: {' '.join(str(error).split())}") from None


def check_submission(path):
    """Raises Stop with what the judge would not take."""
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


# %% [markdown]
# The judge's score of the file is a mean of five flights which the writer could choose. So
# `score_submission`, which fills the ladder, replays the file to see that it is valid, but returns the
# honest mean that was measured by flying the policy from 100 unseen seeds; what the judge would say is
# printed beside it and kept in `result.json`.


# %%
def score_submission(path, answers):
    totals = check_submission(path)
    points = sum(np.mean(totals) >= line for line in BASELINES.values())
    print(f"the judge: mean {np.mean(totals):.2f} of {EPISODES} flights, {points} of 4 points")
    print(f"the policy: mean {honest:.2f} ± {spread:.1f} of {len(returns)} flights from unseen seeds")
    return honest


speeds = [row["examples_per_second"] for row in history]
summary = dict(valid_score=best["valid"], parameters=parameters, examples_per_second=float(np.median(speeds)))
summary |= dict(honest_mean=honest, honest_spread=spread, judge_plain=float(np.mean(judge_plain)))
summary |= dict(judge_file=float(np.mean(judge_file)), best_of=tries, greedy=best["greedy"])
summary |= dict(comparable=COMPARABLE)
if MAIN:
    write_submission(submission)
    print(f"{submission}: {submission.stat().st_size} bytes, moves:", *(len(moves) for moves in lists))

# %% cellView="form" jupyter={"source_hidden": true} tags=["common:submit"]
# @title Submission: check it, score it, send it
score = None
if MAIN:
    try:
        check_submission(submission)  # raises Stop with what is wrong
    except Stop:
        submission.replace(f"{submission}.rejected")
        raise
    score = float(score_submission(submission, ANSWERS)) if ANSWERS or not FILES else None
    print(f"{submission} is valid, {METRIC}: {'only the judge knows' if score is None else round(score, 5)}")
    command = ["kaggle", "competitions", "submit", SLUG, "-f", str(submission), "-m", f"{HW} {LEVEL}"]
    if not REAL:
        print("It belongs to a sample run, nothing is sent: DATA = 'real' makes the file for the judge.")
    elif not SUBMIT or not SLUG:
        print(f"to send it: {' '.join(command)}\nor" * bool(SLUG), f"upload it at {JUDGE}")
    elif subprocess.call(command):
        raise Stop(f"Kaggle did not take {submission}; the file is complete, upload it at {JUDGE}")


def other_levels(here):
    """{level: its result}, simple first: `here` for this level, and the runs that stand beside this one."""
    paths = {level: OUT.parent / OUT.name.replace(LEVEL, level) / "result.json" for level in CHOICES["LEVEL"]}
    there = {level: json.loads(path.read_text()) for level, path in paths.items() if path.exists()}
    found = {level: one for level, one in there.items() if one["profile"] == PROFILE} | {LEVEL: here}
    return {level: found[level] for level in CHOICES["LEVEL"][::-1] if level in found}


# %% [markdown] tags=["report"]
# ## Report
#
# **The landing.** Six moments of the first flight in the file. Drawing changes nothing: the flight
# drawn here is replayed with the same totals.


# %%
def film(lists, pictures):
    """Replays the file with a camera: pictures of its first flight at equal distances."""
    env = make_env(render_mode="rgb_array")
    wanted = np.linspace(0, len(lists[0]) - 1, pictures).astype(int)
    env.reset(seed=JUDGE_SEED)
    frames = []
    for step, move in enumerate(lists[0]):
        env.step(move)
        if step in wanted:
            frames.append((step + 1, env.render()))
    return frames


if PROFILE == "tiny":
    print("no pictures in the tiny profile")
elif MAIN:
    fig, axes = plt.subplots(1, 6, figsize=(8, 2.1))
    for axis, (step, frame) in zip(axes, film(lists, 6)):
        axis.imshow(frame[:, 150:450])
        axis.set_title(f"step {step}", fontsize=8)
        axis.set_axis_off()
    show("landing.jpg")
    same = np.allclose(replay(lists, make_env(render_mode="rgb_array")), judge_file, atol=1e-6, rtol=0)
    print("replayed with the camera on: the totals are", "the same" if same else "OTHERS")

# %% [markdown] tags=["report"]
# **1. The algorithm, and how it differs from plain policy gradient.** The four rungs, as far as they
# were run in this folder. Each has the same net and as many steps in the environment.


# %%
import pandas as pd

levels = other_levels(summary | {"settings": settings})
curves = {level: OUT.parent / OUT.name.replace(LEVEL, level) / "history.csv" for level in levels}
curves = {level: pd.read_csv(path) for level, path in curves.items() if level != LEVEL}
curves |= {LEVEL: pd.DataFrame(history)}
heads = ["", "weight of log pi", "steps", "training", "unseen seeds", "judge: plain", "in the file"]
rows = []
for level, result in levels.items():
    row = [level, result["settings"]["weight"], f"{curves[level]['steps'].iloc[-1]:,d}"]
    row += [
        f"{curves[level]['seconds'].sum():.0f} s",
        f"{result['honest_mean']:.1f} ± {result['honest_spread']:.1f}",
    ]
    rows.append([*row, f"{result['judge_plain']:.1f}", f"{result['judge_file']:.1f}"])
for row in (heads, *rows):
    print("{:8}{:18}{:>10}{:>10}{:>16}{:>14}{:>13}".format(*row))

# %% [markdown] tags=["report"]
# The learning curves of all of them against steps in the environment, so none is helped by a faster
# computer.

# %%
plt.figure(figsize=(8, 2.8))
for level in levels:
    plt.plot(curves[level]["steps"] / 1e6, curves[level]["valid"], "o-", markersize=4, label=level)
plt.axhline(200, color="black", linewidth=0.8, label="a good landing")
plt.xlabel("million steps in the environment")
plt.ylabel("return on validation seeds")
plt.legend(loc="center left", bbox_to_anchor=(1, 0.5))
show("levels.png")

# %% [markdown] tags=["report"]
# **How noisy is each weight?** On one and the same batch of flights, of the last round's policy: the
# spread of the number that multiplies $\log\pi$, in units of reward. What varies for reasons that the
# move had no part in is noise in the gradient. A critic takes away what was to be expected; $\lambda$
# says how far ahead the rest is added up.

# %%
count = min(32, settings["unseen"])
noise = np.random.default_rng(1).gumbel(size=(LIMIT, count, 4))
flights = Fleet().start(range(4000, 4000 + count)).fly(as_pilot(bare(actor).state_dict()), noise)
reward, none = flights["reward"], np.zeros_like(flights["reward"])
masks, flown = (flights["ended"], flights["cut"]), flights["flown"]
weights = {"reward": reward}
for gamma in (0.99, 0.999):
    weights[f"reward to go, gamma {gamma}"] = advantage(reward, none, none, *masks, gamma, 1.0)
if settings["weight"] == "advantage":
    with torch.no_grad():
        values = [bare(critic)(torch.tensor(flights[k], device=device)) for k in ("x", "after")]
    value, after = (v.squeeze(-1).cpu().numpy() / settings["scale"] for v in values)
    for lam in (1.0, settings["lam"], 0.0):
        name = f"advantage, gamma {settings['gamma']}, lambda {lam}"
        weights[name] = advantage(reward, value, after, *masks, settings["gamma"], lam)
for name, weight in weights.items():
    print(f"{name:36} spread {weight[flown].std():7.2f}")

# %% [markdown] tags=["report"]
# **What the pilot does**: its paths from unseen seeds, and how often it makes each move.

# %%
fig, axes = plt.subplots(1, 2, figsize=(8, 2.6))
count = min(30, settings["unseen"])
noise = np.random.default_rng(2).gumbel(size=(LIMIT, count, 4)) * (not best["greedy"])
flights = Fleet().start(list(UNSEEN_SEEDS[:count])).fly(pilot, noise)
for k in range(count):
    path = flights["x"][flights["flown"][:, k], k]
    axes[0].plot(path[:, 0], path[:, 1], linewidth=0.7)
axes[0].axhline(0, color="black", linewidth=0.8)
axes[0].set(xlabel="x", ylabel="y", title=f"{count} flights from unseen seeds")
axes[1].bar(MOVES, unseen[:, 3:].sum(0) / lengths.sum())
axes[1].set(ylabel="share of the moves", title=f"{len(returns)} flights from unseen seeds")
show("pilot.png")

# %% [markdown] tags=["report"]
# **In words**, from the settings of this run:

# %%
kinds = {"reward": "the reward of the step alone", "reward to go": "the discounted sum of all later rewards"}
kinds["advantage"] = "the generalised advantage, from a critic that learns by regression"
text = f"""Level {LEVEL}: policy gradient; log pi is weighed by {kinds[settings["weight"]]}, normalised
over the batch; gamma {settings["gamma"]}. Actor: 8-{settings["hidden"]}-{settings["hidden"]}-4, tanh; Adam,
learning rate {settings["lr"]}, falling to 0 over {history[-1]["steps"]:,} steps; entropy bonus
{settings["entropy"]}. """
if settings["piece"]:
    text += f"""A batch is {settings["piece"]} steps of {settings["landers"]} landers, lambda
{settings["lam"]}; the critic's value stands for what comes after a cut. """
else:
    text += f"A batch is one whole flight of {settings['landers']} landers. "
if settings["clip"]:
    text += f"""PPO: each batch is used {settings["epochs"]} times in parts of {settings["batch_size"]}
steps, the ratio of new to old probability is clipped at 1 ± {settings["clip"]}; plain policy gradient
uses a batch once. """
text += f"""The pilot of round {best["round"]} was chosen on {settings["choose"]} validation flights. Over
{len(returns)} unseen seeds its mean return is {honest:.1f}, the standard deviation {spread:.1f}."""
print(" ".join(text.split()))

# %% [markdown] tags=["report"]
# **2. MuZero** ([Schrittwieser and others, 2019](https://arxiv.org/abs/1911.08265)). The course asks
# which of four statements is false. By the paper:
#
# - *(a) It joins a tree search with a learned model.* So the abstract says.
# - *(b) The agent does not know how the environment really moves from state to state.* It learns a
#   dynamics function of its own hidden states, which only has to predict reward, policy and value.
# - *(c) It uses Monte Carlo tree search in training.* The search chooses the moves of the games that it
#   learns from, and the policy is trained towards the visit counts of the search. The gradient step
#   itself runs no search: it unrolls the learned model along the moves that were played. If one
#   statement was meant to be false, it can only be this one, read narrowly.
# - *(d) It does not need the rules of the game.* The abstract again: it plays Go, chess and shogi
#   without any knowledge of the rules, its model is learned.
#
# No official key is public, so this is our reading.

# %% [markdown] tags=["report"]
# **3. What is a fleet worth?** Steps a second of the official sample's way (one lander, one net call and
# one piece of graph a step), of Gymnasium's vector environment, and of the fleet: the same net, the same
# physics, choosing moves only.


# %%
def plain_loop(steps):
    """As in the official sample: a categorical distribution a step, its log-probability kept for later."""
    net, env, kept = make_net(4, 0.01), make_env(), []
    x, _ = env.reset(seed=4000)
    for _ in range(steps):
        draw = torch.distributions.Categorical(logits=net(torch.tensor(x)))
        move = draw.sample()
        kept.append(draw.log_prob(move))
        x, _, ended, cut, _ = env.step(move.item())
        if ended or cut:
            x, _ = env.reset()
    return steps


def vector_loop(steps):
    """Gymnasium's own way to have 16 environments; the moves are chosen as in the fleet."""
    envs, crew = gym.make_vec(ENVIRONMENT, 16, vectorization_mode="sync"), as_pilot(bare(actor).state_dict())
    noise = -torch.empty(steps // 16, 16, 4).exponential_().log().numpy()
    x, _ = envs.reset(seed=4000)
    for dice in noise:
        x, *_ = envs.step((think(crew, x) + dice).argmax(1))
    return steps


def fleet_loop(steps):
    fleet, crew = Fleet().start(range(4000, 4016)), as_pilot(bare(actor).state_dict())
    fleet.fly(crew, -torch.empty(steps // 16, 16, 4).exponential_().log().numpy(), again=True)
    return steps


speed, loops = {}, {"one at a time": plain_loop, "vector environment": vector_loop, "fleet": fleet_loop}
for name, work in loops.items():
    steps, tic = (2000 if name == "one at a time" else 16_000), time.perf_counter()
    speed[name] = work(steps if PROFILE == "full" else steps // 10) / (time.perf_counter() - tic)
    print(
        f"{name:18} {speed[name]:8,.0f} steps/s, {speed[name] / speed['one at a time']:4.1f} times the first"
    )
reached = [row for row in history if row["valid"] >= 200]
spent = sum(row["seconds"] for row in history if reached and row["round"] <= reached[0]["round"])
print(f"mean return 200 in validation: {f'after {spent:.0f} s of training' if reached else 'not reached'}")

# %% cellView="form" jupyter={"source_hidden": true} tags=["common:result"]
# @title Result
result = {"hw": HW, "level": LEVEL, "data": "real" if REAL else "sample", "profile": PROFILE, "seed": SEED}
result |= {"metric": METRIC, "score": score, **summary, "seconds": round(time.perf_counter() - START, 1)}
result |= {"device": machine, "torch": torch.__version__, "settings": settings}
if MAIN:
    import pandas as pd

    with aside(OUT / "history.csv") as part:
        pd.DataFrame(history).to_csv(part, index=False)
    with aside(OUT / "result.json") as part:
        part.write_text(json.dumps(result, indent=1, default=str))
print(f"submission: {submission}\nscore: {METRIC} {score}\nresult: {OUT / 'result.json'}")
