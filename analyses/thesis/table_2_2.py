"""Thesis Table 2.2 (2020, Table 2): computation per iteration of one layer with d_i inputs and d_o
outputs, beyond SGD's.

Also measured: minibatches of m, p pairs of L-BFGS, inversions every T steps; memory (Table 2.1).
"""

from types import SimpleNamespace

from torch import nn

from curvlab.reproduction import Axis, Row, Scaling, main


def every(s: SimpleNamespace) -> dict[str, int]:
    return {"refresh_every": s.T}


def pairs(s: SimpleNamespace) -> dict[str, int]:
    return {"pairs": s.p}


FIGURE = Scaling(
    shows=(
        "thesis Table 2.2: computation per iteration of K-BFGS(-20), K-BFGS(L)(-20), KFAC and Adam"
        " beyond SGD's"
    ),
    claim=(
        "K-BFGS and K-BFGS(L) require less computation per iteration than KFAC, since they only"
        " involve matrix multiplications, whereas KFAC requires matrix inversions which depend"
        " cubically on both d_i and d_o (2.6)"
    ),
    layer=lambda s: (nn.Linear(s.d_i, s.d_o), (s.d_i,)),
    base={"d_i": 256, "d_o": 256, "m": 500, "p": 20, "T": 20},
    axes=[
        Axis("d", [64, 128, 256, 512, 1024, 2048], ["d_i", "d_o"]),
        Axis("d_i", [64, 128, 256, 512, 1024, 2048]),
        Axis("d_o", [64, 128, 256, 512, 1024, 2048]),
        Axis("m", [125, 250, 500, 1000, 2000, 4000]),
        Axis("p", [5, 10, 20, 40, 80]),
        Axis("T", [1, 2, 5, 10, 20, 50]),
    ],
    rows={  # additional pass + curvature + step
        "K-BFGS": Row(
            "k-bfgs-20",
            time=lambda s: (
                s.m * s.d_i * s.d_o
                + s.m * s.d_i**2
                + s.m * s.d_o
                + s.d_o**2
                + s.d_i**2 * s.d_o
                + s.d_o**2 * s.d_i
            ),
            memory=lambda s: s.d_i**2 + s.d_o**2,
        ),
        "K-BFGS(L)": Row(
            "k-bfgs-l-20",
            time=lambda s: (
                s.m * s.d_i * s.d_o
                + s.m * s.d_i**2
                + s.m * s.d_o
                + s.d_i**2 * s.d_o
                + s.p * s.d_i * s.d_o
            ),
            memory=lambda s: s.d_i**2 + s.p * s.d_o,
            options=pairs,
            filled=lambda s: s.p,
        ),
        "KFAC": Row(
            "kfac-20",
            time=lambda s: (
                s.m * s.d_i * s.d_o
                + s.m * (s.d_i**2 + s.d_o**2)
                + (s.d_i**3 + s.d_o**3) / s.T
                + s.d_i**2 * s.d_o
                + s.d_o**2 * s.d_i
            ),
            memory=lambda s: s.d_i**2 + s.d_o**2,
            options=every,
            period=lambda s: s.T,
        ),
        "Adam": Row("adam", time=lambda s: s.d_i * s.d_o, memory=lambda s: s.d_i * s.d_o),
    },
)

if __name__ == "__main__":
    main(FIGURE, __file__)
