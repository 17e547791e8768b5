"""Extreme eigenvalues of the inverses' factors, beside what is proven of them.

| of which | bound | from |
|---|---|---|
| H_a of K-BFGS-convergent, which inverts A | `input_factor` | thesis Lemma 1, (3.17) in Lemma 7 |
| H_g of DD-skip, while no pair was dropped | `double_damping_lbfgs` | thesis Lemma 2 |
| H_g of K-BFGS with D_P(I) D_LM | `damped_lbfgs` | thesis Lemma 6, 2021 Lemma 3 |
| H = H_g ⊗ H_a of these | the product | thesis Lemmas 3, 7 |
| one update of H_g | `double_damping_step`, `damped_step` | thesis (2.8), (2.10); Lemma 5 |
| H_g, H_a of TNT on a matrix | `tensor_normal_factor` | thesis Lemma 10's proof: (4.10), Lemma 9 |
| H of TNT | `tensor_normal` | thesis Lemma 10 |

φ bounds a layer's inputs. It is 1 behind a tanh, sigmoid or softmax, also through pooling and
reshaping (`phi_proven` 1); else it is measured: the greatest input of this minibatch, or the root
mean square of those in A, which may be of earlier ones, where that is more. Lemma 10 is taken with
the trace of the averaged E[vec G vec Gᵀ], which is that of every contraction, in place of its norm,
which nobody keeps. NaN: no theorem, or its premise does not hold.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import product
from typing import Any

import numpy as np
from torch import Tensor, nn

from curvlab.closure import Closure
from curvlab.curvature.base import with_defaults
from curvlab.linalg.bounds import Bounds
from curvlab.linalg.damped import Solve
from curvlab.linalg.direct_sum import ColumnSum, DirectSum
from curvlab.linalg.eigenbasis import Rotated
from curvlab.linalg.operators import Diagonal, Kronecker, Operator
from curvlab.linalg.products import Product
from curvlab.linalg.spectral import eigvalsh
from curvlab.probes.base import Frame, Numbers, Variable, probe

FACTORS = ("a", "g", "product")
LARGEST_INVERSE = 2000
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
"""Layers whose weights meet normalised inputs."""

Ends = tuple[float, float]


def ends(matrix: Tensor | Operator) -> Ends:
    """Return the least and the greatest eigenvalue, through the factors if any.

    NaN where it would take long, or only products are known.
    """
    if isinstance(matrix, Kronecker):
        corners = [math.prod(corner) for corner in product(*(ends(f) for f in matrix.factors))]
        return min(corners), max(corners)
    if isinstance(matrix, DirectSum | ColumnSum):
        each = [ends(part) for part in matrix.parts]
        return min(low for low, _ in each), max(high for _, high in each)
    if isinstance(matrix, Product | Solve):
        return _NONE
    if isinstance(matrix, Tensor):
        values = eigvalsh(matrix)
    elif len(matrix) <= LARGEST_INVERSE or isinstance(
        matrix.inside if isinstance(matrix, Rotated) else matrix, Diagonal
    ):
        values = matrix.eigvalsh()
    else:
        return _NONE
    return float(values[0]), float(values[-1])


def input_bounds(frame: Frame) -> dict[str, tuple[float, bool]]:
    """Return {block: (φ, whether the activation proves it)} of the layers with a rule."""

    def make() -> dict[str, tuple[float, bool]]:
        proven = bounded_inputs(frame.now.closure)
        statistics = frame.now.passes["data"]
        return {
            b.name: (
                (1.0, True)
                if b.name in proven
                else (float(statistics[b.name].bare_a.abs().max()), False)
            )
            for b in frame.objective.blocks
            if statistics[b.name].structured and statistics[b.name].used
        }

    found: dict[str, tuple[float, bool]] = frame.once("phi", make)
    return found


def bounded_inputs(closure: Closure) -> set[str]:
    """Return the blocks whose inputs are at most 1 for every input of the model.

    By what the graph of two examples says.
    """
    found: set[str] = set()
    handles = []
    for block in closure.objective.blocks:
        if block.module is not None and not isinstance(block.module, _NORMS):

            def hook(module: Any, args: tuple[Any, ...], name: str = block.name) -> None:
                node = args[0].grad_fn if args and isinstance(args[0], Tensor) else None
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


def _prepare(frame: Frame) -> None:
    """Keep H_g before the step, of which the one-step bounds speak."""
    found: dict[tuple[str, str], tuple[Ends, int]] = {}
    for algorithm in frame.directions:
        for name, block in frame.of_blocks(algorithm).items():
            held, factors = block.pairs_held(), block.kronecker_factors()
            if held is not None and factors is not None:
                found[algorithm, name] = ends(factors[0]), held
    frame.shared["H_g before"] = found
    input_bounds(frame)


def _clear(curvature: Any) -> None:
    with_defaults(curvature).forget_learnt()


def _fits(curvature: Any) -> bool:
    return any(block.factored for block in with_defaults(curvature).by_block().values())


_EACH = ("algorithm", "block", "factor")


@probe(
    "bounds",
    "extreme eigenvalues of H_a, H_g and H after the step, beside the theorems' bounds",
    {
        "eigenvalue_low": Variable(
            _EACH, "least eigenvalue of the factor, or of the whole inverse", "1"
        ),
        "eigenvalue_high": Variable(
            _EACH, "greatest eigenvalue of the factor, or of the whole inverse", "1"
        ),
        "bound_low": Variable(_EACH, "lower bound of the eigenvalues; NaN: none is proven", "1"),
        "bound_high": Variable(_EACH, "upper bound of the eigenvalues; NaN: none is proven", "1"),
        "tightness_low": Variable(
            _EACH, "least eigenvalue over its bound: 1 is tight, below 1 is a violation", "1"
        ),
        "tightness_high": Variable(
            _EACH, "bound over the greatest eigenvalue: 1 is tight, below 1 is a violation", "1"
        ),
        "update_norm_B": Variable(
            ("algorithm", "block"), "norm of the inverse of H_g after its update", "1"
        ),
        "update_bound_B": Variable(
            ("algorithm", "block"), "its bound by (2.8) or Lemma 5; NaN: the premise fails", "1"
        ),
        "update_norm_H": Variable(("algorithm", "block"), "norm of H_g after its update", "1"),
        "update_bound_H": Variable(
            ("algorithm", "block"), "its bound by (2.10) or Lemma 5; NaN: the premise fails", "1"
        ),
        "phi": Variable(("block",), "bound φ of the layer's inputs", "1"),
        "phi_proven": Variable(("block",), "1: the activation proves φ; 0: it is measured", "1"),
    },
    needs=frozenset({"data"}),
    moment="after",
    every=50,
    again=True,
    coordinates={"factor": FACTORS},
    begin=_clear,
    prepare=_prepare,
    fits=_fits,
    wants="a method with Kronecker factors",
)
def _bounds(frame: Frame) -> list[Numbers]:
    names = frame.blocks
    places = {name: j for j, name in enumerate(names)}
    phis = _measured(frame)
    before: Mapping[tuple[str, str], tuple[Ends, int]] = frame.shared["H_g before"]
    shape = (len(frame.directions), len(names))
    found, proven = np.full((*shape, 3, 2), np.nan), np.full((*shape, 3, 2), np.nan)
    norms, limits = np.full((*shape, 2), np.nan), np.full((*shape, 2), np.nan)
    for i, algorithm in enumerate(frame.directions):
        curvature = frame.curvature(algorithm)
        for name, block in frame.of_blocks(algorithm).items():
            j = places[name]
            inverse, factors = block.held, block.kronecker_factors()
            if not block.factored or inverse is None:
                continue
            if factors is not None:
                found[i, j, 1], found[i, j, 0] = ends(factors[0]), ends(factors[1])
            alone = factors is not None and isinstance(inverse, Kronecker)
            found[i, j, 2] = found[i, j, 0] * found[i, j, 1] if alone else ends(inverse)
            theory = block.bounds(curvature.refreshed, phis.get(name, _NONE)[0])
            proven[i, j] = [_pair(x) for x in (theory.a, theory.g, theory.product)]
            if (algorithm, name) in before:
                (low, high), held = before[algorithm, name]
                limits[i, j] = block.update_bounds(1 / low, high, held) or _NONE
                if np.isfinite(limits[i, j, 0]):
                    norms[i, j] = 1 / found[i, j, 1, 0], found[i, j, 1, 1]
    phi = np.array([phis.get(name, _NONE) for name in names], dtype=float)
    low_ratio, high_ratio = found[..., 0] / proven[..., 0], proven[..., 1] / found[..., 1]
    return [
        found[..., 0], found[..., 1], proven[..., 0], proven[..., 1], low_ratio, high_ratio,
        norms[..., 0], limits[..., 0], norms[..., 1], limits[..., 1], phi[:, 0], phi[:, 1],
    ]  # fmt: skip


def _measured(frame: Frame) -> dict[str, tuple[float, bool]]:
    """Return `input_bounds`, raised where an inverted second moment has had greater inputs.

    They were in earlier minibatches.
    """
    phis = dict(input_bounds(frame))
    for algorithm in frame.directions:
        for name, block in frame.of_blocks(algorithm).items():
            norm = None if name in phis and phis[name][1] else block.input_norm()
            if norm is not None:
                phis[name] = max(phis[name][0] if name in phis else 0.0, norm), False
    return phis


def _pair(bounds: Bounds | None) -> Ends:
    return _NONE if bounds is None else (bounds.lower, bounds.upper)
