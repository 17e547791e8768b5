"""Operators: every kind against the matrix it stands for, which is made here by another route."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import FrozenInstanceError, fields, is_dataclass
from functools import partial, reduce
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from oracle import total
from problems import assert_near, normal, spd
from scipy.sparse import linalg as scipy_linalg
from torch import Tensor

from curvlab.curvature import one_sided
from curvlab.curvature.one_sided import RememberedPolar
from curvlab.errors import CurvlabError, CurvlabWarning
from curvlab.linalg import operator_states
from curvlab.linalg import operators as ops
from curvlab.linalg.damped import Damped
from curvlab.linalg.direct_sum import ColumnSum, DirectSum
from curvlab.linalg.eigenbasis import Rotated, shifted_kronecker
from curvlab.linalg.operators import (
    Compact,
    Dense,
    Diagonal,
    Inverse,
    Kronecker,
    LowRank,
    Operator,
    Woodbury,
)
from curvlab.linalg.polar import newton_schulz_factor
from curvlab.linalg.products import (
    Product,
    Rectangular,
    RectangularProduct,
    finite_product,
    placement,
)
from curvlab.linalg.scipy_operator import linear_operator
from curvlab.linalg.woodbury import Beside, LayerRows, RowMatrix, Rows

SMALL = st.integers(1, 4)
FEW = settings(deadline=None, max_examples=25)


def outer_rows(r: int, o: int, i: int, seed: int = 0) -> tuple[Rows, Tensor]:
    """Rows vec(g aᵀ), and the same matrix row by row through kron."""
    g, a = normal(r, o, seed=seed), normal(r, i, seed=seed + 1)
    return Rows(g, a), torch.stack([torch.kron(gr, ar) for gr, ar in zip(g, a, strict=True)])


def damped_gram(rows: Tensor, damping: float) -> Tensor:
    return damping * torch.eye(rows.shape[1], dtype=rows.dtype) + sum(
        torch.outer(r, r) for r in rows
    )


def layer_rows(
    v: int, n: int, t: int, groups: int, o: int, i: int, seed: int = 0
) -> tuple[LayerRows, Tensor]:
    """Rows Σ_t vec(g aᵀ), group after group, and the same matrix row by row."""
    g, a = normal(v, n, t, groups, o, seed=seed), normal(n, t, groups, i, seed=seed + 1)
    row = lambda w, m: torch.cat(  # noqa: E731
        [total(torch.kron(g[w, m, s, c], a[m, s, c]) for s in range(t)) for c in range(groups)]
    )
    return LayerRows(g, a), torch.stack([row(w, m) for w in range(v) for m in range(n)])


def beside() -> tuple[Beside, Tensor]:
    parts: list[tuple[RowMatrix, Tensor]] = [
        layer_rows(2, 2, 1, 1, 2, 3),
        layer_rows(2, 2, 3, 2, 1, 2, 4),
        dense_rows(4, 2, 6),
    ]
    return Beside(tuple(r for r, _ in parts)), torch.cat([m for _, m in parts], 1)


def low_rank(rows: tuple[RowMatrix, Tensor], damping: float = 0.3) -> tuple[Operator, Tensor]:
    return LowRank(rows[0], damping), damped_gram(rows[1], damping)


def woodbury(rows: tuple[RowMatrix, Tensor], damping: float = 0.3) -> tuple[Operator, Tensor]:
    gram = rows[1] @ rows[1].T + damping * torch.eye(len(rows[1]), dtype=rows[1].dtype)
    operator = Woodbury(rows[0], damping, torch.linalg.cholesky(gram))
    return operator, torch.linalg.inv(damped_gram(rows[1], damping))


def dense_rows(r: int, d: int, seed: int = 0) -> tuple[Rows, Tensor]:
    rows = normal(r, d, seed=seed)
    return Rows(rows), rows


def kronecker(*sizes: int) -> tuple[Operator, Tensor]:
    factors = tuple(spd(d, seed=s) for s, d in enumerate(sizes))
    return Kronecker(factors), reduce(torch.kron, factors)


def rotated(*sizes: int, shift: float = 0.3) -> tuple[Operator, Tensor]:
    """A product and a multiple of the identity."""
    factors = tuple(spd(d, seed=s) for s, d in enumerate(sizes))
    matrix = reduce(torch.kron, factors)
    return shifted_kronecker(factors, shift), matrix + shift * torch.eye(
        len(matrix), dtype=matrix.dtype
    )


def rotated_compact(*sizes: int) -> tuple[Operator, Tensor]:
    """Few rows added in the eigenbases."""
    base: Any = rotated(*sizes)[0]
    values = base.inside.values
    inside, matrix = compact((Diagonal(values), torch.diag(values)), 3)
    assert isinstance(inside, Compact)
    basis = reduce(torch.kron, [q.contiguous() for q in base.bases])
    return Rotated(base.bases, inside), basis @ matrix @ basis.T


def kronecker_of(*parts: tuple[Operator | Tensor, Tensor]) -> tuple[Operator, Tensor]:
    return Kronecker(tuple(u for u, _ in parts)), reduce(
        torch.kron, (m.contiguous() for _, m in parts)
    )


def direct_sum(*parts: tuple[Operator, Tensor]) -> tuple[Operator, Tensor]:
    """Parts spread over shuffled entries."""
    order = torch.randperm(
        sum(len(m) for _, m in parts), generator=torch.Generator().manual_seed(4)
    )
    matrix = torch.block_diag(*(m for _, m in parts))
    indices = torch.split(order, [len(m) for _, m in parts])
    back = order.argsort()
    return DirectSum(tuple(indices), tuple(o for o, _ in parts)), matrix[back][:, back]


def column_sum(*parts: tuple[Operator, Tensor], outputs: int = 3) -> tuple[Operator, Tensor]:
    """Parts on neighbouring columns of a matrix."""
    widths = [len(m) // outputs for _, m in parts]
    entries = torch.arange(outputs * sum(widths)).view(outputs, -1)
    order = torch.cat([e.flatten() for e in entries.split(widths, 1)])
    back = order.argsort()
    matrix = torch.block_diag(*(m for _, m in parts))
    return ColumnSum(outputs, tuple(widths), tuple(o for o, _ in parts)), matrix[back][:, back]


def diagonal(order: int) -> tuple[Operator, Tensor]:
    values = normal(order).abs() + 0.1
    return Diagonal(values), values * torch.eye(order, dtype=values.dtype)


def compact(base: tuple[Operator, Tensor], k: int = 4) -> tuple[Operator, Tensor]:
    """A definite matrix with an indefinite core: half of what is added to M is positive, half is
    negative.
    """
    operator, matrix = base
    rows = normal(k, len(matrix), seed=6)
    core = normal(k, k, seed=7)
    core = 30 * torch.diag(torch.tensor([1.0, -1.0] * k, dtype=core.dtype)[:k]) + core + core.T
    return Compact(operator, rows, core), matrix + rows.T @ torch.linalg.inv(core) @ rows


def remembered(outputs: int, inputs: int) -> tuple[RememberedPolar, Tensor]:
    """Its remembered product is the exact one here, which bfloat16 would round."""
    U = normal(outputs, inputs)
    factor = 0.7 * newton_schulz_factor(U)
    one = torch.eye(max(U.shape), dtype=U.dtype)
    matrix = torch.kron(factor, one) if outputs <= inputs else torch.kron(one, factor)
    return RememberedPolar(U, (matrix @ U.flatten()).view_as(U), 0.7), matrix


@pytest.mark.parametrize("late", [False, True])
def test_the_remembered_product_is_of_its_own_vector_alone(
    late: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a direction that is not the operator's product; also where nothing may be waited for."""
    monkeypatch.setattr(one_sided, "waits", lambda v: late)
    operator, matrix = remembered(2, 4)
    other = RememberedPolar(operator.U, torch.ones_like(operator.U), operator.scale)
    vector = operator.U.flatten()
    assert torch.equal(other @ vector, torch.ones(8, dtype=vector.dtype))
    assert_near(other @ (2 * vector), 2 * matrix @ vector)
    assert_near(other @ vector[:, None], matrix @ vector[:, None])


OPERATORS: dict[str, Callable[[], tuple[Operator, Tensor]]] = {
    "dense": lambda: (Dense(spd(6)), spd(6)),
    "inverse": lambda: (Inverse(torch.linalg.cholesky(spd(6))), torch.linalg.inv(spd(6))),
    "diagonal": lambda: diagonal(5),
    "remembered-wide": lambda: remembered(2, 4),
    "remembered-tall": lambda: remembered(4, 3),
    "kronecker-1": lambda: kronecker(5),
    "kronecker-2": lambda: kronecker(2, 3),
    "kronecker-3": lambda: kronecker(2, 3, 4),
    "rotated-1": lambda: rotated(5),
    "rotated-2": lambda: rotated(2, 3),
    "rotated-3": lambda: rotated(2, 3, 4),
    "kronecker-of-operators": lambda: kronecker_of(
        compact(diagonal(3), 2), (spd(2), spd(2)), diagonal(2)
    ),
    "low-rank-outer": lambda: low_rank(outer_rows(3, 2, 4)),
    "low-rank-outer-many": lambda: low_rank(outer_rows(9, 2, 3)),
    "low-rank-layer": lambda: low_rank(layer_rows(2, 3, 1, 1, 2, 4)),
    "low-rank-places": lambda: low_rank(layer_rows(2, 2, 3, 1, 2, 2)),
    "low-rank-groups": lambda: low_rank(layer_rows(1, 3, 1, 2, 2, 2)),
    "low-rank-beside": lambda: low_rank(beside()),
    "woodbury-layer": lambda: woodbury(layer_rows(3, 2, 1, 1, 2, 4)),
    "woodbury-places": lambda: woodbury(layer_rows(2, 3, 2, 2, 1, 2)),
    "woodbury-beside": lambda: woodbury(beside()),
    "low-rank-dense": lambda: low_rank(dense_rows(3, 7)),
    "low-rank-dense-many": lambda: low_rank(dense_rows(7, 3)),
    "woodbury-outer": lambda: woodbury(outer_rows(3, 2, 4)),
    "woodbury-outer-many": lambda: woodbury(outer_rows(9, 2, 3)),
    "woodbury-dense": lambda: woodbury(dense_rows(3, 7)),
    "compact-identity": lambda: compact(
        (Diagonal(torch.full((6,), 2.0, dtype=torch.float64)), 2.0 * torch.eye(6).double())
    ),
    "compact-identity-many": lambda: compact(
        (Diagonal(torch.ones(3, dtype=torch.float64)), torch.eye(3).double()), 5
    ),
    "compact-diagonal": lambda: compact(diagonal(5), 2),
    "compact-kronecker": lambda: compact(kronecker(2, 3)),
    "rotated-compact": lambda: rotated_compact(2, 3),
    "compact-rotated": lambda: compact(rotated(2, 3)),
    "compact-low-rank": lambda: compact(low_rank(outer_rows(3, 2, 4), 1.0), 2),
    "compact-woodbury": lambda: compact(woodbury(dense_rows(3, 7)), 1),
    "direct-sum-compact": lambda: direct_sum(compact(kronecker(2, 2)), diagonal(2)),
    "direct-sum": lambda: direct_sum(kronecker(2, 3), diagonal(2), woodbury(outer_rows(2, 2, 2))),
    "column-sum": lambda: column_sum(kronecker(3, 2), diagonal(3)),
    "direct-sum-nested": lambda: direct_sum(
        direct_sum(kronecker(2, 2), diagonal(1)), low_rank(dense_rows(2, 3))
    ),
}
each = pytest.mark.parametrize("name", OPERATORS)


def product(order: int, chunk: int = 64, diagonal: bool = False) -> tuple[Product, Tensor]:
    """A product that takes columns only, and no more of them than `chunk`."""
    matrix = spd(order)

    def apply(v: Tensor) -> Tensor:
        assert v.shape[0] == order
        assert 1 <= v.shape[1] <= chunk
        return matrix @ v

    exact = matrix.diagonal if diagonal else None
    return Product(apply, order, matrix.dtype, matrix.device, exact, chunk), matrix


def implicit(inverted: bool) -> tuple[Operator, Tensor]:
    """A product and a damping, or its inverse by conjugate gradients."""
    operator, matrix = product(6)
    damped = matrix + 0.3 * torch.eye(6, dtype=matrix.dtype)
    return (
        (Damped(operator, 0.3).inv(), torch.linalg.inv(damped))
        if inverted
        else (Damped(operator, 0.3), damped)
    )


EVERY = OPERATORS | {
    "damped": lambda: implicit(False),
    "solve": lambda: implicit(True),
    "product": lambda: product(6),
    "product-1": lambda: product(6, chunk=1),
    "product-4": lambda: product(6, chunk=4),
    "product-diagonal": lambda: product(6, diagonal=True),
    "direct-sum-product": lambda: direct_sum(product(4, chunk=3), diagonal(2)),
}
"""With the operators that no file can hold."""
every = pytest.mark.parametrize("name", EVERY)


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
    assert found == set(operator_states._KINDS) - {
        *("Rows", "LayerRows", "Beside", "Below", "Memory")
    }


@every
def test_dense_is_the_matrix(name: str) -> None:
    operator, matrix = EVERY[name]()
    assert isinstance(operator, Operator)
    assert len(operator) == len(matrix)
    assert_near(operator.dense(), matrix)
    assert_near(operator.dense(), operator.dense().T)


@every
@pytest.mark.parametrize("columns", [None, 1, 3])
def test_matmul(name: str, columns: int | None) -> None:
    operator, matrix = EVERY[name]()
    v = normal(len(matrix), *([] if columns is None else [columns]), seed=9)
    assert_near(operator @ v, matrix @ v)


@every
def test_matmul_leaves_its_argument_alone_and_takes_strided_columns(name: str) -> None:
    operator, matrix = EVERY[name]()
    v = normal(3, len(matrix), seed=9).T
    before = v.clone()
    assert_near(operator @ v, matrix @ before)
    assert torch.equal(v, before)


@every
def test_eigvalsh(name: str) -> None:
    operator, matrix = EVERY[name]()
    assert_near(operator.eigvalsh(), torch.linalg.eigvalsh(matrix))


@every
def test_diag_and_trace(name: str) -> None:
    operator, matrix = EVERY[name]()
    for value, dense in ((operator, matrix), (operator.inv(), torch.linalg.inv(matrix))):
        assert_near(value.diag(), dense.diagonal())
        assert_near(value.trace(), dense.trace())


LARGE = 200_000
WIDE: dict[str, Operator] = {  # an order of 200 000: 320 GB if dense
    "diagonal": Diagonal(normal(LARGE).abs()),
    "kronecker": Kronecker((spd(400), spd(500))),
    "rotated": shifted_kronecker((spd(400), spd(500)), 0.3),
    "rotated-compact": Rotated(
        (torch.linalg.qr(normal(400, 400))[0], torch.linalg.qr(normal(500, 500))[0]),
        Compact(
            Diagonal(normal(LARGE).abs() + 1),
            normal(2, LARGE),
            1e6 * torch.eye(2, dtype=torch.float64),
        ),
    ),
    "low-rank-outer": LowRank(outer := Rows(normal(3, 400), normal(3, 500)), 0.3),
    "low-rank-dense": LowRank(long := Rows(normal(3, LARGE)), 0.3),
    "woodbury-outer": LowRank(outer, 0.3).inv(),
    "woodbury-dense": LowRank(long, 0.3).inv(),
    "direct-sum": DirectSum(
        (torch.arange(LARGE - 2), torch.arange(LARGE - 2, LARGE)),
        (Diagonal(normal(LARGE - 2)), Dense(spd(2))),
    ),
    "compact": Compact(
        Diagonal(normal(LARGE).abs() + 1), normal(3, LARGE), 1e6 * torch.eye(3, dtype=torch.float64)
    ),
    "product": Product(
        lambda v: v,
        LARGE,
        torch.float64,
        torch.device("cpu"),
        lambda: torch.ones(LARGE, dtype=torch.float64),
    ),
}


@pytest.mark.parametrize("name", WIDE)
def test_diag_and_trace_take_no_dense_matrix_and_no_rows_of_outer_products(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(rows: Rows) -> Tensor:
        raise AssertionError("the rows were formed")

    monkeypatch.setattr(Rows, "dense", refuse)
    operator = WIDE[name]
    found = operator.diag()
    assert_near(operator.trace(), found.sum(), 1e-11)
    for entry in (0, 501, LARGE - 1):
        unit = torch.zeros(LARGE, dtype=torch.float64)
        unit[entry] = 1
        assert_near(found[entry], (operator @ unit)[entry])


@every
def test_inverse(name: str) -> None:
    operator, matrix = EVERY[name]()
    inverse = operator.inv()
    assert len(inverse) == len(operator)
    assert_near(inverse.dense(), torch.linalg.inv(matrix))
    assert_near(inverse.eigvalsh(), torch.linalg.eigvalsh(torch.linalg.inv(matrix)))
    v = normal(len(matrix), 2, seed=9)
    assert_near(inverse @ (operator @ v), v)


@every
def test_inverse_of_inverse(name: str) -> None:
    operator, matrix = EVERY[name]()
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
        setattr(operator, fields(cast(Any, operator))[0].name, None)


@each
def test_float32_stays_float32(name: str) -> None:
    operator, matrix = OPERATORS[name]()
    single = ops.unpack(_single(ops.pack(operator)))
    v = normal(len(matrix), seed=9, dtype=torch.float32)
    assert_near(single @ v, (matrix @ v.double()).float(), 1e-5)
    results = (
        single.dense(),
        single.inv().dense(),
        single.eigvalsh(),
        single.diag(),
        single.inv().diag(),
    )
    assert {r.dtype for r in (*results, single.trace(), single.inv().trace())} == {torch.float32}
    assert placement(single) == placement(single.inv()) == (torch.float32, torch.device("cpu"))


def _single(packed: Any) -> Any:
    if isinstance(packed, dict):
        return {k: _single(v) for k, v in packed.items()}
    if isinstance(packed, list):
        return [_single(v) for v in packed]
    return packed.float() if isinstance(packed, Tensor) and packed.is_floating_point() else packed


@FEW
@given(st.integers(1, 6), SMALL, SMALL, st.floats(0.1, 10), st.integers(0, 99))
def test_woodbury_is_the_inverse_of_low_rank(
    r: int, o: int, i: int, damping: float, seed: int
) -> None:
    rows, explicit = outer_rows(r, o, i, seed)
    matrix = damped_gram(explicit, damping)
    assert_near(LowRank(rows, damping).inv().dense(), torch.linalg.inv(matrix), 1e-11)
    assert_near(LowRank(rows, damping).eigvalsh(), torch.linalg.eigvalsh(matrix), 1e-11)


@FEW
@given(st.lists(SMALL, min_size=1, max_size=4), st.integers(0, 99))
def test_inverse_of_a_kronecker_product_is_the_product_of_the_inverses(
    sizes: list[int], seed: int
) -> None:
    factors = tuple(spd(d, seed + s) for s, d in enumerate(sizes))
    operator = Kronecker(factors)
    assert_near(operator.inv().dense(), torch.linalg.inv(reduce(torch.kron, factors)), 1e-11)
    assert_near(operator.eigvalsh(), torch.linalg.eigvalsh(reduce(torch.kron, factors)), 1e-11)


@FEW
@given(st.lists(SMALL, min_size=1, max_size=3), st.floats(1e-3, 10), st.integers(0, 99))
def test_a_shifted_kronecker_product_of_singular_factors(
    sizes: list[int], shift: float, seed: int
) -> None:
    """Of rank one: nothing is below the shift, and the inverse is exact."""
    columns = [normal(d, 1, seed=seed + k) for k, d in enumerate(sizes)]
    operator = shifted_kronecker(tuple(c @ c.T for c in columns), shift)
    matrix = reduce(torch.kron, [c @ c.T for c in columns]) + shift * torch.eye(
        len(operator), dtype=torch.float64
    )
    assert float(operator.eigvalsh()[0]) >= shift
    assert_near(operator.dense(), matrix, 1e-12)
    assert (
        float((operator.inv().dense() @ matrix - torch.eye(len(matrix), dtype=matrix.dtype)).norm())
        < 1e-10
    )


def test_eigenvectors_are_found_in_double_precision_where_single_fails(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    eigh = torch.linalg.eigh

    def fails(matrix: Tensor) -> tuple[Tensor, Tensor]:
        if matrix.dtype == torch.float32:
            raise torch.linalg.LinAlgError("the algorithm failed to converge")  # type: ignore[attr-defined]  # no stub has it
        return eigh(matrix)

    factors = (spd(3).float(), spd(4, 1).float())
    expected = shifted_kronecker(factors, 0.3).dense()
    monkeypatch.setattr(torch.linalg, "eigh", fails)
    found = shifted_kronecker(factors, 0.3)
    assert isinstance(found.inside, Diagonal)
    assert found.inside.values.dtype == found.bases[0].dtype == torch.float32
    assert_near(found.dense(), expected, 1e-6)


def test_a_shifted_kronecker_product_takes_no_nan() -> None:
    with pytest.raises(
        CurvlabError, match=r"a Kronecker factor contains NaN or Inf: .* raise the damping"
    ):
        shifted_kronecker((spd(2), torch.full((2, 2), float("nan"), dtype=torch.float64)), 1.0)


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
        Rotated(
            (torch.eye(2).double(), torch.eye(2).double()),
            Diagonal(torch.tensor([1.0, 2.0, -1.0, 1.0]).double()),
        ),
        Compact(Diagonal(torch.ones(3)), torch.ones(1, 3), -torch.ones(1, 1)),
        Compact(Diagonal(torch.ones(3)), torch.ones(1, 3), -torch.full((1, 1), 3.0)),
        Compact(Dense(INDEFINITE), torch.zeros(1, 3).double(), torch.ones(1, 1).double()),
        DirectSum((torch.arange(3), torch.arange(3, 5)), (Dense(INDEFINITE), Dense(spd(2)))),
    ],
    ids=[
        "dense",
        "zero",
        "kronecker",
        "diagonal",
        "rotated",
        "compact",
        "compact-singular",
        "compact-base",
        "direct-sum",
    ],
)
def test_no_inverse_where_not_positive_definite(operator: Operator) -> None:
    with pytest.raises(CurvlabError, match="not positive definite"):
        operator.inv()


@pytest.mark.parametrize("damping", [0.0, -1.0, float("nan")])
def test_low_rank_needs_damping_to_be_inverted(damping: float) -> None:
    with pytest.raises(CurvlabError, match="positive damping"):
        LowRank(outer_rows(2, 2, 2)[0], damping).inv()


def test_woodbury_whose_damping_had_to_be_raised_uses_one_damping_everywhere() -> None:
    """A Gram matrix of 4e6 everywhere swallows a damping of 1e-12: it is 1e-9 that holds, in the
    factor and outside.
    """
    rows = Rows(torch.full((3, 4), 1e3, dtype=torch.float64))
    with pytest.warns(
        CurvlabWarning,
        match="the Gram matrix is not positive definite with damping 1e-12: raised to 1e-09",
    ):
        inverse = LowRank(rows, 1e-12).inv()
    assert isinstance(inverse, Woodbury)
    assert inverse.damping == pytest.approx(1e-9, rel=1e-12)
    gram = torch.full((3, 3), 4e6, dtype=torch.float64) + inverse.damping * torch.eye(
        3, dtype=torch.float64
    )
    assert torch.equal(inverse.factor, torch.linalg.cholesky(gram))
    # at right angles to every row
    across = torch.tensor([1.0, -1.0, 0.0, 0.0], dtype=torch.float64)
    assert_near(inverse @ across, across / 1e-9)
    assert_near(inverse.inv() @ across, across * 1e-9)


@FEW
@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 999))
def test_compact_is_inverted_where_and_only_where_it_is_positive_definite(
    order: int, k: int, seed: int
) -> None:
    base, rows, core = (
        spd(order, seed),
        normal(k, order, seed=seed + 1),
        normal(k, k, seed=seed + 2),
    )
    core = core + core.T
    operator = Compact(Dense(base), rows, core)
    matrix = base + rows.T @ torch.linalg.inv(core) @ rows
    values = torch.linalg.eigvalsh(matrix)
    assume(
        float(torch.linalg.cond(core)) < 1e4
        and float(values.abs().amin() / values.abs().amax()) > 1e-5
    )
    if float(values[0]) > 0:
        assert_near(operator.inv().dense(), torch.linalg.inv(matrix), 1e-8)
    else:
        with pytest.raises(CurvlabError, match="not positive definite"):
            operator.inv()


def test_eigenvalues_of_a_long_compact_matrix_take_no_dense_one() -> None:
    rows, core = normal(2, LARGE), torch.tensor([[1e6, 0.0], [0.0, -1e6]], dtype=DOUBLE)
    found = Compact(Diagonal(torch.full((LARGE,), 3.0, dtype=DOUBLE)), rows, core).eigvalsh()
    assert torch.equal(found[1:-1], torch.full((LARGE - 2,), 3.0, dtype=DOUBLE))
    moved = torch.linalg.eigvals(torch.linalg.inv(core) @ (rows @ rows.T)).real.sort().values
    assert_near(found[[0, -1]], 3 + moved)


def test_identity_like() -> None:
    value = normal(2, 3)
    assert torch.equal(ops.identity_like(value) @ value.flatten(), value.flatten())
    assert len(ops.identity_like(value)) == 6


# Matrices known by their products, and what SciPy makes of operators.

DOUBLE, CPU = torch.float64, torch.device("cpu")


def counted(matrix: Tensor, columns: list[int], v: Tensor) -> Tensor:
    columns.append(v.shape[1])
    return matrix @ v


def test_product_takes_no_more_columns_at_once_than_its_chunk() -> None:
    columns: list[int] = []
    operator = Product(partial(counted, spd(5), columns), 5, DOUBLE, CPU, chunk=2)
    operator @ normal(5, 7)
    operator @ normal(5)
    operator.diag()
    assert (operator @ normal(5, 0)).shape == (5, 0)
    assert columns == [2, 2, 2, 1, 1, 2, 2, 1]


def test_product_is_not_symmetrised() -> None:
    matrix = normal(4, 4)
    assert torch.equal(Product(lambda v: matrix @ v, 4, DOUBLE, CPU, chunk=3).dense(), matrix)


def test_diagonal_of_a_product_takes_no_products_where_its_maker_knows_it() -> None:
    columns: list[int] = []
    operator = Product(partial(counted, spd(5), columns), 5, DOUBLE, CPU, spd(5).diagonal)
    assert_near(operator.diag(), spd(5).diagonal())
    assert_near(operator.trace(), spd(5).trace())
    assert columns == []


@pytest.mark.parametrize(
    "v", [normal(4), normal(6, 5), normal(5, 2, 2), normal(5).float(), torch.tensor(1.0)]
)
def test_product_says_what_it_takes(v: Tensor) -> None:
    with pytest.raises(
        CurvlabError,
        match=r"a 5×5 product got .*: pass a vector \[5\], or columns \[5, K\], of torch.float64",
    ):
        product(5)[0] @ v


@pytest.mark.parametrize(
    "apply", [lambda v: v[:-1], lambda v: v[:, :1], lambda v: v.float(), lambda v: v.sum()]
)
def test_product_says_what_its_function_is_to_return(apply: Callable[[Tensor], Tensor]) -> None:
    operator = Product(apply, 5, DOUBLE, CPU)
    with pytest.raises(
        CurvlabError, match=r"from 2 columns it is to make \[5, 2\] of torch.float64"
    ):
        operator @ normal(5, 2)
    with pytest.raises(CurvlabError, match="the function behind a product returned"):
        operator.dense()


def test_product_too_large_to_be_dense() -> None:
    operator = Product(lambda v: v, 10**7, torch.float32, CPU)
    for use in (operator.dense, operator.inv, operator.eigvalsh):
        with pytest.raises(
            CurvlabError,
            match=r"10000000×10000000 matrix would need 400000.0 GB .* use products with vectors",
        ):
            use()


def test_product_of_no_columns_at_once() -> None:
    with pytest.raises(CurvlabError, match="at least 1 column at once: chunk is 0"):
        product(5, chunk=0)


def test_indefinite_product_has_no_inverse() -> None:
    with pytest.raises(CurvlabError, match="not positive definite"):
        Product(lambda v: -v, 3, DOUBLE, CPU).inv()


def rectangular_product(matrix: Tensor, chunk: int = 2) -> RectangularProduct:
    def checked(m: Tensor, v: Tensor) -> Tensor:
        assert v.ndim == 2
        assert 1 <= v.shape[1] <= chunk
        return m @ v

    shape = (matrix.shape[0], matrix.shape[1])
    return RectangularProduct(
        partial(checked, matrix), partial(checked, matrix.T), shape, DOUBLE, CPU, chunk
    )


rectangular = pytest.mark.parametrize("make", [Rectangular, rectangular_product])


@rectangular
@pytest.mark.parametrize("shape", [(3, 5), (5, 3), (4, 4), (1, 3)])
def test_rectangular(
    make: Callable[[Tensor], Rectangular | RectangularProduct], shape: tuple[int, int]
) -> None:
    matrix = normal(*shape)
    operator = make(matrix)
    assert (operator.shape, operator.T.shape) == (shape, shape[::-1])
    assert_near(operator.dense(), matrix)
    assert_near(operator.T.dense(), matrix.T)
    assert_near(operator.T.T.dense(), matrix)
    for columns in ((), (1,), (3,)):
        v, w = normal(shape[1], *columns, seed=1), normal(shape[0], *columns, seed=2)
        assert_near(operator @ v, matrix @ v)
        assert_near(operator.T @ w, matrix.T @ w)


def test_rectangular_product_is_made_dense_from_the_shorter_side() -> None:
    forth: list[int] = []
    back: list[int] = []
    matrix = normal(2, 5)
    operator = RectangularProduct(
        partial(counted, matrix, forth), partial(counted, matrix.T, back), (2, 5), DOUBLE, CPU
    )
    operator.dense()
    assert (sum(forth), sum(back)) == (0, 2)


def test_rectangular_product_says_what_it_takes() -> None:
    with pytest.raises(CurvlabError, match=r"a 3×5 product got \[3\]"):
        rectangular_product(normal(3, 5)) @ normal(3)
    with pytest.raises(CurvlabError, match=r"a 5×3 product got \[5, 2\]"):
        rectangular_product(normal(3, 5)).T @ normal(5, 2)


@every
def test_scipy_applies_the_operator(name: str) -> None:
    operator, matrix = EVERY[name]()
    seen, dense = linear_operator(operator), matrix.numpy()
    v = normal(len(matrix), 3, seed=9).numpy()
    assert (seen.shape, seen.dtype) == (dense.shape, np.float64)
    np.testing.assert_allclose(seen.matvec(v[:, 0]), dense @ v[:, 0], rtol=1e-11)
    np.testing.assert_allclose(seen.matvec(v[:, :1]), dense @ v[:, :1], rtol=1e-11)
    np.testing.assert_allclose(seen.matmat(v), dense @ v, rtol=1e-11)
    np.testing.assert_allclose(seen.rmatvec(v[:, 0]), dense.T @ v[:, 0], rtol=1e-11)
    np.testing.assert_allclose(seen.rmatmat(v), dense.T @ v, rtol=1e-11)
    np.testing.assert_allclose(
        seen @ (v[:, 0] + 2j * v[:, 1]), dense @ (v[:, 0] + 2j * v[:, 1]), rtol=1e-11
    )


@rectangular
def test_scipy_applies_a_rectangular_operator_from_both_sides(
    make: Callable[[Tensor], Rectangular | RectangularProduct],
) -> None:
    matrix = normal(3, 5)
    seen, dense = linear_operator(make(matrix)), matrix.numpy()
    v, w = normal(5, 2, seed=1).numpy(), normal(3, 2, seed=2).numpy()
    assert (seen.shape, seen.T.shape) == ((3, 5), (5, 3))
    np.testing.assert_allclose(seen @ v, dense @ v, rtol=1e-12)
    np.testing.assert_allclose(seen.T @ w, dense.T @ w, rtol=1e-12)
    np.testing.assert_allclose(seen.rmatvec(w[:, 0]), dense.T @ w[:, 0], rtol=1e-12)
    np.testing.assert_allclose(scipy_linalg.svds(seen, 1)[1], np.linalg.norm(dense, 2), rtol=1e-10)


@pytest.mark.parametrize(
    "make", [Dense, lambda m: Product(lambda v: m @ v, len(m), m.dtype, m.device, chunk=3)]
)
def test_scipy_solves_with_the_operator(make: Callable[[Tensor], Operator]) -> None:
    matrix, b = spd(12), normal(12, seed=3)
    seen = linear_operator(make(matrix))
    largest = scipy_linalg.eigsh(seen, 3, v0=np.ones(12), return_eigenvectors=False)
    np.testing.assert_allclose(
        np.sort(largest), torch.linalg.eigvalsh(matrix)[-3:].numpy(), rtol=1e-10
    )
    x, info = scipy_linalg.cg(seen, b.numpy(), rtol=1e-12)
    assert info == 0
    np.testing.assert_allclose(x, torch.linalg.solve(matrix, b).numpy(), rtol=1e-9)


def test_scipy_arrays_may_be_read_only_reversed_or_of_another_dtype() -> None:
    matrix = spd(4)
    seen = linear_operator(Dense(matrix))
    v = np.arange(4)[::-1]
    v.flags.writeable = False
    np.testing.assert_allclose(seen @ v, matrix.numpy() @ v.astype(float), rtol=1e-14)


def test_scipy_operator_follows_the_operators_dtype() -> None:
    single = linear_operator(Dense(spd(4).float()))
    assert single.dtype == (single @ np.ones(4)).dtype == np.float32
    assert linear_operator(Product(lambda v: v, 4, torch.float32, CPU)).dtype == np.float32
    with pytest.raises(CurvlabError, match="NumPy has no bfloat16"):
        linear_operator(Dense(spd(4).bfloat16()))


class Twice:
    """An operator of its own kind: holds no tensor."""

    def __len__(self) -> int:
        return 3

    def __matmul__(self, v: Tensor) -> Tensor:
        return 2 * v


def test_scipy_operator_of_one_that_holds_no_tensor_takes_the_dtype_it_is_given() -> None:
    twice: Any = Twice()
    assert linear_operator(twice).dtype == np.float64
    seen = linear_operator(twice, dtype=torch.float32, device="cpu")
    assert seen.dtype == (seen @ np.ones(3)).dtype == np.float32


def test_finite_product() -> None:
    operator = Dense(spd(3))
    v = normal(3)
    assert torch.equal(finite_product(operator, v), operator @ v)
    for bad in (float("nan"), float("inf")):
        with pytest.raises(CurvlabError, match="contains NaN or Inf: check the parameters"):
            finite_product(operator, torch.tensor([1.0, bad, 0.0], dtype=DOUBLE))
