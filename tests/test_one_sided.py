"""ASGO and Muon: full-matrix AdaGrad of one output, polar factors, torch's Muon."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from problems import assert_near, batches, normal, problem
from torch import Tensor, nn

import curvlab as cl
from curvlab.algorithms import approximation
from curvlab.curvature.matrix_parts import WithDiagonal
from curvlab.curvature.one_sided import SCALES, asgo, muon
from curvlab.layers import Block, blocks
from curvlab.linalg.operator_states import pack, unpack_operator
from curvlab.linalg.polar import (
    COEFFICIENTS,
    newton_schulz_bfloat16,
    newton_schulz_factor,
    polar_factor,
)
from curvlab.momentum import Momentum
from curvlab.statistics import LayerStatistics

SHAPES = [(3, 7), (7, 3), (5, 5), (1, 4), (4, 1)]


def weight(shape: tuple[int, int]) -> Block:
    return Block("1", ("w",), shape, None)


def fed(part: WithDiagonal, gradients: list[Tensor], decay: float, damping: float) -> WithDiagonal:
    """The mean of the gradients by Adam's weights."""
    for k, g in enumerate(gradients, 1):
        w = (1 - decay) / (1 - decay**k) if decay else 1.0
        part.update(LayerStatistics(part.block, 1, gradient=g), w)
    part.refresh(damping)
    return part


def polar(G: Tensor) -> Tensor:
    """Of a softmax's last layer the gradient is singular: its columns sum to 0."""
    u, s, v = torch.linalg.svd(G, full_matrices=False)
    return u[:, s > 1e-12 * s[0]] @ v[s > 1e-12 * s[0]]


def published(G: Tensor) -> Tensor:
    """The iteration as it is printed, on the whole matrix."""
    a, b, c = COEFFICIENTS
    x = G / G.norm()
    if x.shape[0] > x.shape[1]:
        return published(G.mT).mT
    for _ in range(5):
        s = x @ x.mT
        x = a * x + (b * s + c * s @ s) @ x
    return x


def in_bfloat16(G: Tensor) -> Tensor:
    """The same in bfloat16, products and sums fused as torch has them."""
    if G.shape[0] > G.shape[1]:
        return in_bfloat16(G.mT).mT
    a, b, c = COEFFICIENTS
    x = G.bfloat16()
    x = x / x.norm()
    for _ in range(5):
        s = x @ x.mT
        x = torch.addmm(x, torch.addmm(s, s, s, beta=b, alpha=c), x, beta=a)
    return x.double()


def applied(P: Tensor, G: Tensor) -> Tensor:
    return P @ G if G.shape[0] <= G.shape[1] else G @ P


# ---- polar factors


@pytest.mark.parametrize("shape", SHAPES)
def test_newton_schulz_on_the_smaller_side_is_the_published_iteration(
    shape: tuple[int, int],
) -> None:
    G = normal(*shape, seed=3)
    P = newton_schulz_factor(G)
    assert len(P) == min(shape)
    assert_near(applied(P, G), published(G), 1e-11)
    assert float(torch.linalg.eigvalsh(P)[0]) > 0


@pytest.mark.parametrize("shape", SHAPES)
def test_the_polar_factor_by_singular_values(shape: tuple[int, int]) -> None:
    G = normal(*shape, seed=4)
    assert_near(applied(polar_factor(G), G), polar(G), 1e-12)


def test_a_singular_matrix_has_a_partial_isometry() -> None:
    G = normal(4, 2, seed=5) @ normal(2, 6, seed=6)
    u, _, v = torch.linalg.svd(G)
    P = polar_factor(G)
    assert_near(P @ G, u[:, :2] @ v[:2], 1e-12)
    assert float(torch.linalg.eigvalsh(P)[0]) > 0


@pytest.mark.parametrize("size", [0.0, 1e-30, 1e30])
@pytest.mark.parametrize("way", [newton_schulz_factor, polar_factor])
def test_no_size_overflows(way: Any, size: float) -> None:
    G = (normal(3, 4) * size).float()
    found = way(G) @ G
    assert bool(found.isfinite().all())
    assert_near(found, (way(normal(3, 4)) @ normal(3, 4)).float() * float(size > 0), 1e-5)


def test_singular_values_go_where_the_docstring_says() -> None:
    s = torch.linspace(0.02, 1, 2000, dtype=torch.float64)
    a, b, c = COEFFICIENTS
    for _ in range(5):
        s = a * s + b * s**3 + c * s**5
    assert float(s.min()) > 0.68
    assert float(s.max()) < 1.135


# ---- Muon


@pytest.mark.parametrize("adjust", ["original", "match_rms_adamw"])
@pytest.mark.parametrize("shape", [(6, 10), (10, 6), (8, 8)])
def test_muon_is_torchs_within_bfloat16(shape: tuple[int, int], adjust: str) -> None:
    """Displacements of five steps, at gradients that are the same for both. Ours is the published
    iteration in double precision to 1e-10, theirs the same in bfloat16, as torch does it, to the
    bit of that precision; the two differ by its rounding, of 2.4 % at most here.
    """
    w = nn.Parameter(torch.zeros(shape, dtype=torch.float64))
    theirs = torch.optim.Muon([w], lr=1.0, weight_decay=0.0, adjust_lr_fn=adjust)
    momentum, part = Momentum(0.95, "nesterov"), muon(weight(shape), scale=adjust)
    rounding = muon(weight(shape), scale=adjust, polar="bfloat16")
    b = torch.zeros(shape, dtype=torch.float64)
    for step in range(5):
        g = normal(*shape, seed=step)
        before = w.detach().clone()
        w.grad = g.clone()
        theirs.step()
        u = momentum({"1": g})["1"]
        for each in (part, rounding):
            each.update(LayerStatistics(each.block, 1, gradient=g), 1.0)
            each.refresh(0.0)
            each.heed(u, 0.0)
        found = (part.inverse @ u.flatten()).view(shape)
        b = 0.95 * b + 0.05 * g
        by_hand = SCALES[adjust](*shape) * published(g + 0.95 * (b - g))
        assert_near(found, by_hand, 1e-10)
        moved = before - w.detach()
        rounded = SCALES[adjust](*shape) * in_bfloat16(g + 0.95 * (b - g))
        assert_near(moved, rounded.double(), 1e-12)
        assert float((found - moved).norm() / found.norm()) < 0.025
        assert_near((rounding.inverse @ u.flatten()).view(shape), moved, 1e-12)
        other = unpack_operator(pack(rounding.inverse))
        assert torch.equal(other @ u.flatten(), rounding.inverse @ u.flatten())
        assert_near(other @ g.flatten(), part.inverse @ g.flatten(), 1e-12)
        assert_near(other.dense(), part.inverse.dense(), 1e-12)


def test_directions_made_together_are_those_of_the_operators() -> None:
    """Three weights of one shape, one of another, with and without biases; a second look at the
    same momentum gives the same, and any other tensor goes by the operator.
    """
    torch.manual_seed(0)
    layers = [nn.Linear(6, 6), nn.Linear(6, 6, bias=False), nn.Linear(6, 6), nn.Linear(6, 4)]
    model = nn.Sequential(*layers).double()
    objective = cl.Objective(model, cl.likelihoods.Gaussian())
    curvature = cl.approximation("muon", objective, polar="bfloat16")
    observation = objective.closure(normal(5, 6), normal(5, 4)).observe(curvature.needs)
    curvature.update(observation)
    momenta = {name: g + 1 for name, g in observation.gradients.items()}
    curvature.heed(momenta)  # type: ignore[attr-defined]
    found, again = curvature.precondition(momenta), curvature.precondition(momenta)
    for block in objective.blocks:
        m = momenta[block.name]
        by_operator = (curvature.inverse[block.name] @ m.flatten()).view(m.shape)
        assert torch.equal(found[block.name], by_operator)
        assert torch.equal(found[block.name], again[block.name])
        W = m[:, :-1] if block.biased else m
        alone = SCALES["match_rms_adamw"](*W.shape) * in_bfloat16(W).double()
        direction = found[block.name][:, :-1] if block.biased else found[block.name]
        assert_near(direction, alone, 1e-12)
    others = {name: m.clone() for name, m in momenta.items()}
    for name, direction in curvature.precondition(others).items():
        assert_near(direction, found[name], 1e-12)


@pytest.mark.parametrize("method", ["muon", "soap", "kl-shampoo", "asgo"])
def test_vectors_that_go_by_adam_together_have_the_bits_of_their_diagonals(method: str) -> None:
    """Norms and, of Muon, a table, which is too long to be short."""
    torch.manual_seed(0)
    layers = [nn.Embedding(5000, 4), nn.LayerNorm(4), nn.Linear(4, 4), nn.LayerNorm(4)]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(8, 3))
    objective = cl.Objective(model, cl.likelihoods.Gaussian())
    curvature = cl.approximation(method, objective)
    x = torch.randint(6, (5, 2))
    for step in range(2):
        observation = objective.closure(x, normal(5, 3).float()).observe(curvature.needs)
        curvature.update(observation)
        momenta = {name: g * (step + 1) for name, g in observation.gradients.items()}
        curvature.heed(momenta)  # type: ignore[attr-defined]
        found = curvature.precondition(momenta)
        apart = [b for b in objective.blocks if curvature.blocks[b.name].part is None]  # type: ignore[attr-defined]
        assert len(apart) == 2 + (method == "muon")
        for block in apart:
            m, v = momenta[block.name], curvature.blocks[block.name].rest  # type: ignore[attr-defined]
            epsilon = curvature.blocks[block.name]._beside(curvature.damping)  # type: ignore[attr-defined]
            diagonal = v.sqrt().add_(epsilon).reciprocal_()
            assert torch.equal(found[block.name], (diagonal * m.flatten()).view(m.shape))
            assert torch.equal(curvature.inverse[block.name].diag(), diagonal)
        others = {name: m.clone() for name, m in momenta.items()}
        for name, direction in curvature.precondition(others).items():
            assert_near(direction, found[name], 1e-4)
    curvature.damping = 0.5  # a refresh after it leaves none that was made before
    curvature.refresh()
    for block in apart:
        m = momenta[block.name]
        again = curvature.precondition(momenta)[block.name]
        by_operator = (curvature.inverse[block.name] @ m.flatten()).view(m.shape)
        assert torch.equal(again, by_operator)
        assert not torch.equal(again, found[block.name])


@pytest.mark.parametrize(
    "shapes", [[(400, 420)], [(784, 500)], [(6, 9), (9, 6), (6, 9)], [(65, 64), (64, 65), (64, 65)]]
)
def test_halves_and_stacks_have_the_bits_of_whole_products(shapes: list[tuple[int, int]]) -> None:
    Us = [normal(*shape, seed=seed).float() for seed, shape in enumerate(shapes)]
    for U, found in zip(Us, newton_schulz_bfloat16(Us), strict=True):
        assert torch.equal(found, in_bfloat16(U))


def test_muon_as_an_optimizer_by_hand() -> None:
    """Weights by the polar factor of the Nesterov momentum, biases by Adam's diagonal, decoupled
    decay, T₂ = 3 without effect on either.
    """
    p, lr, decay, eps = problem("tanh"), 0.01, 0.1, 1e-8
    objective = p.objective()
    optimizer = cl.optimizer("muon", objective, lr=lr, polar="svd", refresh_every=3)
    w = {n: t.detach().clone() for n, t in objective.parameters.items()}
    b = {n: torch.zeros_like(t) for n, t in w.items()}
    v = {n: torch.zeros_like(t) for n, t in w.items()}
    for k, (x, y) in enumerate(batches(p, 6), 1):
        leaves = {n: t.clone().requires_grad_() for n, t in w.items()}
        loss = p.likelihood.loss(torch.func.functional_call(p.model, leaves, (x,)), y).mean()
        g = dict(zip(w, torch.autograd.grad(loss, list(leaves.values())), strict=True))
        for n in w:
            b[n] = 0.95 * b[n] + 0.05 * g[n]
            v[n] = 0.95 * v[n] + 0.05 * g[n].square()
            u = 0.95 * b[n] + 0.05 * g[n]
            if w[n].ndim == 2:
                d = 0.2 * max(w[n].shape) ** 0.5 * polar(u)
            else:
                d = u / ((v[n] / (1 - 0.95**k)).sqrt() + eps)
            w[n] = w[n] * (1 - lr * decay) - lr * d
        optimizer.step(objective.closure(x, y))
        for n, t in objective.parameters.items():
            assert_near(t.detach(), w[n], 1e-10)


def test_what_is_no_hidden_matrix_goes_by_adam(caplog: pytest.LogCaptureFixture) -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.inner = nn.Embedding(6, 4), nn.Linear(4, 4)
            self.norm, self.lm_head = nn.LayerNorm(4), nn.Linear(4, 3)

    made = blocks(Named())
    with caplog.at_level(logging.INFO, "curvlab"):
        parts = {b.params[0]: muon(b).part is not None for b in made}
    assert parts == {
        "words.weight": False,
        "inner.weight": True,
        "norm.weight": False,
        "lm_head.weight": False,
    }
    assert "(lm_head.weight, lm_head.bias) goes by Adam's diagonal" in caplog.text
    assert all(muon(b, apart="").part is not None for b in made if "head" in b.params[0])
    with pytest.raises(cl.CurvlabError, match="unknown polar 'qr'"):
        muon(made[1], polar="qr")


# ---- ASGO


@pytest.mark.parametrize("shape", SHAPES)
def test_without_memory_asgo_is_the_polar_factor(shape: tuple[int, int]) -> None:
    """(GGᵀ)^{−1/2} G = Muon's direction without a scale, and, of the normalized form, its shape."""
    g = normal(*shape, seed=7)
    found = fed(asgo(weight(shape), normalized=False), [g], 0.0, 1e-14).inverse @ g.flatten()
    assert_near(found.view(shape), polar(g), 1e-9)
    by_muon = muon(weight(shape), polar="svd", scale="none")
    by_muon.update(LayerStatistics(by_muon.block, 1, gradient=g), 1.0)
    assert_near(found, by_muon.inverse @ g.flatten(), 1e-9)


def test_of_one_output_it_is_full_matrix_adagrad() -> None:
    """[1, I]: the smaller side is of order 1; a weight stored as [I, 1] has it too. Full-matrix
    AdaGrad is that of E[g gᵀ] on the side I, which a vector's smaller Gram matrix is not: so the
    larger side's root is compared in direction for gradients along one line.
    """
    g = normal(1, 5, seed=8)
    sizes = [2.0, -1.0, 0.5]
    part = fed(asgo(weight((1, 5)), normalized=False), [s * g for s in sizes], 0.8, 1e-14)
    weights = torch.tensor([0.8**2, 0.8, 1.0], dtype=torch.float64)
    squares = torch.tensor(sizes, dtype=torch.float64).square()
    mean = (weights * squares).sum() / weights.sum()
    C = mean * g.T @ g
    e, q = torch.linalg.eigh(C)
    root = q[:, -1:] @ q[:, -1:].T / e[-1].sqrt()
    assert_near(part.inverse @ g.flatten(), root @ g.flatten(), 1e-10)


@pytest.mark.parametrize("shape", [(4, 6), (6, 4)])
def test_its_operator_and_its_matrix(shape: tuple[int, int]) -> None:
    """H = (V + εI)^{−1/2} on the smaller side, B = V + εI there, V by Adam's weights."""
    gradients = [normal(*shape, seed=s) for s in (1, 2, 3)]
    part = fed(asgo(weight(shape), normalized=False), gradients, 0.8, 0.3)
    weights = torch.tensor([0.8**2, 0.8, 1.0], dtype=torch.float64)
    stack = torch.stack(gradients)
    each = stack @ stack.mT if shape[0] < shape[1] else stack.mT @ stack
    V = (weights[:, None, None] * each).sum(0) / weights.sum()
    V = V + 0.3 * torch.eye(len(V), dtype=V.dtype)
    e, q = torch.linalg.eigh(V)
    unit = torch.eye(6, dtype=V.dtype)

    def laid(M: Tensor) -> Tensor:
        return torch.kron(M, unit) if shape[0] < shape[1] else torch.kron(unit, M)

    assert_near(part.inverse.dense(), laid(((q / e.sqrt()) @ q.T).contiguous()), 1e-12)
    B = part.matrix(0.3)
    assert B is not None
    assert_near(B.dense(), laid(V), 1e-13)


def test_the_normalized_direction_has_adamws_length() -> None:
    p = problem("tanh")
    objective = p.objective()
    optimizer = cl.optimizer("asgo", objective, lr=1e-3)
    for x, y in batches(p, 3):
        seen: list[Any] = []
        optimizer.look = lambda _, d, seen=seen: seen.append(d)
        optimizer.step(objective.closure(x, y))
        for name, d in seen[0].items():
            w = objective.parameters[objective.layout.blocks[int(name) - 1].params[0]]
            # the step has moved it by 1e-3 of the direction, decay included
            decayed = d[:, :-1] - 0.1 * (w.detach() + 1e-3 * d[:, :-1])
            assert_near(decayed.norm(), torch.tensor(0.2 * w.numel() ** 0.5).double(), 1e-7)


def test_a_members_operator_before_any_momentum_is_of_the_gradient() -> None:
    p = problem("tanh")
    objective = p.objective()
    for name in ("muon", "asgo"):
        curvature: Any = approximation(name, objective, damping=1e-12)
        observation = objective.closure(p.x, p.y).observe(curvature.needs)
        curvature.update(observation)
        found = curvature.precondition(observation.gradients)
        for block, g in observation.gradients.items():
            W, expected = found[block][:, :-1], polar(g[:, :-1])
            cosine = float((W * expected).sum() / (W.norm() * expected.norm()))
            assert cosine > (0.95 if name == "muon" else 1 - 1e-6)
