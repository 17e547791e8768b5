"""∂²ℓ/∂z² of a loss by autograd.

These are its products with vectors, the matrix of each example, and a root of it where it is
convex.

Legend: N examples, C outputs (flattened where the axis is one), V columns of the root.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from curvlab.errors import CurvlabError, guard_memory
from curvlab.likelihoods import Likelihood
from curvlab.linalg.spectral import eigvalsh, symmetric_eigh


def detached(t: Tensor) -> Tensor:
    """Return a tensor without a graph, which is no inference tensor."""
    return t.clone() if t.is_inference() else t.detach()


class OutputLoss:
    """The loss of some examples with its graph, and what derivatives it has.

    They are `losses` [N], `score` ∂ℓ/∂z [N, *C], and products with ∂²ℓ/∂z².
    """

    def __init__(
        self, likelihood: Likelihood, z: Float[Tensor, "N *C"], y: Tensor, *, twice: bool = True
    ) -> None:
        name = type(likelihood).__name__
        self.z = z.detach().requires_grad_()
        self.losses = likelihood.loss(self.z, y)
        shape = (
            tuple(self.losses.shape)
            if isinstance(self.losses, Tensor)
            else type(self.losses).__name__
        )
        if shape != (len(z),):
            raise CurvlabError(
                f"the loss of {name} for {len(z)} example{'s' if len(z) > 1 else ''} has shape"
                f" {shape}, not ({len(z)},): return one number an example, the sum over its outputs"
                ' and places (reduction="none", then .flatten(1).sum(1))'
            )
        # Along ones that want a gradient: what can be differentiated only once then leaves a mark,
        # see `once`.
        ones = torch.ones(len(z), dtype=self.losses.dtype, device=z.device)
        self.score = self.back(self.losses, ones.requires_grad_(twice), create_graph=twice)

    def back(self, of: Tensor, v: Tensor | None = None, **how: bool) -> Float[Tensor, "N *C"]:
        """Return a number's gradient in the outputs, or along v; zero where there is no graph."""
        found = (
            torch.autograd.grad(of, self.z, v, allow_unused=True, **how)[0]
            if of.requires_grad
            else None
        )
        return torch.zeros_like(self.z) if found is None else found

    def times(self, v: Float[Tensor, "N *C"]) -> Float[Tensor, "N *C"]:
        """Return ∂²ℓ/∂z² v of each example; zero where the loss is linear."""
        return self.back(self.score, v, retain_graph=True)

    def once(self) -> bool:
        """Return whether some part of the loss can be differentiated only once.

        It would read as linear.
        """
        seen, ahead = set[Any](), [self.score.grad_fn]
        while ahead:
            node = ahead.pop()
            if node is not None and node not in seen:
                if node.name() == "torch::autograd::Error":
                    return True
                seen.add(node)
                ahead += [following for following, _ in node.next_functions]
        return False

    def hessian(self) -> Float[Tensor, "N C C"]:
        """Return ∂²ℓ/∂z², in float32 at least.

        One unit vector is sent back after another, all examples together.
        """
        n, c = len(self.z), self.z[0].numel()
        rows = []
        for i in range(c):
            unit = torch.zeros(n, c, dtype=self.z.dtype, device=self.z.device)
            unit[:, i] = 1
            rows.append(self.times(unit.reshape(self.z.shape)).reshape(n, c))
        found = torch.stack(rows, 1)
        return (found + found.mT).to(torch.promote_types(found.dtype, torch.float32)) / 2


def largest_norm(each: Float[Tensor, "N *C"]) -> float:
    """Return the largest norm of one example."""
    return float(each.reshape(len(each), -1).norm(dim=1).max())


def precision_of(z: Tensor) -> float:
    """Return the machine epsilon of the dtype of z."""
    return float(torch.finfo(z.dtype).eps)


def guard_output_hessians(z: Float[Tensor, "N *C"], name: str) -> None:
    """Refuse Hessians in these outputs, with eigenvectors and roots, that memory does not hold."""
    outputs = z[0].numel()
    guard_memory(
        3 * outputs * z.numel() * max(4, z.element_size()),
        f"the output Hessian of {name} ({outputs} outputs in each of {len(z)} examples)",
        'take route="func" or `product`',
    )


def check_convex(
    hessian: Float[Tensor, "N C C"], floor: float, name: str, precision: float
) -> None:
    """Raise CurvlabError where an eigenvalue lies further below 0 than rounding explains."""
    remedy = 'take route="func" or `product`'
    if not bool(hessian.isfinite().all()):
        raise CurvlabError(
            f"∂²ℓ/∂z² of {name} contains NaN or Inf, so that there is no root: {remedy}"
        )
    least = (
        -max(1e-6, precision**0.5) * largest_norm(hessian)
        - floor
        - float(torch.finfo(hessian.dtype).tiny)
    )
    shifted = hessian - least * torch.eye(
        hessian.shape[1], dtype=hessian.dtype, device=hessian.device
    )
    if bool(torch.linalg.cholesky_ex(shifted).info.any()):
        values = eigvalsh(hessian)
        raise CurvlabError(
            f"the loss of {name} is not convex in the outputs (eigenvalues of ∂²ℓ/∂z² from"
            f" {float(values.min()):.2g} to {float(values.max()):.2g}), so that there is no root:"
            f" {remedy}"
        )


def root_of_loss(
    likelihood: Likelihood, floor: float, z: Float[Tensor, "N *C"], y: Shaped[Tensor, "N ..."]
) -> Float[Tensor, "V N *C"]:
    """Return the symmetric root of ∂²ℓ/∂z² of each example, V = C.

    Raises:
        CurvlabError: there is none, or not the memory.
    """
    name = type(likelihood).__name__
    guard_output_hessians(z, name)
    with torch.inference_mode(False), torch.enable_grad():
        hessian = OutputLoss(likelihood, detached(z), detached(y)).hessian()
    check_convex(hessian, floor, name, precision_of(z))
    # in single precision NaN where entries are subnormal, on some CPUs
    values, vectors = symmetric_eigh(hessian.double())
    rounding = torch.finfo(hessian.dtype).eps * hessian.shape[1] ** 0.5 * values[:, -1:]
    # else its root, a half as many digits, stands where there is none
    values = torch.where(values > rounding, values, 0)
    root: Tensor = (vectors * values.sqrt()[:, None]) @ vectors.mT
    return root.transpose(0, 1).reshape(-1, *z.shape).to(z.dtype)
