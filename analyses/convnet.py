"""ConvNet (S2QN 6.3) on a subset of CIFAR-10 by every method that takes convolutions: loss against epochs and against time.

    python analyses/convnet.py [--budget smoke|cpu] [--methods NAME …] [--out FOLDER]

`cpu`: 8,068 images (`cifar10-subset`, a file in CURVLAB_DATA), minibatches of 128. `smoke`: two steps a method on random
images, to see that everything runs. Learning rates and dampings: of the document's nearest table, else chosen once, not tuned.
"""

import argparse
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib
import torch

import curvlab as cl

matplotlib.use("Agg")
import matplotlib.pyplot as plt


@dataclass(frozen=True)
class Method:
    lr: float
    damping: float
    label: str
    options: dict[str, object] = field(default_factory=dict)


OFTEN = {"update_every": 10, "refresh_every": 100}
"""T₁ and T₂ of the CNNs of the thesis (Table 4.4; practice)."""

METHODS = {
    "sgd-m": Method(0.003, 0.0, "SGD-m"),  # thesis Table 3.7, VGG16
    "adam": Method(0.003, 0.1, "Adam"),  # Table 3.7, VGG16
    "kfac": Method(0.01, 0.1, "KFAC", OFTEN),  # Table 3.7, ResNet32
    "shampoo": Method(0.001, 0.1, "Shampoo", OFTEN),  # Table 4.4, VGG16
    "tnt": Method(1e-4, 0.1, "TNT", OFTEN),  # Table 4.4, VGG16
    "k-bfgs": Method(0.1, 10.0, "K-BFGS", {"update_every": 20}),  # Table 3.7, CIFAR-100, VGG16; 30 and 1e4 belong to BatchNorm
    "k-bfgs-l": Method(0.3, 100.0, "K-BFGS(L)", {"update_every": 20}),  # Table 3.7, CIFAR-100, VGG16
    "kf-bfgs-cnn": Method(
        1.0, 10.0, "KF-BFGS-CNN", {"update_every": 20}
    ),  # as K-BFGS; momentum is an average, ten times smaller
    "kf-bfgs-l-cnn": Method(3.0, 100.0, "KF-BFGS(L)-CNN", {"update_every": 20}),
    "skqn-l": Method(0.3, 3.0, "SKQN-L", {"refresh_every": 20}),  # our values: at (0.3, 0.3) L and B2 diverge
    "skqn-b1": Method(0.3, 0.3, "SKQN-B1", {"refresh_every": 20}),
    "skqn-b2": Method(0.3, 3.0, "SKQN-B2", {"refresh_every": 20}),
}

BUDGETS = {"smoke": (1, 8), "cpu": (4, 128)}
"""{budget: (epochs, examples in a minibatch)}"""

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--budget", choices=BUDGETS, default="cpu")
parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
parser.add_argument("--epochs", type=int, help="the budget's where absent")
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--out", type=Path, default=Path(__file__).parent / "figures")
options = parser.parse_args()
options.out.mkdir(parents=True, exist_ok=True)
epochs, size = options.epochs or BUDGETS[options.budget][0], BUDGETS[options.budget][1]


def images(count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(options.seed)
    x = torch.randn(count, size, 3, 32, 32, generator=generator)
    return list(zip(x, torch.randint(10, (count, size), generator=generator), strict=True))


if options.budget == "smoke":
    warm, steps = images(1), 2
    source = "random images"
else:
    train, _ = cl.datasets.load("cifar10-subset")
    warm, steps = train.batches(size, seed=options.seed), len(train) // size
    source = train.name


def batches() -> object:
    return images(2) if options.budget == "smoke" else train.batches(size, epochs=epochs, seed=options.seed)


@dataclass(frozen=True)
class Curve:
    """Mean loss of every epoch's minibatches, each before its step, and the seconds until the epoch's end."""

    losses: list[float]
    seconds: list[float]
    failed: str = ""


def run(name: str) -> Curve:
    method = METHODS[name]
    objective = cl.Objective(cl.models.build("convnet", seed=options.seed), cl.likelihoods.Categorical(), seed=options.seed)
    optimizer = cl.optimizer(name, objective, lr=method.lr, damping=method.damping, **method.options)
    found: list[float] = []
    seconds: list[float] = []
    start = time.perf_counter()
    try:
        optimizer.warm_start(warm)
        for step, (x, y) in enumerate(batches(), 1):
            found.append(float(optimizer.step(objective.closure(x, y))))
            if step % steps == 0:
                seconds.append(time.perf_counter() - start)
    except cl.CurvlabError as error:
        return Curve(means(found), seconds, str(error))
    return Curve(means(found), seconds)


def means(losses: list[float]) -> list[float]:
    return [sum(losses[at : at + steps]) / steps for at in range(0, len(losses) - steps + 1, steps)]


warnings.simplefilter("once", cl.CurvlabWarning)
curves: dict[str, Curve] = {}
print(f"convnet on {source}, {epochs} epochs of {steps} minibatches of {size}, seed {options.seed}")
print(f"{'method':>10}{'lr':>9}{'damping':>9}{'first epoch':>13}{'last epoch':>12}{'s/step':>9}")
for name in options.methods:
    curve = curves[name] = run(name)
    method = METHODS[name]
    if curve.failed or not curve.losses:
        print(f"{name:>10}{method.lr:>9g}{method.damping:>9g}   failed: {curve.failed}", flush=True)
        continue
    each = curve.seconds[-1] / (len(curve.losses) * steps)
    row = f"{curve.losses[0]:>13.4f}{curve.losses[-1]:>12.4f}{each:>9.3f}"
    print(f"{name:>10}{method.lr:>9g}{method.damping:>9g}{row}", flush=True)

COLOURS = (
    "#000000",
    "#E69F00",
    "#56B4E9",
    "#009E73",
    "#CC79A7",
    "#0072B2",
    "#0072B2",
    "#56B4E9",
    "#56B4E9",
    "#D55E00",
    "#D55E00",
    "#D55E00",
)
DASHES = ("-", "-", "-", "-", "-", "-", "--", "--", ":", "-", "--", ":")
MARKERS = "oDsP^vv<>xxx"
figure, (by_epoch, by_time) = plt.subplots(1, 2, figsize=(9.6, 4.2), layout="constrained", sharey=True)
for (name, method), colour, dashes, marker in zip(METHODS.items(), COLOURS, DASHES, MARKERS, strict=True):
    if name not in curves or not curves[name].losses:
        continue
    curve = curves[name]
    style = {"color": colour, "ls": dashes, "marker": marker, "ms": 4, "lw": 1.5}
    by_epoch.plot(range(1, len(curve.losses) + 1), curve.losses, label=method.label, **style)
    by_time.plot(curve.seconds, curve.losses, **style)
by_epoch.set_xlabel("epoch")
by_epoch.set_ylabel("training loss, mean over the epoch (nat)")
by_time.set_xlabel("time (s), warm start included")
by_time.set_xscale("log")
by_time.xaxis.set_major_formatter("{x:.0f}")
by_time.xaxis.set_minor_formatter("")
for ax in (by_epoch, by_time):
    ax.grid(alpha=0.3)
by_epoch.xaxis.get_major_locator().set_params(integer=True)
figure.suptitle(f"ConvNet on {source}, minibatches of {size}", fontsize=11)
figure.legend(loc="outside right center", frameon=False)
figure.savefig(options.out / "convnet.png", dpi=110)
print("wrote", options.out / "convnet.png")
