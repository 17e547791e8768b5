"""block-ggn where no block is formed: conjugate gradients on products, beside the dense blocks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from problems import assert_near, batches, problem
from torch import Tensor

import curvlab as cl
from curvlab.curvature import large
from curvlab.curvature.block_products import BlockProducts
from curvlab.layers import Block
from curvlab.training.descent_contents import check_descent

DAMPING = 0.05


@pytest.fixture(autouse=True)
def all_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(large, "_DENSE", 0)


def made(objective: cl.Objective, **options: Any) -> cl.Optimizer:
    with pytest.warns(cl.CurvlabWarning, match="block-ggn forms no dense matrix: block"):
        return cl.optimizer("block-ggn", objective, damping=DAMPING, **options)


def solved(objective: cl.Objective, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """By the dense matrices of the oracle: {block: (G + λI)⁻¹}."""
    found = cl.exact.matrices(objective, x, y, kind="ggn")
    return {
        name: torch.linalg.inv(G.dense() + DAMPING * torch.eye(len(G), dtype=torch.float64))
        for name, G in found.items()
    }


@pytest.mark.parametrize("model", ["tanh", "conv", "groups", "embedding", "tokens"])
def test_directions_are_those_of_the_dense_blocks(model: str) -> None:
    """Of the minibatch alone, at the weights that it was seen at, whatever T₁ is."""
    p = problem(model)
    objective = p.objective()
    curvature = made(objective, update_every=2, refresh_every=1).descent.curvature
    assert isinstance(curvature, BlockProducts)
    assert not curvature.needs
    inverse: dict[str, Tensor] = {}
    for k, (x, y) in enumerate(batches(p, 4)):
        if k in (0, 1, 3):  # steps 1, 2 and 4 are updates
            inverse = solved(objective, x, y)
        observation = objective.closure(x, y).observe({"gradient"})
        curvature.update(observation)
        found = curvature.precondition(observation.gradients)
        for name, g in observation.gradients.items():
            assert_near(found[name].flatten(), inverse[name] @ g.flatten(), 1e-8)
        with torch.no_grad():
            for w in objective.model.parameters():
                w.add_(0.1 * torch.randn(w.shape, generator=torch.Generator().manual_seed(k)))


def test_of_tied_tokens() -> None:
    """A block with several uses, at many places: the embedding that is the head."""
    torch.manual_seed(0)
    objective = cl.Objective(
        cl.sequence_networks.GPT(5, 7, layers=1, width=4, heads=2, bias=True).double(),
        cl.likelihoods.Tokens(),
    )
    x = torch.randint(7, (3, 5), generator=torch.Generator().manual_seed(1))
    optimizer = made(objective)
    inverse = solved(objective, x, x)
    observation = objective.closure(x, x).observe({"gradient"})
    optimizer.descent.curvature.update(observation)
    for name, d in optimizer.descent.curvature.precondition(observation.gradients).items():
        assert_near(d.flatten(), inverse[name] @ observation.gradients[name].flatten(), 1e-8)


def test_a_saved_state_goes_on_to_the_bit() -> None:
    """Between updates too: the minibatch of the products is in it."""
    p = problem("tanh")
    every = [made(p.objective(), lr=0.1, update_every=4) for _ in range(2)]
    one, other = every
    shown = batches(p, 9)
    for k, (x, y) in enumerate(shown):
        if k == 5:
            states = one.descent.state_dict(), other.descent.state_dict()
            check_descent(*states, one.objective.blocks, new=True)
            other.load_state_dict(one.state_dict())
            other.objective.model.load_state_dict(one.objective.model.state_dict())
        for optimizer in [one] if k < 5 else every:
            optimizer.step(optimizer.objective.closure(x, y))
    for a, b in zip(
        one.objective.model.parameters(), other.objective.model.parameters(), strict=True
    ):
        assert torch.equal(a, b)


def test_it_is_chosen_by_size_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(large, "_DENSE", 1 << 30)

    def block(*shape: int) -> Block:
        return Block("1", ("w",), shape, None)

    assert large.too_large([block(100, 115), block(9)], 4) is None
    found = large.too_large([block(100, 116), block(9)], 4)
    assert found is not None
    assert found.shape == (100, 116)
    assert large.too_large([block(100, 100)], 8) is not None
    p = problem("tanh")
    assert not isinstance(cl.optimizer("block-ggn", p.objective()).descent.curvature, BlockProducts)
    assert not isinstance(cl.optimizer("block-ef", p.objective()).descent.curvature, BlockProducts)


def test_it_is_a_reference() -> None:
    p = problem("tanh")
    with pytest.warns(cl.CurvlabWarning, match="forms no dense matrix"):
        run = cl.compare(
            p.objective(),
            batches(p, 3),
            reference="block-ggn",
            algorithms=["kfac", "sgd-m"],
            steps=3,
            progress=False,
        )
    assert bool((run.dataset.cosine.sel(algorithm="kfac") > 0).all())
    assert not bool(run.dataset.cosine.isnull().any())


def test_without_data_there_is_no_inverse() -> None:
    curvature = made(problem("tanh").objective()).descent.curvature
    for what in (lambda: curvature.inverse, curvature.refresh, lambda: curvature.matrices()):
        with pytest.raises(cl.CurvlabError):
            what()
