"""What the refinement of SKQN adds to its base: each method with and without it, on S2QN's MNIST
autoencoder.

Without it Λ = γλ I (L, no pairs) and Λ̃ = γ√λ I (B, no columns) stay as they begin, so that the
damping is the same. At KFAC's values (0.03, 1), and in the reading "seng" at the thesis's of
KFAC-EF. SGD and Adam at those of Table 4.3, as in Figure 2, are beside.
"""

from curvlab.reproduction import Claim, Comparison, Extent, Method, main

KFAC, SENG = (0.03, 1.0), (1.0, 100.0)

FIGURE = Comparison(
    shows="what S2QN's refinement adds to its base, on the MNIST autoencoder",
    claim=(
        "the structured quasi-Newton method with partial Hessian information indeed accelerates the"
        " convergence (6.2)"
    ),
    problems=["MNIST"],
    batch=1000,
    methods={
        "KFAC": Method("kfac", KFAC),
        "SKQN-L": Method("skqn-l", KFAC),
        "L without pairs": Method("skqn-l", KFAC, {"pairs": 0}),
        "SKQN-B1": Method("skqn-b1", KFAC),
        "SKQN-B2": Method("skqn-b2", KFAC),
        "B without columns": Method("skqn-b2", KFAC, {"columns": 0}),
        "SKQN-B2, seng": Method("skqn-b2", SENG, {"reading": "seng"}),
        "B without columns, seng": Method("skqn-b2", SENG, {"reading": "seng", "columns": 0}),
        "Adam": Method("adam", (1e-4, 1e-4)),
        "SGD": Method("sgd-m", (0.003, 0)),
    },
    cpu=Extent(epochs=5, tests=0, evaluated=10_000, seeds=3),
    paper=Extent(epochs=100),  # not published
    measures=["train_loss"],
    claims=[
        Claim("pairs of L add to its base", ["SKQN-L"], ["L without pairs"]),
        Claim("pairs of B add to its base", ["SKQN-B1", "SKQN-B2"], ["B without columns"]),
        Claim("so do they in the reading seng", ["SKQN-B2, seng"], ["B without columns, seng"]),
    ],
)

if __name__ == "__main__":
    main(FIGURE, __file__)
