"""``curvlab train``: its options, its table, and how a run goes on."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from curvlab.cli.assignments import training_values
from curvlab.cli.going_on import free_for_training, gone_on, say_anew
from curvlab.cli.options import (
    OUTPUT,
    PROBLEM,
    DataOption,
    DeviceOption,
    DtypeOption,
    VerboseOption,
    out_option,
)
from curvlab.cli.ranks import by_ranks, console_of, says_how_to_go_on
from curvlab.cli.terminal import (
    DIVERGED,
    check_output,
    err,
    finish,
    folder_for,
    says_what_is_saved,
    writing,
)
from curvlab.errors import CurvlabError
from curvlab.system import paths
from curvlab.system.escape import for_rich

if TYPE_CHECKING:
    from curvlab.training.run import NamedTraining

Option = typer.Option

_METHOD, _RATE, _LENGTH, _EVALUATION = "Method", "Learning rate", "Length", "Evaluation"


def train(
    context: typer.Context,
    model: Annotated[
        str | None,
        Option(
            help=(
                "Network, of `curvlab list models`, or module:function of yours. Required, unless"
                " --resume."
            ),
            rich_help_panel=PROBLEM,
        ),
    ] = None,
    data: DataOption = None,
    batch_size: Annotated[
        int,
        Option(
            help="Examples in a minibatch (thesis: 1000 for autoencoders, 128 for CNNs).",
            rich_help_panel=PROBLEM,
        ),
    ] = 1000,
    augment: Annotated[
        bool,
        Option(
            "--augment/--no-augment",
            help="Random crops and flips, where the data set has them (thesis 4.7.2).",
            rich_help_panel=PROBLEM,
        ),
    ] = True,
    seed: Annotated[
        int, Option(help="Of weights, batches, sampled labels, dropout.", rich_help_panel=PROBLEM)
    ] = 0,
    algorithm: Annotated[
        str, Option(help="Of `curvlab list algorithms`.", rich_help_panel=_METHOD)
    ] = "adam",
    damping: Annotated[
        float | None,
        Option(
            help="The algorithm's own: λ, or ε of TNT, Shampoo, Adam; its document's by default.",
            rich_help_panel=_METHOD,
        ),
    ] = None,
    momentum: Annotated[
        float | None,
        Option(
            help="β; its document's by default (0.9: thesis 2.8.2, 3.7.2, 4.7.2).",
            rich_help_panel=_METHOD,
        ),
    ] = None,
    momentum_kind: Annotated[
        str | None,
        Option(
            help=(
                "add: β m + g (thesis ch. 3, 4). average: β m + (1 − β) g (ch. 2). corrected:"
                " Adam's. nesterov: Muon's. Its document's by default."
            ),
            rich_help_panel=_METHOD,
        ),
    ] = None,
    weight_decay: Annotated[
        float | None,
        Option(
            help=(
                "γ, decoupled: W ← W − lr (p + γ W) (thesis Alg. 15, line 19). Its document's by"
                " default: 0, but of methods that have one."
            ),
            rich_help_panel=_METHOD,
        ),
    ] = None,
    l2: Annotated[
        float,
        Option(
            help="μ of a term μ ‖θ‖² in loss and gradient (S2QN (26); thesis 2.8.2: 5e-6).",
            rich_help_panel=_METHOD,
        ),
    ] = 0.0,
    double_grad: Annotated[
        bool,
        Option(
            help="Of K-BFGS: the gradient from two minibatches at almost no cost (thesis 2.8.3).",
            rich_help_panel=_METHOD,
        ),
    ] = False,
    decay: Annotated[
        float | None,
        Option(
            help="Of moving averages; its document's by default: 0.9, Adam's β₂ 0.999.",
            rich_help_panel=_METHOD,
        ),
    ] = None,
    labels: Annotated[
        str | None,
        Option(
            help="data, token (the data's, each place of the loss by itself), model or exact, where"
            " they are not to be the algorithm's own.",
            rich_help_panel=_METHOD,
        ),
    ] = None,
    update_every: Annotated[
        int | None,
        Option(
            help=(
                "T₁ (T of K-BFGS), steps between updates of statistics (thesis: 1; CNNs 10, K-BFGS"
                " 20). Its document's by default."
            ),
            rich_help_panel=_METHOD,
        ),
    ] = None,
    refresh_every: Annotated[
        int | None,
        Option(
            help=(
                "T₂, steps between inversions; by default the documents' for autoencoders: 20 of"
                " KFAC, TNT, Shampoo "
                "(thesis 2.8.2, 4.7.2; 100 for CNNs), else 1."
            ),
            rich_help_panel=_METHOD,
        ),
    ] = None,
    warm_start: Annotated[
        bool,
        Option(
            "--warm-start/--no-warm-start",
            help="One pass for the statistics, where the document has it (2.8.2).",
            rich_help_panel=_METHOD,
        ),
    ] = True,
    own: Annotated[
        list[str] | None,
        Option(
            "--set",
            metavar="NAME=VALUE",
            help="One of the algorithm's own (`curvlab list options`); may be given again.",
            rich_help_panel=_METHOD,
        ),
    ] = None,
    lr: Annotated[
        float | None,
        Option(help="Learning rate α; its document's by default.", rich_help_panel=_RATE),
    ] = None,
    schedule: Annotated[
        str,
        Option(
            help=(
                "constant, step (thesis 3.7.1: 0.1 every 60 epochs), cosine, power (over k^β), or"
                " torch's by name, as ExponentialLR."
            ),
            rich_help_panel=_RATE,
        ),
    ] = "constant",
    schedule_own: Annotated[
        list[str] | None,
        Option(
            "--schedule-set",
            metavar="NAME=VALUE",
            help="An option of the schedule: step has every, factor; cosine least; power exponent.",
            rich_help_panel=_RATE,
        ),
    ] = None,
    schedule_every: Annotated[
        str, Option(help="epoch or step: what the schedule counts.", rich_help_panel=_RATE)
    ] = "epoch",
    epochs: Annotated[
        int | None,
        Option(
            help="Epochs; 20 where neither --steps nor --seconds is given.", rich_help_panel=_LENGTH
        ),
    ] = None,
    steps: Annotated[
        int | None, Option(help="Steps; whichever comes first.", rich_help_panel=_LENGTH)
    ] = None,
    seconds: Annotated[
        float | None,
        Option(
            help=(
                "Wall time of training, evaluation and warm start apart (thesis 2.8.1: 500 for"
                " MNIST)."
            ),
            rich_help_panel=_LENGTH,
        ),
    ] = None,
    evaluate_every: Annotated[
        int,
        Option(
            help="Epochs between evaluations (thesis 2.8.1: 1); the last is always evaluated.",
            rich_help_panel=_EVALUATION,
        ),
    ] = 1,
    evaluate_samples: Annotated[
        int | None,
        Option(
            help=(
                "The training loss is of so many first examples; of all by default (thesis 2.8.1)."
            ),
            rich_help_panel=_EVALUATION,
        ),
    ] = None,
    probe: Annotated[
        list[str] | None,
        Option(
            metavar="NAME[:EVERY]",
            help=(
                "Of `curvlab list probes`, every so many steps, the first among them; may be given "
                "again."
            ),
            rich_help_panel=_EVALUATION,
        ),
    ] = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "float32",
    verbose: VerboseOption = False,
    out_folder: Annotated[
        Path | None, out_option("run.h5, checkpoint.pt, training.png, training.svg")
    ] = None,
    resume: Annotated[
        bool,
        Option(
            "--resume",
            help=(
                "Go on from the checkpoint in --out, bit for bit, with its settings; a longer run"
                " may be asked "
                "for."
            ),
            rich_help_panel=OUTPUT,
        ),
    ] = False,
    checkpoint_seconds: Annotated[
        float,
        Option(
            help="Between checkpoints within an epoch; there is one after every epoch.",
            rich_help_panel=OUTPUT,
        ),
    ] = 60.0,
) -> None:
    """Train a network along one algorithm; log loss, error, times and norms by epoch.

    Loss and error are of the whole training and test set at the end of an epoch (epoch 0: before
    training), in eval mode; error is the fraction of wrong classes, for autoencoders the mean
    squared error of sigmoid(output), for FACES of the output. Defaults are the algorithm's
    document's (`curvlab list algorithms`). Exit code 1: the loss left the finite range, and the
    last good state is kept.
    """
    given = {k: v for k, v in locals().items() if k != "context"}
    from curvlab import models
    from curvlab.machine import device_of
    from curvlab.system.memory import keep_freed_memory
    from curvlab.training import checkpoint
    from curvlab.training.begun import stepless
    from curvlab.training.run import prepare_training, run_named

    call = {k: v for k, v in ({"command": "train"} | given).items() if k != "verbose"}
    call["out"] = str(call.pop("out_folder") or "")
    said = {
        name
        for name in given
        if getattr(context.get_parameter_source(name), "name", "") != "DEFAULT"
    }
    if model is not None:
        models.imported(model)  # a module of the user's may enter probes
    given |= training_values(given)
    renamed = (("warm_start", "warm"), ("schedule_own", "schedule_options"), ("probe", "probes"))
    said |= {new for old, new in renamed if old in said}
    ranks = context.with_resource(by_ranks(call, given["device"]))
    ranks.by_first(lambda: check_output(out_folder, "training", checkpoint.FILE))
    state = None
    if resume:
        if out_folder is None:
            raise CurvlabError("--resume needs the folder of the run: give it with --out")
        if out_folder.is_dir():
            ranks.by_first(lambda: _held(context, out_folder))
        if stepless(out_folder):
            say_anew(out_folder, model)
        else:
            state = checkpoint.load_state(out_folder / checkpoint.FILE)
            given |= gone_on(state, {k: given[k] for k in said}, out_folder)
            where = device_of(given["device"])
            if where.type != "cpu":
                state = checkpoint.load_state(out_folder / checkpoint.FILE, where)
    if state is None and epochs is None and steps is None and seconds is None:
        given["epochs"] = 20
    if given["model"] is None:
        raise CurvlabError("Missing option '--model'.")
    training = prepare_training(_named(given), call, state)
    keep_freed_memory()
    stem = f"train-{given['model'].replace(':', '-')}"
    with ExitStack() as held:

        def place() -> Path:
            """Make the folder and hold it, as one rank alone does."""
            make = partial(folder_for, out_folder, stem)
            made = held.enter_context(paths.made(out_folder, make))
            if not resume:
                held.enter_context(writing(made, free_for_training))
            return made

        folder = ranks.by_first(place)
        if ranks.first:
            training.into(folder)
        code = f" --model {given['model']}" if ":" in given["model"] else ""
        going_on = f"; go on with: curvlab train --resume{code} --out {shlex.quote(str(folder))}"
        with says_what_is_saved(folder / "run.h5", going_on), says_how_to_go_on(going_on):
            run = run_named(training, console_of(ranks, err))
    if not ranks.first:
        raise typer.Exit(DIVERGED if run.stopped else 0)
    ds = run.dataset
    finish(
        ds,
        folder,
        "training",
        f"{ds.attrs['algorithm']} on {ds.attrs['model']}; error: {ds.attrs['error']}",
    )
    if run.stopped:
        err.print(for_rich(f"curvlab: {run.stopped} ({folder / checkpoint.FILE})"))
        raise typer.Exit(DIVERGED)


def checked_training(given: Mapping[str, Any]) -> None:
    """Check the options of a run, its names and ranges; nothing is loaded or built.

    Args:
        given: {option: value}, all of them, as the command line is read.

    Raises:
        CurvlabError: an unknown name or a value out of range.
    """
    length = {} if any(given[name] for name in ("epochs", "steps", "seconds")) else {"epochs": 20}
    named = _named({**given, **length, **training_values(given)})
    named.settings.check()
    named.budget.check()


def _held(context: typer.Context, folder: Path) -> None:
    """Hold a run's folder until the command is done."""
    context.with_resource(writing(folder, lambda folder: None))


def _named(given: Mapping[str, Any]) -> NamedTraining:
    from curvlab.problem import Problem
    from curvlab.training.run import NamedTraining
    from curvlab.training.settings import PARTS, Budget, Settings

    def those(*kinds: type) -> dict[str, Any]:
        names = [name for kind in kinds for name in kind.__dataclass_fields__]  # type: ignore[attr-defined]  # a dataclass
        return {name: given[name] for name in names if name in given}

    parts = {
        "settings": Settings.of(**those(*PARTS)),
        "budget": Budget(**those(Budget)),
        "problem": Problem(**those(Problem)),
    }
    return NamedTraining(**those(NamedTraining) | parts)
