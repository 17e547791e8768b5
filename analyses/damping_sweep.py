"""Agreement with the block Fisher direction against the overall damping λ, the same λ for every
method by one rule.

python analyses/damping_sweep.py [--steps 300] [--seeds 1] [--out FOLDER]
"""

import argparse
from dataclasses import replace
from pathlib import Path

import matplotlib
import xarray as xr
from torch import Tensor

import curvlab as cl
from curvlab.algorithms import ALGORITHMS, ByBlock
from curvlab.curvature.contracted import Contracted, Contractions, batch_contractions
from curvlab.linalg.cholesky import damped_inverse
from curvlab.linalg.kronecker import tensor_normal_factors

matplotlib.use("Agg")
from typing import Any

import matplotlib.pyplot as plt

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--dampings", type=float, nargs="+", default=[1.0, 0.1, 0.01, 1e-3, 1e-4])
parser.add_argument("--steps", type=int, default=300)
parser.add_argument("--batch-size", type=int, default=1000)
parser.add_argument("--seeds", type=int, default=1)
parser.add_argument("--out", type=Path, default=Path("analyses/figures"))
options = parser.parse_args()
options.out.mkdir(parents=True, exist_ok=True)

NAMES = ["kfac", "tnt", "tnt-even", "tnt-per-sample", "shampoo", "adam", "sgd-m"]


def even(means: Contractions, damping: float) -> tuple[Tensor, ...]:
    """ε^{2/k} on each of k factors: the overall damping is ε² for weights (k = 2) and biases (k =
    1) alike.
    """
    return tuple(
        damped_inverse(u, damping ** (2 / len(means)), "a TNT factor")
        for u in tensor_normal_factors(means)
    )


# Why TNT alone falls short at large λ: its one ε damps a bias, a variable of one way, by ε where
# weights are damped by ε².
ALGORITHMS["tnt-even"] = replace(
    ALGORITHMS["tnt"], builds=ByBlock(lambda block: Contracted(block, batch_contractions, even))
)
train, _ = cl.datasets.load("mnist16")


def late(damping: float, seed: int) -> xr.Dataset:
    """Mean cosine of the middle layers over the last three quarters, and the last loss."""
    objective = cl.Objective(
        cl.models.build("mlp-256-20", seed), cl.likelihoods.Categorical(), seed
    )
    batches = train.batches(options.batch_size, epochs=5, seed=seed)
    log = cl.compare(
        objective, batches, algorithms=NAMES, lr=0.03, damping=damping, steps=options.steps
    ).dataset
    cosine = cl.late_cosine(log).isel(block=slice(1, -1)).mean("block")
    return xr.Dataset({"cosine": cosine, "loss": log["loss"].isel(step=-1, drop=True)})


def over(dim: str, labels: list[Any], parts: list[xr.Dataset]) -> xr.Dataset:
    return xr.concat(parts, dim=xr.DataArray(labels, dims=dim, name=dim))


seeds = list(range(options.seeds))
sweep = over(
    "damping",
    options.dampings,
    [over("seed", seeds, [late(d, s) for s in seeds]) for d in options.dampings],
)
table = sweep["cosine"].mean("seed").sel(algorithm=NAMES).to_pandas()
table["spread"] = table.max(axis=1) - table.min(axis=1)
table["last loss"] = sweep["loss"].mean("seed").to_pandas()
print(table.round(3).to_string())

figure, ax = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
styles = zip(
    ("#0072B2", "#D55E00", "#D55E00", "#E69F00", "#009E73", "#CC79A7", "#000000"),
    "osP^Dvx",
    strict=True,
)
for name, (colour, marker) in zip(NAMES, styles, strict=True):
    ax.semilogx(
        sweep["damping"],
        sweep["cosine"].sel(algorithm=name).mean("seed"),
        color=colour,
        marker=marker,
        label=name,
        ls=":" if name == "tnt-even" else "-",
    )
ax.set_xlabel("overall damping λ")
ax.set_ylabel("mean cosine to block-fisher, layers 2 to 5")
ax.set_title(f"mlp-256-20 on mnist16, {options.steps} steps, last three quarters", fontsize=10)
ax.grid(alpha=0.3)
ax.legend(frameon=False)
figure.savefig(options.out / "damping_sweep.png", dpi=110)
print("wrote", options.out / "damping_sweep.png")
