"""L-BFGS, subsampled Newton and S4QN: (8), (9) to (14) of S2QN by dense algebra, and how fast they
converge.
"""

from __future__ import annotations

import io
import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from problems import assert_near, batches, curvature_of, problem
from torch import Tensor, nn

import curvlab as cl
from curvlab.algorithms import ALGORITHMS
from curvlab.curvature.structured import Structured
from curvlab.curvature.whole_vector import flat, moved
from curvlab.exact import Kind
from curvlab.linalg.line_search import armijo, wolfe
from curvlab.linalg.products import Product
from curvlab.observation import Pass
from curvlab.optim import Optimizer

NAMES = [name for name, a in ALGORITHMS.items() if a.make is Structured]
N, D, MU = 60, 6, 0.01


def logistic(
    seed: int = 0, n: int = N, d: int = D, mu: float = MU
) -> tuple[cl.Objective, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=generator, dtype=torch.float64)
    y = (
        torch.rand(n, 1, generator=generator, dtype=torch.float64)
        < (x[:, :1] + x[:, 1:2]).sigmoid()
    ).double()
    model = nn.Linear(d, 1, bias=False, dtype=torch.float64)
    with torch.no_grad():
        model.weight.copy_(torch.randn(1, d, generator=generator, dtype=torch.float64) / 2)
    return cl.Objective(model, cl.likelihoods.Bernoulli(), l2=mu), x, y


def hessian(objective: cl.Objective, x: Tensor) -> Tensor:
    """Xᵀ diag(σ(1 − σ)) X / N + 2μ I."""
    s = objective.model(x).detach()[:, 0].sigmoid()
    return x.T @ (s * (1 - s))[:, None].mul(x) / len(x) + 2 * objective.l2 * torch.eye(
        x.shape[1], dtype=x.dtype
    )


def weight_of(objective: cl.Objective) -> nn.Parameter:
    """[1, D]."""
    return objective.parameters["weight"]


def gradient(objective: cl.Objective, x: Tensor, y: Tensor) -> Tensor:
    """Xᵀ (σ − y) / N + 2μ θ."""
    theta = weight_of(objective).detach()[0]
    return x.T @ ((x @ theta).sigmoid() - y[:, 0]) / len(x) + 2 * objective.l2 * theta


def refinement(U: list[Tensor], V: list[Tensor], gamma: float) -> Tensor:
    """Λ by the BFGS updates themselves, one pair after another, from γ I."""
    B = gamma * torch.eye(len(U[0]), dtype=torch.float64)
    for u, v in zip(U, V, strict=True):
        Bu = B @ u
        B = B - torch.outer(Bu, Bu) / (u @ Bu) + torch.outer(v, v) / (u @ v)
    return B


def step(optimizer: Optimizer, objective: cl.Objective, x: Tensor, y: Tensor) -> Tensor:
    """Change of the parameters."""
    before = flat(
        objective.layout, {n: p.detach().clone() for n, p in objective.parameters.items()}
    )
    optimizer.step(objective.closure(x, y))
    return (
        flat(objective.layout, {n: p.detach().clone() for n, p in objective.parameters.items()})
        - before
    )


# ------------------------------------------------------------------------------------------------
# (26), its derivatives


@pytest.mark.parametrize("mu", [0.0, 0.3])
def test_loss_and_gradient_have_the_l2_term_of_26_and_statistics_have_not(mu: float) -> None:
    objective, x, y = logistic(mu=mu)
    theta = weight_of(objective).detach()[0].clone()
    closure = objective.closure(x, y)
    seen = closure.observe()
    signs = 2 * y[:, 0] - 1
    loss = torch.log1p(torch.exp(-signs * (x @ theta))).mean() + mu * theta @ theta
    assert_near(seen.loss, loss, 1e-14)
    assert_near(seen.gradients["1"][0], gradient(objective, x, y), 1e-13)
    plain = seen.passes["data"]["1"].gradient
    assert_near(plain[0], gradient(objective, x, y) - 2 * mu * theta, 1e-13)
    assert_near(closure().detach(), loss, 1e-14)
    grad = weight_of(objective).grad
    assert grad is not None
    assert_near(grad[0], gradient(objective, x, y), 1e-13)
    with torch.no_grad():
        weight_of(objective).zero_()  # the observation is of the weights that it saw
    assert_near(seen.gradients["1"][0] - plain[0], 2 * mu * theta, 1e-12) if mu else None


def test_an_l2_term_below_zero_is_refused() -> None:
    with pytest.raises(cl.CurvlabError, match="the L2 term must be 0 or positive, not -1"):
        cl.Objective(nn.Linear(2, 1), cl.likelihoods.Bernoulli(), l2=-1)


@pytest.mark.parametrize("solver", ["direct", "cg"])
@pytest.mark.parametrize("base", ["hessian", "fisher"])
def test_the_base_is_the_closed_form_hessian(base: str, solver: str) -> None:
    """GGN = Fisher = Hessian of a linear model; L2 included; by Cholesky and by conjugate
    gradients.
    """
    objective, x, y = logistic()
    curvature = cl.approximation(
        "ssn",
        objective,
        damping=0.02,
        base=base,
        labels="exact",
        solver=solver,
        tolerance=1e-13,
        iterations=500,
    )
    curvature.update(objective.closure(x, y).observe(curvature.needs))
    expected = torch.linalg.inv(hessian(objective, x) + 0.02 * torch.eye(D, dtype=x.dtype))
    assert_near(curvature.inverse["whole"].dense(), expected, 1e-10)


@pytest.mark.parametrize(("labels", "kind"), [("exact", "ggn"), ("data", "ef")])
@pytest.mark.parametrize("few", [True, False])
def test_a_base_of_few_rows_is_their_low_rank_form(labels: Pass, kind: Kind, few: bool) -> None:
    """(14) without pairs on a network: rows of all layers together, against the exact matrix of the
    sample.
    """
    p = problem("tanh", n=7 if few else 70)
    objective = p.objective()
    curvature = cl.approximation("ssn", objective, damping=0.1, base="fisher", labels=labels)
    curvature.update(objective.closure(p.x, p.y).observe(curvature.needs))
    matrix = cl.exact.product(objective, p.x, p.y, kind).dense()
    expected = torch.linalg.inv(matrix + 0.1 * torch.eye(len(matrix), dtype=torch.float64))
    assert_near(curvature.inverse["whole"].dense(), expected, 1e-10)
    assert (type(curvature.inverse["whole"]).__name__ == "Compact") is few


def test_sampled_labels_are_the_same_by_rows_and_by_products() -> None:
    p = problem("tanh")
    objective = p.objective()
    found = []
    for solver in ("auto", "direct"):
        curvature = cl.approximation(
            "ssn", objective, damping=0.1, base="fisher", labels="model", solver=solver
        )
        objective.closures["step"] = 5
        curvature.update(objective.closure(p.x, p.y).observe(curvature.needs))
        found.append(curvature.inverse["whole"].dense())
    assert_near(found[0], found[1], 1e-10)


# ------------------------------------------------------------------------------------------------
# (9) to (14)


@pytest.mark.thinned(6)
@pytest.mark.parametrize("pairs", [1, 2, 5])
@pytest.mark.parametrize(
    ("base", "labels", "solver"),
    [
        ("hessian", "data", "direct"),
        ("hessian", "data", "cg"),
        ("fisher", "exact", "auto"),
        ("fisher", "data", "auto"),
    ],
)
def test_inverse_is_that_of_base_plus_refinement(
    base: str, labels: Pass, solver: str, pairs: int
) -> None:
    """(12), (13), and (14) for the samples of few rows, against BFGS updates of a dense matrix;
    then secant equation (10).
    """
    objective, x, y = logistic(d=12, n=40)
    curvature = cl.approximation(
        "s4qn",
        objective,
        damping=0.05,
        base=base,
        labels=labels,
        solver=solver,
        pairs=pairs,
        tolerance=1e-12,
        iterations=100,
    )
    optimizer = cl.optimizer("s4qn", objective, lr=0.3, damping=0.05)
    optimizer.descent.curvature = curvature
    size = 15
    eye = torch.eye(12, dtype=torch.float64)

    def base_matrix(x: Tensor, y: Tensor) -> Tensor:
        if labels == "data" and base == "fisher":
            rows = x * (objective.model(x).detach().sigmoid() - y)
            return rows.T @ rows / len(x) + 2 * MU * eye
        return hessian(objective, x)

    window: list[tuple[int, Tensor, Tensor]] = []
    u = change = torch.zeros(12, dtype=torch.float64)
    kept = 0
    for k in range(7):
        some = torch.randperm(40, generator=torch.Generator().manual_seed(k))[:size]
        H = base_matrix(x[some], y[some])
        if k:
            v = change - H @ u  # of the step before
            if float(u @ v) >= 1e-8 * float(u.norm() * v.norm()):
                window, kept = [*window, (k, u, v)], kept + 1
        window = [pair for pair in window if pair[0] > k - pairs]  # of the last p steps
        U, V = [pair[1] for pair in window], [pair[2] for pair in window]
        before = weight_of(objective).detach()[0].clone()
        g = gradient(objective, x[some], y[some])
        optimizer.step(objective.closure(x[some], y[some]))
        B = H + 0.05 * eye
        if U:
            B = B + refinement(U, V, float(U[-1] @ V[-1] / (U[-1] @ U[-1])))
        assert_near(curvature.inverse["whole"].dense(), torch.linalg.inv(B), 1e-10)
        if k and U and U[-1] is u:
            assert_near((B - 0.05 * eye) @ u, change, 1e-10)  # (10)
            assert_near(curvature.inverse["whole"] @ (change + 0.05 * u), u, 1e-9)
        u = weight_of(objective).detach()[0] - before
        assert_near(u, -0.3 * torch.linalg.solve(B, g), 1e-9)
        change = gradient(objective, x[some], y[some]) - g
    assert kept >= 1


def test_rule_8_by_hand() -> None:
    """λ_k from ‖g_{k−1}‖, and α_k⁻¹ falling by `shrink`."""
    objective, x, y = logistic()
    r1, r2 = 0.1, 0.2
    curvature: Any = cl.approximation("s4qn", objective, damping=0.5, r1=r1, r2=r2, shrink=0.8)
    previous: float | None = None
    factors: set[int] = set()
    for k in range(8):
        with torch.no_grad():
            weight_of(objective).mul_(0.6)
        curvature.update(objective.closure(x, y).observe())
        inverse_alpha = 0.5 * 0.8**k
        if previous is None or r1 <= previous <= r2:
            expected = inverse_alpha
        elif previous < r1:
            expected = 2 * r1 / (previous + r1) * inverse_alpha
        else:
            expected = 2 * previous / (previous + r2) * inverse_alpha
        assert curvature.lam == pytest.approx(expected, rel=1e-13)
        assert curvature.damping == pytest.approx(0.5 * 0.8 ** (k + 1), rel=1e-13)
        factors.add(previous is None or (previous > r1) + (previous > r2))
        H = hessian(objective, x) + expected * torch.eye(D, dtype=x.dtype)
        assert_near(curvature.inverse["whole"].dense(), torch.linalg.inv(H), 1e-10)
        previous = float(gradient(objective, x, y).norm())
    assert len(factors) >= 2


def test_the_optimizer_shows_the_damping_as_it_falls() -> None:
    objective, x, y = logistic()
    optimizer = cl.optimizer("ssn", objective, damping=0.5, shrink=0.5)
    for _ in range(3):
        optimizer.step(objective.closure(x, y))
    assert optimizer.param_groups[0]["damping"] == 0.5**4


def test_samples_grow_by_the_factor_up_to_the_minibatch() -> None:
    """By their work: a base of 2 · 1.5ᵏ examples, one product for each of D columns."""
    objective, x, y = logistic()
    curvature: Any = cl.approximation("ssn", objective, damping=0.1, sample=2, growth=3.0)
    sizes, before = [], 0
    for _ in range(6):
        curvature.update(objective.closure(x, y).observe())
        sizes.append((curvature.work["products"] - before) // D)
        before = curvature.work["products"]
    assert sizes == [2, 6, 18, 54, 60, 60]


def test_an_indefinite_hessian_raises_the_damping_of_the_step_alone() -> None:
    """By eigenvalues where the matrix is formed, by conjugate gradients that met the negative
    direction otherwise.
    """
    p = problem("tanh", n=30)
    objective = p.objective()
    found = cl.exact.product(objective, p.x, p.y, "hessian")
    assert isinstance(found, Product)
    lowest = float(found.eigvalsh()[0])
    assert lowest < -1e-3
    for solver in ("direct", "cg"):
        curvature: Any = cl.approximation(
            "ssn", objective, damping=1e-4, solver=solver, tolerance=1e-8
        )
        observation = objective.closure(p.x, p.y).observe()
        curvature.update(observation)
        d = curvature.precondition(observation.gradients)
        assert sum(float((d[n] * g).sum()) for n, g in observation.gradients.items()) > 0
        assert (curvature.lam > -lowest) if solver == "direct" else (curvature.lam > 1e-4)
        assert curvature.damping == 1e-4


# ------------------------------------------------------------------------------------------------
# convergence


def test_one_newton_step_solves_a_quadratic() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(50, d, generator=generator, dtype=torch.float64) for d in (7, 2))
    for own in (
        {},
        {"solver": "cg", "tolerance": 1e-14},
        {"search": "armijo"},
        {"base": "fisher", "labels": "exact"},
    ):
        model = nn.Linear(7, 2, bias=False, dtype=torch.float64)
        objective = cl.Objective(model, cl.likelihoods.Gaussian(), l2=0.05)
        optimizer = cl.optimizer("ssn", objective, lr=1.0, damping=0.0, **own)
        optimizer.step(objective.closure(x, y))
        exact = torch.linalg.solve(
            x.T @ x / 50 + 0.1 * torch.eye(7, dtype=torch.float64), x.T @ y / 50
        ).T
        assert_near(model.weight.detach(), exact, 1e-10)


def test_lbfgs_is_torchs() -> None:
    """On a network, full batch, no line search: torch's first step is min(1, 1/‖g‖₁) lr long, then
    lr.
    """
    p, q = problem("tanh", n=40), problem("tanh", n=40)
    objective = p.objective()
    ours = cl.optimizer("lbfgs", objective, lr=0.2, pairs=4)
    theirs = torch.optim.LBFGS(
        q.model.parameters(),
        lr=0.2,
        max_iter=1,
        history_size=4,
        tolerance_grad=0,
        tolerance_change=0,
    )
    other = q.objective().closure(q.x, q.y)
    size = sum(
        float(g.abs().sum()) for g in objective.closure(p.x, p.y).observe().gradients.values()
    )
    for k in range(25):
        ours.param_groups[0]["lr"] = 0.2 * min(1.0, 1 / size) if k == 0 else 0.2
        ours.step(objective.closure(p.x, p.y))
        theirs.step(other)
        for a, b in zip(p.model.parameters(), q.model.parameters(), strict=True):
            assert_near(a.detach(), b.detach(), 1e-10)
    assert len(curvature_of(ours).memory) == 4


def test_lbfgs_with_damping_inverts_b_plus_lambda() -> None:
    objective, x, y = logistic()
    optimizer = cl.optimizer("lbfgs", objective, lr=0.3, damping=0.2, pairs=3)
    for _ in range(5):
        optimizer.step(objective.closure(x, y))
    memory = curvature_of(optimizer).memory
    u, v = memory.S[-1], memory.Y[-1]
    optimizer.step(objective.closure(x, y))  # the pair of the step before comes in here
    memory = curvature_of(optimizer).memory
    u, v = memory.S[-1], memory.Y[-1]
    B = refinement(list(memory.S), list(memory.Y), float(v @ v / (u @ v))) + 0.2 * torch.eye(
        D, dtype=torch.float64
    )
    assert_near(optimizer.descent.curvature.inverse["whole"].dense(), torch.linalg.inv(B), 1e-10)


def errors(name: str, steps: int, growing: bool = False, **own: Any) -> list[float]:
    """Ψ − Ψ* after each step on a logistic problem of 2000 examples."""
    objective, x, y = logistic(n=2000, d=8)
    best, *_ = logistic(n=2000, d=8)
    newton = cl.optimizer("ssn", best, lr=1.0, damping=0.0)
    for _ in range(12):
        newton.step(best.closure(x, y))
    optimizer = cl.optimizer(name, objective, lr=1.0, damping=0.0, **own)
    least = float(best.closure(x, y).observe(()).loss)
    found = []
    for _ in range(steps):
        optimizer.step(objective.closure(x, y))
        found.append(float(objective.closure(x, y).observe(()).loss) - least)
    return found


@pytest.mark.parametrize(
    ("name", "own"),
    [
        ("ssn", {}),
        ("s4qn", {"sample": 20, "growth": 6.0, "search": "armijo"}),
        ("lbfgs", {"pairs": 20, "search": "wolfe"}),
    ],
)
def test_superlinear_convergence(name: str, own: dict[str, Any]) -> None:
    """Theorem 3: samples that grow superlinearly. Ratios of successive errors fall, until rounding;
    L-BFGS's by thirds.
    """
    found = [e for e in errors(name, 16, **own) if e > 1e-14]
    assert len(found) < 16
    ratios = [b / a for a, b in pairwise(found)]
    third = max(1, len(ratios) // 3)
    early, late = (math.prod(part) ** (1 / len(part)) for part in (ratios[:third], ratios[-third:]))
    assert late < early / 10
    if name != "lbfgs":
        assert all(b < a for a, b in pairwise(ratios))


def test_refinement_beats_the_base_alone() -> None:
    """6.1: "all settings of S4QN are the same as SSN except an additional quasi-Newton matrix".
    Means over five samplings.
    """
    ends: dict[str, float] = {}
    for name in ("ssn", "s4qn"):
        logs = []
        for seed in range(5):
            objective, x, y = logistic(seed=1, n=2000, d=40, mu=1e-4)
            objective.seed = seed
            optimizer = cl.optimizer(
                name, objective, lr=1.0, damping=0.0, sample=60, search="armijo"
            )
            for _ in range(25):
                optimizer.step(objective.closure(x, y))
            logs.append(float(gradient(objective, x, y).norm().log10()))
        ends[name] = sum(logs) / 5
    assert ends["s4qn"] < ends["ssn"] - 0.5


# ------------------------------------------------------------------------------------------------
# line searches


def test_armijo_and_wolfe_conditions_hold() -> None:
    """On (1 − t)² from a slope that is much too long, and much too short."""
    for scale in (1e-3, 0.3, 1.0, 3.0, 1e3):

        def phi(t: float, scale: float = scale) -> float:
            return (1 - scale * t) ** 2

        def slope(t: float, scale: float = scale) -> float:
            return -2 * scale * (1 - scale * t)

        a = armijo(phi, 1.0, slope(0))
        assert a.met
        assert phi(a.step) <= 1 + 1e-4 * a.step * slope(0)
        assert a.step == 1 or phi(2 * a.step) > 1 + 1e-4 * 2 * a.step * slope(0)
        w = wolfe(lambda t: (phi(t), slope(t)), 1.0, slope(0))
        assert w.met
        assert phi(w.step) <= 1 + 1e-4 * w.step * slope(0)
        assert slope(w.step) >= 0.9 * slope(0)


def test_a_search_that_finds_nothing_says_so() -> None:
    found = armijo(lambda t: math.inf, 0.0, -1.0, maximum=5)
    assert (found.met, found.trials, found.step) == (False, 5, 2.0**-5)
    with pytest.raises(cl.CurvlabError, match="not below 0"):
        armijo(lambda t: 0.0, 0.0, 1.0)


@pytest.mark.parametrize("search", ["armijo", "wolfe"])
def test_a_searched_step_lowers_the_loss_where_a_full_one_does_not(search: str) -> None:
    objective, x, y = logistic(mu=1e-6)
    with torch.no_grad():
        weight_of(objective).mul_(20)  # Newton's step from far away overshoots
    plain, *_ = logistic(mu=1e-6)
    with torch.no_grad():
        weight_of(plain).copy_(weight_of(objective))
    start = float(objective.closure(x, y).observe(()).loss)
    cl.optimizer("ssn", plain, lr=1.0, damping=0.0).step(plain.closure(x, y))
    assert float(plain.closure(x, y).observe(()).loss) > start
    optimizer = cl.optimizer("ssn", objective, lr=1.0, damping=0.0, search=search)
    optimizer.step(objective.closure(x, y))
    assert float(objective.closure(x, y).observe(()).loss) < start
    assert curvature_of(optimizer).work["trials"] % N == 0
    assert curvature_of(optimizer).work["trials"] > 0


def test_a_trial_leaves_the_parameters_to_the_bit() -> None:
    objective, x, _ = logistic()
    before = weight_of(objective).detach().clone()
    with moved(objective, torch.ones(D, dtype=x.dtype), 1e-3):
        assert_near(weight_of(objective).detach(), before + 1e-3, 1e-14)
    assert torch.equal(weight_of(objective), before)


# ------------------------------------------------------------------------------------------------
# sparse rows, state, errors


def test_sparse_rows_give_the_same_run() -> None:
    """The model of sparse rows on a COO tensor against the same on dense rows; subsampled."""
    objective, x, y = logistic(d=20)
    x = x * (torch.rand(x.shape, generator=torch.Generator().manual_seed(3)) < 0.2)
    ends = []
    for sparse in (False, True):
        model = cl.models.logistic_sparse((20,)).double()
        nn.init.zeros_(model.weight)
        problem = cl.Objective(model, cl.likelihoods.Bernoulli(), l2=MU)
        optimizer = cl.optimizer(
            "s4qn",
            problem,
            lr=1.0,
            damping=0.0,
            sample=20,
            solver="cg",
            tolerance=1e-12,
            search="armijo",
        )
        for _ in range(6):
            optimizer.step(problem.closure(x.to_sparse_coo() if sparse else x, y))
        ends.append(model.weight.detach())
    assert_near(ends[0], ends[1], 1e-9)
    assert float(objective.closures["exact"]) == 0


def test_sparse_nan_is_refused() -> None:
    objective, x, y = logistic()
    x[3, 2] = math.nan
    with pytest.raises(cl.CurvlabError, match="NaN or Inf"):
        objective.closure(x.to_sparse_coo(), y)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "own", [{}, {"solver": "cg", "search": "wolfe", "r1": 0.1, "r2": 0.2, "shrink": 0.9}]
)
def test_state_continues_bit_for_bit(name: str, own: dict[str, Any]) -> None:
    sample = {} if name == "lbfgs" else {"sample": 3, "growth": 1.2}

    def made() -> tuple[cl.Objective, Optimizer, list[tuple[Tensor, Tensor]]]:
        p = problem("tanh")
        objective = p.objective()
        options = own | sample | {"lr": 0.1, "damping": 0.3}
        return objective, cl.optimizer(name, objective, **options), batches(p, 8)

    objective, optimizer, data = made()
    for x, y in data[:4]:
        optimizer.step(objective.closure(x, y))
    file = io.BytesIO()
    torch.save({"model": objective.model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    other, resumed, _ = made()
    other.model.load_state_dict(state["model"])
    resumed.load_state_dict(state["optimizer"])
    for x, y in data[4:]:
        assert torch.equal(
            resumed.step(other.closure(x, y)), optimizer.step(objective.closure(x, y))
        )
        assert all(
            torch.equal(a, b)
            for a, b in zip(objective.model.parameters(), other.model.parameters(), strict=True)
        )
    assert curvature_of(resumed).work == curvature_of(optimizer).work


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"base": "newton"}, "unknown base of s4qn 'newton'"),
        ({"search": "wolf"}, "unknown search of s4qn 'wolf'; did you mean 'wolfe'"),
        ({"solver": "lu"}, "unknown solver of s4qn 'lu'"),
        ({"pairs": -1}, "pairs must be 0 or more"),
        ({"base": "none", "pairs": 0}, "1 or more where there is no base"),
        ({"growth": 0.5}, "growth must be 1 or more, not 0.5"),
        ({"shrink": 2.0}, "shrink must be above 0 and at most 1, not 2"),
        ({"gamma": 0.0}, "gamma must be above 0"),
        ({"sample": 0}, "sample must be a positive number of examples"),
        ({"r1": 0.1}, "needs both r1 and r2"),
        ({"tolerance": 1.0}, "tolerance must be above 0 and below 1"),
        ({"pair": 3}, "unknown option of s4qn 'pair'; did you mean 'pairs'"),
    ],
)
def test_bad_options_are_one_clear_line(own: dict[str, Any], message: str) -> None:
    objective, *_ = logistic()
    with pytest.raises(cl.CurvlabError, match=message):
        cl.approximation("s4qn", objective, **own)


def test_a_checkpoint_of_another_method_or_model_is_refused() -> None:
    objective, x, y = logistic()
    s4qn = cl.optimizer("s4qn", objective, lr=0.1)
    s4qn.step(objective.closure(x, y))
    state = s4qn.descent.curvature.state_dict()
    with pytest.raises(cl.CurvlabError, match="the checkpoint is of 's4qn' but this is 'ssn'"):
        cl.approximation("ssn", objective).load_state_dict(state)
    smaller, *_ = logistic(d=4)
    with pytest.raises(cl.CurvlabError, match="has 6 parameters but this model has 4"):
        cl.approximation("s4qn", smaller).load_state_dict(state)
