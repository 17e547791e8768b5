"""Bounds: measured eigenvalues and norms respect the lemmas; where a lemma fails, an example."""

from __future__ import annotations

import math
from typing import cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import normal
from torch import Tensor

from curvlab.linalg import bfgs as qn
from curvlab.linalg import bounds
from curvlab.linalg.kronecker import tensor_normal_factors
from curvlab.linalg.lbfgs import empty_memory, lbfgs_inverse, multiple_of_identity
from curvlab.linalg.operators import Operator

MANY = settings(deadline=None, max_examples=40)
SEEDS = st.integers(0, 9999)
MU1 = st.floats(0.02, 0.95)
DOUBLE = torch.float64


def ends(H: Operator) -> tuple[float, float]:
    values = H.eigvalsh()
    return float(values[0]), float(values[-1])


def norms(H: Tensor) -> tuple[float, float]:
    """‖B‖ and ‖H‖."""
    values = torch.linalg.eigvalsh(H)
    return 1 / float(values[0]), float(values[-1])


@MANY
@given(
    st.integers(1, 6),
    st.integers(1, 4),
    st.integers(1, 5),
    st.floats(0.01, 3),
    st.floats(1e-3, 10),
    SEEDS,
)
def test_inputs(n: int, places: int, inputs: int, phi: float, damping: float, seed: int) -> None:
    """Thesis Lemma 1 and (3.17), of a moving average of second moments with a bias column."""
    found = bounds.input_factor(inputs + 1, phi, damping, places)
    A = torch.zeros(inputs + 1, inputs + 1, dtype=DOUBLE)
    for k in range(3):
        a = phi * torch.tanh(5 * normal(n, places, inputs, seed=seed + k))
        a = torch.cat([a, torch.ones(n, places, 1, dtype=DOUBLE)], 2).flatten(0, 1)
        A = 0.9 * A + (0.1 if k else 1.0) * (a.T @ a / n)
    values = torch.linalg.eigvalsh(
        torch.linalg.inv(A + damping * torch.eye(inputs + 1, dtype=DOUBLE))
    )
    assert found.hold(float(values[0]), float(values[-1]))


def test_input_bound_is_reached() -> None:
    a = torch.ones(1, 4, dtype=DOUBLE) * 2
    a[:, -1] = 1
    values = torch.linalg.eigvalsh(torch.linalg.inv(a.T @ a + 0.5 * torch.eye(4, dtype=DOUBLE)))
    found = bounds.input_factor(4, 2.0, 0.5)
    assert (found.lower, found.upper) == pytest.approx(
        (float(values[0]), float(values[-1])), rel=1e-12
    )


@MANY
@given(st.integers(1, 6), SEEDS, MU1, st.floats(0.02, 1))
def test_one_step_of_double_damping(order: int, seed: int, mu1: float, mu2: float) -> None:
    """(2.8) and (2.10), where both inequalities hold."""
    H = normal(order, order, seed=seed)
    H = H @ H.T + 0.05 * torch.eye(order, dtype=DOUBLE)
    pair = qn.accept(
        qn.double_damping(normal(order, seed=seed + 1), normal(order, seed=seed + 2), H, mu1, mu2),
        mu1=mu1,
    )
    if not pair.skipped:
        largest = bounds.double_damping_step(*norms(H), mu1, mu2)
        found = norms(qn.bfgs_inverse(H, pair.s, pair.y))
        assert found[0] <= largest[0] * (1 + 1e-8)
        assert found[1] <= largest[1] * (1 + 1e-8)


@MANY
@given(st.integers(1, 6), st.integers(1, 5), SEEDS, MU1, st.floats(0.02, 1))
def test_lemma_2_as_long_as_no_pair_was_dropped(
    order: int, p: int, seed: int, mu1: float, mu2: float
) -> None:
    H0 = multiple_of_identity(1.0, normal(order))
    H: Operator = H0
    memory = empty_memory(p, normal(order))
    for k in range(p):
        s, y = normal(order, seed=seed + 2 * k), normal(order, seed=seed + 2 * k + 1)
        pair = qn.accept(qn.double_damping(s, y, H, mu1, mu2), mu1=mu1)
        if not pair.skipped:
            memory = memory.append(pair.s, pair.y)
            H = lbfgs_inverse(memory, H0)
    assert bounds.double_damping_lbfgs(p, mu1, mu2).hold(*ends(H), slack=1e-6)


def test_lemma_2_fails_once_pairs_are_dropped() -> None:
    """y along the least eigenvalue of H, s = μ₁ (yᵀHy / yᵀy) y: neither damped nor skipped, and H
    shrinks without bound.

    The second pair alone already breaks the bound of p = 1: the test was made with an H that the
    dropped pair had shrunk.
    """
    mu1, mu2 = 0.2, 0.5
    e = torch.tensor([1.0, 0.0], dtype=DOUBLE)
    H0 = multiple_of_identity(1.0, e)
    H: Operator = H0
    memory = empty_memory(1, e)
    for k in range(1, 6):
        s = mu1 * (1 + 1e-9) * float(e @ (H @ e)) * e
        pair = qn.accept(qn.double_damping(s, e, H, mu1, mu2), mu1=mu1)
        assert (pair.skipped, pair.damping.theta1) == ("", 1)
        memory = memory.append(pair.s, pair.y)
        H = lbfgs_inverse(memory, H0)
        assert ends(H)[0] <= mu1**k * (1 + 1e-6)
        assert bounds.double_damping_lbfgs(1, mu1, mu2).hold(*ends(H)) == (k == 1)


@MANY
@given(st.integers(1, 6), SEEDS, MU1, st.floats(0.02, 10))
def test_lemma_5(order: int, seed: int, mu1: float, mu2: float) -> None:
    H = normal(order, order, seed=seed)
    H = H @ H.T + 0.05 * torch.eye(order, dtype=DOUBLE)
    pair = qn.scaled_identity_levenberg(
        normal(order, seed=seed + 1), normal(order, seed=seed + 2), H, mu1, mu2
    )
    largest = bounds.damped_step(*norms(H), mu2, bounds.mu3(mu1, mu2))
    found = norms(qn.bfgs_inverse(H, pair.s, pair.y))
    assert found[0] <= largest[0] * (1 + 1e-7)
    assert found[1] <= largest[1] * (1 + 1e-7)


@MANY
@given(
    st.integers(1, 6),
    st.integers(1, 4),
    st.integers(0, 6),
    SEEDS,
    MU1,
    st.floats(0.05, 10),
    st.sampled_from([None, 1.0]),
)
def test_lemma_6_also_where_pairs_were_dropped(
    order: int, p: int, more: int, seed: int, mu1: float, mu2: float, initial: float | None
) -> None:
    H0 = multiple_of_identity(1 / mu2 if initial is None else initial, normal(order))
    memory = empty_memory(p, normal(order))
    for k in range(p + more):
        s, y = normal(order, seed=seed + 2 * k), normal(order, seed=seed + 2 * k + 1)
        pair = qn.scaled_identity_levenberg(s, y, H0, mu1, mu2, initial)
        memory = memory.append(pair.s, pair.y)
        assert bounds.damped_lbfgs(p, mu1, mu2, initial).hold(
            *ends(lbfgs_inverse(memory, H0)), slack=1e-6
        )


def test_lemmas_as_they_are_printed() -> None:
    """Lemma 2 and Lemma 6 with their constants written out; μ₁ = 0.2, λ = 0.1, two pairs."""
    mu1, mu2 = 0.2, math.sqrt(0.1)
    lower = (1 + 1 / mu1) ** -2
    mu_hat = (1 + 1 / math.sqrt(mu1 * mu2 * lower)) ** 2
    found = bounds.double_damping_lbfgs(2, mu1, mu2)
    assert (found.lower, found.upper) == pytest.approx(
        (lower, mu_hat**2 + (mu_hat**2 - 1) / (mu_hat - 1) / mu2), rel=1e-12
    )
    third = mu1 / (mu2 * (1 + 2 * mu1))
    mu_hat = (1 + 1 / math.sqrt(mu2 * third)) ** 2
    found = bounds.damped_lbfgs(2, mu1, mu2)
    upper = mu_hat**2 / mu2 + (mu_hat**2 - 1) / (mu_hat - 1) / mu2
    assert (found.lower, found.upper) == pytest.approx((1 / (mu2 + 2 / third), upper), rel=1e-12)


def test_bounds_of_a_kronecker_product_multiply() -> None:
    found = bounds.Bounds(0.5, 2.0) * bounds.Bounds(0.1, 3.0)
    assert (found.lower, found.upper) == (0.05, 6.0)


def test_a_hundred_pairs_have_a_bound_that_no_float_holds() -> None:
    assert bounds.double_damping_lbfgs(100, 0.2, 0.3).upper == math.inf
    assert bounds.double_damping_lbfgs(100, 0.2, 0.3).lower == pytest.approx(6.0**-100)


@MANY
@given(
    st.lists(st.integers(1, 4), min_size=1, max_size=3),
    st.integers(1, 6),
    st.floats(1e-3, 2),
    SEEDS,
)
def test_tensor_normal_factors_of_random_gradients(
    shape: list[int], n: int, damping: float, seed: int
) -> None:
    """Thesis Lemmas 9 and 10, contractions by a loop over slices."""
    G = normal(n, *shape, seed=seed)
    F = sum(torch.outer(g.flatten(), g.flatten()) for g in G) / n
    norm = float(torch.linalg.eigvalsh(F)[-1])
    contractions = []
    for i in range(len(shape)):
        each = [g.movedim(i, 0).reshape(shape[i], -1) for g in G]
        contractions.append(sum(m @ m.T for m in each) / n)
        assert float(torch.linalg.eigvalsh(contractions[-1])[-1]) <= bounds.contraction(
            shape, i, norm
        ) * (1 + 1e-9)
    matrix = torch.ones(1, 1, dtype=DOUBLE)
    for u in tensor_normal_factors(contractions):
        matrix = torch.kron(matrix, u + damping * torch.eye(len(u), dtype=DOUBLE))
    values = torch.linalg.eigvalsh(matrix)
    found = bounds.tensor_normal(shape, norm, damping)
    assert found.hold(float(values[0]), float(values[-1]))
    assert found.inverse.hold(1 / float(values[-1]), 1 / float(values[0]))


def test_lemma_9_and_10_are_reached() -> None:
    """By one way alone Lemma 10 is an equality where F is; by white gradients Lemma 9 is."""
    F = torch.eye(6, dtype=DOUBLE)
    G = F.view(6, 2, 3) * math.sqrt(6)
    contraction = sum(g @ g.T for g in G) / 6
    assert float(torch.linalg.eigvalsh(contraction)[-1]) == pytest.approx(
        bounds.contraction([2, 3], 0, 1.0), rel=1e-12
    )
    assert bounds.tensor_normal([6], 1.0, 0.5) == bounds.Bounds(
        0.5, cast(float, pytest.approx(1.5))
    )
