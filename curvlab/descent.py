"""Descent: momentum → curvature → weight decay → direction, and the warm start."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor

from curvlab.curvature.base import Curvature, with_defaults
from curvlab.curvature.states import REBUILD, check_dtype, check_names, check_shape
from curvlab.divergence import broken, named
from curvlab.errors import CurvlabError, Diverged
from curvlab.finite import all_short, waits
from curvlab.groups import Ownership, check_weight_decay
from curvlab.momentum import Momentum, MomentumKind
from curvlab.objective import Objective
from curvlab.observation import Observation, Pass, Transition
from curvlab.soundness import check_direction
from curvlab.steps import Decay, decayed

Batch = Any
"""A minibatch: a pair (x, y), or a mapping with the labels in it (`Objective.closure`)."""


class Descent:
    """The way in which an algorithm turns an observation into a direction; it moves nothing.

    Args:
        objective: whose blocks.
        curvature: the preconditioner.
        momentum: β of the gradient's momentum.
        momentum_kind: see `MomentumKind`.
        weight_decay: γ, decoupled: direction + γ W (thesis Alg. 15, line 19).
        learns_first: True: statistics, then direction (Alg. 15, 16, and 12, see `curvature.kfac`);
            False: direction from the statistics before this minibatch, then statistics (Alg. 4, 9).
        double_grad: the gradient is averaged with that of the last minibatch at these same weights,
            which the second look at it has given for nothing: a minibatch of twice the size, but
            for the first (2020 D.6; thesis 2.8.3).

    Raises:
        CurvlabError: an argument out of range, `double_grad` of a method without a second look, a
            parameter that is trainable and in no block.
    """

    def __init__(
        self,
        objective: Objective,
        curvature: Curvature,
        *,
        momentum: float = 0.9,
        momentum_kind: MomentumKind = "add",
        weight_decay: float = 0.0,
        learns_first: bool = True,
        double_grad: bool = False,
    ) -> None:
        check_weight_decay(weight_decay)
        if double_grad and not (curvature.wants_step and "data" in curvature.step_needs):
            raise CurvlabError(
                "double_grad needs a method that looks at each minibatch a second time, such as"
                " k-bfgs-20"
            )
        self.objective, self.curvature, self.weight_decay = objective, curvature, weight_decay
        self.momentum = Momentum(momentum, momentum_kind)
        self.learns_first, self.double_grad = learns_first, double_grad
        self.ownership = Ownership(objective)
        self.ownership.check()
        self.further: dict[
            str, Tensor
        ] = {}  # gradients of the last minibatch at these weights, of `double_grad`
        self.further_left_out = 0  # of those, since they were not finite

    @property
    def needs(self) -> frozenset[Pass]:
        """The passes that the next `direction` will read."""
        own = with_defaults(self.curvature).gradient_pass
        return self.curvature.needs | self.curvature.step_needs | {own}

    def direction(
        self,
        observation: Observation,
        decay: Decay | None = None,
        *,
        rate: float | None = None,
    ) -> dict[str, Tensor]:
        """Return {block: p}, to be followed as W ← W − α p, and update momentum and curvature.

        Args:
            observation: of the minibatch.
            decay: γ of a parameter, or of all, where it is not `weight_decay`.
            rate: the largest α: the direction is looked at, and Diverged raised where it or the
                step is not finite. None looks at nothing, and waits for no device.

        Raises:
            Diverged: the numbers of the method left the finite range, whatever error that has led
                to. Momentum is as it was.
        """
        self.ownership.check_kind()
        held = self.momentum.held
        try:
            p = self._direction(observation, decay)
            if rate is not None:
                check_direction(self.objective, p, rate)
        except Exception as error:
            self.momentum.put_back(held)
            found = of_method(self.curvature, error, observation)
            if found is error:
                raise
            raise found from error
        return p

    def _direction(self, observation: Observation, decay: Decay | None) -> dict[str, Tensor]:
        # Alg. 4 and 9 precondition by the statistics before this minibatch, Alg. 12, 15 and 16 by
        # those that it has entered. Until there is an inverse each has to learn first.
        late = not self.learns_first and self.curvature.ready
        if not late:
            self.curvature.update(observation)
        own = with_defaults(self.curvature).gradient_pass
        gradients = observation.gradients if own == "gradient" else observation.gradients_of(own)
        if self.further:
            gradients = {name: (g + self.further[name]) / 2 for name, g in gradients.items()}
            self.further = {}
        after = self.momentum.of_directions
        momentum = gradients if after else self.momentum(gradients)
        if self.momentum.mix is not None and not after:
            with_defaults(self.curvature).heed_mix(gradients, self.momentum.mix)
        with_defaults(self.curvature).heed(momentum)
        p = self.curvature.precondition(momentum)
        p = self.momentum(p) if after else p
        if late:
            self.curvature.update(observation)
        rate = self.weight_decay if decay is None else decay
        return decayed(self.objective, p, rate) if rate else p

    @property
    def wants_step(self) -> bool:
        """Whether it learns from the step that follows, by a second look at the same minibatch."""
        return self.curvature.wants_step

    @property
    def step_needs(self) -> frozenset[Pass]:
        """The passes of that second look."""
        more: frozenset[Pass] = frozenset({"gradient"}) if self.double_grad else frozenset()
        return self.curvature.step_needs | more

    def learn(self, transition: Transition) -> bool:
        """Learn from the step between two looks at one minibatch.

        Returns False where the step is to be taken back. What the second look has that is not
        finite is left out (`left_out`): the method goes on as if it had not been there.

        Raises:
            Diverged: the numbers of the method left the finite range, whatever error that has led
                to.
        """
        try:
            stands = self.curvature.learn(transition)
        except Exception as error:
            found = of_method(self.curvature, error, transition.after)
            if found is error:
                raise
            raise found from error
        if self.double_grad and stands:
            self._keep_further(transition.after.gradients)
        return stands

    def _keep_further(self, gradients: Mapping[str, Tensor]) -> None:
        """Keep the second look's gradient for the next direction, where it is finite.

        On a GPU it is not looked at: if it is not finite, the next direction is not, which is
        noted.
        """
        sound = any(map(waits, gradients.values())) or all_short(gradients.values())
        self.further = dict(gradients) if sound else {}
        self.further_left_out += not sound

    @property
    def left_out(self) -> int:
        """Second looks' pairs and gradients that were left out since they were not finite.

        To read the number waits for the device.
        """
        return sum(map(int, self._left_out.values())) + self.further_left_out

    @property
    def _left_out(self) -> Mapping[str, int | Tensor]:
        """Pairs left out by block; a curvature of one's own need not count."""
        return with_defaults(self.curvature).left_out

    def say_left_out(self) -> None:
        """Warn of each block's first pair that was left out, once; wait for the device."""
        name = with_defaults(self.curvature).name or type(self.curvature).__name__
        for block, count in self._left_out.items():
            if int(count):
                where = next(
                    (str(b) for b in self.objective.blocks if b.name == block),
                    "all blocks together",
                )
                self.objective.say(
                    f"{name}: {where}: a pair contains NaN or Inf and is left out; the method goes"
                    " on as if that minibatch had given none, and averages of pairs start again"
                    " (the log counts them: pairs_left_out)"
                )
        if self.further_left_out:
            self.objective.say(
                f"{name}: the second look's gradient contains NaN or Inf and is left out of"
                " double_grad"
            )

    def state_dict(self) -> dict[str, Any]:
        """Return the state, with shapes and dtype by which one of another model is known."""
        return {
            "blocks": {b.name: list(b.shape) for b in self.objective.blocks},
            "dtype": str(self.objective.dtype).removeprefix("torch."),
            "curvature": self.curvature.state_dict(),
            "momentum": {"buffers": dict(self.momentum.buffers), "steps": self.momentum.steps},
            "further": dict(self.further),
            "further_left_out": self.further_left_out,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` returned.

        Raises:
            CurvlabError: it is of another algorithm, model or dtype; nothing is taken.
        """
        self.check(state)
        momentum, further = (
            state["momentum"],
            {name: g.clone() for name, g in state["further"].items()},
        )
        buffers, steps = (
            {name: b.clone() for name, b in momentum["buffers"].items()},
            momentum["steps"],
        )
        self.curvature.load_state_dict(state["curvature"])
        self.momentum.buffers, self.momentum.steps, self.further = buffers, steps, further
        self.further_left_out = state.get("further_left_out", 0)

    def check(self, state: dict[str, Any]) -> None:
        """Raise CurvlabError where saved blocks or buffers are of another shape or dtype.

        Earlier versions saved no blocks.
        """
        blocks, dtype = {b.name: b for b in self.objective.blocks}, self.objective.dtype
        if "blocks" in state:
            check_names(blocks.values(), state["blocks"])
            for name, shape in state["blocks"].items():
                check_shape(blocks[name], "is", shape)
            check_dtype("the model", getattr(torch, state["dtype"]), dtype)
        for kind, tensors in (
            ("momentum", state["momentum"]["buffers"]),
            ("further gradient", state["further"]),
        ):
            for name, tensor in tensors.items():
                if name not in blocks:
                    raise CurvlabError(
                        f"the checkpoint has a {kind} of block {name} but this model has no such"
                        f" block: {REBUILD}"
                    )
                check_shape(blocks[name], f"its {kind} is", tensor.shape)
                check_dtype(blocks[name], tensor.dtype, dtype)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Return the descent of a copy of the objective.

        What was observed last, with its graph, is not copied; the state, which goes on, is.
        """
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        for value in vars(self.curvature).values():
            if isinstance(value, Observation):
                memo[id(value)] = value
        vars(new).update({name: copy.deepcopy(value, memo) for name, value in vars(self).items()})
        # products are functions, which no copy reaches: they are made again
        new.load_state_dict(self.state_dict())
        return new


def of_method(
    curvature: Curvature, error: Exception, observation: Observation | None = None
) -> Exception:
    """Return the error as Diverged, with the method's name, where numbers have raised it.

    Else it is the error itself. This is the one place for all methods.
    """
    name = with_defaults(curvature).name or type(curvature).__name__
    whole = not with_defaults(curvature).by_block() and not getattr(error, "block", "")
    where = f"{name}, all blocks together" if whole else name

    def unsound() -> bool:
        try:
            weights = (
                []
                if observation is None
                else list(observation.closure.objective.parameters.values())
            )
            seen = (
                []
                if observation is None
                or not {"gradient", "data", "plain"} & observation.passes.keys()
                else observation.gradients
            )
            return broken([weights, seen, curvature.state_dict()])
        except Exception:  # a state that cannot be told says nothing
            return False

    found = named(error, where, block="whole" if whole else "", method=name, unsound=unsound)
    return found if isinstance(found, Diverged) else error


def warm_start(
    objective: Objective,
    curvatures: Iterable[Curvature],
    batches: Iterable[Batch],
    lost: Callable[[Curvature, Diverged], None] | None = None,
) -> int:
    """Show one pass over `batches` to every curvature that has a warm start.

    One observation serves all. Returns the number of batches.

    Args:
        objective: whose minibatches.
        curvatures: some of which may have no warm start.
        batches: of the pass.
        lost: told of a curvature whose numbers leave the finite range, and of the error; the others
            go on. None: raised.
    """
    wanting = [c for c in curvatures if c.warm_needs]
    needs = frozenset[Pass]().union(*(c.warm_needs for c in wanting))
    if not wanting:
        return 0

    def each(work: Callable[[Curvature], None], observation: Observation | None = None) -> None:
        for curvature in list(wanting):
            try:
                work(curvature)
            except Exception as error:
                found = of_method(curvature, error, observation)
                if lost is not None and isinstance(found, Diverged):
                    wanting.remove(curvature)
                    lost(curvature, found)
                elif found is error:
                    raise
                else:
                    raise found from error

    count = 0
    for batch in batches:
        observation = objective.closure(batch, stream="warm").observe(needs)
        each(partial(_absorb, observation=observation), observation)
        count += 1
    if count:
        each(lambda curvature: curvature.refresh())
    return count


def _absorb(curvature: Curvature, observation: Observation) -> None:
    curvature.absorb(observation)
