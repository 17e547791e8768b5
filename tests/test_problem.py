"""A model and its data by name: resolved in one place, and a user's function called once for each
model that is needed.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from test_cli import call

import curvlab as cl
from curvlab.errors import CurvlabError
from curvlab.problem import Problem

COUNTING = """
from torch import nn
calls = []

def net():
    calls.append(1)
    return nn.Sequential(nn.Linear(256, 4), nn.Tanh(), nn.Linear(4, 10)), "categorical", "mnist16"
"""

SHORT = ("--batch-size", "200")
COMMANDS = {
    "compare": ("compare", "--algorithms", "kfac", "--reference", "sgd-m", "--steps", "2", *SHORT),
    "train": ("train", "--steps", "2", "--evaluate-samples", "200", *SHORT),
    "spectrum": ("spectrum", "--after", "0,1", "--samples", "20", *SHORT),
}


@pytest.fixture
def counting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module of the user's in the working directory, whose function counts its calls."""
    monkeypatch.chdir(tmp_path)
    name = f"counting_{len(sys.modules)}"
    Path(f"{name}.py").write_text(COUNTING)
    return name


def calls(name: str) -> int:
    """How often the function was called since it was last asked."""
    found: list[int] = sys.modules[name].calls
    count = len(found)
    found.clear()
    return count


@pytest.mark.parametrize("command", COMMANDS)
def test_a_users_function_is_called_once(command: str, counting: str) -> None:
    assert call(*COMMANDS[command], "--model", f"{counting}:net", "--out", "run") == 0
    assert calls(counting) == 1


def test_it_is_called_once_where_a_run_goes_on(counting: str) -> None:
    """And under the run's own seed, which the command line need not say again."""
    first = (*COMMANDS["train"], "--model", f"{counting}:net", "--seed", "3", "--out", "run")
    assert call(*first) == 0
    assert calls(counting) == 1
    assert (
        call("train", "--resume", "--model", f"{counting}:net", "--steps", "4", "--out", "run") == 0
    )
    assert calls(counting) == 1
    whole = (*COMMANDS["train"], "--model", f"{counting}:net", "--seed", "3", "--out", "at-once")
    assert call(*whole, "--steps", "4") == 0
    one, other = (
        torch.load(f"{name}/checkpoint.pt", weights_only=False) for name in ("run", "at-once")
    )
    assert one["model"].keys() == other["model"].keys()
    assert all(torch.equal(one["model"][key], other["model"][key]) for key in one["model"])


def test_every_seed_of_a_comparison_has_a_model_of_its_own(counting: str) -> None:
    assert (
        call(*COMMANDS["compare"], "--model", f"{counting}:net", "--seeds", "3", "--out", "run")
        == 0
    )
    assert calls(counting) == 3


@pytest.mark.parametrize("seed", [0, 5])
def test_the_first_model_is_the_one_that_build_gives(seed: int, counting: str) -> None:
    problem = Problem(model=f"{counting}:net", seed=seed, device="cpu")
    found = [problem.network(), problem.network(), problem.network(seed + 1)]
    wanted = [cl.models.build(f"{counting}:net", s) for s in (seed, seed, seed + 1)]
    for one, other in zip(found, wanted, strict=True):
        assert all(
            torch.equal(p, q) for p, q in zip(one.parameters(), other.parameters(), strict=True)
        )
    assert found[0] is not found[1]


def test_names_are_those_of_the_tables_or_the_users_choice(counting: str) -> None:
    problem = Problem(model=f"{counting}:net")
    assert (problem.data_name, problem.entry.likelihood) == ("mnist16", "categorical")
    assert Problem(model="mlp-256-20", data="mnist").data_name == "mnist"
    bernoulli = Problem(model="mlp-256-20", likelihood="bernoulli", device="cpu").objective()
    assert type(bernoulli.likelihood).__name__ == "Bernoulli"


@pytest.mark.parametrize(
    ("wrong", "line"),
    [
        ({"model": "mlp-256-2"}, "unknown model"),
        ({"data": "mnist-17"}, "unknown data set"),
        ({"likelihood": "poisson"}, "unknown likelihood"),
        ({"dtype": "float16"}, "unknown dtype"),
        ({"device": "tpu"}, "device"),
        ({"seed": -1}, "seed"),
    ],
)
def test_what_is_unknown_is_said(wrong: dict[str, object], line: str) -> None:
    with pytest.raises(CurvlabError, match=line):
        Problem(**({"model": "mlp-256-20"} | wrong)).check()  # type: ignore[arg-type]  # wrong on purpose
