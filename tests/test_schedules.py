"""Schedules: learning rates in closed form, torch's by name, options that fit."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import curvlab as cl
from curvlab.errors import CurvlabWarning
from curvlab.training.schedules import SCHEDULES, find_schedule, known, maker


def rates(name: str, epochs: int, count: int, **options: object) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.3)
    scheduler = maker(name, epochs, options)(optimizer)
    found = []
    for _ in range(count):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


CLOSED: dict[str, tuple[dict[str, Any], Callable[[int], float]]] = {
    "constant": ({}, lambda e: 0.3),
    "step": ({}, lambda e: 0.3 * 0.1 ** (e // 60)),
    "cosine": ({}, lambda e: 0.3 * (1 + math.cos(math.pi * e / 150)) / 2),
    "power": ({}, lambda e: 0.3 * (e + 1) ** -0.75),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_closed_forms_at_the_defaults(name: str) -> None:
    options, expected = CLOSED[name]
    assert rates(name, 150, 150, **options) == pytest.approx(
        [expected(e) for e in range(150)], rel=1e-12, abs=1e-15
    )


def test_options() -> None:
    assert rates("step", 9, 5, every=2, factor=0.5) == pytest.approx(
        [0.3, 0.3, 0.15, 0.15, 0.075], rel=1e-14
    )
    assert rates("cosine", 2, 3, least=0.1) == pytest.approx([0.3, 0.2, 0.1], rel=1e-14)
    assert rates("ExponentialLR", 9, 3, gamma=0.5) == pytest.approx([0.3, 0.15, 0.075], rel=1e-14)
    assert rates("power", 9, 4, exponent=0.5) == pytest.approx(
        [0.3, 0.3 / 2**0.5, 0.3 / 3**0.5, 0.15], rel=1e-14
    )
    assert SCHEDULES["step"].options == ["every", "factor"]
    assert SCHEDULES["cosine"].options == ["least"]


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        (
            "stepp",
            {},
            (
                "unknown schedule 'stepp'; did you mean 'step'.*known: constant, step, cosine,"
                " power, .*ExponentialLR"
            ),
        ),
        ("step", {"evry": 1}, "unknown option of schedule step 'evry'; did you mean 'every'"),
        ("constant", {"every": 1}, "unknown option of schedule constant"),
        (
            "step",
            {"every": 0},
            "schedule 'step': every must be at least 1 and factor above 0, not 0 and 0.1",
        ),
        (
            "step",
            {"factor": -2},
            "schedule 'step': every must be at least 1 and factor above 0, not 60 and -2",
        ),
        ("step", {"every": 2.5}, "every of schedule step must be a whole number, not 2.5"),
        ("step", {"factor": math.nan}, "factor of schedule step must be a finite number, not nan"),
        ("cosine", {"least": -1.0}, "schedule 'cosine': least must be 0 or positive, not -1"),
        ("power", {"exponent": -1.0}, "schedule 'power': exponent must be 0 or positive, not -1"),
        ("ExponentialLR", {}, "schedule 'ExponentialLR': .*gamma"),
        ("step", {"every": "often"}, "every of schedule step must be a whole number, not 'often'"),
        (
            "StepLR",
            {"step_size": 3, "gamma": "abc"},
            "gamma of schedule StepLR must be 0 or positive, not 'abc'",
        ),
        (
            "StepLR",
            {"gamma": 0.5},
            "schedule 'StepLR': step_size must be given: it has step_size, gamma",
        ),
        (
            "PolynomialLR",
            {"power": -1},
            "power of schedule PolynomialLR must be 0 or positive, not -1",
        ),
        (
            "ReduceLROnPlateau",
            {"patience": "abc"},
            "patience of schedule ReduceLROnPlateau must be a whole number, not 'abc'",
        ),
        (
            "ReduceLROnPlateau",
            {"mode": "up"},
            "unknown mode of schedule ReduceLROnPlateau 'up'.*known: min, max",
        ),
        (
            "CyclicLR",
            {"base_lr": 0.1, "max_lr": 1, "scale_mode": "x"},
            "unknown scale_mode of schedule CyclicLR 'x'",
        ),
        (
            "CyclicLR",
            {"base_lr": 0.1, "max_lr": 1, "scale_fn": abs},
            "is made with objects .scale_fn., which have no name",
        ),
        (
            "LambdaLR",
            {"lr_lambda": abs},
            "is made with objects .lr_lambda., which have no name: give a function",
        ),
        ("SequentialLR", {}, "is made with objects .schedulers."),
        ("ChainedScheduler", {}, "is made with objects .schedulers."),
        (
            "MultiStepLR",
            {"milestones": "30"},
            "milestones of schedule MultiStepLR must be whole numbers, as 30,60, not '30'",
        ),
        (
            "MultiStepLR",
            {"milestones": [1, 2.5]},
            "milestones of schedule MultiStepLR must be a whole number, not 2.5",
        ),
        (
            "OneCycleLR",
            {"max_lr": 1.0, "total_steps": 4},
            "schedule 'OneCycleLR': it ends after 4 steps, and the run takes 5",
        ),
        (
            "OneCycleLR",
            {"max_lr": 1.0},
            "schedule 'OneCycleLR': You must define either total_steps",
        ),
        (
            "ExponentialLR",
            {"gamma": 1e200},
            "schedule 'ExponentialLR': it leads to the learning rate inf",
        ),
        ("step", {"every": 2**64}, "every of schedule step must be within 64 bits"),
        (
            "StepLR",
            {"step_size": 2**63},
            "step_size of schedule StepLR must be a whole number from 1 to 9223372036854775807",
        ),
    ],
)
def test_what_does_not_fit_is_one_line(name: str, options: dict[str, Any], says: str) -> None:
    with pytest.raises(cl.CurvlabError, match=says) as caught:
        maker(name, 5, options, 5)
    assert "\n" not in str(caught.value)


FITTING: dict[str, dict[str, Any]] = {
    name: {} for name in known() if name not in ("LambdaLR", "MultiplicativeLR")
}
FITTING |= {
    "StepLR": {"step_size": 1},
    "MultiStepLR": {"milestones": [1, 3]},
    "ExponentialLR": {"gamma": 0.9},
}
FITTING |= {
    "CosineAnnealingLR": {"T_max": 3},
    "CyclicLR": {"base_lr": 0.01, "max_lr": 0.1, "step_size_up": 2},
}
FITTING |= {
    "CosineAnnealingWarmRestarts": {"T_0": 2},
    "OneCycleLR": {"max_lr": 0.1, "total_steps": 4},
}
FITTING = {
    name: options
    for name, options in FITTING.items()
    if name not in ("SequentialLR", "ChainedScheduler")
}
BAD: tuple[Any, ...] = (
    "abc",
    -1,
    2**64,
    10**400,
    math.nan,
    math.inf,
    True,
    None,
    [],
    {},
    b"x",
    1j,
    object(),
)


@pytest.mark.parametrize("name", FITTING)
def test_any_value_of_any_option_is_taken_or_refused_in_one_line(name: str) -> None:
    """Of every schedule that torch has, and of ours: no other exception, and what is taken
    steps.
    """
    refused = 0
    for option in find_schedule(name).options:
        for value in BAD:
            try:
                make = maker(name, 4, FITTING[name] | {option: value}, 4)
            except cl.CurvlabError as error:
                refused += "\n" not in str(error)
                continue
            optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.3, momentum=0.9)
            scheduler: Any = make(optimizer)
            for _ in range(4):
                optimizer.step()
                scheduler.step(*([1.0] if name == "ReduceLROnPlateau" else []))
                assert 0 <= optimizer.param_groups[0]["lr"] < math.inf
    assert refused >= 8 * len(find_schedule(name).options)


def problem() -> tuple[cl.Objective, list[tuple[torch.Tensor, torch.Tensor]]]:
    draw = torch.Generator().manual_seed(0)
    x, y = torch.randn(32, 4, generator=draw), torch.randint(3, (32,), generator=draw)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return cl.Objective(torch.nn.Linear(4, 3), cl.likelihoods.Categorical()), [
            (x[:16], y[:16]),
            (x[16:], y[16:]),
        ]


@pytest.mark.parametrize("name", [name for name in FITTING if not find_schedule(name).spans])
def test_a_run_goes_on_in_the_middle_of_every_schedule(name: str, tmp_path: Path) -> None:
    objective, batches = problem()
    given: dict[str, Any] = {
        "algorithm": "sgd-m",
        "schedule": name,
        "schedule_options": FITTING[name],
    }
    whole = cl.train(objective, batches, epochs=4, **given)
    halves, _ = problem()
    cl.train(halves, batches, epochs=2, folder=tmp_path, **given)
    run = cl.train(halves, batches, epochs=4, folder=tmp_path, resume=True, **given)
    assert run.dataset["lr"].values.tolist() == whole.dataset["lr"].values.tolist()
    assert all(
        torch.equal(*pair)
        for pair in zip(objective.model.parameters(), halves.model.parameters(), strict=True)
    )


def test_one_cycle_moves_rate_and_momentum() -> None:
    """Of our own optimizer, whose groups have both, as of torch's."""
    objective, batches = problem()
    options: dict[str, Any] = {
        "max_lr": 0.1,
        "total_steps": 4,
        "base_momentum": 0.5,
        "max_momentum": 0.8,
    }
    reference = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.3, momentum=0.9)
    expected = torch.optim.lr_scheduler.OneCycleLR(reference, **options)
    optimizer = cl.optimizer("sgd-m", objective)
    scheduler = maker("OneCycleLR", None, options)(optimizer)
    for _ in range(3):
        here, there = optimizer.param_groups[0], reference.param_groups[0]
        assert (here["lr"], here["momentum"]) == (there["lr"], there["momentum"])
        optimizer.step(objective.closure(*batches[0]))
        reference.step()
        scheduler.step()
        expected.step()
    assert optimizer.descent.momentum.beta == pytest.approx(0.65, abs=0.15)


@pytest.mark.parametrize(("every", "steps"), [("epoch", 8), ("step", 4)])
def test_a_schedule_that_ends_ends_the_run_with_a_line(
    every: str, steps: int, tmp_path: Path
) -> None:
    objective, batches = problem()
    given: dict[str, Any] = {
        "algorithm": "sgd-m",
        "schedule": "OneCycleLR",
        "schedule_every": every,
        "evaluate_every": 3,
    }
    given |= {
        "schedule_options": {"max_lr": 0.1, "total_steps": 4},
        "folder": tmp_path,
        "seconds": 60,
    }
    with pytest.warns(
        CurvlabWarning,
        match=f"the run ends with its schedule, which has 4 steps, after {steps} steps of",
    ):
        run = cl.train(objective, batches, **given)
    assert run.dataset["steps"].values[-1] == steps
    assert math.isfinite(run.dataset["train_loss"].values[-1])
    with pytest.warns(CurvlabWarning, match="the run ends with its schedule"):
        again = cl.train(objective, batches, resume=True, **given)
    assert again.dataset["steps"].values.tolist() == run.dataset["steps"].values.tolist()
    with pytest.raises(
        cl.CurvlabError,
        match=f"it ends after 4 steps, and the run takes {5 if every == 'epoch' else 9}",
    ):
        cl.train(objective, batches, **given | {"folder": None, "epochs": 9, "steps": 9})


def test_a_function_that_makes_no_scheduler() -> None:
    objective, batches = problem()
    with pytest.raises(
        cl.CurvlabError, match="must return a scheduler of the optimizer, not NoneType"
    ):
        cl.train(objective, batches, schedule=lambda optimizer: None)


@pytest.mark.parametrize("name", ["k-bfgs-convergent", "k-bfgs-20-convergent"])
def test_the_convergent_variants_at_the_rates_of_their_theorems(name: str) -> None:
    """α_k = α k^−β at step k, k from 1: thesis, Theorems 2 and 4."""
    objective, batches = problem()
    run = cl.train(
        objective,
        batches,
        epochs=3,
        algorithm=name,
        lr=0.1,
        schedule="power",
        schedule_every="step",
        schedule_options={"exponent": 0.6},
        evaluate_every=1,
    )
    seen = [0.1 * k**-0.6 for k in (1, 3, 5, 7)]
    assert run.dataset["lr"].values.tolist() == pytest.approx(seen, rel=1e-12)


def test_cosine_needs_to_know_how_many_epochs() -> None:
    with pytest.raises(cl.CurvlabError, match="laid out over all epochs: say how many"):
        maker("cosine", None, {})
    assert find_schedule("cosine").spans
    assert not find_schedule("step").spans
