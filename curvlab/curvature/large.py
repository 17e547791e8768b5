"""Memory of Kronecker factors of layers that are very wide, as heads of large vocabularies."""

from __future__ import annotations

from torch import Tensor

from curvlab.errors import guard_memory
from curvlab.layers import Block


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
