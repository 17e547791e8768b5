"""Thesis Figure 4.6: Figure 4.2 on MNIST and FACES with momentum μ and moving averages' β tuned
too.
"""

from dataclasses import replace

from curvlab.reproduction import Claim, Comparison, Method, load_script, main

PROBLEMS = ["MNIST", "FACES"]
VALUES = {  # Table 4.7: algorithm: (learning rate, damping, μ, β) on MNIST and on FACES
    "TNT": ((1e-4, 0.1, 0.9, 0.9), (1e-6, 0.003, 0.9, 0.9)),
    "KFAC": ((0.001, 0.1, 0.99, 0.99), (0.01, 0.1, 0.9, 0.9)),
    "Shampoo": ((1e-4, 3e-4, 0.99, 0.99), (1e-4, 3e-4, 0.99, 0.999)),
    "Adam": ((1e-4, 1e-4, 0.99, 0.99), (1e-4, 1e-4, 0.9, 0.9)),
    "SGD-m": ((0.001, 0, 0.99, 0.9), (0.001, 0, 0.9, 0.9)),  # it has no β
}
SECOND, FIRST = ["TNT", "KFAC", "Shampoo"], ["Adam", "SGD-m"]

FIGURE: Comparison = replace(
    load_script("figure-4.2"),
    shows="thesis Figure 4.6, Table 4.7: Figure 4.2 on MNIST and FACES with more extensive tuning",
    claim=(
        "with extensive tuning, second-order methods seem to perform similarly with each other, and"
        " are usually better than well-tuned first order methods on these problems (4.7.3)"
    ),
    problems=PROBLEMS,
    methods={
        label: Method(
            label.lower(),
            {p: e[:2] for p, e in zip(PROBLEMS, each, strict=True)},
            further={
                p: {"momentum": e[2], "decay": e[3]} for p, e in zip(PROBLEMS, each, strict=True)
            },
        )
        for label, each in VALUES.items()
    },
    claims=[
        Claim("second-order methods are better than first-order ones", SECOND, FIRST),
        Claim(
            "second-order methods perform similarly with each other",
            ["TNT"],
            ["KFAC", "Shampoo"],
            within=0.1,
            alike=True,
        ),
    ],
)

if __name__ == "__main__":
    main(FIGURE, __file__)
