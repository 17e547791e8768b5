"""What a user adds without touching the package: an algorithm and a probe in one module beside a
model, by all commands.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_cli import call, refused

import curvlab as cl
from curvlab.algorithms import ALGORITHMS, damping_for
from curvlab.probes import PROBES

MODULE = '''
import torch
from torch import nn

from curvlab.algorithms import ALGORITHMS, Algorithm, ByBlock, Constants
from curvlab.curvature.base import blend
from curvlab.linalg.operators import Kronecker
from curvlab.probes import Variable, probe


class Inputs:
    """H = I ⊗ (A + λI)⁻¹: KFAC without the factor of the derivatives."""

    reads, memory, secant = "factors", ("A",), None

    def __init__(self, outputs, *, scale=1.0):
        self.A, self.outputs, self.scale = None, outputs, scale

    def update(self, statistics, weight):
        self.A = blend(self.A, self.scale * statistics.A, weight)

    def matrix(self, damping=0.0):
        A = self.A + damping * torch.eye(len(self.A)).to(self.A)
        return Kronecker((torch.eye(self.outputs).to(A), A))

    def refresh(self, damping):
        self.inverse = self.matrix(damping).inv()


def make(block, *, scale=1.0):
    return Inputs(block.shape[0], scale=scale)


ALGORITHMS["inputs"] = Algorithm(
    summary="KFAC's factor of the inputs alone",
    source="of a user",
    builds=ByBlock(make),
    labels="data",
    constants=Constants(lr=0.1, damping=0.1),
)


SLOPE = Variable(("algorithm",), "slope of the loss along the direction", "nat")

@probe("slope", "gᵀp", {"slope": SLOPE})
def slope(frame):
    g = frame.now.gradients
    return [torch.stack([sum((p[b] * g[b]).sum() for b in g) for p in frame.directions.values()])]


def build():
    return nn.Sequential(nn.Linear(256, 5), nn.ReLU(), nn.Linear(5, 10))
'''
PROBLEM = ["--model", "of_a_user:build", "--data", "mnist16", "--batch-size", "20000"]


@pytest.fixture(autouse=True)
def _module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Lies in the working directory and was never imported; what it enters is taken out again."""
    (tmp_path / "of_a_user.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    tables: tuple[tuple[Any, Any], ...] = ((ALGORITHMS, dict(ALGORITHMS)), (PROBES, dict(PROBES)))
    yield
    sys.modules.pop("of_a_user", None)
    for table, before in tables:
        table.clear()
        table.update(before)


def test_compare_knows_what_the_module_of_the_model_enters(tmp_path: Path) -> None:
    words = [
        "--reference",
        "kfac",
        "--algorithms",
        "inputs,sgd-m",
        "--probe",
        "slope",
        "--steps",
        "2",
        "--damping",
        "0.5",
    ]
    assert call("compare", *PROBLEM, *words, "--out", str(tmp_path / "run")) == 0
    ds = cl.open(tmp_path / "run")
    assert ds["slope"].dims == ("step", "algorithm")
    assert ds["slope"].attrs == {
        "long_name": "slope of the loss along the direction",
        "units": "nat",
    }
    gradient = ds["minibatch_gradient_norm"].isel(step=0)
    np.testing.assert_allclose(
        ds["slope"].sel(algorithm="sgd-m").isel(step=0), float((gradient**2).sum()), rtol=1e-5
    )
    assert bool((ds["slope"].isel(step=0) > 0).all())
    # the overall λ, where the line says nothing else
    assert damping_for("inputs", 0.5, 20000) == 0.5


def test_train_goes_on_and_other_commands_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        "train",
        *PROBLEM,
        "--algorithm",
        "inputs",
        "--set",
        "scale=2",
        "--probe",
        "slope:2",
        "--lr",
        "0.1",
    ]
    assert call(*words, "--epochs", "2", "--out", str(tmp_path / "whole")) == 0
    assert call(*words, "--epochs", "1", "--out", str(tmp_path / "cut")) == 0
    sys.modules.pop("of_a_user")
    del ALGORITHMS["inputs"], PROBES["slope"]  # as a new process has them
    assert (
        call("train", "--resume", *PROBLEM[:2], "--epochs", "2", "--out", str(tmp_path / "cut"))
        == 0
    )
    whole, cut = (cl.open(tmp_path / name) for name in ("whole", "cut"))
    assert whole["slope_step"].values.tolist() == [0, 2, 4]
    for name in ("train_loss", "slope"):
        np.testing.assert_array_equal(whole[name], cut[name])
    assert float(whole["train_loss"][-1]) < float(whole["train_loss"][0])
    assert "unknown option of inputs 'scail'; did you mean 'scale'" in refused(
        capsys, *words, "--set", "scail=1"
    )
    assert (
        call(
            "spectrum",
            *PROBLEM[:4],
            "--algorithm",
            "inputs",
            "--after",
            "0,1",
            "--samples",
            "50",
            "--batch-size",
            "20000",
            "--out",
            str(tmp_path / "spectrum"),
        )
        == 0
    )
    assert call("list", "probes") == 0
    assert "slope" in capsys.readouterr().out
    assert call("list", "algorithms") == 0


def test_the_estimate_is_what_it_says() -> None:
    """Against the definition, through the public calls."""
    sys.path.insert(0, ".")
    try:
        import of_a_user  # type: ignore[import-not-found]  # made by the fixture
    finally:
        sys.path.remove(".")
    train, _ = cl.datasets.load("mnist16")
    objective = cl.Objective(of_a_user.build(), cl.likelihoods.Categorical(), seed=0)
    x, y = next(iter(train.batches(50, seed=0)))
    mine = cl.approximation("inputs", objective, damping=0.25, scale=3.0)
    mine.update(objective.closure(x, y).observe(mine.needs))
    a = np.concatenate([x.numpy(), np.ones((50, 1))], 1).astype(float)
    H = np.kron(np.eye(5), np.linalg.inv(3 * a.T @ a / 50 + 0.25 * np.eye(257)))
    np.testing.assert_allclose(mine.inverse["1"].dense(), H, atol=2e-4)
    optimizer = cl.optimizer("inputs", objective)
    before = objective.closure(x, y)().item()
    for _ in range(5):
        optimizer.step(objective.closure(x, y))
    assert objective.closure(x, y)().item() < before
