"""Likelihoods: loss per example, sampling of labels, root of the Hessian in the outputs.

A likelihood is one small class with three methods (write your own the same way). Every loss is the **negative
log-likelihood of one example, summed over its outputs** and up to a constant; the objective takes the mean over examples.

Legend: N examples, C outputs.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Shaped
from torch import Tensor

from curvlab.errors import CurvlabError
from curvlab.finite import all_finite


@runtime_checkable
class Likelihood(Protocol):
    """What an objective needs to know of the outputs' distribution p(y | z)."""

    def check(self, z: Float[Tensor, "N *C"], y: Tensor) -> None:
        """Raise CurvlabError where the targets do not fit the outputs (shape, dtype, range)."""

    def loss(self, z: Float[Tensor, "N *C"], y: Tensor) -> Float[Tensor, " N"]:
        """−log p(y | z) of each example, summed over outputs."""

    def sample(self, z: Float[Tensor, "N *C"], generator: torch.Generator) -> Tensor:
        """Labels drawn from the model's own distribution, shaped as the targets are."""

    def root(self, z: Float[Tensor, "N *C"]) -> Float[Tensor, "V N *C"]:
        """Columns v of S with S Sᵀ = ∂²ℓ/∂z² for each example, one column a slice of the first axis."""


def _same_shape(z: Tensor, y: Tensor, name: str) -> None:
    if y.shape != z.shape:
        raise CurvlabError(
            f"{name} targets have shape {tuple(y.shape)} but the model's outputs have shape {tuple(z.shape)}: "
            "they must be the same"
        )
    if not y.is_floating_point():
        raise CurvlabError(f"{name} targets must be floating point, not {y.dtype}: convert them with y.float()")
    if not all_finite(y):
        raise CurvlabError(f"{name} targets contain NaN or Inf: clean the data first")


def _units(z: Shaped[Tensor, "N *C"]) -> Float[Tensor, "V N *C"]:
    """The unit vectors of the outputs of every example: V = C."""
    n, c = z.shape[0], z[0].numel()
    eye = torch.eye(c, dtype=z.dtype, device=z.device)
    return eye[:, None, :].expand(c, n, c).reshape(c, *z.shape)


class Categorical:
    """Softmax cross-entropy: ℓ = −log softmax(z)_y; targets are class numbers [N]. Thesis (1.7)."""

    def check(self, z: Float[Tensor, "N C"], y: Shaped[Tensor, " N"]) -> None:
        if z.ndim != 2:
            raise CurvlabError(f"categorical outputs must be [N, C], not {list(z.shape)}: flatten the other axes")
        if y.shape != z.shape[:1]:
            raise CurvlabError(
                f"categorical targets have shape {tuple(y.shape)} but {len(z)} class numbers, shape ({len(z)},), are needed"
            )
        if y.dtype not in (torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8):
            raise CurvlabError(f"categorical targets must be integers, not {y.dtype}: convert them with y.long()")
        if len(y) and not 0 <= int(y.min()) <= int(y.max()) < z.shape[1]:
            raise CurvlabError(
                f"label {int(y.max()) if int(y.max()) >= z.shape[1] else int(y.min())} is out of range: "
                f"the model has {z.shape[1]} outputs, so labels run from 0 to {z.shape[1] - 1}"
            )

    def loss(self, z: Float[Tensor, "N C"], y: Shaped[Tensor, " N"]) -> Float[Tensor, " N"]:
        return F.cross_entropy(z, y.long(), reduction="none")

    def sample(self, z: Float[Tensor, "N C"], generator: torch.Generator) -> Shaped[Tensor, " N"]:
        p = z.softmax(1)  # the class that comes first in a race of exponential clocks: torch.multinomial, but without its waits
        return (p / torch.empty_like(p).exponential_(generator=generator)).argmax(1)

    def root(self, z: Float[Tensor, "N C"]) -> Float[Tensor, "C N C"]:
        p = z.softmax(1)  # column c: √p_c (p − e_c), the gradient at label c weighted by its probability
        return (p[None] - _units(z)) * p.sqrt().T[:, :, None]


class Bernoulli:
    """Binary cross-entropy on logits, summed over units: ℓ = Σ_c softplus(z_c) − y_c z_c; targets in [0, 1], shaped as z."""

    def check(self, z: Float[Tensor, "N *C"], y: Float[Tensor, "N *C"]) -> None:
        _same_shape(z, y, "Bernoulli")
        if bool((y < 0).any()) or bool((y > 1).any()):
            raise CurvlabError("Bernoulli targets must lie in [0, 1]: rescale the data")

    def loss(self, z: Float[Tensor, "N *C"], y: Float[Tensor, "N *C"]) -> Float[Tensor, " N"]:
        return F.binary_cross_entropy_with_logits(z, y, reduction="none").reshape(len(z), -1).sum(1)

    def sample(self, z: Float[Tensor, "N *C"], generator: torch.Generator) -> Float[Tensor, "N *C"]:
        return torch.bernoulli(z.sigmoid(), generator=generator)

    def root(self, z: Float[Tensor, "N *C"]) -> Float[Tensor, "V N *C"]:
        s = z.sigmoid()  # ∂²ℓ/∂z² = diag(σ(1 − σ)); the thesis's 1.2.2 misprints it as diag(σ)
        return _units(z) * (s * (1 - s)).sqrt()


class Gaussian:
    """Half squared error, summed over units: ℓ = ½ ‖z − y‖²; unit variance; targets shaped as z."""

    def check(self, z: Float[Tensor, "N *C"], y: Float[Tensor, "N *C"]) -> None:
        _same_shape(z, y, "Gaussian")

    def loss(self, z: Float[Tensor, "N *C"], y: Float[Tensor, "N *C"]) -> Float[Tensor, " N"]:
        return 0.5 * (z - y).square().reshape(len(z), -1).sum(1)

    def sample(self, z: Float[Tensor, "N *C"], generator: torch.Generator) -> Float[Tensor, "N *C"]:
        return z + torch.randn(z.shape, dtype=z.dtype, device=z.device, generator=generator)

    def root(self, z: Float[Tensor, "N *C"]) -> Float[Tensor, "V N *C"]:
        return _units(z)


LIKELIHOODS: dict[str, type[Likelihood]] = {
    "categorical": Categorical,
    "bernoulli": Bernoulli,
    "gaussian": Gaussian,
}
