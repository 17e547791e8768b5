"""Krylov methods against dense solves, eigenvalues and traces."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import assert_near, normal
from torch import Tensor

from curvlab.errors import CurvlabError
from curvlab.linalg.krylov import Density, Lanczos, conjugate_gradients, density, extremes, lanczos
from curvlab.linalg.operators import Dense, Diagonal, Kronecker, Operator
from curvlab.linalg.products import Product

FEW = settings(deadline=None, max_examples=25)
DOUBLE, CPU = torch.float64, torch.device("cpu")


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def with_eigenvalues(values: Tensor, seed: int = 0) -> Tensor:
    """A symmetric matrix with these eigenvalues and random eigenvectors."""
    q = torch.linalg.qr(normal(len(values), len(values), seed=seed)).Q
    matrix = (q * values) @ q.T
    return (matrix + matrix.T) / 2


def symmetric(order: int, seed: int = 0) -> Tensor:
    m = normal(order, order, seed=seed)
    return m + m.T


def spd(order: int, condition: float = 100.0, seed: int = 0) -> Tensor:
    return with_eigenvalues(torch.logspace(0, math.log10(condition), order, dtype=DOUBLE), seed)


NOT_FINITE = Product(lambda v: v * float("nan"), 5, DOUBLE, CPU)


# Conjugate gradients.


@FEW
@given(st.integers(1, 30), st.sampled_from([1.0, 1e2, 1e4]), st.integers(0, 99))
def test_conjugate_gradients_solve(order: int, condition: float, seed: int) -> None:
    matrix, b = spd(order, condition, seed), normal(order, seed=seed + 1)
    found = conjugate_gradients(Dense(matrix), b, tolerance=1e-11)
    assert found.converged
    assert found.residual <= 1e-11
    assert_near(matrix @ found.x, b, 2e-11)
    assert_near(found.x, torch.linalg.solve(matrix, b), 2e-11 * condition)


def test_conjugate_gradients_are_the_dense_solve_at_1e10() -> None:
    matrix, b = spd(40, 50.0), normal(40, seed=1)
    found = conjugate_gradients(Dense(matrix), b, tolerance=1e-12)
    assert_near(found.x, torch.linalg.solve(matrix, b), 1e-10)


@pytest.mark.parametrize("scale", [1e-150, 1.0, 1e150])
def test_conjugate_gradients_know_no_scale(scale: float) -> None:
    matrix, b = spd(10), normal(10, seed=1)
    found, one = (
        conjugate_gradients(Dense(matrix), scale * b),
        conjugate_gradients(Dense(matrix), b),
    )
    assert found.iterations == one.iterations
    assert_near(found.x / scale, one.x, 1e-10)


def test_conjugate_gradients_take_one_iteration_for_each_distinct_eigenvalue() -> None:
    values = torch.tensor([1.0, 2.0, 5.0], dtype=DOUBLE).repeat(6)
    found = conjugate_gradients(Dense(with_eigenvalues(values)), normal(18))
    assert (found.iterations, found.converged) == (3, True)


def test_the_inverse_as_preconditioner_takes_one_iteration() -> None:
    matrix, b = spd(20, 1e4), normal(20, seed=1)
    found = conjugate_gradients(Dense(matrix), b, precondition=Dense(matrix).inv(), tolerance=1e-9)
    assert (found.iterations, found.converged) == (1, True)
    assert_near(found.x, torch.linalg.solve(matrix, b), 1e-9)


def test_a_preconditioner_saves_iterations_and_changes_no_solution() -> None:
    scale = torch.logspace(0, 3, 40, dtype=DOUBLE)
    matrix, b = scale[:, None] * spd(40, 5.0) * scale, normal(40, seed=1)
    plain = conjugate_gradients(Dense(matrix), b, tolerance=1e-8, maximum=4000)
    jacobi = conjugate_gradients(
        Dense(matrix), b, tolerance=1e-8, precondition=Diagonal(matrix.diagonal().reciprocal())
    )
    assert jacobi.converged
    assert 3 * jacobi.iterations < plain.iterations
    assert_near(matrix @ jacobi.x, b, 1e-8)


def test_conjugate_gradients_that_run_out_of_iterations_say_so() -> None:
    matrix, b = spd(30, 1e4), normal(30, seed=1)
    found = conjugate_gradients(Dense(matrix), b, maximum=4)
    assert (found.iterations, found.converged) == (4, False)
    assert found.residual == pytest.approx(float((b - matrix @ found.x).norm() / b.norm()))
    assert found.residual > 1e-10


def test_a_tolerance_that_rounding_does_not_allow_ends_without_a_false_claim() -> None:
    matrix, b = spd(20, 1e3).float(), normal(20, seed=1).float()
    found = conjugate_gradients(Dense(matrix), b, tolerance=1e-12, maximum=10**4)
    assert not found.converged
    assert found.iterations < 1000
    assert found.residual == pytest.approx(float((b - matrix @ found.x).norm() / b.norm()), rel=0.5)
    assert found.residual < 1e-3
    assert found.x.dtype == torch.float32


def test_a_residual_that_drifted_is_made_up_for() -> None:
    """At a condition of 1e8 the recursion claims 7e-9 of several of these where the true residual
    is above: not the result.
    """
    matrix = spd(60, 1e8)
    found = [
        conjugate_gradients(Dense(matrix), normal(60, seed=seed), tolerance=7e-9, maximum=10**4)
        for seed in range(10)
    ]
    assert all(f.converged for f in found)
    for seed, f in enumerate(found):
        assert (
            float((normal(60, seed=seed) - matrix @ f.x).norm() / normal(60, seed=seed).norm())
            <= 8e-9
        )


def test_conjugate_gradients_of_zero() -> None:
    found = conjugate_gradients(Dense(spd(4)), torch.zeros(4, dtype=DOUBLE))
    assert (found.residual, found.iterations, found.converged) == (0.0, 0, True)
    assert not found.x.any()


@pytest.mark.parametrize("values", [[1.0, -0.5, 2.0], [0.0, 0.0, 0.0], [-1.0, -2.0, -3.0]])
def test_negative_curvature_is_named(values: list[float]) -> None:
    operator = Dense(with_eigenvalues(torch.tensor(values, dtype=DOUBLE)))
    with pytest.raises(
        CurvlabError,
        match=(
            r"met pᵀAp = (-|0).* pᵀp at iteration \d: .* not positive definite; raise the damping"
        ),
    ):
        conjugate_gradients(operator, normal(3))


def test_negative_curvature_is_given_as_a_rayleigh_quotient() -> None:
    with pytest.raises(CurvlabError, match=r"pᵀAp = -3 pᵀp at iteration 1"):
        conjugate_gradients(Diagonal(torch.full((4,), -3.0, dtype=DOUBLE)), 1e6 * normal(4))


def test_a_preconditioner_that_is_not_positive_definite() -> None:
    with pytest.raises(
        CurvlabError, match=r"rᵀMr = -.* the preconditioner is not positive definite"
    ):
        conjugate_gradients(
            Dense(spd(4)), normal(4), precondition=Diagonal(-torch.ones(4, dtype=DOUBLE))
        )


@pytest.mark.wrong_shapes
@pytest.mark.parametrize("b", [normal(4), normal(5, 1), normal(1, 5), torch.tensor(1.0)])
def test_conjugate_gradients_of_a_wrong_shape(b: Tensor) -> None:
    with pytest.raises(
        CurvlabError, match=r"the right-hand side has the shape .*: the operator takes \[5\]"
    ):
        conjugate_gradients(Dense(spd(5)), b)


def test_conjugate_gradients_of_what_is_not_finite() -> None:
    with pytest.raises(CurvlabError, match="the right-hand side contains NaN or Inf"):
        conjugate_gradients(Dense(spd(5)), normal(5) * float("inf"))
    with pytest.raises(CurvlabError, match="a product with the operator contains NaN or Inf"):
        conjugate_gradients(NOT_FINITE, normal(5))


@pytest.mark.parametrize(
    ("tolerance", "maximum"), [(0.0, None), (-1.0, None), (float("nan"), None), (1e-3, 0)]
)
def test_conjugate_gradients_without_an_end(tolerance: float, maximum: int | None) -> None:
    with pytest.raises(CurvlabError, match="a tolerance above 0 and a maximum of at least 1"):
        conjugate_gradients(Dense(spd(3)), normal(3), tolerance=tolerance, maximum=maximum)


# Lanczos.


@FEW
@given(st.integers(1, 25), st.integers(1, 30), st.integers(0, 99))
def test_lanczos_relation(order: int, steps: int, seed: int) -> None:
    """Vᵀ V = I, Vᵀ A V = T, and A V − V T is zero but for its last column, which has the length
    β_m.
    """
    matrix, start = symmetric(order, seed), normal(order, seed=seed + 1)
    run = lanczos(Dense(matrix), start, steps, basis=True)
    v, t = run.basis, run.matrix()
    assert v is not None
    assert len(run) == min(steps, order)
    assert_near(v[:, 0], start / start.norm())
    assert_near(v.T @ v, torch.eye(len(run), dtype=DOUBLE), 1e-13)
    assert_near(v.T @ matrix @ v, t, 1e-12)
    rest = matrix @ v - v @ t
    assert float(rest[:, :-1].norm()) <= 1e-12 * float(matrix.norm())
    assert abs(float(rest[:, -1].norm() - run.beta[-1])) <= 1e-12 * float(matrix.norm())


@pytest.mark.parametrize("order", [1, 2, 20, 60])
def test_as_many_steps_as_the_order_give_all_eigenvalues(order: int) -> None:
    matrix = symmetric(order)
    theta, errors, _ = lanczos(Dense(matrix), normal(order, seed=1), order).ritz()
    assert_near(theta, torch.linalg.eigvalsh(matrix), 1e-10)
    assert float(errors.max()) <= 1e-10 * float(matrix.norm())


def test_basis_stays_orthogonal_where_ritz_values_have_converged() -> None:
    """Eigenvalues over twelve orders of magnitude: without reorthogonalisation the outliers would
    come again as ghosts.
    """
    matrix = with_eigenvalues(torch.logspace(-8, 4, 60, dtype=DOUBLE))
    run = lanczos(Dense(matrix), normal(60, seed=1), 60, basis=True)
    assert run.basis is not None
    assert_near(run.basis.T @ run.basis, torch.eye(len(run), dtype=DOUBLE), 1e-13)


@FEW
@given(st.integers(1, 4), st.integers(1, 4), st.integers(0, 99))
def test_lanczos_stops_where_the_krylov_space_is_invariant(
    distinct: int, times: int, seed: int
) -> None:
    values = torch.arange(1, distinct + 1, dtype=DOUBLE)
    run = lanczos(
        Dense(with_eigenvalues(values.repeat(times), seed)), normal(distinct * times, seed=seed), 20
    )
    assert len(run) == distinct
    assert_near(run.ritz()[0], values, 1e-10)
    assert float(run.beta[-1]) <= 1e-12


def test_an_invariant_space_that_rounding_hides_does_no_harm() -> None:
    """Twelve distinct eigenvalues, and steps beyond: Ritz values with a weight are eigenvalues;
    those of one share its.
    """
    values = torch.arange(1, 13, dtype=DOUBLE)
    matrix, start = with_eigenvalues(values.repeat(5)), normal(60, seed=1)
    run = lanczos(Dense(matrix), start, 40)
    nodes, weights = run.quadrature()
    assert len(run) > 12
    assert float((weights * (nodes - nodes.round()).abs()).sum()) <= 1e-13
    eigenvalues, vectors = torch.linalg.eigh(matrix)
    shares = (vectors.T @ start / start.norm()).square()
    for value in values:
        found, expected = (
            weights[nodes.round() == value].sum(),
            shares[eigenvalues.round() == value].sum(),
        )
        assert abs(float(found - expected)) <= 1e-10


@pytest.mark.parametrize(
    "operator",
    [Dense(torch.zeros(4, 4, dtype=DOUBLE)), Diagonal(torch.full((4,), 3.0, dtype=DOUBLE))],
)
def test_lanczos_of_a_multiple_of_the_identity_is_one_step(operator: Operator) -> None:
    run = lanczos(operator, normal(4), 4)
    assert len(run) == 1
    assert_near(run.matrix().diagonal(), operator.diag()[:1])


def test_lanczos_keeps_its_basis_only_when_asked_to() -> None:
    assert lanczos(Dense(symmetric(4)), normal(4), 3).basis is None


def test_lanczos_knows_no_scale_of_its_start() -> None:
    one, other = (lanczos(Dense(symmetric(8)), c * normal(8, seed=1), 4) for c in (1.0, -1e-100))
    assert_near(one.alpha, other.alpha)
    assert_near(one.beta, other.beta)


@FEW
@given(st.integers(1, 8), st.integers(0, 99), st.data())
def test_lanczos_quadrature_is_exact_up_to_the_degree_2m_minus_1(
    m: int, seed: int, data: st.DataObject
) -> None:
    """vᵀ p(A) v by Horner's rule on vectors, of a random polynomial of every degree that the rule
    is exact for.
    """
    degree = data.draw(st.integers(0, 2 * m - 1))
    matrix, start = (
        with_eigenvalues(torch.linspace(-1, 1, 20, dtype=DOUBLE), seed),
        normal(20, seed=seed + 1),
    )
    coefficients = normal(degree + 1, seed=seed + 2)
    v = start / start.norm()
    nodes, weights = lanczos(Dense(matrix), start, m).quadrature()
    applied, at_nodes = torch.zeros_like(v), torch.zeros_like(nodes)
    for c in coefficients:
        applied, at_nodes = matrix @ applied + c * v, nodes * at_nodes + c
    assert abs(float(weights @ at_nodes - v @ applied)) <= 1e-11 * float(coefficients.abs().sum())
    assert abs(float(weights.sum()) - 1) <= 1e-13


def test_lanczos_quadrature_is_not_exact_beyond() -> None:
    matrix, start = with_eigenvalues(torch.linspace(-1, 1, 20, dtype=DOUBLE)), normal(20, seed=1)
    v = start / start.norm()
    nodes, weights = lanczos(Dense(matrix), start, 2).quadrature()
    assert abs(float(weights @ nodes**4 - v @ torch.linalg.matrix_power(matrix, 4) @ v)) > 1e-3


def test_lanczos_float32_stays_float32() -> None:
    run = lanczos(Dense(symmetric(6).float()), normal(6).float(), 3, basis=True)
    assert run.basis is not None
    assert {run.alpha.dtype, run.beta.dtype, run.basis.dtype, run.quadrature()[0].dtype} == {
        torch.float32
    }


def test_lanczos_with_bad_input() -> None:
    operator = Dense(symmetric(5))
    with pytest.raises(CurvlabError, match="Lanczos needs at least 1 step, not 0"):
        lanczos(operator, normal(5), 0)
    with pytest.raises(CurvlabError, match="a starting vector that is not zero"):
        lanczos(operator, torch.zeros(5, dtype=DOUBLE), 3)
    with pytest.raises(
        CurvlabError, match=r"the starting vector has the shape \[4\]: the operator takes \[5\]"
    ):
        lanczos(operator, normal(4), 3)
    with pytest.raises(CurvlabError, match="the starting vector contains NaN or Inf"):
        lanczos(operator, normal(5) * float("nan"), 3)
    with pytest.raises(CurvlabError, match="a product with the operator contains NaN or Inf"):
        lanczos(NOT_FINITE, normal(5), 3)


def test_a_basis_that_would_not_fit_into_memory() -> None:
    operator = Product(lambda v: v, 10**6, torch.float32, CPU)
    with pytest.raises(
        CurvlabError,
        match=(
            r"a Lanczos basis of 900000 vectors of 1000000 would need 3600.0 GB .* take fewer steps"
        ),
    ):
        lanczos(operator, torch.ones(10**6), 900_000)


# The ends of the spectrum.


@FEW
@given(st.integers(1, 12), st.integers(0, 999))
def test_an_eigenvalue_lies_within_the_error_of_each_ritz_value(steps: int, seed: int) -> None:
    matrix = symmetric(25, seed)
    theta, errors, _ = lanczos(Dense(matrix), normal(25, seed=seed + 1), steps).ritz()
    nearest = (theta[:, None] - torch.linalg.eigvalsh(matrix)).abs().amin(1)
    assert bool((nearest <= errors + 1e-12).all())


@FEW
@given(st.integers(1, 12), st.integers(0, 999))
def test_residuals_are_those_of_the_ritz_vectors(steps: int, seed: int) -> None:
    matrix = symmetric(25, seed)
    run = lanczos(Dense(matrix), normal(25, seed=seed + 1), steps, basis=True)
    theta, errors, s = run.ritz()
    assert run.basis is not None
    vectors = run.basis @ s
    assert float(
        ((matrix @ vectors - vectors * theta).norm(dim=0) - errors).abs().max()
    ) <= 1e-12 * float(matrix.norm())


def test_extremes_converge_and_lie_inside() -> None:
    matrix = with_eigenvalues(
        torch.cat([torch.tensor([-3.0, 50.0, 80.0]), torch.linspace(0, 1, 97)]).double()
    )
    eigenvalues = torch.linalg.eigvalsh(matrix)
    few, many = (extremes(Dense(matrix), steps=steps, generator=seeded()) for steps in (4, 25))
    for found in (few, many):
        assert (
            float(eigenvalues[0]) - 1e-10
            <= found.lowest
            <= found.highest
            <= float(eigenvalues[-1]) + 1e-10
        )
        assert float((eigenvalues - found.lowest).abs().min()) <= found.lowest_error + 1e-10
        assert float((eigenvalues - found.highest).abs().min()) <= found.highest_error + 1e-10
    assert (few.steps, many.steps) == (4, 25)
    assert many.highest == pytest.approx(80, rel=1e-12)
    assert many.lowest == pytest.approx(-3, rel=1e-10)
    assert max(many.lowest_error, many.highest_error) < 1e-5 < few.lowest_error


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extremes_of_an_operator_that_is_not_dense(dtype: torch.dtype) -> None:
    operator = Kronecker((spd(4, 10.0).to(dtype), spd(5, 20.0).to(dtype)))
    found = extremes(operator, generator=seeded())
    assert found.highest == pytest.approx(200, rel=1e-5)
    assert found.lowest == pytest.approx(1, rel=1e-4)
    assert found.steps <= 20


def test_extremes_of_order_1() -> None:
    found = extremes(Diagonal(torch.tensor([-2.0], dtype=DOUBLE)), generator=seeded())
    assert (found.lowest, found.highest, found.steps) == (-2, -2, 1)
    assert found.lowest_error <= 1e-15


# The spectral density.

SPECTRUM = torch.cat(
    [torch.tensor([-0.5, 20.0, 30.0], dtype=DOUBLE), torch.linspace(0, 1, 57, dtype=DOUBLE)]
)


def of_spectrum(draws: int = 20, steps: int = 15, seed: int = 0) -> tuple[Density, Tensor]:
    matrix = with_eigenvalues(SPECTRUM)
    return density(Dense(matrix), draws=draws, steps=steps, generator=seeded(seed)), matrix


@pytest.mark.parametrize("k", [0, 1, 2, 3])
def test_moments_are_those_of_the_matrix(k: int) -> None:
    """Within three standard errors in at least 95 of 100 seeds."""
    truth = float(SPECTRUM.pow(k).mean())
    found = [of_spectrum(steps=3, seed=seed)[0].moment(k) for seed in range(100)]
    inside = [abs(float(f.value) - truth) <= 3 * float(f.error) + 1e-12 for f in found]
    assert sum(inside) >= 95
    assert found[0].products == 20 * 3


def test_moments_do_not_depend_on_the_steps_once_the_quadrature_is_exact() -> None:
    short, long = of_spectrum(steps=2)[0], of_spectrum(steps=10)[0]
    for k in range(4):
        assert_near(short.moment(k).value, long.moment(k).value, 1e-11)


def test_fraction_of_eigenvalues_below() -> None:
    """At gaps of the spectrum: within three standard errors in at least 95 of 100 seeds."""
    inside = 0
    for seed in range(100):
        found = of_spectrum(draws=30, steps=10, seed=seed)[0]
        pairs = [
            (found.count_below(x), float((x > SPECTRUM).double().mean())) for x in (10.0, 25.0)
        ]
        inside += all(abs(float(f.value) - truth) <= 3 * float(f.error) for f, truth in pairs)
    assert inside >= 95
    assert float(found.count_below(-10.0).value) == 0
    assert float(found.count_below(40.0).value) == pytest.approx(1, abs=1e-12)


def test_smooth_density_integrates_to_one_and_has_the_moments() -> None:
    found, _ = of_spectrum()
    grid = torch.linspace(-10, 40, 5001, dtype=DOUBLE)
    values = found.smooth(grid, 0.3)
    assert bool((values >= 0).all())
    assert float(torch.trapezoid(values, grid)) == pytest.approx(1, rel=1e-12)
    assert float(torch.trapezoid(values * grid, grid)) == pytest.approx(
        float(found.moment(1).value), rel=1e-10
    )
    second = float(found.moment(2).value) + 0.3**2
    assert float(torch.trapezoid(values * grid**2, grid)) == pytest.approx(second, rel=1e-10)


def test_smooth_density_is_that_of_the_eigenvalues() -> None:
    """Many draws, a wide kernel: the kernel density of the exact spectrum within 0.01 in total
    variation.
    """
    found, _ = of_spectrum(draws=400, steps=20)
    grid = torch.linspace(-5, 36, 2001, dtype=DOUBLE)
    exact = Density(
        SPECTRUM[None], torch.full((1, len(SPECTRUM)), 1 / len(SPECTRUM), dtype=DOUBLE)
    ).smooth(grid, 0.5)
    assert float(torch.trapezoid((found.smooth(grid, 0.5) - exact).abs(), grid)) / 2 < 0.01


def test_rows_that_end_early_are_filled_up_with_weightless_nodes() -> None:
    values = torch.tensor([1.0, 4.0], dtype=DOUBLE).repeat(8)
    found = density(Dense(with_eigenvalues(values)), draws=3, steps=5, generator=seeded())
    assert found.nodes.shape == found.weights.shape == (3, 5)
    assert_near(
        found.nodes, torch.tensor([1.0, 4.0, 4.0, 4.0, 4.0], dtype=DOUBLE).repeat(3, 1), 1e-10
    )
    assert not found.weights[:, 2:].any()
    assert_near(found.weights.sum(1), torch.ones(3, dtype=DOUBLE))


def test_density_follows_from_the_generator_alone_and_in_the_operators_dtype() -> None:
    before = torch.get_rng_state()
    one, other, third = (of_spectrum(draws=2, steps=4, seed=seed)[0] for seed in (3, 3, 4))
    assert torch.equal(one.nodes, other.nodes)
    assert not torch.equal(one.nodes, third.nodes)
    assert torch.equal(before, torch.get_rng_state())
    single = density(Dense(symmetric(6).float()), draws=2, steps=3, generator=seeded())
    assert {single.nodes.dtype, single.weights.dtype, single.moment(1).value.dtype} == {
        torch.float32
    }


def test_density_of_one_draw_has_no_standard_error() -> None:
    found = of_spectrum(draws=1)[0].moment(1)
    assert math.isnan(float(found.error))
    assert math.isfinite(float(found.value))


def test_density_with_bad_input() -> None:
    operator = Dense(symmetric(5))
    with pytest.raises(CurvlabError, match="at least 1 draw, not 0"):
        density(operator, draws=0, steps=3, generator=seeded())
    with pytest.raises(CurvlabError, match="at least 1 step, not 0"):
        density(operator, draws=2, steps=0, generator=seeded())
    with pytest.raises(CurvlabError, match="contains NaN or Inf"):
        density(NOT_FINITE, draws=2, steps=3, generator=seeded())
    for width in (0.0, -1.0, float("nan")):
        with pytest.raises(CurvlabError, match="a width above 0"):
            density(operator, draws=2, steps=3, generator=seeded()).smooth(
                torch.zeros(1, dtype=DOUBLE), width
            )


def test_tridiagonal_matrix() -> None:
    run = Lanczos(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.5, 0.6, 0.7]))
    assert torch.equal(
        run.matrix(), torch.tensor([[1.0, 0.5, 0.0], [0.5, 2.0, 0.6], [0.0, 0.6, 3.0]])
    )
    assert float(run.ritz()[1].max()) <= 0.7
