"""Spectra against NumPy's eigenvalues of blocks by another route, and the estimates of Lanczos
against both.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from matplotlib.patches import StepPatch
from problems import REPRESENTATIVE, Problem, assert_drawn, problem
from torch import nn

import curvlab as cl
from curvlab.exact import KINDS
from curvlab.linalg.operators import Dense
from curvlab.show.figures import draw
from curvlab.spectra import EDGES, SPECTRUM_VARIABLES, Plan, eigenvalues, tolerance


def symmetric(order: int, seed: int = 0) -> torch.Tensor:
    a = torch.randn(
        order, order, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    return a + a.mT


def middling(dtype: torch.dtype = torch.float64) -> Problem:
    """Large enough that Lanczos does not see all of it: blocks of 630 and 155."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        net = nn.Sequential(nn.Linear(20, 30), nn.Tanh(), nn.Linear(30, 5)).to(dtype)
        return Problem(
            net,
            cl.likelihoods.Categorical(),
            torch.randn(40, 20, dtype=dtype),
            torch.randint(5, (40,)),
        )


def known(ds: xr.Dataset, matrix: str, block: str) -> np.ndarray:
    """The eigenvalues in the log, without what pads them."""
    values = ds["eigenvalue"].isel(step=0).sel(matrix=matrix, block=block).values
    order = int(ds["order"].sel(block=block))
    assert np.isnan(values[order:]).all()
    return values[:order]


@pytest.mark.filterwarnings("ignore::curvlab.errors.CurvlabWarning")
@pytest.mark.parametrize("model", [*REPRESENTATIVE, "norm"])
def test_every_eigenvalue_of_every_block_and_of_the_whole(model: str) -> None:
    p = problem(model)
    ds = cl.spectrum(p.objective(), p.x, p.y, KINDS, blocks=["all", "whole"])
    blocks = [b.name for b in p.objective().blocks]
    assert ds["block"].values.tolist() == [*blocks, "whole"]
    for kind in KINDS:
        for block in (*blocks, "whole"):
            dense: Any = cl.exact.matrix(
                p.objective(), p.x, p.y, kind, None if block == "whole" else block, route="func"
            )
            expected = np.linalg.eigvalsh(dense.matrix.numpy())
            scale = np.abs(expected).max()
            found, at = known(ds, kind, block), ds.isel(step=0).sel(matrix=kind, block=block)
            np.testing.assert_allclose(found, expected, rtol=0, atol=1e-10 * scale)
            assert (np.diff(found) >= 0).all()
            assert float(at["lowest"]) == found[0]
            assert float(at["highest"]) == found[-1]
            assert float(at["trace"]) == pytest.approx(
                float(dense.trace()), abs=1e-12 * scale * len(found)
            )
            assert float(at["negative"]) == (expected < -1e-10 * scale).mean()
            assert not any(
                at[name]
                for name in (
                    "lowest_error",
                    "highest_error",
                    "trace_error",
                    "negative_error",
                    "unresolved",
                )
            )


@pytest.mark.parametrize("idle", [[], [0], [2, 3, 7], list(range(9)), list(range(10))])
def test_rows_of_zeros_are_left_out_and_their_zeros_put_back(idle: Sequence[int]) -> None:
    m = symmetric(10)
    m[list(idle)], m[:, list(idle)] = 0, 0
    found = eigenvalues(Dense(m))
    torch.testing.assert_close(found, torch.linalg.eigvalsh(m), rtol=0, atol=1e-12)
    assert int((found == 0).sum()) == len(idle)


def test_inputs_that_are_always_zero() -> None:
    p = problem("tanh")
    p.x[:, 2:4] = 0
    ds = cl.spectrum(p.objective(), p.x, p.y)
    for kind in ("hessian", "ggn"):
        assert (known(ds, kind, "1") == 0).sum() == 8  # two inputs of four units
        dense = cl.exact.matrix(p.objective(), p.x, p.y, kind, "1", route="func").matrix.numpy()
        np.testing.assert_allclose(
            known(ds, kind, "1"), np.linalg.eigvalsh(dense), rtol=0, atol=1e-12
        )


def test_the_hessian_is_indefinite_and_gauss_newton_is_not() -> None:
    """Thesis (1.4): what is negative comes from Π alone."""
    for p in (problem("tanh"), problem("conv"), middling()):
        ds = cl.spectrum(p.objective(), p.x, p.y, blocks=["all", "whole"])
        assert (ds["lowest"].sel(matrix="ggn") >= -1e-10 * ds["highest"].sel(matrix="ggn")).all()
        assert (ds["negative"].sel(matrix="ggn") == 0).all()
        assert (ds["lowest"].sel(matrix="hessian", block=["1", "whole"]) < -1e-4).all()
        assert (ds["negative"].sel(matrix="hessian", block=["1", "whole"]) > 0.1).all()


def test_of_a_piecewise_linear_network_no_block_is_indefinite_but_the_whole_is() -> None:
    """ReLU: the outputs are linear in each layer's weights, so that the diagonal blocks of Π are
    zero.
    """
    p = problem("relu", n=20)
    ds = cl.spectrum(p.objective(), p.x, p.y, ("hessian", "ggn", "pi"), blocks=["all", "whole"])
    for block in ("1", "2"):
        hessian, ggn, pi = (known(ds, kind, block) for kind in ("hessian", "ggn", "pi"))
        np.testing.assert_allclose(hessian, ggn, rtol=0, atol=1e-12)
        np.testing.assert_allclose(pi, 0, atol=1e-12)
    assert (ds["negative"].sel(matrix=["hessian", "ggn"], block=["1", "2"]) == 0).all()
    assert ds["lowest"].sel(matrix="hessian", block="whole").item() < -1e-3


def test_the_grid_is_fixed_and_counts_every_eigenvalue_once() -> None:
    assert EDGES[[0, 200, 201, -1]].tolist() == [-1e8, -1e-12, 1e-12, 1e8]
    np.testing.assert_allclose(EDGES[201:][1:] / EDGES[201:][:-1], 10**0.1, rtol=1e-12)
    p = problem("tanh")
    for scale in (1.0, 1e-11, 1e12):
        p.x[:, 0] *= scale
        ds = cl.spectrum(p.objective(), p.x, p.y, KINDS, blocks=["all", "whole"]).isel(step=0)
        np.testing.assert_array_equal(ds["lower"], EDGES[:-1])
        np.testing.assert_array_equal(ds["upper"], EDGES[1:])
        np.testing.assert_allclose(ds["density"].sum("bin"), 1, rtol=1e-12)
        for kind in KINDS:
            found = known(ds.expand_dims("step"), kind, "whole").clip(-1e8, 1e8 * (1 - 1e-12))
            expected = [
                ((found >= low) & (found < high)).mean() for low, high in itertools.pairwise(EDGES)
            ]
            np.testing.assert_allclose(
                ds["density"].sel(matrix=kind, block="whole"), expected, rtol=0, atol=1e-14
            )


@pytest.mark.parametrize("kind", KINDS)
def test_lanczos_against_every_eigenvalue(kind: str) -> None:
    p = middling()
    blocks = ["1", "whole"] if kind == "hessian" else ["1"]
    exactly = cl.spectrum(p.objective(), p.x, p.y, [kind], "exact", blocks=blocks).isel(
        step=0, matrix=0
    )
    run = cl.spectrum(
        p.objective(), p.x, p.y, [kind], "lanczos", blocks=blocks, draws=12, steps=40
    ).isel(step=0, matrix=0)
    assert "eigenvalue" not in run
    assert (run["route"] == "lanczos").all()
    scale: Any = np.maximum(np.abs(exactly["lowest"]), exactly["highest"])
    for end in ("lowest", "highest"):
        assert (np.abs(run[end] - exactly[end]) <= run[f"{end}_error"] + 1e-12 * scale).all(), end
    assert (run["lowest"] >= exactly["lowest"] - 1e-12 * scale).all()
    assert (run["highest"] <= exactly["highest"] + 1e-12 * scale).all()
    assert (np.abs(run["trace"] - exactly["trace"]) <= 4 * run["trace_error"]).all()
    assert (run["trace_error"] > 0).all()
    slack = 4 * run["negative_error"] + 0.02
    assert (run["negative"] <= exactly["negative"] + slack).all()
    assert (run["negative"] + run["unresolved"] >= exactly["negative"] - slack).all()
    np.testing.assert_allclose(run["density"].sum("bin"), 1, rtol=1e-12)
    # what lies beyond a tenth of the greatest magnitude is few and resolved
    for block in run["block"].values:
        large = abs(run["bin"]) > 0.1 * float(scale.sel(block=block))
        found, expected = (
            ds["density"].sel(block=block).where(large, 0).sum() for ds in (run, exactly)
        )
        assert float(found) == pytest.approx(float(expected), rel=0.5, abs=2e-3)


def test_lanczos_sees_a_small_matrix_whole() -> None:
    p = problem("tanh")
    exactly, run = (
        cl.spectrum(p.objective(), p.x, p.y, ["hessian"], m, draws=8) for m in ("exact", "lanczos")
    )
    for end in ("lowest", "highest"):
        np.testing.assert_allclose(run[end], exactly[end], rtol=0, atol=1e-12)
    assert (np.abs(run["negative"] - exactly["negative"]) <= 4 * run["negative_error"]).all()


def test_what_lanczos_cannot_tell_from_zero_is_said() -> None:
    """Gauss-Newton of 40 examples, 5 outputs: rank ≤ 200 of 630. Its kernel is near 0, none of it
    negative.
    """
    p = middling()
    run = cl.spectrum(
        p.objective(), p.x, p.y, ["ggn"], "lanczos", blocks=["1"], draws=4, steps=60
    ).squeeze()
    assert run["negative"].item() == 0
    assert run["unresolved"].item() > 0.6
    assert run["density"].sel(bin=0).item() == pytest.approx(run["unresolved"].item(), abs=1e-12)
    assert run["negative_error"].item() >= run["unresolved"].item()  # all of it may be negative


def test_the_error_of_what_is_negative_reaches_the_truth() -> None:
    """Half of the eigenvalues of a Hessian are negative, and most of those too small for Lanczos:
    faults, row 34.
    """
    p = middling()
    exactly, run = (
        cl.spectrum(
            p.objective(), p.x, p.y, ["hessian"], m, blocks=["1"], draws=4, steps=20
        ).squeeze()
        for m in ("exact", "lanczos")
    )
    assert run["unresolved"].item() > 0.1
    assert run["negative_error"].item() >= run["unresolved"].item()
    assert abs(run["negative"].item() - exactly["negative"].item()) <= run["negative_error"].item()
    assert "unresolved" in run["negative_error"].attrs["long_name"]


def test_auto_is_exact_up_to_an_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("curvlab.spectra.LARGEST_EXACT", 200)
    p = middling()
    ds = cl.spectrum(p.objective(), p.x, p.y, draws=2, steps=5, blocks=["all", "whole"])
    assert ds["route"].values.tolist() == ["lanczos", "exact", "lanczos"]
    assert ds["order"].values.tolist() == [630, 155, 785]
    assert ds.sizes["index"] == 155
    assert np.isnan(ds["eigenvalue"].sel(block=["1", "whole"])).all()
    assert np.isfinite(ds["eigenvalue"].sel(block="2")).all()


def test_one_draw_has_no_standard_error() -> None:
    p = middling()
    ds = cl.spectrum(p.objective(), p.x, p.y, ["ggn"], "lanczos", draws=1, steps=5)
    assert np.isnan(ds["trace_error"]).all()
    assert np.isfinite(ds["trace"]).all()


def test_nothing_of_the_objective_changes_and_the_same_comes_again() -> None:
    p = problem("batch-norm")
    objective = p.objective(seed=2)
    objective.closure(p.x, p.y)
    state, counted = (
        {k: v.clone() for k, v in p.model.state_dict().items()},
        dict(objective.closures),
    )
    one, two = (
        cl.spectrum(objective, p.x, p.y, ["fisher-mc", "hessian"], m) for m in ("auto", "auto")
    )
    assert objective.closures == counted
    assert all(torch.equal(v, state[k]) for k, v in p.model.state_dict().items())
    xr.testing.assert_equal(one, two)
    other = cl.spectrum(p.objective(seed=3), p.x, p.y, ["fisher-mc"])
    assert (other["trace"] != one["trace"].sel(matrix=["fisher-mc"])).all()


def test_labels_and_starting_vectors_do_not_depend_on_what_else_is_asked_for() -> None:
    p = middling()
    for method in ("exact", "lanczos"):
        all_of_it = cl.spectrum(
            p.objective(), p.x, p.y, KINDS, method, blocks=["all", "whole"], draws=2, steps=8
        )
        alone = cl.spectrum(
            p.objective(), p.x, p.y, ["fisher-mc"], method, blocks=["2"], draws=2, steps=8
        )
        for name in ("lowest", "highest", "trace", "density"):
            np.testing.assert_array_equal(
                alone[name], all_of_it[name].sel(matrix=["fisher-mc"], block=["2"])
            )


@pytest.mark.parametrize("method", ["exact", "lanczos"])
def test_a_loader_gives_the_mean_over_all_of_it(method: str) -> None:
    p = middling()
    parts = [(p.x[:10], p.y[:10]), (p.x[10:], p.y[10:])]
    options: dict[str, Any] = {"draws": 2, "steps": 10}
    expected = cl.spectrum(p.objective(), p.x, p.y, method=method, **options)
    for loader in (parts, iter(parts)):
        found = cl.spectrum(p.objective(), loader, method=method, **options)
        for name in ("lowest", "highest", "trace", "loss"):
            np.testing.assert_allclose(found[name], expected[name], rtol=1e-9, atol=1e-9)


def test_the_loss_is_the_mean_over_the_examples() -> None:
    p = middling()
    ds = cl.spectrum(p.objective(), p.x, p.y, ["ggn"], blocks=["2"])
    assert ds["loss"].item() == pytest.approx(
        float(p.objective().closure(p.x, p.y)().detach()), rel=1e-14
    )


def test_float32() -> None:
    """Rounding is no negative curvature."""
    single, double = middling(torch.float32), middling()
    double.model.load_state_dict(single.model.state_dict())
    x, y = single.x.double(), single.y
    one, two = cl.spectrum(single.objective(), single.x, y), cl.spectrum(double.objective(), x, y)
    assert (
        one.attrs["tolerance"] == tolerance(torch.float32) == 100 * torch.finfo(torch.float32).eps
    )
    assert two.attrs["tolerance"] == tolerance(torch.float64) == 1e-10
    assert (one["negative"].sel(matrix="ggn") == 0).all()
    np.testing.assert_allclose(one["highest"], two["highest"], rtol=1e-4)
    assert (
        one["lowest"].sel(matrix="ggn", block="1") < 0
    ).all()  # rounding, which the tolerance is above
    draw(one, "spectrum")


def test_schema() -> None:
    p = problem("tanh")
    ds = cl.spectrum(p.objective(seed=4), p.x, p.y, after=70)
    assert {name: v.dims for name, v in ds.data_vars.items()} == {
        name: ("step", *dims) for name, (dims, *_) in SPECTRUM_VARIABLES.items()
    }
    assert all({"long_name", "units"} <= v.attrs.keys() for v in ds.variables.values())
    assert ds["step"].values.tolist() == [70]
    assert ds["parameters"].values.tolist() == [
        "0.weight 0.bias",
        "2.weight 2.bias",
        "4.weight 4.bias",
    ]
    assert json.loads(ds.attrs["call"])["matrices"] == ["hessian", "ggn"]
    assert (ds.attrs["seed"], ds.attrs["device"], ds.attrs["dtype"]) == (4, "cpu", "float64")
    assert {"versions", "git_commit", "created", "model", "data"} <= ds.attrs.keys()


def test_states_of_your_own_training_join_along_the_step(tmp_path: Path) -> None:
    p = middling()
    objective = p.objective()
    optimizer = cl.optimizer("sgd-m", objective, lr=0.5)
    states = []
    for step in range(3):
        states.append(cl.spectrum(objective, p.x, p.y, after=step, progress=step == 1))
        optimizer.step(objective.closure(p.x, p.y))
    ds = xr.concat(states, "step", data_vars="minimal", combine_attrs="override")
    assert ds["step"].values.tolist() == [0, 1, 2]
    assert (ds["loss"].diff("step") < 0).all()
    ds.to_netcdf(tmp_path / "run.h5", engine="h5netcdf")
    xr.testing.assert_identical(cl.open(tmp_path), ds)
    assert len(draw(ds, "spectrum").axes) == 6


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"matrices": ["hesian"]}, "unknown kind of matrix 'hesian'; did you mean 'hessian'"),
        ({"matrices": []}, "there is no matrix to compute"),
        ({"method": "exactly"}, "unknown method 'exactly'; did you mean 'exact'"),
        ({"blocks": ["4"]}, r"unknown block '4'.* \(known: 1, 2, 3, all, whole\)"),
        ({"blocks": []}, "there is no block to compute"),
        ({"draws": 0}, "draws of Lanczos must be 1 or more, not 0"),
        ({"steps": -3}, "steps of Lanczos must be 1 or more, not -3"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], says: str) -> None:
    p = problem("tanh")
    with pytest.raises(cl.CurvlabError, match=says):
        cl.spectrum(p.objective(), p.x, p.y, **arguments)


def test_a_block_larger_than_the_memory_is_refused_before_anything_runs() -> None:
    with torch.device("meta"):
        net = nn.Linear(1000, 1000)
    objective = cl.Objective(net, cl.likelihoods.Categorical())
    with pytest.raises(
        cl.CurvlabError, match=r"every eigenvalue of block 1 would need .* take the method lanczos"
    ):
        Plan(method="exact").check(objective)
    Plan(method="auto").check(objective)


def test_the_figure_counts_every_eigenvalue() -> None:
    p = middling()
    ds = cl.spectrum(p.objective(), p.x, p.y)
    figure = draw(ds, "spectrum")
    assert len(figure.axes) == 2
    for ax, block in zip(figure.axes, ("1", "2"), strict=True):
        for patch, kind in zip(ax.patches, ("ggn", "hessian"), strict=False):
            assert isinstance(patch, StepPatch)
            found, edges, _ = patch.get_data()
            counts = np.where(found > 0.5, found, 0)
            values = known(ds, kind, block)
            assert counts.sum() == pytest.approx(len(values))
            negative = counts[edges[1:] <= -1e-12].sum()
            assert negative == pytest.approx((values < edges[edges < 0].max()).sum())
            assert (negative > 0) == (kind == "hessian" and block == "1")
        legend = ax.get_legend()
        assert legend is not None
        said = [text.get_text() for text in legend.get_texts()]
        assert [line.split(":")[0] for line in said] == ["GGN", "Hessian"]
        assert ("negative" in said[1]) == (block == "1")


@pytest.mark.parametrize(
    "options",
    [{"matrices": KINDS}, {"method": "lanczos", "blocks": ["whole"], "draws": 2, "steps": 9}],
)
def test_the_figure_draws_what_can_be_asked_for(options: dict[str, Any], tmp_path: Path) -> None:
    p = middling()
    for scale in (1e-9, 1.0, 1e6):
        ds = cl.spectrum(p.objective(), p.x * scale, p.y, **options)
        drawn = draw(ds, "spectrum")
        assert len(assert_drawn(drawn)) >= ds.sizes["block"]
        drawn.savefig(tmp_path / "x.png")
        assert (tmp_path / "x.png").stat().st_size > 10_000


def test_the_figure_of_a_matrix_of_zeros(tmp_path: Path) -> None:
    p = problem("linear")
    ds = cl.spectrum(p.objective(), p.x * 0, p.y, ["pi"])
    assert ds["highest"].item() == 0
    draw(ds, "spectrum").savefig(tmp_path / "x.png")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("method", ["exact", "lanczos"])
def test_on_a_gpu_as_on_the_cpu(method: str) -> None:
    p = middling()
    cpu = cl.spectrum(p.objective(), p.x, p.y, method=method, draws=2, steps=10)
    p.model.cuda()
    gpu = cl.spectrum(p.objective(), p.x, p.y, method=method, draws=2, steps=10)
    for name in ("lowest", "highest", "trace"):
        np.testing.assert_allclose(gpu[name], cpu[name], rtol=1e-8, atol=1e-10)
