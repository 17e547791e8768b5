"""Thesis Figure 2.2 (2020, Figure 1): K-BFGS-20, K-BFGS(L)-20, KFAC, Adam, RMSprop and SGD-m on
three autoencoders.

Minibatches of 1000, momentum averaged, η/2 ‖θ‖² with η = 1e-5 in the gradient (the losses drawn are
without it).
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

OURS, FIRST = ["K-BFGS", "K-BFGS(L)"], ["Adam", "RMSprop", "SGD-m"]


def values(
    mnist: tuple[float, float], faces: tuple[float, float], curves: tuple[float, float]
) -> dict[str, tuple[float, ...]]:
    return {"MNIST": mnist, "FACES": faces, "CURVES": curves}


FIGURE = Comparison(
    shows=(
        "thesis Figure 2.2, Table 2.5: K-BFGS of chapter 2, KFAC and first-order methods on three"
        " autoencoders"
    ),
    claim=(
        "our algorithms clearly outperformed the first-order methods, except for RMSprop/Adam on"
        " CURVES, with respect to CPU time, and performed comparably to KFAC in terms of both CPU"
        " time and number of epochs (2.8.1)"
    ),
    problems=["MNIST", "FACES", "CURVES"],
    batch=1000,
    methods={  # Table 2.5: (learning rate, damping)
        "K-BFGS": Method("k-bfgs-20", values((0.3, 0.3), (0.1, 0.1), (0.1, 0.01))),
        "K-BFGS(L)": Method("k-bfgs-l-20", values((0.3, 0.3), (0.1, 0.1), (0.3, 0.3))),
        "KFAC": Method("kfac-20", values((1, 3), (0.1, 0.1), (0.3, 0.3))),
        "Adam": Method("adam", values((1e-4, 1e-4), (1e-4, 1e-4), (1e-3, 1e-3)), {"decay": 0.9}),
        "RMSprop": Method("rmsprop", values((1e-4, 1e-4), (1e-4, 1e-4), (1e-3, 1e-3))),
        "SGD-m": Method(
            "sgd-m", values((0.03, 0), (0.01, 0), (0.1, 0)), {"momentum_kind": "average"}
        ),
    },
    l2=0.5e-5,
    cpu=AUTOENCODERS,
    paper=Extent(seconds=DOCUMENT_SECONDS, seeds=20),
    claims=[
        Claim(
            "they outperform the first-order methods in time",
            OURS,
            FIRST,
            "time",
            problems=["MNIST", "FACES"],
        ),
        Claim("they outperform SGD-m in time", OURS, ["SGD-m"], "time", problems=["CURVES"]),
        Claim(
            "they perform comparably to KFAC in time",
            OURS,
            ["KFAC"],
            "time",
            within=0.1,
            alike=True,
        ),
        Claim("they perform comparably to KFAC in epochs", OURS, ["KFAC"], within=0.1, alike=True),
        Claim(
            "test errors of K-BFGS(L) and KFAC are below the first-order methods'",
            ["K-BFGS(L)", "KFAC"],
            FIRST,
            "time",
            "val_error",
        ),
    ],
)

if __name__ == "__main__":
    main(FIGURE, __file__)
