"""Settings of a training run: what it is asked to do, when it ends, and how far it is."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal, get_args

from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from curvlab.algorithms import check_labels, check_rates, find_algorithm, optimizer
from curvlab.errors import MOST_STEPS, CurvlabError, fitting, real, shown, unknown, whole
from curvlab.groups import check_weight_decay
from curvlab.objective import Objective
from curvlab.observation import Pass
from curvlab.optim import MomentumKind, Optimizer
from curvlab.training import schedules

Every = Literal["epoch", "step"]


def check_same(kept: Mapping[str, Any], mine: Mapping[str, Any]) -> None:
    """Raise CurvlabError, which names them, where settings of a checkpoint are not `mine`."""
    differing = [k for k in {**kept, **mine} if kept.get(k) != mine.get(k)]
    if differing:
        said = ", ".join(f"{k} {kept.get(k)}, not {mine.get(k)}" for k in differing)
        raise CurvlabError(
            f"the checkpoint is of other settings ({said}): give the same, or start again in"
            " another folder"
        )


@dataclass(frozen=True)
class MethodSettings:
    """The algorithm and its constants; where one is None, the algorithm's document decides it.

    `own` are the method's own options (`ALGORITHMS[name].options`). `double_grad`: see
    `optim.Descent`.
    """

    algorithm: str = "adam"
    lr: float | None = None
    damping: float | None = None
    momentum: float | None = None
    momentum_kind: MomentumKind | None = None
    weight_decay: float | None = None
    decay: float | None = None
    labels: Pass | None = None
    update_every: int | None = None
    refresh_every: int | None = None
    own: Mapping[str, Any] = field(default_factory=dict)
    double_grad: bool = False

    def check(self) -> None:
        """Check names and ranges, before anything is built.

        Raises:
            CurvlabError: an unknown name or a value out of range.
        """
        find_algorithm(self.algorithm).checked(self.own, self.algorithm)
        check_labels(self.labels)
        fitting("double_grad", self.double_grad, bool)
        for name in ("update_every", "refresh_every"):
            value = getattr(self, name)
            if value is not None:
                whole(name, value)
        check_rates(self.lr, self.damping, self.momentum, self.decay)
        if self.weight_decay is not None:
            check_weight_decay(self.weight_decay)

    def optimizer(self, objective: Objective) -> Optimizer:
        """Build the optimizer of `objective`.

        Raises:
            CurvlabError: `own` does not fit.
        """
        names = (
            "damping",
            "momentum",
            "momentum_kind",
            "decay",
            "labels",
            "weight_decay",
            "update_every",
            "refresh_every",
            "double_grad",
        )
        shared = {name: getattr(self, name) for name in names}
        try:
            return optimizer(self.algorithm, objective, self.lr, **shared, **self.own)
        except (TypeError, AttributeError) as error:
            if not self.own:
                raise
            raise CurvlabError(
                f"options of {self.algorithm} ({dict(self.own)}): {' '.join(str(error).split())}"
            ) from error

    def given(self) -> dict[str, Any]:
        """Return the options that an optimizer of somebody else's is made with."""
        shared = {"momentum": self.momentum, "weight_decay": self.weight_decay or None}
        return dict(self.own) | {name: v for name, v in shared.items() if v is not None}

    def plain(self) -> dict[str, Any]:
        """Return the settings as plain values, the document's in the place of None."""
        table = find_algorithm(self.algorithm).read(self.own.get("reading"))
        known: dict[str, Any] = {"own": dict(self.own)}
        for name in (
            "lr",
            "damping",
            "momentum",
            "momentum_kind",
            "decay",
            "labels",
            "weight_decay",
            "update_every",
            "refresh_every",
        ):
            value = getattr(self, name)
            known[name] = getattr(table, name) if value is None else value
        return asdict(replace(self, **known))


@dataclass(frozen=True)
class ScheduleSettings:
    """The schedule of the learning rate.

    `schedule` is a name (`schedules.find_schedule`) with its options, or a function optimizer →
    torch scheduler, stepped after every epoch or step.
    """

    schedule: str | schedules.Make = "constant"
    schedule_every: Every = "epoch"
    schedule_options: Mapping[str, Any] = field(default_factory=dict)

    def check(self) -> None:
        """Check the options' kind, and what the schedule counts.

        Raises:
            CurvlabError: options that are no mapping, or an unknown `schedule_every`.
        """
        if not isinstance(self.schedule_options, Mapping):
            raise CurvlabError(
                f"schedule_options must be {{name: value}}, not {shown(self.schedule_options)}"
            )
        if self.schedule_every not in get_args(Every):
            raise unknown("schedule_every", self.schedule_every, get_args(Every))

    def scheduler(
        self, stepper: Optimizer, budget: Budget, per_epoch: int | None = None
    ) -> LRScheduler:
        """Build the scheduler of an optimizer.

        Args:
            stepper: the optimizer.
            budget: of the run.
            per_epoch: minibatches of an epoch, where that is known.

        Raises:
            CurvlabError: the schedule does not fit, or ends before the run does.
        """
        if isinstance(self.schedule, str):
            turns = (
                budget.most_steps(per_epoch)
                if self.schedule_every == "step"
                else budget.most_epochs(per_epoch)
            )
            made = schedules.maker(self.schedule, budget.epochs, self.schedule_options, turns)(
                stepper
            )
        else:
            made = self.schedule(stepper)
        if not (
            callable(getattr(made, "step", None)) and callable(getattr(made, "state_dict", None))
        ):
            raise CurvlabError(
                "the schedule's function must return a scheduler of the optimizer, not"
                f" {type(made).__name__}"
            )
        if self.schedule_every == "step" and isinstance(made, ReduceLROnPlateau):
            raise CurvlabError(
                "ReduceLROnPlateau reads the loss, which is evaluated once an epoch: use"
                " schedule_every='epoch'"
            )
        return made

    def spans(self) -> bool:
        """Return whether the number of epochs decides the learning rates.

        Then it cannot change later.
        """
        return isinstance(self.schedule, str) and schedules.find_schedule(self.schedule).spans

    def plain(self) -> dict[str, Any]:
        """Return the settings as plain values; a function by its name."""
        return {
            "schedule": (
                self.schedule
                if isinstance(self.schedule, str)
                else getattr(self.schedule, "__qualname__", "own")
            ),
            "schedule_every": self.schedule_every,
            "schedule_options": copy.deepcopy(dict(self.schedule_options)),
        }


@dataclass(frozen=True)
class EvaluationSettings:
    """The epochs between evaluations, and the training examples that one is over; None: all."""

    evaluate_every: int = 1
    evaluate_samples: int | None = None

    def check(self) -> None:
        """Check the numbers.

        Raises:
            CurvlabError: one is out of range.
        """
        for name in ("evaluate_every", "evaluate_samples"):
            value = getattr(self, name)
            if value is not None:
                whole(name, value)


PARTS = (MethodSettings, ScheduleSettings, EvaluationSettings)
"""The parts of `Settings`. An option of a run is a field of one of these, and names are unique."""


@dataclass(frozen=True)
class Settings:
    """The settings that decide the weights, and what is evaluated.

    A run goes on with the same settings only. Checkpoints and logs keep them as one mapping
    (`plain`), by the names of the parts' fields.
    """

    method: MethodSettings = MethodSettings()
    scheduling: ScheduleSettings = ScheduleSettings()
    evaluation: EvaluationSettings = EvaluationSettings()

    @staticmethod
    def names() -> list[str]:
        """Return the options of a run: the fields of all parts."""
        return [field.name for kind in PARTS for field in fields(kind)]

    @classmethod
    def of(cls, **options: Any) -> Settings:
        """Make settings of options that are fields of the parts.

        Raises:
            TypeError: an option that no part has.
        """
        of_parts: list[dict[str, Any]] = [{} for _ in PARTS]
        for name, value in options.items():
            of_parts[_part_of(name)][name] = value
        method, scheduling, evaluation = of_parts
        return cls(
            MethodSettings(**method),
            ScheduleSettings(**scheduling),
            EvaluationSettings(**evaluation),
        )

    def check(self) -> None:
        """Check names and ranges, before anything is built.

        Raises:
            CurvlabError: an unknown name or a value out of range.
        """
        self.method.check()
        self.scheduling.check()
        self.evaluation.check()

    def plain(self) -> dict[str, Any]:
        """Return the settings of all parts as one mapping of plain values.

        The document's values stand in the place of None; the order is that of logs.
        """
        found = self.method.plain() | self.scheduling.plain() | asdict(self.evaluation)
        last = {"double_grad": found.pop("double_grad")}
        return found | last


def _part_of(name: str) -> int:
    for i, kind in enumerate(PARTS):
        if name in {field.name for field in fields(kind)}:
            return i
    raise TypeError(f"'{name}' is no setting of a run")


@dataclass(frozen=True)
class Budget:
    """The end of a run: whichever of its limits comes first.

    `seconds` are of training, without evaluation and warm start.
    """

    epochs: int | None = None
    steps: int | None = None
    seconds: float | None = None

    def check(self) -> None:
        """Check the limits.

        Raises:
            CurvlabError: a number is out of range, or there is no end at all.
        """
        for name in ("epochs", "steps"):
            value = getattr(self, name)
            if value is not None:
                whole(name, value, 1, MOST_STEPS)
        if self.seconds is not None:
            real("seconds", self.seconds, "above 0, and finite", lambda v: v > 0)
        if self == Budget():
            raise CurvlabError("the run needs an end: give epochs, steps or seconds")

    def most_steps(self, per_epoch: int | None) -> int | None:
        """Return the steps after which the run ends at the latest; None where that is not known."""
        known = (
            self.steps,
            self.epochs * per_epoch if self.epochs is not None and per_epoch is not None else None,
        )
        return min((n for n in known if n is not None), default=None)

    def most_epochs(self, per_epoch: int | None) -> int | None:
        """Return the epochs that are begun at most; None where that is not known."""
        known = (
            self.epochs,
            -(-self.steps // per_epoch) if self.steps is not None and per_epoch else None,
        )
        return min((n for n in known if n is not None), default=None)


@dataclass
class Position:
    """The place that a run has reached.

    `epoch` epochs are finished, and `step` steps of the next one; `steps` in all. Times are in
    seconds.
    """

    started: bool = False
    epoch: int = 0
    step: int = 0
    steps: int = 0
    wall: float = 0.0
    cpu: float = 0.0
    evaluation: float = 0.0
    warm: float = 0.0
    probes: float = 0.0
