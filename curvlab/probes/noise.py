"""Probe of gradient noise, from the gradients of the examples.

Their squared lengths by layer, without forming one where T is small. Of the likelihood alone,
without the L2 term. NaN for parameters of layers without a rule, which have none of one example.

Legend: N examples, T places, I inputs incl. the bias column, O outputs; g_n gradient of one
example, ḡ their mean; Σ the covariance of g_n, with N − 1.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from curvlab.probes.base import Frame, Variable, probe
from curvlab.statistics import LayerStatistics


def squared_lengths(s: LayerStatistics) -> Float[Tensor, " N"]:
    """Return ‖g_n‖² of one layer for every example.

    ‖g‖²‖a‖² at one place; Σ_tt' (g_t·g_t')(a_t·a_t') where that is less work than the gradients.
    """
    if not s.used:
        return torch.zeros(s.size, dtype=torch.float64, device=s.like.device)
    if not s.provides("factors") or len(s.parts) > 1 or s.places**2 > s.block.numel:
        return torch.cat(
            [
                rows.double().square().sum(1)
                for rows in s.some_rows(max(1, (1 << 24) // s.block.numel))
            ]
        )
    a, g, places = s.bare_a, s.g[0], s.places
    if places == 1:
        return g[:, 0].double().square().sum(1) * (
            a[:, 0].double().square().sum(1) + s.block.biased
        )
    return ((g @ g.mT).double() * ((a @ a.mT).double() + s.block.biased)).sum((1, 2))


@probe(
    "noise",
    "gradient noise and signal to noise of every block",
    {
        "gradient_variance": Variable(
            ("block",), "tr Σ, variance of the gradient of one example", "nat²/parameter²"
        ),
        "gradient_signal": Variable(
            ("block",),
            "‖ḡ‖² − tr Σ / N, unbiased for the squared norm of the true gradient",
            "nat²/parameter²",
        ),
        "signal_to_noise": Variable(
            ("block",), "‖ḡ‖² N / tr Σ, about 1 where the minibatch's gradient is all noise", "1"
        ),
        "noise_scale": Variable(
            (), "tr Σ over the signal, all blocks: the batch size at which noise equals signal", "1"
        ),
    },
    needs=frozenset({"data"}),
    every=10,
)
def _noise(frame: Frame) -> list[Tensor]:
    size = frame.now.size
    statistics = frame.now.passes["data"]
    nan = torch.full((), torch.nan, dtype=torch.float64, device=frame.now.loss.device)
    total, mean = [], []
    for block in frame.objective.blocks:
        s = statistics[block.name]
        total.append(nan if not s.structured else squared_lengths(s).sum())
        mean.append(nan if not s.structured else s.gradient.double().square().sum())
    squares, means = torch.stack(total), torch.stack(mean)
    variance = (squares - size * means) / (size - 1) if size > 1 else squares * torch.nan
    signal = means - variance / size
    return [variance, signal, means / (variance / size), variance.nansum() / signal.nansum()]
