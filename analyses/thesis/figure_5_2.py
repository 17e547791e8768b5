"""Thesis Figure 5.2: Figure 5.1 on CIFAR-10 classes, 3072-400-400-10, N₁ = 100, N₂ = 50, learning
rate 0.01.
"""

from dataclasses import replace

from curvlab.reproduction import Claim, Extent, load_script, main

MNIST = load_script("figure-5.1")
METHODS = {
    label: replace(
        m,
        values=(0.01, m.values[1]),
        options=m.options | ({"curvature_size": 50} if "curvature_size" in m.options else {}),
    )
    for label, m in MNIST.methods.items()
}

FIGURE = replace(
    MNIST,
    shows=(
        "thesis Figure 5.2: SMW-GN, SMW-NG, SMW-NG-BD, KFAC, HF and SGD on a CIFAR classification"
        " problem"
    ),
    claim=(
        "SMW-GN is always faster than HF … KFAC … slows down considerably when the NN has wide"
        " layers … if learning rate is chosen to be more conservative or typical (e.g., 0.01),"
        " [SGD] may suffer from slow convergence compared with second-order methods (5.8.1)"
    ),
    problems=["CIFAR classes"],
    batch=100,
    methods=METHODS,
    cpu=Extent(seconds=60, epochs=10),
    claims=[
        Claim("SMW-GN is faster than HF in epochs", ["SMW-GN"], ["HF"]),
        Claim("SMW-GN is faster than HF in time", ["SMW-GN"], ["HF"], "time"),
        Claim(
            "SGD is slower than second-order methods",
            ["SMW-GN", "SMW-NG", "SMW-NG-BD", "KFAC"],
            ["SGD"],
        ),
    ],
)

if __name__ == "__main__":
    main(FIGURE, __file__)
