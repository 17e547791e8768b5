"""Second moments of Adam and RMSprop by hand. (The whole of Adam against `torch.optim.Adam` stands
in test_optim.py.)
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from problems import MODELS, assert_near, batches, normal, problem
from torch import Tensor, nn

import curvlab as cl
from curvlab.algorithms import approximation
from curvlab.curvature.block_diagonal import BlockDiagonal
from curvlab.curvature.diagonal import SecondMoment
from curvlab.linalg.operators import Diagonal
from curvlab.statistics import LayerStatistics


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


# ---- the L2 term of the objective


def dead() -> nn.Module:
    """The first unit's gradients are exactly zero: the L2 term alone moves it."""
    torch.manual_seed(0)
    first = nn.Linear(4, 3)
    with torch.no_grad():
        first.bias[0] = -50.0
    return nn.Sequential(first, nn.ReLU(), nn.Linear(3, 2)).double()


L2 = 0.01


def steps_of(name: str, optimizer: Any, count: int, **options: Any) -> tuple[nn.Module, nn.Module]:
    """The model after steps of ours at an objective with L2, and of torch's with weight decay."""
    ours, theirs = dead(), dead()
    objective = cl.Objective(ours, cl.likelihoods.Categorical(), l2=L2)
    mine, torchs = cl.optimizer(name, objective, **options), optimizer(theirs.parameters())
    for seed in range(count):
        x = normal(6, 4, seed=seed)
        y = torch.arange(6) % 2
        mine.step(objective.closure(x, y))
        torchs.zero_grad()
        nn.functional.cross_entropy(theirs(x), y).backward()
        torchs.step()
    return ours, theirs


@pytest.mark.parametrize("eps", [1e-3, 1e-8])
def test_adam_squares_the_gradient_of_the_objective(eps: float) -> None:
    """Kingma and Ba's g is of f, its L2 term included: torch's with weight decay 2μ. The bias of
    −50, whose gradient is the term's alone, moves by the learning rate and not to +200.
    """
    ours, theirs = steps_of(
        "adam",
        lambda p: torch.optim.Adam(p, lr=1e-2, eps=eps, weight_decay=2 * L2),
        10,
        lr=1e-2,
        damping=eps,
        decay=0.999,
    )
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert_near(mine, other, 1e-12)
    assert -50.0 < float(dict(ours.named_parameters())["0.bias"][0]) < -49.8


def test_rmsprops_v_is_of_the_objective_too() -> None:
    """By hand, from a warm start of two minibatches; a second moment by the mean, then 0.9."""
    net = dead()
    objective = cl.Objective(net, cl.likelihoods.Categorical(), l2=L2)
    curvature = approximation("rmsprop", objective, damping=1e-3)
    assert isinstance(curvature, BlockDiagonal)
    data = [(normal(6, 4, seed=seed), torch.arange(6) % 2) for seed in range(3)]
    squares = []
    for i, (x, y) in enumerate(data):
        observation = objective.closure(x, y).observe()
        plain = torch.autograd.grad(nn.functional.cross_entropy(net(x), y), list(net.parameters()))
        whole = [g + 2 * L2 * p.detach() for g, p in zip(plain, net.parameters(), strict=True)]
        squares.append(torch.cat([whole[0], whole[1][:, None]], 1).square().flatten())
        if i < 2:
            curvature.absorb(observation)
        else:
            curvature.update(observation)
    first = curvature.blocks["1"]
    assert isinstance(first, SecondMoment)
    assert first.v is not None
    mean = (squares[0] + squares[1]) / 2
    weight = curvature.averaging.weight(3)
    assert_near(first.v, mean if curvature.updates == 2 else torch.lerp(mean, squares[2], weight))


@pytest.mark.parametrize("name", ["muon", "soap", "kl-shampoo", "asgo", "adamw"])
def test_methods_of_the_mean_gradient_see_a_loss_with_its_term(name: str) -> None:
    """With μ‖θ‖² in the objective as with the same term in a likelihood's own loss: the direction
    is that at gradients that have it.
    """
    net = dead()
    x, y = normal(6, 4), torch.arange(6) % 2
    objective = cl.Objective(net, cl.likelihoods.Categorical(), l2=L2)
    found = cl.optimizer(name, objective, lr=1.0, weight_decay=0.0, damping=1e-3)
    found.step(objective.closure(x, y))
    other = dead()
    plain = cl.Objective(other, cl.likelihoods.Categorical())
    observation = plain.closure(x, y).observe({"gradient"})
    moved = {
        block.name: LayerStatistics(
            block,
            6,
            observation.passes["gradient"][block.name].gradient
            + 2 * L2 * block.gather({n: p.detach() for n, p in plain.parameters.items()}),
        )
        for block in plain.blocks
    }
    with_term = replace(observation, passes={"gradient": moved, "data": moved})
    direct = cl.optimizer(name, plain, lr=1.0, weight_decay=0.0, damping=1e-3)
    p = direct.descent.direction(with_term, decay=0.0)
    for block in plain.blocks:
        for param, value in block.scatter(p[block.name]).items():
            after = dict(net.named_parameters())[param]
            assert_near(dict(other.named_parameters())[param] - value, after, 1e-12)
