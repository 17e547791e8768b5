"""`curvlab train`: the job in small, killed and interrupted and gone on with, and one clear line
for bad input.
"""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from matplotlib.image import imread
from test_cli import blank, call, refused
from test_train import same_log
from torch import nn

import curvlab as cl
from curvlab.cli.assignments import assigned
from curvlab.datasets import DATASETS, CropAndFlip, DataEntry, Dataset
from curvlab.models import MODELS
from curvlab.probes import PROBES

SMALL = ["train", "--model", "mlp-256-20", "--batch-size", "600", "--lr", "0.01", "--seed", "3"]
TWO = [
    *SMALL,
    "--algorithm",
    "k-bfgs-20",
    "--damping",
    "0.3",
    "--epochs",
    "2",
    "--schedule",
    "step",
    "--schedule-set",
    "every=1",
    "--probe",
    "damping",
    "--probe",
    "loss:4",
]


@pytest.fixture(scope="module", autouse=True)
def _a_tenth_of_the_digits() -> Iterator[None]:
    """In this process. Processes of their own have all of them."""
    whole = DATASETS["mnist16"].load()

    @functools.cache
    def tenth() -> tuple[Dataset, Dataset]:
        train, test = (
            replace(part, x=part.x[: len(part) // 10], y=part.y[: len(part) // 10])
            for part in whole
        )
        return train, test

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(DATASETS, "mnist16", replace(DATASETS["mnist16"], load=tenth))
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("train") / "run"
    assert call(*TWO, "--out", str(out)) == 0
    return out


def model_of(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "checkpoint.pt", weights_only=True)["model"]


def same_run(one: Path, two: Path) -> None:
    same_log(cl.open(one), cl.open(two))
    for (name, p), (other, q) in zip(model_of(one).items(), model_of(two).items(), strict=True):
        assert name == other
        assert torch.equal(p, q)


def test_it_writes_log_checkpoint_and_figure(folder: Path) -> None:
    assert sorted(p.name for p in folder.iterdir()) == [
        "checkpoint.pt",
        "run.h5",
        "training.png",
        "training.svg",
    ]
    assert min(imread(folder / "training.png").shape[:2]) > 500


def test_it_is_what_the_function_does(folder: Path) -> None:
    """Another route: `cl.train` with the objects of the names, and the log's attributes by hand."""
    train, test = cl.datasets.load("mnist16")
    model = cl.models.build("mlp-256-20", seed=3)
    objective = cl.Objective(model, cl.likelihoods.Categorical(), seed=3)
    run = cl.train(
        objective,
        train.batches(600, seed=3),
        test,
        algorithm="k-bfgs-20",
        lr=0.01,
        damping=0.3,
        epochs=2,
        schedule="step",
        schedule_options={"every": 1},
        probes=["damping", "loss:4"],
    )
    same_log(run.dataset, cl.open(folder))
    assert all(
        torch.equal(p, q)
        for p, q in zip(model.state_dict().values(), model_of(folder).values(), strict=True)
    )
    with xr.open_dataset(folder / "run.h5", engine="h5netcdf") as ds:
        given = json.loads(ds.attrs["call"])
        assert (given["command"], given["model"], given["epochs"], given["schedule_own"]) == (
            "train",
            "mlp-256-20",
            2,
            ["every=1"],
        )
        expected = {
            "model": "mlp-256-20",
            "data": "mnist16",
            "algorithm": "k-bfgs-20",
            "lr": 0.01,
            "damping": 0.3,
            "seed": 3,
        }
        assert {name: ds.attrs[name] for name in expected} == expected
        np.testing.assert_allclose(ds["lr"], [0.01, 0.01, 0.001], rtol=1e-12)


@blank
def test_the_table_and_a_line_for_every_epoch(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(*SMALL, "--epochs", "2", "--algorithm", "sgd-m", "--out", str(tmp_path)) == 0
    out, err = capsys.readouterr()
    assert [line.split(":")[0] for line in err.splitlines()] == ["epoch 0", "epoch 1", "epoch 2"]
    rows = [line.split("│")[1:3] for line in out.splitlines() if line.startswith("│")]
    assert [[cell.strip() for cell in row] for row in rows] == [["first", "0"], ["best, last", "2"]]
    ds = cl.open(tmp_path)
    assert (
        f"val loss {float(ds['val_loss'][-1]):.5g}, val error {float(ds['val_error'][-1]):.5g}"
        in err
    )


def test_plot_redraws_one_run_and_several(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run.h5").write_bytes((folder / "run.h5").read_bytes())
    assert call("plot", str(tmp_path)) == 0
    assert call("plot", str(folder), str(tmp_path), "-o", str(tmp_path / "x.svg")) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run.h5", "training.png", "x.svg"]
    assert "figure 'cosine' needs" in refused(capsys, "plot", str(tmp_path), "--figure", "cosine")
    assert "figure 'loss' is of one run" in refused(
        capsys, "plot", str(tmp_path), str(folder), "--figure", "loss"
    )


@blank
def test_options_of_the_algorithms_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [*SMALL, "--algorithm", "k-bfgs-l", "--epochs", "1", "--set", "pairs=2"]
    assert call(*words, "--out", str(tmp_path)) == 0
    assert json.loads(cl.open(tmp_path).attrs["settings"])["own"] == {"pairs": 2}
    line = refused(
        capsys, *SMALL, "--algorithm", "k-bfgs-l", "--set", "pears=2", "--out", str(tmp_path / "x")
    )
    assert "unknown option of k-bfgs-l 'pears'; did you mean 'pairs'? (known: " in line


@blank
def test_augmentation_and_dropout_are_of_the_seed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """And the evaluation sees neither."""

    def images() -> tuple[Dataset, Dataset]:
        draw = torch.Generator().manual_seed(0)
        x, y = torch.randn(40, 1, 6, 6, generator=draw), torch.randint(3, (40,), generator=draw)
        return Dataset("images", x, y, "cropped", CropAndFlip(2)), Dataset("images", x, y, "plain")

    def build() -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Dropout(0.3), nn.Linear(36, 3))

    monkeypatch.setitem(DATASETS, "images", DataEntry("made", images))
    monkeypatch.setitem(MODELS, "small", replace(MODELS["mlp-256-20"], build=build, data="images"))
    logs = []
    for i, more in enumerate(([], [], ["--no-augment"], ["--seed", "1"])):
        torch.manual_seed(i)
        out = tmp_path / str(i)
        assert (
            call(
                "train",
                "--model",
                "small",
                "--batch-size",
                "10",
                "--epochs",
                "2",
                *more,
                "--lr",
                "0.1",
                "--out",
                str(out),
            )
            == 0
        )
        logs.append(cl.open(out))
    same_log(logs[0], logs[1])
    assert logs[0]["train_loss"][0] == logs[2]["train_loss"][0]
    assert logs[0]["train_loss"][2] != logs[2]["train_loss"][2]
    assert logs[0]["train_loss"][2] != logs[3]["train_loss"][2]
    # the same images there
    np.testing.assert_array_equal(logs[0]["train_loss"], logs[0]["val_loss"])
    assert (logs[0].attrs["data_description"], logs[2].attrs["data_description"]) == (
        "cropped",
        "plain",
    )


# ---- killed, interrupted, gone on with


def start(*words: str, cwd: Path | None = None) -> subprocess.Popen[str]:
    """One thread, as this process has, in which runs are gone on with: sums depend on the
    number.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "curvlab", *words],
        stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=environment, cwd=cwd,
    )  # fmt: skip


def wait_for(path: Path, process: subprocess.Popen[str], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not path.exists() and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.002)


LONG = [
    *SMALL[:3],
    "--batch-size",
    "1000",
    "--lr",
    "0.01",
    "--algorithm",
    "kfac",
    "--damping",
    "0.1",
    "--epochs",
    "2",
]
LONG += ["--checkpoint-seconds", "0.05", "--evaluate-samples", "1000"]
LONG += ["--probe", "loss", "--probe", "norms:7"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What is never interrupted."""
    out = tmp_path_factory.mktemp("whole") / "run"
    with start(*LONG, "--out", str(out)) as process:
        _, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
    return out


def killed_and_resumed(
    out: Path, moments: list[float], first: list[str] = LONG, last: int = signal.SIGKILL
) -> int:
    """SIGKILL so many seconds after the first checkpoint of each life; then on to the end. How many
    were training still.

    Another signal for the `last` of these lives: what is said then goes on with it.
    """
    killed = 0
    for life, moment in enumerate(moments, 1):
        again = (out / "checkpoint.pt").exists()
        words = ["train", "--resume"] if again else first
        number = last if life == len(moments) else signal.SIGKILL
        with start(*words, "--out", str(out), cwd=out.parent) as process:
            if again:
                stamp = (out / "checkpoint.pt").stat().st_mtime_ns
                while (
                    out / "checkpoint.pt"
                ).stat().st_mtime_ns == stamp and process.poll() is None:
                    time.sleep(0.002)
            else:
                wait_for(out / "checkpoint.pt", process)
            time.sleep(moment)
            alive = process.poll() is None
            process.send_signal(number)
            begun = time.monotonic()
            _, err = process.communicate(timeout=60)
        assert time.monotonic() - begun < 20
        if alive and number == signal.SIGINT and process.returncode:
            assert process.returncode == 130, err
            saved = f"interrupted; the log so far is saved in {out / 'run.h5'}"
            assert f"{saved}; go on with: curvlab train --resume --out {out}" in err
            assert "Traceback" not in err
        # the first checkpoint comes before it
        assert not (out / "run.h5").exists() or len(cl.open(out)["epoch"]) >= 1
        state = torch.load(out / "checkpoint.pt", weights_only=True)
        assert state["checkpoint_seconds"] == 0.05  # said once, and kept
        if state["position"]["epoch"] == state["budget"]["epochs"]:
            break
        killed += alive
    with start("train", "--resume", "--out", str(out), cwd=out.parent) as process:
        _, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
    return killed


@pytest.mark.parametrize(
    ("moments", "last"),
    [
        pytest.param([0.1, 0.15], signal.SIGINT, id="once, then by Ctrl-C"),
        pytest.param([0.1, 0.3, 0.25], signal.SIGKILL, id="three times", marks=pytest.mark.slow),
    ],
)
def test_killed_and_gone_on_with_it_is_the_same_run(
    moments: list[float], last: int, whole: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    assert killed_and_resumed(out, moments, last=last) >= 2
    same_run(out, whole)
    assert len(json.loads(cl.open(out).attrs["resumed"])) >= 2


OFTEN = {
    "damping": 1,
    "loss": 1,
    "norms": 2,
    "noise": 3,
    "condition": 5,
    "memory": 6,
    "bounds": 7,
    "reduction": 10,
    "error": 15,
    "spectrum": 20,
    "alignment": 30,
}
"""All probes that see anything of `k-bfgs-20`, more often than by default: kills fall into all of
them.
"""
PROBED = [
    "train",
    "--model",
    "own:build",
    "--data",
    "mnist16",
    "--batch-size",
    "500",
    "--lr",
    "0.1",
    "--algorithm",
    "k-bfgs-20",
]
PROBED += [
    "--damping",
    "0.3",
    "--epochs",
    "2",
    "--checkpoint-seconds",
    "0.05",
    "--evaluate-samples",
    "2000",
]
PROBED += [word for name, every in OFTEN.items() for word in ("--probe", f"{name}:{every}")]


def test_kills_fall_into_all_probes() -> None:
    """Of the slow test of test_signals.py; but for the shift, which is of block-hessian alone."""
    assert OFTEN.keys() == {name for name, one in PROBES.items() if "train" in one.where} - {
        "shift"
    }


@blank
def test_a_longer_run_goes_on_and_other_settings_are_refused_by_name(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    shutil.copytree(folder, out)
    assert call("train", "--resume", "--epochs", "3", "--out", str(out)) == 0
    assert cl.open(out)["epoch"].values.tolist() == [0, 1, 2, 3]
    whole = tmp_path / "whole"
    assert call(*[w if w != "2" else "3" for w in TWO], "--out", str(whole)) == 0
    same_run(out, whole)
    # the same call again: nothing is left to do
    assert call(*TWO, "--resume", "--out", str(out)) == 0
    same_run(out, whole)
    for words, says in (
        (["--lr", "0.02"], "other settings (lr 0.01, not 0.02)"),
        (["--seed", "4", "--batch-size", "100"], "batch_size 600, not 100, seed 3, not 4"),
        (["--algorithm", "kfac"], "algorithm k-bfgs-20, not kfac"),
        (["--model", "mlp-256-20-printed"], "model mlp-256-20, not mlp-256-20-printed"),
        (["--schedule-set", "every=2"], "schedule_options {'every': 1}, not {'every': 2}"),
        (["--dtype", "float64"], "dtype float32, not float64"),
    ):
        before = (out / "checkpoint.pt").read_bytes()
        assert says in refused(capsys, "train", "--resume", "--out", str(out), *words)
        assert (out / "checkpoint.pt").read_bytes() == before


def test_checkpoints_that_are_damaged_or_not_there(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "there is no checkpoint at" in refused(
        capsys, "train", "--resume", "--out", str(tmp_path / "none")
    )
    assert not (tmp_path / "none").exists()
    assert "--resume needs the folder of the run" in refused(capsys, "train", "--resume")
    (tmp_path / "checkpoint.pt").write_bytes((folder / "checkpoint.pt").read_bytes()[:5000])
    assert "is damaged or no checkpoint" in refused(
        capsys, "train", "--resume", "--out", str(tmp_path)
    )
    assert "already holds a checkpoint.pt" in refused(capsys, *SMALL, "--out", str(tmp_path))
    assert "already holds a run.h5" in refused(capsys, *SMALL, "--out", str(folder))


@blank
def test_a_run_that_diverges_says_so_and_keeps_the_last_good_state(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        *SMALL[:-2],
        "--algorithm",
        "sgd-m",
        "--lr",
        "1e37",
        "--epochs",
        "3",
        "--out",
        str(tmp_path),
    ]
    assert call(*[w for w in words if w != "0.01"][:5], *words[7:]) == 1
    out, err = capsys.readouterr()
    said = [line for line in err.splitlines() if line.startswith("curvlab: ")]
    assert len(said) == 1
    assert re.match(
        r"curvlab: diverged in epoch 1 after \d+ steps: .*; the last good state, kept, is epoch 0"
        r" \(.*checkpoint\.pt\)",
        said[0],
    )
    assert cl.open(tmp_path).attrs["stopped"] in said[0]
    assert all(torch.isfinite(p).all() for p in model_of(tmp_path).values())
    assert "wrote" in out


@pytest.mark.parametrize(
    ("algorithm", "option", "says"),
    [
        ("k-bfgs-l", "pairs=2.5", "pairs of k-bfgs-l must be a whole number, not 2.5"),
        ("k-bfgs", "minibatch=foo", "minibatch of k-bfgs must be true or false, not 'foo'"),
        ("k-bfgs", "pairs=true", "pairs of k-bfgs must be a whole number, not True"),
        ("skqn-b1", "columns=2.5", "columns of skqn-b1 must be a whole number or none, not 2.5"),
        (
            "skqn-b1",
            "choice=tracé",
            (
                "unknown choice of skqn-b1 'tracé'; did you mean 'trace'? (known: symmetric, trace,"
                " diagonal)"
            ),
        ),
        ("skqn-b1", "tau=5", "tau must be between 0 and 1, or none for Powell's rule, not 5"),
        ("skqn-b2", "mu=2", "mu must be above 0 and at most 1, not 2"),
        ("skqn-b2", "seed=-1", "seed must be 0 or positive, not -1"),
        ("skqn-b2", "gamma=inf", "gamma of skqn-b2 must be a finite number, not inf"),
        ("skqn-b2", "r1=low", "r1 of skqn-b2 must be a finite number or none, not 'low'"),
        ("skqn-l", "mu=-1", "mu must lie between 0 (no damping) and 1, not -1"),
        (
            "smw-gn",
            "curvature_size=1.5",
            "curvature_size of smw-gn must be a whole number or none, not 1.5",
        ),
        ("smw-ng-bd", "adapt=maybe", "adapt of smw-ng-bd must be true or false, not 'maybe'"),
        ("hf", "iterations=2.5", "iterations of hf must be a whole number, not 2.5"),
        ("hf", "boost=nan", "boost of hf must be a finite number, not nan"),
        ("ssn", "sample=0", "sample must be a positive number of examples, not 0"),
        (
            "s4qn",
            "search=newton",
            "unknown search of s4qn 'newton'; did you mean 'none'? (known: none, armijo, wolfe)",
        ),
        ("kfac", "split=3", "split of kfac must be a name, not 3"),
    ],
)
def test_a_bad_value_of_an_option_is_one_line(
    algorithm: str, option: str, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*SMALL[:3], "--algorithm", algorithm, "--set", option, "--out", str(tmp_path / "out")]
    assert says in refused(capsys, *words)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("algorithm", "own"),
    [
        ("k-bfgs", {"pair_damping": "none"}),
        ("s4qn", {"base": "none", "search": "none", "sample": "none"}),
    ],
)
def test_none_is_a_word_where_one_is_wanted(algorithm: str, own: dict[str, str]) -> None:
    """What the command line reads as None: a choice of that name, or no number."""
    objective = cl.Objective(nn.Linear(3, 2), cl.likelihoods.Categorical())
    made: Any = cl.approximation(
        algorithm, objective, **assigned([f"{k}={v}" for k, v in own.items()], "--set")
    )
    found = made.blocks["1"] if algorithm == "k-bfgs" else made
    assert {name: getattr(found, name) for name in own} == own | (
        {"sample": None} if "sample" in own else {}
    )


@blank
def test_what_cannot_take_a_first_step_leaves_nothing_behind(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """√λ above 1 is found when H_g is first damped, after epoch 0; the same folder then takes the
    run with another value.
    """
    out = tmp_path / "run"
    words = [
        *SMALL,
        "--algorithm",
        "k-bfgs-20",
        "--steps",
        "2",
        "--evaluate-samples",
        "100",
        "--out",
        str(out),
    ]
    assert call(*words, "--damping", "4") == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("curvlab: ")
    assert "saved" not in said
    assert not out.exists()
    assert call(*words, "--damping", "0.3") == 0
    assert float(cl.open(out)["steps"][-1]) == 2


@blank
def test_double_grad_and_the_l2_term_by_their_options(tmp_path: Path) -> None:
    """The same steps as `cl.train`'s; and a run goes on with them."""
    words = [
        *SMALL,
        "--algorithm",
        "k-bfgs-20",
        "--damping",
        "0.3",
        "--double-grad",
        "--l2",
        "0.01",
    ]
    short = ["--evaluate-samples", "100", "--out", str(tmp_path)]
    assert call(*words, "--steps", "2", *short) == 0
    assert call("train", "--resume", "--steps", "4", "--out", str(tmp_path)) == 0
    train, test = cl.datasets.load("mnist16")
    model = cl.models.build("mlp-256-20", seed=3)
    objective = cl.Objective(model, cl.likelihoods.Categorical(), seed=3, l2=0.01)
    run = cl.train(
        objective,
        train.batches(600, seed=3),
        test,
        algorithm="k-bfgs-20",
        lr=0.01,
        damping=0.3,
        double_grad=True,
        steps=4,
        evaluate_samples=100,
    )
    kept = model_of(tmp_path)
    assert all(torch.equal(kept[name], p) for name, p in model.state_dict().items())
    found = cl.open(tmp_path)
    assert float(found["batch_loss"][-1]) == float(run.dataset["batch_loss"][-1])
    assert json.loads(found.attrs["settings"])["double_grad"] is True


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--model", "mlp-256-21"], "unknown model 'mlp-256-21'; did you mean 'mlp-256-20'"),
        (["--data", "mnist17"], "unknown data set 'mnist17'; did you mean 'mnist16'"),
        (["--data", "mnist"], "does not take inputs of shape (2, 784)"),
        (["--algorithm", "adan"], "unknown algorithm 'adan'; did you mean 'adam'"),
        (["--batch-size", "60001"], "batch size 60001 does not fit"),
        (["--batch-size", "0"], "batch size 0 does not fit"),
        (["--lr", "-1"], "learning rate must be 0 or positive"),
        (["--lr", "inf"], "learning rate must be 0 or positive, not inf"),
        (["--damping", "inf"], "damping must be 0 or positive, not inf"),
        (["--l2", "-1"], "the L2 term must be 0 or positive, not -1"),
        (
            ["--double-grad"],
            (
                "double_grad needs a method that looks at each minibatch a second time, such as"
                " k-bfgs-20"
            ),
        ),
        (["--damping", "-1"], "damping must be 0 or positive"),
        (["--momentum", "1"], "momentum must be at least 0 and below 1"),
        (["--momentum-kind", "polyak"], "unknown kind of momentum 'polyak'"),
        (["--labels", "mine"], "unknown labels 'mine' (known: data, model, exact, token)"),
        (["--weight-decay", "-1"], "weight decay must be 0 or positive"),
        (["--decay", "1.5"], "decay must be at least 0 and below 1"),
        (["--update-every", "0"], "update_every must be"),
        (["--refresh-every", "0"], "refresh_every must be"),
        (["--schedule", "cosin"], "unknown schedule 'cosin'; did you mean 'cosine'"),
        (["--schedule-every", "day"], "unknown schedule_every 'day'"),
        (["--schedule-set", "every"], "--schedule-set takes NAME=VALUE, not 'every'"),
        (["--schedule", "cosine", "--steps", "5"], "'cosine' is laid out over all epochs"),
        (["--set", "x=1"], "unknown option of adam 'x'"),
        (["--epochs", "0"], "epochs must be 1 or more"),
        (["--steps", "0"], "steps must be 1 or more"),
        (["--seconds", "0"], "seconds must be above 0"),
        (["--evaluate-every", "0"], "evaluate_every must be 1 or more"),
        (["--probe", "dampin"], "unknown probe 'dampin'; did you mean 'damping'"),
        (
            ["--probe", "loss:x"],
            "probe 'loss:x': after the colon comes a number of steps, 1 or more, as in loss:10",
        ),
        (["--probe", "loss", "--probe", "loss:2"], "probe 'loss' is given twice"),
        (["--probe", "gram"], "probe 'gram' is of curvlab compare alone"),
        (
            ["--probe", "damping"],
            (
                "probe 'damping' needs a quasi-Newton method, which learns from pairs, and there is"
                " adam"
            ),
        ),
        (["--evaluate-samples", "0"], "evaluate_samples must be 1 or more"),
        (["--checkpoint-seconds", "0"], "seconds between checkpoints must be above 0"),
        (["--seed", "-1"], "seed must be 0 or positive"),
        (["--dtype", "float16"], "unknown dtype 'float16'"),
        (["--device", "abacus"], "unknown device 'abacus'"),
        (["--nonsense"], "No such option"),
    ],
)
def test_bad_input_is_one_line_before_anything_is_written(
    words: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert says in refused(capsys, *SMALL[:3], *words, "--out", str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_no_model_and_folders_that_cannot_be_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "Missing option '--model'" in refused(capsys, "train", "--epochs", "1")
    (tmp_path / "file").write_text("")
    assert "cannot be written" in refused(capsys, *SMALL, "--out", str(tmp_path / "file"))
    assert "cannot be written" in refused(capsys, *SMALL, "--out", "/proc/nothing")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_cuda_without_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert "no device 'cuda' on this machine" in refused(capsys, *SMALL, "--device", "cuda")


@blank
def test_the_default_folder_is_fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert call(*SMALL, "--steps", "1", "--evaluate-samples", "100") == 0
    assert [p.name for p in (tmp_path / "runs").iterdir()] == ["train-mlp-256-20-001"]


def test_help_groups_the_options_and_names_sources(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("train", "-h") == 0
    out = " ".join(capsys.readouterr().out.replace("│", " ").split())  # wherever its lines break
    assert all(
        panel in out
        for panel in (
            "Problem",
            "Method",
            "Learning rate",
            "Length",
            "Evaluation",
            "Machine",
            "Output",
        )
    )
    assert all(
        source in out
        for source in ("thesis 2.8.1", "thesis 4.7.2", "thesis Alg. 15", "thesis 3.7.1")
    )
