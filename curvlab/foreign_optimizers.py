"""Optimizers of torch and of other packages as algorithms: ``torch:AdamW``, ``module:Class``.

`foreign` makes one with options of its own. They become entries beside `ALGORITHMS`, and whatever
takes an algorithm's name takes theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor, nn

from curvlab.algorithm_entry import Algorithm, Constants, WholeVector
from curvlab.algorithm_table import ALGORITHMS
from curvlab.curvature.base import Curvature
from curvlab.curvature.overall_damping import fixed
from curvlab.curvature.settings import CurvatureSettings
from curvlab.curvature.shadow import Shadow, Shadowed
from curvlab.errors import CurvlabError, real, shown, some_of, unknown
from curvlab.foreign_kinds import (
    MARK,
    check_follows,
    check_kinds,
    constructor_options,
    in_groups,
    is_marked,
    one_line,
    refused_options,
    steps_on,
)
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
        mark: of groups (`foreign_kinds.MARK`), of which alone it is made; None: of parameters.
    """

    kind: type[torch.optim.Optimizer] = field(kw_only=True)
    title: str = field(kw_only=True)
    mark: bool | None = field(default=None, kw_only=True)

    def defaults(self) -> dict[str, Any]:
        """Return {option of its constructor: its value where a user gives none}."""
        found = {
            name: None if p.default is p.empty else p.default
            for name, p in constructor_options(self.kind).items()
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

        It is asked about each by itself, on the device "meta", and by a step on a small one of as
        many axes. In marked groups are those with two axes or more.
        """
        options = {k: v for k, v in options.items() if k not in OWN}
        check_kinds(self.kind, self.title, options)
        taken, left, axes = list[str](), list[str](), dict[int, bool]()
        for name, p in objective.parameters.items():
            empty = nn.Parameter(torch.empty_like(p, device="meta"))
            try:
                self.kind(in_groups([empty], self.mark), **options)
            except (ValueError, NotImplementedError, RuntimeError):
                left.append(name)
            except TypeError as error:
                raise refused_options(self.title, error) from error
            else:
                if p.ndim not in axes:
                    axes[p.ndim] = not (self.mark and p.ndim < 2) and steps_on(
                        self.kind, options, self.mark, p.ndim
                    )
                (taken if axes[p.ndim] else left).append(name)
        if left and not taken:  # the options themselves, it may be
            try:
                small = nn.Parameter(torch.zeros(2, 2, device="cpu"))
                self.kind(in_groups([small], self.mark), **options)
            except Exception as error:
                raise refused_options(self.title, error) from error
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
        if self.mark:
            found["groups"] = f"{MARK}=True"
        if left:
            found |= {"others": options.get("others", SECOND), "others_take": list(left)}
        return found

    def _maker(
        self, options: Mapping[str, Any]
    ) -> Callable[[Sequence[nn.Parameter]], torch.optim.Optimizer]:
        return partial(_made, self, dict(options))


def _made(
    entry: Foreign, options: Mapping[str, Any], parameters: Sequence[nn.Parameter]
) -> torch.optim.Optimizer:
    try:
        return entry.kind(in_groups(parameters, entry.mark), **options)
    except Exception as error:
        raise refused_options(entry.title, error) from error


def _refusal(entry: Foreign, objective: Objective) -> str:
    p = next(iter(objective.parameters.values()))
    try:
        empty = nn.Parameter(torch.empty_like(p, device="meta"))
        entry.kind(in_groups([empty], entry.mark), **entry.options)
    except Exception as error:
        return one_line(error)
    return "they are no matrices" if entry.mark else "its step fails on such"


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
        CurvlabError: no such class; a name that is no text, or that of an algorithm of curvlab's
            own; an optimizer that needs a closure, the graph, or the weights' own history, or has
            no learning rate; options that it refuses.
    """
    if not (isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)):
        raise CurvlabError(f"foreign takes a class of torch.optim.Optimizer, not {shown(kind)}")
    if name is not None and (not isinstance(name, str) or not name.strip()):
        raise CurvlabError(f"the name of an optimizer is a text, not {shown(name)}")
    package = kind.__module__.partition(".")[0]
    inside = ", ".join(f"{key}={value!r}" for key, value in options.items())
    called = name or f"{package}:{kind.__qualname__}" + (f"({inside})" if inside else "")
    if called in ALGORITHMS:
        raise CurvlabError(f"'{called}' is an algorithm of curvlab's own: call it by another name")
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


def rate_of_entry(entry: Foreign, options: Mapping[str, Any]) -> float:
    """Return the learning rate of an optimizer: the user's, or its own default.

    Raises:
        CurvlabError: it has none, or one that is no number above 0.
    """
    default = constructor_options(entry.kind).get("lr")
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
    own = {k: v for k, v in options.items() if k not in OWN}
    mark = True if is_marked(kind, own) else None
    builds = Foreign(Shadow, options=dict(options), kind=kind, title=name, mark=mark)
    lr = rate_of_entry(builds, own)
    check_follows(kind, name, own, mark)
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
