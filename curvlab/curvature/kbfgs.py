"""Kronecker-factored BFGS: H_g ⊗ H_a, both learnt by (L-)BFGS.

Three documents, one class: a variant is its arguments. H_a follows A = E[Σ_t a aᵀ] by
Hessian-action BFGS; H_g follows G by damped pairs s = change of the mean pre-activation, y = change
of the mean derivative in it, over one step on one minibatch. The variants that the documents prove
to converge invert A exactly, damp or skip pairs so that a lemma holds, and take the gradient
without momentum. Their theorems (thesis 2 and 4, 2021 1) hold for falling step sizes, which are not
the default (`CONVERGENT`).

Documents: the thesis (chapter 2 is 2020; chapter 3) and 2021 (Ren, Goldfarb, whose algorithms are
numbered apart). Misprints:

- 2021 Alg. 2, line 7 averages the gradient with β and 1 − β exchanged; 3.3 and every other
  average are right.
- Section 2.3.1 of the thesis says yᵀHy ≤ 2 sᵀy/μ₁ of the test of DD-skip; Alg. 5, line 17, which
  is followed, has 1/μ₁.
- Section 2.8.2 says that H_a starts as I; Alg. 4, line 3 and practice as (A + λ_A I)⁻¹.

Legend: N examples, T places, I inputs incl. the bias column, O outputs, p pairs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, cast

import numpy as np
import torch
from torch import Tensor

from curvlab.curvature.base import BlockDefaults, FactorBounds, LearntPair, Move, PairName, blend
from curvlab.curvature.large import guard_factor
from curvlab.errors import CurvlabError, lookup
from curvlab.layers import Block
from curvlab.linalg.bfgs import updated_inverse
from curvlab.linalg.bounds import (
    Bounds,
    damped_lbfgs,
    damped_step,
    double_damping_lbfgs,
    double_damping_step,
    input_factor,
    mu3,
    within,
)
from curvlab.linalg.cholesky import damped_inverse
from curvlab.linalg.kronecker import places_split
from curvlab.linalg.lbfgs import (
    Memory,
    compact_is_cheaper,
    empty_memory,
    lbfgs_inverse,
    multiple_of_identity,
)
from curvlab.linalg.operators import Kronecker, Operator
from curvlab.linalg.pair_damping import DAMPINGS, MU1, damp
from curvlab.linalg.pairs import Flag, Pair, accept, action_pair, hessian_action
from curvlab.statistics import LayerStatistics, Reads

CHAPTER_2: Mapping[str, Any] = {
    "pair_damping": "dd",
    "minibatch": False,
    "rebalance": False,
    "start": "identity",
}
"""Arguments of thesis Alg. 4 (2020, Alg. 4); with `CONVERGENT` and `skip`: Alg. 5."""

CHAPTER_3: Mapping[str, Any] = {
    "pair_damping": "p-lm",
    "minibatch": True,
    "rebalance": True,
    "start": "damping",
}
"""Arguments of thesis Alg. 9; with `CONVERGENT` and `pi-lm`: Alg. 10. Table 3.8: #1 off is `dd`, #2
off is not `minibatch`."""

ARTICLE_2021: Mapping[str, Any] = {**CHAPTER_3, "rebalance": False, "start": "identity"}
"""Arguments of 2021 Alg. 2; with `CONVERGENT` and `pi-lm-2021`: 2021 Alg. 3."""

CONVERGENT: Mapping[str, Any] = {"pairs": 100, "exact": True}
"""L-BFGS and the exact inverse of A: thesis Alg. 5 and 10, 2021 Alg. 3. Thesis Theorems 2 and 4 and
2021 Theorem 1 need α_k = κ k^−β / (L κ̄²) besides, β in (½, 1), κ I ⪯ H_k ⪯ κ̄ I and L of the
gradient. The default rate is constant. `schedule="power"` in training, every "step", makes lr k^−β
of it; lr = κ/(L κ̄²) is the user's, and with the lemmas' κ too small to be of use."""

STARTS: dict[str, Callable[[float], float]] = {
    "identity": lambda damping_g: 1.0,
    "damping": lambda damping_g: 1 / damping_g,
}
"""λ_G → h, H_g = h I before the first pair, and at the bottom of L-BFGS: Alg. 4 and 2021 Alg. 2;
Alg. 9, line 3."""

LEMMA_STARTS: dict[str, float | None] = {"pi-lm": None, "pi-lm-2021": 1.0}
"""h of D_P(I) D_LM, where H_g starts from h I too (None: 1/μ₂): thesis Alg. 10, 11; 2021 Alg. 3,
4."""

FACTOR_A = "the K-BFGS factor A"


class KBfgs(BlockDefaults):
    """Kronecker product H = H_g ⊗ H_a of a block, learnt by (L-)BFGS.

    Args:
        pair_damping: of s and y of H_g, of `linalg.bfgs.DAMPINGS`: `dd` (Alg. 3), `p-lm` (Alg. 8;
            2021 Alg. 1), `pi-lm` (Alg. 11), `pi-lm-2021` (2021 Alg. 4).
        minibatch: A of the minibatch alone and never formed (3.15), in place of a moving average.
        rebalance: λ split over places, √T √λ for A and √λ/√T for G (Alg. 9, line 2), in place of √λ
            each.
        start: of `STARTS`.
        pairs: p of L-BFGS for H_g; 0 keeps H_g itself, by BFGS. H_g stays an operator where that
            takes fewer operations than a matrix (`linalg.lbfgs.compact_is_cheaper`).
        exact: H_a is the inverse of A + λ_A I, in place of Hessian-action BFGS.
        skip: pairs with sᵀy < μ₁ yᵀHy after damping are not used (Alg. 5, line 17).
        pair_decay: β of s and y: Alg. 4, line 16; Alg. 9, line 19. (`decay` is that of A; the
            documents have one β = 0.9.)
    """

    reads: Reads = "factors"
    memory: ClassVar[tuple[str, ...]] = (
        "A", "s", "y", "S", "Y", "seen", "places", "overall", "left_out",
    )  # fmt: skip
    factored = learns_pairs = True
    inverse: Operator

    def __init__(
        self,
        block: Block,
        *,
        pair_damping: str,
        minibatch: bool,
        rebalance: bool,
        start: str,
        pairs: int = 0,
        exact: bool = False,
        skip: bool = False,
        pair_decay: float = 0.9,
    ) -> None:
        lookup(DAMPINGS, pair_damping, "damping of pairs")
        if pairs < 0:
            raise CurvlabError(
                f"pairs must be 0 (BFGS) or the number that L-BFGS keeps, not {pairs}"
            )
        if not 0 <= pair_decay < 1:
            raise CurvlabError(f"pair_decay must be at least 0 and below 1, not {pair_decay:g}")
        self.block, self.pairs, self.pair_decay = block, pairs, pair_decay
        self.pair_damping, self.minibatch, self.rebalance = pair_damping, minibatch, rebalance
        self.exact, self.skip = exact, skip
        self._start = lookup(STARTS, start, "start of H_g")
        self.A: Tensor | None = None
        self.s: Tensor | None = None
        self.y: Tensor | None = None
        self.S: Tensor | None = None  # the pairs of L-BFGS, the oldest first
        self.Y: Tensor | None = None
        self.places, self.overall = 1, 0.0
        self.left_out: int | Tensor = 0  # pairs so far, since they or their update were not finite
        self.last: dict[str, Pair] = {}  # the last pair of each factor, for the log
        self.seen: Tensor | None = (
            None  # ā (and s = H_a ā, A s) of a minibatch that H_a has not learnt from yet
        )

    def _split(self) -> tuple[float, float]:
        """Return (λ_A, λ_G): Alg. 4, line 2; Alg. 9, line 2; 2021 Alg. 2, line 1."""
        return places_split(self.overall, self.places if self.rebalance else 1)

    @property
    def mu2(self) -> dict[str, float]:
        """Dampings of the factors, which are their pairs' μ₂: {pair: its μ₂}."""
        return dict(zip("ag", self._split(), strict=True))

    @property
    def factors(self) -> tuple[Tensor | Operator, Tensor]:
        """Pair (H_g, H_a) of factors of the inverse."""
        assert isinstance(self.inverse, Kronecker)
        H_g, H_a = self.inverse.factors
        assert isinstance(H_a, Tensor)
        return H_g, H_a

    def moments(self, statistics: LayerStatistics) -> dict[str, Tensor]:
        """Return {name: A} to be checked; {} where A is of the minibatch and never formed."""
        return (
            {FACTOR_A: statistics.A}
            if self.exact or not (hasattr(self, "inverse") and self.minibatch)
            else {}
        )

    def update(self, statistics: LayerStatistics, weight: float) -> None:
        """Fold A in (Alg. 4, line 20), and keep what `refresh` learns H_a from.

        With `minibatch`, once there is an inverse, take the minibatch's A (`exact`: Alg. 10, line
        12) or form none. Unless `exact`, keep ā, and of an A that is not formed H_a ā and A H_a ā
        (3.15).
        """
        self.places = statistics.places
        started = hasattr(self, "inverse")
        if not (
            started and self.minibatch
        ):  # of the minibatch alone: a mean in the warm start, and no more
            self.A = blend(self.A, statistics.A, weight)  # Alg. 4, line 20
        elif self.exact:
            self.A = statistics.A  # Alg. 10, line 12
        if not self.exact:
            self.seen = statistics.mean_a[None]
            if started and self.minibatch:  # A of this minibatch, not formed (3.15)
                s = self.factors[1] @ statistics.mean_a
                self.seen = torch.stack([statistics.mean_a, s, statistics.second_moment_product(s)])

    def refresh(self, damping: float) -> None:
        """Make H_a exactly at first (Alg. 4, line 3; Alg. 9, line 3), with `exact` always.

        Else learn from what was folded in.
        """
        self.overall = damping
        damping_a, damping_g = self._split()
        if self.pair_damping == "dd" and not 0 < damping_g <= 1:
            raise CurvlabError(
                f"double damping takes μ₂ = √λ in (0, 1] (thesis 2.3.1), not √{damping:g}: use"
                " another λ, or k-bfgs"
            )
        if not damping > 0:
            raise CurvlabError(
                f"K-BFGS needs a damping above 0, not {damping:g}: √λ is the μ₂ of its pairs"
            )
        if not hasattr(self, "inverse") or self.exact:
            assert self.A is not None
            H_g = self.factors[0] if hasattr(self, "inverse") else self._initial(self.A)
            # Alg. 5, line 23
            self.inverse = Kronecker((H_g, damped_inverse(self.A, damping_a, FACTOR_A)))
            self.seen = None
        self._act()
        if self.minibatch and not self.exact:
            self.A = None  # no longer needed

    def settle(self, damping: float | None) -> None:
        """Learn H_a from a minibatch that no refresh has taken up, at λ of the last one.

        So there is one Hessian action for every minibatch folded in, whatever T₂: it is O(I²).
        """
        if damping is not None:
            self._act()

    def _act(self) -> None:
        if self.seen is None:
            return
        (H_g, H_a), mean, damping_a = self.factors, self.seen[0], self._split()[0]
        if self.minibatch:
            # Alg. 9, line 16; 2021 Alg. 2, line 13
            pair = action_pair(H_a, self.seen[1], self.seen[2], damping_a)
        else:
            assert self.A is not None  # Alg. 4, lines 21 and 22
            pair = hessian_action(H_a, mean, self.A, damping_a)
        H_a, pair = updated_inverse(H_a, accept(pair, v=mean))
        self._count(pair.refused["not finite"])
        self.last["a"], self.seen = pair, None
        self.inverse = Kronecker((H_g, H_a))

    def _initial(self, like: Tensor) -> Tensor | Operator:
        if self.pairs:
            return self._limited(empty_memory(self.pairs, like.new_empty(self.block.shape[0])))
        guard_factor(self.block, self.block.shape[0], like, "H_g")
        h = self._start(self._split()[1])
        return h * torch.eye(self.block.shape[0], dtype=like.dtype, device=like.device)

    def _limited(self, memory: Memory) -> Tensor | Operator:
        """Return H_g by L-BFGS: Alg. 4, line 10; Alg. 9, line 9."""
        outputs, inputs = self.block.shape
        base = multiple_of_identity(self._start(self._split()[1]), memory.S.new_empty(outputs))
        # trusted: `accept` has let only pairs with sᵀy > 0 into the memory, so nothing need wait
        H_g = lbfgs_inverse(memory, base, trusted=True)
        return H_g if compact_is_cheaper(outputs, inputs, len(memory)) else H_g.dense()

    def secant(
        self, before: LayerStatistics, after: LayerStatistics, move: Move | None = None
    ) -> None:
        """Learn H_g from a step on one minibatch.

        A pair that is not finite is left out, and the averages of s and y, which have taken it up,
        start again: it would stay in them for good.
        """
        H_g, H_a = self.factors
        was = before.mean_g
        s, y = after.mean_h - before.mean_h, after.mean_g - was
        zero = torch.zeros_like(s)
        # Alg. 4, line 16; from zero (practice)
        mean_s = (zero if self.s is None else self.s).lerp(s, 1 - self.pair_decay)
        mean_y = (zero if self.y is None else self.y).lerp(y, 1 - self.pair_decay)
        # Alg. 4, line 17; Alg. 9, line 20
        pair = damp(self.pair_damping, mean_s, mean_y, H_g, mu1=MU1, mu2=self._split()[1])
        pair = accept(pair, v=was, mu1=MU1 if self.skip else None)
        if not self.pairs:
            assert isinstance(H_g, Tensor)
            H_g, pair = updated_inverse(H_g, pair)
        else:
            old = (
                empty_memory(self.pairs, s)
                if self.S is None or self.Y is None
                else Memory(self.pairs, self.S, self.Y)
            )
            memory = old.append_where(pair.used, pair.s, pair.y)
            self.S, self.Y = memory.S, memory.Y
            H_g = self._limited(memory)
        broken = pair.refused["not finite"]
        if isinstance(broken, Tensor):
            self.s, self.y = torch.where(broken, zero, mean_s), torch.where(broken, zero, mean_y)
        else:
            self.s, self.y = (zero, zero) if broken else (mean_s, mean_y)
        self._count(broken)
        self.last["g"] = pair
        self.inverse = Kronecker((H_g, H_a))

    def _count(self, broken: Flag) -> None:
        """Count one more pair that was left out, on the device where the CPU would have to wait."""
        self.left_out = self.left_out + (broken if isinstance(broken, Tensor) else int(broken))

    def matrix(self, damping: float = 0.0) -> Operator | None:
        """Return None: what the pairs have learnt is damped already."""
        return None

    # ---- what probes ask

    def learnt(self) -> list[LearntPair]:
        """Return the last pair of each factor, with its μ₂."""
        mu2 = self.mu2
        return [
            LearntPair(which=cast(PairName, which), pair=pair, mu2=mu2[which])
            for which, pair in self.last.items()
        ]

    def forget_learnt(self) -> None:
        """Drop the record of the last pairs."""
        self.last = {}

    def pairs_held(self) -> int:
        """Return the number of pairs in H_g by L-BFGS; 0 of BFGS."""
        return 0 if self.S is None else len(self.S)

    def input_norm(self) -> float | None:
        """Return the r.m.s. of the inputs in the A that H_a inverts, None where it inverts none.

        They are of whatever minibatches: φ is not below it.
        """
        if not self.exact or self.held is None:
            return None
        H_a, biased = self.factors[1].double(), self.block.biased
        squares = float(torch.linalg.inv(H_a).trace() - len(H_a) * self.mu2["a"]) / self.places
        return math.sqrt(max(0.0, squares - biased) / max(1, len(H_a) - biased))

    def bounds(self, damping: float | None, phi: float) -> FactorBounds:
        """Return what is proven of H_a, of H_g by L-BFGS, and of their product.

        Of H_a where it inverts A + λ_A I, of H_g from its pairs, at the dampings of the last
        refresh, which the block keeps. Thesis Lemmas 1, 2, 3, 6, 7; 2021 Lemma 3.
        """
        a, g = self._input_bounds(phi), self._output_bounds()
        return FactorBounds(a=a, g=g, product=None if a is None or g is None else a * g)

    def _input_bounds(self, phi: float) -> Bounds | None:
        """Bound H_a: thesis Lemma 1, (3.17) in Lemma 7."""
        if not self.exact:
            return None
        inputs = self.block.shape[1] + (not self.block.biased)
        return input_factor(inputs, phi, self.mu2["a"], self.places)

    def _output_bounds(self) -> Bounds | None:
        """Bound H_g: thesis Lemma 2 as long as no pair was dropped; Lemma 6, 2021 Lemma 3."""
        if not self.pairs:
            return None
        count, mu2 = self.pairs_held(), self.mu2["g"]
        if self.pair_damping == "dd" and self.skip and count < self.pairs:
            return double_damping_lbfgs(count, MU1, mu2)
        if self.pair_damping in LEMMA_STARTS:
            start = LEMMA_STARTS[self.pair_damping]
            if self._start(mu2) == (start or 1 / mu2):
                return damped_lbfgs(count, MU1, mu2, start)
        return None

    def update_bounds(self, norm_B: float, norm_H: float, held: int) -> tuple[float, float] | None:
        """Return the bounds (‖B⁺‖, ‖H⁺‖) of H_g's last update; None where nothing is proven of it.

        From the norms and the pairs `held` before it, by thesis (2.8), (2.10) or Lemma 5, 2021
        Lemma 2, where the pair was used and dropped none. It must satisfy the premise, sᵀs ≤ sᵀy/μ₂
        and yᵀHy ≤ sᵀy/μ₁ or yᵀy ≤ sᵀy/μ₃.
        """
        pair = self.last.get("g")
        dropped = self.pairs and held == self.pairs
        if pair is None or pair.skipped or dropped:
            return None
        mu2, after = self.mu2["g"], pair.damping.after
        curvature, step, change = (
            np.asarray(float(x) / float(after.sy)) for x in (after.yHy, after.ss, after.yy)
        )
        if not within(step, 1 / mu2):
            return None
        if self.pair_damping in LEMMA_STARTS:
            third = mu3(MU1, mu2, LEMMA_STARTS[self.pair_damping])
            return damped_step(norm_B, norm_H, mu2, third) if within(change, 1 / third) else None
        if within(curvature, 1 / MU1):
            return double_damping_step(norm_B, norm_H, MU1, mu2)
        return None
