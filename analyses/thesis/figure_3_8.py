"""Thesis Figure 3.8: K-BFGS, K-BFGS(L), KFAC, Adam and SGD-m on ResNet32-4 with CIFAR-10. Tables
3.9 and 3.10 are here, for Figure 3.9 too.
"""

from curvlab.reproduction import WIDE, Claim, Comparison, Extent, Reported, convolutional, main

PROBLEMS = ["ResNet32-4, CIFAR-10", "ResNet32-4, CIFAR-100"]
VALUES = {  # Table 3.10: (initial learning rate, weight decay, damping), in the order of PROBLEMS
    "K-BFGS": ((1e3, 1e-6, 1e4), (100, 1e-5, 1e3)),
    "K-BFGS(L)": ((1e3, 1e-6, 1e4), (1e3, 1e-6, 1e4)),
    "KFAC": ((0.1, 0.01, 1), (0.01, 0.1, 0.01)),
    "Adam": ((0.03, 0.01, 0.1), (0.003, 0.1, 0.01)),
    "SGD-m": ((0.03, 0.01, 0), (0.01, 0.1, 0)),
}
ACCURACIES = {  # Table 3.9, likewise
    "K-BFGS": (95.61, 79.41),
    "K-BFGS(L)": (95.74, 79.18),
    "KFAC": (95.65, 79.45),
    "Adam": (95.64, 78.03),
    "SGD-m": (95.59, 78.24),
}

FIGURE = Comparison(
    shows=(
        "thesis Figure 3.8, Tables 3.9 and 3.10: K-BFGS, KFAC, Adam and SGD-m on ResNet32-4 with"
        " CIFAR-10"
    ),
    claim=(
        "the performance of K-BFGS and K-BFGS(L) remains competitive, in particular for CIFAR-100 …"
        " K-BFGS and K-BFGS(L) are able to scale up as well as the first-order methods in terms of"
        " per-iteration time complexity (3.7.3; the text has them best on CIFAR-100, where Table"
        " 3.9 has KFAC)"
    ),
    problems=PROBLEMS[:1],
    batch=128,
    methods=convolutional(
        {label: dict(zip(PROBLEMS, each, strict=True)) for label, each in VALUES.items()}
    ),
    reported=Reported(
        {p: {label: each[i] for label, each in ACCURACIES.items()} for i, p in enumerate(PROBLEMS)},
        accuracies=True,
    ),
    spread="error of the mean",
    cpu=WIDE,
    paper=Extent(seeds=5),
    claims=[
        Claim(
            "K-BFGS and K-BFGS(L) are as accurate as the others",
            ["K-BFGS", "K-BFGS(L)"],
            ["KFAC", "Adam", "SGD-m"],
            "lowest",
            "val_error",
            within=0.05,
        ),
        Claim(
            "they are more accurate than the first-order methods",
            ["K-BFGS", "K-BFGS(L)"],
            ["Adam", "SGD-m"],
            "lowest",
            "val_error",
            problems=PROBLEMS[1:],
        ),
    ],
)

if __name__ == "__main__":
    main(FIGURE, __file__)
