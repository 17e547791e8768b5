"""Data sets and the minibatches that they give."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from curvlab.errors import LARGEST, MOST_STEPS, CurvlabError, whole
from curvlab.finite import all_finite

Augmentation: TypeAlias = Callable[[Tensor, torch.Generator], Tensor]
"""Augmentation of a minibatch, (inputs, generator) → inputs of the same shape.

All that is random comes from the generator.
"""


IGNORED = -100
"""The class number of a place at which there is nothing to predict, as torch has it."""


@dataclass(frozen=True, eq=False)
class SparseRows:
    """Inputs kept as a CSR matrix that come out dense: ``rows[chosen]`` is a tensor [n, F].

    Layers and their statistics then need to know nothing of sparsity; what is dense is one
    minibatch, never the data set. ``rows.coo(chosen)`` is a sparse tensor, for models that take one
    (`curvlab.models.SparseLinear`).
    """

    matrix: Any  # scipy.sparse.csr_matrix [N, F], floating

    @property
    def shape(self) -> torch.Size:
        """Shape [N, F] of the matrix."""
        return torch.Size(self.matrix.shape)

    @property
    def ndim(self) -> int:
        """Number of axes, 2."""
        return 2

    @property
    def dtype(self) -> torch.dtype:
        """Torch dtype of what is stored, which the rows have too."""
        return torch.from_numpy(self.matrix.data[:0]).dtype

    def __len__(self) -> int:
        return int(self.matrix.shape[0])

    def __getitem__(self, chosen: Tensor | slice) -> Float[Tensor, "n F"]:
        return torch.from_numpy(self._chosen(chosen).toarray())

    def coo(self, chosen: Tensor | slice = slice(None)) -> Float[Tensor, "n F"]:
        """Return the chosen rows as a sparse tensor, coalesced."""
        found = self._chosen(chosen).tocoo()
        places = torch.from_numpy(np.stack([found.row, found.col]).astype(np.int64))
        return torch.sparse_coo_tensor(
            places, torch.from_numpy(found.data), found.shape, check_invariants=True
        ).coalesce()

    def _chosen(self, chosen: Tensor | slice) -> Any:
        return self.matrix[chosen if isinstance(chosen, slice) else chosen.numpy()]


@dataclass(frozen=True)
class Dataset:
    """Inputs x [N, …] (floating, or class numbers), targets y [N, …], and what they are.

    Where both are class numbers [N, T] they are of the same symbols (`symbolic`). An autoencoder's
    targets are its inputs: y is then x, the same tensor. `augment` changes the inputs of a
    minibatch and is applied by `batches` alone; `x` is the data as they are.
    """

    name: str
    x: Shaped[Tensor, "N *F"] | SparseRows
    y: Shaped[Tensor, "N *C"]
    description: str
    augment: Augmentation | None = None

    def __len__(self) -> int:
        return len(self.x)

    @property
    def inputs(self) -> tuple[int, ...]:
        """Shape of one input: what a model of the data's shape is built with."""
        return tuple(self.x.shape[1:])

    @property
    def symbolic(self) -> bool:
        """Whether inputs and targets are sequences [N, T] of the same symbols."""
        numbers = not self.x.dtype.is_floating_point and not self.y.is_floating_point()
        return numbers and self.x.ndim > 1 and self.x.shape == self.y.shape

    @property
    def outputs(self) -> int:
        """Number of outputs that a model needs: of classes, or of the numbers in one target.

        Of sequences it is the number of symbols, those of the inputs included.
        """
        if self.y.is_floating_point():
            return int(self.y.shape[1:].numel())
        largest = int(self.y.max())
        if self.symbolic:
            assert isinstance(self.x, Tensor)
            largest = max(largest, int(self.x.max()))
        return largest + 1

    def check(self) -> None:
        """Raise CurvlabError where the data cannot be what they should.

        Different lengths, NaN or Inf, negative labels other than −100.
        """
        if len(self.x) != len(self.y):
            raise CurvlabError(
                f"data set '{self.name}' has {len(self.x)} inputs but {len(self.y)} targets: mend"
                " the data"
            )
        stored = torch.from_numpy(self.x.matrix.data) if isinstance(self.x, SparseRows) else self.x
        for what, values in (("inputs", stored), ("targets", self.y)):
            if values.is_floating_point() and not all_finite(values):
                raise CurvlabError(
                    f"data set '{self.name}': {what} contain NaN or Inf{_where(values, self.x)}:"
                    " clean the data"
                )
        if not self.y.is_floating_point() and len(self.y) and int(self.y.min()) < 0:
            negative = self.y[(self.y < 0) & (self.y != IGNORED)]
            if len(negative):
                raise CurvlabError(
                    f"data set '{self.name}' has the label {int(negative.min())}: labels are class"
                    f" numbers from 0 on, or {IGNORED} where there is none"
                )

    def batches(self, size: int, epochs: int = 1, seed: int = 0, augment: bool = True) -> Batches:
        """Return minibatches (x, y) of exactly `size` examples, reshuffled every epoch.

        What is left of an epoch is dropped. Order and augmentation depend on `seed` alone.
        ``augment=False`` leaves the data as they are.

        Raises:
            CurvlabError: `size` below 1 or above the number of examples, `epochs` below 1, a seed
                below 0.
        """
        if not 1 <= whole("the batch size", size, -LARGEST) <= len(self):
            raise CurvlabError(
                f"batch size {size} does not fit '{self.name}', which has {len(self)} examples:"
                f" choose 1 to {len(self)}"
            )
        whole("epochs", epochs, 1, MOST_STEPS)
        whole("the seed", seed, 0)
        return Batches(self if augment else replace(self, augment=None), size, epochs, seed)


def _where(values: Tensor, x: Tensor | SparseRows) -> str:
    if isinstance(x, SparseRows) and len(values) != len(x):
        return ""
    bad = int((~torch.isfinite(values.reshape(len(values), -1)).all(1)).nonzero()[0])
    return f" (first in example {bad})"


@dataclass(frozen=True)
class Batches:
    """Minibatches that can be gone through any number of times, always the same."""

    data: Dataset
    size: int
    epochs: int
    seed: int

    def __len__(self) -> int:
        return self.epochs * self.per_epoch

    @property
    def per_epoch(self) -> int:
        """Number of whole minibatches in one epoch."""
        return len(self.data) // self.size

    def one_pass(self) -> Batches:
        """Return the first epoch alone: what a warm start goes through."""
        return replace(self, epochs=1)

    def epoch(self, number: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the minibatches of epoch `number`, counted from 0, from minibatch `start` on.

        They are a function of (seed, number) alone.
        """
        data = self.data
        order = torch.randperm(len(data), generator=generator(self.seed, number), device="cpu")
        for i in range(start, self.per_epoch):
            chosen = order[i * self.size : (i + 1) * self.size]
            x = data.x[chosen]
            y = x if data.y is data.x else data.y[chosen]
            yield (
                (x if data.augment is None else data.augment(x, generator(self.seed, number, i))),
                y,
            )

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for number in range(self.epochs):
            yield from self.epoch(number)


def generator(*entropy: int) -> torch.Generator:
    """Return a generator that is a function of these numbers alone."""
    return torch.Generator("cpu").manual_seed(
        int(np.random.SeedSequence(list(entropy)).generate_state(1)[0])
    )
