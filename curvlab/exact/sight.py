"""Checks that `torch.func` sees the parameters as autograd does, once a form."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch.func import grad

from curvlab.derivatives import derivatives
from curvlab.errors import raise_if_out_of_memory
from curvlab.exact.transforms import along, raise_ours
from curvlab.independence import some_rows
from curvlab.strangers import mixes

if TYPE_CHECKING:
    from curvlab.exact.torch_func import Function


def sees(function: Function) -> bool:
    """Return whether its derivatives of the first example are autograd's, back and forth.

    ⟨v, Ju⟩ = ⟨Jᵀv, u⟩ for random u and v.
    """
    closure, layout = function.closure, function.layout
    x = closure.x if mixes(closure.objective.modules) else some_rows(closure.x, slice(1))
    generator = torch.Generator("cpu").manual_seed(0)
    with derivatives():
        z, _ = closure.forward(x)
        v = torch.randn(z.shape, generator=generator, dtype=torch.float64, device="cpu").to(z)
        true = function._plain.back(z, v)
        at = layout.flatten(function._state).to(z.dtype)
        u = torch.randn(len(at), generator=generator, dtype=torch.float64, device="cpu").to(z)
        try:
            found = grad(lambda w: (function.outputs(w, x) * v).sum())(at)
            # forward mode goes on under no_grad and into .data
            forth = along(lambda w: function.outputs(w, x), at, u)
        except Exception as error:
            raise_ours(error)
            return False
    near = closure.form.precision**0.5
    apart = float((forth * v).sum() - true @ u)
    far = float(true.norm() * u.norm()) + float(forth.norm() * v.norm())
    return bool(
        float((found - true).norm()) <= near * float(true.norm()) and abs(apart) <= near * far
    )


def sees_twice(function: Function) -> bool:
    """Return whether its Hessian of one example's loss is that of double backward, if any.

    Along a random vector.
    """
    closure = function.closure
    u = torch.randn(
        1,
        len(function.at),
        generator=torch.Generator("cpu").manual_seed(0),
        dtype=torch.float64,
        device="cpu",
    ).to(function.at)
    try:
        true = function._plain.product("hessian", [closure.y], function.at)(u)
        found = function._transformed(
            "hessian", [closure.y], lambda v: torch.full_like(v, math.nan)
        )(u)
        near = closure.form.precision**0.5
        return bool(float((found - true).norm()) <= near * float(true.norm() + found.norm()))
    except Exception as error:
        raise_if_out_of_memory(error)
        return True
