"""HW12's own invariants: the judge's replay, the file, what multiplies log pi, the seeds."""

import hashlib
import json
import os
import pickle
import types

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import TESTS
from notebooks import facts, pick

SCRIPT = TESTS.parent / "HW12" / "HW12.py"
KNOWN = {name: value for name, value in facts(SCRIPT).items() if name.isupper()}


class Stop(Exception):
    pass


class Alone:
    """One process, as Accelerate would show it."""

    num_processes = 1

    @staticmethod
    def reduce(values, how):
        return values


def parts(*names, **given):
    return pick(
        SCRIPT, *names, **{"Stop": Stop, "np": np, "torch": torch, "accelerator": Alone} | KNOWN | given
    )


@pytest.fixture(scope="module")
def tools():
    names = ["make_env", "think", "Fleet", "fly_for_judge", "replay", "OnlyLists", "read_actions"]
    return parts(*names, "check_submission", "version", Path=None)


@pytest.fixture(scope="module")
def pilot():
    """A fixed little net: half the time it does something sensible."""
    dice = np.random.default_rng(3)
    return [(dice.normal(size=(8, 16)), np.zeros(16)), (dice.normal(size=(16, 4)), np.zeros(4))]


@pytest.fixture(scope="module")
def flown(tools, pilot):
    """Five valid lists, and their totals."""
    lists = tools.fly_for_judge(pilot, False, 1)
    return lists, tools.replay(lists)


def digest(tools, lists, env):
    """SHA-256 over all observations and rewards of a replay, with the judge's own calls."""
    sums = hashlib.sha256()
    for number, moves in enumerate(lists):
        x, _ = env.reset(seed=543 if number == 0 else None)
        for move in moves:
            sums.update(x.tobytes())
            x, reward, *_ = env.step(move)
            sums.update(np.float64(reward).tobytes())
    return sums.hexdigest()


@pytest.fixture
def done(straight):
    """The reference run -> (result, its folder)."""
    return straight[0], straight[2] / "out" / "HW12" / "boss-sample"


# ---- the judge


def test_first_observation_is_the_known_one(tools):
    x, _ = tools.make_env().reset(seed=543)
    assert np.allclose(x, KNOWN["FINGERPRINT"], atol=1e-6)


def test_replay_is_bit_identical_in_fresh_dirty_and_drawing_environments(tools, flown):
    lists, _ = flown
    fresh, dirty, camera = tools.make_env(), tools.make_env(), tools.make_env(render_mode="rgb_array")
    dirty.reset(seed=7)
    for _ in range(50):
        dirty.step(2)
    wanted = digest(tools, lists, fresh)
    assert (
        digest(tools, lists, fresh) == digest(tools, lists, dirty) == digest(tools, lists, camera) == wanted
    )


def test_flights_of_the_fleet_are_the_flights_of_the_judge(tools, pilot):
    """The same totals to 1e-6 as the fleet saw, though the judge uses gym.make with all its wrappers."""
    fleet, noise = tools.Fleet(), np.random.default_rng(0).gumbel(size=(1000, 3, 4))
    flights = fleet.start([11, 12, 13]).fly(pilot, noise)
    for k, seed in enumerate((11, 12, 13)):
        env = tools.make_env()
        x, _ = env.reset(seed=seed)
        total = 0
        for t in np.flatnonzero(flights["flown"][:, k]):
            assert (x == flights["x"][t, k]).all()
            x, reward, ended, truncated, _ = env.step(int(flights["action"][t, k]))
            assert (x == flights["after"][t, k]).all() and reward == flights["reward"][t, k]
            assert (ended or truncated) == flights["cut"][t, k] or t == len(noise) - 1
            total += reward
        assert ended or truncated
        assert total == pytest.approx(flights["reward"][:, k].sum(), abs=1e-6)


def test_a_missing_move_changes_all_later_episodes(tools, flown):
    """And so does another order: the terrain hangs on the length of what was flown before."""
    lists, _ = flown
    env, starts = tools.make_env(), []
    for cut in (0, 1):
        env.reset(seed=543)
        for move in lists[0][: len(lists[0]) - cut]:
            env.step(move)
        starts.append(env.reset()[0])
    assert (starts[0] != starts[1]).any()
    with pytest.raises(Stop, match="episode 1 is not over after"):
        tools.replay([lists[0][:-1], *lists[1:]])


def test_wrong_lengths_are_not_valid(tools, flown):
    lists, _ = flown
    with pytest.raises(Stop, match="episode 5 is over after"):
        tools.replay([*lists[:4], lists[4] + [0]])
    order = sorted(range(5), key=lambda k: len(lists[k]))
    with pytest.raises(Stop, match="is not over after|is over after"):
        tools.replay([lists[k] for k in (order if order != list(range(5)) else order[::-1])])


def test_the_limit_of_steps_counts_as_the_end(tools):
    """Truncated is done: a flight that hovers to the limit is valid (here a limit of 40, for speed)."""
    lists = [[0] * 40] * 5
    assert len(tools.replay(lists, tools.make_env(max_episode_steps=40))) == 5
    with pytest.raises(Stop, match="episode 1 is not over after the 40 moves"):
        tools.replay(lists)


def test_best_of_n_never_loses_its_first_episode_and_1_is_the_plain_policy(tools, pilot):
    plain, again, many = (tools.fly_for_judge(pilot, False, tries) for tries in (1, 1, 6))
    assert plain == again
    assert tools.replay(many)[0] >= tools.replay(plain)[0]
    assert len(many) == 5 and all(type(move) is int for moves in many for move in moves)
    greedy = tools.fly_for_judge(pilot, True, 1)
    x, _ = tools.make_env().reset(seed=543)
    assert greedy[0][0] == int(tools.think(pilot, x[None]).argmax())


# ---- the file


def save(path, lists):
    array = np.empty(len(lists), dtype=object)
    for number, moves in enumerate(lists):
        array[number] = moves
    np.save(path, array)
    return path


def test_the_notebook_writes_what_the_judge_takes(done, tools):
    result, folder = done
    path = folder / "Action_List.sample.npy"
    totals = tools.check_submission(path)
    about = json.loads((folder / "Action_List.json").read_text())
    assert totals == pytest.approx(about["totals"], abs=1e-6)
    assert np.mean(totals) == pytest.approx(result["judge_file"], abs=1e-6)
    array = np.load(path, allow_pickle=True)
    assert array.shape == (5,) and all(type(moves) is list for moves in array)
    assert about["lengths"] == [len(moves) for moves in array] and about["comparable"] is True
    assert path.stat().st_size < 20_000


FAULTS = {
    "four": (lambda lists: lists[:4], "has 4 lists"),
    "six": (lambda lists: [*lists, lists[0]], "has 6 lists"),
    "four is no move": (lambda lists: [[*lists[0][:-1], 4], *lists[1:]], "has the move 4"),
    "float": (lambda lists: [[*lists[0][:-1], 1.0], *lists[1:]], r"has the move 1\.0"),
    "bool": (lambda lists: [[*lists[0][:-1], True], *lists[1:]], "has the move True"),
    "empty": (lambda lists: [[], *lists[1:]], "has 0 moves"),
    "too long": (lambda lists: [lists[0] * 20, *lists[1:]], "1 to 1000 are possible"),
    "one too few": (lambda lists: [lists[0][:-1], *lists[1:]], "episode 1 is not over"),
    "one too many": (lambda lists: [lists[0] + [0], *lists[1:]], "episode 1 is over after"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_validator_rejects(tools, flown, tmp_path, fault):
    spoil, sentence = FAULTS[fault]
    path = save(tmp_path / "Action_List.npy", spoil([list(moves) for moves in flown[0]]))
    with pytest.raises(Stop, match=sentence) as problem:
        tools.check_submission(path)
    assert "Action_List.npy" in str(problem.value)


def test_validator_rejects_other_files(tools, flown, tmp_path):
    text, large, half = (tmp_path / name for name in ("list.txt", "large.npy", "half.npy"))
    text.write_text("0 1 2 3")
    with pytest.raises(Stop, match="must be a .npy file"):
        tools.check_submission(text)
    np.save(large, np.zeros(2_000_000, np.int8))
    with pytest.raises(Stop, match="less than 2 MB"):
        tools.check_submission(large)
    good = save(tmp_path / "good.npy", flown[0])
    assert tools.check_submission(good) == flown[1]
    for data in (good.read_bytes()[:500], b"<html>not found</html>", b""):
        half.write_bytes(data)
        with pytest.raises(Stop, match="half.npy is no array of five lists"):
            tools.check_submission(half)


def test_five_equally_long_lists_may_be_a_table(tools, tmp_path):
    np.save(tmp_path / "table.npy", np.full((5, 60), 2))
    assert tools.read_actions(tmp_path / "table.npy") == [[2] * 60] * 5


class Evil:
    def __reduce__(self):
        return os.mkdir, ("evil",)


@pytest.mark.parametrize("payload", [Evil(), np.int64(3), types.SimpleNamespace])
def test_a_pickle_that_wants_more_than_lists_is_refused(tools, tmp_path, monkeypatch, payload):
    monkeypatch.chdir(tmp_path)
    path = save(tmp_path / "evil.npy", [[payload]] * 5)
    with pytest.raises(Stop, match="not plain lists of int"):
        tools.read_actions(path)
    assert not (tmp_path / "evil").exists()
    with path.open("rb") as file:  # the payload itself works: only our unpickler stands before it
        np.lib.format.read_magic(file), np.lib.format.read_array_header_1_0(file)
        pickle.load(file)


# ---- what multiplies log pi


def test_advantage_against_a_direct_sum():
    """Every step by the formula, with two flights in a lane and a lane that is cut at the end."""
    advantage = parts("advantage").advantage
    dice, time, gamma, lam = np.random.default_rng(0), 9, 0.9, 0.7
    reward, value, after = dice.normal(size=(3, time, 2))
    ended = np.zeros((time, 2), bool)
    ended[3, 0] = True
    cut = ended.copy()
    cut[6, 1] = cut[-1] = True
    result = advantage(reward, value, after, ended, cut, gamma, lam)
    for lane in range(2):
        for t in range(time):
            last = next(n for n in range(t, time) if cut[n, lane])
            total = 0
            for n in range(t, last + 1):
                future = 0 if ended[n, lane] else gamma * after[n, lane]
                total += (gamma * lam) ** (n - t) * (reward[n, lane] + future - value[n, lane])
            assert result[t, lane] == pytest.approx(total)


def test_a_flight_that_was_cut_has_a_future_a_crashed_one_has_none():
    advantage = parts("advantage").advantage
    reward, value, after = np.zeros((3, 2)), np.zeros((3, 2)), np.zeros((3, 2))
    after[-1] = 10
    ended, cut = np.zeros((3, 2), bool), np.zeros((3, 2), bool)
    cut[-1], ended[-1, 1] = True, True
    result = advantage(reward, value, after, ended, cut, 1.0, 1.0)
    assert (result[:, 0] == 10).all() and (result[:, 1] == 0).all()


@pytest.mark.parametrize("kind", ["reward", "reward to go", "advantage"])
def test_each_rung_weighs_as_its_name_says(kind):
    settings = dict(weight=kind, scale=0.1, gamma=0.9, lam=1.0)
    weigh = parts("advantage", "weigh", settings=settings).weigh
    reward = np.array([[1.0], [2.0], [4.0]])
    last = np.array([[False], [False], [True]])
    flights = {"reward": reward, "ended": last, "cut": last}
    value = np.full((3, 1), 0.5)
    result = weigh(flights, value, np.roll(value, -1)).ravel()
    to_go = 0.1 * np.array([1 + 0.9 * 2 + 0.81 * 4, 2 + 0.9 * 4, 4])
    wanted = {"reward": 0.1 * reward.ravel(), "reward to go": to_go, "advantage": to_go - 0.5}[kind]
    assert result == pytest.approx(wanted)


def test_levels_differ_only_in_their_algorithm():
    given = dict(LEVEL="boss", PROFILE="full", STEPS=0, BATCH_SIZE=0)
    levels = parts("COMMON", "CRITIC", "LEVELS", **given).LEVELS
    same = ("steps", "rounds", "landers", "hidden", "entropy", "scale", "valid", "unseen")
    for name in same:
        assert len({level[name] for level in levels.values()}) == 1, name
    weights = [levels[name]["weight"] for name in ("simple", "medium", "strong", "boss")]
    assert weights == ["reward", "reward to go", "advantage", "advantage"]
    assert [bool(levels[name]["clip"]) for name in ("simple", "medium", "strong", "boss")] == [0, 0, 0, 1]


def test_ppo_starts_with_the_gradient_of_policy_gradient_and_clips_later():
    dice = torch.Generator().manual_seed(0)
    logits = torch.randn(64, 4, generator=dice, requires_grad=True)
    action, weight = torch.randint(4, (64,), generator=dice), torch.randn(64, generator=dice)
    gradients = []
    for clip in (0.0, 0.2):
        rung = parts("log_pi", "policy_loss", settings=dict(clip=clip))
        loss, _ = rung.policy_loss(logits, action, weight, rung.log_pi(logits, action).detach())
        gradients.append(torch.autograd.grad(loss.sum(), logits)[0])
    assert torch.allclose(*gradients, atol=1e-6)
    old = rung.log_pi(logits, action).detach() - 1  # the ratio is e, far beyond 1.2
    loss, _ = rung.policy_loss(logits, action, weight, old)
    gradient = torch.autograd.grad(loss.sum(), logits)[0]
    assert (gradient[weight > 0] == 0).all(), "what was gained already is not gained again"
    assert (gradient[weight < 0] != 0).any(dim=1).all(), "what became worse is still pulled back"


def test_normalise_is_mean_0_and_spread_1_over_all_processes():
    weight = torch.tensor([1.0, 2, 3, 6])
    one = parts("normalise").normalise(weight)
    assert one.mean() == pytest.approx(0, abs=1e-6) and one.square().mean() == pytest.approx(1, abs=1e-4)
    twin = types.SimpleNamespace(reduce=lambda sums, how: 2 * sums)  # the other process has the same numbers
    assert torch.allclose(parts("normalise", accelerator=twin).normalise(weight), one)
    other = torch.tensor([[20.0, 2], [200, 2]])  # two more numbers there: the sums of them, then of squares
    calls = iter(other)
    more = types.SimpleNamespace(reduce=lambda sums, how: sums + next(calls))
    assert parts("normalise", accelerator=more).normalise(weight)[0] == pytest.approx(
        (1 - 32 / 6) / (((weight - 32 / 6).square().sum().item() + 200) / 6) ** 0.5, abs=1e-4
    )


# ---- flying


def test_noise_draws_from_the_softmax(tools):
    """argmax of logits + Gumbel noise is a draw from softmax(logits)."""
    logits = np.array([[0.0, 1.0, -1.0, 2.0]])
    noise = np.random.default_rng(0).gumbel(size=(200_000, 4))
    share = np.bincount((logits + noise).argmax(1), minlength=4) / len(noise)
    assert share == pytest.approx((np.exp(logits) / np.exp(logits).sum()).ravel(), abs=5e-3)
    assert tools.think([(np.eye(4), np.zeros(4))], logits) == pytest.approx(logits)


def test_numpy_and_torch_are_the_same_net():
    made = parts("make_net", "as_pilot", "think", settings=dict(hidden=64), nn=torch.nn)
    net = made.make_net(4, 1.0)
    x = torch.randn(50, 8)
    assert np.allclose(made.think(made.as_pilot(net.state_dict()), x.numpy()), net(x).detach(), atol=1e-5)


def test_pieces_go_on_where_the_last_one_ended(tools, pilot):
    """Two pieces of 150 steps are one of 300; a new flight begins inside; whole flights end by themselves."""
    noise = np.random.default_rng(0).gumbel(size=(300, 3, 4))
    whole = tools.Fleet().start([1, 2, 3]).fly(pilot, noise, again=True)
    fleet = tools.Fleet().start([1, 2, 3])
    pieces = [fleet.fly(pilot, part, again=True) for part in (noise[:150], noise[150:])]
    for name in ("x", "after", "action", "reward", "ended", "flown"):
        assert (np.concatenate([piece[name] for piece in pieces]) == whole[name]).all(), name
    assert whole["ended"].any() and whole["flown"].all() and pieces[0]["cut"][-1].all()
    once = tools.Fleet().start([1, 2, 3]).fly(pilot, noise)
    assert (once["ended"].sum(0) <= 1).all()
    assert (once["flown"].sum(0) == once["ended"].argmax(0) + 1)[once["ended"].any(0)].all()


def test_the_thousandth_step_is_a_cut_and_no_end(tools, monkeypatch):
    fleet = parts("make_env", "think", "Fleet", LIMIT=20, gym=gym).Fleet()
    still = [(np.zeros((8, 4)), np.array([1.0, 0, 0, 0]))]
    flights = fleet.start([5]).fly(still, np.zeros((50, 1, 4)), again=True)
    assert list(np.flatnonzero(flights["cut"][:, 0])) == [19, 39, 49] and not flights["ended"].any()
    assert (flights["after"][19, 0] != flights["x"][20, 0]).any(), "the state before the reset is kept"
    assert len(fleet.landings) == 2


def test_the_choice_prefers_what_is_sure():
    """A pilot that crashes one time in ten has the better mean here, but less its error the worse one."""
    asked = []

    def trial(pilot, seeds, greedy):
        asked.append((pilot, greedy, tuple(seeds)))
        lucky = [290.0] * 54 + [115.0] * 6 if not greedy else [270.0] * 60
        return np.array(lucky if pilot == 3 else [250.0] * 60)[:, None]

    history = [dict(round=number, valid=valid) for number, valid in ((1, 10), (2, 280), (3, 275), (4, 270))]
    given = dict(history=history, trial=trial, as_pilot=int, settings=dict(valid=20, choose=60))
    best = parts("choose", **given, print=lambda text: None).choose({f"{k}": k for k in (1, 2, 3, 4)})
    assert (best["round"], best["greedy"], best["valid"]) == (3, True, 270.0)
    assert {pilot for pilot, _, _ in asked} == {2, 3, 4} and len(asked) == 6
    assert all(set(seeds) == {*KNOWN["VALID_SEEDS"][20:]} for _, _, seeds in asked)


def test_no_seed_serves_twice():
    splits = [{KNOWN["JUDGE_SEED"]}, *({*KNOWN[name]} for name in ("VALID_SEEDS", "UNSEEN_SEEDS"))]
    assert len(set.union(*splits)) == sum(len(split) for split in splits) == 181
    assert all(seed not in KNOWN["TRAIN_SEEDS"] for split in splits for seed in split)


# ---- the run


def test_beats_constant_answers(done, tools):
    """The tiny boss against each of the four moves flown for ever, on the same unseen seeds."""
    result, _ = done
    seeds = list(KNOWN["UNSEEN_SEEDS"][: result["settings"]["unseen"]])
    for move in range(4):
        always = [(np.zeros((8, 4)), np.eye(4)[move])]
        flights = tools.Fleet().start(seeds).fly(always, np.zeros((1000, len(seeds), 4)))
        assert result["score"] > flights["reward"].sum(0).mean() + 20, KNOWN["MOVES"][move]


def test_score_is_the_honest_mean_and_the_judge_stands_beside(done):
    result, folder = done
    assert result["score"] == result["honest_mean"] and result["metric"] == "mean return"
    assert {"judge_plain", "judge_file", "honest_spread", "best_of", "comparable"} <= set(result)
    assert result["judge_file"] >= result["judge_plain"]
    text = (folder.parents[2] / "run.log").read_text()
    for word in (
        "policy, honest mean",
        "policy, the judge's five",
        "best of 2",
        "unseen seeds",
        "times the first",
    ):
        assert word in text, word
    assert "steps/s" in text and "no pictures" in text


def test_figures_of_the_report(done):
    _, folder = done
    assert {path.stem for path in (folder / "figures").iterdir()} == {
        "random",
        "curves",
        "returns",
        "levels",
        "pilot",
    }
    assert len((folder / "history.csv").read_text().splitlines()) == 4


def test_real_is_the_same_moon_and_another_name(run, tmp_path):
    one = run(SCRIPT, HW_DATA="auto", HW_LEVEL="simple", HW_BEST_OF_N=1).wait()
    assert one.code == 0 and "data: real; files: none needed" in one.text, one.text
    assert (tmp_path / "out/HW12/simple-real/Action_List.npy").exists() and "upload it at https" in one.text


def test_other_physics_is_said_and_marked(run, changed, tmp_path):
    one = run(changed(SCRIPT, "-0.0012620, 1.3984586", "0.0039611, 1.4083536"), HW_LEVEL="simple").wait()
    assert one.code == 0 and "IT IS NOT THE KNOWN ONE" in one.text and "not comparable" in one.text
    about = json.loads((tmp_path / "out/HW12/simple-sample/Action_List.json").read_text())
    assert about["comparable"] is False


@pytest.mark.parametrize("spoil", ["version", "Box2D", "pygame"])
def test_an_environment_that_cannot_be_made_names_the_remedy(run, changed, spoil):
    """Gymnasium's box2d folder imports pygame too, even for flights that nobody draws."""
    script = SCRIPT
    if spoil == "version":
        script = changed(SCRIPT, '"LunarLander-v3", 1000', '"LunarLander-v9", 1000')
    hide = "import sys\nfor name in [*sys.modules]:\n"  # what the test's server has imported is forgotten
    hide += "    if name.startswith(('gymnasium.envs.box2d', 'Box2D', 'pygame')):\n"
    hide += "        del sys.modules[name]\n"
    hide += f"sys.modules['{spoil}'] = None\n"
    hide += "import importlib.util as u\nreal = u.find_spec\n"
    hide += f"u.find_spec = lambda name, *rest: True if name == '{spoil}' else real(name, *rest)\n"
    ended = run(script, patch=hide).wait()
    assert ended.code == 1 and 'pip install --upgrade "gymnasium[box2d]"' in ended.text, ended.text
    assert "cannot make LunarLander-v" in ended.text and "Traceback" not in ended.text


@pytest.mark.parametrize("package", ["Box2D", "pygame"])
def test_a_missing_package_that_cannot_be_installed(run, package):
    hide = "import importlib.util as u\nreal = u.find_spec\n"
    hide += f"u.find_spec = lambda name, *rest: None if name == '{package}' else real(name, *rest)\n"
    ended = run(SCRIPT, patch=hide + "import subprocess\nsubprocess.call = lambda command: 1").wait()
    assert ended.code == 1 and "pip install gymnasium[box2d]" in ended.text and "Traceback" not in ended.text


def test_lost_policies_end_the_run(run, changed, tmp_path):
    broken = changed(SCRIPT, "logits = actor(flat", "logits = float('nan') * actor(flat")
    ended = run(broken, HW_LEVEL="simple").wait()
    assert ended.code == 1 and "diverged in round 1" in ended.text and "Traceback" not in ended.text
    check = parts("check_health").check_health
    with pytest.raises(Stop, match="collapsed in round 4 .* round 3 is kept; choose another SEED"):
        check(0.1, 0.01, -50.0, 4)
    check(0.1, 0.01, 250.0, 4)
    check(0.1, 0.9, -50.0, 4)
