"""The step along a direction: how far each block goes, and the move itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from curvlab.objective import Objective


def move(
    objective: Objective,
    direction: dict[str, Tensor],
    lr: Callable[[Tensor], float],
    where: Tensor | None = None,
) -> None:
    """Move every parameter, W ← W − α p, α = lr(parameter); none where the flag is false.

    As under torch's optimizers, a parameter stands still that has been frozen (`requires_grad` is
    off), and where α is 0.

    Args:
        objective: whose parameters.
        direction: {block: p}.
        lr: parameter → α.
        where: the flag; None: it is true.
    """
    parameters = objective.parameters
    with torch.no_grad():
        for block in objective.blocks:
            p = (
                direction[block.name]
                if where is None
                else torch.where(where, direction[block.name], 0.0)
            )
            for name, d in block.scatter(p).items():
                rate = rate_of(parameters[name], lr)
                if rate:
                    parameters[name].add_(d, alpha=-rate)


def arrive(
    objective: Objective,
    values: Mapping[str, Tensor],
    lr: Callable[[Tensor], float],
    where: Tensor | None = None,
) -> None:
    """Set every parameter to its value, to the bit; as `move`, none where the flag is false.

    Args:
        objective: whose parameters.
        values: {parameter: value}; others stand still.
        lr: parameter → α; where it is 0 the parameter stands still.
        where: the flag; None: it is true.
    """
    with torch.no_grad():
        for name, p in objective.parameters.items():
            if name in values and rate_of(p, lr):
                p.copy_(values[name] if where is None else torch.where(where, values[name], p))


def difference(objective: Objective, before: Sequence[Tensor]) -> dict[str, Tensor]:
    """Return {block: change of its parameters} since they were `before` (`objective.weights`)."""
    parameters = objective.parameters
    changes = {
        name: (p.detach() - old).to(objective.dtype)
        for (name, p), old in zip(parameters.items(), before, strict=True)
    }
    return {block.name: block.gather(changes) for block in objective.blocks}


def displacement(
    objective: Objective, direction: dict[str, Tensor], lr: Callable[[Tensor], float]
) -> dict[str, Tensor]:
    """Return {block: −α p}, what `move` adds to its parameters."""
    parameters, found = objective.parameters, {}
    for block in objective.blocks:
        rates = {name: rate_of(parameters[name], lr) for name in block.params}
        parts = block.scatter(direction[block.name])
        found[block.name] = block.gather(
            {
                name: d * -rates[name] if rates[name] else torch.zeros_like(d)
                for name, d in parts.items()
            }
        )
    return found


def rate_of(parameter: Tensor, lr: Callable[[Tensor], float]) -> float:
    """Return α of a parameter; 0 of what has been frozen."""
    return lr(parameter) if parameter.requires_grad else 0.0
