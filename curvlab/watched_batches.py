"""Minibatches that a watched loop was handed, and which of them a call of its model is on.

A loop may ask for a minibatch before it has stepped on the last one (prefetching), leave one out,
or call its model on a part of one. What the model was called on says which one a step is of.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from curvlab.derivatives import around
from curvlab.model_state import ModelState
from curvlab.nests import copied, leaves
from curvlab.objective import Objective
from curvlab.system.random_state import Chance, states

AHEAD = 2
"""How many minibatches a loop may be handed before it calls its model on the first of them."""


@dataclass(frozen=True)
class Surroundings:
    """What stands at a call of the model, beside its weights and inputs.

    Args:
        chance: the global generators.
        state: of the model.
        cast: autocast around the call, (type of device, dtype).
    """

    chance: Chance
    state: ModelState
    cast: tuple[str, torch.dtype] | None

    @classmethod
    def of(cls, objective: Objective) -> Surroundings:
        """Return what stands now."""
        return cls(states(objective.device), ModelState(objective.model), around())


@dataclass(eq=False)
class Handed:
    """A minibatch that the loop was handed, and what is known of the model's call on it.

    Args:
        x: inputs.
        y: targets.
        final: whether the inputs are as the model takes them, whatever it is called with.
        surroundings: what stood at the first call, or when it was handed.
        calls: (examples, what stood) of each call of the model on it, or on a part of it, in order.
        idle: whether the gradients were gone when the next one was handed.
        part: whether the model was called on a part of it.
        origin: the inputs as they were handed.
    """

    x: Any
    y: Any
    final: bool
    surroundings: Surroundings
    idle: bool = False
    part: bool = False
    calls: list[tuple[int, Surroundings]] = field(default_factory=list)
    origin: Any = None


class HandedBatches:
    """The minibatches of a step that is looked at, and the last ones that no step was on yet.

    Args:
        read: inputs and targets as the loop has them → as the objective does, and whether the
            inputs are final.
        surroundings: returns what stands.
    """

    def __init__(
        self,
        read: Callable[[Any, Any], tuple[Any, Any, bool]],
        surroundings: Callable[[], Surroundings],
    ) -> None:
        self.read, self.surroundings = read, surroundings
        self.called: list[Handed] = []
        """Those that the model was called on, in the order of the calls."""
        self.waiting: list[Handed] = []
        """Those that it was not called on, or not heard of."""
        self._ahead: deque[Callable[[], tuple[Any, Any, bool]]] = deque(maxlen=AHEAD)

    def __len__(self) -> int:
        return len(self.called) + len(self.waiting)

    def hand(self, x: Any, y: Any) -> None:
        """Take a minibatch for the step that is next looked at."""
        self.waiting.append(Handed(*self.read(x, y), self.surroundings()))

    def keep_ahead(self, x: Any, y: Any) -> None:
        """Keep what is handed while no look is due: the step that is looked at may be on it."""
        self._ahead.append(partial(self.read, x, y))

    def knows(self, inputs: Any) -> bool:
        """Return whether the model was called on these very inputs before, in this step."""
        return any(_are(h.origin, inputs) and _equal(h.x, inputs) for h in self.called)

    def of_call(self, inputs: Any) -> Handed | None:
        """Return the minibatch that the model is called on, where it is its first call.

        It is the one that has these inputs; or else (they are of other values than the loader's, or
        a part) the last that was handed.

        Args:
            inputs: of the call; None where they are no plain ones.
        """
        for alike in (_are, _equal):
            for handed in reversed(self.waiting):
                if alike(handed.x, inputs):
                    return handed
        if any(_are(h.origin, inputs) or _equal(h.x, inputs) for h in self.called):
            return None
        if self.called and self.called[-1].part and self._goes_on(self.called[-1], inputs):
            return None
        for one in reversed(self._ahead):
            x, y, final = one()
            if _are(x, inputs) or _equal(x, inputs):
                self._ahead.remove(one)
                return Handed(x, y, final, self.surroundings())
        return self.waiting[-1] if self.waiting else None

    def call(self, handed: Handed, inputs: Any) -> None:
        """Take the inputs as the model is given them now, and the generators as they stand.

        Inputs of another number of examples than the targets are a part of the minibatch, which
        stays as it was handed.
        """
        self.waiting = [h for h in self.waiting if h is not handed]
        self.called.append(handed)
        if inputs is not None:
            handed.part = _length(inputs) != _length(handed.y) == _length(handed.x)
        x = handed.x if handed.final or handed.part or inputs is None else inputs
        handed.origin, handed.x, handed.y = handed.x, copied(x), copied(handed.y)
        handed.surroundings = self.surroundings()
        handed.calls = [(_length(inputs if handed.part else handed.x) or 0, handed.surroundings)]

    def _goes_on(self, handed: Handed, inputs: Any) -> bool:
        """Note a call on the next part of a minibatch; return whether it is one."""
        start = sum(size for size, _ in handed.calls)
        size = _length(inputs) or 0
        here = [t[start : start + size] if t.ndim else t for t in leaves(handed.x)]
        if not size or not _equal(here, leaves(inputs)):
            return False
        handed.calls.append((size, self.surroundings()))
        return True

    def take(self) -> tuple[list[Handed], bool]:
        """Return those of the step that is done, and whether a step before it was skipped.

        They are those of the model's calls; where none was heard (a functional call), all that were
        handed since the gradients were last seen gone. The rest may be of the next steps.
        """
        found, skipped = self.called, False
        if found:
            for handed in self.waiting:
                self._ahead.append(partial(_as_read, handed))
        else:
            found = [h for h in self.waiting if not h.idle]
            skipped = len(found) < len(self.waiting)
        self.forget()
        return found, skipped

    def forget(self) -> None:
        """Forget what was handed for this step."""
        self.called, self.waiting = [], []

    def close(self) -> None:
        """Forget all of them."""
        self.forget()
        self._ahead.clear()


def _as_read(handed: Handed) -> tuple[Any, Any, bool]:
    return handed.x, handed.y, handed.final


def called_with(args: Sequence[Any], named: Mapping[str, Any], labels: str | int) -> Any:
    """Return the inputs of a model's call as one value; None where they are no plain inputs.

    Args:
        args: by position.
        named: by keyword.
        labels: the key of the targets, which are no inputs.
    """
    rest = {key: value for key, value in named.items() if key != labels}
    if args and not rest:
        return args[0] if len(args) == 1 else tuple(args)
    return rest if rest and not args else None


def _length(tree: Any) -> int | None:
    """Return the number of examples; None where there is no tensor that has them."""
    return next((len(t) for t in leaves(tree) if t.ndim), None)


def _pairs(one: Any, other: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the tensors of both, where there are as many."""
    ours, theirs = leaves(one), leaves(other)
    if len(ours) == len(theirs):
        yield from zip(ours, theirs, strict=True)


def _are(one: Any, other: Any) -> bool:
    """Return whether both hold the same tensors."""
    pairs = list(_pairs(one, other))
    return bool(pairs) and all(a is b for a, b in pairs)


def _equal(one: Any, other: Any) -> bool:
    """Return whether both hold tensors of the same values, on whichever device, of any dtype.

    Sparse and jagged ones are not held against each other.
    """
    pairs = list(_pairs(one, other))
    return bool(pairs) and all(
        a.layout is b.layout is torch.strided
        and a.shape == b.shape
        and torch.equal(a.to(b.device, b.dtype), b)
        for a, b in pairs
    )
