"""How `curvlab train` goes on from what is in a folder, and how it frees one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from curvlab.cli.terminal import err, free
from curvlab.errors import CurvlabError
from curvlab.system.escape import for_rich


def free_for_training(folder: Path) -> None:
    """Raise as `free`, but not where a run was killed before it had anything to go on with."""
    from curvlab.training.begun import stepless

    if stepless(folder):
        say_anew(folder, "")
    else:
        free(folder)


def say_anew(folder: Path, model: str | None) -> None:
    """Say that a run starts anew.

    Raises:
        CurvlabError: the command line does not say what to run.
    """
    from curvlab.training.begun import anew

    if model is None:
        raise CurvlabError(
            f"{anew(folder)} once the command says what to run: give --model and the options of"
            " the run"
        )
    err.print(for_rich(f"curvlab: {anew(folder)}"))


def gone_on(state: Mapping[str, Any], given: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Return the arguments of a run that goes on.

    Raises:
        CurvlabError: its checkpoint names code that the command line does not.
    """
    from curvlab.training.run import resumed_arguments

    found = resumed_arguments(state, given)
    name = found.get("model", "")
    if ":" in name and "model" not in given:
        raise CurvlabError(
            f"the model '{name}' is code, and no file decides what code runs: say it too, as in "
            f"curvlab train --resume --model {name} --out {folder}"
        )
    return found
