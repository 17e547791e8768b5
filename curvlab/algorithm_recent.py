"""RECENT: entries of ALGORITHMS that no document of the package has, mostly of later years.

Their constants are those of the papers' own code, unless the source says otherwise.
"""

from __future__ import annotations

from curvlab.algorithm_entry import Algorithm, ByBlock, Constants
from curvlab.curvature.ekfac import Ekfac
from curvlab.curvature.foof import Foof
from curvlab.layers import Block


def _ekfac(block: Block, *, sharing: str = "expand") -> Ekfac:
    return Ekfac(sharing)


RECENT: dict[str, Algorithm] = {
    "ekfac": Algorithm(
        summary="second moments in the eigenbasis of KFAC's factors: its nearest diagonal",
        source="George et al. 2018; lr, damping of thesis Alg. 12",
        builds=ByBlock(_ekfac),
        labels="model",
        constants=Constants(lr=0.03, damping=1.0, refresh_every=20),
    ),
    "foof": Algorithm(
        summary="second moment of the inputs alone, KFAC with G = I; λ is of A",
        source="Benzing 2022; lr, damping of thesis Alg. 12",
        builds=ByBlock(Foof),
        labels="data",
        constants=Constants(lr=0.03, damping=1.0, refresh_every=20),
    ),
}
