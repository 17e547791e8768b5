"""Twenty epochs of the MNIST autoencoder by the thesis's methods at its values, three seeds: the
loss after 5, 10 and 20 of them.

The logs are kept in `analyses/logs`, of which the table is made again in seconds:
    curvlab reproduce long-runs --budget cpu --runs analyses/logs
"""

from curvlab.reproduction import DOCUMENT_SECONDS, Claim, Comparison, Extent, load_script, main

ALL = load_script("autoencoders").methods

FIGURE = Comparison(
    shows="twenty epochs of the MNIST autoencoder, at the thesis’s values",
    claim=(
        "our algorithms clearly outperformed the first-order methods … and performed comparably to"
        " KFAC (2.8.1); TNT consistently outperformed … the first-order methods (4.4.1)"
    ),
    problems=["MNIST"],
    batch=1000,
    methods={
        label: ALL[label]
        for label in (
            "K-BFGS-20",
            "K-BFGS",
            "K-BFGS(L)",
            "KFAC",
            "TNT",
            "Shampoo",
            "SGD-m",
            "Adam",
        )
    },
    measures=["train_loss", "train_error"],
    cpu=Extent(epochs=20, tests=0, evaluated=10_000, seeds=3, told_after=(5, 10, 20)),
    paper=Extent(seconds=DOCUMENT_SECONDS, seeds=3),
    claims=[
        Claim(
            "all second-order methods are ahead of the first-order ones",
            ["K-BFGS-20", "K-BFGS", "K-BFGS(L)", "KFAC", "TNT", "Shampoo"],
            ["SGD-m", "Adam"],
        ),
        Claim(
            "K-BFGS and K-BFGS(L) perform similarly to KFAC",
            ["K-BFGS", "K-BFGS(L)"],
            ["KFAC"],
            within=0.1,
            alike=True,
        ),
    ],
)

if __name__ == "__main__":
    main(FIGURE, __file__)
