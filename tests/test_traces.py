"""Estimates of traces and diagonals: exact where they are to be, honest about their error
elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import assert_near, normal
from torch import Tensor

from curvlab.errors import CurvlabError
from curvlab.linalg.operators import Dense, Diagonal, Kronecker, Operator
from curvlab.linalg.products import Product
from curvlab.linalg.traces import TRACES, StochasticEstimate, average, hutchinson_diagonal, xtrace

FEW = settings(deadline=None, max_examples=25)
DOUBLE, CPU = torch.float64, torch.device("cpu")
ORDER = 30
WIDE = 150


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def with_eigenvalues(values: Tensor, seed: int = 0) -> Tensor:
    """A symmetric matrix with these eigenvalues and random eigenvectors."""
    q = torch.linalg.qr(normal(len(values), len(values), seed=seed)).Q
    matrix = (q * values) @ q.T
    return (matrix + matrix.T) / 2


def of_rank(rank: int, order: int = ORDER, seed: int = 0) -> Tensor:
    """Indefinite: eigenvalues 1, −2, 3, …, and zeros."""
    values = torch.zeros(order, dtype=DOUBLE)
    values[:rank] = torch.arange(1, rank + 1, dtype=DOUBLE) * (-1) ** torch.arange(rank)
    return with_eigenvalues(values, seed)


SPECTRA: dict[str, Callable[[int], Tensor]] = {
    "flat": lambda order: torch.linspace(1, 3, order, dtype=DOUBLE),
    "algebraic": lambda order: torch.arange(1, order + 1, dtype=DOUBLE) ** -2.0,
    "exponential": lambda order: 0.7 ** torch.arange(order, dtype=DOUBLE),
    "outliers": lambda order: torch.cat(
        [torch.tensor([300.0, 100.0, -30.0]).double(), torch.linspace(-1, 2, order - 3).double()]
    ),
    "indefinite": lambda order: torch.linspace(-1, 2, order, dtype=DOUBLE),
}
"""{name: order → eigenvalues}"""


def of_spectrum(name: str, order: int = ORDER, seed: int = 0) -> Tensor:
    return with_eigenvalues(SPECTRA[name](order), seed)


trace_each = pytest.mark.parametrize("name", TRACES)
ESTIMATORS: dict[str, Callable[[Operator, int, torch.Generator], StochasticEstimate]] = {
    **TRACES,
    "diagonal": hutchinson_diagonal,
}
each = pytest.mark.parametrize("name", ESTIMATORS)


def rounding(matrix: Tensor) -> float:
    """What sums of products of order D may differ by."""
    return 1e-13 * len(matrix) * float(matrix.norm())


def off_and_errors(
    name: str, matrix: Tensor, products: int, seeds: int = 200
) -> tuple[Tensor, Tensor]:
    """What each run is off by, and what it says its standard error is."""
    runs = [TRACES[name](Dense(matrix), products, seeded(seed)) for seed in range(seeds)]
    return torch.stack([run.value for run in runs]) - matrix.trace(), torch.stack(
        [run.error for run in runs]
    )


def ratio(off: Tensor, errors: Tensor) -> float:
    return float((off.square().mean() / errors.square().mean()).sqrt())


@trace_each
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_the_error_is_honest(name: str, spectrum: str) -> None:
    """Within three standard errors in 95 % of 200 runs; nor is the error exaggerated: its square is
    the mean square error.
    """
    matrix = of_spectrum(spectrum, WIDE)
    off, errors = off_and_errors(name, matrix, products=40)
    assert float((off.abs() <= 3 * errors + rounding(matrix)).double().mean()) >= 0.95
    assert 0.85 < ratio(off, errors) < (1.4 if name == "xtrace" else 1.15)


def test_xtrace_understates_its_error_where_the_sketches_share_most_of_the_space() -> None:
    assert 1.5 < ratio(*off_and_errors("xtrace", of_spectrum("flat"), products=45)) < 2.5


@trace_each
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_unbiased(name: str, spectrum: str) -> None:
    matrix = of_spectrum(spectrum)
    values = torch.stack(
        [TRACES[name](Dense(matrix), 8, seeded(seed)).value for seed in range(400)]
    )
    mean = average(values, 0)
    assert float((mean.value - matrix.trace()).abs()) <= 3.5 * float(mean.error) + rounding(matrix)


@each
@pytest.mark.parametrize("products", [4, 5, 6, 7, 31, 64, 65, 130])
def test_counts_its_products_and_takes_no_more_than_allowed(name: str, products: int) -> None:
    columns: list[int] = []
    matrix = of_spectrum("flat")

    def apply(v: Tensor) -> Tensor:
        columns.append(v.shape[1])
        return matrix @ v

    estimate = ESTIMATORS[name](Product(apply, ORDER, DOUBLE, CPU), products, seeded(0))
    assert sum(columns) == estimate.products <= products


@each
def test_follows_from_the_generator_alone(name: str) -> None:
    operator = Dense(of_spectrum("flat"))
    before = torch.get_rng_state()
    one, other, third = (ESTIMATORS[name](operator, 12, seeded(seed)) for seed in (5, 5, 6))
    assert torch.equal(one.value, other.value)
    assert torch.equal(one.error, other.error)
    assert not torch.equal(one.value, third.value)
    assert torch.equal(before, torch.get_rng_state())


@each
@FEW
@given(scale=st.floats(-100, 100).filter(lambda c: abs(c) > 1e-3), seed=st.integers(0, 99))
def test_scales_with_the_matrix(name: str, scale: float, seed: int) -> None:
    matrix = of_spectrum("flat", seed=seed)
    one, other = (ESTIMATORS[name](Dense(c * matrix), 12, seeded(seed)) for c in (1.0, scale))
    assert_near(other.value, scale * one.value, 1e-9)
    assert_near(other.error, abs(scale) * one.error, 1e-9)


@each
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtype_follows_the_operator(name: str, dtype: torch.dtype) -> None:
    matrix = of_spectrum("flat")
    for operator in (
        Dense(matrix.to(dtype)),
        Kronecker((matrix[:3, :3].to(dtype), torch.eye(2, dtype=dtype))),
    ):
        found = ESTIMATORS[name](operator, 12, seeded(0))
        assert {found.value.dtype, found.error.dtype} == {dtype}
    single, double = (
        ESTIMATORS[name](Dense(matrix.to(d)), 30, seeded(3)) for d in (torch.float32, torch.float64)
    )
    assert bool(
        ((single.value - double.value).abs() <= 12 * (single.error + double.error) + 1e-5).all()
    )


@each
@pytest.mark.parametrize("order", [1, 2, 3])
def test_tiny_matrices_and_more_products_than_the_order(name: str, order: int) -> None:
    """The sketch spans everything: exact, but for those that have none."""
    matrix = with_eigenvalues(torch.linspace(1, 2, order, dtype=DOUBLE))
    found = ESTIMATORS[name](Dense(matrix), 12, seeded(0))
    assert bool(torch.isfinite(found.value).all())
    assert bool(torch.isfinite(found.error).all())
    if name in ("hutch++", "xtrace") or order == 1:
        assert_near(found.value.sum(), matrix.trace(), 1e-13)
        assert bool((found.error <= 1e-13).all())


@each
def test_of_zero_is_zero(name: str) -> None:
    found = ESTIMATORS[name](Dense(torch.zeros(5, 5, dtype=DOUBLE)), 8, seeded(0))
    assert not found.value.any()
    assert not found.error.any()


@pytest.mark.parametrize("name", ["hutchinson", "diagonal"])
def test_of_a_diagonal_matrix_signs_are_exact(name: str) -> None:
    values = normal(ORDER)
    found = ESTIMATORS[name](Diagonal(values), 5, seeded(0))
    assert_near(found.value, values.sum() if name == "hutchinson" else values, 1e-13)
    assert bool((found.error <= 1e-14).all())


@pytest.mark.parametrize(
    ("name", "products"),
    [("hutch++", 18), ("hutch++", 24), ("xtrace", 14), ("xtrace", 15), ("xtrace", 24)],
)
@FEW
@given(rank=st.integers(0, 6), seed=st.integers(0, 999))
def test_exact_for_a_low_rank(name: str, products: int, rank: int, seed: int) -> None:
    """Rank ≤ 6 = ⌊18 / 3⌋ for Hutch++, rank < 7 = ⌊15 / 2⌋ for XTrace."""
    matrix = of_rank(rank, seed=seed)
    found = TRACES[name](Dense(matrix), products, seeded(seed))
    assert abs(float(found.value - matrix.trace())) <= 1e-10
    assert float(found.error) <= 1e-10


@pytest.mark.parametrize("name", ["hutch++", "xtrace"])
def test_exact_for_a_low_rank_of_a_small_order(name: str) -> None:
    """Two columns of four signs would be dependent in one of eight cases."""
    for seed in range(50):
        matrix = of_rank(2, order=4, seed=seed)
        assert (
            abs(float(TRACES[name](Dense(matrix), 6, seeded(seed)).value - matrix.trace())) <= 1e-10
        )


@pytest.mark.parametrize("name", ["hutch++", "xtrace"])
def test_low_rank_and_a_sketch_are_better_than_signs_alone(name: str) -> None:
    """Errors of 200 runs at equal products, on a matrix of quickly falling eigenvalues: at least
    ten times less.
    """
    matrix = of_spectrum("algebraic")
    sketched, signs = (
        off_and_errors(n, matrix, products=30)[0].square().mean().sqrt()
        for n in (name, "hutchinson")
    )
    assert 10 * float(sketched) < float(signs)


@FEW
@given(shift=st.floats(-10, 10), seed=st.integers(0, 99))
def test_a_multiple_of_the_identity_costs_hutchinson_and_xtrace_nothing(
    shift: float, seed: int
) -> None:
    """For signs and for vectors scaled to the length of the sphere, ωᵀω = D."""
    matrix = of_spectrum("flat")
    eye = torch.eye(ORDER, dtype=DOUBLE)
    one, other = (
        TRACES["hutchinson"](Dense(matrix + c * eye), 6, seeded(seed)) for c in (0.0, shift)
    )
    assert abs(float(other.value - one.value) - shift * ORDER) <= 1e-10
    alone = xtrace(Dense(shift * eye), 6, seeded(seed))
    assert abs(float(alone.value) - shift * ORDER) <= 1e-10
    assert float(alone.error) <= 1e-10


def leave_one_out(matrix: Tensor, omega: Tensor) -> Tensor:
    """XTrace's samples as they are defined: one sketch for each, by its own QR."""
    size, k = omega.shape
    samples = []
    for i in range(k):
        q = torch.linalg.qr(matrix @ torch.cat([omega[:, :i], omega[:, i + 1 :]], 1)).Q
        u = omega[:, i] - q @ (q.T @ omega[:, i])
        u = u * ((size - k + 1) ** 0.5 / u.norm())
        samples.append((q.T @ matrix @ q).trace() + u @ matrix @ u)
    return torch.stack(samples)


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("products", [4, 5, 14, 40, 60])
def test_xtrace_is_the_mean_of_what_it_leaves_out_one_by_one(spectrum: str, products: int) -> None:
    matrix = of_spectrum(spectrum)
    k = products // 2
    omega = torch.randn(ORDER, k, generator=seeded(1), dtype=DOUBLE)
    samples = leave_one_out(matrix, omega)
    found = xtrace(Dense(matrix), products, seeded(1))
    assert_near(found.value, samples.mean(), 1e-10)
    expected = (samples - samples.mean()).square().sum().div(k * (k - 1)).sqrt()
    assert abs(float(found.error - expected)) <= 1e-9 * float(matrix.norm())


@pytest.mark.parametrize("name", TRACES)
def test_singular_values_below_rounding_are_no_harm(name: str) -> None:
    """Eigenvalues from 1 to 1e-29: the sketch's R has no inverse in float64, and yet no digit is
    lost.
    """
    matrix = with_eigenvalues(0.1 ** torch.arange(ORDER, dtype=DOUBLE))
    off, errors = off_and_errors(name, matrix, products=36)
    assert float((off.abs() <= 3 * errors + rounding(matrix)).double().mean()) >= 0.95
    if name != "hutchinson":
        assert float(off.abs().max()) <= 1e-9


def test_diagonal_and_its_error_per_entry_are_honest() -> None:
    matrix = of_spectrum("outliers")
    runs = [hutchinson_diagonal(Dense(matrix), 40, seeded(seed)) for seed in range(200)]
    off = torch.stack([run.value for run in runs]) - matrix.diagonal()
    errors = torch.stack([run.error for run in runs])
    assert float((off.abs() <= 3 * errors).double().mean()) >= 0.99
    assert bool(((off.abs() <= 3 * errors).double().mean(0) >= 0.95).all())
    expected = (matrix.square().sum(1) - matrix.diagonal().square()) / 40  # Σ_{e≠d} A_de² / m
    assert_near(errors.square().mean(0), expected, 0.1)
    assert bool((off.mean(0).abs() <= 4 * (expected / 200).sqrt()).all())


@pytest.mark.parametrize("products", [2, 64, 65, 128, 200])
def test_diagonal_by_groups_of_columns_is_the_mean_and_standard_error_of_all(products: int) -> None:
    matrix = of_spectrum("indefinite")
    seen: list[Tensor] = []

    def apply(v: Tensor) -> Tensor:
        seen.append(v * (matrix @ v))
        return matrix @ v

    found = hutchinson_diagonal(Product(apply, ORDER, DOUBLE, CPU), products, seeded(0))
    samples = torch.cat(seen, 1).T
    assert len(samples) == products
    assert_near(found.value, samples.mean(0))
    assert_near(found.error, samples.std(0) / products**0.5, 1e-11)


@pytest.mark.parametrize(
    ("name", "least"), [("hutchinson", 2), ("hutch++", 4), ("xtrace", 4), ("diagonal", 2)]
)
def test_too_few_products(name: str, least: int) -> None:
    operator = Dense(of_spectrum("flat"))
    assert bool(torch.isfinite(ESTIMATORS[name](operator, least, seeded(0)).error).all())
    for products in (least - 1, 0, -3):
        with pytest.raises(
            CurvlabError,
            match=rf"{name.replace('+', '.')} needs at least {least} products, not {products}",
        ):
            ESTIMATORS[name](operator, products, seeded(0))


@each
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_product_that_is_not_finite(name: str, bad: float) -> None:
    operator = Product(lambda v: v * bad, 5, DOUBLE, CPU)
    with pytest.raises(CurvlabError, match="a product with the operator contains NaN or Inf"):
        ESTIMATORS[name](operator, 8, seeded(0))


def test_average_of_one_sample_has_no_error() -> None:
    found = average(normal(1, 3), 7)
    assert bool(found.error.isnan().all())
    assert_near(found.value, normal(1, 3)[0])
    assert found.products == 7


@FEW
@given(st.integers(2, 9), st.integers(0, 99))
def test_average(n: int, seed: int) -> None:
    samples = normal(n, 2, seed=seed)
    found = average(samples, n)
    assert_near(found.value, samples.mean(0))
    assert_near(found.error, samples.std(0) / n**0.5)
