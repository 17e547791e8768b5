"""General route: `torch.func` over the parameters, for every model.

It is slow, and the oracle of the structured routes. It knows nothing of layers, captures or roots:
only the model as a function of its parameters and the likelihood's loss.

Legend: N examples, C outputs (flattened), D parameters in the layout's order, K vectors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cached_property, partial
from time import perf_counter
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import grad, jacrev, linearize, vjp

from curvlab.closure import Closure
from curvlab.derivatives import derivatives, differentiable, surrounding
from curvlab.errors import cause_of, warn
from curvlab.exact.batches import PASS_OF_KIND, Kind
from curvlab.exact.plain import Plain
from curvlab.exact.sight import sees, sees_twice
from curvlab.exact.transforms import (
    FixedRows,
    Repeated,
    Weights,
    along,
    mapped,
    raise_ours,
    transposed,
)
from curvlab.exact.transforms import second_derivative as second
from curvlab.layers import Layout
from curvlab.nests import copied
from curvlab.strangers import called, eager, mixes
from curvlab.system.random_state import kept
from curvlab.units import ByPlace

_NUMBERS = 1 << 24  # in the temporaries of one step
_LONG = 10.0  # seconds, from which on a time is said
_TRACED = 128  # products, whose time a trace costs


class Function:
    """Model and its losses on one minibatch, as functions of the parameters in one vector.

    The vector is that of `layout`. By `torch.func`, where that sees the parameters as autograd does
    (`sound`, looked at once a form); else by `Plain`.
    """

    def __init__(self, closure: Closure, layout: Layout) -> None:
        self.closure, self.layout = closure, layout
        model = closure.objective.model
        named = [*model.named_parameters(), *model.named_buffers()]
        self._state = state = {name: t.detach() for name, t in named}
        self._buffers = [name for name, _ in model.named_buffers()]
        self.at: Float[Tensor, " D"] = layout.flatten(state).to(closure.objective.dtype)
        self._plain = Plain(closure, layout)

    def outputs(self, w: Float[Tensor, " D"], x: Tensor) -> Float[Tensor, "N *C"]:
        """Return the model's outputs on `x` at the parameters `w`, in the dtype of `at`."""
        return self._called(self._apart(w), x)

    def _apart(self, w: Float[Tensor, " D"]) -> Weights:
        """Return a vector by parameters, contiguous.

        The way back through batch norm is wrong where its weight has strides (torch 2.13).
        """
        parts = self.layout.unflatten(w)
        trained = self.closure.objective.parameters
        return {
            name: part.to(self._state[name].dtype).contiguous()
            for name, part in parts.items()
            if trained[name].requires_grad
        }

    def _called(self, weights: Weights, x: Tensor) -> Float[Tensor, "N *C"]:
        # where BatchNorm may write on them
        fixed = {name: self._state[name].clone() for name in self._buffers}
        x = copied(x) if self.closure.objective.expendable.writes else x
        with differentiable(heard=True), eager(), surrounding(), FixedRows():
            out = called(self.closure.objective.model, self._state | fixed | weights, x)
            z: Tensor = self.closure.objective.picked(out)
        return z.to(self.at.dtype)

    def losses(
        self, w: Float[Tensor, " D"], x: Tensor, y: Tensor, *, drawn: bool = False
    ) -> Float[Tensor, " N"]:
        """Return each example's loss on `x` and `y` at `w`, [N], without the L2 term.

        It is `Closure.loss_of`, of labels that the data have or that were `drawn`.
        """
        return self.closure.loss_of(self.outputs(w, x), y, drawn=drawn)

    @cached_property
    def sound(self) -> bool:
        """Whether `torch.func` gives autograd's derivatives of the first example (`sees`)."""
        objective, names = self.closure.objective, tuple(b.name for b in self.layout.blocks)
        key = (self.closure._key(self.closure.x), names)
        if key not in objective.functional:
            with kept(objective.device):
                objective.functional[key] = sees(self)
        return objective.functional[key]

    @cached_property
    def sound_twice(self) -> bool:
        """Whether its Hessian of the first example's loss is autograd's (`sees_twice`)."""
        closure, names = self.closure, tuple(b.name for b in self.layout.blocks)
        key = (closure._key(closure.x), names, "twice")
        known = closure.objective.functional
        if key not in known:
            mixing = mixes(closure.objective.modules)
            with kept(closure.objective.device):
                known[key] = mixing or sees_twice(Function(closure.some(slice(1)), self.layout))
        return known[key]

    def _total(self, kind: Kind) -> Callable[[Float[Tensor, "N *C"]], Tensor]:
        """Return z → Σₙ ℓₙ, or for Π a function of z whose Hessian is Π alone (thesis (1.4)).

        That is the same with ∂ℓ/∂z held fixed, Σₙ ⟨∂ℓₙ/∂z, z⟩.
        """
        x, y = self.closure.x, self.closure.y

        def total(z: Tensor) -> Tensor:
            return self.closure.loss_of(z, y).sum()

        if kind == "hessian":
            return total
        slope = grad(total)(self.outputs(self.at, x).detach())
        return lambda z: (z * slope).sum()

    def drawn(self, draws: int) -> list[Tensor]:
        """Return `draws` batches of labels, drawn from the model at its outputs at `at`."""
        return self.closure.labels(self.outputs(self.at, self.closure.x).detach(), draws)

    def gradients(
        self, label: Tensor, some: slice = slice(None), *, drawn: bool = False
    ) -> Float[Tensor, "n D"]:
        """Return the gradient of each of some examples' losses at its label, [n, D].

        The label is the data's, or was `drawn`.
        """
        x, y = self.closure.x, label

        def gradient(x: Tensor, y: Tensor) -> Tensor:
            g: Tensor = grad(lambda w: self.losses(w, x[None], y[None], drawn=drawn)[0])(self.at)
            return g

        return self._either(
            lambda: mapped(gradient)(x[some], y[some]),
            lambda: torch.stack(
                [
                    self._plain.gradient(n, y, self.at, drawn=drawn)
                    for n in range(*some.indices(len(x)))
                ]
            ),
        )

    @cached_property
    def by_place(self) -> ByPlace:
        """The derivatives of the losses in the outputs, apart for every place of a loss."""
        return self.closure.by_place(self.outputs(self.at, self.closure.x).detach())

    def gradients_of_places(self, some: slice = slice(None)) -> Float[Tensor, "n P D"]:
        """Return the gradients of the losses of each place of some examples, times √(N/M)."""
        x, apart = self.closure.x, self.by_place

        def gradient(x: Tensor, slopes: Tensor) -> Tensor:
            one = replace(apart, slopes=slopes[None])
            g: Tensor = jacrev(lambda w: one.linear(self.outputs(w, x[None]))[0])(self.at)
            return g

        return self._either(
            lambda: mapped(gradient)(x[some], apart.slopes[some]),
            lambda: torch.stack(
                [
                    self._plain.gradients_of_places(n, apart, self.at)
                    for n in range(*some.indices(len(x)))
                ]
            ),
        )

    def jacobians(self, some: slice = slice(None)) -> Float[Tensor, "n C D"]:
        """Return the Jacobian of each of some examples' outputs, [n, C, D]."""
        x = self.closure.x

        def jacobian(x: Tensor) -> Tensor:
            j: Tensor = jacrev(lambda w: self.outputs(w, x[None])[0].flatten())(self.at)
            return j

        return self._either(
            lambda: mapped(jacobian)(x[some]),
            lambda: torch.stack(
                [self._plain.jacobian(n, self.at) for n in range(*some.indices(len(x)))]
            ),
        )

    def _either(self, transformed: Callable[[], Tensor], plain: Callable[[], Tensor]) -> Tensor:
        with derivatives():
            if self.sound:
                try:
                    return transformed()
                except Exception as error:
                    raise_ours(error)
            return plain()

    def rows(
        self, kind: Kind, draws: int
    ) -> Iterator[tuple[Float[Tensor, "R D"], Float[Tensor, "R D"]]]:
        """Yield (left, right), some rows at a time, with Σ leftᵀ right = N · M.

        For a kind that is a second moment.
        """
        x, y = self.closure.x, self.closure.y
        size, width = len(x), len(self.at)
        if PASS_OF_KIND[kind] == "exact":
            z = self.closure.outputs()[0]
            # [V, N, C]
            roots = (
                self.closure.root(z).reshape(-1, size, z[0].numel()) if kind == "fisher" else None
            )
            at_once = max(1, _NUMBERS // (z[0].numel() * width))
            began = perf_counter()
            for some in _slices(size, at_once):
                j = self.jacobians(some)
                if some.start == 0:
                    self._foresee(
                        perf_counter() - began, size / at_once, f"Jacobians of {size} examples"
                    )
                if roots is not None:
                    found = torch.einsum("vnc,ncd->vnd", roots[:, some], j).flatten(0, 1)
                    yield found, found
                else:  # ∂²ℓ/∂z² itself, not its root: a route of its own
                    yield (
                        j.flatten(0, 1),
                        (self._output_hessian(z[some], y[some]) @ j).flatten(0, 1),
                    )
            return
        if PASS_OF_KIND[kind] == "token":
            for some in _slices(size, max(1, _NUMBERS // (self.by_place.where.shape[1] * width))):
                g = self.gradients_of_places(some).flatten(0, 1)
                yield g, g
            return
        labels = (
            self.closure.labels(self.closure.outputs()[0], draws)
            if PASS_OF_KIND[kind] == "model"
            else [y]
        )
        at_once = max(1, _NUMBERS // width)
        for label in labels:
            for some in _slices(size, at_once):
                g = self.gradients(label, some, drawn=PASS_OF_KIND[kind] == "model")
                g = g / math.sqrt(len(labels))
                yield g, g

    def _output_hessian(self, z: Float[Tensor, "N *C"], y: Tensor) -> Float[Tensor, "N C C"]:
        z = z.detach().requires_grad_()
        with derivatives():
            (slope,) = torch.autograd.grad(self.closure.loss_of(z, y).sum(), z, create_graph=True)
        found = z.new_zeros(len(z), z[0].numel(), *z.shape[1:])
        if slope.requires_grad:
            for c, each in enumerate(slope.reshape(len(z), -1).unbind(1)):
                found[:, c] = torch.autograd.grad(each.sum(), z, retain_graph=True)[0]
        return found.reshape(len(z), z[0].numel(), -1)

    def product(
        self, kind: Kind, draws: int, *, often: bool = False
    ) -> Callable[[Float[Tensor, "K D"]], Float[Tensor, "K D"]]:
        """Return v → N · M v for several v at once.

        `often`: vectors come one by one; later ones share a forward pass, and round otherwise.
        """
        self.closure.check_kind(kind)
        labels = self.drawn(draws) if PASS_OF_KIND.get(kind) == "model" else [self.closure.y]
        plain = self._plain.product(kind, labels, self.at)
        if not self.sound or (kind not in PASS_OF_KIND and not self.sound_twice):
            return plain
        try:
            with derivatives():
                return self._transformed(kind, labels, plain, often)
        except Exception as error:
            raise_ours(error)
            self._plain.why = cause_of(error)
            return plain

    def _transformed(
        self,
        kind: Kind,
        labels: list[Tensor],
        plain: Callable[[Float[Tensor, "K D"]], Float[Tensor, "K D"]],
        often: bool = False,
    ) -> Callable[[Float[Tensor, "K D"]], Float[Tensor, "K D"]]:
        """Return the product by `torch.func`.

        By `plain` where it turns out that an operation cannot.
        """
        x = self.closure.x
        loss_of = self.closure.loss_of
        at = self._apart(self.at)
        apply: Callable[[Weights], Weights]
        single: Callable[[Weights], Weights]  # of one vector after the other

        def outputs(w: Weights) -> Tensor:
            return self._called(w, x)

        if kind not in PASS_OF_KIND:
            total = self._total(kind)
            slope_of = grad(lambda w: total(outputs(w)))
            apply = partial(second, slope_of, at)
            single = Repeated(apply, lambda: linearize(slope_of, at)[1], _TRACED)
        else:
            exact = PASS_OF_KIND[kind] == "exact"
            apart = self.by_place if PASS_OF_KIND[kind] == "token" else None

            def losses(w: Weights) -> Tensor:
                z = outputs(w)
                if apart is not None:
                    return apart.linear(z)
                each = [loss_of(z, label, drawn=PASS_OF_KIND[kind] == "model") for label in labels]
                return torch.stack(each) / math.sqrt(len(labels))

            function = outputs if exact else losses
            value, back, *_ = vjp(function, at)
            curved = grad(self._total("hessian"))

            def through(forth: Callable[[Weights], Tensor], u: Weights) -> Weights:
                Ju = forth(u)
                return cast(Weights, back(along(curved, value, Ju) if exact else Ju)[0])

            direct = partial(along, function, at)
            apply = partial(through, direct)
            single = partial(through, Repeated(direct, partial(transposed, back, value), 1))

        def one(u: Tensor, apply: Callable[[Weights], Weights] = apply) -> Tensor:
            parts = self.layout.unflatten(u)
            back = apply({name: parts[name].to(w.dtype) for name, w in at.items()})
            # frozen since
            still = {
                name: torch.zeros_like(part) for name, part in parts.items() if name not in back
            }
            return self.layout.flatten(back | still).to(u.dtype)

        several = mapped(one)

        def every(v: Float[Tensor, "K D"]) -> Float[Tensor, "K D"]:
            with derivatives():
                try:
                    if len(v) == 1:
                        return one(v[0], single if often else apply)[None]
                    return several(v)
                except Exception as error:
                    raise_ours(error)
                    self._plain.why = cause_of(error)
                    return plain(v)

        return every

    def columns(
        self, kind: Kind, draws: int, part: slice | None = None
    ) -> Iterator[tuple[slice, Float[Tensor, "D K"]]]:
        """Yield N · M, some columns at a time; `part`: only of these columns."""
        product = self.product(kind, draws)
        width = len(self.at)
        first, last = (0, width) if part is None else (part.start, part.stop)
        at_once = max(1, min(64, _NUMBERS // (4 * width + 64 * len(self.closure.x))))
        began = perf_counter()
        for start in range(first, last, at_once):
            stop = min(start + at_once, last)
            units = self.at.new_zeros(stop - start, width)
            units[:, start:stop].fill_diagonal_(1)
            value = product(units).mT
            if start == first:
                self._foresee(
                    perf_counter() - began,
                    (last - first) / (stop - start),
                    f"{last - first} products with the {kind}",
                )
            yield slice(start - first, stop - first), value

    def _foresee(self, seconds: float, parts: float, what: str) -> None:
        """Warn how long the whole will take, where that is long, once its first part is timed."""
        if seconds * parts > _LONG:
            named = ", ".join(map(str, self.layout.blocks))
            warn(
                f"{what} of {named} by the general route will take about {seconds * parts:.0f} s;"
                " products with vectors (curvlab.exact.product) take one each"
            )


def _slices(size: int, at_once: int) -> Iterator[slice]:
    return (slice(start, start + at_once) for start in range(0, size, at_once))
