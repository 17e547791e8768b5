"""Thesis Table 2.4 (and 3.6): widths, activations and losses of the autoencoders, beside the
networks that curvlab builds.
"""

from torch import nn

import curvlab as cl
from curvlab.reproduction import ReproductionReport, Script, main

TABLE = {  # widths, and the loss
    "mnist-ae": ([784, 1000, 500, 250, 30, 250, 500, 1000, 784], "binary entropy"),
    "faces-ae": ([625, 2000, 1000, 500, 30, 500, 1000, 2000, 625], "MSE"),
    "curves-ae": ([784, 400, 200, 100, 50, 25, 6, 25, 50, 100, 200, 400, 784], "binary entropy"),
}
LOSSES = {"bernoulli": "binary entropy", "gaussian": "MSE"}


def make(report: ReproductionReport) -> None:
    rows = []
    for name, (widths, loss) in TABLE.items():
        layers = list(cl.models.build(name).children())
        linear = [layer for layer in layers if isinstance(layer, nn.Linear)]
        built = [linear[0].in_features, *(layer.out_features for layer in linear)]
        code = [
            layer.out_features
            for layer, after in zip(layers, [*layers[1:], None], strict=True)
            if isinstance(layer, nn.Linear) and not isinstance(after, nn.ReLU)
        ]
        same = (
            built == widths
            and code == [min(widths), widths[-1]]
            and LOSSES[cl.models.find(name).likelihood] == loss
        )
        count = sum(p.numel() for layer in linear for p in layer.parameters())
        rows.append(
            [
                name,
                "-".join(map(str, built)),
                loss,
                f"{count:,}",
                "as printed" if same else "differs",
            ]
        )
    report.table(
        ["network", "widths; ReLU but after the code and the last", "loss", "parameters", ""], rows
    )
    report.say("the sigmoid that is printed last belongs to the loss")


FIGURE = Script(
    shows="thesis Tables 2.4 and 3.6: architectures of the autoencoders",
    claim="ReLU, linear at the code, sigmoid (FACES: linear) at the end",
    extents=dict.fromkeys(("smoke", "cpu", "paper"), "all of it"),
    make=make,
)

if __name__ == "__main__":
    main(FIGURE, __file__)
