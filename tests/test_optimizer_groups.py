"""Parameter groups, copies, frozen and thawed parameters, and states of other models: what torch's
users do to an optimizer.
"""

from __future__ import annotations

import copy
import io
import itertools
import pickle
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from problems import Problem, batches, problem
from torch import Tensor, nn
from torch.optim.lr_scheduler import CyclicLR, LambdaLR, LRScheduler, OneCycleLR, StepLR

import curvlab as cl
from curvlab.algorithms import ALGORITHMS, approximation, descent
from curvlab.errors import CurvlabError
from curvlab.likelihoods import Categorical
from curvlab.objective import Objective
from curvlab.optim import Momentum, MomentumKind, Optimizer, displacement, move

NAMES = list(ALGORITHMS)
algorithms = pytest.mark.parametrize("name", NAMES)
LR = 0.02

WHOLE = [name for name in NAMES if ALGORITHMS[name].whole]
ADAPTS = ["smw-ng-bd", "smw-ng", "smw-gn", "hf"]
"""Write their damping back to the groups."""


def weights(objective: Objective) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in objective.parameters.items()}


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(
        torch.equal(found[n], expected[n]) for n in expected
    )


def refusal(call: Callable[[], object], match: str) -> str:
    """The one line by which a call refuses."""
    with pytest.raises(CurvlabError, match=match) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def made(
    name: str, model: str = "tanh", lr: float = 1e-3, **options: Any
) -> tuple[Problem, Objective, Optimizer]:
    p = problem(model)
    objective = p.objective()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", cl.CurvlabWarning)  # of layers without a rule
        return p, objective, cl.optimizer(name, objective, lr=lr, **options)


def regroup(optimizer: Optimizer, *chosen: tuple[Callable[[str], bool], dict[str, Any]]) -> None:
    """Every group emptied, then one for each choice of names; whoever is chosen by none is in no
    group.
    """
    named = optimizer.objective.parameters
    del optimizer.param_groups[:]
    for choice, options in chosen:
        optimizer.add_param_group({"params": [p for n, p in named.items() if choice(n)], **options})


def weight(name: str) -> bool:
    return name.endswith("weight")


def bias(name: str) -> bool:
    return not weight(name)


# ------------------------------------------------------------------------------------------------
# weight decay of a group


@pytest.mark.thinned(2)
@algorithms
@pytest.mark.parametrize("model", ["tanh", "norm"])
def test_weight_decay_of_a_group_is_that_of_its_parameters(name: str, model: str) -> None:
    """p + γ W, γ of weight and bias apart, though they are one block."""
    _, plain, without = made(name, model, weight_decay=0.0)
    p, decayed, within = made(name, model)
    regroup(
        within,
        (weight, {"lr": 1e-3, "weight_decay": 0.3}),
        (bias, {"lr": 1e-3, "weight_decay": 0.1}),
    )
    before = weights(decayed)
    for objective, optimizer in ((plain, without), (decayed, within)):
        optimizer.step(objective.closure(p.x, p.y))
    for n, w in before.items():
        expected = weights(plain)[n] - 1e-3 * (0.3 if weight(n) else 0.1) * w
        torch.testing.assert_close(weights(decayed)[n], expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("schedule", [None, lambda o: StepLR(o, step_size=5, gamma=0.5)])
def test_groups_are_those_of_adamw(
    schedule: Callable[[torch.optim.Optimizer], LRScheduler] | None,
) -> None:
    """Learning rate and weight decay by group, 20 steps, the decay changed on the way."""
    ends = []
    groups = (
        (weight, {"lr": LR, "weight_decay": 0.2}),
        (bias, {"lr": 2 * LR, "weight_decay": 0.0}),
    )
    for ours in (True, False):
        p, objective, optimizer = made("adam", damping=1e-4)
        stepper: Any = optimizer
        if ours:
            regroup(optimizer, *groups)
        else:
            named = objective.parameters
            listed = [
                {"params": [q for n, q in named.items() if choice(n)], **options}
                for choice, options in groups
            ]
            stepper = torch.optim.AdamW(listed, betas=(0.9, 0.999), eps=1e-4)
        scheduler = schedule(stepper) if schedule else None
        for step, (x, y) in enumerate(batches(p, 20)):
            stepper.param_groups[0]["weight_decay"] = 0.2 / (1 + step)
            stepper.step(objective.closure(x, y))
            if scheduler:
                scheduler.step()
        ends.append(weights(objective))
    for n, w in ends[1].items():
        torch.testing.assert_close(ends[0][n], w, rtol=1e-12, atol=1e-12)


def test_weight_decay_of_the_descent_is_that_of_its_groups_and_of_a_comparison() -> None:
    p, objective, optimizer = made("sgd-m", weight_decay=0.3, momentum=0.0)
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.3]
    twin = descent("sgd-m", objective, weight_decay=0.3, momentum=0.0)
    observation = objective.closure(p.x, p.y).observe(twin.needs)
    direction, before = twin.direction(observation), weights(objective)  # no optimizer
    optimizer.step(objective.closure(p.x, p.y))
    for block in objective.blocks:
        for n, d in block.scatter(direction[block.name]).items():
            torch.testing.assert_close(
                weights(objective)[n], before[n] - 1e-3 * d, rtol=1e-14, atol=1e-16
            )
    optimizer.param_groups[0]["weight_decay"] = 0.0
    assert twin.weight_decay == optimizer.descent.weight_decay == 0.3
    before = weights(objective)
    gradients = objective.closure(p.x, p.y).observe().gradients
    optimizer.step(objective.closure(p.x, p.y))
    for block in objective.blocks:
        for n, d in block.scatter(gradients[block.name]).items():
            torch.testing.assert_close(
                weights(objective)[n], before[n] - 1e-3 * d, rtol=1e-14, atol=1e-16
            )


# ------------------------------------------------------------------------------------------------
# momentum


SCHEDULES: dict[str, Callable[[torch.optim.Optimizer], LRScheduler]] = {
    "one-cycle": lambda o: OneCycleLR(o, max_lr=LR, total_steps=20),
    "cyclic": lambda o: CyclicLR(o, base_lr=LR / 10, max_lr=LR, step_size_up=4),
}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", ["sgd-m", "adam"])
def test_a_schedule_of_momentum_is_torchs(name: str, schedule: str) -> None:
    ends, betas = [], []
    for ours in (True, False):
        options: dict[str, Any] = {"damping": 1e-4} if name == "adam" else {}
        p, objective, optimizer = made(name, **options)
        stepper: Any = optimizer
        if not ours and name == "adam":
            stepper = torch.optim.Adam(p.model.parameters(), LR, betas=(0.9, 0.999), eps=1e-4)
        elif not ours:
            stepper = torch.optim.SGD(p.model.parameters(), LR, momentum=0.9)
        scheduler = SCHEDULES[schedule](stepper)
        for x, y in batches(p, 18):
            stepper.step(objective.closure(x, y))
            if ours:
                betas.append(optimizer.descent.momentum.beta)
                assert betas[-1] == optimizer.param_groups[0]["momentum"]
            scheduler.step()
        ends.append(weights(objective))
    assert max(betas) - min(betas) > 0.05
    for n, w in ends[1].items():
        torch.testing.assert_close(ends[0][n], w, rtol=1e-12, atol=1e-12)


@algorithms
def test_one_cycle_runs_with_every_algorithm(name: str) -> None:
    p, objective, optimizer = made(name)
    scheduler = OneCycleLR(optimizer, max_lr=1e-4, total_steps=6)
    for x, y in batches(p, 3):
        optimizer.step(objective.closure(x, y))
        scheduler.step()
    assert optimizer.descent.momentum.beta == pytest.approx(
        optimizer.param_groups[0]["momentum"], abs=0.2
    )


def test_momentum_of_two_groups_that_differ_is_refused() -> None:
    p, objective, optimizer = made("kfac")
    regroup(optimizer, (weight, {"lr": 0.1}), (bias, {"lr": 0.2}))
    before, state = weights(objective), list(flat(optimizer.state_dict()["curvlab"]["descent"]))
    for option, values in (("momentum", (0.9, 0.5)), ("damping", (1.0, 3.0))):
        optimizer.param_groups[1][option] = values[1]
        line = (
            rf"parameter groups 0 and 1 have {option} {values[0]:g} and {values[1]:g}: it is one"
            r" for all"
        )
        refusal(lambda: optimizer.step(objective.closure(p.x, p.y)), line)
        refusal(lambda: optimizer.warm_start([(p.x, p.y)]), line)
        optimizer.param_groups[1][option] = values[0]
    assert same(weights(objective), before)
    assert equal(list(flat(optimizer.state_dict()["curvlab"]["descent"])), state)
    for group in optimizer.param_groups:
        group |= {"momentum": 0.5, "damping": 3.0}
    optimizer.step(objective.closure(p.x, p.y))
    assert (optimizer.descent.momentum.beta, optimizer.descent.curvature.damping) == (0.5, 3.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"momentum": 1.0}, "momentum must be at least 0 and below 1, not 1"),
        ({"momentum": float("nan")}, "momentum must be at least 0 and below 1, not nan"),
        ({"weight_decay": -0.1}, "weight decay must be 0 or positive, not -0.1"),
        ({"weight_decay": float("inf")}, "weight decay must be 0 or positive, not inf"),
        ({"damping": -1.0}, "damping must be 0 or positive, not -1"),
    ],
)
def test_an_option_of_a_group_that_is_out_of_range_moves_nothing(
    options: dict[str, float], message: str
) -> None:
    p, objective, optimizer = made("sgd-m")
    before = weights(objective)
    optimizer.param_groups[0] |= options
    refusal(lambda: optimizer.step(objective.closure(p.x, p.y)), message)
    assert same(weights(objective), before)


@pytest.mark.parametrize("kind", ["add", "average", "corrected"])
def test_a_momentum_that_comes_back_goes_on_from_the_last_gradient(kind: MomentumKind) -> None:
    """m ← β m + … at β = 0 is the gradient: no older buffer is kept."""
    g = [torch.tensor([float(k)], dtype=torch.float64) for k in (1, 2, 4)]
    momentum = Momentum(0.5, kind)
    momentum({"1": g[0]})
    momentum.beta = 0.0
    assert torch.equal(momentum({"1": g[1]})["1"], g[1])
    momentum.beta = 0.5
    expected = 0.5 * g[1] + g[2] if kind == "add" else 0.5 * g[1] + 0.5 * g[2]
    if kind == "corrected":
        expected = expected / (1 - 0.5**3)
    torch.testing.assert_close(momentum({"1": g[2]})["1"], expected, rtol=1e-15, atol=0)
    never = Momentum(0.0, kind)
    never({"1": g[0]})
    assert not never.buffers


# ------------------------------------------------------------------------------------------------
# groups


def test_options_that_nothing_reads_are_refused() -> None:
    optimizer = made("kfac")[2]
    held = optimizer.param_groups[0]["params"].pop()
    line = refusal(
        lambda: optimizer.add_param_group({"params": [held], "weight_decy": 0.1}),
        "unknown option of a parameter",
    )
    assert "did you mean 'weight_decay'? (known: lr, damping, momentum, weight_decay" in line
    refusal(
        lambda: optimizer.add_param_group({"params": [held], "nesterov": True}),
        "unknown option .* 'nesterov'",
    )
    refusal(
        lambda: optimizer.add_param_group({"params": [held], "momentum": 0.1}),
        "groups 0 and 1 have momentum 0.9 and 0.1",
    )
    refusal(
        lambda: optimizer.add_param_group({"params": [held], "damping": 9.0}),
        "groups 0 and 1 have damping 1 and 9",
    )
    refusal(
        lambda: optimizer.add_param_group({"params": [held], "weight_decay": -1.0}),
        "weight decay must be 0 or positive",
    )
    assert len(optimizer.param_groups) == 1
    optimizer.add_param_group({"params": held, "lr": 0.1, "initial_lr": 0.1})
    assert optimizer.param_groups[1] == {
        "params": [held],
        "lr": 0.1,
        "initial_lr": 0.1,
        "damping": 1.0,
        "momentum": 0.9,
        "weight_decay": 0.0,
    }


def test_tensors_that_are_not_the_objectives_are_refused() -> None:
    _, objective, optimizer = made("kfac")
    foreign = nn.Parameter(torch.zeros(3))
    line = (
        r"a tensor of shape \[3\] in a parameter group belongs to no block of this optimizer's"
        r" objective: put it into the model"
    )
    for params in ([foreign], foreign, (p for p in [foreign])):
        refusal(partial(optimizer.add_param_group, {"params": params}), line)
    refusal(
        lambda: optimizer.add_param_group({"params": [("head.weight", foreign)]}),
        "parameter 'head.weight' in a parameter",
    )
    own = next(iter(objective.parameters.values()))
    with pytest.raises(
        ValueError, match="some parameters appear in more than one parameter group"
    ):  # torch's
        optimizer.add_param_group({"params": [own]})
    with pytest.raises(TypeError):  # torch's
        optimizer.add_param_group([own])  # type: ignore[arg-type]  # wrong on purpose
    assert len(optimizer.param_groups) == 1


def test_a_frozen_parameter_of_the_model_is_refused_by_name() -> None:
    p = problem("tanh")
    p.model[0].requires_grad_(False)
    optimizer = cl.optimizer("kfac", p.objective())
    refusal(
        lambda: optimizer.add_param_group({"params": [p.model[0].bias]}),
        r"parameter '0\.bias' in a parameter group belongs",
    )


def test_a_tensor_put_into_a_group_by_hand_is_refused_at_the_step() -> None:
    p, objective, optimizer = made("kfac")
    before = weights(objective)
    optimizer.param_groups[0]["params"].append(nn.Parameter(torch.zeros(3)))
    refusal(
        lambda: optimizer.step(objective.closure(p.x, p.y)),
        r"a tensor of shape \[3\] in a parameter group",
    )
    assert same(weights(objective), before)


@algorithms
def test_a_parameter_that_is_taken_out_is_left_alone(name: str) -> None:
    """Weight decay too; and those that stay move as they do in company."""
    p, objective, optimizer = made(name, weight_decay=0.1)
    q, whole, unchanged = made(name, weight_decay=0.1)
    seen: list[dict[str, Tensor]] = []
    optimizer.watch = lambda _, moved: seen.append(moved)
    assert optimizer.param_groups[0]["params"].pop() is objective.parameters["4.bias"]
    before = weights(objective)
    optimizer.step(objective.closure(p.x, p.y))
    unchanged.step(whole.closure(q.x, q.y))
    assert torch.equal(weights(objective)["4.bias"], before["4.bias"])
    assert all(
        torch.equal(weights(objective)[n], w) for n, w in weights(whole).items() if n != "4.bias"
    )
    assert not seen[0]["3"][:, -1].any()
    assert seen[0]["3"][:, :-1].any()
    for x, y in batches(p, 3):
        optimizer.step(objective.closure(x, y))
    assert torch.equal(weights(objective)["4.bias"], before["4.bias"])
    optimizer.add_param_group({"params": [objective.parameters["4.bias"]]})
    optimizer.step(objective.closure(p.x, p.y))
    assert not torch.equal(weights(objective)["4.bias"], before["4.bias"])


def test_without_any_group_nothing_moves() -> None:
    p, objective, optimizer = made("kfac", weight_decay=0.1)
    before = weights(objective)
    del optimizer.param_groups[:]
    optimizer.step(objective.closure(p.x, p.y))
    assert same(weights(objective), before)


def test_groups_that_somebody_else_has_made_get_what_they_lack() -> None:
    p, objective, optimizer = made("sgd-m", damping=0.5, momentum=0.3, weight_decay=0.2)
    optimizer.param_groups[:] = [{"params": list(objective.parameters.values()), "lr": 0.1}]
    optimizer.step(objective.closure(p.x, p.y))
    (group,) = optimizer.param_groups
    assert (group["lr"], group["damping"], group["momentum"], group["weight_decay"]) == (
        0.1,
        0.5,
        0.3,
        0.2,
    )


@pytest.mark.parametrize("name", ADAPTS)
def test_a_damping_that_adapts_is_written_to_every_group(name: str) -> None:
    p, objective, optimizer = made(name, lr=0.05)
    regroup(optimizer, (weight, {"lr": 0.05}), (bias, {"lr": 0.01}))
    start = optimizer.param_groups[0]["damping"]
    for x, y in batches(p, 3):
        optimizer.step(objective.closure(x, y))
    dampings = {g["damping"] for g in optimizer.param_groups}
    assert dampings == {optimizer.descent.curvature.damping} != {start}
    held = optimizer.param_groups[1]["params"].pop()
    # of the damping as it stands, not as it was at first
    optimizer.add_param_group({"params": [held]})
    optimizer.step(objective.closure(p.x, p.y))


def test_learning_rates_of_tensors_and_of_a_schedule_by_group() -> None:
    p, objective, optimizer = made("sgd-m", momentum=0.0)
    regroup(
        optimizer, (weight, {"lr": torch.tensor(0.1, dtype=torch.float64)}), (bias, {"lr": 0.2})
    )
    scheduler = LambdaLR(optimizer, [lambda k: 1.0, lambda k: 0.5**k])
    for k, (x, y) in enumerate(batches(p, 3)):
        before, gradients = weights(objective), objective.closure(x, y).observe().gradients
        optimizer.step(objective.closure(x, y))
        for block in objective.blocks:
            for n, g in block.scatter(gradients[block.name]).items():
                expected = before[n] - (0.1 if weight(n) else 0.2 * 0.5**k) * g
                torch.testing.assert_close(weights(objective)[n], expected, rtol=1e-13, atol=1e-15)
        scheduler.step()


# ------------------------------------------------------------------------------------------------
# copies


@pytest.mark.thinned(4)
@algorithms
@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("model", ["tanh", "norm"])
def test_a_deep_copy_steps_its_own_copy_of_the_model(name: str, every: int, model: str) -> None:
    """The same steps as the original takes, to the bit, and it moves nothing of the original."""
    p, objective, optimizer = made(name, model, update_every=every, refresh_every=every)
    regroup(optimizer, (weight, {"lr": 1e-3, "weight_decay": 0.1}), (bias, {"lr": 2e-3}))
    optimizer.warm_start(batches(p, 2))
    for x, y in batches(p, 3):
        optimizer.step(objective.closure(x, y))
    copied = copy.deepcopy(optimizer)
    own = copied.objective
    assert copied.descent.objective is own is not objective
    assert own.model is not objective.model
    assert same(weights(own), weights(objective))
    here, there = ({id(w) for w in o.parameters.values()} for o in (objective, own))
    assert {id(w) for g in copied.param_groups for w in g["params"]} == there
    assert not here & there
    before, data, losses = weights(objective), batches(p, 3, seed=40), []
    for x, y in data:
        losses.append(copied.step(own.closure(x, y)))
    assert same(weights(objective), before)
    assert not same(weights(own), before)
    for (x, y), loss in zip(data, losses, strict=True):
        assert torch.equal(optimizer.step(objective.closure(x, y)), loss)
    assert same(weights(objective), weights(own))
    assert copied.param_groups[0]["damping"] == optimizer.param_groups[0]["damping"]
    refusal(
        lambda: copied.step(objective.closure(p.x, p.y)), "a closure of this optimizer's objective"
    )


def test_a_deep_copy_before_the_first_step_and_of_a_copy() -> None:
    p, objective, optimizer = made("kfac")
    twice = copy.deepcopy(copy.deepcopy(optimizer))
    for one in (optimizer, twice):
        one.step(one.objective.closure(p.x, p.y))
    assert same(weights(objective), weights(twice.objective))


def test_a_deep_copy_with_its_model_and_its_schedule() -> None:
    p, objective, optimizer = made("adam", lr=0.1)
    scheduler = StepLR(optimizer, step_size=1, gamma=0.5)
    optimizer.step(objective.closure(p.x, p.y))
    scheduler.step()
    model, copied, schedule = copy.deepcopy((p.model, optimizer, scheduler))
    assert copied.objective.model is model
    assert schedule.optimizer is copied
    copied.step(copied.objective.closure(p.x, p.y))
    schedule.step()
    assert (copied.param_groups[0]["lr"], optimizer.param_groups[0]["lr"]) == (0.025, 0.05)


def test_who_watches_the_original_does_not_watch_the_copy() -> None:
    p, _, optimizer = made("sgd-m")
    seen: list[object] = []
    optimizer.watch = optimizer.look = lambda *told: seen.append(told)
    optimizer.also = frozenset({"model"})
    copied = copy.deepcopy(optimizer)
    copied.step(copied.objective.closure(p.x, p.y))
    assert (copied.watch, copied.look, copied.also) == (None, None, frozenset())
    assert not seen


def test_a_number_that_was_not_finite_is_known_to_the_copy() -> None:
    p, objective, optimizer = made("sgd-m")
    optimizer.soundness.late = True  # as on a GPU
    closure = objective.closure(p.x, p.y)
    closure.x = closure.x * torch.nan
    optimizer.step(closure)
    copied = copy.deepcopy(optimizer)
    with pytest.raises(cl.CurvlabError, match="of an earlier step is not finite"):
        copied.step(copied.objective.closure(p.x, p.y))


@pytest.mark.parametrize("use", [pickle.dumps, copy.copy, lambda o: torch.save(o, io.BytesIO())])
def test_pickling_says_what_to_do(use: Callable[[Optimizer], object]) -> None:
    refusal(
        lambda: use(made("kfac")[2]),
        r"cannot be pickled.*: save its state_dict\(\), .* copy.deepcopy copies it",
    )


# ------------------------------------------------------------------------------------------------
# frozen, thawed


FREEZES: dict[str, Callable[[Any], list[nn.Parameter]]] = {
    "layer": lambda m: list(m[2].parameters()),
    "last": lambda m: list(m[4].parameters()),
    "weight": lambda m: [m[2].weight],
    "bias": lambda m: [m[4].bias],
}


@pytest.mark.thinned(4)
@algorithms
@pytest.mark.parametrize("what", FREEZES)
def test_frozen_later_stands_still(name: str, what: str) -> None:
    """As under every torch optimizer: weights, weight decay and momentum; the rest goes on."""
    p, objective, optimizer = made(name, weight_decay=0.1, lr=0.01)
    seen: list[dict[str, Tensor]] = []
    optimizer.watch = lambda _, moved: seen.append(moved)
    optimizer.step(objective.closure(p.x, p.y))
    frozen = FREEZES[what](p.model)
    for w in frozen:
        w.requires_grad_(False)
    before = weights(objective)
    for x, y in batches(p, 3):
        optimizer.step(objective.closure(x, y))
    after, held = weights(objective), {id(w) for w in frozen}
    for n, w in objective.parameters.items():
        assert torch.equal(after[n], before[n]) is (id(w) in held), n
    for block in objective.blocks:
        for n, d in block.scatter(seen[-1][block.name]).items():
            assert bool(d.any()) is (id(objective.parameters[n]) not in held)
    for w in frozen:
        w.requires_grad_(True)
    optimizer.step(objective.closure(p.x, p.y))
    assert not any(torch.equal(weights(objective)[n], before[n]) for n in before)


def test_move_and_displacement_leave_alone_what_is_frozen() -> None:
    """Also without an optimizer, as in a comparison; and a rate of 0 takes no part in what is not
    finite.
    """
    p = problem("tanh")
    objective = p.objective()
    direction = objective.closure(p.x, p.y).observe().gradients
    direction["2"][:] = torch.nan
    p.model[2].requires_grad_(False)
    before = weights(objective)
    step = displacement(objective, direction, lambda _: 0.5)
    move(objective, direction, lambda _: 0.5)
    for block in objective.blocks:
        for n, d in block.scatter(step[block.name]).items():
            assert torch.equal(weights(objective)[n], before[n] + d)
    assert not step["2"].any()
    assert step["1"].any()


@pytest.mark.parametrize("name", ["sgd-m", "kfac", "hf"])
def test_thawed_later_is_refused_by_name(name: str) -> None:
    p = problem("tanh")
    p.model[0].requires_grad_(False)
    objective = p.objective()
    optimizer = cl.optimizer(name, objective, lr=0.01)
    optimizer.step(objective.closure(p.x, p.y))
    p.model[0].weight.requires_grad_(True)
    before = weights(objective)
    line = (
        r"parameters 0\.weight are trainable but belong to no block .*: make a new Objective, and a"
        r" new optimizer of it"
    )
    for _ in range(2):
        refusal(lambda: optimizer.step(objective.closure(p.x, p.y)), line)
    assert same(weights(objective), before)
    # nor is another made, nor a comparison begun
    refusal(lambda: cl.optimizer(name, objective), line)
    p.model[0].weight.requires_grad_(False)
    optimizer.step(objective.closure(p.x, p.y))
    p.model[0].requires_grad_(True)
    fresh = p.objective()
    cl.optimizer(name, fresh, lr=0.01).step(fresh.closure(p.x, p.y))


def test_what_is_put_into_the_model_later_is_refused() -> None:
    p, objective, optimizer = made("sgd-m")
    optimizer.step(objective.closure(p.x, p.y))
    p.model.append(nn.Linear(3, 3).double())
    refusal(
        lambda: optimizer.step(objective.closure(p.x, p.y)),
        r"parameters 5\.weight, 5\.bias are trainable",
    )
    p.model[5] = nn.Sequential(*(nn.Linear(3, 3).double() for _ in range(3)))
    refusal(
        lambda: optimizer.step(objective.closure(p.x, p.y)),
        r"parameters 5\.0\.weight, 5\.0\.bias, 5\.1\.weight and 3 more are",
    )
    p.model.pop(5)
    optimizer.step(objective.closure(p.x, p.y))


def test_a_parameter_that_is_replaced_or_gone_is_refused() -> None:
    p, objective, optimizer = made("sgd-m")
    optimizer.step(objective.closure(p.x, p.y))
    old, p.model[4].bias = p.model[4].bias, nn.Parameter(torch.zeros(3, dtype=torch.float64))
    refusal(
        lambda: optimizer.step(objective.closure(p.x, p.y)),
        r"a tensor of shape \[3\] in a parameter group belongs to no",
    )
    p.model[4].bias = old
    optimizer.step(objective.closure(p.x, p.y))
    p.model[4].bias = None
    refusal(
        optimizer.descent.ownership.check,
        r"the model has no parameter '4\.bias' any more: make a new Objective",
    )


# ------------------------------------------------------------------------------------------------
# states of other models


def net(*widths: int, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = [
            layer for i, o in itertools.pairwise(widths) for layer in (nn.Linear(i, o), nn.Tanh())
        ]
        return nn.Sequential(*layers[:-1]).to(dtype)


def stepped(
    name: str, *widths: int, dtype: torch.dtype = torch.float64, **options: Any
) -> Optimizer:
    objective = Objective(net(*widths, dtype=dtype), Categorical())
    optimizer = cl.optimizer(name, objective, lr=1e-3, **{"damping": 0.3, **options})
    drawn = torch.Generator().manual_seed(1)
    for _ in range(2):
        x = torch.randn(6, widths[0], dtype=torch.float64, generator=drawn).to(dtype)
        optimizer.step(objective.closure(x, torch.randint(3, (6,), generator=drawn)))
    return optimizer


def flat(state: Any) -> Iterator[Any]:
    if isinstance(state, dict):
        for key in state:
            yield key
            yield from flat(state[key])
    elif isinstance(state, list | tuple):
        for value in state:
            yield from flat(value)
    else:
        yield state.clone() if isinstance(state, Tensor) else state


def equal(one: list[Any], other: list[Any]) -> bool:
    return len(one) == len(other) and all(
        torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else a == b
        for a, b in zip(one, other, strict=True)
    )


def refuses(optimizer: Optimizer, state: dict[str, Any], match: str) -> str:
    """In one line, with nothing of it taken."""
    before, parameters = list(flat(optimizer.state_dict())), weights(optimizer.objective)
    line = refusal(lambda: optimizer.load_state_dict(state), match)
    assert equal(list(flat(optimizer.state_dict())), before)
    assert same(weights(optimizer.objective), parameters)
    return line


@algorithms
def test_a_state_of_other_widths_is_refused(name: str) -> None:
    """Faults, row 28: as many blocks, of other shapes. The block is named, and both shapes."""
    saved = stepped(name, 4, 5, 3).state_dict()
    shapes = (
        r"block 1 \(0\.weight, 0\.bias\) has shape \[7, 5\] but in the checkpoint is \[5, 5\]:"
        r" build the same model first"
    )
    refuses(stepped(name, 4, 7, 3), saved, shapes)


@pytest.mark.thinned(2)
@algorithms
def test_a_state_of_as_many_numbers_is_refused(name: str) -> None:
    """35 and 24 numbers in both: [7, 5] and [3, 8] are not [5, 7] and [4, 6]."""
    saved = stepped(name, 4, 7, 3).state_dict()
    refuses(stepped(name, 6, 5, 4), saved, r"has shape \[5, 7\] but in the checkpoint is \[7, 5\]")


NUMBERS = ["ssn", "full-ggn"]
"""Methods whose curvature is of the minibatch at hand: they keep numbers only."""


@pytest.mark.thinned(2)
@algorithms
def test_a_state_of_an_earlier_version_of_other_widths_is_refused(name: str) -> None:
    """It does not hold the shapes: they show in what was learnt."""
    saved = stepped(name, 4, 5, 3).state_dict()
    del saved["curvlab"]["descent"]["blocks"], saved["curvlab"]["descent"]["dtype"]
    if name != "ssn":
        line = refuses(stepped(name, 4, 7, 3), saved, "build the same model first")
        assert (
            r"has shape [7, 5] but in the checkpoint its " in line
            or "has 43 parameters but this model has 59 (block 1" in line
        )
    if name not in WHOLE:
        refuses(stepped(name, 4, 5, 5, 3), saved, "but in the checkpoint its momentum is|groups of")


FACTORED = [n for n in NAMES if n.startswith(("kf", "k-bfgs", "skqn", "tnt", "shampoo", "smw"))]
"""Whose statistics show the two sides of a layer."""


@pytest.mark.parametrize("name", [n for n in NAMES if n not in NUMBERS])
def test_a_curvature_alone_refuses_other_widths(name: str) -> None:
    saved = stepped(name, 4, 5, 3).descent.curvature.state_dict()
    curvature = stepped(name, 4, 7, 3).descent.curvature
    before = list(flat(curvature.state_dict()))
    line = refusal(lambda: curvature.load_state_dict(saved), "build the same model first")
    assert "[7, 5]" in line
    assert equal(list(flat(curvature.state_dict())), before)


@pytest.mark.parametrize("name", FACTORED)
def test_a_curvature_alone_refuses_as_many_numbers_on_other_sides(name: str) -> None:
    saved = stepped(name, 4, 7, 3).descent.curvature.state_dict()
    curvature = stepped(name, 6, 5, 4).descent.curvature
    before = list(flat(curvature.state_dict()))
    line = refusal(lambda: curvature.load_state_dict(saved), "build the same model first")
    assert "[5, 7]" in line
    assert equal(list(flat(curvature.state_dict())), before)


@pytest.mark.parametrize("name", [n for n in NAMES if not ALGORITHMS[n].whole])
def test_a_state_without_an_inverse_of_other_widths_is_refused(name: str) -> None:
    """Saved between two minibatches of a warm start: statistics alone."""

    def absorbed(*widths: int) -> Any:
        objective = Objective(net(*widths), Categorical())
        curvature: Any = approximation(name, objective, damping=0.3)
        curvature.averaging = replace(curvature.averaging, warm=True)
        x = torch.randn(
            6, widths[0], dtype=torch.float64, generator=torch.Generator().manual_seed(1)
        )
        curvature.absorb(
            objective.closure(x, torch.zeros(6, dtype=torch.long)).observe(curvature.warm_needs)
        )
        return curvature

    saved, curvature = absorbed(4, 5, 3).state_dict(), absorbed(4, 7, 3)
    # an identity, and Muon's operator of the gradient itself, are made of the first statistics
    assert name in ("sgd-m", "muon") or "inverse" not in saved["blocks"]["1"]
    before = list(flat(curvature.state_dict()))
    line = refusal(lambda: curvature.load_state_dict(saved), "build the same model first")
    assert "[7, 5]" in line or "[3, 8]" in line
    assert equal(list(flat(curvature.state_dict())), before)


@pytest.mark.thinned(2)
@algorithms
@pytest.mark.parametrize("alone", [False, True])
def test_a_state_of_another_dtype_is_refused(name: str, alone: bool) -> None:
    """Not cast: some of it is of double precision in any model, and a state is what goes on bit for
    bit.
    """
    saved = stepped(name, 4, 5, 3).state_dict()
    optimizer = stepped(name, 4, 5, 3, dtype=torch.float32)
    line = (
        r"is of torch.float32 but of torch.float64 in the checkpoint: build the model in the same"
        r" dtype first"
    )
    if not alone:
        refuses(optimizer, saved, line)
        return
    curvature = optimizer.descent.curvature
    before = list(flat(curvature.state_dict()))
    if name in NUMBERS:
        return
    refusal(lambda: curvature.load_state_dict(saved["curvlab"]["descent"]["curvature"]), line)
    assert equal(list(flat(curvature.state_dict())), before)


@pytest.mark.thinned(2)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@algorithms
def test_a_state_of_the_same_model_is_taken(name: str, dtype: torch.dtype) -> None:
    saved, optimizer = stepped(name, 4, 5, 3, dtype=dtype), stepped(name, 4, 5, 3, dtype=dtype)
    state = copy.deepcopy(saved.state_dict())
    optimizer.load_state_dict(state)
    assert equal(list(flat(optimizer.state_dict())), list(flat(state)))


@pytest.mark.parametrize(
    "broken",
    ["momentum of another shape", "momentum of no block", "further of another shape", "no counter"],
)
def test_a_state_that_does_not_fit_in_one_place_is_not_half_loaded(broken: str) -> None:
    saved = stepped("k-bfgs-20", 4, 5, 3, double_grad=True).state_dict()
    own, optimizer = (
        copy.deepcopy(saved["curvlab"]["descent"]),
        stepped("k-bfgs-20", 4, 5, 3, double_grad=True),
    )
    state = saved | {"curvlab": saved["curvlab"] | {"descent": own}}
    if broken == "momentum of another shape":
        own["momentum"]["buffers"]["2"] = torch.zeros(3, 7, dtype=torch.float64)
        refuses(
            optimizer,
            state,
            r"block 2 .* has shape \[3, 6\] but in the checkpoint its momentum is \[3, 7\]",
        )
    elif broken == "momentum of no block":
        own["momentum"]["buffers"]["9"] = torch.zeros(3, 7, dtype=torch.float64)
        refuses(optimizer, state, "the checkpoint has a momentum of a? ?block 9 but")
    elif broken == "further of another shape":
        own["further"]["1"] = torch.zeros(2, dtype=torch.float64)
        refuses(optimizer, state, r"its further gradient is \[2\]")
    else:
        del own["curvature"]["updates"]
        before = list(flat(optimizer.state_dict()))
        with pytest.raises(KeyError):
            optimizer.load_state_dict(state)
        assert equal(list(flat(optimizer.state_dict())), before)


def test_a_state_of_other_groups_is_refused_with_nothing_taken() -> None:
    p, _, one = made("kfac")
    other = made("kfac")[2]
    regroup(one, (weight, {"lr": 0.1}), (bias, {"lr": 0.2}))
    one.step(one.objective.closure(p.x, p.y))
    refuses(
        other,
        one.state_dict(),
        r"the checkpoint has groups of \[3, 3\] parameters but this optimizer of \[6\]: make the"
        r" same",
    )
    regroup(other, (weight, {}), (bias, {}))
    other.load_state_dict(one.state_dict())
    assert [g["lr"] for g in other.param_groups] == [0.1, 0.2]


def test_options_of_groups_are_in_the_state() -> None:
    p, _, one = made("kfac")
    one.param_groups[0] |= {"momentum": 0.5, "weight_decay": 0.25}
    one.step(one.objective.closure(p.x, p.y))
    _, objective, other = made("kfac")
    other.load_state_dict(one.state_dict())
    assert (other.param_groups[0]["momentum"], other.param_groups[0]["weight_decay"]) == (0.5, 0.25)
    other.step(objective.closure(p.x, p.y))
    assert other.descent.momentum.beta == 0.5


def test_a_state_of_an_earlier_version_goes_on() -> None:
    """Its groups have no momentum and no weight decay: the optimizer's own."""
    p, objective, one = made("kfac", momentum=0.5, weight_decay=0.25)
    q, other, two = made("kfac", momentum=0.5, weight_decay=0.25)
    one.step(objective.closure(p.x, p.y))
    state = one.state_dict()
    del state["curvlab"]["descent"]["blocks"], state["curvlab"]["descent"]["dtype"]
    for group in state["param_groups"]:
        del group["momentum"], group["weight_decay"]
    q.model.load_state_dict(p.model.state_dict())
    two.load_state_dict(state)
    for x, y in batches(p, 3):
        assert torch.equal(two.step(other.closure(x, y)), one.step(objective.closure(x, y)))
    assert same(weights(other), weights(objective))
