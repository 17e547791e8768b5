"""The command line put together: parse, call a command, exit.

Bad input is one line on standard error and exit code 2.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import inspect
import os
import sys
import warnings
from collections.abc import Callable
from contextlib import suppress
from typing import Annotated, TextIO

import typer

import curvlab
from curvlab import starting
from curvlab.cli import compare, lists, logs, reproduce, spectrum, sweep, train
from curvlab.cli.ranks import check_command
from curvlab.cli.terminal import err, out, say, say_interrupted
from curvlab.errors import CurvlabError, CurvlabWarning
from curvlab.system import blame
from curvlab.system.blame import verdict
from curvlab.system.escape import for_rich, for_terminal
from curvlab.system.interrupt import LISTENER, behind, listening, number_of
from curvlab.system.streams import unfailing
from curvlab.system.torchrun import may_say

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
    version: Annotated[
        bool, Option("--version", help="Show the version and exit.", is_eager=True)
    ] = False,
    verbose: Annotated[
        bool,
        Option("--verbose", "-v", help="Where an error is no bad input, show its whole traceback."),
    ] = False,
) -> None:
    """Curvature diagnostics of neural networks."""
    if version:
        out.print(f"curvlab {curvlab.__version__}", highlight=False)
        raise typer.Exit


def _help(command: Callable[..., None]) -> str:
    """Return a command's docstring with each paragraph as one line, for the terminal to break."""
    paragraphs = inspect.cleandoc(command.__doc__ or "").split("\n\n")
    return "\n\n".join(" ".join(lines.split()) for lines in paragraphs)


for _command in (
    compare.compare,
    spectrum.spectrum,
    train.train,
    reproduce.reproduce,
    logs.plot,
    logs.report,
    logs.doctor,
):
    app.command(help=_help(_command))(_command)
app.command(
    help=_help(sweep.sweep),
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)(sweep.sweep)
app.command(name="list", help=_help(lists.list_))(lists.list_)

_HEAVY = {
    "compare": "curvlab.comparison_run",
    "train": "curvlab.training.run",
    "spectrum": "curvlab.spectrum_run",
    "reproduce": "curvlab.reproduction",
    "sweep": "curvlab.cli.sweeping",
    "plot": "curvlab.show.figures",
    "report": "curvlab.show.page",
    "doctor": "curvlab.doctor",
}
"""{command: what takes seconds to import}: imported while a signal still ends the process
(`starting.leave`); an exception in the middle of torch's or numpy's own import would leave half of
them behind.
"""


def _load(words: list[str]) -> None:
    chosen = next((word for word in words if not word.startswith("-")), "")
    if chosen in _HEAVY and not {"-h", "--help"} & set(words):
        importlib.import_module(_HEAVY[chosen])


RUNS = ("train", "compare", "spectrum", "reproduce", "sweep")
"""Commands whose result are files; of the others it is what they print."""


def main() -> None:
    """Run the command line and exit.

    0: done. 1: a run's numbers left the finite range. 2: bad input, an error of the user's own
    code, output that cannot be written; one line, after the user's own frames. 70: an error of
    curvlab's own. 128 + n: ended by signal n, 130 by Ctrl-C.
    """
    # what is left goes with the process: to collect it took longer than a second
    atexit.register(gc.freeze)
    _load(sys.argv[1:])
    with listening(most=2):
        code = _ended(sys.argv[1:])
        starting.done(code)
    sys.exit(code)


def _ended(words: list[str]) -> int:
    """Return the exit code, whatever a signal breaks off.

    Two raise at most, and none once `LISTENER` is deaf.
    """
    try:
        try:
            with unfailing() as stdout, warnings.catch_warnings():
                warnings.showwarning = _Warn()
                _use_backend(starting.backend)
                code = _run(words)
                LISTENER.deaf = True
                sys.stdout.flush()
                if stdout is not None and stdout.error:
                    say(f"standard output cannot be written: {stdout.error}")
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
        say_interrupted(error)
    return 128 + number_of(error)


def _use_backend(name: str) -> None:
    """Set the user's MPLBACKEND, for code of theirs that draws (figures need none).

    One that matplotlib lacks is left out.
    """
    if name:
        import matplotlib

        with suppress(ValueError):
            matplotlib.rcParams["backend"] = name
            os.environ["MPLBACKEND"] = name


class _Warn:
    """A printer of warnings: curvlab's own are one line too, and said once."""

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
        """Print a warning, if it was not said yet."""
        text = (
            f"curvlab: warning: {message}"
            if issubclass(category, CurvlabWarning)
            else f"{category.__name__}: {message}"
        )
        if text not in self.said:
            self.said.add(text)
            if may_say(text):
                err.print(for_rich(text))


def _run(words: list[str]) -> int | None:
    """Return the exit code of a command; None where it came to its end.

    It is 0 where help was all that was asked for.
    """
    command = typer.main.get_command(app)
    try:
        check_command(words)
        with command.make_context("curvlab", list(words)) as context:
            command.invoke(context)
    except KeyboardInterrupt as error:
        LISTENER.deaf = True
        say_interrupted(error)
        return 128 + number_of(error)
    except typer.Exit as error:
        return error.exit_code
    except typer.Abort:
        say("aborted")
        return 130
    except CurvlabError as error:
        return _failed(error, f"{error}", 2, words)
    except BaseException as error:
        signal = behind(error)
        if signal is not None:
            LISTENER.deaf = True
            say_interrupted(signal)
            return 128 + number_of(signal)
        # click's errors; recent versions of typer carry a click of their own
        parsing = getattr(error, "format_message", None)
        if parsing is None:
            return _failed(error, *verdict(error, words[0] if words else ""), words)
        if parsing():  # empty where help was shown instead
            say(" ".join(parsing().split()))
        return 2
    return None


def run_here(words: list[str]) -> int:
    """Run a command in this process and thread, whatever it is; return the exit code.

    It prints what the command prints and handles no signals.
    """
    with warnings.catch_warnings():
        warnings.showwarning = _Warn()
        return _run(words) or 0


def _failed(error: BaseException, line: str, code: int, words: list[str]) -> int:
    """Print what a user reads of an error, and return the exit code.

    It is the frames of their own code, if it is theirs, or all where they are asked for; then one
    line.
    """
    verbose = any(word in ("-v", "--verbose") for word in words)
    own = (
        blame.full_traceback(error)
        if verbose and (code == blame.BUG or blame.told(error))
        else blame.told(error)
    )
    if own:
        sys.stderr.write(for_terminal(own, lines=True))
    say(line)
    return code
