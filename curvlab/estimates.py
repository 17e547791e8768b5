"""The matrices that algorithms estimate, block by block.

Data are shown to them in one batch or in passes of minibatches.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from curvlab.algorithms import damping_for, find_algorithm
from curvlab.closure import Closure
from curvlab.curvature.base import CurvatureBlock, block_with_defaults
from curvlab.errors import CurvlabError
from curvlab.exact.batches import Kind, Minibatches
from curvlab.layers import Block
from curvlab.linalg.operators import Operator
from curvlab.observation import Pass
from curvlab.statistics import LayerStatistics

Labels = Literal["kind", "own"]
"""The labels at which the approximations are taken, those of the exact matrix or each algorithm's
own.
"""

_LABELS: dict[Kind, Pass] = {
    "hessian": "exact",
    "ggn": "exact",
    "pi": "exact",
    "fisher": "exact",
    "fisher-mc": "model",
    "ef": "data",
    "ef-token": "token",
}
"""The pass whose vectors' second moment is nearest to a kind of matrix: the matrix itself for all
but Hessian and Π.
"""


@dataclass(frozen=True)
class Estimate:
    """An algorithm's statistics of the data, block by block.

    `scale` takes its matrix to the Fisher's units.
    """

    name: str
    labels: Pass
    of_means: bool
    scale: float
    blocks: dict[str, CurvatureBlock]

    @classmethod
    def of(
        cls, name: str, kind: Kind, labels: Labels, sizes: Sequence[int], chosen: Sequence[Block]
    ) -> Estimate:
        """Make the estimate of an algorithm for the chosen blocks, before any data.

        Args:
            name: of the algorithm.
            kind: of the exact matrix.
            labels: "kind" or "own".
            sizes: examples of each minibatch; `scale` follows from them for mean gradients.
            chosen: the blocks.

        Raises:
            CurvlabError: an unknown algorithm; one of the whole vector, or that reads no pass.
        """
        algorithm = find_algorithm(name)
        if algorithm.whole:
            raise CurvlabError(
                f"'{name}' estimates no matrix by block, so there is nothing to compare: leave"
                " it out"
            )
        if algorithm.look is not None:
            raise CurvlabError(
                f"'{name}' reads no statistics of a pass, so there is nothing to compare: leave"
                " it out"
            )
        blocks = {block.name: algorithm.block(block) for block in chosen}
        of_means = any(block.reads == "gradient" for block in blocks.values())
        wanted = algorithm.labels if labels == "own" else _LABELS[kind]
        if of_means and wanted in ("exact", "token"):  # a mean gradient has one vector an example
            wanted = "model" if wanted == "exact" else "data"
        return cls(
            name,
            wanted,
            of_means,
            sum(m * m for m in sizes) / sum(sizes) if of_means else 1.0,
            blocks,
        )

    def fold(self, statistics: dict[str, LayerStatistics], weight: float) -> None:
        """Fold one pass into every block, in place: old · (1 − weight) + new · weight."""
        for name, block in self.blocks.items():
            block.update(statistics[name], weight)
            block_with_defaults(block).settle(None)  # nothing is inverted here

    def matrix(self, block: str, damping: float) -> Operator:
        """Return the matrix of a block in the method's own units; `damping` is the overall one."""
        own = damping_for(self.name, damping, round(self.scale)) if damping else 0.0
        found = self.blocks[block].matrix(own)
        if found is None:
            raise CurvlabError(
                f"'{self.name}' estimates no matrix, so there is nothing to compare: leave it out"
            )
        return found


def fold_data(
    estimates: Iterable[Estimate], closure: Closure, sizes: Sequence[int], passes: int
) -> None:
    """Fold the data into all statistics, in place; every pass back is shared."""
    whole = [e for e in estimates if not e.of_means]
    of_means = [e for e in estimates if e.of_means]
    if whole:
        # each block's own vectors, where they are exact
        read = {e.name: "apart" if e.labels == "exact" else e.labels for e in whole}
        seen = closure.observe(set(read.values()), move_buffers=False).passes
        for estimate in whole:
            estimate.fold(seen[read[estimate.name]], 1.0)
    total = 0
    # E[ḡ ḡᵀ] = F / m: weighted by m², and times Σ m² / N (`scale`), the mean of unequal minibatches
    # is F as well
    for part in _minibatches(closure, sizes, passes) if of_means else ():
        square = len(part.x) ** 2
        total += square
        seen = part.observe({e.labels for e in of_means}, move_buffers=False).passes
        for estimate in of_means:
            estimate.fold(seen[estimate.labels], square / total)


def _minibatches(closure: Closure, sizes: Sequence[int], passes: int) -> Iterator[Closure]:
    """Yield minibatches shuffled from the objective's seed; every pass draws its labels anew."""
    generator = torch.Generator("cpu").manual_seed(closure.objective.seed)
    for _ in range(passes):
        order = torch.randperm(len(closure.x), generator=generator, device="cpu").to(
            closure.x.device
        )
        loader = [(closure.x[some], closure.y[some]) for some in torch.split(order, list(sizes))]
        yield from Minibatches.of(closure.objective, loader, None, whole=True)
