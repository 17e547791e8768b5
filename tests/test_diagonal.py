"""Second moments of Adam and RMSprop by hand. (The whole of Adam against `torch.optim.Adam` stands
in test_optim.py.)
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from problems import MODELS, assert_near, batches, problem
from torch import Tensor

import curvlab as cl
from curvlab.algorithms import approximation
from curvlab.curvature.diagonal import SecondMoment
from curvlab.linalg.operators import Diagonal


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.999])
@pytest.mark.parametrize("model", MODELS)
def test_second_moment_is_the_bias_corrected_sum(model: str, decay: float) -> None:
    """v̂_k = Σ_i (1 − β) β^{k−i} g_i² / (1 − βᵏ), H = diag(1 / (√v̂ + ε)): the sum, not the
    recursion.
    """
    p = problem(model)
    objective = p.objective()
    curvature: Any = approximation("adam", objective, damping=1e-3, decay=decay)
    seen: dict[str, list[Tensor]] = {block.name: [] for block in objective.blocks}
    for k, (x, y) in enumerate(batches(p, 5), 1):
        observation = objective.closure(x, y).observe(curvature.needs)
        curvature.update(observation)
        for name, gradient in observation.gradients.items():
            seen[name].append(gradient.flatten())
            powers = decay ** torch.arange(k - 1, -1, -1, dtype=torch.float64)
            v = (
                (1 - decay)
                * (powers[:, None] * torch.stack(seen[name]).square()).sum(0)
                / (1 - decay**k)
            )
            inverse, block = curvature.inverse[name], curvature.blocks[name]
            assert isinstance(inverse, Diagonal)
            assert isinstance(block, SecondMoment)
            assert block.v is not None
            torch.testing.assert_close(block.v, v, rtol=1e-12, atol=0)
            torch.testing.assert_close(inverse.values, 1 / (v.sqrt() + 1e-3), rtol=1e-12, atol=0)


def test_first_direction_is_the_sign_of_the_gradient_without_damping() -> None:
    p = problem("tanh")
    objective = p.objective()
    curvature = approximation("adam", objective, damping=0.0)
    observation = objective.closure(p.x, p.y).observe(curvature.needs)
    curvature.update(observation)
    for name, direction in curvature.precondition(observation.gradients).items():
        torch.testing.assert_close(
            direction, observation.gradients[name].sign(), rtol=1e-14, atol=0
        )


def test_rmsprop_is_that_of_torch_from_the_same_second_moments() -> None:
    """Without momentum. Torch's v starts from the warm start's mean of squares, since its own zero
    is not the thesis's.
    """
    p, q = problem("tanh"), problem("tanh")
    objective = p.objective()
    warm = batches(p, 10)
    ours = cl.optimizer("rmsprop", objective, lr=0.01, damping=1e-3, momentum=0.0)
    ours.warm_start(warm)  # ten minibatches: the next has weight 1/11 < 1 − β
    theirs = torch.optim.RMSprop(q.model.parameters(), lr=0.01, alpha=0.9, eps=1e-3)
    squares = [torch.zeros_like(w) for w in q.model.parameters()]
    for x, y in warm:
        gradients = torch.autograd.grad(
            q.likelihood.loss(q.model(x), y).mean(), list(q.model.parameters())
        )
        squares = [s + g.square() / len(warm) for s, g in zip(squares, gradients, strict=True)]
    for w, v in zip(q.model.parameters(), squares, strict=True):
        theirs.state[w] = {"step": torch.tensor(0.0), "square_avg": v.clone()}
    for x, y in batches(p, 12, seed=40):
        ours.step(objective.closure(x, y))
        theirs.zero_grad()
        q.likelihood.loss(q.model(x), y).mean().backward()
        theirs.step()
        for ours_w, theirs_w in zip(p.model.parameters(), q.model.parameters(), strict=True):
            assert_near(ours_w.detach(), theirs_w.detach())


def test_rmsprop_is_adam_without_bias_correction() -> None:
    """Thesis 2.8.2: m ← β m + (1 − β) g, v ← β v + (1 − β) g² from the warm start, W ← W − α m /
    (√v + ε), nothing divided.
    """
    p, beta = problem("tanh"), 0.9
    objective = p.objective()
    warm = batches(p, 10)
    optimizer = cl.optimizer("rmsprop", objective, lr=0.01, damping=1e-3)
    seen = torch.stack([gradient(objective, *pair) for pair in warm])
    optimizer.warm_start(warm)
    v, m = seen.square().mean(0), torch.zeros_like(seen[0])
    w = objective.layout.flatten({n: t.detach() for n, t in objective.parameters.items()})
    for x, y in batches(p, 8, seed=40):
        g = gradient(objective, x, y)
        m, v = beta * m + (1 - beta) * g, beta * v + (1 - beta) * g.square()
        w = w - 0.01 * m / (v.sqrt() + 1e-3)
        optimizer.step(objective.closure(x, y))
        assert_near(
            objective.layout.flatten({n: t.detach() for n, t in objective.parameters.items()}), w
        )


def gradient(objective: cl.Objective, x: Tensor, y: Tensor) -> Tensor:
    """Of the mean loss, by autograd, in the layout's order."""
    loss = objective.likelihood.loss(objective.model(x), y).mean()
    found = torch.autograd.grad(loss, list(objective.parameters.values()))
    return objective.layout.flatten(dict(zip(objective.parameters, found, strict=True)))
