"""What looks at a minibatch show: an `Observation` of one look, a `Transition` between two."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Literal, get_args

from torch import Tensor

from curvlab.errors import CurvlabError
from curvlab.finite import joint_norm
from curvlab.statistics import LayerStatistics

if TYPE_CHECKING:
    from curvlab.closure import Closure

Pass = Literal["plain", "gradient", "data", "model", "exact", "apart", "token"]
"""The vectors that are sent back: ∂ℓ/∂z at the data's labels ("gradient": for the mean gradient
alone; "token": each place of the loss apart), at labels drawn from the model, or the columns of S,
S Sᵀ = ∂²ℓ/∂z². "apart": these for sums by block, as few as they can be where places share a weight
(`sent_vectors`), others in every block. "plain": ∂/∂z of the mean loss, for the mean gradient
rounded as a loop of torch's own rounds it.
"""

PASSES: tuple[Pass, ...] = get_args(Pass)

Stream = Literal["step", "warm", "exact"]
"""The maker of a closure: a step, a warm start, the oracle. Each has labels of its own."""

STREAMS: tuple[Stream, ...] = get_args(Stream)


@dataclass(frozen=True)
class Observation:
    """A look at one minibatch.

    `loss` is the mean loss (no graph), with the objective's L2 term; `passes` holds {pass: {block:
    LayerStatistics}} for the passes asked for, `closure` the minibatch itself, for methods that go
    through it again (conjugate gradients, trial steps).
    """

    loss: Tensor
    size: int
    passes: dict[str, dict[str, LayerStatistics]]
    closure: Closure
    pull: Mapping[str, Tensor] = field(default_factory=dict)  # {block: gradient of the L2 term}

    @cached_property
    def gradients(self) -> dict[str, Tensor]:
        """Gradients of the mean loss at the data's labels, ``{block: gradient}``.

        They have the blocks' shapes, and that of the L2 term is in them.

        Raises:
            CurvlabError: no pass gave gradients.
        """
        for name in ("gradient", "data", "plain"):
            if name in self.passes:
                return self.gradients_of(name)
        raise CurvlabError(
            'this observation has no "gradient" pass: observe with needs={"gradient", …}'
        )

    @cached_property
    def gradient_length(self) -> float:
        """Length of all `gradients` together, once for all who ask; it waits for the device.

        NaN or Inf where an entry is, and where the squares of a block overflow.
        """
        return joint_norm(self.gradients.values())

    def gradients_of(self, name: str) -> dict[str, Tensor]:
        """Return the gradients of the pass `name`, as of `gradients`."""
        found = {block: statistics.gradient for block, statistics in self.passes[name].items()}
        return found | {block: found[block] + pull for block, pull in self.pull.items()}


@dataclass(frozen=True)
class Transition:
    """Two looks at one minibatch, before and after a move.

    `displacement` gives the move when first asked for.
    """

    before: Observation
    after: Observation
    displacement: Callable[[], dict[str, Tensor]]

    @cached_property
    def step(self) -> dict[str, Tensor]:
        """Changes of the parameters, ``{block: change}``, in the blocks' shapes."""
        return self.displacement()

    def step_of(self, block: str) -> Tensor:
        """Return the change of a block's parameters; nothing is computed before it is called."""
        return self.step[block]
