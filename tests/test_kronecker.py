"""Kronecker products: Proposition 1, Lemma 8, contractions, tensor-normal factors (4.10), damping
splits, the nearest one.
"""

from __future__ import annotations

import math
from functools import reduce

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import assert_near, normal, spd
from torch import Tensor

from curvlab.errors import CurvlabError
from curvlab.linalg.kronecker import (
    kronecker_product,
    matricize,
    mode_contraction,
    nearest_kronecker,
    pi_split,
    places_split,
    tensor_normal_factors,
)

FEW = settings(deadline=None, max_examples=25)
SHAPES = st.lists(st.integers(1, 4), min_size=1, max_size=4)
SEEDS = st.integers(0, 999)


@FEW
@given(SHAPES, st.sampled_from([None, 1, 3]), SEEDS)
def test_proposition_1(shape: list[int], columns: int | None, seed: int) -> None:
    """(⊗ U_i) vec(V), by mode products, is the Kronecker matrix times the vector; no symmetry of
    U_i needed.
    """
    factors = [normal(d, d, seed=seed + i) for i, d in enumerate(shape)]
    v = normal(math.prod(shape), *([] if columns is None else [columns]), seed=seed + 9)
    matrix = torch.from_numpy(reduce(np.kron, [u.numpy() for u in factors]))
    assert_near(kronecker_product(factors, v), matrix @ v)


def test_proposition_1_entry_by_entry() -> None:
    """vec(V ×_1 U_1 ×_2 U_2 ×_3 U_3) with the mode products written out."""
    u1, u2, u3, v = (
        normal(2, 2),
        normal(3, 3, seed=1),
        normal(4, 4, seed=2),
        normal(2, 3, 4, seed=3),
    )
    expected = torch.einsum("ai,bj,ck,ijk->abc", u1, u2, u3, v).flatten()
    assert_near(kronecker_product([u1, u2, u3], v.flatten()), expected)


@FEW
@given(st.integers(1, 5), st.integers(1, 5), SEEDS)
def test_lemma_8_row_major(o: int, i: int, seed: int) -> None:
    """(H_g ⊗ H_a) vec(V) = vec(H_g V H_a) on the row-major flattening of an [O, I] matrix."""
    hg, ha, v = spd(o, seed), spd(i, seed + 1), normal(o, i, seed=seed + 2)
    assert_near(kronecker_product([hg, ha], v.flatten()), (hg @ v @ ha).flatten())
    assert_near(torch.kron(hg, ha) @ v.flatten(), (hg @ v @ ha).flatten())


@FEW
@given(SHAPES, SEEDS)
def test_contraction_entry_by_entry(shape: list[int], seed: int) -> None:
    """G^(i)[p, q] = Σ over the other ways of G[…p…] G[…q…], with matricize's columns in row-major
    order.
    """
    G = normal(*shape, seed=seed)
    for i, d in enumerate(shape):
        others = shape[:i] + shape[i + 1 :]
        places = list(np.ndindex(*others))
        unfolded = torch.tensor(
            [[G[(*at[:i], p, *at[i:])] for at in places] for p in range(d)], dtype=G.dtype
        )
        assert torch.equal(matricize(G, i), unfolded)
        expected = torch.stack(
            [torch.stack([(unfolded[p] * unfolded[q]).sum() for q in range(d)]) for p in range(d)]
        )
        assert_near(mode_contraction(G, i), expected)


@given(st.floats(1e-6, 1e3), st.integers(1, 1000))
def test_places_split(damping: float, places: int) -> None:
    """λ_A λ_G = λ, and both are the same of A / √T and √T G (thesis 3.4.3)."""
    for_a, for_g = places_split(damping, places)
    assert for_a * for_g == pytest.approx(damping, rel=1e-12)
    assert for_a / math.sqrt(places) == pytest.approx(math.sqrt(places) * for_g, rel=1e-12)
    assert places_split(damping, 1) == (math.sqrt(damping), math.sqrt(damping))


def test_contraction_of_a_matrix_and_of_a_vector() -> None:
    G, g = normal(3, 4), normal(4, seed=1)
    assert_near(mode_contraction(G, 0), G @ G.T)
    assert_near(mode_contraction(G, 1), G.T @ G)
    assert_near(mode_contraction(g, 0), torch.outer(g, g))


@FEW
@given(SHAPES, SEEDS, st.integers(1, 5))
def test_constant_trace_identity(shape: list[int], seed: int, samples: int) -> None:
    """All factors have the same mean eigenvalue c_0 = (E ‖G‖² / Π d_j)^{1/k}."""
    G = normal(samples, *shape, seed=seed)
    found = tensor_normal_factors(
        [torch.stack([mode_contraction(one, i) for one in G]).mean(0) for i in range(len(shape))]
    )
    c0 = float(G.square().mean()) ** (1 / len(shape))
    for u, d in zip(found, shape, strict=True):
        assert float(u.trace()) / d == pytest.approx(c0, rel=1e-12)


@FEW
@given(
    st.lists(st.integers(1, 4), min_size=1, max_size=3), SEEDS, st.sampled_from([1e-8, 1.0, 1e8])
)
def test_factors_of_a_tensor_normal_are_exact(shape: list[int], seed: int, scale: float) -> None:
    """From the exact E[G^(i)] = U_i Π_{j≠i} tr U_j the product of the factors is ⊗ U_i itself, at
    any scale.
    """
    factors = [scale * spd(d, seed + i) for i, d in enumerate(shape)]
    expectations = [
        u * math.prod(float(w.trace()) for j, w in enumerate(factors) if j != i)
        for i, u in enumerate(factors)
    ]
    found = tensor_normal_factors(expectations)
    assert_near(reduce(torch.kron, found), reduce(torch.kron, factors))
    for u, w in zip(found, factors, strict=True):
        assert_near(u / u.trace(), w / w.trace())


@pytest.mark.parametrize("shape", [(3,), (2, 3), (2, 3, 4)])
def test_zero_statistics_give_zero_factors(shape: tuple[int, ...]) -> None:
    for u in tensor_normal_factors([torch.zeros(d, d) for d in shape]):
        assert torch.equal(u, torch.zeros_like(u))


def test_factors_from_samples_of_a_matrix_normal() -> None:
    """Mean of 40 estimates within 5 of its standard errors of the truth; a standard error is below
    1 %.
    """
    u1, u2 = spd(3), spd(4, seed=1)
    size = math.sqrt(float(u1.trace()) / 3 * float(u2.trace()) / 4)
    # split so that both have the same mean eigenvalue
    truth = [u * size * len(u) / u.trace() for u in (u1, u2)]
    G = torch.linalg.cholesky(u1) @ normal(40, 2000, 3, 4, seed=2) @ torch.linalg.cholesky(u2).T
    estimates = [
        tensor_normal_factors(
            [torch.stack([mode_contraction(g, i) for g in part]).mean(0) for i in (0, 1)]
        )
        for part in G
    ]
    for i, expected in enumerate(truth):
        found = torch.stack([e[i] for e in estimates])
        error = found.std(0) / math.sqrt(len(found))
        assert bool(((found.mean(0) - expected).abs() <= 5 * error).all())
        assert float(error.norm() / expected.norm()) < 0.01


@FEW
@given(st.integers(1, 5), st.integers(1, 5), st.floats(1e-6, 1e3), SEEDS)
def test_pi_split(inputs: int, outputs: int, damping: float, seed: int) -> None:
    """Alg. 12, line 19, with the traces of the Kronecker products themselves."""
    A, G = spd(inputs, seed), 7 * spd(outputs, seed + 1)
    eye_g, eye_a = torch.eye(outputs, dtype=A.dtype), torch.eye(inputs, dtype=A.dtype)
    pi = math.sqrt(float(torch.kron(A, eye_g).trace() / torch.kron(eye_a, G).trace()))
    for_a, for_g = pi_split(A, G, damping)
    assert for_a == pytest.approx(pi * math.sqrt(damping), rel=1e-12)
    assert for_g == pytest.approx(math.sqrt(damping) / pi, rel=1e-12)
    assert for_a * for_g == pytest.approx(damping, rel=1e-12)


@pytest.mark.parametrize(("a", "g"), [(0.0, 1.0), (1.0, 0.0), (0.0, 0.0)])
def test_pi_is_one_where_a_trace_is_zero(a: float, g: float) -> None:
    assert pi_split(a * torch.eye(2), g * torch.eye(3), 0.25) == (0.5, 0.5)


# ------------------------------------------------------------------------------------- the nearest
# Kronecker product


def rearranged(matrix: Tensor, o: int, i: int) -> Tensor:
    """R[(o, o'), (i, i')] = M[(o, i), (o', i')], block by block (Van Loan and Pitsianis 1993)."""
    return torch.stack(
        [
            matrix[p * i : (p + 1) * i, q * i : (q + 1) * i].flatten()
            for p in range(o)
            for q in range(o)
        ]
    )


def skew(order: int, seed: int = 0) -> Tensor:
    m = normal(order, order, seed=seed)
    return m - m.T


@FEW
@given(
    st.integers(1, 6),
    st.integers(1, 6),
    st.sampled_from(["definite", "symmetric", "skew", "any"]),
    SEEDS,
)
def test_nearest_recovers_a_product(o: int, i: int, what: str, seed: int) -> None:
    """To rounding, and so does its error, which √(1 − σ₁²/‖M‖²) would leave at 1e-8."""
    build = {
        "definite": spd,
        "symmetric": lambda d, s: spd(d, s) - spd(d, s + 5),
        "skew": skew,
        "any": lambda d, s: normal(d, d, seed=s),
    }
    left, right = build[what](o, seed), build[what](i, seed + 1)
    matrix = torch.kron(left, right)
    found = nearest_kronecker(matrix, o, i)
    assert_near(found.dense(), matrix)
    assert found.error <= 1e-14
    assert float(found.left.trace()) >= 0
    if bool(matrix.any()):
        assert float(found.left.norm()) == pytest.approx(float(found.right.norm()), rel=1e-12)


@FEW
@given(
    st.integers(1, 6), st.integers(1, 6), st.sampled_from(["definite", "symmetric", "any"]), SEEDS
)
def test_nearest_is_the_first_singular_pair_of_the_rearrangement(
    o: int, i: int, what: str, seed: int
) -> None:
    """The error by a full SVD, all singular values but the first."""
    d = o * i
    matrix = {
        "definite": spd(d, seed),
        "symmetric": spd(d, seed) - spd(d, seed + 1),
        "any": normal(d, d, seed=seed),
    }[what]
    found = nearest_kronecker(matrix, o, i)
    values = torch.linalg.svdvals(rearranged(matrix, o, i))
    size = float(matrix.norm())
    assert found.error == pytest.approx(float(values[1:].norm()) / size, rel=1e-11, abs=1e-14)
    assert float((matrix - found.dense()).norm()) / size == pytest.approx(
        found.error, rel=1e-11, abs=1e-14
    )
    assert float(found.dense().norm()) == pytest.approx(float(values[0]), rel=1e-12)
    if what != "any":
        assert_near(found.dense(), found.dense().T)
    if what == "definite":
        for factor in (found.left, found.right):
            assert torch.equal(factor, factor.T)
            assert float(torch.linalg.eigvalsh(factor)[0]) > -1e-12 * float(factor.norm())


@FEW
@given(st.integers(1, 4), st.integers(1, 4), SEEDS, st.floats(0.1, 3))
def test_no_other_product_is_nearer(o: int, i: int, seed: int, spread: float) -> None:
    """Random products, best multiple each, and those around the nearest."""
    matrix = spd(o * i, seed)
    found = nearest_kronecker(matrix, o, i)
    size = float(matrix.norm())
    for k in range(5):
        near = torch.kron(
            found.left + spread * spd(o, seed + k),
            found.right + spread * normal(i, i, seed=seed + k),
        )
        for other in (near, torch.kron(spd(o, seed + k), spd(i, seed - k))):
            best = (other * matrix).sum() / other.square().sum()
            assert found.error <= float((matrix - best * other).norm()) / size * (1 + 1e-12) + 1e-14


@FEW
@given(
    st.integers(1, 4), st.integers(1, 4), SEEDS, st.sampled_from([1e-200, 1e-8, -3.0, 1e8, 1e200])
)
def test_nearest_of_a_multiple(o: int, i: int, seed: int, factor: float) -> None:
    matrix = spd(o * i, seed)
    one, other = nearest_kronecker(matrix, o, i), nearest_kronecker(factor * matrix, o, i)
    assert other.error == pytest.approx(one.error, rel=1e-9, abs=1e-14)
    assert_near(other.dense() / abs(factor), one.dense() * math.copysign(1, factor), 1e-9)


def test_nearest_of_skew_factors_beats_symmetric_ones() -> None:
    """A symmetric matrix that is nearer to skew ⊗ skew; a positive semi-definite one never is."""
    matrix = torch.kron(skew(3), skew(4, 1)) + 0.1 * torch.kron(spd(3, 2), spd(4, 3))
    found = nearest_kronecker(matrix, 3, 4)
    assert torch.equal(found.left, -found.left.T)
    values = torch.linalg.svdvals(rearranged(matrix, 3, 4))
    assert found.error == pytest.approx(float(values[1:].norm() / matrix.norm()), rel=1e-11)


def test_nearest_of_many_pairs_goes_by_products() -> None:
    """Above order 500 of the Gram matrix: 528 pairs here, by either side."""
    rows = normal(40, 32 * 33)
    matrix = rows.T @ rows + torch.kron(spd(32), spd(33, 1))
    for turned, o, i in [
        (matrix, 32, 33),
        (matrix.view(32, 33, 32, 33).permute(1, 0, 3, 2).reshape(matrix.shape), 33, 32),
    ]:
        found = nearest_kronecker(turned, o, i)
        first = float(torch.linalg.svdvals(rearranged(turned, o, i))[0])
        assert found.error == pytest.approx(
            math.sqrt(1 - first**2 / float(matrix.square().sum())), rel=1e-11
        )


def test_nearest_in_single_precision() -> None:
    matrix = spd(30)
    found, exact = nearest_kronecker(matrix.float(), 5, 6), nearest_kronecker(matrix, 5, 6)
    assert found.left.dtype == found.right.dtype == torch.float32
    assert found.error == pytest.approx(exact.error, rel=1e-6)
    assert_near(found.dense().double(), exact.dense(), 1e-5)


def test_nearest_of_nearly_symmetric_is_symmetric() -> None:
    """Rounding in M does not reach the factors."""
    matrix = spd(12) + 1e-15 * normal(12, 12, seed=1)
    found = nearest_kronecker(matrix, 3, 4)
    assert torch.equal(found.left, found.left.T)
    assert torch.equal(found.right, found.right.T)


def test_nearest_of_zero_is_zero() -> None:
    found = nearest_kronecker(torch.zeros(6, 6), 2, 3)
    assert found.error == 0
    assert not bool(found.dense().any())
    assert found.dense().shape == (6, 6)


def test_nearest_refuses_what_has_none() -> None:
    with pytest.raises(
        CurvlabError, match=r"the matrix is \[6, 6\], but 2 outputs of 4 inputs make 8×8"
    ):
        nearest_kronecker(torch.eye(6), 2, 4)
    with pytest.raises(CurvlabError, match="the matrix contains NaN or Inf"):
        nearest_kronecker(torch.full((6, 6), math.nan), 2, 3)
