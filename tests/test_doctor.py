"""`curvlab doctor`: what it says of an installation and of runs in every state."""

from __future__ import annotations

import shutil
from importlib import metadata
from pathlib import Path

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import curvlab as cl
from curvlab import doctor
from curvlab.cli.app import app
from curvlab.system.lock import exclusive_lock


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("doctor") / "run")


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "run"))


def train(folder: Path, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    objective = cl.Objective(nn.Linear(3, 2), cl.likelihoods.Categorical())
    cl.train(objective, [(torch.randn(4, 3), torch.tensor([0, 1, 0, 1]))], epochs=2, folder=folder)
    return folder


def of(run: Path) -> dict[str, doctor.Finding]:
    return {found.what: found for found in doctor.examine(run).sections["run"]}


def test_the_installation_on_one_page() -> None:
    page = doctor.examine()
    assert list(page.sections) == ["installation", "libraries", "machine", "surroundings", "data"]
    libraries = {found.what: found.says for found in page.sections["libraries"]}
    assert libraries["torch"].startswith(metadata.version("torch"))
    assert {"numpy", "xarray", "h5netcdf", "h5py", "matplotlib", "typer", "rich"} <= set(libraries)
    machine = {found.what: found.says for found in page.sections["machine"]}
    assert machine["torch's threads"].startswith(f"{torch.get_num_threads()},")
    data = {found.what: found for found in page.sections["data"]}
    assert data["mnist.npz"].state == "good"
    assert data["mnist.npz"].says.endswith(", whole")
    done = CliRunner().invoke(app, ["doctor"])
    assert (done.exit_code, done.stdout.splitlines()[0]) == (0, "installation")


def test_libraries_that_lack_or_are_of_another_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        metadata,
        "requires",
        lambda name: ["nosuch>=1", "torch>=99", "numpy>=1", 'pytest>=8 ; extra == "test"'],
    )
    found = {f.what: f for f in doctor.examine().sections["libraries"]}
    assert {name: f.state for name, f in found.items()} == {
        "nosuch": "bad",
        "torch": "bad",
        "numpy": "",
    }
    assert "pip install 'nosuch>=1'" in found["nosuch"].says
    assert ">=99 is wanted" in found["torch"].says
    done = CliRunner().invoke(app, ["doctor"])
    assert done.exit_code == 1
    assert "! nosuch" in done.stdout


def test_data_that_are_damaged_or_nowhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "a9a").write_bytes(b"other")
    monkeypatch.setenv("CURVLAB_DATA", str(tmp_path))
    monkeypatch.setenv("CURVLAB_CACHE", str(tmp_path / "there is" / "no such"))
    data = {f.what: f for f in doctor.examine().sections["data"]}
    assert data["a9a"].state == "bad"
    assert "is damaged (SHA-256" in data["a9a"].says
    assert data["cache"].state == "good"  # it can be made
    assert not (tmp_path / "there is").exists()
    assert "a9a.t" in data["not here"].says
    monkeypatch.setenv("CURVLAB_DATA", "~nosuchuser/data")
    (found,) = doctor.examine().sections["data"]
    assert (found.what, found.state) == ("folders", "bad")


def test_a_run_that_is_whole(run: Path) -> None:
    found = of(run)
    assert [found[what].state for what in ("folder", "log", "checkpoint", "together")] == [
        "good"
    ] * 4
    assert found["length"].says == "2 epochs, 2 steps"
    assert found["checkpoint"].says.endswith("after 2 steps, 0 of them in epoch 3")
    assert "curvlab.train(…" in found["to go on"].says  # no command line has begun it
    assert not doctor.examine(run).bad
    assert of(run / "run.h5") == found
    done = CliRunner().invoke(app, ["doctor", str(run)])
    assert done.exit_code == 0
    assert "✓ checkpoint" in done.stdout


@pytest.mark.parametrize(("file", "what"), [("run.h5", "log"), ("checkpoint.pt", "checkpoint")])
def test_a_flipped_bit(run: Path, file: str, what: str) -> None:
    held = bytearray((run / file).read_bytes())
    held[len(held) // 2] ^= 4
    (run / file).write_bytes(held)
    found = of(run)
    assert found[what].state == "bad"
    assert "damaged" in found[what].says
    done = CliRunner().invoke(app, ["doctor", str(run)])
    assert done.exit_code == 1
    assert f"! {what}" in done.stdout


def test_a_checkpoint_of_another_run(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("curvlab.logs.log.git_commit", lambda: "another")
    shutil.copy(train(tmp_path / "other", 1) / "checkpoint.pt", run / "checkpoint.pt")
    assert of(run)["together"].state == "bad"


def test_folders_in_use_empty_or_cut_short(run: Path, tmp_path: Path) -> None:
    with exclusive_lock(run / "run.h5"):
        found = of(run)
        assert "process" in found["in use"].says
        assert found["to go on"].says.startswith("wait")
    assert "in use" not in of(run)
    (run / ".run.h5.part").touch()
    assert ".run.h5.part" in of(run)["left over"].says
    (run / "run.h5").unlink()
    (run / "checkpoint.pt").unlink()
    found = of(run)
    assert found["log"].says.startswith("none")
    assert found["to go on"].says == "start it"
    with pytest.raises(cl.CurvlabError, match="there is no folder"):
        doctor.examine(tmp_path / "nowhere")


def test_a_run_of_the_command_line(tmp_path: Path) -> None:
    folder = tmp_path / "o$o"
    words = [
        "train",
        "--model",
        "mlp-256-20",
        "--steps",
        "2",
        "--batch-size",
        "100",
        "--evaluate-samples",
        "100",
    ]
    assert CliRunner().invoke(app, [*words, "--no-warm-start", "--out", str(folder)]).exit_code == 0
    found = of(folder)
    assert found["call"].says.startswith("curvlab train --model mlp-256-20 ")
    assert "\\" not in found["call"].says
    assert (
        found["to go on"].says
        == f"it has reached its end; for a longer run: curvlab train --resume --out '{folder}'"
        " --epochs N"
    )


def test_nothing_is_written(run: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in run.rglob("*")}
    doctor.examine(run)
    assert {p: p.stat().st_mtime_ns for p in run.rglob("*")} == before
