"""What every curvature is: of a block (`CurvatureBlock`), of a model (`Curvature`), and what they share."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from curvlab.closure import Observation, Pass, Transition
from curvlab.errors import CurvlabError, Diverged, real
from curvlab.finite import all_finite, all_short, length, waits
from curvlab.linalg.operators import Diagonal, Operator, identity_like
from curvlab.statistics import LayerStatistics, Reads

NO_DATA = "this curvature has seen no data yet: call update(objective.closure(x, y).observe(needs)) first"

Move = Callable[[], Tensor]
"""Gives the change of a block's parameters when it is called; no work before."""

Secant = Callable[[LayerStatistics, LayerStatistics, Move], None]


class CurvatureBlock(Protocol):
    """Statistics of one block → operator. A plain final class; state is made from the first statistics."""

    reads: Reads
    """What it needs of a layer; a layer that has no such thing falls back to the gradient."""
    memory: ClassVar[tuple[str, ...]]
    """Names of the attributes that a checkpoint must hold, beside `inverse`: tensors, lists of tensors or None."""
    inverse: Operator
    """Approximates B⁻¹ on the row-major flattening of the block; there after the first `refresh`."""

    def update(self, statistics: LayerStatistics, weight: float) -> None:
        """Fold one observation in: old · (1 − weight) + new · weight. Cheap."""

    def refresh(self, damping: float) -> None:
        """What is expensive: inverses, roots."""

    # A block that averages second moments has `moments(statistics) -> {name: matrix}` too, those that `update` would fold in:
    # they are looked at before anything is folded.

    @property
    def secant(self) -> Secant | None:
        """Learns from a step: statistics of one minibatch's "data" pass before and after it, and the change of the parameters.

        None: learns from minibatches alone.
        """

    def matrix(self, damping: float = 0.0) -> Operator | None:
        """B, the statistics as they stand, damped where `refresh` damps; None where a method estimates no matrix.

        Scale: of the Fisher matrix (of the labels that were read); but of Fisher / N where `reads` is "gradient", since at
        labels drawn from the model E[ḡ ḡᵀ] of the mean gradient ḡ of N examples is Fisher / N. `inverse` is B⁻¹; Shampoo's and
        Adam's is B^{−1/2}.
        """


class Curvature(Protocol):
    """The curvature of a whole model, as a descent uses it.

    A step: `update`, `precondition`, the parameters move; where `wants_step`, a second look at the minibatch with the passes of
    `step_needs` (none: the loss alone), and `learn`, whose answer says whether the step stands; only a curvature that `rejects`
    may say no.
    """

    damping: float
    ready: bool

    @property
    def inverse(self) -> Mapping[str, Operator]:
        """{block: operator}, or {"whole": operator} on the vector of all parameters (`Layout`)."""

    @property
    def needs(self) -> frozenset[Pass]: ...
    def update(self, observation: Observation) -> None: ...
    @property
    def warm_needs(self) -> frozenset[Pass]: ...
    def absorb(self, observation: Observation) -> None: ...
    def refresh(self) -> None: ...
    def precondition(self, grads: Mapping[str, Tensor]) -> dict[str, Tensor]: ...
    @property
    def wants_step(self) -> bool: ...
    @property
    def step_needs(self) -> frozenset[Pass]: ...
    @property
    def rejects(self) -> bool: ...
    def learn(self, transition: Transition) -> bool: ...
    @property
    def left_out(self) -> Mapping[str, int | Tensor]:
        """{block, or "whole": pairs that were left out so far since they were not finite}; perhaps on the device."""

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def check_damping(damping: float) -> None:
    """Raises CurvlabError where the damping is negative, infinite or NaN."""
    real("damping", damping)


def check_algorithm(state: Mapping[str, Any], name: str) -> None:
    """Raises CurvlabError for a checkpoint of another algorithm."""
    if state["algorithm"] != name:
        raise CurvlabError(f"the checkpoint is of '{state['algorithm']}' but this is '{name}': build the same algorithm")


def blend(old: Tensor | None, new: Tensor, weight: float) -> Tensor:
    """old · (1 − weight) + new · weight; the first is the new one itself. What is not finite would stay: `check_moments`."""
    return new.clone() if old is None else old.lerp(new, weight)


def check_moments(moments: Iterable[tuple[str, str, Tensor]]) -> None:
    """Of (name of a block, name of a second moment, itself): raises Diverged for the first that is not finite.

    So no average takes it up. Of a large one the diagonal is looked at, which no entry exceeds. On a GPU, which would have to
    wait, `refresh` sees it.
    """
    found = list(moments)
    if not found or waits(found[0][2]):
        return
    seen = [m if m.numel() < _LARGE else m.diagonal() for _, _, m in found]
    if math.isfinite(length(seen)):
        return
    for (block, name, _), m in zip(found, seen, strict=True):
        if not all_finite(m):  # a length overflows earlier
            error = Diverged(f"{name} contains NaN or Inf: lower the learning rate or raise the damping")
            error.block = block
            raise error


def check_squared(gradients: Mapping[str, Tensor]) -> None:
    """Of {block: what a second moment is made of}: raises Diverged for the first whose squares are not finite. As above."""
    if not gradients or waits(next(iter(gradients.values()))) or all_short(gradients.values()):
        return
    for block, g in gradients.items():
        if not all_short([g]):
            error = Diverged("the gradient that its statistics are made of contains NaN or Inf, or its squares overflow")
            error.block = block
            raise error


_LARGE = 1 << 18  # numbers


class IdentityBlock:
    """The gradient itself: SGD, and the fallback for parameters without structure (thesis 4.7.2: BatchNorm in KFAC).

    Args:
        over_damping: the gradient over λ, which moves at the rate α/λ (thesis 3.4.3: BatchNorm in K-BFGS).
    """

    reads: Reads = "gradient"
    memory: ClassVar[tuple[str, ...]] = ()
    secant: Secant | None = None
    inverse: Operator

    def __init__(self, over_damping: bool = False) -> None:
        self.over_damping = over_damping

    def update(self, statistics: LayerStatistics, weight: float) -> None:
        if not hasattr(self, "inverse"):
            self.inverse = identity_like(statistics.like.new_empty(statistics.block.shape))

    def refresh(self, damping: float) -> None:
        if self.over_damping:
            if not damping > 0:
                raise CurvlabError(f"the rate of the gradient is that of the method over its damping, not over {damping:g}")
            self.inverse = Diagonal(torch.full_like(self.inverse.diag(), 1 / damping))

    def matrix(self, damping: float = 0.0) -> Operator | None:
        return None
