"""An algorithm looks the same in every figure, and no two lines of one figure share a colour."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.colors import to_rgb

from curvlab.algorithms import ALGORITHMS
from curvlab.runs import FIGURE_4_1
from curvlab.show import style
from curvlab.show.style import FAMILIES, look, looks


def test_every_algorithm_of_the_table_is_in_one_family_and_has_a_colour_of_its_own() -> None:
    members = [name for family in FAMILIES.values() for name in family]
    assert sorted(members) == sorted(ALGORITHMS)
    assert len({look(name).colour for name in members}) == len(members)
    assert len({(look(name).dashes, look(name).marker) for name in members}) == len(members), (
        "in print"
    )
    assert [look(family[0]).colour for family in FAMILIES.values()] == list(FAMILIES)


def test_members_of_a_family_are_told_apart_by_lightness() -> None:
    """By 3 of CIE L* and more, which shows side by side; none is lost on white."""
    for hue, family in FAMILIES.items():
        seen = sorted(style._lightness(to_rgb(look(name).colour)) for name in family)
        assert all(b - a > 3 for a, b in itertools.pairwise(seen)), hue
        assert seen[-1] < 80


@given(st.lists(st.sampled_from([*ALGORITHMS, "mine", "my-own"]), min_size=1, max_size=40))
def test_no_two_lines_of_a_figure_share_a_colour(names: list[str]) -> None:
    found = looks({f"{i} {name}": name for i, name in enumerate(names)})
    assert len({each.colour for each in found.values()}) == len(names)
    for i, name in enumerate(names):
        if name not in names[:i]:
            assert found[f"{i} {name}"] == look(name), "its own look, whatever else is drawn"


def brightness(colour: str) -> float:
    return float(np.dot(to_rgb(colour), (0.2126, 0.7152, 0.0722)))


def as_seen(colour: str, missing: str) -> np.ndarray:
    """Linear simulation of dichromats (Viénot, Brettel, Mollon 1999)."""
    seen = {
        "red": [[0.11238, 0.88762, 0.0], [0.11238, 0.88762, 0.0], [0.00401, -0.00401, 1.0]],
        "green": [[0.29275, 0.70725, 0.0], [0.29275, 0.70725, 0.0], [-0.02234, 0.02234, 1.0]],
    }
    return np.array(seen[missing]) @ (np.array(to_rgb(colour)) ** 2.2)


@pytest.mark.parametrize("missing", ["red", "green"])
def test_the_methods_of_figure_4_1_are_told_apart_by_colour_blind_readers(missing: str) -> None:
    """And in print by their dashes or by their brightness."""
    names = (*FIGURE_4_1, "block-fisher")
    assert len({look(name).dashes for name in FIGURE_4_1}) == len(FIGURE_4_1)
    for one, other in itertools.combinations(names, 2):
        apart = as_seen(look(one).colour, missing) - as_seen(look(other).colour, missing)
        assert np.linalg.norm(apart) > 0.08, (one, other)
