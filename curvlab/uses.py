"""Uses: one call that takes a block's weight, what went into it, and what comes back.

Legend: V vectors sent back, N examples, T places of an example, Γ groups of outputs, I inputs incl.
the bias column, O outputs; R rows and P places as the call has them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from curvlab.arrangements import ARRANGEMENTS
from curvlab.errors import CurvlabError, guard_memory
from curvlab.functions import Call, Rule, extent
from curvlab.layers import Block
from curvlab.lazy import cached_property
from curvlab.linalg.padded_products import padded_product, room, second_moment

_SMALL = 1 << 16  # numbers, of which a copy costs less than a few calls
OVERWRITTEN = (
    "{}: its input was overwritten in place after it ran; write x = x + … instead of x += …"
)


class Stored(NamedTuple):
    """A tensor as a call saw it.

    Its version tells whether somebody has overwritten it since.
    """

    value: Tensor
    version: int

    @classmethod
    def of(cls, value: Tensor) -> Stored:
        """Keep a tensor without its graph, and the version that it has now."""
        return cls(value.detach(), value._version)

    @property
    def overwritten(self) -> bool:
        """Whether the tensor was written in place since it was kept."""
        return self.value._version != self.version


@dataclass(
    eq=False
)  # not frozen: several are made at every look, and freezing costs more than the rest of it
class Use:
    """One call that takes a block's weight, in which nothing is written again.

    Args:
        call: its arguments, without a graph.
        edge: where the derivative in its outputs arrives, in the shape `flat`: of the tensor of
            which the output is a view, so that what is written on the view later does not cut it
            off.
        biased: whether the block's bias is added here.
        swapped: whether the weight is read in the other direction, so that its outputs are the
            block's inputs.
        inputs: of a rule that has to be called in the pass itself.
        beyond: where the graph goes on behind the call, but for the parameters that the rule
            accounts for.
        source: where the derivative in its inputs arrives, in their own shape; None where they
            have none.
    """

    block: Block
    rule: Rule
    call: Call
    x: Stored
    output: Stored
    edge: GradientEdge
    flat: tuple[int, ...]
    biased: bool
    swapped: bool
    inputs: Tensor | None
    beyond: tuple[Node, ...]
    source: GradientEdge | None

    @property
    def extent(self) -> tuple[int, int]:
        """(R, P)."""
        return extent(self.rule.outputs, self.output.value.shape)

    def masked_by(self, mask: Bool[Tensor, "N T"]) -> bool:
        """Whether the call has the places that a mask has."""
        rows, places = self.extent
        return rows * places == mask.numel()


class UseInput:
    """The inputs of one use in one forward pass.

    They are read when first asked for, and shared by every pass back.
    """

    def __init__(
        self,
        use: Use,
        size: int,
        how: str,
        dtype: torch.dtype,
        mask: Bool[Tensor, "N T"] | None = None,
    ) -> None:
        self.use, self.size, self.how, self.dtype = use, size, how, dtype
        self.mask = mask

    @cached_property
    def valid(self) -> Float[Tensor, "N T"] | None:
        """A one where a place is no padding; None where all are counted."""
        if self.mask is None or not self.use.masked_by(self.mask):
            return None
        return self.mask.to(self.raw.device, self.dtype)

    @cached_property
    def own_valid(self) -> Float[Tensor, "R P"] | None:
        """The same in the call's own rows and places."""
        if self.valid is None:
            return None
        rows, places = self.use.extent
        numbers = torch.arange(rows * places, device=self.valid.device).view(rows, places, 1)
        order = ARRANGEMENTS[self.how](numbers, 0, self.size).flatten()
        found = self.valid.new_empty(rows * places)
        return found.index_copy_(0, order, self.valid.flatten()).view(rows, places)

    @property
    def raw(self) -> Tensor:
        """The inputs as the call saw them.

        Raises CurvlabError where a later in-place operation has overwritten them.
        """
        x = self.use.x
        if x.overwritten:
            raise CurvlabError(OVERWRITTEN.format(self.use.block))
        return (
            x.value
            if x.value.dtype == self.dtype or not x.value.is_floating_point()
            else x.value.to(self.dtype)
        )

    @cached_property
    def own(self) -> Float[Tensor, "R P *G I"]:
        """The inputs in the call's own rows and places, without the bias column.

        They have an axis Γ where the block has several groups.
        """
        use = self.use
        found = use.rule.inputs(use.call, self.raw) if use.inputs is None else use.inputs
        return found if found.dtype == self.dtype else found.to(self.dtype)

    @property
    def bare(self) -> Float[Tensor, "N T *G I"]:
        """The same by examples."""
        return ARRANGEMENTS[self.how](self.own, 0, self.size)

    @property
    def column(self) -> bool:
        """Whether the block has a bias column, of ones where it is added here, else of zeros."""
        return self.use.block.biased and not self.use.swapped

    @cached_property
    def a(self) -> Float[Tensor, "N T *G I"]:
        """With the bias column, if there is a bias."""
        if not self.column:
            return self.bare
        ends = self.bare.new_full((*self.bare.shape[:-1], 1), float(self.use.biased))
        return torch.cat([self.bare, ends], -1)

    @cached_property
    def counts(self) -> Float[Tensor, " I"] | None:
        """Diagonal of Σ a aᵀ over examples and places, where the rest of it is zero; else None."""
        rule = self.use.rule
        if rule.counts is None or self.column:
            return None
        if self.own_valid is not None and rule.gradient is not None:
            found = rule.gradient(self.use.call, self.raw, self.own_valid[..., None])[0]
            return found.to(self.dtype)
        return rule.counts(self.use.call, self.raw).to(self.dtype)

    @cached_property
    def A(self) -> Float[Tensor, "I I"]:
        """Second moment Σ_t a aᵀ of the same inputs as `a`, mean over examples."""
        if self.counts is not None:  # rows of zeros and a one are never formed
            numbers = len(self.counts)
            guard_memory(
                numbers**2 * self.counts.element_size(),
                f"the second moment of the inputs of {self.use.block}",
                "an embedding's is a diagonal: kfac with sharing='expand' keeps it as one",
            )
            return torch.diag(self.counts / self.size)
        rows, n, biased = self.bare.flatten(0, 1), len(self.bare), float(self.use.biased)
        if self.valid is not None:
            rows = rows * self.valid.view(-1, 1)  # of zeros and ones, which are their own squares
        if not self.column:
            return second_moment(rows, 1 / n)
        if rows.numel() < _SMALL:
            ones = rows.new_full((len(rows), 1), biased)
            ones = ones if self.valid is None else ones * self.valid.view(-1, 1)
            return second_moment(torch.cat([rows, ones], 1), 1 / n)
        last = rows.shape[1]
        # the column of ones costs nothing, where a copy of patches would
        found = room(rows, last + 1, last + 1)
        second_moment(rows, 1 / n, out=found[:last, :last])
        found[last, :last] = found[:last, last] = rows.sum(0) * (biased / n)
        count = len(rows) if self.valid is None else self.valid.sum()
        found[last, last] = biased * count / n
        return found


@dataclass(frozen=True)
class Slice:
    """Inputs of some of the examples."""

    a: Float[Tensor, "N T *G I"]
    valid: Float[Tensor, "N T"] | None = None


class Part:
    """One use in one pass back: in its own letters, whichever way the block reads it."""

    def __init__(
        self,
        block: Block,
        inputs: UseInput | Slice,
        g: Float[Tensor, "V R P O"],
        swapped: bool = False,
    ) -> None:
        self.block, self.inputs, self.swapped = block, inputs, swapped
        self.raw_g = g

    @cached_property
    def g(self) -> Float[Tensor, "V N T O"]:
        """Derivatives in the outputs of the call, as they were sent back, by examples."""
        inputs = self.inputs
        return (
            self.raw_g
            if isinstance(inputs, Slice)
            else ARRANGEMENTS[inputs.how](self.raw_g, 1, inputs.size)
        )

    @property
    def a(self) -> Float[Tensor, "N T *G I"]:
        """Inputs of the call by examples, with the bias column, if the use has one."""
        return self.inputs.a

    @property
    def own(self) -> tuple[Rule, Call, UseInput]:
        """Rule, call and inputs of the use; only of a part that has all examples."""
        assert isinstance(self.inputs, UseInput)
        return self.inputs.use.rule, self.inputs.use.call, self.inputs

    @property
    def biased(self) -> bool:
        """Whether the block's bias is added here."""
        return self.own[2].use.biased

    def wide(self, t: Tensor) -> Tensor:
        """With the block's bias column, to which a use in the other direction adds nothing."""
        return torch.cat([t, t.new_zeros(*t.shape[:-1], 1)], -1) if self.block.biased else t

    @property
    def A(self) -> Float[Tensor, "I I"]:
        """Σ_t a aᵀ, mean over examples, as the block reads it."""
        if not self.swapped:
            assert isinstance(self.inputs, UseInput)
            return self.inputs.A
        rows = self.wide(self.g).flatten(0, 2)
        return second_moment(rows, 1 / self.g.shape[1])

    @property
    def counts(self) -> Float[Tensor, " I"] | None:
        """Diagonal of Σ a aᵀ, summed over examples, where the rest of it is zero; else None."""
        if self.swapped or not isinstance(self.inputs, UseInput):
            return None
        return self.inputs.counts

    def G(self, scale: float) -> Float[Tensor, "O O"]:
        """Return scale · Σ g gᵀ, as the block reads it."""
        if not self.swapped:
            return second_moment(self.g.flatten(0, 2), scale)
        valid = self.inputs.valid
        a = self.a if valid is None else self.a * valid[..., None]
        return second_moment(a.flatten(0, 1), scale)

    @property
    def counted(self) -> int | Float[Tensor, ""]:
        """The number of examples and places, without those of padding."""
        valid = self.inputs.valid
        return self.g.shape[1] * self.g.shape[2] if valid is None else valid.sum()

    def rows(self) -> Float[Tensor, "V N O I"]:
        """Return Σ_t g aᵀ of each vector and example, in the block's own O and I."""
        block = self.block
        if block.groups > 1:
            return self._by_group("vntgo,ntgi->vngoi", self.g).flatten(2, 3)
        if self.a.shape[1] == 1 and not self.swapped:
            return self.g[:, :, 0, :, None] * self.a[None, :, 0, None, :]
        if self.swapped:
            return self.wide(torch.einsum("vnto,nti->vnio", self.g, self.a))
        return torch.einsum("vnto,nti->vnoi", self.g, self.a)

    def gradient(self, scale: float) -> Float[Tensor, "O I"]:
        """Return scale · Σₙ Σ_t g aᵀ, of one vector."""
        block = self.block
        if isinstance(self.inputs, UseInput) and not self.swapped:
            rule, call, whole = self.own
            if rule.gradient is not None:
                found = rule.gradient(call, whole.raw, self.raw_g[0])
                if block.biased:
                    ends = self.raw_g[0].sum((0, 1)) if self.biased else found.new_zeros(len(found))
                    found = torch.cat([found, ends[:, None]], 1)
                return found * scale
        if block.groups > 1:
            return self._by_group("ntgo,ntgi->goi", self.g[0]).flatten(0, 1) * scale
        if self.swapped:
            return self.wide(padded_product(self.a.flatten(0, 1).T, self.g[0].flatten(0, 1), scale))
        inputs = self.inputs
        if isinstance(inputs, Slice):
            return padded_product(self.g[0].flatten(0, 1).T, self.a.flatten(0, 1), scale)
        g, a = self.raw_g[0].flatten(0, 1), inputs.own.flatten(0, 1)  # a sum knows no order
        if not block.biased:
            return padded_product(g.T, a, scale)
        found = room(g, *block.shape)
        weight, bias = found[:, :-1], found[:, -1]
        torch.addmm(weight, g.T, a, beta=0, alpha=scale, out=weight)
        if inputs.use.biased:
            torch.sum(g, 0, out=bias).mul_(scale)
        else:
            bias.zero_()
        return found

    def weighted(self, h: Float[Tensor, "R P"]) -> Float[Tensor, " I"]:
        """Σ_r Σ_p h a, in the call's own rows and places, without those of padding."""
        rule, call, inputs = self.own
        h = h if inputs.own_valid is None else h * inputs.own_valid
        if rule.response is None or rule.gradient is None:
            found = inputs.own.flatten(0, 1).mT @ h.flatten()
        else:
            found = rule.gradient(call, inputs.raw, h[..., None])[0]
        if not self.block.biased:
            return found
        return torch.cat([found, h.sum()[None] if self.biased else h.new_zeros(1)])

    def response(self, v: Float[Tensor, " I"]) -> Float[Tensor, "R P"]:
        """aᵀ v, in the call's own rows and places."""
        rule, call, inputs = self.own
        w = v[:-1] if self.block.biased else v
        found = inputs.own @ w if rule.response is None else rule.response(call, inputs.raw, w)
        return found + v[-1] if self.block.biased and self.biased else found

    @property
    def ones(self) -> Float[Tensor, "R P"]:
        """A one for each of the call's own rows and places."""
        return self.raw_g.new_ones(self.raw_g.shape[1:3])

    @property
    def h(self) -> Float[Tensor, "N T O"]:
        """Pre-activations by examples. Raises CurvlabError where they were overwritten in place."""
        rule, _, inputs = self.own
        output = inputs.use.output
        if output.overwritten:
            raise CurvlabError(
                f"{self.block}: its pre-activation was overwritten in place (for example by"
                " ReLU(inplace=True)); use inplace=False to read h"
            )
        return ARRANGEMENTS[inputs.how](rule.outputs(output.value).to(inputs.dtype), 0, inputs.size)

    def some(self, examples: slice | Tensor) -> Part:
        """Of some of the examples."""
        valid = None if self.inputs.valid is None else self.inputs.valid[examples]
        return Part(self.block, Slice(self.a[examples], valid), self.g[:, examples], self.swapped)

    def _by_group(self, legend: str, g: Tensor) -> Tensor:
        return torch.einsum(legend, g.reshape(*g.shape[:-1], self.block.groups, -1), self.a)
