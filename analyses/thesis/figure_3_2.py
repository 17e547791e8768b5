"""Thesis Figure 3.2: Figure 3.1 on FACES; hyper-parameters and claims are there."""

from dataclasses import replace

from curvlab.reproduction import load_script, main

FIGURE = replace(
    load_script("figure-3.1"),
    shows="thesis Figure 3.2, Tables 3.3 and 3.5: Figure 3.1 on FACES",
    problems=["FACES"],
)

if __name__ == "__main__":
    main(FIGURE, __file__)
