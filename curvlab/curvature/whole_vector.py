"""Base of methods of the whole parameter vector.

One vector of all parameters, parts of a minibatch, the loss elsewhere, line search.

Legend: D parameters, block after block (`Layout`); N examples.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from curvlab.closure import Closure
from curvlab.curvature.base import CurvatureDefaults
from curvlab.curvature.settings import CurvatureSettings
from curvlab.errors import CurvlabError, Diverged, unknown
from curvlab.exact.batches import Kind
from curvlab.layers import Layout
from curvlab.linalg.line_search import Found, armijo, wolfe
from curvlab.linalg.operators import Operator
from curvlab.objective import Objective, restore_weights, weights
from curvlab.observation import Observation, Pass

Search = Literal["none", "armijo", "wolfe"]

PRODUCTS: Mapping[Pass, Kind] = MappingProxyType(
    {"exact": "ggn", "data": "ef", "token": "ef-token", "model": "fisher-mc"}
)
"""The exact matrix whose products stand for a method's labels."""

_GIVEN = ("x", "y", "number", "stream", "part")


def flat(layout: Layout, tensors: Mapping[str, Tensor]) -> Float[Tensor, " D"]:
    """Return {block: tensor} or {parameter: tensor}, for all of them, as one vector.

    Raises:
        CurvlabError: a name that is neither, a block or parameter that is missing, a tensor of
            another shape.
    """
    known = [*(b.name for b in layout.blocks), *(p for b in layout.blocks for p in b.params)]
    for name in tensors:
        if name not in known:
            raise unknown("block or parameter", name, known)
    found = []
    for block in layout.blocks:
        if block.name not in tensors and not tensors.keys() >= set(block.params):
            raise CurvlabError(
                f"the gradient of {block} is missing: a method of the whole vector needs every"
                " block's"
            )
        value = tensors[block.name] if block.name in tensors else block.gather(tensors)
        if tuple(value.shape) != block.shape:
            raise CurvlabError(
                f"{block} has shape {list(block.shape)}, but its gradient {list(value.shape)}"
            )
        found.append(value.flatten())
    return torch.cat(found)


def unflat(layout: Layout, vector: Float[Tensor, " D"]) -> dict[str, Tensor]:
    """Return one vector as {block: tensor in the block's shape}, views."""
    return {b.name: vector[layout.slices[b.name]].view(b.shape) for b in layout.blocks}


def unflat_like(
    layout: Layout, vector: Float[Tensor, " D"], grads: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return one vector under the keys of `grads`: blocks or parameters."""
    found = layout.unflatten(vector) | unflat(layout, vector)
    return {name: found[name] for name in grads}


def applied(layout: Layout, operator: Operator, grads: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return operator @ grads, for a `precondition` that is a product: the same keys and shapes."""
    return unflat_like(layout, operator @ flat(layout, grads), grads)


def part(closure: Closure, indices: Int[Tensor, " n"]) -> Closure:
    """Return some examples of a minibatch, with the number of the whole.

    So they have the generator of labels of the whole too; and its chance, where the model draws
    random numbers, though not for each example the same: nobody after it is to draw others.
    """
    x = closure.x.index_select(0, indices)
    x = x.coalesce() if x.is_sparse else x
    found = Closure(
        closure.objective,
        x,
        closure.y[indices],
        closure.number,
        closure.stream,
        closure.part,
        closure.factor,
    )
    found.follow(closure)
    return found


def pack_closure(closure: Closure | None) -> dict[str, Any] | None:
    """Return a minibatch as a checkpoint holds it."""
    if closure is None:
        return None
    return {name: getattr(closure, name) for name in _GIVEN} | {"ratio": closure.factor}


def unpack_closure(objective: Objective, packed: Mapping[str, Any] | None) -> Closure | None:
    """Return the minibatch that `pack_closure` has packed."""
    if packed is None:
        return None
    given = {name: packed[name] for name in _GIVEN}
    return Closure(objective, **given, factor=packed.get("ratio"))


_OF_SUBSETS = 1 << 31  # beside the parts of the generators of labels


def subset(closure: Closure, size: int) -> Int[Tensor, " n"]:
    """Return `size` different examples (all where there are no more), ascending.

    They are a function of the closure's number alone, so that they are the same alone and in
    company, continue from a checkpoint, and are the same on every device.
    """
    objective, count = closure.objective, len(closure.x)
    seed = objective.generator(
        closure.number, closure.stream, _OF_SUBSETS + closure.part
    ).initial_seed()
    order = torch.randperm(count, generator=torch.Generator("cpu").manual_seed(seed), device="cpu")
    return order[:size].sort().values.to(closure.x.device)


def loss_at(closure: Closure, step: Mapping[str, Tensor]) -> Float[Tensor, ""]:
    """Return the mean loss of the minibatch at weights + step, {block: tensor}, without a graph.

    Nothing moves, not even BatchNorm's buffers. Inf or NaN where the loss is not finite there: a
    trial point may be bad.
    """
    objective = closure.objective
    parameters, saved = objective.parameters, weights(objective)
    try:
        with torch.no_grad():
            for block in objective.blocks:
                for name, d in block.scatter(step[block.name]).items():
                    parameters[name].add_(d)
            loss = closure.losses().mean()
            if objective.l2:
                loss += objective.l2 * sum(p.square().sum() for p in parameters.values())
    finally:
        restore_weights(objective, saved)
    return loss


def rounding(loss: Float[Tensor, ""]) -> float:
    """Return how far two values of the loss may differ by rounding alone: 10 ε |loss|.

    Line searches and the reduction ratio take differences below it for none.
    """
    return 10 * torch.finfo(loss.dtype).eps * abs(float(loss))


@contextmanager
def moved(objective: Objective, d: Float[Tensor, " D"], by: float) -> Iterator[None]:
    """Move the parameters to θ + by · d inside, and back to the bit after."""
    parameters, saved = objective.parameters, weights(objective)
    try:
        with torch.no_grad():
            for name, change in objective.layout.unflatten(d).items():
                parameters[name].add_(change, alpha=by)
        yield
    finally:
        restore_weights(objective, saved)


def searched(
    observation: Observation, g: Float[Tensor, " D"], d: Float[Tensor, " D"], search: Search
) -> Found:
    """Search how far to go along −d, on the minibatch of the observation, whose gradient is g.

    The parameters are back after it.
    """
    objective = observation.closure.objective
    slope, start = -float(g @ d), float(observation.loss)
    if not slope < 0:
        # nothing to gain: a gradient of zeros, or momentum against this direction
        return Found(1.0, 1, True)
    slack = rounding(observation.loss)

    def loss(t: float) -> float:
        return float(loss_at(observation.closure, unflat(objective.layout, -t * d)))

    def loss_and_slope(t: float) -> tuple[float, float]:
        with moved(objective, d, -t):
            try:
                seen = observation.closure.observe({"data"}, move_buffers=False)
            except Diverged:
                return math.inf, math.nan
            return float(seen.loss), -float(flat(objective.layout, seen.gradients) @ d)

    return (armijo(loss, start, slope, slack=slack) if search == "armijo"
            else wolfe(loss_and_slope, start, slope, slack=slack))  # fmt: skip


class WholeVectorCurvature(CurvatureDefaults):
    """Base of methods of the whole vector: their settings, a count of steps, and no warm start.

    Args:
        objective: whose parameters.
        settings: see `CurvatureSettings`.
    """

    step_needs: frozenset[Pass] = frozenset()
    warm_needs: frozenset[Pass] = frozenset()

    def __init__(self, objective: Objective, settings: CurvatureSettings) -> None:
        self.objective, self.layout = objective, objective.layout
        self.labels, self.damping, self.name = settings.labels, settings.damping, settings.name
        self.cadence = settings.cadence
        self.steps = 0

    def absorb(self, observation: Observation) -> None:
        """Do nothing: the documents have no warm start of statistics."""


def check_curvature_size(size: int | None) -> None:
    """Raise CurvlabError for N₂ < 1."""
    if size is not None and size < 1:
        raise CurvlabError(
            f"curvature_size must be a positive number of examples, or None for all, not {size:g}"
        )
