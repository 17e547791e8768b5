"""The dense block Fisher against the dense matrix of `exact`, an explicit recursion and a dense
solve.
"""

from __future__ import annotations

import warnings
from typing import Any, cast

import pytest
import torch
from oracle import total
from problems import REPRESENTATIVE, RULED, Problem, batches, laid_out, own_inputs, problem
from torch import Tensor

import curvlab as cl
from curvlab.algorithms import approximation
from curvlab.curvature.block_diagonal import BlockDiagonal
from curvlab.curvature.fisher import DenseFisher
from curvlab.curvature.kept_rows import KeptRows
from curvlab.curvature.large import by_rows
from curvlab.exact import Kind
from curvlab.linalg.woodbury import Below, Rows
from curvlab.objective import Objective
from curvlab.observation import Observation, Pass
from curvlab.training.descent_contents import check_descent

KIND: dict[Pass, Kind] = {"exact": "ggn", "model": "fisher-mc", "data": "ef"}
LABELS = list(KIND)
DAMPING = 0.01


def outer_products(observation: Observation, label: Pass, block: str) -> Tensor:
    """(1/N) Σ_v Σ_n vec(g aᵀ) vec(g aᵀ)ᵀ, each output with its own inputs, one outer product after
    another.
    """
    s = observation.passes["apart" if label == "exact" else label][block]
    inputs = own_inputs(s.block, s.grouped_a)  # [N, T, O, I]
    total = inputs.new_zeros(s.block.numel, s.block.numel)
    for v in s.g:
        for g, a in zip(v, inputs, strict=True):
            row = sum(g_t[:, None] * a_t for g_t, a_t in zip(g, a, strict=True)).flatten()
            total += torch.outer(row, row)
    return total / len(inputs)


def dense_fisher(
    objective: Objective, labels: Pass = "model", damping: float = DAMPING
) -> BlockDiagonal:
    made = approximation("block-fisher", objective, labels=labels, damping=damping)
    return cast(BlockDiagonal, made)


def assert_inverts(
    curvature: BlockDiagonal, block: str, undamped: Tensor, damping: float = DAMPING
) -> None:
    """The operator and `matrix()` are those of `undamped` + λI."""
    damped = undamped + damping * torch.eye(len(undamped), dtype=undamped.dtype)
    fisher, inverse = curvature.blocks[block], curvature.inverse[block]
    assert isinstance(fisher, DenseFisher)
    torch.testing.assert_close(fisher.matrix().dense(), undamped, rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(inverse.dense(), torch.linalg.inv(damped), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(inverse.inv().dense(), damped, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("labels", LABELS)
@pytest.mark.parametrize("likelihood", ["categorical", "bernoulli", "gaussian"])
@pytest.mark.parametrize("model", REPRESENTATIVE)
def test_one_observation_is_the_exact_matrix(model: str, labels: Pass, likelihood: str) -> None:
    p = problem(model, likelihood)
    objective = p.objective()
    curvature = dense_fisher(objective, labels)
    curvature.update(objective.closure(p.x, p.y, "exact").observe(curvature.needs))
    for block in objective.blocks:
        objective.closures["exact"] = 0  # fisher-mc draws the labels of closure 1 again
        expected = cl.exact.matrix(objective, p.x, p.y, KIND[labels], block.name).dense()
        assert_inverts(curvature, block.name, expected)


@pytest.mark.parametrize("labels", LABELS)
@pytest.mark.parametrize("model", RULED)
def test_one_observation_is_the_mean_of_outer_products(labels: Pass, model: str) -> None:
    p = problem(model)
    objective = p.objective()
    curvature = dense_fisher(objective, labels)
    observation = objective.closure(p.x, p.y).observe(curvature.needs)
    curvature.update(observation)
    for block in objective.blocks:
        assert_inverts(curvature, block.name, outer_products(observation, labels, block.name))


@pytest.mark.parametrize("model", REPRESENTATIVE)
def test_moving_average_is_the_explicit_recursion(model: str) -> None:
    p = problem(model)
    objective = p.objective()
    curvature: Any = approximation("block-fisher", objective, damping=DAMPING, decay=0.7)
    expected: dict[str, Tensor] = {}
    for k, (x, y) in enumerate(batches(p, 6), 1):
        observation = objective.closure(x, y).observe(curvature.needs)
        curvature.update(observation)
        weight = max(1 / k, 0.3)
        for block in objective.blocks:
            new = outer_products(observation, "model", block.name)
            expected[block.name] = (1 - weight) * expected.get(block.name, 0 * new) + weight * new
    for block in objective.blocks:
        assert_inverts(curvature, block.name, expected[block.name])


@pytest.mark.parametrize("model", ["conv", "groups", "batch-norm", "conv-1d", "embedding"])
def test_matrices_of_other_layers_are_those_of_autograd(model: str) -> None:
    """(1/N) Σₙ of the outer products of each example's gradient by autograd, laid out apart from
    the library.
    """
    p = problem(model)
    objective = p.objective()
    curvature = dense_fisher(objective, "data")
    curvature.update(objective.closure(p.x, p.y).observe(curvature.needs))
    for block in objective.blocks:
        weights = {name: p.model.get_parameter(name) for name in block.params}
        rows = []
        for n in range(len(p.x)):
            loss = p.likelihood.loss(p.model(p.x[n : n + 1]), p.y[n : n + 1]).sum()
            gradients = torch.autograd.grad(loss, list(weights.values()))
            rows.append(laid_out(block, dict(zip(weights, gradients, strict=True))).flatten())
        assert_inverts(curvature, block.name, total(torch.outer(r, r) for r in rows) / len(p.x))


def test_tokens_one_at_a_time_keep_the_packed_matrix_of_those_seen() -> None:
    """A one-hot input is a layer of one place: tokens that never came are the damping alone; later
    ones join.
    """
    model = torch.nn.Sequential(torch.nn.Embedding(6, 2), torch.nn.Linear(2, 3)).double()
    objective = cl.Objective(model, cl.likelihoods.Categorical())
    curvature = dense_fisher(objective, "data")
    expected = torch.zeros(12, 12, dtype=torch.float64)
    y = torch.tensor([0, 1, 2, 1])
    for k, (x, seen) in enumerate([([1, 3, 1, 3], [1, 3]), ([4, 1, 1, 4], [1, 3, 4])], 1):
        observation = objective.closure(torch.tensor(x), y).observe(curvature.needs)
        curvature.update(observation)
        expected = expected + (outer_products(observation, "data", "1") - expected) / k
        fisher = curvature.blocks["1"]
        assert isinstance(fisher, DenseFisher)
        assert fisher.active is not None
        assert fisher.active.tolist() == seen
        assert_inverts(curvature, "1", expected)


def masked(p: Problem, idle: list[int]) -> Problem:
    """The same problem with some inputs zero in every example."""
    x = p.x.clone()
    x[:, idle] = 0
    return Problem(p.model, p.likelihood, x, p.y)


@pytest.mark.parametrize("idle", [[0], [4], [1, 3], [0, 1, 2, 3, 4]])
@pytest.mark.parametrize("labels", LABELS)
def test_inputs_that_are_always_zero_are_dropped_exactly(idle: list[int], labels: Pass) -> None:
    p = masked(problem("tanh"), idle)
    objective = p.objective()
    curvature = dense_fisher(objective, labels)
    observation = objective.closure(p.x, p.y).observe(curvature.needs | {"data"})
    curvature.update(observation)
    fisher = curvature.blocks["1"]
    assert isinstance(fisher, DenseFisher)
    assert fisher.F is not None
    active = 6 - len(idle)
    assert fisher.F.shape == (10, active * (active + 1) // 2)  # 4 outputs: 10 pairs
    full = outer_products(observation, labels, "1")
    assert_inverts(curvature, "1", full)
    # not zero where idle
    vector = torch.randn(4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    solution = torch.linalg.solve(
        full + DAMPING * torch.eye(24, dtype=torch.float64), vector.flatten()
    )
    torch.testing.assert_close(
        curvature.precondition({"1": vector})["1"].flatten(), solution, rtol=1e-10, atol=1e-10
    )


def test_a_layer_without_any_active_input_is_the_damping_alone() -> None:
    p = masked(problem("no-bias"), [0, 1, 2, 3, 4])
    objective = p.objective()
    curvature = dense_fisher(objective)
    curvature.update(objective.closure(p.x, p.y).observe(curvature.needs))
    assert_inverts(curvature, "1", torch.zeros(20, 20, dtype=torch.float64))


@pytest.mark.parametrize(
    "order", [([0, 3], [3], []), ([], [1], [0, 1]), ([0, 1, 2], [2, 3, 4], [0, 4])]
)
def test_inputs_may_become_active_later(order: tuple[list[int], ...]) -> None:
    """Each minibatch has other idle inputs; the packed matrix grows to their union and never
    shrinks.
    """
    p = problem("tanh")
    objective = p.objective()
    curvature = dense_fisher(objective)
    expected, active = torch.zeros(24, 24, dtype=torch.float64), {5}
    for k, (idle, (x, y)) in enumerate(zip(order, batches(p, 3), strict=True), 1):
        x[:, idle] = 0
        observation = objective.closure(x, y).observe(curvature.needs)
        curvature.update(observation)
        expected = expected + (outer_products(observation, "model", "1") - expected) / k
        active |= set(range(5)) - set(idle)
        fisher = curvature.blocks["1"]
        assert isinstance(fisher, DenseFisher)
        assert fisher.active is not None
        assert fisher.active.tolist() == sorted(active)
        assert_inverts(curvature, "1", expected)


@pytest.mark.parametrize("places", [(2, 3), (2, 1), (1, 2)])
def test_number_of_places_may_change_between_minibatches(places: tuple[int, int]) -> None:
    """A sequence model sees minibatches of sequences of other lengths, one token among them."""
    p = problem("tokens")
    objective = p.objective()
    curvature = dense_fisher(objective)
    expected: dict[str, Tensor] = {}
    for k, t in enumerate(places, 1):
        x = torch.randn(7, t, 3, generator=torch.Generator().manual_seed(t), dtype=torch.float64)
        observation = objective.closure(x, p.y).observe(curvature.needs)
        curvature.update(observation)
        for block in objective.blocks:
            new = outer_products(observation, "model", block.name)
            expected[block.name] = (
                new if k == 1 else expected[block.name] + (new - expected[block.name]) / k
            )
    for block in objective.blocks:
        assert_inverts(curvature, block.name, expected[block.name])


def test_statistics_of_others_are_left_alone() -> None:
    """The matrix is accumulated in place, on its own memory: the observation does not change."""
    p = problem("tokens")
    objective = p.objective()
    curvature = dense_fisher(objective)
    observation = objective.closure(p.x, p.y).observe(curvature.needs)
    before = [s.rows.clone() for s in observation.passes["model"].values()]
    for _ in range(3):
        curvature.update(observation)
    assert all(
        torch.equal(b, s.rows)
        for b, s in zip(before, observation.passes["model"].values(), strict=True)
    )


def nonsingular() -> Problem:
    """A linear layer whose empirical Fisher matrix has full rank on the active inputs."""
    return problem("linear", "gaussian", n=60)


def test_no_damping_inverts_a_nonsingular_matrix() -> None:
    p = nonsingular()
    objective = p.objective()
    curvature = dense_fisher(objective, "data", damping=0.0)
    observation = objective.closure(p.x, p.y).observe(curvature.needs)
    curvature.update(observation)
    assert_inverts(curvature, "1", outer_products(observation, "data", "1"), damping=0.0)


def test_no_damping_with_idle_inputs_is_an_error() -> None:
    p = masked(nonsingular(), [2])
    objective = p.objective()
    curvature = dense_fisher(objective, "data", damping=0.0)
    with pytest.raises(cl.CurvlabError, match=r"block 1 .*always zero.*positive damping"):
        curvature.update(objective.closure(p.x, p.y).observe(curvature.needs))


@pytest.mark.parametrize("idle", [[], [2]])
def test_a_singular_matrix_raises_the_damping_and_says_so(idle: list[int]) -> None:
    """Two examples cannot fill 18 dimensions: without damping there is no Cholesky factor."""
    p = masked(problem("linear", n=2), idle)
    objective = p.objective()
    curvature = dense_fisher(objective, damping=0.0)
    with pytest.warns(
        cl.CurvlabWarning,
        match="block Fisher matrix is not positive definite with damping 0: raised to",
    ):
        curvature.update(objective.closure(p.x, p.y).observe(curvature.needs))
    assert bool(torch.isfinite(curvature.inverse["1"].dense()).all())


def test_a_matrix_too_large_for_the_memory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """9000² numbers, twice, of a layer that is not so large that rows are kept."""
    monkeypatch.setattr("curvlab.errors._memory", lambda: 500 << 20)
    model = torch.nn.Linear(300, 30, bias=False)
    objective = cl.Objective(model, cl.likelihoods.Gaussian())
    curvature = dense_fisher(objective)
    closure = objective.closure(torch.ones(2, 300), torch.zeros(2, 30))
    with pytest.raises(
        cl.CurvlabError, match=r"a dense block 1 \(weight\) would need .* GB .* use smw-ng-bd"
    ):
        curvature.update(closure.observe(curvature.needs))


@pytest.mark.parametrize("model", ["tanh", "tokens", "conv"])
def test_block_ggn_is_the_block_fisher_of_all_labels(model: str) -> None:
    """Categorical: the outer products of every label's per-sample gradient, weighted with its
    probability.
    """
    p = problem(model)
    objective = p.objective()
    curvature: Any = approximation("block-ggn", objective, damping=DAMPING)
    curvature.update(objective.closure(p.x, p.y).observe(curvature.needs))
    probability = p.model(p.x).detach().softmax(1)
    expected = {
        b.name: torch.zeros(b.numel, b.numel, dtype=torch.float64) for b in objective.blocks
    }
    for label in range(3):
        gradients = cl.exact.gradients(objective, p.x, torch.full((len(p.x),), label))
        for block in objective.blocks:
            rows = laid_out(block, {n: gradients[n] for n in block.params}, 1).flatten(1)
            expected[block.name] += rows.T @ (probability[:, label, None] * rows) / len(rows)
    for block in objective.blocks:
        assert_inverts(curvature, block.name, expected[block.name])


# ---- rows in the place of a matrix that is too large


@pytest.mark.parametrize("labels", LABELS)
@pytest.mark.parametrize("model", ["tanh", "conv", "groups", "embedding"])
def test_kept_rows_are_the_dense_matrix(
    model: str, labels: Pass, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A moving average over six minibatches, inverted both ways; a state goes on where it was."""
    p = problem(model)
    found: list[BlockDiagonal] = []
    for rows in (False, True):
        objective = p.objective()
        if rows:
            monkeypatch.setattr("curvlab.curvature.fisher.by_rows", lambda statistics: True)
        curvature = dense_fisher(objective, labels)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            for x, y in batches(p, 6):
                curvature.update(objective.closure(x, y).observe(curvature.needs))
        lines = [str(w.message) for w in told]
        assert len(lines) == (len(objective.blocks) if rows else 0)
        assert all("so the rows of the minibatches are kept" in line for line in lines)
        found.append(curvature)
    dense, kept = found
    again = dense_fisher(p.objective(), labels)
    again.load_state_dict(kept.state_dict())
    for block in p.objective().blocks:
        expected = cast(DenseFisher, dense.blocks[block.name]).matrix().dense()
        assert_inverts(kept, block.name, expected)
        assert_inverts(again, block.name, expected)
        v = torch.ones(block.shape, dtype=torch.float64)
        torch.testing.assert_close(
            kept.precondition({block.name: v}), dense.precondition({block.name: v})
        )
    x, y = batches(p, 1)[0]
    for curvature in (dense, kept, again):  # each draws the labels of its own seventh closure
        objective = p.objective()
        curvature.update(objective.closure(x, y).observe(curvature.needs))
    for block in p.objective().blocks:
        expected = cast(DenseFisher, dense.blocks[block.name]).matrix().dense()
        assert_inverts(kept, block.name, expected)
        assert_inverts(again, block.name, expected)


def test_a_checkpoint_with_kept_rows_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a run writes is taken again; rows without their Gram matrix are not."""
    monkeypatch.setattr("curvlab.curvature.fisher.by_rows", lambda statistics: True)
    monkeypatch.setattr("curvlab.curvature.fisher.warn", lambda line: None)
    p = problem("tanh")
    objective = p.objective()
    optimizer = cl.optimizer("block-fisher", objective, lr=0.1, damping=0.1)
    for x, y in batches(p, 3):
        optimizer.step(objective.closure(x, y))
    state = optimizer.descent.state_dict()
    fresh = cl.optimizer("block-fisher", p.objective(), lr=0.1, damping=0.1).descent.state_dict()
    check_descent(state, fresh, objective.blocks, True)
    state["curvature"]["blocks"]["1"]["memory"]["F"]["gram"] = torch.eye(2).double()
    with pytest.raises(cl.CurvlabError, match="not on its active inputs"):
        check_descent(state, fresh, objective.blocks, True)


def test_old_rows_are_left_out_when_they_hardly_count() -> None:
    """With weights of one half a minibatch: 2⁻¹⁴ is the first below 1e-4."""
    torch.manual_seed(0)
    kept = KeptRows()
    each = [Rows(torch.randn(2, 3).double(), torch.randn(2, 4).double()) for _ in range(40)]
    expected = torch.zeros(12, 12, dtype=torch.float64)
    for k, rows in enumerate(each):
        weight = 0.5 if k else 1.0
        kept.fold(rows, weight, "a block")
        expected = (1 - weight) * expected + weight * rows.dense().T @ rows.dense()
    assert len(kept.parts) == len(kept.weights) == 14
    found = kept.matrix(0.0).dense()
    assert 0 < float((found - expected).norm() / expected.norm()) < 2e-4
    torch.testing.assert_close(kept.gram, Below(tuple(kept.parts), (1.0,) * 14).gram())


def test_rows_are_kept_where_they_are_fewer(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a layer's size alone nothing is decided: 1000 examples of a wide layer stay refused."""

    def wide(size: int, outputs: int, inputs: int) -> bool:
        objective = cl.Objective(torch.nn.Linear(inputs, outputs), cl.likelihoods.Gaussian())
        closure = objective.closure(torch.randn(size, inputs), torch.randn(size, outputs))
        return by_rows(closure.observe({"data"}).passes["data"]["1"])

    assert wide(12, 512, 512)
    assert not wide(12, 64, 64)
    assert not wide(1500, 150, 150)
    monkeypatch.setattr("curvlab.errors._memory", lambda: 50 << 20)
    assert not wide(12, 512, 512)


def test_kept_rows_need_damping_and_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = KeptRows()
    rows = Rows(torch.ones(2, 3))
    kept.fold(rows, 1.0, "block 1")
    with pytest.raises(cl.CurvlabError, match="by its rows needs a positive damping, not 0"):
        kept.inverse(0.0, "the block Fisher matrix")
    monkeypatch.setattr("curvlab.errors._memory", lambda: 100)
    with pytest.raises(cl.CurvlabError, match=r"Gram matrix of 4 rows of block 1.*smaller mini"):
        kept.fold(rows, 0.5, "block 1")
    assert kept.weights == [1.0]  # nothing is half taken
    assert len(kept.parts) == 1
