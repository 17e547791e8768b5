"""The command line: one module a command, what they share in `terminal`.

`app` puts them together.
"""


def main() -> None:
    """Run the command line and exit: the entry point of the program `curvlab`."""
    # what takes long to import, once the program is known to be this one
    from curvlab.cli.app import (
        main as run,
    )

    run()
