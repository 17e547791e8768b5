"""S2QN Figure 3: SKQN-L, SKQN-B1, SKQN-B2, KFAC, Adam and SGD with ConvNet on CIFAR-10.

Its appendix, with the network and the hyper-parameters, is not available. SKQN's are KFAC's in
everything, as S2QN has it of S4QN and SSN (6.1); KFAC's and the others' are of thesis Table 3.7
without weight decay (Adam and SGD of VGG16, KFAC of ResNet32), minibatches of 128 as there.
"""

from curvlab.reproduction import Claim, Comparison, Extent, Method, main

SKQN = ["SKQN-L", "SKQN-B1", "SKQN-B2"]
VALUES, OFTEN = (0.01, 0.1), {"update_every": 10, "refresh_every": 100}  # KFAC's

FIGURE = Comparison(
    shows="S2QN Figure 3: SKQN-L, SKQN-B1, SKQN-B2, KFAC, Adam and SGD with ConvNet on CIFAR-10",
    claim=(
        "the second-order type method is superior to the Adam and SGD. Our proposed methods have"
        " smaller training loss and larger testing accuracy in the end (6.3)"
    ),
    problems=["ConvNet, CIFAR-10"],
    batch=128,
    methods={  # (learning rate, damping)
        "SKQN-L": Method("skqn-l", VALUES, OFTEN),
        "SKQN-B1": Method("skqn-b1", VALUES, OFTEN),
        "SKQN-B2": Method("skqn-b2", VALUES, OFTEN),
        "KFAC": Method("kfac", VALUES, OFTEN),
        "Adam": Method("adam", (0.003, 0.1)),
        "SGD": Method("sgd-m", (0.003, 0)),
    },
    cpu=Extent(seconds=60, seeds=3, evaluated=2000, tests=1000),
    paper=Extent(epochs=100),  # not published
    claims=[
        Claim(
            "second-order methods are superior to Adam and SGD", [*SKQN, "KFAC"], ["Adam", "SGD"]
        ),
        Claim(
            "the proposed methods have smaller training loss in the end",
            SKQN,
            ["KFAC", "Adam", "SGD"],
        ),
        Claim(
            "the proposed methods have larger test accuracy in the end",
            SKQN,
            ["KFAC", "Adam", "SGD"],
            measure="val_error",
        ),
    ],
)

if __name__ == "__main__":
    main(FIGURE, __file__)
