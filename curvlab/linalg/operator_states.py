"""Operators as nested dictionaries, lists and tensors, and back.

That is what a checkpoint without pickled code can hold. A kind of operator is known here once
`packable` has been told of it.
"""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from typing import Any, TypeVar, cast

from curvlab.errors import lookup
from curvlab.linalg.operator_base import Operator

_T = TypeVar("_T")
_KINDS: dict[str, type[Any]] = {}


def packable(kind: type[_T]) -> type[_T]:
    """Class decorator: let `unpack` know a frozen value of tensors, numbers and such values."""
    _KINDS[kind.__name__] = kind
    return kind


def pack(value: Any) -> Any:
    """Return an operator as nested dictionaries, lists and tensors.

    That is what a checkpoint without pickled code can hold.
    """
    if is_dataclass(value):
        return {"kind": type(value).__name__} | {
            f.name: pack(getattr(value, f.name)) for f in fields(value)
        }
    return [pack(v) for v in value] if isinstance(value, tuple) else value


def unpack(packed: Any) -> Any:
    """Return what `pack` packed. Raises CurvlabError for a kind of operator that is not known."""
    if isinstance(packed, dict):
        kind = lookup(_KINDS, packed["kind"], "kind of operator")
        return kind(**{name: unpack(v) for name, v in packed.items() if name != "kind"})
    return tuple(unpack(v) for v in packed) if isinstance(packed, list) else packed


def unpack_operator(packed: Any) -> Operator:
    """Return `unpack(packed)`, taken for an operator. Raises CurvlabError as `unpack` does."""
    return cast(Operator, unpack(packed))
