"""ALGORITHMS: one line per name. Every entry is an approximation (`approximation`) and a full optimizer (`optimizer`)."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import Any, get_type_hints

from curvlab.closure import PASSES, Pass
from curvlab.curvature.base import Curvature, CurvatureBlock, IdentityBlock, check_damping
from curvlab.curvature.block_diagonal import Average, BlockDiagonal, Look
from curvlab.curvature.diagonal import SecondMoment
from curvlab.curvature.fisher import DenseFisher
from curvlab.curvature.gradient_norm import GradientNorm
from curvlab.curvature.hessian import DenseHessian, hessians
from curvlab.curvature.hessian_free import HessianFree
from curvlab.curvature.kbfgs import ARTICLE_2021, CHAPTER_2, CHAPTER_3, CONVERGENT, KBfgs
from curvlab.curvature.kfac import Kfac
from curvlab.curvature.levenberg_marquardt import LevenbergMarquardt
from curvlab.curvature.overall_damping import Rule, fixed, per_factor, per_factor_of_mean, same
from curvlab.curvature.shampoo import shampoo
from curvlab.curvature.skqn import SkqnB, SkqnL
from curvlab.curvature.smw import Smw, SmwFisher
from curvlab.curvature.structured import Structured
from curvlab.curvature.tnt import tnt, tnt_per_sample
from curvlab.errors import CurvlabError, fitting, lookup, real, unknown, whole
from curvlab.groups import check_momentum
from curvlab.layers import Block
from curvlab.objective import Objective
from curvlab.optim import Descent, MomentumKind, Optimizer


@dataclass(frozen=True)
class Algorithm:
    """One method: its block, its labels and its document's constants.

    `make` gives the CurvatureBlock of a block, or, of a method of the `whole` vector, the Curvature of an objective; its
    keyword-only arguments are the method's own options, `own` the table's values for them. `look` and `fallback` are those of
    `BlockDiagonal`. `lr` and `damping` are the document's for the MNIST autoencoder (thesis Table 4.3, 4.5) unless `source`
    says otherwise. `levenberg` is the rule by which λ of a block method moves (a `whole` method brings its own).
    """

    summary: str
    source: str
    make: Callable[..., Any]
    labels: Pass
    lr: float
    damping: float
    rule: Rule = same
    momentum: float = 0.9
    momentum_kind: MomentumKind = "add"
    decay: float = 0.9
    average: Average = "moving"
    warm: bool = True
    learns_first: bool = True
    skips_first: bool = True
    refresh_every: int = 1
    own: Mapping[str, Any] = field(default_factory=dict)
    whole: bool = False
    look: Look | None = None
    fallback: Callable[[], CurvatureBlock] = IdentityBlock
    levenberg: LevenbergMarquardt | None = None
    damping_rule: GradientNorm | None = None

    @property
    def options(self) -> list[str]:
        """Names of `make`'s own arguments, which a user may change, and of `damping_rule`'s; `adapt`: whether λ follows ρ."""
        named = inspect.signature(self.make).parameters.values()
        own = [p.name for p in named if p.kind is p.KEYWORD_ONLY and p.name not in SHARED]
        return own + self._of_rule + ([] if self.levenberg is None else ["adapt"])

    @property
    def defaults(self) -> dict[str, Any]:
        """{option: its value where a user gives none}."""
        known = {p.name: p.default for p in inspect.signature(self.make).parameters.values()}
        known |= dict(self.own) | ({"adapt": True} if self.levenberg else {})
        known |= {name: getattr(self.damping_rule, name) for name in self._of_rule}
        return {option: known[option] for option in self.options}

    def checked(self, own: Mapping[str, Any], name: str) -> dict[str, Any]:
        """A user's options. Raises CurvlabError for one that is not known, or not what its annotation says."""
        for option in own:
            if option not in self.options:
                raise unknown(f"option of {name}", option, self.options or ["none"])
        hints = get_type_hints(self.make.__init__ if inspect.isclass(self.make) else self.make) if own else {}
        hints |= {"adapt": bool} if self.levenberg else {}
        hints |= {} if self.damping_rule is None else get_type_hints(type(self.damping_rule))
        return {option: fitting(f"{option} of {name}", value, hints.get(option, Any)) for option, value in own.items()}

    @property
    def _of_rule(self) -> list[str]:
        return [] if self.damping_rule is None else [f.name for f in fields(self.damping_rule)]

    def rule_with(self, own: dict[str, Any]) -> GradientNorm | None:
        """`damping_rule` with a user's values, which are taken out of `own`."""
        given = {name: own.pop(name) for name in self._of_rule if name in own}
        return None if self.damping_rule is None else replace(self.damping_rule, **given)

    @property
    def fixed(self) -> dict[str, Any]:
        """Options that hold λ where it is, for a comparison at one overall λ."""
        return {"adapt": False} if "adapt" in self.options else {}

    def block(self, block: Block, **own: Any) -> CurvatureBlock:
        """The block with the table's arguments, or a user's in their place."""
        made: CurvatureBlock = self.make(block, **{**self.own, **own})
        return made


SHARED = ("labels", "damping", "decay", "update_every", "refresh_every", "name")
"""Arguments of every approximation, which `make` of a `whole` algorithm takes by name."""


def _kfac(block: Block, *, split: str = "pi") -> Kfac:
    return Kfac(split)


def _smw_fisher(block: Block, *, curvature_size: int | None = None) -> SmwFisher:
    return SmwFisher(curvature_size)


_OVER_DAMPING = partial(IdentityBlock, over_damping=True)
"""Thesis 3.4.3: parameters of batch normalisation follow the momentum gradient at the rate α/λ."""

ALGORITHMS: dict[str, Algorithm] = {
    "block-fisher": Algorithm(
        "dense Fisher matrix of each layer, sampled labels, Cholesky", "thesis 4.3.4; practice",
        lambda b: DenseFisher(b), "model", 0.03, 1e-3, same, momentum_kind="average",
    ),
    "block-ef": Algorithm(
        "dense empirical Fisher matrix of each layer, Cholesky", "thesis 4.3.4 with (5.3)",
        lambda b: DenseFisher(b), "data", 0.03, 1e-3, same, momentum_kind="average",
    ),
    "block-ggn": Algorithm(
        "dense Gauss-Newton matrix of each layer, Cholesky", "thesis 1.2.2, by layer as 4.3.4",
        lambda b: DenseFisher(b), "exact", 0.03, 1e-3, same, momentum_kind="average",
    ),
    "block-hessian": Algorithm(
        "dense Hessian matrix of each layer, shifted to be positive semi-definite", "thesis (1.4), by layer as 4.3.4",
        lambda b: DenseHessian(), "data", 0.03, 1e-3, same, momentum_kind="average", look=hessians,
    ),
    "kfac": Algorithm(
        "Kronecker factors of inputs and derivatives, π damping", "thesis Alg. 12, 4.7.2",
        _kfac, "model", 0.03, 1.0, same, refresh_every=20,
    ),
    "kfac-20": Algorithm(
        "KFAC with π = 1", "thesis Alg. 7, Table 2.5; 2021 Alg. 5",
        _kfac, "model", 1.0, 3.0, same, momentum_kind="average", own={"split": "even"}, refresh_every=20,
    ),
    "kfac-ef": Algorithm(
        "KFAC from the data's labels", "thesis 4.7.3",
        _kfac, "data", 1.0, 100.0, same, refresh_every=20,
    ),
    "kflr": Algorithm(
        "KFAC from the exact output Hessian", "Botev et al. 2017; lr, damping of thesis Alg. 12",
        _kfac, "exact", 0.03, 1.0, same, refresh_every=20,
    ),
    "k-bfgs-20": Algorithm(
        "H_g and H_a by BFGS, double damping, A a moving average", "thesis Alg. 4, Table 2.5",
        KBfgs, "data", 0.3, 0.3, same,
        momentum_kind="average", learns_first=False, skips_first=False, own=CHAPTER_2,
    ),
    "k-bfgs-l-20": Algorithm(
        "the same with H_g by L-BFGS, 100 pairs", "thesis Alg. 4, Table 2.5",
        KBfgs, "data", 0.3, 0.3, same,
        momentum_kind="average", learns_first=False, skips_first=False, own={**CHAPTER_2, "pairs": 100},
    ),
    "k-bfgs-20-convergent": Algorithm(
        "k-bfgs-l-20 with DD-skip, A inverted, no momentum", "thesis Alg. 5; lr, damping of Table 2.5",
        KBfgs, "data", 0.3, 0.3, same,
        momentum=0.0, learns_first=False, skips_first=False, own={**CHAPTER_2, **CONVERGENT, "skip": True},
    ),
    "kf-bfgs-cnn": Algorithm(
        "K-BFGS of 2021: D_P D_LM, A of the minibatch, never formed; √λ each, H_g from I", "2021 Alg. 2, Table 3",
        KBfgs, "data", 30.0, 30.0, same,
        momentum_kind="average", learns_first=False, skips_first=False, own=ARTICLE_2021,
    ),
    "kf-bfgs-l-cnn": Algorithm(
        "the same with H_g by L-BFGS, 100 pairs", "2021 Alg. 2, Table 3",
        KBfgs, "data", 30.0, 30.0, same,
        momentum_kind="average", learns_first=False, skips_first=False, own={**ARTICLE_2021, "pairs": 100},
    ),
    "kf-bfgs-cnn-convergent": Algorithm(
        "kf-bfgs-l-cnn with D_P(I) D_LM, A inverted, no momentum", "2021 Alg. 3, 4; damping of Table 3, lr ours",
        KBfgs, "data", 3.0, 30.0, same,
        momentum=0.0, learns_first=False, skips_first=False,
        own={**ARTICLE_2021, **CONVERGENT, "pair_damping": "pi-lm-2021"},
    ),
    "k-bfgs": Algorithm(
        "H_g and H_a by BFGS, D_P D_LM, A of the minibatch, never formed", "thesis Alg. 9, Table 3.5",
        KBfgs, "data", 0.03, 0.3, same, learns_first=False, skips_first=False, own=CHAPTER_3, fallback=_OVER_DAMPING,
    ),
    "k-bfgs-l": Algorithm(
        "the same with H_g by L-BFGS, 100 pairs", "thesis Alg. 9, Table 3.5",
        KBfgs, "data", 0.03, 0.3, same,
        learns_first=False, skips_first=False, own={**CHAPTER_3, "pairs": 100}, fallback=_OVER_DAMPING,
    ),
    "k-bfgs-convergent": Algorithm(
        "k-bfgs-l with D_P(I) D_LM, A inverted, no momentum", "thesis Alg. 10, 11; lr of Table 3.5 over 1 − β",
        KBfgs, "data", 0.3, 0.3, same,
        momentum=0.0, learns_first=False, skips_first=False,
        own={**CHAPTER_3, **CONVERGENT, "pair_damping": "pi-lm"}, fallback=_OVER_DAMPING,
    ),
    "tnt": Algorithm(
        "tensor-normal factors of the batch-mean gradient, sampled labels", "thesis Alg. 15",
        tnt, "model", 1e-4, 0.1, per_factor_of_mean, refresh_every=20,
    ),
    "tnt-ef": Algorithm(
        "TNT from the data's labels", "thesis 4.7.3",
        tnt, "data", 3e-6, 0.01, per_factor_of_mean, refresh_every=20,
    ),
    "tnt-per-sample": Algorithm(
        "tensor-normal factors of the per-sample gradients", "thesis (4.2), (4.10); practice",
        tnt_per_sample, "model", 0.03, 0.1, per_factor, refresh_every=20,
    ),
    "tnt-ideal": Algorithm(
        "TNT from true expectations: all labels, all data that the warm start has shown", "thesis Alg. 14",
        tnt_per_sample, "exact", 0.03, 0.1, per_factor, momentum=0.0, average="data", skips_first=False,
    ),
    "shampoo": Algorithm(
        "−1/2k-th powers of contracted gradients: coupled Newton, on a CPU eigenvalues", "thesis Alg. 16",
        shampoo, "data", 3e-4, 3e-4, fixed(3e-4), refresh_every=20,
    ),
    "adam": Algorithm(
        "root of the diagonal second moment", "thesis 4.7.2; Kingma and Ba 2015",
        lambda b: SecondMoment(), "data", 1e-4, 1e-4, per_factor_of_mean,
        momentum_kind="corrected", decay=0.999, average="corrected", warm=False,
    ),
    "rmsprop": Algorithm(
        "the same without bias correction, from a warm start", "thesis 2.8.2, Table 2.5; Hinton et al. 2012",
        lambda b: SecondMoment(), "data", 1e-4, 1e-4, per_factor_of_mean, momentum_kind="average", skips_first=False,
    ),
    "sgd-m": Algorithm(
        "the momentum gradient itself", "thesis 4.7.2",
        lambda b: IdentityBlock(), "data", 0.003, 0.0, fixed(0.0), warm=False,
    ),
    "smw-ng-bd": Algorithm(
        "block natural gradient of one minibatch, N×N Woodbury system", "thesis 5.3, Alg. 23 by block, 5.8",
        _smw_fisher, "model", 0.1, 1.001, same,
        momentum=0.0, momentum_kind="average", average="last", warm=False, levenberg=LevenbergMarquardt(),
    ),
    "smw-ng": Algorithm(
        "natural gradient of the whole vector from N₂ examples, Woodbury", "thesis Alg. 23, (5.3), (5.6), 5.8",
        Smw, "data", 0.1, 1.001, same,
        momentum=0.0, momentum_kind="average", warm=False, own={"curvature_size": 30}, whole=True,
    ),
    "smw-gn": Algorithm(
        "Gauss-Newton of the whole vector from N₂ examples, Woodbury", "thesis Alg. 23, (5.2), (5.6), (5.7), 5.8",
        Smw, "exact", 0.1, 1.001, same,
        momentum=0.0, momentum_kind="average", warm=False, own={"curvature_size": 30}, whole=True,
    ),
    "hf": Algorithm(
        "Hessian-free: conjugate gradients on Gauss-Newton products", "Martens 2010; thesis 5.7, 5.8",
        HessianFree, "exact", 0.1, 1.001, same,
        momentum=0.0, momentum_kind="average", warm=False, own={"curvature_size": 30}, whole=True,
    ),
    "skqn-l": Algorithm(
        "KFAC of the minibatch refined by L-BFGS of each block, λ by the gradient's norm", "S2QN Alg. 1, (12), (13); curvlab",
        SkqnL, "data", 1.0, 30.0, same, momentum=0.0, decay=0.0, warm=False, damping_rule=GradientNorm(), refresh_every=20,
    ),
    "skqn-b1": Algorithm(
        "the same, factor G refined by sketched block BFGS of steps", "S2QN Alg. 1, (19), (22); curvlab",
        SkqnB, "data", 1.0, 100.0, same, momentum=0.0, decay=0.0, warm=False, damping_rule=GradientNorm(), refresh_every=20,
        own={"condition": "parameters"},
    ),
    "skqn-b2": Algorithm(
        "the same, of changes of pre-activations", "S2QN Alg. 1, (20), (22); curvlab",
        SkqnB, "data", 1.0, 100.0, same, momentum=0.0, decay=0.0, warm=False, damping_rule=GradientNorm(), refresh_every=20,
        own={"condition": "preactivations"},
    ),
    "lbfgs": Algorithm(
        "L-BFGS of the whole vector, 10 pairs", "S2QN (12); Nocedal and Wright, Alg. 7.4",
        Structured, "data", 0.1, 0.0, same, momentum=0.0, warm=False, own={"base": "none", "pairs": 10}, whole=True,
    ),
    "ssn": Algorithm(
        "subsampled Newton, damped, conjugate gradients", "S2QN 6; Roosta and Mahoney 2019",
        Structured, "data", 1.0, 1e-3, same, momentum=0.0, warm=False, own={"base": "hessian", "pairs": 0}, whole=True,
    ),
    "s4qn": Algorithm(
        "subsampled Hessian, refined by L-BFGS of what it misses", "S2QN Alg. 1",
        Structured, "data", 1.0, 1e-3, same, momentum=0.0, warm=False, own={"base": "hessian", "pairs": 1}, whole=True,
    ),
    "full-ggn": Algorithm(
        "exact Gauss-Newton matrix of the whole vector, conjugate gradients to 1e-6: a reference", "thesis 1.2.2; curvlab",
        Structured, "exact", 0.03, 1e-3, same, momentum_kind="average", warm=False, whole=True,
        own={"base": "fisher", "pairs": 0, "tolerance": 1e-6, "iterations": 1000},
    ),
}  # fmt: skip


def approximation(
    name: str,
    objective: Objective,
    *,
    damping: float | None = None,
    labels: Pass | None = None,
    decay: float | None = None,
    update_every: int = 1,
    refresh_every: int = 1,
    **own: Any,
) -> Curvature:
    """The curvature of algorithm `name`: no step, no model moved. A `BlockDiagonal`, or a `Curvature` of the whole vector.

    Args:
        name: of `ALGORITHMS`.
        objective: whose blocks.
        damping: the document's own parameter (λ of KFAC and the block methods, ε of TNT, Shampoo and Adam).
        labels: "data" (empirical), "model" (sampled) or "exact", where it is not to be the algorithm's own.
        decay: of the moving averages; the document's where None (0.9; Adam's β₂ 0.999).
        update_every: T₁. refresh_every: T₂.
        own: the method's own options (`ALGORITHMS[name].options`).

    Raises:
        CurvlabError: unknown name or option (with the known ones and the closest), an argument out of range.
    """
    a = lookup(ALGORITHMS, name, "algorithm")
    own = a.checked(own, name)
    check_rates(damping=damping, decay=decay)
    check_labels(labels)
    for what, value in (("update_every", update_every), ("refresh_every", refresh_every)):
        whole(what, value)
    if a.look is not None and labels not in (None, a.labels):
        raise CurvlabError(f"{name} has no labels to choose but '{a.labels}': leave labels out")
    shared: dict[str, Any] = {
        "labels": a.labels if labels is None else labels,
        "damping": a.damping if damping is None else damping,
        "decay": a.decay if decay is None else decay,
        "update_every": update_every,
        "refresh_every": refresh_every,
        "name": name,
    }
    if a.whole:
        made: Curvature = a.make(objective, **shared, **{**a.own, **own})
        return made
    adapt, rule = own.pop("adapt", True), a.rule_with(own)
    return BlockDiagonal(
        objective.blocks,
        partial(a.block, **own),
        average=a.average,
        warm=a.warm,
        skips_first=a.skips_first,
        look=a.look,
        fallback=a.fallback,
        levenberg=a.levenberg if adapt else None,
        damping_rule=rule,
        **shared,
    )


def check_labels(labels: Pass | None) -> None:
    """Raises CurvlabError for what are no labels. None is the document's."""
    known = [name for name in PASSES if name != "gradient"]
    if labels is not None and labels not in known:
        raise unknown("labels", labels, known)


def check_rates(
    lr: float | None = None, damping: float | None = None, momentum: float | None = None, decay: float | None = None
) -> None:
    """Raises CurvlabError where one is no number, or out of its range. None is the document's."""
    if lr is not None:
        real("the learning rate", lr)
    if damping is not None:
        check_damping(damping)
    if momentum is not None:
        check_momentum(momentum)
    if decay is not None:
        real("decay", decay, "at least 0 and below 1", lambda v: 0 <= v < 1)


def descent(
    name: str,
    objective: Objective,
    *,
    momentum: float | None = None,
    momentum_kind: MomentumKind | None = None,
    weight_decay: float = 0.0,
    double_grad: bool = False,
    **options: Any,
) -> Descent:
    """Algorithm `name` as a `Descent`: its document's momentum and T₂ where None; `options` are those of `approximation`."""
    a = lookup(ALGORITHMS, name, "algorithm")
    for every, value in (("update_every", 1), ("refresh_every", a.refresh_every)):
        options[every] = value if options.get(every) is None else options[every]
    return Descent(
        objective,
        approximation(name, objective, **options),
        momentum=a.momentum if momentum is None else momentum,
        momentum_kind=a.momentum_kind if momentum_kind is None else momentum_kind,
        weight_decay=weight_decay,
        learns_first=a.learns_first,
        double_grad=double_grad,
    )


def optimizer(name: str, objective: Objective, lr: float | None = None, **options: Any) -> Optimizer:
    """Algorithm `name` as a `torch.optim.Optimizer`.

    Args:
        name: of `ALGORITHMS`.
        objective: what it steps on.
        lr: the document's where None.
        options: momentum, momentum_kind, weight_decay, double_grad (see `Descent`), and those of `approximation`, T₂ the
            document's where None (20 of KFAC, TNT and Shampoo on autoencoders: thesis 2.8.2, 4.7.2).
    """
    a = lookup(ALGORITHMS, name, "algorithm")
    check_rates(lr)
    return Optimizer(descent(name, objective, **options), a.lr if lr is None else lr)


def damping_for(name: str, overall: float, size: int) -> float:
    """The document's damping parameter of algorithm `name` at overall damping `overall` and batches of `size` examples."""
    check_damping(overall)
    return lookup(ALGORITHMS, name, "algorithm").rule(overall, size)
