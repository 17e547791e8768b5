"""What a comparison does: its settings, the descents, and the empty log.

Objective and batches are beside them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from curvlab.algorithms import check_rates, damping_for, descent, find_algorithm, followed
from curvlab.errors import CurvlabError, whole
from curvlab.likelihoods.base import mean_per
from curvlab.logs.log import Log
from curvlab.objective import Objective
from curvlab.optim import Descent
from curvlab.probes.base import PROBES, asked, labels, taken
from curvlab.published import FIGURE_4_1
from curvlab.units import Unit, kind_per

ALWAYS = ("cosine", "gram", "loss", "norms", "time", "lambda", "shift")
"""The probes of every comparison."""

_SHARED = ("momentum", "decay", "update_every", "refresh_every")


@dataclass(frozen=True, kw_only=True)
class CompareSettings:
    """The settings of a comparison, beside objective and batches.

    Defaults: the published picture (thesis Figure 4.1, practice).

    `probes` are further ones beside `ALWAYS`, each as "name" or "name:every".

    `unit` is whose gradients empirical Fisher matrices square (block-ef, kfac-ef, smw-ng): those of
    examples, "sequence", or of single places of the loss, "token".

    `momentum` is every method's β; None gives each its document's. `decay` None gives each its
    document's (0.9; Adam's β₂ 0.999). `damping` is the overall λ, from which each method's own
    follows by one rule (`algorithms.damping_for`).
    """

    reference: str = "block-fisher"
    algorithms: tuple[str, ...] = FIGURE_4_1
    lr: float | None = None
    damping: float = 1e-3
    momentum: float | None = 0.9
    decay: float | None = None
    update_every: int = 1
    refresh_every: int = 1
    log_every: int = 1
    probes: tuple[str, ...] = ()
    unit: Unit = "sequence"

    @property
    def names(self) -> tuple[str, ...]:
        """The reference, then the others, each once."""
        return tuple(dict.fromkeys((self.reference, *self.algorithms)))

    def check(self) -> None:
        """Check names and ranges, before anything runs.

        Raises:
            CurvlabError: an unknown name or a value out of range.
        """
        for name in (self.reference, *self.algorithms):
            find_algorithm(name)
        for name, every in asked(self.probes, "compare").items():
            if name in ALWAYS and every is not None:
                raise CurvlabError(
                    f"probe '{name}' is a part of every record of a comparison: say how often by"
                    " log_every"
                )
        kind_per("ef", self.unit)
        for name in ("update_every", "refresh_every", "log_every"):
            whole(name, getattr(self, name))
        check_rates(self.lr, self.damping, self.momentum, self.decay)
        damping_for(self.reference, self.damping, 1)

    @property
    def every(self) -> dict[str, int]:
        """Steps between samples of each probe, its own, but the log's where that is 1."""
        wanted = dict.fromkeys(ALWAYS) | asked(self.probes, "compare")
        own = {name: every or PROBES[name].every for name, every in wanted.items()}
        return {
            n: self.log_every if wanted[n] is None and every == 1 else every
            for n, every in own.items()
        }

    @property
    def rate(self) -> float:
        """The reference's learning rate, `lr`, or its document's where that is None."""
        return find_algorithm(self.reference).lr if self.lr is None else self.lr

    def dampings(self, size: int) -> dict[str, float]:
        """Return {algorithm: its document's own damping} at batches of `size` examples."""
        return {name: damping_for(name, self.damping, size) for name in self.names}

    def descents(self, objective: Objective, size: int) -> dict[str, Descent]:
        """Build {algorithm: its descent}, each damped for batches of `size` examples."""
        shared = {name: getattr(self, name) for name in _SHARED}
        return {
            name: descent(name, objective)
            if (entry := find_algorithm(name)).foreign
            else descent(
                name,
                objective,
                damping=damping,
                weight_decay=0.0,
                labels=entry.labels_per(self.unit),
                **shared,
                **entry.fixed,
            )
            for name, damping in self.dampings(size).items()
        }

    def log(
        self,
        objective: Objective,
        size: int,
        path: Path | None,
        seeds: Sequence[int],
        about: dict[str, Any],
    ) -> Log:
        """Make the empty log of a comparison; its attributes are the settings' and `about`."""
        chosen = list(self.every)
        coordinates: dict[str, Any] = {
            "algorithm": self.names,
            "other": self.names,
            "block": [b.name for b in objective.blocks],
        }
        coordinates = {k: list(v) for k, v in (coordinates | labels(chosen)).items()}
        coordinates["parameters"] = ("block", [" ".join(b.params) for b in objective.blocks])
        settings = {name: getattr(self, name) for name in self.__dataclass_fields__}
        attributes = {
            "title": f"curvlab compare: directions against {self.reference}",
            "reference": self.reference,
            "settings": settings,
            "dampings": self.dampings(size),
            "lr": self.rate,
            "batch_size": size,
            "seed": list(seeds) if len(seeds) > 1 else seeds[0],
            "device": str(objective.device),
            "dtype": str(objective.dtype).removeprefix("torch."),
            "loss_per": mean_per(objective.likelihood),
            "ef_unit": self.unit,
        }
        attributes |= followed({name: {} for name in self.names}, objective)
        return Log(coordinates, taken(chosen), attributes | about, path, seeds)
