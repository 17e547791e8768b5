"""Frame and Probe: what is looked at, and the functions that look.

They take values and know no loop. A record is ``{variable: (dims, values)}`` without the axis of
steps; the table says each variable's dimensions, long name and unit, and which passes a probe
reads, so that the loop runs the union and nobody runs a pass for itself. Values may be tensors on
the device: who gathers them reads them when it likes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from curvlab.curvature.base import BlockDefaults, CurvatureDefaults, with_defaults
from curvlab.errors import CurvlabError, lookup, several, whole
from curvlab.objective import Objective
from curvlab.observation import Observation, Pass
from curvlab.system import random_state

Numbers = NDArray[np.float64]
ProbeRecord = dict[str, tuple[tuple[str, ...], Numbers]]
Sample = dict[str, Numbers | Tensor]
"""Values {variable: values} that a probe measures, perhaps on the device."""

Command = Literal["compare", "train"]
COMMANDS: tuple[Command, ...] = ("compare", "train")

Moment = Literal["before", "after"]
"""Moment at which a probe measures.

Before the parameters move, when every direction is known; or after the move and what was learnt
from it.
"""


@dataclass(frozen=True)
class Variable:
    """Variable that a probe measures: dimensions without that of steps, long name, unit."""

    dims: tuple[str, ...]
    long_name: str
    units: str
    attributes: Mapping[str, str] = field(default_factory=dict)

    @property
    def said(self) -> dict[str, str]:
        """Attributes of the variable in the log."""
        return {"long_name": self.long_name, "units": self.units, **self.attributes}


@dataclass(frozen=True)
class Frame:
    """One step, as probes see it: in `compare` of all algorithms, in `train` of one, the reference.

    `directions` holds {algorithm: {block: p}} with the reference among them; `seconds` each
    algorithm's own time; `curvatures` {algorithm: its Curvature}. The model's weights are those of
    `now` before the move.
    """

    step: int
    now: Observation
    directions: dict[str, dict[str, Tensor]]
    reference: str
    lr: float
    seconds: Mapping[str, float] = field(default_factory=dict)
    curvatures: Mapping[str, Any] = field(default_factory=dict)

    @property
    def objective(self) -> Objective:
        """Objective that the minibatch was looked at with."""
        return self.now.closure.objective

    @property
    def blocks(self) -> list[str]:
        """Names of the blocks, in the log's order."""
        return [b.name for b in self.objective.blocks]

    def curvature(self, algorithm: str) -> CurvatureDefaults:
        """Return the algorithm's Curvature, completed by defaults.

        Where the frame has none it is of nothing but defaults.
        """
        return with_defaults(self.curvatures.get(algorithm))

    def of_blocks(self, algorithm: str) -> Mapping[str, BlockDefaults]:
        """Return {block: its CurvatureBlock, completed} of an algorithm that is made of blocks.

        Those of the log's blocks that it has, in the log's order; empty for any other method.
        """
        found = self.curvature(algorithm).by_block()
        return {name: found[name] for name in self.blocks if name in found}

    @cached_property
    def gram(self) -> Numbers:
        """Inner products ⟨p_i, p_j⟩ by block, [algorithm, other, block], in float64.

        Every norm and every cosine follows from it.
        """
        grams = []
        for block in self.blocks:
            rows = torch.stack([d[block].flatten() for d in self.directions.values()]).double()
            grams.append(rows @ rows.T)
        return np.asarray(torch.stack(grams, -1).cpu().numpy())

    @property
    def place(self) -> int:
        """Place of the reference among the algorithms, from 0."""
        return list(self.directions).index(self.reference)

    @cached_property
    def shared(self) -> dict[str, Any]:
        """Results that several probes of this step share, computed once."""
        return {}

    def once(self, key: str, make: Callable[[], Any]) -> Any:
        """Return `make()`, run by whoever asks first for this key."""
        if key not in self.shared:
            self.shared[key] = make()
        return self.shared[key]


@dataclass(frozen=True, kw_only=True)
class ByEpoch:
    """Summary of an epoch that a probe gives in `train`.

    Args:
        epoch: the variables.
        reduce: {variable: its samples of the epoch, [sample, …]} → their values.
    """

    epoch: Mapping[str, Variable] = field(default_factory=dict)
    reduce: Callable[[Mapping[str, Numbers]], Mapping[str, Numbers]] | None = None


@dataclass(frozen=True, kw_only=True)
class Ahead:
    """Work that a probe does before it measures.

    Args:
        begin: is shown every curvature before a step that is sampled.
        prepare: is shown the frame before the move, where the moment is after it.
    """

    begin: Callable[[Any], None] | None = None
    prepare: Callable[[Frame], None] | None = None


@dataclass(frozen=True, kw_only=True)
class Fit:
    """Methods of which a probe sees something.

    Args:
        fits: whether there is something to see in a curvature.
        wants: what that is, in words.
    """

    fits: Callable[[Any], bool] = lambda curvature: True
    wants: str = ""


@dataclass(frozen=True)
class Probe:
    """One entry of PROBES: variables, and the function of a frame that measures them.

    Args:
        summary: what it sees, in a line.
        variables: {name: its dimensions, long name and unit}.
        measure: frame → {variable: values}.
        needs: passes that it reads.
        where: the commands that have it.
        moment: when it measures.
        every: steps between samples where none is asked for.
        again: whether it runs the model again.
        coordinates: {dimension of its own: labels}.
        by_epoch: what it says of an epoch.
        ahead: what it does before it measures.
        fit: of which methods it sees something.
    """

    summary: str
    variables: dict[str, Variable]
    measure: Callable[[Frame], Sample]
    needs: frozenset[Pass] = frozenset()
    where: tuple[Command, ...] = COMMANDS
    moment: Moment = "before"
    every: int = 1
    again: bool = False
    coordinates: Mapping[str, Sequence[str]] = field(default_factory=dict)
    by_epoch: ByEpoch = field(default_factory=ByEpoch)
    ahead: Ahead = field(default_factory=Ahead)
    fit: Fit = field(default_factory=Fit)

    @property
    def epoch(self) -> Mapping[str, Variable]:
        """Variables of an epoch, as of `ByEpoch`."""
        return self.by_epoch.epoch

    @property
    def reduce(self) -> Callable[[Mapping[str, Numbers]], Mapping[str, Numbers]] | None:
        """Function that makes an epoch's values of its samples, as of `ByEpoch`."""
        return self.by_epoch.reduce

    @property
    def begin(self) -> Callable[[Any], None] | None:
        """Function that is shown every curvature before a sampled step, as of `Ahead`."""
        return self.ahead.begin

    @property
    def prepare(self) -> Callable[[Frame], None] | None:
        """Function that is shown the frame before the move, as of `Ahead`."""
        return self.ahead.prepare

    @property
    def fits(self) -> Callable[[Any], bool]:
        """Function that says whether there is something to see in a curvature, as of `Fit`."""
        return self.fit.fits

    @property
    def wants(self) -> str:
        """Words for what there must be to see, as of `Fit`."""
        return self.fit.wants

    def record(self, frame: Frame) -> ProbeRecord:
        """Measure a frame and return the values on the host, with their dimensions."""
        return {
            name: (self.variables[name].dims, on_host(v)) for name, v in self.measure(frame).items()
        }


PROBES: dict[str, Probe] = {}

_GROUPS: dict[str, type[ByEpoch | Ahead | Fit]] = {"by_epoch": ByEpoch, "ahead": Ahead, "fit": Fit}


def probe(
    name: str, summary: str, variables: dict[str, Variable], **declared: Any
) -> Callable[
    [Callable[[Frame], Sequence[Numbers | Tensor]]], Callable[[Frame], Sequence[Numbers | Tensor]]
]:
    """Enter a function of a frame into PROBES.

    It returns one array for each of `variables`, in their order.

    Args:
        name: of the probe.
        summary: what it sees, in a line.
        variables: {name: its dimensions, long name and unit}.
        declared: the further fields of `Probe`, those of `ByEpoch`, `Ahead` and `Fit` by their own
            names.
    """
    for group, kind in _GROUPS.items():
        flat = {f.name: declared.pop(f.name) for f in fields(kind) if f.name in declared}
        declared.setdefault(group, kind(**flat))

    def enter(
        function: Callable[[Frame], Sequence[Numbers | Tensor]],
    ) -> Callable[[Frame], Sequence[Numbers | Tensor]]:
        def measure(frame: Frame) -> Sample:
            return dict(zip(variables, function(frame), strict=True))

        PROBES[name] = Probe(summary, variables, measure, **declared)
        return function

    return enter


def on_host(values: Numbers | Tensor) -> Numbers:
    """Return the values as a NumPy array on the host; those of a tensor in float64."""
    return np.asarray(values.double().cpu().numpy() if isinstance(values, Tensor) else values)


def begin_step(names: Sequence[str], curvatures: Mapping[str, Any]) -> None:
    """Prepare curvatures for a step in which these probes are taken."""
    for name in names:
        for curvature in curvatures.values():
            start = PROBES[name].begin
            if start is not None:
                start(curvature)


def sample(names: Sequence[str], frame: Frame, moment: Moment) -> dict[str, Sample]:
    """Return {probe: what it measures} of those whose moment it is.

    Chance is left as it was; an error says which probe it was.
    """
    found: dict[str, Sample] = {}
    device = frame.now.loss.device
    for name in names:
        one = PROBES[name]
        work = one.measure if one.moment == moment else one.prepare if moment == "before" else None
        if work is None:
            continue
        try:
            with random_state.kept(device) if one.again else nullcontext():
                seen = work(frame)
        except CurvlabError as error:
            raise type(error)(f"probe '{name}': {error}") from error
        if seen is not None:
            found[name] = seen
    return found


def select_probes(names: Sequence[str], command: Command | None = None) -> dict[str, Probe]:
    """Return the probes of these names.

    Raises CurvlabError for an unknown one, or one that `command` does not have.
    """
    found = {name: lookup(PROBES, name, "probe") for name in several(names)}
    for name, one in found.items():
        if command is not None and command not in one.where:
            there = [n for n, p in PROBES.items() if command in p.where]
            raise CurvlabError(
                f"probe '{name}' is of curvlab {one.where[0]} alone ({command} has"
                f" {', '.join(there)})"
            )
    return found


def asked(words: Sequence[str], command: Command) -> dict[str, int | None]:
    """Read "name" and "name:every" as {name: every, None where it is left to the probe}.

    Raises:
        CurvlabError: an unknown probe, one that `command` does not have, one given twice, a bad
            number of steps.
    """
    found: dict[str, int | None] = {}
    for word in several(words):
        name, colon, every = word.partition(":")
        select_probes([name], command)
        if name in found:
            raise CurvlabError(f"probe '{name}' is given twice")
        if colon and not (
            every.isascii() and every.isdigit() and len(every) < 40 and int(every) > 0
        ):
            raise CurvlabError(
                f"probe '{word}': after the colon comes a number of steps, 1 or more, as in"
                f" {name}:10"
            )
        found[name] = whole(f"the number of steps of probe '{name}'", int(every)) if colon else None
    return found


def check_probes(names: Sequence[str], curvatures: Mapping[str, Any]) -> None:
    """Raise CurvlabError for a probe that has nothing to see in any of {algorithm: curvature}."""
    for name in names:
        one = PROBES[name]
        if not any(one.fits(c) for c in curvatures.values()):
            raise CurvlabError(
                f"probe '{name}' needs {one.wants}, and there is {', '.join(curvatures)} alone:"
                " leave it out"
            )


def axis(name: str) -> str:
    """Return the name of a probe's own dimension of steps, where it has one."""
    return f"{name}_step"


def taken(names: Sequence[str]) -> dict[str, dict[str, str]]:
    """Return {variable: attributes in the log} of these probes and their own axes."""
    found = {
        v: spec.said
        for n in names
        for v, spec in {**PROBES[n].variables, **PROBES[n].epoch}.items()
    }
    return found | {
        axis(n): {"long_name": f"steps done when probe {n} was taken", "units": "1"} for n in names
    }


def labels(names: Sequence[str]) -> dict[str, list[str]]:
    """Return {dimension: labels} of these probes' own dimensions."""
    return {dim: list(found) for n in names for dim, found in PROBES[n].coordinates.items()}


def empty(name: str, sizes: Mapping[str, int]) -> dict[str, Numbers]:
    """Return the epoch's variables of a probe before there is a sample: NaN."""
    sizes = {**sizes, **{dim: len(found) for dim, found in PROBES[name].coordinates.items()}}
    return {
        v: np.full([sizes[d] for d in spec.dims], np.nan) for v, spec in PROBES[name].epoch.items()
    }
