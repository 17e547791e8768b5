"""The general route: `torch.func` over the parameters, for every model; slow, and the oracle of the structured routes.

It knows nothing of layers, captures or roots: only the model as a function of its parameters and the likelihood's loss.

Legend: N examples, C outputs of the model (flattened), D parameters in the layout's order, K vectors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import functional_call, grad, hessian, jacrev, jvp, vjp, vmap

from curvlab.errors import CurvlabError
from curvlab.exact.batches import PASSES, Kind
from curvlab.layers import Layout
from curvlab.objective import Closure, differentiable

_NUMBERS = 1 << 24  # in the temporaries of one step


def mapped(f: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`f` over the first axis of its arguments: `vmap`, or one by one where an operation has no rule for it (LSTM, PReLU)."""

    def over(*arguments: Tensor) -> Tensor:
        try:
            found: Tensor = vmap(f)(*arguments)
        except RuntimeError:
            found = torch.stack([f(*one) for one in zip(*arguments, strict=True)])
        return found

    return over


def along(f: Callable[[Any], Tensor], at: Tensor, u: Tensor) -> Tensor:
    """∂f(at) u: forward mode, or the transpose's transpose where an operation has no forward derivative (weight norm)."""
    try:
        found: Tensor = jvp(f, (at,), (u,))[1]
    except NotImplementedError:
        value, back, *_ = vjp(f, at)
        (found,) = vjp(lambda c: back(c)[0], torch.zeros_like(value))[1](u)
    return found


def second_derivative(slope: Callable[[Any], Tensor], at: Tensor, u: Tensor) -> Tensor:
    """The same of a gradient, by forward mode alone: reverse mode twice is wrong for weight norm (torch 2.13, unsymmetric)."""
    try:
        found: Tensor = jvp(slope, (at,), (u,))[1]
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
        fixed = {name: self._state[name].clone() for name in self._buffers}  # where BatchNorm may write on them
        if self._held is not None:
            w = torch.where(self._held, self.at, w)
        with differentiable():
            z: Tensor = functional_call(self.closure.objective.model, self._state | fixed | self.layout.unflatten(w), (x,))
        return z

    def losses(self, w: Float[Tensor, " D"], x: Tensor, y: Tensor) -> Float[Tensor, " N"]:
        return self.closure.objective.likelihood.loss(self.outputs(w, x), y)

    def total(self, kind: Kind) -> Callable[[Float[Tensor, " D"]], Tensor]:
        """Σₙ ℓₙ; for Π the same with ∂ℓ/∂z held fixed, Σₙ ⟨∂ℓₙ/∂z, z⟩, whose Hessian is Π alone (thesis (1.4))."""
        x, y = self.closure.x, self.closure.y
        if kind == "hessian":
            return lambda w: self.losses(w, x, y).sum()
        z = self.outputs(self.at, x).detach()
        slope = grad(lambda z: self.closure.objective.likelihood.loss(z, y).sum())(z)
        return lambda w: (self.outputs(w, x) * slope).sum()

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
        """v → N · M v for several v at once."""
        x, y = self.closure.x, self.closure.y
        likelihood = self.closure.objective.likelihood
        if kind not in PASSES:
            slope = grad(self.total(kind))
            return mapped(lambda u: second_derivative(slope, self.at, u))
        if PASSES[kind] == "exact":

            def outputs(w: Tensor) -> Tensor:
                return self.outputs(w, x)

            z, back, *_ = vjp(outputs, self.at)
            slope = grad(lambda z: likelihood.loss(z, y).sum())

            def one(u: Tensor) -> Tensor:
                found: Tensor = back(along(slope, z, along(outputs, self.at, u)))[0]
                return found

            return mapped(one)
        labels = self.drawn(draws) if PASSES[kind] == "model" else [y]

        def losses(w: Tensor) -> Tensor:
            z = self.outputs(w, x)
            return torch.stack([likelihood.loss(z, label) for label in labels]) / math.sqrt(len(labels))

        transposed = vjp(losses, self.at)[1]

        def second_moment(u: Tensor) -> Tensor:
            found: Tensor = transposed(along(losses, self.at, u))[0]
            return found

        return mapped(second_moment)

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
