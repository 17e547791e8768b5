"""ALGORITHMS: one entry per name, each an approximation of curvature and a full optimizer.

Those of the documents, then those of `curvlab.algorithm_recent`. What is made of them is in
`curvlab.algorithms`.
"""

from __future__ import annotations

from functools import partial
from typing import cast

from curvlab.algorithm_entry import Algorithm, ByBlock, Constants, WholeVector
from curvlab.algorithm_readings import skqn
from curvlab.algorithm_recent import RECENT
from curvlab.curvature.averaging import Averaging
from curvlab.curvature.base import CurvatureBlock
from curvlab.curvature.block_products import BlockProducts
from curvlab.curvature.diagonal import SecondMoment
from curvlab.curvature.fisher import DenseFisher
from curvlab.curvature.hessian import DenseHessian, hessians
from curvlab.curvature.hessian_free import HessianFree
from curvlab.curvature.identity import IdentityBlock
from curvlab.curvature.kbfgs import ARTICLE_2021, CHAPTER_2, CHAPTER_3, CONVERGENT, KBfgs
from curvlab.curvature.kfac import Kfac
from curvlab.curvature.levenberg_marquardt import LevenbergMarquardt
from curvlab.curvature.overall_damping import fixed, per_factor, per_factor_of_mean
from curvlab.curvature.shampoo import shampoo
from curvlab.curvature.skqn import SkqnB, SkqnL
from curvlab.curvature.smw import Smw, SmwFisher
from curvlab.curvature.structured import Structured
from curvlab.curvature.tnt import tnt, tnt_per_sample
from curvlab.layers import Block


def _kfac(block: Block, *, split: str = "pi", sharing: str = "expand") -> Kfac:
    return Kfac(split, sharing)


def _smw_fisher(block: Block, *, curvature_size: int | None = None) -> SmwFisher:
    """Make a block of `smw-ng-bd`, or of `smw-ng-bd-ef`, the thesis's SMW-NG-BD.

    `smw-ng-bd` has drawn labels and all N₁ examples: it is the Fisher matrix of `block-fisher`, of
    the same pass in a comparison, without an average and by a system of the order of the examples,
    and such an inverse is what it is a reference for. Its N₁ × N₁ system costs little beside the
    pass. The thesis's matrix is that of SMW-NG, (5.3), by block: the data's labels, and of N₂ = 30
    examples (5.8).
    """
    return SmwFisher(curvature_size)


def _dense_hessian(block: Block) -> CurvatureBlock:
    return cast(CurvatureBlock, DenseHessian())  # whose statistics are those of its `look`


_OVER_DAMPING = partial(IdentityBlock, over_damping=True)
"""Thesis 3.4.3: parameters of batch normalisation follow the momentum gradient at the rate α/λ."""

_EVERY = Averaging(skips_first=False)
"""Every minibatch is folded in, the first after a warm start too: Alg. 7, 12; 2021 Alg. 5."""

ALGORITHMS: dict[str, Algorithm] = {
    "block-fisher": Algorithm(
        summary="dense Fisher matrix of each layer, sampled labels, Cholesky",
        source="thesis 4.3.4; practice",
        builds=ByBlock(DenseFisher),
        labels="model",
        constants=Constants(lr=0.03, damping=1e-3, momentum_kind="average"),
    ),
    "block-ef": Algorithm(
        summary="dense empirical Fisher matrix of each layer, Cholesky",
        source="thesis 4.3.4 with (5.3)",
        builds=ByBlock(DenseFisher),
        labels="data",
        empirical=True,
        constants=Constants(lr=0.03, damping=1e-3, momentum_kind="average"),
    ),
    "block-ggn": Algorithm(
        summary="dense Gauss-Newton matrix of each layer, Cholesky; large ones by their products",
        source="thesis 1.2.2, by layer as 4.3.4",
        builds=ByBlock(DenseFisher, large=BlockProducts),
        labels="exact",
        constants=Constants(lr=0.03, damping=1e-3, momentum_kind="average"),
    ),
    "block-hessian": Algorithm(
        summary="dense Hessian matrix of each layer, shifted to be positive semi-definite",
        source="thesis (1.4), by layer as 4.3.4",
        builds=ByBlock(_dense_hessian, look=hessians),
        labels="data",
        constants=Constants(lr=0.03, damping=1e-3, momentum_kind="average"),
    ),
    "kfac": Algorithm(
        summary="Kronecker factors of inputs and derivatives, π damping",
        source="thesis Alg. 12, 4.7.2",
        builds=ByBlock(_kfac, averaging=_EVERY),
        labels="model",
        constants=Constants(lr=0.03, damping=1.0, refresh_every=20),
    ),
    "kfac-20": Algorithm(
        summary="KFAC with π = 1",
        source="thesis Alg. 7, Table 2.5; 2021 Alg. 5",
        builds=ByBlock(_kfac, options={"split": "even"}, averaging=_EVERY),
        labels="model",
        constants=Constants(lr=1.0, damping=3.0, momentum_kind="average", refresh_every=20),
    ),
    "kfac-ef": Algorithm(
        summary="KFAC from the data's labels",
        source="thesis 4.7.3",
        builds=ByBlock(_kfac, averaging=_EVERY),
        labels="data",
        empirical=True,
        constants=Constants(lr=1.0, damping=100.0, refresh_every=20),
    ),
    "kfac-reduce": Algorithm(
        summary="KFAC from the mean input and summed derivative of an example's places",
        source="Eschenhagen et al. 2023; lr, damping of thesis Alg. 12",
        builds=ByBlock(_kfac, options={"sharing": "reduce"}, averaging=_EVERY),
        labels="model",
        constants=Constants(lr=0.03, damping=1.0, refresh_every=20),
    ),
    "kflr": Algorithm(
        summary="KFAC from the exact output Hessian",
        source="Botev et al. 2017; lr, damping of thesis Alg. 12",
        builds=ByBlock(_kfac, averaging=_EVERY),
        labels="exact",
        constants=Constants(lr=0.03, damping=1.0, refresh_every=20),
    ),
    "k-bfgs-20": Algorithm(
        summary="H_g and H_a by BFGS, double damping, A a moving average",
        source="thesis Alg. 4, Table 2.5",
        builds=ByBlock(KBfgs, options=CHAPTER_2, averaging=Averaging(skips_first=False)),
        labels="data",
        constants=Constants(lr=0.3, damping=0.3, momentum_kind="average"),
        learns_first=False,
    ),
    "k-bfgs-l-20": Algorithm(
        summary="the same with H_g by L-BFGS, 100 pairs",
        source="thesis Alg. 4, Table 2.5",
        builds=ByBlock(
            KBfgs,
            options={**CHAPTER_2, "pairs": 100},
            averaging=Averaging(skips_first=False),
        ),
        labels="data",
        constants=Constants(lr=0.3, damping=0.3, momentum_kind="average"),
        learns_first=False,
    ),
    "k-bfgs-20-convergent": Algorithm(
        summary="k-bfgs-l-20 with DD-skip, A inverted, no momentum",
        source="thesis Alg. 5; lr, damping of Table 2.5",
        builds=ByBlock(
            KBfgs,
            options={**CHAPTER_2, **CONVERGENT, "skip": True},
            averaging=Averaging(skips_first=False),
        ),
        labels="data",
        constants=Constants(lr=0.3, damping=0.3, momentum=0.0),
        learns_first=False,
    ),
    "kf-bfgs-cnn": Algorithm(
        summary="K-BFGS of 2021: D_P D_LM, A of the minibatch, never formed; √λ each, H_g from I",
        source="2021 Alg. 2, Table 3",
        builds=ByBlock(KBfgs, options=ARTICLE_2021, averaging=Averaging(skips_first=False)),
        labels="data",
        constants=Constants(lr=30.0, damping=30.0, momentum_kind="average"),
        learns_first=False,
    ),
    "kf-bfgs-l-cnn": Algorithm(
        summary="the same with H_g by L-BFGS, 100 pairs",
        source="2021 Alg. 2, Table 3",
        builds=ByBlock(
            KBfgs,
            options={**ARTICLE_2021, "pairs": 100},
            averaging=Averaging(skips_first=False),
        ),
        labels="data",
        constants=Constants(lr=30.0, damping=30.0, momentum_kind="average"),
        learns_first=False,
    ),
    "kf-bfgs-cnn-convergent": Algorithm(
        summary="kf-bfgs-l-cnn with D_P(I) D_LM, A inverted, no momentum",
        source="2021 Alg. 3, 4; damping of Table 3, lr ours",
        builds=ByBlock(
            KBfgs,
            options={**ARTICLE_2021, **CONVERGENT, "pair_damping": "pi-lm-2021"},
            averaging=Averaging(skips_first=False),
        ),
        labels="data",
        constants=Constants(lr=3.0, damping=30.0, momentum=0.0),
        learns_first=False,
    ),
    "k-bfgs": Algorithm(
        summary="H_g and H_a by BFGS, D_P D_LM, A of the minibatch, never formed",
        source="thesis Alg. 9, Table 3.5",
        builds=ByBlock(
            KBfgs,
            options=CHAPTER_3,
            averaging=Averaging(skips_first=False),
            fallback=_OVER_DAMPING,
        ),
        labels="data",
        constants=Constants(lr=0.03, damping=0.3),
        learns_first=False,
    ),
    "k-bfgs-l": Algorithm(
        summary="the same with H_g by L-BFGS, 100 pairs",
        source="thesis Alg. 9, Table 3.5",
        builds=ByBlock(
            KBfgs,
            options={**CHAPTER_3, "pairs": 100},
            averaging=Averaging(skips_first=False),
            fallback=_OVER_DAMPING,
        ),
        labels="data",
        constants=Constants(lr=0.03, damping=0.3),
        learns_first=False,
    ),
    "k-bfgs-convergent": Algorithm(
        summary="k-bfgs-l with D_P(I) D_LM, A inverted, no momentum",
        source="thesis Alg. 10, 11; lr of Table 3.5 over 1 − β",
        builds=ByBlock(
            KBfgs,
            options={**CHAPTER_3, **CONVERGENT, "pair_damping": "pi-lm"},
            averaging=Averaging(skips_first=False),
            fallback=_OVER_DAMPING,
        ),
        labels="data",
        constants=Constants(lr=0.3, damping=0.3, momentum=0.0),
        learns_first=False,
    ),
    "tnt": Algorithm(
        summary="tensor-normal factors of the batch-mean gradient, sampled labels",
        source="thesis Alg. 15",
        builds=ByBlock(tnt),
        labels="model",
        constants=Constants(lr=1e-4, damping=0.1, refresh_every=20),
        overall=per_factor_of_mean,
    ),
    "tnt-ef": Algorithm(
        summary="TNT from the data's labels",
        source="thesis 4.7.3",
        builds=ByBlock(tnt),
        labels="data",
        constants=Constants(lr=3e-6, damping=0.01, refresh_every=20),
        overall=per_factor_of_mean,
    ),
    "tnt-per-sample": Algorithm(
        summary="tensor-normal factors of the per-sample gradients",
        source="thesis (4.2), (4.10); practice",
        builds=ByBlock(tnt_per_sample),
        labels="model",
        constants=Constants(lr=0.03, damping=0.1, refresh_every=20),
        overall=per_factor,
    ),
    "tnt-ideal": Algorithm(
        summary="TNT from true expectations: all labels, all data that the warm start has shown",
        source="thesis Alg. 14",
        builds=ByBlock(tnt_per_sample, averaging=Averaging(kind="data", skips_first=False)),
        labels="exact",
        constants=Constants(lr=0.03, damping=0.1, momentum=0.0),
        overall=per_factor,
    ),
    "shampoo": Algorithm(
        summary="−1/2k-th powers of contracted gradients: coupled Newton, on a CPU eigenvalues",
        source="thesis Alg. 16",
        builds=ByBlock(shampoo),
        labels="data",
        constants=Constants(lr=3e-4, damping=3e-4, refresh_every=20),
        overall=fixed(3e-4),
    ),
    "adam": Algorithm(
        summary="root of the diagonal second moment",
        source="thesis 4.7.2; Kingma and Ba 2015",
        builds=ByBlock(
            lambda b: SecondMoment(),
            averaging=Averaging(decay=0.999, kind="corrected", warm=False),
        ),
        labels="data",
        constants=Constants(lr=1e-4, damping=1e-4, momentum_kind="corrected"),
        overall=per_factor_of_mean,
    ),
    "rmsprop": Algorithm(
        summary="the same without bias correction, from a warm start",
        source="thesis 2.8.2, Table 2.5; Hinton et al. 2012",
        builds=ByBlock(lambda b: SecondMoment(), averaging=Averaging(skips_first=False)),
        labels="data",
        constants=Constants(lr=1e-4, damping=1e-4, momentum_kind="average"),
        overall=per_factor_of_mean,
    ),
    "sgd-m": Algorithm(
        summary="the momentum gradient itself",
        source="thesis 4.7.2",
        builds=ByBlock(lambda b: IdentityBlock(), averaging=Averaging(warm=False)),
        labels="data",
        constants=Constants(lr=0.003, damping=0.0),
        overall=fixed(0.0),
    ),
    "smw-ng-bd": Algorithm(
        summary="block natural gradient of one minibatch, N×N Woodbury system",
        source="thesis 5.3, Alg. 23 by block, 5.8",
        builds=ByBlock(
            _smw_fisher,
            averaging=Averaging(kind="last", warm=False),
            damping_rule=LevenbergMarquardt(),
        ),
        labels="model",
        constants=Constants(lr=0.1, damping=1.001, momentum=0.0, momentum_kind="average"),
    ),
    "smw-ng-bd-ef": Algorithm(
        summary="the same of the data's labels and N₂ examples: the matrix of smw-ng, by block",
        source="thesis (5.3), Alg. 23 by block, 5.8",
        builds=ByBlock(
            _smw_fisher,
            options={"curvature_size": 30},
            averaging=Averaging(kind="last", warm=False),
            damping_rule=LevenbergMarquardt(),
        ),
        labels="data",
        empirical=True,
        constants=Constants(lr=0.1, damping=1.001, momentum=0.0, momentum_kind="average"),
    ),
    "smw-ng": Algorithm(
        summary="natural gradient of the whole vector from N₂ examples, Woodbury",
        source="thesis Alg. 23, (5.3), (5.6), 5.8",
        builds=WholeVector(Smw, options={"curvature_size": 30}),
        labels="data",
        empirical=True,
        constants=Constants(lr=0.1, damping=1.001, momentum=0.0, momentum_kind="average"),
    ),
    "smw-gn": Algorithm(
        summary="Gauss-Newton of the whole vector from N₂ examples, Woodbury",
        source="thesis Alg. 23, (5.2), (5.6), (5.7), 5.8",
        builds=WholeVector(Smw, options={"curvature_size": 30}),
        labels="exact",
        constants=Constants(lr=0.1, damping=1.001, momentum=0.0, momentum_kind="average"),
    ),
    "hf": Algorithm(
        summary="Hessian-free: conjugate gradients on Gauss-Newton products",
        source="Martens 2010; thesis 5.7, 5.8",
        builds=WholeVector(HessianFree, options={"curvature_size": 30}),
        labels="exact",
        constants=Constants(lr=0.1, damping=1.001, momentum=0.0, momentum_kind="average"),
    ),
    "skqn-l": skqn("KFAC refined by L-BFGS of each block", "(12), (13)", SkqnL, {}),
    "skqn-b1": skqn(
        "KFAC, its factor G refined by sketched block BFGS of steps",
        "(19), (22)",
        SkqnB,
        {"condition": "parameters"},
    ),
    "skqn-b2": skqn(
        "KFAC, its factor G refined by sketched block BFGS of changes of pre-activations",
        "(20), (22)",
        SkqnB,
        {"condition": "preactivations"},
    ),
    "lbfgs": Algorithm(
        summary="L-BFGS of the whole vector, 10 pairs",
        source="S2QN (12); Nocedal and Wright, Alg. 7.4",
        builds=WholeVector(Structured, options={"base": "none", "pairs": 10}),
        labels="data",
        constants=Constants(lr=0.1, damping=0.0, momentum=0.0),
    ),
    "ssn": Algorithm(
        summary="subsampled Newton, damped, conjugate gradients",
        source="S2QN 6; Roosta and Mahoney 2019",
        builds=WholeVector(Structured, options={"base": "hessian", "pairs": 0}),
        labels="data",
        constants=Constants(lr=1.0, damping=1e-3, momentum=0.0),
    ),
    "s4qn": Algorithm(
        summary="subsampled Hessian, refined by L-BFGS of what it misses",
        source="S2QN Alg. 1",
        builds=WholeVector(Structured, options={"base": "hessian", "pairs": 1}),
        labels="data",
        constants=Constants(lr=1.0, damping=1e-3, momentum=0.0),
    ),
    "full-ggn": Algorithm(
        summary=(
            "exact Gauss-Newton matrix of the whole vector, conjugate gradients to 1e-6: a"
            " reference"
        ),
        source="thesis 1.2.2; curvlab",
        builds=WholeVector(
            Structured,
            options={"base": "fisher", "pairs": 0, "tolerance": 1e-6, "iterations": 1000},
        ),
        labels="exact",
        constants=Constants(lr=0.03, damping=1e-3, momentum_kind="average"),
    ),
    **RECENT,
}
