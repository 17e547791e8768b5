"""The processes that torchrun has started together: that there are several, and who speaks.

Nothing heavy is imported: `curvlab.parallel` does the work.
"""

from __future__ import annotations

import os
from collections.abc import Callable

ASKED: list[Callable[[str], bool]] = []
"""Who is asked whether this process says a line: where several have joined, the first to ask does.
"""


def several_started() -> bool:
    """Return whether the environment says that this is one of several processes, as torchrun's."""
    count = os.environ.get("WORLD_SIZE", "1")
    return count.isdigit() and int(count) > 1 and "MASTER_ADDR" in os.environ


def may_say(line: str) -> bool:
    """Return whether a line is this process's to say, and no other has said it."""
    return all(ask(line) for ask in ASKED)
