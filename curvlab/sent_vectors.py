"""Vectors of the exact pass through layers with several places: each is sent once for all blocks.

There are C of them a place. Three things make them fewer, none of which moves the matrix:

- a vector that is zero in every example is not sent, nor is that of a place without a loss;
- where all paths from the outputs run through the inputs of one layer (the head of a language
  model), they are sent to these alone. There the vectors of a place are the rows of a matrix B with
  C rows and, of a causal model, as many columns that are not zero as the layer has inputs. With B =
  Q R, BᵀB = RᵀR: the rows of R go on in their stead, E of them a place in place of C;
- by their order, place after place, what they reach is a range of them (`linalg.places.Reach`).

Legend: V vectors, J places of the outputs with K vectors each, N examples, T places, C outputs, M
numbers in the inputs of the layer in between, E of them not zero.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from curvlab.autograd import send_back
from curvlab.capture import Capture
from curvlab.errors import guard_memory
from curvlab.layers import Block
from curvlab.statistics import LayerStatistics
from curvlab.uses import Part, Use

_NUMBERS = 1 << 20  # in the widest derivative of the vectors that are sent at once

Heard = tuple[Use, str]


@dataclass(frozen=True)
class SortedVectors:
    """Vectors in groups of K, one place of the outputs after the other."""

    values: Float[Tensor, "V N *C"]
    groups: int  # 0 where they do not fall into groups of one size

    @classmethod
    def of(cls, root: Float[Tensor, "V N *C"]) -> SortedVectors:
        """Sort columns of a root by the first output that they have, without those that are 0."""
        some = (root != 0).reshape(*root.shape[:2], -1)  # [V, N, C]
        there = some.any(1)
        alive = there.any(1)
        if not bool(alive.any()):
            return cls(root[:1], 0)
        key = there.to(torch.uint8).argmax(1)
        order = torch.where(alive, key, there.shape[1]).argsort(stable=True)[: int(alive.sum())]
        _, sizes = torch.unique_consecutive(key[order], return_counts=True)
        values = root[order]
        if int(sizes.min()) != int(sizes.max()):
            return cls(values, 0)
        groups = len(sizes)
        # places that some of the examples leave out: the others' move up
        own = some[order].any(2).view(groups, -1, root.shape[1]).any(1)  # [J, N]
        left = int(own.sum(0).amax())
        if left < groups:
            chosen = (~own).to(torch.uint8).argsort(dim=0, stable=True)[:left]
            cut = values.view(groups, -1, *root.shape[1:])
            index = chosen.view(left, 1, -1, *[1] * (root.ndim - 2)).expand(-1, *cut.shape[1:])
            values, groups = cut.gather(0, index).flatten(0, 1), left
        return cls(values, groups)


def guard_pass(capture: Capture, vectors: Tensor) -> None:
    """Refuse a pass back of so many vectors that what arrives at the layers does not fit.

    Of a sequence model the exact pass has T·C of them. Twice: as they arrive, and by examples.

    Raises:
        CurvlabError: it would take more than 80 % of the machine's memory.
    """
    if len(vectors) > 1:
        numbers = sum(use.output.value.numel() for use, _ in capture.heard())
        guard_memory(
            2 * len(vectors) * numbers * vectors.element_size(),
            f"what {len(vectors)} vectors are at all layers of {vectors.shape[1]} examples",
            "take smaller minibatches, or a method whose labels are drawn (labels='model')",
        )


def pass_of_vectors(
    capture: Capture, z: Tensor, root: Float[Tensor, "V N *C"], names: Sequence[str] | None = None
) -> dict[str, LayerStatistics]:
    """Send the columns of a root back to some blocks, or to all that have structure.

    Second moments over the vectors are those of `Capture.backward`; the vectors are others, of
    other numbers in every block.
    """
    wanted = list(capture.arranged) if names is None else list(names)
    vectors = SortedVectors.of(root)
    heard = capture.heard()
    chosen = [pair for pair in heard if pair[0].block.name in wanted]
    parts = narrowed(capture, z, vectors, heard, chosen)
    found = all_sent(z, vectors, chosen) if parts is None else parts[0]
    # what was not seen when the form was proven is proven once more, and no more than once
    if capture.shows(chosen, [found.get(id(use)) for use, _ in chosen]):
        return pass_of_vectors(capture, z, root, names)
    return gathered(capture, wanted, chosen, found, z)


def all_sent(z: Tensor, vectors: SortedVectors, chosen: Sequence[Heard]) -> dict[int, Tensor]:
    """Return {use: derivatives} of all vectors."""
    sent = _sent(z, [use.edge for use, _ in chosen], vectors.values)
    return {id(use): d for (use, _), d in zip(chosen, sent, strict=True) if d is not None}


def gathered(
    capture: Capture,
    names: Sequence[str],
    chosen: Sequence[Heard],
    found: Mapping[int, Tensor],
    z: Tensor,
) -> dict[str, LayerStatistics]:
    """Return the statistics of some blocks, {name: …}, of what has arrived at their uses."""
    parts: dict[str, list[Part]] = {name: [] for name in names}
    for use, how in chosen:
        d = found.get(id(use))
        if d is not None:
            if not len(d):  # no vector at all goes on: one that is zero
                d = d.new_zeros(1, *d.shape[1:])
            parts[use.block.name].append(capture.part(use, how, d.flatten(0, 1), len(d)))
    blocks: dict[str, Block] = {b.name: b for b in capture.blocks if b.name in parts}
    statistics, dtype = {}, capture.dtype
    counts = {name: len(some[0].g) for name, some in parts.items() if some}
    most = max(counts.values(), default=1)
    for name, block in blocks.items():
        own = capture.parameters[block.params[0]].detach()
        like = own if dtype is None else z.new_empty(0, dtype=dtype)
        count = counts.get(name, most)
        statistics[name] = LayerStatistics(
            block, len(z), parts=parts[name], like=like, vectors=count
        )
    return statistics


def _sent(
    source: Tensor | GradientEdge, targets: Sequence[GradientEdge], vectors: Float[Tensor, "V N *S"]
) -> list[Tensor | None]:
    """Return the derivatives in the targets, [V, *target], some vectors at a time."""
    if not targets:
        return []
    count = len(vectors)
    if not count:  # one that is zero shows the shapes
        none = send_back(source, targets, vectors.new_zeros(1, *vectors.shape[1:]))
        return [None if d is None else d[:0] for d in none]
    found: list[Tensor | None] = []
    start, at_once = 0, 1
    while start < count:
        some = send_back(source, targets, vectors[start : start + at_once])
        if not start:
            found = [None if d is None else d.new_empty(count, *d.shape[1:]) for d in some]
            widest = max([1, *[d.numel() for d in some if d is not None]])
        for into, d in zip(found, some, strict=True):
            if into is not None and d is not None:
                into[start : start + at_once] = d
        start, at_once = start + at_once, max(1, _NUMBERS // widest)
    return found


def narrowed(
    capture: Capture,
    z: Tensor,
    vectors: SortedVectors,
    heard: Sequence[Heard],
    chosen: Sequence[Heard],
    together: bool = False,
) -> list[dict[int, Tensor]] | None:
    """Return {use: derivatives} by way of the one layer that all paths run through, if any.

    With `together` of the same vectors in every use, and of the head's further ones apart.
    """
    head = _head(z, heard)
    if head is None or head.source is None or not vectors.groups or z.dtype not in _EXACT:
        return None
    behind = [use for use, _ in chosen if use is not head]
    mixed = any(use.block.name == head.block.name for use in behind)  # a tied head
    asked = any(use is head for use, _ in chosen)
    both = [head.source, *([head.edge] if asked else [])]
    at_source, *front = _sent(z, both, vectors.values)
    if at_source is None or at_source.dtype != z.dtype:
        return None
    own = front[0] if front else None
    turned = own if mixed or together else None
    sent, places, own = _fewer(at_source, turned, vectors.groups, own)
    found: dict[int, Tensor] = {} if own is None else {id(head): own}
    back = _sent(head.source, [use.edge for use in behind], sent)
    if together:
        pairs = zip(behind, back, strict=True)
        found = {id(use): d for use, d in pairs if d is not None}
        if own is None:
            return [found]
        rest = torch.ones(len(own), dtype=torch.bool, device=own.device).index_fill_(0, places, 0)
        return [found | {id(head): own[places]}, {id(head): own[rest]}]
    for use, d in zip(behind, back, strict=True):
        if d is not None and use.block.name == head.block.name:
            full = d.new_zeros(len(at_source), *d.shape[1:])
            full[places] = d
            d = full
        if d is not None:
            found[id(use)] = d
    return [found]


_EXACT = (torch.float32, torch.float64)


def _fewer(
    rows: Float[Tensor, "V N *M"], turned: Tensor | None, groups: int, own: Tensor | None
) -> tuple[Float[Tensor, "W N *M"], Tensor, Tensor | None]:
    """Return as few vectors with the same second moment of each example; which of V they are in.

    With `turned`, derivatives of the same vectors, these come back by the same rotation: behind the
    vectors that go on there are then some that are zero at the source.
    """
    apart = rows.reshape(groups, len(rows) // groups, rows.shape[1], -1)  # [J, K, N, M]
    count = apart.shape[1]
    kept, places, rotated = [], [], []
    for j, group in enumerate(apart.unbind(0)):
        first = j * count
        there = (group != 0).any(0)  # [N, M]
        width = int(there.sum(1).amax())
        mine = None if turned is None else turned[first : first + count]
        if width >= count:
            kept.append(group)
            width = count
        else:
            columns = (~there).to(torch.uint8).argsort(dim=1, stable=True)[:, :width]
            index = columns.expand(count, -1, -1)
            few = group.gather(2, index).transpose(0, 1)  # [N, K, E]
            q, r = torch.linalg.qr(few, mode="r" if mine is None else "complete")
            into = group.new_zeros(width, *group.shape[1:])
            kept.append(into.scatter_(2, index[:width], r[:, :width].transpose(0, 1)))
            if mine is not None:
                mine = (q.mT @ mine.transpose(0, 1).flatten(2)).transpose(0, 1).view_as(mine)
        places.append(torch.arange(first, first + width, device=rows.device))
        rotated.append(mine)
    sent = torch.cat(kept).view(-1, *rows.shape[1:])
    if turned is not None:
        own = torch.cat([r for r in rotated if r is not None])
    return sent, torch.cat(places), own


def _head(z: Tensor, heard: Sequence[Heard]) -> Use | None:
    """Return the use through whose inputs all paths from z to the other uses run, if there is.

    Rows of its inputs and outputs must be the examples, each of which has a rotation of its own.
    """
    ways = {id(use): how for use, how in heard}
    edges = {use.edge.node: use for use, _ in heard}
    first = {node for node, _ in _nodes(z, None, edges)} & edges.keys()
    if len(first) != 1:
        return None
    (node,) = first
    head = edges.pop(node)
    rows = head.x.value.shape[0], head.flat[0]
    if head.source is None or ways[id(head)] != "first" or rows != (len(z), len(z)):
        return None
    for met, output in _nodes(z, head.source, edges):
        if output != head.source.output_nr if met is head.source.node else met in edges:
            return None
    return head


def _nodes(
    z: Tensor, cut: GradientEdge | None, stops: Mapping[Node, Use]
) -> Iterator[tuple[Node, int]]:
    """Yield every node on the way back from z with its output, none beyond the cut or a stop."""
    waiting: list[tuple[Node | None, int]] = [(z.grad_fn, z.output_nr)]
    seen: set[tuple[Node, int]] = set()
    while waiting:
        node, output = waiting.pop()
        if node is None or (node, output) in seen:
            continue
        seen.add((node, output))
        yield node, output
        if node not in stops and (cut is None or node is not cut.node):
            waiting.extend(node.next_functions)
