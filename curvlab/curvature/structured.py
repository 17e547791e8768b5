"""Structured quasi-Newton methods of the whole parameter vector: S2QN (Yang et al. 2021), Alg. 1.

B_k = H_k + Λ_k, (9): the base matrix H_k of a sample, and the refinement Λ_k, limited-memory BFGS
of what the base misses. S4QN is Hessian and refinement; subsampled Newton (SSN) the Hessian alone;
L-BFGS the refinement alone. One class, three lines of the table: "all settings of S4QN are the same
as SSN except an additional quasi-Newton matrix" (6.1).

What the document leaves open, chosen once:

| what | here |
|---|---|
| S_g | the caller's minibatch; it grows as the caller's minibatches do |
| S_H | `sample` examples of the minibatch (by default all), `growth` times as many at every step |
| p | 1 pair for S4QN: v is what *this* step's sample misses, not an older one's; 10 for L-BFGS |
| Λ⁰ | γ I of the newest pair, γ = uᵀv / uᵀu, with γ u nearest to v |
| Λ⁰ of L-BFGS | the usual γ = vᵀv / uᵀv (Nocedal, Wright (7.20)) |
| pairs | kept where uᵀv ≥ ε_B ‖u‖ ‖v‖, ε_B = 1e-8 (3.2) |
| age of pairs | those of the last p *steps*, (11): Λ goes where the base is exact |
| α_k⁻¹ | the damping, `shrink` times as large after every step |
| λ_k | α_k⁻¹, or by the rule (8) where r₁, r₂ are given |
| β_k | the learning rate, or a line search on the minibatch, then a part of the direction |
| (B + λI)⁻¹ g | conjugate gradients on the sum: one solve where (13) has 1 + 2p of them |
| of a low-rank base | (14) |

Legend: D parameters, K columns, r rows of a low-rank base; u, v̂ change of parameters and of
    gradient, v = v̂ − H u.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from curvlab.closure import Closure
from curvlab.curvature.base import NO_DATA, LearntPair, check_algorithm, check_damping
from curvlab.curvature.gradient_norm import GradientNorm
from curvlab.curvature.refinement import Refinement
from curvlab.curvature.settings import CurvatureSettings
from curvlab.curvature.states import check_vectors
from curvlab.curvature.subsample import Base as Base
from curvlab.curvature.subsample import Subsample, sampled, subsampled
from curvlab.curvature.whole_vector import (
    Search,
    WholeVectorCurvature,
    flat,
    searched,
    unflat_like,
)
from curvlab.errors import CurvlabError, Diverged, check_values, unknown
from curvlab.finite import all_finite
from curvlab.linalg.cholesky import shift_to_definite, shifted
from curvlab.linalg.krylov import Indefinite, solve_columns
from curvlab.linalg.lbfgs import (
    Memory,
    lbfgs_inverse,
    multiple_of_identity,
    refined,
    refined_low_rank,
)
from curvlab.linalg.operators import Dense, Operator
from curvlab.linalg.products import Product
from curvlab.objective import Objective
from curvlab.observation import Observation, Pass, Transition
from curvlab.soundness import check_gradients

Solver = Literal["auto", "direct", "cg"]

DIRECT = 256
"""Parameters up to which `auto` forms the matrix."""


class Structured(WholeVectorCurvature):
    """Inverse (H_k + Λ_k + λ_k I)⁻¹ on the vector of all parameters.

    Args:
        objective: whose parameters; its L2 term is a part of H_k.
        settings: labels, of a base "fisher"; damping, α_k⁻¹; T₁, steps between pairs. Everything
            else is of the minibatch at hand, so that T₂ has nothing to act on.
        base: see `Base`.
        pairs: p; 0 is no refinement.
        sample: examples in S_H at the first step; None takes the minibatch.
        growth: |S_H| grows by this factor a step, up to the minibatch.
        damping_rule: λ_k of α_k⁻¹, and how that goes on: (8).
        gamma: γ; None for that of the newest pair.
        tolerance: on ‖g − (B + λI) d‖ / ‖g‖ of conjugate gradients.
        iterations: the most of them.
        solver: auto forms the matrix of up to 256 parameters and takes conjugate gradients above; a
            base "fisher" of fewer rows than parameters, in layers with rules, and not too many
            numbers, is solved by (14).
        search: on the minibatch, from step 1; follow it with lr = 1 and no momentum.

    Where B + λI is not positive definite λ is raised for this step ("λ_k can be adjusted suitably",
    3.2).

    `work` counts examples: those seen by products with the base, by trial steps that were not
    taken, and by the base's rows.
    """

    step_needs: frozenset[Pass] = frozenset({"gradient"})
    needs: frozenset[Pass] = frozenset({"gradient"})
    rejects = False

    def __init__(
        self,
        objective: Objective,
        settings: CurvatureSettings,
        *,
        base: Base = "hessian",
        pairs: int = 1,
        sample: int | None = None,
        growth: float = 1.0,
        damping_rule: GradientNorm = GradientNorm(r1=None, r2=None),
        gamma: float | None = None,
        tolerance: float = 0.1,
        iterations: int = 100,
        solver: Solver = "auto",
        search: Search = "none",
    ) -> None:
        super().__init__(objective, settings)
        for what, value, known in (
            ("base", base, Base),
            ("solver", solver, Solver),
            ("line search", search, Search),
        ):
            if value not in get_args(known):
                raise unknown(what, value, get_args(known))
        check_values(
            (
                "pairs",
                pairs,
                pairs >= (base == "none"),
                "0 or more, or 1 or more where there is no base",
            ),
            ("sample", sample or 0, sample is None or sample >= 1, "a positive number of examples"),
            ("growth", growth, growth >= 1, "1 or more"),
            ("gamma", 1.0 if gamma is None else gamma, gamma is None or gamma > 0, "above 0"),
            ("tolerance", tolerance, 0 < tolerance < 1, "above 0 and below 1"),
            ("iterations", iterations, iterations >= 1, "1 or more"),
        )
        self.base, self.sample, self.growth, self.damping_rule = base, sample, growth, damping_rule
        self.tolerance, self.iterations, self.solver, self.search = (
            tolerance,
            iterations,
            solver,
            search,
        )
        self.refinement = Refinement(pairs, gamma, alone=base == "none")
        self.ready = False
        self.gradient_norm: float | None = None  # ‖g_{k−1}‖
        self.pending: tuple[Tensor, Tensor] | None = None  # u_{k−1}, v̂_{k−1}: v needs H_k, (10)
        self.work = {"products": 0, "trials": 0}
        self.lam = self.damping
        self._sample: Subsample | None = None

    # ---- Alg. 1

    def update(self, observation: Observation) -> None:
        """Do lines 2 to 4 of Alg. 1: base of this minibatch, newest pair, λ_k, inverse."""
        check_damping(self.damping)
        check_gradients(self.objective, observation)
        self._observation = observation
        g = flat(self.layout, observation.gradients)
        self._sample = None if self.base == "none" else self._take(observation.closure)
        pending, self.pending = self.pending, None
        if pending is not None:
            self._add(*pending)
        self.lam = self.damping_rule(self.damping, self.gradient_norm)  # (8)
        self._invert(g)
        self.gradient_norm = float(g.norm())
        self.damping *= self.damping_rule.shrink
        self.steps += 1
        self.ready = True

    @property
    def refreshed(self) -> float | None:
        """λ_k of the matrix of this minibatch, raised where it was not positive definite."""
        return self.lam if self.ready else None

    @property
    def wants_step(self) -> bool:
        """Whether the step that follows makes a pair: pairs are kept, and the schedule says so."""
        return self.refinement.most > 0 and self.steps % self.cadence.update_every == 0

    def learn(self, transition: Transition) -> bool:
        """Do line 5 of Alg. 1: the pair of this step, by two gradients. Returns True: it stands."""
        change = flat(self.layout, transition.after.gradients) - flat(
            self.layout, transition.before.gradients
        )
        self.pending = flat(self.layout, transition.step), change
        return True

    @property
    def left_out(self) -> dict[str, int | Tensor]:
        """Pairs that were left out so far since they were not finite, {"whole": number}."""
        return {"whole": self.refinement.left_out}

    @property
    def memory(self) -> Memory | None:
        """Pairs of the refinement; None where there are none."""
        return self.refinement.memory

    def precondition(self, grads: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return (B_k + λ_k I)⁻¹ g, times the step of the line search where there is one.

        Args:
            grads: {block: tensor of the block's shape} or {parameter: tensor}, for all of them.
        """
        matrix_of = self.inverse["whole"]
        g = flat(self.layout, grads)
        while True:
            try:
                d = matrix_of @ g
                break
            except Indefinite as found:
                self._raise(found.curvature)
                self._invert(g)
                matrix_of = self.inverse["whole"]
        if self.search != "none":
            far = searched(self._observation, g, d, self.search)
            self.work["trials"] += (far.trials - far.met) * self._observation.size
            d = d * far.step
        return unflat_like(self.layout, d, grads)

    # ---- the base

    def _take(self, closure: Closure) -> Subsample:
        """Return H_k of S_H, drawn from the minibatch.

        By a generator that depends on the objective's seed and the closure alone.
        """
        rows = self.base == "fisher" and self.solver == "auto"
        if self.sample is not None:
            closure = sampled(closure, math.ceil(self.sample * self.growth**self.steps))
        return subsampled(closure, self.base, self.labels, rows, self._count)

    def _count(self, examples: int) -> None:
        self.work["products"] += examples

    # ---- the refinement

    def _add(self, u: Float[Tensor, " D"], change: Float[Tensor, " D"]) -> None:
        """Add v = v̂ − H_k u, (10), to the refinement.

        H of the pair's record is, of L-BFGS, what the direction was taken with; else (Λ⁰)⁻¹ of this
        pair.
        """
        v = change
        if self._sample is not None:
            v = change - self._sample.product(u[:, None])[:, 0] - self.objective.l2_hessian * u
        if self.base != "none":
            metric = self.refinement.metric(u, v)
        else:
            if not self.ready:  # the run goes on from a state
                self._invert(u)
            metric = self._inverse
        self.refinement.add(u, v, metric, self.steps)

    # ---- the inverse

    def _invert(self, g: Float[Tensor, " D"]) -> None:
        gamma, sample = self.refinement.gamma, self._sample
        memory = self.refinement.memory_like(g)
        if sample is None:
            if self.lam == 0:
                self._inverse = lbfgs_inverse(memory, multiple_of_identity(1 / gamma, g))
            else:
                start = multiple_of_identity(gamma + self.lam, g)
                self._inverse = refined(start, memory, multiple_of_identity(gamma, g)).inv()
            return
        shift = self.lam + self.objective.l2_hessian
        if sample.Q is not None and gamma + shift > 0:
            self._inverse = refined_low_rank(sample.Q, memory, gamma, shift).inv()
            return
        size, dtype, device = len(g), g.dtype, g.device
        bare = Product(lambda v: sample.product(v) + (gamma + shift) * v, size, dtype, device)
        matrix = refined(bare, memory, multiple_of_identity(gamma, g))
        if self.solver == "direct" or (self.solver == "auto" and size <= DIRECT):
            self._inverse = self._direct(matrix)
            return
        solve = partial(solve_columns, matrix, tolerance=self.tolerance, maximum=self.iterations)
        self._inverse = Product(solve, size, dtype, device)

    def undamped(self, p: Float[Tensor, " D"]) -> Float[Tensor, " D"]:
        """Return B p of the quadratic model, with the L2 term; it counts as no work."""
        if not self.ready:
            raise CurvlabError(NO_DATA)
        gamma, sample, work = self.refinement.gamma, self._sample, dict(self.work)
        start = multiple_of_identity(gamma, p)
        base: Operator = start
        if sample is not None:
            shift = gamma + self.objective.l2_hessian
            base = Product(lambda v: sample.product(v) + shift * v, len(p), p.dtype, p.device)
        found = refined(base, self.refinement.memory_like(p), start) @ p
        self.work = work
        return found

    def learns_pairs(self) -> bool:
        """Return True, as of `CurvatureDefaults`; without pairs to keep there is none to see."""
        return True

    def learnt(self) -> list[tuple[str | None, LearntPair]]:
        """Return the last pair, of all blocks together."""
        last = self.refinement.last
        return [] if last is None else [(None, LearntPair(which="step", pair=last))]

    def forget_learnt(self) -> None:
        """Drop the record of the last pair."""
        self.refinement.last = None

    def _direct(self, matrix: Operator) -> Operator:
        """Return the inverse by Cholesky.

        λ is raised so far that the lowest eigenvalue is λ, where it was not above 0.
        """
        dense = matrix.dense()
        dense = (dense + dense.mT) / 2
        if not all_finite(dense):
            raise Diverged(
                f"the matrix of {self._blocks} contains NaN or Inf: raise the damping, or scale the"
                " data"
            )
        raised = shift_to_definite(dense, self.lam)
        self.lam += raised
        return Dense(shifted(dense, raised) if raised else dense).inv()

    def _raise(self, curvature: float) -> None:
        """Raise λ after pᵀ(B + λI)p / pᵀp = curvature ≤ 0."""
        raised = self.lam + max(
            2 * abs(curvature), self.lam, torch.finfo(self.objective.dtype).tiny
        )
        if not math.isfinite(raised):
            raise Diverged(
                f"the matrix of {self._blocks} is not positive definite at any damping: scale the"
                " data"
            )
        self.lam = raised

    @property
    def inverse(self) -> Mapping[str, Operator]:
        """Inverse {"whole": (B_k + λ_k I)⁻¹}; by conjugate gradients as good as their tolerance."""
        if not self.ready:
            raise CurvlabError(NO_DATA)
        return {"whole": self._inverse}

    # ---- the rest

    def refresh(self) -> None:
        """Do nothing: nothing is kept that could be refreshed."""
        if not self.ready:
            raise CurvlabError(NO_DATA)

    def state_dict(self) -> dict[str, Any]:
        """Return counters and pairs; the base is of a minibatch, and the next has its own."""
        state = {key: getattr(self, key) for key in _STATE}
        pairs = {
            "pairs": self.refinement.packed(),
            "ages": self.refinement.ages,
            "pending": _listed(self.pending),
        }
        state |= pairs | {"pairs_left_out": self.refinement.left_out}
        return state | {"algorithm": self.name, "work": dict(self.work)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state.

        Raises CurvlabError, and takes nothing, where it is of another algorithm, model or dtype.
        """
        check_algorithm(state, self.name)
        pairs, pending = state["pairs"], state["pending"]
        held = {
            f"{name} {i}": t
            for name, both in (("pairs", pairs), ("pending", pending))
            for i, t in enumerate(both or ())
        }
        check_vectors(self.objective.layout, held, self.objective.dtype)
        kept, ages = {key: state[key] for key in _STATE}, state["ages"]
        self.work = dict(state["work"])
        for key, value in kept.items():
            setattr(self, key, value)
        self.refinement.restore(pairs, ages, state.get("pairs_left_out", 0))
        self.pending = None if pending is None else (pending[0].clone(), pending[1].clone())
        self.ready = False

    @property
    def _blocks(self) -> str:
        return ", ".join(f"block {b.name}" for b in self.objective.blocks)


_STATE = ("steps", "damping", "lam", "gradient_norm")


def _listed(pair: tuple[Tensor, Tensor] | None) -> list[Tensor] | None:
    return None if pair is None else list(pair)
