"""Other modes of autograd, other threads and other processes than one."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch
from oracle import Reference, apart, numbers, one_line, tokens, total
from problems import normal
from test_faults import entries, in_order, right_or_refused
from test_faults_types import STEPPERS, data, two
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn

import curvlab as cl
from curvlab.errors import CurvlabError
from curvlab.likelihoods import Categorical

pytestmark = pytest.mark.filterwarnings("ignore::curvlab.errors.CurvlabWarning")


MODES: dict[str, Callable[[], AbstractContextManager[object]]] = {
    "no_grad": torch.no_grad,
    "grad disabled": lambda: torch.set_grad_enabled(False),
    "anomaly": lambda: torch.autograd.set_detect_anomaly(True),
    "one thread of autograd": lambda: torch.autograd.set_multithreading_enabled(False),
    "saved on cpu": torch.autograd.graph.save_on_cpu,
}


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
@pytest.mark.parametrize("mode", MODES)
def test_everything_under_another_mode_of_autograd(mode: str) -> None:
    net, (x, y) = two(), data()
    o, r = cl.Objective(net, Categorical()), Reference(net, x, y)
    wanted = {kind: getattr(r, kind).trace()[None] for kind in ("hessian", "ggn", "ef", "pi")}
    gradient, rows = r.gradient, r.rows

    def allowed(call: Callable[..., Tensor], number: Tensor) -> None:
        if mode in ("saved on cpu", "anomaly"):  # torch's own transforms do not go through these
            right_or_refused(call, number)
        else:
            assert apart(call(), number) < 1e-10

    with MODES[mode]():
        allowed(lambda: in_order(o, r, o.closure(x, y).observe({"data"}).gradients), gradient)
        allowed(lambda: r.joined(cl.exact.gradients(o, x, y), net, 1), rows)
        for kind, trace in wanted.items():
            allowed(
                lambda kind=kind: total(
                    m.dense().trace() for m in cl.exact.matrices(o, x, y, kind).values()
                )[None],
                trace,
            )
            allowed(lambda kind=kind: cl.exact.diagonal(o, x, y, kind).sum()[None], trace)
            allowed(
                lambda kind=kind: cl.exact.matrix(o, x, y, kind, None).dense().trace()[None], trace
            )
            allowed(lambda kind=kind: cl.exact.product(o, x, y, kind).dense().trace()[None], trace)
        if mode not in ("saved on cpu", "anomaly"):
            cl.spectrum(o, x, y, progress=False)
            for algorithm in STEPPERS:
                cl.optimizer(algorithm, o, lr=0.01, damping=0.1).step(o.closure(x, y))
            cl.optimizer("block-hessian", o, lr=0.01, damping=0.1).step(o.closure(x, y))
        assert torch.is_grad_enabled() is (mode not in ("no_grad", "grad disabled"))


def test_data_and_calls_of_inference_mode() -> None:
    """Right, or one line whose remedy (clone; leave inference mode) works."""
    net, (x, y) = two(), data()
    o, r = cl.Objective(net, Categorical()), Reference(net, x, y)
    with torch.inference_mode():
        frozen = x * 1
    order = torch.cat(list(entries(o, r).values()))
    wanted = r.ggn[order[:, None], order]
    for call in (
        lambda x: cl.exact.matrix(o, x, y, "ggn", None).dense(),
        lambda x: cl.exact.matrix(o, x, y, "ggn", None, route="func").dense(),
        lambda x: cl.exact.product(o, x, y, "ggn").dense(),
    ):
        right_or_refused(lambda call=call: call(frozen), wanted, match="clone")
        assert apart(call(frozen.clone()), wanted) < 1e-10
    right_or_refused(
        lambda: r.joined(cl.exact.gradients(o, frozen, y), net, 1), r.rows, match="clone"
    )
    right_or_refused(
        lambda: in_order(o, r, o.closure(frozen, y).observe({"data"}).gradients),
        r.gradient,
        match="clone",
    )

    def within() -> Tensor:
        with torch.inference_mode():
            return cl.exact.matrix(o, x, y, "ggn", None).dense()

    right_or_refused(within, wanted, match="inference_mode")


def test_weights_of_inference_mode_are_named() -> None:
    with torch.inference_mode():
        net = nn.Linear(4, 3).double()
    x, y = data()

    def trace() -> Tensor:
        return (
            cl.exact.matrix(cl.Objective(net, Categorical()), x, y, "ggn", None)
            .dense()
            .trace()[None]
        )

    right_or_refused(trace, trace_of(copy_of(net), x, y), match="inference")


def copy_of(net: nn.Module) -> nn.Module:
    made = nn.Linear(4, 3).double()
    for p, q in zip(made.parameters(), net.parameters(), strict=True):
        p.data.copy_(q.clone())
    return made


def trace_of(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return Reference(net, x, y).ggn.trace()[None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_torchs_default_dtype_says_nothing(dtype: torch.dtype) -> None:
    net, (x, y) = two(), data()
    o, r = cl.Objective(net, Categorical()), Reference(net, x, y)
    gradient, hessian, ggn = r.gradient, r.hessian.trace()[None], r.ggn.trace()[None]
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        seen = o.closure(x, y).observe({"data"}).gradients
        assert apart(cl.exact.diagonal(o, x, y, "hessian").sum()[None], hessian) < 1e-10
        assert apart(cl.exact.product(o, x, y, "ggn").dense().trace()[None], ggn) < 1e-10
        for algorithm in STEPPERS:
            cl.optimizer(algorithm, o, lr=0.01, damping=0.1).step(o.closure(x, y))
    finally:
        torch.set_default_dtype(before)
    assert apart(in_order(o, r, seen), gradient) < 1e-10
    assert all(p.dtype == torch.float64 for p in net.parameters())


def test_two_threads() -> None:
    """Each its own model, at one time; made before, since to make one draws from the generator that
    all threads share, which would look as if the other's model drew.
    """
    found: dict[int, list[float]] = {0: [], 1: []}
    with torch.random.fork_rng(devices=[]):
        nets = [
            nn.Sequential(nn.Linear(4, 3 + i), nn.Tanh(), nn.Linear(3 + i, 3)).double()
            for i in found
        ]
    x, y = data()

    def work(which: int) -> None:
        net = nets[which]
        o, r = cl.Objective(net, Categorical()), Reference(net, x, y)
        for _ in range(10):
            found[which].append(apart(r.joined(cl.exact.gradients(o, x, y), net, 1), r.rows))
            found[which].append(
                apart(cl.exact.diagonal(o, x, y, "ggn").sum()[None], r.ggn.trace()[None])
            )
            found[which].append(
                apart(
                    cl.exact.matrix(o, x, y, "hessian", None).dense().trace()[None],
                    r.hessian.trace()[None],
                )
            )

    threads = [threading.Thread(target=work, args=(i,)) for i in found]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert [len(errors) for errors in found.values()] == [30, 30]
    assert max(max(errors) for errors in found.values()) < 1e-10


# ------------------------------------------------------------------------------------------------
# processes

DISTRIBUTED = ("sgd-m", "kfac", "shampoo")


def _sharded_rank(rank: int, size: int, folder: str) -> None:
    """What a process is told of a model that is sharded, in either way."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=size
    )
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

    told: list[str] = []
    try:
        inside, outside = (
            nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)),
            nn.Linear(4, 3),
        )
        fully_shard(inside[0])
        for model in (inside, FullyShardedDataParallel(outside, device_id=torch.device("cpu"))):
            try:
                cl.Objective(model, Categorical())
            except CurvlabError as error:
                told.append(str(error))
    finally:
        torch.save(told, f"{folder}/{rank}.pt")
        torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2])
def test_sharded_models_are_refused(size: int, tmp_path: Path) -> None:
    """By torch's own FSDP, both kinds. In one process too: DTensors take no plain tensor beside
    them, and the wrapper's hooks end the process in a pass of one example.
    """
    spawn(_sharded_rank, (size, str(tmp_path)), nprocs=size)
    for rank in range(size):
        inside, outside = torch.load(tmp_path / f"{rank}.pt")
        one_line(CurvlabError(inside), "FSDP", "as it was before")
        one_line(CurvlabError(outside), "FullyShardedDataParallel", "as it was before")


def _rank(rank: int, size: int, folder: str) -> None:
    """One process: its own data, equal weights; what it ends with goes to a file."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=size
    )
    ends: dict[str, object] = {}
    try:
        for algorithm in DISTRIBUTED:
            torch.manual_seed(0)
            model = nn.parallel.DistributedDataParallel(nn.Linear(4, 3).double())
            x, y = numbers(5, 4, seed=rank), tokens(5, high=3, seed=rank)
            try:
                o = cl.Objective(model, Categorical())
                optimizer = cl.optimizer(algorithm, o, lr=0.1, damping=0.1)
                for _ in range(3):
                    optimizer.step(o.closure(x, y))
                ends[algorithm] = model.module.weight.detach().clone()
            except CurvlabError as error:
                ends[algorithm] = str(error)
    finally:
        torch.save(ends, f"{folder}/{rank}.pt")
        torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_end_with_one_model_or_refuse(tmp_path: Path) -> None:
    """The table's 15: each rank its own data; the weights are one, those of both ranks' data
    together.
    """
    spawn(_rank, (2, str(tmp_path)), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    for algorithm in DISTRIBUTED:
        if isinstance(first[algorithm], str):
            one_line(CurvlabError(first[algorithm]), "DistributedDataParallel", "reduce")
            assert isinstance(second[algorithm], str)
            continue
        assert torch.equal(first[algorithm], second[algorithm])
        if algorithm == "sgd-m":
            torch.manual_seed(0)
            net = nn.Linear(4, 3).double()
            x = torch.cat([numbers(5, 4, seed=rank) for rank in (0, 1)])
            y = torch.cat([tokens(5, high=3, seed=rank) for rank in (0, 1)])
            o = cl.Objective(net, Categorical())
            optimizer = cl.optimizer("sgd-m", o, lr=0.1, damping=0.1)
            for _ in range(3):
                optimizer.step(o.closure(x, y))
            assert apart(first[algorithm], net.weight) < 1e-10


@pytest.mark.parametrize("algorithm", DISTRIBUTED)
def test_a_group_of_two_is_refused_or_reduced(
    algorithm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without processes: torch's own make-believe of a second rank. What is not refused asks the
    other rank something.
    """
    store = pytest.importorskip("torch.testing._internal.distributed.fake_pg").FakeStore()
    asked: list[str] = []
    torch.distributed.init_process_group("fake", store=store, rank=0, world_size=2)
    try:
        model = nn.parallel.DistributedDataParallel(two())
        for name in ("all_reduce", "all_gather", "all_gather_into_tensor", "reduce_scatter"):
            true = getattr(torch.distributed, name)
            told = lambda *a, name=name, true=true, **k: (asked.append(name), true(*a, **k))[1]  # type: ignore[func-returns-value]  # for its effect  # noqa: E731
            monkeypatch.setattr(torch.distributed, name, told)
        x, y = data()
        try:
            o = cl.Objective(model, Categorical())
            cl.optimizer(algorithm, o, lr=0.1, damping=0.1).step(o.closure(x, y))
        except CurvlabError as error:
            one_line(error, "DistributedDataParallel", "reduce")
        else:
            assert asked
    finally:
        torch.distributed.destroy_process_group()


def test_one_process_of_a_group_is_right_or_refused(tmp_path: Path) -> None:
    """World size 1, in this process."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1
    )
    try:
        net, (x, y) = two(), data()
        model = nn.parallel.DistributedDataParallel(net)
        r = Reference(net, x, y)

        def rows() -> Tensor:
            found = cl.exact.gradients(cl.Objective(model, Categorical()), x, y)
            return r.joined({name.removeprefix("module."): g for name, g in found.items()}, net, 1)

        right_or_refused(rows, r.rows, match="DistributedDataParallel")
        assert all(p.grad is None for p in net.parameters())
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("name", ["k-bfgs", "lbfgs", "skqn-b1", "smw-ng"])
def test_data_parallel_is_the_module(name: str) -> None:
    """A second look's buffers go by `functional_call`, which takes no DataParallel;
    blocks have the module's names.
    """
    net, (x, y) = two(), data()
    r = Reference(net, x, y)
    o = cl.Objective(nn.DataParallel(net), Categorical())
    assert [b.name for b in o.blocks] == [b.name for b in cl.Objective(net, Categorical()).blocks]
    assert apart(r.joined(cl.exact.gradients(o, x, y), net, 1), r.rows) < 1e-10
    norm = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).double()
    found = []
    for wrap in (lambda net: net, nn.DataParallel):
        objective = cl.Objective(wrap(copy.deepcopy(norm)), Categorical())
        optimizer = cl.optimizer(name, objective, lr=0.1)
        for seed in range(3):
            optimizer.step(objective.closure(normal(6, 3, seed=seed), torch.arange(6) % 2))
        found.append([p.detach().clone() for p in objective.model.parameters()])
    assert all(map(torch.equal, *found))
