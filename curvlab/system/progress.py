"""The progress bar of everything that takes long: what, how far, time gone, time left."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
)
from rich.progress import TimeRemainingColumn as Left
from rich.text import Text

from curvlab.system.escape import for_rich

_T = TypeVar("_T")


class _Said(ProgressColumn):
    """A column with the task's description or one of its fields, whatever letters are in it."""

    def __init__(self, field: str = "") -> None:
        super().__init__()
        self.field = field

    def render(self, task: Task) -> Text:
        return for_rich(task.fields[self.field] if self.field else task.description)


def progress_bar(console: Console, enabled: bool, period: float = 30.0) -> Progress:
    """Return a bar; its tasks need a `note`, which stands at the end of their line.

    Args:
        console: where it is shown.
        enabled: whether it is shown at all.
        period: seconds over which the speed is averaged: several times what one unit of work takes.
    """
    columns = (
        _Said(),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        Left(),
        _Said("note"),
    )
    return Progress(*columns, console=console, disable=not enabled, speed_estimate_period=period)


def length(items: Iterable[object]) -> int | None:
    """Return how many items there are, where that is known before they are gone through."""
    return len(items) if isinstance(items, Sized) else None


def counted(items: Iterable[_T], bar: Progress, what: str, total: int | None) -> Iterator[_T]:
    """Yield the items, each counted on a line of its own once it is dealt with."""
    task = bar.add_task(what, total=total, note="")
    for item in items:
        yield item
        bar.advance(task)
    bar.remove_task(task)
