"""Ctrl-C that waits until a step is whole."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType


class Shield:
    """``with shield:`` lets a Ctrl-C come when the block is done; a second one comes at once and leaves the block `broken`."""

    def __init__(self) -> None:
        self.inside = self.asked = self.broken = False

    def __enter__(self) -> None:
        self.inside = self.broken = True

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.inside = False
        if kind is None:
            self.broken = False
            if self.asked:
                self.asked = False
                raise KeyboardInterrupt

    def heard(self, number: int, frame: FrameType | None) -> None:
        if self.inside and not self.asked:
            self.asked = True
        else:
            raise KeyboardInterrupt


@contextmanager
def shielded() -> Iterator[Shield]:
    """A shield that Ctrl-C is sent to; only where Python's own handler is in force, in the main thread."""
    shield = Shield()
    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield shield
        return
    signal.signal(signal.SIGINT, shield.heard)
    try:
        yield shield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
