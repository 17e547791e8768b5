"""Checkpoints: one file, whole and sealed, of plain values; it loads as nothing else.

They are tensors, numbers, strings, lists and dictionaries. `torch.load(…, weights_only=True)` reads
the file, so that no file can run code.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch import Tensor

from curvlab.errors import CurvlabError, cause_of
from curvlab.system.atomic import damaged, rewrite_sealed, unsealed
from curvlab.system.interrupt import behind

FILE = "checkpoint.pt"
FORMAT = 2
"""The format that is written; format 1, of earlier versions, has no seal."""
_PLAIN = (Tensor, int, float, str, bool, type(None))


def save(path: Path, state: dict[str, Any]) -> None:
    """Rewrite the file.

    Args:
        path: of the file.
        state: what it is to hold.

    Raises:
        CurvlabError: it cannot be written, or the state holds what would need pickled code.
    """
    where = _foreign(state)
    if where is not None:
        raise CurvlabError(
            "a checkpoint holds tensors, numbers, strings, lists and dictionaries only, but"
            f" {where[0]} is of type {where[1]}: without a folder a run writes none"
        )
    outer = sys.exception()
    try:
        rewrite_sealed(
            path, lambda stream: torch.save({"format": FORMAT} | state, cast(IO[bytes], stream))
        )
    except (
        OSError,
        RuntimeError,
    ) as error:  # torch's writer raises RuntimeError too, also in place of what broke it off
        signal = behind(error, outer)
        if signal is not None:
            raise signal from None
        raise CurvlabError(f"the checkpoint {path} cannot be written: {cause_of(error)}") from error


def _foreign(value: Any, at: str = "state") -> tuple[str, str] | None:
    """Return where something lies that is not plain, and of what type it is; None where all is."""
    if isinstance(value, dict):
        parts = [(f"{at}[{k!r}]", v) for k, v in value.items()]
    elif isinstance(value, list | tuple):
        parts = [(f"{at}[{i}]", v) for i, v in enumerate(value)]
    else:
        return (
            None
            if type(value) in _PLAIN or isinstance(value, Tensor)
            else (at, type(value).__name__)
        )
    return next((found for name, part in parts if (found := _foreign(part, name))), None)


def load_state(path: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Return what was saved, its tensors on `device`.

    Raises:
        CurvlabError: no such file, or one that is damaged or no checkpoint of curvlab.
    """
    if not path.is_file():
        raise CurvlabError(f"there is no checkpoint at {path}: start the run without --resume")
    with unsealed(path) as (stream, sealed):
        try:
            state = torch.load(stream, map_location=device, weights_only=True)
        except Exception as error:  # torch, its zip reader and its unpickler raise a dozen kinds
            raise CurvlabError(
                f"the checkpoint {path} is damaged or no checkpoint of curvlab: restore it or start"
                " again"
            ) from error
    form = state.get("format") if isinstance(state, dict) else None
    if type(form) is not int or not 1 <= form <= FORMAT:
        raise CurvlabError(
            f"{path} is no checkpoint of this version of curvlab: start again in another folder"
        )
    if form > 1 and not sealed:
        raise damaged(path)
    return dict(state)
