"""Cholesky factors with damping that is raised, and said to be raised."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import assert_near, normal, spd
from torch import Tensor

from curvlab.errors import CurvlabError, CurvlabWarning
from curvlab.linalg.cholesky import damped_cholesky, damped_inverse, shifted, solve_cholesky


class Damped:
    """M + damping·I, a new matrix each time; the dampings asked for are kept."""

    def __init__(self, matrix: Tensor) -> None:
        self.matrix = matrix
        self.asked: list[Any] = []

    def __call__(self, damping: float) -> Tensor:
        self.asked.append(damping)
        return self.matrix + damping * torch.eye(len(self.matrix), dtype=self.matrix.dtype)


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 6), st.sampled_from([None, 1, 4]), st.integers(0, 999))
def test_solve_and_inverse(order: int, columns: int | None, seed: int) -> None:
    M = spd(order, seed)
    factor, v = (
        torch.linalg.cholesky(M),
        normal(order, *([] if columns is None else [columns]), seed=seed + 1),
    )
    assert_near(solve_cholesky(factor, v), torch.linalg.solve(M, v), 1e-11)
    assert_near(
        damped_inverse(M, 0.5, "M"),
        torch.linalg.inv(M + 0.5 * torch.eye(order, dtype=M.dtype)),
        1e-11,
    )


@pytest.mark.parametrize("damping", [0.0, 0.5])
def test_a_good_matrix_keeps_its_damping(damping: float) -> None:
    build = Damped(spd(4))
    factor, used = damped_cholesky(build, damping, "M")
    assert used == damping
    assert build.asked == [damping]
    assert_near(factor @ factor.T, build(damping))
    assert torch.equal(factor, factor.tril())


def test_only_the_lower_triangle_is_read() -> None:
    M = spd(4)
    garbage = M.tril() + torch.full((4, 4), float("nan"), dtype=M.dtype).triu(1)
    assert_near(
        damped_cholesky(lambda _: garbage.clone(), 0.0, "M")[0].tril(), torch.linalg.cholesky(M)
    )


@pytest.mark.parametrize(
    ("lowest", "damping", "expected"), [(-0.5, 0.1, 1.0), (-0.5, 0.01, 1.0), (-30.0, 0.1, 100.0)]
)
def test_damping_is_raised_tenfold_until_it_suffices(
    lowest: float, damping: float, expected: float
) -> None:
    build = Damped(torch.diag(torch.tensor([1.0, lowest, 2.0], dtype=torch.float64)))
    with pytest.warns(
        CurvlabWarning,
        match=f"the matrix is not positive definite with damping {damping:g}: raised to",
    ) as said:
        factor, used = damped_cholesky(build, damping, "the matrix")
    assert len(said) == 1
    assert used == pytest.approx(expected, rel=1e-12)
    assert_near(factor @ factor.T, build(used))


def test_zero_damping_is_raised_from_the_rounding_of_the_largest_entry() -> None:
    build = Damped(
        1e6 * torch.ones(2, 2, dtype=torch.float64)
        - torch.diag(torch.tensor([0.0, 1e-9], dtype=torch.float64))
    )
    with pytest.warns(CurvlabWarning, match="with damping 0: raised to"):
        factor, used = damped_cholesky(build, 0.0, "M")
    assert 1e-10 < used < 1e-5
    assert_near(factor @ factor.T, build(used))


@pytest.mark.parametrize("tries", [1, 3, 6])
def test_gives_up_after_its_tries_and_names_the_last_damping(tries: int) -> None:
    build = Damped(torch.diag(torch.tensor([1.0, -1e9], dtype=torch.float64)))
    with pytest.raises(
        CurvlabError,
        match=f"M is not positive definite, even with damping {10.0 ** (tries - 1):g}: raise",
    ):
        damped_cholesky(build, 1.0, "M", tries=tries)
    assert len(build.asked) == tries


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", [(0, 0), (2, 2)])
def test_not_finite(bad: float, place: tuple[int, int]) -> None:
    M = spd(3)
    M[place] = bad
    build = Damped(M)
    with pytest.raises(CurvlabError, match="the factor A contains NaN or Inf"):
        damped_cholesky(build, 0.1, "the factor A")
    assert len(build.asked) == 1


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_not_finite_beside_the_diagonal(bad: float) -> None:
    M = spd(3)
    M[2, 0] = M[0, 2] = bad
    with pytest.raises(CurvlabError, match="the factor A is not positive definite"):
        damped_cholesky(Damped(M), 0.1, "the factor A")


def test_damped_inverse_is_the_inverse_of_the_damped_matrix() -> None:
    before = spd(5)
    matrix = before.clone()
    found = damped_inverse(matrix, 0.7, "M")
    assert_near(found, torch.linalg.inv(before + 0.7 * torch.eye(5, dtype=before.dtype)))
    assert torch.equal(matrix, before)


def test_damped_inverse_says_that_it_raised_the_damping() -> None:
    indefinite = torch.diag(torch.tensor([1.0, -1.0, 2.0], dtype=torch.float64))
    with pytest.warns(
        CurvlabWarning, match="the factor G is not positive definite with damping 0.5: raised to 5"
    ):
        found = damped_inverse(indefinite, 0.5, "the factor G")
    assert_near(found, torch.linalg.inv(indefinite + 5 * torch.eye(3, dtype=indefinite.dtype)))


def test_shifted_is_a_new_contiguous_matrix() -> None:
    M = spd(3).tril() + 1
    before = M.clone()
    found = shifted(M.T, 0.5)
    assert torch.equal(found, before.T + 0.5 * torch.eye(3, dtype=M.dtype))
    assert found.is_contiguous()
    assert torch.equal(M, before)
