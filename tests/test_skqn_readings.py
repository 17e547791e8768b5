"""Readings of SKQN, its units, its λ in logs, and how large its refinement becomes."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from problems import assert_near, batches, curvature_of, problem
from torch import nn

import curvlab as cl
from curvlab.algorithms import ALGORITHMS
from curvlab.curvature.gradient_norm import GradientNorm

NAMES = ("skqn-l", "skqn-b1", "skqn-b2")
names = pytest.mark.parametrize("name", NAMES)

# ------------------------------------------------------------------------------------------------
# readings


@names
def test_the_default_has_the_settings_of_kfac_and_a_refinement(name: str) -> None:
    """S2QN 6.1 by analogy: "the same … except an additional quasi-Newton matrix"."""
    own, kfac = ALGORITHMS[name], ALGORITHMS["kfac"]
    assert own.constants == kfac.constants
    assert own.labels == kfac.labels == "model"
    assert own.builds.averaging == kfac.builds.averaging
    assert own.defaults["split"] is True
    assert own.defaults["reading"] == "kfac"
    assert (own.defaults["r1"], own.defaults["r2"]) == (None, None)


@names
@pytest.mark.parametrize("model", ["tanh", "conv"])
def test_the_default_without_a_refinement_is_kfac_to_the_bit(name: str, model: str) -> None:
    """With its moving average, its momentum and T₂."""
    p = problem(model)
    off: dict[str, Any] = {"gamma": 0.0} | ({"pairs": 0} if name == "skqn-l" else {"columns": 0})
    runs = []
    for algorithm, own in ((name, off), ("kfac", {})):
        objective = problem(model).objective()
        optimizer = cl.optimizer(algorithm, objective, refresh_every=3, **own)
        for x, y in batches(p, 8):
            optimizer.step(objective.closure(x, y))
        runs.append(objective.parameters)
    assert all(torch.equal(w, runs[1][n]) for n, w in runs[0].items())


@names
def test_a_reading_is_one_word_wherever_options_go(name: str) -> None:
    objective = problem("tanh").objective()
    printed = cl.optimizer(name, objective, reading="printed")
    group, curvature = printed.param_groups[0], curvature_of(printed)
    assert (group["lr"], group["momentum"], group["damping"]) == (1.0, 0.0, 10.0)
    assert (curvature.labels, curvature.cadence.refresh_every) == ("data", 1)
    assert curvature.norm_rule == GradientNorm(r1=0.1, r2=1000.0)
    assert curvature.blocks["1"].split is False
    seng = cl.optimizer(name, objective, reading="seng", damping=7.0)
    assert seng.descent.momentum.kind == "directions"
    assert (seng.param_groups[0]["lr"], seng.param_groups[0]["damping"]) == (1.0, 7.0)
    assert curvature_of(seng).averaging.weight(5) == 1.0
    approximation: Any = cl.approximation(name, objective, reading="seng")
    assert (approximation.labels, approximation.damping) == ("data", 100.0)
    with pytest.raises(cl.CurvlabError, match="unknown reading 'sengs'; did you mean 'seng'"):
        cl.approximation(name, objective, reading="sengs")
    with pytest.raises(cl.CurvlabError, match="unknown option of kfac 'reading'"):
        cl.approximation("kfac", objective, reading="printed")


# ------------------------------------------------------------------------------------------------
# one λ


@names
@pytest.mark.parametrize("model", ["tanh", "conv", "tokens"])
def test_a_comparison_damps_it_as_it_damps_the_others(name: str, model: str) -> None:
    """The greatest eigenvalue of the inverse at λ = 1e-3 is KFAC's over 1 + γ (L) or at most
    1 + γπ (B), in every block: up to a factor of 3 here, where γ = 0.1 whatever λ made it 100.
    """
    p = problem(model)
    objective = p.objective()
    observation = objective.closure(p.x, p.y).observe({"data", "model", "gradient"})
    greatest = {}
    for algorithm in (name, "kfac"):
        curvature = cl.approximation(
            algorithm, objective, damping=1e-3, **ALGORITHMS[algorithm].fixed
        )
        curvature.update(observation)
        greatest[algorithm] = {
            n: float(H.eigvalsh()[-1]) for n, H in curvature.inverse.items() if len(H) > 0
        }
    for block, value in greatest["kfac"].items():
        assert value / 3 <= greatest[name][block] <= value * (1 + 1e-12)


@names
def test_at_no_damping_there_is_no_refinement(name: str) -> None:
    """γ is in units of λ: at λ = 0 nothing is learnt, and the base stands alone."""
    p = problem("tanh", "gaussian", n=40)
    objective = p.objective()
    optimizer = cl.optimizer(name, objective, lr=0.01, labels="data", damping=0.0, split=False)
    curvature = curvature_of(optimizer)
    closure = objective.closure(p.x, p.y)
    curvature.update(closure.observe({"data", "gradient"}))
    block = curvature.blocks["1"]
    block.U = block.V = torch.ones(len(block.G), 3 if name == "skqn-b2" else len(block.A)).double()
    block.refine(0.0)
    assert block.U is None
    assert_near(block.matrix().dense(), torch.kron(block.G, block.A.contiguous()), 1e-12)


@names
def test_the_rule_of_the_norm_is_held_in_a_comparison_and_its_damping_logged(name: str) -> None:
    """λ_k of (8) is `damping_used` beside `damping`, α_k⁻¹, in training; a comparison holds it."""
    assert ALGORITHMS[name].fixed == {"r1": None, "r2": None, "shrink": 1.0}
    assert ALGORITHMS["s4qn"].fixed == ALGORITHMS[name].fixed
    p = problem("tanh")
    objective = p.objective()
    log = cl.compare(
        objective,
        batches(p, 3),
        reference="kfac",
        algorithms=(name, "s4qn", "sgd-m"),
        damping=0.02,
        progress=False,
    ).dataset
    # s4qn adds to λ where its Hessian is indefinite
    used = log["damping_of_direction"].sel(algorithm=["kfac", name])
    np.testing.assert_allclose(used, 0.02, rtol=1e-12)
    given: dict[str, Any] = {"reading": "printed", "r1": 1e-4, "r2": 1e-3, "damping": 0.5}
    run = cl.train(
        problem("tanh").objective(), batches(p, 3), algorithm=name, progress=False, **given
    )
    at = run.dataset.isel(epoch=-1)
    assert float(at["damping"]) == 0.5
    assert 0.95 < float(at["damping_used"]) < 1.0  # norms far above r₂


# ------------------------------------------------------------------------------------------------
# the size of the refinement


def ratios(name: str, steps: int, **own: Any) -> Iterator[float]:
    """λ_max(Λ̃) / (λ_max(G̃) + γ) of the worst block at every fifth step, on a small autoencoder of
    MNIST.
    """
    train, _ = cl.datasets.load("mnist16")
    parts = train.x[:1000].flatten(1).split(200)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        widths = (256, 60, 30, 8, 30, 60, 256)
        layers = [nn.Linear(*pair) for pair in pairwise(widths)]
        net = nn.Sequential(*(part for layer in layers for part in (layer, nn.ReLU())))[:-1]
    objective = cl.Objective(net, cl.likelihoods.Bernoulli())
    optimizer = cl.optimizer(name, objective, **own)
    blocks: list[Any] = list(curvature_of(optimizer).blocks.values())
    for step in range(1, steps + 1):
        x = parts[step % len(parts)]
        optimizer.step(objective.closure(x, x))
        if step % 5 == 0:
            yield max(
                float(torch.linalg.eigvalsh(b.Lambda)[-1])
                / (float(torch.linalg.eigvalsh(b.kept_G)[-1]) + b.gamma)
                for b in blocks
            )


@pytest.mark.parametrize("name", NAMES[1:])
def test_the_refinement_stays_in_the_size_of_what_it_refines(name: str) -> None:
    """Forty steps: within h = 10 (λ_max(G̃) + γ√λ), so within 100 of them."""
    assert max(ratios(name, 40)) <= 10 * (1 + 1e-6)


@pytest.mark.parametrize(
    ("name", "own"), [("skqn-b2", {"mu1": None, "ceiling": None}), ("skqn-b1", {"ceiling": None})]
)
def test_without_the_bounds_it_does_not(name: str, own: dict[str, Any]) -> None:
    """Powell's rule alone leaves 10⁶ within ten steps; a bound on each update alone grows, too."""
    assert any(ratio > 100 for ratio in ratios(name, 40, **own))


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES[1:])
def test_the_refinement_stays_in_size_for_300_steps(name: str) -> None:
    assert max(ratios(name, 300)) <= 10 * (1 + 1e-6)
