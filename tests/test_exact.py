"""The oracle's dense matrices: every kind and block, by every route that fits, on one minibatch and
many; see `reference`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from oracle import total
from problems import LIKELIHOODS, MODELS, Problem, assert_near, in_turn, problem, targets
from reference import Reference, assert_block, reference, sampled
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import curvlab as cl
from curvlab.closure import Closure
from curvlab.errors import CurvlabError
from curvlab.exact import KINDS, ROUTES, Kind
from curvlab.exact.batches import CHUNK, PASS_OF_KIND, by_hessians
from curvlab.likelihoods import Categorical, Gaussian
from curvlab.observation import STREAMS

zoo = pytest.mark.parametrize(
    ("model", "kind", "likelihood"), in_turn(MODELS, KINDS, list(LIKELIHOODS))
)
models = pytest.mark.parametrize("model", MODELS)
kinds = pytest.mark.parametrize("kind", KINDS)
DRAWS = 3


@contextmanager
def general(model: str, taken: bool = True) -> Iterator[None]:
    """Expects one warning where a layer without a rule is `taken`."""
    if model == "norm" and taken:
        with pytest.warns(
            cl.CurvlabWarning, match="without a rule: .* takes the general route"
        ) as said:
            yield
        assert sum(issubclass(w.category, cl.CurvlabWarning) for w in said) == 1
    else:
        yield


def expected(r: Reference, kind: Kind) -> Tensor:
    """The whole matrix; of fisher-mc that of an objective's first call."""
    return r.drawn(sampled(r.p, r.p.objective(), DRAWS)) if kind == "fisher-mc" else r[kind]


def found(p: Problem, kind: Kind, block: Any, route: str = "auto") -> Tensor:
    return cl.exact.matrix(p.objective(), p.x, p.y, kind, block, route=route, draws=DRAWS).dense()


# ------------------------------------------------------------------------------------------------
# every matrix


@pytest.mark.thinned(2)
@zoo
def test_whole_matrix(model: str, likelihood: str, kind: Kind) -> None:
    r = reference(model, likelihood)
    with general(model):
        assert_near(found(r.p, kind, None), expected(r, kind))
    assert_near(found(r.p, kind, None, "func"), expected(r, kind))


@pytest.mark.thinned(2)
@zoo
def test_blocks(model: str, likelihood: str, kind: Kind) -> None:
    """All at once, every pass shared; and each alone, as `matrix` gives it."""
    r = reference(model, likelihood)
    whole = expected(r, kind)
    with general(model):
        blocks = cl.exact.matrices(r.p.objective(), r.p.x, r.p.y, kind, draws=DRAWS)
    assert list(blocks) == list(r.slices)
    for block in r.p.objective().blocks:
        own = whole[r.slices[block.name], r.slices[block.name]]
        assert_block(blocks[block.name].dense(), own, whole)
        with general(model, block.layer is None):
            assert_block(found(r.p, kind, block.name), own, whole)


@pytest.mark.thinned(6)
@kinds
@models
def test_parameters_and_pairs(model: str, kind: Kind) -> None:
    """By their own names, in their own order: diagonal blocks of every parameter, and every pair of
    a block and a parameter.

    The block comes first and last in turn.
    """
    r = reference(model)
    whole = expected(r, kind)
    blocks = r.p.objective().blocks
    loose = {n for b in blocks if b.layer is None for n in (b.name, *b.params)}
    names = [n for b in blocks for n in b.params]
    for name in names:
        one = r.entries[name].flatten()
        with general(model, name in loose):
            assert_block(found(r.p, kind, name), whole[one[:, None], one], whole)
        for i, block in enumerate(blocks):
            other = r.entries[block.name]
            with general(model, name in loose or block.name in loose):
                if (i + names.index(name)) % 2:
                    assert_block(
                        found(r.p, kind, (block.name, name)), whole[other[:, None], one], whole
                    )
                else:
                    assert_block(
                        found(r.p, kind, (name, block.name)), whole[one[:, None], other], whole
                    )


def test_pi_is_hessian_minus_ggn() -> None:
    r = reference("tanh")
    assert_near(found(r.p, "pi", None), found(r.p, "hessian", None) - found(r.p, "ggn", None))


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("activation", [nn.Tanh, nn.ReLU])
def test_layers_narrower_than_the_outputs_go_by_their_outputs_derivatives(
    activation: type[nn.Module], likelihood: str
) -> None:
    """GGN blocks through JᵀHJ in the pre-activations: one at a time, and both, where the earlier
    goes through the later.
    """
    torch.manual_seed(0)
    layers = [
        nn.Linear(5, 7),
        activation(),
        nn.Linear(7, 2),
        activation(),
        nn.Linear(2, 4),
        activation(),
        nn.Linear(4, 6),
    ]
    objective = cl.Objective(nn.Sequential(*layers).double(), LIKELIHOODS[likelihood]())
    x = torch.randn(9, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    y = targets(objective.likelihood, torch.zeros(9, 6, dtype=torch.float64))
    form = Closure(objective, x, y, 1, "exact").form
    narrow = [b.name for b in objective.blocks if by_hessians("ggn", b, form)]
    assert narrow == ["2", "3"]
    together = cl.exact.matrices(objective, x, y, "ggn")
    for name in narrow:
        wanted = cl.exact.matrix(objective, x, y, "ggn", name, route="func").dense()
        assert_near(cl.exact.matrix(objective, x, y, "ggn", name).dense(), wanted)
        assert_near(together[name].dense(), wanted)


# ------------------------------------------------------------------------------------------------
# routes


@pytest.mark.thinned(4)
@zoo
def test_every_route_that_fits_agrees_and_the_others_are_refused_by_name(
    model: str, likelihood: str, kind: Kind
) -> None:
    r = reference(model, likelihood)
    p, whole = r.p, expected(r, kind)
    form = Closure(p.objective(), p.x, p.y, 1, "exact").form
    taken = cl.exact.routes(p.objective(), p.x, p.y, kind)
    for block in p.objective().blocks:
        own = whole[r.slices[block.name], r.slices[block.name]]
        fitting = [name for name, route in ROUTES.items() if route.fits(block, form, kind)]
        # of second moments at several places, the one with fewer operations
        either = kind in PASS_OF_KIND and fitting[0] == "places"
        assert taken[block.name] in fitting[: 1 + either]
        assert fitting[-1] == "func"
        for name in ROUTES:
            if name in fitting:
                assert_block(found(p, kind, block.name, name), own, whole)
            else:
                with pytest.raises(
                    CurvlabError,
                    match=rf"route '{name}' does not fit block {block.name} .* for {kind}",
                ):
                    found(p, kind, block.name, name)


def test_what_the_routes_are_for() -> None:
    def taken(model: str, kind: Kind) -> list[str]:
        p = problem(model)
        return list(cl.exact.routes(p.objective(), p.x[:1], p.y[:1], kind).values())

    assert taken("tanh", "ggn") == taken("tanh", "hessian") == ["pairs", "pairs", "pairs"]
    assert taken("tokens", "fisher-mc") == ["rows", "rows"]
    assert taken("tokens", "pi") == ["places", "places"]
    assert taken("conv-1d", "ef") == ["rows", "rows", "rows", "pairs"]
    assert taken("conv-1d", "hessian") == ["func", "places", "func", "pairs"]
    assert taken("norm", "fisher") == ["pairs", "func", "func", "pairs"]


@pytest.mark.parametrize("route", ["pairs", "places"])
def test_routes_that_lead_to_diagonal_blocks_only(route: str) -> None:
    for block in (None, ("1", "2")):
        with pytest.raises(CurvlabError, match=f"route '{route}' leads to diagonal blocks only"):
            found(problem(), "ggn", block, route)


@pytest.mark.parametrize("model", [m for m in MODELS if m != "norm"])
def test_rows_between_blocks(model: str) -> None:
    for kind in ("ggn", "fisher", "fisher-mc", "ef"):
        r = reference(model)
        assert_near(found(r.p, kind, None, "rows"), expected(r, kind))


def test_rows_are_refused_where_they_do_not_exist() -> None:
    with pytest.raises(
        CurvlabError, match=r"route 'rows' is for second moments \(ggn, .*\), not for hessian"
    ):
        found(problem(), "hessian", None, "rows")
    with pytest.raises(CurvlabError, match=r"route 'rows' does not fit block 2 \(norm.weight\)"):
        found(problem("norm"), "ggn", None, "rows")


# ------------------------------------------------------------------------------------------------
# many minibatches


def cut(p: Problem, *sizes: int) -> list[tuple[Tensor, Tensor]]:
    return list(zip(p.x.split(sizes), p.y.split(sizes), strict=True))


def part(p: Problem, start: int, stop: int) -> Problem:
    return Problem(p.model, p.likelihood, p.x[start:stop], p.y[start:stop])


@pytest.mark.thinned(6)
@zoo
def test_a_loader_gives_the_mean_over_all_examples(model: str, likelihood: str, kind: Kind) -> None:
    """Minibatches of 3, 1 and 3 examples; the drawn labels are each chunk's own."""
    r = reference(model, likelihood)
    p, loader = r.p, cut(r.p, 3, 1, 3)
    labels = [
        sampled(part(p, *ends), p.objective(), DRAWS, part=i)
        for i, ends in enumerate([(0, 3), (3, 4), (4, 7)])
    ]
    whole = (
        r.drawn([torch.cat(one) for one in zip(*labels, strict=True)])
        if kind == "fisher-mc"
        else r[kind]
    )
    objective = p.objective()
    with general(model):
        # one pass is all it takes
        blocks = cl.exact.matrices(objective, iter(loader), kind=kind, draws=DRAWS)
    for name, block in blocks.items():
        assert_block(block.dense(), whole[r.slices[name], r.slices[name]], whole)
    for route in ("auto", "func"):
        with general(model, route == "auto"):
            full = cl.exact.matrix(
                p.objective(), loader, kind=kind, block=None, route=route, draws=DRAWS
            )
        assert_near(full.dense(), whole)


def test_a_data_loader() -> None:
    r = reference("conv")
    loader = DataLoader(TensorDataset(r.p.x, r.p.y), batch_size=2)
    assert_near(
        cl.exact.matrix(r.p.objective(), loader, kind="hessian", block=None).dense(), r["hessian"]
    )


@kinds
def test_a_large_minibatch_is_cut_into_chunks(kind: Kind) -> None:
    """The same matrix as of the chunks in a loader, and as in closed form from all inputs."""
    n = CHUNK + 5
    net, generator = problem("linear", "gaussian").model, torch.Generator().manual_seed(0)
    x, y = (
        torch.randn(n, 5, generator=generator).double(),
        torch.randn(n, 3, generator=generator).double(),
    )
    found = cl.exact.matrix(cl.Objective(net, Gaussian()), x, y, kind, "1").dense()
    pairs = list(zip(x.split(CHUNK), y.split(CHUNK), strict=True))
    assert_near(
        found, cl.exact.matrix(cl.Objective(net, Gaussian()), pairs, kind=kind, block="1").dense()
    )
    a = torch.cat([x, torch.ones(n, 1).double()], 1)
    if kind in ("hessian", "ggn", "fisher"):
        assert_near(found, torch.kron(torch.eye(3).double(), a.mT @ a / n))


@pytest.mark.parametrize("kind", ["hessian", "pi"])
def test_second_derivatives_take_few_examples_at_a_time(
    kind: Kind, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many as let the pre-activation Hessians of the widest block, (9·4)² numbers for an
    example, fit: here two.
    """
    r = reference("conv")
    seen: list[int] = []
    monkeypatch.setattr("curvlab.exact.batches._NUMBERS", 2 * 36**2)
    handle = r.p.model.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    blocks = cl.exact.matrices(r.p.objective(), r.p.x, r.p.y, kind)
    diagonal = cl.exact.diagonal(r.p.objective(), r.p.x, r.p.y, kind)
    handle.remove()
    assert max(seen) == 2
    assert_near(diagonal, r[kind].diagonal())
    for name, block in blocks.items():
        assert_block(block.dense(), r[kind][r.slices[name], r.slices[name]], r[kind])


def test_places_that_change_from_minibatch_to_minibatch() -> None:
    """One token and three, in either order: the mean over all examples, here of 4 and 2, whatever
    way each has gone.
    """
    p = problem("tokens", "gaussian", n=4)
    one, three = (p.x[:, :1], p.y), (torch.cat([p.x, p.x[:, :1]], 1)[:2], p.y[:2])
    for kind in ("hessian", "ggn", "pi", "fisher", "ef"):
        wanted = (
            total(
                len(x) * Reference(Problem(p.model, p.likelihood, x, y))[kind]
                for x, y in (one, three)
            )
            / 6
        )
        for loader in ([one, three], [three, one], [one, three, one, three]):
            objective = p.objective()
            assert_near(cl.exact.matrix(objective, loader, kind=kind, block=None).dense(), wanted)
            assert_near(cl.exact.diagonal(objective, loader, kind=kind), wanted.diagonal())
            for name, s in objective.layout.slices.items():
                assert_block(
                    cl.exact.matrix(objective, loader, kind=kind, block=name).dense(),
                    wanted[s, s],
                    wanted,
                )
                for route in ("rows", "func") if kind in ("ggn", "fisher", "ef") else ("func",):
                    found = cl.exact.matrix(
                        objective, loader, kind=kind, block=name, route=route
                    ).dense()
                    assert_block(found, wanted[s, s], wanted)


def test_places_that_change_against_the_mean_by_hand() -> None:
    """The blocks of each minibatch alone, weighted by their examples; the first goes by pairs, the
    second by rows.
    """
    p = problem("tokens", "gaussian", n=4)
    one, three = (p.x[:, :1], p.y), (torch.cat([p.x, p.x[:, :1]], 1), p.y)
    assert [cl.exact.routes(p.objective(), *pair, "ggn")["1"] for pair in (one, three)] == [
        "pairs",
        "rows",
    ]
    wanted = (
        total(cl.exact.matrix(p.objective(), x, y, "ggn", "1").dense() for x, y in (one, three)) / 2
    )
    assert_near(cl.exact.matrix(p.objective(), [one, three], kind="ggn", block="1").dense(), wanted)
    assert_near(cl.exact.matrix(p.objective(), [three, one], kind="ggn", block="1").dense(), wanted)


# ------------------------------------------------------------------------------------------------
# drawn labels


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("draws", [1, 4])
def test_drawn_labels_are_unbiased(likelihood: str, draws: int) -> None:
    """The mean of 200 calls, each on new labels: every entry within 5 standard errors of the exact
    one, which 1/√k shrinks.
    """
    p = problem("tanh", likelihood)
    objective = p.objective()
    calls = torch.stack(
        [
            cl.exact.matrix(objective, p.x, p.y, "fisher-mc", "2", draws=draws).dense()
            for _ in range(200)
        ]
    )
    exact = reference("tanh", likelihood)["fisher"][
        r := reference("tanh", likelihood).slices["2"], r
    ]
    error = calls.std(0) / len(calls) ** 0.5
    assert bool(((calls.mean(0) - exact).abs() <= 5 * error).all())
    assert 0 < float(error.norm() / exact.norm()) < 0.1 / draws**0.5


def test_one_draw_is_the_model_pass_of_one_closure() -> None:
    """Its generator is the one that took no number of a chunk."""
    p = problem()
    objective = p.objective(seed=9)
    matrix = cl.exact.matrix(objective, p.x, p.y, "fisher-mc", "2").dense()
    rows = (
        Closure(p.objective(seed=9), p.x, p.y, 1, "exact")
        .observe({"model"})
        .passes["model"]["2"]
        .rows[0]
        .flatten(1)
    )
    assert_near(matrix, rows.mT @ rows / len(rows))
    state = int(
        np.random.SeedSequence([9, 1, STREAMS.index("exact")]).generate_state(1, np.uint64)[0]
    )
    without = torch.Generator().manual_seed(state >> 1)
    assert torch.equal(objective.generator(1, "exact").get_state(), without.get_state())


def test_labels_depend_on_seed_call_and_chunk_alone() -> None:
    p = problem()
    loader = cut(p, 4, 3)

    def call(seed: int, before: int = 0, kind: Kind = "fisher-mc") -> Tensor:
        objective = p.objective(seed)
        for _ in range(before):
            cl.exact.matrix(objective, p.x, p.y, kind, "1")
        objective.closure(p.x, p.y).observe({"model"})  # a step's labels are its own
        return cl.exact.matrix(objective, loader, kind="fisher-mc", block="3").dense()

    assert torch.equal(call(0), call(0))
    assert torch.equal(call(0, before=1), call(0, before=1, kind="ggn"))
    assert not torch.equal(call(0), call(1))
    assert not torch.equal(call(0), call(0, before=1))


def test_names_of_blocks_come_before_names_of_parameters() -> None:
    class Numbered(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weights = nn.ParameterDict()
            self.register_parameter("2", nn.Parameter(torch.ones(1)))
            self.register_parameter("1", nn.Parameter(torch.ones(3)))

        def forward(self, x: Tensor) -> Tensor:
            return x * getattr(self, "1") + getattr(self, "2")

    objective = cl.Objective(Numbered(), Gaussian())
    assert [b.params for b in objective.blocks] == [("2",), ("1",)]
    with pytest.warns(cl.CurvlabWarning):
        found: Any = cl.exact.matrix(objective, torch.ones(2, 3), torch.ones(2, 3), "ggn", "1")
    assert len(found) == 1


# ------------------------------------------------------------------------------------------------
# manners


@kinds
@models
def test_matrices_are_symmetric_of_the_models_dtype_and_leave_it_alone(
    model: str, kind: Kind
) -> None:
    p = problem(model, dtype=torch.float32)
    before = {name: t.clone() for name, t in p.model.state_dict().items()}
    state = torch.get_rng_state()
    with general(model):
        blocks = cl.exact.matrices(p.objective(), p.x, p.y, kind)
    for block in p.objective().blocks:
        matrix = blocks[block.name].dense()
        assert (matrix.dtype, tuple(matrix.shape)) == (torch.float32, (block.numel, block.numel))
        assert_near(matrix, matrix.T, 1e-6)
        assert not matrix.requires_grad
    assert all(torch.equal(t, before[name]) for name, t in p.model.state_dict().items())
    assert all(q.grad is None for q in p.model.parameters())
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(m._forward_hooks for m in p.model.modules())


def peak(p: Problem, kind: Kind) -> tuple[int, int]:
    """(bytes that matrix() held at most beyond its arguments, bytes of its result), as torch's
    allocator counts them.
    """
    objective = p.objective()
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as recorded:
        matrix = cl.exact.matrix(objective, p.x, p.y, kind, "1").dense()
    held = torch.tensor(
        [e.nbytes() for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    )
    return int(held.cumsum(0).max()), matrix.numel() * matrix.element_size()


@pytest.mark.parametrize("kind", ["ggn", "ef", "hessian"])
def test_memory_of_a_dense_block(kind: Kind) -> None:
    """At most 1.3 times the result, and the batch: C derivatives of every pre-activation, and the
    inputs.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(60, 50), nn.Tanh(), nn.Linear(50, 4)).double()
        p = Problem(net, Categorical(), torch.randn(64, 60).double(), torch.arange(64) % 4)
    top, result = peak(p, kind)
    assert result == (50 * 61) ** 2 * 8
    assert result <= top <= 1.3 * result + 64 * (61 + 4 * 50) * 8


@pytest.mark.parametrize("kind", ["ggn", "ef"])
def test_memory_of_a_dense_block_of_a_convolution(kind: Kind) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(
            nn.Conv2d(8, 24, 3), nn.Tanh(), nn.Flatten(), nn.Linear(24 * 9, 4)
        ).double()
        p = Problem(net, Categorical(), torch.randn(64, 8, 5, 5).double(), torch.arange(64) % 4)
    top, result = peak(p, kind)
    assert result == (24 * 73) ** 2 * 8
    assert result <= top <= 1.3 * result + 64 * 9 * (73 + 4 * 24) * 8
