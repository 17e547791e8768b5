"""What a checkpoint must hold of a descent: its momentum, its curvature's statistics and operators.

Statistics are read off their names, which all methods share (`curvature.states` has their shapes);
operators are tried on a vector.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from curvlab.errors import CurvlabError
from curvlab.layers import Block
from curvlab.linalg.operators import unpack_operator
from curvlab.training.kinds import (
    Test,
    is_count,
    is_flag,
    is_nested_tensors,
    is_number,
    is_tensor,
    is_text,
    is_whole,
    keys,
    list_of,
    must,
    or_none,
    table_of,
    wrong,
)


def is_matrix(value: Any) -> bool:
    """Return whether a value is a tensor, a packed operator in its place, or None."""
    return value is None or is_tensor(value) or table_of(lambda part: True)(value)


_STATISTICS: dict[str, Test] = {
    **dict.fromkeys(("steps", "updates", "draws", "places", "number", "part"), is_whole),
    **dict.fromkeys(("outputs", "products", "trials"), is_whole),
    **dict.fromkeys(("damping", "lam", "used", "overall", "shift", "start_scale"), is_number),
    **dict.fromkeys(("warmed", "ready"), is_flag),
    **dict.fromkeys(("algorithm", "kind", "stream"), is_text),
    **dict.fromkeys(("G", "Lambda", "M", "U", "V", "a", "g", "kept_A", "kept_G"), is_tensor),
    **dict.fromkeys(("s", "v", "gram"), is_tensor),
    "F": is_matrix,  # or the rows that are kept in its place
    "rows_g": list_of(is_tensor),
    "rows_a": list_of(or_none(is_tensor)),
    "weights": list_of(is_number),
    **dict.fromkeys(("active", "core", "factor", "values"), is_tensor),
    **dict.fromkeys(("A", "S", "Y", "seen", "at", "solution", "start"), or_none(is_tensor)),
    **dict.fromkeys(("bases", "factors"), list_of(is_matrix)),
    **dict.fromkeys(("Q_A", "Q_G", "D"), or_none(is_tensor)),
    "optimizers": list_of(table_of(lambda value: True)),
    **dict.fromkeys(("blocks", "memory", "idle"), table_of(lambda value: True)),
    **dict.fromkeys(("work", "base", "inside"), table_of(lambda value: True)),
    **dict.fromkeys(("trial", "minibatch"), or_none(table_of(lambda value: True))),
    **dict.fromkeys(("gradient_norm", "ratio", "refreshed"), or_none(is_number)),
    **dict.fromkeys(("left_out", "pairs_left_out"), is_count),
    "ages": list_of(is_whole),
    "widths": list_of(is_whole),
    "means": or_none(list_of(list_of(is_tensor))),
    "pairs": or_none(list_of(is_tensor, 2)),
    "pending": or_none(list_of(is_tensor, 2)),
    "parts": list_of(table_of(lambda value: True)),
    "x": is_nested_tensors,
    "y": is_nested_tensors,
    "shown": list_of(list_of(lambda value: True)),
}  # fmt: skip
"""Tests of a curvature's state, {key: what its value must be}."""

_KEPT = ("F", "G", "M", "v", "means", "kept_A", "kept_G", "Lambda")
"""Statistics that are None before the first data, and never after …"""

_EARLY = (*_KEPT, "a", "active", "g", "s", "y", "U", "V")
"""… and others that are None before."""

_LATER = ("refreshed",)
"""What a curvature's state has that earlier versions of the format did not."""

_TOGETHER = (
    ("A", "G"),
    ("kept_A", "kept_G"),
    ("D", "Q_G"),
    ("s", "y"),
    ("S", "Y"),
    ("U", "V"),
    ("at", "minibatch"),
    ("at", "trial"),
)
"""Statistics that both are None, or neither."""


def check_descent(saved: Any, own: Mapping[str, Any], blocks: Sequence[Block], new: bool) -> None:
    """Raise CurvlabError where a state is no descent's; `new`: not of an earlier version."""
    must(saved, table_of(lambda value: True), "descent")
    keys(saved, own if new else ("curvature", "momentum", "further"), "descent", more=tuple(own))
    momentum, curvature = saved["momentum"], saved["curvature"]
    must(momentum, table_of(lambda value: True), "momentum")
    keys(momentum, ("buffers", "steps"), "momentum")
    must(momentum["steps"], is_whole, "momentum['steps']")
    for name, found in (("buffers", momentum["buffers"]), ("further", saved["further"])):
        must(found, table_of(is_tensor), name)
        if found and set(found) != {b.name for b in blocks}:
            raise wrong(f"{name} are of {', '.join(found)}")
    if new:
        must(saved["blocks"], table_of(list_of(is_whole)), "blocks")
        must(saved["dtype"], is_text, "dtype")
    must(curvature, table_of(lambda value: True), "curvature")
    must(saved.get("further_left_out", 0), is_count, "further_left_out")
    if new:
        late = [key for key in _LATER if key in own["curvature"]]
        wanted = [key for key in own["curvature"] if key not in late]
        keys(curvature, wanted, "curvature", more=late)
    _check_statistics(curvature, "curvature")
    if curvature.get("ready") and any(curvature.get(key, 0) is None for key in ("rows", "inverse")):
        raise wrong("the curvature lacks its inverse")
    if curvature.get("ready") and curvature.get("refreshed", 0) is None:
        raise wrong("the curvature lacks the damping of its inverse")
    for name in ("trial", "minibatch"):
        if isinstance(curvature.get(name), Mapping):
            keys(curvature[name], ("x", "y", "number", "stream", "part"), name, more=("ratio",))
    if new and "work" in curvature:
        keys(curvature["work"], own["curvature"]["work"], "work")
    every = curvature.get("blocks")
    if isinstance(every, Mapping):
        _check_blocks(every, {b.name: b.numel for b in blocks}, bool(curvature.get("ready")))
    packed = {f"idle['{name}']": p for name, p in curvature.get("idle", {}).items()} | {
        "inverse": curvature.get("inverse")
    }
    for name, operator in packed.items():
        if operator is not None:
            _try_operator(operator, name)


def _check_blocks(saved: Mapping[str, Any], numels: Mapping[str, int], ready: bool) -> None:
    if saved.keys() != numels.keys():
        return  # said by the curvature, with both
    inverses = [isinstance(b, Mapping) and "inverse" in b for b in saved.values()]
    if any(inverses) and not all(inverses):
        raise wrong("some blocks have an inverse and some have none")
    for name, block in saved.items():
        must(block, table_of(lambda value: True), f"block {name}")
        keys(block, ("memory",), f"block {name}", more=("inverse",))
        memory = block["memory"]
        if ready and any(memory.get(key, 0) is None for key in _KEPT):
            raise wrong(f"block {name} lacks a statistic")
        if (
            ready
            and {"F", "active"} <= set(memory)
            and not _on(memory["F"], memory["active"], numels[name])
        ):
            raise wrong(f"block {name} has a matrix that is not on its active inputs")
        if isinstance(memory.get("S"), Tensor) and len(memory["S"]) != len(memory.get("Y", ())):
            raise wrong(f"block {name} has s and y of different numbers")
        if "inverse" in block:
            _try_operator(block["inverse"], f"the inverse of block {name}")


def _on(F: Any, active: Tensor | None, numel: int) -> bool:
    """Return whether a second moment is in full, packed on these inputs' pairs, or by its rows."""
    if isinstance(F, Mapping):
        keys(F, ("rows_g", "rows_a", "weights", "gram"), "the rows of a matrix")
        counts = [len(g) for g in F["rows_g"]]
        alike = len(counts) == len(F["rows_a"]) == len(F["weights"])
        return alike and tuple(F["gram"].shape) == (sum(counts), sum(counts))
    if active is None:
        return tuple(F.shape) == (numel, numel)
    return (
        active.dim() == 1
        and active.dtype == torch.int64
        and len(active) * (len(active) + 1) // 2 == F.shape[1]
    )


def _check_statistics(saved: Any, at: str) -> None:
    """Check a curvature's state, at every depth, by the keys' names.

    Before the first data a statistic is None.
    """
    if isinstance(saved, Mapping):
        for one, two in _TOGETHER:
            if one in saved and two in saved and (saved[one] is None) != (saved[two] is None):
                raise wrong(f"{at} has {one} or {two}, and not both")
        if saved.get("a") is not None and saved.get("g", 0) is None:  # g alone is whole rows
            raise wrong(f"{at} has a, and no g")
        for key, value in saved.items():
            test = _STATISTICS.get(key) if isinstance(key, str) else None
            if test is not None and not (value is None and key in _EARLY):
                must(value, test, f"{at}['{key}']")
            if key != "optimizers":  # somebody else's, whose names are their own
                _check_statistics(value, f"{at}['{key}']")
    elif isinstance(saved, list | tuple):
        for i, value in enumerate(saved):
            _check_statistics(value, f"{at}[{i}]")


def _try_operator(packed: Any, what: str) -> None:
    """Raise CurvlabError where what was packed does not act on a vector."""
    try:
        operator = unpack_operator(packed)
        like = next(_tensors(packed), torch.zeros(0, device="cpu"))
        v = torch.zeros(len(operator), dtype=like.dtype, device=like.device)
        if (operator @ v).shape != v.shape:
            raise wrong(f"{what} is of another size than it says")
    except CurvlabError:
        raise
    except Exception as error:  # whatever wrong shapes and kinds lead to
        raise wrong(
            f"{what} does not act on a vector: {' '.join(str(error).split())[:120]}"
        ) from error


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _tensors(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _tensors(part)
