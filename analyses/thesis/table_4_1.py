"""Thesis Table 4.1: memory and time per iteration of TNT, Shampoo and Adam beyond SGD's, for
one matrix (k = 2) of d × d, minibatches of m, statistics every T1 and inverses every T2 steps.

Shampoo's T1 is not in the table's formula and stays 1. The table's Newton-like methods, a dense
matrix of d⁴ numbers, are left out.
"""

from types import SimpleNamespace

from torch import nn

from curvlab.reproduction import Axis, Row, Scaling, main


def tnt(s: SimpleNamespace) -> float:
    return (s.m / s.T1 + 2 * s.d) * s.d**2 + 2 * s.d**3 / s.T2


def shampoo(s: SimpleNamespace) -> float:
    return 2 * s.d * s.d**2 + 2 * s.d**3 / s.T2


FIGURE = Scaling(
    shows="thesis Table 4.1: memory and time per iteration of TNT, Shampoo and Adam beyond SGD's",
    claim=(
        "TNT (as well as Shampoo) reduces the memory requirement from O(∏ d_i²) to O(Σ d_i²), which"
        " is comparable to that of Adam-like methods … only introduces a mild overhead (4.6)"
    ),
    layer=lambda s: (nn.Linear(s.d, s.d, bias=False), (s.d,)),
    base={"d": 256, "m": 500, "T1": 1, "T2": 20},
    axes=[
        Axis("d", [64, 128, 256, 512, 1024, 2048]),
        Axis("m", [125, 250, 500, 1000, 2000, 4000]),
        Axis("T1", [1, 2, 5, 10, 20]),
        Axis("T2", [1, 2, 5, 10, 20, 50]),
    ],
    rows={
        "TNT": Row(
            "tnt",
            tnt,
            lambda s: 2 * s.d**2,
            lambda s: {"update_every": s.T1, "refresh_every": s.T2},
            lambda s: max(s.T1, s.T2),
        ),
        "Shampoo": Row(
            "shampoo",
            shampoo,
            lambda s: 2 * s.d**2,
            lambda s: {"refresh_every": s.T2},
            lambda s: s.T2,
        ),
        "Adam": Row("adam", lambda s: s.d**2, lambda s: s.d**2),
    },
    repeats=3,
)

if __name__ == "__main__":
    main(FIGURE, __file__)
