"""What lies on the disk: full ones, flipped bits, contents that no run wrote, two runs in one
folder, code named by a file.
"""

from __future__ import annotations

import copy
import fcntl
import itertools
import multiprocessing
import os
import re
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from rich.console import Console
from test_cli import call, refused
from test_train import data, net, objective_of, same_log, same_weights
from torch import nn

import curvlab as cl
from curvlab.algorithms import ALGORITHMS
from curvlab.logs.log import SCHEMA
from curvlab.system import atomic, lock
from curvlab.system.lock import exclusive_lock
from curvlab.system.progress import progress_bar
from curvlab.training import checkpoint
from curvlab.training.folder import RunFolder
from curvlab.training.loop import Training
from curvlab.training.run import Around, _training
from curvlab.training.settings import Budget, Settings
from curvlab.training.showing import Showing

COMPARE = [
    "compare",
    "--model",
    "mlp-256-20",
    "--reference",
    "sgd-m",
    "--algorithms",
    "adam",
    "--batch-size",
    "20000",
    "--steps",
    "2",
]
SPECTRUM = ["spectrum", "--model", "mlp-256-20", "--samples", "20", "--blocks", "6", "--after", "0"]
TRAIN = [
    "train",
    "--model",
    "mlp-256-20",
    "--batch-size",
    "20000",
    "--epochs",
    "1",
    "--evaluate-samples",
    "100",
]


@contextmanager
def full(room: int) -> Iterator[None]:
    """No file grows beyond `room` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def run(objective: cl.Objective, folder: Path | None, epochs: int = 3, **more: Any) -> Any:
    arguments: dict[str, Any] = {
        "algorithm": "k-bfgs",
        "lr": 0.01,
        "damping": 0.3,
        "probes": ["loss:2"],
        "checkpoint_seconds": 1e-9,
    } | more
    return cl.train(
        objective, data().batches(5, seed=1), data(7, 1), epochs=epochs, folder=folder, **arguments
    )


def left(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


# ---- full disks


def test_a_full_disk_ends_every_command_with_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for words in (COMPARE, SPECTRUM, TRAIN):
        out = tmp_path / words[0]
        with full(4096):
            line = refused_after_output(capsys, *words, "--out", str(out))
        assert "cannot be written: File too large" in line
        assert not out.exists() or left(out) == []


def refused_after_output(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """Exit code 2, and one line on standard error."""
    capsys.readouterr()
    assert call(*words) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("curvlab: ")]
    assert len(lines) == 1
    return lines[0]


def test_a_full_disk_of_a_process_by_itself(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "curvlab", *COMPARE, "--out", str(tmp_path / "out")]
    done = subprocess.run(
        ["bash", "-c", 'ulimit -f 4; exec "$@"', "bash", *words],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 2, done
    assert len(done.stderr.strip().splitlines()) == 1
    assert done.stderr.startswith("curvlab: the log ")
    assert not (tmp_path / "out").exists() or left(tmp_path / "out") == []


def test_a_log_that_no_longer_fits_leaves_the_last_whole_one(tmp_path: Path) -> None:
    batches = data().batches(5, seed=1, epochs=40)
    path = tmp_path / "run.h5"
    arguments: dict[str, Any] = {"reference": "sgd-m", "algorithms": ["adam"], "lr": 0.01}
    cl.compare(objective_of(net()), batches, steps=1, path=path, **arguments)
    with (
        full(len(path.read_bytes()) + 100),
        pytest.raises(cl.CurvlabError, match=r"run\.h5 cannot be written: File too large"),
    ):
        cl.compare(objective_of(net()), batches, path=path, **arguments)
    assert cl.open(path)["step"].values.tolist() == [0]
    assert left(tmp_path) == ["run.h5"]


@pytest.mark.parametrize("room", [0, 6000])
def test_a_run_that_meets_a_full_disk_goes_on_to_the_bit_once_there_is_room(
    room: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = objective_of(net())
    logged = run(whole, tmp_path / "whole").dataset
    epoch, cut = Training._epoch, objective_of(net())

    def filling(self: Training) -> bool:
        if self.at.epoch == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))
        return epoch(self)

    monkeypatch.setattr(Training, "_epoch", filling)
    with (
        full(resource.RLIM_INFINITY),
        pytest.raises(cl.CurvlabError, match=r"(checkpoint|log) .* cannot be written: File too la"),
    ):
        run(cut, tmp_path / "cut")
    monkeypatch.undo()
    assert left(tmp_path / "cut") == ["checkpoint.pt", "run.h5"]
    again = objective_of(net(seed=9))
    same_log(run(again, tmp_path / "cut", resume=True).dataset, logged)
    same_weights(again.model, whole.model)


def test_nothing_beside_whatever_ends_a_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "run.h5"

    def stops(error: BaseException) -> Callable[[Path], None]:
        def write(aside: Path) -> None:
            aside.write_bytes(b"half")
            raise error

        return write

    for error in (OSError(28, "No space left on device"), KeyboardInterrupt(), MemoryError()):
        with pytest.raises(type(error)):
            atomic.rewrite(path, stops(error))
        assert left(tmp_path) == []
    real, calls = atomic._discard, itertools.count()

    def interrupted(aside: Path) -> None:
        if next(calls) == 0:
            raise KeyboardInterrupt
        real(aside)

    monkeypatch.setattr(atomic, "_discard", interrupted)
    with pytest.raises(KeyboardInterrupt):
        atomic.rewrite(path, stops(KeyboardInterrupt()))
    assert left(tmp_path) == []


# ---- seals


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("storage") / "run"
    run(objective_of(net()), folder)
    return folder


def test_other_readers_pass_over_the_seal(finished: Path) -> None:
    with xr.open_dataset(finished / "run.h5", engine="h5netcdf") as ds:
        assert ds.attrs["schema"] == SCHEMA
        assert ds["epoch"].values.tolist() == [0, 1, 2, 3]
    assert torch.load(finished / "checkpoint.pt", weights_only=True)["format"] == checkpoint.FORMAT
    for name in ("run.h5", "checkpoint.pt"):
        assert (finished / name).read_bytes()[-atomic.SEAL :].startswith(b"\ncurvlab-sha256 ")
        assert atomic.read_sealed(finished / name)[1]


def taken(folder: Path, flips: int, tmp_path: Path, seed: int) -> list[tuple[str, int]]:
    """(file, bit) of single bits that were flipped unseen; half of the places are in the seal or
    near the ends.
    """
    draw, found = np.random.default_rng(seed), []
    readers: dict[str, Callable[[Path], object]] = {
        "run.h5": cl.open,
        "checkpoint.pt": checkpoint.load_state,
    }
    for name, read in readers.items():
        content = (folder / name).read_bytes()
        bits = 8 * len(content)
        some = [
            *draw.integers(bits, size=flips - 20),
            *draw.integers(bits - 8 * atomic.SEAL, bits, size=20),
        ]
        for bit in map(int, some):
            spoiled = bytearray(content)
            spoiled[bit // 8] ^= 1 << bit % 8
            (tmp_path / name).write_bytes(spoiled)
            try:
                read(tmp_path / name)
            except cl.CurvlabError:
                continue
            found.append((name, bit))
    return found


def test_no_flipped_bit_goes_unseen(finished: Path, tmp_path: Path) -> None:
    assert taken(finished, 60, tmp_path, seed=0) == []


@pytest.mark.slow
def test_no_flipped_bit_of_500_goes_unseen(finished: Path, tmp_path: Path) -> None:
    assert taken(finished, 500, tmp_path, seed=1) == []


def test_files_of_earlier_versions_are_read_and_later_ones_are_named(
    finished: Path, tmp_path: Path
) -> None:
    state = checkpoint.load_state(finished / "checkpoint.pt") | {"format": 1}
    (tmp_path / "old").mkdir()
    torch.save(state, tmp_path / "old" / "checkpoint.pt")  # as they were: without a seal
    again = objective_of(net(seed=9))
    run(again, tmp_path / "old", epochs=4, resume=True)
    straight = objective_of(net())
    run(straight, None, epochs=4)
    same_weights(again.model, straight.model)
    torch.save(state | {"format": checkpoint.FORMAT}, tmp_path / "unsealed.pt")
    with pytest.raises(cl.CurvlabError, match="is damaged, its checksum"):
        checkpoint.load_state(tmp_path / "unsealed.pt")
    torch.save(state | {"format": checkpoint.FORMAT + 1}, tmp_path / "later.pt")
    with pytest.raises(cl.CurvlabError, match="no checkpoint of this version"):
        checkpoint.load_state(tmp_path / "later.pt")


# ---- contents


def training_of(algorithm: str, **more: Any) -> Training:
    return _training(
        objective_of(net(seed=9)),
        data().batches(5, seed=1),
        data(7, 1),
        Settings.of(
            algorithm=algorithm,
            lr=0.01,
            damping=0.3,
            schedule="StepLR",
            schedule_options={"step_size": 2},
        ),
        Budget(3),
        Around(warm=(), probes={"loss": 2}),
        {},
        {},
        None,
    )


ODD = (None, 7, "x", [1, "a"], torch.zeros(7, 11, 13))


OPEN = ("gradient_norm", "solution", "start", "pairs", "pending", "A", "ratio")
"""What may be None at any time."""

LATER = ("refreshed", "ratio")
"""What earlier versions did not write, and may be absent."""


def spoiled(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], str, Any]]:
    """(where, how, the value with one part dropped, or with one part that is of another kind)."""
    if isinstance(value, dict):
        for key, part in value.items():
            if key not in LATER:
                yield (*path, key), "dropped", {k: v for k, v in value.items() if k != key}
            for at, how, new in spoiled(part, (*path, key)):
                yield at, how, value | {key: new}
    elif isinstance(value, list | tuple):
        for i, part in list(enumerate(value))[:2]:
            for at, how, new in spoiled(part, (*path, i)):
                yield at, how, [*value[:i], new, *value[i + 1 :]]
    if path:
        for new in ODD:
            if other(value, new) and not (new is None and path[-1] in OPEN):
                yield path, f"is {new!r}"[:20], new


def other(old: Any, new: Any) -> bool:
    """Whether a value is of another kind, by which it can be told."""
    if isinstance(old, dict):
        return not isinstance(new, dict) or bool(old)
    if isinstance(old, list | tuple):
        return not isinstance(new, list)
    if old is None:  # what may be open may be a number, or a statistic
        return isinstance(new, str | list)
    if (
        isinstance(old, torch.Tensor) and not old.dim() and isinstance(new, int)
    ):  # a counter, which may be on a device
        return False
    both = isinstance(old, int | float) and not isinstance(old, bool) and isinstance(new, int)
    return (not both and type(old) is not type(new)) or isinstance(old, torch.Tensor)


def same(one: Any, two: Any) -> bool:
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(same(v, two[k]) for k, v in one.items())
    if isinstance(one, list | tuple):
        return len(one) == len(two) and all(map(same, one, two))
    return (
        torch.equal(one, two)
        if isinstance(one, torch.Tensor)
        else one == two or (one != one and two != two)
    )


def written(algorithm: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A checkpoint within the second epoch."""
    saved: list[dict[str, Any]] = []
    monkeypatch.setattr(checkpoint, "save", lambda path, state: saved.append(copy.deepcopy(state)))
    training = training_of(algorithm)
    training.place = RunFolder(Path("nowhere"), 1e-9)
    with progress_bar(Console(), False) as bar:
        training.run(bar)
    return {"format": checkpoint.FORMAT} | next(s for s in saved if s["position"]["steps"] == 8)


def all_refused(
    algorithm: str, state: dict[str, Any], cases: Iterator[tuple[Any, str, dict[str, Any]]]
) -> None:
    """Each is one line. After all that were refused, the run is as it was, and the right state
    fits.
    """
    training, found, count = training_of(algorithm), [], 0
    before = copy.deepcopy(training.state_dict())
    for path, how, new in cases:
        count += 1
        try:
            training.load_state_dict(new)
        except cl.CurvlabError:
            continue
        except Exception as error:
            found.append((path, how, repr(error)[:80]))
        else:
            found.append((path, how, "taken"))
            training = training_of(algorithm)
    print(f"{algorithm}: {count} cases")
    assert not found, "\n".join(map(str, found))
    assert count > 50
    assert same(before, training.state_dict())
    training.load_state_dict(state)
    assert training.at.steps == 8


def test_contents_that_no_run_wrote_are_refused_and_nothing_is_taken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    state = written("adam", monkeypatch)
    # that is seen by `checkpoint.load_state`
    cases = (case for case in spoiled(state) if case[0] != ("format",))
    all_refused("adam", state, cases)


@pytest.mark.parametrize("algorithm", ["adam", "k-bfgs-l"])
def test_weights_are_put_back_where_loading_them_fails_half_way(
    algorithm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a hook of the user's model, say. What has the right shapes is copied by then."""
    state, training = written(algorithm, monkeypatch), training_of(algorithm)
    before, real, calls = copy.deepcopy(training.state_dict()), nn.Module.load_state_dict, [0]

    def half(self: nn.Module, saved: dict[str, Any], strict: bool = True) -> object:
        calls[0] += 1
        if calls[0] > 1:
            return real(self, saved, strict)
        name = next(iter(saved))
        real(self, {name: saved[name]}, strict=False)
        raise RuntimeError("a hook fails")

    monkeypatch.setattr(nn.Module, "load_state_dict", half)
    with pytest.raises(cl.CurvlabError, match="does not fit this run: a hook fails"):
        training.load_state_dict(state)
    assert same(before, training.state_dict())
    training.load_state_dict(state)
    assert training.at.steps == 8


SOME = ("k-bfgs-l", "skqn-l", "smw-gn")


@pytest.mark.wrong_shapes
@pytest.mark.parametrize(
    "algorithm", [a if a in SOME else pytest.param(a, marks=pytest.mark.slow) for a in ALGORITHMS]
)
def test_statistics_that_no_method_keeps_are_refused_and_nothing_is_taken(
    algorithm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = written(algorithm, monkeypatch)

    def cases() -> Iterator[tuple[Any, str, dict[str, Any]]]:
        for path, how, new in spoiled(state["optimizer"]["curvlab"]["descent"]["curvature"]):
            spoilt = copy.deepcopy(state)
            spoilt["optimizer"]["curvlab"]["descent"]["curvature"] = new
            yield path, how, spoilt

    all_refused(algorithm, state, cases())


# ---- locks


def hold(path: Path, told: Any) -> None:
    """A run that has forked, as a DataLoader does; its child outlives it."""
    with exclusive_lock(path):
        child = os.fork()
        if child:
            told.put(child)
        signal.pause()


def test_a_folder_in_which_another_process_writes_is_refused_and_a_killed_one_is_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    run(objective_of(net()), out)
    path, fork = out / "run.h5", multiprocessing.get_context("fork")
    told = fork.Queue()
    process = fork.Process(target=hold, args=(path, told))
    process.start()
    assert process.pid is not None
    child = told.get(timeout=60)
    try:
        said = rf"another run \(process {process.pid} on \S+ since \S+\) writes .*run\.h5"
        for resume in (False, True):
            with pytest.raises(cl.CurvlabError, match=said):
                run(objective_of(net()), out, epochs=4, resume=resume)
        with pytest.raises(cl.CurvlabError, match=said):
            cl.compare(
                objective_of(net()),
                data().batches(5),
                reference="sgd-m",
                algorithms=["adam"],
                path=path,
            )
        for words in (COMPARE, SPECTRUM, TRAIN, ["train", "--resume"]):
            assert re.search(said, refused(capsys, *words, "--out", str(out)))
    finally:
        process.kill()
        process.join()
    try:
        assert left(out) == [".run.h5.lock", "checkpoint.pt", "run.h5"]
        assert run(objective_of(net()), out, epochs=4, resume=True).dataset["epoch"][-1] == 4
        assert left(out) == ["checkpoint.pt", "run.h5"]
    finally:
        os.kill(child, signal.SIGKILL)


def start(folder: Path, seed: int, begun: Any, told: Any) -> None:
    begun.wait()
    try:
        run(objective_of(net(seed)), folder, epochs=20)
    except cl.CurvlabError as error:
        told.put(str(error))
    else:
        told.put("")


def test_of_two_that_start_at_once_one_runs(tmp_path: Path) -> None:
    fork = multiprocessing.get_context("fork")
    begun, told = fork.Barrier(2), fork.Queue()
    both = [
        fork.Process(target=start, args=(tmp_path / "run", seed, begun, told)) for seed in (3, 4)
    ]
    for process in both:
        process.start()
    said = sorted(told.get(timeout=120) for _ in both)
    for process in both:
        process.join()
    assert said[0] == ""
    assert "another run " in said[1]  # its name may not be there yet
    assert left(tmp_path / "run") == ["checkpoint.pt", "run.h5"]


def test_a_lock_is_gone_afterwards_whatever_happened(tmp_path: Path) -> None:
    for error in (KeyboardInterrupt, cl.CurvlabError, None):
        with pytest.raises(error) if error else nullcontext(), exclusive_lock(tmp_path / "run.h5"):
            assert left(tmp_path) == [".run.h5.lock"]
            with (
                pytest.raises(cl.CurvlabError, match=f"process {os.getpid()} "),
                exclusive_lock(tmp_path / "run.h5"),
            ):
                pass
            if error:
                raise error
        assert left(tmp_path) == []
        assert not lock._held


def test_a_file_system_without_locks_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unknown(descriptor: int, operation: int) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", unknown)
    with (
        pytest.warns(cl.CurvlabWarning, match="knows no locks: see to it that no two runs"),
        exclusive_lock(tmp_path / "run.h5"),
    ):
        pass
    assert left(tmp_path) == []


# ---- a log without a checkpoint


def stepless(folder: Path) -> None:
    """As an earlier version left a folder that was killed between its first log and its first
    checkpoint.
    """
    training = _training(
        objective_of(net()), data().batches(5, seed=1), data(7, 1),
        Settings.of(algorithm="k-bfgs"), Budget(3), Around(warm=(), probes={}), {}, {}, folder,
    )  # fmt: skip
    folder.mkdir()
    training._keep = lambda sound=False: None  # type: ignore[method-assign]  # nothing is kept
    with progress_bar(Console(), False) as training.bar:
        training.showing = Showing(
            training.bar, lambda line: None, training.budget, training.per_epoch
        )
        training._begin()
    assert left(folder) == ["run.h5"]


@pytest.mark.parametrize("resume", [False, True])
def test_a_run_killed_before_its_first_checkpoint_starts_anew_and_says_so(
    resume: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("curvlab.cli.train.finish", lambda *given: None)  # pictures
    straight = objective_of(net())
    logged = run(straight, None).dataset
    stepless(tmp_path / "run")
    again = objective_of(net())
    with pytest.warns(
        cl.CurvlabWarning, match="holds a log without a step and no checkpoint, .* it starts anew"
    ):
        same_log(run(again, tmp_path / "run", resume=resume).dataset, logged)
    same_weights(again.model, straight.model)
    if not resume:
        return
    stepless(tmp_path / "named")
    assert call(*TRAIN, "--resume", "--out", str(tmp_path / "named")) == 0
    assert "it starts anew" in capsys.readouterr().err
    assert cl.open(tmp_path / "named")["epoch"].values.tolist() == [0, 1]


def test_what_is_no_beginning_is_not_overwritten(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.h5").write_bytes((finished / "run.h5").read_bytes())
    with pytest.raises(cl.CurvlabError, match=r"already holds a run\.h5"):
        run(objective_of(net()), tmp_path / "run")
    with pytest.raises(cl.CurvlabError, match="there is no checkpoint"):
        run(objective_of(net()), tmp_path / "run", resume=True)
    assert "there is no checkpoint" in refused(
        capsys, "train", "--resume", "--out", str(tmp_path / "run")
    )
    stepless(tmp_path / "begun")
    assert "give --model" in refused(capsys, "train", "--resume", "--out", str(tmp_path / "begun"))
    assert "already holds a run.h5" in refused(capsys, *COMPARE, "--out", str(tmp_path / "begun"))


def test_the_first_checkpoint_comes_before_the_first_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(self: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("curvlab.logs.log.Log.save", killed)
    with pytest.raises(KeyboardInterrupt):
        run(objective_of(net()), tmp_path / "run")
    monkeypatch.undo()
    assert left(tmp_path / "run") == ["checkpoint.pt"]
    again, straight = objective_of(net(seed=9)), objective_of(net())
    same_log(run(again, tmp_path / "run", resume=True).dataset, run(straight, None).dataset)
    same_weights(again.model, straight.model)


# ---- code


def test_a_file_does_not_decide_what_is_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("curvlab.cli.train.finish", lambda *given: None)  # pictures
    monkeypatch.chdir(tmp_path)
    (tmp_path / "yours_of_storage.py").write_text(
        "from pathlib import Path\nPath('ran').touch()\nfrom curvlab.models import mlp\n\n\n"
        "def build():\n    return mlp([256, 4, 10]), 'categorical', 'mnist16'\n"
    )
    words = ["--batch-size", "20000", "--evaluate-samples", "100"]
    assert (
        call("train", "--model", "yours_of_storage:build", *words, "--epochs", "1", "--out", "run")
        == 0
    )
    (tmp_path / "ran").unlink()
    sys.modules.pop("yours_of_storage")
    state = checkpoint.load_state(tmp_path / "run" / "checkpoint.pt")
    for name in ("os:abort", "yours_of_storage:build"):
        state["settings"]["model"] = name
        checkpoint.save(tmp_path / "run" / "checkpoint.pt", state)
        line = refused(capsys, "train", "--resume", "--epochs", "2", "--out", "run")
        assert f"curvlab train --resume --model {name} --out run" in line
    assert not (tmp_path / "ran").exists()
    assert "yours_of_storage" not in sys.modules
    assert "other settings (model" in refused(
        capsys, "train", "--resume", "--model", "mlp-256-20", "--epochs", "2", "--out", "run"
    )
    assert (
        call(
            "train",
            "--resume",
            "--model",
            "yours_of_storage:build",
            "--epochs",
            "2",
            "--out",
            "run",
        )
        == 0
    )
    assert (tmp_path / "ran").exists()
    sys.modules.pop("yours_of_storage")
