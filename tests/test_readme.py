"""The README and the guide keep their word: scripts run, tables by hand name what the code holds,
commands are what CI runs.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

import curvlab as cl
from curvlab.algorithms import ALGORITHMS, damping_for
from curvlab.exact import KINDS, ROUTES
from curvlab.observation import PASSES
from curvlab.probes import PROBES
from curvlab.probes.costs import COSTS

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
README = (ROOT / "README.md").read_text()


def block_after(marker: str, text: str = README) -> str:
    found = re.search(re.escape(marker) + r"\s*```\w+\n(.*?)```", text, re.DOTALL)
    assert found
    return found.group(1)


def page(name: str) -> str:
    return (DOCS / f"{name}.md").read_text()


def test_it_is_one_page() -> None:
    assert len(README.splitlines()) <= 150


def test_the_twelve_lines_run(capsys: pytest.CaptureFixture[str]) -> None:
    script = block_after("<!-- executed by the tests -->")
    assert len([line for line in script.splitlines() if line]) <= 12
    exec(compile(script, "README.md", "exec"), {})
    assert re.fullmatch(
        r"loss 2\.\d{3}, KFAC at most \d+, exact Fisher block of 420 rows\n",
        capsys.readouterr().out,
    )


def test_two_commands_set_everything_up() -> None:
    commands = re.findall(r"^python3 -m venv .*$", README, re.MULTILINE)
    assert len(commands) == 2
    assert commands[0].endswith(".venv/bin/curvlab compare --model mlp-256-20")
    assert commands[1] == block_after("<!-- test command -->").strip()


def test_one_command_builds_the_documentation() -> None:
    assert (
        block_after("<!-- documentation command -->")
        .strip()
        .endswith("sphinx-build -W -b html docs docs/_build/html")
    )


def test_ci_runs_the_commands_as_written() -> None:
    ci = (ROOT / ".ci" / "run").read_text()
    assert all(tool in ci for tool in ("ruff check", "ruff format --check", "mypy", "lint-imports"))
    function = next(line for line in ci.splitlines() if line.startswith("block()"))
    for name in ("test command", "documentation command"):
        assert f'"{name}"' in ci
        found = subprocess.run(
            ["bash", "-c", f'{function}; block "{name}"'],
            capture_output=True,
            text=True,
            cwd=ROOT,
            check=True,
        )
        assert found.stdout == block_after(f"<!-- {name} -->")


def test_its_links_lead_somewhere() -> None:
    for name in ("README.md", "CONTRIBUTING.md", "analyses/README.md"):
        for target in re.findall(r"\]\(([^)#]+)(?:#[\w-]+)?\)", (ROOT / name).read_text()):
            assert target.startswith("https://") or ((ROOT / name).parent / target).exists(), (
                name,
                target,
            )


def test_every_page_of_the_guide_is_named_in_it() -> None:
    held = {"index", "guide", "reference", "development", "contributing", "changelog"}
    for path in DOCS.glob("*.md"):
        assert path.stem in held or f"docs/{path.name}" in README, path.name


def rows(text: str, header: str) -> list[list[str]]:
    lines = text[text.index(header) :].splitlines()[2:]
    table = []
    for line in lines:
        if not line.startswith("|"):
            break
        table.append([cell.strip() for cell in line.strip("|").split("|")])
    return table


def test_the_training_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    exec(
        compile(
            block_after("<!-- training, executed by the tests -->", page("training")),
            "training.md",
            "exec",
        ),
        {},
    )
    assert re.fullmatch(r"loss 0\.\d\d after 60 steps\n", capsys.readouterr().out)


def test_the_watched_loop_runs(capsys: pytest.CaptureFixture[str]) -> None:
    script = block_after("<!-- watch, executed by the tests -->", page("watch"))
    exec(compile(script, "watch.md", "exec"), {})
    assert capsys.readouterr().out.startswith("[[")


def test_your_own_model(capsys: pytest.CaptureFixture[str]) -> None:
    here: dict[str, Any] = {}
    exec(
        compile(
            block_after("<!-- your own model, executed by the tests -->", page("own_model")),
            "own_model.md",
            "exec",
        ),
        here,
    )
    assert "2 uses" in capsys.readouterr().out
    objective, x, y, F = (here[name] for name in ("objective", "x", "y", "F"))
    other = cl.exact.matrix(objective, x, y, kind="ggn", block="1", route="func")
    torch.testing.assert_close(F.dense(), other.dense(), rtol=1e-4, atol=1e-7)
    more = "<!-- minibatches of several tensors, executed by the tests -->"
    exec(compile(block_after(more, page("own_model")), "own_model.md", "exec"), here)
    single = cl.exact.matrix(here["objective"], here["batch"], None, kind="ggn", block="2")
    torch.testing.assert_close(here["F"].dense(), single.dense(), rtol=1e-5, atol=1e-8)


def test_all_probes_together_at_most_double_a_training_step() -> None:
    of_train = {name: COSTS[name][0] / p.every for name, p in PROBES.items() if "train" in p.where}
    del of_train["alignment"]  # shares the Lanczos runs of the spectrum
    assert sum(of_train.values()) <= 1


def test_the_passes_are_complete() -> None:
    assert (
        tuple(
            row[0].strip('`"')
            for row in rows(page("fisher_scale_damping"), "| pass | vectors sent back |")
        )
        == PASSES
    )


def test_the_kinds_and_calls_of_exact_curvature_are_complete() -> None:
    text = page("exact")
    assert tuple(row[0].strip("`") for row in rows(text, "| kind | matrix |")) == KINDS
    calls = {
        name for row in rows(text, "| call | gives |") for name in re.findall(r"`(\w+)", row[0])
    }
    assert calls == {
        n for n in cl.exact.__all__ if callable(getattr(cl.exact, n)) and n[0].islower()
    }
    assert "`func`" in text
    assert "func" in ROUTES


def test_the_damping_rule_is_as_written() -> None:
    same = (
        "block-fisher",
        "block-ef",
        "block-ggn",
        "block-hessian",
        "kfac",
        "kfac-20",
        "kfac-ef",
        "kfac-reduce",
        "kflr",
        "foof",
        "ekfac",
        "sophia-g",
    )
    for name in (*same, "smw-ng-bd", "smw-ng", "smw-gn", "hf"):
        assert damping_for(name, 0.04, 100) == 0.04
    for name in ("tnt-per-sample", "tnt-ideal"):
        assert damping_for(name, 0.04, 100) == pytest.approx(0.2)
    for name in ("tnt", "tnt-ef", "adam", "rmsprop", "adamw", "soap", "kl-shampoo"):
        assert damping_for(name, 0.04, 100) == pytest.approx(0.02)
    assert damping_for("asgo", 0.04, 100) == pytest.approx(4e-4)
    assert damping_for("shampoo", 0.04, 100) == 3e-4


def test_what_each_method_damps_is_complete() -> None:
    table = rows(page("fisher_scale_damping"), "| methods | the document's own parameter is |")
    named = [n for row in table for n in re.findall(r"`([\w-]+)`", row[0])]
    assert sorted(named) == sorted(ALGORITHMS)


def test_the_guide_to_methods_names_methods_that_there_are() -> None:
    text = page("choose")
    named = {
        n
        for row in rows(text, "| your problem | begin with |")
        for n in re.findall(r"`([\w-]+)`", row[1])
    }
    assert named <= ALGORITHMS.keys()
    assert len(named) >= 15


def test_nothing_else_at_the_top() -> None:
    ignored = ("runs", "dist", "build")
    tracked = {
        p.name for p in ROOT.iterdir() if not p.name.startswith(".") and p.name not in ignored
    }
    texts = {"CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "LICENSE", "README.md"}
    assert tracked == texts | {"analyses", "curvlab", "data", "docs", "pyproject.toml", "tests"}
