"""Probes of methods against the exact matrices of the minibatch.

Of their blocks, and of the quadratic model of a step. All are of the mean loss at the weights
before the move. The model runs again, as it stands: with BatchNorm in train mode the loss is a
function of the whole minibatch, and so are Hessian and Gauss-Newton products; dense blocks exist
only where examples stand alone, and nothing where the model draws random numbers (dropout): both
are refused.

Legend: D parameters, p direction, α learning rate, d = −α p; m(d) = gᵀd + ½ dᵀBd.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from curvlab import exact
from curvlab.curvature.base import BlockDefaults, with_defaults
from curvlab.errors import CurvlabError
from curvlab.exact.batches import Kind
from curvlab.exact.torch_func import Function
from curvlab.linalg.distances import compare_to_exact
from curvlab.linalg.krylov import lanczos
from curvlab.linalg.operators import Operator
from curvlab.linalg.products import Product
from curvlab.linalg.spectral import eigvalsh
from curvlab.objective import Objective
from curvlab.probes.base import Frame, Numbers, Variable, probe
from curvlab.probes.bounds import ends
from curvlab.system import random_state
from curvlab.system.memory import tensors

WHOLE_KINDS: dict[str, Kind] = {"ggn": "ggn", "hessian": "hessian"}
QUADRATIC_MODELS = ("own", *WHOLE_KINDS)
LARGEST_BLOCK = 1000
"""Order of a block up to which its matrices are formed."""
STEPS, TOP = 30, 10
"""Steps of Lanczos, and the eigenvectors that a step is projected on."""

_ENDS = ("lowest", "highest")


def direction_vector(frame: Frame, algorithm: str) -> Float[Tensor, " D"]:
    """Return an algorithm's direction as one vector, block after block."""
    return torch.cat(
        [frame.directions[algorithm][b.name].flatten() for b in frame.objective.blocks]
    )


def function(frame: Frame) -> Function:
    """Return the model on this minibatch, made once a step.

    Raises CurvlabError where it draws random numbers.
    """

    def make() -> Function:
        closure = frame.now.closure
        before = random_state.states(closure.x.device)
        found = Function(closure, frame.objective.layout)
        found.outputs(found.at, closure.x)
        if random_state.drawn_since(before, closure.x.device):
            raise CurvlabError(
                "the model draws random numbers (dropout), so that a step has no loss of its own:"
                " leave it out"
            )
        return found

    made: Function = frame.once("function", make)
    return made


def exact_product(frame: Frame, kind: Kind) -> Product:
    """Return products with the whole exact matrix, with that of the L2 term."""

    def make() -> Product:
        apply = function(frame).product(kind, 1)
        size, shift = frame.now.size, frame.objective.l2_hessian
        return Product(
            lambda v: apply(v.mT.contiguous()).mT / size + shift * v,
            len(frame.objective.layout),
            frame.objective.dtype,
            frame.objective.device,
        )

    made: Product = frame.once(f"product {kind}", make)
    return made


# ---- the quadratic model of a step


def own_quadratic(frame: Frame, algorithm: str) -> float:
    """Return pᵀBp of the matrix B that a method estimates, undamped.

    By block or of the whole vector; NaN where it estimates none, or not of every block.
    """
    p = direction_vector(frame, algorithm)
    of_whole = frame.curvature(algorithm).undamped(p)
    if of_whole is not None:
        return float(p.double() @ of_whole.double())
    total, blocks = 0.0, frame.of_blocks(algorithm)
    for name in frame.blocks:
        B = estimate(frame, blocks[name]) if name in blocks else None
        if B is None:
            return float("nan")
        p = frame.directions[algorithm][name].flatten()
        total += B[1] * float(p.double() @ (B[0] @ p).double())
        total += frame.objective.l2_hessian * float(p.double().square().sum())
    return total


def estimate(frame: Frame, block: BlockDefaults) -> tuple[Operator, float] | None:
    """Return (B, what takes it to the Fisher's scale) of a block, or None without an estimate.

    The scale is N where the block reads the mean gradient of N examples (`CurvatureBlock.matrix`).
    """
    found = None if block.held is None else block.matrix()
    mean = block.reads == "gradient"
    return None if found is None else (found, float(frame.now.size) if mean else 1.0)


@probe(
    "reduction",
    "reduction of the minibatch's loss by the step: actual, predicted, and their ratio ρ (thesis"
    " (5.5))",
    {
        "reduction_actual": Variable(
            ("algorithm",), "f(θ) − f(θ − α p), the α of the reference", "nat"
        ),
        "reduction_predicted": Variable(
            ("algorithm", "model"), "−m(d) of the method's own B, exact GGN or Hessian", "nat"
        ),
        "rho": Variable(
            ("algorithm", "model"),
            "actual over predicted reduction; below 0: the model errs in sign",
            "1",
        ),
    },
    needs=frozenset({"data"}),
    every=100,
    again=True,
    coordinates={"model": QUADRATIC_MODELS},
)
def _reduction(frame: Frame) -> list[Numbers]:
    f = function(frame)
    closure, l2, start = frame.now.closure, frame.objective.l2, float(frame.now.loss)
    g = torch.cat([frame.now.gradients[b.name].flatten() for b in frame.objective.blocks]).double()
    actual, predicted = [], []
    directions = torch.stack([direction_vector(frame, name) for name in frame.directions], 1)
    products = {kind: exact_product(frame, kind) @ directions for kind in WHOLE_KINDS.values()}
    for i, name in enumerate(frame.directions):
        p = directions[:, i]
        with torch.no_grad():
            w = f.at - frame.lr * p
            loss = (
                f.losses(w, closure.x, closure.y).double().mean() + l2 * w.double().square().sum()
            )
        actual.append(start - float(loss))
        quadratic = [own_quadratic(frame, name)] + [
            float(p.double() @ Bp[:, i].double()) for Bp in products.values()
        ]
        linear = float(g @ p.double())
        predicted.append([frame.lr * linear - frame.lr**2 / 2 * q for q in quadratic])
    there, foreseen = np.asarray(actual), np.asarray(predicted)
    with np.errstate(divide="ignore", invalid="ignore"):
        return [there, foreseen, there[:, None] / foreseen]


# ---- the blocks' own matrices


def _estimates(curvature: Any) -> bool:
    return any(block.estimates() for block in with_defaults(curvature).by_block().values())


_EACH = ("algorithm", "block")


@probe(
    "error",
    "what methods estimate against the exact Fisher block: Frobenius, trace, eigenvalues (order at"
    " most 1000)",
    {
        "matrix_error": Variable(_EACH, "‖B − F‖ / ‖F‖ in Frobenius norm", "1"),
        "matrix_error_scaled": Variable(_EACH, "the same of the best multiple of B", "1"),
        "matrix_cosine": Variable(_EACH, "cosine between B and F", "1"),
        "matrix_trace_ratio": Variable(_EACH, "tr B / tr F", "1"),
        "matrix_spectrum_error": Variable(
            _EACH, "relative distance of the sorted eigenvalues", "1"
        ),
    },
    every=500,
    again=True,
    fits=_estimates,
    wants="a method that estimates a matrix by block",
)
def _error(frame: Frame) -> list[Numbers]:
    objective, closure = frame.objective, frame.now.closure
    names = [b.name for b in objective.blocks if b.layer is not None and b.numel <= LARGEST_BLOCK]
    # whose counts of closures are its own
    fresh = Objective(objective.model, objective.likelihood, objective.seed)
    fishers = exact.matrices(fresh, closure.x, closure.y, "fisher", names) if names else {}
    keys = ("error", "error_scaled", "cosine", "trace_ratio", "spectrum_error")
    found = np.full((len(keys), len(frame.directions), len(objective.blocks)), np.nan)
    for j, name in enumerate(frame.blocks):
        if name not in fishers:
            continue
        F = fishers[name].dense()
        values = eigvalsh(F).double()
        for i, algorithm in enumerate(frame.directions):
            block = frame.of_blocks(algorithm).get(name)
            B = None if block is None else estimate(frame, block)
            if B is not None:
                seen = compare_to_exact(B[0], B[1], F, values)
                found[:, i, j] = [seen[key] for key in keys]
    return list(found)


# ---- eigenvalues and eigenvectors of the whole


def ritz(frame: Frame, kind: Kind) -> tuple[Tensor, Tensor, Tensor]:
    """Return Ritz values, ascending, lengths of their residuals, and Ritz vectors as columns.

    By Lanczos from a normal random vector of a fixed seed, once a step.
    """

    def make() -> tuple[Tensor, Tensor, Tensor]:
        operator = exact_product(frame, kind)
        generator = torch.Generator("cpu").manual_seed(0)
        start = torch.randn(
            len(operator), generator=generator, dtype=torch.float64, device="cpu"
        ).to(frame.objective.device)
        found = lanczos(operator, start.to(frame.objective.dtype), STEPS, basis=True)
        theta, residual, s = found.ritz()
        assert found.basis is not None
        return theta, residual, found.basis @ s

    made: tuple[Tensor, Tensor, Tensor] = frame.once(f"ritz {kind}", make)
    return made


@probe(
    "spectrum",
    "ends of the spectra of the whole exact GGN and Hessian, by 30 steps of Lanczos",
    {
        "curvature_end": Variable(
            ("matrix", "end"),
            "extreme eigenvalue of the minibatch's matrix, with the L2 term",
            "nat",
        ),
        "curvature_end_error": Variable(("matrix", "end"), "an eigenvalue lies this near", "nat"),
    },
    every=1000,
    again=True,
    coordinates={"matrix": tuple(WHOLE_KINDS), "end": _ENDS},
)
def _spectrum(frame: Frame) -> list[Tensor]:
    found = [ritz(frame, kind) for kind in WHOLE_KINDS.values()]
    return [torch.stack([part[i][[0, -1]] for part in found]) for i in (0, 1)]


@probe(
    "alignment",
    "how much of the step lies in the span of the exact matrices' top 10 eigenvectors (Lanczos)",
    {
        "alignment": Variable(
            ("algorithm", "matrix"), "fraction of the squared length of the step", "1"
        ),
        "gradient_alignment": Variable(("matrix",), "the same of the minibatch's gradient", "1"),
    },
    needs=frozenset({"data"}),
    every=1000,
    again=True,
    coordinates={"matrix": tuple(WHOLE_KINDS)},
)
def _alignment(frame: Frame) -> list[Tensor]:
    g = torch.cat([frame.now.gradients[b.name].flatten() for b in frame.objective.blocks])
    steps = torch.stack([direction_vector(frame, name) for name in frame.directions])

    def within(rows: Tensor) -> Tensor:
        tops = [ritz(frame, kind)[2][:, -TOP:] for kind in WHOLE_KINDS.values()]
        return torch.stack([(rows @ top).square().sum(1) / rows.square().sum(1) for top in tops], 1)

    return [within(steps), within(g[None])[0]]


# ---- what a method holds


@probe(
    "condition",
    "condition number of every method's inverse",
    {
        "condition": Variable(
            _EACH,
            "greatest over least eigenvalue of the inverse, of the whole vector's at every block; "
            "NaN above order 2000 without factors, or where it is known by products alone",
            "1",
        ),
    },
    every=50,
)
def _condition(frame: Frame) -> list[Numbers]:
    found = np.full((len(frame.directions), len(frame.blocks)), np.nan)
    for i, algorithm in enumerate(frame.directions):
        inverses = frame.curvature(algorithm).inverses()
        if "whole" in inverses:
            found[i] = _condition_of(inverses["whole"])
            continue
        for j, name in enumerate(frame.blocks):
            if name in inverses:
                found[i, j] = _condition_of(inverses[name])
    return [found]


def _condition_of(inverse: Operator) -> float:
    low, high = ends(inverse)
    return high / low if low > 0 else np.nan


def held(curvature: Any) -> int:
    """Return the bytes of the tensors in a curvature's state, each counted once."""
    kept = with_defaults(
        curvature
    ).state_dict()  # alive until all is counted, so that no address comes twice
    sizes = {
        storage.data_ptr(): storage.nbytes()
        for storage in (t.untyped_storage() for t in tensors(kept))
    }
    return sum(sizes.values())


@probe(
    "memory",
    "what every method keeps from step to step",
    {
        "bytes_held": Variable(
            ("algorithm",), "tensors of the curvature's state, momentum apart", "byte"
        )
    },
    every=200,
)
def _memory(frame: Frame) -> list[Numbers]:
    return [np.asarray([float(held(frame.curvatures.get(name))) for name in frame.directions])]
