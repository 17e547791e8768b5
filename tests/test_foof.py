"""FOOF: one step solves least squares; it is KFAC with I in the place of G."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from problems import assert_near, batches, normal, problem
from torch import nn

import curvlab as cl
from curvlab.algorithms import approximation


@pytest.mark.parametrize("outputs", [1, 3])
def test_one_step_of_length_1_solves_least_squares(outputs: int) -> None:
    """Of one linear layer, ½‖z − y‖² and no damping: W* of the normal equations by `lstsq`."""
    torch.manual_seed(0)
    model = nn.Linear(4, outputs).double()
    x, y = normal(20, 4, seed=1), normal(20, outputs, seed=2)
    objective = cl.Objective(model, cl.likelihoods.Gaussian(), seed=0)
    optimizer = cl.optimizer("foof", objective, lr=1.0, damping=0.0, momentum=0.0)
    optimizer.step(objective.closure(x, y))
    found = torch.cat([model.weight, model.bias[:, None]], 1).detach()
    design = torch.cat([x, torch.ones(20, 1, dtype=x.dtype)], 1)
    assert_near(found, torch.linalg.lstsq(design, y).solution.T, 1e-12)


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("model", ["tanh", "tokens", "conv", "embedding"])
def test_it_is_kfac_with_the_identity_for_G(model: str, sharing: str) -> None:
    p = problem(model)
    objective = p.objective()
    foof: Any = approximation("foof", objective, damping=0.3, sharing=sharing)
    kfac: Any = approximation("kfac-ef", objective, damping=0.3, sharing=sharing)
    for x, y in batches(p, 3):
        observation = objective.closure(x, y).observe({"data"})
        foof.update(observation)
        kfac.update(observation)
    for name, H in foof.inverse.items():
        A = kfac.blocks[name].A
        A = torch.diag(A) if A.ndim == 1 else A
        damped = A + 0.3 * torch.eye(len(A), dtype=A.dtype)
        unit = torch.eye(kfac.blocks[name].G.shape[0], dtype=A.dtype)
        assert_near(H.dense(), torch.kron(unit, damped.inverse().contiguous()), 1e-11)
        assert_near(foof.blocks[name].matrix(0.3).dense(), torch.kron(unit, damped), 1e-13)


def test_the_factor_of_an_embedding_stays_a_diagonal() -> None:
    p = problem("embedding")
    objective = p.objective()
    foof: Any = approximation("foof", objective)
    foof.update(objective.closure(p.x, p.y).observe(foof.needs))
    assert foof.blocks["1"].A.ndim == 1
