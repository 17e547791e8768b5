"""The reference of the tests of layers and wirings: `torch.autograd` alone, one example at a time;
no curvlab, no torch.func.

Legend: N examples, C outputs of the model (flattened). Tensors of several examples or outputs have
    those axes first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Protocol

import torch
import torch.nn.functional as F
from oracle import total
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

Named = dict[str, Tensor]
"""{parameter: tensor}, one name a parameter: the first."""


class Laid(Protocol):
    """What a block has to tell: which parameters it holds, and how they lie in it."""

    def gather(self, tensors: Mapping[str, Tensor], batch: int = 0) -> Tensor: ...

    def scatter(self, value: Tensor, batch: int = 0) -> Named: ...


def summed(z: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy of each example."""
    return F.cross_entropy(z, y, reduction="none")


@contextmanager
def twice_differentiable() -> Iterator[None]:
    """Attention by plain operations: its fused ones have no second derivatives."""
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)


class Plain:
    """One model on one minibatch, `loss(z, y)` one number an example."""

    def __init__(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        loss: Callable[[Tensor, Tensor], Tensor] = summed,
    ) -> None:
        self.model, self.x, self.y, self.loss = model, x, y, loss
        self.weights = {name: p for name, p in model.named_parameters() if p.requires_grad}

    def _derivatives(self, value: Tensor, again: bool = False) -> Named:
        """∂value, zero in what it does not depend on."""
        if not value.requires_grad:
            return {name: torch.zeros_like(w) for name, w in self.weights.items()}
        found = torch.autograd.grad(
            value,
            list(self.weights.values()),
            create_graph=again,
            retain_graph=True,
            allow_unused=True,
        )
        return {
            name: torch.zeros_like(w) if d is None else d.to_dense() if d.is_sparse else d
            for (name, w), d in zip(self.weights.items(), found, strict=True)
        }

    @cached_property
    def mean_gradient(self) -> Named:
        """Of the mean loss of the whole minibatch, in one run."""
        with twice_differentiable():
            return self._derivatives(self.loss(self.model(self.x), self.y).mean())

    @cached_property
    def outputs(self) -> list[Tensor]:
        """[1, …] of each example, run alone, with its graph."""
        with twice_differentiable():
            return [self.model(self.x[n : n + 1]) for n in range(len(self.x))]

    def _losses(self, outputs: Sequence[Tensor]) -> list[Tensor]:
        return [self.loss(z, self.y[n : n + 1])[0] for n, z in enumerate(outputs)]

    @cached_property
    def gradients(self) -> Named:
        """Of each example's loss: [N, …]."""
        return _stacked([self._derivatives(loss) for loss in self._losses(self.outputs)])

    @cached_property
    def jacobians(self) -> Named:
        """Of each example's outputs: [N, C, …]."""
        return _stacked(
            [_stacked([self._derivatives(value) for value in z.flatten()]) for z in self.outputs]
        )

    @cached_property
    def output_hessians(self) -> Tensor:
        """∂²ℓₙ/∂z²: [N, C, C]."""
        leaves = [z.detach().requires_grad_() for z in self.outputs]
        found = []
        for z, loss in zip(leaves, self._losses(leaves), strict=True):
            (slope,) = torch.autograd.grad(loss, z, create_graph=True)
            rows = [
                torch.autograd.grad(s, z, retain_graph=True)[0].flatten() for s in slope.flatten()
            ]
            found.append(torch.stack(rows))
        return torch.stack(found)

    @cached_property
    def _slopes(self) -> list[Named]:
        """∂ℓₙ of each example, with its graph."""
        return [self._derivatives(loss, again=True) for loss in self._losses(self.outputs)]

    def hessian_product(self, vector: Mapping[str, Tensor]) -> Named:
        """Mean over examples of ∂²ℓₙ times one vector; parameters that are not named have zero in
        it.
        """
        found = {name: torch.zeros_like(w) for name, w in self.weights.items()}
        for slopes in self._slopes:
            along = total((slopes[name] * v).sum() for name, v in vector.items())
            for name, d in self._derivatives(along).items():
                found[name] = found[name] + d / len(self.x)
        return found

    def ggn_product(self, vector: Mapping[str, Tensor]) -> Named:
        """Mean over examples of Jₙᵀ (∂²ℓₙ/∂z²) Jₙ times one vector."""
        moved = sum(
            torch.einsum("nc...,...->nc", self.jacobians[name], v) for name, v in vector.items()
        )
        back = torch.einsum("ncd,nd->nc", self.output_hessians, moved) / len(self.x)
        return {name: torch.einsum("nc...,nc->...", j, back) for name, j in self.jacobians.items()}

    def ef_product(self, vector: Mapping[str, Tensor]) -> Named:
        """Mean over examples of gₙ gₙᵀ times one vector."""
        along = sum(
            torch.einsum("n...,...->n", self.gradients[name], v) for name, v in vector.items()
        ) / len(self.x)
        return {name: torch.einsum("n...,n->...", g, along) for name, g in self.gradients.items()}

    def product(self, kind: str, vector: Mapping[str, Tensor]) -> Named:
        return {"ef": self.ef_product, "ggn": self.ggn_product, "hessian": self.hessian_product}[
            kind
        ](vector)

    def matrix(self, kind: str, rows: Laid, columns: Laid | None = None) -> Tensor:
        """The block between two blocks, or of one with itself, dense, in their own layouts."""
        other = rows if columns is None else columns
        if kind == "hessian":
            weights = other.gather(self.weights).detach()
            return self.columns(
                kind, rows, torch.eye(weights.numel(), dtype=weights.dtype), other
            ).mT
        if kind == "ef":
            a, b = (block.gather(self.gradients, 1).flatten(1) for block in (rows, other))
            return a.mT @ b / len(a)
        a, b = (block.gather(self.jacobians, 2).flatten(2) for block in (rows, other))
        return torch.einsum("nci,ncd,ndj->ij", a, self.output_hessians, b) / len(a)

    def columns(
        self, kind: str, rows: Laid, vectors: Iterable[Tensor], columns: Laid | None = None
    ) -> Tensor:
        """The block times vectors, one a row of the result."""
        other = rows if columns is None else columns
        return torch.stack(
            [rows.gather(self.product(kind, other.scatter(v))).flatten() for v in vectors]
        ).detach()


def _stacked(each: Sequence[Named]) -> Named:
    return {name: torch.stack([one[name] for one in each]).detach() for name in each[0]}


def gaps(
    found: Mapping[str, Tensor], expected: Mapping[str, Tensor], tolerance: float = 1e-10
) -> list[str]:
    """What differs, in words: by more than `tolerance` of its own norm and, for what rounds to
    zero, 1e-13 of the largest.
    """
    said = [f"{name}: missing" for name in expected if name not in found]
    said += [f"{name}: unasked" for name in found if name not in expected]
    largest = max((float(e.norm()) for e in expected.values()), default=0.0)
    for name in (n for n in expected if n in found):
        f, e = found[name], expected[name]
        if (f.shape, f.dtype) != (e.shape, e.dtype):
            said.append(f"{name}: {list(f.shape)} {f.dtype}, not {list(e.shape)} {e.dtype}")
            continue
        error, scale = float((f - e).norm()), float(e.norm())
        if not error <= tolerance * scale + 1e-13 * largest:
            said.append(f"{name}: off by {error:.2g} of {scale:.2g}")
    return said
