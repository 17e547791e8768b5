"""Optimizers of torch and of other packages as algorithms: ``torch:AdamW``, ``module:Class``.

`foreign` makes one with options of its own. They become entries beside `ALGORITHMS`, and whatever
takes an algorithm's name takes theirs.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor, nn

from curvlab.algorithm_entry import Algorithm, Constants, WholeVector
from curvlab.curvature.base import Curvature
from curvlab.curvature.overall_damping import fixed
from curvlab.curvature.settings import CurvatureSettings
from curvlab.curvature.shadow import Shadow, Shadowed
from curvlab.errors import CurvlabError, real, shown, some_of, unknown
from curvlab.objective import Objective
from curvlab.own_models import module_of

FOREIGN: dict[str, Algorithm] = {}
"""Entries of optimizers that were asked for in this process, by name."""

SECOND = "torch:AdamW"
"""The optimizer of parameters that another does not take, where the user names none."""

OWN = ("others", "others_lr")
"""Options beside the optimizer's own: who takes the parameters that it does not, and its rate."""


@dataclass(frozen=True)
class Foreign(WholeVector):
    """A method that is an optimizer of somebody else's.

    Args:
        kind: its class.
        title: its name.
    """

    kind: type[torch.optim.Optimizer] = field(kw_only=True)
    title: str = field(kw_only=True)

    def defaults(self) -> dict[str, Any]:
        """Return {option of its constructor: its value where a user gives none}."""
        found = {
            name: None if p.default is p.empty else p.default
            for name, p in _options(self.kind).items()
        }
        return found | {"others": SECOND, "others_lr": None} | dict(self.options)

    def hints(self) -> dict[str, Any]:
        """Return {}: the optimizer itself says what does not fit."""
        return {}

    def curvature(
        self,
        objective: Objective,
        settings: CurvatureSettings,
        decay: float | None,
        own: Mapping[str, Any],
    ) -> Curvature:
        """Make the shadow of an objective's parameters.

        Raises:
            CurvlabError: options that the optimizer refuses, no parameter that it takes.
        """
        options = {**self.options, **own}
        second = options.pop("others", SECOND)
        rate = options.pop("others_lr", None)
        taken, left = self.split(objective, options)
        if not taken:
            raise CurvlabError(
                f"{self.title} takes none of the model's parameters ({_refusal(self, objective)})"
            )
        parts = [Shadowed(self._maker(options), taken, rate_of_entry(self, options))]
        if left:
            entry = foreign_algorithm(second)
            assert isinstance(entry.builds, Foreign)
            if rate is not None:
                real("others_lr", rate)
            lr = entry.lr if rate is None else float(rate)
            others = {**entry.builds.options, "lr": lr}
            if len(entry.builds.split(objective, others)[1]):
                raise CurvlabError(
                    f"{second} does not take all that {self.title} leaves: name another by others=…"
                )
            parts.append(Shadowed(entry.builds._maker(others), left, lr))
            names = some_of(left, 4)
            objective.say(f"{self.title} does not take {names}: {second} does, at a rate of {lr:g}")
        return Shadow(objective, parts, settings.name or self.title)

    def split(
        self, objective: Objective, options: Mapping[str, Any]
    ) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Return names of the parameters that the optimizer takes, and of those that it does not.

        It is asked about each by itself, on the device "meta".
        """
        options = {k: v for k, v in options.items() if k not in OWN}
        _check_kinds(self.kind, self.title, options)
        taken, left = [], []
        for name, p in objective.parameters.items():
            empty = nn.Parameter(torch.empty_like(p, device="meta"))
            try:
                self.kind([empty], **options)
            except (ValueError, NotImplementedError, RuntimeError):
                left.append(name)
            except TypeError as error:
                raise CurvlabError(f"options of {self.title}: {_line(error)}") from error
            else:
                taken.append(name)
        if left and not taken:  # the options themselves, it may be
            try:
                self.kind([nn.Parameter(torch.zeros(2, 2, device="cpu"))], **options)
            except Exception as error:
                raise CurvlabError(f"options of {self.title}: {_line(error)}") from error
        return tuple(taken), tuple(left)

    def about(self, objective: Objective, own: Mapping[str, Any]) -> dict[str, Any]:
        """Return what a log says of it: class, source, options, and whose parameters it takes."""
        options = {**self.options, **own}
        taken, left = self.split(objective, options)
        found: dict[str, Any] = {
            "class": f"{self.kind.__module__}.{self.kind.__qualname__}",
            "source": _source(self.kind),
            "options": {k: repr(v) for k, v in options.items() if k not in OWN},
            "takes": list(taken),
        }
        if left:
            found |= {"others": options.get("others", SECOND), "others_take": list(left)}
        return found

    def _maker(
        self, options: Mapping[str, Any]
    ) -> Callable[[Sequence[nn.Parameter]], torch.optim.Optimizer]:
        return partial(_made, self.kind, dict(options), self.title)


def _made(
    kind: type[torch.optim.Optimizer],
    options: Mapping[str, Any],
    title: str,
    parameters: Sequence[nn.Parameter],
) -> torch.optim.Optimizer:
    try:
        return kind(list(parameters), **options)
    except Exception as error:
        raise CurvlabError(f"options of {title}: {_line(error)}") from error


def _refusal(entry: Foreign, objective: Objective) -> str:
    p = next(iter(objective.parameters.values()))
    try:
        entry.kind([nn.Parameter(torch.empty_like(p, device="meta"))], **entry.options)
    except Exception as error:
        return _line(error)
    return "no reason given"


def foreign(kind: type[torch.optim.Optimizer], *, name: str | None = None, **options: Any) -> str:
    """Enter an optimizer of somebody else's with options of its own, and return its name.

    The name serves wherever an algorithm's does: in `compare` as a member or the reference, in
    `train`, `optimizer`, on figures.

    >>> import torch
    >>> import curvlab as cl
    >>> cl.foreign(torch.optim.SGD, lr=0.1, momentum=0.9)
    'torch:SGD(lr=0.1, momentum=0.9)'

    Args:
        kind: a class of `torch.optim.Optimizer`.
        name: to call it by; where None, its package, class and options.
        options: of its constructor; `others` and `others_lr` say which optimizer takes the
            parameters that it does not (Muon: all but matrices), AdamW by default, and its rate.

    Raises:
        CurvlabError: no such class; an optimizer that needs a closure, the graph, or the weights'
            own history; options that it refuses.
    """
    if not (isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)):
        raise CurvlabError(f"foreign takes a class of torch.optim.Optimizer, not {shown(kind)}")
    package = kind.__module__.partition(".")[0]
    inside = ", ".join(f"{key}={value!r}" for key, value in options.items())
    called = name or f"{package}:{kind.__qualname__}" + (f"({inside})" if inside else "")
    FOREIGN[called] = _entry(kind, called, options)
    return called


def foreign_algorithm(name: str) -> Algorithm:
    """Return the entry of an optimizer by name: one that was entered, or ``module:Class``.

    ``torch`` stands for `torch.optim`. The working directory is searched too.

    Raises:
        CurvlabError: no such module or class, or one that cannot be followed (`foreign`).
    """
    if name not in FOREIGN:
        FOREIGN[name] = _entry(_imported(name), name, {})
    return FOREIGN[name]


def _imported(name: str) -> type[torch.optim.Optimizer]:
    place, _, attribute = name.partition(":")
    place = "torch.optim" if place == "torch" else place
    module = module_of(place, f"optimizer '{name}'")
    found = getattr(module, attribute, None)
    if not (isinstance(found, type) and issubclass(found, torch.optim.Optimizer)):
        known = sorted(
            each
            for each, value in vars(module).items()
            if isinstance(value, type)
            and issubclass(value, torch.optim.Optimizer)
            and value is not torch.optim.Optimizer
        )
        raise unknown(f"optimizer of {place}", attribute, known or ["none"])
    return found


def _options(kind: type[torch.optim.Optimizer]) -> dict[str, inspect.Parameter]:
    """Return the parameters of its constructor beside the model's, by name."""
    found = list(inspect.signature(kind.__init__).parameters.values())[2:]
    return {p.name: p for p in found if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}


def rate_of_entry(entry: Foreign, options: Mapping[str, Any]) -> float:
    """Return the learning rate of an optimizer: the user's, or its own default.

    Raises:
        CurvlabError: it has none, or one that is no number above 0.
    """
    default = _options(entry.kind).get("lr")
    lr = options.get("lr", None if default is None else default.default)
    if isinstance(lr, Tensor):
        lr = float(lr)
    if lr is None or isinstance(lr, type) or not isinstance(lr, int | float):
        raise CurvlabError(
            f"{entry.title} has no learning rate of its own: give one, by"
            f" curvlab.foreign({entry.kind.__name__}, lr=…)"
        )
    return real(f"lr of {entry.title}", lr, "above 0, and finite", lambda v: v > 0)


def _entry(kind: type[torch.optim.Optimizer], name: str, options: Mapping[str, Any]) -> Algorithm:
    given = {k: v for k, v in options.items() if k not in OWN}
    builds = Foreign(Shadow, options=dict(options), kind=kind, title=name)
    lr = rate_of_entry(builds, given)
    _try(kind, name, {**given})
    return Algorithm(
        summary=f"{kind.__module__}.{kind.__qualname__}: direction of its own step",
        source=_source(kind),
        builds=builds,
        labels="data",
        constants=Constants(lr=lr, damping=0.0, momentum=0.0),
        overall=fixed(0.0),
    )


def _source(kind: type[torch.optim.Optimizer]) -> str:
    """Return the package and its version; the module where there is no package."""
    package = kind.__module__.partition(".")[0]
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:
        return kind.__module__


def _check_kinds(kind: type[torch.optim.Optimizer], title: str, options: Mapping[str, Any]) -> None:
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


def _try(kind: type[torch.optim.Optimizer], name: str, options: Mapping[str, Any]) -> None:
    """Raise CurvlabError for an optimizer that cannot follow another's weights, with the reason."""
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
    _check_kinds(kind, name, options)
    weight = nn.Parameter(torch.linspace(1.0, 2.0, 12, device="cpu").view(4, 3))
    before = weight.detach().clone()
    try:
        optimizer = kind([weight], **options)
    except Exception as error:
        raise CurvlabError(f"options of {name}: {_line(error)}") from error
    weight.grad = torch.linspace(-1.0, 1.0, 12, device="cpu").view(4, 3).sin()
    try:
        optimizer.step()
    except Exception as error:
        line = _line(error)
        graph = any(word in line for word in ("graph", "grad_fn", "does not require grad"))
        why = "needs the graph of the loss" if graph else "fails on a plain gradient"
        raise CurvlabError(f"{name} {why}, which a follower does not have: {line}") from error
    for key, value in optimizer.state[weight].items():
        if isinstance(value, Tensor) and value.shape == before.shape and torch.equal(value, before):
            raise CurvlabError(
                f"{name} keeps the weights' own history (its state '{key}'): it cannot follow"
                " another's weights"
            )


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
