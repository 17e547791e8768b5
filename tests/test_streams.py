"""Standard output and error that are closed, full, end early, lack letters or are odd terminals: no
traceback, no work lost.
"""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from test_cli import call
from test_signals import RUN, small  # a fixture  # noqa: F401

import curvlab as cl
from curvlab import starting
from curvlab.system.streams import Output, unfailing

FULL = Path("/dev/full")
needs_full = pytest.mark.skipif(not FULL.exists(), reason="no /dev/full on this system")
LISTED = ["list", "schedules"]
RESULTS = [["--version"], ["-h"], ["train", "-h"], LISTED]


@contextmanager
def to(out: str | int, err: str | int | None = None, encoding: str = "utf-8") -> Iterator[None]:
    """This process's standard output, and error, on other files."""
    made = [None if where is None else open(where, "w", encoding=encoding) for where in (out, err)]  # noqa: SIM115
    before = sys.stdout, sys.stderr
    try:
        sys.stdout, sys.stderr = (new or old for new, old in zip(made, before, strict=True))
        yield
    finally:
        sys.stdout, sys.stderr = before
        for stream in made:
            if stream is not None:
                stream.close()  # raises where something is in it still


@contextmanager
def ended_pipe() -> Iterator[int]:
    """The end to write to of a pipe whose reader has gone."""
    reader, writer = os.pipe()
    os.close(reader)
    yield writer


@needs_full
@pytest.mark.parametrize("words", RESULTS, ids=" ".join)
def test_a_full_device_is_one_line_where_what_is_printed_is_the_result(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with to(str(FULL)):
        assert call(*words) == 2
    assert (
        capsys.readouterr().err
        == "curvlab: standard output cannot be written: No space left on device\n"
    )


@needs_full
def test_a_run_on_a_full_device_writes_its_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with to(str(FULL)):
        assert call(*RUN, "--out", str(tmp_path / "run")) == 0
    said = capsys.readouterr().err.splitlines()
    assert said[-1] == "curvlab: standard output cannot be written: No space left on device"
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == [
        "checkpoint.pt",
        "run.h5",
        "training.png",
        "training.svg",
    ]
    with to(str(FULL)):
        assert call("plot", str(tmp_path / "run")) == 2


@needs_full
def test_nothing_can_be_said_where_both_are_full(tmp_path: Path) -> None:
    with to(str(FULL), str(FULL)):
        assert call(*RUN, "--out", str(tmp_path / "run")) == 0
    with to(str(FULL), str(FULL)):
        assert call(*LISTED) == 2
    with to(str(FULL), str(FULL)):
        assert call("train", "--nonsense") == 2


@pytest.mark.parametrize("words", RESULTS, ids=" ".join)
def test_a_pipe_that_ends_is_no_error(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with ended_pipe() as writer, to(writer):
        assert call(*words) == 0
    assert capsys.readouterr().err == ""


def test_a_run_into_a_pipe_that_ends_goes_on(tmp_path: Path) -> None:
    """As ``2>&1 | head``."""
    with ended_pipe() as writer, ended_pipe() as other, to(writer, other):
        assert call(*RUN, "--out", str(tmp_path / "run")) == 0
    assert cl.open(tmp_path / "run")["epoch"].values.tolist() == [0, 1, 2]
    assert (tmp_path / "run" / "training.svg").exists()


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_other_encodings_get_replacements(encoding: str, tmp_path: Path) -> None:
    for i, words in enumerate(
        (
            *RESULTS,
            [*RUN, "--out", str(tmp_path / "é"), "--steps", "2"],
            ["plot", str(tmp_path / "é")],
        )
    ):
        out, err = tmp_path / f"{i}.out", tmp_path / f"{i}.err"
        with to(str(out), str(err), encoding):
            assert call(*words) == 0
        assert out.read_bytes()
    with to(str(out), str(err), encoding):
        assert call("train", "--model", "λ") == 2
    assert err.read_bytes().decode(encoding).startswith("curvlab: unknown model '?'")


def test_boxes_are_plain_where_there_are_no_lines_to_draw_them(tmp_path: Path) -> None:
    with to(str(tmp_path / "out"), encoding="ascii"):
        assert call(*LISTED) == 0
    said = (tmp_path / "out").read_text("ascii")
    assert "| constant" in said


def test_a_stream_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As Python has it for a descriptor that is closed when it starts."""
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", None)
        patch.setattr(sys, "stderr", None)
        assert call(*LISTED) == 0
        assert call("list", "nothing") == 2
        assert call(*RUN, "--out", str(tmp_path / "run")) == 0
    assert (tmp_path / "run" / "training.png").exists()


@pytest.mark.parametrize(
    ("term", "columns"),
    [("dumb", "1"), ("no-such-terminal", "7"), ("", "0"), ("xterm", "-3"), ("vt52", "x")],
)
def test_odd_terminals_and_widths(
    term: str,
    columns: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("TERM", term)
    monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.setenv("LINES", columns)
    for words in (*RESULTS, [*RUN, "--steps", "1", "--out", str(tmp_path / "run")]):
        assert call(*words) == 0
    err = capsys.readouterr().err
    assert [line for line in err.splitlines() if not line.startswith("epoch ")] == []
    assert call("list", "nothing") == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


# ---- the streams themselves


def test_an_output_says_why_it_failed_and_takes_the_rest() -> None:
    with ended_pipe() as writer:
        output = Output(writer)
        assert output.write(b"abc") == 3
        assert output.error == ""  # a pipe that ends is no failure
        assert output.write(b"d") == 1
        os.close(writer)
    closed = Output(writer)
    assert closed.write(b"abc") == 3
    assert "descriptor" in closed.error


def test_a_pipe_that_does_not_block_is_waited_for() -> None:
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    child = os.fork()
    if not child:
        os.close(writer)
        total = 0
        while part := os.read(reader, 1 << 16):
            total += len(part)
        os._exit(total == 1_000_000)
    os.close(reader)
    text = io.TextIOWrapper(io.BufferedWriter(Output(writer)))
    text.write("x" * 1_000_000)
    text.flush()
    os.close(writer)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1


def test_streams_of_tests_and_notebooks_stay_as_they_are() -> None:
    held = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", held)
        with unfailing() as output:
            assert sys.stdout is held
        assert output is None


# ---- real processes


def run(command: str, cwd: Path, **more: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "CURVLAB": f"{sys.executable} -m curvlab", **more}
    return subprocess.run(
        ["sh", "-c", command], capture_output=True, text=True, env=environment, cwd=cwd, timeout=120
    )


def test_a_process_with_head_closed_streams_and_a_backend_that_is_not_there(tmp_path: Path) -> None:
    """What no test within this process shows: the interpreter's own exit, and what it does at the
    start.
    """
    done = run(
        "{ $CURVLAB list options; echo code $? >&2; } | head -1",
        tmp_path,
        MPLBACKEND="nosuch",
        PYTHONIOENCODING="ascii",
    )
    assert done.stderr == "code 0\n"
    assert len(done.stdout.splitlines()) == 1
    words = (
        "train --model mlp-256-20 --batch-size 6000 --algorithm sgd-m --steps 2 --evaluate-samples"
        " 100 --out run"
    )
    done = run(
        f"$CURVLAB {words} >&- 2>&-", tmp_path, MPLBACKEND="nosuch", PYTHONUTF8="0", LC_ALL="C"
    )
    assert done.returncode == 0
    assert (done.stdout, done.stderr) == ("", "")
    assert len(cl.open(tmp_path / "run")["epoch"]) == 2  # the log has not got what was said
    assert (tmp_path / "run" / "training.png").read_bytes().startswith(b"\x89PNG")


def test_closed_descriptors_are_taken_before_files_get_them() -> None:
    script = (
        "import os; from curvlab import starting; starting.begin(); print(os.fstat(2).st_rdev =="
        " os.stat('/dev/null').st_rdev)"
    )
    source = Path(starting.__file__)
    script = f"import runpy; found = runpy.run_path({str(source)!r}); import os; found['begin']()\n"
    script += "print(os.fstat(2).st_rdev == os.stat(os.devnull).st_rdev)"
    done = subprocess.run(
        ["sh", "-c", f'exec "$0" -c "{script}" 2>&-', sys.executable],
        capture_output=True,
        text=True,
    )
    assert done.stdout == "True\n"


@pytest.mark.parametrize(
    ("words", "command"),
    [
        (["-m", "curvlab", "list"], True),
        (["-mcurvlab"], True),
        (["/usr/bin/curvlab", "train"], True),
        (["-m", "pytest", "curvlab"], False),
        (["train.py", "curvlab"], False),
        (["-c"], False),
    ],
)
def test_only_the_command_is_begun_as_one(
    words: list[str], command: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = words[0].startswith("-m")
    rest = words[2 if words[0] == "-m" else 1 :]
    monkeypatch.setattr(sys, "orig_argv", ["python", *words])
    monkeypatch.setattr(sys, "argv", ["-m" if module else words[0], *rest])
    assert starting.is_command() is command
