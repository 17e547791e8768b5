"""What a model may be that is not ours: compiled, spread over processes, complex, mixing.

A mixing one lets its examples act on each other.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import UninitializedParameter

from curvlab.derivatives import Branching
from curvlab.errors import CurvlabError
from curvlab.nests import call_arguments


def original(model: nn.Module) -> nn.Module:
    """Return what `torch.compile`, DataParallel or DDP was given: the same parameters.

    DDP's own reduction is of `loss.backward()` alone, and no derivative here goes that way;
    DataParallel's replicas on several devices are one model on one here.
    """
    while True:
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        elif "torch._dynamo" in sys.modules and isinstance(
            getattr(model, "_orig_mod", None), nn.Module
        ):
            model = model._orig_mod  # type: ignore[assignment]
        else:
            return model


def eager(alone: bool = False) -> AbstractContextManager[Any]:
    """Run compiled parts as they were before, inside: what they do shows in no call.

    Args:
        alone: no other mode is there that sees to branches and loops.
    """
    if "torch._dynamo" not in sys.modules:  # nothing can be compiled
        return nullcontext()
    stance: AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    if not alone:
        return stance
    both = ExitStack()
    both.enter_context(stance)
    both.enter_context(Branching())
    return both


def called(model: nn.Module, tensors: Mapping[str, Tensor], x: Any) -> Any:
    """Return the model on x with some of its parameters and buffers replaced.

    Every place of each is, and once each: torch's own `functional_call` does not put back what
    stands in a module that two parents share.
    """
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    new = {id(state[name]): t for name, t in tensors.items()}
    places = {
        f"{prefix}.{key}".lstrip("."): new[id(t)]
        for prefix, module in model.named_modules()
        for key, t in (*module._parameters.items(), *module._buffers.items())
        if id(t) in new
    }
    by_place, by_name = call_arguments(x)
    return functional_call(model, places, by_place, by_name, tie_weights=False)


def mixes(modules: Iterable[nn.Module]) -> bool:
    """Return whether examples are known to act on each other: normalised over the batch."""
    return any(
        isinstance(m, _BatchNorm) and (m.training or m.running_mean is None) for m in modules
    )


WRAP = (
    "several inputs are given as a tuple, or by keyword as a mapping: closure((x1, x2), y),"
    " closure({'ids': ids, 'mask': mask}, y)"
)
"""Remedy for a model of several inputs."""


def beyond_a_table(error: BaseException, model: nn.Module) -> str | None:
    """Return what an embedding was asked for, and what it has; None where that is not the error."""
    trace, frames = error.__traceback__, []
    while trace is not None:
        frames.append(trace.tb_frame)
        trace = trace.tb_next
    here = [frame for frame in frames if frame.f_code is F.embedding.__code__]
    ids, weight = (here[-1].f_locals.get(name) if here else None for name in ("input", "weight"))
    if not isinstance(error, IndexError) or not isinstance(ids, Tensor) or not ids.numel():
        return None
    if not isinstance(weight, Tensor) or weight.ndim != 2:
        return None
    low, high = int(ids.min()), int(ids.max())
    names = {id(p): name for name, p in model.named_parameters()}
    modules = {id(module): f"{name}.weight" for name, module in model.named_modules()}
    owners = [modules.get(id(frame.f_locals.get("self")), "") for frame in frames]
    known = [name for name in owners if name in names.values()]
    name = names.get(id(weight)) or (known[-1] if known else "")
    what = f"index {high if high >= len(weight) else low} is beyond the {len(weight)} rows of"
    remedy = (
        "padding is a row of the table, and only labels may be ignored"
        if low < 0 <= len(weight) - 1 - high
        else "give shorter sequences, or a longer table; or it is a symbol that the table has not"
    )
    return f"{what} {repr(name) if name else 'an embedding'}: {remedy}"


_SHARDED = ("FullyShardedDataParallel", "FSDPModule")


def check_model(model: nn.Module) -> None:
    """Raise CurvlabError for a model whose parameters are not all here, or have no derivatives.

    It may be spread over several processes, scripted, or have lazy, complex or inference tensors.
    """
    if not isinstance(model, nn.Module):
        raise CurvlabError(
            f"the model must be a torch.nn.Module, not {type(model).__name__}: wrap it in one"
        )
    if isinstance(model, torch.jit.ScriptModule):
        raise CurvlabError(
            "the model is a torch.jit.ScriptModule, whose calls show nothing: give the module that"
            " was scripted"
        )
    for name, module in model.named_modules():
        where = f"'{name}'" if name else "the model"
        if any(
            kind.__name__ in _SHARDED for kind in type(module).__mro__
        ):  # one process too: its weights are elsewhere
            raise CurvlabError(
                f"{where} is a {type(module).__name__}, whose parameters are sharded (FSDP): give"
                " the model as it was before it was wrapped or passed to fully_shard: over several"
                " processes each holds the whole of it, and inverses are shared out"
            )
    for name, p in model.named_parameters():
        if isinstance(p, UninitializedParameter):
            raise CurvlabError(
                f"parameter '{name}' is lazy and has no shape yet: run the model on one minibatch"
                " first"
            )
        if p.is_complex():
            raise CurvlabError(
                f"parameter '{name}' is complex ({p.dtype}): keep it as its real and imaginary"
                " part, nn.Parameter(torch.view_as_real(w)) and torch.view_as_complex(w) in"
                " forward"
            )
        if (
            type(p.data).__name__ == "DTensor"
        ):  # in one process too: its arithmetic takes no plain tensors beside it
            raise CurvlabError(
                f"parameter '{name}' is a DTensor, spread over devices: give the model as it was"
                " before; over several processes each holds the whole of it"
            )
        if p.is_inference():
            raise CurvlabError(
                f"parameter '{name}' was made under torch.inference_mode(), so that it has no"
                " derivatives: copy.deepcopy(model) outside of it"
            )
    for name, b in model.named_buffers():
        if b.is_inference():
            raise CurvlabError(
                f"buffer '{name}' was made under torch.inference_mode(): copy.deepcopy(model)"
                " outside of it"
            )
