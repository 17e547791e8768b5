"""What a model holds beside its weights: kept as it stands, and put back.

A forward pass may move buffers, draw from generators of the model's own, count in an attribute,
append to a list; its hooks may do so in what they close over. A look at a step of a loop that is
not ours does all that once more, of which nothing may stay.
"""

from __future__ import annotations

import functools
import random
import sys
import sysconfig
import types
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.grad_mode import _unsafe_preserve_version_counter
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

_MACHINERY = frozenset(nn.Module().__dict__) - {"training"}
"""Attributes by which torch itself keeps weights, buffers, modules and hooks."""

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_NAMES = (dict, OrderedDict, defaultdict, Counter)
_HOLDERS = (list, deque, set, bytearray)
_FEW = 1 << 22  # numbers that are copied, whatever the size of the model
_MANY = 1 << 16  # items of a list or dictionary that is looked into: a longer one is data
_OTHERS = frozenset({"curvlab", "torch", "builtins", "None"})
_INSTALLED = tuple({sysconfig.get_path(name) for name in ("purelib", "platlib", "stdlib")})
_ATOMS = (int, float, complex, str, bytes, type(None), torch.dtype, torch.device, type)
_Undo = Callable[[], None]


class ModelState:
    """The state of a model beside its weights, as it stands when this is made.

    It is that of buffers; generators (torch's, numpy's, Python's); numbers, tensors, arrays, lists
    and dictionaries in attributes of modules, and of objects that they hold; and what methods, and
    hooks of modules and weights, close over, are bound to or name as globals. Objects and functions
    are those of the model's package and of the script or project that runs: what is installed
    besides is left alone.

    Args:
        model: whose.
    """

    def __init__(self, model: nn.Module) -> None:
        self._undo: list[_Undo] = []
        self._met: dict[int, Any] = {}  # whole, so that no other object gets an id of theirs
        self._packages = {_package(type(module)) for module in model.modules()} - _OTHERS
        # numbers that are copied but for buffers: what holds more than a model is its data
        weights = sum(t.numel() for t in (*model.parameters(), *model.buffers()))
        self._left = max(_FEW, weights)
        for buffer in model.buffers():
            self._met[id(buffer)] = buffer
            self._undo.append(_numbers(buffer))
        self._todo: deque[Any] = deque([model])
        while self._todo:
            self._visit(self._todo.popleft())

    def put_back(self) -> None:
        """Let all of it be as it was."""
        for undo in self._undo:
            undo()

    def _visit(self, value: Any) -> None:
        """Note how to put back what a value holds; what a name stands for is its holder's."""
        if isinstance(value, _ATOMS) or id(value) in self._met:
            return
        self._met[id(value)] = value
        if isinstance(value, nn.Parameter):
            return  # the weights are the caller's
        if isinstance(value, Tensor | np.ndarray):
            self._left -= value.numel() if isinstance(value, Tensor) else value.size
            if self._left >= 0:
                self._undo.append(_numbers(value) if isinstance(value, Tensor) else _array(value))
        elif isinstance(value, nn.Module):
            self._module(value)
        elif type(value) in _NAMES:
            self._names(value)
        elif type(value) in _HOLDERS:
            items = list(value)
            self._undo.append(functools.partial(_refill, value, items))
            self._todo.extend(items if len(items) < _MANY else ())
        elif isinstance(value, tuple):
            self._todo.extend(value)
        elif (undo := _generator(value)) is not None:
            self._undo.append(undo)
        elif not self._function(value) and self._is_own(type(value)):
            self._names(getattr(value, "__dict__", {}))

    def _is_own(self, kind: Any) -> bool:
        """Return whether a class or function is of the model's package, or of the loop's."""
        package = _package(kind)
        return package in self._packages or _of_the_loop(package)

    def _module(self, module: nn.Module) -> None:
        self._names(module.__dict__, _MACHINERY)
        for kind in type(module).__mro__:
            if self._is_own(kind):
                self._todo.extend(f for f in vars(kind).values() if callable(f))
        for held in (module._buffers, *(module.__dict__.get(name) for name in _HOOKS)):
            if isinstance(held, dict):
                self._names(held)
        self._todo.extend(module.children())
        self._todo.extend(p._backward_hooks for p in module.parameters(recurse=False))

    def _names(self, names: dict[Any, Any], but: frozenset[str] = frozenset()) -> None:
        held = {name: value for name, value in names.items() if name not in but}
        self._undo.append(functools.partial(_rename, names, held, but))
        self._todo.extend(held.values() if len(held) < _MANY else ())

    def _function(self, value: Any) -> bool:
        """Visit what a function can write to; return whether it is one."""
        if isinstance(value, functools.partial):
            self._todo.extend((value.func, value.args, value.keywords))
        elif isinstance(value, types.MethodType):
            self._todo.extend((value.__self__, value.__func__))
        elif isinstance(value, types.BuiltinMethodType):
            if not isinstance(value.__self__, types.ModuleType):
                self._todo.append(value.__self__)
        elif isinstance(value, types.FunctionType):
            for cell in value.__closure__ or ():
                self._cell(cell)
            self._todo.append(value.__defaults__)
            if self._is_own(value):
                self._globals(value)
        else:
            return False
        return True

    def _cell(self, cell: types.CellType) -> None:
        try:
            content = cell.cell_contents
        except ValueError:  # empty yet
            return
        self._undo.append(functools.partial(setattr, cell, "cell_contents", content))
        self._todo.append(content)

    def _globals(self, function: types.FunctionType) -> None:
        names = function.__globals__
        for name in set(_named(function.__code__)) & names.keys():
            value = names[name]
            if isinstance(value, types.ModuleType | type | types.FunctionType):
                continue
            self._undo.append(functools.partial(names.__setitem__, name, value))
            self._todo.append(value)


def _package(kind: Any) -> str:
    return str(kind.__module__).partition(".")[0]


@functools.cache
def _of_the_loop(package: str) -> bool:
    """Return whether a package is a script's or a project's own: in no place of installed ones."""
    if package in _OTHERS or package in sys.stdlib_module_names:
        return False
    module = sys.modules.get(package)
    file = getattr(module, "__file__", None) or next(iter(getattr(module, "__path__", ())), "")
    return not any(file.startswith(place) for place in _INSTALLED)


def _named(code: types.CodeType) -> Iterator[str]:
    """Yield the names that a function, and those made in it, look up outside."""
    yield from code.co_names
    for const in code.co_consts:
        if isinstance(const, types.CodeType):
            yield from _named(const)


def _generator(value: Any) -> _Undo | None:
    """Return how to put back a generator of random numbers, if it is one."""
    if isinstance(value, torch.Generator):
        return functools.partial(_set_state, value, value.get_state())
    if isinstance(value, random.Random) and not isinstance(value, random.SystemRandom):
        return functools.partial(value.setstate, value.getstate())
    if isinstance(value, np.random.RandomState):
        return functools.partial(value.set_state, value.get_state(legacy=False))
    if isinstance(value, np.random.Generator | np.random.BitGenerator):
        bits = value.bit_generator if isinstance(value, np.random.Generator) else value
        return functools.partial(setattr, bits, "state", bits.state)
    return None


def _set_state(generator: torch.Generator, state: Tensor) -> None:
    generator.set_state(state)


def _array(value: np.ndarray) -> _Undo:
    copy = value.copy()
    return lambda: None if np.array_equal(value, copy) else value.__setitem__(..., copy)


def _numbers(t: Tensor) -> _Undo:
    if (
        t.layout != torch.strided
        or t.is_meta
        or t.is_inference()
        or is_traceable_wrapper_subclass(t)
    ):
        return lambda: None
    copy, version = t.detach().clone(), t._version

    def undo() -> None:
        if t.shape != copy.shape:
            t.data = copy
            return
        if t._version == version and torch.equal(t, copy):
            return
        with torch.no_grad(), _unsafe_preserve_version_counter(t):
            t.copy_(copy)

    return undo


def _rename(names: dict[Any, Any], held: dict[Any, Any], but: frozenset[str]) -> None:
    """Let names stand for what they stood for, in the same order."""
    now = {name: value for name, value in names.items() if name not in but}
    if list(now) == list(held) and all(now[name] is value for name, value in held.items()):
        return
    for name in now:
        del names[name]
    names.update(held)


def _refill(holder: Any, items: list[Any]) -> None:
    """Let a list, deque, set or bytearray hold what it held."""
    if len(holder) == len(items) and all(a is b for a, b in zip(holder, items, strict=True)):
        return
    holder.clear()
    getattr(holder, "update" if isinstance(holder, set) else "extend")(items)


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Leave a model's state as it was before."""
    before = ModelState(model)
    try:
        yield
    finally:
        before.put_back()
