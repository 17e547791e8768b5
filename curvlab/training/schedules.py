"""SCHEDULES: learning rate against the epoch. Each is a torch scheduler; any other of torch's goes by its own name.

The optimizer is a `torch.optim.Optimizer`, so in scripts whatever takes one will do.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, get_type_hints

import torch
from torch.optim import Optimizer, lr_scheduler
from torch.optim.lr_scheduler import LRScheduler

from curvlab.errors import CurvlabError, fitting, unknown

Make = Callable[[Optimizer], LRScheduler]


@dataclass(frozen=True)
class Schedule:
    """`make(optimizer, **options)`; `spans`: it is laid out over the epochs of the run, which are its argument `epochs`."""

    summary: str
    source: str
    make: Callable[..., LRScheduler]
    spans: bool = False

    @property
    def options(self) -> list[str]:
        return [name for name in list(inspect.signature(self.make).parameters)[1:] if name not in ("epochs", "last_epoch")]


def _constant(optimizer: Optimizer) -> LRScheduler:
    return lr_scheduler.ConstantLR(optimizer, factor=1.0, total_iters=0)


def _step(optimizer: Optimizer, every: int = 60, factor: float = 0.1) -> LRScheduler:
    if every < 1 or factor <= 0:
        raise CurvlabError(f"every must be at least 1 and factor above 0, not {every} and {factor:g}")
    return lr_scheduler.StepLR(optimizer, every, factor)


def _cosine(optimizer: Optimizer, epochs: int, least: float = 0.0) -> LRScheduler:
    if least < 0:
        raise CurvlabError(f"least must be 0 or positive, not {least:g}")
    return lr_scheduler.CosineAnnealingLR(optimizer, epochs, least)


SCHEDULES: dict[str, Schedule] = {
    "constant": Schedule("the learning rate as given", "thesis 2.8, 3.7.1, 4.7.1: autoencoders", _constant),
    "step": Schedule("times `factor` every so many epochs", "thesis 3.7.1, 4.7.1: 0.1 every 60 epochs, second order 50", _step),
    "cosine": Schedule("half a cosine down to `least` over all epochs", "Loshchilov and Hutter 2017", _cosine, spans=True),
}

_OF_TORCH = {
    name: kind
    for name, kind in vars(lr_scheduler).items()
    if inspect.isclass(kind) and issubclass(kind, LRScheduler) and kind is not LRScheduler and not name.startswith("_")
}


def find(name: str) -> Schedule:
    """Of SCHEDULES, or of `torch.optim.lr_scheduler`. Raises CurvlabError for an unknown name."""
    if name in SCHEDULES:
        return SCHEDULES[name]
    if name in _OF_TORCH:
        return Schedule(f"torch's {name}", "torch.optim.lr_scheduler", _OF_TORCH[name])
    raise unknown("schedule", name, [*SCHEDULES, *_OF_TORCH])


class _Still(Optimizer):
    """As bare as curvlab's own, and it does not move: for a trial."""

    def step(self, closure: object = None) -> None:  # type: ignore[override]  # torch's returns a loss
        pass


def maker(name: str, epochs: int | None, options: Mapping[str, Any]) -> Make:
    """Optimizer → scheduler.

    Raises:
        CurvlabError: unknown name or option, a value that does not fit, a schedule over all epochs where their number is open.
    """
    schedule = find(name)
    for option in options:
        if option not in schedule.options:
            raise unknown(f"option of schedule {name}", option, schedule.options)
    if schedule.spans and epochs is None:
        raise CurvlabError(f"schedule '{name}' is laid out over all epochs: say how many (epochs)")
    hints = get_type_hints(schedule.make) if name in SCHEDULES else {}
    options = {option: fitting(f"{option} of schedule {name}", v, hints.get(option, Any)) for option, v in options.items()}
    given = options | ({"epochs": epochs} if schedule.spans else {})

    def make(optimizer: Optimizer) -> LRScheduler:
        return schedule.make(optimizer, **given)

    try:
        trial = _Still([torch.nn.Parameter(torch.zeros(1))], {"lr": 1.0})
        scheduler = make(trial)
        trial.step()
        if not isinstance(scheduler, lr_scheduler.ReduceLROnPlateau):
            scheduler.step()
    except (TypeError, ValueError, ZeroDivisionError, AttributeError) as error:
        raise CurvlabError(f"schedule '{name}': {' '.join(str(error).split())}") from error
    return make
