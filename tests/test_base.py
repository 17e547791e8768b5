"""BlockDiagonal: when statistics are folded in and refreshed, with what weight, and what
`precondition` takes.
"""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from problems import RULED, Problem, batches, problem
from torch import Tensor, nn

import curvlab as cl
from curvlab.algorithms import ALGORITHMS, approximation
from curvlab.curvature.block_diagonal import BlockDiagonal
from curvlab.curvature.kfac import Kfac
from curvlab.objective import Objective
from curvlab.observation import Observation, Pass


def kfac(objective: Objective, **options: Any) -> BlockDiagonal:
    return cast(BlockDiagonal, approximation("kfac", objective, damping=0.1, **options))


def second_moment(curvature: BlockDiagonal, block: str = "1") -> Tensor:
    found = curvature.blocks[block]
    assert isinstance(found, Kfac)
    assert found.A is not None
    return found.A


def observations(
    objective: Objective, p: Problem, count: int, seed: int = 5, label: Pass = "model"
) -> list[Observation]:
    return [objective.closure(x, y).observe({label, "data"}) for x, y in batches(p, count, seed)]


def moment(observation: Observation, block: str = "1") -> Tensor:
    """Σ_t a aᵀ, mean over examples, of a layer of one place."""
    a = observation.passes["data"][block].a[:, 0]
    return torch.einsum("ni,nj->ij", a, a) / len(a)


# ------------------------------------------------------------------------------------------------
# weights


@pytest.mark.parametrize("decay", [0.0, 0.8, 0.9])
def test_average_is_a_running_mean_that_becomes_a_moving_average(decay: float) -> None:
    p = problem("tanh")
    objective = p.objective()
    curvature = kfac(objective, decay=decay)
    seen: list[Tensor] = []
    expected = torch.zeros(())  # of no update
    for k, observation in enumerate(observations(objective, p, 14), 1):
        curvature.update(observation)
        seen.append(moment(observation))
        mean = torch.stack(seen).mean(0)
        expected = mean if k <= 1 / (1 - decay) else decay * expected + (1 - decay) * seen[-1]
        torch.testing.assert_close(second_moment(curvature), expected, rtol=1e-12, atol=1e-13)


def test_warm_start_is_the_mean_over_the_whole_pass() -> None:
    """Longer than the moving average remembers; on minibatches of one size it is the statistic of
    all data at once.
    """
    p = problem("tanh")
    objective = p.objective()
    curvature = kfac(objective, labels="data")
    data = batches(p, 25)
    for x, y in data:
        curvature.absorb(objective.closure(x, y).observe(curvature.warm_needs))
    whole = (
        objective.closure(torch.cat([x for x, _ in data]), torch.cat([y for _, y in data]))
        .observe()
        .passes["data"]
    )
    for block in objective.blocks:
        found = curvature.blocks[block.name]
        assert isinstance(found, Kfac)
        torch.testing.assert_close(found.A, whole[block.name].A, rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(found.G, whole[block.name].G, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", ["kfac", "kfac-20", "kfac-reduce"])
def test_kfac_folds_the_first_minibatch_after_a_warm_start_in(name: str) -> None:
    """Thesis Alg. 7 and 12, 2021 Alg. 5: at every k ≡ 0 mod T₁, the first among them; 0.9 and 0.1
    after a warm start of twelve.
    """
    p = problem("tanh")
    objective = p.objective()
    curvature: Any = approximation(name, objective)
    warm, steps = observations(objective, p, 12), observations(objective, p, 4, seed=80)
    for observation in warm:
        curvature.absorb(observation)
    curvature.refresh()
    expected = torch.stack([moment(o) for o in warm]).mean(0)
    for observation in steps:
        assert curvature.needs == {"model"}
        curvature.update(observation)
        expected = 0.9 * expected + 0.1 * moment(observation)
        torch.testing.assert_close(second_moment(curvature), expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", ["tnt", "tnt-ef", "tnt-per-sample", "shampoo"])
def test_tnt_and_shampoo_leave_the_first_minibatch_after_a_warm_start_out(name: str) -> None:
    """Practice: the warm start has seen it. From the second on it is folded in."""
    p = problem("tanh")
    objective = p.objective()
    curvature: Any = approximation(name, objective)
    passes: frozenset[Pass] = frozenset({"data", "model", "gradient"})
    first, *steps = [objective.closure(x, y).observe(passes) for x, y in batches(p, 4)]
    curvature.absorb(first)
    curvature.refresh()
    assert curvature.needs == frozenset()
    held = curvature.state_dict()["blocks"]
    curvature.update(steps[0])
    assert str(curvature.state_dict()["blocks"]) == str(held)
    assert curvature.updates == 1
    curvature.update(steps[1])
    assert curvature.updates == 2


@pytest.mark.parametrize("name", ["adam", "sgd-m", "smw-ng-bd"])
def test_methods_without_a_warm_start_absorb_nothing(name: str) -> None:
    p = problem("tanh")
    objective = p.objective()
    curvature: Any = approximation(name, objective)
    assert curvature.warm_needs == frozenset()
    curvature.absorb(observations(objective, p, 1)[0])
    assert curvature.updates == 0
    assert not curvature.warmed
    assert curvature.needs == {"gradient" if name in ("adam", "sgd-m") else curvature.labels}


# ------------------------------------------------------------------------------------------------
# schedules


def changes(
    curvature: BlockDiagonal, steps: list[Observation]
) -> tuple[list[int], list[int], list[int]]:
    """The steps (from 1) before which `needs` was not empty, at which statistics changed, at which
    inverses were made anew.
    """
    needed, folded, refreshed = [], [], []
    for k, observation in enumerate(steps, 1):
        block = curvature.blocks["1"]
        assert isinstance(block, Kfac)
        before = block.A, getattr(block, "inverse", None)
        needed += [k] if curvature.needs else []
        curvature.update(observation)
        folded += (
            []
            if before[0] is not None and torch.equal(before[0], second_moment(curvature))
            else [k]
        )
        refreshed += [] if before[1] is block.inverse else [k]
    return needed, folded, refreshed


@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize(
    ("every", "expected"),
    [(1, list(range(1, 13))), (2, [1, 2, 4, 6, 8, 10, 12]), (5, [1, 5, 10]), (20, [1])],
)
def test_statistics_change_at_multiples_of_update_every(
    every: int, expected: list[int], warm: bool
) -> None:
    """k ≡ 0 mod T₁ (Alg. 12, line 11); at step 1 too where nothing has been seen yet, and only
    where T₁ is 1 after a warm start.
    """
    p = problem("tanh")
    objective = p.objective()
    curvature = kfac(objective, update_every=every)
    if warm:
        curvature.absorb(observations(objective, p, 1)[0])
        curvature.refresh()
        expected = expected if every == 1 else expected[1:]
    needed, folded, _ = changes(curvature, observations(objective, p, 12, seed=40))
    assert folded == expected
    assert needed == expected  # a pass is asked for where it is read, and nowhere else


@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize(
    ("every", "expected"),
    [
        (1, list(range(1, 13))),
        (3, [1, 2, 3, 6, 9, 12]),
        (5, [1, 2, 3, 4, 5, 10]),
        (20, list(range(1, 13))),
    ],
)
def test_inverses_are_made_at_each_of_the_first_and_then_every(
    every: int, expected: list[int], warm: bool
) -> None:
    """Each of the first T₂ steps (practice), then k ≡ 0 mod T₂ (Alg. 12, line 17)."""
    p = problem("tanh")
    objective = p.objective()
    curvature = kfac(objective, refresh_every=every)
    if warm:
        curvature.absorb(observations(objective, p, 1)[0])
        curvature.refresh()
    assert changes(curvature, observations(objective, p, 12, seed=40))[2] == expected


def test_damping_is_used_from_the_next_refresh_on() -> None:
    p = problem("tanh")
    objective = p.objective()
    curvature = kfac(objective, refresh_every=2, update_every=100)
    curvature.update(observations(objective, p, 1)[0])
    curvature.update(observations(objective, p, 1)[0])
    before = curvature.inverse["1"].dense()
    curvature.damping = 10.0
    for step, same in ((3, True), (4, False)):
        curvature.update(observations(objective, p, 1)[0])
        assert curvature.steps == step
        assert torch.equal(curvature.inverse["1"].dense(), before) is same
    by_hand = kfac(objective)
    by_hand.damping = 10.0
    by_hand.load_state_dict(curvature.state_dict())
    by_hand.refresh()
    torch.testing.assert_close(
        curvature.inverse["1"].dense(), by_hand.inverse["1"].dense(), rtol=0, atol=0
    )


def test_an_update_that_fails_counts_for_nothing() -> None:
    """An observation without the pass is refused, and the averages that follow are as if it had
    never come.
    """
    p = problem("tanh")
    objective = p.objective()
    curvature = kfac(objective)
    seen = observations(objective, p, 3)
    with pytest.raises(
        cl.CurvlabError, match=r"unknown pass of this observation 'model' \(known: data\)"
    ):
        curvature.update(objective.closure(p.x, p.y).observe({"data"}))
    for observation in seen:
        curvature.update(observation)
    expected = torch.stack([moment(o) for o in seen]).mean(0)
    torch.testing.assert_close(second_moment(curvature), expected, rtol=1e-12, atol=1e-13)


# ------------------------------------------------------------------------------------------------
# precondition


def ready(
    model: str = "tanh", name: str = "kfac"
) -> tuple[Objective, BlockDiagonal, dict[str, Tensor]]:
    """An objective, an algorithm after one update, and {parameter: gradient} by autograd."""
    p = problem(model)
    objective = p.objective()
    curvature = cast(BlockDiagonal, approximation(name, objective, damping=0.1))
    curvature.update(objective.closure(p.x, p.y).observe(curvature.needs))
    names = list(objective.parameters)
    loss = objective.likelihood.loss(p.model(p.x), p.y).mean()
    return (
        objective,
        curvature,
        dict(
            zip(names, torch.autograd.grad(loss, list(objective.parameters.values())), strict=True)
        ),
    )


@pytest.mark.parametrize(
    ("model", "name"),
    [(model, "kfac") for model in ("tanh", "no-bias", "tokens", "conv", "embedding")]
    + [
        (model, name)
        for model in RULED
        for name in ("block-fisher", "smw-ng-bd", "tnt", "shampoo", "adam")
    ],
)
def test_precondition_by_parameter_is_precondition_by_block(model: str, name: str) -> None:
    objective, curvature, gradients = ready(model, name)
    by_block = curvature.precondition({b.name: b.gather(gradients) for b in objective.blocks})
    by_parameter = curvature.precondition(gradients)
    assert list(by_parameter) == list(gradients)
    for block in objective.blocks:
        assert by_block[block.name].shape == block.shape
        dense = curvature.inverse[block.name].dense() @ block.gather(gradients).flatten()
        torch.testing.assert_close(by_block[block.name].flatten(), dense, rtol=1e-11, atol=1e-12)
        for name, part in block.scatter(by_block[block.name]).items():
            assert by_parameter[name].shape == gradients[name].shape
            assert torch.equal(by_parameter[name], part)


def test_precondition_takes_some_blocks_and_keeps_the_order() -> None:
    objective, curvature, gradients = ready()
    block = objective.blocks[1]
    whole = curvature.precondition(gradients)
    some = curvature.precondition({name: gradients[name] for name in ("2.bias", "2.weight")})
    assert list(some) == ["2.bias", "2.weight"]
    assert all(torch.equal(some[name], whole[name]) for name in some)
    only = curvature.precondition({"2": block.gather(gradients)})
    assert list(only) == ["2"]
    assert torch.equal(block.scatter(only["2"])["2.weight"], whole["2.weight"])
    assert curvature.precondition({}) == {}


def test_precondition_names_an_unknown_key_and_a_missing_partner() -> None:
    _, curvature, gradients = ready()
    with pytest.raises(
        cl.CurvlabError, match=r"unknown block or parameter '0.wieght'; did you mean '0.weight'\?"
    ):
        curvature.precondition(gradients | {"0.wieght": gradients["0.weight"]})
    with pytest.raises(
        cl.CurvlabError, match=r"block 1 \(0.weight, 0.bias\) needs the gradient of '0.bias' too"
    ):
        curvature.precondition({"0.weight": gradients["0.weight"]})


# ------------------------------------------------------------------------------------------------
# errors and state


def test_before_the_first_data_there_is_no_inverse() -> None:
    objective, _, gradients = ready()
    fresh = kfac(objective)
    for use in (
        lambda: fresh.inverse,
        lambda: fresh.precondition(gradients),
        lambda: fresh.refresh(),
    ):
        with pytest.raises(cl.CurvlabError, match="has seen no data yet"):
            use()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"damping": -1.0}, "damping must be 0 or positive, not -1"),
        ({"damping": float("nan")}, "damping must be 0 or positive, not nan"),
        ({"decay": 1.0}, "decay must be at least 0 and below 1, not 1"),
        ({"decay": -0.1}, "decay must be at least 0 and below 1"),
        ({"update_every": 0}, "update_every must be 1 or more, not 0"),
        ({"refresh_every": -3}, "refresh_every must be 1 or more, not -3"),
    ],
)
def test_arguments_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(cl.CurvlabError, match=message):
        approximation("kfac", problem("tanh").objective(), **options)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_option_has_a_default_of_its_own_kind(name: str) -> None:
    a = ALGORITHMS[name]
    assert list(a.defaults) == a.options
    assert a.checked(a.defaults, name) == a.defaults
    assert set(a.own) <= set(a.options)


def test_an_unknown_algorithm_names_the_closest() -> None:
    with pytest.raises(
        cl.CurvlabError,
        match=r"unknown algorithm 'kfca'; did you mean 'kfac'\? \(known: block-fisher, .*tnt",
    ):
        approximation("kfca", problem("tanh").objective())


def test_a_checkpoint_of_another_model_is_refused() -> None:
    state = ready("tanh")[1].state_dict()
    with pytest.raises(
        cl.CurvlabError, match=r"the checkpoint has blocks 1, 2, 3 but this model has 1, 2:"
    ):
        ready("relu")[1].load_state_dict(state)


@pytest.mark.parametrize("other", ["adam", "tnt", "block-fisher", "sgd-m"])
def test_a_checkpoint_of_another_algorithm_is_refused(other: str) -> None:
    objective, curvature, _ = ready()
    fresh = approximation(other, objective)
    with pytest.raises(cl.CurvlabError, match=f"the checkpoint is of 'kfac' but this is '{other}'"):
        fresh.load_state_dict(curvature.state_dict())


def test_parameters_without_structure_are_named_once_and_follow_the_gradient() -> None:
    p = problem("norm")
    objective = p.objective()
    with pytest.warns(
        cl.CurvlabWarning,
        match="layers without a rule.* follow the gradient.*: norm.weight, norm.bias",
    ) as said:
        curvature = kfac(objective)
    assert len(said) == 1
    observation = objective.closure(p.x, p.y).observe(curvature.needs | {"data"})
    curvature.update(observation)
    directions = curvature.precondition(observation.gradients)
    for block in objective.blocks:
        same = torch.equal(directions[block.name], observation.gradients[block.name])
        assert same is (block.module is None)


def test_layers_with_groups_of_outputs_have_no_kronecker_factors() -> None:
    """They are named beside those without a rule, and follow the gradient too; rows they have."""
    p = problem("conv-1d")
    objective = p.objective()
    message = r"groups of outputs\) follow the gradient .*: 0.weight, 0.bias, 3.weight, 3.bias$"
    with pytest.warns(cl.CurvlabWarning, match=message) as said:
        curvature = kfac(objective)
    assert len(said) == 1
    approximation("block-fisher", objective)  # a warning is an error here
    observation = objective.closure(p.x, p.y).observe(curvature.needs | {"data"})
    curvature.update(observation)
    directions = curvature.precondition(observation.gradients)
    for block in objective.blocks:
        same = torch.equal(directions[block.name], observation.gradients[block.name])
        assert same is (block.groups > 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_exact_labels_where_no_layer_has_a_rule(dtype: torch.dtype) -> None:
    """No statistics at all, and every direction is the gradient."""
    p = problem("norm", "gaussian", dtype=dtype)
    p.model.first.requires_grad_(False)
    p.model.second.requires_grad_(False)
    objective = p.objective()
    with pytest.warns(cl.CurvlabWarning, match="without a rule"):
        curvature = kfac(objective, labels="exact")
    observation = objective.closure(p.x, p.y).observe(curvature.needs | {"data"})
    assert observation.passes["apart"] == {}
    curvature.update(observation)
    directions = curvature.precondition(observation.gradients)
    assert list(directions) == ["1", "2"]
    assert all(torch.equal(directions[name], g) for name, g in observation.gradients.items())
    assert {inverse.dense().dtype for inverse in curvature.inverse.values()} == {dtype}


@pytest.mark.parametrize("model", ["norm", "conv-1d"])
def test_exact_labels_with_a_layer_that_has_no_factors(model: str) -> None:
    """V vectors have no gradient for it to follow: the data's gradient is preconditioned by I all
    the same.
    """
    p = problem(model)
    objective = p.objective()
    with pytest.warns(cl.CurvlabWarning, match="without a rule"):
        curvature = kfac(objective, labels="exact")
    observation = objective.closure(p.x, p.y).observe(curvature.needs | {"data"})
    curvature.update(observation)
    directions = curvature.precondition(observation.gradients)
    for block in objective.blocks:
        same = torch.equal(directions[block.name], observation.gradients[block.name])
        assert same is (block.module is None or block.groups > 1)


class Scaled(nn.Module):
    """A linear layer times one number: a parameter without dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.scale = nn.Linear(5, 3), nn.Parameter(torch.tensor(2.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.linear(x)


@pytest.mark.parametrize(
    ("name", "power"), [("tnt-ef", -1.0), ("shampoo", -0.5), ("adam", None), ("sgd-m", None)]
)
def test_a_parameter_without_dimensions(name: str, power: float | None) -> None:
    """One number is a variable of one way: H = g² + ε to the method's power."""
    p = problem("linear")
    objective = Problem(Scaled().double(), p.likelihood, p.x, p.y).objective()
    curvature = approximation(name, objective, damping=0.1)
    observation = objective.closure(p.x, p.y).observe(curvature.needs)
    curvature.update(observation)
    gradient, found = observation.gradients["1"], curvature.precondition(observation.gradients)["1"]
    assert found.shape == gradient.shape == ()
    if power is not None:
        torch.testing.assert_close(
            found, gradient * (gradient**2 + 0.1) ** power, rtol=1e-6, atol=0
        )


# ------------------------------------------------------------------------------------------------
# refreshes where nothing has changed


def refreshes(
    curvature: Any, steps: list[Observation], monkeypatch: pytest.MonkeyPatch
) -> list[int]:
    """The steps (from 1) at which a curvature refreshes."""
    found: list[int] = []
    refresh = type(curvature).refresh

    def noted(self: Any) -> None:
        found.append(self.steps + 1)
        refresh(self)

    monkeypatch.setattr(type(curvature), "refresh", noted)
    for observation in steps:
        curvature.update(observation)
    return found


@pytest.mark.parametrize("name", ["kfac", "kfac-20", "ekfac", "tnt", "shampoo"])
def test_early_refreshes_are_where_something_was_folded_in(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ "Every T₁ during the first T₂" (practice): T₁ = 10, T₂ = 100: 10 inversions in the first 100
    steps after a warm start, not 100; then every T₂.
    """
    p = problem("linear")
    objective = p.objective()
    curvature: Any = approximation(name, objective, update_every=10, refresh_every=100)
    observation = objective.closure(p.x, p.y).observe(frozenset({"data", "model", "gradient"}))
    curvature.absorb(observation)
    curvature.refresh()
    expected = [*range(10, 101, 10), 200]
    assert refreshes(curvature, [observation] * 205, monkeypatch) == expected


@pytest.mark.parametrize("name", ["kfac", "smw-gn", "smw-ng-bd"])
def test_early_refreshes_follow_a_damping_that_changed(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """λ is used from the next refresh on, which is the next step in the first T₂."""
    p = problem("linear")
    objective = p.objective()
    curvature: Any = approximation(name, objective, update_every=10, refresh_every=20, damping=0.5)
    observation = objective.closure(p.x, p.y).observe(frozenset({"data", "model", "exact"}))
    found = refreshes(curvature, [observation] * 4, monkeypatch)
    curvature.damping = 0.7
    found += refreshes(curvature, [observation] * 2, monkeypatch)
    assert sorted(set(found)) == [1, 5]
    assert curvature.refreshed == 0.7


def test_early_refreshes_follow_the_gradients_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    """S2QN (8): λ of a step is of the last gradient, which each new minibatch changes."""
    p = problem("linear")
    objective = p.objective()
    # below all norms here
    rule: dict[str, Any] = {"reading": "printed", "r1": 1e-4, "r2": 1e-3}
    curvature: Any = approximation("skqn-b1", objective, update_every=10, refresh_every=20, **rule)
    steps = [objective.closure(x, y).observe(frozenset({"data"})) for x, y in batches(p, 6)]
    assert refreshes(curvature, steps, monkeypatch) == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("name", ["kfac", "k-bfgs", "smw-gn", "skqn-b1"])
def test_a_state_of_the_first_steps_goes_on_to_the_bit(name: str) -> None:
    """Between two updates of the statistics, T₁ = 4, before T₂ = 15."""
    p = problem("tanh")
    objective = p.objective()
    both: list[Any] = [
        approximation(name, objective, damping=0.3, update_every=4, refresh_every=15)
        for _ in range(2)
    ]
    passes = frozenset({"data", "model", "exact"})
    steps = [objective.closure(x, y).observe(passes) for x, y in batches(p, 9)]
    for k, observation in enumerate(steps):
        if k == 6:
            both[1].load_state_dict(both[0].state_dict())
        for curvature in both if k >= 6 else both[:1]:
            curvature.update(observation)
    found, again = (c.precondition(steps[0].gradients) for c in both)
    assert all(torch.equal(found[name], again[name]) for name in found)
