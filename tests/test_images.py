"""CIFAR from every form that it is kept in; pickles that are not data; crops and flips."""

from __future__ import annotations

import hashlib
import io
import pickle
import struct
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from optional import load_or_skip

import curvlab as cl
from curvlab.datasets import FILES, CropAndFlip, File
from curvlab.datasets.images import unpickled


def python2_pickle(data: NDArray[np.uint8], labels: list[int], key: str = "labels") -> bytes:
    """A CIFAR batch as Python 2 wrote it, opcode by opcode: str keys, an array rebuilt by
    numpy.core.multiarray.
    """

    def text(s: str) -> bytes:
        return b"U" + bytes([len(s)]) + s.encode()

    def number(i: int) -> bytes:
        return b"J" + struct.pack("<i", i)

    dtype = (
        b"cnumpy\ndtype\n"
        + text("u1")
        + b"K\x00K\x01\x87R"
        + b"(K\x03"
        + text("|")
        + b"NNN"
        + number(-1) * 2
        + b"K\x00tb"
    )
    content = data.tobytes()
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
        + b"(K\x01" + number(data.shape[0]) + number(data.shape[1]) + b"\x86" + dtype + b"\x89"
        + b"T" + struct.pack("<i", len(content)) + content + b"tb"
    )  # fmt: skip
    numbers = b"](" + b"".join(map(number, labels)) + b"e"
    return (
        b"\x80\x02}("
        + text("data")
        + array
        + text(key)
        + numbers
        + text("batch_label")
        + text("one of 5")
        + b"u."
    )


Images = tuple[NDArray[np.uint8], NDArray[np.int64]]


@pytest.fixture
def images() -> Images:
    """Sixty images in the order of five training batches and one test batch, and labels."""
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (60, 3, 32, 32)).astype(np.uint8), np.arange(60) % 10


def pickles(images: tuple[NDArray[np.uint8], NDArray[np.int64]]) -> dict[str, bytes]:
    x, y = images
    names = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    return {
        name: python2_pickle(
            x[10 * i : 10 * i + 10].reshape(10, -1), y[10 * i : 10 * i + 10].tolist()
        )
        for i, name in enumerate(names)
    }


@pytest.fixture(params=["npz", "npz, channels last", "pickles", "archive"])
def kept(
    request: pytest.FixtureRequest, images: Images, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CURVLAB_DATA with the small CIFAR-10 in one of its forms."""
    keep(request.param, images, tmp_path, monkeypatch)


def keep(form: str, images: Images, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CURVLAB_DATA", str(tmp_path))
    x, y = images
    if form.startswith("npz"):
        stored = x.transpose(0, 2, 3, 1) if "last" in form else x
        labels = y.astype(np.uint8)[:, None] if "last" in form else y
        np.savez(
            tmp_path / "cifar10.npz",
            x_train=stored[:50],
            y_train=labels[:50],
            x_test=stored[50:],
            y_test=labels[50:],
        )
    elif form == "pickles":
        (tmp_path / "cifar-10-batches-py").mkdir()
        for name, content in pickles(images).items():
            (tmp_path / "cifar-10-batches-py" / name).write_bytes(content)
            monkeypatch.setitem(
                FILES, f"cifar-10-batches-py/{name}", File((hashlib.md5(content).hexdigest(),))
            )
    else:
        with tarfile.open(tmp_path / "cifar-10-python.tar.gz", "w:gz") as archive:
            for name, content in reversed(
                ({"readme.html": b"not a pickle"} | pickles(images)).items()
            ):
                info = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
        content = (tmp_path / "cifar-10-python.tar.gz").read_bytes()
        monkeypatch.setitem(
            FILES, "cifar-10-python.tar.gz", File((hashlib.sha256(content).hexdigest(),))
        )


@pytest.mark.usefixtures("kept")
def test_cifar_is_the_same_from_every_form(images: Images) -> None:
    x, y = images
    train, test = cl.datasets.load("cifar10")
    assert train.y.tolist() == y[:50].tolist()
    assert test.y.tolist() == y[50:].tolist()
    scaled = x[:50] / 255
    mean, deviation = scaled.mean((0, 2, 3), keepdims=True), scaled.std((0, 2, 3), keepdims=True)
    np.testing.assert_allclose(train.x[:], (scaled - mean) / deviation, atol=1e-5)
    np.testing.assert_allclose(test.x[:], (x[50:] / 255 - mean) / deviation, atol=1e-5)
    assert test.augment is None
    black = CropAndFlip(4, tuple((-mean / deviation).flatten().tolist()))
    assert isinstance(train.augment, CropAndFlip)
    assert train.augment.padding == 4
    assert train.augment.fill == pytest.approx(black.fill, rel=1e-5)


@pytest.mark.usefixtures("kept")
def test_flattened_cifar_is_standardised_by_pixel() -> None:
    train, test = cl.datasets.load("cifar10-standard")
    assert train.inputs == test.inputs == (3072,)
    assert train.augment is None
    assert train.x[:].mean(0).abs().max() < 1e-5


def test_cifar100_takes_the_fine_labels(
    images: Images, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, _ = images
    (tmp_path / "cifar-100-python").mkdir()
    monkeypatch.setenv("CURVLAB_DATA", str(tmp_path))
    for name in ("train", "test"):
        content = python2_pickle(x.reshape(60, -1), [99, *range(59)], "fine_labels")
        (tmp_path / "cifar-100-python" / name).write_bytes(content)
        monkeypatch.setitem(FILES, f"cifar-100-python/{name}", File())
    train, _ = cl.datasets.load("cifar100")
    assert train.y[:3].tolist() == [99, 0, 1]
    assert train.outputs == 100


def test_a_damaged_batch_is_named(
    images: Images, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep("pickles", images, tmp_path, monkeypatch)
    path = tmp_path / "cifar-10-batches-py" / "data_batch_3"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(cl.CurvlabError, match=r"data_batch_3 is damaged \(MD5 .*get it again"):
        cl.datasets.load("cifar10")
    path.unlink()
    with pytest.raises(cl.CurvlabError, match=r"data_batch_3 was not found"):
        cl.datasets.load("cifar10")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda d: d.pop("y_test"), "it must hold arrays x_train, y_train, x_test, y_test"),
        (lambda d: d.update(y_train=d["y_train"] + 5), "are not 50 numbers from 0 to 9"),
        (lambda d: d.update(y_train=d["y_train"][:9]), "are not 50 numbers from 0 to 9"),
        (
            lambda d: d.update(x_train=d["x_train"] / 255.0),
            r"float64 of shape .*: bytes of shape \[N, 3, 32, 32\]",
        ),
        (lambda d: d.update(x_test=d["x_test"][:, :1]), r"uint8 of shape \(10, 1, 32, 32\)"),
        (lambda d: d.update(y_test=np.array([object()] * 10)), "cannot be read"),
    ],
)
def test_an_npz_that_is_not_cifar_is_refused(
    change: Callable[[dict[str, Any]], object],
    says: str,
    images: Images,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x, y = images
    arrays: dict[str, Any] = {
        "x_train": x[:50],
        "y_train": y[:50],
        "x_test": x[50:],
        "y_test": y[50:],
    }
    change(arrays)
    np.savez(tmp_path / "cifar10.npz", **arrays)
    monkeypatch.setenv("CURVLAB_DATA", str(tmp_path))
    with pytest.raises(cl.CurvlabError, match=says):
        cl.datasets.load("cifar10")


def test_pickles_of_python_3_are_read_too(images: Images) -> None:
    x, y = images
    for protocol in (2, 4):
        found = unpickled(
            pickle.dumps({b"data": x.reshape(60, -1), b"labels": y.tolist()}, protocol), "here"
        )
        assert (found[b"data"] == x.reshape(60, -1)).all()


class _Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return exec, ("raise SystemExit('a pickle ran code')",)


@pytest.mark.parametrize(
    "content",
    [
        pickle.dumps(_Evil()),
        pickle.dumps({b"data": _Evil()}, 2),
        b"cos\nsystem\n(S'true'\ntR.",
        b"cnumpy\nsave\n.",
        pickle.dumps([1, 2]),
        pickle.dumps({b"labels": []}),
        pickle.dumps({b"data": 1}),
        b"",
        b"\x80\x02}(U\x04data",
    ],
)
def test_pickles_that_are_not_data_are_refused(content: bytes) -> None:
    with pytest.raises(cl.CurvlabError, match="data file here is no CIFAR pickle"):
        unpickled(content, "here")


def test_the_subset_is_cifar() -> None:
    train, test = load_or_skip("cifar10-subset")
    assert train.y[:10].tolist() == [
        6,
        9,
        9,
        4,
        1,
        1,
        2,
        7,
        8,
        3,
    ]  # frog, truck, truck, deer, automobile …
    assert test.y[:5].tolist() == [3, 8, 8, 0, 6]
    variance, mean = torch.var_mean(train.x[:].transpose(0, 1).flatten(1), 1)
    assert mean.abs().max() < 1e-4
    assert (variance - 1).abs().max() < 1e-4
    x, _ = next(iter(train.batches(64, seed=1)))
    plain, _ = next(iter(train.batches(64, seed=1, augment=False)))
    assert x.shape == plain.shape
    assert not torch.equal(x, plain)


def test_crop_and_flip_by_hand() -> None:
    """A second route, image by image: pad, cut, mirror, with the same draws."""
    x = torch.rand(40, 3, 9, 7, generator=torch.Generator().manual_seed(0)) + 1
    fill = (-1.0, -2.0, -3.0)
    found = CropAndFlip(3, fill)(x, torch.Generator().manual_seed(5))
    draws = torch.Generator().manual_seed(5)
    top, left = torch.randint(0, 7, (2, 40, 1), generator=draws)
    mirrored = torch.rand(40, 1, generator=draws) < 0.5
    for i, image in enumerate(x.numpy()):
        framed = np.stack(
            [np.pad(c, 3, constant_values=f) for c, f in zip(image, fill, strict=True)]
        )
        cut = framed[:, int(top[i]) : int(top[i]) + 9, int(left[i]) : int(left[i]) + 7]
        np.testing.assert_array_equal(found[i], cut[:, :, ::-1] if mirrored[i] else cut)


def test_every_crop_and_both_directions_occur_equally_often() -> None:
    x = torch.arange(1.0, 26).reshape(1, 1, 5, 5).expand(20_000, 1, 5, 5)
    found = CropAndFlip(1)(x, torch.Generator().manual_seed(0))
    kinds, counts = found.flatten(1).unique(dim=0, return_counts=True)
    assert len(kinds) == 2 * 3 * 3
    assert (counts / 20_000 - 1 / 18).abs().max() < 5 * (1 / 18 / 20_000) ** 0.5
    assert torch.equal(CropAndFlip(0)(x[:1], torch.Generator().manual_seed(1)).sum(), x[:1].sum())


def test_crop_and_flip_follow_the_generator_alone() -> None:
    x = torch.rand(8, 3, 6, 6, dtype=torch.float64)
    before = torch.get_rng_state()
    one, same, other = (
        CropAndFlip(2)(x, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    )
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert one.dtype == x.dtype
