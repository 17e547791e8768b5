"""The first moments of the command `curvlab`, before anything heavy is imported.

Any other program is left alone. `curvlab/__init__` imports this first: to import torch takes
seconds, in which Ctrl-C would end in a traceback of whatever is being imported.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import sys
from pathlib import PurePath
from types import FrameType

SIGNALS = tuple(
    getattr(signal, name)
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGXCPU")
    if hasattr(signal, name)
)
"""What asks a run to end: Ctrl-C; what ends a job, closes a terminal, says that its time runs out
(Slurm where it is asked to; limits of CPU time).
"""

backend = ""
"""The user's MPLBACKEND. matplotlib cannot be imported under a name that it does not know."""

_code: int | None = None


def is_command() -> bool:
    """Return whether this process is ``curvlab …`` or ``python -m curvlab …``.

    Python may have yet to look up its name.
    """
    if not sys.argv or sys.argv[0] == "-m":
        return sys.orig_argv[-len(sys.argv) :][:1] in (["curvlab"], ["-mcurvlab"])
    return PurePath(sys.argv[0]).name.removesuffix(".exe") == "curvlab"


def begin() -> None:
    """Lead closed standard streams nowhere, and let a signal end the process.

    So no file of ours gets the numbers of those streams.
    """
    global backend
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
    for number in SIGNALS:
        if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
            signal.signal(number, leave)
    backend = os.environ.pop("MPLBACKEND", "")
    if os.environ.get("WORLD_SIZE", "1") != "1":  # of several, one of which may go
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # no stack of C++ beside our line


def leave(number: int, frame: FrameType | None) -> None:
    """End the process: with one line where nothing runs yet, with its exit code after the work."""
    if _code is None:
        with contextlib.suppress(OSError):
            os.write(2, b"curvlab: interrupted; nothing has run yet\n")
    os._exit(128 + number if _code is None else _code)


def done(code: int) -> None:
    """Say that the work is done: from here on a signal cannot take anything back.

    As Python ends it gives signals their defaults back, which would end the process with another
    code: a second Ctrl-C 10 ms after the first did. They are ignored then.
    """
    global _code
    if _code is None:
        atexit.register(_ignore)
    _code = code


def _ignore() -> None:
    for number in SIGNALS:
        if signal.getsignal(number) is leave:
            signal.signal(number, signal.SIG_IGN)


if is_command():
    begin()
