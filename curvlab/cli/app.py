"""The command line: parse, call `runs`, exit. Bad input is one line on standard error and exit code 2."""

from __future__ import annotations

import atexit
import gc
import os
import sys
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Annotated, TextIO

import matplotlib
import typer
from rich.table import Table

import curvlab
from curvlab import datasets, doctor, models, probes, runs, spectra, spectrum_run, starting
from curvlab.algorithms import ALGORITHMS
from curvlab.cli import reproduce, train
from curvlab.cli.terminal import check_output, err, finish, folder_for, listed, out, picture, says_what_is_saved, writing, wrote
from curvlab.errors import CurvlabError, CurvlabWarning, Diverged, lookup, shown, whole
from curvlab.logs.reading import open_log
from curvlab.probes import costs
from curvlab.show import figures, pictures
from curvlab.system import blame, paths
from curvlab.system.blame import verdict
from curvlab.system.escape import for_rich, for_terminal
from curvlab.system.interrupt import LISTENER, behind, listening, number_of
from curvlab.system.interrupt import words as words_of
from curvlab.system.memory import keep_freed_memory
from curvlab.system.streams import unfailing
from curvlab.training import schedules

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
Option = typer.Option


@app.callback(invoke_without_command=True)
def _version(
    version: Annotated[bool, Option("--version", help="Show the version and exit.", is_eager=True)] = False,
    verbose: Annotated[
        bool, Option("--verbose", "-v", help="Where an error is no bad input, show its whole traceback.")
    ] = False,
) -> None:
    """Curvature diagnostics of neural networks."""
    if version:
        out.print(f"curvlab {curvlab.__version__}", highlight=False)
        raise typer.Exit


@app.command()
def compare(
    model: Annotated[
        str, Option(help="Network, of `curvlab list models`, or module:function of yours.", rich_help_panel="Problem")
    ],
    data: Annotated[str | None, Option(help="Data set; the model's own by default.", rich_help_panel="Problem")] = None,
    reference: Annotated[
        str, Option(help="Algorithm that moves the parameters and to which cosines are taken.", rich_help_panel="Methods")
    ] = "block-fisher",
    algorithms: Annotated[
        str, Option(help="The others, with commas between.", rich_help_panel="Methods")
    ] = ",".join(runs.FIGURE_4_1),
    lr: Annotated[
        float | None, Option(help="Learning rate of the reference; its document's by default.", rich_help_panel="Methods")
    ] = None,
    damping: Annotated[
        float, Option(help="Overall damping λ, given to every method by one rule (README).", rich_help_panel="Methods")
    ] = 1e-3,
    momentum: Annotated[float, Option(help="β of every method (thesis 4.7.2).", rich_help_panel="Methods")] = 0.9,
    decay: Annotated[
        float | None,
        Option(help="Of every moving average; by default each document's: 0.9, Adam's β₂ 0.999.", rich_help_panel="Methods"),
    ] = None,
    update_every: Annotated[int, Option(help="T₁, steps between updates of statistics.", rich_help_panel="Methods")] = 1,
    refresh_every: Annotated[int, Option(help="T₂, steps between inversions.", rich_help_panel="Methods")] = 1,
    steps: Annotated[
        int | None, Option(help="Steps; 300 unless --epochs says otherwise.", rich_help_panel="Length")
    ] = None,
    epochs: Annotated[int | None, Option(help="Epochs; with --steps, whichever ends first.", rich_help_panel="Length")] = None,
    batch_size: Annotated[int, Option(help="Examples in a minibatch.", rich_help_panel="Length")] = 1000,
    seed: Annotated[int, Option(help="Of weights, batches and sampled labels.", rich_help_panel="Length")] = 0,
    seeds: Annotated[int, Option(help="Repeat with so many seeds, from --seed on.", rich_help_panel="Length")] = 1,
    device: Annotated[str, Option(help="auto (CUDA if there is one), cpu, cuda, cuda:N.", rich_help_panel="Machine")] = "auto",
    dtype: Annotated[str, Option(help="float32 or float64.", rich_help_panel="Machine")] = "float32",
    log_every: Annotated[int, Option(help="Steps between records.", rich_help_panel="Output")] = 1,
    probe: Annotated[
        list[str] | None,
        Option(metavar="NAME[:EVERY]", help="A further one of `curvlab list probes`, every so many steps; may be given again.",
               rich_help_panel="Output"),
    ] = None,
    verbose: Annotated[
        bool, Option("--verbose", "-v", help="Print which way each block goes, and why (`objective.check`).",
                     rich_help_panel="Output"),
    ] = False,
    out_folder: Annotated[
        Path | None,
        Option("--out", metavar="FOLDER", help="Gets run.h5, cosine.png, cosine.svg; a fresh one under runs/ by default.",
               rich_help_panel="Output"),
    ] = None,
) -> None:  # fmt: skip
    """Follow one algorithm and compare every other's direction with it: cosines by layer (thesis Figure 4.1).

    The defaults are the published picture: the trajectory of block-fisher, batches of 1000, learning rate 0.03,
    overall damping 1e-3, 300 steps, warm start over one pass, sampled labels.

    A method whose numbers leave the finite range is named, and NaN from that step on, while the others go on to the end; if it
    is the reference, the run ends there. Exit code 1 in both cases.
    """
    call = {k: v for k, v in ({"command": "compare"} | dict(locals())).items() if k != "verbose"}
    call["out"] = str(call.pop("out_folder") or "")
    settings = runs.Settings(
        reference, listed(algorithms), lr, damping, momentum, decay, update_every, refresh_every, log_every, tuple(probe or ())
    )
    if steps is None and epochs is None:
        steps = 300
    whole("the seed", seed, 0)
    whole("seeds", seeds, 1, runs.SEEDS)
    check_output(out_folder, "cosine")
    named = runs.Named(
        settings, model, data, steps, epochs, batch_size, tuple(range(seed, seed + seeds)), device, dtype, verbose
    )
    prepared = runs.prepare(named)
    keep_freed_memory()
    with (
        paths.made(out_folder, lambda: folder_for(out_folder, f"compare-{model}")) as folder,
        writing(folder),
        says_what_is_saved(folder / "run.h5"),
    ):
        try:
            run = runs.compare_named(prepared, folder / "run.h5", call, err)
        except Diverged as error:
            if not (folder / "run.h5").exists():
                raise
            err.print(for_rich(f"curvlab: {error} (the log so far is saved in {folder / 'run.h5'})"))
            raise typer.Exit(train.DIVERGED) from error
    finish(run.dataset, folder, "cosine")
    if run.diverged:
        raise typer.Exit(train.DIVERGED)


@app.command()
def spectrum(
    model: Annotated[
        str, Option(help="Network, of `curvlab list models`, or module:function of yours.", rich_help_panel="Problem")
    ],
    data: Annotated[str | None, Option(help="Data set; the model's own by default.", rich_help_panel="Problem")] = None,
    samples: Annotated[
        int, Option(help="The spectra are of the mean loss over so many first training examples.", rich_help_panel="Problem")
    ] = 1000,
    matrix: Annotated[
        str, Option(help="Of hessian, ggn, pi, fisher, fisher-mc, ef, with commas between.", rich_help_panel="Spectra")
    ] = "hessian,ggn",
    blocks: Annotated[
        str, Option(help="all, names, or whole (the matrix of all parameters), with commas between.", rich_help_panel="Spectra")
    ] = "all",
    method: Annotated[
        str, Option(help="exact: every eigenvalue; lanczos: density and ends; auto: exact up to order 6000.",
                    rich_help_panel="Spectra"),
    ] = "auto",
    draws: Annotated[int, Option(help="Starting vectors of Lanczos.", rich_help_panel="Spectra")] = 10,
    steps: Annotated[int, Option(help="Steps of Lanczos.", rich_help_panel="Spectra")] = 100,
    after: Annotated[
        str, Option(help="Numbers of training steps to stop at, with commas between.", rich_help_panel="Training")
    ] = "0,100,1000",
    algorithm: Annotated[str, Option(help="Trains the model.", rich_help_panel="Training")] = "adam",
    lr: Annotated[float | None, Option(help="Learning rate; its document's by default.", rich_help_panel="Training")] = None,
    damping: Annotated[
        float | None, Option(help="The algorithm's own damping; its document's by default.", rich_help_panel="Training")
    ] = None,
    batch_size: Annotated[int, Option(help="Examples in a minibatch of training.", rich_help_panel="Training")] = 1000,
    seed: Annotated[int, Option(help="Of weights, batches, sampled labels and Lanczos.", rich_help_panel="Training")] = 0,
    device: Annotated[str, Option(help="auto (CUDA if there is one), cpu, cuda, cuda:N.", rich_help_panel="Machine")] = "auto",
    dtype: Annotated[str, Option(help="float32 or float64.", rich_help_panel="Machine")] = "float64",
    verbose: Annotated[
        bool, Option("--verbose", "-v", help="Print which way each block goes, and why (`objective.check`).",
                     rich_help_panel="Output"),
    ] = False,
    out_folder: Annotated[
        Path | None,
        Option("--out", metavar="FOLDER", help="Gets run.h5, spectrum.png, spectrum.svg; a fresh one under runs/ by default.",
               rich_help_panel="Output"),
    ] = None,
) -> None:  # fmt: skip
    """Train, and log the eigenvalues of each layer's Hessian and Gauss-Newton block along the way."""
    call = {k: v for k, v in ({"command": "spectrum"} | dict(locals())).items() if k != "verbose"}
    call["out"] = str(call.pop("out_folder") or "")
    plan = spectra.Plan(listed(matrix), listed(blocks), method, draws, steps)
    at = tuple(_integer(word, "--after") for word in listed(after))
    named = spectrum_run.Named(model, plan, data, samples, at, algorithm, lr, damping, batch_size, seed, device, dtype, verbose)
    check_output(out_folder, "spectrum")
    prepared = spectrum_run.prepare(named)
    keep_freed_memory()
    with (
        paths.made(out_folder, lambda: folder_for(out_folder, f"spectrum-{model}")) as folder,
        writing(folder),
        says_what_is_saved(folder / "run.h5"),
    ):
        ds = spectrum_run.run(prepared, folder / "run.h5", call, err)
    finish(ds, folder, "spectrum")


def _integer(text: str, option: str) -> int:
    try:
        return int(text)
    except ValueError as error:
        raise CurvlabError(f"{option} takes whole numbers with commas between, not {shown(text)}") from error


app.command()(train.train)
app.command()(reproduce.reproduce)


@app.command()
def plot(
    run: Annotated[
        list[Path],
        typer.Argument(metavar="RUN…", help="A run's folder or its run.h5; of training runs several, in one figure."),
    ],
    figure: Annotated[str | None, Option(help="Of `curvlab list figures`; the command's own by default.")] = None,
    output: Annotated[
        Path | None, Option("-o", "--output", metavar="FILE", help="PNG, SVG or PDF; by default beside the log, as PNG.")
    ] = None,
) -> None:
    """Redraw a figure from the log alone."""
    if figure is not None:
        lookup(figures.FIGURES, figure, "figure")
    if output is not None:
        output = pictures.check(output, "choose another with -o")
    found = {path: open_log(paths.given(path, "run")) for path in run}
    figure = figure or figures.main(found[run[0]])
    beside = run[0] if run[0].is_dir() else run[0].parent
    target = output or pictures.check(beside / f"{figure}.png", "choose another with -o")
    picture(figures.draw_all([(str(path), ds) for path, ds in found.items()], figure), target)
    wrote(target)


@app.command()
def report(
    run: Annotated[
        list[Path], typer.Argument(metavar="RUN…", help="A run's folder or its run.h5; several, in the order of the page.")
    ],
    output: Annotated[
        Path | None, Option("-o", "--output", metavar="FILE", help="By default report.html beside the (first) log.")
    ] = None,
) -> None:
    """Write one page of HTML that stands alone: figures, tables, the exact call, versions, every attribute."""
    first = paths.given(run[0], "run")
    target = output or (first if first.is_dir() else first.parent) / "report.html"
    curvlab.report([str(path) for path in run], target)
    wrote(target)


@app.command(name="doctor")
def doctor_(
    run: Annotated[Path | None, typer.Argument(metavar="[RUN]", help="A run's folder, which is then looked at too.")] = None,
) -> None:
    """Say what a bug report asks for first: versions, threads, device, data, and of a run whether it is whole and how to go on.

    What is in the way of something is marked with an exclamation mark, and the exit code is 1.
    """
    page = doctor.examine(run)
    out.print(for_rich(page, lines=True), soft_wrap=True)
    if page.bad:
        raise typer.Exit(1)


def _algorithm_rows() -> list[tuple[str, ...]]:
    return [(name, a.summary, a.labels, f"{a.lr:g}", f"{a.damping:g}", a.source) for name, a in ALGORITHMS.items()]


def _option_rows() -> list[tuple[str, ...]]:
    return [(name, option, str(value)) for name, a in ALGORITHMS.items() for option, value in a.defaults.items()]


def _model_rows() -> list[tuple[str, ...]]:
    return [(name, m.summary, m.data or "", m.likelihood, m.source) for name, m in models.MODELS.items()]


def _schedule_rows() -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = [(n, s.summary, ", ".join(s.options), s.source) for n, s in schedules.SCHEDULES.items()]
    return [*rows, ("…", "any of torch.optim.lr_scheduler, by its name", "its arguments", "torch")]


def _probe_rows() -> list[tuple[str, ...]]:
    """Costs are of one sample, as a multiple of plain forward and backward."""
    return [
        (
            name,
            p.summary,
            ", ".join(p.where),
            str(p.every),
            ", ".join(f"{cost:g}" for cost in costs.COSTS.get(name, ())),
            ", ".join((*p.variables, *p.epoch)),
        )
        for name, p in probes.PROBES.items()
    ]


LISTS: dict[str, tuple[tuple[str, ...], Callable[[], list[tuple[str, ...]]]]] = {
    "algorithms": (("name", "what it is", "labels", "lr", "damping", "source"), _algorithm_rows),
    "options": (("algorithm", "option", "default"), _option_rows),
    "models": (("name", "what it is", "data", "likelihood", "source"), _model_rows),
    "datasets": (
        ("name", "what it is", "comes"),
        lambda: [(n, d.summary, d.comes) for n, d in datasets.DATASETS.items()],
    ),
    "probes": (
        ("name", "what it is", "of", "every", f"cost × ({', '.join(costs.COST_MODELS)})", "variables"),
        _probe_rows,
    ),
    "schedules": (("name", "what it is", "options", "source"), _schedule_rows),
    "reproductions": (reproduce.COLUMNS, reproduce.rows),
    "figures": (("name", "what it is"), lambda: [(n, f.summary) for n, f in figures.FIGURES.items()]),
}
"""{what: (columns, rows)}"""


@app.command(name="list")
def list_(
    what: Annotated[
        str,
        typer.Argument(help="algorithms, options (of --set), models, datasets, probes, schedules, figures or reproductions."),
    ],
) -> None:
    """List what the tables hold."""
    columns, rows = lookup(LISTS, what, "list")
    table = Table(*columns)
    for row in rows():
        table.add_row(*row)
    out.print(table)


RUNS = ("train", "compare", "spectrum", "reproduce")
"""Commands whose result are files; of the others it is what they print."""


def main() -> None:
    """Run the command line and exit.

    0: done. 1: a run's numbers left the finite range. 2: bad input, an error of the user's own code, output that cannot be
    written; one line, after the user's own frames. 70: an error of curvlab's own. 128 + n: ended by signal n, 130 by Ctrl-C.
    """
    atexit.register(gc.freeze)  # what is left goes with the process: to collect it took longer than a second
    with listening(most=2):
        code = _ended(sys.argv[1:])
        starting.done(code)
    sys.exit(code)


def _ended(words: list[str]) -> int:
    """The exit code, whatever a signal breaks off: two raise at most, and none once `LISTENER` is deaf."""
    try:
        try:
            with unfailing() as stdout, warnings.catch_warnings():
                warnings.showwarning = _Warn()
                _use_backend(starting.backend)
                code = _run(words)
                LISTENER.deaf = True
                sys.stdout.flush()
                if stdout is not None and stdout.error:
                    _say(f"standard output cannot be written: {stdout.error}")
                    code = code or (0 if code is None and words[0] in RUNS else 2)
        except KeyboardInterrupt as error:
            LISTENER.deaf = True
            return _interrupted(error)
    except KeyboardInterrupt as error:
        LISTENER.deaf = True
        return _interrupted(error)
    return code or 0


def _interrupted(error: KeyboardInterrupt) -> int:
    with unfailing():
        _say(words_of(error))
    return 128 + number_of(error)


def _say(text: str) -> None:
    err.print(for_rich(f"curvlab: {text}"))


def _use_backend(name: str) -> None:
    """The user's MPLBACKEND, for code of theirs that draws (figures need none). One that matplotlib lacks is left out."""
    if name:
        with suppress(ValueError):
            matplotlib.rcParams["backend"] = name
            os.environ["MPLBACKEND"] = name


class _Warn:
    """curvlab's own warnings are one line too, and said once."""

    def __init__(self) -> None:
        self.said: set[str] = set()

    def __call__(
        self,
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        text = f"curvlab: warning: {message}" if issubclass(category, CurvlabWarning) else f"{category.__name__}: {message}"
        if text not in self.said:
            self.said.add(text)
            err.print(for_rich(text))


def _run(words: list[str]) -> int | None:
    """The exit code; None where a command came to its end, 0 where help was all that was asked for."""
    command = typer.main.get_command(app)
    try:
        with command.make_context("curvlab", list(words)) as context:
            command.invoke(context)
    except KeyboardInterrupt as error:
        LISTENER.deaf = True
        _say(words_of(error))
        return 128 + number_of(error)
    except typer.Exit as error:
        return error.exit_code
    except typer.Abort:
        _say("aborted")
        return 130
    except CurvlabError as error:
        return _failed(error, f"{error}", 2, words)
    except BaseException as error:
        signal = behind(error)
        if signal is not None:
            LISTENER.deaf = True
            _say(words_of(signal))
            return 128 + number_of(signal)
        parsing = getattr(error, "format_message", None)  # click's errors; recent versions of typer carry a click of their own
        if parsing is None:
            return _failed(error, *verdict(error, words[0] if words else ""), words)
        if parsing():  # empty where help was shown instead
            _say(" ".join(parsing().split()))
        return 2
    return None


def _failed(error: BaseException, line: str, code: int, words: list[str]) -> int:
    """The frames of the user's own code, if it is theirs, or all where they are asked for; then one line."""
    verbose = any(word in ("-v", "--verbose") for word in words)
    own = blame.whole(error) if verbose and (code == blame.BUG or blame.told(error)) else blame.told(error)
    if own:
        sys.stderr.write(for_terminal(own, lines=True))
    _say(line)
    return code
