"""DATASETS: what can be loaded by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from curvlab import moved
from curvlab.datasets.base import Batches, Dataset, SparseRows
from curvlab.datasets.files import FILES, File, file
from curvlab.datasets.images import (
    CropAndFlip,
    cifar10,
    cifar10_standard,
    cifar10_subset,
    cifar10_subset_standard,
    cifar100,
    mnist,
    mnist16,
    mnist_ae,
    mnist_standard,
)
from curvlab.datasets.libsvm import a9a, a9a_standard, news20, w8a, webspam
from curvlab.datasets.regenerated import curves, faces
from curvlab.datasets.sequences import addition, copying, shakespeare, shakespeare32
from curvlab.errors import lookup

__all__ = [
    "DATASETS",
    "FILES",
    "Batches",
    "CropAndFlip",
    "DataEntry",
    "Dataset",
    "File",
    "SparseRows",
    "addition",
    "copying",
    "curves",
    "faces",
    "file",
    "load",
    "shakespeare",
]


@dataclass(frozen=True)
class DataEntry:
    """A data set of the table: what it is, and what loads its parts (train, test)."""

    summary: str
    load: Callable[[], tuple[Dataset, Dataset]]
    comes: str = "with the package"
    """Where the data come from: with the package, from a file of the user's, by download, made."""


_OWN = "CURVLAB_DATA"
_EITHER = "CURVLAB_DATA or download"

DATASETS: dict[str, DataEntry] = {
    "mnist": DataEntry("handwritten digits, 28×28 in [0, 1]; 60,000 train, 10,000 test", mnist),
    "mnist16": DataEntry("MNIST resized to 16×16 (thesis 4.3.4; Martens and Grosse 2015)", mnist16),
    "mnist-ae": DataEntry(
        "MNIST for autoencoders: targets are the inputs (thesis Table 2.3)", mnist_ae
    ),
    "mnist-standard": DataEntry(
        "MNIST, each pixel at mean 0 and variance 1 (thesis 5.8)", mnist_standard
    ),
    "curves": DataEntry(
        "CURVES, regenerated: 20,000 train, 10,000 test (thesis Table 2.3)", curves, "made, cached"
    ),
    "faces": DataEntry(
        "FACES, regenerated: 103,500 train, 41,400 test (thesis Table 2.3)",
        faces,
        f"made of {_EITHER}, cached",
    ),
    "cifar10": DataEntry(
        "CIFAR-10, channels at mean 0 and variance 1, random crops and flips (thesis 4.7.2)",
        cifar10,
        _EITHER,
    ),
    "cifar100": DataEntry("CIFAR-100, likewise", cifar100, _EITHER),
    "cifar10-subset": DataEntry(
        "8,068 training and 1,017 test images of CIFAR-10, likewise", cifar10_subset, _OWN
    ),
    "cifar10-standard": DataEntry(
        "CIFAR-10 flattened, each pixel at mean 0 and variance 1 (thesis 5.8)",
        cifar10_standard,
        _EITHER,
    ),
    "cifar10-subset-standard": DataEntry("the subset, likewise", cifar10_subset_standard, _OWN),
    "a9a": DataEntry(
        "UCI Adult, 123 binary features; 32,561 train, 16,281 test; for S2QN (26)", a9a, _EITHER
    ),
    "a9a-standard": DataEntry(
        "UCI Adult, each feature at mean 0 and variance 1: in webspam's place (thesis 5.8)",
        a9a_standard,
        _EITHER,
    ),
    "w8a": DataEntry(
        "web pages, 300 binary features; 49,749 train, no test; for S2QN (26)", w8a, _EITHER
    ),
    "news20": DataEntry(
        "20 newsgroups in two classes, 62,061 sparse features; 15,935 train, no test; for S2QN"
        " (26)",
        news20,
        _OWN,
    ),
    "webspam": DataEntry(
        "web pages, 254 features at mean 0 and variance 1; 300,000 train, 50,000 test (thesis 5.8)",
        webspam,
        _OWN,
    ),
    "shakespeare": DataEntry(
        "six tragedies in windows of 64 symbols, 62 classes; 11,224 train, 1,247 test", shakespeare
    ),
    "shakespeare32": DataEntry("the same in windows of 32 symbols", shakespeare32),
    "copying": DataEntry(
        "eight symbols, a delimiter, the same again: T = 16, 9 classes; 4,096 train, 1,024 test"
        " (Graves et al. 2014)",
        copying,
        "made",
    ),
    "addition": DataEntry(
        "a + b modulo 97: T = 3, 98 classes; 4,704 train, 4,705 test (Power et al. 2022)",
        addition,
        "made",
    ),
}


_Parts = tuple[Dataset, Dataset]
_keeps = False
_kept: dict[str, tuple[DataEntry, _Parts, list[int]]] = {}


@contextmanager
def keeping() -> Iterator[None]:
    """Let `load` give the data set that it gave last inside of an earlier one, where it may.

    A process that runs the points of a sweep reads and decompresses their data once. One of
    curvlab's own data sets is kept, the last, unless something has written into its tensors;
    another's `load` may draw random numbers.
    """
    global _keeps
    before, _keeps = _keeps, True
    try:
        yield
    finally:
        _keeps = before


def load(name: str) -> tuple[Dataset, Dataset]:
    """Load (train, test) of data set `name`; a set without a test part gives one of no examples.

    Raises:
        CurvlabError: an unknown name, a missing or damaged file, data that contain NaN.
    """
    entry = lookup(DATASETS, name, "data set")
    if _keeps and name in _kept:
        of, parts, versions = _kept[name]
        if of is entry and versions == _versions(parts):
            return parts
    if _keeps:
        _kept.clear()  # there is room for one
    parts = entry.load()
    for part in parts:
        part.check()
    own = getattr(entry.load, "__module__", "").startswith(f"{__name__}.")
    if _keeps and own and _versions(parts):
        _kept[name] = (entry, parts, _versions(parts))
    return parts


def _versions(parts: _Parts) -> list[int]:
    """Return how often each tensor was written to; empty where some are no tensors."""
    tensors = [values for part in parts for values in (part.x, part.y)]
    if not all(isinstance(values, Tensor) for values in tensors):
        return []
    return [values._version for values in tensors if isinstance(values, Tensor)]


if not TYPE_CHECKING:  # to a type checker the old names are gone
    __getattr__ = moved.old_names(__name__)
