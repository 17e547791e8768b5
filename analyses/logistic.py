"""S2QN (Yang et al. 2021) Figure 1: relative error of (26) against epochs for S4QN, SSN, L-BFGS and SGD on a9a, w8a and news20.

An epoch is N visits of an example: at a new point (loss, gradient or both), or for a product with the Hessian.

    python analyses/logistic.py [--budget cpu|smoke] [--epochs 30] [--seeds 2] [--first-seed 0] [--damping 0] [--out FOLDER]
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import matplotlib
import torch
from torch import Tensor

matplotlib.use("Agg")
import matplotlib.pyplot as plt

import curvlab as cl

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--budget", choices=["cpu", "smoke"], default="cpu", help="smoke: 1500 digits of MNIST, 6 epochs, one seed")
parser.add_argument("--epochs", type=float, default=30)
parser.add_argument("--seeds", type=int, default=2)
parser.add_argument("--damping", type=float, default=0.0, help="λ of S4QN and SSN")
parser.add_argument("--first-seed", type=int, default=0)
parser.add_argument("--out", type=Path, default=Path(__file__).parent / "figures")
options = parser.parse_args()
SMOKE = options.budget == "smoke"
EPOCHS, SEEDS = (6, 1) if SMOKE else (options.epochs, options.seeds)
torch.set_num_threads(1)

FRACTION = 20  # S_H and the first S_g are N / 20 examples; S_g doubles every step until it is the full batch
NEWTON = {"damping": options.damping, "solver": "cg", "tolerance": 0.1, "search": "armijo"}
METHODS = {  # label: (algorithm, its options, colour, marker)
    "S4QN": ("s4qn", NEWTON, "#0072B2", "o"),
    "SSN": ("ssn", NEWTON, "#D55E00", "s"),
    "L-BFGS": ("lbfgs", {"damping": 0.0, "search": "wolfe"}, "#009E73", "^"),
    "SGD": ("sgd-m", {"momentum": 0.9}, "#000000", "x"),
}
RATES, BATCH = (0.3, 0.1, 0.03), 512  # of SGD: the rate that ends best is drawn


def load(name: str) -> tuple[cl.datasets.Dataset, Tensor, Tensor]:
    train, _ = cl.datasets.load(name)
    if name == "mnist16":
        return train, train.x[:1500].double(), (train.y[:1500, None] > 4).double()
    x = train.x.coo() if isinstance(train.x, cl.datasets.SparseRows) else train.x
    return train, x.double(), train.y.double()


def objective(x: Tensor) -> cl.Objective:
    """(26) with μ = 1/N, from θ = 0."""
    model = (cl.models.logistic_sparse if x.is_sparse else cl.models.logistic)((x.shape[1],)).double()
    torch.nn.init.zeros_(model.weight)
    return cl.Objective(model, cl.likelihoods.Bernoulli(), l2=1 / len(x))


def optimum(x: Tensor, y: Tensor) -> tuple[float, float]:
    """Ψ*, and the length of the gradient there: Newton's method on all data, Cholesky, or conjugate gradients to 1e-6."""
    problem = objective(x)
    closure, weight = problem.closure(x, y), problem.model.weight
    newton = cl.optimizer("ssn", problem, **NEWTON | {"damping": 0.0, "tolerance": 1e-6, "iterations": 5000})
    for _ in range(30):
        if x.is_sparse:
            newton.step(closure)
            continue
        hessian = cl.exact.matrix(problem, x, y, "hessian").dense()
        hessian.diagonal().add_(2 * problem.l2)
        now = closure.observe()
        step = torch.linalg.solve(hessian, now.gradients["1"].flatten()).view_as(weight)
        with torch.no_grad():
            weight.sub_(step)
            while (loss := float(closure.observe(()).loss)) > float(now.loss) + 1e-15:
                weight.add_(step := step / 2)
        if abs(loss - float(now.loss)) < 1e-16:
            break
    last = closure.observe()
    return float(last.loss), float(last.gradients["1"].norm())


def batches(count: int, size: float, growth: float, seed: int) -> Iterator[Tensor | None]:
    """Places of the examples of each minibatch, `growth` times as many every step; None is the full batch."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        chosen = None if size >= count else torch.randperm(count, generator=generator)[: int(size)]
        yield chosen
        size = min(count, size * growth)


def follow(label: str, x: Tensor, y: Tensor, least: float, seed: int, rate: float = 1.0) -> list[tuple[float, float]]:
    """(epochs, relative error) after every step; of SGD after every fifth of an epoch."""
    name, own, *_ = METHODS[label]
    count, problem = len(y), objective(x)
    newton, stochastic = "solver" in own, name == "sgd-m"
    sample = {"sample": count // FRACTION} if newton else {}
    optimizer = cl.optimizer(name, problem, lr=rate, **own, **sample)
    everything = problem.closure(x, y)
    size = count / FRACTION if newton else BATCH if stochastic else count
    visits, last, found, every = 0, 0.0, [], count // BATCH // 5 if stochastic else 1
    full = False  # the last step's second look was at the full batch: its gradient is known
    for step, chosen in enumerate(batches(count, size, 2.0 if newton else 1.0, seed)):
        if step % max(1, every) == 0:
            error = max(0.0, float(everything.observe(()).loss) - least) / max(1.0, least)
            found.append((visits / count, error))
            if visits >= EPOCHS * count or error < 1e-15:
                return found
        # a new closure every step: S_H is drawn by its number
        closure = problem.closure(x, y) if chosen is None else problem.closure(x.index_select(0, chosen), y[chosen])
        optimizer.step(closure)
        seen = len(closure.x)
        visits += seen * (not (full and chosen is None)) + seen * (not stochastic)  # here, and where the step led
        full = chosen is None
        if not stochastic:
            work = sum(optimizer.descent.curvature.work.values())
            visits, last = visits + int(work - last), work
    raise AssertionError


def at(curve: list[tuple[float, float]], epochs: float) -> float:
    return [error for visited, error in curve if visited <= epochs][-1]


def epochs_to(curve: list[tuple[float, float]], error: float) -> float:
    return next((visited for visited, e in curve if e <= error), float("inf"))


names = ("mnist16",) if SMOKE else ("a9a", "w8a", "news20")
figure, axes = plt.subplots(1, len(names), figsize=(3.7 * len(names), 3.6), layout="constrained", squeeze=False)
for ax, name in zip(axes[0], names, strict=True):
    train, x, y = load(name)
    least, gradient = optimum(x, y)
    print(f"{name}: {len(y)} × {x.shape[1]}, Ψ* = {least:.15f}, ‖∇Ψ‖ = {gradient:.1e} there")
    for label, (_, _, colour, marker) in METHODS.items():
        if label == "SGD":
            tried = {rate: follow(label, x, y, least, 0, rate) for rate in RATES}
            best = min(tried, key=lambda rate: tried[rate][-1][1])
            curves, shown = [tried[best]], f"SGD, lr {best:g}"
        else:
            seeds = range(options.first_seed, options.first_seed + (1 if label == "L-BFGS" else SEEDS))
            curves, shown = [follow(label, x, y, least, seed) for seed in seeds], label
        for i, curve in enumerate(curves):
            visited, errors = zip(*curve, strict=True)
            ax.semilogy(visited, [max(e, 1e-16) for e in errors], color=colour, marker=marker, markersize=3, linewidth=1,
                        markevery=max(1, len(curve) // 15), label=shown if i == 0 else None)  # fmt: skip
        ends = [f"{at(curve, EPOCHS / 2):.1e} {at(curve, EPOCHS):.1e} {epochs_to(curve, 1e-8):5.1f}" for curve in curves]
        print(f"{shown:>14}: error at {EPOCHS / 2:g} and {EPOCHS:g} epochs, epochs to 1e-8: " + " | ".join(ends), flush=True)
    ax.set(title=f"{name} ({len(y):,} × {x.shape[1]:,})", xlabel="epochs (N visits of an example)", xlim=(0, EPOCHS))
    ax.set_ylim(5e-17, 2)
    ax.grid(alpha=0.3)
    ax.legend(fontsize=8, frameon=False)
axes[0, 0].set_ylabel("relative error (Ψ − Ψ*) / max(1, Ψ*)")
options.out.mkdir(parents=True, exist_ok=True)
figure.savefig(options.out / "logistic.png", dpi=150)
print(f"wrote {options.out / 'logistic.png'}")
