"""The tables of the documentation, made of the tables in the code. Nothing here is written by hand
but the headings.
"""

from __future__ import annotations

import ast
import json
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import curvlab
from curvlab.algorithms import ALGORITHMS, damping_for
from curvlab.cli.lists import columns_and_rows
from curvlab.exact import ROUTES
from curvlab.functions import FUNCTIONS
from curvlab.layers import LAYERS
from curvlab.likelihoods import LIKELIHOODS
from curvlab.linalg.pairs import SKIPS
from curvlab.models import MODELS
from curvlab.probes import PROBES, Variable
from curvlab.probes.costs import COST_MODELS as OF_COSTS
from curvlab.probes.costs import COSTS
from curvlab.reproduction import Comparison, Options, load_script, scripts
from curvlab.reproduction.problem_runs import ProblemRuns
from curvlab.reproduction.results import Result
from curvlab.spectra import SPECTRUM_VARIABLES as OF_SPECTRA
from curvlab.training.records import TRAINING_VARIABLES as OF_TRAINING
from curvlab.training.schedules import SCHEDULES

ROOT = Path(__file__).resolve().parent.parent.parent
PACKAGE = Path(curvlab.__file__).parent
RESULTS = ROOT / "analyses" / "results.toml"
PICTURES = "../analyses/figures"
"""As seen from the pages of `docs/`."""

NOT_RUN = "not run yet"
NOT_MEASURED = "not measured"


class Code(str):
    """A cell that is typed: set as code."""


class Markdown(str):
    """A cell with links and emphasis."""


class Pictures(tuple[str, ...]):
    """A cell of small pictures, files of `analyses/figures`."""


Cell = str | Pictures


@dataclass(frozen=True)
class Table:
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    widths: Sequence[int] = ()
    caption: str = ""


def _of_list(what: str, *typed: int) -> Table:
    """As `curvlab list` prints it; the columns `typed` are set as code."""
    columns, rows = columns_and_rows(what)
    return Table(
        columns,
        [[Code(c) if i in typed and c != "…" else c for i, c in enumerate(row)] for row in rows],
    )


def _algorithms() -> Table:
    """The list, and how each method is given one overall λ."""
    listed = _of_list("algorithms", 0)
    rows = [[*row[:-1], overall(row[0]), row[-1]] for row in listed.rows if isinstance(row[0], str)]
    return Table([*listed.columns[:-1], "at overall λ", listed.columns[-1]], rows)


def overall(name: str) -> str:
    """What `damping_for` makes of an overall λ and minibatches of m examples, in words."""
    rules = {
        "λ": lambda lam, m: lam,
        "ε = √λ": lambda lam, m: lam**0.5,
        "ε = √(λ/m)": lambda lam, m: (lam / m) ** 0.5,
        "ε = λ/m": lambda lam, m: lam / m,
    }
    trials = ((0.04, 100), (0.09, 400))
    given = [damping_for(name, *trial) for trial in trials]
    for words, rule in rules.items():
        if all(abs(g - rule(*trial)) <= 1e-12 for g, trial in zip(given, trials, strict=True)):
            return words
    if given[0] != given[1]:
        raise ValueError(f"the documentation has no words for the damping rule of {name}")
    return f"ε = {given[0]:g}" if given[0] else "none"


def _models() -> Table:
    """The list, and whether a network takes the shapes of another data set."""
    listed = _of_list("models", 0, 2, 3)
    rows = [
        [*row[:-1], "of the data" if MODELS[str(row[0])].sized else "fixed", row[-1]]
        for row in listed.rows
    ]
    return Table([*listed.columns[:-1], "shapes", listed.columns[-1]], rows)


def _probes() -> Table:
    rows = [
        [
            Code(name),
            p.summary,
            ", ".join(p.where),
            str(p.every),
            *(f"{c:g}" for c in COSTS.get(name, ("–",) * len(OF_COSTS))),
        ]
        for name, p in PROBES.items()
    ]
    return Table(
        ["probe", "what it measures", "of", "every", *(f"cost, {m}" for m in OF_COSTS)], rows
    )


def _variables(step: str, of: Callable[[str], Mapping[str, Variable]]) -> Table:
    rows = [
        [Code(variable), ", ".join((step, *v.dims)), v.long_name, v.units, Code(name)]
        for name in PROBES
        for variable, v in of(name).items()
    ]
    return Table(["variable", "dimensions", "what it is", "unit", "probe"], rows)


def _logged(step: str, variables: Mapping[str, tuple[tuple[str, ...], str, str]]) -> Table:
    rows = [
        [Code(name), ", ".join((step, *dims)), words, units]
        for name, (dims, words, units) in variables.items()
    ]
    return Table(["variable", "dimensions", "what it is", "unit"], rows)


def measured() -> dict[str, dict[str, object]]:
    """{name of a figure or table: what was measured here, and its pictures}."""
    return tomllib.loads(RESULTS.read_text(encoding="utf-8"))


def _gallery(folder: str, chosen: Callable[[str], bool] = lambda name: True) -> Table:
    results = measured()
    rows = []
    for name, path in scripts().items():
        if path.parent.name != folder or not chosen(name):
            continue
        what, found = load_script(name), results.get(name, {})
        pictures = found.get("pictures", [])
        assert isinstance(pictures, list)
        rows.append(
            [
                Code(f"curvlab reproduce {name}"),
                what.shows,
                what.claim,
                Markdown(found.get("measured", NOT_RUN)),
                Pictures(pictures),
            ]
        )
    return Table(
        [
            "command",
            "what it shows",
            "what the document claims",
            "what was measured here",
            "figure",
        ],
        rows,
    )


def _numbers(kind: str) -> Iterator[tuple[str, str, str, float, str]]:
    """(name, problem, label, number, of what) of all results that have `kind` of numbers."""
    for name, found in measured().items():
        numbers = found.get(kind, {})
        extent = found.get("extent" if kind == "numbers" else f"{kind}_extent", {})
        assert isinstance(numbers, dict)
        assert isinstance(extent, dict)
        for problem, of_labels in numbers.items():
            for label, number in of_labels.items():
                yield name, problem, label, number, extent[problem]


def settings(figure: Comparison, problem: str, label: str) -> dict[str, object]:
    """Whatever makes two runs one, but for their length."""
    method = figure.methods[label]
    return method.arguments(problem) | {
        "problem": problem,
        "batch size": method.batch or figure.batch,
        "l2": figure.l2,
    }


def _key(figure: Comparison, problem: str, label: str) -> str:
    return repr(sorted(settings(figure, problem, label).items()))


def reported() -> Iterator[tuple[str, Comparison, str, str, float]]:
    """(name, figure, problem, label, number) of all that documents report, each of them once."""
    seen = set()
    for name in sorted(scripts(), key=lambda name: not name.startswith("table")):
        figure = load_script(name)
        if not isinstance(figure, Comparison):
            continue
        for problem, of_labels in figure.reported.numbers.items():
            for label, number in of_labels.items():
                key = problem, label, number, _key(figure, problem, label)
                if key not in seen:
                    yield name, figure, problem, label, number
                seen.add(key)


def _reported(measured_here: bool) -> Table:
    """The documents' numbers: beside ours of the same method at the same values, or without."""
    ours = {
        _key(load_script(name), problem, label): (f"{number:.1f}", extent)
        for name, problem, label, number, extent in (*_numbers("numbers"), *_kept())  # longer last
    }
    rows: dict[tuple[str, ...], list[str]] = {}
    for name, figure, problem, label, number in reported():
        losses = not figure.reported.accuracies
        same = ours.get(_key(figure, problem, label)) if losses else None
        if measured_here:
            if same is not None:
                rows[name, problem, label, f"{number:.2f}", *same] = []
        elif same is None:
            key = name, problem, figure.reported.what
            rows.setdefault(key, []).append(f"{label} {number:.2f}")
    if measured_here:
        columns = ["table", "problem", "method", "lowest loss reported", "loss here", "here: after"]
        return Table(columns, [[Code(name), *rest] for name, *rest in rows])
    return Table(
        ["table", "problem", "what is reported", "the document's", "here"],
        [[Code(key[0]), *key[1:], "; ".join(each), NOT_MEASURED] for key, each in rows.items()],
    )


def _published() -> Table:
    ours = {tuple(what): number for *what, number, _ in _numbers("numbers")}
    rows = [
        [what[1], what[2], f"{number:.1f}", f"{here:.1f}", f"{100 * (here / number - 1):+.1f} %"]
        for *what, number, _ in _numbers("published")
        for here in [ours[tuple(what)]]
    ]
    return Table(["problem", "method", "published", "here", "difference"], rows)


@cache
def _long_runs_kept() -> tuple[Comparison, dict[str, Result]]:
    """The script, and {label: result} of the logs in `analyses/logs`; nothing is trained."""
    figure = load_script("long-runs")
    assert isinstance(figure, Comparison)
    runs = ProblemRuns(figure, "MNIST", Options(runs=ROOT / "analyses" / "logs", device="cpu"))
    each = figure.methods.items()
    return figure, {label: runs.result(method, training=False) for label, method in each}


def _kept() -> Iterator[tuple[str, str, str, float, str]]:
    """As `_numbers`, of the kept runs."""
    figure, results = _long_runs_kept()
    of_what = f"{figure.cpu.epochs} epochs, {figure.cpu.seeds} seeds"
    for label, found in results.items():
        yield "long-runs", "MNIST", label, float(found.mean("train_loss")[-1]), of_what


def _long_runs() -> Table:
    figure, results = _long_runs_kept()
    rows = []
    for label, found in results.items():
        each = float(found.along("time")[-1]) / float(found.along("epoch")[-1])
        losses = [found.told("train_loss", epoch) for epoch in figure.cpu.told_after]
        stopped = "; ".join(line.partition(":")[0] for line in found.failures)
        rows.append([label, found.arguments, *losses, f"{each:.3g}", stopped or "none"])
    after = [f"loss after epoch {epoch}" for epoch in figure.cpu.told_after]
    return Table(["method", "learning rate, damping", *after, "CPU s / epoch", "diverged"], rows)


def chapter(number: int) -> Callable[[str], bool]:
    return lambda name: name.partition("-")[2].startswith(f"{number}.")


def _modules() -> Table:
    """Every module and its own first sentence; packages before what they hold."""
    rows = []
    for path in sorted(PACKAGE.rglob("*.py"), key=_order):
        if "_data" in path.parts or "analyses" in path.relative_to(PACKAGE).parts:
            continue
        rows.append(
            [
                Code(module_name(path)),
                sentence(ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))),
            ]
        )
    return Table(["module", "what it holds"], rows)


def _order(path: Path) -> tuple[str, ...]:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return tuple("" if part == "__init__" else part for part in parts)


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def sentence(docstring: str | None) -> str:
    """The first paragraph of a docstring on one line, without the marks of code."""
    return " ".join((docstring or "").split("\n\n")[0].split()).replace("``", "").replace("`", "")


def _classes(table: Iterable[object]) -> list[list[Cell]]:
    found = [
        (
            t
            if isinstance(t, str)
            else f"{getattr(t, '__module__', None) or 'torch'}.{getattr(t, '__name__', t)}"
        )
        for t in table
    ]
    return [
        [Code(name.replace("torch.nn.modules.", "torch.nn.").replace("None.", "torch."))]
        for name in found
    ]


TABLES: dict[str, Callable[[], Table]] = {
    "algorithms": _algorithms,
    "options": lambda: _of_list("options", 0, 1, 2),
    "models": _models,
    "datasets": lambda: _of_list("datasets", 0),
    "schedules": lambda: _of_list("schedules", 0, 2),
    "figures": lambda: _of_list("figures", 0),
    "likelihoods": lambda: Table(
        ["likelihood", "what it is"],
        [[Code(name), sentence(kind.__doc__)] for name, kind in LIKELIHOODS.items()],
    ),
    "probes": _probes,
    "variables-step": lambda: _variables("step", lambda name: PROBES[name].variables),
    "variables-epoch": lambda: _variables("epoch", lambda name: PROBES[name].epoch),
    "variables-spectrum": lambda: _logged("step", OF_SPECTRA),
    "variables-training": lambda: _logged("epoch", OF_TRAINING),
    "skips": lambda: Table(
        ["rule", "when a pair is refused"],
        [[Code(rule or "0"), words] for rule, words in SKIPS.items()],
    ),
    "routes": lambda: Table(
        ["route", "what it does"], [[Code(name), r.summary] for name, r in ROUTES.items()]
    ),
    "functions": lambda: Table(["function with a rule"], _functions()),
    "layers": lambda: Table(["module laid out as one block"], _classes(LAYERS)),
    "gallery-2": lambda: _gallery("thesis", chapter(2)),
    "gallery-3": lambda: _gallery("thesis", chapter(3)),
    "gallery-4": lambda: _gallery("thesis", chapter(4)),
    "gallery-5": lambda: _gallery("thesis", chapter(5)),
    "gallery-s2qn": lambda: _gallery("s2qn"),
    "gallery-2021": lambda: _gallery("kfqn_cnn"),
    "gallery-all": lambda: _gallery("all_methods"),
    "gallery-recent": lambda: _gallery("recent"),
    "reported-measured": lambda: _reported(True),
    "reported-unmeasured": lambda: _reported(False),
    "published": _published,
    "long-runs": _long_runs,
    "modules": _modules,
}
"""{name of the directive's argument: the table}"""

BENCHMARKS = ROOT / "analyses" / "benchmarks" / "results"


def _benchmark(path: Path) -> Table:
    """A file that a benchmark has written, with what was measured, how, and on which machine."""
    found = json.loads(path.read_text())
    on = found["machine"]
    caption = (
        f"{found['what']}. {found['command']}; {on['date']}, {on['processor']}, {on['cores']}"
        f" cores, threads: {on['threads']}, load {on['load']}, Python {on['python']}, torch"
        f" {on['torch']}."
    )
    rows = [["–" if cell is None else str(cell) for cell in row] for row in found["rows"]]
    return Table(found["columns"], rows, caption=caption)


TABLES |= {
    f"benchmark-{path.stem}": partial(_benchmark, path)
    for path in sorted(BENCHMARKS.glob("*.json"))
}

GALLERIES = tuple(name for name in TABLES if name.startswith("gallery-"))


def _functions() -> list[list[Cell]]:
    return [[Code(getattr(function, "__name__", str(function)))] for function in FUNCTIONS]


def citing() -> dict[str, str]:
    """{entry of a table in the code: its source}, of all tables that cite."""
    tables: dict[str, Mapping[str, object]] = {
        "algorithm": ALGORITHMS,
        "model": MODELS,
        "schedule": SCHEDULES,
        "probe": PROBES,
    }
    return {
        f"{kind} {n}": str(getattr(entry, "source", ""))
        for kind, table in tables.items()
        for n, entry in table.items()
    }
