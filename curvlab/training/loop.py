"""The training loop: steps, evaluation, log, checkpoints.

All of its state is in a checkpoint, so it goes on bit for bit.

The order of writing is checkpoint, then log, and the checkpoint holds the log's records: whenever
the process dies, the log is made again from the checkpoint. Loss and error are of the whole
training and validation sets at an epoch's end, in eval mode; the time of that is apart, as is the
time of the warm start, of checkpoints and of the log (thesis 2.8.1).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.progress import Progress
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]  # torch does not export it by name
from torch.optim.lr_scheduler import ReduceLROnPlateau

from curvlab import datasets
from curvlab.algorithms import followed
from curvlab.curvature.base import with_defaults
from curvlab.errors import CurvlabError, Diverged
from curvlab.logs.log import Record
from curvlab.machine import clock_of
from curvlab.objective import Objective
from curvlab.observation import Observation
from curvlab.optim import Batch
from curvlab.parallel import agree_on_signals
from curvlab.shared_looks import check_alike
from curvlab.system import random_state
from curvlab.system.interrupt import Shield, shielded
from curvlab.system.progress import counted, length
from curvlab.system.random_state import Chance
from curvlab.training import state
from curvlab.training.ending import Ending
from curvlab.training.evaluation import Evaluated, evaluate, score_names, scores_of
from curvlab.training.folder import RunFolder
from curvlab.training.probing import Sampler
from curvlab.training.records import Meter, training_log
from curvlab.training.settings import Budget, Position, Settings
from curvlab.training.showing import Showing
from curvlab.training.stopwatch import Stopwatch


class Training:
    """A run and its state; nothing is written where it has no folder.

    Args:
        objective: whose parameters are moved.
        batches: one pass over them is an epoch; a data set's (`Dataset.batches`) are shuffled anew
            in every epoch.
        settings: what decides the weights.
        budget: when the run ends.
        evaluated: on what loss and error are evaluated.
        warm: minibatches of the warm start, where the algorithm has one.
        about: attributes of the log.
        must_match: what else must be the same where the run goes on.
        place: the folder that gets run.h5 and checkpoint.pt.
        probes: {name: steps between samples, None for the probe's own}.
    """

    def __init__(
        self,
        objective: Objective,
        batches: Iterable[Batch],
        settings: Settings,
        budget: Budget,
        *,
        evaluated: Evaluated,
        warm: Iterable[Batch],
        about: Mapping[str, Any],
        must_match: Mapping[str, Any],
        place: RunFolder,
        probes: Mapping[str, int | None] | None = None,
    ) -> None:
        settings.check()
        budget.check()
        self.objective, self.batches, self.settings, self.budget = (
            objective,
            batches,
            settings,
            budget,
        )
        self.evaluated, self.warm, self.place = evaluated, warm, place
        self.per_epoch = (
            batches.per_epoch if isinstance(batches, datasets.Batches) else length(batches)
        )
        self.optimizer = settings.method.optimizer(objective)
        self.scheduler = settings.scheduling.scheduler(self.optimizer, budget, self.per_epoch)
        self.meter, self.clock = Meter(objective), clock_of(objective.device)
        self.sampler = Sampler(
            objective, self.optimizer, settings.method.algorithm, probes or {}, self.clock
        )
        self.stopwatch = Stopwatch(self.clock, self.sampler)
        self.ranks = objective.ranks
        self.ending = Ending(budget, self.scheduler, lambda: self.ranks.first_number(self._gone()))
        self.optimizer.watch = self._watch
        self.at, self.shield = Position(), Shield()
        self.last: Batch | None = None
        self.must_match = (
            settings.plain()
            | dict(must_match)
            | ({"epochs": budget.epochs} if settings.scheduling.spans() else {})
        )
        self.must_match |= {"probes": dict(self.sampler.every)} if self.sampler.every else {}
        group = self.optimizer.param_groups[0]
        attributes = {
            "title": f"curvlab train: {settings.method.algorithm}",
            "algorithm": settings.method.algorithm,
            "settings": settings.plain(),
            "budget": asdict(budget),
            "lr": float(group["lr"]),
            "damping": float(group["damping"]),
        }
        method = settings.method
        call = self.must_match | {"budget": asdict(budget)}
        self.ranks.agreed("other arguments", call, "make the same call on every rank")
        attributes |= followed({method.algorithm: method.given()}, objective)
        self.log = training_log(
            objective,
            evaluated.error,
            attributes | dict(about),
            place.log,
            settings.method.algorithm,
            self.sampler.every,
        )
        self.stopped = ""
        self.good = (0, 0)  # epoch and step of the last good state
        self._good_model: dict[str, Tensor] = {}  # kept only where there is no folder
        self.chance_of_epoch = random_state.states(objective.device)
        self.chance_kept: Chance | None = None  # of the state from which it goes on

    def into(self, folder: Path) -> None:
        """Write to this folder from here on."""
        self.place.folder = folder
        self.log.path = self.place.log

    # ---- the loop

    def run(self, bar: Progress, say: Callable[[str], None] = lambda line: None) -> None:
        """Train until the budget is spent, or the numbers leave the finite range (see `stopped`).

        Raises:
            CurvlabError: bad data, or a folder that cannot be written.
            KeyboardInterrupt: Ctrl-C, or another of `interrupt.SIGNALS` (`Interrupted`), once the
                running step is whole; the state is saved.
        """
        self.bar = bar
        self.showing = Showing(bar, say, self.budget, self.per_epoch)
        if self.chance_kept is not None:
            random_state.set_states(self.chance_kept, self.objective.device)
        fresh, fruitless = not self.at.started, False
        with shielded() as self.shield:
            self.shield.waits = self.ranks.several
            try:
                if not self.at.started:
                    self._begin()
                self.showing.begin(self.at, self._gone())
                whole = True
                while whole and not (self.at.step == 0 and self.ending.over(self.at)):
                    whole = self._epoch()
                self.ending.say(self.at)
            except (Diverged, LinAlgError) as error:
                if not self.at.started:
                    raise CurvlabError(f"before the first step: {error}") from error
                with self.shield:
                    self._stop(str(error).splitlines()[0])
            except KeyboardInterrupt:
                self.stopwatch.pause(self.at)
                if self.at.started and not self.shield.broken:
                    self._keep()
                raise
            except (Exception, SystemExit):  # also of the user's own code
                # what was asked for cannot be: no run to go on with
                fruitless = fresh and not self.at.steps
                raise
            finally:
                self.stopwatch.pause(self.at)
                if fruitless:
                    self.place.forget()
                elif self.place.kept or self.place.folder is None:  # no log without a checkpoint
                    try:
                        with self.shield:
                            self.sampler.flush(self.log)
                    finally:
                        with self.shield:
                            self.log.save()

    def _begin(self) -> None:
        """Evaluate epoch 0 before the warm start, so that what does not fit is found at once."""
        scores = self._evaluate()
        start = self.clock()
        self.optimizer.warm_start(counted(self.warm, self.bar, "warm start", length(self.warm)))
        self.at.warm = self.clock() - start
        with self.shield:
            self.log.append(0, self._record(scores), save=False)
            self.at.started = True
        self._keep(sound=True)
        self.log.save()
        self.showing.epoch(0, scores, self.at)

    def _epoch(self) -> bool:
        """Finish an epoch, evaluate and record it; return False where the budget cut it."""
        whole = self._steps()
        number: float = self.at.epoch + 1
        if not whole and self.per_epoch:
            number = self.at.epoch + self.at.step / self.per_epoch
        evaluated = (
            not whole
            or number % self.settings.evaluation.evaluate_every == 0
            or number == self.budget.epochs
            or self._spent()
        )
        evaluated |= self.settings.scheduling.schedule_every == "epoch" and self.ending.scheduled(1)
        scores = self._evaluate() if evaluated else self._glance()
        if not whole:
            self._keep(sound=True)  # without this record: a longer run would not have it
        with self.shield:
            self.log.append(number, self._record(scores))
            if whole:
                self.at.epoch, self.at.step, self.meter.sums = self.at.epoch + 1, 0, None
                if self.settings.scheduling.schedule_every == "epoch":
                    self._next_rate(scores)
        if evaluated:
            self.showing.epoch(number, scores, self.at)
        if whole:
            self._keep(sound=True)
        return whole

    def _steps(self) -> bool:
        """Step to the end of the epoch or of the budget, and return whether it was the epoch's."""
        if self._spent():  # a run that goes on where it was ended
            return self.at.step == self.per_epoch
        self.stopwatch.resume()
        try:
            minibatches = self._minibatches()
            while True:
                with self.shield:  # the next minibatch too: what a loader draws belongs to the step
                    batch = next(minibatches, None)
                    if batch is None:
                        return True
                    self.last = batch
                    self.sampler.start(self.at.steps)
                    loss = self.optimizer.step(self.objective.closure(batch))
                    self.at.step += 1
                    self.at.steps += 1
                    if self.settings.scheduling.schedule_every == "step":
                        self._advance()
                    due = agree_on_signals(self.ranks, self.shield, self.place.due)
                self.showing.step(self.at, self._gone, loss)
                if self._spent():
                    return self.at.step == self.per_epoch
                if due:
                    self.stopwatch.pause(self.at)
                    self._keep()
                    self.stopwatch.resume()
        finally:
            self.stopwatch.pause(self.at)

    def _watch(self, observation: Observation, moved: dict[str, Tensor]) -> None:
        self.meter(observation, moved)
        self.sampler.after()

    def _next_rate(self, scores: dict[str, float]) -> None:
        if isinstance(self.scheduler, ReduceLROnPlateau):
            loss = scores.get("val_loss", scores["train_loss"])
            if math.isfinite(loss):
                self._advance(loss)
        else:
            self._advance()

    def _advance(self, loss: Any = None) -> None:
        """Take one step of the schedule; raise CurvlabError where it cannot take one."""
        try:
            self.scheduler.step(*([] if loss is None else [loss]))
        except (ArithmeticError, LookupError, TypeError, ValueError) as error:
            raise CurvlabError(
                f"the schedule failed after {self.at.steps} steps: {' '.join(str(error).split())}"
            ) from error

    def _minibatches(self) -> Iterator[Batch]:
        """Yield the minibatches of this epoch, from where it stands."""
        device, at = self.objective.device, self.at
        if isinstance(self.batches, datasets.Batches):
            yield from self.batches.epoch(at.epoch, at.step)
            return
        if at.step == 0:
            self.chance_of_epoch = random_state.states(device)
            yield from self.batches
            return
        with random_state.replayed(
            self.chance_of_epoch, device
        ):  # loaders shuffle by a global generator: as it did
            rest = iter(self.batches)
            for _ in itertools.islice(rest, at.step):
                pass
        yield from rest

    def _spent(self) -> bool:
        """Whether the steps or the seconds are, or the schedule is at its end."""
        return self.ending.spent(self.at)

    def _gone(self) -> float:
        """Seconds of training so far."""
        return self.stopwatch.gone(self.at)

    # ---- what is measured

    def _evaluate(self) -> dict[str, float]:
        """Return loss and error; raise Diverged where a step or the loss is not finite."""
        self.optimizer.soundness.check()
        check_alike(self.objective)
        start = self.clock()
        scores = scores_of(
            self.objective, self.evaluated, self.settings.evaluation.evaluate_samples
        )
        self.at.evaluation += self.clock() - start
        if not math.isfinite(scores["train_loss"]):
            raise Diverged(
                f"the training loss is {scores['train_loss']:g}: lower the learning rate or raise"
                " the damping"
            )
        if not math.isfinite(scores.get("val_loss", 0.0)):
            self.objective.say(
                f"the validation loss is {scores['val_loss']:g}, while that of training is finite"
            )
        return {name: scores[name] for name in score_names(self.evaluated)}

    def _glance(self) -> dict[str, float]:
        """Return NaN for an epoch that is not evaluated; raise Diverged as `_evaluate`."""
        if not self._sound():
            raise Diverged("the loss is not finite: lower the learning rate or raise the damping")
        return dict.fromkeys(score_names(self.evaluated), math.nan)

    def _sound(self) -> bool:
        """Return whether every step's numbers were finite, and the last minibatch's loss is."""
        if not bool(self.optimizer.soundness.flag):
            return False
        return self.last is None or math.isfinite(evaluate(self.objective, [self.last])[0])

    def _record(self, scores: dict[str, float]) -> Record:
        group = self.optimizer.param_groups[0]
        descent = self.optimizer.descent
        descent.say_left_out()
        lr, damping = float(group["lr"]), float(group["damping"])
        used = with_defaults(descent.curvature).refreshed
        record = self.meter.record(scores, lr, damping, self.at, descent.left_out, used)
        self.sampler.flush(self.log)
        return {**record, **self.sampler.of_epoch(self.log, self.at.steps - self.at.step)}

    # ---- checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Return the whole state: tensors, numbers, strings, lists and dictionaries only."""
        with self.shield:
            self.sampler.flush(self.log)
        return state.of(self)

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Go on from what `state_dict` returned.

        Raises:
            CurvlabError: it is of other settings, which are named, or does not hold what a run
                does; nothing of it is taken.
        """
        state.restore(self, saved)

    def _keep(self, sound: bool = False) -> None:
        """Write a checkpoint, if the state's loss is known to be finite, or is found to be."""
        if not sound and not self._sound():
            return
        if self.place.folder is not None:
            saved = self.state_dict()
            with self.shield:  # a signal need not break it off, to have it written again
                self.place.save(saved)
        else:
            self._good_model = {k: v.clone() for k, v in self.objective.model.state_dict().items()}
        self.good = (self.at.epoch, self.at.step)

    def _stop(self, reason: str) -> None:
        """Go back to the last good state where numbers left the finite range; the log says why."""
        at, (epoch, step) = self.at, self.good
        where = f"{step} steps into epoch {epoch + 1}" if step else f"epoch {epoch}"
        self.stopped = (
            f"diverged in epoch {at.epoch + 1} after {at.step} steps: {reason}; the last good"
            f" state, kept, is {where}"
        )
        kept = (
            self._good_model
            if self.place.folder is None
            else self.place.load(self.objective.device)["model"]
        )
        self.objective.model.load_state_dict(kept)
        self.log.attributes["stopped"] = self.stopped
