"""Ctrl-C and a cluster's signals, in every phase of a short run: one line, exit code 128 + n,
nothing lost or half written.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from test_cli import call
from test_cli_train import PROBED
from test_train import same_log, same_weights
from torch import nn

import curvlab as cl
from curvlab import datasets, models
from curvlab.cli import app as cli
from curvlab.cli import terminal
from curvlab.datasets import DataEntry, Dataset
from curvlab.errors import CurvlabError, Diverged
from curvlab.logs import log
from curvlab.models import MODELS
from curvlab.show import drawable, figures
from curvlab.system import atomic, interrupt
from curvlab.system.interrupt import LISTENER, SIGNALS, Interrupted, listening
from curvlab.training import checkpoint, evaluation, loop

RUN = [
    "train",
    "--model",
    "small",
    "--algorithm",
    "k-bfgs-20",
    "--lr",
    "0.1",
    "--damping",
    "0.3",
    "--batch-size",
    "10",
]
RUN += ["--epochs", "2", "--probe", "loss:1"]
COMPARE = [
    "compare",
    "--model",
    "small",
    "--reference",
    "kfac",
    "--algorithms",
    "sgd-m",
    "--batch-size",
    "10",
    "--steps",
    "6",
]
SPECTRUM = [
    "spectrum",
    "--model",
    "small",
    "--samples",
    "20",
    "--batch-size",
    "10",
    "--after",
    "0,2,4",
]
NUMBERS = [pytest.param(n, id=signal.Signals(n).name) for n in SIGNALS]


def by_signal(
    what: str, values: Sequence[Any], ids: Sequence[str] | None = None
) -> pytest.MarkDecorator:
    """Each of `values` with SIGTERM and with one of the other signals in turn; with the rest when
    slow.
    """
    others = [n for n in SIGNALS if n != signal.SIGTERM]
    cases = []
    for i, value in enumerate(values):
        for n in SIGNALS:
            slow = n not in (signal.SIGTERM, others[i % len(others)])
            name = f"{ids[i] if ids else value}-{signal.Signals(n).name}"
            cases.append(pytest.param(value, n, id=name, marks=[pytest.mark.slow] if slow else []))
    return pytest.mark.parametrize((what, "number"), cases)


@pytest.fixture(autouse=True)
def heard() -> Iterator[None]:
    """Whoever starts the tests in the background has them ignore some signals."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    for number in before:
        signal.signal(
            number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
        )
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model with dropout and a data set of four minibatches; pictures are empty."""

    def load() -> tuple[Dataset, Dataset]:
        draw = torch.Generator().manual_seed(0)
        x, y = torch.randn(40, 6, generator=draw), torch.randint(3, (40,), generator=draw)
        return Dataset("made", x, y, "made"), Dataset("made", x[:20], y[:20], "made")

    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Dropout(0.2), nn.Linear(5, 3))

    monkeypatch.setitem(datasets.DATASETS, "made", DataEntry("made", load))
    monkeypatch.setitem(MODELS, "small", replace(MODELS["mlp-256-20"], build=build, data="made"))
    monkeypatch.setattr(figures, "draw", lambda ds, name: Figure())
    monkeypatch.setattr(drawable, "picture", lambda figure, form, **options: b"drawn")
    monkeypatch.setattr(log, "git_commit", lambda: "")


def sending(
    patch: pytest.MonkeyPatch,
    owner: object,
    name: str,
    at: int,
    *numbers: int,
    where: Callable[..., bool] = lambda *_, **__: True,
) -> list[int]:
    """Send these signals to this process at call number `at`, from 1, of a function. How often it
    was called.
    """
    real, calls = getattr(owner, name), [0]

    def called(*words: object, **more: Any) -> object:
        if where(*words, **more):
            calls[0] += 1
            if calls[0] == at:
                for number in numbers:
                    os.kill(os.getpid(), number)
        return real(*words, **more)

    patch.setattr(owner, name, called)
    return calls


def ended(capsys: pytest.CaptureFixture[str], code: int, *words: str) -> str:
    """Run what a signal ends: its exit code, and its one line, which is returned."""
    capsys.readouterr()
    before = {n: signal.getsignal(n) for n in SIGNALS}
    assert call(*words) == code
    _, err = capsys.readouterr()
    assert "Traceback" not in err
    said = [line for line in err.splitlines() if not line.startswith("epoch ")]
    assert len(said) == 1, err
    assert said[0].startswith("curvlab: interrupted")
    assert {n: signal.getsignal(n) for n in SIGNALS} == before
    return said[0]


def parts(folder: Path) -> list[str]:
    """What is left that is no whole file."""
    return (
        [p.name for p in folder.rglob("*") if p.name.endswith((".part", ".lock"))]
        if folder.exists()
        else []
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What is never interrupted; made with the first test."""
    return tmp_path_factory.mktemp("whole") / "run"


def same_end(out: Path, whole: Path) -> None:
    """Gone on with, it is the run that never stopped."""
    if not whole.exists():
        assert call(*RUN, "--out", str(whole)) == 0
    resume = ["train", "--resume"] if (out / "checkpoint.pt").exists() else RUN
    assert call(*resume, "--out", str(out)) == 0
    same_log(cl.open(out), cl.open(whole))
    one, two = (checkpoint.load_state(folder / "checkpoint.pt")["model"] for folder in (out, whole))
    assert all(torch.equal(p, two[name]) for name, p in one.items())
    assert not parts(out)


def is_step(self: object, x: object, y: object = None, stream: str = "step") -> bool:
    return stream == "step"


# ---- train


@pytest.mark.thinned(2)
@pytest.mark.parametrize(
    ("number", "step"), [*((n, 3) for n in SIGNALS), *((signal.SIGTERM, n) for n in (1, 4, 6, 8))]
)
def test_a_signal_in_a_step_loses_no_step(
    number: int, step: int, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also in the last one of an epoch, and of the run."""
    out = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        sending(patch, cl.Objective, "closure", step, number, where=is_step)
        said = ended(capsys, 128 + number, *RUN, "--out", str(out))
    name = "" if number == signal.SIGINT else f" by {signal.Signals(number).name}"
    assert (
        said == f"curvlab: interrupted{name}; the log so far is saved in {out / 'run.h5'}; "
        f"go on with: curvlab train --resume --out {out}"
    )
    assert not parts(out)
    assert checkpoint.load_state(out / "checkpoint.pt")["position"]["steps"] == step
    same_end(out, whole)


EARLY: dict[str, tuple[object, str, int]] = {
    "model and data, first of all": (models, "find", 1),
    "data": (datasets, "load", 1),
    "model": (models.ModelEntry, "made", 1),
    "epoch 0, training examples": (evaluation, "measured", 1),
    "epoch 0, test examples": (evaluation, "measured", 2),
    "warm start": (loop.Training, "_begin", 1),
    "warm start, its second minibatch": (cl.Objective, "closure", 2),
}


@by_signal("phase", list(EARLY))
def test_a_signal_before_the_first_record_leaves_nothing(
    phase: str, number: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        calls = sending(patch, *EARLY[phase], number)
        said = ended(capsys, 128 + number, *RUN, "--out", str(out))
    assert calls[0] >= EARLY[phase][2]
    assert "saved" not in said
    assert not out.exists() or not any(out.iterdir())


LATER: dict[str, tuple[object, str, int, int]] = {
    "evaluation, epoch 1": (evaluation, "measured", 3, 4),
    "evaluation, epoch 2, test examples": (evaluation, "measured", 6, 8),
    "the record of an epoch": (loop.Training, "_record", 2, 4),
    "a checkpoint": (torch, "save", 2, 4),
    "a checkpoint, before it is in place": (os, "replace", 3, 4),
    "a checkpoint, half-written": (atomic.Sealing, "write", 137, 4),
    "a log, before it is in place": (os, "replace", 1, 0),
}
"""{phase: (owner, function, call, steps that must be in the checkpoint)}"""


@pytest.mark.thinned(2)
@by_signal("phase", list(LATER))
def test_a_signal_between_steps(
    phase: str, number: int, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    owner, name, at, steps = LATER[phase]
    with pytest.MonkeyPatch.context() as patch:
        sending(patch, owner, name, at, number)
        ended(capsys, 128 + number, *RUN, "--out", str(out))
    assert not parts(out)
    assert len(cl.open(out)["epoch"]) >= 1
    assert checkpoint.load_state(out / "checkpoint.pt")["position"]["steps"] == steps
    if number == signal.SIGTERM:
        same_end(out, whole)


DRAWING = [
    (figures, "draw", 1),
    (drawable, "picture", 2),
    (os, "replace", "last"),
    (terminal, "show", 1),
]


@pytest.mark.thinned(2)
@pytest.mark.parametrize(
    ("phase", "number"),
    [*((DRAWING[0], n) for n in SIGNALS), *((phase, signal.SIGTERM) for phase in DRAWING[1:])],
    ids=lambda p: p[1] if isinstance(p, tuple) else p.name,
)
def test_a_signal_while_the_pictures_are_drawn(
    phase: tuple[Any, ...],
    number: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "run"
    owner, name, at = phase
    if at == "last":
        monkeypatch.setattr(
            terminal,
            "rewrite",
            lambda path, write: (os.kill(os.getpid(), number), write(path)),  # type: ignore[func-returns-value]  # for its effect
        )
    else:
        sending(monkeypatch, owner, name, at, number)
    said = ended(capsys, 128 + number, *RUN, "--out", str(out))
    if name != "show":
        assert (
            f"the run is done and saved in {out / 'run.h5'}; draw it with: curvlab plot {out}"
            in said
        )
    assert not parts(out)
    assert cl.open(out)["epoch"].values.tolist() == [0, 1, 2]


SECOND: dict[str, tuple[object, str, int]] = {
    "the same step": (loop.Training, "_watch", 3),
    "the checkpoint": (torch, "save", 2),
    "the checkpoint, half-written": (atomic.Sealing, "write", 137),
    "before the checkpoint is on the disk": (os, "fsync", 5),
    "before the checkpoint is in place": (os, "replace", 3),
    "before the log is in place": (os, "replace", 4),
    "the line": (terminal.err, "print", 2),
}


@pytest.mark.thinned(2)
@pytest.mark.parametrize("phase", SECOND)
def test_a_second_signal_comes_at_once_and_leaves_nothing_half_written(
    phase: str, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    pairs = ((signal.SIGINT, signal.SIGINT), (signal.SIGUSR1, signal.SIGTERM))
    first, second = pairs[list(SECOND).index(phase) % 2]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interrupt, "SAME", 0.0)
        sending(patch, cl.Objective, "closure", 3, first, where=is_step)
        sending(patch, *SECOND[phase], second)
        code = 128 + (first if phase == "the line" else second)
        ended(capsys, code, *RUN, "--out", str(out))
    assert not parts(out)
    assert checkpoint.load_state(out / "checkpoint.pt")["position"]["steps"] in (0, 3)
    same_end(out, whole)


def test_a_signal_at_any_write_of_a_checkpoint_is_one_still(tmp_path: Path) -> None:
    """torch's writer raises an error of its own in its place, unless nothing of a record is written
    yet.
    """
    state = {"a": torch.randn(100), "b": [torch.randn(3)] * 2, "c": 1}
    for n in range(1, 25):
        with pytest.MonkeyPatch.context() as patch, interrupt.listening():
            patch.setattr(interrupt, "SAME", 0.0)
            sending(patch, atomic.Sealing, "write", n, signal.SIGTERM)
            with pytest.raises(Interrupted, match="SIGTERM"):
                checkpoint.save(tmp_path / "checkpoint.pt", state)
        assert not any(tmp_path.iterdir())


def test_a_full_disk_after_a_signal_is_a_full_disk(tmp_path: Path) -> None:
    """The state is saved while the signal is at work, and what fails then is no signal."""

    def save() -> None:
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            checkpoint.save(tmp_path / "nowhere" / "checkpoint.pt", {"c": 1})

    with pytest.raises(cl.CurvlabError, match="cannot be written: No such file"):
        save()


def test_signals_that_come_together_are_one(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A scheduler and srun both send one; a key is held: the step is finished, and saved."""
    out = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        sending(
            patch, cl.Objective, "closure", 3, *[signal.SIGTERM] * 3, signal.SIGINT, where=is_step
        )
        ended(capsys, 143, *RUN, "--out", str(out))
    assert checkpoint.load_state(out / "checkpoint.pt")["position"]["steps"] == 3
    same_end(out, whole)


def at_call(n: int, number: int, twice: int = 0) -> Callable[[FrameType, str, object], None]:
    """A profiler that sends the signal at Python's n-th call of a function, and once more so many
    calls later.
    """
    count = [0]

    def seen(frame: FrameType, event: str, argument: object) -> None:
        if event == "call":
            count[0] += 1
            if count[0] == n or (twice and count[0] == n + twice):
                os.kill(os.getpid(), number)

    seen.count = count  # type: ignore[attr-defined]  # read by the test
    return seen


def test_signals_at_calls_all_over_a_run(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Wherever Python is: parsing, building, stepping, writing, drawing; once, or twice in a row,
    each a request of its own.
    """
    same_end(tmp_path / "0", whole)
    count = at_call(0, 0)
    sys.setprofile(count)
    try:
        assert call(*RUN, "--out", str(tmp_path / "counted")) == 0
    finally:
        sys.setprofile(None)
    calls, draw, codes = count.count[0], np.random.default_rng(3), set()  # type: ignore[attr-defined]  # see `seen`
    for i, n in enumerate(np.linspace(20, calls, 9).astype(int)):
        number, twice = SIGNALS[i % len(SIGNALS)], int(10 ** draw.uniform(0, 3.5)) if i % 2 else 0
        out = tmp_path / f"{i + 1}"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(interrupt, "SAME", 0.0)
            capsys.readouterr()
            profile = at_call(int(n), number, twice)
            real = cli._ended

            def profiled(
                words: list[str], real: Callable[..., int] = real, profile: Any = profile
            ) -> int:
                sys.setprofile(profile)
                try:
                    return real(words)
                finally:
                    sys.setprofile(None)

            patch.setattr(cli, "_ended", profiled)
            code = call(*RUN, "--out", str(out))
        said = [
            line for line in capsys.readouterr().err.splitlines() if not line.startswith("epoch ")
        ]
        assert code in (0, 128 + number), (n, twice, said)
        assert len(said) == (code != 0), (n, twice, said)
        assert not [p for p in parts(out) if p.endswith(".part")], (n, twice)
        codes.add(code)
        if (out / "checkpoint.pt").exists() and i % 3 == 0:
            same_end(out, whole)
    assert codes >= {128 + n for n in SIGNALS}


# ---- how signals are given back


def test_ctrl_c_that_python_drops_at_the_end_ends_what_it_was_meant_for() -> None:
    """Neither what this process does next, nor is it lost; where the command has ended, it is."""

    class Thing:
        """What a weak reference can point to."""

    def cleared(_: object) -> None:
        raise KeyboardInterrupt

    for deaf in (False, True):
        thing = Thing()
        watch = weakref.ref(thing, cleared)
        with nullcontext() if deaf else pytest.raises(KeyboardInterrupt), listening() as listener:
            del thing
            listener.deaf = deaf
        time.sleep(0.05)  # a hundredth of a second is when it would come again
        assert watch() is None


def test_a_signal_while_handlers_are_given_back_leaves_none_behind(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = {number: signal.getsignal(number) for number in SIGNALS}
    real = signal.signal

    def signalled(number: int, handler: Any) -> Any:
        if handler is before[signal.SIGINT]:  # the first of all
            os.kill(os.getpid(), signal.SIGTERM)
        return real(number, handler)

    with pytest.raises(Interrupted), listening():
        monkeypatch.setattr(signal, "signal", signalled)
    monkeypatch.undo()
    assert {number: signal.getsignal(number) for number in SIGNALS} == before


# ---- the other commands


@by_signal("command", [(COMPARE, 3, 3), (SPECTRUM, 3, 2)], ids=["compare", "spectrum"])
def test_the_others_save_what_is_logged(
    command: tuple[list[str], int, int],
    number: int,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A step of a comparison is finished; of spectra those of all states that were reached."""
    words, at, logged = command
    out = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        sending(patch, cl.Objective, "closure", at, number, where=is_step)
        said = ended(capsys, 128 + number, *words, "--out", str(out))
    assert f"the log so far is saved in {out / 'run.h5'}" in said
    assert len(cl.open(out)["step"]) == logged
    assert not parts(out)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGXCPU])
def test_reproduce_goes_on(number: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "reproduce",
        "figure-2.2",
        "--budget",
        "smoke",
        "--out",
        str(tmp_path / "out"),
        "--runs",
        str(tmp_path / "runs"),
    ]
    with pytest.MonkeyPatch.context() as patch:
        sending(patch, cl.Objective, "closure", 2, number, where=is_step)
        capsys.readouterr()
        assert call(*words) == 128 + number
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("curvlab")]
    assert len(said) == 1
    assert said[0].endswith("; the same command goes on")
    assert not parts(tmp_path)


# ---- in Python


def data() -> Dataset:
    return datasets.DATASETS["made"].load()[0]


def objective() -> cl.Objective:
    torch.manual_seed(3)
    return cl.Objective(models.build("small"), cl.likelihoods.Categorical(), seed=1)


@pytest.mark.thinned(2)
@pytest.mark.parametrize("number", NUMBERS)
def test_in_python_it_is_an_exception_and_the_run_goes_on(number: int, tmp_path: Path) -> None:
    more: dict[str, Any] = {"epochs": 2, "algorithm": "adam"}
    expected = objective()
    with_nothing = cl.train(expected, data().batches(10, seed=1), **more).dataset
    before = {n: signal.getsignal(n) for n in SIGNALS}
    with pytest.MonkeyPatch.context() as patch:
        sending(patch, cl.Objective, "closure", 3, number, where=is_step)
        one = objective()
        with pytest.raises(KeyboardInterrupt) as caught:
            cl.train(one, data().batches(10, seed=1), folder=tmp_path, **more)
    assert isinstance(caught.value, Interrupted) is (number != signal.SIGINT)
    assert interrupt.number_of(caught.value) == number
    assert {n: signal.getsignal(n) for n in SIGNALS} == before
    assert checkpoint.load_state(tmp_path / "checkpoint.pt")["position"]["steps"] == 3
    again = objective()
    run = cl.train(again, data().batches(10, seed=1), folder=tmp_path, resume=True, **more)
    same_log(run.dataset, with_nothing)
    same_weights(again.model, expected.model)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_handler_of_the_users_is_left_alone(number: int) -> None:
    heard: list[int] = []
    before = signal.signal(number, lambda number, frame: heard.append(number))
    try:
        with pytest.MonkeyPatch.context() as patch:
            sending(patch, cl.Objective, "closure", 2, number, where=is_step)
            cl.train(objective(), data().batches(10, seed=1), epochs=1, algorithm="sgd-m")
    finally:
        signal.signal(number, before)
    assert heard == [number]


def test_what_is_ignored_stays_so_as_under_nohup(tmp_path: Path) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with pytest.MonkeyPatch.context() as patch:
            sending(patch, cl.Objective, "closure", 2, signal.SIGHUP, where=is_step)
            assert call(*RUN, "--out", str(tmp_path / "run")) == 0
    finally:
        signal.signal(signal.SIGHUP, before)


def test_in_another_thread_nothing_is_touched() -> None:
    before = {n: signal.getsignal(n) for n in SIGNALS}
    seen: list[object] = []

    def work() -> None:
        with interrupt.shielded() as shield, shield:
            seen.append({n: signal.getsignal(n) for n in SIGNALS})

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before]


def test_a_forked_child_dies_of_a_signal_as_ever() -> None:
    """Pools and loaders end their processes so; forked within a step, a child must not wait for its
    end.
    """
    with interrupt.shielded() as shield, shield:
        child = os.fork()
        if not child:
            time.sleep(30)
            os._exit(0)
        time.sleep(0.05)
        os.kill(child, signal.SIGTERM)
        assert os.waitpid(child, 0)[1] == signal.SIGTERM


def test_what_a_loader_draws_belongs_to_the_step(tmp_path: Path) -> None:
    """A signal while a minibatch is loaded that takes random numbers: gone on with, the same
    bits.
    """

    class Noisy:
        def __init__(self, kill: bool) -> None:
            self.kill, self.passes = kill, 0

        def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
            self.passes += 1
            for i, (x, y) in enumerate(data().batches(10, seed=1)):
                x = x + torch.randn(())
                if i == 2 and self.kill and self.passes == 3:  # after a glance and an evaluation
                    os.kill(os.getpid(), signal.SIGTERM)
                yield x + torch.randn(()), y

        def __len__(self) -> int:
            return 4

    def run(kill: bool, **more: Any) -> cl.Objective:
        one = objective()
        cl.train(one, Noisy(kill), epochs=2, algorithm="adam", **more)
        return one

    expected = run(False)
    with pytest.raises(Interrupted):
        run(True, folder=tmp_path)
    assert checkpoint.load_state(tmp_path / "checkpoint.pt")["position"]["steps"] == 3
    same_weights(run(False, folder=tmp_path, resume=True).model, expected.model)


def test_a_shield_waits_for_its_block() -> None:
    done = []

    def block(shield: interrupt.Shield) -> None:
        with shield:
            os.kill(os.getpid(), signal.SIGTERM)
            done.append(1)

    with interrupt.shielded() as shield, pytest.raises(Interrupted, match="SIGTERM"):
        block(shield)
    assert done
    assert not shield.broken
    assert LISTENER.shield is None


def test_a_signal_comes_after_the_error_that_ended_its_block() -> None:
    """At the end of the next block, or of all; once, with the error as its cause."""
    error, done = ValueError("of the block"), []

    def fail(shield: interrupt.Shield) -> None:
        with shield:
            os.kill(os.getpid(), signal.SIGTERM)
            raise error

    def handle(shield: interrupt.Shield) -> None:
        with pytest.raises(ValueError, match="of the block"):
            fail(shield)
        done.append("handled")
        with shield:
            done.append("another block")

    for work in (fail, handle):
        with pytest.raises(Interrupted, match="SIGTERM") as raised, interrupt.shielded() as shield:
            work(shield)
        assert raised.value.__cause__ is error
    assert done == ["handled", "another block"]

    with pytest.raises(ValueError, match="of the block"), interrupt.shielded() as shield, shield:
        raise error
    with pytest.raises(Interrupted) as raised, interrupt.shielded() as shield, shield:
        os.kill(os.getpid(), signal.SIGTERM)
    assert raised.value.__cause__ is None


def test_a_second_signal_that_breaks_the_block_is_the_one_that_is_raised() -> None:
    def twice(shield: interrupt.Shield) -> None:
        with shield:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1.5 * interrupt.SAME)
            os.kill(os.getpid(), signal.SIGHUP)

    with pytest.raises(Interrupted, match="SIGHUP") as raised, interrupt.shielded() as shield:
        twice(shield)
    assert raised.value.__cause__ is None


FAILING: dict[str, tuple[list[str], Callable[[], Exception], str]] = {
    "train diverges": (
        RUN,
        lambda: Diverged("made to"),
        "curvlab: diverged in epoch 1 after 2 steps: made",
    ),
    "compare diverges": (
        COMPARE,
        lambda: Diverged("made to"),
        "curvlab: the reference kfac left the finite range at step 2: made to",
    ),
    "bad input": (RUN, lambda: CurvlabError("bad in every way"), "curvlab: bad in every way"),
    "an error of the user's": (RUN, lambda: KeyError("mine"), "curvlab: your own code failed"),
}


@pytest.mark.thinned(2)
@by_signal("what", list(FAILING))
def test_a_signal_in_a_step_that_fails_is_its_exit_code_and_both_are_said(
    what: str,
    number: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Slurm and shells see the signal; a user reads what went wrong, and where the log is."""
    command, make, first = FAILING[what]
    error = make()
    real, calls = cl.Objective.closure, [0]

    def closure(self: cl.Objective, x: Any, y: Any = None, stream: Any = "step") -> object:
        calls[0] += stream == "step"
        if stream == "step" and calls[0] == 3:
            os.kill(os.getpid(), number)
            raise error
        return real(self, x, y, stream)

    monkeypatch.setattr(cl.Objective, "closure", closure)
    out = tmp_path / "run"
    before = {n: signal.getsignal(n) for n in SIGNALS}
    assert call(*command, "--out", str(out)) == 128 + number
    assert {n: signal.getsignal(n) for n in SIGNALS} == before
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("curvlab: ")]
    assert len(said) == 2, said
    assert said[0].startswith(first)
    assert said[1].startswith("curvlab: interrupted")
    assert f"the log so far is saved in {out / 'run.h5'}" in said[1]
    assert ("stopped" in cl.open(out).attrs) is isinstance(error, Diverged)
    assert not parts(out)


def test_in_python_the_signal_has_the_divergence_as_its_cause(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The last good weights are back by then."""
    one = objective()
    start = [p.clone() for p in one.parameters.values()]

    def step(self: object, closure: object) -> None:
        with torch.no_grad():
            for p in one.parameters.values():
                p.fill_(torch.nan)
        os.kill(os.getpid(), signal.SIGTERM)
        raise Diverged("made to")

    monkeypatch.setattr("curvlab.optim.Optimizer.step", step)
    with pytest.raises(Interrupted) as raised:
        cl.train(one, data().batches(10, seed=1), algorithm="adam")
    assert isinstance(raised.value.__cause__, Diverged)
    assert str(raised.value.__cause__).startswith("diverged in epoch 1 after 0 steps: made to")
    assert all(map(torch.equal, one.parameters.values(), start))


# ---- real processes


def start(*words: str, cwd: Path | None = None, **more: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **more}
    return subprocess.Popen(
        [sys.executable, "-m", "curvlab", *words],
        stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, cwd=cwd,
    )  # fmt: skip


def script() -> list[str]:
    """The installed command."""
    return [str(Path(sys.executable).with_name("curvlab"))]


@pytest.mark.parametrize(
    ("number", "moment"), [(signal.SIGINT, 0.15), (signal.SIGTERM, 0.5), (signal.SIGINT, 0.9)]
)
def test_while_importing(number: int, moment: float) -> None:
    """From the console script and from ``-m``; twice within 20 ms."""
    command = (
        script()
        if moment == 0.5 and Path(*script()).exists()
        else [sys.executable, "-m", "curvlab"]
    )
    with subprocess.Popen(
        [*command, "plot", "nowhere"], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        time.sleep(moment)
        process.send_signal(number)
        time.sleep(0.01)
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert err.splitlines() in (
        ["curvlab: interrupted; nothing has run yet"],
        # where the machine is so fast that the run has begun, in the words of a run
        ["curvlab: interrupted" if number == signal.SIGINT else "curvlab: interrupted by SIGTERM"],
    )


OWN = """import os, signal
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.steps = nn.Linear(256, 10), 0

    def forward(self, x):
        self.steps += self.training
        if self.steps == 25 and "NUMBER" in os.environ:
            os.kill(os.getpid(), int(os.environ["NUMBER"]))
        return self.layer(x)
"""


@pytest.mark.slow
def test_a_real_process_that_slurm_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGTERM, then what the line says: the same run as one that never stopped."""
    (tmp_path / "own_of_slurm.py").write_text(OWN)
    model = ["--model", "own_of_slurm:Net"]
    words = [
        "train",
        *model,
        "--data",
        "mnist16",
        "--batch-size",
        "2000",
        "--algorithm",
        "sgd-m",
        "--epochs",
        "2",
    ]
    words += ["--evaluate-samples", "1000", "--out", "run"]
    with start(*words, cwd=tmp_path, NUMBER=str(int(signal.SIGTERM))) as process:
        out, err = process.communicate(timeout=120)
    assert process.returncode == 143, err
    assert out == ""
    resume = ["train", "--resume", *model, "--out", "run"]
    said = (
        "curvlab: interrupted by SIGTERM; the log so far is saved in run/run.h5; go on with:"
        " curvlab "
    )
    assert err.splitlines()[-1] == said + " ".join(resume)
    # a look ahead is no step
    assert checkpoint.load_state(tmp_path / "run" / "checkpoint.pt")["position"]["steps"] in (
        24,
        25,
    )
    monkeypatch.chdir(tmp_path)
    assert call(*resume) == 0
    assert call(*words[:-1], "whole") == 0
    same_log(cl.open(tmp_path / "run"), cl.open(tmp_path / "whole"))


COUNTED = """import os
from curvlab.probes.base import Variable, probe
from torch import nn

VARIABLES = {"counted": Variable((), "step", "1")}

@probe("counted", "writes down every step", VARIABLES, where=("train",), moment="after")
def counted(frame):
    with open("steps", "a") as file:
        file.write(f"{frame.step}\\n")
    return [float(frame.step)]

def build():
    return nn.Sequential(
        nn.Linear(256, 16), nn.Tanh(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 10)
    )
"""


@pytest.mark.slow
def test_sigkill_and_sigterm_at_a_hundred_random_moments_each(tmp_path: Path) -> None:
    """With all probes: log and checkpoint open after each, every run ends to the bit, and after
    SIGTERM no step is lost.

    So many of each as CURVLAB_KILLS says.
    """
    wanted = int(os.environ.get("CURVLAB_KILLS", "100"))
    (tmp_path / "own.py").write_text(COUNTED)
    model = ["--model", "own:build"]
    first = [
        *[word for word in PROBED if word not in ("--model", "own:build")],
        *model,
        "--probe",
        "counted:1",
    ]
    whole = tmp_path / "whole"
    with start(*first, "--out", str(whole), cwd=tmp_path) as process:
        _, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    last = cl.open(whole).isel(epoch=-1)
    lasts = float(last["wall_seconds"] + last["probe_seconds"])
    draw, done = np.random.default_rng(2), {signal.SIGKILL: 0, signal.SIGTERM: 0}
    runs = 0
    while min(done.values()) < wanted:
        out = tmp_path / str(runs)
        runs += 1
        (tmp_path / "steps").write_text("")
        for life in range(20):
            number = (
                min(done, key=lambda n: done[n])
                if life % 2
                else (signal.SIGKILL, signal.SIGTERM)[runs % 2]
            )
            there = (out / "checkpoint.pt").exists()
            words = ["train", "--resume", *model] if there else first
            with start(*words, "--out", str(out), cwd=tmp_path) as process:
                stamp = (out / "checkpoint.pt").stat().st_mtime_ns if there else 0
                while process.poll() is None and not has_written(out / "checkpoint.pt", stamp):
                    time.sleep(0.002)
                time.sleep(draw.uniform(0, 0.15 * lasts))
                alive = process.poll() is None
                process.send_signal(number)
                _, err = process.communicate(timeout=120)
            if process.returncode == 0:
                break
            assert process.returncode == (-number if number == signal.SIGKILL else 128 + number), (
                err
            )
            assert "Traceback" not in err
            position = checkpoint.load_state(out / "checkpoint.pt")["position"]
            if (out / "run.h5").exists():
                assert len(cl.open(out)["epoch"]) >= 1
            else:  # killed between the run's first checkpoint and its first log
                assert number == signal.SIGKILL
                assert not there
                assert position["steps"] == 0
            if number == signal.SIGTERM:
                said = [line for line in err.splitlines() if not line.startswith("epoch ")]
                assert len(said) == 1, err
                assert not parts(out)
                steps = (tmp_path / "steps").read_text().split()
                assert position["steps"] == (int(steps[-1]) + 1 if steps else 0)
            done[number] += alive
        else:
            with start("train", "--resume", *model, "--out", str(out), cwd=tmp_path) as process:
                _, err = process.communicate(timeout=600)
            assert process.returncode == 0, err
        assert not parts(out)
        same_log(cl.open(out), cl.open(whole))
        one, two = (
            checkpoint.load_state(folder / "checkpoint.pt")["model"] for folder in (out, whole)
        )
        assert all(torch.equal(p, two[name]) for name, p in one.items())
        print(
            f"run {runs}: {done[signal.SIGKILL]} SIGKILLs and {done[signal.SIGTERM]} SIGTERMs"
            " so far",
            flush=True,
        )


def has_written(path: Path, stamp: int) -> bool:
    """Whether a process has written a checkpoint of its own."""
    return path.exists() and path.stat().st_mtime_ns != stamp
