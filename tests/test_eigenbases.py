"""SOAP and KL-Shampoo: Adam in a basis, equivariance, the likelihood's maximum, trajectories."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from problems import assert_near, normal, spd
from torch import Tensor, nn

import curvlab as cl
from curvlab.curvature.block_states import checked, put_back, states_of
from curvlab.curvature.eigenbases import kl_shampoo, soap
from curvlab.curvature.matrix_parts import WithDiagonal
from curvlab.layers import Block
from curvlab.linalg.eigenbasis import Rotated
from curvlab.linalg.kronecker import tensor_normal_factors
from curvlab.linalg.matrix_normal import gaussian_kl, kronecker_likelihood_fit
from curvlab.momentum import Momentum, MomentumKind
from curvlab.statistics import LayerStatistics


def weight(shape: tuple[int, int]) -> Block:
    return Block("1", ("w",), shape, None)


def directions(
    part: WithDiagonal,
    gradients: list[Tensor],
    weights: list[float],
    *,
    beta: float,
    kind: MomentumKind,
    every: int = 1,
    damping: float = 1e-12,
    late: bool = False,
) -> list[Tensor]:
    """Of all minibatches after the first, which only initialises, in the order of a
    `BlockDiagonal`; bases are renewed at every `every`-th.
    """
    momentum, found = Momentum(beta, kind), []
    for k, (g, w) in enumerate(zip(gradients, weights, strict=True)):
        m = momentum({"1": g})["1"] if k else g
        if late and k:
            found.append((part.inverse @ m.flatten()).view(m.shape))
        part.update(LayerStatistics(part.block, 1, gradient=g), w)
        if k % every == 0:
            part.refresh(damping)
        part.settle(damping)
        if not late and k:
            found.append((part.inverse @ m.flatten()).view(m.shape))
    return found


def of_soap(gradients: list[Tensor], beta: float = 0.95, **options: Any) -> list[Tensor]:
    largest = options.pop("largest", 10_000)
    corrected = [(1 - beta) / (1 - beta ** (k + 1)) for k in range(len(gradients))]
    part = soap(weight(tuple(gradients[0].shape)), largest=largest)  # type: ignore[arg-type]
    return directions(part, gradients, corrected, beta=beta, kind="corrected", **options)


def drawn(shape: tuple[int, int], count: int) -> list[Tensor]:
    return [normal(*shape, seed=10 + k) for k in range(count)]


# ---- SOAP


def test_in_the_basis_I_it_is_adam() -> None:
    """With its first minibatch left out; ε outside the bias correction, as torch's."""
    g = drawn((4, 6), 12)
    w = nn.Parameter(torch.zeros(4, 6, dtype=torch.float64))
    adam = torch.optim.Adam([w], lr=1.0, betas=(0.95, 0.95), eps=1e-3)
    found = of_soap(g, largest=0, damping=1e-3)
    for gradient, d in zip(g[1:], found, strict=True):
        before = w.detach().clone()
        w.grad = gradient.clone()
        adam.step()
        assert_near(d, before - w.detach(), 1e-12)


def test_it_turns_with_its_gradients() -> None:
    """G → U G V, U and V orthogonal, G square and of full rank: the direction turns likewise."""
    g = drawn((5, 5), 8)
    U, V = (torch.linalg.qr(normal(5, 5, seed=s)).Q for s in (1, 2))
    turned = of_soap([U @ each @ V for each in g])
    for one, two in zip(of_soap(g), turned, strict=True):
        assert_near(two, U @ one @ V, 1e-8)


def test_without_memory_it_is_the_polar_factor() -> None:
    """Of the first minibatch in its own bases: Q diag(σ / (σ + ε)) Qᵀ by the singular values."""
    G, epsilon = normal(5, 5, seed=3), 1e-5
    part = soap(weight((5, 5)))
    part.update(LayerStatistics(part.block, 1, gradient=G), 1.0)
    part.refresh(epsilon)
    u, s, v = torch.linalg.svd(G)
    assert_near((part.inverse @ G.flatten()).view(5, 5), (u * (s / (s + epsilon))) @ v, 1e-9)


@pytest.mark.parametrize("kind", ["add", "average", "corrected", "nesterov"])
@pytest.mark.parametrize(("every", "beta"), [(1, 0.9), (4, 0.9), (4, 0.0)])
def test_the_momentum_in_the_bases_follows(
    kind: MomentumKind, every: int, beta: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is the momentum's own rotation at every step, which is made anew where it is not known:
    after the bases have turned, where a minibatch was not told of or came to nothing, where β of a
    schedule moves. From a saved state it goes on to the bit.
    """
    rotations = [0]
    real = Rotated.rotated

    def counted(self: Rotated, v: Tensor) -> Tensor:
        rotations[0] += 1
        return real(self, v)

    monkeypatch.setattr(Rotated, "rotated", counted)
    part, momentum = soap(weight((5, 4))), Momentum(beta, kind)
    other: WithDiagonal | None = None
    made = []
    for k, g in enumerate(drawn((5, 4), 16)):
        if k == 10:  # a step that came to nothing
            held, lost = momentum.held, 7 * g
            part.update(LayerStatistics(part.block, 1, gradient=lost), 0.1)
            part.settle(1e-3)
            m = momentum({"1": lost})["1"]
            if momentum.mix is not None:
                part.heed_mix(lost, momentum.mix)
            part.heed(m, 1e-3)
            momentum.put_back(held)
        if k == 14 and beta:
            momentum.beta = 0.8
        m = momentum({"1": g})["1"]
        for each in [part] if other is None else [part, other]:
            each.update(LayerStatistics(part.block, 1, gradient=g), 0.1)
            if k % every == 0:
                each.refresh(1e-3)
            each.settle(1e-3)
            if momentum.mix is not None and k != 6:
                each.heed_mix(g, momentum.mix)
            before = rotations[0]
            each.heed(m, 1e-3)
            made.append(rotations[0] - before)
        straight = part.direction_of(m)
        assert straight is not None
        assert_near(straight, (part.inverse @ m.flatten()).view(m.shape), 1e-12)
        if other is not None:
            again = other.direction_of(m)
            assert again is not None
            assert torch.equal(again, straight)
        if k == 12:
            other = soap(weight((5, 4)))
            other.update(LayerStatistics(part.block, 1, gradient=g), 0.1)
            states = states_of({"1": part})
            put_back({"1": other}, states, checked({"1": part.block}, {"1": other}, states))
    assert len(made) == 19
    if kind == "nesterov" and beta:
        assert all(made)
    elif every == 4:  # made anew at first, after the turn, and where it was not told of
        assert made[:7] == ([1, 0, 0, 0, 0, 1, 1] if beta else [0] * 6 + [1])
        assert made[10] == (beta > 0)


def paper_soap(
    gradients: list[Tensor], every: int, epsilon: float, beta: float = 0.95
) -> list[Tensor]:
    """The method as it is written: averages from zero, corrections beside the rate."""
    first = gradients[0]
    L, R = (1 - beta) * first @ first.T, (1 - beta) * first.T @ first
    Q = [torch.linalg.eigh(S)[1].flip(1) for S in (L, R)]
    M = V = torch.zeros_like(first)
    found = []
    for t, G in enumerate(gradients[1:], 1):
        rotated = Q[0].T @ G @ Q[1]
        M, V = beta * M + (1 - beta) * G, beta * V + (1 - beta) * rotated**2
        m_hat = (Q[0].T @ M @ Q[1]) / (1 - beta**t)
        v_hat = V / (1 - beta**t)
        found.append(Q[0] @ (m_hat / (v_hat**0.5 + epsilon)) @ Q[1].T)
        L, R = beta * L + (1 - beta) * G @ G.T, beta * R + (1 - beta) * G.T @ G
        if t % every == 0:
            order = [torch.argsort((q.T @ S @ q).diagonal(), descending=True)
                     for q, S in zip(Q, (L, R), strict=True)]  # fmt: skip
            V = V[order[0]][:, order[1]]
            Q = [torch.linalg.qr(S @ q[:, o]).Q
                 for q, S, o in zip(Q, (L, R), order, strict=True)]  # fmt: skip
    return found


@pytest.mark.parametrize("every", [1, 3])
def test_its_trajectory_is_the_papers(every: int) -> None:
    g = drawn((5, 5), 40)
    for one, two in zip(of_soap(g, every=every), paper_soap(g, every, 1e-12), strict=True):
        assert_near(one, two, 1e-8)


def test_the_optimizer_is_that_of_pytorch_optimizer() -> None:
    """Square layers and gradients of full rank: else null spaces have eigenvectors of their own.
    Without biases, whose Adam has seen the first minibatch here. Its bases are made in single
    precision (1.5e-7 found).
    """
    theirs = pytest.importorskip("pytorch_optimizer")

    def made() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Linear(4, 4, bias=False), nn.Tanh(), nn.Linear(4, 4, bias=False)
        ).double()

    ours, other, loss = made(), made(), cl.likelihoods.Gaussian()
    objective = cl.Objective(ours, loss, seed=0)
    optimizer = cl.optimizer(
        "soap", objective, lr=1e-2, damping=1e-13, weight_decay=0.0, refresh_every=1
    )
    soap_ = theirs.SOAP(
        other.parameters(), lr=1e-2, betas=(0.95, 0.95), weight_decay=0.0, eps=1e-13,
        precondition_frequency=1,
    )  # fmt: skip
    for k in range(20):
        x, y = normal(30, 4, seed=2 * k), normal(30, 4, seed=2 * k + 1)
        closure = objective.closure(x, y)
        if k:
            optimizer.step(closure)
        else:  # their first call makes no step
            curvature = optimizer.descent.curvature
            curvature.update(closure.observe(curvature.needs))
        soap_.zero_grad()
        loss.loss(other(x), y).mean().backward()
        soap_.step()
    for one, two in zip(ours.parameters(), other.parameters(), strict=True):
        assert_near(one.detach(), two.detach(), 1e-6)


# ---- KL-Shampoo


def population(C: Tensor, shape: tuple[int, int]) -> Tensor:
    """√D C^{1/2} e_k, k = 1 … D, as matrices: their second moment is C exactly, and so it is with
    their negatives.
    """
    values, vectors = torch.linalg.eigh(C)
    root = (vectors * values.sqrt()) @ vectors.T
    return (len(C) ** 0.5 * root).reshape(-1, *shape)


def test_of_a_kronecker_product_the_fit_is_itself() -> None:
    A, B = spd(3, 1), spd(4, 2)
    C = torch.kron(A, B)
    S_a, S_b = kronecker_likelihood_fit(population(C, (3, 4)))
    assert_near(torch.kron(S_a, S_b), C, 1e-11)


def test_the_fixed_point_and_the_least_divergence() -> None:
    """S_a = E[G S_b⁻¹ Gᵀ] / I and transposed, tr S⁻¹C = OI, and a KL below that of TNT's moments
    and of Kronecker products near it; TNT's need not be the farther in the Frobenius norm.
    """
    C = spd(12, 3)
    G = population(C, (3, 4))
    S_a, S_b = kronecker_likelihood_fit(G)
    assert_near((G @ S_b.inverse() @ G.mT).mean(0) / 4, S_a, 1e-10)
    assert_near((G.mT @ S_a.inverse() @ G).mean(0) / 3, S_b, 1e-10)
    S = torch.kron(S_a, S_b)
    assert abs(float((S.inverse() @ C).trace()) - 12) < 1e-10
    tnt = torch.kron(*tensor_normal_factors([(G @ G.mT).mean(0), (G.mT @ G).mean(0)]))
    least = gaussian_kl(C, S)
    assert 0 < least < gaussian_kl(C, tnt) - 1e-4
    for seed in range(5):
        near = torch.kron(S_a + 0.01 * spd(3, seed), S_b - 0.002 * spd(4, seed + 9))
        assert gaussian_kl(C, near) > least


def authors(
    gradients: list[Tensor], every: int, start: float, clamp: bool, beta: float = 0.98
) -> list[Tensor]:
    """The form of the authors' code, by dense matrices: S from zero, λ from λ₀."""
    epsilon = 1e-8
    first, shape = gradients[0], gradients[0].shape
    S = [(1 - beta) * first @ first.T / shape[1], (1 - beta) * first.T @ first / shape[0]]
    Q = [torch.linalg.eigh(each)[1].flip(1) for each in S]
    lam = [torch.full((d,), start, dtype=first.dtype) for d in shape]
    M = torch.zeros_like(first)
    found = []
    for t, G in enumerate(gradients[1:], 1):
        M = 0.9 * M + 0.1 * G
        P = 1 / (lam[0].sqrt()[:, None] * lam[1].sqrt() + epsilon)
        found.append(Q[0] @ (P * (Q[0].T @ M @ Q[1])) @ Q[1].T)
        inverse = [q @ torch.diag(1 / e) @ q.T for q, e in zip(Q, lam, strict=True)]
        new = [G @ inverse[1] @ G.T / shape[1], G.T @ inverse[0] @ G / shape[0]]
        S = [beta * s + (1 - beta) * n for s, n in zip(S, new, strict=True)]
        lam = [
            beta * e + (1 - beta) * (q.T @ n @ q).diagonal()
            for e, q, n in zip(lam, Q, new, strict=True)
        ]
        if clamp:
            lam = [1 / (1 / e.sqrt()).clamp_max(max(10, min(len(e), 4000))) ** 2 for e in lam]
        if t % every == 0:
            Q = [torch.linalg.qr(s @ q).Q for s, q in zip(S, Q, strict=True)]
    return found


@pytest.mark.parametrize("clamp", [False, True])
@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize(("size", "start"), [(1.0, 0.1), (0.01, 0.011)])
def test_its_trajectory_is_the_authors(every: int, clamp: bool, size: float, start: float) -> None:
    """Of large gradients, and of such that λ falls to where it is clamped, at 0.01."""
    g = [size * each for each in drawn((4, 4), 40)]
    part = kl_shampoo(weight((4, 4)), start=start, clamp=clamp)
    fixed = [0.02] * len(g)
    found = directions(
        part, g, fixed, beta=0.9, kind="average", every=every, damping=1e-8, late=True
    )
    for one, two in zip(found, authors(g, every, start, clamp), strict=True):
        assert_near(one, two, 1e-8)
    least = part.part_state["lam_a"]
    assert isinstance(least, Tensor)
    assert least is not None
    assert (float(least.min()) < 0.01) is (size < 1 and not clamp)


@pytest.mark.parametrize("shape", [(3, 5), (5, 3), (4, 4)])
def test_its_matrix_is_the_square_of_its_inverses_inverse(shape: tuple[int, int]) -> None:
    for part in (soap(weight(shape)), kl_shampoo(weight(shape))):
        for g in drawn(shape, 4):
            part.update(LayerStatistics(part.block, 1, gradient=g), 0.3)
            part.refresh(0.1)
            part.settle(0.1)
        part.refresh(0.1)
        H = part.inverse.dense()
        B = part.matrix(0.1)
        assert B is not None
        assert_near(H @ B.dense() @ H, torch.eye(len(H), dtype=H.dtype), 1e-10)


def test_the_start_is_above_zero() -> None:
    with pytest.raises(cl.CurvlabError, match=r"start must be above 0"):
        kl_shampoo(weight((2, 2)), start=0.0)
