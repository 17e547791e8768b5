"""Weights that places share: KFAC-expand and -reduce where each is exact, embeddings' factors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import curvlab as cl
from curvlab.linalg.operators import Diagonal, Kronecker

N, T, D, H, C = 5, 4, 3, 4, 2


class Deep(nn.Module):
    """A deep linear net on T places, which it leaves apart or pools before the loss."""

    def __init__(self, pooled: bool) -> None:
        super().__init__()
        self.pooled = pooled
        self.first, self.second = nn.Linear(D, H), nn.Linear(H, C)

    def forward(self, x: Tensor) -> Tensor:
        z: Tensor = self.second(self.first(x))
        return z.mean(1) if self.pooled else z


def factors(sharing: str, pooled: bool, **options: Any) -> tuple[Any, Any, Tensor, Tensor]:
    torch.manual_seed(0)
    model = Deep(pooled).double()
    objective = cl.Objective(model, cl.likelihoods.Gaussian())
    x = torch.randn(N, T, D).double()
    y = torch.randn(N, C).double() if pooled else torch.randn(N, T, C).double()
    kfac: Any = cl.approximation("kflr", objective, sharing=sharing, **options)
    kfac.update(objective.closure(x, y).observe(kfac.needs))
    return objective, kfac, x, y


@pytest.mark.parametrize("block", ["1", "2"])
@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_each_is_exact_in_its_own_linear_setting_and_not_in_the_others(
    sharing: str, pooled: bool, block: str
) -> None:
    """Eschenhagen et al. 2023; kfac-tutorial's deep linear regressions."""
    objective, kfac, x, y = factors(sharing, pooled)
    exact = cl.exact.matrix(objective, x, y, "ggn", block).dense()
    found = kfac.blocks[block].matrix().dense()
    apart = float((found - exact).norm() / exact.norm())
    assert apart < 1e-12 if pooled == (sharing == "reduce") else apart > 0.2


def test_one_place_is_the_flat_model() -> None:
    torch.manual_seed(0)
    model = Deep(False).double()
    x, y = torch.randn(N, 1, D).double(), torch.randn(N, 1, C).double()
    found = []
    for sharing, inputs, targets in (
        ("expand", x, y),
        ("reduce", x, y),
        ("expand", x[:, 0], y[:, 0]),
        ("reduce", x[:, 0], y[:, 0]),
    ):
        objective = cl.Objective(model, cl.likelihoods.Gaussian())
        kfac: Any = cl.approximation("kfac-ef", objective, sharing=sharing)
        kfac.update(objective.closure(inputs, targets).observe(kfac.needs))
        found.append([kfac.blocks[b].matrix(0.1).dense() for b in ("1", "2")])
    for each in found[1:]:
        for one, other in zip(found[0], each, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-13, atol=0)


def test_an_unknown_sharing_is_one_line() -> None:
    objective = cl.Objective(nn.Linear(2, 2), cl.likelihoods.Gaussian())
    with pytest.raises(cl.CurvlabError, match=r"unknown sharing 'both' \(known: expand, reduce\)"):
        cl.approximation("kfac", objective, sharing="both")


class Words(nn.Module):
    def __init__(self, symbols: int, tied: bool = False) -> None:
        super().__init__()
        self.word, self.mix = nn.Embedding(symbols, H), nn.Linear(H, H)
        self.head = None if tied else nn.Linear(H, C)

    def forward(self, ids: Tensor) -> Tensor:
        h = torch.tanh(self.mix(self.word(ids)))
        if self.head is None:
            return nn.functional.linear(h.mean(1), self.word.weight)
        return self.head(h.mean(1))


def words(symbols: int, ids: Tensor, tied: bool = False) -> tuple[cl.Objective, Any, Tensor]:
    torch.manual_seed(0)
    model = Words(symbols, tied).double()
    objective = cl.Objective(model, cl.likelihoods.Categorical())
    y = torch.arange(len(ids)) % C
    kfac: Any = cl.approximation("kfac-ef", objective, damping=0.1)
    kfac.update(objective.closure(ids, y).observe(kfac.needs | {"gradient"}))
    return objective, kfac, y


def test_an_embeddings_inputs_have_a_diagonal_second_moment() -> None:
    """diag(counts) / N, of rows with a one that are never formed; the same matrix and inverse."""
    ids = torch.tensor([[0, 1, 1], [2, 0, 0], [5, 5, 1]])
    _, kfac, _ = words(7, ids)
    counts = torch.bincount(ids.flatten(), minlength=7).double() / len(ids)
    torch.testing.assert_close(kfac.blocks["1"].A, counts, rtol=1e-14, atol=0)
    hot = torch.nn.functional.one_hot(ids, 7).double().flatten(0, 1)
    G, inverse = kfac.blocks["1"].G, kfac.inverse["1"]
    dense = Kronecker((G, hot.mT @ hot / len(ids))).dense()
    torch.testing.assert_close(kfac.blocks["1"].matrix().dense(), dense, rtol=1e-13, atol=1e-15)
    assert isinstance(inverse.factors[1], Diagonal)
    whole = kfac.blocks["1"].matrix(0.1).dense()
    eye = torch.eye(len(whole)).double()
    torch.testing.assert_close(inverse.dense() @ whole, eye, rtol=0, atol=1e-12)


def test_padding_counts_nothing() -> None:
    ids = torch.tensor([[0, 1, 2], [2, 1, 1]])
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(4, H, padding_idx=1), nn.Flatten(), nn.Linear(3 * H, C))
    objective = cl.Objective(model.double(), cl.likelihoods.Categorical())
    kfac: Any = cl.approximation("kfac-ef", objective)
    kfac.update(objective.closure(ids, torch.tensor([0, 1])).observe(kfac.needs))
    assert kfac.blocks["1"].A.tolist() == [0.5, 0, 1, 0]


def test_relabelling_the_vocabulary_relabels_the_factors() -> None:
    """Also in a larger table, most of which never occurs."""
    torch.manual_seed(1)
    ids = torch.randint(5, (6, 3))
    order = torch.randperm(50)[:5]
    small, a, y = words(5, ids)
    large, _, _ = words(50, order[ids])
    with torch.no_grad():
        for name, p in small.parameters.items():
            large.parameters[name].data = (
                p.clone() if "word" not in name else large.parameters[name].index_copy(0, order, p)
            )
    b: Any = cl.approximation("kfac-ef", large, damping=0.1)
    b.update(large.closure(order[ids], y).observe(b.needs | {"gradient"}))
    torch.testing.assert_close(a.blocks["1"].A, b.blocks["1"].A[order], rtol=1e-14, atol=0)
    assert float(b.blocks["1"].A.sum()) == pytest.approx(float(a.blocks["1"].A.sum()), rel=1e-14)
    torch.testing.assert_close(a.blocks["1"].G, b.blocks["1"].G, rtol=1e-12, atol=1e-15)


def test_a_tied_tables_factor_is_of_the_union_of_its_places() -> None:
    """A = diag(counts) + Σ p pᵀ, of the table read, and of the head."""
    ids = torch.tensor([[0, 1, 1], [2, 0, 0]])
    objective, kfac, y = words(4, ids, tied=True)
    z = objective.model(ids)
    p = torch.autograd.grad(nn.functional.cross_entropy(z, y, reduction="sum"), z)[0]
    counts = torch.diag(torch.bincount(ids.flatten(), minlength=4).double())
    wanted = (counts + p.mT @ p) / len(ids)
    torch.testing.assert_close(kfac.blocks["1"].A, wanted, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("name", ["kfac", "kfac-ef", "kflr"])
def test_a_state_with_a_diagonal_goes_on_bit_for_bit(name: str) -> None:
    ids, y = torch.tensor([[0, 1, 1], [2, 0, 0]]), torch.tensor([0, 1])

    def run(resume: bool) -> list[Tensor]:
        torch.manual_seed(0)
        objective = cl.Objective(Words(4).double(), cl.likelihoods.Categorical())
        optimizer = cl.optimizer(name, objective, lr=0.1, damping=0.1)
        for step in range(4):
            if step == 2 and resume:
                state, model = optimizer.state_dict(), objective.model.state_dict()
                objective = cl.Objective(Words(4).double(), cl.likelihoods.Categorical())
                objective.model.load_state_dict(model)
                optimizer = cl.optimizer(name, objective, lr=0.1, damping=0.1)
                optimizer.load_state_dict(state)
            optimizer.step(objective.closure(ids, y))
        return [p.detach().clone() for p in objective.model.parameters()]

    for one, other in zip(run(False), run(True), strict=True):
        assert torch.equal(one, other)


def test_no_damping_on_a_symbol_that_never_occurs_is_said() -> None:
    ids = torch.tensor([[0, 1, 1], [2, 0, 0]])
    _, kfac, _ = words(7, ids)
    with pytest.warns(cl.CurvlabWarning, match="is not positive definite with damping 0: raised"):
        kfac.blocks["1"].refresh(0.0)
    assert torch.isfinite(kfac.blocks["1"].inverse.diag()).all()
