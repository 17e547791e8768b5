"""Autoencoders of thesis Table 2.4 by every applicable method, at the documents' hyper-parameters: loss against epoch and time.

    python analyses/autoencoders.py [--problem mnist|curves] [--budget smoke|cpu] [--methods NAME …] [--epochs N]
        [--runs FOLDER] [--out FOLDER]

Minibatches of 1000, no L2. Each method is one run of `curvlab.train`; a run that is there is gone on with, or taken as it is.
`smoke`: two steps on random images. Not applicable: block methods (dense blocks of 785,000²), kflr (784 passes back a
minibatch), tnt-ideal (that over all data), smw-gn (784 N₂ rows).
"""

import argparse
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib
import torch
import xarray as xr

import curvlab as cl
from curvlab.memory import keep_freed_memory

matplotlib.use("Agg")
import matplotlib.pyplot as plt


@dataclass(frozen=True)
class Method:
    """Of one line: {problem: (learning rate, damping)}, the algorithm's name where it is another, its options."""

    values: dict[str, tuple[float, float]]
    algorithm: str = ""
    options: dict[str, object] = field(default_factory=dict)


def both(lr: float, damping: float) -> dict[str, tuple[float, float]]:
    return {"mnist": (lr, damping), "curves": (lr, damping)}


T20 = {"refresh_every": 20}  # T₂ of the autoencoders (thesis 2.8.2, 4.7.2; practice)
METHODS = {
    # thesis Table 4.3: momentum added
    "sgd-m": Method(both(0.003, 0.0)),
    "adam": Method({"mnist": (1e-4, 1e-4), "curves": (1e-3, 1e-3)}),
    "shampoo": Method(both(3e-4, 3e-4), options=T20),
    "tnt": Method({"mnist": (1e-4, 0.1), "curves": (3e-6, 0.01)}, options=T20),
    "kfac": Method({"mnist": (0.03, 1.0), "curves": (0.3, 30.0)}, options=T20),
    # thesis Table 3.5
    "k-bfgs": Method(both(0.03, 0.3)),
    "k-bfgs T=20": Method(both(0.3, 30.0), "k-bfgs", {"update_every": 20}),
    "k-bfgs-l": Method({"mnist": (0.03, 0.3), "curves": (0.1, 3.0)}),
    # thesis Table 2.5: momentum averaged
    "rmsprop": Method({"mnist": (1e-4, 1e-4), "curves": (1e-3, 1e-3)}),
    "kfac-20": Method({"mnist": (1.0, 3.0), "curves": (0.3, 0.3)}, options=T20),
    "k-bfgs-20": Method({"mnist": (0.3, 0.3), "curves": (0.1, 0.01)}),
    "k-bfgs-l-20": Method(both(0.3, 0.3)),
    # of other tables, or of none: values of the nearest method
    "kfac-ef": Method(both(1.0, 100.0), options=T20),  # thesis Table 4.5, MNIST
    "tnt-ef": Method(both(3e-6, 0.01), options=T20),  # thesis Table 4.5, MNIST
    "kf-bfgs-cnn": Method(both(0.3, 0.3)),
    "skqn-b1": Method(both(1.0, 30.0), options=T20),  # at (3, 3) only T₂ = 1 is stable: `curvature/skqn.py`
    "skqn-b2": Method(both(1.0, 30.0), options=T20),
    "skqn-l": Method(both(1.0, 30.0), options=T20),
    "smw-ng": Method(both(0.1, 1.001)),  # thesis 5.8, as is smw-ng-bd
    "smw-ng-bd": Method(both(0.1, 1.001)),
}

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--problem", choices=("mnist", "curves"), default="mnist")
parser.add_argument("--budget", choices=("smoke", "cpu"), default="cpu")
parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
parser.add_argument("--epochs", type=int, help="5 on MNIST, 20 on CURVES")
parser.add_argument("--seeds", type=int, default=4, help="where a run diverges the next seed is tried, this many in all")
parser.add_argument("--runs", type=Path, default=Path("runs/autoencoders"))
parser.add_argument("--out", type=Path, default=Path(__file__).parent / "figures")
options = parser.parse_args()
smoke = options.budget == "smoke"
epochs = options.epochs or {"mnist": 5, "curves": 20}[options.problem]
name_of_model = f"{options.problem}-ae"


def run(name: str, seed: int) -> xr.Dataset:
    method = METHODS[name]
    lr, damping = method.values[options.problem]
    about = {"algorithm": method.algorithm or name, "lr": lr, "damping": damping} | method.options
    if smoke:
        x = torch.rand(2, 20, 784, generator=torch.Generator().manual_seed(seed))
        batches, warm, about["epochs"] = [(b, b) for b in x], [(x[0], x[0])], 1
        model = torch.nn.Sequential(torch.nn.Linear(784, 9), torch.nn.ReLU(), torch.nn.Linear(9, 784))
        objective = cl.Objective(model, cl.likelihoods.Bernoulli(), seed=seed)
        return cl.train(objective, batches, warm=warm, progress=False, **about).dataset
    folder = options.runs / options.problem / (name.replace(" ", "-") + (f"-{seed}" if seed else ""))
    if (folder / "run.h5").exists():
        found = cl.open(folder)
        if found.sizes["epoch"] > epochs or found.attrs.get("stopped"):
            return found
    train, _ = cl.datasets.load(cl.models.find(name_of_model).data_name())
    objective = cl.Objective(cl.models.build(name_of_model, seed=seed, data=train), cl.likelihoods.Bernoulli(), seed=seed)
    batches = train.batches(1000, epochs=epochs, seed=seed)
    resume = (folder / "checkpoint.pt").exists()
    return cl.train(objective, batches, folder=folder, resume=resume, evaluate_samples=10_000, **about).dataset


keep_freed_memory()
warnings.simplefilter("ignore", cl.CurvlabWarning)
print(f"{name_of_model}: {epochs} epochs of minibatches of 1000; loss of 10,000 training examples")
print(f"{'method':>14}{'lr':>9}{'damping':>9}{'start':>9}{'loss':>9}{'error':>9}{'s/epoch':>9}   (CPU seconds)")
found: dict[str, xr.Dataset] = {}
for name in options.methods:
    for seed in range(options.seeds):
        ds = run(name, seed)
        if not ds.attrs.get("stopped"):
            break
    diverged = f"   {seed} seeds diverged before this" if seed else ""
    if ds.attrs.get("stopped"):
        print(f"{name:>14}   diverged with each of {options.seeds} seeds; the last: {ds.attrs['stopped']}", flush=True)
        continue
    found[name] = ds
    lr, damping = METHODS[name].values[options.problem]
    last = ds.isel(epoch=-1)
    each = float(last["cpu_seconds"]) / max(float(last["epoch"]), 1e-9)
    row = f"{float(ds['train_loss'][0]):>9.2f}{float(last['train_loss']):>9.2f}{float(last['train_error']):>9.4f}{each:>9.1f}"
    print(f"{name:>14}{lr:>9g}{damping:>9g}{row}{diverged}", flush=True)

COLOURS = {"first order": "#000000", "KFAC": "#E69F00", "K-BFGS": "#0072B2", "TNT, Shampoo": "#009E73",
           "SKQN": "#D55E00", "SMW": "#CC79A7"}  # fmt: skip
FAMILY = {"sgd-m": "first order", "adam": "first order", "rmsprop": "first order", "shampoo": "TNT, Shampoo"}
STYLES = ("-", "--", ":", "-.", (0, (5, 1)), (0, (1, 1)))


def family(name: str) -> str:
    heads = {"kfac": "KFAC", "k-bfgs": "K-BFGS", "kf-bfgs": "K-BFGS", "tnt": "TNT, Shampoo", "skqn": "SKQN", "smw": "SMW"}
    return FAMILY.get(name) or next(f for head, f in heads.items() if name.startswith(head))


figure, (by_epoch, by_time) = plt.subplots(1, 2, figsize=(11, 5), layout="constrained", sharey=True)
seen: dict[str, int] = {}
for name, ds in found.items():
    kind = family(name)
    style, marker = STYLES[seen.get(kind, 0) % len(STYLES)], "os^vDx"[seen.get(kind, 0) % 6]
    seen[kind] = seen.get(kind, 0) + 1
    drawn = {"color": COLOURS[kind], "ls": style, "lw": 1.5, "marker": marker, "ms": 4.5}
    by_epoch.plot(ds["epoch"], ds["train_loss"], label=name, **drawn)
    by_time.plot(ds["cpu_seconds"][1:], ds["train_loss"][1:], **drawn)
by_epoch.set_xlabel("epoch")
by_epoch.set_ylabel("training loss, summed over 784 units (nat)")
by_time.set_xlabel("training time (CPU seconds), evaluation and warm start apart")
by_epoch.set_yscale("log")
by_time.set_xscale("log")
for ax in (by_epoch, by_time):
    ax.yaxis.set_major_formatter("{x:.0f}")
    ax.yaxis.set_minor_formatter("{x:.0f}")
by_time.xaxis.set_major_formatter("{x:.0f}")
by_time.xaxis.set_minor_formatter("")
by_epoch.xaxis.get_major_locator().set_params(integer=True)
for ax in (by_epoch, by_time):
    ax.grid(alpha=0.3, which="both", lw=0.5)
figure.legend(loc="outside right center", frameon=False, fontsize=9)
figure.suptitle(f"{name_of_model}, minibatches of 1000, the documents' hyper-parameters", fontsize=11)
if smoke:
    figure.savefig(options.out / f"autoencoders-{options.problem}-smoke.png", dpi=60)
else:
    figure.savefig(options.out / f"autoencoders-{options.problem}.png", dpi=120)
    print("wrote", options.out / f"autoencoders-{options.problem}.png")
