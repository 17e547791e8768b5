"""Thesis Figure 5.1: SMW-GN, SMW-NG, SMW-NG-BD, KFAC, HF and SGD on MNIST classes, 784-500-10, N₁ =
60, N₂ = 30, 10 epochs.

KFAC is without rescaling and momentum (5.8), inverted at every step, its λ fixed at 1. It learns
from all N₁.
"""

from curvlab.reproduction import Claim, Comparison, Extent, Method, main

OURS = ["SMW-GN", "SMW-NG", "SMW-NG-BD"]
START = 1.001  # λ_LM = 1, and τ = 0.001 (5.8)


def methods(rate: float, second: int) -> dict[str, Method]:
    """At one learning rate, N₂ = `second`."""
    return {
        "SMW-GN": Method("smw-gn", (rate, START), {"curvature_size": second}),
        "SMW-NG": Method("smw-ng", (rate, START), {"curvature_size": second}),
        "SMW-NG-BD": Method("smw-ng-bd-ef", (rate, START), {"curvature_size": second}),
        "KFAC": Method("kfac", (rate, 1), {"momentum": 0.0, "refresh_every": 1}),
        "HF": Method("hf", (rate, START), {"curvature_size": second}),
        "SGD": Method("sgd-m", (rate, 0), {"momentum": 0.0}),
    }


FIGURE = Comparison(
    shows=(
        "thesis Figure 5.1: SMW-GN, SMW-NG, SMW-NG-BD, KFAC, HF and SGD on a MNIST classification"
        " problem"
    ),
    claim=(
        "SMW-GN is always faster than HF in terms of both epochs and clock-time … After carefully"
        " tuning the learning rate, SGD can perform as well as second-order methods as shown in"
        " Figure 5.1 (5.8.1)"
    ),
    problems=["MNIST classes"],
    batch=60,
    methods=methods(0.1, 30),
    cpu=Extent(seconds=420, epochs=10, examples=12_000),
    paper=Extent(epochs=10),
    claims=[
        Claim("SMW-GN is faster than HF in epochs", ["SMW-GN"], ["HF"]),
        Claim("SMW-GN is faster than HF in time", ["SMW-GN"], ["HF"], "time"),
        Claim(
            "SGD performs as well as the second-order methods",
            ["SGD"],
            [*OURS, "KFAC", "HF"],
            within=0.1,
        ),
    ],
)

if __name__ == "__main__":
    main(FIGURE, __file__)
