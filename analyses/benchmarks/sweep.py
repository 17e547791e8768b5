"""What a sweep costs beside its points: 200 runs of a second on 2 workers, over the ideal.

    python analyses/benchmarks/sweep.py [--points 200] [--workers 2] [--seconds 1]

Before and after it the same command runs in as many processes at once, one after another, each
process warm: that is the time of a run by hand without its imports. The ideal of the sweep is the
number of points times that, over the number of workers. The sweep is as typed, from the start of
the command to its end: imports, start of the workers, scheduling, reading of the logs, figure and
page. Goal: at most 1.15 of the ideal. On a machine with other jobs the ratio of CPU seconds says
what a sweep adds, but for its waits.
"""

import argparse
import multiprocessing
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

assert __doc__
parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--points", type=int, default=200)
parser.add_argument("--workers", type=int, default=2)
parser.add_argument("--seconds", type=float, default=1.0, help="of a run")
parser.add_argument("--alone", type=int, default=15, help="runs of each process for the ideal")

RUN = ["--model", "mlp-256-20", "--evaluate-samples", "1000", "--device", "cpu"]


def one(folder: Path, steps: int, number: int) -> tuple[float, float]:
    """Return the wall and CPU seconds of one run in this process."""
    from curvlab.cli.point import work
    from curvlab.sweeps.points import Task

    words = ("train", *RUN, "--steps", str(steps), "--lr", f"{0.001 + number * 1e-5:g}")
    begun, cpu = time.perf_counter(), time.process_time()
    outcome = work(Task(words, str(folder / f"{os.getpid()}-{steps}-{number}"), 1, "x", "."))
    assert outcome.state == "done", outcome
    return time.perf_counter() - begun, time.process_time() - cpu


def calibrated(folder: Path, seconds: float) -> int:
    """Return the steps of a run that takes so many CPU seconds, which another job changes less."""
    one(folder, 5, 0)
    short, long = (min(one(folder, steps, i)[1] for i in (1, 2)) for steps in (5, 45))
    return max(1, round(5 + (seconds - short) * 40 / max(long - short, 1e-6)))


def alone(folder: Path, steps: int, count: int, together: Any, results: Any) -> None:
    """Put the seconds of some runs, after one that is not counted, while the others run theirs."""
    one(folder, steps, 0)
    together.wait()
    results.put([one(folder, steps, i) for i in range(1, count + 1)])


def by_hand(folder: Path, steps: int, options: argparse.Namespace) -> tuple[float, float]:
    """Return the mean wall and CPU seconds of a run, in as many processes as there are workers."""
    spawn = multiprocessing.get_context("spawn")
    together, results = spawn.Barrier(options.workers), spawn.Queue()
    arguments = (folder, steps, options.alone, together, results)
    processes = [spawn.Process(target=alone, args=arguments) for _ in range(options.workers)]
    for process in processes:
        process.start()
    times = [t for _ in processes for t in results.get()]
    for process in processes:
        process.join()
    wall, cpu = (sum(column) / len(times) for column in zip(*times, strict=True))
    return wall, cpu


def main() -> None:
    options = parser.parse_args()
    os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    with TemporaryDirectory() as made:
        folder = Path(made)
        steps = calibrated(folder, options.seconds)
        before = by_hand(folder / "before", steps, options)
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        others = used.ru_utime + used.ru_stime
        rates = ",".join(f"{0.001 + i * 1e-5:g}" for i in range(options.points))
        command = [sys.executable, "-m", "curvlab", "sweep", "train", *RUN, "--steps", str(steps)]
        command += ["--grid", f"lr={rates}", "--workers", str(options.workers), "--threads", "1"]
        begun = time.perf_counter()
        with subprocess.Popen(
            [*command, "--out", str(folder / "sweep")],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        ) as sweep:
            assert sweep.stderr is not None
            at = [time.perf_counter() - begun for line in sweep.stderr if "/" in line]
        wall = time.perf_counter() - begun
        assert sweep.returncode == 0
        spent = resource.getrusage(resource.RUSAGE_CHILDREN)
        after = by_hand(folder / "after", steps, options)
    run, cpu = ((a + b) / 2 for a, b in zip(before, after, strict=True))
    print(f"a run of {steps} steps in a warm process, {options.workers} at once, wall s (CPU s):")
    print("; ".join(f"{wall:.3f} ({busy:.3f})" for wall, busy in (before, after)))
    ideal, busy = options.points * run / options.workers, spent.ru_utime + spent.ru_stime - others
    print(f"sweep of {options.points} points: {wall:.1f} s, ideal {ideal:.1f} s")
    print(f"until the first point has ended {at[0]:.1f} s, after the last {wall - at[-1]:.1f} s")
    print(f"ratio {wall / ideal:.3f}; of CPU seconds {busy / (options.points * cpu):.3f}")


if __name__ == "__main__":
    main()
