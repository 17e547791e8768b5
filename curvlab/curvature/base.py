"""Protocols of a curvature: of a block (`CurvatureBlock`), of a model (`Curvature`).

`BlockDefaults` and `CurvatureDefaults` hold the members that a method may have besides, above all
what probes ask of it, each with the answer of a method that has nothing to say. A method of the
package inherits and overrides them; one of a user's own need not: `block_with_defaults` and
`with_defaults` complete whatever lacks one, and are the only place that looks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Protocol

from torch import Tensor

from curvlab.curvature.mixing import Mix
from curvlab.curvature.told import FactorBounds as FactorBounds
from curvlab.curvature.told import LearntPair as LearntPair
from curvlab.curvature.told import PairName as PairName
from curvlab.errors import CurvlabError, real
from curvlab.linalg.operators import Kronecker, Operator
from curvlab.linalg.pairs import Matrix
from curvlab.observation import Observation, Pass, Transition
from curvlab.statistics import LayerStatistics, Reads

NO_DATA = (
    "this curvature has seen no data yet: call update(objective.closure(x, y).observe(needs)) first"
)

Move = Callable[[], Tensor]
"""Gives the change of a block's parameters when it is called; no work before."""

Secant = Callable[[LayerStatistics, LayerStatistics, Move], None]


class CurvatureBlock(Protocol):
    """Statistics of a block, and the operator made of them.

    A plain final class; first statistics make its state.
    """

    reads: Reads
    """What it needs of a layer; a layer that has no such thing falls back to the gradient."""
    memory: ClassVar[tuple[str, ...]]
    """Names of the attributes that a checkpoint must hold, beside `inverse`: tensors, lists of
    tensors or None."""
    inverse: Operator
    """Approximates B⁻¹ on the row-major flattening of the block; there after the first
    `refresh`."""

    def update(self, statistics: LayerStatistics, weight: float) -> None:
        """Fold one observation in: old · (1 − weight) + new · weight. Cheap."""

    def refresh(self, damping: float) -> None:
        """Do what is expensive: inverses, roots."""

    @property
    def secant(self) -> Secant | None:
        """Function that learns from a step; None: it learns from minibatches alone.

        It is given statistics of one minibatch's "data" pass before and after the step, and the
        change of the parameters.
        """

    def matrix(self, damping: float = 0.0) -> Operator | None:
        """Return B, the statistics as they stand, damped where `refresh` damps.

        None: it estimates no matrix.

        Scale: of the Fisher matrix (of the labels that were read); but of Fisher / N where `reads`
        is "gradient", since at labels drawn from the model E[ḡ ḡᵀ] of the mean gradient ḡ of N
        examples is Fisher / N. `inverse` is B⁻¹; Shampoo's and Adam's is B^{−1/2}.
        """


class Curvature(Protocol):
    """Curvature of a whole model, as a descent uses it.

    A step: `update`, `precondition`, the parameters move; where `wants_step`, a second look at the
    minibatch with the passes of `step_needs` (none: the loss alone), and `learn`, whose answer says
    whether the step stands; only a curvature that `rejects` may say no.
    """

    damping: float

    @property
    def ready(self) -> bool:
        """Whether there is an inverse to precondition with."""

    @property
    def inverse(self) -> Mapping[str, Operator]:
        """Operators by block, or {"whole": operator} on the vector of all parameters (`Layout`)."""

    @property
    def needs(self) -> frozenset[Pass]:
        """Passes that the next `update` reads."""

    def update(self, observation: Observation) -> None:
        """Learn from one minibatch; refresh the inverse where the schedule says so."""

    @property
    def warm_needs(self) -> frozenset[Pass]:
        """Passes that `absorb` reads; empty without a warm start."""

    def absorb(self, observation: Observation) -> None:
        """Fold in a minibatch of the warm start; do nothing where there is none."""

    def refresh(self) -> None:
        """Make the inverse anew with the damping as it stands, where one is kept."""

    def precondition(self, grads: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return H · grads of {block, or parameter: tensor}; the same keys and shapes."""

    @property
    def wants_step(self) -> bool:
        """Whether `learn` is to be shown the step that follows."""

    @property
    def step_needs(self) -> frozenset[Pass]:
        """Passes of the second look at a minibatch; empty: the loss alone."""

    @property
    def rejects(self) -> bool:
        """Whether `learn` may answer that the step is to be taken back."""

    def learn(self, transition: Transition) -> bool:
        """Learn from a step; return whether it stands."""

    @property
    def left_out(self) -> Mapping[str, int | Tensor]:
        """Pairs left out so far, as not finite: {block or "whole": number, maybe on the device}."""

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint holds."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from such a state. Raises CurvlabError where it does not fit."""


class BlockDefaults:
    """Members that a block may have beside `CurvatureBlock`, with the answers of one without."""

    factored: bool = False
    """Whether it is made of Kronecker factors: the probe `bounds` reads their eigenvalues."""
    learns_pairs: bool = False
    """Whether the block learns from pairs, which the probe `damping` looks at."""
    squares_objective: bool = False
    """Whether `update` reads the mean gradient of the objective, its L2 term included."""
    compares_gradients: bool = False
    """Whether `secant` reads gradients, which are then autograd's own in both looks."""
    shift: float | None = None
    """What the last `refresh` added to the diagonal beside the damping; None: it shifts nothing."""
    left_out: int | Tensor | None = None
    """Pairs left out so far since they were not finite; None: the block learns from none."""
    reads: Reads = "gradient"
    refine: Callable[[float], None] | None = None
    """Makes `inverse` anew at a step's λ where none is refreshed; None: the inverse stands."""

    @property
    def held(self) -> Operator | None:
        """The inverse; None before the first `refresh`."""
        found: Operator | None = getattr(self, "inverse", None)
        return found

    def settle(self, damping: float | None) -> None:
        """Finish what `update` has left until after a refresh, if there is one; no pass is held.

        Args:
            damping: λ of the last refresh, to make `inverse` anew with; None before the first, and
                then nothing is made.
        """

    def heed(self, momentum: Tensor, damping: float | None) -> None:
        """Learn of what a descent preconditions next, where `inverse` depends on it.

        So a direction that is no linear function of the momentum m is H(m) m, H(m) an operator.

        Args:
            momentum: m, of the block's shape.
            damping: λ of the last refresh.
        """

    def heed_mix(self, gradient: Tensor, mix: Mix) -> None:
        """Learn, before `heed`, how that momentum is made.

        Args:
            gradient: the one that enters it, of the block's shape.
            mix: the rest.
        """

    @staticmethod
    def together(blocks: Sequence[Any]) -> None:
        """Do for all blocks of this class together, after `heed`, what is cheaper so."""

    def direction_of(self, momentum: Tensor) -> Tensor | None:
        """Return H(m) m of the momentum heeded last, which `momentum` is, without the operator.

        None: it is another tensor, or the method's way to it is `inverse`.
        """
        return None

    def moments(self, statistics: LayerStatistics) -> dict[str, Tensor]:
        """Return {name: second moment} that `update` would fold in, to be looked at before."""
        return {}

    def matrix(self, damping: float = 0.0) -> Operator | None:
        """Return B, as of `CurvatureBlock.matrix`; None: the method estimates no matrix."""
        return None

    def estimates(self) -> bool:
        """Return whether the block may estimate a matrix: whether it has a `matrix` of its own."""
        return getattr(self.matrix, "__func__", None) is not BlockDefaults.matrix

    def learnt(self) -> Sequence[LearntPair]:
        """Return the last pairs that were learnt from since `forget_learnt`."""
        return ()

    def forget_learnt(self) -> None:
        """Drop the record of the last pairs, not what was learnt: the next is of a later step."""

    def kronecker_factors(self) -> tuple[Matrix, Matrix] | None:
        """Return (H_g, H_a) where `inverse` is their product, or holds it; else None."""
        inverse = self.held
        if not isinstance(inverse, Kronecker) or len(inverse.factors) != 2:
            return None
        return inverse.factors[0], inverse.factors[1]

    def input_norm(self) -> float | None:
        """Return the root mean square of the inputs in the second moment that H_a inverts.

        None: H_a is no such inverse.
        """
        return None

    def bounds(self, damping: float | None, phi: float) -> FactorBounds:
        """Return what is proven of the eigenvalues of `inverse`.

        Args:
            damping: λ of the last refresh; None: unknown, and nothing is proven that needs it.
            phi: φ, the greatest magnitude of the layer's inputs; NaN: it is not known.
        """
        return FactorBounds()

    def pairs_held(self) -> int | None:
        """Return the number of pairs in H_g, 0 of BFGS, which keeps none; None: it has none."""
        return None

    def update_bounds(self, norm_B: float, norm_H: float, held: int) -> tuple[float, float] | None:
        """Return bounds on (‖B⁺‖, ‖H⁺‖) of the last update of H_g; None: nothing is proven.

        Args:
            norm_B: ‖H_g⁻¹‖ before the update.
            norm_H: ‖H_g‖ before the update.
            held: `pairs_held` before the update.
        """
        return None


class CurvatureDefaults:
    """Members that a curvature may have beside `Curvature`, with the answers of one without."""

    name: str = ""
    """Of the algorithm."""
    gradient_pass: Pass = "gradient"
    """The pass whose gradient is preconditioned."""
    rate: float | None = None
    """The learning rate of the next step, told before it; None: of no concern."""
    apart: bool = False
    """Whether others are compared with it: what draws random numbers then draws its own."""

    @property
    def refreshed(self) -> float | None:
        """λ of the last refresh, of the matrix that was inverted; None: it is not known."""
        return None

    @property
    def left_out(self) -> Mapping[str, int | Tensor]:
        """Pairs left out, as of `Curvature.left_out`; {}: there are none, or none counted."""
        return {}

    def arrived(self) -> Mapping[str, Tensor] | None:
        """Return {parameter: its value after the step at `rate`}; None: W − rate · p."""
        return None

    def inverses(self) -> Mapping[str, Operator]:
        """Return `inverse`; {} where there is none."""
        found: Mapping[str, Operator] = getattr(self, "inverse", {})
        return found

    def by_block(self) -> Mapping[str, BlockDefaults]:
        """Return {block: its CurvatureBlock, completed}; {} of a method of the whole vector."""
        found: Mapping[str, Any] = getattr(self, "blocks", {})
        return {name: block_with_defaults(block) for name, block in found.items()}

    def heed(self, momentum: Mapping[str, Tensor]) -> None:
        """Learn of {block: momentum} that a descent preconditions next (`BlockDefaults.heed`)."""

    def heed_mix(self, gradients: Mapping[str, Tensor], mix: Mix) -> None:
        """Tell blocks, before `heed`, how those momenta are made (`BlockDefaults.heed_mix`)."""
        for name, block in with_own("heed_mix", getattr(self, "blocks", {})).items():
            if name in gradients:
                block_with_defaults(block).heed_mix(gradients[name], mix)

    def undamped(self, p: Tensor) -> Tensor | None:
        """Return B p of the quadratic model of the whole vector, with the L2 term, if any."""
        return None

    def learns_pairs(self) -> bool:
        """Return whether the method learns from pairs."""
        return any(block.learns_pairs for block in self.by_block().values())

    def learnt(self) -> Sequence[tuple[str | None, LearntPair]]:
        """Return the last pairs learnt from since `forget_learnt`, each with its block.

        None stands for all blocks together.
        """
        return [(name, pair) for name, block in self.by_block().items() for pair in block.learnt()]

    def forget_learnt(self) -> None:
        """Drop the record of the last pairs, so that what is found later is of a later step."""
        for block in self.by_block().values():
            block.forget_learnt()

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint holds."""
        return {}


class _CompletedBlock(BlockDefaults):
    """Block of a user's own, completed by the default of each member that it lacks."""

    def __init__(self, own: Any) -> None:
        self._own = own

    def __getattribute__(self, name: str) -> Any:
        return _own_or_default(super().__getattribute__, name)


class _CompletedCurvature(CurvatureDefaults):
    """Curvature of a user's own, completed by the default of each member that it lacks."""

    def __init__(self, own: Any) -> None:
        self._own = own

    def __getattribute__(self, name: str) -> Any:
        return _own_or_default(super().__getattribute__, name)


def _own_or_default(default: Callable[[str], Any], name: str) -> Any:
    found = _LACKING if name.startswith("_") else getattr(default("_own"), name, _LACKING)
    return default(name) if found is _LACKING else found


_LACKING = object()


def block_with_defaults(block: Any) -> BlockDefaults:
    """Return the block itself where it has all of `BlockDefaults`; else completed by them."""
    return block if isinstance(block, BlockDefaults) else _CompletedBlock(block)


def with_own(method: str, blocks: Mapping[str, CurvatureBlock]) -> dict[str, CurvatureBlock]:
    """Return the blocks that may have a method of `BlockDefaults` of their own."""
    default = getattr(BlockDefaults, method)
    return {n: b for n, b in blocks.items() if getattr(type(b), method, None) is not default}


def with_defaults(curvature: Any) -> CurvatureDefaults:
    """Return the curvature itself, completed by `CurvatureDefaults` where it lacks some of them.

    None, of a frame that holds no curvature, has nothing but defaults.
    """
    return curvature if isinstance(curvature, CurvatureDefaults) else _CompletedCurvature(curvature)


def check_damping(damping: float) -> None:
    """Raise CurvlabError where the damping is negative, infinite or NaN."""
    real("damping", damping)


def check_algorithm(state: Mapping[str, Any], name: str) -> None:
    """Raise CurvlabError for a checkpoint of another algorithm."""
    if state["algorithm"] != name:
        raise CurvlabError(
            f"the checkpoint is of '{state['algorithm']}' but this is '{name}': build the same"
            " algorithm"
        )


def blend(old: Tensor | None, new: Tensor, weight: float) -> Tensor:
    """Return old · (1 − weight) + new · weight; a copy of the new one at first.

    What is not finite would stay: `check_moments`.
    """
    return new.clone() if old is None else old.lerp(new, weight)
