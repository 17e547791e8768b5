"""Momentum of the gradient, of the kinds that the documents have."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from curvlab.curvature.mixing import Mix
from curvlab.errors import unknown
from curvlab.groups import check_momentum
from curvlab.system.memory import portions

MomentumKind = Literal["add", "average", "corrected", "nesterov", "directions"]
"""m ← β m + g (thesis chapters 3 and 4); m ← β m + (1 − β) g (chapter 2); the average divided by 1
− βᵏ (Adam); the average, of which β m + (1 − β) g is followed once more (Muon); m ← β m + H g, of
directions in place of gradients, as where torch's SGD is given preconditioned gradients.
"""


class Momentum:
    """Momentum of the gradient, one buffer a block, starting at zero.

    β = 0 is the gradient itself.

    Args:
        beta: β.
        kind: see `MomentumKind`.
    """

    def __init__(self, beta: float, kind: MomentumKind = "add") -> None:
        check_momentum(beta)
        if kind not in get_args(MomentumKind):
            raise unknown("kind of momentum", kind, get_args(MomentumKind))
        self.beta, self.kind = beta, kind
        self.buffers: dict[str, Tensor] = {}
        self.steps = 0
        self.mix: Mix | None = None  # of the last call; None: it was of another kind

    @property
    def of_directions(self) -> bool:
        """Whether it is of what the curvature has made of the gradients."""
        return self.kind == "directions"

    @property
    def held(self) -> tuple[dict[str, Tensor], int]:
        """What `put_back` takes; no number is copied, since none is written over."""
        return dict(self.buffers), self.steps

    def put_back(self, held: tuple[dict[str, Tensor], int]) -> None:
        """Put the buffers back: a step that came to nothing leaves no trace."""
        self.buffers, self.steps = dict(held[0]), held[1]

    def __call__(self, gradients: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the momentum of every block, into which its gradient has entered."""
        self.steps += 1
        if self.beta == 0:
            self.buffers = dict(gradients) if self.buffers else {}  # β may come back: a schedule's
            self.mix = Mix(0.0, 1.0, 1.0, self.steps)
            return gradients
        new = 1.0 if self.kind in ("add", "directions") else 1 - self.beta
        divisor = 1 - self.beta**self.steps if self.kind == "corrected" else 1.0
        known_mix = self.kind not in ("nesterov", "directions")
        self.mix = Mix(self.beta, new, divisor, self.steps) if known_mix else None
        if self.kind == "nesterov":
            found = dict[str, Tensor]()
            for some in portions(gradients.items(), lambda item: item[1]):
                names, each = [name for name, _ in some], [g for _, g in some]
                self._enter(dict(some), new)
                ahead = torch._foreach_lerp(each, [self.buffers[n] for n in names], self.beta)
                found |= dict(zip(names, ahead, strict=True))
            return found
        self._enter(gradients, new)
        if divisor == 1:  # of "corrected" too, after 350 steps of β = 0.9
            return dict(self.buffers)
        corrected = torch._foreach_div(list(self.buffers.values()), divisor)
        return dict(zip(self.buffers, corrected, strict=True))

    def _enter(self, gradients: dict[str, Tensor], new: float) -> None:
        """Let gradients enter their blocks' buffers with this weight."""
        known = [name for name in gradients if name in self.buffers]
        if known:
            old, each = [self.buffers[n] for n in known], [gradients[n] for n in known]
            moved = (
                torch._foreach_add(each, old, alpha=self.beta)
                if self.kind in ("add", "directions")
                else torch._foreach_lerp(old, each, new)
            )
            self.buffers |= dict(zip(known, moved, strict=True))
        self.buffers |= {n: g * new for n, g in gradients.items() if n not in self.buffers}
