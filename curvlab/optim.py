"""Descent: momentum → curvature → weight decay → direction. Optimizer: only a torch shell that moves along it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import cache, partial
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor

from curvlab.curvature.base import Curvature, check_damping
from curvlab.errors import CurvlabError, Diverged, unknown
from curvlab.objective import Closure, Objective, Observation, Pass, Transition, restore, weights

MomentumKind = Literal["add", "average", "corrected"]
"""m ← β m + g (thesis chapters 3 and 4); m ← β m + (1 − β) g (chapter 2); the average divided by 1 − βᵏ (Adam)."""

Batch = tuple[Tensor, Tensor]

Watch = Callable[[Observation, dict[str, Tensor]], None]
"""Told of every step: what was observed before it, and {block: change of its parameters}."""


class Momentum:
    """Momentum of the gradient, one buffer a block, starting at zero. β = 0 is the gradient itself."""

    def __init__(self, beta: float, kind: MomentumKind = "add") -> None:
        if not 0 <= beta < 1:
            raise CurvlabError(f"momentum must be at least 0 and below 1, not {beta:g}")
        if kind not in get_args(MomentumKind):
            raise unknown("kind of momentum", kind, get_args(MomentumKind))
        self.beta, self.kind = beta, kind
        self.buffers: dict[str, Tensor] = {}
        self.steps = 0

    def __call__(self, gradients: dict[str, Tensor]) -> dict[str, Tensor]:
        self.steps += 1
        if self.beta == 0:
            return gradients
        new = 1.0 if self.kind == "add" else 1 - self.beta
        for name, g in gradients.items():
            old = self.buffers.get(name)
            if old is None:
                self.buffers[name] = g * new
            elif self.kind == "add":
                self.buffers[name] = torch.add(g, old, alpha=self.beta)
            else:
                self.buffers[name] = old.lerp(g, new)
        if self.kind != "corrected":
            return dict(self.buffers)
        return {name: b / (1 - self.beta**self.steps) for name, b in self.buffers.items()}


class Descent:
    """How one algorithm turns an observation into a direction; it moves nothing.

    Args:
        objective: whose blocks.
        curvature: the preconditioner.
        momentum: β of the gradient's momentum.
        momentum_kind: see `MomentumKind`.
        weight_decay: γ, decoupled: direction + γ W (thesis Alg. 15, line 19).
        learns_first: True: statistics, then direction (Alg. 15, 16, and 12, see `curvature.kfac`); False: direction from the
            statistics before this minibatch, then statistics (Alg. 4, 9).
        double_grad: the gradient is averaged with that of the last minibatch at these same weights, which the second look at it
            has given for nothing: a minibatch of twice the size, but for the first (2020 D.6; thesis 2.8.3).

    Raises:
        CurvlabError: an argument out of range, `double_grad` of a method without a second look.
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
        if not weight_decay >= 0:
            raise CurvlabError(f"weight decay must be 0 or positive, not {weight_decay:g}")
        if double_grad and not (curvature.wants_step and "data" in curvature.step_needs):
            raise CurvlabError("double_grad needs a method that looks at each minibatch a second time, such as k-bfgs-20")
        self.objective, self.curvature, self.weight_decay = objective, curvature, weight_decay
        self.momentum = Momentum(momentum, momentum_kind)
        self.learns_first, self.double_grad = learns_first, double_grad
        self.further: dict[str, Tensor] = {}  # gradients of the last minibatch at these weights, of `double_grad`

    @property
    def needs(self) -> frozenset[Pass]:
        """The passes that the next `direction` will read."""
        return self.curvature.needs | {"data"}

    def direction(self, observation: Observation) -> dict[str, Tensor]:
        """{block: p}, to be followed as W ← W − α p. Updates momentum and curvature."""
        late = not self.learns_first and self.curvature.ready
        if not late:
            self.curvature.update(observation)
        gradients = observation.gradients
        if self.further:
            gradients = {name: (g + self.further[name]) / 2 for name, g in gradients.items()}
            self.further = {}
        p = self.curvature.precondition(self.momentum(gradients))
        if late:
            self.curvature.update(observation)
        if self.weight_decay:
            with torch.no_grad():
                for block in self.objective.blocks:
                    w = block.gather({name: self.objective.parameters[name] for name in block.params})
                    p[block.name] = p[block.name].add(w, alpha=self.weight_decay)
        return p

    @property
    def wants_step(self) -> bool:
        """Whether it learns from the step that now follows, by a second look at the same minibatch."""
        return self.curvature.wants_step

    @property
    def step_needs(self) -> frozenset[Pass]:
        """The passes of that second look."""
        return self.curvature.step_needs

    def learn(self, transition: Transition) -> bool:
        """Learn from the step between two looks at one minibatch. False: the step is to be taken back."""
        stands = self.curvature.learn(transition)
        if self.double_grad and stands:
            self.further = dict(transition.after.gradients)
        return stands

    def state_dict(self) -> dict[str, Any]:
        momentum = {"buffers": dict(self.momentum.buffers), "steps": self.momentum.steps}
        return {"curvature": self.curvature.state_dict(), "momentum": momentum, "further": dict(self.further)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.curvature.load_state_dict(state["curvature"])
        self.momentum.buffers = {name: b.clone() for name, b in state["momentum"]["buffers"].items()}
        self.momentum.steps = state["momentum"]["steps"]
        self.further = {name: g.clone() for name, g in state["further"].items()}


def warm_start(objective: Objective, curvatures: Iterable[Curvature], batches: Iterable[Batch]) -> int:
    """Show one pass over `batches` to every curvature that has a warm start; one observation serves all. Returns how many."""
    wanting = [c for c in curvatures if c.warm_needs]
    needs = frozenset[Pass]().union(*(c.warm_needs for c in wanting))
    if not wanting:
        return 0
    count = 0
    for x, y in batches:
        observation = objective.closure(x, y, "warm").observe(needs)
        for curvature in wanting:
            curvature.absorb(observation)
        count += 1
    if count:
        for curvature in wanting:
            curvature.refresh()
    return count


class Soundness:
    """Whether every loss and direction so far was finite.

    Where reading a number waits for nothing (`late` is False: the CPU) each step looks, and raises before anything moves. On a
    GPU the flag stays there and holds the weights still from the first number on that is not finite; a copy of it reaches the
    host when it will, and a later step, or `check`, raises.
    """

    def __init__(self, device: torch.device) -> None:
        self.late = device.type != "cpu"
        self.flag = torch.ones((), dtype=torch.bool, device=device)
        self._copy = torch.ones((), dtype=torch.bool, pin_memory=device.type == "cuda")

    def note(self, numbers: Tensor) -> None:
        """Of tensors that are finite wherever these numbers are."""
        self.flag = self.flag & torch.isfinite(numbers).all()
        self._copy.copy_(self.flag, non_blocking=True)

    def look(self) -> None:
        """Raises Diverged where the host has heard of it; waits for nothing."""
        if not bool(self._copy):
            self._say()

    def check(self) -> None:
        """Raises Diverged where a number was not finite. Waits for the device."""
        if not bool(self.flag):
            self._say()

    def _say(self) -> None:
        raise Diverged(
            "the loss or the direction of an earlier step is not finite; the weights stayed as they were before it: "
            "raise the damping or lower the learning rate"
        )


def check_direction(objective: Objective, direction: dict[str, Tensor]) -> None:
    """Raises Diverged, with the block's name, where a direction is not finite."""
    if not bool(torch.isfinite(_sums(direction)).all()):
        for block in objective.blocks:
            if not bool(torch.isfinite(direction[block.name]).all()):
                raise Diverged(
                    f"the direction of {block} is not finite; nothing was moved: raise the damping or lower the learning rate"
                )


def _sums(direction: dict[str, Tensor]) -> Tensor:
    """Which NaN and Inf survive; cheaper than a look at every entry."""
    return torch.stack([d.sum() for d in direction.values()])


def move(
    objective: Objective, direction: dict[str, Tensor], lr: Callable[[Tensor], float], where: Tensor | None = None
) -> None:
    """W ← W − α p for every parameter, α = lr(parameter); nothing where the flag `where` is false."""
    parameters = objective.parameters
    with torch.no_grad():
        for block in objective.blocks:
            p = direction[block.name] if where is None else torch.where(where, direction[block.name], 0.0)
            for name, d in block.scatter(p).items():
                parameters[name].add_(d, alpha=-lr(parameters[name]))


def displacement(objective: Objective, direction: dict[str, Tensor], lr: Callable[[Tensor], float]) -> dict[str, Tensor]:
    """{block: −α p}, what `move` adds to its parameters."""
    parameters, found = objective.parameters, {}
    for block in objective.blocks:
        parts = block.scatter(direction[block.name])
        found[block.name] = block.gather({name: d * -lr(parameters[name]) for name, d in parts.items()})
    return found


class Optimizer(torch.optim.Optimizer):
    """A `torch.optim.Optimizer` around a descent: param_groups, lr schedulers and state_dict as in torch.

    `lr` is read per group; `damping` from the first group, so a schedule may change either. ``step`` takes
    ``objective.closure(x, y)``; nothing is read from or written to ``p.grad``. A curvature that adapts its damping (a
    Levenberg–Marquardt rule) writes it back to the group.
    """

    def __init__(self, descent: Descent, lr: float) -> None:
        if not 0 <= lr < math.inf:
            raise CurvlabError(f"the learning rate must be 0 or positive, not {lr:g}")
        self.descent = descent
        self.objective = descent.objective
        self.watch: Watch | None = None
        self.soundness = Soundness(self.objective.device)
        self.look: Watch | None = None  # told of what was observed, and of the direction, before anything moves
        self.also: frozenset[Pass] = frozenset()  # passes to observe for others
        defaults = {"lr": lr, "damping": descent.curvature.damping}
        super().__init__(list(self.objective.parameters.values()), defaults)

    def warm_start(self, batches: Iterable[Batch]) -> int:
        """One pass for the statistics, where the document has a warm start; otherwise nothing. Returns the batches seen."""
        self._take_damping()
        return warm_start(self.objective, [self.descent.curvature], batches)

    def _take_damping(self) -> None:
        """The group's damping is the curvature's from here on."""
        damping = float(self.param_groups[0]["damping"])
        check_damping(damping)
        self.descent.curvature.damping = damping

    def _rates(self) -> dict[int, float]:
        """{id of a parameter: its group's learning rate}."""
        most = torch.finfo(self.objective.dtype).max
        for group in self.param_groups:
            lr = float(group["lr"])
            if not 0 <= lr <= most:
                raise Diverged(f"the learning rate is {lr:g}: not between 0 and {most:.2g} ({self.objective.dtype})")
        return {id(p): float(group["lr"]) for group in self.param_groups for p in group["params"]}

    def step(self, closure: Closure) -> Tensor:  # type: ignore[override]  # torch allows a closure that returns a float
        """Observe, direction, move. Returns the loss before the move.

        Raises:
            CurvlabError: a closure that is not the objective's.
            Diverged: a loss or direction that is not finite (nothing moves), a second look that is not. On a GPU a later step
                says so (see `Soundness`), or `soundness.check()`; the weights are then those before the step all the same.
        """
        if not isinstance(closure, Closure) or closure.objective is not self.objective:
            raise CurvlabError("step needs a closure of this optimizer's objective: optimizer.step(objective.closure(x, y))")
        self._take_damping()
        soundness, at_once = self.soundness, not self.soundness.late
        soundness.look()
        observation = closure.observe(self.descent.needs | self.also, checked=at_once)
        direction = self.descent.direction(observation)
        if at_once:
            check_direction(self.objective, direction)
        else:
            soundness.note(torch.cat([observation.loss[None], _sums(direction)]))
        if self.look is not None:
            self.look(observation, direction)
        rates = self._rates()
        saved = weights(self.objective) if self.descent.curvature.rejects else []
        move(self.objective, direction, lambda p: rates[id(p)], None if at_once else soundness.flag)
        step, stands = cache(partial(displacement, self.objective, direction, lambda p: rates[id(p)])), True
        if self.descent.wants_step:
            try:
                after = closure.observe(self.descent.step_needs, move_buffers=False, checked=at_once)
            except Diverged:
                if saved:
                    restore(self.objective, saved)
                raise
            if not at_once:
                soundness.note(after.loss)
            stands = self.descent.learn(Transition(observation, after, step))
            if not stands:
                restore(self.objective, saved)
        if self.watch is not None:
            moved = step()
            self.watch(observation, moved if stands else {name: torch.zeros_like(d) for name, d in moved.items()})
        self.param_groups[0]["damping"] = self.descent.curvature.damping
        return observation.loss

    def state_dict(self) -> dict[str, Any]:
        """Torch's, and under "curvlab" all that a bit-for-bit continuation needs: no pickled code, loads with weights_only."""
        own = {"descent": self.descent.state_dict(), "objective": self.objective.state_dict()}
        return super().state_dict() | {"curvlab": own}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if "curvlab" not in state_dict:
            raise CurvlabError("this state_dict is not of a curvlab optimizer: it has no 'curvlab' entry")
        own = cast(dict[str, Any], state_dict["curvlab"])
        self.descent.load_state_dict(own["descent"])
        super().load_state_dict({k: v for k, v in state_dict.items() if k != "curvlab"})
        self.objective.load_state_dict(own["objective"])
