"""Kronecker products: mode products, contractions, splits of a damping, the nearest to a matrix.

Legend: k ways of a tensor G of shape [d_1, …, d_k]; U_i [d_i, d_i]; D = Π d_i; A [I, I] and G [O,
O] second moments; P pairs of outputs and Q pairs of inputs, rows and columns of a rearranged
matrix.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from jaxtyping import Float
from scipy.sparse.linalg import eigsh
from torch import Tensor

from curvlab.errors import CurvlabError, Diverged
from curvlab.linalg.padded_products import padded_product, second_moment
from curvlab.linalg.spectral import symmetric_eigh


class Factor(Protocol):
    """Symmetric factor of a Kronecker product that is no tensor but an operator."""

    def __len__(self) -> int: ...
    def __matmul__(self, v: Float[Tensor, "D *K"]) -> Float[Tensor, "D *K"]: ...


def matricize(G: Float[Tensor, "..."], i: int) -> Float[Tensor, "d_i _"]:
    """Return mat_i(G): way i as rows, the others row-major as columns (thesis 4.2.1)."""
    return G.movedim(i, 0).flatten(1) if G.ndim > 1 else G.reshape(-1, 1)


def mode_contraction(G: Float[Tensor, "..."], i: int) -> Float[Tensor, "d_i d_i"]:
    """Return the contraction G^(i) = mat_i(G) mat_i(G)ᵀ (thesis 4.2.1)."""
    m = matricize(G, i)
    return second_moment(m.mT)


def kronecker_product(
    factors: Sequence[Tensor | Factor], v: Float[Tensor, "D *K"]
) -> Float[Tensor, "D *K"]:
    """Return (⊗ U_i) v = vec(V ×_1 U_1 ×_2 … ×_k U_k), row-major (thesis Proposition 1).

    Several columns of v are multiplied one by one.
    """
    shape = v.shape
    if v.ndim == 1 and len(factors) == 2:
        left, right = factors
        V = v.view(len(left), len(right))
        V = padded_product(left, V) if isinstance(left, Tensor) else left @ V
        return (
            padded_product(V, right.mT) if isinstance(right, Tensor) else (right @ V.mT).mT
        ).reshape(-1)
    out = v.reshape(*(len(u) for u in factors), -1)
    for i, u in enumerate(factors):
        if isinstance(u, Tensor):
            out = torch.tensordot(u, out, dims=([1], [i])).movedim(0, i)
        else:
            columns = out.movedim(i, 0)
            out = (u @ columns.flatten(1)).view(columns.shape).movedim(0, i)
    return out.reshape(shape)


def accumulate_places_(
    matrix: Float[Tensor, "D D"],
    G: Float[Tensor, "T O N T O"],
    a: Float[Tensor, "N T I"],
    new: float,
) -> None:
    """Add new · Σₙ Σ_tt' G_{n,tt'} ⊗ a_{n,t} a_{n,t'}ᵀ to `matrix`, in place.

    Thesis Theorem 3, row-major; one row of outputs at a time.
    """
    places, outputs, size = G.shape[:3]
    inputs = a.shape[2]
    left = a.flatten(0, 1)
    target = matrix.view(outputs, inputs, outputs * inputs)
    for o in range(outputs):
        # [N, T O', T']
        curvature = G[:, o].permute(1, 0, 3, 2).reshape(size, places * outputs, places)
        right = (curvature @ a).reshape(size * places, outputs * inputs)
        target[o].addmm_(left.mT, right, alpha=new)


def tensor_normal_factors(
    contractions: Sequence[Float[Tensor, "_ _"]],
) -> tuple[Float[Tensor, "_ _"], ...]:
    """Return TNT's factors Ũ_i = E[G^(i)] / (c_0^{k−1} Π_{j≠i} d_j): thesis (4.10).

    c_0 = (tr E[G^(i)] / Π d_j)^{1/k} is the mean eigenvalue of all factors alike. Where the
    statistics are zero so is c_0, and the factors are zero (practice: a bias before BatchNorm), not
    0/0.
    """
    k = len(contractions)
    size = math.prod(len(c) for c in contractions)
    c0 = (contractions[0].diagonal().sum() / size) ** (1 / k)
    scale = torch.where(c0 > 0, c0, 1.0) ** (k - 1)
    return tuple(c / (scale * (size / len(c))) for c in contractions)


def pi_split(
    A: Float[Tensor, "I *I"], G: Float[Tensor, "O O"], damping: float
) -> tuple[float, float]:
    """Return the split (π √λ for A, √λ / π for G) of a damping λ: thesis Alg. 12, line 19.

    π = √(trace(A ⊗ I) / trace(I ⊗ G)); it is 1 where either trace is zero, or so small beside the
    other that π² is 0 or ∞ in double precision. The documents' π is 0 or ∞ there (0/0 where both
    are zero) and leaves √λ / π or π √λ without a value. A zero factor is legitimate, though: of a
    layer that no example reaches all derivatives are zero. Then A ⊗ G is zero whatever π is, and an
    even split is as good as any: both factors stay positive definite, and √λ √λ is the λ of the
    damped matrix.

    Raises:
        Diverged: a trace that is not finite.
    """
    a, g = (float((m if m.ndim == 1 else m.diagonal()).mean()) for m in (A, G))
    for name, trace in (("A", a), ("G", g)):
        if not math.isfinite(trace):
            raise Diverged(
                f"the factor {name} contains NaN or Inf: its trace is {trace}, so that there is"
                " no π"
            )
    squared = a / g if a > 0 and g > 0 else 1.0
    pi = math.sqrt(squared) if 0 < squared < math.inf else 1.0
    return pi * math.sqrt(damping), math.sqrt(damping) / pi


def places_split(damping: float, places: int) -> tuple[float, float]:
    """Return the split (λ_A, λ_G) = (√T √λ, √λ / √T) of a damping λ: thesis 3.3.2; Alg. 9, line 2.

    A is summed over T places and G averaged. With one place √λ each, which chapter 2 has, and Ren
    and Goldfarb (2021, Alg. 2, line 1) for convolutions too.
    """
    return math.sqrt(places * damping), math.sqrt(damping / places)


@dataclass(frozen=True)
class NearestKronecker:
    """Nearest Kronecker product left ⊗ right to a matrix M, and how far from it.

    The factors have equal Frobenius norms; `error` is ‖M − left ⊗ right‖ / ‖M‖ (0 where M is zero).
    """

    left: Float[Tensor, "O O"]
    right: Float[Tensor, "I I"]
    error: float

    def dense(self) -> Float[Tensor, "OI OI"]:
        """Return left ⊗ right as one matrix, [O I, O I]."""
        product: Tensor = torch.kron(self.left, self.right)
        return product


def nearest_kronecker(
    matrix: Float[Tensor, "OI OI"], outputs: int, inputs: int
) -> NearestKronecker:
    """Compute the Kronecker product nearest to M in Frobenius norm, exactly, in float64.

    Van Loan and Pitsianis 1993: M rearranged as R[(o, o'), (i, i')] = M[(o, i), (o', i')] turns
    Kronecker products into matrices of rank one; the nearest of those is R's first singular pair,
    here from the Gram matrix of R's smaller side. The relative error √(1 − σ₁² / ‖M‖²) is taken
    from the residual, and so is right near 0. For a symmetric M, R falls into two parts of a
    quarter of its numbers each, between symmetric and between skew matrices.

    Args:
        matrix: M on the row-major flattening of [O, I].
        outputs: O.
        inputs: I.

    Returns:
        For a symmetric M both factors are symmetric; or both skew where that is nearer, which no
        positive semi-definite M has (its factors are positive semi-definite). The trace of `left`
        is not negative.

    Raises:
        CurvlabError: an order other than O I, NaN or Inf.
    """
    order = outputs * inputs
    if matrix.shape != (order, order):
        raise CurvlabError(
            f"the matrix is {list(matrix.shape)}, but {outputs} outputs of {inputs} inputs make"
            f" {order}×{order}"
        )
    size = float(matrix.abs().amax()) if order else 0.0
    if not math.isfinite(size):
        raise CurvlabError("the matrix contains NaN or Inf: there is no nearest Kronecker product")
    if not size:
        return NearestKronecker(
            matrix.new_zeros(outputs, outputs), matrix.new_zeros(inputs, inputs), 0.0
        )
    blocks = matrix.reshape(outputs, inputs, outputs, inputs)
    if _symmetric(matrix, size):
        parts = [(_pairs(blocks, sign, size), sign) for sign in (1, -1)]
    else:
        parts = [(blocks.permute(0, 2, 1, 3).reshape(outputs**2, inputs**2).double() / size, 0)]
    squares = [float(part.square().sum()) for part, _ in parts]
    best, chosen = _first_pair(parts[0][0]), 0
    if (
        len(parts) == 2 and squares[1] > best[0] ** 2
    ):  # σ₁ ≤ the norm: mostly there is no need to look
        skew = _first_pair(parts[1][0])
        best, chosen = (skew, 1) if skew[0] > best[0] else (best, 0)
    sigma, u, v = best
    # not ‖R‖² − σ²: near an exact product that would be what rounding leaves of two equal numbers
    residual = float(parts[chosen][0].addr_(u, v, alpha=-sigma).square().sum())
    total, rest = sum(squares), sum(squares) - squares[chosen]
    sign, scale = parts[chosen][1], math.sqrt(sigma * size)
    left, right = _unrolled(u, outputs, sign) * scale, _unrolled(v, inputs, sign) * scale
    if float(left.diagonal().sum()) < 0:
        left, right = -left, -right
    return NearestKronecker(
        left.to(matrix.dtype), right.to(matrix.dtype), math.sqrt((residual + rest) / total)
    )


def _symmetric(matrix: Float[Tensor, "D D"], size: float) -> bool:
    """Return whether a matrix is symmetric up to rounding; panel by panel, without a copy of it."""
    panel, tolerance = 512, 64 * torch.finfo(matrix.dtype).eps * size
    starts = range(0, len(matrix), panel)
    return all(
        float((matrix[s : s + panel, s:] - matrix[s:, s : s + panel].mT).abs().amax()) <= tolerance
        for s in starts
    )


def _basis(size: int, sign: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Return (rows, columns, weights) of the symmetric (sign 1) or skew (−1) unit matrices.

    Weights are 1 on the diagonal, √½ off it.
    """
    rows, cols = torch.tril_indices(size, size, 0 if sign > 0 else -1, device=device)
    weights = torch.full((len(rows),), math.sqrt(0.5), dtype=torch.float64, device=device)
    return rows, cols, weights.masked_fill_(rows == cols, 1.0)


def _pairs(blocks: Float[Tensor, "O I O I"], sign: int, size: float) -> Float[Tensor, "P Q"]:
    """Return M / size of a symmetric M, rearranged, in coordinates of `_basis` on both sides.

    Symmetric unit matrices for sign 1, skew ones for −1; one row of outputs at a time.
    """
    outputs, inputs = blocks.shape[:2]
    rows, cols, weights = _basis(inputs, sign, blocks.device)
    _, _, heights = _basis(outputs, sign, blocks.device)
    out = torch.empty(len(heights), len(weights), dtype=torch.float64, device=blocks.device)
    first = 0
    for o in range(outputs):
        upto = o + 1 if sign > 0 else o
        row = blocks[o, :, :upto].transpose(0, 1).double()  # [O', I, I']
        some = slice(first, first + upto)
        torch.add(row[:, rows, cols], row[:, cols, rows], alpha=sign, out=out[some])
        first += upto
    # M[(o,i),(o',i')] ± M[(o,i'),(o',i)] is the entry itself off both diagonals, √2 of it on one, 2
    # on both
    return out.mul_((0.5 / size) / heights[:, None]).div_(weights)


def _first_pair(R: Float[Tensor, "P Q"]) -> tuple[float, Float[Tensor, " P"], Float[Tensor, " Q"]]:
    """Return (σ₁, u₁, v₁) of R.

    By the last eigenvector of the smaller Gram matrix and one power step.
    """
    if R.shape[0] > R.shape[1]:
        sigma, v, u = _first_pair(R.mT)
        return sigma, u, v
    u = _last_eigenvector(R @ R.mT)
    v = R.mT @ u
    if not bool(v.any()):
        return 0.0, u, v
    v = v / v.norm()
    u = R @ v
    sigma = float(u.norm())
    return sigma, u / sigma, v


def _last_eigenvector(gram: Float[Tensor, "P P"]) -> Float[Tensor, " P"]:
    """Return the eigenvector of the greatest eigenvalue of a Gram matrix.

    Above order 500 by ARPACK to full precision: a few products in place of all eigenvectors (100 s
    at order 5000).
    """
    if len(gram) <= 500:
        vectors: Tensor = symmetric_eigh(gram)[1]
        return vectors[:, -1]
    start = np.random.default_rng(0).standard_normal(len(gram))
    found = eigsh(gram.cpu().numpy(), k=1, which="LA", v0=start, tol=0)[1]
    return torch.from_numpy(found[:, 0]).to(gram.device)


def _unrolled(vector: Tensor, size: int, sign: int) -> Float[Tensor, "d d"]:
    """Return the matrix that has these coordinates in `_basis`.

    For sign 0 they are its own entries, row-major.
    """
    if not sign:
        return vector.view(size, size)
    rows, cols, weights = _basis(size, sign, vector.device)
    out = vector.new_zeros(size, size)
    out[rows, cols] = vector * weights
    out[cols, rows] = sign * (vector * weights)
    return out
