"""Data sets whose files the repository does not hold: loaded where CURVLAB_DATA has them, else the
test is skipped.
"""

from __future__ import annotations

from functools import lru_cache

import pytest

import curvlab as cl
from curvlab.datasets import Dataset, files

NEEDS = {
    "faces": ("olivettifaces.mat",),
    "cifar10": ("cifar-10-python.tar.gz", "cifar-10-batches-py/test_batch", "cifar10.npz"),
    "cifar10-standard": ("cifar-10-python.tar.gz", "cifar-10-batches-py/test_batch", "cifar10.npz"),
    "cifar100": ("cifar-100-python.tar.gz", "cifar-100-python/test", "cifar100.npz"),
    "cifar10-subset": ("cifar10_subset.npz",),
    "cifar10-subset-standard": ("cifar10_subset.npz",),
    "a9a": ("a9a",),
    "a9a-standard": ("a9a",),
    "w8a": ("w8a",),
    "news20": ("news20.npz",),
    "webspam": ("webspam_wc_normalized_unigram.svm",),
}
"""{data set: files, any of which it can be made of}."""


def load_or_skip(name: str) -> tuple[Dataset, Dataset]:
    needed = NEEDS.get(name)
    if needed is not None and not any(files.find_file(file) for file in needed):
        pytest.skip(f"no {' or '.join(needed)}: set CURVLAB_DATA to a folder that has one")
    return _load(name)


@lru_cache(maxsize=2)
def _load(name: str) -> tuple[Dataset, Dataset]:
    return cl.datasets.load(name)
