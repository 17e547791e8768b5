"""What a user reads when something is wrong: one line that says what, where and the remedy."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Mapping
from functools import cache
from typing import TypeVar

T = TypeVar("T")


class CurvlabError(ValueError):
    """Bad input. The message is one line; the command line prints it and exits with code 2."""


class Diverged(CurvlabError):
    """The numbers left the finite range on the way: a loss, direction or statistic is NaN or Inf, or a factorisation failed."""


class CurvlabWarning(UserWarning):
    """Something that does not stop the work but that the user should know; said once."""


def lookup(table: Mapping[str, T], name: str, kind: str) -> T:
    """``table[name]``, or an error that names the closest and the known entries."""
    if name in table:
        return table[name]
    raise unknown(kind, name, table)


def unknown(kind: str, name: object, known: Iterable[str]) -> CurvlabError:
    """The error for a name that no table holds."""
    names = list(known)
    close = difflib.get_close_matches(str(name), names, n=1, cutoff=0.5)
    hint = f"; did you mean '{close[0]}'?" if close else ""
    return CurvlabError(f"unknown {kind} '{name}'{hint} (known: {', '.join(names)})")


def guard_memory(needed: int, what: str, remedy: str) -> None:
    """Refuse a dense object of `needed` bytes that would take more than 80 % of the machine's memory."""
    total = _memory()
    if needed > 0.8 * total:
        raise CurvlabError(
            f"{what} would need {needed / 1e9:.1f} GB and this machine has {total / 1e9:.1f} GB of memory; {remedy}"
        )


@cache
def _memory() -> int:
    """Bytes of memory of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
