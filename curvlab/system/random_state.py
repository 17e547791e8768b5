"""The global random generators, torch's, Python's and numpy's: their states, read and set."""

from __future__ import annotations

import ctypes
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Chance:
    """The states of the global generators.

    They are torch's of the CPU, and of a device that is a GPU; Python's; numpy's legacy one.
    """

    torch: tuple[Tensor, ...]
    python: tuple[Any, ...]
    numpy: dict[str, Any]

    def state_dict(self) -> dict[str, Any]:
        """Return the states as tensors, numbers, strings, tuples and dictionaries only."""
        return {"torch": list(self.torch), "python": self.python, "numpy": _plain(self.numpy)}

    @classmethod
    def of(cls, state: Mapping[str, Any] | list[Tensor]) -> Chance:
        """Make the states from what `state_dict` returned.

        Args:
            state: that, or torch's states alone, as checkpoints once held them: the others are as
                they are now.
        """
        if isinstance(state, list):
            state = {"torch": state, "python": random.getstate(), "numpy": _numpy_state()}
        version, numbers, normal = state["python"]
        return cls(tuple(state["torch"]), (version, tuple(numbers), normal), state["numpy"])


def torch_states(device: torch.device) -> tuple[Tensor, ...]:
    """Return the states of torch's generators: the CPU's, and the device's where it is a GPU."""
    found = (torch.get_rng_state(),)
    return (*found, torch.cuda.get_rng_state(device)) if device.type == "cuda" else found


def set_torch_states(found: Sequence[Tensor], device: torch.device) -> None:
    """Set torch's generators back to what `torch_states` gave."""
    torch.set_rng_state(found[0].cpu())
    if device.type == "cuda":
        torch.cuda.set_rng_state(found[1].cpu(), device)


def states(device: torch.device) -> Chance:
    """Return the states of the CPU's generators, and of the device's where that is a GPU."""
    return Chance(torch_states(device), random.getstate(), _numpy_state())


def set_states(found: Chance, device: torch.device) -> None:
    """Set the generators back to what `states` gave."""
    set_torch_states(found.torch, device)
    random.setstate(found.python)
    np.random.set_state(found.numpy)  # noqa: NPY002


def drawn_since(before: Chance, device: torch.device) -> bool:
    """Return whether a random number was drawn since `before`."""
    if not torch.equal(before.torch[0], torch.get_rng_state()):
        return True
    if device.type == "cuda" and not torch.equal(before.torch[1], torch.cuda.get_rng_state(device)):
        return True
    return drawn_by_hosts(before)


def drawn_by_hosts(before: Chance) -> bool:
    """Return whether Python or numpy drew a random number since `before`."""
    return before.python != random.getstate() or _numpy_drawn(before.numpy)


def _numpy_state() -> dict[str, Any]:
    return np.random.get_state(legacy=False)  # noqa: NPY002


def _numpy_drawn(before: dict[str, Any]) -> bool:
    """Return whether numpy's legacy generator drew since `before`.

    Reading the state takes 23 µs. It is left out where the words of the Mersenne Twister say all:
    where of two normal numbers, which are made at once, none was kept for later.
    """
    now = np.random.mtrand.get_bit_generator()
    if before["bit_generator"] == "MT19937" == type(now).__name__ and not before.get("has_gauss"):
        words = np.asarray(before["state"]["key"], np.uint32).tobytes() + bytes(
            ctypes.c_int(before["state"]["pos"])
        )
        return words != ctypes.string_at(now.ctypes.state_address, len(words))
    return bool(_plain(before) != _plain(_numpy_state()))


def _plain(value: Any) -> Any:
    """Return a state without arrays."""
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else value


@contextmanager
def kept(device: torch.device) -> Iterator[None]:
    """Leave the generators as they were before."""
    before = states(device)
    try:
        yield
    finally:
        set_states(before, device)


@contextmanager
def replayed(before: Chance, device: torch.device) -> Iterator[None]:
    """Let the generators go on from `before` inside; afterwards they are as they were."""
    with kept(device):
        set_states(before, device)
        yield


def seed(number: int) -> None:
    """Seed all global generators from one number."""
    torch.manual_seed(number)
    random.seed(number)
    np.random.seed(number % 2**32)  # noqa: NPY002
