"""How good are the assumptions behind KFAC, TNT and Shampoo? Block by block, at initialisation and
after some Adam steps.

python analyses/assumptions.py [--steps 200] [--examples 1000] [--seed 0] [--out FOLDER]
"""

import argparse
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import torch
import xarray as xr
from torch import nn

import curvlab as cl

matplotlib.use("Agg")
import matplotlib.pyplot as plt

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--steps", type=int, default=200)
parser.add_argument(
    "--examples",
    type=int,
    default=1000,
    help="on which the matrices are compared (a fifth of it for the CNN)",
)
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--out", type=Path, default=Path("analyses/figures"))
options = parser.parse_args()
options.out.mkdir(parents=True, exist_ok=True)

METHODS = {
    "kfac": ("#0072B2", "o"),
    "tnt-per-sample": ("#D55E00", "s"),
    "shampoo": ("#009E73", "^"),
}
STEPS = {
    "places apart": "#56B4E9",
    "averaged over places": "#E69F00",
    "averaged over examples": "#0072B2",
}
DAMPINGS = (0.0, 1e-4, 1e-3, 1e-2, 1e-1)
SHORT = {
    "places apart": "(3.4)",
    "averaged over places": "(3.5)",
    "averaged over examples": "(3.8)",
}


def small_cnn(seed: int) -> nn.Module:
    """16×16 → 8×8 → 4×4: T = 64, 16 and 1."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        first, second = (nn.Conv2d(i, o, 3, stride=2, padding=1) for i, o in [(1, 8), (8, 16)])
        return nn.Sequential(
            nn.Unflatten(1, (1, 16, 16)),
            first,
            nn.Tanh(),
            second,
            nn.Tanh(),
            nn.Flatten(),
            nn.Linear(256, 10),
        )


def measure(net: nn.Module, examples: int) -> xr.Dataset:
    """Both reports at initialisation and after the steps, along a dimension `steps`; the Hessian's
    total too.
    """
    objective = cl.Objective(net, cl.likelihoods.Categorical(), options.seed)
    train, _ = cl.datasets.load("mnist16")
    x, y = next(iter(train.batches(examples, seed=options.seed + 1)))
    batches = iter(train.batches(500, epochs=options.steps // 120 + 1, seed=options.seed))
    optimizer = cl.optimizer("adam", objective, lr=1e-3)
    found = []
    for steps in (0, options.steps):
        for _ in range(steps):
            optimizer.step(objective.closure(*next(batches)))
        report = cl.assumptions.errors(objective, x, y)
        report["hessian"] = cl.assumptions.errors(objective, x, y, "hessian")["total"]
        quality = cl.assumptions.quality(objective, x, y, list(METHODS), spectra=False)
        inner = [str(b) for b in report["block"].values[1:]]
        damped = [
            cl.assumptions.quality(
                objective, x, y, ["kfac"], blocks=inner, damping=d, spectra=False
            )
            for d in DAMPINGS
        ]
        rows = [one["error"].sel(algorithm="kfac").values for one in damped]
        report["damped"] = xr.DataArray(
            rows, {"damping": list(DAMPINGS), "inner": inner}, ("damping", "inner")
        )
        found.append(
            report.assign(error_scaled=quality["error_scaled"], between=quality["between"])
        )
    return xr.concat(found, dim=xr.DataArray([0, options.steps], dims="steps", name="steps"))


def table(ds: xr.Dataset) -> pd.DataFrame:
    columns = {
        f"step {SHORT[str(a)]}": ds["step"].sel(assumption=a, drop=True)
        for a in ds["assumption"].values
    }
    columns |= {"total": ds["total"], "floor": ds["floor"], "total, Hessian": ds["hessian"]}
    columns |= {f"{m}*": ds["error_scaled"].sel(algorithm=m, drop=True) for m in METHODS}
    columns |= {"W–b": ds["between"]}
    return pd.DataFrame({k: v.reset_coords(drop=True).to_series() for k, v in columns.items()})


runs = {
    "mlp-256-20": measure(cl.models.build("mlp-256-20", options.seed), options.examples),
    "small CNN": measure(small_cnn(options.seed), max(1, options.examples // 5)),
}
for name, ds in runs.items():
    where = ", ".join(
        f"{b}: T = {t}, D = {d}"
        for b, t, d in zip(*(ds[c].values for c in ("block", "places", "order")), strict=True)
    )
    print(
        f"{name} on {ds.attrs['examples']} examples ({where})\n{table(ds).round(4).to_string()}\n"
    )
damped = runs["mlp-256-20"]["damped"].stack(row=("steps", "damping")).transpose("row", "inner")
print(
    "KFAC damped at the overall λ against the Fisher block of mlp-256-20 plus"
    f" λI\n{damped.to_pandas().round(3).to_string()}\n"
)
print(
    "step (…): ‖M_k − M_{k−1}‖ / ‖M‖ of the Fisher block M; total: ‖M_3 − M‖ / ‖M‖; floor: the"
    " nearest Kronecker product;"
)
print(
    "*: the method's best multiple against the Fisher block; W–b: what TNT and Shampoo leave out"
    " between weight and bias"
)

figure, axes = plt.subplots(2, 2, figsize=(10, 8.4), layout="constrained")
for (left, right), (name, ds) in zip(axes, runs.items(), strict=True):
    shared = bool(ds["places"].max() > 1)
    labels = [
        f"{b}\n(T = {t})" if shared else b
        for b, t in zip(ds["block"].values, ds["places"].values, strict=True)
    ]
    at = np.arange(len(labels))
    last = ds.isel(steps=-1)
    if shared:
        for k, (assumption, colour) in enumerate(STEPS.items()):
            equation = last["equation"].sel(assumption=assumption).item()
            left.bar(
                at + 0.24 * (k - 1),
                last["step"].sel(assumption=assumption),
                0.22,
                color=colour,
                label=f"{assumption} {equation}",
            )
        left.hlines(
            last["total"], at - 0.2, at + 0.2, color="k", lw=2, label="all three together (KFAC)"
        )
        left.plot(
            at, last["floor"], "kD", ms=6, mfc="white", label="nearest Kronecker product (floor)"
        )
        left.set_ylim(0, 1)
        left.set_ylabel("relative change of the Fisher block")
        left.set_title(
            f"{name}: what each assumption costs, after {options.steps} steps", fontsize=10
        )
    else:
        for steps, colour, marker in ((0, "#E69F00", "v"), (options.steps, "#0072B2", "o")):
            now = ds.sel(steps=steps)
            left.semilogy(
                at, now["total"], color=colour, marker=marker, label=f"KFAC, {steps} steps"
            )
            left.semilogy(
                at,
                now["floor"],
                color=colour,
                marker=marker,
                mfc="white",
                ls="--",
                label=f"floor, {steps} steps",
            )
        left.set_ylabel("relative error of the Fisher block")
        left.set_title(f"{name}: averaging over examples (2.3), (3.8)", fontsize=10)
    for k, (method, (colour, marker)) in enumerate(METHODS.items()):
        values = last["error_scaled"].sel(algorithm=method)
        right.plot(
            at + 0.17 * (k - 1), values, color=colour, marker=marker, ms=7, ls="", label=method
        )
    right.hlines(last["floor"], at - 0.3, at + 0.3, color="k", lw=2, label="floor")
    right.hlines(
        last["between"],
        at - 0.3,
        at + 0.3,
        color="#CC79A7",
        lw=2,
        ls=":",
        label="between W and b: TNT, Shampoo lack it",
    )
    right.set_ylim(0, 1.05)
    right.set_ylabel("relative error of the best multiple")
    right.set_title(f"{name}: methods, after {options.steps} steps", fontsize=10)
    for ax in (left, right):
        ax.set_xticks(at, labels)
        ax.set_xlim(-0.5, len(at) - 0.5)
        ax.set_xlabel("block")
        ax.grid(alpha=0.3, axis="y")
        ax.legend(
            frameon=False,
            fontsize=8,
            loc="upper center",
            bbox_to_anchor=(0.5, -0.22 if shared else -0.16),
            ncols=2,
        )
figure.savefig(options.out / "assumptions.png", dpi=110)
print("wrote", options.out / "assumptions.png")
