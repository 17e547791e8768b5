"""What a check at the first look cannot see, and what transforms of functions do not go through."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracle import (
    Case,
    Loss,
    Net,
    Reference,
    apart,
    cross_entropy,
    numbers,
    one_line,
    seeded,
    tokens,
    weight,
)
from test_faults import STEPPERS, WHAT, ask, entries, in_order, layers, refusal
from test_faults_uses import Weighs
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import curvlab as cl
from curvlab.errors import CurvlabError
from curvlab.likelihoods import Categorical, Gaussian

pytestmark = pytest.mark.filterwarnings(
    "ignore::curvlab.errors.CurvlabWarning", "ignore:.*torch.jit"
)

FUNC = frozenset(
    {"func *", "product *", "matri*", "rows", "jacobians", "diagonal *", "report", "hf"}
)
"""What may refuse in a line where `vmap` and `jvp` do not go through."""


def two() -> dict[str, nn.Module]:
    return layers(a=(4, 4), b=(4, 3))


def small(m: Net, x: Tensor) -> Tensor:
    """A second use that no function tells of, and that changes next to nothing."""
    return m.b(torch.tanh(m.a(x) + 1e-5 * Weighs.apply(x, m.a.weight)))


def scripted() -> nn.Module:
    return torch.jit.script(nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3)))


def script_inside() -> nn.Module:
    return Net(
        lambda m, x: m.b(torch.tanh(m.a(x)) + m.s(x)), s=torch.jit.script(nn.Linear(4, 4)), **two()
    )


@torch.jit.script
def by_script(x: Tensor, w: Tensor) -> Tensor:
    return torch.tanh(x @ w.t())


def tangent(m: Net, x: Tensor) -> Tensor:
    """Outputs that are derivatives forward."""
    return torch.func.jvp(lambda q: m.b(torch.tanh(m.a(q))), (x,), (x.cos(),))[1]


def laplacian(m: Net, x: Tensor) -> Tensor:
    """As nets of physics have it: the trace of a Hessian in the inputs."""
    return torch.func.vmap(
        lambda q: (
            torch.func.jacfwd(torch.func.jacrev(lambda p: m.b(torch.tanh(m.a(p)))))(q)
            .diagonal(0, 1, 2)
            .sum(1)
        )
    )(x)


def guarded(m: Net, x: Tensor) -> Tensor:
    """A look at the numbers, as careful users take it."""
    h = torch.tanh(m.a(x))
    if bool(torch.isnan(h).any()) or float(h.abs().max()) > 10:
        raise ValueError("bad numbers")
    return m.b(h)


def storing(m: Net, x: Tensor) -> Tensor:
    h = torch.tanh(m.a(x))
    part: Any = m
    part.last = h.detach().numpy().copy()
    return m.b(h)


def lazily(m: Net, x: Tensor) -> Tensor:
    """A table made at the first call."""
    if not hasattr(m, "table"):
        m.register_buffer("table", torch.linspace(0, 1, 4, dtype=x.dtype))
    return m.b(torch.tanh(m.a(x)) * m.table)


def deep_equilibrium(m: Net, x: Tensor) -> Tensor:
    """A fixed point without a graph, and one step with one."""
    u = m.a(x)
    with torch.no_grad():
        h = torch.zeros_like(u)
        for _ in range(10):
            h = torch.tanh(m.r(h) * 0.3 + u)
    return m.b(torch.tanh(m.r(h) * 0.3 + u))


def not_contiguous() -> nn.Module:
    net = Net(lambda m, x: m.b(torch.tanh(m.a(x))), **two())
    net.a.weight = nn.Parameter(torch.randn(4, 4).t())
    net.b.weight = nn.Parameter(torch.randn(3, 8)[:, ::2])
    return net


def channels_last() -> nn.Module:
    net = nn.Sequential(nn.Conv2d(2, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(12, 3))
    return net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch takes it


def views_of_init() -> nn.Module:
    """A piece of the weight that was cut once, with its graph."""
    net = Net(lambda m, x: m.b(torch.tanh(m.a(x))) + x @ piece.t(), **two())
    piece = net.a.weight[:3]
    return net


def traced() -> nn.Module:
    return torch.fx.symbolic_trace(nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3)))


def own_mode(m: Net, x: Tensor) -> Tensor:
    with torch.device("cpu"), FlopCounterMode(display=False):
        return m.b(torch.tanh(m.a(x)))


class Halves(torch.overrides.TorchFunctionMode):
    """A mode of the user's: whatever is linear is taken twice."""

    def __torch_function__(
        self,
        func: Callable[..., Tensor],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Tensor:
        found = func(*args, **(kwargs or {}))
        return found * 2 if func is F.linear else found


def under_a_mode(m: Net, x: Tensor) -> Tensor:
    with Halves():
        h = m.a(x)
    return m.b(torch.tanh(h))


def renormed(m: Net, x: Tensor) -> Tensor:
    """Weights by `torch.renorm`, a gate that is 0, and a loop over the layers' own parameters."""
    h = F.linear(x, torch.renorm(m.a.weight, 2, 0, 0.5))
    return m.b(torch.tanh(h)) * (1 + sum(p.sum() for p in m.parameters()) * 0.1)


def dtype_mixed() -> nn.Module:
    net = Net(lambda m, x: m.b(torch.tanh(m.a(x))) + 0 * m.first.sum(), first=weight(2), **two())
    net.first = nn.Parameter(torch.randn(2, dtype=torch.float32))
    return net


class Tagged(torch.Tensor):
    """A subclass as data sets hand them over."""


CASES: dict[str, Case] = {
    "small second use": Case(lambda: Net(small, **two())),
    "scripted": Case(scripted, lenient=frozenset({"*"})),
    "scripted part": Case(script_inside, lenient=FUNC),
    "scripted function": Case(
        lambda: Net(lambda m, x: m.b(by_script(m.a(x), m.a.weight)), **two())
    ),
    "tangent": Case(lambda: Net(tangent, **two())),
    "laplacian": Case(lambda: Net(laplacian, **two())),
    "guarded": Case(lambda: Net(guarded, **two()), lenient=FUNC),
    "storing": Case(lambda: Net(storing, **two()), lenient=FUNC),
    "lazy table": Case(lambda: Net(lazily, **two())),
    "fixed point": Case(lambda: Net(deep_equilibrium, r=nn.Linear(4, 4), **two())),
    "not contiguous": Case(not_contiguous),
    "channels last": Case(
        channels_last, lambda: numbers(4, 2, 3, 3).to(memory_format=torch.channels_last)
    ),
    "inputs of a stride": Case(
        lambda: Net(lambda m, x: m.b(torch.tanh(m.a(x))), **two()), lambda: numbers(4, 5).t()
    ),
    "inputs expanded": Case(
        lambda: Net(lambda m, x: m.b(torch.tanh(m.a(x))), **two()),
        lambda: numbers(1, 4).expand(5, 4),
    ),
    "piece cut at init": Case(views_of_init),
    "fx": Case(traced),
    "modes inside": Case(lambda: Net(own_mode, **two()), lenient=FUNC),
    "a mode that doubles": Case(lambda: Net(under_a_mode, **two())),
    "renormed": Case(lambda: Net(renormed, **two())),
    "inputs of a subclass": Case(
        lambda: Net(lambda m, x: m.b(torch.tanh(m.a(x))), **two()),
        lambda: numbers(5, 4).as_subclass(Tagged),
    ),
    "inputs that require gradients": Case(
        lambda: Net(lambda m, x: m.b(torch.tanh(m.a(x))), **two()),
        lambda: numbers(5, 4).requires_grad_(),
    ),
}


@pytest.mark.thinned(2)
@pytest.mark.parametrize("what", WHAT)
@pytest.mark.parametrize("name", CASES)
def test_further_models(name: str, what: str) -> None:
    ask(CASES[name], what)


# ------------------------------------------------------------------------------------------------
# looks that show nothing


def holds(o: cl.Objective, x: Tensor, y: Tensor, loss: Loss = cross_entropy) -> None:
    """The gradient, rows, blocks and diagonal."""
    r = Reference(o.model, x, y, loss)
    assert apart(in_order(o, r, o.closure(x, y).observe({"data"}).gradients), r.gradient) < 1e-10
    assert apart(r.joined(cl.exact.gradients(o, x, y), o.model, 1), r.rows) < 1e-10
    own = entries(o, r)
    order = torch.cat(list(own.values()))
    for kind in ("ggn", "hessian", "ef"):
        whole, found = getattr(r, kind), cl.exact.matrices(o, x, y, kind)
        assert (
            max(apart(found[b].dense(), whole[i[:, None], i], whole) for b, i in own.items())
            < 1e-10
        )
        assert apart(cl.exact.diagonal(o, x, y, kind), whole.diagonal()[order]) < 1e-10


def gated(m: Net, x: Tensor) -> Tensor:
    """A branch behind a gate that starts at 0, and in it a layer that sees places first."""
    h = m.inp(x).mean(1)
    return m.head(h + m.gate * torch.tanh(m.a(x.transpose(0, 1))).mean(0))


def test_a_gate_that_opens_later() -> None:
    """At 0 every wrong gradient behind it is right."""
    with seeded():
        net = Net(
            gated, gate=nn.Parameter(torch.zeros(())), **layers(inp=(3, 4), a=(3, 4), head=(4, 3))
        )
    x, y = numbers(4, 4, 3), tokens(4, high=3)
    o = cl.Objective(net, Categorical())
    holds(o, x, y)
    with torch.no_grad():
        net.gate.fill_(0.7)
    holds(o, x, y)


def gated_use(m: Net, x: Tensor) -> Tensor:
    """One layer, batch first; behind a gate that starts at 0 once more, places first."""
    return m.head(torch.tanh(m.a(x)).mean(1) + m.gate * torch.tanh(m.a(x.transpose(0, 1))).mean(0))


def test_a_second_use_whose_gate_opens_later() -> None:
    with seeded():
        net = Net(gated_use, gate=nn.Parameter(torch.zeros(())), **layers(a=(3, 4), head=(4, 3)))
    x, y = numbers(4, 4, 3), tokens(4, high=3)
    o = cl.Objective(net, Categorical())
    holds(o, x, y)
    with torch.no_grad():
        net.gate.fill_(0.7)
    holds(o, x, y)


def test_a_head_that_starts_at_zero() -> None:
    with seeded():
        net = Net(
            lambda m, x: m.head(torch.tanh(m.a(x.transpose(0, 1))).mean(0)),
            **layers(a=(3, 4), head=(4, 3)),
        )
        nn.init.zeros_(net.head.weight)
    x, y = numbers(4, 4, 3), tokens(4, high=3)
    o = cl.Objective(net, Categorical())
    holds(o, x, y)
    optimizer = cl.optimizer("sgd-m", o, lr=0.5)
    for _ in range(2):
        optimizer.step(o.closure(x, y))
    holds(o, x, y)


def test_a_first_minibatch_of_zeros() -> None:
    with seeded():
        net = Net(
            lambda m, x: m.head(torch.tanh(m.a(x.transpose(0, 1))).mean(0)),
            a=nn.Linear(3, 4, bias=False),
            head=nn.Linear(4, 3),
        )
    x, y = numbers(4, 4, 3), tokens(4, high=3)
    o = cl.Objective(net, Categorical())
    holds(o, 0 * x, y)
    holds(o, x, y)


def test_a_first_minibatch_whose_examples_are_one() -> None:
    """Rows in any order are the same rows."""
    with seeded():
        net = Net(lambda m, x: m.b(torch.tanh(m.a(x.flip(0)).flip(0))), **two())
    x, y = numbers(4, 4), tokens(4, high=3)
    o = cl.Objective(net, Categorical())
    holds(o, x[:1].expand(4, 4).clone(), y)
    holds(o, x, y)


def test_a_dead_layer_that_comes_to_life() -> None:
    with seeded():
        net = Net(
            lambda m, x: m.head(torch.relu(m.a(x.transpose(0, 1))).mean(0)),
            **layers(a=(3, 4), head=(4, 3)),
        )
        nn.init.constant_(net.a.bias, -100)
    x, y = numbers(4, 4, 3), tokens(4, high=3)
    o = cl.Objective(net, Categorical())
    holds(o, x, y)
    with torch.no_grad():
        net.a.bias.zero_()
    holds(o, x, y)


def test_first_and_last_examples_that_are_masked() -> None:
    """Their losses are 0 whatever the weights are."""

    def loss(z: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(z, y, reduction="none", ignore_index=-1)

    class Masked(Categorical):
        def check(self, z: Tensor, y: Tensor) -> None:
            """Any target."""

        def loss(self, z: Tensor, y: Tensor) -> Tensor:
            return loss(z, y)

    with seeded():
        net = Net(
            lambda m, x: m.head(torch.tanh(m.a(x.transpose(0, 1))).mean(0)),
            **layers(a=(3, 4), head=(4, 3)),
        )
    holds(cl.Objective(net, Masked()), numbers(4, 4, 3), torch.tensor([-1, 2, 0, -1]), loss)


@pytest.mark.parametrize("sort", ["missing", "weights", "class weights"])
def test_targets_that_show_later_what_the_loss_does_with_them(sort: str) -> None:
    """The first minibatch has no missing value, all weights 1, one class."""
    y0, y1 = numbers(5, 3, seed=2).clamp(-0.9), numbers(5, 3, seed=3).clamp(-0.9)
    parent: Any = Gaussian
    if sort == "missing":

        def loss(z: Tensor, y: Tensor) -> Tensor:
            return ((z - y).square() * (y > -100) / 2).sum(1)

        y1 = torch.where(y1 > 0.3, -1000.0, y1)
    elif sort == "weights":

        def loss(z: Tensor, y: Tensor) -> Tensor:
            return (z - y % 10).square().sum(1) / 2 * (1 + (y[:, 0] / 10).floor())

        y0, y1 = y0.abs(), y1.abs() + 10 * tokens(5, 1, high=4).double()
    else:
        parent = Categorical

        def loss(z: Tensor, y: Tensor) -> Tensor:
            return F.cross_entropy(
                z, y, reduction="none", weight=torch.tensor([1.0, 5.0, 0.2]).double()
            )

        y0, y1 = torch.zeros(5, dtype=torch.long), torch.tensor([0, 1, 2, 1, 0])

    class Own(parent):  # type: ignore[misc]  # whichever it is
        def check(self, z: Tensor, y: Tensor) -> None:
            """Any target."""

        def loss(self, z: Tensor, y: Tensor) -> Tensor:
            return loss(z, y)

    with seeded():
        net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))
    x = numbers(5, 4)
    o = cl.Objective(net, Own())
    for y in (y0, y1, y0):
        holds(o, x, y, loss)


def test_noise_that_is_switched_on_later() -> None:
    """By an attribute, which no mode tells of."""

    def run(m: Net, x: Tensor) -> Tensor:
        h = torch.tanh(m.a(x))
        return m.b(h + torch.randn_like(h) if m.noisy else h)

    with seeded():
        net: Any = Net(run, **two())
    x, y = numbers(5, 4), tokens(5, high=3)
    o = cl.Objective(net, Categorical())
    net.noisy = False
    holds(o, x, y)
    net.noisy = True
    with torch.random.fork_rng(devices=[]):
        for call in (
            lambda: cl.exact.gradients(o, x, y),
            lambda: cl.exact.matrices(o, x, y, "hessian"),
            lambda: cl.exact.product(o, x, y, "ggn") @ numbers(35),
        ):
            refusal(call)


def test_coupling_that_is_switched_on_later() -> None:
    def run(m: Net, x: Tensor) -> Tensor:
        h = torch.tanh(m.a(x))
        return m.b(h - h.mean(0) if m.centred else h)

    with seeded():
        net: Any = Net(run, **two())
    x, y = numbers(5, 4), tokens(5, high=3)
    o = cl.Objective(net, Categorical())
    net.centred = False
    holds(o, x, y)
    net.centred = True
    refusal(lambda: cl.exact.gradients(o, x, y))
    refusal(lambda: cl.exact.matrices(o, x, y, "ggn"))


def test_a_first_parameter_of_another_dtype_that_says_nothing() -> None:
    """float32 and unused beside a model of float64: inputs are not rounded to it."""
    with seeded():
        net = dtype_mixed()
    x, y = numbers(5, 4), tokens(5, high=3)
    o, r = cl.Objective(net, Categorical()), Reference(net, x, y)
    seen = o.closure(x, y).observe({"data"}).gradients
    found = {name: g for b in o.blocks for name, g in b.scatter(seen[b.name]).items()}
    for name, wanted in r.split(r.gradient).items():
        if name != "first":
            assert apart(found[name].double(), wanted.double()) < 1e-10
    for algorithm in STEPPERS:
        try:
            cl.optimizer(algorithm, o, lr=0.01, damping=0.1).step(o.closure(x, y))
        except CurvlabError as error:
            one_line(error, "dtype", "float")
