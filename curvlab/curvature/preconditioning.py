"""Products H · gradient where H is an operator a block, by block and by parameter.

And directions that need no operator.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType

from torch import Tensor

from curvlab.curvature.base import BlockDefaults, CurvatureBlock, block_with_defaults
from curvlab.divergence import Naming
from curvlab.errors import CurvlabError, unknown
from curvlab.layers import Block
from curvlab.linalg.operators import Operator


def preconditioned(
    inverse: Mapping[str, Operator],
    partition: Mapping[str, Block],
    grads: Mapping[str, Tensor],
    straight: Mapping[str, Tensor] = MappingProxyType({}),
) -> dict[str, Tensor]:
    """Return H · grad under the keys of `grads`, in the same shapes.

    Args:
        inverse: {block: operator on its flattening}.
        partition: {block: itself}.
        grads: {block name: tensor of the block's shape} or {parameter name: tensor}, for all or
            some blocks.
        straight: {block: direction} of those that are there already; `inverse` needs not have them.

    Raises:
        CurvlabError: an unknown name, another shape, a block of which not all parameters are there.
        Diverged: an operator's numbers left the finite range, with the block's name.
    """
    if straight:
        left = {name: g for name, g in grads.items() if name not in straight}
        found = {**straight, **preconditioned(inverse, partition, left)}
        return {name: found[name] for name in grads}
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
    with Naming() as here:
        for name, g in grads.items():
            here.where, here.block = partition[name], name
            found[name] = (inverse[name] @ g.flatten()).view(g.shape)
    return found


def do_together(blocks: Iterable[CurvatureBlock]) -> None:
    """Let blocks of one class do together what is cheaper so, after all have heeded a momentum."""
    by_class: dict[type[BlockDefaults], list[CurvatureBlock]] = {}
    for block in blocks:
        if isinstance(block, BlockDefaults):
            by_class.setdefault(type(block), []).append(block)
    for kind, of_kind in by_class.items():
        kind.together(of_kind)


def refine(
    blocks: Mapping[str, CurvatureBlock],
    partition: Mapping[str, Block],
    damping: Callable[[], float],
) -> bool:
    """Let blocks that refine a base do so at this step's λ (S2QN Alg. 1, lines 3 and 4).

    Args:
        blocks: that have data.
        partition: {block: its parameters}, by which an error names it.
        damping: gives λ, where it is asked for.

    Returns:
        Whether there are any.
    """
    refining = {n: r for n, b in blocks.items() if (r := block_with_defaults(b).refine) is not None}
    for name, refines in refining.items():
        with Naming(partition[name], name):
            refines(damping())
    return bool(refining)


def straight_directions(
    blocks: Mapping[str, CurvatureBlock],
    partition: Mapping[str, Block],
    momenta: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """Return {block: direction} of the momenta heeded last that need no operator.

    Args:
        blocks: that have data.
        partition: {block: its parameters}, by which an error names it.
        momenta: {block: momentum, or any other tensor, which gives nothing}.
    """
    found: dict[str, Tensor] = {}
    with Naming() as here:
        for name, momentum in momenta.items():
            if name in blocks:
                here.where, here.block = partition[name], name
                direction = block_with_defaults(blocks[name]).direction_of(momentum)
                if direction is not None:
                    found[name] = direction
    return found
