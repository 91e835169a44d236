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
