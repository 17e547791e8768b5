"""What a model's gradients and matrices are, by plain `torch.autograd`: one example at a time,
reverse mode twice.

Nothing here knows of layers, hooks, functional calls or `vmap`, so that nothing of these can be
wrong.

Legend: N examples, C outputs of an example, D numbers in all trainable parameters, each parameter
    once, in the model's order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

Loss = Callable[[Tensor, Tensor], Tensor]

WRAPPED = "_orig_mod."
"""In the names of what is compiled."""


def cross_entropy(z: Tensor, y: Tensor) -> Tensor:
    """−log softmax(z)_y, summed over further axes: [N]."""
    return F.cross_entropy(z, y, reduction="none").reshape(len(z), -1).sum(1)


def half_squares(z: Tensor, y: Tensor) -> Tensor:
    """½ ‖z − y‖²: [N]."""
    return (z - y).square().reshape(len(z), -1).sum(1) / 2


def numbers(*shape: int, seed: int = 1) -> Tensor:
    """Normal numbers in float64."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def tokens(*shape: int, high: int = 6, seed: int = 1) -> Tensor:
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(seed))


@contextmanager
def seeded(seed: int = 3, dtype: torch.dtype = torch.float64) -> Iterator[None]:
    """Modules made inside have these weights and this dtype; torch's own state is left alone."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def plain_attention() -> Iterator[None]:
    """Fused attention has no second derivatives."""
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)


@dataclass(frozen=True)
class Case:
    """One model and one minibatch of it.

    Args:
        build: makes the model; seeded, in float64.
        x: shape of one example, or what makes all of them.
        y: None: three classes; "like": numbers as the outputs; or what makes classes.
        twin: a model with the same parameters under the same names, whose derivatives torch gets
            right, where it does not here.
        around: what the world looks like while anybody looks at the model.
        lenient: quantities that may be refused in one line, where torch itself knows no way.
    """

    build: Callable[..., nn.Module]
    x: tuple[int, ...] | Callable[..., Tensor] = (4,)
    n: int = 5
    y: str | Callable[..., Tensor] | None = None
    twin: Callable[[], nn.Module] | None = None
    around: Callable[[nn.Module], AbstractContextManager[object]] = lambda model: nullcontext()
    lenient: frozenset[str] = frozenset()

    def model(self) -> Any:
        """An `nn.Module`, of whose parts mypy knows nothing."""
        with seeded():
            return self.build()

    def data(self) -> tuple[Tensor, Tensor]:
        x = self.x() if callable(self.x) else numbers(self.n, *self.x)
        if self.y != "like":
            return x, self.y() if callable(self.y) else tokens(len(x), high=3, seed=2)
        with torch.no_grad(), self.around(model := self.model()):
            return x, numbers(*model(x).shape, seed=2)

    @property
    def loss(self) -> Loss:
        return half_squares if self.y == "like" else cross_entropy

    def reference(self) -> Reference:
        model = self.model()
        if self.twin is not None:
            with seeded():
                other = self.twin()
            other.load_state_dict(model.state_dict(), strict=False)
            model = other
        return Reference(model, *self.data(), self.loss, lambda: self.around(model))


class Reference:
    """Of the mean loss over examples of a model at its weights of now."""

    def __init__(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        loss: Loss = cross_entropy,
        around: Callable[[], AbstractContextManager[object]] = nullcontext,
    ) -> None:
        self.model, self.x, self.y, self.loss, self.around = model, x, y, loss, around
        self.parameters = names_of(model)

    def _rows(self, values: Tensor, again: bool = False) -> Tensor:
        """Gradient of each of the values: [values, D]."""
        found = []
        for value in values.flatten():
            each: Sequence[Tensor | None] = [None] * len(self.parameters)
            if value.requires_grad:
                ps = list(self.parameters.values())
                each = torch.autograd.grad(
                    value, ps, create_graph=again, retain_graph=True, allow_unused=True
                )
            full = [
                torch.zeros_like(p) if g is None else g
                for p, g in zip(self.parameters.values(), each, strict=True)
            ]
            found.append(torch.cat([g.flatten() for g in full]))
        return torch.stack(found)

    def _alone(self) -> Iterator[tuple[Tensor, Tensor]]:
        for i in range(len(self.x)):
            with torch.enable_grad(), plain_attention(), self.around():
                z = self.model(self.x[i : i + 1])
            yield z, self.y[i : i + 1]

    @cached_property
    def gradient(self) -> Tensor:
        """Of the mean loss, all examples together: [D]."""
        with torch.enable_grad(), self.around():
            return self._rows(self.loss(self.model(self.x), self.y).mean())[0]

    @cached_property
    def rows(self) -> Tensor:
        """∂ℓₙ: [N, D]."""
        return torch.cat([self._rows(self.loss(z, y)) for z, y in self._alone()])

    @cached_property
    def jacobian(self) -> Tensor:
        """∂zₙ: [N, C, D]."""
        return torch.stack([self._rows(z) for z, _ in self._alone()])

    @cached_property
    def output_hessian(self) -> Tensor:
        """∂²ℓₙ/∂z²: [N, C, C]."""
        found = []
        for z, y in self._alone():
            leaf = z.detach().requires_grad_()
            (slope,) = torch.autograd.grad(self.loss(leaf, y).sum(), leaf, create_graph=True)
            each = [
                (
                    torch.autograd.grad(s, leaf, retain_graph=True)[0].flatten()
                    if s.requires_grad
                    else torch.zeros_like(leaf).flatten()
                )
                for s in slope.flatten()
            ]
            found.append(torch.stack(each))
        return torch.stack(found)

    @cached_property
    def ef(self) -> Tensor:
        return self.rows.mT @ self.rows / len(self.x)

    @cached_property
    def ggn(self) -> Tensor:
        return torch.einsum(
            "nci,ncd,ndj->ij", self.jacobian, self.output_hessian, self.jacobian
        ) / len(self.x)

    @cached_property
    def hessian(self) -> Tensor:
        with torch.enable_grad(), plain_attention():
            with self.around():
                total = self.loss(self.model(self.x), self.y).mean()
            return self._rows(self._rows(total, again=True)[0]).detach()

    @cached_property
    def pi(self) -> Tensor:
        return self.hessian - self.ggn

    def split(self, flat: Tensor) -> dict[str, Tensor]:
        """[…, D] → {parameter: […, its own shape]}."""
        sizes = [p.numel() for p in self.parameters.values()]
        parts = flat.split(sizes, -1)
        named = zip(self.parameters.items(), parts, strict=True)
        return {name: part.reshape((*flat.shape[:-1], *p.shape)) for (name, p), part in named}

    def named(self, flat: Tensor, model: nn.Module) -> dict[str, Tensor]:
        """The same under every name that a parameter has in `model`."""
        found, first = self.split(flat), {id(p): name for name, p in names_of(model).items()}
        every = {**names_of(model, True), **dict(model.named_parameters(remove_duplicate=False))}
        return {name: found[first[id(p)]] for name, p in every.items() if first.get(id(p)) in found}

    def joined(self, found: Mapping[str, Tensor], model: nn.Module, batch: int = 0) -> Tensor:
        """{parameter: […, its own shape]}, under any of its names → […, D]; a parameter that is
        absent is NaN.
        """
        first, every = {id(p): name for name, p in names_of(model).items()}, names_of(model, True)
        bare = {
            name.replace(WRAPPED, ""): t.detach().reshape(*t.shape[:batch], -1)
            for name, t in found.items()
        }
        given = {first[id(every[name])]: t for name, t in bare.items() if name in every}
        leading = next(iter(found.values())).shape[:batch]
        absent = {
            name: torch.full((*leading, p.numel()), torch.nan, dtype=p.dtype)
            for name, p in self.parameters.items()
        }
        return torch.cat([(absent | given)[name] for name in self.parameters], -1)


def total(values: Iterable[Tensor]) -> Tensor:
    """`sum`, of which mypy thinks that it may be the number 0."""
    return cast(Tensor, sum(values))


def names_of(model: nn.Module, duplicates: bool = False) -> dict[str, nn.Parameter]:
    """{name: trainable parameter}, as a wrapper around a module does not change them; each once, or
    under each of its names.
    """
    every = model.named_parameters(remove_duplicate=not duplicates)
    return {name.replace(WRAPPED, ""): p for name, p in every if p.requires_grad}


def apart(found: Tensor, wanted: Tensor, whole: Tensor | None = None) -> float:
    """‖found − wanted‖ / ‖wanted‖; of a part that is zero but for rounding, beside the rounding of
    the whole.
    """
    if found.shape != wanted.shape:
        return float("inf")
    scale = float(wanted.norm()) + 1e-4 * float((wanted if whole is None else whole).norm())
    error = float((found.detach() - wanted).norm())
    return error / scale if scale else error


def one_line(error: Exception, *words: str, without: tuple[str, ...] = ()) -> None:
    """A refusal: one line, with one of the words, and without those that would name another
    cause.
    """
    line = str(error)
    assert line, "nothing is said"
    assert "\n" not in line, line
    assert not words or any(word in line for word in words), line
    assert not any(word in line for word in without), line


class Net(nn.Module):
    """Modules and parameters by name, and as its forward a function of it and x."""

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            """A part."""

    def __init__(
        self, run: Callable[[Net, Tensor], Tensor], **parts: nn.Module | nn.Parameter | Tensor
    ) -> None:
        super().__init__()
        self.run = run
        for name, part in parts.items():
            if isinstance(part, Tensor) and not isinstance(part, nn.Parameter):
                self.register_buffer(name, part)
            else:
                setattr(self, name, part)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def weight(*shape: int) -> nn.Parameter:
    """A parameter of normal numbers."""
    return nn.Parameter(torch.randn(*shape) / 2)
