"""Every script and notebook of analyses/ runs, in small; figures and tables by name:
test_reproduction.py.
"""

from __future__ import annotations

import io
import os
import runpy
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import nbformat
import pytest
from forked import forked
from IPython.core.interactiveshell import InteractiveShell
from nbclient import NotebookClient

from curvlab.datasets import DATASETS
from curvlab.reproduction.index import FOLDERS

ANALYSES = Path(__file__).resolve().parent.parent / "analyses"

SMALL = ["--batch-size", "20000", "--steps", "2"]
SCRIPTS: dict[str, tuple[list[str], str]] = {
    "own_model.py": ([], "shampoo"),
    "damping_sweep.py": ([*SMALL, "--dampings", "1", "0.01", "--out", "OUT"], "damping_sweep.png"),
    "refresh.py": ([*SMALL, "--every", "2"], "last loss"),
    "assumptions.py": (["--steps", "2", "--examples", "60", "--out", "OUT"], "assumptions.png"),
    "scaling.py": (["--repeats", "1", "--largest", "2", "--out", "OUT"], "scaling.png"),
    "language_training.py": (
        [
            "--model",
            "gpt-tiny",
            "--screen",
            "1",
            "--steps",
            "2",
            "--seeds",
            "0",
            "--methods",
            "adamw",
            "--out",
            "OUT",
        ],
        "language_training.png",
    ),
    "kronecker_fits.py": (
        ["--steps", "0", "--seeds", "0", "--models", "mlp-256-20", "--out", "OUT"],
        "least KL: True",
    ),
    "adahessian_diagonal.py": (
        ["--draws", "500", "--examples", "40", "--steps", "2", "--out", "OUT"],
        "over its limit",
    ),
    "which_curvature.py": (["--steps", "1", "--warm", "1", "--out", "OUT"], "which_curvature.png"),
    "benchmarks/exact.py": (["--examples", "20", "--skip", "autoencoder", "memory"], "of the peak"),
    "benchmarks/steps.py": (
        ["--problems", "vgg", "--names", "adam", "k-bfgs", "--batch-size", "40"],
        "torch Adam",
    ),
    "benchmarks/probes.py": (
        [
            "--models",
            "mlp-256-20",
            "--names",
            "loss",
            "damping",
            "--batch-size",
            "40",
            "--repeats",
            "1",
            "--steps",
            "3",
        ],
        "with all probes at their own steps",
    ),
    "benchmarks/products.py": (
        ["--models", "mlp-256-20", "--examples", "20", "--columns", "1", "3"],
        "curvlinops / ours",
    ),
    "benchmarks/language.py": (
        ["--quick", "--skip", "func", "curvlinops", "memory"],
        "of the peak",
    ),
    "benchmarks/watch.py": (
        ["--steps", "4", "--rounds", "1", "--every", "2", "--batch-size", "20"],
        "sgd-m",
    ),
    "benchmarks/log.py": (
        ["--seconds", "0.5", "--models", "mlp-256-20", "--algorithms", "adam"],
        "records and writes",
    ),
    "benchmarks/compare.py": (
        ["--batch-size", "20000", "--steps", "2", "--repeats", "1", "--names", "kfac", "sgd-m"],
        "together / one by one",
    ),
}
"""{script: (arguments, what its output says)}"""


BY_HAND = {
    "benchmarks/versions.py",
    "benchmarks/recorded.py",
    "benchmarks/scale.py",
    "benchmarks/sweep.py",
    "foreign_models.py",
    "transformers_matrices.py",
    "your_own_language_model.ipynb",
}
"""Need what no test installs (the extra `foreign`, another checkout), or several processes."""


def test_every_script_is_here() -> None:
    """Those of figures and tables by name are in test_reproduction.py."""
    here = {p for p in ANALYSES.rglob("*.py") if p.parent.name not in FOLDERS}
    assert {str(p.relative_to(ANALYSES)) for p in here} == SCRIPTS.keys() | {
        name for name in BY_HAND if name.endswith(".py")
    }


LONG = {
    "damping_sweep.py", "assumptions.py", "which_curvature.py", "refresh.py",
    "benchmarks/compare.py", "benchmarks/probes.py", "benchmarks/exact.py", "benchmarks/steps.py",
}  # fmt: skip


APART = {"own_model.py"}
"""In a process of its own, as a user runs them; the others in a fork of this one, which has
imported everything.
"""


def run(script: str, words: list[str], folder: Path) -> tuple[int, str]:
    """(exit code, what was said)."""
    path = str(ANALYSES / script)
    if script in APART:
        done = subprocess.run(
            [sys.executable, path, *words], capture_output=True, text=True, cwd=folder
        )
        return done.returncode, done.stdout + done.stderr

    def work() -> None:
        os.chdir(folder)
        sys.argv = [path, *words]
        sys.path.insert(0, str(Path(path).parent))
        runpy.run_path(path, run_name="__main__")

    return forked(work)


@pytest.mark.thinned(2)
@pytest.mark.parametrize(
    "script", [pytest.param(s, marks=[pytest.mark.slow] if s in LONG else []) for s in SCRIPTS]
)
def test_script(script: str, tmp_path: Path) -> None:
    arguments, says = SCRIPTS[script]
    code, said = run(
        script, [str(tmp_path) if word == "OUT" else word for word in arguments], tmp_path
    )
    assert code == 0, said
    assert says in said
    for name in says.split():
        assert not name.endswith(".png") or (tmp_path / name).stat().st_size > 10_000


def test_the_user_script_takes_ten_lines() -> None:
    lines = (ANALYSES / "own_model.py").read_text().split('"""', 2)[2].splitlines()
    assert len([line for line in lines if line.strip()]) <= 10


NOTEBOOKS = sorted(p for p in ANALYSES.glob("*.ipynb") if p.name not in BY_HAND)


@pytest.mark.slow
@pytest.mark.parametrize("path", [pytest.param(p, id=p.name) for p in NOTEBOOKS])
def test_notebook_by_a_kernel(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(
        notebook, timeout=300, resources={"metadata": {"path": str(path.parent)}}
    ).execute()
    pictures = [
        o for c in notebook.cells for o in c.get("outputs", []) if "image/png" in o.get("data", {})
    ]
    assert len(pictures) == 3


LENGTHY = {"comparing_two_runs.ipynb"}


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(p, id=p.name, marks=[pytest.mark.slow] if p.name in LENGTHY else [])
        for p in NOTEBOOKS
    ],
)
def test_notebook(path: Path) -> None:
    """Its cells in IPython's own shell, in a fork of this process, on a third of the digits; its
    pictures are drawn.
    """
    cells = [
        cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"
    ]
    code, said = forked(partial(cell_by_cell, cells, path.parent))
    assert code == 0, said
    assert said.splitlines()[-1] == "3 pictures"


def cell_by_cell(cells: list[str], folder: Path) -> None:
    os.chdir(folder)
    train, test = (
        replace(part, x=part.x[::3], y=part.y[::3]) for part in DATASETS["mnist16"].load()
    )
    DATASETS["mnist16"] = replace(DATASETS["mnist16"], load=lambda: (train, test))
    matplotlib.use("Agg")
    shell, pictures = InteractiveShell.instance(), 0
    for cell in cells:
        shell.run_cell(cell).raise_error()
        for number in plt.get_fignums():
            plt.figure(number).savefig(io.BytesIO())
            pictures += 1
        plt.close("all")
    print(f"{pictures} pictures")
