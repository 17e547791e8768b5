"""Options that several commands have, word for word: each is defined once."""

from __future__ import annotations

from typing import Annotated, Any

import typer

PROBLEM, MACHINE, OUTPUT = "Problem", "Machine", "Output"
"""Panels of the help that several commands have."""

ModelOption = Annotated[
    str,
    typer.Option(
        help="Network, of `curvlab list models`, or module:function of yours.",
        rich_help_panel=PROBLEM,
    ),
]
DataOption = Annotated[
    str | None, typer.Option(help="Data set; the model's own by default.", rich_help_panel=PROBLEM)
]
DeviceOption = Annotated[
    str,
    typer.Option(help="auto (CUDA if there is one), cpu, cuda, cuda:N.", rich_help_panel=MACHINE),
]
DtypeOption = Annotated[str, typer.Option(help="float32 or float64.", rich_help_panel=MACHINE)]
VerboseOption = Annotated[
    bool,
    typer.Option(
        "--verbose",
        "-v",
        help="Print which way each block goes, and why (`objective.check`).",
        rich_help_panel=OUTPUT,
    ),
]


def out_option(files: str) -> Any:
    """Return the option --out of a command that writes `files`."""
    return typer.Option(
        "--out",
        metavar="FOLDER",
        help=f"Gets {files}; a fresh one under runs/ by default.",
        rich_help_panel=OUTPUT,
    )
