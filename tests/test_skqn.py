"""SKQN against Alg. 1 of S2QN written out with dense matrices, and against the conditions that
define it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import Problem, assert_near, batches, curvature_of, grad_of, normal, problem
from test_cli import call
from torch import Tensor, nn

import curvlab as cl
from curvlab.algorithms import ALGORITHMS
from curvlab.curvature import skqn
from curvlab.curvature.gradient_norm import GradientNorm, total_norm
from curvlab.curvature.skqn import SkqnB, SkqnL
from curvlab.layers import Block
from curvlab.linalg.block_bfgs import Choice, block_bfgs
from curvlab.objective import Objective
from curvlab.observation import Observation, Transition
from curvlab.statistics import LayerStatistics

NAMES = ("skqn-l", "skqn-b1", "skqn-b2")
names = pytest.mark.parametrize("name", NAMES)
SEEDS = st.integers(0, 9999)
GAMMA, DAMPING = 0.2, 0.4
KINDS = ("categorical", "gaussian")
RULE: dict[str, Any] = {"reading": "printed", "r1": 0.1, "r2": 1.0}
"""Alg. 1 by the letter, with values of (8) between which the norms of small problems lie."""


def eye(order: int) -> Tensor:
    return torch.eye(order, dtype=torch.float64)


def fixed_sketch(
    m: int, k: int, generator: object, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """One sketch for every draw, so that a second route can have the same."""
    return normal(m, k, seed=m)


# ------------------------------------------------------------------------------------------------
# Alg. 1, written out


class ByHand:
    """Alg. 1 of S2QN: dense blocks, autograd's gradients, changes of the parameters themselves.

    The base is that of every `every`-th minibatch, and of each of the first `every`.
    """

    def __init__(
        self,
        name: str,
        p: Problem,
        choice: Choice = "symmetric",
        columns: int = 2,
        pairs: int = 3,
        every: int = 1,
    ) -> None:
        self.name, self.objective, self.choice = name, p.objective(), choice
        self.every, self.steps = every, 0
        self.kept: dict[str, tuple[Tensor, Tensor]] = {}
        self.columns, self.pairs = columns, pairs
        self.norm: float | None = None
        self.remembered: dict[str, list[tuple[Tensor, Tensor]]] = {
            b.name: [] for b in self.objective.blocks
        }
        start = GAMMA * math.sqrt(DAMPING)
        self.Lambda = {b.name: start * eye(b.shape[0]) for b in self.objective.blocks}
        self.pending: dict[str, tuple[Tensor, Tensor]] = {}

    def look(self, x: Tensor, y: Tensor) -> tuple[dict[str, Tensor], Observation]:
        closure = self.objective.closure(x, y)
        closure()
        grads = {n: grad_of(q).clone() for n, q in self.objective.parameters.items()}
        return {b.name: b.gather(grads) for b in self.objective.blocks}, closure.observe()

    def weights(self) -> dict[str, Tensor]:
        return {
            b.name: b.gather(self.objective.parameters).detach().clone()
            for b in self.objective.blocks
        }

    def base(self, s: LayerStatistics) -> tuple[Tensor, Tensor]:
        """(17): Â over examples of the sum over places, G̃ over examples and places."""
        n, places = s.a.shape[:2]
        return torch.einsum("nti,ntj->ij", s.a, s.a) / n, torch.einsum(
            "nto,ntp->op", s.g[0], s.g[0]
        ) / (n * places)

    def damping(self) -> float:
        """(8), with r₁ = 0.1 and r₂ = 1."""
        g, r1, r2 = self.norm, 0.1, 1.0
        if g is None:
            return DAMPING
        if g < r1:
            return 2 * r1 / (g + r1) * DAMPING
        return 2 * g / (g + r2) * DAMPING if g > r2 else DAMPING

    def curvature(self, name: str, A: Tensor, G: Tensor) -> Tensor:
        """B, with the refinement of line 3."""
        H = torch.kron(G, A.contiguous())
        if name in self.pending:
            U, V = self.pending[name]
            if self.name == "skqn-l":
                self.remember(name, U.flatten(), V.flatten() - H @ U.flatten())
            elif self.name == "skqn-b1":
                self.block_update(name, U @ A, V - G @ U @ A)
            else:
                self.block_update(name, U, V - G @ U)
        if self.name != "skqn-l":
            return torch.kron(G + self.Lambda[name], A.contiguous())
        Lambda = GAMMA * self.damping() * eye(len(H))
        for u, v in self.remembered[name]:
            Bu = Lambda @ u
            Lambda = Lambda - torch.outer(Bu, Bu) / (u @ Bu) + torch.outer(v, v) / (u @ v)
        return H + Lambda

    def remember(self, name: str, u: Tensor, v: Tensor) -> None:
        gamma = GAMMA * self.damping()
        least = gamma * float(u @ u)
        if float(u @ v) < 0.25 * least:
            theta = 0.75 * least / (least - float(u @ v))
            v = theta * v + (1 - theta) * gamma * u
        if float(u @ v) >= 1e-8 * float(u.norm() * v.norm()):
            self.remembered[name] = [*self.remembered[name], (u, v)][-self.pairs :]

    def block_update(self, name: str, U: Tensor, V: Tensor) -> None:
        """(21), (22): inverses written out; no more columns than rows."""
        if U.shape[1] > self.columns:
            sketch = fixed_sketch(U.shape[1], self.columns, None, U.dtype, U.device)
            U, V = U @ sketch, V @ sketch
        Lambda = self.Lambda[name]
        LU = Lambda @ U
        W = U.T @ LU
        P, reference = {
            "symmetric": ((V.T @ U + U.T @ V) / 2, W),
            "trace": (torch.trace(V.T @ U) * eye(U.shape[1]), torch.trace(W) * eye(U.shape[1])),
            "diagonal": (torch.diag((V * U).sum(0)), torch.diag(W.diagonal())),
        }[self.choice]

        def stands(tau: float) -> bool:
            """P ⪰ 0.2 of its value at V = ΛU, and VᵀΛ⁻¹V ⪯ P / 0.2."""
            V_tau, P_tau = tau * V + (1 - tau) * LU, tau * P + (1 - tau) * reference
            hold = [P_tau - 0.2 * reference]
            if self.choice == "symmetric":
                hold.append(P_tau / 0.2 - V_tau.T @ torch.linalg.solve(Lambda, V_tau))
            return all(float(torch.linalg.eigvalsh((M + M.T) / 2)[0]) >= 0 for M in hold)

        low, high = 0.0, 1.0
        for _ in range(0 if stands(1.0) else 60):
            middle = (low + high) / 2
            low, high = (middle, high) if stands(middle) else (low, middle)
        tau = 1.0 if stands(1.0) else low
        V, P = tau * V + (1 - tau) * LU, tau * P + (1 - tau) * reference
        self.Lambda[name] = Lambda + V @ torch.linalg.inv(P) @ V.T - LU @ torch.linalg.inv(W) @ LU.T

    def step(self, x: Tensor, y: Tensor, lr: float) -> dict[str, Tensor]:
        """Returns the inverses."""
        gradients, before = self.look(x, y)  # line 2
        old, inverses = self.weights(), {}
        self.steps += 1
        for block in self.objective.blocks:
            if self.steps <= self.every or self.steps % self.every == 0:
                self.kept[block.name] = self.base(before.passes["data"][block.name])
            A, G = self.kept[block.name]
            B = self.curvature(block.name, A, G)  # line 3
            inverses[block.name] = torch.linalg.inv(B + self.damping() * eye(len(B)))
            direction = inverses[block.name] @ gradients[block.name].flatten()  # line 4
            for n, d in block.scatter(direction).items():
                self.objective.parameters[n].data.sub_(d, alpha=lr)
        self.norm = math.sqrt(sum(float(g.square().sum()) for g in gradients.values()))
        moved, after = self.look(x, y)  # line 5
        new = self.weights()
        for block in self.objective.blocks:
            one, two = before.passes["data"][block.name], after.passes["data"][block.name]
            if self.name == "skqn-b2":
                s, ds = two.h - one.h, two.g[0] - one.g[0]
                self.pending[block.name] = (
                    s.reshape(-1, s.shape[-1]).T,
                    ds.reshape(-1, s.shape[-1]).T,
                )
            else:
                self.pending[block.name] = (
                    new[block.name] - old[block.name],
                    moved[block.name] - gradients[block.name],
                )
        return inverses


VARIANTS = [
    ("skqn-l", {}),
    *((name, {"choice": c}) for name in NAMES[1:] for c in ("symmetric", "trace", "diagonal")),
]


@pytest.mark.thinned(6)
@pytest.mark.parametrize(("name", "choice"), VARIANTS)
@pytest.mark.parametrize(
    ("model", "likelihood", "every"),
    [
        *((m, k, 1) for m in ("tanh", "no-bias", "tokens", "conv") for k in KINDS),
        ("tanh", "categorical", 3),
        ("conv", "gaussian", 20),
    ],
)
def test_trajectory_is_algorithm_1(
    name: str,
    choice: dict[str, Any],
    model: str,
    likelihood: str,
    every: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Eight steps: inverses, then weights. One place and several; more pairs than L keeps; a base
    that is kept T₂ steps, where pairs, Λ and λ are of every step.
    """
    monkeypatch.setattr(skqn, "gaussian_sketch", fixed_sketch)
    p, q = problem(model, likelihood, n=12), problem(model, likelihood, n=12)
    by_hand = ByHand(name, q, **choice, every=every)
    objective = p.objective()
    few: dict[str, Any] = {"pairs": 3} if name == "skqn-l" else {"columns": 2}
    if name != "skqn-l":
        few["ceiling"] = None
    if choice.get("choice", "symmetric") != "symmetric":
        # these leave Λ̃ singular but for rounding, so that VᵀΛ̃⁻¹V has no digits to compare
        few["mu1"] = None
    optimizer = cl.optimizer(
        name,
        objective,
        lr=0.3,
        damping=DAMPING,
        gamma=GAMMA,
        refresh_every=every,
        **RULE,
        **few,
        **choice,
    )
    for x, y in batches(p, 8):
        optimizer.step(objective.closure(x, y))
        expected = by_hand.step(x, y, 0.3)
        for block, H in optimizer.descent.curvature.inverse.items():
            assert_near(H.dense(), expected[block], 1e-9)
    # no nearer than the inverses that they have followed, whatever the machine's order of sums
    for b in objective.blocks:
        assert_near(b.gather(objective.parameters).detach(), by_hand.weights()[b.name], 1e-9)
    if name == "skqn-l":
        assert all(1 <= len(kept) <= 3 for kept in by_hand.remembered.values())


# ------------------------------------------------------------------------------------------------
# conditions


def quadratic(places: bool) -> Problem:
    """One layer under ½ ‖z − y‖²: the Hessian in the outputs is I, the residuals are small, so that
    Λ̃ = I − G̃ is positive.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = (
            nn.Sequential(nn.Conv2d(2, 3, 2), nn.Flatten())
            if places
            else nn.Sequential(nn.Linear(5, 3))
        )
    net = net.double()
    x = normal(9, 2, 4, 4) if places else normal(9, 5)
    with torch.no_grad():
        z = net(x)
    return Problem(net, cl.likelihoods.Gaussian(), x, z + 0.2 * normal(*z.shape, seed=3))


@pytest.mark.parametrize("every", [1, 3, 20])
@pytest.mark.parametrize("places", [False, True], ids=["one-place", "nine-places"])
@pytest.mark.parametrize("name", ["skqn-b1", "skqn-b2"])
def test_conditions_19_and_20_hold_before_sketching(name: str, places: bool, every: int) -> None:
    """(Â ⊗ (G̃ + Λ̃)) u = v̂ and (G̃ + Λ̃) Ũ = Ṽ of the last step, by autograd, the oracle's own
    pass and the moved weights; at each T₂, in the default reading but for its labels: those that
    are drawn make G̃ = I here, and leave nothing to learn.
    """
    p = quadratic(places)
    objective = p.objective()
    whole: dict[str, Any] = {"columns": None, "mu": 1e-6, "mu1": 1e-6, "ceiling": None}
    optimizer = cl.optimizer(
        name, objective, lr=0.1, damping=DAMPING, labels="data", refresh_every=every, **whole
    )
    block = curvature_of(optimizer).blocks["1"]

    def look() -> tuple[Tensor, Tensor, LayerStatistics]:
        closure = objective.closure(p.x, p.y)
        closure()
        grads = {n: grad_of(q).clone() for n, q in objective.parameters.items()}
        layer = objective.blocks[0]
        return (
            layer.gather(objective.parameters).detach().clone(),
            layer.gather(grads),
            closure.observe().passes["data"]["1"],
        )

    for _ in range(3 if every == 1 else every + 1):
        old, g, before = look()
        optimizer.step(objective.closure(p.x, p.y))
        new, h, after = look()
    # the next minibatch: line 3
    optimizer.descent.curvature.update(objective.closure(p.x, p.y).observe())
    assert (block.last.skipped, block.last.tau) == ("", 1)
    B = block.matrix().dense()
    factor = block.kept_G + block.Lambda
    assert every == 1 or not torch.equal(block.kept_G, block.G)
    assert_near(B, torch.kron(factor, block.kept_A.contiguous()), 1e-12)
    if name == "skqn-b1":
        assert_near(B @ (new - old).flatten(), (h - g).flatten(), 1e-12)
    else:
        s, ds = (after.h - before.h).flatten(0, 1), (after.g[0] - before.g[0]).flatten(0, 1)
        assert_near(s @ factor, ds, 1e-12)
    assert_near(factor, eye(3), 1e-8)


def test_a_sketch_keeps_the_conditions_on_its_own_columns_alone() -> None:
    p = quadratic(True)
    objective = p.objective()
    optimizer = cl.optimizer(
        "skqn-b2",
        objective,
        lr=0.1,
        labels="data",
        damping=DAMPING,
        columns=2,
        mu=1e-6,
        mu1=1e-6,
        ceiling=None,
    )
    optimizer.step(objective.closure(p.x, p.y))
    block = curvature_of(optimizer).blocks["1"]
    U, V = block.U, block.V
    assert U.shape == V.shape == (3, 2)
    optimizer.descent.curvature.update(objective.closure(p.x, p.y).observe())
    factor = block.G + block.Lambda
    assert_near(factor @ U, V, 1e-10)
    assert float((factor - eye(3)).norm()) > 0.1


@pytest.mark.parametrize("every", [1, 3, 20])
@pytest.mark.parametrize("reading", ["kfac", "printed", "seng"])
def test_l_satisfies_the_secant_equation_of_the_newest_pair(reading: str, every: int) -> None:
    """(10): (H_k + Λ_k) u_{k−1} = v̂_{k−1} of the matrix that makes the direction, whatever T₂, of
    every block whose pair was accepted as it was.
    """
    p = problem("tanh", n=20)
    objective = p.objective()
    optimizer = cl.optimizer(
        "skqn-l",
        objective,
        lr=0.1 if reading == "kfac" else 0.3,
        damping=DAMPING,
        gamma=0.01,
        refresh_every=every,
        reading=reading,
    )
    curvature, seen, kept = curvature_of(optimizer), 0, 0
    for x, y in batches(p, every + 10):
        optimizer.step(objective.closure(x, y))
        steps = {
            n: (b.U.flatten().clone(), b.V.flatten().clone()) for n, b in curvature.blocks.items()
        }
        held = {n: b.kept_G for n, b in curvature.blocks.items()}
        curvature.update(objective.closure(x, y).observe({"data", "model", "gradient"}))
        for name, block in curvature.blocks.items():
            kept += block.kept_G is held[name]
            assert (block.kept_G is block.G) == (curvature.steps % every == 0 or kept == 0)
            if not block.last.skipped and block.last.damping.theta2 == 1:
                u, v = steps[name]
                assert_near(block.matrix() @ u, v, 1e-12)
                damped = block.matrix(curvature.refreshed)
                assert_near(curvature.inverse[name] @ (damped @ u), u, 1e-10)
                seen += 1
    assert seen >= 10
    assert (kept > 0) == (every > 1)


# ------------------------------------------------------------------------------------------------
# positive definite


def small_layer(n: int = 6) -> tuple[Block, LayerStatistics]:
    p = problem("linear", n=n)
    objective = p.objective()
    return objective.blocks[0], objective.closure(p.x, p.y).observe().passes["data"]["1"]


@settings(deadline=None, max_examples=40)
@given(
    SEEDS,
    st.floats(1e-3, 10),
    st.one_of(st.just(0.0), st.floats(1e-3, 1)),
    st.integers(1, 4),
    st.floats(-3, 3),
)
def test_l_stays_positive_definite(
    seed: int, gamma: float, mu: float, pairs: int, lean: float
) -> None:
    """Whatever the pairs: those that are kept have positive curvature."""
    layer, statistics = small_layer()
    block: Any = SkqnL(layer, pairs=pairs, gamma=gamma, mu=mu)
    block.update(statistics, 1.0)
    block.refresh(1.0)
    for k in range(6):
        U = normal(3, 6, seed=seed + k)
        block.U, block.V = U, normal(3, 6, seed=seed + k + 50) + lean * U
        block.refine(1.0)
        curvature = (block.S * block.Y).sum(1)
        assert bool((curvature >= 1e-8 * block.S.norm(dim=1) * block.Y.norm(dim=1)).all())
        assert bool((curvature >= mu * gamma * block.S.square().sum(1) * (1 - 1e-9)).all())
        if mu:
            assert not block.last.skipped
    assert len(block.S) <= pairs
    B = block.matrix().dense()
    assert float(torch.linalg.eigvalsh(B)[0]) > -1e-9 * float(B.norm())
    block.refresh(1e-3)
    assert float(block.inverse.eigvalsh()[0]) > 0


@pytest.mark.parametrize("choice", ["symmetric", "trace", "diagonal"])
@pytest.mark.parametrize("condition", ["parameters", "preactivations"])
@settings(deadline=None, max_examples=25)
@given(seed=SEEDS, gamma=st.floats(1e-3, 10), mu=st.floats(0.05, 0.9), lean=st.floats(-3, 3))
def test_b_stays_positive(
    condition: Any, choice: Choice, seed: int, gamma: float, mu: float, lean: float
) -> None:
    """Λ̃ positive definite with the symmetric P, up to the rounding of its largest eigenvalue;
    semi-definite with the others.
    """
    layer, statistics = small_layer()
    block: Any = SkqnB(layer, condition=condition, columns=2, gamma=gamma, choice=choice, mu=mu)
    block.update(statistics, 1.0)
    block.refresh(1.0)
    for k in range(5):
        U = normal(3, 6, seed=seed + k)
        block.U, block.V = U, normal(3, 6, seed=seed + k + 50) + lean * U
        block.refine(1.0)
        assert block.last.skipped in ("", "curvature")
        values = torch.linalg.eigvalsh(block.Lambda)
        assert float(values[0]) > (-1e-15 if choice == "symmetric" else -1e-8) * float(values[-1])
    block.refresh(0.1)
    assert float(block.inverse.eigvalsh()[0]) > 0


def test_a_pair_of_negative_curvature_is_skipped_where_nothing_is_damped() -> None:
    layer, statistics = small_layer()
    block: Any = SkqnL(layer, mu=0)
    block.update(statistics, 1.0)
    block.refresh(1.0)
    block.U, block.V = normal(3, 6), -10 * normal(3, 6)
    block.refine(1.0)
    assert block.last.skipped == "curvature"
    assert len(block.S) == 0
    assert block.U is None


def test_the_refinement_of_a_model_in_single_precision_is_of_double_precision() -> None:
    """Where in single precision it is indefinite; by the update written out, with Powell's rule."""
    p = problem("linear", n=6, dtype=torch.float32)
    layer, statistics = (
        p.objective().blocks[0],
        p.objective().closure(p.x, p.y).observe().passes["data"]["1"],
    )
    block: Any = SkqnB(
        layer, condition="preactivations", columns=None, gamma=GAMMA, mu1=None, ceiling=None
    )
    block.update(statistics, 1.0)
    block.refresh(1.0)
    single, double = block.Lambda.float(), GAMMA * eye(3)
    for k in range(400, 408):
        U = normal(3, 1, seed=k).float()
        V = 1000 * normal(3, 1, seed=k + 50).float() - 3 * U
        block.U, block.V = U, V
        block.refine(1.0)
        v = V - block.G @ U
        single = block_bfgs(single, U, v).matrix
        u, v = U.double(), v.double()
        Lu = double @ u
        least, s = 0.2 * float(u.T @ Lu), float(u.T @ v)
        theta = 1.0 if s >= least else 0.8 * float(u.T @ Lu) / (float(u.T @ Lu) - s)
        r = theta * v + (1 - theta) * Lu
        double = double - Lu @ Lu.T / (u.T @ Lu) + r @ r.T / (u.T @ r)
    assert block.Lambda.dtype == torch.float64
    assert_near(block.Lambda, double, 1e-9)
    assert (
        float(torch.linalg.eigvalsh(block.Lambda)[0]) > 0 > float(torch.linalg.eigvalsh(single)[0])
    )
    block.refresh(0.1)
    assert block.inverse.dense().dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_rounding_of_the_pairs_has_made_is_left_out(dtype: torch.dtype) -> None:
    """A column that is another one but for its rounding adds no direction, whatever the precision
    of the update.
    """
    U, V = normal(4, 2).to(dtype), normal(4, 2, seed=1).to(dtype) + 3 * normal(4, 2).to(dtype)
    again = U[:, :1] * (1 + 4 * torch.finfo(dtype).eps * normal(4, 1, seed=2).to(dtype))
    assert not torch.equal(again, U[:, :1])
    found = block_bfgs(eye(4), torch.cat([U, again], 1), torch.cat([V, V[:, :1]], 1))
    assert found.rank == 2
    assert found.matrix.dtype == torch.float64


# ------------------------------------------------------------------------------------------------ a
# base that is kept


@names
def test_only_a_base_of_the_minibatch_itself_bounds_the_step(name: str) -> None:
    """Of one example the base is the empirical Fisher matrix g gᵀ, so p = g / (‖g‖² + λ); one that
    is kept is linear in g.
    """
    p = problem("linear", n=1)
    objective = p.objective()
    off: dict[str, Any] = {"gamma": 0.0} | ({"pairs": 0} if name == "skqn-l" else {"columns": 0})
    curvature = cl.approximation(
        name,
        objective,
        damping=DAMPING,
        reading="printed",
        r1=1e-9,
        r2=1e9,
        refresh_every=2,
        **off,
    )
    for k in range(4):
        observation = objective.closure(p.x * 4**k, p.y).observe()
        curvature.update(observation)  # steps 1, 2 and 4 refresh, step 3 keeps the base of step 2
        g = observation.gradients["1"]
        if k == 1:
            held = g
        direction = curvature.precondition({"1": g})["1"]
        if k == 2:
            across = (held.flatten() @ g.flatten()) / held.norm() ** 2 * held
            assert_near(
                direction, across / (held.norm() ** 2 + DAMPING) + (g - across) / DAMPING, 1e-9
            )
            assert float(direction.norm()) > 1 / (2 * math.sqrt(DAMPING))
        else:
            assert_near(direction, g / (g.norm() ** 2 + DAMPING), 1e-9)
            assert float(direction.norm()) <= 1 / (2 * math.sqrt(DAMPING))


# ------------------------------------------------------------------------------------------------
# no refinement


OFF: dict[str, Callable[[Block, bool], object]] = {
    "skqn-l": lambda b, split: SkqnL(b, pairs=0, gamma=0.0, split=split),
    "skqn-b1": lambda b, split: SkqnB(b, condition="parameters", columns=0, gamma=0.0, split=split),
    "skqn-b2": lambda b, split: SkqnB(
        b, condition="preactivations", columns=0, gamma=0.0, split=split
    ),
}


@names
@pytest.mark.parametrize("model", ["tanh", "conv", "tokens"])
def test_without_refinement_it_is_kfac_to_the_bit(name: str, model: str) -> None:
    """KFAC of the data's labels, with (8)'s damping, no moving average."""
    p, q = problem(model), problem(model)
    objective, other = p.objective(), q.objective()
    off = {"gamma": 0.0, "split": True} | ({"pairs": 0} if name == "skqn-l" else {"columns": 0})
    optimizer = cl.optimizer(name, objective, lr=0.1, damping=DAMPING, **RULE, **off)
    kfac = cl.approximation("kfac", other, labels="data", decay=0.0)
    norm = None
    for x, y in batches(p, 4):
        kfac.damping = GradientNorm()(DAMPING, norm)
        # autograd's own gradient, as the optimizer takes it: the sum over rows may round otherwise
        observation = other.closure(x, y).observe({"data", "gradient"})
        kfac.update(observation)
        norm = total_norm(observation.gradients)
        direction = kfac.precondition(observation.gradients)
        optimizer.step(objective.closure(x, y))
        assert not optimizer.descent.wants_step
        for block in other.blocks:
            for n, d in block.scatter(direction[block.name]).items():
                other.parameters[n].data.sub_(d, alpha=0.1)
                assert torch.equal(other.parameters[n], objective.parameters[n])


@names
def test_without_refinement_the_whole_is_damped_exactly(name: str) -> None:
    layer, statistics = small_layer()
    block: Any = OFF[name](layer, False)
    block.update(statistics, 1.0)
    block.refresh(0.3)
    dense = torch.kron(statistics.G, statistics.A.contiguous()) + 0.3 * eye(layer.numel)
    assert_near(block.inverse.dense(), torch.linalg.inv(dense), 1e-10)
    assert_near(block.matrix(0.3).dense(), dense, 1e-12)


# ------------------------------------------------------------------------------------------------
# the rule (8)


@given(st.floats(1e-6, 1e6), st.floats(0, 1e30), st.floats(1e-3, 1), st.floats(1.01, 100))
def test_gradient_norm_rule_as_printed(
    damping: float, norm: float, r1: float, ratio: float
) -> None:
    r2 = r1 * ratio
    if norm < r1:
        expected = 2 * r1 / (norm + r1) * damping
    elif norm > r2:
        expected = 2 * norm / (norm + r2) * damping
    else:
        expected = damping
    found = GradientNorm(r1=r1, r2=r2)(damping, norm)
    assert found == pytest.approx(expected, rel=1e-12)
    assert damping <= found <= 2 * damping


def test_gradient_norm_rule_at_its_ends() -> None:
    rule = GradientNorm(r1=0.5, r2=2.0)
    assert [rule(3.0, norm) for norm in (None, 0.0, 0.5, 1.0, 2.0, math.inf)] == [3, 6, 3, 3, 3, 6]
    for r1, r2 in ((0.0, 1.0), (1.0, 1.0), (2.0, 1.0), (math.nan, 1.0)):
        with pytest.raises(cl.CurvlabError, match="0 < r₁ < r₂"):
            GradientNorm(r1=r1, r2=r2)


@names
def test_the_damping_of_a_step_is_of_the_gradient_before(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    p = problem("tanh")
    objective = p.objective()
    optimizer = cl.optimizer(name, objective, lr=0.1, damping=DAMPING, **RULE)
    block = curvature_of(optimizer).blocks["2"]
    seen: list[float] = []
    refresh = block.refresh
    monkeypatch.setattr(block, "refresh", lambda damping: (seen.append(damping), refresh(damping)))  # type: ignore[func-returns-value]  # for its effect
    expected: list[float] = []
    norm: float | None = None
    for x, y in batches(p, 4):
        x = x * 10 ** (-len(expected))  # gradients of several sizes
        expected.append(GradientNorm()(DAMPING, norm))
        closure = objective.closure(x, y)
        closure()
        norm = math.sqrt(
            sum(float(grad_of(q).square().sum()) for q in objective.parameters.values())
        )
        optimizer.step(objective.closure(x, y))
    assert seen == pytest.approx(expected, rel=1e-12)
    assert optimizer.param_groups[0]["damping"] == DAMPING  # α⁻¹, which a schedule may change
    assert curvature_of(optimizer).gradient_norm == pytest.approx(norm, rel=1e-12)


@names
def test_r1_r2_and_the_sequence_alpha_are_options(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """λ of every refresh is (8) with the given r₁, r₂ and α_k⁻¹ = damping · shrinkᵏ."""
    p = problem("tanh")
    objective = p.objective()
    optimizer = cl.optimizer(name, objective, lr=0.1, damping=DAMPING, r1=0.02, r2=0.05, shrink=0.5)
    block = curvature_of(optimizer).blocks["2"]
    seen: list[float] = []
    refresh = block.refresh
    monkeypatch.setattr(block, "refresh", lambda damping: (seen.append(damping), refresh(damping)))  # type: ignore[func-returns-value]  # for its effect
    expected: list[float] = []
    norm: float | None = None
    for k, (x, y) in enumerate(batches(p, 5)):
        alpha, closure = DAMPING * 0.5**k, objective.closure(x * 10 ** (1 - k), y)
        if norm is None:
            expected.append(alpha)
        elif norm < 0.02:
            expected.append(2 * 0.02 / (norm + 0.02) * alpha)
        else:
            expected.append(2 * norm / (norm + 0.05) * alpha if norm > 0.05 else alpha)
        closure()
        norm = math.sqrt(
            sum(float(grad_of(q).square().sum()) for q in objective.parameters.values())
        )
        optimizer.step(closure)
    assert seen == pytest.approx(expected, rel=1e-12)
    assert optimizer.param_groups[0]["damping"] == DAMPING / 32
    # inside of r₁, r₂ and outside
    assert len({e / (DAMPING * 0.5**k) == 1 for k, e in enumerate(expected)}) == 2


def test_options_of_the_rule_are_known_checked_and_of_their_methods_alone(tmp_path: Path) -> None:
    for name in NAMES:
        assert {"r1", "r2", "shrink"} <= set(ALGORITHMS[name].options)
        for own, message in (
            ({"r1": 0.1}, "needs both r1 and r2, or neither"),
            ({"reading": "printed", "r1": None}, "r1 of .* must be a"),
            ({"reading": "prited"}, "unknown reading 'prited'; did you mean 'printed'"),
            ({"r1": 2.0, "r2": 1.0}, "0 < r₁ < r₂"),
            ({"reading": "printed", "r2": 0.05}, "0 < r₁ < r₂"),
            ({"shrink": 0.0}, "shrink must be"),
        ):
            with pytest.raises(cl.CurvlabError, match=message):
                cl.optimizer(name, problem("tanh").objective(), **own)
    assert {"r1", "r2", "shrink"} <= set(ALGORITHMS["s4qn"].options) & set(
        ALGORITHMS["ssn"].options
    )
    with pytest.raises(cl.CurvlabError, match="unknown option of kfac 'r1'"):
        cl.optimizer("kfac", problem("tanh").objective(), r1=1.0)
    words = [
        "train",
        "--model",
        "mlp-256-20",
        "--batch-size",
        "6000",
        "--steps",
        "2",
        "--algorithm",
        "skqn-b2",
    ]
    options = ("--set", "reading=printed", "--set", "r1=0.2", "--set", "r2=3")
    assert call(*words, *options, "--out", str(tmp_path)) == 0
    said = json.loads(cl.open(tmp_path).attrs["settings"])
    assert said["own"] == {"reading": "printed", "r1": 0.2, "r2": 3}
    assert (said["labels"], said["momentum"], said["refresh_every"]) == ("data", 0.0, 1)


# ------------------------------------------------------------------------------------------------
# what is asked for


@pytest.mark.parametrize(
    ("name", "asks"), [("k-bfgs", False), ("skqn-b2", False), ("skqn-b1", True), ("skqn-l", True)]
)
def test_the_change_of_parameters_is_computed_for_those_who_read_it(name: str, asks: bool) -> None:
    p = problem("tanh")
    objective = p.objective()
    curvature = cl.approximation(name, objective, damping=0.3)
    before = objective.closure(p.x, p.y).observe({"data", "model", "gradient"})
    curvature.update(before)
    calls: list[int] = []

    def displacement() -> dict[str, Tensor]:
        calls.append(1)
        return {b.name: torch.ones(b.shape, dtype=torch.float64) for b in objective.blocks}

    assert curvature.learn(Transition(before, before, displacement))
    assert len(calls) == asks


def test_the_memory_of_pairs_forgets_the_oldest() -> None:
    p = problem("tanh", n=20)
    objective = p.objective()
    optimizer = cl.optimizer("skqn-l", objective, lr=0.1, damping=DAMPING, pairs=2)
    for x, y in batches(p, 5):
        optimizer.step(objective.closure(x, y))
    assert curvature_of(optimizer).blocks["1"].S.shape == (2, 24)


def test_a_sketch_is_drawn_anew_at_every_step_and_by_its_seed() -> None:
    found = []
    for seed in (0, 0, 1):
        p = problem("tanh", n=40)
        objective = p.objective()
        optimizer = cl.optimizer(
            "skqn-b2", objective, lr=0.1, damping=DAMPING, columns=2, seed=seed
        )
        for x, y in batches(p, 3):
            optimizer.step(objective.closure(x, y))
        block = curvature_of(optimizer).blocks["1"]
        assert block.draws == 3
        found.append(block.Lambda)
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


@pytest.mark.parametrize(
    ("name", "own", "message"),
    [
        ("skqn-l", {"pairs": -1}, "pairs must be 0"),
        ("skqn-l", {"gamma": 0.0}, "γ above 0, not 0; γ = 0 needs pairs=0"),
        ("skqn-l", {"gamma": -1.0, "pairs": 0}, "γ above 0"),
        ("skqn-b1", {"columns": -2}, "columns must be 0"),
        ("skqn-b2", {"gamma": 0.0}, "γ = 0 needs columns=0"),
        ("skqn-b2", {"gamma": math.nan}, "gamma of skqn-b2 must be a finite number, not nan"),
        ("skqn-b1", {"condition": "21"}, "unknown condition of skqn-b1 '21'.*preactivations"),
    ],
)
def test_options_out_of_range(name: str, own: dict[str, Any], message: str) -> None:
    with pytest.raises(cl.CurvlabError, match=message):
        cl.approximation(name, problem("tanh").objective(), **own)


def test_single_precision_of_l_is_double_precision_rounded() -> None:
    """With pairs: the core of (13) is computed in double precision and kept in single."""
    found = []
    for dtype in (torch.float32, torch.float64):
        p = problem("tanh", dtype=dtype, n=20)
        objective: Objective = p.objective()
        optimizer = cl.optimizer("skqn-l", objective, lr=0.3, damping=0.1, gamma=0.01)
        for x, y in batches(p, 8):
            optimizer.step(objective.closure(x.to(dtype), y))
        found.append(optimizer.descent.curvature.inverse["2"].dense())
    assert found[0].dtype == torch.float32
    assert float((found[0].double() - found[1]).norm() / found[1].norm()) < 1e-3
