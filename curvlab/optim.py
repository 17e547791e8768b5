"""Optimizer: a `torch.optim.Optimizer` around a `Descent`.

It is only a shell that moves along the descent's directions.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping
from functools import cache, partial
from typing import Any, NoReturn, Self, cast

import torch
from torch import Tensor

from curvlab.closure import Closure
from curvlab.curvature.base import with_defaults
from curvlab.derivatives import precise
from curvlab.descent import Batch, Descent, of_method, warm_start
from curvlab.errors import CurvlabError, Diverged
from curvlab.finite import late
from curvlab.groups import OPTIONS, SHARED, check_known, check_options, check_owned, complete
from curvlab.momentum import Momentum, MomentumKind
from curvlab.objective import restore_weights, weights
from curvlab.observation import Observation, Pass, Transition
from curvlab.soundness import Soundness, check_direction
from curvlab.steps import Decay, arrive, decayed, difference, displacement, move

__all__ = [
    "Batch",
    "Descent",
    "Momentum",
    "MomentumKind",
    "Optimizer",
    "Watch",
    "check_direction",
    "displacement",
    "move",
    "of_method",
    "warm_start",
]

Watch = Callable[[Observation, dict[str, Tensor]], None]
"""A function that is told of every step: what was observed before it, and {block: change of its
parameters}.
"""


class Optimizer(torch.optim.Optimizer):
    """A `torch.optim.Optimizer` around a descent.

    It has param_groups, schedulers, state_dict and `copy.deepcopy` as in torch. `lr` and
    `weight_decay` are read per group, `damping` and `momentum` from all of them, which must agree;
    a schedule may change any of them. ``step`` takes ``objective.closure(x, y)``; nothing is read
    from or written to ``p.grad``. A curvature that adapts its damping (a Levenberg–Marquardt rule)
    writes it back to the groups. Parameters that are in no group, or are frozen, stand still.

    Args:
        descent: gives the directions.
        lr: learning rate α of all parameters, or of groups that have none.
    """

    decoupled_weight_decay = True
    """As torch's optimizers mark groups: W ← W − lr (p + γ W)."""

    def __init__(self, descent: Descent, lr: float) -> None:
        if not 0 <= lr < math.inf:
            raise CurvlabError(f"the learning rate must be 0 or positive, not {lr:g}")
        self.descent = descent
        self.objective = descent.objective
        self.watch: Watch | None = None
        self.soundness = Soundness(self.objective.device)
        self.look: Watch | None = (
            None  # told of what was observed, and of the direction, before anything moves
        )
        self.also: frozenset[Pass] = frozenset()  # passes to observe for others
        values = (lr, descent.curvature.damping, descent.momentum.beta, descent.weight_decay)
        super().__init__(
            list(self.objective.parameters.values()), dict(zip(OPTIONS, values, strict=True))
        )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters, as torch's does.

        Raises:
            CurvlabError: a tensor that is not a parameter of the objective's blocks, an option that
                is not known, a damping or momentum that is not that of the other groups.
            ValueError: torch's, a parameter that is in a group already.
        """
        if isinstance(param_group, dict) and not isinstance(param_group.get("params", set()), set):
            check_known(param_group)
            params = param_group["params"]
            param_group["params"] = [params] if isinstance(params, Tensor) else list(params)
            check_owned(self.objective, param_group["params"])
            shared = (
                {option: self.param_groups[0][option] for option in SHARED}
                if self.param_groups
                else {}
            )
            check_options([*self.param_groups, {**self.defaults, **shared, **param_group}])
            for option, value in shared.items():
                param_group.setdefault(option, value)
        super().add_param_group(param_group)

    @precise()
    def warm_start(self, batches: Iterable[Batch]) -> int:
        """Go once through minibatches for the statistics, where the document has a warm start.

        Otherwise nothing is done. Returns the number of batches seen.
        """
        self._take_options()
        return warm_start(self.objective, [self.descent.curvature], batches)

    def _take_options(self) -> None:
        """Make the groups' damping and momentum the descent's from here on."""
        complete(self.param_groups, self.defaults)
        check_options(self.param_groups)
        if self.param_groups:
            self.descent.curvature.damping = float(self.param_groups[0]["damping"])
            self.descent.momentum.beta = float(self.param_groups[0]["momentum"])

    def _rates(self) -> dict[int, float]:
        """Return {id of a parameter: its group's learning rate}.

        Raises:
            Diverged: a learning rate that the dtype does not hold.
            CurvlabError: a parameter that is not, or no longer, one of the objective's.
        """
        for group in self.param_groups:
            lr = float(group["lr"])
            if not 0 <= lr <= 1:  # mostly; only then the dtype is looked up
                most = torch.finfo(self.objective.dtype).max
                if not 0 <= lr <= most:
                    raise Diverged(
                        f"the learning rate is {lr:g}: not between 0 and {most:.2g}"
                        f" ({self.objective.dtype})"
                    )
        rates = {id(p): float(group["lr"]) for group in self.param_groups for p in group["params"]}
        if not rates.keys() <= self.descent.ownership.ids:
            check_owned(self.objective, [p for group in self.param_groups for p in group["params"]])
        return rates

    def _one_rate(self, rates: Mapping[int, float]) -> float:
        """Return the one learning rate of all groups.

        Raises:
            CurvlabError: they differ, and the optimizer that is followed has one.
        """
        each = set(rates.values())
        if len(each) > 1:
            raise CurvlabError(
                f"{with_defaults(self.descent.curvature).name} has one learning rate here, not"
                f" {', '.join(f'{rate:g}' for rate in sorted(each))}: let the groups agree"
            )
        return each.pop() if each else 0.0

    @property
    def _seen(self) -> bool:
        """Whether anybody asks for a step's direction, or for what it has moved."""
        return self.look is not None or self.watch is not None or self.descent.wants_step

    @property
    def _most_decay(self) -> float:
        return max((float(group["weight_decay"]) for group in self.param_groups), default=0.0)

    def _decays(self) -> Decay:
        """Return a function parameter → its group's weight decay; one number where all agree."""
        each = {float(group["weight_decay"]) for group in self.param_groups}
        if len(each) <= 1:
            return each.pop() if each else 0.0
        decays = {
            id(p): float(group["weight_decay"])
            for group in self.param_groups
            for p in group["params"]
        }
        return lambda p: decays.get(id(p), 0.0)

    @precise()
    def step(self, closure: Closure) -> Tensor:  # type: ignore[override]  # torch allows a closure that returns a float
        """Observe, take the direction, move, and return the loss before the move.

        Args:
            closure: the objective on a minibatch.

        Raises:
            CurvlabError: a closure that is not the objective's; a parameter that is trainable and
                in no block (thawed later); an option of the groups out of range, or groups that
                differ in damping or momentum.
            Diverged: a loss, gradient, statistic, direction or step that is not finite (nothing
                moves), a second look's loss that is not. On a GPU a later step says so (see
                `Soundness`), or `soundness.check()`; the weights are then those before the step all
                the same.
        """
        if not self.soundness.late:
            return self._step(closure)
        with late():
            return self._step(closure)

    def _step(self, closure: Closure) -> Tensor:
        if not isinstance(closure, Closure) or closure.objective is not self.objective:
            raise CurvlabError(
                "step needs a closure of this optimizer's objective:"
                " optimizer.step(objective.closure(x, y))"
            )
        self.descent.ownership.check()
        self._take_options()
        rates = self._rates()
        soundness, at_once = self.soundness, not self.soundness.late
        soundness.look()
        curvature = self.descent.curvature
        closure.twice = curvature.wants_step or bool(curvature.step_needs)
        observation = closure.observe(self.descent.needs | self.also, checked=at_once)
        highest = max(rates.values(), default=0.0)
        known = with_defaults(curvature)
        if known.gradient_pass == "plain":
            known.rate = self._one_rate(rates)
        decay = self._decays()
        # added by the move itself, unless somebody asks for the whole, or it could be too large
        small = self._most_decay * max(1.0, highest) <= 1
        direction = self.descent.direction(
            observation, 0.0 if small else decay, rate=highest if at_once else None
        )
        if not small:
            decay = 0.0
        elif decay and self._seen:
            direction, decay = decayed(self.objective, direction, decay), 0.0
        if not at_once:
            soundness.note_step(observation, direction, highest)
        # before the move: a probe reads the weights, the curvature and λ that the direction is of
        if self.look is not None:
            self.look(observation, direction)
        lr: Callable[[Tensor], float] = lambda p: rates.get(id(p), 0.0)  # noqa: E731
        saved = weights(self.objective) if self.descent.curvature.rejects else []
        arrived, flag, stands = known.arrived(), None if at_once else soundness.flag, True
        if arrived is None:
            move(self.objective, direction, lr, flag, decay)
            step = cache(partial(displacement, self.objective, direction, lr))
        else:
            before = weights(self.objective)
            arrive(self.objective, arrived, lr, flag)
            step = cache(partial(difference, self.objective, before))
        if self.descent.wants_step:
            try:
                after = closure.observe(
                    self.descent.step_needs, move_buffers=False, checked=at_once
                )
                if not at_once:
                    soundness.note(after.loss)
                stands = self.descent.learn(Transition(observation, after, step))
            except Diverged:
                if saved:
                    restore_weights(self.objective, saved)
                raise
            if not stands:
                restore_weights(self.objective, saved)
            if at_once:
                self.descent.say_left_out()
        if self.watch is not None:
            moved = step()
            self.watch(
                observation,
                moved if stands else {name: torch.zeros_like(d) for name, d in moved.items()},
            )
        # a rule may have moved λ, and `_take_options` reads it from the groups at the next step
        for group in self.param_groups:
            group["damping"] = self.descent.curvature.damping
        return observation.loss

    def state_dict(self) -> dict[str, Any]:
        """Return torch's state, and under "curvlab" all that a bit-for-bit continuation needs.

        It has no pickled code, and loads with weights_only.
        """
        own = {"descent": self.descent.state_dict(), "objective": self.objective.state_dict()}
        return super().state_dict() | {"curvlab": own}

    @precise()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from what `state_dict` returned.

        Raises:
            CurvlabError: algorithm, model, dtype or groups are others; nothing is taken.
        """
        if "curvlab" not in state_dict:
            raise CurvlabError(
                "this state_dict is not of a curvlab optimizer: it has no 'curvlab' entry"
            )
        own = cast(dict[str, Any], state_dict["curvlab"])
        saved, here = (
            [len(g["params"]) for g in groups]
            for groups in (state_dict["param_groups"], self.param_groups)
        )
        descent, objective = own["descent"], own["objective"]
        self.descent.check(descent)
        if saved != here:
            raise CurvlabError(
                f"the checkpoint has groups of {saved} parameters but this optimizer of {here}:"
                " make the same groups first"
            )
        held = self.state_dict()
        try:
            self.descent.load_state_dict(descent)
            super().load_state_dict({k: v for k, v in state_dict.items() if k != "curvlab"})
            self.objective.load_state_dict(objective)
        except Exception:
            self.descent.load_state_dict(held.pop("curvlab")["descent"])
            super().load_state_dict(held)
            raise

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take torch's state; groups saved by an earlier version get the options that they lack."""
        super().__setstate__(state)
        complete(self.param_groups, self.defaults)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Return an optimizer that steps its own copy of the model: `copy.objective`.

        Who watches this one does not watch the copy.
        """
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        Optimizer.__init__(new, copy.deepcopy(self.descent, memo), float(self.defaults["lr"]))
        new.defaults = copy.deepcopy(self.defaults, memo)
        new.param_groups = copy.deepcopy(self.param_groups, memo)
        new.soundness.late = self.soundness.late
        new.soundness.flag = self.soundness.flag.clone()
        new.soundness._copy.copy_(self.soundness._copy)
        return new

    def __getstate__(self) -> NoReturn:
        raise CurvlabError(
            "an optimizer of curvlab cannot be pickled, since a model's code would be too: save its"
            " state_dict(), and make it again by cl.optimizer; copy.deepcopy copies it, with its"
            " model"
        )
