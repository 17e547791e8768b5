"""Models that write over their inputs, and losses that write over what they are given."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from problems import normal
from torch import Tensor, nn

import curvlab as cl
from curvlab.algorithms import ALGORITHMS
from curvlab.datasets import Dataset
from curvlab.errors import CurvlabError

pytestmark = pytest.mark.filterwarnings("ignore::curvlab.errors.CurvlabWarning")

WAYS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "normalised": (lambda x: x.sub_(1.0).mul_(0.5), lambda x: (x - 1.0) * 0.5),
    "relu": (nn.ReLU(inplace=True), torch.relu),
    "part": (lambda x: (x[:, :1].zero_(), x)[1], lambda x: x * torch.tensor([0.0, 1.0, 1.0])),
    "view": (lambda x: x.view(-1).abs_().view_as(x), torch.abs),
}
"""{how: (written over the input, the same number without)}."""


class Net(nn.Module):
    """Two layers behind what is done to the inputs; `only` in the training mode, or the other."""

    def __init__(self, first: Callable[[Tensor], Tensor], only: bool | None = None) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.a, self.b = nn.Linear(3, 4).double(), nn.Linear(4, 2).double()
        self.first, self.only = first, only

    def forward(self, x: Tensor) -> Tensor:
        if self.only is None or self.only is self.training:
            x = self.first(x)
        return self.b(torch.tanh(self.a(x)))


def data() -> tuple[Tensor, Tensor]:
    return normal(12, 3, seed=1), torch.arange(12).remainder(2)


def objective(first: Callable[[Tensor], Tensor], only: bool | None = None) -> cl.Objective:
    return cl.Objective(Net(first, only), cl.likelihoods.Categorical())


def ends(o: cl.Objective) -> Tensor:
    return torch.cat([p.detach().flatten() for p in o.parameters.values()])


@pytest.mark.parametrize("name", sorted(ALGORITHMS))
def test_every_method_steps_as_on_a_model_that_does_not(name: str) -> None:
    found = []
    for first in WAYS["normalised"]:
        o = objective(first)
        optimizer = cl.optimizer(name, o, lr=1e-3, update_every=2, refresh_every=2)
        for seed in range(4):
            x, y = normal(12, 3, seed=seed), data()[1]
            kept = x.clone()
            optimizer.step(o.closure(x, y))
            assert torch.equal(x, kept)
        found.append(ends(o))
    assert torch.equal(*found)


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("kind", ["ggn", "hessian", "ef", "fisher-mc", "fisher"])
def test_exact_matrices_and_products(how: str, kind: Any) -> None:
    x, y = data()
    one, other = (objective(first) for first in WAYS[how])
    found = cl.exact.matrices(one, x, y, kind)
    wanted = cl.exact.matrices(other, x, y, kind)
    for block in wanted:
        torch.testing.assert_close(
            found[block].dense(), wanted[block].dense(), rtol=1e-12, atol=1e-14
        )
    if kind != "fisher-mc":
        v = normal(len(one.layout), seed=3)
        products = [cl.exact.product(o, x, y, kind) for o in (one, other)]
        for _ in range(2):
            torch.testing.assert_close(products[0] @ v, products[1] @ v, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(x, data()[0], rtol=0, atol=0)


@pytest.mark.parametrize("only", [None, True, False])
@pytest.mark.parametrize("name", ["sgd-m", "kfac", "k-bfgs"])
def test_a_data_set_stays_what_it_is_through_training(name: str, only: bool | None) -> None:
    """An evaluation goes through the data set itself, which is not normalised again each time."""
    found = []
    for first in WAYS["normalised"]:
        x, y = data()
        inputs = x.repeat(4, 1)
        examples = Dataset("mine", inputs, y.repeat(4), "mine")
        run = cl.train(
            objective(first, only),
            examples.batches(12, seed=0),
            examples,
            algorithm=name,
            epochs=3,
            lr=0.1,
            progress=False,
        )
        found.append(run.dataset["train_loss"].values)
        assert torch.equal(inputs, data()[0].repeat(4, 1))
    np.testing.assert_array_equal(found[0], found[1])


class Two(Net):
    """Of two inputs by keyword, one of which is added to the other."""

    def __init__(self, writes: bool) -> None:
        super().__init__(torch.abs)
        self.writes = writes

    def forward(self, x: Tensor, shift: Tensor) -> Tensor:  # type: ignore[override]  # two inputs
        return super().forward(x.add_(shift) if self.writes else x + shift)


def test_several_inputs() -> None:
    found = []
    for writes in (True, False):
        x, y = data()
        o = cl.Objective(Two(writes), cl.likelihoods.Categorical())
        optimizer = cl.optimizer("k-bfgs", o, lr=0.1)
        for _ in range(3):
            optimizer.step(o.closure({"x": x, "shift": 0.1 * data()[0]}, y))
        assert torch.equal(x, data()[0])
        found.append(ends(o))
    assert torch.equal(*found)


def test_one_that_begins_to_write_later_is_refused_once_and_then_right() -> None:
    net, x, y = Net(torch.abs), *data()
    o = cl.Objective(net, cl.likelihoods.Categorical())
    optimizer = cl.optimizer("sgd-m", o, lr=0.1)
    optimizer.step(o.closure(x, y))
    net.first = lambda x: x.abs_()
    with pytest.raises(CurvlabError, match=r"wrote over its inputs.*x = x\.clone\(\)$"):
        optimizer.step(o.closure(x.clone(), y))
    optimizer.step(o.closure(x, y))
    assert torch.equal(x, data()[0])


class Rude(cl.likelihoods.Gaussian):
    what = "y"

    def loss(self, z: Tensor, y: Any) -> Tensor:
        (y if self.what == "y" else z).mul_(0.9)
        return 0.5 * (z - y).square().sum(1)


@pytest.mark.parametrize(("what", "told"), [("y", "targets"), ("z", "outputs")])
def test_a_loss_that_writes_over_what_it_is_given_is_one_line(what: str, told: str) -> None:
    likelihood = Rude()
    vars(likelihood)["what"] = what
    y = normal(12, 2, seed=5)
    o = cl.Objective(Net(torch.abs), likelihood)
    with pytest.raises(CurvlabError, match=rf"^the loss of Rude writes over its {told}: write"):
        cl.optimizer("kfac", o, lr=0.1).step(o.closure(data()[0], y))
    assert torch.equal(y, normal(12, 2, seed=5))
