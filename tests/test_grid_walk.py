"""Walks over a grid of learning rates and dampings, on losses that are known."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from curvlab.reproduction.grid_walk import (
    Best,
    Grid,
    GridRun,
    KeptRuns,
    counted_table,
    gap_closed,
    ratios,
    walk,
)

GRID = Grid([1e-3, 1e-2, 1e-1, 1.0], [1e-4, 1e-2, 1.0])


def decay(lr: float, damping: float, steps: int = 10) -> GridRun:
    """Halves `rate` times a step; best at lr = 0.1, λ = 0.01; diverges above."""
    rate = max(0.05, 1 - abs(math.log10(lr / 0.1)) / 3 - abs(math.log10(damping / 0.01)) / 8)
    if lr > 0.5:
        return GridRun([1.0, math.inf], [0.0, 0.1])
    return GridRun(
        [2.0 ** (-rate * i) for i in range(steps + 1)], [0.1 * i for i in range(steps + 1)]
    )


def kept(path: Path, calls: list[tuple[int, float, float]]) -> KeptRuns:
    def run(seed: int, lr: float, damping: float) -> GridRun:
        calls.append((seed, lr, damping))
        return decay(lr, damping)

    return KeptRuns(path, "halving", run, GRID, "steps=10")


def test_iterations_to_a_level_lie_between_two() -> None:
    run = GridRun([4.0, 2.0, 1.0], [0.0, 1.0, 3.0])
    assert run.reaches(4.5) == (0.0, 0.0)
    assert run.reaches(3.0) == (0.5, 0.5)
    assert run.reaches(1.5) == (1.5, 2.0)
    assert run.reaches(0.5) == (math.inf, math.inf)
    ended, sooner = GridRun([4.0, 3.0, math.inf]), GridRun([4.0, math.inf])
    assert GridRun([4.0]).cost(1.0) < ended.cost(1.0) < sooner.cost(1.0)


@pytest.mark.parametrize("start", [(0, 0), (3, 2), (2, 1), (0, 2)])
def test_a_walk_ends_where_no_neighbour_is_better(start: tuple[int, int], tmp_path: Path) -> None:
    calls: list[tuple[int, float, float]] = []
    best = walk(kept(tmp_path / "a.json", calls), start, 0.25, (0, 5))
    assert (best.lr, best.damping) == (0.1, 0.01)
    assert best.reaches(0.25) == pytest.approx((2.0, 0.2))
    assert len(calls) == best.tried + 1  # the second seed at the best alone
    again: list[tuple[int, float, float]] = []
    same = walk(kept(tmp_path / "a.json", again), start, 0.25, (0, 5))
    assert not again
    assert same == best


def test_a_walk_that_stays_and_one_by_rate_alone(tmp_path: Path) -> None:
    calls: list[tuple[int, float, float]] = []
    runs = kept(tmp_path / "a.json", calls)
    assert walk(runs, (0, 0), 0.25, (0,), moves=False).tried == 1
    best = walk(runs, (0, 0), 0.25, (0,), damped=False)
    assert (best.lr, best.damping) == (0.1, 1e-4)
    assert len(json.loads((tmp_path / "a.json").read_text())) == len(calls) == best.tried


def test_places_are_nearest_by_ratio() -> None:
    assert GRID.nearest(0.05, 5.0) == (2, 2)
    assert GRID.nearest(0.02, 2e-4) == (1, 0)
    assert GRID.beside((0, 1)) == [(1, 1), (0, 0), (0, 2), (2, 2)]
    assert GRID.beside((3, 2)) == [(2, 2), (3, 1), (1, 1)]
    assert GRID.beside((0, 1), damped=False) == [(1, 1)]


def test_a_walk_follows_a_valley_of_one_ratio(tmp_path: Path) -> None:
    """Steps that are rate / λ times the gradient, best at 1; the smaller λ the better."""
    grid = Grid([10.0**k for k in range(-4, 2)], [10.0**k for k in range(-4, 2)])

    def run(seed: int, lr: float, damping: float) -> GridRun:
        rate = 1 - 0.3 * abs(math.log10(lr / damping)) - 0.01 * math.log10(damping)
        return GridRun([2.0 ** (-rate * i) for i in range(11)], [0.1 * i for i in range(11)])

    runs = KeptRuns(tmp_path / "a.json", "a valley", run, grid, "steps=10")
    best = walk(runs, grid.nearest(10.0, 10.0), 0.25, (0,))
    assert (best.lr, best.damping) == (1e-4, 1e-4)


def test_rows_and_ratios_say_what_was_not_reached() -> None:
    fast = Best(0.1, 0.01, 3, [GridRun([4.0, 2.0, 1.0], [0.0, 1.0, 2.0])])
    slow = Best(0.1, 0.01, 3, [GridRun([4.0, 3.0, 2.0], [0.0, 1.0, 2.0])])
    assert ratios(slow, fast, (3.0, 2.0, 1.0)) == "2.00, 2.00, not reached"
    both = {"slow": slow, "fast": fast, "never": Best(1.0, 1.0, 1, [GridRun([4.0])])}
    assert gap_closed(both, "slow", "fast", 3.0) == {"slow": "0.00", "fast": "1.00", "never": ""}
    assert gap_closed(both, "slow", "fast", 1.0) == gap_closed(both, "none", "fast", 3.0) == {}
    heads, rows = counted_table({"slow": slow}, (3.0, 1.0), {"cosine": {"slow": "0.50"}})
    assert heads[4:] == ["to 3", "to 1", "last loss", "its range", "cosine"]
    assert rows == [
        ["slow", "0.1", "1e-02", "3", "1.0 / 1.0", "not reached", "2.000", "0.000", "0.50"]
    ]
