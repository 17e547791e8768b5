"""Faults in the targets of a categorical likelihood, and their remedies.

A remedy is one that the next check allows.

Legend: N examples, C classes, P the axes of places where a class is told apart.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from curvlab.finite import all_finite

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8)


def wrong_targets(z: Tensor, y: Tensor, ignore_index: int) -> tuple[str, str] | None:
    """Return (what is wrong with targets y of outputs z, the remedy); None where nothing is."""
    if y.is_floating_point() and y.shape == z.shape:
        return _wrong_probabilities(y)
    wanted = z.shape[:1] + z.shape[2:]
    if y.shape != wanted:
        what = f"{wanted.numel()} class numbers, shape {tuple(wanted)}, are needed"
        return f"categorical targets have shape {tuple(y.shape)} but {what}", _other_shape(
            z, y, wanted
        )
    if y.dtype not in _INTEGERS:
        return (
            f"categorical targets must be integers, not {y.dtype}",
            "convert them with y.long()",
        )
    classes = z.shape[1]
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


def _other_shape(z: Tensor, y: Tensor, wanted: torch.Size) -> str:
    """Return the remedy where class numbers have not the shape `wanted`."""
    number = "" if y.dtype in _INTEGERS else ".long()"
    turn = "transpose(1, 2)" if z.ndim == 3 else "movedim(-1, 1)"
    if y.shape == z.shape:
        y = y.long()
        hot = bool(((y == 0) | (y == 1)).all())
        if hot and bool((y.sum(1) == 1).all()):
            return f"of one-hot targets take y{number}.argmax(1)"
        if hot and z.ndim > 2 and bool((y.sum(-1) == 1).all()):
            return (
                f"the classes are axis 1: return z.{turn} from the model, and of one-hot targets"
                f" take y{number}.argmax(-1)"
            )
        if hot:
            return "where several classes or none are true, take Bernoulli with y.float()"
        if bool((y >= 0).all()) and bool((y.sum(1) > 0).all()):
            return "of counts take y / y.sum(1, keepdim=True)"
    elif y.shape == (*wanted, 1):
        return f"take y.squeeze(-1){number}"
    elif y.shape == (z.shape[0], 1, *z.shape[2:]):
        return f"take y.squeeze(1){number}"
    elif z.ndim > 2 and y.shape == z.shape[:-1]:
        return f"the classes are axis 1: return z.{turn} from the model"
    elif z.ndim > 2 and y.shape == z.shape[:1]:
        return (
            "return z.flatten(1) from the model"
            if wanted.numel() == len(z)
            else "pool the outputs of the model to [N, C]"
        )
    return f"or probabilities of the outputs' shape, {tuple(z.shape)}"


def _wrong_probabilities(y: Float[Tensor, "N C *P"]) -> tuple[str, str] | None:
    if not all_finite(y):
        return "categorical probabilities contain NaN or Inf", "clean the data first"
    if bool((y < 0).any()):
        return "categorical probabilities must not be negative", "of logits take y.softmax(1)"
    sums = y.sum(1)
    near = max(1e-4, torch.finfo(y.dtype).eps ** 0.5)
    off = (sums - 1).abs() > near
    if not bool(off.any()):
        return None
    first = tuple(off.nonzero()[0].tolist())
    what = (
        f"categorical probabilities must sum to 1 over axis 1, not to {float(sums[first]):g}"
        f" (example {first[0]})"
    )
    if y.ndim > 2 and not bool(((y.sum(-1) - 1).abs() > near).any()):
        turn = "transpose(1, 2)" if y.ndim == 3 else "movedim(-1, 1)"
        return what, f"the classes are axis 1: return z.{turn} from the model, and take y.{turn}"
    if bool((sums == 0).any()):
        return what, "leave examples without a label out, or take class numbers with ignore_index"
    return (
        what,
        (
            "divide them by y.sum(1, keepdim=True), or take Bernoulli where several classes can be"
            " true"
        ),
    )
