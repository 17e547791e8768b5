"""SKQN: KFAC of the data's labels as the base matrix, refined by what steps teach.

Document: S2QN (Yang et al.), Alg. 1, 3.4 and 4.

The base is that of the minibatch at hand, (17), (18): G̃ ⊗ Â, row-major. A step on minibatch k − 1
becomes a pair once the base of minibatch k is there, (10), (19), (20). The direction is −(B_k + λ_k
I)⁻¹ g_k, (7), λ_k by (8).

(17) prints G Gᵀ summed over places like A Aᵀ, which makes the product T times what (16), (20) and
KFAC have, where G is of one place: here G is the mean over places, A the sum.

Of the three P, the symmetric one alone makes (19) and (20) hold before sketching and keeps Λ̃
definite; its τ serves the worst of all columns, so that of 16 noisy ones little is learnt at once
(measured: τ near 0.03, with one column 0.8). The trace learns faster (mlp-256-20: τ 0.9, the lowest
loss) but leaves Λ̃ singular, and on the autoencoder the loss rose; the diagonal diverged.

The document's appendix is not available; what it leaves open is chosen here, once for all problems:

- p = 3 pairs of L-BFGS (3.2: "1 ∼ 5"); pairs with uᵀv < 1e-8 ‖u‖ ‖v‖ are skipped (3.2), after
  the damping of its [39];
- k = 16 columns of the sketch Ξ, normal entries; P = ½ (VᵀU + UᵀV); τ by Powell's rule, μ = 0.2;
- γ = 0.1: Λ⁰ = γ I, the start of the refinement (L: of the block; B: of the factor, Λ̃₀);
- r₁, r₂: `GradientNorm`; α_k⁻¹ is the damping, a constant unless `shrink` is below 1;
- β = 1, α⁻¹ = 30 (B: 100; at 30 both diverged on the MNIST autoencoder at step 27 to 35, with
  each of 4 and of 3 seeds), T₂ = 20 (line 2 of Alg. 1 computes H_k at every step: T₂ = 1, dear).

Why β / α⁻¹ is so small where a base is kept. The base of a minibatch's own labels contains that
minibatch's gradient: if it is exact, ‖p‖ ≤ 1 / 2√λ, whatever ‖g‖. Measured at (3, 3), T₂ = 1, no
refinement, 22 steps of a 784-100-50-10-… autoencoder: ‖p‖ is 0.2 to 0.6 while ‖g‖ goes from 18 to
300, and β pᵀ∇²Ψp / gᵀp at most 3 (above 2 the quadratic model rises). The base of one step before
does not know this gradient: ‖p‖ is 3 to 17, the ratio up to 110, that step would raise the loss by
thousands. What the base does not cover moves as by SGD of rate β / λ, which must be one at which
SGD is stable: 1/30 stands, 1/10 diverges, for the base of one minibatch and for a moving average.
Theorem 1 asks for the same, (23).

Λ̃ is held, and updated, in double precision: with Powell's rule its least eigenvalue shrinks at
every update, while V P⁻¹ Vᵀ has no bound. In single precision it was indefinite there within 24
steps (−30 beside 6·10⁴), which cancels G̃ where the gradient is.

Legend: N examples, T places, I inputs incl. the bias column, O outputs, p pairs, m columns, k
columns after sketching.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, cast

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from curvlab.curvature.base import BlockDefaults, LearntPair, Move, Secant, blend
from curvlab.curvature.kfac import FACTOR_A, FACTOR_G, Kfac
from curvlab.errors import CurvlabError, check_values, lookup
from curvlab.layers import Block
from curvlab.linalg.block_bfgs import (
    BlockUpdate,
    Choice,
    block_bfgs,
    gaussian_sketch,
    parameter_secant,
    preactivation_secant,
)
from curvlab.linalg.eigenbasis import Rotated, shifted_kronecker
from curvlab.linalg.lbfgs import Memory, multiple_of_identity, refined
from curvlab.linalg.operators import Compact, Operator
from curvlab.linalg.pair_damping import powell_on_b
from curvlab.linalg.pairs import Pair, accept, undamped
from curvlab.statistics import LayerStatistics, Reads

COSINE = 1e-8
"""Cosine ε_B below which pairs are skipped: S2QN 3.2."""


def _factored(G: Float[Tensor, "O O"], A: Float[Tensor, "I I"]) -> Kfac:
    """Return KFAC of given factors."""
    kfac = Kfac()
    kfac.A, kfac.G = A, G
    return kfac


def _base(
    G: Float[Tensor, "O O"], A: Float[Tensor, "I I"], damping: float, split: bool
) -> Operator:
    """Return G ⊗ A + λ I, or λ split over the factors by π as in KFAC (thesis Alg. 12, line 19)."""
    return _factored(G, A).matrix(damping) if split else shifted_kronecker((G, A), damping)


def _base_inverse(
    G: Float[Tensor, "O O"], A: Float[Tensor, "I I"], damping: float, split: bool
) -> Operator:
    if not split:
        return shifted_kronecker((G, A), damping).inv()
    kfac = _factored(G, A)
    kfac.refresh(damping)
    return kfac.inverse


def _check(what: str, count: int | None, gamma: float) -> None:
    if count is not None and count < 0:
        raise CurvlabError(f"{what} must be 0 (no refinement) or more, not {count}")
    if not gamma >= 0 or (gamma == 0 and count != 0):
        raise CurvlabError(
            f"the refinement starts from γ I with γ above 0, not {gamma:g}; γ = 0 needs {what}=0"
        )


class SkqnL(BlockDefaults):
    """Sum B + λI = G̃ ⊗ Â + Λ + λI, Λ by L-BFGS of the block's own pairs: S2QN 3.4, (12), (13).

    Args:
        pairs: p; 0: no refinement but Λ⁰.
        gamma: γ of Λ⁰ = γ I.
        mu: of the damping of [39] (Powell's, with Λ⁰): uᵀv ≥ μ γ uᵀu. 0: pairs are only skipped.
        split: λ + γ over the factors by π as in KFAC, in place of the exact inverse in the factors'
            eigenbases.
    """

    reads: Reads = "factors"
    memory: ClassVar[tuple[str, ...]] = ("A", "G", "U", "V", "S", "Y", "left_out")
    factored = learns_pairs = compares_gradients = True
    inverse: Operator

    def __init__(
        self,
        block: Block,
        *,
        pairs: int = 3,
        gamma: float = 0.1,
        mu: float = 0.25,
        split: bool = False,
    ) -> None:
        _check("pairs", pairs, gamma)
        if not 0 <= mu <= 1:
            raise CurvlabError(f"mu must lie between 0 (no damping) and 1, not {mu:g}")
        self.pairs, self.gamma, self.mu, self.split = pairs, gamma, mu, split
        self.A: Tensor | None = None
        self.G: Tensor | None = None
        self.U: Tensor | None = None  # a step and its change of gradient, no pair yet
        self.V: Tensor | None = None
        self.S: Tensor | None = None  # u and v of the pairs, the oldest first
        self.Y: Tensor | None = None
        self.last: Pair | None = None  # for the log
        self.left_out: int = 0  # pairs so far, since they were not finite
        self.secant: Secant | None = self._secant if pairs else None

    def moments(self, statistics: LayerStatistics) -> dict[str, Tensor]:
        """Return {name: A and G of the minibatch}, which `update` folds in."""
        return {FACTOR_A: statistics.A, FACTOR_G: statistics.G}

    def update(self, statistics: LayerStatistics, weight: float) -> None:
        """Fold A and G in, and add the pair that a step has left, v = v̂ − H_k u (10).

        It is damped by `mu`, and skipped where it is to be.
        """
        self.A, self.G = blend(self.A, statistics.A, weight), blend(self.G, statistics.G, weight)
        if self.S is None or self.Y is None:
            self.S = self.Y = self.A.new_empty(0, statistics.block.numel)
        if self.U is None or self.V is None:
            return
        # (10): v = v̂ − H_k u
        u, v = (
            self.U.flatten(),
            (self.V - self.G @ self.U @ self.A).flatten(),
        )
        start = multiple_of_identity(self.gamma, u)
        pair = (
            powell_on_b(u, v, start, start.inv(), self.mu)
            if self.mu
            else undamped(u, v, start.inv())
        )
        self.last = accept(pair, cosine=COSINE)
        self.left_out += self.last.skipped == "not finite"
        if not self.last.skipped:
            kept = Memory(self.pairs, self.S, self.Y).append(pair.s, pair.y)
            self.S, self.Y = kept.S, kept.Y
        self.U = self.V = None

    def refresh(self, damping: float) -> None:
        """Set `inverse` by S2QN (13).

        Without pairs it is that of G̃ ⊗ Â + (γ + λ) I, or of the factors as `split` damps them.
        Raises Diverged where the matrix is not positive definite.
        """
        assert self.A is not None
        assert self.G is not None
        assert self.S is not None
        if len(self.S):
            self.inverse = _one_precision(self.matrix(damping).inv())  # (13)
        else:
            self.inverse = _base_inverse(self.G, self.A, self.gamma + damping, self.split)

    def _secant(self, before: LayerStatistics, after: LayerStatistics, move: Move) -> None:
        self.U, self.V = move(), after.gradient - before.gradient  # Alg. 1, line 5

    def learnt(self) -> list[LearntPair]:
        """Return the last pair of the block's parameters: B = Λ⁰ = γ I, and μ γ is its μ₂."""
        if self.last is None:
            return []
        mu2 = self.mu * self.gamma or math.nan
        return [LearntPair(which="step", pair=self.last, mu2=mu2, gamma=self.gamma)]

    def forget_learnt(self) -> None:
        """Drop the record of the last pair."""
        self.last = None

    def matrix(self, damping: float = 0.0) -> Operator:
        """Return B + λI, an approximation of the Hessian."""
        assert self.A is not None
        assert self.G is not None
        assert self.S is not None
        assert self.Y is not None
        base = _base(self.G, self.A, self.gamma + damping, self.split)  # H̃
        if not len(self.S):
            return base
        start = multiple_of_identity(self.gamma, self.S[0])
        if not isinstance(base, Rotated):
            return refined(base, Memory(self.pairs, self.S, self.Y), start)
        # γ I is the same in every basis, and turned pairs have the products of the pairs: so the
        # pairs are turned into the eigenbases once, where the base is diagonal.
        rows, count = (
            base.rotated(torch.cat([self.S, self.Y]).mT).mT,
            len(self.S),
        )
        inside = refined(base.inside, Memory(self.pairs, rows[:count], rows[count:]), start)
        return Rotated(base.bases, cast(Compact, inside))


def _one_precision(operator: Operator) -> Operator:
    """Return an operator with its core, computed in double precision, in that of its rows.

    A state has the model's dtype.
    """
    if isinstance(operator, Rotated):
        return Rotated(operator.bases, cast(Compact, _one_precision(operator.inside)))
    assert isinstance(operator, Compact)
    return replace(operator, core=operator.core.to(operator.rows.dtype))


ColumnPair = tuple[Float[Tensor, "O k"], Float[Tensor, "O k"]]


@dataclass(frozen=True)
class Condition:
    """Secant condition: what a step gives, and the pairs (𝕌, 𝕍) that Λ̃ is to satisfy.

    Λ̃ 𝕌 = 𝕍 once Â and G̃ are known. `commutes`: whether the columns may be sketched before.
    """

    look: Callable[[LayerStatistics, LayerStatistics, Move], ColumnPair]
    pairs: Callable[[Tensor, Tensor, Tensor, Tensor], ColumnPair]
    commutes: bool


def _parameters(before: LayerStatistics, after: LayerStatistics, move: Move) -> ColumnPair:
    return move(), after.gradient - before.gradient


def _preactivations(before: LayerStatistics, after: LayerStatistics, move: Move) -> ColumnPair:
    """Return mat(s_k − s_{k−1}), mat(Ds_k − Ds_{k−1}) of each example's own loss.

    They have a column for each example and place.
    """
    return (after.h - before.h).flatten(0, 1).mT, (after.g[0] - before.g[0]).flatten(0, 1).mT


CONDITIONS: dict[str, Condition] = {
    "parameters": Condition(_parameters, parameter_secant, False),  # (19)
    "preactivations": Condition(
        _preactivations, lambda U, V, A, G: preactivation_secant(U, V, G), True
    ),  # (20)
}


class SkqnB(BlockDefaults):
    """Sum B + λI = (G̃ + Λ̃) ⊗ Â + λI, Λ̃ by sketched block BFGS: S2QN (18), (21), (22).

    Args:
        block: whose parameters.
        condition: of `CONDITIONS`: "parameters" (19), `skqn-b1`; "preactivations" (20), `skqn-b2`.
        columns: k of the sketch; None: no sketch; 0: no refinement but Λ̃₀.
        gamma: γ of Λ̃₀ = γ I.
        choice: P of (21).
        mu: of Powell's rule for τ.
        tau: τ itself, in its place.
        split: λ over the factors by π as in KFAC, in place of the exact inverse in the factors'
            eigenbases.
        seed: of the sketches.
    """

    reads: Reads = "factors"
    memory: ClassVar[tuple[str, ...]] = ("A", "G", "U", "V", "Lambda", "draws", "left_out")
    factored = learns_pairs = True
    inverse: Operator

    def __init__(
        self,
        block: Block,
        *,
        condition: Literal["parameters", "preactivations"],
        columns: int | None = 16,
        gamma: float = 0.1,
        choice: Choice = "symmetric",
        mu: float = 0.2,
        tau: float | None = None,
        split: bool = False,
        seed: int = 0,
    ) -> None:
        _check("columns", columns, gamma)
        check_values(
            ("mu", mu, 0 < mu <= 1, "above 0 and at most 1"),
            (
                "tau",
                1.0 if tau is None else tau,
                tau is None or 0 <= tau <= 1,
                "between 0 and 1, or none for Powell's rule",
            ),
            ("seed", seed, seed >= 0, "0 or positive"),
        )
        self.condition = lookup(CONDITIONS, condition, "condition")
        self.compares_gradients = condition == "parameters"
        self.columns, self.gamma, self.choice, self.mu, self.tau = columns, gamma, choice, mu, tau
        self.split, self.seed, self.draws = split, seed, 0
        self.A: Tensor | None = None
        self.G: Tensor | None = None
        self.U: Tensor | None = None  # what a step gave, no pairs yet
        self.V: Tensor | None = None
        self.Lambda: Tensor | None = None  # in double precision
        self.last: BlockUpdate | None = None  # for the log
        self.left_out: int = 0  # blocks of pairs so far, since they were not finite
        self.secant: Secant | None = None if columns == 0 else self._secant

    def moments(self, statistics: LayerStatistics) -> dict[str, Tensor]:
        """Return {name: A and G of the minibatch}, which `update` folds in."""
        return {FACTOR_A: statistics.A, FACTOR_G: statistics.G}

    def update(self, statistics: LayerStatistics, weight: float) -> None:
        """Fold A and G in. Where a step has left pairs, update Λ̃ by block BFGS with them (22)."""
        self.A, self.G = blend(self.A, statistics.A, weight), blend(self.G, statistics.G, weight)
        if self.Lambda is None:
            self.Lambda = self.gamma * torch.eye(
                len(self.G), dtype=torch.float64, device=self.G.device
            )
        if self.U is None or self.V is None:
            return
        U, V = self._sketched(*self.condition.pairs(self.U, self.V, self.A, self.G))
        # (22)
        self.last = block_bfgs(self.Lambda, U, V, choice=self.choice, mu=self.mu, tau=self.tau)
        self.left_out += self.last.skipped == "not finite"
        self.Lambda = self.last.matrix
        self.U = self.V = None

    def refresh(self, damping: float) -> None:
        """Set `inverse` to that of (G̃ + Λ̃) ⊗ Â + λI, S2QN (18), λ split where `split` says so."""
        assert self.A is not None
        self.inverse = _base_inverse(self._refined, self.A, damping, self.split)

    @property
    def _refined(self) -> Float[Tensor, "O O"]:
        assert self.G is not None
        assert self.Lambda is not None
        return (self.G + self.Lambda).to(self.G.dtype)  # (18)

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
        generator = torch.Generator().manual_seed(state >> 1)
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
        assert self.A is not None
        return _base(self._refined, self.A, damping, self.split)
