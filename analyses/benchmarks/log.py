"""What the log costs a training run: CPU time of records, flushes and writes over that of training,
in one run.

    python analyses/benchmarks/log.py [--seconds 60] [--steps 40]

On one thread. `mlp-256-20` (adam, whose steps are the cheapest, and k-bfgs) for so many seconds,
hundreds of epochs; the MNIST autoencoder (k-bfgs) for so many steps as one epoch, scaled to the 60
steps of one. Each without probes and with all that cost less than one forward and backward, at
their own steps. Goal: records and writes within 1 % of training. Writes at the beginning and at the
end of a run are apart, and so are checkpoints and the sums that every step adds to.
"""

import argparse
import itertools
import os
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

import curvlab as cl
from curvlab.logs.log import SAVE_EVERY, SAVE_SHARE, Log
from curvlab.training import checkpoint
from curvlab.training.loop import Training
from curvlab.training.probing import Sampler
from curvlab.training.records import Meter

PROBES = ("damping", "loss", "norms", "noise")

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--seconds", type=float, default=60.0, help="of training, mlp-256-20")
parser.add_argument("--steps", type=int, default=40, help="of the autoencoder")
parser.add_argument("--models", nargs="+", default=["mlp-256-20", "mnist-ae"])
parser.add_argument("--algorithms", nargs="+", default=["adam", "k-bfgs"])
parser.add_argument("--batch-size", type=int, default=1000)
options = parser.parse_args()
torch.set_num_threads(1)

spent: defaultdict[str, float] = defaultdict(float)
calls: Counter[str] = Counter()
inside = [0.0]
"""CPU seconds that timed calls within the present one took: each is counted once, where it is
spent.
"""


def timed(function: Callable[..., Any], kind: Callable[[Any], str]) -> Callable[..., Any]:
    def run(first: Any, *rest: Any, **named: Any) -> Any:
        name = kind(first)
        inside.append(0.0)
        start = time.process_time()
        try:
            return function(first, *rest, **named)
        finally:
            whole = time.process_time() - start
            spent[name] += whole - inside.pop()
            calls[name] += 1
            inside[-1] += whole

    return run


now: list[Training] = []


def ends(_: object) -> str:
    """A write before the first step or after the last is one of every run."""
    at, budget = now[0].at, now[0].budget
    return "ends" if at.steps == 0 or now[0]._spent() or at.epoch == budget.epochs else "writes"


def watched(training: Training, *rest: Any, **named: Any) -> Any:
    now[:] = [training]
    return run_whole(training, *rest, **named)


run_whole = Training.run
Training.run = watched  # type: ignore[assignment, method-assign]  # measured from outside
for owner, name, kind in (
    (Log, "save", ends),
    (Log, "append", lambda _: "records"),
    (Log, "extend", lambda _: "records"),
    (Sampler, "flush", lambda _: "records"),
    (Sampler, "of_epoch", lambda _: "records"),
    (Meter, "record", lambda _: "records"),
    (Meter, "__call__", lambda _: "sums"),
    (checkpoint, "save", lambda _: "checkpoints"),
    (Training, "state_dict", lambda _: "checkpoints"),
):
    setattr(owner, name, timed(getattr(owner, name), kind))


def measure(model: str, algorithm: str, lr: float, damping: float, probes: list[str]) -> None:
    spent.clear()
    calls.clear()
    entry = cl.models.MODELS[model]
    assert entry.data is not None
    train, _ = cl.datasets.load(entry.data)
    objective = cl.Objective(
        cl.models.build(model, seed=0), cl.likelihoods.LIKELIHOODS[entry.likelihood](), seed=0
    )
    long = model == "mlp-256-20"
    batches: Any = train.batches(options.batch_size, seed=0)
    per_epoch = batches.per_epoch
    if not long:
        batches = list(itertools.islice(batches, options.steps))
    with TemporaryDirectory() as folder:
        run = cl.train(
            objective,
            batches,
            algorithm=algorithm,
            lr=lr,
            damping=damping,
            probes=probes,
            folder=folder,
            warm=(),
            evaluate_samples=1000,
            progress=False,
            **({"seconds": options.seconds} if long else {"epochs": 1}),
        )
        ds, size = run.dataset, (Path(folder) / "run.h5").stat().st_size
    assert not run.stopped
    training, steps = float(ds["cpu_seconds"][-1]), int(ds["steps"][-1])
    # an epoch has one record, however few of its steps are run
    scaled = training if long else training * per_epoch / steps
    share = (spent["records"] + spent["writes"]) / scaled
    print(
        f"{model:>10s} "
        f" {algorithm:<7s}{'with probes' if probes else '-':>12s}{steps:7d}{training:10.1f}"
        f"{spent['records'] / scaled:9.2%}{spent['writes'] / scaled:9.2%}"
        f"{calls['writes']:5d}{share:8.2%}"
        f"{1e3 * spent['ends'] / max(1, calls['ends']):9.0f}"
        f" ×{calls['ends']:2d}{spent['sums'] / scaled:8.1%}"
        f"{spent['checkpoints'] / scaled:9.1%}{size / 1e3:9.0f}"
    )


print(
    f"1 thread, load {os.getloadavg()[0]:.2f}, torch {torch.__version__}; a log is written every"
    f" {SAVE_EVERY:g} s, or so rarely that writes take {SAVE_SHARE:.1%} of the run"
)
print(
    "     model  method       probes  steps  CPU s of  records   writes    n    both   ends, ms    "
    " sums  checkp.   log, kB"
)
print("                                        training")
for model, algorithm, lr, damping in (
    ("mlp-256-20", "adam", 1e-3, 1e-4),
    ("mlp-256-20", "k-bfgs", 0.01, 0.3),
    ("mnist-ae", "k-bfgs", 0.03, 0.3),
):
    if model in options.models and algorithm in options.algorithms:
        for probes in ([], [p for p in PROBES if algorithm == "k-bfgs" or p != "damping"]):
            measure(model, algorithm, lr, damping, probes)
print(
    "both: records and writes, the cost of the log; ends: one write at the beginning or end; sums:"
    " norms of every step"
)
