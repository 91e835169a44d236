# ruff: noqa
"""The homework that the tests of the common cells run: y from x, two stages, a second a run.

conftest.py puts the common cells where their tags stand. What decides its answers is chosen so that mistakes of
the plumbing show: dropout and another seed a process (random numbers matter), momentum and a scheduler (their
state matters), and a second stage that learns what the first one left.
"""

# %% [markdown] tags=["header"]
# # The toy: y from x

# %% tags=["parameters"]
# @title Parameters
LEVEL = "boss"  # @param ["boss", "strong", "medium", "simple"]
WITHOUT = ""  # @param {type:"string"}
DATA = "auto"  # @param ["auto", "real", "sample"]
PROFILE = "auto"  # @param ["auto", "full", "small", "tiny"]
SEED = 2022  # @param {type:"integer"}
DATA_DIR = "data/TOY"  # @param {type:"string"}
OUT_DIR = "out/TOY"  # @param {type:"string"}
RESUME = True  # @param {type:"boolean"}
SUBMIT = False  # @param {type:"boolean"}
ROUNDS = 1  # @param {type:"integer"}
MODE = "plain"  # @param ["plain", "fancy"]
RATE = 0.05  # @param {type:"number"}

# %% cellView="form" jupyter={"source_hidden": true} tags=["homework"]
# @title Facts
HW, METRIC, HIGHER_IS_BETTER = "TOY", "mse", False
SLUG, JUDGE = "toy-slug", "https://www.kaggle.com/competitions/toy-slug"
BASELINES = {"simple": 1, "medium": 1, "strong": 1, "boss": 1}
FILES = {"train": ("toy*train*.csv", 1), "test": ("toy*test*.csv", 1)}
MIRRORS = []
HASHES = set()
OWN = {"ROUNDS": range(1, 100), "MODE": ("plain", "fancy"), "RATE": None}
NEEDS = {"torch": "torch", "accelerate": "accelerate", "filelock": "filelock"}
MIXED_PRECISION = False
LESS_MEMORY = "set ROUNDS to half"

# %% tags=["common:setup"]

# %% cellView="form" jupyter={"source_hidden": true} tags=["sample"]
# @title The sample: a bent line with noise
NOISE = 0.1


def bend(x):
    return np.sin(3 * x)


def make_sample(folder, answers):
    rows = 64 if PROFILE == "tiny" else 96
    random = np.random.default_rng(0)
    x = random.uniform(-1, 1, rows)
    y = bend(x) + NOISE * random.normal(size=rows)
    half = rows // 2
    train = "\n".join(f"{k},{x[k]:.6f},{y[k]:.6f}" for k in range(half))
    test = "\n".join(f"{k - half},{x[k]:.6f}" for k in range(half, rows))
    (folder / "toy.train.csv").write_text(f"id,x,y\n{train}\n")
    (folder / "toy.test.csv").write_text(f"id,x\n{test}\n")
    np.save(answers / "y.npy", y[half:])


# %% tags=["common:data"]


# %% cellView="form" jupyter={"source_hidden": true} tags=["read"]
# @title Read the files
def read(paths, columns):
    """The first of the candidates that is a table."""
    for path in paths:
        try:
            rows = np.loadtxt(path, delimiter=",", skiprows=1, ndmin=2)
        except ValueError as error:
            reason = error
            continue
        if len(rows) and rows.shape[1] == columns:
            return torch.tensor(rows, dtype=torch.float32)
        reason = f"it has {len(rows)} rows"
    raise Stop(f"{path} is not a table of {columns} columns: {reason}")


x, y = read(PATHS["train"], 3)[:, 1:].T
test_id, test_x = read(PATHS["test"], 2).T
say(f"{len(x)} rows to learn from, {len(test_x)} to guess")

# %%
plt.figure(figsize=(4, 3))
plt.plot(x, y, "o")
show("data.png")

# %% tags=["levels"]
LEVELS = {  # simple medium strong boss
    "hidden": (4, 16, 16, 16),
    "dropout": (0.0, 0.0, 0.3, 0.3),
    "stages": (1, 1, 1, 2),
    "bins": (3, 4, 5, 7),
}
SIZES = {
    "full": {"epochs": (200, 200, 200, 250), "rate": (0.05, 0.05, 0.05, 0.05), "steps": (50, 50, 50, 50)},
    "small": {"epochs": (200, 200, 200, 200), "rate": (0.05, 0.05, 0.05, 0.05), "steps": (50, 50, 50, 50)},
}
settings = choose(LEVELS, SIZES)
say(f"settings: {settings}, RATE: {RATE!r}")

# %% tags=["common:checkpoint"]


# %% tags=["train"]
class Base(torch.nn.Module):
    def forward(self, x):
        return self.layers(x[:, None])[:, 0]


class Net(Base):
    def __init__(self):
        super().__init__()
        hidden, dropout = settings["hidden"], torch.nn.Dropout(settings["dropout"])
        self.layers = torch.nn.Sequential(
            torch.nn.Linear(1, hidden), torch.nn.Tanh(), dropout, torch.nn.Linear(hidden, 1)
        )


def loss_of(guess, y):
    return (guess - y).square().mean()


def train_one_epoch(net, optimizer, x, y):
    total = 0.0
    for rows in torch.randperm(len(x)).chunk(4):
        loss = loss_of(net(x[rows]), y[rows])
        optimizer.zero_grad()
        accelerator.backward(loss)
        optimizer.step()
        total += loss.item()
    return total / 4


def train(stage, x, y):
    net = accelerator.prepare(Net())
    optimizer = torch.optim.SGD(net.parameters(), lr=settings["rate"], momentum=0.9)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 0.8**epoch)
    seen = {"losses": torch.zeros(0), "count": 0}
    parts = {"net": net, "optimizer": optimizer, "scheduler": scheduler, "seen": seen}
    done = load_checkpoint(stage, [train, x, y], **parts)
    for epoch in range(done, settings["epochs"]):
        loss = train_one_epoch(net.train(), optimizer, x, y)
        loss = accelerator.reduce(torch.tensor(loss), "mean").item()  # a checkpoint is the main process's
        scheduler.step()
        seen["losses"] = torch.cat([seen["losses"], torch.tensor([loss])])
        seen["count"] += 1
        history.append({"stage": stage, "epoch": epoch, "loss": loss})
        save_checkpoint(stage, epoch + 1, **parts)
    say(f"{stage}: {seen['count']} epochs, loss {seen['losses'][-1]:.4f}")
    net = bare(net).eval()
    net.shift = seen["losses"].mean() / 100  # so that the dict of a checkpoint matters, too
    return net


def guess_of(nets, x):
    with torch.no_grad():
        return sum(net(x) + net.shift for net in nets)


torch.manual_seed(SEED + accelerator.process_index)  # each process draws its own
nets = [train("first", x, y)]
if settings["stages"] == 2:
    nets.append(train("second", x, y - guess_of(nets, x)))

# %% tags=["predict"]
guess = guess_of(nets, test_x).numpy()
summary = {"valid_score": float(loss_of(guess_of(nets, x), y)), "parameters": 1, "examples_per_second": 1}


# %% cellView="form" jupyter={"source_hidden": true} tags=["submission"]
# @title Submission: how it is written, checked and scored
def is_number(text):
    try:
        return abs(float(text)) < 100
    except ValueError:
        return False


def check_submission(path):
    check_table(path, "id,y", test_id.int().tolist(), is_number, "a number below 100")


def score_submission(path, answers):
    guess = np.loadtxt(path, delimiter=",", skiprows=1)[:, 1]
    return np.square(guess - np.load(answers / "y.npy")).mean()


submission = OUT / ("toy.csv" if REAL else "toy.sample.csv")
rows = [f"{number:.0f},{value:.9g}" for number, value in zip(test_id.tolist(), guess)]
if MAIN:
    with aside(submission) as part:
        part.write_text("\n".join(["id,y", *rows]) + "\n")

# %% tags=["common:submit"]

# %% cellView="form" jupyter={"source_hidden": true} tags=["measured"]
# @title What was measured: written by make ladder
MEASURED = {"levels": {"boss": [0.1, 0.12, 0.11]}, "without": {"dropout": [0.2], "stages": [0.15, 0.14]}}

# %% tags=["report"]
show_worth()
plt.figure()
plt.hist(guess, settings["bins"])
show("guesses.png")
table([{"level": LEVEL, "guesses": len(guess)}])

# %% tags=["common:result"]
