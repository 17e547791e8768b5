"""What a comparison trains, and how far: a line of a document's table, the extent of a budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from curvlab.algorithms import ALGORITHMS

TableValues = tuple[float, ...]
"""(learning rate, damping) or (learning rate, weight decay, damping), as the documents' tables have
them; 0 for their dash.
"""


@dataclass(frozen=True)
class Method:
    """A line of a document's table.

    `values` are those of one problem, or of each by its name; `options` what else `curvlab.train`
    takes, `further` that of one problem alone; `batch` the size of minibatches and `epochs` the
    length, where they are not the comparison's.
    """

    algorithm: str
    values: TableValues | Mapping[str, TableValues]
    options: Mapping[str, Any] = field(default_factory=dict)
    further: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    batch: int | None = None
    epochs: int | None = None

    def on(self, problem: str) -> TableValues | None:
        """Return the values for a problem; None where the table has none."""
        return self.values.get(problem) if isinstance(self.values, Mapping) else self.values

    def arguments(self, problem: str) -> dict[str, Any]:
        """Return the arguments of `curvlab.train` on a problem.

        What is the algorithm's own anyway is left out, so that equal runs have equal names.
        """
        lr, *decay, damping = self.on(problem) or ()
        table = ALGORITHMS[self.algorithm].read(self.options.get("reading"))
        usual = dict(table.own)
        usual |= {
            name: getattr(table, name)
            for name in (
                "momentum",
                "momentum_kind",
                "weight_decay",
                "decay",
                "update_every",
                "refresh_every",
            )
        }
        given = (
            dict(zip(("weight_decay",), decay, strict=False))
            | dict(self.options)
            | dict(self.further.get(problem, {}))
        )
        told = {
            name: value
            for name, value in given.items()
            if name not in usual or usual[name] != value
        }
        return {"algorithm": self.algorithm, "lr": lr, "damping": damping} | told


@dataclass(frozen=True)
class Extent:
    """The extent of a budget: how far its runs go.

    It is seconds of training or epochs, whichever come first (None: the methods' own epochs),
    seeds, and how many of the training and test examples; the training loss is of the first
    `evaluated`. `at_most`: epochs of algorithms that are to stop earlier; `told_after`: epochs
    after which tables have the training loss, with its standard deviation over the seeds.
    """

    seconds: float | Mapping[str, float] | None = None
    epochs: int | Mapping[str, int] | None = None
    seeds: int = 1
    examples: int | None = None
    tests: int | None = None
    evaluated: int | None = None
    at_most: Mapping[str, int] = field(default_factory=dict)
    told_after: Sequence[int] = ()

    def seconds_on(self, problem: str) -> float | None:
        """Return the seconds of training that a run of a problem has; None: no limit."""
        return self.seconds[problem] if isinstance(self.seconds, Mapping) else self.seconds

    def epochs_on(self, problem: str, algorithm: str = "") -> int | None:
        """Return the lower of the problem's and the algorithm's epochs; None: no limit."""
        ends = (
            self.epochs[problem] if isinstance(self.epochs, Mapping) else self.epochs,
            self.at_most.get(algorithm),
        )
        return min((n for n in ends if n is not None), default=None)

    def on(self, problems: Sequence[str]) -> str:
        """Return the extent on some problems in words."""
        seconds = [f"{s:g}" for s in dict.fromkeys(map(self.seconds_on, problems)) if s is not None]
        epochs = [f"{n}" for n in dict.fromkeys(map(self.epochs_on, problems)) if n is not None]
        words = [f"{' or '.join(seconds)} s of training a run"] if seconds else []
        words += [f"{' or '.join(epochs)} epoch{'s' * (epochs != ['1'])}"] if epochs else []
        words = words or ["the document's epochs"]
        words += (
            [f"of {len(self.at_most)} methods at most {max(self.at_most.values())}"]
            if self.at_most
            else []
        )
        words += [f"{self.seeds} seed{'s' * (self.seeds > 1)}"]
        words += [f"{self.examples:,} training examples"] if self.examples else []
        words += [f"training loss of {self.evaluated:,} examples"] if self.evaluated else []
        return ", ".join(words)
