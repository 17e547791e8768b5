"""Which curvature does each method follow? Thesis Figure 4.1 with five references and every family
of methods, those of later years and torch's own among them, in one run.

    python analyses/which_curvature.py [--model gpt-tiny] [--steps 100] [--out FOLDER]
        [--log RUN.h5]

The run of mlp-256-20 is that of Figure 4.1 (batches of 1000, learning rate 0.03, overall damping
1e-3), which follows block Fisher; the middle four layers. That of gpt-tiny follows block-ggn at λ =
0.01, rate 0.1, no momentum, by minibatches of 8 windows of 16 symbols of `shakespeare`; its eight
matrices of attention and MLP. `gram` holds every inner product, hence the cosine of every direction
to that of every reference.
"""

import argparse
import itertools
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import xarray as xr
from torch import Tensor

import curvlab as cl

REFERENCES = {
    "block-fisher": ("#0072B2", "-"),
    "block-ggn": ("#56B4E9", (0, (1, 2.5))),
    "block-ef": ("#E69F00", (0, (5, 1.5))),
    "block-hessian": ("#D55E00", "-"),
    "full-ggn": ("#000000", (0, (5, 1.5, 1, 1.5))),
}
"""{reference: colour (Okabe and Ito's), dashes}"""
DOCUMENTS = ("kfac", "kflr", "tnt", "shampoo", "adam", "sgd-m", "k-bfgs", "k-bfgs-l")
SYSTEMS = ("skqn-l", "skqn-b1", "skqn-b2", "smw-ng-bd", "smw-ng")
RECENT = ("ekfac", "foof", "soap", "kl-shampoo", "asgo", "muon", "sophia-g")
TORCH = ("torch:AdamW", "torch:Muon", "torch:RMSprop", "torch:Adagrad")


@dataclass(frozen=True)
class Setting:
    """A model's run: who moves it and how, its methods, and the blocks that are looked at."""

    data: str
    reference: str
    methods: tuple[str, ...]
    batch_size: int
    steps: int
    warm: int
    refresh_every: int
    options: dict[str, Any]
    blocks: slice
    title: str


SETTINGS = {
    "mlp-256-20": Setting(
        "mnist16",
        "block-fisher",
        (*DOCUMENTS, *SYSTEMS, *RECENT, *TORCH),
        1000,
        100,
        60,
        2,  # changed no cosine of refresh.py by more than 0.01
        {"lr": 0.03, "damping": 1e-3},
        slice(1, -1),
        "mlp-256-20 along block Fisher, λ = 1e-3, learning rate 0.03",
    ),
    "gpt-tiny": Setting(
        "shakespeare32",
        "block-ggn",
        (*DOCUMENTS, *RECENT, *TORCH),
        8,
        16,
        0,
        1,
        {"lr": 0.1, "damping": 1e-2, "momentum": 0.0},
        slice(0, None),
        "gpt-tiny along block-ggn, λ = 0.01, learning rate 0.1",
    ),
}
SYMBOLS = 16  # of a window

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--model", choices=list(SETTINGS), default="mlp-256-20")
parser.add_argument("--steps", type=int)
parser.add_argument("--refresh-every", type=int, help="T₂ of all")
parser.add_argument("--warm", type=int, help="minibatches of the warm start")
parser.add_argument("--batch-size", type=int)
parser.add_argument(
    "--log", type=Path, help="read this log; where there is none, measure and write it there"
)
parser.add_argument("--out", type=Path, default=Path("analyses/figures"))
options = parser.parse_args()
setting = SETTINGS[options.model]
METHODS = setting.methods


def measure() -> xr.Dataset:
    train, _ = cl.datasets.load(setting.data)
    size = options.batch_size or setting.batch_size
    batches = train.batches(size, epochs=5, seed=0)
    warm = setting.warm if options.warm is None else options.warm
    likelihood: Any = cl.likelihoods.Categorical()
    if options.model == "gpt-tiny":
        likelihood = cl.likelihoods.Tokens()

    def windows(some: Any) -> Iterator[tuple[Tensor, Tensor]]:
        for x, y in some:
            yield (x, y) if x.is_floating_point() else (x[:, :SYMBOLS], y[:, :SYMBOLS])

    objective = cl.Objective(cl.models.build(options.model, seed=0), likelihood, seed=0)
    with warnings.catch_warnings():  # parameters that Muon does not take; norms follow the gradient
        warnings.simplefilter("ignore", cl.CurvlabWarning)
        return cl.compare(
            objective,
            windows(batches),
            reference=setting.reference,
            algorithms=[*REFERENCES, *METHODS],
            steps=options.steps or setting.steps,
            refresh_every=options.refresh_every or setting.refresh_every,
            path=options.log,
            warm=list(windows(itertools.islice(batches.one_pass(), warm))),
            **setting.options,
        ).dataset


log = cl.open(options.log) if options.log and options.log.exists() else measure()
matrices = [
    b.name
    for b in cl.Objective(cl.models.build(options.model), cl.likelihoods.Tokens()).blocks
    if options.model != "gpt-tiny" or ("layers" in b.params[0] and "norm" not in b.params[0])
]
chosen = matrices[setting.blocks]
cosine = xr.concat(
    [cl.cosine_to(log, name).sel(block=chosen).mean("block") for name in REFERENCES],
    xr.DataArray(list(REFERENCES), dims="to", name="to"),
)
late = cosine.isel(step=slice(cosine.sizes["step"] // 4, None)).mean("step")
order = [
    *REFERENCES,
    *sorted(METHODS, key=lambda name: -float(late.sel(to=setting.reference, algorithm=name))),
]
late = late.sel(algorithm=order).transpose("algorithm", "to")
print(late.to_pandas().round(3).to_string())
for name in METHODS:
    mine = late.sel(algorithm=name)
    print(
        f"{name:>10s} is nearest to {list(REFERENCES)[int(mine.values.argmax())]},"
        f" {float(mine.max()):.3f}"
    )

figure = plt.figure(figsize=(17, 9), layout="constrained")
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

panels = right.subplots(5, 5, sharex=True, sharey=True)
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
right.supylabel("cosine similarity, mean over blocks", fontsize=10)
figure.suptitle(f"Which curvature does each method follow? {setting.title}")
options.out.mkdir(parents=True, exist_ok=True)
name = "which_curvature.png" if options.model == "mlp-256-20" else "which_curvature_gpt_tiny.png"
figure.savefig(options.out / name, dpi=110)
print("wrote", options.out / name)
