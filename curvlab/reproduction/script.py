"""What a script of `analyses/` gives: a value that says what it shows, and runs.

It says how far each budget goes, too.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from matplotlib.figure import Figure

from curvlab.errors import CurvlabError, cause_of, lookup, unknown
from curvlab.machine import device_of
from curvlab.show.text_table import Table, text_lines
from curvlab.system import paths
from curvlab.system.atomic import rewrite
from curvlab.system.escape import for_terminal
from curvlab.system.interrupt import number_of, words
from curvlab.system.memory import keep_freed_memory

BUDGETS = ("smoke", "cpu", "paper")
"""How far a reproduction goes: seconds, on whatever is there; minutes on two cores; the document's
own length, on a GPU where there is one.
"""


@dataclass(frozen=True)
class Options:
    """What a user may choose of a reproduction.

    `out` gets picture and text, `runs` the training runs that figures of one budget share.
    """

    budget: str = "cpu"
    out: Path = Path("runs/figures")
    runs: Path = Path("runs/reproduce")
    device: str = "auto"
    methods: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()

    def check(self, what: Reproduction) -> None:
        """Raise CurvlabError for a choice that `what` or this machine cannot meet."""
        if self.budget not in BUDGETS:
            raise unknown("budget", self.budget, BUDGETS)
        for kind, chosen, known in (
            ("method", self.methods, what.methods),
            ("problem", self.problems, what.problems),
        ):
            if chosen and not [*known]:
                raise CurvlabError(f"there are no {kind}s to choose from: leave --{kind} out")
            for name in chosen:
                lookup(dict.fromkeys([*known]), name, kind)
        device_of(self.device)
        paths.check_folder(self.runs, what="folder of runs", remedy="choose another with --runs")

    @property
    def smoke(self) -> bool:
        """Whether the budget is `smoke`."""
        return self.budget == "smoke"

    @property
    def where(self) -> torch.device:
        """The device, `auto` resolved.

        Raises:
            CurvlabError: this machine lacks it.
        """
        return device_of(self.device)


class Reproduction(Protocol):
    """A figure or table of a document.

    `shows` begins with its document and number; `claim` is in the document's words; of `methods`
    and `problems` a user may choose.
    """

    @property
    def shows(self) -> str:
        """What it shows, its document and number first."""

    @property
    def claim(self) -> str:
        """What the document says of it, in its words."""

    @property
    def extents(self) -> Mapping[str, str]:
        """Lengths of the budgets in words, ``{budget: words}``."""

    @property
    def methods(self) -> Iterable[str]:
        """Names of methods to choose from; none where there is no choice."""

    @property
    def problems(self) -> Iterable[str]:
        """Names of problems to choose from; none where there is no choice."""

    def run(self, report: ReproductionReport) -> None:
        """Compute it within the report's options, and say and draw it there."""


@dataclass
class ReproductionReport:
    """The lines that a reproduction says, kept for the text file beside the picture."""

    name: str
    options: Options
    lines: list[str] = field(default_factory=list)

    def say(self, line: str = "") -> None:
        """Print a line, at once, and keep it."""
        print(line, flush=True)
        self.lines.append(line)

    def table(self, headings: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
        """Say rows in columns as wide as their words.

        The first is set to the left, the others to the right.
        """
        for line in text_lines(Table("", tuple(headings), tuple(map(tuple, rows)))):
            self.say(line)

    def file(self, suffix: str) -> Path:
        """Return the path of an output file, `out`/NAME-BUDGET.suffix."""
        return self.options.out / f"{self.name}-{self.options.budget}.{suffix}"

    def draw(self, figure: Figure) -> None:
        """Write the picture; the coarse one of a smoke run is only to see that it can be drawn."""
        self._write(
            self.file("png"),
            lambda path: figure.savefig(path, format="png", dpi=50 if self.options.smoke else 120),
        )

    def close(self) -> None:
        """Write the text file.

        Raises:
            CurvlabError: it cannot be written.
        """
        text = "\n".join(self.lines) + "\n"
        self._write(self.file("txt"), lambda path: path.write_text(text, encoding="utf-8"))

    def _write(self, path: Path, write: Callable[[Path], object]) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            rewrite(path, write)
        except OSError as error:
            raise CurvlabError(
                f"{path} cannot be written: {cause_of(error)}; choose another folder with --out"
            ) from error
        print(for_terminal(f"wrote {path}"), flush=True)


@dataclass(frozen=True)
class Script:
    """A figure or table that is made by a function of its own."""

    shows: str
    claim: str
    extents: Mapping[str, str]
    make: Callable[[ReproductionReport], None]
    methods: Sequence[str] = ()
    problems: Sequence[str] = ()

    def run(self, report: ReproductionReport) -> None:
        """Call `make` with the report."""
        self.make(report)


def reproduce(what: Reproduction, name: str, options: Options) -> ReproductionReport:
    """Run a figure or table and write `out`/NAME-BUDGET.txt, and the picture where there is one.

    Args:
        what: the figure or table.
        name: of its files.
        options: what the user chose.

    Raises:
        CurvlabError: bad options, data that are not there, a folder that cannot be written.
    """
    options.check(what)
    keep_freed_memory()
    report = ReproductionReport(name, options)
    files = [report.file(suffix).name for suffix in ("png", "txt")]
    paths.check_folder(options.out, files, remedy="choose another with --out")
    report.say(
        f"{what.shows} ({options.budget}: {what.extents[options.budget]};"
        f" {described_device(options.where)})"
    )
    report.say(f"The document: {what.claim}")
    report.say()
    what.run(report)
    report.close()
    return report


def say_progress(what: str, left: float | None = None) -> None:
    """Print a line on standard error, which is no part of the result; `left` are seconds."""
    when = (
        ""
        if left is None
        else f" (about {left:.0f} s left)"
        if left < 120
        else f" (about {left / 60:.0f} min left)"
    )
    print(for_terminal(f"  {what}{when}"), file=sys.stderr, flush=True)


def described_device(device: torch.device) -> str:
    """Return a device in words: a GPU's name, or the number of CPU threads in use."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    return f"{torch.get_num_threads()} CPU thread{'s' if torch.get_num_threads() > 1 else ''}"


def main(what: Reproduction, file: str) -> None:
    """Run a script's own command line: the options of `curvlab reproduce`, and its exit codes."""
    default = Options()
    parser = argparse.ArgumentParser(
        description=what.shows, exit_on_error=False, allow_abbrev=False
    )
    parser.add_argument("--budget", metavar=f"{{{','.join(BUDGETS)}}}", default=default.budget)
    parser.add_argument("--out", type=Path, default=default.out)
    parser.add_argument("--runs", type=Path, default=default.runs)
    parser.add_argument("--device", default=default.device)
    parser.add_argument("--method", dest="methods", action="append", default=[])
    parser.add_argument("--problem", dest="problems", action="append", default=[])
    try:
        found, unread = parser.parse_known_args()
        if unread:
            raise CurvlabError(f"no such option: {' '.join(unread)}; see --help")
        given = vars(found)
        given |= {name: tuple(given[name]) for name in ("methods", "problems")}
        reproduce(what, name_of(Path(file)), Options(**given))
    except argparse.ArgumentError as error:
        print(f"curvlab: {error}; see --help", file=sys.stderr)
        sys.exit(2)
    except CurvlabError as error:
        print(f"curvlab: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as error:
        if error.__cause__ is not None:
            print(f"curvlab: {error.__cause__}", file=sys.stderr)
        print(f"curvlab: {words(error)}; run it again to go on", file=sys.stderr)
        sys.exit(128 + number_of(error))


def name_of(path: Path) -> str:
    """Return the name of a script: figure_2_2.py of the thesis is figure-2.2.

    That of another document has its folder's name before it.
    """
    kind, *numbers = path.stem.split("_")
    if kind not in ("figure", "table") or not numbers:
        return path.stem.replace("_", "-")
    name = f"{kind}-{'.'.join(numbers)}"
    return name if path.parent.name == "thesis" else f"{path.parent.name.replace('_', '-')}-{name}"
