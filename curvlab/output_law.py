"""The law of the labels, and S Sᵀ, against the loss itself, where the likelihood is the user's.

GGN, its root S and the Fisher are one matrix only where three functions of a likelihood fit each
other: `loss`, `root` and `sample`. Those of `curvlab.likelihoods` do, and are taken as they are. Of
any other class, a subclass too, S(Sᵀv) is held against ∂²ℓ/∂z² v by autograd, and the scores of
drawn labels against both. All are of the sum over one example's outputs.

Legend: N examples, C outputs (flattened where the axis is one), V columns of S, K directions, M
    draws.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from curvlab.errors import CurvlabError, raise_if_out_of_memory
from curvlab.laws import Law, Root, law_of_heads, refusal
from curvlab.likelihoods import (
    Bernoulli,
    Categorical,
    Gaussian,
    Heads,
    Likelihood,
    Tokens,
    root_of,
    sample_of,
)
from curvlab.nests import copied, times_written
from curvlab.output_hessian import (
    OutputLoss,
    check_convex,
    detached,
    guard_output_hessians,
    largest_norm,
    precision_of,
    root_of_loss,
)

__all__ = ["Law", "Root", "law_of", "refusal"]

_EXACT = (Categorical, Tokens, Bernoulli, Gaussian)
# labels drawn for one example, and how many standard errors may lie between
_DRAWS, _ERRORS = (
    2000,
    6.0,
)
# an event expected this often among all draws is not seen with probability e^-18, 6 standard errors
_UNSEEN = 18.0
# looked at together: entries of roots, outputs of the labels drawn for one example
_NUMBERS = 1 << 22


def law_of(likelihood: Likelihood, z: Float[Tensor, "N *C"], y: Any) -> Law:
    """Hold a likelihood's `root` and `sample` against its `loss` at outputs z and labels y.

    It draws by a seed of its own. What holds here need not hold for labels of another kind (a mask,
    where there is none in y). All examples are looked at; of over 2^24 outputs those of examples
    that lie evenly.

    Raises:
        CurvlabError: losses that are not one number an example, or that depend on other examples or
            on chance; a loss that writes over outputs or targets.
    """
    if isinstance(likelihood, Heads):
        parts = likelihood.split(z).items()
        laws = {name: law_of(likelihood.heads[name], part, y[name]) for name, part in parts}
        return law_of_heads(likelihood, laws)
    own = {"loss", "root", "sample"} & vars(likelihood).keys()
    if isinstance(likelihood, _EXACT) and type(likelihood) in _EXACT and not own:
        unlike = likelihood.unlike
        return Law(partial(root_of, likelihood), not unlike, unlike, examined=False)
    with _apart(z):
        if z.numel() > 4 * _NUMBERS:
            some = _evenly(len(z), max(2, 4 * _NUMBERS // z[0].numel()), z.device)
            z, y = z[some], y[some]
        _check_unwritten(likelihood, z, y)
        try:
            return _Examined(likelihood, detached(z), detached(y)).law()
        except RuntimeError as error:
            if not any(
                words in str(error)
                for words in ("differentiate twice", "double backward", "is not implemented")
            ):
                raise
            found = (
                f"the loss of {type(likelihood).__name__} cannot be differentiated twice: write it"
                " in functions of torch"
            )
            return Law(None, False, found)


@contextmanager
def _apart(z: Tensor) -> Iterator[None]:
    """Record gradients inside, whatever the caller's mode.

    Global random states are as they were in the end.
    """
    devices = [z.device] if z.device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.inference_mode(False), torch.enable_grad():
        yield


def _check_unwritten(likelihood: Likelihood, z: Tensor, y: Any) -> None:
    """Raise CurvlabError where a loss writes over what it is given, which others read again."""
    name = type(likelihood).__name__
    z, y = copied(z), copied(y)
    before = times_written(z), times_written(y)
    likelihood.loss(z, y)
    for what, given, seen in zip("zy", (z, y), before, strict=True):
        if times_written(given) != seen:
            told = {"z": "outputs", "y": "targets"}[what]
            raise CurvlabError(
                f"the loss of {name} writes over its {told}: write {what} = {what} * 0.9 instead of"
                f" {what}.mul_(0.9), or let it begin with {what} = {what}.clone()"
            )


def _evenly(n: int, count: int, device: torch.device) -> Tensor:
    """Return at most `count` of n examples that lie evenly, the first and the last among them."""
    return (
        torch.linspace(0, n - 1, min(n, count), dtype=torch.float64, device="cpu")
        .round()
        .long()
        .to(device)
    )


class _Examined:
    """A likelihood at some outputs and labels, and what its loss says there."""

    def __init__(self, likelihood: Likelihood, z: Float[Tensor, "N *C"], y: Tensor) -> None:
        self.likelihood, self.z, self.y = likelihood, z, y
        self.name, self.outputs = type(likelihood).__name__, z[0].numel()
        self.generator = torch.Generator(z.device).manual_seed(0)
        self.look = OutputLoss(likelihood, z, y)
        if not self.look.losses.requires_grad:
            raise CurvlabError(
                f"autograd finds no way from the loss of {self.name} to the outputs: compute it"
                " from z by torch, without detach(), no_grad() or numbers taken out"
            )
        if self.look.once():
            raise RuntimeError("differentiate twice")
        self._check_alone()
        self.directions = [
            torch.randn(z.shape, dtype=z.dtype, device=z.device, generator=self.generator)
            for _ in range(3)
        ]
        self.products = torch.stack([self.look.times(v) for v in self.directions])  # [3, N, *C]
        # Where probabilities round to 0 or 1 a Hessian is rounding alone, and a label may be too
        # rare to be drawn: what is usual for this loss is asked where no output is above 1.
        self.calm = z / z.abs().reshape(len(z), -1).amax(1).clamp_min(1).reshape(
            -1, *[1] * (z.ndim - 1)
        )
        self.floor = (
            64 * precision_of(z) * max(_finite(largest_norm(self.products[0])), self._usual())
        )

    def _check_alone(self) -> None:
        """Raise CurvlabError where an example's loss depends on the others.

        It may on their outputs, their labels or their number.
        """
        n, losses = len(self.z), self.look.losses.detach()
        if n == 1:
            return
        slope = self.look.back(self.look.losses[0], retain_graph=True)[1:]
        near = precision_of(self.z) ** 0.5 * float(losses.abs().max())
        apart = bool((slope != 0).any() & slope.isfinite().all())
        for some in (slice(0, 1), slice(n - 1, n), slice(0, n // 2)):
            alone = OutputLoss(
                self.likelihood, self.z[some], self.y[some], twice=False
            ).losses.detach()
            apart |= bool(((alone - losses[some]).abs() > near).any())
        if apart:
            raise CurvlabError(
                f"the loss that {self.name} gives an example depends on the rest of the minibatch,"
                " or on chance: let it see its own example alone (no mean over the minibatch, no"
                " division by what is counted in it)"
            )

    def _usual(self) -> float:
        try:
            return _finite(
                largest_norm(
                    OutputLoss(self.likelihood, self.calm, self.y).times(self.directions[0])
                )
            )
        except (ValueError, RuntimeError) as error:  # outputs that this loss does not take
            raise_if_out_of_memory(error)
            return 0.0

    def law(self) -> Law:
        root, found = self._root()
        apart = self._labels()
        return Law(root, not apart, "; ".join(part for part in (found, apart) if part))

    def _root(self) -> tuple[Root | None, str]:
        """Return (S, what was found of the likelihood's own)."""
        try:
            guard_output_hessians(self.z[:1], self.name)
            off = self._off()
        except NotImplementedError:
            return self._derived(f"{self.name} has no root")
        except CurvlabError as error:
            return None, str(error)
        if off is None:
            return partial(root_of, self.likelihood), ""
        return self._derived(f"S Sᵀ of {self.name}.root {off}")

    def _off(self) -> str | None:
        """Return how S Sᵀ v differs from ∂²ℓ/∂z² v, or None.

        Of very many numbers it is looked at those of examples that lie evenly.
        """
        n, c, v = len(self.z), self.outputs, torch.stack(self.directions)
        chosen, at_once = (
            _evenly(n, max(1, 4 * _NUMBERS // c**2), self.z.device),
            max(1, _NUMBERS // c**2),
        )
        norms = []
        for start in range(0, len(chosen), at_once):
            some = chosen[start : start + at_once]
            z = self.z[some]
            root = root_of(self.likelihood, z, self.y[some]).detach()
            if root.shape[1:] != z.shape:
                return f"has shape {tuple(root.shape)}, not (V, {', '.join(map(str, z.shape))})"
            s, u = root.reshape(len(root), -1, c), v[:, some].reshape(3, -1, c).to(root.dtype)
            given = torch.einsum("vnc,kvn->knc", s, torch.einsum("vnc,knc->kvn", s, u)).to(z.dtype)
            wanted = self.products[:, some].reshape(given.shape)
            norms.append(
                torch.stack([part.norm(dim=2).max() for part in (given - wanted, given, wanted)])
            )
        apart, *sizes = torch.stack(norms).amax(0).tolist()
        size = max(*sizes, self.floor)
        if apart <= precision_of(self.z) ** 0.5 * size + self.floor:  # not so where there is a NaN
            return None
        return f"is off ∂²ℓ/∂z² by a relative {_over(apart, size)}"

    def _derived(self, found: str) -> tuple[Root | None, str]:
        """Return S of the loss's own Hessian, where that has one."""
        try:
            guard_output_hessians(self.z, self.name)
            check_convex(self.look.hessian(), self.floor, self.name, precision_of(self.z))
        except CurvlabError as error:
            return None, f"{found}, and {error}"
        return (
            partial(root_of_loss, self.likelihood, self.floor),
            f"{found}: it is taken from the loss itself",
        )

    def _labels(self) -> str:
        """Return how drawn labels fail to follow the loss, or ""."""
        try:
            with torch.no_grad():
                drawn = sample_of(self.likelihood, self.z, self.generator, self.y)
        except NotImplementedError:
            return f"{self.name} has no sample"
        found = []
        try:
            there = OutputLoss(self.likelihood, self.z, drawn)
        except (ValueError, RuntimeError, IndexError) as error:
            raise_if_out_of_memory(error)
            return (
                f"the loss of {self.name} does not take labels drawn by its sample"
                f" ({str(error).splitlines()[0]})"
            )
        products = torch.stack([there.times(v) for v in self.directions])
        if not bool(products.isfinite().all()):
            return f"the loss of {self.name} is not finite at labels drawn by its sample"
        apart = largest_norm((products - self.products).flatten(0, 1))
        size = max(largest_norm(products.flatten(0, 1)), largest_norm(self.products.flatten(0, 1)))
        near = max(precision_of(self.z) ** 0.5, 1e-6)
        if not apart <= near * size + self.floor:
            found.append(
                f"∂²ℓ/∂z² of {self.name} at drawn labels is off that at the data's by a relative"
                f" {_over(apart, size)}"
            )
        moments = self._moments()
        if moments:
            found.append(f"labels drawn by {self.name}.sample have {moments}")
        return ", and ".join(found)

    def _moments(self) -> str:
        """Return which moment of the scores of many labels is too far from its own, or "".

        It should be 0 for the mean, and for the second moment ∂²ℓ/∂z².

        It is taken at the first example and the last, and at that of the largest Hessian where its
        outputs are calm.
        """
        n, c, dtype = len(self.z), self.outputs, torch.promote_types(self.z.dtype, torch.float32)
        if 64 * c > _NUMBERS:
            return ""
        # every output by itself; of many, eight sums with random signs, which any of them may move
        if c <= 8:
            directions = torch.eye(c, dtype=self.z.dtype, device=self.z.device)
        else:
            coins = torch.rand(
                c, 8, dtype=self.z.dtype, device=self.z.device, generator=self.generator
            )
            directions = (coins < 0.5).to(self.z.dtype) * 2 - 1
        largest = int(self.products[0].reshape(n, -1).norm(dim=1).argmax())
        ends, calm = sorted({0, n - 1}), self.calm[largest]
        there = [*self.z[ends], calm, calm / 100]
        try:
            t, hessian = self._scores(
                torch.stack(there), self.y[[*ends, largest, largest]], directions
            )
            usual = bool(t.isfinite().all()) and bool(hessian.isfinite().all())
        except (ValueError, RuntimeError) as refused:  # outputs that this loss does not take
            raise_if_out_of_memory(refused)
            usual = False
        if not usual:
            t, hessian = self._scores(self.z[ends], self.y[ends], directions)
        t, hessian = t.to(dtype), hessian.to(dtype)
        if not bool(t.isfinite().all()):
            return "a score that is not finite"
        # What differs by sampling alone lies within 6 standard errors, but those are of the scores
        # that were drawn: of labels too rare for that, up to _UNSEEN / m of all, each may be as far
        # off as a rare score is long. Both are allowed for before anything is called an error.
        m = t.shape[1]
        mean, second = t.mean(1), t.mT @ t / m
        square = t.square()
        errors = ((square.mT @ square / m - second.square()).clamp_min(0) / m).sqrt()
        error = ((second.diagonal(dim1=1, dim2=2) - mean.square()).clamp_min(0) / m).sqrt()
        size = (
            square.square().sum((0, 1)) / square.sum((0, 1)).clamp_min(torch.finfo(dtype).tiny)
        ).sqrt()  # of a rare score
        near = max(precision_of(self.z) ** 0.5, 1e-6) * float(hessian.abs().max()) + self.floor
        far = (
            mean.abs() - _UNSEEN / m * size - max(precision_of(self.z) ** 0.5, 1e-6) * t.abs().max()
        )
        if bool((far > _ERRORS * error).any()):
            at = int((far / error.clamp_min(torch.finfo(dtype).tiny)).argmax())
            return (
                f"mean score {float(mean.flatten()[at]):.2g},"
                f" {_errors(mean.flatten()[at], error.flatten()[at])} from 0"
            )
        far = (second - hessian).abs() - _UNSEEN / m * size[:, None] * size - near
        if bool((far > _ERRORS * errors).any()):
            at = int((far / errors.clamp_min(torch.finfo(dtype).tiny)).argmax())
            one, other = second.flatten()[at], hessian.flatten()[at]
            return (
                f"scores of second moment {float(one):.3g} where ∂²ℓ/∂z² has {float(other):.3g}, "
                f"{_errors(one - other, errors.flatten()[at])} apart"
            )
        return ""

    def _scores(
        self, z: Float[Tensor, "R *C"], y: Tensor, directions: Float[Tensor, "C K"]
    ) -> tuple[Float[Tensor, "R M K"], Float[Tensor, "R K K"]]:
        """Return scores of M labels drawn for each example, and ∂²ℓ/∂z² at the data's.

        Both are along K directions.
        """
        r, (c, k) = len(z), directions.shape
        m = max(64, min(_DRAWS, (1 << 20) // c))
        with torch.no_grad():
            many, labels = z.repeat_interleave(m, 0), y.repeat_interleave(m, 0)
            drawn = sample_of(self.likelihood, many, self.generator, labels)
        score = OutputLoss(self.likelihood, many, drawn, twice=False).score.reshape(r, m, c)
        look = OutputLoss(self.likelihood, z.repeat_interleave(k, 0), y.repeat_interleave(k, 0))
        product = look.times(directions.T.repeat(r, 1).reshape(r * k, *z.shape[1:])).reshape(
            r, k, c
        )
        return score @ directions, product @ directions


def _over(apart: float, size: float) -> str:
    return f"{apart / size:.2g}" if size else "NaN"


def _finite(value: float) -> float:
    return value if value < float("inf") else 0.0


def _errors(apart: Tensor, error: Tensor) -> str:
    count = float(apart.abs() / error) if float(error) else float("inf")
    return f"{count:.0f} standard errors" if count < 1e4 else "over 10000 standard errors"
