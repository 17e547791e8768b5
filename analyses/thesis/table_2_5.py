"""Thesis Table 2.5: the search for the learning rates and dampings of Figure 2.2.

Points of Figure 2.3's grid are shared with it.
"""

from curvlab.reproduction import TunedTable, load_script, main

FIGURE = TunedTable(
    shows="thesis Table 2.5: best learning rates and dampings for Figure 2.2",
    claim=(
        "The best hyper-parameters (HPs) were chosen by computing the deterministic loss function"
        " encountered at the end of every epoch until the algorithm was terminated, and then"
        " choosing the lowest of these values (2.8.2)"
    ),
    of=load_script("figure-2.2"),
    grid="thesis-table-2.5",
    coarser={label: {"damping": 2} for label in ("Adam", "RMSprop")},
)

if __name__ == "__main__":
    main(FIGURE, __file__)
