"""Heads with means of their own: per token in one and per example in another, each its N/M."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, jacrev

import curvlab as cl
from curvlab.errors import CurvlabError
from curvlab.likelihoods import Bernoulli, Categorical, Gaussian, Heads, Tokens
from curvlab.likelihoods.base import mean_per

N, T, C = 5, 4, 3


class Model(nn.Module):
    """Symbols, parts of speech and a sign over one layer that mixes places."""

    def __init__(self) -> None:
        super().__init__()
        self.under = nn.Linear(3, 3)
        self.symbol, self.part, self.sign = nn.Linear(3, C), nn.Linear(3, 2), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h = torch.tanh(self.under(x).cumsum(1))
        return {"symbol": self.symbol(h), "part": self.part(h), "sign": self.sign(h.mean(1))}


def made() -> tuple[cl.Objective, Tensor, dict[str, Tensor]]:
    torch.manual_seed(0)
    heads = Heads(
        {
            "symbol": Tokens(axis=-1),
            "part": Categorical(axis=-1, per="token", weight=[1.0, 3.0]),
            "sign": Bernoulli(),
        }
    )
    x = torch.randn(N, T, 3).double()
    y = {
        "symbol": torch.randint(C, (N, T)),
        "part": torch.randint(2, (N, T)),
        "sign": torch.rand(N, 2).round().double(),
    }
    y["symbol"][0, 1:] = -100
    y["part"][3] = -100
    return cl.Objective(Model().double(), heads), x, y


def mean(out: dict[str, Tensor], y: dict[str, Tensor]) -> Tensor:
    """Torch's own means, added."""
    weight = torch.tensor([1.0, 3.0]).double()
    return (
        F.cross_entropy(out["symbol"].flatten(0, 1), y["symbol"].flatten())
        + F.cross_entropy(out["part"].flatten(0, 1), y["part"].flatten(), weight)
        + F.binary_cross_entropy_with_logits(out["sign"], y["sign"], reduction="sum") / N
    )


def outputs_of(objective: cl.Objective, x: Tensor) -> tuple[Any, Tensor]:
    """The outputs side by side as a function of the parameters, and where these are."""
    layout, model = objective.layout, objective.model
    at = layout.flatten({name: p.detach() for name, p in objective.parameters.items()})
    return lambda w: functional_call(model, layout.unflatten(w), (x,)), at


def near(found: Tensor, true: Tensor) -> None:
    torch.testing.assert_close(found, true, rtol=0, atol=1e-12 * max(1.0, float(true.abs().max())))


@pytest.mark.parametrize("route", ["auto", "func"])
def test_gradient_hessian_and_ggn_are_those_of_torchs_means(route: str) -> None:
    objective, x, y = made()
    f, at = outputs_of(objective, x)
    near(objective.closure(x, y)().detach(), mean(f(at), y))
    observed = objective.closure(x, y).observe({"gradient", "data"})
    near(observed.loss, mean(f(at), y))
    gradients = observed.gradients
    found = torch.cat([gradients[b.name].flatten() for b in objective.blocks])
    near(found, grad(lambda w: mean(f(w), y))(at))
    H = cl.exact.matrix(objective, x, y, "hessian", None, route=route).dense()
    near(H, hessian(lambda w: mean(f(w), y))(at))
    names = list(f(at))

    def flat(w: Tensor) -> Tensor:
        return torch.cat([f(w)[name].flatten() for name in names])

    shapes = {name: t.shape for name, t in f(at).items()}

    def of_outputs(z: Tensor) -> Tensor:
        parts = torch.split(z, [s.numel() for s in shapes.values()])
        return mean({n: p.view(s) for (n, s), p in zip(shapes.items(), parts, strict=True)}, y)

    J = jacrev(flat)(at)
    ggn = J.mT @ hessian(of_outputs)(flat(at)) @ J
    near(cl.exact.matrix(objective, x, y, "ggn", None, route=route).dense(), ggn)
    pi = cl.exact.matrix(objective, x, y, "pi", None, route=route).dense()
    near(H - pi, ggn)
    product: Any = cl.exact.product(objective, x, y, "ggn")
    near(product @ torch.eye(len(at)).double(), ggn)
    near(cl.exact.diagonal(objective, x, y, "ggn"), ggn.diagonal())
    with pytest.raises(CurvlabError, match="class weights"):
        cl.exact.matrix(objective, x, y, "fisher", None)


def unweighted() -> tuple[cl.Objective, Tensor, dict[str, Tensor]]:
    objective, x, y = made()
    heads = Heads({"symbol": Tokens(axis=-1), "part": Tokens(axis=-1), "sign": Bernoulli()})
    return cl.Objective(objective.model, heads), x, y


@pytest.mark.parametrize("route", ["auto", "func"])
def test_fisher_is_the_ggn_and_drawn_labels_estimate_it(route: str) -> None:
    objective, x, y = unweighted()
    ggn = cl.exact.matrix(objective, x, y, "ggn", None, route=route).dense()
    near(cl.exact.matrix(objective, x, y, "fisher", None, route=route).dense(), ggn)
    drawn = cl.exact.matrix(objective, x, y, "fisher-mc", None, route=route, draws=1500).dense()
    assert float((drawn - ggn).norm() / ggn.norm()) < 0.12
    # labels that are drawn are ignored where the data's are
    closure = objective.closure(x, y)
    labels: Any = closure.labels(closure.forward()[0].detach())[0]
    assert torch.equal(labels["symbol"] == -100, y["symbol"] == -100)
    assert torch.equal(labels["part"] == -100, y["part"] == -100)


@pytest.mark.parametrize("unit", ["sequence", "token"])
@pytest.mark.parametrize("route", ["auto", "func"])
def test_empirical_fisher_of_sequences_and_of_places(unit: Any, route: str) -> None:
    objective, x, y = unweighted()
    params = list(objective.parameters.values())
    factors = {k: N / int((y[k] >= 0).sum()) for k in ("symbol", "part")} | {"sign": 1.0}

    def row(loss: Tensor) -> Tensor:
        each = torch.autograd.grad(loss, params, retain_graph=True, allow_unused=True)
        named = {
            name: torch.zeros_like(p) if d is None else d
            for (name, p), d in zip(objective.parameters.items(), each, strict=True)
        }
        return objective.layout.flatten(named)

    rows = []
    for n in range(N):
        z = objective.model(x[n : n + 1])
        places = [
            (factors[k], F.cross_entropy(z[k][0, t], y[k][n, t]))
            for k in ("symbol", "part")
            for t in range(T)
            if y[k][n, t] >= 0
        ]
        places.append(
            (1.0, F.binary_cross_entropy_with_logits(z["sign"][0], y["sign"][n], reduction="sum"))
        )
        if unit == "token":
            rows += [math.sqrt(factor) * row(loss) for factor, loss in places]
        else:
            rows.append(row(torch.stack([factor * loss for factor, loss in places]).sum()))
    true = torch.stack(rows).mT @ torch.stack(rows) / N
    near(cl.exact.matrix(objective, x, y, "ef", None, route=route, unit=unit).dense(), true)
    each = cl.exact.gradients(objective, x, y, unit="token")
    whole = cl.exact.gradients(objective, x, y)
    for name, g in each.items():
        near(g.sum(1), whole[name])


def test_every_head_has_its_count_over_all_minibatches() -> None:
    objective, x, y = made()
    whole = cl.exact.matrix(objective, x, y, "ggn", None).dense()
    parts = [(x[s], {k: t[s] for k, t in y.items()}) for s in (slice(0, 2), slice(2, N))]
    near(cl.exact.matrix(objective, parts, None, "ggn", None).dense(), whole)
    f, at = outputs_of(objective, x)
    from curvlab.training.evaluation import evaluate

    assert evaluate(objective, parts)[0] == pytest.approx(float(mean(f(at), y)), rel=1e-13)


def test_what_a_log_calls_the_mean() -> None:
    assert mean_per(made()[0].likelihood) == "symbol: token, part: token, sign: sequence"
    assert mean_per(Heads({"a": Gaussian(), "b": Bernoulli()})) == "sequence"
    assert mean_per(Heads({"a": Tokens(), "b": Tokens()})) == "token"


def test_a_head_without_a_counted_place_is_one_line() -> None:
    objective, x, y = made()
    y["part"].fill_(-100)
    with pytest.raises(CurvlabError, match=r"head 'part': no place of the 5 examples") as caught:
        objective.closure(x, y)()
    assert "\n" not in str(caught.value)


@pytest.mark.filterwarnings("ignore:.*follow the gradient:curvlab.errors.CurvlabWarning")
@pytest.mark.parametrize("name", ["kfac", "hf", "smw-gn", "kfac-ef"])
def test_methods_take_steps(name: str) -> None:
    objective, x, y = unweighted()
    optimizer = cl.optimizer(name, objective, lr=0.02, damping=1.0)
    losses: Iterator[float] = (float(optimizer.step(objective.closure(x, y))) for _ in range(3))
    first, *_, last = losses
    assert last < first
    state = optimizer.state_dict()
    optimizer.load_state_dict(state)
