"""CURVES and FACES, regenerated.

Of the files that the thesis names (`digs3pts_1.mat`, `newfaces_rot_single.mat`) no public copy was
found. These sets are made by the recipes of Hinton and Salakhutdinov (2006) as far as they are
published; what is left open is set so that total variance and the error of principal components
come out near the published ones. They are not the originals, and say so.

Legend: n images, S side of an image, P points of ink.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, UInt8
from numpy.typing import NDArray
from scipy.io import loadmat
from scipy.ndimage import convolve

from curvlab.datasets.base import Dataset
from curvlab.datasets.files import cached, file
from curvlab.errors import CurvlabError

SIDE, MARGIN, POINTS, INK, SPREAD = 28, 6, 60, 0.4, 0.5
"""CURVES: pixels of a side, and around the three points; points of ink on a curve; ink of a point;
a of the kernel.
"""

RECIPE = 1
"""Number of the recipe, in the names in the cache: raised whenever a seed draws other images."""

PATCH, STEP, PATCHES = 25, 2.25, 414
"""FACES: pixels of a side; distance of neighbouring samples in the enlarged image; patches of an
image.
"""


def quantised(values: NDArray[np.float64]) -> NDArray[np.uint8]:
    """Return the nearest of the numbers 0 to 255, as bytes."""
    whole: NDArray[np.uint8] = np.rint(values).astype(np.uint8)
    return whole


def natural_spline(
    points: Float[NDArray[np.float64], "n 3 2"], x: Float[NDArray[np.float64], "n P"]
) -> Float[NDArray[np.float64], "n P"]:
    """Return y(x) on the natural cubic splines through three points each, their x ascending.

    One number M, the second derivative at the middle point, decides each: h₀ + h₁ intervals, 2 (h₀
    + h₁) M = 6 (d₁ − d₀).
    """
    (x0, x1, x2), (y0, y1, y2) = (points[..., axis].T[..., None] for axis in (0, 1))
    h0, h1 = x1 - x0, x2 - x1
    m = 3 * ((y2 - y1) / h1 - (y1 - y0) / h0) / (h0 + h1)
    u, v = x - x0, x2 - x
    left = y0 + u * ((y1 - y0) / h0 - h0 * m / 6) + m * u**3 / (6 * h0)
    right = y2 + v * ((y1 - y2) / h1 - h1 * m / 6) + m * v**3 / (6 * h1)
    y: NDArray[np.float64] = np.where(x < x1, left, right)
    return y


def draw_curves(n: int, rng: np.random.Generator) -> UInt8[NDArray[np.uint8], "n S S"]:
    """Draw images of n random curves, in 256 steps of intensity.

    Three points uniform in the square inside the margin, sorted by x, define a natural cubic
    spline. A curve that leaves the image is held at its edge. 60 points evenly spaced by arc length
    ink it, each split bilinearly over its four nearest pixels; a kernel spreads the ink, b (1 + a)
    [[a/12, a/6, a/12], [a/6, 1 − a, a/6], …] with b = 1, and ink above 1 is 1.

    Of 8,000 images: total variance 17.0 (published about 16 to 18), 6.2 of it outside 18 principal
    components (published 5.90).
    """
    points = rng.uniform(MARGIN, SIDE - 1 - MARGIN, (n, 3, 2))
    points = np.take_along_axis(points, points[..., :1].argsort(1), 1)
    fine = points[:, :1, 0] + (points[:, 2:, 0] - points[:, :1, 0]) * np.linspace(0, 1, 400)
    height = natural_spline(points, fine).clip(0, SIDE - 1)
    length = np.pad(np.hypot(np.diff(fine), np.diff(height)).cumsum(1), ((0, 0), (1, 0)))
    even = np.linspace(0, 1, POINTS)
    x, y = (
        np.stack(
            [
                np.interp(even * along[-1], along, line)
                for along, line in zip(length, lines, strict=True)
            ]
        )
        for lines in (fine, height)
    )
    column, row = (np.minimum(np.floor(v).astype(int), SIDE - 2) for v in (x, y))
    right, down = x - column, y - row
    image, which = np.zeros((n, SIDE, SIDE)), np.arange(n)[:, None]
    for below, beside in ((0, 0), (0, 1), (1, 0), (1, 1)):
        share = (down if below else 1 - down) * (right if beside else 1 - right)
        np.add.at(image, (which, row + below, column + beside), INK * share)
    a = SPREAD
    kernel = (1 + a) * np.array(
        [[a / 12, a / 6, a / 12], [a / 6, 1 - a, a / 6], [a / 12, a / 6, a / 12]]
    )
    image = convolve(image, kernel[None], mode="constant")
    return quantised(255 * image.clip(0, 1))


def curves(seed: int = 0, train: int = 20_000, test: int = 10_000) -> tuple[Dataset, Dataset]:
    """Load CURVES, regenerated from `seed` and kept in the cache folder; targets are the inputs."""

    def make() -> NDArray[np.uint8]:
        rng = np.random.default_rng(seed)
        sizes = [1000] * ((train + test) // 1000) + [(train + test) % 1000]
        return np.concatenate([draw_curves(n, rng) for n in sizes if n])

    images = torch.from_numpy(cached(f"curves-{RECIPE}-{train + test}-seed-{seed}", make)).flatten(
        1
    )
    description = (
        f"CURVES, regenerated (seed {seed}), not the original file: 28×28 in [0, 1], flattened;"
        " targets are the inputs"
    )

    def part(chosen: slice) -> Dataset:
        x = images[chosen].float().div_(255)
        return Dataset("curves", x, x, description)

    return part(slice(train)), part(slice(train, None))


def olivetti(path: Path) -> UInt8[NDArray[np.uint8], "400 64 64"]:
    """Read the Olivetti faces, ten images a person one after another.

    Raises CurvlabError for a file that does not hold them.
    """
    try:
        faces = loadmat(path)["faces"]
    except Exception as error:  # scipy names no class of its own for damaged files
        raise CurvlabError(
            f"data file {path} cannot be read as the Olivetti faces ({error}): get it again"
        ) from error
    if faces.shape != (4096, 400) or faces.dtype != np.uint8:
        raise CurvlabError(
            f"data file {path} holds faces of shape {faces.shape}, not (4096, 400) bytes: get it"
            " again"
        )
    return np.ascontiguousarray(faces.T.reshape(400, 64, 64).transpose(0, 2, 1))


def turned_patches(
    image: UInt8[NDArray[np.uint8], "H W"],
    angles: Float[NDArray[np.float64], " n"],
    enlargements: Float[NDArray[np.float64], " n"],
) -> UInt8[NDArray[np.uint8], "n S S"]:
    """Return centred patches of the image turned by `angles` (radians) and enlarged.

    They are sampled every 2.25 pixels, bilinearly.
    """
    offset = (np.arange(PATCH) - PATCH // 2) * STEP
    down, right = np.meshgrid(offset, offset, indexing="ij")
    cos, sin, scale = (v[:, None, None] for v in (np.cos(angles), np.sin(angles), enlargements))
    y = (image.shape[0] - 1) / 2 + (down * cos - right * sin) / scale
    x = (image.shape[1] - 1) / 2 + (down * sin + right * cos) / scale
    row, column = np.floor(y).astype(int), np.floor(x).astype(int)
    v, u = y - row, x - column
    upper = image[row, column] * (1 - u) + image[row, column + 1] * u
    lower = image[row + 1, column] * (1 - u) + image[row + 1, column + 1] * u
    return quantised(upper * (1 - v) + lower * v)


def faces(seed: int = 0) -> tuple[Dataset, Dataset]:
    """Load FACES, regenerated from the Olivetti faces and kept in the cache folder.

    Rotations of ±90° and enlargements of 1.4 to 1.8 are drawn from `seed`; targets are the inputs.

    Training examples are those of people 1 to 25; test examples of people 31 to 40, as with Hinton
    and Salakhutdinov, who keep people 26 to 30 for validation (thesis Table 2.3 counts these 20,700
    among the test examples: 62,100). Each pixel is shifted to mean 0 and everything is divided by
    one number, so that a pixel's average variance is 1: over the whole set of 165,600.

    The error of 30 principal components of the training examples on the test examples is 136.0
    (published 135).
    """

    def make() -> NDArray[np.uint8]:
        rng = np.random.default_rng(seed)
        sources = olivetti(file("olivettifaces.mat"))
        angles = rng.uniform(-np.pi / 2, np.pi / 2, (len(sources), PATCHES))
        enlargements = rng.uniform(1.4, 1.8, (len(sources), PATCHES))
        return np.concatenate(
            [turned_patches(*each) for each in zip(sources, angles, enlargements, strict=True)]
        )

    images = torch.from_numpy(cached(f"faces-{RECIPE}-seed-{seed}", make)).flatten(1)
    person = len(images) // 40
    mean, square = torch.zeros(2, images.shape[1], dtype=torch.float64, device="cpu")
    for chunk in images.reshape(40, person, -1):
        mean += chunk.double().sum(0) / len(images)
        square += chunk.double().square().sum(0) / len(images)
    scale = (square - mean.square()).mean().sqrt()
    description = (
        f"FACES, regenerated (seed {seed}) from the Olivetti faces, not the original file: 25×25,"
        " pixels at mean 0, average variance 1, flattened; targets are the inputs"
    )

    def part(people: slice) -> Dataset:
        x = (
            images[people.start * person : people.stop * person]
            .float()
            .sub_(mean.float())
            .div_(scale.float())
        )
        return Dataset("faces", x, x, description)

    return part(slice(0, 25)), part(slice(30, 40))
