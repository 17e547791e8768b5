"""The command line as ``python -m curvlab``."""

from curvlab.cli import main

main()
