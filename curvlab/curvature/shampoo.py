"""Shampoo as the thesis runs it: moving averages, inverse roots by coupled Newton (Alg. 16).

No grafting, no blocking.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor

from curvlab.curvature.contracted import Contracted, Contractions, batch_contractions
from curvlab.errors import Diverged, lookup
from curvlab.finite import all_finite
from curvlab.layers import Block
from curvlab.linalg.cholesky import shifted
from curvlab.linalg.roots import inverse_root_eigh, inverse_root_newton, root_eigh


def shampoo(block: Block, *, root: str = "auto") -> Contracted:
    """Make H = ⊗ᵢ (Ĝ^(i) + εI)^{−1/2k} from the batch-mean gradient at the data's labels.

    Alg. 16, lines 9 and 12.

    H⁻² = ⊗ᵢ (Ĝ^(i) + εI)^{1/k}, its `matrix`, bounds E[ḡ ḡᵀ] of the mean gradient ḡ up to the rank
    of ḡ (Gupta et al. 2018, Lemma 8): its direction says how near it is, its size is too large (a
    rank-one ḡ ḡᵀ apart).

    Args:
        block: whose variables.
        root: "newton", the document's coupled Newton iteration; "eigh", the same root by
            eigenvalues, seven times as fast on a CPU; "auto": "eigh" there, "newton" on other
            devices.
    """
    lookup(ROOTS, root, "way to a root")
    return Contracted(
        block, batch_contractions, partial(shampoo_factors, root=root), forward=shampoo_forward
    )


def shampoo_factors(
    means: Contractions, damping: float, root: str = "newton"
) -> tuple[Tensor, ...]:
    """Return (Ĝ^(i) + εI)^{−1/2k}, i = 1 … k, of one variable; raises Diverged for NaN or Inf."""
    if not all(all_finite(mean) for mean in means):
        raise Diverged(
            "a Shampoo statistic contains NaN or Inf: lower the learning rate or raise the damping"
        )
    return tuple(ROOTS[root](shifted(mean, damping), 2 * len(means), damping) for mean in means)


def shampoo_forward(means: Contractions, damping: float) -> tuple[Tensor, ...]:
    """Return (Ĝ^(i) + εI)^{1/k}, i = 1 … k, of one variable."""
    return tuple(root_eigh(shifted(mean, damping), len(means), floor=damping) for mean in means)


def _newton(damped: Tensor, p: int, floor: float) -> Tensor:
    """Return the root by coupled Newton, at most 100 iterations, tolerance 1e-6.

    Where rounding stops it above 1e-2, by `eigh`.
    """
    root, error = inverse_root_newton(damped, p)
    return root if error < 1e-2 else inverse_root_eigh(damped, p, floor)


def _auto(damped: Tensor, p: int, floor: float) -> Tensor:
    return (inverse_root_eigh if damped.device.type == "cpu" else _newton)(damped, p, floor)


ROOTS: dict[str, Callable[[Tensor, int, float], Tensor]] = {
    "auto": _auto,
    "newton": _newton,
    "eigh": inverse_root_eigh,
}
"""Ways to a root, (M + εI, p, ε) → (M + εI)^{−1/p}."""
