"""Probes: against numbers worked out by hand from the directions."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr
from problems import batches, grad_of, problem
from torch import Tensor

import curvlab as cl
from curvlab.observation import PASSES
from curvlab.probes import PROBES, Frame, asked, cosines_to, select_probes
from curvlab.runs import ALWAYS
from curvlab.training.records import TRAINING_VARIABLES as TRAINING


def frame(zero: bool = False) -> Frame:
    p = problem()
    generator = torch.Generator().manual_seed(0)

    def direction() -> dict[str, Tensor]:
        return {
            b.name: torch.randn(b.shape, generator=generator, dtype=torch.float64)
            for b in p.objective().blocks
        }

    directions = {"one": direction(), "two": direction(), "three": direction()}
    if zero:
        directions["three"] = {name: torch.zeros_like(d) for name, d in directions["three"].items()}
    observation = p.objective().closure(p.x, p.y).observe()
    return Frame(3, observation, directions, "two", 0.5, {"one": 1.0, "two": 2.0, "three": 3.0})


def test_cosines_are_those_of_torch() -> None:
    f = frame()
    record = PROBES["cosine"].record(f)
    for i, d in enumerate(f.directions.values()):
        for j, block in enumerate(d):
            expected = torch.nn.functional.cosine_similarity(
                d[block].flatten(), f.directions["two"][block].flatten(), dim=0
            )
            assert record["cosine"][1][i, j] == pytest.approx(float(expected), abs=1e-14)
        one, two = (torch.cat([v.flatten() for v in x.values()]) for x in (d, f.directions["two"]))
        expected = torch.nn.functional.cosine_similarity(one, two, dim=0)
        assert record["cosine_all"][1][i] == pytest.approx(float(expected), abs=1e-14)
    assert record["cosine"][1][1].tolist() == pytest.approx([1.0] * 3)


def test_numbers_stand_at_their_own_block_where_a_layer_has_no_rule() -> None:
    """Its parameters lie between those of the others. The shapes, and so the norms of directions of
    ones, tell all apart.
    """
    p = problem("norm")
    with torch.no_grad():
        for i, q in enumerate(p.model.parameters()):
            q.fill_(10.0**i)
    objective = p.objective()
    now = objective.closure(p.x, p.y).observe()
    scales = {b.name: 10.0**i for i, b in enumerate(objective.blocks)}
    backwards = {
        b.name: torch.full(b.shape, scales[b.name], dtype=torch.float64)
        for b in reversed(objective.blocks)
    }
    f = Frame(0, now, {"one": backwards, "two": backwards}, "one", 1.0)
    expected = [scales[b.name] ** 2 * b.numel for b in objective.blocks]
    np.testing.assert_allclose(PROBES["gram"].record(f)["gram"][1][0, 1], expected, rtol=1e-13)
    found = {name: values for name, (_, values) in PROBES["norms"].record(f).items()}
    np.testing.assert_allclose(found["direction_norm"][0] ** 2, expected, rtol=1e-13)
    torch.nn.functional.cross_entropy(p.model(p.x), p.y).backward()
    for i, b in enumerate(objective.blocks):
        of = [objective.parameters[name] for name in b.params]
        lengths = [
            torch.cat([t.flatten() for t in each]).norm()
            for each in ([grad_of(q) for q in of], [q.detach() for q in of])
        ]
        assert found["minibatch_gradient_norm"][i] == pytest.approx(
            float(lengths[0]), rel=1e-10, abs=1e-12
        )
        assert found["weight_norm"][i] == pytest.approx(float(lengths[1]), rel=1e-13)


def test_any_cosine_follows_from_gram() -> None:
    f = frame()
    gram = PROBES["gram"].record(f)["gram"][1]
    one, three = f.directions["one"]["2"].flatten(), f.directions["three"]["2"].flatten()
    assert gram[0, 2, 1] == pytest.approx(float(one @ three), abs=1e-13)
    assert cosines_to(gram, 2)[0, 1] == pytest.approx(
        float(one @ three / one.norm() / three.norm()), abs=1e-14
    )


def test_a_zero_direction_has_no_cosine() -> None:
    record = PROBES["cosine"].record(frame(zero=True))
    assert np.isnan(record["cosine"][1][2]).all()
    assert np.isfinite(record["cosine"][1][:2]).all()


def test_loss_lengths_and_time() -> None:
    f, p = frame(), problem()
    loss = torch.nn.functional.cross_entropy(p.model(p.x), p.y)
    loss.backward()
    assert float(PROBES["loss"].record(f)["loss"][1]) == pytest.approx(loss.item(), rel=1e-14)
    found = {name: values for name, (_, values) in PROBES["norms"].record(f).items()}
    flat = {
        name: torch.cat([d.flatten() for d in directions.values()])
        for name, directions in f.directions.items()
    }
    assert float(found["step_length"]) == pytest.approx(0.5 * float(flat["two"].norm()), rel=1e-14)
    np.testing.assert_allclose(
        (found["direction_norm"] ** 2).sum(1),
        [float(d.square().sum()) for d in flat.values()],
        rtol=1e-13,
    )
    layers = [m for m in p.model if hasattr(m, "weight")]
    for i, layer in enumerate(layers):
        of_weights = torch.cat([layer.weight.detach().flatten(), layer.bias.detach()]).norm()
        of_gradient = torch.cat([layer.weight.grad.flatten(), layer.bias.grad]).norm()
        assert found["weight_norm"][i] == pytest.approx(float(of_weights), rel=1e-14)
        assert found["minibatch_gradient_norm"][i] == pytest.approx(float(of_gradient), rel=1e-12)
    assert PROBES["time"].record(f)["seconds"][1].tolist() == [1.0, 2.0, 3.0]


def test_the_table_declares_all_it_should() -> None:
    for name, entry in PROBES.items():
        assert entry.needs <= set(PASSES)
        assert entry.every >= 1
        assert set(entry.where) <= {"compare", "train"}
        known = {"algorithm", "other", "block", *entry.coordinates}
        for variable in (*entry.variables.values(), *entry.epoch.values()):
            assert set(variable.dims) <= known, name
            assert variable.long_name
            assert variable.units
        assert bool(entry.epoch) == (entry.reduce is not None)
    variables = [v for p in PROBES.values() for v in (*p.variables, *p.epoch)]
    assert len(variables) == len(set(variables))
    assert not set(variables) & set(TRAINING)


def fitting(command: str) -> tuple[list[str], list[str]]:
    """Probes of a command, and algorithms among which each finds something to see."""
    return [name for name, entry in PROBES.items() if command in entry.where], [
        "kfac",
        "tnt",
        "k-bfgs",
        "skqn-l",
        "skqn-b2",
        "lbfgs",
    ]


def promised(ds: xr.Dataset, names: list[str], axis: Callable[[str], str]) -> None:
    sizes = {
        "algorithm": ds.sizes.get("algorithm", 1),
        "other": ds.sizes.get("other", 1),
        "block": 3,
    }
    for name in names:
        entry = PROBES[name]
        for variable, spec in entry.variables.items():
            assert ds[variable].dims == (axis(name), *spec.dims), variable
            own = {dim: len(labels) for dim, labels in entry.coordinates.items()}
            assert ds[variable].shape[1:] == tuple({**sizes, **own}[d] for d in spec.dims)
            assert {"long_name", "units"} <= ds[variable].attrs.keys()
            assert np.isfinite(ds[variable]).any(), variable
        for dim, labels in entry.coordinates.items():
            assert ds[dim].values.tolist() == list(labels)


def test_every_probe_of_a_comparison_gives_what_it_declares(tmp_path: Path) -> None:
    p = problem()
    names, algorithms = fitting("compare")
    wanted = [n for n in names if n not in ALWAYS]
    run = cl.compare(
        p.objective(),
        batches(p, 5),
        reference="block-hessian",
        algorithms=algorithms,
        damping=0.1,
        path=tmp_path / "run.h5",
        probes=[f"{n}:{2 + i % 2}" for i, n in enumerate(wanted)],
    )
    ds = cl.open(tmp_path / "run.h5")
    xr.testing.assert_identical(ds, run.dataset)
    promised(ds, names, lambda name: "step" if name in ALWAYS else f"{name}_step")
    for i, name in enumerate(wanted):
        assert ds[f"{name}_step"].values.tolist() == ([0, 2, 4], [0, 3])[i % 2]
    on_steps = cl.compare(
        p.objective(),
        batches(p, 4),
        reference="sgd-m",
        algorithms=algorithms,
        damping=0.1,
        log_every=2,
        probes=[f"{n}:2" for n in wanted],
    ).dataset
    promised(on_steps, [n for n in names if n != "shift"], lambda name: "step")
    assert on_steps["step"].values.tolist() == [0, 2]


def test_probes_are_asked_for_by_name_and_number_of_steps() -> None:
    assert asked(["norms", "loss:7"], "train") == {"norms": None, "loss": 7}
    for words, says in (
        (["norm"], "unknown probe 'norm'; did you mean 'norms'"),
        (
            ["norms:0"],
            "probe 'norms:0': after the colon comes a number of steps, 1 or more, as in norms:10",
        ),
        (["norms:ten"], "after the colon comes a number of steps"),
        (["norms:"], "after the colon comes a number of steps"),
        (["norms", "norms:2"], "probe 'norms' is given twice"),
        (["time"], r"probe 'time' is of curvlab compare alone \(train has .*loss, norms, shift"),
    ):
        with pytest.raises(cl.CurvlabError, match=says):
            asked(words, "train")
    p = problem()
    with pytest.raises(cl.CurvlabError, match="'cosine' is a part of every record of a comparison"):
        cl.compare(p.objective(), batches(p, 2), probes=["cosine:3"])
    with pytest.raises(
        cl.CurvlabError, match=r"probe 'shift' needs a method that shifts .* there is adam alone"
    ):
        cl.train(p.objective(), batches(p, 2), probes=["shift"])


def test_unknown_probe() -> None:
    with pytest.raises(cl.CurvlabError, match="unknown probe 'cosin'; did you mean 'cosine'"):
        select_probes(["cosin"])
