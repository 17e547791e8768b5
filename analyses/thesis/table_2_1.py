"""Thesis Table 2.1 (2020, Table 1): what the layers of Table 2.2 hold between steps, beyond
gradient and momentum.
"""

from dataclasses import replace

from curvlab.reproduction import load_script, main

TIME = load_script("table-2.2")

FIGURE = replace(
    TIME,
    shows="thesis Table 2.1: storage of K-BFGS(-20), K-BFGS(L)(-20), KFAC and Adam beyond SGD's",
    claim=(
        "the Kronecker property enables K-BFGS and K-BFGS(L) (as well as KFAC) to have storage"
        " requirements comparable to those of first-order methods (2.6)"
    ),
    axes=[axis for axis in TIME.axes if axis.name in ("d", "d_i", "d_o", "p")],
    quantities=["memory"],
    repeats=1,
)

if __name__ == "__main__":
    main(FIGURE, __file__)
