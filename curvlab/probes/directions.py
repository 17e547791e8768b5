"""Probes of what the directions say by themselves: cosines, lengths, times."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from curvlab.curvature.base import with_defaults
from curvlab.finite import lengths
from curvlab.probes.base import Frame, Numbers, Variable, probe


def cosines_to(gram: Numbers, place: int) -> Numbers:
    """Return the cosine of every algorithm to number `place`; NaN where a norm is zero.

    From inner products [algorithm, other, …].
    """
    norms = np.sqrt(np.einsum("kk...->k...", gram))
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(gram[:, place] / (norms * norms[place]))


@probe(
    "cosine",
    "cosine of every direction to the reference's, by block and over all blocks",
    {
        "cosine": Variable(
            ("algorithm", "block"), "cosine similarity to the reference's direction", "1"
        ),
        "cosine_all": Variable(
            ("algorithm",),
            "cosine similarity to the reference's direction, all blocks together",
            "1",
        ),
    },
    where=("compare",),
)
def _cosine(frame: Frame) -> list[Numbers]:
    return [cosines_to(frame.gram, frame.place), cosines_to(frame.gram.sum(-1), frame.place)]


@probe(
    "gram",
    "inner products of all directions: any cosine to any of them follows",
    {
        "gram": Variable(
            ("algorithm", "other", "block"), "inner product of two directions", "parameter²"
        )
    },
    where=("compare",),
)
def _gram(frame: Frame) -> list[Numbers]:
    return [frame.gram]


@probe(
    "loss",
    "loss of the minibatch before the step",
    {"loss": Variable((), "mean loss of the minibatch", "nat")},
)
def _loss(frame: Frame) -> list[torch.Tensor]:
    return [frame.now.loss.double()]


@probe(
    "norms",
    "lengths of step, directions, gradient and weights",
    {
        "step_length": Variable(
            (), "learning rate times the norm of the reference's direction", "parameter"
        ),
        "direction_norm": Variable(
            ("algorithm", "block"), "norm of the direction, before the learning rate", "parameter"
        ),
        "minibatch_gradient_norm": Variable(
            ("block",), "norm of the minibatch's gradient, L2 term included", "nat/parameter"
        ),
        "weight_norm": Variable(("block",), "norm of the parameters before the step", "parameter"),
    },
    needs=frozenset({"data"}),
)
def _norms(frame: Frame) -> list[torch.Tensor]:
    parameters = {name: p.detach() for name, p in frame.objective.parameters.items()}
    of_weights = [b.gather(parameters) for b in frame.objective.blocks]
    directions = torch.stack(
        [_lengths([d[b] for b in frame.blocks]) for d in frame.directions.values()]
    )
    gradients = _lengths([frame.now.gradients[b] for b in frame.blocks])
    return [frame.lr * directions[frame.place].norm(), directions, gradients, _lengths(of_weights)]


def _lengths(tensors: list[torch.Tensor]) -> torch.Tensor:
    return lengths(tensors).double()


@probe(
    "time",
    "time of every algorithm's own update and direction",
    {
        "seconds": Variable(
            ("algorithm",),
            "time of update and direction; shared statistics count for the first to ask",
            "s",
        )
    },
    where=("compare",),
)
def _time(frame: Frame) -> list[Numbers]:
    return [np.asarray(list(frame.seconds.values()))]


@probe(
    "lambda",
    "λ that every algorithm's inverse was made with, after whatever rule moves it",
    {
        "damping_of_direction": Variable(
            ("algorithm",), "damping of the inverse of this direction; NaN: not known", "1"
        )
    },
    where=("compare",),
)
def _lambda(frame: Frame) -> list[Numbers]:
    used = [frame.curvature(algorithm).refreshed for algorithm in frame.directions]
    return [np.asarray([np.nan if value is None else value for value in used], dtype=float)]


def _shifts(curvature: Any) -> bool:
    return any(block.shift is not None for block in with_defaults(curvature).by_block().values())


@probe(
    "shift",
    "what was added to an indefinite matrix's diagonal, beside the damping",
    {
        "shift": Variable(
            ("algorithm", "block"), "shift that makes the matrix positive semi-definite", "nat"
        )
    },
    fits=_shifts,
    wants="a method that shifts its matrices (block-hessian)",
)
def _shift(frame: Frame) -> list[Numbers]:
    of = [
        {n: b.shift for n, b in frame.of_blocks(algorithm).items()}
        for algorithm in frame.directions
    ]
    return [np.asarray([[shifts.get(name) or 0.0 for name in frame.blocks] for shifts in of])]
