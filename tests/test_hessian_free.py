"""Hessian-free: run to the end it is SMW-GN; stopping, start, backtracking and the LM rule against
what is written out.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from problems import LIKELIHOODS, MODELS, Problem, WithNorm, assert_near, batches, problem
from reference import Reference
from test_smw import expected_matrix, eye, flat
from torch import Tensor, nn

import curvlab as cl
from curvlab.algorithms import approximation
from curvlab.curvature.whole_vector import loss_at, subset, unflat
from curvlab.linalg.krylov import truncated_cg
from curvlab.observation import Pass

TO_THE_END: dict[str, Any] = {"progress": 0.0, "backtrack": False}


@pytest.mark.thinned(2)
@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("model", MODELS)
def test_run_to_the_end_it_is_smw_gn(model: str, likelihood: str) -> None:
    p = problem(model, likelihood, n=9)
    objective = p.objective()
    hf = approximation("hf", objective, damping=0.1, curvature_size=5, **TO_THE_END)
    gn = approximation("smw-gn", objective, damping=0.1, curvature_size=5)
    observation = objective.closure(p.x, p.y).observe()
    for curvature in (hf, gn):
        curvature.update(observation)
    found, expected = (c.precondition(observation.gradients) for c in (hf, gn))
    assert_near(flat(objective, found), flat(objective, expected), 1e-10)
    vector = torch.randn(
        len(objective.layout), generator=torch.Generator().manual_seed(1), dtype=torch.float64
    )
    assert_near(hf.inverse["whole"] @ vector, gn.inverse["whole"] @ vector, 1e-10)


@pytest.mark.parametrize("labels", ["data", "model", "exact"])
@pytest.mark.parametrize("model", ["tanh", "norm", "conv-1d"])
def test_labels_choose_the_matrix(model: str, labels: Pass) -> None:
    p = problem(model)
    objective = p.objective()
    curvature = approximation("hf", objective, damping=0.1, labels=labels)
    curvature.update(objective.closure(p.x, p.y).observe(curvature.needs))
    assert_near(
        curvature.inverse["whole"].inv().dense(),
        expected_matrix(p, labels, objective) + 0.1 * eye(len(objective.layout)),
    )


def test_the_operator_stays_when_the_weights_move() -> None:
    p = problem("tanh")
    objective = p.objective()
    curvature = approximation("hf", objective, damping=0.1)
    curvature.update(objective.closure(p.x, p.y).observe(curvature.needs))
    before = curvature.inverse["whole"].dense()
    with torch.no_grad():
        for w in p.model.parameters():
            w.add_(1.0)
    assert torch.equal(curvature.inverse["whole"].dense(), before)
    vector = torch.ones(len(before), dtype=torch.float64)
    assert_near(curvature.inverse["whole"] @ vector, before @ vector, 1e-10)


def test_starts_from_the_last_direction_and_can_be_asked_twice() -> None:
    """0.95 of it; a second product in the same step starts there too, and so gives the same
    bits.
    """
    p = problem("tanh")
    objective = p.objective()
    curvature = approximation("hf", objective, damping=0.1, backtrack=False, iterations=3)
    last = None
    for x, y in batches(p, 3):
        observation = objective.closure(x, y).observe()
        curvature.update(observation)
        g = flat(objective, observation.gradients)
        dense = torch.linalg.inv(curvature.inverse["whole"].dense())
        expected = by_hand(dense, g, torch.zeros_like(g) if last is None else 0.95 * last, 5e-4, 3)[
            -1
        ]
        found = curvature.precondition(observation.gradients)
        assert_near(flat(objective, found), expected, 1e-9)
        again = curvature.precondition(observation.gradients)
        assert all(torch.equal(again[name], t) for name, t in found.items())
        last = flat(objective, found)


def by_hand(A: Tensor, b: Tensor, x: Tensor, progress: float, maximum: int) -> list[Tensor]:
    """Martens 2010, Alg. 2 (plain conjugate gradients) and section 4.4; φ by its definition,
    iterates from x₀.
    """

    def phi(x: Tensor) -> float:
        return float(0.5 * x @ A @ x - b @ x)

    iterates, r = [x], A @ x - b
    d = -r
    for i in range(1, maximum + 1):
        alpha = (r @ r) / (d @ A @ d)
        x, new = x + alpha * d, r + alpha * (A @ d)
        d, r = -new + (new @ new) / (r @ r) * d, new
        iterates.append(x)
        k = max(10, math.ceil(0.1 * i))
        if i > k and phi(x) < 0 and (phi(x) - phi(iterates[i - k])) / phi(x) < k * progress:
            break
    return iterates


def system(least: float) -> tuple[Tensor, Tensor, Tensor]:
    """A matrix with eigenvalues from `least` to 10, a right-hand side and a start."""
    m = torch.randn(150, 150, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    basis = torch.linalg.qr(m)[0]
    return (
        basis
        @ torch.diag(torch.logspace(math.log10(least), 1, 150, dtype=torch.float64))
        @ basis.T,
        m[0],
        m[1],
    )


@pytest.mark.parametrize("least", [0.1, 1.0])
@pytest.mark.parametrize("started", [False, True])
@pytest.mark.parametrize(
    ("progress", "maximum"), [(5e-4, 120), (1e-2, 120), (1e-5, 120), (5e-4, 7)]
)
def test_stops_and_keeps_as_martens_does(
    least: float, started: bool, progress: float, maximum: int
) -> None:
    A, b, start = system(least)
    expected = by_hand(A, b, start if started else torch.zeros_like(b), progress, maximum)
    run = truncated_cg(
        cl.linalg.operators.Dense(A),
        b,
        start if started else None,
        progress=progress,
        maximum=maximum,
    )
    assert run.iterations == len(expected) - 1
    assert run.stopped is (maximum == 120)
    assert_near(run.x, expected[-1], 1e-8)
    kept = sorted(
        {math.ceil(1.3**j) for j in range(1, 30) if math.ceil(1.3**j) <= run.iterations}
        | {run.iterations}
    )
    assert len(run.iterates) == len(run.values) == len(kept)
    for i, x, value in zip(kept, run.iterates, run.values, strict=True):
        assert_near(x, expected[i], 1e-8)
        assert value == pytest.approx(float(0.5 * x @ A @ x - b @ x), rel=1e-9)


def test_the_rule_looks_further_back_in_long_runs() -> None:
    """k = ⌈i / 10⌉ beyond 100 iterations, on the values of runs of every length (two recursions
    would drift apart).
    """
    A, b, _ = system(1e-4)
    dense = cl.linalg.operators.Dense(A)
    values = [0.0] + [
        truncated_cg(dense, b, progress=0.0, maximum=i).values[-1] for i in range(1, 400)
    ]
    ends = []
    for progress in (3e-4, 1e-4, 1e-5):
        rule = [
            i for i in range(11, 400) for k in [max(10, math.ceil(i / 10))]
            if values[i] < 0 and (values[i] - values[i - k]) / values[i] < k * progress
        ]  # fmt: skip
        ends.append(rule[0])
        assert truncated_cg(dense, b, progress=progress, maximum=400).iterations == rule[0]
    assert ends[0] > 100


def test_conjugate_gradients_refuse_what_is_not_definite() -> None:
    A = torch.diag(torch.tensor([1.0, -1.0], dtype=torch.float64))
    with pytest.raises(
        cl.CurvlabError, match=r"pᵀAp = .* at iteration 1: the matrix is not positive definite"
    ):
        truncated_cg(cl.linalg.operators.Dense(A), torch.tensor([0.1, 1.0], dtype=torch.float64))
    zero = truncated_cg(cl.linalg.operators.Dense(eye(2)), torch.zeros(2, dtype=torch.float64))
    assert (zero.iterations, zero.stopped, bool(zero.x.any())) == (0, True, False)
    with pytest.raises(cl.CurvlabError, match="a maximum of at least 1"):
        truncated_cg(
            cl.linalg.operators.Dense(eye(2)), torch.ones(2, dtype=torch.float64), maximum=0
        )


@pytest.mark.parametrize(("damping", "size", "back"), [(1e-4, 3, True), (1.0, None, False)])
def test_goes_back_for_as_long_as_the_loss_falls(
    damping: float, size: int | None, back: bool
) -> None:
    """S₂ of three examples: the last iterates fit them, and not the minibatch."""
    p = problem("tanh", n=20)
    objective = p.objective()
    curvature = approximation("hf", objective, damping=damping, curvature_size=size)
    closure = objective.closure(p.x, p.y)
    observation = closure.observe()
    curvature.update(observation)
    run = truncated_cg(curvature.inverse["whole"].inv(), flat(objective, observation.gradients))
    losses = [float(loss_at(closure, unflat(objective.layout, -x))) for x in run.iterates]
    place = len(losses) - 1
    while place and losses[place - 1] < losses[place]:
        place -= 1
    found = flat(objective, curvature.precondition(observation.gradients))
    assert torch.equal(found, run.iterates[place])
    assert (place < len(losses) - 1) is back


@pytest.mark.parametrize("ratio", ["direction", "step"])
@pytest.mark.parametrize("damping", [0.002, 0.02, 1.001])
def test_damping_follows_the_reduction_ratio(damping: float, ratio: str) -> None:
    p = problem("tanh", n=9)
    objective = p.objective()
    optimizer = cl.optimizer(
        "hf", objective, lr=0.5, damping=damping, ratio=ratio, curvature_size=4
    )
    closure = objective.closure(p.x, p.y)
    chosen = subset(closure, 4)
    B = Reference(Problem(p.model, p.likelihood, p.x[chosen], p.y[chosen]))["ggn"]
    g = Reference(p).gradients(p.y).mean(0)
    before = Reference(p).at
    loss = float(optimizer.step(closure))
    moved = Reference(p).at - before
    step = moved[Reference(p).order] * (2.0 if ratio == "direction" else 1.0)
    at = before.clone()
    at[Reference(p).order] += step
    actual = loss - float(p.likelihood.loss(Reference(p).outputs(at, p.x), p.y).mean())
    rho = actual / -float(g @ step + step @ B @ step / 2)
    factor = 1.01 if rho < 0.25 else 0.99 if rho > 0.75 else 1.0
    assert optimizer.param_groups[0]["damping"] == pytest.approx(
        0.001 + factor * (damping - 0.001), rel=1e-12
    )


def test_refuses_a_model_that_mixes_its_examples() -> None:
    p = problem("batch-norm")
    objective = cl.Objective(WithNorm(nn.BatchNorm1d).double().train(), p.likelihood)
    optimizer = cl.optimizer("hf", objective)
    with pytest.raises(cl.CurvlabError, match="normalises over the batch"):
        optimizer.step(objective.closure(p.x, p.y))


@pytest.mark.parametrize("option", [{"iterations": 0}, {"progress": -1.0}, {"reuse": 1.5}])
def test_arguments_out_of_range(option: dict[str, Any]) -> None:
    with pytest.raises(cl.CurvlabError, match="conjugate gradients need iterations of at least 1"):
        approximation("hf", problem().objective(), **option)
