"""DATASETS: what can be loaded by name, and how a data set gives minibatches.

Every file is checked against its SHA-256 before it is read. Files are looked for in the folder that the environment variable
CURVLAB_DATA names, then beside the installed package, then in the checkout's `data/`.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Shaped
from torch import Tensor

from curvlab.errors import CurvlabError, lookup

FILES = {"mnist.npz": "0bcdb57e889f1cebdb210edba449f5350a1f2078158b6257e613f4075c6712ff"}
"""{file: SHA-256}; origin and licence of each are in data/README.md."""


@dataclass(frozen=True)
class Dataset:
    """Inputs x [N, …] (floating, in [0, 1] for images), targets y [N, …], and what they are."""

    name: str
    x: Float[Tensor, "N *F"]
    y: Shaped[Tensor, "N *C"]
    description: str

    def __len__(self) -> int:
        return len(self.x)

    def batches(self, size: int, epochs: int = 1, seed: int = 0) -> Batches:
        """Minibatches (x, y) of exactly `size` examples, reshuffled every epoch; what is left of an epoch is dropped.

        Raises:
            CurvlabError: `size` below 1 or above the number of examples, `epochs` below 1.
        """
        if not 1 <= size <= len(self):
            raise CurvlabError(
                f"batch size {size} does not fit '{self.name}', which has {len(self)} examples: choose 1 to {len(self)}"
            )
        if epochs < 1:
            raise CurvlabError(f"epochs must be 1 or more, not {epochs}")
        return Batches(self, size, epochs, seed)


@dataclass(frozen=True)
class Batches:
    """An iterable over minibatches that can be gone through any number of times, always the same."""

    data: Dataset
    size: int
    epochs: int
    seed: int

    def __len__(self) -> int:
        return self.epochs * self.per_epoch

    @property
    def per_epoch(self) -> int:
        return len(self.data) // self.size

    def one_pass(self) -> Batches:
        """The first epoch alone: what a warm start goes through."""
        return replace(self, epochs=1)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for epoch in range(self.epochs):
            state = int(np.random.SeedSequence([self.seed, epoch]).generate_state(1)[0])
            order = torch.randperm(len(self.data), generator=torch.Generator().manual_seed(state))
            for i in range(self.per_epoch):
                chosen = order[i * self.size : (i + 1) * self.size]
                yield self.data.x[chosen], self.data.y[chosen]


def file(name: str) -> Path:
    """The path of a data file whose checksum is right.

    Raises:
        CurvlabError: the file is missing or damaged; the message says where it was looked for and the remedy.
    """
    here = Path(__file__).resolve().parent
    folders = [here / "_data", here.parent / "data"]
    if os.environ.get("CURVLAB_DATA"):
        folders.insert(0, Path(os.environ["CURVLAB_DATA"]))
    for folder in folders:
        path = folder / name
        if path.is_file():
            try:
                with path.open("rb") as stream:
                    found = hashlib.file_digest(stream, "sha256").hexdigest()
            except OSError as error:
                raise CurvlabError(f"data file {path} cannot be read: {error.strerror}") from error
            if found != FILES[name]:
                raise CurvlabError(
                    f"data file {path} is damaged (SHA-256 {found[:12]}…, expected {FILES[name][:12]}…): "
                    "reinstall curvlab, or in a checkout run: git checkout -- data"
                )
            return path
    raise CurvlabError(
        f"data file {name} was not found in {', '.join(map(str, folders))}: reinstall curvlab or set CURVLAB_DATA"
    )


def _mnist_images() -> dict[str, Tensor]:
    with np.load(file("mnist.npz")) as archive:
        return {key: torch.from_numpy(archive[key]) for key in archive.files}


def mnist() -> tuple[Dataset, Dataset]:
    raw = _mnist_images()

    def part(name: str) -> Dataset:
        x = raw[f"x_{name}"].flatten(1).float().div_(255)
        return Dataset("mnist", x, raw[f"y_{name}"].long(), "MNIST, 28×28 in [0, 1], flattened")

    return part("train"), part("test")


def mnist16() -> tuple[Dataset, Dataset]:
    raw = _mnist_images()

    def part(name: str) -> Dataset:
        # Framed to 32×32, then the mean of 2×2 pixels: a box filter at exactly half the resolution, so nothing aliases.
        x = F.avg_pool2d(F.pad(raw[f"x_{name}"][:, None].float(), (2, 2, 2, 2)), 2).flatten(1).div_(255)
        return Dataset(
            "mnist16", x, raw[f"y_{name}"].long(), "MNIST resized to 16×16 (mean of 2×2 after a frame of 2), in [0, 1]"
        )

    return part("train"), part("test")


@dataclass(frozen=True)
class Entry:
    summary: str
    load: Callable[[], tuple[Dataset, Dataset]]


DATASETS: dict[str, Entry] = {
    "mnist": Entry("handwritten digits, 28×28 in [0, 1]; 60,000 train, 10,000 test", mnist),
    "mnist16": Entry("MNIST resized to 16×16 (thesis 4.3.4; Martens and Grosse 2015)", mnist16),
}


def load(name: str) -> tuple[Dataset, Dataset]:
    """(train, test) of data set `name`.

    Raises:
        CurvlabError: an unknown name, a missing or damaged file.
    """
    return lookup(DATASETS, name, "data set").load()
