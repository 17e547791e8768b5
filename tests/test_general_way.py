"""The general way at the size of a language model's blocks: what it would cost is said before it is
spent.
"""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn

import curvlab as cl
from curvlab.errors import CurvlabError
from curvlab.exact import Kind, torch_func


class Positions(nn.Module):
    """A position table of GPT-2's size, [1024, 768], which no rule reads: its rows are no
    examples'.
    """

    def __init__(self, places: int = 1024, width: int = 768) -> None:
        super().__init__()
        self.word, self.place, self.head = (
            nn.Embedding(11, width),
            nn.Embedding(places, width),
            nn.Linear(width, 3),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.word(x) + self.place(torch.arange(x.shape[1]))).mean(1))


def data(size: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(11, (size, 4), generator=generator), torch.randint(
        3, (size,), generator=generator
    )


def large() -> cl.Objective:
    torch.manual_seed(0)
    return cl.Objective(Positions(), cl.likelihoods.Categorical())


@pytest.mark.parametrize("kind", ["ggn", "hessian", "ef"])
def test_a_dense_block_that_cannot_fit_is_refused_with_its_size_before_any_pass(kind: Kind) -> None:
    objective = large()
    with pytest.raises(
        CurvlabError,
        match=(
            r"the dense \w+ of block 2 \(place.weight\) would need \d+\.\d GB"
            r" .*curvlab.exact.product"
        ),
    ):
        cl.exact.matrices(objective, *data(), kind=kind, blocks="2")
    assert not objective.forms


def test_the_remedy_that_it_names_works() -> None:
    """`product`, against double backward."""
    objective = large()
    x, y = data()
    v = torch.randn(1024 * 768, generator=torch.Generator().manual_seed(1))
    found = cl.exact.product(objective, x, y, "hessian", "2") @ v
    weight = objective.parameters["place.weight"]
    loss = objective.likelihood.loss(objective.model(x), y).mean()
    (slope,) = torch.autograd.grad(loss, weight, create_graph=True)
    (true,) = torch.autograd.grad(slope, weight, v.view(768, 1024).T)
    torch.testing.assert_close(found.view(768, 1024).T, true, rtol=1e-4, atol=1e-8)


def test_a_long_way_says_how_long_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here everything is long: the time of the first part, times the parts."""
    monkeypatch.setattr(torch_func, "_LONG", 0.0)
    torch.manual_seed(0)
    objective = cl.Objective(Positions(6, 5).double(), cl.likelihoods.Categorical())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", cl.CurvlabWarning)
        cl.exact.matrix(objective, *data(), "hessian", "2")
    said = [str(w.message) for w in caught if "will take about" in str(w.message)]
    assert len(said) == 1
    assert "30 products with the hessian of block 2 (place.weight)" in said[0]
