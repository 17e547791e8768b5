"""Thesis Figure 2.4: K-BFGS-20 and the others of Figure 2.2 on MNIST with minibatches of 100 (Table
2.6, which Figures 2.5 and 2.6 share).
"""

from dataclasses import replace

from curvlab.reproduction import Claim, Extent, Method, load_script, main

OURS, FIRST = ["K-BFGS", "K-BFGS(L)"], ["Adam", "RMSprop", "SGD-m"]
VALUES = {  # Table 2.6: (learning rate, damping) on MNIST, FACES, CURVES
    "K-BFGS": ((0.1, 0.3), (0.03, 0.03), (0.3, 1)),
    "K-BFGS(L)": ((0.1, 0.3), (0.03, 0.3), (0.3, 0.3)),
    "KFAC": ((0.1, 0.3), (0.03, 0.3), (0.03, 0.1)),
    "Adam": ((1e-4, 1e-4), (3e-5, 1e-4), (3e-4, 1e-4)),
    "RMSprop": ((1e-4, 1e-4), (3e-5, 1e-4), (3e-3, 1e-4)),
    "SGD-m": ((0.03, 0), (0.01, 0), (0.03, 0)),
}
THOUSAND = load_script("figure-2.2")
METHODS: dict[str, Method] = {
    label: replace(method, values=dict(zip(THOUSAND.problems, VALUES[label], strict=True)))
    for label, method in THOUSAND.methods.items()
}

FIGURE = replace(
    THOUSAND,
    shows="thesis Figure 2.4, Table 2.6: Figure 2.2 on MNIST with minibatches of 100",
    claim=(
        "Our proposed methods continue to demonstrate advantageous performance, both in training"
        " and testing (2.8.3)"
    ),
    problems=["MNIST"],
    methods=METHODS,
    batch=100,
    paper=Extent(seconds=THOUSAND.paper.seconds),  # "we did not experiment with 20 random seeds"
    claims=[
        Claim("they are below the first-order methods, loss against time", OURS, FIRST, "time"),
        Claim(
            "they are below the first-order methods, test error against time",
            OURS,
            FIRST,
            "time",
            "val_error",
        ),
        Claim(
            "K-BFGS(L) clearly outperforms KFAC in training",
            ["K-BFGS(L)"],
            ["KFAC"],
            "time",
            problems=["CURVES"],
        ),
    ],
)

if __name__ == "__main__":
    main(FIGURE, __file__)
