"""The probe `bounds`: eigenvalues of dense inverses, bounds written out by hand, φ from activations
and from data."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from problems import batches, curvature_of, problem
from torch import nn

import curvlab as cl
from curvlab.algorithms import ALGORITHMS
from curvlab.curvature.base import with_defaults
from curvlab.linalg.operators import Kronecker
from curvlab.probes.bounds import bounded_inputs, ends
from curvlab.show import tables

MU1 = 0.2
NAMES = [
    "k-bfgs-20-convergent",
    "k-bfgs-convergent",
    "kf-bfgs-cnn-convergent",
    "k-bfgs-20",
    "tnt",
    "kfac",
]


@pytest.fixture(scope="module")
def seen() -> xr.Dataset:
    """From the second step on."""
    p = problem()
    ds = cl.compare(
        p.objective(),
        batches(p, 5),
        reference="sgd-m",
        algorithms=NAMES,
        lr=0.5,
        damping=0.2,
        probes=["bounds:1", "damping"],
    ).dataset
    return ds.isel(step=slice(1, None))


def test_eigenvalues_are_those_of_the_dense_inverse() -> None:
    p = problem()
    data = batches(p, 4)
    for name in ("k-bfgs-20", "k-bfgs-l-20", "tnt", "kfac", "shampoo", "skqn-l"):
        ds = cl.train(
            problem().objective(), data, algorithm=name, lr=0.05, damping=0.2, probes=["bounds:3"]
        ).dataset
        objective = problem().objective()
        optimizer = cl.optimizer(name, objective, lr=0.05, damping=0.2)
        for x, y in data:
            optimizer.step(objective.closure(x, y))
        last = ds.isel(bounds_step=-1, algorithm=0).sel(factor="product")
        for block, inverse in optimizer.descent.curvature.inverse.items():
            values = torch.linalg.eigvalsh(inverse.dense())
            assert float(last["eigenvalue_low"].sel(block=block)) == pytest.approx(
                float(values[0]), rel=1e-9
            )
            assert float(last["eigenvalue_high"].sel(block=block)) == pytest.approx(
                float(values[-1]), rel=1e-9
            )


def test_bounds_hold_and_say_how_tight_they_are(seen: xr.Dataset) -> None:
    for name in ("tightness_low", "tightness_high"):
        there = np.isfinite(seen[name].values)
        assert (seen[name].values[there] >= 1 - 1e-9).all()
    convergent = seen.sel(algorithm=NAMES[:3])
    assert np.isfinite(convergent["bound_low"]).all()
    assert (convergent["bound_low"] <= convergent["eigenvalue_low"] * (1 + 1e-9)).all()
    assert (convergent["bound_high"] >= convergent["eigenvalue_high"] * (1 - 1e-9)).all()
    assert np.isnan(seen["bound_low"].sel(algorithm=["kfac", "k-bfgs-20"])).all()
    assert np.isfinite(seen["bound_low"].sel(algorithm="tnt", factor="product")).all()
    checked = np.isfinite(seen["update_bound_H"].values)
    assert checked[:, 1:5].any((0, 2)).all()
    for which in "BH":
        norms, limits = (
            seen[f"update_norm_{which}"].values[checked],
            seen[f"update_bound_{which}"].values[checked],
        )
        assert (norms <= limits * (1 + 1e-9)).all()


@pytest.mark.parametrize("name", ["k-bfgs-20-convergent", "k-bfgs-convergent"])
@pytest.mark.parametrize("model", ["tanh", "no-bias", "conv"])
def test_bounds_hold_where_earlier_minibatches_had_greater_inputs(name: str, model: str) -> None:
    """A moving average remembers them, and so does an A that is looked at every third step."""
    p = problem(model)
    data = [(x * (30 if i < 3 else 1e-3), y) for i, (x, y) in enumerate(batches(p, 5))]
    ds = cl.train(
        p.objective(),
        data,
        algorithm=name,
        lr=1e-3,
        damping=0.2,
        update_every=3 if name == "k-bfgs-convergent" else 1,
        probes=["bounds:1"],
    ).dataset.isel(algorithm=0)
    at = ds.sel(factor="a", block="1")
    assert np.isfinite(at["bound_low"]).all()
    assert (at["tightness_low"] >= 1 - 1e-9).all()
    assert (at["tightness_low"][3:] < 1e3).all()
    assert (ds["phi"].sel(block="1")[3:] > 1).all()
    assert (ds["phi_proven"].sel(block="1") == 0).all()


def test_bounds_by_hand(seen: xr.Dataset) -> None:
    """Lemmas 1, 2, 6, (3.17) with the numbers of the problem written out: T = 1, λ = 0.2, three
    layers 5-4-4-3."""
    root = math.sqrt(0.2)
    phi = seen["phi"]
    assert (phi.sel(block=["2", "3"]) == 1).all()
    assert seen["phi_proven"].isel(step=0).values.tolist() == [0, 1, 1]
    inputs = [5, 4, 4]
    lower = 1 / (np.array(inputs) * phi.values**2 + 1 + root)
    for name in NAMES[:3]:
        at = seen.sel(algorithm=name, factor="a")
        np.testing.assert_allclose(at["bound_low"], lower, rtol=1e-13)
        np.testing.assert_allclose(at["bound_high"], 1 / root, rtol=1e-13)
    mu3 = {
        "k-bfgs-convergent": MU1 / (root * (1 + 2 * MU1)),
        "kf-bfgs-cnn-convergent": MU1 / (1 + 2 * MU1 * root),
    }
    start = {"k-bfgs-convergent": 1 / root, "kf-bfgs-cnn-convergent": 1.0}
    for name, third in mu3.items():
        at = seen.sel(algorithm=name, factor="g", block="2")
        used = np.cumsum(seen["pair_skipped"].sel(algorithm=name, block="2", pair="g").values == 0)
        first = 1 if np.isfinite(at["bound_low"][0]) else 0
        growth = (1 + 1 / math.sqrt(root * third)) ** 2
        for i, bound in enumerate(at["bound_high"].values):
            p, high = used[i] + first, start[name]
            for _ in range(p):
                high = growth * high + 1 / root
            assert bound == pytest.approx(high, rel=1e-12)
            assert float(at["bound_low"][i]) == pytest.approx(
                1 / (1 / start[name] + p / third), rel=1e-12
            )
    assert seen.sel(algorithm=NAMES[0], factor="g")["bound_low"].values == pytest.approx(
        (1 + 1 / MU1)
        ** -(
            1.0 + np.cumsum(seen["pair_skipped"].sel(algorithm=NAMES[0], pair="g").values == 0, 0)
        ),
        rel=1e-12,
    )


def test_tnts_bound_is_lemma_10_of_its_own_averages() -> None:
    p = problem()
    objective = p.objective()
    data = batches(p, 3)
    ds = cl.train(
        problem().objective(), data, algorithm="tnt", lr=0.0, damping=0.1, probes=["bounds:2"]
    ).dataset
    optimizer = cl.optimizer("tnt", objective, lr=0.0, damping=0.1)
    for x, y in data:
        optimizer.step(objective.closure(x, y))
    means = curvature_of(optimizer).blocks["2"].means
    weight, bias = (float(m[0].trace()) for m in means)
    of_weight = (2 * math.sqrt(weight) + 0.1) ** 2  # d = 4, 4: d^(1/2) ‖F‖^(1/2) + ε of each
    low = min(1 / of_weight, 1 / (bias + 0.1))
    at = ds.isel(bounds_step=-1, algorithm=0).sel(factor="product", block="2")
    assert float(at["bound_low"]) == pytest.approx(low, rel=1e-12)
    assert float(at["bound_high"]) == pytest.approx(100, rel=1e-12)
    factors = ds.isel(bounds_step=-1, algorithm=0).sel(factor=["a", "g"], block="2")
    np.testing.assert_allclose(factors["bound_low"], 1 / (2 * math.sqrt(weight) + 0.1), rtol=1e-12)
    np.testing.assert_allclose(factors["bound_high"], 10, rtol=1e-12)
    parts = curvature_of(optimizer).inverse["2"].parts
    for name, factor in zip("ga", parts[0].factors, strict=True):
        values = torch.linalg.eigvalsh(factor)
        assert float(factors["eigenvalue_low"].sel(factor=name)) == pytest.approx(
            float(values[0]), rel=1e-9
        )
        assert float(factors["eigenvalue_high"].sel(factor=name)) == pytest.approx(
            float(values[-1]), rel=1e-9
        )


def test_the_table_says_how_often_bounds_hold_and_how_loose_they_are(seen: xr.Dataset) -> None:
    found = {row[:2]: row[2:] for row in tables.bounds(seen).rows}
    assert {name for name, _ in found} == set(NAMES[:5])  # KFAC has no theorem
    low = seen["tightness_low"].sel(algorithm="tnt", factor="product").values
    orders = np.log10(low)
    assert found["tnt", "product, low"] == (
        str(low.size),
        "0",
        *(f"{v:.1f}" for v in (orders.min(), np.median(orders), orders.max())),
    )
    assert all(row[1] == "0" for row in found.values())
    ratio = (seen["update_bound_B"] / seen["update_norm_B"]).sel(algorithm="k-bfgs-20").values
    assert found["k-bfgs-20", "one update, ‖B‖"][0] == str(np.isfinite(ratio).sum())
    broken = seen.copy(deep=True)
    broken["tightness_low"].loc[{"algorithm": "tnt", "factor": "product", "block": "2"}] = 0.5
    broken["tightness_high"].loc[{"algorithm": "tnt", "factor": "product"}] = np.inf
    found = {row[:2]: row[2:] for row in tables.bounds(broken).rows}
    assert found["tnt", "product, low"][1:3] == (str(seen.sizes["step"]), "-0.3")
    assert found["tnt", "product, high"][1:] == ("0", "∞", "∞", "∞")


def test_phi_is_proven_through_pooling_and_reshaping_and_not_behind_a_relu_or_dropout() -> None:
    model = nn.Sequential(
        nn.Conv2d(1, 2, 3),
        nn.Sigmoid(),
        nn.MaxPool2d(2),
        nn.Conv2d(2, 2, 2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(8, 4),
        nn.Tanh(),
        nn.Linear(4, 4),
        nn.Tanh(),
        nn.Dropout(0.5),
        nn.Linear(4, 3),
        nn.Softmax(1),
        nn.Linear(3, 3),
    ).double()
    objective = cl.Objective(model, cl.likelihoods.Categorical())
    x = torch.randn(4, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = bounded_inputs(objective.closure(x, torch.zeros(4).long()))
    assert found == {objective.blocks[i].name for i in (1, 3, 5)}
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_ends_of_operators_by_their_factors() -> None:
    """Signs apart too: the corners, not the first and the last."""
    generator = torch.Generator().manual_seed(0)
    A, B = (torch.randn(d, d, generator=generator, dtype=torch.float64) for d in (3, 4))
    A, B = A + A.T, B + B.T
    values = torch.linalg.eigvalsh(torch.kron(A, B))
    assert ends(Kronecker((A, B))) == pytest.approx(
        (float(values[0]), float(values[-1])), rel=1e-12
    )


@pytest.mark.parametrize("name", ["tnt", "tnt-ideal"])
def test_bounds_hold_where_inverses_are_older_than_statistics(name: str) -> None:
    p = problem()
    ds = cl.train(
        p.objective(),
        batches(p, 13),
        algorithm=name,
        lr=0.1,
        damping=0.3,
        refresh_every=4,
        probes=["bounds:1"],
    ).dataset
    for end in ("low", "high"):
        found = ds[f"tightness_{end}"].values
        assert np.isfinite(found).all()
        assert (found >= 1 - 1e-9).all()


def test_no_activation_bounds_what_a_norm_makes_of_its_inputs() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(5, 4), nn.Tanh(), nn.LayerNorm(4), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3)
    ).double()
    objective = cl.Objective(model, cl.likelihoods.Categorical())
    p = problem()
    ds = cl.train(
        objective, [(p.x, p.y)], algorithm="tnt", lr=0.0, damping=0.2, probes=["bounds"]
    ).dataset
    with torch.no_grad():
        normalised = nn.functional.layer_norm(torch.tanh(model[0](p.x)), (4,)).abs().max()
    assert float(normalised) > 1
    assert ds["phi_proven"][0].values.tolist() == [0, 0, 0, 1]
    np.testing.assert_allclose(ds["phi"][0, 1], float(normalised), rtol=1e-12)


@pytest.fixture
def _own_names() -> Iterator[None]:
    """Takes the entries of ALGORITHMS that a test makes out again."""
    before = dict(ALGORITHMS)
    yield
    ALGORITHMS.clear()
    ALGORITHMS.update(before)


PROVEN = (
    "bound_low",
    "bound_high",
    "tightness_low",
    "tightness_high",
    "eigenvalue_low",
    "eigenvalue_high",
)


@pytest.mark.usefixtures("_own_names")
def test_tnt_has_its_bounds_under_any_name() -> None:
    ALGORITHMS["mine"] = replace(ALGORITHMS["tnt"], summary="TNT, named by a user")
    p = problem()
    arguments: dict[str, Any] = {"lr": 0.1, "damping": 0.3, "probes": ["bounds:1"]}
    mine, tnt = (
        cl.train(problem().objective(), batches(p, 3), algorithm=name, **arguments).dataset
        for name in ("mine", "tnt")
    )
    assert np.isfinite(mine["bound_low"]).all()
    for name in PROVEN:
        np.testing.assert_array_equal(mine[name], tnt[name])


@pytest.mark.usefixtures("_own_names")
@pytest.mark.parametrize("other", ["shampoo", "kfac"])
def test_a_method_that_is_called_tnt_but_is_not_has_not_its_bounds(other: str) -> None:
    """Lemma 10 is of (4.10), which the name does not make a method follow."""
    ALGORITHMS["tnt-mine"] = replace(ALGORITHMS[other], summary="no TNT, named by a user")
    p = problem()
    ds = cl.train(
        p.objective(),
        batches(p, 3),
        algorithm="tnt-mine",
        lr=0.01,
        damping=0.3,
        probes=["bounds:1"],
    ).dataset
    assert np.isfinite(ds["eigenvalue_low"].sel(factor="product")).all()
    for name in ("bound_low", "bound_high"):
        assert np.isnan(ds[name]).all()


@pytest.mark.parametrize("name", ["tnt", "tnt-per-sample"])
def test_tnts_bounds_are_of_the_damping_of_the_last_refresh(name: str) -> None:
    """The damping falls at every step and T₂ = 4: the matrix that was inverted has the ε of step 4
    until step 8.

    With the ε of now the bounds would be those of another matrix: at a falling ε the upper one
    would be too loose, and the lower one, whose trace is read off H and ε, wrong; at a rising one H
    would stand outside of them.
    """
    p = problem()
    data = batches(p, 9)
    for factor in (0.5, 2.0):
        ds = cl.train(
            problem().objective(),
            data,
            algorithm=name,
            lr=0.0,
            damping=0.3,
            refresh_every=4,
            probes=["bounds:1"],
            schedule=lambda optimizer, factor=factor: Changed(optimizer, factor),
            schedule_every="step",
        ).dataset.isel(algorithm=0)
        used = np.array([0.3 * factor**k for k in (0, 1, 2, 3, 3, 3, 3, 7, 7)])
        at = ds.sel(factor="a", block="2")
        np.testing.assert_allclose(at["bound_high"], 1 / used, rtol=1e-12)
        for end in ("low", "high"):
            assert (ds[f"tightness_{end}"] >= 1 - 1e-9).all()


@pytest.mark.parametrize("factor", [1.0, 0.5, 2.0])
def test_bounds_of_a_run_that_goes_on_between_refreshes_are_those_of_the_whole_run(
    factor: float, tmp_path: Path
) -> None:
    """The damping moves at every step, and the checkpoint of step 5 is of a matrix that was
    inverted at step 4."""
    p = problem()
    arguments: dict[str, Any] = {
        "algorithm": "tnt",
        "lr": 0.05,
        "damping": 0.3,
        "refresh_every": 4,
        "probes": ["bounds:1"],
        "schedule": lambda optimizer: Changed(optimizer, factor),
        "schedule_every": "step",
    }
    for epochs in (1, 2):
        cl.train(
            problem().objective(),
            batches(p, 5),
            **arguments,
            epochs=epochs,
            folder=tmp_path / "cut",
            resume=epochs == 2,
        )
    cl.train(problem().objective(), batches(p, 5), **arguments, epochs=2, folder=tmp_path / "whole")
    cut, whole = (cl.open(tmp_path / name) for name in ("cut", "whole"))
    assert whole.sizes["bounds_step"] == 10
    assert np.isfinite(whole["bound_low"]).all()
    for name in PROVEN:
        np.testing.assert_array_equal(cut[name], whole[name])


def test_a_state_of_an_earlier_version_has_no_damping_of_the_last_refresh() -> None:
    """It loads, and the damping as it was saved stands for it until the next refresh."""
    p = problem()
    curvature = cl.approximation("tnt", p.objective(), damping=0.5, refresh_every=3)
    curvature.update(p.objective().closure(p.x, p.y).observe(curvature.needs | {"gradient"}))
    curvature.damping = 0.25
    state = curvature.state_dict()
    assert state["refreshed"] == 0.5
    again = cl.approximation("tnt", p.objective(), damping=0.5, refresh_every=3)
    again.load_state_dict(state)
    assert with_defaults(again).refreshed == 0.5
    again.load_state_dict({k: v for k, v in state.items() if k != "refreshed"})
    assert with_defaults(again).refreshed == 0.25


class Changed:
    """A scheduler that multiplies the damping of all groups by `factor` after every step."""

    def __init__(self, optimizer: torch.optim.Optimizer, factor: float) -> None:
        self.optimizer, self.factor = optimizer, factor

    def step(self) -> None:
        for group in self.optimizer.param_groups:
            group["damping"] *= self.factor

    def state_dict(self) -> dict[str, float]:
        return {}

    def load_state_dict(self, state: dict[str, float]) -> None:
        pass
