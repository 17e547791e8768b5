"""A lock by which one run at a time writes to a place.

The system takes it back from whatever process has died.
"""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from curvlab.errors import CurvlabError, cause_of, warn


class InUse(CurvlabError):
    """An error of a place that another run writes to."""


_held: set[int] = set()
"""Descriptors of this process's locks. A process that it forks gets copies, which would outlive
it.
"""


@contextmanager
def exclusive_lock(path: Path) -> Iterator[None]:
    """Hold a lock inside, so that no other run that asks for it writes `path`.

    The lock is a file beside it, which is gone afterwards.

    Raises:
        InUse: another run writes there.
        CurvlabError: the folder cannot be written.
    """
    place = path.with_name(f".{path.name}.lock")
    try:
        held = _locked(place, path)
    except OSError as error:
        raise CurvlabError(
            f"the folder {path.parent} cannot be written: {cause_of(error)}"
        ) from error
    _held.add(held)
    try:
        yield
    finally:
        _held.discard(held)
        try:
            # before it is let go of: who waits for it looks whether it is still there
            place.unlink(missing_ok=True)
        except OSError:
            pass  # of no one: the next run takes it
        finally:
            os.close(held)


def _locked(place: Path, path: Path) -> int:
    """Return a descriptor of the lock file, locked, with this run's name in it."""
    while True:
        held = os.open(place, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        ours = False
        try:
            if not _taken(held, path):
                owner = " ".join(os.pread(held, 500, 0).decode(errors="replace").split())
                raise InUse(
                    f"another run{owner and f' ({owner})'} writes {path}: wait for it, or choose"
                    " another folder"
                )
            # flock locks a file, not a name. Between our open and our lock the run before may have
            # removed the file, and another made a new one of that name: then ours is worth nothing.
            ours = _same(place, held)
            if ours:
                since = datetime.now(UTC).isoformat(timespec="seconds")
                os.truncate(held, 0)
                os.pwrite(
                    held,
                    f"process {os.getpid()} on {socket.gethostname()} since {since}\n".encode(),
                    0,
                )
                return held
        except BaseException:
            if ours:
                place.unlink(missing_ok=True)
            os.close(held)
            raise
        os.close(held)


def _taken(held: int, path: Path) -> bool:
    """Return whether the lock is ours now.

    A file system without locks is one line of warning, and no more than that.
    """
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        warn(
            f"the file system of {path.parent} knows no locks: see to it that no two runs write"
            f" {path}"
        )
    return True


def _same(place: Path, held: int) -> bool:
    """Return whether a descriptor is still of the file that is there."""
    try:
        return os.path.samestat(os.stat(place), os.fstat(held))
    except FileNotFoundError:
        return False


def _let_go() -> None:
    """Close the locks in a forked process: they are the parent's alone."""
    while _held:
        os.close(_held.pop())


os.register_at_fork(after_in_child=_let_go)
