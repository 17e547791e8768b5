"""Capture: the one place with hooks. One forward, then as many backward passes as are needed through the same graph.

Hooks live only inside ``with``; nothing is written on modules or to ``p.grad``.

Legend: V vectors sent back, N examples, T places where a weight is shared, I inputs incl. the bias column, O outputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import TracebackType
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils.hooks import RemovableHandle

from curvlab.errors import CurvlabError
from curvlab.layers import Block, Rule
from curvlab.linalg.aligned import product, room, second_moment


class LayerInput:
    """The inputs of one block in one forward pass, read when first asked for and shared by every pass back."""

    def __init__(self, block: Block, record: _Record) -> None:
        self._block, self._record = block, record

    @property
    def raw(self) -> Tensor:
        """As the layer saw them. Raises CurvlabError where a later in-place operation has overwritten them."""
        if self._record.x.overwritten:
            raise CurvlabError(
                f"{self._block}: its input was overwritten in place after it ran; write x = x + … instead of x += …"
            )
        return self._record.x.value

    @cached_property
    def bare(self) -> Float[Tensor, "N T *G I"]:
        """Without the bias column; with an axis Γ where the block has several groups."""
        block, a = self._block, self._record.inputs
        assert block.rule is not None
        return block.rule.inputs(block.module, self.raw) if a is None else a

    @cached_property
    def a(self) -> Float[Tensor, "N T *G I"]:
        """With the bias column, if there is a bias."""
        return torch.cat([self.bare, self.bare.new_ones(*self.bare.shape[:-1], 1)], -1) if self._block.biased else self.bare

    @cached_property
    def A(self) -> Float[Tensor, "I I"]:
        rows, n = self.bare.flatten(0, 1), len(self.bare)
        if not self._block.biased:
            return second_moment(rows, 1 / n)
        last = rows.shape[1]
        found = room(rows, last + 1, last + 1)  # the column of ones costs nothing, where a copy of patches would
        second_moment(rows, 1 / n, out=found[:last, :last])
        found[last, :last] = found[:last, last] = rows.sum(0) / n
        found[last, last] = len(rows) / n
        return found


@dataclass(frozen=True)
class _Slice:
    """Inputs of some of the examples."""

    a: Float[Tensor, "N T *G I"]


class LayerStatistics:
    """What one pass says of one block. All properties are computed once and shared by all who ask.

    Scales: `a`, `h`, `g` are per example of the *summed* loss; `A`, `G`, `gradient` carry 1/N (and `G` 1/T).
    """

    def __init__(
        self,
        block: Block,
        size: int,
        gradient: Tensor | None = None,
        inputs: LayerInput | _Slice | None = None,
        g: Float[Tensor, "V N T O"] | None = None,
        output: _Stored | None = None,
    ) -> None:
        self.block, self.size = block, size
        self._gradient, self._inputs, self._g, self._output = gradient, inputs, g, output

    def _need(self, thing: Any) -> Any:
        if thing is None:
            raise CurvlabError(f"{self.block} belongs to a layer without a rule: it has a gradient but no a, h, g")
        return thing

    @property
    def a(self) -> Float[Tensor, "N T I"]:
        """Input of the layer, 1 appended where the bias is trained."""
        self._one_group("inputs for all outputs")
        return self.grouped_a

    @property
    def grouped_a(self) -> Float[Tensor, "N T *G I"]:
        """The same with an axis Γ where the outputs lie in several groups."""
        inputs: LayerInput = self._need(self._inputs)
        return inputs.a

    @property
    def bare_a(self) -> Float[Tensor, "N T *G I"]:
        """`grouped_a` without the bias column."""
        inputs = self._need(self._inputs)
        if isinstance(inputs, LayerInput):
            return inputs.bare
        return self.grouped_a[..., :-1] if self.block.biased else self.grouped_a

    def _one_group(self, thing: str) -> None:
        if self.block.groups > 1:
            raise CurvlabError(f"{self.block} has {self.block.groups} groups of outputs, so there are no {thing}: use rows")

    @property
    def g(self) -> Float[Tensor, "V N T O"]:
        """∂ℓₙ/∂h per example: of the sum, never of the mean."""
        g: Tensor = self._need(self._g)
        return g

    @property
    def raw(self) -> Float[Tensor, "N *M"]:
        """The layer's output as it left it; only its shape may be relied on where a later operation has overwritten it."""
        output: _Stored = self._need(self._output)
        return output.value

    @property
    def h(self) -> Float[Tensor, "N T O"]:
        """Pre-activation. Raises CurvlabError where a later in-place operation has overwritten it."""
        output: _Stored = self._need(self._output)
        if output.overwritten:
            raise CurvlabError(
                f"{self.block}: its pre-activation was overwritten in place (for example by ReLU(inplace=True)); "
                "use inplace=False to read h"
            )
        assert self.block.rule is not None
        return self.block.rule.outputs(output.value)

    @property
    def A(self) -> Float[Tensor, "I I"]:
        """Σ_t a aᵀ, mean over examples (Alg. 12, line 14: Ω)."""
        self._one_group("second moments of one input")
        inputs: LayerInput = self._need(self._inputs)
        return inputs.A

    @cached_property
    def mean_a(self) -> Float[Tensor, " I"]:
        """Of `a`, over examples and places."""
        places = self.g.shape[2]
        return self._weighted(self.g.new_ones(self.size, places)) / places

    def second_moment_product(self, v: Float[Tensor, " I"]) -> Float[Tensor, " I"]:
        """A v = E_n Σ_t (aᵀv) a without A, and in a convolution without patches: thesis (3.15)."""
        rule, inputs = self._own_inputs()
        w = v[:-1] if self.block.biased else v
        response = inputs.bare @ w if rule.response is None else rule.response(self.block.module, inputs.raw, w)
        return self._weighted(response + v[-1] if self.block.biased else response)

    def _weighted(self, h: Float[Tensor, "N T"]) -> Float[Tensor, " I"]:
        """E_n Σ_t h a."""
        rule, inputs = self._own_inputs()
        if rule.response is None or rule.gradient is None:
            found = inputs.bare.flatten(0, 1).mT @ h.flatten()
        else:
            found = rule.gradient(self.block.module, inputs.raw, h[..., None])[0]
        return (torch.cat([found, h.sum()[None]]) if self.block.biased else found) / self.size

    def _own_inputs(self) -> tuple[Rule, LayerInput]:
        self._one_group("inputs for all outputs")
        assert isinstance(self._inputs, LayerInput)
        assert self.block.rule is not None
        return self.block.rule, self._inputs

    @cached_property
    def G(self) -> Float[Tensor, "O O"]:
        """Σ_v g gᵀ, mean over examples and places (Alg. 12, line 14: Γ, as a mean of outer products, see practice)."""
        return second_moment(self.g.flatten(0, 2), 1 / (self.size * self.g.shape[2]))

    @cached_property
    def gradient(self) -> Tensor:
        """Of the *mean* loss, in the block's shape; defined where one vector was sent back."""
        if self._gradient is not None:
            return self._gradient
        if self._g is None or len(self._g) != 1:
            raise CurvlabError(f"{self.block}: a gradient needs a pass that sends one vector back, not the exact one")
        own = None if self.block.rule is None else self.block.rule.gradient
        if own is not None and isinstance(self._inputs, LayerInput):
            found = own(self.block.module, self._inputs.raw, self.g[0])
            return (torch.cat([found, self.g[0].sum((0, 1))[:, None]], 1) if self.block.biased else found) / self.size
        if self.block.groups > 1:
            return self._by_group("ntgo,ntgi->goi", self.g[0]).flatten(0, 1) / self.size
        g, a = self.g[0].flatten(0, 1), self.bare_a.flatten(0, 1)
        if not self.block.biased:
            return product(g.T, a, 1 / self.size)
        found = room(g, *self.block.shape)
        torch.addmm(found[:, :-1], g.T, a, beta=0, alpha=1 / self.size, out=found[:, :-1])
        torch.sum(g, 0, out=found[:, -1])
        found[:, -1] /= self.size
        return found

    @cached_property
    def rows(self) -> Float[Tensor, "V N O I"]:
        """Per-sample gradients (of the sum over places), one for every vector sent back."""
        if self.block.groups > 1:
            return self._by_group("vntgo,ntgi->vngoi", self.g).flatten(2, 3)
        if self.a.shape[1] == 1:
            return self.g[:, :, 0, :, None] * self.a[None, :, 0, None, :]
        return torch.einsum("vnto,nti->vnoi", self.g, self.a)

    def some_rows(self, at_once: int) -> Iterator[Float[Tensor, "R D"]]:
        """The rows flattened, about `at_once` at a time: whole examples with all their vectors."""
        step = max(1, at_once // len(self.g))
        for start in range(0, self.size, step):
            part = slice(start, start + step)
            some = LayerStatistics(self.block, self.size, g=self.g[:, part], inputs=_Slice(self.grouped_a[part]))
            yield some.rows.flatten(2).flatten(0, 1)

    def part(self, indices: Int[Tensor, " n"]) -> LayerStatistics:
        """Of some of the examples: their a and g."""
        return LayerStatistics(self.block, len(indices), g=self.g[:, indices], inputs=_Slice(self.grouped_a[indices]))

    def _by_group(self, legend: str, g: Tensor) -> Tensor:
        return torch.einsum(legend, g.reshape(*g.shape[:-1], self.block.groups, -1), self.grouped_a)


@dataclass(frozen=True)
class _Stored:
    """A tensor as a layer saw it, with the version that tells whether somebody has overwritten it since."""

    value: Tensor
    version: int

    @classmethod
    def of(cls, value: Tensor) -> _Stored:
        return cls(value.detach(), value._version)

    @property
    def overwritten(self) -> bool:
        return self.value._version != self.version


@dataclass(frozen=True)
class _Record:
    x: _Stored
    output: _Stored
    edge: GradientEdge
    inputs: Tensor | None  # of a rule that has to be called in the pass itself


class Capture:
    """Stores inputs and gradient edges of every block's layer during one forward pass; then goes back any number of times.

    >>> with Capture(model, blocks) as capture:
    ...     z = model(x)
    >>> statistics = capture.backward(z, vectors)
    """

    def __init__(self, model: nn.Module, blocks: Sequence[Block]) -> None:
        self.model, self.blocks = model, tuple(blocks)
        self._records: dict[str, _Record] = {}
        self._inputs: dict[str, LayerInput] = {}
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> Capture:
        self._records.clear()
        self._inputs.clear()
        for block in self.blocks:
            if block.module is not None:
                hook = self._hook(block)
                self._handles.append(block.module.register_forward_hook(hook, with_kwargs=True))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _hook(self, block: Block) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
            if block.name in self._records:
                raise CurvlabError(
                    f"{block} ran twice in one forward pass: a reused module has no single input; give each use its own module"
                )
            if not output.requires_grad:
                raise CurvlabError(f"{block} ran without gradients: remove torch.no_grad() around it, or freeze it")
            x = args[0] if args else next(iter(kwargs.values()))
            assert block.rule is not None
            inputs = block.rule.inputs(module, x.detach()) if block.rule.stateful else None
            self._records[block.name] = _Record(_Stored.of(x), _Stored.of(output), get_gradient_edge(output), inputs)

        return hook

    def _input(self, block: Block, size: int) -> LayerInput:
        if block.name not in self._inputs:
            record = self._records[block.name]
            rows = len(record.output.value)
            if rows != size:
                raise CurvlabError(
                    f"{block} saw {rows} rows in a batch of {size}: keep the batch as the first axis of every layer's input"
                )
            self._inputs[block.name] = LayerInput(block, record)
        return self._inputs[block.name]

    def places(self) -> dict[str, int]:
        """T of every block with a rule."""
        return {
            b.name: b.rule.outputs(self._records[b.name].output.value).shape[1]
            for b in self.blocks
            if b.rule is not None and b.name in self._records
        }

    def statistics(self, name: str, size: int) -> LayerStatistics:
        """The inputs of one block with a rule, no pass back."""
        block = next(b for b in self.blocks if b.name == name)
        self.edge(block)
        return LayerStatistics(block, size, inputs=self._input(block, size), output=self._records[name].output)

    def edge(self, block: Block) -> GradientEdge:
        """Where the derivative in the block's pre-activation arrives. Raises CurvlabError where the block did not run."""
        if block.name not in self._records:
            raise CurvlabError(f"{block} did not run in the forward pass: freeze it or use it")
        return self._records[block.name].edge

    def backward(self, z: Tensor, vectors: Float[Tensor, "V N *C"], leaves: bool = False) -> dict[str, LayerStatistics]:
        """Send `vectors` back from the outputs `z`; the graph is kept, so this can be called again.

        Args:
            z: outputs of the forward pass, [N, *C].
            vectors: V vectors of the shape of z, for example ∂ℓₙ/∂z of the summed loss.
            leaves: also give the gradient of blocks without a rule (only where V is 1).

        Returns:
            {block name: LayerStatistics} in the order of the blocks; those without a rule only with `leaves`.
        """
        ruled = [b for b in self.blocks if b.module is not None]
        loose = [b for b in self.blocks if b.module is None] if leaves and len(vectors) == 1 else []
        targets = [self.edge(b) for b in ruled]
        targets += [self.model.get_parameter(b.params[0]) for b in loose]  # type: ignore[misc]  # edges and tensors mix
        if not targets:
            return {}
        batched = len(vectors) != 1
        sent = vectors if batched else vectors[0]
        grads = torch.autograd.grad(z, targets, sent, retain_graph=True, allow_unused=True, is_grads_batched=batched)
        unused = [b for b, d in zip([*ruled, *loose], grads, strict=True) if d is None]
        if unused:
            raise CurvlabError(f"{unused[0]} does not reach the model's outputs: freeze it or use it")

        size, statistics = len(z), dict[str, LayerStatistics]()
        for block, d in zip([*ruled, *loose], grads, strict=True):
            assert d is not None
            if block.rule is None:
                statistics[block.name] = LayerStatistics(block, size, gradient=d / size)
                continue
            inputs = self._input(block, size)
            g = block.rule.outputs(d.flatten(0, 1) if batched else d)
            g = g.view(len(vectors), size, *g.shape[1:])
            record = self._records[block.name]
            statistics[block.name] = LayerStatistics(block, size, inputs=inputs, g=g, output=record.output)
        return {b.name: statistics[b.name] for b in self.blocks if b.name in statistics}
