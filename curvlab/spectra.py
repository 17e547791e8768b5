"""Spectra of the Hessian and its kin, block by block.

They are every eigenvalue, or a density and both ends by Lanczos. The spectrum of one matrix, and
the grid of `density`, are of `curvlab.densities`.

Legend: D order of a block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import xarray as xr
from rich.console import Console

from curvlab import exact
from curvlab.densities import EDGES as EDGES
from curvlab.densities import Spectrum as Spectrum
from curvlab.densities import eigenvalues as eigenvalues
from curvlab.densities import of_matrix as of_matrix
from curvlab.densities import of_products as of_products
from curvlab.densities import tolerance as tolerance
from curvlab.derivatives import derivatives
from curvlab.errors import MOST_STEPS, CurvlabError, guard_memory, lookup, several, unknown, whole
from curvlab.exact.batches import Minibatches, check_kind
from curvlab.fingerprint import Unchanging
from curvlab.likelihoods.base import mean_per
from curvlab.linalg.operators import Dense
from curvlab.logs.log import Log, Record
from curvlab.nests import is_minibatch
from curvlab.objective import Objective
from curvlab.system.progress import progress_bar

ALL, WHOLE = "all", "whole"
"""Words in place of the names of blocks: every block; the matrix of all parameters."""

LARGEST_EXACT = 6000
"""The method "auto" computes every eigenvalue up to this order."""

DRAWS = 1_000_000
"""Starting vectors of Lanczos at most."""

SPECTRUM_VARIABLES: dict[str, tuple[tuple[str, ...], str, str]] = {
    "eigenvalue": (
        ("matrix", "block", "index"),
        "eigenvalues, ascending; NaN beyond the block's order or by Lanczos",
        "nat",
    ),
    "density": (
        ("matrix", "block", "bin"),
        "fraction of the block's eigenvalues with lower ≤ λ < upper; sums to 1",
        "1",
    ),
    "lowest": (("matrix", "block"), "least eigenvalue", "nat"),
    "highest": (("matrix", "block"), "greatest eigenvalue", "nat"),
    "trace": (("matrix", "block"), "sum of the eigenvalues", "nat"),
    "negative": (
        ("matrix", "block"),
        "fraction of the eigenvalues below −tolerance · max |λ|",
        "1",
    ),
    "unresolved": (
        ("matrix", "block"),
        "fraction that Lanczos cannot tell from 0; 0 where all are known",
        "1",
    ),
    "lowest_error": (
        ("matrix", "block"),
        "an eigenvalue lies this near the lowest; 0 where all are known",
        "nat",
    ),
    "highest_error": (
        ("matrix", "block"),
        "an eigenvalue lies this near the highest; 0 where all are known",
        "nat",
    ),
    "trace_error": (
        ("matrix", "block"),
        "standard error of the trace over draws; 0 where all are known",
        "nat",
    ),
    "negative_error": (
        ("matrix", "block"),
        "standard error over draws, and what is unresolved; 0 where all are known",
        "1",
    ),
    "loss": ((), "mean loss on the examples of the spectra", "nat"),
}
"""{variable: (dimensions after the step, long_name, units)}. Eigenvalues: of the mean loss, the
parameters having no unit.
"""

METHODS: dict[str, str] = {
    "auto": f"exact up to order {LARGEST_EXACT}, lanczos above it",
    "exact": "every eigenvalue of the dense block",
    "lanczos": "density by stochastic Lanczos quadrature, ends by Lanczos",
}
"""{method: what it is}"""


@dataclass(frozen=True)
class Plan:
    """A plan of what is computed at every state of a model; `blocks`: names, `ALL`, `WHOLE`."""

    matrices: tuple[str, ...] = ("hessian", "ggn")
    blocks: tuple[str, ...] = (ALL,)
    method: str = "auto"
    draws: int = 10
    steps: int = 100

    def check(self, objective: Objective) -> None:
        """Check names, numbers and sizes, before anything runs.

        Raises:
            CurvlabError: an unknown name, a number out of range or a block too large.
        """
        for kind in self.matrices:
            check_kind(kind)
        if not self.matrices:
            raise CurvlabError(f"there is no matrix to compute (known: {', '.join(exact.KINDS)})")
        lookup(METHODS, self.method, "method")
        whole("the draws of Lanczos", self.draws, 1, DRAWS)
        whole("the steps of Lanczos", self.steps, 1, MOST_STEPS)
        for block, route in self.routes(objective).items():
            if route == "exact":
                # itself, the copy for LAPACK, a mask
                size = 3 * self.orders(objective)[block] ** 2 * objective.dtype.itemsize
                guard_memory(size, f"every eigenvalue of block {block}", "take the method lanczos")

    def orders(self, objective: Objective) -> dict[str, int]:
        """Return {block: D}."""
        known = {block.name: block.numel for block in objective.blocks}
        found: dict[str, int] = {}
        for name in self.blocks:
            if name not in (*known, ALL, WHOLE):
                raise unknown("block", name, (*known, ALL, WHOLE))
            found |= known if name == ALL else {name: known.get(name, len(objective.layout))}
        if not found:
            raise CurvlabError(
                f"there is no block to compute (known: {', '.join((*known, ALL, WHOLE))})"
            )
        return found

    def routes(self, objective: Objective) -> dict[str, str]:
        """Return {block: "exact" or "lanczos"}."""
        if self.method != "auto":
            return dict.fromkeys(self.orders(objective), self.method)
        return {
            name: "exact" if order <= LARGEST_EXACT else "lanczos"
            for name, order in self.orders(objective).items()
        }

    def log(self, objective: Objective, about: dict[str, Any], path: Any = None) -> Log:
        """Return an empty log of the schema."""
        orders, routes = self.orders(objective), self.routes(objective)
        exactly = [order for name, order in orders.items() if routes[name] == "exact"]
        params = {block.name: " ".join(block.params) for block in objective.blocks} | {WHOLE: "all"}
        centres = np.sign(EDGES[:-1] + EDGES[1:]) * np.sqrt(np.abs(EDGES[:-1] * EDGES[1:]))
        coordinates: dict[str, Any] = {
            "matrix": list(dict.fromkeys(self.matrices)),
            "block": list(orders),
            "parameters": ("block", [params[name] for name in orders]),
            "order": _coordinate("block", list(orders.values()), "number of parameters", "1"),
            "route": ("block", list(routes.values())),
            "bin": _coordinate(
                "bin", centres, "geometric mean of the bin's edges, with their sign", "nat"
            ),
            "lower": _coordinate(
                "bin", EDGES[:-1], "lower edge of the bin; the first bin has none", "nat"
            ),
            "upper": _coordinate(
                "bin", EDGES[1:], "upper edge of the bin; the last bin has none", "nat"
            ),
            "index": _coordinate(
                "index",
                range(max(exactly, default=0)),
                "number of the eigenvalue, from the lowest",
                "1",
            ),
        }
        attributes = {
            "matrices": coordinates["matrix"],
            "method": self.method,
            "lanczos_draws": self.draws,
            "lanczos_steps": self.steps,
            "tolerance": tolerance(objective.dtype),
            "seed": objective.seed,
            "device": str(objective.device),
            "dtype": str(objective.dtype).removeprefix("torch."),
            "loss_per": mean_per(objective.likelihood),
        }
        variables = {
            name: {"long_name": text, "units": units}
            for name, (_, text, units) in SPECTRUM_VARIABLES.items()
        }
        variables["step"] = {"long_name": "number of training steps", "units": "1"}
        return Log(coordinates, variables, attributes | about, path, (objective.seed,))

    @derivatives()
    def record(
        self,
        objective: Objective,
        x: Any,
        y: Any,
        say: Callable[[str], None],
        done: Callable[[], None],
    ) -> Record:
        """Compute the spectra of the model as it is, all of the same data.

        Args:
            objective: whose model.
            x: inputs, or a loader of minibatches.
            y: targets; None with a loader.
            say: told what comes next.
            done: called when a matrix is finished.
        """
        if not is_minibatch(x, y):
            x = Unchanging.of(x, in_order="fisher-mc" in self.matrices)
        orders, routes = self.orders(objective), self.routes(objective)
        kinds = list(dict.fromkeys(self.matrices))
        top = max((order for name, order in orders.items() if routes[name] == "exact"), default=0)
        size = {"matrix": len(kinds), "block": len(orders), "index": top, "bin": len(EDGES) - 1}
        values = {
            name: np.full([size[d] for d in dims], np.nan)
            for name, (dims, *_) in SPECTRUM_VARIABLES.items()
        }
        values["loss"][...] = _loss(objective, x, y)
        for i, kind in enumerate(kinds):
            for j, (block, route) in enumerate(routes.items()):
                say(f"{kind} of block {block}" if block != WHOLE else f"{kind} of the whole")
                found = self._spectrum(objective, x, y, kind, block, route)
                values["density"][i, j] = found.density
                for name in ("lowest", "highest", "trace", "negative"):
                    values[name][i, j], values[f"{name}_error"][i, j] = getattr(found, name)
                values["unresolved"][i, j] = found.unresolved
                if found.eigenvalues is not None:
                    values["eigenvalue"][i, j, : len(found.eigenvalues)] = found.eigenvalues
            done()
        if not top:
            del values["eigenvalue"]
        return {name: (SPECTRUM_VARIABLES[name][0], value) for name, value in values.items()}

    def _spectrum(
        self,
        objective: Objective,
        x: Any,
        y: Any,
        kind: Any,
        block: str,
        route: str,
    ) -> Spectrum:
        # every block and route the same drawn labels
        fresh = Objective(objective.model, objective.likelihood, objective.seed)
        name = None if block == WHOLE else block
        if route == "exact":
            matrix = exact.matrix(fresh, x, y, kind, name)
            assert isinstance(matrix, Dense)
            return of_matrix(matrix)
        place = [*(b.name for b in fresh.blocks), WHOLE].index(block)
        state = int(np.random.SeedSequence([objective.seed, place]).generate_state(1, np.uint64)[0])
        generator = torch.Generator("cpu").manual_seed(state >> 1)
        product = exact.product(fresh, x, y, kind, name)
        return of_products(product, fresh.dtype, self.draws, self.steps, generator)  # type: ignore[arg-type]  # no pair, so a Product


def _coordinate(dim: str, values: Any, long_name: str, units: str) -> xr.Variable:
    return xr.Variable(dim, np.asarray(values), {"long_name": long_name, "units": units})


def _loss(objective: Objective, x: Any, y: Any) -> float:
    """Return the mean loss over the examples."""
    fresh = Objective(objective.model, objective.likelihood, objective.seed)
    total, size = 0.0, 0
    for closure in Minibatches.of(fresh, x, y, again=True):
        total += float(closure.observe(frozenset(), move_buffers=False).loss) * len(closure.x)
        size += len(closure.x)
    return total / size


def spectrum(
    objective: Objective,
    x: Any,
    y: Any = None,
    matrices: str | Sequence[str] = ("hessian", "ggn"),
    method: str = "auto",
    *,
    blocks: str | Sequence[str] = (ALL,),
    draws: int = 10,
    steps: int = 100,
    after: int = 0,
    progress: bool | None = None,
) -> xr.Dataset:
    """Compute the spectra of a model's curvature blocks, of the mean loss over the examples.

    Args:
        objective: your model and likelihood; nothing of it changes.
        x: inputs [N, …]; or a list or DataLoader of (x, y), over all of which the mean is taken,
            and which is read again for every matrix.
        y: targets; None with a loader.
        matrices: of hessian, ggn, pi, fisher, fisher-mc, ef (`exact.matrix`); one name, or several.
        method: exact (every eigenvalue), lanczos (density and both ends with errors), or auto:
            exact up to order 6000.
        blocks: a name or names of blocks; "all" is every block, "whole" the matrix of all
            parameters.
        draws: starting vectors of Lanczos.
        steps: of Lanczos.
        after: the coordinate `step` of the result: how far training has come.
        progress: show a progress bar; None shows one where standard error is a terminal.

    Returns:
        The data set that `curvlab spectrum` logs (documentation, "The log"), with one step.

    Raises:
        CurvlabError: unknown names, numbers out of range, data that do not fit or change, a block
            too large for the method.
    """
    plan = Plan(tuple(several(matrices)), tuple(several(blocks)), method, draws, steps)
    plan.check(objective)
    whole("after", after, 0)
    x = list(x) if isinstance(x, Iterator) else x
    what = f"{len(objective.batch(x, y)[0])} examples" if is_minibatch(x, y) else type(x).__name__
    call = {"function": "curvlab.spectrum", "data": what, "blocks": plan.blocks, "after": after} | {
        name: getattr(plan, name) for name in ("matrices", "method", "draws", "steps")
    }
    title = f"curvlab spectrum: {', '.join(plan.matrices)}"
    log = plan.log(
        objective,
        {"title": title, "call": call, "model": type(objective.model).__name__, "data": what},
    )
    console = Console(stderr=True)
    with progress_bar(console, console.is_terminal if progress is None else progress, 600) as bar:
        task = bar.add_task("spectra", total=len(set(plan.matrices)), note="")
        record = plan.record(
            objective, x, y, lambda note: bar.update(task, note=note), lambda: bar.advance(task)
        )
    log.append(after, record)
    return log.dataset()
