"""What a user reads when something is wrong: one line that says what, where and the remedy."""

from __future__ import annotations

import difflib
import math
import os
import sys
import warnings
from collections.abc import Callable, Hashable, Iterable, Mapping
from functools import cache
from numbers import Integral, Real
from operator import index
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

from curvlab.system.escape import for_terminal

_T = TypeVar("_T")


LARGEST = 2**63 - 1
"""The largest whole number: what logs, checkpoints and generators of random numbers hold."""

MOST_STEPS = 10**12
"""Steps, epochs or repetitions at most: at 30 µs each they take a year."""


class CurvlabError(ValueError):
    """An error of bad input.

    The message is one line; the command line prints it and exits with code 2.
    """

    def __str__(self) -> str:
        return for_terminal(super().__str__())


class Diverged(CurvlabError):
    """An error of numbers that left the finite range on the way.

    A loss, direction or statistic is NaN or Inf, or a factorisation failed. `block` and `method`
    are the names of whose numbers they were, where that is known ("": not one block's).
    """

    block = ""
    method = ""


class OutOfMemory(CurvlabError):
    """An error of memory that ran out where another way, slower, would have taken over unsaid."""


_FULL = (
    "out of memory",
    "not enough memory",
    "can't allocate memory",
    "Cannot allocate memory",
    "STATUS_ALLOC_FAILED",
)
"""Words of the errors of torch's allocators, and of CUDA's libraries."""


def lacks_memory(error: BaseException) -> bool:
    """Return whether memory ran out, of whatever device."""
    return isinstance(error, MemoryError | OutOfMemory) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in _FULL)
    )


def raise_if_out_of_memory(error: Exception) -> None:
    """Raise OutOfMemory, with the remedy, where an error is of memory that ran out."""
    if isinstance(error, OutOfMemory):
        raise error
    if lacks_memory(error):
        line = (str(error).splitlines() or [type(error).__name__])[0]
        raise OutOfMemory(
            f"there is not enough memory ({line}): give fewer examples at a time, or take a smaller"
            " model"
        ) from error


def cause_of(error: BaseException) -> str:
    """Return what the system says of an error, or else its own first line, or its kind."""
    lines = str(getattr(error, "strerror", None) or error).splitlines()
    return lines[0] if lines else type(error).__name__


class CurvlabWarning(UserWarning):
    """Something that does not stop the work but that the user should know; said once."""


def warn(line: str) -> None:
    """Warn by a CurvlabWarning at the user's own line: the nearest frame outside this package."""
    level, frame = 2, sys._getframe(1)
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] in (
        "curvlab",
        "contextlib",
        "torch",
    ):
        level, frame = level + 1, frame.f_back  # type: ignore[assignment]
    warnings.warn(line, CurvlabWarning, stacklevel=level)


def tell(text: str) -> None:
    """Print a text on standard error, as it is."""
    print(text, file=sys.stderr)


def lookup(table: Mapping[str, _T], name: str, kind: str) -> _T:
    """Return ``table[name]``.

    Raises:
        CurvlabError: no such entry; it names the closest and the known ones.
    """
    if isinstance(name, Hashable) and name in table:
        return table[name]
    raise unknown(kind, name, table)


def unknown(kind: str, name: object, known: Iterable[str]) -> CurvlabError:
    """Return the error for a name that no table holds."""
    names, text = list(known), shown(name) if isinstance(name, int) else str(name)
    text = text if len(text) <= 80 else f"{text[:60]}…"
    same = [name for name in names if name.casefold() == text.casefold()]
    close = same or difflib.get_close_matches(text, names, n=1, cutoff=0.5)
    hint = f"; did you mean '{close[0]}'?" if close else ""
    return CurvlabError(f"unknown {kind} '{text}'{hint} (known: {', '.join(names)})")


_KINDS: dict[Any, tuple[type, str]] = {
    bool: (bool, "true or false"),
    int: (Integral, "a whole number"),
    float: (Real, "a finite number"),
    str: (str, "a name"),
    NoneType: (NoneType, "none"),
}
"""{annotation: (what a value must be, how a user calls it)}"""


def fitting(what: str, value: Any, hint: Any) -> Any:
    """Return a value as its annotation wants it.

    It wants one of `_KINDS`, a Literal, or a union of them; any other annotation takes anything.
    None stands for the word "none" where a word is wanted and None is not: the command line reads
    one as the other.

    Args:
        what: the value's name in an error's line.
        value: what a user gave.
        hint: the annotation.

    Raises:
        CurvlabError: the value does not fit.
    """
    wanted = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    words = [word for kind in wanted if get_origin(kind) is Literal for word in get_args(kind)]
    if value is None and NoneType not in wanted and (words or str in wanted):
        value = "none"
    if words and value not in words:
        raise unknown(what, value, words)
    if words:
        return value
    if not all(kind in _KINDS for kind in wanted):
        return value
    fits = any(
        isinstance(value, _KINDS[kind][0]) and isinstance(value, bool) is (kind is bool)
        for kind in wanted
    )
    if not fits or (isinstance(value, float) and not math.isfinite(value)):
        raise CurvlabError(
            f"{what} must be {' or '.join(_KINDS[kind][1] for kind in wanted)}, not {shown(value)}"
        )
    if isinstance(value, Integral) and abs(int(value)) > LARGEST:
        raise CurvlabError(
            f"{what} must be within 64 bits, from {-LARGEST} to {LARGEST}, not {shown(value)}"
        )
    return value


def whole(what: str, value: Any, least: int = 1, most: int = LARGEST) -> int:
    """Return `value` as a whole number of a range.

    Args:
        what: the value's name in an error's line.
        value: what a user gave.
        least: of the range.
        most: of the range.

    Raises:
        CurvlabError: it is outside of the range, or no whole number.
    """
    try:
        number = None if isinstance(value, bool) else index(value)
    except TypeError:
        number = None
    if number is None:
        raise CurvlabError(f"{what} must be a whole number, not {shown(value)}")
    if number < least:
        raise CurvlabError(
            f"{what} must be {'0 or positive' if least == 0 else f'{least} or more'}, not"
            f" {shown(number)}"
        )
    if number > most:
        raise CurvlabError(
            f"{what} must be a whole number from {least} to {most}, not {shown(number)}"
        )
    return number


def real(
    what: str,
    value: Any,
    wanted: str = "0 or positive",
    good: Callable[[float], bool] = lambda v: v >= 0,
) -> float:
    """Return `value` as a finite number.

    Args:
        what: the value's name in an error's line.
        value: what a user gave.
        wanted: the range in words.
        good: whether a number is in it.

    Raises:
        CurvlabError: it is no finite number, or not `good`.
    """
    try:
        number = math.nan if isinstance(value, bool | str | bytes) else float(value)
    except (
        TypeError,
        ValueError,
        OverflowError,
        RuntimeError,
    ):  # torch's for a tensor of several numbers
        number = math.nan
    if not (math.isfinite(number) and good(number)):
        raise CurvlabError(f"{what} must be {wanted}, not {shown(value)}")
    return number


def shown(value: object) -> str:
    """Return a value in an error's line: numbers as they are written, what is long shortened."""
    if isinstance(value, Integral) and not isinstance(value, bool):
        number = int(value)
        return (
            str(number)
            if abs(number) < 10**40
            else f"a number of some {int(math.log10(abs(number))) + 1} digits"
        )
    if isinstance(value, float):
        return f"{value:g}"
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:60]}…"


def some_of(things: Iterable[object], most: int = 3) -> str:
    """Return the names of the first few things, and how many more there are."""
    names = [str(thing) for thing in things]
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def several(names: str | Iterable[str]) -> list[str]:
    """Return a list of names; a single one stands for itself, not for its letters.

    Raises:
        CurvlabError: it is no such thing.
    """
    try:
        found = [names] if isinstance(names, str) else list(names)
    except TypeError as error:
        raise CurvlabError(f"names are wanted, not {shown(names)}") from error
    for name in found:
        if not isinstance(name, str):
            raise CurvlabError(f"names are wanted, and {shown(name)} is none")
    return found


def check_values(*checks: tuple[str, float, bool, str]) -> None:
    """Raise CurvlabError for the first of several values that is not good.

    Args:
        checks: (what, value, whether it is good, what is wanted).
    """
    for what, value, good, wanted in checks:
        if not good:
            raise CurvlabError(f"{what} must be {wanted}, not {shown(value)}")


def guard_memory(needed: int, what: str, remedy: str) -> None:
    """Refuse a dense object that would take more than 80 % of the machine's memory.

    Args:
        needed: bytes of the object.
        what: its name in an error's line.
        remedy: the end of that line.

    Raises:
        CurvlabError: it would.
    """
    total = _memory()
    if not fits(needed):
        raise CurvlabError(
            f"{what} would need {needed / 1e9:.1f} GB and this machine has {total / 1e9:.1f} GB of"
            f" memory; {remedy}"
        )


def fits(needed: int) -> bool:
    """Return whether so many bytes are at most 80 % of the machine's memory."""
    return needed <= 0.8 * _memory()


@cache
def _memory() -> int:
    """Return the bytes of memory of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
