"""``curvlab spectrum``: its options, and what it writes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from curvlab.cli.options import (
    DataOption,
    DeviceOption,
    DtypeOption,
    ModelOption,
    VerboseOption,
    out_option,
)
from curvlab.cli.terminal import (
    check_output,
    err,
    finish,
    folder_for,
    listed,
    says_what_is_saved,
    writing,
)
from curvlab.errors import CurvlabError, shown
from curvlab.system import paths

Option = typer.Option


def spectrum(
    model: ModelOption,
    data: DataOption = None,
    samples: Annotated[
        int,
        Option(
            help="The spectra are of the mean loss over so many first training examples.",
            rich_help_panel="Problem",
        ),
    ] = 1000,
    matrix: Annotated[
        str,
        Option(
            help="Of hessian, ggn, pi, fisher, fisher-mc, ef, with commas between.",
            rich_help_panel="Spectra",
        ),
    ] = "hessian,ggn",
    blocks: Annotated[
        str,
        Option(
            help="all, names, or whole (the matrix of all parameters), with commas between.",
            rich_help_panel="Spectra",
        ),
    ] = "all",
    method: Annotated[
        str,
        Option(
            help=(
                "exact: every eigenvalue; lanczos: density and ends; auto: exact up to order 6000."
            ),
            rich_help_panel="Spectra",
        ),
    ] = "auto",
    draws: Annotated[
        int, Option(help="Starting vectors of Lanczos.", rich_help_panel="Spectra")
    ] = 10,
    steps: Annotated[int, Option(help="Steps of Lanczos.", rich_help_panel="Spectra")] = 100,
    after: Annotated[
        str,
        Option(
            help="Numbers of training steps to stop at, with commas between.",
            rich_help_panel="Training",
        ),
    ] = "0,100,1000",
    algorithm: Annotated[
        str, Option(help="Trains the model.", rich_help_panel="Training")
    ] = "adam",
    lr: Annotated[
        float | None,
        Option(help="Learning rate; its document's by default.", rich_help_panel="Training"),
    ] = None,
    damping: Annotated[
        float | None,
        Option(
            help="The algorithm's own damping; its document's by default.",
            rich_help_panel="Training",
        ),
    ] = None,
    batch_size: Annotated[
        int, Option(help="Examples in a minibatch of training.", rich_help_panel="Training")
    ] = 1000,
    seed: Annotated[
        int,
        Option(help="Of weights, batches, sampled labels and Lanczos.", rich_help_panel="Training"),
    ] = 0,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "float64",
    verbose: VerboseOption = False,
    out_folder: Annotated[Path | None, out_option("run.h5, spectrum.png, spectrum.svg")] = None,
) -> None:
    """Train, and log the eigenvalues of each layer's curvature along the way.

    They are those of its Hessian and Gauss-Newton blocks, or of other matrices.
    """
    call = {k: v for k, v in ({"command": "spectrum"} | dict(locals())).items() if k != "verbose"}
    call["out"] = str(call.pop("out_folder") or "")
    from curvlab import spectra, spectrum_run
    from curvlab.problem import Problem
    from curvlab.system.memory import keep_freed_memory

    plan = spectra.Plan(listed(matrix), listed(blocks), method, draws, steps)
    at = tuple(_integer(word, "--after") for word in listed(after))
    named = spectrum_run.NamedSpectra(
        problem=Problem(model=model, data=data, seed=seed, device=device, dtype=dtype),
        plan=plan,
        samples=samples,
        after=at,
        algorithm=algorithm,
        lr=lr,
        damping=damping,
        batch_size=batch_size,
        verbose=verbose,
    )
    check_output(out_folder, "spectrum")
    prepared = spectrum_run.prepare_spectra(named)
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
        raise CurvlabError(
            f"{option} takes whole numbers with commas between, not {shown(text)}"
        ) from error
