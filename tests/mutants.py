"""Do the thinned tests kill as many faults as all their cases? Seeded mutants of the code.

    python tests/mutants.py [--count 30] [--seed 0] [--files test_contract.py] [--out FILE.json]

A mutant is one change of an operator, a comparison, a number, a sign or a transpose in a function
of `MODULES`. All thinned tests (`thinned(k)`) run once with the lines noted that each case goes
through. Mutants are drawn of the statements that some case goes through, and run against these
cases and no others: first those of every day, up to the first failure; where none fails the others
too. So a mutant that the first kill both kill. Prints a line a mutant and both sums.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from coverage import CoverageData

HERE = Path(__file__).parent
ROOT = HERE.parent
MODULES = (
    "capture.py",
    "uses.py",
    "statistics.py",
    "arrangements.py",
    "functions.py",
    "descent.py",
    "momentum.py",
    "curvature/*.py",
    "exact/matrices.py",
    "exact/second_order.py",
    "exact/samples.py",
    "exact/torch_func.py",
    "linalg/kronecker.py",
    "linalg/cholesky.py",
    "linalg/bfgs.py",
    "linalg/pair_damping.py",
    "linalg/woodbury.py",
)
OPERATORS = {
    ast.Add: "-",
    ast.Sub: "+",
    ast.Mult: "/",
    ast.Div: "*",
    ast.Lt: ">",
    ast.Gt: "<",
    ast.LtE: "<",
    ast.GtE: ">",
    ast.Eq: "!=",
    ast.NotEq: "==",
}
"""{what stands: what the mutant has in its place}"""


@dataclass(frozen=True)
class Mutant:
    """One change of the text, of a statement in `lines`: from `start` to `end` becomes `new`."""

    path: str
    lines: range
    line: int
    start: int
    end: int
    new: str

    def applied(self, text: str) -> str:
        """Return the module's text with the change."""
        return text[: self.start] + self.new + text[self.end :]

    def cases(self, by_line: Mapping[int, set[str]]) -> set[str]:
        """Return the cases that go through its statement."""
        return set[str]().union(*(by_line.get(line, set()) for line in self.lines))


def mutants(path: Path) -> Iterator[Mutant]:
    """Yield every mutant of a module's functions."""
    text = path.read_text()
    starts = [0]
    for line in text.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))

    def at(line: int, column: int) -> int:  # of a line in ASCII, as ours nearly all are
        prefix = text[starts[line - 1] :].encode()[:column].decode(errors="ignore")
        return starts[line - 1] + len(prefix)

    def between(left: ast.expr, right: ast.expr, new: str) -> Iterator[Mutant]:
        start = at(left.end_lineno or 0, left.end_col_offset or 0)
        end = at(right.lineno, right.col_offset)
        gap = text[start:end].strip()
        if gap in ("+", "-", "*", "/", "<", ">", "<=", ">=", "==", "!="):
            yield Mutant(name, lines, left.end_lineno or 0, start, end, f" {new} ")

    name = str(path.relative_to(ROOT / "curvlab"))
    inside = [
        statement
        for function in ast.walk(ast.parse(text))
        if isinstance(function, ast.FunctionDef)
        for body in function.body
        for statement in ast.walk(body)
        if isinstance(statement, ast.stmt)
    ]  # outer ones before inner ones, which take their places in `found`
    found: dict[tuple[int, int, str], Mutant] = {}
    for statement in inside:
        lines = range(statement.lineno, (statement.end_lineno or statement.lineno) + 1)
        for node in ast.walk(statement):
            some: Iterator[Mutant] = iter(())
            if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
                some = between(node.left, node.right, OPERATORS[type(node.op)])
            elif isinstance(node, ast.Compare) and type(node.ops[0]) in OPERATORS:
                some = between(node.left, node.comparators[0], OPERATORS[type(node.ops[0])])
            elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
                start = at(node.lineno, node.col_offset)
                some = iter([Mutant(name, lines, node.lineno, start, start + 1, "+")])
            elif isinstance(node, ast.Attribute) and node.attr in ("mT", "T"):
                start = at(node.value.end_lineno or 0, node.value.end_col_offset or 0)
                end = at(node.end_lineno or 0, node.end_col_offset or 0)
                some = iter([Mutant(name, lines, node.lineno, start, end, "")])
            elif isinstance(node, ast.Constant) and type(node.value) in (int, float):
                start = at(node.lineno, node.col_offset)
                end = at(node.end_lineno or 0, node.end_col_offset or 0)
                new = (
                    "1" if node.value == 0 else "0" if node.value == 1 else f"({node.value!r} * 2)"
                )
                some = iter([Mutant(name, lines, node.lineno, start, end, new)])
            for mutant in some:
                found[mutant.start, mutant.end, mutant.new] = mutant
    yield from (found[key] for key in sorted(found))


def cases_by_line(
    paths: list[Path], tests: list[str], folder: Path
) -> dict[str, dict[int, set[str]]]:
    """Return {module: {line: cases that go through it}}, of all cases of the thinned tests.

    What a fixture goes through counts for every case of the test that was its first.
    """
    noted = folder / "coverage"
    (folder / "coveragerc").write_text(
        "[run]\ninclude =\n" + "".join(f"    {path}\n" for path in paths)
    )
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "thinned"]
    told = ["--cov", "--cov-context=test", "--cov-report=", f"--cov-config={folder / 'coveragerc'}"]
    subprocess.run(
        [*command, *told, *tests],
        cwd=HERE,
        env=os.environ | {"COVERAGE_FILE": str(noted), "OMP_NUM_THREADS": "1"},
        check=True,
    )
    found: dict[str, dict[int, set[str]]] = {}
    data = CoverageData(str(noted))
    data.read()
    for path in paths:
        by_line = data.contexts_by_lineno(str(path)) if str(path) in data.measured_files() else {}
        found[str(path.relative_to(ROOT / "curvlab"))] = {
            line: {
                case.partition("[")[0] if when == "setup" else case
                for case, _, when in (context.rpartition("|") for context in contexts)
                if case
            }
            for line, contexts in by_line.items()
        }
    return found


def failing(package: Path, marks: str, cases: Collection[str]) -> str | None:
    """Return the first of the cases that fails with the package that lies there; None: all pass."""
    if not cases:
        return None
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-n0"]
    here = os.environ | {"PYTHONPATH": str(package), "OMP_NUM_THREADS": "1"}
    chosen = package / "cases"
    chosen.write_text("".join(f"{case}\n" for case in sorted(cases)))
    ran = subprocess.run(
        [*command, "-m", marks, f"@{chosen}"],
        cwd=package,
        env=here,
        capture_output=True,
        text=True,
    )
    if ran.returncode in (0, 5):  # 5: no such test
        return None
    lines = [line for line in ran.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return lines[0].split(" - ")[0] if lines else f"exit {ran.returncode}: {ran.stderr[-300:]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--files", nargs="+", help="of tests; all that have thinned ones by default"
    )
    parser.add_argument("--out", type=Path, help="write what was found there, after each")
    options = parser.parse_args()
    tests = options.files or [
        path.name for path in sorted(HERE.glob("test_*.py")) if "mark.thinned(" in path.read_text()
    ]
    places = [path for pattern in MODULES for path in sorted((ROOT / "curvlab").glob(pattern))]
    every = [mutant for path in places for mutant in mutants(path)]
    with tempfile.TemporaryDirectory() as noted:
        through = cases_by_line(places, tests, Path(noted))
    met = [(mutant, cases) for mutant in every if (cases := mutant.cases(through[mutant.path]))]
    print(
        f"{len(every)} mutants of {len(places)} modules, {len(met)} of which some case of"
        f" {len(tests)} files of thinned tests goes through"
    )
    rows = []
    for number, (mutant, cases) in enumerate(
        random.Random(options.seed).sample(met, options.count)
    ):
        with tempfile.TemporaryDirectory() as folder:
            package = Path(folder)
            shutil.copytree(ROOT / "curvlab", package / "curvlab")
            shutil.copytree(ROOT / "tests", package / "tests")
            for other in ("analyses", "data", "docs", "pyproject.toml", "README.md"):
                (package / other).symlink_to(ROOT / other)
            file = package / "curvlab" / mutant.path
            text = file.read_text()
            old = text[mutant.start : mutant.end].strip()
            file.write_text(mutant.applied(text))
            daily = failing(package, "thinned and not slow", cases)
            whole = daily or failing(package, "thinned and slow", cases)
        word = "killed by both" if daily else "KILLED BY THE WHOLE ALONE" if whole else "lives"
        what = f"{mutant.path}:{mutant.line}: {old!r} → {mutant.new.strip()!r}"
        by = f"of {len(cases)} cases {(daily or whole or '')[-90:]}"
        print(f"{number:3d} {what}: {word} {by}", flush=True)
        rows.append({"mutant": what, "cases": len(cases), "daily": daily, "whole": whole})
        if options.out:
            options.out.write_text(json.dumps(rows, indent=1))
    killed = [sum(row[which] is not None for row in rows) for which in ("daily", "whole")]
    print(f"of {len(rows)} mutants the thinned tests kill {killed[0]}, all their cases {killed[1]}")


if __name__ == "__main__":
    main()
