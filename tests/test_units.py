"""The empirical Fisher matrix per sequence and per token, against gradients of single symbols."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import curvlab as cl
from curvlab.errors import CurvlabError
from curvlab.likelihoods import Bernoulli, Categorical, Gaussian, Heads
from curvlab.sequence_networks import GPT

N, T, C = 4, 5, 7


def made(per: Any = "sequence", ignored: bool = True) -> tuple[cl.Objective, Tensor, Tensor]:
    """A causal transformer with a tied head, and sequences of which some places are ignored."""
    torch.manual_seed(0)
    model = GPT(T, C, layers=1, width=4, heads=2, bias=True).double()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.4)
    x, y = torch.randint(C, (N, T)), torch.randint(C, (N, T))
    if ignored:
        y[0, 3:] = -100
        y[2, 0] = -100
    return cl.Objective(model, Categorical(axis=-1, per=per)), x, y


def gradients_of_symbols(objective: cl.Objective, x: Tensor, y: Tensor) -> Tensor:
    """Gradients of the loss of every counted place, [M, D], by autograd in the layout's order."""
    rows = []
    for n, t in (y >= 0).nonzero().tolist():
        loss = F.cross_entropy(objective.model(x[n : n + 1])[0, t], y[n, t])
        each = torch.autograd.grad(loss, list(objective.parameters.values()))
        named = dict(zip(objective.parameters, each, strict=True))
        rows.append(objective.layout.flatten(named))
    return torch.stack(rows)


def expected(objective: cl.Objective, x: Tensor, y: Tensor) -> Tensor:
    """(1/N) Σ over counted places of g gᵀ; per token (1/M) of it."""
    rows = gradients_of_symbols(objective, x, y)
    count = len(rows) if objective.likelihood.per == "token" else len(x)  # type: ignore[attr-defined]  # Categorical
    return rows.mT @ rows / count


@pytest.mark.parametrize("per", ["sequence", "token"])
def test_every_way_to_the_matrix(per: str) -> None:
    objective, x, y = made(per)
    true = expected(objective, x, y)
    layout = objective.layout
    whole = cl.exact.matrix(objective, x, y, "ef", None, unit="token").dense()
    near: dict[str, Any] = {"rtol": 0, "atol": 1e-12 * float(true.abs().max())}
    torch.testing.assert_close(whole, true, **near)
    for route in ("auto", "rows", "func"):
        found = cl.exact.matrices(objective, x, y, "ef", route=route, unit="token")
        for name, part in layout.slices.items():
            torch.testing.assert_close(found[name].dense(), true[part, part], **near)
    product: Any = cl.exact.product(objective, x, y, "ef", unit="token")
    torch.testing.assert_close(product @ torch.eye(len(layout)).double(), true, **near)
    torch.testing.assert_close(product.diag(), true.diagonal(), **near)
    found_diagonal = cl.exact.diagonal(objective, x, y, "ef", unit="token")
    torch.testing.assert_close(found_diagonal, true.diagonal(), **near)
    block = objective.blocks[-2].name
    part = layout.slices[block]
    terms = cl.exact.kronecker_terms(objective, x, y, "ef", block, unit="token")
    torch.testing.assert_close(terms.dense(), true[part, part], **near)
    halves = [(x[:1], y[:1]), (x[1:], y[1:])]
    streamed = cl.exact.matrix(objective, halves, None, "ef", block, unit="token")
    torch.testing.assert_close(streamed.dense(), true[part, part], **near)


def test_plain_autograd_goes_the_same_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where `torch.func` does not see what autograd sees."""
    from curvlab.exact.torch_func import Function

    objective, x, y = made()
    true = expected(objective, x, y)
    monkeypatch.setattr(Function, "sound", False)
    found = cl.exact.matrix(objective, x, y, "ef", None, route="func", unit="token").dense()
    torch.testing.assert_close(found, true, rtol=0, atol=1e-12)
    product: Any = cl.exact.product(objective, x, y, "ef", unit="token")
    v = torch.randn(len(true), 2).double()
    torch.testing.assert_close(product @ v, true @ v, rtol=0, atol=1e-11)


def test_the_two_differ_by_half_though_fisher_and_ggn_need_no_unit() -> None:
    """As in a tiny causal transformer elsewhere: 52 % apart, in the norm of the sequence's."""
    objective, x, y = made(ignored=False)
    by = {
        unit: cl.exact.matrix(objective, x, y, "ef", None, unit=unit).dense()
        for unit in ("sequence", "token")
    }
    apart = float((by["token"] - by["sequence"]).norm() / by["sequence"].norm())
    assert 0.3 < apart < 0.9, apart
    ggn, fisher = (
        cl.exact.matrix(objective, x, y, kind, None).dense() for kind in ("ggn", "fisher")
    )
    torch.testing.assert_close(ggn, fisher, rtol=0, atol=1e-12)


def test_gradients_of_symbols_add_up_to_those_of_sequences() -> None:
    for per in ("sequence", "token"):
        objective, x, y = made(per)
        each = cl.exact.gradients(objective, x, y, unit="token")
        whole = cl.exact.gradients(objective, x, y)
        for name, rows in each.items():
            assert rows.shape == (N, T, *objective.parameters[name].shape)
            torch.testing.assert_close(rows.sum(1), whole[name], rtol=0, atol=1e-12)
        flat = objective.layout.flatten(each, 2)
        factor: Any = objective.closure(x, y).factor
        rows = gradients_of_symbols(objective, x, y) * factor
        torch.testing.assert_close(flat[y >= 0], rows, rtol=0, atol=1e-12)
        assert not flat[y < 0].any()


def test_one_place_has_one_unit() -> None:
    torch.manual_seed(1)
    for likelihood, y in (
        (Categorical(), torch.randint(3, (6,))),
        (Gaussian(), torch.randn(6, 3).double()),
        (Bernoulli(), torch.rand(6, 3).round().double()),
    ):
        objective = cl.Objective(nn.Linear(4, 3).double(), likelihood)
        x = torch.randn(6, 4).double()
        one, other = (
            cl.exact.matrix(objective, x, y, "ef", "1", unit=unit).dense()
            for unit in ("sequence", "token")
        )
        torch.testing.assert_close(one, other, rtol=0, atol=1e-13)


def test_places_of_heads_are_those_of_every_head() -> None:
    torch.manual_seed(2)

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.symbol, self.sign = nn.Linear(3, C), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"symbol": self.symbol(x), "sign": self.sign(x.mean(1))}

    model = Two().double()
    objective = cl.Objective(model, Heads({"symbol": Categorical(axis=-1), "sign": Bernoulli()}))
    x = torch.randn(N, T, 3).double()
    y = {"symbol": torch.randint(C, (N, T)), "sign": torch.rand(N, 2).round().double()}
    rows = []
    for n in range(N):
        z = model(x[n : n + 1])
        losses = [F.cross_entropy(z["symbol"][0, t], y["symbol"][n, t]) for t in range(T)]
        losses.append(
            F.binary_cross_entropy_with_logits(z["sign"][0], y["sign"][n], reduction="sum")
        )
        for loss in losses:
            each = torch.autograd.grad(
                loss, list(objective.parameters.values()), retain_graph=True, allow_unused=True
            )
            rows.append(
                objective.layout.flatten(
                    {
                        name: torch.zeros_like(p) if d is None else d
                        for (name, p), d in zip(objective.parameters.items(), each, strict=True)
                    }
                )
            )
    true = torch.stack(rows).mT @ torch.stack(rows) / N
    found = cl.exact.matrix(objective, x, y, "ef", None, unit="token").dense()
    torch.testing.assert_close(found, true, rtol=0, atol=1e-12)


def test_what_a_unit_is_not_of_is_refused() -> None:
    objective, x, y = made()
    with pytest.raises(CurvlabError, match="kind 'ef' alone"):
        cl.exact.matrix(objective, x, y, "ggn", unit="token")
    with pytest.raises(CurvlabError, match=r"unknown unit 'word'.*sequence, token"):
        cl.exact.matrix(objective, x, y, "ef", unit="word")  # type: ignore[arg-type]  # wrong on purpose
    flat = cl.Objective(nn.Linear(3, 2).double(), Gaussian())
    x, y = torch.randn(4, 5, 3).double(), torch.randn(4, 5, 2).double()
    with pytest.raises(CurvlabError, match=r"Gaussian does not say .*places"):
        cl.exact.matrix(flat, x, y, "ef", unit="token")


class Mapped(nn.Module):
    """No mixing of places, so that KFAC's factors have closed forms."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(3, 4, bias=False), nn.Linear(4, C, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.first(x)))


def test_kfac_per_token_has_the_derivatives_of_single_symbols() -> None:
    """Equal where places do not mix: a hidden place sees its own symbol alone; else not."""
    torch.manual_seed(3)
    objective = cl.Objective(Mapped().double(), Categorical(axis=-1))
    x, y = torch.randn(N, T, 3).double(), torch.randint(C, (N, T))
    factors = []
    for labels in ("data", "token"):
        kfac: Any = cl.approximation("kfac-ef", objective, labels=labels)
        kfac.update(objective.closure(x, y).observe(kfac.needs | {"gradient"}))
        factors.append([(b.A, b.G) for b in kfac.blocks.values()])
    for one, other in zip(*factors, strict=True):
        for left, right in zip(one, other, strict=True):
            torch.testing.assert_close(left, right, rtol=0, atol=1e-13)
    objective, x, y = made(ignored=False)
    whole: Any = cl.approximation("block-ef", objective, labels="token")
    whole.update(objective.closure(x, y).observe(whole.needs | {"gradient"}))
    for name, block in whole.blocks.items():
        true = cl.exact.matrix(objective, x, y, "ef", name, unit="token").dense()
        torch.testing.assert_close(block.matrix(0.0).dense(), true, rtol=0, atol=1e-12)


@pytest.mark.filterwarnings("ignore:.*follow the gradient:curvlab.errors.CurvlabWarning")
@pytest.mark.parametrize("name", ["kfac-ef", "smw-ng", "hf", "block-ef"])
def test_methods_take_steps_per_token(name: str) -> None:
    objective, x, y = made()
    before = float(objective.closure(x, y).observe({"gradient"}).loss)
    optimizer = cl.optimizer(name, objective, lr=0.01, labels="token", damping=1.0)
    for _ in range(2):
        optimizer.step(objective.closure(x, y))
    assert float(objective.closure(x, y).observe({"gradient"}).loss) < before


def test_a_method_of_mean_gradients_says_that_it_has_none() -> None:
    objective, x, y = made()
    optimizer = cl.optimizer("tnt-ef", objective, lr=0.01, labels="token")
    with pytest.raises(CurvlabError, match="one vector"):
        optimizer.step(objective.closure(x, y))


def test_a_comparison_says_whose_gradients_are_squared() -> None:
    objective, x, y = made()
    directions = []
    for unit in ("sequence", "token"):
        run = cl.compare(
            objective,
            [(x, y)],
            reference="block-ggn",
            algorithms=["block-ef"],
            steps=1,
            unit=unit,
            lr=0.0,
        )
        assert run.dataset.attrs["ef_unit"] == unit
        directions.append(float(run.dataset["cosine"].sel(algorithm="block-ef").mean()))
    assert abs(directions[0] - directions[1]) > 1e-3
    flagged = {
        name for name, a in cl.algorithms.ALGORITHMS.items() if a.labels_per("token") == "token"
    }
    assert flagged == {"block-ef", "kfac-ef", "smw-ng", "smw-ng-bd-ef"}
    with pytest.raises(CurvlabError, match="unknown unit"):
        cl.compare(objective, [(x, y)], steps=1, unit="word")


def test_assumptions_are_taken_per_token() -> None:
    objective, x, y = made()
    block = next(
        b.name for b in objective.blocks if b.layer is not None and b.biased and b.groups == 1
    )
    found = {
        kind: cl.assumptions.errors(objective, x, y, kind=kind, blocks=[block])
        for kind in ("ef", "ef-token")
    }
    assert found["ef-token"].attrs["kind"] == "ef-token"
    assert float(found["ef-token"].total[0]) != float(found["ef"].total[0])
