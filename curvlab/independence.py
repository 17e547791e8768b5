"""Whether every example has a loss of its own.

Its outputs then depend neither on the other examples nor on chance.
"""

from __future__ import annotations

from collections.abc import Hashable

import torch
from torch import Tensor

from curvlab.capture import Capture
from curvlab.derivatives import derivatives
from curvlab.errors import CurvlabError, raise_if_out_of_memory
from curvlab.finite import all_finite
from curvlab.forms import Form
from curvlab.second_looks import SecondLooks
from curvlab.system import random_state


def some_rows(x: Tensor, which: slice) -> Tensor:
    """Return some of the examples of a dense or sparse batch."""
    if not x.is_sparse:
        return x[which]
    return x.index_select(0, torch.arange(len(x), device=x.device)[which]).coalesce()


def _numbered(n: int, size: int) -> str:
    return {0: "first", size - 1: "last"}.get(n, f"{n + 1}th")


class Independence(SecondLooks):
    """The part of a closure that holds examples against each other; the oracle asks it."""

    _trace = 0  # of the calls of the last look

    def forward(
        self, x: Tensor | None = None, move_buffers: bool = False
    ) -> tuple[Tensor, Capture]:
        """Return the outputs of one forward pass, and its capture; see `Closure.forward`."""
        raise NotImplementedError

    def _look_at(
        self, x: Tensor, own: bool, move_buffers: bool = False
    ) -> tuple[Tensor, Capture, Form]:
        raise NotImplementedError

    def _key(self, x: Tensor) -> Hashable:
        raise NotImplementedError

    @property
    def form_of_look(self) -> Form:
        """The form of the look that was taken last."""
        raise NotImplementedError

    def _alone(self, n: int) -> Tensor:
        """Return the outputs of one example by itself.

        Raises:
            CurvlabError: the model draws random numbers.
        """
        before = random_state.states(self.x.device)
        z, capture = self.forward(some_rows(self.x, slice(n, n + 1)))
        if random_state.drawn_since(before, self.x.device):
            raise CurvlabError(
                "the model draws random numbers in its forward pass, so that the loss is no"
                " function of the weights: call model.eval(), and give functional dropout"
                " training=self.training"
            )
        if capture.generators:
            raise CurvlabError(_DEPENDS.format("first"))
        return z.detach()

    def check_alone(self, z: Tensor) -> None:
        """Raise CurvlabError where outputs are not finite, or no example's are its own.

        They depend then on the other examples, or on chance.
        """
        if not all_finite(z):
            raise CurvlabError(
                "the model's outputs contain NaN or Inf: check its weights, and the range of the"
                " data"
            )
        key = self._key(self.x), self._trace
        if key in self.objective.alone:
            return
        if self._restless:
            raise CurvlabError(_DEPENDS.format("first"))
        self._check_apart()
        for n, which in ((0, "first"), (len(z) - 1, "last")):
            one, own = self._alone(n), z[n : n + 1]
            if float((one - own).abs().max()) > torch.finfo(z.dtype).eps ** 0.25 * float(
                one.abs().max()
            ):
                raise CurvlabError(_DEPENDS.format(which))
        self.objective.alone.add(key)

    def _check_apart(self) -> None:
        """Raise CurvlabError where an example's outputs depend on another's inputs."""
        size = len(self.x)
        if size == 1 or self.x.is_sparse:
            return
        bad = self._mixed_by_inputs() if self.x.is_floating_point() else None
        if bad is None:  # one by one, 64 of them at most
            z = self.forward()[0].detach()
            near = torch.finfo(z.dtype).eps ** 0.25
            numbers = sorted(
                {int(i) for i in torch.linspace(0, size - 1, min(size, 64), device="cpu")}
            )
            alone = ((n, self._alone(n), z[n : n + 1]) for n in numbers)
            bad = [
                n
                for n, one, own in alone
                if float((one - own).abs().max()) > near * float(one.abs().max())
            ]
        if bad:
            raise CurvlabError(_DEPENDS.format(_numbered(bad[0], size)))

    def _mixed_by_inputs(self) -> list[int] | None:
        """Return the examples m on which others depend, one pass for all.

        They are where not ∂/∂xₘ Σₙ cₙ uₙ·zₙ = cₘ ∂/∂xₘ Σₙ uₙ·zₙ, c, u random. None where no
        derivative leads back to the inputs.
        """
        size, generator = len(self.x), torch.Generator("cpu").manual_seed(0)
        with derivatives():
            x = self.x.detach().clone().requires_grad_()
            try:
                z = self._look_at(x, False)[0]
                u = torch.randn(z.shape, generator=generator, dtype=torch.float64, device="cpu").to(
                    z
                )
                c = (
                    1 + torch.rand(size, generator=generator, dtype=torch.float64, device="cpu")
                ).to(z)
                sent = (u, c.view(-1, *[1] * (z.ndim - 1)) * u)
                plain, weighted = (
                    torch.autograd.grad(z, x, v, retain_graph=True, allow_unused=True)[0]
                    for v in sent
                )
            except RuntimeError as error:
                raise_if_out_of_memory(error)
                return None
        if plain is None or weighted is None:
            return None
        scaled = c.to(x.dtype).view(-1, *[1] * (x.ndim - 1)) * plain
        apart = (weighted - scaled).reshape(size, -1).norm(dim=1)
        near = (
            max(torch.finfo(x.dtype).eps, self.form_of_look.precision) ** 0.5
            * plain.reshape(size, -1).norm(dim=1).max()
        )
        return (apart > near).nonzero().flatten().tolist()  # type: ignore[no-any-return]  # torch has no types there


_DEPENDS = (
    "the {} example's outputs depend on the rest of the minibatch, or on chance: "
    "no example has a loss of its own, and the model no curvature that is a mean over examples"
)
