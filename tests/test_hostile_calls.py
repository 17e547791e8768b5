"""Bad calls in Python: every argument of the public functions with what it cannot be.

Each is a `CurvlabError` of one line, or is taken, and none leaves a file. They run up to the point
where training would begin.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import curvlab as cl
from curvlab import runs
from curvlab.spectra import Plan
from curvlab.training.loop import Training

BAD: tuple[Any, ...] = (
    "abc",
    "",
    "\x00",
    "a\nb",
    "\udcff",
    -1,
    0,
    2**63,
    2**64,
    -(2**64),
    10**400,
    10**5000,
    1.5,
    -0.5,
    math.nan,
    math.inf,
    -math.inf,
    1e300,
    True,
    None,
    [],
    {},
    (),
    b"x",
    1j,
    object(),
    int,
    torch.zeros(3),
    torch.tensor(math.nan),
    ["abc"],
    {"abc": 1},
    Path("/dev/null/x"),
)
NOT_OURS = (
    "objective",
    "batches",
    "validation",
    "warm",
    "error",
    "progress",
    "own",
    "schedule",
    "model",
    "likelihood",
    "x",
    "y",
    "data",
)
"""Models, data and functions of a user's, and what has no bad value."""


class Taken(Exception):
    """Training would begin."""


def taken(*_: object, **__: object) -> None:
    raise Taken


def objective() -> cl.Objective:
    return cl.Objective(torch.nn.Sequential(torch.nn.Linear(4, 3)), cl.likelihoods.Categorical())


def batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(torch.zeros(6, 4), torch.zeros(6, dtype=torch.long))]


CALLS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "train": (cl.train, lambda **k: cl.train(objective(), batches(), **k)),
    "compare": (cl.compare, lambda **k: cl.compare(objective(), batches(), **k)),
    "spectrum": (cl.spectrum, lambda **k: cl.spectrum(objective(), *batches()[0], **k)),
    "Objective": (
        cl.Objective.__init__,
        lambda **k: cl.Objective(torch.nn.Linear(4, 3), cl.likelihoods.Categorical(), **k),
    ),
    "optimizer": (cl.optimizer, lambda name="kfac", **k: cl.optimizer(name, objective(), **k)),
    "approximation": (
        cl.approximation,
        lambda name="kfac", **k: cl.approximation(name, objective(), **k),
    ),
    "lbfgs": (cl.approximation, lambda name="lbfgs", **k: cl.approximation(name, objective(), **k)),
    "batches": (cl.datasets.Dataset.batches, lambda size=2, **k: data().batches(size, **k)),
    "build": (cl.models.build, lambda name="mlp-256-20", **k: cl.models.build(name, **k)),
    "report": (cl.report, lambda runs="nothing", path="x.html", **k: cl.report(runs, path)),
    "open": (cl.open, lambda path="nothing": cl.open(path)),
    "momentum": (
        Plan.__init__,
        lambda momentum=0.5: cl.optimizer("adam", objective(), momentum=momentum),
    ),
}
"""{name: (the function whose arguments are tried, a call of it with some of them)}"""


def data() -> cl.datasets.Dataset:
    return cl.datasets.Dataset("made", *batches()[0], "made")


def arguments() -> Iterator[tuple[str, str]]:
    for name, (function, _) in CALLS.items():
        if name == "momentum":
            yield from ((name, "momentum"),)
            continue
        known = [
            p.name
            for p in inspect.signature(function).parameters.values()
            if p.kind is not p.VAR_KEYWORD
        ]
        yield from (
            (name, argument) for argument in known if argument not in (*NOT_OURS, "self", "augment")
        )


@pytest.fixture(autouse=True)
def _nothing_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Training, "run", taken)
    monkeypatch.setattr(runs, "compare_one", taken)
    monkeypatch.setattr(Plan, "record", taken)


@pytest.mark.filterwarnings("ignore::curvlab.errors.CurvlabWarning")
@pytest.mark.parametrize(("name", "argument"), list(arguments()))
def test_any_value_of_any_argument(name: str, argument: str, tmp_path: Path) -> None:
    refused = 0
    for value in BAD:
        said = ""
        try:
            CALLS[name][1](**{argument: value})
        except Taken:
            pass
        except cl.CurvlabError as error:
            said = str(error)
            refused += 1
        except Exception as error:
            raise AssertionError(
                f"{name}({argument}={value!r:.40}): {type(error).__name__}: {error}"
            ) from error
        assert said.isprintable()
        assert len(said) < 2000
    assert refused >= (10 if argument not in ("folder", "double_grad", "resume") else 0), (
        "hardly anything is refused"
    )
    assert not list(tmp_path.iterdir())
