"""Figures and tables of the documents: what the scripts of `analyses/` are made of.

`Comparison` trains methods and draws curves, `TunedTable` trains them at every point of a grid,
`Scaling` measures time and memory of one layer, `Script` is anything else; `main(FIGURE, __file__)`
is a script's own command line; `load_script(name)` is another script's FIGURE.
"""

from typing import TYPE_CHECKING

from curvlab import moved
from curvlab.reproduction import problems
from curvlab.reproduction.claims import Claim, Reported
from curvlab.reproduction.comparison import Comparison
from curvlab.reproduction.index import load_script, scripts
from curvlab.reproduction.methods import Extent, Method
from curvlab.reproduction.scaling import Axis, Row, Scaling
from curvlab.reproduction.script import Options, ReproductionReport, Script, main, reproduce
from curvlab.reproduction.settings import (
    AUTOENCODERS,
    DOCUMENT_SECONDS,
    NETWORKS,
    TUNED,
    WIDE,
    convolutional,
)
from curvlab.reproduction.tuned import TunedTable

__all__ = [
    "AUTOENCODERS",
    "DOCUMENT_SECONDS",
    "NETWORKS",
    "TUNED",
    "WIDE",
    "Axis",
    "Claim",
    "Comparison",
    "Extent",
    "Method",
    "Options",
    "Reported",
    "ReproductionReport",
    "Row",
    "Scaling",
    "Script",
    "TunedTable",
    "convolutional",
    "load_script",
    "main",
    "problems",
    "reproduce",
    "scripts",
]


if not TYPE_CHECKING:  # to a type checker the old names are gone
    __getattr__ = moved.old_names(__name__)
