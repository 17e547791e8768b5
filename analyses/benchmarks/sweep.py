"""What a sweep costs beside its points: 200 runs of a second on 2 workers, over the ideal.

    python analyses/benchmarks/sweep.py [--points 200] [--workers 2] [--seconds 1]

First the same command runs in as many processes at once, one after another, each process warm: that
is the time of a run by hand without its imports. The ideal of the sweep is the number of points
times that, over the number of workers. Then comes the sweep as typed, from the start of the command
to its end: imports, start of the workers, scheduling, reading of the logs, figure and page. Goal:
at most 1.15 of the ideal.
"""

import argparse
import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--points", type=int, default=200)
parser.add_argument("--workers", type=int, default=2)
parser.add_argument("--seconds", type=float, default=1.0, help="of a run")
parser.add_argument("--alone", type=int, default=15, help="runs of each process for the ideal")

RUN = ["--model", "mlp-256-20", "--evaluate-samples", "1000", "--device", "cpu"]


def one(folder: Path, steps: int, number: int) -> float:
    """Return the seconds of one run in this process."""
    from curvlab.cli.point import work
    from curvlab.sweeps.points import Task

    words = ("train", *RUN, "--steps", str(steps), "--lr", f"{0.001 + number * 1e-5:g}")
    begun = time.perf_counter()
    outcome = work(Task(words, str(folder / f"{os.getpid()}-{steps}-{number}"), 1, "x", "."))
    assert outcome.state == "done", outcome
    return time.perf_counter() - begun


def calibrated(folder: Path, seconds: float) -> int:
    """Return the steps of a run that takes so many seconds."""
    one(folder, 5, 0)
    short, long = (min(one(folder, steps, i) for i in (1, 2)) for steps in (5, 45))
    return max(1, round(5 + (seconds - short) * 40 / max(long - short, 1e-6)))


def alone(folder: Path, steps: int, count: int, together: Any, results: Any) -> None:
    """Put the seconds of some runs, after one that is not counted, while the others run theirs."""
    one(folder, steps, 0)
    together.wait()
    results.put([one(folder, steps, i) for i in range(1, count + 1)])


def main() -> None:
    options = parser.parse_args()
    os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    with TemporaryDirectory() as made:
        folder = Path(made)
        steps = calibrated(folder, options.seconds)
        spawn = multiprocessing.get_context("spawn")
        together, results = spawn.Barrier(options.workers), spawn.Queue()
        arguments = (folder, steps, options.alone, together, results)
        processes = [spawn.Process(target=alone, args=arguments) for _ in range(options.workers)]
        for process in processes:
            process.start()
        times = [t for _ in processes for t in results.get()]
        for process in processes:
            process.join()
        run = sum(times) / len(times)
        print(f"a run of {steps} steps in a warm process, {options.workers} at once: {run:.3f} s")
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
    ideal = options.points * run / options.workers
    print(f"sweep of {options.points} points: {wall:.1f} s, ideal {ideal:.1f} s")
    print(f"until the first point has ended {at[0]:.1f} s, after the last {wall - at[-1]:.1f} s")
    print(f"ratio {wall / ideal:.3f}")


if __name__ == "__main__":
    main()
