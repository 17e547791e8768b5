"""The comparison loop through its public call, on models and data that are in no table."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from problems import batches, problem

import curvlab as cl
from curvlab.algorithm_recent import RECENT
from curvlab.algorithms import ALGORITHMS, damping_for
from curvlab.show.figures import FIGURES, draw

NAMES = ["kfac", "tnt", "shampoo", "adam", "sgd-m"]


def test_the_reference_moves_exactly_as_its_optimizer_does() -> None:
    """Two routes to a trajectory: `compare` with company, and `Optimizer.step` alone."""
    for reference in ALGORITHMS:
        one, two = problem(), problem()
        data = batches(one, 6)
        objective = one.objective(seed=3)
        cl.compare(
            objective,
            data,
            reference=reference,
            algorithms=NAMES,
            lr=0.05,
            damping=0.1,
            warm=data[:2],
            momentum=None,
        )
        alone = two.objective(seed=3)
        damping = {
            "tnt": (0.1 / 7) ** 0.5,
            "tnt-ef": (0.1 / 7) ** 0.5,
            "tnt-per-sample": 0.1**0.5,
            "tnt-ideal": 0.1**0.5,
        }
        damping |= {
            "shampoo": 3e-4,
            "adam": (0.1 / 7) ** 0.5,
            "rmsprop": (0.1 / 7) ** 0.5,
            "sgd-m": 0.0,
        } | {name: damping_for(name, 0.1, 7) for name in RECENT}
        optimizer = cl.optimizer(
            reference,
            alone,
            lr=0.05,
            damping=damping.get(reference, 0.1),
            weight_decay=0.0,  # of the documents, of which a comparison has none
            update_every=1,
            **ALGORITHMS[reference].fixed,
        )
        optimizer.warm_start(data[:2])
        for x, y in data:
            optimizer.step(alone.closure(x, y))
        for name, p in objective.parameters.items():
            assert torch.equal(p, alone.parameters[name]), (reference, name)


def test_log_of_a_comparison(tmp_path: Path) -> None:
    p = problem("norm")
    with pytest.warns(cl.CurvlabWarning, match=r"norm\.weight, norm\.bias"):
        run = cl.compare(
            p.objective(),
            batches(p, 5),
            algorithms=NAMES,
            damping=0.1,
            log_every=2,
            path=tmp_path / "x.h5",
            decay=0.5,
        )
    ds = cl.open(tmp_path / "x.h5")
    xr.testing.assert_identical(ds, run.dataset)
    assert ds["step"].values.tolist() == [0, 2, 4]
    parameters = [
        "first.weight first.bias",
        "norm.weight",
        "norm.bias",
        "second.weight second.bias",
    ]
    assert ds["parameters"].values.tolist() == parameters
    np.testing.assert_allclose(ds["cosine"].sel(algorithm="block-fisher"), 1, atol=1e-12)
    assert json.loads(ds.attrs["settings"])["decay"] == 0.5
    assert run.table().dims == ("algorithm", "block")


@pytest.mark.parametrize("model", ["conv", "conv-norm", "embedding"])
def test_every_algorithm_in_one_comparison_on_other_layers(model: str) -> None:
    """Filters, tokens and norms in the same run; where Kronecker factors do not exist their
    direction is the gradient's.
    """
    p = problem(model)
    objective = p.objective()
    grouped = [b.name for b in objective.blocks if b.groups > 1]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if grouped else "error", cl.CurvlabWarning)
        ds = cl.compare(
            objective, batches(p, 3), algorithms=list(ALGORITHMS), damping=0.1, momentum=0.0
        ).dataset
    assert bool(np.isfinite(ds["cosine"]).all())
    np.testing.assert_allclose(ds["cosine"].sel(algorithm="block-fisher"), 1, atol=1e-12)
    for block in grouped:
        gram = ds["gram"].sel(block=block)
        np.testing.assert_allclose(
            gram.sel(algorithm="kfac"), gram.sel(algorithm="sgd-m"), rtol=1e-12
        )


def test_the_loss_logged_is_the_loss_before_the_step() -> None:
    p = problem()
    data = batches(p, 3)
    expected = p.objective().closure(*data[0])().item()
    run = cl.compare(p.objective(), data, reference="sgd-m", algorithms=[], lr=0.1)
    assert float(run.dataset["loss"][0]) == pytest.approx(expected, rel=1e-14)
    expected = p.objective().closure(*data[0])().item()
    assert float(run.dataset["loss"][-1]) != expected


OTHERS = (
    "spectrum",
    "training",
    "damping",
    "landscape",
)  # test_spectra.py, test_train.py, test_probe_damping.py, test_sweep.py


@pytest.mark.parametrize("figure", [n for n in FIGURES if n not in OTHERS])
def test_every_figure_draws_what_compare_logs(figure: str) -> None:
    p = problem()
    run = cl.compare(p.objective(), batches(p, 4), algorithms=NAMES, damping=0.1)
    drawn = draw(run.dataset, figure)
    assert drawn.axes
    assert all(ax.get_xlabel() or ax.get_ylabel() for ax in drawn.axes[-1:])
    assert run.figure(figure).axes


def test_figure_that_the_log_does_not_hold() -> None:
    p = problem()
    ds = cl.compare(p.objective(), batches(p, 2), reference="sgd-m", algorithms=["adam"]).dataset
    with pytest.raises(cl.CurvlabError, match=r"figure 'loss' needs .*loss.* in the log"):
        draw(ds.drop_vars("loss"), "loss")


def test_the_cosine_panels_show_every_method_and_the_values_of_the_log() -> None:
    p = problem()
    run = cl.compare(p.objective(), batches(p, 4), algorithms=NAMES, damping=0.1)
    axes = run.figure("cosine").axes
    # all layers where there are four or fewer, the inner ones where there are more
    assert len(axes) == 3
    for ax, block in zip(axes, ("1", "2", "3"), strict=True):
        assert [line.get_label() for line in ax.lines] == NAMES
        for line in ax.lines:
            expected = run.dataset["cosine"].sel(algorithm=line.get_label(), block=block).values
            np.testing.assert_array_equal(line.get_ydata(), expected)


def test_steps_end_a_run_and_an_iterator_will_do() -> None:
    p = problem()
    run = cl.compare(
        p.objective(), iter(batches(p, 5)), reference="sgd-m", algorithms=["adam"], steps=3
    )
    assert run.dataset.sizes["step"] == 3


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"reference": "kfc"}, "unknown algorithm 'kfc'; did you mean 'kfac'"),
        ({"algorithms": ["nothing"]}, "unknown algorithm 'nothing'"),
        ({"damping": -1.0}, "damping must be 0 or positive"),
        ({"lr": -1.0}, "learning rate"),
        ({"log_every": 0}, "log_every"),
        ({"update_every": 0}, "update_every"),
    ],
)
def test_bad_arguments(change: dict[str, Any], says: str) -> None:
    p = problem()
    with pytest.raises(cl.CurvlabError, match=says):
        cl.compare(p.objective(), batches(p, 2), **change)


def test_no_batches() -> None:
    with pytest.raises(cl.CurvlabError, match="no minibatches"):
        cl.compare(problem().objective(), [])


def test_what_was_logged_before_an_error_is_saved(tmp_path: Path) -> None:
    p = problem()
    data = batches(p, 4)
    data[2][0][1, 1] = torch.nan
    with pytest.raises(cl.CurvlabError, match=r"NaN or Inf \(first in example 1"):
        cl.compare(
            p.objective(), data, reference="sgd-m", algorithms=["adam"], path=tmp_path / "run.h5"
        )
    assert cl.open(tmp_path / "run.h5")["step"].values.tolist() == [0, 1]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_on_a_gpu_as_on_the_cpu() -> None:
    tables = []
    for device in ("cpu", "cuda"):
        p = problem()
        objective = cl.Objective(p.model.to(device), p.likelihood)
        run = cl.compare(
            objective,
            batches(p, 4),
            reference="block-ef",
            algorithms=["kfac-ef", "tnt-ef", "shampoo", "adam"],
        )
        tables.append(run.dataset["cosine"])
    np.testing.assert_allclose(tables[0], tables[1], atol=1e-8)


def test_cosines_to_any_method_and_to_the_full_gauss_newton_matrix() -> None:
    """Directions of every reference by dense matrices of the whole or of blocks, at the first
    step.
    """
    p, lam = problem(), 0.1
    data = batches(p, 3)
    objective = problem().objective()
    closure = objective.closure(*data[0])
    g = torch.cat([v.flatten() for v in closure.observe().gradients.values()])
    ggn = cl.exact.matrix(objective, *data[0], kind="ggn", block=None).dense()
    hessians = [m.dense() for m in cl.exact.matrices(objective, *data[0], "hessian").values()]
    slices = objective.layout.slices

    def solve(B: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
        return torch.linalg.solve(B + lam * torch.eye(len(B), dtype=torch.float64), g)

    shifted = [
        h + max(0.0, -float(torch.linalg.eigvalsh(h)[0])) * torch.eye(len(h), dtype=torch.float64)
        for h in hessians
    ]
    expected = {
        "full-ggn": solve(ggn, g),
        "block-ggn": torch.cat([solve(ggn[s, s], g[s]) for s in slices.values()]),
        "block-hessian": torch.cat(
            [solve(h, g[s]) for h, s in zip(shifted, slices.values(), strict=True)]
        ),
        "sgd-m": g,
    }
    ds = cl.compare(
        p.objective(),
        data,
        reference="sgd-m",
        algorithms=list(expected),
        damping=lam,
        momentum=0.0,
        warm=(),
    ).dataset
    for other, q in expected.items():
        found = cl.cosine_to(ds, other)
        assert found.dims == ("step", "algorithm", "block")
        for name, d in expected.items():
            for block, s in slices.items():
                cosine = torch.nn.functional.cosine_similarity(d[s], q[s], dim=0)
                assert float(found.sel(algorithm=name, block=block)[0]) == pytest.approx(
                    float(cosine), abs=1e-6
                )
    xr.testing.assert_allclose(cl.cosine_to(ds, "sgd-m").drop_vars("other"), ds["cosine"])
    by_products = cl.approximation("full-ggn", objective, damping=lam, solver="cg")
    now = objective.closure(*data[0]).observe()
    by_products.update(now)
    d = torch.cat([v.flatten() for v in by_products.precondition(now.gradients).values()])
    assert float((d - expected["full-ggn"]).norm()) < 1e-5 * float(d.norm())
    with pytest.raises(cl.CurvlabError, match="unknown algorithm of this log 'kfac'"):
        cl.cosine_to(ds, "kfac")
