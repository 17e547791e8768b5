"""Block BFGS, which learns from several pairs at once, and the pairs of a Kronecker factor.

Document: S2QN (Yang et al.), section 4.

Legend: D order; U, V blocks of m pairs as columns [D, m], Λ the matrix that they refine; Ξ sketch
[m, k]; r ≤ m a rank; O outputs, I inputs of a layer; A [I, I] and G [O, O] second moments of inputs
and of derivatives.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from curvlab.errors import CurvlabError, guard_memory
from curvlab.finite import all_finite
from curvlab.linalg.pair_damping import powell_factor
from curvlab.linalg.pairs import Skip
from curvlab.linalg.spectral import eigvalsh, symmetric_eigh

Choice = Literal["symmetric", "trace", "diagonal"]
"""P of S2QN (21): ½ (VᵀU + UᵀV), Tr(VᵀU) or diag(VᵀU)."""


@dataclass(frozen=True)
class BlockUpdate:
    """Matrix Λ⁺ after a block update, and the record of how it was made.

    `least` is the least eigenvalue of P relative to P at V = ΛU, before damping: sᵀy / sᵀBs where
    there is one pair. `rank` is that of U. "curvature" is why an update is skipped for which P is
    not positive definite.
    """

    matrix: Float[Tensor, "D D"]
    least: float
    tau: float
    rank: int
    skipped: Skip = ""


def block_bfgs(
    Lambda: Float[Tensor, "D D"],
    U: Float[Tensor, "D m"],
    V: Float[Tensor, "D m"],
    *,
    choice: Choice = "symmetric",
    mu: float = 0.2,
    mu1: float | None = None,
    ceiling: float | None = None,
    tau: float | None = None,
) -> BlockUpdate:
    """Return Λ⁺ = Λ + V P⁻¹ Vᵀ − Λ U (UᵀΛU)⁻¹ UᵀΛ: S2QN (21), damped.

    V ← τ V + (1 − τ) Λ U first, so that P is positive definite.

    Λ⁺ U = V where VᵀU is symmetric and P is "symmetric". No symmetric Λ⁺ does that where VᵀU is
    not, and for several pairs the other two choices do not. Λ⁺ is positive definite with
    "symmetric", positive semi-definite with the others, since a positive P leaves VᵀU free to be
    singular. One pair: BFGS with Powell's damping on B, whatever the choice.

    Directions of U that hardly add to its span are left out, so that there may be more columns than
    rows.

    Args:
        Lambda: Λ, positive definite; in the precision that the update is to have. What only the
            rounding of U makes is left out.
        U: changes of the variable as columns.
        V: changes of the gradient, column by column those of U.
        choice: which P.
        mu: without `tau`, the largest τ ≤ 1 for which P is at least μ times its value at V = ΛU:
            Powell's rule (thesis 2.3.1) for a block. S2QN says "proper τ_k".
        mu1: μ₁ of a bound on what is added: the largest τ for which V P⁻¹ Vᵀ ⪯ Λ / μ₁, too, so that
            ‖Λ⁺‖ ≤ (1 + 1/μ₁) ‖Λ‖: the block form of thesis (2.8). No rule on P alone gives that.
            None: no such bound.
        ceiling: h, the largest τ for which Λ⁺ ⪯ h I, too: S2QN's Assumption 2.4, which a bound on
            each update does not give in the end. Λ has to be below it. None: no such bound.
        tau: τ itself, without bounds. The update is skipped where it leaves P indefinite.

    An update is skipped where no τ from 0 on keeps a bound: with "diagonal" and columns that are
    nearly one, or a Λ that is not below the ceiling, or not definite but for rounding.

    Raises:
        CurvlabError: μ₁ that is not between 0 and 1, pairs too many for the memory.
    """
    if mu1 is not None and not 0 < mu1 < 1:
        raise CurvlabError(f"mu1 must lie between 0 and 1, not {mu1:g}")
    m = U.shape[1]
    guard_memory(4 * m**2 * U.element_size(), f"a block of {m} pairs", "sketch it")
    eps = torch.finfo(U.dtype).eps
    U, V = U.to(Lambda.dtype), V.to(Lambda.dtype)
    LU = Lambda @ U
    W, M = U.mT @ LU, V.mT @ U
    if not (all_finite(W) and all_finite(M)):
        return BlockUpdate(Lambda, math.nan, 1.0, 0, "not finite")
    R = _whitening(W, eps)
    rank, whole = R.shape[1], LU @ R  # ΛU (UᵀΛU)⁻¹ UᵀΛ = ΛUR (ΛUR)ᵀ
    if rank == 0:
        return BlockUpdate(Lambda, math.nan, 1.0, 0, "curvature")
    # P at V = ΛU, `at_one`, is what τ is measured against. In the basis R it is I, and directions
    # that U hardly has are gone before P is inverted.
    if choice == "symmetric":
        V, LU, P, at_one = V @ R, whole, _symmetrised(R.mT @ M @ R), W.new_ones(rank)
    elif choice == "trace":
        P, at_one = (
            M.diagonal().sum() * torch.eye(m, dtype=M.dtype, device=M.device),
            W.diagonal().sum().expand(m),
        )
    else:
        used = W.diagonal() > eps * W.diagonal().amax()
        V, LU, P, at_one = (
            V[:, used],
            LU[:, used],
            torch.diag(M.diagonal()[used]),
            W.diagonal()[used],
        )
    # rounding may have cost a semi-definite Λ its sign across all of U
    if choice != "symmetric" and not (len(at_one) and bool((at_one > 0).all())):
        return BlockUpdate(Lambda, math.nan, 1.0, 0, "curvature")
    # P is linear in V, so that damping makes it τ P + (1 − τ) P(ΛU), whose least eigenvalue
    # relative to P(ΛU) is τ least + 1 − τ: Powell's rule (thesis 2.3.1), sᵀBs = 1, sᵀy = least.
    if choice != "symmetric":  # whose P at V = ΛU is I
        root = at_one.rsqrt()
        relative = root[:, None] * P * root
    else:
        relative = P
    least = float(eigvalsh(relative)[0])
    if tau is None:
        tau = float(powell_factor(least, 1.0, mu))
        bounds = [] if mu1 is None else [Lambda / mu1]
        if ceiling is not None:  # what Λ⁺ may have beyond what is left of Λ
            left = Lambda - whole @ whole.mT
            bounds.append(
                ceiling * torch.eye(len(left), dtype=left.dtype, device=left.device) - left
            )
        for M in bounds:
            most = bounded_factor(M, V, LU, P, at_one)
            if math.isnan(most):
                return BlockUpdate(Lambda, least, math.nan, rank, "curvature")
            tau = min(tau, most)
    if not tau * least + (1 - tau) > 0:
        return BlockUpdate(Lambda, least, tau, rank, "curvature")
    factor, info = torch.linalg.cholesky_ex(tau * P + (1 - tau) * torch.diag(at_one))
    if info:  # positive definite but for rounding
        return BlockUpdate(Lambda, least, tau, rank, "curvature")
    columns = torch.linalg.solve_triangular(
        factor, (tau * V + (1 - tau) * LU).mT, upper=False
    ).mT  # V P⁻¹ Vᵀ, halved
    new = _symmetrised(Lambda + columns @ columns.mT - whole @ whole.mT)
    if not all_finite(new):
        return BlockUpdate(Lambda, least, tau, rank, "not finite")
    return BlockUpdate(new, least, tau, rank)


def bounded_factor(
    M: Float[Tensor, "D D"],
    V: Float[Tensor, "D m"],
    LU: Float[Tensor, "D m"],
    P: Float[Tensor, "m m"],
    at_one: Float[Tensor, " m"],
) -> float:
    """Return the largest τ ≤ 1 with V_τᵀ M⁻¹ V_τ ⪯ P_τ, V_τ = τV + (1 − τ)ΛU.

    By Schur's complement it is the largest with V_τ P_τ⁻¹ V_τᵀ ⪯ M. With M = LLᵀ and E_τ = L⁻¹V_τ
    the condition is [[P_τ, E_τᵀ], [E_τ, I]] ⪰ 0, which is affine in τ: those τ are an interval from
    0 on, and its end is one eigenvalue of a matrix of order 3m at most.

    Args:
        M: the bound.
        V: V.
        LU: ΛU, V at τ = 0.
        P: P of V.
        at_one: P of ΛU, a diagonal.

    Returns:
        τ; NaN where the condition does not hold at τ = 0, or M is not positive definite.
    """
    factor, info = torch.linalg.cholesky_ex(M)
    if info:
        return math.nan
    m = V.shape[1]
    both = torch.linalg.solve_triangular(factor, torch.cat([LU, V], 1), upper=False)
    D, C = torch.linalg.qr(both).R.split(m, 1)  # the products of the columns, in few rows
    start = torch.zeros(m + len(D), m + len(D), dtype=V.dtype, device=V.device)
    move = start.clone()
    start[:m, :m], move[:m, :m] = torch.diag(at_one), P - torch.diag(at_one)
    start[m:, :m], start[:m, m:] = D, D.mT
    start[m:, m:].fill_diagonal_(1.0)
    move[m:, :m], move[:m, m:] = C - D, (C - D).mT
    root, info = torch.linalg.cholesky_ex(start)
    if info:
        return math.nan
    half = torch.linalg.solve_triangular(root, move, upper=False)
    turned = torch.linalg.solve_triangular(root, half.mT, upper=False)
    if not all_finite(turned):
        return math.nan
    least = float(eigvalsh(_symmetrised(turned))[0])  # start + τ move ⪰ 0: 1 + τ least ≥ 0
    return 1.0 if least >= -1 else -1 / least


def sketched_block_bfgs(
    Lambda: Float[Tensor, "D D"],
    U: Float[Tensor, "D m"],
    V: Float[Tensor, "D m"],
    sketch: Float[Tensor, "m k"],
    *,
    choice: Choice = "symmetric",
    mu: float = 0.2,
    mu1: float | None = None,
    ceiling: float | None = None,
    tau: float | None = None,
) -> BlockUpdate:
    """Return `block_bfgs` of the compressed pairs U Ξ and V Ξ: S2QN (22).

    Ξ compresses columns, where (22) prints Ξ U and Ξ V (practice).
    """
    return block_bfgs(
        Lambda, U @ sketch, V @ sketch, choice=choice, mu=mu, mu1=mu1, ceiling=ceiling, tau=tau
    )


def gaussian_sketch(
    m: int, k: int, generator: torch.Generator, dtype: torch.dtype, device: torch.device
) -> Float[Tensor, "m k"]:
    """Draw Ξ, [m, k], of independent normal entries with E ΞΞᵀ = I.

    S2QN does not say which sketch it took.
    """
    return torch.randn(m, k, generator=generator, dtype=dtype, device=device) / math.sqrt(k)


def _whitening(W: Float[Tensor, "m m"], eps: float) -> Float[Tensor, "m r"]:
    """Return R with Rᵀ W R = I, [m, r], from the eigenvectors of W.

    Those whose eigenvalues are lost in rounding to `eps` are left out.
    """
    values, vectors = symmetric_eigh(_symmetrised(W))
    used = values > len(W) * eps * values[-1].clamp_min(0)
    kept: Tensor = vectors[:, used] * values[used].rsqrt()
    return kept


def _symmetrised(M: Float[Tensor, "m m"]) -> Float[Tensor, "m m"]:
    return (M + M.mT) / 2


def parameter_secant(
    U: Float[Tensor, "O I"],
    V: Float[Tensor, "O I"],
    A: Float[Tensor, "I I"],
    G: Float[Tensor, "O O"],
    *,
    as_printed: bool = False,
) -> tuple[Float[Tensor, "O I"], Float[Tensor, "O I"]]:
    """Return (U A, V − G U A), the pair of Λ in the secant condition of the weights: S2QN (19).

    Λ U A = V − G U A is the condition that (A ⊗ (G + Λ)) vec U = vec V.

    Args:
        U: change of the weights.
        V: change of their gradient.
        A: second moments of the inputs (S2QN (17), (18)).
        G: second moments of the derivatives (S2QN (17), (18)).
        as_printed: U in place of U A. (19) prints Λ U = V − G U A, but drops an A from what it is
            said to be equivalent to.
    """
    UA = U @ A
    return (U if as_printed else UA), V - G @ UA


def preactivation_secant(
    U: Float[Tensor, "O m"], V: Float[Tensor, "O m"], G: Float[Tensor, "O O"]
) -> tuple[Float[Tensor, "O m"], Float[Tensor, "O m"]]:
    """Return (U, V − G U), the pair of Λ for which (G + Λ) U = V: S2QN (20).

    U and V have a column for each example and place: changes of h and of ∂ℓ/∂h.
    """
    return U, V - G @ U
