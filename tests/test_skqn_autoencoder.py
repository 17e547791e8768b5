"""SKQN on the document's autoencoder: how large the refinement becomes in five epochs."""

from __future__ import annotations

import math

import pytest
import torch

import curvlab as cl
from curvlab.curvature.skqn import SkqnB
from curvlab.problem import Problem

EVERY = 10  # steps between looks at Λ̃


@pytest.mark.slow
@pytest.mark.parametrize("name", ["skqn-b1", "skqn-b2"])
def test_the_refinement_stays_in_proportion_for_five_epochs(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """At the defaults, KFAC's (0.03, 1), 300 steps of minibatches of 1000, seed 3."""
    problem = Problem(model="mnist-ae", seed=3)
    train, _ = problem.parts
    objective = problem.objective()
    optimizer = cl.optimizer(name, objective, lr=0.03, damping=1.0)
    optimizer.warm_start(train.batches(1000, seed=3))
    batches = train.batches(1000, 5, seed=3)
    ratios: list[float] = []
    for step, (x, y) in enumerate(batches):
        loss = optimizer.step(objective.closure(x, y))
        assert bool(torch.isfinite(loss))
        if step % EVERY:
            continue
        for block in optimizer.descent.curvature.blocks.values():  # type: ignore[attr-defined]
            assert isinstance(block, SkqnB)
            if block.Lambda is None:
                continue
            G = block.base[1]
            scale = float(torch.linalg.eigvalsh(G.double())[-1]) + block.gamma * math.sqrt(1.0)
            ratios.append(float(torch.linalg.eigvalsh(block.Lambda)[-1]) / scale)
    x = train.x[:10_000]
    reached = float(objective.closure(x, x).losses().mean())
    with capsys.disabled():
        print(
            f"\n{name}, seed 3: λ_max(Λ̃) at most {max(ratios):.3g} (λ_max(G̃) + γ√λ), {reached:.2f}"
        )
    assert max(ratios) <= 100
    assert reached < 90  # KFAC: 80.6 to 82.1
