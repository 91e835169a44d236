"""A run can be stopped at any moment, in any way: the next one ends in the same bytes."""

import io
import os
import random
import shutil
import signal

import nbformat
import pytest
import torch
from conftest import execute, one_sentence, outcome
from runner import ranks

SPOIL = """
import os, pathlib
real, count = pathlib.Path.write_bytes, 0
def write_bytes(path, data):
    global count
    if path.name.endswith(".pt.part"):
        count += 1
        if count == {number}:
            real(path, bytes(data)[: len(bytes(data)) // 2])
            {end}
    return real(path, data)
pathlib.Path.write_bytes = write_bytes
"""
KILL = "os.kill(os.getpid(), 9)"
FULL = "raise OSError(28, 'No space left on device', str(path))"


def checkpoints(folder):
    return sorted(folder.glob("out/*/*/checkpoint/*.pt"))


def finish(run, script, straight, tmp_path, **wanted):
    """Run to the end and compare with the undisturbed run."""
    last = run(script, **wanted).wait()
    assert last.code == 0, last.text
    assert outcome(tmp_path)[1] == straight[1]
    assert not list(tmp_path.glob("**/*.part"))
    return last


# every homework


def test_killed_after_a_checkpoint_and_in_the_middle_of_one_of_each_stage(run, script, straight, tmp_path):
    """In the very first one, after the next, then, always going on, in one of each stage (of many: three)."""
    files = sorted(checkpoints(straight[2]), key=lambda path: path.stat().st_mtime_ns)
    stages = [path.name.rsplit(".", 2)[0] for path in files]
    assert stages, "the straight run left no checkpoint"
    first = run(script, patch=SPOIL.format(number=1, end=KILL)).wait()
    assert first.code == -signal.SIGKILL and len(list(tmp_path.glob("out/**/*.pt.part"))) == 1, first.text
    second = run(script)
    assert second.until(lambda: checkpoints(tmp_path)), second.text
    os.kill(second.process.pid, signal.SIGKILL)
    assert second.wait().code == -signal.SIGKILL
    name = 'path.name.endswith(".pt.part")'
    for stage in stages[:: -(-len(stages) // 3)]:
        spoil = SPOIL.format(number=2, end=KILL).replace(name, f'{name} and path.name.startswith("{stage}.")')
        ended = run(script, patch=spoil).wait()
        if ended.code == 0:  # a stage of one checkpoint
            continue
        assert ended.code == -signal.SIGKILL and "going on after" in ended.text, ended.text
        assert list(tmp_path.glob(f"out/**/{stage}.*.pt.part")), "it was not in the middle"
    assert "going on after" in finish(run, script, straight, tmp_path).text


def test_resume_after_the_last_epoch_trains_nothing(run, script, straight, tmp_path):
    shutil.copytree(straight[2], tmp_path, dirs_exist_ok=True)
    before = {path: path.stat().st_mtime_ns for path in checkpoints(tmp_path)}
    history = next(tmp_path.glob("out/*/*/history.csv")).read_bytes()
    finish(run, script, straight, tmp_path)
    assert before == {path: path.stat().st_mtime_ns for path in checkpoints(tmp_path)}
    assert history == next(tmp_path.glob("out/*/*/history.csv")).read_bytes()


# the common cells, tried on the toy


@pytest.mark.common
@pytest.mark.parametrize("number", range(2, 9))
def test_killed_in_the_middle_of_any_checkpoint(run, script, straight, tmp_path, number):
    """Four epochs in two stages: every one of them."""
    first = run(script, patch=SPOIL.format(number=number, end=KILL)).wait()
    assert first.code == -signal.SIGKILL and len(list(tmp_path.glob("out/**/*.pt.part"))) == 1, first.text
    text = finish(run, script, straight, tmp_path).text
    stage, done = ("first", number - 1) if number <= 5 else ("second", number - 5)
    assert f"{stage}: going on after {done} from" in text
    assert next(tmp_path.glob("out/*/*/history.csv")).read_text().count("\n") == 9


@pytest.mark.common
def test_killed_at_random_moments(run, script, hw, straight, tmp_path):
    """The short version of tests/tools/kills.py."""
    dice = random.Random(hw)
    for _ in range(4):
        run(script).kill_after(dice.random() * straight[0]["seconds"])
    finish(run, script, straight, tmp_path)


@pytest.mark.common
def test_two_processes_are_killed_and_go_on(script, tmp_path):
    """Each has its own random numbers: both must be there again."""
    bytes_of = []
    for kill in (0, 3, 7):
        folder = tmp_path / str(kill)
        folder.mkdir()
        if kill:
            first, second = ranks(script, folder, patch=SPOIL.format(number=kill, end=KILL))
            assert first.wait().code == -9, first.text
            second.wait(0)
        both = [one.wait() for one in ranks(script, folder)]
        assert [one.code for one in both] == [0, 0], both[0].text + both[1].text
        assert ("going on after" in both[0].text) == bool(kill) and both[1].text == ""
        bytes_of.append(outcome(folder)[1])
    assert len(set(bytes_of)) == 1


@pytest.mark.common
def test_full_disk_keeps_the_last_checkpoint(run, script, straight, tmp_path):
    first = run(script, patch=SPOIL.format(number=3, end=FULL)).wait()
    one_sentence(first, r"first\.\w{8}\.pt cannot be written \(No space left on device\)")
    assert checkpoints(tmp_path) and not list(tmp_path.glob("out/**/*.part"))
    assert "going on after 2 from" in finish(run, script, straight, tmp_path).text


@pytest.mark.common
def test_ctrl_c_ends_in_one_sentence(run, script, straight, tmp_path):
    first = run(script)
    assert first.until(lambda: checkpoints(tmp_path)), first.text
    os.kill(first.process.pid, signal.SIGINT)
    one_sentence(first.wait(), "Stopped by hand. Run again to go on")
    finish(run, script, straight, tmp_path)


def altered(path, change):
    parts = torch.load(path, weights_only=True)  # done, rows, random states, states
    change(parts)
    torch.save(parts, path)


class Payload:
    def __reduce__(self):
        return os.system, ("touch payload",)


def other_shapes(parts):
    parts[3]["net"] = {name: torch.zeros(3, 3) for name in parts[3]["net"]}


def half_other_shapes(parts):
    """The first tensors fit and are loaded before the last one does not."""
    parts[3]["net"] = {name: tensor + 1 for name, tensor in parts[3]["net"].items()}
    parts[3]["net"]["layers.3.bias"] = torch.zeros(7)


DAMAGE = {
    "empty": lambda path: path.write_bytes(b""),
    "nonsense": lambda path: path.write_bytes(b"nonsense"),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:1000]),
    "a payload": lambda path: torch.save(Payload(), path),
    "a list": lambda path: torch.save([1, 2], path),
    "other shapes": lambda path: altered(path, other_shapes),
    "half other shapes": lambda path: altered(path, half_other_shapes),
    "a part is missing": lambda path: altered(path, lambda parts: parts[3].pop("scheduler")),
    "the dict is missing": lambda path: altered(path, lambda parts: parts[3].pop("seen")),
    "short random state": lambda path: altered(
        path, lambda parts: parts[2][0].__setitem__(0, parts[2][0][0][:9])
    ),
    "no random state": lambda path: altered(path, lambda parts: parts[2].clear()),
}


@pytest.fixture(scope="module")
def half_done(script, tmp_path_factory):
    """{name: bytes} of a run that was killed in its third epoch."""
    from runner import Run

    folder = tmp_path_factory.mktemp("half")
    Run(script, folder, patch=SPOIL.format(number=3, end=KILL)).wait()
    return {path.relative_to(folder): path.read_bytes() for path in checkpoints(folder)}


@pytest.mark.common
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_set_aside(run, script, straight, half_done, tmp_path, damage):
    for name, data in half_done.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(data)
    (path,) = checkpoints(tmp_path)
    DAMAGE[damage](path)
    spoiled = path.read_bytes()
    text = finish(run, script, straight, tmp_path).text
    assert "is damaged (" in text and "set aside: first starts anew" in text, text
    assert path.with_suffix(".damaged").read_bytes() == spoiled and path.exists()
    assert not (tmp_path / "payload").exists()
    assert next(tmp_path.glob("out/*/*/history.csv")).read_text().count("\n") == 9


@pytest.mark.common
def test_damage_that_one_process_sees_stops_both(script, tmp_path):
    """Neither goes on alone: rank 1's random state is broken, rank 0's is not."""
    first, second = ranks(script, tmp_path, patch=SPOIL.format(number=3, end=KILL))
    first.wait()
    second.wait(0)
    altered(checkpoints(tmp_path)[0], lambda parts: parts[2][1].__setitem__(0, parts[2][1][0][:9]))
    both = [one.wait(30) for one in ranks(script, tmp_path)]
    assert [one.code for one in both] == [0, 0], both[0].text + both[1].text
    assert "first starts anew" in both[0].text


CODE = {  # what is edited -> does training start anew?
    "loss": ("(guess - y).square().mean()", "(guess - y).abs().mean()", True),
    "helper": ("return total / 4", "return total / 5", True),
    "forward of a base class": (
        "return self.layers(x[:, None])[:, 0]",
        "return self.layers(-x[:, None])[:, 0]",
        True,
    ),
    "net": ("torch.nn.Tanh()", "torch.nn.ReLU()", True),
    "optimizer": ("momentum=0.9", "momentum=0.8", True),
    "labels": ("x, y = read(PATHS", "x, y = torch.tensor([[1.0], [-1.0]]) * read(PATHS", True),
    "a row that training reads": (
        '"rate": (0.05, 0.05, 0.05, 0.05), "steps": (50, 50, 50, 50)},\n}',
        '"rate": (0.05, 0.05, 0.05, 0.06), "steps": (50, 50, 50, 50)},\n}',
        True,
    ),
    "a row that the net reads": ('"hidden": (4, 16, 16, 16)', '"hidden": (4, 16, 16, 17)', True),
    "a row of the report": ('"bins": (3, 4, 5, 7)', '"bins": (3, 4, 5, 9)', False),
    "report": ("plt.hist(guess, settings", "plt.hist(-guess, settings", False),
    "comment further down": ('# %% tags=["predict"]', '# %% tags=["predict"]\n# a remark', False),
    "print": ('say(f"settings:', 'say(f"my settings:', False),
    "prediction": ("**parts)\n    for epoch", "**parts)\n    for epoch", False),
    "submission": ("{value:.9g}", "{value:.9f}", False),
    "a common cell": ('say(f"{HW} at level', 'say(f"Here is {HW} at level', False),
}


@pytest.fixture(scope="module")
def finished(straight):
    """{name: bytes} of the checkpoints of the undisturbed run."""
    return {path.relative_to(straight[2]): path.read_bytes() for path in checkpoints(straight[2])}


def put(files, folder):
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


@pytest.mark.common
@pytest.mark.parametrize("what", CODE)
def test_edited_code_starts_anew_where_training_depends_on_it(run, script, changed, finished, tmp_path, what):
    old, new, anew = CODE[what]
    put(finished, tmp_path)
    done = run(changed(script, old, new)).wait()
    assert done.code == 0, done.text
    assert ("first: going on after" not in done.text) == anew, done.text
    assert finished == {name: (tmp_path / name).read_bytes() for name in finished}, "the old net is gone"
    assert len(checkpoints(tmp_path)) == (4 if anew else 2)


@pytest.mark.common
def test_labels_of_another_file_of_the_same_size(run, script, straight, tmp_path):
    given = tmp_path / "given"
    given.mkdir()
    for path in (straight[2] / "data/TOY-sample/tiny/data").iterdir():
        (given / path.name).write_bytes(path.read_bytes())
    wanted = {"HW_DATA": "real", "HW_DATA_DIR": given}
    assert run(script, **wanted).wait().code == 0
    test = given / "toy.test.csv"
    test.write_text(test.read_text().replace("\n0,", "\n0,0.5\n99,"))
    assert "first: going on after 4" in run(script, **wanted).wait().text, (
        "another test set throws no net away"
    )
    train = given / "toy.train.csv"
    text = train.read_text().splitlines()
    label = text[1].split(",")[2]
    text[1] = text[1].replace(label, label[:-1] + str((int(label[-1]) + 1) % 10))
    train.write_text("\n".join(text) + "\n")
    done = run(script, **wanted).wait()
    assert done.code == 0 and "going on after" not in done.text


@pytest.mark.common
@pytest.mark.parametrize("wanted", [{"HW_SEED": 7}, {"HW_WITHOUT": "dropout"}, {"HW_PROFILE": "small"}])
def test_other_parameters_start_anew_beside_the_old(
    run, script, changed, straight, finished, tmp_path, wanted
):
    """Full and tiny side by side, seeds too: coming back finds the first net again."""
    few = changed(script, "(200, 200, 200, 200)", "(200, 200, 200, 399)")  # tiny: 7
    put(finished, tmp_path)
    copy = few if "HW_PROFILE" in wanted else script
    done = run(copy, **(wanted | {"HW_PROFILE": "tiny"})).wait()
    assert done.code == 0 and "going on after" not in done.text, done.text
    text = finish(run, script, straight, tmp_path).text
    assert "first: going on after 4" in text and "second: going on after 4" in text


@pytest.mark.common
def test_of_each_stage_the_three_newest_stay(run, script, straight, finished, tmp_path):
    put(finished, tmp_path)
    for seed in (1, 2, 3):
        assert run(script, HW_SEED=seed).wait().code == 0
    assert len(checkpoints(tmp_path)) == 6
    assert not {tmp_path / name for name in finished} & {*checkpoints(tmp_path)}
    assert "first: going on after 4" in run(script, HW_SEED=1).wait().text


@pytest.mark.common
def test_resume_off_starts_anew(run, script, straight, finished, tmp_path):
    put(finished, tmp_path)
    assert "going on after" not in finish(run, script, straight, tmp_path, HW_RESUME="false").text


KINDS = """
import dataclasses, functools
def outer(width):
    def inner(x):
        return x + width
    return inner
class Way:
    step = {step}
    @staticmethod
    def go(x):
        return x + {go}
    @property
    def size(self):
        return 5
@dataclasses.dataclass
class Plan:
    way: object
def twice(x):
    return 2 * x + far(x)
def far(x):
    return x if x > 3 else far(x + 1)
BASE = {step}
def nest():
    return (lambda: BASE + 1)()
class Layer(torch.nn.Module):
    def forward(self, x):
        return x * {step}
plan = Plan(Way())
plan.me = plan
things = {{
    "set": set([0, 8, {one}] if "{path}" == "a" else [{one}, 8, 0]), "range": range({two}), "none": None,
    "bytes": b"{one}", "plan": plan, "frame": pd.DataFrame({{"a": ["x", "y"], "b": [1.0, {one}]}}),
    "object": np.array(["a", None, {one}], dtype=object), "number": np.float64({one}),
    "time": np.array(["2020-01-0{one}"], dtype="datetime64[D]"), "zero": torch.tensor({one}.0),
    "bf16": torch.ones(2, dtype=torch.bfloat16) * {one}, "bool": torch.tensor([True]),
    "empty": torch.zeros(0, 3), "closure": outer({one}), "text": np.array(["a", "{one}"]),
    "partial": functools.partial(twice, {one}), "method": plan.way.size, "path": Path("{path}"), "module": np,
    "lambda": lambda x: x + {one}, "nest": nest, "layer": Layer(),
}}
for name, thing in things.items():
    print("print of", name, fingerprint([thing]))
print("print of class", fingerprint([Way]))
raise SystemExit
"""


@pytest.mark.common
def test_fingerprints_of_all_kinds_of_things(run, script, changed):
    """The same in every process; another one where the content is another, whatever kind it is."""

    def prints(**what):
        what = {"one": 1, "two": 2, "step": 1, "go": 1, "path": "a"} | what
        copy = changed(script, "nets = [train", KINDS.format(**what) + "nets = [train")
        done = run(copy).wait()
        assert done.code == 0, done.text
        lines = [line.split() for line in done.text.splitlines() if line.startswith("print of ")]
        return {words[2]: words[3] for words in lines}

    first, again = prints(), prints(path="b")
    assert first == again and len(first) == 23
    other = prints(one=2, two=3)
    same = {name for name in first if first[name] == other[name]}
    assert same == {"none", "plan", "empty", "method", "bool", "path", "module", "class", "nest", "layer"}
    other = prints(step=2)
    assert {name for name in first if first[name] != other[name]} == {"class", "plan", "nest", "layer"}
    assert prints(go=2)["class"] != first["class"]


@pytest.mark.common
def test_a_second_run_all_in_one_kernel_goes_on(script, straight, tmp_path):
    book = nbformat.read(script.with_suffix(".ipynb"), as_version=4)
    first = len(book.cells)
    book.cells += nbformat.read(script.with_suffix(".ipynb"), as_version=4).cells
    for number, cell in enumerate(book.cells):
        cell.id = f"cell-{number}"
    nbformat.write(book, tmp_path / "toy.ipynb")
    result = execute(tmp_path / "toy.ipynb")
    assert result.error is None, result.error.trace
    texts = []
    for cells in (result.nb.cells[:first], result.nb.cells[first:]):
        texts.append("".join(str(out.get("text", "")) for cell in cells for out in cell.get("outputs", [])))
    assert "going on after" not in texts[0]
    assert "first: going on after 4" in texts[1] and "second: going on after 4" in texts[1]
    assert outcome(tmp_path)[1] == straight[1]
    assert next(tmp_path.glob("out/*/*/history.csv")).read_text().count("\n") == 9


@pytest.mark.common
def test_the_training_cell_alone_may_run_again(run, script, changed, tmp_path):
    """Its rows are in the history once."""
    again = changed(script, '# %% tags=["predict"]', 'nets = [train("first", x, y)]\n# %% tags=["predict"]')
    done = run(again, HW_LEVEL="medium").wait()
    assert done.code == 0 and "first: going on after 4" in done.text, done.text
    assert next(tmp_path.glob("out/*/*/history.csv")).read_text().count("\n") == 5


def test_a_checkpoint_is_plain_data(straight):
    """It loads with weights_only, the only way we ever load one."""
    for path in checkpoints(straight[2]):
        done, rows, dice, states = torch.load(io.BytesIO(path.read_bytes()), weights_only=True)
        assert done > 0 and len(dice) == 1 and states


MUTANTS = [
    ("weights_only=True", "weights_only=False"),
    (
        "load_state_dict(states[name])",
        "load_state_dict(states[name]) if isinstance(part, torch.nn.Module) else 0",
    ),
    ("load_state_dict(states[name])", "load_state_dict(states[name]) if name != 'scheduler' else 0"),
    ("part.update(send_to_device(states[name], device))", "pass"),
    ("dice[accelerator.process_index % len(dice)]", "dice[0]"),
    ("        torch.set_rng_state(cpu)", "        pass"),
    ("return [text, read, [", "return [text, ["),
    ("return [text, read, [", "return [read, ["),
    ("[cell.cell_contents for cell in value.__closure__ or ()]", "[]"),
    ("yield value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()", "pass"),
    ("yield np.ascontiguousarray(value).reshape(-1).view(np.uint8)", "pass"),
    ("sorted(texts & {*settings})", "sorted(settings)"),
    ("sorted(texts & {*settings})", "[]"),
    ("inner = [reads(const) for const in code.co_consts if", "inner = [reads(const) for const in () if"),
    ("return [value.__bases__, parts]", "return parts"),
    ("value = [own and type(value), ", "value = ["),
    ("value = sorted(value, key=repr)", "value = list(value)"),
    ("seen[id(value)] = value", "pass"),
    ("fingerprint([SEED, depends])", "fingerprint([depends])"),
    ("fingerprint([SEED, depends])", "fingerprint([SEED, settings, depends])"),
    ("fingerprint([SEED, depends])", "'0' * 8"),
    ("history.extend(rows)", "pass"),
    ("torch.save([done, history[first:],", "torch.save([done, history,"),
    ("        del history[stages[stage][1] :]", "        pass"),
    ("for path in old[:-3]:", "for path in old[:-1]:"),
    ("for path in old[:-3]:", "for path in ():"),
    ("        restore(parts, before)", "        pass"),
    ("in gather_object([problem]) if one", "in [problem] if one"),
    ('path.replace(path.with_suffix(".damaged"))', "path.unlink()"),
    ("if not RESUME or not path.exists():", "if not path.exists():"),
    (
        "        with aside(path) as part:\n            part.write_bytes(",
        "        if True:\n            path.write_bytes(",
    ),
    ('part = Path(f"{path}.part")', "part = Path(path)"),
]
