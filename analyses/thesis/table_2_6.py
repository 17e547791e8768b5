"""Thesis Table 2.6: the search for the learning rates and dampings of Figures 2.4 to 2.6, with
minibatches of 100.

The document names no grid of its own here: that of Table 2.5 is taken, on which all its values lie.
A step costs less, and in the `cpu` budget there are more of them: 100 on MNIST, 300 on CURVES.
"""

from dataclasses import replace

from curvlab.reproduction import TUNED, TunedTable, load_script, main

THOUSAND = load_script("table-2.5")

FIGURE: TunedTable = replace(
    THOUSAND,
    shows="thesis Table 2.6: best learning rates and dampings for Figures 2.4, 2.5 and 2.6",
    claim=(
        "The best hyper-parameters were those that produce the lowest value of the deterministic"
        " loss function encountered at the end of every epoch until the algorithm was terminated"
        " (2.8.3)"
    ),
    of=replace(load_script("figure-2.4"), problems=THOUSAND.problems),
    cpu=replace(TUNED, epochs={"MNIST": 2, "FACES": 2, "CURVES": 6}, examples=5000),
)

if __name__ == "__main__":
    main(FIGURE, __file__)
