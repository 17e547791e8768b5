"""What optimizers keep in attributes is in checkpoints too: a run that goes on is the whole one."""

from __future__ import annotations

import io
import random
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from problems import normal
from torch import Tensor, nn

import curvlab as cl
from curvlab.curvature.shadow import Shadow, Shadowed
from curvlab.errors import CurvlabError, CurvlabWarning
from curvlab.foreign_state import AttributeState


class Schedule:
    """An object of an optimizer's own, with an optimizer in it."""

    def __init__(self) -> None:
        self.inner = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
        self.stepper = torch.optim.lr_scheduler.StepLR(self.inner, 2, 0.5)
        self.owner = self

    def next(self) -> float:
        self.inner.step()
        self.stepper.step()
        return float(self.inner.param_groups[0]["lr"])


class Keeper(torch.optim.Optimizer):
    """SGD whose steps depend on what it keeps beside its state."""

    def __init__(self, params: Any, lr: float = 0.1, keeps: str = "counter") -> None:
        super().__init__(params, {"lr": lr})
        self.keeps, self.count, self.function = keeps, 0, max
        self.past: list[Any] = []
        self.masks: dict[Any, Tensor] = {}
        self.by_id: dict[int, Any] = defaultdict(int)
        self.torch = torch.Generator().manual_seed(1)
        self.python, self.numpy = random.Random(2), np.random.default_rng(3)
        self.mean, self.array = torch.zeros(()), np.zeros(2)
        self.schedule, self.which = Schedule(), self.param_groups[0]["params"][0]
        self.lock: Any = iter([0.5] * 100) if keeps == "iterator" else None

    def factor(self, p: nn.Parameter) -> Any:
        assert p.grad is not None
        match self.keeps:
            case "counter":
                self.count += 1
                return 1 / self.count
            case "list":
                self.past = [*self.past[-3:], (float(p.grad.norm()), {len(self.past)})]
                return sum(norm for norm, _ in self.past)
            case "masks":
                self.masks[p] = 0.5 * self.masks.get(p, torch.ones_like(p)) + p.grad.sign()
                return self.masks[p]
            case "by id":
                self.by_id[id(p)] += 1
                return 1 / self.by_id[id(p)]
            case "torch":
                return torch.rand((), generator=self.torch)
            case "python":
                return self.python.random()
            case "numpy":
                return float(self.numpy.random())
            case "tensor":
                self.mean = 0.5 * self.mean + p.grad.norm()
                return self.mean
            case "array":
                self.array[0] += float(p.grad.norm())
                return self.array[0]
            case "weight":
                before, self.which = self.which, p
                return 2.0 if before is p else 1.0
            case "object":
                return self.schedule.next()
            case _:
                return next(self.lock)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(group["lr"] * self.factor(p) * p.grad)


KINDS = ["counter", "list", "masks", "by id", "torch", "python", "numpy", "tensor", "array"]
KINDS += ["weight", "object"]


PACKAGED = ["StableSPAM", "SPAM", "SaRA", "Magma", "EmoFact", "AdamW", "NAdam", "QHAdam", "SCION"]
PACKAGED += ["Kron"]


def objective() -> cl.Objective:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    return cl.Objective(model, cl.likelihoods.Categorical())


def shadow(of: cl.Objective, kind: Any, **options: Any) -> Shadow:
    names = tuple(of.parameters)
    return Shadow(of, [Shadowed(lambda ps: kind(ps, lr=0.1, **options), names, 0.1)], "one")


def directions(follower: Shadow, of: cl.Objective, steps: range) -> list[Tensor]:
    found: list[Tensor] = []
    for step in steps:
        grads = {b.name: normal(*b.shape, seed=step) for b in of.blocks}
        found += follower.precondition(grads).values()
    return found


def check_goes_on(kind: Any, **options: Any) -> None:
    """Steps after a checkpoint, loaded by another, are those of the one that went on."""
    of, other = objective(), objective()
    torch.manual_seed(0)
    one, fresh = shadow(of, kind, **options), shadow(other, kind, **options)
    directions(one, of, range(5))
    state = one.state_dict()
    directions(fresh, other, range(20, 22))  # what it has done does not matter
    fresh.load_state_dict(torch_saved(state))
    torch.manual_seed(1)
    wanted = directions(one, of, range(5, 9))
    torch.manual_seed(1)
    for a, b in zip(directions(fresh, other, range(5, 9)), wanted, strict=True):
        assert torch.equal(a, b)


def torch_saved(state: Any) -> Any:
    """As a checkpoint is read: plain data and tensors alone."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@pytest.mark.parametrize("keeps", KINDS)
def test_an_optimizer_goes_on_with_what_it_kept(keeps: str) -> None:
    check_goes_on(Keeper, keeps=keeps)


@pytest.mark.parametrize(
    "name", ["StableSPAM", "SPAM", "SaRA", "Magma", "EmoFact", "AdamW", "NAdam", "QHAdam", "SCION"]
)
def test_optimizers_of_a_package_go_on(name: str) -> None:
    package = pytest.importorskip("pytorch_optimizer")
    check_goes_on(getattr(package, name))


@pytest.mark.parametrize("name", ["adam", "", 3])
def test_a_name_that_cannot_be(name: Any) -> None:
    with pytest.raises(CurvlabError, match=r"call it by another name|is a text, not"):
        cl.foreign(Keeper, name=name)


def test_what_is_no_plain_data_is_said() -> None:
    of = objective()
    follower = shadow(of, Keeper, keeps="iterator")
    with pytest.warns(CurvlabWarning, match=r"keeps lock beside its state, which is no plain data"):
        follower.state_dict()
    assert not AttributeState(torch.optim.AdamW(of.model.parameters())).state_dict()


def test_a_run_that_is_stopped_goes_on_to_the_same_weights(tmp_path: Path) -> None:
    data = [(normal(8, 5, seed=i), torch.arange(8).add(i).remainder(3)) for i in range(4)]
    name = cl.foreign(Keeper, keeps="counter", name="keeper")

    def trained(epochs: int, folder: str, **more: Any) -> dict[str, Tensor]:
        of = objective()
        cl.train(of, data, algorithm=name, epochs=epochs, folder=tmp_path / folder, **more)
        return {key: t.clone() for key, t in of.model.state_dict().items()}

    wanted = trained(3, "whole")
    trained(1, "parts")
    found = trained(3, "parts", resume=True)
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)
