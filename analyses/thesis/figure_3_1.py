"""Thesis Figure 3.1: K-BFGS, K-BFGS(L), their counterparts of chapter 2, KFAC, Adam and SGD-m on
MNIST.

Minibatches of 1000, no L2, momentum added up (practice). Tables 3.3 and 3.5 are here, for Figures
3.2 and 3.3 too.
"""

from typing import Any

from curvlab.reproduction import (
    AUTOENCODERS,
    DOCUMENT_SECONDS,
    Claim,
    Comparison,
    Extent,
    Method,
    Reported,
    main,
)

PROBLEMS = ["MNIST", "FACES", "CURVES"]
OURS = ["K-BFGS", "K-BFGS(L)"]
VALUES = {  # Table 3.5: (learning rate, damping) on MNIST, FACES, CURVES
    "K-BFGS": ((0.03, 0.3), (0.03, 1), (0.03, 0.3)),
    "K-BFGS, T = 20": ((0.3, 30), (0.03, 3), (0.3, 30)),
    "K-BFGS(L)": ((0.03, 0.3), (0.03, 1), (0.1, 3)),
    "K-BFGS-20": ((0.01, 0.1), (0.01, 0.3), (0.01, 0.03)),
    "K-BFGS(L)-20": ((0.003, 0.1), (0.01, 0.3), (0.003, 0.03)),
    "KFAC": ((0.03, 1), (0.01, 0.1), (0.3, 30)),
    "Adam": ((1e-4, 1e-4), (1e-4, 1e-4), (1e-3, 1e-3)),
    "SGD-m": ((0.003, 0), (0.001, 0), (0.003, 0)),
}
LOSSES = {  # Table 3.3, likewise
    "K-BFGS": (51.60, 5.00, 55.46),
    "K-BFGS, T = 20": (52.01, 4.62, 55.06),
    "K-BFGS(L)": (51.53, 4.83, 55.31),
    "K-BFGS-20": (52.38, 5.46, 56.00),
    "K-BFGS(L)-20": (54.27, 4.92, 55.94),
    "KFAC": (51.24, 4.71, 55.12),
    "Adam": (52.76, 5.33, 55.24),
    "SGD-m": (54.75, 6.47, 55.97),
}
ALGORITHMS: dict[str, tuple[str, dict[str, Any]]] = {
    "K-BFGS": ("k-bfgs", {}),
    "K-BFGS, T = 20": ("k-bfgs", {"update_every": 20}),
    "K-BFGS(L)": ("k-bfgs-l", {}),
    "K-BFGS-20": ("k-bfgs-20", {"momentum_kind": "add"}),
    "K-BFGS(L)-20": ("k-bfgs-l-20", {"momentum_kind": "add"}),
    "KFAC": ("kfac", {}),
    "Adam": ("adam", {}),
    "SGD-m": ("sgd-m", {}),
}

FIGURE = Comparison(
    shows=(
        "thesis Figure 3.1, Tables 3.3 and 3.5: K-BFGS of chapters 3 and 2, KFAC, Adam and SGD-m on"
        " MNIST"
    ),
    claim=(
        "K-BFGS and K-BFGS(L) consistently outperformed their counterparts in Chapter 2 … also"
        " performed better than the first-order methods in most cases except for Adam on CURVES …"
        " performed similarly to KFAC, particularly when amortization was used (3.7.1)"
    ),
    problems=["MNIST"],
    batch=1000,
    methods={
        label: Method(algorithm, dict(zip(PROBLEMS, VALUES[label], strict=True)), options)
        for label, (algorithm, options) in ALGORITHMS.items()
    },
    reported=Reported(
        {p: {label: losses[i] for label, losses in LOSSES.items()} for i, p in enumerate(PROBLEMS)}
    ),
    measures=["train_loss"],
    spread="error of the mean",
    cpu=AUTOENCODERS,
    paper=Extent(seconds=DOCUMENT_SECONDS, seeds=5),
    claims=[
        Claim("K-BFGS outperforms K-BFGS-20, in time", ["K-BFGS"], ["K-BFGS-20"], "time"),
        Claim(
            "K-BFGS(L) outperforms K-BFGS(L)-20, in time", ["K-BFGS(L)"], ["K-BFGS(L)-20"], "time"
        ),
        Claim("both outperform SGD-m, in time", OURS, ["SGD-m"], "time"),
        Claim("both outperform Adam, in time", OURS, ["Adam"], "time", problems=["MNIST", "FACES"]),
        Claim(
            "K-BFGS performs similarly to KFAC, in time",
            ["K-BFGS", "K-BFGS, T = 20"],
            ["KFAC"],
            "time",
            within=0.1,
            alike=True,
        ),
    ],
)

if __name__ == "__main__":
    main(FIGURE, __file__)
