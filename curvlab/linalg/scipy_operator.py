"""Operators as SciPy sees them, for every solver and eigensolver of `scipy.sparse.linalg`.

Legend: R rows, C columns (R = C = D for a symmetric operator).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse.linalg import LinearOperator

from curvlab.errors import CurvlabError
from curvlab.linalg.operators import Operator
from curvlab.linalg.products import Rectangular, RectangularProduct, placement

Array = NDArray[Any]


def linear_operator(
    operator: Operator | Rectangular | RectangularProduct,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> LinearOperator:
    """Return an operator as SciPy's `LinearOperator`: NumPy in, NumPy out.

    Args:
        operator: the operator.
        dtype: of the tensors handed to it; by default its own (`placement`).
        device: of the tensors handed to it; by default its own.

    Raises:
        CurvlabError: bfloat16, which NumPy has not.
    """
    own = placement(operator)
    like = torch.empty(
        0, dtype=own[0] if dtype is None else dtype, device=own[1] if device is None else device
    )
    if like.dtype is torch.bfloat16:
        raise CurvlabError("NumPy has no bfloat16: make the operator of float32 or float64")
    if isinstance(operator, Rectangular | RectangularProduct):
        shape, forth, back = operator.shape, _numpy(operator, like), _numpy(operator.T, like)
    else:
        shape, forth = (len(operator), len(operator)), _numpy(operator, like)
        back = forth
    return LinearOperator(
        shape, forth, rmatvec=back, matmat=forth, rmatmat=back, dtype=like.cpu().numpy().dtype
    )


def _numpy(
    operator: Operator | Rectangular | RectangularProduct, like: torch.Tensor
) -> Callable[[Array], Array]:
    def product(v: Array) -> Array:
        if np.iscomplexobj(v):
            return product(v.real) + 1j * product(v.imag)
        # a copy: SciPy's arrays may be read-only or reversed
        columns = torch.from_numpy(np.array(v, order="C")).to(like)
        return (operator @ columns).detach().cpu().numpy()

    return product
