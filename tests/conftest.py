import json
import os
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent
sys.path[:0] = [str(TESTS), str(TESTS / "tools"), str(TESTS / "offline")]

import sitecustomize
from nbmake.nb_run import NotebookRun
from notebooks import scripts
from runner import Run, environment

HOMEWORKS = [path.stem for path in scripts([])]


def pytest_generate_tests(metafunc):
    if "hw" in metafunc.fixturenames:
        common = metafunc.definition.get_closest_marker("common")
        own = [hw for hw in HOMEWORKS if metafunc.module.__name__ == f"test_{hw.lower()}"]
        metafunc.parametrize("hw", own or (HOMEWORKS[:1] if common else HOMEWORKS), scope="session")


def pytest_collection_modifyitems(items):
    """A homework's tests share their reference runs, so they stay on one of the two workers."""
    for item in items:
        hw = item.callspec.params.get("hw", "") if hasattr(item, "callspec") else ""
        common = "common" if item.get_closest_marker("common") or not hw else ""
        item.add_marker(pytest.mark.xdist_group(hw + common))


@pytest.fixture(scope="session", autouse=True)
def no_network(tmp_path_factory):
    os.environ["OFFLINE_LOG"] = str(tmp_path_factory.mktemp("offline") / "offline.log")
    sys.addaudithook(sitecustomize.guard)
    yield
    assert not Path(os.environ["OFFLINE_LOG"]).exists(), Path(os.environ["OFFLINE_LOG"]).read_text()


@pytest.fixture
def script(hw):
    return TESTS.parent / hw / f"{hw}.py"


@pytest.fixture
def run(tmp_path):
    """run(script, **environment) -> Run; none may try to reach the network."""

    def start(script, folder=tmp_path, **wanted):
        return Run(script, folder, **wanted)

    yield start
    tried = tmp_path / "offline.log"
    assert not tried.exists(), f"the network was wanted: {tried.read_text()}"


@pytest.fixture
def changed(tmp_path):
    """changed(script, old, new) -> a copy of the script with one place changed."""

    def change(script, *pairs):
        text = script.read_text()
        for old, new in zip(pairs[::2], pairs[1::2], strict=True):
            assert text.count(old) == 1, f"{old!r} is there {text.count(old)} times"
            text = text.replace(old, new)
        copy = tmp_path / "changed" / script.name
        copy.parent.mkdir(exist_ok=True)
        copy.write_text(text)
        return copy

    return change


def outcome(folder):
    """result.json and the submission's bytes of the newest run below `folder`."""
    path = max(Path(folder).glob("out/*/*/result.json"), key=lambda found: found.stat().st_mtime)
    result = json.loads(path.read_text())
    files = [file for file in path.parent.iterdir() if file.is_file() and ".sample." in file.name]
    assert len(files) == 1, files
    return result, files[0].read_bytes()


@pytest.fixture(scope="session")
def straight(hw, tmp_path_factory):
    """The reference: a tiny boss run of the script that nobody disturbed -> (result, submission, folder)."""
    folder = tmp_path_factory.mktemp(f"{hw}-straight")
    run = Run(TESTS.parent / hw / f"{hw}.py", folder).wait()
    assert run.code == 0, run.text
    assert not (folder / "offline.log").exists()
    return *outcome(folder), folder


@pytest.fixture(scope="session")
def notebook(hw, tmp_path_factory):
    """The lone notebook in an empty folder, run without a network -> (executed notebook, folder)."""
    folder = tmp_path_factory.mktemp(f"{hw}-notebook")
    copy = folder / f"{hw}.ipynb"
    copy.write_bytes((TESTS.parent / hw / f"{hw}.ipynb").read_bytes())
    before = dict(os.environ)
    wanted = environment(HW_PROFILE="tiny", HW_DATA="sample", OFFLINE_LOG=folder / "offline.log")
    os.environ.clear()
    os.environ.update(wanted)
    try:
        result = NotebookRun(copy, 120).execute()
    finally:
        os.environ.clear()
        os.environ.update(before)
    assert result.error is None, result.error.trace
    assert not (folder / "offline.log").exists(), (folder / "offline.log").read_text()
    return result.nb, folder
