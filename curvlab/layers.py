"""Blocks and rules: the one place that knows module types.

A **rule** says how one layer type reads as ``h[n, t, o] = Σᵢ W[o, i] a[n, t, γ(o), i]``; a **block** is the set of parameters
that is preconditioned together, laid out as one tensor ([O, I] for a layer with a rule, the bias as its last column).

The outputs of a layer lie in equal groups γ, each with inputs of its own. Linear layers and plain convolutions have one group
(and then ``a`` has no axis for it); grouped convolutions have several; normalisation layers, ``h = w ⊙ x̂ + b``, have one for
every output.

Legend: N examples, T places where the weight is shared, Γ groups of outputs, I inputs incl. the bias column, O outputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from curvlab.errors import CurvlabError


@dataclass(frozen=True)
class Rule:
    """How one layer type reads as ``h[n, t, o] = Σᵢ W[o, i] a[n, t, γ(o), i]``.

    Args:
        inputs: x → [N, T, I] (one group) or [N, T, Γ, I], without the bias column.
        outputs: h or ∂ℓ/∂h → [N, T, O].
        groups: Γ of a module.
        covers: whether the rule holds for this module; one that it does not cover is a layer without a rule.
        transposed: whether the parameter is stored as [I, O].
        constant: inputs whose weights autograd holds fixed (the row of a padding token).
        stateful: whether `inputs` reads what a later pass may change, and so has to be called in its own.
        gradient: (module, x, ∂ℓ/∂h as `outputs` gives it) → that of the weight summed over examples, [O, I] without the bias,
            where there is a way that does not form `inputs`; any number of outputs.
        response: (module, x, v) → aᵀv without the bias column, likewise; of modules with one group.
    """

    inputs: Callable[[Any, Tensor], Float[Tensor, "N T *G I"]]
    outputs: Callable[[Tensor], Float[Tensor, "N T O"]]
    groups: Callable[[Any], int] = lambda module: 1
    covers: Callable[[Any], bool] = lambda module: True
    transposed: bool = False
    constant: Callable[[Any], tuple[int, ...]] = lambda module: ()
    stateful: bool = False
    gradient: Callable[[Any, Tensor, Float[Tensor, "N T O"]], Float[Tensor, "O I"]] | None = None
    response: Callable[[Any, Tensor, Float[Tensor, " I"]], Float[Tensor, "N T"]] | None = None


def _places_last(x: Float[Tensor, "N *T F"]) -> Float[Tensor, "N T F"]:
    """Features last, every axis between the batch and the features a place: [N, F] has T = 1."""
    return x.reshape(x.shape[0], -1, x.shape[-1])


def _channels_first(x: Float[Tensor, "N C *T"]) -> Float[Tensor, "N T C"]:
    """Channels second, every axis after them a place: [N, C] has T = 1."""
    return x.reshape(x.shape[0], x.shape[1], -1).transpose(1, 2)


def _padding(module: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> list[int]:
    """As `F.pad` takes it: left and right of the last axis, then of the one before it …"""
    if module.padding == "valid":
        return [0, 0] * len(module.kernel_size)
    if module.padding == "same":
        total = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
        return [side for t in reversed(total) for side in (t // 2, t - t // 2)]
    padding: tuple[int, ...] = module.padding  # type: ignore[assignment]  # the strings are dealt with
    return [p for p in reversed(padding) for _ in range(2)]


def _padded(module: nn.Conv1d | nn.Conv2d | nn.Conv3d, x: Float[Tensor, "N C *S"]) -> Float[Tensor, "N C *P"]:
    if x.ndim != len(module.kernel_size) + 2:
        raise CurvlabError(f"a convolution's input must be [N, C, …], not {list(x.shape)}: keep the batch as the first axis")
    padding = _padding(module)
    if not any(padding):
        return x
    return F.pad(x, padding, mode="constant" if module.padding_mode == "zeros" else module.padding_mode)


def _patches(module: nn.Conv1d | nn.Conv2d | nn.Conv3d, x: Float[Tensor, "N C *S"]) -> Float[Tensor, "N T *G I"]:
    """What every output pixel sees, in the order of the filter's own axes (thesis 3.2.2: a_t); groups apart."""
    x = _padded(module, x)
    for axis, (k, s, d) in enumerate(zip(module.kernel_size, module.stride, module.dilation, strict=True), 2):
        x = x.unfold(axis, d * (k - 1) + 1, s)[..., ::d]
    spatial = len(module.kernel_size)
    x = x.permute(0, *range(2, 2 + spatial), 1, *range(2 + spatial, 2 + 2 * spatial))  # [N, *T, C, *K]
    if module.groups == 1:
        return x.reshape(len(x), -1, module.weight[0].numel())
    return x.reshape(len(x), -1, module.groups, module.weight[0].numel())


def _filter_gradient(
    module: nn.Conv1d | nn.Conv2d | nn.Conv3d, x: Float[Tensor, "N C *S"], dh: Float[Tensor, "N T O"]
) -> Float[Tensor, "O I"]:
    """By torch's own kernel: patches are many times the images."""
    x = _padded(module, x)
    sizes = zip(x.shape[2:], module.dilation, module.kernel_size, module.stride, strict=True)
    places = [(size - d * (k - 1) - 1) // s + 1 for size, d, k, s in sizes]
    none, like = [0] * len(places), module.weight.detach()[: dh.shape[-1]]
    found: Tensor = torch.ops.aten.convolution_backward(
        dh.mT.reshape(len(x), -1, *places), x, like, None, module.stride, none, module.dilation, False, none,
        module.groups, [False, True, False],
    )[1]  # fmt: skip
    return found.flatten(1)


def _filter_response(
    module: nn.Conv1d | nn.Conv2d | nn.Conv3d, x: Float[Tensor, "N C *S"], v: Float[Tensor, " I"]
) -> Float[Tensor, "N T"]:
    """v is a filter."""
    none = [0] * len(module.kernel_size)
    found: Tensor = torch.ops.aten.convolution(
        _padded(module, x), v.view_as(module.weight[:1]), None, module.stride, none, module.dilation, False, none, 1
    )
    return found.flatten(1)


def _apart(x: Float[Tensor, "N T O"]) -> Float[Tensor, "N T *G I"]:
    """Each feature the one input of a group of its own; a single group has no axis."""
    return x[..., None] if x.shape[-1] > 1 else x


def _tokens(module: nn.Embedding, x: Tensor) -> Float[Tensor, "N T I"]:
    """One-hot rows; the row of the padding token, which has no gradient, is zero."""
    hot = F.one_hot(x.reshape(len(x), -1).long(), module.num_embeddings).to(module.weight.dtype)
    if module.padding_idx is not None:
        hot[..., module.padding_idx] = 0
    return hot


def _table_gradient(module: nn.Embedding, x: Tensor, dh: Float[Tensor, "N T O"]) -> Float[Tensor, "O I"]:
    """Summed token by token: one-hot rows are as long as the table."""
    found = dh.new_zeros(module.num_embeddings, dh.shape[-1]).index_add_(0, x.flatten().long(), dh.flatten(0, 1))
    if module.padding_idx is not None:
        found[module.padding_idx] = 0
    return found.mT


def _table_response(module: nn.Embedding, x: Tensor, v: Float[Tensor, " I"]) -> Float[Tensor, "N T"]:
    found = v[x.reshape(len(x), -1).long()]
    return found if module.padding_idx is None else found * (x.reshape(len(x), -1) != module.padding_idx)


def _batch_norm(module: nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d, x: Tensor) -> Float[Tensor, "N T *G I"]:
    fixed = not module.training and module.running_mean is not None
    mean, var = (module.running_mean, module.running_var) if fixed else (None, None)
    return _apart(_channels_first(F.batch_norm(x, mean, var, training=not fixed, eps=module.eps)))


def _normalised(module: nn.LayerNorm | nn.RMSNorm, x: Tensor) -> Float[Tensor, "N T *G I"]:
    shape = list(module.normalized_shape)
    flat = F.layer_norm(x, shape, eps=module.eps) if isinstance(module, nn.LayerNorm) else F.rms_norm(x, shape, eps=module.eps)
    return _apart(_places_last(flat))


_LINEAR = Rule(inputs=lambda module, x: _places_last(x), outputs=_places_last)
_CONVOLUTION = Rule(_patches, _channels_first, groups=lambda module: int(module.groups), gradient=_filter_gradient,
                    response=_filter_response)  # fmt: skip
_BATCH_NORM = Rule(_batch_norm, _channels_first, groups=lambda module: int(module.num_features), stateful=True)

RULES: dict[type[nn.Module], Rule] = {
    nn.Linear: _LINEAR,
    nn.Conv1d: _CONVOLUTION,
    nn.Conv2d: _CONVOLUTION,
    nn.Conv3d: _CONVOLUTION,
    nn.Embedding: Rule(
        inputs=_tokens,
        outputs=_places_last,
        covers=lambda module: module.max_norm is None and not module.scale_grad_by_freq,
        transposed=True,
        constant=lambda module: () if module.padding_idx is None else (module.padding_idx,),
        gradient=_table_gradient,
        response=_table_response,
    ),
    nn.BatchNorm1d: _BATCH_NORM,
    nn.BatchNorm2d: _BATCH_NORM,
    nn.BatchNorm3d: _BATCH_NORM,
    nn.LayerNorm: Rule(  # one place for each normalised slice
        inputs=_normalised,
        outputs=_places_last,
        groups=lambda module: module.weight.numel(),
        covers=lambda module: len(module.normalized_shape) == 1,
    ),
    nn.RMSNorm: Rule(
        inputs=_normalised,
        outputs=_places_last,
        groups=lambda module: module.weight.numel(),
        covers=lambda module: len(module.normalized_shape) == 1,
    ),
    nn.GroupNorm: Rule(
        inputs=lambda module, x: _apart(_channels_first(F.group_norm(x, module.num_groups, eps=module.eps))),
        outputs=_channels_first,
        groups=lambda module: int(module.num_channels),
    ),
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

    @cached_property
    def groups(self) -> int:
        """Γ, groups of outputs with inputs of their own; 1 for most layers."""
        return 1 if self.rule is None else self.rule.groups(self.module)

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def gather(self, tensors: Mapping[str, Tensor], batch: int = 0) -> Tensor:
        """{parameter: tensor} → one tensor of the block's shape, after `batch` leading axes."""
        weight = tensors[self.params[0]]
        leading = weight.shape[:batch]
        if self.rule is None:
            return weight
        if self.rule.transposed:
            weight = weight.mT
        weight = weight.reshape(*leading, self.shape[0], -1)
        if not self.biased:
            return weight
        return torch.cat([weight, tensors[self.params[1]].reshape(*leading, -1, 1)], -1)

    def scatter(self, value: Tensor, batch: int = 0) -> dict[str, Tensor]:
        """One tensor of the block's shape → {parameter: tensor in the parameter's own shape}, views where possible."""
        leading = value.shape[:batch]
        value = value.reshape((*leading, *self.shape))
        if self.module is None or self.rule is None:
            return {self.params[0]: value}
        weight = value[..., :-1] if self.biased else value
        shape = self.module.get_parameter("weight").shape
        weight = weight.mT if self.rule.transposed else weight.reshape(*leading, *shape)
        return {self.params[0]: weight} | ({self.params[1]: value[..., -1]} if self.biased else {})

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
        rule = RULES.get(type(module))
        if rule is not None and weight in own and rule.covers(module):
            parameter = own.pop(weight)
            matrix = parameter.T if rule.transposed else parameter.reshape(len(parameter), -1)
            biased = own.pop(bias, None) is not None
            names = (weight, bias) if biased else (weight,)
            found.append((names, (matrix.shape[0], matrix.shape[1] + biased), module, biased))
        found.extend(((name,), tuple(p.shape), None, False) for name, p in own.items())
    if not found:
        raise CurvlabError("the model has no trainable layer: every parameter is frozen, or there is none")
    return tuple(Block(str(i), *rest) for i, rest in enumerate(found, 1))


@dataclass(frozen=True)
class Layout:
    """Where blocks lie in one vector: block after block, each row-major in its own shape."""

    blocks: tuple[Block, ...]

    def __len__(self) -> int:
        return sum(b.numel for b in self.blocks)

    @cached_property
    def slices(self) -> dict[str, slice]:
        """{block name: its entries}."""
        found, start = {}, 0
        for block in self.blocks:
            found[block.name] = slice(start, start + block.numel)
            start += block.numel
        return found

    def flatten(self, tensors: Mapping[str, Tensor], batch: int = 0) -> Tensor:
        """{parameter: tensor} → one vector, after `batch` leading axes."""
        return torch.cat([b.gather(tensors, batch).flatten(batch) for b in self.blocks], -1)

    def unflatten(self, vector: Tensor, batch: int = 0) -> dict[str, Tensor]:
        """One vector → {parameter: tensor in its own shape}."""
        found: dict[str, Tensor] = {}
        for block in self.blocks:
            found |= block.scatter(vector[..., self.slices[block.name]], batch)
        return found

    def constant(self) -> Tensor:
        """Entries that autograd holds fixed: no derivative in them."""
        found = []
        for block in self.blocks:
            held = torch.zeros(block.shape, dtype=torch.bool)
            if block.rule is not None:
                held[:, list(block.rule.constant(block.module))] = True
            found.append(held.flatten())
        return torch.cat(found)

    def places(self) -> dict[str, Tensor]:
        """{parameter: where its entries lie in the vector, in the parameter's own shape}."""
        return self.unflatten(torch.arange(len(self)))
