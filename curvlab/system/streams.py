"""Standard output and error that never fail.

They do not where they are closed, full, a pipe that ends, or of an encoding that lacks a letter.
"""

from __future__ import annotations

import errno
import io
import os
import select
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TextIO

from curvlab.errors import cause_of

if TYPE_CHECKING:
    from typing_extensions import Buffer  # of Python 3.12's standard library


class Output(io.RawIOBase):
    """A stream of bytes to a descriptor, or nowhere.

    What cannot be written is dropped; `error` says why.
    """

    def __init__(self, descriptor: int | None) -> None:
        super().__init__()
        self.descriptor, self.error = descriptor, ""

    def writable(self) -> bool:
        """Return True, also where what is written goes nowhere."""
        return True

    def fileno(self) -> int:
        """Return the descriptor.

        Raises:
            io.UnsupportedOperation: there is none any more.
        """
        return super().fileno() if self.descriptor is None else self.descriptor

    def isatty(self) -> bool:
        """Return whether there is a descriptor, and it is a terminal's."""
        return self.descriptor is not None and os.isatty(self.descriptor)

    def write(self, data: Buffer, /) -> int:
        """Write, waiting where it is full; return the bytes taken, all where they are dropped."""
        size = memoryview(data).nbytes
        while self.descriptor is not None:
            try:
                return os.write(self.descriptor, data)
            except BlockingIOError:
                select.select([], [self.descriptor], [])
            except OSError as error:
                self.descriptor = None
                self.error = "" if error.errno == errno.EPIPE else cause_of(error)
        return size


def guarded(stream: TextIO | None) -> tuple[TextIO, Output] | None:
    """Return a stream to the same place that does not fail, and the `Output` under it.

    None where there is no descriptor behind it (a test's, a notebook's).
    """
    if stream is None:
        output = Output(None)
        return (
            io.TextIOWrapper(io.BufferedWriter(output), encoding="utf-8", errors="replace"),
            output,
        )
    try:
        output = Output(stream.fileno())
    except (OSError, ValueError, AttributeError):
        return None
    encoding = getattr(stream, "encoding", None) or "utf-8"
    line = getattr(stream, "line_buffering", False)
    through = getattr(stream, "write_through", False)
    text = io.TextIOWrapper(
        io.BufferedWriter(output),
        encoding,
        errors="replace",
        line_buffering=line,
        write_through=through,
    )
    return text, output


@contextmanager
def unfailing() -> Iterator[Output | None]:
    """Put streams that do not fail in the place of `sys.stdout` and `sys.stderr` inside.

    Yields that of standard output, None where it has no descriptor.
    """
    before = sys.stdout, sys.stderr
    found = [guarded(stream) for stream in before]
    for stream in before:
        try:
            if stream is not None:
                stream.flush()
        except (OSError, ValueError):
            pass
    out, err = ((old if new is None else new[0]) for old, new in zip(before, found, strict=True))
    try:
        sys.stdout, sys.stderr = out, err
        yield None if found[0] is None else found[0][1]
    finally:
        for new in found:
            if new is not None:
                new[0].flush()
        sys.stdout, sys.stderr = before
