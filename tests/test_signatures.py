"""The house: no long parameter list, no long file, a docstring for every public name, and none that
means two things."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

import curvlab as cl

ROOT = Path(cl.__file__).parent
MOST = 12
FILES = {path.relative_to(ROOT).as_posix(): path for path in sorted(ROOT.rglob("*.py"))}


def parameters(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """(name, number of parameters without self) of functions, methods and constructors of
    dataclasses."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            a = node.args
            named = [
                p.arg
                for p in (*a.posonlyargs, *a.args, *a.kwonlyargs, a.vararg, a.kwarg)
                if p is not None
            ]
            yield node.name, len([name for name in named if name not in ("self", "cls")])
        if isinstance(node, ast.ClassDef) and any(
            "dataclass" in ast.unparse(d) for d in node.decorator_list
        ):
            fields = [
                n
                for n in node.body
                if isinstance(n, ast.AnnAssign) and "ClassVar" not in ast.unparse(n.annotation)
            ]
            yield node.name, len(fields)


MANY = ("cli/",)
"""A command has as many options as it has."""


@pytest.mark.parametrize("file", [f for f in FILES if not f.startswith(MANY)])
def test_no_function_or_dataclass_has_more_parameters_than_one_reads(file: str) -> None:
    found = {
        name: count
        for name, count in parameters(ast.parse(FILES[file].read_text()))
        if count > MOST
    }
    assert not found


@pytest.mark.parametrize("file", FILES)
def test_no_file_is_longer_than_400_lines(file: str) -> None:
    assert len(FILES[file].read_text().splitlines()) <= 400


def undocumented(node: ast.AST, name: str = "") -> Iterator[str]:
    """Public functions, methods and classes without a docstring."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.ClassDef) and not child.name.startswith("_"):
            if ast.get_docstring(child) is None:
                yield f"{name}{child.name}"
            if isinstance(child, ast.ClassDef):
                yield from undocumented(child, f"{name}{child.name}.")


@pytest.mark.parametrize("file", FILES)
def test_every_public_name_has_a_docstring(file: str) -> None:
    assert not list(undocumented(ast.parse(FILES[file].read_text())))


def defined(tree: ast.Module) -> Iterator[str]:
    """Public names that a module defines at its top."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Assign):
            yield from (t.id for t in node.targets if isinstance(t, ast.Name))
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield node.target.id


NAMED_TWICE = {
    "compare": "the command calls the function",
    "report": "the command calls the function",
    "reproduce": "the command calls the function",
    "spectrum": "the command calls the function",
    "sweep": "the command calls the function",
    "train": "the command calls the function",
    "main": "entry points: of the program, of what it loads, of a figure's script",
    "Option": "typer's, under a short name",
}
"""{public name that several modules define: why}"""


def test_no_public_name_is_defined_twice() -> None:
    where: dict[str, list[str]] = defaultdict(list)
    for file, path in FILES.items():
        for name in set(defined(ast.parse(path.read_text()))):
            if not name.startswith("_"):
                where[name].append(file)
    twice = {name: files for name, files in where.items() if len(files) > 1}
    assert twice.keys() == NAMED_TWICE.keys(), twice
    commands = [name for name, why in NAMED_TWICE.items() if why.startswith("the command")]
    for name in commands:
        assert len(twice[name]) == 2, name
        assert any(file.startswith("cli/") for file in twice[name]), name
