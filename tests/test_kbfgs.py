"""K-BFGS against the documents' pseudo-code, written out line by line in plain torch."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from problems import assert_near, batches, curvature_of, problem
from torch import Tensor, nn

import curvlab as cl
from curvlab.curvature import kbfgs
from curvlab.curvature.kbfgs import CHAPTER_3, KBfgs
from curvlab.likelihoods import Likelihood
from curvlab.linalg.pairs import Pair
from curvlab.objective import Objective

MU1, BETA = 0.2, 0.9


class ByHand:
    """Algorithm 4 (chapter 2) or 9 (chapter 3) for a chain of linear layers with tanh between, by
    explicit formulas.
    """

    def __init__(self, chapter: int, layers: list[nn.Linear], damping: float, pairs: int) -> None:
        self.chapter, self.layers, self.pairs = chapter, layers, pairs
        self.W = [torch.cat([m.weight, m.bias[:, None]], 1).detach().clone() for m in layers]
        self.root = math.sqrt(damping)
        n = len(layers)
        self.m: list[Tensor | None] = [None] * n
        self.A: list[Tensor] = []
        self.H_a: list[Tensor] = []
        start = 1.0 if chapter == 2 else 1 / self.root
        self.H_g = [start * torch.eye(len(w), dtype=w.dtype) for w in self.W]
        self.s = [torch.zeros(len(w), dtype=w.dtype) for w in self.W]
        self.y = [torch.zeros(len(w), dtype=w.dtype) for w in self.W]
        self.kept: list[list[tuple[Tensor, Tensor]]] = [[] for _ in self.W]

    def look(
        self, x: Tensor, loss: Likelihood, y: Tensor
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        a, h, value = [], [], x
        for i, w in enumerate(self.W):
            a.append(torch.cat([value, torch.ones(len(value), 1, dtype=w.dtype)], 1))
            pre = a[-1].detach() @ w.T if i == 0 else a[-1] @ w.T
            pre.requires_grad_() if i == 0 else pre.retain_grad()
            h.append(pre)
            value = torch.tanh(pre)
        g = torch.autograd.grad(loss.loss(h[-1], y).sum(), h)
        return [t.detach() for t in a], [t.detach() for t in h], list(g)

    def warm(self, data: list[tuple[Tensor, Tensor]], loss: Likelihood) -> None:
        sums: list[Tensor] = []
        for x, y in data:
            now = [t.T @ t / len(t) for t in self.look(x, loss, y)[0]]
            sums = now if not sums else [p + q for p, q in zip(sums, now, strict=True)]
        self.A = [t / len(data) for t in sums]
        self.H_a = [
            torch.linalg.inv(t + self.root * torch.eye(len(t), dtype=t.dtype)) for t in self.A
        ]

    def step(self, x: Tensor, y: Tensor, loss: Likelihood, lr: float) -> None:
        a, h, g = self.look(x, loss, y)
        n = len(x)
        for i in range(len(self.W)):
            grad = g[i].T @ a[i] / n
            m, share = self.m[i], 1 - BETA if self.chapter == 2 else 1.0
            m = share * grad if m is None else BETA * m + share * grad
            self.m[i] = m
            self.W[i] = self.W[i] - lr * self.H_g[i] @ m @ self.H_a[i]
        _, h2, g2 = self.look(x, loss, y)
        for i in range(len(self.W)):
            self.learn_a(i, a[i])
            self.s[i] = BETA * self.s[i] + (1 - BETA) * (h2[i].mean(0) - h[i].mean(0))
            self.y[i] = BETA * self.y[i] + (1 - BETA) * (g2[i].mean(0) - g[i].mean(0))
            self.learn_g(i, g[i].mean(0))

    def learn_a(self, i: int, a: Tensor) -> None:
        moment = a.T @ a / len(a)
        if self.chapter == 2:
            self.A[i] = moment = BETA * self.A[i] + (1 - BETA) * moment
        s = self.H_a[i] @ a.mean(0)
        y = moment @ s + self.root * s
        self.H_a[i] = bfgs(self.H_a[i], s, y)

    def learn_g(self, i: int, mean: Tensor) -> None:
        H, s, y = self.H_g[i], self.s[i], self.y[i]
        yHy = y @ H @ y
        theta = (1 - MU1) * yHy / (yHy - s @ y) if s @ y < MU1 * yHy else 1.0
        s = theta * s + (1 - theta) * H @ y
        if self.chapter == 2:
            theta = (
                (1 - self.root) * (s @ s) / (s @ s - s @ y) if s @ y < self.root * (s @ s) else 1.0
            )
            y = theta * y + (1 - theta) * s
        else:
            y = y + self.root * s
        if not float(s @ y) > 1e-4 * float(s @ s) * float(mean.norm()):
            return
        if not self.pairs:
            self.H_g[i] = bfgs(H, s, y)
            return
        self.kept[i] = [*self.kept[i], (s, y)][-self.pairs :]
        fresh = (1.0 if self.chapter == 2 else 1 / self.root) * torch.eye(len(s), dtype=s.dtype)
        for one in self.kept[i]:
            fresh = bfgs(fresh, *one)
        self.H_g[i] = fresh


def bfgs(H: Tensor, s: Tensor, y: Tensor) -> Tensor:
    rho, eye = 1 / (s @ y), torch.eye(len(s), dtype=s.dtype)
    return (eye - rho * torch.outer(s, y)) @ H @ (
        eye - rho * torch.outer(y, s)
    ) + rho * torch.outer(s, s)


NAMES = {"k-bfgs-20": (2, 0), "k-bfgs-l-20": (2, 100), "k-bfgs": (3, 0), "k-bfgs-l": (3, 100)}


@pytest.mark.parametrize("likelihood", ["categorical", "gaussian"])
@pytest.mark.parametrize("name", NAMES)
def test_trajectory_is_the_pseudo_codes(name: str, likelihood: str) -> None:
    """Warm start and twelve steps: weights and both factors."""
    chapter, pairs = NAMES[name]
    p = problem("tanh", likelihood, n=20)
    data = batches(p, 12)
    by_hand = ByHand(chapter, [m for m in p.model if isinstance(m, nn.Linear)], 0.3, pairs)
    by_hand.warm(data, p.likelihood)  # ten or more, so that the next minibatch has weight 1 − β
    objective = p.objective()
    lr = 0.3 if chapter == 2 else 0.03
    optimizer = cl.optimizer(name, objective, lr=lr, damping=0.3)
    optimizer.warm_start(data)
    for x, y in data:
        by_hand.step(x, y, p.likelihood, lr)
        optimizer.step(objective.closure(x, y))
    for i, block in enumerate(objective.blocks):
        assert_near(block.gather(objective.parameters).detach(), by_hand.W[i], 1e-10)
        H_g, H_a = curvature_of(optimizer).inverse[block.name].factors
        assert_near(H_a, by_hand.H_a[i], 1e-9)
        assert_near(H_g, by_hand.H_g[i], 1e-9)


@pytest.mark.parametrize(
    ("full", "limited"), [("k-bfgs-20", "k-bfgs-l-20"), ("k-bfgs", "k-bfgs-l")]
)
def test_limited_memory_is_the_same_while_pairs_are_few(full: str, limited: str) -> None:
    weights = []
    for name in (full, limited):
        p = problem("tanh", "categorical", n=20)
        objective = p.objective()
        optimizer = cl.optimizer(name, objective, lr=0.03, damping=0.3)
        for x, y in batches(p, 10):
            optimizer.step(objective.closure(x, y))
        weights.append(
            objective.layout.flatten({n: t.detach() for n, t in objective.parameters.items()})
        )
    assert_near(weights[0], weights[1], 1e-10)


def test_a_memory_that_is_full_forgets_the_oldest_pair() -> None:
    p = problem("tanh", "categorical", n=20)
    objective = p.objective()
    block: Any = KBfgs(objective.blocks[0], **{**CHAPTER_3, "pairs": 2})
    after: Any = run(block, objective, batches(p, 5))
    assert after.S.shape == (2, 4)
    assert float(torch.linalg.eigvalsh(block.inverse.factors[0])[0]) > 0


def run(block: KBfgs, objective: Objective, data: list[tuple[Tensor, Tensor]]) -> KBfgs:
    """One block by hand: statistics, refresh, a small step of the model, secant."""
    for x, y in data:
        closure = objective.closure(x, y)
        before = closure.observe({"data"}).passes["data"][block.block.name]
        block.update(before, 0.1)
        block.refresh(0.3)
        with torch.no_grad():
            for q in objective.parameters.values():
                q.mul_(0.97)
        block.secant(before, closure.observe({"data"}).passes["data"][block.block.name])
    return block


@pytest.mark.parametrize("model", ["conv", "tokens"])
@pytest.mark.parametrize("name", NAMES)
def test_weights_shared_over_places(name: str, model: str) -> None:
    """(3.9), (3.12)–(3.15): A sums over places, pairs average over them; λ is split by √T in
    chapter 3.
    """
    p = problem(model, "categorical", n=20)
    objective = p.objective()
    optimizer = cl.optimizer(name, objective, lr=0.01, damping=0.3)
    losses = [float(optimizer.step(objective.closure(p.x, p.y))) for _ in range(30)]
    assert losses[-1] < losses[0]
    places = objective.closure(p.x, p.y).form.places
    for key, block in curvature_of(optimizer).blocks.items():
        expected = places[key] if NAMES[name][0] == 3 else 1
        assert block._split() == pytest.approx(
            (math.sqrt(0.3 * expected), math.sqrt(0.3 / expected))
        )


@pytest.mark.parametrize("damping", [0.0, 1.1])
def test_double_damping_needs_a_damping_between_0_and_1(damping: float) -> None:
    p = problem("tanh")
    objective = p.objective()
    curvature = cl.approximation("k-bfgs-20", objective, damping=damping)
    with pytest.raises(
        cl.CurvlabError, match=r"block 1 .*: double damping takes μ₂ = √λ in \(0, 1\]"
    ):
        curvature.update(objective.closure(p.x, p.y).observe())


def test_a_curvature_that_does_not_learn_from_steps_asks_for_none() -> None:
    p = problem("tanh")
    assert not cl.approximation("kfac", p.objective()).wants_step
    curvature = cl.approximation("k-bfgs", p.objective(), update_every=3)
    seen = []
    objective = p.objective()
    for _ in range(6):
        curvature.update(objective.closure(p.x, p.y).observe())
        seen.append(curvature.wants_step)
    assert seen == [False, False, True, False, False, True]  # Alg. 9, line 12


def counted(action: Callable[..., Pair], actions: list[torch.Size]) -> Callable[..., Pair]:
    """A Hessian action that is noted."""

    def act(H: Tensor, *further: Any) -> Pair:
        actions.append(H.shape)
        return action(H, *further)

    return act


@pytest.mark.parametrize("name", [*NAMES, "kf-bfgs-cnn", "kf-bfgs-l-cnn"])
def test_every_minibatch_is_one_hessian_action_whatever_the_refreshes(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Alg. 4, lines 20 to 22, and Alg. 9, line 16, know no T₂: at a standing λ the weights are
    those of T₂ = 1 to the bit. The first of 20 minibatches makes H_a, each other one an action.
    """
    actions: list[torch.Size] = []
    weights = []
    for function in ("action_pair", "hessian_action"):
        monkeypatch.setattr(kbfgs, function, counted(getattr(kbfgs, function), actions))
    for every in (1, 5):
        p = problem("tanh", "categorical", n=20)
        objective = p.objective()
        optimizer = cl.optimizer(name, objective, lr=0.03, damping=0.3, refresh_every=every)
        for x, y in batches(p, 20):
            optimizer.step(objective.closure(x, y))
        weights.append(
            objective.layout.flatten({n: t.detach() for n, t in objective.parameters.items()})
        )
        assert len(actions) == 19 * len(objective.blocks)
        actions.clear()
    assert torch.equal(*weights)
