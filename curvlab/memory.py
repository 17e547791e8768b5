"""How this process uses memory."""

from __future__ import annotations

import ctypes
import sys


def keep_freed_memory() -> None:
    """Let glibc keep what is freed, so that large matrices reuse the same pages; for scripts that make many of them.

    Fresh pages cost more than most arithmetic on them: a third of a dense 5140² block, 12 % of the default `curvlab compare`.
    The command line does it; does nothing where there is no glibc.
    """
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            mallopt(-4, 0)  # M_MMAP_MAX: nothing by mmap
            mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
