"""The progress bar of everything that takes long: what, how far, time gone, time left."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

T = TypeVar("T")


def progress_bar(console: Console, enabled: bool, period: float = 30.0) -> Progress:
    """Tasks need a `note`, which stands at the end of their line.

    Args:
        period: seconds over which the speed is averaged: several times what one unit of work takes.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left"))
    note = TextColumn("{task.fields[note]}")
    return Progress(*columns, TimeRemainingColumn(), note, console=console, disable=not enabled, speed_estimate_period=period)


def counted(items: Iterable[T], bar: Progress, what: str, total: int | None) -> Iterator[T]:
    """The items, each counted on a line of its own once it is dealt with."""
    task = bar.add_task(what, total=total, note="")
    for item in items:
        yield item
        bar.advance(task)
    bar.remove_task(task)
