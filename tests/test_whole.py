"""What methods of the whole vector share."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from problems import MODELS, Problem, WithNorm, assert_near, problem
from torch import Tensor, nn

import curvlab as cl
from curvlab.curvature.settings import Cadence
from curvlab.curvature.whole_vector import applied, flat, loss_at, part, subset, unflat, unflat_like
from curvlab.linalg.operators import Diagonal
from curvlab.objective import Objective


def gradients(objective: Objective, p: Problem) -> dict[str, Tensor]:
    return objective.closure(p.x, p.y).observe().gradients


@pytest.mark.parametrize("model", MODELS)
def test_one_vector_by_block_or_by_parameter(model: str) -> None:
    p = problem(model)
    objective = p.objective()
    layout, by_block = objective.layout, gradients(p.objective(), p)
    by_parameter = {
        name: t for b in objective.blocks for name, t in b.scatter(by_block[b.name]).items()
    }
    vector = flat(layout, by_block)
    assert torch.equal(vector, layout.flatten(by_parameter))
    assert torch.equal(vector, flat(layout, by_parameter))
    for tensors in (by_block, by_parameter, dict(reversed(by_parameter.items()))):
        found = unflat_like(layout, vector, tensors)
        assert list(found) == list(tensors)
        assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    assert all(torch.equal(t, by_block[name]) for name, t in unflat(layout, vector).items())
    scale = torch.arange(1.0, len(layout) + 1, dtype=torch.float64)
    assert torch.equal(flat(layout, applied(layout, Diagonal(scale), by_parameter)), scale * vector)


def test_what_does_not_fit_is_said() -> None:
    p = problem()
    objective = p.objective()
    layout, by_block = objective.layout, gradients(objective, p)
    for wrong, message in (
        ({}, "gradient of block 1 .* is missing"),
        ({"1": by_block["1"]}, "gradient of block 2 .* is missing"),
        (by_block | {"4": by_block["1"]}, "unknown block or parameter '4'"),
        (
            by_block | {"2": by_block["1"]},
            r"block 2 .* has shape \[4, 5\], but its gradient \[4, 6\]",
        ),
        ({"0.weight": by_block["1"][:, :-1]}, "gradient of block 1 .* is missing"),
    ):
        with pytest.raises(cl.CurvlabError, match=message):
            flat(layout, wrong)


def test_a_subset_depends_on_the_closure_alone() -> None:
    p = problem(n=30)
    objective = p.objective(seed=1)
    found = [subset(objective.closure(p.x, p.y), 8) for _ in range(40)]
    for chosen in found:
        assert len(set(chosen.tolist())) == 8
        assert bool((chosen.diff() > 0).all())
        assert 0 <= int(chosen.min()) <= int(chosen.max()) < 30
    assert len({tuple(c.tolist()) for c in found}) == 40
    share = torch.zeros(30).scatter_add_(0, torch.cat(found), torch.ones(320)) / 40
    assert float(share.min()) > 0
    assert float((share - 8 / 30).abs().max()) < 0.3  # 4 standard deviations of a fair draw
    again = p.objective(seed=1)
    assert all(torch.equal(subset(again.closure(p.x, p.y), 8), c) for c in found)
    assert not torch.equal(subset(p.objective(seed=2).closure(p.x, p.y), 8), found[0])
    assert subset(objective.closure(p.x, p.y), 99).tolist() == list(range(30))


def test_part_of_a_minibatch() -> None:
    p = problem(n=9)
    objective = p.objective()
    closure = objective.closure(p.x, p.y)
    some = part(closure, torch.tensor([1, 4, 5]))
    assert (some.number, some.stream, some.part) == (closure.number, closure.stream, closure.part)
    expected = objective.closure(p.x[[1, 4, 5]], p.y[[1, 4, 5]]).observe()
    found = some.observe()
    assert torch.equal(found.loss, expected.loss)
    whole = closure.observe().passes["data"]["2"].part(torch.tensor([1, 4, 5]))
    assert_near(whole.gradient, expected.gradients["2"])
    assert_near(whole.rows, expected.passes["data"]["2"].rows)


@pytest.mark.parametrize("model", ["tanh", "norm", "embedding", "conv-norm"])
def test_loss_elsewhere_moves_nothing(model: str) -> None:
    p = problem(model)
    objective = p.objective()
    closure = objective.closure(p.x, p.y)
    step = unflat(
        objective.layout,
        torch.randn(len(objective.layout), generator=torch.Generator().manual_seed(3)).double(),
    )
    before = {n: t.clone() for n, t in p.model.state_dict().items()}
    found = loss_at(closure, step)
    assert not found.requires_grad
    assert all(torch.equal(t, before[n]) for n, t in p.model.state_dict().items())
    with torch.no_grad():
        for block in objective.blocks:
            for name, d in block.scatter(step[block.name]).items():
                p.model.get_parameter(name).add_(d)
    assert_near(found, closure.observe(move_buffers=False).loss)


def test_loss_elsewhere_moves_no_statistics_of_batch_norm() -> None:
    net: Any = WithNorm(nn.BatchNorm1d).double().train()
    p = problem("batch-norm")
    objective = cl.Objective(net, p.likelihood)
    before = net.norm.running_mean.clone()
    zero = {b.name: torch.zeros(b.shape, dtype=torch.float64) for b in objective.blocks}
    closure = objective.closure(p.x, p.y)
    found = loss_at(closure, zero)
    assert torch.equal(net.norm.running_mean, before)
    assert_near(found, closure.observe().loss)
    assert not torch.equal(net.norm.running_mean, before)


def test_schedule() -> None:
    """T₁ = 2, T₂ = 3: the first step always; each of the first T₂ steps refreshes."""
    schedule = Cadence(update_every=2, refresh_every=3)
    assert [k for k in range(1, 10) if schedule.updates(k)] == [1, 2, 4, 6, 8]
    assert [k for k in range(1, 10) if schedule.refreshes(k)] == [1, 2, 3, 6, 9]
    with pytest.raises(cl.CurvlabError, match="refresh_every must be 1 or more, not 0"):
        Cadence(refresh_every=0)
