"""Per-sample gradients and Jacobians: of **one example's** summed loss, never divided by N.

Layers with a rule go through their captured inputs and derivatives, all others through
`torch.func`.

Legend: N examples, C outputs of the model (flattened), V vectors sent back.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from curvlab.closure import Closure
from curvlab.derivatives import derivatives
from curvlab.errors import CurvlabError, guard_memory
from curvlab.exact.batches import Minibatches, check_independence
from curvlab.exact.torch_func import Function
from curvlab.layers import Layout
from curvlab.objective import Objective
from curvlab.statistics import LayerStatistics
from curvlab.system.memory import in_huge_pages
from curvlab.units import Unit, kind_per


@derivatives()
def gradients(
    objective: Objective,
    x: Any,
    y: Any = None,
    *,
    out: Mapping[str, Tensor] | None = None,
    unit: Unit = "sequence",
) -> dict[str, Float[Tensor, "N *shape"]]:
    """Compute the gradient of each example's loss, or of each place's, not divided by N.

    >>> import torch
    >>> import curvlab as cl
    >>> objective = cl.Objective(torch.nn.Linear(2, 1, bias=False), cl.likelihoods.Gaussian())
    >>> cl.exact.gradients(objective, torch.ones(3, 2), torch.zeros(3, 1))["weight"].shape
    torch.Size([3, 1, 2])

    Args:
        objective: model and likelihood.
        x: inputs [N, …].
        y: targets.
        out: tensors to write into, as an earlier call returned them: filling fresh memory costs
            more than the arithmetic.
        unit: "token" gives the gradients of the loss at each of the P places of an example, which
            add up to the example's, and are zero where a place is not counted.

    Returns:
        {parameter: [N, *shape]}, or per token {parameter: [N, P, *shape]}.

    Raises:
        CurvlabError: data that do not fit the model or the likelihood; a model whose examples do
            not stand alone.
    """
    (closure,) = Minibatches.of(objective, x, y, whole=True)
    if kind_per("ef", unit) == "ef-token":
        return _into(_of_places(closure), out)
    _guard(objective, len(closure.x), "the per-sample gradients", "take fewer examples at a time")
    _, losses, capture = closure.look()
    statistics = capture.backward(losses, torch.ones_like(losses)[None])
    found: dict[str, Tensor] = {}
    parameters = objective.parameters
    for s in statistics.values():
        found |= (
            _outer(s, s.g[0, :, 0], out)
            if _narrow(s)
            else _into(_typed(s.block.scatter(s.rows[0], 1), parameters), out)
        )
    if len(statistics) < len(objective.blocks):
        loose = _loose(objective, statistics)
        rows = Function(closure, loose).gradients(closure.y)
        found |= _into(_typed(loose.unflatten(rows, 1), parameters), out)
    return {name: found[name] for block in objective.blocks for name in block.params}


def _of_places(closure: Closure) -> dict[str, Float[Tensor, "N P *shape"]]:
    """Return the gradients of the losses of each place."""
    objective = closure.objective
    z, _, capture = closure.look()
    apart = closure.by_place(z)
    scales = apart.scales
    vectors = apart.vectors() * scales.view(-1, *[1] * z.ndim)
    remedy = "take fewer examples at a time"
    _guard(objective, len(vectors) * len(z), "the gradients of all places", remedy)
    found: dict[str, Tensor] = {}
    statistics = capture.backward(z, vectors)
    for s in statistics.values():
        found |= s.block.scatter(s.rows, 2)
    loose = _loose(objective, statistics)
    if loose.blocks:
        rows = Function(closure, loose).gradients_of_places() * scales[:, None]
        found |= loose.unflatten(rows.transpose(0, 1), 2)
    typed = _typed(found, objective.parameters)
    names = (name for block in objective.blocks for name in block.params)
    return {name: typed[name].transpose(0, 1) for name in names}


@derivatives()
def jacobians(objective: Objective, x: Tensor) -> dict[str, Float[Tensor, "N C *shape"]]:
    """Compute the Jacobian of each example's outputs, flattened to C: {parameter: [N, C, *shape]}.

    Raises:
        CurvlabError: inputs that do not fit the model; a model whose examples do not stand alone.
    """
    check_independence(objective)
    inputs = objective.interface.inputs(x)
    closure = Closure(objective, inputs, torch.zeros(len(inputs), device="cpu"), 0, "exact")
    z, capture = closure.forward()
    closure.check_alone(z.detach())
    _guard(
        objective,
        z.numel(),
        "the Jacobians",
        "take fewer examples at a time, or a product form",
    )
    found: dict[str, Tensor] = {}
    units = torch.eye(z[0].numel(), dtype=z.dtype, device=z.device)
    vectors = units[:, None].expand(-1, len(z), -1).reshape(-1, *z.shape)
    statistics = capture.backward(z, vectors)
    for s in statistics.values():
        rows = (
            _outer(s, s.g[:, :, 0])
            if _narrow(s)
            else _typed(s.block.scatter(s.rows, 2), objective.parameters)
        )
        found |= {name: t.transpose(0, 1) for name, t in rows.items()}
    if len(statistics) < len(objective.blocks):
        loose = _loose(objective, statistics)
        found |= _typed(
            loose.unflatten(Function(closure, loose).jacobians(), 2), objective.parameters
        )
    return {name: found[name] for block in objective.blocks for name in block.params}


def _loose(objective: Objective, statistics: Mapping[str, LayerStatistics]) -> Layout:
    """Return the layout of the blocks that go the general way."""
    return Layout(tuple(b for b in objective.blocks if b.name not in statistics))


def _typed(rows: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return each tensor in its parameter's own dtype."""
    return {name: t.to(parameters[name].dtype) for name, t in rows.items()}


def _guard(objective: Objective, vectors: int, what: str, remedy: str) -> None:
    size = torch.finfo(objective.dtype).bits // 8
    guard_memory(vectors * len(objective.layout) * size, what, remedy)


def _narrow(s: LayerStatistics) -> bool:
    """Return whether a row of a block is one outer product, parameter by parameter.

    Then each weight is used at one place, and lies in its own order and dtype.
    """
    block, layer = s.block, s.block.layer
    if not s.structured or len(s.parts) != 1 or block.groups > 1:
        return False
    (part,) = s.parts
    if part.swapped or part.g.shape[2] != 1 or layer is None or layer.transposed:
        return False
    use = part.own[2].use
    return use.biased == block.biased and use.call.weight.dtype == s.like.dtype


def _outer(
    statistics: LayerStatistics, g: Float[Tensor, "*V N O"], out: Mapping[str, Tensor] | None = None
) -> dict[str, Float[Tensor, "*V N *shape"]]:
    """Return rows of a block, g aᵀ and g, parameter by parameter, each written once."""
    name, *bias = statistics.block.params
    shape = g.shape[:-1] + statistics.block.weight_shape
    target = in_huge_pages(g.new_empty(shape)) if out is None else _given(name, shape, g, out)
    torch.mul(g.unsqueeze(-1), statistics.bare_a, out=target.flatten(g.ndim))
    found = {name: target}
    for b in bias:
        found[b] = g if out is None else _checked(out, b, g.shape, g).copy_(g)
    return found


def _given(name: str, shape: tuple[int, ...], like: Tensor, out: Mapping[str, Tensor]) -> Tensor:
    target = _checked(out, name, shape, like)
    if not target.is_contiguous():
        raise CurvlabError(f"out['{name}'] must be contiguous: pass what an earlier call returned")
    return target


def _into(found: dict[str, Tensor], out: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """Copy the tensors to where the caller wants them, if anywhere."""
    return (
        found
        if out is None
        else {name: _checked(out, name, t.shape, t).copy_(t) for name, t in found.items()}
    )


def _checked(out: Mapping[str, Tensor], name: str, shape: tuple[int, ...], like: Tensor) -> Tensor:
    if name not in out:
        raise CurvlabError(f"out has no '{name}': pass what an earlier call returned")
    target = out[name]
    if tuple(target.shape) != shape or target.dtype != like.dtype or target.device != like.device:
        raise CurvlabError(
            f"out['{name}'] must be {list(shape)}, {like.dtype} on {like.device}, "
            f"not {list(target.shape)}, {target.dtype} on {target.device}"
        )
    return target
