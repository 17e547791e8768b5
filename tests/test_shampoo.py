"""Shampoo: roots by eigendecomposition, and the exponents of Alg. 16."""

from __future__ import annotations

import pytest
import torch
from problems import MODELS, as_a_variable, batches, problem
from torch import Tensor

import curvlab as cl
from curvlab.algorithms import approximation
from curvlab.curvature.shampoo import ROOTS, shampoo, shampoo_factors
from curvlab.layers import Block
from curvlab.statistics import LayerStatistics

EPSILON = 3e-4


def power(matrix: Tensor, exponent: float, epsilon: float = EPSILON) -> Tensor:
    """(M + εI)^exponent through the eigendecomposition."""
    e, q = torch.linalg.eigh(matrix)
    return (q * (e.clamp_min(0) + epsilon) ** exponent) @ q.T


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float(torch.linalg.matrix_norm(found - expected) / torch.linalg.matrix_norm(expected))


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("model", ["tanh", "tokens"])
def test_weights_have_the_fourth_root_and_biases_the_second(model: str, steps: int) -> None:
    """k = 2: −1/4 for each factor; k = 1: −1/2. Statistics are the running mean of mean gradients'
    contractions.
    """
    p = problem(model)
    objective = p.objective()
    curvature = approximation("shampoo", objective, damping=EPSILON)
    gradients: dict[str, list[Tensor]] = {block.name: [] for block in objective.blocks}
    for x, y in batches(p, steps):
        observation = objective.closure(x, y).observe(curvature.needs)
        curvature.update(observation)
        for name, gradient in observation.gradients.items():
            gradients[name].append(gradient)
    for block in objective.blocks:
        seen = torch.stack(gradients[block.name])
        w, b = seen[..., :-1], seen[..., -1]
        weight = torch.kron(power((w @ w.mT).mean(0), -1 / 4), power((w.mT @ w).mean(0), -1 / 4))
        bias = power(b.T @ b / steps, -1 / 2)
        found = curvature.inverse[block.name].dense()
        places = torch.arange(block.numel).view(block.shape)
        at_w, at_b = places[:, :-1].flatten(), places[:, -1]
        assert relative_error(found[at_w[:, None], at_w], weight) < 1e-6
        assert relative_error(found[at_b[:, None], at_b], bias) < 1e-6
        assert not bool(found[at_w[:, None], at_b].any())


def root_of_ways(gradient: Tensor, epsilon: float = EPSILON) -> Tensor:
    """⊗ᵢ (G^(i) + εI)^{−1/2k} of one gradient of k ways."""
    expected = torch.ones(1, 1, dtype=torch.float64)
    for way in range(gradient.ndim):
        matrix = gradient.movedim(way, 0).reshape(gradient.shape[way], -1)
        expected = torch.kron(expected, power(matrix @ matrix.T, -1 / (2 * gradient.ndim), epsilon))
    return expected


@pytest.mark.parametrize("model", MODELS)
def test_every_parameter_is_a_variable_in_its_own_shape(model: str) -> None:
    """Filters have three ways, outputs, inputs and pixels (4.7.2), a norm's weight has one, an
    embedding two.
    """
    p = problem(model)
    objective = p.objective()
    curvature = approximation("shampoo", objective, damping=0.01)
    curvature.update(objective.closure(p.x, p.y).observe(curvature.needs))
    gradients = torch.autograd.grad(
        p.likelihood.loss(p.model(p.x), p.y).mean(), list(objective.parameters.values())
    )
    generator = torch.Generator().manual_seed(0)
    vectors = {
        n: torch.randn(w.shape, generator=generator, dtype=w.dtype)
        for n, w in objective.parameters.items()
    }
    found = curvature.precondition(vectors)
    for (parameter, vector), gradient in zip(vectors.items(), gradients, strict=True):
        expected = root_of_ways(as_a_variable(gradient), 0.01) @ vector.flatten()
        assert float((found[parameter].flatten() - expected).norm() / expected.norm()) < 1e-6


@pytest.mark.parametrize("shape", [(3,), (3, 4), (2, 3, 4), (2, 3, 2, 2), (2, 1, 2, 3, 2)])
def test_the_exponent_is_one_over_twice_the_number_of_ways(shape: tuple[int, ...]) -> None:
    """A parameter without a rule."""
    gradient = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    block = Block("1", ("w",), shape, None)
    curvature = shampoo(block)
    curvature.update(LayerStatistics(block, 1, gradient=gradient), 1.0)
    curvature.refresh(EPSILON)
    assert relative_error(curvature.inverse.dense(), root_of_ways(gradient)) < 1e-6


def test_a_zero_gradient_leaves_the_damping_alone() -> None:
    """ε^{−1/2k} for every factor, so ε^{−1/2} for a variable of any number of ways."""
    p = problem("tanh", "gaussian")
    objective = p.objective()
    curvature = approximation("shampoo", objective, damping=0.01)
    # targets are met
    curvature.update(objective.closure(p.x, p.model(p.x).detach()).observe(curvature.needs))
    for block in objective.blocks:
        expected = 10 * torch.eye(block.numel, dtype=torch.float64)
        torch.testing.assert_close(
            curvature.inverse[block.name].dense(), expected, rtol=1e-6, atol=1e-6
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("ways", [1, 2, 3])
def test_ill_conditioned_statistics_give_the_root_that_the_precision_allows(
    dtype: torch.dtype, ways: int
) -> None:
    """Condition 10⁵: a relative error of at most κ · eps, and of Newton's 1e-6."""
    q = torch.linalg.qr(
        torch.randn(6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ).Q
    statistic = (q * 10.0 ** torch.arange(-4, 2, dtype=torch.float64)) @ q.T
    expected = power(statistic, -1 / (2 * ways), 1e-7)
    for root in (
        r for way in ROOTS for r in shampoo_factors([statistic.to(dtype)] * ways, 1e-7, way)
    ):
        assert root.dtype == dtype
        assert relative_error(root.double(), expected) < max(1e-6, 1e5 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("size", [1e2, 1e4, 1e6])
@pytest.mark.parametrize("ways", [1, 2])
def test_statistics_beyond_single_precision_give_a_positive_definite_root(
    size: float, ways: int
) -> None:
    """Rounding puts eigenvalues of Ĝ + εI below ε, even below 0, where ‖g‖² eps > ε. They are at
    least ε: H ≤ ε^{−1/2k}.

    H is positive definite up to the rounding of its own entries: a root in single precision is no
    better than eps ‖H‖.
    """
    gradient = size * torch.randn(
        8, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float32
    )
    statistic = gradient[:, :2] @ gradient[:, :2].T  # rank 2
    for way in ROOTS:
        root, *_ = shampoo_factors([statistic] * ways, EPSILON, way)
        eigenvalues = torch.linalg.eigvalsh(root.double())
        assert float(eigenvalues[0]) > -torch.finfo(torch.float32).eps * float(eigenvalues[-1])
        assert float(eigenvalues[-1]) < 1.01 * EPSILON ** (-1 / (2 * ways))


def test_statistics_that_are_not_finite_are_an_error() -> None:
    with pytest.raises(cl.CurvlabError, match="Shampoo statistic contains NaN or Inf"):
        shampoo_factors([torch.full((2, 2), torch.inf)], EPSILON)
