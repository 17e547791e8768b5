"""Paths that a user gives: whether they can be, be read or be written.

It is said in one line before anything is done.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from curvlab.errors import CurvlabError, cause_of

Place = str | os.PathLike[str]

NAME, WHOLE, DEEP = 255, 4000, 100
"""Bytes of a name, bytes of a path, folders in one another that a run makes: at most so many."""


def given(path: Place, what: str = "path") -> Path:
    """Return the path, if a system can have such a one.

    Args:
        path: what the user gave.
        what: the path's name in an error's line.

    Raises:
        CurvlabError: no path at all, NUL characters, names and paths that are too long.
    """
    if not isinstance(path, str | os.PathLike):
        raise CurvlabError(f"the {what} must be a path, not {type(path).__name__}")
    try:
        raw = os.fsencode(path)
    except UnicodeEncodeError as error:
        raise CurvlabError(
            f"the {what} '{_short(path)}' has a character that no path can have: choose another"
        ) from error
    longest = max(map(len, raw.split(b"/")))
    reason = ""
    if not raw:
        reason = "is empty"
    elif b"\0" in raw:
        reason = "has a NUL character"
    elif longest > NAME:
        reason = f"has a name of {longest} bytes, of at most {NAME}"
    elif len(raw) > WHOLE:
        reason = f"has {len(raw)} bytes, of at most {WHOLE}"
    if reason:
        raise CurvlabError(f"the {what} '{_short(path)}' cannot be: it {reason}; choose another")
    return Path(path)


def expanded(path: Place, what: str) -> Path:
    """Return the path with the home folder for ``~``.

    Raises:
        CurvlabError: there is no such user, and as `given`.
    """
    try:
        return given(path, what).expanduser()
    except RuntimeError as error:
        raise CurvlabError(
            f"{what} is '{_short(path)}', and there is no such user: write the folder out"
        ) from error


def check_file(path: Place, what: str, remedy: str = "") -> Path:
    """Return where a file is to be written, of a symbolic link what it leads to.

    Nothing is touched.

    Args:
        path: what the user gave.
        what: the path's name in an error's line.
        remedy: the end of that line.

    Raises:
        CurvlabError: no such folder, one that is not to be written to, or something else than a
            file in the file's place.
    """
    found = given(path, what)
    reason = _in_place(found) or _parent(found.parent)
    if reason:
        raise _unwritable(what, found, reason, remedy)
    return found.resolve() if found.is_symlink() else found


def check_folder(
    path: Place, files: Iterable[str] = (), what: str = "folder", remedy: str = ""
) -> Path:
    """Return the folder that `files` are to be written into, which is there or can be made.

    It is tried out where it is not there; nothing of that is left.

    Args:
        path: what the user gave.
        files: names in it that will be written.
        what: the folder's name in an error's line.
        remedy: the end of that line.

    Raises:
        CurvlabError: a file in the way, a folder that is not to be written to, something else than
            a file in a file's place.
    """
    found = given(path, what)
    missing = absent(found)
    there = next((p for p in (found, *found.parents) if p not in missing), found)
    reason = _parent(there)
    if not reason and len(missing) > DEEP:
        reason = f"it has {len(missing)} new folders in one another, of at most {DEEP}"
    reason = reason or (_makes(missing[-1]) if missing else "")
    if reason:
        raise _unwritable(what, found, reason, remedy)
    for name in files if not missing else ():
        reason = _in_place(found / name)
        if reason:
            raise _unwritable(what, found / name, reason, remedy)
    return found


def absent(path: Path) -> list[Path]:
    """Return which of a folder and those around it are not there, from the inner to the outer."""
    found = []
    for place in (path, *path.parents):
        if os.path.lexists(place):
            break
        found.append(place)
    return found


@contextmanager
def made(
    folder: Place | None, make: Callable[[], Path], fallback: Place = "runs"
) -> Iterator[Path]:
    """Hold a run's folder, which `make` makes, and tidy up where the run fails.

    What was made for it and is empty goes again.

    Args:
        folder: the one that is asked for; where None, `make` makes one in the folder `fallback`.
        make: makes the folder and returns it.
        fallback: where it is made if none is asked for.
    """
    new = absent(Path(fallback if folder is None else folder))
    found: list[Path] = []
    try:
        found.append(make())
        yield found[0]
    except BaseException:
        for place in [*found, *new] if folder is None else new:
            with suppress(OSError):  # another run, or a file that tells something, is in it
                place.rmdir()
        raise


def _makes(folder: Path) -> str:
    """Return why a folder cannot be made, seen by making it; empty where it can."""
    try:
        folder.mkdir()
        folder.rmdir()
    except OSError as error:
        return "" if isinstance(error, FileExistsError) else f"{_short(folder)}: {cause_of(error)}"
    return ""


def _parent(folder: Path) -> str:
    """Return why nothing can be written into a folder; empty where it can."""
    try:
        mode = folder.stat().st_mode
    except FileNotFoundError:
        name = _short(folder)
        return (
            f"{name} is a symbolic link that leads nowhere"
            if folder.is_symlink()
            else f"there is no folder {name}"
        )
    except NotADirectoryError:
        return f"{_short(_file_in(folder))} is a file, no folder"
    except OSError as error:
        return f"{_short(folder)}: {cause_of(error)}"
    if not stat.S_ISDIR(mode):
        return f"{_short(folder)} is a file, no folder"
    if not os.access(folder, os.W_OK | os.X_OK):
        return f"the folder {_short(folder)} is not yours to write to"
    return ""


def _in_place(path: Path) -> str:
    """Return what is in a file's place and is no file; empty where a file can be."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return "it is a symbolic link that leads nowhere" if path.is_symlink() else ""
    except NotADirectoryError:
        return f"{_short(_file_in(path.parent))} is a file, no folder"
    except OSError as error:
        return cause_of(error)
    if stat.S_ISDIR(mode):
        return "it is a folder"
    return "" if stat.S_ISREG(mode) else "it is a device or a pipe, no file"


def _file_in(path: Path) -> Path:
    """Return the outermost part of a path that is there and is no folder."""
    return next((p for p in (*reversed(path.parents), path) if p.exists() and not p.is_dir()), path)


def _unwritable(what: str, path: Path, reason: str, remedy: str) -> CurvlabError:
    return CurvlabError(
        f"the {what} {_short(path)} cannot be written: {reason}{f'; {remedy}' if remedy else ''}"
    )


def _short(path: Place) -> str:
    text = str(path)
    return text if len(text) <= 200 else f"{text[:60]}…"
