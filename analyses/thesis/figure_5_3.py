"""Thesis Figure 5.3: Figure 5.1 on webspam, 254-400-400-1, N₁ = 60, N₂ = 30, each at its tuned
learning rate, one epoch.

Where the file of webspam is not at hand, UCI Adult (LIBSVM's a9a: 123-400-400-1, each feature at
mean 0 and variance 1) stands in its place, at webspam's learning rates: another problem, of which
the figure's claims are asked all the same.

Losses are those before and after the epoch: a training run is evaluated between epochs.
"""

from dataclasses import replace

from curvlab.reproduction import Claim, Extent, load_script, main

MNIST = load_script("figure-5.1")
RATES = {
    "SMW-GN": 0.05,
    "SMW-NG": 0.1,
    "SMW-NG-BD": 0.1,
    "KFAC": 0.1,
    "HF": 0.05,
    "SGD": 0.4,
}  # 5.8

FIGURE = replace(
    MNIST,
    shows=(
        "thesis Figure 5.3: SMW-GN, SMW-NG, SMW-NG-BD, KFAC, HF and SGD on a webspam classification"
        " problem, and on a9a in its place"
    ),
    claim=(
        "SMW-GN is always faster than HF in terms of both epochs and clock-time … the relative"
        " ranking of the algorithms changes from one problem to another (5.8.1)"
    ),
    problems=["webspam", "a9a in webspam's place"],
    methods={
        label: replace(method, values=(RATES[label], method.values[1]))
        for label, method in MNIST.methods.items()
    },
    cpu=Extent(seconds=60, epochs=10, examples=6000, tests=10_000),
    paper=Extent(epochs=1),
    claims=[
        Claim("SMW-GN is faster than HF in epochs", ["SMW-GN"], ["HF"]),
        Claim("SMW-GN is faster than HF in time", ["SMW-GN"], ["HF"], "time"),
    ],
)

if __name__ == "__main__":
    main(FIGURE, __file__)
