"""What annotations say of shapes, held against the tensors that come and go while the tests run.

    CURVLAB_CHECK_SHAPES=1 pytest tests/test_operators.py

Shapes alone: other types are mypy's. `tests/conftest.py` puts this in before anything imports
curvlab.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from beartype import beartype

_SHAPES = re.compile(
    r"\b(Shaped|Num|Inexact|Float|Float64|Complex|Integer|Int|Int64|UInt8|Bool|Real)\["
)


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, which raises where an argument or a result is not of the shape that is said."""
    said = getattr(function, "__annotations__", {})
    shapes = {name: hint for name, hint in said.items() if _SHAPES.search(str(hint))}
    if not shapes:
        return function
    function.__annotations__ = shapes
    return beartype(function)
