"""`curvlab sweep`: points and their folders, rows for whatever happens to a point, the same bits
however often workers and the command are killed.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from test_cli import call

import curvlab as cl
from curvlab.cli import sweep_options
from curvlab.cli.point import work
from curvlab.cli.sweep_options import Asked
from curvlab.cli.sweeping import swept
from curvlab.cli.terminal import err
from curvlab.logs import swept as reading
from curvlab.show import tables
from curvlab.sweeps import engine, standing
from curvlab.sweeps.documents import DOCUMENT_GRIDS
from curvlab.sweeps.engine import Inline
from curvlab.sweeps.points import Outcome, Task
from curvlab.sweeps.walk import SweepRun

OWN = '''
import os
import signal
import time

import torch
from torch import nn

from curvlab.datasets import DATASETS, DataEntry, Dataset


def load():
    chance = torch.Generator().manual_seed(0)
    x, y = torch.randn(48, 4, generator=chance), torch.randint(3, (48,), generator=chance)
    part = Dataset("dots", x, y, "random numbers")
    return part, part


DATASETS["dots"] = DataEntry("random numbers", load, "made")


class Slow(nn.Linear):
    def forward(self, x):
        time.sleep(0.02)
        return super().forward(x)


def dots():
    return nn.Linear(4, 3), "categorical", "dots"


def deep():
    return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)), "categorical", "dots"


def slow():
    return Slow(4, 3), "categorical", "dots"


def kills():
    os.kill(os.getpid(), signal.SIGKILL)


def fails():
    return 1 / 0


def forks():
    """A child process in a worker, as a DataLoader has."""
    import multiprocessing

    child = multiprocessing.get_context("spawn").Process(target=os.getpid)
    child.start()
    child.join()
    assert child.exitcode == 0
    return dots()
'''

DOTS = ("--batch-size", "16", "--epochs", "2", "--device", "cpu")


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The working directory, with a module of the user's in it."""
    folder = tmp_path_factory.mktemp("sweep")
    (folder / "sweepable.py").write_text(OWN)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield folder
    sys.modules.pop("sweepable", None)
    cl.datasets.DATASETS.pop("dots", None)


def inline(
    folder: Path,
    *words: str,
    model: str = "sweepable:dots",
    done: Callable[[Task], Outcome] = work,
    page: bool = False,
    **asked: Any,
) -> tuple[SweepRun, list[str]]:
    """A sweep in this process, and the lines that it says."""
    said: list[str] = []
    threads = torch.get_num_threads()
    given = Asked("train", ["--model", model, *DOTS, *words], **({"threads": 1} | asked))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sweep_options, "cores", lambda: 2)
        patch.setattr("curvlab.cli.sweeping.work", done)
        if not page:
            patch.setattr("curvlab.cli.sweeping.report", lambda *_, **__: None)
        run = swept(given, folder, None, err, False, said.append, Inline())
    torch.set_num_threads(threads)
    return run, said


LR = ("lr=0.1,0.01", "damping=1,0.1")
EIGHT: dict[str, Any] = {"grid": LR, "algorithms": ("kfac", "sgd-m"), "seed": 1}


@pytest.fixture(scope="module")
def whole(here: Path) -> SweepRun:
    return inline(here / "whole", page=True, **EIGHT)[0]


# ---- points and result


def test_the_result_is_one_data_set_and_every_point_a_log(here: Path, whole: SweepRun) -> None:
    ds = cl.open(here / "whole")
    xr.testing.assert_identical(ds, whole.dataset)
    assert dict(ds.sizes) == {
        "algorithm": 2, "lr": 2, "damping": 2, "seed": 1, "epoch": 3,
    }  # fmt: skip
    assert ds["train_loss"].dims == ("algorithm", "lr", "damping", "seed", "epoch")
    assert ds["lr"].values.tolist() == [0.01, 0.1]
    for row in reading.rows(ds):
        log = cl.open(here / "whole" / "points" / row["name"])
        place = {k: v for k, v in row["place"].items() if k != "epoch"}
        assert ds["train_loss"].sel(place).values.tolist() == log["train_loss"].values.tolist()
        assert float(ds["score"].sel(place)) == float(log["train_loss"].min())
        assert log.attrs["threads"] == 1
    assert not [name for name in ds.data_vars if str(name).endswith("_seconds")]
    times = xr.open_dataset(here / "whole" / "run.h5", engine="h5netcdf", group="times")
    assert float(times["wall_seconds"].min()) > 0
    assert "created" not in ds.attrs


def test_a_point_is_the_command_by_hand(here: Path, whole: SweepRun) -> None:
    """Same numbers, same attributes: those of its call, which can be typed."""
    name = "kfac_lr-0.01_damping-0.1_seed-1"
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    words = ["--model", "sweepable:dots", *DOTS, "--algorithm", "kfac", "--lr", "0.01"]
    assert call("train", *words, "--damping", "0.1", "--seed", "1", "--out", "by-hand") == 0
    torch.set_num_threads(before)
    point, hand = cl.open(here / "whole" / "points" / name), cl.open(here / "by-hand")
    for variable in hand.data_vars:
        if not str(variable).endswith("_seconds"):
            assert hand[variable].identical(point[variable]), variable
    assert hand.attrs.keys() == point.attrs.keys()
    for key in hand.attrs.keys() - {"created", "call"}:
        assert hand.attrs[key] == point.attrs[key], key
    calls = [json.loads(ds.attrs["call"]) for ds in (hand, point)]
    assert [call.pop("out") for call in calls].index("by-hand") == 0
    assert calls[0] == calls[1]


def test_done_points_are_not_run_again_and_the_rest_goes_on(here: Path, whole: SweepRun) -> None:
    """Logs that are gone, cut short, damaged, or of a run that has a checkpoint to go on from."""
    folder = here / "again"
    shutil.copytree(here / "whole", folder)
    points = sorted((folder / "points").iterdir())
    (points[0] / "run.h5").unlink()
    (points[0] / "checkpoint.pt").unlink()
    (points[1] / "run.h5").write_bytes((points[1] / "run.h5").read_bytes()[:-90])
    (points[2] / "checkpoint.pt").unlink()
    (points[2] / "run.h5").write_bytes(b"")
    begun: list[str] = []

    def seen(task: Task) -> Outcome:
        begun.append(Path(task.folder).name)
        return work(task)

    again, said = inline(folder, done=seen, **EIGHT)
    assert sorted(begun) == [p.name for p in points[:3]]
    assert said[0] == "5 of 8 points are done already"
    xr.testing.assert_identical(again.dataset, whole.dataset)


def test_what_happens_to_a_point_is_a_row(here: Path) -> None:
    """It fails by code of the user's, diverges, or has killed its workers; the others go on."""
    deep: dict[str, Any] = {"grid": ("lr=1e15,0.1",), "algorithms": ("sgd-m",)}
    run, _ = inline(here / "diverges", model="sweepable:deep", **deep)
    rows = {row["place"]["lr"]: row for row in reading.rows(run.dataset)}
    assert (rows[0.1]["state"], rows[1e15]["state"]) == ("done", "diverged")
    assert "sgd-m" in rows[1e15]["reason"] or "loss" in rows[1e15]["reason"]
    assert np.isnan(float(run.dataset["score"].sel(lr=1e15).squeeze()))
    run, _ = inline(here / "fails", model="sweepable:fails", grid=("lr=1,0.1",))
    assert {row["state"] for row in reading.rows(run.dataset)} == {"failed"}
    assert "division by zero" in reading.rows(run.dataset)[0]["reason"]
    assert run.best() == []

    def dies(task: Task) -> Outcome:
        folder = Path(task.folder)
        if "lr-0.1_" not in folder.name:
            return work(task)
        folder.mkdir(parents=True, exist_ok=True)
        for _ in range(standing.ATTEMPTS):  # as often as its worker has died
            assert standing.attempts(folder, task.start) < standing.ATTEMPTS
            standing.begin_attempt(folder, task.start)
        return work(task)

    run, _ = inline(here / "killed", done=dies, grid=("lr=1,0.1",))
    rows = {row["place"]["lr"]: row for row in reading.rows(run.dataset)}
    assert rows[1.0]["state"] == "done"
    assert rows[0.1] | {"reason": standing.KILLED, "state": "killed"} == rows[0.1]
    again, _ = inline(here / "killed", grid=("lr=1,0.1",))
    assert [row["state"] for row in reading.rows(again.dataset)] == ["done", "done"]


def test_a_log_comes_with_its_outcome_or_by_its_file(
    here: Path, whole: SweepRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same result; what is sent is what the file says; what failed is looked up."""
    folder = here / "sent"
    shutil.copytree(here / "whole", folder)
    points = sorted((folder / "points").iterdir())
    read: list[Path] = []
    finished = standing.finished

    def seen(place: Path) -> Any:
        read.append(place)
        return finished(place)

    monkeypatch.setattr("curvlab.sweeps.walk.standing.finished", seen)
    for sent in (True, False):
        monkeypatch.setattr("curvlab.cli.point.SENT", 1 << 20 if sent else 0)
        for point in points[:2]:
            shutil.rmtree(point)
        read.clear()
        run, _ = inline(folder, **EIGHT)
        assert [read.count(p) for p in points] == [*[3 if sent else 4] * 2, *[1] * 6]
        xr.testing.assert_identical(run.dataset, whole.dataset)
        assert all(outcome.log is None for outcome in run.outcomes.values())
    task = Task((), str(points[0]), 1, "again", ".")
    outcome = work(task)
    assert outcome == Outcome("done")
    assert outcome.log is None
    monkeypatch.setattr("curvlab.cli.point.SENT", 1 << 20)
    found = finished(points[0])
    assert found is not None
    xr.testing.assert_identical(work(task).log, found[1])


def test_ctrl_c_keeps_what_is_done(here: Path, whole: SweepRun) -> None:
    folder = here / "stopped"
    shutil.copytree(here / "whole", folder)
    points = sorted((folder / "points").iterdir())
    for point in points[:4]:
        shutil.rmtree(point)

    def ends(task: Task) -> Outcome:
        if Path(task.folder) == points[2]:
            raise KeyboardInterrupt
        return work(task)

    with pytest.raises(KeyboardInterrupt):
        inline(folder, done=ends, **EIGHT)
    so_far = cl.open(folder)
    states = {row["name"]: row["state"] for row in reading.rows(so_far)}
    left = [name for name, state in states.items() if state == "not run yet"]
    assert 1 <= len(left) <= 4
    assert int((so_far["state"] == 1).sum()) == 8 - len(left)
    run, said = inline(folder, **EIGHT)
    assert said[0] == f"{8 - len(left)} of 8 points are done already"
    xr.testing.assert_identical(run.dataset, whole.dataset)


def test_a_point_that_another_worker_holds_is_waited_for(tmp_path: Path) -> None:
    from threading import Timer

    from curvlab.system.lock import exclusive_lock

    held = exclusive_lock(tmp_path / "point")
    held.__enter__()
    Timer(0.3, lambda: held.__exit__(None, None, None)).start()
    begun = time.monotonic()
    with standing.alone(tmp_path, period=0.01):
        assert time.monotonic() - begun > 0.25


def test_comparisons(here: Path) -> None:
    words = ["--model", "sweepable:dots", "--batch-size", "16", "--steps", "4", "--device", "cpu"]
    words += ["--reference", "kfac", "--algorithms", "adam,block-ef"]
    asked = Asked("compare", words, ("damping=0.1,0.01",), seeds=2, threads=1)
    threads = torch.get_num_threads()
    run = swept(asked, here / "compared", None, err, False, lambda line: None, Inline())
    torch.set_num_threads(threads)
    ds = run.dataset
    assert ds["cosine"].dims == ("algorithm", "lr", "damping", "seed", "step", "block")
    assert ds["algorithm"].values.tolist() == ["kfac", "adam", "block-ef"]
    log = cl.open(here / "compared" / "points" / "damping-0.1_seed-1")
    late = cl.late_cosine(log).mean("block")
    found = ds["score"].sel(damping=0.1, seed=1).squeeze("lr", drop=True)
    assert found.values.tolist() == late.values.tolist()
    best = {b.algorithm: b for b in reading.best_places(ds)}
    mean = ds["score"].mean("seed").sel(algorithm="adam").squeeze("lr")
    assert best["adam"].place["damping"] == float(mean.idxmax())


# ---- grids


def test_a_documents_grid_is_the_documents() -> None:
    grid = DOCUMENT_GRIDS["thesis-table-2.5"]
    assert list(grid.axes) == ["k-bfgs-20", "k-bfgs-l-20", "kfac-20", "adam", "rmsprop", "sgd-m"]
    asked = Asked("train", ["--model", "mnist-ae", "--seconds", "500"], ("thesis-table-2.5",))
    settings, _ = asked.settings()
    assert settings.best == "train_loss"
    assert len(settings.points()) == 13 * (7 + 7 + 7 + 7 + 7) + 13
    named = {p.name: p for p in settings.points()}
    point = named["k-bfgs-20_lr-0.3_damping-0.3_seed-0"]
    assert point.words[-8:] == (
        "--algorithm", "k-bfgs-20", "--lr", "0.3", "--damping", "0.3", "--seed", "0",
    )  # fmt: skip
    some = Asked(
        "train", ["--model", "vgg16"], ("thesis-table-3.7", "weight_decay=0.1"), ("adam", "kfac")
    )
    settings, _ = some.settings()
    assert settings.best == "val_error"
    assert settings.axes == ["lr", "damping", "weight_decay"]
    assert len(settings.points()) == 8 * 5 + 6 * 7


def test_the_best_values_of_the_tables_lie_on_their_grids() -> None:
    """Tables 2.5, 4.3 and 4.4 of the thesis, Table 3 of 2021, as far as their grids reach."""
    tables_of: dict[str, dict[str, list[tuple[float, float]]]] = {
        "thesis-table-2.5": {
            "k-bfgs-20": [(0.3, 0.3), (0.1, 0.1), (0.1, 0.01)],
            "kfac-20": [(1, 3), (0.1, 0.1), (0.3, 0.3)],
            "adam": [(1e-4, 1e-4), (1e-3, 1e-3)],
        },
        "thesis-table-4.4": {"adam": [(0.003, 0.1), (0.003, 0.01), (3e-4, 0.01)]},
        "2021-table-3": {
            "kf-bfgs-cnn": [(30, 30), (30, 100), (100, 100)],
            "kfac-20": [(100, 30), (1000, 100), (1, 0.3)],
            "adam": [(1e-4, 1e-8), (1e-3, 0.01)],
        },
    }
    for name, found in tables_of.items():
        for algorithm, best in found.items():
            axes = DOCUMENT_GRIDS[name].axes[algorithm]
            assert all(lr in axes["lr"] and d in axes["damping"] for lr, d in best)


def test_an_algorithms_own_option_and_words_are_axes(here: Path) -> None:
    asked = Asked(
        "train",
        ["--model", "sweepable:dots"],
        {"sharing": ["expand", "reduce"], "warm_start": [True, False], "lr": [1, 0.1]},
        ("kfac",),
    )
    settings, _ = asked.settings()
    assert settings.axes == ["lr", "damping", "sharing", "warm_start"]
    words = settings.points()[2].words
    assert words[words.index("--set") + 1] == "sharing=expand"
    assert "--no-warm-start" in words


# ---- bad input: one line, before anything is written

BAD: dict[str, tuple[Sequence[str], str]] = {
    "no option": (["--grid", "learning=1,2"], "unknown option of a grid 'learning'"),
    "close": (["--grid", "dampin=1,2"], "did you mean 'damping'"),
    "no grid of a document": (["--grid", "thesis-table-9"], "unknown grid of a document"),
    "empty": (["--grid", "lr="], "the grid of lr is empty or has an empty value"),
    "nothing": ([], "the grid is empty, the sweep has one point"),
    "an empty value": (["--grid", "lr=1,,2"], "the grid of lr is empty or has an empty value"),
    "repeated": (["--grid", "lr=0.001,1e-3"], "the grid of lr has the value 0.001 twice"),
    "given twice": (["--grid", "lr=1,2", "--grid", "lr=3"], "the grid of lr is given twice"),
    "one folder": (["--grid", "lr=0.1234567,0.12345674"], "would share the folder 'lr-0.123457'"),
    "kinds": (["--grid", "lr=1,fast"], "the values of lr are of several kinds"),
    "no number": (["--grid", "lr=slow,fast"], "Invalid value for '--lr'"),
    "out of range": (["--grid", "lr=1,-1"], "the learning rate must be 0 or positive, not -1"),
    "algorithm": (["--grid", "lr=1,2", "--algorithms", "kfack"], "did you mean 'kfac'"),
    "algorithm twice": (["--grid", "lr=1,2", "--algorithms", "kfac,kfac"], "is given twice"),
    "not of the document": (
        ["--grid", "thesis-table-2.5", "--algorithms", "muon"],
        "the grid of thesis 2.8.2 has no 'muon'",
    ),
    "an option too": (["--grid", "lr=1,2", "--lr", "3"], "lr is on the grid and an option"),
    "option": (["--grid", "lr=1,2", "--epoch", "3"], "No such option: --epoch"),
    "resume": (["--grid", "lr=1,2", "--resume"], "a sweep takes no --resume"),
    "score": (["--grid", "lr=1,2", "--best", "loss"], "unknown score 'loss'"),
    "seeds": (["--grid", "lr=1,2", "--seeds", "0"], "seeds must be 1 or more"),
    "workers": (["--grid", "lr=1,2", "--workers", "0"], "workers must be 1 or more"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words, says = BAD[what]
    monkeypatch.chdir(tmp_path)
    assert call("sweep", "train", *words, "--model", "mlp-256-20", "--out", "out") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    assert says in error
    assert list(tmp_path.iterdir()) == []


def test_other_commands_and_models(capsys: pytest.CaptureFixture[str]) -> None:
    for words, says in (
        (["spectrum", "--grid", "lr=1,2", "--model", "mlp-256-20"], "unknown command of a sweep"),
        (["train", "--grid", "lr=1,2", "--model", "mlp-256-21"], "did you mean 'mlp-256-20'"),
        (["train", "--grid", "lr=1,2"], "Missing option '--model'"),
        (["--model", "mlp-256-21", "--grid", "lr=1,2"], "did you mean 'mlp-256-20'"),  # of train
        (["compare", "--grid", "thesis-table-2.5", "--model", "mlp-256-20"], "is of training"),
        (["compare", "--grid", "damping=1,2", "--algorithms", "kfack", "--model", "mlp-256-20"],
         "did you mean 'kfac'"),
    ):  # fmt: skip
        assert call("sweep", *words) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1, error
        assert says in error


def test_a_folder_of_another_sweep_or_run_is_refused(here: Path, whole: SweepRun) -> None:
    with pytest.raises(cl.CurvlabError, match=r"holds another sweep \(seeds \[1\], not \[1, 2\]\)"):
        inline(here / "whole", **(EIGHT | {"seeds": 2}))
    with pytest.raises(cl.CurvlabError, match=r"holds another sweep \(words"):
        inline(here / "whole", "--l2", "0.1", **EIGHT)
    with pytest.raises(cl.CurvlabError, match=r"holds another sweep \(grids"):
        inline(here / "whole", **(EIGHT | {"grid": ("lr=0.1,0.02", "damping=1,0.1")}))
    point = whole.best()[0]
    with pytest.raises(cl.CurvlabError, match=r"already holds a run that is no sweep"):
        inline(point, **EIGHT)
    sweep = here / "damaged"
    sweep.mkdir()
    (sweep / "sweep.json").write_text("{")
    with pytest.raises(cl.CurvlabError, match=r"sweep\.json is damaged"):
        inline(sweep, **EIGHT)


def test_without_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "distributed", None)
    words = ["--grid", "lr=1,2", "--model", "mlp-256-20", "--out", str(tmp_path / "out")]
    for more in ([], ["--scheduler", "127.0.0.1:1"]):
        assert call("sweep", "train", *words, *more) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert "pip install 'curvlab[sweep]'" in error
    assert not (tmp_path / "out").exists()


# ---- what is shown


def test_tables_figure_and_page(here: Path, whole: SweepRun) -> None:
    best, ended = tables.own(whole.dataset)
    assert best.columns == ("algorithm", "lr", "damping", "score (nat)", "at the grid's edge")
    assert [row[0] for row in best.rows] == ["kfac", "sgd-m"]
    assert ended.rows == (("8 of 8", "done", ""),)
    drawn = whole.figure()
    assert [ax.get_title().partition(":")[0] for ax in drawn.axes[:2]] == ["kfac", "sgd-m"]
    text = (here / "whole" / "report.html").read_text()
    assert "curvlab sweep train" in text
    assert "Landscape of sweepable:dots on dots" in text or "Figure 2.3" in text
    assert text.count("curvlab train") >= 2, "the calls of the best points"


@pytest.mark.parametrize(
    "grid", [{"lr": [1, 0.1, 0.01]}, {"l2": [0.1, 0.01]}, {"schedule": ["constant", "cosine"]}, {}]
)
def test_the_landscape_of_one_axis_are_lines(
    here: Path, tmp_path: Path, grid: Mapping[str, Any]
) -> None:
    def quick(task: Task) -> Outcome:
        return Outcome("failed", "not run")

    run, _ = inline(tmp_path / "out", done=quick, grid=grid, algorithms=("adam", "sgd-m"))
    assert len(run.figure().axes) == 1


# ---- dask


def command(*words: str, folder: Path, **options: Any) -> subprocess.Popen[str]:
    path = os.pathsep.join([str(Path(cl.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [sys.executable, "-m", "curvlab", "sweep", "train", *words],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": path.rstrip(os.pathsep)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def ended(process: subprocess.Popen[str], code: int = 0) -> str:
    out, error = process.communicate(timeout=400)
    assert process.returncode == code, (out, error)
    return error


@pytest.mark.slow
def test_a_worker_of_this_machine_gives_the_same_bits(here: Path, whole: SweepRun) -> None:
    """By `curvlab.sweep`: as in one process; the worker finds the user's module, and may fork."""
    run = cl.sweep(
        grid={"lr": [0.1, 0.01], "damping": [1, 0.1]},
        algorithms="kfac,sgd-m",
        seed=1,
        folder=here / "dask",
        workers=1,
        threads=1,
        progress=False,
        model="sweepable:dots",
        batch_size=16,
        epochs=2,
        device="cpu",
    )
    assert dict(run.outcomes) == dict.fromkeys(whole.outcomes, Outcome("done"))
    xr.testing.assert_identical(run.dataset.drop_attrs(), whole.dataset.drop_attrs())


@pytest.mark.slow
def test_a_point_that_kills_its_worker_is_a_row(here: Path) -> None:
    words = ["--model", "sweepable:kills", "--grid", "lr=1,2", "--workers", "2", "--out", "dead"]
    said = ended(command(*words, folder=here), 1)
    assert "Traceback" not in said
    rows = reading.rows(cl.open(here / "dead"))
    assert [(r["state"], r["reason"]) for r in rows] == [("killed", standing.KILLED)] * 2


@pytest.mark.slow
def test_a_worker_may_have_children(here: Path) -> None:
    words = ["--model", "sweepable:forks", *DOTS, "--grid", "lr=1,2", "--workers", "1"]
    assert "2/2" in ended(command(*words, "--out", "forks", folder=here))
    assert set(cl.open(here / "forks")["state"].values.flat) == {1.0}


def test_nothing_answers_at_the_address(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert engine.CONNECT < 10, "seconds"
    monkeypatch.setattr(engine, "CONNECT", 1.0)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    begun = time.monotonic()
    with (
        pytest.raises(cl.CurvlabError, match=f"no scheduler answers at {address}"),
        engine._existing(engine.distributed_module(), address, print),
    ):
        pass
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        with (
            pytest.raises(cl.CurvlabError, match=f"no scheduler answers at {address}"),
            engine._existing(engine.distributed_module(), address, print),
        ):
            pass
    assert time.monotonic() - begun < 10


def test_an_engine_that_cannot_begin_leaves_nothing(here: Path) -> None:
    def gone(task: Task) -> Outcome:
        raise cl.CurvlabError("no scheduler answers")

    with pytest.raises(cl.CurvlabError, match="no scheduler answers"):
        inline(here / "nothing", done=gone, **EIGHT)
    assert not (here / "nothing").exists()


def test_the_quick_reader_reads_what_open_reads(here: Path, whole: SweepRun) -> None:
    from curvlab.logs.reading import open_quickly

    for place in (whole.best()[0], whole.folder):
        slow, quick = cl.open(place), open_quickly(place / "run.h5")
        assert slow.attrs == quick.attrs
        assert set(slow.variables) == set(quick.variables)
        assert all(slow[name].variable.equals(quick[name].variable) for name in slow.variables)
    damaged = here / "damaged.h5"
    damaged.write_bytes((whole.folder / "run.h5").read_bytes()[:-90])
    with pytest.raises(
        cl.CurvlabError, match=r"is not as this version of curvlab wrote it|cannot be read"
    ):
        open_quickly(damaged)


# ---- killed half-way


def workers_of(process: int) -> list[int]:
    """The workers of a process, by what the system says: new processes, or forks of its server."""
    found = []
    for child, words in children_of(process):
        if "spawn_main" in words:
            found.append(child)
        elif "forkserver" in words:
            found += [worker for worker, _ in children_of(child)]
    return found


def children_of(process: int) -> list[tuple[int, str]]:
    found = []
    for folder in Path("/proc").iterdir():
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == process:
                found.append((int(folder.name), (folder / "cmdline").read_text()))
        except (OSError, ValueError, IndexError):
            continue
    return found


def done_in(folder: Path) -> int:
    return sum(standing.finished(point) is not None for point in folder.glob("points/*"))


def until(true: Callable[[], bool], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.05)


TWENTY_FOUR = [
    *("--model", "sweepable:slow", *DOTS, "--epochs", "4", "--algorithms", "kfac,sgd-m"),
    *("--grid", "lr=0.1,0.03,0.01", "--grid", "damping=1,0.1", "--seeds", "2", "--threads", "1"),
]


@pytest.mark.slow
@pytest.mark.parametrize("by_hand", [False, True])
def test_killed_workers_and_a_killed_command_change_no_bit(here: Path, by_hand: bool) -> None:
    """24 points; one worker is killed half-way, then the whole command, which is started again."""
    name = "hand" if by_hand else "own"
    started: list[subprocess.Popen[str]] = []
    where = ["--workers", "2"]
    try:
        if by_hand:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            dask = [sys.executable, "-m", "dask"]
            address = f"127.0.0.1:{port}"
            environment = os.environ | {"PYTHONPATH": str(Path(cl.__file__).parents[1])}
            for words in (
                ["scheduler", "--host", "127.0.0.1", "--port", str(port), "--no-dashboard"],
                *[["worker", address, "--nthreads", "1", "--no-dashboard"]] * 2,
            ):
                quiet: Any = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
                started.append(subprocess.Popen([*dask, *words], env=environment, **quiet))
            where = ["--scheduler", address]
        undisturbed, disturbed = here / f"{name}-undisturbed", here / f"{name}-disturbed"
        assert "24/24" in ended(
            command(*TWENTY_FOUR, *where, "--out", undisturbed.name, folder=here)
        )
        first = command(*TWENTY_FOUR, *where, "--out", disturbed.name, folder=here)
        until(lambda: done_in(disturbed) >= 6)
        victims = workers_of(started[1].pid if by_hand else first.pid)
        os.kill(victims[0], signal.SIGKILL)
        until(lambda: done_in(disturbed) >= 12)
        first.kill()
        first.communicate()
        assert 12 <= done_in(disturbed) < 24
        said = ended(command(*TWENTY_FOUR, *where, "--out", disturbed.name, folder=here))
        assert re.match(r"1\d of 24 points are done already", said)
    finally:
        for process in reversed(started):
            process.terminate()
            process.wait(20)
    xr.testing.assert_identical(cl.open(undisturbed), cl.open(disturbed))
