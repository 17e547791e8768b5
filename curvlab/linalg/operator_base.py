"""Base of all operators: the protocol, and the classes behind `shape`, `dtype`, `device` and `T`.

Legend: D order, K columns.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import fields, is_dataclass
from typing import Any, Protocol, Self, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor


@runtime_checkable
class Operator(Protocol):
    """A symmetric linear map of the vectors of length ``len(operator)``."""

    @property
    def shape(self) -> tuple[int, int]:
        """Numbers of rows and columns, (D, D)."""

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the vectors that it takes."""

    @property
    def device(self) -> torch.device:
        """Device of the vectors that it takes."""

    @property
    def T(self) -> Operator:
        """Transpose, which is the operator itself."""

    def __len__(self) -> int: ...
    def __matmul__(self, v: Float[Tensor, "D *K"]) -> Float[Tensor, "D *K"]: ...
    def inv(self) -> Operator:
        """Return the inverse, an operator again; each kind says when it raises Diverged."""

    def dense(self) -> Float[Tensor, "D D"]:
        """Return the matrix itself, [D, D]; it may share memory with the operator."""

    def eigvalsh(self) -> Float[Tensor, " D"]:
        """Return all eigenvalues, ascending."""

    def diag(self) -> Float[Tensor, " D"]:
        """Return the diagonal, [D]; it may share memory with the operator."""

    def trace(self) -> Float[Tensor, ""]:
        """Return the sum of the diagonal, a scalar."""


class Placed:
    """Base of frozen values of tensors and numbers, which says where a value lies.

    That is where its first floating tensor does.
    """

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the first floating tensor or product held; float64 without one."""
        return (placed(self) or NOWHERE)[0]

    @property
    def device(self) -> torch.device:
        """The device of the first floating tensor or product held; the CPU without one."""
        return (placed(self) or NOWHERE)[1]


class Square(ABC):
    """Base of square symmetric operators: shape and transpose follow from the length."""

    @abstractmethod
    def __len__(self) -> int: ...

    @property
    def shape(self) -> tuple[int, int]:
        """Numbers of rows and columns, (D, D)."""
        return len(self), len(self)

    @property
    def T(self) -> Self:
        """Transpose, which is the operator itself."""
        return self


class Symmetric(Square, Placed):
    """Base of the operators of the algebra: `shape`, `T`, `dtype` and `device`."""


NOWHERE = torch.float64, torch.device("cpu")
"""dtype and device of what holds no tensor."""


def placed(value: Any) -> tuple[torch.dtype, torch.device] | None:
    """Return the dtype and the device of a value's first floating tensor.

    A product holds none and is asked for its own; None where there is neither.
    """
    dtype = None if isinstance(value, Placed) else getattr(value, "dtype", None)
    if isinstance(dtype, torch.dtype):
        return (dtype, value.device) if dtype.is_floating_point else None
    inner = (
        [getattr(value, f.name) for f in fields(value)]
        if is_dataclass(value)
        else value
        if isinstance(value, tuple)
        else []
    )
    return next((found for found in map(placed, inner) if found), None)
