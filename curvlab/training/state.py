"""The whole state of a training run as one dictionary, and back: what a checkpoint holds."""

from __future__ import annotations

import copy
import json
import warnings
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from curvlab.errors import CurvlabError, CurvlabWarning
from curvlab.system import random_state
from curvlab.system.random_state import Chance
from curvlab.training import contents
from curvlab.training.settings import Position, check_same

if TYPE_CHECKING:
    from curvlab.training.loop import Training


def of(run: Training) -> dict[str, Any]:
    """Return the state of a run: tensors, numbers, strings, lists and dictionaries only."""
    return {
        "settings": run.must_match,
        "budget": asdict(run.budget),
        "checkpoint_seconds": run.place.checkpoint_seconds,
        "model": run.objective.model.state_dict(),
        "optimizer": run.optimizer.state_dict(),
        "scheduler": run.scheduler.state_dict(),
        "position": asdict(run.at),
        "sums": run.meter.sums,
        "chance": {
            "now": random_state.states(run.objective.device).state_dict(),
            "epoch": run.chance_of_epoch.state_dict(),
        },
        "log": run.log.state_dict(until=run.at.epoch),
    }


def restore(run: Training, saved: dict[str, Any]) -> None:
    """Bring a run to a state.

    Args:
        run: the run.
        saved: what `of` returned.

    Raises:
        CurvlabError: it is of other settings, which are named, or does not hold what a run does;
            nothing of it is taken.
    """
    contents.check(saved)
    check_same(saved["settings"], run.must_match)
    attributes = dict(run.log.attributes)
    variables = [
        *run.meter.names(run.evaluated),
        *run.sampler.names(),
    ]
    contents.check_fit(
        saved,
        run.objective,
        run.optimizer,
        run.scheduler,
        run.must_match,
        attributes,
        variables,
        run.sampler.tracks(),
    )
    log, model = copy.copy(run.log), run.objective.model
    before = (
        copy.deepcopy(run.scheduler.state_dict()),
        run.optimizer.state_dict(),
        copy.deepcopy(model.state_dict()),  # torch copies what fits before it says what does not
    )
    try:
        log.load_state_dict(saved["log"])
        log.dataset()
        chances = [Chance.of(saved["chance"][name]) for name in ("epoch", "now")]
        run.optimizer.load_state_dict(saved["optimizer"])
        run.scheduler.load_state_dict(saved["scheduler"])
        model.load_state_dict(saved["model"])
    except Exception as error:  # whatever a state may lead to that was made by hand
        run.scheduler.load_state_dict(before[0])
        run.optimizer.load_state_dict(before[1])
        model.load_state_dict(before[2])
        raise CurvlabError(
            f"the checkpoint does not fit this run: {' '.join(str(error).split())[:200]}"
        ) from error
    # what may fail comes before: the log was tried on a copy, optimizer, scheduler and weights are
    # put back where it does, so that a run that refuses a checkpoint is as it was
    run.log.load_state_dict(saved["log"])
    run.at, run.meter.sums = Position(**saved["position"]), saved["sums"]
    run.chance_of_epoch, run.chance_kept = chances
    run.place.kept = True
    run.good = (run.at.epoch, run.at.step)
    run.optimizer._opt_called = run.at.steps > 0  # type: ignore[attr-defined]  # torch's schedulers warn where none was taken
    again = {
        k: attributes[k] for k in ("created", "versions", "git_commit", "call") if k in attributes
    }
    before = json.loads(run.log.attributes.get("resumed", "[]"))
    threads = run.log.attributes.get("threads")
    if threads != attributes.get("threads"):
        warnings.warn(
            f"the run was begun by {threads} threads and goes on by {attributes.get('threads')}:"
            " sums may differ in their last bits from what it would have been",
            CurvlabWarning,
            stacklevel=2,
        )
    run.log.attributes |= {
        "resumed": json.dumps([*before, again]),
        "budget": json.dumps(asdict(run.budget)),
    }
