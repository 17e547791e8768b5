"""p-th roots and their inverses: two routes, and what each does where there is no root."""

from __future__ import annotations

import math

import pytest
import torch
from problems import assert_near
from torch import Tensor

from curvlab.errors import CurvlabError
from curvlab.linalg.roots import inverse_root_eigh, inverse_root_newton, root_eigh

orders = pytest.mark.parametrize("p", [2, 4, 6])
EPS32 = torch.finfo(torch.float32).eps


def with_condition(
    condition: float, order: int = 6, scale: float = 3.0, dtype: torch.dtype = torch.float64
) -> Tensor:
    """scale · Q diag(1 … 1/condition) Qᵀ, eigenvalues evenly spaced in the logarithm."""
    q = torch.linalg.qr(
        torch.randn(
            order, order, generator=torch.Generator().manual_seed(order), dtype=torch.float64
        )
    )[0]
    e = scale * torch.logspace(0, -math.log10(condition), order, dtype=torch.float64)
    M = (q * e) @ q.T
    return ((M + M.T) / 2).to(dtype)


@orders
@pytest.mark.parametrize("condition", [1, 10, 1e3, 1e6])
def test_eigh_root_to_the_minus_p_is_the_matrix(p: int, condition: float) -> None:
    M = with_condition(condition)
    root = inverse_root_eigh(M, p)
    assert_near(root, root.T)
    assert_near(
        torch.linalg.matrix_power(root, p) @ M,
        torch.eye(6, dtype=M.dtype),
        1e-14 * condition + 1e-13,
    )


@orders
@pytest.mark.parametrize("condition", [1, 10, 1e3, 1e5, 1e7, 1e9])
@pytest.mark.parametrize("scale", [1e-6, 3.0, 1e6])
def test_newton_is_the_eigh_root(p: int, condition: float, scale: float) -> None:
    """At the default tolerance of 1e-6, whatever the scale and up to a condition of 1e9."""
    M = with_condition(condition, scale=scale)
    root, error = inverse_root_newton(M, p)
    assert error <= 1e-6
    assert torch.equal(root, root.T)
    assert_near(root, inverse_root_eigh(M, p), 1e-6)


@orders
@pytest.mark.parametrize("condition", [1, 10, 1e3])
def test_newton_follows_its_tolerance(p: int, condition: float) -> None:
    M = with_condition(condition)
    root, error = inverse_root_newton(M, p, tolerance=1e-12)
    assert error <= 1e-12
    assert_near(root, inverse_root_eigh(M, p), 1e-11)
    loose = inverse_root_newton(M, p, tolerance=0.1)[1]
    assert error < loose <= 0.1


@orders
@pytest.mark.parametrize("order", [1, 2, 20])
def test_newton_at_other_orders(p: int, order: int) -> None:
    M = with_condition(100, order)
    assert_near(inverse_root_newton(M, p)[0], inverse_root_eigh(M, p), 1e-6)


@orders
def test_newton_of_the_identity(p: int) -> None:
    eye = torch.eye(4, dtype=torch.float64)
    assert_near(inverse_root_newton(eye, p)[0], eye, 1e-6)
    assert_near(inverse_root_newton(16 * eye, p)[0], eye * 16 ** (-1 / p), 1e-6)


def test_newton_stops_after_its_iterations() -> None:
    M = with_condition(1e6)
    assert inverse_root_newton(M, 4, iterations=2)[1] > inverse_root_newton(M, 4)[1]


@orders
@pytest.mark.parametrize("condition", [1, 10, 1e3])
def test_float32_loses_what_the_condition_costs(p: int, condition: float) -> None:
    """Both routes in float32 stay within eps · condition (times 8) of the root in float64."""
    exact = inverse_root_eigh(with_condition(condition), p).float()
    M = with_condition(condition, dtype=torch.float32)
    newton, error = inverse_root_newton(M, p)
    assert error <= 1e-6
    assert_near(newton, exact, 8 * EPS32 * condition)
    assert_near(inverse_root_eigh(M, p), exact, 8 * EPS32 * condition)


@orders
def test_float32_newton_ends_where_rounding_stops_it(p: int) -> None:
    """An unreachable tolerance: the error stays finite and small instead of growing for 100
    iterations.
    """
    root, error = inverse_root_newton(with_condition(1e4, dtype=torch.float32), p, tolerance=0.0)
    assert 0 < error < 1e-5
    assert bool(root.isfinite().all())


BAD = {
    "indefinite": torch.diag(torch.tensor([1.0, -0.5])),
    "singular": torch.diag(torch.tensor([1.0, 0.0])),
    "zero": torch.zeros(2, 2),
}


@orders
@pytest.mark.parametrize("name", BAD)
def test_eigh_refuses_what_is_not_positive_definite(p: int, name: str) -> None:
    with pytest.raises(CurvlabError, match=f"no inverse {p}-th root: the smallest eigenvalue is"):
        inverse_root_eigh(BAD[name].double(), p)


@orders
@pytest.mark.parametrize("name", [*BAD, "nan"])
def test_newton_owns_up_to_what_is_not_positive_definite(p: int, name: str) -> None:
    """Its error is not small: a caller that looks at it does not use the result."""
    M = torch.full((2, 2), math.nan) if name == "nan" else BAD[name]
    assert not inverse_root_newton(M.double(), p)[1] < 1e-2


@pytest.mark.parametrize("p", [1, 2, 3, 4])
def test_root_to_its_power(p: int) -> None:
    """X^p = M, of full rank and of less, and X is the inverse of the inverse root."""
    M = with_condition(100.0)
    assert_near(torch.linalg.matrix_power(root_eigh(M, p), p), M)
    assert_near(root_eigh(M, p) @ inverse_root_eigh(M, p), torch.eye(6, dtype=M.dtype))
    row = torch.arange(1.0, 5.0, dtype=M.dtype)[:, None]
    assert_near(torch.linalg.matrix_power(root_eigh(row @ row.T, p), p), row @ row.T)


def test_root_above_a_floor() -> None:
    """Eigenvalues that rounding put below the damping."""
    M = torch.diag(torch.tensor([-1e-9, 4.0], dtype=torch.float64))
    assert_near(
        root_eigh(M, 2, floor=0.25), torch.diag(torch.tensor([0.5, 2.0], dtype=torch.float64))
    )
    assert root_eigh(M, 1, floor=0.25) is M, "off the floor by rounding alone, which no root widens"
