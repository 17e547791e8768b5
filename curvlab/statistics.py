"""LayerStatistics: what one pass says of one block, the sum over its uses.

Legend: V vectors sent back, N examples, T places where a weight is shared (of all its uses
together), Γ groups of outputs, I inputs incl. the bias column, O outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from curvlab.errors import CurvlabError, guard_memory
from curvlab.layers import Block
from curvlab.lazy import cached_property
from curvlab.linalg.padded_products import second_moment
from curvlab.uses import Part, UseInput

Reads = Literal["gradient", "rows", "moments", "factors"]
"""Of the batch alone; of each example, which any layer with a rule has; A and G; a, g, h, where all
outputs share their inputs and no use reads the weight in the other direction.
"""


class LayerStatistics:
    """What one pass says of one block: the sum over its uses.

    All properties are computed once and shared by all who ask.

    A block has parts, one a use; or none where it did not reach the outputs in this pass (`used`);
    or it goes the general way and has a gradient alone (`structured`).

    Scales: `a`, `h`, `g` are per example of the *summed* loss; `A`, `G`, `gradient` carry 1/N (and
        `G` 1/T).
    """

    shared = False
    """Whether several ranks have a part each, so that to read means is an exchange."""

    def __init__(
        self,
        block: Block,
        size: int,
        gradient: Tensor | None = None,
        parts: Sequence[Part] | None = None,
        like: Tensor | None = None,
        vectors: int = 1,
        why: str = "",
        used: bool = True,
        frozen: Sequence[str] = (),
    ) -> None:
        self.block, self.size, self.why, self.frozen = block, size, why, frozen
        # whether the block reached the outputs in this pass
        self.used = used and (parts is None or len(parts) > 0)
        self._gradient, self._parts, self._like, self._vectors = gradient, parts, like, vectors

    @property
    def structured(self) -> bool:
        """Whether a, g and rows are there; else the gradient alone."""
        return self._parts is not None

    def provides(self, reads: Reads) -> bool:
        """Whether a method that `reads` this can be served."""
        if reads == "gradient":
            return True
        if not self.structured:
            return False
        if reads == "rows":
            return True
        return self.block.groups == 1 and (
            reads == "moments" or not any(p.swapped for p in self.parts)
        )

    @property
    def parts(self) -> Sequence[Part]:
        """One a use."""
        if self._parts is None:
            why = self.why or "belongs to a layer without a rule"
            raise CurvlabError(f"{self.block} {why}: it has a gradient but no a, h, g")
        return self._parts

    @property
    def a(self) -> Float[Tensor, "N T I"]:
        """Input of the layer, 1 appended where the bias is trained."""
        self._one_group("inputs for all outputs")
        return self.grouped_a

    @cached_property
    def grouped_a(self) -> Float[Tensor, "N T *G I"]:
        """The same with an axis Γ where the outputs lie in several groups."""
        return self._joined(
            lambda p: p.wide(p.g[0]) if p.swapped else p.a,
            1,
            lambda: (self.size, 0, *self._groups, self.block.shape[1]),
        )

    @property
    def bare_a(self) -> Float[Tensor, "N T *G I"]:
        """`grouped_a` without the bias column."""
        if (
            len(self.parts) == 1
            and not self.parts[0].swapped
            and isinstance(self.parts[0].inputs, UseInput)
        ):
            return self.parts[0].inputs.bare
        return self.grouped_a[..., :-1] if self.block.biased else self.grouped_a

    @property
    def _groups(self) -> tuple[int, ...]:
        return (self.block.groups,) if self.block.groups > 1 else ()

    def _one_group(self, thing: str) -> None:
        if self.structured and self.block.groups > 1:
            raise CurvlabError(
                f"{self.block} has {self.block.groups} groups of outputs, so there are no {thing}:"
                " use rows"
            )

    def _joined(
        self, of: Callable[[Part], Tensor], axis: int, none: Callable[[], tuple[int, ...]]
    ) -> Tensor:
        """Of all uses, place after place."""
        parts = self.parts
        if len(parts) == 1 and not parts[0].swapped:
            return of(parts[0])
        if any(p.swapped for p in parts) and self._vectors > 1:
            raise CurvlabError(
                f"{self.block} is read in both directions, so that its inputs differ from vector to"
                " vector: use rows"
            )
        if len(parts) == 1:
            return of(parts[0])
        return torch.cat([of(p) for p in parts], axis) if parts else self._zeros(*none())

    def _zeros(self, *shape: int) -> Tensor:
        assert self._like is not None
        return self._like.new_zeros(shape)

    @cached_property
    def g(self) -> Float[Tensor, "V N T O"]:
        """∂ℓₙ/∂h per example: of the sum, never of the mean."""
        return self._joined(
            lambda p: p.a[None] if p.swapped else p.g,
            2,
            lambda: (self._vectors, self.size, 0, self.block.shape[0]),
        )

    @property
    def like(self) -> Tensor:
        """A tensor of the statistics' dtype and device."""
        assert self._like is not None
        return self._like

    @property
    def vectors(self) -> int:
        """V."""
        return self._vectors

    @property
    def places(self) -> int:
        """T, of all uses together."""
        return sum(p.g.shape[2] for p in self.parts)

    @property
    def h(self) -> Float[Tensor, "N T O"]:
        """The pre-activation.

        Raises CurvlabError where a later in-place operation has overwritten it.
        """
        return self._joined(lambda p: p.h, 1, lambda: (self.size, 0, self.block.shape[0]))

    @cached_property
    def A(self) -> Float[Tensor, "I I"]:
        """Σ_t a aᵀ, mean over examples (Alg. 12, line 14: Ω).

        It is over the union of places where the weight has several uses.
        """
        self._one_group("second moments of one input")
        return self._summed(lambda p: p.A, lambda: (self.block.shape[1],) * 2)

    @cached_property
    def diagonal_A(self) -> Float[Tensor, " I"] | None:
        """Diagonal of A where all that is beside it is zero, as of an embedding; else None."""
        counts = [p.counts for p in self.parts]
        if not counts or any(c is None for c in counts):
            return None
        found: Tensor = sum(c for c in counts if c is not None) / self.size  # type: ignore[assignment]  # of tensors
        return found

    @cached_property
    def reduced_A(self) -> Float[Tensor, "I I"]:
        """Second moment of each example's mean input over its places, (1/N) Σ ā āᵀ.

        KFAC-reduce, Eschenhagen et al. 2023. Raises CurvlabError for a table that is also a head,
        where several vectors are sent back, and where an embedding's, which is no diagonal here, is
        larger than the memory.
        """
        if self._vectors > 1 and any(p.swapped for p in self.parts):
            raise CurvlabError(
                f"{self.block} is read in both directions, so that KFAC-reduce has another mean"
                " input for every vector sent back: take sharing='expand', or labels of one vector"
                " (kfac, kfac-ef)"
            )
        inputs = self.block.shape[1]
        guard_memory(
            inputs * (inputs + self.size * self.places) * self.like.element_size(),
            f"the second moment of the mean inputs of {self.block}",
            "an embedding's is a diagonal with sharing='expand', as of kfac",
        )
        if self.valid is None:
            return second_moment(self.a.mean(1), 1 / self.size)
        sums = (self.a * self.valid[..., None]).sum(1)
        return second_moment(sums / self.valid.sum(1, keepdim=True).clamp_min(1), 1 / self.size)

    @cached_property
    def reduced_G(self) -> Float[Tensor, "O O"]:
        """Second moment of each example's derivative summed over its places.

        (1/N) Σ_v Σ_n (Σ_t g)(Σ_t g)ᵀ: KFAC-reduce, Eschenhagen et al. 2023.
        """
        turned = self.valid is not None and any(p.swapped for p in self.parts)
        g = self.g * self.valid[..., None] if turned and self.valid is not None else self.g
        return second_moment(g.sum(2).flatten(0, 1), 1 / self.size)

    @cached_property
    def valid(self) -> Float[Tensor, "N T"] | None:
        """A one at every place that is no padding (`Objective(mask=…)`); None where all count."""
        each = [p.inputs.valid for p in self.parts]
        if all(valid is None for valid in each):
            return None
        parts = zip(self.parts, each, strict=True)
        return torch.cat(
            [self._zeros(*p.g.shape[1:3]) + 1 if v is None else v for p, v in parts], 1
        )

    @property
    def counted(self) -> float | int | Float[Tensor, ""]:
        """The number of examples and places, without those of padding, and at least 1."""
        found = self.counts_of_places
        return found.clamp_min(1) if isinstance(found, Tensor) else max(1, found)

    @property
    def counts_of_places(self) -> float | int | Float[Tensor, ""]:
        """The same number, which may be 0."""
        return sum(p.counted for p in self.parts)

    def _summed(self, of: Callable[[Part], Tensor], none: Callable[[], tuple[int, ...]]) -> Tensor:
        parts = self.parts
        if not parts:
            return self._zeros(*none())
        found = of(parts[0])
        for p in parts[1:]:
            found = found + of(p)
        return found

    @cached_property
    def mean_a(self) -> Float[Tensor, " I"]:
        """Of `a`, over examples and places."""
        self._one_group("inputs for all outputs")
        sums = self._summed(lambda p: p.weighted(p.ones), lambda: (self.block.shape[1],))
        return sums / self.counted

    @property
    def mean_g(self) -> Float[Tensor, " O"]:
        """Of `g`, of the first vector, over examples and places."""
        return self.g[0].mean((0, 1))

    @property
    def mean_h(self) -> Float[Tensor, " O"]:
        """Of `h`, over examples and places."""
        return self.h.mean((0, 1))

    def averaged(self, of: Callable[[LayerStatistics], list[Tensor]]) -> list[Tensor]:
        """Return what `of` gives, means over the examples of the statistics that it is given.

        Where ranks share the minibatch it is given each rank's (`shared_statistics`).
        """
        return of(self)

    def second_moment_product(self, v: Float[Tensor, " I"]) -> Float[Tensor, " I"]:
        """A v = E_n Σ_t (aᵀv) a without A, and in a convolution without patches: thesis (3.15)."""
        self._one_group("inputs for all outputs")
        return (
            self._summed(lambda p: p.weighted(p.response(v)), lambda: (self.block.shape[1],))
            / self.size
        )

    @cached_property
    def G(self) -> Float[Tensor, "O O"]:
        """Σ_v g gᵀ, mean over examples and places.

        That is Alg. 12, line 14: Γ, as a mean of outer products, see practice.
        """
        count = self.counted
        scale = 1.0 if isinstance(count, Tensor) else 1 / count
        found = self._summed(lambda p: p.G(scale), lambda: (self.block.shape[0],) * 2)
        return found / count if isinstance(count, Tensor) else found

    @cached_property
    def gradient(self) -> Tensor:
        """Of the *mean* loss, in the block's shape; defined where one vector was sent back."""
        if self._gradient is not None:
            return self._gradient
        if self._parts is None or self._vectors != 1:
            raise CurvlabError(
                f"{self.block}: a gradient needs a pass that sends one vector back, not the"
                " exact one, nor one for each place"
            )
        found = self._summed(lambda p: p.gradient(1 / self.size), lambda: self.block.shape)
        if not self.frozen:
            return found
        each = self.block.scatter(found)  # parameters that are not trained any more have none
        return self.block.gather(
            each | {name: torch.zeros_like(each[name]) for name in self.frozen}
        )

    def with_term(self, pull: Tensor) -> LayerStatistics:
        """Return the mean gradient alone, with that of a term of the objective added (L2)."""
        gradient = self.gradient + pull
        return LayerStatistics(
            self.block, self.size, gradient, like=self._like, why="has its gradient alone"
        )

    @cached_property
    def rows(self) -> Float[Tensor, "V N *O I"]:
        """Per-sample gradients, one for every vector sent back.

        They are of the sum over places and uses.
        """
        return self._summed(
            lambda p: p.rows(), lambda: (self._vectors, self.size, *self.block.shape)
        )

    def some_rows(self, at_once: int) -> Iterator[Float[Tensor, "R D"]]:
        """The rows flattened, about `at_once` at a time: whole examples with all their vectors."""
        step = max(1, at_once // max(1, self._vectors))
        for start in range(0, self.size, step):
            yield self._some(slice(start, start + step)).rows.flatten(2).flatten(0, 1)

    def part(self, indices: Int[Tensor, " n"]) -> LayerStatistics:
        """Of some of the examples: their a and g."""
        return self._some(indices)

    def _some(self, examples: slice | Tensor) -> LayerStatistics:
        parts = [p.some(examples) for p in self.parts]
        count = (
            len(range(*examples.indices(self.size)))
            if isinstance(examples, slice)
            else len(examples)
        )
        return LayerStatistics(
            self.block, count, parts=parts, like=self._like, vectors=self._vectors
        )
