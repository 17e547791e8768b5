"""Every variant of K-BFGS against its document's pseudo-code on layers that share weights, written
out in plain torch.

The hand-written version knows nothing of the library: patches by `F.unfold`, derivatives by
autograd, every matrix dense and every BFGS matrix by its product form. 2021 is Ren and Goldfarb,
whose algorithms are numbered apart.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracle import total
from problems import Problem, assert_near, batches, curvature_of, problem
from torch import Tensor, nn

import curvlab as cl
from curvlab.linalg.bounds import damped_lbfgs, double_damping_lbfgs, input_factor, mu3
from curvlab.linalg.operators import Operator

MU1, BETA = 0.2, 0.9
Pair = tuple[Tensor, Tensor]


def powell(s: Tensor, y: Tensor, H: Tensor) -> Tensor:
    """Thesis Alg. 3, lines 2 and 3; Alg. 8 and 2021 Alg. 1, lines 2 to 7."""
    sy, yHy = s @ y, y @ H @ y
    theta = (1 - MU1) * yHy / (yHy - sy) if sy < MU1 * yHy else 1.0
    return theta * s + (1 - theta) * H @ y


def dd(s: Tensor, y: Tensor, H: Tensor, mu2: float) -> Pair:
    """Thesis Alg. 3."""
    s = powell(s, y, H)
    theta = (1 - mu2) * (s @ s) / (s @ s - s @ y) if s @ y < mu2 * (s @ s) else 1.0
    return s, theta * y + (1 - theta) * s


def p_lm(s: Tensor, y: Tensor, H: Tensor, mu2: float) -> Pair:
    """Thesis Alg. 8; 2021 Alg. 1."""
    s = powell(s, y, H)
    return s, y + mu2 * s


def pi_lm(s: Tensor, y: Tensor, H: Tensor, mu2: float) -> Pair:
    """Thesis Alg. 11."""
    return p_lm(s, y, torch.eye(len(s), dtype=s.dtype) / mu2, mu2)


def pi_lm_2021(s: Tensor, y: Tensor, H: Tensor, mu2: float) -> Pair:
    """2021 Alg. 4."""
    return p_lm(s, y, torch.eye(len(s), dtype=s.dtype), mu2)


def bfgs(H: Tensor, s: Tensor, y: Tensor) -> Tensor:
    rho, eye = 1 / (s @ y), torch.eye(len(s), dtype=s.dtype)
    return (eye - rho * torch.outer(s, y)) @ H @ (
        eye - rho * torch.outer(y, s)
    ) + rho * torch.outer(s, s)


@dataclass(frozen=True)
class Document:
    """What differs from one pseudo-code to the next."""

    momentum: Callable[[Tensor, Tensor], Tensor]  # old, new
    places: bool  # λ_A = √T √λ, λ_G = √λ / √T
    start: Callable[[float], float]  # λ_G → h, H_G = h I
    damp: Callable[[Tensor, Tensor, Tensor, float], Pair]
    minibatch: bool  # A of the minibatch alone
    pairs: int = 0
    exact: bool = False
    skip: bool = False


def average(old: Tensor, new: Tensor) -> Tensor:
    # thesis Alg. 4, line 8; 2021 3.3, where Alg. 2, line 7 misprints it
    return BETA * old + (1 - BETA) * new


def add(old: Tensor, new: Tensor) -> Tensor:
    return BETA * old + new  # thesis Alg. 9, line 8


def none(old: Tensor, new: Tensor) -> Tensor:
    return new


def one(damping: float) -> float:
    return 1.0


def over(damping: float) -> float:
    return 1 / damping


DOCUMENTS = {
    "k-bfgs-20": Document(average, False, one, dd, False),
    "k-bfgs-l-20": Document(average, False, one, dd, False, 100),
    "k-bfgs-20-convergent": Document(none, False, one, dd, False, 100, True, True),
    "kf-bfgs-cnn": Document(average, False, one, p_lm, True),
    "kf-bfgs-l-cnn": Document(average, False, one, p_lm, True, 100),
    "kf-bfgs-cnn-convergent": Document(none, False, one, pi_lm_2021, True, 100, True),
    "k-bfgs": Document(add, True, over, p_lm, True),
    "k-bfgs-l": Document(add, True, over, p_lm, True, 100),
    "k-bfgs-convergent": Document(none, True, over, pi_lm, True, 100, True),
}
OPTIONS: dict[str, tuple[str, dict[str, Any], Document]] = {
    "k-bfgs, improvement 1 off": (
        "k-bfgs",
        {"pair_damping": "dd"},
        Document(add, True, over, dd, True),
    ),
    "k-bfgs, improvement 2 off": (
        "k-bfgs",
        {"minibatch": False},
        Document(add, True, over, p_lm, False),
    ),
    "both off": (
        "k-bfgs",
        {"pair_damping": "dd", "minibatch": False},
        Document(add, True, over, dd, False),
    ),
    "few pairs": ("kf-bfgs-l-cnn", {"pairs": 3}, Document(average, False, one, p_lm, True, 3)),
}
"""Table 3.8, and a memory that is full."""
CASES: dict[str, tuple[str, dict[str, Any], Document]] = {
    name: (name, {}, document) for name, document in DOCUMENTS.items()
} | OPTIONS


def patches(layer: Any, x: Tensor) -> Tensor:
    """[N, T, I] with the homogeneous coordinate where there is a bias."""
    if isinstance(layer, nn.Linear):
        rows = x[:, None]
    else:
        rows = F.unfold(x, layer.kernel_size, layer.dilation, layer.padding, layer.stride).mT
    return rows if layer.bias is None else torch.cat([rows, torch.ones_like(rows[..., :1])], -1)


class ByHand:
    """The pseudo-code of `document` for a chain of linear layers, convolutions and activations."""

    def __init__(self, document: Document, model: nn.Sequential, damping: float, x: Tensor) -> None:
        self.document, self.model = document, model
        self.layers = [m for m in model if isinstance(m, nn.Linear | nn.Conv2d)]
        self.W = [
            torch.cat([m.weight.flatten(1), *([] if m.bias is None else [m.bias[:, None]])], 1)
            .detach()
            .clone()
            for m in self.layers
        ]
        places = [a.shape[1] if document.places else 1 for a in self.look(x, None, None)[0]]
        self.damping_a = [math.sqrt(t) * math.sqrt(damping) for t in places]
        self.damping_g = [math.sqrt(damping) / math.sqrt(t) for t in places]
        self.m = [torch.zeros_like(w) for w in self.W]
        self.H_g = [
            document.start(d) * torch.eye(len(w), dtype=w.dtype)
            for d, w in zip(self.damping_g, self.W, strict=True)
        ]
        self.s = [torch.zeros(len(w), dtype=w.dtype) for w in self.W]
        self.y = [torch.zeros(len(w), dtype=w.dtype) for w in self.W]
        self.kept: list[list[Pair]] = [[] for _ in self.W]
        self.A: list[Tensor] = []
        self.H_a: list[Tensor] = []

    def look(
        self, x: Tensor, y: Tensor | None, likelihood: Any
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """a [N, T, I], h and Dh [N, T, O] of every layer."""
        a, h, value, weights = [], [], x, iter(self.W)
        for module in self.model:
            if module not in self.layers:
                value = module(value)
                continue
            a.append(patches(module, value))
            h.append((a[-1] @ next(weights).T).requires_grad_())
            if isinstance(module, nn.Linear):
                value = h[-1][:, 0]
            else:
                axes: Any = zip(
                    value.shape[2:],
                    module.kernel_size,
                    module.dilation,
                    module.padding,
                    module.stride,
                    strict=True,
                )
                size = [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, d, p, s in axes]
                value = h[-1].mT.reshape(len(x), -1, *size)
        g = [] if y is None else torch.autograd.grad(likelihood.loss(value, y).sum(), h)
        return [t.detach() for t in a], [t.detach() for t in h], list(g)

    def warm(self, data: list[tuple[Tensor, Tensor]]) -> None:
        """A = E[Σ_t a aᵀ], H_A = (A + λ_A I)⁻¹."""
        looks = [self.look(x, None, None)[0] for x, _ in data]
        self.A = [
            total(self.moment(look[i]) for look in looks) / len(looks) for i in range(len(self.W))
        ]
        self.H_a = [self.inverted(i, A) for i, A in enumerate(self.A)]

    @staticmethod
    def moment(a: Tensor) -> Tensor:
        return total(torch.outer(a_t, a_t) for a_n in a for a_t in a_n) / len(a)

    def inverted(self, i: int, A: Tensor) -> Tensor:
        return torch.linalg.inv(A + self.damping_a[i] * torch.eye(len(A), dtype=A.dtype))

    def step(self, x: Tensor, y: Tensor, likelihood: object, lr: float) -> None:
        a, h, g = self.look(x, y, likelihood)
        for i in range(len(self.W)):
            gradient = torch.einsum("nto,nti->oi", g[i], a[i]) / len(x)
            self.m[i] = self.document.momentum(self.m[i], gradient)
            self.W[i] = self.W[i] - lr * self.H_g[i] @ self.m[i] @ self.H_a[i]
        _, h2, g2 = self.look(x, y, likelihood)
        for i in range(len(self.W)):
            self.learn_a(i, a[i])
            self.s[i] = average(self.s[i], h2[i].mean((0, 1)) - h[i].mean((0, 1)))
            self.y[i] = average(self.y[i], g2[i].mean((0, 1)) - g[i].mean((0, 1)))
            self.learn_g(i, g[i].mean((0, 1)))

    def learn_a(self, i: int, a: Tensor) -> None:
        moment = self.moment(a)
        self.A[i] = moment if self.document.minibatch else average(self.A[i], moment)
        if self.document.exact:
            self.H_a[i] = self.inverted(i, self.A[i])
            return
        s = self.H_a[i] @ a.mean((0, 1))
        self.H_a[i] = bfgs(self.H_a[i], s, self.A[i] @ s + self.damping_a[i] * s)

    def learn_g(self, i: int, mean: Tensor) -> None:
        H = self.H_g[i]
        s, y = self.document.damp(self.s[i], self.y[i], H, self.damping_g[i])
        if not s @ y > 1e-4 * (s @ s) * mean.norm():  # practice
            return
        if self.document.skip and not s @ y >= MU1 * (1 - 1e-8) * (
            y @ H @ y
        ):  # Alg. 5, line 17; Powell makes them equal
            return
        if not self.document.pairs:
            self.H_g[i] = bfgs(H, s, y)
            return
        self.kept[i] = [*self.kept[i], (s, y)][-self.document.pairs :]
        H = self.document.start(self.damping_g[i]) * torch.eye(len(s), dtype=s.dtype)
        for pair in self.kept[i]:
            H = bfgs(H, *pair)
        self.H_g[i] = H


def dense(factor: Tensor | Operator) -> Tensor:
    return factor if isinstance(factor, Tensor) else factor.dense()


@pytest.mark.parametrize("model", ["tanh", "conv"])
@pytest.mark.parametrize("case", CASES)
def test_trajectory_is_the_pseudo_codes(case: str, model: str) -> None:
    """Warm start and twelve steps: weights and both factors. Stride, padding, dilation, a filter
    without a bias.
    """
    name, options, document = CASES[case]
    p = problem(model, n=20)
    data = batches(p, 12)
    by_hand = ByHand(document, p.model, 0.3, p.x)
    by_hand.warm(data)  # ten or more, so that the next minibatch has weight 1 − β
    objective = p.objective()
    lr = 0.02 if document.momentum is add else 0.2
    optimizer = cl.optimizer(name, objective, lr=lr, damping=0.3, **options)
    optimizer.warm_start(data)
    for x, y in data:
        by_hand.step(x, y, p.likelihood, lr)
        optimizer.step(objective.closure(x, y))
    for i, block in enumerate(objective.blocks):
        assert_near(block.gather(objective.parameters).detach(), by_hand.W[i], 1e-10)
        H_g, H_a = curvature_of(optimizer).inverse[block.name].factors
        assert_near(dense(H_a), by_hand.H_a[i], 1e-9)
        assert_near(dense(H_g), by_hand.H_g[i], 1e-9)


def trained(name: str, p: Problem, lr: float, steps: int = 12, **options: Any) -> Tensor:
    objective = p.objective()
    optimizer = cl.optimizer(name, objective, lr=lr, damping=0.3, **options)
    data = batches(p, steps)
    optimizer.warm_start(data)
    for x, y in data:
        optimizer.step(objective.closure(x, y))
    return objective.layout.flatten({n: t.detach() for n, t in objective.parameters.items()})


@pytest.mark.parametrize("pairs", [0, 100])
def test_chapter_3_without_its_improvements_is_chapter_2(pairs: int) -> None:
    """Table 3.8, last line, on an MLP; with chapter 2's start of H_g. Its averaged momentum is a
    tenth of chapter 3's.
    """
    off: dict[str, Any] = {
        "pair_damping": "dd",
        "minibatch": False,
        "start": "identity",
        "pairs": pairs,
    }
    found = trained("k-bfgs", problem("tanh", n=20), 0.03, **off)
    assert_near(
        found, trained("k-bfgs-l-20" if pairs else "k-bfgs-20", problem("tanh", n=20), 0.3), 1e-10
    )


def test_the_improvements_change_something() -> None:
    """Each switch alone gives another trajectory: none of them is idle."""
    ways: list[dict[str, Any]] = [
        {},
        {"pair_damping": "dd"},
        {"minibatch": False},
        {"rebalance": False},
        {"start": "identity"},
        {"exact": True},
    ]
    found = [trained("k-bfgs", problem("conv", n=20), 0.03, **way) for way in ways]
    for i, one_way in enumerate(found):
        assert all(float((one_way - other).norm() / other.norm()) > 1e-6 for other in found[:i])


@pytest.mark.parametrize("model", ["tanh", "conv"])
def test_2021_and_chapter_3_agree_where_the_damping_is_one(model: str) -> None:
    """λ = 1 on an MLP: λ_G = 1, so that I/λ_G is I; only the momentum differs. On images the split
    over places does too.
    """
    runs = []
    for name, lr in (("kf-bfgs-cnn", 0.3), ("k-bfgs", 0.03)):
        p = problem(model, n=20)
        objective = p.objective()
        optimizer = cl.optimizer(name, objective, lr=lr, damping=1.0)
        for x, y in batches(p, 8):
            optimizer.step(objective.closure(x, y))
        runs.append(
            objective.layout.flatten({n: t.detach() for n, t in objective.parameters.items()})
        )
    error = float((runs[0] - runs[1]).norm() / runs[1].norm())
    assert error < 1e-12 if model == "tanh" else error > 1e-6


@pytest.mark.parametrize("damping", [0.05, 0.3])
@pytest.mark.parametrize("model", ["tanh", "conv"])
@pytest.mark.parametrize(
    "name", ["k-bfgs-20-convergent", "kf-bfgs-cnn-convergent", "k-bfgs-convergent"]
)
def test_convergent_variants_keep_the_bounds_of_their_lemmas(
    name: str, model: str, damping: float
) -> None:
    """Every pair that was used, and both factors, over 15 steps: thesis Lemmas 1, 2, 4, 6, 7; 2021
    Lemmas 1, 3, 4.
    """
    p = problem(model, n=20)
    objective = p.objective()
    optimizer = cl.optimizer(name, objective, lr=0.05, damping=damping)
    used, phi = dict.fromkeys([b.name for b in objective.blocks], 0), 5.0
    for x, y in batches(p, 15):
        optimizer.step(objective.closure(x, y))
        for key, block in curvature_of(optimizer).blocks.items():
            damping_a, mu2 = block._split()
            pair, found = block.last["g"], block.last["g"].damping.after
            used[key] += not pair.skipped
            slack = 1 + 1e-7  # DD-skip compares up to √ε
            if not pair.skipped:
                assert found.step <= slack / mu2
                if name == "k-bfgs-20-convergent":
                    assert found.curvature <= slack / MU1
                else:
                    assert found.change <= slack / mu3(
                        MU1, mu2, 1.0 if name.startswith("kf") else None
                    )
            H_g, H_a = block.factors
            if name == "k-bfgs-20-convergent":
                bounds = double_damping_lbfgs(used[key], MU1, mu2)
            else:
                bounds = damped_lbfgs(used[key], MU1, mu2, 1.0 if name.startswith("kf") else None)
            spectrum = torch.linalg.eigvalsh(dense(H_g))
            assert bounds.hold(float(spectrum[0]), float(spectrum[-1]))
            inputs = input_factor(H_a.shape[0], phi, damping_a, block.places)
            spectrum = torch.linalg.eigvalsh(H_a)
            assert inputs.hold(float(spectrum[0]), float(spectrum[-1]))
    # it skips most pairs of a layer of "conv"
    assert min(used.values()) >= (2 if name == "k-bfgs-20-convergent" else 15)


def test_dd_skip_refuses_pairs_that_the_other_takes() -> None:
    """Thesis Alg. 5, line 17 on a run where double damping leaves the first inequality violated."""
    skipped: dict[str, Any] = {}
    for name in ("k-bfgs-20-convergent", "k-bfgs-l-20"):
        p = problem("conv", n=20)
        objective = p.objective()
        optimizer = cl.optimizer(name, objective, lr=0.05, damping=0.3)
        skipped[name] = []
        for x, y in batches(p, 15):
            optimizer.step(objective.closure(x, y))
            skipped[name] += [
                block.last["g"].skipped for block in curvature_of(optimizer).blocks.values()
            ]
    assert "double damping" in skipped["k-bfgs-20-convergent"]
    assert "double damping" not in skipped["k-bfgs-l-20"]
