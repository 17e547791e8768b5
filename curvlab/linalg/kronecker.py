"""Kronecker products: mode products, contractions, tensor-normal factors, damping splits.

Legend: k ways of a tensor G of shape [d_1, …, d_k]; U_i [d_i, d_i]; D = Π d_i; A [I, I] and G [O, O] second moments.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor


def matricize(G: Float[Tensor, "..."], i: int) -> Float[Tensor, "d_i _"]:
    """mat_i(G): way i as rows, the others row-major as columns (thesis 4.2.1)."""
    return G.movedim(i, 0).flatten(1) if G.ndim > 1 else G.reshape(-1, 1)


def contraction(G: Float[Tensor, "..."], i: int) -> Float[Tensor, "d_i d_i"]:
    """G^(i) = mat_i(G) mat_i(G)ᵀ (thesis 4.2.1)."""
    m = matricize(G, i)
    return m @ m.mT


def kronecker_product(factors: Sequence[Tensor], v: Float[Tensor, "D *K"]) -> Float[Tensor, "D *K"]:
    """(⊗ U_i) v = vec(V ×_1 U_1 ×_2 … ×_k U_k), row-major (thesis Proposition 1); columns of v one by one."""
    shape = v.shape
    out = v.reshape(*(len(u) for u in factors), -1)
    for i, u in enumerate(factors):
        out = torch.tensordot(u, out, dims=([1], [i])).movedim(0, i)
    return out.reshape(shape)


def accumulate_places_(
    matrix: Float[Tensor, "D D"], G: Float[Tensor, "T O N T O"], a: Float[Tensor, "N T I"], new: float
) -> None:
    """matrix += new · Σₙ Σ_tt' G_{n,tt'} ⊗ a_{n,t} a_{n,t'}ᵀ (thesis Theorem 3, row-major), one row of outputs at a time."""
    places, outputs, size = G.shape[:3]
    inputs = a.shape[2]
    left = a.flatten(0, 1)
    target = matrix.view(outputs, inputs, outputs * inputs)
    for o in range(outputs):
        curvature = G[:, o].permute(1, 0, 3, 2).reshape(size, places * outputs, places)  # [N, T O', T']
        right = (curvature @ a).reshape(size * places, outputs * inputs)
        target[o].addmm_(left.mT, right, alpha=new)


def tensor_normal_factors(contractions: Sequence[Float[Tensor, "d_i d_i"]]) -> tuple[Float[Tensor, "d_i d_i"], ...]:
    """Ũ_i = E[G^(i)] / (c_0^{k−1} Π_{j≠i} d_j), c_0 = (tr E[G^(i)] / Π d_j)^{1/k}: thesis (4.10).

    All factors have the same mean eigenvalue c_0. Where the statistics are zero so is c_0, and the factors are zero
    (practice: a bias before BatchNorm), not 0/0.
    """
    k = len(contractions)
    size = math.prod(len(c) for c in contractions)
    c0 = (contractions[0].diagonal().sum() / size) ** (1 / k)
    scale = torch.where(c0 > 0, c0, 1.0) ** (k - 1)
    return tuple(c / (scale * (size / len(c))) for c in contractions)


def pi_split(A: Float[Tensor, "I I"], G: Float[Tensor, "O O"], damping: float) -> tuple[float, float]:
    """(π √λ for A, √λ / π for G), π = √(trace(A ⊗ I) / trace(I ⊗ G)): thesis Alg. 12, line 19.

    π is 1 where either trace is zero.
    """
    a, g = float(A.diagonal().mean()), float(G.diagonal().mean())
    pi = math.sqrt(a / g) if a > 0 and g > 0 else 1.0
    return pi * math.sqrt(damping), math.sqrt(damping) / pi
