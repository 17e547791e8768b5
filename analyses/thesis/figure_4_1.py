"""Thesis Figure 4.1: cosine of every method's direction to the block Fisher direction; one line of
verdict for each claim.

`curvlab compare --model mlp-256-20 --seeds 5` is the same run.
"""

import torch
import xarray as xr

import curvlab as cl
from curvlab.reproduction import Options, ReproductionReport, Script, main
from curvlab.show import figures

EXTENT = {
    "smoke": (2, 1, 32),
    "cpu": (300, 2, 1000),
    "paper": (300, 5, 1000),
}  # steps, seeds, size of minibatches


def random_numbers() -> cl.datasets.Dataset:
    chance = torch.Generator().manual_seed(0)
    return cl.datasets.Dataset(
        "random",
        torch.rand(64, 16, generator=chance),
        torch.randint(10, (64,), generator=chance),
        "",
    )


def measure(options: Options) -> xr.Dataset:
    steps, seeds, size = EXTENT[options.budget]
    train = random_numbers() if options.smoke else cl.datasets.load("mnist16")[0]
    runs = []
    for seed in range(seeds):
        model = (
            cl.models.mlp([16, 4, 4, 4, 4, 4, 10])
            if options.smoke
            else cl.models.build("mlp-256-20", seed)
        ).to(options.where)
        objective = cl.Objective(model, cl.likelihoods.Categorical(), seed)
        batches = train.batches(size, epochs=5, seed=seed)
        runs.append(
            cl.compare(objective, batches, reference="block-fisher", lr=0.03, steps=steps).dataset
        )
    return xr.concat(
        runs, dim=xr.DataArray(range(seeds), dims="seed", name="seed"), combine_attrs="override"
    )


def make(report: ReproductionReport) -> None:
    log = measure(report.options)
    middle = cl.late_cosine(log).isel(block=slice(1, -1)).mean("block")
    rows = (
        [str(int(row["seed"])), *(f"{float(v):.3f}" for v in row)]
        for row in middle.transpose("seed", "algorithm")
    )
    report.table(["seed", *map(str, middle["algorithm"].values)], rows)
    tnt, kfac, shampoo = (middle.sel(algorithm=a) for a in ("tnt", "kfac", "shampoo"))
    first_order = middle.sel(algorithm=["adam", "sgd-m"]).mean("seed")
    claims = {
        "TNT and KFAC between 0.6 and 0.9": (
            ((tnt > 0.6) & (tnt < 0.9) & (kfac > 0.6) & (kfac < 0.9)).all()
        ),
        "each above Shampoo by 0.1 in every seed": (
            (tnt > shampoo + 0.1).all() & (kfac > shampoo + 0.1).all()
        ),
        "Shampoo above Adam and SGD-m on average": (shampoo.mean("seed") > first_order).all(),
    }
    for words, holds in claims.items():
        report.say(f"claim: {words}: {'holds' if bool(holds) else 'does not hold'}")
    report.draw(figures.draw(log, "cosine"))


FIGURE = Script(
    shows=(
        "thesis Figure 4.1: cosine of TNT, KFAC, Shampoo, Adam and SGD-m to the block Fisher"
        " direction"
    ),
    claim=(
        "the cosine similarity for TNT is always around 0.6 to 0.8, which is similar to that of"
        " KFAC … always much better than that of Shampoo … [Adam and SGD-m] usually lower than that"
        " of the second-order methods (4.3.4)"
    ),
    extents={
        name: f"{s} steps, {n} seed{'s' * (n > 1)}, minibatches of {m:,}"
        for name, (s, n, m) in EXTENT.items()
    },
    make=make,
)

if __name__ == "__main__":
    main(FIGURE, __file__)
