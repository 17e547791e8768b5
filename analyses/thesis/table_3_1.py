"""Thesis Table 3.1 (2021, Table 1): what the convolution of Table 3.2 holds between steps, beyond
gradient and momentum.
"""

from dataclasses import replace

from curvlab.reproduction import Axis, load_script, main

TIME = load_script("table-3.2")

FIGURE = replace(
    TIME,
    shows=(
        "thesis Table 3.1: storage of K-BFGS, K-BFGS(L), KFAC and Adam on a convolution beyond"
        " SGD's"
    ),
    claim=(
        "K-BFGS/K-BFGS(L) requires roughly the same amount of memory as KFAC … the memory required"
        " by K-BFGS/K-BFGS(L) is of the same order as that of Adam in terms of I and J (3.5)"
    ),
    axes=[
        *(axis for axis in TIME.axes if axis.name in ("channels", "J", "I", "k")),
        Axis("p", [5, 10, 20, 40]),
    ],
    quantities=["memory"],
    repeats=1,
)

if __name__ == "__main__":
    main(FIGURE, __file__)
