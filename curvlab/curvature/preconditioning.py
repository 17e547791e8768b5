"""Products H · gradient where H is an operator a block, by block and by parameter."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from curvlab.divergence import Naming
from curvlab.errors import CurvlabError, unknown
from curvlab.layers import Block
from curvlab.linalg.operators import Operator


def preconditioned(
    inverse: Mapping[str, Operator], partition: Mapping[str, Block], grads: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return H · grad under the keys of `grads`, in the same shapes.

    Args:
        inverse: {block: operator on its flattening}.
        partition: {block: itself}.
        grads: {block name: tensor of the block's shape} or {parameter name: tensor}, for all or
            some blocks.

    Raises:
        CurvlabError: an unknown name, another shape, a block of which not all parameters are there.
        Diverged: an operator's numbers left the finite range, with the block's name.
    """
    if all(name in inverse for name in grads):
        return _by_block(inverse, partition, grads)
    out: dict[str, Tensor] = {}
    known = {p: b for b in partition.values() for p in b.params}
    for name in grads:
        if name not in known:
            raise unknown("block or parameter", name, [*inverse, *known])
        block = known[name]
        missing = [p for p in block.params if p not in grads]
        if missing:
            raise CurvlabError(
                f"{block} needs the gradient of '{missing[0]}' too: its parameters are"
                " preconditioned together"
            )
        if name not in out:
            out |= block.scatter(inverse[block.name] @ block.gather(grads).flatten())
    return {name: out[name] for name in grads}


def _by_block(
    inverse: Mapping[str, Operator], partition: Mapping[str, Block], grads: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    for name, g in grads.items():
        if tuple(g.shape) != partition[name].shape:
            wanted = list(partition[name].shape)
            raise CurvlabError(
                f"{partition[name]} has shape {wanted}, but its gradient {list(g.shape)}"
            )
    found: dict[str, Tensor] = {}
    for name, g in grads.items():
        with Naming(partition[name], name):
            found[name] = (inverse[name] @ g.flatten()).view(g.shape)
    return found
