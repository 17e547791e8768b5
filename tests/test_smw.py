"""SMW-NG by block, SMW-NG and SMW-GN of the whole: small systems that must be the dense solve, to
rounding; the LM rule.
"""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from problems import (
    LIKELIHOODS,
    MODELS,
    RULED,
    Problem,
    assert_near,
    batches,
    curvature_of,
    problem,
)
from reference import Reference
from torch import Tensor

import curvlab as cl
from curvlab import runs
from curvlab.algorithms import approximation
from curvlab.curvature.whole_vector import subset
from curvlab.linalg.operators import LowRank
from curvlab.linalg.woodbury import LayerRows, Rows
from curvlab.observation import Pass, Transition
from curvlab.optim import Optimizer
from curvlab.statistics import LayerStatistics

LABELS: list[Pass] = ["data", "model", "exact"]


def random_like(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(8), dtype=torch.float64)


@pytest.mark.parametrize("labels", LABELS)
@pytest.mark.parametrize("model", RULED)
@pytest.mark.parametrize("damping", [1e-3, 1.0])
def test_direction_is_the_dense_solve(model: str, labels: Pass, damping: float) -> None:
    """(λI + (1/N) Σ vec vecᵀ) p = v with the rows of the pass, stacked and solved as a dense system
    (thesis (5.6)).
    """
    p = problem(model)
    objective = p.objective()
    curvature = approximation("smw-ng-bd", objective, labels=labels, damping=damping)
    observation = objective.closure(p.x, p.y).observe(curvature.needs)
    curvature.update(observation)
    for block in objective.blocks:
        rows = observation.passes["apart" if labels == "exact" else labels][
            block.name
        ].rows.reshape(-1, block.numel)
        damped = rows.T @ rows / len(p.x) + damping * torch.eye(block.numel, dtype=torch.float64)
        vector = random_like(block.shape)
        found = curvature.precondition({block.name: vector})[block.name]
        torch.testing.assert_close(
            found.flatten(), torch.linalg.solve(damped, vector.flatten()), rtol=1e-10, atol=1e-10
        )
        torch.testing.assert_close(
            curvature.inverse[block.name].inv().dense(), damped, rtol=1e-11, atol=1e-13
        )


@pytest.mark.parametrize("labels", LABELS)
@pytest.mark.parametrize("model", RULED)
@pytest.mark.parametrize("n", [1, 7, 40])
def test_is_the_block_fisher_of_one_minibatch(model: str, labels: Pass, n: int) -> None:
    """Also where there are more rows than parameters (n = 40), and where the passes sum over V and
    T.
    """
    p = problem(model, n=n)
    objective = p.objective()
    smw, dense = (
        approximation(name, objective, labels=labels, damping=0.01)
        for name in ("smw-ng-bd", "block-fisher")
    )
    observation = objective.closure(p.x, p.y).observe(smw.needs)
    for curvature in (smw, dense):
        curvature.update(observation)
    for name, inverse in smw.inverse.items():
        torch.testing.assert_close(
            inverse.dense(), dense.inverse[name].dense(), rtol=1e-10, atol=1e-10
        )
        torch.testing.assert_close(
            inverse.eigvalsh(), dense.inverse[name].eigvalsh(), rtol=1e-10, atol=1e-10
        )


@pytest.mark.parametrize("labels", LABELS)
@pytest.mark.parametrize("model", ["tanh", "tokens", "groups", "embedding"])
def test_blocks_of_some_examples_are_the_block_fisher_of_those(model: str, labels: Pass) -> None:
    """N₂ ⊂ N₁ (Alg. 23, line 3) by block: rows of the first three of seven, a mean over three."""
    p = problem(model)
    objective = p.objective()
    curvature = approximation("smw-ng-bd", objective, labels=labels, damping=0.1, curvature_size=3)
    observation = objective.closure(p.x, p.y).observe({labels})
    curvature.update(observation)
    for block in objective.blocks:
        rows = observation.passes[labels][block.name].rows[:, :3].reshape(-1, block.numel)
        damped = rows.T @ rows / 3 + 0.1 * torch.eye(block.numel, dtype=torch.float64)
        torch.testing.assert_close(
            curvature.inverse[block.name].inv().dense(), damped, rtol=1e-11, atol=1e-13
        )
    with pytest.raises(
        cl.CurvlabError, match="curvature_size must be a positive number of examples"
    ):
        approximation("smw-ng-bd", objective, curvature_size=0)


def test_remembers_the_last_minibatch_alone() -> None:
    p = problem("tanh")
    objective = p.objective()
    curvature, fresh = (approximation("smw-ng-bd", objective, damping=0.01) for _ in range(2))
    for x, y in batches(p, 3):
        observation = objective.closure(x, y).observe(curvature.needs)
        curvature.update(observation)
    fresh.update(observation)
    for name, inverse in curvature.inverse.items():
        assert torch.equal(inverse.dense(), fresh.inverse[name].dense())


def test_one_place_forms_no_gradients() -> None:
    """At T = 1, V = 1 the rows stay factored, g and a: N (O + I) numbers in place of N O I."""
    p = problem("tanh")
    objective = p.objective()
    curvature = approximation("smw-ng-bd", objective, damping=0.01)
    curvature.update(objective.closure(p.x, p.y).observe(curvature.needs))
    operator = curvature.inverse["1"].inv()
    assert isinstance(operator, LowRank)
    rows: Any = operator.rows
    assert rows.g.shape == (7, 4)
    assert rows.a is not None
    assert rows.a.shape == (7, 6)


# ------------------------------------------------------------------------------------------------
# the whole vector


def flat(objective: cl.Objective, tensors: dict[str, Tensor]) -> Tensor:
    return torch.cat([tensors[b.name].flatten() for b in objective.blocks])


def expected_matrix(p: Problem, labels: Pass, objective: cl.Objective, number: int = 1) -> Tensor:
    """By `torch.func` over one flat vector: nothing of captures, roots or rows."""
    r = Reference(p)
    if labels == "model":
        return r.drawn([p.likelihood.sample(r.z, objective.generator(number))])
    return r["ef" if labels == "data" else "ggn"]


def eye(n: int) -> Tensor:
    return torch.eye(n, dtype=torch.float64)


@pytest.mark.parametrize("size", [None, 30])
@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("model", MODELS)
def test_smw_gn_is_the_dense_solve_of_the_whole(
    model: str, likelihood: str, size: int | None
) -> None:
    """Groups, tokens, convolutions, tokens with padding, parameters without a rule; all of N₂ > N
    examples too.
    """
    p = problem(model, likelihood)
    objective = p.objective()
    curvature = approximation("smw-gn", objective, damping=0.1, curvature_size=size)
    observation = objective.closure(p.x, p.y).observe(curvature.needs | {"data"})
    curvature.update(observation)
    damped = Reference(p)["ggn"] + 0.1 * eye(len(objective.layout))
    found = flat(objective, curvature.precondition(observation.gradients))
    torch.testing.assert_close(
        found,
        torch.linalg.solve(damped, flat(objective, observation.gradients)),
        rtol=1e-10,
        atol=1e-11,
    )
    assert_near(curvature.inverse["whole"].inv().dense(), damped)
    assert_near(curvature.inverse["whole"].dense(), torch.linalg.inv(damped), 1e-10)


@pytest.mark.parametrize("labels", LABELS)
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("likelihood", ["categorical", "gaussian"])
def test_smw_ng_is_the_dense_solve_of_the_whole(model: str, likelihood: str, labels: Pass) -> None:
    """(5.3) at the data's labels, at drawn ones, at all of them."""
    p = problem(model, likelihood)
    objective = p.objective()
    curvature = approximation("smw-ng", objective, damping=0.1, labels=labels)
    curvature.update(objective.closure(p.x, p.y).observe(curvature.needs))
    damped = expected_matrix(p, labels, objective) + 0.1 * eye(len(objective.layout))
    assert_near(curvature.inverse["whole"].dense(), torch.linalg.inv(damped), 1e-10)
    if labels == "exact":
        assert_near(Reference(p)["fisher"], Reference(p)["ggn"], 1e-10)


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_is_the_thesis_by_either_formula(likelihood: str) -> None:
    """(5.6) where every H_i has an inverse, (5.7) always; softmax has none, and S takes its
    place.
    """
    p = problem("tanh", likelihood)
    objective = p.objective()
    curvature = approximation("smw-gn", objective, damping=0.2)
    curvature.update(objective.closure(p.x, p.y).observe(curvature.needs))
    r, n, lam = Reference(p), len(p.x), 0.2
    J, H = r.jacobian.flatten(0, 1), torch.block_diag(*r.output_hessian)
    D = lam * eye(len(J)) + J @ J.T @ H / n  # (5.7)
    assert_near(
        curvature.inverse["whole"].dense(),
        (eye(J.shape[1]) - J.T @ H @ torch.linalg.solve(D, J) / n) / lam,
        1e-10,
    )
    singular = bool((torch.linalg.eigvalsh(r.output_hessian)[:, 0].abs() < 1e-12).all())
    assert singular is (likelihood == "categorical")
    if not singular:
        D = lam * torch.linalg.inv(H) + J @ J.T / n  # (5.6)
        assert_near(
            curvature.inverse["whole"].dense(),
            (eye(J.shape[1]) - J.T @ torch.linalg.solve(D, J) / n) / lam,
            1e-10,
        )


@pytest.mark.parametrize("name", ["smw-ng", "smw-gn"])
@pytest.mark.parametrize("labels", LABELS)
@pytest.mark.parametrize("model", ["tanh", "conv-1d", "norm", "embedding"])
def test_curvature_of_some_examples_and_gradient_of_all(
    name: str, labels: Pass, model: str
) -> None:
    """S₂ ⊂ S₁ drawn from the minibatch (Alg. 23, line 3); labels drawn for S₁ are those of S₂."""
    p = problem(model, n=9)
    objective = p.objective()
    curvature = approximation(name, objective, damping=0.1, labels=labels, curvature_size=4)
    for number in (1, 2):
        closure = objective.closure(p.x, p.y)
        curvature.update(closure.observe(curvature.needs))
        chosen = subset(closure, 4)
        some = Problem(p.model, p.likelihood, p.x[chosen], p.y[chosen])
        if labels == "model":
            drawn = p.likelihood.sample(Reference(p).z, objective.generator(number))[chosen]
            expected = Reference(some).drawn([drawn])
        else:
            expected = expected_matrix(some, labels, objective)
        assert_near(
            curvature.inverse["whole"].inv().dense(),
            expected + 0.1 * eye(len(objective.layout)),
            1e-11,
        )


def test_one_place_forms_no_gradient_of_an_example(monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers kept: V N O and N I of each layer; the inputs are not repeated for the V vectors."""

    def never(*arguments: object) -> Tensor:
        raise AssertionError("rows were formed")

    monkeypatch.setattr(LayerStatistics, "rows", property(never))
    monkeypatch.setattr(LayerRows, "_rows", never)
    p = problem("tanh")
    objective = p.objective()
    optimizer = cl.optimizer("smw-gn", objective)
    optimizer.step(objective.closure(p.x, p.y))
    first = curvature_of(optimizer).inverse["whole"].inv().rows.parts[0]
    assert (first.g.shape, first.a.shape) == ((3, 7, 1, 1, 4), (7, 1, 1, 6))


@pytest.mark.parametrize(("places", "formed"), [(2, False), (40, True)])
def test_rows_of_many_places_are_formed_where_they_are_fewer_numbers(
    places: int, formed: bool
) -> None:
    """Tokens: T (V O + I) against V O I, at V = 3, O = 3, I = 5 of the last layer; the first goes
    its own way.
    """
    p = problem("tokens")
    p = Problem(
        p.model,
        p.likelihood,
        torch.randn(7, places, 3, generator=torch.Generator().manual_seed(2)).double(),
        p.y,
    )
    objective = p.objective()
    curvature = approximation("smw-gn", objective, damping=0.1)
    curvature.update(objective.closure(p.x, p.y).observe(curvature.needs))
    whole: Any = curvature.inverse["whole"].inv()
    assert isinstance(whole.rows.parts[1], Rows if formed else LayerRows)
    assert_near(
        curvature.inverse["whole"].inv().dense(),
        Reference(p)["ggn"] + 0.1 * eye(len(objective.layout)),
    )


@pytest.mark.parametrize("ratio", ["direction", "step"])
@pytest.mark.parametrize("damping", [0.002, 0.12, 1.001, 30.0])
@pytest.mark.parametrize("name", ["smw-ng", "smw-gn"])
def test_damping_follows_the_reduction_ratio(name: str, damping: float, ratio: str) -> None:
    """ρ of (5.5) by hand: dense B without λ on S₂, f and g on S₁, at p or at the step α p that was
    taken.
    """
    p = problem("tanh", n=9)
    objective = p.objective()
    optimizer = cl.optimizer(
        name, objective, lr=0.5, damping=damping, ratio=ratio, curvature_size=4
    )
    closure = objective.closure(p.x, p.y)
    chosen = subset(closure, 4)
    some, whole = Reference(Problem(p.model, p.likelihood, p.x[chosen], p.y[chosen])), Reference(p)
    B, g = some["ef" if name == "smw-ng" else "ggn"], whole.gradients(p.y).mean(0)
    step = -torch.linalg.solve(B + damping * eye(len(B)), g) * (
        1.0 if ratio == "direction" else 0.5
    )

    def f(d: Tensor) -> float:
        moved = whole.at.clone()
        moved[whole.order] += d
        return float(p.likelihood.loss(whole.outputs(moved, p.x), p.y).mean())

    rho = (f(torch.zeros_like(g)) - f(step)) / -float(g @ step + step @ B @ step / 2)
    factor = 1.01 if rho < 0.25 else 0.99 if rho > 0.75 else 1.0
    optimizer.step(closure)
    assert optimizer.descent.curvature.damping == pytest.approx(
        0.001 + factor * (damping - 0.001), rel=1e-12
    )
    assert optimizer.param_groups[0]["damping"] == optimizer.descent.curvature.damping


def overshooting(**options: Any) -> tuple[Problem, cl.Objective, Optimizer]:
    """Natural gradient of few examples, barely damped: far too long a step."""
    p = problem("tanh", n=9)
    objective = p.objective()
    options = {"lr": 1.0, "damping": 0.0011, "curvature_size": 3} | options
    return p, objective, cl.optimizer("smw-ng", objective, **options)


def test_a_rejected_step_is_taken_back_bit_for_bit() -> None:
    p, objective, optimizer = overshooting(semi_stochastic=True)
    before = {n: w.detach().clone() for n, w in objective.parameters.items()}
    loss = optimizer.step(objective.closure(p.x, p.y))
    assert all(torch.equal(w, before[n]) for n, w in objective.parameters.items())
    assert optimizer.descent.curvature.damping == pytest.approx(0.001 + 1.01 * 0.0001, rel=1e-12)
    assert torch.equal(optimizer.step(objective.closure(p.x, p.y)), loss)
    p, objective, optimizer = overshooting()
    optimizer.step(objective.closure(p.x, p.y))
    assert float(objective.closure(p.x, p.y).observe().loss) > float(loss)


def losses_and_slopes(
    steps: int, **options: Any
) -> tuple[list[float], list[float], int, cl.Objective]:
    p, objective, optimizer = overshooting(boost=1.5, drop=0.8, **options)
    losses, slopes, rejected = [], [], 0
    for _ in range(steps):
        observation = objective.closure(p.x, p.y, "exact").observe()
        slopes.append(float(flat(objective, observation.gradients).norm()))
        before = [w.detach().clone() for w in objective.parameters.values()]
        losses.append(float(optimizer.step(objective.closure(p.x, p.y))))
        rejected += all(
            torch.equal(a, b) for a, b in zip(before, objective.parameters.values(), strict=True)
        )
        assert optimizer.descent.curvature.damping >= 0.001
    return losses, slopes, rejected, objective


def test_theorem_6() -> None:
    """Full gradient, subsampled B, α = 1, steps with ρ < η taken back: f never rises, the gradient
    goes to zero.

    Without rejection, from the same start, f rises.
    """
    losses, slopes, rejected, _ = losses_and_slopes(400, semi_stochastic=True)
    assert all(after <= before for before, after in pairwise(losses))
    assert 5 <= rejected <= 200
    assert slopes[-1] < 1e-2 * slopes[0]
    losses, *_ = losses_and_slopes(20)
    assert any(after > before for before, after in pairwise(losses))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eta": 0.25}, "eta must lie between 0 and epsilon = 0.25"),
        ({"curvature_size": 0}, "curvature_size must be a positive number of examples"),
        ({"ratio": "steps"}, "unknown ratio of smw-gn 'steps'"),
        ({"boost": 1.0}, "boost of the Levenberg-Marquardt rule must be a number above 1"),
        ({"update_every": 0}, "update_every must be 1 or more"),
        ({"pairs": 3}, "unknown option of smw-gn 'pairs'"),
    ],
)
def test_arguments_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(cl.CurvlabError, match=message):
        approximation("smw-gn", problem().objective(), **options)


def test_the_whole_vector_needs_every_block() -> None:
    p = problem()
    objective = p.objective()
    curvature = approximation("smw-ng", objective)
    gradients = objective.closure(p.x, p.y).observe().gradients
    curvature.update(objective.closure(p.x, p.y).observe())
    with pytest.raises(cl.CurvlabError, match=r"gradient of block 2 .* is missing"):
        curvature.precondition({"1": gradients["1"], "3": gradients["3"]})
    by_parameter = {n: t for b in objective.blocks for n, t in b.scatter(gradients[b.name]).items()}
    found, expected = curvature.precondition(by_parameter), curvature.precondition(gradients)
    for block in objective.blocks:
        assert torch.equal(block.gather(found), expected[block.name])


# ------------------------------------------------------------------------------------------------
# by block, with the rule


def test_damping_of_the_blocks_follows_their_model_together() -> None:
    """m(p) with the block-diagonal B, by dense matrices."""
    p = problem("tanh")
    objective = p.objective()
    optimizer = cl.optimizer("smw-ng-bd", objective, damping=0.5, labels="data")
    r = Reference(p)
    B = torch.block_diag(*(r["ef"][s, s] for s in r.slices.values()))
    g = r.gradients(p.y).mean(0)
    step = -torch.linalg.solve(B + 0.5 * eye(len(B)), g)
    moved = r.at.clone()
    moved[r.order] += step
    actual = (
        p.likelihood.loss(r.z, p.y).mean() - p.likelihood.loss(r.outputs(moved, p.x), p.y).mean()
    )
    rho = float(actual / -(g @ step + step @ B @ step / 2))
    observation = objective.closure(p.x, p.y).observe()
    optimizer.descent.direction(observation)
    transition = Transition(
        observation,
        observation,
        lambda: {b.name: torch.zeros(b.shape).double() for b in objective.blocks},
    )
    found: list[float] = []
    curvature = curvature_of(optimizer)
    rule = curvature.levenberg

    def told(damping: float, ratio: float) -> float:
        found.append(ratio)
        return float(rule.adapted(damping, ratio))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(curvature, "levenberg", SimpleNamespace(adapted=told))
        held = curvature.damping
        curvature.learn(transition)
        curvature.damping = held
    assert found == [pytest.approx(rho, rel=1e-10)]
    factor = 1.01 if rho < 0.25 else 0.99 if rho > 0.75 else 1.0
    assert optimizer.descent.learn(transition)
    assert optimizer.descent.curvature.damping == pytest.approx(0.001 + factor * 0.499, rel=1e-12)


@pytest.mark.parametrize("name", ["smw-ng-bd", "smw-ng", "smw-gn", "hf"])
def test_a_comparison_holds_the_damping(name: str) -> None:
    p = problem("tanh", n=9)
    settings = runs.CompareSettings(reference=name, algorithms=(name,), damping=0.02)
    curvature = settings.descents(p.objective(), 9)[name].curvature
    assert not curvature.wants_step
    free, held = (
        cl.optimizer(name, problem().objective(), damping=0.02, adapt=adapt)
        for adapt in (True, False)
    )
    for optimizer in (free, held):
        optimizer.step(optimizer.objective.closure(p.x, p.y))
    assert held.param_groups[0]["damping"] == 0.02
    assert free.param_groups[0]["damping"] != 0.02
