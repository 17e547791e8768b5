"""Images: MNIST in several shapes, CIFAR, and their augmentation.

Legend: N images, C channels, H, W height and width.
"""

from __future__ import annotations

import io
import pickle
import tarfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from curvlab.datasets.base import Dataset
from curvlab.datasets.files import file, find_file
from curvlab.datasets.libsvm import standardised
from curvlab.errors import CurvlabError


def _mnist_images() -> dict[str, Tensor]:
    with np.load(file("mnist.npz")) as archive:
        return {key: torch.from_numpy(archive[key]) for key in archive.files}


def mnist() -> tuple[Dataset, Dataset]:
    """Load MNIST (train, test): inputs [N, 784] in [0, 1], class numbers 0 to 9.

    Raises:
        CurvlabError: a file is missing or damaged.
    """
    raw = _mnist_images()

    def part(name: str) -> Dataset:
        x = raw[f"x_{name}"].flatten(1).float().div_(255)
        return Dataset("mnist", x, raw[f"y_{name}"].long(), "MNIST, 28×28 in [0, 1], flattened")

    return part("train"), part("test")


def mnist16() -> tuple[Dataset, Dataset]:
    """Load MNIST at 16×16 (thesis 4.3.4): inputs [N, 256] in [0, 1], class numbers 0 to 9.

    Raises:
        CurvlabError: a file is missing or damaged.
    """
    raw = _mnist_images()

    def part(name: str) -> Dataset:
        # Framed to 32×32, then the mean of 2×2 pixels: a box filter at exactly half the resolution,
        # so nothing aliases.
        x = (
            F.avg_pool2d(F.pad(raw[f"x_{name}"][:, None].float(), (2, 2, 2, 2)), 2)
            .flatten(1)
            .div_(255)
        )
        return Dataset(
            "mnist16",
            x,
            raw[f"y_{name}"].long(),
            "MNIST resized to 16×16 (mean of 2×2 after a frame of 2), in [0, 1]",
        )

    return part("train"), part("test")


def mnist_ae() -> tuple[Dataset, Dataset]:
    """Load MNIST whose targets are the inputs, as `mnist` does."""
    raw = _mnist_images()

    def part(name: str) -> Dataset:
        x = raw[f"x_{name}"].flatten(1).float().div_(255)
        return Dataset(
            "mnist-ae", x, x, "MNIST, 28×28 in [0, 1], flattened; targets are the inputs"
        )

    return part("train"), part("test")


def mnist_standard() -> tuple[Dataset, Dataset]:
    """Load MNIST with each pixel at mean 0 and variance 1.

    Thesis 5.8: "scaled to have zero means and unit variances".
    """
    return _standard(mnist(), "mnist-standard", "MNIST, 28×28")


def cifar10_standard() -> tuple[Dataset, Dataset]:
    """Load CIFAR-10 flattened, each pixel at mean 0 and variance 1 (thesis 5.8)."""
    return _standard(cifar10(), "cifar10-standard", "CIFAR-10, 3×32×32")


def cifar10_subset_standard() -> tuple[Dataset, Dataset]:
    """Load the subset of CIFAR-10 flattened, each pixel at mean 0 and variance 1."""
    return _standard(
        cifar10_subset(), "cifar10-subset-standard", "8,068 images of CIFAR-10, 3×32×32"
    )


def _standard(parts: tuple[Dataset, Dataset], name: str, what: str) -> tuple[Dataset, Dataset]:
    description = f"{what}, flattened, each pixel at mean 0 and variance 1 over the training images"
    x = standardised(*(part.x[:].flatten(1) for part in parts))
    train, test = (
        Dataset(name, each, part.y, description) for each, part in zip(x, parts, strict=True)
    )
    return train, test


@dataclass(frozen=True)
class CropAndFlip:
    """Augmentation of images by random crops and horizontal flips.

    Each is framed by `padding` pixels of colour `fill`, cropped at random to its size, and mirrored
    with probability ½.

    Thesis 4.7.2 has random crops and horizontal flips, after Krizhevsky et al. (2012), as have Ren
    and Goldfarb (2021); the frame of 4 pixels is that of He et al. (2016), 4.2.
    """

    padding: int = 4
    fill: tuple[float, ...] = (0.0,)

    def __call__(
        self, x: Float[Tensor, "N C H W"], generator: torch.Generator
    ) -> Float[Tensor, "N C H W"]:
        """Return the images cropped and mirrored, all that is random from the generator."""
        n, c, h, w = x.shape
        p = self.padding
        top, left = torch.randint(0, 2 * p + 1, (2, n, 1), generator=generator, device="cpu")
        mirrored = torch.rand(n, 1, generator=generator, device="cpu") < 0.5
        framed = (
            torch.tensor(self.fill, dtype=x.dtype, device=x.device)
            .reshape(1, -1, 1, 1)
            .repeat(n, c // len(self.fill), h + 2 * p, w + 2 * p)
        )
        framed[:, :, p : p + h, p : p + w] = x
        rows, columns = (
            first + torch.arange(size, device="cpu") for first, size in ((top, h), (left, w))
        )
        columns = torch.where(mirrored, columns.flip(1), columns)
        image, channel = (
            torch.arange(n, device="cpu")[:, None, None, None],
            torch.arange(c, device="cpu")[None, :, None, None],
        )
        return framed[image, channel, rows[:, None, :, None], columns[:, None, None, :]]


@dataclass(frozen=True)
class Cifar:
    """Names under which one of the two CIFAR sets is kept.

    As pickles in a folder, in an archive of that folder, or as an npz file.
    """

    title: str
    classes: int
    folder: str
    train: tuple[str, ...]
    test: str
    labels: bytes
    archive: str
    npz: str


CIFAR10 = Cifar(
    "CIFAR-10",
    10,
    "cifar-10-batches-py",
    tuple(f"data_batch_{i}" for i in range(1, 6)),
    "test_batch",
    b"labels",
    "cifar-10-python.tar.gz",
    "cifar10.npz",
)
CIFAR100 = Cifar(
    "CIFAR-100",
    100,
    "cifar-100-python",
    ("train",),
    "test",
    b"fine_labels",
    "cifar-100-python.tar.gz",
    "cifar100.npz",
)

Arrays = dict[str, NDArray[Any]]
"""Arrays x_train, y_train, x_test, y_test of a CIFAR set."""


def cifar10() -> tuple[Dataset, Dataset]:
    """Load CIFAR-10 (train, test): inputs [N, 3, 32, 32], class numbers 0 to 9 (thesis 4.7.2).

    Channels have mean 0 and variance 1 over the training images; minibatches of these are cropped
    and mirrored at random (`CropAndFlip`).

    Raises:
        CurvlabError: a file is missing or damaged.
    """
    return _cifar_dataset("cifar10", CIFAR10, _cifar_arrays(CIFAR10))


def cifar100() -> tuple[Dataset, Dataset]:
    """Load CIFAR-100 (train, test) as `cifar10` does, with its 100 fine classes.

    Raises:
        CurvlabError: a file is missing or damaged.
    """
    return _cifar_dataset("cifar100", CIFAR100, _cifar_arrays(CIFAR100))


def cifar10_subset() -> tuple[Dataset, Dataset]:
    """Load 8,068 training and 1,017 test images of CIFAR-10 as `cifar10` does, from their own file.

    Raises:
        CurvlabError: a file is missing or damaged.
    """
    path = file("cifar10_subset.npz")
    return _cifar_dataset(
        "cifar10-subset", replace(CIFAR10, title="8,068 images of CIFAR-10"), _npz(path)
    )


def _cifar_dataset(name: str, kind: Cifar, arrays: Arrays) -> tuple[Dataset, Dataset]:
    """Return (train, test) with channels at mean 0 and variance 1 over the training images.

    The frame of random crops is black.
    """
    description = (
        f"{kind.title}, 3×32×32, channels at mean 0 and variance 1 over the training images"
    )
    train, test = (
        torch.from_numpy(_images(arrays[f"x_{part}"], name)).float().div_(255)
        for part in ("train", "test")
    )
    labels = [
        _labels(arrays[f"y_{part}"], len(x), kind, name)
        for part, x in (("train", train), ("test", test))
    ]
    moments = [torch.var_mean(train[:, c].double(), correction=0) for c in range(3)]
    mean, scale = (
        torch.tensor([float(m) for _, m in moments], device="cpu"),
        torch.tensor([float(v) ** 0.5 for v, _ in moments], device="cpu"),
    )
    for x in (train, test):
        x.sub_(mean[:, None, None]).div_(scale[:, None, None])
    augment = CropAndFlip(4, tuple(float(v) for v in -mean / scale))
    augmented = f"{description}; minibatches are cropped at random (frame of 4) and mirrored"
    return Dataset(name, train, labels[0], augmented, augment), Dataset(
        name, test, labels[1], description
    )


def _images(x: NDArray[Any], name: str) -> NDArray[np.uint8]:
    """Return images as bytes [N, 3, 32, 32], from that, channels last or rows of 3072."""
    if x.dtype == np.uint8 and x.shape[1:] == (3072,):
        return x.reshape(-1, 3, 32, 32)
    if x.dtype == np.uint8 and x.shape[1:] == (32, 32, 3):
        return np.ascontiguousarray(x.transpose(0, 3, 1, 2))
    if x.dtype == np.uint8 and x.shape[1:] == (3, 32, 32):
        return x
    raise CurvlabError(
        f"the images of '{name}' are {x.dtype} of shape {x.shape}: bytes of shape [N, 3, 32, 32]"
        " are needed"
    )


def _labels(y: NDArray[Any], size: int, kind: Cifar, name: str) -> Tensor:
    flat = np.asarray(y).reshape(-1)
    if (
        len(flat) != size
        or flat.dtype.kind not in "iu"
        or flat.min() < 0
        or flat.max() >= kind.classes
    ):
        raise CurvlabError(
            f"the labels of '{name}' are not {size} numbers from 0 to {kind.classes - 1}: get the"
            " file again"
        )
    return torch.from_numpy(flat.astype(np.int64))


def _npz(path: Path) -> Arrays:
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {key: archive[key] for key in ("x_train", "y_train", "x_test", "y_test")}
    except Exception as error:  # a zip file can be damaged in many ways
        raise CurvlabError(
            f"data file {path} cannot be read ({error}): it must hold arrays x_train, y_train,"
            " x_test, y_test"
        ) from error


def _cifar_arrays(kind: Cifar) -> Arrays:
    """Read the images and labels of a CIFAR set from where the user has them.

    The npz file where there is one, else the pickles of the folder, else those of the archive,
    downloaded if need be.
    """
    path = find_file(kind.npz)
    if path is not None:
        return _npz(path)
    members = (*kind.train, kind.test)
    if find_file(f"{kind.folder}/{kind.test}") is not None:
        batches = [
            unpickled(path.read_bytes(), str(path), kind.labels)
            for path in (file(f"{kind.folder}/{name}") for name in members)
        ]
    else:
        batches = _from_archive(file(kind.archive), kind, members)
    x, y = (
        [batch[b"data"] for batch in batches],
        [np.array(batch[kind.labels]) for batch in batches],
    )
    return {
        "x_train": np.concatenate(x[:-1]),
        "y_train": np.concatenate(y[:-1]),
        "x_test": x[-1],
        "y_test": y[-1],
    }


def _from_archive(path: Path, kind: Cifar, members: tuple[str, ...]) -> list[dict[bytes, Any]]:
    found: dict[str, dict[bytes, Any]] = {}
    with tarfile.open(path) as archive:
        for member in archive:
            stream = archive.extractfile(member) if member.name.startswith(kind.folder) else None
            if stream is not None and Path(member.name).name in members:
                found[Path(member.name).name] = unpickled(
                    stream.read(), f"{path}:{member.name}", kind.labels
                )
    return [found[name] for name in members]


class _ArraysOnly(pickle.Unpickler):
    """Unpickler of containers, strings, numbers and numpy arrays alone.

    It refuses everything else that a pickle can ask for.
    """

    reconstruct: Callable[..., Any] = np.empty(0).__reduce__()[0]  # type: ignore[assignment]  # str | Callable

    def find_class(self, module: str, name: str) -> Any:
        known: dict[tuple[str, str], Any] = {
            ("numpy", "ndarray"): np.ndarray,
            ("numpy", "dtype"): np.dtype,
            ("_codecs", "encode"): lambda text, encoding: text.encode(encoding),
        }
        if name == "_reconstruct" and module in ("numpy.core.multiarray", "numpy._core.multiarray"):
            return type(self).reconstruct
        if (module, name) not in known:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return known[module, name]


def unpickled(content: bytes, where: str, labels: bytes = b"labels") -> dict[bytes, Any]:
    """Return the dictionary in a CIFAR pickle.

    Nothing but data is ever made of it, whatever it holds.

    Raises:
        CurvlabError: it is damaged, or asks for more than arrays.
    """
    try:
        found = _ArraysOnly(io.BytesIO(content), encoding="bytes").load()
    except Exception as error:  # a damaged pickle can fail in any way
        raise CurvlabError(
            f"data file {where} is no CIFAR pickle ({error}): get it again"
        ) from error
    if not isinstance(found, dict) or not {b"data", labels} <= found.keys():
        raise CurvlabError(
            f"data file {where} is no CIFAR pickle (no b'data' and {labels!r} in it): get it again"
        )
    return found
