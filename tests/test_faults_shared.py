"""A weight that enters several times, or by some rows only: tied, shared, called again, in
attention, recurrence, experts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracle import Case, Net, Reference, apart, numbers, one_line, tokens, total, weight
from test_faults import WHAT, ask, in_order, layers, right_or_refused
from test_faults_uses import CASES as USES
from torch import Tensor, nn
from torch.nn import functional as F

import curvlab as cl
from curvlab.errors import CurvlabError, CurvlabWarning
from curvlab.forms import Report
from curvlab.likelihoods import Categorical

pytestmark = pytest.mark.filterwarnings("ignore::curvlab.errors.CurvlabWarning")


def momentum_target(m: Net, x: Tensor) -> Tensor:
    """One use under no_grad beside one with."""
    with torch.no_grad():
        target = m.a(x.flip(1))
    return m.b(torch.tanh(m.a(x)) * target)


def prototypes(m: Net, x: Tensor) -> Tensor:
    """Rows of a layer are classes."""
    return torch.tanh(m.a(x)) @ torch.tanh(m.a(m.seeds)).mT


def tied_by_storage() -> nn.Module:
    """Two parameters, one memory."""
    net = Net(lambda m, x: m.b(torch.tanh(m.a(x))), **layers(a=(4, 3), b=(3, 4)))
    net.b.weight = nn.Parameter(net.a.weight.detach().t())
    return net


def tied_embedding(bias: bool = True, padding: int | None = None) -> nn.Module:
    net = Net(
        lambda m, x: m.head(torch.tanh(m.lin(m.emb(x))).mean(1)),
        emb=nn.Embedding(6, 4, padding_idx=padding),
        lin=nn.Linear(4, 4),
        head=nn.Linear(4, 6, bias=bias),
    )
    net.head.weight = net.emb.weight
    return net


def tied_transposed() -> nn.Module:
    """A convolution and its transpose by one filter."""
    net = Net(
        lambda m, x: m.t(torch.tanh(m.c(x))).mean((2, 3)),
        c=nn.Conv2d(3, 2, 2),
        t=nn.ConvTranspose2d(2, 3, 2),
    )
    net.t.weight = net.c.weight
    return net


def one_bias() -> nn.Module:
    net = Net(
        lambda m, x: m.c(torch.tanh(m.b(torch.tanh(m.a(x))))),
        **layers(a=(4, 4), b=(4, 4), c=(4, 3)),
    )
    net.b.bias = net.a.bias
    return net


def in_two_parents() -> nn.Module:
    inner = nn.Linear(4, 4)
    return Net(
        lambda m, x: m.head(m.left(x) * m.right(x.flip(1))),
        left=nn.Sequential(inner, nn.Tanh()),
        right=nn.Sequential(nn.Tanh(), inner),
        head=nn.Linear(4, 3),
    )


def twice_the_name() -> nn.Module:
    """One Parameter under two names of one module."""
    net = Net(
        lambda m, x: F.linear(torch.tanh(F.linear(x, m.w)), m.v),
        w=weight(4, 4),
        **layers(head=(4, 3)),
    )
    net.v = net.w
    net.run = lambda m, x: m.head(F.linear(torch.tanh(F.linear(x, m.w)), m.v))
    return net


def recursive(layer: nn.Module, x: Tensor, depth: int) -> Tensor:
    return x if not depth else recursive(layer, torch.tanh(layer(x)), depth - 1)


def unrolled(m: Net, x: Tensor) -> Tensor:
    """A cell of one's own over time."""
    h = x.new_zeros(len(x), 3)
    for t in range(x.shape[1]):
        h = torch.tanh(m.inp(x[:, t]) + m.rec(h))
    return m.head(h)


def cells(kind: type[nn.Module]) -> nn.Module:
    def run(m: Net, x: Tensor) -> Tensor:
        state = None
        for t in range(x.shape[1]):
            state = m.cell(x[:, t], state)
        return m.head(state[0] if isinstance(state, tuple) else state)

    return Net(run, cell=kind(2, 2), head=nn.Linear(2, 3))


def recurrent(kind: type[nn.Module], **options: bool | int) -> nn.Module:
    width = 4 if options.get("bidirectional") else 2
    return Net(
        lambda m, x: m.head(m.cells(x)[0].mean(1)),
        cells=kind(2, 2, batch_first=True, **options),
        head=nn.Linear(width, 3),
    )


def attention(first: bool, cross: bool, **options: int | bool) -> nn.Module:
    def run(m: Net, x: Tensor) -> Tensor:
        q, k = (x[:, :2], x[:, 1:]) if cross else (x, x)
        if not first:
            q, k = q.transpose(0, 1), k.transpose(0, 1)
        return m.head(m.att(q, k, k.tanh())[0].mean(1 if first else 0))

    return Net(
        run, att=nn.MultiheadAttention(4, 2, batch_first=first, **options), head=nn.Linear(4, 3)
    )


def own_attention(m: Net, x: Tensor) -> Tensor:
    q, k, v = m.q(x), m.k(x), m.v(x)
    return m.head(F.scaled_dot_product_attention(q, k, v).mean(1))


def experts(m: Net, x: Tensor) -> Tensor:
    """Each example to the expert that its numbers choose; the third is chosen by none."""
    z = x.new_zeros(len(x), 3)
    for i, expert in enumerate(m.experts):
        chosen = ((x[:, 0] > 0).long() == i).nonzero()[:, 0]
        z = z.index_add(0, chosen, expert(torch.tanh(x[chosen])))
    return z + m.gate(x)


def dense_experts(m: Net, x: Tensor) -> Tensor:
    """All experts on all examples, gated."""
    gate = torch.softmax(m.gate(x), 1)
    return sum(gate[:, i : i + 1] * expert(x) for i, expert in enumerate(m.experts))


def some_rows(m: Net, x: Tensor) -> Tensor:
    """A layer that sees every other example only; by place in the minibatch, so that nobody can say
    what a row alone is.
    """
    return m.b(torch.where((x[:, :1] > 0), torch.tanh(m.a(x)), x))


def skipping(m: Net, x: Tensor) -> Tensor:
    """The same, and who has no example is not called."""
    z = x.new_zeros(len(x), 3)
    for i, expert in enumerate(m.experts):
        chosen = ((x[:, 0] > 0).long() == i).nonzero()[:, 0]
        if len(chosen):
            z = z.index_add(0, chosen, expert(torch.tanh(x[chosen])))
    return z + m.gate(x)


def mixture(run: Callable[[Net, Tensor], Tensor]) -> nn.Module:
    return Net(
        run, experts=nn.ModuleList([nn.Linear(4, 3) for _ in range(3)]), gate=nn.Linear(4, 3)
    )


BY_DATA = frozenset({"func *", "product *", "matri*", "rows", "jacobians", "diagonal *", "hf"})
"""What `vmap` does not go through, where shapes follow from numbers."""

CASES: dict[str, Case] = {
    "three times": Case(
        lambda: Net(lambda m, x: m.b(recursive(m.a, x, 3)), **layers(a=(4, 4), b=(4, 3)))
    ),
    "twice on the same": Case(
        lambda: Net(lambda m, x: m.b(m.a(x) * m.a(x)), **layers(a=(4, 4), b=(4, 3)))
    ),
    "twice, once unused": Case(
        lambda: Net(
            lambda m, x: m.b(m.a(x) + 0 * m.a(x.flip(1)).detach()), **layers(a=(4, 4), b=(4, 3))
        )
    ),
    "unrolled": Case(lambda: Net(unrolled, **layers(inp=(2, 3), rec=(3, 3), head=(3, 3))), (3, 2)),
    "two parents": Case(in_two_parents),
    "two names": Case(twice_the_name),
    "one bias in two layers": Case(one_bias),
    "one storage": Case(tied_by_storage, y="like"),
    "tied embedding": Case(lambda: tied_embedding(), lambda: tokens(5, 3)),
    "tied embedding without bias": Case(lambda: tied_embedding(False), lambda: tokens(5, 3)),
    "tied embedding with padding": Case(lambda: tied_embedding(padding=2), lambda: tokens(5, 3)),
    "tied convolution": Case(tied_transposed, (3, 3, 3)),
    "one by one as linear": Case(
        lambda: Net(
            lambda m, x: (
                m.c(x).mean((2, 3)) + F.linear(x.mean((2, 3)).tanh(), m.c.weight.flatten(1))
            ),
            c=nn.Conv2d(2, 3, 1),
        ),
        (2, 2, 2),
    ),
    "lstm cell": Case(lambda: cells(nn.LSTMCell), (3, 2)),
    "gru cell": Case(lambda: cells(nn.GRUCell), (3, 2)),
    "rnn cell": Case(lambda: cells(nn.RNNCell), (3, 2)),
    "gru": Case(lambda: recurrent(nn.GRU), (3, 2)),
    "lstm, both ways": Case(lambda: recurrent(nn.LSTM, bidirectional=True), (3, 2)),
    "rnn": Case(lambda: recurrent(nn.RNN), (3, 2)),
    "self-attention": Case(lambda: attention(True, False), (3, 4)),
    "self-attention, places first": Case(lambda: attention(False, False), (3, 4)),
    "self-attention, places first, N = T": Case(lambda: attention(False, False), (3, 4), 3),
    "cross-attention": Case(lambda: attention(True, True), (3, 4)),
    "cross-attention, places first": Case(lambda: attention(False, True), (3, 4)),
    "cross-attention, other widths": Case(
        lambda: attention(True, True, kdim=4, vdim=4, bias=False), (3, 4)
    ),
    "attention with bias_kv": Case(
        lambda: attention(True, False, add_bias_kv=True, add_zero_attn=True), (3, 4)
    ),
    "attention by hand": Case(
        lambda: Net(own_attention, **layers(q=(4, 4), k=(4, 4), v=(4, 4), head=(4, 3))), (3, 4)
    ),
    "prototypes, as many as examples": Case(
        lambda: Net(prototypes, seeds=numbers(3, 4), a=nn.Linear(4, 3)), n=3
    ),
    "prototypes": Case(lambda: Net(prototypes, seeds=numbers(3, 4), a=nn.Linear(4, 3))),
    "under no_grad too": Case(lambda: Net(momentum_target, **layers(a=(4, 4), b=(4, 3)))),
    "experts, one idle": Case(lambda: mixture(experts), lenient=BY_DATA),
    "experts, one skipped": Case(lambda: mixture(skipping), lenient=BY_DATA),
    "experts, all on all": Case(lambda: mixture(dense_experts)),
    "where": Case(lambda: Net(some_rows, **layers(a=(4, 4), b=(4, 3)))),
    "layer and functional": Case(
        lambda: Net(
            lambda m, x: m.a(x) + F.linear(x.flip(1).tanh(), m.a.weight), **layers(a=(4, 3))
        )
    ),
}


@pytest.mark.thinned(6)
@pytest.mark.parametrize("what", WHAT)
@pytest.mark.parametrize("name", CASES)
def test_a_weight_that_enters_several_times(name: str, what: str) -> None:
    ask(CASES[name], what)


# ------------------------------------------------------------------------------------------------
# what is said of it


def said(case: Case) -> Report:
    x, y = case.data()
    return cl.Objective(case.model(), Categorical()).check(x, y)


def test_an_expert_that_is_skipped_is_said_and_has_gradient_zero() -> None:
    case = CASES["experts, one skipped"]
    x, y = case.data()
    o = cl.Objective(case.model(), Categorical())
    with pytest.warns(CurvlabWarning, match=r"experts\.2"):
        seen = o.closure(x, y).observe({"data"}).gradients
    idle = [b.name for b in o.blocks if "experts.2.weight" in b.params]
    assert len(idle) == 1
    assert not seen[idle[0]].any()
    assert said(case).ways[idle[0]] == "unused"
    optimizer = cl.optimizer("kfac", o, lr=0.1, damping=0.1)
    expert: Any = o.model.get_submodule("experts.2")
    before = expert.weight.detach().clone()
    optimizer.step(o.closure(x, y))
    assert bool(torch.isfinite(expert.weight).all())
    assert torch.equal(expert.weight, before)
    turned = -x  # now the others are chosen, and in another number
    r = Reference(o.model, turned, y)
    assert (
        apart(in_order(o, r, o.closure(turned, y).observe({"data"}).gradients), r.gradient) < 1e-10
    )


@pytest.mark.parametrize("name", ["captured alone", "soup", "hypernetwork of a code"])
def test_what_goes_the_general_way_is_said(name: str) -> None:
    case = USES[name]
    assert "general" in said(case).ways.values()
    x, y = case.data()
    with pytest.warns(CurvlabWarning):
        cl.exact.matrices(cl.Objective(case.model(), Categorical()), x, y, "ggn")


@pytest.mark.filterwarnings("error::curvlab.errors.CurvlabWarning")
def test_plain_layers_go_by_structure_without_a_word() -> None:
    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    o = cl.Objective(net, Categorical())
    report = o.check(numbers(5, 4), tokens(5, high=3))
    assert report.ways == {"1": "structured", "2": "structured"}
    cl.exact.matrices(o, numbers(5, 4), tokens(5, high=3), "hessian")


def test_an_own_function_without_setup_context_is_right_or_named() -> None:
    """Straight-through, as it was written for years."""

    class Straight(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, h: Tensor) -> Tensor:
            return h.sign()

        @staticmethod
        def backward(ctx: object, g: Tensor) -> Tensor:
            return g

    net = Net(lambda m, x: m.b(Straight.apply(m.a(x))), **layers(a=(4, 4), b=(4, 3))).double()
    x, y = numbers(5, 4), tokens(5, high=3)
    o, r = cl.Objective(net, Categorical()), Reference(net, x, y)
    for kind in ("hessian", "ggn", "ef"):
        wanted = getattr(r, kind).trace()[None]
        for call in (
            lambda kind=kind: cl.exact.matrix(o, x, y, kind, None).dense().trace()[None],
            lambda kind=kind: cl.exact.product(o, x, y, kind).dense().trace()[None],
            lambda kind=kind: total(
                cl.exact.matrix(o, x, y, kind, b.name, route="func").dense().trace()
                for b in o.blocks
            )[None],
            lambda kind=kind: cl.exact.diagonal(o, x, y, kind).sum()[None],
        ):
            right_or_refused(call, wanted, match="setup_context")
    try:
        cl.optimizer("hf", o, lr=1.0, damping=1.0).step(o.closure(x, y))
    except CurvlabError as error:
        one_line(error, "setup_context")
