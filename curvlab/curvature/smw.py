"""Gauss-Newton and natural gradient through Sherman–Morrison–Woodbury.

Of the whole vector (thesis chapter 5), or by block.

Legend: N₁ examples of the minibatch, N₂ of them for the curvature; V vectors sent back; T places, Γ
groups, I inputs incl. the bias column, O outputs of a block; D parameters.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from curvlab.closure import Closure
from curvlab.curvature.base import NO_DATA, BlockDefaults, Secant, check_algorithm, check_damping
from curvlab.curvature.levenberg_marquardt import LevenbergMarquardt, Ratio, check_ratio, ratio_at
from curvlab.curvature.settings import CurvatureSettings
from curvlab.curvature.states import check_rows
from curvlab.curvature.whole_vector import (
    WholeVectorCurvature,
    applied,
    check_curvature_size,
    flat,
    part,
    subset,
)
from curvlab.errors import CurvlabError, guard_memory, unknown
from curvlab.exact.batches import check_independence
from curvlab.exact.torch_func import Function
from curvlab.layers import Block, Layout
from curvlab.linalg.operators import LowRank, Operator, Woodbury, pack, unpack
from curvlab.linalg.woodbury import Beside, LayerRows, RowMatrix, Rows
from curvlab.objective import Objective
from curvlab.observation import Observation, Pass, Transition
from curvlab.soundness import check_gradients
from curvlab.statistics import LayerStatistics, Reads


class SmwFisher(BlockDefaults):
    """Inverse H = (λI + (1/N) Σₙ vec(D W) vec(D W)ᵀ)⁻¹ on one minibatch, no moving average.

    (5.6) with the D_t of one layer: the same inverse as `DenseFisher` on the same minibatch,
    through an N×N Gram matrix and without forming a gradient.

    Args:
        curvature_size: N₂, the first of the minibatch (a shuffled one is in random order); None
            takes all.
    """

    reads: Reads = "rows"
    memory: ClassVar[tuple[str, ...]] = ("g", "a")
    secant: Secant | None = None
    inverse: Operator

    def __init__(self, curvature_size: int | None = None) -> None:
        check_curvature_size(curvature_size)
        self.curvature_size = curvature_size
        self.g: Tensor | None = None
        self.a: Tensor | None = None

    def update(self, statistics: LayerStatistics, weight: float) -> None:
        """Keep the rows of the minibatch's first N₂ examples, over √N₂; `weight` is not read."""
        if self.curvature_size is not None and self.curvature_size < statistics.size:
            statistics = statistics.part(
                torch.arange(self.curvature_size, device=statistics.like.device)
            )
        scale = 1 / math.sqrt(statistics.size)
        if statistics.provides("factors") and statistics.vectors == 1 and statistics.places == 1:
            self.g, self.a = statistics.g[0, :, 0] * scale, statistics.a[:, 0]
        else:
            self.g, self.a = statistics.rows.flatten(2).flatten(0, 1) * scale, None

    def refresh(self, damping: float) -> None:
        """Set `inverse` by the Cholesky factor of the Gram matrix (5.6).

        Raises CurvlabError where the damping is not above 0, Diverged where there is no factor.
        """
        assert self.g is not None
        self.inverse = self.matrix(damping).inv()

    def matrix(self, damping: float = 0.0) -> Operator:
        """Return λI + F of the last minibatch."""
        assert self.g is not None
        return LowRank(Rows(self.g, self.a), damping)


class Smw(WholeVectorCurvature):
    """Inverse H = (λI + (1/N₂) Σ_v Σₙ vec vecᵀ)⁻¹ on the whole parameter vector: thesis Alg. 23.

    It is made from one minibatch. Of an objective with an L2 term μ ‖θ‖², λ + 2μ stands for λ: the
    term is no sum over examples, and its Hessian 2μ I is known.

    Labels "exact": Gauss-Newton, whose rows are Jᵀ S with S Sᵀ the Hessian in the outputs. That is
    (5.6) and (5.7) at once: S is there also where the Hessian has no inverse (softmax), and the
    system stays symmetric. Labels "data": natural gradient of (5.3), the empirical Fisher matrix;
    "model": of drawn labels.

    Rows that are outer products are never formed (5.4.6); the Gram matrix, of order V N₂, is the
    sum of the layers' (Alg. 22). Parameters of layers without a rule bring their per-sample
    gradients, by `torch.func`.

    Args:
        objective: whose parameters.
        settings: labels, see above; damping, λ = λ_LM + τ; T₁, steps between looks, and T₂, between
            Cholesky factors.
        curvature_size: N₂, drawn from the minibatch without replacement (`whole_vector.subset`);
            None takes all. The "exact" pass is then of these examples alone (BatchNorm in training
            mode normalises them among themselves).
        adapt: whether λ follows the LM rule (5.2.3); a comparison at one overall λ holds it fixed.
        ratio: where ρ is taken, see `Ratio`.
        semi_stochastic: take a step back where ρ < η. With the whole data set as minibatch,
            learning rate 1 and N₂ of its examples this is the method that Theorem 6 proves
            convergent.
        eta: η, between 0 and ε (Theorem 6; the thesis gives no value).
        levenberg: the LM rule.
    """

    def __init__(
        self,
        objective: Objective,
        settings: CurvatureSettings,
        *,
        curvature_size: int | None = 30,
        adapt: bool = True,
        ratio: Ratio = "direction",
        semi_stochastic: bool = False,
        eta: float = 0.1,
        levenberg: LevenbergMarquardt = LevenbergMarquardt(),
    ) -> None:
        super().__init__(objective, settings)
        check_ratio(ratio)
        check_curvature_size(curvature_size)
        if not 0 < eta < levenberg.epsilon:
            raise CurvlabError(
                f"eta must lie between 0 and epsilon = {levenberg.epsilon:g} (Theorem 6), not"
                f" {eta:g}"
            )
        self.curvature_size, self.adapt, self.ratio, self.eta = curvature_size, adapt, ratio, eta
        self.rejects, self.levenberg = semi_stochastic, levenberg
        self.ready = False
        self.rows: RowMatrix | None = None
        self._inverse: Woodbury | None = None

    @property
    def refreshed(self) -> float | None:
        """λ of the Cholesky factor, without the L2 term's 2μ; None before there is one."""
        return None if self._inverse is None else self._inverse.damping - self.objective.l2_hessian

    @property
    def inverse(self) -> dict[str, Operator]:
        """Inverse {"whole": H}."""
        if self._inverse is None:
            raise CurvlabError(NO_DATA)
        return {"whole": self._inverse}

    @property
    def needs(self) -> frozenset[Pass]:
        """Pass of the next `update`; none where it looks at the N₂ examples itself."""
        own_look = self.labels == "exact" and self.curvature_size is not None
        return (
            frozenset()
            if own_look or not self.cadence.updates(self.steps + 1)
            else frozenset({self.labels})
        )

    def update(self, observation: Observation) -> None:
        """Take the rows of the N₂ examples, and factor their Gram matrix.

        Both happen where the schedule says so.
        """
        check_gradients(self.objective, observation)
        step = self.steps + 1
        if self.cadence.updates(step):
            self.rows = self._rows(observation)
        if self.cadence.refreshes(step, self.cadence.updates(step) or self._moved):
            self.refresh()
        self.steps = step

    @property
    def _moved(self) -> bool:
        """Whether λ is another than that of the factor, or there is none."""
        return self._inverse is None or self._inverse.damping != self._beside

    @property
    def _beside(self) -> float:
        return self.damping + self.objective.l2_hessian

    def _rows(self, observation: Observation) -> RowMatrix:
        closure, size = observation.closure, self.curvature_size
        chosen = (
            torch.arange(observation.size, device="cpu") if size is None else subset(closure, size)
        )
        if self.labels == "exact" and size is not None:
            statistics = (
                part(closure, chosen).observe({"exact"}, move_buffers=False).passes["exact"]
            )
        elif self.labels not in observation.passes:
            raise unknown("pass of this observation", self.labels, observation.passes)
        else:
            statistics = observation.passes[self.labels]
            if len(chosen) < observation.size:
                statistics = {
                    name: s.part(chosen) for name, s in statistics.items() if s.structured
                }
        found: dict[str, RowMatrix] = {
            name: layer_rows(s) for name, s in statistics.items() if s.structured
        }
        loose = tuple(b for b in self.layout.blocks if b.name not in found)
        if loose:
            found |= loose_rows(closure, loose, self.labels, chosen)
        return Beside(tuple(found[b.name] for b in self.layout.blocks))

    def refresh(self) -> None:
        """Factor D_t of (5.6) with the damping as it stands, and the L2 term's 2μ."""
        if self.rows is None:
            raise CurvlabError(NO_DATA)
        check_damping(self.damping)
        factored = LowRank(self.rows, self._beside).inv()
        assert isinstance(factored, Woodbury)
        self._inverse, self.ready = factored, True

    def undamped(self, p: Float[Tensor, " D"]) -> Float[Tensor, " D"]:
        """Return B p of the quadratic model, with the L2 term."""
        if self._inverse is None:
            raise CurvlabError(NO_DATA)
        return LowRank(self._inverse.rows, self.objective.l2_hessian) @ p

    def precondition(self, grads: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return H · grad under the keys of `grads`, blocks or parameters, for all of them."""
        return applied(self.layout, self.inverse["whole"], grads)

    @property
    def wants_step(self) -> bool:
        """Whether `learn` needs the loss after the step, for ρ."""
        return self.adapt or self.rejects

    def learn(self, transition: Transition) -> bool:
        """Move λ by the LM rule (Alg. 23, line 6).

        Returns False where the step is to be taken back (Theorem 6).
        """
        if self._inverse is None:
            raise CurvlabError(NO_DATA)
        if self.ratio == "direction":
            p = -(self._inverse @ flat(self.layout, transition.before.gradients))
        else:
            p = flat(self.layout, transition.step)
        rho = ratio_at(transition, self.layout, p, self.undamped(p))
        if self.adapt:
            self.damping = self.levenberg.adapted(self.damping, rho)
        return not (self.rejects and rho < self.eta)

    def state_dict(self) -> dict[str, Any]:
        """Return λ, the counters, and the rows and the inverse as `pack` has them."""
        packed = {"rows": pack(self.rows), "inverse": pack(self._inverse)}
        return packed | {
            "algorithm": self.name,
            "steps": self.steps,
            "ready": self.ready,
            "damping": self.damping,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state.

        Raises CurvlabError, and takes nothing, where it is of another algorithm, model or dtype.
        """
        check_algorithm(state, self.name)
        rows, inverse = unpack(state["rows"]), unpack(state["inverse"])
        for held in (rows, None if inverse is None else inverse.rows):
            if held is not None:
                check_rows(self.layout, held, self.objective.dtype)
        self.steps, self.ready, self.damping = state["steps"], state["ready"], state["damping"]
        self.rows, self._inverse = rows, inverse


def layer_rows(statistics: LayerStatistics) -> RowMatrix:
    """Return rows (v, n), the gradient of example n for vector v, divided by √N.

    Formed only where a weight is used at so many places that a and g are more numbers than the rows
    themselves.
    """
    block, scale = statistics.block, 1 / math.sqrt(statistics.size)
    if not statistics.used or any(p.swapped for p in statistics.parts):
        return Rows(statistics.rows.flatten(2).flatten(0, 1) * scale)
    g = statistics.g.reshape(*statistics.g.shape[:3], block.groups, -1)
    vectors, _, places, _, outputs = g.shape
    inputs = block.shape[1]
    if places > 1 and places * (vectors * outputs + inputs) > vectors * outputs * inputs:
        return Rows(statistics.rows.flatten(2).flatten(0, 1) * scale)
    a = statistics.grouped_a
    return LayerRows(g * scale, a if block.groups > 1 else a[:, :, None])


def loose_rows(
    closure: Closure, blocks: tuple[Block, ...], labels: Pass, chosen: Tensor
) -> dict[str, RowMatrix]:
    """Return {block: the same rows} of blocks that go the general way.

    They are of the chosen examples of a minibatch.
    """
    check_independence(closure.objective)
    layout = Layout(blocks)
    chosen = chosen.to(closure.x.device)
    z = closure.forward()[0].detach()
    some = part(closure, chosen)
    function, count = Function(some, layout), len(chosen)
    vectors = z[0].numel() if labels == "exact" else 1
    needed = vectors * count * len(layout) * z.element_size()
    guard_memory(needed, "the per-sample gradients", "use a smaller curvature_size")
    if labels == "exact":
        root = closure.root(z)[:, chosen].flatten(2)  # [V, n, C]
        rows = torch.einsum("vnc,ncd->vnd", root, function.jacobians()).flatten(0, 1)
    elif labels == "token":
        rows = function.gradients_of_places().transpose(0, 1).flatten(0, 1)
    else:
        drawn = labels != "data"
        y = closure.labels(z)[0] if drawn else closure.y
        rows = function.gradients(y[chosen], drawn=drawn)
    return {b.name: Rows(rows[:, layout.slices[b.name]] / math.sqrt(count)) for b in blocks}
