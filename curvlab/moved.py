"""Modules and public names that were called otherwise up to version 0.1.

The old name still works,
with a warning that says the new one.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from curvlab.errors import warn

MOVED = {
    "curvlab.cli_train": "curvlab.cli.train",
    "curvlab.cli_reproduce": "curvlab.cli.reproduce",
    "curvlab.terminal": "curvlab.cli.terminal",
    "curvlab.figures": "curvlab.show.figures",
    "curvlab.axes": "curvlab.show.axes",
    "curvlab.tables": "curvlab.show.tables",
    "curvlab.svg": "curvlab.show.svg",
    "curvlab.about": "curvlab.show.about",
    "curvlab.drawable": "curvlab.show.drawable",
    "curvlab.pictures": "curvlab.show.pictures",
    "curvlab.log": "curvlab.logs.log",
    "curvlab.reading": "curvlab.logs.reading",
    "curvlab.attributes": "curvlab.logs.attributes",
    "curvlab.regular": "curvlab.logs.regular",
    "curvlab.atomic": "curvlab.system.atomic",
    "curvlab.lock": "curvlab.system.lock",
    "curvlab.paths": "curvlab.system.paths",
    "curvlab.blame": "curvlab.system.blame",
    "curvlab.interrupt": "curvlab.system.interrupt",
    "curvlab.streams": "curvlab.system.streams",
    "curvlab.memory": "curvlab.system.memory",
    "curvlab.chance": "curvlab.system.random_state",
    "curvlab.escape": "curvlab.system.escape",
    "curvlab.progress": "curvlab.system.progress",
    "curvlab.categorical_targets": "curvlab.likelihoods.targets",
    "curvlab.probes.against": "curvlab.probes.against_exact",
    "curvlab.curvature.whole": "curvlab.curvature.whole_vector",
    "curvlab.curvature.overall": "curvlab.curvature.overall_damping",
    "curvlab.curvature.levenberg": "curvlab.curvature.levenberg_marquardt",
    "curvlab.linalg.aligned": "curvlab.linalg.padded_products",
    "curvlab.linalg.implicit": "curvlab.linalg.damped",
    "curvlab.linalg.factor": "curvlab.linalg.cholesky",
    "curvlab.exact.terms": "curvlab.exact.kronecker_sum",
    "curvlab.exact.general": "curvlab.exact.torch_func",
}
"""{old name: new name}; not `curvlab.report`, which is the function of that name."""

RENAMED = {
    "curvlab.datasets": {"Entry": "DataEntry"},
    "curvlab.linalg.distances": {"compare": "compare_to_exact"},
    "curvlab.linalg.traces": {"Estimate": "StochasticEstimate", "diagonal": "hutchinson_diagonal"},
    "curvlab.models": {"Entry": "ModelEntry", "Defaults": "ComparisonDefaults"},
    "curvlab.reproduction": {"Report": "ReproductionReport", "load": "load_script"},
}
"""{module: {old name of a public thing: new name}}"""


class _Finder(MetaPathFinder, Loader):
    """A finder that is asked last, for what no file is there for."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return ModuleSpec(fullname, self) if fullname in MOVED else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        warn(
            f"{spec.name} is called {MOVED[spec.name]} now; the old name goes with the next version"
        )
        self._module = importlib.import_module(MOVED[spec.name])
        self._spec = self._module.__spec__
        return self._module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self._spec  # the import system has put the old name's in its place


def follow() -> None:
    """Let old names import from here on."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())


def old_names(module: str) -> Callable[[str], Any]:
    """Return the `__getattr__` of a module (PEP 562) that answers to its names of `RENAMED`."""

    def found(name: str) -> Any:
        new = RENAMED[module].get(name)
        if new is None:
            raise AttributeError(f"module '{module}' has no attribute '{name}'")
        warn(f"{module}.{name} is called {new} now; the old name goes with the next version")
        return getattr(sys.modules[module], new)

    return found
