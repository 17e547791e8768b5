"""What every entry of ALGORITHMS promises. A new line in the table is tested here without a new
test.
"""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from problems import MODELS, REPRESENTATIVE, RULED, Problem, assert_near, batches, normal, problem
from torch import Tensor, nn

import curvlab as cl
from curvlab.algorithms import ALGORITHMS, approximation, damping_for, descent
from curvlab.curvature.identity import IdentityBlock
from curvlab.layers import Block
from curvlab.objective import Objective
from curvlab.observation import Observation
from curvlab.optim import Descent, Optimizer, move, warm_start
from curvlab.training.descent_contents import check_descent

NAMES = list(ALGORITHMS)
SCHEDULES = [(1, 1), (2, 3)]
"""(update_every, refresh_every)."""
OVERALL = 0.1
"""The overall damping λ of these tests, well above rounding."""

TRUNCATED = ["hf"]
"""Whose direction is an approximate product with `inverse`."""

IN_A_BASIS = ["soap", "kl-shampoo"]
"""Whose directions depend on the eigenvectors of singular matrices, which are those of rounding."""

algorithms = pytest.mark.parametrize("name", NAMES)


def pairs(models: Sequence[str], what: str, values: Sequence[Any]) -> pytest.MarkDecorator:
    """Every algorithm with every model, `values` taken in turn: each meets every algorithm and
    every model.
    """
    cases = [
        (name, model, values[(i + j) % len(values)])
        for i, name in enumerate(NAMES)
        for j, model in enumerate(models)
    ]
    return pytest.mark.parametrize(("name", "model", what), cases)


def follows_the_gradient(name: str, block: Block) -> bool:
    """Whether an algorithm lacks what it reads of this block, and falls back to the gradient."""
    if ALGORITHMS[name].whole:
        return False
    reads = ALGORITHMS[name].block(block).reads
    return {
        "gradient": False,
        "rows": block.module is None,  # of each example, which every layer with a rule has
        "moments": block.module is None or block.groups > 1,  # of inputs that all outputs share
        "factors": block.module is None or block.groups > 1,
    }[reads]


@contextmanager
def fallback(name: str, model: str) -> Iterator[None]:
    """Expects one warning that names all parameters which fall back to the gradient, and none where
    there are none.
    """
    loose = [
        n
        for b in problem(model).objective().blocks
        if follows_the_gradient(name, b)
        for n in b.params
    ]
    if loose:
        with pytest.warns(
            cl.CurvlabWarning,
            match=f"without a rule.* follow the gradient.*: {re.escape(', '.join(loose))}$",
        ) as s:
            yield
        assert len(s) == 1
    else:
        yield


def to_the_end(name: str) -> dict[str, Any]:
    """Options of a method that stops an iteration early, by which it does not: where it stops is
    decided by rounding.
    """
    return {"progress": 0.0, "backtrack": False} if name in TRUNCATED else {}


def damped(name: str, p: Problem) -> float:
    return damping_for(name, OVERALL, len(p.x))


def make_descent(name: str, objective: Objective, p: Problem, **options: Any) -> Descent:
    return descent(name, objective, **{"damping": damped(name, p), "weight_decay": 0.0, **options})


def make_optimizer(name: str, objective: Objective, p: Problem, **options: Any) -> Optimizer:
    return cl.optimizer(
        name, objective, **{"lr": 1e-3, "damping": damped(name, p), "weight_decay": 0.0, **options}
    )


def first_direction(name: str, p: Problem, **options: Any) -> tuple[Observation, dict[str, Tensor]]:
    objective = p.objective()
    d = make_descent(name, objective, p, **{"momentum": 0.0, **options})
    observation = objective.closure(p.x, p.y).observe(d.needs)
    return observation, d.direction(observation)


def weights(objective: Objective) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in objective.parameters.items()}


def same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(
        torch.equal(found[n], expected[n]) for n in expected
    )


def dot(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    return float(sum((a[name] * b[name]).sum() for name in a))


def finite(values: Mapping[str, Tensor]) -> bool:
    return all(bool(v.isfinite().all()) for v in values.values())


# ------------------------------------------------------------------------------------------------
# operator, direction


@pytest.mark.thinned(3)
@algorithms
@pytest.mark.parametrize("model", MODELS)
def test_every_block_is_a_positive_definite_operator(name: str, model: str) -> None:
    p = problem(model)
    objective = p.objective()
    with fallback(name, model):
        curvature = approximation(name, objective, damping=damped(name, p), **to_the_end(name))
    for x, y in batches(p, 3):
        curvature.update(objective.closure(x, y).observe(curvature.needs))
    whole = ALGORITHMS[name].whole
    assert list(curvature.inverse) == (["whole"] if whole else [b.name for b in objective.blocks])
    for part, H in curvature.inverse.items():
        eye = torch.eye(
            len(objective.layout) if whole else objective.layout.blocks[int(part) - 1].numel,
            dtype=torch.float64,
        )
        dense = H.dense()
        assert len(H) == len(eye)
        torch.testing.assert_close(dense, dense.T, rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(H @ eye, dense, rtol=1e-10, atol=1e-11)
        torch.testing.assert_close(
            H.eigvalsh(), torch.linalg.eigvalsh(dense), rtol=1e-10, atol=1e-11
        )
        assert float(H.eigvalsh()[0]) > 0
        torch.testing.assert_close(H.inv() @ dense, eye, rtol=0, atol=1e-10)
        torch.testing.assert_close(H.inv().inv().dense(), dense, rtol=1e-9, atol=1e-10)
        drawn = torch.Generator().manual_seed(0)
        shapes = {b.name: b.shape for b in objective.blocks if whole or b.name == part}
        gradient = {
            n: torch.randn(shape, generator=drawn, dtype=torch.float64)
            for n, shape in shapes.items()
        }
        vector = torch.cat([g.flatten() for g in gradient.values()])
        torch.testing.assert_close(H @ vector, dense @ vector, rtol=1e-10, atol=1e-11)
        found = torch.cat([d.flatten() for d in curvature.precondition(gradient).values()])
        torch.testing.assert_close(found, dense @ vector, rtol=1e-10, atol=1e-11)


@pytest.mark.thinned(3)
@pairs(list(MODELS), "likelihood", ["categorical", "bernoulli", "gaussian"])
def test_first_direction_is_a_descent_direction(name: str, model: str, likelihood: str) -> None:
    p = problem(model, likelihood)
    with fallback(name, model):
        observation, direction = first_direction(name, p)
    assert list(direction) == list(observation.gradients)
    assert all(direction[b].shape == g.shape for b, g in observation.gradients.items())
    assert dot(direction, observation.gradients) > 0


@pytest.mark.thinned(4)
@algorithms
@pytest.mark.parametrize("model", REPRESENTATIVE)
def test_loss_falls_over_10_steps(name: str, model: str) -> None:
    """With a learning rate that makes the first step 0.02 long."""
    p = problem(model, n=20)
    with fallback(name, model):
        direction = first_direction(name, p)[1]
    objective = p.objective()
    with fallback(name, model):
        optimizer = make_optimizer(
            name, objective, p, lr=0.02 / math.sqrt(dot(direction, direction))
        )
    losses = [float(optimizer.step(objective.closure(p.x, p.y))) for _ in range(11)]
    assert losses[10] < losses[5] < losses[0]


@pytest.mark.parametrize(
    ("name", "model"),
    [*((n, "tanh") for n in NAMES), *(("kfac", m) for m in MODELS if m != "tanh")],
)
def test_weight_decay_is_decoupled(name: str, model: str) -> None:
    """p + γ W for every parameter (thesis Alg. 15, line 19; practice: for every variable)."""
    p = problem(model)
    with fallback(name, model):
        plain = first_direction(name, p)[1]
    with fallback(name, model):
        decayed = first_direction(name, p, weight_decay=0.3)[1]
    for block in p.objective().blocks:
        w = block.gather({n: t.detach() for n, t in p.model.named_parameters()})
        torch.testing.assert_close(
            decayed[block.name], plain[block.name] + 0.3 * w, rtol=1e-14, atol=1e-15
        )


@algorithms
def test_there_is_no_direction_before_the_first_data(name: str) -> None:
    p = problem("tanh")
    objective = p.objective()
    curvature = approximation(name, objective)
    assert not curvature.ready
    with pytest.raises(cl.CurvlabError, match="has seen no data yet"):
        curvature.precondition(objective.closure(p.x, p.y).observe().gradients)


@algorithms
def test_overall_damping_gives_a_damping_that_is_not_negative(name: str) -> None:
    found = [
        damping_for(name, overall, size)
        for overall in (0.0, 1e-3, 1.0, 100.0)
        for size in (1, 1000)
    ]
    assert all(value >= 0 and math.isfinite(value) for value in found)
    with pytest.raises(cl.CurvlabError, match="damping must be 0 or positive, not -1"):
        damping_for(name, -1.0, 10)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("block-fisher", 1e-3),
        ("block-ef", 1e-3),
        ("kfac", 1e-3),
        ("kfac-ef", 1e-3),
        ("smw-ng-bd", 1e-3),
        ("smw-ng", 1e-3),
        ("smw-gn", 1e-3),
        ("hf", 1e-3),
        ("tnt", 1e-3),  # √(λ / m) of 1000 examples
        ("tnt-ef", 1e-3),
        ("tnt-per-sample", math.sqrt(1e-3)),
        ("shampoo", 3e-4),  # Table 4.3
        ("adam", 1e-3),
        ("sgd-m", 0.0),
    ],
)
def test_overall_damping_by_practice(name: str, expected: float) -> None:
    assert damping_for(name, 1e-3, 1000) == pytest.approx(expected, rel=1e-14)


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        ("kfac", lambda overall, m: overall),
        ("tnt", lambda o, m: math.sqrt(o / m)),
        ("tnt-per-sample", lambda o, m: math.sqrt(o)),
    ],
)
@pytest.mark.parametrize("overall", [0.0, 1e-3, 4.0])
@pytest.mark.parametrize("size", [1, 16, 1000])
def test_overall_damping_scales_as_documented(
    name: str, rule: Callable[[float, int], float], overall: float, size: int
) -> None:
    """KFAC λ; TNT on batch-mean gradients √(λ/m); on per-sample gradients √λ (practice)."""
    assert damping_for(name, overall, size) == pytest.approx(rule(overall, size), rel=1e-14, abs=0)


# ------------------------------------------------------------------------------------------------
# state


def saved_and_loaded(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


WAYS = [
    (warm, schedule, stop) for warm in (False, True) for schedule in SCHEDULES for stop in (0, 4)
]


@pytest.mark.thinned(4)
@pytest.mark.parametrize(
    ("name", "model", "warm", "schedule", "stop"),
    [
        (name, model, *way)
        for i, name in enumerate(NAMES)
        for j, model in enumerate(["tanh", "conv-1d"])
        for way in WAYS
        if (way[0] + SCHEDULES.index(way[1]) + way[2] // 4 + i + j) % 2 == 0
    ],
)
def test_a_checkpoint_continues_bit_for_bit(
    name: str, model: str, warm: bool, schedule: tuple[int, int], stop: int
) -> None:
    """Into a model of other weights, an objective of another seed, an optimizer that has already
    moved elsewhere.

    Four of the eight ways with one model, in which any two of the three are met in all their
    values, the others with the other.
    """
    p = problem(model)
    options = {"update_every": schedule[0], "refresh_every": schedule[1], "weight_decay": 0.01}
    data = batches(p, stop + 5, seed=30)
    objective = p.objective()
    with fallback(name, model):
        optimizer = make_optimizer(name, objective, p, **options)
    if warm:
        optimizer.warm_start(batches(p, 3))
    for x, y in data[:stop]:
        optimizer.step(objective.closure(x, y))
    state = saved_and_loaded({"model": p.model.state_dict(), "optimizer": optimizer.state_dict()})

    q = problem(model)
    other = q.objective(seed=99)
    with fallback(name, model):
        resumed = make_optimizer(name, other, q, **options | {"lr": 0.5, "damping": 0.9})
    resumed.warm_start(batches(q, 2, seed=60))
    resumed.step(other.closure(q.x, q.y))
    q.model.load_state_dict(state["model"])
    resumed.load_state_dict(state["optimizer"])
    for x, y in data[stop:]:
        assert torch.equal(
            resumed.step(other.closure(x, y)), optimizer.step(objective.closure(x, y))
        )
        assert same(weights(other), weights(objective))


def trajectory(name: str, seed: int, model: str = "tanh") -> list[dict[str, Tensor]]:
    p = problem(model)
    objective = p.objective(seed)
    with fallback(name, model):
        optimizer = make_optimizer(name, objective, p)
    optimizer.warm_start(batches(p, 2))
    found = []
    for x, y in batches(p, 3, seed=30):
        optimizer.step(objective.closure(x, y))
        found.append(weights(objective))
    return found


@pytest.mark.thinned(4)
@algorithms
@pytest.mark.parametrize("model", REPRESENTATIVE)
def test_the_seed_is_all_that_labels_depend_on(name: str, model: str) -> None:
    """The same seed: the same bits. Another: the same bits too, unless labels are drawn from the
    model.
    """
    first, again, other = (
        trajectory(name, 0, model),
        trajectory(name, 0, model),
        trajectory(name, 1, model),
    )
    assert all(same(a, b) for a, b in zip(first, again, strict=True))
    assert all(same(a, b) for a, b in zip(first, other, strict=True)) is (
        ALGORITHMS[name].labels != "model"
    )


@algorithms
def test_a_state_is_what_a_checkpoint_of_a_run_may_hold(name: str) -> None:
    """Also with an embedding, whose factors are diagonal."""
    p = problem("embedding")
    objective = p.objective()
    with fallback(name, "embedding"):
        optimizer = make_optimizer(name, objective, p)
    for x, y in batches(p, 2):
        optimizer.step(objective.closure(x, y))
    state = optimizer.descent.state_dict()
    check_descent(saved_and_loaded(state), state, objective.blocks, new=True)


# ------------------------------------------------------------------------------------------------
# alone and in company


def compared(
    name: str, others: list[str], schedule: tuple[int, int], warm: bool
) -> tuple[np.ndarray, np.ndarray, dict[str, Tensor]]:
    """⟨p, p⟩ by step and block, loss by step, final weights of a comparison that `name` leads."""
    p = problem("tanh")
    objective = p.objective()
    run = cl.compare(
        objective,
        batches(p, 6, seed=30),
        reference=name,
        algorithms=others,
        lr=1e-3,
        damping=OVERALL,
        update_every=schedule[0],
        refresh_every=schedule[1],
        warm=batches(p, 3) if warm else (),
        progress=False,
    )
    gram = run.dataset["gram"].sel(algorithm=name, other=name)
    return gram.values, run.dataset["loss"].values, weights(objective)


@pytest.mark.thinned(4)
@algorithms
@pytest.mark.parametrize("quarter", range(4))
def test_compare_gives_the_same_bits_alone_and_in_company(name: str, quarter: int) -> None:
    """In company of every fourth of the others: each of them, and each of four ways to run, comes
    in one of the quarters.
    """
    others = [n for n in NAMES if n != name][quarter::4]
    schedule, warm = SCHEDULES[(quarter + NAMES.index(name)) % 2], quarter // 2 == 1
    alone = compared(name, [], schedule, warm)
    company = compared(name, others, schedule, warm)
    # one product of 1 or of all directions: other sums
    np.testing.assert_allclose(alone[0], company[0], rtol=1e-13)
    assert np.array_equal(alone[1], company[1])
    assert same(alone[2], company[2])


Directions = list[dict[str, Tensor]]


@pytest.fixture(scope="module")
def together() -> dict[str, tuple[Directions, Directions, Directions]]:
    """{name: directions of seven minibatches on observations of its own, and on shared ones in two
    orders}.

    Every algorithm stands among all others, each of them there twice, once with schedules of its
    own: in one order behind those before it in the table, in the other behind those after it. Plain
    descent moves the weights.
    """
    p = problem("tanh")
    objective = p.objective()

    def crowd() -> list[tuple[str, Descent]]:
        watched = [
            (n, make_descent(n, objective, p, update_every=2, refresh_every=3)) for n in NAMES
        ]
        others = [
            ("", make_descent(n, objective, p, update_every=1 + i % 3, refresh_every=1 + i % 2))
            for i, n in enumerate(NAMES)
        ]
        return [d for pair in zip(others, watched, strict=True) for d in pair]

    own, forth, back = dict(d for d in crowd() if d[0]), crowd(), crowd()[::-1]
    found: dict[str, tuple[Directions, Directions, Directions]] = {n: ([], [], []) for n in NAMES}
    for x, y in batches(p, 7):
        closure = objective.closure(x, y)
        for n, d in own.items():
            found[n][0].append(cloned(d.direction(closure.observe(d.needs))))
        for order, company in ((1, forth), (2, back)):
            observation = closure.observe(frozenset().union(*(d.needs for _, d in company)))
            for n, d in company:
                direction = d.direction(observation)
                if n:
                    found[n][order].append(cloned(direction))
        move(objective, observation.gradients, lambda _: 0.05)
    return found


def cloned(direction: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {block: t.clone() for block, t in direction.items()}


@pytest.mark.thinned(2)
@algorithms
def test_directions_on_a_shared_observation_are_those_of_its_own(
    name: str, together: dict[str, tuple[Directions, Directions, Directions]]
) -> None:
    own, forth, back = together[name]
    assert len(own) == 7
    assert all(same(a, b) for a, b in zip(forth, own, strict=True))
    assert all(same(a, b) for a, b in zip(back, own, strict=True))


# ------------------------------------------------------------------------------------------------
# data and models


@algorithms
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtype_follows_the_model(name: str, dtype: torch.dtype) -> None:
    """Also where the data come in the other dtype."""
    p = problem("tanh", dtype=dtype)
    other = torch.float64 if dtype == torch.float32 else torch.float32
    objective = p.objective()
    optimizer = make_optimizer(name, objective, p)
    optimizer.warm_start([(x.to(other), y) for x, y in batches(p, 2)])
    for x, y in batches(p, 3):
        loss = optimizer.step(objective.closure(x.to(other), y))
    assert loss.dtype == dtype
    assert {w.dtype for w in p.model.parameters()} == {dtype}
    tensors = list(floating(optimizer.state_dict()["curvlab"]))
    kept = {
        "ssn": set(),
        "skqn-b1": {dtype, torch.float64},
        "skqn-b2": {dtype, torch.float64},
    }  # no tensor; Λ̃ is double
    assert {t.dtype for t in tensors} == kept.get(name, {dtype})
    curvature = optimizer.descent.curvature
    gradients = objective.closure(p.x, p.y).observe().gradients
    assert {d.dtype for d in curvature.precondition(gradients).values()} == {dtype}


def floating(value: object) -> Iterator[Tensor]:
    """All floating tensors in nested containers, but for the core of a `Compact` operator, which is
    always double.
    """
    if isinstance(value, Tensor):
        yield from [value] if value.is_floating_point() else []
    elif isinstance(value, dict | list | tuple):
        core = (
            value.get("core")
            if isinstance(value, dict) and value.get("kind") == "Compact"
            else None
        )
        for v in value.values() if isinstance(value, dict) else value:
            yield from [] if v is core else floating(v)


@pytest.mark.thinned(3)
@algorithms
@pytest.mark.parametrize("model", REPRESENTATIVE)
def test_single_precision_is_double_precision_rounded(name: str, model: str) -> None:
    """The data's labels, and no stopping rule, since a draw or an iteration may fall on the other
    side of a rounding.
    """
    options = {"labels": "data"} | to_the_end(name)
    found = []
    for dtype in (torch.float32, torch.float64):
        with fallback(name, model):
            found.append(first_direction(name, problem(model, dtype=dtype), **options)[1])
    single, double = found
    for block, expected in double.items():
        assert float((single[block].double() - expected).norm() / expected.norm()) < 1e-4


@pytest.mark.thinned(3)
@pairs(RULED, "n", [1, 2])
def test_one_or_two_examples_are_enough(name: str, model: str, n: int) -> None:
    with fallback(name, model):
        observation, direction = first_direction(name, problem(model, n=n))
    assert finite(direction)
    assert dot(direction, observation.gradients) > 0


@pairs(RULED, "value", [0.0, 1.0])
def test_constant_inputs(name: str, model: str, value: float) -> None:
    """A batch of one image many times over: rank one, and with zeros a first layer without
    statistics.
    """
    p = problem(model)
    with fallback(name, model):
        observation, direction = first_direction(
            name, Problem(p.model, p.likelihood, torch.full_like(p.x, value), p.y)
        )
    assert finite(direction)
    assert dot(direction, observation.gradients) > 0


@algorithms
def test_zero_gradients_give_zero_directions(name: str) -> None:
    """A model that is certain, and right: softmax is 1 in floating point, so drawn labels have no
    gradient either.
    """
    p = problem("tanh")
    with torch.no_grad():
        p.model[4].bias.copy_(torch.tensor([1e4, 0.0, 0.0]))
    objective = p.objective()
    optimizer = make_optimizer(name, objective, p)
    before = weights(objective)
    for x, _ in batches(p, 3):
        observation = objective.closure(x, torch.zeros_like(p.y)).observe({"data", "model"})
        assert not any(
            bool(s.g.any()) for label in observation.passes.values() for s in label.values()
        )
        optimizer.step(objective.closure(x, torch.zeros_like(p.y)))
    assert same(weights(objective), before)


@algorithms
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1e15, 1e30])
def test_enormous_gradients_give_a_finite_direction_or_a_clear_error(
    name: str, dtype: torch.dtype, size: float
) -> None:
    p = problem("linear", dtype=dtype)
    objective = p.objective()
    d = make_descent(name, objective, p, momentum=0.0)
    observation = objective.closure(p.x * size, p.y).observe(d.needs)
    assert float(observation.gradients["1"].abs().max()) > size / 100
    with warnings.catch_warnings():
        # a damping that is raised is said, and tested elsewhere
        warnings.simplefilter("ignore", cl.CurvlabWarning)
        message = None
        try:
            direction = d.direction(observation)
        except cl.CurvlabError as error:
            message = str(error)
    # of statistics; of a matrix of second derivatives
    remedies = (
        "raise the damping",
        "an overflow",
    )
    named = message is not None and ("block 1" in message or ALGORITHMS[name].whole)
    assert finite(direction) if message is None else (named and any(r in message for r in remedies))


@algorithms
@pytest.mark.parametrize("frozen", ["0.weight", "2.bias", "4"])
def test_frozen_parameters_stay_and_the_others_move(name: str, frozen: str) -> None:
    """A weight, a bias, a whole layer. A bias that trains alone has no rule."""
    p = problem("tanh")
    for parameter, w in p.model.named_parameters():
        w.requires_grad_(not parameter.startswith(frozen))
    before = {n: w.detach().clone() for n, w in p.model.named_parameters()}
    objective = p.objective()
    with warnings.catch_warnings():
        if frozen == "0.weight":
            warnings.simplefilter("ignore", cl.CurvlabWarning)
        optimizer = make_optimizer(name, objective, p)
    optimizer.warm_start(batches(p, 2))
    for x, y in batches(p, 3):
        optimizer.step(objective.closure(x, y))
    for parameter, w in p.model.named_parameters():
        assert torch.equal(w, before[parameter]) is parameter.startswith(frozen)


@algorithms
@pytest.mark.parametrize("model", ["norm", "layer-norm", "conv-1d"])
def test_a_layer_that_lacks_what_is_read(name: str, model: str) -> None:
    """Structural methods say that it follows the gradient; the others precondition it as anything
    else.
    """
    p = problem(model)
    with fallback(name, model):
        observation, direction = first_direction(name, p)
    assert finite(direction)
    for block in p.objective().blocks:
        # thesis 3.4.3: α/λ
        rate = 1 / damped(name, p) if ALGORITHMS[name].fallback is not IdentityBlock else 1.0
        plain = torch.equal(direction[block.name], rate * observation.gradients[block.name])
        # without pairs L-BFGS is the gradient, divided by 1 + λ
        identity = not ALGORITHMS[name].whole and isinstance(
            ALGORITHMS[name].block(block), IdentityBlock
        )
        assert plain is (follows_the_gradient(name, block) or identity)
    objective = p.objective()
    before = weights(objective)
    with fallback(name, model):
        optimizer = make_optimizer(name, objective, p)
    optimizer.warm_start(batches(p, 2))
    for x, y in batches(p, 3):
        optimizer.step(objective.closure(x, y))
    after = weights(objective)
    assert finite(after)
    assert not any(torch.equal(after[n], before[n]) for n in before)


class Pixels(nn.Module):
    """A network of linear layers as one of 1×1 convolutions on 1×1 images, of the same weights."""

    def __init__(self, net: nn.Sequential) -> None:
        super().__init__()
        self.net = nn.Sequential(
            *(self.convolution(m) if isinstance(m, nn.Linear) else m for m in net)
        )

    @staticmethod
    def convolution(linear: nn.Linear) -> nn.Conv2d:
        made = nn.Conv2d(linear.in_features, linear.out_features, 1).to(linear.weight.dtype)
        with torch.no_grad():
            made.weight.copy_(linear.weight[:, :, None, None])
            assert made.bias is not None
            made.bias.copy_(linear.bias)
        return made

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x[:, :, None, None]).flatten(1)


def full_rank() -> Problem:
    """Square layers whose mean gradients have full rank."""
    net = nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 5)).double()
    with torch.no_grad():
        for i, w in enumerate(net.parameters()):
            w.copy_(normal(*w.shape, seed=i) / 2)
    x = normal(12, 5, seed=8)
    return Problem(net, cl.likelihoods.Gaussian(), x, normal(12, 5, seed=9))


@algorithms
def test_a_1x1_convolution_on_1x1_images_is_a_linear_layer(name: str) -> None:
    """The steps of a warm start and five minibatches, and what every block has learnt from them."""
    p = full_rank() if name in IN_A_BASIS else problem("tanh")
    q = Problem(Pixels(p.model), p.likelihood, p.x, p.y)
    steps: list[list[Tensor]] = []
    for one in (p, q):
        objective = one.objective()
        optimizer = make_optimizer(name, objective, one, lr=0.01, **to_the_end(name))
        optimizer.warm_start(batches(p, 3))
        steps.append([])
        for x, y in batches(p, 5, seed=30):
            y = normal(len(x), 5, seed=int(y.sum() * 1e6) % 1000) if name in IN_A_BASIS else y
            before = weights(objective)
            optimizer.step(objective.closure(x, y))
            steps[-1].append(
                torch.cat([(w - before[n]).flatten() for n, w in weights(objective).items()])
            )
    for linear, convolution in zip(*steps, strict=True):
        assert float(linear.norm()) > 0
        assert_near(convolution, linear, 1e-10)


# ------------------------------------------------------------------------------------------------
# devices

DEVICES = [
    pytest.param(
        "cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
    ),
]


def on(p: Problem, device: str) -> Problem:
    return Problem(p.model.to(device), p.likelihood, p.x, p.y)


@algorithms
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("model", REPRESENTATIVE)
def test_device_follows_the_model(name: str, device: str, model: str) -> None:
    """Data stay on the CPU. With the data's labels the run is the CPU's; drawn labels have a
    generator of the device.
    """
    ends = []
    for where in ("cpu", device):
        p = on(problem(model), where)
        objective = p.objective()
        with fallback(name, model):
            optimizer = make_optimizer(name, objective, p, labels="data", lr=0.01)
        for x, y in batches(p, 3):
            optimizer.step(objective.closure(x, y))
        assert {t.device.type for t in floating(optimizer.state_dict()["curvlab"])} <= {where}
        ends.append({n: w.cpu() for n, w in weights(objective).items()})
    for n, expected in ends[0].items():
        torch.testing.assert_close(ends[1][n], expected, rtol=1e-8, atol=1e-9)


@algorithms
@pytest.mark.parametrize("device", DEVICES)
def test_drawn_labels_repeat_on_every_device(name: str, device: str) -> None:
    ends = []
    for _ in range(2):
        p = on(problem("tanh"), device)
        objective = p.objective()
        optimizer = make_optimizer(name, objective, p)
        warm_start(objective, [optimizer.descent.curvature], batches(p, 2))
        for x, y in batches(p, 2):
            optimizer.step(objective.closure(x, y))
        assert {w.device.type for w in p.model.parameters()} == {device}
        ends.append(weights(objective))
    for n, expected in ends[0].items():
        torch.testing.assert_close(ends[1][n], expected, rtol=1e-10, atol=1e-12)
