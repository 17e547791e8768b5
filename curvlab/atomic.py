"""Files that are whole at any moment: written aside, fsynced, then moved into place."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path


def rewrite(path: Path, write: Callable[[Path], object]) -> None:
    """``write(aside)``, fsync, `os.replace`; until then the old file stays. Raises OSError where that cannot be done."""
    aside = path.with_name(f".{path.name}.part")
    aside.unlink(missing_ok=True)  # a save that Ctrl-C broke off may hold it open still, and HDF5 would refuse it
    try:
        write(aside)
        with aside.open("rb") as stream:
            os.fsync(stream.fileno())
    except OSError:
        aside.unlink(missing_ok=True)  # a full disk has its space again
        raise
    os.replace(aside, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
