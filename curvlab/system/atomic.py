"""Files that are whole at any moment, and sealed files, which show that they are.

A file is written aside, fsynced, then moved into place. A seal is the last line of a file, the
SHA-256 of all that lies before it. Readers of HDF5 and of zip archives pass over it.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from curvlab.errors import CurvlabError, cause_of

_MARK = b"\ncurvlab-sha256 "
SEAL = len(_MARK) + hashlib.sha256().digest_size * 2 + 1
"""Bytes of a seal, which has one length, so that a reader finds it from the file's end."""
_CHUNK = 1 << 20


def rewrite(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file aside by ``write(aside)``, fsync it, and move it into place with `os.replace`.

    Until then the old file stays, and whatever ends the writing leaves nothing beside it.

    Args:
        path: of the file.
        write: writes the contents to the path that it is given.

    Raises:
        OSError: that cannot be done.
    """
    aside = path.with_name(f".{path.name}.part")
    try:
        try:
            aside.unlink(missing_ok=True)  # what a kill left behind
            write(aside)
            # the contents before the name: after a power cut the new name could else stand for a
            # file without them, and the old one be gone
            with aside.open("rb") as stream:
                os.fsync(stream.fileno())
            os.replace(aside, path)
        except BaseException:
            _discard(aside)  # a full disk has its space again
            raise
    except BaseException:
        _discard(aside)  # where a second Ctrl-C broke off the first's tidying
        raise
    # the name is an entry of the folder, which reaches the disk by a fsync of its own
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _discard(aside: Path) -> None:
    """Remove what was written aside."""
    if aside.is_file():  # a folder in its place is not ours
        aside.unlink(missing_ok=True)


class Sealing:
    """A binary stream to write to, which adds up what goes through it.

    `error` is what the disk said, whoever hid it since.

    Args:
        stream: where the bytes go.
    """

    def __init__(self, stream: BinaryIO) -> None:
        self.error: OSError | None = None
        self._stream, self._sum = stream, hashlib.sha256()

    def write(self, data: bytes | memoryview) -> int:
        """Write and return the number of bytes.

        Raises:
            OSError: the disk's, which is kept in `error` too.
        """
        try:
            self._stream.write(data)
        except OSError as error:
            self.error = error
            raise
        self._sum.update(data)
        return memoryview(data).nbytes

    def flush(self) -> None:
        """Do nothing: nothing is held back here."""

    def seal(self) -> bytes:
        """Return the seal of all that was written so far, `SEAL` bytes."""
        return _MARK + self._sum.hexdigest().encode() + b"\n"


def rewrite_sealed(path: Path, write: Callable[[Sealing], object]) -> None:
    """Rewrite a file as `rewrite` does, with a seal behind its contents.

    Args:
        path: of the file.
        write: writes the contents to the stream that it is given.

    Raises:
        OSError: that cannot be done, also where what wrote made something else of it.
    """

    def to(aside: Path) -> None:
        with aside.open("wb") as stream:
            sealing = Sealing(stream)
            try:
                write(sealing)
            except Exception as error:
                if sealing.error is not None:
                    raise sealing.error from error
                raise
            stream.write(sealing.seal())

    rewrite(path, to)


@contextmanager
def unsealed(path: Path) -> Iterator[tuple[BinaryIO, bool]]:
    """Open a file, and yield (the stream at its beginning, whether the file carries a seal).

    A seal is held against all that lies before it first. A damaged seal is none: contents that are
    sealed by their own word must be asked for it.

    Raises:
        CurvlabError: it cannot be read, or its seal does not fit what lies before it.
    """
    try:
        with path.open("rb") as stream:
            yield stream, _looked_through(path, stream)
    except OSError as error:
        raise CurvlabError(f"{path} cannot be read: {cause_of(error)}") from error


def read_sealed(path: Path) -> tuple[bytes, bool]:
    """Return what lies before the seal, and whether there was one.

    Raises:
        CurvlabError: as `unsealed`.
    """
    with unsealed(path) as (stream, sealed):
        return stream.read(os.fstat(stream.fileno()).st_size - SEAL if sealed else -1), sealed


def damaged(path: Path) -> CurvlabError:
    """Return the error for a file that is not what was written."""
    return CurvlabError(f"{path} is damaged, its checksum does not fit: restore it or start again")


def _looked_through(path: Path, stream: BinaryIO) -> bool:
    """Return whether a file carries a seal, which is checked; leave the stream at its beginning."""
    length = os.fstat(stream.fileno()).st_size - SEAL
    if length < 0:
        return False
    stream.seek(length)
    seal = stream.read(SEAL)
    if not (seal.startswith(_MARK) and seal.endswith(b"\n")):
        stream.seek(0)
        return False
    stream.seek(0)
    found = hashlib.sha256()
    while length:
        part = stream.read(min(_CHUNK, length))
        if not part:
            break
        found.update(part)
        length -= len(part)
    if seal != _MARK + found.hexdigest().encode() + b"\n":
        raise damaged(path)
    stream.seek(0)
    return True
