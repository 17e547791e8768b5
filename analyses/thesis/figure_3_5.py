"""Thesis Figure 3.5: Figure 3.4 on ResNet32 with CIFAR-10; hyper-parameters and claims are
there.
"""

from dataclasses import replace

from curvlab.reproduction import load_script, main

FIGURE = replace(
    load_script("figure-3.4"),
    shows="thesis Figure 3.5, Tables 3.4 and 3.7: Figure 3.4 on ResNet32 with CIFAR-10",
    problems=["ResNet32, CIFAR-10"],
)

if __name__ == "__main__":
    main(FIGURE, __file__)
