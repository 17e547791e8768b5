"""Thesis Figure 3.9: Figure 3.8 with CIFAR-100; hyper-parameters and claims are there."""

from dataclasses import replace

from curvlab.reproduction import load_script, main

FIGURE = replace(
    load_script("figure-3.8"),
    shows="thesis Figure 3.9, Tables 3.9 and 3.10: Figure 3.8 with CIFAR-100",
    problems=["ResNet32-4, CIFAR-100"],
)

if __name__ == "__main__":
    main(FIGURE, __file__)
