"""What `watch` is given of a loop: its optimizers and its model, each plain."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from curvlab.curvature.shadow import Shadow
from curvlab.errors import CurvlabError, shown, some_of
from curvlab.foreign_kinds import decoupled
from curvlab.objective import Objective
from curvlab.strangers import original

Optimizers = torch.optim.Optimizer | Iterable[torch.optim.Optimizer]


def plain_optimizers(given: Optimizers) -> list[torch.optim.Optimizer]:
    """Return the optimizers that step, out of the wrappers of accelerate and Lightning.

    Raises:
        CurvlabError: something that is no optimizer, or none at all.
    """
    found: list[torch.optim.Optimizer] = []
    several: list[Any] = list(given) if isinstance(given, Iterable) else [given]
    for one in several:
        inner: Any = one
        while isinstance(getattr(inner, "optimizer", None), torch.optim.Optimizer):
            inner = inner.optimizer
        if not isinstance(inner, torch.optim.Optimizer):
            raise CurvlabError(
                f"optimizer must be a torch.optim.Optimizer, or a list of them, not {shown(one)}"
            )
        if not any(inner is other for other in found):
            found.append(inner)
    if not found:
        raise CurvlabError("there is no optimizer: give watch all that step the model")
    return found


def check_held(objective: Objective, optimizers: Sequence[torch.optim.Optimizer]) -> None:
    """Raise CurvlabError where trainable parameters of the model are in no optimizer's groups."""
    held = _held(optimizers)
    loose = [name for name, p in objective.parameters.items() if id(p) not in held]
    if loose:
        raise CurvlabError(
            f"parameters {some_of(loose)} of the model are trainable but in no optimizer: give"
            " watch all optimizers of the loop as a list, or freeze them"
        )


def in_no_block(
    objective: Objective, optimizers: Sequence[torch.optim.Optimizer]
) -> list[nn.Parameter]:
    """Return parameters that are trained now and were not when the watch was made; say it once."""
    held, blocks = _held(optimizers), {id(p) for p in objective.parameters.values()}
    found = {
        name: p
        for name, p in objective.model.named_parameters()
        if p.requires_grad and id(p) in held and id(p) not in blocks
    }
    if found:
        objective.say(
            f"parameters {some_of(found)} of the model are trained now and were not when the"
            " watch was made: they are in no block of its log; make another watch for them"
        )
    return list(found.values())


def _held(optimizers: Sequence[torch.optim.Optimizer]) -> set[int]:
    return {id(p) for one in optimizers for group in one.param_groups for p in group["params"]}


def described_optimizer(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return what a log says of an optimizer: its class, and the options of its groups."""
    kind = type(optimizer)
    groups = [
        {key: _plain(value) for key, value in group.items() if key not in ("params", "param_names")}
        | {"parameters": len(group["params"])}
        for group in optimizer.param_groups
    ]
    return {"class": f"{kind.__module__}.{kind.__qualname__}", "groups": groups}


def _plain(value: Any) -> Any:
    return value if isinstance(value, int | float | str | None) else repr(value)


def rate_in(group: Mapping[str, Any]) -> float:
    """Return a group's learning rate; 1 where it has none, as optimizers that choose their own."""
    lr = group.get("lr")
    return 1.0 if lr is None else float(lr)


def decays_of(optimizer: torch.optim.Optimizer) -> dict[int, float]:
    """Return {id of a parameter: γ of weight decay that is apart from the optimizer's step}.

    W ← W (1 − lr γ) − …, lr the rate of the parameter's group (`foreign_kinds.decoupled`). Where an
    optimizer of curvlab's follows one of somebody else's, it is that one's.
    """
    descent = getattr(optimizer, "descent", None)
    curvature = getattr(descent, "curvature", None)
    if isinstance(curvature, Shadow):
        parameters = curvature.objective.parameters
        return {id(parameters[name]): decay for name, decay in curvature.decays().items()}
    return {
        id(p): decay
        for group in optimizer.param_groups
        for decay in [decoupled(optimizer, group)]
        for p in group["params"]
    }


def forms_of(model: nn.Module) -> list[nn.Module]:
    """Return the model as the loop has it, and what `torch.compile` has made of its original.

    A hook of a compiled model is traced with it, and hears nothing: that of what is called does.
    """
    forms = [model]
    if "torch._dynamo" in sys.modules:
        kind = sys.modules["torch._dynamo"].OptimizedModule
        plain = original(model)
        forms += [
            one
            for one in gc.get_objects()
            if type(one) is kind and original(one) is plain and one is not model
        ]
    return forms


def closure_in(args: Sequence[Any], named: Mapping[str, Any]) -> Any:
    """Return the closure that a step was given, None without one; `args` begin with the optimizer.

    `step(closure)` is all that torch says of a step's arguments.
    """
    return next(iter((*args[1:], *named.values())), None)


class ForwardHook:
    """Hook of a model's forward pass, which a copy of the model, or a pickle, does not take along.

    Args:
        function: is told of (module, args, kwargs); None: nobody is.
    """

    def __init__(self, function: Callable[[nn.Module, Any, Any], None] | None = None) -> None:
        self.function = function

    def __call__(self, module: nn.Module, args: Any, named: Any) -> None:
        """Tell the function; a compiler that traces this sees nothing done."""
        if torch.compiler.is_compiling() or self.function is None:
            return
        self.function(module, args, named)

    def __deepcopy__(self, memo: dict[int, Any]) -> ForwardHook:
        """Return a hook that tells nobody."""
        return ForwardHook()

    def __reduce__(self) -> tuple[type[ForwardHook], tuple[()]]:
        """Pickle as a hook that tells nobody."""
        return ForwardHook, ()
