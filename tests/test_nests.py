"""Minibatches of several tensors: the same numbers as from one tensor that holds them all."""

from __future__ import annotations

import collections
import dataclasses
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import curvlab as cl
from curvlab.errors import CurvlabError
from curvlab.exact.batches import KINDS
from curvlab.interface import Interface
from curvlab.nests import Nest, call_arguments

N, P, Q, C = 6, 4, 3, 3


class Two(nn.Module):
    """A model of two inputs, by place or by keyword, whose outputs lie in a field."""

    def __init__(self, wrap: Any = lambda z: {"logits": z, "hidden": 1}) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(P, 5), nn.Linear(Q, 5), nn.Linear(5, C)
        self.wrap = wrap

    def forward(self, ids: Tensor, extra: Tensor, scale: float = 1.0) -> Any:
        return self.wrap(scale * self.c(torch.tanh(self.a(ids) + self.b(extra))))


class One(nn.Module):
    """The same with its inputs side by side."""

    def __init__(self, two: Two) -> None:
        super().__init__()
        self.two = two

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.two(x[:, :P], x[:, P:])["logits"]
        return found


@dataclasses.dataclass
class Inputs:
    ids: Tensor
    extra: Tensor
    scale: float = 1.0


class Pair(NamedTuple):
    ids: Tensor
    extra: Tensor


class FromOne(nn.Module):
    """Takes a structure as its one argument."""

    def __init__(self, two: Two) -> None:
        super().__init__()
        self.two = two

    def forward(self, given: Any) -> Any:
        return self.two(given.ids, given.extra)


def problem(**options: Any) -> SimpleNamespace:
    torch.manual_seed(0)
    two = Two().double()
    ids, extra = torch.randn(N, P).double(), torch.randn(N, Q).double()
    y = torch.randint(C, (N,))
    law = cl.likelihoods.Categorical()
    return SimpleNamespace(
        two=two,
        ids=ids,
        extra=extra,
        y=y,
        objective=cl.Objective(two, law, **options),
        flat=cl.Objective(One(two), law),
        x={"ids": ids, "extra": extra},
        batch={"ids": ids, "extra": extra, "labels": y},
        whole=torch.cat([ids, extra], 1),
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("block", [None, "1", "3"])
def test_every_kind_is_that_of_one_tensor(kind: str, block: str | None) -> None:
    p = problem()
    found = cl.exact.matrix(p.objective, p.x, p.y, kind, block).dense()  # type: ignore[arg-type]
    # labels are drawn by the number of the call: the first of each
    wanted = cl.exact.matrix(p.flat, p.whole, p.y, kind, block).dense()  # type: ignore[arg-type]
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("route", ["rows", "func"])
def test_every_route(route: str) -> None:
    p = problem()
    for kind in ("ggn", "ef"):
        found = cl.exact.matrix(p.objective, p.batch, None, kind, "1", route=route).dense()
        wanted = cl.exact.matrix(p.flat, p.whole, p.y, kind, "1").dense()
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-15)


def test_products_gradients_and_jacobians() -> None:
    p = problem()
    v = torch.randn(sum(b.numel for b in p.flat.blocks)).double()
    for kind in ("hessian", "ggn"):
        found = cl.exact.product(p.objective, p.batch, None, kind) @ v
        wanted = cl.exact.product(p.flat, p.whole, p.y, kind) @ v
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-15)
    rows, flat = cl.exact.gradients(p.objective, p.x, p.y), cl.exact.gradients(p.flat, p.whole, p.y)
    for name, g in rows.items():
        torch.testing.assert_close(g, flat[f"two.{name}"], rtol=1e-12, atol=1e-15)
    js, flat = cl.exact.jacobians(p.objective, p.x), cl.exact.jacobians(p.flat, p.whole)
    for name, j in js.items():
        torch.testing.assert_close(j, flat[f"two.{name}"], rtol=1e-12, atol=1e-15)


class Recurrent(nn.Module):
    """Of an LSTM there is no rule for `vmap`: its examples go one by one."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(2, 2, batch_first=True), nn.Linear(2, C)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        h = self.lstm(x)[0] * mask[..., None]
        found: Tensor = self.head(h.sum(1))
        return found


@pytest.mark.parametrize("kind", ["ggn", "ef", "fisher-mc", "hessian"])
@pytest.mark.filterwarnings("ignore::curvlab.errors.CurvlabWarning")
def test_examples_one_by_one(kind: Any) -> None:
    torch.manual_seed(0)
    model, x, y = Recurrent().double(), torch.randn(N, 4, 2).double(), torch.randint(C, (N,))
    mask = (torch.arange(4) < torch.tensor([[4], [2], [3], [1], [4], [2]])).double()
    law = cl.likelihoods.Categorical()
    one = cl.Objective(model, law, seed=0)
    found = cl.exact.matrices(one, {"x": x, "mask": mask, "labels": y}, None, kind)

    class Joined(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.own = model

        def forward(self, both: Tensor) -> Tensor:
            joined: Tensor = self.own(both[..., :2], both[..., 2])
            return joined

    other = cl.Objective(Joined(), law, seed=0)
    flat = torch.cat([x, mask[..., None]], 2)
    wanted = cl.exact.matrices(other, flat, y, kind)
    for name, matrix in found.items():
        torch.testing.assert_close(matrix.dense(), wanted[name].dense(), rtol=1e-12, atol=1e-15)


def test_ways_to_give_a_minibatch() -> None:
    """A mapping with or without its labels, a tuple, a list, a named tuple, a dataclass."""
    p = problem()
    wanted = p.flat.closure(p.whole, p.y).observe({"data", "gradient"})
    inner = cl.Objective(FromOne(p.two), p.objective.likelihood)
    last = cl.Objective(p.two, p.objective.likelihood, labels=-1)
    for closure in (
        p.objective.closure(p.x, p.y),
        p.objective.closure(p.batch),
        p.objective.closure(collections.OrderedDict(p.batch)),
        p.objective.closure(collections.UserDict(p.batch)),
        p.objective.closure((p.ids, p.extra), p.y),
        p.objective.closure([p.ids, p.extra], p.y),
        p.objective.closure(((p.ids, p.extra), p.y)),
        p.objective.closure({**p.x, "scale": 1.0}, p.y),
        inner.closure(Inputs(p.ids, p.extra), p.y),
        inner.closure(Pair(p.ids, p.extra), p.y),
        last.closure((p.ids, p.extra, p.y)),
    ):
        seen = closure.observe({"data", "gradient"})
        torch.testing.assert_close(seen.loss, wanted.loss, rtol=1e-13, atol=0)
        for g, w in zip(seen.gradients.values(), wanted.gradients.values(), strict=True):
            torch.testing.assert_close(g, w, rtol=1e-12, atol=1e-15)


def test_ways_to_pick_the_outputs() -> None:
    p = problem()
    law, wanted = p.objective.likelihood, float(p.flat.closure(p.whole, p.y).observe().loss)

    @dataclasses.dataclass
    class Out:
        scores: Tensor

    for wrap, outputs in (
        (lambda z: z, "logits"),
        (lambda z: {"scores": z}, "scores"),
        (lambda z: Out(z), "scores"),
        (lambda z: (1, z), lambda out: out[1]),
        (lambda z: z.view(len(z), 1, C), lambda out: out[:, 0]),
        (lambda z: Pair(z, z), "extra"),
    ):
        p.two.wrap = wrap
        objective = cl.Objective(p.two, law, outputs=outputs)
        seen = objective.closure(p.x, p.y).observe()
        assert float(seen.loss) == pytest.approx(wanted, rel=1e-13)
        matrix = cl.exact.matrix(objective, p.x, p.y, "ggn", "1", route="func").dense()
        again = cl.exact.matrix(objective, p.x, p.y, "ggn", "1").dense()
        torch.testing.assert_close(matrix, again, rtol=1e-12, atol=1e-15)


class Shifted(nn.Module):
    """Adds a table that has as many rows as there are examples, but is not theirs."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(P, C)

    def forward(self, x: Tensor, table: Tensor) -> Tensor:
        found: Tensor = self.net(x) + table.sum(0)
        return found


def test_what_is_not_the_examples_is_named() -> None:
    torch.manual_seed(0)
    model, x = Shifted().double(), torch.randn(N, P).double()
    table, y = torch.randn(N, C).double(), torch.randint(C, (N,))
    law = cl.likelihoods.Categorical()
    objective = cl.Objective(model, law, shared=["table"])
    found = cl.exact.matrix(objective, {"x": x, "table": table}, y, "ggn", None).dense()
    bias = table.sum(0)

    def loss(w: Tensor) -> Tensor:
        W, b = w[: P * C].view(C, P), w[P * C :]
        return nn.functional.cross_entropy(x @ W.mT + b + bias, y)

    weights = torch.cat([model.net.weight.flatten(), model.net.bias]).detach()
    hessian: Any = torch.func.hessian(loss)(weights)  # of a linear model: its GGN
    order = [o * P + i if i < P else P * C + o for o in range(C) for i in range(P + 1)]
    torch.testing.assert_close(found, hessian[order][:, order], rtol=1e-12, atol=1e-14)
    with pytest.raises(CurvlabError, match="no tensor 'tables'"):
        cl.Objective(model, law, shared=["tables"]).closure({"x": x, "table": table}, y)


@pytest.mark.parametrize("name", ["sgd-m", "kfac", "k-bfgs", "tnt", "hf", "s4qn", "smw-ng"])
def test_optimizers_step_as_on_one_tensor(name: str) -> None:
    p, q = problem(), problem()
    one, other = (
        cl.optimizer(name, p.objective, lr=0.01),
        cl.optimizer(name, q.flat, lr=0.01),
    )
    for _ in range(3):
        one.step(p.objective.closure(p.batch))
        other.step(q.flat.closure(q.whole, q.y))
    for v, w in zip(p.two.parameters(), q.two.parameters(), strict=True):
        torch.testing.assert_close(v, w, rtol=1e-9, atol=1e-12)


def test_loaders_training_and_comparison(tmp_path: Path) -> None:
    """A DataLoader of mappings, with its own collate function, goes through all commands."""
    p = problem()
    rows = [{name: t[i] for name, t in p.batch.items()} for i in range(N)]
    loader: DataLoader[Any] = DataLoader(rows, batch_size=2)  # type: ignore[arg-type]
    found = cl.exact.matrix(p.objective, loader, None, "fisher", "3").dense()
    wanted = cl.exact.matrix(p.objective, p.batch, None, "fisher", "3").dense()
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-15)
    dataset = cl.spectrum(p.objective, p.batch, blocks="3", progress=False)
    again = cl.spectrum(p.objective, loader, blocks="3", progress=False)
    np.testing.assert_allclose(
        dataset["eigenvalue"].values, again["eigenvalue"].values, rtol=1e-10, atol=1e-14
    )
    run = cl.compare(p.objective, loader, algorithms=["kfac"], lr=0.01, progress=False)
    assert run.dataset.sizes["step"] == 3
    q = problem()
    flat = [(q.whole[i : i + 2], q.y[i : i + 2]) for i in range(0, N, 2)]
    trained = cl.train(
        p.objective, loader, algorithm="k-bfgs", epochs=2, validation=p.batch, folder=tmp_path
    )
    p2 = problem()
    again2: Any = [{name: t[i] for name, t in p2.batch.items()} for i in range(N)]
    loader2: DataLoader[Any] = DataLoader(again2, 2)
    one = cl.train(p2.objective, loader2, algorithm="kfac", epochs=2, progress=False)
    two = cl.train(q.flat, flat, algorithm="kfac", epochs=2, progress=False)
    np.testing.assert_allclose(one.dataset["train_loss"], two.dataset["train_loss"], rtol=1e-9)
    assert np.isfinite(trained.dataset["val_loss"]).all()


def test_a_loader_that_changes_is_noticed() -> None:
    p = problem()

    class Restless:
        def __iter__(self) -> Any:
            yield {**p.batch, "ids": torch.randn(N, P).double()}

    def twice() -> None:
        ggn = cl.exact.product(p.objective, Restless(), None, "ggn")
        v = torch.ones(ggn.shape[0]).double()
        _ = ggn @ v, ggn @ v

    with pytest.raises(CurvlabError, match="other data than at the first pass"):
        twice()


def test_three_tensors_of_a_dataset() -> None:
    p = problem(labels=-1)
    loader = DataLoader(TensorDataset(p.ids, p.extra, p.y), batch_size=3)
    found = cl.exact.matrix(p.objective, loader, None, "ggn", "1").dense()
    wanted = cl.exact.matrix(p.flat, p.whole, p.y, "ggn", "1").dense()
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda p: p.objective.closure(p.x), "no key 'labels' for its labels (keys: 'ids', 'ext"),
        (
            lambda p: p.objective.closure({"ids": p.ids, "extra": p.extra[:3]}, p.y),
            "differ in their number of examples ('ids' 6, 'extra' 3)",
        ),
        (lambda p: p.objective.closure((p.ids, p.extra, p.y)), "say which are the labels by lab"),
        (lambda p: p.objective.closure({"ids": p.ids}, p.y).observe(), "missing 1 required pos"),
        (lambda p: p.objective.closure({"n": 3}, p.y), "holds no tensor with the examples as fir"),
        (lambda p: p.objective.closure("text"), "must be a pair (x, y), or a mapping with the key"),
        (
            lambda p: p.objective.closure({**p.x, "ids": p.ids * torch.nan}, p.y),
            "'ids' of the minibatch contains NaN or Inf",
        ),
        (
            lambda p: (
                cl.Objective(p.two, p.objective.likelihood, outputs="foo")
                .closure(p.batch)
                .observe()
            ),
            "returned a dict, not one tensor (fields: 'logits', 'hidden'): pick one by outputs=",
        ),
        (
            lambda p: (
                cl.Objective(p.two, p.objective.likelihood, outputs=lambda out: "z")
                .closure(p.batch)
                .observe()
            ),
            "of which outputs= picked a str, not one tensor",
        ),
        (lambda p: p.objective.closure(p.x, p.y[:2]), "has 6 inputs but 2 targets"),
    ],
)
def test_bad_input_is_one_line(call: Any, told: str) -> None:
    with pytest.raises(CurvlabError, match=re.escape(told)) as error:
        call(problem())
    assert "\n" not in str(error.value)


def test_a_nest_stands_where_a_tensor_would() -> None:
    x = Nest({"a": torch.arange(6).view(3, 2), "n": None, "t": torch.eye(4)}, shared=["t"])
    assert len(x) == 3
    assert x[1:]["a"].tolist() == [[2, 3], [4, 5]]
    assert len(x[torch.tensor([2, 0])]) == 2
    assert x.tree["n"] is None
    assert hash(x.shape) == hash(Nest(x.tree, shared=["t"]).shape)
    rows = torch.func.vmap(lambda part: part["a"].sum() + part["t"].sum())(x)
    assert rows.tolist() == [5, 9, 13]
    assert call_arguments(Nest((torch.ones(2), torch.zeros(2))))[0][1].tolist() == [0, 0]
    with pytest.raises(TypeError):
        list(x)


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("outputs", "", "outputs must be the name of a field, or a function of the outputs"),
        ("outputs", 3, "outputs must be the name of a field, or a function of the outputs, not 3"),
        ("labels", "", "labels must be a key, or a position, not ''"),
        ("labels", True, "labels must be a key, or a position, not True"),
        ("mask", "", "mask must be the name of a tensor in the inputs, or a function"),
        ("mask", 1, "mask must be the name of a tensor in the inputs, or a function"),
        ("shared", "table", "shared must be a list of names, not 'table'"),
        ("shared", ["table", ""], "shared must be a list of names, not of ''"),
    ],
)
def test_what_cannot_be_a_part_of_an_interface_is_said(field: str, value: Any, said: str) -> None:
    with pytest.raises(CurvlabError, match=f"^{re.escape(said)}"):
        Interface(**{field: value})


def test_what_can_be_a_part_of_an_interface_is_taken() -> None:
    kept = Interface(labels=-1, outputs=len, shared=("table",), mask=len)
    assert kept.labels == -1
    assert Interface(labels="y", outputs="logits", mask="attention_mask").mask == "attention_mask"
