"""RECENT: entries of ALGORITHMS that no document of the package has, mostly of later years.

Their constants are those of the papers' own code, unless the source says otherwise.
"""

from __future__ import annotations

from curvlab.algorithm_entry import Algorithm, ByBlock, Constants
from curvlab.curvature.averaging import Averaging
from curvlab.curvature.diagonal import SecondMoment
from curvlab.curvature.eigenbases import kl_shampoo, soap
from curvlab.curvature.ekfac import Ekfac
from curvlab.curvature.foof import Foof
from curvlab.curvature.one_sided import asgo, muon
from curvlab.curvature.overall_damping import fixed, of_mean, per_factor_of_mean
from curvlab.curvature.sophia import SophiaG
from curvlab.layers import Block


def _ekfac(block: Block, *, sharing: str = "expand") -> Ekfac:
    return Ekfac(sharing)


def _sophia(block: Block, *, rho: float = 0.04) -> SophiaG:
    return SophiaG(rho)


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
    "adamw": Algorithm(
        summary="Adam with decoupled weight decay, at torch's constants",
        source="Loshchilov and Hutter 2019; torch",
        builds=ByBlock(
            lambda b: SecondMoment(),
            averaging=Averaging(decay=0.999, kind="corrected", warm=False),
        ),
        labels="data",
        constants=Constants(lr=1e-3, damping=1e-8, momentum_kind="corrected", weight_decay=0.01),
        overall=per_factor_of_mean,
    ),
    "sophia-g": Algorithm(
        summary="diagonal of the Gauss-Newton matrix by drawn labels, the direction clipped",
        source="Liu et al. 2023; lr curvlab",
        builds=ByBlock(
            _sophia,
            averaging=Averaging(decay=0.99, kind="fixed", warm=False, skips_first=False),
        ),
        labels="model",
        constants=Constants(
            lr=1e-4,
            damping=0.0,
            momentum=0.965,
            momentum_kind="average",
            update_every=10,
            weight_decay=0.1,
        ),
    ),
    "asgo": Algorithm(
        summary="one-sided Shampoo: root of the contracted gradient on the smaller side",
        source="An et al. 2025; lr curvlab",
        builds=ByBlock(
            asgo,
            averaging=Averaging(decay=0.8, kind="corrected", warm=False, skips_first=False),
        ),
        labels="data",
        constants=Constants(lr=1e-3, damping=1e-10, momentum_kind="average", weight_decay=0.1),
        overall=of_mean,
    ),
    "muon": Algorithm(
        summary="polar factor of the Nesterov momentum of hidden weights, the rest by Adam",
        source="Jordan et al. 2024; lr, weight decay of torch",
        builds=ByBlock(
            muon,
            averaging=Averaging(decay=0.95, kind="corrected", warm=False, skips_first=False),
        ),
        labels="data",
        constants=Constants(
            lr=1e-3,
            damping=1e-8,
            momentum=0.95,
            momentum_kind="nesterov",
            weight_decay=0.1,
        ),
        overall=fixed(1e-8),
    ),
    "soap": Algorithm(
        summary="Adam in the eigenbasis of contracted gradients",
        source="Vyas et al. 2024",
        builds=ByBlock(
            soap,
            averaging=Averaging(decay=0.95, kind="corrected", warm=False, skips_first=False),
        ),
        labels="data",
        constants=Constants(
            lr=3e-3,
            damping=1e-8,
            momentum=0.95,
            momentum_kind="corrected",
            refresh_every=10,
            weight_decay=0.01,
        ),
        overall=per_factor_of_mean,
    ),
    "kl-shampoo": Algorithm(
        summary="Kronecker factors of the gradient by maximum likelihood, their inverse root",
        source="Lin et al. 2025",
        builds=ByBlock(
            kl_shampoo,
            averaging=Averaging(decay=0.98, kind="fixed", warm=False, skips_first=False),
        ),
        labels="data",
        constants=Constants(
            lr=1e-4,
            damping=1e-8,
            momentum_kind="average",
            refresh_every=10,
            weight_decay=0.01,
        ),
        overall=per_factor_of_mean,
        learns_first=False,
    ),
}
