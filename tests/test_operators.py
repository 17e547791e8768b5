"""Operators: every kind against the matrix it stands for, which is made here by another route."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import FrozenInstanceError, fields, is_dataclass
from functools import reduce
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import assert_near
from torch import Tensor

from curvlab.errors import CurvlabError, CurvlabWarning
from curvlab.linalg import operators as ops
from curvlab.linalg.operators import Dense, Diagonal, DirectSum, Inverse, Kronecker, LowRank, Operator, Woodbury
from curvlab.linalg.woodbury import Rows

SMALL = st.integers(1, 4)
FEW = settings(deadline=None, max_examples=25)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def spd(order: int, seed: int = 0) -> Tensor:
    """A well-conditioned symmetric positive definite matrix."""
    m = normal(order, order, seed=seed)
    return m @ m.T / order + torch.eye(order, dtype=m.dtype)


def outer_rows(r: int, o: int, i: int, seed: int = 0) -> tuple[Rows, Tensor]:
    """Rows vec(g aᵀ), and the same matrix row by row through kron."""
    g, a = normal(r, o, seed=seed), normal(r, i, seed=seed + 1)
    return Rows(g, a), torch.stack([torch.kron(gr, ar) for gr, ar in zip(g, a, strict=True)])


def damped_gram(rows: Tensor, damping: float) -> Tensor:
    return damping * torch.eye(rows.shape[1], dtype=rows.dtype) + sum(torch.outer(r, r) for r in rows)


def low_rank(rows: tuple[Rows, Tensor], damping: float = 0.3) -> tuple[Operator, Tensor]:
    return LowRank(rows[0], damping), damped_gram(rows[1], damping)


def woodbury(rows: tuple[Rows, Tensor], damping: float = 0.3) -> tuple[Operator, Tensor]:
    gram = rows[1] @ rows[1].T + damping * torch.eye(len(rows[1]), dtype=rows[1].dtype)
    operator = Woodbury(rows[0], damping, torch.linalg.cholesky(gram))
    return operator, torch.linalg.inv(damped_gram(rows[1], damping))


def dense_rows(r: int, d: int, seed: int = 0) -> tuple[Rows, Tensor]:
    rows = normal(r, d, seed=seed)
    return Rows(rows), rows


def kronecker(*sizes: int) -> tuple[Operator, Tensor]:
    factors = tuple(spd(d, seed=s) for s, d in enumerate(sizes))
    return Kronecker(factors), reduce(torch.kron, factors)


def direct_sum(*parts: tuple[Operator, Tensor]) -> tuple[Operator, Tensor]:
    """Parts spread over shuffled entries."""
    order = torch.randperm(sum(len(m) for _, m in parts), generator=torch.Generator().manual_seed(4))
    matrix = torch.block_diag(*(m for _, m in parts))
    indices = torch.split(order, [len(m) for _, m in parts])
    back = order.argsort()
    return DirectSum(tuple(indices), tuple(o for o, _ in parts)), matrix[back][:, back]


def diagonal(order: int) -> tuple[Operator, Tensor]:
    values = normal(order).abs() + 0.1
    return Diagonal(values), values * torch.eye(order, dtype=values.dtype)


OPERATORS: dict[str, Callable[[], tuple[Operator, Tensor]]] = {
    "dense": lambda: (Dense(spd(6)), spd(6)),
    "inverse": lambda: (Inverse(torch.linalg.cholesky(spd(6))), torch.linalg.inv(spd(6))),
    "diagonal": lambda: diagonal(5),
    "kronecker-1": lambda: kronecker(5),
    "kronecker-2": lambda: kronecker(2, 3),
    "kronecker-3": lambda: kronecker(2, 3, 4),
    "low-rank-outer": lambda: low_rank(outer_rows(3, 2, 4)),
    "low-rank-outer-many": lambda: low_rank(outer_rows(9, 2, 3)),
    "low-rank-dense": lambda: low_rank(dense_rows(3, 7)),
    "low-rank-dense-many": lambda: low_rank(dense_rows(7, 3)),
    "woodbury-outer": lambda: woodbury(outer_rows(3, 2, 4)),
    "woodbury-outer-many": lambda: woodbury(outer_rows(9, 2, 3)),
    "woodbury-dense": lambda: woodbury(dense_rows(3, 7)),
    "direct-sum": lambda: direct_sum(kronecker(2, 3), diagonal(2), woodbury(outer_rows(2, 2, 2))),
    "direct-sum-nested": lambda: direct_sum(direct_sum(kronecker(2, 2), diagonal(1)), low_rank(dense_rows(2, 3))),
}
each = pytest.mark.parametrize("name", OPERATORS)


def leaves(value: Any) -> list[Any]:
    """The tensors and numbers of a packed operator, in order."""
    if isinstance(value, dict):
        return [leaf for v in value.values() for leaf in leaves(v)]
    if isinstance(value, list | tuple):
        return [leaf for v in value for leaf in leaves(v)]
    if is_dataclass(value):
        return [leaf for f in fields(value) for leaf in leaves(getattr(value, f.name))]
    return [value]


def test_table_has_every_kind() -> None:
    found = {type(build()[0]).__name__ for build in OPERATORS.values()}
    assert found | {"Rows"} == set(ops._KINDS)


@each
def test_dense_is_the_matrix(name: str) -> None:
    operator, matrix = OPERATORS[name]()
    assert isinstance(operator, Operator)
    assert len(operator) == len(matrix)
    assert_near(operator.dense(), matrix)
    assert_near(operator.dense(), operator.dense().T)


@each
@pytest.mark.parametrize("columns", [None, 1, 3])
def test_matmul(name: str, columns: int | None) -> None:
    operator, matrix = OPERATORS[name]()
    v = normal(len(matrix), *([] if columns is None else [columns]), seed=9)
    assert_near(operator @ v, matrix @ v)


@each
def test_matmul_leaves_its_argument_alone_and_takes_strided_columns(name: str) -> None:
    operator, matrix = OPERATORS[name]()
    v = normal(3, len(matrix), seed=9).T
    before = v.clone()
    assert_near(operator @ v, matrix @ before)
    assert torch.equal(v, before)


@each
def test_eigvalsh(name: str) -> None:
    operator, matrix = OPERATORS[name]()
    assert_near(operator.eigvalsh(), torch.linalg.eigvalsh(matrix))


@each
def test_inverse(name: str) -> None:
    operator, matrix = OPERATORS[name]()
    inverse = operator.inv()
    assert len(inverse) == len(operator)
    assert_near(inverse.dense(), torch.linalg.inv(matrix))
    assert_near(inverse.eigvalsh(), torch.linalg.eigvalsh(torch.linalg.inv(matrix)))
    v = normal(len(matrix), 2, seed=9)
    assert_near(inverse @ (operator @ v), v)


@each
def test_inverse_of_inverse(name: str) -> None:
    operator, matrix = OPERATORS[name]()
    twice = operator.inv().inv()
    assert_near(twice.dense(), matrix)
    assert_near(twice @ matrix[:, 0].contiguous(), matrix @ matrix[:, 0])


@each
def test_pack_through_a_file_without_pickled_code_is_exact(name: str) -> None:
    operator, matrix = OPERATORS[name]()
    file = io.BytesIO()
    torch.save(ops.pack(operator), file)
    file.seek(0)
    back = ops.unpack_operator(torch.load(file, weights_only=True))
    assert type(back) is type(operator)
    saved, loaded = leaves(operator), leaves(back)
    assert len(saved) == len(loaded) > 0
    for one, other in zip(saved, loaded, strict=True):
        assert type(one) is type(other)
        assert torch.equal(one, other) if isinstance(one, Tensor) else one == other
    v = normal(len(matrix), seed=9)
    assert torch.equal(back @ v, operator @ v)
    assert torch.equal(back.inv() @ v, operator.inv() @ v)


@each
def test_operators_are_values(name: str) -> None:
    operator, _ = OPERATORS[name]()
    with pytest.raises(FrozenInstanceError):
        setattr(operator, fields(operator)[0].name, None)


@each
def test_float32_stays_float32(name: str) -> None:
    operator, matrix = OPERATORS[name]()
    single = ops.unpack(_single(ops.pack(operator)))
    v = normal(len(matrix), seed=9, dtype=torch.float32)
    assert_near(single @ v, (matrix @ v.double()).float(), 1e-5)
    assert {single.dense().dtype, single.inv().dense().dtype, single.eigvalsh().dtype} == {torch.float32}


def _single(packed: Any) -> Any:
    if isinstance(packed, dict):
        return {k: _single(v) for k, v in packed.items()}
    if isinstance(packed, list):
        return [_single(v) for v in packed]
    return packed.float() if isinstance(packed, Tensor) and packed.is_floating_point() else packed


@FEW
@given(st.integers(1, 6), SMALL, SMALL, st.floats(0.1, 10), st.integers(0, 99))
def test_woodbury_is_the_inverse_of_low_rank(r: int, o: int, i: int, damping: float, seed: int) -> None:
    rows, explicit = outer_rows(r, o, i, seed)
    matrix = damped_gram(explicit, damping)
    assert_near(LowRank(rows, damping).inv().dense(), torch.linalg.inv(matrix), 1e-11)
    assert_near(LowRank(rows, damping).eigvalsh(), torch.linalg.eigvalsh(matrix), 1e-11)


@FEW
@given(st.lists(SMALL, min_size=1, max_size=4), st.integers(0, 99))
def test_inverse_of_a_kronecker_product_is_the_product_of_the_inverses(sizes: list[int], seed: int) -> None:
    factors = tuple(spd(d, seed + s) for s, d in enumerate(sizes))
    operator = Kronecker(factors)
    assert_near(operator.inv().dense(), torch.linalg.inv(reduce(torch.kron, factors)), 1e-11)
    assert_near(operator.eigvalsh(), torch.linalg.eigvalsh(reduce(torch.kron, factors)), 1e-11)


@FEW
@given(st.permutations(range(6)), st.integers(1, 5))
def test_direct_sum_acts_on_each_part_alone(order: list[int], cut: int) -> None:
    indices = (torch.tensor(order[:cut]), torch.tensor(order[cut:]))
    first, second = spd(cut, 1), spd(6 - cut, 2)
    operator, v = DirectSum(indices, (Dense(first), Dense(second))), normal(6, seed=3)
    found = operator @ v
    assert_near(found[indices[0]], first @ v[indices[0]])
    assert_near(found[indices[1]], second @ v[indices[1]])
    assert not operator.dense()[indices[0][:, None], indices[1]].any()


INDEFINITE = torch.diag(torch.tensor([1.0, -1.0, 2.0], dtype=torch.float64))


@pytest.mark.parametrize(
    "operator",
    [
        Dense(INDEFINITE),
        Dense(torch.zeros(2, 2)),
        Kronecker((spd(2), INDEFINITE)),
        Diagonal(torch.tensor([1.0, 0.0])),
        DirectSum((torch.arange(3), torch.arange(3, 5)), (Dense(INDEFINITE), Dense(spd(2)))),
    ],
    ids=["dense", "zero", "kronecker", "diagonal", "direct-sum"],
)
def test_no_inverse_where_not_positive_definite(operator: Operator) -> None:
    with pytest.raises(CurvlabError, match="not positive definite"):
        operator.inv()


@pytest.mark.parametrize("damping", [0.0, -1.0, float("nan")])
def test_low_rank_needs_damping_to_be_inverted(damping: float) -> None:
    with pytest.raises(CurvlabError, match="positive damping"):
        LowRank(outer_rows(2, 2, 2)[0], damping).inv()


def test_woodbury_whose_damping_had_to_be_raised_uses_one_damping_everywhere() -> None:
    """A Gram matrix of 4e6 everywhere swallows a damping of 1e-12: it is 1e-9 that holds, in the factor and outside."""
    rows = Rows(torch.full((3, 4), 1e3, dtype=torch.float64))
    with pytest.warns(CurvlabWarning, match="the Gram matrix is not positive definite with damping 1e-12: raised to 1e-09"):
        inverse = LowRank(rows, 1e-12).inv()
    assert isinstance(inverse, Woodbury)
    assert inverse.damping == pytest.approx(1e-9, rel=1e-12)
    gram = torch.full((3, 3), 4e6, dtype=torch.float64) + inverse.damping * torch.eye(3, dtype=torch.float64)
    assert torch.equal(inverse.factor, torch.linalg.cholesky(gram))
    across = torch.tensor([1.0, -1.0, 0.0, 0.0], dtype=torch.float64)  # at right angles to every row
    assert_near(inverse @ across, across / 1e-9)
    assert_near(inverse.inv() @ across, across * 1e-9)


def test_identity_like() -> None:
    value = normal(2, 3)
    assert torch.equal(ops.identity_like(value) @ value.flatten(), value.flatten())
    assert len(ops.identity_like(value)) == 6
