"""The probe `damping`: against pairs put together again from what a step shows, and hand-written
numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from problems import batches, curvature_of, grad_of, problem
from torch import Tensor

import curvlab as cl
from curvlab.linalg.bfgs import SKIPS, double_damping, powell_levenberg
from curvlab.probes import PROBES, Frame, fractions
from curvlab.show.figures import draw

MU1 = 0.2
VARIABLES = list(PROBES["damping"].variables)


def looked(model: Any, x: Tensor, y: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Mean pre-activation, and mean derivative of each example's loss in it, of every linear layer:
    by autograd.
    """
    layers = [m for m in model if isinstance(m, torch.nn.Linear)]
    kept: list[Tensor] = []
    handles = [m.register_forward_hook(lambda m, a, h: kept.append(h)) for m in layers]
    loss = torch.nn.functional.cross_entropy(model(x), y, reduction="sum")
    for handle in handles:
        handle.remove()
    g = torch.autograd.grad(loss, kept)
    return [h.detach().mean(0) for h in kept], [d.mean(0) for d in g]


@pytest.mark.parametrize(
    ("algorithm", "damp"), [("k-bfgs-20", double_damping), ("k-bfgs", powell_levenberg)]
)
def test_pairs_of_k_bfgs_are_those_of_a_step_seen_from_outside(
    algorithm: str, damp: Callable[..., Any]
) -> None:
    """s, y from two forwards and backwards of the bare model around each step; H_g as it stood
    before it; ratios by hand.
    """
    p, lam = problem(), 0.3
    data = batches(p, 6)
    objective = p.objective()
    optimizer = cl.optimizer(algorithm, objective, lr=0.5, damping=lam)
    run = cl.train(
        problem().objective(),
        data,
        algorithm=algorithm,
        lr=0.5,
        damping=lam,
        probes=["damping"],
        warm=data[:2],
    )
    ds = run.dataset
    optimizer.warm_start(data[:2])
    blocks = curvature_of(optimizer).blocks
    s = y = None
    for step, (x, t) in enumerate(data):
        H = [b.factors[0].clone() if step else None for b in blocks.values()]
        before = looked(p.model, x, t)
        optimizer.step(objective.closure(x, t))
        after = looked(p.model, x, t)
        ds_, dy_ = ([b - a for a, b in zip(before[i], after[i], strict=True)] for i in (0, 1))
        s = [0.1 * d if s is None else 0.9 * s[i] + 0.1 * d for i, d in enumerate(ds_)]
        y = [0.1 * d if y is None else 0.9 * y[i] + 0.1 * d for i, d in enumerate(dy_)]
        for i in range(3):
            H_g = torch.eye(len(s[i]), dtype=torch.float64) * (
                1 / math.sqrt(lam) if algorithm == "k-bfgs" else 1.0
            )
            known = H[i]
            H_g = H_g if known is None else known
            at = ds.isel(damping_step=step, algorithm=0, block=i).sel(pair="g")
            expected = damp(s[i], y[i], H_g, MU1, math.sqrt(lam))
            for stage, (u, v) in (("before", (s[i], y[i])), ("after", (expected.s, expected.y))):
                here = at.sel(stage=stage)
                assert float(here["pair_curvature"]) == pytest.approx(
                    float(v @ H_g @ v / (u @ v)), rel=1e-8
                )
                assert float(here["pair_step"]) == pytest.approx(float(u @ u / (u @ v)), rel=1e-8)
                assert float(here["pair_change"]) == pytest.approx(float(v @ v / (u @ v)), rel=1e-8)
            sy, yHy = float(s[i] @ y[i]), float(y[i] @ H_g @ y[i])
            theta1 = (1 - MU1) * yHy / (yHy - sy) if sy < MU1 * yHy else 1.0
            assert float(at["theta1"]) == pytest.approx(theta1, rel=1e-8)
            assert float(at["pair_mu2"]) == pytest.approx(math.sqrt(lam), rel=1e-14)
    assert np.isfinite(ds["pair_curvature"].sel(pair="a")[1:]).all()
    assert np.isnan(ds["pair_curvature"].sel(pair="step")).all()
    assert (
        ds["pair_step"].sel(pair="a", stage="after")[1:] <= 1 / math.sqrt(lam) * (1 + 1e-12)
    ).all()


def test_fractions_of_an_epoch_by_hand() -> None:
    """Two samples of one pair and one of another; ratios that hold, just hold, do not, and of the
    wrong sign.
    """
    nan = math.nan
    # [sample, algorithm, block, pair, stage]
    curvature = np.array([[[[[4.0, 5.0], [nan, nan]]]], [[[[9.0, -1.0], [12.0, 3.0]]]]])
    step = np.array([[[[[1.0, 2.0], [nan, nan]]]], [[[[4.0, -3.0], [1.0, 1.9]]]]])
    samples = {
        "pair_curvature": curvature,
        "pair_step": step,
        "pair_mu2": np.array([[[[0.5, nan]]], [[[0.5, 0.5]]]]),
        "pair_skipped": np.array([[[[0.0, nan]]], [[[2.0, 0.0]]]]),
    }
    found = {name: values[0, 0].tolist() for name, values in fractions(samples).items()}
    assert found["pairs_seen"] == [2, 1]
    assert found["pairs_skipped"] == [0.5, 0]
    assert found["pairs_within_mu1"] == [[0.5, 0.5], [0, 1]]
    assert found["pairs_within_2mu1"] == [[1, 0.5], [0, 1]]
    assert found["pairs_within_mu2"] == [[0.5, 0.5], [1, 1]]
    assert found["pair_curvature_mean"] == [[6.5, 2], [12, 3]]


def test_the_epoch_holds_the_fractions_of_its_own_samples() -> None:
    p = problem()
    data = batches(p, 5)
    ds = cl.train(
        p.objective(),
        data,
        algorithm="k-bfgs-l-20",
        lr=1.0,
        damping=0.05,
        epochs=2,
        probes=["damping:2"],
    ).dataset
    assert ds["damping_step"].values.tolist() == [0, 2, 4, 6, 8]
    assert ds["pairs_within_mu1"].dims == ("epoch", "algorithm", "block", "pair", "stage")
    assert np.isnan(ds["pairs_within_mu1"].sel(epoch=0)).all()
    for epoch, steps in ((1, [0, 2, 4]), (2, [6, 8])):
        own = {name: ds[name].sel(damping_step=steps).values for name in VARIABLES}
        for name, values in fractions(own).items():
            np.testing.assert_array_equal(ds[name].sel(epoch=epoch), values)
        assert ds["pairs_seen"].sel(epoch=epoch, pair="g").values.tolist() == [[len(steps)] * 3]
    after = ds["pairs_within_mu1"].sel(stage="after", pair="g")[1:]
    assert (after > 0).any()


def test_only_pairs_of_the_step_itself() -> None:
    """T = 3: a pair of H_g every third step, and nothing between."""
    p = problem()
    ds = cl.train(
        p.objective(), batches(p, 7), algorithm="k-bfgs", lr=0.1, update_every=3, probes=["damping"]
    ).dataset
    there = np.isfinite(ds["pair_skipped"].sel(pair="g").values)[:, 0, 0].tolist()
    assert there == [k % 3 == 0 for k in range(1, 8)]


def test_pairs_of_every_quasi_newton_method_in_one_comparison() -> None:
    p, names = (
        problem(),
        ["k-bfgs", "k-bfgs-20-convergent", "skqn-l", "skqn-b1", "skqn-b2", "lbfgs", "s4qn", "kfac"],
    )
    run = cl.compare(
        p.objective(),
        batches(p, 6),
        reference="sgd-m",
        algorithms=names,
        lr=0.5,
        damping=0.3,
        probes=["damping"],
    )
    ds = run.dataset.isel(step=slice(2, None))
    seen = {
        name: {
            str(q)
            for q in ds["pair"].values
            if np.isfinite(ds["pair_skipped"].sel(algorithm=name, pair=q)).all()
        }
        for name in ds["algorithm"].values
    }
    assert seen["k-bfgs"] == {"a", "g"}
    assert seen["k-bfgs-20-convergent"] == {"g"}
    assert seen["skqn-b1"] == seen["skqn-b2"] == {"g"}
    assert seen["skqn-l"] == seen["lbfgs"] == seen["s4qn"] == {"step"}
    assert seen["kfac"] == seen["sgd-m"] == set()
    after = ds.sel(stage="after")
    definite = after["pair_definiteness"]
    assert (definite.sel(algorithm=["skqn-b1", "skqn-b2"], pair="g") >= MU1 * (1 - 1e-9)).all()
    assert (definite.sel(algorithm="skqn-l", pair="step") >= 0.25 * (1 - 1e-9)).all()
    assert (ds["pair_mu2"].sel(algorithm="skqn-l", pair="step") == 0.25 * (0.1 * 0.3)).all()
    whole = ds["pair_curvature"].sel(algorithm="lbfgs", pair="step", stage="before")
    assert (whole.isel(block=0) == whole.isel(block=2)).all()
    assert ds["pair_skipped"].attrs["flag_meanings"].split("; ") == list(SKIPS.values())
    codes = {float(v) for v in np.unique(ds["pair_skipped"]) if np.isfinite(v)}
    assert codes <= {float(i) for i in range(len(SKIPS))}


def test_pairs_of_l_bfgs_by_two_gradients_and_a_dense_inverse() -> None:
    """u, v from the weights and gradients around a step, H dense as the direction was taken
    with.
    """
    p = problem()
    data = batches(p, 6)
    ds = cl.train(
        problem().objective(), data, algorithm="lbfgs", lr=0.3, damping=0.01, probes=["damping"]
    ).dataset
    objective = p.objective()
    optimizer = cl.optimizer("lbfgs", objective, lr=0.3, damping=0.01)

    def flat(of: str) -> Tensor:
        tensors = {
            n: (grad_of(q) if of == "grad" else q.detach()).clone()
            for n, q in objective.parameters.items()
        }
        return objective.layout.flatten(tensors)

    pairs: list[tuple[Tensor, Tensor, Tensor]] = []
    for x, t in data:
        objective.closure(x, t)()
        w, g = flat("weights"), flat("grad")
        optimizer.step(objective.closure(x, t))
        objective.closure(x, t)()
        pairs.append(
            (
                flat("weights") - w,
                flat("grad") - g,
                optimizer.descent.curvature.inverse["whole"].dense(),
            )
        )
    for step, (u, v, H) in enumerate(pairs[:-1], 1):
        at = ds.isel(damping_step=step, algorithm=0, block=1).sel(pair="step", stage="after")
        assert float(at["pair_curvature"]) == pytest.approx(float(v @ H @ v / (u @ v)), rel=1e-8)
        assert float(at["pair_step"]) == pytest.approx(float(u @ u / (u @ v)), rel=1e-8)


def test_numbers_that_are_tensors_on_a_device_and_plain_ones_are_one() -> None:
    """The record may hold 0-dim tensors in place of floats."""
    p = problem()
    objective = p.objective()
    optimizer = cl.optimizer("k-bfgs-20", objective, lr=0.5, damping=0.3)
    for x, y in batches(p, 3):
        optimizer.step(objective.closure(x, y))
    curvature: Any = optimizer.descent.curvature
    observation = objective.closure(p.x, p.y).observe()
    directions = {"k": {b.name: torch.ones(b.shape, dtype=torch.float64) for b in objective.blocks}}
    frame = Frame(0, observation, directions, "k", 1.0, curvatures={"k": curvature})
    plain = PROBES["damping"].record(frame)

    def tensors(products: Any) -> Any:
        return replace(
            products,
            **{
                n: torch.tensor(float(getattr(products, n)), dtype=torch.float64)
                for n in ("sy", "yHy", "ss", "yy")
            },
        )

    for block in curvature.blocks.values():
        for which, pair in block.last.items():
            d = pair.damping
            block.last[which] = replace(
                pair, damping=replace(d, before=tensors(d.before), after=tensors(d.after))
            )
    for name, (_, values) in PROBES["damping"].record(frame).items():
        np.testing.assert_array_equal(values, plain[name][1])


def test_a_method_without_pairs_is_refused() -> None:
    p = problem()
    with pytest.raises(
        cl.CurvlabError,
        match=r"probe 'damping' needs a quasi-Newton method.* there is kfac alone: leave it out",
    ):
        cl.train(p.objective(), batches(p, 2), algorithm="kfac", probes=["damping"])


def test_the_figure_shows_the_fractions_and_means_of_the_log() -> None:
    p = problem()
    ds = cl.train(
        p.objective(),
        batches(p, 5),
        algorithm="k-bfgs",
        lr=0.3,
        damping=0.05,
        epochs=3,
        probes=["damping"],
    ).dataset
    axes = draw(ds, "damping").axes
    assert [ax.get_title() for ax in axes[:2]] == ["pairs of H_a", "pairs of H_g"]
    at = ds.isel(algorithm=0).sel(stage="after")
    for column, pair in enumerate(("a", "g")):
        for i, block in enumerate("123"):
            here = at.sel(pair=pair, block=block)
            wide, narrow = axes[column].lines[2 * i : 2 * i + 2]
            np.testing.assert_array_equal(wide.get_ydata(), here["pairs_within_2mu1"])
            np.testing.assert_array_equal(narrow.get_ydata(), here["pairs_within_mu1"])
            np.testing.assert_array_equal(
                axes[2 + column].lines[i].get_ydata(), here["pair_curvature_mean"]
            )
    with pytest.raises(cl.CurvlabError, match="figure 'damping' needs"):
        draw(ds.drop_vars("pairs_within_mu1"), "damping")
