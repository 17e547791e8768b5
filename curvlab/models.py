"""MODELS: the documents' networks by name, each with its data set and likelihood."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import nn

from curvlab.errors import lookup


def mlp(widths: Sequence[int], activation: Callable[[], nn.Module] = nn.Tanh) -> nn.Sequential:
    """Linear layers of the given widths, an activation between them, a linear output; torch's default initialisation."""
    layers: list[nn.Module] = []
    for i, (fan_in, fan_out) in enumerate(pairwise(widths)):
        layers += [nn.Linear(fan_in, fan_out)] if i == 0 else [activation(), nn.Linear(fan_in, fan_out)]
    return nn.Sequential(*layers)


@dataclass(frozen=True)
class Entry:
    summary: str
    build: Callable[[], nn.Module]
    data: str
    likelihood: str


MODELS: dict[str, Entry] = {
    "mlp-256-20": Entry(
        "256-20-20-20-20-20-10 tanh, the six layers that Figure 4.1 was run on (practice)",
        lambda: mlp([256, 20, 20, 20, 20, 20, 10]), "mnist16", "categorical",
    ),
    "mlp-256-20-printed": Entry(
        "256-20-20-20-20-10 tanh, the five layers that thesis 4.3.4 prints",
        lambda: mlp([256, 20, 20, 20, 20, 10]), "mnist16", "categorical",
    ),
}  # fmt: skip


def build(name: str, seed: int = 0) -> nn.Module:
    """Model `name` with weights drawn from `seed`, on the CPU in float32; the global generator is left as it was.

    Raises:
        CurvlabError: an unknown name.
    """
    entry = lookup(MODELS, name, "model")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return entry.build()
