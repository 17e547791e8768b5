"""Tuned tables: grids of the documents, the best point by hand, runs shared with figures."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from matplotlib.patches import Rectangle
from problems import assert_drawn

from curvlab.errors import CurvlabError
from curvlab.reproduction import (
    Comparison,
    Extent,
    Method,
    Options,
    TunedTable,
    load_script,
    reproduce,
    scripts,
)
from curvlab.reproduction.landscapes import draw_landscapes, in_brackets
from curvlab.reproduction.script import ReproductionReport
from curvlab.reproduction.search import SearchedGrid, TrainedPoint
from curvlab.reproduction.tuned import lowest_loss, neighbouring
from curvlab.sweeps.documents import DOCUMENT_GRIDS

TUNED = {name: made for name in scripts() if isinstance(made := load_script(name), TunedTable)}
FIGURES_OF = {
    "figure-2.3": "figure-2.2",
    "table-2.5": "figure-2.2",
    "table-2.6": "figure-2.6",
    "table-3.5": "figure-3.3",
    "table-4.3": "figure-4.2",
    "table-4.7": "figure-4.6",
}
OUTSIDE = {("table-4.3", "KFAC", "CURVES"): 30.0, ("table-4.3", "Adam", "CURVES"): 1e-3}
"""Dampings of the documents' tables that their own ranges lack."""


# ---- grids


def test_which_tables_are_searched_for() -> None:
    assert TUNED.keys() == FIGURES_OF.keys()


@pytest.mark.parametrize(
    ("value", "count", "found"),
    [
        (3, 3, (2, 3, 4)),
        (1, 3, (1, 2, 3)),
        (5, 3, (3, 4, 5)),
        (3, 2, (2, 3)),
        (1, 2, (1, 2)),
        (3, 1, (3,)),
        (3.5, 3, (3, 3.5, 4)),
        (9, 3, (4, 5, 9)),
        (3, 9, (1, 2, 3, 4, 5)),
    ],
)
def test_neighbours_on_an_axis(value: float, count: int, found: tuple[float, ...]) -> None:
    assert neighbouring((5, 1, 2, 4, 3), value, count) == found


@pytest.mark.parametrize("name", TUNED)
def test_coarse_grids_are_of_the_documents_and_hold_its_choice(name: str) -> None:
    table = TUNED[name]
    for label in table.methods:
        algorithm = {"K-BFGS-20": "k-bfgs", "K-BFGS(L)-20": "k-bfgs-l"}.get(
            label if name == "table-3.5" else "", table.methods[label].algorithm
        )
        stated = DOCUMENT_GRIDS[table.grid].axes[algorithm]
        for problem in table.problems:
            choice = table.choice(label, problem)
            assert choice.keys() == stated.keys()
            lacks = {axis: v for axis, v in choice.items() if v not in stated[axis]}
            key = (name, label, problem)
            assert lacks == ({"damping": OUTSIDE[key]} if key in OUTSIDE else {})
            coarse = table.places(label, problem, "cpu")
            whole = table.places(label, problem, "paper")
            for places in (coarse, whole):
                assert choice in places
                assert len({tuple(place.values()) for place in places}) == len(places)
                for place in places:
                    for axis, value in place.items():
                        assert value in stated[axis] or value == choice[axis]
            assert len(whole) == math.prod(map(len, stated.values())) + bool(lacks)
            assert len(coarse) <= 16
            assert len({place["lr"] for place in coarse}) >= 3
            if not lacks:
                assert all(place in whole for place in coarse)


@pytest.mark.parametrize("name", TUNED)
def test_the_documents_choice_is_the_run_of_its_figure(name: str) -> None:
    table, figure = TUNED[name], load_script(FIGURES_OF[name])
    assert (table.of.batch, table.of.l2) == (figure.batch, figure.l2)
    for problem in figure.problems:
        for label in table.methods:
            at = table.method_at(label, problem, table.choice(label, problem))
            assert at.arguments(problem) == figure.methods[label].arguments(problem)
            others = [
                table.method_at(label, problem, place).arguments(problem)
                for place in table.places(label, problem, "cpu")
            ]
            assert sum(other == at.arguments(problem) for other in others) == 1


def test_momenta_are_tuned_too() -> None:
    table = TUNED["table-4.7"]
    adam = table.places("Adam", "MNIST", "cpu")
    assert {(p["momentum"], p["decay"]) for p in adam} == {
        (mu, beta) for mu in (0.9, 0.99) for beta in (0.9, 0.99)
    }
    told = table.method_at("Adam", "MNIST", adam[0]).arguments("MNIST")
    assert told == {
        "algorithm": "adam",
        "lr": 3e-5,
        "damping": 1e-4,
        "decay": 0.9,  # μ = 0.9 is its own anyway
    }
    assert table.places("Shampoo", "FACES", "cpu")[-1]["decay"] == 0.999
    assert "decay" not in table.choice("SGD-m", "MNIST")


# ---- the best


def log(losses: list[float], seconds: float = 1.0, stopped: str = "") -> xr.Dataset:
    n = len(losses)
    return xr.Dataset(
        {
            "train_loss": ("epoch", np.asarray(losses, dtype=float)),
            "wall_seconds": ("epoch", np.arange(n) * seconds),
        },
        {"epoch": np.arange(n, dtype=float)},
        {"stopped": stopped} if stopped else {},
    )


@pytest.mark.parametrize(
    ("run", "epochs", "seconds", "found"),
    [
        (log([9, 5, 3, 4]), None, None, 3),
        (log([2, 5, 3, 4]), None, None, 3),  # of the ends of epochs, not of the start
        (log([9, 5, 3, 1]), 2, None, 3),
        (log([9, 5, 3, 1]), None, 2.5, 2),  # halfway between 3 and 1
        (log([9, 5, 6, 8]), None, 2.5, 5),
        (log([9, 5, math.nan, 1]), None, None, 1),
        (log([9, 5, math.nan, 1]), None, 2.0, 3),
        (log([9, 5, 3], stopped="diverged"), 3, None, math.inf),
        (log([9, 5, 3], stopped="diverged"), None, 2.5, math.inf),
        (log([9, 5, 3], stopped="diverged"), 2, None, 3),  # only later
        (log([9, 5, 3], stopped="diverged"), None, 1.5, 4),
        (log([9], stopped="diverged"), 1, None, math.inf),
        (log([9]), None, None, 9),
    ],
)
def test_the_lowest_loss_by_hand(
    run: xr.Dataset, epochs: int | None, seconds: float | None, found: float
) -> None:
    lowest, why = lowest_loss(run, epochs, seconds)
    assert lowest == pytest.approx(found)
    assert bool(why) == math.isinf(found)


Losses = dict[tuple[float, float], float]


def searched(losses: Losses, choice: tuple[float, float]) -> SearchedGrid:
    points = [
        TrainedPoint({"lr": lr, "damping": d}, loss, "" if math.isfinite(loss) else "diverged")
        for (lr, d), loss in losses.items()
    ]
    return SearchedGrid(tuple(points), {"lr": choice[0], "damping": choice[1]})


def test_the_best_point_by_hand() -> None:
    losses: Losses = {(0.1, 1): 4.0, (0.3, 1): 3.0, (1, 1): math.inf, (0.1, 3): 2.0, (0.3, 3): 2.0}
    grid = searched(losses, (0.3, 1))
    assert grid.best is not None
    assert grid.best.place == {"lr": 0.1, "damping": 3}  # the first of equal ones
    assert (grid.steps, grid.standing) == (2, "2 steps off, +50.0%")
    assert grid.within(1.0) == 2
    assert grid.within(1.5) == 3
    assert grid.within(1e9) == 4  # not the diverged
    tied = searched(losses, (0.3, 3))
    assert tied.best is not None
    assert tied.best.place == tied.choice  # the document's own of equal ones
    assert (tied.steps, tied.standing) == (0, "best")
    assert searched(losses, (0.1, 1)).standing == "beside the best, +100.0%"
    assert searched(losses, (1, 1)).standing == "3 steps off"  # it diverged
    lost = searched({(1, 1): math.inf, (3, 1): math.inf}, (1, 1))
    assert (lost.best, lost.steps, lost.standing) == (None, None, "all diverged")
    assert lost.within(2) == 0
    assert math.isinf(lost.excess)


def test_what_becomes_of_the_documents_choice() -> None:
    losses: Losses = {(0.1, 1): 4.0, (0.3, 1): 3.0, (1, 1): 2.0}
    grids = {
        "best": searched(losses, (1, 1)),
        "beside": searched(losses, (0.3, 1)),
        "off": searched(losses, (0.1, 1)),
        "level": searched(losses | {(0.1, 1): 2.01}, (0.1, 1)),
    }
    said = list(replace(small(), robust="it is robust")._verdicts({"one": grids}))
    assert said[1] == "  one: holds for 3 of 4; off 2 steps off, +100.0%"
    assert said[3] == "  one: holds: best 3 of 3, beside 3 of 3, off 3 of 3, level 3 of 3"
    halves = {"rough": searched(losses | {(0.1, 1): 4.1, (0.3, 1): math.inf}, (1, 1))}
    assert list(small()._verdicts({"one": halves}))[1::2] == [
        "  one: holds", "  one: does not hold: rough 1 of 3",
    ]  # fmt: skip


# ---- runs


EXTENT = Extent(epochs=2, examples=40, tests=20)


def small() -> TunedTable:
    """In earnest but small: 40 examples, two steps an epoch; two points a method."""
    methods = {"Adam": Method("adam", (1e-4, 1e-4)), "SGD-m": Method("sgd-m", (0.003, 0))}
    figure = Comparison(
        "figure", "claim", ["MNIST"], methods, 20, cpu=EXTENT, paper=Extent(epochs=1)
    )
    return TunedTable(
        "table",
        "claim",
        figure,
        "thesis-table-2.5",
        coarse={"lr": 2, "damping": 1},
        coarser={"SGD-m": {"lr": (0.003, 3e38)}},
        cpu=EXTENT,
        robust="it is robust",
    )


def run(
    what: TunedTable | Comparison, tmp_path: Path, **options: tuple[str, ...]
) -> ReproductionReport:
    chosen = Options("cpu", tmp_path / "out", tmp_path / "runs", "cpu", **options)
    report = ReproductionReport("table", chosen)
    what.results(report)
    return report


@pytest.mark.usefixtures("tiny")
def test_points_are_shared_with_figures_and_what_diverged_is_a_cell(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = small()
    run(replace(table.of, cpu=replace(EXTENT, epochs=3)), tmp_path)
    of_the_figure = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("run.h5")}
    assert len(of_the_figure) == 2
    capsys.readouterr()
    report = run(table, tmp_path)
    files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("run.h5")}
    assert len(files) == 2 + 2
    assert {path: files[path] for path in of_the_figure} == of_the_figure
    said = "\n".join(report.lines)
    (row,) = [line.split() for line in report.lines if line.startswith("SGD-m ")]
    assert row[1:3] == ["(0.003,", "-)"]
    assert row[-3:] == ["2", "1", "1"]  # points, within 25 %, diverged
    assert "SGD-m diverged at (3e+38, -); the first: diverged in epoch 1" in said
    assert "MNIST: holds: Adam 2 of 2, SGD-m 1 of 2" in said
    assert "4 of 4: SGD-m on MNIST at (3e+38) (about " in capsys.readouterr().err
    again = run(table, tmp_path)
    assert {path: path.stat().st_mtime_ns for path in files} == files  # taken as they are
    assert again.lines == report.lines
    by_hand = min(
        float(log.train_loss[1:3].min())
        for path in files
        if "adam" in str(path)
        for log in [xr.open_dataset(path, engine="h5netcdf")]
    )
    (row,) = [line.split() for line in report.lines if line.startswith("Adam ")]
    assert row[3] == f"{by_hand:.4g}"


@pytest.mark.usefixtures("tiny")
def test_values_that_a_method_does_not_take_are_a_line_of_the_table(tmp_path: Path) -> None:
    """Double damping has none above 1, of which the document's own grid has two (Table 2.6, on
    CURVES). What refuses the document's own choice is no such thing, and is raised.
    """
    methods = {"K-BFGS": Method("k-bfgs-20", (0.01, 1.0))}
    table = replace(
        small(),
        of=replace(small().of, methods=methods),
        coarse={"lr": 1, "damping": 3},
        coarser={},
    )
    report = run(table, tmp_path)
    (row,) = [line.split() for line in report.lines if line.startswith("K-BFGS ")]
    assert (row[-3], row[-1]) == ("3", "0")  # points, diverged
    assert "  K-BFGS does not take (0.01, 3); the first: block 1" in "\n".join(report.lines)
    methods = {"K-BFGS": Method("k-bfgs-20", (0.01, 3.0))}
    with pytest.raises(CurvlabError, match="double damping takes"):
        run(replace(table, of=replace(table.of, methods=methods)), tmp_path)


def test_data_that_are_not_there_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CURVLAB_DATA", str(tmp_path))
    methods = {"Adam": Method("adam", {"webspam": (1e-4, 1e-4)})}
    of = replace(small().of, problems=["webspam"], methods=methods)
    table = replace(small(), of=of, quick=("webspam",))
    with pytest.raises(CurvlabError, match=r"^table: data file webspam"):
        run(table, tmp_path)


def test_methods_and_problems_can_be_chosen(tmp_path: Path) -> None:
    options = Options(
        "smoke", tmp_path, device="cpu", methods=("Adam", "TNT"), problems=("CURVES",)
    )
    report = reproduce(TUNED["table-4.3"], "table-4.3", options)
    assert [line.split()[0] for line in report.lines[3:7]] == ["CURVES", "method", "TNT", "Adam"]


def test_a_budget_has_problems_of_its_own() -> None:
    table = TUNED["table-2.5"]
    assert table.chosen("paper") == ["MNIST", "FACES", "CURVES"]
    assert table.chosen("cpu") == ["MNIST", "CURVES"]
    assert table.chosen("smoke") == ["MNIST"]
    assert table.chosen("cpu", ("FACES",)) == ["FACES"]
    assert TUNED["table-4.7"].chosen("cpu") == ["MNIST"]
    assert table.extents["cpu"].startswith("MNIST, CURVES: 42 points each, 4 or 12 epochs, 1 seed")
    assert table.extents["paper"].startswith("MNIST, FACES, CURVES: 468 points each, 500 or 2000 s")


# ---- the picture


def test_a_landscape_has_a_tile_for_each_point() -> None:
    losses: Losses = {(0.1, 1): 4.0, (0.3, 1): math.inf, (0.1, 3): 2.0, (0.3, 3): 90.0}
    found = {p: {"K-BFGS": searched(losses, (0.1, 1))} for p in ("MNIST", "CURVES")}
    figure = draw_landscapes(found, "title")
    axes = [ax for ax in assert_drawn(figure) if ax.get_title()]
    assert [ax.get_title() for ax in axes] == ["K-BFGS", "K-BFGS"]
    (ax, _) = axes
    assert sorted(text.get_text() for text in ax.texts) == ["2", "4", "90"]
    frames = [p for p in ax.patches if isinstance(p, Rectangle) and not p.get_fill()]
    hatched = [p for p in ax.patches if isinstance(p, Rectangle) and p.get_hatch()]
    assert [p.get_xy() for p in frames] == [(0, 0)]
    assert [p.get_xy() for p in hatched] == [(1, 0)]
    grid = found["MNIST"]["K-BFGS"]
    points = tuple(replace(p, refused=p.place == {"lr": 0.3, "damping": 1}) for p in grid.points)
    empty = draw_landscapes({"MNIST": {"K-BFGS": replace(grid, points=points)}}, "title")
    patches = [p for one in empty.axes for p in one.patches if isinstance(p, Rectangle)]
    assert not [p for p in patches if p.get_hatch()]
    (star,) = ax.lines
    at = [float(np.asarray(values, dtype=float)[0]) for values in star.get_data()]
    assert at == pytest.approx([0.5, 1.8])
    assert [t.get_text() for t in ax.get_xticklabels()] == ["0.1", "0.3"]
    assert [t.get_text() for t in ax.get_yticklabels()] == ["1", "3"]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("learning rate", "damping")


def test_where_the_damping_is_one_the_momenta_go_upwards() -> None:
    places = [
        {"lr": lr, "damping": 1.0, "momentum": mu, "decay": beta}
        for lr in (0.1, 0.3)
        for mu in (0.9, 0.99)
        for beta in (0.9, 0.99)
    ]
    points = tuple(TrainedPoint(place, 1.0 + i) for i, place in enumerate(places))
    grid = SearchedGrid(points, places[0])
    further = tuple(
        TrainedPoint(place | {"damping": 3.0}, 9.0 - i) for i, place in enumerate(places)
    )
    both = SearchedGrid(points + further, places[0])
    figure = draw_landscapes({"MNIST": {"TNT": grid, "KFAC": both}}, "title")
    one, other = (ax for ax in figure.axes if ax.get_title())
    assert [t.get_text() for t in one.get_yticklabels()] == [
        "0.9, 0.9", "0.9, 0.99", "0.99, 0.9", "0.99, 0.99",
    ]  # fmt: skip
    assert one.get_ylabel() == "μ, β"
    assert [t.get_text() for t in other.texts] == ["1", "5", "6", "2"]  # momenta at their best
    assert in_brackets(places[0], ("lr", "momentum", "weight_decay")) == "(0.1, 0.9, -)"
