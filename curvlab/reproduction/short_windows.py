"""A small language model on short windows, trained by any method for a number of iterations."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from curvlab import datasets, models
from curvlab.algorithms import optimizer
from curvlab.errors import CurvlabError
from curvlab.likelihoods import Tokens
from curvlab.objective import Objective
from curvlab.reproduction.grid_walk import GridRun

RISE = 5
"""Iterations over which a learning rate rises."""


class ShortWindows:
    """`gpt-tiny` on the first symbols of windows of `shakespeare32`.

    Args:
        symbols: of a window.
        held: windows of the validation text whose loss is read, spread over it.
    """

    def __init__(self, symbols: int, held: int) -> None:
        self.symbols = symbols
        self.train, validation = datasets.load("shakespeare32")
        spread = torch.linspace(0, len(validation) - 1, held).long()
        x = validation.x[spread]
        assert isinstance(x, Tensor)
        self.x, self.y = x[:, :symbols], validation.y[spread][:, :symbols]

    def evaluated(self, model: nn.Module) -> float:
        """Return the validation loss, nat a symbol."""
        with torch.no_grad():
            logits = model(self.x)
            return float(nn.functional.cross_entropy(logits.flatten(0, 1), self.y.flatten()))

    def batches(self, size: int, seed: int, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield `steps` minibatches of `size` windows, in the order of the seed."""
        epochs = math.ceil(steps * size / len(self.train))
        batches = self.train.batches(size, epochs=epochs, seed=seed)
        for x, y in itertools.islice(batches, steps):
            yield x[:, : self.symbols].contiguous(), y[:, : self.symbols].contiguous()

    def objective(self, seed: int) -> Objective:
        """Return the objective at the seed's weights."""
        return Objective(models.build("gpt-tiny", seed=seed), Tokens(), seed=seed)

    def run(self, name: str, size: int, steps: int, seed: int, options: dict[str, Any]) -> GridRun:
        """Train from the seed's weights; `options` are those of `curvlab.optimizer`.

        A run ends where a number is not finite, or the loss half as large again as at the start.
        """
        objective = self.objective(seed)
        method = optimizer(name, objective, **options)
        start = self.evaluated(objective.model)
        found, seconds = GridRun([start], [0.0]), 0.0
        for i, (x, y) in enumerate(self.batches(size, seed, steps), 1):
            method.param_groups[0]["lr"] = options["lr"] * min(1.0, i / RISE)
            began = time.process_time()
            try:
                method.step(objective.closure(x, y))
            except CurvlabError:
                return GridRun([*found.loss, math.inf], [*found.seconds, seconds])
            seconds += time.process_time() - began
            found.loss.append(self.evaluated(objective.model))
            found.seconds.append(seconds)
            if not found.loss[-1] < 1.5 * start:
                return GridRun([*found.loss[:-1], math.inf], found.seconds)
        return found
