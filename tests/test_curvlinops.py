"""The oracle against curvlinops, a library of others: matrices, products, drawn labels, Jacobians,
on one minibatch and many.

Its losses are torch's: for reduction "sum", Σ‖z − y‖² is 2N times our mean half square (4N in
second moments of gradients).
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from problems import LIKELIHOODS, MODELS, Problem, assert_near, in_turn, problem
from torch import Tensor, nn

import curvlab as cl
from curvlab.exact import Kind

curvlinops = pytest.importorskip(
    "curvlinops", reason="pip install --no-deps curvlinops-for-pytorch, see the README"
)

models = pytest.mark.parametrize("model", MODELS)

LOSSES = {
    "categorical": nn.CrossEntropyLoss,
    "bernoulli": nn.BCEWithLogitsLoss,
    "gaussian": nn.MSELoss,
}
OPERATORS = {
    "hessian": curvlinops.HessianLinearOperator,
    "ggn": curvlinops.GGNLinearOperator,
    "fisher": curvlinops.GGNLinearOperator,
    "ef": curvlinops.EFLinearOperator,
    "fisher-mc": curvlinops.FisherMCLinearOperator,
}
TWICE = [m for m in MODELS if m not in ("norm", "layer-norm", "conv-1d")]
"""Their Hessians are forward derivatives of a batched backward pass, which torch 2.13 lacks for
group norm (conv-1d) and gets wrong for layer norm (not symmetric between its weight and its
input).
"""


def data(p: Problem, streamed: bool) -> list[tuple[Tensor, Tensor]]:
    return (
        list(zip(p.x.split([3, 1, 3]), p.y.split([3, 1, 3]), strict=True))
        if streamed
        else [(p.x, p.y)]
    )


def theirs(
    p: Problem, likelihood: str, kind: Kind, streamed: bool = False, **options: object
) -> tuple[Any, float]:
    """(their operator, on the parameters one after the other; the scale that makes it our mean)."""
    loss = LOSSES[likelihood](reduction="sum")
    weights = list(p.objective().parameters.values())
    operator = OPERATORS[kind](
        p.model, loss, weights, data(p, streamed), check_deterministic=False, **options
    )
    square = {"gaussian": 4 if kind == "ef" else 2}.get(likelihood, 1)
    return operator, 1 / (square * len(p.x))


def order(p: Problem) -> Tensor:
    """Of our entries, in theirs."""
    return torch.cat([places.flatten() for places in p.objective().layout.places().values()])


def trained(p: Problem) -> Tensor:
    """1 but for the row of a padding token: forward mode, which they use, does not hold it fixed as
    torch's gradients do.
    """
    held = []
    for block in p.objective().blocks:
        own = torch.zeros(block.shape, dtype=torch.bool)
        if isinstance(block.module, nn.Embedding) and block.module.padding_idx is not None:
            own[:, block.module.padding_idx] = True
        held.append(own.flatten())
    return (~torch.cat(held)).double()[order(p)]


def assert_same(p: Problem, ours: Tensor, operator: Any, scale: float) -> None:
    held = trained(p)
    dense = operator @ torch.eye(len(ours), dtype=ours.dtype) * scale
    assert_near(ours[order(p)][:, order(p)], held[:, None] * dense * held)


WAYS = [("categorical", False), ("bernoulli", True), ("gaussian", False)]
WAYS += [(likelihood, not streamed) for likelihood, streamed in WAYS]
"""(likelihood, streamed): three that follow one another have all likelihoods, and both values of
the other.
"""


@pytest.mark.parametrize(("model", "kind", "way"), in_turn(MODELS, ["ggn", "fisher", "ef"], WAYS))
@pytest.mark.filterwarnings("ignore::curvlab.errors.CurvlabWarning")
def test_second_moments(model: str, kind: Kind, way: tuple[str, bool]) -> None:
    likelihood, streamed = way
    p = problem(model, likelihood)
    ours = cl.exact.matrix(p.objective(), data(p, streamed), kind=kind, block=None).dense()
    assert_same(p, ours, *theirs(p, likelihood, kind, streamed))


@pytest.mark.parametrize(
    ("model", "likelihood", "streamed"), in_turn(TWICE, LIKELIHOODS, [False, True])
)
def test_hessian(model: str, likelihood: str, streamed: bool) -> None:
    p = problem(model, likelihood)
    ours = cl.exact.matrix(p.objective(), data(p, streamed), kind="hessian", block=None).dense()
    assert_same(p, ours, *theirs(p, likelihood, "hessian", streamed))


@pytest.mark.parametrize(("model", "likelihood"), [(m, k) for m in TWICE for k in LIKELIHOODS])
def test_pi_is_their_hessian_minus_their_ggn(model: str, likelihood: str) -> None:
    p = problem(model, likelihood)
    hessian, scale = theirs(p, likelihood, "hessian")
    ours = cl.exact.matrix(p.objective(), p.x, p.y, "pi", None).dense()
    assert_same(p, ours, hessian - theirs(p, likelihood, "ggn")[0], scale)


@pytest.mark.thinned(2)
@pytest.mark.parametrize("kind", ["hessian", "ggn", "ef"])
@pytest.mark.parametrize("model", TWICE)
def test_blocks_and_products(model: str, kind: Kind) -> None:
    """Their operators on the parameters of one block; ours as a dense block and as a product."""
    p = problem(model)
    objective = p.objective()
    for block in objective.blocks:
        weights = [objective.parameters[name] for name in block.params]
        operator = OPERATORS[kind](
            p.model, nn.CrossEntropyLoss(), weights, [(p.x, p.y)], check_deterministic=False
        )
        places = block.scatter(torch.arange(block.numel))
        own = torch.cat([places[name].flatten() for name in block.params])
        held = trained(p)[order(p).argsort()][objective.layout.slices[block.name]][own]
        v = torch.randn(block.numel, 2, generator=torch.Generator().manual_seed(0)).double()
        expected = held[:, None] * (operator @ (held[:, None] * v[own]))
        for ours in (cl.exact.matrix, cl.exact.product):
            assert_near((ours(p.objective(), p.x, p.y, kind, block.name) @ v)[own], expected)


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_drawn_labels_have_the_same_mean(likelihood: str) -> None:
    """40 seeds of 25 labels each, theirs and ours: every entry of both within 5 standard errors of
    the exact one.
    """
    p = problem("tanh", likelihood)
    if likelihood == "bernoulli":  # they ask for binary targets
        p = Problem(p.model, p.likelihood, p.x, p.y.round())
    identity, at = torch.eye(len(order(p))).double(), order(p)
    objective = p.objective()
    exact = cl.exact.matrix(objective, p.x, p.y, "fisher", None).dense()[at][:, at]
    seeds = [theirs(p, likelihood, "fisher-mc", seed=seed, mc_samples=25) for seed in range(40)]
    their = torch.stack([operator @ identity * scale for operator, scale in seeds])
    ours = torch.stack(
        [
            cl.exact.matrix(objective, p.x, p.y, "fisher-mc", None, draws=25).dense()
            for _ in range(40)
        ]
    )
    for found in (their, ours[:, at][:, :, at]):
        error = found.std(0) / 40**0.5
        assert bool(((found.mean(0) - exact).abs() <= 5 * error + 1e-15).all())
    assert 0.8 < float(ours.std(0).norm() / their.std(0).norm()) < 1.25  # as noisy as theirs


@models
def test_jacobians(model: str) -> None:
    p = problem(model)
    weights = list(p.objective().parameters.values())
    operator = curvlinops.JacobianLinearOperator(
        p.model, weights, [(p.x, p.y)], check_deterministic=False
    )
    dense = operator @ torch.eye(operator.shape[1]).double() * trained(p)
    found = cl.exact.jacobians(p.objective(), p.x)
    assert_near(torch.cat([j.flatten(2) for j in found.values()], 2).flatten(0, 1), dense)
