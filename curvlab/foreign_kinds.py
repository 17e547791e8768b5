"""Kinds of optimizers of somebody else's: what one shows of itself on a small weight.

Whether it can follow weights and gradients that it is given, and what its constructor takes.
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
from curvlab.system.random_state import kept

MARK = "use_muon"
"""The mark of groups of matrices, without which Muons of some packages are not made."""

_STEPS = 7  # longer than the five or six of a Lookahead


def in_groups(parameters: Sequence[nn.Parameter], marked: bool) -> list[Any]:
    """Return what a constructor takes: the parameters, or a group of them with the mark."""
    return [{"params": list(parameters), MARK: True}] if marked else list(parameters)


@contextmanager
def _on_trial() -> Iterator[None]:
    """Leave the generators as they are, and what an optimizer warns of unsaid."""
    with kept(torch.device("cpu")), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def is_marked(kind: type[torch.optim.Optimizer], options: Mapping[str, Any]) -> bool:
    """Return whether a class takes no parameters, but groups of them with the mark."""
    return any(
        not _can_be_made(kind, some, False) and _can_be_made(kind, some, True)
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
    kind: type[torch.optim.Optimizer], name: str, options: Mapping[str, Any], marked: bool
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
            optimizer = kind(in_groups([weight], marked), **options)
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
            why = "needs the graph of the loss" if graph else "fails on a plain gradient"
            raise CurvlabError(f"{name} {why}, which a follower does not have: {line}") from error
        kept_weights = [
            f" (its state '{key}')"
            for key, value in optimizer.state[weight].items()
            if isinstance(value, Tensor)
            and value.shape == before.shape
            and torch.equal(value, before)
        ]
        if kept_weights or _remembers(kind, options, marked):
            raise CurvlabError(
                f"{name} keeps the weights' own history{''.join(kept_weights[:1])}: it cannot"
                " follow another's weights"
            )


def _remembers(kind: type[torch.optim.Optimizer], options: Mapping[str, Any], marked: bool) -> bool:
    """Return whether steps at given weights depend on the weights of steps before them.

    These are W or −W, with the same gradients: norms of weights, which methods scale momenta by,
    are alike, and decay is off, which enters momenta by the gradient. What draws other numbers at
    every run is not asked.
    """
    if "weight_decay" in constructor_options(kind):
        options = {**options, "weight_decay": 0.0}
    try:
        one, again, other = (_walked(kind, options, marked, sign) for sign in (1.0, 1.0, -1.0))
    except Exception:  # what fails so fails in its step, with its own line
        return False
    return torch.equal(one, again) and not torch.equal(one, other)


def _walked(
    kind: type[torch.optim.Optimizer], options: Mapping[str, Any], marked: bool, sign: float
) -> Tensor:
    """Return where each of some steps from given weights arrives, after others from W or −W."""
    first = sign * torch.linspace(1.0, 2.0, 12, device="cpu").view(4, 3)
    then = torch.linspace(-2.0, 1.5, 12, device="cpu").view(4, 3)
    weight = nn.Parameter(first.clone())
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002  # an optimizer's own draws, whatever it draws from
    optimizer = kind(in_groups([weight], marked), **options)
    found = []
    for step in range(2 * _STEPS):
        with torch.no_grad():
            weight.copy_(first if step < _STEPS else then)
        weight.grad = (torch.linspace(-1.0, 1.0, 12, device="cpu").view(4, 3) * (step + 1)).sin()
        optimizer.step()
        found.append(weight.detach().clone())
    return torch.stack(found[_STEPS:])


def _can_be_made(
    kind: type[torch.optim.Optimizer], options: Mapping[str, Any], marked: bool
) -> bool:
    weight = nn.Parameter(torch.ones(4, 3, device="cpu"))
    with _on_trial():
        try:
            kind(in_groups([weight], marked), **options)
        except Exception:
            return False
    return True


def steps_on(
    kind: type[torch.optim.Optimizer], options: Mapping[str, Any], marked: bool, axes: int
) -> bool:
    """Return whether a step goes through on a small parameter of so many axes.

    A class that takes matrices alone may say so there only.
    """
    shape = (4, 3, *[2] * axes)[:axes]
    small = nn.Parameter(torch.linspace(1.0, 2.0, math.prod(shape), device="cpu").view(shape))
    small.grad = small.detach().sin()
    with _on_trial():
        try:
            kind(in_groups([small], marked), **options).step()
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
