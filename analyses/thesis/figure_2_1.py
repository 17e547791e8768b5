"""Thesis Figure 2.1: how often yᵀHy ≤ 2/μ₁ sᵀy after double damping, and the mean of yᵀHy / sᵀy, by epoch and layer.

K-BFGS(L) of chapter 2 at Table 2.5's values, minibatches of 1000, no pair skipped.
"""

from statistics import fmean

import torch
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

import curvlab as cl
from curvlab.reproduction import Options, Report, Script, load, main, problems

MU1 = 0.2
COLOURS = colormaps["viridis"]
PROBLEMS = ("MNIST", "FACES", "CURVES")
EPOCHS = {"smoke": 1, "cpu": 3, "paper": 50}


def ratios(problem: str, options: Options) -> list[dict[str, list[float]]]:
    """{layer: yᵀHy / sᵀy of every step} of each epoch."""
    source = problems.find(problem)
    if options.smoke:
        objective, train = source.smoke(0, 0.5e-5)
        size = 32
    else:
        train, _ = source.load(options.budget == "cpu", None, None)
        objective, size = source.objective(train, 0, options.where, 0.5e-5), 1000
    lr, damping = load("figure-2.2").methods["K-BFGS(L)"].on(problem)
    optimizer = cl.optimizer("k-bfgs-l-20", objective, lr=lr, damping=damping)
    optimizer.warm_start(train.batches(size))
    found = []
    for epoch in range(EPOCHS[options.budget]):
        seen: dict[str, list[torch.Tensor]] = {block.name: [] for block in objective.blocks}
        for x, y in train.batches(size, seed=epoch):
            optimizer.step(objective.closure(x, y))
            for name, values in seen.items():
                values.append(optimizer.descent.curvature.blocks[name].last["g"].damping.after.curvature)
        found.append({name: torch.stack(values).tolist() for name, values in seen.items()})
    return found


def make(report: Report) -> None:
    names = report.options.problems or PROBLEMS
    figure = Figure(figsize=(1 + 3.6 * len(names), 5.6), layout="constrained")
    panels = figure.subplots(2, len(names), squeeze=False, sharex="col")
    for (above, below), name in zip(panels.T, names, strict=True):
        found = ratios(name, report.options)
        epochs = range(1, len(found) + 1)
        shares = {layer: [fmean(r <= 2 / MU1 for r in e[layer]) for e in found] for layer in found[0]}
        means = {layer: [fmean(e[layer]) for e in found] for layer in found[0]}
        for i, layer in enumerate(shares):
            look = {"color": COLOURS(i / len(shares)), "marker": "os^vDPX*+x12"[i % 12], "markersize": 4, "linewidth": 1.2}
            above.plot(epochs, shares[layer], label=f"layer {i + 1}", **look)
            below.plot(epochs, means[layer], **look)
        least = min(min(values) for values in shares.values())
        report.say(f"{name}: it holds in {least:.1%} to {max(map(max, shares.values())):.1%} of the steps of an epoch; "
                   f"mean ratio at most {max(map(max, means.values())):.3g}")  # fmt: skip
        report.say(f"claim: at least 90 % of the iterations satisfy it: {'holds' if least >= 0.9 else 'does not hold'}")
        above.set(title=name, ylim=(0, 1.05))
        below.set(xlabel="epoch", yscale="log")
        below.xaxis.set_major_locator(MaxNLocator(integer=True))
        below.axhline(2 / MU1, color="black", linewidth=0.8, linestyle=":")
        above.legend(fontsize=6, ncols=2)
    panels[0, 0].set_ylabel("fraction with yᵀHy ≤ 2/μ₁ sᵀy")
    panels[1, 0].set_ylabel("mean of yᵀHy / sᵀy (dotted: 2/μ₁)")
    figure.suptitle(f"{FIGURE.shows} ({report.options.budget})", fontsize=10)
    report.draw(figure)


FIGURE = Script(
    shows="thesis Figure 2.1: the first inequality of double damping, by layer, for K-BFGS(L)",
    claim="at least 90% of the iterations satisfy yᵀHy / sᵀy ≤ 2/μ₁, even if we don't skip (2.3.1)",
    extents={
        "smoke": "two steps of narrow networks on random numbers, which say nothing",
        "cpu": "3 epochs",
        "paper": "50 epochs",
    },
    make=make,
    problems=PROBLEMS,
)

if __name__ == "__main__":
    main(FIGURE, __file__)
