"""How a minibatch meets a model.

Which part of it are the labels, and which of the outputs is looked at.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from curvlab.errors import CurvlabError, shown
from curvlab.finite import waits
from curvlab.nests import Batched, Nest, as_nest, plain

Outputs = str | Callable[[Any], Any]

Mask = str | Callable[[Any], Any] | None
"""The name of a tensor in the inputs, or a function of the inputs, [N, T]: 0 at padding."""


def _named(value: object) -> bool:
    return isinstance(value, str) and value != ""


_WANTED: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "outputs": (
        lambda value: _named(value) or callable(value),
        "the name of a field, or a function of the outputs",
    ),
    "labels": (
        lambda value: _named(value) or (isinstance(value, int) and not isinstance(value, bool)),
        "a key, or a position",
    ),
    "mask": (
        lambda value: value is None or _named(value) or callable(value),
        "the name of a tensor in the inputs, or a function of the inputs",
    ),
    "shared": (lambda value: isinstance(value, tuple | list | set), "a list of names"),
}
"""{field of an `Interface`: (whether a value can be it, what it must be)}"""


@dataclass(frozen=True)
class Interface:
    """What of a minibatch are the labels, and what of the model's outputs the likelihood takes.

    Args:
        labels: the key of the labels in a mapping; their position in a tuple of more than two.
        outputs: the field of the model's outputs where they are no tensor; or a function of them
            that picks a tensor [N, …].
        shared: names of tensors in the inputs that are not the examples' (a table, positions).
        mask: which places of the inputs are no padding.
    """

    labels: str | int = "labels"
    outputs: Outputs = "logits"
    shared: Collection[str] = ()
    mask: Mask = None

    def __post_init__(self) -> None:
        for name, (fits, wanted) in _WANTED.items():
            value = getattr(self, name)
            if not fits(value):
                raise CurvlabError(f"{name} must be {wanted}, not {shown(value)}")
        for name in self.shared:
            if not _named(name):
                raise CurvlabError(f"shared must be a list of names, not of {shown(name)}")

    def apart(self, batch: Any) -> tuple[Any, Any]:
        """Return inputs and targets of a minibatch as a loader gives it.

        It is a pair, or a mapping or tuple from which the labels are taken out.

        Raises:
            CurvlabError: no labels where they should be.
        """
        if isinstance(batch, Mapping):
            if self.labels not in batch:
                known = ", ".join(map(repr, batch))
                raise CurvlabError(
                    f"the minibatch has no key {self.labels!r} for its labels (keys: {known}): name"
                    " it by labels='…' of the Objective"
                )
            rest = {name: part for name, part in batch.items() if name != self.labels}
            return rest, batch[self.labels]
        if isinstance(batch, tuple | list) and len(batch) == 2:
            return batch[0], batch[1]
        if isinstance(batch, tuple | list) and len(batch) > 2:
            if isinstance(self.labels, str) or not -len(batch) <= self.labels < len(batch):
                raise CurvlabError(
                    f"the minibatch has {len(batch)} parts, which may be several inputs or several"
                    " targets: say which are the labels by labels=-1 of the Objective, or give"
                    " pairs (inputs, targets)"
                )
            at = self.labels % len(batch)
            return tuple(part for i, part in enumerate(batch) if i != at), batch[at]
        raise CurvlabError(
            f"a minibatch must be a pair (x, y), or a mapping with the key {self.labels!r}, not"
            f" {type(batch).__name__}"
        )

    def inputs(self, x: Any) -> Batched:
        """Inputs as a tensor or a nest. Raises CurvlabError for what has no examples."""
        return as_nest(x, self.shared)

    def places(self, x: Batched) -> Bool[Tensor, "N T"] | None:
        """Return which places of the inputs are no padding; None where no mask was named.

        Raises:
            CurvlabError: no such tensor in the inputs, or it is no mask [N, T] of zeros and ones.
        """
        if self.mask is None:
            return None
        if callable(self.mask):
            found, what = self.mask(plain(x)), "what mask= of the Objective returns"
        else:
            what = f"mask='{self.mask}' of the Objective"
            leaves = (
                {".".join(path): t for path, t in x.leaves.items()} if isinstance(x, Nest) else {}
            )
            short = {name.rpartition(".")[2]: t for name, t in leaves.items()} | leaves
            if self.mask not in short:
                known = ", ".join(map(repr, leaves)) or "one tensor without a name"
                raise CurvlabError(
                    f"{what} is no tensor of the inputs (known: {known}): name the one that is 1"
                    " where there is no padding, or give a function of the inputs"
                )
            found = short[self.mask]
        if not isinstance(found, Tensor) or found.ndim != 2 or len(found) != len(x):
            is_ = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise CurvlabError(
                f"{what} must be [{len(x)}, T], a number for every place of each example, not {is_}"
            )
        if found.dtype == torch.bool:
            return found
        if not waits(found) and not bool(((found == 0) | (found == 1)).all()):
            raise CurvlabError(
                f"{what} must hold 0 at padding and 1 elsewhere, not"
                f" {float(found[(found != 0) & (found != 1)][0]):g}"
            )
        return found != 0

    def pick(self, out: Any, join: Callable[[Mapping[str, Tensor]], Tensor] | None = None) -> Any:
        """Return the tensor among a model's outputs that the likelihood takes.

        Args:
            out: what the model returned.
            join: of a likelihood of several heads: makes one tensor of its outputs.

        Raises:
            CurvlabError: no such field.
        """
        if callable(self.outputs):
            out = self.outputs(out)
        if join is not None and not isinstance(out, Tensor):
            return join(_fields(out) or {})
        if isinstance(out, Tensor) or callable(self.outputs):
            return out
        fields = _fields(out)
        if fields is not None and self.outputs in fields:
            return fields[self.outputs]
        known = (
            f"fields: {', '.join(map(repr, fields))}"
            if fields
            else f"{len(out)} parts"
            if isinstance(out, Sequence)
            else "no fields"
        )
        raise CurvlabError(
            f"the model returned a {type(out).__name__}, not one tensor ({known}): pick one by"
            " outputs='…' of the Objective, or by outputs=lambda out: out[0]"
        )


def _fields(out: Any) -> dict[str, Any] | None:
    if isinstance(out, Mapping):
        return dict(out)
    if hasattr(out, "_fields"):
        return dict(zip(out._fields, out, strict=True))
    if dataclasses.is_dataclass(out):
        return {f.name: getattr(out, f.name) for f in dataclasses.fields(out)}
    return None
