"""AdaHessian's diagonal: with one draw a step it tends to the norms of the Hessian's rows.

    python analyses/adahessian_diagonal.py [--draws 20000] [--steps 50] [--seed 0] [--out FOLDER]

AdaHessian (Yao et al. 2021) draws one z of ±1 a step, D = z ⊙ Hz, and divides by √v, v the moving
average of D ⊙ D. E D is the diagonal of H, but E D ⊙ D = Σ_j H_ij², the squared norm of its row:
what a root of the second moment tends to is ‖H_i·‖, not |H_ii|. The mean of k draws before the
square has H_ii² + (1/k) Σ_{j≠i} H_ij². Measured on a network whose whole Hessian is formed, after
some steps of Adam, in float64: D by products with vectors, rows and diagonal of the dense matrix.
"""

import argparse
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import Tensor

import curvlab as cl

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--draws", type=int, default=20000, help="of z, beside single ones")
parser.add_argument("--steps", type=int, default=50, help="of Adam before")
parser.add_argument("--examples", type=int, default=500)
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--out", type=Path, default=Path("analyses/figures"))
options = parser.parse_args()

MEANS = (1, 10, 100)  # draws that are averaged before the square
AT_ONCE = 500

torch.manual_seed(options.seed)
network = cl.models.mlp([64, 16, 16, 10], torch.nn.Tanh).double()
train = cl.datasets.load("mnist16")[0]
objective = cl.Objective(network, cl.likelihoods.Categorical(), seed=options.seed)


def smaller(x: Any) -> Tensor:
    """8×8 pixels, as means of 2×2."""
    pixels = torch.nn.functional.avg_pool2d(x.view(-1, 1, 16, 16), 2)
    return pixels.flatten(1).double()


optimizer = cl.optimizer("adam", objective, lr=1e-2)
batches = iter(train.batches(500, epochs=2, seed=options.seed))
for _ in range(options.steps):
    x, y = next(batches)
    optimizer.step(objective.closure(smaller(x), y))
x, y = next(iter(train.batches(options.examples, seed=options.seed + 1)))
x = smaller(x)

H = cl.exact.matrix(objective, x, y, "hessian", None).dense()
diagonal, rows = H.diagonal().abs(), H.norm(dim=1)
product = cl.exact.product(objective, x, y, "hessian")
generator = torch.Generator().manual_seed(options.seed)
sums = {k: torch.zeros_like(rows) for k in MEANS}
first = torch.zeros_like(rows)
for _ in range(options.draws // AT_ONCE):
    z = torch.randint(0, 2, (len(H), AT_ONCE), generator=generator).double() * 2 - 1
    D = z * (product @ z)  # a column a draw
    first += D.sum(1)
    for k in MEANS:
        sums[k] += D.view(len(H), -1, k).mean(2).square().sum(1) * k
count = options.draws // AT_ONCE * AT_ONCE
roots = {k: (total / count).sqrt() for k, total in sums.items()}
true = {k: (diagonal**2 + (rows**2 - diagonal**2) / k).sqrt() for k in MEANS}


def apart(one: Tensor, other: Tensor) -> str:
    ratio = (one / other)[rows > 0].numpy()  # weights of pixels that are always 0 have no row
    low, middle, high = np.quantile(ratio, [0.05, 0.5, 0.95])
    return f"median {middle:.2f}, 90 % within [{low:.2f}, {high:.2f}]"


def cosine(one: Tensor, other: Tensor) -> float:
    return float(one @ other / (one.norm() * other.norm()))


print(
    f"{len(H)} parameters, {options.examples} examples, after {options.steps} steps; {count} draws"
)
print(f"mean of D against the diagonal: cosine {cosine(first / count, H.diagonal()):.4f}")
for k in MEANS:
    print(f"√E(mean of {k} draws)² over |H_ii|:   {apart(roots[k], diagonal)}")
    print(f"                     over ‖H_i·‖:   {apart(roots[k], rows)}")
    print(f"                     over its limit: {apart(roots[k], true[k])}")
gradient = torch.cat([g.flatten() for g in objective.closure(x, y).observe().gradients.values()])
reference = gradient / (diagonal + 1e-3)
for name, scale in {
    "√E D² (AdaHessian)": roots[1],
    "‖H_i·‖": rows,
    **{f"mean of {k} draws": roots[k] for k in MEANS[1:]},
    "1 (the gradient)": torch.ones_like(rows),
}.items():
    found = cosine(gradient / (scale + 1e-3), reference)
    print(f"g / ({name} + 1e-3): cosine to g / (|H_ii| + 1e-3) is {found:.3f}")

figure, axes = plt.subplots(1, 3, figsize=(14, 4.4), layout="constrained")
panels: Any = axes
limits = [1e-5, 2 * float(rows.max())]
for ax, truth, label, title in (
    (panels[0], diagonal, "|H_ii|", "against the diagonal"),
    (panels[1], rows, "‖H_i·‖₂", "against the rows' norms"),
):
    for k, colour, marker in zip(MEANS, ("#D55E00", "#009E73", "#0072B2"), "os^", strict=True):
        if ax is panels[1] and k > 1:
            continue
        seen = truth > limits[0]
        ax.loglog(
            truth[seen],
            roots[k][seen],
            marker,
            color=colour,
            ms=3,
            alpha=0.6,
            label="one draw a step: AdaHessian" if k == 1 else f"mean of {k} draws",
        )
    ax.loglog(limits, limits, "k--", lw=1, label="equal")
    ax.set_xlabel(label)
    ax.set_ylabel("√ of the mean of D ⊙ D")
    ax.set_title(title, fontsize=10)
    ax.legend(frameon=False, fontsize=8, loc="upper left")
    ax.grid(alpha=0.3)
for k, colour in zip(MEANS, ("#D55E00", "#009E73", "#0072B2"), strict=True):
    ratio = (roots[k] / diagonal.clamp_min(1e-12))[rows > 0].sort().values
    panels[2].semilogx(
        ratio,
        np.linspace(0, 1, len(ratio)),
        color=colour,
        label=f"mean of {k}" if k > 1 else "one draw",
    )
panels[2].axvline(1, color="k", lw=1, ls="--")
panels[2].set_xlim(0.5, 1e4)
panels[2].set_xlabel("√ of the mean of D ⊙ D, over |H_ii|")
panels[2].set_ylabel("fraction of parameters below")
panels[2].set_title("how much too large", fontsize=10)
panels[2].legend(frameon=False, fontsize=9)
panels[2].grid(alpha=0.3)
figure.suptitle(
    f"AdaHessian's diagonal: 64-16-16-10 tanh on MNIST, {len(H)} parameters, {count} draws"
)
options.out.mkdir(parents=True, exist_ok=True)
figure.savefig(options.out / "adahessian_diagonal.png", dpi=110)
print("wrote adahessian_diagonal.png")
