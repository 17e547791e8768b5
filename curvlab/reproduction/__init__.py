"""Figures and tables of the documents: what the scripts of `analyses/` are made of.

`Comparison` trains methods and draws curves, `Scaling` measures time and memory of one layer,
`Script` is anything else; `main(FIGURE, __file__)` is a script's own command line; `load(name)` is
another script's FIGURE.
"""

from curvlab.reproduction import problems
from curvlab.reproduction.claims import Claim
from curvlab.reproduction.comparison import Comparison, Extent, Method
from curvlab.reproduction.index import load, scripts
from curvlab.reproduction.scaling import Axis, Row, Scaling
from curvlab.reproduction.script import Options, Report, Script, main, reproduce
from curvlab.reproduction.settings import (
    AUTOENCODERS,
    DOCUMENT_SECONDS,
    NETWORKS,
    WIDE,
    convolutional,
)

__all__ = [
    "AUTOENCODERS",
    "DOCUMENT_SECONDS",
    "NETWORKS",
    "WIDE",
    "Axis",
    "Claim",
    "Comparison",
    "Extent",
    "Method",
    "Options",
    "Report",
    "Row",
    "Scaling",
    "Script",
    "convolutional",
    "load",
    "main",
    "problems",
    "reproduce",
    "scripts",
]
