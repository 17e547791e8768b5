"""The global random generators: their states, read and set."""

from __future__ import annotations

import torch
from torch import Tensor


def states(device: torch.device) -> list[Tensor]:
    """Of the CPU's generator, and of the device's where that is a GPU."""
    return [torch.get_rng_state()] + ([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])


def set_states(found: list[Tensor], device: torch.device) -> None:
    """Back to what `states` gave."""
    torch.set_rng_state(found[0].cpu())
    if device.type == "cuda":
        torch.cuda.set_rng_state(found[1].cpu(), device)


def drawn_since(before: list[Tensor], device: torch.device) -> bool:
    """Whether a random number was drawn since `before`."""
    return not all(map(torch.equal, before, states(device)))
