"""Readings of SKQN: the settings around what S2QN prints of it, whose appendix is not available.

Document: S2QN (Yang et al.), Alg. 1, 4 and 6.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from curvlab.algorithm_entry import Algorithm, ByBlock, Constants
from curvlab.curvature.averaging import Averaging
from curvlab.curvature.base import CurvatureBlock
from curvlab.curvature.gradient_norm import GradientNorm


def skqn(
    summary: str,
    equations: str,
    make: Callable[..., CurvatureBlock],
    options: Mapping[str, Any],
) -> Algorithm:
    """Return an entry of SKQN with its three readings, `reading=` of its options.

    "kfac", the default, is KFAC with Λ and nothing else: sampled labels, moving average 0.9 from a
    warm start, momentum 0.9, λ split by π, T₂ = 20, lr and λ of KFAC (thesis Table 4.3). It is a
    reading: S2QN prints no settings of SKQN, but of its other method that "all settings of S4QN are
    the same as SSN except an additional quasi-Newton matrix" (6.1), and SSN is to S4QN what KFAC is
    to SKQN. It departs from the text in the labels: (17) has those of the model, and SKQN "the
    empirical version", those of the data (4.1).

    On `mnist-ae` (minibatches of 1000, single precision) no run diverged: see
    docs/results/training.md, which says how many seeds and steps.

    "printed" is Alg. 1 by the letter: labels of the data, the base of each minibatch by itself
    (T₂ = 1), no momentum, λI undivided, λ_k by (8). r₂ lies above the norms that autoencoders have
    (20 to 300), so that λ_k = α_k⁻¹ there. (19) and (20) hold before sketching alone.

    "seng" is as the authors' code of a method of the same kind, SENG, runs: labels of the data, the
    base of one minibatch kept for T₂ = 20 steps, momentum 0.9 of the *directions* (`MomentumKind`),
    λ split by π and constant, lr and λ of the thesis's KFAC-EF.

    With the data's labels λ has to be large. The base of a minibatch's own labels contains that
    minibatch's gradient: if it is exact, ‖p‖ ≤ 1 / 2√λ whatever ‖g‖. A base that is kept does not
    know the gradient, and what it does not cover moves as by SGD of rate lr / λ, at which SGD has
    to be stable. λ = 10 of "printed" is not tuned: its steps, whose eigenbases are made anew at
    every one, were run on small problems alone.

    Args:
        summary: of the entry.
        equations: of its refinement.
        make: its block.
        options: of `make`.
    """
    about: dict[str, Any] = {"summary": summary, "source": f"S2QN Alg. 1, {equations}; curvlab"}
    alone = Averaging(decay=0.0, warm=False)
    off = GradientNorm(r1=None, r2=None)
    return Algorithm(
        **about,
        builds=ByBlock(
            make, options=options, averaging=Averaging(skips_first=False), damping_rule=off
        ),
        labels="model",
        constants=Constants(lr=0.03, damping=1.0, refresh_every=20),
        readings={
            "printed": Algorithm(
                **about,
                builds=ByBlock(
                    make,
                    options={**options, "split": False},
                    averaging=alone,
                    damping_rule=GradientNorm(r1=0.1, r2=1000.0),
                ),
                labels="data",
                constants=Constants(lr=1.0, damping=10.0, momentum=0.0),
            ),
            "seng": Algorithm(
                **about,
                builds=ByBlock(make, options=options, averaging=alone, damping_rule=off),
                labels="data",
                constants=Constants(
                    lr=1.0, damping=100.0, momentum_kind="directions", refresh_every=20
                ),
            ),
        },
    )
