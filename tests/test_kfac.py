"""KFAC where it is exact, and its damping and order by hand (thesis Alg. 12)."""

from __future__ import annotations

import itertools
import math
import warnings
from typing import Any

import pytest
import torch
from problems import RULED, batches, groupless, problem
from torch import Tensor, nn

import curvlab as cl
from curvlab.algorithms import approximation, descent
from curvlab.curvature.block_diagonal import BlockDiagonal
from curvlab.curvature.kfac import Kfac
from curvlab.exact import Kind
from curvlab.linalg.operators import Kronecker
from curvlab.observation import Pass

KIND: dict[Pass, Kind] = {"exact": "ggn", "model": "fisher-mc", "data": "ef"}


def factors(curvature: BlockDiagonal, block: str) -> tuple[Tensor, Tensor]:
    """(A, G) of a block."""
    kfac = curvature.blocks[block]
    assert isinstance(kfac, Kfac)
    assert kfac.A is not None
    assert kfac.G is not None
    return kfac.A if kfac.A.ndim == 2 else torch.diag(kfac.A), kfac.G


def deep_linear(bias: bool) -> cl.Objective:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        widths = [(5, 4), (4, 6), (6, 3)]
        model = nn.Sequential(*(nn.Linear(i, o, bias=bias) for i, o in widths)).double()
    return cl.Objective(model, cl.likelihoods.Gaussian())


@pytest.mark.parametrize("bias", [True, False])
def test_is_the_exact_ggn_of_a_deep_linear_network(bias: bool) -> None:
    """h depends on nothing but W a, and the output Hessian is I: Gₙ is the same for all n, so the
    mean factorises.
    """
    objective = deep_linear(bias)
    p = problem("linear", "gaussian", n=9)
    curvature: Any = approximation("kfac", objective, labels="exact")
    curvature.update(objective.closure(p.x, p.y).observe(curvature.needs))
    for block in objective.blocks:
        A, G = factors(curvature, block.name)
        exact = cl.exact.matrix(objective, p.x, p.y, "ggn", block.name).dense()
        torch.testing.assert_close(torch.kron(G, A), exact, rtol=1e-10, atol=1e-12)
        hessian = cl.exact.matrix(
            objective, p.x, p.y, "hessian", block.name
        ).dense()  # the loss is quadratic in one W
        torch.testing.assert_close(torch.kron(G, A), hessian, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("labels", list(KIND))
@pytest.mark.parametrize("likelihood", ["categorical", "bernoulli", "gaussian"])
@pytest.mark.parametrize("model", ["tanh", "relu"])
def test_is_exact_for_one_example(model: str, likelihood: str, labels: Pass) -> None:
    p = problem(model, likelihood, n=1)
    objective = p.objective()
    curvature: Any = approximation("kfac", objective, labels=labels)
    curvature.update(objective.closure(p.x, p.y, "exact").observe(curvature.needs))
    for block in objective.blocks:
        objective.closures["exact"] = 0  # fisher-mc draws the labels of closure 1 again
        exact = cl.exact.matrix(objective, p.x, p.y, KIND[labels], block.name).dense()
        A, G = factors(curvature, block.name)
        torch.testing.assert_close(torch.kron(G, A), exact, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("model", RULED)
def test_shared_weights_sum_inputs_over_places_and_average_derivatives(model: str) -> None:
    """Ω sums over places and averages over examples, Γ averages over both (practice), one outer
    product after another.
    """
    p = problem(model)
    objective = p.objective()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", cl.CurvlabWarning)  # groups of outputs have no factors
        curvature: Any = approximation("kfac", objective)
    observation = objective.closure(p.x, p.y).observe(curvature.needs)
    curvature.update(observation)
    for block in groupless(p):
        s = observation.passes["model"][block.name]
        places = [(n, t) for n in range(7) for t in range(s.g.shape[2])]
        A, G = factors(curvature, block.name)
        torch.testing.assert_close(
            A, sum(torch.outer(s.a[n, t], s.a[n, t]) for n, t in places) / 7, rtol=1e-12, atol=1e-14
        )
        torch.testing.assert_close(
            G,
            sum(torch.outer(s.g[0, n, t], s.g[0, n, t]) for n, t in places) / len(places),
            rtol=1e-12,
            atol=1e-14,
        )


@pytest.mark.parametrize("damping", [1e-3, 0.1, 30.0])
def test_inverse_factors_and_damping_by_the_formula(damping: float) -> None:
    """(Γ + √λ/π I)⁻¹ ⊗ (Ω + π√λ I)⁻¹, π² = trace(Ω ⊗ I) / trace(I ⊗ Γ) (Alg. 12, line 19)."""
    p = problem("tanh")
    objective = p.objective()
    curvature: Any = approximation("kfac", objective, damping=damping)
    curvature.update(objective.closure(p.x, p.y).observe(curvature.needs))
    for block in objective.blocks:
        A, G = factors(curvature, block.name)
        eye_a, eye_g = (torch.eye(len(m), dtype=torch.float64) for m in (A, G))
        pi = math.sqrt(torch.kron(A, eye_g).trace() / torch.kron(eye_a, G).trace())
        inverse = curvature.inverse[block.name]
        assert isinstance(inverse, Kronecker)
        expected = (
            torch.linalg.inv(G + math.sqrt(damping) / pi * eye_g),
            torch.linalg.inv(A + math.sqrt(damping) * pi * eye_a),
        )
        for found, wanted in zip(inverse.factors, expected, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)
        gradient = torch.randn(
            block.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64
        )
        # Alg. 12, line 8: p = H_Γ DW H_Ω
        direction = curvature.precondition({block.name: gradient})[block.name]
        torch.testing.assert_close(
            direction, expected[0] @ gradient @ expected[1], rtol=1e-10, atol=1e-12
        )


@pytest.mark.parametrize("name", ["kfac", "kfac-20", "kfac-ef", "kflr", "tnt", "shampoo"])
def test_a_direction_is_from_statistics_at_the_weights_that_it_moves(name: str) -> None:
    """Alg. 15 and 16; Alg. 12, line 12, whose pass at these weights is this minibatch's here."""
    p = problem("tanh")
    objective = p.objective()
    one = descent(name, objective, damping=0.1, momentum=0.0)
    alone = approximation(name, objective, damping=0.1)
    for x, y in batches(p, 3):
        observation = objective.closure(x, y).observe(one.needs)
        alone.update(observation)
        expected, found = alone.precondition(observation.gradients), one.direction(observation)
        assert all(torch.equal(found[name], direction) for name, direction in expected.items())


def test_zero_derivatives_split_the_damping_evenly() -> None:
    """π is 1 where a trace is zero: H = (√λ I)⁻¹ ⊗ (Ω + √λ I)⁻¹."""
    p = problem("tanh", "gaussian")
    objective = p.objective()
    curvature: Any = approximation("kfac-ef", objective, damping=0.04)
    # targets are met: g = 0
    curvature.update(objective.closure(p.x, p.model(p.x).detach()).observe(curvature.needs))
    A, G = factors(curvature, "1")
    assert not bool(G.any())
    eye_g, eye_a = (torch.eye(d, dtype=torch.float64) for d in (4, 6))
    expected = torch.kron(eye_g / 0.2, torch.linalg.inv(A + 0.2 * eye_a).contiguous())
    torch.testing.assert_close(curvature.inverse["1"].dense(), expected, rtol=1e-11, atol=1e-12)


def enumerated(likelihood: str, z: Tensor) -> list[tuple[Tensor, Tensor]]:
    """All (labels [N, …], their probabilities [N]) of outputs z."""
    n, c = z.shape
    if likelihood == "categorical":
        return [(torch.full((n,), k), z.softmax(1)[:, k]) for k in range(c)]
    labels = [
        torch.tensor(bits, dtype=z.dtype).expand(n, c)
        for bits in itertools.product((0.0, 1.0), repeat=c)
    ]
    return [(y, (y * z.sigmoid() + (1 - y) * (1 - z.sigmoid())).prod(1)) for y in labels]


@pytest.mark.parametrize("likelihood", ["categorical", "bernoulli"])
@pytest.mark.parametrize("model", ["tanh", "tokens", "conv"])
def test_kflr_is_kfac_averaged_over_all_labels(model: str, likelihood: str) -> None:
    """Γ of every label, each example weighted with its label's probability; Ω knows no labels."""
    p = problem(model, likelihood)
    objective = p.objective()
    curvature: Any = approximation("kflr", objective, damping=0.1)
    curvature.update(objective.closure(p.x, p.y).observe(curvature.needs))
    expected: dict[str, Tensor] = {}
    for y, probability in enumerated(likelihood, p.model(p.x).detach()):
        for key, s in objective.closure(p.x, y).observe({"data"}).passes["data"].items():
            g = s.g[0] * probability.sqrt()[:, None, None]
            expected[key] = (
                expected.get(key, 0) + torch.einsum("nto,ntp->op", g, g) / g.shape[:2].numel()
            )
    for block in objective.blocks:
        A, G = factors(curvature, block.name)
        a = objective.closure(p.x, p.y).observe({"data"}).passes["data"][block.name].a
        torch.testing.assert_close(G, expected[block.name], rtol=1e-11, atol=1e-14)
        torch.testing.assert_close(
            A, torch.einsum("nti,ntj->ij", a, a) / len(a), rtol=1e-11, atol=1e-14
        )


@pytest.mark.parametrize("damping", [1e-3, 0.3])
@pytest.mark.parametrize("model", ["tanh", "conv"])
def test_chapter_2_splits_the_damping_evenly(model: str, damping: float) -> None:
    """Alg. 7, line 11: √λ each; the same factors as KFAC, whose split is an option."""
    p = problem(model)
    objective = p.objective()
    made: list[Any] = [
        approximation(*pair, damping=damping)
        for pair in (("kfac-20", objective), ("kfac", objective))
    ]
    option = approximation("kfac", objective, damping=damping, split="even")
    observation = objective.closure(p.x, p.y).observe({"model"})
    for curvature in (*made, option):
        curvature.update(observation)
    for block in objective.blocks:
        A, G = factors(made[0], block.name)
        assert all(
            torch.equal(*pair) for pair in zip((A, G), factors(made[1], block.name), strict=True)
        )
        each = [
            torch.linalg.inv(m + math.sqrt(damping) * torch.eye(len(m), dtype=m.dtype))
            for m in (G, A)
        ]
        torch.testing.assert_close(
            made[0].inverse[block.name].dense(), torch.kron(*each), rtol=1e-9, atol=1e-10
        )
        assert torch.equal(option.inverse[block.name].dense(), made[0].inverse[block.name].dense())


def test_an_unknown_split_names_the_known_ones() -> None:
    with pytest.raises(cl.CurvlabError, match=r"split of the damping.*pi, even"):
        approximation("kfac", problem("tanh").objective(), split="odd")
