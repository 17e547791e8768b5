"""Likelihoods: loss per example, sampling of labels, root of the Hessian in the outputs.

A likelihood is one small class with four methods (write your own the same way). Every loss is the
**negative log-likelihood of one example, summed over its outputs and places** and up to a constant;
the objective takes the mean over examples. Where a class of yours needs the data's labels for
`root` or `sample` (weights, a mask), it takes them as a last argument `y`.

Legend: N examples, C outputs or classes, P the axes of places where a class is told apart, V
    columns of the root.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Shaped
from torch import Tensor

from curvlab.categorical_targets import wrong_targets
from curvlab.errors import CurvlabError, check_values, fitting, guard_memory
from curvlab.finite import all_finite


@runtime_checkable
class Likelihood(Protocol):
    """The law p(y | z) of labels at outputs, as far as an objective needs to know it."""

    def check(self, z: Float[Tensor, "N *C"], y: Tensor) -> None:
        """Raise CurvlabError where the targets do not fit the outputs (shape, dtype, range)."""

    def loss(self, z: Float[Tensor, "N *C"], y: Tensor) -> Float[Tensor, " N"]:
        """Return −log p(y | z) of each example, summed over outputs."""

    def sample(
        self, z: Float[Tensor, "N *C"], generator: torch.Generator, *args: Any, **kwargs: Any
    ) -> Tensor:
        """Draw labels that `loss` takes from the model's own law.

        The method is `sample(z, generator)` or `sample(z, generator, y)`. Where the data's labels y
        say more than a draw does (a place that has no loss), the labels drawn say the same.
        """

    def root(self, z: Float[Tensor, "N *C"], *args: Any, **kwargs: Any) -> Float[Tensor, "V N *C"]:
        """Return columns v of S, S Sᵀ = ∂²ℓ/∂z² of each example, a slice of the first axis each.

        The method is `root(z)` or `root(z, y)`.
        """


def root_of(likelihood: Likelihood, z: Float[Tensor, "N *C"], y: Tensor) -> Float[Tensor, "V N *C"]:
    """Return columns of S, S Sᵀ = ∂²ℓ/∂z², by the likelihood's own `root`.

    It is `root(z)` or `root(z, y)`, whichever the likelihood has.
    """
    way = _labels_go(likelihood.root, 1)
    if way is None:
        return likelihood.root(z)
    return likelihood.root(z, y) if way == "by place" else likelihood.root(z, y=y)


def sample_of(
    likelihood: Likelihood, z: Float[Tensor, "N *C"], generator: torch.Generator, y: Tensor
) -> Tensor:
    """Draw labels from the model's law by the likelihood's own `sample`.

    It is `sample(z, generator)` or `sample(z, generator, y)`, whichever the likelihood has.
    """
    way = _labels_go(likelihood.sample, 2)
    if way is None:
        return likelihood.sample(z, generator)
    return (
        likelihood.sample(z, generator, y)
        if way == "by place"
        else likelihood.sample(z, generator, y=y)
    )


_Way = Literal["by place", "by name"]


def _labels_go(method: Callable[..., Tensor], given: int) -> _Way | None:
    """Return how a method takes the data's labels behind its `given` other arguments, if it does.

    An argument called `y` is theirs, and one of any other name if it has no default.
    """
    function = getattr(method, "__func__", method)
    return _read(function, given + (function is not method))


@cache  # by function, not by type: an instance may carry a method of its own
def _read(function: Callable[..., Tensor], given: int) -> _Way | None:
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):  # a builtin, which says nothing
        return None
    by_place = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    more = by_place[given:]
    if more and (more[0].name == "y" or more[0].default is inspect.Parameter.empty):
        return "by place"
    kinds, named = (
        {p.kind for p in parameters},
        {p.name for p in parameters if p not in by_place[:given]},
    )
    if not more and inspect.Parameter.VAR_POSITIONAL in kinds:
        return "by place"
    return "by name" if "y" in named or inspect.Parameter.VAR_KEYWORD in kinds else None


def _same_shape(z: Tensor, y: Tensor, name: str) -> None:
    if y.shape != z.shape:
        same = [n for n in y.shape if n > 1] == [n for n in z.shape if n > 1]
        remedy = f"take y.reshape{tuple(z.shape)}" if same else "they must be the same"
        raise CurvlabError(
            f"{name} targets have shape {tuple(y.shape)} but the model's outputs have shape"
            f" {tuple(z.shape)}: {remedy}"
        )
    if not y.is_floating_point():
        raise CurvlabError(
            f"{name} targets must be floating point, not {y.dtype}: convert them with y.float()"
        )
    if not all_finite(y):
        raise CurvlabError(f"{name} targets contain NaN or Inf: clean the data first")


def _guard_root(z: Shaped[Tensor, "N *C"]) -> None:
    outputs = z[0].numel()
    guard_memory(
        outputs * z.numel() * z.element_size(),
        f"the root of the output Hessian ({outputs} columns for each of {len(z)} examples)",
        'take fewer examples at a time, or labels drawn from the model ("model", kind="fisher-mc")',
    )


def _units(z: Shaped[Tensor, "N *C"]) -> Float[Tensor, "V N *C"]:
    """Return the unit vectors of the outputs of every example: V = C."""
    n, c = z.shape[0], z[0].numel()
    eye = torch.eye(c, dtype=z.dtype, device=z.device)
    return eye[:, None, :].expand(c, n, c).reshape(c, *z.shape)


@dataclass(eq=False)
class Categorical:
    """Softmax cross-entropy, ℓ = −Σ_places log softmax(z)_y (thesis (1.7)).

    Outputs are [N, C] or [N, C, *P], the classes on axis 1. Targets are class numbers [N, *P], or
    probabilities q shaped as the outputs: then ℓ = −Σ q_c log softmax(z)_c. Losses are sums over
    the places P.

    Args:
        ignore_index: a place with this class number has no loss, no gradient, no curvature, and
            labels drawn there have none.
        label_smoothing: ε in [0, 1]; class numbers stand for (1 − ε) e_y + ε/C. Probabilities are
            taken as they are.

    Raises:
        CurvlabError: an argument out of range.
    """

    ignore_index: int = -100
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        fitting("ignore_index", self.ignore_index, int)
        fitting("label_smoothing", self.label_smoothing, float)
        check_values(
            (
                "label_smoothing",
                self.label_smoothing,
                0 <= self.label_smoothing <= 1,
                "between 0 and 1",
            )
        )

    def check(
        self, z: Float[Tensor, "N C *P"], y: Shaped[Tensor, "N *P"] | Float[Tensor, "N C *P"]
    ) -> None:
        """Raise CurvlabError unless y is classes [N, *P] or probabilities, for z [N, C, *P]."""
        if z.ndim < 2:
            raise CurvlabError(
                f"categorical outputs must be [N, C] or [N, C, …], not {list(z.shape)}: of one"
                " number an example take Bernoulli"
            )
        wrong = wrong_targets(z, y, self.ignore_index)
        if wrong is None:
            return
        what, remedy = wrong
        if (
            z.shape[1] == 1 and y.numel() == z.numel()
        ):  # whatever is wrong with them: softmax of one output is 1
            shaped = "" if y.shape == z.shape else f".reshape{tuple(z.shape)}"
            remedy = (
                "of one output take Bernoulli with"
                f" y{'' if y.is_floating_point() else '.float()'}{shaped}"
            )
        raise CurvlabError(f"{what}: {remedy}")

    def loss(
        self, z: Float[Tensor, "N C *P"], y: Shaped[Tensor, "N *P"] | Float[Tensor, "N C *P"]
    ) -> Float[Tensor, " N"]:
        """Return the cross-entropy of each example, in nats, summed over its places."""
        if y.is_floating_point():
            losses = F.cross_entropy(z, y, reduction="none")
        else:
            losses = F.cross_entropy(
                z,
                y.long(),
                reduction="none",
                ignore_index=self.ignore_index,
                label_smoothing=self.label_smoothing,
            )
        return losses if z.ndim == 2 else losses.flatten(1).sum(1)

    def sample(
        self, z: Float[Tensor, "N C *P"], generator: torch.Generator, y: Tensor | None = None
    ) -> Shaped[Tensor, "N *P"] | Float[Tensor, "N C *P"]:
        """Draw class numbers [N, *P] at every place, ignored where y is.

        One-hot probabilities [N, C, *P] where a class number would not say the same: with label
        smoothing (the law is over classes, so that the score is p − e_ŷ), and if the ignored number
        is a class. They are zero, without a loss, where y is ignored.
        """
        # the class that comes first in a race of exponential clocks: torch.multinomial, but without
        # its waits
        p = z.softmax(1)
        drawn = (p / torch.empty_like(p).exponential_(generator=generator)).argmax(1)
        ignored = self._ignored(y)
        if not self.label_smoothing and not 0 <= self.ignore_index < z.shape[1]:
            return drawn if ignored is None else drawn.masked_fill(ignored, self.ignore_index)
        hot = torch.zeros_like(z).scatter_(1, drawn.unsqueeze(1), 1.0)
        return hot if ignored is None else hot.masked_fill(ignored.unsqueeze(1), 0.0)

    def root(
        self, z: Float[Tensor, "N C *P"], y: Tensor | None = None
    ) -> Float[Tensor, "V N C *P"]:
        """Return column (c, place) of V = C · |P|: √p_c (p − e_c) at that place.

        It is the gradient at label c weighted by its probability.
        """
        _guard_root(z)
        p = z.softmax(1)
        weight, ignored = p.sqrt(), self._ignored(y)
        if ignored is not None:
            weight = weight.masked_fill(ignored.unsqueeze(1), 0.0)
        elif y is not None:
            # 1, up to the rounding of the data
            weight = weight * y.to(z.dtype).sum(1, keepdim=True).sqrt()
        if z.ndim == 2:
            return (p[None] - _units(z)) * weight.T[:, :, None]
        p, weight = p.flatten(2), weight.flatten(2)
        eye = torch.eye(z.shape[1], dtype=z.dtype, device=z.device)
        # [C, N, C, P]
        columns = (p[None] - eye[:, None, :, None]) * weight.transpose(0, 1)[:, :, None]
        # from column c of place q to (c, q)
        return torch.diag_embed(columns, dim1=1, dim2=4).reshape(-1, *z.shape)

    def _ignored(self, y: Tensor | None) -> Shaped[Tensor, "N *P"] | None:
        """Return where class numbers are ignored; None where y is none or probabilities."""
        return None if y is None or y.is_floating_point() else y.long() == self.ignore_index


class Bernoulli:
    """Binary cross-entropy on logits, summed over units: ℓ = Σ_c softplus(z_c) − y_c z_c.

    Targets are in [0, 1], shaped as z.
    """

    def check(self, z: Float[Tensor, "N *C"], y: Float[Tensor, "N *C"]) -> None:
        """Raise CurvlabError unless y is floating, finite, shaped as z and within [0, 1]."""
        _same_shape(z, y, "Bernoulli")
        if bool((y < 0).any()) or bool((y > 1).any()):
            raise CurvlabError("Bernoulli targets must lie in [0, 1]: rescale the data")

    def loss(self, z: Float[Tensor, "N *C"], y: Float[Tensor, "N *C"]) -> Float[Tensor, " N"]:
        """Return the binary cross-entropy of each example, in nats, summed over its units."""
        return F.binary_cross_entropy_with_logits(z, y, reduction="none").reshape(len(z), -1).sum(1)

    def sample(
        self, z: Float[Tensor, "N *C"], generator: torch.Generator, y: Tensor | None = None
    ) -> Float[Tensor, "N *C"]:
        """Draw targets 0 and 1, each 1 with probability sigmoid(z); y plays no part."""
        return torch.bernoulli(z.sigmoid(), generator=generator)

    def root(self, z: Float[Tensor, "N *C"], y: Tensor | None = None) -> Float[Tensor, "V N *C"]:
        """Return C columns √(σ_c (1 − σ_c)) e_c, σ = sigmoid(z); y plays no part.

        Raises:
            CurvlabError: they would take more than 80 % of the memory.
        """
        _guard_root(z)
        s = z.sigmoid()  # ∂²ℓ/∂z² = diag(σ(1 − σ)); the thesis's 1.2.2 misprints it as diag(σ)
        return _units(z) * (s * (1 - s)).sqrt()


class Gaussian:
    """Half squared error, summed over units: ℓ = ½ ‖z − y‖²; unit variance.

    Targets are shaped as z.
    """

    def check(self, z: Float[Tensor, "N *C"], y: Float[Tensor, "N *C"]) -> None:
        """Raise CurvlabError unless y is floating, finite and shaped as z."""
        _same_shape(z, y, "Gaussian")

    def loss(self, z: Float[Tensor, "N *C"], y: Float[Tensor, "N *C"]) -> Float[Tensor, " N"]:
        """Return half the squared error of each example, summed over its units."""
        return 0.5 * (z - y).square().reshape(len(z), -1).sum(1)

    def sample(
        self, z: Float[Tensor, "N *C"], generator: torch.Generator, y: Tensor | None = None
    ) -> Float[Tensor, "N *C"]:
        """Draw targets of mean z and variance 1; y plays no part."""
        return z + torch.randn(z.shape, dtype=z.dtype, device=z.device, generator=generator)

    def root(self, z: Float[Tensor, "N *C"], y: Tensor | None = None) -> Float[Tensor, "V N *C"]:
        """Return C columns, the unit vectors e_c: ∂²ℓ/∂z² = I; y plays no part.

        Raises:
            CurvlabError: they would take more than 80 % of the memory.
        """
        _guard_root(z)
        return _units(z)


LIKELIHOODS: dict[str, type[Likelihood]] = {
    "categorical": Categorical,
    "bernoulli": Bernoulli,
    "gaussian": Gaussian,
}
