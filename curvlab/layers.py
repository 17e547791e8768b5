"""Blocks: which parameters are preconditioned together, and how they are laid out as one tensor.

A **block** is the set of parameters of one layer, laid out as one matrix [O, I] with the bias as
its last column; a parameter of anything else is a block of its own, in its own shape. The partition
knows modules only to name it: what a block *does* in a pass is seen in the calls that take its
parameters (`functions`, `capture`), and nothing here claims that it is used at all.

The outputs of a layer lie in equal groups γ, each with inputs of its own. Linear layers and plain
convolutions have one group (and then ``a`` has no axis for it); grouped convolutions have several;
normalisation layers, ``h = w ⊙ x̂ + b``, have one for every output.

Legend: N examples, T places where the weight is shared, Γ groups of outputs, I inputs incl. the
    bias column, O outputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from curvlab.errors import CurvlabError


@dataclass(frozen=True)
class Layer:
    """Layout of the parameters of one type of layer as one matrix.

    Args:
        transposed: whether the weight is stored as [I, O].
        groups: Γ of a module.
        covers: whether the layout holds for this module; the parameters of one that it does not
            cover are blocks of their own.
        weight: the name of its weight.
        bias: the name of its bias.
    """

    transposed: bool = False
    groups: Callable[[Any], int] = lambda module: 1
    covers: Callable[[Any], bool] = lambda module: True
    weight: str = "weight"
    bias: str = "bias"


_CONVOLUTION = Layer(groups=lambda module: int(module.groups))
_BATCH_NORM = Layer(groups=lambda module: int(module.num_features))
_LAST_AXIS = Layer(
    groups=lambda module: module.weight.numel(),
    covers=lambda module: len(module.normalized_shape) == 1,
)

LAYERS: dict[type[nn.Module] | str, Layer] = {
    nn.Linear: Layer(),
    nn.Conv1d: _CONVOLUTION,
    nn.Conv2d: _CONVOLUTION,
    nn.Conv3d: _CONVOLUTION,
    nn.Embedding: Layer(
        transposed=True,
        covers=lambda module: module.max_norm is None and not module.scale_grad_by_freq,
    ),
    nn.BatchNorm1d: _BATCH_NORM,
    nn.BatchNorm2d: _BATCH_NORM,
    nn.BatchNorm3d: _BATCH_NORM,
    nn.LayerNorm: _LAST_AXIS,
    nn.RMSNorm: _LAST_AXIS,
    nn.GroupNorm: Layer(groups=lambda module: int(module.num_channels)),
    nn.MultiheadAttention: Layer(weight="in_proj_weight", bias="in_proj_bias"),
    "transformers.pytorch_utils.Conv1D": Layer(transposed=True),  # GPT-2's linear layer
}
"""Layouts by type of layer, or by the full name of a type that need not be installed.

A subclass has its parent's.
"""


def layer_of(module: nn.Module) -> Layer | None:
    """Return the layout of a module's own parameters, None where each stands for itself."""
    for kind in type(module).__mro__:
        found = LAYERS.get(kind) or LAYERS.get(f"{kind.__module__}.{kind.__qualname__}")
        if found is not None:
            return (
                found
                if module._parameters.get(found.weight) is not None and found.covers(module)
                else None
            )
    return None


@dataclass(frozen=True)
class Block:
    """Parameters that are preconditioned together.

    `params` are names in the model; with a layer they are its weight, then its bias (each only if
    it is trained). Without one a block is one parameter in its own shape and `module` is None.
    `weight_shape` is the weight's own.
    """

    name: str
    params: tuple[str, ...]
    shape: tuple[int, ...]
    module: nn.Module | None
    biased: bool = False
    weight_shape: tuple[int, ...] = ()

    @cached_property
    def layer(self) -> Layer | None:
        """Layout of the module's parameters (`layer_of`); None without one or a module."""
        return None if self.module is None else layer_of(self.module)

    @cached_property
    def groups(self) -> int:
        """Number of groups of outputs with inputs of their own, Γ; 1 for most layers."""
        return 1 if self.layer is None else self.layer.groups(self.module)

    @property
    def numel(self) -> int:
        """Number of the block's elements, the product of its shape."""
        return math.prod(self.shape)

    def gather(self, tensors: Mapping[str, Tensor], batch: int = 0) -> Tensor:
        """Return {parameter: tensor} as one tensor of the block's shape.

        `batch` leading axes stay.
        """
        weight = self.gather_weight(tensors, batch)
        if self.layer is None or not self.biased:
            return weight
        return torch.cat(
            [weight, tensors[self.params[1]].reshape(*weight.shape[:batch], -1, 1)], -1
        )

    def gather_weight(self, tensors: Mapping[str, Tensor], batch: int = 0) -> Tensor:
        """Return the same as `gather` without the bias column: a view where possible."""
        weight = tensors[self.params[0]]
        if self.layer is None:
            return weight
        if self.layer.transposed:
            weight = weight.mT
        if weight.ndim == batch + 2:  # [O, I] as it is
            return weight
        return weight.reshape(*weight.shape[:batch], self.shape[0], -1)

    def scatter(self, value: Tensor, batch: int = 0) -> dict[str, Tensor]:
        """Return one tensor of the block's shape as {parameter: tensor in its own shape}.

        Views where possible; `batch` leading axes stay.
        """
        leading = value.shape[:batch]
        if value.shape[batch:] != self.shape:
            value = value.reshape((*leading, *self.shape))
        if self.layer is None:
            return {self.params[0]: value}
        weight = value[..., :-1] if self.biased else value
        if self.layer.transposed:
            weight = weight.mT
        elif len(self.weight_shape) != 2:
            weight = weight.reshape(*leading, *self.weight_shape)
        return {self.params[0]: weight} | ({self.params[1]: value[..., -1]} if self.biased else {})

    def __str__(self) -> str:
        return f"block {self.name} ({', '.join(self.params)})"


def blocks(model: nn.Module) -> tuple[Block, ...]:
    """Divide the trainable parameters into blocks, named "1", "2", … in the order of the modules.

    A parameter that several modules share belongs to the first of them.

    Raises:
        CurvlabError: a model without trainable parameters.
    """
    found: list[
        tuple[tuple[str, ...], tuple[int, ...], nn.Module | None, bool, tuple[int, ...]]
    ] = []
    taken: set[int] = set()
    for prefix, module in model.named_modules():
        own: dict[str, nn.Parameter] = {}
        for name, p in module.named_parameters(recurse=False):
            full = f"{prefix}.{name}".lstrip(".")
            if p.requires_grad and p.numel() and id(p) not in taken:
                own[full] = p
                taken.add(id(p))
        layer = layer_of(module)
        if layer is not None:
            weight, bias = (
                f"{prefix}.{layer.weight}".lstrip("."),
                f"{prefix}.{layer.bias}".lstrip("."),
            )
            if weight in own and _matrix(own[weight], layer):
                parameter = own.pop(weight)
                matrix = parameter.T if layer.transposed else parameter.reshape(len(parameter), -1)
                biased = bias in own and own[bias].shape == matrix.shape[:1]
                names = (weight, bias) if biased else (weight,)
                if biased:
                    own.pop(bias)
                shape = (matrix.shape[0], matrix.shape[1] + biased)
                found.append((names, shape, module, biased, tuple(parameter.shape)))
        found.extend(
            ((name,), tuple(p.shape), None, False, tuple(p.shape)) for name, p in own.items()
        )
    if not found:
        raise CurvlabError(
            "the model has no trainable layer: every parameter is frozen, or there is none"
        )
    return tuple(Block(str(i), *rest) for i, rest in enumerate(found, 1))


def _matrix(weight: Tensor, layer: Layer) -> bool:
    """Return whether a weight is what the layer's layout expects.

    A subclass may have put anything in its place.
    """
    return weight.ndim == 2 if layer.transposed else weight.ndim >= 1


@dataclass(frozen=True)
class Layout:
    """Places of blocks in one vector: block after block, each row-major in its own shape."""

    blocks: tuple[Block, ...]

    def __len__(self) -> int:
        return sum(b.numel for b in self.blocks)

    @cached_property
    def slices(self) -> dict[str, slice]:
        """Entries of each block in the vector, {block name: slice}."""
        found, start = {}, 0
        for block in self.blocks:
            found[block.name] = slice(start, start + block.numel)
            start += block.numel
        return found

    def flatten(self, tensors: Mapping[str, Tensor], batch: int = 0) -> Tensor:
        """Return {parameter: tensor} as one vector; `batch` leading axes stay."""
        return torch.cat([b.gather(tensors, batch).flatten(batch) for b in self.blocks], -1)

    def unflatten(self, vector: Tensor, batch: int = 0) -> dict[str, Tensor]:
        """Return a vector, after `batch` leading axes, as {parameter: tensor in its own shape}."""
        found: dict[str, Tensor] = {}
        for block in self.blocks:
            found |= block.scatter(vector[..., self.slices[block.name]], batch)
        return found

    def places(self) -> dict[str, Tensor]:
        """Return {parameter: where its entries lie in the vector, in the parameter's own shape}."""
        return self.unflatten(torch.arange(len(self), device="cpu"))
