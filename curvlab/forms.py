"""Forms: what the first look at a minibatch of one kind has shown, and the proof of it.

The kind is a shape, a dtype and a set of modes. A random vector v is sent back from the outputs,
and again with every example's part of it times a random weight sₙ. What a block's uses make of it,
Σₙ rowₙ and Σₙ sₙ rowₙ, is held against autograd's own derivatives in the parameters: the second
holds, but with probability 0, only where every row is its own example's. Which places are whose is
found that way, not assumed: of the arrangements that the shapes allow, the first that agrees is
taken, and where none does the block goes the general way. Three passes back, once a form; at every
look where the data may decide whose a row is (`functions.REORDERING`).

Legend: N examples, T places of an example, R rows and P places of a call, V vectors sent back.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from curvlab.arrangements import ARRANGEMENTS
from curvlab.autograd import send_back
from curvlab.capture import Capture, Settled
from curvlab.derivatives import around
from curvlab.errors import CurvlabError
from curvlab.layers import Block
from curvlab.statistics import LayerStatistics
from curvlab.uses import OVERWRITTEN, Part, UseInput

How = Literal["structured", "general", "unused"]


@dataclass(frozen=True)
class Way:
    """The way that a block goes, and why.

    Args:
        how: "structured", "general" or "unused".
        arrangement: of each of its uses (`functions.ARRANGEMENTS`).
        why: it goes the general way; empty for a structured block.
        gap: the largest relative difference from autograd that was found, of the way that was
            taken; of the best that was refused where none was.
        unseen: uses whose derivatives were all zero, so that nothing could be seen of them.
    """

    how: How
    arrangement: tuple[str, ...] = ()
    why: str = ""
    gap: float = 0.0
    unseen: tuple[int, ...] = ()

    @property
    def proven(self) -> bool:
        """Whether no use is `unseen`, its derivatives all zero."""
        return not self.unseen


@dataclass
class Form:
    """The things that a look has shown.

    Args:
        outputs: C, of an example.
        ways: {block: its way}.
        places: {block: T}, of the blocks that were used.
        shaped: blocks that have a, g and rows (none where such a block is unused).
        plain: of those, the blocks that no use reads in the other direction.
        direct: of those, the blocks with one use whose rows are the examples.
        precision: the coarsest rounding on the way from the parameters to the outputs (that of
            autocast, or of half types).
        settled: for `Capture.settle` of the next look.
    """

    outputs: int
    ways: dict[str, Way]
    places: dict[str, int]
    shaped: frozenset[str]
    plain: frozenset[str]
    direct: frozenset[str]
    precision: float
    settled: Settled

    @property
    def unproven(self) -> dict[str, tuple[int, ...]]:
        """Uses of which nothing could be seen, ``{block: their numbers}``."""
        return {name: way.unseen for name, way in self.ways.items() if way.unseen}

    def apply(self, capture: Capture) -> bool:
        """Hand what is known to a new look of this form.

        Returns False where the look has other uses than the first had.
        """
        for name in list(capture.arranged):
            way, uses = self.ways[name], capture.uses.get(name, [])
            if way.how == "general":
                capture.general[name] = way.why
                del capture.arranged[name]
            elif len(way.arrangement) == len(uses):
                capture.arranged[name] = way.arrangement
            else:
                return False
        return set(capture.arranged) == self.shaped


def prove_form(capture: Capture, z: Tensor, mixing: bool) -> Form:
    """Return the form of a look, whose arrangements are set as they were proven.

    Args:
        capture: of the forward pass, settled.
        z: outputs [N, *C] with their graph.
        mixing: whether examples are known to act on each other (batch norm in training mode): then
            no row is an example's own, and of the arrangements the nearest is taken.
    """
    size = len(z)
    # of its own, on the CPU and in double precision: the run's random numbers stay as they are, and
    # every device and dtype is tried by the same v. Weights lie within 1 and 2, so that no example
    # is lost beside the others.
    generator = torch.Generator("cpu").manual_seed(0)
    v = torch.randn(z.shape, generator=generator, dtype=torch.float64, device="cpu").to(z)
    s = 1 + torch.rand(size, generator=generator, dtype=torch.float64, device="cpu").to(
        z
    )  # of each example
    chosen = [b for b in capture.blocks if b.name in capture.arranged and capture.uses.get(b.name)]
    names = [name for b in capture.blocks for name in b.params]
    names = [name for name in names if capture.parameters[name].requires_grad]
    leaves = [capture.parameters[name] for name in names]
    for use in (use for uses in capture.uses.values() for use in uses):
        if use.x.overwritten:
            raise CurvlabError(OVERWRITTEN.format(use.block))
    found = [
        dict(zip(names, send_back(z, leaves, u[None]), strict=True))
        for u in (v, v * s.view(-1, *[1] * (z.ndim - 1)))
    ]
    true = [{b.name: _gathered(b, grads, capture) for b in capture.blocks} for grads in found]
    reached = {
        b.name: any(found[0].get(name) is not None for name in b.params) for b in capture.blocks
    }
    scale = [max((float(t[b.name].norm()) for b in capture.blocks), default=0.0) for t in true]
    statistics = capture.backward(z, v[None])
    ways: dict[str, Way] = {}
    eps = _precision(capture, z)
    for block in capture.blocks:
        name = block.name
        if name in capture.general:
            ways[name] = Way("general" if reached[name] else "unused", why=capture.general[name])
            if not reached[name] and block.layer is not None:
                ways[name] = Way("unused")
    for block in chosen:
        name = block.name
        # of all examples; sums are as inexact as they are long
        places = sum(math.prod(use.extent) for use in capture.uses[name])
        near = max(eps**0.5, min(0.02, eps * places))
        wanted = [t[name] for t in true]
        # below them a difference is rounding of the largest block's derivatives (`_gap`), and a
        # derivative as good as zero, which says nothing of whose its rows are
        floors = [min(1e3 * eps, eps**0.5) * s for s in scale]
        best: Way | None = None
        for how in capture.candidates(name):
            arranged = rearranged(capture, statistics[name], how)
            whole = _gap(arranged.gradient * size, wanted[0], scale[0], floors[0])
            rows = _gap(weighted(arranged, s).gradient * size, wanted[1], scale[1], floors[1])
            gap, own = max(whole, rows), rows <= near
            # where examples mix no row is an example's own, and none can agree: the nearest is kept
            nearer = best is None or gap < best.gap
            if whole <= near and (own or (mixing and nearer)):
                best = Way("structured", how, gap=gap)
                if own:
                    break
            elif nearer and (best is None or best.how == "general"):
                why = (
                    f"has a gradient that differs from autograd's by {whole:.2g}" if whole > near
                    else f"has rows that are not its examples' (relative difference {rows:.2g})"
                )  # fmt: skip
                best = Way("general", (), why, gap)
        assert best is not None
        if not all(
            bool(torch.isfinite(w).all()) for w in wanted
        ):  # nothing can be seen, and the numbers say so themselves
            best = Way("structured", next(capture.candidates(name)))
            floors = [math.inf] * len(floors)
        count = len(capture.uses[name])
        if all(float(w.norm()) <= f for w, f in zip(wanted, floors, strict=True)):
            dead = tuple(range(count))
        else:
            alive = {id(p.own[2].use) for p in statistics[name].parts if bool(p.raw_g.any())}
            dead = tuple(i for i, use in enumerate(capture.uses[name]) if id(use) not in alive)
        ways[name] = best if best.how == "general" or not dead else replace(best, unseen=dead)
        if best.how == "general":
            capture.general[name] = best.why
            del capture.arranged[name]
        else:
            capture.arranged[name] = best.arrangement
    for block in capture.blocks:
        ways.setdefault(block.name, Way("unused"))
    direct = frozenset(
        name for name, how in capture.arranged.items()
        if how == ("first",)
        and not (use := capture.uses[name][0]).swapped
        and use.output.value.dtype == (capture.dtype or z.dtype)
    )  # fmt: skip
    plain = frozenset(
        name
        for name in capture.arranged
        if not any(use.swapped for use in capture.uses.get(name, ()))
    )
    ordered = {b.name: ways[b.name] for b in capture.blocks}
    return Form(
        z[0].numel(),
        ordered,
        capture.places(),
        frozenset(capture.arranged),
        plain,
        direct,
        eps,
        capture.settled(),
    )


def unseen(capture: Capture, z: Tensor) -> Form:
    """Return the form of a look that shows nothing, for itself alone."""
    ways = {
        b.name: (
            Way("general", why=capture.general[b.name])
            if b.name in capture.general
            else Way("structured", capture.arranged[b.name], unseen=(0,))
        )
        for b in capture.blocks
    }
    none: frozenset[str] = frozenset()
    return Form(
        z[0].numel(),
        ways,
        capture.places(),
        frozenset(capture.arranged),
        frozenset(capture.arranged),
        none,
        _precision(capture, z),
        capture.settled(),
    )


def _gathered(block: Block, grads: dict[str, Tensor | None], capture: Capture) -> Tensor:
    """Return autograd's own derivative of one vector, as the block lies.

    Zero where the block is not reached.
    """
    each = {}
    for name in block.params:
        p, d = capture.parameters[name], grads.get(name)
        own = torch.zeros_like(p) if d is None else (d[0].to_dense() if d.is_sparse else d[0])
        each[name] = own.detach().to(capture.dtype or own.dtype)
    return block.gather(each)


def _gap(ours: Tensor, true: Tensor, largest: float, floor: float) -> float:
    """Return ‖ours − true‖ / ‖true‖.

    It is over the largest block's norm where what is left is rounding of that.
    """
    error = float((ours.reshape(true.shape) - true).norm())
    if error <= floor:
        return error / largest if error else 0.0
    size = float(true.norm())
    return error / size if size else math.inf


def _precision(capture: Capture, z: Tensor) -> float:
    """Return the coarsest rounding on the way from the parameters to the outputs."""
    seen = [
        z.dtype,
        *(p.dtype for p in capture.parameters.values()),
        *([found[1]] if (found := around()) else []),
    ]
    for uses in capture.uses.values():
        seen += [t.value.dtype for use in uses for t in (use.x, use.output)]
    return max(torch.finfo(d).eps for d in seen if d.is_floating_point)


def rearranged(
    capture: Capture, statistics: LayerStatistics, how: Sequence[str]
) -> LayerStatistics:
    """Return the same pass with other arrangements of the uses."""
    parts = []
    known = dict(zip(map(id, capture.uses[statistics.block.name]), how, strict=True))
    for p in statistics.parts:
        _, _, inputs = p.own
        arranged = UseInput(inputs.use, inputs.size, known[id(inputs.use)], inputs.dtype)
        parts.append(Part(p.block, arranged, p.raw_g, p.swapped))
    s = statistics
    return LayerStatistics(
        s.block, s.size, parts=parts, like=s.like, vectors=s.vectors, frozen=s.frozen
    )


def weighted(statistics: LayerStatistics, s: Tensor) -> LayerStatistics:
    """Return the same pass with every example's g times its own weight.

    Its gradient is Σₙ sₙ rowₙ, no row and no input formed for it that the gradient would not form.
    """
    parts = []
    for p in statistics.parts:
        _, _, inputs = p.own
        rows, places = p.raw_g.shape[1:3]
        numbers = torch.arange(rows * places, device=p.raw_g.device).view(rows, places)
        owner = torch.empty(rows * places, dtype=torch.long, device=p.raw_g.device)
        mine = ARRANGEMENTS[inputs.how](numbers, 0, inputs.size)  # [N, T]
        owner[mine.flatten()] = torch.arange(len(mine), device=owner.device).repeat_interleave(
            mine.shape[1]
        )
        parts.append(
            Part(
                p.block,
                inputs,
                p.raw_g * s.to(p.raw_g.dtype)[owner].view(1, rows, places, 1),
                p.swapped,
            )
        )
    return LayerStatistics(
        statistics.block,
        statistics.size,
        parts=parts,
        like=statistics.like,
        frozen=statistics.frozen,
    )


@dataclass(frozen=True)
class Report:
    """A table for a reader of which block goes which way."""

    blocks: tuple[Block, ...]
    form: Form
    law: str = ""

    @property
    def ways(self) -> dict[str, How]:
        """Ways of the blocks, ``{block: "structured" | "general" | "unused"}``."""
        return {name: way.how for name, way in self.form.ways.items()}

    @property
    def gaps(self) -> dict[str, float]:
        """Largest relative differences from autograd, ``{block: difference}``.

        A difference is of the way that was taken, or of the one that was refused.
        """
        return {name: way.gap for name, way in self.form.ways.items()}

    def __str__(self) -> str:
        lines: list[tuple[str, How, str]] = []
        for block in self.blocks:
            way = self.form.ways[block.name]
            if way.how == "structured":
                what = (
                    f"T = {self.form.places.get(block.name, 0)}, {len(way.arrangement)}"
                    f" use{'s' * (len(way.arrangement) != 1)}"
                )
                told = "" if way.proven else "; all derivatives zero so far"
                others = sorted({how for how in way.arrangement if how != "first"})
                told += f"; examples {', '.join(others)}" if others else ""
                lines.append((str(block), way.how, f"{what}, autograd to {way.gap:.0e}{told}"))
            elif way.how == "general":
                lines.append((str(block), way.how, way.why))
            else:
                lines.append(
                    (str(block), way.how, "does not reach the outputs: its gradient is zero")
                )
        width = max(len(name) for name, _, _ in lines)
        told = "\n".join(f"{name:<{width}}  {how:<10}  {why}" for name, how, why in lines)
        return told + (f"\nlikelihood: {self.law}" if self.law else "")
