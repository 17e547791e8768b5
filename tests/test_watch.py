"""`curvlab.watch`: a loop that is not ours is looked at, and no bit of it changes."""

from __future__ import annotations

import copy
import json
import os
import pickle
import random
import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from forked import forked
from problems import normal
from test_reused_buffers import OneBuffer
from torch import Tensor, nn

import curvlab as cl
from curvlab.errors import CurvlabError, CurvlabWarning
from curvlab.show import figures
from curvlab.system import random_state

Loader = Iterable[Any]
Loop = Callable[[nn.Module, Loader, "Watch"], None]
Watch = Callable[..., Any]
CPU = torch.device("cpu")


def mlp(seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """With all that a forward pass may leave behind: buffers, and random numbers used up."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.3), nn.Linear(8, 3)
        ).to(dtype)


def plain(seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def minibatches(count: int = 5, size: int = 12) -> list[tuple[Tensor, Tensor]]:
    return [(normal(size, 6, seed=i), torch.arange(size).add(i).remainder(3)) for i in range(count)]


def loss_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return nn.functional.cross_entropy(model(x), y)


# ---- the loops: each takes watch(model, optimizers, **options), and calls what it gives


def plain_loop(model: nn.Module, data: Loader, watch: Watch) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=20)
    with watch(model, optimizer) as seen:
        for x, y in seen(data):
            optimizer.zero_grad()
            loss_of(model, x, y).backward()
            optimizer.step()
            schedule.step()


def accumulating_loop(model: nn.Module, data: Loader, watch: Watch) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)
    with watch(model, optimizer) as seen:
        for i, (x, y) in enumerate(seen(data)):
            (loss_of(model, x, y) / 2).backward()
            if i % 2:
                nn.utils.clip_grad_norm_(model.parameters(), 0.05)
                optimizer.step()
                optimizer.zero_grad()


def two_optimizer_loop(model: nn.Module, data: Loader, watch: Watch) -> None:
    matrices = [p for p in model.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if p.ndim != 2]
    optimizers = [torch.optim.Muon(matrices, lr=0.02), torch.optim.AdamW(others, lr=1e-3)]
    with watch(model, optimizers) as seen:
        for x, y in data:
            with seen.batch(x, y):
                loss_of(model, x, y).backward()
                for optimizer in optimizers:
                    optimizer.step()
                    optimizer.zero_grad()


def closure_loop(model: nn.Module, data: Loader, watch: Watch) -> None:
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.5, max_iter=3)
    with watch(model, optimizer) as seen:
        for x, y in seen(data):

            def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
                optimizer.zero_grad()
                loss = loss_of(model, x, y)
                loss.backward()
                return loss

            optimizer.step(closure)


def compiled_loop(model: nn.Module, data: Loader, watch: Watch) -> None:
    compiled: Any = torch.compile(model, backend="eager")
    optimizer = torch.optim.Adam(compiled.parameters(), lr=1e-2)
    with watch(compiled, optimizer) as seen:
        for x, y in seen(data):
            optimizer.zero_grad()
            loss_of(compiled, x, y).backward()
            optimizer.step()


def autocast_loop(model: nn.Module, data: Loader, watch: Watch) -> None:
    model.float()
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with watch(model, optimizer) as seen:
        for x, y in seen(data):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                loss = loss_of(model, x.float(), y)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()


def prefetching_loop(model: nn.Module, data: Loader, watch: Watch) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with watch(model, optimizer) as seen:
        coming = iter(seen(data))
        batch = next(coming)
        while batch is not None:
            (x, y), batch = batch, next(coming, None)
            optimizer.zero_grad()
            loss_of(model, x.clone(), y).backward()
            optimizer.step()


def loop_by_parts(model: nn.Module, data: Loader, watch: Watch) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with watch(model, optimizer) as seen:
        for x, y in seen(data):
            optimizer.zero_grad()
            for part, labels in zip(x.split(4), y.split(4), strict=True):
                (loss_of(model, part, labels) * (len(part) / len(x))).backward()
            optimizer.step()


LOOPS: dict[str, Loop] = {
    "plain": plain_loop,
    "accumulation and clipping": accumulating_loop,
    "two optimizers": two_optimizer_loop,
    "closure": closure_loop,
    "compiled": compiled_loop,
    "autocast": autocast_loop,
    "prefetching": prefetching_loop,
    "by parts": loop_by_parts,
}


class Nobody:
    """What stands in the place of a watch where there is none."""

    def __enter__(self) -> Nobody:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def __call__(self, loader: Loader) -> Loader:
        return loader

    def batch(self, x: Any, y: Any = None) -> Any:
        return nullcontext()


def unwatched(model: nn.Module, optimizers: Any, **options: Any) -> Any:
    return Nobody()


class Opened:
    """Opens watches, and keeps the last."""

    def __init__(self, **options: Any) -> None:
        self.options = options
        self.last: Any = None

    def __call__(self, model: nn.Module, optimizers: Any) -> Any:
        options: dict[str, Any] = {"algorithms": ["kfac", "sgd-m"], **self.options}
        self.last = cl.watch(model, cl.likelihoods.Categorical(), optimizers, **options)
        return self.last


def left(loop: Loop, watch: Watch, dropout: float = 0.3) -> dict[str, Any]:
    """All that a loop leaves: weights, buffers, gradients, modes, generators."""
    model = mlp()
    model[3].p = dropout  # type: ignore[assignment]
    with random_state.kept(CPU):
        random_state.seed(7)
        loop(model, minibatches(), watch)
        after = torch.rand(3), random.random(), float(np.random.rand())  # noqa: NPY002
    return {
        "state": model.state_dict(),
        "grads": {n: p.grad for n, p in model.named_parameters()},
        "modes": [m.training for m in model.modules()],
        "hooks": [len(m._forward_pre_hooks) for m in model.modules()],
        "chance": after,
    }


def same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


@pytest.mark.parametrize("name", LOOPS)
@pytest.mark.filterwarnings(
    "ignore:batch norm in training mode",
    "ignore:the minibatches of a step",
    "ignore:parameters of layers without a rule",
)
def test_a_watched_loop_is_the_unwatched_one_to_the_bit(name: str) -> None:
    alone = left(LOOPS[name], unwatched)
    opened = Opened(every=2, probes=["condition:2"] if name == "closure" else [])
    found = left(LOOPS[name], opened)
    for key, value in alone.items():
        assert same(value, found[key]), key
    assert opened.last.looker.samples >= 1
    assert (opened.last.dataset["step"] % 2 == 0).all()


@pytest.mark.filterwarnings("ignore:batch norm in training mode", "ignore:parameters of layers")
def test_probes_that_run_the_model_change_no_bit() -> None:
    opened = Opened(algorithms=["kfac", "k-bfgs"], probes=["spectrum:2", "reduction:2"])
    alone = left(plain_loop, unwatched, dropout=0.0)
    found = left(plain_loop, opened, dropout=0.0)
    for key, value in alone.items():
        assert same(value, found[key]), key
    assert opened.last.dataset.sizes["spectrum_step"] == 3


# ---- what is logged


@pytest.mark.parametrize("every", [1, 2, 3])
@pytest.mark.parametrize("loop", [prefetching_loop, loop_by_parts])
def test_what_the_model_is_called_on_says_which_minibatch_a_step_is_of(
    loop: Loop, every: int
) -> None:
    """The log is that of the plain loop, which takes the same steps."""
    opened, model = Opened(every=every), plain()
    loop(model, minibatches(), opened)
    other = plain()
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    expected = watched(other, optimizer=optimizer, algorithms=["kfac", "sgd-m"], every=every)
    sgd_loop(other, expected, optimizer, minibatches())
    found = opened.last.dataset
    assert found["step"].values.tolist() == list(range(0, 5, every))
    for name in ("gram", "loss", "optimizer_gradient_cosine", "minibatches"):
        np.testing.assert_allclose(found[name], expected.dataset[name], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("reused", [False, True])
def test_a_second_call_on_a_minibatch_is_no_second_minibatch(reused: bool) -> None:
    """Also where a loader writes over the one that the last step was on."""
    model = plain()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    seen = watched(model, optimizer=optimizer, every=2)
    data = minibatches()
    with seen:
        for x, y in seen(OneBuffer(data) if reused else data):
            optimizer.zero_grad()
            ((loss_of(model, x, y) + loss_of(model, x, y)) / 2).backward()
            optimizer.step()
    ds = seen.dataset
    assert ds["minibatches"].values.tolist() == [1, 1, 1]
    assert ds.attrs["skipped_steps"] == 0
    np.testing.assert_allclose(ds["optimizer_gradient_cosine"], 1, rtol=1e-12)


def test_minibatches_that_come_all_at_once_are_said() -> None:
    model = plain()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    seen = watched(model, optimizer=optimizer)

    def train() -> None:
        with seen:
            for x, y in list(seen(minibatches(8))):
                optimizer.zero_grad()
                loss_of(model, x, y).backward()
                optimizer.step()

    with pytest.warns(CurvlabWarning, match="handed its minibatch long before, or not at all"):
        train()
    cosine = seen.dataset["optimizer_gradient_cosine"]
    np.testing.assert_allclose(cosine, 1, rtol=1e-12)
    assert cosine.sizes["step"] < 8


def sgd_loop(model: nn.Module, seen: Any, optimizer: torch.optim.Optimizer, data: Loader) -> None:
    with seen:
        for x, y in seen(data):
            optimizer.zero_grad()
            loss_of(model, x, y).backward()
            optimizer.step()


ALGORITHMS = ["block-fisher", "kfac", "k-bfgs", "adam"]


def test_the_log_of_a_plain_loop_is_that_of_a_comparison() -> None:
    model, probes = plain(), ["damping", "noise:1", "reduction:2"]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    seen = cl.watch(
        model, cl.likelihoods.Categorical(), optimizer, algorithms=ALGORITHMS, probes=probes
    )
    sgd_loop(model, seen, optimizer, minibatches(3))
    found = seen.dataset
    wanted = cl.compare(
        cl.Objective(plain(), cl.likelihoods.Categorical()),
        minibatches(3),
        reference="sgd-m",
        algorithms=ALGORITHMS,
        lr=0.1,
        momentum=0.0,
        warm=(),
        probes=probes,
    ).dataset
    assert found.attrs["reference"] == "watched"
    for name in wanted.data_vars:
        if name == "damping_of_direction":  # of a watched optimizer it is not known
            np.testing.assert_allclose(found[name][:, 1:], wanted[name][:, 1:], rtol=1e-9)
            assert np.isnan(found[name][:, 0]).all()
        elif name != "seconds":
            np.testing.assert_allclose(found[name], wanted[name], rtol=1e-9, atol=1e-10)
    # what the optimizer was given is the minibatch's own gradient
    np.testing.assert_allclose(found["optimizer_gradient_cosine"], 1, rtol=1e-12)
    np.testing.assert_allclose(
        found["optimizer_gradient_norm"], found["minibatch_gradient_norm"], rtol=1e-12
    )
    assert (found["seconds"].sel(algorithm="watched") > 0).all()


def test_a_look_sees_the_masks_of_the_loop() -> None:
    """Dropout: the own gradient is the loop's only with the loop's own random numbers; the loop
    draws others before."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with cl.watch(model, cl.likelihoods.Categorical(), optimizer, algorithms=["sgd-m"]) as seen:
        for x, y in seen(minibatches()):
            noisy = x + 0.1 * torch.randn_like(x)
            optimizer.zero_grad()
            loss_of(model, noisy, y).backward()
            optimizer.step()
    np.testing.assert_allclose(seen.dataset["optimizer_gradient_cosine"], 1, rtol=1e-12)
    np.testing.assert_allclose(seen.dataset["cosine"].sel(algorithm="sgd-m"), 1, rtol=1e-9)


def test_clipping_and_accumulation_log_both_gradients() -> None:
    model, clip = plain(), 0.05
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    both: list[tuple[list[float], float]] = []
    with cl.watch(model, cl.likelihoods.Categorical(), optimizer, algorithms=["sgd-m"]) as seen:
        for i, (x, y) in enumerate(seen(minibatches(6))):
            (loss_of(model, x, y) / 2).backward()
            if i % 2:
                own = [
                    float(
                        torch.cat(
                            [p.grad.flatten() for p in layer.parameters() if p.grad is not None]
                        ).norm()
                    )
                    for layer in (model[0], model[2])
                ]
                both.append((own, float(nn.utils.clip_grad_norm_(model.parameters(), clip))))
                optimizer.step()
                optimizer.zero_grad()
    ds = seen.dataset
    assert ds["minibatches"].values.tolist() == [2, 2, 2]
    norms = np.array([norms for norms, _ in both])
    np.testing.assert_allclose(ds["minibatch_gradient_norm"], norms, rtol=1e-12)
    factors = clip / (np.array([norm for _, norm in both]) + 1e-6)
    assert (factors < 1).all()
    np.testing.assert_allclose(ds["optimizer_gradient_norm"], norms * factors[:, None], rtol=1e-12)
    np.testing.assert_allclose(ds["optimizer_gradient_cosine"], 1, rtol=1e-12)
    np.testing.assert_allclose(ds["displacement_norm"], 0.1 * norms * factors[:, None], rtol=1e-10)


def test_decoupled_decay_is_apart_and_the_learning_rate_logged() -> None:
    """AdamW with decay moves along Adam's direction and the weights; schedules change the rate."""
    model = plain()
    start = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.5)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    with cl.watch(model, cl.likelihoods.Categorical(), optimizer, algorithms=["sgd-m"]) as seen:
        for x, y in seen(minibatches(2)):
            optimizer.zero_grad()
            loss_of(model, x, y).backward()
            optimizer.step()
            schedule.step()
    ds = seen.dataset
    assert ds["algorithm"].values.tolist() == ["watched", "watched+decay", "sgd-m"]
    np.testing.assert_allclose(ds["learning_rate"], [0.01, 0.005], rtol=1e-15)
    x, y = minibatches(1)[0]
    loss_of(start, x, y).backward()
    layer: Any = start[0]
    g = torch.cat([layer.weight.grad, layer.bias.grad[:, None]], 1)
    w = torch.cat([layer.weight.detach(), layer.bias.detach()[:, None]], 1)
    first = g / (g.abs() + 1e-8)  # Adam's first step
    gram = ds["gram"].isel(step=0, block=0)
    for one, d in (("watched", first), ("watched+decay", first + 0.5 * w)):
        np.testing.assert_allclose(gram.sel(algorithm=one, other=one), d.square().sum(), rtol=1e-9)
        np.testing.assert_allclose(gram.sel(algorithm=one, other="sgd-m"), (d * g).sum(), rtol=1e-9)
    moved = 0.01 * (first + 0.5 * w).norm()
    np.testing.assert_allclose(ds["displacement_norm"].isel(step=0, block=0), moved, rtol=1e-9)


def test_a_warm_up_from_a_rate_of_zero_has_no_direction_at_first_which_is_said() -> None:
    model = plain()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: step / 2)
    watch = cl.watch(model, cl.likelihoods.Categorical(), optimizer, algorithms=["sgd-m"])

    def train() -> None:
        with watch as seen:
            for x, y in seen(minibatches(3)):
                optimizer.zero_grad()
                loss_of(model, x, y).backward()
                optimizer.step()
                schedule.step()

    with pytest.warns(CurvlabWarning, match=r"no direction of watched at some step: it is zero"):
        train()
    cosine = watch.dataset["cosine"].sel(algorithm="sgd-m")
    assert cosine.isel(step=0).isnull().all()
    np.testing.assert_allclose(cosine.isel(step=slice(1, None)), 1, rtol=1e-12)


def test_a_watched_optimizer_is_its_own_shadow() -> None:
    """The same optimizer as a member: two routes to one direction, decay apart in both."""
    model = plain()
    options: dict[str, Any] = {"lr": 0.01, "weight_decay": 0.3}
    optimizer = torch.optim.AdamW(model.parameters(), **options)
    shadow = cl.foreign(torch.optim.AdamW, **options)
    sgd_loop(model, seen := watched(model, optimizer=optimizer, algorithms=[shadow]), optimizer,
             minibatches())  # fmt: skip
    gram = seen.dataset["gram"]
    own = gram.sel(algorithm="watched", other="watched")
    np.testing.assert_allclose(gram.sel(algorithm=shadow, other="watched"), own, rtol=1e-9)
    np.testing.assert_allclose(gram.sel(algorithm=shadow, other=shadow), own, rtol=1e-9)


def test_decay_of_an_optimizer_that_ours_follows_is_apart_too() -> None:
    """AdamW of torch by `cl.optimizer`: watched as AdamW itself, by schedules too."""
    found = []
    for ours in (False, True):
        model = plain()
        objective = cl.Objective(model, cl.likelihoods.Categorical())
        optimizer: Any = (
            cl.optimizer("torch:AdamW", objective, lr=0.01, weight_decay=0.3)
            if ours
            else torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.3)
        )
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        with watched(model, optimizer=optimizer, algorithms=["sgd-m"]) as seen:
            for x, y in seen(minibatches(3)):
                optimizer.zero_grad()
                if ours:
                    optimizer.step(objective.closure(x, y))
                else:
                    loss_of(model, x, y).backward()
                    optimizer.step()
                schedule.step()
        found.append(seen.dataset)
    plainly, followed = found
    assert followed["algorithm"].values.tolist() == ["watched", "watched+decay", "sgd-m"]
    np.testing.assert_allclose(followed["learning_rate"], plainly["learning_rate"], rtol=1e-15)
    np.testing.assert_allclose(followed["gram"], plainly["gram"], rtol=1e-9)


def test_two_optimizers_are_one_step_over_the_first_ones_rate() -> None:
    opened = Opened()
    model = plain()
    before = [p.detach().clone() for p in model.parameters()]
    two_optimizer_loop(model, minibatches(1), opened)
    ds = opened.last.dataset
    assert ds.sizes["step"] == 1
    lengths = [
        float(sum((p.detach() - old).square().sum() for p, old in pairs) ** 0.5)
        for pairs in _by_two(list(zip(model.parameters(), before, strict=True)))
    ]
    np.testing.assert_allclose(ds["displacement_norm"][0], lengths, rtol=1e-12)
    whole = ds["direction_norm"].sel(algorithm="watched+decay").isel(step=0) * 0.02
    np.testing.assert_allclose(whole, lengths, rtol=1e-9)
    assert [o["class"].rpartition(".")[2] for o in json.loads(ds.attrs["optimizers"])] == [
        "Muon",
        "AdamW",
    ]


def _by_two(items: list[Any]) -> Iterator[list[Any]]:
    return (items[i : i + 2] for i in range(0, len(items), 2))


def test_a_step_that_a_scaler_skips_is_not_logged_and_that_is_said() -> None:
    model = plain().float()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    seen = watched(model, optimizer=optimizer)

    def run() -> None:
        with seen:
            for i, (x, y) in enumerate(seen(minibatches(4))):
                optimizer.zero_grad()
                loss = loss_of(model, x.float(), y) * (float("inf") if i == 1 else 1.0)
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update()

    with pytest.warns(CurvlabWarning, match=r"a step was skipped before step 1 .*GradScaler"):
        run()
    ds = seen.dataset
    assert ds["step"].values.tolist() == [0, 1, 2]
    assert (ds["minibatches"] == 1).all()
    assert ds.attrs["skipped_steps"] == 1
    np.testing.assert_allclose(ds["optimizer_gradient_cosine"], 1, rtol=1e-5)


def test_unsampled_steps_keep_nothing_and_figures_take_the_log(tmp_path: Path) -> None:
    model, path = plain(), tmp_path / "run.h5"
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    seen = cl.watch(
        model,
        cl.likelihoods.Categorical(),
        optimizer,
        algorithms=["kfac", "sgd-m"],
        path=path,
        every=2,
        probes=["noise"],
    )
    kept = []
    with seen:
        for x, y in seen(minibatches(5)):
            optimizer.zero_grad()
            loss_of(model, x, y).backward()
            kept.append(len(seen._handed))
            optimizer.step()
    assert kept == [1, 0, 1, 0, 1]
    ds = cl.open(path)
    assert ds["step"].values.tolist() == [0, 2, 4]
    assert ds["noise_step"].values.tolist() == [0]
    assert cl.cosine_to(ds, "kfac").sel(algorithm="kfac").values == pytest.approx(1)
    assert cl.late_cosine(ds).shape == (3, 2)
    assert figures.draw(ds, "cosine").axes[0].lines


@pytest.mark.slow
def test_a_report_takes_the_log(tmp_path: Path) -> None:
    path, model = tmp_path / "run.h5", plain()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sgd_loop(model, watched(model, optimizer=optimizer, path=path), optimizer, minibatches())
    cl.report([path], tmp_path / "report.html")
    assert "watched leads" in (tmp_path / "report.html").read_text()


def test_a_loop_may_reshape_its_inputs_and_copy_its_model() -> None:
    """The inputs are those of the model's call; copies and pickles have no hook."""
    model = plain()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    data = [(x.view(-1, 2, 3), y) for x, y in minibatches(2)]
    with cl.watch(model, cl.likelihoods.Categorical(), optimizer, algorithms=["sgd-m"]) as seen:
        for x, y in seen(data):
            optimizer.zero_grad()
            loss_of(model, x.flatten(1), y).backward()
            optimizer.step()
            for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
                other(x.flatten(1))
    assert seen.dataset.sizes["step"] == 2
    assert len(seen(data)) == 2


@pytest.mark.parametrize("handed", [False, True])
def test_a_loop_may_write_over_its_minibatches(handed: bool) -> None:
    """A step over two minibatches in one buffer, whose inputs are gone before it is taken."""

    def logged(data: Any, over: bool) -> Any:
        model = plain()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with cl.watch(model, cl.likelihoods.Categorical(), optimizer, algorithms=["kfac"]) as seen:
            for i, (x, y) in enumerate(data if handed else seen(data)):
                with seen.batch(x, y) if handed else nullcontext():
                    (loss_of(model, x, y) / 2).backward()
                if over:
                    x.zero_()
                    y.zero_()
                if i % 2:
                    optimizer.step()
                    optimizer.zero_grad()
        return seen.dataset

    wanted = logged(list(minibatches(4)), over=False)
    found = logged(OneBuffer(minibatches(4)), over=True)
    assert wanted.sizes["step"] == 2
    for name in ("cosine", "optimizer_gradient_cosine", "optimizer_gradient_norm"):
        np.testing.assert_array_equal(found[name], wanted[name])
    assert float(found["optimizer_gradient_cosine"].min()) > 1 - 1e-6


def test_our_own_optimizers_and_wrapped_models_are_watched_too() -> None:
    net = plain()
    objective = cl.Objective(net, cl.likelihoods.Categorical())
    optimizer = cl.optimizer("kfac", objective, lr=0.1, momentum=0.0)
    wrapped = nn.DataParallel(net)
    with cl.watch(wrapped, cl.likelihoods.Categorical(), optimizer, algorithms=["kfac"]) as seen:
        for x, y in seen(minibatches(2)):
            optimizer.step(objective.closure(x, y))
    assert seen.dataset["optimizer_gradient_norm"].isnull().all()
    assert seen.dataset.sizes["step"] == 2


# ---- what ends it


def test_the_log_opens_after_a_kill(tmp_path: Path) -> None:
    path, model = tmp_path / "run.h5", plain()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def killed() -> Iterator[tuple[Tensor, Tensor]]:
        yield from minibatches(3)
        os.kill(os.getpid(), signal.SIGKILL)

    def work() -> None:
        sgd_loop(model, watched(model, optimizer=optimizer, path=path), optimizer, killed())

    code, _ = forked(work)
    assert code == -signal.SIGKILL
    ds = cl.open(path)
    assert ds.attrs["reference"] == "watched"
    assert ds.sizes["step"] >= 1
    # the lock of a killed run holds nobody up
    sgd_loop(model, watched(model, optimizer=optimizer, path=path), optimizer, minibatches(2))
    assert cl.open(path)["step"].values.tolist() == [0, 1]


@pytest.mark.parametrize("error", [ValueError("the loop's own"), KeyboardInterrupt()])
def test_an_error_of_the_loop_is_the_loops_own_and_the_log_is_saved(
    tmp_path: Path, error: BaseException
) -> None:
    model, path = plain(), tmp_path / "run.h5"
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    seen = cl.watch(model, cl.likelihoods.Categorical(), optimizer, algorithms=["sgd-m"], path=path)

    def broken() -> Iterator[tuple[Tensor, Tensor]]:
        yield from minibatches(2)
        raise error

    with pytest.raises(type(error)):
        sgd_loop(model, seen, optimizer, broken())
    assert cl.open(path).sizes["step"] == 2
    assert not model._forward_pre_hooks
    assert not optimizer._optimizer_step_pre_hooks


def test_numbers_out_of_range_end_no_training() -> None:
    model = plain()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    data = minibatches(3)
    data[1] = data[1][0] * float("inf"), data[1][1]
    seen = cl.watch(model, cl.likelihoods.Categorical(), optimizer, algorithms=["sgd-m"])
    with pytest.warns(
        CurvlabWarning, match="step 1 is not logged, nor others like it: the inputs contain NaN"
    ):
        sgd_loop(model, seen, optimizer, data)
    assert seen.dataset["step"].values.tolist() == [0]
    assert seen.steps == 3
    assert seen.dataset.attrs["lost_samples"] == 2


# ---- what a user does wrong


def watched(model: nn.Module | None = None, **options: Any) -> Any:
    model = plain() if model is None else model
    options.setdefault("optimizer", torch.optim.SGD(model.parameters(), lr=0.1))
    options.setdefault("likelihood", cl.likelihoods.Categorical())
    options.setdefault("algorithms", ["sgd-m"])
    return cl.watch(model, **options)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"algorithms": ["kfak"]}, "unknown algorithm 'kfak'; did you mean 'kfac'"),
        ({"algorithms": []}, "algorithms must name one at least"),
        ({"algorithms": 3}, "names are wanted, not 3"),
        ({"probes": ["spectra"]}, "unknown probe 'spectra'; did you mean 'spectrum'"),
        ({"probes": ["loss:7"]}, "probe 'loss' is a part of every record"),
        ({"probes": ["damping"], "algorithms": ["kfac"]}, "probe 'damping' needs "),
        ({"path": "/nowhere/run.h5"}, "the log /nowhere/run.h5 cannot be written: there is no"),
        ({"every": "7"}, "every must be a whole number, not '7'"),
        ({"every": 0}, "every must be 1 or more, not 0"),
        ({"damping": -1.0}, "damping must be 0 or positive, not -1"),
        ({"momentum": "much"}, "momentum must be at least 0 and below 1, not 'much'"),
        ({"seed": 1.5}, "the seed must be a whole number, not 1.5"),
        ({"take": 3}, "take must be a function of a minibatch, not 3"),
        ({"tale": 3}, "unknown option of watch 'tale'; did you mean 'take'"),
        ({"evry": 3}, "unknown option of watch 'evry'; did you mean 'every'"),
        ({"optimizer": 3}, "optimizer must be a torch.optim.Optimizer, or a list of them, not 3"),
        ({"optimizer": []}, "there is no optimizer"),
        ({"likelihood": cl.likelihoods.Categorical}, "unknown likelihood"),
    ],
)
def test_what_cannot_be_is_one_line(options: dict[str, Any], line: str) -> None:
    with pytest.raises(CurvlabError) as caught:
        watched(**options)
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)


def test_parameters_that_no_optimizer_has_are_named() -> None:
    model = plain()
    optimizer = torch.optim.SGD(model[0].parameters(), lr=0.1)
    with pytest.raises(CurvlabError, match=r"parameters 2.weight, 2.bias of the model .* in no"):
        watched(model, optimizer=optimizer)


def test_two_watches_at_once_on_one_model_are_refused() -> None:
    model = plain()
    first, second = watched(model), watched(model[0])
    first.__enter__()
    with pytest.raises(CurvlabError, match="is being watched already"):
        second.__enter__()
    with pytest.warns(CurvlabWarning, match="no step"):
        first.__exit__(None, None, None)
    second.__enter__()
    with pytest.warns(CurvlabWarning, match="no step"):
        second.__exit__(None, None, None)


def test_a_watch_without_a_step_or_a_minibatch_says_so() -> None:
    model = plain()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    seen = watched(model, optimizer=optimizer)
    with pytest.warns(CurvlabWarning, match="watch has seen no step of SGD: nothing is logged"):
        sgd_loop(model, seen, optimizer, [])
    with pytest.raises(CurvlabError, match="watch has logged no step yet"):
        _ = seen.dataset
    blind = watched(model, optimizer=optimizer)
    with pytest.warns(CurvlabWarning, match="has seen 2 steps and no minibatch"):
        sgd_loop(model, Blind(blind), optimizer, minibatches(2))
    with pytest.raises(CurvlabError, match="the watch is not open"):
        next(iter(seen(minibatches(1))))
    with pytest.raises(CurvlabError, match="takes the loop's loader, not 5"):
        seen(5)


class Blind(Nobody):
    """Opens a watch, and shows it nothing."""

    def __init__(self, seen: Any) -> None:
        self.seen = seen

    def __enter__(self) -> Blind:
        self.seen.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self.seen.__exit__(*error)


def test_another_loss_than_the_loops_is_said() -> None:
    model = plain()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    seen = watched(model, optimizer=optimizer)
    data = [(x, y.flip(0)) for x, y in minibatches(1)]

    def run() -> None:
        with seen:
            for x, y in seen(data):
                loss_of(model, x, y.add(1).remainder(3)).backward()
                optimizer.step()

    with pytest.warns(CurvlabWarning, match=r"is the likelihood the loop's own loss"):
        run()


def test_data_that_do_not_fit_the_likelihood_are_one_line_at_the_first_look() -> None:
    model = plain()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    seen = watched(model, optimizer=optimizer, take=lambda batch: (batch[0], batch[1][:, None] / 2))
    with pytest.raises(CurvlabError, match="target"):
        sgd_loop(model, seen, optimizer, minibatches(1))
    assert not optimizer._optimizer_step_pre_hooks


@pytest.mark.parametrize("in_place", [False, True])
def test_hooks_of_the_loops_own_act_once(in_place: bool) -> None:
    """A look calls the model, hooks and all, on what the loop has called it on."""

    def shifted(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        return (args[0].add_(1) if in_place else args[0] + 1,)

    model = plain()
    model.register_forward_pre_hook(shifted)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    seen = cl.watch(model, cl.likelihoods.Categorical(), optimizer, algorithms=["k-bfgs"])
    sgd_loop(model, seen, optimizer, [(x.clone(), y) for x, y in minibatches(3)])
    assert float(seen.dataset["optimizer_gradient_cosine"].min()) > 1 - 1e-12
