"""Data as the oracle reads them: one minibatch or a loader, in chunks of bounded size.

The model's examples must stand alone.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.utils import get_total_norm

from curvlab.closure import Closure
from curvlab.errors import CurvlabError, unknown, warn
from curvlab.fingerprint import Unchanging
from curvlab.forms import Form
from curvlab.layers import Block
from curvlab.likelihoods.base import MeanFactor, factor_over, scaled
from curvlab.nests import Batched, is_minibatch
from curvlab.objective import Objective
from curvlab.observation import Pass
from curvlab.units import Unit, kind_per

Kind = Literal["hessian", "ggn", "pi", "fisher", "fisher-mc", "ef", "ef-token"]
"""Hessian of the mean loss = GGN + Π (thesis (1.4); S2QN (5), (6)); Fisher over all labels, drawn
ones, or the data's: of every example's gradient, or, "ef-token", of that of every place's loss.
"""

KINDS: tuple[Kind, ...] = get_args(Kind)[:-1]
"""The kinds of matrix; "ef-token" is "ef" with unit="token" in one word."""

PASS_OF_KIND: dict[str, Pass] = {
    "ggn": "exact",
    "fisher": "exact",
    "fisher-mc": "model",
    "ef": "data",
    "ef-token": "token",
}
"""Kinds that are second moments, and the pass that sends their vectors back.

The others need second derivatives.
"""

CHUNK = 4096
"""Examples in one forward pass; a constant, since labels are drawn chunk by chunk."""

_REMEDY = "call model.eval() first, or train by a method without exact products"
_NUMBERS = 1 << 24  # in the pre-activation Hessians of one block at a time
_SENT = 1 << 25  # in the derivatives of the exact pass where places share weights


def check_kind(kind: str, draws: int = 1, unit: Unit = "sequence") -> Kind:
    """Return the kind of matrix with its unit (`kind_per`).

    Raises CurvlabError for an unknown one, or no draw.
    """
    if kind not in get_args(Kind):
        raise unknown("kind of matrix", kind, get_args(Kind))
    if draws < 1:
        raise CurvlabError(f"draws must be 1 or more, not {draws}")
    return cast(Kind, kind_per(kind, unit))


Loader = Iterable[Any]
"""Of minibatches: pairs (x, y), or mappings with the labels in them."""


@dataclass(frozen=True)
class Minibatches:
    """Minibatches as closures, from one minibatch or a loader.

    Drawn labels depend on the objective's seed, the number of the call and the chunk alone. A
    loader that is read `again` must give the same data at every pass (`Unchanging`), and so must
    one whose labels are counted first, for the factor N/M of all of it.
    """

    objective: Objective
    loader: Loader
    number: int
    chunk: int = CHUNK
    # N/M of all minibatches together; None where each chunk's is that of its minibatch
    factor: MeanFactor | None = None

    @classmethod
    def of(
        cls,
        objective: Objective,
        x: Any,
        y: Any,
        *,
        again: bool = False,
        whole: bool = False,
        in_order: bool = False,
    ) -> Minibatches:
        """Make batches of one minibatch (x, y), or of a loader of such pairs in place of x.

        Args:
            objective: the model, whose examples must stand alone (`check_independence`).
            x: inputs [N, …], or the loader; or a mapping with the labels in it.
            y: targets; None with a loader.
            again: whether the data will be read several times, so that an iterator will not do.
            whole: never cut a minibatch.
            in_order: whether they must come in the same order `again`.

        Raises:
            CurvlabError: data that are neither tensors nor a loader of pairs; an iterator that is
                to be read again; a model whose examples do not stand alone.
        """
        check_independence(objective)
        objective.check_trained()
        if isinstance(x, Tensor) and y is None:
            raise CurvlabError(
                "targets are missing: give x and y, or a loader of (x, y) pairs in place of x"
            )
        single = is_minibatch(x, y)
        if not single:
            if not isinstance(x, Iterable):
                raise CurvlabError(
                    "the data must be tensors x, y or a loader of (x, y) pairs, not"
                    f" {type(x).__name__}"
                )
            if again and isinstance(x, Iterator):
                raise CurvlabError(
                    "a product reads its data again and again, but an iterator ends after one pass:"
                    " give a list or a DataLoader"
                )
        objective.closures["exact"] += 1
        counts = scaled(objective.likelihood) and not single
        loader: Loader = [objective.batch(x, y)] if single else x
        if counts and isinstance(loader, Iterator):
            loader = _one(loader)
        loader = Unchanging.of(loader, in_order=in_order) if again or counts else loader
        return cls(
            objective,
            loader,
            objective.closures["exact"],
            sys.maxsize if whole else CHUNK,
            factor_over(objective.likelihood, _labels(objective, loader)) if counts else None,
        )

    @property
    def kept(self) -> Unchanging | None:
        """Record of the data, which can tell whether they are still the same.

        Where they are one minibatch that lies in memory; else None: a loader is read again.
        """
        loader = self.loader
        if (
            isinstance(loader, Unchanging)
            and isinstance(loader.loader, list)
            and len(loader.loader) == 1
        ):
            return loader
        return None

    def __iter__(self) -> Iterator[Closure]:
        part = 0
        for item in self.loader:
            x, y = self.objective.batch(item)
            whole = Closure(self.objective, x, y, self.number, "exact", part, self.factor)
            if len(x) <= self.chunk:
                yield whole
                part += 1
                continue
            for start in range(0, len(x), self.chunk):
                some = slice(start, start + self.chunk)
                yield Closure(
                    self.objective, x[some], y[some], self.number, "exact", part, whole.factor
                )
                part += 1
        if not part:
            raise CurvlabError(_EMPTY)


def _labels(objective: Objective, loader: Loader) -> Iterator[Batched]:
    """Yield the targets of all minibatches. Raises CurvlabError where there is none."""
    empty = True
    for item in loader:
        empty = False
        y = objective.batch(item)[1]
        if not isinstance(y, Tensor) or y.ndim:  # what has no axis is for a closure to refuse
            yield y
    if empty:
        raise CurvlabError(_EMPTY)


def _one(loader: Iterator[Any]) -> Loader:
    """Return an iterator's only minibatch in a list. Raises CurvlabError where there are more."""
    found = list(islice(loader, 2))
    if len(found) > 1:
        raise CurvlabError(
            "a mean per token is over the counted places of all minibatches, and an iterator shows"
            " their labels but once: give a list or a DataLoader"
        )
    return found


_EMPTY = "the loader is empty: there is no example to take a mean over"


def by_hessians(kind: str, block: Block, form: Form) -> bool:
    """Return whether a block goes by its pre-activation Hessians.

    For second derivatives where they are fewer than the parameters; for the GGN where the layer has
    fewer outputs than the model, so that fewer vectors go through it.
    """
    if block.name not in form.direct or block.groups > 1:
        return False
    places = form.places[block.name]
    if kind in PASS_OF_KIND:
        return kind == "ggn" and places == 1 and block.shape[0] < form.outputs
    return places <= block.shape[1]


def few(closures: Iterable[Closure], kind: str, blocks: Iterable[Block]) -> Iterator[Closure]:
    """Yield closures of so few examples that what the kind needs of them fits.

    Of pre-activation Hessians for second derivatives those of a block, N (TO)² numbers; for the GGN
    the derivatives of the outputs in them too, N C TO numbers. Of the exact pass through weights
    that places share, the root and the derivatives of all blocks, N C (C + Σ TO); of that of single
    places P of them in place of the first C.
    """
    blocks = list(blocks)
    for closure in closures:
        form = closure.glimpse
        widths = [
            form.places.get(b.name, 0) * b.shape[0] for b in blocks if by_hessians(kind, b, form)
        ]
        widest = max([1, *widths])
        at_once = max(
            1, _NUMBERS // (widest * max(widest, form.outputs if kind in PASS_OF_KIND else 0))
        )
        places = [form.places.get(b.name, 0) for b in blocks]
        if kind in ("ggn", "fisher", "ef-token") and max(places, default=0) > 1:
            sent = sum(t * b.shape[0] for t, b in zip(places, blocks, strict=True) if t)
            vectors = form.outputs if kind != "ef-token" else _places(closure, form)
            at_once = min(at_once, max(1, _SENT // (vectors * (form.outputs + sent))))
        size = len(closure.x)
        if size <= at_once:
            yield closure
            continue
        at_once = -(-size // -(-size // at_once))  # as many in every part
        for start in range(0, size, at_once):
            yield closure.some(slice(start, start + at_once))


def _places(closure: Closure, form: Form) -> int:
    """Return how many places an example's loss has at most."""
    y = closure.y
    apart = isinstance(y, Tensor) and not y.is_floating_point()
    return max(1, y[0].numel()) if apart else form.outputs


def check_independence(objective: Objective) -> None:
    """Refuse weights that are not finite, and modules that mix examples or drop units at random.

    BatchNorm in training mode leaves no example a loss of its own; dropout makes the loss no
    function of the weights.
    """
    model, modules = objective.model, objective.modules
    state = [w._version for module in modules for w in module._parameters.values() if w is not None]
    state += [module.training for module in modules]
    if state == objective.sound:
        return
    weights = dict(model.named_parameters())
    if not bool(
        torch.isfinite(get_total_norm([w.detach() for w in weights.values()]))
    ):  # one reduction for all
        for name, weight in weights.items():
            if not bool(torch.isfinite(weight).all()):
                raise CurvlabError(
                    f"the weights '{name}' contain NaN or Inf: take them from before they did"
                )
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm) and module.running_mean is None:
            raise CurvlabError(
                f"'{name}' normalises over the batch in every mode, since it keeps no running"
                " statistics, so that no example has a loss of its own: track_running_stats=True,"
                " or GroupNorm"
            )
        if isinstance(module, _BatchNorm) and module.training:
            raise CurvlabError(
                f"'{name}' normalises over the batch, so that no example has a loss of its own:"
                f" {_REMEDY}"
            )
        if module.training and (_drops(module) or _drops_inside(module)):
            raise CurvlabError(
                f"'{name}' drops units at random, so that the loss is no function of the weights:"
                f" {_REMEDY}"
            )
    objective.sound = state


def _drops(module: nn.Module) -> bool:
    return isinstance(module, _DropoutNd) and module.p > 0


def _drops_inside(module: nn.Module) -> bool:
    """Return whether a recurrent or attention layer drops units by a dropout of its own."""
    return isinstance(module, nn.RNNBase | nn.MultiheadAttention) and module.dropout > 0


def say_general(blocks: Iterable[Block], kind: str, form: Form) -> None:
    """Warn, once for all blocks, of those that go the general way."""
    loose = [b for b in blocks if b.name not in form.shaped]
    if not loose:
        return
    whys: dict[str, list[str]] = {}
    for b in loose:
        whys.setdefault(form.ways[b.name].why or "belongs to a layer without a rule", []).append(
            str(b)
        )
    told = "; ".join(f"{', '.join(some)} {_plural(why, len(some))}" for why, some in whys.items())
    numbers = max(b.numel for b in loose)
    warn(
        f"{told}: {kind} takes the general route there (torch.func), which is slower:"
        f" {_cost(kind, numbers)}"
    )


def _plural(why: str, count: int) -> str:
    if count == 1:
        return why
    for one, several in (
        ("belongs to a layer", "belong to layers"),
        ("is used", "are used"),
        ("has", "have"),
    ):
        if why.startswith(one):
            return several + why.removeprefix(one)
    return why


def _cost(kind: str, numbers: int) -> str:
    """Return the work and the memory for a block of so many parameters, in words."""
    what = (
        f"{numbers} products with the Hessian"
        if kind not in PASS_OF_KIND
        else "a derivative of every example and vector sent back"
    )
    return (
        f"{what}, {numbers**2 * 8 / 1e9:.2g} GB in double precision for the largest block, of"
        f" {numbers} parameters"
    )
