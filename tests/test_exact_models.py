"""The oracle beyond the zoo: skips, attention, recurrence, no rule at all; a likelihood of one's
own; outputs of any shape.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from plain import Plain
from problems import Poisson, Problem, assert_near, problem
from reference import Reference, assert_block, sampled
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

import curvlab as cl
from curvlab.exact import KINDS, Kind
from curvlab.layers import Block
from curvlab.likelihoods import Bernoulli, Categorical, Gaussian

kinds = pytest.mark.parametrize("kind", KINDS)
DRAWS = 3


def expected(r: Reference, kind: Kind) -> Tensor:
    """The whole matrix; of fisher-mc that of an objective's first call."""
    return r.drawn(sampled(r.p, r.p.objective(), DRAWS)) if kind == "fisher-mc" else r[kind]


def found(p: Problem, kind: Kind, block: Any, route: str = "auto") -> Tensor:
    return cl.exact.matrix(p.objective(), p.x, p.y, kind, block, route=route, draws=DRAWS).dense()


class Residual(nn.Module):
    """Skips, two branches and a concatenation: where no layer cuts another off from the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.last, self.b, self.a, self.first = (
            nn.Linear(7, 3),
            nn.Linear(4, 3),
            nn.Linear(4, 4),
            nn.Linear(5, 4),
        )

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        h = h + torch.tanh(self.a(h)) * h
        return self.last(torch.cat([h, self.b(h).sin()], 1)) + self.b.weight.sum()


class Attention(nn.Module):
    """Fused attention has neither forward nor second derivatives: it is taken apart."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.last = (
            nn.TransformerEncoderLayer(4, 2, 3, batch_first=True),
            nn.Linear(4, 3),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.layer(x).mean(1))


class Recurrent(nn.Module):
    """No rule for `vmap` in the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.cells, self.last = nn.LSTM(2, 2, batch_first=True), nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.cells(x)[0][:, -1])


class Bare(nn.Module):
    """Parameters of its own, one of them a number; no layer with a rule."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.scale = nn.Parameter(torch.randn(5, 3)), nn.Parameter(torch.tensor(0.7))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.w) * self.scale


def frozen() -> nn.Module:
    """A bias and a whole layer that are not trained."""
    net = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))
    for p in (net[0].bias, net[2].weight, net[2].bias):
        p.requires_grad_(False)
    return net


class Twice(nn.Module):
    """One module two times."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.last = nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.layer(torch.tanh(self.layer(x))))


class Autoencoder(nn.Module):
    """One weight in both directions."""

    def __init__(self) -> None:
        super().__init__()
        self.bias, self.encoder, self.last = (
            nn.Parameter(torch.randn(5)),
            nn.Linear(5, 4),
            nn.Linear(5, 3),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.last(
            F.linear(torch.tanh(self.encoder(x)), self.encoder.weight.T, self.bias).sin()
        )


class Idle(nn.Module):
    """A layer that does not run, or one whose outputs nobody takes."""

    def __init__(self, runs: bool) -> None:
        super().__init__()
        self.layer, self.idle, self.runs = nn.Linear(5, 3), nn.Linear(3, 4), runs

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.layer(x))
        if self.runs:
            self.idle(h)
        return h


def tied() -> nn.Module:
    """One weight in two modules, whose biases are their own."""
    net = nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 3))
    net[2].weight = net[0].weight
    return net


def one_module() -> nn.Module:
    """One module under two names."""
    layer = nn.Linear(5, 5)
    return nn.Sequential(layer, nn.Tanh(), layer, nn.Tanh(), nn.Linear(5, 3))


class Language(nn.Module):
    """An embedding whose table is the last layer's weight too, with a bias of that layer's own."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.first, self.head = nn.Embedding(3, 4), nn.Linear(5, 3), nn.Linear(4, 3)
        self.head.weight = self.words.weight

    def forward(self, x: Tensor) -> Tensor:
        tokens = (x > 0).sum(1) % 3
        return self.head(
            torch.tanh(self.words(tokens) + self.words((tokens + 1) % 3) * self.first(x)[:, :1])
        )


SEVERAL = {
    "twice": (Twice, (5,)),
    "tied": (tied, (5,)),
    "one module": (one_module, (5,)),
    "both directions": (Autoencoder, (5,)),
    "language": (Language, (5,)),
    "idle": (lambda: Idle(runs=False), (5,)),
    "in vain": (lambda: Idle(runs=True), (5,)),
}
"""Weights that are used more than once, or not at all."""

OTHERS = {
    "residual": (Residual, (5,)),
    "attention": (lambda: Attention().eval(), (3, 4)),
    "recurrent": (Recurrent, (3, 2)),
    "bare": (Bare, (5,)),
    "frozen": (frozen, (5,)),
    "prelu": (lambda: nn.Sequential(nn.Linear(5, 4), nn.PReLU(4), nn.Linear(4, 3)), (5,)),
    "weight-norm": (
        lambda: nn.Sequential(weight_norm(nn.Linear(5, 4)), nn.Tanh(), nn.Linear(4, 3)),
        (5,),
    ),
    **SEVERAL,
}


def other(name: str) -> Problem:
    build, shape = OTHERS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        return Problem(
            build().double(),
            Categorical(),
            torch.randn(5, *shape).double(),
            torch.tensor([0, 2, 1, 1, 2]),
        )


def by_autograd(p: Problem, kind: Kind) -> Tensor:
    """[D, D] by torch.autograd alone, one example and one row at a time."""
    blocks = p.objective().blocks
    weights = {n: p.model.get_parameter(n) for b in blocks for n in b.params}

    def rows(values: Tensor, again: bool = False) -> Tensor:
        found = []
        for value in values.flatten():
            each = torch.autograd.grad(
                value,
                list(weights.values()),
                create_graph=again,
                retain_graph=True,
                allow_unused=True,
            )
            full = {
                n: torch.zeros_like(w) if d is None else d
                for (n, w), d in zip(weights.items(), each, strict=True)
            }
            found.append(torch.cat([b.gather(full).flatten() for b in blocks]))
        return torch.stack(found)

    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        z = p.model(p.x)
    torch.backends.mha.set_fastpath_enabled(fused)
    losses = p.likelihood.loss(z, p.y)
    if kind in ("ef", "fisher-mc"):
        g = rows(losses if kind == "ef" else p.likelihood.loss(z, sampled(p, p.objective())[0]))
        return g.mT @ g / len(g)
    if kind in ("ggn", "fisher"):
        root = z.detach().softmax(1)
        H = torch.diag_embed(root) - root[:, :, None] * root[:, None]
        J = rows(z).view(len(z), 3, -1)
        return torch.einsum("nci,ncd,ndj->ij", J, H, J) / len(z)
    total = losses.mean()
    if kind == "pi":
        total = (z * torch.autograd.grad(total, z, retain_graph=True)[0].detach()).sum()
    return rows(rows(total, again=True)).detach()


@pytest.mark.thinned(6)
@kinds
@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.filterwarnings(
    "ignore::curvlab.errors.CurvlabWarning", "ignore:There is a performance drop"
)
def test_models_beyond_the_zoo(name: str, kind: Kind) -> None:
    """Against torch.autograd: by structure where layers have rules, else in general; as matrices,
    products and diagonals.
    """
    p = other(name)
    written = pytest.MonkeyPatch()
    # torch's is wrong
    written.setattr(
        torch, "_weight_norm", lambda v, g, dim=0: v * (g / torch.norm_except_dim(v, 2, dim))
    )
    whole = by_autograd(p, kind)
    written.undo()
    assert_near(cl.exact.matrix(p.objective(), p.x, p.y, kind, None).dense(), whole)
    for name, block in cl.exact.matrices(p.objective(), p.x, p.y, kind).items():
        own = p.objective().layout.slices[name]
        assert_block(block.dense(), whole[own, own], whole)
    product: Any = cl.exact.product(p.objective(), p.x, p.y, kind)
    assert_near(product.dense(), whole)
    assert_near(product.diag(), whole.diagonal())


@pytest.mark.thinned(3)
@kinds
@pytest.mark.parametrize("name", SEVERAL)
@pytest.mark.filterwarnings("ignore::curvlab.errors.CurvlabWarning")
def test_weights_that_are_used_several_times_or_not_at_all(name: str, kind: Kind) -> None:
    """By every call of the oracle, against autograd one example at a time: blocks, pairs, routes,
    loaders, products.
    """
    p = other(name)
    objective, before = p.objective(), list(p.model.parameters())
    label = sampled(p, objective)[0] if kind == "fisher-mc" else p.y
    plain = Plain(p.model, p.x, label, p.likelihood.loss)

    def wanted(rows: Block, columns: Block) -> Tensor:
        if kind == "pi":
            return plain.matrix("hessian", rows, columns) - plain.matrix("ggn", rows, columns)
        return plain.matrix({"fisher": "ggn", "fisher-mc": "ef"}.get(kind, kind), rows, columns)

    whole = torch.cat(
        [torch.cat([wanted(b, c) for c in objective.blocks], 1) for b in objective.blocks]
    )
    for route in ("auto", "func"):
        assert_near(
            cl.exact.matrix(p.objective(), p.x, p.y, kind, None, route=route).dense(), whole
        )
    slices = objective.layout.slices
    for b in objective.blocks:
        own = slices[b.name]
        for route in ("auto", "func"):
            found = cl.exact.matrix(p.objective(), p.x, p.y, kind, b.name, route=route).dense()
            assert_block(found, whole[own, own], whole)
        assert_block(
            cl.exact.product(p.objective(), p.x, p.y, kind, b.name).dense(), whole[own, own], whole
        )
        for c in objective.blocks:
            found = cl.exact.matrix(p.objective(), p.x, p.y, kind, (b.name, c.name)).dense()
            assert_block(found, whole[own, slices[c.name]], whole)
    assert_near(cl.exact.diagonal(p.objective(), p.x, p.y, kind), whole.diagonal())
    if kind != "fisher-mc":
        loader = list(zip(p.x.split([2, 3]), p.y.split([2, 3]), strict=True))
        assert_near(cl.exact.matrix(p.objective(), loader, kind=kind, block=None).dense(), whole)
        v = torch.randn(len(whole), generator=torch.Generator().manual_seed(0)).double()
        assert_near(cl.exact.product(p.objective(), loader, kind=kind) @ v, whole @ v)
    assert all(q is r for q, r in zip(p.model.parameters(), before, strict=True))


@pytest.mark.parametrize("name", SEVERAL)
@pytest.mark.filterwarnings("ignore::curvlab.errors.CurvlabWarning")
def test_gradients_and_jacobians_of_weights_that_are_used_several_times_or_not_at_all(
    name: str,
) -> None:
    p = other(name)
    objective, plain = p.objective(), Plain(p.model, p.x, p.y, p.likelihood.loss)
    gradients = objective.closure(p.x, p.y).observe().gradients
    for found, expected in (
        (
            {n: g for b in objective.blocks for n, g in b.scatter(gradients[b.name]).items()},
            plain.mean_gradient,
        ),
        (cl.exact.gradients(objective, p.x, p.y), plain.gradients),
        (cl.exact.jacobians(objective, p.x), plain.jacobians),
    ):
        assert sorted(found) == sorted(expected) == sorted(n for n, _ in p.model.named_parameters())
        for n, wanted in expected.items():
            assert_near(found[n], wanted)


@kinds
def test_a_likelihood_of_your_own(kind: Kind) -> None:
    """Poisson with the logarithm of its rate as output: every kind, by structure and in general."""
    q = problem("tanh", "gaussian")
    p = Problem(q.model, Poisson(), q.x, torch.arange(21.0).double().view(7, 3) % 4)
    r = Reference(p)
    whole = r["ggn"] if kind == "fisher" else expected(r, kind)  # for its GGN is its Fisher matrix
    assert_near(found(p, kind, None), whole)
    assert_near(found(p, kind, None, "func"), whole)
    for block, own in r.slices.items():
        assert_block(found(p, kind, block), whole[own, own], whole)
    assert_near(cl.exact.product(p.objective(), p.x, p.y, kind, draws=DRAWS).dense(), whole)


@kinds
@pytest.mark.parametrize("axes", ["none", "two"])
@pytest.mark.parametrize("make", [Bernoulli, Gaussian])
def test_outputs_without_an_axis_or_with_several(make: type, axes: str, kind: Kind) -> None:
    """[N] and [N, 2, 2] outputs are C = 1 and C = 4."""
    generator = torch.Generator().manual_seed(1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        shape: tuple[int, ...]
        if axes == "none":
            net, shape = (
                nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 1), nn.Flatten(0)).double(),
                (5, 3),
            )
        else:
            net, shape = (
                nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 2)).double(),
                (5, 2, 3),
            )
    x = torch.randn(*shape, generator=generator).double()
    p = Problem(net, make(), x, torch.rand(net(x).shape, generator=generator).double())
    r = Reference(p)
    whole = expected(r, kind)
    assert_near(found(p, kind, None), whole)
    assert_near(found(p, kind, None, "func"), whole)
    for block, own in r.slices.items():
        assert_block(found(p, kind, block), whole[own, own], whole)
