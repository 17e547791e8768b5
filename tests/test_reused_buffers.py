"""Loaders that fill the same tensors again: what a step leaves behind is of its own minibatch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from problems import problem
from torch import Tensor

import curvlab as cl
from curvlab.algorithms import ALGORITHMS, descent
from curvlab.observation import Transition
from curvlab.optim import warm_start
from curvlab.steps import move

Minibatches = list[tuple[Tensor, Tensor]]


class OneBuffer:
    """Minibatches in one and the same tensors, as of a loader that fills pinned memory; another
    pass, of whichever part, fills them too.
    """

    def __init__(self, data: Iterable[tuple[Tensor, Tensor]], buffers: Any = None) -> None:
        self.data = list(data)
        self.buffers = buffers or tuple(torch.empty_like(t) for t in self.data[0])

    def __getitem__(self, some: slice) -> OneBuffer:
        return OneBuffer(self.data[some], self.buffers)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for new in self.data:
            yield tuple(t.copy_(own) for t, own in zip(self.buffers, new, strict=True))
        for t in self.buffers:
            t.zero_()


def scaled(p: dict[str, Tensor]) -> dict[str, Tensor]:
    return {block: -1e-3 * d for block, d in p.items()}


def followed(name: str, data: Any, warm: Any, **options: Any) -> list[dict[str, Tensor]]:
    """Directions of a method along plain descent, and last what its operators give afterwards."""
    objective = problem("tanh").objective()
    found, after = [], []
    way = descent(name, objective, **options)
    warm_start(objective, [way.curvature], warm)
    for x, y in data:
        closure = objective.closure(x, y)
        closure.twice = way.wants_step
        observation = closure.observe(way.needs)
        p = way.direction(observation)
        found.append({block: d.clone() for block, d in p.items()})
        move(objective, p, lambda _: 1e-3)
        if way.wants_step:
            second = closure.observe(way.step_needs, move_buffers=False)
            way.learn(Transition(observation, second, partial(scaled, p)))
        after = [observation.gradients]
    if getattr(way.curvature, "inverse", {}):
        found.append(way.curvature.precondition(after[0]))
    return found


CASES: list[tuple[str, dict[str, Any]]] = [
    (name, {"update_every": every, "refresh_every": often})
    for name in sorted(ALGORITHMS)
    for every, often in ((1, 1), (2, 3))
]
CASES += [("hf", {"curvature_size": None, "update_every": 2})]  # products of the whole minibatch


@pytest.mark.thinned(2)
@pytest.mark.parametrize(("name", "options"), CASES)
def test_directions_are_those_of_tensors_of_their_own(name: str, options: dict[str, Any]) -> None:
    p = problem("tanh")
    data: Minibatches = [
        (p.x + 0.1 * torch.randn(p.x.shape, generator=torch.Generator().manual_seed(i)), p.y)
        for i in range(6)
    ]
    own = followed(name, data[:4], data[4:], **options)
    buffer = OneBuffer(data)
    filled = followed(name, buffer[:4], buffer[4:], **options)
    for one, other in zip(own, filled, strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[block], other[block]) for block in one)


def test_a_comparison_and_a_training_run() -> None:
    p = problem("tanh")
    data: Minibatches = [(p.x.roll(i, 0), p.y.roll(i, 0)) for i in range(8)]

    def compared(all_of: Any) -> Any:
        return cl.compare(
            problem("tanh").objective(),
            all_of[:5],
            reference="block-fisher",
            algorithms=["kfac", "k-bfgs", "hf", "tnt-ideal", "smw-gn", "skqn-l"],
            warm=all_of[5:],
            probes=["damping", "noise", "reduction"],
            progress=False,
        ).dataset

    own, filled = compared(data), compared(OneBuffer(data))
    for name in ("gram", "loss"):
        np.testing.assert_array_equal(own[name], filled[name])

    def trained(minibatches: Any) -> Any:
        objective = problem("tanh").objective()
        return cl.train(
            objective, minibatches, algorithm="k-bfgs", epochs=2, progress=False
        ).dataset

    np.testing.assert_array_equal(
        trained(data)["train_loss"], trained(OneBuffer(data))["train_loss"]
    )
