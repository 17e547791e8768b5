"""Polar factors U (UᵀU)^{−1/2} as a symmetric matrix on the smaller side: P with P U, or U P.

Legend: O rows, I columns, K the smaller of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache

import torch
from jaxtyping import Float
from torch import Tensor

from curvlab.linalg.padded_products import second_moment
from curvlab.linalg.spectral import thin_svd

_PANEL, _LARGE = 128, 384
"""Rows of bfloat16 at a time, and the order from which on half a product is faster (measured: 250
and 256 are not, 500, 512 and 784 are, by 12 to 17 % of the iteration)."""

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""(a, b, c) of a step x ← a x + b x³ + c x⁵ of the Newton-Schulz iteration: Jordan et al. 2024."""


def newton_schulz_factor(
    U: Float[Tensor, "O I"], coefficients: tuple[float, float, float] = COEFFICIENTS, steps: int = 5
) -> Float[Tensor, "K K"]:
    """Return P with P U (U P where I < O) the Newton-Schulz iteration of X = U / ‖U‖_F.

    X ← (a + b S + c S²) X with S = X Xᵀ: all steps are polynomials of the first S, so that P is
    their product, and S ← (a + b S + c S²)² S; no iterate is [O, I]. Singular values of X from 0.02
    to 1 go to 0.68 to 1.13. P is positive definite, and U of zeros has one too.
    """
    a, b, c = coefficients
    largest = U.abs().amax()
    X = U / torch.where(largest > 0, largest, 1.0)  # the squares of U itself may overflow
    length = X.norm()
    length = torch.where(length > 0, length, 1.0)
    X = X / length
    S = second_moment(X.mT if X.shape[0] <= X.shape[1] else X)
    P: Tensor | None = None
    for step in range(steps):
        q = torch.addmm(S, S, S, beta=b, alpha=c)
        q.diagonal().add_(a)
        P = q if P is None else q @ P
        if step < steps - 1:
            S = q @ S @ q
    assert P is not None
    P = (P + P.mT) / 2
    return P / (length * torch.where(largest > 0, largest, 1.0))


def polar_factor(U: Float[Tensor, "O I"]) -> Float[Tensor, "K K"]:
    """Return (U Uᵀ)^{−1/2} or (UᵀU)^{−1/2}, whichever is smaller, by the singular values of U.

    Where U is singular P has 1/σ₁ in the place of 1/0 (and 1 for U of zeros): it is positive
    definite, and P U has the singular values 1 and 0.
    """
    left, s, right = thin_svd(U)
    basis = left if U.shape[0] <= U.shape[1] else right.mT
    first = torch.where(s[0] > 0, s[0], 1.0)
    rounding = first * max(U.shape) * torch.finfo(U.dtype).eps
    return (basis / torch.where(s > rounding, s, first)) @ basis.mT


def newton_schulz_bfloat16(
    Us: Sequence[Float[Tensor, "_ _"]],
    coefficients: tuple[float, float, float] = COEFFICIENTS,
    steps: int = 5,
    scale: Callable[[int, int], float] | None = None,
) -> list[Float[Tensor, "_ _"]]:
    """Return the Newton-Schulz iteration of each U / ‖U‖_F itself, of bfloat16, as published.

    Jordan et al. 2024: on a CPU to the bit what `torch.optim.Muon` has. It is within two per cent
    of `newton_schulz_factor(U)`'s product, and faster where a processor multiplies bfloat16. All
    are of one shape, or of that turned: small matrices go faster together.

    Args:
        Us: of one precision.
        coefficients: of a step.
        steps: how many.
        scale: by (O, I), of the results, which then have the precision of the Us.
    """
    a, b, c = coefficients
    tall = [U.shape[0] > U.shape[1] for U in Us]
    # none is turned: to copy numbers turned and round them takes as long as a product
    stacks = {
        kind: _unit([U for U, t in zip(Us, tall, strict=True) if t is kind], alone=len(Us) == 1)
        for kind in sorted(set(tall))
    }
    # but where X P has other bits than P Xᵀ, which is as published
    turned = not _multiplies_bfloat16(Us[0].device)
    if turned and True in stacks:
        stacks[True] = stacks[True].mT
    order, several = min(Us[0].shape), len(Us) > 1
    S = Us[0].new_empty(
        (len(Us), order, order) if several else (order, order), dtype=torch.bfloat16
    )
    P = torch.empty_like(S)
    of_S, of_P = (_shares(whole, stacks) for whole in (S, P))
    # small matrices: every call between two products shows
    times, add = (torch.bmm, torch.baddbmm) if several else (_symmetric, torch.addmm)
    plus: Callable[..., object] = torch.baddbmm if several else _symmetric_sum
    parts = [
        (t and not turned, X, X.new_empty(X.shape), of_S[t], of_P[t]) for t, X in stacks.items()
    ]
    for _ in range(steps):
        for t, X, _, own_S, _ in parts:
            times(X.mT, X, out=own_S) if t else times(X, X.mT, out=own_S)
        plus(S, S, S, beta=b, alpha=c, out=P)
        for t, X, spare, _, own_P in parts:
            add(X, X, own_P, beta=a, out=spare) if t else add(X, own_P, X, beta=a, out=spare)
        parts = [(t, spare, X.contiguous(), own_S, own_P) for t, X, spare, own_S, own_P in parts]
    stacks = {t: X.mT if t and turned else X for t, (_, X, *_) in zip(stacks, parts, strict=True)}
    if scale is not None:
        # by a tensor of one entry, not a number: the product has its precision, in one pass
        scales = {kind: scale(X.shape[-2], X.shape[-1]) for kind, X in stacks.items()}
        stacks = {kind: X * Us[0].new_full((1,), scales[kind]) for kind, X in stacks.items()}
    each = {kind: iter([X] if X.ndim == 2 else X.unbind()) for kind, X in stacks.items()}
    return [next(each[kind]) for kind in tall]


@cache
def _multiplies_bfloat16(device: torch.device) -> bool:
    """Return whether a device multiplies bfloat16 itself.

    A processor that does not adds up single precision, in an order that goes by how numbers lie.
    """
    if device.type != "cpu":
        return True
    known = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]  # torch's
    return known and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _shares(whole: Tensor, stacks: Mapping[bool, Tensor]) -> dict[bool, Tensor]:
    """Return the part of every stack in what holds all of them one after the other."""
    if len(stacks) == 1:
        return dict.fromkeys(stacks, whole)
    return dict(zip(stacks, torch.split(whole, [len(X) for X in stacks.values()]), strict=True))


def _unit(Us: Sequence[Float[Tensor, "O I"]], alone: bool) -> Float[Tensor, "*M O I"]:
    """Return each U / ‖U‖_F of bfloat16: of one alone a matrix, else of M."""
    shape = tuple(Us[0].shape)
    X = Us[0].new_empty(shape if alone else (len(Us), *shape), dtype=torch.bfloat16)
    for into, U in zip([X] if alone else X, Us, strict=True):
        into.copy_(U)
    return X.div_(X.norm(dim=(-2, -1), keepdim=True).clamp_(min=1e-7))


def _symmetric(
    left: Float[Tensor, "K _"], right: Float[Tensor, "_ K"], *, out: Float[Tensor, "K K"]
) -> None:
    """Write left right, known to be symmetric, to the bit of the product."""
    for rows, columns in _triangle(out):
        torch.mm(left[rows], right[:, columns], out=out[rows, columns])
        _mirror(out, rows)


def _symmetric_sum(
    base: Float[Tensor, "K K"],
    left: Float[Tensor, "K _"],
    right: Float[Tensor, "_ K"],
    *,
    beta: float,
    alpha: float,
    out: Float[Tensor, "K K"],
) -> None:
    """Write beta · base + alpha · left right likewise, each rounded once."""
    for rows, columns in _triangle(out):
        some = base[rows, columns], left[rows], right[:, columns]
        torch.addmm(*some, beta=beta, alpha=alpha, out=out[rows, columns])
        _mirror(out, rows)


def _triangle(out: Float[Tensor, "K K"]) -> Iterator[tuple[slice, slice]]:
    """Yield (rows, columns): all, or of a large matrix on a CPU panels of one triangle."""
    order = len(out)
    panel = _PANEL if order >= _LARGE and out.device.type == "cpu" else order
    for start in range(0, order, panel):
        stop = min(start + panel, order)
        yield slice(start, stop), slice(stop)


def _mirror(out: Float[Tensor, "K K"], rows: slice) -> None:
    """Write a panel of the lower triangle into the upper one."""
    if rows.start:
        out[: rows.start, rows] = out[rows, : rows.start].mT


POLAR: dict[str, Callable[[Tensor], Tensor]] = {
    "newton-schulz": newton_schulz_factor,
    "bfloat16": newton_schulz_factor,
    "svd": polar_factor,
}
"""Ways to the matrix whose product with U is its polar factor, or near it.

That of "bfloat16" is for others than U itself, whose own is `newton_schulz_bfloat16`.
"""
