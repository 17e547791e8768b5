"""Pictures as files: whether a figure can be written there, seen before it is drawn."""

from __future__ import annotations

import shutil
from pathlib import Path

from curvlab.errors import CurvlabError
from curvlab.system.paths import Place, check_file, given

_FILES = ("png", "svg")


def names(figure: str) -> tuple[str, ...]:
    """Return the files that a run writes of its figure."""
    return tuple(f"{figure}.{suffix}" for suffix in _FILES)


def check_picture(path: Place, remedy: str = "") -> Path:
    """Return where a picture goes; nothing is touched.

    Args:
        path: what the user gave.
        remedy: the end of an error's line.

    Raises:
        CurvlabError: a suffix that names no format, or one that needs a LaTeX which is not there;
            and as `paths.check_file`.
    """
    import matplotlib as mpl
    from matplotlib.backend_bases import FigureCanvasBase

    suffix = given(path, "picture").suffix[1:].lower()
    if suffix not in FigureCanvasBase.get_supported_filetypes():
        said = (
            f"figures are not written as '.{suffix}'"
            if suffix
            else f"the picture '{path}' has no suffix to say its format"
        )
        raise CurvlabError(f"{said} (known: .png, .svg, .pdf)")
    latex = str(mpl.rcParams["pgf.texsystem"])
    if suffix == "pgf" and shutil.which(latex) is None:
        raise CurvlabError(
            f"figures are written as '.pgf' by {latex}, which is not there: take .png, .svg or .pdf"
        )
    return check_file(path, "picture", remedy)
