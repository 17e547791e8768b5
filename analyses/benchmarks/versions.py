"""Two versions of curvlab side by side: a step of every method, the exact blocks and per-sample
gradients, as ratios new / old.

    git worktree add ../curvlab-old <commit>
    python analyses/benchmarks/versions.py --old ../curvlab-old [--models mlp-256-20 mnist-ae]
    [--names NAME …] [--rounds 12] [--processes 3] [--record]

One process a version, both alive at once; they take turns, a few steps each, so that what else the
machine does meets both alike. CPU seconds of one thread, and of each version the fastest turn of
several pairs of processes, begun one after the other: two processes of one version differ by up to
a third, by where their memory lies.
"""

import argparse
import gc
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, cast

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--old", type=Path, help="a checkout of the other version")
parser.add_argument("--models", nargs="+", default=["mlp-256-20", "mnist-ae"])
parser.add_argument(
    "--names", nargs="+", help="of methods, and of exact:KIND, gradients; all where none is given"
)
parser.add_argument("--rounds", type=int, default=12)
parser.add_argument("--processes", type=int, default=3, help="of each version")
parser.add_argument("--batch-size", type=int, default=1000)
parser.add_argument("--record", action="store_true", help="write results/versions.json")
parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
options = parser.parse_args()

KINDS = ("ggn", "hessian", "pi", "fisher", "fisher-mc", "ef")
TURN = 0.15  # seconds, about
NARROW = 100  # examples of an autoencoder's exact block


def serve() -> None:
    """Answer lines: `list` → names; `make MODEL NAME` → steps of a turn; `go STEPS` → CPU seconds
    of a step.
    """
    import torch

    import curvlab as cl
    from curvlab.algorithms import ALGORITHMS

    try:
        from curvlab.system.memory import keep_freed_memory
    except ModuleNotFoundError:  # an older version
        from curvlab.memory import keep_freed_memory  # type: ignore[import-untyped, no-redef]  # its place then

    torch.set_num_threads(1)
    keep_freed_memory()
    step: Callable[[int], object] = lambda i: None  # noqa: E731

    def make(model: str, name: str) -> Callable[[int], object]:
        torch.manual_seed(0)
        autoencoder = model.endswith("-ae")
        likelihood = cl.likelihoods.Bernoulli() if autoencoder else cl.likelihoods.Categorical()
        objective = cl.Objective(cl.models.build(model, seed=0), likelihood)
        width = objective.blocks[0].shape[1] - 1
        x = torch.rand(
            4, options.batch_size, width, generator=torch.Generator().manual_seed(0)
        ).pow(4)
        y = (
            x
            if autoencoder
            else torch.randint(10, x.shape[:2], generator=torch.Generator().manual_seed(1))
        )
        if name == "gradients":
            return lambda i: cl.exact.gradients(objective, x[i % 4], y[i % 4])
        if name.startswith("exact:"):
            narrow = [b.name for b in objective.blocks if b.shape[0] * b.shape[1] < 1000]
            if autoencoder:  # its narrowest block alone, 7,530 wide, of fewer examples
                narrow = [min(objective.blocks, key=lambda b: b.shape[0] * b.shape[1]).name]
                x, y = x[:, :NARROW], y[:, :NARROW]
            kind = cast(Any, name.removeprefix("exact:"))
            return lambda i: cl.exact.matrices(objective, x[i % 4], y[i % 4], kind, narrow)
        optimizer = cl.optimizer(name, objective, lr=1e-7)
        return lambda i: optimizer.step(objective.closure(x[i % 4], y[i % 4]))

    for line in sys.stdin:
        verb, *rest = line.split()
        if verb == "list":
            print(*ALGORITHMS, flush=True)
        elif verb == "make":
            step = make(*rest)
            for i in range(6):
                step(i)
            start = time.process_time()
            for i in range(4):
                step(i)
            print(4 * max(1, round(TURN / max(1e-9, time.process_time() - start))), flush=True)
        else:
            gc.collect()
            count, start = int(rest[0]), time.process_time()
            for i in range(count):
                step(i)
            print((time.process_time() - start) / count, flush=True)


class Version:
    """A process that serves one checkout."""

    def __init__(self, checkout: Path) -> None:
        command = [sys.executable, __file__, "--serve", "--batch-size", str(options.batch_size)]
        here = os.environ | {"PYTHONPATH": str(checkout.resolve())}
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=here,
            cwd=checkout,
        )

    def ask(self, line: str) -> str:
        cast(IO[str], self.process.stdin).write(line + "\n")
        cast(IO[str], self.process.stdin).flush()
        answer = cast(IO[str], self.process.stdout).readline()
        if not answer:
            raise SystemExit(f"{self.process.args!r} ended: {line}")
        return answer.strip()


def fastest(pair: list[Version], model: str, name: str) -> list[float]:
    """Seconds of a step in the fastest turn of each of two processes."""
    count = min(int(version.ask(f"make {model} {name}")) for version in pair)
    times: list[list[float]] = [[], []]
    for turn in range(options.rounds):
        for i in (0, 1) if turn % 2 else (1, 0):
            times[i].append(float(pair[i].ask(f"go {count}")))
    return [min(each) for each in times]


def main() -> None:
    if options.old is None:
        parser.error("--old is needed: a checkout of the version to compare with")
    versions = options.old, Path(__file__).parents[2]
    names = options.names or [
        *Version(options.old).ask("list").split(),
        "gradients",
        *(f"exact:{kind}" for kind in KINDS),
    ]
    least: dict[tuple[str, str], list[float]] = {}
    for _ in range(options.processes):
        pair = [Version(checkout) for checkout in versions]
        for model in options.models:
            for name in names:
                found = fastest(pair, model, name)
                held = least.setdefault((model, name), [float("inf")] * 2)
                least[model, name] = [min(one, two) for one, two in zip(held, found, strict=True)]
        for version in pair:
            version.process.kill()
    rows: list[list[str | float | None]] = []
    print(f"batches of {options.batch_size}: milliseconds of old and new, their ratio", flush=True)
    for (model, name), (before, after) in least.items():
        rows.append([model, name, *(round(1e3 * t, 3) for t in (before, after))])
        rows[-1].append(round(after / before, 3))
        numbers = f"{1e3 * before:>9.3f}{1e3 * after:>9.3f}{after / before:>8.3f}"
        print(f"  {model:<14}{name:<22}{numbers}", flush=True)

    if options.record:
        from recorded import record

        commit = subprocess.run(
            ["git", "-C", str(options.old), "rev-parse", "--short", "HEAD"],
            capture_output=True,
            text=True,
        ).stdout.strip()
        what = f"CPU milliseconds of one thread, a step or a call, beside those of commit {commit}"
        columns = ["model", "of", "before, ms", "now, ms", "ratio"]
        record("versions", what, columns, rows, heads=2)


if options.serve:
    serve()
else:
    main()
