"""Capture: the one place that listens. One forward, then as many backward passes as are needed through the same graph.

What is heard are *calls* of torch functions that take a block's weight (`functions`), wherever they stand: in its module, in a
functional call, behind a hook, in a module that runs twice. What is not heard shows in the graph: after the forward pass every
path from the outputs back to a parameter that runs through no call that was heard sends the parameter's block the general way
(`Capture.settle`). So nothing is missed, and nothing is written on modules or to ``p.grad``.

Legend: V vectors sent back, N examples, T places where a weight is shared (of all its uses together), I inputs incl. the bias
column, O outputs; R rows and P places as a call has them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from itertools import product as every
from types import TracebackType
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge
from torch.overrides import TorchFunctionMode

from curvlab.errors import CurvlabError
from curvlab.functions import ARRANGEMENTS, COMPOSITE, FUNCTIONS, TRANSPOSITIONS, Call, Rule, arrangements, indexed
from curvlab.layers import Block
from curvlab.linalg.aligned import product, room, second_moment

Reads = Literal["gradient", "rows", "moments", "factors"]
"""Of the batch alone; of each example, which any layer with a rule has; A and G; a, g, h, where all outputs share their inputs
and no use reads the weight in the other direction."""


_MOST = 64  # arrangements of one block's uses that are tried


@dataclass(frozen=True)
class Stored:
    """A tensor as a call saw it, with the version that tells whether somebody has overwritten it since."""

    value: Tensor
    version: int

    @classmethod
    def of(cls, value: Tensor) -> Stored:
        return cls(value.detach(), value._version)

    @property
    def overwritten(self) -> bool:
        return self.value._version != self.version


@dataclass(frozen=True)
class Use:
    """One call that takes a block's weight.

    Args:
        call: its arguments, without a graph.
        edge: where the derivative in its outputs arrives, in the shape `flat`: of the tensor of which the output is a view, so
            that what is written on the view later does not cut it off.
        biased: whether the block's bias is added here.
        swapped: whether the weight is read in the other direction, so that its outputs are the block's inputs.
        inputs: of a rule that has to be called in the pass itself.
        beyond: where the graph goes on behind the call, but for the parameters that the rule accounts for.
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

    @cached_property
    def extent(self) -> tuple[int, int]:
        """(R, P)."""
        rows, places, _ = self.rule.outputs(self.output.value).shape
        return rows, places


class UseInput:
    """The inputs of one use in one forward pass, read when first asked for and shared by every pass back."""

    def __init__(self, use: Use, size: int, how: str, dtype: torch.dtype) -> None:
        self.use, self.size, self.how, self.dtype = use, size, how, dtype

    @property
    def raw(self) -> Tensor:
        """As the call saw them. Raises CurvlabError where a later in-place operation has overwritten them."""
        x = self.use.x
        if x.overwritten:
            raise CurvlabError(OVERWRITTEN.format(self.use.block))
        return x.value.to(self.dtype) if x.value.is_floating_point() else x.value

    @cached_property
    def own(self) -> Float[Tensor, "R P *G I"]:
        """In the call's own rows and places, without the bias column; with an axis Γ where the block has several groups."""
        use = self.use
        found = use.rule.inputs(use.call, self.raw) if use.inputs is None else use.inputs
        return found.to(self.dtype)

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
    def A(self) -> Float[Tensor, "I I"]:
        rows, n = self.bare.flatten(0, 1), len(self.bare)
        if not self.column:
            return second_moment(rows, 1 / n)
        last = rows.shape[1]
        found = room(rows, last + 1, last + 1)  # the column of ones costs nothing, where a copy of patches would
        second_moment(rows, 1 / n, out=found[:last, :last])
        found[last, :last] = found[:last, last] = rows.sum(0) * (self.use.biased / n)
        found[last, last] = self.use.biased * len(rows) / n
        return found


@dataclass(frozen=True)
class Slice:
    """Inputs of some of the examples."""

    a: Float[Tensor, "N T *G I"]


class Part:
    """One use in one pass back: in its own letters, whichever way the block reads it."""

    def __init__(self, block: Block, inputs: UseInput | Slice, g: Float[Tensor, "V R P O"], swapped: bool = False) -> None:
        self.block, self.inputs, self.swapped = block, inputs, swapped
        self.raw_g = g

    @cached_property
    def g(self) -> Float[Tensor, "V N T O"]:
        inputs = self.inputs
        return self.raw_g if isinstance(inputs, Slice) else ARRANGEMENTS[inputs.how](self.raw_g, 1, inputs.size)

    @property
    def a(self) -> Float[Tensor, "N T *G I"]:
        return self.inputs.a

    @property
    def own(self) -> tuple[Rule, Call, UseInput]:
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

    def G(self, scale: float) -> Float[Tensor, "O O"]:
        """scale · Σ g gᵀ, as the block reads it."""
        return second_moment((self.a.flatten(0, 1) if self.swapped else self.g.flatten(0, 2)), scale)

    def rows(self) -> Float[Tensor, "V N O I"]:
        block = self.block
        if block.groups > 1:
            return self._by_group("vntgo,ntgi->vngoi", self.g).flatten(2, 3)
        if self.a.shape[1] == 1 and not self.swapped:
            return self.g[:, :, 0, :, None] * self.a[None, :, 0, None, :]
        if self.swapped:
            return self.wide(torch.einsum("vnto,nti->vnio", self.g, self.a))
        return torch.einsum("vnto,nti->vnoi", self.g, self.a)

    def gradient(self, scale: float) -> Float[Tensor, "O I"]:
        """scale · Σₙ Σ_t g aᵀ, of one vector."""
        block = self.block
        if isinstance(self.inputs, UseInput) and not self.swapped:
            rule, call, inputs = self.own
            if rule.gradient is not None:
                found = rule.gradient(call, inputs.raw, self.raw_g[0])
                if block.biased:
                    ends = self.raw_g[0].sum((0, 1)) if self.biased else found.new_zeros(len(found))
                    found = torch.cat([found, ends[:, None]], 1)
                return found * scale
        if block.groups > 1:
            return self._by_group("ntgo,ntgi->goi", self.g[0]).flatten(0, 1) * scale
        if self.swapped:
            return self.wide(product(self.a.flatten(0, 1).T, self.g[0].flatten(0, 1), scale))
        whole = isinstance(self.inputs, UseInput)
        g = self.g[0].flatten(0, 1)
        if not block.biased or not whole:
            return product(g.T, self.a.flatten(0, 1), scale)
        a = self.own[2].bare.flatten(0, 1)
        found = room(g, *block.shape)
        torch.addmm(found[:, :-1], g.T, a, beta=0, alpha=scale, out=found[:, :-1])
        if self.biased:
            torch.sum(g, 0, out=found[:, -1])
            found[:, -1] *= scale
        else:
            found[:, -1] = 0
        return found

    def weighted(self, h: Float[Tensor, "R P"]) -> Float[Tensor, " I"]:
        """Σ_r Σ_p h a, in the call's own rows and places."""
        rule, call, inputs = self.own
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
        if rule.response is None:
            found = inputs.own @ w
        else:
            found = rule.response(call, inputs.raw, w)
        return found + v[-1] if self.block.biased and self.biased else found

    @property
    def ones(self) -> Float[Tensor, "R P"]:
        return self.raw_g.new_ones(self.raw_g.shape[1:3])

    @property
    def h(self) -> Float[Tensor, "N T O"]:
        rule, _, inputs = self.own
        output = inputs.use.output
        if output.overwritten:
            raise CurvlabError(
                f"{self.block}: its pre-activation was overwritten in place (for example by ReLU(inplace=True)); "
                "use inplace=False to read h"
            )
        return ARRANGEMENTS[inputs.how](rule.outputs(output.value).to(inputs.dtype), 0, inputs.size)

    def some(self, examples: slice | Tensor) -> Part:
        """Of some of the examples."""
        return Part(self.block, Slice(self.a[examples]), self.g[:, examples], self.swapped)

    def _by_group(self, legend: str, g: Tensor) -> Tensor:
        return torch.einsum(legend, g.reshape(*g.shape[:-1], self.block.groups, -1), self.a)


class LayerStatistics:
    """What one pass says of one block: the sum over its uses. All properties are computed once and shared by all who ask.

    A block has parts, one a use; or none where it did not reach the outputs in this pass (`used`); or it goes the general way
    and has a gradient alone (`structured`).

    Scales: `a`, `h`, `g` are per example of the *summed* loss; `A`, `G`, `gradient` carry 1/N (and `G` 1/T).
    """

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
    ) -> None:
        self.block, self.size, self.why = block, size, why
        self.used = used and (parts is None or len(parts) > 0)  # whether the block reached the outputs in this pass
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
        return self.block.groups == 1 and (reads == "moments" or not any(p.swapped for p in self.parts))

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
            lambda p: p.wide(p.g[0]) if p.swapped else p.a, 1, lambda: (self.size, 0, *self._groups, self.block.shape[1])
        )

    @property
    def bare_a(self) -> Float[Tensor, "N T *G I"]:
        """`grouped_a` without the bias column."""
        if len(self.parts) == 1 and not self.parts[0].swapped and isinstance(self.parts[0].inputs, UseInput):
            return self.parts[0].inputs.bare
        return self.grouped_a[..., :-1] if self.block.biased else self.grouped_a

    @property
    def _groups(self) -> tuple[int, ...]:
        return (self.block.groups,) if self.block.groups > 1 else ()

    def _one_group(self, thing: str) -> None:
        if self.structured and self.block.groups > 1:
            raise CurvlabError(f"{self.block} has {self.block.groups} groups of outputs, so there are no {thing}: use rows")

    def _joined(self, of: Callable[[Part], Tensor], axis: int, none: Callable[[], tuple[int, ...]]) -> Tensor:
        """Of all uses, place after place."""
        parts = self.parts
        if any(p.swapped for p in parts) and self._vectors > 1:
            raise CurvlabError(
                f"{self.block} is read in both directions, so that its inputs differ from vector to vector: use rows"
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
            lambda p: p.a[None] if p.swapped else p.g, 2, lambda: (self._vectors, self.size, 0, self.block.shape[0])
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
        """Pre-activation. Raises CurvlabError where a later in-place operation has overwritten it."""
        return self._joined(lambda p: p.h, 1, lambda: (self.size, 0, self.block.shape[0]))

    @cached_property
    def A(self) -> Float[Tensor, "I I"]:
        """Σ_t a aᵀ, mean over examples (Alg. 12, line 14: Ω); over the union of places where the weight has several uses."""
        self._one_group("second moments of one input")
        return self._summed(lambda p: p.A, lambda: (self.block.shape[1],) * 2)

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
        return self._summed(lambda p: p.weighted(p.ones), lambda: (self.block.shape[1],)) / (self.size * max(1, self.places))

    def second_moment_product(self, v: Float[Tensor, " I"]) -> Float[Tensor, " I"]:
        """A v = E_n Σ_t (aᵀv) a without A, and in a convolution without patches: thesis (3.15)."""
        self._one_group("inputs for all outputs")
        return self._summed(lambda p: p.weighted(p.response(v)), lambda: (self.block.shape[1],)) / self.size

    @cached_property
    def G(self) -> Float[Tensor, "O O"]:
        """Σ_v g gᵀ, mean over examples and places (Alg. 12, line 14: Γ, as a mean of outer products, see practice)."""
        scale = 1 / (self.size * max(1, self.places))
        return self._summed(lambda p: p.G(scale), lambda: (self.block.shape[0],) * 2)

    @cached_property
    def gradient(self) -> Tensor:
        """Of the *mean* loss, in the block's shape; defined where one vector was sent back."""
        if self._gradient is not None:
            return self._gradient
        if self._parts is None or self._vectors != 1:
            raise CurvlabError(f"{self.block}: a gradient needs a pass that sends one vector back, not the exact one")
        return self._summed(lambda p: p.gradient(1 / self.size), lambda: self.block.shape)

    @cached_property
    def rows(self) -> Float[Tensor, "V N *O I"]:
        """Per-sample gradients (of the sum over places and uses), one for every vector sent back."""
        return self._summed(lambda p: p.rows(), lambda: (self._vectors, self.size, *self.block.shape))

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
        count = len(range(*examples.indices(self.size))) if isinstance(examples, slice) else len(examples)
        return LayerStatistics(self.block, count, parts=parts, like=self._like, vectors=self._vectors)


class _Listener(TorchFunctionMode):
    """Tells a capture of every call that the tables know."""

    def __init__(self, capture: Capture) -> None:
        super().__init__()
        self.capture = capture

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        rule = FUNCTIONS.get(func)
        if rule is not None:
            output = func(*args, **kwargs)
            self.capture.trace = hash((self.capture.trace, func, output.shape))
            self.capture._hear(rule, args, kwargs, output)
            return output
        opened = COMPOSITE.get(func)
        if opened is not None:
            with self:
                return opened(*args, **kwargs)
        if "generator" in kwargs:
            self.capture._draws(kwargs["generator"])
        output = func(*args, **kwargs)
        if isinstance(output, Tensor):
            self.capture.trace = hash((self.capture.trace, func, output.shape, *[a for a in args[1:] if type(a) is int]))
        if func in TRANSPOSITIONS:
            self.capture._turned(args, output)
        elif not self.capture.reorders and indexed(func, args):
            self.capture.reorders = True
        return output


class Capture:
    """Hears every call of the blocks' weights during one forward pass; then goes back any number of times.

    >>> with Capture(model, blocks) as capture:
    ...     z = model(x)
    >>> statistics = capture.backward(z, vectors)

    Args:
        dtype: of all statistics; the weights' own where None.
        parameters: {name: parameter} of the blocks; looked up in the model where None.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Sequence[Block],
        dtype: torch.dtype | None = None,
        parameters: Mapping[str, nn.Parameter] | None = None,
    ) -> None:
        self.model, self.blocks, self.dtype, self._given = model, tuple(blocks), dtype, parameters
        self._listener: _Listener | None = None
        self._clear()

    def _clear(self) -> None:
        self.uses: dict[str, list[Use]] = {}
        self.general: dict[str, str] = {}  # {block: why it goes the general way}
        self.arranged: dict[str, tuple[str, ...]] = {}  # {block: the arrangement of each use}
        self.silent: set[str] = set()  # blocks with a call without gradients
        self.frozen: set[str] = set()  # blocks that are not trained any more
        self.trace = 0  # of the calls that ran, and their outputs' shapes
        self.reorders = False  # whether rows were taken by the numbers of a tensor
        self._void: dict[Node, tuple[Node, ...]] = {}  # calls with no row: {their output: what lies beyond}
        self.generators: dict[torch.Generator, Tensor] = {}  # of the model's own, with their states before it drew
        self.unproven: dict[str, tuple[int, ...]] = {}  # {block: uses whose derivatives were all zero when it was examined}
        self.prove: Callable[[], None] | None = None  # examine again
        self._inputs: dict[int, UseInput] = {}
        self._size: int | None = None

    def __enter__(self) -> Capture:
        self._clear()
        found = (
            {name: self.model.get_parameter(name) for b in self.blocks for name in b.params}
            if self._given is None
            else self._given
        )
        self.parameters: Mapping[str, nn.Parameter] = found
        self._owner = {id(self.parameters[name]): b for b in self.blocks for name in b.params}
        self._weights = {id(self.parameters[b.params[0]]): (b, False) for b in self.blocks}
        self._kept: list[Tensor] = []  # transposed weights, so that their ids stay theirs
        self._listener = _Listener(self)
        self._listener.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        assert self._listener is not None
        self._listener.__exit__(kind, error, trace)
        self._listener = None
        self._kept.clear()
        self.trace = hash((self.trace, *((name, len(uses)) for name, uses in self.uses.items())))

    # ------------------------------------------------------------------------------------------ in the forward pass

    def _hear(self, rule: Rule, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        call = rule.bind(args, kwargs)
        block, turned = self._weights.get(id(call.weight), (None, False))
        if block is None:
            return
        if not output.requires_grad:
            self.silent.add(block.name)
            return
        layer = block.layer
        if layer is None or not rule.covers(call) or rule.groups(call) != block.groups:
            return
        swapped = (rule.transposed != turned) != layer.transposed
        if (swapped or turned) and (block.groups > 1 or call.weight.ndim != 2):
            return
        bias = self.parameters[block.params[1]] if block.biased else None
        biased = bias is not None and call.bias is bias and not swapped
        accounted = {id(call.weight)} | ({id(bias)} if biased else set())
        beyond = [t for t in [*args, *kwargs.values()] if isinstance(t, Tensor) and t.requires_grad and id(t) not in accounted]
        if call.input is call.weight:
            beyond.append(call.input)
        x = call.input
        call.input, call.weight, call.bias = None, call.weight.detach(), None
        inputs = rule.inputs(call, x.detach()) if rule.stateful else None
        edge, flat = _edge(output)
        behind = tuple(get_gradient_edge(t).node for t in beyond)
        if not output.numel():
            self._void[edge.node] = behind
            return
        use = Use(block, rule, call, Stored.of(x), Stored.of(output), edge, flat, biased, swapped, inputs, behind)
        self.uses.setdefault(block.name, []).append(use)

    def _turned(self, args: tuple[Any, ...], output: Any) -> None:
        """A weight that is read in the other direction."""
        known = self._weights.get(id(args[0])) if args else None
        if known is None or not isinstance(output, Tensor) or args[0].ndim != 2 or len({d % 2 for d in args[1:]}) == 1:
            return
        self._kept.append(output)
        self._weights[id(output)] = known[0], not known[1]

    def _draws(self, generator: Any) -> None:
        if isinstance(generator, torch.Generator) and generator not in self.generators:
            self.generators[generator] = generator.get_state()

    # ------------------------------------------------------------------------------------------ after it

    def settle(self, z: Tensor, size: int | None = None) -> None:
        """Which blocks go the general way, and which arrangement their shapes allow, once the outputs are there.

        Args:
            z: outputs, or losses, of N examples, with their graph.
        """
        size = len(z) if size is None else size
        if self._size == size:
            return
        self._size = size
        missed, opaque = self._missed(z)
        for name, block in ((b.name, b) for b in self.blocks):
            trained = [self.parameters[param].requires_grad for param in block.params]
            if not any(trained):
                self.frozen.add(name)
                self.uses.pop(name, None)
            if not any(trained) and block.layer is not None:
                self.arranged[name] = ()
            elif not all(trained) and any(trained):
                self.general[name] = "was frozen in part since the objective was made"
            elif block.layer is None:
                self.general[name] = "belongs to a layer without a rule"
            elif name in missed:
                self.general[name] = "is used by a call without a rule"
            else:
                ways = [arrangements(*use.extent, size) for use in self.uses.get(name, ())]
                if all(ways):
                    self.arranged[name] = tuple(way[0] for way in ways)
                else:
                    bad = next(use for use, way in zip(self.uses[name], ways, strict=True) if not way)
                    self.general[name] = f"saw {bad.extent[0]} rows in a batch of {size}"
        for block in self.blocks:
            name = block.name
            if name in self.silent and name not in self.uses and name not in missed and name not in self.frozen:
                raise CurvlabError(f"{block} ran without gradients: remove torch.no_grad() around it, or freeze it{opaque}")

    def _missed(self, z: Tensor) -> tuple[set[str], str]:
        """Blocks with a parameter to which a path from z runs through no call that was heard; and a hint where the graph hides
        some."""
        heard = {use.edge.node: use.beyond for uses in self.uses.values() for use in uses} | self._void
        if z.grad_fn is None:
            raise CurvlabError("the model's outputs do not depend on a trainable parameter: no graph leads from them to one")
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
        """Arrangements of a block's uses that their shapes allow, the usual one first; uses of one extent are alike."""
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
                found[name] = sum(rows * places for rows, places in (use.extent for use in uses)) // self._size
        return found

    def _input(self, use: Use, size: int, how: str) -> UseInput:
        key = id(use)
        if key not in self._inputs or self._inputs[key].how != how:
            dtype = self.dtype or use.call.weight.dtype
            self._inputs[key] = UseInput(use, size, how, dtype)
        return self._inputs[key]

    def only(self, block: Block) -> Use:
        """The one use of a block whose examples are its rows. Raises CurvlabError where there is no such thing."""
        uses = self.uses.get(block.name, [])
        if self.arranged.get(block.name) != ("first",) or uses[0].swapped:
            raise CurvlabError(f"{block} {self.general.get(block.name, 'is used more than once')}: no single pre-activation")
        return uses[0]

    def statistics(self, name: str, size: int) -> LayerStatistics:
        """The inputs of one block with a single use, no pass back."""
        block = next(b for b in self.blocks if b.name == name)
        use = self.only(block)
        none = use.output.value.new_zeros(0)
        return LayerStatistics(block, size, parts=[Part(block, self._input(use, size, "first"), none)], like=none)

    def backward(self, z: Tensor, vectors: Float[Tensor, "V N *C"], leaves: bool = False) -> dict[str, LayerStatistics]:
        """Send `vectors` back from the outputs `z`; the graph is kept, so this can be called again.

        Args:
            z: outputs of the forward pass, [N, *C].
            vectors: V vectors of the shape of z, for example ∂ℓₙ/∂z of the summed loss.
            leaves: also give the gradient of blocks that go the general way (only where V is 1).

        Returns:
            {block name: LayerStatistics} in the order of the blocks; those that go the general way only with `leaves`.
        """
        size, count = len(z), len(vectors)
        self.settle(z)
        heard = [
            (use, how) for name, ways in self.arranged.items() for use, how in zip(self.uses.get(name, ()), ways, strict=True)
        ]
        loose = [b for b in self.blocks if b.name in self.general] if leaves and count == 1 else []
        named = [name for b in loose for name in b.params if self.parameters[name].requires_grad]
        targets: list[Any] = [use.edge for use, _ in heard] + [self.parameters[name] for name in named]
        grads = send_back(z, targets, vectors) if targets else []
        parts: dict[str, list[Part]] = {name: [] for name in self.arranged}
        for (use, how), d in zip(heard, grads, strict=False):
            if d is not None:
                dtype = self.dtype or use.call.weight.dtype
                d = d.reshape(count * use.output.value.shape[0], *use.output.value.shape[1:])
                g = use.rule.outputs(d).to(dtype)
                g = g.view(count, -1, *g.shape[1:])
                parts[use.block.name].append(Part(use.block, self._input(use, size, how), g, use.swapped))
        unseen = {
            id(self.uses[name][i]) for name, some in self.unproven.items() for i in some if i < len(self.uses.get(name, ()))
        }
        if self.prove is not None and any(
            d is not None and id(use) in unseen and bool(d.any()) for (use, _), d in zip(heard, grads, strict=False)
        ):
            prove, self.prove = self.prove, None
            prove()
            return self.backward(z, vectors, leaves)
        of_leaf = {name: d if d is None else d[0] for name, d in zip(named, grads[len(heard) :], strict=True)}
        found = dict[str, LayerStatistics]()
        for block in self.blocks:
            weight = self.parameters[block.params[0]]
            like = weight.detach() if self.dtype is None else weight.new_empty(0, dtype=self.dtype)
            if block.name in parts:
                found[block.name] = LayerStatistics(block, size, parts=parts[block.name], like=like, vectors=count)
            elif block.name in self.general and leaves and count == 1:
                each = {name: self._dense(of_leaf.get(name), name, size) for name in block.params}
                unused = all(of_leaf.get(name) is None for name in block.params)
                why = self.general[block.name]
                found[block.name] = LayerStatistics(
                    block, size, gradient=block.gather(each), like=like, why=why, used=not unused
                )
        return found

    def _dense(self, d: Tensor | None, name: str, size: int) -> Tensor:
        """A parameter's own gradient of the mean."""
        p = self.parameters[name]
        if d is None:
            return torch.zeros_like(p, dtype=self.dtype)
        d = d.to_dense() if d.is_sparse else d
        return d.to(self.dtype or d.dtype) / size


def _edge(output: Tensor) -> tuple[GradientEdge, tuple[int, ...]]:
    """Where the derivative in an output arrives, and its shape there: in-place operations on a view start from its base."""
    base = output._base if output._is_view() else None
    if (
        base is not None
        and base.requires_grad
        and base.numel() == output.numel()
        and base.is_contiguous()
        and output.is_contiguous()
    ):
        return get_gradient_edge(base), tuple(base.shape)
    return get_gradient_edge(output), tuple(output.shape)


OVERWRITTEN = "{}: its input was overwritten in place after it ran; write x = x + … instead of x += …"
_REMEDIES = {
    "use_reentrant=True": "activation checkpointing with use_reentrant=True has no such derivative: use use_reentrant=False",
    "modified by an inplace operation": "a tensor that its derivative needs was overwritten in place: write x = x + … instead of x += …",
    "Inference tensors cannot be saved": "an inference tensor takes part: clone it outside torch.inference_mode()",
}
"""{part of torch's message: what a user does about it}"""


def remedy(error: Exception) -> str | None:
    """What a user does about torch's refusal of a derivative, where we know."""
    return next((told for part, told in _REMEDIES.items() if part in str(error)), None)


def refused(error: Exception, what: str) -> CurvlabError:
    """Torch's refusal of a derivative in one line."""
    first = str(error).splitlines()[0] if str(error) else type(error).__name__
    return CurvlabError(f"torch cannot take {what} of the model: {remedy(error) or first}")


def send_back(z: Tensor, targets: Sequence[Any], vectors: Float[Tensor, "V N *C"]) -> list[Tensor | None]:
    """∂z/∂target applied to every vector, [V, *target], None where a target does not reach z; one by one where an operation has
    no batched derivative."""
    count = len(vectors)
    if count != 1:
        try:
            return list(torch.autograd.grad(z, targets, vectors, retain_graph=True, allow_unused=True, is_grads_batched=True))
        except RuntimeError:
            pass
    try:
        each = [torch.autograd.grad(z, targets, v, retain_graph=True, allow_unused=True) for v in vectors]
    except RuntimeError as error:
        raise refused(error, "the derivative") from error
    if count == 1:
        return [None if d is None else d[None] for d in each[0]]
    return [None if d[0] is None else torch.stack(d) for d in zip(*each, strict=True)]
