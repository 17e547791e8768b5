"""A later look at a minibatch sees what the first saw.

It has the random numbers that the first drew, and the buffers as they were before it.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from curvlab.derivatives import derivatives
from curvlab.draws_by_part import DrawsByPart
from curvlab.errors import CurvlabError
from curvlab.fingerprint import numbers
from curvlab.system import random_state

if TYPE_CHECKING:
    from curvlab.objective import Objective


class SecondLooks:
    """The part of a closure that remembers generators and buffers, and puts them back."""

    objective: Objective
    x: Tensor  # or a `Nest`, which stands where a tensor would

    def __init__(self) -> None:
        self._chance: Any = None  # what the generators were before the first look
        self._generators: dict[torch.Generator, Tensor] = {}  # likewise, the model's own
        self._buffers: dict[str, Tensor] | None = None  # likewise, its buffers
        self._seen: tuple[Tensor, int] | None = (
            None  # outputs of the last look, and how often weights were written to by then
        )
        self._restless = 0.0  # how far two looks differ though nothing moved
        # (examples, generators before them) of minibatches that were looked at one by one before
        self.parts: Sequence[tuple[int, random_state.Chance]] = ()
        self._by_part: DrawsByPart | None = None  # of the last look

    def _forward(self, x: Tensor, buffers: dict[str, Tensor] | None = None) -> Tensor:
        raise NotImplementedError

    def _versions(self) -> int:
        """Return how often the weights were written to, but for what goes by `.data`."""
        return sum(p._version for p in self.objective.parameters.values())

    def _weights(self) -> tuple[int, Tensor]:
        """Return `_versions`, and a checksum of the weights, which shows `.data` written to."""
        return self._versions(), numbers(self.objective.parameters.values())

    def _stands(self, versions: int, weights: Tensor) -> bool:
        """Return whether the weights are what they were at `_weights`."""
        return versions == self._versions() and torch.equal(weights, self._weights()[1])

    def weights_moved(self) -> None:
        """Take it that the weights are others now, though no write to them was counted."""
        self._seen = None

    def follow(self, other: SecondLooks) -> None:
        """Look from where another minibatch's first look began, and use up no random number."""
        self._chance, self._generators = other._chance, dict(other._generators)
        self._buffers = other._buffers

    def put_back(self) -> None:
        """Set the model's own generators to what they were before the first look."""
        for generator, state in self._generators.items():
            generator.set_state(state)

    def _check_restless(self) -> None:
        """Raise CurvlabError where two looks are known to differ."""
        if self._restless:
            raise CurvlabError(_RESTLESS.format(self._restless))

    def _own_buffers(self, own: bool) -> dict[str, Tensor] | None:
        """Return copies of the model's buffers for one look to write on.

        They are as they were before the first look at this minibatch.
        """
        if not any(module._buffers for module in self.objective.modules):
            return None
        if own and self._buffers is None:
            self._buffers = {name: b.clone() for name, b in self.objective.model.named_buffers()}
        held = self._buffers if own else dict(self.objective.model.named_buffers())
        assert held is not None
        return {name: b.clone() for name, b in held.items()}

    def _check_steady(self, z: Tensor, key: Hashable) -> None:
        """Find, once a form, whether a second look is the first."""
        if key not in self.objective.steady:
            self.objective.steady[key] = _apart(self._repeated(), z.detach())
        self._restless = self.objective.steady[key]

    def _repeated(self) -> Tensor:
        """Return the outputs of one more look, with all random numbers and buffers put back."""
        with derivatives(), torch.no_grad(), self._same_chance(True):
            return self._forward(self.x, self._own_buffers(True))

    def _check_same(self, z: Tensor) -> None:
        """Raise CurvlabError where two looks differ although no weight was written to.

        A third tells chance from what was written to unseen: weights by `.data`, or buffers. To
        know that every look would have to make a checksum.
        """
        seen, self._seen = self._seen, (z.detach(), self._versions())
        if seen is not None and seen[1] == self._seen[1] and seen[0].shape == z.shape:
            apart = _apart(z.detach(), seen[0])
            if apart:
                restless = _apart(self._repeated(), z.detach())
                raise CurvlabError((_RESTLESS if restless else _MOVED).format(apart))

    def drew_as_one(self) -> bool:
        """Return whether the last look drew random numbers that are not those of the parts."""
        if self._by_part is None or self._by_part.missed or self._generators:
            return self._drew() or bool(self._generators)
        return isinstance(self._chance, random_state.Chance) and random_state.drawn_by_hosts(
            self._chance
        )

    def _drew(self) -> bool:
        return isinstance(self._chance, random_state.Chance) and random_state.drawn_since(
            self._chance, self.x.device
        )

    @contextmanager
    def _same_chance(self, own: bool, quiet: bool = False) -> Iterator[None]:
        """Put the generators as they were at the first look, inside.

        At the first look they are remembered, but where the model is known to draw nothing.
        """
        device = self.x.device
        if not own or self._chance is None:
            if own:
                self._chance = QUIET if quiet else random_state.states(device)
            with self._drawing(own and not quiet):
                yield
            return
        if not isinstance(self._chance, random_state.Chance):
            yield
            return
        # set to what they were before the first look, so that dropout draws the same masks; put
        # back after, so that the next step draws what it would have drawn without a second look
        now = {generator: generator.get_state() for generator in self._generators}
        for generator, state in self._generators.items():
            generator.set_state(state)
        try:
            with random_state.replayed(self._chance, device), self._drawing(True):
                yield
        finally:
            for generator, state in now.items():
                generator.set_state(state)

    def _drawing(self, wanted: bool) -> AbstractContextManager[Any]:
        """Let each part draw its own random numbers, where there are parts."""
        if not wanted or not self.parts:
            return nullcontext()
        self._by_part = DrawsByPart(self.parts, self.x.device)
        return self._by_part


def _apart(one: Tensor, other: Tensor) -> float:
    """Return the relative distance of two looks' outputs; 0 where it is rounding."""
    if one.shape != other.shape:
        return math.inf
    apart, size = float((one - other).norm()), float(other.norm())
    near = torch.finfo(other.dtype).eps ** 0.5 * size
    if not apart > near:  # nor NaN, which the loss will say
        return 0.0
    return apart / size if size else math.inf


_RESTLESS = (
    "two looks at one minibatch differ (by a relative {:.2g}) though nothing was moved: the model"
    " draws random numbers, or counts, in a way that cannot be put back; let it draw by a global"
    " generator (torch, random, numpy) or a torch.Generator"
)
_MOVED = (
    "two looks at one minibatch differ (by a relative {:.2g}) though no weight is known to have"
    " moved: weights were written to by .data, which torch does not count (write under"
    " torch.no_grad(), and not by .data), or the first look moved buffers (give it"
    " move_buffers=False)"
)
QUIET = "no random number is drawn"
