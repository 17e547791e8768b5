"""Ren and Goldfarb (2021) Figure 4: VGG16 on CIFAR-100 with hyper-parameters chosen by testing
accuracy.

They are not published. "The comparison … in this case is similar to that of Fig 1 b)", whose values
(Table 3, VGG16 on CIFAR-10) are taken here.
"""

from dataclasses import replace

from curvlab.reproduction import Claim, Comparison, load_script, main

TUNED = load_script("kfqn-cnn-figure-1")
PROBLEM, FROM = "VGG16 as printed, CIFAR-100", "VGG16 as printed, CIFAR-10"

FIGURE: Comparison = replace(
    TUNED,
    shows="Ren and Goldfarb 2021, Figure 4: VGG16 on CIFAR-100 at the values of Figure 1 b)",
    claim=(
        "With the new set of HP values, the first-order methods no longer overfit the training set."
        " The comparison between the algorithms that we tested in this case is similar to that of"
        " Fig 1 b) (B.4)"
    ),
    problems=[PROBLEM],
    methods={
        label: replace(method, values={PROBLEM: method.values[FROM]})
        for label, method in TUNED.methods.items()
    },
    claims=[
        Claim(
            "KF-BFGS-CNN and KF-BFGS(L)-CNN are at least as good as the others in testing",
            ["KF-BFGS-CNN", "KF-BFGS(L)-CNN"],
            ["KFAC", "Adam", "SGD-m"],
            measure="val_error",
            within=0.02,
        ),
    ],
)

if __name__ == "__main__":
    main(FIGURE, __file__)
