"""What a training run logs: VARIABLES, and the meter that adds up what every step has to say."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from curvlab.likelihoods.base import mean_per
from curvlab.logs.log import Log, Record
from curvlab.objective import Objective
from curvlab.observation import Observation
from curvlab.probes.base import labels, taken
from curvlab.training.evaluation import Evaluated, Measure, score_names
from curvlab.training.settings import Position

TRAINING_VARIABLES: dict[str, tuple[tuple[str, ...], str, str]] = {
    "train_loss": ((), "mean loss over the training examples, in eval mode", "nat"),
    "val_loss": ((), "mean loss over the validation examples, in eval mode", "nat"),
    "train_error": ((), "error over the training examples", "1"),
    "val_error": ((), "error over the validation examples", "1"),
    "train_nats_per_symbol": ((), "cross-entropy per symbol of the training sequences", "nat"),
    "val_nats_per_symbol": ((), "cross-entropy per symbol of the validation sequences", "nat"),
    "train_bits_per_symbol": ((), "cross-entropy per symbol of the training sequences", "bit"),
    "val_bits_per_symbol": ((), "cross-entropy per symbol of the validation sequences", "bit"),
    "batch_loss": ((), "minibatch loss before the step, mean over the epoch's steps", "nat"),
    "gradient_norm": (
        (),
        "norm of the minibatch gradient, mean over the epoch's steps",
        "nat/parameter",
    ),
    "step_norm": ((), "length of the step, mean over the epoch's steps", "parameter"),
    "gradient_norm_of_block": (
        ("block",),
        "norm of the minibatch gradient of a block, mean over the epoch's steps",
        "nat/parameter",
    ),
    "step_norm_of_block": (
        ("block",),
        "length of the step of a block, mean over the epoch's steps",
        "parameter",
    ),
    "lr": ((), "learning rate at the end of the epoch", "1"),
    "damping": ((), "damping at the end of the epoch", "1"),
    "damping_used": (
        (),
        "damping of the inverse at the end of the epoch, after whatever rule moves it; NaN: none",
        "1",
    ),
    "steps": ((), "steps since the beginning", "1"),
    "pairs_left_out": (
        (),
        "second looks' pairs left out since they were not finite, since the beginning",
        "1",
    ),
    "wall_seconds": ((), "wall time of training since the beginning", "s"),
    "cpu_seconds": ((), "CPU time of training, all threads, since the beginning", "s"),
    "evaluation_seconds": (
        (),
        "wall time of evaluation since the beginning, apart from training",
        "s",
    ),
    "warm_start_seconds": ((), "wall time of the warm start, apart from training", "s"),
    "probe_seconds": ((), "wall time of the probes since the beginning, apart from training", "s"),
}
"""{variable: (dimensions beside the epoch, long name, units)}"""

TIMES = tuple(name for name in TRAINING_VARIABLES if name.endswith("_seconds"))


def training_log(
    objective: Objective,
    error: Measure | None,
    attributes: Mapping[str, Any],
    path: Path | None,
    algorithm: str = "",
    probes: Mapping[str, int] | None = None,
) -> Log:
    """Return an empty log of epochs, and of these probes with their steps between samples.

    Args:
        objective: whose blocks, seed, device and dtype.
        error: of an example; None where there is none.
        attributes: of the log.
        path: of its file; None keeps it in memory.
        algorithm: its name.
        probes: {name: steps between samples}.
    """
    names = list(probes or {})
    variables = {"epoch": {"long_name": "epochs of training", "units": "1"}}
    for name, (_, long_name, units) in TRAINING_VARIABLES.items():
        said = (
            long_name.replace("error", error.name, 1)
            if error and name.endswith("_error")
            else long_name
        )
        variables[name] = {"long_name": said, "units": units}
    variables |= taken(names)
    own = {
        "probes": dict(probes or {}),
        "seed": objective.seed,
        "device": str(objective.device),
        "dtype": str(objective.dtype).removeprefix("torch."),
        "loss_per": mean_per(objective.likelihood),
        "threads": torch.get_num_threads(),
        "error": error.name if error else "none",
    }
    coordinates: dict[str, Any] = {
        "block": [b.name for b in objective.blocks],
        "parameters": ("block", [" ".join(b.params) for b in objective.blocks]),
        "algorithm": [algorithm],
    } | labels(names)
    return Log(coordinates, variables, own | dict(attributes), path, (objective.seed,), "epoch")


class Meter:
    """Sums over the steps of an epoch: loss, norms of gradient and step, the same of every block.

    It is told by `Optimizer.watch`. The sums stay on the device, in float64, until `record` reads
    them.
    """

    def __init__(self, objective: Objective) -> None:
        self.blocks = [b.name for b in objective.blocks]
        self.sums: Tensor | None = None

    def __call__(self, observation: Observation, moved: dict[str, Tensor]) -> None:
        """Add a step: what was observed before it, and {block: change of its parameters}."""
        norms = [
            torch.stack(torch._foreach_norm([d[b] for b in self.blocks]))
            for d in (observation.gradients, moved)
        ]
        row = torch.cat([observation.loss[None], *(n.norm()[None] for n in norms), *norms]).double()
        self.sums = row if self.sums is None else self.sums + row

    @staticmethod
    def names(on: Evaluated) -> list[str]:
        """Return the variables of `record` in a run that is evaluated so."""
        scores = score_names(on)
        return [
            n for n in TRAINING_VARIABLES if n in scores or not n.startswith(("train_", "val_"))
        ]

    def record(
        self,
        scores: Mapping[str, float],
        lr: float,
        damping: float,
        at: Position,
        left_out: int = 0,
        used: float | None = None,
    ) -> Record:
        """Return the record of the epoch that `at` stands in or at the end of.

        Means are NaN before the first step.

        Args:
            scores: {variable: loss or error}.
            lr: the learning rate.
            damping: the document's own parameter.
            at: how far the run is.
            left_out: pairs that were left out so far.
            used: the damping that the inverse was made with.
        """
        n = len(self.blocks)
        means = (
            np.full(3 + 2 * n, np.nan) if self.sums is None else self.sums.cpu().numpy() / at.step
        )
        values: dict[str, Any] = dict(scores) | {
            "batch_loss": means[0],
            "gradient_norm": means[1],
            "step_norm": means[2],
            "gradient_norm_of_block": means[3 : 3 + n],
            "step_norm_of_block": means[3 + n :],
            "lr": lr,
            "damping": damping,
            "damping_used": np.nan if used is None else used,
            "steps": at.steps,
            "pairs_left_out": left_out,
            "wall_seconds": at.wall,
            "cpu_seconds": at.cpu,
            "evaluation_seconds": at.evaluation,
            "warm_start_seconds": at.warm,
            "probe_seconds": at.probes,
        }
        return {
            name: (TRAINING_VARIABLES[name][0], np.asarray(values[name]))
            for name in TRAINING_VARIABLES
            if name in values
        }
