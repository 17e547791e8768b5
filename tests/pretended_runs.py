"""What runs on the pretended device, each in a fork of one prepared process (`Prepared`).

The process must never have gone backward: torch counts the devices at the first time, for good.
"""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed.tensor
import torch.fx.experimental.symbolic_shapes  # which autograd asks for: once, before the forks
from forked import forked
from pretend import NAME, Device, pretended
from problems import Problem, batches, problem
from torch import Tensor, nn

import curvlab as cl
from curvlab.algorithms import ALGORITHMS, descent
from curvlab.curvature.block_diagonal import BlockDiagonal
from curvlab.exact.route_table import ROUTES
from curvlab.linalg.products import Product
from curvlab.momentum import Momentum
from curvlab.objective import weights
from curvlab.observation import Transition
from curvlab.optim import displacement, move
from curvlab.probes.base import PROBES, Frame, begin_step, on_host, sample

Found = dict[str, list[tuple[str, str]]]
"""{phase: [(place, why), …]}."""


class Phases:
    """Collects what waits, by phase."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self.found: dict[str, set[tuple[str, str]]] = {}
        device.waits.clear()

    def close(self, phase: str) -> None:
        """What has waited since the last one was of this phase."""
        if phase:  # else it is nobody's
            self.found.setdefault(phase, set()).update(self.device.waits)
        self.device.waits.clear()

    @property
    def lists(self) -> Found:
        return {phase: sorted(some) for phase, some in self.found.items()}


def assert_same(there: Iterable[Tensor], here: Iterable[Tensor], rtol: float = 1e-6) -> None:
    """Numbers of the device are those of the host, but for rounding."""
    for one, other in zip(there, here, strict=True):
        assert one.device.type == NAME
        torch.testing.assert_close(one.cpu(), other, rtol=rtol, atol=1e-9, equal_nan=True)


def placed(to: str, model: str = "tanh") -> Problem:
    """A problem whose model lies there, and whose data lie on the host."""
    p = problem(model)
    p.model.to(to)
    return p


# ---- algorithms

FIRST, LAST = 4, 6
"""Steps of the start, and all."""


def options(name: str) -> dict[str, Any]:
    """Inverses every second step where the document makes them after several, memories of two."""
    entry = ALGORITHMS[name]
    found: dict[str, Any] = {}
    if entry.refresh_every > 1:
        found["refresh_every"] = 2
    if entry.update_every > 1:
        found["update_every"] = 2
    if entry.defaults.get("pairs", 0) > 2:
        found["pairs"] = 2
    return found


def stepped(
    name: str, p: Problem, closed: Callable[[str], None] = lambda phase: None
) -> list[Tensor]:
    """Weights after `LAST` steps of minibatches that lie on the host; `closed` is told of phases.

    "start": the warm start and the first steps, which look at the form and fill memories;
    "closure": a minibatch goes over; "refresh": a step that makes inverses, where not every one
    does; "step": any other.
    """
    objective = p.objective()
    optimizer = cl.optimizer(name, objective, lr=1e-3, **options(name))
    made: list[None] = []

    def refresh(self: BlockDiagonal, original: Callable[..., None] = BlockDiagonal.refresh) -> None:
        made.append(None)
        original(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BlockDiagonal, "refresh", refresh)
        optimizer.warm_start([(p.x, p.y)])
        for i, (x, y) in enumerate(batches(p, LAST)):
            closed("start")
            closure = objective.closure(x, y)
            closed("closure")
            made.clear()
            optimizer.step(closure)
            apart = bool(made) and "refresh_every" in options(name)
            closed("start" if i < FIRST else "refresh" if apart else "step")
    return weights(objective)


def steps(device: Device, name: str, model: str = "tanh", fault: str = "") -> Found:
    """What waits in the steps of an algorithm; the weights are those of the host, or it fails."""
    p = placed(NAME, model)
    phases = Phases(device)
    with pytest.MonkeyPatch.context() as patch:
        if fault:
            _through(patch, FAULTS[fault][0])
        there = stepped(name, p, phases.close)
    assert_same(there, stepped(name, placed("cpu", model)))
    return phases.lists


def _through(patch: pytest.MonkeyPatch, fault: Callable[[Tensor], Tensor]) -> None:
    """Let every gradient that the momentum is made of go through a fault."""
    original = Momentum.__call__

    def call(self: Momentum, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return original(self, {name: fault(g) for name, g in gradients.items()})

    call.__code__ = call.__code__.replace(co_filename=original.__code__.co_filename)
    patch.setattr(Momentum, "__call__", call)


def _item(g: Tensor) -> Tensor:
    return g if g.sum().item() else g.clone()


def _truth(g: Tensor) -> Tensor:
    return g if g.sum() else g.clone()


def _to_host(g: Tensor) -> Tensor:
    return g + float(g.cpu()[(0,) * g.ndim]) * 0


def _mask(g: Tensor) -> Tensor:
    return g + g[g > 0].sum() * 0


def _cholesky(g: Tensor) -> Tensor:
    eye = torch.eye(len(g), dtype=g.dtype, device=g.device)
    return g + torch.linalg.cholesky(eye).sum() * 0


def _list(g: Tensor) -> Tensor:
    return g + torch.tensor([0.0], dtype=g.dtype, device=g.device)


def _factory(g: Tensor) -> Tensor:
    return g + torch.zeros(g.shape, dtype=g.dtype)


def _product(g: Tensor) -> Tensor:
    return g + g @ torch.zeros(g.shape[-1], 1, dtype=g.dtype)


def _generator(g: Tensor) -> Tensor:
    return g + torch.empty_like(g).normal_(generator=torch.Generator().manual_seed(5)) * 0


FAULTS: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "item": (_item, ""),
    "truth": (_truth, ""),
    "to the host": (_to_host, ""),
    "mask": (_mask, ""),
    "cholesky": (_cholesky, ""),
    "list": (_list, ""),
    "factory": (_factory, "MixedDevices: add of "),
    "product": (_product, "MixedDevices: mm of "),
    "generator": (_generator, "MixedDevices: normal_ on gpu with a generator of the host"),
}
"""{kind of fault: (what a gradient goes through, the error; empty of what waits)}."""


# ---- the oracle


def looked(p: Problem, kind: str) -> list[Tensor]:
    """Every matrix of a kind, and what is computed of it."""
    objective, (known, unit) = p.objective(), of_kind(kind)
    blocks = objective.blocks
    first, last, ways = blocks[0].name, blocks[-1].name, ["auto", *ROUTES]
    found = []
    for route in ways[:1] if unit else ways:
        try:
            m = cl.exact.matrix(objective, p.x, p.y, known, last, route=route, **unit)
        except cl.CurvlabError as error:
            if "does not fit" not in str(error):
                raise
        else:
            found.append(m.dense())
    some = (None, (first, last), blocks[0].params[0])
    found += [cl.exact.matrix(objective, p.x, p.y, known, b, **unit).dense() for b in some]
    each = cl.exact.matrices(objective, p.x, p.y, known, **unit)
    found += [m.dense() for m in each.values()]
    cl.exact.routes(objective, p.x, p.y, known, **unit)
    whole = cl.exact.product(objective, p.x, p.y, known, **unit)
    across = cl.exact.product(objective, p.x, p.y, known, (first, last), **unit)
    for operator in (whole, across):
        ones = torch.ones(operator.shape[1], dtype=objective.dtype, device=objective.device)
        found.append(operator @ ones)
    assert isinstance(whole, Product)
    found += [whole.diag(), cl.exact.diagonal(objective, p.x, p.y, known, **unit)]
    found.append(cl.exact.kronecker_terms(objective, p.x, p.y, known, last, **unit).dense())
    return found


def of_symbols(p: Problem, kind: str) -> list[Tensor]:
    """An embedding's block on the symbols that occur."""
    objective, (known, unit) = p.objective(), of_kind(kind)
    name = objective.blocks[0].name
    found = cl.exact.occurring(objective, p.x, p.y, known, name, **unit)
    return [found.matrix.dense(), found.symbols, found.entries]


def of_kind(kind: str) -> tuple[Any, dict[str, Any]]:
    """A kind and the options that make it."""
    return ("ef", {"unit": "token"}) if kind == "ef-token" else (kind, {})


def exact(device: Device, kind: str) -> Found:
    """What waits in the matrices of a kind; their numbers are the host's, or it fails."""
    here = looked(placed("cpu"), kind) + of_symbols(placed("cpu", "embedding"), kind)
    linear, words = placed(NAME), placed(NAME, "embedding")
    phases = Phases(device)
    there = looked(linear, kind) + of_symbols(words, kind)
    phases.close("matrices")
    assert_same(there, here)
    return phases.lists


def of_samples(p: Problem, closed: Callable[[str], None] = lambda phase: None) -> list[Tensor]:
    """Gradients and Jacobians of single examples."""
    objective = p.objective()
    found = list(cl.exact.gradients(objective, p.x, p.y).values())
    closed("gradients")
    found += cl.exact.jacobians(objective, p.x).values()
    closed("jacobians")
    return found


def samples(device: Device) -> Found:
    """What waits in gradients and Jacobians of single examples."""
    p = placed(NAME)
    phases = Phases(device)
    there = of_samples(p, phases.close)
    assert_same(there, of_samples(placed("cpu")))
    return phases.lists


# ---- probes, and watch

MEMBERS = ("sgd-m", "k-bfgs", "block-hessian")
"""Of each kind of method that some probe sees: factors, pairs, a shift."""


def measured(
    name: str, p: Problem, closed: Callable[[str], None] = lambda phase: None
) -> list[Tensor]:
    """What a probe measures in two steps of a comparison of `MEMBERS`.

    Its places are apart from those of the comparison: where it measures, before the move or after
    it, and where the values are gathered.
    """
    objective, one = p.objective(), PROBES[name]
    descents = {n: descent(n, objective) for n in MEMBERS}
    curvatures = {n: d.curvature for n, d in descents.items()}
    assert any(map(one.fits, curvatures.values()))
    needs = one.needs.union(*(d.needs | d.step_needs for d in descents.values()))
    found = []
    for step, (x, y) in enumerate(batches(p, 2)):
        closed("")
        begin_step([name], curvatures)
        closed("measure")
        now = objective.closure(x, y).observe(needs)
        directions = {n: d.direction(now) for n, d in descents.items()}
        seconds = dict.fromkeys(MEMBERS, 0.0)
        frame = Frame(step, now, directions, MEMBERS[0], 1e-3, seconds, curvatures)
        closed("")
        seen = sample([name], frame, "before")
        closed("measure")
        move(objective, directions[MEMBERS[0]], lambda _: 1e-3)
        wanted = frozenset[Any]().union(*(d.step_needs for d in descents.values()))
        after = now.closure.observe(wanted, move_buffers=False)
        moved = partial(displacement, objective, directions[MEMBERS[0]], lambda _: 1e-3)
        for d in descents.values():
            if d.wants_step:
                d.learn(Transition(now, after, moved))
        closed("")
        seen |= sample([name], frame, "after")
        closed("measure")
        found += [on_host(v) for v in seen[name].values()]
        closed("gather")
    return [torch.as_tensor(values).to(objective.device) for values in found]


def probe(device: Device, name: str) -> Found:
    """What waits in a probe; what it measures is the host's, or it fails."""
    p = placed(NAME)
    phases = Phases(device)
    there = measured(name, p, phases.close)
    # bytes: what is a number of Python's on the host is a tensor on the device
    rtol = 0.05 if name == "memory" else 1e-6
    assert_same(there, measured(name, placed("cpu")), rtol)
    return phases.lists


class Plain(torch.optim.Optimizer):
    """W ← W − α ∂ℓ/∂W: torch's own would import its compiler, for seconds."""

    def __init__(self, params: Iterable[nn.Parameter]) -> None:
        super().__init__(params, {"lr": 1e-2})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # without one
        for p in self.param_groups[0]["params"]:
            p.add_(p.grad, alpha=-1e-2)


def loop(p: Problem, closed: Callable[[str], None] = lambda phase: None) -> list[Tensor]:
    """A loop of one's own with a watch that samples every second step; minibatches lie there."""
    optimizer = Plain(p.model.parameters())
    to = p.objective().device
    loader = [(x.to(to), y.to(to)) for x, y in batches(p, 4)]
    closed("")
    with cl.watch(p.model, p.likelihood, optimizer, algorithms=["kfac", "k-bfgs"], every=2) as seen:
        for i, (x, y) in enumerate(seen(loader)):
            optimizer.zero_grad()
            nn.functional.cross_entropy(p.model(x), y).backward()
            optimizer.step()
            closed("step" if i % 2 else "sample")
    closed("end")
    cosines = torch.as_tensor(seen.dataset["cosine"].values)
    return [*p.model.parameters(), cosines.to(to)]


def watch(device: Device) -> Found:
    """What waits in a loop that is watched; weights and log are those of the host, or it fails."""
    p = placed(NAME)
    phases = Phases(device)
    there = loop(p, phases.close)
    assert_same(there, loop(placed("cpu")))
    return phases.lists


# ---- the process

RUNS: dict[str, Callable[..., Found]] = {
    run.__name__: run for run in (steps, exact, samples, probe, watch)
}


class Prepared:
    """A process that has imported everything and gone backward never: what is asked of it runs in
    a fork of it.
    """

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            encoding="utf-8",
        )

    def __call__(self, run: str, *args: str) -> Found:
        """What the function of that name in `RUNS` finds.

        Raises:
            AssertionError: it failed, with what it said.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps([run, *args]) + "\n")
        self._process.stdin.flush()
        code, said = json.loads(self._process.stdout.readline())
        assert code == 0, said[-9000:]
        found: Found = json.loads(said.splitlines()[-1])
        return found

    def close(self) -> None:
        """End the process."""
        self._process.communicate()


def _serve() -> None:
    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()  # a fork then shares what is there
    gc.disable()
    for part in vars(torch.optim.Optimizer).values():
        # else the first optimizer imports torch's compiler, for seconds
        raw = getattr(part, "__wrapped__", None)
        if raw is not None:
            raw.__dynamo_disable = raw
    for line in sys.stdin:
        run, *args = json.loads(line)

        def work(run: str = run, args: list[str] = args) -> None:
            with pretended() as device:
                print("\n" + json.dumps(RUNS[run](device, *args)))

        print(json.dumps(forked(work)), flush=True)


if __name__ == "__main__":
    _serve()
