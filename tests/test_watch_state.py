"""What a model and its hooks hold beside weights: a watched loop finds it as it left it."""

from __future__ import annotations

import functools
import random
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from test_watch import loss_of, minibatches, plain, sgd_loop
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import curvlab as cl
from curvlab.errors import CurvlabWarning
from curvlab.model_state import ModelState

CALLS = 0
SEEN: list[float] = []


class Annealed:
    """A schedule of a model's own."""

    def __init__(self) -> None:
        self.step, self.past = 0, {"values": deque([0.0], maxlen=3)}

    def next(self) -> float:
        self.step += 1
        self.past["values"].append(1 / self.step)
        return sum(self.past["values"])


class Holding(nn.Module):
    """A network whose outputs depend on what it holds, which every call moves."""

    late: Tensor | None

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind, self.a, self.c = kind, nn.Linear(6, 8).double(), nn.Linear(8, 3).double()
        self.torch = torch.Generator().manual_seed(3)
        self.numpy, self.legacy = np.random.default_rng(1), np.random.RandomState(2)
        self.python, self.count, self.schedule = random.Random(3), 0, Annealed()
        self.mean, self.array = torch.zeros(8, dtype=torch.float64), np.zeros(8)
        self.register_buffer("late", None)
        self.memory: list[Tensor] = []

    def shift(self, h: Tensor) -> Any:
        global CALLS
        match self.kind:
            case "torch":
                return torch.randn(h.shape, generator=self.torch, dtype=h.dtype)
            case "numpy":
                return torch.as_tensor(self.numpy.standard_normal(h.shape))
            case "legacy":
                return torch.as_tensor(self.legacy.standard_normal(h.shape))
            case "python":
                return self.python.random()
            case "counter":
                self.count += 1
                return 0.1 * self.count
            case "global":
                CALLS += 1
                return 0.1 * CALLS
            case "object":
                return self.schedule.next()
            case "tensor":
                self.mean.mul_(0.9).add_(h.detach().mean(0))
                return self.mean.clone()
            case "data":  # which no version of torch's counts
                self.mean.data.add_(1)
                return self.mean.clone()
            case "array":
                self.array += 0.1
                return torch.as_tensor(self.array.copy())
            case "buffer made late":
                late = torch.zeros((), dtype=h.dtype) if self.late is None else self.late
                self.late = late + 0.1
                return self.late.clone()
            case "memory":
                self.memory.append(h.detach())
                return torch.stack(self.memory).mean((0, 1))
            case _:
                self.made = getattr(self, "made", 0.0) + 0.1  # an attribute of the first call
                return self.made

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.c(torch.tanh(self.a(x) + 0.3 * self.shift(x[:, :1].expand(-1, 8))))
        return out


KINDS = ["torch", "numpy", "legacy", "python", "counter", "global", "object", "tensor", "data"]
KINDS += ["array", "buffer made late", "memory", "attribute made late"]


def trained(model: nn.Module, watched: bool) -> Any:
    """Return the weights after a loop, what another call gives then, and the log."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    if not watched:
        for x, y in minibatches(4):
            optimizer.zero_grad()
            loss_of(model, x, y).backward()
            optimizer.step()
        seen = None
    else:
        seen = cl.watch(
            model, cl.likelihoods.Categorical(), optimizer, algorithms=["kfac", "block-ggn"]
        )
        sgd_loop(model, seen, optimizer, minibatches(4))
    weights = [p.detach().clone() for p in model.parameters()]
    return weights, model(minibatches(1)[0][0]).detach(), seen


def same(make: Callable[[], nn.Module]) -> Any:
    """Check that a watched loop ends as the other, and return its log."""
    (weights, output, _), (wanted, after, seen) = trained(make(), False), trained(make(), True)
    for one, other in zip([*weights, output], [*wanted, after], strict=True):
        assert torch.equal(one, other)
    return seen.dataset


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_model_holds_stays_and_a_look_sees_it_as_the_loop_did(kind: str) -> None:
    def make() -> nn.Module:
        global CALLS
        CALLS = 0
        return Holding(kind)

    assert float(same(make)["optimizer_gradient_cosine"].min()) > 1 - 1e-12


@pytest.mark.filterwarnings("ignore:parameters of layers without a rule")
@pytest.mark.parametrize("norm", ["spectral_norm", "weight_norm"])
def test_a_parametrization_is_not_asked_for_its_weight(norm: str) -> None:
    """In train mode each asking for it moves the buffers of a spectral norm."""

    def make() -> nn.Module:
        model = plain()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            getattr(parametrizations, norm)(model[0])
        return model

    assert float(same(make)["optimizer_gradient_cosine"].min()) > 1 - 1e-12


HOOKS: dict[str, Callable[[Any, list[float]], Any]] = {
    "closes over": lambda m, out: m[0].register_forward_hook(
        lambda _, i, o: out.append(float(o.detach().sum()))
    ),
    "before": lambda m, out: m[2].register_forward_pre_hook(
        lambda _, i: out.append(float(i[0].detach().sum()))
    ),
    "back": lambda m, out: m[2].register_full_backward_hook(
        lambda _, i, o: out.append(float(o[0].sum()))
    ),
    "of a weight": lambda m, out: m[0].weight.register_hook(lambda g: out.append(float(g.sum()))),
    "partial": lambda m, out: m[0].register_forward_hook(functools.partial(noted, into=out)),
    "global": lambda m, out: m[0].register_forward_hook(
        lambda _, i, o: SEEN.append(float(o.detach().sum()))
    ),
}


def noted(module: nn.Module, given: Any, out: Tensor, into: list[float]) -> None:
    into.append(float(out.detach().sum()))


@pytest.mark.filterwarnings("ignore:Full backward hook")
@pytest.mark.parametrize("kind", HOOKS)
def test_what_hooks_write_down_is_what_the_loop_did(kind: str) -> None:
    written: list[list[float]] = []

    def make() -> nn.Module:
        model = plain()
        SEEN.clear()
        written.append(SEEN if kind == "global" else [])
        HOOKS[kind](model, written[-1])
        return model

    trained(make(), False)
    wanted = list(written[0])
    trained(make(), True)
    assert written[1] == wanted
    assert len(wanted) in (4, 5)


def test_the_state_of_a_model_is_put_back_whole_and_not_copied_without_end() -> None:
    model: Any = plain()
    model.data_of_it = torch.zeros(1 << 23)
    model.names = {"a": [1, {2}], "b": deque([3])}
    names, inner = model.names, model.names["a"]
    state = ModelState(model)
    model.data_of_it += 1
    inner[1].add(5)
    inner.append(6)
    names["b"].appendleft(7)
    del names["b"]
    model.more, model.names = 1, None
    state.put_back()
    assert model.names is names
    assert names == {"a": [1, {2}], "b": deque([3])}
    assert names["a"] is inner
    assert not hasattr(model, "more")
    assert bool(model.data_of_it.all())  # what holds more than a model is its data


def test_parameters_that_come_go_or_are_replaced_are_said() -> None:
    """The weights of a look are those before the step, of parameters without a block too."""

    def loop(change: Callable[[Any], Any]) -> Any:
        model = plain()
        model[0].requires_grad_(False)
        optimizer = torch.optim.AdamW(model[2].parameters(), lr=0.1, weight_decay=0.1)
        seen = cl.watch(model, cl.likelihoods.Categorical(), optimizer, algorithms=["kfac"])
        with seen:
            for i, (x, y) in enumerate(seen(minibatches(4))):
                if i == 2:
                    change(model)
                    held = optimizer.param_groups[0]["params"]
                    held[:] = [p for p in model.parameters() if p.requires_grad]
                optimizer.zero_grad()
                loss_of(model, x, y).backward()
                optimizer.step()
        return seen.dataset

    with pytest.warns(CurvlabWarning, match=r"parameters 0\.weight, 0\.bias of the model are"):
        found = loop(lambda model: model[0].requires_grad_(True))
    assert found.sizes["step"] == 4
    assert float(found["optimizer_gradient_cosine"].min()) > 1 - 1e-12

    def replace(model: Any) -> None:
        model[2].weight = nn.Parameter(model[2].weight.detach() * 2)

    found = loop(replace)  # which has the decay of a new one apart too
    assert float(found["optimizer_gradient_cosine"].min()) > 1 - 1e-12
    with (
        pytest.warns(CurvlabWarning, match=r"parameters 2\.weight_orig of the model are trained"),
        pytest.warns(CurvlabWarning, match=r"step 2 is not logged.*no parameter '2\.weight'"),
    ):
        found = loop(lambda model: prune.l1_unstructured(model[2], "weight", amount=0.5))
    assert found.sizes["step"] == 2
