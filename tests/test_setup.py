"""Parameters from outside, and the sentence that every mistake ends in."""

import pytest

pytestmark = pytest.mark.common
WRONG = {
    "HW_LEVL=boss": "HW_LEVL is no parameter of HW01; these are: HW_LEVEL, HW_DATA, HW_PROFILE, HW_SEED",
    "HW_LEVEL=bos": "LEVEL is 'bos', but must be one of ('boss', 'strong', 'medium', 'simple')",
    "HW_DATA=none": "DATA is 'none', but must be one of ('auto', 'real', 'sample')",
    "HW_PROFILE=small": "PROFILE is 'small', but must be one of ('full', 'tiny')",
    "HW_SEED=one": "HW_SEED is 'one', but must be of type int",
    "HW_SEED=-1": "SEED is -1, but must be one of range(0, 4294967296)",
    "HW_RESUME=perhaps": "HW_RESUME is 'perhaps', but must be of type bool",
    "HW_EPOCHS=2.5": "HW_EPOCHS is '2.5', but must be of type int",
}


@pytest.mark.parametrize("wrong", WRONG)
def test_bad_parameters_end_in_one_sentence(run, script, hw, wrong, tmp_path):
    name, value = wrong.split("=")
    ended = run(script, **{name: value}).wait()
    assert ended.code == 1
    assert WRONG[wrong] in ended.text and "Traceback" not in ended.text
    assert not (tmp_path / "out").exists() and not (tmp_path / "data").exists()


def test_parameters_are_taken(run, script, hw, tmp_path):
    wanted = {"HW_EPOCHS": 2, "HW_LEVEL": "medium", "HW_OUT_DIR": tmp_path / "elsewhere", "HW_SEED": 5}
    done = run(script, **wanted).wait()
    assert done.code == 0, done.text
    assert "level medium" in done.text and "seed 5" in done.text and "epochs: 2" in done.text
    assert (tmp_path / "elsewhere" / "medium-sample" / "result.json").exists()


def test_missing_package_that_cannot_be_installed(run, script, hw):
    hide = "import importlib.util as u\nreal = u.find_spec\n"
    hide += "u.find_spec = lambda name, *rest: None if name == 'accelerate' else real(name, *rest)\n"
    hide += "import subprocess\nsubprocess.call = lambda command: 1"
    ended = run(script, patch=hide).wait()
    assert ended.code == 1 and "pip install accelerate" in ended.text and "Traceback" not in ended.text


def test_out_of_memory_names_the_batch_size(run, script, hw):
    spoil = "import torch\nreal, n = torch.Tensor.square, 0\ndef square(x):\n"
    spoil += "    raise torch.OutOfMemoryError('CUDA out of memory')\ntorch.Tensor.square = square"
    ended = run(script, patch=spoil).wait()
    assert ended.code == 1 and "batch size 128" in ended.text and "BATCH_SIZE" in ended.text
    assert "Traceback" not in ended.text
