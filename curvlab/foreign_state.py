"""What an optimizer of somebody else's keeps in attributes, beside torch's `state` and groups.

`state_dict` leaves it out: a counter of steps, a scheduler, masks by parameter. A run that goes on
from a checkpoint without it takes other steps. So it is written down as plain data and put back.
"""

from __future__ import annotations

import copy
import enum
import random
import types
from collections.abc import Collection, Iterable, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

_TORCHS = frozenset(vars(torch.optim.SGD([torch.zeros(())], lr=0.1)))
_ATOMS = (bool, int, float, str, type(None))
_SEQUENCES = {"list": list, "tuple": tuple, "set": set}
_UNMOVED = (
    torch.dtype,
    torch.device,
    type,
    types.ModuleType,
    types.FunctionType,
    types.BuiltinFunctionType,
    types.MethodType,
    enum.Enum,
    nn.Module,
)
_SAME = ("same",)
"""What stays as it is found: a function, or an object that was written down before."""


class AttributeState:
    """The attributes of an optimizer, of optimizers in it and of the objects that they hold.

    Args:
        optimizer: whose.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self._weights = [p for group in optimizer.param_groups for p in group["params"]]
        self._numbers = {id(p): number for number, p in enumerate(self._weights)}
        self._met: set[int] = set()
        self.lost: list[str] = []
        """Places of what is no plain data, and so not in the last `state_dict`."""

    def state_dict(self) -> dict[str, Any]:
        """Return {attribute: what it holds}, of atoms, tensors and tagged tuples of them."""
        self.lost, self._met = [], {id(self.optimizer)}
        return self._attributes(self.optimizer, "")

    def load_state_dict(self, found: Mapping[str, Any]) -> None:
        """Let the attributes hold what they held. Raises AttributeError where one is no more."""
        self._put_all(self.optimizer, found)

    # ---- written down

    def _attributes(self, holder: Any, path: str) -> dict[str, Any]:
        torchs = _TORCHS if isinstance(holder, torch.optim.Optimizer) else frozenset()
        found = {}
        for name, value in vars(holder).items():
            if name not in torchs:
                try:
                    found[name] = self._written(value, f"{path}{name}")
                except TypeError:
                    self.lost.append(f"{path}{name}")
        return found

    def _written(self, value: Any, path: str) -> Any:
        """Return plain data for a value. Raises TypeError for what is none."""
        if type(value) in _ATOMS:
            return value
        if id(value) in self._numbers:
            return "weight", self._numbers[id(value)]
        if isinstance(value, Tensor):
            return value.detach().clone()
        if isinstance(value, np.ndarray | np.generic):
            return "array", value.tolist()
        for tag, kind in _SEQUENCES.items():
            if type(value) is kind:
                return self._several(tag, None, value, path)
        if isinstance(value, dict):
            return self._several("dict", map(self._key, value), value.values(), path)
        if isinstance(value, torch.Generator):
            return "generator", value.get_state()
        if isinstance(value, random.Random):
            return "generator", self._written(value.getstate(), path)
        if isinstance(value, np.random.Generator):
            return "generator", self._written(value.bit_generator.state, path)
        if isinstance(value, _UNMOVED) or id(value) in self._met:
            return _SAME
        self._met.add(id(value))
        inside = self._attributes(value, f"{path}.")
        if isinstance(value, torch.optim.Optimizer):
            return "optimizer", plain_state(value), inside
        return "object", inside

    def _several(
        self, tag: str, keys: Iterable[Any] | None, values: Collection[Any], path: str
    ) -> Any:
        """Return what a list or dictionary holds. Raises TypeError where objects are among it."""
        found = [self._written(value, path) for value in values]
        objects = [_tag(each) in ("same", "object", "optimizer", "generator") for each in found]
        if objects and all(_tag(each) == "same" for each in found):
            return _SAME
        if any(objects):
            raise TypeError
        return tag, found if keys is None else list(zip(keys, found, strict=True))

    def _key(self, key: Any) -> Any:
        if isinstance(key, int) and key in self._numbers:
            return "id", self._numbers[key]
        return self._written(key, "")

    # ---- put back

    def _put_all(self, holder: Any, found: Mapping[str, Any]) -> None:
        for name, written in found.items():
            if _tag(written) != "same":
                setattr(holder, name, self._read(written, getattr(holder, name, None)))

    def _read(self, written: Any, held: Any = None) -> Any:
        """Return what plain data stand for; an object that is `held` is that one, moved."""
        if not isinstance(written, tuple):
            return copy.deepcopy(written)
        tag, content = written[:2]
        match tag:
            case "weight":
                return self._weights[content]
            case "id":
                return id(self._weights[content])
            case "array":
                return np.asarray(content) if isinstance(held, np.ndarray) else content
            case "list" | "tuple" | "set":
                return _SEQUENCES[tag](map(self._read, content))
            case "dict":
                pairs = {self._read(key): self._read(value) for key, value in content}
                if held is None or type(held) is dict:
                    return pairs
                held.clear()
                held.update(pairs)
            case "generator":
                _set_state(held, self._read(content))
            case "optimizer":
                load_plain_state(held, content)
                self._put_all(held, written[2])
            case _:
                self._put_all(held, content)
        return held


def plain_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return a copy of an optimizer's own state, without what no checkpoint holds of its groups.

    Those are constants: dtypes, enumerations, functions.
    """
    state: dict[str, Any] = copy.deepcopy(optimizer.state_dict())
    for group in state.get("param_groups", []):
        for name in [name for name, value in group.items() if isinstance(value, _UNMOVED)]:
            del group[name]
    return state


def load_plain_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Take what `plain_state` gave, to the bit: torch itself brings it to the weights' dtype."""
    state = copy.deepcopy(state)
    own = optimizer.state_dict().get("param_groups", [])
    groups = [
        {name: value for name, value in here.items() if isinstance(value, _UNMOVED)} | there
        for here, there in zip(own, state.get("param_groups", []), strict=False)
    ]
    optimizer.load_state_dict(state | ({"param_groups": groups} if groups else {}))
    weights = [p for group in optimizer.param_groups for p in group["params"]]
    for number, held in state.get("state", {}).items():
        if not isinstance(number, int) or number >= len(weights) or not isinstance(held, dict):
            continue
        weight = weights[number]
        now = optimizer.state[weight]
        for name, value in held.items():
            there = now.get(name)
            device = there.device if isinstance(there, Tensor) else weight.device
            now[name] = tree_map_only(Tensor, partial(Tensor.to, device=device), value)


def _tag(written: Any) -> str:
    return written[0] if isinstance(written, tuple) else ""


def _set_state(generator: Any, state: Any) -> None:
    if isinstance(generator, torch.Generator):
        generator.set_state(state)
    elif isinstance(generator, random.Random):
        generator.setstate(state)
    else:
        generator.bit_generator.state = state
