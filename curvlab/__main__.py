"""``python -m curvlab``."""

from curvlab.cli import main

main()
