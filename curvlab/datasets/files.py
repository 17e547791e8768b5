"""Files of data: where they are, whether they are whole, and what is kept of what was made.

A file is looked for in the folder that the environment variable CURVLAB_DATA names, beside the
installed package and in the checkout's `data/`; one with an address is then downloaded, once, to
the cache folder (CURVLAB_CACHE, or the user's own). Every file with a known checksum is verified
before it is read.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import NamedTemporaryFile

import numpy as np
from numpy.typing import NDArray

from curvlab.errors import CurvlabError, CurvlabWarning, cause_of
from curvlab.system.paths import expanded


@dataclass(frozen=True)
class File:
    """Data file: its known checksums, and its address.

    Checksums are SHA-256, or MD5 where that is what is published. `url` gives the copy of the first
    checksum. Without a checksum a file is checked by what it holds when it is read.
    """

    sums: tuple[str, ...] = ()
    url: str | None = None


_LIBSVM = "https://www.csie.ntu.edu.tw/~cjlin/libsvmtools/datasets/binary/"
_CIFAR = "https://www.cs.toronto.edu/~kriz/"

FILES: dict[str, File] = {
    "mnist.npz": File(("0bcdb57e889f1cebdb210edba449f5350a1f2078158b6257e613f4075c6712ff",)),
    "shakespeare.txt.xz": File(
        ("e80e379402cee15ebbac726ff43b784da0610a74b16f15a081da78c3ad309958",)
    ),
    "olivettifaces.mat": File(
        # the copy that scikit-learn names
        (
            "b612fb967f2dc77c9c62d3e1266e0c73d5fca46a4b8906c18e454d41af987794",
            # the same faces, saved again
            "b1988d02c72fe5b8ee82b5ef3bb7982eafc74f1e1ff0ae0ade35061ad0af534d",
        ),
        "https://ndownloader.figshare.com/files/5976027",
    ),
    "cifar-10-python.tar.gz": File(
        ("6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce",),
        _CIFAR + "cifar-10-python.tar.gz",
    ),
    "cifar-10-batches-py/data_batch_1": File(("c99cafc152244af753f735de768cd75f",)),
    "cifar-10-batches-py/data_batch_2": File(("d4bba439e000b95fd0a9bffe97cbabec",)),
    "cifar-10-batches-py/data_batch_3": File(("54ebc095f3ab1f0389bbae665268c751",)),
    "cifar-10-batches-py/data_batch_4": File(("634d18415352ddfa80567beed471001a",)),
    "cifar-10-batches-py/data_batch_5": File(("482c414d41f54cd18b22e5b47cb7c3cb",)),
    "cifar-10-batches-py/test_batch": File(("40351d587109b95175f43aff81a1287e",)),
    "cifar-100-python.tar.gz": File(
        ("85cd44d02ba6437773c5bbd22e183051d648de2e7d6b014e1ef29b855ba677a7",),
        _CIFAR + "cifar-100-python.tar.gz",
    ),
    "cifar-100-python/train": File(("16019d7e3df5f24257cddd939b257f8d",)),
    "cifar-100-python/test": File(("f0ef6b0ae62326f3e7ffdfab6717acfc",)),
    "cifar10_subset.npz": File(
        ("47592817d3e00343c7826dd2849e8bbe017c9c438d27d140c92bc19921a8b41e",)
    ),
    "a9a": File(
        ("35b6bafa772838b1eb3000a6550ff48505ad79aaa381cfd28960e68679f4453b",), _LIBSVM + "a9a"
    ),
    "a9a.t": File(
        ("1f448a153f0320399a7e40836eb207655b0bde0f21fc941cc472193daa9f5de9",), _LIBSVM + "a9a.t"
    ),
    "w8a": File(
        ("b464b4f6ce6a5d9e181ffc793e19a04751036273722312398ef7673705014902",), _LIBSVM + "w8a"
    ),
    "news20.npz": File(("eb08db0450b7b7a5d82bcf3880bc48707bac57239aaaefed003bfdfb92ddedba",)),
    "webspam_wc_normalized_unigram.svm": File(),
}
"""{file: checksums and address}; origin and licence of each are in data/README.md."""

PACKAGED = ("mnist.npz", "shakespeare.txt.xz")
"""Files that come with the package."""


def folders() -> list[Path]:
    """Return the folders where files are looked for, the user's first."""
    here = Path(__file__).resolve().parents[1]
    chosen = os.environ.get("CURVLAB_DATA")
    return [
        *([expanded(chosen, "CURVLAB_DATA")] if chosen else []),
        here / "_data",
        here.parent / "data",
    ]


def cache() -> Path:
    """Return the folder where downloads and regenerated data sets are kept."""
    import pooch

    chosen = os.environ.get("CURVLAB_CACHE")
    return expanded(chosen, "CURVLAB_CACHE") if chosen else Path(pooch.os_cache("curvlab"))


def find_file(name: str) -> Path | None:
    """Return the path of a file in the first folder that has it, unverified; else None."""
    return next((path for path in (folder / name for folder in folders()) if path.is_file()), None)


def file(name: str) -> Path:
    """Return the path of a data file whose checksum is right.

    It is downloaded where it is in no folder and has an address.

    Raises:
        CurvlabError: the file is missing or damaged; the message says where it was looked for and
            the remedy.
    """
    known = FILES[name]
    path = find_file(name)
    if path is not None:
        if known.sums:
            verify(path, name, known.sums)
        return path
    where = f"data file {name} was not found in {', '.join(map(str, folders()))}"
    if known.url is not None:
        return _download(name, known, where)
    raise CurvlabError(
        f"{where}: "
        + (
            "reinstall curvlab or set CURVLAB_DATA"
            if name in PACKAGED
            else "set CURVLAB_DATA to the folder that has it (data/README.md)"
        )
    )


def verify(path: Path, name: str, sums: tuple[str, ...]) -> None:
    """Raise CurvlabError where a file cannot be read, or has none of these checksums."""
    algorithm, said = ("sha256", "SHA-256") if len(sums[0]) == 64 else ("md5", "MD5")
    try:
        with path.open("rb") as stream:
            found = hashlib.file_digest(stream, algorithm).hexdigest()
    except OSError as error:
        raise CurvlabError(f"data file {path} cannot be read: {cause_of(error)}") from error
    if found not in sums:
        remedy = (
            "reinstall curvlab, or in a checkout run: git checkout -- data"
            if name in PACKAGED
            else "get it again"
        )
        raise CurvlabError(
            f"data file {path} is damaged ({said} {found[:12]}…, expected"
            f" {' or '.join(s[:12] for s in sums)}…): {remedy}"
        )


class _Announce:
    """Progress bar that says once, when the answer has begun, that something is downloaded."""

    def __init__(self, name: str, url: str) -> None:
        self.name, self.url, self._total = name, url, 0

    @property
    def total(self) -> int:
        return self._total

    @total.setter
    def total(self, size: int) -> None:
        self._total = size
        print(
            f"curvlab: downloading {self.name} ({size / 1e6:.1f} MB) from {self.url} to {cache()}",
            file=sys.stderr,
        )

    def update(self, amount: int) -> None: ...
    def reset(self) -> None: ...
    def close(self) -> None: ...


def _download(name: str, known: File, where: str) -> Path:
    """Download a file to the cache folder, whole and verified, and return its path.

    A copy that is there and right is taken.
    """
    import pooch

    assert known.url is not None
    pooch.get_logger().setLevel(logging.WARNING)
    downloader = pooch.HTTPDownloader(timeout=30, progressbar=_Announce(name, known.url))
    try:
        return Path(pooch.retrieve(known.url, known.sums[0], name, cache(), downloader=downloader))
    except (OSError, ValueError) as error:  # no network, no room; another checksum
        what = (
            "what came has another checksum"
            if isinstance(error, ValueError)
            else type(error).__name__
        )
        raise CurvlabError(
            f"{where} and could not be downloaded from {known.url} to {cache()} ({what}): "
            "set CURVLAB_DATA to a folder that has it"
        ) from error


def cached(name: str, make: Callable[[], NDArray[np.uint8]]) -> NDArray[np.uint8]:
    """Return what `make` returns, kept as `name`.npz in the cache folder.

    It is kept with the SHA-256 of its content, and written whole or not at all. A copy that is
    damaged is made again, and one that cannot be written is done without; each is said in a
    warning.
    """
    path = cache() / f"{name}.npz"
    try:
        with np.load(path, allow_pickle=False) as archive:
            images: NDArray[np.uint8] = archive["images"]
            if str(archive["sha256"]) == _digest(images):
                return images
        raise ValueError("another checksum")
    except (FileNotFoundError, NotADirectoryError):
        pass
    except Exception as error:  # a zip file can be damaged in many ways
        warnings.warn(f"{path} is damaged ({error}): made again", CurvlabWarning, stacklevel=2)
    images = make()
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with NamedTemporaryFile(
            dir=path.parent, prefix=f".{name}-", suffix=".npz", delete=False
        ) as stream:
            temporary = Path(stream.name)
            np.savez(stream, images=images, sha256=np.array(_digest(images)))
        os.replace(temporary, path)
    except OSError as error:
        warnings.warn(
            f"{path} cannot be written ({cause_of(error)}), so this data set is made anew every"
            " time: set CURVLAB_CACHE to a folder that can be",
            CurvlabWarning,
            stacklevel=2,
        )
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
    return images


def _digest(images: NDArray[np.uint8]) -> str:
    return hashlib.sha256(
        str((images.shape, images.dtype.str)).encode() + np.ascontiguousarray(images).tobytes()
    ).hexdigest()
