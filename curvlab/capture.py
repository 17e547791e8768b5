"""Capture: the one place with hooks. One forward, then as many backward passes as are needed through the same graph.

Hooks live only inside ``with``; nothing is written on modules or to ``p.grad``.

Legend: V vectors sent back, N examples, T places where a weight is shared, I inputs incl. the bias column, O outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from types import TracebackType
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils.hooks import RemovableHandle

from curvlab.errors import CurvlabError
from curvlab.layers import Block


class LayerInput:
    """The inputs of one block in one forward pass, shared by every pass back: nobody computes A twice."""

    def __init__(self, a: Float[Tensor, "N T I"]) -> None:
        self.a = a

    @cached_property
    def A(self) -> Float[Tensor, "I I"]:
        a = self.a.flatten(0, 1)
        return a.T @ a / len(self.a)


class LayerStatistics:
    """What one pass says of one block. All properties are computed once and shared by all who ask.

    Scales: `a`, `h`, `g` are per example of the *summed* loss; `A`, `G`, `gradient` carry 1/N (and `G` 1/T).
    """

    def __init__(
        self,
        block: Block,
        size: int,
        gradient: Tensor | None = None,
        inputs: LayerInput | None = None,
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
        inputs: LayerInput = self._need(self._inputs)
        return inputs.a

    @property
    def g(self) -> Float[Tensor, "V N T O"]:
        """∂ℓₙ/∂h per example: of the sum, never of the mean."""
        g: Tensor = self._need(self._g)
        return g

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
        inputs: LayerInput = self._need(self._inputs)
        return inputs.A

    @cached_property
    def G(self) -> Float[Tensor, "O O"]:
        """Σ_v g gᵀ, mean over examples and places (Alg. 12, line 14: Γ, as a mean of outer products, see practice)."""
        g = self.g.flatten(0, 2)
        return g.T @ g / (self.size * self.g.shape[2])

    @cached_property
    def gradient(self) -> Tensor:
        """Of the *mean* loss, in the block's shape; defined where one vector was sent back."""
        if self._gradient is not None:
            return self._gradient
        if self._g is None or len(self._g) != 1:
            raise CurvlabError(f"{self.block}: a gradient needs a pass that sends one vector back, not the exact one")
        return self.g[0].flatten(0, 1).T @ self.a.flatten(0, 1) / self.size

    @cached_property
    def rows(self) -> Float[Tensor, "V N O I"]:
        """Per-sample gradients (of the sum over places), one for every vector sent back."""
        if self.a.shape[1] == 1:
            return self.g[:, :, 0, :, None] * self.a[None, :, 0, None, :]
        return torch.einsum("vnto,nti->vnoi", self.g, self.a)


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
            self._records[block.name] = _Record(_Stored.of(x), _Stored.of(output), get_gradient_edge(output))

        return hook

    def _input(self, block: Block, size: int) -> LayerInput:
        if block.name not in self._inputs:
            assert block.module is not None
            assert block.rule is not None
            x = self._records[block.name].x
            if x.overwritten:
                raise CurvlabError(
                    f"{block}: its input was overwritten in place after it ran; write x = x + … instead of x += …"
                )
            a = block.rule.inputs(block.module, x.value)
            if len(a) != size:
                raise CurvlabError(
                    f"{block} saw {len(a)} rows in a batch of {size}: keep the batch as the first axis of every layer's input"
                )
            if block.biased:
                a = torch.cat([a, a.new_ones(*a.shape[:2], 1)], 2)
            self._inputs[block.name] = LayerInput(a)
        return self._inputs[block.name]

    def backward(self, z: Tensor, vectors: Float[Tensor, "V N *C"], leaves: bool = False) -> dict[str, LayerStatistics]:
        """Send `vectors` back from the outputs `z`; the graph is kept, so this can be called again.

        Args:
            z: outputs of the forward pass, [N, *C].
            vectors: V vectors of the shape of z, for example ∂ℓₙ/∂z of the summed loss.
            leaves: also give the gradient of blocks without a rule (only where V is 1).

        Returns:
            {block name: LayerStatistics}; blocks without a rule only with `leaves`.
        """
        ruled = [b for b in self.blocks if b.module is not None]
        loose = [b for b in self.blocks if b.module is None] if leaves and len(vectors) == 1 else []
        missing = [b for b in ruled if b.name not in self._records]
        if missing:
            raise CurvlabError(f"{missing[0]} did not run in the forward pass: freeze it or use it")
        targets = [self._records[b.name].edge for b in ruled]
        targets += [self.model.get_parameter(b.params[0]) for b in loose]  # type: ignore[misc]  # edges and tensors mix
        if len(vectors) == 1:
            found = torch.autograd.grad(z, targets, vectors[0], retain_graph=True, allow_unused=True)
            grads = [None if d is None else d[None] for d in found]
        else:
            found = torch.autograd.grad(z, targets, vectors, retain_graph=True, allow_unused=True, is_grads_batched=True)
            grads = list(found)
        unused = [b for b, d in zip([*ruled, *loose], grads, strict=True) if d is None]
        if unused:
            raise CurvlabError(f"{unused[0]} does not reach the model's outputs: freeze it or use it")

        statistics: dict[str, LayerStatistics] = {}
        for block, d in zip([*ruled, *loose], grads, strict=True):
            assert d is not None
            if block.rule is None:
                statistics[block.name] = LayerStatistics(block, len(z), gradient=d[0] / len(z))
                continue
            outputs = block.rule.outputs
            g = torch.stack([outputs(v) for v in d]) if len(d) > 1 else outputs(d[0])[None]
            record = self._records[block.name]
            statistics[block.name] = LayerStatistics(
                block, len(z), inputs=self._input(block, len(z)), g=g, output=record.output
            )
        return statistics
