"""Extreme eigenvalues of the inverses' factors, beside what is proven of them.

| of which | bound | from |
|---|---|---|
| H_a of K-BFGS where A is inverted (the convergent variants) | `input_factor` | thesis Lemma 1, (3.17) in Lemma 7 |
| H_g of K-BFGS with DD-skip, as long as no pair was dropped | `double_damping_lbfgs` | thesis Lemma 2 |
| H_g of K-BFGS with D_P(I) D_LM | `damped_lbfgs` | thesis Lemma 6, 2021 Lemma 3 |
| H = H_g ⊗ H_a of these | the product | thesis Lemmas 3, 7 |
| one update of H_g | `double_damping_step`, `damped_step` | thesis (2.8), (2.10); Lemma 5 |
| H_g, H_a of TNT on a matrix of weights | `tensor_normal_factor` | thesis, proof of Lemma 10: (4.10) with Lemma 9 |
| H of TNT | `tensor_normal` | thesis Lemma 10 |

φ bounds a layer's inputs. It is 1 behind a tanh, sigmoid or softmax, also through pooling and reshaping (`phi_proven` 1); else
it is measured: the greatest input of this minibatch, or the root mean square of those in A, which may be of earlier ones,
where that is more. Lemma 10 is taken with the trace of the averaged E[vec G vec Gᵀ], which is
that of every contraction, in place of its norm, which nobody keeps. NaN: no theorem, or its premise does not hold.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from curvlab.closure import Closure
from curvlab.linalg.bfgs import MU1, Pair
from curvlab.linalg.bounds import (
    Bounds,
    damped_lbfgs,
    damped_step,
    double_damping_lbfgs,
    double_damping_step,
    input_factor,
    tensor_normal,
    tensor_normal_factor,
)
from curvlab.linalg.bounds import mu3 as third
from curvlab.linalg.damped import Solve
from curvlab.linalg.direct_sum import ColumnSum, DirectSum
from curvlab.linalg.operators import Diagonal, Kronecker, Operator
from curvlab.linalg.products import Product
from curvlab.probes.base import Frame, Values, Variable, probe
from curvlab.probes.damping import holds

FACTORS = ("a", "g", "product")
LARGEST = 2000
"""Order up to which an inverse that is no product of factors has its eigenvalues computed."""

_NONE = (math.nan, math.nan)
_BOUNDED = ("TanhBackward0", "SigmoidBackward0", "SoftmaxBackward0")
_THROUGH = (
    "View",
    "Reshape",
    "UnsafeView",
    "Permute",
    "Transpose",
    "MaxPool",
    "AvgPool",
    "AdaptiveAvgPool",
    "Squeeze",
    "Unsqueeze",
)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.LayerNorm, nn.RMSNorm, nn.GroupNorm)
"""Their weights meet normalised inputs."""
_STARTS: dict[str, float | None] = {"pi-lm": None, "pi-lm-2021": 1.0}
"""h of D_P(I) D_LM, where H_g starts from h I too (None: 1/μ₂): thesis Alg. 10, 11; 2021 Alg. 3, 4."""

Ends = tuple[float, float]


def ends(matrix: Tensor | Operator) -> Ends:
    """Least and greatest eigenvalue, through the factors if any; NaN where it would take long, or only products are known."""
    if isinstance(matrix, Kronecker):
        corners = [math.prod(corner) for corner in product(*(ends(f) for f in matrix.factors))]
        return min(corners), max(corners)
    if isinstance(matrix, DirectSum | ColumnSum):
        each = [ends(part) for part in matrix.parts]
        return min(low for low, _ in each), max(high for _, high in each)
    if isinstance(matrix, Product | Solve):
        return _NONE
    if isinstance(matrix, Tensor):
        values = torch.linalg.eigvalsh(matrix)
    elif len(matrix) <= LARGEST or isinstance(getattr(matrix, "inside", matrix), Diagonal):
        values = matrix.eigvalsh()
    else:
        return _NONE
    return float(values[0]), float(values[-1])


def input_bounds(frame: Frame) -> dict[str, tuple[float, bool]]:
    """{block: (φ, whether the activation proves it)} of the layers with a rule."""

    def make() -> dict[str, tuple[float, bool]]:
        proven = bounded_inputs(frame.now.closure)
        statistics = frame.now.passes["data"]
        return {
            b.name: (1.0, True) if b.name in proven else (float(statistics[b.name].bare_a.abs().max()), False)
            for b in frame.objective.blocks
            if statistics[b.name].structured and statistics[b.name].used
        }

    found: dict[str, tuple[float, bool]] = frame.once("phi", make)
    return found


def bounded_inputs(closure: Closure) -> set[str]:
    """Blocks whose inputs are at most 1 for every input of the model, by what the graph of two examples says."""
    found: set[str] = set()
    handles = []
    for block in closure.objective.blocks:
        if block.module is not None and not isinstance(block.module, _NORMS):

            def hook(module: Any, args: tuple[Any, ...], name: str = block.name) -> None:
                node = getattr(args[0], "grad_fn", None) if args else None
                while node is not None and node.name().startswith(_THROUGH):
                    node = node.next_functions[0][0]
                if node is not None and node.name() in _BOUNDED:
                    found.add(name)

            handles.append(block.module.register_forward_pre_hook(hook))
    try:
        closure.forward(closure.x[:2])
    finally:
        for handle in handles:
            handle.remove()
    return found


def _factors(block: Any) -> tuple[Tensor | Operator, Tensor | Operator] | None:
    """(H_g, H_a) of a block that has them."""
    inverse = getattr(block, "inverse", None)
    two = isinstance(inverse, Kronecker) and len(inverse.factors) == 2 and not hasattr(block, "means")
    return (inverse.factors[0], inverse.factors[1]) if two and isinstance(inverse, Kronecker) else None


def _learns(block: Any) -> bool:
    return hasattr(block, "pair_damping")


def of_inputs(block: Any, inputs: int, biased: bool, phi: float) -> Bounds | None:
    """Of H_a, where it is the inverse of A + λ_A I."""
    if not (_learns(block) and block.exact):
        return None
    return input_factor(inputs if biased else inputs + 1, phi, block.mu2["a"], block.places)


def input_in(block: Any, biased: bool) -> float:
    """Root mean square of the inputs in the A that H_a inverts, of whatever minibatches: φ is not below it."""
    H_a = block.factors[1].double()
    squares = float(torch.linalg.inv(H_a).trace() - len(H_a) * block.mu2["a"]) / block.places
    return math.sqrt(max(0.0, squares - biased) / max(1, len(H_a) - biased))


def of_outputs(block: Any) -> Bounds | None:
    """Of H_g by L-BFGS, from the pairs that it holds."""
    if not (_learns(block) and block.pairs):
        return None
    count, mu2 = 0 if block.S is None else len(block.S), block.mu2["g"]
    if block.pair_damping == "dd" and block.skip and count < block.pairs:
        return double_damping_lbfgs(count, MU1, mu2)
    if block.pair_damping in _STARTS and block._start(mu2) == (_STARTS[block.pair_damping] or 1 / mu2):
        return damped_lbfgs(count, MU1, mu2, _STARTS[block.pair_damping])
    return None


def parts_of(inverse: Operator) -> list[Kronecker]:
    """The parameters of TNT's block, weight first."""
    return [part for part in (inverse.parts if isinstance(inverse, ColumnSum) else (inverse,)) if isinstance(part, Kronecker)]


def norm_of(part: Kronecker, damping: float) -> float:
    """tr E[vec G vec Gᵀ] from H itself, which may be older than its statistics: c₀ᵏ Π d_j by (4.10), c₀ the mean of Ũ₁."""
    first, shape = part.factors[0], [len(f) for f in part.factors]
    assert isinstance(first, Tensor)
    mean = max(float((1 / torch.linalg.eigvalsh(first.double())).mean()) - damping, 0.0)
    return mean ** len(shape) * math.prod(shape)


def of_contractions(parts: Sequence[Kronecker], damping: float) -> list[Bounds | None]:
    """Of TNT's H_a, H_g (None where the weight is no matrix) and H, from its parts."""
    shapes, norms = [[len(f) for f in part.factors] for part in parts], [norm_of(part, damping) for part in parts]
    each = [tensor_normal(shape, norm, damping).inverse for shape, norm in zip(shapes, norms, strict=True)]
    whole = Bounds(min(b.lower for b in each), max(b.upper for b in each))
    if len(shapes[0]) != 2:
        return [None, None, whole]
    return [*(tensor_normal_factor(shapes[0], way, norms[0], damping).inverse for way in (1, 0)), whole]


def of_update(block: Any, before: Ends, held: int) -> Ends:
    """Bounds on (‖B⁺‖, ‖H⁺‖) of the last update of H_g, from the ends of H_g before it; NaN where their premises fail."""
    pair = block.last.get("g") if _learns(block) else None
    dropped = _learns(block) and block.pairs and held == block.pairs
    if not isinstance(pair, Pair) or pair.skipped or dropped:
        return _NONE
    mu2, after = block.mu2["g"], pair.damping.after
    norm_B, norm_H = 1 / before[0], before[1]
    curvature, step, change = (np.asarray(float(x) / float(after.sy)) for x in (after.yHy, after.ss, after.yy))
    if not holds(step, 1 / mu2):
        return _NONE
    if block.pair_damping in _STARTS:
        mu3 = third(MU1, mu2, _STARTS[block.pair_damping])
        return damped_step(norm_B, norm_H, mu2, mu3) if holds(change, 1 / mu3) else _NONE
    return double_damping_step(norm_B, norm_H, MU1, mu2) if holds(curvature, 1 / MU1) else _NONE


def _prepare(frame: Frame) -> None:
    """H_g before the step, of which the one-step bounds speak."""
    found: dict[tuple[str, str], tuple[Ends, int]] = {}
    for algorithm in frame.directions:
        for name, block in frame.of_blocks(algorithm).items():
            factors = _factors(block)
            if _learns(block) and factors is not None:
                found[algorithm, name] = ends(factors[0]), 0 if block.S is None else len(block.S)
    frame.shared["H_g before"] = found
    input_bounds(frame)


def _clear(curvature: Any) -> None:
    for block in getattr(curvature, "blocks", {}).values():
        if _learns(block):
            block.last = {}


def _has_factors(block: Any) -> bool:
    return _learns(block) or any(hasattr(block, x) for x in ("means", "G"))


def _fits(curvature: Any) -> bool:
    return any(map(_has_factors, getattr(curvature, "blocks", {}).values()))


_EACH = ("algorithm", "block", "factor")


@probe(
    "bounds", "extreme eigenvalues of H_a, H_g and H after the step, beside the theorems' bounds",
    {
        "eigenvalue_low": Variable(_EACH, "least eigenvalue of the factor, or of the whole inverse", "1"),
        "eigenvalue_high": Variable(_EACH, "greatest eigenvalue of the factor, or of the whole inverse", "1"),
        "bound_low": Variable(_EACH, "lower bound of the eigenvalues; NaN: none is proven", "1"),
        "bound_high": Variable(_EACH, "upper bound of the eigenvalues; NaN: none is proven", "1"),
        "tightness_low": Variable(_EACH, "least eigenvalue over its bound: 1 is tight, below 1 is a violation", "1"),
        "tightness_high": Variable(_EACH, "bound over the greatest eigenvalue: 1 is tight, below 1 is a violation", "1"),
        "update_norm_B": Variable(("algorithm", "block"), "norm of the inverse of H_g after its update", "1"),
        "update_bound_B": Variable(("algorithm", "block"), "its bound by (2.8) or Lemma 5; NaN: the premise fails", "1"),
        "update_norm_H": Variable(("algorithm", "block"), "norm of H_g after its update", "1"),
        "update_bound_H": Variable(("algorithm", "block"), "its bound by (2.10) or Lemma 5; NaN: the premise fails", "1"),
        "phi": Variable(("block",), "bound φ of the layer's inputs", "1"),
        "phi_proven": Variable(("block",), "1: the activation proves φ; 0: it is measured", "1"),
    },
    needs=frozenset({"data"}), moment="after", every=50, again=True, coordinates={"factor": FACTORS},
    begin=_clear, prepare=_prepare, fits=_fits, wants="a method with Kronecker factors",
)  # fmt: skip
def _bounds(frame: Frame) -> list[Values]:
    blocks = {b.name: b for b in frame.objective.blocks}
    phis = dict(input_bounds(frame))
    for algorithm in frame.directions:
        for name, block in frame.of_blocks(algorithm).items():
            if _learns(block) and block.exact and not phis[name][1]:
                phis[name] = max(phis[name][0], input_in(block, blocks[name].biased)), False
    shape = (len(frame.directions), len(blocks))
    found, proven = np.full((*shape, 3, 2), np.nan), np.full((*shape, 3, 2), np.nan)
    norms, limits = np.full((*shape, 2), np.nan), np.full((*shape, 2), np.nan)
    before: Mapping[tuple[str, str], tuple[Ends, int]] = frame.shared["H_g before"]
    for i, algorithm in enumerate(frame.directions):
        curvature = frame.curvatures.get(algorithm)
        for j, (name, block) in enumerate(frame.of_blocks(algorithm).items()):
            factors = _factors(block)
            if not _has_factors(block):
                continue
            if factors is None:
                found[i, j, 2] = ends(block.inverse)
                if getattr(curvature, "name", "").startswith("tnt"):
                    parts = parts_of(block.inverse)
                    proven[i, j] = [_pair(x) for x in of_contractions(parts, curvature.damping)]  # type: ignore[union-attr]  # has a name
                    if len(parts[0].factors) == 2:
                        found[i, j, [1, 0]] = [ends(factor) for factor in parts[0].factors]
                continue
            found[i, j, 1], found[i, j, 0] = ends(factors[0]), ends(factors[1])
            found[i, j, 2] = found[i, j, 0] * found[i, j, 1]
            b = blocks[name]
            each = [of_inputs(block, b.shape[1], b.biased, phis[name][0]), of_outputs(block)]
            proven[i, j, :2] = [_pair(x) for x in each]
            if each[0] is not None and each[1] is not None:
                proven[i, j, 2] = _pair(each[0] * each[1])
            if (algorithm, name) in before:
                limits[i, j] = of_update(block, *before[algorithm, name])
                norms[i, j] = (1 / found[i, j, 1, 0], found[i, j, 1, 1]) if np.isfinite(limits[i, j, 0]) else _NONE
    phi = np.array([phis.get(name, _NONE) for name in blocks], dtype=float)
    low, high = found[..., 0] / proven[..., 0], proven[..., 1] / found[..., 1]
    return [
        found[..., 0], found[..., 1], proven[..., 0], proven[..., 1], low, high,
        norms[..., 0], limits[..., 0], norms[..., 1], limits[..., 1], phi[:, 0], phi[:, 1],
    ]  # fmt: skip


def _pair(bounds: Bounds | None) -> Ends:
    return _NONE if bounds is None else (bounds.lower, bounds.upper)
