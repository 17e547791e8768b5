"""Algorithm: what one line of ALGORITHMS is.

It is what the line builds, from which labels, with its document's constants. Options are flat
names, on the command line and as keywords: the keyword-only arguments of what a line builds, and
the fields of the rules among them (`LevenbergMarquardt`, `GradientNorm`) in the place of the rule.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import partial
from types import UnionType
from typing import Any, ClassVar, Union, get_args, get_origin, get_type_hints

from curvlab.curvature.averaging import Averaging
from curvlab.curvature.base import Curvature, CurvatureBlock
from curvlab.curvature.block_diagonal import BlockDiagonal, Look
from curvlab.curvature.gradient_norm import GradientNorm
from curvlab.curvature.identity import IdentityBlock
from curvlab.curvature.large import too_large
from curvlab.curvature.levenberg_marquardt import LevenbergMarquardt
from curvlab.curvature.overall_damping import DampingRule, same
from curvlab.curvature.settings import CurvatureSettings
from curvlab.errors import fitting, lookup, unknown
from curvlab.layers import Block
from curvlab.momentum import MomentumKind
from curvlab.objective import Objective
from curvlab.observation import Pass
from curvlab.units import Unit

AdaptiveDamping = LevenbergMarquardt | GradientNorm

OWN_READING = "kfac"
"""Name of an entry's own reading where it has several."""


@dataclass(frozen=True, kw_only=True)
class Constants:
    """A document's values of what every method has.

    They are for the MNIST autoencoder (thesis Table 4.3, 4.5), unless the entry's source says
    otherwise.

    Args:
        lr: learning rate α.
        damping: in the document's own place.
        momentum: see `Descent`.
        momentum_kind: likewise.
        refresh_every: T₂.
        update_every: T₁.
        weight_decay: γ, decoupled.
    """

    lr: float
    damping: float
    momentum: float = 0.9
    momentum_kind: MomentumKind = "add"
    refresh_every: int = 1
    update_every: int = 1
    weight_decay: float = 0.0


@dataclass(frozen=True)
class ByBlock:
    """A method that is made of blocks.

    Args:
        make: block → its CurvatureBlock; its keyword-only arguments are the method's own options.
        options: the table's values of options, where they are not the defaults of `make`.
        averaging: how statistics are averaged; its decay is the document's, which a user may
            change.
        fallback: the block of parameters without what `make`'s block reads.
        look: observation → {block: what its `update` folds in}, where that is not the statistics of
            a pass.
        large: what takes its place where a dense block and its inverse would take more than 1 GB;
            None: nothing does.
        damping_rule: how λ moves; None: it stands. The fields of a `GradientNorm` are options; of a
            `LevenbergMarquardt` there is `adapt`, whether λ follows it.
    """

    make: Callable[..., CurvatureBlock]
    options: Mapping[str, Any] = field(default_factory=dict, kw_only=True)
    averaging: Averaging = field(default=Averaging(), kw_only=True)
    fallback: Callable[[], CurvatureBlock] = field(default=IdentityBlock, kw_only=True)
    look: Look | None = field(default=None, kw_only=True)
    large: Callable[[Objective, CurvatureSettings], Curvature] | None = field(
        default=None, kw_only=True
    )
    damping_rule: AdaptiveDamping | None = field(default=None, kw_only=True)

    def defaults(self) -> dict[str, Any]:
        """Return {option: its value where a user gives none}."""
        found = _defaults(self.make, self.options)
        if isinstance(self.damping_rule, GradientNorm):
            found |= _values(self.damping_rule)
        return found | ({"adapt": True} if self._adapts else {})

    def hints(self) -> dict[str, Any]:
        """Return {option: what its annotation says}."""
        found = _hints(self.make, self.options)
        if isinstance(self.damping_rule, GradientNorm):
            found |= _rule_hints(self.damping_rule, {})
        return found | ({"adapt": bool} if self._adapts else {})

    @property
    def _adapts(self) -> bool:
        return isinstance(self.damping_rule, LevenbergMarquardt)

    def block(self, block: Block, **own: Any) -> CurvatureBlock:
        """Make the curvature of a block with the table's options, or a user's in their place."""
        return self.make(block, **_arguments(self.make, {**self.options, **own}))

    def curvature(
        self,
        objective: Objective,
        settings: CurvatureSettings,
        decay: float | None,
        own: Mapping[str, Any],
    ) -> Curvature:
        """Make the curvature of all blocks.

        Args:
            objective: whose blocks.
            settings: labels, damping and cadence.
            decay: of moving averages; the document's where None.
            own: a user's options.
        """
        if self.large is not None and too_large(objective.blocks, objective.dtype.itemsize):
            return self.large(objective, settings)
        own, rule = dict(own), self.damping_rule
        adapt = own.pop("adapt", True)
        if isinstance(rule, GradientNorm):
            rule = replace(rule, **{name: own.pop(name) for name in _values(rule) if name in own})
        return BlockDiagonal(
            objective.blocks,
            partial(self.block, **own),
            settings,
            averaging=self.averaging if decay is None else replace(self.averaging, decay=decay),
            look=self.look,
            fallback=self.fallback,
            damping_rule=rule if adapt else None,
            # as of Alg. 23 of the whole vector: what follows ρ has the whole objective's model,
            # and has it at a fixed λ too, so that a comparison sees the same matrix
            shift=objective.l2_hessian if self._adapts else 0.0,
            ranks=objective.ranks,
        )


@dataclass(frozen=True)
class WholeVector:
    """A method of the whole parameter vector.

    Args:
        make: (objective, settings) → its Curvature; its keyword-only arguments are the method's own
            options.
        options: the table's values of options, where they are not the defaults of `make`.
    """

    make: Callable[..., Curvature]
    options: Mapping[str, Any] = field(default_factory=dict, kw_only=True)
    averaging: ClassVar[Averaging] = Averaging()
    """As of `ByBlock`, but of no use: nothing is averaged."""

    def defaults(self) -> dict[str, Any]:
        """Return {option: its value where a user gives none}."""
        return _defaults(self.make, self.options)

    def hints(self) -> dict[str, Any]:
        """Return {option: what its annotation says}."""
        return _hints(self.make, self.options)

    def curvature(
        self,
        objective: Objective,
        settings: CurvatureSettings,
        decay: float | None,
        own: Mapping[str, Any],
    ) -> Curvature:
        """Make the curvature of the whole vector.

        Args:
            objective: whose parameters.
            settings: labels, damping and cadence.
            decay: acts on nothing.
            own: a user's options.
        """
        return self.make(objective, settings, **_arguments(self.make, {**self.options, **own}))


@dataclass(frozen=True, kw_only=True)
class Algorithm:
    """A method: its curvature, its labels and its document's constants.

    Args:
        summary: what it is, in a line.
        source: the document, its algorithm and table.
        builds: what makes its curvature, with its own options.
        labels: the pass that its statistics are of.
        constants: its document's values of what every method has.
        overall: overall damping λ and batch size → the document's own damping parameter.
        learns_first: see `Descent`.
        empirical: whether its matrix is an empirical Fisher matrix of the data's gradients, which
            has a unit (`labels_per`).
        readings: other settings of the same method, {name: entry}, which the option `reading`
            chooses; this entry's own is named "kfac".
    """

    summary: str
    source: str
    builds: ByBlock | WholeVector
    labels: Pass
    constants: Constants
    overall: DampingRule = same
    learns_first: bool = True
    empirical: bool = False
    readings: Mapping[str, Algorithm] = field(default_factory=dict)

    def read(self, reading: Any = None) -> Algorithm:
        """Return the entry of a reading; None: this one.

        Raises:
            CurvlabError: an unknown reading (with the known ones and the closest).
        """
        if reading is None or not self.readings:
            return self
        return lookup({OWN_READING: self, **self.readings}, reading, "reading")

    @property
    def lr(self) -> float:
        """The document's learning rate."""
        return self.constants.lr

    @property
    def damping(self) -> float:
        """The document's damping parameter."""
        return self.constants.damping

    @property
    def momentum(self) -> float:
        """The document's β."""
        return self.constants.momentum

    @property
    def momentum_kind(self) -> MomentumKind:
        """The document's kind of momentum."""
        return self.constants.momentum_kind

    @property
    def refresh_every(self) -> int:
        """The document's T₂."""
        return self.constants.refresh_every

    @property
    def update_every(self) -> int:
        """The document's T₁."""
        return self.constants.update_every

    @property
    def weight_decay(self) -> float:
        """The document's γ."""
        return self.constants.weight_decay

    @property
    def decay(self) -> float:
        """The document's decay of moving averages."""
        return self.builds.averaging.decay

    @property
    def whole(self) -> bool:
        """Whether it is a method of the whole vector."""
        return isinstance(self.builds, WholeVector)

    @property
    def foreign(self) -> bool:
        """Whether it is an optimizer of somebody else's, whose constants are all its own."""
        return getattr(self.builds, "kind", None) is not None

    @property
    def make(self) -> Callable[..., Any]:
        """What `builds` makes its blocks, or its curvature, with."""
        return self.builds.make

    @property
    def look(self) -> Look | None:
        """What a method by block looks at, as of `ByBlock`; None of the whole vector's."""
        return self.builds.look if isinstance(self.builds, ByBlock) else None

    @property
    def fallback(self) -> Callable[[], CurvatureBlock]:
        """The block of parameters that the method's own cannot have, as of `ByBlock`."""
        return self.builds.fallback if isinstance(self.builds, ByBlock) else IdentityBlock

    @property
    def own(self) -> Mapping[str, Any]:
        """The table's values of the method's own options.

        They are those that are not the defaults of what it builds.
        """
        return self.builds.options

    @property
    def options(self) -> list[str]:
        """Names of the method's own options, which a user may change."""
        return list(self.defaults)

    @property
    def defaults(self) -> dict[str, Any]:
        """The values of the method's own options where a user gives none, by their names."""
        chosen = {"reading": OWN_READING} if self.readings else {}
        return self.builds.defaults() | chosen

    def checked(self, own: Mapping[str, Any], name: str) -> dict[str, Any]:
        """Return a user's options, which are checked.

        Raises:
            CurvlabError: an option that is not known, or a value that is not what its annotation
                says.
        """
        known = self.options
        for option in own:
            if option not in known:
                raise unknown(f"option of {name}", option, known or ["none"])
        hints = self.read(own.get("reading")).builds.hints() if own else {}
        hints |= {"reading": str}
        return {
            option: fitting(f"{option} of {name}", value, hints.get(option, Any))
            for option, value in own.items()
        }

    def labels_per(self, unit: Unit) -> Pass:
        """Return the pass of its statistics where empirical Fisher matrices are of this unit."""
        return "token" if self.empirical and unit == "token" else self.labels

    @property
    def fixed(self) -> dict[str, Any]:
        """Options that hold λ where it is, for a comparison at one overall λ."""
        held = {"adapt": False, "r1": None, "r2": None, "shrink": 1.0}
        return {name: value for name, value in held.items() if name in self.options}

    def block(self, block: Block, **own: Any) -> CurvatureBlock:
        """Make a block of a method by block, with the table's options, or a user's instead."""
        assert isinstance(self.builds, ByBlock)
        return self.builds.block(block, **own)


def _own(make: Callable[..., Any]) -> Iterator[inspect.Parameter]:
    """Return the keyword-only parameters of what makes a method."""
    return (p for p in inspect.signature(make).parameters.values() if p.kind is p.KEYWORD_ONLY)


def _values(rule: AdaptiveDamping) -> dict[str, Any]:
    return {f.name: getattr(rule, f.name) for f in fields(rule)}


def _defaults(make: Callable[..., Any], table: Mapping[str, Any]) -> dict[str, Any]:
    """Return {option: its default, or the table's value}.

    They are in the order of the signature, a rule's fields in its place.
    """
    found: dict[str, Any] = {}
    for p in _own(make):
        found |= (
            _values(p.default) if isinstance(p.default, AdaptiveDamping) else {p.name: p.default}
        )
    return found | {name: value for name, value in table.items() if name in found}


def _hints(make: Callable[..., Any], table: Mapping[str, Any]) -> dict[str, Any]:
    """Return {option: its annotation}, of a rule's fields those of the rule."""
    found = get_type_hints(make.__init__ if inspect.isclass(make) else make)
    for p in _own(make):
        if isinstance(p.default, AdaptiveDamping):
            found |= _rule_hints(p.default, table)
    return found


def _rule_hints(rule: AdaptiveDamping, table: Mapping[str, Any]) -> dict[str, Any]:
    """Return {field: its annotation}, without None where the method's own value is none."""
    hints, values = get_type_hints(type(rule)), {**_values(rule), **table}
    return {name: hint if values[name] is None else _not_none(hint) for name, hint in hints.items()}


def _not_none(hint: Any) -> Any:
    if get_origin(hint) not in (Union, UnionType):
        return hint
    kinds = [kind for kind in get_args(hint) if kind is not type(None)]
    return Union[tuple(kinds)]  # of kinds that are found  # noqa: UP007


def _arguments(make: Callable[..., Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keyword arguments of `make`: options as given, but a rule's fields as the rule."""
    given = dict(options)
    for p in _own(make):
        if isinstance(p.default, AdaptiveDamping):
            changed = {name: given.pop(name) for name in _values(p.default) if name in given}
            if changed:
                given[p.name] = replace(p.default, **changed)
    return given
