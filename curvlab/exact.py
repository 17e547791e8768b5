"""The oracle: per-sample gradients and Jacobians, dense blocks of Hessian, Gauss-Newton and Fisher.

Two routes. Blocks of layers with a rule go through the structure, Σₙ Gₙ ⊗ aₙaₙᵀ or the rows of the captured passes; everything
else, and the Hessian, through `torch.func`. Scales: gradients and Jacobians are of **one example's** summed loss or
outputs; matrices are the mean over examples.

Legend: V vectors, N examples, C outputs of the model, D parameters of a block.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import functional_call, hessian, jacrev, vmap
from torch.nn.modules.batchnorm import _BatchNorm

from curvlab.capture import Capture, LayerStatistics
from curvlab.errors import CurvlabError, guard_memory, unknown
from curvlab.layers import Block
from curvlab.linalg.operators import Dense
from curvlab.linalg.packed import accumulate_, output_pairs, unpack_full
from curvlab.objective import Objective, Pass

Kind = Literal["hessian", "ggn", "fisher", "fisher-mc", "ef"]
"""Hessian of the mean loss; Gauss-Newton; Fisher over all labels (= GGN); over one sampled label; over the data's labels."""

KINDS: tuple[Kind, ...] = get_args(Kind)
_PASS: dict[str, Pass] = {"ggn": "exact", "fisher": "exact", "fisher-mc": "model", "ef": "data"}


def gradients(objective: Objective, x: Tensor, y: Tensor) -> dict[str, Float[Tensor, "N *shape"]]:
    """Gradient of each example's loss (not divided by N), {parameter: [N, *shape]}.

    Raises:
        CurvlabError: data that do not fit the model or the likelihood.
    """
    _alone(objective)
    statistics = objective.closure(x, y, "exact").observe({"data"}, move_buffers=False).passes["data"]
    found = {
        name: g
        for block in objective.blocks
        if block.module is not None
        for name, g in _per_parameter(block, statistics[block.name].rows[0]).items()
    }
    loose = [b.params[0] for b in objective.blocks if b.module is None]
    if loose:
        closure = objective.closure(x, y, "exact")
        parameters, fixed = _split(objective, loose)

        def loss(values: dict[str, Tensor], one_x: Tensor, one_y: Tensor) -> Tensor:
            z = functional_call(objective.model, values | fixed, (one_x[None],))
            return objective.likelihood.loss(z, one_y[None])[0]

        found |= vmap(torch.func.grad(loss), (None, 0, 0))(parameters, closure.x, closure.y)
    return {name: found[name] for name in objective.parameters}


def jacobians(objective: Objective, x: Tensor) -> dict[str, Float[Tensor, "N C *shape"]]:
    """Jacobian of each example's outputs (flattened to C), {parameter: [N, C, *shape]}."""
    _alone(objective)
    x = x.to(objective.device, objective.dtype if x.is_floating_point() else x.dtype)
    parameters, fixed = _split(objective, [b.params[0] for b in objective.blocks if b.module is None])
    found: dict[str, Tensor] = {}
    if parameters:

        def outputs(values: dict[str, Tensor], one_x: Tensor) -> Tensor:
            z: Tensor = functional_call(objective.model, values | fixed, (one_x[None],))
            return z[0].flatten()

        found |= vmap(jacrev(outputs), (None, 0))(parameters, x)
    with torch.enable_grad(), Capture(objective.model, objective.blocks) as capture:
        z = functional_call(objective.model, {name: b.clone() for name, b in objective.model.named_buffers()}, (x,))
    units = torch.eye(z[0].numel(), dtype=z.dtype, device=z.device)
    vectors = units[:, None].expand(-1, len(z), -1).reshape(-1, *z.shape)
    for name, s in capture.backward(z, vectors).items():
        block = next(b for b in objective.blocks if b.name == name)
        found |= _per_parameter(block, s.rows.transpose(0, 1))
    return {name: found[name] for name in objective.parameters}


def matrix(objective: Objective, x: Tensor, y: Tensor, kind: Kind = "fisher", block: str = "1") -> Dense:
    """One dense diagonal block, bias included, on the row-major flattening of the block's [O, I]; mean over examples.

    Args:
        objective: model and likelihood. x, y: the examples (y is not read by ggn, fisher and fisher-mc).
        kind: hessian | ggn | fisher | fisher-mc | ef. fisher-mc draws one label for each example.
        block: name of the block.

    Raises:
        CurvlabError: unknown kind or block, data that do not fit, a matrix larger than the machine's memory.
    """
    if kind not in KINDS:
        raise unknown("kind of matrix", kind, KINDS)
    blocks = {b.name: b for b in objective.blocks}
    if block not in blocks:
        raise unknown("block", block, blocks)
    chosen = blocks[block]
    size = chosen.numel**2 * torch.finfo(objective.dtype).bits // 8
    guard_memory(2 * size, f"the dense {kind} of {chosen}", "choose a smaller block or fewer outputs")
    if kind == "hessian":
        return Dense(_hessian(objective, x, y, chosen))
    label = _PASS[kind]
    if chosen.module is None:
        raise CurvlabError(f"{chosen} belongs to a layer without a rule: its {kind} is not implemented, its hessian is")
    _alone(objective)
    observation = objective.closure(x, y, "exact").observe({label}, move_buffers=False)
    return Dense(_second_moment(observation.passes[label][block]))


def _second_moment(statistics: LayerStatistics) -> Float[Tensor, "D D"]:
    """(1/N) Σ_v Σ_n vec(rows) vec(rows)ᵀ."""
    a, g = statistics.a, statistics.g
    outputs, inputs = statistics.block.shape
    if a.shape[1] > 1:
        rows = statistics.rows.flatten(2).flatten(0, 1)
        return rows.mT @ rows / statistics.size
    packed = a.new_zeros(outputs * (outputs + 1) // 2, inputs * (inputs + 1) // 2)
    accumulate_(packed, output_pairs(g[:, :, 0]), a[:, 0], old=0.0, new=1 / statistics.size)
    return unpack_full(packed, outputs, inputs)


def _hessian(objective: Objective, x: Tensor, y: Tensor, block: Block) -> Float[Tensor, "D D"]:
    """Hessian of the mean loss in one block, through `torch.func`."""
    closure = objective.closure(x, y, "exact")
    closure.observe(frozenset(), move_buffers=False)  # checks data, targets and loss
    fixed = _split(objective, [])[1]
    buffers = [name for name, _ in objective.model.named_buffers()]
    values = {name: p.detach() for name, p in objective.parameters.items() if name in block.params}

    def loss(flat: Tensor) -> Tensor:
        cloned = {name: fixed[name].clone() for name in buffers}  # inside the transform, where BatchNorm may write on them
        z = functional_call(objective.model, fixed | cloned | block.scatter(flat.view(block.shape)), (closure.x,))
        return objective.likelihood.loss(z, closure.y).mean()

    found: Tensor = hessian(loss)(block.gather(values).flatten())
    return found


def _alone(objective: Objective) -> None:
    """Refuse a model that mixes the examples of a batch: none has a gradient or a Jacobian of its own."""
    for name, module in objective.model.named_modules():
        if isinstance(module, _BatchNorm) and (module.training or module.running_mean is None):
            raise CurvlabError(
                f"'{name}' normalises over the batch, so that no example has a gradient of its own: call model.eval() first"
            )


def _split(objective: Objective, names: list[str]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(the parameters of these names, all others and the buffers), detached."""
    state = {name: t.detach() for name, t in [*objective.model.named_parameters(), *objective.model.named_buffers()]}
    return {n: state[n] for n in names}, {n: t for n, t in state.items() if n not in names}


def _per_parameter(block: Block, rows: Float[Tensor, "*B O I"]) -> dict[str, Float[Tensor, "*B *shape"]]:
    """Rows of a block → one tensor a parameter, batch axes kept."""
    batch = rows.shape[:-2]
    weight, *bias = block.params
    shape = {n: p.shape for n, p in zip(block.params, block.scatter(rows.new_empty(block.shape)).values(), strict=True)}
    inputs = rows[..., :-1] if bias else rows
    found = {weight: inputs.reshape(*batch, *shape[weight])}
    return found | dict.fromkeys(bias, rows[..., -1])
