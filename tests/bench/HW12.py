"""HW12: the official sample's REINFORCE against the notebook's boss; and steps per second."""

import time

import gymnasium as gym
import numpy as np
import torch
from notebooks import ROOT, facts, pick
from torch import nn

SCRIPT = ROOT / "HW12" / "HW12.py"
FACTS = {name: value for name, value in facts(SCRIPT).items() if name.isupper()}
NAMES = [
    "make_env",
    "think",
    "Fleet",
    "fly",
    "trial",
    "evaluate",
    "collect",
    "make_net",
    "as_pilot",
    "log_pi",
]
NAMES += ["normalise", "add_up", "reward_now", "reward_to_go", "advantage", "WEIGHTS", "ask", "clipped"]
NAMES += ["make_batch", "shuffled", "descend", "teach_actor", "teach_critic", "fly_and_learn"]
NAMES += ["TRAIN_SEEDS", "VALID_SEEDS", "LEVELS", "SIZES"]
UPDATES = 400  # of the official sample's stored run


class Net(nn.Module):
    """The official sample's policy: 8-16-16-4, tanh, softmax."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.three = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x):
        return torch.softmax(self.three(torch.tanh(self.two(torch.tanh(self.one(x))))), dim=-1)


def official_flights(net, env, episodes):
    """The official sample's way: one state, one distribution and one piece of graph a step."""
    kept, rewards = [], []
    for _ in range(episodes):
        x, over = env.reset()[0], False
        while not over:
            draw = torch.distributions.Categorical(net(torch.FloatTensor(x)))
            action = draw.sample()
            kept.append(draw.log_prob(action))
            x, reward, ended, cut, _ = env.step(action.item())
            rewards.append(reward)
            over = ended or cut
    return torch.stack(kept), np.array(rewards)


def official_update(net, optimizer, env):
    """Five flights, the reward of each step, normalised; the SUM of the losses, as there."""
    kept, rewards = official_flights(net, env, 5)
    weight = (rewards - rewards.mean()) / (rewards.std() + 1e-9)
    optimizer.zero_grad()
    (-kept * torch.from_numpy(weight)).sum().backward()
    optimizer.step()
    return len(rewards)


def pilot_of(net):
    layers = (net.one, net.two, net.three)
    return [(layer.weight.detach().numpy().T.copy(), layer.bias.detach().numpy()) for layer in layers]


def notebook():
    """The notebook's own functions, with the settings of its boss."""
    torch.set_num_threads(1)  # as in the notebook, and as good for the sample's way
    settings = {}
    ours = pick(SCRIPT, *NAMES, **FACTS | {"settings": settings, "PROFILE": "small", "Stop": RuntimeError})
    for rows in (ours.LEVELS, ours.SIZES["small"]):
        settings.update({name: row[3] for name, row in rows.items()})
    return ours


def race(seed=0):
    """(what, our seconds, official seconds) to the best validation of the official recipe.

    Theirs: 400 updates, a validation every 50 that the clock does not count; its seconds are those until its
    best one. Ours: the boss from nothing, by its own loop, a validation after every batch that the clock DOES
    count, until one is as good. Both validations are the notebook's: one flight from each of 20 seeds."""
    ours = notebook()
    torch.manual_seed(seed)
    net, env = Net(), gym.make(FACTS["ENVIRONMENT"])
    optimizer = torch.optim.SGD(net.parameters(), lr=0.001)
    env.reset(seed=1_000_000 + seed)
    best, official, seconds = -np.inf, 0.0, 0.0
    for update in range(1, UPDATES + 1):
        tic = time.perf_counter()
        official_update(net, optimizer, env)
        seconds += time.perf_counter() - tic
        if update % 50 == 0:
            value = ours.evaluate(pilot_of(net))
            if value > best:
                best, official = value, seconds
    tic, value = time.perf_counter(), -np.inf
    torch.manual_seed(seed)
    nets = {"actor": ours.make_net(4, 0.01), "critic": ours.make_net(1, 1.0)}
    optimizers = {
        name: torch.optim.Adam(one.parameters(), eps=1e-5, fused=True) for name, one in nets.items()
    }
    fleet, progress = ours.Fleet(16), {"steps": 0, "landings": []}
    while value < best:
        ours.fly_and_learn(fleet, nets, optimizers, progress, progress["steps"] + 1)
        value = ours.evaluate(ours.as_pilot(nets["actor"].state_dict()))
    mine = time.perf_counter() - tic
    return f"seconds to the official sample's score (mean return {best:.0f})", mine, official


def cases():
    ours = notebook()
    torch.manual_seed(0)
    net, env, fleet = Net(), gym.make(FACTS["ENVIRONMENT"]), ours.Fleet(16)
    env.reset(seed=543)
    fleet.start(range(16))
    noise = np.random.default_rng(0).gumbel(size=(256, 16, 4))
    return {
        "HW12/flying": (
            "steps in the environment per second, choosing moves",
            lambda: ours.fly(fleet, pilot_of(net), noise, again=True)["flown"].size,
            lambda: len(official_flights(net, env, 12)[0]),
        )
    }
