"""Curvature that is made of blocks: *when* each block's statistics are updated and refreshed.

Warm start, running mean and moving average are one thing: a weight.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from curvlab.closure import Closure
from curvlab.curvature.averaging import Averaging
from curvlab.curvature.base import (
    NO_DATA,
    CurvatureBlock,
    CurvatureDefaults,
    block_with_defaults,
    check_algorithm,
    check_damping,
    with_own,
)
from curvlab.curvature.block_states import (
    checked,
    cloned,
    lacking,
    may_have,
    put_back,
    states_of,
)
from curvlab.curvature.gradient_norm import GradientNorm, total_norm
from curvlab.curvature.identity import IdentityBlock
from curvlab.curvature.levenberg_marquardt import LevenbergMarquardt, ratio_by_block
from curvlab.curvature.moments import check_folds, with_terms
from curvlab.curvature.owners import HEEDS, REFRESHES, SETTLES, share_out
from curvlab.curvature.preconditioning import (
    do_together,
    preconditioned,
    refine,
    straight_directions,
)
from curvlab.curvature.settings import CurvatureSettings
from curvlab.derivatives import precise
from curvlab.divergence import Naming
from curvlab.errors import CurvlabError, unknown, warn
from curvlab.layers import Block
from curvlab.likelihoods.base import factor_over
from curvlab.linalg.operators import Operator, identity_like, pack, unpack_operator
from curvlab.nests import plain
from curvlab.objective import Objective
from curvlab.observation import Observation, Pass, Transition
from curvlab.parallel import ALONE, Ranks
from curvlab.soundness import check_gradients
from curvlab.system.random_state import kept

Look = Callable[[Observation], Mapping[str, Any]]

_COUNTERS = ("steps", "updates", "warmed", "ready", "damping", "gradient_norm")


class BlockDiagonal(CurvatureDefaults):
    """Curvature made of blocks, and the schedule of its updates.

    Args:
        blocks: the partition.
        make: block → its CurvatureBlock.
        settings: labels, the pass that `update` reads; damping, which may be changed at any time,
            used from the next refresh on; T₁ of updates of the statistics, T₂ of refreshes of the
            inverse; the name.
        averaging: how the statistics are averaged.
        look: observation → {block: what its `update` folds in}, where that is not the statistics of
            the pass `labels`.
        fallback: the block of parameters without what `make`'s block reads.
        damping_rule: how the damping moves: with the gradient's norm (S2QN (8)), or with the
            reduction ratio of all blocks together (thesis 5.2.3); None: it stands.
        ranks: over which inverses are shared out.
        shift: what stands beside the damping wherever it is added, and beside each B in ρ: 2μ of
            an L2 term (`Objective.l2_hessian`), where a method has it in its matrix.
    """

    refreshed: float | None = None
    """λ of the last refresh; after an earlier version's state, until the next, λ of that state."""

    def __init__(
        self,
        blocks: Sequence[Block],
        make: Callable[[Block], CurvatureBlock],
        settings: CurvatureSettings,
        *,
        averaging: Averaging = Averaging(),
        look: Look | None = None,
        fallback: Callable[[], CurvatureBlock] = IdentityBlock,
        damping_rule: GradientNorm | LevenbergMarquardt | None = None,
        shift: float = 0.0,
        ranks: Ranks = ALONE,
    ) -> None:
        self._partition = {block.name: block for block in blocks}
        self.blocks = {block.name: make(block) for block in blocks}
        loose = [b for b in blocks if not may_have(b, self.blocks[b.name].reads)]
        if loose:
            names = ", ".join(p for b in loose for p in b.params)
            warn(
                "parameters of layers without a rule (or, for Kronecker factors, with groups of"
                f" outputs) follow the gradient where an algorithm needs structure: {names}"
            )
            self.blocks |= {b.name: fallback() for b in loose}
        self._fallback = fallback
        self.name, self.labels, self.damping = settings.name, settings.labels, settings.damping
        self.cadence, self.averaging = settings.cadence, averaging
        self.levenberg = damping_rule if isinstance(damping_rule, LevenbergMarquardt) else None
        self.norm_rule = damping_rule if isinstance(damping_rule, GradientNorm) else None
        self._look, self._shift, self._ranks = look, shift, ranks
        self._share_out = partial(share_out, ranks, self._partition)
        self._idle: dict[str, Operator] = {}  # of what no minibatch has reached yet: the identity
        self.gradient_norm: float | None = None  # of the last minibatch
        self.steps = self.updates = 0
        self.warmed = self.ready = False
        self._stale = False  # whether statistics are newer than the inverse
        self.shown: list[list[Tensor]] = []  # (x, y) of the warm start, averaged over "data"

    @property
    def needs(self) -> frozenset[Pass]:
        """Passes that the next `update` will read; that of the data has the gradient."""
        reads = self._folds(self.steps + 1) and not self.shown
        needed: set[Pass] = {self._pass} if reads else set()
        if self._reads_norm and self.labels != "data":
            needed.add("gradient")
        return frozenset(needed)

    @property
    def _reads_norm(self) -> bool:
        """Whether λ is of the gradient's norm."""
        return self.norm_rule is not None and self.norm_rule.r1 is not None

    @property
    def _pass(self) -> Pass:
        """Pass that `_fold` reads: of exact labels each block's own; the gradient, if no more."""
        if self.labels == "exact":
            return "apart"
        alone = (
            self.labels == "data"
            and self._look is None
            and all(b.reads == "gradient" for b in self.blocks.values())
        )
        return "gradient" if alone else self.labels

    @property
    def warm_needs(self) -> frozenset[Pass]:
        """Passes that `absorb` reads; empty where the document has no warm start."""
        return frozenset({self._pass}) if self.averaging.warm else frozenset()

    @property
    def inverse(self) -> dict[str, Operator]:
        """Operators that `precondition` applies, by block."""
        return self._inverses()

    def _inverses(self, of: Sequence[str] | None = None) -> dict[str, Operator]:
        if not self.ready:
            raise CurvlabError(NO_DATA)
        named = self.blocks if of is None else of
        return {name: self._idle.get(name) or self.blocks[name].inverse for name in named}

    def _folds(self, step: int) -> bool:
        if step == 1 and self.averaging.skips_first:
            return not self.warmed
        return step % self.cadence.update_every == 0 or not self.updates

    def _fold(self, observation: Observation, weight: float) -> None:
        passes = observation.passes
        read = self._pass if self._pass in passes else self.labels
        if self._look is None and read not in passes:
            raise unknown("pass of this observation", read, passes)
        statistics = passes[read] if self._look is None else self._look(observation)
        self._follow(statistics)
        if observation.pull and self.labels == "data":
            statistics = with_terms(statistics, self.blocks, observation.pull)
        check_folds(statistics, self.blocks, self._partition, self.labels)
        with Naming() as here:
            for name, block in self.blocks.items():
                found = statistics.get(name)
                if found is None or not getattr(
                    found, "used", True
                ):  # the exact pass has no gradient of a block without structure
                    if name not in self._idle and not hasattr(block, "inverse"):
                        self._idle[name] = identity_like(
                            observation.loss.new_empty(self._partition[name].shape)
                        )
                else:
                    here.where, here.block = self._partition[name], name
                    block.update(found, weight)
                    self._idle.pop(name, None)
        self.updates += 1
        self._stale = True

    def _follow(self, statistics: Mapping[str, Any]) -> None:
        """Let blocks whose statistics lack what their method reads follow the gradient.

        From here on; it is said in a warning.
        """
        lost = lacking(self.blocks, statistics, of_own_look=self._look is not None)
        if lost:
            told = "; ".join(
                f"{self._partition[name]} {why or 'has no such thing in this pass'}"
                for name, why in lost.items()
            )
            warn(
                f"the gradient is followed where {self.name or 'the method'} needs structure:"
                f" {told}"
            )
            self.blocks |= {name: self._fallback() for name in lost}

    def _fold_data(self, objective: Objective) -> None:
        seen, factor = 0, factor_over(objective.likelihood, (y for _, y in self.shown))
        with kept(objective.device):  # whoever draws next draws what it would have drawn
            for x, y in self.shown:
                closure = Closure(objective, x, y, 0, "warm", factor=factor)  # of no stream's count
                seen += len(closure.x)
                self._fold(closure.observe({self._pass}, move_buffers=False), len(closure.x) / seen)

    @precise()
    def update(self, observation: Observation) -> None:
        """Fold the observation in and refresh the inverse, each where the schedule says so.

        Raises:
            Diverged: a gradient or statistic that is not finite, which nothing is made of; no
                inverse.
        """
        check_gradients(observation.closure.objective, observation)
        step = self.steps + 1
        if self._folds(step) and self.shown:
            self._fold_data(observation.closure.objective)
        elif self._folds(step):
            self._fold(observation, self.averaging.weight(self.updates + 1))
        changed = self._stale or self._lambda != self.refreshed
        if self.cadence.refreshes(step, changed) or not self.ready:
            self.refresh()
        elif refine(self._live, self._partition, lambda: self._lambda + self._shift):
            self.refreshed = self._lambda
        self._settle()
        if self._reads_norm:
            self.gradient_norm = total_norm(observation.gradients)
        self.damping *= 1.0 if self.norm_rule is None else self.norm_rule.shrink
        self.steps = step

    @property
    def _lambda(self) -> float:
        """The λ that a refresh takes: the damping, or by the rule of the last gradient's norm."""
        rule = self.norm_rule
        return self.damping if rule is None else rule(self.damping, self.gradient_norm)

    @property
    def _damped(self) -> float | None:
        return None if self.refreshed is None else self.refreshed + self._shift

    def _settle(self) -> None:
        settling, damping = with_own("settle", self._live), self._damped
        self._share_out(SETTLES, settling, lambda b: block_with_defaults(b).settle(damping))

    @property
    def _live(self) -> dict[str, CurvatureBlock]:
        return {n: b for n, b in self.blocks.items() if n not in self._idle}

    @precise()
    def heed(self, momentum: Mapping[str, Tensor]) -> None:
        """Tell every block of the momentum that is preconditioned next."""
        live = self._live
        for name, block in with_own("heed", live).items():
            if name in momentum:
                block_with_defaults(block).heed(momentum[name], self._damped)
        if self._ranks.several:
            self._share_out(HEEDS, live, lambda block: None)
        else:
            do_together(b for name, b in with_own("together", live).items() if name in momentum)

    rejects = False

    @property
    def left_out(self) -> dict[str, int | Tensor]:
        """Pairs left out so far since they were not finite, by block; maybe on the device."""
        found = {name: block_with_defaults(block).left_out for name, block in self.blocks.items()}
        return {name: count for name, count in found.items() if count is not None}

    @property
    def step_needs(self) -> frozenset[Pass]:
        """Passes of the second look; none where the loss alone is wanted."""
        learning = [block_with_defaults(b) for b in self.blocks.values() if b.secant]
        if any(b.compares_gradients for b in learning):  # as in the first look, whoever else looks
            return frozenset({"data", "gradient"})
        return frozenset({"data"}) if learning else frozenset()

    @property
    def wants_step(self) -> bool:
        """Whether it will learn from the step that follows this direction.

        Alg. 9, line 12: k ≡ 0 mod T. What is refined at every step learns from every step.
        """
        learns = [block_with_defaults(b) for b in self.blocks.values() if b.secant]
        every = self.steps % self.cadence.update_every == 0
        return any(every or b.refine is not None for b in learns) or self.levenberg is not None

    @precise()
    def learn(self, transition: Transition) -> bool:
        """Learn from a step by two looks at one minibatch, each with its "data" pass.

        Returns True: the step stands.
        """
        before, after = transition.before, transition.after
        for name, block in self.blocks.items():
            if (
                block.secant is not None
                and name not in self._idle
                and before.passes["data"][name].used
                and after.passes["data"][name].used
            ):
                with Naming(self._partition[name], name):
                    move = partial(transition.step_of, name)  # no work before it is called
                    block.secant(before.passes["data"][name], after.passes["data"][name], move)
        if self.levenberg is not None:
            matrices = {n: None if n in self._idle else b.matrix() for n, b in self.blocks.items()}
            inverse, shift = self.inverse, self._shift
            rho = ratio_by_block(transition, self._partition, inverse, matrices, shift)
            self.damping = self.levenberg.adapted(self.damping, rho)
        return True

    @precise()
    def absorb(self, observation: Observation) -> None:
        """Fold a minibatch of the warm start into the plain mean over all observations so far.

        Call `refresh` after the last.
        """
        if self.averaging.warm:
            check_gradients(observation.closure.objective, observation)
            self._fold(observation, 1 / (self.updates + 1))
            self._settle()
            self.warmed = True
            if self.averaging.kind == "data":
                self.shown.append([plain(t) for t in observation.closure.keep().data])

    @precise()
    def refresh(self) -> None:
        """Invert the statistics as they stand, with the damping as it stands."""
        if not self.updates:
            raise CurvlabError(NO_DATA)
        check_damping(self.damping)
        damping = self._lambda
        self._share_out(REFRESHES, self._live, lambda b: b.refresh(damping + self._shift))
        self.refreshed = damping
        self.ready, self._stale = True, False

    @precise()
    def precondition(self, grads: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return H · grad for every block.

        Args:
            grads: {block name: tensor of the block's shape} or {parameter name: tensor}, for all or
                some blocks.

        Returns:
            The same keys and shapes.
        """
        able = with_own("direction_of", self._live) if self.ready else {}
        straight = straight_directions(able, self._partition, grads)
        rest = [name for name in grads if name not in straight] if straight else None
        return preconditioned(self._inverses(rest), self._partition, grads, straight)

    def state_dict(self) -> dict[str, Any]:
        """Return counters, statistics and the inverse as it stands.

        They are tensors, numbers, lists and dictionaries only.
        """
        counters = {key: getattr(self, key) for key in _COUNTERS}
        idle = {name: pack(operator) for name, operator in self._idle.items()}
        return counters | {
            "algorithm": self.name,
            "refreshed": self.refreshed,
            "blocks": states_of(self.blocks),
            "shown": self.shown,
            "idle": idle,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state.

        Raises CurvlabError, and takes nothing, where it is of another algorithm, model or dtype.
        """
        check_algorithm(state, self.name)
        inverses = checked(self._partition, self.blocks, state["blocks"])
        counters = {key: state[key] for key in _COUNTERS}
        self.shown = cloned(state["shown"])
        self._idle = {
            name: unpack_operator(cloned(packed)) for name, packed in state.get("idle", {}).items()
        }
        for key, value in counters.items():
            setattr(self, key, value)
        self.refreshed = state.get("refreshed", self.damping if self.ready else None)
        put_back(self.blocks, state["blocks"], inverses)
        # in the first T₂ steps, where it counts, what is folded in is taken up at once
        self._stale = False
