"""Probe of the pairs that quasi-Newton methods learn from.

Their ratios before and after damping, how they were damped, why refused. A method shows its pairs
by `learnt` (`curvature.base`) after the step in which they were learnt:

| pair | of which methods | H, B of the ratios |
|---|---|---|
| a | K-BFGS: Hessian action on the second moment of the inputs | H_a |
| g | K-BFGS: change of the mean pre-activation and of its derivative | H_g |
| g | SKQN-B: the block of pairs of Λ̃ | Λ̃ |
| step | SKQN-L: of a block, parameters and what the base misses | Λ⁰ |
| step | L-BFGS and S4QN: of all parameters together | H, Λ⁰ |

A pair of the whole vector stands at every block. An SKQN-B update is of a block of pairs and has no
single yᵀHy or sᵀs: its record is `pair_definiteness`, and τ as θ₂.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from curvlab.curvature.base import with_defaults
from curvlab.linalg.block_bfgs import BlockUpdate
from curvlab.linalg.bounds import within as holds
from curvlab.linalg.pair_damping import MU1
from curvlab.linalg.pairs import SKIPS, Pair, Products
from curvlab.probes.base import Frame, Numbers, Variable, probe

PAIRS = ("a", "g", "step")
STAGES = ("before", "after")

_EACH = ("algorithm", "block", "pair")
_BOTH = (*_EACH, "stage")


def _reason(pair: Pair | BlockUpdate) -> float:
    """Return the number of the rule in SKIPS by which the pair was refused; 0: it was used."""
    return float(list(SKIPS).index(pair.skipped))


def _fits(curvature: Any) -> bool:
    return with_defaults(curvature).learns_pairs()


def _clear(curvature: Any) -> None:
    """Forget the pairs before a step: what is found after it was learnt in it."""
    with_defaults(curvature).forget_learnt()


def _row(pair: Pair | BlockUpdate, mu2: float) -> list[float | Tensor]:
    """Return the numbers of a pair: its products before and after damping, and how it was damped.

    sᵀy, yᵀHy, sᵀs, yᵀy, least sᵀy/sᵀBs before and after; θ₁, θ₂, μ₂, the reason.
    """
    nan = float("nan")
    if isinstance(pair, BlockUpdate):
        after = pair.tau * pair.least + (1 - pair.tau)
        return [
            nan,
            nan,
            nan,
            nan,
            pair.least,
            nan,
            nan,
            nan,
            nan,
            after,
            nan,
            pair.tau,
            mu2,
            _reason(pair),
        ]
    damping = pair.damping
    both = [_of(p) for p in (damping.before, damping.after)]
    return [*both[0], nan, *both[1], nan, damping.theta1, damping.theta2, mu2, _reason(pair)]


def _of(p: Products) -> list[float | Tensor]:
    return [p.sy, p.yHy, p.ss, p.yy]


def _together(rows: list[list[float | Tensor]]) -> Tensor:
    """Return all rows as one tensor [pairs, numbers] in float64, where the numbers lie."""
    flat = [v for row in rows for v in row]
    tensors = {i: v for i, v in enumerate(flat) if isinstance(v, Tensor)}
    found = torch.tensor(
        [0.0 if i in tensors else float(v) for i, v in enumerate(flat)],
        dtype=torch.float64,
        device="cpu",
    )
    if tensors:
        stacked = torch.stack([v.detach() for v in tensors.values()]).double()
        found = found.to(stacked.device)
        found[torch.tensor(list(tensors), device=stacked.device)] = stacked
    return found.view(len(rows), -1)


def fractions(samples: Mapping[str, Numbers]) -> dict[str, Numbers]:
    """Return thesis Figure 2.1 from the samples of an epoch, [sample, …]; NaN without a pair."""
    there = ~np.isnan(samples["pair_skipped"])
    count = there.sum(0).astype(float)
    with np.errstate(invalid="ignore", divide="ignore"):
        known = ~np.isnan(samples["pair_curvature"])
        ratio, step, mu2 = (
            samples["pair_curvature"],
            samples["pair_step"],
            samples["pair_mu2"][..., None],
        )
        every = np.where(known.any(0), count[..., None], np.nan)
        limited = np.where(np.isnan(mu2).all(0), np.nan, every)
        return {
            "pairs_seen": count,
            "pairs_skipped": np.where(there, samples["pair_skipped"] > 0, False).sum(0) / count,
            "pairs_within_mu1": holds(ratio, 1 / MU1).sum(0) / every,
            "pairs_within_2mu1": holds(ratio, 2 / MU1).sum(0) / every,
            "pairs_within_mu2": holds(step, 1 / mu2).sum(0) / limited,
            "pair_curvature_mean": np.where(known, ratio, 0.0).sum(0) / known.sum(0),
        }


_SKIPPED = {
    "flag_values": " ".join(str(i) for i in range(len(SKIPS))),
    "flag_meanings": "; ".join(SKIPS.values()),
}


@probe(
    "damping",
    "pairs of quasi-Newton methods before and after damping, and why they were refused (thesis"
    " 2.3.1, Figure 2.1)",
    {
        "pair_curvature": Variable(_BOTH, "yᵀHy / sᵀy, to be at most 1/μ₁", "1"),
        "pair_step": Variable(_BOTH, "sᵀs / sᵀy, to be at most 1/μ₂", "1"),
        "pair_change": Variable(_BOTH, "yᵀy / sᵀy, to be at most 1/μ₃", "1"),
        "pair_definiteness": Variable(
            _BOTH, "SKQN: least sᵀy / sᵀBs over the span of the pairs, to be at least μ", "1"
        ),
        "theta1": Variable(_EACH, "θ₁ of Powell's damping on H, which changes s; 1: nothing", "1"),
        "theta2": Variable(
            _EACH, "θ₂ of Powell's damping on B or I, which changes y (SKQN-B: τ); 1: nothing", "1"
        ),
        "pair_mu2": Variable(_EACH, "μ₂ of the pair", "1"),
        "pair_skipped": Variable(
            _EACH, "rule by which the pair was refused; 0: it was used", "1", _SKIPPED
        ),
    },
    moment="after",
    coordinates={"pair": PAIRS, "stage": STAGES},
    epoch={
        "pairs_seen": Variable(_EACH, "pairs of the epoch that were sampled", "1"),
        "pairs_skipped": Variable(_EACH, "fraction of the epoch's pairs that were refused", "1"),
        "pairs_within_mu1": Variable(
            _BOTH, "fraction of the epoch's pairs with yᵀHy ≤ sᵀy/μ₁", "1"
        ),
        "pairs_within_2mu1": Variable(
            _BOTH, "fraction of the epoch's pairs with yᵀHy ≤ 2 sᵀy/μ₁", "1"
        ),
        "pairs_within_mu2": Variable(_BOTH, "fraction of the epoch's pairs with sᵀs ≤ sᵀy/μ₂", "1"),
        "pair_curvature_mean": Variable(_BOTH, "mean of yᵀHy / sᵀy over the epoch", "1"),
    },
    reduce=fractions,
    begin=_clear,
    fits=_fits,
    wants="a quasi-Newton method, which learns from pairs",
)
def _damping(frame: Frame) -> list[Tensor]:
    places, rows = [], []
    blocks = {name: i for i, name in enumerate(frame.blocks)}
    for i, algorithm in enumerate(frame.directions):
        for block, seen in frame.curvature(algorithm).learnt():
            at = [j for name, j in blocks.items() if block in (None, name)]
            places += [(i, j, PAIRS.index(seen.which)) for j in at]
            rows += [[*_row(seen.pair, seen.mu2), seen.gamma]] * len(at)
    shape = (len(frame.directions), len(blocks), len(PAIRS))
    device = frame.now.loss.device
    if not rows:
        nan = torch.full((*shape, 2), torch.nan, dtype=torch.float64, device=device)
        return [nan] * 4 + [nan[..., 0]] * 4
    numbers = _together(rows).to(device)
    full = torch.full(
        (*shape, numbers.shape[1]), torch.nan, dtype=torch.float64, device=numbers.device
    )
    full[tuple(torch.tensor(places, device=numbers.device).T)] = numbers
    # [algorithm, block, pair, stage, number]
    stages = torch.stack([full[..., :5], full[..., 5:10]], -2)
    sy, yHy, ss, yy, definite = stages.unbind(-1)
    theta1, theta2, mu2s, reason, gamma = full[..., 10:].unbind(-1)
    definite = torch.where(definite.isnan(), sy / (gamma[..., None] * ss), definite)
    return [yHy / sy, ss / sy, yy / sy, definite, theta1, theta2, mu2s, reason]
