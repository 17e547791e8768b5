"""Vectors sent back through a graph that is kept, and torch's refusals in one line."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from curvlab.errors import CurvlabError, raise_if_out_of_memory


def edge_of(output: Tensor) -> tuple[GradientEdge, tuple[int, ...]]:
    """Return where the derivative in an output arrives, and its shape there.

    In-place operations on a view start from its base.
    """
    base = output._base if output._is_view() else None
    if (
        base is not None
        and base.requires_grad
        and base.numel() == output.numel()
        and base.is_contiguous()
        and output.is_contiguous()
    ):
        return get_gradient_edge(base), tuple(base.shape)
    assert output.grad_fn is not None
    return GradientEdge(output.grad_fn, output.output_nr), tuple(output.shape)


_REMEDIES = {
    "use_reentrant=True": (
        "activation checkpointing with use_reentrant=True has no such derivative: use"
        " use_reentrant=False"
    ),
    "modified by an inplace operation": (
        "a tensor that it needs was overwritten in place: write x = x + … instead of x += …"
    ),
    "Inference tensors cannot be saved": (
        "an inference tensor takes part: clone it outside torch.inference_mode()"
    ),
}
"""{part of torch's message: what a user does about it}"""


def remedy(error: Exception) -> str | None:
    """Return what a user does about torch's refusal of a derivative, where we know."""
    return next((told for part, told in _REMEDIES.items() if part in str(error)), None)


def refused(error: Exception, what: str) -> CurvlabError:
    """Return torch's refusal of a derivative in one line.

    Raises OutOfMemory where it is none, and memory ran out.
    """
    raise_if_out_of_memory(error)
    first = str(error).splitlines()[0] if str(error) else type(error).__name__
    return CurvlabError(f"torch cannot take {what} of the model: {remedy(error) or first}")


def sent_together(
    z: Tensor, targets: Sequence[Any], vectors: Float[Tensor, "V N *C"], last: bool = False
) -> list[Tensor | None]:
    """Return `send_back` with the vectors and the targets' first axis as one.

    Of a single vector it is as autograd gives it; where it is the `last`, the graph goes, and its
    memory serves for what is made of it.
    """
    if len(vectors) != 1:
        return [None if d is None else d.flatten(0, 1) for d in send_back(z, targets, vectors)]
    try:
        return list(
            torch.autograd.grad(z, targets, vectors[0], retain_graph=not last, allow_unused=True)
        )
    except RuntimeError as error:
        raise refused(error, "the derivative") from error


def send_back(
    z: Tensor | GradientEdge, targets: Sequence[Any], vectors: Float[Tensor, "V N *C"]
) -> list[Tensor | None]:
    """Return ∂z/∂target applied to every vector, [V, *target]; None where z does not depend on it.

    The vectors go back one by one where an operation has no batched derivative.

    Args:
        z: outputs, with their graph, which is kept.
        targets: what the derivative is taken in.
        vectors: sent back from the outputs.

    Raises:
        CurvlabError: torch cannot take the derivative.
    """
    count = len(vectors)
    if count != 1:
        try:
            return list(
                torch.autograd.grad(
                    z, targets, vectors, retain_graph=True, allow_unused=True, is_grads_batched=True
                )
            )
        except RuntimeError as error:
            raise_if_out_of_memory(error)
    try:
        each = [
            torch.autograd.grad(z, targets, v, retain_graph=True, allow_unused=True)
            for v in vectors
        ]
    except RuntimeError as error:
        raise refused(error, "the derivative") from error
    if count == 1:
        return [None if d is None else d[None] for d in each[0]]
    return [None if d[0] is None else torch.stack(d) for d in zip(*each, strict=True)]
