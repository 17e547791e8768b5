"""Sequences of symbols: Shakespeare's tragedies in windows, and two sets that are made from a seed.

Inputs x are class numbers [N, T], targets y [N, T] those that are to be predicted at the same
places: of a text the next symbol. A place with target −100 has nothing to predict (the
`ignore_index` of torch and of `likelihoods.Categorical`).

Legend: N sequences, T places.
"""

from __future__ import annotations

import lzma

import numpy as np
import torch
from jaxtyping import Int64
from numpy.typing import NDArray

from curvlab.datasets.base import IGNORED, Dataset
from curvlab.datasets.files import file
from curvlab.errors import CurvlabError

SYMBOLS = 8
"""COPYING: the symbols to be kept, and how many of them there are in a sequence; chosen here."""

PRIME = 97
"""ADDITION: the modulus p (Power et al. 2022, A.1.1)."""

Sequences = Int64[NDArray[np.int64], "N T"]


def shakespeare_text() -> str:
    """The six tragedies, as "Speaker:", lines, and an empty line between speeches.

    Raises:
        CurvlabError: the file is missing or damaged.
    """
    return lzma.decompress(file("shakespeare.txt.xz").read_bytes()).decode()


def shakespeare(places: int = 64) -> tuple[Dataset, Dataset]:
    """Load the text in windows of T = `places` symbols that do not overlap.

    There are 62 symbols, in the order of their code points; the last tenth is for validation. Each
    part begins anew: window n has inputs nT … nT + T − 1 and targets nT + 1 … nT + T of it,
    and what is left is dropped. The text and the 64 places are in kind those of nanoGPT on a CPU
    (Karpathy 2022), which draws its windows at random.

    Raises:
        CurvlabError: the file is missing or damaged.
    """
    codes = np.frombuffer(shakespeare_text().encode("utf-32-le"), dtype="<u4")
    numbers = torch.from_numpy(np.unique(codes, return_inverse=True)[1].astype(np.int64))
    name = "shakespeare" if places == 64 else f"shakespeare{places}"
    description = (
        f"six tragedies of Shakespeare, symbol by symbol: windows of {places} that do not overlap;"
        " targets are the next symbols"
    )
    cut = len(numbers) - len(numbers) // 10

    def part(some: torch.Tensor) -> Dataset:
        count = (len(some) - 1) // places
        x, y = (some[i : i + count * places].reshape(count, places) for i in (0, 1))
        return Dataset(name, x, y, description)

    return part(numbers[:cut]), part(numbers[cut:])


def shakespeare32() -> tuple[Dataset, Dataset]:
    """The same in windows of 32 symbols."""
    return shakespeare(32)


def copying(seed: int = 0, train: int = 4_096, test: int = 1_024) -> tuple[Dataset, Dataset]:
    """Make eight symbols drawn from eight, a delimiter, the same again: T = 16.

    That is the copy task of Graves et al. 2014. The delimiter is the class number 8. Inputs are
    s₁ … s₈, the delimiter, s₁ … s₇; targets are s₁ … s₈ from the delimiter on, and none before it.
    """
    drawn = np.random.default_rng(seed).integers(0, SYMBOLS, (train + test, SYMBOLS))
    delimiter = np.full((len(drawn), 1), SYMBOLS)
    x = np.concatenate([drawn, delimiter, drawn[:, :-1]], 1)
    y = np.concatenate([np.full_like(drawn, IGNORED), drawn], 1)
    description = (
        f"copying, made from seed {seed}: {SYMBOLS} symbols of {SYMBOLS}, a delimiter, the same"
        " symbols, which are the targets"
    )
    return _parts("copying", x, y, train, description)


def addition(modulus: int = PRIME, seed: int = 0) -> tuple[Dataset, Dataset]:
    """All p² sums a + b modulo p (Power et al. 2022), half of them to train on, chosen by `seed`.

    Inputs are a, b and the sign "=", which is the class number p: T = 3. The sum is the target at
    the last place, and there is none before it.

    Raises:
        CurvlabError: a modulus below 2.
    """
    if modulus < 2:
        raise CurvlabError(f"the modulus of addition must be 2 or more, not {modulus}")
    a, b = (v.ravel() for v in np.indices((modulus, modulus)))
    none, sign = np.full_like(a, IGNORED), np.full_like(a, modulus)
    order = np.random.default_rng(seed).permutation(len(a))
    x = np.stack([a, b, sign], 1)[order]
    y = np.stack([none, none, (a + b) % modulus], 1)[order]
    description = (
        f"addition modulo {modulus}, all pairs, parted by seed {seed}: a, b, =; the target is the"
        " sum, at the last place"
    )
    return _parts("addition", x, y, len(x) // 2, description)


def _parts(
    name: str, x: Sequences, y: Sequences, train: int, description: str
) -> tuple[Dataset, Dataset]:
    """The first `train` sequences, and the others."""

    def part(some: slice) -> Dataset:
        return Dataset(name, torch.from_numpy(x[some]), torch.from_numpy(y[some]), description)

    return part(slice(train)), part(slice(train, None))
