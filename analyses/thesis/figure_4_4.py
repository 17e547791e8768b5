"""Thesis Figure 4.4: TNT and KFAC beside TNT-EF and KFAC-EF, from the empirical Fisher matrix, on
three autoencoders.
"""

from dataclasses import replace

from curvlab.reproduction import Claim, Comparison, Method, load_script, main

FISHER = load_script("figure-4.2")
VALUES = {  # Table 4.5: (learning rate, damping) on MNIST, FACES, CURVES
    "TNT-EF": ("tnt-ef", ((3e-6, 0.01), (3e-6, 0.01), (0.003, 1))),
    "KFAC-EF": ("kfac-ef", ((1, 100), (0.3, 30), (1, 100))),
}

FIGURE: Comparison = replace(
    FISHER,
    shows=(
        "thesis Figure 4.4, Table 4.5: TNT, KFAC and their counterparts from the empirical Fisher"
        " matrix on three autoencoders"
    ),
    claim=(
        "TNT performed at least as well as TNT-EF, on the MNIST problem, and performed somewhat"
        " better on the FACES and CURVES problems … We can similarly observe the comparison between"
        " KFAC and KFAC-EF (4.7.3)"
    ),
    methods={label: FISHER.methods[label] for label in ("TNT", "KFAC")}
    | {
        label: Method(name, dict(zip(FISHER.problems, each, strict=True)))
        for label, (name, each) in VALUES.items()
    },
    claims=[
        Claim("TNT is at least as good as TNT-EF", ["TNT"], ["TNT-EF"]),
        Claim("KFAC is at least as good as KFAC-EF", ["KFAC"], ["KFAC-EF"]),
    ],
)

if __name__ == "__main__":
    main(FIGURE, __file__)
