"""Thesis Figure 4.3: TNT, KFAC, Shampoo, Adam and SGD-m on four CNNs, random crops and flips,
minibatches of 128.

Section 4.7.1 says that dampings were fixed (1e-8 of Adam, 0.03 of KFAC, 0.01 of TNT and Shampoo),
Table 4.4 and 4.7.2 that they were searched for: the table is followed.
"""

from curvlab.reproduction import NETWORKS, Claim, Comparison, Extent, Reported, convolutional, main

PROBLEMS = ["VGG16, CIFAR-10", "ResNet32, CIFAR-10", "VGG16, CIFAR-100", "ResNet32, CIFAR-100"]
VALUES = {  # Table 4.4: (initial learning rate, weight decay, damping), in the order of PROBLEMS
    "TNT": ((1e-4, 10, 0.1), (1e-4, 10, 0.01), (1e-4, 10, 0.1), (1e-4, 10, 0.01)),
    "KFAC": ((3e-4, 1, 0.001), (0.01, 0.1, 0.1), (0.01, 0.1, 1), (0.1, 0.01, 0.1)),
    "Shampoo": ((0.001, 1, 0.1), (0.01, 0.1, 0.01), (0.001, 1, 0.01), (0.01, 0.1, 0.01)),
    "Adam": ((0.003, 0.1, 0.1), (0.003, 0.1, 0.01), (3e-4, 1, 0.01), (0.01, 0.1, 0.01)),
    "SGD-m": ((0.003, 0.1, 0), (0.03, 0.01, 0), (0.003, 0.1, 0), (0.03, 0.01, 0)),
}
ACCURACIES = {  # Table 4.2, likewise
    "TNT": (94.31, 93.48, 76.01, 71.70),
    "KFAC": (94.39, 93.31, 76.21, 71.14),
    "Shampoo": (93.88, 93.13, 76.02, 70.35),
    "Adam": (94.28, 93.35, 75.64, 70.35),
    "SGD-m": (94.14, 93.13, 75.41, 70.18),
}

FIGURE = Comparison(
    shows="thesis Figure 4.3, Tables 4.2 and 4.4: TNT, KFAC, Shampoo, Adam and SGD-m on four CNNs",
    claim=(
        "second-order methods and Adam exhibit roughly the same generalization performance as SGD"
        " with momentum … TNT has a similar (and sometimes better) generalization performance than"
        " the other methods (4.7.1)"
    ),
    problems=PROBLEMS,
    batch=128,
    methods=convolutional(
        {label: dict(zip(PROBLEMS, each, strict=True)) for label, each in VALUES.items()}
    ),
    reported=Reported(
        {p: {label: each[i] for label, each in ACCURACIES.items()} for i, p in enumerate(PROBLEMS)},
        accuracies=True,
    ),
    cpu=NETWORKS,
    paper=Extent(seeds=5),
    claims=[
        Claim(
            "TNT is as accurate as the others",
            ["TNT"],
            ["KFAC", "Shampoo", "Adam", "SGD-m"],
            "lowest",
            "val_error",
            within=0.05,
        ),
        Claim("TNT is more accurate than SGD-m", ["TNT"], ["SGD-m"], "lowest", "val_error"),
    ],
)

if __name__ == "__main__":
    main(FIGURE, __file__)
