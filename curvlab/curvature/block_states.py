"""States of a curvature's blocks, as a checkpoint holds them, and back; what a block may read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from curvlab.curvature.base import CurvatureBlock
from curvlab.curvature.states import check_memory, check_names, check_operator, dtype_of
from curvlab.layers import Block
from curvlab.linalg.operators import Operator, pack, unpack_operator
from curvlab.statistics import LayerStatistics, Reads


def states_of(blocks: Mapping[str, CurvatureBlock]) -> dict[str, Any]:
    """Return {block: its statistics, and its inverse where there is one}, of copies."""
    return {
        name: (
            {"memory": {key: cloned(getattr(b, key)) for key in b.memory}}
            | ({"inverse": pack(b.inverse)} if hasattr(b, "inverse") else {})
        )
        for name, b in blocks.items()
    }


def checked(
    partition: Mapping[str, Block], blocks: Mapping[str, CurvatureBlock], states: Mapping[str, Any]
) -> dict[str, Operator]:
    """Return {block: the inverse that its state holds}; nothing is taken.

    Raises:
        CurvlabError: the states are of other blocks, shapes or dtypes.
    """
    check_names(partition.values(), states)
    inverses: dict[str, Operator] = {}
    dtype = dtype_of(partition.values())
    for name, saved in states.items():
        if "inverse" in saved:
            inverses[name] = unpack_operator(cloned(saved["inverse"]))
            check_operator(partition[name], inverses[name], dtype)
        check_memory(partition[name], blocks[name].memory, saved["memory"], dtype)
    return inverses


def put_back(
    blocks: Mapping[str, CurvatureBlock],
    states: Mapping[str, Any],
    inverses: Mapping[str, Operator],
) -> None:
    """Set every block to its state, and to the inverse of it that `checked` has found."""
    for name, saved in states.items():
        for key, value in saved["memory"].items():
            setattr(blocks[name], key, cloned(value))
        if name in inverses:
            blocks[name].inverse = inverses[name]
        elif hasattr(blocks[name], "inverse"):  # saved before the first data
            del blocks[name].inverse


def cloned(value: Any) -> Any:
    """Return a state of tensors, numbers, lists and dictionaries with tensors of its own."""
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {k: cloned(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [cloned(v) for v in value]
    return value


def may_have(block: Block, reads: Reads) -> bool:
    """Return whether a block can have what a method reads.

    Whether it does is seen in the statistics.
    """
    return reads == "gradient" or (
        block.layer is not None and (reads == "rows" or block.groups == 1)
    )


def lacking(
    blocks: Mapping[str, CurvatureBlock], statistics: Mapping[str, Any], of_own_look: bool
) -> dict[str, str]:
    """Return {block: why} of those whose statistics lack what their method reads.

    Args:
        blocks: that are to be shown the statistics.
        statistics: {block: what was found}.
        of_own_look: whether they are of a look of the method's own, which may pass blocks over.
    """
    lost = {}
    for name, block in blocks.items():
        found = statistics.get(name)
        if block.reads == "gradient" or (found is None and of_own_look):
            continue
        if found is None or (
            isinstance(found, LayerStatistics) and not found.provides(block.reads)
        ):
            lost[name] = "" if found is None else found.why
    return lost
