"""HW12: steps in the environment per second, a fleet against one lander that asks the net at every step."""

import gymnasium as gym
import numpy as np
import torch
from notebooks import ROOT, facts, pick
from torch import nn

SCRIPT = ROOT / "HW12" / "HW12.py"
FACTS = {name: value for name, value in facts(SCRIPT).items() if name.isupper()}
NAMES = ["make_env", "think", "Fleet", "as_pilot", "advantage", "weigh", "log_pi", "policy_loss"]
CLIP = dict(clip=0.0, weight="reward to go", scale=0.1, gamma=0.99, lam=1.0)
LANDERS, STEPS = 16, 256


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
    kept, rewards = official_flights(net, env, 5)
    weight = (rewards - rewards.mean()) / (rewards.std() + 1e-9)
    optimizer.zero_grad()
    (-kept * torch.from_numpy(weight)).sum().backward()
    optimizer.step()
    return len(rewards)


def noise(steps):
    return -torch.empty(steps, LANDERS, 4).exponential_().log().numpy()


def our_update(ours, net, optimizer, fleet):
    """The same update with a fleet: whole flights without a graph, one batch for the gradient."""
    fleet.start(torch.randint(2**31, (LANDERS,)).tolist())
    flights = fleet.fly(pilot_of(net), noise(1000))
    flown = flights["flown"]
    x, action = torch.tensor(flights["x"][flown]), torch.tensor(flights["action"][flown])
    weight = flights["reward"][flown]
    weight = torch.tensor((weight - weight.mean()) / (weight.std() + 1e-9))
    hidden = torch.tanh(net.two(torch.tanh(net.one(x))))
    loss, _ = ours.policy_loss(net.three(hidden), action, weight, None)
    optimizer.zero_grad()
    loss.sum().backward()
    optimizer.step()
    return int(flown.sum())


def pilot_of(net):
    layers = (net.one, net.two, net.three)
    return [(layer.weight.detach().numpy().T.copy(), layer.bias.detach().numpy()) for layer in layers]


def cases():
    torch.set_num_threads(1)  # as in the notebook, and as good for the sample's way
    torch.manual_seed(0)
    ours = pick(SCRIPT, *NAMES, **FACTS, settings=CLIP, Stop=RuntimeError)
    net, env, fleet = Net(), gym.make(FACTS["ENVIRONMENT"]), ours.Fleet()
    updates = [torch.optim.SGD(net.parameters(), lr=0.0) for _ in range(2)]  # lr 0: all repeats fly alike
    env.reset(seed=543)
    fleet.start(range(LANDERS))
    return {
        "HW12": (
            "steps in the environment per second, choosing moves",
            lambda: fleet.fly(pilot_of(net), noise(STEPS), again=True)["flown"].size,
            lambda: len(official_flights(net, env, 12)[0]),
        ),
        "HW12/update": (
            "steps in the environment per second, whole updates",
            lambda: sum(our_update(ours, net, updates[0], fleet) for _ in range(3)),
            lambda: sum(official_update(net, updates[1], env) for _ in range(3)),
        ),
    }
