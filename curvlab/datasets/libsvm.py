"""Binary classification for logistic regression: LIBSVM text files, and sparse text.

S2QN (Yang et al. 2021), (26). Targets are 0 and 1 for the files' −1 and 1, floating and of shape
[N, 1], as the Bernoulli likelihood takes them: its loss at the output ⟨x, θ⟩ is then (26)'s log(1 +
exp(−y ⟨x, θ⟩)).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from curvlab.datasets.base import Dataset, SparseRows
from curvlab.datasets.files import file
from curvlab.errors import CurvlabError

WEBSPAM = "webspam_wc_normalized_unigram.svm"


def _read(path: Path, features: int, rows: int) -> tuple[Any, Tensor]:
    """Return (CSR matrix [N, features], targets [N, 1]) of a LIBSVM file."""
    from sklearn.datasets import load_svmlight_file

    try:
        x, y = load_svmlight_file(str(path), n_features=features, dtype=np.float32)
    except (ValueError, OSError, OverflowError) as error:  # of an index beyond 2³¹
        raise CurvlabError(
            f"data file {path} is no LIBSVM file of {features} features ({error}): get it again"
        ) from error
    if x.shape[0] != rows or set(np.unique(y)) != {-1.0, 1.0}:
        raise CurvlabError(
            f"data file {path} has {x.shape[0]} examples of classes {sorted(set(y))[:5]}, not"
            f" {rows} of −1 and 1: get it again"
        )
    return x, _targets(y > 0)


def _targets(positive: Any) -> Tensor:
    return torch.from_numpy(np.asarray(positive, np.float32))[:, None]


def _untested(data: Dataset) -> Dataset:
    """Return the test part of a set that has none: no examples."""
    return Dataset(data.name, data.x[:0], data.y[:0], f"{data.description} (no test part)")


def a9a() -> tuple[Dataset, Dataset]:
    """Load UCI Adult, 32,561 and 16,281 examples: x [N, 123], y [N, 1] of 0 and 1.

    Raises:
        CurvlabError: a file is missing or damaged.
    """

    def part(name: str, rows: int) -> Dataset:
        x, y = _read(file(name), 123, rows)
        return Dataset(
            "a9a",
            torch.from_numpy(x.toarray()),
            y,
            "UCI Adult as LIBSVM's a9a: 123 binary features",
        )

    return part("a9a", 32_561), part("a9a.t", 16_281)


def a9a_standard() -> tuple[Dataset, Dataset]:
    """Load the same with each feature at mean 0 and variance 1 over the training examples.

    As thesis 5.8 has it of webspam, of which no public file is at hand.

    Raises:
        CurvlabError: a file is missing or damaged.
    """
    parts = a9a()
    x = standardised(*(part.x[:] for part in parts))
    said = "each at mean 0 and variance 1 over the training examples"
    train, test = (
        Dataset("a9a-standard", own, part.y, f"{part.description}, {said}")
        for own, part in zip(x, parts, strict=True)
    )
    return train, test


def w8a() -> tuple[Dataset, Dataset]:
    """Load w8a, 49,749 examples and no test part: x [N, 300], y [N, 1] of 0 and 1.

    Raises:
        CurvlabError: a file is missing or damaged.
    """
    x, y = _read(file("w8a"), 300, 49_749)
    train = Dataset(
        "w8a", torch.from_numpy(x.toarray()), y, "LIBSVM's w8a: 300 binary features of web pages"
    )
    return train, _untested(train)


def news20() -> tuple[Dataset, Dataset]:
    """Load newsgroups 1 to 10 against 11 to 20, sparse, without a test part.

    Computers, sciences and items for sale against recreation, politics and religion. S2QN uses
    another file of the same messages, LIBSVM's `news20.binary`, which divides the groups likewise.

    Raises:
        CurvlabError: a file is missing or damaged.
    """
    from scipy.sparse import csr_matrix, diags

    with np.load(file("news20.npz"), allow_pickle=False) as raw:
        counts = csr_matrix(
            (raw["data"].astype(np.float64), raw["indices"], raw["indptr"]),
            shape=tuple(raw["shape"]),
        )
        y = _targets(raw["y"] <= 10)
    counts.data = np.log1p(counts.data)
    norms = np.sqrt(np.asarray(counts.multiply(counts).sum(1))[:, 0])
    rows = csr_matrix(diags(1 / norms.clip(min=np.finfo(float).tiny)) @ counts, dtype=np.float32)
    description = (
        "20 newsgroups, 1 to 10 against 11 to 20: log(1 + count) of 62,061 words, rows of length 1,"
        " sparse"
    )
    train = Dataset("news20", SparseRows(rows), y, description)
    return train, _untested(train)


def webspam() -> tuple[Dataset, Dataset]:
    """Load webspam, 300,000 and 50,000 examples: x [N, 254], y [N, 1] of 0 and 1.

    Features have mean 0 and variance 1 over the training examples. Thesis 5.8 gives the number of
    these alone: they are chosen by seed 0.

    Raises:
        CurvlabError: a file is missing or damaged.
    """
    x, y = _read(file(WEBSPAM), 254, 350_000)
    dense = torch.from_numpy(x.toarray())
    order = torch.randperm(
        len(dense), generator=torch.Generator("cpu").manual_seed(0), device="cpu"
    )
    train, test = standardised(dense[order[:300_000]], dense[order[300_000:]])
    description = (
        "webspam, normalised unigrams: 254 features at mean 0 and variance 1 over the training"
        " examples"
    )
    return (
        Dataset("webspam", train, y[order[:300_000]], description),
        Dataset("webspam", test, y[order[300_000:]], description),
    )


def standardised(train: Tensor, test: Tensor) -> tuple[Tensor, Tensor]:
    """Return both parts with each feature at mean 0 and variance 1 over the training examples.

    One that never varies there is only shifted.
    """
    # no copy of it all
    moments = [
        torch.var_mean(some.double(), 0, correction=0) for some in torch.split(train, 256, 1)
    ]
    variance, mean = (torch.cat(parts).to(train.dtype) for parts in zip(*moments, strict=True))
    scale = torch.where(variance > 0, variance.sqrt(), 1)
    return train.sub(mean).div_(scale), test.sub(mean).div_(scale)
