"""The command line: parse, call `runs`, exit. Bad input is one line on standard error and exit code 2."""

from __future__ import annotations

import atexit
import gc
import signal
import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, TextIO

import typer
from rich.table import Table

import curvlab
from curvlab import cli_reproduce, cli_train, datasets, figures, models, probes, runs, spectra, spectrum_run
from curvlab.algorithms import ALGORITHMS
from curvlab.errors import CurvlabError, CurvlabWarning, lookup
from curvlab.log import open_log
from curvlab.memory import keep_freed_memory
from curvlab.probes import costs
from curvlab.terminal import err, finish, folder_for, listed, out, says_what_is_saved
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
    """
    call = {k: v for k, v in ({"command": "compare"} | dict(locals())).items() if k != "verbose"}
    call["out"] = str(call.pop("out_folder") or "")
    settings = runs.Settings(
        reference, listed(algorithms), lr, damping, momentum, decay, update_every, refresh_every, log_every, tuple(probe or ())
    )
    if steps is None and epochs is None:
        steps = 300
    if seed < 0:
        raise CurvlabError(f"the seed must be 0 or positive, not {seed}")
    named = runs.Named(
        settings, model, data, steps, epochs, batch_size, tuple(range(seed, seed + seeds)), device, dtype, verbose
    )
    runs.check_named(named)
    keep_freed_memory()
    folder = folder_for(out_folder, f"compare-{model}")
    with says_what_is_saved(folder / "run.h5"):
        ds = runs.compare_named(named, folder / "run.h5", call, err).dataset
    finish(ds, folder, "cosine")


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
    prepared = spectrum_run.prepare(named)
    keep_freed_memory()
    folder = folder_for(out_folder, f"spectrum-{model}")
    with says_what_is_saved(folder / "run.h5"):
        ds = spectrum_run.run(prepared, folder / "run.h5", call, err)
    finish(ds, folder, "spectrum")


def _integer(text: str, option: str) -> int:
    try:
        return int(text)
    except ValueError as error:
        raise CurvlabError(f"{option} takes whole numbers with commas between, not '{text}'") from error


app.command()(cli_train.train)
app.command()(cli_reproduce.reproduce)


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
    found = {path: open_log(path) for path in run}
    figure = figure or figures.main(found[run[0]])
    target = output or (run[0] if run[0].is_dir() else run[0].parent) / f"{figure}.png"
    drawn = figures.draw_all([(str(path), ds) for path, ds in found.items()], figure)
    if target.suffix[1:] not in drawn.canvas.get_supported_filetypes():
        raise CurvlabError(f"figures are not written as '{target.suffix}' (known: .png, .svg, .pdf)")
    try:
        drawn.savefig(target, dpi=150)
    except OSError as error:
        raise CurvlabError(f"{target} cannot be written: {error.strerror}") from error
    out.print(f"wrote {target}", highlight=False, soft_wrap=True)


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
    target = output or (run[0] if run[0].is_dir() else run[0].parent) / "report.html"
    curvlab.report([str(path) for path in run], target)
    out.print(f"wrote {target}", markup=False, highlight=False, soft_wrap=True)


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
        ("name", "what it is", "of", "every", f"cost × ({', '.join(costs.MODELS)})", "variables"),
        _probe_rows,
    ),
    "schedules": (("name", "what it is", "options", "source"), _schedule_rows),
    "reproductions": (cli_reproduce.COLUMNS, cli_reproduce.rows),
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


def main() -> None:
    """Run the command line; one line and exit code 2 for bad input, 130 for Ctrl-C."""
    hook, sys.unraisablehook = sys.unraisablehook, _interrupt_again
    atexit.register(gc.freeze)  # what is left goes with the process: to collect it took longer than a second
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _Warn()
            code = _run()
    finally:
        sys.unraisablehook = hook
    sys.exit(code)


def _interrupt_again(unraisable: sys.UnraisableHookArgs) -> None:
    """A Ctrl-C that comes while a weak reference is cleared is dropped there by Python: send it once more, a moment later."""
    main = threading.main_thread().ident
    if issubclass(unraisable.exc_type, KeyboardInterrupt) and main is not None:
        again = threading.Timer(0.01, signal.pthread_kill, (main, signal.SIGINT))  # wakes what waits, as a real one does
        again.daemon = True
        again.start()
    else:
        sys.__unraisablehook__(unraisable)


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
            err.print(text, markup=False)


def _run() -> int:
    command = typer.main.get_command(app)
    try:
        code = command.main(prog_name="curvlab", standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        err.print("curvlab: interrupted", markup=False)
        return 130
    except Exception as error:
        parsing = getattr(error, "format_message", None)  # click's errors; recent versions of typer carry a click of their own
        if not isinstance(error, CurvlabError) and parsing is None:
            raise
        err.print(f"curvlab: {error if parsing is None else parsing()}", markup=False)
        return 2
    return code if isinstance(code, int) else 0
