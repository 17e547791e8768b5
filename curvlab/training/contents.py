"""What a checkpoint must hold, looked at before anything of it is taken.

It is which keys, of which kinds, in which shapes.

The seal says that a file is what was written; this says that what was written is a run's.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, get_type_hints

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from curvlab.errors import CurvlabError, fitting
from curvlab.groups import check_options
from curvlab.objective import Objective
from curvlab.optim import Optimizer
from curvlab.system import random_state
from curvlab.system.random_state import Chance
from curvlab.training.descent_contents import check_descent
from curvlab.training.kinds import (
    alike,
    equal,
    is_attribute,
    is_like,
    is_number,
    is_plain,
    is_tensor,
    is_text,
    is_whole,
    keys,
    list_of,
    must,
    nested_numbers,
    or_none,
    table_of,
    wrong,
)
from curvlab.training.settings import Budget, Position


def check(state: Mapping[str, Any]) -> None:
    """Raise CurvlabError, which says where, for what no run has written.

    It says what can be said without the run.
    """
    new = state.get("format", 1) > 1
    parts = (
        "settings",
        "budget",
        "model",
        "optimizer",
        "scheduler",
        "position",
        "sums",
        "chance",
        "log",
    )
    late = ("format", "checkpoint_seconds")
    keys(state, (*parts, *(late if new else ())), "the checkpoint", late)
    for key in parts:
        if key != "sums":
            must(state[key], table_of(lambda value: True, lambda key: True), key)
    settings, budget, position = state["settings"], state["budget"], state["position"]
    must(settings, table_of(is_plain), "settings")
    check_named(budget, (Budget,), "budget", whole_of=True)
    for name, value in budget.items():
        must(value, or_none(lambda v: v > 0), f"budget['{name}']")
    must(list(budget.values()), lambda values: any(v is not None for v in values), "budget")
    must(
        state.get("checkpoint_seconds", 1.0),
        lambda value: is_number(value) and value > 0,
        "checkpoint_seconds",
    )
    check_named(position, (Position,), "position", whole_of=new)
    for name, value in position.items():
        must(value, lambda v: v >= 0, f"position['{name}']")
    must(position.get("started"), lambda value: value is True, "position['started']")
    _check_log(state["log"], new)


def check_named(
    values: Mapping[str, Any],
    kinds: Iterable[type],
    where: str = "settings",
    whole_of: bool = False,
) -> None:
    """Raise CurvlabError where a value is not what the field of its name must be.

    Args:
        values: {field: value}.
        kinds: the dataclasses whose fields they are.
        where: they stand, for the error's line.
        whole_of: whether all fields must be there.
    """
    hints = {name: hint for kind in kinds for name, hint in get_type_hints(kind).items()}
    for name, value in values.items():
        hint = hints.get(name, Any)
        try:
            fitting(f"{where}['{name}']", value, hint)
        except CurvlabError as error:
            raise wrong(str(error)) from error
        if hint in (Mapping[str, Any], Mapping[str, int | None]):
            must(value, table_of(lambda value: True), f"{where}['{name}']")
    if whole_of:
        keys(values, hints, where)


def check_fit(
    state: Mapping[str, Any],
    objective: Objective,
    optimizer: Optimizer,
    scheduler: LRScheduler,
    settings: Mapping[str, Any],
    attributes: Mapping[str, Any],
    variables: Sequence[str],
    tracks: Mapping[str, Sequence[str]],
) -> None:
    """Raise CurvlabError where a state is not one of a run's own; nothing of the run is changed.

    Args:
        state: of the checkpoint.
        objective: the run's.
        optimizer: the run's.
        scheduler: the run's.
        settings: that must be the same.
        attributes: of the run's log.
        variables: that its records have.
        tracks: {axis of the log's own: variables along it}.
    """
    new = state.get("format", 1) > 1
    if new:
        keys(state["settings"], settings, "settings")
    _check_model(state["model"], objective.model)
    _check_optimizer(state["optimizer"], optimizer, new)
    if type(scheduler).__module__ == "torch.optim.lr_scheduler":
        alike(scheduler.state_dict(), state["scheduler"], "scheduler")
    sums, step = state["sums"], state["position"]["step"]
    shape = (3 + 2 * len(objective.blocks),)
    must(
        sums,
        or_none(
            lambda value: is_tensor(value) and value.shape == shape and value.dtype == torch.float64
        ),
        "sums",
    )
    if (sums is None) != (step == 0):
        raise wrong(f"sums over {step} steps are {'absent' if sums is None else 'there'}")
    for name in ("now", "epoch"):
        _check_chance(state["chance"], name, objective.device)
    log = state["log"]
    if new:
        keys(log["attributes"], attributes, "log['attributes']", more=tuple(log["attributes"]))
        for name, value in attributes.items():
            must(
                log["attributes"][name],
                is_text if is_text(value) else is_number,
                f"log['attributes']['{name}']",
            )
    for record in (r for records in log["records"].values() for r in records):
        keys(record, variables, "a record of the log", more=() if new else tuple(record))
    if new and state["position"]["steps"]:
        further = log["further"].get(objective.seed, {})
        keys(further, tracks, "log['further']")
        for axis, names in tracks.items():
            keys(further[axis]["values"], names, f"log['further']['{axis}']")
    if list(log["steps"]) != [objective.seed]:
        raise wrong(f"the log is of seed {', '.join(map(str, log['steps']))}, not {objective.seed}")


def _check_model(saved: Mapping[str, Any], model: nn.Module) -> None:
    own = model.state_dict()
    keys(saved, own, "model")
    for name, value in own.items():
        if isinstance(value, Tensor):
            must(saved[name], lambda v, mine=value: is_like(v, mine), f"model['{name}']")  # type: ignore[misc]  # a default


def _check_optimizer(saved: Mapping[str, Any], optimizer: Optimizer, new: bool) -> None:
    own = optimizer.state_dict()
    keys(saved, ("state", "param_groups", "curvlab"), "optimizer")
    must(
        saved["state"], lambda value: isinstance(value, Mapping) and not value, "optimizer['state']"
    )
    groups = saved["param_groups"]
    must(
        groups,
        list_of(table_of(lambda value: True), len(own["param_groups"])),
        "optimizer['param_groups']",
    )
    for group, mine in zip(groups, own["param_groups"], strict=True):
        keys(group, mine if new else ("params", "lr"), "a parameter group", more=tuple(mine))
        if not equal(group["params"], mine["params"]):
            raise wrong("a group is of other parameters")
        for name, value in mine.items():
            if name in group and is_number(value):
                must(
                    group[name],
                    lambda v: is_number(v) or (is_tensor(v) and not v.dim()),
                    f"{name} of a parameter group",
                )
        must(group["lr"], lambda v: 0 <= float(v) < math.inf, "lr of a parameter group")
    if new:
        check_options(list(groups))
    must(saved["curvlab"], table_of(lambda value: True), "optimizer['curvlab']")
    keys(saved["curvlab"], ("descent", "objective"), "optimizer['curvlab']")
    descent, objective = saved["curvlab"]["descent"], saved["curvlab"]["objective"]
    must(objective, table_of(lambda value: True), "the objective's state")
    keys(objective, ("seed", "closures"), "the objective's state")
    must(
        objective["seed"],
        lambda value: equal(value, optimizer.objective.seed),
        "the objective's seed",
    )
    must(objective["closures"], table_of(is_whole), "the objective's closures")
    keys(
        objective["closures"],
        optimizer.objective.closures,
        "the objective's closures",
        more=tuple(objective["closures"]),
    )
    check_descent(descent, own["curvlab"]["descent"], optimizer.objective.blocks, new)


def _check_chance(states: Mapping[str, Any], name: str, device: torch.device) -> None:
    """Raise CurvlabError for what the random generators do not take, or take for another state."""
    keys(states, ("now", "epoch"), "chance")
    saved = states[name]
    if isinstance(saved, Mapping):
        must(saved.get("python"), list_of(lambda value: True, 3), f"chance['{name}']['python']")
        must(saved.get("numpy"), table_of(lambda value: True), f"chance['{name}']['numpy']")
    try:
        with random_state.kept(device):
            random_state.set_states(Chance.of(saved), device)
            same = isinstance(saved, list) or equal(random_state.states(device).state_dict(), saved)
    except Exception as error:  # each of the three has its own
        raise wrong(f"chance['{name}']: {' '.join(str(error).split())[:120]}") from error
    if not same:
        raise wrong(f"chance['{name}'] is no state of the random generators")


def _check_log(saved: Mapping[str, Any], new: bool) -> None:
    keys(
        saved, ("attributes", "steps", "records", *(["further"] if new else [])), "log", ["further"]
    )
    must(saved["attributes"], table_of(is_attribute), "log['attributes']")
    must(saved["attributes"].get("resumed", "[]"), _listed, "log['attributes']['resumed']")
    must(saved["steps"], table_of(list_of(is_number), is_whole), "log['steps']")
    must(
        saved["records"],
        table_of(list_of(table_of(list_of(lambda value: True, 2))), is_whole),
        "log['records']",
    )
    if {k: len(v) for k, v in saved["steps"].items()} != {
        k: len(v) for k, v in saved["records"].items()
    }:
        raise wrong("the log has other numbers of steps and of records")
    if not saved["steps"] or not all(saved["steps"].values()):
        raise wrong("the log has no record")
    for record in (r for records in saved["records"].values() for r in records):
        for name, (dims, values) in record.items():
            must(dims, list_of(is_text), f"dimensions of {name} in the log")
            must(values, nested_numbers(len(dims)), f"{name} in the log")
    must(saved.get("further", {}), table_of(table_of(_track), is_whole), "log['further']")


def _listed(value: Any) -> bool:
    return isinstance(json.loads(value), list)


def _track(value: Any) -> bool:
    """Return whether a value is a track: places along an axis, and as many values."""
    if not (
        table_of(lambda part: True)(value)
        and set(value) == {"places", "values"}
        and list_of(is_number)(value["places"])
    ):
        return False
    size = len(value["places"])

    def good(pair: Any) -> bool:
        return (
            list_of(lambda part: True, 2)(pair)
            and list_of(is_text)(pair[0])
            and is_tensor(pair[1])
            and pair[1].dim() == len(pair[0]) + 1
            and len(pair[1]) == size
        )

    return table_of(good)(value["values"])
