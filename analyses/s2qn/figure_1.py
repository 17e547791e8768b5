"""S2QN (Yang et al. 2021) Figure 1: relative error of (26) against epochs for S4QN, SSN, L-BFGS and
SGD.

An epoch is N visits of an example: at a new point (loss, gradient or both), or for a product with
the Hessian. The document has rcv1 and news20 and settings of its own; here are a9a, w8a and news20.
"""

from collections.abc import Iterator
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

import curvlab as cl
from curvlab.reproduction import Options, ReproductionReport, Script, main

EXTENT = {  # epochs, seeds, λ of S4QN and SSN (the first is drawn), data sets
    "smoke": (4, (0,), (0.0,), ("random numbers",)),
    "cpu": (30, (0, 1), (0.0,), ("a9a", "w8a", "news20")),
    "paper": (30, (2, 3), (0.0, 1e-5, 1e-4), ("a9a", "w8a", "news20")),
}
# S_H and the first S_g are N / 20 examples; S_g doubles every step until it is the full batch
FRACTION = 20
NEWTON: dict[str, Any] = {"solver": "cg", "tolerance": 0.1, "search": "armijo"}
METHODS = {  # label: (algorithm, its options, colour, marker)
    "S4QN": ("s4qn", NEWTON, "#0072B2", "o"),
    "SSN": ("ssn", NEWTON, "#D55E00", "s"),
    "L-BFGS": ("lbfgs", {"damping": 0.0, "search": "wolfe"}, "#009E73", "^"),
    "SGD": ("sgd-m", {"momentum": 0.9}, "#000000", "x"),
}
RATES, BATCH = (0.3, 0.1, 0.03), 512  # of SGD: the rate that ends best is drawn
Curve = list[tuple[float, float]]


def load(name: str) -> tuple[Tensor, Tensor]:
    if name == "random numbers":
        chance = torch.Generator().manual_seed(0)
        x = torch.randn(1000, 10, generator=chance, dtype=torch.float64)
        return x, (x.sum(1, keepdim=True) + torch.randn(1000, 1, generator=chance) > 0).double()
    train, _ = cl.datasets.load(name)
    x = train.x.coo() if isinstance(train.x, cl.datasets.SparseRows) else train.x
    return x.double(), train.y.double()


def objective(x: Tensor) -> cl.Objective:
    """(26) with μ = 1/N, from θ = 0."""
    model = (cl.models.logistic_sparse if x.is_sparse else cl.models.logistic)(
        (x.shape[1],)
    ).double()
    torch.nn.init.zeros_(model.weight)
    return cl.Objective(model, cl.likelihoods.Bernoulli(), l2=1 / len(x))


def optimum(x: Tensor, y: Tensor) -> tuple[float, float]:
    """Ψ*, and the length of the gradient there: Newton's method on all data, Cholesky, or conjugate
    gradients to 1e-6.
    """
    problem = objective(x)
    closure, weight = problem.closure(x, y), problem.parameters["weight"]
    newton = cl.optimizer(
        "ssn", problem, **NEWTON | {"damping": 0.0, "tolerance": 1e-6, "iterations": 5000}
    )
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
    """Places of the examples of each minibatch, `growth` times as many every step; None is the full
    batch.
    """
    generator = torch.Generator().manual_seed(seed)
    while True:
        chosen = None if size >= count else torch.randperm(count, generator=generator)[: int(size)]
        yield chosen
        size = min(count, size * growth)


def follow(
    label: str,
    x: Tensor,
    y: Tensor,
    least: float,
    epochs: float,
    seed: int,
    rate: float = 1.0,
    damping: float = 0.0,
) -> Curve:
    """(epochs, relative error) after every step; of SGD after every fifth of an epoch."""
    name, own, *_ = METHODS[label]
    count, problem = len(y), objective(x)
    newton, stochastic = "solver" in own, name == "sgd-m"
    further = {"sample": count // FRACTION, "damping": damping} if newton else {}
    optimizer = cl.optimizer(name, problem, lr=rate, **own, **further)
    everything = problem.closure(x, y)
    size = count / FRACTION if newton else BATCH if stochastic else count
    visits, last, found, every = 0, 0.0, [], count // BATCH // 5 if stochastic else 1
    full = False  # the last step's second look was at the full batch: its gradient is known
    for step, chosen in enumerate(batches(count, size, 2.0 if newton else 1.0, seed)):
        if step % max(1, every) == 0:
            error = max(0.0, float(everything.observe(()).loss) - least) / max(1.0, least)
            found.append((visits / count, error))
            if visits >= epochs * count or error < 1e-15:
                return found
        # a new closure every step: S_H is drawn by its number
        closure = (
            problem.closure(x, y)
            if chosen is None
            else problem.closure(x.index_select(0, chosen), y[chosen])
        )
        optimizer.step(closure)
        seen = len(closure.x)
        # here, and where the step led
        visits += seen * (not (full and chosen is None)) + seen * (not stochastic)
        full = chosen is None
        if not stochastic:
            curvature: Any = optimizer.descent.curvature  # with the counters of its own method
            work = sum(curvature.work.values())
            visits, last = visits + int(work - last), work
    raise AssertionError


def at(curve: Curve, epochs: float) -> float:
    return [error for visited, error in curve if visited <= epochs][-1]


def epochs_to(curve: Curve, error: float) -> float:
    return next((visited for visited, e in curve if e <= error), float("inf"))


def curves(
    label: str, x: Tensor, y: Tensor, least: float, options: Options
) -> dict[tuple[str, float], list[Curve]]:
    """{(how the legend calls it, λ): a curve a seed}; of SGD the best of RATES."""
    epochs, seeds, dampings, _ = EXTENT[options.budget]
    if label == "SGD":
        tried = {rate: follow(label, x, y, least, epochs, seeds[0], rate) for rate in RATES}
        best = min(tried, key=lambda rate: tried[rate][-1][1])
        return {(f"SGD, lr {best:g}", 0.0): [tried[best]]}
    if label == "L-BFGS":
        return {(label, 0.0): [follow(label, x, y, least, epochs, seeds[0])]}
    return {
        (label, d): [follow(label, x, y, least, epochs, seed, damping=d) for seed in seeds]
        for d in dampings
    }


def make(report: ReproductionReport) -> None:
    epochs, _, dampings, names = EXTENT[report.options.budget]
    figure = Figure(figsize=(1 + 3.7 * len(names), 3.8), layout="constrained")
    for ax, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        try:
            x, y = load(name)
        except cl.CurvlabError as error:
            report.say(f"{name}: not run: {error}")
            continue
        least, gradient = optimum(x, y)
        report.say(
            f"{name}: {len(y)} × {x.shape[1]}, Ψ* = {least:.15f}, ‖∇Ψ‖ = {gradient:.1e} there"
        )
        ends: dict[str, float] = {}
        for label, (_, _, colour, marker) in METHODS.items():
            for (shown, damping), found in curves(label, x, y, least, report.options).items():
                texts = [
                    f"{at(c, epochs / 2):.1e} {at(c, epochs):.1e} {epochs_to(c, 1e-8):5.1f}"
                    for c in found
                ]
                what = (
                    f"{shown}, λ = {damping:g}"
                    if len(dampings) > 1 and label in ("S4QN", "SSN")
                    else shown
                )
                report.say(
                    f"{what:>16}: error at {epochs / 2:g} and {epochs:g} epochs, epochs to 1e-8:"
                    f" {' | '.join(texts)}"
                )
                if damping == dampings[0] or label not in ("S4QN", "SSN"):
                    ends[label] = max(at(c, epochs) for c in found)
                    for i, curve in enumerate(found):
                        visited, errors = zip(*curve, strict=True)
                        look = {"color": colour, "marker": marker, "markersize": 3, "linewidth": 1}
                        every, label_once = max(1, len(curve) // 15), shown if i == 0 else None
                        ax.semilogy(
                            visited,
                            [max(e, 1e-16) for e in errors],
                            markevery=every,
                            label=label_once,
                            **look,
                        )
        others = min(error for label, error in ends.items() if label != "S4QN")
        report.say(
            "claim: S4QN outperforms the other methods:"
            f" {'holds' if ends['S4QN'] <= others else 'does not hold'}"
        )
        ax.set(
            title=f"{name} ({len(y):,} × {x.shape[1]:,})",
            xlabel="epochs (N visits of an example)",
            xlim=(0, epochs),
        )
        ax.set(ylim=(5e-17, 2), ylabel="relative error (Ψ − Ψ*) / max(1, Ψ*)")
        ax.grid(alpha=0.3)
        ax.legend(fontsize=8, frameon=False)
    report.draw(figure)


FIGURE = Script(
    shows="S2QN Figure 1: S4QN, SSN, L-BFGS and SGD on logistic regression",
    claim=(
        "S4QN outperforms other methods greatly … all settings of S4QN are the same as SSN except"
        " an additional quasi-Newton matrix … S4QN exhibits a faster local convergence rate than"
        " other methods (6.1)"
    ),
    extents={
        name: (
            f"{epochs} epochs, seeds {seeds}, λ = {', '.join(f'{d:g}' for d in dampings)},"
            f" {', '.join(sets)}"
        )
        for name, (epochs, seeds, dampings, sets) in EXTENT.items()
    },
    make=make,
)

if __name__ == "__main__":
    main(FIGURE, __file__)
