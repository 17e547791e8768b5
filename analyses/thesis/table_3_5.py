"""Thesis Table 3.5: the search for the learning rates and dampings of Figures 3.1 to 3.3 and Table
3.3.
"""

from dataclasses import replace

from curvlab.reproduction import TunedTable, load_script, main

CHAPTER_3 = load_script("figure-3.1")

FIGURE = TunedTable(
    shows="thesis Table 3.5: best learning rates and dampings for Table 3.3",
    claim="We selected the HP values that achieves the smallest training loss (3.7.2)",
    of=replace(CHAPTER_3, problems=["MNIST", "FACES", "CURVES"]),
    grid="thesis-table-3.5",
    coarser={"Adam": {"damping": 2}},
    # "Kronecker-factored QN methods" have one range
    as_if={"K-BFGS-20": "k-bfgs", "K-BFGS(L)-20": "k-bfgs-l"},
)

if __name__ == "__main__":
    main(FIGURE, __file__)
