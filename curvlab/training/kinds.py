"""Tests of what kind a value of a checkpoint is, and errors that say where one fails."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from curvlab.errors import CurvlabError

Test = Callable[[Any], bool]


def is_whole(value: Any) -> bool:
    """Return whether a value is an int, no bool, and from 0 to 2⁶³ − 1."""
    return type(value) is int and 0 <= value < 2**63


def is_number(value: Any) -> bool:
    """Return whether a value is an int or a float, no bool; NaN and infinities are."""
    return type(value) in (int, float)


def is_flag(value: Any) -> bool:
    """Return whether a value is a bool."""
    return type(value) is bool


def is_text(value: Any) -> bool:
    """Return whether a value is a str, and of no subclass."""
    return type(value) is str


def is_tensor(value: Any) -> bool:
    """Return whether a value is a tensor, whatever its shape, dtype and device."""
    return isinstance(value, Tensor)


def or_none(test: Test) -> Test:
    """Return the test that passes None, and whatever passes `test`."""
    return lambda value: value is None or test(value)


def list_of(test: Test, length: int | None = None) -> Test:
    """Return the test of a list or tuple, of this length if one is given, by its items."""
    return lambda value: (
        isinstance(value, list | tuple) and length in (None, len(value)) and all(map(test, value))
    )


def table_of(test: Test, key: Test = is_text) -> Test:
    """Return the test of a mapping by its keys and its values."""
    return lambda value: (
        isinstance(value, Mapping) and all(map(key, value)) and all(map(test, value.values()))
    )


def is_nested_tensors(value: Any) -> bool:
    """Return whether a value is a minibatch's inputs: a tensor, or lists, dictionaries of such."""
    return (
        is_tensor(value) or list_of(is_nested_tensors)(value) or table_of(is_nested_tensors)(value)
    )


def is_count(value: Any) -> bool:
    """Return whether a value is a whole number, which may be a tensor on the device."""
    return is_whole(value) or (is_tensor(value) and not value.dim())


def is_attribute(value: Any) -> bool:
    """Return whether a value is what a log's attribute may be: text or a number."""
    return is_text(value) or is_number(value)


def is_plain(value: Any) -> bool:
    """Return whether a value is what settings are made of."""
    return (
        value is None
        or is_attribute(value)
        or is_flag(value)
        or list_of(is_plain)(value)
        or table_of(is_plain)(value)
    )


def nested_numbers(depth: int) -> Test:
    """Return the test of lists of numbers within each other `depth` deep; 0 is one number."""
    return list_of(nested_numbers(depth - 1)) if depth else is_number


def is_like(value: Any, own: Tensor) -> bool:
    """Return whether a value is a tensor of the shape and dtype of `own`, on whatever device."""
    return isinstance(value, Tensor) and value.shape == own.shape and value.dtype == own.dtype


def equal(one: Any, two: Any) -> bool:
    """Return whether two nested values are equal, numbers of one type; devices may differ."""
    if isinstance(one, Mapping):
        return (
            isinstance(two, Mapping)
            and one.keys() == two.keys()
            and all(equal(v, two[k]) for k, v in one.items())
        )
    if isinstance(one, list | tuple):
        return isinstance(two, list | tuple) and len(one) == len(two) and all(map(equal, one, two))
    if isinstance(one, Tensor):
        return isinstance(two, Tensor) and torch.equal(one.cpu(), two.cpu())
    return type(one) is type(two) and one == two


def keys(
    found: Mapping[Any, Any], wanted: Iterable[Any], where: str, more: Iterable[Any] = ()
) -> None:
    """Raise CurvlabError where a key is missing, or is neither wanted nor one of `more`."""
    wanted, more = list(wanted), list(more)
    missing = [key for key in wanted if key not in found]
    if missing:
        raise wrong(f"{where} lacks {missing[0]!r}")
    strange = [key for key in found if key not in wanted and key not in more]
    if strange:
        raise wrong(f"{where} has {strange[0]!r}")


def must(value: Any, test: Test, where: str) -> None:
    """Raise CurvlabError, which says `where`, unless `test` passes the value."""
    try:
        good = test(value)
    except (TypeError, ValueError, RuntimeError):
        good = False
    if not good:
        raise wrong(f"{where} is {_said(value)}")


def _said(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor {list(value.shape)} of {str(value.dtype).removeprefix('torch.')}"
    return f"{type(value).__name__} {value!r}"[:80]


def wrong(what: str) -> CurvlabError:
    """Return the error for a checkpoint that holds something else; `what` says what."""
    return CurvlabError(
        f"the checkpoint does not hold what a run does: {what}; start again in another folder"
    )


def alike(own: Any, saved: Any, at: str) -> None:
    """Raise CurvlabError where a state has other keys, lengths or kinds of values than `own`."""
    if isinstance(own, Mapping):
        must(saved, table_of(lambda value: True, lambda key: True), at)
        keys(saved, own, at)
        for key, value in own.items():
            alike(value, saved[key], f"{at}['{key}']")
    elif isinstance(own, list | tuple):
        must(saved, list_of(lambda value: True, len(own)), at)
        for i, value in enumerate(own):
            alike(value, saved[i], f"{at}[{i}]")
    elif isinstance(own, Tensor):
        must(saved, lambda value: is_like(value, own), at)
    elif is_number(own):
        must(
            saved, lambda value: is_number(value) and (type(own) is float or type(value) is int), at
        )
    elif own is not None:
        must(saved, lambda value: type(value) is type(own), at)
