"""What takes seconds to import is imported when it is needed; lists are kept beside the tables; old
names still import.
"""

from __future__ import annotations

import importlib
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import curvlab as cl
from curvlab.cli import lists, reproduce
from curvlab.moved import MOVED, RENAMED
from curvlab.reproduction import Options

HEAVY = ("torch", "numpy", "scipy", "pandas", "xarray", "matplotlib", "sklearn")

COMMANDS = (
    "--version",
    "-h",
    "compare -h",
    "train -h",
    "spectrum -h",
    "sweep -h",
    "plot -h",
    *(f"list {what}" for what in lists.LISTS),
)

SEEN = """
import sys
from curvlab.cli import main
for command in sys.argv[1:]:
    sys.argv = ["curvlab", *command.split()]
    try:
        main()
    except SystemExit as ended:
        found = [name for name in %r if name in sys.modules]
        print(command, ended.code, *found, sep=",", file=sys.stderr)
    print("<end>")
"""


def said(code: str, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *words],
        capture_output=True,
        text=True,
        timeout=100,
        check=True,
    )


def test_what_only_tells_imports_nothing_heavy() -> None:
    done = said(SEEN % (HEAVY,), *COMMANDS)
    assert done.stderr.splitlines() == [f"{command},0" for command in COMMANDS]
    assert all(text.strip() for text in done.stdout.split("<end>")[:-1])
    assert done.stdout.count("<end>") == len(COMMANDS)


def test_the_package_imports_nothing_heavy_and_finds_every_public_name() -> None:
    code = f"import sys, curvlab; print([n for n in {HEAVY} if n in sys.modules])"
    assert said(code).stdout.strip() == "[]"
    for name in cl.__all__:
        assert getattr(cl, name) is getattr(cl, name)
        assert name in dir(cl)
    with pytest.raises(AttributeError, match="no attribute 'hessian'"):
        _ = cl.hessian


@pytest.mark.parametrize("what", lists.LISTS)
def test_the_kept_list_is_that_of_the_tables(what: str) -> None:
    """`python -m curvlab.cli.lists` makes it again."""
    columns, rows = lists.columns_and_rows(what)
    kept_columns, kept_rows = lists._kept()["lists"][what]
    assert kept_columns == columns
    assert [tuple(row) for row in kept_rows] == rows


def test_a_kept_list_of_other_sources_is_not_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = tmp_path / "lists.json"
    for text in (
        '{"checksum": "0", "lists": {"models": [["name"], [["old"]]]}}',
        "[]",
        "not json",
        None,
    ):
        if text is None:
            old.unlink()
        else:
            old.write_text(text)
        monkeypatch.setattr(lists, "_KEPT", old)
        assert lists._kept() == {}


def test_the_defaults_of_reproduce_are_those_of_its_options() -> None:
    """Written twice, since the command's help imports nothing heavy."""
    shown = {
        name: p.default for name, p in inspect.signature(reproduce.reproduce).parameters.items()
    }
    wanted = Options()
    assert (shown["budget"], shown["out_folder"], shown["runs"], shown["device"]) == (
        wanted.budget, wanted.out, wanted.runs, wanted.device,
    )  # fmt: skip


@pytest.mark.parametrize("old", MOVED)
def test_old_names_of_modules_import_with_a_warning(old: str) -> None:
    sys.modules.pop(old, None)
    with pytest.warns(cl.CurvlabWarning, match=f"{old} is called {MOVED[old]} now"):
        found = importlib.import_module(old)
    assert found is importlib.import_module(MOVED[old])
    assert found.__spec__ is not None
    assert found.__spec__.name == MOVED[old]


@pytest.mark.parametrize(
    ("module", "old"), [(module, old) for module, names in RENAMED.items() for old in names]
)
def test_old_public_names_give_the_new_thing_with_a_warning(module: str, old: str) -> None:
    new, place = RENAMED[module][old], importlib.import_module(module)
    with pytest.warns(cl.CurvlabWarning, match=rf"^{module}\.{old} is called {new} now"):
        found = getattr(place, old)
    assert found is getattr(place, new)
    assert old not in vars(place)


def test_a_module_with_old_names_has_no_others() -> None:
    for module in RENAMED:
        with pytest.raises(AttributeError, match=f"module '{module}' has no attribute 'nothing'"):
            _ = importlib.import_module(module).nothing
