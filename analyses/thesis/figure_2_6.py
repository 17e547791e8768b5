"""Thesis Figure 2.6: Figure 2.4 on CURVES; hyper-parameters and claims are there."""

from dataclasses import replace

from curvlab.reproduction import load_script, main

FIGURE = replace(
    load_script("figure-2.4"),
    shows="thesis Figure 2.6, Table 2.6: Figure 2.2 on CURVES with minibatches of 100",
    problems=["CURVES"],
)

if __name__ == "__main__":
    main(FIGURE, __file__)
