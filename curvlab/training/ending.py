"""The end of a training run: its budget is spent, or its schedule is."""

from __future__ import annotations

from collections.abc import Callable

from torch.optim.lr_scheduler import LRScheduler

from curvlab.errors import warn
from curvlab.training.schedules import end
from curvlab.training.settings import Budget, Position


class Ending:
    """The end of one run.

    Args:
        budget: of the run.
        scheduler: which may have an end.
        gone: seconds of training so far, read without waiting for the device.
    """

    def __init__(self, budget: Budget, scheduler: LRScheduler, gone: Callable[[], float]) -> None:
        self.budget, self.scheduler, self._gone = budget, scheduler, gone

    def over(self, at: Position) -> bool:
        """Return whether the epochs are spent, or what `spent` looks at."""
        epochs = self.budget.epochs
        return (epochs is not None and at.epoch >= epochs) or self.spent(at)

    def spent(self, at: Position) -> bool:
        """Return whether the steps or the seconds are spent, or the schedule is at its end.

        It is read without waiting for the device.
        """
        steps, seconds = self.budget.steps, self.budget.seconds
        spent = (steps is not None and at.steps >= steps) or (
            seconds is not None and self._gone() >= seconds
        )
        return spent or self.scheduled(0)

    def scheduled(self, turns: int) -> bool:
        """Return whether the schedule ends with so many further steps of its own."""
        last = end(self.scheduler)
        return last is not None and self.scheduler.last_epoch + turns >= last

    def say(self, at: Position) -> None:
        """Warn where the schedule ended the run, and nothing else."""
        epochs, steps = self.budget.epochs, self.budget.steps
        asked = (epochs is not None and at.epoch >= epochs) or (
            steps is not None and at.steps >= steps
        )
        if self.scheduled(0) and not asked:
            warn(
                f"the run ends with its schedule, which has {end(self.scheduler)} steps, after"
                f" {at.steps} steps of training: give a longer schedule to train on"
            )
