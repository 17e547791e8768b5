"""Thesis Figure 3.4: K-BFGS, K-BFGS(L), KFAC, Adam and SGD-m on VGG16 with CIFAR-10, random crops
and flips, minibatches of 128.

Tables 3.4 and 3.7 are here, for Figures 3.5 to 3.7 too.
"""

from curvlab.reproduction import NETWORKS, Claim, Comparison, Extent, Reported, convolutional, main

PROBLEMS = ["VGG16, CIFAR-10", "ResNet32, CIFAR-10", "VGG16, CIFAR-100", "ResNet32, CIFAR-100"]
VALUES = {  # Table 3.7: (initial learning rate, weight decay, damping), in the order of PROBLEMS
    "K-BFGS": ((30, 1e-5, 1e4), (100, 1e-5, 1e3), (0.1, 0.01, 10), (1e3, 1e-6, 1e4)),
    "K-BFGS(L)": ((1, 1e-3, 100), (1e3, 1e-6, 1e4), (0.3, 0.001, 100), (10, 1e-4, 100)),
    "KFAC": ((3e-4, 1, 0.001), (0.01, 0.1, 0.1), (0.01, 0.1, 1), (0.1, 0.01, 0.1)),
    "Adam": ((0.003, 0.1, 0.1), (0.003, 0.1, 0.01), (3e-4, 1, 0.01), (0.01, 0.1, 0.01)),
    "SGD-m": ((0.003, 0.1, 0), (0.03, 0.01, 0), (0.003, 0.1, 0), (0.03, 0.01, 0)),
}
ACCURACIES = {  # Table 3.4, likewise
    "K-BFGS": (94.28, 93.45, 75.65, 71.46),
    "K-BFGS(L)": (94.24, 93.38, 75.43, 70.98),
    "KFAC": (94.39, 93.31, 76.21, 71.14),
    "Adam": (94.28, 93.35, 75.64, 70.35),
    "SGD-m": (94.14, 93.13, 75.41, 70.18),
}

FIGURE = Comparison(
    shows=(
        "thesis Figure 3.4, Tables 3.4 and 3.7: K-BFGS, KFAC, Adam and SGD-m on VGG16 with CIFAR-10"
    ),
    claim=(
        "K-BFGS clearly outperformed Adam and SGD-m in terms of generalization, with the exception"
        " that K-BFGS and Adam achieved the same accuracy on VGG16+CIFAR10; K-BFGS outperformed"
        " KFAC on the two ResNet32 problems (3.7.1)"
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
    cpu=NETWORKS,
    paper=Extent(seeds=5),
    claims=[
        Claim("K-BFGS is more accurate than SGD-m", ["K-BFGS"], ["SGD-m"], "lowest", "val_error"),
        Claim(
            "K-BFGS is more accurate than Adam",
            ["K-BFGS"],
            ["Adam"],
            "lowest",
            "val_error",
            problems=PROBLEMS[1:],
        ),
        Claim(
            "K-BFGS is more accurate than KFAC",
            ["K-BFGS"],
            ["KFAC"],
            "lowest",
            "val_error",
            problems=PROBLEMS[1::2],
        ),
    ],
)

if __name__ == "__main__":
    main(FIGURE, __file__)
