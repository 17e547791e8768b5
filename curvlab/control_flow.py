"""Branches and loops of torch's compiler, `torch.cond` and its kin, as Python runs them.

Their own (torch 2.13) show no call of what they run, some have wrong second derivatives without a
word (`cond`, `scan`, `map`), and some none (`while_loop`). What stands here has the operators'
signatures, below the functions that users call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from traceback import walk_tb
from typing import Any

import torch
from torch import Tensor


def cond(
    pred: Any, true_fn: Callable[..., Any], false_fn: Callable[..., Any], operands: Any = ()
) -> Any:
    """Return what the branch does to the operands."""
    return (true_fn if pred else false_fn)(*operands)


def while_loop(
    cond_fn: Callable[..., Any],
    body_fn: Callable[..., Any],
    carried: Sequence[Any],
    more: Sequence[Any] = (),
    **_: Any,
) -> tuple[Any, ...]:
    """Return what is carried when the condition no longer holds."""
    carried = tuple(carried)
    while cond_fn(*carried, *more):
        carried = tuple(body_fn(*carried, *more))
    return tuple(t.clone() if isinstance(t, Tensor) else t for t in carried)


def scan(
    combine_fn: Callable[..., Any], init: Sequence[Any], xs: Sequence[Tensor], more: Any = ()
) -> tuple[Any, ...]:
    """Return what is carried along the first axis, then what each step gave, stacked."""
    carried: Sequence[Any] = tuple(init)
    outs = []
    for row in zip(*xs, strict=True):
        found = combine_fn(*carried, *row, *more)
        carried, out = found[: len(init)], found[len(init) :]
        outs.append(out)
    return (*carried, *map(_stacked, zip(*outs, strict=True)))


def map_rows(function: Callable[..., Any], xs: Sequence[Tensor], more: Any = ()) -> Any:
    """Return what a function gives of every row, stacked."""
    found = [function(*row, *more) for row in zip(*xs, strict=True)]
    if isinstance(found[0], Tensor):
        return torch.stack(found)
    return type(found[0])(map(_stacked, zip(*found, strict=True)))


def _stacked(each: Sequence[Any]) -> Tensor | None:
    return None if each[0] is None else torch.stack(tuple(each))


CONTROL_FLOW: dict[Any, Callable[..., Any]] = {
    torch.ops.higher_order.cond: cond,
    torch.ops.higher_order.while_loop: while_loop,
    torch.ops.higher_order.scan: scan,
    torch.ops.higher_order.map_impl: map_rows,
}
"""{operator: the same in Python}"""


def raised_by_operator(error: BaseException | None) -> bool:
    """Return whether an error, or one that led to it, comes from within an operator of torch's."""
    while error is not None:
        frames = (frame.f_code.co_filename for frame, _ in walk_tb(error.__traceback__))
        if any("_higher_order_ops" in name for name in frames):
            return True
        error = error.__cause__ or error.__context__
    return False
