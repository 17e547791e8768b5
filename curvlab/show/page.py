"""Write one page of HTML about runs, which stands alone, from the logs only.

It has figures, tables, calls, versions and attributes. The same logs give the same bytes: nothing
of the page is of the moment or the machine that writes it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import jinja2
import xarray as xr
from markupsafe import Markup
from rich.console import Console
from rich.progress import Progress

from curvlab.errors import CurvlabError, cause_of, shown
from curvlab.logs import attributes
from curvlab.logs.reading import open_log
from curvlab.logs.regular import regular
from curvlab.show import about, figures, tables
from curvlab.show.svg import inline
from curvlab.show.tables import MISSING, Table
from curvlab.system import paths
from curvlab.system.atomic import rewrite
from curvlab.system.escape import for_html, for_terminal
from curvlab.system.paths import Place
from curvlab.system.progress import progress_bar


@dataclass(frozen=True)
class Drawn:
    """A figure of the page.

    Args:
        number: counts over the page.
        caption: below it.
        svg: the figure, safe as it is.
    """

    number: int
    caption: str
    svg: Markup


@dataclass(frozen=True)
class Section:
    """One run of the page, or what runs of one kind show together (`runs` names their sections)."""

    anchor: str
    title: str
    place: str = ""
    runs: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    facts: Mapping[str, str] | None = None
    figures: tuple[Drawn, ...] = ()
    tables: tuple[Table, ...] = ()
    left: tuple[tuple[str, str], ...] = ()
    calls: tuple[tuple[str, str], ...] = ()
    versions: Mapping[str, str] | None = None
    attributes: Mapping[str, str] | None = None


def report(runs: Place | Sequence[Place], path: Place, *, progress: bool | None = None) -> Path:
    """Write one page about `runs`.

    It has every figure and table of each log, and what training runs of one problem show together.

    Args:
        runs: folders or `run.h5` files, in the order of the page.
        path: of the page, an .html file; it is written whole or not at all.
        progress: show a progress bar; None shows one where standard error is a terminal.

    Returns:
        `path`.

    Raises:
        CurvlabError: no log there, or a damaged one; a page that cannot be written.
    """
    try:
        given = [runs] if isinstance(runs, str | os.PathLike) else list(runs)
    except TypeError as error:
        raise CurvlabError(
            f"a report is of folders or run.h5 files, not of {shown(runs)}"
        ) from error
    if not given:
        raise CurvlabError("there is no run to report on: give folders or run.h5 files")
    target = paths.given(path, "report")
    places = list(dict.fromkeys(os.fspath(paths.given(place, "run")) for place in given))
    _check(target, places)
    logs = [(place, open_log(place)) for place in places]
    console = Console(stderr=True)
    with progress_bar(console, console.is_terminal if progress is None else progress) as bar:
        text = page(logs, bar)
    try:
        rewrite(
            target,
            lambda aside: aside.write_text(text, encoding="utf-8", errors="backslashreplace"),
        )
    except OSError as error:
        raise CurvlabError(
            f"the report {for_terminal(target)} cannot be written: {cause_of(error)}"
        ) from error
    return target


def _check(target: Path, places: Sequence[str]) -> None:
    """Raise CurvlabError for a page that cannot be written there, before anything is drawn."""
    paths.check_file(target, "report", "give a file, as report.html" if target.is_dir() else "")
    reason = ""
    if target.suffix not in (".html", ".htm"):
        reason = (
            f"reports are HTML, not '{target.suffix}'; call it {target.with_suffix('.html').name}"
        )
    elif target.exists() and any(
        Path(place).is_file() and target.samefile(place) for place in places
    ):
        reason = "it is one of the logs"
    if reason:
        raise CurvlabError(f"the report {target} cannot be written: {reason}")


def page(given: figures.Runs, bar: Progress) -> str:
    """Return the page about [(place, log)] as text.

    What of a log cannot be shown is named in its place.
    """
    seen = [regular(ds) for _, ds in given]
    logs = [(place, ds) for (place, _), (ds, _) in zip(given, seen, strict=True)]
    joint = [(name, group) for name, group in _together(logs) if len(group) > 1]
    wanted = [_applying(ds) for _, ds in logs]
    task = bar.add_task("figures", total=len(joint) + sum(map(len, wanted)), note="")
    count = 0

    def drawn(runs: figures.Runs, name: str, of: str) -> Drawn | str:
        nonlocal count
        bar.update(task, note=f"{name}, {of}")
        summary = figures.FIGURES[name].summary
        label = f"Figure {count + 1}: {summary}; {of}"
        try:
            svg = inline(figures.draw_all(runs, name), f"f{count + 1}-", label)
        except CurvlabError as error:
            return f"Not drawn: {summary}. {str(error)[0].upper()}{str(error)[1:]}."
        finally:
            bar.advance(task)
        count += 1
        return Drawn(count, summary[0].upper() + summary[1:], Markup(svg))

    facts = [about.facts(ds) for _, ds in logs]
    sections = [_joint(i, name, group, logs, drawn) for i, (name, group) in enumerate(joint, 1)]
    for i, ((place, ds), names) in enumerate(zip(logs, wanted, strict=True)):
        sections.append(
            _section(
                i + 1,
                place,
                ds,
                facts[i],
                names,
                drawn,
                len(logs) > 1,
                seen[i][1],
                given[i][1].attrs,
            )
        )
    common, differing = _summary(logs, facts)
    model, data = (attributes.text(logs[0][1], name) for name in ("model", "data"))
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("curvlab"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: value if isinstance(value, Markup) else for_html(value),
    )
    return environment.get_template("report.html").render(
        title=about.title(logs[0][1]) if len(logs) == 1 else f"curvlab report: {len(logs)} runs",
        about=f"{model} on {data}" if len(logs) == 1 and model and data else "",
        common=common,
        differing=differing,
        sections=sections,
        runs=tuple(f"run-{i + 1}" for i in range(len(logs))),
        version=metadata.version("curvlab"),
    )


def _applying(ds: xr.Dataset) -> list[str]:
    """Return the figures of a log, the one that stands for it first."""
    first = figures.main_figure(ds)
    return sorted(figures.applying(ds), key=lambda name: name != first)


def _together(logs: figures.Runs) -> list[tuple[str, list[tuple[str, xr.Dataset]]]]:
    """Return [(figure of several runs, its logs)].

    They are runs of one model on the same data whose errors mean the same.
    """
    found: dict[tuple[str, ...], list[tuple[str, xr.Dataset]]] = {}
    for place, ds in logs:
        problem = [attributes.text(ds, name) for name in ("model", "data_description", "error")]
        for name, entry in figures.FIGURES.items():
            if entry.several and entry.needs in ds:
                found.setdefault((name, *problem), []).append((place, ds))
    return [(key[0], group) for key, group in found.items()]


def _joint(i: int, name: str, group: figures.Runs, logs: figures.Runs, drawn: Any) -> Section:
    numbers = [[place for place, _ in logs].index(place) + 1 for place, _ in group]
    model, data = (attributes.text(group[0][1], name, name) for name in ("model", "data"))
    of = f"{len(group)} runs of {model} on {data}"
    picture = drawn(group, name, of)
    return Section(
        f"together-{i}",
        f"Together: {of}",
        runs=tuple(f"run-{n}" for n in numbers),
        notes=(picture,) if isinstance(picture, str) else (),
        figures=() if isinstance(picture, str) else (picture,),
        tables=(
            tables.last_epochs(
                [
                    (f"{n}. {run}", ds)
                    for n, (run, ds) in zip(numbers, figures.labelled(group), strict=True)
                ]
            ),
        ),
    )


def _section(
    i: int,
    place: str,
    ds: xr.Dataset,
    facts: dict[str, str],
    names: list[str],
    drawn: Any,
    several: bool,
    odd: Sequence[str],
    attrs: Mapping[Any, Any],
) -> Section:
    title = about.title(ds)
    further, left = tables.at_the_end(ds)
    pictures = [
        drawn([(place, ds)], name, f"{title} (run {i})" if several else title) for name in names
    ]
    notes = [*about.notes(ds), *(f"Odd in the log, and left out: {what}." for what in odd)]
    return Section(
        f"run-{i}",
        f"{i}. {title}" if several else "This run",
        place,
        notes=(*notes, *(picture for picture in pictures if isinstance(picture, str))),
        facts=facts if several else None,
        figures=tuple(picture for picture in pictures if isinstance(picture, Drawn)),
        tables=(*tables.own(ds), *further),
        left=tuple(left),
        calls=tuple(about.calls(ds)),
        versions={
            name: str(version) for name, version in attributes.mapping(ds, "versions").items()
        }
        | {"git commit": attributes.text(ds, "git_commit", MISSING)},
        attributes={str(name): str(value) for name, value in attrs.items()},
    )


def _summary(
    logs: figures.Runs, facts: Sequence[dict[str, str]]
) -> tuple[dict[str, str], Table | None]:
    """Return what all runs share, and what differs in brief, a row for each run."""
    names = list(dict.fromkeys(name for fact in facts for name in fact))
    rows = {name: [fact.get(name, MISSING) for fact in facts] for name in names}
    common = {name: row[0] for name, row in rows.items() if len(set(row)) == 1}
    apart = [name for name in names if name not in common]
    if len(logs) == 1:
        return common, None
    lines = (
        (f"{i + 1}. {about.command(ds)}", *(_BRIEF.get(name, str)(rows[name][i]) for name in apart))
        for i, (_, ds) in enumerate(logs)
    )
    return common, Table(
        "What differs between the runs" if common else "The runs", ("run", *apart), tuple(lines)
    )


def _before(mark: str) -> Callable[[str], str]:
    return lambda text: text.partition(mark)[0]


_BRIEF: dict[str, Callable[[str], str]] = {
    "data": lambda text: text.partition(" (")[0].partition(", batches of")[0],
    "algorithm": _before("; "),
    "loss": _before(", mean of"),
    "time": lambda text: "\u00a0".join(text.split()[:2]),
    "date": lambda text: text[:10],
    "versions": lambda text: text.partition(", python")[0],
    "git commit": lambda text: text[:8],
}
"""{fact: what of it stands beside other runs'}; each run's section has it whole."""
