"""Probes: against numbers worked out by hand from the directions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from problems import problem
from torch import Tensor

import curvlab as cl
from curvlab.objective import PASSES, Observation
from curvlab.probes import PROBES, Frame, cosines, select


def frame(zero: bool = False) -> Frame:
    p = problem()
    generator = torch.Generator().manual_seed(0)

    def direction() -> dict[str, Tensor]:
        return {b.name: torch.randn(b.shape, generator=generator, dtype=torch.float64) for b in p.objective().blocks}

    directions = {"one": direction(), "two": direction(), "three": direction()}
    if zero:
        directions["three"] = {name: torch.zeros_like(d) for name, d in directions["three"].items()}
    observation = Observation(torch.tensor(0.25, dtype=torch.float64), 7, {}, None)
    return Frame(3, observation, directions, "two", 0.5, {"one": 1.0, "two": 2.0, "three": 3.0})


def test_cosines_are_those_of_torch() -> None:
    f = frame()
    record = PROBES["cosine"].measure(f)
    for i, d in enumerate(f.directions.values()):
        for j, block in enumerate(d):
            expected = torch.nn.functional.cosine_similarity(d[block].flatten(), f.directions["two"][block].flatten(), dim=0)
            assert record["cosine"][1][i, j] == pytest.approx(float(expected), abs=1e-14)
        whole = [torch.cat([v.flatten() for v in x.values()]) for x in (d, f.directions["two"])]
        expected = torch.nn.functional.cosine_similarity(*whole, dim=0)
        assert record["cosine_all"][1][i] == pytest.approx(float(expected), abs=1e-14)
    assert record["cosine"][1][1].tolist() == pytest.approx([1.0] * 3)


def test_any_cosine_follows_from_gram() -> None:
    f = frame()
    gram = PROBES["gram"].measure(f)["gram"][1]
    one, three = f.directions["one"]["2"].flatten(), f.directions["three"]["2"].flatten()
    assert gram[0, 2, 1] == pytest.approx(float(one @ three), abs=1e-13)
    assert cosines(gram, 2)[0, 1] == pytest.approx(float(one @ three / one.norm() / three.norm()), abs=1e-14)


def test_a_zero_direction_has_no_cosine() -> None:
    record = PROBES["cosine"].measure(frame(zero=True))
    assert np.isnan(record["cosine"][1][2]).all()
    assert np.isfinite(record["cosine"][1][:2]).all()


def test_loss_step_and_time() -> None:
    f = frame()
    assert PROBES["loss"].measure(f)["loss"][1] == 0.25
    length = torch.cat([d.flatten() for d in f.directions["two"].values()]).norm()
    assert float(PROBES["norms"].measure(f)["step_norm"][1]) == pytest.approx(0.5 * float(length), rel=1e-14)
    assert PROBES["time"].measure(f)["seconds"][1].tolist() == [1.0, 2.0, 3.0]


@pytest.mark.parametrize("name", PROBES)
def test_every_probe_gives_what_it_declares(name: str) -> None:
    entry = PROBES[name]
    record = entry.measure(frame())
    sizes = {"algorithm": 3, "other": 3, "block": 3}
    assert entry.needs <= set(PASSES)
    assert record.keys() == entry.variables.keys()
    for variable, (dims, values) in record.items():
        spec = entry.variables[variable]
        assert dims == spec.dims
        assert values.shape == tuple(sizes[d] for d in dims)
        assert spec.long_name
        assert spec.units


def test_unknown_probe() -> None:
    with pytest.raises(cl.CurvlabError, match="unknown probe 'cosin'; did you mean 'cosine'"):
        select(["cosin"])
