"""Rows and their Gram matrix against the rows written out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import assert_near, normal
from torch import Tensor

from curvlab.errors import CurvlabError, CurvlabWarning
from curvlab.linalg import woodbury
from curvlab.linalg.cholesky import solve_cholesky
from curvlab.linalg.operators import LowRank
from curvlab.linalg.woodbury import Below, Beside, LayerRows, Rows, gram_cholesky

FEW = settings(deadline=None, max_examples=25)
SIZE = st.integers(1, 5)
COLUMNS = st.sampled_from([None, 1, 3])


def build(r: int, o: int, i: int | None, seed: int) -> tuple[Rows, Tensor]:
    """Rows, and the matrix that they stand for."""
    g = normal(r, o, seed=seed)
    if i is None:
        return Rows(g), g
    a = normal(r, i, seed=seed + 1)
    return Rows(g, a), torch.stack(
        [torch.outer(gr, ar).flatten() for gr, ar in zip(g, a, strict=True)]
    )


def vectors(length: int, columns: int | None, seed: int) -> Tensor:
    return normal(length, *([] if columns is None else [columns]), seed=seed)


@FEW
@given(SIZE, SIZE, st.none() | SIZE, COLUMNS, st.integers(0, 999))
def test_rows_are_their_matrix(
    r: int, o: int, i: int | None, columns: int | None, seed: int
) -> None:
    rows, matrix = build(r, o, i, seed)
    assert rows.width == matrix.shape[1]
    assert torch.equal(rows.dense(), matrix)
    v, w = vectors(matrix.shape[1], columns, seed + 2), vectors(r, columns, seed + 3)
    assert_near(rows.times(v), matrix @ v)
    assert_near(rows.transposed(w), matrix.T @ w)
    assert_near(rows.gram(), matrix @ matrix.T)


@FEW
@given(
    st.lists(SIZE, min_size=6, max_size=6),
    COLUMNS,
    st.sampled_from([1, 1 << 24]),
    st.integers(0, 999),
)
def test_layer_rows_are_their_matrix(
    sizes: list[int], columns: int | None, numbers: int, seed: int
) -> None:
    """V, N, T, Γ, O, I; also one row at a time."""
    v, n, t, groups, o, i = sizes
    g, a = normal(v, n, t, groups, o, seed=seed), normal(n, t, groups, i, seed=seed + 1)
    rows = LayerRows(g, a)
    each = (g[..., None] * a[None, ..., None, :]).sum(2)
    matrix = each.reshape(v * n, -1)
    vector, w = vectors(matrix.shape[1], columns, seed + 2), vectors(v * n, columns, seed + 3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(woodbury, "_NUMBERS", numbers)
        assert_near(rows.gram(), matrix @ matrix.T)
    assert_near(rows.times(vector), matrix @ vector)
    assert_near(rows.transposed(w), matrix.T @ w)
    assert (len(rows), rows.width) == matrix.shape
    both = Beside((rows, Rows(matrix[:, :1]), rows))
    wide = torch.cat([matrix, matrix[:, :1], matrix], 1)
    vector = vectors(wide.shape[1], columns, seed + 4)
    for found, expected in ((rows, matrix), (both, wide), (Rows(matrix), matrix)):
        assert_near(found.dense(), expected)
        assert_near(torch.cat(list(found.columns()), 1), expected)
        assert_near(found.squares(), expected.square().sum(0))
        assert_near(found.total(), expected.square().sum())
    assert_near(both.times(vector), wide @ vector)
    assert_near(both.transposed(w), wide.T @ w)
    assert_near(both.gram(), wide @ wide.T)


@FEW
@given(SIZE, SIZE, st.none() | SIZE, st.floats(0.1, 10), st.integers(0, 999))
def test_solve_through_the_gram_matrix(
    r: int, o: int, i: int | None, damping: float, seed: int
) -> None:
    rows, matrix = build(r, o, i, seed)
    inverse: Any = LowRank(rows, damping).inv()
    factor = inverse.factor
    damped = damping * torch.eye(r, dtype=matrix.dtype) + matrix @ matrix.T
    assert_near(factor, torch.linalg.cholesky(damped))
    w = normal(r, 2, seed=seed + 4)
    assert_near(solve_cholesky(factor, w), torch.linalg.solve(damped, w), 1e-11)


@pytest.mark.parametrize("damping", [0.0, -0.5, float("nan")])
def test_gram_needs_positive_damping(damping: float) -> None:
    with pytest.raises(CurvlabError, match="the Woodbury formula needs a positive damping"):
        gram_cholesky(build(2, 3, None, 0)[0], damping)


def test_gram_that_needs_more_damping_says_so_by_its_name() -> None:
    rows = Rows(torch.full((3, 4), 1e3, dtype=torch.float64))
    with pytest.warns(
        CurvlabWarning, match="my Gram is not positive definite with damping 1e-12: raised to 1e-09"
    ):
        gram_cholesky(rows, 1e-12, "my Gram")


def test_gram_of_rows_with_nan() -> None:
    with pytest.raises(CurvlabError, match="the Gram matrix contains NaN or Inf"):
        gram_cholesky(Rows(torch.full((2, 2), float("nan"))), 1.0)


SCALE = st.just(0.0) | st.floats(1e-100, 3)  # whose squares do not leave the finite range


@FEW
@given(
    st.lists(st.tuples(SIZE, st.booleans(), SCALE), min_size=1, max_size=3),
    SIZE,
    SIZE,
    COLUMNS,
    st.integers(0, 999),
)
def test_rows_below_one_another_are_their_matrix(
    parts: list[tuple[int, bool, float]], o: int, i: int, columns: int | None, seed: int
) -> None:
    """Parts of outer products and of rows that are formed, each with its scale."""
    made: list[Rows] = []
    dense: list[Tensor] = []
    for k, (r, formed, scale) in enumerate(parts):
        rows, matrix = build(r, o, i, seed + 2 * k)
        made.append(Rows(matrix) if formed else rows)
        dense.append(scale * matrix)
    matrix = torch.cat(dense)
    found = Below(tuple(made), tuple(scale for _, _, scale in parts))
    vector, w = vectors(o * i, columns, seed + 8), vectors(len(matrix), columns, seed + 9)
    assert (len(found), found.width) == matrix.shape
    assert_near(found.times(vector), matrix @ vector)
    assert_near(found.transposed(w), matrix.T @ w)
    assert_near(found.gram(), matrix @ matrix.T)
    assert_near(found.dense(), matrix)
    assert_near(torch.cat(list(found.columns()), 1), matrix)
    assert_near(found.squares(), matrix.square().sum(0))
    assert_near(found.total(), matrix.square().sum())
