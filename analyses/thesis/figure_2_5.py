"""Thesis Figure 2.5: Figure 2.4 on FACES; hyper-parameters and claims are there."""

from dataclasses import replace

from curvlab.reproduction import load_script, main

FIGURE = replace(
    load_script("figure-2.4"),
    shows="thesis Figure 2.5, Table 2.6: Figure 2.2 on FACES with minibatches of 100",
    problems=["FACES"],
)

if __name__ == "__main__":
    main(FIGURE, __file__)
