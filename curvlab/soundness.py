"""Whether gradients, directions and steps are finite.

It is seen at once where that waits for nothing, and later on a GPU. The measure is length: it is
not finite where a number is not, and where the squares of the numbers overflow, which the second
moments of every method, and the lengths in a log, are made of. Beyond 1.8e19 in single precision
nothing is trained any more.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from curvlab.errors import Diverged
from curvlab.finite import joint_norm, lengths, longest, waits
from curvlab.objective import Objective
from curvlab.observation import Observation

REMEDY = "lower the learning rate or raise the damping"

_SMALL = 100.0
"""A step no longer than this is within every dtype."""


class Soundness:
    """The record of whether every loss, gradient, direction and step so far was finite.

    Where reading a number waits for nothing (`late` is False: the CPU) each step looks, and raises
    before anything moves. On a GPU the flag stays there and holds the weights still from the first
    number on that is not finite; a copy of it reaches the host when it will, and a later step, or
    `check`, raises.
    """

    def __init__(self, device: torch.device) -> None:
        self.late = device.type != "cpu"
        self.flag = torch.ones((), dtype=torch.bool, device=device)
        self._copy = torch.ones(
            (), dtype=torch.bool, device="cpu", pin_memory=device.type == "cuda"
        )

    def note(self, numbers: Tensor) -> None:
        """Record whether `numbers` are all finite.

        They are such as are NaN or Inf wherever an entry of the tensors that they stand for is.
        """
        self.flag = self.flag & torch.isfinite(numbers).all()
        self._copy.copy_(self.flag, non_blocking=True)

    def note_step(
        self, observation: Observation, direction: Mapping[str, Tensor], rate: float
    ) -> None:
        """Record whether a loss, its gradient and a direction are finite, and the step along it.

        Args:
            observation: with the loss and its gradient.
            direction: that is followed.
            rate: the highest of the learning rates.
        """
        of_direction = lengths(direction.values())
        step = (
            of_direction.norm() * rate
        ).square()  # overflows where the step's length is beyond `_limit`
        numbers = [
            observation.loss[None].to(of_direction.dtype),
            lengths(observation.gradients.values()),
            of_direction,
            step[None],
        ]
        self.note(torch.cat(numbers))

    def look(self) -> None:
        """Raise Diverged where the host has heard that a number is not finite; wait for nothing."""
        if not bool(self._copy):
            self._say()

    def check(self) -> None:
        """Raise Diverged where a number was not finite; wait for the device."""
        if not bool(self.flag):
            self._say()

    def _say(self) -> None:
        raise Diverged(
            "the loss, gradient, direction or length of an earlier step is not finite; the weights"
            " stayed as they were before it: raise the damping or lower the learning rate"
        )


def check_gradients(objective: Objective, observation: Observation) -> None:
    """Raise Diverged, with the block's name, where the gradient of an observation is not finite.

    So no average takes it up. An observation without a gradient is passed over. On a GPU, which
    would have to wait, nothing is looked at: `Soundness.note_step` does it there.
    """
    if waits(observation.loss) or not observation.passes.keys() & {"gradient", "data", "plain"}:
        return
    if not observation.gradient_length < longest(objective.dtype):
        raise _first(
            objective,
            observation.gradients,
            "the gradient of {} is not finite; nothing was moved: " + REMEDY,
        )


def check_direction(
    objective: Objective, direction: Mapping[str, Tensor], rate: float = 1.0
) -> None:
    """Raise Diverged, with the block's name, where a direction or the step along it is not finite.

    Args:
        objective: whose blocks.
        direction: {block: direction}.
        rate: the highest of the learning rates.
    """
    far = joint_norm(direction.values())
    step = far * rate
    if step <= _SMALL:
        return
    # NaN is below nothing: it passes the line above, and is caught here, as by `far >= …` it is not
    if not far < longest(objective.dtype):
        raise _first(
            objective,
            direction,
            "the direction of {} is not finite; nothing was moved: raise the damping or lower the"
            " learning rate",
        )
    if not step < _limit(objective):
        block = max(objective.blocks, key=lambda b: float(direction[b.name].norm()))
        found = Diverged(
            f"the step of {block} is not finite: a learning rate of {rate:g} times a direction of"
            f" length {far:.3g} is beyond what the weights hold; nothing was moved: {REMEDY}"
        )
        found.block = block.name
        raise found


def _limit(objective: Objective) -> float:
    """Return the length that a step must be below.

    Its square is within the statistics' dtype, and it within a quarter of the narrowest weights'.
    """
    narrowest = min(torch.finfo(p.dtype).max for p in objective.parameters.values())
    return float(min(longest(objective.dtype), narrowest / 4))


def _first(objective: Objective, tensors: Mapping[str, Tensor], line: str) -> Diverged:
    """Return the error of the first block whose numbers are not finite.

    It is that of the longest where it is only the length of all.
    """
    each = {b: float(tensors[b.name].norm()) for b in objective.blocks}
    block = next(
        (b for b, far in each.items() if not math.isfinite(far)), max(each, key=lambda b: each[b])
    )
    found = Diverged(line.format(block))
    found.block = block.name
    return found
