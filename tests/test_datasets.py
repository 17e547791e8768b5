"""Data sets: the real MNIST, checksums, minibatches."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import curvlab as cl
from curvlab import datasets
from curvlab.datasets import DATASETS, Dataset


@pytest.mark.parametrize("name", DATASETS)
def test_every_data_set_loads_in_range_with_labels(name: str) -> None:
    for part, size in zip(cl.datasets.load(name), (60_000, 10_000), strict=True):
        assert len(part.x) == len(part.y) == len(part) == size
        assert part.x.min() == 0
        assert 0.99 < part.x.max() <= 1
        assert set(part.y.unique().tolist()) == set(range(10))


def test_mnist_is_mnist() -> None:
    train, test = cl.datasets.load("mnist")
    assert train.y[:10].tolist() == [5, 0, 4, 1, 9, 2, 1, 3, 1, 4]
    assert test.y[:5].tolist() == [7, 2, 1, 0, 4]
    assert abs(train.x.mean().item() - 0.1307) < 1e-4  # the published mean and standard deviation
    assert abs(train.x.std().item() - 0.3081) < 1e-4


def test_mnist16_is_the_mean_of_two_by_two_pixels_in_a_frame() -> None:
    big, small = cl.datasets.load("mnist")[1].x[:50].numpy(), cl.datasets.load("mnist16")[1].x[:50].numpy()
    framed = np.pad(big.reshape(-1, 28, 28), ((0, 0), (2, 2), (2, 2)))
    expected = framed.reshape(-1, 16, 2, 16, 2).mean((2, 4)).reshape(-1, 256)
    np.testing.assert_allclose(small, expected, atol=1e-6)
    assert (cl.datasets.load("mnist16")[0].x != 0).any(0).sum() == 188


def test_unknown_data_set_names_the_closest() -> None:
    with pytest.raises(cl.CurvlabError, match="unknown data set 'minst'; did you mean 'mnist'"):
        cl.datasets.load("minst")


def test_damaged_file_is_named_with_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = datasets.file("mnist.npz").read_bytes()
    (tmp_path / "mnist.npz").write_bytes(good[:5000] + b"x" + good[5001:])
    monkeypatch.setenv("CURVLAB_DATA", str(tmp_path))
    with pytest.raises(cl.CurvlabError, match=r"mnist\.npz is damaged .* reinstall"):
        cl.datasets.load("mnist16")
    (tmp_path / "mnist.npz").write_bytes(good)
    assert datasets.file("mnist.npz") == tmp_path / "mnist.npz"


def test_missing_file_says_where_it_was_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(datasets.FILES, "absent.npz", "0" * 64)
    monkeypatch.setenv("CURVLAB_DATA", str(tmp_path))
    with pytest.raises(cl.CurvlabError, match=f"absent.npz was not found in {tmp_path}"):
        datasets.file("absent.npz")


@pytest.fixture
def ten() -> Dataset:
    return Dataset("ten", torch.arange(10.0)[:, None], torch.arange(10), "ten numbers")


def test_batches_cover_an_epoch_once_and_pairs_stay_together(ten: Dataset) -> None:
    batches = list(ten.batches(5, epochs=2, seed=1))
    assert len(batches) == len(ten.batches(5, epochs=2)) == 4
    assert all((x[:, 0] == y).all() for x, y in batches)
    epochs = [torch.cat([y for _, y in batches[i : i + 2]]).tolist() for i in (0, 2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(10))
    assert epochs[0] != epochs[1]


def test_batches_are_the_same_each_time_and_differ_by_seed(ten: Dataset) -> None:
    def order(seed: int) -> list[int]:
        return torch.cat([y for _, y in ten.batches(3, epochs=3, seed=seed)]).tolist()

    assert order(0) == order(0)
    assert order(0) != order(1)
    assert len(order(0)) == 27  # nine of ten in each epoch
    again = ten.batches(5, epochs=3, seed=2)
    assert torch.equal(next(iter(again))[1], next(iter(again.one_pass()))[1])
    assert len(again.one_pass()) == 2


@pytest.mark.parametrize(("size", "epochs"), [(0, 1), (11, 1), (5, 0)])
def test_batches_that_do_not_fit_are_refused(ten: Dataset, size: int, epochs: int) -> None:
    with pytest.raises(cl.CurvlabError, match=r"batch size|epochs"):
        ten.batches(size, epochs)
