"""``curvlab list``: what the tables hold.

The tables stand beside the code that they name, which takes seconds to import. ``python -m
curvlab.cli.lists`` writes their rows to `lists.json`, with a checksum over the files that they come
from: a copy that is out of date is never shown.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from curvlab.cli.terminal import out
from curvlab.errors import lookup
from curvlab.show.text_table import Table, draw_table

_Rows = list[tuple[str, ...]]

_PACKAGE = Path(__file__).resolve().parents[1]
_KEPT = Path(__file__).with_suffix(".json")
_SOURCES = (
    "algorithm*.py",
    "curvature/*.py",
    "models.py",
    "datasets/__init__.py",
    "probes/*.py",
    "training/schedules.py",
    "show/figures.py",
    "sweeps/documents.py",
    "reproduction/*.py",
    "cli/lists.py",
    "analyses/thesis/*.py",
    "analyses/s2qn/*.py",
    "analyses/kfqn_cnn/*.py",
    "analyses/all_methods/*.py",
)
"""Files that the rows come from; the scripts of `analyses` lie in the package, or, in a checkout,
beside it.
"""


def _algorithms() -> _Rows:
    from curvlab.algorithms import ALGORITHMS

    return [
        (name, a.summary, a.labels, f"{a.lr:g}", f"{a.damping:g}", a.source)
        for name, a in ALGORITHMS.items()
    ]


def _options() -> _Rows:
    from curvlab.algorithms import ALGORITHMS

    return [
        (name, option, str(value))
        for name, a in ALGORITHMS.items()
        for option, value in a.defaults.items()
    ]


def _models() -> _Rows:
    from curvlab.models import MODELS

    return [(name, m.summary, m.data or "", m.likelihood, m.source) for name, m in MODELS.items()]


def _datasets() -> _Rows:
    from curvlab.datasets import DATASETS

    return [(name, d.summary, d.comes) for name, d in DATASETS.items()]


def _schedules() -> _Rows:
    from curvlab.training.schedules import SCHEDULES

    rows: _Rows = [(n, s.summary, ", ".join(s.options), s.source) for n, s in SCHEDULES.items()]
    return [*rows, ("…", "any of torch.optim.lr_scheduler, by its name", "its arguments", "torch")]


def _probes() -> _Rows:
    """Return the rows of probes; costs are of one sample, over plain forward and backward."""
    from curvlab.probes import PROBES, costs

    return [
        (
            name,
            p.summary,
            ", ".join(p.where),
            str(p.every),
            ", ".join(f"{cost:g}" for cost in costs.COSTS.get(name, ())),
            ", ".join((*p.variables, *p.epoch)),
        )
        for name, p in PROBES.items()
    ]


def _costs_column() -> str:
    from curvlab.probes import costs

    return f"cost × ({', '.join(costs.COST_MODELS)})"


def _reproductions() -> _Rows:
    """Return all names, what they show, and how far the budgets go."""
    from curvlab.reproduction import load_script, scripts

    found = ((name, load_script(name)) for name in scripts())
    return [(name, what.shows, what.extents["cpu"], what.extents["paper"]) for name, what in found]


def _figures() -> _Rows:
    from curvlab.show.figures import FIGURES

    return [(name, f.summary) for name, f in FIGURES.items()]


def _grids() -> _Rows:
    from curvlab.sweeps.documents import DOCUMENT_GRIDS

    return [
        (name, grid.summary, ", ".join(grid.axes), grid.best, grid.source)
        for name, grid in DOCUMENT_GRIDS.items()
    ]


LISTS: dict[str, tuple[tuple[str | Callable[[], str], ...], Callable[[], _Rows]]] = {
    "algorithms": (("name", "what it is", "labels", "lr", "damping", "source"), _algorithms),
    "options": (("algorithm", "option", "default"), _options),
    "models": (("name", "what it is", "data", "likelihood", "source"), _models),
    "datasets": (("name", "what it is", "comes"), _datasets),
    "probes": (("name", "what it is", "of", "every", _costs_column, "variables"), _probes),
    "schedules": (("name", "what it is", "options", "source"), _schedules),
    "reproductions": (("name", "what it shows", "cpu", "paper"), _reproductions),
    "figures": (("name", "what it is"), _figures),
    "grids": (("name", "what it is of", "algorithms", "least", "source"), _grids),
}
"""{what: (columns, rows)}"""


def columns_and_rows(what: str) -> tuple[list[str], _Rows]:
    """Return (columns, rows) of a list, from the tables themselves."""
    columns, rows = LISTS[what]
    return [c if isinstance(c, str) else c() for c in columns], rows()


def checksum() -> str:
    """Return a checksum over the files that the rows come from."""
    found = hashlib.sha256()
    for pattern in _SOURCES:
        inside = sorted(_PACKAGE.glob(pattern))
        for path in inside or sorted(_PACKAGE.parent.glob(pattern)):
            found.update(path.name.encode() + b"\0" + path.read_bytes())
    return found.hexdigest()


def _kept() -> dict[str, Any]:
    """Return the copy beside this file, if it is of these sources; else nothing."""
    try:
        found: dict[str, Any] = json.loads(_KEPT.read_text(encoding="utf-8"))
        return found if found.get("checksum") == checksum() else {}
    except (OSError, ValueError, AttributeError):
        return {}


def list_(
    what: Annotated[
        str,
        typer.Argument(
            help=(
                "algorithms, options (of --set), models, datasets, probes, schedules, figures,"
                " grids (of sweeps) or reproductions."
            )
        ),
    ],
) -> None:
    """List what the tables hold."""
    lookup(LISTS, what, "list")
    # what is imported already may have entries of a user's
    kept = {} if "torch" in sys.modules else _kept()
    columns, rows = kept.get("lists", {}).get(what) or columns_and_rows(what)
    table = Table("", tuple(columns), tuple(map(tuple, rows)))
    out.print(draw_table(table, left=len(columns)))


def keep() -> None:
    """Write the copy that `curvlab list` reads."""
    found = {"checksum": checksum(), "lists": {what: columns_and_rows(what) for what in LISTS}}
    _KEPT.write_text(json.dumps(found, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    keep()
