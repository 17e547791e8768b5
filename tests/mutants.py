"""Do the thinned tests kill as many faults as all their cases? Seeded mutants of the code.

    python tests/mutants.py [--count 30] [--seed 0] [--files test_contract.py] [--out FILE.json]

A mutant is one change of an operator, a comparison, a number, a sign or a transpose in a function
of `MODULES`. It runs against the tests that are thinned (`thinned(k)`): first the cases of every
day, up to the first failure; where none fails the others too, which are a superset only together
with them. So a mutant that the first kill both kill. Prints a line a mutant and both sums. Minutes
a mutant that lives.
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
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

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
    """One change of the text: what lies from `start` to `end` becomes `new`."""

    path: str
    line: int
    start: int
    end: int
    new: str

    def applied(self, text: str) -> str:
        """Return the module's text with the change."""
        return text[: self.start] + self.new + text[self.end :]


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
            yield Mutant(name, left.end_lineno or 0, start, end, f" {new} ")

    name = str(path.relative_to(ROOT / "curvlab"))
    inside = [
        statement
        for function in ast.walk(ast.parse(text))
        if isinstance(function, ast.FunctionDef)
        for statement in function.body
    ]
    found: dict[tuple[int, int, str], Mutant] = {}
    for statement in inside:
        for node in ast.walk(statement):
            some: Iterator[Mutant] = iter(())
            if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
                some = between(node.left, node.right, OPERATORS[type(node.op)])
            elif isinstance(node, ast.Compare) and type(node.ops[0]) in OPERATORS:
                some = between(node.left, node.comparators[0], OPERATORS[type(node.ops[0])])
            elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
                start = at(node.lineno, node.col_offset)
                some = iter([Mutant(name, node.lineno, start, start + 1, "+")])
            elif isinstance(node, ast.Attribute) and node.attr in ("mT", "T"):
                start = at(node.value.end_lineno or 0, node.value.end_col_offset or 0)
                end = at(node.end_lineno or 0, node.end_col_offset or 0)
                some = iter([Mutant(name, node.lineno, start, end, "")])
            elif isinstance(node, ast.Constant) and type(node.value) in (int, float):
                start = at(node.lineno, node.col_offset)
                end = at(node.end_lineno or 0, node.end_col_offset or 0)
                new = (
                    "1" if node.value == 0 else "0" if node.value == 1 else f"({node.value!r} * 2)"
                )
                some = iter([Mutant(name, node.lineno, start, end, new)])
            for mutant in some:
                found[mutant.start, mutant.end, mutant.new] = mutant
    yield from (found[key] for key in sorted(found))


def failing(package: Path, marks: str, tests: list[str]) -> str | None:
    """Return the first test that fails with the package that lies there; None: all pass."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-n0"]
    here = os.environ | {"PYTHONPATH": str(package), "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(
        [*command, "-m", marks, *tests],
        cwd=package,
        env=here,
        capture_output=True,
        text=True,
    )
    if ran.returncode in (0, 5):  # 5: no such test
        return None
    lines = [line for line in ran.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return lines[0].split(" - ")[0] if lines else f"exit {ran.returncode}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--skip", type=int, default=0, help="of the drawn mutants, the first")
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
    drawn = random.Random(options.seed).sample(every, options.count)
    print(f"{len(every)} mutants of {len(places)} modules; {len(tests)} files of thinned tests")
    rows = []
    for number, mutant in enumerate(drawn[options.skip :], options.skip):
        with tempfile.TemporaryDirectory() as folder:
            package = Path(folder)
            shutil.copytree(ROOT / "curvlab", package / "curvlab")
            shutil.copytree(ROOT / "tests", package / "tests")
            for other in ("analyses", "data", "docs", "pyproject.toml", "README.md"):
                (package / other).symlink_to(ROOT / other)
            own = [str(package / "tests" / test) for test in tests]
            file = package / "curvlab" / mutant.path
            text = file.read_text()
            old = text[mutant.start : mutant.end].strip()
            file.write_text(mutant.applied(text))
            daily = failing(package, "thinned and not slow", own)
            whole = daily or failing(package, "thinned and slow", own)
        word = "killed by both" if daily else "KILLED BY THE WHOLE ALONE" if whole else "lives"
        what = f"{mutant.path}:{mutant.line}: {old!r} → {mutant.new.strip()!r}"
        print(f"{number:3d} {what}: {word} {(daily or whole or '')[-90:]}", flush=True)
        rows.append({"mutant": what, "daily": daily, "whole": whole})
        if options.out:
            options.out.write_text(json.dumps(rows, indent=1))
    killed = [sum(row[which] is not None for row in rows) for which in ("daily", "whole")]
    print(f"of {len(rows)} mutants the thinned tests kill {killed[0]}, all their cases {killed[1]}")


if __name__ == "__main__":
    main()
