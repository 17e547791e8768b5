"""The command line: the main job in small, lists, plots, and one clear line for bad input."""

from __future__ import annotations

import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
import weakref
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from matplotlib.image import imread
from problems import assert_drawn
from torch import nn

import curvlab as cl
from curvlab import datasets, machine
from curvlab.algorithms import ALGORITHMS
from curvlab.cli import app as cli
from curvlab.cli import terminal
from curvlab.datasets import DATASETS, DataEntry, Dataset
from curvlab.models import MODELS
from curvlab.probes import PROBES
from curvlab.show.figures import FIGURES, draw
from curvlab.show.tables import Table
from curvlab.system.interrupt import listening

SMALL = [
    "compare",
    "--model",
    "mlp-256-20",
    "--reference",
    "kfac",
    "--batch-size",
    "20000",
    "--steps",
    "3",
]


def call(*words: str) -> int:
    """Run the command line in this process; its exit code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["curvlab", *words])
        with pytest.raises(SystemExit) as caught:
            cli.main()
    return int(caught.value.code or 0)


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """Run what must be refused: exit code 2, nothing on standard output, one line on standard
    error, which is returned.
    """
    capsys.readouterr()
    assert call(*words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    lines = [line for line in err.splitlines() if line.strip()]
    assert len(lines) == 1, err
    assert lines[0].startswith("curvlab: ")
    return lines[0]


def ends_at_once(words: list[str], out: Path) -> None:
    """A process of its own that Ctrl-C ends after its first record: its code, its line, its log."""
    command = [sys.executable, "-m", "curvlab", *words, "--out", str(out)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not (out / "run.h5").exists():
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGINT)
    start = time.monotonic()
    _, err = process.communicate(timeout=30)
    assert time.monotonic() - start < 10
    assert process.returncode == 130
    assert f"interrupted; the log so far is saved in {out / 'run.h5'}" in err
    assert "Traceback" not in err
    assert len(cl.open(out)["step"]) >= 1


blank = pytest.mark.usefixtures("blank_pictures")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("small") / "run"
    assert call(*SMALL, "--algorithms", "tnt, sgd-m", "--seed", "4", "--out", str(out)) == 0
    return out


def test_compare_writes_log_and_figures(folder: Path) -> None:
    assert sorted(p.name for p in folder.iterdir()) == ["cosine.png", "cosine.svg", "run.h5"]
    assert min(imread(folder / "cosine.png").shape[:2]) > 500
    assert (folder / "cosine.svg").read_text().startswith("<?xml")


def test_the_log_has_the_promised_schema(folder: Path) -> None:
    with xr.open_dataset(folder / "run.h5", engine="h5netcdf") as ds:
        assert dict(ds.sizes) == {"step": 3, "algorithm": 3, "other": 3, "block": 6}
        assert (
            ds["algorithm"].values.tolist()
            == ds["other"].values.tolist()
            == ["kfac", "tnt", "sgd-m"]
        )
        assert ds["block"].values.tolist() == list("123456")
        assert ds["parameters"].values[0] == "0.weight 0.bias"
        dims = {name: v.dims for name, v in ds.data_vars.items()}
        assert dims == {
            "cosine": ("step", "algorithm", "block"),
            "cosine_all": ("step", "algorithm"),
            "gram": ("step", "algorithm", "other", "block"),
            "loss": ("step",),
            "step_length": ("step",),
            "direction_norm": ("step", "algorithm", "block"),
            "minibatch_gradient_norm": ("step", "block"),
            "weight_norm": ("step", "block"),
            "seconds": ("step", "algorithm"),
            "damping_of_direction": ("step", "algorithm"),
            "shift": ("step", "algorithm", "block"),
        }
        assert all({"long_name", "units"} <= v.attrs.keys() for v in ds.variables.values())
        assert all(np.isfinite(v).all() for v in ds.data_vars.values())
        given = json.loads(ds.attrs["call"])
        assert (given["model"], given["steps"], given["algorithms"]) == (
            "mlp-256-20",
            3,
            "tnt, sgd-m",
        )
        assert (ds.attrs["seed"], ds.attrs["device"], ds.attrs["dtype"]) == (4, "cpu", "float32")
        assert json.loads(ds.attrs["dampings"]) == {
            "kfac": 1e-3,
            "tnt": (1e-3 / 20000) ** 0.5,
            "sgd-m": 0.0,
        }
        assert {"versions", "git_commit", "created", "reference"} <= ds.attrs.keys()


@blank
def test_the_same_seed_gives_the_same_log(folder: Path, tmp_path: Path) -> None:
    assert call(*SMALL, "--algorithms", "tnt,sgd-m", "--seed", "4", "--out", str(tmp_path)) == 0
    one, two = cl.open(folder), cl.open(tmp_path)
    for name in set(one.data_vars) - {"seconds"}:
        xr.testing.assert_identical(one[name], two[name])


@blank
def test_seeds_repeat_and_the_table_shows_mean_and_spread(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(*SMALL, "--algorithms", "sgd-m", "--seeds", "2", "--out", str(tmp_path)) == 0
    out = capsys.readouterr().out
    assert "mean ± standard deviation of 2 seeds" in out
    assert any(line.startswith("│ sgd-m") and line.count(" ± ") == 6 for line in out.splitlines())
    ds = cl.open(tmp_path)
    assert ds["seed"].values.tolist() == [0, 1]
    assert (ds["loss"].sel(seed=0) != ds["loss"].sel(seed=1)).all()


@blank
def test_log_every_and_epochs(tmp_path: Path) -> None:
    small = [w for w in SMALL if w not in ("--steps", "3")]
    assert (
        call(
            *small,
            "--algorithms",
            "sgd-m",
            "--epochs",
            "2",
            "--log-every",
            "2",
            "--out",
            str(tmp_path),
        )
        == 0
    )
    assert cl.open(tmp_path)["step"].values.tolist() == [0, 2, 4]  # three batches an epoch


@blank
def test_the_default_folder_is_fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        assert call(*SMALL[:-1], "1", "--algorithms", "sgd-m") == 0
    assert sorted(p.name for p in (tmp_path / "runs").iterdir()) == [
        "compare-mlp-256-20-001",
        "compare-mlp-256-20-002",
    ]


OTHERS = (
    "spectrum",
    "training",
    "damping",
    "landscape",
)  # test_spectra.py, test_train.py, test_probe_damping.py, test_sweep.py


@pytest.mark.parametrize("figure", [n for n in FIGURES if n not in OTHERS])
def test_plot_redraws_from_the_log_alone(folder: Path, tmp_path: Path, figure: str) -> None:
    (tmp_path / "run.h5").write_bytes((folder / "run.h5").read_bytes())
    assert call("plot", str(tmp_path / "run.h5"), "--figure", figure) == 0
    assert call("plot", str(tmp_path), "--figure", figure, "-o", str(tmp_path / "x.svg")) == 0
    assert min(imread(tmp_path / f"{figure}.png").shape[:2]) > 150
    assert (tmp_path / "x.svg").stat().st_size > 1000
    ds = cl.open(folder)
    axes = assert_drawn(draw(ds, figure))
    if figure == "loss":
        lines: list[Any] = list(axes[0].lines)
        (line,) = (line for line in lines if len(line.get_xdata()) == ds.sizes["step"])
        np.testing.assert_array_equal(line.get_ydata(), ds["loss"])


@pytest.mark.parametrize(
    ("what", "table"),
    [
        ("algorithms", list(ALGORITHMS)),
        ("models", list(MODELS)),
        ("datasets", list(DATASETS)),
        ("probes", list(PROBES)),
        ("figures", list(FIGURES)),
        ("options", [n for n, a in ALGORITHMS.items() for _ in a.defaults]),
    ],
)
def test_list_names_every_entry(
    what: str, table: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whole cells of the first column, in the tables' order; of options the second too."""
    monkeypatch.setattr(terminal.out, "_width", 400)  # no name is broken
    assert call("list", what) == 0
    rows = [
        line.split("│")[1:-1]
        for line in capsys.readouterr().out.splitlines()
        if line.startswith("│")
    ]
    # a cell that is long goes on in rows without a name
    found = [[cell.strip() for cell in row] for row in rows]
    assert [row[0] for row in found if row[0]] == table


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("--version") == 0
    assert capsys.readouterr().out.strip() == f"curvlab {cl.__version__}"
    done = subprocess.run(
        [sys.executable, "-m", "curvlab", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == f"curvlab {cl.__version__}"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--model", "mlp-256-21"], "unknown model 'mlp-256-21'; did you mean 'mlp-256-20'"),
        (
            ["--model", "mlp-256-20", "--reference", "block-fischer"],
            "did you mean 'block-fisher'? (known: block-fisher,",
        ),
        (
            ["--model", "mlp-256-20", "--algorithms", "kfac,kfca"],
            "unknown algorithm 'kfca'; did you mean 'kfac'",
        ),
        (
            ["--model", "mlp-256-20", "--data", "mnist17"],
            "unknown data set 'mnist17'; did you mean 'mnist16'",
        ),
        (["--model", "mlp-256-20", "--data", "mnist"], "does not take inputs of shape (2, 784)"),
        (
            ["--model", "mlp-256-20", "--batch-size", "60001"],
            "batch size 60001 does not fit 'mnist16'",
        ),
        (["--model", "mlp-256-20", "--damping", "-1"], "damping must be 0 or positive, not -1"),
        (["--model", "mlp-256-20", "--damping", "nan"], "damping must be 0 or positive"),
        (["--model", "mlp-256-20", "--lr", "-0.1"], "learning rate must be 0 or positive"),
        (["--model", "mlp-256-20", "--momentum", "1"], "momentum must be at least 0 and below 1"),
        (["--model", "mlp-256-20", "--decay", "1.5"], "decay must be at least 0 and below 1"),
        (["--model", "mlp-256-20", "--steps", "0"], "steps must be 1 or more"),
        (["--model", "mlp-256-20", "--steps", "many"], "Invalid value for '--steps'"),
        (["--model", "mlp-256-20", "--seeds", "0"], "seeds must be 1 or more"),
        (["--model", "mlp-256-20", "--seed", "-1"], "seed must be 0 or positive"),
        (
            ["--model", "mlp-256-20", "--seed", str(2**64)],
            f"seed must be a whole number from 0 to {2**63 - 1}, not {2**64}",
        ),
        (
            ["--model", "mlp-256-20", "--seed", str(2**63 - 1), "--seeds", "2"],
            "the seed must be a whole number from 0 to",
        ),
        (
            ["--model", "mlp-256-20", "--seeds", "10001"],
            "seeds must be a whole number from 1 to 10000, not 10001",
        ),
        (
            ["--model", "mlp-256-20", "--steps", str(2**63)],
            "steps must be a whole number from 1 to 1000000000000",
        ),
        (
            ["--model", "mlp-256-20", "--epochs", str(2**63)],
            "epochs must be a whole number from 1 to 1000000000000",
        ),
        (
            ["--model", "mlp-256-20", "--update-every", "-" + "9" * 30],
            "update_every must be 1 or more, not -9",
        ),
        (
            ["--model", "mlp-256-20", "--refresh-every", "9" * 99],
            f"1 to {2**63 - 1}, not a number of some 100 digits",
        ),
        (
            ["--model", "mlp-256-20", "--batch-size", "9" * 30],
            "the batch size must be a whole number",
        ),
        (
            ["--model", "mlp-256-20", "--lr", "1e400"],
            "learning rate must be 0 or positive, not inf",
        ),
        (
            ["--model", "mlp-256-20", "--momentum", "nan"],
            "momentum must be at least 0 and below 1, not nan",
        ),
        (
            ["--model", "mlp-256-20", "--probe", "damping:" + "9" * 30],
            "steps of probe 'damping' must be a whole number",
        ),
        (
            ["--model", "mlp-256-20", "--probe", "damping:" + "9" * 5000],
            "after the colon comes a number of steps",
        ),
        (["--model", "mlp-256-20", "--log-every", "0"], "log_every must be"),
        (
            ["--model", "mlp-256-20", "--probe", "dampin"],
            "unknown probe 'dampin'; did you mean 'damping'",
        ),
        (
            ["--model", "mlp-256-20", "--probe", "damping:0"],
            "after the colon comes a number of steps",
        ),
        (["--model", "mlp-256-20", "--probe", "gram:2"], "probe 'gram' is a part of every record"),
        (["--model", "mlp-256-20", "--refresh-every", "0"], "refresh_every must be"),
        (["--model", "mlp-256-20", "--dtype", "float16"], "unknown dtype 'float16'"),
        (["--model", "mlp-256-20", "--device", "abacus"], "unknown device 'abacus'"),
        (["--model", "mlp-256-20", "--nonsense"], "No such option"),
        ([], "Missing option '--model'"),
    ],
)
def test_bad_input_is_one_line(
    words: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = refused(capsys, "compare", *words, *(["--out", str(tmp_path / "out")] if words else []))
    assert says in line
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_cuda_without_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert "no device 'cuda' on this machine" in refused(capsys, *SMALL, "--device", "cuda")


def test_unknown_list_command_and_figure(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "unknown list 'algoritms'; did you mean 'algorithms'" in refused(
        capsys, "list", "algoritms"
    )
    assert "unknown figure 'cosin'; did you mean 'cosine'" in refused(
        capsys, "plot", str(folder), "--figure", "cosin"
    )
    assert "not written as '.xyz'" in refused(capsys, "plot", str(folder), "-o", "a.xyz")
    assert "cannot be written" in refused(capsys, "plot", str(folder), "-o", "/nowhere/a.png")
    assert "No such command" in refused(capsys, "compere")


def test_damaged_log(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run.h5").write_bytes((folder / "run.h5").read_bytes()[:3000])
    assert "is damaged" in refused(capsys, "plot", str(tmp_path))
    assert "no log at" in refused(capsys, "plot", str(tmp_path / "absent"))


def test_nan_in_the_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def spoiled() -> tuple[Dataset, Dataset]:
        x = torch.rand(40, 256)
        x[17, 3] = torch.nan
        data = Dataset("spoiled", x, torch.zeros(40, dtype=torch.long), "with a NaN")
        return data, data

    monkeypatch.setitem(datasets.DATASETS, "spoiled", DataEntry("with a NaN", spoiled))
    words = [
        "compare",
        "--model",
        "mlp-256-20",
        "--data",
        "spoiled",
        "--batch-size",
        "40",
        "--out",
        str(tmp_path),
    ]
    assert "inputs contain NaN or Inf" in refused(capsys, *words)


def test_output_folder_that_cannot_be_written(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert "cannot be written" in refused(capsys, *SMALL, "--out", str(tmp_path / "file"))
    assert "cannot be written" in refused(capsys, *SMALL, "--out", "/proc/nothing")
    assert "already holds a run.h5" in refused(capsys, *SMALL, "--out", str(folder))


def test_ctrl_c_that_python_drops_comes_again(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Python ignores exceptions where a weak reference is cleared: HDF5's files and torch's graphs
    are full of them.
    """
    monkeypatch.setattr(sys, "unraisablehook", sys.__unraisablehook__)

    class Thing:
        """What a weak reference can point to."""

    def cleared(_: object, raised: type[BaseException]) -> None:
        raise raised

    for raised, again in ((KeyboardInterrupt, True), (ZeroDivisionError, False)):
        thing, start = Thing(), time.monotonic()
        watch = weakref.ref(thing, partial(cleared, raised=raised))
        with listening(), pytest.raises(KeyboardInterrupt) if again else nullcontext():
            del thing
            time.sleep(10 if again else 0.1)
        assert watch() is None
        assert time.monotonic() - start < 5
    assert "ZeroDivisionError" in capsys.readouterr().err


def test_a_run_that_fails_half_way_keeps_its_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        "compare",
        "--model",
        "mlp-256-20",
        "--reference",
        "sgd-m",
        "--algorithms",
        "adam",
        "--lr",
        "1.5e20",
    ]
    assert call(*words, "--batch-size", "20000", "--out", str(tmp_path)) == 1
    line = capsys.readouterr().err
    assert "the reference sgd-m left the finite range at step 1" in line
    assert f"the log so far is saved in {tmp_path / 'run.h5'}" in line
    assert len(cl.open(tmp_path)["step"]) >= 1


def test_ctrl_c_ends_at_once_and_says_where_the_log_is(tmp_path: Path) -> None:
    words = [
        "compare",
        "--model",
        "mlp-256-20",
        "--reference",
        "kfac",
        "--algorithms",
        "sgd-m",
        "--steps",
        "1000000",
    ]
    ends_at_once(words, tmp_path)


@blank
@pytest.mark.filterwarnings("default::curvlab.errors.CurvlabWarning")
def test_layers_that_have_no_factors_are_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(256, 8), nn.LayerNorm(8), nn.PReLU(), nn.Linear(8, 10))

    monkeypatch.setitem(MODELS, "normed", replace(MODELS["mlp-256-20"], build=build))
    words = [
        "compare",
        "--model",
        "normed",
        "--reference",
        "kfac",
        "--algorithms",
        "kfac-ef,tnt-per-sample",
        "--steps",
        "2",
    ]
    assert call(*words, "--batch-size", "20000", "--seeds", "2", "--out", str(tmp_path)) == 0
    said = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert said == [
        "curvlab: warning: parameters of layers without a rule (or, for Kronecker factors, with"
        " groups of outputs) follow the gradient where an algorithm needs structure: 1.weight,"
        " 1.bias, 2.weight"
    ]


@pytest.mark.slow
def test_sigkill_of_the_main_job_at_twenty_random_moments(tmp_path: Path) -> None:
    """The whole command, not only the log: killed, the file opens or does not exist yet."""
    opened = 0
    for i, moment in enumerate(np.random.default_rng(1).uniform(0.0, 9.0, 20)):
        out = tmp_path / str(i)
        words = [
            "-m",
            "curvlab",
            "compare",
            "--model",
            "mlp-256-20",
            "--steps",
            "1000000",
            "--out",
            str(out),
        ]
        with subprocess.Popen(
            [sys.executable, *words], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
        ) as process:
            while not (out / "run.h5").exists() and process.poll() is None:
                time.sleep(0.01)
            time.sleep(moment)
            process.kill()
        ds = cl.open(out)
        assert np.isfinite(ds["gram"]).all()
        opened += 1
    assert opened == 20


def test_device_auto_is_what_the_machine_has() -> None:
    assert machine.device_of("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")


def test_names_that_look_like_markup_are_printed_as_they_are(
    capsys: pytest.CaptureFixture[str],
) -> None:
    terminal.show(
        Table("[/caption]", ("[bold]name", "x"), (("[/a]", "1"), ("[red]b", "2"))), "model [/x]"
    )
    said = capsys.readouterr().out
    assert all(name in said for name in ("model [/x]", "[bold]name", "[/a]", "[red]b"))


# ------------------------------------------------------------------------------------------------
# help


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize(
    "name",
    [
        "",
        "compare",
        "train",
        "spectrum",
        "reproduce",
        "plot",
        "report",
        "doctor",
        "list",
    ],
)
def test_no_paragraph_of_a_help_is_broken_before_its_line_is_full(
    name: str, width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    assert call(*name.split(), "-h") == 0
    above = capsys.readouterr().out.partition("╭")[0]
    lines = [line.strip() for line in above.splitlines()]
    paragraphs = [p.splitlines() for p in re.split(r"\n{2,}", "\n".join(lines).strip())]
    assert len(paragraphs) >= 2
    for paragraph in paragraphs:
        for line, following in itertools.pairwise(paragraph):
            assert len(line) + 1 + len(following.split()[0]) > width - 2, line  # a margin each
