"""curvlab: curvature diagnostics of neural networks in PyTorch. The public names; nothing is computed here."""

from curvlab import starting as starting  # before what takes seconds to import

# isort: split
from importlib.metadata import version as _version

from curvlab import assumptions, datasets, exact, likelihoods, models
from curvlab.algorithms import approximation, optimizer
from curvlab.errors import CurvlabError, CurvlabWarning
from curvlab.logs.reading import cosine_to, late_cosine
from curvlab.logs.reading import open_log as open  # the design's name: cl.open("run.h5")
from curvlab.objective import Objective
from curvlab.runs import compare
from curvlab.show.page import report
from curvlab.spectra import spectrum
from curvlab.training.run import train

__version__ = _version("curvlab")
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
    "late_cosine",
    "likelihoods",
    "models",
    "open",
    "optimizer",
    "report",
    "spectrum",
    "train",
]
