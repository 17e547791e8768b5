"""REORDERING: calls by which the data may decide which rows are whose."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

REORDERING: frozenset[Any] = frozenset(
    {
        torch.masked_select,
        Tensor.masked_select,
        torch.index_select,
        Tensor.index_select,
        torch.gather,
        Tensor.gather,
        torch.take,
        Tensor.take,
        torch.take_along_dim,
        Tensor.take_along_dim,
        torch.nonzero,
        Tensor.nonzero,
        torch.argsort,
        Tensor.argsort,
        torch.sort,
        Tensor.sort,
        torch.topk,
        Tensor.topk,
        torch.index_add,
        Tensor.index_add,
        Tensor.index_add_,
        torch.scatter,
        Tensor.scatter,
        Tensor.scatter_,
        torch.scatter_add,
        Tensor.scatter_add,
        Tensor.scatter_add_,
        torch.index_put,
        Tensor.index_put,
        Tensor.index_put_,
        torch.randperm,
    }
)
"""Calls by which the data may decide which rows are whose: what one minibatch has shown of them
says nothing of the next.
"""


def indexed(func: Any, args: tuple[Any, ...]) -> bool:
    """Return whether a call is of `REORDERING`, or takes rows by a tensor's numbers."""
    if func is not Tensor.__getitem__ and func is not Tensor.__setitem__:
        return func in REORDERING
    index = args[1] if isinstance(args[1], tuple | list) else (args[1],)
    return any(isinstance(i, Tensor | list) for i in index)
