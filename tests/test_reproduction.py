"""Figures and tables by name: all are there, and run in small; runs are shared and go on; claims
and exponents by hand.
"""

from __future__ import annotations

import json
import math
import re
import runpy
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import xarray as xr
from matplotlib.figure import Figure
from problems import assert_drawn
from torch import nn

from curvlab.algorithms import ALGORITHMS
from curvlab.cli import app as cli
from curvlab.curvature.settings import Cadence
from curvlab.datasets import DATASETS
from curvlab.errors import CurvlabError
from curvlab.logs.reading import open_log
from curvlab.models import MODELS
from curvlab.reproduction import (
    Axis,
    Claim,
    Comparison,
    Extent,
    Method,
    Options,
    Row,
    Scaling,
    load_script,
    reproduce,
    scripts,
)
from curvlab.reproduction.claims import verdicts
from curvlab.reproduction.drawing import training_curves
from curvlab.reproduction.problem_runs import ProblemRuns
from curvlab.reproduction.problems import PROBLEMS
from curvlab.reproduction.results import Result, cut
from curvlab.reproduction.scaling import exponent
from curvlab.reproduction.script import ReproductionReport
from curvlab.reproduction.step_costs import StepCosts, long_run
from curvlab.show.style import looks as looks_of
from curvlab.system.memory import tensors

ANALYSES = Path(__file__).resolve().parent.parent / "analyses"
NAMES = list(scripts())
COMPARISONS = {name: made for name in NAMES if isinstance(made := load_script(name), Comparison)}

FIGURES = [
    "2.1",
    *(f"2.{i}" for i in range(2, 8)),
    *(f"3.{i}" for i in range(1, 10)),
    *(f"4.{i}" for i in range(1, 7)),
    "5.1",
    "5.2",
    "5.3",
]
TABLES = [
    *(f"2.{i}" for i in range(1, 7)),
    *(f"3.{i}" for i in (1, 2, 3, 4, 5, 6, 8, 9)),
    *(f"4.{i}" for i in (1, 2, 3, 7)),
]
"""Of the thesis. Tables 3.7, 3.10, 4.4 to 4.6 are the scripts' values."""


# ---- what there is


def test_every_figure_and_table_has_a_name() -> None:
    thesis = [f"figure-{n}" for n in FIGURES] + [f"table-{n}" for n in TABLES]
    s2qn, kfqn = (
        [f"{document}-figure-{n}" for n in range(1, 5)] for document in ("s2qn", "kfqn-cnn")
    )
    own = ["autoencoders", "cifar-cost", "convnet", "long-runs", "layerwise-oracle"]
    assert [*thesis, *s2qn, "skqn-refinement", *kfqn, *own] == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_it_says_what_it_shows_and_what_is_claimed(name: str) -> None:
    what = load_script(name)
    assert what.shows
    assert what.claim
    assert what.extents.keys() == {"smoke", "cpu", "paper"}
    text = scripts()[name].read_text()
    assert text.startswith('"""')
    assert not re.search(r"curvlab\.\w+\._|import _", text)
    assert len(text.splitlines()) <= 240  # of 100 columns


@pytest.mark.parametrize("name", COMPARISONS)
def test_claims_and_reports_are_of_methods_and_problems_that_there_are(name: str) -> None:
    figure = COMPARISONS[name]
    assert set(figure.problems) <= PROBLEMS.keys()
    for claim in figure.claims:
        assert {*claim.better, *claim.than} <= figure.methods.keys()
    for problem in figure.problems:
        assert figure.reported.numbers.get(problem, {}).keys() <= figure.methods.keys()
        used = [method for method in figure.methods.values() if method.on(problem) is not None]
        assert used
        for method in used:
            assert len(method.on(problem) or ()) in (2, 3)
            assert method.algorithm in ALGORITHMS
        ends = (
            figure.paper.seconds_on(problem)
            or figure.paper.epochs_on(problem)
            or all(method.epochs for method in used)
        )
        assert ends
        assert figure.cpu.seconds_on(problem) or figure.cpu.epochs_on(problem)


def test_problems_are_of_networks_and_data_that_there_are() -> None:
    for problem in PROBLEMS.values():
        assert problem.model in MODELS
        assert problem.data in DATASETS
        assert problem.part is None or problem.part in DATASETS


# ---- they run


@pytest.mark.thinned(12)
@pytest.mark.parametrize("name", NAMES)
def test_smoke(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Figure] = []
    write = ReproductionReport.draw
    monkeypatch.setattr(
        ReproductionReport,
        "draw",
        lambda self, figure: drawn.append(figure) or write(self, figure),  # type: ignore[func-returns-value]  # for its effect
    )
    reproduce(load_script(name), name, Options("smoke", tmp_path / "out", tmp_path / "runs", "cpu"))
    said = capsys.readouterr().out
    assert f"wrote {tmp_path / 'out' / name}-smoke.txt" in said
    assert (tmp_path / "out" / f"{name}-smoke.txt").read_text().startswith(load_script(name).shows)
    assert not (tmp_path / "runs").exists()
    if name not in ("table-2.3", "table-2.4", "table-3.6"):
        assert (tmp_path / "out" / f"{name}-smoke.png").stat().st_size > 5000
        assert_drawn(drawn[-1])
    if name in COMPARISONS:
        assert said.count("claim:") == len(COMPARISONS[name].claims)
        for label in COMPARISONS[name].methods:
            assert f"\n{label} " in said
        assert "diverged" not in said


def test_a_script_by_itself_and_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["--budget", "smoke", "--out", str(tmp_path)]
    script = [sys.executable, str(ANALYSES / "thesis" / "table_2_4.py"), *words]
    by_itself = subprocess.run(script, capture_output=True, text=True, check=True).stdout
    (tmp_path / "table-2.4-smoke.txt").unlink()
    monkeypatch.setattr(sys, "argv", ["curvlab", "reproduce", "table-2.4", *words])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert not stop.value.code
    lines = capsys.readouterr().out.splitlines()
    assert lines[1:] == by_itself.splitlines()[1:]  # the first names the number of threads
    assert (tmp_path / "table-2.4-smoke.txt").exists()


def test_a_script_by_itself_has_one_line_for_bad_input(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    script = ANALYSES / "thesis" / "table_2_4.py"
    monkeypatch.setattr(sys, "argv", [str(script), "--out", str(tmp_path / "file")])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(script), run_name="__main__")
    assert stop.value.code == 2
    assert re.fullmatch(r"curvlab: .*cannot be written: .*\n", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--budget huge", "unknown budget 'huge' (known: smoke, cpu, paper)"),
        ("--methods kfac", "no such option: --methods kfac; see --help"),
        ("--method kfac", "there are no methods to choose from: leave --method out"),
        ("--device", "argument --device: expected one argument; see --help"),
    ],
)
def test_a_script_by_itself_knows_the_options_of_the_command(
    words: str, says: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    script = ANALYSES / "thesis" / "table_2_4.py"
    monkeypatch.setattr(sys, "argv", [str(script), *words.split()])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(script), run_name="__main__")
    assert stop.value.code == 2
    assert capsys.readouterr().err == f"curvlab: {says}\n"


def test_a_script_by_itself_takes_some_methods_of_some_problems(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    script = ANALYSES / "thesis" / "figure_4_2.py"
    words = [
        "--budget",
        "smoke",
        "--out",
        str(tmp_path),
        "--method",
        "TNT",
        "--method",
        "Adam",
        "--problem",
        "CURVES",
    ]
    monkeypatch.setattr(sys, "argv", [str(script), *words])
    runpy.run_path(str(script), run_name="__main__")
    said = capsys.readouterr().out
    assert "\nTNT " in said
    assert "\nAdam " in said
    assert "\nKFAC " not in said
    assert "\nMNIST\n" not in said


def test_ctrl_c_is_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(self: Comparison, report: ReproductionReport) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Comparison, "run", interrupted)
    monkeypatch.setattr(sys, "argv", ["curvlab", "reproduce", "figure-3.1"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 130
    assert capsys.readouterr().err == "curvlab: interrupted; the same command goes on\n"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["figure-2.9"], "unknown figure or table 'figure-2.9'; did you mean"),
        (["figure-3.1", "--budget", "gpu"], "unknown budget 'gpu'"),
        (
            ["figure-3.1", "--budget", "smoke", "--method", "KFACC"],
            "unknown method 'KFACC'; did you mean 'KFAC'?",
        ),
        (["figure-3.1", "--budget", "smoke", "--problem", "FACES"], "unknown problem 'FACES'"),
        (["figure-3.1", "--device", "tpu"], "tpu"),
        (
            ["table-2.1", "--budget", "smoke", "--method", "TNT"],
            "unknown method 'TNT' (known: K-BFGS, K-BFGS(L), KFAC, Adam)",
        ),
        (
            ["figure-2.1", "--problem", "webspam"],
            "unknown problem 'webspam' (known: MNIST, FACES, CURVES)",
        ),
    ],
)
def test_bad_input_is_one_line(
    words: list[str], says: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["curvlab", "reproduce", *words])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    err = capsys.readouterr().err.splitlines()[-1]
    assert err.startswith("curvlab: ")
    assert says in err


def test_without_a_name_all_are_listed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for words in (["reproduce"], ["list", "reproductions"]):
        monkeypatch.setattr(sys, "argv", ["curvlab", *words])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        assert not stop.value.code
        said = capsys.readouterr().out
        assert [name for name in NAMES if f"│ {name} " not in said] == []


# ---- runs


def small(**changed: object) -> Comparison:
    """In earnest but small: 40 examples, two steps an epoch."""
    methods = {"Adam": Method("adam", (1e-4, 1e-4)), "SGD-m": Method("sgd-m", (0.003, 0))}
    extent = Extent(epochs=2, examples=40, tests=20)
    figure = Comparison(
        "figure", "claim", ["MNIST"], methods, 20, cpu=extent, paper=Extent(epochs=1)
    )
    return replace(figure, **changed)  # type: ignore[arg-type]  # any field


def results(figure: Comparison, tmp_path: Path, **options: object) -> tuple[dict[str, Result], str]:
    chosen = Options("cpu", tmp_path / "out", tmp_path / "runs", "cpu", **options)  # type: ignore[arg-type]  # any field
    report = ReproductionReport("figure", chosen)
    return figure.results(report)["MNIST"], "\n".join(report.lines)


@pytest.mark.usefixtures("tiny")
def test_runs_are_shared_and_go_on(tmp_path: Path) -> None:
    first, _ = results(small(), tmp_path)
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("run.h5")}
    assert len(files) == 2
    again, _ = results(small(shows="another figure"), tmp_path)
    assert {path: path.stat().st_mtime_ns for path in files} == files  # taken as they are
    for label, result in first.items():
        assert list(again[label].mean("train_loss")) == list(result.mean("train_loss"))
    longer, _ = results(small(cpu=Extent(epochs=3, examples=40, tests=20)), tmp_path)
    assert list(longer["Adam"].along("epoch")) == [0, 1, 2, 3]
    assert list(longer["Adam"].mean("train_loss")[:3]) == list(first["Adam"].mean("train_loss"))
    assert len(list((tmp_path / "runs").rglob("run.h5"))) == 2
    shorter, _ = results(small(), tmp_path)  # no further than this figure's budget
    assert list(shorter["Adam"].mean("train_loss")) == list(first["Adam"].mean("train_loss"))


@pytest.mark.usefixtures("tiny")
def test_losses_along_the_way_and_kept_runs(tmp_path: Path) -> None:
    """Tables say the loss after some epochs with its spread, of two seeds by hand; kept runs are
    read, and none is trained.
    """
    figure = small(cpu=Extent(epochs=2, examples=40, tests=20, seeds=2, told_after=(1, 2, 9)))
    kept = ProblemRuns(figure, "MNIST", Options("cpu", runs=tmp_path / "runs", device="cpu"))
    with pytest.raises(CurvlabError, match="no finished run of adam with seed 0"):
        kept.result(figure.methods["Adam"], training=False)
    found, said = results(figure, tmp_path)
    of_seeds = [float(run["train_loss"].sel(epoch=1)) for run in found["Adam"].runs]
    mean, half = sum(of_seeds) / 2, abs(of_seeds[0] - of_seeds[1]) / 2
    assert f"{mean:.4g} ± {half:.2g}" == found["Adam"].told("train_loss", 1)
    assert found["Adam"].told("train_loss", 9) == ""
    assert re.search(r"epoch 1 +epoch 2 +epoch 9", said)
    assert f"{mean:.4g} ± {half:.2g}" in said
    again = kept.result(figure.methods["Adam"], training=False)
    assert list(again.mean("train_loss")) == list(found["Adam"].mean("train_loss"))


def test_kept_logs_say_where_they_lie() -> None:
    """Those of the long runs; the documentation's table is made of them."""
    files = sorted((ANALYSES / "logs").rglob("run.h5"))
    assert len(files) == 25  # eight methods, three seeds; one of TNT diverged
    for file in files:
        folder = file.parent.relative_to(ANALYSES.parent).as_posix()
        assert json.loads(open_log(file).attrs["call"])["folder"] == folder


def test_what_decides_the_numbers_decides_the_folder(tmp_path: Path) -> None:
    options = Options("cpu", tmp_path, tmp_path, "cpu")

    def folder(figure: Comparison, method: Method, seed: int = 0) -> Path:
        return ProblemRuns(figure, "MNIST", options).folder(
            method.arguments("MNIST"), method.batch or figure.batch, seed
        )

    adam = Method("adam", (1e-4, 1e-4))
    others = [
        (small(), replace(adam, values=(1e-4, 1e-3)), 0),
        (small(), replace(adam, values=(1e-4, 0.1, 1e-4)), 0),
        (small(), replace(adam, options={"decay": 0.9}), 0),
        (small(), replace(adam, further={"MNIST": {"momentum": 0.99}}), 0),
        (small(), replace(adam, batch=10), 0),
        (small(), adam, 1),
        (small(l2=1e-5), adam, 0),
        (small(cpu=Extent(epochs=2, examples=30, tests=20)), adam, 0),
        (small(cpu=Extent(epochs=2, examples=40, tests=20, evaluated=10)), adam, 0),
    ]
    folders = {folder(*other) for other in others} | {folder(small(), adam)}
    assert len(folders) == len(others) + 1
    usual = {
        "decay": 0.999,
        "momentum": 0.9,
        "weight_decay": 0.0,
        "refresh_every": 1,
    }  # Adam's own anyway
    assert folder(small(), replace(adam, options=usual)) == folder(small(), adam)
    assert folder(small(cpu=Extent(epochs=9, seconds=3, examples=40, tests=20)), adam) == folder(
        small(), adam
    )


@pytest.mark.usefixtures("tiny")
def test_a_seed_that_diverges_is_told_and_the_next_is_tried(tmp_path: Path) -> None:
    figure = small(
        methods={"SGD-m": Method("sgd-m", (3e38, 0)), "Adam": Method("adam", (1e-4, 1e-4))},
        claims=[Claim("Adam is better", ["Adam"], ["SGD-m"])],
    )
    found, said = results(figure, tmp_path)
    assert not found["SGD-m"].runs
    assert len(found["SGD-m"].failures) == 4
    assert "SGD-m, seed 3: diverged in epoch" in said
    assert "MNIST: cannot be said: no run of SGD-m" in said
    assert results(figure, tmp_path)[0]["SGD-m"].failures == found["SGD-m"].failures
    report = ReproductionReport(
        "figure", Options("cpu", tmp_path / "out", tmp_path / "runs", "cpu")
    )
    figure.run(report)
    assert report.file("png").stat().st_size > 5000


def test_data_that_are_not_there_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CURVLAB_DATA", str(tmp_path))
    values = {"MNIST": (1e-4, 1e-4), "webspam": (1e-4, 1e-4)}
    figure = small(problems=["MNIST", "webspam"], methods={"Adam": Method("adam", values)})
    found, said = results(figure, tmp_path)
    assert list(found) == ["Adam"]
    assert re.search(r"^webspam: not run: .*webspam", said, re.MULTILINE)
    with pytest.raises(CurvlabError, match=r"^figure: data file webspam"):
        results(figure, tmp_path, problems=("webspam",))


# ---- what is made of them


def log(losses: list[float], seconds: float = 1.0) -> xr.Dataset:
    n = len(losses)
    time = np.arange(n) * seconds
    columns = {
        "train_loss": losses,
        "val_error": [x / 100 for x in losses],
        "cpu_seconds": time,
        "wall_seconds": time,
    }
    return xr.Dataset(
        {k: ("epoch", np.asarray(v)) for k, v in columns.items()},
        {"epoch": np.arange(n, dtype=float)},
    )


def result(*runs: xr.Dataset) -> Result:
    return Result("adam", "", runs)


def test_means_over_seeds_by_hand() -> None:
    r = result(log([8, 4, 2]), log([8, 2, 4, 1], seconds=3))
    assert list(r.along("epoch")) == [0, 1, 2]
    assert list(r.along("time")) == [0, 2, 4]
    assert list(r.mean("train_loss")) == [8, 3, 3]
    assert list(r.spread("train_loss")) == [0, 1, 1]
    assert r.lowest("train_loss") == 2
    assert r.at("train_loss", "time", 1) == 5.5


def test_a_run_is_cut_where_a_budget_ends() -> None:
    run = log([8, 4, math.nan, 2, 1])
    assert list(cut(run, None, None)["epoch"]) == [0, 1, 3, 4]
    assert list(cut(run, 3, None)["epoch"]) == [0, 1, 3]
    assert list(cut(run, None, 1.0)["epoch"]) == [0, 1]
    assert list(cut(run, None, 1.5)["epoch"]) == [0, 1, 3]  # the epoch in which the time was up


def test_seeds_that_time_has_ended_within_an_epoch_end_together() -> None:
    """Else all that they share is the start."""
    runs = [log([9, 5, 4]), log([9, 3, 2])]
    ends = (1.25, 1.75)
    runs = [run.assign_coords(epoch=[0.0, 1.0, end]) for run, end in zip(runs, ends, strict=True)]
    found = Result("sgd-m", "", tuple(runs))
    assert found.along("epoch").tolist() == [0, 1, 1.5]
    assert found.mean("train_loss").tolist() == [9, 4, 3]
    whole = Result("sgd-m", "", (log([9, 5, 4]), runs[1]))  # one has ended with an epoch
    assert whole.along("epoch").tolist() == [0, 1, 1.875]
    before = log([9, 2]).assign_coords(epoch=[0.0, 0.75])
    around = Result("sgd-m", "", (log([9, 4]), before, runs[0].isel(epoch=[0, 1, 2])))
    assert around.along("epoch").tolist() == [0, 1]
    assert around.mean("train_loss").tolist() == [9, (4 + 2 + 4) / 3]
    later = Result("sgd-m", "", (log([9, 5, 4, 3]), runs[1]))  # more than an epoch later
    assert later.along("epoch").tolist() == [0, 1]


def test_claims_by_hand() -> None:
    """A is ahead in epochs and takes three times as long: B is ahead in time."""
    found = {"A": result(log([9, 3, 1], seconds=3)), "B": result(log([9, 5, 4, 3]))}

    def verdict(by: str, better: str = "A", than: str = "B", **more: float) -> str:
        return Claim("", [better], [than], by, **more).verdict(found)  # type: ignore[arg-type]  # any word

    assert verdict("epoch") == "holds: A 1 against B 4 (training loss at 2 epochs)"
    assert verdict("time") == "does not hold: A 3 against B 3 (training loss at 3 s)".replace(
        "does not hold", "holds"
    )
    found["B"] = result(log([9, 5, 4], seconds=2))
    found["C"] = result(log([9, 1], seconds=3))
    assert verdict("time", "B", "C") == ("does not hold: B 4.5 against C 1 (training loss at 3 s)")
    found["C"] = result(log([9, 1], seconds=8))
    assert verdict("time", "B", "C") == (
        "holds: B 4 against C 5 (training loss at 4 s; of C between the start and the first record)"
    )
    del found["C"]
    found["B"] = result(log([9, 5, 4, 2]))
    assert verdict("time").startswith("does not hold: A 3 against B 2")
    assert verdict("time", within=0.5).startswith("holds")
    assert verdict("time", "B", "A", within=0.5).startswith("holds")
    assert verdict("time", "B", "A", within=0.4, alike=True).startswith(
        "does not hold: B 2 against A 3"
    )
    assert verdict("time", "B", "A", within=0.5, alike=True).startswith("holds")
    assert verdict("lowest", "B", "A") == "does not hold: B 2 against A 1 (lowest training loss)"
    assert verdict("epoch", "A", "C") == "cannot be said: no run of C"
    lines = list(verdicts([Claim("it is", ["A"], ["B"], problems=["one", "two"])], {"one": found}))
    assert lines == [
        "claim: it is",
        "  one: holds: A 1 against B 4 (training loss at 2 epochs)",
        "  two: not run",
    ]


def test_curves_are_told_apart_without_colour() -> None:
    for figure in COMPARISONS.values():
        looks = looks_of({label: method.algorithm for label, method in figure.methods.items()})
        ways = [(look.dashes, look.marker) for look in looks.values()]
        assert len(set(ways)) == len(ways)


def test_a_figure_has_a_column_each_problem() -> None:
    found = {
        "one": {"A": result(log([9, 3, 1]))},
        "two": {"A": result(log([9, 3, 1]), log([9, 2, 1]))},
    }
    figure = training_curves(found, ("train_loss", "val_error"), "title")
    assert len(figure.axes) == 8
    assert [ax.get_xlabel() for ax in figure.axes[::2]] == ["epoch", "process time (s)"] * 2
    assert figure.axes[0].get_yscale() == "log"
    assert figure.axes[4].get_yscale() == "log"
    assert len(training_curves({"one": found["one"]}, ("train_loss",), "title").axes) == 2


@pytest.mark.parametrize(("seconds", "scale"), [(9.0, "linear"), (11.0, "log")])
def test_a_run_that_takes_much_longer_does_not_squeeze_the_others(
    seconds: float, scale: str
) -> None:
    found = {
        name: result(log([9, 3, 1], seconds))
        for name, seconds in (("A", 2.0), ("B", 2.0), ("C", seconds))
    }
    by_epoch, by_time = training_curves({"one": found}, ("train_loss",), "title").axes
    assert by_epoch.get_xscale() == "linear"
    assert by_time.get_xscale() == scale
    if scale == "log":
        assert by_time.get_xlim()[0] > 0


# ---- costs of a step


def of_cifar() -> dict[str, set[tuple[str, str]]]:
    """{network: (label, algorithm)} of all figures of CIFAR-10, by what their scripts say."""
    found: dict[str, set[tuple[str, str]]] = {}
    for name, figure in COMPARISONS.items():
        for problem in figure.problems:
            if problem.endswith("CIFAR-10") and problem != "ConvNet, CIFAR-10":
                methods = figure.methods if name != "kfqn-cnn-figure-3" else {}
                found.setdefault(problem, set()).update(
                    (label, m.algorithm) for label, m in methods.items()
                )
    return found


def test_every_network_and_method_of_the_cifar_figures_has_a_cost(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Values of figures that share a network and a label are one, so that a row is all of them."""
    what, expected = load_script("cifar-cost"), of_cifar()
    assert set(what.problems) == expected.keys()
    assert set(what.methods) == {label for each in expected.values() for label, _ in each}
    made = runpy.run_path(str(scripts()["cifar-cost"]), run_name="cifar_cost")["FIGURES"]
    for problem, figure in made.items():
        methods = figure.methods.items()
        assert {(label, m.algorithm) for label, m in methods} == expected[problem]
        for other in COMPARISONS.values():
            if problem in other.problems and "λ = 30" not in other.methods:
                for label, m in other.methods.items():
                    assert m.arguments(problem) == figure.methods[label].arguments(problem)
                    assert (m.batch or other.batch, other.l2) == (figure.batch, figure.l2)
    chosen = Options("smoke", tmp_path, device="cpu", problems=("All-CNN-C, CIFAR-10",))
    said = reproduce(what, "cifar-cost", chosen).lines
    labels = [line.split()[0] for line in said if line.startswith("  ")]
    assert labels == list(made["All-CNN-C, CIFAR-10"].methods)


def test_seconds_in_the_long_run_by_hand() -> None:
    """A plain step takes 2, folding in and learning 5 more, a refresh 40."""
    every = Cadence(update_every=10, refresh_every=100)
    assert long_run([99, 2, 2, 2], 40, 47, every) == pytest.approx(2 + 5 / 10 + 40 / 100)
    ten = [99, *[2] * 8, 47]  # the tenth folds in, and refreshes within the first T₂
    assert long_run(ten, 40, 47, every) == pytest.approx(2.9)
    always = Cadence(refresh_every=20)  # T₁ = 1: each of the first T₂ refreshes
    assert long_run([99, 47, 47], 40, 47, always) == pytest.approx(7 + 40 / 20)
    assert long_run([99, 3, 3], 0, 9, Cadence()) == 3


@pytest.mark.usefixtures("tiny")
def test_a_cost_is_kept_and_what_diverges_has_a_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figure, options = small(), Options("cpu", tmp_path / "out", tmp_path / "runs", "cpu")
    costs, adam = StepCosts(figure, "MNIST", options), figure.methods["Adam"]
    found = costs.of_method(adam)
    assert (found.steps, found.times, found.why) == (2, 2, "")  # second moments, inverse roots
    assert found.held == 2 * 4 * costs.parameters
    assert 0 < found.after < found.before
    again = costs.measured(adam)
    same = ("before", "after", "first", "last", "held")
    assert [getattr(again, name) for name in same] == [getattr(found, name) for name in same]
    monkeypatch.setattr(StepCosts, "measured", None)
    assert StepCosts(figure, "MNIST", options).of_method(adam) == found
    monkeypatch.undo()
    wild = costs.measured(Method("sgd-m", (3e38, 0)))
    assert re.match(r"diverged after [012] steps: ", wild.why)
    assert math.isnan(wild.long_run)
    refused = costs.measured(Method("smw-gn", (1.0, -1.0)))
    assert refused.why.startswith("refused after 0 steps: ")
    assert refused.steps == 0


# ---- complexity


def test_exponents_by_hand() -> None:
    sizes = [1, 2, 4, 8, 16]
    assert exponent(sizes, [7 * s**3 for s in sizes]) == pytest.approx(3)
    assert exponent(sizes, [100, math.nan, 1, 2, 4]) == pytest.approx(1)
    assert math.isnan(exponent(sizes, [math.nan] * 4 + [1]))


def test_what_is_held_is_the_table_of_memory(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of Table 2.1, numbers of one layer counted: K-BFGS's H_a and H_g, A, s and y; 2 p d_o of
    L-BFGS.
    """
    scaling = load_script("table-2.2")
    assert isinstance(scaling, Scaling)
    options = Options("smoke", tmp_path, device="cpu")
    sizes = SimpleNamespace(d_i=6, d_o=4, m=8, p=3, T=1)
    held = {label: scaling._step(row, sizes, options)[1] for label, row in scaling.rows.items()}
    inputs, outputs = 7**2, 4**2
    assert inputs * 2 + outputs <= held["K-BFGS"] <= inputs * 2 + outputs + 4 * (6 + 1 + 4)
    assert held["KFAC"] >= 2 * (inputs + outputs)
    assert 7 * 4 <= held["Adam"] <= 2 * 7 * 4 + 2
    further = scaling._step(
        scaling.rows["K-BFGS(L)"], SimpleNamespace(**vars(sizes) | {"p": 5}), options
    )[1]
    assert further - held["K-BFGS(L)"] == 2 * 2 * 4  # two pairs more, s and y of d_o numbers each


def test_a_quantity_that_is_not_asked_for_is_not_drawn(tmp_path: Path) -> None:
    row = Row("adam", lambda s: s.d**2, lambda s: s.d**2)
    scaling = Scaling(
        "table",
        "claim",
        lambda s: (nn.Linear(s.d, s.d), (s.d,)),
        {"m": 4},
        [Axis("d", [4, 8, 16])],
        {"Adam": row},
        quantities=["memory"],
        repeats=1,
    )
    report = reproduce(scaling, "table", Options("cpu", tmp_path, device="cpu"))
    assert "seconds a step" not in "\n".join(report.lines)
    assert re.search(r"^Adam +1\.[5-9]\d \(2\.00\)$", "\n".join(report.lines), re.MULTILINE)
    other = replace(scaling, rows={"Adam": row, "SGD-m": replace(row, algorithm="sgd-m")})
    chosen = reproduce(other, "table", Options("smoke", tmp_path, device="cpu", methods=("Adam",)))
    assert [line.split()[0] for line in chosen.lines if line.startswith(("Adam", "SGD"))] == [
        "Adam"
    ]
    assert list(tensors({"a": [1, {"b": ()}]})) == []
