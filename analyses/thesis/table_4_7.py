"""Thesis Table 4.7: the search for the learning rates, dampings, momenta μ and decays β of Figure
4.6.

The `cpu` budget holds each damping at the document's value, and has two of the three μ and β.
"""

from curvlab.reproduction import TunedTable, load_script, main

FIGURE = TunedTable(
    shows="thesis Table 4.7: best learning rates, dampings, μ and β for Figure 4.6",
    claim=(
        "we tuned the following hyper-parameters jointly: SGD-m: learning rate and μ; all other"
        " algorithms: learning rate, damping, μ, and β … The obtained values for the"
        " hyper-parameters are listed in Table 4.7 (4.7.3)"
    ),
    of=load_script("figure-4.6"),
    grid="thesis-table-4.7",
    coarse={"lr": 3, "damping": 1, "momentum": (0.9, 0.99), "decay": (0.9, 0.99)},
)

if __name__ == "__main__":
    main(FIGURE, __file__)
