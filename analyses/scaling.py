"""How exact curvature scales: time against examples, width and classes, with fitted exponents
beside the theory's.

CPU seconds of one thread; tanh networks of two hidden layers on random data.

    python analyses/scaling.py [--repeats 5] [--largest 5] [--out FOLDER]
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import matplotlib
import numpy as np
import torch

matplotlib.use("Agg")
import matplotlib.pyplot as plt

import curvlab as cl
from curvlab.exact import Kind
from curvlab.system.memory import keep_freed_memory

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--repeats", type=int, default=5)
parser.add_argument(
    "--largest",
    type=int,
    default=5,
    help="how many of the five sizes of each axis, from the smallest on",
)
parser.add_argument("--out", type=Path, default=Path(__file__).parent / "figures")
options = parser.parse_args()
torch.set_num_threads(1)
keep_freed_memory()


def problem(
    examples: int = 500, width: int = 24, classes: int = 10
) -> tuple[cl.Objective, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    net = cl.models.mlp([width, width, width, classes])
    x, y = torch.randn(examples, width), torch.randint(classes, (examples,))
    return cl.Objective(net, cl.likelihoods.Categorical()), x, y


def hidden(kind: Kind) -> Callable[[cl.Objective, torch.Tensor, torch.Tensor], object]:
    return lambda o, x, y: cl.exact.matrix(o, x, y, kind, "2")


def last(o: cl.Objective, x: torch.Tensor, y: torch.Tensor) -> object:
    return cl.exact.matrix(o, x, y, "ggn", "3")


QUANTITIES = {
    "GGN, hidden block": (hidden("ggn"), "o"),
    "Hessian, hidden block": (hidden("hessian"), "s"),
    "GGN, last block": (last, "^"),
    "per-sample gradients": (cl.exact.gradients, "D"),
    "Jacobians": (lambda o, x, y: cl.exact.jacobians(o, x), "v"),
}
# sizes, and the exponent of each quantity as the size grows (the fit is over the three largest)
AXES = {
    "examples": ([500, 1000, 2000, 4000, 8000], [1, 1, 1, 1, 1]),
    "width": (
        [24, 36, 54, 81, 108],
        [4, 4, 2, 2, 2],
    ),  # pairs of outputs × pairs of inputs; of the last block the inputs'
    "classes": (
        [10, 20, 40, 80, 160],
        [1, 1, 2, 1, 2],
    ),  # O vectors through a layer of C outputs; the last layer's C² pairs
}

LABELS = {"examples": "examples N", "width": "width of every layer", "classes": "classes C"}


def seconds(work: Callable[..., object]) -> float:
    work()
    times = []
    for _ in range(options.repeats):
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    return min(times)


figure, axes = plt.subplots(1, 3, figsize=(11, 3.8), layout="constrained", sharey=True)
colours = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000"]
print(f"{'':>24}" + "".join(f"{name:>22}" for name in AXES) + "   fitted exponent (theory)")
fitted: dict[str, list[str]] = {name: [] for name in QUANTITIES}
for ax, (axis, (sizes, theory)) in zip(axes, AXES.items(), strict=True):
    sizes = sizes[: options.largest]
    for (name, (work, marker)), expected, colour in zip(
        QUANTITIES.items(), theory, colours, strict=True
    ):
        times = []
        for size in sizes:
            made = problem(**{axis: size})
            times.append(seconds(lambda made=made, work=work: work(*made)))
        slope = float(np.polyfit(np.log(sizes[-3:]), np.log(times[-3:]), 1)[0])
        fitted[name].append(f"{slope:.2f} ({expected})")
        ax.loglog(
            sizes,
            np.array(times) * 1e3,
            marker=marker,
            color=colour,
            label=f"{name}: {slope:.1f} ({expected})",
        )
    ax.set_xlabel(LABELS[axis])
    ax.set_xticks(sizes, [str(s) for s in sizes])
    ax.minorticks_off()
    ax.grid(alpha=0.3)
    ax.legend(fontsize=7, frameon=False, title="exponent (theory)", title_fontsize=7)
axes[0].set_ylabel("CPU time of one thread (ms)")
for name, values in fitted.items():
    print(f"{name:>24}" + "".join(f"{value:>22}" for value in values))
figure.savefig(options.out / "scaling.png", dpi=150)
print(f"wrote {options.out / 'scaling.png'}")
