"""On a GPU, where there is one: whole runs, and steps that torch itself sees wait for nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from pretended_runs import LAST, options, placed
from problems import Problem, batches
from waits import LAYERS, PLAIN

import curvlab as cl
from curvlab.curvature.block_diagonal import BlockDiagonal

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")


def on_gpu(model: str = "tanh") -> Problem:
    return placed("cuda", model)


@contextmanager
def nothing_may_wait() -> Iterator[None]:
    """An operation that waits for the GPU raises inside."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


@pytest.mark.parametrize("model", ["tanh", "tokens", "conv-norm", "embedding"])
@pytest.mark.parametrize("name", PLAIN)
def test_a_plain_step_waits_for_nothing(
    name: str, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if model != "tanh" and LAYERS.get(name, {}).get("step"):
        pytest.skip("its vectors are counted there")
    p = on_gpu(model)
    objective = p.objective()
    optimizer = cl.optimizer(name, objective, lr=1e-3, **options(name))
    optimizer.warm_start([(p.x, p.y)])
    *first, last = batches(p, LAST + 1)  # an odd step makes no inverses
    for x, y in first:
        optimizer.step(objective.closure(x, y))
    if "refresh_every" in options(name):
        monkeypatch.setattr(BlockDiagonal, "refresh", None)
    closure = objective.closure(*last)
    with nothing_may_wait():
        optimizer.step(closure)
    optimizer.soundness.check()


def test_a_read_is_seen() -> None:
    with nothing_may_wait(), pytest.raises(RuntimeError, match="synchroniz"):
        torch.ones((), device="cuda").item()


@pytest.mark.parametrize("name", ["sgd-m", "kfac", "k-bfgs", "tnt", "block-ggn", "hf"])
def test_train(name: str, tmp_path: Path) -> None:
    """Losses are the host's, and the run goes on from its checkpoint."""
    there, here = (
        cl.train(
            placed(to).objective(),
            batches(placed(to), 6),
            algorithm=name,
            epochs=2,
            folder=tmp_path / to,
            progress=False,
        )
        for to in ("cuda", "cpu")
    )
    ours, theirs = (run.dataset["train_loss"].values for run in (there, here))
    torch.testing.assert_close(torch.as_tensor(ours), torch.as_tensor(theirs), rtol=1e-6, atol=1e-9)


def test_compare(tmp_path: Path) -> None:
    there, here = (
        cl.compare(
            placed(to).objective(),
            batches(placed(to), 4),
            algorithms=["kfac", "k-bfgs", "tnt", "shampoo", "sgd-m"],
            lr=0.01,
            path=tmp_path / f"{to}.h5",
            progress=False,
        )
        for to in ("cuda", "cpu")
    )
    ours, theirs = (run.dataset["cosine"].values for run in (there, here))
    torch.testing.assert_close(torch.as_tensor(ours), torch.as_tensor(theirs), rtol=1e-6, atol=1e-9)


def test_spectrum() -> None:
    found = []
    for to in ("cuda", "cpu"):
        p = placed(to)
        ds = cl.spectrum(p.objective(), p.x, p.y, ("hessian", "ggn"), blocks=["all", "whole"])
        found.append(torch.as_tensor(ds["eigenvalue"].values))
    torch.testing.assert_close(*found, rtol=1e-6, atol=1e-9, equal_nan=True)


@pytest.mark.parametrize("pinned", [False, True])
def test_a_minibatch_may_be_filled_again_at_once(pinned: bool) -> None:
    """While it is still on its way to the device, behind work that takes some time."""
    p = on_gpu()
    x, y = (t.cpu().pin_memory() if pinned else t.cpu().clone() for t in (p.x, p.y))
    busy = torch.randn(4096, 4096, device="cuda")
    for _ in range(20):
        busy = busy @ busy / busy.norm()
    closure = p.objective().closure(x, y)
    x.zero_()
    assert torch.equal(closure.x, p.x)
