"""Likelihoods against torch.distributions, torch.func and enumeration of all labels."""

from __future__ import annotations

import itertools
import math
import types
from typing import Any, cast

import pytest
import torch
from problems import LIKELIHOODS, assert_near, normal, targets
from torch import Tensor
from torch.func import grad, hessian, vmap

import curvlab as cl
from curvlab.errors import CurvlabError
from curvlab.likelihoods import Bernoulli, Categorical, Gaussian, Likelihood, root_of, sample_of

each = pytest.mark.parametrize("name", LIKELIHOODS)
LOG_2PI = math.log(2 * math.pi)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def per_example(likelihood: Likelihood, z: Tensor, y: Tensor) -> Tensor:
    """∂ℓₙ/∂z, flattened, by torch.func on one example at a time."""
    return vmap(grad(lambda one, label: likelihood.loss(one[None], label[None])[0]))(z, y).flatten(
        1
    )


def outer(root: Tensor) -> Tensor:
    """S Sᵀ of each example: [N, C, C]."""
    s = root.flatten(2)
    return torch.einsum("vnc,vnd->ncd", s, s)


def test_the_zoo_has_every_likelihood() -> None:
    # of sequences: tests/test_sequence_likelihoods.py
    assert set(LIKELIHOODS) | {"tokens"} == set(cl.likelihoods.LIKELIHOODS)
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
        labels = [
            torch.tensor(bits, dtype=z.dtype).expand(n, c)
            for bits in itertools.product([0.0, 1.0], repeat=c)
        ]
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


Z, MAP = torch.zeros(3, 4, dtype=torch.float64), torch.zeros(3, 4, 2, 2, dtype=torch.float64)
HOT = torch.eye(4).long()[:3]
BAD: dict[str, tuple[Likelihood, Tensor, Tensor, str]] = {
    "float labels": (
        Categorical(),
        Z,
        torch.zeros(3),
        r"must be integers, not torch\.float32: convert them with y\.long",
    ),
    "bool labels": (
        Categorical(),
        Z,
        torch.zeros(3).bool(),
        r"must be integers, not torch\.bool: convert them with y\.long",
    ),
    "one-hot": (
        Categorical(),
        Z,
        HOT,
        r"shape \(3, 4\) but 3 class numbers.*: of one-hot targets take y\.argmax\(1\)",
    ),
    "one-hot bool": (
        Categorical(),
        Z,
        HOT.bool(),
        r"of one-hot targets take y\.long\(\)\.argmax\(1\)",
    ),
    "several classes": (
        Categorical(),
        Z,
        torch.ones(3, 4).long(),
        r"take Bernoulli with y\.float\(\)",
    ),
    "counts": (Categorical(), Z, 2 * HOT + 1, r"of counts take y / y\.sum\(1, keepdim=True\)"),
    "negative matrix": (
        Categorical(),
        Z,
        -HOT,
        r"or probabilities of the outputs' shape, \(3, 4\)",
    ),
    "a column": (Categorical(), Z, torch.zeros(3, 1).long(), r"take y\.squeeze\(-1\)$"),
    "a column of floats": (
        Categorical(),
        Z,
        torch.zeros(3, 1),
        r"take y\.squeeze\(-1\)\.long\(\)$",
    ),
    "a channel of one": (
        Categorical(),
        MAP,
        torch.zeros(3, 1, 2, 2).long(),
        r"take y\.squeeze\(1\)$",
    ),
    "classes last": (
        Categorical(axis=1),
        torch.zeros(3, 5, 4),
        torch.zeros(3, 5).long(),
        r"shape \(3, 5\) but 12 class numbers, shape \(3, 4\), are needed: say Categor.*axis=-1\)$",
    ),
    "classes on axis 1": (
        Categorical(axis=-1),
        torch.zeros(3, 4, 5, 6),
        torch.zeros(3, 5, 6).long(),
        r"60 class numbers, shape \(3, 4, 5\), are needed: say Categorical\(axis=1\)$",
    ),
    "classes on either axis": (
        Categorical(),
        torch.zeros(3, 5, 5),
        torch.zeros(3, 5).long(),
        r"in two readings: 5 classes on axis 1 at places \[5\], or 5 .*\(axis=1\) or .*=-1\)$",
    ),
    "probabilities over either axis": (
        Categorical(),
        torch.zeros(3, 4, 4),
        torch.full((3, 4, 4), 0.25),
        r"in two readings: 4 classes on axis 1 .*Categorical\(axis=1\) or Categorical\(axis=-1\)$",
    ),
    "no class number anywhere": (
        Categorical(),
        torch.zeros(3, 5, 4),
        torch.zeros(3, 7).long(),
        r"shape \(3, 7\) but 12 .* shape \(3, 4\), are needed, or with the classes last \(3, 5\)",
    ),
    "smooth labels, classes last": (
        Categorical(label_smoothing=0.1),
        torch.zeros(3, 5, 4),
        torch.zeros(3, 5).long(),
        r"probabilities, which do not show their axis: say Categorical\(axis=-1\)$",
    ),
    "class weights of other classes": (
        Categorical(weight=[1.0, 2.0]),
        Z,
        torch.zeros(3).long(),
        "there are 2 class weights, but the model has 4 outputs",
    ),
    "one-hot, classes last": (
        Categorical(),
        torch.zeros(3, 2, 4),
        HOT[:, None].expand(3, 2, 4),
        r"classes last \(3, 2\): of one-hot targets take y\.argmax\(-1\)$",
    ),
    "one map": (
        Categorical(),
        torch.zeros(3, 4, 1, 1),
        torch.zeros(3).long(),
        r"return z\.flatten\(1\) from the model",
    ),
    "a class of a map": (
        Categorical(),
        MAP,
        torch.zeros(3).long(),
        r"12 class numbers, shape \(3, 2, 2\).*pool the outputs",
    ),
    "one output": (
        Categorical(),
        Z[:, :1],
        torch.tensor([0, 1, 0]),
        r"take Bernoulli with y\.float\(\)\.reshape\(3, 1\)",
    ),
    "one output, floats": (
        Categorical(),
        Z[:, :1],
        torch.tensor([[0.0], [1], [0]]),
        "take Bernoulli with y$",
    ),
    "one output, floats in a row": (
        Categorical(),
        Z[:, :1],
        torch.zeros(3),
        r"take Bernoulli with y\.reshape\(3, 1\)$",
    ),
    "outputs of one axis": (
        Categorical(),
        Z[:, 0],
        torch.zeros(3).long(),
        r"must be \[N, C\], \[N, C, …\] or \[N, …, C\], not \[3\]: .* Bernoulli",
    ),
    "negative probabilities": (
        Categorical(),
        Z,
        torch.full((3, 4), -0.1),
        r"not be negative: of logits take y\.softmax\(1\)",
    ),
    "probabilities of NaN": (
        Categorical(),
        Z,
        torch.full((3, 4), math.nan),
        "probabilities contain NaN or Inf: clean",
    ),
    "probabilities that sum to 2": (
        Categorical(),
        Z,
        torch.full((3, 4), 0.5),
        r"not to 2 \(example 0\): divide them by y\.sum\(1, ke",
    ),
    "one that sums to 0": (
        Categorical(),
        Z,
        torch.eye(4)[:3] * torch.tensor([[1], [0], [1]]),
        r"not to 0 \(example 1\): leave",
    ),
    "probabilities, classes last": (
        Categorical(),
        torch.zeros(3, 2, 4),
        torch.full((3, 2, 4), 0.25),
        r"over axis 1, not to 0\.5 .*say Categorical\(axis=-1\)$",
    ),
    "all but one": (
        Categorical(),
        Z,
        torch.tensor([0, -1, -1]),
        r"label -1 is out of range.*ignore_index=-1\)$",
    ),
    "not what is ignored": (
        Categorical(-1),
        Z,
        torch.tensor([-1, -100, 3]),
        "label -100 is out of range",
    ),
    "not what is ignored, too large": (
        Categorical(),
        Z,
        torch.tensor([-100, 0, 9]),
        "label 9 is out of range: .* 0 to 3",
    ),
    "label too large": (
        Categorical(),
        Z,
        torch.tensor([0, 4, 1]),
        "label 4 is out of range: .* run from 0 to 3",
    ),
    "label negative": (Categorical(), Z, torch.tensor([0, -1, 1]), "label -1 is out of range"),
    "above one": (Bernoulli(), Z, torch.full((3, 4), 1.1), r"must lie in \[0, 1\]"),
    "below zero": (Bernoulli(), Z, torch.full((3, 4), -0.1), r"must lie in \[0, 1\]"),
    "bernoulli integers": (
        Bernoulli(),
        Z,
        torch.zeros(3, 4).long(),
        "Bernoulli targets must be floating point",
    ),
    "bernoulli shape": (
        Bernoulli(),
        Z,
        torch.zeros(3),
        r"Bernoulli targets have shape \(3,\) but .* \(3, 4\)",
    ),
    "bernoulli row": (
        Bernoulli(),
        Z[:, :1],
        torch.zeros(3),
        r"Bernoulli targets have .*: take y\.reshape\(3, 1\)$",
    ),
    "bernoulli nan": (
        Bernoulli(),
        Z,
        torch.full((3, 4), math.nan),
        "Bernoulli targets contain NaN or Inf",
    ),
    "gaussian shape": (Gaussian(), Z, torch.zeros(3, 1), r"Gaussian targets have shape \(3, 1\)"),
    "gaussian integers": (
        Gaussian(),
        Z,
        torch.zeros(3, 4).long(),
        "Gaussian targets must be floating point",
    ),
    "gaussian inf": (
        Gaussian(),
        Z,
        torch.full((3, 4), math.inf),
        "Gaussian targets contain NaN or Inf",
    ),
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


def test_a_remedy_is_not_forbidden_by_the_next_check() -> None:
    """What the lines say, done."""
    c, last, hot = Categorical(), torch.zeros(3, 5, 4), HOT[:, None].expand(3, 5, 4)
    c.check(Z, HOT.argmax(1))
    c.check(Z, HOT.bool().long().argmax(1))
    c.check(Z, (2 * HOT + 1) / (2 * HOT + 1).sum(1, keepdim=True))
    c.check(Z, torch.zeros(3, 1).squeeze(-1).long())
    c.check(MAP, torch.zeros(3, 1, 2, 2).squeeze(1).long())
    last_axis = Categorical(axis=-1)
    last_axis.check(last, torch.zeros(3, 5).long())
    c.check(last, hot.argmax(-1))
    last_axis.check(last, hot.float())
    Categorical(axis=-1, label_smoothing=0.1).check(last, torch.zeros(3, 5).long())
    c.check(torch.zeros(3, 4, 1, 1).flatten(1), torch.zeros(3).long())
    c.check(Z, torch.full((3, 4), -0.1).softmax(1))
    Categorical(ignore_index=-1).check(Z, torch.tensor([0, -1, -1]))
    Bernoulli().check(Z[:, :1], torch.tensor([0, 1, 0]).float().reshape(3, 1))


# ----------------------------------------------------------------------------------- categorical:
# places, masks, probabilities

PLACES: list[tuple[int, ...]] = [(), (3,), (2, 3)]
IGNORED = [-100, 0, 2, 77]
everywhere = pytest.mark.parametrize("places", PLACES)


def masked(places: tuple[int, ...], ignore: int = -100, n: int = 5) -> tuple[Tensor, Tensor]:
    """Outputs of 4 classes, and class numbers some of which say that there is none; all of the
    second example's do.
    """
    z = 2 * normal(n, 4, *places)
    y = torch.randint(4, (n, *places), generator=generator(3))
    y = torch.where(torch.rand(y.shape, generator=generator(4)) < 0.3, ignore, y)
    y[1] = ignore
    return z, y


def probabilities(*shape: int) -> Tensor:
    return normal(*shape, seed=5).softmax(1)


def output_hessian(likelihood: Likelihood, z: Tensor, y: Tensor) -> Tensor:
    """[N, C', C'] by torch.func, one example at a time."""
    found = vmap(hessian(lambda one, label: likelihood.loss(one[None], label[None])[0]))(z, y)
    return found.reshape(len(z), z[0].numel(), -1)


@everywhere
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("ignore", IGNORED)
def test_categorical_losses_are_torchs_summed_over_places(
    places: tuple[int, ...], smoothing: float, ignore: int
) -> None:
    z, y = masked(places, ignore)
    likelihood = Categorical(ignore, smoothing)
    likelihood.check(z, y)
    each = torch.nn.functional.cross_entropy(
        z, y, reduction="none", ignore_index=ignore, label_smoothing=smoothing
    )
    assert likelihood.loss(z, y).shape == (5,)
    assert_near(likelihood.loss(z, y), each.reshape(5, -1).sum(1))
    assert float(likelihood.loss(z, y)[1]) == 0


@everywhere
def test_probabilities_are_taken_as_they_are(places: tuple[int, ...]) -> None:
    z, q = normal(5, 4, *places), probabilities(5, 4, *places)
    each = torch.nn.functional.cross_entropy(z, q, reduction="none").reshape(5, -1).sum(1)
    for likelihood in (
        Categorical(),
        Categorical(label_smoothing=0.3),
        Categorical(ignore_index=0),
    ):
        likelihood.check(z, q)
        likelihood.check(z, q.float())
        assert_near(likelihood.loss(z, q), each)
        assert_near(likelihood.loss(z, q), -(q * z.log_softmax(1)).reshape(5, -1).sum(1))
    y = q.argmax(1)
    hot = torch.zeros_like(q).scatter_(1, y[:, None], 1.0)
    smooth = 0.7 * hot + 0.3 / 4
    assert_near(Categorical().loss(z, hot), Categorical().loss(z, y))
    assert_near(Categorical().loss(z, smooth), Categorical(label_smoothing=0.3).loss(z, y))


@everywhere
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("ignore", IGNORED)
def test_categorical_root_is_the_hessian_and_zero_where_ignored(
    places: tuple[int, ...], smoothing: float, ignore: int
) -> None:
    z, y = masked(places, ignore)
    likelihood = Categorical(ignore, smoothing)
    root = likelihood.root(z, y)
    assert root.shape == (4 * math.prod(places), *z.shape)
    assert_near(outer(root), output_hessian(likelihood, z, y))
    assert not root.movedim(2, -1)[:, y == ignore].any()
    p = z.softmax(1).reshape(5, 4, -1)
    blocks = torch.einsum("ncp,cd->ncdp", p, torch.eye(4, dtype=z.dtype)) - torch.einsum(
        "ncp,ndp->ncdp", p, p
    )
    blocks = blocks * (y != ignore).reshape(5, 1, 1, -1)
    # [N, (c, place), (d, place)]
    expected = torch.diag_embed(blocks, dim1=2, dim2=4).flatten(3).flatten(1, 2)
    assert_near(outer(root), expected)
    unmasked = likelihood.root(z)
    assert torch.equal(
        unmasked, likelihood.root(z, y.clamp(1, 1) if ignore != 1 else y.clamp(2, 2))
    )
    assert_near(outer(unmasked), output_hessian(Categorical(), z, y.clamp(1, 1)))


@everywhere
def test_root_at_probabilities(places: tuple[int, ...]) -> None:
    """Probabilities of another precision sum to 1 up to rounding, and the root is that of the loss
    all the same.
    """
    z, q = normal(5, 4, *places), probabilities(5, 4, *places)
    assert_near(outer(Categorical().root(z, q)), output_hessian(Categorical(), z, q))
    rough = q.float().double() * (1 + 1e-5)
    Categorical().check(z, rough)
    assert_near(outer(Categorical().root(z, rough)), output_hessian(Categorical(), z, rough))
    assert (
        float((outer(Categorical().root(z)) - outer(Categorical().root(z, rough))).abs().max())
        > 1e-7
    )


def test_column_of_class_and_place() -> None:
    """Column c · |P| + place is √p_c (p − e_c) at that place, and zero at the others."""
    z = normal(2, 4, 3)
    root, p = Categorical().root(z), z.softmax(1)
    for c, place in itertools.product(range(4), range(3)):
        expected = torch.zeros_like(z)
        expected[:, :, place] = p[:, :, place]
        expected[:, c, place] -= 1
        assert_near(root[c * 3 + place], expected * p[:, c, place].sqrt()[:, None, None])


def test_drawn_labels_and_roots_of_one_place_are_those_of_ever() -> None:
    """To the bit: the seeds of logs depend on it."""
    z = 3 * normal(50, 7)
    p = z.softmax(1)
    expected = (p / torch.empty_like(p).exponential_(generator=generator(5))).argmax(1)
    y = torch.arange(50) % 7
    for found in (Categorical().sample(z, generator(5)), Categorical().sample(z, generator(5), y)):
        assert torch.equal(found, expected)
    eye = torch.eye(7, dtype=z.dtype)[:, None, :].expand(7, 50, 7)
    for found in (
        Categorical().root(z),
        Categorical().root(z, y),
        Categorical(label_smoothing=0.1).root(z, y),
    ):
        assert torch.equal(found, (p[None] - eye) * p.sqrt().T[:, :, None])


@everywhere
@pytest.mark.parametrize("ignore", IGNORED)
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_drawn_labels_are_ignored_where_the_data_are(
    places: tuple[int, ...], smoothing: float, ignore: int
) -> None:
    z, y = masked(places, ignore)
    likelihood, there = Categorical(ignore, smoothing), y != ignore
    drawn, plain = (likelihood.sample(z, generator(1), label) for label in (y, None))
    if not smoothing and ignore not in range(4):
        assert drawn.dtype == torch.int64
        assert torch.equal(drawn, torch.where(there, plain, ignore))
        likelihood.check(z, drawn)
    else:
        assert drawn.dtype == z.dtype
        assert torch.equal(drawn, plain * there.unsqueeze(1))
        assert torch.equal(plain.argmax(1), Categorical().sample(z, generator(1)))
        likelihood.check(z, plain)
    score = grad(lambda z: likelihood.loss(z, drawn).sum())(z)
    hot = torch.nn.functional.one_hot(Categorical().sample(z, generator(1)), 4).movedim(-1, 1)
    # p − e_ŷ, whatever smooths the data's labels
    assert_near(score, (z.softmax(1) - hot) * there.unsqueeze(1))
    assert float(likelihood.loss(z, drawn)[1]) == 0


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("ignore", IGNORED)
def test_enumerated_labels_of_places_give_the_root(smoothing: float, ignore: int) -> None:
    """Scores of 3 classes at 2 places, over all 9 labels, and what `sample` returns for each of
    them.
    """
    z, y = normal(4, 3, 2), torch.tensor([[0, 1], [ignore, 2], [1, ignore], [ignore, ignore]])
    likelihood, p = Categorical(ignore, smoothing), z.softmax(1)
    total, seen = torch.zeros(4, 6, 6, dtype=z.dtype), torch.zeros(4, dtype=z.dtype)
    for labels in itertools.product(range(3), repeat=2):
        certain = torch.full_like(z, -1e3)
        for place, label in enumerate(labels):
            certain[:, label, place] = 1e3
        drawn = likelihood.sample(certain, generator(), y)  # these labels, in the form of `sample`
        chance = p[:, labels[0], 0] * p[:, labels[1], 1]
        g = grad(lambda z, drawn=drawn: likelihood.loss(z, drawn).sum())(z).flatten(1)
        total, seen = total + torch.einsum("n,nc,nd->ncd", chance, g, g), seen + chance
    assert_near(seen, torch.ones_like(seen))
    assert_near(total, outer(likelihood.root(z, y)))


@everywhere
def test_labels_are_drawn_place_by_place(places: tuple[int, ...]) -> None:
    """Frequencies at every place, within 5 standard errors of 20 000 draws."""
    z = normal(1, 4, *places).expand(20_000, 4, *places)
    p = z[0].softmax(0)
    often = (
        torch.nn.functional.one_hot(Categorical().sample(z, generator(2)), 4)
        .double()
        .mean(0)
        .movedim(-1, 0)
    )
    assert bool(((often - p).abs() <= 5 * (p * (1 - p) / 20_000).sqrt()).all())


def test_all_ignored() -> None:
    z, y = normal(3, 4, 2), torch.full((3, 2), -100)
    Categorical().check(z, y)
    assert not Categorical().loss(z, y).any()
    assert not Categorical().root(z, y).any()
    assert torch.equal(Categorical().sample(z, generator(), y), y)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.uint8])
def test_what_is_ignored_in_small_integers(dtype: torch.dtype) -> None:
    """An unsigned 156 is not −100, though their bits are the same."""
    likelihood = Categorical(ignore_index=255 if dtype == torch.uint8 else -100)
    z, y = normal(3, 4), torch.tensor([0, likelihood.ignore_index, 3]).to(dtype)
    likelihood.check(z, y)
    assert torch.equal(likelihood.loss(z, y), likelihood.loss(z, y.long()))
    assert torch.equal(
        likelihood.sample(z, generator(), y), likelihood.sample(z, generator(), y.long())
    )
    if dtype == torch.uint8:
        with pytest.raises(CurvlabError, match="label 156 is out of range"):
            Categorical().check(z, torch.tensor([0, 156, 3]).to(dtype))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"label_smoothing": -0.1}, "label_smoothing must be between 0 and 1, not -0.1"),
        ({"label_smoothing": 1.5}, "label_smoothing must be between 0 and 1, not 1.5"),
        ({"label_smoothing": math.nan}, "label_smoothing must be a finite number"),
        ({"ignore_index": 0.5}, "ignore_index must be a whole number, not 0.5"),
        ({"ignore_index": True}, "ignore_index must be a whole number, not True"),
    ],
)
def test_arguments_that_do_not_fit(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(CurvlabError, match=message):
        Categorical(**arguments)


def test_a_subclass_with_a_constructor_of_its_own_has_the_defaults() -> None:
    class Own(Categorical):
        def __init__(self, weight: float) -> None:
            self.weight = weight

    z, y = masked(())
    own = Own(2.0)
    assert (own.ignore_index, own.label_smoothing, own.weight) == (-100, 0.0, 2.0)
    assert torch.equal(own.loss(z, y), Categorical().loss(z, y))
    assert own in {own}  # hashable


@pytest.mark.parametrize("likelihood", [Categorical(), Bernoulli(), Gaussian()])
def test_a_root_too_large_is_one_line(likelihood: Likelihood) -> None:
    z = torch.zeros(1, 1, dtype=torch.float64).expand(2, 40_000_000)
    with pytest.raises(
        CurvlabError,
        match=r"root of the output Hessian \(40000000 columns for each of 2 examples\) .* GB",
    ) as caught:
        likelihood.root(z)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["bernoulli", "gaussian"])
def test_labels_change_nothing_where_the_hessian_has_none(name: str) -> None:
    likelihood, z = LIKELIHOODS[name](), normal(5, 3)
    y = targets(likelihood, z)
    assert torch.equal(likelihood.root(z, y), likelihood.root(z))
    assert torch.equal(likelihood.sample(z, generator(), y), likelihood.sample(z, generator()))


# ----------------------------------------------------------------------
# a likelihood of one's own


class Recorder:
    """The arguments that came, as strings."""

    def check(self, z: Tensor, y: Tensor) -> None: ...

    def loss(self, z: Tensor, y: Tensor) -> Tensor:
        return z

    def _say(self, **given: object) -> dict[str, object]:
        return given


class Bare(Recorder):
    def root(self, z: Any) -> Any:
        return self._say(z=z)

    def sample(self, z: Any, generator: Any) -> Any:
        return self._say(z=z, g=generator)


class WithLabels(Recorder):
    def root(self, z: Any, y: Any) -> Any:
        return self._say(z=z, y=y)

    def sample(self, z: Any, generator: Any, y: Any) -> Any:
        return self._say(z=z, g=generator, y=y)


class WithLabelsOfAnotherName(Recorder):
    def root(self, logits: Any, /, target: Any) -> Any:
        return self._say(z=logits, y=target)

    def sample(self, logits: Any, rng: Any, target: Any) -> Any:
        return self._say(z=logits, g=rng, y=target)


class WithDefault(Recorder):
    def root(self, z: Any, y: Any = None) -> Any:
        return self._say(z=z, y=y)

    def sample(self, z: Any, generator: Any, y: Any = None) -> Any:
        return self._say(z=z, g=generator, y=y)


class ByName(Recorder):
    def root(self, z: Any, *, y: Any) -> Any:
        return self._say(z=z, y=y)

    def sample(self, z: Any, generator: Any, scale: Any = 1.0, *, y: Any = None) -> Any:
        return self._say(z=z, g=generator, y=y, scale=scale)


class Options(Recorder):
    """An argument with a default that is not called y is no place for labels."""

    def root(self, z: Any, jitter: Any = 1e-6) -> Any:
        return self._say(z=z, jitter=jitter)

    def sample(self, z: Any, generator: Any, temperature: Any = 2.0) -> Any:
        return self._say(z=z, g=generator, temperature=temperature)


class OptionsThenLabels(Recorder):
    def root(self, z: Any, jitter: Any = 1e-6, y: Any = None) -> Any:
        return self._say(z=z, jitter=jitter, y=y)

    def sample(self, z: Any, generator: Any, temperature: Any = 2.0, y: Any = None) -> Any:
        return self._say(z=z, g=generator, temperature=temperature, y=y)


class Passing(WithLabels):
    def root(self, *args: Any) -> Any:
        return super().root(*args)

    def sample(self, *args: Any, **kwargs: Any) -> Any:
        return super().sample(*args, **kwargs)


class Keywords(Recorder):
    def root(self, z: Any, **more: Any) -> Any:
        return self._say(z=z, **more)

    def sample(self, z: Any, generator: Any, **more: Any) -> Any:
        return self._say(z=z, g=generator, **more)


class Undifferentiated(WithLabels):
    @torch.no_grad()
    def root(self, z: Any, y: Any) -> Any:
        return self._say(z=z, y=y)

    @staticmethod
    def sample(z: Any, generator: Any, y: Any) -> Any:
        return {"z": z, "g": generator, "y": y}


class OfTheClass(WithLabels):
    @classmethod
    def root(cls, z: Any, y: Any) -> Any:
        return {"z": z, "y": y}


OWN: dict[type[Recorder], dict[str, object]] = {
    Bare: {},
    WithLabels: {"y": "y"},
    WithLabelsOfAnotherName: {"y": "y"},
    WithDefault: {"y": "y"},
    ByName: {"y": "y"},
    Options: {},
    OptionsThenLabels: {"y": "y"},
    Passing: {"y": "y"},
    Keywords: {"y": "y"},
    Undifferentiated: {"y": "y"},
    OfTheClass: {"y": "y"},
}


def called(likelihood: Likelihood) -> tuple[Any, Any]:
    """What root and sample say of arguments that are words."""
    z, generator, y = (cast(Any, word) for word in ("z", "g", "y"))
    return root_of(likelihood, z, y), sample_of(likelihood, z, generator, y)


@pytest.mark.wrong_shapes
@pytest.mark.parametrize("own", OWN)
def test_labels_go_where_a_class_takes_them(own: type[Recorder]) -> None:
    likelihood = own()
    assert isinstance(likelihood, Likelihood)
    options = {"jitter", "temperature", "scale"}
    for _ in range(2):  # read, and remembered
        root, sample = called(likelihood)
        assert {k: v for k, v in root.items() if k not in options} == {"z": "z"} | OWN[own]
        assert {k: v for k, v in sample.items() if k not in options} == {"z": "z", "g": "g"} | OWN[
            own
        ]
        assert root.get("jitter", 1e-6) == 1e-6
        assert (sample.get("temperature", 2.0), sample.get("scale", 1.0)) == (2.0, 1.0)


def test_a_method_that_an_instance_carries() -> None:
    """Two instances of one type need not take the same arguments; nor need a method that was
    exchanged.
    """
    bare, asking = (types.SimpleNamespace(check=None, loss=None) for _ in range(2))
    bare.root, bare.sample = (lambda z: "bare"), (lambda z, generator: "bare")
    asking.root, asking.sample = (lambda z, y: y), (lambda z, generator, y: y)
    for likelihood, expected in ((bare, "bare"), (asking, "y"), (bare, "bare")):
        root, sample = called(likelihood)
        assert root == expected
        assert sample == expected


def test_a_subclass_of_a_built_in_that_is_blind_to_labels() -> None:
    class Blind(Categorical):
        def root(self, z: Tensor) -> Tensor:  # type: ignore[override]  # takes no labels
            return 2 * super().root(z)

    z, y = masked(())
    assert torch.equal(root_of(Blind(), z, y), 2 * Categorical().root(z))
    assert torch.equal(root_of(Categorical(), z, y), Categorical().root(z, y))
    assert torch.equal(
        sample_of(Blind(), z, generator(), y), Categorical().sample(z, generator(), y)
    )


def test_what_lacks_a_method_is_no_likelihood() -> None:
    for name in ("check", "loss", "sample", "root"):
        methods = {
            key: lambda *args: None for key in ("check", "loss", "sample", "root") if key != name
        }
        assert not isinstance(type("Own", (), methods)(), Likelihood)
