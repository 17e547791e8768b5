"""Parts that likelihoods share: checks of targets, unit vectors, arguments that are numbers.

Legend: N examples, C outputs, V columns of the root.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from curvlab.errors import CurvlabError, guard_memory, shown
from curvlab.finite import all_finite


def check_targets(
    z: Tensor, y: Tensor, name: str, masked: Shaped[Tensor, "N *C"] | None = None
) -> None:
    """Raise CurvlabError unless y is shaped as z, floating, and finite where it is not masked."""
    if y.shape != z.shape:
        same = [n for n in y.shape if n > 1] == [n for n in z.shape if n > 1]
        remedy = f"take y.reshape{tuple(z.shape)}" if same else "they must be the same"
        raise CurvlabError(
            f"{name} targets have shape {tuple(y.shape)} but the model's outputs have shape"
            f" {tuple(z.shape)}: {remedy}"
        )
    if not y.is_floating_point():
        raise CurvlabError(
            f"{name} targets must be floating point, not {y.dtype}: convert them with y.float()"
        )
    if not all_finite(y if masked is None else y.masked_fill(masked, 0.0)):
        raise CurvlabError(f"{name} targets contain NaN or Inf: clean the data first")


def guard_root(z: Shaped[Tensor, "N *C"]) -> None:
    """Refuse a root of more than 80 % of the memory, in one line."""
    outputs = z[0].numel()
    guard_memory(
        outputs * z.numel() * z.element_size(),
        f"the root of the output Hessian ({outputs} columns for each of {len(z)} examples)",
        'take fewer examples at a time, or labels drawn from the model ("model", kind="fisher-mc")',
    )


def units(z: Shaped[Tensor, "N *C"]) -> Float[Tensor, "V N *C"]:
    """Return the unit vectors of the outputs of every example: V = C."""
    n, c = z.shape[0], z[0].numel()
    eye = torch.eye(c, dtype=z.dtype, device=z.device)
    return eye[:, None, :].expand(c, n, c).reshape(c, *z.shape)


def as_numbers(what: str, value: Any, *, positive: bool = False) -> Tensor:
    """Return an argument as a tensor of numbers, a copy, in double precision where it was none.

    Raises:
        CurvlabError: it is none, or a number of it not finite, negative, or 0 where `positive`.
    """
    wanted = "finite numbers above 0" if positive else "finite numbers of 0 or more"
    try:
        found = (
            value
            if isinstance(value, Tensor)
            else torch.as_tensor(value, dtype=torch.float64, device="cpu")
        )
    except (TypeError, ValueError, RuntimeError) as error:
        raise CurvlabError(f"{what} must be {wanted}, not {shown(value)}") from error
    if found.is_complex() or found.dtype == torch.bool or not found.numel():
        raise CurvlabError(f"{what} must be {wanted}, not {shown(value)}")
    found = found.detach().clone() if found.is_floating_point() else found.double()
    good = found.isfinite() & (found > 0 if positive else found >= 0)
    if not bool(good.all()):
        bad = float(found[~good].flatten()[0])
        raise CurvlabError(f"{what} must be {wanted}, not {bad:g}")
    return found


def over_outputs(t: Tensor, z: Float[Tensor, "N *C"], what: str) -> Tensor:
    """Return an argument for the outputs of one example in the dtype and on the device of z.

    Raises:
        CurvlabError: it cannot be broadcast to them.
    """
    one = z.shape[1:]
    pairs = zip(reversed(t.shape), reversed(one), strict=False)
    if t.ndim > len(one) or not all(own in (1, wanted) for own, wanted in pairs):
        raise CurvlabError(
            f"{what} of shape {tuple(t.shape)} does not fit the outputs of one example, of shape"
            f" {tuple(one)}: it must be broadcast to them"
        )
    return t.to(z)
