"""What a worker of this machine does first: it is told so by the engine, as dask's ``preload``.

It imports nothing heavy: a worker that dies before its nanny has seen it running is not started
anew, and what ends a worker is most often the code of a point.
"""

from __future__ import annotations

import signal
from typing import Any

from curvlab.starting import SIGNALS


def dask_setup(worker: Any) -> None:
    """Leave Ctrl-C to the command: a terminal sends it to all processes of the command."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN if number == signal.SIGINT else signal.SIG_DFL)
