"""Stochastic estimates of the trace and the diagonal of a matrix of which only products are known.

An estimate carries its standard error, itself known to about 1/√(2n) of it: that of few samples is
to be read as Student's t.

Legend: D order; m products; k test vectors of the sketch; n samples; Ω, S [D, k] test vectors, Q
    [D, k] an orthonormal basis.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from curvlab import moved
from curvlab.errors import CurvlabError
from curvlab.linalg.operators import Operator
from curvlab.linalg.products import finite_product, placement
from curvlab.linalg.spectral import thin_svd

_COLUMNS = 64  # test vectors held at once where they are not all needed together


@dataclass(frozen=True)
class StochasticEstimate:
    """Estimate of a number, or of one per entry, with its standard error.

    `products` is how many products with vectors it took.
    """

    value: Float[Tensor, "*S"]
    error: Float[Tensor, "*S"]
    products: int


def average(samples: Float[Tensor, "n *S"], products: int) -> StochasticEstimate:
    """Return the mean over the samples and its standard error s/√n, NaN for a single one."""
    n = len(samples)
    mean = samples.mean(0)
    spread = (
        (samples - mean).square().sum(0) / (n - 1) if n > 1 else torch.full_like(mean, math.nan)
    )
    return StochasticEstimate(mean, (spread / n).sqrt(), products)


def _require(products: int, least: int, name: str) -> None:
    if products < least:
        raise CurvlabError(
            f"{name} needs at least {least} products, not {products}: raise `products`"
        )


def gaussian(operator: Operator, columns: int, generator: torch.Generator) -> Float[Tensor, "D k"]:
    """Draw standard normal test vectors of the operator's dtype, on its device.

    They are drawn on the generator's device and moved.
    """
    dtype, device = placement(operator)
    return torch.randn(
        len(operator), columns, generator=generator, dtype=dtype, device=generator.device
    ).to(device)


def rademacher(
    operator: Operator, columns: int, generator: torch.Generator
) -> Float[Tensor, "D k"]:
    """Draw test vectors of ±1 of the operator's dtype, on its device."""
    dtype, device = placement(operator)
    bits = torch.randint(
        0, 2, (len(operator), columns), generator=generator, device=generator.device
    )
    return (2 * bits - 1).to(device=device, dtype=dtype)


def _signs_times_products(
    operator: Operator, products: int, generator: torch.Generator
) -> Iterator[Float[Tensor, "D n"]]:
    """Yield ω ∘ (A ω) of Rademacher vectors ω, some columns at a time."""
    for start in range(0, products, _COLUMNS):
        omega = rademacher(operator, min(_COLUMNS, products - start), generator)
        yield omega * finite_product(operator, omega)


def hutchinson(operator: Operator, products: int, generator: torch.Generator) -> StochasticEstimate:
    """Estimate tr A by the mean of ωᵀ A ω over `products` ≥ 2 Rademacher vectors.

    Girard 1989; Hutchinson 1990. Unbiased, and exact for a diagonal matrix; `error` is the standard
    error of the mean of independent samples.
    """
    _require(products, 2, "hutchinson")
    samples = [part.sum(0) for part in _signs_times_products(operator, products, generator)]
    return average(torch.cat(samples), products)


def hutchpp(operator: Operator, products: int, generator: torch.Generator) -> StochasticEstimate:
    """Estimate tr A by Hutch++, exactly on a sketched range and by Hutchinson on the rest.

    tr(Qᵀ A Q) + Hutchinson's estimate of tr((I − QQᵀ) A (I − QQᵀ)), Q = orth(A S) (Meyer et al.
    2021, Alg. 1).

    A third of the `products` ≥ 4 each for A S, A Q and the remainder, which gets what does not
    divide. Unbiased, and exact for a matrix of rank ≤ ⌊products / 3⌋: S is normal, where Alg. 1
    draws signs, which can be linearly dependent. `error` is the standard error of the mean over the
    remainder's samples, given Q: nothing else is random then.
    """
    _require(products, 4, "hutch++")
    k = min(products // 3, len(operator))
    q = torch.linalg.qr(finite_product(operator, gaussian(operator, k, generator))).Q
    captured = (q * finite_product(operator, q)).sum()
    omega = rademacher(operator, products - 2 * k, generator)
    omega = omega - q @ (q.mT @ omega)
    remainder = average((omega * finite_product(operator, omega)).sum(0), products)
    return StochasticEstimate(captured + remainder.value, remainder.error, products)


def xtrace(operator: Operator, products: int, generator: torch.Generator) -> StochasticEstimate:
    """Estimate tr A by XTrace: every test vector in turn is the sample, all others the sketch.

    Epperly, Tropp, Webber 2024, Alg. 1.2.

    With k = ⌊products / 2⌋ ≥ 2 vectors Ω, Y = A Ω and Qᵢ a basis of the range of Y without column
    i, the mean t over i of tᵢ = tr(Qᵢᵀ A Qᵢ) + uᵢᵀ A uᵢ, with uᵢ = (I − QᵢQᵢᵀ) ωᵢ scaled to the
    length √(D − k + 1) (their normalisation). Unbiased, and exact for a matrix of rank < k. `error`
    is theirs, √(Σᵢ (tᵢ − t)² / (k (k − 1))): the standard error if the tᵢ were uncorrelated. They
    share sketches: measured, the root mean square error is 1 to 1.4 times this for k ≤ D / 5, twice
    for a flat spectrum and k = 3D / 4.
    """
    _require(products, 4, "xtrace")
    size = len(operator)
    k = min(products // 2, size)
    omega = gaussian(operator, k, generator)
    y = finite_product(operator, omega)
    q, r = torch.linalg.qr(y)
    z = finite_product(operator, q)
    h, w = q.mT @ z, q.mT @ omega

    # QᵢQᵢᵀ = QQᵀ − (Q sᵢ)(Q sᵢ)ᵀ with sᵢ the unit vector along column i of R⁻ᵀ. Where A has a rank
    # below k there is no inverse: singular values are cut at the rounding level, and sᵢ is then a
    # direction on which A is zero.
    left, sigma, right = thin_svd(r)
    eps, tiny = torch.finfo(r.dtype).eps, torch.finfo(r.dtype).tiny
    floor = (eps * sigma[0]).clamp_min(tiny)
    s = (left * (floor / sigma.clamp_min(floor))) @ right
    s = s / torch.linalg.vector_norm(s, dim=0)

    removed = w - s * (s * w).sum(0)  # (I − QᵢQᵢᵀ) ωᵢ = ωᵢ − Q (wᵢ − sᵢ sᵢᵀ wᵢ)
    u, product = omega - q @ removed, y - z @ removed
    scale = (size - k + 1) / u.square().sum(0)
    samples = h.diagonal().sum() - (s * (h @ s)).sum(0) + scale * (u * product).sum(0)
    estimate = average(samples, 2 * k)
    # k = 1 only where D = 1
    return (
        estimate
        if k > 1
        else StochasticEstimate(estimate.value, torch.zeros_like(estimate.value), 2 * k)
    )


TRACES: dict[str, Callable[[Operator, int, torch.Generator], StochasticEstimate]] = {
    "hutchinson": hutchinson,
    "hutch++": hutchpp,
    "xtrace": xtrace,
}
"""Estimators of a trace, {name: (operator, products at most, generator) → Estimate}."""


def hutchinson_diagonal(
    operator: Operator, products: int, generator: torch.Generator
) -> StochasticEstimate:
    """Estimate the diagonal by the mean of ω ∘ (A ω) over `products` ≥ 2 Rademacher vectors.

    Bekas, Kokiopoulou, Saad 2007.

    Unbiased, and exact for a diagonal matrix. `error` is the standard error of each entry's mean;
    one sample of entry d has the variance Σ_{e≠d} A_de².
    """
    _require(products, 2, "diagonal")
    nothing = torch.zeros((), device="cpu")
    count, mean, squares = 0, nothing, nothing
    for part in _signs_times_products(operator, products, generator):
        n, centre = part.shape[1], part.mean(1)
        within = (part - centre[:, None]).square().sum(1)
        if count == 0:
            count, mean, squares = n, centre, within
            continue
        gap = centre - mean  # Chan, Golub, LeVeque 1983: two groups of samples into one
        squares = squares + within + gap.square() * (count * n / (count + n))
        mean, count = mean + gap * (n / (count + n)), count + n
    return StochasticEstimate(mean, (squares / (count * (count - 1))).sqrt(), products)


if not TYPE_CHECKING:  # to a type checker the old names are gone
    __getattr__ = moved.old_names(__name__)
