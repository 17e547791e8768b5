"""Hessian-free optimisation: truncated conjugate gradients on Gauss-Newton products.

Martens 2010; thesis 5.8.

Legend: N₁ examples of the minibatch, N₂ of them for the products; D parameters.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from jaxtyping import Float
from torch import Tensor

from curvlab.closure import Closure
from curvlab.curvature.base import NO_DATA, check_algorithm
from curvlab.curvature.levenberg_marquardt import LevenbergMarquardt, Ratio, check_ratio, ratio_at
from curvlab.curvature.minibatch_products import MinibatchProducts
from curvlab.curvature.settings import CurvatureSettings
from curvlab.curvature.states import check_vectors
from curvlab.curvature.whole_vector import (
    check_curvature_size,
    flat,
    loss_at,
    pack_closure,
    part,
    subset,
    unflat,
    unflat_like,
    unpack_closure,
)
from curvlab.errors import CurvlabError
from curvlab.finite import all_finite
from curvlab.linalg.damped import Damped
from curvlab.linalg.krylov import truncated_cg
from curvlab.linalg.operators import Operator
from curvlab.linalg.products import Product
from curvlab.objective import Objective
from curvlab.observation import Observation, Transition


class HessianFree(MinibatchProducts):
    """Direction p = x ≈ (B + λI)⁻¹ g by conjugate gradients that stop early; B is never formed.

    `inverse` is the inverse itself, by conjugate gradients to the end; `precondition` stops as
    Martens does and starts from the direction of the step before. N₁, N₂, λ, its rule and the
    learning rate are those of all methods of thesis 5.8, which has no line search; what the thesis
    leaves open (stopping, start, backtracking) is Martens 2010, section 4. Of an objective with an
    L2 term μ ‖θ‖² λ + 2μ stands for λ, as of `Smw`.

    Args:
        objective: whose parameters; a model whose examples stand alone (BatchNorm in eval mode).
        settings: labels, "exact" the Gauss-Newton matrix, "data" the empirical Fisher matrix,
            "model" that of drawn labels; damping, λ = λ_LM + τ; T₁, steps between minibatches of
            the products, and T₂, between which λ stands.
        curvature_size: N₂, drawn from the minibatch without replacement (`whole_vector.subset`);
            None takes all.
        iterations: at most so many products a direction.
        progress: ε of the stopping rule (`krylov.truncated_cg`).
        reuse: the start is this much of the last direction (Martens and Sutskever 2012: 0.95; in
            2010 all of it); 0: zero.
        backtrack: from the last iterate back to earlier ones for as long as the minibatch's loss at
            θ − x falls.
        adapt: whether λ follows the LM rule, as of `Smw`.
        ratio: where ρ is taken, see `Ratio`.
        levenberg: the LM rule.

    Raises:
        CurvlabError: a value out of its range.
    """

    def __init__(
        self,
        objective: Objective,
        settings: CurvatureSettings,
        *,
        curvature_size: int | None = 30,
        iterations: int = 250,
        progress: float = 5e-4,
        reuse: float = 0.95,
        backtrack: bool = True,
        adapt: bool = True,
        ratio: Ratio = "direction",
        levenberg: LevenbergMarquardt = LevenbergMarquardt(),
    ) -> None:
        super().__init__(objective, settings)
        check_ratio(ratio)
        check_curvature_size(curvature_size)
        if iterations < 1 or not progress >= 0 or not 0 <= reuse <= 1:
            raise CurvlabError(
                "conjugate gradients need iterations of at least 1, progress of at least 0 and"
                f" reuse between 0 and 1, not {iterations:g}, {progress:g}, {reuse:g}"
            )
        self.levenberg = levenberg
        self.curvature_size, self.adapt, self.ratio, self.backtrack = (
            curvature_size,
            adapt,
            ratio,
            backtrack,
        )
        self.iterations, self.progress, self.reuse = iterations, progress, reuse
        self.trial: Closure | None = None  # the minibatch S₁, for the losses of backtracking
        self.solution: Tensor | None = None  # the last direction, where the next run starts
        self.start: Tensor | None = None

    @property
    def product(self) -> Product | None:
        """B of S₂, the minibatch of the products; None before there are data."""
        columns, minibatch, at = self.columns, self.minibatch, self.at
        if columns is None or minibatch is None or at is None:
            return None
        size = len(minibatch.x)
        return Product(lambda v: columns(v.mT).mT / size, len(at), at.dtype, at.device)

    @property
    def inverse(self) -> dict[str, Operator]:
        """Inverse {"whole": (B + λI)⁻¹}, a `Solve`."""
        return {"whole": self.matrix.inv()}

    @property
    def matrix(self) -> Damped:
        """Sum B + (λ + 2μ) I, μ of the L2 term; raises CurvlabError before there are data."""
        if self.product is None or self.used is None:
            raise CurvlabError(NO_DATA)
        return Damped(self.product, self.used + self.objective.l2_hessian)

    def undamped(self, p: Float[Tensor, " D"]) -> Float[Tensor, " D"]:
        """Return B p of the quadratic model, with the L2 term."""
        return self.matrix.operator @ p + self.objective.l2_hessian * p

    def chosen(self, closure: Closure) -> Closure:
        """Return N₂ examples of a minibatch, of which the products are."""
        size = self.curvature_size
        return closure if size is None else part(closure, subset(closure, size))

    def update(self, observation: Observation) -> None:
        """Linearise at the N₂ examples where the schedule says so."""
        super().update(observation)
        self.trial, self.start = (
            observation.closure.keep(),
            None if self.solution is None else self.reuse * self.solution,
        )

    def precondition(self, grads: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return x of truncated conjugate gradients on (B + λI) x = grad.

        It has the keys and shapes of `grads`, which are of all parameters.
        """
        run = truncated_cg(
            self.matrix,
            flat(self.layout, grads),
            self.start,
            progress=self.progress,
            maximum=self.iterations,
        )
        x = self._best(run.iterates) if self.backtrack and self.trial is not None else run.x
        self.solution = x if all_finite(x) else None  # the next run would start from it
        return unflat_like(self.layout, x, grads)

    def _best(self, iterates: tuple[Float[Tensor, " D"], ...]) -> Float[Tensor, " D"]:
        """Go back from the last iterate while the loss falls (Martens 2010, section 4.6)."""
        best, least = iterates[-1], self._loss_after(iterates[-1])
        for x in reversed(iterates[:-1]):
            loss = self._loss_after(x)
            if loss >= least and math.isfinite(least):
                break
            best, least = x, loss
        return best

    def _loss_after(self, x: Float[Tensor, " D"]) -> float:
        assert self.trial is not None
        loss = float(loss_at(self.trial, unflat(self.layout, -x)))
        return loss if math.isfinite(loss) else math.inf

    @property
    def wants_step(self) -> bool:
        """Whether `learn` needs the loss after the step, for ρ."""
        return self.adapt

    def learn(self, transition: Transition) -> bool:
        """Move λ by the LM rule (Alg. 23, line 6), and return True: the step stands."""
        if self.adapt and self.solution is not None:
            p = -self.solution if self.ratio == "direction" else flat(self.layout, transition.step)
            rho = ratio_at(transition, self.layout, p, self.undamped(p))
            self.damping = self.levenberg.adapted(self.damping, rho)
        return True

    def state_dict(self) -> dict[str, Any]:
        """Return the state with its minibatches, since a product is made of data and weights."""
        kept = {
            name: getattr(self, name)
            for name in ("steps", "damping", "used", "at", "solution", "start")
        }
        minibatches = {name: pack_closure(getattr(self, name)) for name in ("trial", "minibatch")}
        return kept | minibatches | {"algorithm": self.name}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state.

        Raises CurvlabError, and takes nothing, where it is of another algorithm, model or dtype.
        """
        check_algorithm(state, self.name)
        kept = {
            name: state[name] for name in ("steps", "damping", "used", "at", "solution", "start")
        }
        check_vectors(
            self.layout,
            {name: kept[name] for name in ("at", "solution", "start")},
            self.objective.dtype,
        )
        trial, minibatch = (
            unpack_closure(self.objective, state[name]) for name in ("trial", "minibatch")
        )
        at = kept["at"]
        columns = None if minibatch is None or at is None else self.linearised(minibatch, at)
        for name, value in kept.items():
            setattr(self, name, value)
        self.trial, self.minibatch, self.columns = trial, minibatch, columns
