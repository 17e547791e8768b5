"""Bad command lines of `hostile`: each is one line on standard error and exit code 2, or is
accepted, and none leaves a file.

They run in this process up to the point where training, drawing or writing would begin.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import hostile
import pytest
import torch
import typer
from hostile import Line, Places

import curvlab as cl
from curvlab import comparison_run, datasets, reproduction, spectrum_run, training
from curvlab.cli import app as cli
from curvlab.cli import logs
from curvlab.datasets import DataEntry, Dataset
from curvlab.logs import log

SECONDS = 20
"""What takes longer is endless."""

HERE = """
import sys
from torch import nn
broken = lambda: 1 / 0
exits = lambda: sys.exit(0)
nothing = lambda: None
three = lambda: (nn.Linear(256, 10), "categorical", 3)
untrainable = lambda: nn.Flatten()
"""


def small() -> tuple[Dataset, Dataset]:
    draw = torch.Generator().manual_seed(0)
    x, y = torch.rand(2000, 256, generator=draw), torch.randint(10, (2000,), generator=draw)
    y[:10] = torch.arange(10)
    return Dataset("mnist16", x, y, "made"), Dataset("mnist16", x[:100], y[:100], "made")


def accepted(*_: object, **__: object) -> None:
    raise typer.Exit(0)


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Places]:
    """What all lines share, with one run of `train`."""
    root = tmp_path_factory.mktemp("hostile")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(datasets.DATASETS, "mnist16", DataEntry("made", small))
        patch.setattr(
            sys,
            "argv",
            ["curvlab", "train", *hostile.MODEL, "--steps", "1", "--out", str(root / "run")],
        )
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert not ended.value.code
    yield Places(root / "places", root / "run").make()
    shutil.rmtree(root)


@pytest.fixture
def sandbox(places: Places, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with modules of a user's; what would take long is accepted instead."""
    for name, text in (
        ("here", HERE),
        ("unparsable", "def f(:"),
        ("failing", "1 / 0"),
        ("exiting", "raise SystemExit(0)"),
    ):
        (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.setitem(datasets.DATASETS, "mnist16", DataEntry("made", small))
    monkeypatch.setattr(log, "git_commit", lambda: "none")
    command = typer.main.get_command(cli.app)  # to make it takes longer than most lines
    monkeypatch.setattr(typer.main, "get_command", lambda app: command)
    for module, name in (
        (comparison_run, "compare_named"),
        (spectrum_run, "run"),
        (training.run, "run_named"),
        (logs, "write_picture"),
    ):
        monkeypatch.setattr(module, name, accepted)
    monkeypatch.setattr(cl.report.__globals__["page"].__globals__["figures"], "draw_all", accepted)
    for kind in (reproduction.Comparison, reproduction.Scaling, reproduction.Script):
        monkeypatch.setattr(kind, "run", accepted)
    return tmp_path


def tree(*roots: Path) -> dict[str, tuple[int, int]]:
    """{path: (kind, size)} of all below."""
    found = {}
    for root in roots:
        for folder, folders, files in os.walk(root):
            for name in (*folders, *files):
                seen = os.lstat(os.path.join(folder, name))
                found[os.path.join(folder, name)] = (seen.st_mode, seen.st_size)
    return found


def run(line: Line) -> int:
    """The exit code; an error of this test where it takes too long."""

    def late(*_: object) -> None:
        raise TimeoutError(f"longer than {SECONDS} s")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["curvlab", *line.words])
        for name, value in line.environment:
            patch.setenv(name, value)
        before = signal.signal(signal.SIGALRM, late)
        signal.alarm(SECONDS)
        try:
            cli.main()
        except SystemExit as ended:
            return int(ended.code or 0)
        finally:
            signal.alarm(0)
            signal.signal(signal.SIGALRM, before)
    raise AssertionError("cli.main returns nothing")


def wrong(
    line: Line, capsys: pytest.CaptureFixture[str], look: Callable[[], dict[str, tuple[int, int]]]
) -> str:
    """What the line did that it must not; empty where it did nothing wrong."""
    before = look()
    capsys.readouterr()
    code = run(line)
    out, err = capsys.readouterr()
    after = look()
    said = [text for text in err.splitlines() if text.strip()]
    if after != before:
        return f"leaves {sorted(after.items() ^ before.items())[:3]}"
    if "Traceback" in err or code not in (0, 2):
        return f"exit {code}: {err[-600:]}"
    if code == 0:
        return "is accepted" if line.refused else ""
    if (
        (len(said) != 1 and not {*hostile.OWN} & {*line.words})
        or not said[-1:]
        or not said[-1].startswith("curvlab: ")
        or out
    ):
        return f"{len(said)} lines, {len(out)} letters of output: {err[-600:]}"
    return "" if said[-1].isprintable() else f"control characters: {said[-1]!r}"


def check(
    chosen: list[Line], capsys: pytest.CaptureFixture[str], places: Places, sandbox: Path
) -> None:
    modules = set(sys.modules)
    found = []
    for line in chosen:
        said = wrong(line, capsys, lambda: tree(sandbox, places.root, places.run))
        found += [f"{line}: {said}"] if said else []
        for name in (set(sys.modules) - modules) & {"here", "unparsable", "failing", "exiting"}:
            del sys.modules[name]
    assert not found, f"{len(found)} of {len(chosen)}:\n" + "\n".join(found[:40])


@pytest.mark.filterwarnings("default::curvlab.errors.CurvlabWarning")
def test_three_hundred_bad_command_lines(
    capsys: pytest.CaptureFixture[str], places: Places, sandbox: Path
) -> None:
    everything = list(hostile.lines(places))
    chosen = random.Random(0).sample(everything, 320) + list(hostile.mixed(places, 30))
    chosen += [line for line in everything if any("taken-" in word for word in line.words)]
    check(chosen, capsys, places, sandbox)


@pytest.mark.slow
@pytest.mark.filterwarnings("default::curvlab.errors.CurvlabWarning")
def test_all_bad_command_lines(
    capsys: pytest.CaptureFixture[str], places: Places, sandbox: Path
) -> None:
    chosen = list(hostile.lines(places)) + list(hostile.mixed(places, 400))
    assert len(chosen) > 1000
    check(chosen, capsys, places, sandbox)


def test_the_generator_knows_every_option_of_every_command(places: Places) -> None:
    """A new option is tried without a new test."""
    made = {
        (line.words[0], word.partition("=")[0])
        for line in hostile.lines(places)
        for word in line.words[1:]
    }
    for command in ("compare", "spectrum", "train", "reproduce", "plot", "report"):
        for parameter in hostile.parameters(command):
            assert parameter.argument or any((command, name) in made for name in parameter.names), (
                command,
                parameter,
            )
