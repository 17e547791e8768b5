"""Thesis Table 3.2 (2021, Table 2): computation per iteration of one convolution, beyond SGD's: J
channels in, I out, kernels of k × k = |Δ|, images of side × side = |T| places, minibatches of m, p
pairs, K-BFGS every T steps, KFAC's statistics every T and inverses every 5 T.

The formulas' lower-order terms are the table's too; K-BFGS forms no second moment of its inputs.
"""

from types import SimpleNamespace

from torch import nn

from curvlab.reproduction import Axis, Row, Scaling, main


def inputs(s: SimpleNamespace) -> float:
    return s.J * s.k**2


def places(s: SimpleNamespace) -> float:
    return s.side**2


def through(s: SimpleNamespace) -> float:
    return s.m * s.I * inputs(s) * places(s) / s.T  # the additional pass


def seen(s: SimpleNamespace) -> float:
    return (s.m * inputs(s) * places(s) + inputs(s) ** 2 + s.m * s.I * places(s)) / s.T


def kbfgs(s: SimpleNamespace) -> float:
    return through(s) + seen(s) + s.I**2 / s.T + s.I * inputs(s) ** 2 + s.I**2 * inputs(s)


def limited(s: SimpleNamespace) -> float:
    return through(s) + seen(s) + s.p * s.I / s.T + s.I * inputs(s) ** 2 + s.p * s.I * inputs(s)


def kfac(s: SimpleNamespace) -> float:
    moments = s.m * (inputs(s) ** 2 + s.I**2) * places(s) / s.T
    return (
        through(s)
        + moments
        + (inputs(s) ** 3 + s.I**3) / (5 * s.T)
        + s.I * inputs(s) ** 2
        + s.I**2 * inputs(s)
    )


FIGURE = Scaling(
    shows=(
        "thesis Table 3.2: computation per iteration of K-BFGS, K-BFGS(L), KFAC and Adam on a"
        " convolution beyond SGD's"
    ),
    claim=(
        "K-BFGS requires considerably less time to compute curvature information than KFAC. First,"
        " K-BFGS avoids matrix inversion … Second, K-BFGS avoids computing the Ω and Γ matrices of"
        " KFAC from minibatch data (3.5)"
    ),
    layer=lambda s: (nn.Conv2d(s.J, s.I, s.k, padding=s.k // 2), (s.J, s.side, s.side)),
    base={"J": 32, "I": 32, "k": 3, "side": 8, "m": 32, "p": 20, "T": 1},
    axes=[
        Axis("channels", [16, 32, 64, 128, 256], ["J", "I"]),
        Axis("J", [16, 32, 64, 128, 256]),
        Axis("I", [16, 32, 64, 128, 256]),
        Axis("k", [1, 3, 5, 7]),
        Axis("side", [4, 8, 16, 32]),
        Axis("m", [16, 32, 64, 128, 256]),
        Axis("T", [1, 2, 5, 10, 20]),
    ],
    rows={
        "K-BFGS": Row(
            "k-bfgs",
            kbfgs,
            lambda s: inputs(s) ** 2 + s.I**2,
            lambda s: {"update_every": s.T},
            lambda s: s.T,
        ),
        "K-BFGS(L)": Row(
            "k-bfgs-l",
            limited,
            lambda s: inputs(s) ** 2 + s.p * s.I,
            lambda s: {"update_every": s.T, "pairs": s.p},
            lambda s: s.T,
            lambda s: s.p * s.T,
        ),
        "KFAC": Row(
            "kfac",
            kfac,
            lambda s: inputs(s) ** 2 + s.I**2,
            lambda s: {"update_every": s.T, "refresh_every": 5 * s.T},
            lambda s: 5 * s.T,
        ),
        "Adam": Row("adam", lambda s: s.I * inputs(s), lambda s: s.I * inputs(s)),
    },
    repeats=3,
)

if __name__ == "__main__":
    main(FIGURE, __file__)
