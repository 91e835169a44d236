import json
import os
import re
import shutil
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent
sys.path[:0] = [str(TESTS), str(TESTS / "tools"), str(TESTS / "offline")]

import jupytext
import nbformat
import sitecustomize
from nbmake.nb_run import NotebookRun
from notebooks import common_cells, scripts
from runner import Run, environment

HOMEWORKS = [path.stem for path in scripts([])]
TOY = "toy"  # tests/toy.py: stands for all homeworks in the tests of the common cells
EVERY = ("test_run", "test_resume")  # what every homework must pass, the toy first


def pytest_generate_tests(metafunc):
    if "hw" in metafunc.fixturenames:
        own = [hw for hw in HOMEWORKS if metafunc.module.__name__ == f"test_{hw.lower()}"]
        if metafunc.definition.get_closest_marker("common"):
            own = [TOY]
        elif metafunc.module.__name__ in EVERY:
            own = [TOY, *HOMEWORKS]
        metafunc.parametrize("hw", own or HOMEWORKS, scope="session")


def group(nodeid):
    """A homework's tests share their reference runs and one worker; the toy's go where there is room."""
    hw = re.search(r"test_(hw\d\d)\.py|\[(hw\d\d)", nodeid.lower())
    if hw:
        return hw[1] or hw[2]
    together = ("kaggles_own_client", "test_tools.py")  # one port; one toy
    return next((name for name in together if name in nodeid), nodeid)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Instead of --dist loadgroup, whose marks xdist 3.8 loses with pytest 9.2."""
    from xdist.scheduler import LoadScopeScheduling

    class Groups(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            return group(nodeid)

    return Groups(config, log)


@pytest.fixture(scope="session", autouse=True)
def no_network(tmp_path_factory):
    os.environ["OFFLINE_LOG"] = str(tmp_path_factory.mktemp("offline") / "offline.log")
    sys.addaudithook(sitecustomize.guard)
    yield
    assert not Path(os.environ["OFFLINE_LOG"]).exists(), Path(os.environ["OFFLINE_LOG"]).read_text()


def build_toy(folder):
    """TOY.py and TOY.ipynb: the common cells where tests/toy.py has their tags."""
    text = (TESTS / "toy.py").read_text(encoding="utf-8")
    for tag, cell in common_cells().items():
        line = f'# %% tags=["{tag}"]\n'
        assert text.count(line) == 1, tag
        text = text.replace(line, line + cell.source + "\n")
    script = folder / "TOY.py"
    script.write_text(text, encoding="utf-8")
    write_notebook(script)
    return script


def write_notebook(script):
    book = jupytext.reads(script.read_text(encoding="utf-8"), fmt="py:percent")
    book.metadata = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    nbformat.write(book, script.with_suffix(".ipynb"))


@pytest.fixture(scope="session")
def script(hw, tmp_path_factory):
    if hw == TOY:
        return build_toy(tmp_path_factory.mktemp("toy"))
    return TESTS.parent / hw / f"{hw}.py"


@pytest.fixture
def run(tmp_path):
    """run(script, **environment) -> Run; none may try to reach the network."""
    started = []

    def start(script, folder=tmp_path, **wanted):
        started.append(Run(script, folder, **wanted))
        return started[-1]

    yield start
    for one in started:
        one.wait(0)
    tried = tmp_path / "offline.log"
    assert not tried.exists(), f"the network was wanted: {tried.read_text()}"


@pytest.fixture
def changed(tmp_path):
    """changed(script, old, new) -> a copy of the script with one place changed."""

    def change(script, *pairs):
        text = script.read_text(encoding="utf-8")
        for old, new in zip(pairs[::2], pairs[1::2], strict=True):
            assert text.count(old) == 1, f"{old!r} is there {text.count(old)} times"
            text = text.replace(old, new)
        copy = tmp_path / "changed" / script.name
        copy.parent.mkdir(exist_ok=True)
        copy.write_text(text, encoding="utf-8")
        return copy

    return change


def outcome(folder):
    """result.json and the submission's bytes of the newest run below `folder`."""
    path = max(Path(folder).glob("out/*/*/result.json"), key=lambda found: found.stat().st_mtime)
    result = json.loads(path.read_text())
    files = [file for file in path.parent.iterdir() if file.is_file() and ".sample." in file.name]
    assert len(files) == 1, files
    return result, files[0].read_bytes()


def trained_anew(run, straight, script, tmp_path):
    """The stages that start anew when this script finds the checkpoints of the straight run."""
    before = next(straight[2].glob("out/*/*/checkpoint"))
    shutil.copytree(before, tmp_path / before.relative_to(straight[2]))
    stages = {path.name.split(".pt")[0].rpartition(".")[0] for path in before.iterdir()}
    done = run(script).wait()
    assert done.code == 0, done.text
    return {stage for stage in stages if f"{stage}: going on after" not in done.text}


def one_sentence(ended, *words):
    """The run stopped by itself, with a sentence that has these words, and without a traceback."""
    assert ended.code == 1, f"{ended.code}: {ended.text}"
    assert "Traceback" not in ended.text, ended.text
    for word in words:
        assert re.search(word, ended.text), f"{word!r} is not in:\n{ended.text}"


def execute(copy, seconds=120, **wanted):
    """The notebook as nbmake runs it, in its own folder -> the executed notebook."""
    before, offline = dict(os.environ), copy.with_name("offline.log")
    wanted = {"HW_PROFILE": "tiny", "HW_DATA": "sample", "OFFLINE_LOG": offline} | wanted
    os.environ.clear()
    os.environ.update(environment(**wanted))
    try:
        result = NotebookRun(copy, seconds).execute()
    finally:
        os.environ.clear()
        os.environ.update(before)
    assert not offline.exists(), offline.read_text()
    return result


@pytest.fixture(scope="session")
def notebook(hw, script, tmp_path_factory):
    """The lone notebook in an empty folder, run without a network -> (executed notebook, folder)."""
    folder = tmp_path_factory.mktemp(f"{hw}-notebook")
    copy = folder / f"{hw}.ipynb"
    copy.write_bytes(script.with_suffix(".ipynb").read_bytes())
    result = execute(copy)
    assert result.error is None, result.error.trace
    outputs = [out for cell in result.nb.cells for out in cell.get("outputs", [])]
    printed = "".join(out.get("text", "") + out.get("data", {}).get("text/html", "") for out in outputs)
    folder.joinpath("run.log").write_text(printed, encoding="utf-8")
    return result.nb, folder


@pytest.fixture(scope="session")
def straight(notebook):
    """The reference: that tiny boss run, which nobody disturbed -> (result, submission, folder).

    The tests of the kills compare it with runs of the script: notebook and script must give the same bytes.
    """
    return *outcome(notebook[1]), notebook[1]
