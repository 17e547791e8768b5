"""Thesis Figure 4.1: cosine of every method's direction to the block Fisher direction, five seeds; one line of verdict each.

python analyses/figure_4_1.py [--seeds 5] [--steps 300] [--out FOLDER] [--log RUN]
"""

import argparse
from pathlib import Path

import xarray as xr

import curvlab as cl
from curvlab import figures

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--seeds", type=int, default=5)
parser.add_argument("--steps", type=int, default=300)
parser.add_argument("--batch-size", type=int, default=1000)
parser.add_argument("--out", type=Path, default=Path("analyses/figures"))
parser.add_argument("--log", type=Path, help="read this run instead (curvlab compare --model mlp-256-20 --seeds 5)")
options = parser.parse_args()


def measure() -> xr.Dataset:
    train, _ = cl.datasets.load("mnist16")
    runs = []
    for seed in range(options.seeds):
        objective = cl.Objective(cl.models.build("mlp-256-20", seed), cl.likelihoods.Categorical(), seed)
        batches = train.batches(options.batch_size, epochs=5, seed=seed)
        runs.append(cl.compare(objective, batches, reference="block-fisher", lr=0.03, steps=options.steps).dataset)
    return xr.concat(runs, dim=xr.DataArray(range(options.seeds), dims="seed", name="seed"), combine_attrs="override")


log = cl.open(options.log) if options.log else measure()
middle = cl.late_cosine(log).isel(block=slice(1, -1)).mean("block")
print(middle.to_pandas().round(3))
tnt, kfac, shampoo = (middle.sel(algorithm=a) for a in ("tnt", "kfac", "shampoo"))
print("TNT and KFAC between 0.6 and 0.9:", bool(((tnt > 0.6) & (tnt < 0.9) & (kfac > 0.6) & (kfac < 0.9)).all()))
print("each above Shampoo by 0.1 in every seed:", bool((tnt > shampoo + 0.1).all() and (kfac > shampoo + 0.1).all()))
first_order = middle.sel(algorithm=["adam", "sgd-m"]).mean("seed")
print("Shampoo above Adam and SGD-m on average:", bool((shampoo.mean("seed") > first_order).all()))
options.out.mkdir(parents=True, exist_ok=True)
figures.draw(log, "cosine").savefig(options.out / "figure_4_1.png", dpi=110)
print("wrote", options.out / "figure_4_1.png")
