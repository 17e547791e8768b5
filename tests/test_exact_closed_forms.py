"""The oracle where the answer is known on paper: generalised linear models, a network of one hidden
layer, Theorem 3.

Legend: N examples, T places, I inputs incl. the bias column, O outputs; `a` inputs with 1 appended,
    p probabilities.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracle import total
from problems import LIKELIHOODS, Problem, assert_near, problem
from reference import reference
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, vmap

import curvlab as cl
from curvlab.exact import KINDS, Kind
from curvlab.likelihoods import Categorical, Gaussian


def matrix(p: Problem, kind: Kind, block: Any = "1") -> Tensor:
    return cl.exact.matrix(p.objective(), p.x, p.y, kind, block).dense()


def extended(x: Tensor) -> Tensor:
    return torch.cat([x, x.new_ones(*x.shape[:-1], 1)], -1)


def kron_mean(G: Tensor, a: Tensor, b: Tensor | None = None) -> Tensor:
    """(1/N) Σₙ Gₙ ⊗ aₙ bₙᵀ."""
    b = a if b is None else b
    return total(
        torch.kron(g, torch.outer(one, other)) for g, one, other in zip(G, a, b, strict=True)
    ) / len(a)


# ------------------------------------------------------------------------------------------------
# one linear layer


@pytest.mark.parametrize("kind", ["hessian", "ggn", "fisher"])
def test_linear_regression(kind: Kind) -> None:
    """I_C ⊗ AᵀA/N, whatever the targets and the weights."""
    p = problem("linear", "gaussian", n=11)
    a = extended(p.x)
    assert_near(matrix(p, kind), torch.kron(torch.eye(3).double(), a.mT @ a / 11))


@pytest.mark.parametrize("kind", ["hessian", "ggn", "fisher"])
def test_logistic_regression(kind: Kind) -> None:
    """Of every unit Aᵀ diag(σ(1 − σ)) A/N; nothing between units."""
    p = problem("linear", "bernoulli", n=11)
    a, s = extended(p.x), p.model(p.x).detach().sigmoid()
    assert_near(
        matrix(p, kind), torch.block_diag(*(a.mT @ torch.diag(c * (1 - c)) @ a / 11 for c in s.mT))
    )


@pytest.mark.parametrize("kind", ["hessian", "ggn", "fisher"])
def test_softmax_regression(kind: Kind) -> None:
    """(diag p − ppᵀ) ⊗ aaᵀ, on average."""
    p = problem("linear", "categorical", n=11)
    s = p.model(p.x).detach().softmax(1)
    assert_near(
        matrix(p, kind), kron_mean(torch.diag_embed(s) - s[:, :, None] * s[:, None], extended(p.x))
    )


def residuals(p: Problem) -> Tensor:
    """∂ℓ/∂z: mean − y in all three families."""
    z = p.model(p.x).detach()
    if isinstance(p.likelihood, Categorical):
        return z.softmax(1) - F.one_hot(p.y, 3)
    return (z if isinstance(p.likelihood, Gaussian) else z.sigmoid()) - p.y


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_empirical_fisher_of_a_linear_model(likelihood: str) -> None:
    """(mean − y)(mean − y)ᵀ ⊗ aaᵀ, on average."""
    p = problem("linear", likelihood, n=11)
    r = residuals(p)
    assert_near(matrix(p, "ef"), kron_mean(r[:, :, None] * r[:, None], extended(p.x)))


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_a_linear_model_has_no_second_term(likelihood: str) -> None:
    p = problem("linear", likelihood)
    assert matrix(p, "pi").count_nonzero() == 0


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_gradients_of_a_linear_model(likelihood: str) -> None:
    p = problem("linear", likelihood)
    r = residuals(p)
    found = cl.exact.gradients(p.objective(), p.x, p.y)
    assert_near(found["weight"], r[:, :, None] * p.x[:, None])
    assert_near(found["bias"], r)


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("model", ["tanh", "relu", "tokens", "conv-norm", "embedding"])
def test_the_last_block_of_the_hessian_is_its_ggn(model: str, likelihood: str) -> None:
    """The outputs are linear in the last layer."""
    p = problem(model, likelihood)
    last = p.objective().blocks[-1].name
    assert_near(matrix(p, "hessian", last), matrix(p, "ggn", last))
    assert matrix(p, "pi", last).count_nonzero() == 0


def test_one_example_and_one_output() -> None:
    """V = N = C = 1: σ(1 − σ) j jᵀ."""
    net = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 1)).double()
    p = Problem(
        net, cl.likelihoods.Bernoulli(), torch.ones(1, 2).double(), torch.ones(1, 1).double()
    )
    s = net(p.x).detach().sigmoid()
    j = torch.cat(
        [t.flatten() for t in torch.autograd.grad(net(p.x).sum(), list(net[2].parameters()))]
    )
    assert_near(matrix(p, "ggn", "2"), s * (1 - s) * torch.outer(j, j))


# ------------------------------------------------------------------------------------------------
# one hidden layer


class Hidden:
    """tanh between two linear layers and softmax, by the chain rule on paper."""

    def __init__(self) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(2)
            net: Any = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
            self.p = Problem(
                net, Categorical(), torch.randn(6, 3).double(), torch.tensor([0, 1, 2, 2, 1, 0])
            )
        self.a = extended(self.p.x)
        self.t = torch.tanh(net[0](self.p.x)).detach()
        self.b = extended(self.t)
        self.W = net[2].weight.detach()
        self.s = net(self.p.x).detach().softmax(1)
        self.last = self.s - F.one_hot(self.p.y, 3)  # ∂ℓ/∂z
        self.back = self.last @ self.W  # ∂ℓ/∂t
        self.J = self.W[None] * (1 - self.t**2)[:, None]  # ∂z/∂h: [N, C, O]
        self.Z = torch.diag_embed(self.s) - self.s[:, :, None] * self.s[:, None]


def test_gradients_of_one_hidden_layer() -> None:
    n = Hidden()
    found = cl.exact.gradients(n.p.objective(), n.p.x, n.p.y)
    first = n.back * (1 - n.t**2)
    assert_near(found["0.weight"], first[:, :, None] * n.p.x[:, None])
    assert_near(found["0.bias"], first)
    assert_near(found["2.weight"], n.last[:, :, None] * n.t[:, None])
    assert_near(found["2.bias"], n.last)


def test_curvature_of_one_hidden_layer() -> None:
    """GGN: (∂z/∂h)ᵀ Z (∂z/∂h) ⊗ aaᵀ; Π: diag(∂ℓ/∂t · tanh″) ⊗ aaᵀ; the Hessian is their sum; thesis
    (1.4).
    """
    n = Hidden()
    ggn = kron_mean(n.J.mT @ n.Z @ n.J, n.a)
    pi = kron_mean(torch.diag_embed(n.back * -2 * n.t * (1 - n.t**2)), n.a)
    assert_near(matrix(n.p, "ggn"), ggn)
    assert_near(matrix(n.p, "pi"), pi)
    assert_near(matrix(n.p, "hessian"), ggn + pi)
    assert_near(matrix(n.p, "ggn", ("2", "1")), kron_mean(n.Z @ n.J, n.b, n.a))
    assert_near(
        matrix(n.p, "ef", ("2", "1")),
        kron_mean(n.last[:, :, None] * (n.back * (1 - n.t**2))[:, None], n.b, n.a),
    )


def test_the_mixed_second_term_of_one_hidden_layer() -> None:
    """∂²ℓ/∂W₂∂h = δ_oo' ∂ℓ/∂z ⊗ ∂t/∂h, on the weight alone: Π between the two layers."""
    n = Hidden()
    found = matrix(n.p, "pi", ("2.weight", "1")).view(3, 4, 4, 4)
    expected = torch.einsum("nc,no,ni,jo->cjoi", n.last, 1 - n.t**2, n.a, torch.eye(4).double()) / 6
    assert_near(found, expected)


def test_jacobians_of_one_hidden_layer() -> None:
    n = Hidden()
    found = cl.exact.jacobians(n.p.objective(), n.p.x)
    assert_near(found["0.weight"], n.J[..., None] * n.p.x[:, None, None])
    assert_near(found["0.bias"], n.J)
    assert_near(found["2.weight"], torch.einsum("cd,ni->ncdi", torch.eye(3).double(), n.t))
    assert_near(found["2.bias"], torch.eye(3).double().expand(6, 3, 3).contiguous())


# ------------------------------------------------------------------------------------------------
# Theorem 3


def theorem_3(G: Tensor, a: Tensor) -> Tensor:
    """(1/N) Σₙ Σ_tt' G_{n,tt'} ⊗ a_{n,t} a_{n,t'}ᵀ, from G: [N, O, T, O, T] and a: [N, T, I], entry
    by entry.
    """
    size, outputs, inputs = len(a), G.shape[1], a.shape[2]
    return (
        torch.einsum("notpu,nti,nuj->oipj", G, a, a).reshape(outputs * inputs, outputs * inputs)
        / size
    )


def of_the_convolution(p: Problem) -> tuple[Tensor, Tensor, Callable[[Tensor], Tensor]]:
    net = p.model
    unfolded = F.unfold(p.x, 3, stride=2, padding=1).mT  # [N, T, I]
    return extended(unfolded).detach(), net[0](p.x).detach(), lambda h: net[1:](h[None])


def of_the_tokens(p: Problem) -> tuple[Tensor, Tensor, Callable[[Tensor], Tensor]]:
    net = p.model
    return (
        extended(p.x),
        net.first(p.x).detach().mT,
        lambda h: net.second(torch.tanh(h.mT[None])).mean(1),
    )


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize(("model", "of"), [("conv", of_the_convolution), ("tokens", of_the_tokens)])
def test_theorem_3(
    model: str,
    of: Callable[..., tuple[Tensor, Tensor, Callable[[Tensor], Tensor]]],
    likelihood: str,
) -> None:
    """h is linear in the layer's weight, so that its blocks are those of h [N, O, *T] between the
    inputs: exactly.
    """
    p = problem(model, likelihood)
    a, h, tail = of(p)

    def loss_of(kind: Kind) -> Callable[[Tensor, Tensor], Tensor]:
        if kind == "hessian":
            return lambda h, y: p.likelihood.loss(tail(h), y[None])[0]
        return lambda h, slope: (tail(h)[0] * slope).sum()

    z = p.model(p.x).detach()
    slope = grad(lambda z: p.likelihood.loss(z, p.y).sum())(z)
    flat = h.flatten(2).shape[1:]
    holds: dict[Kind, Tensor] = {"hessian": p.y, "pi": slope}
    for kind, held in holds.items():
        G = vmap(hessian(loss_of(kind)))(h, held)
        assert_near(matrix(p, kind), theorem_3(G.detach().reshape(len(h), *flat, *flat), a))
    J = vmap(torch.func.jacrev(lambda h: tail(h)[0]))(h).detach().flatten(3)  # [N, C, O, T]
    Z = reference(model, likelihood).output_hessian
    assert_near(matrix(p, "ggn"), theorem_3(torch.einsum("ncot,ncd,ndpu->notpu", J, Z, J), a))


@pytest.mark.parametrize("kind", KINDS)
def test_two_linear_layers_are_linear_in_one_at_a_time(kind: Kind) -> None:
    """z = W₂ W₁ x: no diagonal block has a second term, the blocks between the layers have one:
    ∂ℓ/∂z ⊗ x between W₂ and W₁.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        net: Any = nn.Sequential(nn.Linear(3, 2, bias=False), nn.Linear(2, 4, bias=False)).double()
        p = Problem(net, Gaussian(), torch.randn(5, 3).double(), torch.randn(5, 4).double())
    if kind == "pi":
        assert matrix(p, kind, "1").count_nonzero() == matrix(p, kind, "2").count_nonzero() == 0
        r = net(p.x).detach() - p.y
        between = torch.einsum("nc,ni,oj->cjoi", r, p.x, torch.eye(2).double()).reshape(8, 6) / 5
        assert_near(matrix(p, kind, ("2", "1")), between)
    if kind in ("hessian", "ggn", "fisher"):
        W = net[1].weight.detach()
        assert_near(matrix(p, kind, "1"), torch.kron(W.mT @ W, p.x.mT @ p.x / 5))
        h = net[0](p.x).detach()
        assert_near(matrix(p, kind, "2"), torch.kron(torch.eye(4).double(), h.mT @ h / 5))
    if kind == "hessian":
        assert_near(
            matrix(p, kind, ("2", "1")), matrix(p, "ggn", ("2", "1")) + matrix(p, "pi", ("2", "1"))
        )


def test_a_function_of_the_weights_is_what_is_differentiated() -> None:
    """Finite differences of the loss along a line, of order ε⁴: the last word, for all routes share
    torch's derivatives.
    """
    p = problem("conv-norm", "categorical")
    weights = {n: w.detach() for n, w in p.model.named_parameters()}
    layout = p.objective().layout
    at, v = (
        layout.flatten(weights),
        torch.randn(len(layout), generator=torch.Generator().manual_seed(0)).double(),
    )

    def loss(t: float) -> float:
        return float(
            p.likelihood.loss(
                functional_call(p.model, layout.unflatten(at + t * v), (p.x,)), p.y
            ).mean()
        )

    e = 5e-3
    second = (-loss(2 * e) + 16 * loss(e) - 30 * loss(0) + 16 * loss(-e) - loss(-2 * e)) / (
        12 * e * e
    )
    assert float(v @ matrix(p, "hessian", None) @ v) == pytest.approx(second, rel=1e-6)
