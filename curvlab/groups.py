"""Parameter groups: what they may say and hold, and whether blocks are what a model trains.

Nothing here is left out without a word: an option or a tensor that an optimizer could not act on is
refused by name.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from curvlab.curvature.base import check_damping
from curvlab.errors import CurvlabError, real, unknown
from curvlab.objective import Objective

Group = dict[str, Any]

OPTIONS = ("lr", "damping", "momentum", "weight_decay")
"""The options of a parameter group."""

SHARED = ("damping", "momentum")
"""The options that are the same in every group."""

_OF_SCHEDULERS = ("initial_lr", "max_lr", "min_lr", "max_momentum", "base_momentum", "swa_lr")
"""Entries that torch's schedulers write beside them."""


def complete(groups: Iterable[Group], defaults: Mapping[str, Any]) -> None:
    """Give the groups, which somebody else may have made, the options that they lack."""
    for group in groups:
        for option in OPTIONS:
            group.setdefault(option, defaults[option])


def check_known(group: Group) -> None:
    """Raise CurvlabError for an option that nothing reads, with those that are known."""
    known = (*OPTIONS, *_OF_SCHEDULERS)
    for option in group:
        if option not in (*known, "params", "param_names"):
            raise unknown("option of a parameter group", option, known)


def check_momentum(beta: float) -> None:
    """Raise CurvlabError where β is not between 0 and 1."""
    real("momentum", beta, "at least 0 and below 1", lambda v: 0 <= v < 1)


def check_weight_decay(rate: float) -> None:
    """Raise CurvlabError where γ is negative, infinite or NaN."""
    real("weight decay", rate)


def check_options(groups: Sequence[Group]) -> None:
    """Raise CurvlabError where an option of the groups is out of range.

    It is raised, too, where groups differ in what is one for all: damping and momentum.
    """
    for option in SHARED:
        first = float(groups[0][option]) if groups else 0.0
        for number, group in enumerate(groups[1:], 1):
            if float(group[option]) != first:
                raise CurvlabError(
                    f"parameter groups 0 and {number} have {option} {first:g} and"
                    f" {float(group[option]):g}: it is one for all, set it to the same value in"
                    " every group"
                )
    for group in groups:
        check_damping(float(group["damping"]))
        check_momentum(float(group["momentum"]))
        check_weight_decay(float(group["weight_decay"]))


def check_owned(objective: Objective, params: Iterable[Any]) -> None:
    """Raise CurvlabError for a tensor that is no parameter of the objective's blocks.

    Args:
        objective: whose blocks.
        params: tensors, or pairs of a name and a tensor.
    """
    owned = frozenset(map(id, objective.parameters.values()))
    for entry in params:
        name, tensor = entry if isinstance(entry, tuple) else ("", entry)
        if isinstance(tensor, Tensor) and id(tensor) not in owned:
            names = {id(p): n for n, p in objective.model.named_parameters()}
            name = names.get(id(tensor), name)
            what = f"parameter '{name}'" if name else f"a tensor of shape {list(tensor.shape)}"
            raise CurvlabError(
                f"{what} in a parameter group belongs to no block of this optimizer's objective: "
                "put it into the model, trainable, and make a new Objective and optimizer"
            )


class Ownership:
    """The check that every parameter that is trainable now belongs to a block of the objective.

    It is cheap where nothing has changed.
    """

    def __init__(self, objective: Objective) -> None:
        self.objective = objective
        self.ids: frozenset[int] = frozenset()
        """Ids of the parameters of the blocks, as of the last `check`."""
        self._kind: tuple[torch.dtype, torch.device] | None = None
        self._held: Sequence[nn.Parameter] = ()  # so that no id is given again
        self._seen: list[tuple[int, bool]] = []
        self._modules: list[nn.Module] = []
        self._children: list[nn.Module | None] | None = None

    def check(self) -> None:
        """Look at the model's parameters.

        Raises:
            CurvlabError: some belong to no block: thawed, or put into the model, later. It has
                their names.
        """
        # a walk through the model takes ten times as long; what is new hangs on one of these
        held, children = self._look()
        if children != self._children:
            self._modules = list(self.objective.model.modules())
            held, children = self._look()
        seen = [(id(p), p.requires_grad) for p in held]
        if seen == self._seen and children == self._children:
            return
        self.objective.check_modules()
        ids = frozenset(map(id, self.objective.parameters.values()))
        loose = [
            n
            for n, p in self.objective.model.named_parameters()
            if p.requires_grad and id(p) not in ids and p.numel()
        ]
        if loose:
            more = f" and {len(loose) - 3} more" if len(loose) > 3 else ""
            raise CurvlabError(
                f"parameters {', '.join(loose[:3])}{more} are trainable but belong to no block of"
                " this objective, which was made before they were: make a new Objective, and a new"
                " optimizer of it"
            )
        self.ids, self._held, self._seen, self._children = ids, held, seen, children

    def check_kind(self) -> None:
        """Raise CurvlabError where dtype or device are not those of the first call."""
        now = self.objective.dtype, self.objective.device
        self._kind = self._kind or now
        if self._kind != now:
            old, new = (f"{str(t).removeprefix('torch.')} on {d}" for t, d in (self._kind, now))
            raise CurvlabError(
                f"the model is {new} now, but was {old} at this optimizer's first step: make the"
                " optimizer again after model.double() or model.to(…)"
            )

    def _look(self) -> tuple[list[nn.Parameter], list[nn.Module | None]]:
        """Return parameters and children of all modules that were there at the last check."""
        held = [p for m in self._modules for p in m._parameters.values() if p is not None]
        return held, [child for m in self._modules for child in m._modules.values()]

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Return the ownership of the copied model, whose parameters are others."""
        return type(self)(copy.deepcopy(self.objective, memo))
