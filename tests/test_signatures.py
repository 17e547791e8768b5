"""Curvature, probes and algorithms: no long parameter list, no long file, and no public name that
means two things."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

import curvlab as cl

ROOT = Path(cl.__file__).parent
OURS = ("curvature/", "probes/", "optim.py", "descent.py", "algorithm")
MOST = 12
FILES = {path.relative_to(ROOT).as_posix(): path for path in sorted(ROOT.rglob("*.py"))}


def parameters(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """(name, number of parameters without self) of functions, methods and constructors of
    dataclasses."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            a = node.args
            named = [p.arg for p in (*a.posonlyargs, *a.args, *a.kwonlyargs, a.vararg, a.kwarg) if p is not None]
            yield node.name, len([name for name in named if name not in ("self", "cls")])
        if isinstance(node, ast.ClassDef) and any("dataclass" in ast.unparse(d) for d in node.decorator_list):
            fields = [n for n in node.body if isinstance(n, ast.AnnAssign) and "ClassVar" not in ast.unparse(n.annotation)]
            yield node.name, len(fields)


@pytest.mark.parametrize("file", [f for f in FILES if f.startswith(OURS)])
def test_no_function_has_more_parameters_than_one_reads(file: str) -> None:
    found = {name: count for name, count in parameters(ast.parse(FILES[file].read_text())) if count > MOST}
    assert not found


@pytest.mark.parametrize("file", [f for f in FILES if f.startswith(OURS)])
def test_no_file_is_longer_than_400_lines(file: str) -> None:
    assert len(FILES[file].read_text().splitlines()) <= 400


def defined(tree: ast.Module) -> Iterator[str]:
    """Public names that a module defines at its top."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Assign):
            yield from (t.id for t in node.targets if isinstance(t, ast.Name))
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield node.target.id


def test_no_public_name_of_theirs_is_defined_twice_in_the_package() -> None:
    where: dict[str, list[str]] = defaultdict(list)
    for file, path in FILES.items():
        for name in set(defined(ast.parse(path.read_text()))):
            if not name.startswith("_"):
                where[name].append(file)
    twice = {name: files for name, files in where.items() if len(files) > 1 and any(f.startswith(OURS) for f in files)}
    assert not twice
