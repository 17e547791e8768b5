"""Walks over a common grid of learning rates and dampings: each method's best place, kept in files.

A walk goes from a method's first place to a neighbour that is better, until none is; what was
measured is in a file, so that processes can share the methods and go on.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from curvlab.reproduction.script import say_progress
from curvlab.show.style import looks
from curvlab.system.atomic import rewrite

GridPlace = tuple[int, int]
"""(number of the learning rate, number of the damping)."""


@dataclass
class GridRun:
    """Loss at the start and after every iteration, and CPU seconds until then.

    The last loss of a run that has ended for it is infinite.
    """

    loss: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    @property
    def last(self) -> float:
        """The loss at the end."""
        return self.loss[-1] if self.loss else math.inf

    def reaches(self, level: float) -> tuple[float, float]:
        """Return iterations and CPU seconds until the loss is at most `level`.

        Linear between two iterations; infinite where it never is.
        """
        for i, loss in enumerate(self.loss):
            if loss > level:
                continue
            if i == 0:
                return 0.0, 0.0
            before = self.loss[i - 1]
            part = (before - level) / (before - loss)
            seconds = self.seconds[i - 1] + part * (self.seconds[i] - self.seconds[i - 1])
            return i - 1 + part, seconds
        return math.inf, math.inf

    def cost(self, level: float) -> tuple[float, float, int]:
        """Return what a walk makes least: iterations to `level`, then the last loss.

        Of runs that end for their loss the longest is the best.
        """
        return self.reaches(level)[0], self.last, -len(self.loss)


@dataclass(frozen=True)
class Grid:
    """Learning rates and dampings, both positive and ascending."""

    rates: Sequence[float]
    dampings: Sequence[float]

    def nearest(self, rate: float, damping: float) -> GridPlace:
        """Return the place that is nearest on both logarithmic axes."""

        def number(values: Sequence[float], value: float) -> int:
            return min(range(len(values)), key=lambda i: abs(math.log(values[i] / value)))

        return number(self.rates, rate), number(self.dampings, damping)

    def beside(self, place: GridPlace, damped: bool = True) -> list[GridPlace]:
        """Return the neighbours: by rate, and by damping where the method has one.

        By damping with the rate as it is, and with rate over damping as it is: where λ is above a
        curvature's eigenvalues a step is that ratio times the gradient, so that good places lie in
        a valley across the grid, which steps along its axes leave.
        """
        rate, damping = place
        around = [(rate + 1, damping), (rate - 1, damping)]
        if damped:
            around += [(rate, damping - 1), (rate, damping + 1)]
        inside = [place for place in around if self.holds(place)]
        for other in (damping - 1, damping + 1) if damped else ():
            if self.holds((rate, other)):
                ratio = self.dampings[other] / self.dampings[damping]
                inside.append(self.nearest(self.rates[rate] * ratio, self.dampings[other]))
        return list(dict.fromkeys(inside))

    def holds(self, place: GridPlace) -> bool:
        """Say whether the place is one of the grid's."""
        return 0 <= place[0] < len(self.rates) and 0 <= place[1] < len(self.dampings)


@dataclass
class Best:
    """Where a walk has ended, how many places it saw, and the runs there, one a seed."""

    lr: float
    damping: float
    tried: int
    runs: list[GridRun]

    def reaches(self, level: float) -> tuple[float, float]:
        """Return means over seeds of iterations and CPU seconds to `level`."""
        iterations, seconds = zip(*[run.reaches(level) for run in self.runs], strict=True)
        return float(np.mean(iterations)), float(np.mean(seconds))

    @property
    def last(self) -> float:
        """The mean loss at the end."""
        return float(np.mean([run.last for run in self.runs]))

    @property
    def spread(self) -> float:
        """The range of the losses at the end."""
        ends = [run.last for run in self.runs]
        return max(ends) - min(ends)

    def curve(self) -> tuple[list[float], list[float]]:
        """Return means over seeds of loss and CPU seconds, as long as the shortest run."""
        shortest = min(len(run.seconds) for run in self.runs)
        loss = np.mean([run.loss[:shortest] for run in self.runs], axis=0)
        seconds = np.mean([run.seconds[:shortest] for run in self.runs], axis=0)
        return loss.tolist(), seconds.tolist()


class KeptRuns:
    """Runs of one method in a file: what was measured is not measured again.

    Args:
        path: of the file.
        what: the method and its problem, for the line that says a run's end.
        run: seed, learning rate, damping → a run.
        grid: of the places.
        length: words that tell runs of other lengths apart.
    """

    def __init__(
        self,
        path: Path,
        what: str,
        run: Callable[[int, float, float], GridRun],
        grid: Grid,
        length: str,
    ) -> None:
        self.path, self.what, self.run, self.grid, self.length = path, what, run, grid, length
        path.parent.mkdir(parents=True, exist_ok=True)
        self.runs: dict[str, GridRun] = {}
        if path.exists():
            stored: Mapping[str, Mapping[str, list[float]]] = json.loads(
                path.read_text(encoding="utf-8")
            )
            self.runs = {key: GridRun(**each) for key, each in stored.items()}

    def __call__(self, seed: int, place: GridPlace) -> GridRun:
        """Return the run at a place, from the file or anew."""
        lr, damping = self.grid.rates[place[0]], self.grid.dampings[place[1]]
        key = f"lr={lr:.3g} damping={damping:.0e} seed={seed} {self.length}"
        if key not in self.runs:
            self.runs[key] = run = self.run(seed, lr, damping)
            text = json.dumps({k: asdict(each) for k, each in self.runs.items()})
            rewrite(self.path, lambda path: path.write_text(text, encoding="utf-8"))
            say_progress(f"{self.what}, {key}: {run.last:.4f}, {run.seconds[-1]:.0f} CPU s")
        return self.runs[key]


def walk(
    kept: KeptRuns,
    start: GridPlace,
    level: float,
    seeds: Sequence[int],
    *,
    damped: bool = True,
    moves: bool = True,
) -> Best:
    """Walk with the first seed to a place without a better neighbour; run it with all seeds.

    Args:
        kept: the method's runs.
        start: the first place.
        level: of the loss to which iterations are counted (`GridRun.cost`).
        seeds: of the runs.
        damped: whether dampings are walked over.
        moves: False stays at the start.
    """
    here = start
    cost = {here: kept(seeds[0], here).cost(level)}
    while moves:
        moves = False
        for place in kept.grid.beside(here, damped):
            if place not in cost:
                cost[place] = kept(seeds[0], place).cost(level)
                if cost[place] < cost[here]:  # on from there at once
                    here, moves = place, True
                    break
    rate, damping = kept.grid.rates[here[0]], kept.grid.dampings[here[1]]
    return Best(rate, damping, len(cost), [kept(seed, here) for seed in seeds])


def counted_table(
    found: Mapping[str, Best], levels: Sequence[float], further: Mapping[str, Mapping[str, str]]
) -> tuple[list[str], list[list[str]]]:
    """Return headings and a row a method: its place, and iterations / CPU s to each level.

    Args:
        found: {method: its best}.
        levels: losses.
        further: {heading: {method: word}} of further columns.
    """
    rows = []
    for name, best in found.items():
        reached = [best.reaches(level) for level in levels]
        rows.append(
            [
                name,
                f"{best.lr:.2g}",
                f"{best.damping:.0e}",
                str(best.tried),
                *(f"{i:.1f} / {s:.1f}" if math.isfinite(i) else "not reached" for i, s in reached),
                f"{best.last:.3f}",
                f"{best.spread:.3f}",
                *(words.get(name, "") for words in further.values()),
            ]
        )
    heads = ["method", "lr", "λ", "runs", *(f"to {level:g}" for level in levels)]
    return [*heads, "last loss", "its range", *further], rows


def ratios(above: Best, below: Best, levels: Sequence[float]) -> str:
    """Say how many times the iterations of one method are the other's, at each level."""
    each = [(above.reaches(level)[0], below.reaches(level)[0]) for level in levels]
    words = (f"{a / b:.2f}" if b and math.isfinite(a + b) else "not reached" for a, b in each)
    return ", ".join(words)


def gap_closed(found: Mapping[str, Best], zero: str, one: str, level: float) -> dict[str, str]:
    """Say how much of the gap between two methods each closes, in logarithms of iterations.

    Args:
        found: {method: its best}.
        zero: the method that closes nothing of it.
        one: the method that closes all of it.
        level: the loss to which iterations are counted.

    Returns:
        {method: words}; nothing where one of the two is not there, or does not reach the level.
    """
    count = {name: best.reaches(level)[0] for name, best in found.items()}
    ends = [count.get(name, math.inf) for name in (zero, one)]
    if not all(0 < end < math.inf for end in ends) or ends[0] == ends[1]:
        return {}
    whole = math.log(ends[0] / ends[1])
    return {
        name: f"{math.log(ends[0] / n) / whole:.2f}" if 0 < n < math.inf else ""
        for name, n in count.items()
    }


def draw_losses(
    axes: Sequence[Axes], found: Mapping[str, Best], levels: Sequence[float], wide: Sequence[str]
) -> None:
    """Draw losses against iterations and against CPU seconds.

    Args:
        axes: two.
        found: {method: its best}.
        levels: losses, drawn as lines.
        wide: methods with a wider line.
    """
    styles = looks({name: name for name in found})
    for name, best in found.items():
        loss, seconds = best.curve()
        style = styles[name]
        line: dict[str, Any] = {"color": style.colour, "linestyle": style.dashes}
        line |= {"linewidth": 2.4, "zorder": 3} if name in wide else {"linewidth": 1.4}
        axes[0].plot(range(1, len(loss)), loss[1:], label=name, **line)
        axes[1].plot(seconds[1:], loss[1:], **line)
    for ax, label in zip(axes, ("iterations", "CPU seconds, one thread"), strict=True):
        for level in levels:
            ax.axhline(level, color="0.5", linewidth=0.8, linestyle=":")
        ax.set_xscale("log")
        ax.set_xlabel(label)
        ax.set_ylabel("validation loss, nat a symbol")
        ax.grid(alpha=0.3)
