"""Optimizers of torch and others as algorithms: their steps to the bit, and what is refused."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typer.testing import CliRunner

import curvlab as cl
from curvlab import foreign_kinds
from curvlab.algorithms import descent, find_algorithm
from curvlab.cli.app import app
from curvlab.foreign_optimizers import FOREIGN

KINDS = {
    name: kind
    for name, kind in vars(torch.optim).items()
    if isinstance(kind, type)
    and issubclass(kind, torch.optim.Optimizer)
    and kind is not torch.optim.Optimizer
}
REFUSED = {"LBFGS": "closure", "SparseAdam": "dense gradients"}
OPTIONS: list[tuple[str, dict[str, Any]]] = [
    *[(name, {}) for name in sorted(KINDS.keys() - REFUSED.keys())],
    ("SGD", {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01}),
    ("Adam", {"lr": 0.01, "amsgrad": True, "weight_decay": 0.1}),
    ("AdamW", {"lr": 0.01, "betas": (0.8, 0.9), "weight_decay": 0.1}),
    ("Muon", {"lr": 0.02, "momentum": 0.9, "weight_decay": 0.1}),
    ("RMSprop", {"centered": True, "momentum": 0.9}),
]


@pytest.fixture(autouse=True)
def _nothing_stays() -> Iterator[None]:
    held = dict(FOREIGN)
    yield
    FOREIGN.clear()
    FOREIGN.update(held)


def network(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).to(dtype)


def batches(count: int = 6, size: int = 10, dtype: torch.dtype = torch.float32) -> list[Any]:
    generator = torch.Generator().manual_seed(0)
    return [
        (
            torch.randn(size, 5, generator=generator).to(dtype),
            torch.randint(3, (size,), generator=generator),
        )
        for _ in range(count)
    ]


def made(name: str, model: nn.Module, options: dict[str, Any]) -> list[torch.optim.Optimizer]:
    """The optimizers of a plain loop; what Muon does not take goes to AdamW."""
    matrices = [p for p in model.parameters() if p.ndim == 2]
    if name != "Muon":
        return [KINDS[name](model.parameters(), **options)]
    rest = [p for p in model.parameters() if p.ndim != 2]
    return [KINDS[name](matrices, **options), torch.optim.AdamW(rest)]


def looped(model: nn.Module, optimizers: list[torch.optim.Optimizer], data: list[Any]) -> nn.Module:
    for x, y in data:
        for each in optimizers:
            each.zero_grad()
        F.cross_entropy(model(x), y).backward()
        for each in optimizers:
            each.step()
    return model


def same(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(p, q) for p, q in zip(one.parameters(), other.parameters(), strict=True))


@pytest.mark.filterwarnings("ignore:.*does not take.*")
@pytest.mark.parametrize(("name", "options"), OPTIONS)
def test_a_step_is_torchs_to_the_bit(name: str, options: dict[str, Any]) -> None:
    objective = cl.Objective(network(), cl.likelihoods.Categorical())
    called = cl.foreign(KINDS[name], **options)
    optimizer = cl.optimizer(called, objective)
    for x, y in batches():
        optimizer.step(objective.closure(x, y))
    expected = network()
    assert same(looped(expected, made(name, expected, options), batches()), objective.model)


@pytest.mark.filterwarnings("ignore:.*does not take.*")
@pytest.mark.parametrize("name", ["AdamW", "Muon", "SGD", "Adafactor"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes(name: str, dtype: torch.dtype) -> None:
    objective = cl.Objective(network(dtype), cl.likelihoods.Categorical())
    optimizer = cl.optimizer(f"torch:{name}", objective)
    data = batches(3, dtype=dtype)
    for x, y in data:
        optimizer.step(objective.closure(x, y))
    expected = network(dtype)
    plain = made(name, expected, {})
    for x, y in data:
        for each in plain:
            each.zero_grad()
        # the loss is taken in single precision at least
        z = expected(x)
        F.cross_entropy(z.to(objective.dtype), y).backward()
        for each in plain:
            each.step()
    assert same(expected, objective.model)


@pytest.mark.filterwarnings("ignore:.*does not take.*")
@pytest.mark.parametrize("name", ["AdamW", "Muon", "SGD"])
def test_training_with_a_schedule_and_a_resume(name: str, tmp_path: Path) -> None:
    def trained(epochs: int, **more: Any) -> nn.Module:
        objective = cl.Objective(network(), cl.likelihoods.Categorical())
        cl.train(
            objective,
            batches(),
            algorithm=f"torch:{name}",
            lr=0.01,
            epochs=epochs,
            schedule="step",
            schedule_options={"every": 1, "factor": 0.5},
            folder=tmp_path,
            **more,
        )
        return objective.model

    trained(1)
    found = trained(3, resume=True)
    expected = network()
    plain: Any = made(name, expected, {"lr": 0.01})
    rates: Any = [[g["lr"] for g in each.param_groups] for each in plain]
    if name == "Muon":  # the other's rate keeps its ratio to the first's own, 1e-3
        rates[1] = [1e-3 * (0.01 / 1e-3)]
    for epoch in range(3):
        for each, own in zip(plain, rates, strict=True):
            for group, lr in zip(each.param_groups, own, strict=True):
                group["lr"] = lr * 0.5**epoch
        looped(expected, plain, batches())
    assert same(found, expected)
    log = cl.open(tmp_path / "run.h5")
    about = json.loads(log.attrs["foreign"]) if isinstance(log.attrs["foreign"], str) else None
    assert about is not None
    assert about[f"torch:{name}"]["class"].endswith(name)
    assert ("others_take" in about[f"torch:{name}"]) == (name == "Muon")


@pytest.mark.filterwarnings("ignore:.*does not take.*")
def test_members_follow_the_reference() -> None:
    """Directions of members are those of a loop whose weights are set to the reference's."""
    names = ["torch:AdamW", "torch:Muon", "torch:SGD(lr=0.1, momentum=0.9)"]
    cl.foreign(torch.optim.SGD, lr=0.1, momentum=0.9)
    model = network(torch.float64)
    objective = cl.Objective(model, cl.likelihoods.Categorical(), seed=1)
    data = batches(dtype=torch.float64)
    shadows = {name: descent(name, objective) for name in names}
    reference = descent("kfac", objective, damping=0.1)
    plain = [copy.deepcopy(model) for _ in names]
    loops: list[list[torch.optim.Optimizer]] = [
        [torch.optim.AdamW(plain[0].parameters(), weight_decay=0.0)],
        made("Muon", plain[1], {"weight_decay": 0.0}),
        [torch.optim.SGD(plain[2].parameters(), lr=0.1, momentum=0.9)],
    ]
    loops[1][1].param_groups[0]["weight_decay"] = 0.0  # decay is no part of the direction
    for x, y in data:
        seen = objective.closure(x, y).observe(
            reference.needs.union(*(shadow.needs for shadow in shadows.values()))
        )
        for name, other, loop in zip(names, plain, loops, strict=True):
            other.load_state_dict(model.state_dict())
            looped(other, loop, [(x, y)])
            found = shadows[name].direction(seen)
            rate = find_algorithm(name).lr
            for block in objective.blocks:
                old = block.gather({k: p.detach() for k, p in objective.parameters.items()})
                new = block.gather({k: p.detach() for k, p in other.named_parameters()})
                expected = (old - new) / rate
                torch.testing.assert_close(found[block.name], expected, rtol=1e-10, atol=1e-12)
        cl_move(objective, reference.direction(seen))


def cl_move(objective: cl.Objective, direction: dict[str, Tensor]) -> None:
    from curvlab.steps import move

    move(objective, direction, lambda _: 0.01)


@pytest.mark.filterwarnings("ignore:.*does not take.*")
def test_a_comparison_with_foreign_members_and_reference() -> None:
    objective = cl.Objective(network(), cl.likelihoods.Categorical())
    run = cl.compare(
        objective,
        batches(),
        reference="torch:AdamW",
        algorithms=["kfac", "torch:Muon", "sgd-m"],
        warm=(),
    )
    cosine = cl.cosine_to(run.dataset, "torch:AdamW")
    assert bool((cosine.sel(algorithm="torch:AdamW") > 1 - 1e-5).all())
    assert bool(cosine.notnull().all())
    assert set(json.loads(run.dataset.attrs["foreign"])) == {"torch:AdamW", "torch:Muon"}
    assert not run.diverged


def test_alone_and_in_company() -> None:
    """A shadow has the same direction beside others, to the bit."""
    x, y = batches(1)[0]
    found = []
    for more in (frozenset(), frozenset({"data", "model", "exact"})):
        objective = cl.Objective(network(), cl.likelihoods.Categorical())
        shadow = descent("torch:AdamW", objective)
        found.append(shadow.direction(objective.closure(x, y).observe(shadow.needs | more)))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


class WritesOver(torch.optim.Optimizer):
    """Coupled decay, written into the gradient, as some have it."""

    def __init__(self, params: Any, lr: float = 0.1, weight_decay: float = 10.0) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.grad.add_(p, alpha=group["weight_decay"])
                    p.add_(p.grad, alpha=-group["lr"])


def test_who_writes_over_its_gradient_leaves_the_others_theirs() -> None:
    objective = cl.Objective(network(torch.float64), cl.likelihoods.Categorical())
    x, y = batches(1, dtype=torch.float64)[0]
    members = [descent(cl.foreign(WritesOver), objective) for _ in range(2)]
    seen = objective.closure(x, y).observe(members[0].needs)
    before = {name: g.clone() for name, g in seen.gradients.items()}
    first, second = (member.direction(seen) for member in members)
    for block in objective.blocks:
        g, name = before[block.name], block.name
        weights = block.gather({n: p.detach() for n, p in objective.parameters.items()})
        assert torch.equal(seen.gradients[name], g)
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], g + 10 * weights, rtol=1e-9, atol=1e-12)


class DecaysUnmarked(torch.optim.Optimizer):
    """Momentum, with a decay of the weights before the step, or of what it has left."""

    def __init__(
        self, params: Any, lr: float = 0.1, weight_decay: float = 0.0, after: bool = False
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "after": after})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                m = self.state[p].setdefault("m", torch.zeros_like(p)).lerp_(p.grad, 0.5)
                left = 1 - group["lr"] * group["weight_decay"]
                p.copy_(
                    (p - group["lr"] * m) * left if group["after"] else p * left - group["lr"] * m
                )


@pytest.mark.filterwarnings("ignore:.*does not take.*")
@pytest.mark.parametrize(
    ("kind", "options", "apart"),
    [
        (torch.optim.AdamW, {}, True),
        (torch.optim.Adam, {}, False),
        (torch.optim.Adam, {"decoupled_weight_decay": True}, True),
        (torch.optim.Muon, {}, True),
        (torch.optim.Adafactor, {}, True),  # which torch does not mark
        (torch.optim.SGD, {}, False),
        (torch.optim.SGD, {"momentum": 0.9}, False),
        (torch.optim.RMSprop, {}, False),
        (DecaysUnmarked, {}, True),
        (DecaysUnmarked, {"after": True}, False),
    ],
)
def test_the_decay_is_apart(kind: Any, options: dict[str, Any], apart: bool) -> None:
    """Where it is W ← W (1 − lr γ) beside the step, in a follower and under watch."""
    data = batches(1, dtype=torch.float64)
    followed, watched = [], []
    for decay in (0.0, 0.5):
        objective = cl.Objective(network(torch.float64), cl.likelihoods.Categorical())
        shadow = descent(cl.foreign(kind, **options, weight_decay=decay, lr=0.01), objective)
        followed.append(shadow.direction(objective.closure(*data[0]).observe(shadow.needs)))
        model = network(torch.float64)
        matrices = [p for p in model.parameters() if p.ndim == 2]
        rest = [p for p in model.parameters() if p.ndim != 2]
        taken = matrices if kind is torch.optim.Muon else [*matrices, *rest]
        optimizers = [kind(taken, **options, weight_decay=decay, lr=0.01)]
        optimizers += [torch.optim.SGD(rest, lr=0.01)] if kind is torch.optim.Muon else []
        with cl.watch(model, cl.likelihoods.Categorical(), optimizers, every=1) as watch:
            for x, y in watch(data):
                looped(model, optimizers, [(x, y)])
        log = watch.dataset
        assert ("watched+decay" in log["algorithm"]) == (apart and decay > 0)
        watched.append(torch.as_tensor(log["direction_norm"].sel(algorithm="watched").values))
    for name in followed[0]:
        near = torch.allclose(followed[0][name], followed[1][name], rtol=1e-9, atol=1e-12)
        assert near == apart or (kind is torch.optim.Muon and "bias" in name)
    assert torch.allclose(watched[0], watched[1], rtol=1e-9) == apart


def test_a_schedule_asks_for_no_other_trial_of_the_decay() -> None:
    objective = cl.Objective(network(), cl.likelihoods.Categorical())
    optimizer = cl.optimizer(cl.foreign(torch.optim.AdamW, weight_decay=0.1), objective)
    known = set()
    for number, (x, y) in enumerate(batches()):
        optimizer.param_groups[0]["lr"] = 0.01 / (number + 1)
        optimizer.step(objective.closure(x, y))
        known.add(len(foreign_kinds._APART))
    assert len(known) == 1


def test_under_watch_an_optimizer_of_ours_has_its_decay_apart() -> None:
    watched = []
    for decay in (0.0, 0.5):
        model = network(torch.float64)
        objective = cl.Objective(model, cl.likelihoods.Categorical())
        optimizer = cl.optimizer("adamw", objective, lr=0.01, weight_decay=decay)
        with cl.watch(model, cl.likelihoods.Categorical(), optimizer, every=1) as watch:
            for x, y in watch(batches(1, dtype=torch.float64)):
                optimizer.step(objective.closure(x, y))
        watched.append(watch.dataset["direction_norm"].sel(algorithm="watched").values)
    torch.testing.assert_close(*watched, rtol=1e-9, atol=1e-12)


def test_frozen_parameters_stand_still() -> None:
    model = network()
    first, last = (model.get_parameter(name) for name in ("0.weight", "2.weight"))
    first.requires_grad_(False)
    before = first.detach().clone()
    objective = cl.Objective(model, cl.likelihoods.Categorical())
    optimizer = cl.optimizer("torch:AdamW", objective)
    for x, y in batches(2):
        optimizer.step(objective.closure(x, y))
    assert torch.equal(before, first)
    assert not torch.equal(network().get_parameter("2.weight"), last)


class NeedsGraph(torch.optim.Optimizer):
    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for p in group["params"]:
                torch.autograd.grad(p.grad.sum(), p)


class KeepsWeights(torch.optim.SGD):
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p].setdefault("slow", p.detach().clone())
        return super().step()


class Averages(torch.optim.SGD):
    def train(self) -> None: ...

    def eval(self) -> None: ...


class NoRate(torch.optim.Optimizer):
    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})


class NoRateInGroups(torch.optim.Optimizer):
    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"speed": lr})


class Mean(torch.optim.SGD):
    """Pulled to the mean of the weights that it has seen, which is never one of them."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        super().step()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.state[p]["mean"] = self.state[p].get("mean", 0.5 * p).lerp(p, 0.1)
                    p.lerp_(self.state[p]["mean"], 0.1)


class Scaled(torch.optim.SGD):
    """Norms of weights are in its momentum, as of LARS, and chance, and a decay."""

    def __init__(self, params: Any, lr: float = 0.1, weight_decay: float = 0.1) -> None:
        super().__init__(params, lr, momentum=0.9, weight_decay=weight_decay)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.grad.mul_(p.norm() * torch.rand_like(p) * random.random())
        return super().step()


class MovesItsRate(torch.optim.SGD):
    def step(self, closure: Any = None) -> Any:
        super().step()
        for group in self.param_groups:
            group["lr"] *= 0.8


class MatricesAlone(torch.optim.SGD):
    """Says what it takes in its step, as many a Muon."""

    def step(self, closure: Any = None) -> Any:
        assert all(p.ndim == 2 for group in self.param_groups for p in group["params"])
        return super().step()


class MarkedGroups(torch.optim.SGD):
    """Takes groups that say whether they are matrices, as Muons with an Adam beside do."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        if not all(isinstance(group, dict) and "use_muon" in group for group in params):
            raise TypeError("groups without use_muon")
        super().__init__(params, lr)


class FailsLater(torch.optim.SGD):
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            group["steps"] = group.get("steps", 0) + 1
            _ = 1 / (20 - group["steps"])
        return super().step()


def stepped(kind: Any, data: list[Any], **options: Any) -> nn.Module:
    objective = cl.Objective(network(), cl.likelihoods.Categorical())
    optimizer = cl.optimizer(cl.foreign(kind, **options), objective)
    for x, y in data:
        optimizer.step(objective.closure(x, y))
    return objective.model


def test_an_optimizer_may_move_its_own_rate() -> None:
    """A schedule's writes over it, as in a loop; a saved state goes on from where it was."""
    called = cl.foreign(MovesItsRate, lr=0.1)
    objectives = [cl.Objective(network(), cl.likelihoods.Categorical()) for _ in range(2)]
    optimizers = [cl.optimizer(called, objective) for objective in objectives]
    expected = network()
    plain = MovesItsRate(expected.parameters(), lr=0.1)
    for number, (x, y) in enumerate(batches(6)):
        if number == 2:
            objectives[1].model.load_state_dict(objectives[0].model.state_dict())
            optimizers[1].load_state_dict(optimizers[0].state_dict())
        which = int(number >= 2)
        if number == 4:
            plain.param_groups[0]["lr"] = optimizers[1].param_groups[0]["lr"] = 0.05
        optimizers[which].step(objectives[which].closure(x, y))
        looped(expected, [plain], [(x, y)])
    assert plain.param_groups[0]["lr"] == pytest.approx(0.05 * 0.8**2)
    assert same(expected, objectives[1].model)


@pytest.mark.filterwarnings("ignore:.*does not take.*")
@pytest.mark.parametrize("kind", [MatricesAlone, MarkedGroups])
def test_vectors_go_to_a_second_one_whoever_says_so(kind: Any) -> None:
    found = stepped(kind, batches(), lr=0.1)
    expected = network()
    matrices = [p for p in expected.parameters() if p.ndim == 2]
    rest = [p for p in expected.parameters() if p.ndim != 2]
    plain = [torch.optim.SGD(matrices, lr=0.1), torch.optim.AdamW(rest)]
    assert same(found, looped(expected, plain, batches()))


def test_an_optimizer_that_fails_later_is_one_line() -> None:
    with pytest.raises(cl.CurvlabError, match="FailsLater fails in its step: division by zero"):
        stepped(FailsLater, batches(20))


class StandsStill(torch.optim.SGD):
    def step(self, closure: Any = None) -> Any:
        return None


class Flattens(torch.optim.SGD):
    def step(self, closure: Any = None) -> Any:
        for p in (p for group in self.param_groups for p in group["params"]):
            p.data = p.data.flatten()


def test_a_shape_that_the_step_changes_is_one_line() -> None:
    with pytest.raises(cl.CurvlabError, match=r"0\.weight of shape \[7, 5\] into one of \[35\]"):
        stepped(Flattens, batches(1))


def test_a_member_that_stands_still_has_no_cosine_which_is_said() -> None:
    objective = cl.Objective(network(), cl.likelihoods.Categorical())
    still = cl.foreign(StandsStill)
    with pytest.warns(cl.CurvlabWarning, match=rf"no direction of {still} at some step") as said:
        run = cl.compare(objective, batches(), algorithms=["sgd-m", still], warm=())
    assert len(said) == 1
    assert run.dataset["cosine"].sel(algorithm=still).isnull().all()
    assert run.dataset["cosine"].sel(algorithm="sgd-m").notnull().all()


def test_norms_decay_and_chance_are_no_history() -> None:
    random.seed(3)
    found = stepped(Scaled, batches())
    random.seed(3)
    expected = network()  # seeds torch's generator, as for the other
    plain: list[torch.optim.Optimizer] = [Scaled(expected.parameters())]
    assert same(found, looped(expected, plain, batches()))


def test_a_member_that_draws_leaves_the_others_their_numbers() -> None:
    def losses(*algorithms: str) -> tuple[Tensor, Any]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Dropout(0.5), nn.Linear(7, 3))
        objective = cl.Objective(model, cl.likelihoods.Categorical())
        torch.manual_seed(4)
        run = cl.compare(objective, batches(), algorithms=algorithms, reference="kfac")
        return torch.as_tensor(run.dataset["loss"].values), run.dataset["direction_norm"]

    drawing = cl.foreign(Scaled)
    alone, _ = losses("adam")
    for algorithms in ([drawing, "adam"], ["adam", drawing]):
        found, norms = losses(*algorithms)
        assert torch.equal(alone, found)
        # and its own numbers are others at every step, the same in every company
        own = torch.as_tensor(norms.sel(algorithm=drawing).values)
        assert torch.equal(own, torch.as_tensor(losses(drawing)[1].sel(algorithm=drawing).values))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: cl.foreign(torch.optim.LBFGS), "LBFGS needs a closure"),
        (lambda: find_algorithm("torch:LBFGS"), "torch:LBFGS needs a closure"),
        (lambda: find_algorithm("torch:SparseAdam"), "does not support dense gradients"),
        (lambda: find_algorithm("torch:Adamw"), "did you mean 'AdamW'"),
        (lambda: find_algorithm("torch:lr_scheduler"), "optimizer of torch.optim"),
        (lambda: find_algorithm("no_such_package:SOAP"), "there is no module 'no_such_package'"),
        (lambda: find_algorithm("torch:"), "optimizer of torch.optim"),
        (lambda: find_algorithm(":AdamW"), "importing '' failed"),
        (lambda: cl.foreign(NeedsGraph), "needs the graph of the loss"),
        (lambda: cl.foreign(KeepsWeights), "keeps the weights' own history (its state 'slow')"),
        (lambda: cl.foreign(Averages), "steps on weights of its own beside the model's"),
        (lambda: cl.foreign(Mean), "Mean keeps the weights' own history: it cannot follow"),
        (lambda: cl.foreign(NoRate), "has no learning rate of its own"),
        (lambda: cl.foreign(NoRateInGroups), "keeps no learning rate in its groups"),
        (lambda: cl.foreign(torch.optim.SGD, lr=-1.0), "lr of torch:SGD"),
        (lambda: cl.foreign(torch.optim.SGD, lr="fast"), "no learning rate"),
        (lambda: cl.foreign(torch.optim.SGD, speed=1.0), "options of torch:SGD"),
        (lambda: cl.foreign(nn.Linear), "a class of torch.optim.Optimizer"),  # type: ignore[arg-type]  # the point
        (lambda: cl.foreign(torch.optim.SGD([nn.Parameter(torch.ones(1))])), "a class"),  # type: ignore[arg-type]  # likewise
    ],
)
def test_refused_in_one_line(make: Any, words: str) -> None:
    with pytest.raises(cl.CurvlabError) as caught:
        make()
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"damping": 0.1}, "no damping"),
        ({"momentum_kind": "average"}, "no momentum_kind"),
        ({"labels": "model"}, "no labels"),
        ({"decay": 0.9}, "no decay"),
        ({"refresh_every": 5}, "updates at every step"),
        ({"double_grad": True}, "no double_grad"),
        ({"momentum": 0.9}, "no momentum"),  # of AdamW
        ({"nonsense": 1}, "nonsense"),
        ({"betas": 3}, "betas takes 2 values, such as"),
        ({"betas": (0.9,)}, "betas takes 2 values, such as"),
        ({"amsgrad": "perhaps"}, "amsgrad takes true or false, not 'perhaps'"),
        ({"eps": "small"}, "eps takes a number, such as 1e-08"),
    ],
)
def test_options_that_are_not_its_own(options: dict[str, Any], words: str) -> None:
    objective = cl.Objective(network(), cl.likelihoods.Categorical())
    with pytest.raises(cl.CurvlabError, match=words):
        cl.optimizer("torch:AdamW", objective, **options)


def test_options_that_are_its_own() -> None:
    """`momentum` and `weight_decay` are the optimizer's, where it has them."""
    objective = cl.Objective(network(), cl.likelihoods.Categorical())
    optimizer = cl.optimizer(
        "torch:SGD", objective, lr=0.1, momentum=0.9, weight_decay=0.01, nesterov=True
    )
    for x, y in batches():
        optimizer.step(objective.closure(x, y))
    expected = network()
    options = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01, "nesterov": True}
    assert same(looped(expected, made("SGD", expected, options), batches()), objective.model)


def test_rates_that_differ_are_refused() -> None:
    objective = cl.Objective(network(), cl.likelihoods.Categorical())
    optimizer = cl.optimizer("torch:AdamW", objective)
    first, *others = optimizer.param_groups[0]["params"]
    optimizer.param_groups[0]["params"] = others
    optimizer.add_param_group({"params": [first], "lr": 0.5})
    with pytest.raises(cl.CurvlabError, match="one learning rate"):
        optimizer.step(objective.closure(*batches(1)[0]))


def test_a_checkpoint_of_another_optimizer() -> None:
    objective = cl.Objective(network(), cl.likelihoods.Categorical())
    one, other = (cl.optimizer(f"torch:{name}", objective) for name in ("AdamW", "Adam"))
    for x, y in batches(1):
        one.step(objective.closure(x, y))
    with pytest.raises(cl.CurvlabError, match="torch:AdamW"):
        other.load_state_dict(one.state_dict())
    held = copy.deepcopy(one.state_dict())
    one.load_state_dict(held)
    again = one.state_dict()["curvlab"]["descent"]["curvature"]["optimizers"][0]["state"]
    for key, state in held["curvlab"]["descent"]["curvature"]["optimizers"][0]["state"].items():
        assert all(torch.equal(state[name], again[key][name]) for name in state)


def test_command_lines(tmp_path: Path) -> None:
    run = CliRunner()
    words = "--model mlp-256-20 --steps 2 --batch-size 50 --warm-batches 1 --reference block-ef"
    ran = run.invoke(
        app,
        ["compare", *words.split(), "--algorithms", "torch:AdamW,kfac", "--out", str(tmp_path)],
    )
    assert ran.exit_code == 0, ran.output
    assert "torch:AdamW" in json.loads(cl.open(tmp_path / "run.h5").attrs["foreign"])
    wrong = ["--algorithms", "torch:Adamw", "--out", str(tmp_path / "x")]
    ran = run.invoke(app, ["compare", *words.split(), *wrong])
    assert isinstance(ran.exception, cl.CurvlabError)
    assert "did you mean 'AdamW'" in str(ran.exception)
    words = "--model mlp-256-20 --epochs 1 --steps 2 --batch-size 50 --algorithm torch:SGD"
    more = ["--set", "nesterov=true", "--momentum", "0.9", "--out", str(tmp_path / "train")]
    ran = run.invoke(app, ["train", *words.split(), *more])
    assert ran.exit_code == 0, ran.output
