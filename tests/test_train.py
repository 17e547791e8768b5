"""The training loop through its public call: the same numbers by hand-written loops, budgets, going
on, divergence.
"""

from __future__ import annotations

import json
import math
import random
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import xarray as xr
from problems import batches, curvature_of, dense, problem
from rich.console import Console
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import curvlab as cl
from curvlab import spectrum_run
from curvlab.algorithms import ALGORITHMS
from curvlab.datasets import DATASETS, DataEntry, Dataset
from curvlab.models import MODELS
from curvlab.observation import Stream
from curvlab.probes import PROBES
from curvlab.problem import Problem
from curvlab.show.figures import draw_all
from curvlab.spectra import Plan
from curvlab.system import random_state
from curvlab.training import checkpoint
from curvlab.training import run as training_by_name
from curvlab.training.evaluation import (
    SQUARED,
    SQUARED_SIGMOID,
    WRONG,
    WRONG_SIGN,
    Measure,
    evaluate,
    evaluating,
    in_eval_mode,
    measure_of,
)
from curvlab.training.records import TIMES, TRAINING_VARIABLES
from curvlab.training.settings import Budget, Settings


def data(n: int = 23, seed: int = 0) -> Dataset:
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 5, generator=draw, dtype=torch.float64)
    return Dataset("made", x, torch.randint(3, (n,), generator=draw), "made here")


def net(seed: int = 3, *middle: nn.Module) -> Any:
    """An `nn.Sequential`, of whose parts mypy knows nothing."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(5, 4), *middle, nn.Tanh(), nn.Linear(4, 3)).double()


def objective_of(model: nn.Module) -> cl.Objective:
    return cl.Objective(model, cl.likelihoods.Categorical(), 0)


def same_log(one: xr.Dataset, two: xr.Dataset) -> None:
    """All but times, to the bit."""
    assert set(one.variables) == set(two.variables)
    for name in set(one.variables) - set(TIMES):
        xr.testing.assert_identical(one[name], two[name])


def same_weights(one: nn.Module, two: nn.Module) -> None:
    for (name, p), (other, q) in zip(
        one.state_dict().items(), two.state_dict().items(), strict=True
    ):
        assert name == other
        assert torch.equal(p, q), name


BY_HAND: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "sgd-m": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "adam": lambda p: torch.optim.Adam(p, lr=0.1, betas=(0.9, 0.999), eps=1e-4),
}
BY_HAND_SCHEDULES: dict[
    str, Callable[[torch.optim.Optimizer], torch.optim.lr_scheduler.LRScheduler]
] = {
    "constant": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda epoch: 1.0),
    "step": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda epoch: 0.5 ** (epoch // 2)),
    "cosine": lambda o: torch.optim.lr_scheduler.LambdaLR(
        o, lambda epoch: (1 + math.cos(math.pi * epoch / 5)) / 2
    ),
    "ExponentialLR": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda epoch: 0.8**epoch),
}
OPTIONS = {"step": {"every": 2, "factor": 0.5}, "ExponentialLR": {"gamma": 0.8}}


@pytest.mark.parametrize("schedule", BY_HAND_SCHEDULES)
@pytest.mark.parametrize("algorithm", BY_HAND)
def test_the_same_as_a_loop_around_torchs_optimizer(algorithm: str, schedule: str) -> None:
    """Two routes to weights, rates, losses, errors and norms."""
    model, other, train, test = net(), net(), data(), data(9, 1)
    found = cl.train(
        objective_of(model),
        train.batches(5, epochs=5, seed=2),
        test,
        algorithm=algorithm,
        lr=0.1,
        damping=1e-4,
        schedule=schedule,
        schedule_options=OPTIONS.get(schedule),
    ).dataset
    stepper = BY_HAND[algorithm](list(other.parameters()))
    scheduler = BY_HAND_SCHEDULES[schedule](stepper)
    stream = iter(train.batches(5, epochs=5, seed=2))
    for epoch in range(6):
        at = found.sel(epoch=epoch)
        with torch.no_grad():
            for part, name in ((train, "train"), (test, "val")):
                z = other(part.x)
                assert float(at[f"{name}_loss"]) == pytest.approx(
                    F.cross_entropy(z, part.y).item(), rel=1e-12
                )
                assert float(at[f"{name}_error"]) == pytest.approx(
                    (z.argmax(1) != part.y).double().mean().item(), abs=1e-14
                )
        if epoch == 5:
            break
        losses, gradients, steps, of_layer = [], [], [], []
        for _ in range(4):
            x, y = next(stream)
            stepper.zero_grad()
            loss = F.cross_entropy(other(x), y)
            loss.backward()
            before = torch.cat([p.detach().flatten().clone() for p in other.parameters()])
            gradients.append(
                torch.cat([p.grad.flatten() for p in other.parameters()]).norm().item()
            )
            of_layer.append(
                torch.cat([p.grad.flatten() for p in other[-1].parameters()]).norm().item()
            )
            stepper.step()
            losses.append(loss.item())
            steps.append(
                (torch.cat([p.detach().flatten() for p in other.parameters()]) - before)
                .norm()
                .item()
            )
        at = found.sel(epoch=epoch + 1)
        assert float(at["batch_loss"]) == pytest.approx(np.mean(losses), rel=1e-11)
        assert float(at["gradient_norm"]) == pytest.approx(np.mean(gradients), rel=1e-11)
        assert float(at["step_norm"]) == pytest.approx(np.mean(steps), rel=1e-10)
        assert float(at["gradient_norm_of_block"].sel(block="2")) == pytest.approx(
            np.mean(of_layer), rel=1e-11
        )
        assert float(at["lr"]) == pytest.approx(stepper.param_groups[0]["lr"], rel=1e-12)
        scheduler.step()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-13)


def test_momentum_of_both_kinds_and_decoupled_weight_decay_by_hand() -> None:
    for kind, new in (("add", 1.0), ("average", 0.1)):
        p, q = problem(), problem()
        minibatches = batches(p, 4)
        cl.train(
            p.objective(),
            minibatches,
            algorithm="sgd-m",
            lr=0.1,
            momentum=0.9,
            momentum_kind=kind,
            weight_decay=0.01,
        )
        buffers = [torch.zeros_like(w) for w in q.model.parameters()]
        for x, y in minibatches:
            q.objective().closure(x, y)()
            with torch.no_grad():
                for w, m in zip(q.model.parameters(), buffers, strict=True):
                    m.mul_(0.9).add_(w.grad, alpha=new)
                    w -= 0.1 * (m + 0.01 * w)
        for w, v in zip(p.model.parameters(), q.model.parameters(), strict=True):
            torch.testing.assert_close(w, v, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_algorithm_moves_as_its_optimizer_does_alone_and_logs_finite_numbers(
    algorithm: str,
) -> None:
    model, other, train = net(), net(), data()
    found = cl.train(
        objective_of(model),
        train.batches(8, epochs=2, seed=1),
        train,
        algorithm=algorithm,
        damping=0.1,
    ).dataset
    alone = objective_of(other)
    stepper = cl.optimizer(algorithm, alone, damping=0.1)
    stepper.warm_start(train.batches(8, seed=1))
    for x, y in train.batches(8, epochs=2, seed=1):
        stepper.step(alone.closure(x, y))
    same_weights(model, other)
    assert all(
        np.isfinite(found[name].isel(epoch=slice(1, None), missing_dims="ignore")).all()
        for name in found.data_vars
    )


def test_the_log_has_the_promised_schema(tmp_path: Path) -> None:
    run = cl.train(objective_of(net()), data().batches(5, epochs=2), data(4), folder=tmp_path)
    ds = cl.open(tmp_path)
    xr.testing.assert_identical(ds, run.dataset)
    assert dict(ds.sizes) == {"epoch": 3, "block": 2}
    assert {name: v.dims for name, v in ds.data_vars.items()} == {
        n: ("epoch", *v[0])
        for n, v in TRAINING_VARIABLES.items()
        if not n.endswith("_per_symbol")  # of sequences alone
    }
    assert all({"long_name", "units"} <= v.attrs.keys() for v in ds.variables.values())
    assert (
        ds["train_error"].attrs["long_name"]
        == "fraction of wrong classes over the training examples"
    )
    assert ds["epoch"].values.tolist() == [0, 1, 2]
    assert ds["steps"].values.tolist() == [0, 4, 8]
    assert np.isnan(ds["gradient_norm"][0])
    for name in TIMES:
        assert (np.diff(ds[name]) >= 0).all()
    assert (ds["evaluation_seconds"] > 0).all()
    expected = {
        "model": "Sequential",
        "algorithm": "adam",
        "lr": 1e-4,
        "damping": 1e-4,
        "seed": 0,
        "device": "cpu",
    }
    assert {name: ds.attrs[name] for name in expected} == expected
    assert json.loads(ds.attrs["settings"])["decay"] == 0.999
    assert json.loads(ds.attrs["budget"]) == {"epochs": 2, "steps": None, "seconds": None}
    assert {"versions", "git_commit", "created", "call", "dtype", "threads"} <= ds.attrs.keys()
    assert "stopped" not in ds.attrs
    assert run.figure().axes


def test_errors_of_the_documents() -> None:
    draw = torch.Generator().manual_seed(0)
    z, y = torch.randn(6, 4, generator=draw).double(), torch.rand(6, 4, generator=draw).double()
    assert measure_of(cl.likelihoods.Bernoulli(), 4) is SQUARED_SIGMOID
    assert measure_of(cl.likelihoods.Bernoulli(), 1) is WRONG_SIGN
    assert measure_of(cl.likelihoods.Categorical(), 4) is WRONG
    assert measure_of(cl.likelihoods.Gaussian(), 4) is SQUARED
    assert float(SQUARED_SIGMOID.each(z, y).mean()) == pytest.approx(
        float(((1 / (1 + (-z).exp()) - y) ** 2).mean()), rel=1e-13
    )
    assert float(SQUARED.each(z, y).mean()) == pytest.approx(
        float(((z - y) ** 2).mean()), rel=1e-13
    )
    wrong = sum(float(row.max()) > float(row[2]) for row in z) / 6
    assert float(WRONG.each(z, torch.full((6,), 2)).mean()) == wrong
    ones = torch.ones(6, 1).double()
    assert float(WRONG_SIGN.each(z[:, :1], ones).mean()) == float((z[:, 0] <= 0).double().mean())


def test_evaluation_in_chunks_is_the_whole_and_changes_nothing() -> None:
    """BatchNorm by its running statistics, dropout off; modes, buffers, labels to be drawn and
    generators as they were.
    """
    model = net(3, nn.BatchNorm1d(4), nn.Dropout(0.5))
    model[1].running_mean.normal_(generator=torch.Generator().manual_seed(1))
    model[2].eval()
    objective, examples = objective_of(model), data()
    together = (dense(examples), examples.y)
    before, state, drawn = (
        {k: v.clone() for k, v in model.state_dict().items()},
        objective.state_dict(),
        torch.get_rng_state(),
    )
    found = [
        evaluate(objective, part, error=WRONG, size=size)
        for size in (5, 100)
        for part in (examples, together)
    ]
    found.append(evaluate(objective, list(examples.batches(23)), error=WRONG))
    assert [m.training for m in model] == [True, True, False, True, True]
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert objective.state_dict() == state
    assert torch.equal(torch.get_rng_state(), drawn)
    model.eval()
    z = model(examples.x)
    for loss, error in found:
        assert loss == pytest.approx(F.cross_entropy(z, examples.y).item(), rel=1e-13)
        assert error == pytest.approx((z.argmax(1) != examples.y).double().mean().item(), abs=1e-15)
    first, _ = evaluate(objective, examples, size=4, most=7)
    assert first == pytest.approx(F.cross_entropy(z[:7], examples.y[:7]).item(), rel=1e-13)


# ---- train and eval mode


def test_batch_norm_and_dropout_train_in_train_mode_and_end_as_they_were() -> None:
    model, modes = net(3, nn.BatchNorm1d(4), nn.Dropout(0.5)), []
    model[1].register_forward_hook(lambda module, x, z: modes.append((module.training, len(z))))
    cl.train(objective_of(model), data().batches(5), data(9), algorithm="sgd-m", lr=0.01)
    assert modes == [(False, 2), (False, 23), (False, 9), *[(True, 5)] * 4, (False, 23), (False, 9)]
    assert all(m.training for m in model.modules())
    assert model[1].num_batches_tracked == 4


@pytest.mark.parametrize("algorithm", ["sgd-m", "kfac", "k-bfgs-20"])
def test_a_frozen_norm_stays_as_it_is_and_the_rest_trains(algorithm: str, tmp_path: Path) -> None:
    """As by hand: also after an evaluation, after a checkpoint, and where the run goes on."""
    part = data()
    loader = list(zip(dense(part).split(6), part.y.split(6), strict=True))

    def build() -> Any:
        model = net(
            3, nn.BatchNorm1d(4), nn.Sequential(nn.BatchNorm1d(4, affine=False), nn.Dropout(0.5))
        )
        model[1].eval().requires_grad_(False)
        return model

    model, before = build(), build()
    arguments: dict[str, Any] = {
        "algorithm": algorithm,
        "lr": 0.01,
        "damping": 0.1,
        "folder": tmp_path,
        "validation": part,
    }
    cl.train(objective_of(model), loader, epochs=2, **arguments)
    again = build()
    cl.train(objective_of(again), loader, epochs=3, resume=True, **arguments)
    for trained in (model, again):
        for name, t in trained[1].state_dict().items():
            assert torch.equal(t, before[1].state_dict()[name])
        assert [m.training for m in trained.modules()] == [m.training for m in before.modules()]
    assert [int(m[2][0].num_batches_tracked) for m in (model, again)] == [8, 12]
    if algorithm == "sgd-m":
        torch.manual_seed(0)
        alone, mine = build(), build()
        optimizer = cl.optimizer("sgd-m", objective := objective_of(alone), lr=0.01)
        for x, y in loader * 2:
            optimizer.step(objective.closure(x, y))
        torch.manual_seed(0)
        cl.train(objective_of(mine), loader, epochs=2, algorithm="sgd-m", lr=0.01)
        same_weights(mine, alone)


def test_modes_that_are_set_on_the_way_stay() -> None:
    model = net(3, nn.BatchNorm1d(4), nn.Dropout(0.5))
    seen: list[tuple[bool, bool]] = []

    def freeze(optimizer: torch.optim.Optimizer) -> object:
        return torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda epoch: model[1].train(epoch < 1) and 1.0
        )

    model[1].register_forward_hook(
        lambda module, x, z: seen.append((module.training, model[2].training))
    )
    cl.train(
        objective_of(model),
        data().batches(12),
        data(9),
        algorithm="sgd-m",
        lr=0.01,
        epochs=3,
        schedule=freeze,
    )
    steps, looks = [(True, True)] * 1, [(False, False)] * 2
    assert seen == [
        (False, False),
        *looks,
        *steps,
        *looks,
        (False, True),
        *looks,
        (False, True),
        *looks,
    ]


def test_a_model_all_in_eval_mode_is_trained_so_and_that_is_said() -> None:
    for layer in (nn.BatchNorm1d(4), nn.Dropout(0.5), nn.RReLU()):
        model = net(3, layer).eval()
        with pytest.warns(
            cl.CurvlabWarning,
            match=r"the whole model is in eval mode .*: .*; call model\.train\(\) first",
        ) as said:
            cl.train(objective_of(model), data().batches(5), algorithm="sgd-m", lr=0.01)
        assert len(said) == 1
        assert said[0].filename == __file__
        assert not any(m.training for m in model.modules())
        if isinstance(layer, nn.BatchNorm1d):
            assert layer.num_batches_tracked == 0
        model.train()
        # the remedy: no warning
        cl.train(objective_of(model), data().batches(5), algorithm="sgd-m", lr=0.01)


def test_a_model_for_which_modes_are_the_same_is_trained_without_a_word() -> None:
    norm = partial(nn.BatchNorm1d, 4, track_running_stats=False)
    for middle in (nn.Tanh, partial(nn.Dropout, 0.0), partial(nn.LayerNorm, 4), norm):
        one, two = net(3, middle()), net(3, middle()).eval()
        for model in (one, two):
            cl.train(objective_of(model), data().batches(5), algorithm="sgd-m", lr=0.01)
        same_weights(one, two)


def test_a_run_does_not_go_on_in_other_modes(tmp_path: Path) -> None:
    arguments: dict[str, Any] = {"folder": tmp_path, "algorithm": "sgd-m"}
    model = net(3, nn.BatchNorm1d(4), nn.Dropout(0.5))
    model[1].eval()
    cl.train(objective_of(model), data().batches(5, seed=1), **arguments)
    with pytest.raises(
        cl.CurvlabError, match=r"modules in eval mode \['1'\], not None\): give the same"
    ):
        cl.train(
            objective_of(model.train()),
            data().batches(5, seed=1),
            epochs=2,
            resume=True,
            **arguments,
        )
    model[1].eval()
    cl.train(objective_of(model), data().batches(5, seed=1), epochs=2, resume=True, **arguments)


def test_names_of_modules_in_eval_mode() -> None:
    model: Any = nn.Sequential(
        nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), nn.Linear(2, 2)
    )
    assert in_eval_mode(model) == []
    model[1].eval()
    assert in_eval_mode(model) == ["1"]
    model[1][0].train()
    assert in_eval_mode(model) == ["1", "1.1"]
    model.eval()
    model[2].train()
    assert in_eval_mode(model) == ["the model itself", "0", "1"]
    assert in_eval_mode(model.eval()) == ["all"]


def test_what_a_module_does_when_its_mode_changes_is_undone() -> None:
    """Adapters that are merged into the weights in eval mode; a norm that its parent holds in eval
    mode.
    """

    class Adapted(nn.Linear):
        def __init__(self) -> None:
            super().__init__(4, 4)
            self.more: Tensor
            self.register_buffer("more", torch.ones(4, 4))

        def train(self, mode: bool = True) -> "Adapted":
            if mode != self.training:
                self.weight.data += self.more if not mode else -self.more
            return super().train(mode)

    class Held(nn.Sequential):
        def train(self, mode: bool = True) -> "Held":
            super().train(mode)
            self[1].eval()
            return self

    model = net(3, Adapted().double(), Held(nn.Linear(4, 4), nn.BatchNorm1d(4)).double()).train()
    weight, modes = model[1].weight.detach().clone(), [m.training for m in model.modules()]
    assert not model[2][1].training
    with evaluating(model):
        torch.testing.assert_close(model[1].weight.detach(), weight + 1, rtol=0, atol=1e-15)
        assert not any(m.training for m in model.modules())
    torch.testing.assert_close(model[1].weight.detach(), weight, rtol=0, atol=1e-15)
    assert [m.training for m in model.modules()] == modes


@pytest.mark.parametrize("built", ["in train mode", "in eval mode", "one of them in eval mode"])
def test_a_model_by_name_trains_in_train_mode(
    built: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Also where its function hands it over in eval mode, after an evaluation, and where the run
    goes on.
    """
    seen: list[tuple[bool, bool]] = []

    def build() -> Any:
        model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 3))
        model.train(built != "in eval mode")
        model[2].train(built == "in train mode")
        model[1].register_forward_hook(
            lambda module, x, z: seen.append((module.training, model[2].training))
        )
        return model

    part = Dataset("made", dense(data(20)).float(), data(20).y, "made")
    monkeypatch.setitem(DATASETS, "made", DataEntry("made", lambda: (part, part)))
    monkeypatch.setitem(MODELS, "normed", replace(MODELS["mlp-256-20"], build=build, data="made"))
    wanted = (True, built != "one of them in eval mode")
    for steps in (2, 4):
        named = training_by_name.NamedTraining(
            settings=Settings.of(algorithm="sgd-m", lr=0.01),
            budget=Budget(steps=steps),
            problem=Problem(model="normed"),
            batch_size=10,
            warm=False,
        )
        state = None if steps == 2 else checkpoint.load_state(tmp_path / "checkpoint.pt")
        training: Any = training_by_name.prepare_training(named, {}, state)
        training.into(tmp_path)
        seen.clear()
        training_by_name.run_named(training, Console(stderr=True))
        assert [modes for modes in seen if modes != (False, False)] == [wanted] * 2
        assert training.objective.model[1].num_batches_tracked == steps
    prepared = spectrum_run.prepare_spectra(
        spectrum_run.NamedSpectra(
            problem=Problem(model="normed", dtype="float64"),
            plan=Plan(blocks=("1",)),
            after=(1,),
            samples=9,
            batch_size=10,
        )
    )
    seen.clear()
    spectrum_run.run(prepared, tmp_path / "spectrum.h5", {}, Console(stderr=True))
    assert wanted in seen
    assert (False, False) in seen


# ---- what is evaluated


def test_no_validation_and_a_likelihood_of_ones_own() -> None:
    class Poisson:
        def check(self, z: Tensor, y: Tensor) -> None: ...
        def loss(self, z: Tensor, y: Tensor) -> Tensor:
            return (z.exp() - y * z).sum(1)

        def sample(self, z: Tensor, generator: torch.Generator) -> Tensor:
            return torch.poisson(z.exp(), generator=generator)

        def root(self, z: Tensor) -> Tensor:
            return torch.diag_embed((z / 2).exp()).movedim(1, 0)

    x = data().x
    counts = Dataset("counts", x, torch.ones(23, 3, dtype=torch.float64), "")
    objective = cl.Objective(net(), Poisson())
    ds = cl.train(objective, counts.batches(5), counts).dataset
    assert {"train_loss", "val_loss"} <= set(ds.data_vars)
    assert not {"train_error", "val_error"} & set(ds.data_vars)
    own = Measure("distance", "1", lambda z, y: (z.exp() - y).abs().mean(1))
    ds = cl.train(objective, counts.batches(5), error=own).dataset
    assert {"train_error"} == {n for n in ds.data_vars if str(n).endswith("_error")}
    assert float(ds["train_error"][-1]) == pytest.approx(
        (objective.model(x).exp() - 1).abs().mean().item(), rel=1e-12
    )


# ---- when a run ends


def test_whichever_budget_is_spent_first_and_what_an_epoch_cut_short_says() -> None:
    def run(**budget: Any) -> xr.Dataset:
        return cl.train(objective_of(net()), data().batches(5, seed=1), **budget).dataset

    assert run(epochs=3)["steps"].values.tolist() == [0, 4, 8, 12]
    assert run(epochs=3, steps=8)["epoch"].values.tolist() == [0, 1, 2]
    cut = run(epochs=3, steps=7)
    assert cut["epoch"].values.tolist() == [0, 1, 1.75]
    assert cut["steps"].values.tolist() == [0, 4, 7]
    assert np.isfinite(cut["train_loss"]).all()
    assert run(seconds=1e-9, epochs=3)["steps"].values.tolist() == [0, 1]
    assert run()["steps"].values.tolist() == [0, 4]


def test_evaluated_now_and_then_and_at_the_end() -> None:
    ds = cl.train(
        objective_of(net()), data().batches(5, epochs=5), data(4), evaluate_every=2
    ).dataset
    assert np.isfinite(ds["val_loss"].values).tolist() == [True, False, True, False, True, True]
    assert np.isfinite(ds["batch_loss"].values).tolist() == [False] + [True] * 5
    every = cl.train(objective_of(net()), data().batches(5, epochs=5), data(4)).dataset
    np.testing.assert_array_equal(ds["train_loss"][[0, 2, 4, 5]], every["train_loss"][[0, 2, 4, 5]])


def test_torch_schedulers_by_the_step_and_by_the_loss() -> None:
    def rates(schedule: Callable[[torch.optim.Optimizer], Any], **more: Any) -> list[float]:
        return (
            cl.train(
                objective_of(net()), data().batches(5, epochs=3), schedule=schedule, lr=1.0, **more
            )
            .dataset["lr"]
            .values.tolist()
        )

    linear = lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda k: 1 / (1 + k))  # noqa: E731
    assert rates(linear, schedule_every="step", algorithm="sgd-m") == [1.0, 1 / 5, 1 / 9, 1 / 13]
    plateau = lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(  # noqa: E731
        o, patience=0, threshold=1e9, threshold_mode="abs"
    )
    assert rates(plateau, algorithm="sgd-m")[:3] == [1.0, 1.0, 1.0]
    with pytest.raises(cl.CurvlabError, match="ReduceLROnPlateau reads the loss"):
        rates(plateau, schedule_every="step")


# ---- going on


class Killed(BaseException):
    """In place of SIGKILL: nothing of the loop may catch it."""


def killed_after(steps: int, **arguments: Any) -> None:
    """Train until so many steps are done, then die without a word."""
    objective, count = arguments.pop("objective"), [0]
    real = cl.Objective.closure

    def counting(self: cl.Objective, x: Any, y: Any = None, stream: Stream = "step") -> object:
        if stream == "step":
            if count[0] == steps:
                raise Killed
            count[0] += 1
        return real(self, x, y, stream)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cl.Objective, "closure", counting)
        with pytest.raises(Killed):
            cl.train(objective, **arguments)


def loader() -> DataLoader[Any]:
    """Shuffled by the global generator."""
    part = data()
    return DataLoader(
        TensorDataset(dense(part), part.y), batch_size=5, shuffle=True, drop_last=True
    )


KINDS: dict[str, Callable[[], Any]] = {
    "data set": lambda: data().batches(5, seed=1),
    "loader": loader,
    "list": lambda: list(data().batches(5, seed=1)),
}


Cuts = list[tuple[int, float]]
"""[(steps before the end, seconds between checkpoints)]: after every step, or at epochs' ends
alone.
"""
EVERYWHERE: Cuts = [(steps, seconds) for steps in (0, 3, 4, 9) for seconds in (1e-9, 60.0)]


@pytest.mark.thinned(2)
@pytest.mark.parametrize(
    ("algorithm", "kind", "cuts"),
    [
        pytest.param("k-bfgs-20", "loader", EVERYWHERE, id="k-bfgs-20-loader"),
        pytest.param("k-bfgs-20", "data set", [(3, 60.0), (9, 1e-9)], id="k-bfgs-20-data set"),
        pytest.param("kfac", "data set", [(0, 60.0), (4, 1e-9), (9, 60.0)], id="kfac-data set"),
        pytest.param("adam", "list", [(3, 1e-9), (4, 60.0)], id="adam-list"),
        *(
            pytest.param(
                *case, EVERYWHERE, marks=pytest.mark.slow, id=f"{case[0]}-{case[1]}-everywhere"
            )
            for case in (("k-bfgs-20", "data set"), ("kfac", "data set"), ("adam", "list"))
        ),
    ],
)
def test_it_goes_on_bit_for_bit_wherever_it_was_cut(
    algorithm: str, kind: str, cuts: Cuts, tmp_path: Path
) -> None:
    """With dropout and batch norm, sampled labels, a schedule."""

    def build() -> Any:
        torch.manual_seed(5)
        return net(3, nn.BatchNorm1d(4), nn.Dropout(0.3))

    more: dict[str, Any] = {
        "validation": data(6),
        "algorithm": algorithm,
        "epochs": 3,
        "lr": 0.05,
        "damping": 0.3,
        "refresh_every": 3,
        "schedule": "step",
        "schedule_options": {"every": 1, "factor": 0.7},
        "evaluate_every": 2,
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", cl.CurvlabWarning)
        whole = build()
        expected = cl.train(objective_of(whole), KINDS[kind](), **more).dataset
        for steps, seconds in cuts:
            folder = tmp_path / f"{steps} {seconds}"
            arguments: dict[str, Any] = more | {"folder": folder, "checkpoint_seconds": seconds}
            killed_after(steps, objective=objective_of(build()), batches=KINDS[kind](), **arguments)
            assert torch.load(folder / "checkpoint.pt", weights_only=True)["position"]["steps"] == (
                steps if seconds < 1 else steps // 4 * 4
            )
            model = net(99, nn.BatchNorm1d(4), nn.Dropout(0.3))
            torch.manual_seed(77)
            run = cl.train(objective_of(model), KINDS[kind](), resume=True, **arguments)
            same_weights(model, whole)
            same_log(run.dataset, expected)
            same_log(cl.open(folder), expected)
            assert len(json.loads(run.dataset.attrs["resumed"])) == 1


class Depth(nn.Module):
    """A layer that is left out now and then, by one of the global generators."""

    def __init__(self, draw: Callable[[], float]) -> None:
        super().__init__()
        self.layer, self.draw = nn.Linear(4, 4), draw

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layer(x) * (0.5 + self.draw()) if self.training else x + self.layer(x)


class Shifted(TensorDataset):
    """Examples shifted by numbers of one of the global generators."""

    draw: Callable[[], float]

    def __getitem__(self, n: int) -> tuple[Tensor, ...]:
        x, y = super().__getitem__(n)
        return x + self.draw(), y


@pytest.mark.thinned(2)
@pytest.mark.parametrize(
    "draw",
    [random.random, np.random.randn, lambda: float(torch.rand(()))],
    ids=["random", "numpy", "torch"],
)
def test_it_goes_on_bit_for_bit_whoever_draws(draw: Callable[[], float], tmp_path: Path) -> None:
    """In the model and in the loader: Python's generator, numpy's (the second of two normal numbers
    too), torch's.
    """

    def loader() -> DataLoader[Any]:
        made = Shifted(dense(data()), data().y)
        made.draw = draw
        return DataLoader(made, batch_size=5, shuffle=True)

    def build() -> Any:
        random_state.seed(5)
        return net(3, Depth(draw).double())

    more: dict[str, Any] = {
        "algorithm": "k-bfgs-20",
        "epochs": 2,
        "lr": 0.05,
        "damping": 0.3,
        "warm": (),
        "evaluate_every": 2,
    }
    with random_state.kept(torch.device("cpu")):
        whole = build()
        expected = cl.train(objective_of(whole), loader(), **more).dataset
        for steps in (2, 5):  # after an even and an odd number of draws
            folder = tmp_path / str(steps)
            arguments: dict[str, Any] = more | {"folder": folder, "checkpoint_seconds": 1e-9}
            killed_after(steps, objective=objective_of(build()), batches=loader(), **arguments)
            model = build()
            random_state.seed(77)
            run = cl.train(objective_of(model), loader(), resume=True, **arguments)
            same_weights(model, whole)
            same_log(run.dataset, expected)


def test_checkpoints_that_hold_torchs_generators_alone(tmp_path: Path) -> None:
    arguments: dict[str, Any] = {"algorithm": "sgd-m", "folder": tmp_path}
    model, again = net(3, nn.Dropout(0.5)), net(3, nn.Dropout(0.5))
    cl.train(objective_of(model), data().batches(5, seed=1), epochs=1, **arguments)
    state = checkpoint.load_state(tmp_path / "checkpoint.pt")
    state["chance"] = {when: found["torch"] for when, found in state["chance"].items()}
    del state["format"]
    checkpoint.save(tmp_path / "checkpoint.pt", state)
    cl.train(objective_of(again), data().batches(5, seed=1), epochs=2, resume=True, **arguments)


def test_a_longer_run_drops_the_record_of_the_epoch_that_was_cut_short(tmp_path: Path) -> None:
    whole, model, again = net(), net(), net(8)
    expected = cl.train(objective_of(whole), data().batches(5, seed=1), epochs=3).dataset
    cut = cl.train(
        objective_of(model), data().batches(5, seed=1), epochs=3, steps=6, folder=tmp_path
    )
    assert cut.dataset["epoch"].values.tolist() == [0, 1, 1.5]
    same_log(
        cl.train(
            objective_of(again),
            data().batches(5, seed=1),
            epochs=3,
            steps=6,
            folder=tmp_path,
            resume=True,
        ).dataset,
        cut.dataset,
    )
    run = cl.train(
        objective_of(again), data().batches(5, seed=1), epochs=3, folder=tmp_path, resume=True
    )
    same_log(run.dataset, expected)
    same_weights(again, whole)
    assert len(json.loads(run.dataset.attrs["resumed"])) == 2


def test_settings_are_kept_as_one_mapping_of_the_names_that_they_always_had() -> None:
    kept = Settings.of(schedule="step", schedule_options={"every": 3}, evaluate_samples=7).plain()
    assert list(kept) == [
        "algorithm", "lr", "damping", "momentum", "momentum_kind", "weight_decay", "decay",
        "labels", "update_every", "refresh_every", "own", "schedule", "schedule_every",
        "schedule_options", "evaluate_every", "evaluate_samples", "double_grad",
    ]  # fmt: skip
    assert sorted(kept) == sorted(Settings.names())
    assert Settings.of(**kept).plain() == kept
    with pytest.raises(TypeError, match="'epochs' is no setting of a run"):
        Settings.of(epochs=3)


def test_other_settings_are_refused_by_name(tmp_path: Path) -> None:
    cl.train(objective_of(net()), data().batches(5, seed=1), lr=0.1, folder=tmp_path)

    def refused(says: str, size: int = 5, model: nn.Module | None = None, **change: Any) -> None:
        arguments: dict[str, Any] = {"lr": 0.1, "folder": tmp_path, "resume": True} | change
        with pytest.raises(cl.CurvlabError, match=says):
            cl.train(objective_of(model or net()), data().batches(size, seed=1), **arguments)

    refused(r"other settings \(lr 0\.1, not 0\.2\): give the same", lr=0.2)
    refused("algorithm adam, not sgd-m", algorithm="sgd-m")
    refused("batches of 5, seed 1, not made, batches of 6", size=6)
    refused("parameters", model=nn.Linear(5, 3).double())
    refused("schedule constant, not cosine.*epochs None, not 4", schedule="cosine", epochs=4)
    refused("already holds a run.h5", resume=False)
    refused("no checkpoint at", folder=tmp_path / "absent")
    assert not (tmp_path / "absent").exists()
    refused("resume needs a folder", folder=None)


# ---- divergence


def fragile() -> Any:
    """Two linear layers: weights of 1e300 make outputs of Inf, where a tanh between them would
    not.
    """
    model = net()
    return nn.Sequential(model[0], model[2])


@pytest.mark.parametrize("algorithm", ["sgd-m", "k-bfgs-20", "tnt"])
@pytest.mark.parametrize("kept", [True, False])
def test_divergence_ends_the_run_and_keeps_the_last_good_state(
    algorithm: str, kept: bool, tmp_path: Path
) -> None:
    """The schedule multiplies the rate by 1e300 after epoch 2: the weights go to infinity in epoch
    3.
    """
    model, folder = fragile(), tmp_path if kept else None
    blow: dict[str, Any] = {
        "schedule": lambda o: torch.optim.lr_scheduler.LambdaLR(
            o, lambda e: 1.0 if e < 2 else 1e300
        )
    }
    arguments: dict[str, Any] = {
        "algorithm": algorithm,
        "lr": 1e-3,
        "damping": 0.3,
        "folder": folder,
    }
    with pytest.warns(cl.CurvlabWarning, match="diverged in epoch 3") as caught:
        run = cl.train(
            objective_of(model), data().batches(5, seed=1), epochs=5, **arguments, **blow
        )
    assert "the last good state, kept, is epoch 2" in run.stopped
    assert str(caught[-1].message) == run.stopped
    good = fragile()
    cl.train(
        objective_of(good), data().batches(5, seed=1), epochs=2, **arguments | {"folder": None}
    )
    same_weights(model, good)
    ds = run.dataset
    assert ds["epoch"].values.tolist() == [0, 1, 2]
    assert ds.attrs["stopped"] == run.stopped
    assert np.isfinite(ds["train_loss"]).all()
    if folder:
        assert cl.open(folder).attrs["stopped"] == run.stopped
        state = checkpoint.load_state(folder / "checkpoint.pt")
        assert state["position"]["epoch"] == 2
        assert "stopped" not in state["log"]["attributes"]


def test_a_loss_that_is_not_finite_at_the_end_of_an_epoch_is_no_good_state() -> None:
    """The last step of the epoch, finite itself, breaks the weights: no later minibatch says so,
    but the evaluation does.
    """

    def deep() -> Any:
        return nn.Sequential(fragile()[0], nn.Linear(4, 4).double(), fragile()[1])

    model = deep()
    blow = lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda k: 1.0 if k < 7 else 1e150)  # noqa: E731
    for every in (1, 4):
        with pytest.warns(
            cl.CurvlabWarning,
            match=r"diverged in epoch 2 after 4 steps: the.* loss is (nan|not finite|inf)",
        ):
            run = cl.train(
                objective_of(model),
                data().batches(5, seed=1),
                epochs=9,
                algorithm="sgd-m",
                schedule=blow,
                lr=1.0,
                schedule_every="step",
                evaluate_every=every,
            )
        assert run.dataset["epoch"].values.tolist() == [0, 1]
        assert all(torch.isfinite(p).all() for p in model.parameters())
        model = deep()


def test_bad_data_are_an_error_and_no_divergence(tmp_path: Path) -> None:
    p = problem()
    minibatches = batches(p, 4)
    with pytest.raises(cl.CurvlabError, match=r"out of range: the model has 3 outputs"):
        cl.train(
            p.objective(),
            [*minibatches[:3], (minibatches[3][0], minibatches[3][1] + 5)],
            folder=tmp_path,
        )
    broken = problem()
    with torch.no_grad():
        next(broken.model.parameters()).fill_(torch.nan)
    with pytest.raises(cl.CurvlabError, match="before the first step"):
        cl.train(broken.objective(), minibatches)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"algorithm": "adan"}, "unknown algorithm 'adan'; did you mean 'adam'"),
        (
            {"pears": 3, "algorithm": "k-bfgs-l"},
            "unknown option of k-bfgs-l 'pears'; did you mean 'pairs'",
        ),
        ({"pairs": 3}, "unknown option of adam 'pairs' .known: none"),
        ({"schedule": "cosin"}, "unknown schedule 'cosin'; did you mean 'cosine'"),
        (
            {"schedule": "step", "schedule_options": {"evry": 3}},
            "unknown option of schedule step 'evry'; did you mean 'every'",
        ),
        ({"schedule": "cosine", "steps": 3}, "schedule 'cosine' is laid out over all epochs"),
        ({"schedule_every": "minute"}, "unknown schedule_every"),
        (
            {"momentum_kind": "polyak"},
            r"unknown kind of momentum 'polyak'.*add, average, corrected, nesterov",
        ),
        ({"epochs": 0}, "epochs must be 1 or more"),
        ({"seconds": -1.0}, "seconds must be above 0"),
        ({"evaluate_every": 0}, "evaluate_every must be 1 or more"),
        ({"checkpoint_seconds": 0.0}, "seconds between checkpoints must be above 0"),
        ({"lr": -1.0}, "learning rate must be 0 or positive"),
        ({"weight_decay": -1.0}, "weight decay must be 0 or positive"),
        ({"update_every": 0}, "update_every must be"),
        ({"batches": iter([])}, "gone through only once"),
        ({"batches": []}, "no minibatches to train on"),
        (
            {"validation": (torch.zeros(3, 7).double(), torch.zeros(3).long())},
            "does not take inputs of shape",
        ),
    ],
)
def test_bad_arguments(change: dict[str, Any], says: str, tmp_path: Path) -> None:
    arguments: dict[str, Any] = {"batches": data().batches(5), "folder": tmp_path / "x"}
    arguments |= change
    with pytest.raises(cl.CurvlabError, match=says):
        cl.train(objective_of(net()), **arguments)
    assert not (tmp_path / "x" / "run.h5").exists()


def test_the_figure_shows_the_values_of_the_log_for_one_run_and_for_several() -> None:
    runs = [
        cl.train(
            objective_of(net()), data().batches(5, epochs=3), data(6), algorithm=name, lr=0.01
        ).dataset
        for name in ("adam", "sgd-m")
    ]
    axes = draw_all([("a", runs[0]), ("b", runs[1])], "training").axes
    assert [line.get_label() for line in axes[0].lines] == [
        "adam, training", "adam, validation", "sgd-m, training", "sgd-m, validation"
    ]  # fmt: skip
    for row, kind in ((0, "loss"), (2, "error")):
        for ax, x in ((axes[row], "epoch"), (axes[row + 1], "wall_seconds")):
            for line, (ds, part) in zip(
                ax.lines, [(ds, part) for ds in runs for part in ("train", "val")], strict=True
            ):
                np.testing.assert_array_equal(line.get_xdata(), ds[x])
                np.testing.assert_array_equal(line.get_ydata(), ds[f"{part}_{kind}"])
    colours = {line.get_color() for line in axes[0].lines}
    assert len(colours) == 2
    twice = draw_all([("a", runs[0]), ("b", runs[0])], "training").axes[0]
    assert [line.get_label() for line in twice.lines][::2] == [
        "adam (a), training",
        "adam (b), training",
    ]
    with pytest.raises(
        cl.CurvlabError, match=r"figure 'loss' is of one run: give one \(of several: training\)"
    ):
        draw_all([("a", runs[0]), ("b", runs[1])], "loss")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_on_a_gpu_as_on_the_cpu(tmp_path: Path) -> None:
    logs = []
    for device in ("cpu", "cuda"):
        folder = tmp_path / device
        cl.train(
            objective_of(net().to(device)),
            data().batches(5),
            algorithm="k-bfgs-20",
            lr=0.1,
            folder=folder,
        )
        run = cl.train(
            objective_of(net().to(device)),
            data().batches(5),
            algorithm="k-bfgs-20",
            lr=0.1,
            epochs=3,
            folder=folder,
            resume=True,
        )
        logs.append(run.dataset["train_loss"])
    np.testing.assert_allclose(logs[0], logs[1], rtol=1e-9)


# ---- probes


def test_probes_lie_along_axes_of_their_own_and_leave_the_run_as_it_is(tmp_path: Path) -> None:
    """Seven steps in two epochs; every name without a number as its own table line says."""
    model, other = net(), net()
    arguments: dict[str, Any] = {"algorithm": "kfac", "lr": 0.05, "damping": 0.1, "epochs": 2}
    bare = cl.train(objective_of(other), data().batches(5, seed=1), **arguments).dataset
    run = cl.train(
        objective_of(model),
        data().batches(5, seed=1),
        probes=["norms:3", "loss"],
        folder=tmp_path,
        **arguments,
    )
    ds = cl.open(tmp_path)
    same_weights(model, other)
    xr.testing.assert_identical(ds, run.dataset)
    for name in set(bare.data_vars) - set(TIMES):
        xr.testing.assert_identical(ds[name], bare[name])
    assert ds["norms_step"].values.tolist() == [0, 3, 6]
    assert ds["loss_step"].values.tolist() == list(range(8))
    assert ds["direction_norm"].dims == ("norms_step", "algorithm", "block")
    assert ds["algorithm"].values.tolist() == ["kfac"]
    means = ds["loss"].values.reshape(2, 4).mean(1)
    np.testing.assert_allclose(means, ds["batch_loss"][1:], rtol=1e-13)
    assert json.loads(ds.attrs["probes"]) == {"norms": 3, "loss": 1}
    assert ds["probe_seconds"][-1] > 0
    assert {"long_name", "units"} <= ds["norms_step"].attrs.keys()


def test_one_probe_may_be_named_alone() -> None:
    ds = cl.train(
        objective_of(net()), data().batches(5, seed=1), algorithm="sgd-m", probes="norms:3"
    ).dataset
    assert json.loads(ds.attrs["probes"]) == {"norms": 3}
    with pytest.raises(cl.CurvlabError, match="unknown probe 'norm'"):
        cl.train(objective_of(net()), data().batches(5, seed=1), probes="norm")


def test_the_shift_of_block_hessian_is_in_the_log_of_every_run() -> None:
    ds = cl.train(
        objective_of(net()),
        data().batches(5, epochs=2),
        algorithm="block-hessian",
        damping=0.3,
        lr=0.1,
    ).dataset
    assert ds["shift"].dims == ("shift_step", "algorithm", "block")
    assert ds["shift_step"].values.tolist() == list(range(8))
    objective = objective_of(net())
    optimizer = cl.optimizer("block-hessian", objective, lr=0.1, damping=0.3)
    optimizer.warm_start(data().batches(5, seed=0))
    expected = []
    for batch in data().batches(5, epochs=2):
        optimizer.step(objective.closure(*batch))
        expected.append([block.shift for block in curvature_of(optimizer).blocks.values()])
    np.testing.assert_array_equal(ds["shift"][:, 0], expected)
    assert max(expected[-1]) > 0


COSTLY = ("spectrum", "error")
"""Probes of many products."""
WITH_PROBES: Cuts = [(steps, seconds) for steps in (3, 4, 6) for seconds in (1e-9, 60.0)]


@pytest.mark.parametrize(
    ("algorithm", "cuts"),
    [
        pytest.param("k-bfgs-20", [(3, 1e-9), (4, 1e-9), (6, 60.0)], id="k-bfgs-20"),
        pytest.param("kfac", [(6, 60.0)], id="kfac", marks=pytest.mark.slow),
        pytest.param("lbfgs", [(3, 1e-9)], id="lbfgs"),
        *(
            pytest.param(name, WITH_PROBES, marks=pytest.mark.slow, id=f"{name}-everywhere")
            for name in ("k-bfgs-20", "kfac", "lbfgs")
        ),
    ],
)
def test_a_run_with_probes_goes_on_bit_for_bit_wherever_it_was_cut(
    algorithm: str, cuts: Cuts, tmp_path: Path
) -> None:
    """Within an epoch, between two, and with steps to be done again, of which the probes were
    logged before.
    """
    curvature = cl.optimizer(algorithm, objective_of(net())).descent.curvature
    fits = [n for n, p in PROBES.items() if "train" in p.where and p.fits(curvature)]
    probes = [f"{n}:{3 if n in COSTLY else 1 + i % 3}" for i, n in enumerate(fits)]
    more: dict[str, Any] = {
        "algorithm": algorithm,
        "lr": 0.05,
        "damping": 0.3,
        "epochs": 2,
        "probes": probes,
    }
    whole = net()
    expected = cl.train(objective_of(whole), data().batches(5, seed=1), **more).dataset
    for steps, seconds in cuts:
        folder = tmp_path / f"{steps} {seconds}"
        arguments: dict[str, Any] = more | {"folder": folder, "checkpoint_seconds": seconds}
        killed_after(
            steps, objective=objective_of(net()), batches=data().batches(5, seed=1), **arguments
        )
        cl.open(folder)
        model = net(99)
        run = cl.train(objective_of(model), data().batches(5, seed=1), resume=True, **arguments)
        same_weights(model, whole)
        same_log(run.dataset, expected)
        same_log(cl.open(folder), expected)
    with pytest.raises(cl.CurvlabError, match=r"other settings \(probes \{.*\}, not None\)"):
        cl.train(
            objective_of(net()),
            data().batches(5, seed=1),
            resume=True,
            **arguments | {"probes": ()},
        )


def test_probes_up_to_a_divergence_are_kept() -> None:
    blow: dict[str, Any] = {
        "schedule": lambda o: torch.optim.lr_scheduler.LambdaLR(
            o, lambda e: 1.0 if e < 1 else 1e100
        )
    }
    with pytest.warns(cl.CurvlabWarning, match="diverged in epoch 2"):
        run = cl.train(
            objective_of(fragile()),
            data().batches(5, seed=1),
            epochs=3,
            algorithm="sgd-m",
            lr=1e-3,
            probes=["loss"],
            **blow,
        )
    assert run.dataset["epoch"].values.tolist() == [0, 1]
    assert run.dataset["loss_step"].values.tolist() == [0, 1, 2, 3, 4]


def test_double_grad_is_the_optimizers_and_goes_on(tmp_path: Path) -> None:
    """Thesis 2.8.3, by hand; and over a checkpoint, where the last second look's gradient is
    kept.
    """
    train = data()
    settings: dict[str, Any] = {"algorithm": "k-bfgs-20", "lr": 0.1, "damping": 0.3}
    whole, halves, hand, plain = net(), net(), net(), net()

    def run(model: nn.Module, epochs: int, **more: Any) -> xr.Dataset:
        batches = train.batches(5, seed=2)
        return cl.train(objective_of(model), batches, epochs=epochs, **settings, **more).dataset

    log = run(whole, 3, double_grad=True)
    run(halves, 1, double_grad=True, folder=tmp_path)
    halves = net()
    same_log(run(halves, 3, double_grad=True, folder=tmp_path, resume=True), log)
    same_weights(whole, halves)
    objective = objective_of(hand)
    stepper = cl.optimizer("k-bfgs-20", objective, lr=0.1, damping=0.3, double_grad=True)
    stepper.warm_start(train.batches(5, seed=2))
    for x, y in train.batches(5, epochs=3, seed=2):
        stepper.step(objective.closure(x, y))
    same_weights(whole, hand)
    run(plain, 3)
    assert not torch.equal(plain[0].weight, whole[0].weight)
    with pytest.raises(
        cl.CurvlabError,
        match="double_grad needs a method that looks at each minibatch a second time",
    ):
        cl.train(objective_of(net()), train.batches(5), algorithm="adam", double_grad=True)
