"""Shampoo as the thesis runs it: moving averages, coupled Newton roots, no grafting, no blocking (Alg. 16)."""

from __future__ import annotations

from torch import Tensor

from curvlab.curvature.contracted import Contracted, Contractions, batch_contractions
from curvlab.errors import Diverged
from curvlab.layers import Block
from curvlab.linalg.factor import shifted
from curvlab.linalg.roots import inverse_root_eigh, inverse_root_newton, root_eigh


def shampoo(block: Block) -> Contracted:
    """H = ⊗ᵢ (Ĝ^(i) + εI)^{−1/2k} from the batch-mean gradient at the data's labels: Alg. 16, lines 9 and 12.

    H⁻² = ⊗ᵢ (Ĝ^(i) + εI)^{1/k}, its `matrix`, bounds E[ḡ ḡᵀ] of the mean gradient ḡ up to the rank of ḡ (Gupta et al. 2018,
    Lemma 8): its direction says how near it is, its size is too large (a rank-one ḡ ḡᵀ apart).
    """
    return Contracted(block, batch_contractions, factors, forward=forward)


def factors(means: Contractions, damping: float) -> tuple[Tensor, ...]:
    """(Ĝ^(i) + εI)^{−1/2k}, i = 1 … k."""
    return tuple(_root(mean, damping, 2 * len(means)) for mean in means)


def forward(means: Contractions, damping: float) -> tuple[Tensor, ...]:
    """(Ĝ^(i) + εI)^{1/k}, i = 1 … k."""
    return tuple(root_eigh(shifted(mean, damping), len(means), floor=damping) for mean in means)


def _root(mean: Tensor, damping: float, p: int) -> Tensor:
    """By coupled Newton (at most 100 iterations, tolerance 1e-6); where rounding stops it above 1e-2, by `eigh`."""
    damped = shifted(mean, damping)
    if not bool(damped.isfinite().all()):
        raise Diverged("a Shampoo statistic contains NaN or Inf: lower the learning rate or raise the damping")
    root, error = inverse_root_newton(damped, p)
    return root if error < 1e-2 else inverse_root_eigh(damped, p, floor=damping)
