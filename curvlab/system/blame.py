"""What a user reads where an error is no bad input: the frames of their own code, and one line."""

from __future__ import annotations

import os
import sysconfig
import traceback
from pathlib import Path

from curvlab.errors import CurvlabError, lacks_memory
from curvlab.system.escape import for_terminal

OWN, BUG = 2, 70
"""Exit codes: an error of the user's own code or machine, and one of curvlab's own
(EX_SOFTWARE).
"""

_PACKAGE = Path(__file__).resolve().parents[1]
_CURVLAB = (f"{_PACKAGE}{os.sep}", f"{_PACKAGE.parent / 'analyses'}{os.sep}")
_INSTALLED = tuple(
    f"{os.path.realpath(sysconfig.get_path(name))}{os.sep}"
    for name in ("stdlib", "platstdlib", "purelib", "platlib")
)
_SHOWN = 12
"""Frames at most."""


class Saved(str):
    """A note on an error (`BaseException.add_note`): what a run that it ended has left."""

    __slots__ = ()


def own_frames(error: BaseException) -> traceback.StackSummary:
    """Return the calls between curvlab and the error that are in the user's own files.

    Those are neither curvlab's nor installed.
    """
    frames = [(frame, line) for frame, line in traceback.walk_tb(error.__traceback__)]
    first = next(
        (i for i, (frame, _) in enumerate(frames) if _is_in(frame.f_code.co_filename, _CURVLAB)),
        len(frames),
    )
    return traceback.StackSummary.extract(
        iter([f for f in frames[first:] if _is_own(f[0].f_code.co_filename)])
    )


def _is_in(file: str, places: tuple[str, ...]) -> bool:
    return os.path.realpath(file).startswith(places)


def _is_own(file: str) -> bool:
    # no file: compiled, or "<string>"
    """Return whether a file is the user's: neither curvlab's nor installed."""
    return os.path.isfile(file) and not _is_in(file, _CURVLAB + _INSTALLED)


def _is_of_the_user(error: BaseException) -> bool:
    """Return whether the user's own code raised an error, or a forward pass of the model."""
    syntax = (
        isinstance(error, SyntaxError) and error.filename is not None and _is_own(error.filename)
    )
    return syntax or bool(own_frames(error)) or _in_the_model(error)


def _in_the_model(error: BaseException) -> bool:
    """Return whether a forward pass raised an error, be it in the layers of a library."""
    frames = (frame.f_code for frame, _ in traceback.walk_tb(error.__traceback__))
    return any(code.co_name == "_forward" and _is_in(code.co_filename, _CURVLAB) for code in frames)


def told(error: BaseException) -> str:
    """Return the user's own frames as Python shows them, and what the error says; else nothing.

    Of bad input it is what lies behind it. Empty where the error is not of the user's code.
    """
    said = isinstance(error, CurvlabError)
    while isinstance(error, CurvlabError) and error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, CurvlabError) or not _is_of_the_user(error):
        return ""
    lines = own_frames(error).format()
    if said and not lines and not isinstance(error, SyntaxError):
        return ""  # the line that follows has it
    if len(lines) > _SHOWN:
        half = _SHOWN // 2
        lines = [*lines[:half], f"  … {len(lines) - _SHOWN} more …\n", *lines[-half:]]
    last = traceback.TracebackException.from_exception(error, limit=0, compact=True)
    last.__notes__ = [
        note for note in getattr(error, "__notes__", ()) if not isinstance(note, Saved)
    ]
    return for_terminal("".join([*lines, *last.format_exception_only()]), lines=True)


def verdict(error: BaseException, command: str) -> tuple[str, int]:
    """Return the line of an error that is no bad input, and the exit code.

    Args:
        error: what ended the command.
        command: its name, for the call that shows the whole traceback.
    """
    notes = "".join(
        f"; {note}" for note in getattr(error, "__notes__", ()) if isinstance(note, Saved)
    )
    all_of_it = f"the whole traceback: curvlab -v {command} …".replace("  ", " ")
    name = " ".join(
        "".join(
            traceback.TracebackException(type(error), error, None).format_exception_only()
        ).split()
    )
    if lacks_memory(error):
        return (
            (
                f"there is not enough memory ({name}): take a smaller batch, model or"
                f" method{notes}; {all_of_it}"
            ),
            OWN,
        )
    if isinstance(error, SystemExit):
        return (
            (
                f"your own code ended the program, as it stands above, and not curvlab{notes};"
                f" {all_of_it}"
            ),
            OWN,
        )
    if _is_of_the_user(error):
        whose = (
            "your own code failed"
            if own_frames(error) or isinstance(error, SyntaxError)
            else "the model failed"
        )
        return f"{whose}, as it stands above{notes}; {all_of_it}", OWN
    if isinstance(error, OSError):
        return f"{name}{notes}; {all_of_it}", OWN
    return (
        (
            f"an error of curvlab's own, {name} ({_where(error)}){notes}: please report it, with"
            f" {all_of_it}"
        ),
        BUG,
    )


def _where(error: BaseException) -> str:
    """Return the last place in curvlab's own files that an error passed."""
    last = [
        (f, line)
        for f, line in traceback.walk_tb(error.__traceback__)
        if _is_in(f.f_code.co_filename, _CURVLAB)
    ][-1:]
    return (
        ", ".join(_place(f.f_code.co_filename, line) for f, line in last)
        or "outside of its own files"
    )


def _place(file: str, line: int) -> str:
    path = Path(file).resolve()
    inside = path.relative_to(_PACKAGE.parent) if path.is_relative_to(_PACKAGE.parent) else path
    return f"{inside}, line {line}"


def full_traceback(error: BaseException) -> str:
    """Return the whole traceback, fit for a terminal."""
    return for_terminal("".join(traceback.format_exception(error)), lines=True)
