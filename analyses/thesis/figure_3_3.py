"""Thesis Figure 3.3: Figure 3.1 on CURVES; hyper-parameters and claims are there."""

from dataclasses import replace

from curvlab.reproduction import load_script, main

FIGURE = replace(
    load_script("figure-3.1"),
    shows="thesis Figure 3.3, Tables 3.3 and 3.5: Figure 3.1 on CURVES",
    problems=["CURVES"],
)

if __name__ == "__main__":
    main(FIGURE, __file__)
