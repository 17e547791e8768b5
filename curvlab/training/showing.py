"""What the console sees of a training run: a bar with the time left, and a line an epoch."""

from __future__ import annotations

import time
from collections.abc import Callable

from rich.progress import Progress
from torch import Tensor

from curvlab.training.settings import Budget, Position


class Showing:
    """The bar and the lines of one run.

    Args:
        bar: of all that the console sees.
        say: takes a line.
        budget: when the run ends.
        per_epoch: minibatches of an epoch, where that is known.
    """

    def __init__(
        self, bar: Progress, say: Callable[[str], None], budget: Budget, per_epoch: int | None
    ) -> None:
        self.bar, self._say, self.budget, self.per_epoch = bar, say, budget, per_epoch
        self._shown = 0.0

    def begin(self, at: Position, gone: float) -> None:
        """Show the bar; `gone` are seconds of training so far."""
        total = self.budget.seconds or self.budget.most_steps(self.per_epoch)
        self.task = self.bar.add_task("training", total=total, note="")
        self.bar.update(self.task, completed=self._done(at, gone))

    def step(self, at: Position, gone: Callable[[], float], loss: Tensor) -> None:
        """Show the loss a few times a second, and only where there is someone to see.

        Reading the loss waits for the device.
        """
        if not self.bar.disable and time.monotonic() - self._shown > 0.25:
            self._shown = time.monotonic()
            note = f"epoch {at.epoch + 1}, loss {float(loss):.4g}"
            self.bar.update(self.task, completed=self._done(at, gone()), note=note)

    def epoch(self, number: float, scores: dict[str, float], at: Position) -> None:
        """Say a line of an epoch's scores."""
        parts = ", ".join(f"{name.replace('_', ' ')} {value:.5g}" for name, value in scores.items())
        self._say(f"epoch {number:g}: {parts}, {at.steps} steps in {at.wall:.4g} s")

    def _done(self, at: Position, gone: float) -> float:
        """Return how much of the bar's total is done.

        It is steps, or seconds where those are limited (the steps too, whichever are further).
        """
        if self.budget.seconds is None:
            return at.steps
        steps = self.budget.most_steps(self.per_epoch)
        return max(gone, self.budget.seconds * at.steps / steps if steps else 0.0)
