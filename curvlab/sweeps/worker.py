"""What a worker of this machine does first: it is told so by the engine, as dask's ``preload``."""

from __future__ import annotations

import importlib
import signal
from typing import Any


def dask_setup(worker: Any) -> None:
    """Leave Ctrl-C to the command, and import once what every point needs.

    A terminal sends Ctrl-C to all processes of a command, and a worker that it ends would say so at
    length.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for name in ("curvlab.training.run", "curvlab.comparison_run", "curvlab.cli.app"):
        importlib.import_module(name)
