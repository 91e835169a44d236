"""HW15: training tasks per second and loading alone, the official way and ours, with the same net."""

import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import torch
from notebooks import ROOT, pick
from PIL import Image
from torch.nn import functional as F

SCRIPT, WIDTH, TASKS = ROOT / "HW15" / "HW15.py", 64, 8
torch.manual_seed(0)
drawings = torch.randint(0, 256, (40, 20, 28, 28), dtype=torch.uint8)
FOLDER, dice = tempfile.TemporaryDirectory(), np.random.default_rng(0)
for number, character in enumerate(drawings):
    home = Path(FOLDER.name, f"character{number:02d}")
    home.mkdir()
    for drawer, page in enumerate(character):
        Image.fromarray(page.numpy()).save(home / f"{number:04d}_{drawer + 1:02d}.png")


class One:
    """As much of an Accelerator as one process needs."""

    num_processes, process_index = 1, 0

    def autocast(self):
        return torch.autocast("cpu", enabled=False)


def official_task():
    """A folder is listed, all twenty drawings are decoded, two are kept: for each of five characters."""
    task = []
    for number in dice.choice(len(drawings), 5, replace=False):
        files = sorted(Path(FOLDER.name, f"character{number:02d}").glob("*.png"))
        pages = [np.asarray(Image.open(file), np.float32) / 255 for file in files]
        task.append(np.stack([pages[k] for k in dice.permutation(20)[:2]]))
    return torch.from_numpy(np.stack(task)).unsqueeze(2)  # (5, 2, 1, 28, 28)


def official_net(x, weights):
    """Four blocks and a linear layer by hand, batch norm always with the statistics of the batch."""
    for block in range(4):
        kernel, bias, gain, shift = weights[4 * block : 4 * block + 4]
        x = F.conv2d(x, kernel, bias, padding=1)
        x = F.batch_norm(x, None, None, gain, shift, training=True)
        x = F.max_pool2d(F.relu(x), 2)
    return F.linear(x.flatten(1), *weights[-2:])


def official_step(weights, optimizer, tasks, first_order):
    """One task after the other, one inner step of 0.4; the second order keeps the graph of that step."""
    labels, total = torch.arange(5), 0.0
    for _ in range(tasks):
        task = official_task()
        loss = F.cross_entropy(official_net(task[:, 0], weights), labels)
        slope = torch.autograd.grad(loss, weights, create_graph=not first_order)
        fast = [w - 0.4 * g for w, g in zip(weights, slope, strict=True)]
        total = total + F.cross_entropy(official_net(task[:, 1], fast), labels) / tasks
    optimizer.zero_grad()
    total.backward()
    optimizer.step()
    total.item()
    return tasks


def our_step(parts, way, model, optimizer, tasks):
    """The inside of the notebook's loop."""
    images = parts.draw_tasks(torch.arange(len(drawings)), tasks)
    optimizer.zero_grad()
    parts.outer_losses(way, model, images, 0.5).mean().backward()
    optimizer.step()
    return tasks


def cases():
    names = ["BatchNorm", "Conv4", "LABELS", "adapted", "adapt_all", "adapt_head", "adapt_heads"]
    names += ["heads_from", "embed", "each", "by_loop", "by_vmap", "solve", "outer_losses", "draw_tasks"]
    there = torch.ones(drawings.shape[:2], dtype=torch.bool)
    given = dict(WAYS=5, device="cpu", on_gpu=False, accelerator=One(), drawings=drawings, there=there)
    parts = pick(SCRIPT, *names, **given)
    maml = dict(how="maml", inner=1, first_order=False, every=False, prototypes=False)
    model = parts.Conv4(WIDTH, 0.4).to(memory_format=torch.channels_last)
    slow = [w.detach().clone().contiguous().requires_grad_() for w in model.parameters()][2:]
    adam = partial(torch.optim.Adam, lr=1e-3)
    ours, theirs = adam(model.parameters()), adam(slow)
    anil = maml | dict(how="anil", inner=5)

    def case(what, way, first_order):
        fast = partial(our_step, parts, way, model, ours, TASKS)
        return what, fast, partial(official_step, slow, theirs, TASKS, first_order)

    pool = torch.arange(len(drawings))
    return {
        "HW15": case("training tasks per second, our ANIL, their MAML", anil, False),
        "HW15/maml": case("training tasks per second, MAML", maml, False),
        "HW15/fo-maml": case("training tasks per second, FO-MAML", maml | dict(first_order=True), True),
        "HW15/loading": (
            "tasks per second, loading alone",
            lambda: sum(len(parts.draw_tasks(pool, 64)) for _ in range(20)),
            lambda: sum(len(official_task()[None]) for _ in range(20)),
        ),
    }
