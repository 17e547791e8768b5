"""Thesis Figure 3.1: K-BFGS, K-BFGS(L), their counterparts of chapter 2, KFAC, Adam and SGD-m on MNIST (no L2, minibatches of 1000)."""

from curvlab.reproduction import Claim, Comparison, Extent, Method, main

FIGURE = Comparison(
    shows="thesis Figure 3.1, Tables 3.3 and 3.5: autoencoder of MNIST",
    claim="K-BFGS and K-BFGS(L) consistently outperformed their counterparts in Chapter 2 … performed similarly to KFAC (3.7.1)",
    problems=["MNIST"],
    batch=1000,
    methods={  # Table 3.5: (learning rate, damping); T = 1, T₂ = 20
        "K-BFGS": Method("k-bfgs", (0.03, 0.3)),
        "K-BFGS, T = 20": Method("k-bfgs", (0.3, 30), {"update_every": 20}),
        "K-BFGS(L)": Method("k-bfgs-l", (0.03, 0.3)),
        "K-BFGS-20": Method("k-bfgs-20", (0.01, 0.1), {"momentum_kind": "add"}),
        "K-BFGS(L)-20": Method("k-bfgs-l-20", (0.003, 0.1), {"momentum_kind": "add"}),
        "KFAC": Method("kfac", (0.03, 1)),
        "Adam": Method("adam", (1e-4, 1e-4)),
        "SGD-m": Method("sgd-m", (0.003, 0)),
    },
    reported={"MNIST": {"K-BFGS": 51.60, "K-BFGS, T = 20": 52.01, "K-BFGS(L)": 51.53, "K-BFGS-20": 52.38, "K-BFGS(L)-20": 54.27,
                        "KFAC": 51.24, "Adam": 52.76, "SGD-m": 54.75}},
    measures=["train_loss"],
    cpu=Extent(seconds=60, evaluated=10_000, tests=1000),
    paper=Extent(seconds=500, seeds=5),
    spread="error of the mean",
    claims=[
        Claim("K-BFGS(-L) outperform their counterparts of chapter 2", ["K-BFGS", "K-BFGS(L)"], ["K-BFGS-20", "K-BFGS(L)-20"], "time"),
        Claim("K-BFGS(-L) outperform the first-order methods", ["K-BFGS", "K-BFGS(L)"], ["Adam", "SGD-m"], "time"),
        Claim("K-BFGS performs similarly to KFAC, particularly with T = 20", ["K-BFGS", "K-BFGS, T = 20"], ["KFAC"], "time", within=0.1),
    ],
)

if __name__ == "__main__":
    main(FIGURE, __file__)
