"""Descent and optimizer: against `torch.optim` where they are the same, and what a torch user
expects of an optimizer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import Any

import pytest
import torch
from problems import MODELS, REPRESENTATIVE, Problem, assert_near, batches, curvature_of, problem
from test_storage import same as same_state
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler, StepLR
from torch.utils._python_dispatch import TorchDispatchMode

import curvlab as cl
from curvlab.algorithms import approximation, descent
from curvlab.errors import Diverged
from curvlab.objective import Objective
from curvlab.optim import Batch, Momentum, MomentumKind, Optimizer, check_direction, warm_start

LR = 0.02
Schedule = Callable[[torch.optim.Optimizer], LRScheduler]

SCHEDULES: dict[str, Schedule | None] = {
    "constant": None,
    "step": lambda o: StepLR(o, step_size=10, gamma=0.5),
    "cosine": lambda o: CosineAnnealingLR(o, T_max=50),
}


def weights(objective: Objective) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in objective.parameters.items()}


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(
        torch.equal(found[n], expected[n]) for n in expected
    )


# ------------------------------------------------------------------------------------------------
# against torch.optim


def run_ours(
    name: str, model: str, schedule: Schedule | None, **options: float
) -> tuple[list[float], dict[str, Tensor]]:
    p = problem(model)
    objective = p.objective()
    optimizer = cl.optimizer(name, objective, lr=LR, **options)
    scheduler = schedule(optimizer) if schedule else None
    losses: list[float] = []
    for x, y in batches(p, 50):
        losses.append(optimizer.step(objective.closure(x, y)).item())
        if scheduler:
            scheduler.step()
    return losses, weights(objective)


def run_torch(
    make: Callable[[list[nn.Parameter]], torch.optim.Optimizer],
    model: str,
    schedule: Schedule | None,
) -> tuple[list[float], dict[str, Tensor]]:
    p = problem(model)
    objective = p.objective()
    optimizer: Any = make(list(p.model.parameters()))
    scheduler = schedule(optimizer) if schedule else None
    losses: list[float] = []
    for x, y in batches(p, 50):
        # torch's contract: the closure is called
        losses.append(optimizer.step(objective.closure(x, y)).item())
        if scheduler:
            scheduler.step()
    return losses, weights(objective)


def assert_same_run(
    ours: tuple[list[float], dict[str, Tensor]], theirs: tuple[list[float], dict[str, Tensor]]
) -> None:
    torch.testing.assert_close(torch.tensor(ours[0]), torch.tensor(theirs[0]), rtol=1e-12, atol=0)
    for name, expected in theirs[1].items():
        torch.testing.assert_close(ours[1][name], expected, rtol=1e-12, atol=1e-12)


everywhere = pytest.mark.parametrize(
    ("model", "schedule"),
    [(m, "constant") for m in MODELS]
    + [(m, s) for m in REPRESENTATIVE for s in SCHEDULES if s != "constant"],
)


@pytest.mark.thinned(6)
@everywhere
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_adam_is_torchs(model: str, weight_decay: float, schedule: str) -> None:
    """ε is the damping; decoupled weight decay makes it AdamW."""
    ours = run_ours("adam", model, SCHEDULES[schedule], damping=1e-4, weight_decay=weight_decay)

    def make(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        if weight_decay:
            return torch.optim.AdamW(
                parameters, LR, betas=(0.9, 0.999), eps=1e-4, weight_decay=weight_decay
            )
        return torch.optim.Adam(parameters, LR, betas=(0.9, 0.999), eps=1e-4)

    assert_same_run(ours, run_torch(make, model, SCHEDULES[schedule]))


@pytest.mark.thinned(3)
@everywhere
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sgd_is_torchs(model: str, momentum: float, schedule: str) -> None:
    ours = run_ours("sgd-m", model, SCHEDULES[schedule], momentum=momentum)
    theirs = run_torch(
        lambda p: torch.optim.SGD(p, LR, momentum=momentum), model, SCHEDULES[schedule]
    )
    assert_same_run(ours, theirs)


@pytest.mark.parametrize("name", ["sgd-m", "adam"])
@pytest.mark.parametrize("model", ["batch-norm", "conv-norm"])
def test_batch_norm_in_training_is_torchs(model: str, name: str) -> None:
    """Weights and running statistics: an observation moves them once, as a forward pass does."""
    ends = []
    for ours in (True, False):
        p = problem(model)
        p.model.train()
        objective = p.objective()
        optimizer: Any
        if ours:
            optimizer = cl.optimizer(
                name, objective, lr=LR, damping=1e-4 if name == "adam" else 0.0
            )
        elif name == "adam":
            optimizer = torch.optim.Adam(p.model.parameters(), LR, betas=(0.9, 0.999), eps=1e-4)
        else:
            optimizer = torch.optim.SGD(p.model.parameters(), LR, momentum=0.9)
        for x, y in batches(p, 10):
            optimizer.step(objective.closure(x, y))
        ends.append(p.model.state_dict())
    for key, expected in ends[1].items():
        torch.testing.assert_close(ends[0][key], expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("model", REPRESENTATIVE)
def test_sgd_with_decoupled_weight_decay_by_hand(model: str) -> None:
    """m ← 0.9 m + g; W ← W − α (m + γ W) (thesis Alg. 15, lines 10, 19 and 20)."""
    p = problem(model)
    objective = p.objective()
    buffers = {name: torch.zeros_like(w) for name, w in p.model.named_parameters()}
    losses: list[float] = []
    for x, y in batches(p, 50):
        losses.append(objective.closure(x, y)().item())
        with torch.no_grad():
            for name, w in p.model.named_parameters():
                assert w.grad is not None
                buffers[name] = 0.9 * buffers[name] + w.grad
                w.sub_(LR * (buffers[name] + 0.1 * w))
    assert_same_run(run_ours("sgd-m", model, None, weight_decay=0.1), (losses, weights(objective)))


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("add", lambda g1, g2: 0.6 * g1 + g2),
        ("average", lambda g1, g2: 0.6 * 0.4 * g1 + 0.4 * g2),
        ("corrected", lambda g1, g2: (0.6 * 0.4 * g1 + 0.4 * g2) / (1 - 0.36)),
        ("nesterov", lambda g1, g2: 0.6 * (0.6 * 0.4 * g1 + 0.4 * g2) + 0.4 * g2),
        ("directions", lambda g1, g2: 0.6 * g1 + g2),
    ],
)
def test_kinds_of_momentum(
    kind: MomentumKind, expected: Callable[[Tensor, Tensor], Tensor]
) -> None:
    g1, g2 = (
        torch.tensor([1.0, -2.0], dtype=torch.float64),
        torch.tensor([0.5, 3.0], dtype=torch.float64),
    )
    momentum = Momentum(0.6, kind)
    first = momentum({"1": g1})["1"]
    second = momentum({"1": g2})["1"]
    size = {"average": 0.4, "nesterov": 0.6 * 0.4 + 0.4}.get(kind, 1.0)
    torch.testing.assert_close(first, size * g1, rtol=1e-14, atol=0)
    torch.testing.assert_close(second, expected(g1, g2), rtol=1e-14, atol=0)


def test_momentum_of_directions_is_torchs_sgd_on_preconditioned_gradients() -> None:
    """Of directions, and not of gradients: the curvature changes from step to step."""
    p = problem("tanh")
    objective, other = p.objective(), problem("tanh").objective()
    options: dict[str, Any] = {"damping": 0.3, "labels": "data"}
    optimizer = cl.optimizer("kfac", objective, lr=0.1, momentum_kind="directions", **options)
    plain = torch.optim.SGD(list(other.parameters.values()), lr=0.1, momentum=0.9)
    curvature = cl.approximation("kfac", other, refresh_every=20, **options)
    added = cl.optimizer("kfac", problem("tanh").objective(), lr=0.1, **options)
    for x, y in batches(p, 5):
        optimizer.step(objective.closure(x, y))
        added.step(added.objective.closure(x, y))
        observation = other.closure(x, y).observe({"data", "gradient"})
        curvature.update(observation)
        for name, d in curvature.precondition(observation.gradients).items():
            block = next(b for b in other.blocks if b.name == name)
            for parameter, part in block.scatter(d).items():
                other.parameters[parameter].grad = part.clone()
        plain.step()
    for name, w in objective.parameters.items():
        assert_near(w.detach(), other.parameters[name].detach(), 1e-12)
    name = next(iter(objective.parameters))
    apart = added.objective.parameters[name] - objective.parameters[name]
    assert float(apart.norm()) > 1e-3 * float(objective.parameters[name].norm())


def test_constant_gradients_leave_the_corrected_average_where_it_is() -> None:
    g = torch.tensor([1.0, -2.0], dtype=torch.float64)
    momentum = Momentum(0.9, "corrected")
    for _ in range(20):
        torch.testing.assert_close(momentum({"1": g})["1"], g, rtol=1e-13, atol=0)


# ------------------------------------------------------------------------------------------------
# warm start


def count_forwards(model: nn.Module) -> list[int]:
    """A list that grows by the size of the batch at every forward pass of the model."""
    seen: list[int] = []
    model.register_forward_hook(lambda module, args, output: seen.append(len(output)))
    return seen


def test_warm_start_counts_and_is_the_curvature_over_one_pass() -> None:
    p = problem("tanh")
    objective, twin = p.objective(), p.objective()
    optimizer = cl.optimizer("kfac", objective, damping=0.1, labels="data")
    before, seen = weights(objective), count_forwards(p.model)
    assert optimizer.warm_start(iter(batches(p, 5))) == 5
    assert seen == 5 * [7]
    assert same(weights(objective), before)
    curvature = approximation("kfac", twin, damping=0.1, labels="data")
    for x, y in batches(p, 5):
        curvature.absorb(twin.closure(x, y).observe(curvature.warm_needs))
    curvature.refresh()
    observation = objective.closure(p.x, p.y).observe()
    found, expected = (
        c.precondition(observation.gradients) for c in (optimizer.descent.curvature, curvature)
    )
    assert same(found, expected)


def test_warm_start_shares_one_observation_among_all() -> None:
    """One forward pass a minibatch for four methods, and each learns what it learns alone."""
    p = problem("tanh")
    shared = p.objective()
    names = ("kfac", "adam", "tnt", "shampoo")
    together, seen = [approximation(name, shared) for name in names], count_forwards(p.model)
    assert warm_start(shared, together, batches(p, 4)) == 4
    assert seen == 4 * [7]
    gradients = shared.closure(p.x, p.y).observe().gradients
    for name, curvature in zip(names, together, strict=True):
        assert curvature.ready is (name != "adam")
        if curvature.ready:
            alone = p.objective()
            one = approximation(name, alone)
            warm_start(alone, [one], batches(p, 4))
            assert same(curvature.precondition(gradients), one.precondition(gradients))


def test_warm_start_reads_no_data_where_nobody_wants_any() -> None:
    p = problem("tanh")

    def data() -> Iterator[Batch]:
        raise AssertionError("read")
        yield  # pragma: no cover

    assert cl.optimizer("adam", p.objective()).warm_start(data()) == 0


def test_an_empty_warm_start_leaves_everything_as_it_was() -> None:
    p = problem("tanh")
    objective = p.objective()
    optimizer = cl.optimizer("kfac", objective, lr=0.01)
    assert optimizer.warm_start([]) == 0
    assert not optimizer.descent.curvature.ready
    optimizer.step(objective.closure(p.x, p.y))
    assert optimizer.descent.curvature.ready


def test_warm_start_uses_the_damping_of_the_first_group() -> None:
    """For KFAC the first direction comes from the warm start's inverse: a damping set before it
    must count.
    """
    p = problem("tanh")
    directions = []
    for at_start, in_group in ((0.1, 5.0), (5.0, 5.0)):
        objective = p.objective()
        optimizer = cl.optimizer("kfac", objective, damping=at_start)
        optimizer.param_groups[0]["damping"] = in_group
        optimizer.warm_start(batches(p, 3))
        directions.append(
            optimizer.descent.curvature.precondition(
                objective.closure(p.x, p.y).observe().gradients
            )
        )
    assert same(*directions)


# ------------------------------------------------------------------------------------------------
# step


@pytest.mark.parametrize("model", REPRESENTATIVE)
def test_step_returns_the_loss_before_the_move_and_moves_along_the_direction(model: str) -> None:
    p = problem(model)
    objective, twin = p.objective(), p.objective()
    optimizer = cl.optimizer("tnt", objective, lr=0.01, damping=0.3)
    same_descent = descent("tnt", twin, damping=0.3)
    for x, y in batches(p, 4):
        before = weights(objective)
        expected_loss = objective.likelihood.loss(p.model(x), y).mean()
        observation = twin.closure(x, y).observe(same_descent.needs)
        direction = same_descent.direction(observation)
        loss = optimizer.step(objective.closure(x, y))
        assert not loss.requires_grad
        torch.testing.assert_close(loss, expected_loss.detach(), rtol=1e-14, atol=0)
        for block in objective.blocks:
            for name, d in block.scatter(direction[block.name]).items():
                torch.testing.assert_close(
                    objective.parameters[name].detach(),
                    before[name] - 0.01 * d,
                    rtol=1e-14,
                    atol=1e-15,
                )


@pytest.mark.parametrize("name", ["kfac", "shampoo", "adam", "smw-ng-bd"])
def test_nothing_is_written_to_or_read_from_grad(name: str) -> None:
    p = problem("tanh")
    objective = p.objective()
    cl.optimizer(name, objective, lr=0.01).step(objective.closure(p.x, p.y))
    assert all(w.grad is None for w in p.model.parameters())
    moved, q = weights(objective), problem("tanh")
    for w in q.model.parameters():
        w.grad = torch.full_like(w, 7.0)
    other = q.objective()
    cl.optimizer(name, other, lr=0.01).step(other.closure(q.x, q.y))
    assert all(bool((w.grad == 7).all()) for w in q.model.parameters())
    assert same(weights(other), moved)


def test_a_scheduled_lr_and_a_group_of_its_own_take_effect() -> None:
    p = problem("tanh")
    objective = p.objective()
    optimizer = cl.optimizer("sgd-m", objective, lr=0.5, momentum=0.0)
    gradients = {
        name: g
        for b in objective.blocks
        for name, g in b.scatter(observe(objective, p)[b.name]).items()
    }
    before = weights(objective)
    (group,) = optimizer.param_groups
    first, *rest = group["params"]
    optimizer.param_groups[:] = [
        group | {"params": [first], "lr": 0.25},
        group | {"params": rest, "lr": 0.0},
    ]
    optimizer.step(objective.closure(p.x, p.y))
    after = weights(objective)
    torch.testing.assert_close(
        after["0.weight"], before["0.weight"] - 0.25 * gradients["0.weight"], rtol=1e-14, atol=1e-15
    )
    assert all(torch.equal(after[n], before[n]) for n in before if n != "0.weight")
    optimizer.param_groups[1]["lr"] = torch.tensor(0.1)  # torch allows a tensor
    optimizer.step(objective.closure(p.x, p.y))
    assert not torch.equal(weights(objective)["0.bias"], after["0.bias"])


def observe(objective: Objective, p: Problem) -> dict[str, Tensor]:
    return objective.closure(p.x, p.y).observe().gradients


@pytest.mark.parametrize("name", ["kfac", "tnt", "shampoo", "adam", "smw-ng-bd", "block-fisher"])
def test_damping_in_the_first_group_takes_effect_at_once(name: str) -> None:
    p, q = problem("tanh"), problem("tanh")
    changed, built = p.objective(), q.objective()
    one, two = (
        cl.optimizer(name, changed, lr=0.01, damping=0.1),
        cl.optimizer(name, built, lr=0.01, damping=3.0),
    )
    one.param_groups[0]["damping"] = 3.0
    for optimizer, objective in ((one, changed), (two, built)):
        optimizer.step(objective.closure(p.x, p.y))
    assert same(weights(changed), weights(built))


# ------------------------------------------------------------------------------------------------
# errors


@pytest.mark.parametrize("name", ["kfac-ef", "tnt-ef", "shampoo", "block-ef"])
def test_a_direction_that_is_not_finite_moves_nothing(name: str) -> None:
    """Loss finite, square of the gradient not: 10¹⁵⁵ a weight."""
    p = problem("linear", "gaussian")
    objective = p.objective()
    optimizer = cl.optimizer(name, objective, lr=0.01)
    before = weights(objective)
    with pytest.raises(cl.CurvlabError, match=r"raise the damping") as raised:
        optimizer.step(objective.closure(100 * p.x, torch.full_like(p.y, 1e153)))
    assert "\n" not in str(raised.value)
    assert same(weights(objective), before)


def test_the_block_is_named_whose_direction_is_not_finite() -> None:
    p = problem("tanh")
    objective = p.objective()
    direction = observe(objective, p)
    direction["2"][1, 2] = torch.nan
    with pytest.raises(
        cl.CurvlabError,
        match=r"the direction of block 2 \(2.weight, 2.bias\) is not finite; nothing was moved",
    ):
        check_direction(objective, direction)


class Reads(TorchDispatchMode):
    """Counts what waits for a device: numbers, shapes and Python branches that depend on data."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(
        self, operator: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name = operator.__name__.split(".")[0]
        if name in (
            "_local_scalar_dense",
            "nonzero",
            "masked_select",
            "unique",
            "equal",
            "is_nonzero",
            "_unique2",
        ):
            self.found.append(name)
        return operator(*args, **(kwargs or {}))


WITHOUT_WAITING = [
    "sgd-m",
    "adam",
    "rmsprop",
    "kfac",
    "kfac-20",
    "kfac-ef",
    "kfac-reduce",
    "kflr",
    "ekfac",
    "foof",
    "adamw",
    "sophia-g",
    "muon",
    "soap",
    "kl-shampoo",
    "tnt",
    "tnt-ef",
    "tnt-per-sample",
    "shampoo",
    "k-bfgs",
    "k-bfgs-l",
    "k-bfgs-20",
    "k-bfgs-l-20",
    "kf-bfgs-cnn",
    "kf-bfgs-l-cnn",
]


@pytest.mark.parametrize("name", WITHOUT_WAITING)
def test_a_step_on_a_gpu_reads_no_number(name: str) -> None:
    """But where inverses are made (every T₂ steps; K-BFGS makes none after its first) and L-BFGS
    fills its memory.
    """
    p = problem("tanh")
    objective = p.objective()
    optimizer = cl.optimizer(name, objective, lr=1e-3, **({"pairs": 3} if "-l" in name else {}))
    optimizer.soundness.late = True  # as on a GPU
    assert not optimizer.warm_start([(p.x, p.y)]) or optimizer.descent.curvature.ready
    period = 2 * curvature_of(optimizer).cadence.refresh_every
    for _ in range(max(period, 8)):
        optimizer.step(objective.closure(p.x, p.y))
    closure = objective.closure(p.x, p.y)
    closure._checked = True  # labels are checked where they lie, before they are sent
    with Reads() as reads:
        optimizer.step(closure)
    assert reads.found == ["_local_scalar_dense"]  # the flag's copy on the host


@pytest.mark.parametrize("name", WITHOUT_WAITING)
def test_late_and_at_once_are_the_same_steps(name: str) -> None:
    found = []
    for late in (False, True):
        p = problem("tanh")
        objective = p.objective()
        optimizer = cl.optimizer(name, objective, lr=1e-3)
        optimizer.soundness.late = late
        optimizer.warm_start([(p.x, p.y)])
        for _ in range(5):
            optimizer.step(objective.closure(p.x, p.y))
        found.append(weights(objective))
    assert same(*found)


@pytest.mark.parametrize("name", ["sgd-m", "adam", "k-bfgs"])
@pytest.mark.parametrize("where", ["loss", "direction"])
def test_on_a_gpu_weights_stay_from_the_first_number_that_is_not_finite(
    name: str, where: str
) -> None:
    p = problem("tanh")
    objective = p.objective()
    optimizer = cl.optimizer(name, objective, lr=1e-3)
    optimizer.soundness.late = True
    optimizer.warm_start([(p.x, p.y)])
    optimizer.step(objective.closure(p.x, p.y))
    before = weights(objective)
    closure = objective.closure(p.x, p.y)
    if where == "loss":
        closure.x = closure.x * torch.nan
    else:
        for buffer in optimizer.descent.momentum.buffers.values():
            buffer.fill_(torch.inf)
    optimizer.step(closure)  # raises nothing yet
    assert same(weights(objective), before)
    optimizer.soundness._copy.fill_(True)  # the host has not heard of it
    optimizer.step(objective.closure(p.x, p.y))  # momentum and statistics are lost, weights are not
    assert same(weights(objective), before)
    for ask in (optimizer.soundness.check, lambda: optimizer.step(objective.closure(p.x, p.y))):
        with pytest.raises(Diverged, match="of an earlier step is not finite; the weights stayed"):
            ask()


@pytest.mark.parametrize("name", ["sgd-m", "kfac", "smw-ng-bd"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_weight_that_is_not_finite_is_named_and_nothing_moves(name: str, value: float) -> None:
    p = problem("relu")
    objective = p.objective()
    optimizer = cl.optimizer(name, objective, lr=0.01)
    with torch.no_grad():
        p.model[2].weight[0, 0] = value
        p.model[2].weight[1] = -value
    before = weights(objective)
    with pytest.raises(
        cl.CurvlabError, match=r"the loss is nan: the weights '2.weight' contain NaN or Inf"
    ):
        optimizer.step(objective.closure(p.x, p.y))
    after = weights(objective)
    assert all(torch.equal(after[n].nan_to_num(), before[n].nan_to_num()) for n in before)


def test_step_refuses_what_is_not_a_closure_of_its_objective() -> None:
    p = problem("tanh")
    objective, other = p.objective(), p.objective()
    optimizer = cl.optimizer("sgd-m", objective)
    mistakes: tuple[Any, ...] = (other.closure(p.x, p.y), lambda: torch.tensor(0.0), None)
    for wrong in mistakes:
        with pytest.raises(cl.CurvlabError, match=r"optimizer.step\(objective.closure\(x, y\)\)"):
            optimizer.step(wrong)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -0.1}, "learning rate must be 0 or positive, not -0.1"),
        ({"lr": float("nan")}, "learning rate must be 0 or positive, not nan"),
        ({"damping": -1.0}, "damping must be 0 or positive, not -1"),
        ({"momentum": 1.0}, "momentum must be at least 0 and below 1, not 1"),
        ({"momentum": -0.5}, "momentum must be at least 0 and below 1"),
        ({"decay": 1.5}, "decay must be at least 0 and below 1, not 1.5"),
        ({"weight_decay": -1e-3}, "weight decay must be 0 or positive, not -0.001"),
        ({"weight_decay": float("nan")}, "weight decay must be 0 or positive, not nan"),
        ({"update_every": 0}, "update_every must be 1 or more"),
    ],
)
def test_arguments_out_of_range(options: dict[str, float], message: str) -> None:
    with pytest.raises(cl.CurvlabError, match=message):
        cl.optimizer("kfac", problem("tanh").objective(), **options)


@pytest.mark.parametrize("name", ["kfac", "adam", "sgd-m"])
@pytest.mark.parametrize("damping", [-1.0, float("nan")])
def test_a_damping_out_of_range_in_the_group_is_an_error(name: str, damping: float) -> None:
    p = problem("tanh")
    objective = p.objective()
    optimizer = cl.optimizer(name, objective)
    before = weights(objective)
    optimizer.param_groups[0]["damping"] = damping
    with pytest.raises(cl.CurvlabError, match="damping must be 0 or positive"):
        optimizer.step(objective.closure(p.x, p.y))
    assert same(weights(objective), before)


def test_a_failed_step_leaves_the_optimizer_usable() -> None:
    """A minibatch that does not fit is refused; the next step is as if it had not come (labels
    aside: none are drawn).
    """
    p, q = problem("tanh"), problem("tanh")
    results = []
    for r, broken in ((p, True), (q, False)):
        objective = r.objective()
        optimizer = cl.optimizer("adam", objective, lr=0.01)
        for x, y in batches(r, 3):
            if broken:
                with pytest.raises(cl.CurvlabError, match="out of range"):
                    optimizer.step(objective.closure(x, y + 3))
            optimizer.step(objective.closure(x, y))
        results.append(weights(objective))
    assert same(*results)


# ------------------------------------------------------------------------------------------------
# state_dict


def stepped(name: str, model: str = "tanh") -> Optimizer:
    p = problem(model)
    objective = p.objective()
    optimizer = cl.optimizer(name, objective, lr=0.01)
    optimizer.step(objective.closure(p.x, p.y))
    return optimizer


def test_a_foreign_state_dict_is_refused() -> None:
    p = problem("tanh")
    theirs = torch.optim.SGD(p.model.parameters(), 0.1).state_dict()
    with pytest.raises(cl.CurvlabError, match="it has no 'curvlab' entry"):
        stepped("sgd-m").load_state_dict(theirs)


def test_the_state_dict_of_another_model_is_refused() -> None:
    with pytest.raises(
        (cl.CurvlabError, ValueError),
        match=r"doesn't match the size of optimizer's group|has blocks",
    ):
        stepped("kfac", "relu").load_state_dict(stepped("kfac", "tanh").state_dict())


@pytest.mark.parametrize(
    ("saved", "loaded"),
    [("kfac", "adam"), ("adam", "kfac"), ("sgd-m", "shampoo"), ("tnt", "shampoo")],
)
def test_the_state_dict_of_another_algorithm_is_refused(saved: str, loaded: str) -> None:
    """TNT's and Shampoo's statistics have the same shapes: only the name can tell them apart."""
    with pytest.raises(
        cl.CurvlabError, match=f"the checkpoint is of '{saved}' but this is '{loaded}'"
    ):
        stepped(loaded).load_state_dict(stepped(saved).state_dict())


@pytest.mark.parametrize("name", ["kfac", "adam", "lbfgs"])
@pytest.mark.parametrize("spoil", ["state", "objective"])
def test_a_state_dict_that_fails_half_way_is_not_taken(name: str, spoil: str) -> None:
    """Of another version of torch, or made by hand: the method's own part comes first."""
    saved, loaded = stepped(name), stepped(name)
    saved.step(saved.objective.closure(problem("tanh").x, problem("tanh").y))
    before, state = deepcopy(loaded.state_dict()), saved.state_dict()
    if spoil == "state":
        del state["state"]
    else:
        state["curvlab"]["objective"] = None
    with pytest.raises((KeyError, TypeError, AttributeError)):
        loaded.load_state_dict(state)
    assert same_state(loaded.state_dict(), before)


def test_state_dict_is_torchs_with_one_entry_more() -> None:
    optimizer = stepped("kfac")
    state = optimizer.state_dict()
    assert set(state) == {"state", "param_groups", "curvlab"}
    assert state["param_groups"][0]["params"] == list(range(6))
    assert state["param_groups"][0]["lr"] == 0.01


def test_loading_takes_lr_and_damping_of_the_groups() -> None:
    saved = stepped("tnt")
    saved.param_groups[0] |= {"lr": 0.5, "damping": 7.0}
    loaded = stepped("tnt")
    loaded.load_state_dict(saved.state_dict())
    assert (loaded.param_groups[0]["lr"], loaded.param_groups[0]["damping"]) == (0.5, 7.0)


# ------------------------------------------------------------------------------------------------
# double-grad minibatches


@pytest.mark.parametrize("name", ["k-bfgs-20", "k-bfgs-l"])
@pytest.mark.parametrize("every", [1, 2])
def test_double_grad_averages_over_the_last_minibatch_too(name: str, every: int) -> None:
    """Thesis 2.8.3: ∇f of both minibatches at the weights as they stand, where the last step has
    looked again (T).
    """
    p = problem("tanh")
    objective = p.objective()
    optimizer = cl.optimizer(
        name, objective, lr=0.05, damping=0.3, momentum=0.0, double_grad=True, update_every=every
    )
    data = batches(p, 6)
    optimizer.warm_start(data)
    for step, (x, y) in enumerate(data):
        # steps count from 1: T divides the number of the last
        looked = step > 0 and step % every == 0
        both = [(x, y), data[step - 1]] if looked else [(x, y)]
        both_x, both_y = (torch.cat(part) for part in zip(*both, strict=True))
        expected = (
            objective.closure(both_x, both_y).observe().gradients
        )  # one minibatch of twice the size
        before, H = weights(objective), optimizer.descent.curvature.inverse
        optimizer.step(objective.closure(x, y))
        for block in objective.blocks:
            moved = block.gather(weights(objective)) - block.gather(before)
            direction = (H[block.name] @ expected[block.name].flatten()).view(block.shape)
            torch.testing.assert_close(moved, -0.05 * direction, rtol=1e-9, atol=1e-13)


def test_double_grad_continues_bit_for_bit() -> None:
    p, q = problem("tanh"), problem("tanh")
    one, two = (o.objective() for o in (p, q))
    optimizer, resumed = (
        cl.optimizer("k-bfgs-20", o, lr=0.05, double_grad=True) for o in (one, two)
    )
    for x, y in batches(p, 3):
        optimizer.step(one.closure(x, y))
    q.model.load_state_dict(p.model.state_dict())
    resumed.load_state_dict(optimizer.state_dict())
    assert resumed.descent.further
    for x, y in batches(p, 3, seed=30):
        assert torch.equal(optimizer.step(one.closure(x, y)), resumed.step(two.closure(x, y)))
        assert same(weights(one), weights(two))


def test_double_grad_needs_a_second_look() -> None:
    with pytest.raises(
        cl.CurvlabError,
        match="double_grad needs a method that looks at each minibatch a second time",
    ):
        cl.optimizer("kfac", problem("tanh").objective(), double_grad=True)


@pytest.mark.parametrize("rate", [1e60, float("inf"), float("nan"), -0.1])
def test_a_learning_rate_that_the_dtype_does_not_hold_moves_nothing(rate: float) -> None:
    p = problem("tanh", dtype=torch.float32)
    objective = p.objective()
    optimizer = cl.optimizer("sgd-m", objective, lr=0.1)
    before = weights(objective)
    optimizer.param_groups[0]["lr"] = rate  # as a scheduler may set it
    with pytest.raises(
        Diverged, match=r"the learning rate is .*: not between 0 and 3.4e\+38 \(torch.float32\)"
    ):
        optimizer.step(objective.closure(p.x, p.y))
    assert same(weights(objective), before)
