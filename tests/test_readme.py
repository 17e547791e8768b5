"""The README keeps its word: its script runs, its tables name what the tables hold, its test command is what CI runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import curvlab as cl
from curvlab.algorithms import ALGORITHMS, damping_for
from curvlab.observation import PASSES
from curvlab.probes import PROBES
from curvlab.probes.costs import COSTS
from curvlab.spectra import VARIABLES
from curvlab.training.records import VARIABLES as TRAINING

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def block_after(marker: str) -> str:
    found = re.search(re.escape(marker) + r"\s*```\w+\n(.*?)```", README, re.DOTALL)
    assert found
    return found.group(1)


def test_the_ten_lines_run(capsys: pytest.CaptureFixture[str]) -> None:
    script = block_after("<!-- executed by the tests -->")
    assert len([line for line in script.splitlines() if line and not line.startswith("import")]) <= 10
    exec(compile(script, "README.md", "exec"), {})
    assert re.fullmatch(r"loss 2\.\d{3}, KFAC bounded by \d+, exact Fisher block has 420 rows\n", capsys.readouterr().out)


def test_two_commands_set_everything_up() -> None:
    commands = re.findall(r"^python3 -m venv .*$", README, re.MULTILINE)
    assert len(commands) == 2
    assert commands[0].endswith(".venv/bin/curvlab compare --model mlp-256-20")
    assert commands[1] == block_after("<!-- test command -->").strip()


def test_ci_runs_the_test_command_as_written() -> None:
    ci = (ROOT / ".ci" / "run").read_text()
    assert "<!-- test command -->" in ci
    assert all(tool in ci for tool in ("ruff check", "ruff format --check", "mypy", "lint-imports"))


def rows(header: str) -> list[list[str]]:
    lines = README[README.index(header) :].splitlines()[2:]
    table = []
    for line in lines:
        if not line.startswith("|"):
            break
        table.append([cell.strip() for cell in line.strip("|").split("|")])
    return table


def test_the_table_of_algorithms_is_complete_and_true() -> None:
    table = rows("| name | what it is | labels |")
    assert [row[0].strip("`") for row in table] == list(ALGORITHMS)
    assert [row[2] for row in table] == [a.labels for a in ALGORITHMS.values()]


def test_the_log_schema_is_complete_and_true() -> None:
    table = {name.strip("` "): row[1] for row in rows("| variable | dimensions | what |") for name in row[0].split(",")}
    expected = {name: ", ".join(("step", *v.dims)) for p in PROBES.values() for name, v in p.variables.items()}
    expected |= {name: ", ".join(("epoch", *v.dims)) for p in PROBES.values() for name, v in p.epoch.items()}
    assert table == expected


def test_the_table_of_probes_is_complete_and_true() -> None:
    table = rows("| probe | of | every | cost |")
    expected = [
        [f"`{name}`", ", ".join(p.where), str(p.every), ", ".join(f"{c:g}" for c in COSTS[name])] for name, p in PROBES.items()
    ]
    assert [row[:4] for row in table] == expected
    of_train = {name: COSTS[name][0] / p.every for name, p in PROBES.items() if "train" in p.where}
    del of_train["alignment"]  # shares the Lanczos runs of the spectrum
    assert sum(of_train.values()) <= 1  # all together at most double a training step


def test_the_schema_of_spectra_is_complete_and_true() -> None:
    table = {name.strip("` "): row[1] for row in rows("| variable | dimensions of a spectrum |") for name in row[0].split(",")}
    assert table == {name: ", ".join(("step", *dims)) for name, (dims, *_) in VARIABLES.items()}


def test_the_training_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(block_after("<!-- training, executed by the tests -->"), "README.md", "exec"), {})
    assert re.fullmatch(r"loss 0\.\d\d after 60 steps\n", capsys.readouterr().out)


def test_your_own_model(capsys: pytest.CaptureFixture[str]) -> None:
    here: dict[str, object] = {}
    exec(compile(block_after("<!-- your own model, executed by the tests -->"), "README.md", "exec"), here)
    assert "2 uses" in capsys.readouterr().out
    objective, x, y, F = (here[name] for name in ("objective", "x", "y", "F"))
    other = cl.exact.matrix(objective, x, y, kind="ggn", block="1", route="func")
    torch.testing.assert_close(F.dense(), other.dense(), rtol=1e-4, atol=1e-7)


def test_the_schema_of_training_is_complete_and_true() -> None:
    table = {name.strip("` "): row[1] for row in rows("| variable | dimensions of training |") for name in row[0].split(",")}
    assert table == {name: ", ".join(("epoch", *dims)) for name, (dims, *_) in TRAINING.items()}


def test_the_passes_are_complete() -> None:
    assert tuple(row[0].strip('`"') for row in rows("| pass | vectors sent back |")) == PASSES


def test_the_damping_rule_is_as_written() -> None:
    same = ("block-fisher", "block-ef", "block-ggn", "block-hessian", "kfac", "kfac-20", "kfac-ef", "kflr")
    for name in (*same, "smw-ng-bd", "smw-ng", "smw-gn", "hf"):
        assert damping_for(name, 0.04, 100) == 0.04
    for name in ("tnt-per-sample", "tnt-ideal"):
        assert damping_for(name, 0.04, 100) == pytest.approx(0.2)
    for name in ("tnt", "tnt-ef", "adam", "rmsprop"):
        assert damping_for(name, 0.04, 100) == pytest.approx(0.02)
    assert damping_for("shampoo", 0.04, 100) == 3e-4


def test_nothing_else_at_the_top() -> None:
    ignored = ("runs", "dist", "build")
    tracked = {p.name for p in ROOT.iterdir() if not p.name.startswith(".") and p.name not in ignored}
    assert tracked == {"CHANGELOG.md", "LICENSE", "README.md", "analyses", "curvlab", "data", "pyproject.toml", "tests"}
