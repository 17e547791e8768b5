"""The documentation keeps its word: tables are those of the code, cell by cell, examples run,
sources are listed.
"""

from __future__ import annotations

import doctest
import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import curvlab
from curvlab.algorithms import ALGORITHMS
from curvlab.datasets import DATASETS
from curvlab.likelihoods import LIKELIHOODS
from curvlab.models import MODELS
from curvlab.probes import PROBES
from curvlab.reproduction import load_script, scripts
from curvlab.reproduction.index import FOLDERS
from curvlab.show.figures import FIGURES
from curvlab.spectra import SPECTRUM_VARIABLES as OF_SPECTRA
from curvlab.training.records import TRAINING_VARIABLES as OF_TRAINING
from curvlab.training.schedules import SCHEDULES

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(p for p in DOCS.rglob("*.md") if "_build" not in p.parts)


def _tables() -> ModuleType:
    spec = importlib.util.spec_from_file_location("tables_of_docs", DOCS / "_ext" / "tables.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


tables = _tables()


def column(name: str, number: int = 0) -> list[str]:
    return [str(row[number]) for row in tables.TABLES[name]().rows]


# ---- the tables are those of the code

NAMED: dict[str, Mapping[str, Any]] = {
    "algorithms": ALGORITHMS,
    "models": MODELS,
    "datasets": DATASETS,
    "figures": FIGURES,
    "likelihoods": LIKELIHOODS,
    "probes": PROBES,
    "variables-spectrum": OF_SPECTRA,
    "variables-training": OF_TRAINING,
}


@pytest.mark.parametrize("name", NAMED)
def test_a_table_has_every_entry_of_the_codes_own_in_its_order(name: str) -> None:
    assert column(name) == list(NAMED[name])


def test_what_it_says_is_what_the_entries_say() -> None:
    said: dict[str, Mapping[str, Any]] = {
        "algorithms": ALGORITHMS,
        "models": MODELS,
        "datasets": DATASETS,
        "figures": FIGURES,
        "probes": PROBES,
    }
    for name, entries in said.items():
        assert column(name, 1) == [entry.summary for entry in entries.values()]
    assert column("schedules", 1)[: len(SCHEDULES)] == [s.summary for s in SCHEDULES.values()]
    assert column("algorithms", 2) == [a.labels for a in ALGORITHMS.values()]
    assert column("models", 2) == [m.data or "" for m in MODELS.values()]


def test_options_and_schedules_are_complete() -> None:
    assert list(zip(column("options"), column("options", 1), strict=True)) == [
        (name, option) for name, a in ALGORITHMS.items() for option in a.options
    ]
    assert column("schedules")[: len(SCHEDULES)] == list(SCHEDULES)


@pytest.mark.parametrize(
    ("table", "axis", "of"),
    [("variables-step", "step", "variables"), ("variables-epoch", "epoch", "epoch")],
)
def test_the_schema_of_the_log_is_complete_and_true(table: str, axis: str, of: str) -> None:
    expected = [
        (name, ", ".join((axis, *v.dims)))
        for p in PROBES.values()
        for name, v in getattr(p, of).items()
    ]
    assert list(zip(column(table), column(table, 1), strict=True)) == expected


@pytest.mark.parametrize(
    ("table", "axis", "of"),
    [("variables-spectrum", "step", OF_SPECTRA), ("variables-training", "epoch", OF_TRAINING)],
)
def test_the_schemas_of_spectra_and_training_are_true(
    table: str, axis: str, of: dict[str, tuple[tuple[str, ...], str, str]]
) -> None:
    assert column(table, 1) == [", ".join((axis, *dims)) for dims, *_ in of.values()]


def test_the_gallery_has_every_name_and_every_claim_of_a_run() -> None:
    rows = [row for name in tables.GALLERIES for row in tables.TABLES[name]().rows]
    assert sorted(row[0].removeprefix("curvlab reproduce ") for row in rows) == sorted(scripts())
    assert all(
        len(row) == 5 and all(isinstance(cell, str) and cell for cell in row[:4]) for row in rows
    )
    measured = tables.measured()
    assert measured.keys() <= scripts().keys()
    for name, found in measured.items():
        assert all(
            (ROOT / "analyses" / "figures" / picture).is_file() for picture in found["pictures"]
        ), name


# ---- fidelity


def test_every_number_of_the_documents_is_in_one_of_two_tables_once() -> None:
    """Reported numbers of all scripts, by another route than the tables': sets of what is said."""
    beside = tables.TABLES["reported-measured"]().rows
    alone = tables.TABLES["reported-unmeasured"]().rows
    said = [(row[1], row[2], row[3]) for row in beside]
    for _, problem, _, numbers, _ in alone:
        said += [(problem, *each.rsplit(" ", 1)) for each in numbers.split("; ")]
    assert len(said) == len(set(said))
    expected = {
        (problem, label, f"{number:.2f}")
        for name in scripts()
        for problem, each in getattr(
            getattr(load_script(name), "reported", None), "numbers", {}
        ).items()
        for label, number in each.items()
    }
    assert set(said) == expected
    assert beside
    assert alone


def test_ours_stands_beside_theirs_where_the_settings_are_the_same_alone() -> None:
    beside = {
        (row[1], row[2]): (row[3], row[4]) for row in tables.TABLES["reported-measured"]().rows
    }
    assert beside["MNIST", "K-BFGS"] == ("51.60", "54.8"), "the longest run, of twenty epochs"
    assert beside["MNIST", "K-BFGS, T = 20"] == ("52.01", "115.4")
    assert ("MNIST", "K-BFGS-20") not in beside, "ours is at the values of another table"
    chapter_2, chapter_3 = (load_script(name) for name in ("figure-2.2", "figure-3.1"))
    assert tables.settings(chapter_2, "MNIST", "K-BFGS") != tables.settings(
        chapter_3, "MNIST", "K-BFGS-20"
    )
    assert tables.settings(chapter_2, "MNIST", "SGD-m") != tables.settings(
        chapter_3, "MNIST", "SGD-m"
    )


def test_numbers_are_of_names_that_there_are_and_those_of_the_pages() -> None:
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in (DOCS / "results" / "training.md").read_text().splitlines()
        if line.startswith("| `")
    ]
    with_numbers = {name: found for name, found in tables.measured().items() if "numbers" in found}
    assert with_numbers
    for name, found in with_numbers.items():
        assert found.keys() <= {
            "measured", "pictures", "extent", "numbers", "published_extent", "published"
        }  # fmt: skip
        figure = load_script(name)
        assert found["numbers"].keys() == found["extent"].keys() <= set(figure.problems)
        published = found.get("published", {})
        assert published.keys() == found.get("published_extent", {}).keys()
        for problem, numbers in found["numbers"].items():
            assert published.get(problem, {}).keys() <= numbers.keys() <= figure.methods.keys()
            for label, number in numbers.items():
                method = figure.methods[label]
                key = re.escape(f"`{method.algorithm}`")
                amortized = "T = 20" in label
                values = [f"{v:g}" for v in method.on(problem) if v]
                assert any(
                    re.match(key, row[0])
                    and ("T = 20" in row[0]) == amortized
                    and [f"{float(v):g}" for v in row[1:3] if v != "–"] == values
                    and f"{number:.1f}" in row[3:]
                    for row in rows
                    if len(row) > 4 and re.match(r"[\d.e-]+$", row[1])
                ), (problem, label, number)


OF_CALLS = {"lr", "damping", "labels", "momentum_kind", "double_grad", "schedule"}


def test_the_other_reading_has_a_name_that_there_is() -> None:
    text = (DOCS / "fidelity.md").read_text()
    start = text.index("| where | printed |")
    lines = text[start : text.index("\n\n", start)].splitlines()[2:]
    assert len(lines) > 30
    options = {option for a in ALGORITHMS.values() for option in a.options} | OF_CALLS
    named = 0
    for line in lines:
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        assert len(cells) == 5, line
        for code in re.findall(r"`([^`]+)`", " ".join(cells[3:])):
            name, is_option, _ = code.partition("=")
            known = options if is_option else {*ALGORITHMS, *MODELS, "tnt-even"}
            assert name in known, (line, code)
            named += 1
    assert named > 30


def test_the_table_of_modules_is_the_folder() -> None:
    package = ROOT / "curvlab"
    expected = {tables.module_name(p) for p in package.rglob("*.py") if "_data" not in p.parts}
    rows = tables.TABLES["modules"]().rows
    assert {row[0] for row in rows} == expected
    assert [row[0] for row in rows if not row[1] and row[0] != "curvlab.__main__"] == []


# ---- pages


def used() -> list[str]:
    return [
        name
        for page in PAGES
        for name in re.findall(r"^```\{table-of\} (\S+)$", page.read_text(), re.MULTILINE)
    ]


def test_every_table_is_on_one_page() -> None:
    assert sorted(used()) == sorted(tables.TABLES)


def test_every_notebook_and_script_is_in_the_tutorials() -> None:
    text = (DOCS / "tutorials" / "index.md").read_text()
    analyses = ROOT / "analyses"
    others = [p for p in analyses.rglob("*.py") if p.parent.name not in FOLDERS]
    assert all(f"]({p.name})" in text for p in analyses.glob("*.ipynb"))
    assert all(f"](../../analyses/{p.relative_to(analyses)})" in text for p in others)


def test_every_page_of_the_package_is_in_the_reference() -> None:
    pages = "\n".join(p.read_text() for p in (DOCS / "api").glob("*.md"))
    for name in curvlab.__all__:
        assert re.search(rf"(auto\w+:: |`curvlab\.){name}\b", pages), name
    for module in ("exact", "datasets"):
        for name in getattr(curvlab, module).__all__:
            assert re.search(rf"(auto\w+|py:data):: {name}$", pages, re.MULTILINE), name


def test_lines_of_prose_can_be_read_in_an_editor() -> None:
    long = [
        f"{page.name}:{number}"
        for page in [*PAGES, ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
        for number, line in enumerate(page.read_text().splitlines(), 1)
        if len(line) > 120 and not line.startswith(("|", "python3 -m venv"))
    ]
    assert long == []


# ---- references


def keys() -> set[str]:
    rows = re.findall(r"^\| (`[^|]*) \|", (DOCS / "references.md").read_text(), re.MULTILINE)
    return {key for row in rows for key in re.findall(r"`([^`]+)`", row)}


IN_A_DOCUMENT = re.compile(r"\b(Alg|Table|Figure|Lemma|Theorem)s?\b|\(\d+\.\d+\)")


def test_every_source_begins_with_a_key_of_the_references() -> None:
    """Without a document an algorithm or table is the thesis's; "ours" is curvlab's own choice."""
    known = sorted({*keys(), "ours"}, key=len, reverse=True)
    assert {"thesis", "2020", "2021", "S2QN", "practice"} <= set(known)
    for entry, source in tables.citing().items():
        if entry.startswith("probe"):
            continue  # it cites in its summary
        assert source, entry
        for part in source.split(";"):
            assert any(
                re.search(rf"(?<![\w-]){re.escape(key)}(?![\w-])", part) for key in known
            ) or IN_A_DOCUMENT.search(part), (
                entry,
                part,
            )
            years = re.findall(r"[A-Z][\w-]+(?: et al\.| and [A-Z]\w+)? (?:19|20)\d\d", part)
            assert all(year in known for year in years), (entry, years)


def test_what_probes_cite_is_listed() -> None:
    for name, p in PROBES.items():
        words = " ".join([p.summary, *(v.long_name for v in {**p.variables, **p.epoch}.values())])
        assert all(
            year in keys()
            for year in re.findall(r"[A-Z][\w-]+(?: et al\.| and [A-Z]\w+)? (?:19|20)\d\d", words)
        ), name
        assert "002" not in words, name


PAPER = re.compile(
    r"([A-Z][\w-]+)(?:(?:, | and |, and )[A-Z][\w-]+)*(?: et al\.)?,? \(?((?:19|20)\d\d)\b"
)


def test_every_paper_that_the_code_names_is_listed() -> None:
    rows = [
        row for row in (DOCS / "references.md").read_text().splitlines() if row.startswith("| `")
    ]
    for path in (ROOT / "curvlab").rglob("*.py"):
        for name, year in PAPER.findall(path.read_text(encoding="utf-8")):
            assert any(name in row and year in row for row in rows), (path.name, name, year)


@pytest.mark.parametrize("word", ["002", "003"])
def test_no_key_is_a_number_of_a_file(word: str) -> None:
    cites = re.compile(rf"(?<![\d.]){word} (\(|Alg|§|Table)")
    for page in [*PAGES, ROOT / "README.md", *(ROOT / "curvlab").rglob("*.py")]:
        assert not cites.search(page.read_text()), page


# ---- examples

WITH_EXAMPLES = sorted(
    p
    for p in (ROOT / "curvlab").rglob("*.py")
    if re.search(r"^\s+>>> ", p.read_text(), re.MULTILINE)
)


def test_there_are_examples() -> None:
    assert len(WITH_EXAMPLES) >= 5


@pytest.mark.parametrize("path", WITH_EXAMPLES, ids=lambda p: p.stem)
def test_the_examples_of_docstrings_run(path: Path) -> None:
    module = importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))
    torch.manual_seed(0)
    done = doctest.testmod(module)
    assert done.attempted
    assert not done.failed


@pytest.mark.parametrize(
    "page", [p for p in PAGES if ">>> " in p.read_text()], ids=lambda p: p.stem
)
def test_the_examples_of_pages_run(page: Path) -> None:
    text = page.read_text()
    done = doctest.DocTestRunner().run(
        doctest.DocTestParser().get_doctest(text, {}, page.name, str(page), 0)
    )
    assert done.attempted
    assert not done.failed


# ---- the built site


class Cells(HTMLParser):
    """{class of a table: [{text of each cell} of each row]}."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, list[list[str]]] = {}
        self.now: list[list[str]] | None = None
        self.inside = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "table":
            names = [c for c in (dict(attrs).get("class") or "").split() if c.startswith("table-")]
            self.now = self.found.setdefault(names[0], []) if names else None
        elif tag == "tr" and self.now is not None:
            self.now.append([])
        elif tag == "td" and self.now is not None:
            self.now[-1].append("")
            self.inside = True

    def handle_endtag(self, tag: str) -> None:
        if tag == "td":
            self.inside = False
        elif tag == "table":
            self.now = None

    def handle_data(self, data: str) -> None:
        if self.inside and self.now is not None:
            self.now[-1][-1] += data


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """Built with warnings as errors, as the README says; what CURVLAB_SITE names is taken as it is:
    CI's documentation command has built it so.
    """
    if given := os.environ.get("CURVLAB_SITE"):
        return Path(given)
    pytest.importorskip("sphinx", reason="pip install -e '.[docs]'")
    for module in ("myst_nb", "pydata_sphinx_theme", "sphinx_copybutton"):
        pytest.importorskip(module, reason="pip install -e '.[docs]'")
    there = tmp_path
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "sphinx",
            "-W",
            "-q",
            "-b",
            "html",
            "-d",
            str(there / "doctrees"),
            str(DOCS),
            str(there / "html"),
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return there / "html"


@pytest.mark.slow  # CI runs it by name, over the site that it builds anyhow
def test_the_site_is_built_without_a_warning_has_whole_cells_and_can_be_searched(
    site: Path,
) -> None:
    """One test, since the build takes half a minute."""
    has_every_entry_of_every_table_as_a_whole_cell(site)
    can_be_searched_and_needs_no_other(site)


def has_every_entry_of_every_table_as_a_whole_cell(site: Path) -> None:
    cells = Cells()
    for page in site.rglob("*.html"):
        cells.feed(page.read_text(encoding="utf-8"))
    assert cells.found.keys() == {f"table-{name}" for name in tables.TABLES}
    for name, make in tables.TABLES.items():
        table = make()
        rows = [[cell.strip() for cell in row] for row in cells.found[f"table-{name}"] if row]
        assert len(rows) == len(table.rows), name
        for row, expected in zip(rows, table.rows, strict=True):
            for cell, wanted in zip(row, expected, strict=True):
                if isinstance(wanted, str) and not isinstance(wanted, tables.Markdown):
                    assert cell == wanted.strip(), (name, wanted)


def can_be_searched_and_needs_no_other(site: Path) -> None:
    index = (site / "searchindex.js").read_text(encoding="utf-8")
    assert all(f'"{page}"' in index for page in ("start", "choose", "references", "api/curvlab"))
    for page in site.rglob("*.html"):
        assert not re.findall(
            r"<(?:script|link|img)[^>]+(?:src|href)=\"https?://", page.read_text(encoding="utf-8")
        ), page
