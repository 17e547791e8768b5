"""Ren and Goldfarb (2021) Figure 3: KF-BFGS-CNN at six dampings on the four problems of Figures 1
and 2, with SGD-m beside.

"their corresponding best learning rates" are not published: here each damping keeps the ratio of
learning rate to damping that Table 3 has on the problem.

ConvNet (S2QN 6.3) is a fifth problem, not the document's: small enough that two cores see more
than a first epoch. Its ratio is that of All-CNN-C on CIFAR-10, 1; SGD-m has the rate of S2QN's SGD
ten times, since its momentum is an average here.
"""

from dataclasses import replace

from curvlab.reproduction import Claim, Comparison, Method, load_script, main

TUNED = load_script("kfqn-cnn-figure-1")
SMALL = "ConvNet, CIFAR-10"
BEST = {**TUNED.methods["KF-BFGS-CNN"].values, SMALL: (1, 1)}
SGD = TUNED.methods["SGD-m"]
DAMPINGS = (0.3, 1, 3, 10, 30, 100)


def at(damping: float) -> Method:
    return Method(
        "kf-bfgs-cnn",
        {problem: (lr * damping / best, damping) for problem, (lr, best) in BEST.items()},
    )


METHODS = {f"λ = {damping:g}": at(damping) for damping in DAMPINGS}

FIGURE: Comparison = replace(
    TUNED,
    shows="Ren and Goldfarb 2021, Figure 3: KF-BFGS-CNN at six dampings",
    claim=(
        "KF-BFGS-CNN is not very sensitive to the choice of the damping value when combined with"
        " the best learning rate for that choice (B.3)"
    ),
    problems=list(BEST),
    methods={**METHODS, "SGD-m": replace(SGD, values={**SGD.values, SMALL: (0.03, 0)})},
    claims=[
        Claim(
            "every damping is at least as good as SGD-m in testing",
            list(METHODS),
            ["SGD-m"],
            measure="val_error",
            within=0.05,
        )
    ],
)

if __name__ == "__main__":
    main(FIGURE, __file__)
