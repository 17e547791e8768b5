"""Which figures and tables there are: the scripts of `analyses/`, found by their names."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

from curvlab.errors import CurvlabError, lookup
from curvlab.reproduction.script import name_of

FOLDERS = ("thesis", "s2qn", "kfqn_cnn", "all_methods", "recent")
"""Folders of `analyses/`, in the order of the index."""


def folder() -> Path:
    """Return `analyses/`: of the installed package, else of the repository.

    Raises:
        CurvlabError: there is neither.
    """
    package = Path(__file__).resolve().parent.parent
    for place in (package / "analyses", package.parent / "analyses"):
        if (place / FOLDERS[0]).is_dir():
            return place
    raise CurvlabError(
        f"there is no folder of analyses beside {package}: install curvlab again, or run it from"
        " its repository"
    )


def scripts() -> dict[str, Path]:
    """Return {name: script}, in the order of documents and numbers."""

    def order(path: Path) -> tuple[int, str, list[int]]:
        kind, *numbers = path.stem.split("_")
        return FOLDERS.index(path.parent.name), kind, [int(n) for n in numbers if n.isdigit()]

    found = (path for part in FOLDERS for path in (folder() / part).glob("*.py"))
    return {name_of(path): path for path in sorted(found, key=order)}


def load_script(name: str) -> Any:
    """Return the FIGURE of script `name`: a `Comparison`, a `Scaling` or another `Reproduction`.

    Raises:
        CurvlabError: an unknown name.
    """
    path = lookup(scripts(), name, "figure or table")
    return runpy.run_path(str(path), run_name=path.stem)["FIGURE"]
