"""The layer-wise oracle (Abreu et al. 2026) on a language model that two cores can carry.

`gpt-tiny` on windows of `shakespeare`, trained by the exact Gauss-Newton matrix, whole and layer by
layer, and by the methods that approximate it or something near it. Each method walks over one
common grid of learning rates and overall dampings λ (`compare`'s rule), from a point near its
document's values to a neighbour that is better, until none is: fewer iterations to the last of
three losses, or a lower loss at the end where that is not reached. Rates rise over five iterations
and then stay; the rest is each method's own. Minibatches are the same for all, and nothing is
refreshed less often than every iteration. The exact methods get fewer iterations, see their
minibatch alone and have no momentum (OWN).
CPU seconds are of one thread, evaluations apart. The cosines are those of a comparison along the
layer-wise oracle's own path at its own rate and damping. Runs are kept in `--runs`, so that two
processes can share the methods (`--method`), and a last one draws.
"""

import itertools
import json
import math
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

import curvlab as cl
from curvlab.reproduction import ReproductionReport, Script, main
from curvlab.reproduction.script import say_progress
from curvlab.show.style import looks
from curvlab.system.atomic import rewrite

RATES = tuple(round(10 ** (k / 2), 10) for k in range(-8, 2))  # 1e-4, 3.16e-4, …, 1, 3.16
DAMPINGS = (1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
# beside each method's own: the exact ones see their minibatch alone, and no momentum, with which
# they diverge at rates at which they do not without
OWN: dict[str, dict[str, Any]] = {
    "block-ggn": {"momentum": 0.0, "decay": 0.0},
    "full-ggn": {"momentum": 0.0},
    **{key: {"refresh_every": 1} for key in ("soap", "kl-shampoo", "shampoo", "kfac", "ekfac")},
}
# near the document's values: (learning rate, overall λ); muon's damping is no curvature's
STARTS: dict[str, tuple[float, float]] = {
    "block-ggn": (0.3, 1e-2),
    "full-ggn": (0.3, 1e-2),
    "soap": (1e-2, 1e-7),
    "muon": (3e-2, 1e-3),
    "kl-shampoo": (1e-2, 1e-7),
    "shampoo": (1e-1, 1e-3),
    "kfac": (1e-1, 1e-2),
    "ekfac": (1e-1, 1e-2),
    "k-bfgs": (3e-2, 1.0),
    "adamw": (1e-2, 1e-7),
}
ORACLES = ("block-ggn", "full-ggn")
RISE = 5


@dataclass(frozen=True)
class Size:
    """Minibatches of windows, iterations of the exact methods and of the others, and the losses, in
    nat a symbol, to which iterations and seconds are counted.
    """

    windows: int
    exact: int
    others: int
    levels: tuple[float, float, float]

    def steps(self, name: str) -> int:
        return self.exact if name in ORACLES else self.others


@dataclass(frozen=True)
class Extent:
    """Sizes of minibatches, seeds, symbols in a window, windows of an evaluation; whether methods
    walk over the grid.
    """

    sizes: tuple[Size, ...]
    seeds: tuple[int, ...]
    symbols: int
    held: int
    walk: bool = True


EXTENT = {
    "smoke": Extent((Size(2, 2, 4, (4.2, 4.1, 4.0)),), (0,), 4, 16, walk=False),
    "cpu": Extent(
        (Size(8, 30, 400, (3.1, 3.0, 2.92)), Size(32, 30, 400, (2.9, 2.75, 2.65))), (0, 1), 16, 256
    ),
    "paper": Extent(
        (Size(32, 500, 5000, (2.5, 2.2, 2.0)), Size(256, 300, 5000, (2.4, 2.0, 1.8))),
        (0, 1, 2),
        32,
        2048,
    ),
}


@dataclass
class Run:
    """Validation loss, nat a symbol, after each number of iterations, and CPU seconds until then.

    A run whose loss is no longer finite, or above that of the start, has ended.
    """

    loss: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    @property
    def last(self) -> float:
        return self.loss[-1] if self.loss and math.isfinite(self.loss[-1]) else math.inf

    def reaches(self, level: float) -> tuple[float, float]:
        """Iterations and CPU seconds until the loss is at most `level`, linear between two."""
        for i, loss in enumerate(self.loss):
            if loss <= level:
                if i == 0:
                    return 0.0, 0.0
                before = self.loss[i - 1]
                part = (before - level) / (before - loss) if before > loss else 1.0
                seconds = self.seconds[i - 1] + part * (self.seconds[i] - self.seconds[i - 1])
                return i - 1 + part, seconds
        return math.inf, math.inf


class Problem:
    """The language model's minibatches and the loss that is read."""

    def __init__(self, extent: Extent) -> None:
        self.train, held = cl.datasets.load("shakespeare32")
        self.symbols = extent.symbols
        spread = torch.linspace(0, len(held) - 1, extent.held).long()
        self.x, self.y = held.x[spread][:, : self.symbols], held.y[spread][:, : self.symbols]  # type: ignore[index]  # no sparse rows

    def evaluated(self, model: nn.Module) -> float:
        with torch.no_grad():
            logits = model(self.x)
            return float(nn.functional.cross_entropy(logits.flatten(0, 1), self.y.flatten()))

    def batches(self, size: int, seed: int, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
        epochs = math.ceil(steps * size / len(self.train))
        batches = self.train.batches(size, epochs=epochs, seed=seed)
        for x, y in itertools.islice(batches, steps):
            yield x[:, : self.symbols].contiguous(), y[:, : self.symbols].contiguous()

    def objective(self, seed: int) -> cl.Objective:
        return cl.Objective(
            cl.models.build("gpt-tiny", seed=seed), cl.likelihoods.Tokens(), seed=seed
        )

    def run(self, name: str, size: int, steps: int, seed: int, lr: float, damping: float) -> Run:
        """Train from the seed's weights."""
        objective = self.objective(seed)
        options: dict[str, Any] = {"lr": lr, "weight_decay": 0.0}
        options["damping"] = cl.algorithms.damping_for(name, damping, size)
        options |= OWN.get(name, {})
        optimizer = cl.optimizer(name, objective, **options)
        start = self.evaluated(objective.model)
        found, seconds = Run([start], [0.0]), 0.0
        for i, (x, y) in enumerate(self.batches(size, seed, steps), 1):
            optimizer.param_groups[0]["lr"] = lr * min(1.0, i / RISE)
            began = time.process_time()
            try:
                optimizer.step(objective.closure(x, y))
            except cl.CurvlabError:
                return Run([*found.loss, math.inf], [*found.seconds, seconds])
            seconds += time.process_time() - began
            found.loss.append(self.evaluated(objective.model))
            found.seconds.append(seconds)
            if not found.loss[-1] < 1.5 * start:
                return Run([*found.loss[:-1], math.inf], found.seconds)
        return found


def neighbours(lr: int, damping: int, damped: bool) -> list[tuple[int, int]]:
    """Places of the grid beside one."""
    around = [(lr + 1, damping), (lr - 1, damping)]
    around += [(lr, damping - 1), (lr, damping + 1)] if damped else []
    return [(i, j) for i, j in around if 0 <= i < len(RATES) and 0 <= j < len(DAMPINGS)]


def nearest(values: tuple[float, ...], value: float) -> int:
    return min(range(len(values)), key=lambda i: abs(math.log(values[i] / value)))


class Kept:
    """Runs of one method at one size in a file: what was measured is not measured again."""

    def __init__(self, report: ReproductionReport, problem: Problem, name: str, size: Size) -> None:
        self.problem, self.name, self.size = problem, name, size
        folder = report.options.runs / "layerwise-oracle" / report.options.budget
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"{name}-{size.windows}.json"
        self.runs: dict[str, Run] = {}
        if self.path.exists():
            stored = json.loads(self.path.read_text(encoding="utf-8"))
            self.runs = {key: Run(**each) for key, each in stored.items()}

    def __call__(self, seed: int, place: tuple[int, int]) -> Run:
        lr, damping = RATES[place[0]], DAMPINGS[place[1]]
        steps = self.size.steps(self.name)
        key = f"lr={lr:.3g} damping={damping:.0e} seed={seed} steps={steps}"
        if key not in self.runs:
            run = self.problem.run(self.name, self.size.windows, steps, seed, lr, damping)
            self.runs[key] = run
            text = json.dumps({k: asdict(each) for k, each in self.runs.items()})
            rewrite(self.path, lambda path: path.write_text(text, encoding="utf-8"))
            say_progress(
                f"{self.name}, {self.size.windows} windows, {key}: {run.last:.4f},"
                f" {run.seconds[-1]:.0f} CPU s"
            )
        return self.runs[key]

    def cost(self, place: tuple[int, int], seed: int) -> tuple[float, float, int]:
        """What the walk makes least: iterations to the last level, then the last loss.

        Of runs that end for their loss the longest is the best.
        """
        run = self(seed, place)
        return run.reaches(self.size.levels[-1])[0], run.last, -len(run.loss)


@dataclass
class Best:
    """Where a method's walk ended, how many runs it took, and the runs there, one a seed."""

    lr: float
    damping: float
    tried: int
    runs: list[Run]

    def reaches(self, level: float) -> tuple[float, float]:
        """Means over seeds."""
        iterations, seconds = zip(*[run.reaches(level) for run in self.runs], strict=True)
        return float(np.mean(iterations)), float(np.mean(seconds))

    @property
    def last(self) -> float:
        return float(np.mean([run.last for run in self.runs]))


def best_of(report: ReproductionReport, problem: Problem, name: str, size: Size) -> Best:
    """Walk over the grid with the first seed, and run the best place with all seeds."""
    extent, kept = EXTENT[report.options.budget], Kept(report, problem, name, size)
    lr, damping = STARTS[name]
    here = nearest(RATES, lr), nearest(DAMPINGS, damping)
    cost = {here: kept.cost(here, extent.seeds[0])}
    moved = extent.walk
    while moved:
        moved = False
        for place in neighbours(*here, damped=name != "muon"):
            if place not in cost:
                cost[place] = kept.cost(place, extent.seeds[0])
                if cost[place] < cost[here]:  # on from there at once
                    here, moved = place, True
                    break
    runs = [kept(seed, here) for seed in extent.seeds]
    return Best(RATES[here[0]], DAMPINGS[here[1]], len(cost), runs)


def cosines(
    problem: Problem, oracle: Best, size: Size, report: ReproductionReport
) -> dict[str, float]:
    """Mean cosine to the layer-wise direction along its own path, over matrices and iterations."""
    steps = size.exact
    log_file = report.options.runs / "layerwise-oracle" / report.options.budget
    path = log_file / f"cosines-{size.windows}-{oracle.lr:.3g}-{oracle.damping:.0e}.h5"
    if not path.exists():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", cl.CurvlabWarning)
            cl.compare(
                problem.objective(0),
                problem.batches(size.windows, 0, steps),
                reference="block-ggn",
                algorithms=list(STARTS),
                lr=oracle.lr,
                damping=oracle.damping,
                steps=steps,
                warm=[],
                path=path,
                progress=False,
            )
    log = cl.open(path)
    matrices = [b for b in log["block"].values if "norm" not in str(b)]
    found = cl.cosine_to(log, "block-ggn").sel(block=matrices).mean("block")
    late = found.isel(step=slice(found.sizes["step"] // 4, None)).mean("step")
    return {str(name): float(late.sel(algorithm=name)) for name in late["algorithm"].values}


def make(report: ReproductionReport) -> None:
    extent = EXTENT[report.options.budget]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        problem = Problem(extent)
        chosen = report.options.methods or tuple(STARTS)
        figure = Figure(figsize=(14, 4.4 * len(extent.sizes)), layout="constrained")
        axes = figure.subplots(len(extent.sizes), 3, squeeze=False)
        for row, size in zip(axes, extent.sizes, strict=True):
            found = {name: best_of(report, problem, name, size) for name in chosen}
            near: dict[str, float] = {}
            if set(ORACLES) <= set(found):
                near = cosines(problem, found["block-ggn"], size, report)
            told(report, size, found, near)
            drawn(row, size, found, near)
        report.draw(figure)
    finally:
        torch.set_num_threads(threads)


def told(
    report: ReproductionReport, size: Size, found: dict[str, Best], near: dict[str, float]
) -> None:
    """Say the table and the claims of one minibatch size."""
    report.say(
        f"minibatches of {size.windows} windows of {EXTENT[report.options.budget].symbols} symbols:"
        f" {size.exact} iterations of the exact methods, {size.others} of the others; means of"
        f" {len(EXTENT[report.options.budget].seeds)} seeds, iterations / CPU s"
    )
    rows = []
    for name, best in found.items():
        ends = [run.last for run in best.runs]
        reached = [best.reaches(level) for level in size.levels]
        rows.append(
            [
                name,
                f"{best.lr:.2g}",
                "" if name == "muon" else f"{best.damping:.0e}",
                str(best.tried),
                *(counted(iterations, seconds) for iterations, seconds in reached),
                f"{best.last:.3f}",
                f"{max(ends) - min(ends):.3f}",
                f"{near[name]:.2f}" if name in near else "",
            ]
        )
    levels = [f"to {level:g}" for level in size.levels]
    report.table(["method", "lr", "λ", "runs", *levels, "last loss", "its range", "cosine"], rows)
    claims(report, found, size.levels)
    report.say()


def counted(iterations: float, seconds: float) -> str:
    return f"{iterations:.1f} / {seconds:.1f}" if math.isfinite(iterations) else "not reached"


def claims(
    report: ReproductionReport, found: dict[str, Best], levels: tuple[float, float, float]
) -> None:
    """Hold the paper's sentences to the runs, at every level that both reach."""

    def ratios(above: str, below: str) -> list[str]:
        each = [(found[above].reaches(v)[0], found[below].reaches(v)[0]) for v in levels]
        return [f"{a / b:.2f}" if b and math.isfinite(a + b) else "not reached" for a, b in each]

    if set(ORACLES) <= set(found):
        report.say(
            "claim: the layer-wise exact method nearly matches the full one: iterations of"
            f" block-ggn over full-ggn {', '.join(ratios('block-ggn', 'full-ggn'))}"
        )
    for name in ("soap", "muon"):
        if {name, *ORACLES} <= set(found):
            report.say(
                f"claim: both need far fewer iterations than {name} (the paper: 5.4 times for the"
                f" full one): {name} over full-ggn {', '.join(ratios(name, 'full-ggn'))}, over"
                f" block-ggn {', '.join(ratios(name, 'block-ggn'))}"
            )


def drawn(row: Any, size: Size, found: dict[str, Best], near: dict[str, float]) -> None:
    """Draw loss against iterations and CPU seconds, and iterations against the cosine."""
    styles = looks({name: name for name in found})
    left, middle, right = row
    for name, best in found.items():
        shortest = min(len(run.loss) for run in best.runs)
        curve = np.mean([run.loss[:shortest] for run in best.runs], axis=0)
        seconds = np.mean([run.seconds[:shortest] for run in best.runs], axis=0)
        style, exact = styles[name], name in ORACLES
        look = {
            "color": style.colour,
            "linestyle": style.dashes,
            "linewidth": 2.4 if exact else 1.4,
        }
        left.plot(range(1, len(curve)), curve[1:], label=name, zorder=3 if exact else 2, **look)
        middle.plot(seconds[1:], curve[1:], **look)
        iterations = best.reaches(size.levels[1])[0]
        if name in near and math.isfinite(iterations):
            right.plot(
                near[name], iterations, marker=style.marker, color=style.colour, markersize=8
            )
            right.annotate(
                name, (near[name], iterations), (5, 4), textcoords="offset points", fontsize=9
            )
    for ax in (left, middle):
        for level in size.levels:
            ax.axhline(level, color="0.5", linewidth=0.8, linestyle=":")
        ax.set_ylabel("validation loss, nat a symbol")
        ax.set_xscale("log")
        ax.grid(alpha=0.3)
    left.set_xlabel("iterations")
    left.set_title(f"gpt-tiny, minibatches of {size.windows} windows", fontsize=10)
    left.legend(fontsize=8, ncols=2, loc="lower left")
    middle.set_xlabel("CPU seconds, one thread")
    middle.set_title("the same against time", fontsize=10)
    right.set_yscale("log")
    right.set_xlabel("mean cosine to the layer-wise direction, along its path")
    right.set_ylabel(f"iterations to {size.levels[1]:g} nat")
    right.set_title("how near, and how fast", fontsize=10)
    right.grid(alpha=0.3, which="both")
    right.margins(0.2)


FIGURE = Script(
    shows="Abreu et al. 2026: the layer-wise Gauss-Newton oracle beside methods of 2018 to 2026",
    claim=(
        "a precise layerwise Gauss-Newton preconditioner … nearly matches the full one; full"
        " Gauss-Newton takes 5.4 times fewer iterations than SOAP and Muon (of 150 M parameters)"
    ),
    extents={
        name: (
            f"minibatches of {' and '.join(str(size.windows) for size in e.sizes)} windows of"
            f" {e.symbols} symbols, {e.sizes[0].exact} iterations of the exact methods,"
            f" {e.sizes[0].others} of the others, seeds {', '.join(map(str, e.seeds))}"
        )
        for name, e in EXTENT.items()
    },
    make=make,
    methods=tuple(STARTS),
)

if __name__ == "__main__":
    main(FIGURE, __file__)
