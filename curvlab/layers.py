"""Blocks and rules: the one place that knows module types.

A **rule** says how one layer type reads as ``h[n, t] = W a[n, t]``; a **block** is the set of parameters that is
preconditioned together, laid out as one tensor ([O, I] for a layer with a rule, the bias as its last column).

Legend: N examples, T places where the weight is shared, I inputs incl. the bias column, O outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from curvlab.errors import CurvlabError


@dataclass(frozen=True)
class Rule:
    """How one layer type reads as ``h[n, t] = W a[n, t]``; ``matrix`` gives the weight's shape [O, I without bias]."""

    inputs: Callable[[nn.Module, Tensor], Float[Tensor, "N T I"]]  # x, without the bias column
    outputs: Callable[[Tensor], Float[Tensor, "N T O"]]  # h or ∂ℓ/∂h


def _places_last(x: Float[Tensor, "N *T F"]) -> Float[Tensor, "N T F"]:
    """Features last, every axis between the batch and the features a place: [N, F] has T = 1."""
    return x.reshape(x.shape[0], -1, x.shape[-1])


RULES: dict[type[nn.Module], Rule] = {
    nn.Linear: Rule(inputs=lambda module, x: _places_last(x), outputs=_places_last),
}


@dataclass(frozen=True)
class Block:
    """Parameters preconditioned together.

    `params` are names in the model; with a rule they are the weight, then the bias (each only if it is trained). Without a
    rule a block is one parameter in its own shape and `module` is None.
    """

    name: str
    params: tuple[str, ...]
    shape: tuple[int, ...]
    module: nn.Module | None
    biased: bool = False

    @property
    def rule(self) -> Rule | None:
        return None if self.module is None else RULES[type(self.module)]

    @property
    def numel(self) -> int:
        return int(torch.Size(self.shape).numel())

    def gather(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """{parameter: tensor} → one tensor of the block's shape."""
        if self.module is None:
            return tensors[self.params[0]]
        weight = tensors[self.params[0]].reshape(self.shape[0], -1)
        return torch.cat([weight, tensors[self.params[1]][:, None]], 1) if self.biased else weight

    def scatter(self, value: Tensor) -> dict[str, Tensor]:
        """One tensor of the block's shape → {parameter: tensor in the parameter's own shape}, views where possible."""
        if self.module is None:
            return {self.params[0]: value.reshape(self.shape)}
        value = value.reshape(self.shape)
        weight = self.module.get_parameter("weight")
        if self.biased:
            return {self.params[0]: value[:, :-1].reshape(weight.shape), self.params[1]: value[:, -1]}
        return {self.params[0]: value.reshape(weight.shape)}

    def __str__(self) -> str:
        return f"block {self.name} ({', '.join(self.params)})"


def blocks(model: nn.Module) -> tuple[Block, ...]:
    """The partition of the trainable parameters into blocks, named "1", "2", … in the order of the model's modules.

    Raises CurvlabError for a parameter that two places share and for a model without trainable parameters.
    """
    owners: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) in owners:
            raise CurvlabError(
                f"parameters '{owners[id(parameter)]}' and '{name}' are tied (one tensor): untie them, "
                "blocks must not share parameters"
            )
        owners[id(parameter)] = name

    found: list[tuple[tuple[str, ...], tuple[int, ...], nn.Module | None, bool]] = []
    for prefix, module in model.named_modules():
        own = {
            f"{prefix}.{name}".lstrip("."): p
            for name, p in module.named_parameters(recurse=False)
            if p.requires_grad and p.numel()
        }
        weight, bias = f"{prefix}.weight".lstrip("."), f"{prefix}.bias".lstrip(".")
        if type(module) in RULES and weight in own:
            matrix = own.pop(weight).flatten(1)
            biased = own.pop(bias, None) is not None
            names = (weight, bias) if biased else (weight,)
            found.append((names, (matrix.shape[0], matrix.shape[1] + biased), module, biased))
        found.extend(((name,), tuple(p.shape), None, False) for name, p in own.items())
    if not found:
        raise CurvlabError("the model has no trainable layer: every parameter is frozen, or there is none")
    return tuple(Block(str(i), *rest) for i, rest in enumerate(found, 1))
