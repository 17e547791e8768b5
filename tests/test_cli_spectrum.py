"""`curvlab spectrum`: the job in small, its log and figure, and one clear line for bad input."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr
from matplotlib.image import imread
from test_cli import blank, call, ends_at_once, refused
from torch import nn

import curvlab as cl
from curvlab import spectrum_run
from curvlab.models import MODELS
from curvlab.problem import Problem
from curvlab.spectra import SPECTRUM_VARIABLES, Plan

SMALL = [
    "spectrum",
    "--model",
    "mlp-256-20",
    "--samples",
    "40",
    "--batch-size",
    "500",
    "--blocks",
    "6,5",
]
TWO = [*SMALL, "--after", "2,0", "--seed", "3", "--matrix", "hessian, ggn,fisher-mc"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("spectrum") / "run"
    assert call(*TWO, "--out", str(out)) == 0
    return out


def test_it_writes_log_and_figure(folder: Path) -> None:
    assert sorted(p.name for p in folder.iterdir()) == ["run.h5", "spectrum.png", "spectrum.svg"]
    assert min(imread(folder / "spectrum.png").shape[:2]) > 500
    assert (folder / "spectrum.svg").read_text().startswith("<?xml")


def test_the_log_opens_with_plain_xarray_and_has_the_promised_schema(folder: Path) -> None:
    with xr.open_dataset(folder / "run.h5", engine="h5netcdf") as ds:
        assert dict(ds.sizes) == {"step": 2, "matrix": 3, "block": 2, "index": 420, "bin": 401}
        assert ds["step"].values.tolist() == [0, 2]
        assert ds["matrix"].values.tolist() == ["hessian", "ggn", "fisher-mc"]
        assert ds["block"].values.tolist() == ["6", "5"]
        assert ds["parameters"].values.tolist() == ["10.weight 10.bias", "8.weight 8.bias"]
        assert ds["order"].values.tolist() == [210, 420]
        assert {name: v.dims for name, v in ds.data_vars.items()} == {
            n: ("step", *v[0]) for n, v in SPECTRUM_VARIABLES.items()
        }
        assert all({"long_name", "units"} <= v.attrs.keys() for v in ds.variables.values())
        assert all(np.isfinite(v).all() for n, v in ds.data_vars.items() if n != "eigenvalue")
        given = json.loads(ds.attrs["call"])
        assert (given["command"], given["after"], given["matrix"]) == (
            "spectrum",
            "2,0",
            "hessian, ggn,fisher-mc",
        )
        expected = {
            "model": "mlp-256-20",
            "data": "mnist16",
            "samples": 40,
            "algorithm": "adam",
            "lr": 1e-4,
            "damping": 1e-4,
        }
        expected |= {"batch_size": 500, "seed": 3, "device": "cpu", "dtype": "float64"}
        assert {name: ds.attrs[name] for name in expected} == expected
        assert {"versions", "git_commit", "created"} <= ds.attrs.keys()


def test_it_is_what_the_function_computes_along_the_optimizers_own_steps(folder: Path) -> None:
    """Another route: the loop written out, NumPy's eigenvalues."""
    train, _ = cl.datasets.load("mnist16")
    objective = cl.Objective(
        cl.models.build("mlp-256-20", seed=3).double(), cl.likelihoods.Categorical(), seed=3
    )
    x, y = train.x[:40], train.y[:40]
    optimizer = cl.optimizer("adam", objective)
    ds = cl.open(folder)
    states = iter(train.batches(500, seed=3))
    for step in (0, 1, 2):
        if step:
            optimizer.step(objective.closure(*next(states)))
        if step in (0, 2):
            for kind in ("hessian", "ggn"):
                for block in ("5", "6"):
                    dense = cl.exact.matrix(
                        objective, x, y, kind, block, route="func"
                    ).matrix.numpy()
                    found = (
                        ds["eigenvalue"]
                        .sel(step=step, matrix=kind, block=block)
                        .values[: len(dense)]
                    )
                    np.testing.assert_allclose(found, np.linalg.eigvalsh(dense), rtol=0, atol=1e-10)
            assert ds["loss"].sel(step=step).item() == pytest.approx(
                objective.closure(x, y)().item(), rel=1e-12
            )


@blank
def test_the_same_seed_gives_the_same_log(folder: Path, tmp_path: Path) -> None:
    assert call(*TWO, "--out", str(tmp_path)) == 0
    one, two = cl.open(folder), cl.open(tmp_path)
    for name in one.variables:
        xr.testing.assert_identical(one[name], two[name])


@blank
def test_whole_by_lanczos_and_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "--blocks",
        "whole,6",
        "--method",
        "lanczos",
        "--draws",
        "2",
        "--steps",
        "5",
        "--after",
        "0",
    ]
    assert call(*SMALL, *words, "--algorithm", "sgd-m", "--out", str(tmp_path)) == 0
    out = capsys.readouterr().out
    assert any(
        line.startswith("│ whole │ hessian │") and line.count(" ± ") >= 3
        for line in out.splitlines()
    )
    assert "near 0" in out
    ds = cl.open(tmp_path)
    assert ds["order"].sel(block="whole") == 7030
    assert "eigenvalue" not in ds
    assert (ds.attrs["lanczos_draws"], ds.attrs["lanczos_steps"], ds.attrs["lr"]) == (2, 5, 0.003)


def test_plot_redraws_it_from_the_log_alone(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run.h5").write_bytes((folder / "run.h5").read_bytes())
    assert call("plot", str(tmp_path)) == 0
    assert call("plot", str(tmp_path), "--figure", "spectrum", "-o", str(tmp_path / "x.pdf")) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run.h5", "spectrum.png", "x.pdf"]
    assert "figure 'cosine' needs" in refused(capsys, "plot", str(tmp_path), "--figure", "cosine")


def test_batch_norm_and_dropout_train_and_are_looked_at_in_eval_mode(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def build() -> nn.Module:
        return nn.Sequential(
            nn.Linear(256, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Tanh(), nn.Linear(8, 10)
        )

    monkeypatch.setitem(MODELS, "normed", replace(MODELS["mlp-256-20"], build=build))
    named = spectrum_run.NamedSpectra(
        problem=Problem(model="normed", dtype="float64"),
        plan=Plan(blocks=("3",)),
        samples=30,
        after=(0, 2),
        batch_size=500,
    )
    prepared = spectrum_run.prepare_spectra(named)
    ds = spectrum_run.run(prepared, tmp_path / "run.h5", {}, cl.cli.terminal.err)
    model = prepared.objective.model
    assert all(module.training for module in model.modules())
    model.eval()
    expected = cl.spectrum(
        prepared.objective, prepared.train.x[:30], prepared.train.y[:30], blocks=["3"]
    )
    np.testing.assert_array_equal(ds["eigenvalue"].sel(step=2), expected["eigenvalue"].isel(step=0))


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--model", "mlp-256-21"], "unknown model 'mlp-256-21'; did you mean 'mlp-256-20'"),
        (
            ["--matrix", "hesian"],
            "unknown kind of matrix 'hesian'; did you mean 'hessian'? (known: hessian, ggn,",
        ),
        (["--matrix", ","], "there is no matrix to compute"),
        (["--blocks", "1,7"], "unknown block '7'"),
        (["--blocks", ""], "there is no block to compute"),
        (
            ["--method", "exactly"],
            "unknown method 'exactly'; did you mean 'exact'? (known: auto, exact, lanczos)",
        ),
        (["--draws", "0"], "draws of Lanczos must be 1 or more"),
        (["--steps", "0"], "steps of Lanczos must be 1 or more"),
        (
            ["--draws", str(2**64)],
            (
                "the draws of Lanczos must be a whole number from 1 to 1000000, not"
                " 18446744073709551616"
            ),
        ),
        (
            ["--steps", str(2**63)],
            "the steps of Lanczos must be a whole number from 1 to 1000000000000",
        ),
        (
            ["--after", str(2**63)],
            "number of training steps must be a whole number from 0 to 1000000000000",
        ),
        (["--after", "9" * 5000], "--after takes whole numbers with commas between, not '999"),
        (["--samples", str(2**64)], "samples must be a whole number"),
        (["--seed", str(2**64)], "the seed must be a whole number from 0 to"),
        (["--damping", "1e400"], "damping must be 0 or positive, not inf"),
        (["--after", "0,-5"], "number of training steps must be 0 or positive, not -5"),
        (["--after", "0,ten"], "--after takes whole numbers with commas between, not 'ten'"),
        (["--after", ""], "--after needs at least one number"),
        (
            ["--samples", "60001"],
            "60001 samples do not fit 'mnist16', which has 60000 training examples",
        ),
        (["--samples", "0"], "0 samples do not fit"),
        (["--batch-size", "0"], "batch size 0 does not fit"),
        (["--data", "mnist17"], "unknown data set 'mnist17'; did you mean 'mnist16'"),
        (["--data", "mnist"], "does not take inputs of shape"),
        (["--algorithm", "adan"], "unknown algorithm 'adan'; did you mean 'adam'"),
        (["--lr", "-1"], "learning rate must be 0 or positive"),
        (["--damping", "-1"], "damping must be 0 or positive"),
        (["--seed", "-1"], "seed must be 0 or positive"),
        (["--dtype", "float16"], "unknown dtype 'float16'"),
        (["--device", "abacus"], "unknown device 'abacus'"),
        (["--nonsense"], "No such option"),
    ],
)
def test_bad_input_is_one_line(
    words: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = refused(capsys, *SMALL, *words, "--out", str(tmp_path / "out"))
    assert says in line
    assert not (tmp_path / "out").exists()  # all is refused before anything is written


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_cuda_without_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert "no device 'cuda' on this machine" in refused(capsys, *SMALL, "--device", "cuda")


def test_output_folder_that_cannot_be_written(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert "cannot be written" in refused(capsys, *SMALL, "--out", str(tmp_path / "file"))
    assert "cannot be written" in refused(capsys, *SMALL, "--out", "/proc/nothing")
    assert "already holds a run.h5" in refused(capsys, *SMALL, "--out", str(folder))


@blank
def test_the_default_folder_is_fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert call(*SMALL, "--blocks", "6", "--after", "0") == 0
    assert [p.name for p in (tmp_path / "runs").iterdir()] == ["spectrum-mlp-256-20-001"]


def test_training_that_fails_keeps_the_states_before(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        "--algorithm",
        "sgd-m",
        "--lr",
        "1e38",
        "--dtype",
        "float32",
        "--blocks",
        "6",
        "--after",
        "0,30",
    ]
    line = refused(capsys, *SMALL, *words, "--out", str(tmp_path))
    assert f"the log so far is saved in {tmp_path / 'run.h5'}" in line
    assert cl.open(tmp_path)["step"].values.tolist() == [0]


# by default of `compare`, in test_cli.py, and inside this process, in test_signals.py
@pytest.mark.slow
def test_ctrl_c_ends_at_once_and_says_where_the_log_is(tmp_path: Path) -> None:
    ends_at_once([*SMALL, "--blocks", "6", "--after", "0,1,1000000"], tmp_path)
