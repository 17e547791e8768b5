"""Every script and notebook of analyses/ runs, in small; figures and tables by name: test_reproduction.py."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from curvlab.reproduction.index import FOLDERS

ANALYSES = Path(__file__).resolve().parent.parent / "analyses"

SMALL = ["--batch-size", "20000", "--steps", "2"]
SCRIPTS: dict[str, tuple[list[str], str]] = {
    "own_model.py": ([], "shampoo"),
    "damping_sweep.py": ([*SMALL, "--dampings", "1", "0.01", "--out", "OUT"], "damping_sweep.png"),
    "refresh.py": ([*SMALL, "--every", "2"], "last loss"),
    "assumptions.py": (["--steps", "2", "--examples", "60", "--out", "OUT"], "assumptions.png"),
    "scaling.py": (["--repeats", "1", "--largest", "2", "--out", "OUT"], "scaling.png"),
    "which_curvature.py": (["--steps", "1", "--warm", "1", "--out", "OUT"], "which_curvature.png"),
    "benchmarks/exact.py": (["--examples", "20", "--skip", "autoencoder", "memory"], "of the peak"),
    "benchmarks/steps.py": (["--problems", "vgg", "--names", "adam", "k-bfgs", "--batch-size", "40"], "torch Adam"),
    "benchmarks/probes.py": (
        ["--models", "mlp-256-20", "--names", "loss", "damping", "--batch-size", "40", "--repeats", "1", "--steps", "3"],
        "with all probes at their own steps",
    ),
    "benchmarks/products.py": (["--models", "mlp-256-20", "--examples", "20", "--columns", "1", "3"], "curvlinops / ours"),
    "benchmarks/log.py": (["--seconds", "0.5", "--models", "mlp-256-20", "--algorithms", "adam"], "records and writes"),
    "benchmarks/compare.py": (
        ["--batch-size", "20000", "--steps", "2", "--repeats", "1", "--names", "kfac", "sgd-m"],
        "together / one by one",
    ),
}
"""{script: (arguments, what its output says)}"""


BY_HAND = {"benchmarks/versions.py", "foreign_models.py"}
"""Need what no test installs: the extra `foreign`."""


def test_every_script_is_here() -> None:
    """Those of figures and tables by name are in test_reproduction.py."""
    here = {p for p in ANALYSES.rglob("*.py") if p.parent.name not in FOLDERS}
    assert {str(p.relative_to(ANALYSES)) for p in here} == SCRIPTS.keys() | BY_HAND


LONG = {
    "damping_sweep.py", "assumptions.py", "refresh.py", "benchmarks/compare.py", "benchmarks/probes.py", "benchmarks/exact.py",
}  # fmt: skip


@pytest.mark.parametrize("script", [pytest.param(s, marks=[pytest.mark.slow] if s in LONG else []) for s in SCRIPTS])
def test_script(script: str, tmp_path: Path) -> None:
    arguments, says = SCRIPTS[script]
    words = [str(tmp_path) if word == "OUT" else word for word in arguments]
    done = subprocess.run([sys.executable, str(ANALYSES / script), *words], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert says in done.stdout
    for name in says.split():
        assert not name.endswith(".png") or (tmp_path / name).stat().st_size > 10_000


def test_the_user_script_takes_ten_lines() -> None:
    lines = (ANALYSES / "own_model.py").read_text().split('"""', 2)[2].splitlines()
    assert len([line for line in lines if line.strip()]) <= 10


@pytest.mark.parametrize("path", sorted(ANALYSES.glob("*.ipynb")), ids=lambda p: p.name)
def test_notebook(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(path.parent)}}).execute()
    pictures = [o for c in notebook.cells for o in c.get("outputs", []) if "image/png" in o.get("data", {})]
    assert len(pictures) == 3
