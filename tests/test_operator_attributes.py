"""Every class that is an operator has `shape`, `dtype`, `device` and `T`, and takes a vector or
columns of them.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from problems import assert_near, normal, spd
from test_operators import (
    EVERY,
    OPERATORS,
    compact,
    dense_rows,
    diagonal,
    rectangular_product,
)
from torch import Tensor

import curvlab
from curvlab.errors import CurvlabError
from curvlab.linalg import operators as ops
from curvlab.linalg.operators import Dense, Diagonal, Kronecker, LowRank, Operator, Placed
from curvlab.linalg.products import Product, Rectangular, RectangularProduct, placement

Built = tuple[Any, Tensor]

RECTANGULAR: dict[str, Callable[[], Built]] = {
    "rectangular": lambda: (Rectangular(normal(3, 5)), normal(3, 5)),
    "rectangular-tall": lambda: (Rectangular(normal(5, 2)), normal(5, 2)),
    "rectangular-product": lambda: (rectangular_product(normal(3, 5)), normal(3, 5)),
    "rectangular-product-tall": lambda: (rectangular_product(normal(5, 2)), normal(5, 2)),
}
ALL: dict[str, Callable[[], Built]] = EVERY | RECTANGULAR
each = pytest.mark.parametrize("name", ALL)
symmetric = pytest.mark.parametrize("name", EVERY)
packable = pytest.mark.parametrize("name", OPERATORS)


def operator_classes() -> set[type]:
    """Of the whole package: what multiplies by ``@`` and is no protocol."""
    found: set[type] = set()
    for module in pkgutil.walk_packages(curvlab.__path__, "curvlab."):
        if module.name.endswith("__main__"):
            continue
        for value in vars(importlib.import_module(module.name)).values():
            if (
                isinstance(value, type)
                and value.__module__.startswith("curvlab.")
                and "__matmul__" in vars(value)
            ):
                found.add(value)
    return {kind for kind in found if not getattr(kind, "_is_protocol", False)}


def test_the_table_has_every_class_that_is_an_operator() -> None:
    assert operator_classes() == {type(build()[0]) for build in ALL.values()}


@each
def test_attributes(name: str) -> None:
    operator, matrix = ALL[name]()
    assert type(operator.shape) is tuple
    assert operator.shape == tuple(matrix.shape)
    assert (operator.dtype, operator.device) == (matrix.dtype, matrix.device) == placement(operator)
    transposed = operator.T
    assert transposed.shape == tuple(matrix.mT.shape)
    assert (transposed.dtype, transposed.device) == (matrix.dtype, matrix.device)
    assert_near(transposed.dense(), matrix.mT)
    assert transposed.T.shape == operator.shape


@each
@pytest.mark.parametrize("columns", [(), (1,), (2,)])
def test_products_with_a_vector_and_with_columns(name: str, columns: tuple[int, ...]) -> None:
    operator, matrix = ALL[name]()
    for one, dense in ((operator, matrix), (operator.T, matrix.mT)):
        v = normal(one.shape[1], *columns, seed=9).to(device=one.device, dtype=one.dtype)
        product = one @ v
        assert product.shape == (one.shape[0], *columns)
        assert (product.dtype, product.device) == (one.dtype, one.device)
        assert_near(product, dense @ v)


@symmetric
def test_a_symmetric_operator_is_its_own_transpose(name: str) -> None:
    operator, _ = EVERY[name]()
    assert operator.T is operator
    assert operator.shape == (len(operator), len(operator))
    assert isinstance(operator, Operator)


@symmetric
def test_the_inverse_has_them_too(name: str) -> None:
    operator, _ = EVERY[name]()
    inverse = operator.inv()
    assert (inverse.shape, inverse.dtype, inverse.device) == (
        operator.shape,
        operator.dtype,
        operator.device,
    )
    assert inverse.T is inverse


def moved(packed: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Every floating tensor of a packed operator, changed."""
    if isinstance(packed, dict):
        return {k: moved(v, change) for k, v in packed.items()}
    if isinstance(packed, list):
        return [moved(v, change) for v in packed]
    return change(packed) if isinstance(packed, Tensor) and packed.is_floating_point() else packed


@packable
def test_dtype_and_device_are_those_of_its_tensors(name: str) -> None:
    packed = ops.pack(OPERATORS[name]()[0])
    single = ops.unpack_operator(moved(packed, lambda t: t.float()))
    assert (single.dtype, single.device.type) == (torch.float32, "cpu")
    away = ops.unpack_operator(moved(packed, lambda t: t.to("meta")))
    assert (away.dtype, away.device.type) == (torch.float64, "meta")


def test_of_products_as_they_say() -> None:
    meta = torch.device("meta")
    for operator in (
        Product(lambda v: v, 3, torch.float32, meta),
        RectangularProduct(abs, abs, (3, 3), torch.float32, meta),
    ):
        assert (operator.shape, operator.dtype, operator.device) == ((3, 3), torch.float32, meta)
    around = Kronecker((Product(lambda v: v, 3, torch.float32, meta), spd(2)))
    assert (around.shape, around.dtype, around.device) == ((6, 6), torch.float32, meta)


def test_a_core_of_higher_precision_does_not_count() -> None:
    operator: Any = compact(diagonal(5), 2)[0]
    mixed = ops.Compact(
        Diagonal(operator.base.values.float()), operator.rows.float(), operator.core
    )
    assert mixed.dtype == (mixed @ normal(5, dtype=torch.float32)).dtype == torch.float32


def test_reading_them_computes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """An order of 10⁹: an operator that were formed, or a diagonal, would not fit."""
    rows, _ = dense_rows(3, 4)
    monkeypatch.setattr(type(rows), "dense", None)
    low, wide = LowRank(rows, 0.3), Kronecker((spd(1000), spd(1000), spd(1000)))
    assert (low.shape, low.dtype) == ((4, 4), torch.float64)
    assert wide.shape == (10**9, 10**9)
    assert wide.T is wide


def test_they_are_read_only() -> None:
    for attribute in ("shape", "dtype", "device", "T"):
        with pytest.raises(AttributeError):
            setattr(Dense(spd(2)), attribute, None)


def test_what_holds_no_tensor_takes_float64_on_the_cpu() -> None:
    assert Kronecker(()).shape == (1, 1)
    assert (Kronecker(()).dtype, Kronecker(()).device) == (torch.float64, torch.device("cpu"))
    assert isinstance(Kronecker(()), Placed)


def test_an_unknown_kind_of_operator_in_a_file_is_named() -> None:
    with pytest.raises(
        CurvlabError, match=r"unknown kind of operator 'Densely'; did you mean 'Dense'\?"
    ):
        ops.unpack({"kind": "Densely", "matrix": spd(2)})
