"""``curvlab compare``: its options, and what it writes."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Annotated, Any, cast

import typer

from curvlab.cli.options import (
    DataOption,
    DeviceOption,
    DtypeOption,
    ModelOption,
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
    listed,
    says_what_is_saved,
    writing,
)
from curvlab.errors import Diverged, whole
from curvlab.published import FIGURE_4_1
from curvlab.system import paths
from curvlab.system.escape import for_rich

Option = typer.Option


def compare(
    context: typer.Context,
    model: ModelOption,
    data: DataOption = None,
    reference: Annotated[
        str,
        Option(
            help="Algorithm that moves the parameters and to which cosines are taken.",
            rich_help_panel="Methods",
        ),
    ] = "block-fisher",
    algorithms: Annotated[
        str, Option(help="The others, with commas between.", rich_help_panel="Methods")
    ] = ",".join(FIGURE_4_1),
    lr: Annotated[
        float | None,
        Option(
            help="Learning rate of the reference; its document's by default.",
            rich_help_panel="Methods",
        ),
    ] = None,
    damping: Annotated[
        float | None,
        Option(
            help="Overall damping λ, given to every method by one rule (see docs); 1e-3, but 1e-2"
            " of gpt-tiny, 0.1 of gpt-small.",
            rich_help_panel="Methods",
        ),
    ] = None,
    momentum: Annotated[
        float, Option(help="β of every method (thesis 4.7.2).", rich_help_panel="Methods")
    ] = 0.9,
    decay: Annotated[
        float | None,
        Option(
            help="Of every moving average; by default each document's: 0.9, Adam's β₂ 0.999.",
            rich_help_panel="Methods",
        ),
    ] = None,
    unit: Annotated[
        str,
        Option(
            help="Of empirical Fisher matrices: sequence, or token, each place of the loss by"
            " itself.",
            rich_help_panel="Methods",
        ),
    ] = "sequence",
    update_every: Annotated[
        int, Option(help="T₁, steps between updates of statistics.", rich_help_panel="Methods")
    ] = 1,
    refresh_every: Annotated[
        int | None,
        Option(
            help="T₂, steps between inversions; 1, but 2 of gpt-tiny and gpt-small.",
            rich_help_panel="Methods",
        ),
    ] = None,
    steps: Annotated[
        int | None,
        Option(
            help="Steps; 300 unless --epochs says otherwise; 20 of gpt-tiny, gpt-small.",
            rich_help_panel="Length",
        ),
    ] = None,
    epochs: Annotated[
        int | None,
        Option(help="Epochs; with --steps, whichever ends first.", rich_help_panel="Length"),
    ] = None,
    batch_size: Annotated[
        int | None,
        Option(
            help="Examples in a minibatch; 1000, but 32 of gpt-tiny, 12 of gpt-small.",
            rich_help_panel="Length",
        ),
    ] = None,
    warm_batches: Annotated[
        int | None,
        Option(
            help="Minibatches of the warm start at most; one pass, but 20 of gpt-tiny, gpt-small.",
            rich_help_panel="Length",
        ),
    ] = None,
    seed: Annotated[
        int, Option(help="Of weights, batches and sampled labels.", rich_help_panel="Length")
    ] = 0,
    seeds: Annotated[
        int, Option(help="Repeat with so many seeds, from --seed on.", rich_help_panel="Length")
    ] = 1,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "float32",
    log_every: Annotated[int, Option(help="Steps between records.", rich_help_panel="Output")] = 1,
    probe: Annotated[
        list[str] | None,
        Option(
            metavar="NAME[:EVERY]",
            help="A further one of `curvlab list probes`, every so many steps; may be given again.",
            rich_help_panel="Output",
        ),
    ] = None,
    verbose: VerboseOption = False,
    out_folder: Annotated[Path | None, out_option("run.h5, cosine.png, cosine.svg")] = None,
) -> None:
    """Follow one algorithm, and compare the direction of every other with its own.

    Cosines are by layer (thesis Figure 4.1).

    The defaults are the published picture: the trajectory of block-fisher, batches of 1000,
    learning rate 0.03, overall damping 1e-3, 300 steps, warm start over one pass, sampled labels.

    A method whose numbers leave the finite range is named, and NaN from that step on, while the
    others go on to the end; if it is the reference, the run ends there. Exit code 1 in both cases.
    """
    call = {k: v for k, v in ({"command": "compare"} | dict(locals())).items() if k != "verbose"}
    del call["context"]
    call["out"] = str(call.pop("out_folder") or "")
    from curvlab import comparison_run
    from curvlab.comparison_settings import CompareSettings
    from curvlab.problem import Problem
    from curvlab.system.memory import keep_freed_memory
    from curvlab.units import Unit

    problem = Problem(model=model, data=data, seed=seed, device=device, dtype=dtype)
    own = problem.entry.comparison
    damping = own.damping if damping is None else damping
    batch_size = own.batch_size if batch_size is None else batch_size
    refresh_every = own.refresh_every if refresh_every is None else refresh_every
    warm_batches = own.warm if warm_batches is None else warm_batches
    if steps is None and epochs is None:
        steps = own.steps
    call |= {"damping": damping, "batch_size": batch_size, "refresh_every": refresh_every}
    call["steps"] = steps
    call["warm_batches"] = warm_batches
    settings = CompareSettings(
        reference=reference,
        algorithms=listed(algorithms),
        lr=lr,
        damping=damping,
        momentum=momentum,
        decay=decay,
        update_every=update_every,
        refresh_every=refresh_every,
        log_every=log_every,
        probes=tuple(probe or ()),
        unit=cast(Unit, unit),
    )
    whole("the seed", seed, 0)
    whole("seeds", seeds, 1, comparison_run.SEEDS)
    ranks = context.with_resource(by_ranks(call, device))
    ranks.by_first(lambda: check_output(out_folder, "cosine"))
    named = comparison_run.NamedComparison(
        settings=settings,
        problem=problem,
        steps=steps,
        epochs=epochs,
        batch_size=batch_size,
        warm=warm_batches,
        seeds=tuple(range(seed, seed + seeds)),
        verbose=verbose,
    )
    prepared = comparison_run.prepare_comparison(named)
    keep_freed_memory()
    with ExitStack() as held:

        def place() -> Path:
            """Make the folder and hold it, as one rank alone does."""
            make = partial(folder_for, out_folder, f"compare-{model}")
            made = held.enter_context(paths.made(out_folder, make))
            held.enter_context(writing(made))
            return made

        folder = ranks.by_first(place)
        held.enter_context(says_what_is_saved(folder / "run.h5"))
        held.enter_context(says_how_to_go_on(f"; what was logged until then is in {folder}"))
        path = folder / "run.h5" if ranks.first else None
        try:
            run = comparison_run.compare_named(prepared, path, call, console_of(ranks, err))
        except Diverged as error:
            if not (folder / "run.h5").exists():
                raise
            if ranks.first:
                err.print(
                    for_rich(f"curvlab: {error} (the log so far is saved in {folder / 'run.h5'})")
                )
            raise typer.Exit(DIVERGED) from error
    if ranks.first:
        finish(run.dataset, folder, "cosine")
    if run.diverged:
        raise typer.Exit(DIVERGED)


def checked_comparison(given: Mapping[str, Any]) -> None:
    """Check the options of a comparison, its names and ranges; nothing is loaded or built.

    Args:
        given: {option: value}, all of them, as the command line is read.

    Raises:
        CurvlabError: an unknown name or a value out of range.
    """
    from curvlab.comparison_settings import CompareSettings

    chosen = {k: v for k, v in given.items() if k in CompareSettings.__dataclass_fields__}
    chosen = {k: v for k, v in chosen.items() if v is not None or k in ("lr", "decay")}
    words = {"algorithms": listed(given["algorithms"]), "probes": tuple(given["probe"] or ())}
    CompareSettings(**(chosen | words)).check()
