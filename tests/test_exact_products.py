"""The same matrices as products: with vectors and columns, diagonal, trace, spectrum, inverse, and
as SciPy sees them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from problems import LIKELIHOODS, MODELS, REPRESENTATIVE, Problem, assert_near, problem
from reference import Reference, assert_block, reference, sampled
from scipy.sparse.linalg import cg, eigsh, svds
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import curvlab as cl
from curvlab.errors import CurvlabError
from curvlab.exact import KINDS, Kind, torch_func
from curvlab.linalg.operators import Dense
from curvlab.linalg.products import Product
from curvlab.linalg.scipy_operator import linear_operator

zoo = pytest.mark.parametrize(
    ("model", "likelihood"), [(m, k) for m in MODELS for k in LIKELIHOODS]
)
models = pytest.mark.parametrize("model", MODELS)
kinds = pytest.mark.parametrize("kind", KINDS)
DRAWS = 2


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).double()


def expected(r: Reference, kind: Kind) -> Tensor:
    return r.drawn(sampled(r.p, r.p.objective(), DRAWS)) if kind == "fisher-mc" else r[kind]


def product(p: Problem, kind: Kind, block: Any = None) -> Any:
    """A `Product`, of a pair a `RectangularProduct`."""
    return cl.exact.product(p.objective(), p.x, p.y, kind, block, draws=DRAWS)


def cut(p: Problem, *sizes: int) -> list[tuple[Tensor, Tensor]]:
    return list(zip(p.x.split(sizes), p.y.split(sizes), strict=True))


@pytest.mark.thinned(8)
@kinds
@zoo
def test_products_diagonal_and_trace(model: str, likelihood: str, kind: Kind) -> None:
    r = reference(model, likelihood)
    whole, found = expected(r, kind), product(r.p, kind)
    assert len(found) == len(whole)
    v = normal(len(whole), 3)
    assert_near(found @ v[:, 0], whole @ v[:, 0])
    assert_near(found @ v, whole @ v)
    scale = float(whole.diagonal().norm())
    assert_near(found.diag(), whole.diagonal())
    assert float((found.trace() - whole.trace()).abs()) <= 1e-12 * scale
    assert_near(
        cl.exact.diagonal(r.p.objective(), r.p.x, r.p.y, kind, draws=DRAWS), whole.diagonal()
    )


@pytest.mark.thinned(2)
@kinds
@models
def test_dense_and_spectrum(model: str, kind: Kind) -> None:
    """More columns than go through the model at once."""
    r = reference(model)
    whole, found = expected(r, kind), product(r.p, kind)
    assert_near(found.dense(), whole)
    assert_near(found.eigvalsh(), torch.linalg.eigvalsh(whole))


@pytest.mark.thinned(8)
@kinds
@models
def test_blocks_parameters_and_pairs(model: str, kind: Kind) -> None:
    r = reference(model)
    whole = expected(r, kind)
    names = [n for b in r.p.objective().blocks for n in (b.name, *b.params)]
    for name in names:
        own = r.entries[name].flatten()
        found = product(r.p, kind, name)
        assert_block(found.dense(), whole[own[:, None], own], whole)
        assert_block(found.diag(), whole.diagonal()[own], whole)
    first = r.entries[names[0]].flatten()
    for name in names:
        own = r.entries[name].flatten()
        pair = product(r.p, kind, (name, names[0]))
        assert pair.shape == (len(own), len(first))
        v, u = normal(len(first), 2), normal(len(own), 2)
        assert_block(pair @ v, whole[own[:, None], first] @ v, whole)
        assert_block(pair.T @ u, whole[first[:, None], own] @ u, whole)


@pytest.mark.thinned(4)
@kinds
@pytest.mark.parametrize("model", [*REPRESENTATIVE, "norm"])
def test_a_loader_is_read_again_and_again(model: str, kind: Kind) -> None:
    """Labels are drawn for each chunk, and again the same at every product."""
    p, loader = problem(model), cut(reference(model).p, 3, 1, 3)
    found: Any = cl.exact.product(p.objective(), loader, kind=kind, draws=DRAWS)
    route = "func" if model == "norm" else "auto"
    whole = cl.exact.matrix(
        p.objective(), loader, kind=kind, block=None, route=route, draws=DRAWS
    ).dense()
    v = normal(len(found), 2)
    for _ in range(2):
        assert_near(found @ v, whole @ v)
        assert_near(found.diag(), whole.diagonal())
    lazy = DataLoader(TensorDataset(p.x, p.y), batch_size=7)
    assert_near(
        cl.exact.product(p.objective(), lazy, kind=kind) @ v,
        cl.exact.product(p.objective(), p.x, p.y, kind) @ v,
    )


def test_the_same_product_draws_the_same_labels_and_the_next_one_new_ones() -> None:
    p = problem()
    objective = p.objective()
    v = normal(len(objective.layout))
    made: list[Any] = [cl.exact.product(objective, p.x, p.y, "fisher-mc") for _ in range(2)]
    one, other = made
    first = one @ v
    objective.closure(p.x, p.y).observe({"model"})
    cl.exact.matrix(objective, p.x, p.y, "fisher-mc", "1")
    assert torch.equal(one @ v, first)
    assert_near(one.diag(), one.dense().diagonal())
    assert not torch.equal(other @ v, first)
    assert_near(first, reference("tanh").drawn(sampled(p, objective)) @ v)
    assert_near(other @ v, reference("tanh").drawn(sampled(p, objective, number=2)) @ v)


def test_a_loader_that_shuffles_has_no_labels_of_its_own() -> None:
    p = problem()
    loader = DataLoader(TensorDataset(p.x, p.y), batch_size=2, shuffle=True)
    v = normal(len(p.objective().layout))
    drawn = cl.exact.product(p.objective(), loader, kind="fisher-mc")
    with pytest.raises(
        CurvlabError,
        match=r"in another order .*: give list\(loader\), or a loader with shuffle=False",
    ):
        [drawn @ v for _ in range(9)]
    assert_near(cl.exact.product(p.objective(), loader, kind="ef") @ v, product(p, "ef") @ v)


@kinds
def test_weights_that_have_moved_are_refused(kind: Kind) -> None:
    p = problem()
    found = product(p, kind, "2")
    v = normal(len(found))
    found @ v
    with torch.no_grad():
        p.model[0].weight.add_(1)
    with pytest.raises(
        CurvlabError,
        match=r"the model's weights have moved since this product was made: make it again",
    ):
        found @ v


@kinds
@pytest.mark.parametrize("model", ["tanh", "conv-norm"])
def test_one_vector_after_the_other(
    model: str, kind: Kind, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the second product on a map that was prepared is taken; it is the same matrix's, and
    weights that move are noticed all the same.
    """
    monkeypatch.setattr(torch_func, "_TRACED", 0.0)
    r = reference(model)
    whole, found = expected(r, kind), product(r.p, kind)
    for v in normal(len(whole), 4).T:
        assert_near(found @ v, whole @ v)
    with torch.no_grad():
        next(r.p.model.parameters()).add_(0)
    with pytest.raises(CurvlabError, match="weights have moved"):
        found @ v


# ------------------------------------------------------------------------------------------------
# inverses


@kinds
@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_damped_inverses(likelihood: str, kind: Kind) -> None:
    """M + λI with λ above −λ_min: (M + λI)⁻¹ v three ways."""
    r = reference("tanh", likelihood)
    whole, found = expected(r, kind), product(r.p, kind)
    damping = 1e-2 + max(0.0, -float(torch.linalg.eigvalsh(whole)[0]))
    damped = Product(lambda v: found @ v + damping * v, len(found), found.dtype, found.device)
    v = normal(len(found), 2)
    solved = torch.linalg.solve(whole + damping * torch.eye(len(whole)).double(), v)
    assert_near(damped.inv() @ v, solved, 1e-11)
    assert_near(
        Dense(found.dense() + damping * torch.eye(len(whole)).double()).inv() @ v, solved, 1e-11
    )
    by_cg, info = cg(linear_operator(damped), v[:, 0].numpy(), rtol=1e-14, maxiter=1000)
    assert info == 0
    assert_near(torch.from_numpy(by_cg), solved[:, 0], 1e-10)


def test_inverse_of_a_block_that_needs_no_damping() -> None:
    p = problem("linear", "gaussian", n=12)
    found: Any = cl.exact.product(p.objective(), p.x, p.y, "hessian", "1")
    v = normal(len(found))
    assert_near(found @ (found.inv() @ v), v)
    dense: Any = cl.exact.matrix(p.objective(), p.x, p.y, "hessian", "1")
    assert_near(found.inv() @ v, dense.inv() @ v)


def test_inverse_of_what_is_singular() -> None:
    p = problem()
    dense: Any = cl.exact.matrix(p.objective(), p.x, p.y, "hessian", "1")
    for operator in (product(p, "ef", "1"), dense):
        with pytest.raises(CurvlabError, match="not positive definite: damp it before inverting"):
            operator.inv()


# ------------------------------------------------------------------------------------------------
# SciPy


@pytest.mark.thinned(2)
@kinds
@pytest.mark.parametrize("model", REPRESENTATIVE)
def test_scipy_operator(model: str, kind: Kind) -> None:
    r = reference(model)
    whole = expected(r, kind).numpy()
    operator = linear_operator(product(r.p, kind))
    assert operator.shape == whole.shape
    assert operator.dtype == np.float64
    v = normal(len(whole), 2).numpy()
    for found, wanted in (
        (operator @ v[:, 0], whole @ v[:, 0]),
        (operator @ v, whole @ v),
        (operator.rmatvec(v[:, 0]), whole @ v[:, 0]),
    ):
        np.testing.assert_allclose(
            found, wanted, rtol=0, atol=1e-12 * float(np.linalg.norm(wanted))
        )
    largest = eigsh(operator, k=2, which="LA", return_eigenvectors=False, v0=v[:, 0], tol=1e-13)
    np.testing.assert_allclose(np.sort(largest), np.linalg.eigvalsh(whole)[-2:], rtol=1e-11)


@kinds
def test_scipy_operator_of_a_pair(kind: Kind) -> None:
    r = reference("tanh")
    own, other = r.slices["2"], r.slices["1"]
    whole = expected(r, kind)[own, other].numpy()
    operator = linear_operator(product(r.p, kind, ("2", "1")))
    u, v = normal(20).numpy(), normal(24).numpy()
    np.testing.assert_allclose(
        operator @ v, whole @ v, rtol=0, atol=1e-12 * float(np.linalg.norm(whole @ v))
    )
    np.testing.assert_allclose(
        operator.rmatvec(u), whole.T @ u, rtol=0, atol=1e-12 * float(np.linalg.norm(whole.T @ u))
    )
    found = svds(operator, k=2, return_singular_vectors=False, v0=u, tol=1e-13, random_state=0)
    np.testing.assert_allclose(
        np.sort(found), np.sort(np.linalg.svd(whole, compute_uv=False))[-2:], rtol=1e-11
    )


# ------------------------------------------------------------------------------------------------
# manners


@kinds
def test_float32_stays_float32_and_the_model_is_left_alone(kind: Kind) -> None:
    p = problem("conv-norm", dtype=torch.float32)
    before = {name: t.clone() for name, t in p.model.state_dict().items()}
    found = product(p, kind)
    v = normal(len(found)).float()
    assert (found @ v).dtype == found.diag().dtype == torch.float32
    assert not (found @ v).requires_grad
    assert all(torch.equal(t, before[name]) for name, t in p.model.state_dict().items())
    assert all(q.grad is None for q in p.model.parameters())


def test_vectors_that_do_not_fit() -> None:
    found = product(problem(), "ggn")
    for v in (normal(58), normal(59).float(), normal(59, 1, 1)):
        with pytest.raises(
            CurvlabError,
            match=(
                r"a 59×59 product got .*: pass a vector \[59\], or columns \[59, K\], of"
                r" torch.float64"
            ),
        ):
            found @ v
