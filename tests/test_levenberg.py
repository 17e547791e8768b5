"""The Levenberg–Marquardt rule by hand, and ρ of (5.5) on a loss that is its own model."""

from __future__ import annotations

import copy
import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from problems import Problem, problem
from torch import Tensor, nn

import curvlab as cl
from curvlab.algorithms import approximation
from curvlab.curvature.levenberg_marquardt import (
    LevenbergMarquardt,
    predicted_reduction,
    ratio_at,
    reduction_ratio,
)
from curvlab.exact.batches import Kind
from curvlab.observation import Observation, Transition

RULE = LevenbergMarquardt()


@pytest.mark.parametrize(
    ("rho", "factor"),
    [
        (-math.inf, 1.01), (-3.0, 1.01), (0.0, 1.01), (0.2499, 1.01),
        (0.25, 1.0), (0.5, 1.0), (0.75, 1.0), (math.nan, 1.0),
        (0.7501, 0.99), (1.0, 0.99), (math.inf, 0.99),
    ],
)  # fmt: skip
def test_the_rule_as_printed(rho: float, factor: float) -> None:
    """Thesis 5.2.3: strictly below ε, strictly above 1 − ε; λ = λ_LM + τ with λ_LM from 1."""
    assert RULE.adapted(1.001, rho) == pytest.approx(factor * 1 + 0.001, rel=1e-14)
    assert factor != 1 or RULE.adapted(0.1 + 0.2, rho) == 0.1 + 0.2


@given(st.lists(st.sampled_from([0.0, 0.5, 1.0]), max_size=60), st.floats(0.0011, 100))
def test_many_changes_multiply(ratios: list[float], damping: float) -> None:
    found, lm = damping, damping - RULE.tau
    for rho in ratios:
        found = RULE.adapted(found, rho)
        lm *= 1.01 if rho < 0.25 else 0.99 if rho > 0.75 else 1
    assert found == pytest.approx(lm + RULE.tau, rel=1e-10)


def test_what_falls_for_ever_can_rise_again() -> None:
    """λ ends at τ, not below, and not where a boost is lost in rounding."""
    damping = 1.001
    for _ in range(10_000):
        damping = RULE.adapted(damping, 1.0)
    assert RULE.tau < damping < RULE.tau * (1 + 1e-7)
    for _ in range(3000):
        damping = RULE.adapted(damping, 0.0)
    assert damping > 1
    assert LevenbergMarquardt(boost=1.5, drop=2 / 3, tau=0.0).adapted(0.3, 0.0) == pytest.approx(
        0.45
    )
    assert RULE.adapted(1e-5, 0.0) > RULE.tau  # a damping below τ that was given
    assert RULE.adapted(1e-5, 0.5) == 1e-5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"boost": 1.0}, "boost .* above 1"),
        ({"drop": 1.0}, "drop .* between 0 and 1"),
        ({"epsilon": 0.5}, "epsilon"),
        ({"tau": -1}, "tau"),
    ],
)
def test_arguments_out_of_range(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(cl.CurvlabError, match=message):
        LevenbergMarquardt(**arguments)


@pytest.mark.parametrize(
    ("actual", "predicted", "rho"),
    [
        (1.0, 2.0, 0.5),
        (-1.0, 2.0, -0.5),
        (1.0, -2.0, -math.inf),
        (1.0, 0.0, -math.inf),
        (-math.inf, 1.0, -math.inf),
        (math.nan, 1.0, -math.inf),
        (1.0, math.nan, -math.inf),
        (1.0, math.inf, 0.0),
    ],
)
def test_reduction_ratio(actual: float, predicted: float, rho: float) -> None:
    assert reduction_ratio(actual, predicted) == rho


def test_no_move_has_no_ratio() -> None:
    assert math.isnan(reduction_ratio(0.0, 0.0))


def quadratic() -> tuple[Problem, cl.Objective, Observation, Tensor]:
    """Least squares in a linear layer: the Gauss-Newton model is the loss."""
    p = problem("linear", "gaussian")
    objective = p.objective()
    return (
        p,
        objective,
        objective.closure(p.x, p.y).observe(),
        cl.exact.matrix(objective, p.x, p.y, "ggn", None).dense(),
    )


@pytest.mark.parametrize("taken", [0.0, 0.3, 1.0])
def test_ratio_of_a_quadratic_is_one_wherever_the_weights_are(taken: float) -> None:
    """ρ = 1 at every p. The weights stand at `taken` of it."""
    p, objective, before, B = quadratic()
    g = before.gradients["1"].flatten()
    step = -torch.linalg.solve(B + 0.1 * torch.eye(18, dtype=torch.float64), g)
    assert predicted_reduction(g, step, B @ step) == pytest.approx(
        -float(g @ step + 0.5 * step @ (B @ step)), rel=1e-14
    )
    with torch.no_grad():
        for name, d in objective.layout.unflatten(taken * step).items():
            p.model.get_parameter(name).add_(d)
    after = before.closure.observe(frozenset())
    transition = Transition(before, after, lambda: {"1": (taken * step).view(3, 6)})
    assert ratio_at(transition, objective.layout, step, B @ step) == pytest.approx(1.0, rel=1e-11)
    assert ratio_at(transition, objective.layout, step, 0 * step) != pytest.approx(1.0, rel=1e-3)


def test_a_loss_that_overflows_is_no_reduction() -> None:
    p = problem("linear", "gaussian")
    objective = p.objective()
    before = objective.closure(p.x, p.y).observe()
    huge = torch.full((18,), 1e200, dtype=torch.float64)
    transition = Transition(before, before, lambda: {"1": torch.zeros(3, 6, dtype=torch.float64)})
    assert ratio_at(transition, objective.layout, -huge, 0 * huge) == -math.inf


@pytest.mark.filterwarnings("ignore:parameters of layers without a rule")
def test_ratio_of_a_method_of_blocks_where_a_layer_has_no_rule(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its parameters lie between those of the others. ρ at p = −H g by hand, block by block."""
    p = problem("norm")
    objective = p.objective()
    optimizer = cl.optimizer("smw-ng-bd", objective, lr=1.0, damping=2.0)
    curvature: Any = optimizer.descent.curvature
    now = objective.closure(p.x, p.y).observe()
    start, found = copy.deepcopy(p.model), []
    told = LevenbergMarquardt.adapted
    monkeypatch.setattr(
        LevenbergMarquardt,
        "adapted",
        lambda rule, d, rho: found.append(rho) or told(rule, d, rho),  # type: ignore[func-returns-value]  # for its effect
    )
    optimizer.step(objective.closure(p.x, p.y))
    predicted = 0.0
    for block in objective.blocks:
        g, own = now.gradients[block.name].flatten(), curvature.blocks[block.name].matrix()
        step = -(curvature.inverse[block.name] @ g)
        predicted -= float(g @ step + (step if own is None else own @ step) @ step / 2)
        for name, d in block.scatter(step.view(block.shape)).items():
            start.get_parameter(name).data.add_(d)
    actual = float(now.loss - nn.functional.cross_entropy(start(p.x), p.y).detach())
    assert found == [pytest.approx(actual / predicted, rel=1e-9)]


def test_one_more_forward_only_where_the_step_is_another() -> None:
    p, objective, before, B = quadratic()
    calls = []
    handle = next(m for m in p.model.modules() if isinstance(m, nn.Linear)).register_forward_hook(
        lambda *a: calls.append(1)
    )
    step = torch.ones(18, dtype=torch.float64)
    transition = Transition(before, before, lambda: {"1": step.view(3, 6)})
    ratio_at(transition, objective.layout, step, B @ step)
    assert not calls
    ratio_at(transition, objective.layout, 2 * step, B @ step)
    assert calls == [1]
    handle.remove()


def regression(l2: float = 0.0, noise: float = 1.0) -> tuple[cl.Objective, Tensor, Tensor]:
    """`Linear(3, 2)` under a Gaussian likelihood: a loss that is exactly quadratic."""
    draw = torch.Generator().manual_seed(0)
    x, y = (torch.randn(40, n, generator=draw, dtype=torch.float64) for n in (3, 2))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Linear(3, 2).double()
    return cl.Objective(model, cl.likelihoods.Gaussian(), l2=l2), x, noise * y


def ratios(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The list of every ρ that the rule is given from here on."""
    found: list[float] = []
    told = LevenbergMarquardt.adapted

    def adapted(rule: LevenbergMarquardt, damping: float, rho: float) -> float:
        found.append(rho)
        return told(rule, damping, rho)

    monkeypatch.setattr(LevenbergMarquardt, "adapted", adapted)
    return found


@pytest.mark.parametrize("name", ["smw-gn", "hf", "smw-ng-bd"])
def test_the_model_has_the_l2_term_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss is its own model: ρ = 1 whatever μ, and λ falls by the rule's factor each time.

    Exact labels, all examples; one layer, so that its block is the whole.
    """
    objective, x, y = regression(2.0)
    rhos = ratios(monkeypatch)
    own = {"curvature_size": None} if name == "hf" else {"curvature_size": None, "labels": "exact"}
    optimizer = cl.optimizer(name, objective, lr=1.0, **own)
    for _ in range(4):
        optimizer.step(objective.closure(x, y))
    assert rhos == pytest.approx([1.0] * 4, abs=1e-7)
    assert optimizer.descent.curvature.damping == pytest.approx(0.001 + 0.99**4, rel=1e-12)


@pytest.mark.parametrize("name", ["smw-gn", "smw-ng", "hf", "smw-ng-bd"])
@pytest.mark.parametrize("adapt", [True, False])
def test_inverses_have_the_l2_term_beside_the_damping(name: str, adapt: bool) -> None:
    """inverse⁻¹ − matrix of the likelihood = (λ + 2μ) I, at a fixed λ too."""
    objective, x, y = regression(0.5)
    curvature: Any = approximation(name, objective, damping=0.1, adapt=adapt, curvature_size=None)
    curvature.update(objective.closure(x, y).observe(curvature.needs))
    (inverse,) = curvature.inverse.values()
    labels = curvature.labels
    kinds: dict[str, Kind] = {"exact": "ggn", "data": "ef"}
    kind = kinds.get(labels)
    matrix = (
        curvature.blocks["1"].matrix() if kind is None
        else cl.exact.matrix(objective, x, y, kind, None)
    ).dense()  # fmt: skip
    beside = torch.linalg.inv(inverse.dense()) - matrix
    torch.testing.assert_close(
        beside, 1.1 * torch.eye(8, dtype=torch.float64), rtol=1e-10, atol=1e-11
    )
    assert curvature.refreshed == pytest.approx(0.1, rel=1e-14)


@pytest.mark.thinned(3)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", ["smw-gn", "hf", "smw-ng-bd"])
def test_damping_never_rises_from_rounding(name: str, dtype: torch.dtype) -> None:
    """On a loss that is its own model λ falls or stands, long after the minimum is reached."""
    objective, x, y = regression()
    objective.model.to(dtype)
    own = {} if name == "hf" else {"labels": "exact"}
    optimizer = cl.optimizer(name, objective, lr=1.0, curvature_size=None, **own)
    found = [1.001]
    for _ in range(300):
        optimizer.step(objective.closure(x.to(dtype), y.to(dtype)))
        found.append(optimizer.descent.curvature.damping)
    assert all(later <= now for now, later in pairwise(found))
    assert found[-1] < 0.1


@pytest.mark.parametrize(
    ("actual", "predicted", "rho"),
    [
        (-9.0, 9.0, 1.0), (9.0, 1.0, 1.0), (-9.0, -9.0, 1.0), (0.0, 0.1, 1.0), (0.1, 0.0, 1.0),
        (-11.0, 9.0, -11 / 9), (3.0, 12.0, 0.25), (9.0, -11.0, -math.inf), (0.0, 0.0, math.nan),
        (math.nan, 1.0, -math.inf), (1.0, math.nan, -math.inf),
    ],
)  # fmt: skip
def test_reductions_within_rounding_are_as_foreseen(
    actual: float, predicted: float, rho: float
) -> None:
    """Both within the slack: 1; one beyond it: the ratio; no move at all has none."""
    assert reduction_ratio(actual, predicted, slack=10.0) == pytest.approx(rho, nan_ok=True)


def test_the_slack_is_ten_units_of_rounding_of_the_loss() -> None:
    """ρ of a model without curvature is not 1, and is seen where 1100 units are foreseen, but not
    where 9 are.
    """
    _, objective, before, B = quadratic()
    g = before.gradients["1"].flatten()
    unit = torch.finfo(torch.float64).eps * float(before.loss)
    transition = Transition(before, before, lambda: {"1": torch.zeros(3, 6, dtype=torch.float64)})
    for foreseen, seen in ((1100, True), (9, False)):
        p = -foreseen * unit * g / (g @ g)
        rho = ratio_at(transition, objective.layout, p, 0 * B @ p)
        assert (rho == 1.0) is not seen
