"""A zoo of small problems that the tests share: models, likelihoods, data, all from explicit
seeds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from _pytest.mark import ParameterSet
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn

import curvlab as cl
from curvlab.datasets import Dataset
from curvlab.layers import Block
from curvlab.likelihoods import Likelihood
from curvlab.optim import Optimizer


@dataclass(frozen=True)
class Problem:
    """A model, a likelihood and one minibatch."""

    model: Any  # an `nn.Module`, of whose parts mypy knows nothing
    likelihood: Likelihood
    x: Tensor
    y: Tensor

    def objective(self, seed: int = 0) -> cl.Objective:
        return cl.Objective(self.model, self.likelihood, seed)


def _seeded(build: Callable[[], nn.Module], dtype: torch.dtype) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        net = build().to(dtype)
        with torch.no_grad():
            for weight in net.parameters():
                if weight.ndim == 1 and bool(
                    (weight == weight[0]).all()
                ):  # a norm's ones and zeros say nothing
                    weight.add_(torch.randn_like(weight), alpha=0.3)
        return net


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Normal numbers from an explicit seed."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def spd(order: int, seed: int = 0) -> Tensor:
    """A well-conditioned symmetric positive definite matrix."""
    m = normal(order, order, seed=seed)
    m = m @ m.T / order + 0.3 * torch.eye(order, dtype=m.dtype)
    return (m + m.T) / 2


def targets(likelihood: Likelihood, z: Tensor, seed: int = 2) -> Tensor:
    """Targets that fit the outputs, drawn from a fixed seed."""
    return likelihood.sample(torch.zeros_like(z), torch.Generator().manual_seed(seed))


class Tokens(nn.Module):
    """Linear layers over [N, T, F], outputs pooled over T: a weight shared over T places."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x))).mean(1)


class OwnNorm(nn.Module):
    """A layer norm of one's own: its parameters enter by products and sums, for which there is no
    rule.
    """

    def __init__(self, features: int) -> None:
        super().__init__()
        self.weight, self.bias = (
            nn.Parameter(torch.ones(features)),
            nn.Parameter(torch.zeros(features)),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * nn.functional.layer_norm(x, self.weight.shape) + self.bias


class WithNorm(nn.Module):
    """A norm between linear layers: with a rule, or parameters of a layer without one."""

    def __init__(self, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(5, 4), norm(4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.norm(self.first(x))))


def convolutional(groups: int, *norm: nn.Module) -> nn.Sequential:
    """Stride, padding, dilation, a convolution without bias; 3 outputs."""
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, stride=2, padding=1, groups=groups),
        *norm,
        nn.Tanh(),
        nn.Conv2d(4, 2, (2, 1), dilation=(2, 1), padding=(0, 1), bias=False),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(10, 3),
    )


class Signal(nn.Sequential):
    """One-dimensional convolutions, the first of them depthwise and padded to the same length by
    reflection.
    """

    def __init__(self) -> None:
        super().__init__(
            nn.Conv1d(2, 4, 4, padding="same", groups=2, padding_mode="reflect"),
            nn.Tanh(),
            nn.Conv1d(4, 3, 3, stride=3),
            nn.GroupNorm(1, 3),
            nn.Flatten(),
            nn.Linear(6, 3),
        )


class Words(nn.Module):
    """Tokens, one of them padding; 3 outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.last = nn.Embedding(6, 4, padding_idx=2), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.words(x)).mean(1))


def eval_norm(net: nn.Module) -> nn.Module:
    """In eval mode, with statistics that are not the initial ones."""
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    return net.eval()


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "tanh": (
        lambda: nn.Sequential(
            nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3)
        ),
        (5,),
    ),
    "relu": (lambda: nn.Sequential(nn.Linear(5, 6), nn.ReLU(inplace=True), nn.Linear(6, 3)), (5,)),
    "no-bias": (
        lambda: nn.Sequential(nn.Linear(5, 4, bias=False), nn.Tanh(), nn.Linear(4, 3)),
        (5,),
    ),
    "linear": (lambda: nn.Linear(5, 3), (5,)),
    "tokens": (Tokens, (2, 3)),
    "norm": (lambda: WithNorm(OwnNorm), (5,)),
    "layer-norm": (lambda: WithNorm(nn.LayerNorm), (5,)),
    "batch-norm": (lambda: eval_norm(WithNorm(nn.BatchNorm1d)), (5,)),
    "conv": (lambda: convolutional(1), (2, 5, 5)),
    "groups": (lambda: convolutional(2), (2, 5, 5)),
    "conv-norm": (lambda: eval_norm(convolutional(1, nn.BatchNorm2d(4))), (2, 5, 5)),
    "conv-1d": (Signal, (2, 7)),
    "embedding": (Words, (3,)),
}
"""{name: (build, shape of one input)}; every model has 3 outputs."""

RULED = [name for name in MODELS if name != "norm"]
"""Models whose every parameter belongs to a layer with a rule."""

REPRESENTATIVE = ["tanh", "tokens", "conv-norm", "conv-1d", "embedding"]
"""For what takes long: one place and several, groups of outputs, a bias that is missing, a weight
stored as [I, O].
"""

LIKELIHOODS: dict[str, Callable[[], Likelihood]] = {
    "categorical": cl.likelihoods.Categorical,
    "bernoulli": cl.likelihoods.Bernoulli,
    "gaussian": cl.likelihoods.Gaussian,
}


class Poisson:
    """A likelihood of one's own: counts, whose outputs are logarithms of their rates, ℓ = Σ_c
    exp(z_c) − y_c z_c.
    """

    def check(self, z: Tensor, y: Tensor) -> None:
        if y.shape != z.shape or bool((y < 0).any()):
            raise cl.CurvlabError("Poisson targets must be counts, shaped as the outputs")

    def loss(self, z: Tensor, y: Tensor) -> Tensor:
        return (z.exp() - y * z).flatten(1).sum(1)

    def sample(self, z: Tensor, generator: torch.Generator) -> Tensor:
        return torch.poisson(z.exp(), generator=generator)

    def root(self, z: Tensor) -> Tensor:
        return torch.diag_embed((z / 2).exp()).movedim(1, 0)


def inputs(model: str, n: int, dtype: torch.dtype = torch.float64, seed: int = 1) -> Tensor:
    """n examples for a model of the zoo."""
    shape = MODELS[model][1]
    if model == "embedding":
        return torch.randint(6, (n, *shape), generator=torch.Generator().manual_seed(seed))
    return normal(n, *shape, seed=seed).to(dtype)


def problem(
    model: str = "tanh",
    likelihood: str = "categorical",
    n: int = 7,
    dtype: torch.dtype = torch.float64,
) -> Problem:
    """Model and likelihood by name, n examples."""
    build = MODELS[model][0]
    net, chosen = _seeded(build, dtype), LIKELIHOODS[likelihood]()
    x = inputs(model, n, dtype)
    return Problem(net, chosen, x, targets(chosen, torch.zeros(n, 3, dtype=dtype)))


def batches(p: Problem, count: int, seed: int = 5) -> list[tuple[Tensor, Tensor]]:
    """`count` further minibatches of the shape of the problem's."""
    made = []
    for i in range(count):
        dtype = next(p.model.parameters()).dtype
        if p.x.is_floating_point():
            x = normal(*p.x.shape, seed=seed + i).to(dtype)
        else:
            x = torch.randint(6, p.x.shape, generator=torch.Generator().manual_seed(seed + i))
        made.append((x, targets(p.likelihood, torch.zeros(len(x), 3, dtype=dtype), seed + i)))
    return made


def in_turn(
    first: Iterable[str], second: Iterable[str], third: Sequence[object]
) -> list[ParameterSet]:
    """Every pair of the first two with one of `third` in turn; its other values are slow."""
    found = []
    for (i, a), (j, b), (k, c) in product(enumerate(first), enumerate(second), enumerate(third)):
        slow = (i + j) % len(third) != k
        found.append(pytest.param(a, b, c, marks=[pytest.mark.slow] if slow else []))
    return found


def assert_drawn(figure: Figure) -> list[Axes]:
    """Its axes that hold something: there are some, both ways are named, and lines are of finite
    numbers, x with y.
    """
    axes = [ax for ax in figure.axes if ax.lines or ax.collections or ax.patches or ax.images]
    assert figure.get_supxlabel() or any(ax.get_xlabel() for ax in axes)
    assert any(ax.get_ylabel() or ax.get_title() for ax in axes)
    for ax in axes:
        for line in ax.lines:
            x, y = (np.asarray(values, dtype=float) for values in line.get_data())
            assert len(x) == len(y) > 0
            assert np.isfinite(y).any()
    return axes


def laid_out(block: Block, tensors: Mapping[str, Tensor], batch: int = 0) -> Tensor:
    """{parameter: tensor} → [*batch, O, I], the bias last: `Block.gather` by another route, from
    the type of the layer.
    """
    weight, *bias = (tensors[name] for name in block.params)
    if block.module is None:
        return weight
    if isinstance(block.module, nn.Embedding) or type(block.module).__name__ == "Conv1D":
        weight = weight.transpose(-1, -2)
    columns = [weight[..., None].flatten(batch + 1), *(b[..., None] for b in bias)]
    return torch.cat(columns, -1)


def as_a_variable(weight: Tensor, batch: int = 0) -> Tensor:
    """As TNT and Shampoo see a parameter: the pixels of a filter are one way (thesis 4.7.2), and
    none where there is one.
    """
    return weight.flatten(batch + 2).squeeze(-1) if weight.ndim > batch + 2 else weight


def dense(part: Dataset) -> Tensor:
    """The inputs of a data set that is not sparse."""
    assert isinstance(part.x, Tensor)
    return part.x


def grad_of(p: Tensor) -> Tensor:
    assert p.grad is not None
    return p.grad


def curvature_of(optimizer: torch.optim.Optimizer) -> Any:
    """With what its method has of its own, of which `Curvature` says nothing."""
    assert isinstance(optimizer, Optimizer)
    return optimizer.descent.curvature


def groupless(p: Problem) -> list[Block]:
    """Blocks whose outputs share their inputs: a, A and Kronecker factors exist."""
    return [b for b in p.objective().blocks if b.module is not None and b.groups == 1]


def module_of(block: Block) -> nn.Module:
    assert block.module is not None
    return block.module


def own_inputs(block: Block, a: Tensor) -> Tensor:
    """[N, T, Γ, I], or [N, T, I] where Γ is 1 → [N, T, O, I]: the inputs that each output sees."""
    outputs = block.shape[0]
    each = [
        a if block.groups == 1 else a[:, :, o // (outputs // block.groups)] for o in range(outputs)
    ]
    return torch.stack(each, 2)


def assert_near(actual: Tensor, expected: Tensor, tolerance: float = 1e-12) -> None:
    """Two routes to one number: same shape and dtype, difference in norm within `tolerance` of the
    expected norm.
    """
    assert (actual.shape, actual.dtype) == (expected.shape, expected.dtype)
    error, scale = float((actual - expected).norm()), float(expected.norm())
    assert error <= tolerance * scale, (
        f"relative error {error / scale if scale else error:.3g} above {tolerance:g}"
    )
