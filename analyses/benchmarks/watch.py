"""What `curvlab.watch` costs a loop: CPU time of its steps with it over those without, one sample
in 100 steps, in one run.

    python analyses/benchmarks/watch.py [--steps 301] [--rounds 5] [--write]

On one thread, AdamW, minibatches of 1000. Two models take turns at every minibatch, one watched,
one not. Of steps that are not sampled the median counts (goal: at most 1.05 of a step without), and
of sampled ones it is said how many steps the look takes, which is the cost of the algorithms and
probes, and how many the first one, which proves the form of the minibatches and writes the log.
"""

import argparse
import itertools
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch

import curvlab as cl

CASES = {
    "sgd-m (the gradient)": (["sgd-m"], []),
    "kfac": (["kfac"], []),
    "block-fisher, kfac": (["block-fisher", "kfac"], []),
    "kfac, probes noise and damping of k-bfgs": (["kfac", "k-bfgs"], ["noise", "damping"]),
}

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--steps", type=int, default=301)
parser.add_argument("--rounds", type=int, default=5)
parser.add_argument("--every", type=int, default=100)
parser.add_argument("--batch-size", type=int, default=1000)
parser.add_argument("--model", default="mlp-256-20")
parser.add_argument("--write", action="store_true", help="write the table of the documentation")
options = parser.parse_args()
torch.set_num_threads(1)

name = cl.models.MODELS[options.model].data
assert name is not None
data, _ = cl.datasets.load(name)
minibatches = list(data.batches(options.batch_size, seed=0))


Step = Callable[[Any, Any], None]


def training() -> tuple[torch.nn.Module, Any, torch.optim.Optimizer, Step]:
    model = cl.models.build(options.model, seed=0)
    likelihood = cl.likelihoods.LIKELIHOODS[cl.models.MODELS[options.model].likelihood]()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def step(x: Any, y: Any) -> None:
        optimizer.zero_grad()
        likelihood.loss(model(x), y).mean().backward()
        optimizer.step()

    return model, likelihood, optimizer, step


def timed(work: Callable[[], None]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def measured(algorithms: list[str], probes: list[str], path: Path) -> list[tuple[float, float]]:
    """CPU seconds of every step, (without, with)."""
    *_, alone = training()
    model, likelihood, optimizer, step = training()
    found = []
    with cl.watch(
        model,
        likelihood,
        optimizer,
        algorithms=algorithms,
        probes=probes,
        path=path,
        every=options.every,
    ) as watch:

        def watched(x: Any, y: Any) -> None:
            with watch.batch(x, y):
                step(x, y)

        for i, (x, y) in enumerate(itertools.islice(itertools.cycle(minibatches), options.steps)):
            both = {}
            for work in (alone, watched) if i % 2 else (watched, alone):
                both[work] = timed(partial(work, x, y))
            found.append((both[alone], both[watched]))
    return found


rows = [
    "| watched by | a step that is not sampled, over one without watch | a sample, in steps |"
    " the first, in steps |",
    "|---|---|---|---|",
]
with TemporaryDirectory() as place:
    for title, (algorithms, probes) in CASES.items():
        path = Path(place) / "run.h5"
        measured(algorithms, probes, path)  # warm
        runs = [measured(algorithms, probes, path) for _ in range(options.rounds)]
        unsampled = [pair for run in runs for i, pair in enumerate(run) if i % options.every]
        step = median(alone for alone, _ in unsampled)
        ratio = median(seen for _, seen in unsampled) / step
        looks = [seen for run in runs for _, seen in run[options.every :: options.every]]
        first = [run[0][1] for run in runs]
        row = f"| {title} | {ratio:.3f} | {median(looks) / step - 1:.1f} |"
        rows.append(f"{row} {median(first) / step - 1:.0f} |")
        print(rows[-1], flush=True)
if options.write:
    out = Path(__file__).with_name("results") / "watch.md"
    out.write_text("\n".join(rows) + "\n")
