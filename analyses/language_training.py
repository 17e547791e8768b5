"""A small language model trained by AdamW, KFAC and K-BFGS at equal epochs: who is below whom?

    python analyses/language_training.py [--model gpt-small] [--epochs 1] [--screen 100]
        [--seeds 0 1] [--methods adamw kfac k-bfgs] [--untied] [--out FOLDER] [--log FILE.json]

nanoGPT's CPU setting: batches of 12, windows of 64 symbols. AdamW is torch's own in a plain loop
(decay 0.1, β₂ = 0.99: Karpathy 2022), the others are curvlab's with their documents' constants.
Each method takes the rate, and damping, of a grid that has the least validation loss after
`--screen` minibatches of seed 0; then it is trained for whole epochs from each seed. All see the
same minibatches, and all rates rise over 20 minibatches and fall by a cosine to a tenth. Nat a
symbol; CPU seconds of one thread. Two epochs take about an hour.
"""

import argparse
import itertools
import json
import math
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import Tensor, nn

import curvlab as cl
from curvlab.errors import Diverged
from curvlab.show.style import looks

RISE = 20  # minibatches over which a rate rises
GRIDS: dict[str, dict[str, list[float]]] = {
    "adamw": {"lr": [3e-4, 1e-3, 3e-3, 1e-2]},
    "adam": {"lr": [3e-4, 1e-3, 3e-3, 1e-2]},
    "kfac": {"lr": [3e-3, 1e-2, 3e-2, 1e-1], "damping": [1e-2, 1e-1]},
    "kfac-reduce": {"lr": [3e-3, 1e-2, 3e-2, 1e-1], "damping": [1e-2, 1e-1]},
    "tnt": {"lr": [3e-5, 1e-4, 3e-4, 1e-3], "damping": [1e-2, 1e-1]},
    "k-bfgs": {"lr": [3e-3, 1e-2, 3e-2, 1e-1], "damping": [1e-1, 1.0]},
    "k-bfgs-l": {"lr": [3e-3, 1e-2, 3e-2, 1e-1], "damping": [1e-1, 1.0]},
    "sgd-m": {"lr": [1e-2, 3e-2, 1e-1]},
}

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--model", default="gpt-small", choices=["gpt-small", "gpt-tiny"])
parser.add_argument("--data", default=None, help="the model's own by default")
parser.add_argument(
    "--methods", nargs="+", default=["adamw", "kfac", "k-bfgs"], choices=sorted(GRIDS)
)
parser.add_argument(
    "--untied",
    action="store_true",
    help="give the head weights of its own, which begin as the table",
)
parser.add_argument("--epochs", type=int, default=1)
parser.add_argument("--screen", type=int, default=100, help="minibatches of a run of the grid")
parser.add_argument("--steps", type=int, help="end a run after so many minibatches")
parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
parser.add_argument("--batch-size", type=int, default=12)
parser.add_argument("--log", type=Path, help="keep what is measured there; a method in it is read")
parser.add_argument("--out", type=Path, default=Path("analyses/figures"))
options = parser.parse_args()
torch.set_num_threads(1)  # so that CPU seconds are a step's

DATA: str = options.data or str(cl.models.MODELS[options.model].data)
train, validation = cl.datasets.load(DATA)
EPOCH = math.ceil(len(train) / options.batch_size)


class Untied(nn.Module):
    """A GPT whose head has weights of its own, which begin as those of its table."""

    def __init__(self, tied: Any) -> None:
        super().__init__()
        self.body = tied
        symbols, width = tied.embedding.weight.shape
        self.head = nn.Linear(width, symbols, bias=False)
        self.head.weight = nn.Parameter(tied.embedding.weight.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of the symbol that follows each place."""
        body = self.body
        h = body.embedding(x) + body.positions(torch.arange(x.shape[1]).expand(x.shape))
        for layer in body.layers:
            h = layer(h)
        found: Tensor = self.head(body.norm(h))
        return found


@dataclass
class Curve:
    """One run.

    Args:
        steps: minibatches at each evaluation.
        seconds: CPU seconds of the steps until then, evaluations apart.
        loss: of the validation set, nat a symbol; infinite where the run ended for its loss.
    """

    steps: list[int]
    seconds: list[float]
    loss: list[float]


def adamw(model: nn.Module, lr: float) -> tuple[Any, Callable[[Tensor, Tensor], object]]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=0.1)

    def step(x: Tensor, y: Tensor) -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x).flatten(0, 1), y.flatten()).backward()
        optimizer.step()

    return optimizer, step


def own(
    name: str, model: nn.Module, seed: int, **constants: float
) -> tuple[Any, Callable[[Tensor, Tensor], object]]:
    objective = cl.Objective(model, cl.likelihoods.Tokens(), seed=seed)
    with warnings.catch_warnings():  # norms follow the gradient, which is said once a run
        warnings.simplefilter("ignore", cl.CurvlabWarning)
        optimizer = cl.optimizer(name, objective, **constants)
    return optimizer, lambda x, y: optimizer.step(objective.closure(x, y))


def evaluated(model: nn.Module) -> float:
    with torch.no_grad():
        losses = [
            nn.functional.cross_entropy(
                model(validation.x[i : i + 128]).flatten(0, 1),
                validation.y[i : i + 128].flatten(),
                reduction="sum",
            )
            for i in range(0, len(validation), 128)
        ]
    return float(sum(losses)) / validation.y.numel()


def run(name: str, seed: int, steps: int, every: int, **constants: float) -> Curve:
    torch.manual_seed(seed)
    model = cl.models.build(options.model, seed=seed)
    model = Untied(model) if options.untied else model
    optimizer, step = (
        adamw(model, **constants) if name == "adamw" else own(name, model, seed, **constants)
    )
    highest = constants["lr"]
    curve = Curve([0], [0.0], [evaluated(model)])
    seconds, epochs = 0.0, math.ceil(steps / EPOCH)
    batches = train.batches(options.batch_size, epochs=epochs, seed=seed)
    for i, (x, y) in enumerate(itertools.islice(batches, steps), 1):
        fall = 0.55 + 0.45 * math.cos(math.pi * i / steps)
        for group in optimizer.param_groups:
            group["lr"] = highest * min(1.0, i / RISE) * fall
        began = time.process_time()
        try:
            step(x, y)
        except Diverged as error:
            print(f"  {name} {constants}: step {i}: {error}", flush=True)
            curve.steps.append(steps)
            curve.seconds.append(seconds)
            curve.loss.append(math.inf)
            return curve
        seconds += time.process_time() - began
        if i % every == 0 or i == steps:
            curve.steps.append(i)
            curve.seconds.append(seconds)
            curve.loss.append(evaluated(model))
    return curve


def measured() -> dict[str, Any]:
    steps = min(options.steps or options.epochs * EPOCH, options.epochs * EPOCH)
    found: dict[str, Any] = {"model": options.model, "data": DATA, "epoch": EPOCH, "runs": {}}
    if options.log and options.log.exists():
        found = json.loads(options.log.read_text())
    for name in options.methods:
        if name in found["runs"]:
            continue
        grid = GRIDS[name]
        tried: list[tuple[float, dict[str, float]]] = []
        for values in itertools.product(*grid.values()):
            constants = dict(zip(grid, values, strict=True))
            loss = run(name, 0, options.screen, options.screen, **constants).loss[-1]
            tried.append((loss, constants))
            print(f"{name} {constants}: {loss:.4f} after {options.screen}", flush=True)
        least, best = min(tried, key=lambda each: each[0])
        runs = {
            seed: vars(run(name, seed, steps, max(1, steps // 10), **best))
            for seed in options.seeds
            if math.isfinite(least)
        }
        found["runs"][name] = {"grid": tried, "best": best, "seeds": runs}
        for seed, curve in runs.items():
            print(
                f"{name} {best}, seed {seed}: {curve['loss'][-1]:.4f} after {steps} minibatches,"
                f" {curve['seconds'][-1]:.0f} CPU s",
                flush=True,
            )
        if options.log:
            options.log.write_text(json.dumps(found))
    return found


found = measured()

figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained", sharey=True)
shown = [name for name, each in found["runs"].items() if each["seeds"]]
styles = looks({name: name for name in shown})
rows = []
for name in shown:
    each, style = found["runs"][name], styles[name]
    curves = list(each["seeds"].values())
    losses = np.array([curve["loss"] for curve in curves if len(curve["loss"]) > 2])
    if not len(losses):
        continue
    steps, seconds = np.array(curves[0]["steps"]), np.mean([c["seconds"] for c in curves], 0)
    constants = ", ".join(f"{key} {value:g}" for key, value in each["best"].items())
    for ax, across in ((left, steps / found["epoch"]), (right, seconds)):
        kwargs = {"color": style.colour, "linestyle": style.dashes, "marker": style.marker}
        ax.plot(across, losses.mean(0), label=f"{name} ({constants})", markersize=4, **kwargs)
        ax.fill_between(
            across, losses.min(0), losses.max(0), color=style.colour, alpha=0.2, linewidth=0
        )
    rows.append((name, constants, losses[:, -1], seconds[-1], seconds[-1] / steps[-1]))
left.set_xlabel("epochs")
right.set_xlabel("CPU seconds of the steps, one thread")
left.set_ylabel("validation loss, nat a symbol")
head = ", untied," if options.untied else ""
left.set_title(
    f"{found['model']}{head} on {found['data']}, batches of {options.batch_size}", fontsize=10
)
count = len(options.seeds)
of = f"seed {options.seeds[0]}" if count == 1 else f"mean and range of {count} seeds"
right.set_title(of, fontsize=10)
right.legend(fontsize=8)
for ax in (left, right):
    ax.grid(alpha=0.3)
options.out.mkdir(parents=True, exist_ok=True)
name = "language_training_untied.png" if options.untied else "language_training.png"
figure.savefig(options.out / name, dpi=150)
print(f"wrote {name}")
print("| method | constants | validation loss, seeds | bits | CPU s | s a step |")
print("|---|---|---|---|---|---|")
for name, constants, last, seconds, each in rows:
    values = ", ".join(f"{value:.3f}" for value in last)
    bits = float(np.mean(last)) / math.log(2)
    print(f"| {name} | {constants} | {values} | {bits:.2f} | {seconds:.0f} | {each:.2f} |")
