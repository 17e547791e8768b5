"""Costs of a step: seconds, memory and the loss over a first epoch, of networks too large to train.

An epoch of few minibatches has its updates and refreshes at its first step, which is not counted;
so both are timed by themselves, and `long_run` spreads them over T₁ and T₂ steps.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]  # not exported by name

from curvlab.algorithms import ALGORITHMS, optimizer
from curvlab.curvature.settings import Cadence
from curvlab.errors import CurvlabError, Diverged
from curvlab.machine import clock_of
from curvlab.optim import Batch, Optimizer
from curvlab.reproduction.comparison import Comparison
from curvlab.reproduction.methods import Method
from curvlab.reproduction.problem_runs import ProblemRuns
from curvlab.reproduction.script import Options
from curvlab.system.atomic import rewrite
from curvlab.system.memory import tensors
from curvlab.training.evaluation import evaluate


@dataclass
class StepCost:
    """What a first epoch of one method costs and gives; NaN where it was not measured.

    `epoch` are seconds a step but for the first, `long_run` those over T₁ and T₂ steps, `steps` how
    many were taken; `held` bytes of the curvature between steps, `times` over the parameters';
    `before` and `after` the training loss in eval mode, `first` and `last` that of minibatches,
    before their steps; `why` what went wrong.
    """

    epoch: float = math.nan
    long_run: float = math.nan
    steps: int = 0
    held: int = 0
    times: float = math.nan
    before: float = math.nan
    after: float = math.nan
    first: float = math.nan
    last: float = math.nan
    why: str = ""


class StepCosts:
    """Costs of the methods of a comparison on one problem, with one objective for all.

    A network's first look, in which the ways of its blocks are proven, takes longer than many
    steps. Seconds are the process's; on a GPU wall seconds.

    Args:
        comparison: its methods, minibatches and extents.
        problem: of PROBLEMS.
        options: what the user chose; runs are kept in their folder, but of a smoke run.
    """

    def __init__(self, comparison: Comparison, problem: str, options: Options) -> None:
        self.of, self.problem = comparison, problem
        self.runs = ProblemRuns(comparison, problem, options)
        self.smoke, device = options.smoke, options.where
        self._clock = time.process_time if device.type == "cpu" else clock_of(device)
        self._start: dict[str, Tensor] = {}

    def of_method(self, method: Method) -> StepCost:
        """Return what is kept of an earlier run; else measure it.

        Raises:
            CurvlabError: data that are not there.
        """
        if self.smoke:
            return self.measured(method)
        arguments, batch = method.arguments(self.problem), method.batch or self.of.batch
        path = self.runs.folder(arguments, batch, 0) / "cost.json"
        if not path.exists():
            text = json.dumps(asdict(self.measured(method)))
            path.parent.mkdir(parents=True, exist_ok=True)
            rewrite(path, lambda aside: aside.write_text(text, encoding="utf-8"))
        return StepCost(**json.loads(path.read_text(encoding="utf-8")))

    def _begin(self) -> None:
        """Put the network, which is built once, and its chance back to the start."""
        if not self._start:
            if self.runs.data is None:
                self._objective, self._examples = self.runs.problem.smoke(0, self.of.l2)
            else:
                self._examples, where = self.runs.data[0], str(self.runs.options.where)
                self._objective = self.runs.problem.objective(self._examples, 0, where, self.of.l2)
            self._start = {k: v.clone() for k, v in self._objective.model.state_dict().items()}
            self._before = self._loss()
        self._objective.model.load_state_dict(self._start)
        self._objective.closures.update(dict.fromkeys(self._objective.closures, 0))

    def _loss(self) -> float:
        most = self.runs.extent.evaluated
        return evaluate(self._objective, self._examples, size=256, most=most)[0]

    def measured(self, method: Method) -> StepCost:
        """Take the steps of an epoch, and time apart what they are too few for.

        Raises:
            CurvlabError: data that are not there.
        """
        self._begin()
        size = 32 if self.smoke else min(method.batch or self.of.batch, len(self._examples))
        batches = self._examples.batches(size, seed=0)
        name, options = _named(method, self.problem)
        found, seconds = StepCost(before=self._before), list[float]()
        try:
            stepper = optimizer(name, self._objective, **options)
            stepper.warm_start(batches.one_pass())
            for batch in batches.epoch(0):
                taken, loss = self._timed(partial(self._step, stepper, batch))
                seconds.append(taken)
                found.last = float(loss)
                found.first = found.last if len(seconds) == 1 else found.first
            found.held, found.times = self._held(stepper)
            stepper.soundness.check()
            found.after = self._loss()
            if not math.isfinite(found.after):
                raise Diverged(f"the training loss is {found.after:g}")
            refresh, _ = self._timed(stepper.descent.curvature.refresh)
            del stepper
            self._begin()
            often = optimizer(name, self._objective, **options | {"update_every": 1})
            batch = next(batches.epoch(0))
            whole, _ = self._timed(partial(self._step, often, batch))
            found.long_run = long_run(seconds, refresh, whole, _cadence(name, options))
        except (CurvlabError, LinAlgError) as error:
            kind = "diverged" if isinstance(error, Diverged | LinAlgError) else "refused"
            found.why = f"{kind} after {len(seconds)} steps: {str(error).splitlines()[0]}"
        found.steps = len(seconds)
        found.epoch = statistics.fmean(seconds[1:]) if seconds[1:] else math.nan
        return found

    def _step(self, stepper: Optimizer, batch: Batch) -> Any:
        return stepper.step(self._objective.closure(batch))

    @property
    def parameters(self) -> int:
        """Return the number of trained parameters."""
        return sum(p.numel() for p in self._objective.parameters.values())

    def _held(self, stepper: Optimizer) -> tuple[int, float]:
        state = stepper.descent.curvature.state_dict()
        held = sum(t.numel() * t.element_size() for t in tensors(state))
        return held, held / (self.parameters * self._objective.dtype.itemsize)

    def _timed(self, work: Callable[[], Any]) -> tuple[float, Any]:
        started = self._clock()
        found = work()
        return self._clock() - started, found


def _named(method: Method, problem: str) -> tuple[str, dict[str, Any]]:
    """Return algorithm and options; no schedule changes a rate within the first epoch."""
    options = method.arguments(problem)
    for name in ("schedule", "schedule_options"):
        options.pop(name, None)
    return options.pop("algorithm"), options


def _cadence(name: str, options: Mapping[str, Any]) -> Cadence:
    own = ALGORITHMS[name].read(options.get("reading"))
    keys = ("update_every", "refresh_every")
    return Cadence(**{key: options.get(key, getattr(own, key)) for key in keys})


def long_run(seconds: Sequence[float], refresh: float, whole: float, every: Cadence) -> float:
    """Return seconds a step over T₁ and T₂ steps, of which an epoch may have too few.

    Args:
        seconds: of the steps of an epoch; the first is not counted.
        refresh: of a refresh.
        whole: of a step that folds statistics in, learns a pair and refreshes.
        every: T₁ and T₂.
    """
    t1, t2 = every.update_every, every.refresh_every
    plain = [
        taken - refresh * every.refreshes(i, every.updates(i))
        for i, taken in enumerate(seconds, 1)
        if i > 1 and (t1 == 1 or not every.updates(i))
    ]
    mean = statistics.fmean(plain or seconds[1:] or seconds)
    return mean + (max(0.0, whole - refresh - mean) / t1 if t1 > 1 else 0.0) + refresh / t2
