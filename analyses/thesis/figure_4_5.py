"""Thesis Figure 4.5: TNT and KFAC beside TNT-EF and KFAC-EF, from the empirical Fisher matrix, on
four CNNs.
"""

from dataclasses import replace

from curvlab.reproduction import Claim, Comparison, Reported, convolutional, load_script, main

FISHER = load_script("figure-4.3")
# Table 4.6: (initial learning rate, weight decay, damping), in the order of Figure 4.3's problems
VALUES = {
    "TNT-EF": ((1e-4, 10, 0.1), (1e-4, 10, 0.01), (3e-5, 10, 0.1), (1e-4, 10, 0.01)),
    "KFAC-EF": ((3e-4, 1, 0.001), (0.01, 0.1, 0.1), (3e-4, 1, 0.1), (0.01, 0.1, 0.001)),
}
# Table 4.6, likewise
ACCURACIES = {
    "TNT-EF": (94.50, 93.24, 75.27, 71.58),
    "KFAC-EF": (94.29, 93.16, 75.55, 71.61),
}

FIGURE: Comparison = replace(
    FISHER,
    shows=(
        "thesis Figure 4.5, Table 4.6: TNT, KFAC and their counterparts from the empirical Fisher"
        " matrix on four CNNs"
    ),
    claim=(
        "TNT achieved better validation accuracy than TNT-EF on 3 of them. We can similarly observe"
        " the comparison between KFAC and KFAC-EF (4.7.3; Tables 4.2 and 4.6 have TNT-EF ahead on"
        " VGG16 with CIFAR-10, KFAC-EF on ResNet32 with CIFAR-100)"
    ),
    methods={label: FISHER.methods[label] for label in ("TNT", "KFAC")}
    | convolutional(
        {label: dict(zip(FISHER.problems, each, strict=True)) for label, each in VALUES.items()}
    ),
    reported=Reported(
        {
            p: (
                {label: FISHER.reported.numbers[p][label] for label in ("TNT", "KFAC")}
                | {label: a[i] for label, a in ACCURACIES.items()}
            )
            for i, p in enumerate(FISHER.problems)
        },
        accuracies=FISHER.reported.accuracies,
    ),
    claims=[
        Claim(
            "TNT is more accurate than TNT-EF",
            ["TNT"],
            ["TNT-EF"],
            "lowest",
            "val_error",
            problems=FISHER.problems[1:],
        ),
        Claim(
            "KFAC is more accurate than KFAC-EF",
            ["KFAC"],
            ["KFAC-EF"],
            "lowest",
            "val_error",
            problems=FISHER.problems[:3],
        ),
    ],
)

if __name__ == "__main__":
    main(FIGURE, __file__)
