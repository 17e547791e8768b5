"""`torchrun -m curvlab train …` and `compare …`: what one process writes, one line for all that is
wrong, and a rank that dies ends the run at once with a whole checkpoint.

Processes are started as torchrun starts them, by the environment, and once by itself.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import xarray as xr

import curvlab as cl
from curvlab.cli.ranks import check_command
from curvlab.errors import CurvlabError

TRAIN = (
    "train", "--model", "mlp-256-20", "--algorithm", "kfac", "--dtype", "float64", "--batch-size",
    "101", "--no-warm-start", "--evaluate-samples", "200",
)  # fmt: skip
COMPARE = (
    "compare", "--model", "mlp-256-20", "--dtype", "float64", "--reference", "kfac", "--algorithms",
    "tnt,k-bfgs,smw-ng", "--steps", "3", "--batch-size", "50", "--warm-batches", "2",
)  # fmt: skip

Ended = list[tuple[int, str]]


def start(world: int, *words: str, others: tuple[str, ...] = ()) -> list[subprocess.Popen[str]]:
    """Start so many ranks; those after the first with words of their own behind."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    every = os.environ | {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world),
        "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    return [
        subprocess.Popen(
            [sys.executable, "-m", "curvlab", *words, *(others if rank else ())],
            env=every | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]


def ended(processes: list[subprocess.Popen[str]]) -> Ended:
    said = [p.communicate(timeout=250)[1] for p in processes]
    return [(p.returncode, err) for p, err in zip(processes, said, strict=True)]


def lines(run: Ended) -> list[str]:
    return [line for _, err in run for line in err.splitlines() if line.startswith("curvlab:")]


def weights(folder: Path) -> torch.Tensor:
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    return torch.cat([p.flatten() for p in state["model"].values()])


@pytest.mark.parametrize("command", ["spectrum", "reproduce", "list", "plot", "report", "doctor"])
def test_other_commands_are_for_one_process(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check_command([command])
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    with pytest.raises(CurvlabError, match=f"{command} runs in one process.*torchrun"):
        check_command([command, "--model", "mlp-256-20"])
    check_command(["train", "--model", "mlp-256-20"])
    check_command(["--version"])


@pytest.mark.slow
def test_two_ranks_train_and_one_goes_on(tmp_path: Path) -> None:
    """Weights are those of one process; rank 0 alone writes and prints."""
    one, two = tmp_path / "one", tmp_path / "two"
    assert ended(start(1, *TRAIN, "--steps", "12", "--out", str(one)))[0][0] == 0
    begun = ended(start(2, *TRAIN, "--steps", "6", "--out", str(two)))
    assert [code for code, _ in begun] == [0, 0], begun
    assert begun[1][1] == ""
    assert {p.name for p in two.iterdir()} == {p.name for p in one.iterdir()}
    for world, steps in ((1, "9"), (3, "12")):
        more = ended(start(world, "train", "--resume", "--steps", steps, "--out", str(two)))
        assert [code for code, _ in more] == [0] * world, more
    apart = (weights(two) - weights(one)).norm() / weights(one).norm()
    assert apart < 1e-11, apart


@pytest.mark.slow
def test_two_ranks_compare(tmp_path: Path) -> None:
    for world in (1, 2):
        run = ended(start(world, *COMPARE, "--out", str(tmp_path / str(world))))
        assert [code for code, _ in run] == [0] * world, run
    found, true = (cl.open(tmp_path / name / "run.h5") for name in ("2", "1"))
    for name in ("cosine", "cosine_all", "gram", "loss"):
        xr.testing.assert_allclose(found[name], true[name], rtol=1e-8, atol=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_dies_ends_the_run(victim: int, tmp_path: Path) -> None:
    """Within 30 s, with one line and a whole checkpoint, from which one process goes on."""
    folder = tmp_path / "run"
    processes = start(
        2, *TRAIN, "--epochs", "50", "--checkpoint-seconds", "0.3", "--out", str(folder)
    )
    end = time.monotonic() + 120
    while not (folder / "checkpoint.pt").exists() and time.monotonic() < end:
        time.sleep(0.1)
    time.sleep(2)
    processes[victim].send_signal(signal.SIGKILL)
    died = time.monotonic()
    code, err = ended([processes[1 - victim]])[0]
    assert time.monotonic() - died < 30
    processes[victim].communicate()
    assert code == 2
    said = lines([(code, err)])
    assert len(said) == 1, err
    assert "another process of this run has gone" in said[0]
    assert "train --resume" in said[0]
    assert str(folder) in said[0]
    assert "Traceback" not in err
    steps = torch.load(folder / "checkpoint.pt", weights_only=True)["position"]["steps"]
    more = ended(start(1, "train", "--resume", "--steps", str(steps + 3), "--out", str(folder)))
    assert more[0][0] == 0, more


@pytest.mark.slow
@pytest.mark.parametrize("which", [slice(None), slice(1, 2)])
def test_a_signal_comes_on_all_ranks_after_one_step(which: slice, tmp_path: Path) -> None:
    """To all of them or to one: the step is whole, one line, and no step is lost."""
    folder = tmp_path / "run"
    processes = start(2, *TRAIN, "--epochs", "50", "--out", str(folder))
    end = time.monotonic() + 120
    while not (folder / "checkpoint.pt").exists() and time.monotonic() < end:
        time.sleep(0.1)
    time.sleep(3)
    for process in processes[which]:
        process.send_signal(signal.SIGTERM)
    run = ended(processes)
    assert [code for code, _ in run] == [143, 143], run
    assert len(lines(run)) == 1, run
    assert "interrupted by SIGTERM" in lines(run)[0]
    assert torch.load(folder / "checkpoint.pt", weights_only=True)["position"]["steps"] > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "others", "line"),
    [
        (TRAIN, ("--lr", "0.5"), "rank 1 has other arguments than rank 0: start all by one"),
        (COMPARE, ("--damping", "0.5"), "rank 1 has other arguments than rank 0: start all by one"),
        ((*TRAIN, "--batch-size", "1"), (), "2 ranks share a minibatch of 1 example: start fewer"),
        ((*TRAIN, "--algorithm", "kfacc"), (), "unknown algorithm 'kfacc'"),
    ],
)
def test_bad_input_is_one_line_of_all_ranks(
    words: tuple[str, ...], others: tuple[str, ...], line: str, tmp_path: Path
) -> None:
    run = ended(start(2, *words, "--out", str(tmp_path / "run"), others=others))
    assert [code for code, _ in run] == [2, 2], run
    assert len(lines(run)) == 1, run
    assert line in lines(run)[0]
    assert not any("Traceback" in err for _, err in run)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_torchrun_itself(tmp_path: Path) -> None:
    words = [*TRAIN, "--steps", "3", "--out", str(tmp_path / "run")]
    run = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "curvlab",
         *words],
        capture_output=True, text=True, timeout=250, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("wrote") == 3
    assert (tmp_path / "run" / "training.png").exists()
