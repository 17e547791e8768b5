"""Pre-activation Hessians Gₙ = ∂²ℓₙ/∂h∂h of each example, for all layers (thesis (2.2), (3.3)).

Two ways. **Direct**: one double backward pass for every pre-activation of the layer, all of them
batched. **Recursive**: where every path from layer l to the loss runs through a later layer m (read
off the graph), with J = ∂h_m/∂h_l and g_m = ∂ℓ/∂h_m

    G_l = Jᵀ G_m J + Σ_i g_{m,i} ∂²h_{m,i}/∂h_l²,

so that no pass runs further than from m to l. The Gauss-Newton part alone is Jᵀ (∂²ℓ/∂z²) J with J
= ∂z/∂h, one pass forward for every pre-activation in place of a double one back; recursively
without the sum.

Legend: N examples, T places, O outputs, M = T O pre-activations of a layer, in the layer's own
    (raw) order, C model outputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.graph import GradientEdge

from curvlab.capture import Capture
from curvlab.errors import CurvlabError, raise_if_out_of_memory
from curvlab.layers import Block
from curvlab.statistics import LayerStatistics
from curvlab.uses import Use

_NUMBERS = 1 << 21  # in the vectors of one batched pass back: few enough to stay near the cache
_JACOBIAN = 1 << 25  # numbers in a Jacobian between layers beyond which passes are direct


@dataclass(frozen=True)
class _Known:
    """Layer whose Hessians are there, for the recursion to earlier ones."""

    edge: GradientEdge
    like: Float[Tensor, "*NM"]
    hessians: Float[Tensor, "N M M"]


def preactivation_hessians(
    capture: Capture, total: Tensor, size: int, names: Sequence[str]
) -> Iterator[tuple[LayerStatistics, Float[Tensor, "T O N T O"]]]:
    """Yield ∂²ℓₙ/∂h_t∂h_t' of each example, one block after the other, the last first.

    Args:
        capture: of the forward pass.
        total: Σₙ ℓₙ of independent examples, with its graph.
        size: the number of examples.
        names: blocks with a rule.

    Yields:
        (the block's inputs, its pre-activation Hessians).

    Raises:
        CurvlabError: a block that does not reach the model's outputs.
    """
    chosen = [b for b in reversed(capture.blocks) if b.name in set(names)]
    edges = [capture.only(b).edge for b in chosen]
    first = torch.autograd.grad(total, edges, create_graph=True, allow_unused=True)
    known: _Known | None = None
    for block, edge, d in zip(chosen, edges, first, strict=True):
        if d is None:
            raise CurvlabError(f"{block} does not reach the model's outputs: freeze it or use it")
        found = None if known is None else _through(total, known, edge, d)
        if found is None:
            found = _direct(d, edge, size)
        elif known is not None:
            found += _direct(
                torch.autograd.grad(known.edge, edge, known.like, create_graph=True)[0], edge, size
            )
        known = _Known(edge, d.detach(), found)
        yield capture.statistics(block.name, size), _by_place(capture.only(block), found)


def preactivation_gauss_newton(
    capture: Capture, z: Float[Tensor, "N *C"], total: Tensor, names: Sequence[str]
) -> Iterator[tuple[LayerStatistics, Float[Tensor, "T O N T O"]]]:
    """Yield (∂zₙ/∂h_t)ᵀ ∂²ℓₙ/∂z² ∂zₙ/∂h_t' of each example, one block after the other.

    From the outputs z and Σₙ ℓₙ (`total`) with their graphs; else as `preactivation_hessians`.
    """
    (slope,) = torch.autograd.grad(total, z, create_graph=True)
    known: _Known | None = None
    for block in (b for b in reversed(capture.blocks) if b.name in set(names)):
        use = capture.only(block)
        edge, statistics = use.edge, capture.statistics(block.name, len(z))
        like = use.output.value.new_empty(use.flat)
        found = None if known is None else _through(z, known, edge, like)
        if found is None:
            found = _gauss_newton(z, slope, edge, like, block)
        known = _Known(edge, like, found)
        yield statistics, _by_place(use, found)


def _by_place(use: Use, hessians: Float[Tensor, "N M M"]) -> Float[Tensor, "T O N T O"]:
    """Sort the pre-activations from the layer's raw order into places and outputs."""
    count = hessians.shape[1]
    numbers = use.rule.outputs(
        torch.arange(count, device=hessians.device).view(1, *use.output.value.shape[1:])
    )
    places, outputs = numbers.shape[1:]
    order = numbers.flatten()
    if places > 1:
        hessians = hessians[:, order[:, None], order]
    return hessians.view(-1, places, outputs, places, outputs).permute(1, 2, 0, 3, 4)


def _direct(d: Float[Tensor, "*NM"], edge: GradientEdge, size: int) -> Float[Tensor, "N M M"]:
    """Return ∂d/∂h of each example, row by row."""
    count = d.numel() // size
    found = d.new_zeros(size, count, count)
    if not d.requires_grad:  # linear in everything
        return found
    for start, units in _units(size, count, d):
        back = _send_back(d, edge, units.view(-1, *d.shape))
        if back is None:  # linear in this pre-activation
            break
        found[:, start : start + len(units)] = back.reshape(len(units), size, count).transpose(0, 1)
    return found


def _gauss_newton(
    z: Float[Tensor, "N *C"],
    slope: Float[Tensor, "N *C"],
    edge: GradientEdge,
    like: Float[Tensor, "*NM"],
    block: Block,
) -> Float[Tensor, "N M M"]:
    """Return Jᵀ (∂²ℓ/∂z²) J of each example.

    Forward derivatives come through a graph that only goes back: Jᵀw is linear in w, its own
    derivative J.
    """
    size = len(z)
    count = like.numel() // size
    w = torch.zeros_like(z, requires_grad=True)
    (back,) = torch.autograd.grad(z, edge, w, create_graph=True, allow_unused=True)
    if back is None:
        raise CurvlabError(f"{block} does not reach the model's outputs: freeze it or use it")
    # M passes along the unit vectors of h, not C passes back from the outputs: this way is taken
    # where a layer has fewer outputs than the model (`batches.by_hessians`).
    jacobian = like.new_empty(2, size, count, z[0].numel())  # transposed: J, and (∂²ℓ/∂z²) J
    for start, units in _units(size, count, like):
        forward = _send_back(back, w, units.view(-1, *like.shape))
        assert forward is not None
        curved = _send_back(slope, z, forward) if slope.requires_grad else None
        for place, columns in enumerate(
            (forward, torch.zeros_like(forward) if curved is None else curved)
        ):
            jacobian[place, :, start : start + len(units)] = (
                columns.flatten(2).transpose(0, 1).to(like.dtype)
            )
    return jacobian[0] @ jacobian[1].mT


def _through(
    root: Tensor, known: _Known, edge: GradientEdge, like: Float[Tensor, "*NM"]
) -> Float[Tensor, "N M M"] | None:
    """Return JᵀG_m J from a later layer's Hessians, or None.

    None where that layer does not cut this one off from the root of the graph, or has far more
    outputs.
    """
    size, others = len(known.hessians), known.hessians.shape[1]
    count = like.numel() // size
    if (
        others > 2 * count
        or size * others * count > _JACOBIAN
        or not _separates(root, known.edge, edge)
    ):
        return None
    jacobian = like.new_empty(size, others, count)
    for start, units in _units(size, others, like):
        back = _send_back(known.edge, edge, units.view(-1, *known.like.shape))
        assert back is not None
        jacobian[:, start : start + len(units)] = back.reshape(len(units), size, count).transpose(
            0, 1
        )
    return jacobian.mT @ (known.hessians @ jacobian)


def _units(size: int, count: int, like: Tensor) -> Iterator[tuple[int, Float[Tensor, "K N M"]]]:
    """Yield unit vectors of every example, some at a time, with the number of the first."""
    at_once = max(1, _NUMBERS // (size * count))
    for start in range(0, count, at_once):
        units = like.new_zeros(min(at_once, count - start), size, count)
        first = torch.arange(len(units), device=like.device)
        units[first, :, start + first] = 1
        yield start, units


def _send_back(
    output: Tensor | GradientEdge, edge: Tensor | GradientEdge, vectors: Float[Tensor, "K *S"]
) -> Float[Tensor, "K *S2"] | None:
    """Send several vectors back at once; one by one where an operation cannot.

    Torch's double backward of GroupNorm cannot.
    """
    try:
        return torch.autograd.grad(
            output, edge, vectors, retain_graph=True, allow_unused=True, is_grads_batched=True
        )[0]
    except RuntimeError as error:
        raise_if_out_of_memory(error)
        found = [
            torch.autograd.grad(output, edge, v, retain_graph=True, allow_unused=True)[0]
            for v in vectors
        ]
        return None if found[0] is None else torch.stack(found)


def _separates(root: Tensor, cut: GradientEdge, edge: GradientEdge) -> bool:
    """Return whether every path of the graph from `root` back to `edge` runs through `cut`."""
    waiting, seen = [root.grad_fn], {cut.node}
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        if node == edge.node:
            return False
        seen.add(node)
        waiting.extend(following for following, _ in node.next_functions)
    return True
