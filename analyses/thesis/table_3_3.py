"""Thesis Table 3.3: the lowest training losses of Figures 3.1, 3.2 and 3.3, whose runs it
shares.
"""

from dataclasses import replace

from curvlab.reproduction import load_script, main

FIGURE = replace(
    load_script("figure-3.1"),
    shows="thesis Table 3.3: training losses of Figures 3.1, 3.2 and 3.3",
    problems=["MNIST", "FACES", "CURVES"],
)

if __name__ == "__main__":
    main(FIGURE, __file__)
