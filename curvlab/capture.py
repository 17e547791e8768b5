"""Capture: a forward pass that is heard, then as many backward passes as are needed.

They go through its graph, in which what was not heard (`hearing`) shows: after the forward pass
every path from the outputs back to a parameter that runs through no call that was heard sends the
parameter's block the general way (`Capture.settle`). So nothing is missed, and nothing is written
on modules or to ``p.grad``.

Legend: V vectors sent back, N examples, T places where a weight is shared (of all its uses
together), I inputs incl. the bias column, O outputs; R rows and P places as a call has them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from itertools import product as every
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.graph import Node

from curvlab.autograd import sent_together
from curvlab.errors import CurvlabError
from curvlab.functions import arrangements
from curvlab.hearing import Hearing
from curvlab.layers import Block
from curvlab.linalg.padded_products import room
from curvlab.statistics import LayerStatistics
from curvlab.uses import Part, Use, UseInput

_NO_GRAPH = (
    "the model's outputs do not depend on a trainable parameter: no graph leads from them to one"
)
_ALONE = "was looked at for its gradient alone"
_SMALL = 1 << 14  # numbers, of which a copy costs less than two calls
_MOST = 64  # arrangements of one block's uses that are tried


@dataclass(frozen=True)
class Settled:
    """What a look has shown of its blocks, for the next look of the same form.

    Args:
        missed: blocks that a call without a rule uses.
        counts: {block: number of its uses}.
        general: {block: why it goes the general way}.
        arranged: {block: the arrangement of each use}.
        frozen: blocks that are not trained any more.
    """

    missed: frozenset[str]
    counts: Mapping[str, int]
    general: Mapping[str, str]
    arranged: Mapping[str, tuple[str, ...]]
    frozen: frozenset[str]


class Capture(Hearing):
    """Context that hears every call of the blocks' weights during a forward pass.

    Then it goes back any number of times.

    >>> import torch
    >>> from curvlab.layers import blocks
    >>> model, x = torch.nn.Linear(3, 2), torch.ones(4, 3)
    >>> with Capture(model, blocks(model)) as capture:
    ...     z = model(x)
    >>> (statistics,) = capture.backward(z, torch.ones(1, 4, 2)).values()
    >>> statistics.a.shape, statistics.g.shape
    (torch.Size([4, 1, 4]), torch.Size([1, 4, 1, 2]))

    Args:
        dtype: of all statistics; the weights' own where None.
        parameters: {name: parameter} of the blocks; looked up in the model where None.
        differentiable: whether second and forward derivatives will be taken
            (`derivatives.differentiable`).
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Sequence[Block],
        dtype: torch.dtype | None = None,
        parameters: Mapping[str, nn.Parameter] | None = None,
        *,
        differentiable: bool = False,
    ) -> None:
        self.dtype = dtype
        self.mask: Tensor | None = None  # [N, T], false at places of padding
        super().__init__(model, blocks, parameters, differentiable=differentiable)

    # ------------------------------------------------------------------------------------------
    # after it

    def settle(self, z: Tensor, size: int | None = None, known: Settled | None = None) -> bool:
        """Say which blocks go the general way, and which arrangement the others' shapes allow.

        Args:
            z: outputs, or losses, of N examples, with their graph.
            size: N, where z has another first axis.
            known: of an earlier look of the same form.

        Returns:
            Whether this look has the same uses as the known one, and so takes over what it showed.
        """
        size = len(z) if size is None else size
        if self._size == size:
            return False
        self._size = size
        missed, opaque = self._missed(z)
        self.missed = missed
        if known is not None and known.missed == missed:
            for name in known.frozen:
                self.uses.pop(name, None)
            if known.counts == {name: len(uses) for name, uses in self.uses.items()}:
                self.general, self.arranged = dict(known.general), dict(known.arranged)
                self.frozen = set(known.frozen)
                return True
        for name, block in ((b.name, b) for b in self.blocks):
            trained = [self.parameters[param].requires_grad for param in block.params]
            if not any(trained):
                self.frozen.add(name)
                self.uses.pop(name, None)
            if not any(trained) and block.layer is not None:
                self.arranged[name] = ()
            elif block.layer is None:
                self.general[name] = "belongs to a layer without a rule"
            elif name in missed:
                self.general[name] = "is used by a call without a rule"
            else:
                ways = [arrangements(*use.extent, size) for use in self.uses.get(name, ())]
                if all(ways):
                    self.arranged[name] = tuple(way[0] for way in ways)
                else:
                    bad = next(
                        use for use, way in zip(self.uses[name], ways, strict=True) if not way
                    )
                    self.general[name] = f"saw {bad.extent[0]} rows in a batch of {size}"
        for block in self.blocks:
            if block.name in self.silent - self.uses.keys() - missed - self.frozen:
                raise CurvlabError(
                    f"{block} ran without gradients: remove torch.no_grad() around it, or freeze"
                    f" it{opaque}"
                )
        return False

    def settled(self) -> Settled:
        """Return what this look has shown, as it now stands."""
        return Settled(
            frozenset(self.missed),
            {name: len(uses) for name, uses in self.uses.items()},
            dict(self.general),
            dict(self.arranged),
            frozenset(self.frozen),
        )

    def _missed(self, z: Tensor) -> tuple[set[str], str]:
        """Return the blocks with a parameter that a path from z reaches through no call heard.

        And a hint where the graph hides some.
        """
        heard = {
            use.edge.node: use.beyond for uses in self.uses.values() for use in uses
        } | self._void
        if z.grad_fn is None:
            raise CurvlabError(_NO_GRAPH)
        waiting: list[Node | None] = [z.grad_fn]
        seen: set[Node] = set()
        found: set[str] = set()
        opaque = ""
        while waiting:
            node = waiting.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            beyond = heard.get(node)
            if beyond is not None:
                waiting.extend(beyond)
                continue
            following = node.next_functions
            if following:
                waiting.extend([n for n, _ in following])
                if "CheckpointFunction" in node.name():
                    opaque = "; activation checkpointing needs use_reentrant=False"
                continue
            owner = self._owner.get(id(getattr(node, "variable", None)))
            if owner is not None:
                found.add(owner.name)
        for name, uses in list(self.uses.items()):  # calls whose outputs nobody took
            self.uses[name] = [use for use in uses if use.edge.node in seen]
            if not self.uses[name]:
                del self.uses[name]
                self.silent.discard(name)
        return found, opaque

    def candidates(self, name: str) -> Iterator[tuple[str, ...]]:
        """Return the arrangements of a block's uses that their shapes allow, the usual one first.

        Uses of one extent are alike.
        """
        assert self._size is not None
        extents = [use.extent for use in self.uses.get(name, ())]
        kinds = list(dict.fromkeys(extents))
        for chosen in islice(every(*[arrangements(*kind, self._size) for kind in kinds]), _MOST):
            known = dict(zip(kinds, chosen, strict=True))
            yield tuple(known[extent] for extent in extents)

    def places(self) -> dict[str, int]:
        """T of every block that is structured and was used."""
        assert self._size is not None
        found = {}
        for name in self.arranged:
            uses = self.uses.get(name, ())
            if uses:
                found[name] = (
                    sum(rows * places for rows, places in (use.extent for use in uses))
                    // self._size
                )
        return found

    def _input(self, use: Use, size: int, how: str) -> UseInput:
        key = id(use)
        if key not in self._inputs or self._inputs[key].how != how:
            dtype = self.dtype or use.call.weight.dtype
            self._inputs[key] = UseInput(use, size, how, dtype, self.mask)
        return self._inputs[key]

    def only(self, block: Block) -> Use:
        """Return the one use of a block whose examples are its rows.

        Raises CurvlabError where there is no such thing.
        """
        uses = self.uses.get(block.name, [])
        if self.arranged.get(block.name) != ("first",) or uses[0].swapped:
            raise CurvlabError(
                f"{block} {self.general.get(block.name, 'is used more than once')}: no single"
                " pre-activation"
            )
        return uses[0]

    def statistics(self, name: str, size: int) -> LayerStatistics:
        """Return the inputs of one block with a single use, without a pass back."""
        block = next(b for b in self.blocks if b.name == name)
        use = self.only(block)
        none = use.output.value.new_zeros(0, 0, 0, 0)  # no vector was sent back
        return LayerStatistics(
            block, size, parts=[Part(block, self._input(use, size, "first"), none)], like=none
        )

    def heard(self) -> list[tuple[Use, str]]:
        """Return every use of a structured block, with its arrangement."""
        return [
            (use, how)
            for name, ways in self.arranged.items()
            for use, how in zip(self.uses.get(name, ()), ways, strict=True)
        ]

    def part(self, use: Use, how: str, d: Tensor, count: int) -> Part:
        """Return a use in a pass back of `count` vectors, of what arrived at its edge."""
        shape, dtype = use.output.value.shape, self.dtype or use.call.weight.dtype
        d = d if d.shape == shape else d.reshape(count * shape[0], *shape[1:])
        g = use.rule.outputs(d).to(dtype)
        g = g[None] if count == 1 else g.view(count, -1, *g.shape[1:])
        return Part(use.block, self._input(use, self._size or 0, how), g, use.swapped)

    def shows(self, heard: Sequence[tuple[Use, str]], grads: Sequence[Tensor | None]) -> bool:
        """Examine again, and say so, where a use of which nothing could be seen has derivatives."""
        unseen = [(self.uses.get(name, ()), some) for name, some in self.unproven.items()]
        ids = {id(uses[i]) for uses, some in unseen for i in some if i < len(uses)}
        new = [d for (use, _), d in zip(heard, grads, strict=False) if id(use) in ids]
        if self.prove is not None and any(d is not None and bool(d.any()) for d in new):
            prove, self.prove = self.prove, None
            prove()
            return True
        return False

    def backward(
        self,
        z: Tensor,
        vectors: Float[Tensor, "V N *C"],
        leaves: bool = False,
        gradients: bool = False,
    ) -> dict[str, LayerStatistics]:
        """Send `vectors` back from the outputs `z`; the graph is kept, so this can be called again.

        Args:
            z: outputs of the forward pass, [N, *C].
            vectors: V vectors of the shape of z, for example ∂ℓₙ/∂z of the summed loss.
            leaves: also give the gradient of blocks that go the general way (only where V is 1).
            gradients: let autograd take the mean gradient of every block in the same pass, while
                what it reads is at hand (likewise, and where its precision is that of the
                statistics).

        Returns:
            {block name: LayerStatistics} in the order of the blocks; those that go the general way
            only with `leaves`.
        """
        size, count = len(z), len(vectors)
        self.settle(z)
        heard = self.heard()
        own = [
            b
            for b in self.blocks
            if count == 1
            and (
                (leaves and b.name in self.general)
                or (gradients and b.name in self.arranged and self.fine(b))
            )
        ]
        named = [name for b in own for name in b.params if self.parameters[name].requires_grad]
        targets: list[Any] = [use.edge for use, _ in heard] + [
            self.parameters[name] for name in named
        ]
        grads = sent_together(z, targets, vectors) if targets else []
        parts: dict[str, list[Part]] = {name: [] for name in self.arranged}
        for (use, how), d in zip(heard, grads, strict=False):
            if d is not None:
                parts[use.block.name].append(self.part(use, how, d, count))
        if self.shows(heard, grads):
            return self.backward(z, vectors, leaves, gradients)
        means = self._means(own, dict(zip(named, grads[len(heard) :], strict=True)), size)
        found = dict[str, LayerStatistics]()
        still = [name for name, p in self.parameters.items() if not p.requires_grad]
        common = None if self.dtype is None else z.new_empty(0, dtype=self.dtype)
        for block in self.blocks:
            name, (mean, used) = block.name, means.get(block.name, (None, True))
            like = self.parameters[block.params[0]].detach() if common is None else common
            if name in parts:
                frozen = [param for param in block.params if param in still] if still else ()
                found[name] = LayerStatistics(
                    block, size, mean, parts[name], like=like, vectors=count, frozen=frozen
                )
            elif mean is not None:
                found[name] = LayerStatistics(
                    block, size, mean, like=like, why=self.general[name], used=used
                )
        return found

    def fine(self, block: Block) -> bool:
        """Return whether autograd's own derivatives are of the statistics' precision."""
        return self.dtype is None or all(
            self.parameters[name].dtype == self.dtype for name in block.params
        )

    def gradients(
        self,
        z: Tensor,
        vectors: Float[Tensor, "1 N *C"],
        size: int | None = None,
        last: bool = False,
    ) -> dict[str, LayerStatistics]:
        """Return the mean gradient of every block by autograd alone: no call need be heard.

        Sums over examples are divided by `size`, N where None. The `last` pass keeps no graph.
        """
        own = [(name, self.parameters[name]) for b in self.blocks for name in b.params]
        leaves = {name: p for name, p in own if p.requires_grad}
        if z.grad_fn is None:
            raise CurvlabError(_NO_GRAPH)
        grads = sent_together(z, list(leaves.values()), vectors, last) if leaves else []
        count = len(z)
        means = self._means(self.blocks, dict(zip(leaves, grads, strict=True)), size or count)
        return {
            b.name: LayerStatistics(b, count, mean, like=mean, why=_ALONE, used=used)
            for b, (mean, used) in zip(self.blocks, means.values(), strict=True)
        }

    def _means(
        self, blocks: Sequence[Block], sums: Mapping[str, Tensor | None], size: int
    ) -> dict[str, tuple[Tensor, bool]]:
        """Return {block: (mean gradient, 0 where none; whether the pass reached it)} of sums."""
        found, whole, scale = {}, dict[str, Tensor](), 1 / size
        for block in blocks:
            each, used = dict[str, Tensor](), False
            for name in block.params:
                d = sums.get(name)
                each[name] = self._sum(d, name)
                used = used or d is not None or not self.parameters[name].requires_grad
            if block.layer is None or not block.biased:
                mean = whole[block.name] = block.gather(each)
            elif each[block.params[0]].numel() < _SMALL:
                mean = block.gather(each).mul_(scale)  # a copy
            else:
                mean = room(each[block.params[0]], *block.shape)
                torch.mul(block.gather_weight(each), scale, out=mean[:, :-1])
                torch.mul(each[block.params[1]], scale, out=mean[:, -1])
            found[block.name] = mean, used
        means = torch._foreach_mul(list(whole.values()), scale) if whole else []
        return found | {name: (m, found[name][1]) for name, m in zip(whole, means, strict=True)}

    def _sum(self, d: Tensor | None, name: str) -> Tensor:
        if d is None:
            p = self.parameters[name]
            return torch.zeros_like(p, dtype=self.dtype, requires_grad=False)
        d = d.to_dense() if d.is_sparse else d
        return d if self.dtype in (None, d.dtype) else d.to(self.dtype)
