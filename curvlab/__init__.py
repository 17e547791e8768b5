"""curvlab: curvature diagnostics of neural networks in PyTorch.

These are the public names; nothing is computed here. What a name stands for is imported when it is
first asked for (PEP 562): the command's `--version`, `-h` and `list` need no torch.
"""

from curvlab import starting as starting  # before what takes seconds to import

# isort: split
import random as _random
from importlib import import_module as _import_module
from typing import TYPE_CHECKING, Any

from curvlab import moved as _moved
from curvlab.errors import CurvlabError, CurvlabWarning

_moved.follow()

if TYPE_CHECKING:
    from curvlab import assumptions, datasets, exact, integrations, likelihoods, models
    from curvlab.algorithms import approximation, optimizer
    from curvlab.cli.sweeping import sweep
    from curvlab.foreign_optimizers import foreign
    from curvlab.logs.reading import cosine_to, late_cosine
    from curvlab.logs.reading import open_log as open
    from curvlab.objective import Objective
    from curvlab.runs import compare
    from curvlab.show.page import report
    from curvlab.spectra import spectrum
    from curvlab.training.run import train
    from curvlab.watching import watch

    __version__: str

_PLACES = {
    "Objective": "objective",
    "approximation": "algorithms",
    "compare": "runs",
    "cosine_to": "logs.reading",
    "foreign": "foreign_optimizers",
    "late_cosine": "logs.reading",
    "open": "logs.reading:open_log",  # the design's name: cl.open("run.h5")
    "optimizer": "algorithms",
    "report": "show.page",
    "spectrum": "spectra",
    "sweep": "cli.sweeping",
    "train": "training.run",
    "watch": "watching",
}
"""{public name: its module, and its name there where that is another}"""

_MODULES = ("assumptions", "datasets", "exact", "integrations", "likelihoods", "models")

__all__ = [
    "CurvlabError",
    "CurvlabWarning",
    "Objective",
    "approximation",
    "assumptions",
    "compare",
    "cosine_to",
    "datasets",
    "exact",
    "foreign",
    "integrations",
    "late_cosine",
    "likelihoods",
    "models",
    "open",
    "optimizer",
    "report",
    "spectrum",
    "sweep",
    "train",
    "watch",
]


def _imported(name: str) -> Any:
    """Import a part. What it imports may draw (rich does), and no later draw is to be another."""
    before = _random.getstate()
    try:
        return _import_module(name)
    finally:
        _random.setstate(before)


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        found: Any = version("curvlab")
    elif name in _PLACES:
        module, _, other = _PLACES[name].partition(":")
        found = getattr(_imported(f"curvlab.{module}"), other or name)
    elif name in _MODULES or f"curvlab.{name}" in _moved.MOVED:
        found = _imported(f"curvlab.{name}")
    else:
        raise AttributeError(f"module 'curvlab' has no attribute '{name}'")
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "__version__"})
