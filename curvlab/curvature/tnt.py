"""Tensor Normal Training: the gradient of a variable as a tensor-normal random variable.

Thesis Alg. 13 and 15.

Legend: k ways of a variable of shape [d_1, …, d_k]; V vectors, N examples, T places, I inputs incl.
bias, O outputs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from curvlab.curvature.base import FactorBounds
from curvlab.curvature.contracted import Contracted, Contractions, batch_contractions, with_pixels
from curvlab.layers import Block
from curvlab.linalg.bounds import Bounds, tensor_normal, tensor_normal_factor
from curvlab.linalg.cholesky import damped_inverse, shifted
from curvlab.linalg.kronecker import mode_contraction, tensor_normal_factors
from curvlab.linalg.operators import Kronecker
from curvlab.linalg.spectral import eigvalsh
from curvlab.statistics import LayerStatistics


def tnt(block: Block) -> Contracted:
    """Make H = ⊗ᵢ (Ũ_i + εI)⁻¹ from the batch-mean gradient: Alg. 15.

    Of N examples Ũ₁ ⊗ Ũ₂ estimates Fisher / N.
    """
    return Contracted(block, batch_contractions, tnt_factors, forward=tnt_forward, theorem=lemma_10)


def tnt_per_sample(block: Block) -> Contracted:
    """Make H = ⊗ᵢ (Ũ_i + εI)⁻¹ from the per-sample gradients.

    ⊗ Ũ_i estimates Fisher itself, at any batch size.
    """
    return Contracted(
        block,
        sample_contractions,
        tnt_factors,
        reads="factors",
        forward=tnt_forward,
        theorem=lemma_10,
    )


def tnt_factors(means: Contractions, damping: float) -> tuple[Tensor, ...]:
    """Return (Ũ_i + εI)⁻¹ of one variable: Alg. 15, lines 15 and 16.

    ε is added to each factor undivided (practice).
    """
    return tuple(damped_inverse(u, damping, "a TNT factor") for u in tensor_normal_factors(means))


def tnt_forward(means: Contractions, damping: float) -> tuple[Tensor, ...]:
    """Return Ũ_i + εI of one variable (thesis (4.10))."""
    return tuple(shifted(u, damping) for u in tensor_normal_factors(means))


def sample_contractions(block: Block, statistics: LayerStatistics) -> list[list[Tensor]]:
    """Return the mean over examples of Σ_v G^(i) of the per-sample gradients, [variable][way].

    The variables are weight and bias. At one place (T = 1) a per-sample gradient is g aᵀ, so that
    G^(1) = ‖a‖² g gᵀ, and the others are ‖g‖² times those of a alone: no row is formed.
    """
    inputs = slice(None, -1) if block.biased else slice(None)
    if statistics.a.shape[1] > 1:
        rows = statistics.rows.flatten(0, 1)
        bias, parts = rows[..., -1], [with_pixels(block, rows[..., inputs])]
    else:
        bias = statistics.g[:, :, 0].flatten(0, 1)
        a = statistics.a[:, 0, inputs].repeat(len(statistics.g), 1)
        parts = [
            bias * a.norm(dim=1, keepdim=True),
            with_pixels(block, a * bias.norm(dim=1, keepdim=True)),
        ]
    # The examples are an axis of `part` that is no way: mat_way has it among its columns, so that
    # one product sums over them, and no G^(i) of an example is formed.
    found = [[mode_contraction(part, way) for part in parts for way in range(1, part.ndim)]]
    if block.biased:
        found.append([mode_contraction(bias, 1)])
    return [[c / statistics.size for c in variable] for variable in found]


def gradient_norm_bound(part: Kronecker, damping: float) -> float:
    """Return tr E[vec G vec Gᵀ] of one variable, which bounds the norm in Lemma 10.

    It is c₀ᵏ Π d_j by (4.10), c₀ the mean of Ũ₁, read off H itself, ⊗ᵢ (Ũ_i + εI)⁻¹, which may be
    older than its statistics.
    """
    first, shape = part.factors[0], [len(f) for f in part.factors]
    assert isinstance(first, Tensor)
    mean = max(float((1 / eigvalsh(first.double())).mean()) - damping, 0.0)
    return mean ** len(shape) * math.prod(shape)


def lemma_10(parts: Sequence[Kronecker], damping: float) -> FactorBounds:
    """Return the bounds of H_a, H_g (where the weight is a matrix) and H: thesis Lemma 10.

    Those of the factors are by (4.10) with Lemma 9 in its proof.

    Args:
        parts: the inverses ⊗ᵢ (Ũ_i + εI)⁻¹ of the block's variables, weight first.
        damping: ε that they were made with.
    """
    shapes = [[len(f) for f in part.factors] for part in parts]
    norms = [gradient_norm_bound(part, damping) for part in parts]
    each = [
        tensor_normal(shape, norm, damping).inverse
        for shape, norm in zip(shapes, norms, strict=True)
    ]
    whole = Bounds(min(b.lower for b in each), max(b.upper for b in each))
    if len(shapes[0]) != 2:
        return FactorBounds(product=whole)
    g, a = (tensor_normal_factor(shapes[0], way, norms[0], damping).inverse for way in (0, 1))
    return FactorBounds(a=a, g=g, product=whole)
