"""Three fits of one Kronecker product to the Fisher block, by moments, likelihood and norm, beside
KFAC and EKFAC: relative errors in two norms and the Kullback-Leibler divergence, block by block.

    python analyses/kronecker_fits.py [--steps 200] [--seeds 0 1] [--out FOLDER] [--log FILE.json]

The matrix that all fit is C = F + λI, F the exact Fisher block of one set of examples (all labels),
λ a hundredth of its mean eigenvalue, so that C has a likelihood.
moments: U ⊗ V / tr C of the two contractions of C, the tensor normal of TNT (thesis 4.3.2);
likelihood: the matrix normal of greatest likelihood, what KL-Shampoo tends to (Lin et al. 2025);
Frobenius: the nearest Kronecker product (Van Loan and Pitsianis 1993). KFAC's G ⊗ A + λI and
EKFAC's diagonal in its eigenbasis are no fits of C's, and the latter no Kronecker product. KL is
that of N(0, C) from N(0, fit), over the order of the block. At the start, and after some steps of
Adam.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import Tensor

import curvlab as cl
from curvlab.linalg.kronecker import nearest_kronecker
from curvlab.linalg.matrix_normal import gaussian_kl, kronecker_likelihood_fit

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--steps", type=int, nargs="+", default=[0, 20, 200], help="of Adam")
parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
parser.add_argument("--models", nargs="+", default=["mlp-256-20", "gpt-tiny"])
parser.add_argument("--log", type=Path, help="keep what is measured there, and read what is there")
parser.add_argument("--out", type=Path, default=Path("analyses/figures"))
options = parser.parse_args()
torch.set_num_threads(1)

DAMPING = 0.01  # of the mean eigenvalue
# {model: (data, examples, learning rate, blocks)}; gpt-tiny's are the two outputs of attention
# and the two of the MLP, of windows of 16 symbols
MODELS: dict[str, tuple[str, int, float, dict[str, str]]] = {
    "mlp-256-20": (
        "mnist16",
        500,
        1e-3,
        {str(k): f"layer {k}" for k in range(2, 7)},
    ),
    "gpt-tiny": (
        "shakespeare32",
        8,
        1e-2,
        {"5": "attn out 1", "11": "attn out 2"},
    ),
}
SYMBOLS = 16
FITS = {
    "moments": ("#D55E00", "s"),
    "likelihood": ("#009E73", "^"),
    "Frobenius": ("#000000", "D"),
    "kfac": ("#0072B2", "o"),
    "ekfac": ("#CC79A7", "v"),
}
PRODUCTS = ("moments", "likelihood", "Frobenius")
ERRORS = {
    "frobenius": "relative error, Frobenius norm",
    "spectral": "relative error, spectral norm",
    "kl": "KL(N(0, C) ‖ N(0, fit)) / D, nat",
}


def by_moments(C: Tensor, shape: tuple[int, int]) -> Tensor:
    tensor = C.view(*shape, *shape)
    U, V = torch.einsum("oipi->op", tensor), torch.einsum("oioj->ij", tensor)
    return torch.kron(U, V) / C.diagonal().sum()


def by_likelihood(C: Tensor, shape: tuple[int, int]) -> Tensor:
    """The matrices √D L e_k, L Lᵀ = C, are a population whose second moment is C."""
    factor = torch.linalg.cholesky(C)
    population = (len(C) ** 0.5 * factor.mT).reshape(-1, *shape)
    return torch.kron(*kronecker_likelihood_fit(population, tolerance=1e-10))


def by_norm(C: Tensor, shape: tuple[int, int]) -> Tensor:
    return nearest_kronecker(C, *shape).dense()


def fits_of(terms: Any) -> dict[str, Tensor]:
    """{fit: matrix}, and C itself under the name of the exact one."""
    C = terms.dense()
    eye = DAMPING * C.diagonal().mean() * torch.eye(len(C), dtype=C.dtype)
    C = C + eye
    G, A = terms.single().factors
    basis = torch.kron(torch.linalg.eigh(G)[1], torch.linalg.eigh(A)[1])
    diagonal = ((basis.mT @ C) * basis.mT).sum(1)
    makers: dict[str, Callable[[Tensor, tuple[int, int]], Tensor]] = {
        "moments": by_moments,
        "likelihood": by_likelihood,
        "Frobenius": by_norm,
    }
    found = {name: make(C, terms.shape) for name, make in makers.items()}
    return found | {
        "kfac": torch.kron(G, A) + eye,
        "ekfac": (basis * diagonal) @ basis.mT,
        "exact": C,
    }


def errors(fit: Tensor, C: Tensor) -> dict[str, float]:
    return {
        "frobenius": float((fit - C).norm() / C.norm()),
        "spectral": float(
            torch.linalg.eigvalsh(fit - C).abs().max() / torch.linalg.eigvalsh(C)[-1]
        ),
        "kl": gaussian_kl(C, fit) / len(C),
    }


def measured(model: str, seed: int) -> list[dict[str, Any]]:
    """A row for each block, number of steps and fit."""
    data, count, lr, names = MODELS[model]
    train, _ = cl.datasets.load(data)
    tokens = model == "gpt-tiny"
    likelihood: Any = cl.likelihoods.Tokens() if tokens else cl.likelihoods.Categorical()
    network = cl.models.build(model, seed=seed)

    def cut(x: Any, y: Tensor) -> tuple[Tensor, Tensor]:
        return (x[:, :SYMBOLS], y[:, :SYMBOLS]) if tokens else (x, y)

    objective = cl.Objective(network, likelihood, seed=seed)
    optimizer = cl.optimizer("adam", objective, lr=lr)
    batches = iter(train.batches(32 if tokens else 500, epochs=5, seed=seed))
    x, y = cut(*next(iter(train.batches(count, seed=seed + 1))))
    rows, taken = [], 0
    for steps in options.steps:
        for _ in range(steps - taken):
            optimizer.step(objective.closure(*cut(*next(batches))))
        taken = steps
        exact_network = cl.models.build(model, seed=seed)
        exact_network.load_state_dict(network.state_dict())
        precise = cl.Objective(exact_network.double(), likelihood, seed=seed)
        for block, shown in names.items():
            inputs = x if tokens else x.double()
            terms = cl.exact.kronecker_terms(precise, inputs, y, "fisher", block)
            found = fits_of(terms)
            for name in FITS:
                row = {"model": model, "seed": seed, "steps": steps, "block": shown, "fit": name}
                rows.append(row | errors(found[name], found["exact"]))
    return rows


rows: list[dict[str, Any]] = []
if options.log and options.log.exists():
    rows = json.loads(options.log.read_text(encoding="utf-8"))
else:
    for model in options.models:
        for seed in options.seeds:
            rows += measured(model, seed)
            print(f"  {model}, seed {seed}", flush=True)
    if options.log:
        options.log.write_text(json.dumps(rows), encoding="utf-8")


def value(measure: str, **chosen: Any) -> list[float]:
    return [float(row[measure]) for row in rows if all(row[key] == v for key, v in chosen.items())]


for model in options.models:
    print(f"{model}: mean over blocks and {len(options.seeds)} seeds [least, largest]")
    for steps in options.steps:
        for name in FITS:
            each = [value(m, model=model, steps=steps, fit=name) for m in ERRORS]
            words = (f"{np.mean(v):.3f} [{min(v):.3f}, {max(v):.3f}]" for v in each)
            print(f"  {steps:4d} steps {name:>10s}  " + "   ".join(words))
        by = {m: {f: value(m, model=model, steps=steps, fit=f) for f in FITS} for m in ERRORS}
        nearest = all(
            min(by["frobenius"][f][k] for f in PRODUCTS) == by["frobenius"]["Frobenius"][k]
            for k in range(len(by["frobenius"]["kfac"]))
        )
        likeliest = all(
            min(by["kl"][f][k] for f in PRODUCTS) == by["kl"]["likelihood"][k]
            for k in range(len(by["kl"]["kfac"]))
        )
        ordered = all(
            e <= k * (1 + 1e-12)
            for e, k in zip(by["frobenius"]["ekfac"], by["frobenius"]["kfac"], strict=True)
        )
        print(
            f"  {steps:4d} steps: of the products Frobenius's is nearest in its norm: {nearest};"
            f" likelihood's has the least KL: {likeliest}; EKFAC no further than KFAC: {ordered}"
        )

figure, axes = plt.subplots(
    len(ERRORS), len(options.models), figsize=(12, 9.5), layout="constrained", squeeze=False
)
for column, model in enumerate(options.models):
    blocks = list(MODELS[model][3].values())
    groups = [(block, steps) for block in blocks for steps in options.steps]
    at = np.arange(len(groups)) + np.repeat(np.arange(len(blocks)), len(options.steps))
    for ax, (measure, label) in zip(axes[:, column], ERRORS.items(), strict=True):
        for k, (name, (colour, marker)) in enumerate(FITS.items()):
            found = [value(measure, model=model, steps=s, block=b, fit=name) for b, s in groups]
            middle = np.array([np.mean(v) for v in found])
            ends = np.array([[np.mean(v) - min(v), max(v) - np.mean(v)] for v in found]).T
            ax.errorbar(
                at + 0.13 * (k - 2),
                middle,
                ends,
                color=colour,
                marker=marker,
                ms=5,
                ls="",
                lw=1,
                label=name,
            )
        middle_of = options.steps[len(options.steps) // 2]  # names its block below
        ax.set_xticks(
            at,
            [f"{steps}\n{block}" if steps == middle_of else str(steps) for block, steps in groups],
        )
        ax.tick_params(axis="x", labelsize=8)
        ax.set_ylabel(label, fontsize=9)
        ax.grid(alpha=0.3, axis="y")
        if measure == "kl":
            ax.set_yscale("log")
            ax.set_xlabel("steps of Adam, and block")
    axes[0, column].set_title(f"{model}: {MODELS[model][1]} examples", fontsize=10)
figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
figure.suptitle("Fits to the damped Fisher block C: mean and range over seeds")
options.out.mkdir(parents=True, exist_ok=True)
figure.savefig(options.out / "kronecker_fits.png", dpi=110)
print("wrote kronecker_fits.png")
