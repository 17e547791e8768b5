"""CURVES and FACES: the recipe by a second route, the published statistics, the seed."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from optional import load_or_skip
from problems import dense
from scipy.interpolate import CubicSpline
from scipy.io import savemat
from scipy.ndimage import map_coordinates

import curvlab as cl
from curvlab.datasets import FILES, File
from curvlab.datasets.regenerated import (
    curves,
    draw_curves,
    faces,
    natural_spline,
    olivetti,
    turned_patches,
)


def outside(components: int, train: NDArray[np.float64], test: NDArray[np.float64]) -> float:
    """Mean squared error of the test examples, outside the first principal components of the
    training examples.
    """
    mean = train.mean(0)
    _, vectors = np.linalg.eigh((train - mean).T @ (train - mean))
    basis, rest = vectors[:, -components:], test - mean
    return float(np.square(rest - rest @ basis @ basis.T).sum(1).mean())


def test_natural_spline_is_scipys() -> None:
    rng = np.random.default_rng(0)
    points = rng.uniform(0, 10, (20, 3, 2))
    points = np.take_along_axis(points, points[..., :1].argsort(1), 1)
    x = np.linspace(points[:, 0, 0], points[:, 2, 0], 50, axis=1)
    expected = [CubicSpline(*p.T, bc_type="natural")(at) for p, at in zip(points, x, strict=True)]
    np.testing.assert_allclose(natural_spline(points, x), expected, rtol=1e-9, atol=1e-9)


def test_curves_have_the_published_variance_and_error() -> None:
    images = draw_curves(3000, np.random.default_rng(5)).reshape(3000, -1) / 255
    assert images.var(0).sum() == pytest.approx(17.0, abs=0.3)  # published: about 16 to 18
    assert outside(18, images, images) == pytest.approx(6.2, abs=0.2)  # published: 5.90
    assert images.max() == 1
    assert images.min() == 0


def test_curves_depend_on_the_seed_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # it must be left alone
    before, numpys = (
        torch.get_rng_state(),
        cast(Any, np.random.get_state())[1].copy(),  # noqa: NPY002
    )
    for folder, seed in (("a", 1), ("b", 1), ("c", 2)):
        monkeypatch.setenv("CURVLAB_CACHE", str(tmp_path / folder))
        curves(seed, train=1100, test=50)
    parts = {}
    for folder, seed in (("a", 1), ("b", 1), ("c", 2)):
        monkeypatch.setenv("CURVLAB_CACHE", str(tmp_path / folder))
        parts[folder] = curves(seed, train=1100, test=50)
    assert torch.equal(dense(parts["a"][0]), dense(parts["b"][0]))
    assert not torch.equal(dense(parts["a"][0]), dense(parts["c"][0]))
    assert [len(p) for p in parts["a"]] == [1100, 50]
    assert torch.equal(before, torch.get_rng_state())
    assert (numpys == cast(Any, np.random.get_state())[1]).all()  # noqa: NPY002


@pytest.mark.parametrize("name", ["curves", "faces"])
def test_they_say_that_they_are_regenerated(name: str) -> None:
    assert "regenerated" in cl.datasets.DATASETS[name].summary
    for part in load_or_skip(name):
        assert "regenerated (seed 0)" in part.description
        assert "not the original file" in part.description


def test_a_log_says_that_its_data_are_regenerated() -> None:
    data = curves(0, train=60, test=10)[0]
    objective = cl.Objective(cl.models.mlp([784, 2, 784]), cl.likelihoods.Bernoulli())
    run = cl.compare(
        objective, data.batches(20), reference="sgd-m", algorithms=[], lr=0.01, progress=False
    )
    assert "regenerated" in run.dataset.attrs["data_description"]


def test_patches_are_turned_enlarged_and_sampled() -> None:
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (64, 64)).astype(np.uint8)
    angles, enlargements = np.array([0.0, np.pi / 2, -0.7]), np.array([1.5, 1.5, 1.8])
    offset = (np.arange(25) - 12) * 2.25
    for patch, angle, enlargement in zip(
        turned_patches(image, angles, enlargements), angles, enlargements, strict=True
    ):
        turn = (
            np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
            / enlargement
        )
        places = (
            np.einsum("ij,jkl->ikl", turn, np.stack(np.meshgrid(offset, offset, indexing="ij")))
            + 31.5
        )
        expected = map_coordinates(image.astype(float), places, order=1)
        assert np.abs(patch - expected).max() <= 0.5 + 1e-9
    upright, turned, _ = turned_patches(image, angles, enlargements)
    assert (np.rot90(turned, 1) == upright).mean() > 0.99 or (
        np.rot90(turned, -1) == upright
    ).mean() > 0.99


def test_faces_have_the_published_error() -> None:
    train, test = load_or_skip("faces")
    assert [len(p) for p in (train, test)] == [25 * 10 * 414, 10 * 10 * 414]
    some = outside(30, train.x[::5].double().numpy(), test.x[::5].double().numpy())
    assert some == pytest.approx(136, abs=1.5)  # published: 135
    assert 0.9 < float(train.x[:].var(0).mean()) < 1.0  # 1 over all forty people
    assert 0.9 < float(test.x[:].var(0).mean()) < 1.2


def test_olivetti_faces_that_are_not_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "olivettifaces.mat"
    path.write_bytes(b"nonsense")
    with pytest.raises(
        cl.CurvlabError, match=r"olivettifaces\.mat cannot be read as the Olivetti faces"
    ):
        olivetti(path)
    savemat(path, {"faces": np.zeros((3, 4))})
    with pytest.raises(cl.CurvlabError, match=r"holds faces of shape \(3, 4\)"):
        olivetti(path)
    monkeypatch.setenv("CURVLAB_DATA", str(tmp_path))
    monkeypatch.setenv("CURVLAB_CACHE", str(tmp_path / "cache"))
    with pytest.raises(cl.CurvlabError, match=r"olivettifaces\.mat is damaged"):
        faces()
    monkeypatch.setitem(FILES, "olivettifaces.mat", File())
    with pytest.raises(cl.CurvlabError, match="holds faces of shape"):
        faces()
    assert not (tmp_path / "cache").exists()
