"""ARRANGEMENTS: where the examples are among the rows and places of a call.

Legend: R rows, P places of a row, N examples, T places of an example.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

from torch import Tensor


def _cut(t: Tensor, axis: int, sizes: tuple[int, int]) -> Tensor:
    found: Tensor = t.unflatten(axis, sizes)  # type: ignore[no-untyped-call]  # torch has no types there
    return found


def _second(t: Tensor, lead: int, size: int) -> Tensor:
    return _cut(t, lead + 1, (size, -1)).transpose(lead, lead + 1).flatten(lead + 1, lead + 2)


def _last(t: Tensor, lead: int, size: int) -> Tensor:
    return _cut(t, lead + 1, (-1, size)).movedim(lead + 2, lead).flatten(lead + 1, lead + 2)


def _major(t: Tensor, lead: int, size: int) -> Tensor:
    return _cut(t, lead, (size, -1)).flatten(lead + 1, lead + 2)


def _minor(t: Tensor, lead: int, size: int) -> Tensor:
    return _cut(t, lead, (-1, size)).transpose(lead, lead + 1).flatten(lead + 1, lead + 2)


ARRANGEMENTS: dict[str, Callable[[Tensor, int, int], Tensor]] = {
    "first": lambda t, lead, size: t,
    "major": _major,
    "minor": _minor,
    "second": _second,
    "last": _last,
}
"""Ways in which the examples may lie in [R, P], after `lead` axes, so that [N, T] comes of it:
R = N; R = N k, examples outside or inside; P = N k or k N, sequence first.
"""


@lru_cache(maxsize=4096)
def arrangements(rows: int, places: int, size: int) -> tuple[str, ...]:
    """Return the arrangements that shapes allow, the usual one first."""
    if size == 1:
        return ("first" if rows == 1 else "major",)
    found = ["first"] if rows == size else []
    found += ["major", "minor"] if rows % size == 0 and rows > size else []
    if places and places % size == 0:
        found += ["second"] + (["last"] if places > size else [])
    return tuple(found)
