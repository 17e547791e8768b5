"""Thesis Figure 4.2: TNT, KFAC, Shampoo, Adam and SGD-m on three autoencoders, minibatches of 1000,
no L2, T₁ = 1, T₂ = 20.
"""

from curvlab.reproduction import (
    AUTOENCODERS,
    DOCUMENT_SECONDS,
    Claim,
    Comparison,
    Extent,
    Method,
    main,
)

PROBLEMS = ["MNIST", "FACES", "CURVES"]
VALUES = {  # Table 4.3: label: (algorithm, (learning rate, damping) in the order of PROBLEMS)
    "TNT": ("tnt", ((1e-4, 0.1), (1e-6, 0.003), (3e-6, 0.01))),
    "KFAC": ("kfac", ((0.03, 1), (0.01, 0.1), (0.3, 30))),
    "Shampoo": ("shampoo", ((3e-4, 3e-4), (3e-4, 3e-4), (3e-4, 3e-4))),
    "Adam": ("adam", ((1e-4, 1e-4), (1e-4, 1e-4), (1e-3, 1e-3))),
    "SGD-m": ("sgd-m", ((0.003, 0), (0.001, 0), (0.003, 0))),
}

FIGURE = Comparison(
    shows="thesis Figure 4.2, Table 4.3: TNT, KFAC, Shampoo, Adam and SGD-m on three autoencoders",
    claim=(
        "TNT outperformed SGD with momentum, Adam and Shampoo, both in terms of per-epoch progress"
        " and process time … TNT outperforms KFAC on CURVES, performs similarly as KFAC on FACES,"
        " and underperforms KFAC on MNIST (4.7.1)"
    ),
    problems=PROBLEMS,
    batch=1000,
    methods={
        label: Method(name, dict(zip(PROBLEMS, each, strict=True)))
        for label, (name, each) in VALUES.items()
    },
    measures=["train_loss"],
    cpu=AUTOENCODERS,
    paper=Extent(
        seconds=DOCUMENT_SECONDS, seeds=5
    ),  # the seconds of chapter 3: chapter 4 names none
    claims=[
        Claim(
            "TNT outperforms SGD-m, Adam and Shampoo in epochs",
            ["TNT"],
            ["SGD-m", "Adam", "Shampoo"],
        ),
        Claim(
            "TNT outperforms SGD-m, Adam and Shampoo in time",
            ["TNT"],
            ["SGD-m", "Adam", "Shampoo"],
            "time",
        ),
        Claim("TNT outperforms KFAC on CURVES", ["TNT"], ["KFAC"], problems=["CURVES"]),
        Claim(
            "TNT performs similarly as KFAC on FACES",
            ["TNT"],
            ["KFAC"],
            within=0.1,
            alike=True,
            problems=["FACES"],
        ),
        Claim("TNT underperforms KFAC on MNIST", ["KFAC"], ["TNT"], problems=["MNIST"]),
    ],
)

if __name__ == "__main__":
    main(FIGURE, __file__)
