"""Minibatches of one step, looked at as one: each draws what the loop's own call of it drew."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from problems import normal
from ranks import by_ranks
from test_watch import loss_of, minibatches
from test_watch_processes import loop, watched
from torch import Tensor, nn

import curvlab as cl
from curvlab.draws_by_part import DrawsByPart
from curvlab.errors import CurvlabError, CurvlabWarning
from curvlab.nests import Nest, joined
from curvlab.system import random_state

CPU = torch.device("cpu")


class Noisy(nn.Module):
    """A network that draws in one of many ways."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.a, self.c = nn.Linear(6, 8).double(), nn.Linear(8, 3).double()
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.a(x))
        match self.kind:
            case "dropout":
                h = nn.functional.dropout(h, 0.3)
            case "two":
                h = nn.functional.alpha_dropout(nn.functional.dropout(h, 0.2), 0.1)
            case "feature dropout":
                h = nn.functional.dropout1d(h[..., None], 0.3)[..., 0]
            case "normal":
                h = h + 0.3 * torch.randn_like(h)
            case "made":
                h = h * torch.rand(h.shape, dtype=h.dtype)
            case "each example":  # stochastic depth
                h = h * torch.bernoulli(torch.full((len(h), 1), 0.6, dtype=h.dtype))
            case "integers":
                h = h + 0.1 * torch.randint(0, 5, h.shape)
            case "rrelu":
                h = nn.functional.rrelu(h, training=True)
            case "permuted":  # which is no draw of an example's
                h = h[:, torch.randperm(8)]
        out: Tensor = self.c(h)
        return out


KINDS = ["dropout", "two", "feature dropout", "normal", "made", "each example", "integers", "rrelu"]


def accumulated(model: nn.Module, seen: Any, optimizer: torch.optim.Optimizer) -> Any:
    with seen:
        for i, (x, y) in enumerate(seen(minibatches(6))):
            (loss_of(model, x, y) / 2).backward()
            if i % 2:
                optimizer.step()
                optimizer.zero_grad()
    return seen.dataset


def in_parts(model: nn.Module, seen: Any, optimizer: torch.optim.Optimizer) -> Any:
    with seen:
        for x, y in seen(minibatches(3)):
            for part, labels in zip(x.split(5), y.split(5), strict=True):
                (loss_of(model, part, labels) * (len(part) / len(x))).backward()
            optimizer.step()
            optimizer.zero_grad()
    return seen.dataset


@pytest.mark.parametrize("go", [accumulated, in_parts])
@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_of_the_look_is_the_loops(kind: str, go: Callable[..., Any]) -> None:
    """Of a second look at it too (K-BFGS, quadratic models), and what is drawn differs."""
    model = Noisy(kind)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    torch.manual_seed(1)
    found = go(model, watched(model, optimizer, algorithms=("sgd-m", "k-bfgs")), optimizer)
    assert found["minibatches"].values.tolist() == [2 if go is accumulated else 1] * 3
    np.testing.assert_allclose(found["optimizer_gradient_cosine"], 1, atol=1e-12)
    np.testing.assert_allclose(found["cosine"].sel(algorithm="sgd-m"), 1, atol=1e-9)


def test_what_is_not_drawn_for_each_example_is_said() -> None:
    model = Noisy("permuted")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.warns(CurvlabWarning, match="has other random numbers than in each alone"):
        found = accumulated(model, watched(model, optimizer), optimizer)
    assert float(found["optimizer_gradient_cosine"].min()) < 0.99


def with_dropout() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Dropout(0.3), nn.Linear(8, 3)).double()


@pytest.mark.parametrize("add_up", [1, 2])
def test_of_several_processes_too(add_up: int) -> None:
    """Of unequal numbers of examples the mean over ranks is another than that over all."""

    def work() -> Any:
        return loop(with_dropout, partial(watched, algorithms=("kfac",)), add_up)

    for found in by_ranks(2, work):
        cosine = found["log"]["optimizer_gradient_cosine"].values
        assert cosine.min() > 0.995
        assert not any("looked at as one" in line for line in found["said"])


def test_each_part_goes_on_from_its_own_state() -> None:
    torch.manual_seed(0)
    before, alone = [], []
    for size in (3, 4):
        before.append((size, random_state.states(CPU)))
        alone.append((torch.rand(size, 2), torch.randn(size), torch.empty(size).bernoulli_(0.5)))
    drawn = DrawsByPart(before, CPU)
    with drawn:
        found = torch.rand(7, 2), torch.randn(7), torch.empty(7).bernoulli_(0.5)
    for one, parts in zip(found, zip(*alone, strict=True), strict=True):
        assert torch.equal(one, torch.cat(parts))
    assert not drawn.missed
    with drawn:
        torch.randperm(7)
    assert drawn.missed


# ---- sequences that each minibatch brought to its own length


class Masked(nn.Module):
    """The mean of an embedding over places that are not padding, and classes of it by place."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.e, self.c = nn.Embedding(7, 4).double(), nn.Linear(4, 3).double()

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        h = self.e(input_ids)
        if attention_mask is not None:
            m = attention_mask[..., None].to(h)
            h = h + (h * m).sum(1, keepdim=True) / m.sum(1, keepdim=True)
        out: Tensor = self.c(torch.tanh(h))
        return out


def sequences(places: int, masked: bool = True) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(places)
    ids = torch.randint(7, (4, places), generator=generator)
    mask = torch.ones(4, places, dtype=torch.long)
    mask[0, -1] = 0
    labels = torch.randint(3, (4, places), generator=generator).masked_fill(mask == 0, -100)
    found = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    return found if masked else {key: found[key] for key in ("input_ids", "labels")}


def watched_sequences(masked: bool) -> Any:
    model = Masked()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    likelihood = cl.likelihoods.Categorical(axis=-1, per="token")
    with cl.watch(model, likelihood, optimizer, algorithms=["sgd-m"]) as seen:
        for batches in ([3, 5], [6, 2]):
            data = [sequences(places, masked) for places in batches]
            valid = sum(int((batch["labels"] >= 0).sum()) for batch in data)
            optimizer.zero_grad()
            for batch in data:
                seen.see(batch)
                inputs = {key: t for key, t in batch.items() if key != "labels"}
                z, y = model(**inputs), batch["labels"]
                (nn.functional.cross_entropy(z.mT, y, reduction="sum") / valid).backward()
            optimizer.step()
    return seen.dataset


def test_minibatches_of_other_lengths_are_padded_where_a_mask_says_what_is_padding() -> None:
    found = watched_sequences(masked=True)
    assert found["minibatches"].values.tolist() == [2, 2]
    np.testing.assert_allclose(found["optimizer_gradient_cosine"], 1, atol=1e-12)
    with pytest.raises(CurvlabError, match=r"cannot be joined.*bring them to one length, or give"):
        watched_sequences(masked=False)


def test_joined_with_and_without_filling() -> None:
    one, other = torch.ones(2, 3, 1), torch.ones(1, 2, 4)
    found: Any = joined([one, other], 7)
    assert found.shape == (3, 3, 4)
    assert torch.equal(found[:2, :, :1], one)
    assert torch.equal(found[2:, :2], other)
    assert float(found.sum()) == 6 + 8 + 7 * (36 - 14)
    nests: Any = [
        Nest({"a": torch.ones(2, 3), "b": normal(2)}),
        Nest({"a": torch.ones(1, 5), "b": normal(1)}),
    ]
    whole: Any = joined(nests, 0)
    assert whole["a"].sum(1).tolist() == [3, 3, 5]
    for fill, pair in ((None, [one, other]), (0, [one, other[..., 0]])):
        with pytest.raises(CurvlabError, match="cannot be joined"):
            joined(pair, fill)


# ---- who is called


def test_a_model_that_was_compiled_before_is_heard() -> None:
    """The loop prefetches, so that only the model's call says which minibatch a step is of."""
    model = with_dropout()
    compiled: Any = torch.compile(model, backend="eager")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    seen = watched(model, optimizer)
    with seen:
        ahead = iter(seen(minibatches(4)))
        following = next(ahead)
        while following is not None:
            (x, y), following = following, next(ahead, None)
            optimizer.zero_grad()
            loss_of(compiled, x, y).backward()
            optimizer.step()
    np.testing.assert_allclose(seen.dataset["optimizer_gradient_cosine"], 1, atol=1e-12)
    assert not compiled._forward_pre_hooks


def test_a_call_that_is_heard_twice_is_one_minibatch() -> None:
    """In a trainer, whose calls are the minibatches; of gradients that add up each is one."""
    model = with_dropout()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    data = minibatches(4)
    labels = {id(x): y for x, y in data}
    seen = watched(model, optimizer, take=lambda call: (call["input"], labels[id(call["input"])]))
    seen.calls = True
    with seen:
        hook = model.register_forward_pre_hook(seen._before_forward, with_kwargs=True)
        for i, (x, y) in enumerate(data):
            (nn.functional.cross_entropy(model(input=x), y) / 2).backward()
            if i % 2:
                optimizer.step()
                optimizer.zero_grad()
        hook.remove()
    assert seen.dataset["minibatches"].values.tolist() == [2, 2]
    np.testing.assert_allclose(seen.dataset["optimizer_gradient_cosine"], 1, atol=1e-12)


@pytest.mark.parametrize(
    ("take", "line"),
    [
        (lambda batch: batch["x"], r"take= must return \(inputs, targets\).*TypeError"),
        (lambda batch: batch[0], r"take= must return \(inputs, targets\).*ValueError"),
        (cl.integrations.next_symbols, "called without labels.*label smoothing"),
    ],
)
def test_a_take_that_fails_is_one_line(take: Any, line: str) -> None:
    model = with_dropout()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with (
        pytest.raises(CurvlabError, match=line) as told,
        watched(model, optimizer, take=take) as seen,
    ):
        seen.see({"input_ids": 1} if take is cl.integrations.next_symbols else minibatches(1)[0])
    assert "\n" not in str(told.value)
