"""Thesis Figure 2.1: how often yᵀHy ≤ 2/μ₁ sᵀy after double damping, and the mean of yᵀHy / sᵀy, by
epoch and layer.

K-BFGS(L) of chapter 2 at Table 2.5's values, minibatches of 1000, no pair skipped; below it, what
no document shows: the same fraction for every other quasi-Newton method, before and after its
damping. The pairs are those of the derivatives (H_g), of SKQN-L and L-BFGS those of the parameters.
A block of pairs (SKQN-B) has no single ratio: the least sᵀy / sᵀBs stands for it.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from curvlab.linalg.pair_damping import MU1
from curvlab.reproduction import (
    Comparison,
    Extent,
    Method,
    ReproductionReport,
    Script,
    load_script,
    main,
)

PROBLEMS = ["MNIST", "FACES", "CURVES"]
OURS = "K-BFGS(L)-20"
STAGES = ("before", "after")
SKQN = ("SKQN-L", "SKQN-B1", "SKQN-B2")
WITHIN = "pairs_within_2mu1"

CHAPTER_2, CHAPTER_3, S2QN = (
    load_script(name).methods for name in ("figure-2.2", "figure-3.1", "s2qn-figure-2")
)


def probed(method: Method) -> Method:
    return replace(method, options={**method.options, "probes": ["damping"]})


def on(values: tuple[float, ...]) -> dict[str, tuple[float, ...]]:
    return {"MNIST": values, "CURVES": values}


def without_faces(method: Method) -> Method:
    assert isinstance(method.values, Mapping)
    return replace(
        method, values={name: values for name, values in method.values.items() if name != "FACES"}
    )


RUNS = Comparison(
    shows="",
    claim="",
    problems=PROBLEMS,
    batch=1000,
    methods={
        OURS: probed(CHAPTER_2["K-BFGS(L)"]),
        "K-BFGS-20": probed(without_faces(CHAPTER_2["K-BFGS"])),
        "K-BFGS(L)": probed(without_faces(CHAPTER_3["K-BFGS(L)"])),
        "K-BFGS": probed(without_faces(CHAPTER_3["K-BFGS"])),
        "KF-BFGS(L)-CNN": probed(Method("kf-bfgs-l-cnn", on((0.3, 0.3)))),  # no table's: as K-BFGS
        "KF-BFGS-CNN": probed(Method("kf-bfgs-cnn", on((0.3, 0.3)))),
        **{
            name: probed(replace(S2QN[name], values=on(S2QN[name].values["MNIST"])))
            for name in SKQN
        },
        "L-BFGS": probed(Method("lbfgs", on((0.1, 0.0)))),
    },
    cpu=Extent(epochs={"MNIST": 3, "FACES": 2, "CURVES": 6}, tests=0, evaluated=1000),
    paper=Extent(epochs=50, tests=0),
    l2=0.5e-5,
)


def pairs(log: xr.Dataset) -> xr.Dataset:
    """Of every epoch and block, after the weights began to move."""
    log = log.isel(algorithm=0, epoch=slice(1, None))
    which = "g" if bool(log["pairs_seen"].sel(pair="g").sum() > 0) else "step"
    return log.sel(pair=which)


def by_layer(found: xr.Dataset, above: Axes, below: Axes) -> None:
    """The document's own two panels."""
    for i, layer in enumerate(found["block"].values):
        look: dict[str, Any] = {
            "color": f"C{i}",
            "marker": "os^vDPX*+x12"[i % 12],
            "markersize": 4,
            "linewidth": 1.2,
        }
        above.plot(found["epoch"], found[WITHIN].sel(block=layer), label=f"layer {i + 1}", **look)
        below.plot(found["epoch"], found["pair_curvature_mean"].sel(block=layer), **look)
    above.set(ylim=(-0.03, 1.05))
    above.legend(fontsize=6, ncols=2)
    below.set(xlabel="epoch", yscale="log")
    below.axhline(2 / MU1, color="black", linewidth=0.8, linestyle=":")
    for axes in (above, below):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def by_method(logs: dict[str, xr.Dataset], axes: Axes) -> None:
    """A point a layer: the mean over epochs, before and after damping."""
    looks: dict[str, dict[str, Any]] = {
        "before": {"marker": "o", "facecolors": "none", "edgecolors": "C0", "s": 26},
        "after": {"marker": "x", "color": "C1", "s": 26},
    }
    known = {label: log for label, log in logs.items() if bool(log[WITHIN].notnull().any())}
    for i, log in enumerate(known.values()):
        for shift, (stage, look) in zip((-0.15, 0.15), looks.items(), strict=True):
            each = log[WITHIN].sel(stage=stage).mean("epoch")
            axes.scatter(
                [i + shift] * each.sizes["block"],
                each,
                label=f"{stage} damping" if i == 0 else None,
                **look,
            )
    axes.set_xticks(range(len(known)), list(known), rotation=60, ha="right", fontsize=8)
    axes.set(ylim=(-0.03, 1.05))
    axes.legend(fontsize=6, loc="lower left")


def row(label: str, found: xr.Dataset) -> list[str]:
    """Over layers and the epochs after the first."""
    later, steps = after_the_first(found), found["pair_definiteness"]
    ends = [
        *(said(later[WITHIN].sel(stage=stage).min(), ".1%") for stage in STAGES),
        said(later["pair_curvature_mean"].sel(stage="after").max(), ".3g"),
        *(said(steps.sel(stage=stage).min(), ".2g") for stage in STAGES),
        said(later["pairs_skipped"].mean(), ".1%"),
    ]
    return [label, *ends]


def after_the_first(found: xr.Dataset) -> xr.Dataset:
    return found.isel(epoch=slice(min(1, found.sizes["epoch"] - 1), None))


def said(value: xr.DataArray, form: str) -> str:
    return "" if bool(value.isnull()) else f"{float(value):{form}}"


def make(report: ReproductionReport) -> None:
    results = RUNS.results(report)
    figure = Figure(figsize=(1 + 3.6 * len(results), 9.6), layout="constrained")
    panels = figure.subplots(3, len(results), squeeze=False)
    for column, (problem, of_methods) in zip(panels.T, results.items(), strict=True):
        logs = {label: pairs(r.runs[0]) for label, r in of_methods.items() if r.runs}
        report.say(f"{problem}: the worst layer and epoch (after the first) of each method")
        headings = [
            "method",
            "≤ 2/μ₁ before",
            "after damping",
            "greatest mean",
            "least sᵀy/sᵀBs",
            "after",
            "refused",
        ]
        report.table(headings, (row(label, log) for label, log in logs.items()))
        for label in (name for name in ("K-BFGS-20", OURS) if name in logs):
            least = float(after_the_first(logs[label])[WITHIN].sel(stage="after").min())
            verdict = "holds" if least >= 0.9 else "does not hold"
            report.say(
                f"claim: {label}: at least 90 % in every layer and epoch after the first: {verdict}"
            )
        report.say()
        column[0].set_title(f"{problem}: {OURS}" if OURS in logs else problem)
        if OURS in logs:
            by_layer(logs[OURS].sel(stage="after"), *column[:2])
        by_method(logs, column[2])
    for axes, words in zip(
        panels[:, 0],
        (
            "fraction with yᵀHy ≤ 2/μ₁ sᵀy",
            "mean of yᵀHy / sᵀy (dotted: 2/μ₁)",
            "fraction of all epochs, a point a layer",
        ),
        strict=True,
    ):
        axes.set_ylabel(words)
    figure.suptitle(f"{FIGURE.shows} ({report.options.budget})", fontsize=10)
    report.draw(figure)


FIGURE = Script(
    shows=(
        "thesis Figure 2.1: the first inequality of double damping, for K-BFGS(L), and for other"
        " quasi-Newton methods"
    ),
    claim="at least 90% of the iterations satisfy yᵀHy / sᵀy ≤ 2/μ₁, even if we don't skip (2.3.1)",
    extents=RUNS.extents,
    make=make,
    problems=PROBLEMS,
    methods=list(RUNS.methods),
)

if __name__ == "__main__":
    main(FIGURE, __file__)
