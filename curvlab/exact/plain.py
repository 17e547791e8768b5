"""General route by plain autograd, for models that `torch.func` sees otherwise than autograd.

That is: activation checkpointing, an `autograd.Function` without `setup_context`, parameters that a
closure holds on to, `no_grad` or `.data` on the way, scripted parts. One example and one vector at
a time, on the model's own parameters, in the graph that training uses.

Legend: N examples, C outputs of the model (flattened), D parameters in the layout's order, K
    vectors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor

from curvlab.autograd import refused, remedy
from curvlab.closure import Closure
from curvlab.derivatives import derivatives, differentiable
from curvlab.errors import CurvlabError, raise_if_out_of_memory
from curvlab.exact.batches import PASS_OF_KIND, Kind
from curvlab.independence import some_rows
from curvlab.layers import Layout
from curvlab.units import ByPlace

_NO_SECOND = (
    "torch has no second derivative of an operation in the model ({}): replace it, or take ggn,"
    " fisher or ef, which need only the first"
)


class Plain:
    """Model on one minibatch, at weights `at` [D], by `torch.autograd.grad` alone."""

    def __init__(self, closure: Closure, layout: Layout) -> None:
        self.closure, self.layout = closure, layout
        named = closure.objective.parameters
        self.names = [name for b in layout.blocks for name in b.params]
        # not those that were frozen since
        self.names = [name for name in self.names if named[name].requires_grad]
        self.leaves = [named[name] for name in self.names]
        self.still = {
            name: named[name]
            for b in layout.blocks
            for name in b.params
            if not named[name].requires_grad
        }
        self.why = ""  # why `torch.func` cannot

    def gradient(
        self, n: int, label: Tensor, at: Float[Tensor, " D"], *, drawn: bool = False
    ) -> Float[Tensor, " D"]:
        """Return the gradient of example n's loss at a label, [D]."""
        with self._graph(at, slice(n, n + 1)) as z:
            loss = self.closure.loss_of(z, label[n : n + 1], drawn=drawn)[0]
            return self.back(loss, None)

    def jacobian(self, n: int, at: Float[Tensor, " D"]) -> Float[Tensor, "C D"]:
        """Return the Jacobian of example n's outputs, [C, D]."""
        with self._graph(at, slice(n, n + 1)) as z:
            return torch.stack([self.back(each, None) for each in z.flatten()])

    def gradients_of_places(
        self, n: int, apart: ByPlace, at: Float[Tensor, " D"]
    ) -> Float[Tensor, "P D"]:
        """Return the gradients of the losses of each place of example n, [P, D], times √(N/M)."""
        with self._graph(at, slice(n, n + 1)) as z:
            each = apart.some(slice(n, n + 1)).linear(z)[0]
            return torch.stack([self.back(one, None) for one in each])

    def product(
        self, kind: Kind, labels: Sequence[Tensor], at: Float[Tensor, " D"]
    ) -> Callable[[Float[Tensor, "K D"]], Float[Tensor, "K D"]]:
        """Return the function v → N · M v, for several v as rows."""

        def apply(vectors: Float[Tensor, "K D"]) -> Float[Tensor, "K D"]:
            with self._graph(at, slice(None), twice=kind not in PASS_OF_KIND) as z:
                one = (
                    self._second_moment(z, kind, labels)
                    if kind in PASS_OF_KIND
                    else self._second_derivative(z, kind)
                )
                return torch.stack([one(v) for v in vectors])

        return apply

    def _second_derivative(
        self, z: Tensor, kind: Kind
    ) -> Callable[[Float[Tensor, " D"]], Float[Tensor, " D"]]:
        """Return v → H v by double backward of ℓ, or of ⟨∂ℓ/∂z, z⟩ with ∂ℓ/∂z held fixed (Π)."""
        total = self.closure.loss_of(z, self.closure.y).sum()
        if kind == "pi":
            (slope,) = torch.autograd.grad(total, z, retain_graph=True)
            total = (z * slope.detach()).sum()
        grads = (
            torch.autograd.grad(total, self.leaves, create_graph=True, allow_unused=True)
            if self.leaves
            else ()
        )
        live = [g for g in grads if g is not None and g.requires_grad]

        def one(v: Float[Tensor, " D"]) -> Float[Tensor, " D"]:
            sent = self._apart(v)
            of = [u for g, u in zip(grads, sent, strict=True) if g is not None and g.requires_grad]
            return self.back(live, of) if live else torch.zeros_like(v)

        self._check_symmetry(one)
        return one

    def _check_symmetry(self, one: Callable[[Float[Tensor, " D"]], Float[Tensor, " D"]]) -> None:
        """Raise CurvlabError where double backward is no second derivative.

        That is weight norm in torch 2.13.
        """
        size, dtype, near = (
            len(self.layout),
            self.closure.objective.dtype,
            self.closure.form.precision**0.5,
        )
        generator = torch.Generator("cpu").manual_seed(0)
        u, v = torch.randn(2, size, generator=generator, dtype=dtype, device="cpu").to(
            self.closure.x.device
        )
        Hu, Hv = one(u), one(v)
        if float((v @ Hu - u @ Hv).abs()) > near * float(
            Hu.norm() * v.norm() + Hv.norm() * u.norm()
        ):
            raise CurvlabError(
                _NO_SECOND.format(self.why or "its double backward is not symmetric")
            )

    def _second_moment(
        self, z: Tensor, kind: Kind, labels: Sequence[Tensor]
    ) -> Callable[[Float[Tensor, " D"]], Float[Tensor, " D"]]:
        """Return v → Jᵀ (∂²ℓ/∂z²) J v, or the same of Σ over labels of the losses' own JᵀJ.

        J v is the derivative of Jᵀu in u, along v.
        """
        y, loss_of = self.closure.y, self.closure.loss_of
        exact = PASS_OF_KIND[kind] == "exact"
        if exact:
            out = z
        elif PASS_OF_KIND[kind] == "token":
            out = self.closure.by_place(z).linear(z)
        else:
            drawn = PASS_OF_KIND[kind] == "model"
            each = torch.stack([loss_of(z, label, drawn=drawn) for label in labels])
            out = each / math.sqrt(len(labels))
        u = torch.zeros_like(out, requires_grad=True)
        back = (
            torch.autograd.grad(out, self.leaves, u, create_graph=True, allow_unused=True)
            if self.leaves
            else ()
        )
        fixed = z.detach().requires_grad_()
        slope = (
            torch.autograd.grad(loss_of(fixed, y).sum(), fixed, create_graph=True)[0]
            if exact
            else None
        )

        def one(v: Float[Tensor, " D"]) -> Float[Tensor, " D"]:
            pairs = [
                (b, s)
                for b, s in zip(back, self._apart(v), strict=True)
                if b is not None and b.requires_grad
            ]
            if not pairs:
                return torch.zeros_like(v)
            (forward,) = torch.autograd.grad(
                [b for b, _ in pairs], u, [s for _, s in pairs], retain_graph=True
            )
            if slope is not None:
                forward = (
                    torch.autograd.grad(slope, fixed, forward, retain_graph=True)[0]
                    if slope.requires_grad
                    else forward * 0
                )
            return self.back(out, forward)

        return one

    def back(
        self, out: Tensor | list[Tensor], vectors: Tensor | list[Tensor] | None
    ) -> Float[Tensor, " D"]:
        """Return derivatives in the parameters, along vectors; zero in what they do not reach."""
        found = (
            torch.autograd.grad(out, self.leaves, vectors, retain_graph=True, allow_unused=True)
            if self.leaves
            else ()
        )
        each = {
            name: torch.zeros_like(p, dtype=self.closure.objective.dtype)
            for name, p in self.still.items()
        }
        for name, p, d in zip(self.names, self.leaves, found, strict=True):
            own = torch.zeros_like(p) if d is None else (d.to_dense() if d.is_sparse else d)
            each[name] = own.detach().to(self.closure.objective.dtype)
        return self.layout.flatten(each)

    def _apart(self, v: Float[Tensor, " D"]) -> list[Tensor]:
        parts = self.layout.unflatten(v)
        return [parts[name].to(p.dtype) for name, p in zip(self.names, self.leaves, strict=True)]

    @contextmanager
    def _graph(self, at: Float[Tensor, " D"], some: slice, twice: bool = False) -> Iterator[Tensor]:
        """Yield the outputs of some of the examples at these weights, with their graph.

        What torch cannot do is said in one line.
        """
        with derivatives(), differentiable(), self._moved(at):
            try:
                yield self.closure.forward(
                    self.closure.x if some == slice(None) else some_rows(self.closure.x, some)
                )[0]
            except CurvlabError:
                raise
            except (RuntimeError, NotImplementedError) as error:
                raise_if_out_of_memory(error)
                if twice and remedy(error) is None:
                    raise CurvlabError(_NO_SECOND.format(str(error).splitlines()[0])) from error
                raise refused(error, "this derivative") from error

    @contextmanager
    def _moved(self, at: Float[Tensor, " D"]) -> Iterator[None]:
        """Move the parameters to `at` inside, and back to the bit after."""
        parts = self.layout.unflatten(at)
        wanted = [parts[name].to(p.dtype) for name, p in zip(self.names, self.leaves, strict=True)]
        if all(torch.equal(p, w) for p, w in zip(self.leaves, wanted, strict=True)):
            yield
            return
        saved = [p.detach().clone() for p in self.leaves]
        try:
            with torch.no_grad():
                for p, w in zip(self.leaves, wanted, strict=True):
                    p.copy_(w)
            yield
        finally:
            with torch.no_grad():
                for p, old in zip(self.leaves, saved, strict=True):
                    p.copy_(old)
