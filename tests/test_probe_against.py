"""Probes against the exact matrices, the noise of gradients, what methods hold: by dense autograd
and one example at a time.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import xarray as xr
from problems import batches, grad_of, problem
from torch import Tensor, nn

import curvlab as cl
from curvlab.observation import Observation
from curvlab.probes import PROBES, Frame, against_exact
from curvlab.probes.base import sample


def small() -> tuple[cl.Objective, Tensor, Tensor]:
    """15 parameters: fewer than Lanczos takes steps."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        model = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 3)).double()
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(20, 2, generator=draw, dtype=torch.float64)
    return (
        cl.Objective(model, cl.likelihoods.Categorical(), l2=0.01),
        x,
        torch.randint(3, (20,), generator=draw),
    )


def by_hand(objective: cl.Objective, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Weights, gradient, GGN and Hessian of mean loss and L2 term in the layout's order: jacobians
    of the bare model.
    """
    W1, b1, W2, b2 = (p.detach() for p in objective.model.parameters())
    w = torch.cat(
        [torch.cat([W1, b1[:, None]], 1).flatten(), torch.cat([W2, b2[:, None]], 1).flatten()]
    )

    def outputs(w: Tensor) -> Tensor:
        one, two = w[:6].view(2, 3), w[6:].view(3, 3)
        return torch.tanh(x @ one[:, :2].T + one[:, 2]) @ two[:, :2].T + two[:, 2]

    def loss(w: Tensor) -> Tensor:
        return F.cross_entropy(outputs(w), y) + 0.01 * w.square().sum()

    g = torch.autograd.functional.jacobian(loss, w)
    H = torch.autograd.functional.hessian(loss, w)
    J, q = torch.autograd.functional.jacobian(outputs, w), outputs(w).softmax(1)
    S = torch.diag_embed(q) - q[:, :, None] * q[:, None, :]
    ggn = torch.einsum("nci,ncd,ndj->ij", J, S, J) / len(x) + 0.02 * torch.eye(
        len(w), dtype=torch.float64
    )
    return w, g, ggn, H


def frame_of(
    algorithms: dict[str, dict[str, Any]], lr: float = 0.3
) -> tuple[Frame, dict[str, Any], Tensor, Tensor]:
    objective, x, y = small()
    curvatures = {
        name: cl.approximation(name, objective, **options) for name, options in algorithms.items()
    }
    now = objective.closure(x, y).observe({"data", "model", "exact"})
    for curvature in curvatures.values():
        curvature.update(now)
    directions = {name: c.precondition(now.gradients) for name, c in curvatures.items()}
    return Frame(0, now, directions, next(iter(algorithms)), lr, {}, curvatures), curvatures, x, y


def measured(name: str, frame: Frame) -> dict[str, np.ndarray]:
    assert PROBES[name].moment == "before"
    return {k: np.asarray(v) for k, v in sample([name], frame, "before")[name].items()}


def test_reduction_against_the_dense_model() -> None:
    names = {
        "kfac": {"damping": 0.1},
        "tnt": {"damping": 0.1},
        "sgd-m": {},
        "block-ggn": {"damping": 0.1},
    }
    frame, curvatures, x, y = frame_of(names)
    objective = frame.objective
    w, g, ggn, H = by_hand(objective, x, y)
    found = measured("reduction", frame)

    def loss(w: Tensor) -> float:
        one, two = w[:6].view(2, 3), w[6:].view(3, 3)
        z = torch.tanh(x @ one[:, :2].T + one[:, 2]) @ two[:, :2].T + two[:, 2]
        return float(F.cross_entropy(z, y) + 0.01 * w.square().sum())

    for i, name in enumerate(names):
        p = torch.cat([d.flatten() for d in frame.directions[name].values()])
        d = -0.3 * p
        assert found["reduction_actual"][i] == pytest.approx(loss(w) - loss(w + d), rel=1e-10)
        for j, B in ((1, ggn), (2, H)):
            assert found["reduction_predicted"][i, j] == pytest.approx(
                -float(g @ d + d @ B @ d / 2), rel=1e-10
            )
        if name == "sgd-m":
            assert np.isnan(found["rho"][i, 0])
            continue
        scale = len(x) if name == "tnt" else 1
        blocks = [scale * b.matrix().dense() for b in curvatures[name].blocks.values()]
        own = torch.block_diag(*blocks) + 0.02 * torch.eye(15, dtype=torch.float64)
        predicted = -float(g @ d + d @ own @ d / 2)
        assert found["reduction_predicted"][i, 0] == pytest.approx(predicted, rel=1e-10)
        assert found["rho"][i, 0] == pytest.approx((loss(w) - loss(w + d)) / predicted, rel=1e-9)


@pytest.mark.parametrize("name", ["smw-ng", "smw-gn", "hf", "lbfgs", "ssn", "s4qn", "full-ggn"])
def test_the_model_and_the_condition_of_a_method_of_the_whole_vector(name: str) -> None:
    """B = H⁻¹ − λI, H dense, after steps that have given pairs; the L2 term is in H."""
    objective, x, y = small()
    optimizer = cl.optimizer(name, objective, lr=0.3, damping=0.3)
    for _ in range(3):
        optimizer.step(objective.closure(x, y))
    curvature = optimizer.descent.curvature
    before = curvature.state_dict()
    seen: list[tuple[dict[str, np.ndarray], dict[str, np.ndarray]]] = []

    def look(observation: Observation, direction: dict[str, Tensor]) -> None:
        f = Frame(0, observation, {name: direction}, name, 0.3, {}, {name: curvature})
        work = dict(getattr(curvature, "work", {}))
        seen.append((measured("reduction", f), measured("condition", f)))
        assert dict(getattr(curvature, "work", {})) == work
        _, g, _, _ = by_hand(objective, x, y)
        p = torch.cat([d.flatten() for d in direction.values()])
        H = curvature.inverse["whole"].dense()
        lam = curvature.lam if hasattr(curvature, "lam") else curvature.damping
        B = torch.linalg.inv(H) - lam * torch.eye(15, dtype=H.dtype)
        assert float(seen[0][0]["reduction_predicted"][0, 0]) == pytest.approx(
            0.3 * float(g @ p) - 0.045 * float(p @ B @ p), rel=1e-8
        )
        values = torch.linalg.eigvalsh((H + H.mT) / 2)
        if name == "hf":
            assert np.isnan(seen[0][1]["condition"]).all()
        else:
            np.testing.assert_allclose(
                seen[0][1]["condition"], float(values[-1] / values[0]), rtol=1e-8
            )

    optimizer.look = look
    optimizer.step(objective.closure(x, y))
    assert len(seen) == 1
    assert before.keys() == curvature.state_dict().keys()


def test_a_tiny_step_is_foreseen_by_every_model() -> None:
    frame, *_ = frame_of({"kfac": {"damping": 0.1}, "block-fisher": {"damping": 0.1}}, lr=1e-6)
    np.testing.assert_allclose(measured("reduction", frame)["rho"], 1, atol=1e-5)


def test_ends_of_the_spectra_and_alignment_against_eigh(monkeypatch: pytest.MonkeyPatch) -> None:
    """The top 5: the tenth eigenvalue of this problem is one of several that are equal."""
    monkeypatch.setattr(against_exact, "TOP", 5)
    frame, _, x, y = frame_of({"kfac": {"damping": 0.1}, "sgd-m": {}})
    _, g, ggn, H = by_hand(frame.objective, x, y)
    spectrum, alignment = measured("spectrum", frame), measured("alignment", frame)
    for j, B in enumerate((ggn, H)):
        values, vectors = torch.linalg.eigh(B)
        assert spectrum["curvature_end"][j] == pytest.approx(
            [float(values[0]), float(values[-1])], rel=1e-9, abs=1e-12
        )
        assert (spectrum["curvature_end_error"][j] < 1e-8).all()
        top = vectors[:, -5:]
        for i, name in enumerate(("kfac", "sgd-m")):
            p = torch.cat([d.flatten() for d in frame.directions[name].values()])
            expected = float((top.T @ p).square().sum() / p.square().sum())
            assert alignment["alignment"][i, j] == pytest.approx(expected, rel=1e-9)
        assert alignment["gradient_alignment"][j] == pytest.approx(
            float((top.T @ g).square().sum() / g.square().sum()), rel=1e-6
        )


def test_error_is_that_of_the_dense_blocks() -> None:
    frame, curvatures, x, y = frame_of(
        {
            "kfac": {"damping": 0.1},
            "block-ggn": {"damping": 0.1},
            "tnt": {"damping": 0.1},
            "sgd-m": {},
        }
    )
    _, _, ggn, _ = by_hand(frame.objective, x, y)
    ggn = ggn - 0.02 * torch.eye(15, dtype=torch.float64)
    found = measured("error", frame)
    for j, part in enumerate((slice(0, 6), slice(6, 15))):
        exact = ggn[part, part]
        for i, name in enumerate(curvatures):
            if name == "sgd-m":
                assert np.isnan(found["matrix_error"][i, j])
                continue
            B = list(curvatures[name].blocks.values())[j].matrix().dense() * (
                20 if name == "tnt" else 1
            )
            assert found["matrix_error"][i, j] == pytest.approx(
                float((B - exact).norm() / exact.norm()), rel=1e-8, abs=1e-12
            )
            cosine = float((B * exact).sum() / B.norm() / exact.norm())
            assert found["matrix_cosine"][i, j] == pytest.approx(cosine, rel=1e-10)
            scaled = float((B * (cosine * exact.norm() / B.norm()) - exact).norm() / exact.norm())
            assert found["matrix_error_scaled"][i, j] == pytest.approx(scaled, rel=1e-6, abs=1e-7)
            assert found["matrix_trace_ratio"][i, j] == pytest.approx(
                float(B.trace() / exact.trace()), rel=1e-10
            )
            distance = torch.linalg.eigvalsh(B) - torch.linalg.eigvalsh(exact)
            assert found["matrix_spectrum_error"][i, j] == pytest.approx(
                float(distance.norm() / exact.norm()), rel=1e-8, abs=1e-12
            )
    assert (found["matrix_error"][1] < 1e-12).all()


@pytest.mark.parametrize(
    "model",
    ["tanh", "no-bias", "tokens", "conv", "groups", "conv-1d", "embedding", "norm", "conv-norm"],
)
def test_noise_from_the_gradients_of_one_example_at_a_time(model: str) -> None:
    p = problem(model)
    objective = p.objective()
    frame = Frame(
        0,
        objective.closure(p.x, p.y).observe(),
        {"x": {b.name: torch.zeros(b.shape) for b in objective.blocks}},
        "x",
        1.0,
    )
    found = measured("noise", frame)
    each = []
    for x, y in zip(p.x, p.y, strict=True):
        p.model.zero_grad()
        F.cross_entropy(p.model(x[None]), y[None]).backward()
        each.append({n: grad_of(q).clone() for n, q in objective.parameters.items()})
    totals = [0.0, 0.0]
    for j, block in enumerate(objective.blocks):
        if block.layer is None:
            assert np.isnan(found["gradient_variance"][j])
            continue
        rows = torch.stack([torch.cat([g[n].flatten() for n in block.params]) for g in each])
        trace = float(torch.cov(rows.T).trace())
        mean = float(rows.mean(0).square().sum())
        assert found["gradient_variance"][j] == pytest.approx(trace, rel=1e-10)
        assert found["gradient_signal"][j] == pytest.approx(mean - trace / 7, rel=1e-9, abs=1e-12)
        assert found["signal_to_noise"][j] == pytest.approx(mean * 7 / trace, rel=1e-9)
        totals = [totals[0] + trace, totals[1] + mean - trace / 7]
    assert float(found["noise_scale"]) == pytest.approx(totals[0] / totals[1], rel=1e-8)


def test_condition_and_memory() -> None:
    frame, curvatures, *_ = frame_of(
        {"kfac": {"damping": 0.1}, "block-fisher": {"damping": 0.1}, "adam": {}, "sgd-m": {}}
    )
    condition, held = (
        measured("condition", frame)["condition"],
        measured("memory", frame)["bytes_held"],
    )
    for i, curvature in enumerate(curvatures.values()):
        for j, inverse in enumerate(curvature.inverse.values()):
            values = torch.linalg.eigvalsh(inverse.dense())
            assert condition[i, j] == pytest.approx(float(values[-1] / values[0]), rel=1e-9)
    assert held[0] == 8 * 2 * (9 + 4 + 9 + 9)  # A and G of two layers and their inverses, float64
    assert held[3] <= 8 * 15  # I as a diagonal


def test_probes_leave_chance_buffers_and_the_run_alone_and_refuse_dropout(tmp_path: object) -> None:
    def run(*probes: str, layer: nn.Module) -> tuple[nn.Module, xr.Dataset]:
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore", cl.CurvlabWarning)
            torch.manual_seed(0)
            model = nn.Sequential(nn.Linear(5, 4), layer, nn.Tanh(), nn.Linear(4, 3)).double()
            data = batches(problem(), 4)
            ds = cl.train(
                cl.Objective(model, cl.likelihoods.Categorical()),
                data,
                algorithm="kfac",
                lr=0.05,
                damping=0.1,
                probes=probes,
            )
            return model, ds.dataset

    rerun = [f"{n}:1" for n in ("reduction", "spectrum", "alignment", "bounds", "noise")]
    bare, _ = run(layer=nn.BatchNorm1d(4))
    seen, ds = run(*rerun, layer=nn.BatchNorm1d(4))
    assert all(
        torch.equal(p, q)
        for p, q in zip(bare.state_dict().values(), seen.state_dict().values(), strict=True)
    )
    assert np.isfinite(ds["rho"].sel(model=["ggn", "hessian"]).values).all()
    bare, _ = run(layer=nn.Dropout(0.5))
    seen, _ = run("bounds:1", "noise:1", layer=nn.Dropout(0.5))
    assert all(
        torch.equal(p, q)
        for p, q in zip(bare.state_dict().values(), seen.state_dict().values(), strict=True)
    )
    for name in ("reduction", "spectrum", "alignment"):
        with pytest.raises(
            cl.CurvlabError, match=f"probe '{name}': the model draws random numbers"
        ):
            run(name, layer=nn.Dropout(0.5))
    with pytest.raises(cl.CurvlabError, match=r"probe 'error': .* normalises over the batch"):
        run("error", layer=nn.BatchNorm1d(4))
