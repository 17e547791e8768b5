"""What a probe costs: CPU time of one sample over plain forward and backward, in one run; writes
curvlab/probes/costs.py.

    python analyses/benchmarks/probes.py [--repeats 5] [--steps 1000] [--together] [--write]

On one thread, the least of several repeats: for mlp-256-20 and the MNIST autoencoder, at
minibatches of 1000. Each probe is of the method below, on passes that the step has made already.
Then all together, at their own steps: training runs of so many steps with all probes that fit the
method, over the same without any (goal: at most 2).
"""

import argparse
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch

import curvlab as cl
from curvlab.probes import PROBES, Frame
from curvlab.probes.base import sample

OF = {"damping": "k-bfgs", "bounds": "k-bfgs"}
"""The method that a probe is taken of; else kfac."""
MODELS = ("mlp-256-20", "mnist-ae")

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--repeats", type=int, default=5)
parser.add_argument("--batch-size", type=int, default=1000)
parser.add_argument("--models", nargs="+", default=MODELS)
parser.add_argument(
    "--steps",
    type=int,
    default=1000,
    help="of the runs with all probes, as many as the rarest waits",
)
parser.add_argument("--together", action="store_true", help="only these runs")
parser.add_argument("--names", nargs="+", default=list(PROBES), help="only these probes")
parser.add_argument("--write", action="store_true", help="write what is found into the package")
options = parser.parse_args()
torch.set_num_threads(1)


def least(function: Callable[[], object], repeats: int = options.repeats) -> float:
    """CPU seconds of a call, the least of several, after one that is not counted."""
    function()
    times = []
    for _ in range(repeats):
        start = time.process_time()
        function()
        times.append(time.process_time() - start)
    return min(times)


def costs(model: str) -> dict[str, float]:
    data = cl.models.MODELS[model].data
    assert data is not None
    train, _ = cl.datasets.load(data)
    batch = next(iter(train.batches(options.batch_size, seed=0)))
    likelihood = cl.likelihoods.LIKELIHOODS[cl.models.MODELS[model].likelihood]()
    plain, found, frames = 0.0, dict[str, float](), dict[str, Frame]()
    for name in options.names:
        method = OF.get(name, "kfac")
        if method not in frames:
            objective = cl.Objective(cl.models.build(model, seed=0), likelihood, seed=0)
            optimizer = cl.optimizer(method, objective, lr=1e-3, damping=0.3)
            plain = plain or least(objective.closure(*batch), 3 * options.repeats)
            for _ in range(2):
                optimizer.step(objective.closure(*batch))
            now = objective.closure(*batch).observe({"data", "model"})
            frames[method] = Frame(
                0, now, {method: optimizer.descent.direction(now)}, method, 1e-3, {method: 0.0},
                {method: optimizer.descent.curvature},
            )  # fmt: skip
        frame = frames[method]

        def take(name: str = name, frame: Frame = frame) -> None:
            fresh = Frame(
                0,
                frame.now,
                frame.directions,
                frame.reference,
                frame.lr,
                frame.seconds,
                frame.curvatures,
            )
            sample([name], fresh, "before")
            sample([name], fresh, "after")

        found[name] = least(take) / plain
    return found


def together(model: str, algorithm: str, steps: int) -> float:
    """CPU time of training steps with all probes that fit, at their own steps, over those
    without.
    """
    data = cl.models.MODELS[model].data
    assert data is not None
    train, _ = cl.datasets.load(data)
    likelihood = cl.likelihoods.LIKELIHOODS[cl.models.MODELS[model].likelihood]()
    batches = train.batches(options.batch_size, seed=0)
    objective = cl.Objective(cl.models.build(model, seed=0), likelihood, seed=0)
    curvature = cl.optimizer(algorithm, objective).descent.curvature
    fitting = [n for n in options.names if "train" in PROBES[n].where and PROBES[n].fits(curvature)]

    def seconds(probes: list[str]) -> float:
        objective = cl.Objective(cl.models.build(model, seed=0), likelihood, seed=0)
        start = time.process_time()
        cl.train(
            objective,
            batches,
            algorithm=algorithm,
            lr=1e-3,
            steps=steps,
            warm=(),
            evaluate_samples=1,
            probes=probes,
            progress=False,
        )
        return time.process_time() - start

    return seconds(fitting) / seconds([])


tables = {} if options.together else {model: costs(model) for model in options.models}
print(
    f"1 thread, load {os.getloadavg()[0]:.2f}, torch {torch.__version__}; × forward + backward,"
    f" batches of {options.batch_size}"
)
if tables:
    print(f"{'probe':>12s}  every" + "".join(f"{m:>14s}" for m in tables))
for name in options.names if tables else []:
    print(
        f"{name:>12s}  {PROBES[name].every:5d}"
        + "".join(f"{t[name]:14.3f}" for t in tables.values())
    )
for model, table in tables.items():
    of_train = [table[n] / PROBES[n].every for n in options.names if "train" in PROBES[n].where]
    print(
        f"all probes of a training run at their own steps, {model}: {sum(of_train):.2f} × forward +"
        " backward a step"
    )
for algorithm in ("k-bfgs", "k-bfgs-l", "kfac"):
    ratio = together("mlp-256-20", algorithm, options.steps)
    print(
        f"{options.steps} steps of {algorithm} with all probes at their own steps / without,"
        f" mlp-256-20: {ratio:.2f}",
        flush=True,
    )
if options.write:
    target = Path(cl.__file__).parent / "probes" / "costs.py"
    lines = [
        f'    "{name}": ({", ".join(f"{tables[m][name]:.2g}" for m in MODELS)}),' for name in PROBES
    ]
    head = f'''"""What probes cost, written by analyses/benchmarks/probes.py."""

COST_MODELS = {MODELS!r}
COSTS: dict[str, tuple[float, float]] = {{'''.replace("'", '"')
    tail = '''}
"""{probe: CPU time of one sample over plain forward and backward, of each of COST_MODELS}

Minibatches of 1000.
"""'''
    target.write_text("\n".join([head, *lines, tail, ""]))
