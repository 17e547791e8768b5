"""S2QN Figure 4: SKQN-L, SKQN-B1, SKQN-B2, KFAC, Adam and SGD with ResNet-18 on CIFAR-10.

Its appendix is not available: SKQN's values are those of Figure 3, the others' of thesis Table 3.7
for ResNet32.
"""

from dataclasses import replace

from curvlab.reproduction import NETWORKS, Claim, Method, load_script, main

CONVNET = load_script("s2qn-figure-3")
SKQN = ["SKQN-L", "SKQN-B1", "SKQN-B2"]

FIGURE = replace(
    CONVNET,
    shows="S2QN Figure 4: SKQN-L, SKQN-B1, SKQN-B2, KFAC, Adam and SGD with ResNet-18 on CIFAR-10",
    claim=(
        "the second-order type methods outperform the first-order type methods in terms of both"
        " criteria. The training error of our proposed quasi-Newton methods decreases faster than"
        " that of KFAC … at least comparable with KFAC in the end (6.4)"
    ),
    problems=["ResNet-18, CIFAR-10"],
    methods={label: CONVNET.methods[label] for label in SKQN}
    | {  # (learning rate, weight decay, damping)
        "KFAC": Method("kfac", (0.01, 0.1, 0.1), {"update_every": 10, "refresh_every": 100}),
        "Adam": Method("adam", (0.003, 0.1, 0.01)),
        "SGD": Method("sgd-m", (0.03, 0.01, 0)),
    },
    cpu=NETWORKS,
    claims=[
        Claim(
            "second-order methods outperform first-order methods in training",
            [*SKQN, "KFAC"],
            ["Adam", "SGD"],
        ),
        Claim("and in testing", [*SKQN, "KFAC"], ["Adam", "SGD"], measure="val_error"),
        Claim("the proposed methods' training loss falls faster than KFAC's", SKQN, ["KFAC"]),
        Claim(
            "in testing they are at least comparable with KFAC",
            SKQN,
            ["KFAC"],
            measure="val_error",
            within=0.05,
        ),
    ],
)

if __name__ == "__main__":
    main(FIGURE, __file__)
