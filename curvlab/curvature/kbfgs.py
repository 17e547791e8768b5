"""Kronecker-factored BFGS: H_g ⊗ H_a, both learnt by (L-)BFGS: thesis chapter 2 (Alg. 4, `k-bfgs-20`) and chapter 3 (Alg. 9).

H_a follows A = E[Σ_t a aᵀ] by Hessian-action BFGS; H_g follows G by damped pairs s = change of the mean pre-activation,
y = change of the mean derivative in it, over one step on one minibatch.

Legend: N examples, T places, I inputs incl. the bias column, O outputs, p pairs.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from curvlab.capture import LayerStatistics
from curvlab.curvature.base import Move, Reads, blend
from curvlab.errors import CurvlabError
from curvlab.layers import Block
from curvlab.linalg.bfgs import Pair, accept, damp, hessian_action, minibatch_hessian_action, updated_inverse
from curvlab.linalg.factor import damped_inverse
from curvlab.linalg.kronecker import places_split
from curvlab.linalg.lbfgs import Memory, lbfgs_inverse, multiple_of_identity
from curvlab.linalg.operators import Kronecker, Operator


class KBfgs:
    """H = H_g ⊗ H_a.

    Args:
        chapter: 2 (Alg. 4): double damping `dd`, A a moving average, H_g from I. 3 (Alg. 9): damping `p-lm`, A of the minibatch
            alone and never formed (3.15), H_g from I/λ_G, λ split over places.
        pairs: p of L-BFGS for H_g; 0 keeps H_g itself, by BFGS.
        damping: of the pairs, of `linalg.bfgs.DAMPINGS`; the chapter's where None (Table 3.8 switches it alone).
        minibatch: A of the minibatch alone; the chapter's where None (likewise).
        decay: β of s and y, Alg. 4, line 16 and Alg. 9, line 19.
    """

    reads: Reads = "factors"
    memory: ClassVar[tuple[str, ...]] = ("A", "H_a", "H_g", "s", "y", "S", "Y", "seen", "places", "overall")
    inverse: Operator

    def __init__(
        self,
        block: Block,
        *,
        chapter: int,
        pairs: int = 0,
        damping: str | None = None,
        minibatch: bool | None = None,
        decay: float = 0.9,
    ) -> None:
        self.block, self.chapter, self.pairs, self.decay = block, chapter, pairs, decay
        self.damping = damping or ("dd" if chapter == 2 else "p-lm")
        self.minibatch = chapter == 3 if minibatch is None else minibatch
        self.A: Tensor | None = None
        self.H_a: Tensor | None = None
        self.H_g: Tensor | None = None
        self.s: Tensor | None = None
        self.y: Tensor | None = None
        self.S: Tensor | None = None  # the pairs of L-BFGS, the oldest first
        self.Y: Tensor | None = None
        self.places, self.overall = 1, 0.0
        self.last: dict[str, Pair] = {}  # the last pair of each factor, for the log
        self.seen: Tensor | None = None  # inputs of a minibatch that H_a has not learnt from yet

    def _split(self) -> tuple[float, float]:
        """(λ_A, λ_G): Alg. 4, line 2; Alg. 9, line 2."""
        return places_split(self.overall, self.places if self.chapter == 3 else 1)

    def update(self, statistics: LayerStatistics, weight: float) -> None:
        self.places = statistics.a.shape[1]
        if not self.minibatch or self.H_a is None:  # chapter 3 has a moving average in the warm start alone
            self.A = blend(self.A, statistics.A, weight)  # Alg. 4, line 20
        self.seen = statistics.a

    def refresh(self, damping: float) -> None:
        """H_a exactly at first (Alg. 4, line 3; Alg. 9, line 3), then one Hessian action for every minibatch seen."""
        self.overall = damping
        damping_a, damping_g = self._split()
        if self.damping == "dd" and not 0 < damping_g <= 1:
            raise CurvlabError(
                f"double damping takes μ₂ = √λ in (0, 1] (thesis 2.3.1), not √{damping:g}: use another λ, or k-bfgs"
            )
        assert self.A is not None
        if self.H_a is None or self.H_g is None:
            self.H_a = damped_inverse(self.A, damping_a, "the K-BFGS factor A")
            outputs = self.block.shape[0]
            start = 1.0 if self.chapter == 2 else 1 / damping_g
            self.H_g = start * torch.eye(outputs, dtype=self.A.dtype, device=self.A.device)
        elif self.seen is not None:
            a = self.seen
            mean = a.mean((0, 1))
            if self.minibatch:
                pair = minibatch_hessian_action(self.H_a, a, damping_a)  # Alg. 9, line 16
            else:
                pair = hessian_action(self.H_a, mean, self.A, damping_a)  # Alg. 4, lines 21 and 22
            self.H_a, self.last["a"] = updated_inverse(self.H_a, accept(pair, v=mean))
        self.seen = None
        self.inverse = Kronecker((self.H_g, self.H_a))

    def secant(self, before: LayerStatistics, after: LayerStatistics, move: Move | None = None) -> None:
        """Learn H_g from a step on one minibatch."""
        assert self.H_g is not None
        assert self.H_a is not None
        s, y = after.h.mean((0, 1)) - before.h.mean((0, 1)), after.g[0].mean((0, 1)) - before.g[0].mean((0, 1))
        zero = torch.zeros_like(s)
        self.s = blend(zero if self.s is None else self.s, s, 1 - self.decay)  # Alg. 4, line 16; from zero (practice)
        self.y = blend(zero if self.y is None else self.y, y, 1 - self.decay)
        damping_g = self._split()[1]
        pair = damp(self.damping, self.s, self.y, self.H_g, mu2=damping_g)
        pair = accept(pair, v=before.g[0].mean((0, 1)))
        if not self.pairs:
            self.H_g, pair = updated_inverse(self.H_g, pair)
        elif not pair.skipped:
            old = Memory(self.pairs, s.new_empty(0, len(s)) if self.S is None else self.S,
                         s.new_empty(0, len(s)) if self.Y is None else self.Y)  # fmt: skip
            memory = old.append(pair.s, pair.y)
            self.S, self.Y = memory.S, memory.Y
            start = 1.0 if self.chapter == 2 else 1 / damping_g
            self.H_g = lbfgs_inverse(memory, multiple_of_identity(start, s)).dense()
        self.last["g"] = pair
        self.inverse = Kronecker((self.H_g, self.H_a))

    def matrix(self, damping: float = 0.0) -> Operator | None:
        """None: what the pairs have learnt is damped already."""
        return None
