"""Algorithms by name: as their curvature alone, a `Descent`, or a torch optimizer.

They are made by `approximation`, `descent` and `optimizer`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from curvlab.algorithm_entry import Algorithm, ByBlock, Constants, WholeVector
from curvlab.algorithm_table import ALGORITHMS
from curvlab.curvature.base import Curvature, check_damping
from curvlab.curvature.settings import Cadence, CurvatureSettings
from curvlab.descent import Descent
from curvlab.errors import CurvlabError, lookup, real, unknown
from curvlab.foreign_optimizers import FOREIGN, Foreign, foreign_algorithm
from curvlab.groups import check_momentum
from curvlab.momentum import MomentumKind
from curvlab.objective import Objective
from curvlab.observation import PASSES, Pass
from curvlab.optim import Optimizer

__all__ = [
    "ALGORITHMS",
    "Algorithm",
    "ByBlock",
    "Constants",
    "WholeVector",
    "approximation",
    "check_labels",
    "check_rates",
    "damping_for",
    "descent",
    "find_algorithm",
    "followed",
    "optimizer",
]


def find_algorithm(name: str) -> Algorithm:
    """Return the entry of an algorithm: of `ALGORITHMS`, or an optimizer by ``module:Class``.

    Raises:
        CurvlabError: an unknown name (with the known ones and the closest), or an optimizer that
            cannot be followed (`foreign`).
    """
    if isinstance(name, str) and name not in ALGORITHMS and (":" in name or name in FOREIGN):
        return foreign_algorithm(name)
    return lookup(ALGORITHMS, name, "algorithm")


def followed(
    names: Mapping[str, Mapping[str, Any]], objective: Objective
) -> dict[str, dict[str, Any]]:
    """Return what a log says of optimizers of somebody else's: {"foreign": {name: what}}, or {}.

    Args:
        names: {algorithm: options of its own}.
        objective: whose parameters they take.
    """
    found = {}
    for name, own in names.items():
        builds = find_algorithm(name).builds
        if isinstance(builds, Foreign):
            found[name] = builds.about(objective, own)
    return {"foreign": found} if found else {}


def approximation(
    name: str,
    objective: Objective,
    *,
    damping: float | None = None,
    labels: Pass | None = None,
    decay: float | None = None,
    update_every: int = 1,
    refresh_every: int = 1,
    **own: Any,
) -> Curvature:
    """Make the curvature of algorithm `name`: it takes no step and moves no model.

    It is a `BlockDiagonal`, or a `Curvature` of the whole vector.

    Args:
        name: of `ALGORITHMS`.
        objective: whose blocks.
        damping: the document's own parameter (λ of KFAC and the block methods, ε of TNT, Shampoo
            and Adam); the document's value where None.
        labels: "data" (empirical), "model" (sampled) or "exact", where it is not to be the
            algorithm's own; "token" is of the data's labels, the loss at each place by itself
            (curvlab.exact's unit="token").
        decay: of the moving averages; the document's where None (0.9; Adam's β₂ 0.999).
        update_every: T₁.
        refresh_every: T₂.
        own: the method's own options (`ALGORITHMS[name].options`).

    Raises:
        CurvlabError: unknown name or option (with the known ones and the closest), an argument out
            of range.
    """
    a = find_algorithm(name)
    own = a.checked(own, name)
    a = a.read(own.pop("reading", None))
    check_rates(damping=damping, decay=decay)
    check_labels(labels)
    cadence = Cadence(update_every=update_every, refresh_every=refresh_every)
    if a.look is not None and labels not in (None, a.labels):
        raise CurvlabError(f"{name} has no labels to choose but '{a.labels}': leave labels out")
    settings = CurvatureSettings(
        labels=a.labels if labels is None else labels,
        damping=a.damping if damping is None else damping,
        cadence=cadence,
        name=name,
    )
    return a.builds.curvature(objective, settings, decay, own)


def check_labels(labels: Pass | None) -> None:
    """Raise CurvlabError for what are no labels; None stands for the document's."""
    known = [name for name in PASSES if name not in ("gradient", "plain", "apart")]
    if labels is not None and labels not in known:
        raise unknown("labels", labels, known)


def check_rates(
    lr: float | None = None,
    damping: float | None = None,
    momentum: float | None = None,
    decay: float | None = None,
) -> None:
    """Raise CurvlabError where a rate is no number or out of range; None is the document's."""
    if lr is not None:
        real("the learning rate", lr)
    if damping is not None:
        check_damping(damping)
    if momentum is not None:
        check_momentum(momentum)
    if decay is not None:
        real("decay", decay, "at least 0 and below 1", lambda v: 0 <= v < 1)


def descent(
    name: str,
    objective: Objective,
    *,
    momentum: float | None = None,
    momentum_kind: MomentumKind | None = None,
    weight_decay: float | None = None,
    double_grad: bool = False,
    **options: Any,
) -> Descent:
    """Make algorithm `name` as a `Descent`.

    Args:
        name: of `ALGORITHMS`.
        objective: what it steps on.
        momentum: β; the document's where None.
        momentum_kind: see `Descent`; the document's where None.
        weight_decay: γ, added to the direction; the document's where None, mostly 0.
        double_grad: see `Descent`.
        options: those of `approximation`, T₁ and T₂ the document's where None.

    Raises:
        CurvlabError: as `approximation` and `Descent`.
    """
    a = find_algorithm(name)
    if a.foreign:
        shared = {"momentum": momentum, "momentum_kind": momentum_kind, "double_grad": double_grad}
        return _shadow(name, a, objective, {**options, **shared}, weight_decay)
    a = a.read(options.get("reading"))
    for every, value in (("update_every", a.update_every), ("refresh_every", a.refresh_every)):
        options[every] = value if options.get(every) is None else options[every]
    return Descent(
        objective,
        approximation(name, objective, **options),
        momentum=a.momentum if momentum is None else momentum,
        momentum_kind=a.momentum_kind if momentum_kind is None else momentum_kind,
        weight_decay=a.weight_decay if weight_decay is None else weight_decay,
        learns_first=a.learns_first,
        double_grad=double_grad,
    )


_SHARED = ("labels", "decay", "damping", "momentum_kind", "double_grad")


def _shadow(
    name: str,
    entry: Algorithm,
    objective: Objective,
    given: dict[str, Any],
    weight_decay: float | None,
) -> Descent:
    """Make somebody else's optimizer as a `Descent` without momentum or decay of its own.

    `momentum` and `weight_decay` are the optimizer's, where it has such options.
    """
    if weight_decay:
        given["weight_decay"] = weight_decay
    own = {k: v for k, v in given.items() if v is not None and k not in ("damping", *_CADENCE)}
    known = entry.options
    for option in [k for k in own if k not in known]:
        if option in _SHARED and not own[option]:
            del own[option]
        elif option in (*_SHARED, "momentum", "weight_decay"):
            raise CurvlabError(
                f"{name} has no {option}: its options are its own ({', '.join(known)})"
            )
    if given.get("damping"):
        raise CurvlabError(f"{name} has no damping of this kind: its options are its own")
    if any(given.get(every) not in (None, 1) for every in _CADENCE):
        raise CurvlabError(f"{name} updates at every step: leave {' and '.join(_CADENCE)} out")
    return Descent(objective, approximation(name, objective, **own), momentum=0.0)


_CADENCE = ("update_every", "refresh_every")


def optimizer(
    name: str, objective: Objective, lr: float | None = None, **options: Any
) -> Optimizer:
    """Make algorithm `name` as a `torch.optim.Optimizer`.

    Args:
        name: of `ALGORITHMS`.
        objective: what it steps on.
        lr: the document's where None.
        options: momentum, momentum_kind, weight_decay, double_grad (see `Descent`), and those of
            `approximation`, T₂ the document's where None (20 of KFAC, TNT and Shampoo on
            autoencoders: thesis 2.8.2, 4.7.2).

    Raises:
        CurvlabError: as `descent`, and a learning rate out of range.
    """
    a = find_algorithm(name)
    a = a if a.foreign else a.read(options.get("reading"))
    check_rates(lr)
    return Optimizer(descent(name, objective, **options), a.lr if lr is None else lr)


def damping_for(name: str, overall: float, size: int) -> float:
    """Return the document's damping parameter of algorithm `name` at one overall damping.

    Args:
        name: of `ALGORITHMS`.
        overall: λ.
        size: examples of a minibatch.

    Raises:
        CurvlabError: an unknown name, or a damping out of range.
    """
    check_damping(overall)
    return find_algorithm(name).overall(overall, size)
