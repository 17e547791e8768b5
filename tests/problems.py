"""A zoo of small problems that the tests share: models, likelihoods, data, all from explicit seeds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import curvlab as cl


@dataclass(frozen=True)
class Problem:
    """A model, a likelihood and one minibatch."""

    model: nn.Module
    likelihood: object
    x: Tensor
    y: Tensor

    def objective(self, seed: int = 0) -> cl.Objective:
        return cl.Objective(self.model, self.likelihood, seed)


def _seeded(build: Callable[[], nn.Module], dtype: torch.dtype) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return build().to(dtype)


def _normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def targets(likelihood: object, z: Tensor, seed: int = 2) -> Tensor:
    """Targets that fit the outputs, drawn from a fixed seed."""
    return likelihood.sample(torch.zeros_like(z), torch.Generator().manual_seed(seed))


class Tokens(nn.Module):
    """Linear layers over [N, T, F], outputs pooled over T: a weight shared over T places."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x))).mean(1)


class WithNorm(nn.Module):
    """A LayerNorm between linear layers: parameters of a layer without a rule."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(5, 4), nn.LayerNorm(4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.norm(self.first(x))))


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "tanh": (lambda: nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3)), (5,)),
    "relu": (lambda: nn.Sequential(nn.Linear(5, 6), nn.ReLU(inplace=True), nn.Linear(6, 3)), (5,)),
    "no-bias": (lambda: nn.Sequential(nn.Linear(5, 4, bias=False), nn.Tanh(), nn.Linear(4, 3)), (5,)),
    "linear": (lambda: nn.Linear(5, 3), (5,)),
    "tokens": (Tokens, (2, 3)),
    "norm": (WithNorm, (5,)),
}
"""{name: (build, shape of one input)}; every model has 3 outputs."""

LIKELIHOODS: dict[str, Callable[[], object]] = {
    "categorical": cl.likelihoods.Categorical,
    "bernoulli": cl.likelihoods.Bernoulli,
    "gaussian": cl.likelihoods.Gaussian,
}


def problem(model: str = "tanh", likelihood: str = "categorical", n: int = 7, dtype: torch.dtype = torch.float64) -> Problem:
    """Model and likelihood by name, n examples."""
    build, shape = MODELS[model]
    net, chosen = _seeded(build, dtype), LIKELIHOODS[likelihood]()
    x = _normal(n, *shape).to(dtype)
    return Problem(net, chosen, x, targets(chosen, torch.zeros(n, 3, dtype=dtype)))


def batches(p: Problem, count: int, seed: int = 5) -> list[tuple[Tensor, Tensor]]:
    """`count` further minibatches of the shape of the problem's."""
    made = []
    for i in range(count):
        x = _normal(*p.x.shape, seed=seed + i).to(p.x.dtype)
        made.append((x, targets(p.likelihood, torch.zeros(len(x), 3, dtype=p.x.dtype), seed + i)))
    return made


def assert_near(actual: Tensor, expected: Tensor, tolerance: float = 1e-12) -> None:
    """Two routes to one number: same shape and dtype, difference in norm within `tolerance` of the expected norm."""
    assert (actual.shape, actual.dtype) == (expected.shape, expected.dtype)
    error, scale = float((actual - expected).norm()), float(expected.norm())
    assert error <= tolerance * scale, f"relative error {error / scale if scale else error:.3g} above {tolerance:g}"
