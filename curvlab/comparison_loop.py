"""The loop of a comparison: every descent sees the same observation and the same step.

One of them moves the parameters.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from rich.progress import Progress
from torch import Tensor

from curvlab.comparison_settings import CompareSettings
from curvlab.curvature.base import Curvature, with_defaults
from curvlab.errors import Diverged, warn
from curvlab.logs.log import Log
from curvlab.machine import clock_of
from curvlab.objective import Objective, restore_weights, weights
from curvlab.observation import Pass, Transition
from curvlab.optim import Batch, displacement, move, warm_start
from curvlab.parallel import agree_on_signals
from curvlab.probes.base import (
    PROBES,
    Frame,
    ProbeRecord,
    Sample,
    asked,
    axis,
    begin_step,
    check_probes,
    on_host,
    sample,
)
from curvlab.system.interrupt import Shield, shielded
from curvlab.system.progress import counted, length


@dataclass(frozen=True)
class Course:
    """What one seed of a comparison sees.

    Args:
        batches: the minibatches, in order.
        steps: of them at most; all where None.
        warm: those of the warm start.
        size: examples in a minibatch, from which dampings follow.
        seed: of the log's record.
        title: of the progress bar.
    """

    batches: Iterable[Batch]
    steps: int | None
    warm: Iterable[Batch]
    size: int
    seed: int
    title: str = "compare"


def compare_one(
    objective: Objective, settings: CompareSettings, course: Course, log: Log, bar: Progress
) -> None:
    """Compare along one seed; whatever ends it, what was logged is saved."""
    call = str((settings, course.steps, course.size, course.seed))
    objective.ranks.agreed("other arguments", call, "make the same call on every rank")
    with shielded() as shield:
        shield.waits = objective.ranks.several
        _follow(shield, objective, settings, course, log, bar)


def _follow(
    shield: Shield,
    objective: Objective,
    settings: CompareSettings,
    course: Course,
    log: Log,
    bar: Progress,
) -> None:
    descents, seed = settings.descents(objective, course.size), course.seed
    every = settings.every
    curvatures = {name: d.curvature for name, d in descents.items()}
    with_defaults(curvatures[settings.reference]).rate = settings.rate
    for name, curvature in curvatures.items():
        with_defaults(curvature).apart = name != settings.reference
    check_probes(list(asked(settings.probes, "compare")), curvatures)
    clock = clock_of(objective.device)
    reference = settings.reference
    alive, at = dict(descents), 0  # methods whose numbers are finite; the step
    nothing: dict[str, Tensor] = {}

    def lose(name: str, error: Diverged, first: int) -> None:
        """Take a method out of the comparison, from step `first` on."""
        if name == reference:
            raise error
        del alive[name], curvatures[name]
        tell_of_loss(log, name, seed, first, error)

    def lose_early(curvature: Curvature, error: Diverged) -> None:
        lose(next(name for name, c in curvatures.items() if c is curvature), error, 0)

    try:
        shown = counted(course.warm, bar, "warm start", length(course.warm))
        warm_start(objective, list(curvatures.values()), shown, lose_early)
        task = bar.add_task(course.title, total=course.steps, note="")
        learning: dict[
            str, float
        ] = {}  # seconds spent on learning from the last step, to be counted with the next
        for step, batch in enumerate(itertools.islice(course.batches, course.steps)):
            with shield:  # a signal waits until the step is in the log
                at = step
                due = [name for name, steps_between in every.items() if step % steps_between == 0]
                begin_step(due, curvatures)
                needs = frozenset().union(
                    *(d.needs for d in alive.values()), *(PROBES[name].needs for name in due)
                )
                closure = objective.closure(batch)
                now = closure.observe(needs)
                directions: dict[str, dict[str, Tensor]] = {}
                seconds: dict[str, float] = {}
                nothing = nothing or {
                    name: torch.full_like(g, torch.nan) for name, g in now.gradients.items()
                }
                for name, d in descents.items():
                    directions[name], seconds[name] = nothing, math.nan
                    if name not in alive:
                        continue
                    start = clock()
                    try:
                        directions[name] = d.direction(
                            now, rate=settings.rate if name == reference else 1.0
                        )
                        seconds[name] = clock() - start + learning.pop(name, 0.0)
                    except Diverged as error:
                        lose(name, error, step)
                frame = Frame(step, now, directions, reference, settings.rate, seconds, curvatures)
                seen = sample(due, frame, "before")
                if step % settings.log_every == 0:
                    bar.update(task, note=f"loss {float(now.loss):.4g}")
                saved = weights(objective) if descents[reference].curvature.rejects else []
                move(objective, directions[reference], lambda _: settings.rate)
                learners = {name: d for name, d in alive.items() if d.wants_step}
                if learners:  # all see the same step, the reference's
                    wanted = frozenset[Pass]().union(*(d.step_needs for d in learners.values()))
                    after = closure.observe(wanted, move_buffers=False)
                    step_taken = partial(
                        displacement, objective, directions[reference], lambda _: settings.rate
                    )
                    transition = Transition(now, after, step_taken)
                    for name, d in learners.items():
                        start = clock()
                        try:
                            stands = d.learn(transition)
                        except Diverged as error:
                            lose(name, error, step + 1)
                            continue
                        learning[name] = clock() - start
                        d.say_left_out()
                        if name == reference and not stands:
                            restore_weights(objective, saved)
                seen |= sample(due, frame, "after")
                say_still(objective, descents, seen)
                log_samples(
                    log,
                    step,
                    {name: seen[name] for name in due},
                    every,
                    settings.log_every,
                    seed,
                )
                bar.advance(task)
                agree_on_signals(objective.ranks, shield)
        bar.remove_task(task)
    except Diverged as error:
        _note_loss(log, reference, seed, at, error)
        why = str(error).removeprefix(f"{reference}: ")
        line = f"the reference {reference} left the finite range at step {at}: {why}"
        log.attributes["stopped"] = line
        stopped = Diverged(line)
        stopped.block, stopped.method = error.block, reference
        raise stopped from error
    finally:
        log.save()


def _note_loss(log: Log, name: str, seed: int, step: int, error: Diverged) -> None:
    """Note in the log which method, of which block, left the finite range at which step and why."""
    found = json.loads(log.attributes.get("diverged", "{}"))
    found.setdefault(name, []).append(
        {"seed": seed, "step": step, "block": error.block, "reason": str(error)}
    )
    log.attributes["diverged"] = json.dumps(found, ensure_ascii=False)


def tell_of_loss(log: Log, name: str, seed: int, step: int, error: Diverged) -> None:
    """Say in the log and in a warning that a method left the finite range."""
    _note_loss(log, name, seed, step, error)
    where = f"{name} (seed {seed})" if len(log.seeds) > 1 else name
    why = str(error).removeprefix(f"{name}: ")
    warn(
        f"{where} left the finite range and is NaN from step {step} on, while the others go on:"
        f" {why}"
    )


def say_still(objective: Objective, names: Iterable[str], seen: Mapping[str, Sample]) -> None:
    """Say, once, whose directions are zero in all blocks: they have no cosine.

    Args:
        objective: which says it.
        names: of the methods, in the order of the directions.
        seen: {probe: what it measured}.
    """
    if "norms" not in seen:
        return
    still = (on_host(seen["norms"]["direction_norm"]) == 0).all(-1)
    if still.any():
        objective.say(
            f"no direction of {', '.join(itertools.compress(names, still))} at some step: it is"
            " zero in all blocks, and has no cosine (NaN in the log)"
        )


def log_samples(
    log: Log,
    step: int,
    seen: dict[str, Sample],
    every: dict[str, int],
    log_every: int,
    seed: int,
    more: ProbeRecord | None = None,
) -> None:
    """Log what is taken as often as the log lies along its steps; the rest along its own axes.

    Args:
        log: takes it.
        step: its number.
        seen: {probe: what it measured}.
        every: {probe: steps between its samples}.
        log_every: steps between records.
        seed: of the run.
        more: what stands beside the probes in a record.
    """
    record: ProbeRecord = {}
    for name, found in seen.items():
        values = {v: (PROBES[name].variables[v].dims, on_host(x)) for v, x in found.items()}
        if every[name] == log_every:
            record |= values
        else:
            log.extend(
                axis(name), [step], {v: (dims, x[None]) for v, (dims, x) in values.items()}, seed
            )
    if record:
        log.append(step, record | (more or {}), seed)
