"""What comparing costs: together against one by one, every method's step against plain forward and
backward.

All figures are ratios of times taken in this run, side by side; run it on a quiet machine.

    python analyses/benchmarks/compare.py [--steps 300] [--repeats 30] [--skip-processes]
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import cast

import torch

import curvlab as cl
from curvlab.algorithms import ALGORITHMS
from curvlab.linalg.packed import accumulate_, output_pairs

NINE = [
    "block-fisher",
    "kfac",
    "kfac-ef",
    "tnt",
    "tnt-ef",
    "tnt-per-sample",
    "shampoo",
    "adam",
    "sgd-m",
]

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--steps", type=int, default=300)
parser.add_argument("--repeats", type=int, default=30)
parser.add_argument("--batch-size", type=int, default=1000)
parser.add_argument("--names", nargs="+", help="only these algorithms, the first as the reference")
parser.add_argument(
    "--skip-processes", action="store_true", help="only what is measured inside this process"
)
options = parser.parse_args()


def command(reference: str, others: list[str]) -> float:
    """Wall time of one `curvlab compare`, start to end."""
    with tempfile.TemporaryDirectory() as folder:
        words = ["-m", "curvlab", "compare", "--model", "mlp-256-20", "--reference", reference]
        words += ["--algorithms", ",".join(others)]
        words += [
            "--steps",
            str(options.steps),
            "--batch-size",
            str(options.batch_size),
            "--out",
            str(Path(folder) / "run"),
        ]
        start = time.perf_counter()
        subprocess.run([sys.executable, *words], check=True, capture_output=True)
        return time.perf_counter() - start


def median(function: Callable[[], object]) -> float:
    """Median seconds of a call, after one that is not counted."""
    function()
    times = []
    for _ in range(options.repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


print(
    f"{torch.get_num_threads()} threads, load {os.getloadavg()[0]:.2f}, torch {torch.__version__},"
    f" {options.steps} steps"
)

if not options.skip_processes:
    names = options.names or NINE
    first, *others = names
    together = command(first, others)
    alone = sum(command(name, []) for name in names)
    print(f"\n{len(names)} algorithms together: {together:.1f} s")
    print(
        "  together / one by one, each following itself in a command of its own:"
        f" {together / alone:.2f}"
    )

train = cl.datasets.load("mnist16")[0]
x, y = next(iter(train.batches(options.batch_size)))


def fresh() -> cl.Objective:
    return cl.Objective(cl.models.build("mlp-256-20", seed=0), cl.likelihoods.Categorical(), seed=0)


plain = median(fresh().closure(x, y))
print(f"\nplain forward + backward: {plain * 1e3:.2f} ms")
print(f"{'step / (forward + backward)':>32s}  T2 = 1  T2 = 20")
for name in options.names or ALGORITHMS:
    ratios = []
    for refresh_every in (1, 20):
        objective = fresh()
        optimizer = cl.optimizer(name, objective, lr=0.0, damping=1e-3, refresh_every=refresh_every)
        optimizer.warm_start([(x, y)])
        for _ in range(refresh_every):  # past the first T2 steps, each of which refreshes
            optimizer.step(objective.closure(x, y))
        start = time.perf_counter()
        count = max(options.repeats // 20, 1) * 20 if refresh_every > 1 else options.repeats
        for _ in range(count):
            optimizer.step(objective.closure(x, y))
        ratios.append((time.perf_counter() - start) / count / plain)
    print(f"{name:>32s}  {ratios[0]:6.2f}  {ratios[1]:7.2f}")

if options.names and "block-fisher" not in options.names:
    raise SystemExit

# The first layer's Fisher block against the floor: its floating-point operations over the
# matrix-product peak of this run.
square = torch.randn(2000, 2000)
peak = 2 * 2000**3 / median(lambda: square @ square)
a, g = x[:, (cast(torch.Tensor, train.x) != 0).any(0)], torch.randn(1, len(x), 20)
a = torch.cat([a, torch.ones(len(a), 1)], 1)
outputs, inputs = 20 * 21 // 2, a.shape[1] * (a.shape[1] + 1) // 2
packed = torch.zeros(outputs, inputs)
fold = median(lambda: accumulate_(packed, output_pairs(g), a, 0.9, 0.1 / len(a)))
rows = (g[0, :, :, None] * a[:, None, :]).flatten(1)
dense = torch.zeros(rows.shape[1], rows.shape[1])
full = median(lambda: dense.addmm_(rows.T, rows, beta=0.9, alpha=0.1 / len(a)))
del dense
matrix = rows.T @ rows / len(a) + torch.eye(rows.shape[1])
cholesky = median(lambda: torch.linalg.cholesky_ex(matrix))
print(f"\nmatrix-product peak of this run: {peak / 1e9:.0f} GFLOP/s in float32")
print(f"first layer's block, {rows.shape[1]}²: packed moving average {fold * 1e3:.0f} ms")
print(f"  packed / full symmetric product: {fold / full:.2f}")
print(f"  packed / its floor: {fold * peak / (2 * len(a) * outputs * inputs):.2f}")
print(
    f"  Cholesky {cholesky * 1e3:.0f} ms / its floor:"
    f" {cholesky * peak / (rows.shape[1] ** 3 / 3):.2f}"
)
