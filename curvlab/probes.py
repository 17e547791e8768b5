"""PROBES: functions of a frame that return what an `xarray.Dataset` takes. They take values and know no loop.

A record is ``{variable: (dims, values)}`` without the step; the table says each variable's dimensions, long name and unit, and
which passes a probe reads, so that the loop runs the union and nobody runs a pass for itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from curvlab.errors import lookup
from curvlab.objective import Observation, Pass

Values = NDArray[np.float64]
Record = dict[str, tuple[tuple[str, ...], Values]]


@dataclass(frozen=True)
class Variable:
    dims: tuple[str, ...]
    long_name: str
    units: str


@dataclass(frozen=True)
class Frame:
    """One step of a comparison, before the move.

    `directions` holds {algorithm: {block: p}} with the reference among them; `seconds` each algorithm's own time; `blocks`
    {algorithm: {block: its CurvatureBlock}} of those that are made of blocks.
    """

    step: int
    now: Observation
    directions: dict[str, dict[str, Tensor]]
    reference: str
    lr: float
    seconds: dict[str, float]
    blocks: Mapping[str, Mapping[str, object]] = field(default_factory=dict)

    @cached_property
    def gram(self) -> Values:
        """⟨p_i, p_j⟩ by block, [algorithm, other, block], in float64: every norm and every cosine follows from it."""
        grams = []
        for block in next(iter(self.directions.values())):
            rows = torch.stack([d[block].flatten() for d in self.directions.values()]).double()
            grams.append(rows @ rows.T)
        return np.asarray(torch.stack(grams, -1).cpu().numpy())

    @property
    def place(self) -> int:
        """The reference's place among the algorithms."""
        return list(self.directions).index(self.reference)


@dataclass(frozen=True)
class Probe:
    summary: str
    variables: dict[str, Variable]
    needs: frozenset[Pass]
    measure: Callable[[Frame], Record]


PROBES: dict[str, Probe] = {}


def probe(
    name: str, summary: str, variables: dict[str, Variable], needs: frozenset[Pass] = frozenset()
) -> Callable[[Callable[[Frame], Sequence[Values]]], Callable[[Frame], Sequence[Values]]]:
    """Enter a function of a frame into PROBES; it returns one array for each of `variables`, in their order."""

    def enter(function: Callable[[Frame], Sequence[Values]]) -> Callable[[Frame], Sequence[Values]]:
        def measure(frame: Frame) -> Record:
            found = function(frame)
            return {v: (spec.dims, np.asarray(x)) for (v, spec), x in zip(variables.items(), found, strict=True)}

        PROBES[name] = Probe(summary, variables, needs, measure)
        return function

    return enter


def select(names: Sequence[str]) -> dict[str, Probe]:
    """The probes of these names. Raises CurvlabError for an unknown one."""
    return {name: lookup(PROBES, name, "probe") for name in names}


def cosines(gram: Values, place: int) -> Values:
    """Cosine of every algorithm to number `place` from inner products [algorithm, other, …]; NaN where a norm is zero."""
    norms = np.sqrt(np.einsum("kk...->k...", gram))
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(gram[:, place] / (norms * norms[place]))


@probe(
    "cosine", "cosine of every direction to the reference's, by block and over all blocks",
    {
        "cosine": Variable(("algorithm", "block"), "cosine similarity to the reference's direction", "1"),
        "cosine_all": Variable(("algorithm",), "cosine similarity to the reference's direction, all blocks together", "1"),
    },
)  # fmt: skip
def _cosine(frame: Frame) -> list[Values]:
    return [cosines(frame.gram, frame.place), cosines(frame.gram.sum(-1), frame.place)]


@probe(
    "gram", "inner products of all directions: any cosine to any of them follows",
    {"gram": Variable(("algorithm", "other", "block"), "inner product of two directions", "parameter²")},
)  # fmt: skip
def _gram(frame: Frame) -> list[Values]:
    return [frame.gram]


@probe("loss", "loss of the minibatch before the step", {"loss": Variable((), "mean loss of the minibatch", "nat")})
def _loss(frame: Frame) -> list[Values]:
    return [np.asarray(float(frame.now.loss))]


@probe(
    "norms", "length of the step that the reference takes",
    {"step_norm": Variable((), "learning rate times the norm of the reference's direction", "parameter")},
)  # fmt: skip
def _norms(frame: Frame) -> list[Values]:
    return [np.asarray(frame.lr * np.sqrt(frame.gram[frame.place, frame.place].sum()))]


@probe(
    "time", "time of every algorithm's own update and direction",
    {"seconds": Variable(("algorithm",), "time of update and direction; shared statistics count for the first to ask", "s")},
)  # fmt: skip
def _time(frame: Frame) -> list[Values]:
    return [np.asarray(list(frame.seconds.values()))]


@probe(
    "shift", "what was added to an indefinite matrix's diagonal, beside the damping",
    {"shift": Variable(("algorithm", "block"), "shift that makes the matrix positive semi-definite", "1")},
)  # fmt: skip
def _shift(frame: Frame) -> list[Values]:
    names = list(next(iter(frame.directions.values())))
    of = [frame.blocks.get(algorithm, {}) for algorithm in frame.directions]
    return [np.asarray([[getattr(blocks.get(name), "shift", 0.0) for name in names] for blocks in of])]
