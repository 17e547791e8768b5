"""TNT: the factors of (4.10) by hand, and a matrix-normal gradient whose factors are known."""

from __future__ import annotations

import itertools
import math
import warnings
from itertools import chain
from typing import Any

import pytest
import torch
from problems import MODELS, RULED, as_a_variable, batches, groupless, normal, problem
from torch import Tensor, nn

import curvlab as cl
from curvlab.algorithms import approximation
from curvlab.curvature.contracted import Contracted, batch_contractions
from curvlab.curvature.tnt import sample_contractions, tnt
from curvlab.layers import Block, blocks
from curvlab.linalg.direct_sum import ColumnSum
from curvlab.linalg.kronecker import tensor_normal_factors
from curvlab.linalg.operators import Kronecker
from curvlab.optim import warm_start
from curvlab.statistics import LayerStatistics
from curvlab.uses import Part, Slice

EPSILON = 0.05


def layer(inputs: int, outputs: int, bias: bool) -> Block:
    return blocks(nn.Linear(inputs, outputs, bias=bias, dtype=torch.float64))[0]


def inverse_by_hand(weights: Tensor, epsilon: float) -> Tensor:
    """(Ũ₁ + εI)⁻¹ ⊗ (Ũ₂ + εI)⁻¹ of (4.10) from gradients [M, d₁, d₂], written for k = 2."""
    d1, d2 = weights.shape[1:]
    G1 = sum(w @ w.T for w in weights) / len(weights)
    G2 = sum(w.T @ w for w in weights) / len(weights)
    c0 = math.sqrt(G1.trace() / (d1 * d2))
    U1, U2 = G1 / (c0 * d2), G2 / (c0 * d1)
    return torch.kron(
        *(torch.linalg.inv(u + epsilon * torch.eye(len(u), dtype=u.dtype)) for u in (U1, U2))
    )


def assert_direct_sum(found: Tensor, weight: Tensor, bias: Tensor) -> None:
    """`found` acts on a row-major [O, I] block as `weight` on W and as `bias` on its last column,
    and mixes nothing.
    """
    outputs = len(bias)
    inputs = len(found) // outputs
    places = torch.arange(len(found)).view(outputs, inputs)
    w, b = places[:, :-1].flatten(), places[:, -1]
    torch.testing.assert_close(found[w[:, None], w], weight, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(found[b[:, None], b], bias, rtol=1e-10, atol=1e-10)
    assert not bool(found[w[:, None], b].any())
    assert not bool(found[b[:, None], w].any())


def inverse_of_ways(gradients: Tensor, epsilon: float) -> Tensor:
    """⊗ᵢ (Ũᵢ + εI)⁻¹ of (4.10) from gradients [M, d₁, …, d_k] of any number of ways, with
    matricizations by hand.
    """
    shape = gradients.shape[1:]
    k, size = len(shape), math.prod(shape)
    # every trace is the mean squared norm
    c0 = (float(gradients.square().sum()) / len(gradients) / size) ** (1 / k)
    letters = "abcde"[:k]
    expected = torch.ones(1, 1, dtype=torch.float64)
    for i, d in enumerate(shape):
        other = letters.replace(letters[i], "z")
        mean = torch.einsum(f"n{letters},n{other}->{letters[i]}z", gradients, gradients) / len(
            gradients
        )
        damped = mean / (c0 ** (k - 1) * size / d) + epsilon * torch.eye(d, dtype=torch.float64)
        expected = torch.kron(expected, torch.linalg.inv(damped))
    return expected


def variable_of(block: Block, weight: Tensor) -> Tensor:
    """[M, O, I] of a layer → [M, …] in the ways of its variable, outputs first."""
    assert block.module is not None
    shape = block.module.get_parameter("weight").shape
    return as_a_variable(weight.reshape(len(weight), *shape), 1) if len(shape) > 2 else weight


@pytest.mark.parametrize("name", ["tnt", "tnt-ef"])
@pytest.mark.parametrize("model", MODELS)
def test_every_parameter_is_a_variable_in_its_own_shape(name: str, model: str) -> None:
    """Filters have three ways, outputs, inputs and pixels (4.7.2), a norm's weight has one, an
    embedding two.
    """
    p = problem(model)
    objective = p.objective()
    curvature = approximation(name, objective, damping=EPSILON)
    closure = objective.closure(p.x, p.y)
    curvature.update(closure.observe(curvature.needs))
    z = p.model(p.x)
    labels = p.y if name == "tnt-ef" else closure.labels(z.detach())[0]
    loss = p.likelihood.loss(z, labels).mean()
    gradients = torch.autograd.grad(loss, list(objective.parameters.values()))
    vectors = {n: normal(*w.shape, seed=i) for i, (n, w) in enumerate(objective.parameters.items())}
    found = curvature.precondition(vectors)
    for (parameter, vector), gradient in zip(vectors.items(), gradients, strict=True):
        expected = inverse_of_ways(as_a_variable(gradient)[None], EPSILON) @ vector.flatten()
        torch.testing.assert_close(found[parameter].flatten(), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["tnt", "tnt-ef"])
@pytest.mark.parametrize("model", ["tanh", "tokens"])
def test_factors_of_the_mean_gradient_by_hand(name: str, model: str) -> None:
    p = problem(model)
    objective = p.objective()
    curvature: Any = approximation(name, objective, damping=EPSILON)
    observation = objective.closure(p.x, p.y).observe({*curvature.needs, curvature.labels})
    curvature.update(observation)
    for block in objective.blocks:
        mean = observation.passes[curvature.labels][block.name].rows[0].mean(0)
        weight, bias = mean[:, :-1], mean[:, -1]
        # k = 1: Ũ = E[g gᵀ]
        damped = torch.outer(bias, bias) + EPSILON * torch.eye(len(bias), dtype=torch.float64)
        inverse = curvature.inverse[block.name]
        assert isinstance(inverse, ColumnSum)
        assert_direct_sum(
            inverse.dense(), inverse_by_hand(weight[None], EPSILON), torch.linalg.inv(damped)
        )


def test_a_layer_without_bias_is_one_kronecker_product() -> None:
    p = problem("no-bias")
    objective = p.objective()
    curvature = approximation("tnt", objective, damping=EPSILON)
    observation = objective.closure(p.x, p.y).observe(curvature.needs)
    curvature.update(observation)
    inverse = curvature.inverse["1"]
    assert isinstance(inverse, Kronecker)
    mean = observation.passes["model"]["1"].rows[0].mean(0)
    torch.testing.assert_close(
        inverse.dense(), inverse_by_hand(mean[None], EPSILON), rtol=1e-10, atol=1e-10
    )


@pytest.mark.parametrize("model", RULED)
def test_factors_of_the_per_sample_gradients_by_hand(model: str) -> None:
    """Groups of outputs have no such matrices."""
    p = problem(model)
    objective = p.objective()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", cl.CurvlabWarning)
        curvature = approximation("tnt-per-sample", objective, damping=EPSILON)
    observation = objective.closure(p.x, p.y).observe(curvature.needs)
    curvature.update(observation)
    for block in groupless(p):
        rows = observation.passes["model"][block.name].rows[0]
        weight, bias = (rows[..., :-1], rows[..., -1]) if block.biased else (rows, rows[..., -1])
        expected = inverse_of_ways(variable_of(block, weight), EPSILON)
        if not block.biased:
            torch.testing.assert_close(
                curvature.inverse[block.name].dense(), expected, rtol=1e-10, atol=1e-10
            )
            continue
        damped = bias.T @ bias / 7 + EPSILON * torch.eye(bias.shape[1], dtype=torch.float64)
        assert_direct_sum(curvature.inverse[block.name].dense(), expected, torch.linalg.inv(damped))


@pytest.mark.parametrize("model", ["tanh", "no-bias"])
def test_contractions_without_rows_are_those_of_explicit_rows(model: str) -> None:
    """At T = 1 no row is formed; a zero second place makes T = 2, where rows are, and changes no
    gradient.
    """
    p = problem(model)
    objective = p.objective()
    for block, s in zip(
        objective.blocks, objective.closure(p.x, p.y).observe().passes["data"].values(), strict=True
    ):
        a, g = (
            torch.cat([s.a, torch.zeros_like(s.a)], 1),
            torch.cat([s.g, torch.zeros_like(s.g)], 2),
        )
        padded = LayerStatistics(block, s.size, parts=[Part(block, Slice(a), g)], like=s.like)
        short, long = sample_contractions(block, s), sample_contractions(block, padded)
        assert [len(v) for v in short] == ([2, 1] if block.biased else [2])
        for found, expected in zip(chain(*short), chain(*long), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


def test_a_filter_as_large_as_the_image_has_three_ways_and_needs_no_rows() -> None:
    """One place: G^(i) of g aᵀ as [O, C, pixels], beside the explicit per-sample gradients."""
    model = nn.Sequential(nn.Conv2d(2, 3, (2, 3)), nn.Flatten()).double()
    objective = cl.Objective(model, cl.likelihoods.Categorical())
    x, y = normal(5, 2, 2, 3), torch.tensor([0, 1, 2, 0, 1])
    (block,), s = objective.blocks, objective.closure(x, y).observe().passes["data"]["1"]
    assert s.a.shape[1] == 1
    weights, biases = cl.exact.gradients(objective, x, y).values()
    found, (of_bias,) = sample_contractions(block, s)
    for G, letters in zip(found, ("nocp,nqcp->oq", "nocp,nodp->cd", "nocp,nocq->pq"), strict=True):
        torch.testing.assert_close(
            G,
            torch.einsum(letters, weights.flatten(3), weights.flatten(3)) / 5,
            rtol=1e-12,
            atol=1e-14,
        )
    torch.testing.assert_close(of_bias, biases.T @ biases / 5, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("model", RULED)
def test_exact_labels_sum_over_the_vectors_sent_back(model: str) -> None:
    """Σ_v with S Sᵀ = ∂²ℓ/∂z²: E[G^(i)] over the model's own labels, not of the first column of S
    alone.
    """
    p = problem(model)
    objective = p.objective()
    observation = objective.closure(p.x, p.y).observe({"exact"})
    for block in groupless(p):
        s = observation.passes["exact"][block.name]
        rows = s.rows.flatten(0, 1)
        weights, biases = (rows[..., :-1], rows[..., -1]) if block.biased else (rows, None)
        found, *bias = sample_contractions(block, s)
        ways = variable_of(block, weights)
        assert len(found) == ways.ndim - 1
        for i, G in enumerate(found, 1):
            by_hand = (
                sum(w.movedim(i - 1, 0).flatten(1) @ w.movedim(i - 1, 0).flatten(1).T for w in ways)
                / 7
            )
            torch.testing.assert_close(G, by_hand, rtol=1e-12, atol=1e-14)
        assert (biases is None) is (not bias)
        if biases is not None:
            torch.testing.assert_close(bias[0][0], biases.T @ biases / 7, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("model", ["tanh", "tokens", "no-bias", "embedding", "conv"])
def test_batch_and_per_sample_agree_on_one_example(model: str) -> None:
    p = problem(model, n=1)
    objective = p.objective()
    mean, sample = (
        approximation(name, objective, damping=EPSILON) for name in ("tnt", "tnt-per-sample")
    )
    observation = objective.closure(p.x, p.y).observe(mean.needs)
    for curvature in (mean, sample):
        curvature.update(observation)
    for name, inverse in mean.inverse.items():
        torch.testing.assert_close(
            inverse.dense(), sample.inverse[name].dense(), rtol=1e-11, atol=1e-11
        )


def test_batch_statistics_are_the_fisher_over_the_batch_size_on_average() -> None:
    """Over all labels, each with the model's own probability, m E[G^(i)] of the batch-mean gradient
    is the per-sample one's.
    """
    p = problem("linear", n=3)
    objective = p.objective()
    probabilities = p.model(p.x).detach().softmax(1)
    mean, sample = ([torch.zeros(d, d, dtype=torch.float64) for d in (3, 5)] for _ in range(2))
    for labels in itertools.product(range(3), repeat=3):
        chance = math.prod(float(q[y]) for q, y in zip(probabilities, labels, strict=True))
        statistics = objective.closure(p.x, torch.tensor(labels)).observe().passes["data"]["1"]
        for total, contractions in ((mean, batch_contractions), (sample, sample_contractions)):
            for way, found in enumerate(contractions(objective.blocks[0], statistics)[0]):
                total[way] += chance * found
    for of_mean, of_samples in zip(mean, sample, strict=True):
        torch.testing.assert_close(3 * of_mean, of_samples, rtol=1e-12, atol=1e-14)


def matrix_normal_roots(outputs: int, inputs: int) -> tuple[Tensor, Tensor]:
    """L₁, L₂ of G = L₁ Z L₂ᵀ: covariance (L₁L₁ᵀ) ⊗ (L₂L₂ᵀ) where Z has independent entries of
    variance 1.
    """
    return normal(outputs, outputs, seed=1) + outputs * torch.eye(outputs), 0.3 * normal(
        inputs, inputs, seed=2
    )


def feed(block: Block, gradients: Tensor) -> Contracted:
    """A TNT block that has seen these mean gradients, each with the same weight."""
    curvature = tnt(block)
    for k, gradient in enumerate(gradients, 1):
        curvature.update(LayerStatistics(block, 1, gradient=gradient), 1 / k)
    return curvature


def test_recovers_the_factors_of_a_matrix_normal_gradient_exactly() -> None:
    """Z over √(d₁d₂) times all unit matrices has covariance I exactly, so E[G^(i)] has no sampling
    error.
    """
    L1, L2 = matrix_normal_roots(3, 4)
    units = torch.eye(12, dtype=torch.float64).view(12, 3, 4) * math.sqrt(12)
    block = layer(4, 3, bias=False)
    curvature = feed(block, L1 @ units @ L2.T)
    assert curvature.means is not None
    U1, U2 = tensor_normal_factors(curvature.means[0])
    torch.testing.assert_close(
        torch.kron(U1, U2), torch.kron(L1 @ L1.T, L2 @ L2.T), rtol=1e-12, atol=1e-12
    )
    # constant trace per dimension
    torch.testing.assert_close(U1.trace() / 3, U2.trace() / 4, rtol=1e-12, atol=0)
    curvature.refresh(0.0)
    fisher = torch.kron(L1 @ L1.T, L2 @ L2.T)
    torch.testing.assert_close(
        curvature.inverse.dense() @ fisher, torch.eye(12, dtype=torch.float64), rtol=0, atol=1e-8
    )


def test_recovers_the_factors_of_sampled_gradients_of_weight_and_bias() -> None:
    L1, L2 = matrix_normal_roots(3, 4)
    Lb = 2 * matrix_normal_roots(3, 4)[0]
    count = 4000
    weights, biases = L1 @ normal(count, 3, 4, seed=3) @ L2.T, normal(count, 3, seed=4) @ Lb.T
    curvature = feed(layer(4, 3, bias=True), torch.cat([weights, biases[..., None]], 2))
    assert curvature.means is not None
    for means, expected in zip(
        curvature.means, (torch.kron(L1 @ L1.T, L2 @ L2.T), Lb @ Lb.T), strict=True
    ):
        factors = tensor_normal_factors(means)
        found = torch.kron(*factors) if len(factors) == 2 else factors[0]
        error = torch.linalg.matrix_norm(found - expected) / torch.linalg.matrix_norm(expected)
        assert 0 < float(error) < 5 / math.sqrt(count)


@pytest.mark.parametrize("name", ["tnt", "tnt-per-sample"])
def test_zero_gradients_leave_the_damping_alone(name: str) -> None:
    """Practice: c₀ = 0 must not give 0/0. H = ε⁻² I on W and ε⁻¹ I on b."""
    p = problem("tanh", "gaussian")
    objective = p.objective()
    curvature = approximation(name, objective, damping=EPSILON, labels="data")
    # targets are met
    curvature.update(objective.closure(p.x, p.model(p.x).detach()).observe(curvature.needs))
    for block in objective.blocks:
        expected = torch.full(block.shape, EPSILON**-2, dtype=torch.float64)
        expected[:, -1] = 1 / EPSILON
        torch.testing.assert_close(
            curvature.inverse[block.name].dense(),
            torch.diag(expected.flatten()),
            rtol=1e-12,
            atol=0,
        )


def test_a_zero_bias_gradient_beside_a_weight_is_guarded_alone() -> None:
    gradient = torch.cat([normal(3, 4), torch.zeros(3, 1, dtype=torch.float64)], 1)
    curvature = feed(layer(4, 3, bias=True), gradient[None])
    curvature.refresh(EPSILON)
    expected_bias = torch.eye(3, dtype=torch.float64) / EPSILON
    assert_direct_sum(
        curvature.inverse.dense(), inverse_by_hand(gradient[None, :, :-1], EPSILON), expected_bias
    )


@pytest.mark.parametrize("shape", [(2, 3, 4), (2, 3, 2, 2), (2, 1, 2, 3, 2)])
def test_a_variable_of_k_ways(shape: tuple[int, ...]) -> None:
    """A parameter without a rule: ⊗ of k damped factors, each (4.10) with matricizations by
    hand.
    """
    block = Block("1", ("w",), shape, None)
    gradients = normal(30, *shape)
    curvature = feed(block, gradients)
    curvature.refresh(EPSILON)
    expected = inverse_of_ways(gradients, EPSILON)
    torch.testing.assert_close(curvature.inverse.dense(), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("shown", [True, False])
@pytest.mark.parametrize("model", ["tanh", "tokens", "no-bias", "conv"])
def test_idealised_tnt_is_the_expectation_over_all_data_and_labels(model: str, shown: bool) -> None:
    """Alg. 14, line 4, at weights that have moved since the data were shown: one gradient for each
    example and label.
    """
    p = problem(model)
    objective = p.objective()
    data = [(p.x[:3], p.y[:3]), (p.x[3:], p.y[3:])] if shown else []  # minibatches of 3 and 4
    curvature = approximation("tnt-ideal", objective, damping=EPSILON)
    warm_start(objective, [curvature], data)
    with torch.no_grad():
        for w in p.model.parameters():
            w.mul_(1.1)
    # the minibatch at hand says nothing of the data, where they were shown
    some = slice(2) if shown else slice(None)
    for _ in range(2):  # no average over steps
        curvature.update(
            objective.closure(p.x[some], p.y[some]).observe(curvature.needs | {"data"})
        )
    probability = p.model(p.x).detach().softmax(1)
    gradients: dict[str, list[Tensor]] = {n: [] for n in objective.parameters}
    for label in range(3):
        for n, g in cl.exact.gradients(objective, p.x, torch.full((7,), label)).items():
            weight = (
                3 * probability[:, label]
            ).sqrt()  # the mean over 3 · 7 squares is the expectation
            gradients[n].append(g * weight.view(-1, *[1] * (g.ndim - 1)))
    for block in objective.blocks:
        weight, *bias = (torch.cat(gradients[n]) for n in block.params)
        expected = inverse_of_ways(as_a_variable(weight, 1), EPSILON)
        found = curvature.inverse[block.name].dense()
        if bias:
            assert_direct_sum(found, expected, inverse_of_ways(bias[0], EPSILON))
        else:
            torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_idealised_tnt_continues_with_the_data_it_was_shown() -> None:
    """A checkpoint holds them; labels are not drawn, so that no other method sees other ones."""
    p, q = problem("tanh"), problem("tanh")
    one, two = (o.objective() for o in (p, q))
    optimizer, resumed = (cl.optimizer("tnt-ideal", o, lr=0.01) for o in (one, two))
    optimizer.warm_start(batches(p, 3))
    for x, y in batches(p, 2, seed=30):
        optimizer.step(one.closure(x, y))
    assert one.closures == {"step": 2, "warm": 3, "exact": 0}
    q.model.load_state_dict(p.model.state_dict())
    resumed.load_state_dict(optimizer.state_dict())
    for x, y in batches(p, 2, seed=40):
        assert torch.equal(optimizer.step(one.closure(x, y)), resumed.step(two.closure(x, y)))
    assert all(
        torch.equal(*pair) for pair in zip(p.model.parameters(), q.model.parameters(), strict=True)
    )
