"""Blocks of a Gauss-Newton or Fisher matrix that are too large to be formed, by their products.

Legend: N examples, D parameters of a block.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from jaxtyping import Float
from torch import Tensor

from curvlab.curvature.base import NO_DATA, check_algorithm
from curvlab.curvature.large import too_large
from curvlab.curvature.minibatch_products import MinibatchProducts
from curvlab.curvature.preconditioning import preconditioned
from curvlab.curvature.settings import CurvatureSettings
from curvlab.curvature.states import check_vectors
from curvlab.curvature.whole_vector import pack_closure, unpack_closure
from curvlab.errors import CurvlabError, warn
from curvlab.linalg.damped import Damped, Solve
from curvlab.linalg.products import Product
from curvlab.objective import Objective
from curvlab.observation import Transition


class BlockProducts(MinibatchProducts):
    """Inverses (B + λI)⁻¹ of every block's matrix B by conjugate gradients; no block is formed.

    B is of the last minibatch alone, at the weights that it was seen at, and exact: a moving
    average would need the products of all minibatches that count. A solution has a relative
    residual of at most ε^¾ (6e-6 in single precision, `Solve`).

    Args:
        objective: whose blocks; a model whose examples stand alone (BatchNorm in eval mode).
        settings: labels, "exact" the Gauss-Newton matrix, "data" the empirical Fisher matrix,
            "model" that of drawn labels; damping; T₁, steps between minibatches of the products,
            and T₂, between which λ stands.
    """

    wants_step = False
    often = True

    def __init__(self, objective: Objective, settings: CurvatureSettings) -> None:
        super().__init__(objective, settings)
        block = too_large(objective.blocks, objective.dtype.itemsize)
        size = (
            ""
            if block is None
            else (f": {block} would be {block.numel**2 * objective.dtype.itemsize / 1e9:.1f} GB")
        )
        warn(
            f"{self.name or 'the method'} forms no dense matrix{size}; directions are by conjugate"
            " gradients on products, of the minibatch alone, without a moving average"
        )

    @property
    def inverse(self) -> dict[str, Solve]:
        """Inverses {block: (B + λI)⁻¹}; raises CurvlabError before there are data."""
        if self.used is None or self.columns is None:
            raise CurvlabError(NO_DATA)
        return {name: Solve(Damped(B, self.used)) for name, B in self.matrices().items()}

    def matrices(self) -> dict[str, Product]:
        """Return {block: B}; raises CurvlabError before there are data."""
        if self.at is None:
            raise CurvlabError(NO_DATA)
        return {
            b.name: Product(
                partial(self._of_block, self.layout.slices[b.name]),
                b.numel,
                self.at.dtype,
                self.at.device,
            )
            for b in self.layout.blocks
        }

    def _of_block(self, own: slice, v: Float[Tensor, "D K"]) -> Float[Tensor, "D K"]:
        """Return B v of one block: the whole matrix's rows and columns of its entries."""
        assert self.columns is not None
        assert self.minibatch is not None
        full = v.new_zeros(v.shape[1], len(self.layout))
        full[:, own] = v.mT
        return self.columns(full)[:, own].mT / len(self.minibatch.x)

    def precondition(self, grads: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return (B + λI)⁻¹ · grad for every block.

        Args:
            grads: {block name: tensor of the block's shape} or {parameter name: tensor}, for all or
                some blocks.

        Returns:
            The same keys and shapes.
        """
        return preconditioned(self.inverse, {b.name: b for b in self.layout.blocks}, grads)

    def learn(self, transition: Transition) -> bool:
        """Return True: the step stands."""
        return True

    def state_dict(self) -> dict[str, Any]:
        """Return the state with its minibatch, since a product is made of data and weights."""
        kept = {name: getattr(self, name) for name in ("steps", "damping", "used", "at")}
        return kept | {"minibatch": pack_closure(self.minibatch), "algorithm": self.name}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state.

        Raises CurvlabError, and takes nothing, where it is of another algorithm, model or dtype.
        """
        check_algorithm(state, self.name)
        check_vectors(self.layout, {"at": state["at"]}, self.objective.dtype)
        minibatch, at = unpack_closure(self.objective, state["minibatch"]), state["at"]
        columns = None if minibatch is None or at is None else self.linearised(minibatch, at)
        self.minibatch, self.at, self.columns = minibatch, at, columns
        self.steps, self.damping, self.used = state["steps"], state["damping"], state["used"]
