"""Blocks of layers as the sums of Kronecker products that they are (thesis Theorem 3).

The approximations of such a block are made from its terms.

With what the approximations of such a block make of it.

M = (1/N) Σₙ Σ_tt' G_{n,tt'} ⊗ a_{n,t} a_{n,t'}ᵀ, row-major on [O, I], so that G comes first: the
pre-activation Hessian for the Hessian and Π, Σ_v g gᵀ for second moments. Scale: mean over examples
of a per-example sum.

Legend: N examples, T places, V vectors sent back, I inputs incl. the bias column, O outputs, D = O
I; P = O(O+1)/2 pairs of outputs, Q = I(I+1)/2 pairs of inputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from curvlab.closure import Closure
from curvlab.derivatives import derivatives
from curvlab.errors import CurvlabError, guard_memory, lookup
from curvlab.exact.batches import PASS_OF_KIND, Kind, Minibatches, check_kind
from curvlab.exact.route_table import Minibatch
from curvlab.forms import Form
from curvlab.layers import Block
from curvlab.linalg.kronecker import accumulate_places_
from curvlab.linalg.operators import Kronecker
from curvlab.linalg.packed import (
    accumulate_second_moment_,
    fold,
    mirror_,
    output_pairs,
    pack_pairs,
    unpack_full,
)
from curvlab.nests import is_minibatch
from curvlab.objective import Objective
from curvlab.units import Unit

_NUMBERS = 1 << 23  # in the temporaries of some examples at a time


@dataclass(frozen=True)
class KroneckerSum:
    """Block (1/N) Σₙ Σ_tt' G_{n,tt'} ⊗ a_{n,t} a_{n,t'}ᵀ of a layer, in its terms.

    Give either the Hessians or the vectors whose moments G is.

    Args:
        a: inputs of the layer, 1 appended where the bias is trained.
        hessians: G itself.
        g: vectors, G = Σ_v g gᵀ; then G is only formed where it is asked for.
        valid: a one at every place that is no padding (`Objective(mask=…)`), over which alone
            `averaged` and `single` average; None where all places count.
    """

    a: Float[Tensor, "N T I"]
    hessians: Float[Tensor, "N T O T O"] | None = None
    g: Float[Tensor, "V N T O"] | None = None
    valid: Float[Tensor, "N T"] | None = None

    def __post_init__(self) -> None:
        given = self.hessians if self.hessians is not None else self.g
        if given is None or (self.hessians is not None and self.g is not None):
            raise CurvlabError(
                "a Kronecker sum takes either hessians [N, T, O, T, O] or vectors g [V, N, T, O]"
            )
        shape = given.shape[:2] if self.g is None else given.shape[1:3]
        if self.a.ndim != 3 or shape != self.a.shape[:2]:
            raise CurvlabError(
                f"inputs {list(self.a.shape)} and derivatives {list(given.shape)} differ in"
                " examples or places"
            )

    @property
    def size(self) -> int:
        """Number of examples, N."""
        return self.a.shape[0]

    @property
    def places(self) -> int:
        """Number of places where the weight is used, T."""
        return self.a.shape[1]

    @property
    def shape(self) -> tuple[int, int]:
        """Numbers of outputs and inputs, (O, I)."""
        given = self.hessians if self.hessians is not None else self.g
        assert given is not None
        return given.shape[-1], self.a.shape[2]

    def __len__(self) -> int:
        return self.shape[0] * self.shape[1]

    @property
    def G(self) -> Float[Tensor, "N T O T O"]:
        """G_{n,tt'} of each example's *sum*, all of them, [N, T, O, T, O].

        The pre-activation Hessians (thesis (3.3)), or second moments of the vectors. Raises
        CurvlabError where they are larger than the memory.
        """
        self._guard(
            self.size * (self.places * self.shape[0]) ** 2,
            "the pre-activation Hessians",
            "take fewer examples",
        )
        return self._G(slice(None))

    def terms(self, n: int) -> tuple[Float[Tensor, "T T I I"], Float[Tensor, "T T O O"]]:
        """Return the terms (A_tt' = a_t a_t'ᵀ, G_tt') of example n, counted from 0.

        Σ_tt' G_tt' ⊗ A_tt' is that example's own block (thesis Theorem 3).
        """
        if not -self.size <= n < self.size:
            raise CurvlabError(f"there is no example {n}: the sum has {self.size}, counted from 0")
        n %= self.size
        outputs, inputs = self.shape
        numbers = self.places**2 * (outputs**2 + inputs**2)
        self._guard(numbers, "the terms of one example", "use dense(), same_place() or averaged()")
        a = self.a[n]
        return torch.einsum("ti,sj->tsij", a, a), self._G(slice(n, n + 1))[0].transpose(1, 2)

    def dense(self) -> Float[Tensor, "D D"]:
        """Return the block itself, [D, D], as `matrix` has it."""
        if self.places == 1:
            return self.same_place()
        self._guard_dense()
        matrix = self.a.new_zeros(len(self), len(self))
        if self.hessians is not None:
            accumulate_places_(matrix, self.hessians.permute(1, 2, 0, 3, 4), self.a, 1 / self.size)
        elif self.g is not None:
            for part in self._parts(len(self.g) * len(self)):
                rows = (
                    torch.einsum("vnto,nti->vnoi", self.g[:, part], self.a[part])
                    .flatten(2)
                    .flatten(0, 1)
                )
                accumulate_second_moment_(matrix, rows, 1 / self.size)
        # rows have filled the lower triangle alone; of Hessians the two differ by rounding
        return mirror_(matrix)

    def same_place(self) -> Float[Tensor, "D D"]:
        """Return (1/N) Σₙ Σ_t G_tt ⊗ a_t a_tᵀ, [D, D]: G_tt' = 0 between places (thesis (3.4)).

        With one place it is the block itself.
        """
        self._guard_dense()
        outputs, inputs = self.shape
        # Without terms between places, a place is an example of its own (thesis (3.4)): the packed
        # product of T = 1 over N T examples.
        packed = active = None
        for part in self._parts(self._own_numbers() + self.places * inputs):
            a = self.a[part].flatten(0, 1)
            packed, active = fold(
                packed, active, self._own_pairs(part).flatten(1), a, 1.0, 1 / self.size
            )
        assert packed is not None
        return unpack_full(packed, outputs, inputs, active)

    def averaged(self) -> Float[Tensor, "D D"]:
        """Return (1/N) Σₙ ((1/T) Σ_t G_tt) ⊗ (Σ_t a_t a_tᵀ), [D, D]: (3.5) on top (thesis (3.7)).

        With one place it is the block itself.
        """
        if self.places == 1:
            return self.same_place()
        self._guard_dense()
        outputs, inputs = self.shape
        # `fold` takes outer products of one a: Σ_t a_t a_tᵀ has rank T, so that its pairs are read
        # off the matrix of every example.
        rows, cols = torch.tril_indices(inputs, inputs, device=self.a.device)
        packed = self.a.new_zeros(outputs * (outputs + 1) // 2, len(rows))
        for part in self._parts(self._own_numbers() + 2 * inputs**2):
            a = self._counted_a[part]
            pairs = self._own_pairs(part).sum(2) / self._counts[part]
            packed.addmm_(pairs, (a.mT @ a)[:, rows, cols], alpha=1 / self.size)
        return unpack_full(packed, outputs, inputs)

    def single(self) -> Kronecker:
        """Return E[(1/T) Σ_t G_tt] ⊗ E[Σ_t a_t a_tᵀ], one Kronecker product.

        Thesis (2.3), (3.8), (3.9); of the exact Fisher it is KFAC, undamped.
        """
        a = self._counted_a.flatten(0, 1)
        outputs = self.shape[0]
        pairs = a.new_zeros(outputs * (outputs + 1) // 2, 1)
        for part in self._parts(self._own_numbers()):
            pairs += self._own_pairs(part).sum((1, 2))[:, None]
        return Kronecker(
            (unpack_full(pairs / self._counts.sum(), outputs, 1), a.mT @ a / self.size)
        )

    @property
    def _counted_a(self) -> Float[Tensor, "N T I"]:
        return self.a if self.valid is None else self.a * self.valid[..., None]

    @property
    def _counts(self) -> Float[Tensor, " N"]:
        """Return the number of places of each example that count, 1 where none does."""
        if self.valid is None:
            return self.a.new_full((self.size,), self.places)
        return self.valid.sum(1).clamp_min(1)

    def _G(self, part: slice) -> Float[Tensor, "N T O T O"]:
        if self.hessians is not None:
            return self.hessians[part]
        assert self.g is not None
        g = self.g[:, part]
        rows = g.permute(1, 0, 2, 3).flatten(2)  # [N, V, T O]
        return (rows.mT @ rows).view(g.shape[1:] + g.shape[2:])

    def _own_pairs(self, part: slice) -> Float[Tensor, "P N T"]:
        """Return the lower triangles of G_{n,tt}, pairs row by row."""
        if self.g is not None:
            g = self.g[:, part]
            return output_pairs(g.flatten(1, 2)).reshape(-1, *g.shape[1:3])
        assert self.hessians is not None
        own = self.hessians[part].diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)  # [N, T, O, O]
        return pack_pairs(own.flatten(0, 1)).reshape(-1, *own.shape[:2])

    def _parts(self, numbers: int) -> Iterator[slice]:
        """Return slices of some examples at a time, of `numbers` in temporaries each."""
        at_once = max(1, _NUMBERS // numbers)
        return (slice(start, start + at_once) for start in range(0, self.size, at_once))

    def _own_numbers(self) -> int:
        """Return how many numbers are in the temporaries of `_own_pairs`, for one example."""
        outputs = self.shape[0]
        return self.places * outputs * (2 * outputs + (0 if self.g is None else len(self.g)))

    def _guard_dense(self) -> None:
        self._guard(len(self) ** 2, "a dense block", "use terms(n) or single()")

    def _guard(self, numbers: int, what: str, remedy: str) -> None:
        outputs, inputs = self.shape
        of = (
            f"{what} of {self.size} examples, {self.places} places, {outputs} outputs and {inputs}"
            " inputs"
        )
        guard_memory(int(1.3 * numbers * self.a.element_size()), of, remedy)


@derivatives()
def kronecker_terms(
    objective: Objective,
    x: Any,
    y: Any,
    kind: Kind = "fisher",
    block: str = "1",
    *,
    draws: int = 1,
    unit: Unit = "sequence",
) -> KroneckerSum:
    """Return the block of one layer as a sum of Kronecker products (thesis Theorem 3).

    `dense()` of it is `matrix` of the same arguments.

    Args:
        objective: as for `matrix`.
        x: inputs of one minibatch, which is kept whole.
        y: as for `matrix`.
        kind: as for `matrix`.
        block: name of a block, of a layer with a rule whose outputs share their inputs.
        draws: as for `matrix`.
        unit: as for `matrix`.

    Raises:
        CurvlabError: as `matrix`; a layer without a rule or with groups of outputs; Hessians larger
            than the memory.
    """
    kind = check_kind(kind, draws, unit)
    chosen = lookup({b.name: b for b in objective.blocks}, block, "block")
    closure = one_minibatch(objective, x, y)
    fault = unfit(chosen, closure.form, kind)
    if fault:
        raise CurvlabError(
            f"{chosen} {fault}, so it is no sum of Kronecker products: use curvlab.exact.matrix"
        )
    if kind not in PASS_OF_KIND:
        guard_preactivation_hessians(
            chosen, len(closure.x), closure.form.places[block], objective.dtype
        )
    return next(sums(Minibatch(closure, kind, draws), [chosen]))[1]


def preactivation(
    objective: Objective,
    x: Any,
    y: Any,
    kind: Kind = "hessian",
    block: str = "1",
    *,
    draws: int = 1,
) -> Float[Tensor, "N T O T O"]:
    """Return G_{n,tt'} of every example's summed loss, never divided by N.

    ∂²ℓₙ/∂h_t∂h_t' (thesis (2.2), (3.3)), or Σ_v g gᵀ for second moments. Arguments and errors as
    for `kronecker_terms`.
    """
    return kronecker_terms(objective, x, y, kind, block, draws=draws).G


def one_minibatch(objective: Objective, x: Any, y: Any) -> Closure:
    """Return a closure of all of x and y at once, however many.

    Raises CurvlabError for a loader.
    """
    if not is_minibatch(x, y):
        raise CurvlabError(
            "the terms of a sum are those of one minibatch: give tensors x and y, not a loader"
        )
    (closure,) = Minibatches.of(objective, x, y, whole=True)
    return closure


def unfit(block: Block, form: Form, kind: Kind) -> str:
    """Return why a block is no Kronecker sum of this kind; empty where it is one."""
    if block.name not in form.shaped:
        return form.ways[block.name].why or "belongs to a layer without a rule"
    if (
        block.name not in (form.plain if kind in PASS_OF_KIND else form.direct)
        or block.name not in form.places
    ):
        return "has no single pre-activation of each example"
    return (
        f"has {block.groups} groups of outputs with inputs of their own" if block.groups > 1 else ""
    )


def guard_preactivation_hessians(block: Block, size: int, places: int, dtype: torch.dtype) -> None:
    """Refuse pre-activation Hessians of `size` examples that do not fit in memory."""
    numbers = size * (places * block.shape[0]) ** 2
    what = f"the pre-activation Hessians of {block}, {size} examples at {places} places,"
    guard_memory(int(1.3 * numbers * dtype.itemsize), what, "take fewer examples")


def sums(look: Minibatch, blocks: Sequence[Block]) -> Iterator[tuple[Block, KroneckerSum]]:
    """Yield every block, in any order, with its Kronecker sum on one minibatch.

    Every pass is shared.
    """
    if look.kind in PASS_OF_KIND:
        for s in look.each(blocks):
            yield s.block, KroneckerSum(s.a, g=s.g, valid=s.valid)
        return
    for s, hessians in look.hessians([b.name for b in blocks]):
        yield s.block, KroneckerSum(s.a, hessians.permute(2, 0, 1, 3, 4), valid=s.valid)
