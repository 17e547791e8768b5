"""Transforms of `torch.func`, with another way where an operation has no rule for one of them."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from threading import RLock
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import jvp, vjp, vmap
from torch.overrides import TorchFunctionMode

from curvlab.derivatives import WRITTEN
from curvlab.errors import CurvlabError, raise_if_out_of_memory
from curvlab.functions import FUNCTIONS

_FORWARD = RLock()  # levels of forward mode are the process's, not the thread's
Weights = dict[str, Tensor]
Of = TypeVar("Of", Tensor, Weights)


def mapped(f: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return `f` over the first axis of its arguments, by `vmap`.

    One by one where an operation has no rule for it (LSTM, PReLU).
    """

    def over(*arguments: Tensor) -> Tensor:
        try:
            found: Tensor = vmap(f)(*arguments)
        except RuntimeError as error:
            raise_if_out_of_memory(error)
            one_by_one = range(len(arguments[0]))  # a nest is not gone through
            found = torch.stack([f(*(a[i] for a in arguments)) for i in one_by_one])
        return found

    return over


def along(f: Callable[[Any], Tensor], at: Of, u: Of) -> Tensor:
    """Return ∂f(at) u by forward mode.

    By the transpose's transpose where an operation has no forward derivative (weight norm).
    """
    try:
        with _FORWARD:
            found: Tensor = jvp(f, (at,), (u,))[1]
    except NotImplementedError:
        value, back, *_ = vjp(f, at)
        (found,) = vjp(lambda c: back(c)[0], torch.zeros_like(value))[1](u)
    return found


def second_derivative(slope: Callable[[Any], Of], at: Of, u: Of) -> Of:
    """Return ∂slope(at) u of a gradient `slope`, by forward mode.

    Reverse mode twice is wrong for weight norm (torch 2.13, unsymmetric).
    """
    with _FORWARD:
        found: Of = jvp(slope, (at,), (u,))[1]
    return found


def transposed(
    back: Callable[[Tensor], tuple[Weights]], value: Tensor
) -> Callable[[Weights], Tensor]:
    """Return u → J u from the map back c → Jᵀ c, which is linear, with one graph for all u."""
    forth = vjp(lambda c: back(c)[0], torch.zeros_like(value))[1]
    return lambda u: forth(u)[0]


class Repeated:
    """A linear map of one vector at a time, prepared for many once it has been asked for again.

    Args:
        direct: the map itself.
        prepare: makes the same map, without the forward pass of each product. It is taken where its
            first product is that of `direct` to half of the digits, and not where it fails.
        after: products from which on it is worth to prepare: a number, not a time, so that the same
            calls give the same bits.
    """

    def __init__(
        self,
        direct: Callable[[Any], Any],
        prepare: Callable[[], Callable[[Any], Any]],
        after: int,
    ) -> None:
        self._direct, self._prepare, self._left = direct, prepare, after
        self._kept: Callable[[Any], Any] | None = None

    def __call__(self, u: Any) -> Any:
        """Return the map of u."""
        if self._kept is not None:
            return self._kept(u)
        found = self._direct(u)
        self._left -= 1
        if self._left == -1:  # tried once
            try:
                with warnings.catch_warnings():
                    warnings.filterwarnings("ignore", "Attempted to insert a get_attr Node")
                    kept = self._prepare()
                self._kept = kept if _same(kept(u), found) else None
            except Exception:  # whatever tracing meets: the direct way stays
                self._kept = None
        return found


def _same(one: Tensor | Weights, other: Tensor | Weights) -> bool:
    if isinstance(one, dict) and isinstance(other, dict):
        pairs = [(one[name], other[name]) for name in other]
    else:
        assert isinstance(one, Tensor)
        assert isinstance(other, Tensor)
        pairs = [(one, other)]
    apart = sum(float((a - b).norm()) for a, b in pairs)
    size = sum(float(b.norm()) for _, b in pairs)
    near = max((torch.finfo(b.dtype).eps ** 0.5 for _, b in pairs), default=0.0)
    return apart <= near * size


def raise_ours(error: Exception) -> None:
    """Raise an error where it is ours, or of memory.

    Else a transform met what it cannot do, which it says in errors of any kind; the plain way,
    which follows, says what is the model's own.
    """
    if isinstance(error, CurvlabError):
        raise error
    raise_if_out_of_memory(error)


class FixedRows(TorchFunctionMode):
    """Mode that holds fixed under every transform what autograd holds fixed in a call.

    That is the row of an embedding's padding token. It sees to weight norm too, as the listener of
    a forward pass does: a second mode for that costs 3 % of a method that goes through products.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not F.embedding:
            return WRITTEN.get(func, func)(*args, **kwargs)
        call = FUNCTIONS[func].bind(args, kwargs)
        if call.padding_idx is None or call.max_norm is not None:
            return func(*args, **kwargs)
        row = torch.arange(len(call.weight), device=call.weight.device) == call.padding_idx % len(
            call.weight
        )
        return F.embedding(call.input, torch.where(row[:, None], call.weight.detach(), call.weight))
