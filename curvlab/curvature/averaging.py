"""Averages of statistics over steps: warm start, running mean, moving average are all a weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from curvlab.errors import check_values

Average = Literal["moving", "corrected", "fixed", "last", "data"]
"""How observations are averaged, k counting them from 1: by the weight max(1/k, 1 − decay); by
(1 − decay)/(1 − decayᵏ), Adam's; by 1 − decay from the first on, of an average that starts at a
value of the method's own; by 1.

"data" is no average over steps: the mean over all minibatches that the warm start has shown, at the
weights as they stand now (thesis Alg. 14, line 4: "true values"). They are kept, and gone through
again at every update. Without a warm start: "last".
"""


@dataclass(frozen=True, kw_only=True)
class Averaging:
    """Settings of how a method averages its statistics over steps.

    A warm start may come before them.

    Args:
        decay: of the moving average (thesis Alg. 12, 15, 16: 0.9).
        kind: see `Average`.
        warm: whether the document has a warm start (a running mean over one pass through the data).
        skips_first: whether, after a warm start, the first minibatch is left out of the statistics,
            which have seen it (practice: TNT, Shampoo).

    Raises:
        CurvlabError: a decay out of its range.
    """

    decay: float = 0.9
    kind: Average = "moving"
    warm: bool = True
    skips_first: bool = True

    def __post_init__(self) -> None:
        check_values(("decay", self.decay, 0 <= self.decay < 1, "at least 0 and below 1"))

    def weight(self, k: int) -> float:
        """Return the weight of the k-th observation, counted from 1, in the average."""
        if self.kind in ("last", "data"):
            return 1.0
        if self.kind == "corrected":
            return (1 - self.decay) / (1 - self.decay**k)
        return 1 - self.decay if self.kind == "fixed" else max(1 / k, 1 - self.decay)
