"""Likelihoods against torch.distributions, torch.func and enumeration of all labels."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from problems import LIKELIHOODS, assert_near, targets
from torch import Tensor
from torch.func import grad, hessian, vmap

import curvlab as cl
from curvlab.errors import CurvlabError
from curvlab.likelihoods import Bernoulli, Categorical, Gaussian, Likelihood

each = pytest.mark.parametrize("name", LIKELIHOODS)
LOG_2PI = math.log(2 * math.pi)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def per_example(likelihood: Likelihood, z: Tensor, y: Tensor) -> Tensor:
    """∂ℓₙ/∂z, flattened, by torch.func on one example at a time."""
    return vmap(grad(lambda one, label: likelihood.loss(one[None], label[None])[0]))(z, y).flatten(1)


def outer(root: Tensor) -> Tensor:
    """S Sᵀ of each example: [N, C, C]."""
    s = root.flatten(2)
    return torch.einsum("vnc,vnd->ncd", s, s)


def test_the_zoo_has_every_likelihood() -> None:
    assert set(LIKELIHOODS) == set(cl.likelihoods.LIKELIHOODS)
    for name, build in LIKELIHOODS.items():
        assert isinstance(build(), cl.likelihoods.LIKELIHOODS[name])


def log_probability(likelihood: Likelihood, z: Tensor, y: Tensor) -> Tensor:
    """log p(y | z) by torch.distributions, the constant of the Gaussian taken away."""
    if isinstance(likelihood, Categorical):
        return torch.distributions.Categorical(logits=z).log_prob(y)
    if isinstance(likelihood, Bernoulli):
        return torch.distributions.Bernoulli(logits=z).log_prob(y).sum(1)
    return (torch.distributions.Normal(z, torch.ones_like(z)).log_prob(y) + LOG_2PI / 2).sum(1)


@each
def test_loss_is_the_negative_log_likelihood_of_each_example(name: str) -> None:
    likelihood, z = LIKELIHOODS[name](), 3 * normal(7, 4)
    y = targets(likelihood, z)
    found = likelihood.loss(z, y)
    assert found.shape == (7,)
    assert_near(found, -log_probability(likelihood, z, y))


def test_losses_against_torch() -> None:
    z, p = normal(6, 4), torch.rand(6, 4, generator=generator(1), dtype=torch.float64)
    y = torch.arange(6) % 4
    assert_near(Categorical().loss(z, y).sum(), torch.nn.CrossEntropyLoss(reduction="sum")(z, y))
    assert_near(Bernoulli().loss(z, p).sum(), torch.nn.BCELoss(reduction="sum")(z.sigmoid(), p))
    assert_near(Gaussian().loss(z, p).sum(), torch.nn.MSELoss(reduction="sum")(z, p) / 2)


@each
@pytest.mark.parametrize("outputs", [1, 4])
def test_root_times_its_transpose_is_the_hessian(name: str, outputs: int) -> None:
    likelihood, z = LIKELIHOODS[name](), 2 * normal(5, outputs)
    y = targets(likelihood, z)
    expected = vmap(hessian(lambda one, label: likelihood.loss(one[None], label[None])[0]))(z, y)
    root = likelihood.root(z)
    assert root.shape[1:] == z.shape
    if name == "categorical" and outputs == 1:  # one class is certain: nothing to learn
        assert not root.any()
        assert not expected.any()
    else:
        assert_near(outer(root), expected)


@pytest.mark.parametrize("name", ["bernoulli", "gaussian"])
@pytest.mark.parametrize("shape", [(5,), (5, 2), (5, 2, 3)])
def test_outputs_of_any_shape(name: str, shape: tuple[int, ...]) -> None:
    """The axes after the first are units to be summed; a model may also return [N]."""
    likelihood, z = LIKELIHOODS[name](), normal(*shape)
    y = likelihood.sample(z, generator())
    likelihood.check(z, y)
    units = z.reshape(5, -1)
    assert_near(likelihood.loss(z, y), likelihood.loss(units, y.reshape(5, -1)))
    assert likelihood.root(z).shape == (units.shape[1], *shape)
    assert torch.equal(likelihood.root(z).reshape(-1, *units.shape), likelihood.root(units))


def enumerated(likelihood: Likelihood, z: Tensor) -> Tensor:
    """Σ_y p(y | z) ∂ℓ ∂ℓᵀ over all labels of each example."""
    n, c = z.shape
    if isinstance(likelihood, Categorical):
        labels = [torch.full((n,), k) for k in range(c)]
    else:
        labels = [torch.tensor(bits, dtype=z.dtype).expand(n, c) for bits in itertools.product([0.0, 1.0], repeat=c)]
    total = torch.zeros(n, c, c, dtype=z.dtype)
    for y in labels:
        g = per_example(likelihood, z, y)
        total += torch.einsum("n,nc,nd->ncd", log_probability(likelihood, z, y).exp(), g, g)
    return total


@pytest.mark.parametrize("name", ["categorical", "bernoulli"])
def test_enumerated_labels_give_the_same_fisher_as_the_root(name: str) -> None:
    likelihood, z = LIKELIHOODS[name](), 2 * normal(6, 4)
    assert_near(outer(likelihood.root(z)), enumerated(likelihood, z))


@each
def test_sampled_labels_give_the_same_fisher_as_the_root(name: str) -> None:
    """20 000 draws: every entry within 5 standard errors, the whole within 5 %."""
    likelihood, z = LIKELIHOODS[name](), normal(1, 3).expand(20_000, 3)
    g = per_example(likelihood, z, likelihood.sample(z, generator(7)))
    draws = torch.einsum("nc,nd->ncd", g, g)
    exact = outer(likelihood.root(z[:1]))[0]
    error = draws.std(0) / math.sqrt(len(draws))
    assert bool(((draws.mean(0) - exact).abs() <= 5 * error + 1e-15).all())
    assert float(error.norm() / exact.norm()) < 0.05
    mean = g.mean(0)
    assert bool((mean.abs() <= 5 * g.std(0) / math.sqrt(len(g))).all())  # the score has mean zero


@each
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_samples_are_targets_that_fit(name: str, dtype: torch.dtype) -> None:
    likelihood, z = LIKELIHOODS[name](), normal(50, 3).to(dtype)
    y = likelihood.sample(z, generator())
    likelihood.check(z, y)
    assert y.dtype == (torch.int64 if name == "categorical" else dtype)


@each
def test_samples_follow_their_generator_and_no_other(name: str) -> None:
    likelihood, z = LIKELIHOODS[name](), normal(50, 3)
    state = torch.random.get_rng_state()
    first, again, other = (likelihood.sample(z, generator(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.random.get_rng_state(), state)


@each
def test_extreme_outputs(name: str) -> None:
    """Probabilities that round to 0 and 1 give finite losses and roots."""
    likelihood = LIKELIHOODS[name]()
    z = torch.tensor([[1e4, -1e4, 0.0], [-1e4, -1e4, 1e4]], dtype=torch.float64)
    y = targets(likelihood, z)
    assert bool(likelihood.loss(z, y).isfinite().all())
    assert bool(likelihood.root(z).isfinite().all())
    expected = vmap(hessian(lambda one, label: likelihood.loss(one[None], label[None])[0]))(z, y)
    assert bool(expected.isfinite().all())
    torch.testing.assert_close(outer(likelihood.root(z)), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_class_numbers_of_any_integer_type(dtype: torch.dtype) -> None:
    z, y = normal(3, 4), torch.tensor([0, 3, 1])
    Categorical().check(z, y.to(dtype))
    assert torch.equal(Categorical().loss(z, y.to(dtype)), Categorical().loss(z, y))


Z = torch.zeros(3, 4, dtype=torch.float64)
BAD = {
    "float labels": (Categorical(), Z, torch.zeros(3), r"must be integers, not torch\.float32: convert them with y\.long"),
    "one-hot labels": (Categorical(), Z, torch.zeros(3, 4).long(), r"shape \(3, 4\) but 3 class numbers"),
    "label too large": (Categorical(), Z, torch.tensor([0, 4, 1]), "label 4 is out of range: .* run from 0 to 3"),
    "label negative": (Categorical(), Z, torch.tensor([0, -1, 1]), "label -1 is out of range"),
    "outputs of three axes": (Categorical(), torch.zeros(3, 4, 2), torch.zeros(3).long(), r"must be \[N, C\], not \[3, 4, 2\]"),
    "above one": (Bernoulli(), Z, torch.full((3, 4), 1.1), r"must lie in \[0, 1\]"),
    "below zero": (Bernoulli(), Z, torch.full((3, 4), -0.1), r"must lie in \[0, 1\]"),
    "bernoulli integers": (Bernoulli(), Z, torch.zeros(3, 4).long(), "Bernoulli targets must be floating point"),
    "bernoulli shape": (Bernoulli(), Z, torch.zeros(3), r"Bernoulli targets have shape \(3,\) but .* \(3, 4\)"),
    "bernoulli nan": (Bernoulli(), Z, torch.full((3, 4), math.nan), "Bernoulli targets contain NaN or Inf"),
    "gaussian shape": (Gaussian(), Z, torch.zeros(3, 1), r"Gaussian targets have shape \(3, 1\)"),
    "gaussian integers": (Gaussian(), Z, torch.zeros(3, 4).long(), "Gaussian targets must be floating point"),
    "gaussian inf": (Gaussian(), Z, torch.full((3, 4), math.inf), "Gaussian targets contain NaN or Inf"),
}


@pytest.mark.parametrize("case", BAD)
def test_targets_that_do_not_fit(case: str) -> None:
    likelihood, z, y, message = BAD[case]
    with pytest.raises(CurvlabError, match=message) as caught:
        likelihood.check(z, y)
    assert "\n" not in str(caught.value)


def test_bounds_of_the_targets_are_allowed() -> None:
    Categorical().check(Z, torch.tensor([0, 3, 0]))
    Bernoulli().check(Z, torch.tensor([[0.0, 1.0, 0.5, 0.0]]).expand(3, 4))
