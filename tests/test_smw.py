"""SMW-NG by block: an N×N system that must be the dense solve, to rounding."""

from __future__ import annotations

import pytest
import torch
from problems import RULED, batches, problem
from torch import Tensor

from curvlab.algorithms import approximation
from curvlab.linalg.operators import LowRank
from curvlab.objective import Pass

LABELS: list[Pass] = ["data", "model", "exact"]


def random_like(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(8), dtype=torch.float64)


@pytest.mark.parametrize("labels", LABELS)
@pytest.mark.parametrize("model", RULED)
@pytest.mark.parametrize("damping", [1e-3, 1.0])
def test_direction_is_the_dense_solve(model: str, labels: Pass, damping: float) -> None:
    """(λI + (1/N) Σ vec vecᵀ) p = v with the rows of the pass, stacked and solved as a dense system (thesis (5.6))."""
    p = problem(model)
    objective = p.objective()
    curvature = approximation("smw-ng-bd", objective, labels=labels, damping=damping)
    observation = objective.closure(p.x, p.y).observe(curvature.needs)
    curvature.update(observation)
    for block in objective.blocks:
        rows = observation.passes[labels][block.name].rows.reshape(-1, block.numel)
        damped = rows.T @ rows / len(p.x) + damping * torch.eye(block.numel, dtype=torch.float64)
        vector = random_like(block.shape)
        found = curvature.precondition({block.name: vector})[block.name]
        torch.testing.assert_close(found.flatten(), torch.linalg.solve(damped, vector.flatten()), rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(curvature.inverse[block.name].inv().dense(), damped, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("labels", LABELS)
@pytest.mark.parametrize("model", RULED)
@pytest.mark.parametrize("n", [1, 7, 40])
def test_is_the_block_fisher_of_one_minibatch(model: str, labels: Pass, n: int) -> None:
    """Also where there are more rows than parameters (n = 40), and where the passes sum over V and T."""
    p = problem(model, n=n)
    objective = p.objective()
    smw, dense = (approximation(name, objective, labels=labels, damping=0.01) for name in ("smw-ng-bd", "block-fisher"))
    observation = objective.closure(p.x, p.y).observe(smw.needs)
    for curvature in (smw, dense):
        curvature.update(observation)
    for name, inverse in smw.inverse.items():
        torch.testing.assert_close(inverse.dense(), dense.inverse[name].dense(), rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(inverse.eigvalsh(), dense.inverse[name].eigvalsh(), rtol=1e-10, atol=1e-10)


def test_remembers_the_last_minibatch_alone() -> None:
    p = problem("tanh")
    objective = p.objective()
    curvature, fresh = (approximation("smw-ng-bd", objective, damping=0.01) for _ in range(2))
    for x, y in batches(p, 3):
        observation = objective.closure(x, y).observe(curvature.needs)
        curvature.update(observation)
    fresh.update(observation)
    for name, inverse in curvature.inverse.items():
        assert torch.equal(inverse.dense(), fresh.inverse[name].dense())


def test_one_place_forms_no_gradients() -> None:
    """At T = 1, V = 1 the rows stay factored, g and a: N (O + I) numbers in place of N O I."""
    p = problem("tanh")
    objective = p.objective()
    curvature = approximation("smw-ng-bd", objective, damping=0.01)
    curvature.update(objective.closure(p.x, p.y).observe(curvature.needs))
    operator = curvature.inverse["1"].inv()
    assert isinstance(operator, LowRank)
    assert operator.rows.g.shape == (7, 4)
    assert operator.rows.a is not None
    assert operator.rows.a.shape == (7, 6)
