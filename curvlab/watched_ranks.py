"""A step that several processes take together, each over its own minibatches, is looked at as one.

The loop's own processes (DDP) have the same weights and gradients, and each its minibatches: all of
them, one rank's after another's, are the minibatch of the look, which `shared_looks` goes through.
Where a rank alone could fail or has nothing to show, all hear of it before they wait for each
other.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from curvlab.nests import Batched
from curvlab.objective import Objective
from curvlab.parallel import Ranks
from curvlab.shared_looks import agree, joined_pairs, tell_failure
from curvlab.system.random_state import Chance


def minibatches_of_all(objective: Objective, step: int, own: int, begun: bool) -> int:
    """Return how many minibatches the ranks have of a step; 0 where one of them has none.

    Args:
        objective: of the ranks, who say it where some have and some have not.
        step: its number.
        own: this rank's minibatches of it.
        begun: whether there is a log already: then it is said too where all have none.
    """
    counts = [int(count) for (count,) in objective.ranks.numbers([float(own)])]
    if all(counts):
        return sum(counts)
    if any(counts):
        objective.say(
            f"step {step} is not logged, nor others like it: rank {counts.index(0)} has seen no"
            " minibatch of it, and its gradient is of all ranks"
        )
    elif begun:
        objective.say(
            "a step is not logged, nor others like it: watch was handed its minibatch long before,"
            " or not at all (go through watch(loader) as the training goes, or step inside of"
            " watch.batch(x, y))"
        )
    return 0


def joined_minibatch(
    objective: Objective, pairs: Sequence[tuple[Any, Any]]
) -> tuple[Batched, Batched]:
    """Return this rank's minibatches of a step as one, when all ranks' fit the model.

    Raises:
        CurvlabError: on all ranks, what does not fit.
    """
    ranks = objective.ranks
    try:
        own = [objective.batch(x, y) for x, y in pairs]
        found = joined_pairs(objective, own)
    except Exception as error:
        if ranks.several:
            tell_failure(ranks, error, 0)
        raise
    agree(ranks, [])
    return found


@dataclass(frozen=True)
class ModelCall:
    """A call of the model on examples of a step.

    Args:
        size: how many they were.
        form: shapes of one example's tensors.
        chance: the generators before it.
    """

    size: int
    form: str
    chance: Chance


def calls_of_all(ranks: Ranks, own: Sequence[ModelCall]) -> list[ModelCall]:
    """Return each call of a step, one rank's after another's: all ranks look at all of them."""
    if not ranks.several:
        return list(own)
    every = ranks.told([(one.size, one.form, one.chance.state_dict()) for one in own])
    return [ModelCall(n, form, Chance.of(state)) for calls in every for n, form, state in calls]


@contextmanager
def buffers_of_first(objective: Objective) -> Iterator[None]:
    """Let the model's buffers be rank 0's inside, as DDP has them at every forward pass."""
    if not objective.ranks.several:
        yield
        return
    buffers = list(objective.model.buffers())
    own = [b.data for b in buffers]
    copies = [b.detach().clone(memory_format=torch.contiguous_format) for b in buffers]
    objective.ranks.broadcast([_bytes(t) for t in copies], 0)
    try:
        for b, copy in zip(buffers, copies, strict=True):
            b.data = copy
        yield
    finally:
        for b, data in zip(buffers, own, strict=True):
            b.data = data


def _bytes(t: Tensor) -> Tensor:
    """Return a tensor's own memory: not every dtype can be exchanged."""
    return t.view(-1).view(torch.uint8)
