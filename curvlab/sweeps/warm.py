"""Workers of this machine as forks of one process, which has imported all that a point needs.

The command starts that process (the server of `multiprocessing`) before its own imports, so that
both import at once, each on a core; a worker, also one in the place of another that died, then
begins in no time. By `curvlab.sweep` the process is the user's, and workers are new processes.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

_ASKED = "CURVLAB_WARM"
"""Variable of the environment that tells the server what to import."""

_LIBRARIES = ("distributed", "torch", "xarray", "h5netcdf", "dask.array", "torch._dynamo")
"""What dask's worker and the first run of a process import besides, in the order of need."""

_COUNTS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")

_threads: int | None = None


def worker_environment(threads: int) -> dict[str, str]:
    """Return the variables with which a worker's process must begin.

    A point runs in a thread of the worker. The memory that the C library would give such a thread
    comes from the system and goes back to it several times in each point, a page at a time
    (100 000 pages, 0.1 s, in a run of a second), unless there is one arena and it keeps a part.

    Args:
        threads: of numpy's and torch's libraries.
    """
    memory = {
        "MALLOC_ARENA_MAX": "1",
        "MALLOC_MMAP_THRESHOLD_": f"{32 << 20}",  # bytes, the most that glibc takes
        "MALLOC_TRIM_THRESHOLD_": f"{256 << 20}",
    }
    mine = {name: os.environ.get(name, value) for name, value in memory.items()}
    return dict.fromkeys(_COUNTS, str(threads)) | mine


def warm_up(words: Sequence[str], modules: Sequence[str]) -> None:
    """Start the server where the command line asks for workers of this machine, on Linux.

    What is wrong with the command line is not said here: a number that is none starts nothing.

    Args:
        words: of the command line.
        modules: which the server imports after the libraries.
    """
    global _threads
    # elsewhere a fork of a process that has imported numpy is not safe; without the variable that
    # names the folders of modules the server could import others than this process
    if sys.platform != "linux" or sys.flags.ignore_environment or _threads is not None:
        return
    if any(word.partition("=")[0] == "--scheduler" for word in words):
        return
    folders = [os.path.abspath(folder) for folder in sys.path]
    try:
        workers = _number(words, "--workers", cores())
        threads = _number(words, "--threads", max(1, cores() // max(1, workers)))
    except ValueError:
        return
    if threads < 1 or any(os.pathsep in folder for folder in folders):
        return
    from multiprocessing import forkserver, resource_tracker

    paths = {"PYTHONPATH": os.pathsep.join(folders), "PYTHONSAFEPATH": "1"}
    asked = {
        "modules": [*_LIBRARIES, *modules],
        "of": os.getpid(),
        "before": {name: os.environ.get(name) for name in paths},
    }
    variables = worker_environment(threads) | paths | {_ASKED: json.dumps(asked)}
    with suppress(OSError):  # then workers are new processes
        resource_tracker.ensure_running()  # which else the server's start does, and lets Ctrl-C in
        with _set(variables), _held_back():
            forkserver.set_forkserver_preload([__name__])
            forkserver.ensure_running()
        _threads = threads
        atexit.register(_end)


def is_warm(threads: int) -> bool:
    """Return whether the server was started for workers of so many threads."""
    return _threads == threads


def cores() -> int:
    """Return the cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _number(words: Sequence[str], option: str, default: int) -> int:
    """Return the number that a command line gives for an option, the last one.

    Raises:
        ValueError: it is no number.
    """
    found = default
    for word, following in zip(words, [*words[1:], ""], strict=True):
        name, equals, value = word.partition("=")
        if name == option:
            found = int(value if equals else following)
    return found


@contextmanager
def _set(variables: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ |= variables
    try:
        yield
    finally:
        _restore(before)


def _restore(before: Mapping[str, str | None]) -> None:
    for name, value in before.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


@contextmanager
def _held_back() -> Iterator[None]:
    """Hold Ctrl-C back inside, and in the process that begins there until it ignores it."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def _end() -> None:
    """End the server, whose workers are gone by now, and have its CPU time counted as ours.

    It ends by itself where the command is killed: by the end of a pipe.
    """
    from multiprocessing import forkserver

    pid = getattr(getattr(forkserver, "_forkserver", None), "_forkserver_pid", None)
    if pid is not None:
        with suppress(OSError):  # it has ended
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def _serve(asked: Mapping[str, Any]) -> None:
    """Import what workers will need, in the server.

    What cannot be imported is said by the worker that needs it. Nothing is computed: a process that
    has begun threads cannot be forked.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    _restore(asked["before"])
    for name in asked["modules"]:
        if os.getppid() != asked["of"]:
            os._exit(0)  # the command has ended
        with suppress(Exception):
            importlib.import_module(name)
    # what is here stays: a worker's collections of garbage need not go through it
    gc.collect()
    gc.freeze()


if _ASKED in os.environ:
    _serve(json.loads(os.environ.pop(_ASKED)))
