"""Statistics of the exact pass of some blocks, in groups that fit into memory.

Where places share a weight the vectors are as few as they can be (`sent_vectors`).
"""

from __future__ import annotations

from collections.abc import Sequence

from curvlab.closure import Closure
from curvlab.forms import Form
from curvlab.layers import Block
from curvlab.observation import Pass
from curvlab.sent_vectors import SortedVectors, all_sent, gathered, narrowed, pass_of_vectors
from curvlab.statistics import LayerStatistics

_MOST = 1 << 27  # in the derivatives of all blocks that are kept at once


def _numbers(block: Block, form: Form) -> int:
    """Return how many derivatives of one example the exact pass has in a block."""
    return form.outputs * form.places.get(block.name, 1) * block.shape[0]


def groups_that_fit(blocks: Sequence[Block], form: Form, size: int) -> list[list[Block]]:
    """Return blocks in groups whose derivatives of all vectors fit into memory together."""
    found: list[list[Block]] = [[]]
    room = _MOST
    for block in blocks:
        own = size * _numbers(block, form)
        if own > room and found[-1]:
            found.append([])
            room = _MOST
        room -= own
        found[-1].append(block)
    return found


def exact_statistics(
    closure: Closure, names: Sequence[str], needs: Pass = "exact"
) -> dict[str, LayerStatistics]:
    """Return the statistics of the exact pass of some blocks, {name: …}, or of "token".

    Σ_v of products of two derivatives are those of `Closure.observe`; vectors are others.
    """
    z, _, capture = closure.look()
    root = closure.root(z.detach()) if needs == "exact" else closure.by_place(z).vectors()
    statistics = pass_of_vectors(capture, z, root, names)
    closure.say_unreached(statistics, capture)
    return statistics


def statistics_together(
    closure: Closure, names: Sequence[str], needs: Pass = "exact", again: bool = False
) -> list[dict[str, LayerStatistics]]:
    """Return the statistics of some blocks under the same vectors, in one part or two.

    Products of derivatives of two blocks are summed over the vectors of every part that has both: a
    block that a part lacks has no derivative there, as behind a head that takes the rest of a
    rotation.
    """
    z, _, capture = closure.look()
    root = closure.root(z.detach()) if needs == "exact" else closure.by_place(z).vectors()
    vectors = SortedVectors.of(root)
    wanted = set(names)
    heard = capture.heard()
    chosen = [pair for pair in heard if pair[0].block.name in wanted]
    parts = narrowed(capture, z, vectors, heard, chosen, together=True)
    parts = [all_sent(z, vectors, chosen)] if parts is None else parts
    if not again and capture.shows(chosen, [parts[0].get(id(use)) for use, _ in chosen]):
        return statistics_together(closure, names, needs, True)
    found = [gathered(capture, names, chosen, part, z) for part in parts]
    closure.say_unreached(found[0], capture)
    return [found[0], *[{n: s for n, s in part.items() if s.used} for part in found[1:]]]
