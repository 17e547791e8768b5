"""Models and data sets on the command line: sized models, models of the user's, data that are not
there.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from optional import load_or_skip

import curvlab as cl
from curvlab.cli import app as cli
from curvlab.datasets import FILES, File

SMALL = ["--reference", "sgd-m", "--algorithms", "adam", "--lr", "0.01", "--steps", "2"]


def call(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["curvlab", *words])
    with pytest.raises(SystemExit) as info:
        cli.main()
    assert isinstance(info.value.code, int)
    return info.value.code


def test_models_and_data_sets_are_listed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for what, table in (("models", cl.models.MODELS), ("datasets", cl.datasets.DATASETS)):
        assert call(monkeypatch, "list", what) == 0
        shown = capsys.readouterr().out
        assert all(name in shown for name in table)


def test_logistic_regression_on_another_of_its_data_sets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load_or_skip("w8a")
    words = ["--model", "logistic", "--data", "w8a", "--batch-size", "100", "--out", str(tmp_path)]
    assert call(monkeypatch, "compare", *words, *SMALL) == 0
    ds = cl.open(tmp_path)
    assert ds.attrs["data_description"].startswith("LIBSVM's w8a")
    assert ds["block"].size == 1
    words = [
        "--model",
        "logistic",
        "--data",
        "w8a",
        "--after",
        "0",
        "--samples",
        "50",
        "--out",
        str(tmp_path / "spectrum"),
    ]
    assert call(monkeypatch, "spectrum", *words) == 0


def test_augmented_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load_or_skip("cifar10-subset")
    words = [
        "--model",
        "convnet",
        "--data",
        "cifar10-subset",
        "--batch-size",
        "32",
        "--out",
        str(tmp_path),
    ]
    assert call(monkeypatch, "compare", *words, *SMALL) == 0
    assert "cropped at random" in cl.open(tmp_path).attrs["data_description"]


def test_a_model_of_yours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = "from torch import nn\ndef net():\n    return nn.Linear(256, 10)\n"
    (tmp_path / "nets_of_this_test.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    words = ["compare", "--model", "nets_of_this_test:net", "--batch-size", "20000", *SMALL]
    assert call(monkeypatch, *words, "--out", str(tmp_path / "out")) == 2
    assert capsys.readouterr().err.splitlines() == [
        "curvlab: model 'nets_of_this_test:net' names no data set: choose one with --data, "
        "or return (module, likelihood, data set)"
    ]
    assert not (tmp_path / "out").exists()
    assert call(monkeypatch, *words, "--data", "mnist16") == 0
    run = next((tmp_path / "runs").iterdir())
    assert cl.open(run).attrs["model"] == "nets_of_this_test:net"


def test_data_that_are_not_there_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CURVLAB_DATA", str(tmp_path))
    monkeypatch.setenv("CURVLAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setitem(
        FILES,
        "cifar-10-python.tar.gz",
        File(("0" * 64,), "http://127.0.0.1:1/cifar-10-python.tar.gz"),
    )
    assert (
        call(monkeypatch, "compare", "--model", "resnet32", *SMALL, "--out", str(tmp_path / "out"))
        == 2
    )
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert f"cifar-10-python.tar.gz was not found in {tmp_path}" in lines[0]
    assert "set CURVLAB_DATA to a folder that has it" in lines[0]
