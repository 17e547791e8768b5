"""Thesis Table 3.4: the highest test accuracies of Figures 3.4 to 3.7, whose runs it shares."""

from dataclasses import replace

from curvlab.reproduction import load_script, main

FIGURE = replace(
    load_script("figure-3.4"),
    shows="thesis Table 3.4: test accuracies of Figures 3.4 to 3.7",
    problems=["VGG16, CIFAR-10", "ResNet32, CIFAR-10", "VGG16, CIFAR-100", "ResNet32, CIFAR-100"],
)

if __name__ == "__main__":
    main(FIGURE, __file__)
