"""The look at one step of a loop that is not ours, and what is logged of it.

The step is done when it is looked at: the weights before it, which were kept, take the place of the
new ones for as long as the look at its minibatches lasts, and the new ones come back as they were.
Generators are those of the loop's own forward pass inside, and as they were afterwards.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from curvlab import model_state
from curvlab.closure import Closure
from curvlab.comparison_loop import log_samples, say_still, tell_of_loss
from curvlab.comparison_settings import CompareSettings
from curvlab.curvature.base import with_defaults
from curvlab.derivatives import precise
from curvlab.errors import CurvlabError, Diverged, warn
from curvlab.logs.log import Log
from curvlab.machine import clock_of
from curvlab.nests import leaves
from curvlab.objective import Objective
from curvlab.observation import Observation, Pass, Transition
from curvlab.optim import Descent
from curvlab.parallel import RankLost
from curvlab.probes.base import (
    PROBES,
    Frame,
    ProbeRecord,
    Sample,
    Variable,
    asked,
    begin_step,
    check_probes,
    on_host,
    sample,
)
from curvlab.strangers import mixes
from curvlab.system import random_state
from curvlab.watched_batches import Handed
from curvlab.watched_ranks import ModelCall, buffers_of_first, calls_of_all, joined_minibatch

WATCHED = "watched"
"""The watched optimizers' direction, decoupled weight decay apart: the log's reference."""

WITH_DECAY = "watched+decay"
"""The same with weight decay: times the learning rate it is what the weights moved by."""

ALIKE = 0.99
"""Cosine of the loop's gradient to the likelihood's below which it is said that they differ."""

BESIDE = {
    "learning_rate": Variable((), "learning rate that directions are over", "1"),
    "displacement_norm": Variable(("block",), "length of the step, weight decay included", "1"),
    "optimizer_gradient_norm": Variable(
        ("block",), "norm of the gradient that the optimizer was given, clipped", "nat/parameter"
    ),
    "optimizer_gradient_cosine": Variable(
        ("block",), "cosine of that gradient to the minibatch's own, before clipping", "1"
    ),
    "minibatches": Variable((), "minibatches of the step, looked at as one", "1"),
    "watch_seconds": Variable((), "time of the look, which the loop was kept waiting", "s"),
}
"""Variables of a watched step beside those of a comparison."""


@dataclass
class Taken:
    """A step: all that has to be kept of what was before it.

    Args:
        number: of the step, from 0.
        old: {parameter: its value before}.
        others: (a parameter of the model in no block, that is trained now, its value before).
        rates: {parameter: its learning rate}, of the optimizers that have stepped.
        decays: {parameter: γ of decoupled decay}.
        gradients: {parameter: what the optimizer was given}; what is absent is not known.
        rate: the first optimizer's first learning rate, which all directions are over.
        seconds: that the optimizers took.
    """

    number: int
    old: dict[str, Tensor]
    others: list[tuple[nn.Parameter, Tensor]] = field(default_factory=list)
    rates: dict[str, float] = field(default_factory=dict)
    decays: dict[str, float] = field(default_factory=dict)
    gradients: dict[str, Tensor] = field(default_factory=dict)
    rate: float = 1.0
    seconds: float = 0.0


def _calls(seen: Sequence[Handed]) -> list[ModelCall]:
    """Return this rank's calls of the model; one on each minibatch of which none was heard."""
    return [
        ModelCall(size, str([t.shape[1:] for t in leaves(one.x)]), stood.chance)
        for one in seen
        for size, stood in one.calls or [(len(leaves(one.y)[0]), one.surroundings)]
    ]


def _are_parts(calls: Sequence[ModelCall], size: int) -> bool:
    """Return whether what each call drew is what it draws as a part of the whole."""
    forms = {one.form for one in calls}
    return len(calls) > 1 and len(forms) == 1 and sum(one.size for one in calls) == size


class Looker:
    """Looker at steps, which it logs as `compare` would where the loop's optimizer leads.

    Args:
        objective: the loop's model and the likelihood.
        settings: of the methods beside it; its `reference` is the first of them.
        path: of the log.
        about: attributes of the log.
        decays: whether there is decoupled weight decay, and so two directions.
    """

    def __init__(
        self,
        objective: Objective,
        settings: CompareSettings,
        path: Path | None,
        about: Mapping[str, Any],
        decays: bool,
    ) -> None:
        settings.check()
        self.objective, self.settings, self.path = objective, settings, path
        self.about, self.every = dict(about), settings.every
        self.watched = (WATCHED, WITH_DECAY) if decays else (WATCHED,)
        if settings.probes:
            found = settings.descents(objective, 1)
            check_probes(
                list(asked(settings.probes, "compare")),
                {name: d.curvature for name, d in found.items()},
            )
        self.clock = clock_of(objective.device)
        self.log: Log | None = None
        self.samples, self.lost, self.seconds = 0, 0, 0.0
        self._unlike = False  # whether it was said that the gradients are
        self._descents: dict[str, Descent] = {}
        self._alive: dict[str, Descent] = {}
        self._learning: dict[str, float] = {}

    def due(self, number: int) -> list[str]:
        """Return the probes that are taken at a step."""
        return [name for name, every in self.every.items() if number % every == 0]

    def look(self, taken: Taken, seen: Sequence[Handed], count: int) -> None:
        """Look at a step that was taken over these minibatches, and log it.

        A loss or gradient that is not finite is a line of warning, and nothing is logged.

        Args:
            taken: the step.
            seen: this rank's minibatches of it.
            count: those of all ranks.

        Raises:
            RankLost: another process of the loop has gone.
            CurvlabError: at the first look, minibatches that do not fit the model or the
                likelihood; later they are a line of warning too.
        """
        start, device = self.clock(), self.objective.device
        first, stood = seen[0], seen[0].surroundings
        now: Closure | None = None
        with ExitStack() as stack:
            stack.enter_context(random_state.kept(device))
            stack.enter_context(model_state.undisturbed(self.objective.model))
            try:
                stood.state.put_back()
                stack.enter_context(buffers_of_first(self.objective))
                now = self._closure(seen)
                calls = calls_of_all(self.objective.ranks, _calls(seen))
                random_state.set_states(calls[0].chance, device)
                if _are_parts(calls, len(now.x)):
                    now.parts = [(one.size, one.chance) for one in calls]
                cast = nullcontext() if stood.cast is None else torch.autocast(*stood.cast)
                with cast, precise():
                    found, record = self._seen(taken, now, count > 1 or first.part)
            except RankLost:
                raise
            except CurvlabError as error:
                # what does not fit shows at the first look, to be put right; later, it would end a
                # training that is none of ours
                if not isinstance(error, Diverged) and not self.log:
                    raise
                self.lost += 1
                if self.lost == 1:
                    warn(f"step {taken.number} is not logged, nor others like it: {error}")
                return
            finally:
                if now is not None:
                    now.put_back()
                self.seconds += self.clock() - start
                self.samples += 1
        record |= {"minibatches": count, "watch_seconds": self.clock() - start}
        self._write(taken.number, found, record)

    # ---- the minibatch

    def _closure(self, seen: Sequence[Handed]) -> Closure:
        """Return the minibatches of a step as one, of the mean over all examples."""
        x, y = joined_minibatch(self.objective, [(one.x, one.y) for one in seen])
        closure = self.objective.closure(x, y)
        if self.log is None:
            self._open(len(closure.x))
        return closure

    def _is_a_mean(self, closure: Closure) -> bool:
        """Return whether minibatches looked at as one are what each was alone; say it if not."""
        mixing = mixes(self.objective.modules)
        if mixing or closure.drew_as_one():
            why = (
                "batch norm has other means and variances"
                if mixing
                else "dropout, or what else is drawn, has other random numbers"
            )
            self.objective.say(
                "the minibatches of a step (that add up, parts of one, or of several processes) are"
                f" looked at as one, in which {why} than in each alone: its gradient is not the"
                " loop's own (the log has their cosine)"
            )
            return False
        return True

    def _open(self, size: int) -> None:
        """Make descents and log, which want to know the size of minibatches."""
        asked = str((self.settings, self.watched, size))
        self.objective.ranks.agreed("other arguments", asked, "make the same call on every rank")
        self._descents = self.settings.descents(self.objective, size)
        for descent in self._descents.values():
            with_defaults(descent.curvature).apart = True
        self._alive = dict(self._descents)
        names = [*self.watched, *self._descents]
        log = self.settings.log(self.objective, size, self.path, [self.objective.seed], self.about)
        log.coordinates = {**log.coordinates, "algorithm": names, "other": names}
        log.variables = {**log.variables, **{name: v.said for name, v in BESIDE.items()}}
        settings = json.loads(log.attributes["settings"])
        del settings["reference"], settings["lr"]
        log.attributes |= {
            "title": "curvlab watch: directions against the watched optimizer's",
            "reference": WATCHED,
            "settings": json.dumps(settings),
        }
        self.log = log

    # ---- the look

    @contextmanager
    def _before(self, taken: Taken) -> Iterator[None]:
        """Let the weights be those before the step, inside; no byte of the new ones is copied."""
        held = [(p, taken.old[name]) for name, p in self.objective.parameters.items()]
        held += taken.others
        new = [p.data for p, _ in held]
        try:
            for p, old in held:
                p.data = old
            yield
        finally:
            for (p, _), data in zip(held, new, strict=True):
                p.data = data

    def _seen(
        self, taken: Taken, closure: Closure, several: bool
    ) -> tuple[dict[str, Sample], dict[str, Any]]:
        assert self.log is not None
        log, seed = self.log, self.objective.seed
        due = self.due(taken.number)
        curvatures = {name: d.curvature for name, d in self._alive.items()}
        begin_step(due, curvatures)
        directions, moved = self._directions(taken)
        seconds = {name: taken.seconds if name == WATCHED else math.nan for name in self.watched}

        def lose(name: str, error: Diverged, first: int) -> None:
            del self._alive[name], curvatures[name]
            tell_of_loss(log, name, seed, first, error)

        with self._before(taken):
            needs = frozenset[Pass]({"data"}).union(
                *(d.needs for d in self._alive.values()), *(PROBES[name].needs for name in due)
            )
            now = closure.observe(needs, move_buffers=False)
            as_one = not several or self._is_a_mean(closure)
            nothing = {name: torch.full_like(g, torch.nan) for name, g in now.gradients.items()}
            for name in self._descents:
                directions[name], seconds[name] = nothing, math.nan
                if name not in self._alive:
                    continue
                start = self.clock()
                try:
                    directions[name] = self._alive[name].direction(now, rate=1.0)
                    seconds[name] = self.clock() - start + self._learning.pop(name, 0.0)
                except Diverged as error:
                    lose(name, error, taken.number)
            frame = Frame(taken.number, now, directions, WATCHED, taken.rate, seconds, curvatures)
            found = sample(due, frame, "before")
        closure.weights_moved()
        learners = {name: d for name, d in self._alive.items() if d.wants_step}
        if learners:
            wanted = frozenset[Pass]().union(*(d.step_needs for d in learners.values()))
            after = closure.observe(wanted, move_buffers=False)
            transition = Transition(now, after, lambda: moved)
            for name, d in learners.items():
                start = self.clock()
                try:
                    d.learn(transition)
                except Diverged as error:
                    lose(name, error, taken.number + 1)
                    continue
                self._learning[name] = self.clock() - start
                d.say_left_out()
        found |= sample(due, frame, "after")
        return {name: found[name] for name in due}, self._beside(taken, now, moved, as_one)

    def _directions(self, taken: Taken) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
        """Return {watched…: {block: (old − new) / rate}} and {block: new − old}."""
        parameters, dtype = self.objective.parameters, self.objective.dtype
        moves, decay = {}, {}
        for name, p in parameters.items():
            old = taken.old[name].to(dtype)
            moves[name] = p.detach().to(dtype) - old
            decay[name] = old * (taken.rates.get(name, 0.0) * taken.decays.get(name, 0.0))
        moved = {b.name: b.gather({n: moves[n] for n in b.params}) for b in self.objective.blocks}
        shrunk = {b.name: b.gather({n: decay[n] for n in b.params}) for b in self.objective.blocks}
        # at a rate of 0 (the first step of a warm-up) nothing moves, and there is no direction
        over = 1 / taken.rate if taken.rate else 1.0
        found = {WATCHED: {name: (-d - shrunk[name]) * over for name, d in moved.items()}}
        if WITH_DECAY in self.watched:
            found[WITH_DECAY] = {name: -d * over for name, d in moved.items()}
        return found, moved

    def _beside(
        self, taken: Taken, now: Observation, moved: Mapping[str, Tensor], comparable: bool
    ) -> dict[str, Any]:
        """Return the values of `BESIDE` that a look gives."""
        own, given = now.gradients, dict[str, Tensor | None]()
        for block in self.objective.blocks:
            parts = [taken.gradients.get(name) for name in block.params]
            there = {
                n: g.to(now.loss.device, self.objective.dtype)
                for n, g in zip(block.params, parts, strict=True)
                if g is not None
            }
            given[block.name] = block.gather(there) if len(there) == len(parts) else None
        nan = torch.full((), torch.nan, dtype=torch.float64, device=now.loss.device)
        rows = [
            (nan, nan, nan)
            if (g := given[name]) is None
            else (g.double().norm(), own[name].double().norm(), (g * own[name]).double().sum())
            for name in moved
        ]
        norms, owns, inner = on_host(torch.stack([torch.stack(row) for row in rows])).T
        with np.errstate(invalid="ignore", divide="ignore"):
            cosines = inner / (norms * owns)
            whole = np.nansum(inner) / math.sqrt(np.nansum(norms**2) * np.nansum(owns**2) or 1.0)
        known = bool(np.isfinite(inner).any()) and np.nansum(norms) > 0
        if comparable and known and whole < ALIKE and not self._unlike:
            self._unlike = True
            warn(
                f"the gradient that the optimizer was given has a cosine of {whole:.2g} to that of"
                " the likelihood on the minibatches which watch has seen: is the likelihood the"
                " loop's own loss, and did watch see every minibatch of the step?"
            )
        lengths = torch.stack([d.double().norm() for d in moved.values()])
        return {
            "learning_rate": taken.rate,
            "displacement_norm": on_host(lengths),
            "optimizer_gradient_norm": norms,
            "optimizer_gradient_cosine": cosines,
        }

    def _write(self, number: int, found: dict[str, Sample], beside: dict[str, Any]) -> None:
        assert self.log is not None
        more: ProbeRecord = {n: (v.dims, np.asarray(beside[n])) for n, v in BESIDE.items()}
        self.log.attributes["watch_seconds"] = round(self.seconds, 6)
        self.log.attributes["watch_samples"] = self.samples
        log_every, seed = self.settings.log_every, self.objective.seed
        say_still(self.objective, [*self.watched, *self._descents], found)
        try:
            log_samples(self.log, number, found, self.every, log_every, seed, more)
        except CurvlabError as error:  # a full disk ends no training; the end tries again
            self.objective.say(f"{error} (the loop goes on, and it is tried again)")
