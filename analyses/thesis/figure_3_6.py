"""Thesis Figure 3.6: Figure 3.4 on VGG16 with CIFAR-100; hyper-parameters and claims are there."""

from dataclasses import replace

from curvlab.reproduction import load_script, main

FIGURE = replace(
    load_script("figure-3.4"),
    shows="thesis Figure 3.6, Tables 3.4 and 3.7: Figure 3.4 on VGG16 with CIFAR-100",
    problems=["VGG16, CIFAR-100"],
)

if __name__ == "__main__":
    main(FIGURE, __file__)
