"""Commands that several processes run together, as torchrun starts them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import typer

from curvlab.cli.terminal import say
from curvlab.errors import CurvlabError
from curvlab.system.torchrun import several_started

if TYPE_CHECKING:
    from rich.console import Console

    from curvlab.parallel import Ranks

BY_RANKS = ("train", "compare")
"""Commands that several processes run together."""


def check_command(words: list[str]) -> None:
    """Raise CurvlabError for a command that torchrun started several times and that is for one."""
    name = next((word for word in words if not word.startswith("-")), "")
    if several_started() and name and name not in BY_RANKS:
        raise CurvlabError(
            f"curvlab {name} runs in one process: start it without torchrun (several run"
            f" {' and '.join(BY_RANKS)})"
        )


@contextmanager
def by_ranks(call: Mapping[str, Any], device: str) -> Iterator[Ranks]:
    """Join the processes that run this command together, inside.

    Args:
        call: what was typed.
        device: by name.

    Raises:
        CurvlabError: on all ranks, other arguments on one of them; a rank that has gone, with what
            to do.
    """
    from curvlab.machine import device_of
    from curvlab.parallel import together

    with together(device_of(device)) as ranks:
        typed = {name: str(value) for name, value in call.items()}
        ranks.agreed("other arguments", typed, "start all by one torchrun, with one command line")
        yield ranks


def console_of(ranks: Ranks, console: Console) -> Console:
    """Return the console of rank 0; one that shows nothing on others."""
    from rich.console import Console

    return console if ranks.first else Console(quiet=True)


@contextmanager
def says_how_to_go_on(remedy: str) -> Iterator[None]:
    """Say, once for all ranks, that one of them has gone inside, and how the run goes on."""
    from curvlab.parallel import RankLost

    try:
        yield
    except RankLost as error:
        say(f"{error}{remedy}")
        raise typer.Exit(2) from error
