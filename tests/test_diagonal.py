"""Adam's second moments by hand. (The whole of Adam against `torch.optim.Adam` stands in test_optim.py.)"""

from __future__ import annotations

import pytest
import torch
from problems import MODELS, batches, problem
from torch import Tensor

from curvlab.algorithms import approximation
from curvlab.curvature.diagonal import SecondMoment
from curvlab.linalg.operators import Diagonal


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.999])
@pytest.mark.parametrize("model", MODELS)
def test_second_moment_is_the_bias_corrected_sum(model: str, decay: float) -> None:
    """v̂_k = Σ_i (1 − β) β^{k−i} g_i² / (1 − βᵏ), H = diag(1 / (√v̂ + ε)): the sum, not the recursion."""
    p = problem(model)
    objective = p.objective()
    curvature = approximation("adam", objective, damping=1e-3, decay=decay)
    seen: dict[str, list[Tensor]] = {block.name: [] for block in objective.blocks}
    for k, (x, y) in enumerate(batches(p, 5), 1):
        observation = objective.closure(x, y).observe(curvature.needs)
        curvature.update(observation)
        for name, gradient in observation.gradients.items():
            seen[name].append(gradient.flatten())
            powers = decay ** torch.arange(k - 1, -1, -1, dtype=torch.float64)
            v = (1 - decay) * (powers[:, None] * torch.stack(seen[name]).square()).sum(0) / (1 - decay**k)
            inverse, block = curvature.inverse[name], curvature.blocks[name]
            assert isinstance(inverse, Diagonal)
            assert isinstance(block, SecondMoment)
            assert block.v is not None
            torch.testing.assert_close(block.v, v, rtol=1e-12, atol=0)
            torch.testing.assert_close(inverse.values, 1 / (v.sqrt() + 1e-3), rtol=1e-12, atol=0)


def test_first_direction_is_the_sign_of_the_gradient_without_damping() -> None:
    p = problem("tanh")
    objective = p.objective()
    curvature = approximation("adam", objective, damping=0.0)
    observation = objective.closure(p.x, p.y).observe(curvature.needs)
    curvature.update(observation)
    for name, direction in curvature.precondition(observation.gradients).items():
        torch.testing.assert_close(direction, observation.gradients[name].sign(), rtol=1e-14, atol=0)
