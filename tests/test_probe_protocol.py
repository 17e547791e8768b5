"""What probes may ask of a method: by name and type, with defaults for a method of a user's own
that lacks a member."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from problems import problem
from torch import Tensor

import curvlab as cl
from curvlab.algorithms import ALGORITHMS
from curvlab.curvature.base import (
    BlockDefaults,
    CurvatureBlock,
    CurvatureDefaults,
    FactorBounds,
    LearntPair,
    block_with_defaults,
    with_defaults,
)
from curvlab.curvature.block_diagonal import BlockDiagonal
from curvlab.curvature.settings import CurvatureSettings
from curvlab.linalg.bfgs import accept, undamped
from curvlab.linalg.bounds import Bounds
from curvlab.linalg.operators import Diagonal, Kronecker, Operator, identity_like
from curvlab.probes import PROBES, Frame
from curvlab.statistics import LayerStatistics

FOLDER = Path(cl.__file__).parent / "probes"


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.py")), ids=lambda path: path.name)
def test_no_probe_looks_for_members_or_reads_private_ones(path: Path) -> None:
    """Neither `getattr`, `hasattr` nor `vars`, and no attribute with an underscore."""
    tree = ast.parse(path.read_text())
    called = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    assert not called & {"getattr", "hasattr", "setattr", "vars"}
    read = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert not {name for name in read if name.startswith("_")}


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_method_of_the_package_has_all_members(name: str) -> None:
    """So that none of them is completed: what it does not say is what it inherits."""
    curvature: Any = cl.approximation(name, problem().objective())
    assert cast(object, with_defaults(curvature)) is curvature
    for block in getattr(curvature, "blocks", {}).values():
        assert block_with_defaults(block) is block


class Minimal:
    """H = (diag(g²) + λ)⁻¹: the members of `CurvatureBlock` that have no default, and no other."""

    reads, memory, secant = "gradient", ("v",), None

    def __init__(self) -> None:
        self.v: Tensor | None = None

    def update(self, statistics: LayerStatistics, weight: float) -> None:
        self.v = statistics.gradient.square().flatten()

    def refresh(self, damping: float) -> None:
        assert self.v is not None
        self.inverse = Diagonal(1 / (self.v + damping))


class Further(Minimal):
    """With members that it names itself and does not inherit: a shift, a matrix, a pair, factors
    and bounds."""

    factored, learns_pairs, shift = True, True, 0.25
    seen: list[LearntPair]

    def __init__(self) -> None:
        super().__init__()
        self.seen = []

    def matrix(self, damping: float = 0.0) -> Operator:
        assert self.v is not None
        return Diagonal(self.v + damping)

    def refresh(self, damping: float) -> None:
        super().refresh(damping)
        s = torch.ones(2, dtype=torch.float64)
        pair = accept(undamped(s, 2 * s, identity_like(s)))
        self.seen = [LearntPair(which="step", pair=pair, mu2=0.5)]

    def learnt(self) -> list[LearntPair]:
        return self.seen

    def forget_learnt(self) -> None:
        self.seen = []

    def bounds(self, damping: float | None, phi: float) -> FactorBounds:
        assert damping is not None
        return FactorBounds(product=Bounds(1e-9, 1 / damping))


class Whole:
    """A curvature of a user's own, of the whole vector, with nothing but what a descent uses and an
    inverse."""

    def __init__(self, inverse: Operator) -> None:
        self.inverse = {"whole": inverse}


def shown(curvature: object) -> dict[str, np.ndarray]:
    """{variable: values} of all probes that see one step of this curvature along the gradient."""
    p = problem()
    objective = p.objective()
    observation = objective.closure(p.x, p.y).observe()
    if isinstance(curvature, BlockDiagonal):
        curvature.update(observation)
    directions = {"mine": dict(observation.gradients)}
    frame = Frame(0, observation, directions, "mine", 0.1, curvatures={"mine": curvature})
    found: dict[str, np.ndarray] = {}
    for one in PROBES.values():
        if one.prepare is not None:
            one.prepare(frame)
        if one.begin is not None:
            one.begin(None)
        if "train" in one.where:
            found |= {name: values for name, (_, values) in one.record(frame).items()}
    return found


def made_of(block: type[Minimal]) -> Any:
    """A `BlockDiagonal`, of blocks that say less than `CurvatureBlock`."""
    blocks = problem().objective().blocks
    return BlockDiagonal(
        blocks,
        lambda b: cast(CurvatureBlock, block()),
        CurvatureSettings(labels="data", damping=0.2),
    )


def test_a_block_with_nothing_but_the_protocol_is_seen_as_far_as_it_goes() -> None:
    curvature = made_of(Minimal)
    assert not any(PROBES[name].fits(curvature) for name in ("bounds", "damping", "error", "shift"))
    found = shown(curvature)
    v = torch.cat([block.v for block in curvature.blocks.values()])
    assert float(found["bytes_held"][0]) >= v.numel() * v.element_size()
    for j, block in enumerate(curvature.blocks.values()):
        ratio = float((block.v.max() + 0.2) / (block.v.min() + 0.2))
        assert float(found["condition"][0, j]) == pytest.approx(ratio, rel=1e-12)
    assert np.isnan(found["rho"][0, 0])  # it estimates no matrix
    assert np.isfinite(found["rho"][0, 1:]).all()
    for name in ("bound_low", "eigenvalue_low", "pair_skipped", "matrix_error"):
        assert np.isnan(found[name]).all()
    assert (found["shift"] == 0).all()


def test_a_block_of_a_users_own_says_what_it_has_without_inheriting() -> None:
    curvature = made_of(Further)
    assert all(PROBES[name].fits(curvature) for name in ("bounds", "damping", "error", "shift"))
    found = shown(curvature)
    assert (found["shift"] == 0.25).all()
    np.testing.assert_allclose(found["bound_high"][0, :, 2], 1 / 0.2)
    assert (found["tightness_high"][0, :, 2] >= 1).all()
    np.testing.assert_allclose(
        found["eigenvalue_high"][0, 0, 2], float(curvature.blocks["1"].inverse.diag().max())
    )
    np.testing.assert_allclose(found["pair_step"][0, :, 2], 0.5)  # sᵀs / sᵀy of y = 2 s
    np.testing.assert_allclose(found["pair_mu2"][0, :, 2], 0.5)
    assert np.isfinite(found["rho"][0, 0])
    with_defaults(curvature).forget_learnt()
    assert not with_defaults(curvature).learnt()


class Others(CurvatureDefaults):
    """A curvature of a user's own that has the blocks in another order, not all, and one more."""

    refreshed = 0.2

    def __init__(self, of: BlockDiagonal) -> None:
        first, *others = of.blocks
        self.blocks = {name: of.blocks[name] for name in reversed(others)}
        self.blocks["elsewhere"] = of.blocks[first]

    def inverses(self) -> dict[str, Operator]:
        return {name: block.inverse for name, block in self.blocks.items()}


def test_other_blocks_than_the_models_are_found_by_their_names() -> None:
    """Each variable stands at the place of its block's name; what the model lacks, nowhere."""
    whole = made_of(Further)
    expected, found = shown(whole), shown(Others(whole))
    names = [
        name
        for one in PROBES.values()
        if "train" in one.where
        for name, variable in one.variables.items()
        if variable.dims[:2] == ("algorithm", "block") and "norm" not in name
    ]
    assert {"eigenvalue_high", "pair_step", "shift", "condition", "matrix_error"} <= set(names)
    for name in names:
        np.testing.assert_array_equal(found[name][:, 1:], expected[name][:, 1:], err_msg=name)
        assert (np.isnan(found[name][:, 0]) | (found[name][:, 0] == 0)).all(), name
    assert np.isnan(found["rho"][0, 0]), "of no block too few there is a model of the loss"


def test_a_curvature_of_a_users_own_and_none_at_all() -> None:
    size = len(problem().objective().layout)
    values = torch.linspace(1, 4, size, dtype=torch.float64)
    found = shown(Whole(Diagonal(values)))
    np.testing.assert_allclose(found["condition"], 4)
    assert found["bytes_held"].tolist() == [0]
    assert np.isnan(found["rho"][0, 0])
    nothing = with_defaults(None)
    assert (nothing.name, nothing.refreshed, nothing.inverses(), nothing.by_block()) == (
        "",
        None,
        {},
        {},
    )
    assert nothing.undamped(values) is None


def test_defaults_are_one_answer_for_each_member() -> None:
    """Completed by what is missing alone, whether a member is an attribute, a method or a
    property."""
    own = Minimal()
    block = block_with_defaults(own)
    assert block.held is None
    assert block.reads == own.reads
    assert (block.factored, block.learns_pairs, block.shift, block.estimates()) == (
        False,
        False,
        None,
        False,
    )
    assert block.bounds(0.1, 1.0) == FactorBounds()
    own.inverse = Kronecker((torch.eye(2), torch.eye(3)))  # type: ignore[assignment]  # no more `Diagonal`
    assert block.held is own.inverse
    assert [len(f) for f in block.kronecker_factors()] == [2, 3]
    assert block_with_defaults(Further()).estimates()
    members = {
        name for name in vars(BlockDefaults) | vars(CurvatureDefaults) if not name.startswith("_")
    }
    assert all(hasattr(with_defaults(None), name) or hasattr(block, name) for name in members)


@pytest.mark.parametrize("name", ["kfac", "tnt", "k-bfgs", "smw-gn", "hf", "s4qn", "smw-ng-bd"])
def test_the_damping_of_the_last_refresh_is_not_that_of_now(name: str) -> None:
    """T₂ = 3 where the method has one: the damping of step 3 stands in the inverse at step 4."""
    p = problem()
    objective = p.objective()
    curvature = cl.approximation(name, objective, damping=0.5, refresh_every=3)
    assert with_defaults(curvature).refreshed is None
    for step in range(1, 5):
        curvature.damping = 0.5 + step
        observation = objective.closure(p.x, p.y).observe(curvature.needs | {"gradient"})
        curvature.update(observation)
    assert with_defaults(curvature).refreshed == (4.5 if name == "s4qn" else 3.5)
