"""Matrix normal distributions N(0, S_a ⊗ S_b): the maximum-likelihood fit, and how far it is.

Legend: K matrices G [O, I], a the side of the outputs, b that of the inputs; D = O I.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from curvlab.errors import CurvlabError
from curvlab.linalg.padded_products import second_moment
from curvlab.linalg.spectral import eigh

Spectral = tuple[Float[Tensor, "_ _"], Float[Tensor, " _"]]
"""(Q, λ) of Q diag(λ) Qᵀ, of either side."""


def flip_flop_step(
    G: Float[Tensor, "*K O I"], a: Spectral, b: Spectral
) -> tuple[Float[Tensor, "O O"], Float[Tensor, "I I"]]:
    """Return (E[G S_b⁻¹ Gᵀ] / I, E[Gᵀ S_a⁻¹ G] / O), the mean over all leading axes.

    Its fixed point is the maximum-likelihood fit of a matrix normal (Dutilleul 1999, the flip-flop,
    with both from the old values as KL-Shampoo has them: Lin et al. 2025).

    Args:
        G: one matrix or several.
        a: eigenvectors and eigenvalues, above 0, of S_a.
        b: those of S_b.
    """
    outputs, inputs = G.shape[-2:]
    right = (G @ b[0]) / b[1].sqrt()
    left = (a[0].mT @ G) / a[1].sqrt()[:, None]
    if G.ndim == 2:
        return second_moment(right.mT, 1 / inputs), second_moment(left, 1 / outputs)
    S_a, S_b = right @ right.mT / inputs, left.mT @ left / outputs
    return S_a.reshape(-1, outputs, outputs).mean(0), S_b.reshape(-1, inputs, inputs).mean(0)


def kronecker_likelihood_fit(
    G: Float[Tensor, "K O I"], iterations: int = 1000, tolerance: float = 1e-13
) -> tuple[Float[Tensor, "O O"], Float[Tensor, "I I"]]:
    """Return (S_a, S_b) of greatest likelihood of the matrices G, by the flip-flop in turn from I.

    S_a ⊗ S_b is unique, the factors up to a scalar: here their mean eigenvalues are equal.

    Args:
        G: samples, or an enumerated population, of which E[vec G vec Gᵀ] is fitted.
        iterations: at most.
        tolerance: relative change of both factors at which it stops.

    Raises:
        CurvlabError: too few matrices: a factor becomes singular.
    """
    outputs, inputs = G.shape[1:]
    S_a = torch.eye(outputs, dtype=G.dtype, device=G.device)
    S_b = torch.eye(inputs, dtype=G.dtype, device=G.device)
    for _ in range(iterations):
        old_a, old_b = S_a, S_b
        S_a = flip_flop_step(G, _spectral(S_a), _spectral(S_b))[0]
        S_b = flip_flop_step(G, _spectral(S_a), _spectral(S_b))[1]
        ratio = (S_a.diagonal().mean() / S_b.diagonal().mean()).sqrt()
        S_a, S_b = S_a / ratio, S_b * ratio
        moved = max(float((S_a - old_a).norm() / S_a.norm()), float((S_b - old_b).norm()))
        if moved < tolerance * max(1.0, float(S_b.norm())):
            break
    return S_a, S_b


def gaussian_kl(C: Float[Tensor, "D D"], S: Float[Tensor, "D D"]) -> float:
    """Return KL(N(0, C) ‖ N(0, S)) = ½ (tr S⁻¹C − D − log det S⁻¹C), both positive definite."""
    factor = torch.linalg.cholesky(S)
    inner = torch.cholesky_solve(C, factor)
    logdet = torch.linalg.slogdet(C)[1] - 2 * factor.diagonal().log().sum()
    return float((inner.diagonal().sum() - len(C) - logdet) / 2)


def _spectral(S: Float[Tensor, "d d"]) -> Spectral:
    values, vectors = eigh(S)
    if not float(values[0]) > 0:
        raise CurvlabError(
            "the likelihood of a matrix normal has no maximum at so few matrices: a factor is"
            " singular"
        )
    return vectors, values
