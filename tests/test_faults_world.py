"""Chance in forward: two looks see one mask, the oracle refuses, a loop draws as by hand, and
looking draws nothing.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from oracle import Net, Reference, apart, numbers, one_line, seeded, tokens
from problems import grad_of
from test_faults import in_order, layers, refusal, right_or_refused
from torch import Tensor, nn
from torch.nn import functional as F

import curvlab as cl
from curvlab.closure import Closure
from curvlab.errors import CurvlabError
from curvlab.likelihoods import Categorical
from curvlab.observation import Observation

pytestmark = pytest.mark.filterwarnings("ignore::curvlab.errors.CurvlabWarning")


def net() -> nn.Sequential:
    with seeded():
        return nn.Sequential(
            nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)
        )


def data(n: int = 6, *shape: int) -> tuple[Tensor, Tensor]:
    return numbers(n, *(shape or (4,))), tokens(n, high=3, seed=2)


def noisy(noise: Callable[[Tensor], Tensor]) -> nn.Module:
    return Net(lambda m, x: m.b(noise(torch.tanh(m.a(x)))), **layers(a=(4, 8), b=(8, 3)))


def with_dropout(layer: nn.Module) -> nn.Module:
    return Net(
        lambda m, x: m.b(torch.tanh(m.drop(m.a(x)))), drop=layer, **layers(a=(4, 8), b=(8, 3))
    )


def over_channels(layer: nn.Module) -> nn.Module:
    return Net(
        lambda m, x: m.b(m.drop(torch.tanh(m.a(x)).view(len(x), 8, 1)).flatten(1)),
        drop=layer,
        **layers(a=(4, 8), b=(8, 3)),
    )


def own_generator() -> nn.Module:
    made = torch.Generator().manual_seed(1)
    return noisy(lambda h: h * torch.bernoulli(torch.full_like(h, 0.5), generator=made))


def own_numpy() -> nn.Module:
    made = np.random.default_rng(1)
    return noisy(lambda h: h * float(made.random()))


def global_numpy(h: Tensor) -> Tensor:
    return h * float(np.random.rand())  # noqa: NPY002


def counting() -> nn.Module:
    """Another scale at every call."""
    calls = iter(range(1, 10**6))
    return noisy(lambda h: h * (1 + 1 / next(calls)))


class Moving(nn.Module):
    """A running scale of its own, which is used and moved by each pass."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 3)
        self.scale: Tensor
        self.register_buffer("scale", torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.a(x)) * self.scale.clone()
        with torch.no_grad():
            self.scale.mul_(0.5).add_(h.abs().mean() + 1, alpha=0.5)
        return self.b(h)


def path(h: Tensor) -> Tensor:
    """Stochastic depth: an example's branch as a whole."""
    return h + torch.tanh(h) * (torch.rand(len(h), 1) < 0.5).to(h) * 2


def transformer() -> nn.Module:
    return Net(
        lambda m, x: m.b(m.layer(m.a(x)[:, None].expand(-1, 2, -1)).mean(1)),
        layer=nn.TransformerEncoderLayer(8, 2, 8, 0.5, batch_first=True),
        **layers(a=(4, 8), b=(8, 3)),
    )


def lstm() -> nn.Module:
    return Net(
        lambda m, x: m.b(m.cells(m.a(x)[:, None].expand(-1, 2, -1))[0].sum(1)),
        cells=nn.LSTM(8, 8, 2, batch_first=True, dropout=0.5),
        **layers(a=(4, 8), b=(8, 3)),
    )


NOISE: dict[str, Callable[[], nn.Module]] = {
    "Dropout": lambda: with_dropout(nn.Dropout(0.5)),
    "AlphaDropout": lambda: with_dropout(nn.AlphaDropout(0.5)),
    "FeatureAlphaDropout": lambda: over_channels(nn.FeatureAlphaDropout(0.5)),
    "Dropout1d": lambda: over_channels(nn.Dropout1d(0.5)),
    "Dropout in place": lambda: with_dropout(nn.Dropout(0.5, inplace=True)),
    "F.dropout": lambda: noisy(lambda h: F.dropout(h, 0.5)),
    "torch.dropout": lambda: noisy(lambda h: torch.dropout(h, 0.5, True)),
    "rrelu": lambda: noisy(lambda h: F.rrelu(h, training=True)),
    "Gumbel": lambda: noisy(lambda h: F.gumbel_softmax(h, dim=1)),
    "noise": lambda: noisy(lambda h: h + torch.randn_like(h)),
    "uniform": lambda: noisy(lambda h: h * h.new_empty(h.shape).uniform_()),
    "permutation": lambda: noisy(lambda h: h * torch.randperm(8).to(h)),
    "stochastic depth": lambda: noisy(path),
    "own generator": own_generator,
    "random": lambda: noisy(lambda h: h * random.random()),
    "numpy's": lambda: noisy(global_numpy),
    "own numpy": own_numpy,
    "LSTM": lstm,
    "attention": transformer,
    "counter": counting,
    "moving buffer": Moving,
}


def noise(name: str) -> nn.Module:
    with seeded(dtype=torch.float64):
        return NOISE[name]()


@contextmanager
def chances() -> Iterator[Callable[[], bool]]:
    """All global generators as they were."""
    of_numpy: Callable[[], Any] = np.random.get_state
    states = torch.get_rng_state(), random.getstate(), of_numpy()
    try:
        yield (
            lambda: (
                torch.equal(torch.get_rng_state(), states[0])
                and random.getstate() == states[1]
                and np.array_equal(of_numpy()[1], states[2][1])
                and of_numpy()[2] == states[2][2]
            )
        )
    finally:
        torch.set_rng_state(states[0])
        random.setstate(states[1])
        np.random.set_state(states[2])  # noqa: NPY002


@pytest.mark.parametrize("name", NOISE)
def test_two_looks_see_one_mask(name: str) -> None:
    """With nothing moved the two gradients are one, or the second look is refused in a line."""
    model, (x, y) = noise(name), data()
    o = cl.Objective(model, Categorical())
    with chances():
        c = o.closure(x, y)
        first = c.observe({"data"}).gradients
        try:
            second = c.observe({"data"}, move_buffers=False).gradients
        except CurvlabError as error:
            one_line(error)
            return
    for block in first:
        assert apart(second[block], first[block]) < 1e-10


@pytest.mark.parametrize("name", [name for name in NOISE if name != "moving buffer"])
def test_the_oracle_refuses_chance(name: str) -> None:
    """The loss is no function of the weights."""
    x, y = data()
    for call in (
        lambda o: cl.exact.matrices(o, x, y, "ggn"),
        lambda o: cl.exact.matrix(o, x, y, "hessian", None),
        lambda o: cl.exact.gradients(o, x, y),
        lambda o: cl.exact.product(o, x, y, "hessian") @ numbers(len(o.layout)),
        lambda o: cl.exact.matrix(o, x, y, "ggn", "1", route="func"),
    ):
        o = cl.Objective(noise(name), Categorical())
        with chances():
            refusal(lambda call=call, o=o: call(o))


TWICE = (
    "k-bfgs",
    "k-bfgs-20",
    "skqn-l",
    "lbfgs",
    "smw-ng-bd",
    "smw-ng",
    "smw-gn",
    "hf",
    "ssn",
    "s4qn",
)


@pytest.mark.parametrize("algorithm", TWICE)
def test_methods_that_look_twice_see_one_mask_or_refuse(algorithm: str) -> None:
    """At learning rate 0 the loss and the gradient of a minibatch are the same before and after."""
    model, (x, y) = noise("Dropout"), data(32)
    o = cl.Objective(model, Categorical())
    kind, seen = type(o.closure(x, y)), list[tuple[int, float, Observation]]()
    true = kind.observe

    def observe(self: Closure, *args: Any, **options: Any) -> Observation:
        found = true(self, *args, **options)
        seen.append((id(self), float(found.loss), found))
        return found

    with pytest.MonkeyPatch.context() as patch, chances():
        patch.setattr(kind, "observe", observe)
        try:
            optimizer = cl.optimizer(algorithm, o, lr=0.0, damping=0.1)
            for _ in range(3):
                optimizer.step(o.closure(x, y))
        except CurvlabError as error:
            one_line(error, without=("damp",))  # that is not the cause
            return
    for closure in {own for own, _, _ in seen}:
        losses = [loss for own, loss, _ in seen if own == closure]
        assert max(losses) - min(losses) < 1e-10
        gradients = [
            found.gradients
            for own, _, found in seen
            if own == closure and {"gradient", "data"} & set(found.passes)
        ]
        for g in gradients[1:]:
            assert all(apart(g[b], gradients[0][b]) < 1e-10 for b in g)


def test_a_buffer_that_moves_is_where_it_is_for_the_oracle() -> None:
    """It runs on copies, so that there is a function of the weights; and moves nothing."""
    model: Any = noise("moving buffer")
    x, y = data()
    o, r = cl.Objective(model, Categorical()), Reference(noise("moving buffer"), x, y)
    with torch.no_grad():
        model.scale.fill_(1)
    wanted = r.gradient
    for _ in range(2):
        right_or_refused(
            lambda: r.joined({n: g.mean(0) for n, g in cl.exact.gradients(o, x, y).items()}, model),
            wanted,
        )
    assert float(model.scale) == 1


@pytest.mark.parametrize(
    "name", ["Dropout", "F.dropout", "stochastic depth", "LSTM", "attention", "random"]
)
def test_first_order_methods_draw_as_a_loop_by_hand(name: str) -> None:
    """The masks of three steps are those of three plain steps from the same state: looking draws
    nothing of its own.
    """
    x, y = data()
    by_hand, by_curvlab = noise(name), noise(name)
    sgd = torch.optim.SGD(by_hand.parameters(), lr=0.1, momentum=0.9)
    with chances():
        torch.manual_seed(5)
        random.seed(5)
        for _ in range(3):
            sgd.zero_grad()
            F.cross_entropy(by_hand(x), y).backward()
            sgd.step()
        o = cl.Objective(by_curvlab, Categorical())
        optimizer = cl.optimizer("sgd-m", o, lr=0.1, momentum=0.9, momentum_kind="add")
        torch.manual_seed(5)
        random.seed(5)
        for _ in range(3):
            optimizer.step(o.closure(x, y))
    for p, q in zip(by_hand.parameters(), by_curvlab.parameters(), strict=True):
        assert apart(q, p) < 1e-10


def test_looking_draws_nothing_and_leaves_everything() -> None:
    """Generators, gradients, modes, hooks, buffers and weights are as they were; also after a
    refusal.
    """
    model, (x, y) = net(), data()
    model[3].eval()
    o = cl.Objective(model, Categorical())
    for p in model.parameters():
        p.grad = torch.full_like(p, 7)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    hooks = (
        len(nn.modules.module._global_forward_hooks),
        len(nn.modules.module._global_forward_pre_hooks),
    )
    with chances() as same:
        for kind in cl.exact.KINDS:
            cl.exact.matrices(o, x, y, kind)
            cl.exact.product(o, x, y, kind) @ numbers(len(o.layout))
        cl.exact.gradients(o, x, y)
        o.check(x, y)
        o.closure(x, y).observe({"data", "model", "exact"})
        refusal(lambda: cl.exact.matrices(o, x[:, :3], y, "ggn"))
        refusal(lambda: cl.exact.matrices(o, x, y + 5, "ggn"))
        assert same()
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert all(bool((grad_of(p) == 7).all()) and p.requires_grad for p in model.parameters())
    assert [m.training for m in model.modules()] == [True, True, True, True, False, True]
    assert hooks == (
        len(nn.modules.module._global_forward_hooks),
        len(nn.modules.module._global_forward_pre_hooks),
    )
    assert not any(
        m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m) for m in model.modules()
    )


def test_a_forward_that_fails_midway_leaves_no_trace() -> None:
    def run(m: Net, x: Tensor) -> Tensor:
        h = torch.tanh(m.a(x))
        if m.fails:
            raise KeyError("of the user")
        return m.b(h)

    with seeded():
        model: Any = Net(run, **layers(a=(4, 4), b=(4, 3)))
    x, y = data()
    o = cl.Objective(model, Categorical())
    for model.fails in (True, False):
        for call in (
            lambda: o.closure(x, y).observe({"data"}),
            lambda: cl.exact.gradients(o, x, y),
            lambda: cl.exact.product(o, x, y, "ggn") @ numbers(len(o.layout)),
        ):
            if model.fails:
                with pytest.raises(KeyError, match="of the user"):
                    call()
            else:
                call()
    r = Reference(model, x, y)
    assert apart(in_order(o, r, o.closure(x, y).observe({"data"}).gradients), r.gradient) < 1e-10
    assert apart(r.joined(cl.exact.gradients(o, x, y), model, 1), r.rows) < 1e-10
