"""EKFAC: the diagonal of QᵀFQ exactly, and by Pythagoras at least as near to F as KFAC, always."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from problems import assert_near, batches, problem
from torch import Tensor

import curvlab as cl
from curvlab.algorithms import approximation
from curvlab.curvature import ekfac
from curvlab.linalg.operators import Operator

MODELS = ["tanh", "tokens", "conv", "embedding"]
"""One place and several, filters, an embedding, whose basis of inputs is I."""

KINDS: dict[str, Any] = {"data": "ef", "exact": "fisher"}


def basis(block: Any) -> Tensor:
    Q_G, Q_A = (q if isinstance(q, Tensor) else q.dense() for q in block._bases())
    return torch.kron(Q_G.contiguous(), Q_A.contiguous())


def dense(operator: Operator | None) -> Tensor:
    assert operator is not None
    return operator.dense()


def seen(p: Any, labels: Any, name: str = "ekfac", **options: Any) -> tuple[Any, Any]:
    objective = p.objective()
    curvature: Any = approximation(name, objective, damping=0.1, labels=labels, **options)
    curvature.update(objective.closure(p.x, p.y).observe(curvature.needs))
    return objective, curvature


@pytest.mark.parametrize("labels", ["data", "exact"])
@pytest.mark.parametrize("model", MODELS)
def test_it_is_the_nearest_matrix_in_its_basis(model: str, labels: Any) -> None:
    """D = diag(QᵀFQ), tr E = tr F, ‖F − E‖² = ‖F‖² − ‖D‖², F by `exact`."""
    p = problem(model)
    objective, curvature = seen(p, labels)
    for name, block in curvature.blocks.items():
        F = cl.exact.matrix(objective, p.x, p.y, kind=KINDS[labels], block=name).dense()
        E, Q = dense(block.matrix()), basis(block)
        assert_near(Q.T @ Q, torch.eye(len(Q), dtype=Q.dtype), 1e-13)
        assert_near(block.D.flatten(), (Q.T @ F @ Q).diagonal(), 1e-12)
        assert_near(E.trace(), F.trace(), 1e-12)
        assert_near((F - E).norm() ** 2, F.norm() ** 2 - block.D.norm() ** 2, 1e-10)
        unit = torch.eye(len(E), dtype=E.dtype)
        assert_near(curvature.inverse[name].dense(), torch.linalg.inv(E + 0.1 * unit), 1e-11)


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("labels", ["data", "exact"])
@pytest.mark.parametrize("model", MODELS)
def test_it_is_at_least_as_near_as_kfac(model: str, labels: Any, sharing: str) -> None:
    """At every step, T₂ = 1, of the minibatch's own matrix (no average)."""
    p = problem(model)
    objective = p.objective()
    options: dict[str, Any] = {"labels": labels, "decay": 0.0, "sharing": sharing}
    both: Any = [approximation(n, objective, **options) for n in ("ekfac", "kfac")]
    for x, y in batches(p, 3):
        observation = objective.closure(x, y).observe({labels})
        for curvature in both:
            curvature.update(observation)
        for name in both[0].blocks:
            F = cl.exact.matrix(objective, x, y, kind=KINDS[labels], block=name).dense()
            E, K = (dense(c.blocks[name].matrix()) for c in both)
            assert float((F - E).norm()) <= float((F - K).norm()) * (1 + 1e-12)


def test_of_one_example_at_one_place_it_is_exact() -> None:
    p = problem("tanh", n=1)
    objective, curvature = seen(p, "data")
    for name, block in curvature.blocks.items():
        F = cl.exact.matrix(objective, p.x, p.y, kind="ef", block=name).dense()
        assert_near(dense(block.matrix()), F, 1e-12)


@pytest.mark.parametrize("at_once", [1, 50])
def test_rows_are_squared_in_parts(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    p = problem("conv")
    whole = seen(p, "exact")[1]
    monkeypatch.setattr(ekfac, "AT_ONCE", at_once)
    for name, block in seen(p, "exact")[1].blocks.items():
        assert_near(block.D, whole.blocks[name].D, 1e-13)


@pytest.mark.parametrize("model", MODELS)
def test_what_older_minibatches_left_is_carried_to_the_new_basis(model: str) -> None:
    """D⁺ = (1 − w) diag(Q⁺ᵀ (Q D Qᵀ) Q⁺) + w diag(Q⁺ᵀ F Q⁺), w = ½ at the second minibatch."""
    p = problem(model)
    objective, curvature = seen(p, "data")
    old = {name: dense(block.matrix()) for name, block in curvature.blocks.items()}
    ((x, y),) = batches(p, 1)
    curvature.update(objective.closure(x, y).observe(curvature.needs))
    for name, block in curvature.blocks.items():
        F = cl.exact.matrix(objective, x, y, kind="ef", block=name).dense()
        Q = basis(block)
        expected = (Q.T @ ((old[name] + F) / 2) @ Q).diagonal()
        assert_near(block.D.flatten(), expected, 1e-11)


def test_between_refreshes_the_basis_stands_and_the_diagonal_moves() -> None:
    """T₂ = 3: at the fourth step D and the inverse are of F averaged in the basis of the third."""
    p = problem("tokens")
    objective = p.objective()
    curvature: Any = approximation("ekfac", objective, damping=0.1, labels="data", refresh_every=3)
    for x, y in batches(p, 3):
        curvature.update(objective.closure(x, y).observe(curvature.needs))
    third = {n: (basis(b), dense(b.matrix())) for n, b in curvature.blocks.items()}
    ((x, y),) = batches(p, 1, seed=70)
    curvature.update(objective.closure(x, y).observe(curvature.needs))
    for name, block in curvature.blocks.items():
        Q, E = third[name]
        F = cl.exact.matrix(objective, x, y, kind="ef", block=name).dense()
        assert torch.equal(basis(block), Q)
        D = (Q.T @ (0.75 * E + 0.25 * F) @ Q).diagonal()
        assert_near(block.D.flatten(), D, 1e-12)
        assert_near(curvature.inverse[name].dense(), (Q / (D + 0.1)) @ Q.T, 1e-12)
        assert block._pending is None, "no pass is held"
