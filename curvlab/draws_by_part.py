"""Random numbers of a minibatch that was several: each part's are those that it drew by itself.

Gradients that add up, or of several processes, are of minibatches that the model was called on one
by one, each with masks of dropout of its own. A look goes through all of them at once; where an
operator draws for all examples, it draws here for one part after another, each from the state that
the generators had at that part's own call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from curvlab.system.random_state import Chance, set_torch_states, torch_states

_EACH = frozenset(
    {
        "bernoulli",
        "bernoulli_",
        "binomial",
        "cauchy_",
        "exponential_",
        "geometric_",
        "log_normal_",
        "multinomial",
        "native_dropout",
        "normal",
        "normal_",
        "poisson",
        "rand",
        "rand_like",
        "randint",
        "randint_like",
        "randn",
        "randn_like",
        "random_",
        "rrelu_with_noise",
        "rrelu_with_noise_",
        "uniform",
        "uniform_",
    }
)
"""Operators that draw each element of what they return by itself, one after another."""


class DrawsByPart(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch has no types there
    """Let operators that draw for N examples draw for each part as it did alone, inside.

    Args:
        parts: (examples, the generators before them), in the order of the examples.
        device: of the model.
    """

    def __init__(self, parts: Sequence[tuple[int, Chance]], device: torch.device) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.device, self.sizes = device, [size for size, _ in parts]
        self.states = [chance.torch for _, chance in parts]
        self.missed = False
        """Whether something was drawn that is not of the examples, one after another."""

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        draws = torch.Tag.nondeterministic_seeded in func.tags
        if not draws or isinstance(kwargs.get("generator"), torch.Generator):
            return func(*args, **kwargs)
        total = sum(self.sizes)
        if func.overloadpacket.__name__ not in _EACH or not _is_of_all(args, total):
            before = torch_states(self.device)
            whole = func(*args, **kwargs)
            now = torch_states(self.device)
            self.missed |= not all(map(torch.equal, before, now))
            return whole
        found, start = [], 0
        for i, size in enumerate(self.sizes):
            own = [_part(a, start, size, total) for a in args]
            named = {key: _part(a, start, size, total) for key, a in kwargs.items()}
            found.append(self._drawn(i, partial(func, *own, **named)))
            start += size
        if func.overloadpacket.__name__.endswith("_"):  # the parts are views of what was given
            return args[0]
        return _joined(found)

    def _drawn(self, part: int, draw: Callable[[], Any]) -> Any:
        """Return what is drawn from a part's own generators, which go on."""
        set_torch_states(self.states[part], self.device)
        found = draw()
        self.states[part] = torch_states(self.device)
        return found


def _is_of_all(args: tuple[Any, ...], total: int) -> bool:
    """Return whether what an operator draws is of all examples, the first axis."""
    first = next((a for a in args if isinstance(a, Tensor | list | tuple)), None)
    return _is_of(first, total) or _is_size(first, total)


def _is_of(value: Any, total: int) -> bool:
    return isinstance(value, Tensor) and value.ndim > 0 and len(value) == total


def _is_size(value: Any, total: int) -> bool:
    return (
        isinstance(value, list | tuple)
        and bool(value)
        and value[0] == total
        and all(isinstance(n, int) for n in value)
    )


def _part(value: Any, start: int, size: int, total: int) -> Any:
    """Return an operator's argument for the examples of a part alone."""
    if _is_of(value, total):
        return value[start : start + size]
    return [size, *value[1:]] if _is_size(value, total) else value


def _joined(found: list[Any]) -> Any:
    if isinstance(found[0], tuple):
        return tuple(_joined(list(each)) for each in zip(*found, strict=True))
    return torch.cat(found)
