# %% cellView="form" jupyter={"source_hidden": true} tags=["common:setup"]
# @title Setup: packages, parameters, device
import importlib.util
import os
import shutil
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

NOTEBOOK, START = "ipykernel" in sys.modules, time.perf_counter()


class Stop(Exception):
    """Ends the run with one sentence that says what a person can do."""


def explain(kind, error, trace):
    """What a person can mend ends in one sentence, all else in the usual traceback."""
    size = globals().get("settings", {}).get("batch_size", "?")
    memory = (
        f"The device has too little memory for batch size {size}: set BATCH_SIZE to half, then run again."
    )
    stopped = "Stopped by hand. The last checkpoint is kept: run again to go on from there."
    text = {"Stop": str(error), "KeyboardInterrupt": stopped, "OutOfMemoryError": memory}.get(kind.__name__)
    if isinstance(error, OSError) and error.errno in (
        1,
        13,
        17,
        20,
        27,
        28,
        30,
        122,
    ):  # not allowed, disk full
        text = f"{error.filename or OUT_DIR}: {error.strerror}. Free space or set OUT_DIR; nothing complete is lost."
    if not NOTEBOOK:
        return sys.stderr.write(f"{HW}: {text}\n") if text else sys.__excepthook__(kind, error, trace)
    return shell._showtraceback(kind, error, [text]) if text else shell.showtraceback((kind, error, trace))


sys.excepthook = explain
if NOTEBOOK:
    from IPython import get_ipython
    from IPython.display import Image, display

    shell = get_ipython()
    shell.set_custom_exc((Exception, KeyboardInterrupt), lambda shell, *error, **rest: explain(*error))

CHOICES = {"LEVEL": ("boss", "strong", "medium", "simple"), "DATA": ("auto", "real", "sample")}
CHOICES |= {
    "PROFILE": ("full", "tiny"),
    "SEED": range(2**32),
    "RESUME": (True, False),
    "SUBMIT": (True, False),
}
PARAMETERS = [*CHOICES, "DATA_DIR", "OUT_DIR", *OWN]
for key, text in [pair for pair in os.environ.items() if pair[0].startswith("HW_")]:
    name = key.removeprefix("HW_")
    if name not in PARAMETERS:
        raise Stop(f"{key} is no parameter of {HW}; these are: HW_{', HW_'.join(PARAMETERS)}.")
    kind = type(globals()[name])
    try:
        globals()[name] = {"true": True, "false": False}[text.lower()] if kind is bool else kind(text)
    except (KeyError, ValueError):
        raise Stop(f"{key} is {text!r}, but must be a {kind.__name__} like {globals()[name]!r}.") from None
for name, allowed in CHOICES.items():
    if globals()[name] not in allowed:
        raise Stop(f"{name} is {globals()[name]!r}, but must be one of {allowed}.")
missing = [package for module, package in NEEDS.items() if importlib.util.find_spec(module) is None]
if missing and subprocess.call([sys.executable, "-m", "pip", "install", "-q", *missing]):
    raise Stop(
        f"Packages are missing and could not be installed; try by hand: pip install {' '.join(missing)}"
    )

import matplotlib
import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object, set_seed
from tqdm import tqdm

if not NOTEBOOK:
    matplotlib.use("Agg")  # a script draws into files and opens no window
import matplotlib.pyplot as plt

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
    try:
        shutil.rmtree(part) if part.is_dir() else part.unlink(missing_ok=True)
        yield part
        shutil.rmtree(path, ignore_errors=True)
        part.replace(path)
    finally:
        shutil.rmtree(part) if part.is_dir() else part.unlink(missing_ok=True)


def show(name):
    """Keep the current figure in OUT/figures; a notebook shows it too."""
    if MAIN:
        with aside(OUT / "figures" / name) as part:
            plt.savefig(part, dpi=100, bbox_inches="tight", format=Path(name).suffix[1:])
        display(Image(OUT / "figures" / name)) if NOTEBOOK else None
    plt.close()


machine = torch.cuda.get_device_name() if on_gpu else f"{device}, {os.cpu_count()} cores"
print(
    f"{HW}, level {LEVEL}, profile {PROFILE}, seed {SEED}; {accelerator.num_processes} x {machine}, precision"
)
print(f"{accelerator.mixed_precision}; Python {sys.version.split()[0]}, torch {torch.__version__}")


# %% cellView="form" jupyter={"source_hidden": true} tags=["common:data"]
# @title Data: find it, fetch it, or make the sample
import hashlib
import inspect
import tarfile
import zipfile
from concurrent.futures import ThreadPoolExecutor
from urllib.request import Request, urlopen


def find(*roots):
    """{name: sorted paths} of FILES, however deep a download nested them."""
    found = {}
    for name, (pattern, _) in FILES.items():
        hits = [path for root in roots for path in Path(root).rglob(pattern)]
        hits = [path for path in hits if not any(junk in str(path) for junk in (".part", "__MACOSX"))]
        top = min((len(path.parts) for path in hits), default=0)
        found[name] = sorted({path for path in hits if len(path.parts) == top})
    if not all(found.values()):
        raise FileNotFoundError(
            f"it has no {', no '.join(FILES[name][0] for name in FILES if not found[name])}"
        )
    return found


def unpack(root):
    """Unpack the archives below `root` into DATA_DIR, each at one stroke and with nothing outside its folder."""
    for archive in sorted(path for end in ("zip", "tgz", "tar.gz") for path in Path(root).rglob(f"*.{end}")):
        target, is_zip = Path(DATA_DIR, f"{archive.name}-unpacked"), archive.suffix == ".zip"
        try:
            if not target.exists():
                with aside(target) as part, (zipfile.ZipFile if is_zip else tarfile.open)(archive) as pack:
                    if is_zip and any(name[0] in "/\\" or ".." in name for name in pack.namelist()):
                        raise OSError("it would write outside its own folder")
                    pack.extractall(part, **({} if is_zip else {"filter": "data"}))
        except Exception as error:
            raise OSError(
                f"{archive} ({archive.stat().st_size} bytes) is damaged, fetch it again: {error}"
            ) from None


def known(path):
    """Is it one of the course's own files, byte by byte?"""
    return {
        hashlib.md5(path.read_bytes()).hexdigest(),
        hashlib.sha256(path.read_bytes()).hexdigest(),
    } & HASHES


def ask(url):
    return urlopen(Request(url, headers={"User-Agent": "Mozilla/5.0"}), timeout=10)


def fetch(files):
    """{name: address, or addresses of its pieces} -> DATA_DIR; a file gets its name when it is complete."""
    for name, addresses in files.items():
        with aside(Path(DATA_DIR, name)) as part:
            for url in addresses.split():
                with ask(url) as reply, part.open("ab") as file:
                    start, size = file.tell(), int(reply.headers["Content-Length"] or 0)
                    print(f"fetching {url} ({size / 1e6:.1f} MB)")
                    shutil.copyfileobj(reply, file)
                    if size and file.tell() - start != size:
                        raise OSError(f"{name} broke off after {file.tell() - start} of {size} bytes")
            if HASHES and not known(part):
                raise OSError(f"{name} is not the course's file (another hash)")
    return DATA_DIR


def ask_kaggle():
    import kagglehub

    if not kagglehub.config.get_kaggle_credentials():
        raise OSError("no credentials (set KAGGLE_API_TOKEN, see https://www.kaggle.com/settings)")
    return kagglehub.competition_download(SLUG)


def sources():
    """Where the real data may be; a later place is asked only when the earlier ones had none."""
    yield from [(place, lambda: place) for place in (DATA_DIR, "/kaggle/input") if Path(place).is_dir()]
    late, pool = (
        time.monotonic() + 10,
        ThreadPoolExecutor(8),
    )  # all mirrors are rung at once, 10 seconds for all
    rings = [pool.submit(ask, next(iter(files.values())).split()[0]) for files in MIRRORS]
    if SLUG:
        yield f"https://www.kaggle.com/competitions/{SLUG}", ask_kaggle
    for files, ring in zip(MIRRORS, rings):
        yield ", ".join(files.values()), lambda: ring.result(max(0, late - time.monotonic())) and fetch(files)


def real_data():
    """The paths of the first complete source, and why the others were passed over."""
    why = ""
    for place, source in sources():
        try:
            root = source()
            try:
                return find(root, DATA_DIR), why
            except FileNotFoundError:
                [unpack(folder) for folder in (root, DATA_DIR)]  # twice, for archives in archives
                return find(root, DATA_DIR), why
        except Exception as error:
            why += f"\n- {place}: {next(iter(str(error).strip().splitlines()), type(error).__name__)}"
    why += f"\nPut {', '.join(pattern for pattern, _ in FILES.values())} into {DATA_DIR}, packed or not."
    return {}, why


def sample_data():
    """The sample, made once and again when make_sample changes; the answers are for the judge alone."""
    folder, recipe = Path(f"{DATA_DIR}-sample", PROFILE), hashlib.md5(inspect.getsource(make_sample).encode())
    if not (folder / recipe.hexdigest()).exists():
        with aside(folder) as part:
            [(part / name).mkdir(parents=True) for name in ("data", "answers", recipe.hexdigest())]
            make_sample(part / "data", part / "answers")
    return find(folder / "data"), folder / "answers"


def choose_data():
    """Is it real, the paths of FILES, the folder of the hidden answers."""
    paths, why = real_data() if FILES and DATA != "sample" else ({}, "")
    if paths or not FILES:
        return [DATA != "sample", paths, None]
    if DATA == "real":
        raise Stop(f"DATA is 'real', but no real data was found:{why}")
    if DATA == "auto":
        print(f"NO REAL DATA WAS FOUND, this run uses the generated SAMPLE:{why}\n")
    return [False, *sample_data()]


REAL, PATHS, ANSWERS = broadcast_object_list(choose_data() if MAIN else [None] * 3)
OUT = Path(OUT_DIR, f"{LEVEL}-{'real' if REAL else 'sample'}")
counts = ", ".join(f"{name} {len(hits)} (course {FILES[name][1]})" for name, hits in PATHS.items())
sure = sum(bool(HASHES) and bool(known(hits[0])) for hits in PATHS.values())
print(f"data: {'real' if REAL else 'SAMPLE'}; files: {counts or 'none needed'}; known by their hash: {sure}")


# %% cellView="form" jupyter={"source_hidden": true} tags=["common:checkpoint"]
# @title Checkpoints: a killed run goes on where it stopped
import json

history = []  # one row per epoch or round; it lives in the checkpoints and ends in history.csv


def bare(part):
    return accelerator.unwrap_model(part) if isinstance(part, torch.nn.Module) else part


def made_with(parts):
    """All that a checkpoint must agree with: level, parameters, settings, data and nets."""
    mine = {name: globals()[name] for name in ("LEVEL", "PROFILE", "SEED", *OWN)}
    data = {name: sum(path.stat().st_size for path in hits) for name, hits in PATHS.items()}
    nets = [str(bare(part)) for part in parts.values() if isinstance(part, torch.nn.Module)]
    return json.dumps([mine, settings, data, nets], default=str)


def save_checkpoint(stage, done, **parts):
    """All that `stage` needs to go on after `done` epochs; a part is a dict or has a state_dict."""
    dice = gather_object([[torch.get_rng_state(), torch.cuda.get_rng_state_all() if on_gpu else []]])
    states = {
        name: part if isinstance(part, dict) else bare(part).state_dict() for name, part in parts.items()
    }
    if MAIN:
        with aside(OUT / "checkpoint" / f"{stage}.pt") as part:
            try:
                torch.save([made_with(parts), done, history, dice, states], part)
            except RuntimeError as error:  # torch's word for a full disk
                raise OSError(28, f"the checkpoint cannot be written ({error})", str(part)) from None
    accelerator.wait_for_everyone()


def load_checkpoint(stage, **parts):
    """Restore parts, history and random numbers; returns the epochs done, 0 without a fitting checkpoint."""
    path, problem = OUT / "checkpoint" / f"{stage}.pt", "RESUME is off"
    if not path.exists():
        return 0
    try:
        made, done, history[:], dice, states = torch.load(path, map_location="cpu", weights_only=True)
        problem = problem if not RESUME else "it has other parameters" * (made != made_with(parts))
    except Exception as error:
        problem = f"it is damaged ({type(error).__name__})"
    accelerator.wait_for_everyone()
    if problem:
        print(f"{path} is set aside and the training starts anew: {problem}")
        MAIN and path.replace(path.with_suffix(".set-aside"))
        history.clear()
        return 0
    for name, part in parts.items():
        part.update(states[name]) if isinstance(part, dict) else bare(part).load_state_dict(states[name])
    cpu, gpus = dice[accelerator.process_index % len(dice)]
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
    if ANSWERS or not FILES:
        score = float(score_submission(submission, ANSWERS))
    command = ["kaggle", "competitions", "submit", SLUG, "-f", str(submission), "-m", f"{HW} {LEVEL}"]
    print(f"{submission} is valid; {METRIC}: {score if score is not None else 'known to the judge alone'}")
    if not REAL:
        print(
            "It answers generated questions: there is nothing to send. DATA = 'real' makes the file for the judge."
        )
    elif not SUBMIT or not SLUG:
        print(f"send it with: {' '.join(command)}\n" * bool(SLUG) + f"or upload it at {JUDGE}")
    elif subprocess.call(command):
        raise Stop(f"Kaggle did not take {submission}; it is complete, upload it at {JUDGE}")

# %% cellView="form" jupyter={"source_hidden": true} tags=["common:result"]
# @title Result
result = {
    "hw": HW,
    "level": LEVEL,
    "data": "real" if REAL else "sample",
    "profile": PROFILE,
    "metric": METRIC,
}
result |= {"score": score, **summary, "seconds": round(time.perf_counter() - START, 1), "seed": SEED}
result |= {
    "device": machine,
    "torch": torch.__version__,
    "python": sys.version.split()[0],
    "settings": settings,
}
if MAIN:
    columns = dict.fromkeys(name for row in history for name in row)
    rows = [list(columns), *([row.get(name, "") for name in columns] for row in history)]
    with aside(OUT / "history.csv") as part:
        part.write_text("\n".join(",".join(map(str, row)) for row in rows))
    with aside(OUT / "result.json") as part:
        part.write_text(json.dumps(result, indent=1, default=str))
print(f"submission: {submission}\nscore: {METRIC} {score}\nresult: {OUT / 'result.json'}")
