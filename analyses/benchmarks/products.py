"""Vectors times the whole Gauss-Newton, Hessian and empirical Fisher matrix: curvlab, curvlinops,
forward + backward.

    python analyses/benchmarks/products.py [--models mlp-256-20 mnist-ae] [--examples 1000]
    [--columns 1 16] [--threads 1] [--record]

CPU seconds of one thread; with --threads wall seconds, for a quiet machine. Both libraries get the
same minibatch, weights and vectors, and their results are compared. A product's least is what its
multiplications take where the forward pass is kept: 4/3 of forward + backward for the Gauss-Newton
matrix (inputs and weights forth, inputs and weights back), as much for the empirical Fisher matrix.

curvlinops is optional: pip install --no-deps curvlinops-for-pytorch
"""

import argparse
import os
import time
from collections.abc import Callable
from importlib.util import find_spec

import torch
from recorded import record
from torch import Tensor, nn

import curvlab as cl
from curvlab.exact import Kind
from curvlab.system.memory import keep_freed_memory

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument(
    "--models", nargs="+", default=["mlp-256-20", "mnist-ae"], choices=["mlp-256-20", "mnist-ae"]
)
parser.add_argument("--examples", type=int, default=1000)
parser.add_argument("--columns", type=int, nargs="+", default=[1, 16])
parser.add_argument("--threads", type=int, default=1)
parser.add_argument("--record", action="store_true", help="write results/products.json")
options = parser.parse_args()
KINDS: tuple[Kind, ...] = ("ggn", "hessian", "ef")


def seconds(function: Callable[..., object], repeats: int = 5) -> float:
    """Least seconds of a call, after one that is not counted."""
    clock = time.process_time if options.threads == 1 else time.perf_counter
    function()
    times = []
    for _ in range(repeats):
        start = clock()
        function()
        times.append(clock() - start)
    return min(times)


def problem(name: str) -> tuple[cl.Objective, Tensor, Tensor, nn.Module]:
    """Random data of the model's shape, and the loss as torch has it: sums over outputs and
    examples.
    """
    model, generator = cl.models.build(name, seed=0), torch.Generator().manual_seed(0)
    if name == "mnist-ae":
        x = torch.rand(options.examples, 784, generator=generator).pow(4)
        return (
            cl.Objective(model, cl.likelihoods.Bernoulli()),
            x,
            x,
            nn.BCEWithLogitsLoss(reduction="sum"),
        )
    x, y = (
        torch.rand(options.examples, 256, generator=generator),
        torch.randint(10, (options.examples,), generator=generator),
    )
    return (
        cl.Objective(model, cl.likelihoods.Categorical()),
        x,
        y,
        nn.CrossEntropyLoss(reduction="sum"),
    )


def theirs(
    kind: str, objective: cl.Objective, x: Tensor, y: Tensor, loss: nn.Module
) -> Callable[[Tensor], Tensor]:
    """Columns in the order of the parameters one after the other → N times the product."""
    import curvlinops

    operators = {
        "ggn": curvlinops.GGNLinearOperator,
        "hessian": curvlinops.HessianLinearOperator,
        "ef": curvlinops.EFLinearOperator,
    }
    weights = list(objective.parameters.values())
    operator = operators[kind](objective.model, loss, weights, [(x, y)], check_deterministic=False)
    return lambda v: operator @ v


rows: list[list[str | float | None]] = []


def run(name: str) -> None:
    objective, x, y, loss = problem(name)
    base = seconds(lambda: objective.closure(x, y)())
    size = len(objective.layout)
    print(f"\n{name}, {size} parameters, N = {len(x)}: forward + backward {1e3 * base:.1f} ms")
    print(f"  {'matrix':<9}{'vectors':>8}{'ms':>10}{'× f+b a vector':>16}{'curvlinops / ours':>19}")
    theirs_first = torch.cat([places.flatten() for places in objective.layout.places().values()])
    for kind in KINDS:
        ours = cl.exact.product(objective, x, y, kind)
        peer = theirs(kind, objective, x, y, loss) if find_spec("curvlinops") else None
        for columns in options.columns:
            v = torch.randn(size, columns, generator=torch.Generator().manual_seed(0))
            taken = seconds(lambda ours=ours, v=v: ours @ v)
            ratio = ""
            if peer is not None:
                w = v[theirs_first]
                found, expected = (ours @ v)[theirs_first], peer(w) / len(x)
                error = float((found - expected).norm() / expected.norm())
                assert error < 1e-4, f"{name}, {kind}: relative error {error:.2g}"
                ratio = f"{seconds(lambda peer=peer, w=w: peer(w)) / taken:>19.2f}"
            took, a_vector = round(1e3 * taken, 2), round(taken / base / columns, 2)
            rows.append([name, kind, columns, took, a_vector, float(ratio) if ratio else None])
            print(
                f"  {kind:<9}{columns:>8}{1e3 * taken:>10.1f}"
                f"{taken / base / columns:>16.2f}{ratio}",
                flush=True,
            )


torch.set_num_threads(options.threads)
keep_freed_memory()
what = (
    "CPU time of one thread" if options.threads == 1 else f"wall time of {options.threads} threads"
)
print(f"{what}, load {os.getloadavg()[0]:.2f}, torch {torch.__version__}")
for model in options.models:
    run(model)
if options.record:
    heads = ["model", "matrix", "vectors"]
    columns = [*heads, "ms", "× forward + backward a vector", "curvlinops / ours"]
    record("products", f"A product of a matrix with vectors, {what}", columns, rows, heads=3)
