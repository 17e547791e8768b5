"""``python -m curvlab``."""

from curvlab.cli.app import main

main()
