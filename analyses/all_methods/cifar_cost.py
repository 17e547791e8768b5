"""Cost of a step on the networks of the CIFAR figures: seconds, memory, and the loss over a first
epoch, at the figures' own values. Networks of CIFAR-100 differ in the last layer alone.

CPU seconds; on a GPU wall seconds. The first step, in which the network is looked at, is not
counted. `epoch` is the mean of the others, which are too few for T₁ and T₂: `long run` has each
refresh every T₂ steps, and every T₁ steps what folding in statistics and learning pairs adds; both
are timed by themselves. Runs are kept in `--runs`.
"""

import math
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import replace

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from curvlab.errors import CurvlabError, CurvlabWarning
from curvlab.reproduction import (
    Comparison,
    Extent,
    Method,
    ReproductionReport,
    Script,
    load_script,
    main,
)
from curvlab.reproduction.comparison import SMOKE
from curvlab.reproduction.script import say_progress
from curvlab.reproduction.step_costs import StepCost, StepCosts
from curvlab.show.axes import plain_numbers
from curvlab.show.style import looks

THESIS = ("figure-3.4", "figure-4.3", "figure-4.5")
# {problem: (scripts of its figures, examples of the epoch: minibatches that 35 minutes of one core
# have room for, examples of the training loss)}
NETWORKS: dict[str, tuple[tuple[str, ...], int, int]] = {
    "VGG16, CIFAR-10": (THESIS, 768, 512),
    "ResNet32, CIFAR-10": (THESIS, 1024, 512),
    "ResNet32-4, CIFAR-10": (("figure-3.8",), 256, 256),
    "All-CNN-C, CIFAR-10": (("kfqn-cnn-figure-1",), 512, 512),
    "VGG16 as printed, CIFAR-10": (("kfqn-cnn-figure-1",), 512, 512),
    "ResNet-18, CIFAR-10": (("s2qn-figure-4",), 384, 512),
}


def comparison(problem: str) -> Comparison:
    """All methods that the figures have on a problem, at the extents of this table."""
    names, examples, evaluated = NETWORKS[problem]
    figures: list[Comparison] = [load_script(name) for name in names]
    methods: dict[str, Method] = {}
    for figure in figures:
        methods |= {label: m for label, m in figure.methods.items() if label not in methods}
    cpu = Extent(epochs=1, examples=examples, tests=0, evaluated=evaluated)
    return replace(
        figures[0],
        problems=[problem],
        methods=methods,
        cpu=cpu,
        paper=Extent(epochs=1, tests=0, evaluated=10_000),
    )


FIGURES = {problem: comparison(problem) for problem in NETWORKS}


def make(report: ReproductionReport) -> None:
    options, found = report.options, dict[str, dict[str, StepCost]]()
    for problem in options.problems or FIGURES:
        methods = FIGURES[problem].methods
        chosen = [label for label in methods if label in (options.methods or methods)]
        costs = StepCosts(FIGURES[problem], problem, options)
        try:
            _ = chosen and costs.runs.data
        except CurvlabError as error:
            report.say(f"{problem}: not run: {error}")
            continue
        for label in chosen:
            say_progress(f"{label} on {problem}")
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "parameters of layers", CurvlabWarning)
                found.setdefault(problem, {})[label] = costs.of_method(methods[label])
    if not found:
        raise CurvlabError(f"{report.name}: nothing was run: no network has these methods and data")
    heads = [
        "network, method",
        "lr, (decay,) damping",
        "steps",
        "s/step, epoch",
        "long run",
        "over SGD-m",
    ]
    heads += ["MB held", "over parameters", "loss before", "after", "minibatches"]
    report.table(heads, rows(found))
    for problem, each in found.items():
        for label, cost in each.items():
            if cost.why:
                report.say(f"  {problem}, {label}: {cost.why}")
    report.draw(drawn(found, f"{FIGURE.shows}\n{options.budget}: {extents[options.budget]}"))


def over_sgd(problem: str, each: Mapping[str, StepCost]) -> dict[str, float]:
    """Long-run seconds over SGD-m's; NaN where that was not run."""
    methods = FIGURES[problem].methods
    plain = [cost for label, cost in each.items() if methods[label].algorithm == "sgd-m"]
    return {
        label: cost.long_run / plain[0].long_run if plain else math.nan
        for label, cost in each.items()
    }


def rows(found: Mapping[str, Mapping[str, StepCost]]) -> Iterator[list[str]]:
    for problem, each in found.items():
        figure, ratio = FIGURES[problem], over_sgd(problem, each)
        yield [f"{problem}, minibatches of {figure.batch}", *[""] * 10]
        for label, cost in each.items():
            values = ", ".join(f"{v:g}" for v in figure.methods[label].on(problem) or ())
            numbers = [f"{cost.epoch:.3g}", f"{cost.long_run:.3g}", f"{ratio[label]:.2f}"]
            numbers += [f"{cost.held / 1e6:.1f}", f"{cost.times:.2f}"]
            numbers += [f"{cost.before:.3f}", f"{cost.after:.3f}"]
            numbers += [f"{cost.first:.3f} → {cost.last:.3f}"]
            told = ["–" if "nan" in number else number for number in numbers]
            yield [f"  {label}", f"({values})", str(cost.steps), *told]


def drawn(found: Mapping[str, Mapping[str, StepCost]], title: str) -> Figure:
    """A line a method, networks under each other: time over SGD-m's, and what is held."""
    lines = sum(1 + len(each) for each in found.values())
    figure = Figure(figsize=(11, 1.6 + 0.19 * lines), layout="constrained")
    axes: list[Axes] = list(figure.subplots(1, 2, sharey=True))
    methods = [m for p, each in found.items() for k, m in FIGURES[p].methods.items() if k in each]
    styles = looks({m.algorithm: m.algorithm for m in methods})
    names, at = list[str](), 0
    for problem, each in found.items():
        ratio = over_sgd(problem, each)
        names.append(f"{problem}:")
        for ax in axes:
            ax.axhline(at, color="0.85", linewidth=10, zorder=0)
        for label, cost in each.items():
            at += 1
            names.append(f"{label} ({cost.why.split()[0]})" if cost.why else label)
            style = styles[FIGURES[problem].methods[label].algorithm]
            for ax, value in zip(axes, (ratio[label], cost.times), strict=True):
                if value > 0:
                    ax.plot(value, at, marker=style.marker, color=style.colour, markersize=6)
        at += 1
    axes[0].set_yticks(range(len(names)), names, fontsize=8)
    axes[0].set_ylim(len(names) - 0.3, -0.7)
    texts = ("seconds a step in the long run, over SGD-m's", "held between steps, over parameters")
    for ax, text, what in zip(axes, texts, ("time", "memory"), strict=True):
        ax.set_title(what, fontsize=10)
        ax.set_xscale("log")
        ax.set_xlabel(f"{text} (logarithmic)")
        ax.axvline(1, color="0.4", linewidth=0.8, linestyle=":")
        ax.grid(alpha=0.3, axis="both")
        plain_numbers(ax.xaxis)
    figure.suptitle(title, fontsize=9)
    return figure


extents = {
    "smoke": SMOKE,
    "cpu": "a first epoch of 256 to 1,024 examples of the subset, seed 0, loss of 512 (256)",
    "paper": "a first epoch of CIFAR-10, seed 0, training loss of 10,000 examples",
}

FIGURE = Script(
    shows="what a step costs, and a first epoch gives, on the networks of the CIFAR figures",
    claim=(
        "K-BFGS and K-BFGS(L) are able to scale up as well as the first-order methods in terms of"
        " per-iteration time complexity (thesis 3.7.3)"
    ),
    extents=extents,
    make=make,
    methods=[*dict.fromkeys(label for f in FIGURES.values() for label in f.methods)],
    problems=list(NETWORKS),
)

if __name__ == "__main__":
    main(FIGURE, __file__)
