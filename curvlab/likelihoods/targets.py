"""Faults in the targets of a categorical likelihood, and their remedies.

A remedy is one that the next check allows.

Legend: N examples, C classes, P the axes of places where a class is told apart.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from curvlab.finite import all_finite

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8)


def both_fit(z: Tensor, what: str) -> str:
    """Return the line for targets that fit whether the classes are axis 1 or the last."""
    places = [list(z.shape[2:]), list(z.shape[1:-1])]
    return (
        f"{what} fit outputs of shape {tuple(z.shape)} in two readings: {z.shape[1]} classes on"
        f" axis 1 at places {places[0]}, or {z.shape[-1]} classes on the last axis at places"
        f" {places[1]}: say Categorical(axis=1) or Categorical(axis=-1)"
    )


def wrong_targets(
    z: Tensor, y: Tensor, ignore_index: int, axis: int | None
) -> tuple[str, str] | None:
    """Return (what is wrong with targets y of outputs z, the remedy); None where nothing is.

    `axis` is that of the classes, 1 or −1, or None where the shape of class numbers tells it.
    """
    if y.is_floating_point() and y.shape == z.shape:
        return _wrong_probabilities(z, y, axis)
    axes = [1, -1] if axis is None else [axis]
    wanted = [_places(z, one) for one in axes]
    if y.shape not in wanted:
        what = f"{wanted[0].numel()} class numbers, shape {tuple(wanted[0])}, are needed"
        if axis is None:
            what += f", or with the classes last {tuple(wanted[1])}"
        return f"categorical targets have shape {tuple(y.shape)} but {what}", _other_shape(
            z, y, axes
        )
    if y.dtype not in _INTEGERS:
        return (
            f"categorical targets must be integers, not {y.dtype}",
            "convert them with y.long()",
        )
    classes = z.shape[axes[wanted.index(y.shape)]]
    low, high = (int(y.min()), int(y.max())) if y.numel() else (0, 0)
    if not 0 <= low <= high < classes:  # seldom, or where places are ignored
        found = y.long()
        found = found[((found < 0) | (found >= classes)) & (found != ignore_index)]
        if len(found):
            bad = int(found.max()) if int(found.max()) >= classes else int(found.min())
            remedy = "count the classes from 0, or widen the outputs"
            if bool((found == bad).all()):
                remedy += (
                    f"; where {bad} says that there is no label, Categorical(ignore_index={bad})"
                )
            what = f"label {bad} is out of range: the model has {classes} outputs"
            return f"{what}, so labels run from 0 to {classes - 1}", remedy
    return None


def _places(z: Tensor, axis: int) -> torch.Size:
    """Return the shape of class numbers, [N, *P]."""
    return z.shape[:-1] if axis == -1 else z.shape[:1] + z.shape[2:]


def _other_shape(z: Tensor, y: Tensor, axes: Sequence[int]) -> str:
    """Return the remedy where class numbers have not the shape that goes with any of the axes."""
    number = "" if y.dtype in _INTEGERS else ".long()"
    if y.shape == z.shape:
        y = y.long()
        hot = bool(((y == 0) | (y == 1)).all())
        for axis in axes:
            if hot and bool((y.sum(axis) == 1).all()):
                return f"of one-hot targets take y{number}.argmax({axis})"
        if hot:
            return "where several classes or none are true, take Bernoulli with y.float()"
        if bool((y >= 0).all()) and bool((y.sum(axes[0]) > 0).all()):
            return f"of counts take y / y.sum({axes[0]}, keepdim=True)"
        return f"or probabilities of the outputs' shape, {tuple(z.shape)}"
    wanted = [_places(z, axis) for axis in axes]
    if y.shape in [(*shape, 1) for shape in wanted]:
        return f"take y.squeeze(-1){number}"
    if y.shape in [(shape[0], 1, *shape[1:]) for shape in wanted]:
        return f"take y.squeeze(1){number}"
    if z.ndim > 2 and y.shape == _places(z, -axes[0]):
        return f"say Categorical(axis={-axes[0]})"
    if z.ndim > 2 and y.shape == z.shape[:1]:
        return (
            "return z.flatten(1) from the model"
            if wanted[0].numel() == len(z)
            else "pool the outputs of the model to [N, C]"
        )
    return f"or probabilities of the outputs' shape, {tuple(z.shape)}"


def _wrong_probabilities(
    z: Tensor, y: Float[Tensor, "N *CP"], given: int | None
) -> tuple[str, str] | None:
    if not all_finite(y):
        return "categorical probabilities contain NaN or Inf", "clean the data first"
    axis = 1 if given is None else given
    if bool((y < 0).any()):
        return "categorical probabilities must not be negative", f"of logits take y.softmax({axis})"
    sums = y.sum(axis)
    near = max(1e-4, torch.finfo(y.dtype).eps ** 0.5)
    off = (sums - 1).abs() > near
    fits_other = y.ndim > 2 and not bool(((y.sum(-axis) - 1).abs() > near).any())
    if not bool(off.any()):
        if given is None and fits_other:
            what, remedy = both_fit(z, "probabilities").rsplit(": ", 1)
            return what, remedy
        return None
    first = tuple(off.nonzero()[0].tolist())
    called = "axis 1" if axis == 1 else "the last axis"
    what = (
        f"categorical probabilities must sum to 1 over {called}, not to {float(sums[first]):g}"
        f" (example {first[0]})"
    )
    if fits_other:
        return what, f"where the classes are the other axis, say Categorical(axis={-axis})"
    if bool((sums == 0).any()):
        return what, "leave examples without a label out, or take class numbers with ignore_index"
    return (
        what,
        (
            f"divide them by y.sum({axis}, keepdim=True), or take Bernoulli where several classes"
            " can be true"
        ),
    )
