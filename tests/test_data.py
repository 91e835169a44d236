"""Where data may come from, and what can be wrong with it: a clear sentence, nothing half-written."""

import hashlib
import io
import re
import shutil
import sys
import tarfile
import threading
import time
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from notebooks import facts

pytestmark = pytest.mark.common


@pytest.fixture
def real(straight, tmp_path):
    """A folder with files in the real layout: the tiny sample's."""
    folder = tmp_path / "given"
    shutil.copytree(straight[2] / "data" / "HW01-sample" / "tiny" / "data", folder)
    return folder


class Files(BaseHTTPRequestHandler):
    """Serves `files`; a tuple (bytes, announced length) breaks off, a number is a status."""

    files, asked = {}, []

    def do_GET(self):
        self.asked.append(self.path)
        found = self.files.get(self.path, 404)
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


@pytest.fixture
def server():
    """serve(files, port=0) -> address of a web server on this machine."""
    started = []

    def serve(files, port=0):
        handler = type("Handler", (Files,), {"files": files, "asked": []})
        one = ThreadingHTTPServer(("127.0.0.1", port), handler)
        threading.Thread(target=one.serve_forever, daemon=True).start()
        started.append(one)
        return f"http://127.0.0.1:{one.server_address[1]}", handler.asked

    yield serve
    for one in started:
        one.shutdown()
        one.server_close()


def with_mirrors(script, changed, mirrors, hashes=()):
    known = facts(script)
    text = script.read_text()
    start, end = text.index("MIRRORS = ["), text.index("OWN = [")
    old = text[start:end]
    assert known["MIRRORS"] and known["HASHES"]
    return changed(script, old, f"MIRRORS = {mirrors!r}\nHASHES = {set(hashes)!r}\n")


def zipped(files):
    memory = io.BytesIO()
    with zipfile.ZipFile(memory, "w") as pack:
        for name, data in files.items():
            pack.writestr(name, data)
    return memory.getvalue()


def tarred(files):
    memory = io.BytesIO()
    with tarfile.open(fileobj=memory, mode="w:gz") as pack:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            pack.addfile(info, io.BytesIO(data))
    return memory.getvalue()


def clean(tmp_path):
    """Nothing half-written, nothing outside."""
    assert not list(tmp_path.glob("**/*.part")) and not (tmp_path / "evil.txt").exists()


def test_data_that_is_there_is_used_and_nothing_is_fetched(run, script, hw, real):
    done = run(script, HW_DATA="auto", HW_DATA_DIR=real, HW_LEVEL="medium").wait()
    assert done.code == 0 and "data: real" in done.text and "fetching" not in done.text, done.text


@pytest.mark.parametrize("ending", ["crlf", "bom"])
@pytest.mark.parametrize("names", ["covid.{}_new.csv", "deep/er/covid_{}.csv"])
def test_other_names_and_endings(run, script, hw, real, ending, names):
    for part in ("train", "test"):
        data = (real / f"covid.{part}.csv").read_bytes()
        data = data.replace(b"\n", b"\r\n") if ending == "crlf" else b"\xef\xbb\xbf" + data
        (real / names.format(part)).parent.mkdir(parents=True, exist_ok=True)
        (real / f"covid.{part}.csv").unlink()
        (real / names.format(part)).write_bytes(data)
    done = run(script, HW_DATA="real", HW_DATA_DIR=real, HW_LEVEL="medium").wait()
    assert done.code == 0 and "train: 400 rows x 118 columns" in done.text, done.text


@pytest.mark.parametrize("kind", ["zip", "tar.gz", "zip in zip"])
def test_archives_may_stay_packed(run, script, hw, real, tmp_path, kind):
    files = {f"nested/{path.name}": path.read_bytes() for path in real.iterdir()}
    packed = tmp_path / "packed"
    packed.mkdir()
    data = tarred(files) if kind == "tar.gz" else zipped(files)
    data = zipped({"inner.zip": data}) if kind == "zip in zip" else data
    (packed / f"covid.{kind.split()[0]}").write_bytes(data)
    done = run(script, HW_DATA="real", HW_DATA_DIR=packed, HW_LEVEL="medium").wait()
    assert done.code == 0 and "data: real" in done.text, done.text
    clean(tmp_path)


@pytest.mark.parametrize("kind", ["zip", "tgz"])
@pytest.mark.parametrize("fault", ["truncated", "pointer", "outside"])
def test_bad_archives(run, script, hw, real, changed, tmp_path, kind, fault):
    files = {path.name: path.read_bytes() for path in real.iterdir()}
    files |= {"../../evil.txt": b"evil"} if fault == "outside" else {}
    data = zipped(files) if kind == "zip" else tarred(files)
    data = {"truncated": data[: len(data) // 2], "pointer": b"version https://git-lfs...", "outside": data}[
        fault
    ]
    packed = tmp_path / "a" / "packed"
    packed.mkdir(parents=True)
    (packed / f"covid.{kind}").write_bytes(data)
    offline = with_mirrors(script, changed, [])
    ended = run(offline, HW_DATA="real", HW_DATA_DIR=packed).wait()
    assert ended.code == 1 and f"covid.{kind}" in ended.text and "damaged, fetch it again" in ended.text
    assert "Traceback" not in ended.text
    clean(tmp_path)
    assert not list(packed.glob("*-unpacked"))


def test_mirrors_in_order_with_hashes(run, script, hw, real, changed, server, tmp_path):
    """Refused, gone, broken off, wrong hash; the fifth is good."""
    train, test = ((real / f"covid.{part}.csv").read_bytes() for part in ("train", "test"))
    files = {
        "/3/train": (train[:999], len(train)),
        "/3/test": test,
        "/4/train": train + b" ",
        "/4/test": test,
    }
    files |= {"/1/train": 403, "/1/test": 403, "/5/a": train[:500], "/5/b": train[500:], "/5/test": test}
    at, asked = server(files)
    mirrors = [
        {"covid.train.csv": f"{at}/{k}/train", "covid.test.csv": f"{at}/{k}/test"} for k in (1, 2, 3, 4)
    ]
    mirrors += [{"covid.train.csv": f"{at}/5/a {at}/5/b", "covid.test.csv": f"{at}/5/test"}]
    hashes = [hashlib.md5(train).hexdigest(), hashlib.sha256(test).hexdigest()]
    copy = with_mirrors(script, changed, mirrors, hashes)
    done = run(copy, HW_DATA="real", HW_LEVEL="medium").wait()
    assert done.code == 0 and "known by their hash: 2" in done.text, done.text
    assert (tmp_path / "data/HW01/covid.train.csv").read_bytes() == train
    clean(tmp_path)
    for name in ("covid.train.csv", "covid.test.csv"):
        (tmp_path / "data/HW01" / name).unlink()
    copy = with_mirrors(script, changed, mirrors[:4], hashes)
    ended = run(copy, HW_DATA="real", HW_LEVEL="medium").wait()
    assert ended.code == 1 and "Traceback" not in ended.text
    for word in (
        "403",
        "404",
        "IncompleteRead",
        "its hash differs",
        "no credentials",
        "Put covid*train*.csv",
    ):
        assert word in ended.text, word
    clean(tmp_path)
    assert not (tmp_path / "data/HW01/covid.train.csv").exists()


def test_auto_without_network_is_on_the_sample_soon(run, script, hw, tmp_path):
    """Addresses that never answer stand for a network that swallows everything."""
    slow = "import requests, time\nrequests.get = lambda *a, **k: time.sleep(60)"
    one = run(script, patch=slow, HW_DATA="auto", HW_LEVEL="medium")
    assert one.until(lambda: "at level" in one.text), one.text  # packages are imported, the search begins
    tic = time.monotonic()
    assert one.until(lambda: "data: SAMPLE" in one.text, seconds=60), one.text
    assert time.monotonic() - tic < 20
    assert "NO REAL DATA WAS FOUND, this run uses the generated SAMPLE" in one.text
    one.process.kill()
    one.wait()


def test_real_without_network_says_what_was_tried(run, script, hw, tmp_path):
    tried = tmp_path / "tried.log"
    ended = run(script, HW_DATA="real", OFFLINE_LOG=tried).wait()
    assert ended.code == 1 and "No real data was found" in ended.text and "Traceback" not in ended.text
    assert "no credentials" in ended.text and "drive.usercontent.google.com" in ended.text
    assert "kaggle" not in tried.read_text(), "Kaggle was asked without credentials"
    assert not (tmp_path / "data").exists() or not list((tmp_path / "data").rglob("*.csv"))


KAGGLE = "/api/v1/competitions.CompetitionApiService/DownloadDataFiles"


@pytest.mark.skipif(sys.version_info < (3, 11), reason="Kaggle's current client needs Python 3.11")
@pytest.mark.parametrize("answer", ["data", "refused"])
def test_kaggle(run, script, hw, real, changed, server, tmp_path, answer):
    """Its own client against a small server on the port that its test environment uses."""
    files = zipped({path.name: path.read_bytes() for path in real.iterdir()})
    at, asked = server({KAGGLE: files if answer == "data" else 403}, port=7777)
    env = {"KAGGLE_API_ENVIRONMENT": "TEST", "KAGGLE_USERNAME": "nobody", "KAGGLE_KEY": "dummy"}
    env |= {"KAGGLEHUB_CACHE": tmp_path / "cache", "HW_DATA": "real", "HW_LEVEL": "medium"}
    ended = run(with_mirrors(script, changed, []), **env).wait()
    assert KAGGLE in asked, ended.text
    if answer == "data":
        assert ended.code == 0 and "data: real" in ended.text, ended.text
    else:
        assert ended.code == 1 and "403" in ended.text and "Traceback" not in ended.text
        assert "https://www.kaggle.com/competitions/ml2022spring-hw1" in ended.text
    clean(tmp_path)


def test_two_runs_side_by_side_share_one_sample(run, script, hw, tmp_path):
    both = [run(script, HW_LEVEL=level, HW_OUT_DIR=f"out/{level}") for level in ("medium", "strong")]
    assert [one.wait().code for one in both] == [0, 0], [one.text for one in both]
    clean(tmp_path)


def narrow(table, width):
    return b"\n".join(b",".join(line.split(b",")[:width]) for line in table.split(b"\n"))


def without_last_value(table):
    return re.sub(rb",[0-9.]+\n", b",\n", table)


FAULTS = {  # what happens to train and test, and what the sentence says
    "empty": (lambda train, test: (b"", test), "is not a table"),
    "html": (lambda train, test: (b"<!DOCTYPE html><html>no</html>", test), "b'<!DOCTYPE html>"),
    "truncated": (lambda train, test: (train[: len(train) // 2], test), "has no number in column"),
    "semicolons": (lambda train, test: (train.replace(b",", b";"), test), "covid.train.csv has 1 columns"),
    "swapped": (lambda train, test: (test, train), "seem to be swapped"),
    "text": (
        lambda train, test: (train.replace(b"\n7,", b"\n7,?"), test),
        "row id 7 has no number",
    ),
    "gap": (lambda train, test: (train, without_last_value(test)), "no number in column worried_finances"),
    "edition": (lambda train, test: (narrow(train, 88), test), "has 88 columns where"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_damaged_tables(run, script, hw, real, tmp_path, fault):
    train, test = ((real / f"covid.{part}.csv").read_bytes() for part in ("train", "test"))
    spoil, sentence = FAULTS[fault]
    train, test = spoil(train, test)
    (real / "covid.train.csv").write_bytes(train)
    (real / "covid.test.csv").write_bytes(test)
    ended = run(script, HW_DATA="auto", HW_DATA_DIR=real).wait()
    assert ended.code == 1 and sentence in ended.text and "Traceback" not in ended.text, ended.text
    assert "covid.t" in ended.text and not (tmp_path / "out").exists()
