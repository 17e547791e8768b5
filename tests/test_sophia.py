"""Sophia-G: enumerated labels give the diagonal of the Gauss-Newton matrix; the clip. AdamW."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from problems import assert_near, batches, normal, problem
from torch import Tensor, nn

import curvlab as cl
from curvlab.algorithms import approximation, descent
from curvlab.curvature.sophia import SophiaG
from curvlab.layers import blocks
from curvlab.statistics import LayerStatistics


def gradient(objective: cl.Objective, x: Tensor, y: Tensor) -> Tensor:
    loss = objective.likelihood.loss(objective.model(x), y).mean()
    found = torch.autograd.grad(loss, list(objective.parameters.values()))
    return objective.layout.flatten(dict(zip(objective.parameters, found, strict=True)))


@pytest.mark.parametrize("model", ["tanh", "tokens"])
def test_enumerated_labels_give_the_diagonal_of_the_gauss_newton_matrix(model: str) -> None:
    """Σ p(ŷ) N ĝ ⊙ ĝ over all 3ᴺ labels of N = 3 examples, each folded in by the block itself."""
    p = problem(model, n=3)
    objective = p.objective()
    probabilities = p.model(p.x).detach().softmax(1)
    found: dict[str, Any] = dict.fromkeys((b.name for b in objective.blocks), 0.0)
    for labels in itertools.product(range(3), repeat=3):
        y = torch.tensor(labels)
        likely = float(probabilities[torch.arange(3), y].prod())
        observation = objective.closure(p.x, y).observe({"data"})
        for name in found:
            block = SophiaG()
            block.update(observation.passes["data"][name], 1.0)
            found[name] = found[name] + likely * block.matrix().diag()
    for name, h in found.items():
        F = cl.exact.matrix(objective, p.x, p.y, kind="ggn", block=name).dense()
        assert_near(h, F.diagonal(), 1e-12)


def test_its_matrix_on_average_over_draws() -> None:
    """By the pass "model" itself: labels="model" is the default, the scale that of Fisher."""
    p = problem("linear")
    objective = p.objective()
    curvature: Any = approximation("sophia-g", objective, decay=0.995)
    for _ in range(300):
        curvature.update(objective.closure(p.x, p.y).observe(curvature.needs))
    F = cl.exact.matrix(objective, p.x, p.y, kind="ggn", block="1").dense()
    found = curvature.blocks["1"].matrix().diag()
    assert float((found / F.diagonal() - 1).abs().mean()) < 0.2


@pytest.mark.parametrize("rho", [0.04, 1.0])
def test_the_trajectory_by_hand(rho: float) -> None:
    """h ← .99 h + .01 N ĝ², every third step; m ← EMA(g; .965); W ← W − η (clip(m / ρh) + γ W)."""
    p, lr, decay = problem("tanh"), 1e-2, 0.1
    objective = p.objective()
    optimizer = cl.optimizer("sophia-g", objective, lr=lr, rho=rho, update_every=3, labels="data")
    h = m = torch.zeros(len(objective.layout), dtype=torch.float64)
    w = objective.layout.flatten({n: t.detach() for n, t in objective.parameters.items()})
    clipped = 0
    for k, (x, y) in enumerate(batches(p, 8), 1):
        g = gradient(objective, x, y)
        if k == 1 or k % 3 == 0:
            h = 0.99 * h + 0.01 * len(x) * g.square()
        m = 0.965 * m + 0.035 * g
        ratio = m.abs() / (rho * h + 1e-15)
        clipped += int((ratio > 1).sum())
        w = w * (1 - lr * decay) - lr * m.sign() * ratio.clamp_max(1)
        optimizer.step(objective.closure(x, y))
        now = objective.layout.flatten({n: t.detach() for n, t in objective.parameters.items()})
        assert_near(now, w, 1e-12)
    assert 0 < clipped < 8 * len(w) or rho == 0.04


def test_the_two_ends_of_rho() -> None:
    """ρ → 0 is sign descent, ρ → ∞ damped diagonal Newton, over ρ."""
    block = blocks(nn.Linear(3, 2).double())[0]
    g, m = normal(2, 4, seed=1), normal(2, 4, seed=2)
    for rho in (1e-12, 1e12):
        sophia = SophiaG(rho)
        sophia.update(LayerStatistics(block, 5, gradient=g), 1.0)
        sophia.refresh(0.1)
        sophia.heed(m, 0.1)
        found = (sophia.inverse @ m.flatten()).view(2, 4)
        expected = m.sign() if rho < 1 else m / (5 * g.square() + 0.1) / rho
        assert_near(found, expected, 1e-13)


@pytest.mark.parametrize("rho", [0.0, -1.0, math.nan])
def test_rho_is_above_zero(rho: float) -> None:
    with pytest.raises(cl.CurvlabError, match=r"rho( of sophia-g)? must be"):
        approximation("sophia-g", problem("tanh").objective(), rho=rho)


@pytest.mark.parametrize("model", ["tanh", "conv-norm", "embedding"])
def test_adamw_is_torchs_by_its_defaults(model: str) -> None:
    p, q = problem(model), problem(model)
    objective = p.objective()
    ours = cl.optimizer("adamw", objective)
    theirs = torch.optim.AdamW(q.model.parameters())
    for x, y in batches(p, 12):
        ours.step(objective.closure(x, y))
        theirs.zero_grad()
        q.likelihood.loss(q.model(x), y).mean().backward()
        theirs.step()
    for one, two in zip(p.model.parameters(), q.model.parameters(), strict=True):
        assert_near(one.detach(), two.detach(), 1e-11)


def test_a_documents_weight_decay_is_a_default_and_none_of_a_comparison() -> None:
    p = problem("tanh")
    objective = p.objective()
    assert descent("adamw", objective).weight_decay == 0.01
    assert descent("adamw", objective, weight_decay=0.0).weight_decay == 0.0
    assert descent("adam", objective).weight_decay == 0.0
    runs = [
        cl.compare(
            problem("tanh").objective(),
            batches(p, 3),
            reference=name,
            algorithms=[],
            lr=0.01,
            damping=0.1,
            progress=False,
        )
        for name in ("adam", "adamw")
    ]
    assert runs[0].dataset["loss"].values.tolist() == runs[1].dataset["loss"].values.tolist()
