"""Memory of what is made of layers that are very wide: Kronecker factors, dense blocks."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from curvlab.errors import fits, guard_memory
from curvlab.layers import Block
from curvlab.statistics import LayerStatistics

_DENSE = 1 << 30
"""Bytes of a dense block and its inverse, from which on rows are kept where they are fewer, or
products are taken."""
_MINIBATCHES = 100
"""That a moving average of 0.9 remembers, to 3e-5 of its weight."""


def too_large(blocks: Sequence[Block], item: int) -> Block | None:
    """Return the largest block if its dense matrix and inverse would take more than 1 GB.

    Args:
        blocks: of the model.
        item: bytes of a number.
    """
    largest = max(blocks, key=lambda b: b.numel, default=None)
    return largest if largest is not None and 2 * largest.numel**2 * item > _DENSE else None


def by_rows(statistics: LayerStatistics) -> bool:
    """Return whether the rows of a block's minibatches are to be kept in place of its matrix.

    The matrix and its inverse would take more than 1 GB, and more than the rows of 100 such
    minibatches with their Gram matrix and its factor: V N of O + I numbers at one place, else of D;
    and these fit into a third of the memory.
    """
    block, item = statistics.block, statistics.like.element_size()
    dense = 2 * block.numel**2
    if dense * item <= _DENSE:
        return False
    rows = _MINIBATCHES * statistics.vectors * statistics.size
    outer = statistics.provides("factors") and statistics.places == 1
    width = sum(block.shape) if outer else block.numel
    kept = 4 * rows**2 + rows * width
    return kept < dense and fits(3 * kept * item)


def guard_factor(block: Block, order: int, like: Tensor, factor: str) -> None:
    """Refuse a factor of this order, in one line, before it is formed.

    It is there thrice: the average, the minibatch's own, and the inverse.

    Args:
        block: whose factor.
        order: its number of rows.
        like: a tensor of its dtype.
        factor: its name in an error's line.

    Raises:
        CurvlabError: it would take more than 80 % of the machine's memory.
    """
    guard_memory(
        3 * order**2 * like.element_size(),
        f"{factor} of {block}, [{order}, {order}] and its inverse,",
        "of so wide a layer smw-ng-bd forms no factor (its system is of the examples), nor do adam"
        " and sgd-m; the exact block as products is curvlab.exact.product",
    )
