"""SCHEDULES: learning rate against the epoch, each a torch scheduler.

Any other of torch's goes by its own name. The optimizer is a `torch.optim.Optimizer`, so in scripts
whatever takes one will do.
"""

from __future__ import annotations

import inspect
import math
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, get_type_hints

import torch
from torch.optim import Optimizer, lr_scheduler
from torch.optim.lr_scheduler import LRScheduler

from curvlab.errors import CurvlabError, fitting, real, shown, unknown, whole
from curvlab.groups import OPTIONS

Make = Callable[[Optimizer], LRScheduler]


@dataclass(frozen=True)
class Schedule:
    """A schedule by name, made by `make(optimizer, **options)`.

    `spans`: it is laid out over the epochs of the run, which are its argument `epochs`.
    """

    summary: str
    source: str
    make: Callable[..., LRScheduler]
    spans: bool = False

    @property
    def options(self) -> list[str]:
        """Names of the options that `make` takes from the user, with a default or without."""
        return [p.name for p in self._parameters]

    @property
    def required(self) -> list[str]:
        """Options that have no default."""
        return [p.name for p in self._parameters if p.default is p.empty]

    @property
    def _parameters(self) -> list[inspect.Parameter]:
        own = ("optimizer", "last_epoch", "verbose", *(["epochs"] if self.spans else []))
        return [p for p in inspect.signature(self.make).parameters.values() if p.name not in own]


def _constant(optimizer: Optimizer) -> LRScheduler:
    return lr_scheduler.ConstantLR(optimizer, factor=1.0, total_iters=0)


def _step(optimizer: Optimizer, every: int = 60, factor: float = 0.1) -> LRScheduler:
    if every < 1 or factor <= 0:
        raise CurvlabError(
            f"every must be at least 1 and factor above 0, not {every} and {factor:g}"
        )
    return lr_scheduler.StepLR(optimizer, every, factor)


def _cosine(optimizer: Optimizer, epochs: int, least: float = 0.0) -> LRScheduler:
    if least < 0:
        raise CurvlabError(f"least must be 0 or positive, not {least:g}")
    return lr_scheduler.CosineAnnealingLR(optimizer, epochs, least)


def _power(optimizer: Optimizer, exponent: float = 0.75) -> LRScheduler:
    # the theorems take any exponent between ½ and 1 and name none: the middle is curvlab's
    if exponent < 0:
        raise CurvlabError(f"exponent must be 0 or positive, not {exponent:g}")
    return lr_scheduler.LambdaLR(optimizer, lambda turn: float(turn + 1) ** -exponent)


SCHEDULES: dict[str, Schedule] = {
    "constant": Schedule(
        "the learning rate as given", "thesis 2.8, 3.7.1, 4.7.1: autoencoders", _constant
    ),
    "step": Schedule(
        "times `factor` every so many epochs",
        "thesis 3.7.1, 4.7.1: 0.1 every 60 epochs, second order 50",
        _step,
    ),
    "cosine": Schedule(
        "half a cosine down to `least` over all epochs",
        "Loshchilov and Hutter 2017",
        _cosine,
        spans=True,
    ),
    "power": Schedule(
        "over k^`exponent` at the k-th turn, from 1: of a proof, every step and above ½, below 1",
        "thesis Theorems 2, 4; 2021 Theorem 1; the default 0.75 is curvlab's",
        _power,
    ),
}

_OF_TORCH = {
    name: kind
    for name, kind in vars(lr_scheduler).items()
    if inspect.isclass(kind)
    and issubclass(kind, LRScheduler)
    and kind is not LRScheduler
    and not name.startswith("_")
}


def find_schedule(name: str) -> Schedule:
    """Return the schedule of SCHEDULES, or of `torch.optim.lr_scheduler`, by its name.

    Raises:
        CurvlabError: an unknown name.
    """
    if isinstance(name, str) and name in SCHEDULES:
        return SCHEDULES[name]
    if isinstance(name, str) and name in _OF_TORCH:
        return Schedule(f"torch's {name}", "torch.optim.lr_scheduler", _OF_TORCH[name])
    raise unknown("schedule", name, known())


def known() -> list[str]:
    """Return the names of all schedules."""
    return [*SCHEDULES, *_OF_TORCH]


class _Still(Optimizer):
    """An optimizer that does not move, for a trial; its groups have curvlab's options."""

    def step(self, closure: object = None) -> None:  # type: ignore[override]  # torch's returns a loss
        pass


_WHOLE = {"patience": 0, "cooldown": 0, "total_iters": 0} | dict.fromkeys(
    (
        "step_size",
        "T_max",
        "T_0",
        "T_mult",
        "step_size_up",
        "step_size_down",
        "total_steps",
        "epochs",
        "steps_per_epoch",
    ),
    1,
)
"""{option of torch's: the least whole number that it takes}"""

_Range = tuple[str, Callable[[float], bool]]
_POSITIVE: _Range = ("0 or positive", lambda v: v >= 0)
_ABOVE: _Range = ("above 0", lambda v: v > 0)
_BELOW_1: _Range = ("at least 0 and below 1", lambda v: 0 <= v < 1)
_REAL: dict[str, _Range] = (
    dict.fromkeys(
        ("gamma", "factor", "power", "eta_min", "min_lr", "eps", "threshold", "base_lr", "max_lr"),
        _POSITIVE,
    )
    | dict.fromkeys(("start_factor", "end_factor", "div_factor", "final_div_factor"), _ABOVE)
    | dict.fromkeys(("base_momentum", "max_momentum"), _BELOW_1)
    | {"pct_start": ("between 0 and 1", lambda v: 0 <= v <= 1)}
)
"""{option of torch's: (what it is, whether a number is so)}"""

_BY_GROUP = ("min_lr", "base_lr", "max_lr", "base_momentum", "max_momentum")
"""Options of which torch takes a list too, a number for each group of parameters."""

_OBJECTS = ("lr_lambda", "scale_fn", "schedulers")
"""Functions and schedulers, which no checkpoint holds."""

TRIAL = 1000
"""Steps of the trial at most."""


def maker(
    name: str, epochs: int | None, options: Mapping[str, Any], turns: int | None = None
) -> Make:
    """Return a function optimizer → scheduler.

    It is the one place where a schedule is made of its options: they are checked, and it is tried
    out.

    Args:
        name: of `find_schedule`.
        epochs: of the run; None where their number is open.
        options: the schedule's own.
        turns: how often the run steps the scheduler; None where that is open.

    Raises:
        CurvlabError: unknown name or option, a value that does not fit, a schedule over all epochs
            where their number is open, one that ends before the run does, or that leads to a rate
            or a momentum that is none.
    """
    schedule = find_schedule(name)
    for option in options:
        if option not in schedule.options:
            raise unknown(f"option of schedule {name}", option, schedule.options or ["none"])
    needed = [option for option in _OBJECTS if option in schedule.required or option in options]
    if needed:
        raise CurvlabError(
            f"schedule '{name}' is made with objects ({needed[0]}), which have no name: give a"
            " function optimizer → scheduler as `schedule` of curvlab.train"
        )
    if schedule.spans and epochs is None:
        raise CurvlabError(f"schedule '{name}' is laid out over all epochs: say how many (epochs)")
    missing = [option for option in schedule.required if option not in options]
    if missing:
        raise CurvlabError(
            f"schedule '{name}': {', '.join(missing)} must be given: it has"
            f" {', '.join(schedule.options)}"
        )
    given = {option: _fitted(schedule, name, option, value) for option, value in options.items()}
    given |= {"epochs": epochs} if schedule.spans else {}

    def make(optimizer: Optimizer) -> LRScheduler:
        return schedule.make(optimizer, **given)

    try:
        _try(make, name, turns)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise CurvlabError(f"schedule '{name}': {' '.join(str(error).split())}") from error
    return make


def end(scheduler: LRScheduler) -> int | None:
    """Return after how many steps a scheduler has no further one; None: it goes on for ever."""
    total: int | None = getattr(scheduler, "total_steps", None)
    return total


def _fitted(schedule: Schedule, name: str, option: str, value: Any) -> Any:
    """Return the value of an option, checked by its own range, or else by its annotation."""
    what = f"{option} of schedule {name}"
    parameter = inspect.signature(schedule.make).parameters[option]
    if value is None and parameter.default is None:
        return None
    if name in SCHEDULES:
        return fitting(what, value, get_type_hints(schedule.make)[option])
    if option == "milestones":
        if isinstance(value, str | bytes) or not isinstance(value, Iterable):
            raise CurvlabError(f"{what} must be whole numbers, as 30,60, not {shown(value)}")
        return [whole(what, each, 0) for each in value]
    if option in _BY_GROUP and isinstance(value, list | tuple):
        return [real(what, each, *_REAL[option]) for each in value]
    if option in _WHOLE:
        return whole(what, value, _WHOLE[option])
    if option in _REAL:
        return real(what, value, *_REAL[option])
    return fitting(what, value, _hint(schedule.make, parameter))


def _hint(make: Any, parameter: inspect.Parameter) -> Any:
    """Return torch's annotation of an option, or where it has none the type of its default."""
    alone = SimpleNamespace(__annotations__={"it": parameter.annotation})
    try:
        if parameter.annotation is not parameter.empty:
            return get_type_hints(alone, vars(sys.modules[make.__module__]))["it"]
    except (NameError, TypeError):  # of a name that torch imports for type checkers alone
        pass
    return (
        type(parameter.default) if isinstance(parameter.default, bool | int | float | str) else Any
    )


def _try(make: Make, name: str, turns: int | None) -> None:
    """Step a schedule on an optimizer that has what ours have.

    Raises:
        CurvlabError: a rate or momentum leaves its range, or the schedule ends before the run.
    """
    trial = _Still([torch.nn.Parameter(torch.zeros(1, device="cpu"))], dict.fromkeys(OPTIONS, 0.5))
    scheduler = make(trial)
    last = end(scheduler)
    if last is not None and turns is not None and turns > last:
        raise CurvlabError(
            f"it ends after {last} steps, and the run takes {turns}: give a longer schedule or a"
            " shorter run"
        )
    trial.step()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(min(n for n in (turns, last, TRIAL) if n is not None)):
            if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau):
                scheduler.step(1.0)
            else:
                scheduler.step()
            lr, momentum = (float(trial.param_groups[0][key]) for key in ("lr", "momentum"))
            if not (0 <= lr < math.inf and 0 <= momentum < 1):
                raise CurvlabError(
                    f"it leads to the learning rate {lr:g} at the momentum {momentum:g}: choose"
                    " other options"
                )
