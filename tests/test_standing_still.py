"""The world between two looks stands still, or that it does not is said: data, weights, modes. And
chance, read and set.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

import curvlab as cl
from curvlab.derivatives import differentiable
from curvlab.errors import CurvlabError
from curvlab.exact import KINDS, Kind
from curvlab.system import random_state

CPU = torch.device("cpu")
N = 11
OTHER_DATA = (
    r"the loader gave other data than at the first pass .*: give list\(loader\), or a loader with"
    r" shuffle=False$"
)
OTHER_ORDER = (
    r"the loader gave its data in another order than .*: give list\(loader\), or a loader with"
    r" shuffle=False$"
)
CHANGED = "the data have been changed in place since the first pass .*: make it again$"
MOVED = "the model's weights have moved since this product was made: make it again"
kinds = pytest.mark.parametrize("kind", KINDS)


def with_kinds(names: Iterable[str]) -> pytest.MarkDecorator:
    """Every name with labels that are drawn, which are by place, and with two of the other kinds in
    turn; the rest slow.
    """
    others = [kind for kind in KINDS if kind != "fisher-mc"]

    def slow(i: int, kind: Kind) -> bool:
        return kind != "fisher-mc" and (others.index(kind) - i) % len(others) > 1

    cases = [(i, name, kind) for i, name in enumerate(names) for kind in KINDS]
    return pytest.mark.parametrize(
        ("name", "kind"),
        [pytest.param(n, k, marks=[pytest.mark.slow] if slow(i, k) else []) for i, n, k in cases],
    )


@pytest.fixture(autouse=True)
def _chance() -> Iterator[None]:
    """Every test from the same state of all generators."""
    with random_state.kept(CPU):
        random_state.seed(1)
        yield


def data() -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(1)
    return torch.randn(N, 4, generator=draw).double(), torch.randint(3, (N,), generator=draw)


def objective(*middle: nn.Module) -> cl.Objective:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        net = nn.Sequential(nn.Linear(4, 5), *middle, nn.Tanh(), nn.Linear(5, 3)).double()
    return cl.Objective(net, cl.likelihoods.Categorical())


def vector(o: cl.Objective, *columns: int) -> Tensor:
    return torch.randn(len(o.layout), *columns, generator=torch.Generator().manual_seed(2)).double()


def near(found: Tensor, wanted: Tensor) -> None:
    assert float((found - wanted).norm()) <= 1e-12 * float(wanted.norm())


# ------------------------------------------------------------------------------------------------
# data: loaders


def pairs() -> TensorDataset:
    return TensorDataset(*data())


class Own:
    """A loader of one's own: at every pass a new order, in minibatches of 4, the last dropped or
    not.
    """

    def __init__(self, drop_last: bool) -> None:
        self.drop_last = drop_last

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        x, y = data()
        for some in torch.randperm(N).split(4)[: 2 if self.drop_last else 3]:
            yield x[some], y[some]


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return zip(*data(), strict=True)


class Shifted(Dataset[Any]):
    """Examples are shifted, by numbers of one of the generators."""

    def __init__(self, draw: Callable[[], float]) -> None:
        self.draw = draw

    def __len__(self) -> int:
        return N

    def __getitem__(self, n: int) -> tuple[Tensor, Tensor]:
        x, y = data()
        return x[n] + self.draw(), y[n]


class Growing:
    """One more example at every pass."""

    def __init__(self) -> None:
        self.passes = 5

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        self.passes += 1
        x, y = data()
        yield x[: self.passes], y[: self.passes]


class ManyOrders(Sampler[list[int]]):
    """Of minibatches: shuffled within each, that is all."""

    def __iter__(self) -> Iterator[list[int]]:
        for some in torch.arange(N).split(4):
            yield some[torch.randperm(len(some))].tolist()

    def __len__(self) -> int:
        return 3


Loader = Iterable[tuple[Tensor, Tensor]]

SAME: dict[str, Callable[[], Loader]] = {
    "list": lambda: list(DataLoader(pairs(), 4)),
    "list of one": lambda: [data()],
    "tuple": lambda: tuple(DataLoader(pairs(), 4)),
    "in order, a small last minibatch": lambda: DataLoader(pairs(), 4),
    "without the last": lambda: DataLoader(pairs(), 4, drop_last=True),
    "one at a time": lambda: DataLoader(pairs(), 1),
    "all at once": lambda: DataLoader(pairs(), N),
    "no workers": lambda: DataLoader(pairs(), 4, num_workers=0),
    "sampler in order": lambda: DataLoader(pairs(), 4, sampler=SequentialSampler(range(N))),
    "stream": lambda: DataLoader(Stream(), 4),
    "a list of a shuffled pass": lambda: list(DataLoader(pairs(), 4, shuffle=True, drop_last=True)),
}
"""Nothing changes, not even the order."""

OTHER_ORDERS: dict[str, Callable[[], Loader]] = {
    "shuffled": lambda: DataLoader(pairs(), 4, shuffle=True),
    "shuffled, one minibatch": lambda: DataLoader(pairs(), N, shuffle=True),
    "shuffled by a generator of its own": lambda: DataLoader(
        pairs(), 4, shuffle=True, generator=torch.Generator().manual_seed(1)
    ),
    "RandomSampler": lambda: DataLoader(pairs(), 4, sampler=RandomSampler(range(N))),
    "SubsetRandomSampler": lambda: DataLoader(pairs(), 4, sampler=SubsetRandomSampler(range(N))),
    "random batch sampler": lambda: DataLoader(
        pairs(), batch_sampler=BatchSampler(RandomSampler(range(N)), 4, False)
    ),
    "shuffled within minibatches": lambda: DataLoader(pairs(), batch_sampler=ManyOrders()),
    "own": lambda: Own(drop_last=False),
}
"""The same examples in another order: one mean over examples, but for labels that are drawn by
place.
"""

OTHERS: dict[str, Callable[[], Loader]] = {
    "shuffled, the last dropped": lambda: DataLoader(pairs(), 4, shuffle=True, drop_last=True),
    "with replacement": lambda: DataLoader(
        pairs(), 4, sampler=RandomSampler(range(N), replacement=True)
    ),
    "fewer than all": lambda: DataLoader(
        pairs(), 4, sampler=RandomSampler(range(N), num_samples=7)
    ),
    "WeightedRandomSampler": lambda: DataLoader(
        pairs(), 4, sampler=WeightedRandomSampler([1.0] * 10 + [9.0], N)
    ),
    "random batch sampler, the last dropped": lambda: DataLoader(
        pairs(), batch_sampler=BatchSampler(RandomSampler(range(N)), 4, True)
    ),
    "own, the last dropped": lambda: Own(drop_last=True),
    "augmented by torch": lambda: DataLoader(Shifted(lambda: float(torch.randn(()))), 4),
    "augmented by random": lambda: DataLoader(Shifted(random.random), 4),
    "augmented by numpy": lambda: DataLoader(Shifted(np.random.rand), 4),
    "growing": Growing,
}


# with a minibatch or a loader
product: Callable[..., Any] = cl.exact.product
spectrum: Callable[..., Any] = cl.spectrum


def given_both_ways() -> list[tuple[Any, ...]]:
    """The data, and a loader of them."""
    return [data(), (DataLoader(pairs(), 4),)]


def mean(loader: Loader) -> tuple[Tensor, Tensor]:
    x, y = zip(*loader, strict=True)
    return torch.cat(x), torch.cat(y)


@with_kinds(SAME)
def test_loaders_that_give_the_same(name: str, kind: Kind) -> None:
    o, loader = objective(), SAME[name]()
    found: Any = cl.exact.product(o, loader, kind=kind)
    v = vector(o, 2)
    first = found @ v
    assert torch.equal(found @ v, first)
    near(found.diag(), found.dense().diagonal())
    if kind != "fisher-mc":
        near(first, cl.exact.product(objective(), *mean(loader), kind) @ v)


@with_kinds(OTHER_ORDERS)
def test_loaders_that_give_the_same_in_another_order(name: str, kind: Kind) -> None:
    o, loader = objective(), OTHER_ORDERS[name]()
    found: Any = cl.exact.product(o, loader, kind=kind)
    v = vector(o)
    first = found @ v
    if kind == "fisher-mc":
        with pytest.raises(CurvlabError, match=OTHER_ORDER):
            found @ v
        with pytest.raises(CurvlabError, match=OTHER_ORDER):
            found.diag()
        return
    for _ in range(3):
        near(found @ v, first)
    near(first, cl.exact.product(objective(), *data(), kind) @ v)
    near(found.diag(), cl.exact.diagonal(objective(), *data(), kind))


@with_kinds(OTHERS)
def test_loaders_that_give_other_data(name: str, kind: Kind) -> None:
    o = objective()
    found: Any = cl.exact.product(o, OTHERS[name](), kind=kind)
    v = vector(o)
    found @ v
    with pytest.raises(CurvlabError, match=OTHER_DATA):
        found @ v
    with pytest.raises(CurvlabError, match=OTHER_DATA):
        found.diag()


@pytest.mark.thinned(2)
@with_kinds(OTHERS | OTHER_ORDERS)
def test_the_remedy_is_one(name: str, kind: Kind) -> None:
    o, v = objective(), vector(objective())
    kept = list((OTHERS | OTHER_ORDERS)[name]())
    found: Any = cl.exact.product(o, kept, kind=kind)
    assert torch.equal(found @ v, found @ v)
    near(found.diag(), found.dense().diagonal())
    in_order = cl.exact.product(o, DataLoader(pairs(), 4, shuffle=False), kind=kind)
    assert torch.equal(in_order @ v, in_order @ v)


@kinds
def test_an_iterable_that_ends_after_one_pass(kind: Kind) -> None:
    class Once:
        def __init__(self) -> None:
            self.rest = iter(DataLoader(pairs(), 4))

        def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
            return self.rest

    o = objective()
    found: Any = cl.exact.product(o, Once(), kind=kind)
    found @ vector(o)
    with pytest.raises(CurvlabError, match=OTHER_DATA):
        found @ vector(o)


@pytest.mark.parametrize("reads", ["dense", "eigvalsh", "inv", "trace after a product"])
def test_whatever_reads_a_loader_several_times(reads: str) -> None:
    """More columns than go through the model at once."""
    o = objective(nn.Linear(5, 5))
    found: Any = cl.exact.product(o, OTHERS["shuffled, the last dropped"](), kind="fisher")

    def read() -> None:
        if reads == "trace after a product":
            found @ vector(o)
            found.trace()
        else:
            getattr(found, reads)()

    with pytest.raises(CurvlabError, match=OTHER_DATA):
        read()


@kinds
@pytest.mark.parametrize("many", [False, True])
def test_data_that_are_changed_in_place(many: bool, kind: Kind) -> None:
    """One minibatch is linearised once, and products go on with what it held, or with what it
    holds: no one could say.
    """
    o, (x, y) = objective(), data()
    given: tuple[Any, ...] = ([(x[:4], y[:4]), (x[4:], y[4:])],) if many else (x, y)
    v = vector(o)
    for edit in (
        lambda: x.mul_(2),
        lambda: x.data.neg_(),
        lambda: y.numpy().sort(),
        lambda: x.copy_(x.flip(0).clone()),
    ):
        found = product(o, *given, kind=kind)
        first = found @ v
        assert torch.equal(found @ v, first)
        edit()
        with pytest.raises(CurvlabError, match=CHANGED):
            found @ v
    again = product(o, *given, kind=kind)
    assert torch.equal(again @ v, again @ v)


@kinds
def test_the_diagonal_and_one_matrix_read_a_loader_once(kind: Kind) -> None:
    loader = OTHERS["shuffled, the last dropped"]
    cl.exact.diagonal(objective(), loader(), kind=kind)
    cl.exact.matrices(objective(), loader(), kind=kind)
    cl.exact.matrix(objective(), loader(), kind=kind, block=None)


@pytest.mark.thinned(2)
@pytest.mark.parametrize("method", ["exact", "lanczos"])
@pytest.mark.parametrize("name", OTHERS)
def test_spectra_are_all_of_the_same_data(name: str, method: str) -> None:
    """Of several kinds, of several blocks, of one matrix and the loss."""
    for matrices, blocks in (
        (("hessian", "ggn"), ("1",)),
        (("ggn",), ("all",)),
        (("ggn",), ("1",)),
    ):
        with pytest.raises(CurvlabError, match=OTHER_DATA):
            cl.spectrum(
                objective(),
                OTHERS[name](),
                matrices=matrices,
                blocks=blocks,
                method=method,
                draws=2,
                steps=3,
            )
    cl.spectrum(objective(), list(OTHERS[name]()), method=method, draws=2, steps=3)


@pytest.mark.parametrize("method", ["exact", "lanczos"])
@pytest.mark.parametrize("name", OTHER_ORDERS)
def test_spectra_of_another_order(name: str, method: str) -> None:
    ways: list[tuple[Any, ...]] = [(OTHER_ORDERS[name](),), data()]
    found, wanted = (
        spectrum(objective(), *given, method=method, draws=2, steps=3) for given in ways
    )
    for variable in ("highest", "lowest", "trace", "loss"):
        np.testing.assert_allclose(found[variable], wanted[variable], rtol=1e-9, atol=1e-13)
    with pytest.raises(CurvlabError, match=OTHER_ORDER):
        cl.spectrum(
            objective(),
            OTHER_ORDERS[name](),
            matrices=["fisher-mc"],
            method=method,
            draws=2,
            steps=3,
        )


# ------------------------------------------------------------------------------------------------
# weights and modes

EDITS: dict[str, Callable[[Any], object]] = {
    "scaled": lambda m: m[0].weight.data.mul_(2),
    "one last bit": lambda m: m[0].bias.data.view(torch.int64)[:1].bitwise_xor_(1),
    "signs of two": lambda m: m[0].weight.data[0, :2].neg_(),
    "all signs": lambda m: m[0].weight.data.neg_(),
    "exchanged": lambda m: m[0].weight.data.copy_(m[0].weight.data.flip(1)),
    "by numpy": lambda m: m[2].bias.detach().numpy().fill(0.25),
    "set anew": lambda m: setattr(m[0].weight, "data", m[0].weight.data * 2),
    "another parameter": lambda m: setattr(m[0], "weight", nn.Parameter(m[0].weight.detach() * 2)),
    "counted": lambda m: m[0].weight.requires_grad_(False).mul_(2).requires_grad_(),
    "loaded": lambda m: m.load_state_dict({name: t + 1 for name, t in m.state_dict().items()}),
    "taken away": lambda m: m[0].register_parameter("bias", None),
}


@pytest.mark.thinned(2)
@with_kinds(EDITS)
def test_weights_that_move_are_refused_however_they_are_moved(name: str, kind: Kind) -> None:
    o = objective()
    v = vector(o)
    for given in given_both_ways():
        found = product(o := objective(), *given, kind=kind)
        assert torch.equal(found @ v, found @ v)
        EDITS[name](o.model)
        for use in (lambda: found @ v, found.diag, found.trace):  # noqa: B023
            with pytest.raises(CurvlabError, match=MOVED):
                use()
    if name not in ("another parameter", "taken away"):
        again = cl.exact.product(o, *data(), kind)
        near(
            again @ v,
            (
                cl.exact.matrix(o, *data(), kind, None).dense() @ v
                if kind != "fisher-mc"
                else again @ v
            ),
        )


@kinds
def test_buffers_that_move_are_refused(kind: Kind) -> None:
    o = objective(nn.BatchNorm1d(5).double())
    o.model.eval()
    found: Any = cl.exact.product(o, *data(), kind)
    found @ vector(o)
    norm: Any = o.model.get_submodule("1")
    norm.running_mean.data.add_(1)
    with pytest.raises(CurvlabError, match=MOVED):
        found @ vector(o)


@kinds
def test_another_mode_is_refused(kind: Kind) -> None:
    o = objective(nn.Dropout(0.5))
    o.model.eval()
    for given in given_both_ways():
        found = product(o, *given, kind=kind)
        first = found @ vector(o)
        o.model.train()
        with pytest.raises(
            CurvlabError,
            match=r"modules have gone from train to eval mode, or back, since .*: make it again",
        ):
            found @ vector(o)
        o.model.eval()
        assert torch.equal(found @ vector(o), first)


def test_what_stands_still_is_not_said_to_move() -> None:
    """However many threads add up, whatever is done with the model; buffers that come with the
    first pass; NaN in a buffer.
    """

    class Caching(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if not hasattr(self, "scale"):
                self.register_buffer("scale", torch.full((), 2.0))
            scale: Any = self.scale
            return x * scale

    wide = (
        nn.Linear(5, 300, bias=False),
        nn.Linear(300, 300),
        nn.Linear(300, 5),
        nn.BatchNorm1d(5, affine=False),
        Caching(),
    )
    o = objective(*wide)
    o.model.eval()
    o.model.get_submodule("4").register_buffer("unused", torch.full((3,), torch.nan))
    found: Any = cl.exact.product(o, *data(), "ggn")
    v, threads = vector(o), torch.get_num_threads()
    first = found @ v
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            near(found @ v, first)
            o.closure(*data()).observe({"data"}, move_buffers=False)
            cl.exact.diagonal(o, *data(), "ggn")
            o.model.train()
            o.model.eval()
    finally:
        torch.set_num_threads(threads)


# ------------------------------------------------------------------------------------------------
# no_grad, inference_mode


@kinds
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_products_under_any_mode(mode: Callable[[], torch.no_grad], kind: Kind) -> None:
    """Made inside and used inside; made here and used there; vectors made there."""
    for given in given_both_ways():
        o, other = objective(), objective()
        v = vector(o, 2)
        outside = product(o, *given, kind=kind)
        wanted, diagonal = outside @ v, outside.diag()
        with mode():
            inside = product(other, *given, kind=kind)
            for found in (inside, outside):
                for u in (v, v.clone()):
                    value = found @ u
                    assert torch.equal(value, wanted)
                    assert not value.requires_grad
                assert torch.equal(found.diag(), diagonal)
            near(inside.dense().diagonal(), diagonal)
        assert torch.equal(inside @ v, wanted)
        assert torch.equal(product(objective(), *given, kind=kind) @ v, wanted)


@pytest.mark.parametrize("method", ["exact", "lanczos"])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_spectra_under_any_mode(mode: Callable[[], torch.no_grad], method: str) -> None:
    arguments: dict[str, Any] = {
        "matrices": KINDS,
        "blocks": ("all", "whole"),
        "method": method,
        "draws": 2,
        "steps": 3,
    }
    wanted, other = cl.spectrum(objective(), *data(), **arguments), objective()
    with mode():
        found = cl.spectrum(other, *data(), **arguments)  # of data that are made inside
    for name in wanted.data_vars:
        np.testing.assert_array_equal(found[name], wanted[name])


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_training_under_any_mode(mode: Callable[[], torch.no_grad]) -> None:
    one, two = objective(), objective()
    loader = list(DataLoader(pairs(), 4))
    arguments: dict[str, Any] = {
        "algorithm": "kfac",
        "lr": 0.1,
        "damping": 0.1,
        "epochs": 2,
        "progress": False,
    }
    cl.train(one, loader, **arguments)
    with mode():
        cl.train(two, loader, **arguments)
    for a, b in zip(one.model.parameters(), two.model.parameters(), strict=True):
        assert torch.equal(a, b)


# ------------------------------------------------------------------------------------------------
# names


def test_one_name_is_no_list_of_letters() -> None:
    one = cl.spectrum(objective(), *data(), matrices="hessian", blocks="1")
    several = cl.spectrum(objective(), *data(), matrices=["hessian"], blocks=["1"])
    assert one["matrix"].values.tolist() == ["hessian"]
    np.testing.assert_array_equal(one["eigenvalue"], several["eigenvalue"])
    assert one.attrs["call"] == several.attrs["call"]
    changes: tuple[tuple[dict[str, Any], str], ...] = (
        ({"matrices": "hesian"}, "unknown kind of matrix 'hesian'; did you mean 'hessian'"),
        ({"blocks": "al"}, "unknown block 'al'; did you mean 'all'"),
        ({"matrices": "hessian,ggn"}, "unknown kind of matrix 'hessian,ggn'"),
    )
    for change, says in changes:
        with pytest.raises(CurvlabError, match=says):
            cl.spectrum(objective(), *data(), **change)


@pytest.mark.parametrize("block", [["1", "2"], ("1", "2")])
def test_a_pair_of_blocks(block: Any) -> None:
    o = objective()
    pair = cl.exact.product(o, *data(), "ggn", block)
    assert pair.shape == (25, 18)
    near(pair.dense(), cl.exact.matrix(o, *data(), "ggn", None).dense()[:25, 25:])


@pytest.mark.parametrize("block", [("1",), ("1", "2", "3"), (1, 2), 1, {"1", "3"}])
def test_what_is_no_block(block: Any) -> None:
    with pytest.raises(
        CurvlabError, match=r"block must be a name, a pair of names .* or None for the whole, not"
    ):
        cl.exact.product(objective(), *data(), "ggn", block)


# ------------------------------------------------------------------------------------------------
# chance

DRAWS: dict[str, Callable[[], Any]] = {
    "torch": lambda: torch.rand(()),
    "random": random.random,
    "random, one of two normal numbers": lambda: random.gauss(0, 1),
    "numpy": np.random.rand,
    "numpy, one of two normal numbers": np.random.randn,
}


@pytest.mark.parametrize("before", [0, 1])
@pytest.mark.parametrize("name", DRAWS)
def test_a_draw_shows_and_can_be_taken_back(name: str, before: int) -> None:
    """Also the second of two normal numbers, for which no generator moves."""
    draw = DRAWS[name]
    for _ in range(before):
        draw()
    states = random_state.states(CPU)
    assert not random_state.drawn_since(states, CPU)
    first = float(draw())
    assert random_state.drawn_since(states, CPU)
    random_state.set_states(states, CPU)
    assert not random_state.drawn_since(states, CPU)
    assert float(draw()) == first


@pytest.mark.parametrize("name", DRAWS)
def test_kept_and_replayed(name: str) -> None:
    draw = DRAWS[name]
    start = random_state.states(CPU)
    first = [float(draw()) for _ in range(3)]
    now = random_state.states(CPU)
    with random_state.replayed(start, CPU):
        assert [float(draw()) for _ in range(3)] == first
    assert not random_state.drawn_since(now, CPU)
    with pytest.raises(KeyError), random_state.kept(CPU):  # noqa: PT012
        draw()
        raise KeyError
    assert not random_state.drawn_since(now, CPU)
    with random_state.replayed(start, CPU), random_state.replayed(start, CPU):
        assert float(draw()) == first[0]


def test_states_as_plain_values(tmp_path: object) -> None:
    """As a checkpoint has them; and of torch alone, as it had them."""
    for draw in DRAWS.values():
        draw()
    states = random_state.states(CPU)
    torch.save(states.state_dict(), f"{tmp_path}/states.pt")
    numbers = [float(draw()) for draw in DRAWS.values()]
    random_state.set_states(
        random_state.Chance.of(torch.load(f"{tmp_path}/states.pt", weights_only=True)), CPU
    )
    assert not random_state.drawn_since(states, CPU)
    assert [float(draw()) for draw in DRAWS.values()] == numbers
    random_state.set_states(random_state.Chance.of(list(states.torch)), CPU)
    assert [float(draw()) == n for draw, n in zip(DRAWS.values(), numbers, strict=True)] == [
        True,
        False,
        False,
        False,
        False,
    ]


def test_another_generator_of_numpys() -> None:
    kept = np.random.mtrand.get_bit_generator()
    try:
        np.random.mtrand.set_bit_generator(np.random.PCG64(3))
        states = random_state.states(CPU)
        assert not random_state.drawn_since(states, CPU)
        first = np.random.rand()  # noqa: NPY002
        assert random_state.drawn_since(states, CPU)
        random_state.set_states(random_state.Chance.of(states.state_dict()), CPU)
        assert not random_state.drawn_since(states, CPU)
        assert np.random.rand() == first  # noqa: NPY002
    finally:
        np.random.mtrand.set_bit_generator(kept)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA device")
def test_states_of_a_gpu() -> None:
    device = torch.device("cuda")
    states = random_state.states(device)
    assert not random_state.drawn_since(states, device)
    first = torch.rand((), device=device)
    assert random_state.drawn_since(states, device)
    random_state.set_states(random_state.Chance.of(states.state_dict()), device)
    assert torch.rand((), device=device) == first


# ------------------------------------------------------------------------------------------------
# weights edited through .data, which raises no version


def moved_by_data(o: cl.Objective) -> float:
    """The loss after all weights have moved so."""
    for p in o.parameters.values():
        p.data.add_(0.3)
    x, y = data()
    return float(o.closure(x, y).observe({"gradient"}).loss)


def test_a_look_that_nobody_has_used_yet_is_of_the_weights_as_they_are() -> None:
    for ask in (lambda c: c.form, lambda c: c.law):
        o = objective()
        closure = o.closure(*data())
        ask(closure)
        wanted = moved_by_data(o)
        assert float(closure.observe({"gradient"}, move_buffers=False).loss) == wanted


def test_it_is_used_where_the_weights_stand(monkeypatch: pytest.MonkeyPatch) -> None:
    o = objective()
    closure = o.closure(*data())
    assert closure.form
    monkeypatch.setattr(nn.Sequential, "forward", None)
    closure.observe({"gradient"}, move_buffers=False)


@pytest.mark.parametrize(
    "middle", [nn.Identity, lambda: nn.Dropout(0.5), lambda: nn.BatchNorm1d(5)]
)
def test_a_second_look_of_weights_edited_through_data(middle: Callable[[], nn.Module]) -> None:
    """The line says what was done, and not that the model draws random numbers."""
    for counted in (True, False):
        o = objective(middle())
        closure = o.closure(*data())
        closure.observe({"gradient"})
        with torch.no_grad():
            for p in o.parameters.values():
                (p if counted else p.data).add_(0.3)
        if counted:
            closure.observe({"gradient"}, move_buffers=False)
            continue
        with pytest.raises(CurvlabError, match=r"differ .* weights were written to by \.data") as e:
            closure.observe({"gradient"}, move_buffers=False)
        assert "random" not in str(e.value)


class Counting(nn.Module):
    """What nobody can put back."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x * self.calls


def test_looks_that_differ_though_all_stands_still_are_an_error_still() -> None:
    o = objective(Counting())
    closure = o.closure(*data())
    closure.observe({"gradient"})
    with pytest.raises(CurvlabError, match=r"two looks at one minibatch differ .* or counts"):
        closure.observe({"gradient"}, move_buffers=False)


# ------------------------------------------------------------------------------------------------
# threads


def fused() -> tuple[bool, bool]:
    return torch.backends.mha.get_fastpath_enabled(), torch.backends.cuda.flash_sdp_enabled()


def test_threads_that_take_derivatives_leave_attention_as_it_was() -> None:
    """Its flags are the process's: they are off until the last of the threads is out."""
    before, seen = fused(), []
    one_is_out, other_is_in = threading.Event(), threading.Event()

    def other() -> None:
        with differentiable():
            other_is_in.set()
            one_is_out.wait(60)
            seen.append(fused())

    thread = threading.Thread(target=other)
    with differentiable():
        thread.start()
        assert other_is_in.wait(60)
        with differentiable():
            pass
        seen.append(fused())
    one_is_out.set()
    thread.join(60)
    assert seen == [(False, False), (False, False)]
    assert fused() == before == (True, True)


def test_an_error_inside_leaves_attention_as_it_was() -> None:
    with pytest.raises(KeyError), differentiable():
        raise KeyError
    assert fused() == (True, True)
