"""SKQN: KFAC as the base matrix, refined by what steps teach.

Document: S2QN (Yang et al.), Alg. 1, 3.4 and 4.

At step k: the base G̃ ⊗ Â of (17), (18), row-major; the step on minibatch k − 1 becomes a pair
against it, (10), (19), (20), and Λ_k is updated; the direction is −(B_k + λ_k I)⁻¹ m_k, (7). The
base is kept for T₂ steps; Λ_k and λ_k are made at every step, against the base that is kept, so
that (10) holds of the matrix that makes the direction, whatever T₂.

Labels, averages, momentum, rates are of a reading: `algorithm_readings.skqn`; (19) and (20) are in
`secant_conditions`.

(17) prints G Gᵀ summed over places like A Aᵀ, which makes the product T times what (16), (20) and
KFAC have, where G is of one place: here G is the mean over places, A the sum.

The document's appendix is not available; what it leaves open of Λ is chosen here:

- p = 3 pairs of L-BFGS (3.2: "1 ∼ 5"); pairs with uᵀv < 1e-8 ‖u‖ ‖v‖ are skipped (3.2), after
  the damping of its [39];
- k = 16 columns of the sketch Ξ, normal entries; P = ½ (VᵀU + UᵀV), which alone makes (19) and (20)
  hold before sketching and keeps Λ̃ definite;
- τ, which the document calls proper: the largest with P ⪰ μ UᵀΛ̃U, V P⁻¹ Vᵀ ⪯ Λ̃ / μ₁ and Λ̃ ⪯ hI
  after the update (Assumption 2.4), μ = μ₁ = 0.2 and h = 10 (λ_max(G̃) + γ√λ). The first alone
  leaves 10¹¹ (λ_max(G̃) + γ) within forty steps of a small autoencoder, the first two (each update
  at most 1 + 1/μ₁ times as large) 462 of it within 300 steps of `mnist-ae`;
- γ in units of λ: Λ⁰ = γλ I with γ = 0.1 (L), Λ̃₀ = γ√λ I with γ = 0.03 (B): beside λ it adds 1 + γ
  and at most 1 + γπ to the damping, whatever λ is. At λ = 0 there is no refinement.

τ serves the worst of all columns: of 16 noisy ones little is learnt at once (median τ 5e-4 on
`mnist-ae`). What the refinement adds, against the same base with Λ as it begins (256-100-50-12-…
autoencoder of MNIST, minibatches of 500, 100 steps, mean of three seeds): L 46.6 against 48.1; B1
and B2 48.3 and 48.3 against 48.3; KFAC 48.0.

Λ̃ is held, and updated, in double precision: its least eigenvalue shrinks where Powell's rule damps.

Legend: N examples, T places, I inputs incl. the bias column, O outputs, p pairs, m columns, k
columns after sketching.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, cast

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from curvlab.curvature.base import LearntPair, Move
from curvlab.curvature.kept_factors import BASE, KeptFactors
from curvlab.curvature.secant_conditions import CONDITIONS, ColumnPair
from curvlab.errors import CurvlabError, Diverged, check_values, lookup
from curvlab.layers import Block
from curvlab.linalg.block_bfgs import (
    BlockUpdate,
    Choice,
    block_bfgs,
    gaussian_sketch,
)
from curvlab.linalg.eigenbasis import Rotated, eigenbasis, largest_eigenvalue
from curvlab.linalg.kronecker import kronecker_product, pi_split
from curvlab.linalg.lbfgs import Memory, multiple_of_identity, refined
from curvlab.linalg.operators import Compact, Diagonal, Operator
from curvlab.linalg.pair_damping import powell_on_b
from curvlab.linalg.pairs import Pair, accept, undamped
from curvlab.statistics import LayerStatistics

COSINE = 1e-8
"""Cosine ε_B below which pairs are skipped: S2QN 3.2."""


def _check(what: str, count: int | None, gamma: float) -> None:
    if count is not None and count < 0:
        raise CurvlabError(f"{what} must be 0 (no refinement) or more, not {count}")
    if not gamma >= 0 or (gamma == 0 and count != 0):
        raise CurvlabError(
            f"the refinement starts from γ λ with γ above 0, not {gamma:g}; γ = 0 needs {what}=0"
        )


class SkqnL(KeptFactors):
    """Sum B + λI = G̃ ⊗ Â + Λ + λI, Λ by L-BFGS of the block's own pairs: S2QN 3.4, (12), (13).

    All in the eigenbases of G̃ and Â, which are computed once while these are kept. A pair is turned
    into them once, too: turned pairs have the products of the pairs, and γλ I is the same there.

    Args:
        pairs: p; 0: no refinement but Λ⁰.
        gamma: γ of Λ⁰ = γ λ I.
        mu: of the damping of [39] (Powell's, with Λ⁰): uᵀv ≥ μ γ λ uᵀu. 0: pairs are only skipped.
        split: λ over the factors by π as in KFAC, in place of λI.
    """

    memory: ClassVar[tuple[str, ...]] = (*BASE, "S", "Y", "start_scale")
    compares_gradients = True

    def __init__(
        self,
        block: Block,
        *,
        pairs: int = 3,
        gamma: float = 0.1,
        mu: float = 0.25,
        split: bool = True,
    ) -> None:
        _check("pairs", pairs, gamma)
        if not 0 <= mu <= 1:
            raise CurvlabError(f"mu must lie between 0 (no damping) and 1, not {mu:g}")
        super().__init__()
        self.pairs, self.gamma, self.mu, self.split = pairs, gamma, mu, split
        self.S: Tensor | None = None  # u and v of the pairs, the oldest first
        self.Y: Tensor | None = None
        self.start_scale: float = 0.0  # γλ of the last refinement
        self.last: Pair | None = None  # for the log
        self.secant = self._secant if pairs else None
        self._turned: _Turned | None = None

    def _refine(self, damping: float) -> None:
        """Add the pair that a step has left, and set `inverse` by S2QN (13).

        The pair, v = v̂ − H_k u (10), is damped by `mu`, and skipped where it is to be.
        """
        if self.kept_A is None:
            return self.refresh(damping)
        A, G = self.base
        self.start_scale = self.gamma * damping
        if self.S is None or self.Y is None:
            self.S = self.Y = A.new_empty(0, len(G) * len(A))
        if self.U is not None and self.V is not None and self.start_scale > 0:
            self._add(self.U.flatten(), (self.V - G @ self.U @ A).flatten(), self.start_scale)
        self.U = self.V = None
        if self.split and not self.gamma:  # nothing is added
            kfac = self._kfac(G)
            kfac.refresh(damping)
            self.inverse = kfac.inverse
        else:
            try:
                self.inverse = _one_precision(self.matrix(damping).inv())
            except Diverged as error:
                raise Diverged("B + λI is not positive definite: raise the damping") from error
        return None

    def _add(self, u: Float[Tensor, " D"], v: Float[Tensor, " D"], scale: float) -> None:
        start = multiple_of_identity(scale, u)
        pair = (
            powell_on_b(u, v, start, start.inv(), self.mu)
            if self.mu
            else undamped(u, v, start.inv())
        )
        self.last = accept(pair, cosine=COSINE)
        self.left_out += self.last.skipped == "not finite"
        if not self.last.skipped:
            assert self.S is not None
            assert self.Y is not None
            held, kept = self._turned, Memory(self.pairs, self.S, self.Y).append(pair.s, pair.y)
            if held is not None and held.pairs is self.S:
                rows = [*held.rows, None][-self.pairs :]
                self._turned = _Turned(kept.S, held.basis, rows)
            self.S, self.Y = kept.S, kept.Y

    def _secant(self, before: LayerStatistics, after: LayerStatistics, move: Move) -> None:
        self.U, self.V = move(), after.gradient - before.gradient  # Alg. 1, line 5

    def learnt(self) -> list[LearntPair]:
        """Return the last pair of the block's parameters: B = Λ⁰ = γλ I, and μ γλ is its μ₂."""
        if self.last is None:
            return []
        scale = self.start_scale
        return [
            LearntPair(which="step", pair=self.last, mu2=self.mu * scale or math.nan, gamma=scale)
        ]

    def forget_learnt(self) -> None:
        """Drop the record of the last pair."""
        self.last = None

    def matrix(self, damping: float = 0.0) -> Operator:
        """Return B + λI, an approximation of the Hessian; Λ⁰ as at the last refinement."""
        A, G = self.base
        (a, basis_a), (g, basis_g) = self._eigen_of("A", A), self._eigen_of("G", G)
        more_a, more_g = pi_split(A, G, damping) if self.split else (0.0, 0.0)
        shift = self.start_scale + (0.0 if self.split else damping)
        base = Diagonal(torch.outer(g + more_g, a + more_a).flatten() + shift)  # H̃
        bases, count = (basis_g, basis_a), 0 if self.S is None else len(self.S)
        if not count:
            return Rotated(bases, base)
        rows = self._rows(bases)
        start = multiple_of_identity(self.start_scale, rows[0])
        memory = Memory(self.pairs, rows[:count], rows[count:])
        return Rotated(bases, cast(Compact, refined(base, memory, start)))

    def _rows(self, bases: tuple[Tensor, Tensor]) -> Float[Tensor, "R D"]:
        """Return u, then v of the pairs in the eigenbases.

        Each is turned by itself, so that what was turned before is to the bit what it would be now.
        """
        assert self.S is not None
        assert self.Y is not None
        held, backwards = self._turned, [q.mT for q in bases]
        known = held is not None and held.pairs is self.S and held.basis is bases[0]
        rows = held.rows if held is not None and known else [None] * len(self.S)
        found = [
            row or (kronecker_product(backwards, u), kronecker_product(backwards, v))
            for row, u, v in zip(rows, self.S, self.Y, strict=True)
        ]
        self._turned = _Turned(self.S, bases[0], list(found))
        return torch.stack([u for u, _ in found] + [v for _, v in found])


@dataclass
class _Turned:
    """Pairs in an eigenbasis, None of those that are to be turned into it."""

    pairs: Tensor
    basis: Tensor
    rows: list[tuple[Tensor, Tensor] | None]


def _one_precision(operator: Operator) -> Operator:
    """Return an operator with its core, computed in double precision, in that of its rows.

    A state has the model's dtype.
    """
    if isinstance(operator, Rotated):
        return Rotated(operator.bases, cast(Compact, _one_precision(operator.inside)))
    if not isinstance(operator, Compact):
        return operator
    return replace(operator, core=operator.core.to(operator.rows.dtype))


class SkqnB(KeptFactors):
    """Sum B + λI = (G̃ + Λ̃) ⊗ Â + λI, Λ̃ by sketched block BFGS: S2QN (18), (21), (22).

    Args:
        block: whose parameters.
        condition: of `CONDITIONS`: "parameters" (19), `skqn-b1`; "preactivations" (20), `skqn-b2`.
        columns: k of the sketch; None: no sketch; 0: no refinement but Λ̃₀.
        gamma: γ of Λ̃₀ = γ √λ I, in units of what λ gives each factor (Alg. 7, line 11).
        choice: P of (21).
        mu: μ of P ⪰ μ UᵀΛ̃U, Powell's rule for τ.
        mu1: μ₁ of V P⁻¹ Vᵀ ⪯ Λ̃ / μ₁, a bound on an update; none: no bound.
        ceiling: h of Λ̃ ⪯ hI (Assumption 2.4), in units of λ_max(G̃) + γ√λ; none: no bound.
        tau: τ itself, in the place of both.
        split: λ over the factors by π as in KFAC, in place of λI, whose inverse is made in the
            factors' eigenbases.
        seed: of the sketches.
    """

    memory: ClassVar[tuple[str, ...]] = (*BASE, "Lambda", "draws")

    def __init__(
        self,
        block: Block,
        *,
        condition: Literal["parameters", "preactivations"],
        columns: int | None = 16,
        gamma: float = 0.03,
        choice: Choice = "symmetric",
        mu: float = 0.2,
        mu1: float | None = 0.2,
        ceiling: float | None = 10.0,
        tau: float | None = None,
        split: bool = True,
        seed: int = 0,
    ) -> None:
        _check("columns", columns, gamma)
        check_values(
            ("mu", mu, 0 < mu <= 1, "above 0 and at most 1"),
            (
                "mu1",
                0.5 if mu1 is None else mu1,
                mu1 is None or 0 < mu1 < 1,
                "between 0 and 1, or none for no bound",
            ),
            (
                "ceiling",
                1.0 if ceiling is None else ceiling,
                ceiling is None or ceiling > 0,
                "above 0, or none for no bound",
            ),
            (
                "tau",
                1.0 if tau is None else tau,
                tau is None or 0 <= tau <= 1,
                "between 0 and 1, or none for Powell's rule",
            ),
            ("seed", seed, seed >= 0, "0 or positive"),
        )
        super().__init__()
        self.condition = lookup(CONDITIONS, condition, "condition")
        self.compares_gradients = condition == "parameters"
        self.columns, self.gamma, self.choice = columns, gamma, choice
        self.mu, self.mu1, self.ceiling, self.tau = mu, mu1, ceiling, tau
        self.split, self.seed, self.draws = split, seed, 0
        self.Lambda: Tensor | None = None  # Λ̃, in double precision
        self.last: BlockUpdate | None = None  # for the log
        self.secant = None if columns == 0 else self._secant

    def _refine(self, damping: float) -> None:
        """Update Λ̃ with what a step has left (22); set `inverse` to that of (18) and λ."""
        if self.kept_A is None:
            return self.refresh(damping)
        A, G = self.base
        if self.Lambda is None:
            scale = self.gamma * math.sqrt(damping)
            self.Lambda = scale * torch.eye(len(G), dtype=torch.float64, device=G.device)
        top = None if self.ceiling is None else self._below(damping)
        if self.U is not None and self.V is not None:
            U, V = self._sketched(*self.condition.pairs(self.U, self.V, A, G))
            rules: dict[str, Any] = {
                "mu": self.mu,
                "mu1": self.mu1,
                "ceiling": top,
                "tau": self.tau,
            }
            self.last = block_bfgs(self.Lambda, U, V, choice=self.choice, **rules)  # (22)
            self.left_out += self.last.skipped == "not finite"
            self.Lambda = self.last.matrix
            self.U = self.V = None
        self.inverse = self._inverse(damping)
        return None

    def _below(self, damping: float) -> float | None:
        """Return h, and halve Λ̃ until it is at most h/2, so that an update has room.

        It is above after updates that have reached h, and where G̃ has become smaller. None of a G̃
        and λ that are 0.
        """
        assert self.ceiling is not None
        assert self.Lambda is not None
        size = largest_eigenvalue(self.base[1]) + self.gamma * math.sqrt(damping)
        h = self.ceiling * size
        if not 0 < h < math.inf:
            return None
        room = h / 2 * torch.eye(len(self.Lambda), dtype=torch.float64, device=self.Lambda.device)
        for _ in range(2100):  # the range of a double
            if not bool(torch.linalg.cholesky_ex(room - self.Lambda).info):
                return h
            self.Lambda = self.Lambda / 2
        raise Diverged("the refinement contains NaN or Inf: lower the learning rate")

    def _inverse(self, damping: float) -> Operator:
        if self.split:
            kfac = self._kfac(self._refined)
            kfac.refresh(damping)
            return kfac.inverse
        return self._rotated(damping).inv()

    def _rotated(self, damping: float) -> Rotated:
        """Return (G̃ + Λ̃) ⊗ Â + λI; of Â the eigenbasis is computed once while it is kept."""
        (a, basis_a), (g, basis_g) = (
            self._eigen_of("A", self.base[0]),
            eigenbasis(self._refined),
        )
        return Rotated((basis_g, basis_a), Diagonal(torch.outer(g, a).flatten() + damping))

    @property
    def _refined(self) -> Float[Tensor, "O O"]:
        G = self.base[1]
        return G if self.Lambda is None else (G + self.Lambda).to(G.dtype)  # (18)

    def _secant(self, before: LayerStatistics, after: LayerStatistics, move: Move) -> None:
        U, V = self.condition.look(before, after, move)  # Alg. 1, line 5
        self.U, self.V = self._sketched(U, V) if self.condition.commutes else (U, V)

    def _sketched(self, U: Float[Tensor, "O m"], V: Float[Tensor, "O m"]) -> ColumnPair:
        """Return U Ξ, V Ξ (22) where they have more than k columns, else U, V.

        Ξ is drawn on the CPU: the same on every device.
        """
        m = U.shape[1]
        if self.columns is None or m <= self.columns:
            return U, V
        self.draws += 1
        state = int(np.random.SeedSequence([self.seed, self.draws]).generate_state(1, np.uint64)[0])
        generator = torch.Generator("cpu").manual_seed(state >> 1)
        sketch = gaussian_sketch(m, self.columns, generator, U.dtype, torch.device("cpu")).to(
            U.device
        )
        return U @ sketch, V @ sketch

    def learnt(self) -> list[LearntPair]:
        """Return the last block of pairs of Λ̃."""
        return [] if self.last is None else [LearntPair(which="g", pair=self.last)]

    def forget_learnt(self) -> None:
        """Drop the record of the last block of pairs."""
        self.last = None

    def matrix(self, damping: float = 0.0) -> Operator:
        """Return B + λI, an approximation of the Hessian."""
        return self._kfac(self._refined).matrix(damping) if self.split else self._rotated(damping)
