"""The step along a direction: how far each block goes, and the move itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from curvlab.layers import Block
from curvlab.objective import Objective
from curvlab.system.memory import portions

Decay = Callable[[Tensor], float] | float
"""Weight decay γ of a parameter, or of all."""


def move(
    objective: Objective,
    direction: dict[str, Tensor],
    lr: Callable[[Tensor], float],
    where: Tensor | None = None,
    decay: Decay = 0.0,
) -> None:
    """Move every parameter, W ← W − α (p + γ W), α = lr(parameter); none where the flag is false.

    As under torch's optimizers, a parameter stands still that has been frozen (`requires_grad` is
    off), and where α is 0.

    Args:
        objective: whose parameters.
        direction: {block: p}.
        lr: parameter → α.
        where: the flag; None: it is true.
        decay: γ, to the bit as where `decayed` has added it; 0 where it is in the direction.
    """
    parameters = objective.parameters
    alike: dict[tuple[float, float], list[tuple[Tensor, Tensor]]] = {}  # (W, p) by (α, γ)
    for block in objective.blocks:
        for name, p in block.scatter(direction[block.name]).items():
            w = parameters[name]
            rate = rate_of(w, lr)
            if rate:
                alike.setdefault((rate, decay_of(w, decay)), []).append((w, p))
    with torch.no_grad():
        for (rate, more), pairs in alike.items():
            for some in portions(pairs, lambda pair: pair[0]):
                W, d = [w for w, _ in some], [p for _, p in some]
                d = list(torch._foreach_add(d, W, alpha=more)) if more else d
                # one by one: under a mode, or on a GPU, `_foreach_add_` counts as no write
                for weight, p in zip(W, d, strict=True):
                    weight.add_(p if where is None else torch.where(where, p, 0.0), alpha=-rate)


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


def decay_of(parameter: Tensor, decay: Decay) -> float:
    """Return γ of a parameter."""
    return decay(parameter) if callable(decay) else decay


def decayed(
    objective: Objective, direction: Mapping[str, Tensor], decay: Decay
) -> dict[str, Tensor]:
    """Return {block: p + γ W}, γ of each parameter or of all."""
    parameters, found = objective.parameters, dict(direction)
    whole: dict[float, list[Block]] = {}  # blocks of one parameter, by its rate
    with torch.no_grad():
        for block in objective.blocks:
            if len(block.params) == 1:
                rate = decay_of(parameters[block.params[0]], decay)
                whole.setdefault(rate, []).append(block)
                continue
            found[block.name] = out = direction[block.name].new_empty(block.shape)
            into = block.scatter(out)  # views, since it is contiguous
            for name, part in block.scatter(direction[block.name]).items():
                rate = decay_of(parameters[name], decay)
                torch.add(part, parameters[name], alpha=rate, out=into[name])
        for rate, blocks in whole.items():
            each = [direction[b.name] for b in blocks], [b.gather(parameters) for b in blocks]
            added = torch._foreach_add(*each, alpha=rate)
            found |= {b.name: new for b, new in zip(blocks, added, strict=True)}
    return found
