"""Refinement Λ_k of S2QN (Yang et al. 2021), by the pairs it keeps.

Limited-memory BFGS of what a base matrix misses.

Legend: D parameters; u change of the parameters, v change of the gradient less what the base says
of it.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from curvlab.linalg.lbfgs import Memory, empty_memory, multiple_of_identity
from curvlab.linalg.operators import Operator
from curvlab.linalg.pairs import Pair, accept, undamped

EPSILON_B = 1e-8
"""Cosine ε_B: pairs with uᵀv < ε_B ‖u‖ ‖v‖ are refused (S2QN 3.2)."""


class Refinement:
    """Pairs of Λ_k and the record of the last one.

    Args:
        most: p, the number of pairs; 0 is no refinement.
        gamma: γ of Λ⁰ = γ I; None for that of the newest pair.
        alone: whether there is no base matrix, so that Λ_k is L-BFGS.
    """

    def __init__(self, most: int, gamma: float | None, alone: bool) -> None:
        self.most, self.alone, self._given = most, alone, gamma
        self.memory: Memory | None = None
        self.ages: list[int] = []  # the step that gave each pair
        self.left_out = 0  # pairs so far, since they were not finite
        self.last: Pair | None = None  # for the log

    @property
    def gamma(self) -> float:
        """Scale γ of Λ⁰ = γ I; 0 where there is no pair and a base, 1 where there is neither."""
        if self.memory is None:
            return 1.0 if self.alone else 0.0
        if self._given is not None:
            return self._given
        u, v = self.memory.S[-1].double(), self.memory.Y[-1].double()
        return float(v @ v / (u @ v) if self.alone else u @ v / (u @ u))

    def memory_like(self, u: Float[Tensor, " D"]) -> Memory:
        """Return the pairs, for a product; empty where there are none."""
        return empty_memory(1, u) if self.memory is None else self.memory

    def metric(self, u: Float[Tensor, " D"], v: Float[Tensor, " D"]) -> Operator:
        """Return (Λ⁰)⁻¹ of this pair, beside a base; I where uᵀv is 0 or u is.

        There is no γ then, and the pair is refused for that.
        """
        gamma = abs(float(u @ v / (u @ u))) if self._given is None else self._given
        return multiple_of_identity(1 / gamma if gamma > 0 else 1.0, u)

    def add(
        self, u: Float[Tensor, " D"], v: Float[Tensor, " D"], metric: Operator, step: int
    ) -> None:
        """Keep the pair where uᵀv is positive enough (3.2).

        Beside a base, what older samples missed goes: U_k is of the steps k − p to k − 1, (11).

        Args:
            u: change of the parameters.
            v: change of the gradient, less what the base says of it.
            metric: H of the pair's record.
            step: k, the number of steps done.
        """
        memory = empty_memory(self.most, u) if self.memory is None else self.memory
        if not self.alone:
            recent = [age > step - self.most for age in self.ages]
            memory = Memory(self.most, memory.S[recent], memory.Y[recent])
            self.ages = [age for age, stays in zip(self.ages, recent, strict=True) if stays]
        self.last = accept(undamped(u, v, metric), cosine=EPSILON_B)
        self.left_out += self.last.skipped == "not finite"
        if not self.last.skipped:
            memory, self.ages = memory.append(u, v), [*self.ages, step][-self.most :]
        self.memory = memory if len(memory) else None

    def packed(self) -> list[Tensor] | None:
        """Return (u, v) of the pairs for a checkpoint, the oldest first; None without pairs."""
        return None if self.memory is None else [self.memory.S, self.memory.Y]

    def restore(self, pairs: list[Tensor] | None, ages: list[int], left_out: int) -> None:
        """Take over the pairs of a checkpoint."""
        self.memory = None if pairs is None else Memory(self.most, *(t.clone() for t in pairs))
        self.ages, self.left_out = list(ages), left_out
