"""Statistics of a minibatch that several ranks share: the one place where they are reduced.

Each rank has those of its own examples. What is a mean over examples is each rank's times N_r / N,
added up; what is a mean over places too, times M_r / M, the number that are counted. What is of
each example (a, g, h, rows) is gathered, in the order of the whole minibatch. So whoever reads a
`SharedStatistics` reads what one process would have, to rounding; and all ranks read the same bits.

All of a pass is reduced in one exchange when the first block is asked for it. So every rank must
ask for the same things in the same order, as ranks that take the same steps do.

Legend: N examples of the minibatch, N_r of this rank; M counted places; see `statistics`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from curvlab.errors import guard_memory
from curvlab.lazy import cached_property
from curvlab.parallel import Ranks
from curvlab.statistics import LayerStatistics, Reads
from curvlab.uses import Part, Slice


@dataclass(frozen=True)
class Mean:
    """A mean that is reduced over ranks.

    Args:
        of: statistics of some examples → their mean.
        there: whether a block has it, without a look at the data.
        by_places: whether it is a mean over counted places too, not over examples alone.
    """

    of: Callable[[LayerStatistics], Tensor]
    there: Callable[[LayerStatistics], bool]
    by_places: bool = False


def _has_inputs(s: LayerStatistics) -> bool:
    return s.structured and s.block.groups == 1


def _has_factors(s: LayerStatistics) -> bool:
    return s.provides("factors")


def _diagonal(s: LayerStatistics) -> Tensor:
    found = s.diagonal_A
    assert found is not None
    return found


MEANS: dict[str, Mean] = {
    "gradient": Mean(lambda s: s.gradient, lambda s: not s.structured or s.vectors == 1),
    "A": Mean(lambda s: s.A, lambda s: _has_inputs(s) and s.diagonal_A is None),
    "diagonal_A": Mean(_diagonal, lambda s: _has_inputs(s) and s.diagonal_A is not None),
    "G": Mean(lambda s: s.G, lambda s: s.structured, by_places=True),
    "mean_a": Mean(lambda s: s.mean_a, _has_factors, by_places=True),
    "mean_g": Mean(lambda s: s.mean_g, _has_factors),
    "mean_h": Mean(lambda s: s.mean_h, _has_factors),
}
"""Means of every block of a pass that are reduced together."""


class SharedPass:
    """The statistics of all blocks in one pass, of which each rank has a part.

    Args:
        ranks: that share the minibatch.
        total: N.
        found: {block: statistics of this rank's examples}.
    """

    def __init__(self, ranks: Ranks, total: int, found: Mapping[str, LayerStatistics]) -> None:
        self.ranks, self.total, self._found = ranks, total, found
        self._values: dict[str, dict[str, Tensor]] = {}

    @property
    def blocks(self) -> dict[str, LayerStatistics]:
        """What one process would have, {block: statistics}."""
        return {name: SharedStatistics(self, name, own) for name, own in self._found.items()}

    def value(self, what: str, name: str) -> Tensor:
        """Return a mean of one block, of `MEANS`; the others' are reduced with it."""
        if what not in self._values:
            self._values[what] = {}
        known = self._values[what]
        if name not in known:
            mean = MEANS[what]
            some = {n: s for n, s in self._found.items() if n not in known and mean.there(s)}
            if name not in some:  # says why there is none
                return mean.of(self._found[name])
            known |= self._reduced(mean, some)
        return known[name]

    def _reduced(self, mean: Mean, some: Mapping[str, LayerStatistics]) -> dict[str, Tensor]:
        each = [mean.of(s) for s in some.values()]
        if not mean.by_places:
            weights = [s.size / self.total for s in some.values()]
            sums = self.ranks.sum([t * w for t, w in zip(each, weights, strict=True)])
            return dict(zip(some, sums, strict=True))
        pairs = zip(each, some.values(), strict=True)
        counts = [t.new_tensor(0.0) + s.counts_of_places for t, s in pairs]
        sums = self.ranks.sum([*(t * c for t, c in zip(each, counts, strict=True)), *counts])
        found = zip(sums[: len(some)], sums[len(some) :], strict=True)
        return dict(zip(some, (s / c.clamp_min(1) for s, c in found), strict=True))

    def averaged(
        self, own: LayerStatistics, of: Callable[[LayerStatistics], list[Tensor]]
    ) -> list[Tensor]:
        """Return means over all examples of what `of` gives as means over some."""
        return self.ranks.sum([t * (own.size / self.total) for t in of(own)])


class SharedStatistics(LayerStatistics):
    """What one pass says of one block, over all ranks: the same properties as of one process.

    Args:
        of: the pass.
        name: the block's.
        own: statistics of this rank's examples.
    """

    shared = True

    def __init__(self, of: SharedPass, name: str, own: LayerStatistics) -> None:
        super().__init__(
            own.block,
            of.total,
            like=own.like,
            vectors=own.vectors,
            why=own.why,
            used=own.used,
            frozen=own.frozen,
        )
        self._of, self._name, self._own = of, name, own

    @property
    def structured(self) -> bool:
        """Whether a, g and rows are there; else the gradient alone."""
        return self._own.structured

    def provides(self, reads: Reads) -> bool:
        """Whether a method that `reads` this can be served."""
        return self._own.provides(reads)

    @property
    def places(self) -> int:
        """T, of all uses together."""
        return self._own.places

    # ---- gathered

    @cached_property
    def whole(self) -> LayerStatistics:
        """The same block with the a and g of all examples, which every rank then holds."""
        ranks, total = self._of.ranks, self.size
        parts = []
        for p in self._own.parts:
            valid = p.inputs.valid
            inputs = Slice(
                ranks.gathered(p.a, total), None if valid is None else ranks.gathered(valid, total)
            )
            parts.append(Part(p.block, inputs, ranks.gathered(p.g, total, 1), p.swapped))
        return LayerStatistics(
            self.block,
            total,
            parts=parts,
            like=self.like,
            vectors=self.vectors,
            used=self.used,
            frozen=self.frozen,
        )

    @property
    def parts(self) -> list[Part]:
        """One a use, of all examples."""
        return list(self.whole.parts)

    @property
    def grouped_a(self) -> Float[Tensor, "N T *G I"]:
        """`a`, with an axis Γ where the outputs lie in several groups."""
        return self.whole.grouped_a

    @property
    def g(self) -> Float[Tensor, "V N T O"]:
        """∂ℓₙ/∂h per example: of the sum, never of the mean."""
        return self.whole.g

    @cached_property
    def h(self) -> Float[Tensor, "N T O"]:
        """The pre-activation."""
        return self._of.ranks.gathered(self._own.h, self.size)

    @property
    def valid(self) -> Float[Tensor, "N T"] | None:
        """A one at every place that is no padding; None where all count."""
        return self.whole.valid

    @property
    def rows(self) -> Float[Tensor, "V N *O I"]:
        """Per-sample gradients, one for every vector sent back."""
        return self.whole.rows

    def some_rows(self, at_once: int) -> Iterator[Float[Tensor, "R D"]]:
        """The rows flattened, about `at_once` at a time: whole examples with all their vectors."""
        return self.whole.some_rows(at_once)

    def part(self, indices: Int[Tensor, " n"]) -> LayerStatistics:
        """Of some of the examples of the whole minibatch: their a and g."""
        return self.whole.part(indices)

    # ---- reduced

    @property
    def gradient(self) -> Tensor:
        """Of the *mean* loss over all examples, in the block's shape."""
        return self._of.value("gradient", self._name)

    @property
    def A(self) -> Float[Tensor, "I I"]:
        """Σ_t a aᵀ, mean over examples."""
        if self._own.structured and self._own.diagonal_A is not None:
            numbers = self.block.shape[1]
            guard_memory(
                numbers**2 * self.like.element_size(),
                f"the second moment of the inputs of {self.block}",
                "an embedding's is a diagonal: kfac with sharing='expand' keeps it as one",
            )
            return torch.diag(self._of.value("diagonal_A", self._name))
        return self._of.value("A", self._name)

    @property
    def diagonal_A(self) -> Float[Tensor, " I"] | None:
        """Diagonal of A where all that is beside it is zero, as of an embedding; else None."""
        if self._own.diagonal_A is None:
            return None
        return self._of.value("diagonal_A", self._name)

    @cached_property
    def reduced_A(self) -> Float[Tensor, "I I"]:
        """Second moment of each example's mean input over its places."""
        return self.averaged(lambda s: [s.reduced_A])[0]

    @cached_property
    def reduced_G(self) -> Float[Tensor, "O O"]:
        """Second moment of each example's derivative summed over its places."""
        return self.averaged(lambda s: [s.reduced_G])[0]

    @property
    def G(self) -> Float[Tensor, "O O"]:
        """Σ_v g gᵀ, mean over examples and places."""
        return self._of.value("G", self._name)

    @property
    def mean_a(self) -> Float[Tensor, " I"]:
        """Of `a`, over examples and places."""
        return self._of.value("mean_a", self._name)

    @property
    def mean_g(self) -> Float[Tensor, " O"]:
        """Of `g`, of one vector, over examples and places."""
        return self._of.value("mean_g", self._name)

    @property
    def mean_h(self) -> Float[Tensor, " O"]:
        """Of `h`, over examples and places."""
        return self._of.value("mean_h", self._name)

    def second_moment_product(self, v: Float[Tensor, " I"]) -> Float[Tensor, " I"]:
        """A v = E_n Σ_t (aᵀv) a without A."""
        return self.averaged(lambda s: [s.second_moment_product(v)])[0]

    def averaged(self, of: Callable[[LayerStatistics], list[Tensor]]) -> list[Tensor]:
        """Return means over all examples of what `of` gives as means over some."""
        return self._of.averaged(self._own, of)
