"""Kinds of optimizers of somebody else's: what one shows of itself on a small weight.

Whether it can follow weights and gradients that it is given, what its constructor takes, and
whether its weight decay is apart from its step.
"""

from __future__ import annotations

import inspect
import math
import random
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from curvlab.errors import CurvlabError
from curvlab.system.memory import tensors
from curvlab.system.random_state import kept

MARK = "use_muon"
"""The mark of groups of matrices, without which Muons of some packages are not made."""

_STEPS = 7  # longer than the five or six of a Lookahead
_RATE = 0.01
_ITS_OWN = ("lr", "weight_decay")  # options of which a trial of decay has its own
_APART: dict[tuple[type, str], bool] = {}  # what trials of weight decay have shown


def in_groups(parameters: Sequence[nn.Parameter], mark: bool | None) -> list[Any]:
    """Return what a constructor takes: the parameters, or a group of them with the mark."""
    return list(parameters) if mark is None else [{"params": list(parameters), MARK: mark}]


@contextmanager
def _on_trial() -> Iterator[None]:
    """Leave the generators as they are, and what an optimizer warns of unsaid."""
    with kept(torch.device("cpu")), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def is_marked(kind: type[torch.optim.Optimizer], options: Mapping[str, Any]) -> bool:
    """Return whether a class takes no parameters, but groups of them with the mark."""
    return any(
        not _can_be_made(kind, some, None) and _can_be_made(kind, some, True)
        for some in (options, {})
    )


def constructor_options(kind: type[torch.optim.Optimizer]) -> dict[str, inspect.Parameter]:
    """Return the parameters of its constructor beside the model's, by name."""
    found = list(inspect.signature(kind.__init__).parameters.values())[2:]
    return {p.name: p for p in found if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}


def check_kinds(kind: type[torch.optim.Optimizer], title: str, options: Mapping[str, Any]) -> None:
    """Raise CurvlabError for an option that is of another kind than its default in the class."""
    for name, parameter in inspect.signature(kind).parameters.items():
        default, value = parameter.default, options.get(name, parameter.default)
        wanted = ""
        if isinstance(default, bool) and not isinstance(value, bool):
            wanted = "true or false"
        elif isinstance(default, float | int) and isinstance(value, str | tuple | list):
            wanted = f"a number, such as {default}"
        elif isinstance(default, tuple) and len(default) != (
            len(value) if isinstance(value, tuple | list) else 0
        ):
            wanted = f"{len(default)} values, such as {default}"
        if wanted:
            raise CurvlabError(f"options of {title}: {name} takes {wanted}, not {value!r}")


def check_follows(
    kind: type[torch.optim.Optimizer], name: str, options: Mapping[str, Any], mark: bool | None
) -> None:
    """Raise CurvlabError for an optimizer that cannot follow another's weights, with the reason.

    Its own history shows in its state, or in its steps (`_remembers`).
    """
    closure = inspect.signature(kind.step).parameters.get("closure")
    if closure is not None and closure.default is closure.empty:
        raise CurvlabError(
            f"{name} needs a closure that computes the loss again at other weights: it cannot"
            " follow weights and gradients that it is given"
        )
    if callable(getattr(kind, "train", None)) and callable(getattr(kind, "eval", None)):
        raise CurvlabError(
            f"{name} steps on weights of its own beside the model's (it has train() and eval()):"
            " its direction at given weights is not defined"
        )
    check_kinds(kind, name, options)
    weight = nn.Parameter(torch.linspace(1.0, 2.0, 12, device="cpu").view(4, 3))
    before = weight.detach().clone()
    with _on_trial():
        try:
            optimizer = kind(in_groups([weight], mark), **options)
        except Exception as error:
            raise refused_options(name, error) from error
        if not all(isinstance(g.get("lr"), float | int | Tensor) for g in optimizer.param_groups):
            raise CurvlabError(
                f"{name} keeps no learning rate in its groups, over which its step would be its"
                " direction"
            )
        weight.grad = torch.linspace(-1.0, 1.0, 12, device="cpu").view(4, 3).sin()
        try:
            optimizer.step()
        except Exception as error:
            line = one_line(error)
            graph = any(word in line for word in ("graph", "grad_fn", "does not require grad"))
            why = "needs the graph of the loss" if graph else "fails in its step"
            raise CurvlabError(
                f"{name} {why}, and a follower has the gradient alone: {line}"
            ) from error
        kept_weights = [
            f" (its state '{key}')"
            for key, value in optimizer.state[weight].items()
            if isinstance(value, Tensor)
            and value.shape == before.shape
            and torch.equal(value, before)
        ]
        if kept_weights or _remembers(kind, options, mark):
            raise CurvlabError(
                f"{name} keeps the weights' own history{''.join(kept_weights[:1])}: it cannot"
                " follow another's weights"
            )


def _remembers(
    kind: type[torch.optim.Optimizer], options: Mapping[str, Any], mark: bool | None
) -> bool:
    """Return whether steps at given weights depend on the weights of steps before them.

    These are W or −W, with the same gradients: norms of weights, which methods scale momenta by,
    are alike, and decay is off, which enters momenta by the gradient. What draws other numbers at
    every run is not asked.
    """
    if "weight_decay" in constructor_options(kind):
        options = {**options, "weight_decay": 0.0}
    try:
        one, again, other = (_walked(kind, options, mark, sign) for sign in (1.0, 1.0, -1.0))
    except Exception:  # what fails so fails in its step, with its own line
        return False
    return torch.equal(one, again) and not torch.equal(one, other)


def _walked(
    kind: type[torch.optim.Optimizer], options: Mapping[str, Any], mark: bool | None, sign: float
) -> Tensor:
    """Return where each of some steps from given weights arrives, after others from W or −W."""
    first = sign * torch.linspace(1.0, 2.0, 12, device="cpu").view(4, 3)
    then = torch.linspace(-2.0, 1.5, 12, device="cpu").view(4, 3)
    weight = nn.Parameter(first.clone())
    _seed()
    optimizer = kind(in_groups([weight], mark), **options)
    found = list(_steps(optimizer, weight, [first] * _STEPS + [then] * _STEPS))
    return torch.stack(found[_STEPS:])


def _can_be_made(
    kind: type[torch.optim.Optimizer], options: Mapping[str, Any], mark: bool | None
) -> bool:
    weight = nn.Parameter(torch.ones(4, 3, device="cpu"))
    with _on_trial():
        try:
            kind(in_groups([weight], mark), **options)
        except Exception:
            return False
    return True


def decoupled(optimizer: torch.optim.Optimizer, group: Mapping[str, Any]) -> float:
    """Return γ of a group whose decay is apart from its step, W ← W (1 − lr γ) − …; else 0.

    What it is shows on a small weight (`_decays_apart`), where one of its kind can be made. Else it
    is as marked: by `decoupled_weight_decay` in torch, by `weight_decouple` in pytorch_optimizer;
    torch's Muon has no mark, and no other kind.
    """
    decay = group.get("weight_decay", 0.0) or 0.0
    if not isinstance(decay, float | int | Tensor) or not float(decay):
        return 0.0
    kind = type(optimizer)
    marked = getattr(kind, "decoupled_weight_decay", "ns_steps" in group)
    marked = group.get("decoupled_weight_decay", group.get("weight_decouple", marked))
    marked = bool(marked) and not group.get("fixed_decay", False)
    options = {name: group[name] for name in constructor_options(kind) if name in group}
    # the trial has a rate and a decay of its own, so that schedules ask for no other
    asked = sorted((name, repr(v)) for name, v in options.items() if name not in _ITS_OWN)
    key = kind, repr((asked, group.get(MARK), marked))
    if key not in _APART:
        with _on_trial():
            _APART[key] = _decays_apart(kind, options, group.get(MARK), marked)
    return float(decay) if _APART[key] else 0.0


def _decays_apart(
    kind: type[torch.optim.Optimizer], options: Mapping[str, Any], mark: bool | None, marked: bool
) -> bool:
    """Return whether steps with decay go lr γ W further than those without, from the same states.

    Decay that enters by the gradient moves the states; where there are none, of SGD, it is as
    marked. Decay of what the step has left, or that a trust ratio scales, is part of the step.
    """
    if "weight_decay" not in options:
        return marked
    rate = {"lr": _RATE} if "lr" in options else {}
    first = torch.linspace(1.0, 2.0, 12, device="cpu").view(4, 3)
    walks, states = [], []
    try:
        for decay in (0.0, 1.0):
            _seed()
            weight = nn.Parameter(first.clone())
            made = {**options, **rate, "weight_decay": decay}
            optimizer = kind(in_groups([weight], mark), **made)
            walks.append(torch.stack(list(_steps(optimizer, weight, [first] * _STEPS))))
            states.append([t.clone() for t in tensors(optimizer.state[weight]) if t.ndim])
    except Exception:
        return marked
    if not states[0]:
        return marked
    lr = float(optimizer.param_groups[0].get("lr", _RATE))
    further = (walks[0] - walks[1]) / (lr * first)
    alike = len(states[0]) == len(states[1]) and all(map(torch.equal, *states))
    return alike and bool(((further - 1).abs() < 1e-3).all())


def _steps(
    optimizer: torch.optim.Optimizer, weight: nn.Parameter, starts: Sequence[Tensor]
) -> Iterator[Tensor]:
    """Yield where each step arrives, from these weights."""
    for step, start in enumerate(starts):
        with torch.no_grad():
            weight.copy_(start)
        weight.grad = (torch.linspace(-1.0, 1.0, 12, device="cpu").view(4, 3) * (step + 1)).sin()
        optimizer.step()
        yield weight.detach().clone()


def _seed() -> None:
    torch.default_generator.manual_seed(0)  # of the CPU alone, where the trials run
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002  # an optimizer's own draws, whatever it draws from


def steps_on(
    kind: type[torch.optim.Optimizer], options: Mapping[str, Any], mark: bool | None, axes: int
) -> bool:
    """Return whether a step goes through on a small parameter of so many axes.

    A class that takes matrices alone may say so there only.
    """
    shape = (4, 3, *[2] * axes)[:axes]
    small = nn.Parameter(torch.linspace(1.0, 2.0, math.prod(shape), device="cpu").view(shape))
    small.grad = small.detach().sin()
    with _on_trial():
        try:
            kind(in_groups([small], mark), **options).step()
        except Exception:
            return False
    return True


def refused_options(name: str, error: Exception) -> CurvlabError:
    """Return what a constructor says of its arguments in one line."""
    line = one_line(error)
    if "'list' object has no attribute" in line:
        line += "; it takes a model, it seems, and a follower has parameters alone"
    return CurvlabError(f"options of {name}: {line}")


def one_line(error: BaseException) -> str:
    """Return an error's text in one line, cut to what can be read."""
    return " ".join(str(error).split())[:200] or type(error).__name__
