"""How good are the assumptions: each number by hand, and exact where the theory says so."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from problems import LIKELIHOODS, MODELS, Problem, assert_near, problem
from torch import Tensor, nn

import curvlab as cl
from curvlab.algorithms import ALGORITHMS, damping_for
from curvlab.assumptions import ASSUMPTIONS, errors, quality
from curvlab.curvature.identity import IdentityBlock
from curvlab.curvature.kbfgs import KBfgs
from curvlab.exact import KINDS, Kind
from curvlab.layers import Block
from curvlab.likelihoods import Likelihood
from curvlab.linalg.kronecker import nearest_kronecker
from curvlab.linalg.operators import Diagonal
from curvlab.observation import Pass

KBFGS = [name for name, a in ALGORITHMS.items() if a.make is KBfgs]
NONE = ("sgd-m", "muon", *KBFGS)  # estimate no matrix: K-BFGS's is damped as it is learnt
BY_BLOCK = [name for name, a in ALGORITHMS.items() if not a.whole]
ROOTED = ("shampoo", "adam", "rmsprop", "adamw", "asgo", "soap", "kl-shampoo")
NAMES = [name for name in BY_BLOCK if name not in NONE and ALGORITHMS[name].look is None]
SUMS = ["tanh", "relu", "no-bias", "tokens", "conv", "conv-1d", "embedding"]
kinds = pytest.mark.parametrize("kind", KINDS)


def fit(objective: cl.Objective) -> list[Block]:
    return [b for b in objective.blocks if b.layer is not None and b.groups == 1]


def exact(p: Problem, kind: Kind, block: str) -> Tensor:
    return cl.exact.matrix(p.objective(), p.x, p.y, kind, block).dense()


def deep_linear(bias: bool = True) -> Problem:
    """Gₙ is the same for every example: the mean of products is the product of means."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(
            *(nn.Linear(i, o, bias=bias) for i, o in [(5, 4), (4, 6), (6, 3)])
        ).double()
    return Problem(
        net, cl.likelihoods.Gaussian(), *(lambda p: (p.x, p.y))(problem("linear", "gaussian", n=9))
    )


# -------------------------------------------------------------------------------------- the
# matrices of the algorithms


@pytest.mark.parametrize("name", BY_BLOCK)
@pytest.mark.parametrize("model", ["tanh", "no-bias", "tokens", "conv", "embedding"])
def test_matrix_is_what_refresh_inverts(name: str, model: str) -> None:
    """inverse = B⁻¹, or B^{−1/2} of Shampoo, Adam and their heirs, at the damping of `refresh`."""
    p = problem(model)
    objective = p.objective()
    curvature: Any = cl.approximation(name, objective, damping=0.3)
    curvature.update(objective.closure(p.x, p.y).observe(curvature.needs))
    for block_name, block in curvature.blocks.items():
        found = block.matrix(0.3)
        if found is None:
            assert isinstance(block, IdentityBlock) or name in NONE
            continue
        H = curvature.inverse[block_name].dense()
        power = H @ H if name in ROOTED else H
        if name == "sophia-g":  # h of one minibatch weighs 0.01, which B divides out, and ρ is 0.04
            found = Diagonal(0.04 * (0.01 * (found.diag() - 0.3) + 0.3))
        assert_near(
            power @ found.dense(),
            torch.eye(len(H), dtype=H.dtype),
            1e-5 if name == "shampoo" else 1e-10,
        )
        assert_near(found @ H, found.dense() @ H)


@pytest.mark.parametrize("model", ["tanh", "conv"])
def test_undamped_matrices_by_their_formulas(model: str) -> None:
    """KFAC: Γ ⊗ Ω; TNT: contractions of the mean gradient over their trace; Shampoo: their square
    roots; Adam: v.
    """
    p = problem(model)
    objective = p.objective()
    made: dict[str, Any] = {
        name: cl.approximation(name, objective, labels="data")
        for name in ("kfac", "tnt", "shampoo", "adam")
    }
    observation = objective.closure(p.x, p.y).observe()
    for curvature in made.values():
        curvature.update(observation)
    for block in objective.blocks:
        found = {name: c.blocks[block.name].matrix().dense() for name, c in made.items()}
        s = observation.passes["data"][block.name]
        assert_near(found["kfac"], torch.kron(s.G, s.A.contiguous()))
        assert_near(found["adam"], torch.diag(s.gradient.flatten().square()))
        if model == "conv":
            continue
        w, b = s.gradient[:, :-1], s.gradient[:, -1]
        places = torch.arange(block.numel).view(block.shape)
        at_w, at_b = places[:, :-1].flatten(), places[:, -1]
        left, right = w @ w.T, w.T @ w
        roots = [
            (lambda e, q: (q * e.clamp_min(0).sqrt()) @ q.T)(*torch.linalg.eigh(m))
            for m in (left, right)
        ]
        for name, weight in (
            ("tnt", torch.kron(left, right) / left.trace()),
            ("shampoo", torch.kron(*roots)),
        ):
            assert_near(found[name][at_w[:, None], at_w], weight, 1e-7)
            assert_near(found[name][at_b[:, None], at_b], torch.outer(b, b))
            assert not bool(found[name][at_w[:, None], at_b].any())


# ----------------------------------------------------------------------
# errors


@pytest.mark.thinned(2)
@pytest.mark.parametrize("model", SUMS)
@kinds
def test_errors_by_hand(model: str, kind: Kind) -> None:
    """Every matrix written out over examples and places."""
    p = problem(model)
    found = errors(p.objective(), p.x, p.y, kind)
    assert list(found["block"].values) == [b.name for b in fit(p.objective())]
    for block in fit(p.objective()):
        here = found.sel(block=block.name)
        M = exact(p, kind, block.name)
        terms = cl.exact.kronecker_terms(p.objective(), p.x, p.y, kind, block.name)
        G, a = terms.G, terms.a
        own = torch.einsum("ntotp->ntop", G)
        A = torch.einsum("nti,ntj->ntij", a, a)
        matrices = [
            torch.einsum("ntop,ntij->oipj", own, A) / len(a),
            torch.einsum("nop,nij->oipj", own.mean(1), A.sum(1)) / len(a),
            torch.einsum("op,ij->oipj", own.mean((0, 1)), A.sum(1).mean(0)),
        ]
        size = float(M.norm())
        if size == 0:
            assert bool(
                here["error"].isnull().all()
                and here["step"].isnull().all()
                and here["floor"].isnull()
            )
            continue
        before = M
        for k, one in enumerate(matrices):
            matrix = one.reshape(M.shape)
            assert float(here["error"][k]) == pytest.approx(
                float((matrix - M).norm()) / size, rel=1e-10, abs=1e-12
            )
            assert float(here["step"][k]) == pytest.approx(
                float((matrix - before).norm()) / size, rel=1e-10, abs=1e-12
            )
            before = matrix
        assert float(here["total"]) == float(here["error"][-1])
        assert float(here["floor"]) == pytest.approx(
            nearest_kronecker(M, *block.shape).error, rel=1e-10, abs=1e-12
        )
        assert float(here["floor"]) <= float(here["total"]) + 1e-12
        if terms.places == 1:
            assert bool((here["error"][:2] == 0).all() and (here["step"][:2] == 0).all())


def test_steps_bound_the_total() -> None:
    """Triangle inequality; and the steps are of the order in which they are made."""
    p = problem("conv")
    found = errors(p.objective(), p.x, p.y, "hessian")
    assert list(found["assumption"].values) == list(ASSUMPTIONS)
    assert list(found["equation"].values) == ["(3.4)", "(3.5), (3.7)", "(2.3), (3.8)"]
    assert bool((found["total"] <= found["step"].sum("assumption") + 1e-12).all())
    assert bool((found["step"].isel(assumption=0) == found["error"].isel(assumption=0)).all())
    assert float(found["step"].sel(block="1").min()) > 0


@pytest.mark.parametrize("kind", ["hessian", "ggn", "fisher"])
@pytest.mark.parametrize("bias", [True, False])
def test_no_error_in_a_deep_linear_network(kind: Kind, bias: bool) -> None:
    p = deep_linear(bias)
    found = errors(p.objective(), p.x, p.y, kind)
    assert float(found["error"].max()) < 1e-12
    assert float(found["floor"].max()) < 1e-12


@kinds
def test_no_error_in_one_example(kind: Kind) -> None:
    """(2.2): one place and one example are one product."""
    p = problem("tanh", n=1)
    found = errors(p.objective(), p.x, p.y, kind)
    assert float(found["error"].max()) < 1e-12
    assert float(found["floor"].max()) < 1e-12


def test_places_with_outputs_of_their_own() -> None:
    """Nothing is pooled: (3.4) costs nothing, the others do."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
        x, y = torch.randn(6, 5, 3).double(), torch.rand(6, 5, 2).double()
    found = errors(cl.Objective(net, cl.likelihoods.Bernoulli()), x, y, "hessian")
    assert float(found["error"].sel(assumption="places apart").max()) < 1e-14
    assert float(found["step"].sel(assumption="averaged over places").min()) > 1e-3
    assert float(found["step"].sel(assumption="averaged over examples").min()) > 1e-3


class Times:
    """A likelihood whose loss, and so every curvature, is a multiple of another's."""

    def __init__(self, base: Likelihood, factor: float) -> None:
        self.base, self.factor = base, factor
        self.check, self.sample = base.check, base.sample

    def loss(self, z: Tensor, y: Tensor) -> Tensor:
        return self.factor * self.base.loss(z, y)

    def root(self, z: Tensor) -> Tensor:
        return math.sqrt(self.factor) * self.base.root(z)


@pytest.mark.filterwarnings(
    "ignore:labels drawn by:curvlab.errors.CurvlabWarning"
)  # they follow the loss in its own unit
@pytest.mark.parametrize("kind", ["hessian", "ggn", "ef"])
def test_relative_errors_do_not_change_with_the_unit_of_the_loss(kind: Kind) -> None:
    p = problem("tokens")
    scaled = cl.Objective(p.model, Times(p.likelihood, 1e6), 0)
    names = ["kfac", "tnt-per-sample"]
    for one, other in [
        (errors(p.objective(), p.x, p.y, kind), errors(scaled, p.x, p.y, kind)),
        (quality(p.objective(), p.x, p.y, names, kind), quality(scaled, p.x, p.y, names, kind)),
    ]:
        xr.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-12)


def test_errors_do_not_change_with_copies_of_the_data() -> None:
    p = problem("conv")
    one, other = (
        errors(p.objective(), torch.cat([p.x] * k), torch.cat([p.y] * k), "hessian") for k in (1, 3)
    )
    xr.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-12)
    assert (one.attrs["examples"], other.attrs["examples"]) == (7, 21)


# ----------------------------------------------------------------------
# quality


@pytest.mark.parametrize("model", ["tanh", "tokens"])
@pytest.mark.parametrize("kind", ["hessian", "fisher", "fisher-mc", "ef"])
def test_quality_by_hand(model: str, kind: Kind) -> None:
    """Every measure from the dense matrices; KFAC's labels are those of the exact matrix."""
    p = problem(model)
    found = quality(p.objective(), p.x, p.y, ["tnt-per-sample", "kfac"], kind)
    passes: dict[Kind, Pass] = {
        "hessian": "exact",
        "fisher": "exact",
        "fisher-mc": "model",
        "ef": "data",
    }
    labels = passes[kind]
    for name in ("kfac", "tnt-per-sample"):
        objective = p.objective()
        curvature: Any = cl.approximation(name, objective, labels=labels)
        curvature.update(objective.closure(p.x, p.y, "exact").observe(curvature.needs))
        for block in objective.blocks:
            here = found.sel(algorithm=name, block=block.name)
            M, B = exact(p, kind, block.name), curvature.blocks[block.name].matrix().dense()
            size, cosine = float(M.norm()), float((B * M).sum() / (B.norm() * M.norm()))
            of_B, of_M = torch.linalg.eigvalsh(B), torch.linalg.eigvalsh(M)
            expected = {
                "error": float((B - M).norm()) / size,
                "error_scaled": math.sqrt(1 - cosine**2),
                "cosine": cosine,
                "trace_ratio": float(B.trace() / M.trace()),
                "spectrum_error": float((of_B - of_M).norm()) / size,
                "largest_ratio": float(of_B[-1] / of_M[-1]),
            }
            for measure, value in expected.items():
                assert float(here[measure]) == pytest.approx(value, rel=1e-8, abs=1e-8), measure
            w = torch.arange(block.numel).view(block.shape)
            rest = M[w[:, :-1].flatten()[:, None], w[:, -1]]
            assert float(here["between"]) == pytest.approx(
                float(torch.cat([rest, rest]).norm()) / size, rel=1e-10
            )
            assert float(here["floor"]) == pytest.approx(
                nearest_kronecker(M, *block.shape).error, rel=1e-10, abs=1e-12
            )
    assert float(found["scale"].max()) == 1


@pytest.mark.parametrize("model", SUMS)
@pytest.mark.parametrize("kind", ["fisher", "fisher-mc", "ef"])
def test_kfac_is_all_assumptions_at_once(model: str, kind: Kind) -> None:
    """Two routes to one number: the algorithm's own statistics, and (3.9)."""
    p = problem(model)
    total = errors(p.objective(), p.x, p.y, kind)["total"]
    found = quality(p.objective(), p.x, p.y, ["kfac"], kind, spectra=False)
    np.testing.assert_allclose(found["error"].sel(algorithm="kfac"), total, rtol=1e-10, atol=1e-12)
    assert bool((found["floor"] <= found["error_scaled"] + 1e-12).all())
    assert bool((found["error_scaled"] <= found["error"] + 1e-12).all())


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("kind", ["ggn", "fisher", "fisher-mc", "ef"])
def test_kfac_is_exact_for_one_example(likelihood: str, kind: Kind) -> None:
    p = problem("tanh", likelihood, n=1)
    found = quality(p.objective(), p.x, p.y, ["kfac"], kind)
    assert float(found["error"].max()) < 1e-12
    assert float(found["spectrum_error"].max()) < 1e-12


@pytest.mark.parametrize("kind", ["hessian", "ggn", "fisher"])
def test_kfac_is_exact_in_a_deep_linear_network(kind: Kind) -> None:
    p = deep_linear()
    found = quality(p.objective(), p.x, p.y, ["kfac"], kind)
    for measure in ("error", "error_scaled", "spectrum_error", "floor"):
        assert float(found[measure].max()) < 1e-12
    for measure in ("cosine", "trace_ratio", "largest_ratio"):
        np.testing.assert_allclose(found[measure], 1, rtol=1e-12)


@pytest.mark.parametrize(
    ("name", "kind"),
    [("block-fisher", "fisher"), ("block-fisher", "fisher-mc"), ("smw-ng-bd", "ef")],
)
@pytest.mark.parametrize("model", SUMS)
@pytest.mark.parametrize("damping", [0.0, 0.1])
def test_the_dense_methods_are_the_block_itself(
    name: str, kind: Kind, model: str, damping: float
) -> None:
    p = problem(model)
    found = quality(p.objective(), p.x, p.y, [name], kind, damping=damping)
    assert float(found["error"].max()) < 1e-12
    if damping:
        np.testing.assert_allclose(found["smallest_ratio"], 1, rtol=1e-10)


@pytest.mark.thinned(2)
@pytest.mark.parametrize("model", SUMS)
@pytest.mark.parametrize("kind", ["hessian", "fisher", "ef"])
def test_spectra_are_no_further_apart_than_the_matrices(model: str, kind: Kind) -> None:
    """Hoffman and Wielandt 1953: ‖λ(B) − λ(M)‖ ≤ ‖B − M‖."""
    p = problem(model)
    found = quality(p.objective(), p.x, p.y, NAMES, kind)
    assert bool((found["spectrum_error"] <= found["error"] + 1e-12).all())
    assert bool((found["cosine"] <= 1 + 1e-12).all())
    np.testing.assert_allclose(
        found["error_scaled"], np.sqrt((1 - found["cosine"] ** 2).clip(0)), rtol=1e-6, atol=1e-7
    )


@pytest.mark.parametrize("kind", ["fisher", "fisher-mc", "ef"])
def test_the_floor_and_what_weight_and_bias_share_are_bounds(kind: Kind) -> None:
    """No product is nearer than the floor: KFAC; TNT too where there is no bias. With one, TNT
    leaves `between` out.
    """
    p = deep_linear(bias=False)
    p = Problem(
        nn.Sequential(p.model[0], nn.Tanh(), p.model[1], nn.Tanh(), p.model[2]),
        p.likelihood,
        p.x,
        p.y,
    )
    found = quality(p.objective(), p.x, p.y, ["kfac", "tnt", "tnt-per-sample", "shampoo"], kind)
    assert bool((found["between"] == 0).all())
    assert bool((found["error_scaled"] >= found["floor"] - 1e-12).all())
    assert float(found["floor"].max()) > 1e-3
    p = problem("tanh")
    found = quality(p.objective(), p.x, p.y, ["tnt", "tnt-per-sample", "shampoo", "adam"], kind)
    assert bool((found["error_scaled"] >= found["between"] - 1e-12).all())


def test_tnt_of_single_examples_is_tnt_per_sample() -> None:
    """Minibatches of one example at the data's labels: the mean gradient is the example's."""
    p = problem("tanh")
    found = quality(
        p.objective(), p.x, p.y, ["tnt", "tnt-per-sample"], "ef", minibatches=7, passes=2
    )
    one, other = (
        found.sel(algorithm=name, drop=True).drop_vars("scale")
        for name in ("tnt", "tnt-per-sample")
    )
    xr.testing.assert_allclose(one, other, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(found["trace_ratio"], 1, rtol=1e-10)


def test_tnt_of_minibatches_has_no_bias() -> None:
    """E tr(B) = tr(Fisher), also where minibatches differ in size (7 = 3 + 2 + 2): within 5
    standard errors over 60 seeds.
    """
    p = problem("tanh")
    traces = []
    for seed in range(60):
        found = quality(
            p.objective(seed), p.x, p.y, ["tnt"], minibatches=3, passes=4, spectra=False
        )
        traces.append(found["trace_ratio"].values[0])
    assert float(found["scale"][0]) == pytest.approx((9 + 4 + 4) / 7, rel=1e-14)
    mean, error = np.mean(traces, 0), np.std(traces, 0, ddof=1) / math.sqrt(60)
    assert bool((np.abs(mean - 1) < 5 * error).all())
    assert bool((error < 0.1).all())


@pytest.mark.parametrize("name", ["kfac", "tnt-per-sample", "tnt"])
def test_damped_is_what_the_method_inverts(name: str) -> None:
    """M + λI against the inverse of the inverse, TNT's times m."""
    p = problem("tanh")
    found = quality(p.objective(), p.x, p.y, [name], "ef", damping=0.2, minibatches=1, passes=1)
    objective = p.objective()
    curvature = cl.approximation(name, objective, labels="data", damping=damping_for(name, 0.2, 7))
    curvature.update(objective.closure(p.x, p.y).observe(curvature.needs))
    for block in objective.blocks:
        M = exact(p, "ef", block.name)
        M += 0.2 * torch.eye(len(M), dtype=M.dtype)
        B = curvature.inverse[block.name].inv().dense() * (7 if name == "tnt" else 1)
        here = found.sel(algorithm=name, block=block.name)
        assert float(here["error"]) == pytest.approx(float((B - M).norm() / M.norm()), rel=1e-9)
        lowest = float(torch.linalg.eigvalsh(B)[0] / torch.linalg.eigvalsh(M)[0])
        assert float(here["smallest_ratio"]) == pytest.approx(lowest, rel=1e-9)


def test_labels_of_their_own() -> None:
    """kfac-ef against the Fisher matrix: its own labels are the data's."""
    p = problem("tanh")
    own = quality(p.objective(), p.x, p.y, ["kfac-ef"], labels="own")
    same = quality(p.objective(), p.x, p.y, ["kfac-ef"], labels="kind")
    for block in p.objective().blocks:
        M = exact(p, "fisher", block.name)
        s = p.objective().closure(p.x, p.y).observe().passes["data"][block.name]
        B = torch.kron(s.G, s.A.contiguous())
        assert float(own["error"].sel(block=block.name)[0]) == pytest.approx(
            float((B - M).norm() / M.norm()), rel=1e-10
        )
    np.testing.assert_allclose(
        same["error"][0], errors(p.objective(), p.x, p.y)["total"], rtol=1e-10
    )


def test_zero_matrices_have_no_relative_error() -> None:
    """Π of a deep linear network."""
    p = deep_linear()
    found = quality(p.objective(), p.x, p.y, ["kfac"], "pi")
    for measure in (
        "error",
        "error_scaled",
        "cosine",
        "trace_ratio",
        "spectrum_error",
        "largest_ratio",
        "floor",
        "between",
    ):
        assert bool(found[measure].isnull().all()), measure
    assert bool(errors(p.objective(), p.x, p.y, "pi")["error"].isnull().all())


# ----------------------------------------------------------------------
# the data sets


@pytest.mark.parametrize("model", MODELS)
def test_data_sets_are_labelled_and_say_what_they_leave_out(model: str, tmp_path: Path) -> None:
    p = problem(model)
    objective = p.objective()
    for found in (errors(objective, p.x, p.y), quality(objective, p.x, p.y)):
        assert all(
            set(v.attrs) >= {"long_name", "units"} and v.attrs["units"] == "1"
            for v in found.data_vars.values()
        )
        blocks = {b.name: b for b in objective.blocks}
        used = [str(b) for b in found["block"].values]
        assert used == [b.name for b in fit(objective)]
        for name, block in blocks.items():
            assert (name in used) != (str(block) in found.attrs["skipped"])
        assert list(found["parameters"].values) == [", ".join(blocks[b].params) for b in used]
        assert list(found["order"].values) == [blocks[b].numel for b in used]
        assert found.attrs["examples"] == 7
        path = tmp_path / "found.nc"
        found.to_netcdf(path, engine="h5netcdf")
        xr.testing.assert_identical(xr.load_dataset(path, engine="h5netcdf"), found)


def test_places_are_said() -> None:
    p = problem("conv")
    assert list(errors(p.objective(), p.x, p.y)["places"].values) == [9, 5, 1]


def test_blocks_by_name_in_the_order_asked_for() -> None:
    p = problem("tanh")
    everything = errors(p.objective(), p.x, p.y, "hessian")
    some = errors(p.objective(), p.x, p.y, "hessian", blocks=["3", "1"])
    assert list(some["block"].values) == ["3", "1"]
    xr.testing.assert_allclose(some, everything.sel(block=["3", "1"]), rtol=1e-12)


def test_without_spectra() -> None:
    p = problem("tanh")
    full, short = (quality(p.objective(), p.x, p.y, spectra=s) for s in (True, False))
    assert set(full) - set(short) == {"spectrum_error", "largest_ratio", "smallest_ratio"}
    xr.testing.assert_equal(full[list(short)], short)


def test_looking_again_gives_the_same_and_moves_nothing() -> None:
    """Minibatches and labels come from the objective's seed; the labels of steps are not
    touched.
    """
    p = problem("conv-norm")
    before = {name: t.clone() for name, t in p.model.state_dict().items()}
    objective = p.objective(3)
    first = quality(objective, p.x, p.y)
    assert objective.closures["step"] == objective.closures["warm"] == 0
    xr.testing.assert_identical(first, quality(p.objective(3), p.x, p.y))
    assert not first["error"].equals(quality(p.objective(4), p.x, p.y)["error"])
    assert all(torch.equal(t, before[name]) for name, t in p.model.state_dict().items())


def test_float32_agrees() -> None:
    one, other = (
        quality(q.objective(), q.x, q.y, ["kfac", "tnt-per-sample"])
        for q in (problem("conv"), problem("conv", dtype=torch.float32))
    )
    for measure in ("error", "error_scaled", "cosine", "trace_ratio", "floor", "between"):
        np.testing.assert_allclose(one[measure], other[measure], rtol=1e-4, atol=1e-6)
    assert (one.attrs["dtype"], other.attrs["dtype"]) == ("float64", "float32")


# ----------------------------------------------------------------------
# bad input


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"algorithms": ["kfak"]}, r"unknown algorithm 'kfak'; did you mean 'kfac'\?"),
        ({"algorithms": []}, "there is no algorithm to compare"),
        (
            {"algorithms": ["sgd-m"]},
            "'sgd-m' estimates no matrix, so there is nothing to compare: leave it out",
        ),
        (
            {"algorithms": ["k-bfgs"]},
            "'k-bfgs' estimates no matrix, so there is nothing to compare: leave it out",
        ),
        (
            {"algorithms": ["block-hessian"]},
            "'block-hessian' reads no statistics of a pass, so there is nothing to compare",
        ),
        ({"kind": "hesian"}, "unknown kind of matrix 'hesian'"),
        ({"blocks": ["7"]}, "unknown block '7'"),
        ({"blocks": []}, "no block is a sum of Kronecker products: none was named"),
        ({"damping": -1.0}, "damping must be 0 or positive"),
        ({"labels": "mine"}, "unknown choice of labels 'mine'"),
        ({"minibatches": 0}, "minibatches must be 1 or more, not 0"),
        ({"passes": 0}, "passes must be 1 or more, not 0"),
    ],
)
def test_bad_arguments(options: dict[str, Any], says: str) -> None:
    p = problem("tanh")
    with pytest.raises(cl.CurvlabError, match=says):
        quality(p.objective(), p.x, p.y, **options)


def test_a_model_without_a_block_that_fits() -> None:
    net = nn.Sequential(nn.LayerNorm(3)).double()
    x = torch.randn(4, 3).double()
    for measure in (errors, quality):
        with pytest.raises(
            cl.CurvlabError,
            match=r"no block is a sum of Kronecker products: block 1 .* has 3 groups",
        ):
            measure(cl.Objective(net, cl.likelihoods.Gaussian()), x, x)


def test_data_that_do_not_fit() -> None:
    p = problem("tanh")
    measures: tuple[Callable[..., object], ...] = (errors, quality)
    for measure in measures:
        with pytest.raises(cl.CurvlabError, match="label 5 is out of range"):
            measure(p.objective(), p.x, torch.full_like(p.y, 5))
        with pytest.raises(cl.CurvlabError, match="the inputs contain NaN"):
            measure(p.objective(), p.x * math.nan, p.y)
        with pytest.raises(cl.CurvlabError, match="targets are missing"):
            measure(p.objective(), p.x, None)
        with pytest.raises(cl.CurvlabError, match="give tensors x and y, not a loader"):
            measure(p.objective(), [(p.x, p.y), (p.x, p.y)], None)


def test_blocks_larger_than_the_memory() -> None:
    net = nn.Sequential(nn.Linear(100_000, 4), nn.Tanh(), nn.Linear(4, 2))
    objective = cl.Objective(net, cl.likelihoods.Gaussian())
    x, y = torch.zeros(2, 100_000), torch.zeros(2, 2)
    for measure in (errors, quality):
        with pytest.raises(
            cl.CurvlabError,
            match=r'dense matrices of block 1 .* would need .*; leave it out: blocks=\["2"',
        ):
            measure(objective, x, y)
        assert list(measure(objective, x, y, blocks=["2"])["block"].values) == ["2"]
