"""Base of methods whose matrix is one minibatch's, known by its products alone.

Legend: D parameters, block after block (`Layout`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from curvlab.closure import Closure
from curvlab.curvature.base import NO_DATA, check_damping
from curvlab.curvature.settings import CurvatureSettings
from curvlab.curvature.whole_vector import PRODUCTS, WholeVectorCurvature
from curvlab.errors import CurvlabError
from curvlab.exact.batches import check_independence
from curvlab.exact.torch_func import Function
from curvlab.objective import Objective
from curvlab.observation import Observation, Pass
from curvlab.soundness import check_gradients

MinibatchColumns = Callable[[Float[Tensor, "K D"]], Float[Tensor, "K D"]]


class MinibatchProducts(WholeVectorCurvature):
    """The minibatch of the products, the weights that they are taken at, and λ beside them.

    Args:
        objective: whose parameters; a model whose examples stand alone (BatchNorm in eval mode).
        settings: labels, of which `PRODUCTS` has the matrix; damping; T₁, steps between minibatches
            of the products, and T₂, between which λ stands.
    """

    needs: frozenset[Pass] = frozenset()
    rejects = False
    often: ClassVar[bool] = False
    """Whether later products share a forward pass, and round otherwise than the first."""

    def __init__(self, objective: Objective, settings: CurvatureSettings) -> None:
        super().__init__(objective, settings)
        self.minibatch: Closure | None = None
        self.at: Tensor | None = None  # the weights that the products are taken at
        self.used: float | None = None  # λ as it was last taken over
        self.columns: MinibatchColumns | None = None  # rows v → N · B v

    @property
    def ready(self) -> bool:
        """Whether a damping has been taken over by `refresh`, so that B + λI is there."""
        return self.used is not None

    @property
    def refreshed(self) -> float | None:
        """λ as it was last taken over; None before."""
        return self.used

    def update(self, observation: Observation) -> None:
        """Linearise at the minibatch where the schedule says so.

        Raises:
            Diverged: a gradient that is not finite.
            CurvlabError: an example's outputs depend on others.
        """
        check_gradients(self.objective, observation)
        step = self.steps + 1
        if self.cadence.updates(step):
            check_independence(self.objective)
            self.minibatch = self.chosen(observation.closure).keep()
            self.at = self.layout.flatten(
                {name: p.detach() for name, p in self.objective.parameters.items()}
            ).to(self.objective.dtype)
            self.columns = self.linearised(self.minibatch, self.at)
        if self.cadence.refreshes(step):
            self.refresh()
        self.steps = step

    def chosen(self, closure: Closure) -> Closure:
        """Return what of a minibatch the products are of: all of it."""
        return closure

    def linearised(self, closure: Closure, at: Float[Tensor, " D"]) -> MinibatchColumns:
        """Return the products of a minibatch at weights that may have moved since."""
        function = Function(closure, self.layout)
        function.at = at
        return function.product(PRODUCTS[self.labels], 1, often=self.often)

    def refresh(self) -> None:
        """Take over λ as it stands."""
        if self.columns is None:
            raise CurvlabError(NO_DATA)
        check_damping(self.damping)
        self.used = self.damping
