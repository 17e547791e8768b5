"""Ctrl-C and a cluster's signals, which wait until a step is whole.

They end a run as `KeyboardInterrupt`.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType, TracebackType
from typing import Any

from curvlab import starting
from curvlab.starting import SIGNALS as SIGNALS

SAME = 0.2
"""Seconds within which further signals are the same request: terminals, make, srun and schedulers
send one twice.
"""


class Interrupted(KeyboardInterrupt):
    """A signal other than Ctrl-C that asks the run to end.

    Args:
        number: the signal's.
    """

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


def exception(number: int) -> KeyboardInterrupt:
    """Return what a signal raises."""
    return KeyboardInterrupt() if number == signal.SIGINT else Interrupted(number)


def number_of(error: KeyboardInterrupt) -> int:
    """Return the signal that raised an error.

    A process that it ends has the exit code 128 + this.
    """
    return error.number if isinstance(error, Interrupted) else int(signal.SIGINT)


def words(error: KeyboardInterrupt) -> str:
    """Return whereby a run was ended, for the line that says so."""
    return f"interrupted by {error}" if isinstance(error, Interrupted) else "interrupted"


def behind(error: BaseException, outer: BaseException | None = None) -> KeyboardInterrupt | None:
    """Return the signal that broke something off which raised `error` in its place, as writers do.

    Args:
        error: what was raised.
        outer: signals from before this error are none.
    """
    found: BaseException | None = error
    while found is not None and found is not outer:
        if isinstance(found, KeyboardInterrupt):
            return found
        found = found.__context__
    return None


class Shield:
    """A block that a signal does not break: ``with shield:`` lets it come when the block is done.

    Where an error ends the block, who handles it comes first: the signal is raised at the end of
    the next block, or of all (`shielded`), with the error as its cause. A second signal comes at
    once and leaves the block `broken`.
    """

    def __init__(self) -> None:
        self.inside = self.broken = False
        self.asked = 0  # the number of the signal that waits
        # whether it waits, outside of blocks too, until all ranks have `heard` of it
        self.waits = self.heard = False
        self.failed: BaseException | None = None  # what has ended its block

    def __enter__(self) -> None:
        self.inside = self.broken = True

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.inside = False
        if value is None:
            self.broken = False
            if self.heard or not self.waits:
                self.come()
        elif behind(value) is not None:
            self.asked = 0  # a signal has come
        elif self.asked:
            self.failed = value

    def come(self) -> None:
        """Raise the signal that waits, if one does."""
        number, self.asked = self.asked, 0
        error, self.failed = self.failed, None
        if number:
            LISTENER.raised += 1
            raise exception(number) from error


class Listener:
    """The handler of all signals: it raises, `most` times at most, until it is `deaf`."""

    def __init__(self) -> None:
        self.shield: Shield | None = None
        self.begin(None)

    def begin(self, most: int | None) -> None:
        """Start anew in this process: nothing raised, not deaf.

        Args:
            most: exceptions at most; None: no limit.
        """
        self.most, self.raised, self.deaf, self.process = most, 0, False, os.getpid()
        self._first = -SAME
        self._leaving, self._noted = False, 0
        self._again: list[tuple[threading.Timer, int]] = []  # what `dropped` has yet to send

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Raise what a signal asks for, let it wait for the shield, or pass it over."""
        if os.getpid() != self.process:  # a forked child: none of its parent's runs is its own
            signal.signal(number, _DEFAULT[number])
            os.kill(os.getpid(), number)
            return
        if self.deaf or time.monotonic() - self._first < SAME:
            return
        if self._leaving:
            self._noted = number
            return
        self._first = time.monotonic()
        shield = self.shield
        if shield is not None and (shield.inside or shield.waits) and not shield.asked:
            # noted, not raised: half a step must reach neither the weights nor the log. One that
            # comes when another already waits raises, lest a step that hangs cannot be ended.
            shield.asked = number
        elif self.most is None or self.raised < self.most:
            self.raised += 1
            raise exception(number)

    def dropped(self, unraisable: sys.UnraisableHookArgs) -> bool:
        """Send a signal once more, a moment later, whose exception Python has dropped.

        Python drops what is raised while a weak reference is cleared. Returns whether it was a
        signal's.
        """
        main = threading.main_thread().ident
        if not issubclass(unraisable.exc_type, KeyboardInterrupt) or main is None:
            return False
        value = unraisable.exc_value
        number = number_of(value) if isinstance(value, KeyboardInterrupt) else int(signal.SIGINT)
        self.raised, self._first = max(self.raised - 1, 0), -SAME
        # wakes what waits, as a real one does
        again = threading.Timer(0.01, signal.pthread_kill, (main, number))
        again.daemon = True
        self._again = [kept for kept in self._again if kept[0].is_alive()] + [(again, number)]
        again.start()
        return True

    def leave(self, handlers: dict[int, Any]) -> int:
        """Give the signals back to whom they were of, and return one that came meanwhile, or 0.

        Nothing is raised here, so that no handler is left behind; what `dropped` has yet to send
        would otherwise meet whatever this process does next.

        Args:
            handlers: by signal, the handlers of before.
        """
        self._leaving = True
        for again, number in self._again:
            again.cancel()
            if again.is_alive():  # waits still: a sent one is heard below at the latest
                self._noted = self._noted or number
                again.join()
        for number, handler in handlers.items():
            with suppress(ValueError):  # in a thread that took over
                signal.signal(number, handler)
        self._leaving, self._again = False, []
        noted, self._noted = self._noted, 0
        return 0 if self.deaf or (self.most is not None and self.raised >= self.most) else noted


LISTENER = Listener()
"""The one listener of this process, as handlers are the process's."""

_DEFAULT: dict[int, Any] = {
    n: signal.default_int_handler if n == signal.SIGINT else signal.SIG_DFL for n in SIGNALS
}


@contextmanager
def listening(most: int | None = None) -> Iterator[Listener]:
    """Let signals raise inside, in the main thread.

    Only those do that nobody else has a handler for, or has told to be ignored.

    Args:
        most: exceptions at most; what comes after them is not heard.
    """
    main = threading.current_thread() is threading.main_thread()
    before = (
        {
            n: handler
            for n in SIGNALS
            if (handler := signal.getsignal(n)) in (_DEFAULT[n], starting.leave)
        }
        if main
        else {}
    )
    if not before:
        yield LISTENER
        return
    LISTENER.begin(most)
    hook = sys.unraisablehook

    def unraisable(args: sys.UnraisableHookArgs) -> None:
        if not LISTENER.dropped(args):
            hook(args)

    try:
        sys.unraisablehook = unraisable
        for number in before:
            signal.signal(number, LISTENER)
        yield LISTENER
    except BaseException:
        LISTENER.leave(before)  # what came ends already
        raise
    else:
        if number := LISTENER.leave(before):
            raise exception(number)
    finally:
        sys.unraisablehook = hook


@contextmanager
def shielded() -> Iterator[Shield]:
    """Yield a shield that signals are sent to, where `listening` hears them."""
    shield = Shield()
    with listening():
        outer, LISTENER.shield = LISTENER.shield, shield
        try:
            yield shield
        except BaseException as error:
            if behind(error) is None:
                shield.failed = error  # may say more than what ended the block
                shield.come()
            raise
        else:
            shield.come()
        finally:
            LISTENER.shield = outer
