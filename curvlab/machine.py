"""The machine that a run is on: number types and devices by name, and the clock."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from curvlab.errors import CurvlabError

DTYPES = {"float32": torch.float32, "float64": torch.float64}
"""{name: dtype} of the command line's ``--dtype``."""


def device_of(name: str) -> torch.device:
    """Return the device of that name; `auto` is CUDA where there is one.

    Raises:
        CurvlabError: an unknown name, or a device that this machine lacks.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise CurvlabError(f"unknown device '{name}' (known: auto, cpu, cuda, cuda:N)") from error
    if device.type not in ("cpu", "cuda"):
        raise CurvlabError(f"device '{name}' is not supported (known: auto, cpu, cuda, cuda:N)")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise CurvlabError(
            f"there is no device '{name}' on this machine ({torch.cuda.device_count()} CUDA"
            " devices): use --device cpu"
        )
    return device


def clock_of(device: torch.device) -> Callable[[], float]:
    """Return a clock in seconds that is read after the device has finished what was asked of it."""
    if device.type != "cuda":
        return time.perf_counter

    def synchronised() -> float:
        torch.cuda.synchronize(device)
        return time.perf_counter()

    return synchronised
