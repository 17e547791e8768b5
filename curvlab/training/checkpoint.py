"""Checkpoints: one file, always whole, that holds tensors, numbers, strings, lists and dictionaries, and loads as nothing else.

`torch.load(…, weights_only=True)` reads it, so that no file can run code.
"""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from curvlab.atomic import rewrite
from curvlab.errors import CurvlabError

FILE = "checkpoint.pt"
FORMAT = 1
_PLAIN = (Tensor, int, float, str, bool, type(None))


def save(path: Path, state: dict[str, Any]) -> None:
    """Rewrite the file. Raises CurvlabError where that cannot be done, or the state holds what would need pickled code."""
    where = _foreign(state)
    if where is not None:
        raise CurvlabError(
            f"a checkpoint holds tensors, numbers, strings, lists and dictionaries only, but {where[0]} is of type {where[1]}"
        )
    try:
        rewrite(path, lambda aside: torch.save({"format": FORMAT} | state, aside))
    except (OSError, RuntimeError) as error:  # torch's writer raises RuntimeError for a full disk
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CurvlabError(f"the checkpoint {path} cannot be written: {reason}") from error


def _foreign(value: Any, at: str = "state") -> tuple[str, str] | None:
    """Where something lies that is not plain, and of what type it is; None where there is no such thing."""
    if isinstance(value, dict):
        parts = [(f"{at}[{k!r}]", v) for k, v in value.items()]
    elif isinstance(value, list | tuple):
        parts = [(f"{at}[{i}]", v) for i, v in enumerate(value)]
    else:
        return None if type(value) in _PLAIN or isinstance(value, Tensor) else (at, type(value).__name__)
    return next((found for name, part in parts if (found := _foreign(part, name))), None)


def load(path: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """What was saved, its tensors on `device`.

    Raises:
        CurvlabError: no such file, or one that is damaged or no checkpoint of curvlab.
    """
    if not path.is_file():
        raise CurvlabError(f"there is no checkpoint at {path}: start the run without --resume")
    try:
        state = torch.load(path, map_location=device, weights_only=True)
    except (OSError, RuntimeError, ValueError, EOFError, KeyError, zipfile.BadZipFile, pickle.UnpicklingError) as error:
        raise CurvlabError(
            f"the checkpoint {path} is damaged or no checkpoint of curvlab: restore it or start again"
        ) from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise CurvlabError(f"{path} is no checkpoint of this version of curvlab: start again in another folder")
    return state
