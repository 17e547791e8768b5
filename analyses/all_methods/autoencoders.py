"""Autoencoders of MNIST and CURVES by every applicable method, at the documents' values:
minibatches of 1000, no L2.

Not applicable: block methods (dense blocks of 785,000²), kflr (784 passes back a minibatch),
tnt-ideal (that over all data), smw-gn (784 N₂ rows).
"""

from dataclasses import replace

from curvlab.reproduction import (
    DOCUMENT_SECONDS,
    Claim,
    Comparison,
    Extent,
    Method,
    load_script,
    main,
)

CHAPTER_2, CHAPTER_3, CHAPTER_4, EMPIRICAL, S2QN = (
    load_script(name).methods
    for name in ("figure-2.2", "figure-3.1", "figure-4.2", "figure-4.4", "s2qn-figure-2")
)

SLOW = ("skqn-l", "skqn-b1", "skqn-b2", "smw-ng", "smw-ng-bd-ef", "hf", "lbfgs")
ALIKE = (
    "k-bfgs-20",
    "k-bfgs-l-20",
    "kf-bfgs-cnn",
    "kfac-ef",
    "tnt-ef",
)  # others of their kind go all the way
AT_MOST = dict.fromkeys((*SLOW, *ALIKE), 10)

FIGURE = Comparison(
    shows="autoencoders of MNIST and CURVES by every applicable method, at the documents' values",
    claim=(
        "our algorithms clearly outperformed the first-order methods, except for RMSprop/Adam on"
        " CURVES … and performed comparably to KFAC (2.8.1); our proposed methods performed"
        " similarly to KFAC, particularly when amortization was used (3.7.1)"
    ),
    problems=["MNIST", "CURVES"],
    batch=1000,
    methods={
        **{label: CHAPTER_3[label] for label in ("K-BFGS", "K-BFGS, T = 20", "K-BFGS(L)")},
        "KF-BFGS-CNN": Method("kf-bfgs-cnn", (0.3, 0.3)),  # no table's: as K-BFGS
        "K-BFGS-20": CHAPTER_2["K-BFGS"],
        "K-BFGS(L)-20": CHAPTER_2["K-BFGS(L)"],
        "KFAC": CHAPTER_4["KFAC"],
        "KFAC, π = 1": CHAPTER_2["KFAC"],
        "KFAC-EF": EMPIRICAL["KFAC-EF"],
        "TNT": CHAPTER_4["TNT"],
        "TNT-EF": EMPIRICAL["TNT-EF"],
        "Shampoo": CHAPTER_4["Shampoo"],
        **{
            label: replace(
                S2QN[label],
                values={
                    "MNIST": S2QN[label].values["MNIST"],
                    "CURVES": S2QN[label].values["CURVES, 1000"],
                },
            )
            for label in ("SKQN-L", "SKQN-B1", "SKQN-B2")
        },
        "SMW-NG": Method("smw-ng", (0.1, 1.001)),  # thesis 5.8, as the next
        "SMW-NG-BD": Method("smw-ng-bd-ef", (0.1, 1.001)),
        "HF": Method("hf", (0.1, 1.001)),
        "L-BFGS": Method("lbfgs", (0.1, 0)),
        "SGD-m": CHAPTER_4["SGD-m"],
        "Adam": CHAPTER_4["Adam"],
        "RMSprop": CHAPTER_2["RMSprop"],
    },
    measures=["train_loss", "train_error"],
    cpu=Extent(epochs={"MNIST": 5, "CURVES": 100}, tests=0, evaluated=10_000, at_most=AT_MOST),
    paper=Extent(seconds=DOCUMENT_SECONDS),
    claims=[
        Claim(
            "K-BFGS and K-BFGS(L) perform similarly to KFAC in epochs",
            ["K-BFGS", "K-BFGS(L)"],
            ["KFAC"],
            within=0.1,
            alike=True,
        ),
        Claim(
            "all three outperform the first-order methods",
            ["K-BFGS", "K-BFGS(L)", "KFAC"],
            ["SGD-m", "Adam", "RMSprop"],
        ),
    ],
)

if __name__ == "__main__":
    main(FIGURE, __file__)
