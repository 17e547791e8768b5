"""Ren and Goldfarb (2021) Figure 2: Figure 1 on CIFAR-100; hyper-parameters and claims are
there.
"""

from dataclasses import replace

from curvlab.reproduction import load_script, main

FIGURE = replace(
    load_script("kfqn-cnn-figure-1"),
    shows="Ren and Goldfarb 2021, Figure 2, Table 3: Figure 1 on CIFAR-100",
    problems=["All-CNN-C, CIFAR-100", "VGG16 as printed, CIFAR-100"],
)

if __name__ == "__main__":
    main(FIGURE, __file__)
