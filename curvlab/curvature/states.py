"""Checks of what a saved state must fit, before anything of it is taken.

Names, shapes and dtypes of the blocks are looked at. A state of another model must not be
half-loaded, and must not wait for the next step to fail: shapes are read off the saved statistics
themselves, by the letters that all methods share.

Legend: O outputs, I inputs incl. the bias column of a block [O, I]; D its entries; P = O(O+1)/2
pairs of outputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import accumulate
from operator import mul
from typing import Any

import torch
from torch import Tensor

from curvlab.errors import CurvlabError
from curvlab.layers import Block, Layout
from curvlab.linalg.direct_sum import ColumnSum
from curvlab.linalg.eigenbasis import Rotated
from curvlab.linalg.operators import Compact, Kronecker, Operator, placed
from curvlab.linalg.woodbury import Beside, LayerRows, Rows

REBUILD = "build the same model first"

STATISTIC_AXES: dict[str, tuple[str, ...]] = {
    "A": ("II", "I"),
    "G": ("OO",),
    "kept_A": ("II",),
    "kept_G": ("OO",),
    "Q_A": ("II",),
    "Q_G": ("OO",),
    "D": ("OI",),
    "h": ("D",),
    "rest": ("O", "D"),
    "F": ("P*", "DD"),
    "M": ("DD",),
    "Lambda": ("OO",),
    "v": ("D",),
    "s": ("O",),
    "y": ("O",),
    "U": ("O*",),
    "V": ("O*",),
    "S": ("*O", "*D"),
    "Y": ("*O", "*D"),
    "seen": ("*I",),
    "g": ("*O", "*D"),
    "a": ("*I",),
}
"""Axes of a block's statistics, in one of these ways each; ``*`` is any length."""

PART_AXES: dict[str, tuple[str, ...]] = {
    "V": ("OO", "WW"),
    "U": ("OW",),
    "squares": ("OW",),
    "rotated": ("OW",),
    **dict.fromkeys(("L", "Q_L", "S_a", "Q_a"), ("OO",)),
    **dict.fromkeys(("R", "Q_R", "S_b", "Q_b"), ("WW",)),
    "lam_a": ("O",),
    "lam_b": ("W",),
}
"""Axes of the statistics of a block's weight alone (`part_state`), W its inputs without the bias
column."""

_FULL = (torch.float32, torch.float64)


def check_names(blocks: Iterable[Block], saved: Iterable[str]) -> None:
    """Raise CurvlabError where the saved blocks are not these."""
    own, saved = [b.name for b in blocks], list(saved)
    if set(saved) != set(own):
        raise CurvlabError(
            f"the checkpoint has blocks {', '.join(saved)} but this model has {', '.join(own)}:"
            f" {REBUILD}"
        )


def check_shape(block: Block, what: str, found: Sequence[int]) -> None:
    """Raise CurvlabError, with both shapes, where what is of a block is not shaped as it."""
    if tuple(found) != block.shape:
        raise misfit(block, what, found)


def misfit(block: Block, what: str, found: Sequence[int]) -> CurvlabError:
    """Return the error for what is of a block of another shape."""
    return CurvlabError(
        f"{block} has shape {list(block.shape)} but in the checkpoint {what} {list(found)}:"
        f" {REBUILD}"
    )


def check_dtype(where: object, found: torch.dtype, wanted: torch.dtype) -> None:
    """Raise CurvlabError for a state of single precision in a model of double, or vice versa.

    It is not cast: a state is what goes on bit for bit, and some of it is of double precision in
    any model.
    """
    if found != wanted and found in _FULL and wanted in _FULL:
        raise CurvlabError(
            f"{where} is of {wanted} but of {found} in the checkpoint: build the model in the same"
            " dtype first"
        )


def dtype_of(blocks: Iterable[Block]) -> torch.dtype | None:
    """Return the dtype of the blocks' statistics: the widest of their parameters'.

    None where some are in no layer, and so do not show.
    """
    found = torch.float32
    for block in blocks:
        if block.module is None:
            return None
        for p in block.module.parameters(recurse=False):
            found = torch.promote_types(found, p.dtype)
    return found


def check_memory(
    block: Block, keys: Sequence[str], saved: Mapping[str, Any], dtype: torch.dtype | None
) -> None:
    """Raise CurvlabError where saved statistics are not those of such a block.

    They may have other names, another shape, another dtype.
    """
    if set(saved) != set(keys):
        raise CurvlabError(
            f"{block} keeps {', '.join(keys) or 'nothing'} but in the checkpoint"
            f" {', '.join(saved) or 'nothing'}: {REBUILD}"
        )
    for key, value in saved.items():
        if key == "means" and value is not None:
            sizes = [[len(way) for way in ways] for ways in value]
            if sum(map(math.prod, sizes)) != block.numel:
                raise misfit(
                    block, "its means have ways of", [size for ways in sizes for size in ways]
                )
        if key == "part_state":
            for name, part in value.items():
                _check_statistic(block, PART_AXES, name, part, dtype)
        _check_statistic(block, STATISTIC_AXES, key, value, dtype)


def _check_statistic(
    block: Block,
    known: Mapping[str, tuple[str, ...]],
    key: str,
    value: Any,
    dtype: torch.dtype | None,
) -> None:
    if isinstance(value, Tensor) and key in known and len(block.shape) == 2:
        if not any(_has(value.shape, axes, block) for axes in known[key]):
            raise misfit(block, f"its {key} is", value.shape)
        if dtype is not None and key != "Lambda":  # of double precision in any model
            check_dtype(block, value.dtype, dtype)


def check_operator(block: Block, operator: Operator, dtype: torch.dtype | None) -> None:
    """Raise CurvlabError where an operator does not act on such a block, or is of another dtype."""
    ways = _ways(operator)
    apart = set(accumulate(block.shape, mul, initial=1)) - set(accumulate(ways, mul, initial=1))
    if math.prod(ways) != block.numel or (len(ways) > 1 and apart):
        raise misfit(block, "its inverse is of", ways)
    if dtype is not None:
        check_dtype(block, operator.dtype, dtype)


def check_rows(layout: Layout, rows: Beside, dtype: torch.dtype) -> None:
    """Raise CurvlabError where rows side by side are not of these blocks."""
    if len(rows.parts) != len(layout.blocks):
        raise CurvlabError(
            f"the checkpoint has {len(rows.parts)} blocks but this model has {len(layout.blocks)}:"
            f" {REBUILD}"
        )
    for block, part in zip(layout.blocks, rows.parts, strict=True):
        if isinstance(part, LayerRows):
            found: tuple[int, ...] = (part.g.shape[3] * part.g.shape[4], part.a.shape[3])
        else:
            found = (
                (part.width,)
                if not isinstance(part, Rows) or part.a is None
                else (part.g.shape[1], part.a.shape[1])
            )
        if math.prod(found) != block.numel or (len(found) == 2 and found != block.shape):
            raise misfit(block, "its rows are of", found)
        place = placed(part)
        if place:
            check_dtype(block, place[0], dtype)


def check_vectors(layout: Layout, vectors: Mapping[str, Tensor | None], dtype: torch.dtype) -> None:
    """Raise CurvlabError where a vector of all parameters is of another model or dtype.

    The parameters are its last axis.
    """
    for name, vector in vectors.items():
        if vector is None:
            continue
        if vector.shape[-1] != len(layout):
            names = "; ".join(f"{b} {list(b.shape)}" for b in layout.blocks[:3])
            more = f" and {len(layout.blocks) - 3} more" if len(layout.blocks) > 3 else ""
            raise CurvlabError(
                f"the checkpoint's {name} has {vector.shape[-1]} parameters but this model has"
                f" {len(layout)} ({names}{more}): {REBUILD}"
            )
        check_dtype("the model", vector.dtype, dtype)


def _ways(operator: Operator) -> tuple[int, ...]:
    """Return the axes of the tensor on whose flattening an operator acts, as far as it shows."""
    if isinstance(operator, Kronecker):
        return tuple(len(u) for u in operator.factors)
    if isinstance(operator, Rotated):
        return tuple(len(q) for q in operator.bases)
    if isinstance(operator, ColumnSum):
        return operator.outputs, sum(operator.widths)
    return _ways(operator.base) if isinstance(operator, Compact) else (len(operator),)


def _has(shape: Sequence[int], axes: str, block: Block) -> bool:
    outputs, inputs = block.shape
    lengths: dict[str, int] = {
        "O": outputs,
        "I": inputs,
        "D": block.numel,
        "W": inputs - block.biased,
        "P": outputs * (outputs + 1) // 2,
    }
    fits: Callable[[str, int], bool] = lambda axis, n: axis == "*" or lengths[axis] == n  # noqa: E731
    return len(shape) == len(axes) and all(map(fits, axes, shape))
