"""Models by ``module:function`` of the user's own.

They are imported, called once for each model that is needed, and checked.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from curvlab.errors import CurvlabError, lookup, unknown
from curvlab.likelihoods import LIKELIHOODS
from curvlab.system import random_state


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Set the global generators, of numpy and Python too, to `seed` inside; put them back after."""
    with random_state.kept(torch.device("cpu")):
        random_state.seed(seed)
        yield


@dataclass
class OwnModel:
    """A user's function, which is called once for each model that is needed.

    The model of its first call is handed out once, for the seed of that call.

    Args:
        function: the user's.
        name: ``module:function``.
        seed: of the first call.
        first: the model of that call, until it is handed out.
    """

    function: Callable[[], Any]
    name: str
    seed: int
    first: list[nn.Module]

    def __call__(self) -> nn.Module:
        """Call the user's function once more, and return its model."""
        return call_own(self.function, self.name)[0]

    def made(self, seed: int) -> nn.Module:
        """Return the model of the first call, once and for its own seed, else of a new call."""
        return self.first.pop() if self.first and seed == self.seed else self()


def module_of(path: str, what: str) -> ModuleType:
    """Import a module of the user's; the working directory is searched too.

    Args:
        path: of the module, with dots.
        what: asks for it, for the error's line.

    Raises:
        CurvlabError: there is no such module, or importing it fails.
    """
    here = str(Path.cwd())
    added = here not in sys.path
    if added:
        sys.path.insert(0, here)
    try:
        return importlib.import_module(path)
    except Exception as error:  # the user's module runs here, and may fail in any way
        if (
            isinstance(error, ModuleNotFoundError)
            and error.name
            and (path == error.name or path.startswith(f"{error.name}."))
        ):
            raise CurvlabError(
                f"{what}: there is no module '{path}': run where it lies, install it or set"
                " PYTHONPATH"
            ) from error
        raise CurvlabError(f"{what}: importing '{path}' failed: {_said(error)}") from error
    finally:
        if added:
            sys.path.remove(here)


def import_own(name: str) -> Callable[[], Any]:
    """Import what ``module:function`` names (`module_of`).

    Raises:
        CurvlabError: there is no such module, importing it fails, or it has no such function.
    """
    path, _, attribute = name.partition(":")
    module = module_of(path, f"model '{name}'")
    if not hasattr(module, attribute):
        raise unknown(
            f"function of {path}",
            attribute,
            (n for n, v in vars(module).items() if callable(v) and n[0] != "_"),
        )
    function = getattr(module, attribute)
    if not callable(function):
        raise CurvlabError(
            f"model '{name}': '{attribute}' is no function but {type(function).__name__}"
        )
    return function  # type: ignore[no-any-return]  # found by name in a module of the user's


def call_own(function: Callable[[], Any], name: str) -> tuple[nn.Module, str, str | None]:
    """Return (module, likelihood, data set) of the user's function."""
    try:
        found = function()
    except Exception as error:  # likewise
        raise CurvlabError(f"model '{name}' failed: {_said(error)}") from error
    if isinstance(found, nn.Module):
        return found, "categorical", None
    if (
        isinstance(found, tuple)
        and [type(v) for v in found[1:]] == [str, str]
        and isinstance(found[0], nn.Module)
    ):
        lookup(LIKELIHOODS, found[1], "likelihood")
        return found[0], found[1], found[2]
    raise CurvlabError(
        f"model '{name}' returned {type(found).__name__}: return an nn.Module or (module,"
        " likelihood name, data set name)"
    )


def _said(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
