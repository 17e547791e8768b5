"""The general route: `torch.func` over the parameters, for every model; slow, and the oracle of the structured routes.

It knows nothing of layers, captures or roots: only the model as a function of its parameters and the likelihood's loss.

Legend: N examples, C outputs of the model (flattened), D parameters in the layout's order, K vectors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import functional_call, grad, hessian, jacrev, jvp, vjp, vmap

from curvlab.errors import CurvlabError
from curvlab.exact.batches import PASSES, Kind
from curvlab.layers import Layout
from curvlab.objective import Closure, differentiable

_NUMBERS = 1 << 24  # in the temporaries of one step

Weights = dict[str, Tensor]
Of = TypeVar("Of", Tensor, Weights)


def mapped(f: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`f` over the first axis of its arguments: `vmap`, or one by one where an operation has no rule for it (LSTM, PReLU)."""

    def over(*arguments: Tensor) -> Tensor:
        try:
            found: Tensor = vmap(f)(*arguments)
        except RuntimeError:
            found = torch.stack([f(*one) for one in zip(*arguments, strict=True)])
        return found

    return over


def along(f: Callable[[Any], Tensor], at: Of, u: Of) -> Tensor:
    """∂f(at) u: forward mode, or the transpose's transpose where an operation has no forward derivative (weight norm)."""
    try:
        found: Tensor = jvp(f, (at,), (u,))[1]
    except NotImplementedError:
        value, back, *_ = vjp(f, at)
        (found,) = vjp(lambda c: back(c)[0], torch.zeros_like(value))[1](u)
    return found


def second_derivative(slope: Callable[[Any], Of], at: Of, u: Of) -> Of:
    """The same of a gradient, by forward mode alone: reverse mode twice is wrong for weight norm (torch 2.13, unsymmetric)."""
    try:
        found: Of = jvp(slope, (at,), (u,))[1]
    except NotImplementedError as error:
        line = str(error).splitlines()[0]
        raise CurvlabError(f"torch has no second derivative of an operation in the model ({line}): replace it, or take ggn, "
                           "fisher or ef, which need only the first") from error  # fmt: skip
    return found


class Function:
    """The model and its losses on one minibatch, as functions of the parameters of `layout` in one vector."""

    def __init__(self, closure: Closure, layout: Layout) -> None:
        self.closure, self.layout = closure, layout
        model = closure.objective.model
        state = {name: t.detach() for name, t in [*model.named_parameters(), *model.named_buffers()]}
        self._buffers = [name for name, _ in model.named_buffers()]
        self._state = state
        self.at: Float[Tensor, " D"] = layout.flatten(state)
        held = layout.constant().to(self.at.device)
        self._held = held if bool(held.any()) else None

    def outputs(self, w: Float[Tensor, " D"], x: Tensor) -> Float[Tensor, "N *C"]:
        if self._held is not None:
            w = torch.where(self._held, self.at, w)
        return self._called(self._apart(w), x)

    def _apart(self, w: Float[Tensor, " D"]) -> Weights:
        """By parameters. Contiguous: the way back through batch norm is wrong where its weight has strides (torch 2.13)."""
        return {name: part.contiguous() for name, part in self.layout.unflatten(w).items()}

    def _called(self, weights: Weights, x: Tensor) -> Float[Tensor, "N *C"]:
        fixed = {name: self._state[name].clone() for name in self._buffers}  # where BatchNorm may write on them
        with differentiable():
            z: Tensor = functional_call(self.closure.objective.model, self._state | fixed | weights, (x,))
        return z

    def losses(self, w: Float[Tensor, " D"], x: Tensor, y: Tensor) -> Float[Tensor, " N"]:
        return self.closure.objective.likelihood.loss(self.outputs(w, x), y)

    def _total(self, kind: Kind) -> Callable[[Float[Tensor, "N *C"]], Tensor]:
        """z → Σₙ ℓₙ; for Π the same with ∂ℓ/∂z held fixed, Σₙ ⟨∂ℓₙ/∂z, z⟩, whose Hessian is Π alone (thesis (1.4))."""
        x, y = self.closure.x, self.closure.y

        def total(z: Tensor) -> Tensor:
            return self.closure.objective.likelihood.loss(z, y).sum()

        if kind == "hessian":
            return total
        slope = grad(total)(self.outputs(self.at, x).detach())
        return lambda z: (z * slope).sum()

    def drawn(self, draws: int) -> list[Tensor]:
        return self.closure.labels(self.outputs(self.at, self.closure.x).detach(), draws)

    def rows(self, kind: Kind, draws: int) -> Iterator[tuple[Float[Tensor, "R D"], Float[Tensor, "R D"]]]:
        """(left, right), some rows at a time, with Σ leftᵀ right = N · M for a kind that is a second moment."""
        x, y = self.closure.x, self.closure.y
        size, width = len(x), len(self.at)
        likelihood = self.closure.objective.likelihood
        if PASSES[kind] == "exact":

            def jacobian(x: Tensor) -> Tensor:
                j: Tensor = jacrev(lambda w: self.outputs(w, x[None])[0].flatten())(self.at)
                return j

            z = self.outputs(self.at, x).detach()
            roots = likelihood.root(z).reshape(-1, size, z[0].numel())  # [V, N, C]
            at_once = max(1, _NUMBERS // (roots.shape[2] * width))
            for some in _slices(size, at_once):
                j = mapped(jacobian)(x[some])
                if kind == "fisher":
                    found = torch.einsum("vnc,ncd->vnd", roots[:, some], j).flatten(0, 1)
                    yield found, found
                else:  # ∂²ℓ/∂z² itself, not its root: a route of its own
                    yield j.flatten(0, 1), (self._output_hessian(z[some], y[some]) @ j).flatten(0, 1)
            return

        def gradient(x: Tensor, y: Tensor) -> Tensor:
            g: Tensor = grad(lambda w: self.losses(w, x[None], y[None])[0])(self.at)
            return g

        labels = self.drawn(draws) if PASSES[kind] == "model" else [y]
        at_once = max(1, _NUMBERS // width)
        for label in labels:
            for some in _slices(size, at_once):
                g = mapped(gradient)(x[some], label[some]) / math.sqrt(len(labels))
                yield g, g

    def _output_hessian(self, z: Float[Tensor, "N *C"], y: Tensor) -> Float[Tensor, "N C C"]:
        likelihood = self.closure.objective.likelihood
        found = mapped(hessian(lambda z, y: likelihood.loss(z[None], y[None])[0]))(z, y)
        return found.reshape(len(z), z[0].numel(), -1)

    def product(self, kind: Kind, draws: int) -> Callable[[Float[Tensor, "K D"]], Float[Tensor, "K D"]]:
        """v → N · M v for several v at once.

        Derivatives are by parameters: by slices of one vector, each would come back as long as the vector.
        """
        x, y = self.closure.x, self.closure.y
        likelihood = self.closure.objective.likelihood
        at = self._apart(self.at)
        apply: Callable[[Weights], Weights]

        def outputs(w: Weights) -> Tensor:
            return self._called(w, x)

        if kind not in PASSES:
            total = self._total(kind)

            def scalar(w: Weights) -> Tensor:
                return total(outputs(w))

            apply = partial(second_derivative, grad(scalar), at)
        elif PASSES[kind] == "exact":
            z, back, *_ = vjp(outputs, at)
            slope = grad(self._total("hessian"))

            def apply(u: Weights) -> Weights:
                found: Weights = back(along(slope, z, along(outputs, at, u)))[0]
                return found

        else:
            labels = self.drawn(draws) if PASSES[kind] == "model" else [y]

            def losses(w: Weights) -> Tensor:
                z = outputs(w)
                return torch.stack([likelihood.loss(z, label) for label in labels]) / math.sqrt(len(labels))

            transposed = vjp(losses, at)[1]

            def apply(u: Weights) -> Weights:
                found: Weights = transposed(along(losses, at, u))[0]
                return found

        def one(u: Tensor) -> Tensor:
            return self._loose(self.layout.flatten(apply(self.layout.unflatten(self._loose(u)))))

        several = mapped(one)
        return lambda v: one(v[0])[None] if len(v) == 1 else several(v)

    def _loose(self, u: Float[Tensor, " D"]) -> Float[Tensor, " D"]:
        """Zero where autograd holds the weights fixed."""
        return u if self._held is None else u.masked_fill(self._held, 0)

    def columns(self, kind: Kind, draws: int, part: slice | None = None) -> Iterator[tuple[slice, Float[Tensor, "D K"]]]:
        """N · M, some columns at a time; `part`: only of these columns."""
        product = self.product(kind, draws)
        width = len(self.at)
        first, last = (0, width) if part is None else (part.start, part.stop)
        at_once = max(1, min(64, _NUMBERS // (4 * width + 64 * len(self.closure.x))))
        for start in range(first, last, at_once):
            stop = min(start + at_once, last)
            units = self.at.new_zeros(stop - start, width)
            units[:, start:stop].fill_diagonal_(1)
            yield slice(start - first, stop - first), product(units).mT


def _slices(size: int, at_once: int) -> Iterator[slice]:
    return (slice(start, start + at_once) for start in range(0, size, at_once))
