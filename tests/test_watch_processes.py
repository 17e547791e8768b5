"""`curvlab.watch` in a loop of several processes (DDP): no bit of it changes, and the log is that
of one process which was given all ranks' minibatches.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from problems import normal
from ranks import by_ranks
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import curvlab as cl
from curvlab.errors import CurvlabError, CurvlabWarning
from curvlab.likelihoods import Categorical
from curvlab.parallel import ALONE, ranks_here

STEPS = 6
SIZE = 7
ALGORITHMS = ("block-ggn", "kfac", "tnt", "k-bfgs", "sgd-m", "torch:AdamW")
Batch = tuple[Tensor, Tensor]
Watch = Callable[..., Any]


def plain() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def noisy() -> nn.Module:
    """With all that a forward pass of a rank leaves behind: buffers, and random numbers used up."""
    return nn.Sequential(
        nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.3), nn.Linear(8, 3)
    ).double()


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make()


def minibatch(rank: int, step: int) -> Batch:
    x = normal(SIZE + rank, 6, seed=10 * step + rank)  # ranks have other numbers of examples
    return x, torch.arange(SIZE + rank).add(step + rank).remainder(3)


def of_all(world: int, step: int) -> Batch:
    each = [minibatch(rank, step) for rank in range(world)]
    return torch.cat([x for x, _ in each]), torch.cat([y for _, y in each])


def watched(model: nn.Module, optimizer: torch.optim.Optimizer, **options: Any) -> Any:
    options = {"algorithms": ("kfac",), "damping": 1e-2, **options}
    return cl.watch(model, Categorical(), optimizer, **options)


class Nobody:
    """In the place of a watch."""

    def __call__(self, data: Any) -> Any:
        return data


@contextmanager
def unwatched(model: nn.Module, optimizer: torch.optim.Optimizer, **options: Any) -> Iterator[Any]:
    yield Nobody()


def loop(make: Callable[[], nn.Module], watch: Watch, add_up: int = 1) -> dict[str, Any]:
    """A loop in DDP, of which only the line of `watch` is not the user's own."""
    rank = ranks_here().rank
    torch.manual_seed(rank), random.seed(rank), np.random.seed(rank)  # noqa: NPY002
    model = DistributedDataParallel(seeded(make))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    data = [minibatch(rank, step) for step in range(STEPS)]
    with always() as said, watch(model, optimizer) as seen:
        for i, (x, y) in enumerate(seen(data)):
            ends = i % add_up == add_up - 1
            with nullcontext() if ends else model.no_sync():
                nn.functional.cross_entropy(model(x), y).div(add_up).backward()
            if ends:
                nn.utils.clip_grad_norm_(model.parameters(), 0.5)
                optimizer.step()
                optimizer.zero_grad()
    found = {key: t.clone() for key, t in model.state_dict().items()}
    chance = torch.get_rng_state(), random.random(), float(np.random.random())  # noqa: NPY002
    lines = [str(w.message) for w in said if isinstance(w.message, CurvlabWarning)]
    dataset = None if isinstance(seen, Nobody) else seen.dataset.load()
    return {"weights": found, "chance": chance, "said": lines, "log": dataset}


@contextmanager
def always() -> Iterator[list[warnings.WarningMessage]]:
    """Record all warnings."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        yield said


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    weights = all(torch.equal(one["weights"][k], other["weights"][k]) for k in one["weights"])
    (state, *numbers), (also, *others) = one["chance"], other["chance"]
    return weights and torch.equal(state, also) and numbers == others


@pytest.mark.parametrize("add_up", [1, 2])
@pytest.mark.parametrize("make", [plain, noisy])
def test_no_bit_of_a_rank_changes(make: Callable[[], nn.Module], add_up: int) -> None:
    probes = ["spectrum:2"] if make is plain else ["damping:2", "condition:2"]
    watch = partial(watched, algorithms=ALGORITHMS, every=2, probes=probes)

    def both() -> tuple[dict[str, Any], dict[str, Any]]:
        return loop(make, unwatched, add_up), loop(make, watch, add_up)

    ranks = by_ranks(2, both)
    for without, with_watch in ranks:
        assert same(without, with_watch)
        assert with_watch["log"]["minibatches"].values.tolist() == [2 * add_up] * (4 - add_up)
    one, other = (found["log"] for _, found in ranks)
    for name in ("cosine", "loss", "optimizer_gradient_cosine", "optimizer_gradient_norm"):
        assert np.array_equal(one[name], other[name], equal_nan=True)  # ranks hold the same bits
    if make is noisy:
        for _, found in ranks:
            assert any("looked at as one" in line for line in found["said"])


@pytest.mark.parametrize("world", [2, 3])
def test_the_log_is_that_of_one_process_with_all_minibatches(world: int) -> None:
    def ranks() -> Any:
        rank, model = ranks_here().rank, DistributedDataParallel(seeded(plain))
        return run(model, [minibatch(rank, step) for step in range(STEPS)])

    def run(model: nn.Module, data: list[Batch]) -> Any:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)
        total = sum(SIZE + rank for rank in range(world))
        share = ranks_here().world / total if ranks_here().several else 1 / total
        with watched(model, optimizer, algorithms=ALGORITHMS) as seen:
            for x, y in seen(data):
                optimizer.zero_grad()
                # DDP's mean of ranks is then that of all examples, whose numbers are not alike
                nn.functional.cross_entropy(model(x), y, reduction="sum").mul(share).backward()
                optimizer.step()
        return seen.dataset.load()

    alone = run(seeded(plain), [of_all(world, step) for step in range(STEPS)])
    for rank, found in enumerate(by_ranks(world, ranks)):
        assert found["algorithm"].values.tolist() == alone["algorithm"].values.tolist()
        assert set(found) == set(alone)
        for name in set(found) - {"seconds", "watch_seconds", "minibatches", "gram"}:
            a, b = found[name].values, alone[name].values
            if a.dtype.kind == "f":
                np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-11, err_msg=f"{name} {rank}")
        np.testing.assert_allclose(found["optimizer_gradient_cosine"].values, 1, atol=1e-12)


# ---- what is wrong on one rank


@pytest.mark.parametrize("what", ["targets", "inputs"])
def test_what_does_not_fit_on_one_rank_is_one_line_on_all(what: str) -> None:
    def work() -> str:
        rank, model = ranks_here().rank, DistributedDataParallel(seeded(plain))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        x, y = minibatch(rank, 0)
        wrong = {"targets": (x, y[:-1]), "inputs": ("text", y)}[what] if rank else (x, y)

        def step() -> None:
            with watched(model, optimizer) as seen, seen.batch(*wrong):
                optimizer.step()

        nn.functional.cross_entropy(model(x), y).backward()
        with pytest.raises(CurvlabError) as told:
            step()
        return str(told.value)

    first, second = by_ranks(2, work)
    assert first == second
    assert "\n" not in first
    if what == "inputs":
        assert "rank 1 of 2" in first


def test_a_step_of_which_a_rank_has_no_minibatch_is_said_and_the_next_is_logged() -> None:
    def work() -> tuple[list[str], list[int]]:
        rank, model = ranks_here().rank, DistributedDataParallel(seeded(plain))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with always() as said, watched(model, optimizer) as seen:
            for step in range(3):
                x, y = minibatch(rank, step)
                nn.functional.cross_entropy(model(x), y).backward()
                with nullcontext() if rank and step == 1 else seen.batch(x, y):
                    optimizer.step()
                    optimizer.zero_grad()
        return [str(w.message) for w in said], seen.dataset["step"].values.tolist()

    for said, steps in by_ranks(2, work):
        assert steps == [0, 2]
        assert any("rank 1 has seen no minibatch" in line for line in said)


@pytest.mark.parametrize("only_first", [True, False])
def test_rank_0_writes_the_log(only_first: bool, tmp_path: Path) -> None:
    path = tmp_path / "run.h5"

    def work() -> list[str]:
        give = path if not only_first or ranks_here().first else None
        return loop(plain, partial(watched, path=give))["said"]

    assert by_ranks(2, work) == [[], []]
    assert cl.open(path).sizes["step"] == STEPS
    assert sorted(each.name for each in tmp_path.iterdir()) == ["run.h5"]


def test_a_path_that_cannot_be_written_is_one_line_on_all_ranks(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    def work() -> str:
        model = DistributedDataParallel(seeded(plain))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with pytest.raises(CurvlabError) as told:
            watched(model, optimizer, path=tmp_path / "file" / "run.h5")
        return str(told.value)

    first, second = by_ranks(2, work)
    assert first == second


def test_other_weights_are_refused_and_a_rank_may_be_watched_by_itself() -> None:
    def work() -> tuple[str, int]:
        rank = ranks_here().rank
        x, y = minibatch(rank, 0)

        def step(watch: Watch) -> Any:
            torch.manual_seed(rank)
            model = plain()  # each rank its own
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            with watch(model, optimizer) as seen, seen.batch(x, y):
                nn.functional.cross_entropy(model(x), y).backward()
                optimizer.step()
            return seen.dataset

        with pytest.raises(CurvlabError, match="other weights") as told:
            step(watched)
        line = str(told.value)
        assert "ranks=curvlab.parallel.ALONE" in line
        return line, step(partial(watched, ranks=ALONE)).sizes["step"] if rank else 1

    for line, steps in by_ranks(2, work):
        assert "\n" not in line
        assert steps == 1


def test_other_arguments_of_a_rank_are_refused() -> None:
    def work() -> str:
        watch = partial(watched, damping=0.1 if ranks_here().first else 0.2)
        with pytest.raises(CurvlabError, match="rank 1 has other arguments than rank 0") as told:
            loop(plain, watch)
        return str(told.value)

    assert len(set(by_ranks(2, work))) == 1
