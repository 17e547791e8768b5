"""FIGURES: figures of a log alone by matplotlib, one function a figure.

The functions are in `comparison_figures`, `spectrum_figure`, `sweep_figure` and
`training_figures`. Colours, dashes and markers are those of `style`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import xarray as xr
from matplotlib.figure import Figure

from curvlab.errors import CurvlabError, lookup
from curvlab.logs import attributes
from curvlab.logs.regular import regular, unique
from curvlab.show.captions import Runs as Runs
from curvlab.show.comparison_figures import cosine, loss, seconds
from curvlab.show.drawable import SHORT, drawable
from curvlab.show.spectrum_figure import spectrum_histograms
from curvlab.show.sweep_figure import landscape
from curvlab.show.training_figures import damping, training
from curvlab.system.escape import for_matplotlib, for_terminal


def labelled(runs: Runs) -> Runs:
    """Name runs by their algorithms; where two share one, by what differs.

    That is seed, learning rate, damping, or else their place.
    """
    about = [attributes.text(ds, "algorithm", "run") for _, ds in runs]
    for key in ("lr", "damping", "seed"):
        if len(set(about)) == len(about):
            break
        said = [
            ds.attrs.get(key) if attributes.number(ds, key) is not None else None for _, ds in runs
        ]
        if len(set(said)) > 1:
            about = [f"{name}, {key} {value}" for name, value in zip(about, said, strict=True)]
    if len(set(about)) < len(about):
        about = [f"{name} ({place})" for name, (place, _) in zip(about, runs, strict=True)]
    return [(name, ds) for name, (_, ds) in zip(about, runs, strict=True)]


@dataclass(frozen=True)
class FigureEntry:
    """A figure by name.

    `needs`: the variable of the log that is drawn, `beside` what it is not drawn without;
    `several`: it takes [(name, log)] of several runs.
    """

    summary: str
    needs: str
    draw: Callable[..., Figure]
    several: bool = False
    beside: tuple[str, ...] = ()


FIGURES: dict[str, FigureEntry] = {
    "cosine": FigureEntry(
        "cosine to the reference by layer against the iteration (thesis Figure 4.1)",
        "cosine",
        cosine,
    ),
    "loss": FigureEntry("loss along the trajectory", "loss", loss),
    "seconds": FigureEntry("time of each algorithm's own work", "seconds", seconds),
    "spectrum": FigureEntry(
        "eigenvalues of each layer's curvature block, negative ones apart",
        "density",
        spectrum_histograms,
        beside=("lowest", "highest", "order", "lower", "upper"),
    ),
    "training": FigureEntry(
        "loss and error of one or several training runs against epochs and time",
        "train_loss",
        training,
        several=True,
    ),
    "damping": FigureEntry(
        "pairs of a training run by layer and epoch (thesis Figure 2.1)",
        "pairs_within_mu1",
        damping,
        beside=("pairs_within_2mu1", "pair_curvature_mean"),
    ),
    "landscape": FigureEntry(
        "score of a sweep over learning rate and damping (thesis Figure 2.3)",
        "score",
        landscape,
        beside=("state",),
    ),
}


def draw(ds: xr.Dataset, name: str) -> Figure:
    """Draw figure `name` of a log.

    Raises:
        CurvlabError: an unknown name, or a log that lacks what it needs.
    """
    return draw_all([("", ds)], name)


def draw_all(runs: Runs, name: str) -> Figure:
    """Draw figure `name` of one or several logs [(place, log)].

    Raises:
        CurvlabError: as `draw`, or it shows one run alone.
    """
    entry = lookup(FIGURES, name, "figure")
    if len(runs) > 1 and not entry.several:
        raise CurvlabError(
            f"figure '{name}' is of one run: give one (of several: {', '.join(_of_several())})"
        )
    places = unique(for_matplotlib(place, SHORT) for place, _ in runs)
    ready = [(place, drawable(ds)) for place, (_, ds) in zip(places, runs, strict=True)]
    for (place, _), (_, at) in zip(runs, ready, strict=True):
        for needed in (entry.needs, *entry.beside):
            if needed not in at:
                known = (
                    for_terminal(", ".join(map(str, at.data_vars))) or "nothing that can be drawn"
                )
                where = f"the log{' ' * bool(place)}{for_terminal(place)}"
                raise CurvlabError(
                    f"figure '{name}' needs '{needed}' in {where}, which has {known}"
                )
    with np.errstate(all="ignore"):
        return entry.draw(labelled(ready) if entry.several else ready[0][1])


def _of_several() -> list[str]:
    return [name for name, entry in FIGURES.items() if entry.several]


def main_figure(ds: xr.Dataset) -> str:
    """Return the figure that stands for a log: the first that it has the data of, but the loss."""
    return next((name for name in applying(ds) if name != "loss"), "loss")


def applying(ds: xr.Dataset) -> list[str]:
    """Return the figures of FIGURES that the log has the main variable for."""
    has, _ = regular(ds)
    return [name for name, entry in FIGURES.items() if entry.needs in has]
