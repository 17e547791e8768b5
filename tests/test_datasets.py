"""Data sets: every one of the table, the real MNIST, minibatches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import scipy.sparse
import torch
from optional import load_or_skip
from torch import Tensor

import curvlab as cl
from curvlab.datasets import DATASETS, DataEntry, Dataset, SparseRows

KINDS = {  # {name: (train, test, inputs, outputs)}
    "mnist": (60_000, 10_000, (784,), 10),
    "mnist16": (60_000, 10_000, (256,), 10),
    "mnist-ae": (60_000, 10_000, (784,), 784),
    "mnist-standard": (60_000, 10_000, (784,), 10),
    "curves": (20_000, 10_000, (784,), 784),
    "faces": (103_500, 41_400, (625,), 625),
    "cifar10": (50_000, 10_000, (3, 32, 32), 10),
    "cifar100": (50_000, 10_000, (3, 32, 32), 100),
    "cifar10-subset": (8_068, 1_017, (3, 32, 32), 10),
    "cifar10-standard": (50_000, 10_000, (3072,), 10),
    "cifar10-subset-standard": (8_068, 1_017, (3072,), 10),
    "a9a": (32_561, 16_281, (123,), 1),
    "a9a-standard": (32_561, 16_281, (123,), 1),
    "w8a": (49_749, 0, (300,), 1),
    "news20": (15_935, 0, (62_061,), 1),
    "webspam": (300_000, 50_000, (254,), 1),
    "shakespeare": (11_224, 1_247, (64,), 62),
    "shakespeare32": (22_449, 2_494, (32,), 62),
    "copying": (4_096, 1_024, (16,), 9),
    "addition": (4_704, 4_705, (3,), 98),
}
SYMBOLIC = ("shakespeare", "shakespeare32", "copying", "addition")


def test_the_table_here_is_complete() -> None:
    assert set(KINDS) == set(DATASETS)


@pytest.mark.parametrize("name", DATASETS)
def test_every_data_set_loads_in_shape_with_its_targets(name: str) -> None:
    parts = load_or_skip(name)
    train, tested, inputs, outputs = KINDS[name]
    for part, size in zip(parts, (train, tested), strict=True):
        assert part.name == name
        assert len(part.x) == len(part.y) == len(part) == size
        assert part.inputs == inputs
        assert part.x.dtype == (torch.int64 if name in SYMBOLIC else torch.float32)
        assert part.symbolic == (name in SYMBOLIC)
        if not part.y.is_floating_point() and size:
            assert part.outputs == outputs
            assert part.y.dtype == torch.int64
            if name not in SYMBOLIC:
                assert set(part.y.unique().tolist()) == set(range(outputs))
    x, y = next(iter(parts[0].batches(10, seed=1)))
    assert isinstance(x, Tensor)
    assert x.shape == (10, *inputs)
    assert torch.isfinite(x).all()
    if "targets are the inputs" in parts[0].description:
        assert parts[0].y is parts[0].x
        assert torch.equal(x, y)
    elif outputs == 1:
        assert set(parts[0].y.unique().tolist()) == {0.0, 1.0}
        assert y.shape == (10, 1)


@pytest.mark.parametrize("name", ["mnist", "mnist16", "mnist-ae", "curves"])
def test_intensities_are_in_zero_to_one(name: str) -> None:
    for part in load_or_skip(name):
        assert part.x[:].min() == 0
        assert 0.99 < part.x[:].max() <= 1


@pytest.mark.parametrize("name", ["mnist-standard", "cifar10-subset-standard", "cifar10-standard"])
def test_standardised_features_have_mean_zero_and_variance_one_or_never_vary(name: str) -> None:
    x = load_or_skip(name)[0].x[:].double()
    variance, mean = torch.var_mean(x, 0, correction=0)
    assert mean.abs().max() < 1e-4
    varying = variance > 0
    assert (variance[varying] - 1).abs().max() < 1e-4
    assert int((~varying).sum()) == (67 if name == "mnist-standard" else 0)


def test_mnist_is_mnist() -> None:
    train, test = cl.datasets.load("mnist")
    assert train.y[:10].tolist() == [5, 0, 4, 1, 9, 2, 1, 3, 1, 4]
    assert test.y[:5].tolist() == [7, 2, 1, 0, 4]
    # the published mean and standard deviation
    assert abs(train.x[:].mean().item() - 0.1307) < 1e-4
    assert abs(train.x[:].std().item() - 0.3081) < 1e-4


def test_mnist16_is_the_mean_of_two_by_two_pixels_in_a_frame() -> None:
    big, small = (
        cl.datasets.load("mnist")[1].x[:50].numpy(),
        cl.datasets.load("mnist16")[1].x[:50].numpy(),
    )
    framed = np.pad(big.reshape(-1, 28, 28), ((0, 0), (2, 2), (2, 2)))
    expected = framed.reshape(-1, 16, 2, 16, 2).mean((2, 4)).reshape(-1, 256)
    np.testing.assert_allclose(small, expected, atol=1e-6)
    assert (cl.datasets.load("mnist16")[0].x[:] != 0).any(0).sum() == 188


def test_unknown_data_set_names_the_closest() -> None:
    with pytest.raises(cl.CurvlabError, match="unknown data set 'minst'; did you mean 'mnist'"):
        cl.datasets.load("minst")


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


def test_a_part_of_no_examples_has_no_batches(ten: Dataset) -> None:
    empty = replace(ten, x=ten.x[:0], y=ten.y[:0])
    empty.check()
    with pytest.raises(cl.CurvlabError, match="has 0 examples"):
        empty.batches(1)


def _noisy(x: Tensor, generator: torch.Generator) -> Tensor:
    return x + torch.rand(x.shape, generator=generator)


def test_augmentation_is_new_in_every_batch_and_epoch_and_the_same_again(ten: Dataset) -> None:
    noisy = replace(ten, augment=_noisy)
    before = torch.get_rng_state()
    one, same, other = (
        [x - y[:, None] for x, y in noisy.batches(5, 2, seed)] for seed in (3, 3, 4)
    )
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(one, same, strict=True))
    noise = torch.cat([*one, *other]).flatten()
    assert len(noise.unique()) == len(noise)
    assert noise.min() > 0
    # the order is that of the data without augmentation
    plain = torch.cat([y for _, y in ten.batches(5, 2, 3)])
    assert torch.equal(plain, torch.cat([y for _, y in noisy.batches(5, 2, 3)]))
    assert all(torch.equal(x[:, 0], y.float()) for x, y in noisy.batches(5, 2, 3, augment=False))


def test_an_autoencoder_is_to_give_back_the_image_without_the_augmentation() -> None:
    x = torch.arange(10.0)[:, None]
    for changed, y in Dataset("ae", x, x, "", _noisy).batches(5):
        assert ((changed - y) > 0).all()
        assert (y == y.round()).all()


def test_sparse_rows_come_out_as_the_dense_rows() -> None:
    dense = torch.rand(30, 7, generator=torch.Generator().manual_seed(0)) * (
        torch.arange(7) % 3 == 0
    )
    rows = SparseRows(scipy.sparse.csr_matrix(dense.numpy()))
    data, full = (Dataset("sparse", x, torch.arange(30), "") for x in (rows, dense))
    assert (rows.shape, rows.ndim, rows.dtype, len(rows)) == (dense.shape, 2, dense.dtype, 30)
    assert data.inputs == (7,)
    assert torch.equal(rows[3:9], dense[3:9])
    for (x, y), (x2, y2) in zip(data.batches(8, 2, 5), full.batches(8, 2, 5), strict=True):
        assert torch.equal(x, x2)
        assert torch.equal(y, y2)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            lambda d: replace(d, x=torch.where(d.x == 3, torch.nan, d.x)),
            r"inputs contain NaN or Inf \(first in example 3\)",
        ),
        (
            lambda d: replace(d, y=torch.where(d.y == 4, torch.inf, d.y.float())),
            r"targets contain NaN .* example 4",
        ),
        (lambda d: replace(d, y=d.y - 2), "has the label -2"),
        (lambda d: replace(d, y=d.y[:7]), "has 10 inputs but 7 targets"),
        (
            lambda d: replace(
                d, x=SparseRows(scipy.sparse.csr_matrix(np.diag([*range(1, 10), np.nan])))
            ),
            "inputs contain NaN",
        ),
    ],
)
def test_what_cannot_be_right_is_refused_at_load(
    ten: Dataset, change: Callable[[Dataset], Dataset], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(DATASETS, "bad", DataEntry("bad", lambda: (ten, change(ten))))
    with pytest.raises(cl.CurvlabError, match=f"data set 'ten'.*{says}"):
        cl.datasets.load("bad")


def test_labels_may_say_that_there_is_none(ten: Dataset) -> None:
    replace(ten, y=torch.where(ten.y == 3, -100, ten.y)).check()
    with pytest.raises(cl.CurvlabError, match=r"has the label -2: .* or -100 where there is none"):
        replace(ten, y=torch.where(ten.y == 3, -2, torch.where(ten.y == 4, -100, ten.y))).check()


def test_large_numbers_are_not_taken_for_infinite(ten: Dataset) -> None:
    replace(ten, x=torch.full((10, 2), 3e38)).check()


def test_a_data_set_is_kept_for_the_next_point_while_nothing_writes_into_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Not outside, not another's, not what was written to or entered anew, and one at most."""
    monkeypatch.setattr(cl.datasets, "_kept", {})
    first = cl.datasets.load("copying")
    with cl.datasets.keeping():
        kept = cl.datasets.load("copying")
        assert kept is not first
        assert cl.datasets.load("copying") is kept
    assert cl.datasets.load("copying") is not kept
    with cl.datasets.keeping():
        assert cl.datasets.load("copying") is kept
        kept[0].x[3:5].add_(1)  # a view, as a model's function may get
        fresh = cl.datasets.load("copying")
        assert torch.equal(fresh[0].x[:], first[0].x[:])
        entry = DATASETS["copying"]
        monkeypatch.setitem(DATASETS, "copying", replace(entry))
        again = cl.datasets.load("copying")
        assert again is not fresh
        cl.datasets.load("addition")
        assert list(cl.datasets._kept) == ["addition"]
        other = DataEntry("another's", lambda: first)
        monkeypatch.setitem(DATASETS, "others", other)
        cl.datasets.load("others")
        assert not cl.datasets._kept
    assert not cl.datasets._keeps
