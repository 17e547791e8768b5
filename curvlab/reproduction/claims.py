"""What a document says of its figure, as inequalities between curves."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from curvlab.reproduction.results import Result, Results

MEASURES = {
    "train_loss": "training loss",
    "val_loss": "test loss",
    "train_error": "training error",
    "val_error": "test error",
}


@dataclass(frozen=True)
class Reported:
    """The document's numbers: training losses, or test `accuracies` in per cent.

    They are {problem: {label: number}}.
    """

    numbers: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    accuracies: bool = False

    @property
    def what(self) -> str:
        """Return what the numbers are of."""
        return "highest test accuracy, per cent" if self.accuracies else "lowest training loss"

    def best(self, r: Result) -> float:
        """Return what these numbers are compared with."""
        return 100 * (1 - r.lowest("val_error")) if self.accuracies else r.lowest("train_loss")


@dataclass(frozen=True)
class Claim:
    """Something that a document says of its figure, as an inequality between curves.

    Every one of `better` ends below every one of `than`, or at most `within` times as much above
    it; where they are said to be `alike`, none of all is further above another.

    `by`: where the curves are read: at the last epoch that all of them reach, at the last time that
    all reach, or each at its lowest. `problems`: of which it is said; of all where it is empty.
    """

    words: str
    better: Sequence[str]
    than: Sequence[str]
    by: Literal["epoch", "time", "lowest"] = "epoch"
    measure: str = "train_loss"
    within: float = 0.0
    problems: Sequence[str] = ()
    alike: bool = False

    def verdict(self, found: dict[str, Result]) -> str:
        """Say whether it holds on one problem, with the numbers, or which runs are missing."""
        missing = [
            label
            for label in (*self.better, *self.than)
            if label not in found or not found[label].runs
        ]
        if missing:
            return f"cannot be said: no run of {', '.join(missing)}"
        value, where = self._reading({label: found[label] for label in (*self.better, *self.than)})
        worst, best = max(value[b] for b in self.better), min(value[t] for t in self.than)
        if self.alike:
            worst, best = max(value.values()), min(value.values())
        numbers = (
            ", ".join(f"{label} {value[label]:.4g}" for label in side)
            for side in (self.better, self.than)
        )
        return (
            f"{'holds' if worst <= best * (1 + self.within) else 'does not hold'}:"
            f" {' against '.join(numbers)} ({where})"
        )

    def _reading(self, found: dict[str, Result]) -> tuple[dict[str, float], str]:
        if self.by == "lowest":
            return {
                label: r.lowest(self.measure) for label, r in found.items()
            }, f"lowest {MEASURES[self.measure]}"
        last = min(float(r.along(self.by)[-1]) for r in found.values())
        where = f"{last:.3g} epochs" if self.by == "epoch" else f"{last:.3g} s"
        early = [label for label, r in found.items() if r.is_early(self.by, last)]
        if early:  # a line from the start to a first record says little of what lies between
            where += f"; of {', '.join(early)} between the start and the first record"
        return {
            label: r.at(self.measure, self.by, last) for label, r in found.items()
        }, f"{MEASURES[self.measure]} at {where}"


def verdicts(claims: Sequence[Claim], found: Results) -> Iterator[str]:
    """Yield a line a claim, and one a problem."""
    for claim in claims:
        yield f"claim: {claim.words}" + (f" (up to {claim.within:.0%})" if claim.within else "")
        for problem in claim.problems or found:
            yield f"  {problem}: {claim.verdict(found[problem]) if problem in found else 'not run'}"
