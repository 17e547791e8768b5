"""ConvNet (S2QN 6.3) on CIFAR-10 by every method that takes convolutions. Values are of the
documents' nearest table; none was tuned.
"""

from dataclasses import replace

from curvlab.reproduction import Claim, Comparison, Extent, Method, load_script, main

S2QN = load_script("s2qn-figure-3")
OFTEN = {"update_every": 10, "refresh_every": 100}  # of CNNs: thesis 4.7.1
TWENTY = {"update_every": 20}  # thesis 3.7.1

FIGURE: Comparison = replace(
    S2QN,
    shows="ConvNet on CIFAR-10 by every method that takes convolutions",
    claim="the second-order type method is superior to the Adam and SGD (S2QN 6.3)",
    methods={
        **S2QN.methods,
        "Shampoo": Method("shampoo", (0.001, 0.1), OFTEN),  # thesis Table 4.4, VGG16, as the next
        "TNT": Method("tnt", (1e-4, 0.1), OFTEN),
        # Table 3.7, CIFAR-100, VGG16, as the next; for CIFAR-10 it has batch normalisation
        "K-BFGS": Method("k-bfgs", (0.1, 10), TWENTY),
        "K-BFGS(L)": Method("k-bfgs-l", (0.3, 100), TWENTY),
        # both at one and the same values, beside
        "K-BFGS at (0.1, 1)": Method("k-bfgs", (0.1, 1), TWENTY),
        "K-BFGS(L) at (0.1, 1)": Method("k-bfgs-l", (0.1, 1), TWENTY),
        "KF-BFGS-CNN": Method(
            "kf-bfgs-cnn", (1, 10), TWENTY
        ),  # as K-BFGS: its momentum is an average, ten times smaller
        "KF-BFGS(L)-CNN": Method("kf-bfgs-l-cnn", (3, 100), TWENTY),
    },
    cpu=Extent(epochs=2, evaluated=2000, tests=1000),
    claims=[
        Claim(
            "second-order methods are superior to Adam and SGD",
            ["KFAC", "TNT", "K-BFGS", "KF-BFGS-CNN"],
            ["Adam", "SGD"],
        ),
    ],
)

if __name__ == "__main__":
    main(FIGURE, __file__)
