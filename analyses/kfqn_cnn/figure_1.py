"""Ren and Goldfarb (2021) Figure 1: KF-BFGS-CNN, KF-BFGS(L)-CNN, KFAC, Adam and SGD-m on CIFAR-10
with All-CNN-C and VGG16.

Minibatches of 256, crops and flips, constant learning rates, momentum averaged, L2 of 5e-4 in the
gradient and not in the loss. Table 3 is here, for Figures 2, 3 and 4 too.
"""

from typing import Any

from curvlab.reproduction import NETWORKS, Claim, Comparison, Extent, Method, main

PROBLEMS = [
    "All-CNN-C, CIFAR-10",
    "VGG16 as printed, CIFAR-10",
    "All-CNN-C, CIFAR-100",
    "VGG16 as printed, CIFAR-100",
]
VALUES = {  # Table 3: (learning rate, damping), in the order of PROBLEMS
    "KF-BFGS-CNN": ((30, 30), (30, 100), (100, 100), (30, 100)),
    "KF-BFGS(L)-CNN": ((30, 30), (3, 3), (100, 100), (10, 100)),
    "KFAC": ((100, 30), (100, 100), (1000, 100), (1, 0.3)),
    "Adam": ((1e-4, 1e-4), (0.01, 0.1), (1e-4, 1e-8), (1e-3, 0.01)),
    "SGD-m": ((0.1, 0), (0.1, 0), (0.3, 0), (0.03, 0)),
}
ALGORITHMS: dict[str, tuple[str, dict[str, Any]]] = {
    "KF-BFGS-CNN": ("kf-bfgs-cnn", {}),
    "KF-BFGS(L)-CNN": ("kf-bfgs-l-cnn", {}),
    "KFAC": ("kfac-20", {}),
    "Adam": ("adam", {"decay": 0.9}),
    "SGD-m": ("sgd-m", {"momentum_kind": "average"}),
}
OURS, OTHERS = ["KF-BFGS-CNN", "KF-BFGS(L)-CNN"], ["KFAC", "Adam", "SGD-m"]

FIGURE = Comparison(
    shows=(
        "Ren and Goldfarb 2021, Figure 1, Table 3: KF-BFGS-CNN, KFAC, Adam and SGD-m on CIFAR-10"
        " with All-CNN-C and VGG16"
    ),
    claim=(
        "in terms of epochs, KF-BFGS-CNN and KF-BFGS(L)-CNN always performed better in our"
        " experiments than the other algorithms (or at least as well as the best ones), except for"
        " minimizing the training loss in Figure 2 d) … both of our Kronecker-factored QN methods"
        " outperformed KFAC in terms of CPU time (6)"
    ),
    problems=PROBLEMS[:2],
    batch=256,
    methods={
        label: Method(name, dict(zip(PROBLEMS, VALUES[label], strict=True)), options)
        for label, (name, options) in ALGORITHMS.items()
    },
    spread="error of the mean",
    l2=2.5e-4,
    cpu=NETWORKS,
    paper=Extent(seconds=2000, seeds=5),
    claims=[
        Claim(
            "they are at least as good as the others in epochs, training",
            OURS,
            OTHERS,
            within=0.02,
            problems=PROBLEMS[:3],
        ),
        Claim("they outperform the others in epochs, testing", OURS, OTHERS, measure="val_error"),
        Claim("they outperform KFAC in time", OURS, ["KFAC"], "time"),
    ],
)

if __name__ == "__main__":
    main(FIGURE, __file__)
