"""Thesis Table 2.3: how many examples the three data sets have, beside those that curvlab loads.

Three facts make the counts differ: CURVES and FACES are made again, not the documents' files, and
of FACES, 20,700 examples that the document counts for testing are Hinton and Salakhutdinov's
validation set.
"""

import curvlab as cl
from curvlab.reproduction import ReproductionReport, Script, main

TABLE = {
    "MNIST": ("mnist-ae", 60_000, 10_000),
    "FACES": ("faces", 103_500, 62_100),
    "CURVES": ("curves", 20_000, 10_000),
}


def make(report: ReproductionReport) -> None:
    rows = []
    for label, (name, training, testing) in TABLE.items():
        try:
            parts = None if report.options.smoke and name != "mnist-ae" else cl.datasets.load(name)
        except cl.CurvlabError as error:
            report.say(f"{label}: {error}")
            parts = None
        found = ["not loaded"] * 2 if parts is None else [f"{len(part):,}" for part in parts]
        rows.append([label, f"{training:,}", found[0], f"{testing:,}", found[1]])
    report.table(["data set", "training", "here", "testing", "here"], rows)


FIGURE = Script(
    shows="thesis Table 2.3: data sets of the autoencoders",
    claim="70,000, 165,600 and 30,000 data points",
    extents={"smoke": "MNIST alone is loaded", "cpu": "all are loaded", "paper": "all are loaded"},
    make=make,
)

if __name__ == "__main__":
    main(FIGURE, __file__)
