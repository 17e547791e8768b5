"""The command line: one module a command, what they share in `terminal`.

`app` puts them together.
"""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line and exit: the entry point of the program `curvlab`."""
    words = sys.argv[1:]
    if "sweep" in words[:2] and not {"-h", "--help"} & set(words):
        from curvlab.sweeps.warm import warm_up

        # what a point needs, which another process imports while this one imports the command's
        needed = ("cli.app", "cli.point", "training.run", "comparison_run")
        warm_up(words, [f"curvlab.{name}" for name in needed])
    # what takes long to import, once the program is known to be this one
    from curvlab.cli.app import (
        main as run,
    )

    run()
