"""What several figures share: how far a CPU goes, and how the thesis trains convolutions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from curvlab.reproduction.methods import Extent, Method, TableValues

AUTOENCODERS = Extent(seconds=120, tests=10_000, evaluated=10_000)
NETWORKS = Extent(seconds=60, examples=2048, tests=512, evaluated=512)
WIDE = Extent(seconds=60, examples=512, tests=256, evaluated=256)
"""Extents of the `cpu` budget. A step of VGG16 takes two cores some two seconds, one of ResNet32-4
eight.
"""

TUNED = Extent(
    epochs={"MNIST": 4, "FACES": 4, "CURVES": 12}, examples=10_000, tests=1000, evaluated=5000
)
"""The extent of a point of a grid in the `cpu` budget: 10 steps with minibatches of 1000 an epoch.
"""

DOCUMENT_SECONDS = {"MNIST": 500.0, "FACES": 2000.0, "CURVES": 500.0}
"""Seconds of training on the documents' machines (thesis 2.8.2, 3.7.1)."""

_FIRST: dict[str, Any] = {"schedule": "step", "schedule_options": {"every": 60}}
_SECOND: dict[str, Any] = {"schedule": "step", "schedule_options": {"every": 50}}
_OFTEN = {"update_every": 10, "refresh_every": 100}

OF_THE_THESIS: dict[str, tuple[str, dict[str, Any], int]] = {
    "K-BFGS": ("k-bfgs", _SECOND | {"update_every": 20}, 150),
    "K-BFGS(L)": ("k-bfgs-l", _SECOND | {"update_every": 20}, 150),
    "TNT": ("tnt", _SECOND | _OFTEN, 150),
    "TNT-EF": ("tnt-ef", _SECOND | _OFTEN, 150),
    "KFAC": ("kfac", _SECOND | _OFTEN, 150),
    "KFAC-EF": ("kfac-ef", _SECOND | _OFTEN, 150),
    "Shampoo": ("shampoo", _SECOND | _OFTEN, 150),
    "Adam": ("adam", _FIRST, 200),
    "SGD-m": ("sgd-m", _FIRST, 200),
}
"""{label: (algorithm, options, epochs)} on convolutional networks: thesis 3.7.1, 4.7.1. T = 20, T₁
= 10, T₂ = 100; the learning rate falls to a tenth every 60 epochs, with second-order methods every
50.
"""


def convolutional(values: Mapping[str, Mapping[str, TableValues]]) -> dict[str, Method]:
    """Return the methods of a figure on convolutional networks by their labels.

    Args:
        values: {label: {problem: (initial learning rate, weight decay, damping)}}.
    """
    found = {}
    for label, each in values.items():
        algorithm, options, epochs = OF_THE_THESIS[label]
        found[label] = Method(algorithm, each, options, epochs=epochs)
    return found
