"""The engine of a sweep: dask.distributed, which this module alone imports.

Workers are those of a cluster of this machine's cores, which is made for the sweep, or of a
scheduler that is there already. The files of the points say what is done, so that the engine may
begin a point again, or be another one the next time.
"""

from __future__ import annotations

import importlib
import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from curvlab.errors import CurvlabError, cause_of
from curvlab.sweeps.points import Outcome, Task
from curvlab.sweeps.standing import ATTEMPTS, KILLED, attempts
from curvlab.sweeps.warm import is_warm, worker_environment

CONNECT = 5.0
"""Seconds for a scheduler to answer; with the imports before it the line comes within ten."""

LOOK = 2.0
"""Seconds between looks at the workers while no point ends."""

Work = Callable[[Task], Outcome]


class Engine(Protocol):
    """What carries out points."""

    def outcomes(self, tasks: Mapping[str, Task], work: Work) -> Iterator[tuple[str, Outcome]]:
        """Yield {name: task}'s names with their outcomes, as they come.

        Raises:
            CurvlabError: there is nothing that carries them out.
        """
        ...


@dataclass(frozen=True)
class Inline:
    """An engine that is this process: a point after the other."""

    def outcomes(self, tasks: Mapping[str, Task], work: Work) -> Iterator[tuple[str, Outcome]]:
        """Yield names with their outcomes, in the order of the tasks."""
        for name, task in tasks.items():
            yield name, work(task)


@dataclass(frozen=True)
class Dask:
    """The engine by dask.distributed.

    Args:
        workers: of the cluster of this machine.
        threads: of each, for what is not torch's (torch's are set for each point).
        scheduler: address of a scheduler that is there, or a file that names it; None: a cluster of
            this machine.
        say: is told a line that a user should see.
    """

    workers: int
    threads: int
    scheduler: str | None = None
    say: Callable[[str], None] = lambda line: None

    def outcomes(self, tasks: Mapping[str, Task], work: Work) -> Iterator[tuple[str, Outcome]]:
        """Yield names with their outcomes, as they come; a point whose worker dies comes again.

        Raises:
            CurvlabError: dask.distributed is not installed; nothing answers at the scheduler's
                address; the scheduler goes away; its workers cannot import curvlab.
        """
        distributed = distributed_module()
        with ExitStack() as stack:
            stack.enter_context(_quiet())
            client, see_to_workers = stack.enter_context(
                _existing(distributed, self.scheduler, self.say)
                if self.scheduler is not None
                else _local(distributed, self.workers, self.threads)
            )
            yield from self._as_they_come(distributed, client, see_to_workers, tasks, work)

    def _as_they_come(
        self,
        distributed: Any,
        client: Any,
        see_to_workers: Callable[[], None],
        tasks: Mapping[str, Task],
        work: Work,
    ) -> Iterator[tuple[str, Outcome]]:
        names = list(tasks)
        keys = [_key(tasks[name], name) for name in names]
        futures = client.map(work, list(tasks.values()), key=keys, pure=False, retries=0)
        of = {future.key: name for future, name in zip(futures, names, strict=True)}
        again = dict.fromkeys(names, 0)
        done: queue.SimpleQueue[Any] = queue.SimpleQueue()
        for future in futures:
            future.add_done_callback(done.put)
        while len(of):
            try:
                future = done.get(timeout=LOOK)
            except queue.Empty:
                see_to_workers()
                continue
            name = of.pop(future.key)
            found = _outcome(distributed, future, self.scheduler)
            if found is not None:
                yield name, found
            elif attempts(Path(tasks[name].folder), tasks[name].start) < ATTEMPTS > again[name]:
                # dask counts a worker's death against all that the worker was given; the point's
                # own count says whether it was begun
                again[name] += 1
                key = _key(tasks[name], f"{name}-again-{again[name]}")
                new = client.submit(work, tasks[name], key=key, pure=False, retries=0)
                of[new.key] = name
                futures.append(new)  # one that nobody holds is forgotten
                new.add_done_callback(done.put)
            else:
                yield name, Outcome("killed", KILLED)


def _key(task: Task, name: str) -> str:
    """Return a name of a task at the scheduler, which no earlier start of the sweep has used."""
    return f"curvlab-{task.start}-{name}"


def _outcome(distributed: Any, future: Any, scheduler: str | None) -> Outcome | None:
    """Return what a task returned; None where its worker died too often for dask.

    Raises:
        CurvlabError: the scheduler has gone, or the worker cannot run what it was sent.
    """
    if future.status in ("cancelled", "lost"):
        raise CurvlabError(
            f"the scheduler{f' at {scheduler}' if scheduler else ''} has gone: what is done stays;"
            " start it, and go on with the same command"
        )
    error = future.exception() if future.status == "error" else None
    if error is None:
        found: Outcome = future.result()
        return found
    if isinstance(error, distributed.KilledWorker):
        return None
    if isinstance(error, ImportError):
        raise CurvlabError(
            f"the workers cannot import what a point needs ({cause_of(error)}): install the same"
            " curvlab where they run"
        ) from error
    return Outcome("failed", f"{type(error).__name__}: {cause_of(error)}")


def distributed_module() -> Any:
    """Return the module `distributed`.

    Raises:
        CurvlabError: it is not installed; the line names the extra that brings it.
    """
    try:
        return importlib.import_module("distributed")
    except ImportError as error:
        raise CurvlabError(
            f"a sweep needs dask.distributed ({cause_of(error)}): pip install 'curvlab[sweep]'"
        ) from error


@contextmanager
def _existing(
    distributed: Any, address: str, say: Callable[[str], None]
) -> Iterator[tuple[Any, Callable[[], None]]]:
    """Yield a client of a scheduler that is there, and what says that it has no workers."""
    where: dict[str, Any] = (
        {"scheduler_file": address} if Path(address).is_file() else {"address": address}
    )
    try:
        client = _within(
            CONNECT + 1, lambda: distributed.Client(**where, timeout=CONNECT, set_as_default=False)
        )
    except Exception as error:  # dask raises OSError, ValueError and what a comm of its own does
        raise CurvlabError(
            f"no scheduler answers at {address} ({_brief(error)}): start one with `dask scheduler`,"
            " or leave --scheduler out"
        ) from error
    there = [True]

    def see_to_workers() -> None:
        before, there[0] = there[0], bool(client.scheduler_info()["workers"])
        if before and not there[0]:
            say(f"the scheduler at {address} has no worker: waiting for one")

    try:
        yield client, see_to_workers
    finally:
        client.close(timeout=5)


def _within(seconds: float, make: Callable[[], Any]) -> Any:
    """Return what `make` returns; what answers without a word holds up dask's own timeouts.

    Raises:
        TimeoutError: it takes longer.
    """
    made: queue.SimpleQueue[tuple[Any, Exception | None]] = queue.SimpleQueue()

    def run() -> None:
        try:
            made.put((make(), None))
        except Exception as error:
            made.put((None, error))

    threading.Thread(target=run, daemon=True).start()
    try:
        found, error = made.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError(f"no answer within {seconds:g} s") from None
    if error is not None:
        raise error
    return found


@contextmanager
def _local(
    distributed: Any, workers: int, threads: int
) -> Iterator[tuple[Any, Callable[[], None]]]:
    """Yield a client of a cluster of this machine, which ends with it, and what revives workers."""
    dask = importlib.import_module("dask")
    settings = {
        "distributed.worker.daemon": False,  # so that a DataLoader may have workers of its own
        "distributed.scheduler.worker-ttl": None,  # a point may hold the GIL as long as it likes
        "distributed.scheduler.allowed-failures": 10 * ATTEMPTS,  # the points count for themselves
        "distributed.scheduler.worker-saturation": 1.0,  # a worker that dies holds its point alone
        "distributed.worker.profile.enabled": False,
        # what watches over the event loops takes as much of the cores as the scheduling does
        "distributed.admin.tick.interval": "5s",
        "distributed.admin.system-monitor.interval": "60s",
        "distributed.scheduler.work-stealing": False,  # no worker holds more than it computes
        "distributed.scheduler.active-memory-manager.start": False,
        "distributed.nanny.pre-spawn-environ": worker_environment(threads),
        "distributed.worker.multiprocessing-method": "forkserver" if is_warm(threads) else "spawn",
        "distributed.comm.timeouts.connect": "60s",  # of workers that import torch meanwhile
    }
    with dask.config.set(settings):
        try:
            cluster = distributed.LocalCluster(
                n_workers=workers,
                threads_per_worker=1,
                processes=True,
                host="127.0.0.1",
                dashboard_address="127.0.0.1:0",
                memory_limit=0,
                silence_logs=logging.CRITICAL,
                preload=["curvlab.sweeps.worker"],
            )
        except Exception as error:  # what a process that does not start raises
            raise CurvlabError(
                f"the workers cannot be started ({_brief(error)}); a script that calls cl.sweep"
                ' does so under `if __name__ == "__main__":`'
            ) from error
        try:
            with distributed.Client(cluster, set_as_default=False) as client:
                yield client, _reviver(cluster)
        finally:
            cluster.close(timeout=10)


def _reviver(cluster: Any) -> Callable[[], None]:
    """Return what starts workers anew whose nanny has not: one that died as it began."""
    dead: set[Any] = set()

    async def begin(nanny: Any) -> None:
        await nanny.instantiate()

    def revive() -> None:
        now = {name for name, nanny in cluster.workers.items() if not nanny.is_alive()}
        for name in now & dead:  # since the last look: no nanny takes so long by itself
            with suppress(Exception):  # it is tried again at the next look
                cluster.sync(begin, cluster.workers[name], callback_timeout=60)
        dead.clear()
        dead.update(now)

    return revive


@contextmanager
def _quiet() -> Iterator[None]:
    """Let dask say nothing inside: what a user should know of a point stands in its row."""
    loud = ("distributed", "asyncio", "tornado")
    names = {*loud, *logging.root.manager.loggerDict}  # dask gives some a level of their own
    loggers = [logging.getLogger(n) for n in sorted(names) if n.partition(".")[0] in loud]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


def _brief(error: BaseException) -> str:
    return cause_of(error) or type(error).__name__


def new_start() -> str:
    """Return a word for this start of a sweep, unlike any other's."""
    return f"{os.getpid():x}-{time.time_ns():x}"
