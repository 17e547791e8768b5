"""Which curvature does each method follow? Thesis Figure 4.1 with five references and every family
of methods, in one run.

    python analyses/which_curvature.py [--steps 100] [--out FOLDER] [--log RUN.h5]

The run is that of Figure 4.1 (mlp-256-20, batches of 1000, learning rate 0.03, overall damping
1e-3), which follows block Fisher; `gram` holds every inner product, hence the cosine of every
direction to that of every reference. Middle four layers.
"""

import argparse
import itertools
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import xarray as xr

import curvlab as cl

REFERENCES = {
    "block-fisher": ("#0072B2", "-"),
    "block-ggn": ("#56B4E9", (0, (1, 2.5))),
    "block-ef": ("#E69F00", (0, (5, 1.5))),
    "block-hessian": ("#D55E00", "-"),
    "full-ggn": ("#000000", (0, (5, 1.5, 1, 1.5))),
}
"""{reference: colour (Okabe and Ito's), dashes}"""
METHODS = (
    "kfac",
    "kflr",
    "tnt",
    "shampoo",
    "adam",
    "sgd-m",
    "k-bfgs",
    "k-bfgs-l",
    "skqn-l",
    "skqn-b1",
    "skqn-b2",
    "smw-ng-bd",
    "smw-ng",
)

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--steps", type=int, default=100)
parser.add_argument(
    "--refresh-every",
    type=int,
    default=2,
    help="T₂ of all: 2 changed no cosine of refresh.py by more than 0.01",
)
parser.add_argument("--warm", type=int, default=60, help="minibatches of the warm start")
parser.add_argument("--batch-size", type=int, default=1000)
parser.add_argument(
    "--log", type=Path, help="read this log; where there is none, measure and write it there"
)
parser.add_argument("--out", type=Path, default=Path("analyses/figures"))
options = parser.parse_args()


def measure() -> xr.Dataset:
    train, _ = cl.datasets.load("mnist16")
    batches = train.batches(options.batch_size, epochs=5, seed=0)
    objective = cl.Objective(
        cl.models.build("mlp-256-20", seed=0), cl.likelihoods.Categorical(), seed=0
    )
    return cl.compare(
        objective,
        batches,
        reference="block-fisher",
        algorithms=[*REFERENCES, *METHODS],
        lr=0.03,
        damping=1e-3,
        steps=options.steps,
        refresh_every=options.refresh_every,
        path=options.log,
        warm=list(itertools.islice(batches.one_pass(), options.warm)),
    ).dataset


log = cl.open(options.log) if options.log and options.log.exists() else measure()
cosine = xr.concat(
    [cl.cosine_to(log, name).isel(block=slice(1, -1)).mean("block") for name in REFERENCES],
    xr.DataArray(list(REFERENCES), dims="to", name="to"),
)
late = cosine.isel(step=slice(cosine.sizes["step"] // 4, None)).mean("step")
order = [
    *REFERENCES,
    *sorted(METHODS, key=lambda name: -float(late.sel(to="block-fisher", algorithm=name))),
]
late = late.sel(algorithm=order).transpose("algorithm", "to")
print(late.to_pandas().round(3))
for name in METHODS:
    mine = late.sel(algorithm=name)
    print(
        f"{name:>10s} is nearest to {list(REFERENCES)[int(mine.values.argmax())]},"
        f" {float(mine.max()):.3f}"
    )

figure = plt.figure(figsize=(15, 7), layout="constrained")
halves: Any = figure.subfigures(1, 2, width_ratios=[1, 2.3])
left, right = halves
ax = left.subplots()
image = ax.imshow(late, cmap="cividis", vmin=min(0.0, float(late.min())), vmax=1, aspect="auto")
for i, j in itertools.product(range(late.sizes["algorithm"]), range(late.sizes["to"])):
    value = float(late[i, j])
    ax.text(
        j,
        i,
        f"{value:.2f}",
        ha="center",
        va="center",
        fontsize=9,
        color="black" if value > 0.55 else "white",
    )
ax.axhline(len(REFERENCES) - 0.5, color="white", linewidth=3)
ax.set_xticks(range(len(REFERENCES)), list(REFERENCES), rotation=30, ha="right")
ax.set_yticks(range(len(order)), order)
ax.set_title("mean cosine, last three quarters of the steps", fontsize=10)
left.colorbar(image, ax=ax, orientation="horizontal", shrink=0.8, label="cosine similarity")

panels = right.subplots(3, 5, sharex=True, sharey=True)
for ax, name in zip(panels.flat, order[len(REFERENCES) :], strict=False):
    for reference, (colour, dashes) in REFERENCES.items():
        width = 2.2 if reference == "block-ggn" else 1.4
        ax.plot(
            cosine["step"],
            cosine.sel(to=reference, algorithm=name),
            color=colour,
            linestyle=dashes,
            linewidth=width,
            label=reference,
        )
    ax.set_title(name, fontsize=10)
    ax.grid(alpha=0.3)
panels[0, 0].set_ylim(min(0.0, float(cosine.min())), 1.02)
for ax in panels.flat[len(METHODS) :]:
    ax.axis("off")
for ax in panels.flat[len(METHODS) - 5 : len(METHODS)]:
    ax.tick_params(labelbottom=True)
    ax.set_xlabel("iteration")
panels.flat[len(METHODS)].legend(
    *panels[0, 0].get_legend_handles_labels(), loc="center left", frameon=False, title="cosine to"
)
right.supylabel("cosine similarity, middle four layers", fontsize=10)
figure.suptitle(
    "Which curvature does each method follow? mlp-256-20 along block Fisher, λ = 1e-3, learning"
    " rate 0.03"
)
options.out.mkdir(parents=True, exist_ok=True)
figure.savefig(options.out / "which_curvature.png", dpi=110)
print("wrote", options.out / "which_curvature.png")
