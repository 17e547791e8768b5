"""Schedules: learning rates in closed form, torch's by name, options that fit."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

import curvlab as cl
from curvlab.training.schedules import SCHEDULES, find, maker


def rates(name: str, epochs: int, count: int, **options: object) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.3)
    scheduler = maker(name, epochs, options)(optimizer)
    found = []
    for _ in range(count):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


CLOSED: dict[str, tuple[dict, Callable[[int], float]]] = {
    "constant": ({}, lambda e: 0.3),
    "step": ({}, lambda e: 0.3 * 0.1 ** (e // 60)),
    "cosine": ({}, lambda e: 0.3 * (1 + math.cos(math.pi * e / 150)) / 2),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_closed_forms_at_the_defaults(name: str) -> None:
    options, expected = CLOSED[name]
    assert rates(name, 150, 150, **options) == pytest.approx([expected(e) for e in range(150)], rel=1e-12, abs=1e-15)


def test_options() -> None:
    assert rates("step", 9, 5, every=2, factor=0.5) == pytest.approx([0.3, 0.3, 0.15, 0.15, 0.075], rel=1e-14)
    assert rates("cosine", 2, 3, least=0.1) == pytest.approx([0.3, 0.2, 0.1], rel=1e-14)
    assert rates("ExponentialLR", 9, 3, gamma=0.5) == pytest.approx([0.3, 0.15, 0.075], rel=1e-14)
    assert SCHEDULES["step"].options == ["every", "factor"]
    assert SCHEDULES["cosine"].options == ["least"]


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("stepp", {}, "unknown schedule 'stepp'; did you mean 'step'.*known: constant, step, cosine, .*ExponentialLR"),
        ("step", {"evry": 1}, "unknown option of schedule step 'evry'; did you mean 'every'"),
        ("constant", {"every": 1}, "unknown option of schedule constant"),
        ("step", {"every": 0}, "schedule 'step': every must be at least 1 and factor above 0, not 0 and 0.1"),
        ("step", {"factor": -2}, "schedule 'step': every must be at least 1 and factor above 0, not 60 and -2"),
        ("step", {"every": 2.5}, "every of schedule step must be a whole number, not 2.5"),
        ("step", {"factor": math.nan}, "factor of schedule step must be a finite number, not nan"),
        ("cosine", {"least": -1.0}, "schedule 'cosine': least must be 0 or positive, not -1"),
        ("ExponentialLR", {}, "schedule 'ExponentialLR': .*gamma"),
        ("step", {"every": "often"}, "every of schedule step must be a whole number, not 'often'"),
        ("OneCycleLR", {"max_lr": 1.0, "total_steps": 5}, "schedule 'OneCycleLR': .*momentum"),
    ],
)
def test_what_does_not_fit_is_one_line(name: str, options: dict, says: str) -> None:
    with pytest.raises(cl.CurvlabError, match=says) as caught:
        maker(name, 5, options)
    assert "\n" not in str(caught.value)


def test_cosine_needs_to_know_how_many_epochs() -> None:
    with pytest.raises(cl.CurvlabError, match="laid out over all epochs: say how many"):
        maker("cosine", None, {})
    assert find("cosine").spans
    assert not find("step").spans
