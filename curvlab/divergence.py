"""Which errors are divergence, whatever raised them, and whose.

They get the name of the block and of the method. Factorisations, roots and divisions of numbers
that have left the finite range fail in a dozen ways: LinAlgErrors of torch and NumPy,
ZeroDivisionError, OverflowError, errors of a conversion. Where a method works they all become
`Diverged`, here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]  # torch does not export it by name

from curvlab.errors import CurvlabError, Diverged, lacks_memory
from curvlab.finite import all_finite

_OF_NUMBERS = re.compile(
    "without overflow|math domain error|math range error|cannot convert float|infs or nans|nan or"
    " inf|converge|positive[- ]definite|singular|ill-conditioned|cusolver|arpack error",
    re.IGNORECASE,
)
"""Words in the messages of RuntimeErrors and ValueErrors that numbers have raised."""


def of_numbers(error: BaseException) -> bool:
    """Return whether an error that is not curvlab's own was raised by numbers.

    Its kind or message says so.
    """
    if lacks_memory(error):
        return False
    if isinstance(error, ArithmeticError | LinAlgError | np.linalg.LinAlgError):
        return True
    foreign = isinstance(error, RuntimeError | ValueError) and not isinstance(error, CurvlabError)
    return foreign and _OF_NUMBERS.search(str(error)) is not None


def named(
    error: Exception,
    where: str,
    *,
    block: str = "",
    method: str = "",
    unsound: Callable[[], bool] = lambda: False,
) -> Exception:
    """Return the error with `where` before its message, once.

    It is `Diverged` where numbers have raised it, and itself if a stranger's.

    Args:
        error: what was raised.
        where: whose numbers.
        block: its name, kept on a `Diverged` that has none yet.
        method: likewise.
        unsound: whether numbers that went in are not finite. Then they have raised whatever was
            raised of them.
    """
    own = isinstance(error, CurvlabError)
    numerical = isinstance(error, Diverged) or of_numbers(error)
    # asked last, since `unsound` looks through all that went in, and only of errors that a check or
    # torch may have raised of such numbers: a TypeError is a mistake whatever the numbers are
    full = lacks_memory(error)
    if not (numerical or full) and isinstance(error, CurvlabError | RuntimeError | ValueError):
        numerical = unsound()
    if not own and not numerical:
        return error
    line = (str(error).splitlines() or [""])[0]
    line = (
        line
        if own
        else (
            f"{type(error).__name__.lstrip('_')}: {line}; lower the learning rate or raise the"
            " damping"
        )
    )
    line = line if line.startswith(where) else f"{where}: {line}"
    if not numerical:
        return type(error)(line)
    found = type(error)(line) if isinstance(error, Diverged) else Diverged(line)
    found.block, found.method = (
        getattr(error, "block", "") or block,
        getattr(error, "method", "") or method,
    )
    return found


class Naming:
    """A context that gives a block's name to what is raised inside, as `named` does.

    It costs a third of a microsecond; in a loop one is opened around it, and told where it is.
    """

    __slots__ = ("block", "where")

    def __init__(self, where: object = "", block: str = "") -> None:
        self.where, self.block = where, block  # made a text only where something is raised

    def __enter__(self) -> Naming:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if isinstance(error, Exception):
            found = named(error, str(self.where), block=self.block)
            if found is not error:
                raise found from error


def broken(state: Any) -> bool:
    """Return whether a tensor or number anywhere in a nested state is not finite.

    It is nested by dictionaries, lists and tuples.
    """
    return any(not all_finite(t) for t in _tensors(state))


def _tensors(state: Any) -> Iterator[Tensor]:
    if isinstance(state, Tensor):
        yield state.detach()
    elif isinstance(state, float):
        yield torch.tensor(state, dtype=torch.float64, device="cpu")
    elif isinstance(state, Mapping):
        yield from _all(state.values())
    elif isinstance(state, list | tuple):
        yield from _all(state)


def _all(states: Iterable[Any]) -> Iterator[Tensor]:
    for state in states:
        yield from _tensors(state)
