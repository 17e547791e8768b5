"""What a checkpoint must hold, looked at before anything of it is taken: which keys, of which
kinds, in which shapes.

The seal says that a file is what was written; this says that what was written is a run's.
Statistics are read off their names, which all methods share (`curvature.states` has their shapes);
operators are tried on a vector.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, get_type_hints

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from curvlab.errors import CurvlabError, fitting
from curvlab.groups import check_options
from curvlab.layers import Block
from curvlab.linalg.operators import unpack_operator
from curvlab.objective import Objective
from curvlab.optim import Optimizer
from curvlab.system import random_state
from curvlab.system.random_state import Chance
from curvlab.training.kinds import (
    Test,
    alike,
    attribute,
    count,
    equal,
    flag,
    keys,
    like,
    list_of,
    must,
    nest,
    number,
    numbers,
    or_none,
    plain,
    table_of,
    tensor,
    text,
    whole,
    wrong,
)
from curvlab.training.settings import Budget, Position

_STATISTICS: dict[str, Test] = {
    **dict.fromkeys(("steps", "updates", "draws", "places", "number", "part"), whole),
    **dict.fromkeys(("outputs", "products", "trials"), whole),
    **dict.fromkeys(("damping", "lam", "used", "overall", "shift"), number),
    **dict.fromkeys(("warmed", "ready"), flag),
    **dict.fromkeys(("algorithm", "kind", "stream"), text),
    **dict.fromkeys(("F", "G", "Lambda", "M", "U", "V", "a", "g", "s", "v"), tensor),
    **dict.fromkeys(("active", "core", "factor", "values"), tensor),
    **dict.fromkeys(("A", "S", "Y", "seen", "at", "solution", "start"), or_none(tensor)),
    **dict.fromkeys(("bases", "factors"), list_of(or_none(tensor))),
    **dict.fromkeys(("blocks", "memory", "idle"), table_of(lambda value: True)),
    **dict.fromkeys(("work", "base", "inside"), table_of(lambda value: True)),
    **dict.fromkeys(("trial", "minibatch"), or_none(table_of(lambda value: True))),
    "gradient_norm": or_none(number),
    **dict.fromkeys(("left_out", "pairs_left_out"), count),
    "ages": list_of(whole),
    "widths": list_of(whole),
    "means": or_none(list_of(list_of(tensor))),
    "pairs": or_none(list_of(tensor, 2)),
    "pending": or_none(list_of(tensor, 2)),
    "parts": list_of(table_of(lambda value: True)),
    "x": nest,
    "y": nest,
    "shown": list_of(list_of(lambda value: True)),
}  # fmt: skip
"""{key in a curvature's state: what its value must be}"""

_KEPT = ("F", "G", "M", "v", "means")
"""Statistics that are None before the first data, and never after …"""
_EARLY = (*_KEPT, "a", "active", "g", "s", "y", "Lambda", "U", "V")
"""… and others that are None before."""
_TOGETHER = (
    ("A", "G"),
    ("s", "y"),
    ("S", "Y"),
    ("U", "V"),
    ("U", "Lambda"),
    ("g", "a"),
    ("at", "minibatch"),
    ("at", "trial"),
)
"""Statistics that both are None, or neither."""


def check(state: Mapping[str, Any]) -> None:
    """What can be said without the run. Raises CurvlabError, which says where, for what no run has
    written.
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
    must(settings, table_of(plain), "settings")
    check_named(budget, (Budget,), "budget", whole_of=True)
    for name, value in budget.items():
        must(value, or_none(lambda v: v > 0), f"budget['{name}']")
    must(list(budget.values()), lambda values: any(v is not None for v in values), "budget")
    must(
        state.get("checkpoint_seconds", 1.0),
        lambda value: number(value) and value > 0,
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
    """Raises CurvlabError where a value is not what the field of its name in one of these
    dataclasses must be.
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
    """What the run must have itself. Raises CurvlabError where a state is not one of these; nothing
    of them is changed.

    Args:
        settings: that must be the same. attributes: of the run's log. variables: that its records
            have.
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
            lambda value: tensor(value) and value.shape == shape and value.dtype == torch.float64
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
                text if text(value) else number,
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
            must(saved[name], lambda v, mine=value: like(v, mine), f"model['{name}']")  # type: ignore[misc]  # a default


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
            if name in group and number(value):
                must(
                    group[name],
                    lambda v: number(v) or (tensor(v) and not v.dim()),
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
    must(objective["closures"], table_of(whole), "the objective's closures")
    keys(
        objective["closures"],
        optimizer.objective.closures,
        "the objective's closures",
        more=tuple(objective["closures"]),
    )
    _check_descent(descent, own["curvlab"]["descent"], optimizer.objective.blocks, new)


def _check_descent(saved: Any, own: Mapping[str, Any], blocks: Sequence[Block], new: bool) -> None:
    must(saved, table_of(lambda value: True), "descent")
    keys(saved, own if new else ("curvature", "momentum", "further"), "descent", more=tuple(own))
    momentum, curvature = saved["momentum"], saved["curvature"]
    must(momentum, table_of(lambda value: True), "momentum")
    keys(momentum, ("buffers", "steps"), "momentum")
    must(momentum["steps"], whole, "momentum['steps']")
    for name, found in (("buffers", momentum["buffers"]), ("further", saved["further"])):
        must(found, table_of(tensor), name)
        if found and set(found) != {b.name for b in blocks}:
            raise wrong(f"{name} are of {', '.join(found)}")
    if new:
        must(saved["blocks"], table_of(list_of(whole)), "blocks")
        must(saved["dtype"], text, "dtype")
    must(curvature, table_of(lambda value: True), "curvature")
    must(saved.get("further_left_out", 0), count, "further_left_out")
    if new:
        keys(curvature, own["curvature"], "curvature")
    _check_statistics(curvature, "curvature")
    if curvature.get("ready") and any(curvature.get(key, 0) is None for key in ("rows", "inverse")):
        raise wrong("the curvature lacks its inverse")
    for name in ("trial", "minibatch"):
        if isinstance(curvature.get(name), Mapping):
            keys(curvature[name], ("x", "y", "number", "stream", "part"), name)
    if new and "work" in curvature:
        keys(curvature["work"], own["curvature"]["work"], "work")
    every = curvature.get("blocks")
    if isinstance(every, Mapping):
        _check_blocks(every, {b.name: b.numel for b in blocks}, bool(curvature.get("ready")))
    packed = {f"idle['{name}']": p for name, p in curvature.get("idle", {}).items()} | {
        "inverse": curvature.get("inverse")
    }
    for name, operator in packed.items():
        if operator is not None:
            _try_operator(operator, name)


def _check_blocks(saved: Mapping[str, Any], numels: Mapping[str, int], ready: bool) -> None:
    if saved.keys() != numels.keys():
        return  # said by the curvature, with both
    inverses = [isinstance(b, Mapping) and "inverse" in b for b in saved.values()]
    if any(inverses) and not all(inverses):
        raise wrong("some blocks have an inverse and some have none")
    for name, block in saved.items():
        must(block, table_of(lambda value: True), f"block {name}")
        keys(block, ("memory",), f"block {name}", more=("inverse",))
        memory = block["memory"]
        if ready and any(memory.get(key, 0) is None for key in _KEPT):
            raise wrong(f"block {name} lacks a statistic")
        if (
            ready
            and {"F", "active"} <= set(memory)
            and not _on(memory["F"], memory["active"], numels[name])
        ):
            raise wrong(f"block {name} has a matrix that is not on its active inputs")
        if isinstance(memory.get("S"), Tensor) and len(memory["S"]) != len(memory.get("Y", ())):
            raise wrong(f"block {name} has s and y of different numbers")
        if "inverse" in block:
            _try_operator(block["inverse"], f"the inverse of block {name}")


def _on(F: Tensor, active: Tensor | None, numel: int) -> bool:
    """Whether a second moment is in full, or packed on the pairs of these inputs."""
    if active is None:
        return F.shape == (numel, numel)
    return (
        active.dim() == 1
        and active.dtype == torch.int64
        and len(active) * (len(active) + 1) // 2 == F.shape[1]
    )


def _check_statistics(saved: Any, at: str) -> None:
    """Of a curvature's state, at every depth, by the keys' names. Before the first data a statistic
    is None.
    """
    if isinstance(saved, Mapping):
        for one, two in _TOGETHER:
            if one in saved and two in saved and (saved[one] is None) != (saved[two] is None):
                raise wrong(f"{at} has {one} or {two}, and not both")
        for key, value in saved.items():
            test = _STATISTICS.get(key) if isinstance(key, str) else None
            if test is not None and not (value is None and key in _EARLY):
                must(value, test, f"{at}['{key}']")
            _check_statistics(value, f"{at}['{key}']")
    elif isinstance(saved, list | tuple):
        for i, value in enumerate(saved):
            _check_statistics(value, f"{at}[{i}]")


def _try_operator(packed: Any, what: str) -> None:
    """Raises CurvlabError where what was packed does not act on a vector."""
    try:
        operator = unpack_operator(packed)
        like = next(_tensors(packed), torch.zeros(0))
        v = torch.zeros(len(operator), dtype=like.dtype, device=like.device)
        if (operator @ v).shape != v.shape:
            raise wrong(f"{what} is of another size than it says")
    except CurvlabError:
        raise
    except Exception as error:  # whatever wrong shapes and kinds lead to
        raise wrong(
            f"{what} does not act on a vector: {' '.join(str(error).split())[:120]}"
        ) from error


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _tensors(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _tensors(part)


def _check_chance(states: Mapping[str, Any], name: str, device: torch.device) -> None:
    """Raises CurvlabError for what the random generators do not take, or take for something
    else.
    """
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
    must(saved["attributes"], table_of(attribute), "log['attributes']")
    must(saved["attributes"].get("resumed", "[]"), _listed, "log['attributes']['resumed']")
    must(saved["steps"], table_of(list_of(number), whole), "log['steps']")
    must(
        saved["records"],
        table_of(list_of(table_of(list_of(lambda value: True, 2))), whole),
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
            must(dims, list_of(text), f"dimensions of {name} in the log")
            must(values, numbers(len(dims)), f"{name} in the log")
    must(saved.get("further", {}), table_of(table_of(_track), whole), "log['further']")


def _listed(value: Any) -> bool:
    return isinstance(json.loads(value), list)


def _track(value: Any) -> bool:
    """Along an axis of its own: places, and values as long as they are many."""
    if not (
        table_of(lambda part: True)(value)
        and set(value) == {"places", "values"}
        and list_of(number)(value["places"])
    ):
        return False
    size = len(value["places"])

    def good(pair: Any) -> bool:
        return (
            list_of(lambda part: True, 2)(pair)
            and list_of(text)(pair[0])
            and tensor(pair[1])
            and pair[1].dim() == len(pair[0]) + 1
            and len(pair[1]) == size
        )

    return table_of(good)(value["values"])
