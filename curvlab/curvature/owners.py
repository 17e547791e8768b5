"""Inverses, roots and bases shared out over ranks: each is made by one and sent to the others.

The owner of a block makes what `refresh` makes (of SOAP what `settle` does, of Muon what `heed`
does), by the longest processing time first, d³ a side. All ranks then hold the owner's bits, in
tensors of the same layout, so that none drifts from another. A kind of block that is not in the
tables is refreshed by every rank: what is cheap (diagonals), what learns from pairs, and a user's
own.

Legend: O outputs, I inputs incl. the bias column of a block; W inputs without it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from curvlab.curvature.base import CurvatureBlock
from curvlab.curvature.contracted import Contracted
from curvlab.curvature.eigenbases import KlShampoo, Soap
from curvlab.curvature.ekfac import Ekfac
from curvlab.curvature.fisher import DenseFisher
from curvlab.curvature.foof import Foof
from curvlab.curvature.hessian import DenseHessian
from curvlab.curvature.kbfgs import KBfgs
from curvlab.curvature.kfac import Kfac
from curvlab.curvature.matrix_parts import WithDiagonal, weight_shape
from curvlab.curvature.one_sided import Asgo, Muon
from curvlab.divergence import Naming
from curvlab.errors import CurvlabError, Diverged
from curvlab.layers import Block
from curvlab.linalg.operators import pack, unpack
from curvlab.parallel import RankLost, Ranks, shares


@dataclass(frozen=True)
class OwnersWork:
    """What one kind of block has to do, and what comes of it.

    Args:
        cost: (block, its curvature) → operations, up to a factor; 0: every rank does it.
        made: names of what is made beside `inverse`.
        done: leaves the curvature of a rank that was sent all this as its owner's is.
    """

    cost: Callable[[Block, Any], float]
    made: tuple[str, ...] = ()
    done: Callable[[Any], None] = lambda curvature: None


def _sides(block: Block, curvature: Any) -> float:
    """Return O³ + I³, without that of a side whose factor is a diagonal."""
    outputs, inputs = block.shape
    diagonal = curvature.A is not None and curvature.A.ndim == 1
    return float(outputs**3 + (0 if diagonal else inputs**3))


def _inputs(block: Block, curvature: Any) -> float:
    return float(block.shape[1] ** 3) if curvature.A is not None and curvature.A.ndim == 2 else 0.0


def _ways(block: Block, curvature: Contracted) -> float:
    return float(sum(len(way) ** 3 for variable in curvature.means or () for way in variable))


def _dense(block: Block, curvature: Any) -> float:
    return float(block.numel**3)


def _exact_inputs(block: Block, curvature: KBfgs) -> float:
    """Return I³ where A is inverted, at first or always; else a pair is learnt from, O(I²)."""
    inverts = curvature.exact or not hasattr(curvature, "inverse")
    return float(block.shape[1] ** 3) if inverts else 0.0


def _basis(block: Block, curvature: WithDiagonal) -> float:
    """Return the cost of a weight's root or bases, of ASGO and KL-Shampoo."""
    outputs, inputs = weight_shape(block)
    if isinstance(curvature.part, Asgo):
        return float(min(outputs, inputs) ** 3)
    fresh = isinstance(curvature.part, KlShampoo) and curvature.part._fresh
    return float(outputs**3 + inputs**3) if fresh else 0.0


def _turn(block: Block, curvature: WithDiagonal) -> float:
    """Return the cost of SOAP's bases, where they follow their matrices in this step."""
    part = curvature.part
    if not isinstance(part, Soap) or not part._renew:
        return 0.0
    return float(sum(d**3 for d, has in zip(weight_shape(block), part._sides, strict=True) if has))


def _turned(curvature: WithDiagonal) -> None:
    if isinstance(curvature.part, Soap):
        curvature.part.settled()


def _polar(block: Block, curvature: WithDiagonal) -> float:
    outputs, inputs = weight_shape(block)
    if not isinstance(curvature.part, Muon):
        return 0.0
    return float(min(outputs, inputs) ** 2 * max(outputs, inputs))


def _folded(curvature: Ekfac) -> None:
    if curvature._pending is not None and not curvature._pending[0].shared:
        curvature._pending = None


Works = Mapping[type[Any], OwnersWork]

REFRESHES: Works = {
    Kfac: OwnersWork(_sides),
    Ekfac: OwnersWork(_sides, ("Q_A", "Q_G", "D"), _folded),
    Foof: OwnersWork(_inputs),
    Contracted: OwnersWork(_ways),
    DenseFisher: OwnersWork(_dense),
    DenseHessian: OwnersWork(_dense, ("shift",)),
    KBfgs: OwnersWork(_exact_inputs, ("seen", "overall")),
    WithDiagonal: OwnersWork(_basis, ("part_state",)),
}
"""Of `refresh`, by the kind of block."""

SETTLES: Works = {WithDiagonal: OwnersWork(_turn, ("part_state",), _turned)}
"""Of `settle`."""

HEEDS: Works = {WithDiagonal: OwnersWork(_polar)}
"""Of `heed`."""


def owners(
    ranks: Ranks,
    table: Works,
    blocks: Mapping[str, CurvatureBlock],
    partition: Mapping[str, Block],
) -> dict[str, int]:
    """Return {block: the rank that does its work} of the blocks whose work is shared out.

    Args:
        ranks: that share it.
        table: `REFRESHES`, `SETTLES` or `HEEDS`.
        blocks: {block: its curvature}.
        partition: {block: where its parameters lie}.
    """
    costs = {
        name: table[type(b)].cost(partition[name], b)
        for name, b in blocks.items()
        if type(b) in table
    }
    return shares({name: cost for name, cost in costs.items() if cost > 0}, ranks.world)


def share_out(
    ranks: Ranks,
    partition: Mapping[str, Block],
    table: Works,
    blocks: Mapping[str, CurvatureBlock],
    work: Callable[[CurvatureBlock], None],
) -> None:
    """Do `work` for every block, each that is dear on one rank alone, and send what comes of it.

    Args:
        ranks: that share it; alone it is a loop.
        partition: as of `owners`, and so are the table and the blocks.
        table: likewise.
        blocks: likewise.
        work: of a block's curvature.

    Raises:
        CurvlabError: on all ranks, what one of them has raised.
    """
    own = owners(ranks, table, blocks, partition) if ranks.several else {}
    with Naming() as here:
        for name, block in blocks.items():
            if name not in own:
                here.where, here.block = partition[name], name
                work(block)
    if own:
        _by_owners(ranks, table, blocks, partition, work, own)


def _by_owners(
    ranks: Ranks,
    table: Works,
    blocks: Mapping[str, CurvatureBlock],
    partition: Mapping[str, Block],
    work: Callable[[CurvatureBlock], None],
    own: Mapping[str, int],
) -> None:
    failed: Exception | None = None
    for name, rank in own.items():
        if rank == ranks.rank and failed is None:
            try:
                with Naming(partition[name], name):
                    work(blocks[name])
            except RankLost:
                raise
            except Exception as error:
                failed = error
    made = {
        name: _packed(blocks[name], table[type(blocks[name])])
        for name, rank in own.items()
        if rank == ranks.rank and failed is None
    }
    every = ranks.told((_line(failed), {name: _form(tree) for name, tree in made.items()}))
    _raise_told(every, failed)
    device = _device(blocks.values())
    for rank, (_, forms) in enumerate(every):
        tensors: list[Tensor] = []
        trees = {
            name: _rebuilt(
                form, tensors, iter(_tensors(made[name])) if name in made else None, device
            )
            for name, form in forms.items()
            if own[name] == rank
        }
        ranks.broadcast(tensors, rank)
        for name, tree in trees.items():
            _take(blocks[name], table[type(blocks[name])], tree)
    for name, rank in own.items():
        if name not in every[rank][1]:  # a make-believe rank of torch's tests, which does nothing
            work(blocks[name])


def _take(block: CurvatureBlock, kind: OwnersWork, tree: dict[str, Any]) -> None:
    """Set a block to what its owner has made."""
    for key in kind.made:
        setattr(block, key, tree["made"][key])
    if tree["inverse"] is not None:
        block.inverse = unpack(tree["inverse"])
    kind.done(block)


def _line(error: Exception | None) -> tuple[str, str, str]:
    if error is None:
        return "", "", ""
    line = (str(error).splitlines() or [""])[0]
    kind = "D" if isinstance(error, Diverged) else "E"
    foreign = "" if isinstance(error, CurvlabError) else f"{type(error).__name__}: "
    return kind, foreign + line, getattr(error, "block", "")


def _raise_told(every: Iterable[tuple[tuple[str, str, str], Any]], own: Exception | None) -> None:
    for (kind, line, block), _ in every:
        if kind == "D":
            found = Diverged(line)
            found.block = block
            raise found from own
        if kind:
            raise CurvlabError(line) from own


@dataclass(frozen=True)
class _Place:
    """A tensor's place in what is sent."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    on_host: bool


def _packed(block: CurvatureBlock, work: OwnersWork) -> dict[str, Any]:
    return {
        "inverse": pack(getattr(block, "inverse", None)),
        "made": {key: getattr(block, key) for key in work.made},
    }


def _form(tree: Any) -> Any:
    """Return a tree of plain data with places where its tensors are."""
    if isinstance(tree, Tensor):
        return _Place(tuple(tree.shape), tree.dtype, tree.device.type == "cpu")
    if isinstance(tree, dict):
        return {key: _form(value) for key, value in tree.items()}
    return [_form(value) for value in tree] if isinstance(tree, list | tuple) else tree


def _tensors(tree: Any) -> list[Tensor]:
    if isinstance(tree, Tensor):
        return [tree]
    values = tree.values() if isinstance(tree, dict) else tree
    if not isinstance(tree, dict | list | tuple):
        return []
    return [t for value in values for t in _tensors(value)]


def _device(blocks: Iterable[CurvatureBlock]) -> torch.device:
    """Return where the statistics of blocks lie."""
    found = [t.device for b in blocks for key in b.memory for t in _tensors(getattr(b, key))]
    return next((d for d in found if d.type != "cpu"), torch.device("cpu"))


def _rebuilt(form: Any, into: list[Tensor], own: Any, device: torch.device) -> Any:
    """Return a tree with tensors in its places, all of which are added to `into`.

    They are of one layout on all ranks, so that products with them round alike.

    Args:
        form: of `_form`.
        into: gets the tensors in order.
        own: the owner's tensors in the same order; None on other ranks.
        device: of this rank, for what is not on the host.
    """
    if isinstance(form, _Place):
        t = torch.empty(form.shape, dtype=form.dtype, device="cpu" if form.on_host else device)
        if own is not None:
            t.copy_(next(own))
        into.append(t)
        return t
    if isinstance(form, dict):
        return {key: _rebuilt(value, into, own, device) for key, value in form.items()}
    return (
        [_rebuilt(value, into, own, device) for value in form] if isinstance(form, list) else form
    )
