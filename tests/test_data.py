"""Where data may come from, and what can be wrong with it: a clear sentence, nothing half-written."""

import bz2
import gzip
import hashlib
import io
import os
import re
import shutil
import socket
import struct
import sys
import tarfile
import threading
import time
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from conftest import one_sentence
from filelock import FileLock
from notebooks import common_cells

pytestmark = pytest.mark.common


@pytest.fixture
def short(script, tmp_path):
    """The toy up to its data: it ends when they are read."""
    text = script.read_text()
    copy = tmp_path / "short" / "TOY.py"
    copy.parent.mkdir()
    copy.write_text(text[: text.index("plt.figure(figsize=(4, 3))")])
    return copy


@pytest.fixture
def files(straight):
    """{name: content} of data in the real layout: the tiny sample's, with one row less to tell them apart."""
    folder = straight[2] / "data/TOY-sample/tiny/data"
    lines = (folder / "toy.train.csv").read_bytes().splitlines(keepends=True)
    return {"toy.train.csv": b"".join(lines[:-1]), "toy.test.csv": (folder / "toy.test.csv").read_bytes()}


def write(folder, files):
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def zipped(files):
    memory = io.BytesIO()
    with zipfile.ZipFile(memory, "w") as pack:
        for name, data in files.items():
            pack.writestr(name, data)
    return memory.getvalue()


def member(name, data=b"", **other):
    one = tarfile.TarInfo(name)
    one.size = len(data)
    for key, value in other.items():
        setattr(one, key, value)
    return one, io.BytesIO(data)


def tarred(members, mode="w:gz"):
    memory = io.BytesIO()
    with tarfile.open(fileobj=memory, mode=mode) as pack:
        for one, data in members:
            pack.addfile(one, data)
    return memory.getvalue()


def members(files):
    return [member(name, data) for name, data in files.items()]


def good(ended, *words):
    assert ended.code == 0, ended.text
    for word in ("data: real", "31 rows to learn from", *words):
        assert word in ended.text, f"{word!r} is not in:\n{ended.text}"
    nothing_half_written(ended.folder)
    return ended


def nothing_half_written(folder):
    assert not list(folder.rglob("*.part")), list(folder.rglob("*.part"))


# where it lies


@pytest.mark.parametrize(
    "name", ["toy.train.csv", "deep/er/toy_new_train.csv", "TOY.TRAIN.CSV", "a..b/toy..train.csv"]
)
def test_data_that_is_there_is_used_and_nothing_is_fetched(run, short, files, tmp_path, name):
    write(tmp_path / "given", {name: files["toy.train.csv"], "toy.test.csv": files["toy.test.csv"]})
    done = good(run(short, HW_DATA="auto", HW_DATA_DIR=tmp_path / "given").wait(), name)
    assert "fetching" not in done.text and "SAMPLE" not in done.text


PLACES = ["data/TOY/", ".", "data", "~", "data/../data/TOY", "data/TOY-sample", ""]


@pytest.mark.parametrize("place", PLACES)
def test_the_sample_is_never_taken_for_data(run, short, tmp_path, place):
    for _ in range(2):
        done = run(short, HW_DATA="auto", HW_DATA_DIR=place, HOME=tmp_path / "home").wait()
        assert done.code == 0 and "data: SAMPLE" in done.text and "data: real" not in done.text, done.text
    assert len(list(tmp_path.rglob("toy.train.csv"))) == 1
    shutil.copytree(next(tmp_path.rglob("tiny")), tmp_path / "data" / "TOY" / "kept")
    assert "data: real" not in run(short, HW_DATA="auto", HW_DATA_DIR="data").wait().text


def test_a_tilde_finds_the_data_at_home(run, short, files, tmp_path):
    write(tmp_path / "home" / "mine", files)
    good(run(short, HW_DATA="real", HW_DATA_DIR="~/mine/", HOME=tmp_path / "home").wait())


def test_kaggles_own_machines_have_it_in_a_folder(run, short, changed, files, tmp_path):
    write(tmp_path / "input" / "toy-slug", files)
    copy = changed(short, 'Path("/kaggle/input")', f"Path({str(tmp_path / 'input')!r})")
    good(run(copy, HW_DATA="auto").wait(), "input/toy-slug/toy.train.csv")


def test_candidates_stand_in_their_order(run, short, files, tmp_path):
    """The plain name before the copy of a download, the near one before the deep one; a bad one is none."""
    folder = write(tmp_path / "given", files)
    for name in ("toy.train (1).csv", "toy.train2021.csv", "old/toy.train.csv"):
        write(folder, {name: b"id,x,y\n1,2,3\n"})
    good(
        run(short, HW_DATA="real", HW_DATA_DIR=folder).wait(),
        "given/toy.train.csv and 3 more (the course has 1)",
    )
    (folder / "toy.train (1).csv").write_bytes(files["toy.train.csv"])
    (folder / "toy.train.csv").write_bytes(b"<html>")
    good(run(short, HW_DATA="real", HW_DATA_DIR=folder).wait())


def test_of_many_files_those_count_that_lie_nearest():
    text = common_cells()["common:data"].source
    space = {"Path": Path}
    exec(re.search(r"def pick\(.*?\n\n\n", text, re.DOTALL)[0], space)
    choose = space["pick"]
    near, deep = [Path(f"a/{k}.JPG") for k in range(3)], [Path(f"a/thumbs/{k}.jpg") for k in range(3)]
    assert choose("*.jpg", 3, deep[::-1] + near[::-1]) == near
    assert choose("*.jpg", 1, deep[:1] + near[:1]) == near[:1] + deep[:1]
    assert choose("train/*.jpg", 9, [Path("x/train/1.jpg"), Path("x/test/1.jpg")]) == [Path("x/train/1.jpg")]


def test_no_files_needed(run, short, changed, tmp_path):
    ends = changed(
        short, 'FILES = {"train"', 'NO = {"train"', "x, y = read", "raise Stop(str((PATHS, ANSWERS)))\nx, y"
    )
    text = ends.read_text().replace("NO = {", "FILES = {}\nNO = {")
    ends.write_text(text)
    one_sentence(run(ends, HW_DATA="auto").wait(), r"TOY: \(\{\}, None\)", "data: real")


# packed


PACKED = {
    "toy.zip": zipped,
    "TOY.ZIP": zipped,
    "toy.tar.gz": lambda files: tarred(members(files)),
    "toy.tgz": lambda files: tarred(members(files)),
    "toy.tar": lambda files: tarred(members(files), "w"),
    "toy.tar.bz2": lambda files: tarred(members(files), "w:bz2"),
    "toy.Tar.xz": lambda files: tarred(members(files), "w:xz"),
    "in/toy.zip": lambda files: zipped({"in/toy.zip": zipped(files)}),
    "outer.zip": lambda files: zipped({"inner.tar": tarred(members(files), "w")}),
    "two dots.zip": lambda files: zipped({f"a..b/{name}": data for name, data in files.items()}),
    "ml2022.zip": lambda files: zipped({f"./x/y/{name.upper()}": data for name, data in files.items()}),
}


@pytest.mark.parametrize("name", PACKED)
def test_archives_may_stay_packed(run, short, files, tmp_path, name):
    write(tmp_path / "packed", {name: PACKED[name](files)})
    given = {path.name: path.stat() for path in (tmp_path / "packed").iterdir()}
    good(run(short, HW_DATA="real", HW_DATA_DIR=tmp_path / "packed").wait())
    assert given.keys() <= {path.name for path in (tmp_path / "packed").iterdir()}


def test_single_files_may_stay_packed(run, short, files, tmp_path):
    write(tmp_path / "packed", {f"{name}.gz": gzip.compress(data) for name, data in files.items()})
    good(run(short, HW_DATA="real", HW_DATA_DIR=tmp_path / "packed").wait())


def test_two_archives_of_one_name(run, short, files, tmp_path):
    for part, (name, data) in zip("ab", files.items(), strict=True):
        write(tmp_path / "packed" / part, {"toy.zip": zipped({name: data})})
    good(run(short, HW_DATA="real", HW_DATA_DIR=tmp_path / "packed").wait())


def test_a_replaced_archive_is_unpacked_anew(run, short, files, tmp_path):
    other = {name: data.replace(b"\n0,", b"\n900,7,7\n0,") for name, data in files.items()}
    other["toy.test.csv"] = files["toy.test.csv"]
    write(tmp_path / "packed", {"toy.zip": zipped(other)})
    first = run(short, HW_DATA="real", HW_DATA_DIR=tmp_path / "packed").wait()
    assert "32 rows to learn from" in first.text, first.text
    write(tmp_path / "packed", {"toy.zip": zipped(files)})
    good(run(short, HW_DATA="real", HW_DATA_DIR=tmp_path / "packed").wait())


def test_an_unpacked_archive_is_not_unpacked_again_unless_it_was_touched(run, short, files, tmp_path):
    write(tmp_path / "packed", {"toy.zip": zipped(files)})
    good(run(short, HW_DATA="real", HW_DATA_DIR=tmp_path / "packed").wait())
    (there,) = tmp_path.glob("packed/unpacked/*/toy.train.csv")
    before = there.stat().st_ino
    good(run(short, HW_DATA="real", HW_DATA_DIR=tmp_path / "packed").wait())
    assert there.stat().st_ino == before
    there.write_bytes(there.read_bytes()[:99])
    good(run(short, HW_DATA="real", HW_DATA_DIR=tmp_path / "packed").wait())


def test_what_a_mac_adds_and_half_written_files_are_no_data(run, short, files, tmp_path):
    junk = {f"__MACOSX/{name}": b"\0" for name in files} | {"new.part/toy.train.csv": b"\0"}
    deep = {f"a/b/c/{name}": data for name, data in files.items()}
    done = run(short, HW_DATA="real", HW_DATA_DIR=write(tmp_path / "given", deep | junk)).wait()
    assert "more (the course" not in done.text and "31 rows" in done.text, done.text
    write(tmp_path / "packed", {"toy.zip": zipped(deep | junk)})
    done = run(short, HW_DATA="real", HW_DATA_DIR="packed").wait()
    assert "more (the course" not in done.text and "31 rows" in done.text, done.text


BROKEN = {
    "truncated.zip": lambda files: zipped(files)[:-99],
    "truncated.tgz": lambda files: tarred(members(files))[:-99],
    "pointer.zip": lambda files: b"version https://git-lfs.github.com/spec/v1",
    "pointer.tar": lambda files: b"version https://git-lfs.github.com/spec/v1",
    "empty.zip": lambda files: b"",
    "crc.zip": lambda files: zipped(files).replace(b"id,x,y", b"id,y,x"),
    "page.gz": lambda files: b"<!DOCTYPE html>",
    "cut.csv.gz": lambda files: gzip.compress(files["toy.train.csv"])[:-20],
    "cut.tar.bz2": lambda files: bz2.compress(b"x" * 9999)[:-5],
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_archive_is_named_and_hides_no_good_one(run, short, files, tmp_path, name):
    folder = write(tmp_path / "packed", {f"aaa.{name}": BROKEN[name](files)})
    ended = run(short, HW_DATA="real", HW_DATA_DIR=folder).wait()
    one_sentence(ended, rf"aaa.{name}: damaged \(\d+ bytes, .*\): fetch it again", r"Put toy\*train\*.csv")
    nothing_half_written(tmp_path)
    assert not list(folder.glob("unpacked/*/"))
    write(folder, {"zzz.zip": zipped(files)})
    good(run(short, HW_DATA="real", HW_DATA_DIR=folder).wait())


def escape(up):
    """CVE-2025-4517: links, so many that a path is no longer resolved, and one that then leads out."""
    chain, path, long = "abcdefghijklmnop", "", "d" * 247
    for step in chain:
        yield member(os.path.join(path, long), type=tarfile.DIRTYPE)
        yield member(os.path.join(path, step), type=tarfile.SYMTYPE, linkname=long)
        path = os.path.join(path, long)
    link = os.path.join("/".join(chain), "l" * 254)
    yield member(link, type=tarfile.SYMTYPE, linkname="../" * len(chain))
    yield member("escape", type=tarfile.SYMTYPE, linkname=f"{link}/{up}")
    yield member("toy.link", type=tarfile.LNKTYPE, linkname="escape/victim.txt")
    yield member("toy.link", b"evil")
    yield member("escape/evil.txt", b"evil")


HOSTILE = {
    "long links": lambda out: escape("../" * 3),
    "symlink": lambda out: [
        member("a", type=tarfile.SYMTYPE, linkname=f"{out}"),
        member("a/evil.txt", b"evil"),
    ],
    "hardlink": lambda out: [
        member("b", type=tarfile.LNKTYPE, linkname=f"{out}/victim.txt"),
        member("b", b"evil"),
    ],
    "link up": lambda out: [
        member("c", type=tarfile.SYMTYPE, linkname="../../.."),
        member("c/evil.txt", b"evil"),
    ],
    "device": lambda out: [member("toy.train.csv", type=tarfile.CHRTYPE), member("p", type=tarfile.FIFOTYPE)],
    "absolute": lambda out: [member(f"{out}/evil.txt", b"evil")],
    "dots": lambda out: [member("../../../evil.txt", b"evil")],
}


@pytest.mark.parametrize("fault", HOSTILE)
def test_a_hostile_tarball_writes_nothing_outside(run, short, files, tmp_path, fault):
    """Whatever it holds besides the data: it is unpacked without that, or named as damaged."""
    (tmp_path / "victim.txt").write_text("mine")
    hostile = tarred([*members(files), *HOSTILE[fault](tmp_path)])
    write(tmp_path / "packed", {"toy.tgz": hostile})
    ended = run(short, HW_DATA="real", HW_DATA_DIR=tmp_path / "packed").wait()
    assert "Traceback" not in ended.text, ended.text
    assert "data: real" in ended.text or "toy.tgz: damaged" in ended.text
    assert (tmp_path / "victim.txt").read_text() == "mine"
    inside = tmp_path / "packed" / "unpacked"
    assert not [path for path in tmp_path.rglob("evil.txt") if inside not in path.parents]
    assert not [
        path for path in inside.rglob("*") if path.is_symlink() or not (path.is_file() or path.is_dir())
    ]
    nothing_half_written(tmp_path)


@pytest.mark.parametrize("name", ["../../../evil.txt", "/tmp/../{out}/evil.txt", "a/../../../../evil.txt"])
def test_a_hostile_zip_writes_nothing_outside(run, short, files, tmp_path, name):
    write(tmp_path / "packed", {"toy.zip": zipped(files | {name.format(out=tmp_path): b"evil"})})
    run(short, HW_DATA="real", HW_DATA_DIR=tmp_path / "packed").wait()
    inside = tmp_path / "packed" / "unpacked"
    assert not [path for path in tmp_path.rglob("evil.txt") if inside not in path.parents]


# the sample


def test_another_make_sample_makes_it_anew(run, short, changed, tmp_path):
    """Its own text, a function that it calls, a number that it reads."""
    before = None
    for old, new in [
        ("x, y", "x, y"),
        ("0.1\n", "0.2\n"),
        ("sin(3 * x)", "sin(2 * x)"),
        ("rng(0)", "rng(1)"),
    ]:
        copy = (
            changed(short, f"NOISE = {old}" if "\n" in old else old, f"NOISE = {new}" if "\n" in old else new)
            if old != new
            else short
        )
        done = run(copy).wait()
        assert done.code == 0, done.text
        data = (tmp_path / "data/TOY-sample/tiny/data/toy.train.csv").read_bytes()
        assert data != before, f"{new}: the old sample is still there"
        before = data


@pytest.mark.parametrize("fault", ["deleted", "cut", "one more", "answers"])
def test_a_sample_that_was_touched_is_made_again(run, short, tmp_path, fault):
    run(short).wait()
    folder = tmp_path / "data/TOY-sample/tiny"
    good_bytes = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    train = folder / "data" / "toy.train.csv"
    if fault == "deleted":
        train.unlink()
    elif fault == "cut":
        train.write_bytes(train.read_bytes()[:-30])
    elif fault == "one more":
        (folder / "data" / "toy.train2.csv").write_text("id,x,y\n")
    else:
        shutil.rmtree(folder / "answers")
    done = run(short).wait()
    assert done.code == 0, done.text
    assert good_bytes == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_an_intact_sample_is_kept_and_each_size_has_its_own(run, short, tmp_path):
    inodes = {}
    for profile in ("tiny", "small", "full", "auto", "tiny"):
        assert run(short, HW_PROFILE=profile).wait().code == 0
        for path in (tmp_path / "data/TOY-sample").glob("*/data/toy.train.csv"):
            inodes.setdefault(path.parts[-3], set()).add(path.stat().st_ino)
    assert inodes.keys() == {"tiny", "full"} and all(len(one) == 1 for one in inodes.values())


def test_a_folder_of_the_user_is_never_replaced(run, short, tmp_path):
    mine = tmp_path / "data/TOY-sample/tiny/thesis.txt"
    write(tmp_path, {mine.relative_to(tmp_path): b"mine"})
    one_sentence(run(short).wait(), r"TOY-sample/tiny cannot be written .*move what is in the way")
    assert mine.read_text() == "mine"


def test_a_half_made_sample_is_no_sample(run, short, tmp_path):
    """Killed while it is made, and in the moment between the old and the new one."""
    spoil = "import numpy, os\nnumpy.save = lambda *rest: os._exit(9)"
    assert run(short, patch=spoil).wait().code == 9
    assert not (tmp_path / "data/TOY-sample/tiny").exists()
    assert run(short).wait().code == 0
    nothing_half_written(tmp_path)


# fetched


class Files(BaseHTTPRequestHandler):
    """Serves `files`; a tuple (bytes, announced length) breaks off, a number is a status."""

    files, asked = {}, []

    def do_GET(self):
        self.asked.append(self.path)
        found = self.files.get(self.path, 404)
        if callable(found):
            return found(self)
        self.send_response(found if isinstance(found, int) else 200)
        data, size = found if isinstance(found, tuple) else (b"" if isinstance(found, int) else found, None)
        self.send_header("Content-Length", str(size or len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_POST(self):
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.do_GET()

    def log_message(self, *rest):
        pass


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request, address):
        pass  # a client that gave up


@pytest.fixture
def server():
    """serve(files, port=0) -> (address of a web server on this machine, the paths it is asked for)."""
    started = []

    def serve(files, port=0):
        handler = type("Handler", (Files,), {"files": files, "asked": []})
        one = Server(("127.0.0.1", port), handler)
        threading.Thread(target=one.serve_forever, daemon=True).start()
        started.append(one)
        return f"http://127.0.0.1:{one.server_address[1]}", handler.asked

    yield serve
    for one in started:
        one.shutdown()
        one.server_close()


def with_mirrors(short, changed, mirrors, hashes=()):
    return changed(
        short, "MIRRORS = []", f"MIRRORS = {mirrors!r}", "HASHES = set()", f"HASHES = {set(hashes)!r}"
    )


def reset(request):
    """The line goes dead in the middle."""
    request.wfile.write(b"HTTP/1.0 200 OK\r\nContent-Length: 999\r\n\r\nid,x,y")
    request.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    request.connection.close()


def mirror(at, place):
    return {f"toy.{part}.csv": f"{at}/{place}/{part}" for part in ("train", "test")}


def test_mirrors_in_order_with_hashes(run, short, changed, server, files, tmp_path):
    """Gone, refused, broken off, a web page, another file, nothing at all; the last is good."""
    train, test = files.values()
    page = b"  <!DOCTYPE html><p>Google Drive can't scan this file</p>"
    served = {"/refused/train": 403, "/broken/train": (train[:99], len(train)), "/page/train": page}
    served |= {
        "/other/train": train + b" ",
        "/empty/train": b"",
        "/good/a": train[:99],
        "/good/b": train[99:],
    }
    served |= {
        f"/{place}/test": test for place in ("refused", "broken", "page", "other", "empty", "reset", "good")
    }
    served |= {"/reset/train": reset}
    at, asked = server(served)
    mirrors = [
        mirror(at, place) for place in ("gone", "refused", "broken", "page", "other", "empty", "reset")
    ]
    hashes = [hashlib.md5(train).hexdigest(), hashlib.sha256(test).hexdigest()]
    ended = run(with_mirrors(short, changed, mirrors, hashes), HW_DATA="real").wait()
    said = [
        "HTTP Error 404",
        "HTTP Error 403",
        "broke off after 99 of",
        "it is a web page",
        "its hash differs",
    ]
    one_sentence(
        ended,
        *said,
        "broke off after 0 of . bytes",
        "reset by peer",
        "no credentials",
        "No real data was found",
        "Put toy",
    )
    nothing_half_written(tmp_path)
    assert not list(tmp_path.glob("data/TOY/*.csv"))
    mirrors += [{"toy.train.csv": f"{at}/good/a {at}/good/b", "toy.test.csv": f"{at}/good/test"}]
    asked.clear()
    good(run(with_mirrors(short, changed, mirrors, hashes), HW_DATA="real").wait())
    assert (tmp_path / "data/TOY/toy.train.csv").read_bytes() == train
    fetched = [path for path in asked if "/good/" in path]
    assert fetched.index("/good/b") > 0 and fetched.count("/good/b") == 1
    assert asked.index("/page/train", len(mirrors)) > asked.index("/broken/train", len(mirrors))


def test_a_mirror_that_drips_is_given_up(run, short, changed, server, files, tmp_path):
    """A byte now and then, on a clock that runs 40 times faster."""

    def drip(request):
        request.send_response(200)
        request.send_header("Content-Length", str(10**9))
        request.end_headers()
        for _ in range(600):
            request.wfile.write(b"7")
            time.sleep(0.05)

    at, _ = server(
        {"/slow/train": drip, "/good/train": files["toy.train.csv"], "/good/test": files["toy.test.csv"]}
    )
    fast = "import time\nreal, start = time.monotonic, time.monotonic()\n"
    fast += "time.monotonic = lambda: start + 40 * (real() - start)"
    copy = with_mirrors(short, changed, [mirror(at, "slow"), mirror(at, "good")])
    one = run(copy, HW_DATA="real", patch=fast)
    tic = time.monotonic()
    good(one.wait(30))
    assert time.monotonic() - tic < 10


def test_a_slow_start_is_no_drip(run, short, changed, server, files):
    """Big files begin slowly: the first ten seconds nobody counts."""

    def slow(request):
        time.sleep(0.3)
        request.send_response(200)
        request.end_headers()
        for part in files["toy.train.csv"].splitlines(keepends=True):
            request.wfile.write(part)
            time.sleep(0.01)

    at, _ = server({"/slow/train": slow, "/slow/test": files["toy.test.csv"]})
    good(run(with_mirrors(short, changed, [mirror(at, "slow")]), HW_DATA="real").wait())


HOLE = """
import time, urllib.request
def urlopen(request, timeout=None):
    assert timeout and timeout <= 10, "it would wait for ever"
    time.sleep(60)
urllib.request.urlopen = urlopen
"""
CLIENT = """
import sys, types, pathlib, time
kagglehub = types.ModuleType("kagglehub")
kagglehub.config = types.SimpleNamespace(get_kaggle_credentials=lambda: "me")
def competition_download(slug):
    for word in ("begin", "end"):
        with open("asked.log", "a") as log:
            log.write(f"{word} {slug}\\n")
        time.sleep(0.4)
    return "from kaggle"
kagglehub.competition_download = competition_download
sys.modules["kagglehub"] = kagglehub
import io, urllib.request
real = urllib.request.urlopen
def urlopen(request, timeout=None):
    return io.BytesIO() if "kaggle.com" in request.full_url else real(request, timeout=timeout)
urllib.request.urlopen = urlopen
"""


def test_auto_without_network_is_on_the_sample_soon(run, short, changed, tmp_path):
    """A network that swallows everything: with a mirror; with credentials and a mirror; two runs at once."""
    copy = with_mirrors(
        short, changed, [mirror("http://127.0.0.1:9", "x"), mirror("http://127.0.0.1:9", "y")]
    )
    runs = []
    for name, patch in (("without", HOLE), ("with", CLIENT + HOLE)):
        (tmp_path / name).mkdir()
        runs.append(run(copy, folder=tmp_path / name, patch=patch, HW_DATA="auto"))
    for one in runs:
        assert one.until(lambda one=one: "at level" in one.text), one.text  # the search begins
    tic = time.monotonic()
    for one in runs:
        assert one.until(lambda one=one: "data: SAMPLE" in one.text, seconds=20), one.text
        assert "NO REAL DATA WAS FOUND, this run uses the generated SAMPLE" in one.text
        assert "wait for ever" not in one.text
        one.process.kill()
    assert time.monotonic() - tic < 19
    assert not (tmp_path / "with" / "asked.log").exists(), "Kaggle did not answer and was asked all the same"


def test_an_address_that_never_ends_its_answer_is_given_up(run, short, changed, server, files):
    """Every address is opened with a time limit."""
    look = "import urllib.request\nreal = urllib.request.urlopen\ndef urlopen(request, timeout=None):\n"
    look += "    print('limit', timeout)\n    return real(request, timeout=timeout)\n"
    look += "urllib.request.urlopen = urlopen"
    at, _ = server({"/x/train": files["toy.train.csv"], "/x/test": files["toy.test.csv"]})
    done = good(run(with_mirrors(short, changed, [mirror(at, "x")]), HW_DATA="real", patch=look).wait())
    limits = [line.split()[1] for line in done.text.splitlines() if line.startswith("limit ")]
    assert len(limits) == 3 and all(limit != "None" and float(limit) <= 10 for limit in limits)


def test_real_without_network_says_what_was_tried(run, short, changed, tmp_path):
    tried = tmp_path / "tried.log"
    copy = with_mirrors(short, changed, [mirror("https://toy.example", "x")])
    ended = run(copy, HW_DATA="real", OFFLINE_LOG=tried).wait()
    one_sentence(
        ended, "No real data was found", "no credentials", "https://toy.example/x/train.*: .*offline"
    )
    one_sentence(ended, "data/TOY: there is no toy", "/kaggle/input: there is no toy", "Put toy")
    assert "toy.example" in tried.read_text()
    assert "kaggle" not in tried.read_text(), "Kaggle was asked without credentials"
    assert not list(tmp_path.rglob("*.csv"))


def test_kaggle_comes_before_the_mirrors(run, short, changed, server, files, tmp_path):
    write(tmp_path / "from kaggle", files)
    wrong = {f"/x/{part}": b"id,x,y\n1,2,3\n" for part in ("train", "test")}
    at, asked = server(wrong)
    done = run(with_mirrors(short, changed, [mirror(at, "x")]), HW_DATA="auto", patch=CLIENT).wait()
    good(done, "from kaggle/toy.train.csv")
    assert "fetching" not in done.text and "/x/test" not in asked


def test_two_runs_ask_kaggle_one_after_the_other(run, short, files, tmp_path):
    """Its client keeps what it fetched: the second only has to wait."""
    write(tmp_path / "from kaggle", files)
    wanted = {"HW_DATA": "real", "patch": CLIENT}
    both = [run(short, log=f"{k}.log", HW_OUT_DIR=f"out/{k}", **wanted) for k in range(2)]
    assert [one.wait().code for one in both] == [0, 0], both[0].text + both[1].text
    assert (tmp_path / "asked.log").read_text() == "begin toy-slug\nend toy-slug\n" * 2


def test_two_runs_fetch_once_and_the_second_says_that_it_waits(run, short, changed, server, files, tmp_path):
    def slow(name):
        def answer(request):
            time.sleep(0.4)
            request.send_response(200)
            request.end_headers()
            request.wfile.write(files[name])

        return answer

    at, _ = server({"/x/train": slow("toy.train.csv"), "/x/test": slow("toy.test.csv")})
    copy = with_mirrors(short, changed, [mirror(at, "x")])
    both = [run(copy, HW_DATA="real", log=f"{k}.log", HW_OUT_DIR=f"out/{k}") for k in range(2)]
    texts = [good(one.wait()).text for one in both]
    assert "".join(texts).count("fetching") == 2
    assert "".join(texts).count("waiting for another run that is at work on data/TOY") == 1


def test_two_runs_side_by_side_share_one_sample(run, short, tmp_path):
    """The second waits for the first, here: for the lock that this test holds, and says so."""
    (tmp_path / "data/TOY-sample").mkdir(parents=True)
    with FileLock(tmp_path / "data/TOY-sample/tiny.lock"):
        both = [run(short, log=f"{k}.log", HW_OUT_DIR=f"out/{k}") for k in range(2)]
        for one in both:
            assert one.until(lambda one=one: "waiting for another run that is at work on" in one.text), (
                one.text
            )
        assert not list(tmp_path.rglob("*.csv"))
    assert [one.wait().code for one in both] == [0, 0], both[0].text + both[1].text
    nothing_half_written(tmp_path)


def test_a_data_dir_that_is_a_file(run, short, changed, server, files, tmp_path):
    at, _ = server({"/x/train": files["toy.train.csv"], "/x/test": files["toy.test.csv"]})
    (tmp_path / "data").write_text("mine")
    copy = with_mirrors(short, changed, [mirror(at, "x")])
    one_sentence(run(copy, HW_DATA="real").wait(), "data/TOY.* cannot be written")
    one_sentence(run(copy, HW_DATA="sample").wait(), "data/TOY-sample/tiny cannot be written")


@pytest.mark.parametrize("kind", ["loop", "long", "folders in place of files", "link to nothing"])
def test_odd_paths_are_no_data_and_no_traceback(run, short, tmp_path, kind):
    if kind == "loop":
        (tmp_path / "given").symlink_to(tmp_path / "given")
    elif kind == "link to nothing":
        (tmp_path / "given").symlink_to(tmp_path / "nothing")
    elif kind != "long":
        (tmp_path / "given" / "toy.train.csv").mkdir(parents=True)
    given = "x" * 300 if kind == "long" else "given"
    one_sentence(run(short, HW_DATA="real", HW_DATA_DIR=given).wait(), "No real data was found", "Put toy")
    ended = run(short, HW_DATA="auto", HW_DATA_DIR=given).wait()
    if kind == "long":
        one_sentence(ended, "File name too long")
    else:
        assert ended.code == 0 and "data: SAMPLE" in ended.text, ended.text


def test_full_disk_while_fetching_names_the_file(run, short, changed, server, files, tmp_path):
    spoil = "import os\ndef fsync(file):\n    raise OSError(28, 'No space left on device')\nos.fsync = fsync"
    at, _ = server({"/x/train": files["toy.train.csv"], "/x/test": files["toy.test.csv"]})
    ended = run(with_mirrors(short, changed, [mirror(at, "x")]), HW_DATA="real", patch=spoil).wait()
    one_sentence(ended, r"data/TOY/toy.train.csv cannot be written \(No space left on device\)")
    assert not list(tmp_path.rglob("toy.train.csv*"))


ASK = "/api/v1/competitions.CompetitionApiService/DownloadDataFiles"
REACHED = """
import io, urllib.request
urllib.request.urlopen = lambda request, timeout=None: io.BytesIO()  # www.kaggle.com answers
"""


@pytest.mark.skipif(sys.version_info < (3, 11), reason="Kaggle's current client needs Python 3.11")
@pytest.mark.parametrize("answer", ["data", "refused"])
def test_kaggles_own_client(run, short, server, files, tmp_path, answer):
    """It, against a small server on the port that its test environment uses."""
    try:
        _, asked = server({ASK: zipped(files) if answer == "data" else 403}, port=7777)
    except OSError as error:
        pytest.skip(f"port 7777 is taken: {error}")
    env = {"KAGGLE_API_ENVIRONMENT": "TEST", "KAGGLE_USERNAME": "nobody", "KAGGLE_KEY": "dummy"}
    env |= {"KAGGLEHUB_CACHE": tmp_path / "cache", "HW_DATA": "real"}
    ended = run(short, patch=REACHED, **env).wait()
    assert ASK in asked, ended.text
    if answer == "data":
        good(ended, "cache/")
    else:
        one_sentence(ended, "403", "https://www.kaggle.com/competitions/toy-slug: ")


MUTANTS = [
    ("plain = [member for member in pack if member.isfile() or member.isdir()]", "plain = list(pack)"),
    ("{mark.parent for mark in root.rglob(MARK)} - {root}", "set()"),
    ('fingerprint(make_sample, f"{PLUMBING} PROFILE")', '"always"'),
    ('fingerprint(make_sample, f"{PLUMBING} PROFILE")', "fingerprint(make_sample)"),
    (
        "if not (folder / MARK).exists() or (folder / MARK).read_text() != state(folder):",
        "if not folder.exists():",
    ),
    ("if not (folder / MARK).exists() or (folder / MARK).read_text() != state(folder):", "if True:"),
    ("elif Path(path, MARK).exists():", "elif path.exists():"),
    ("remove(part)  # left by a kill", "pass"),
    (r"\.part(/|$)|__MACOSX", "__MACOSX"),
    (r"\.part(/|$)|__MACOSX", r"\.part(/|$)"),
    ("key=lambda path: (len(path.parts), len(path.name), path)", "key=lambda path: path"),
    ("if count == 1 or len(path.parts) == len(hits[0].parts)", ""),
    ("if Path(str(path).lower()).match(pattern.lower())", "if path.match(pattern)"),
    ("        passed_over[archive] = f", "        raise\n        passed_over[archive] = f"),
    ("hashlib.md5(str(archive).encode())", "hashlib.md5(archive.name.encode())"),
    ('f"{state.st_size} {state.st_mtime_ns}"', '""'),
    ("path.name.lower().endswith(ENDINGS)", "path.name.endswith(ENDINGS)"),
    ("archives[1:] + inside", "archives[1:]"),
    ("urllib.request.urlopen(request, timeout=10)", "urllib.request.urlopen(request)"),
    ("if size == 0 and chunk.lstrip()", "if size < 0 and chunk.lstrip()"),
    ("if size < max(length, 1):", "if size < length:"),
    ("if size < max(length, 1):", "if size == 0:"),
    ("size < 20_000 * (time.monotonic() - tic - 10)", "size < 0"),
    ("size < 20_000 * (time.monotonic() - tic - 10)", "size < 20_000 * (time.monotonic() - tic)"),
    ("if HASHES and not HASHES &", "if HASHES and not {1} &"),
    ("if HASHES and not HASHES &", "if False and not HASHES &"),
    ("sums = [hashlib.md5(), hashlib.sha256()]", "sums = [hashlib.md5()]"),
    ("    if SLUG:\n        found = attempt(", "    if SLUG and not MIRRORS:\n        found = attempt("),
    (
        "    for files, answer in zip(MIRRORS, rings):",
        "    for files, answer in zip(MIRRORS[::-1], rings[::-1]):",
    ),
    ("if not kagglehub.config.get_kaggle_credentials():", "if False:"),
    ('POOL.submit(ring, "https://www.kaggle.com").result(10)', "pass"),
    ("timeout=max(0, late - time.monotonic())", "timeout=60"),
    ('for folder in (DATA_DIR, Path("/kaggle/input")):', "for folder in (DATA_DIR,):"),
    ("    with hold(DATA_DIR):\n        for name", "    if True:\n        for name"),
    ("    with hold(DATA_DIR):  # a second", "    if True:  # a second"),
    ('FileLock(f"{path}.lock", is_singleton=True)', 'FileLock(f"{path}.{os.getpid()}.lock")'),
    ('say(f"waiting for', 'str(f"waiting for'),
    ('    if DATA == "real":', "    if False:"),
    ('    if DATA == "auto":', "    if False:"),
]
