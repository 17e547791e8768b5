"""Workers of a sweep as forks of a process that has imported what they need."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import curvlab as cl
from curvlab.sweeps import warm

SCRIPT = """
import multiprocessing, os, signal, sys
from curvlab.sweeps import warm

def seen(sending):
    names = ("colorsys", "given", "absent_module")
    there = [name for name in names if name in sys.modules]
    handler = signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    kept = {k: os.environ.get(k) for k in ("OMP_NUM_THREADS", "PYTHONPATH", "PYTHONSAFEPATH")}
    sending.send((there, sys.modules["given"].WHO, handler, kept, os.getppid()))

if __name__ == "__main__":
    sys.path.insert(0, "first")
    warm._LIBRARIES = ("colorsys", "absent_module")
    before = dict(os.environ)
    warm.warm_up(["sweep", "--threads=3"], ["given"])
    assert dict(os.environ) == before and warm.is_warm(3) and not warm.is_warm(1)
    context = multiprocessing.get_context("forkserver")
    for _ in range(2):
        receiving, sending = context.Pipe(False)
        process = context.Process(target=seen, args=(sending,))
        process.start()
        print(*receiving.recv(), os.getpid(), sep="|")
        process.join()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere workers are new processes")
def test_workers_are_forks_of_a_process_that_has_imported(tmp_path: Path) -> None:
    """Modules come from the command's own folders, in their order, not from where it was typed."""
    (tmp_path / "first").mkdir()
    (tmp_path / "first" / "given.py").write_text("WHO = 'first'")
    (tmp_path / "given.py").write_text("WHO = 'the folder where it was typed'")
    (tmp_path / "script.py").write_text(SCRIPT)
    path = str(Path(cl.__file__).parents[1])
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONSAFEPATH", "OMP")}
    ran = subprocess.run(
        [sys.executable, "script.py"],
        cwd=tmp_path,
        env=environment | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert ran.returncode == 0, ran.stderr
    assert not ran.stderr
    rows = [line.split("|") for line in ran.stdout.splitlines()]
    kept = {"OMP_NUM_THREADS": "3", "PYTHONPATH": path, "PYTHONSAFEPATH": None}
    assert [row[:4] for row in rows] == [
        [str(["colorsys", "given"]), "first", "True", str(kept)],
    ] * 2
    assert rows[0][4] == rows[1][4] != rows[0][5], "both are the server's, not the command's"
    with pytest.raises(ProcessLookupError):
        os.kill(int(rows[0][4]), 0)


@pytest.mark.parametrize(
    "words",
    [
        ["--scheduler", "host:1"],
        ["--scheduler=host:1"],
        ["--workers", "many"],
        ["--threads", "0"],
        ["--threads"],
    ],
)
def test_nothing_is_started(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Where workers are elsewhere, or the command line says nothing that could be meant."""
    from multiprocessing import forkserver

    monkeypatch.setattr(forkserver, "ensure_running", lambda: pytest.fail("started"))
    warm.warm_up(["sweep", "train", *words], [])
    assert not warm.is_warm(1)


def test_the_last_of_a_number_counts() -> None:
    words = ["sweep", "--threads=2", "--workers", "3", "--workers", "4"]
    assert warm._number(words, "--workers", 9) == 4
    assert warm._number(words, "--threads", 9) == 2
    assert warm._number(words, "--seeds", 9) == 9
