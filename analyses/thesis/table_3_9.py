"""Thesis Table 3.9: the highest test accuracies of Figures 3.8 and 3.9, whose runs it shares."""

from dataclasses import replace

from curvlab.reproduction import load_script, main

FIGURE = replace(
    load_script("figure-3.8"),
    shows="thesis Table 3.9: test accuracies of Figures 3.8 and 3.9",
    problems=["ResNet32-4, CIFAR-10", "ResNet32-4, CIFAR-100"],
)

if __name__ == "__main__":
    main(FIGURE, __file__)
