"""FUNCTIONS: how one call of a torch function reads as a layer.

A rule belongs to a function, not to a module.

A **rule** says how a call reads as ``h[r, p, o] = Σᵢ W[o, i] a[r, p, γ(o), i]``: r counts the rows
of its first axis and p the places behind it. Which rows and places belong to which example is not
the rule's business (`ARRANGEMENTS`, and `check`).

Legend: R rows, P places of a row, N examples, T places of an example, Γ groups of outputs, I inputs
without the bias column, O outputs, V vectors sent back.
"""

from __future__ import annotations

import math
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Shaped
from torch import Tensor

from curvlab.arrangements import ARRANGEMENTS as ARRANGEMENTS
from curvlab.arrangements import arrangements as arrangements
from curvlab.control_flow import CONTROL_FLOW
from curvlab.reorderings import REORDERING as REORDERING
from curvlab.reorderings import indexed as indexed

Call = SimpleNamespace
"""The arguments of one call by name: `input`, `weight`, `bias`, and the function's own."""


@dataclass(frozen=True)
class Rule:
    """The way that a function reads as ``h[r, p, o] = Σᵢ W[o, i] a[r, p, γ(o), i]``.

    Args:
        names: of the arguments in order; the input is `input`, the parameters are `weight` and
            `bias`.
        inputs: (call, x) → [R, P, I] (one group) or [R, P, Γ, I], without the bias column.
        outputs: h or ∂ℓ/∂h → [R, P, O].
        defaults: of arguments that may be left out.
        aliases: other names by keyword.
        groups: Γ of a call.
        covers: whether the rule holds for this call; one that it does not cover is a call without a
            rule.
        transposed: whether the weight is taken as [I, O].
        stateful: whether `inputs` reads what a later pass may change, and so has to be called in
            its own.
        gradient: (call, x, ∂ℓ/∂h as `outputs` gives it) → that of the weight summed over rows, [O,
            I], where there is a way that does not form `inputs`; any number of outputs.
        response: (call, x, v) → aᵀv, [R, P], likewise; of calls with one group.
        counts: (call, x) → the diagonal of Σ a aᵀ over rows and places, where the rest of it is 0.
    """

    names: tuple[str, ...]
    inputs: Callable[[Call, Tensor], Float[Tensor, "R P *G I"]]
    outputs: Callable[[Tensor], Float[Tensor, "R P O"]]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)
    groups: Callable[[Call], int] = lambda call: 1
    covers: Callable[[Call], bool] = lambda call: True
    transposed: bool = False
    stateful: bool = False
    gradient: Callable[[Call, Tensor, Float[Tensor, "R P O"]], Float[Tensor, "O I"]] | None = None
    response: Callable[[Call, Tensor, Float[Tensor, " I"]], Float[Tensor, "R P"]] | None = None
    counts: Callable[[Call, Tensor], Float[Tensor, " I"]] | None = None

    def bind(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Call:
        """Return the call's arguments by name."""
        named = {"bias": None, **self.defaults}
        named.update(zip(self.names, args, strict=False))
        if kwargs:
            named.update((self.aliases.get(name, name), value) for name, value in kwargs.items())
        return SimpleNamespace(**named)


@lru_cache(maxsize=4096)
def extent(outputs: Callable[[Tensor], Tensor], shape: torch.Size) -> tuple[int, int]:
    """Return (R, P) of a rule's `outputs` of that shape."""
    rows, places, _ = outputs(torch.empty(shape, device="meta")).shape
    return rows, places


def _places_last(x: Shaped[Tensor, "R *P F"]) -> Shaped[Tensor, "R P F"]:
    """Put features last, every axis between the rows and the features a place: [R, F] has P = 1."""
    if x.ndim == 2:  # as most are, and at every look
        return x[:, None]
    return x.reshape(x.shape[0], math.prod(x.shape[1:-1]), x.shape[-1])


def _channels_first(x: Shaped[Tensor, "R C *P"]) -> Shaped[Tensor, "R P C"]:
    """Put channels last, every axis behind them a place: [R, C] has P = 1."""
    return x.reshape(x.shape[0], x.shape[1], math.prod(x.shape[2:])).transpose(1, 2)


def _each(call: Call, name: str) -> tuple[int, ...]:
    """Return a number for every axis of the filter."""
    value, spatial = getattr(call, name), call.weight.ndim - 2
    return (
        (value,) * spatial
        if isinstance(value, int)
        else tuple(value) * (spatial if len(value) == 1 else 1)
    )


def _padding(call: Call) -> list[int]:
    """Return the padding as `F.pad` takes it: left and right, from the last axis to the first."""
    kernel = call.weight.shape[2:]
    if call.padding == "valid":
        return [0, 0] * len(kernel)
    if call.padding == "same":
        total = [d * (k - 1) for d, k in zip(_each(call, "dilation"), kernel, strict=True)]
        return [side for t in reversed(total) for side in (t // 2, t - t // 2)]
    return [p for p in reversed(_each(call, "padding")) for _ in range(2)]


def _padded(call: Call, x: Float[Tensor, "R C *S"]) -> Float[Tensor, "R C *Q"]:
    padding = _padding(call)
    return F.pad(x, padding) if any(padding) else x


def _patches(call: Call, x: Float[Tensor, "R C *S"]) -> Float[Tensor, "R P *G I"]:
    """Return what every output pixel sees, in the order of the filter's own axes; groups apart.

    It is a_t of thesis 3.2.2.
    """
    x = _padded(call, x)
    kernel = call.weight.shape[2:]
    for axis, (k, s, d) in enumerate(
        zip(kernel, _each(call, "stride"), _each(call, "dilation"), strict=True), 2
    ):
        x = x.unfold(axis, d * (k - 1) + 1, s)[..., ::d]
    spatial = len(kernel)
    # [R, *P, C, *K]
    x = x.permute(0, *range(2, 2 + spatial), 1, *range(2 + spatial, 2 + 2 * spatial))
    if call.groups == 1:
        return x.reshape(len(x), -1, call.weight[0].numel())
    return x.reshape(len(x), -1, call.groups, call.weight[0].numel())


def _filter_gradient(
    call: Call, x: Float[Tensor, "R C *S"], dh: Float[Tensor, "R P O"]
) -> Float[Tensor, "O I"]:
    """Compute a filter's gradient by torch's own kernel: patches are many times the images."""
    x = _padded(call, x)
    stride, dilation, kernel = _each(call, "stride"), _each(call, "dilation"), call.weight.shape[2:]
    sizes = zip(x.shape[2:], dilation, kernel, stride, strict=True)
    places = [(size - d * (k - 1) - 1) // s + 1 for size, d, k, s in sizes]
    none, like = [0] * len(places), call.weight[: dh.shape[-1]].to(x.dtype)
    found: Tensor = torch.ops.aten.convolution_backward(
        dh.mT.reshape(len(x), -1, *places), x, like, None, stride, none, dilation, False, none,
        call.groups, [False, True, False],
    )[1]  # fmt: skip
    return found.flatten(1)


def _filter_response(
    call: Call, x: Float[Tensor, "R C *S"], v: Float[Tensor, " I"]
) -> Float[Tensor, "R P"]:
    """Compute aᵀv by a convolution whose filter is v."""
    none = [0] * (call.weight.ndim - 2)
    found: Tensor = torch.ops.aten.convolution(
        _padded(call, x),
        v.view_as(call.weight[:1]),
        None,
        _each(call, "stride"),
        none,
        _each(call, "dilation"),
        False,
        none,
        1,
    )
    return found.flatten(1)


def _apart(x: Float[Tensor, "R P O"]) -> Float[Tensor, "R P *G I"]:
    """Make each feature the one input of a group of its own; a single group has no axis."""
    return x[..., None] if x.shape[-1] > 1 else x


def _rows_of(call: Call, x: Tensor) -> Tensor:
    return x.reshape(len(x), -1).long()


def _tokens(call: Call, x: Tensor) -> Float[Tensor, "R P I"]:
    """Return one-hot rows; the row of the padding token, which has no gradient, is zero."""
    hot = F.one_hot(_rows_of(call, x), len(call.weight)).to(call.weight.dtype)
    if call.padding_idx is not None:
        hot[..., call.padding_idx] = 0
    return hot


def _table_gradient(call: Call, x: Tensor, dh: Float[Tensor, "R P O"]) -> Float[Tensor, "O I"]:
    """Sum a table's gradient token by token: one-hot rows are as long as the table."""
    found = dh.new_zeros(len(call.weight), dh.shape[-1]).index_add_(
        0, x.flatten().long(), dh.flatten(0, 1)
    )
    if call.padding_idx is not None:
        found[call.padding_idx] = 0
    return found.mT


def _table_response(call: Call, x: Tensor, v: Float[Tensor, " I"]) -> Float[Tensor, "R P"]:
    rows = _rows_of(call, x)
    found = v[rows]
    return (
        found if call.padding_idx is None else found * (rows != call.padding_idx % len(call.weight))
    )


def _table_counts(call: Call, x: Tensor) -> Float[Tensor, " I"]:
    """Count how often each row of the table is read: Σ a aᵀ of one-hot rows is their diagonal."""
    rows = _rows_of(call, x).flatten()
    ones = call.weight.new_ones(()).expand(len(rows))
    found: Tensor = call.weight.new_zeros(len(call.weight)).index_add_(0, rows, ones)
    if call.padding_idx is not None:
        found[call.padding_idx] = 0
    return found


def _batch_norm(call: Call, x: Tensor) -> Float[Tensor, "R P *G I"]:
    mean, var = (None, None) if call.training else (call.running_mean, call.running_var)
    return _apart(_channels_first(F.batch_norm(x, mean, var, training=mean is None, eps=call.eps)))


def _layer_norm(call: Call, x: Tensor) -> Float[Tensor, "R P *G I"]:
    return _apart(_places_last(F.layer_norm(x, list(call.normalized_shape), eps=call.eps)))


def _rms_norm(call: Call, x: Tensor) -> Float[Tensor, "R P *G I"]:
    return _apart(_places_last(F.rms_norm(x, list(call.normalized_shape), eps=call.eps)))


def _features(call: Call) -> int:
    """Return the number of features, each of which is a group of its own."""
    return int(call.weight.numel())


_LINEAR = Rule(
    ("input", "weight", "bias"),
    lambda call, x: _places_last(x),
    _places_last,
    covers=lambda call: (
        call.input.ndim >= 2 and call.weight.ndim == 2 and call.input.layout == torch.strided
    ),
)
_CONVOLUTION = Rule(
    ("input", "weight", "bias", "stride", "padding", "dilation", "groups"),
    _patches,
    _channels_first,
    defaults={"stride": 1, "padding": 0, "dilation": 1, "groups": 1},
    groups=lambda call: int(call.groups),
    covers=lambda call: (
        call.input.ndim == call.weight.ndim
    ),  # an input without a batch has an axis less
    gradient=_filter_gradient,
    response=_filter_response,
)
_EMBEDDING = Rule(
    ("input", "weight", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse"),
    _tokens,
    _places_last,
    defaults={"padding_idx": None, "max_norm": None, "scale_grad_by_freq": False},
    covers=lambda call: (
        call.max_norm is None and not call.scale_grad_by_freq and call.input.ndim >= 1
    ),
    transposed=True,
    gradient=_table_gradient,
    response=_table_response,
    counts=_table_counts,
)
_LAYER_NORM = Rule(
    ("input", "normalized_shape", "weight", "bias", "eps"),
    _layer_norm,
    _places_last,
    defaults={"weight": None, "eps": 1e-5},
    covers=lambda call: len(call.normalized_shape) == 1 and call.input.ndim >= 2,
    groups=_features,
)
_RMS_NORM = Rule(
    ("input", "normalized_shape", "weight", "eps"),
    _rms_norm,
    _places_last,
    defaults={"weight": None, "eps": None},
    covers=lambda call: len(call.normalized_shape) == 1 and call.input.ndim >= 2,
    groups=_features,
)
_GROUP_NORM = Rule(
    ("input", "num_groups", "weight", "bias", "eps"),
    lambda call, x: _apart(_channels_first(F.group_norm(x, call.num_groups, eps=call.eps))),
    _channels_first,
    defaults={"weight": None, "eps": 1e-5},
    groups=_features,
)
_BATCH_NORM = Rule(
    ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps"),
    _batch_norm,
    _channels_first,
    defaults={"weight": None, "training": False, "momentum": 0.1, "eps": 1e-5},
    stateful=True,
    groups=_features,
)
_ADDMM = Rule(
    ("bias", "input", "weight"),
    _LINEAR.inputs,
    _places_last,
    defaults={"beta": 1, "alpha": 1},
    aliases={"input": "bias", "mat1": "input", "mat2": "weight"},
    covers=lambda call: (
        call.beta == 1
        and call.alpha == 1
        and call.bias.ndim == 1
        and call.input.layout == torch.strided
    ),
    transposed=True,
)
_MATMUL = Rule(
    ("input", "weight"),
    _LINEAR.inputs,
    _places_last,
    aliases={"other": "weight", "mat2": "weight"},
    covers=lambda call: (
        call.input.ndim >= 2 and call.weight.ndim == 2 and call.input.layout == torch.strided
    ),
    transposed=True,
)

FUNCTIONS: dict[Callable[..., Any], Rule] = {
    F.linear: _LINEAR,
    F.conv1d: _CONVOLUTION,
    F.conv2d: _CONVOLUTION,
    F.conv3d: _CONVOLUTION,
    F.embedding: _EMBEDDING,
    F.layer_norm: _LAYER_NORM,
    F.rms_norm: _RMS_NORM,
    F.group_norm: _GROUP_NORM,
    F.batch_norm: _BATCH_NORM,
    torch.addmm: _ADDMM,
    Tensor.addmm: _ADDMM,
    torch.matmul: _MATMUL,
    Tensor.matmul: _MATMUL,
    Tensor.__matmul__: _MATMUL,
    torch.mm: _MATMUL,
    Tensor.mm: _MATMUL,
}
"""The rules of functions, as `__torch_function__` names them."""

TRANSPOSITIONS: frozenset[Any] = frozenset(
    {
        torch.t,
        Tensor.t,
        Tensor.T.__get__,  # type: ignore[attr-defined]  # a property of C
        Tensor.mT.__get__,  # type: ignore[attr-defined]  # likewise
        torch.transpose,
        Tensor.transpose,
        torch.swapaxes,
        Tensor.swapaxes,
    }
)
"""Functions that make of a matrix the same matrix read in the other direction."""


def _opened(function: Any) -> Callable[..., Any]:
    """Return a composite function of Python that goes on into its own calls.

    Torch's ends, where a mode is told of it, in that one call.
    """
    own = {**function.__globals__, "has_torch_function": lambda tensors: False}
    found = types.FunctionType(
        function.__code__, own, function.__name__, function.__defaults__, function.__closure__
    )
    found.__kwdefaults__ = function.__kwdefaults__
    return found


COMPOSITE: dict[Callable[..., Any], Callable[..., Any]] = {
    F.multi_head_attention_forward: _opened(F.multi_head_attention_forward),
    **CONTROL_FLOW,
}
"""{function that takes parameters as a whole: the same, taken apart into the calls it is made
of}
"""
