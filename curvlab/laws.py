"""Law: the things found of a likelihood, and the line that refuses a kind of matrix for it.

Legend: N examples, C outputs (flattened where the axis is one), V columns of S.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from curvlab.errors import lookup
from curvlab.likelihoods import Heads
from curvlab.likelihoods.heads import block_diagonal

Root = Callable[[Tensor, Tensor], Tensor]
"""(outputs [N, *C], labels) → columns of S [V, N, *C]."""


@dataclass(frozen=True)
class Law:
    """The things that were found of a likelihood at some outputs and labels.

    `root`: (z, y) → S [V, N, *C], S Sᵀ = ∂²ℓ/∂z²: the likelihood's own where it holds, else from
    the loss's own Hessian at each call; None where that is not positive semi-definite or too large.
    `follows`: labels drawn by `sample` follow the loss, so that Fisher and GGN are one matrix: mean
    score 0 and second moment of the score ∂²ℓ/∂z², within 6 standard errors of 2000 draws (2^20
    over the outputs where these are over 524, at least 64, and none over 65 536). `why`: what was
    found, or "".
    """

    root: Root | None
    follows: bool
    why: str
    # whether the likelihood is the user's, so that all this holds for these outputs and labels
    # alone
    examined: bool = True

    @property
    def fisher_and_ggn_differ(self) -> bool:
        """Whether Fisher and GGN may be two matrices: labels may not follow the loss."""
        return not self.follows


def law_of_heads(heads: Heads, laws: Mapping[str, Law]) -> Law:
    """Return the law of a sum of heads: S lies in blocks.

    Labels follow the loss where those of every head do.
    """
    roots = {name: law.root for name, law in laws.items() if law.root is not None}

    def root(z: Tensor, y: Any) -> Tensor:
        parts = heads.split(z).items()
        return block_diagonal(z, (roots[name](part, y[name]) for name, part in parts))

    return Law(
        root if len(roots) == len(laws) else None,
        all(law.follows for law in laws.values()),
        "; ".join(f"head '{name}': {law.why}" for name, law in laws.items() if law.why),
        any(law.examined for law in laws.values()),
    )


_REFUSALS = {
    "ggn": 'kind="ggn" has no S with S Sᵀ = ∂²ℓ/∂z² to be taken by: {}',
    "fisher": (
        'kind="fisher" is taken over all labels by S, S Sᵀ = ∂²ℓ/∂z², where the two are one: {};'
        ' take "ggn" or "ef"'
    ),
    "fisher-mc": 'kind="fisher-mc" needs labels that follow the loss: {}; take "ggn" or "ef"',
}


def refusal(law: Law, kind: str) -> str:
    """Return the line that refuses a kind, "fisher", "fisher-mc" or "ggn", for what was found."""
    return lookup(_REFUSALS, kind, "kind").format(law.why)
