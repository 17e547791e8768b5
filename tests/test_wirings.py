"""Random wirings (see `wirings`) against plain autograd, one example at a time: nothing may be
wrong, nothing refused.

N = T confuses the axis of examples with that of places, N ≠ T does not.
"""

from __future__ import annotations

import random
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st
from oracle import total
from plain import Named, Plain, gaps
from torch import Tensor, nn
from wirings import ENDS, LAYOUTS, OPERATIONS, Choose, Wiring, minibatch, wiring

import curvlab as cl
from curvlab.algorithms import ALGORITHMS
from curvlab.exact import Kind
from curvlab.layers import Block
from curvlab.likelihoods import Categorical

pytestmark = pytest.mark.filterwarnings(
    "ignore::curvlab.errors.CurvlabWarning", "ignore::UserWarning"
)

N = 4
PLACES = [4, 6, 8]
Y = torch.tensor([0, 2, 1, 0])


# ------------------------------------------------------------------------------------------------
# what may be wrong


def off(
    net: nn.Module,
    x: Tensor,
    y: Tensor,
    one: Callable[..., Block],
    objective: cl.Objective | None = None,
) -> list[str]:
    """Mean gradient, samples, EF, GGN, a Hessian block (that of `one`), products: what differs or
    is refused, in words.
    """
    objective, plain, said = objective or cl.Objective(net, Categorical()), Plain(net, x, y), []
    blocks, layout = objective.blocks, objective.layout
    block, v = (
        one(list(blocks)),
        torch.randn(len(layout), generator=torch.Generator().manual_seed(7), dtype=torch.float64),
    )

    def mean_gradient() -> tuple[Named, Named]:
        found = objective.closure(x, y).observe({"data"}).gradients
        return {
            n: g for b in blocks for n, g in b.scatter(found[b.name]).items()
        }, plain.mean_gradient

    def samples() -> tuple[Named, Named]:
        return cl.exact.gradients(objective, x, y), plain.gradients

    def matrices(kind: Kind) -> tuple[Named, Named]:
        found = {n: m.dense() for n, m in cl.exact.matrices(objective, x, y, kind=kind).items()}
        return found, {b.name: plain.matrix(kind, b) for b in blocks}

    def hessian() -> tuple[Named, Named]:
        found = cl.exact.matrix(objective, x, y, "hessian", block.name).dense()
        return {block.name: found}, {block.name: plain.matrix("hessian", block)}

    def product(kind: Kind) -> tuple[Named, Named]:
        found = cl.exact.product(objective, x, y, kind) @ v
        return {"v": found}, {
            "v": layout.flatten(plain.product(kind, layout.unflatten(v))).detach()
        }

    parts: dict[str, Callable[[], tuple[Named, Named]]] = {
        "mean gradient": mean_gradient,
        "samples": samples,
        "ef": lambda: matrices("ef"),
        "ggn": lambda: matrices("ggn"),
        "hessian": hessian,
        "product of ggn": lambda: product("ggn"),
        "product of hessian": lambda: product("hessian"),
    }
    for name, part in parts.items():
        try:
            said += [f"{name}: {gap}" for gap in gaps(*part())]
        except Exception as error:  # a refusal too: torch can do all of these models
            said.append(f"{name}: {type(error).__name__}: {str(error).splitlines()[0]}")
    return [f"{', '.join(map(str, blocks))}", *said] if said else []


def report(net: Wiring, said: list[str]) -> str:
    return "\n".join([f"T = {net.T}: {', '.join(net.words)}", *said])


def drawn(
    choose: Choose, T: int, names: list[tuple[str, str]] | None = None
) -> tuple[Wiring, list[str]]:
    net, takes_symbols = wiring(choose, T, names)
    return net, off(net, *minibatch(N, T, takes_symbols), choose)


# ------------------------------------------------------------------------------------------------
# wirings


EACH = [(name, layout) for name, (_, layouts) in OPERATIONS.items() for layout in layouts]


@pytest.mark.thinned(6)
@pytest.mark.parametrize(
    ("name", "layout", "T"),
    [
        pytest.param(*each, T, marks=[pytest.mark.slow] if PLACES[1 + i % 2] == T else [])
        for i, each in enumerate(EACH)
        for T in PLACES
    ],
)
def test_one_operation(name: str, layout: str, T: int) -> None:
    """Each in each layout; what else there is to choose is drawn from a seed of its own.

    As many places as examples, and more in turn: as many again, or half as many again; the other of
    these two is slow.
    """
    net, said = drawn(random.Random(f"{name} {layout} {T}").choice, T, [(name, layout)])
    assert not said, report(net, said)


@pytest.mark.parametrize("T", PLACES)
@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("first", ["symbols", "numbers"])
def test_ends(first: str, end: str, T: int) -> None:
    """Nothing but a linear layer between."""
    plain_choices = random.Random(f"{first} {end} {T}").choice

    def choose(options: Sequence[Any]) -> Any:
        return (
            first == "symbols"
            if options == [True, False] and not seen.append(0) and len(seen) == 1  # type: ignore[func-returns-value]  # for its effect
            else plain_choices(options)
        )

    seen: list[int] = []
    net, takes_symbols = wiring(choose, T, [("linear", "NTF")], end)
    assert takes_symbols == (first == "symbols")
    said = off(net, *minibatch(N, T, takes_symbols), plain_choices)
    assert not said, report(net, said)


@pytest.mark.parametrize(
    "every", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["third", "all"]
)
def test_several_operations(every: bool) -> None:
    """As many as draw from one seed, so that every pair of neighbours has a chance; and no
    operation is left out.

    Every third seed, and of the others those that have an operation which none before had; all of
    them when slow.
    """
    met: set[str] = set()
    wrong: list[str] = []
    for seed in sorted(range(80), key=lambda seed: (seed % 3 > 0, seed)):
        choose = random.Random(seed).choice
        net, takes_symbols = wiring(choose, T := choose(PLACES))
        new = {word.split(" ")[0] for word in net.words} - met
        if every or seed % 3 == 0 or new & set(OPERATIONS):
            said = off(net, *minibatch(N, T, takes_symbols), choose)
            wrong += [f"seed {seed}, {report(net, said)}"] if said else []
            met |= new
    assert set(OPERATIONS) <= met
    assert not wrong, "\n".join(wrong)


@pytest.mark.slow
@given(data=st.data())
@settings(
    max_examples=1500, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
def test_many_operations(data: st.DataObject) -> None:
    """The same, many more, and the shortest that fails."""

    def choose(options: Sequence[Any]) -> Any:
        return options[data.draw(st.integers(0, len(options) - 1))]

    net, said = drawn(choose, choose(PLACES))
    note(report(net, said))
    assert not said


class Idle(nn.Module):
    """A layer that does not run, and one whose weight is used by a call without a rule."""

    def __init__(self) -> None:
        super().__init__()
        self.inp, self.idle, self.head = nn.Linear(2, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(torch.tanh(self.inp(x)), torch.sin(self.head.weight), self.head.bias)


def test_ways() -> None:
    objective = cl.Objective(Idle().double(), Categorical())
    x = torch.randn(4, 2, dtype=torch.float64)
    assert objective.check(x, Y).ways == {"1": "structured", "2": "unused", "3": "general"}


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_algorithm_goes_on_where_a_layer_does_not_run(name: str) -> None:
    torch.manual_seed(0)
    net, x = Idle().double(), torch.randn(4, 2, dtype=torch.float64)
    idle = net.idle.weight.detach().clone()
    objective = cl.Objective(net, Categorical())
    stepping = cl.optimizer(name, objective, lr=0.01, damping=0.5, weight_decay=0.0)
    for _ in range(3):
        stepping.step(objective.closure(x, Y))
    assert all(bool(w.isfinite().all()) for w in net.parameters())
    assert torch.equal(net.idle.weight, idle)


# ------------------------------------------------------------------------------------------------
# where the data decide


class Sorted(nn.Module):
    """Examples in the order of their first number inside, as packed sequences are in that of their
    lengths.
    """

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(2, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        order = x[:, 0].argsort()
        return self.head(torch.tanh(self.inner(x[order])))[order.argsort()]


class Unpadded(nn.Module):
    """A layer sees the tokens that are no padding, one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.inner, self.head = nn.Embedding(6, 3), nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        h, there = self.table(x), x > 0
        seen = torch.zeros_like(h).masked_scatter(
            there[..., None], torch.tanh(self.inner(h[there]))
        )
        return self.head(seen.sum(1))


class Experts(nn.Module):
    """Every token goes to one of two layers, which it alone decides."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(6, 3), nn.Linear(3, 3)
        self.experts = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)])

    def forward(self, x: Tensor) -> Tensor:
        h = self.table(x)
        out = torch.zeros_like(h)
        for k, expert in enumerate(self.experts):
            mine = x % 2 == k
            out = out.masked_scatter(mine[..., None], torch.tanh(expert(h[mine])))
        return self.head(out.sum(1))


def _numbers(*order: int) -> Tensor:
    x = torch.randn(4, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return x[x[:, 0].argsort()][list(order)]


DECIDED: dict[str, tuple[type[nn.Module], list[Tensor]]] = {
    "sorted: two in the middle exchanged": (Sorted, [_numbers(0, 2, 1, 3)]),
    "sorted: as it was, then not": (Sorted, [_numbers(0, 1, 2, 3), _numbers(1, 0, 3, 2)]),
    "no padding: as long in the middle as at the ends": (
        Unpadded,
        [torch.tensor([[1, 2, 0], [3, 0, 0], [2, 5, 4], [4, 1, 0]])],
    ),
    "no padding: of one length, then not": (
        Unpadded,
        [
            torch.tensor([[1, 2, 0], [3, 1, 0], [2, 5, 0], [4, 1, 0]]),
            torch.tensor([[1, 0, 0], [3, 1, 2], [2, 5, 4], [4, 0, 0]]),
        ],
    ),
    "experts: one token of each, then not": (
        Experts,
        [
            torch.tensor([[1, 2], [3, 4], [2, 5], [4, 1]]),
            torch.tensor([[1, 3], [3, 5], [2, 4], [4, 0]]),
        ],
    ),
    "experts: one without work": (Experts, [torch.tensor([[1, 3], [3, 5], [1, 5], [3, 1]])]),
}
"""{what happens: a model, and minibatches of one form that it sees one after the other}"""


@pytest.mark.parametrize("name", DECIDED)
def test_rows_whose_examples_the_data_decide(name: str) -> None:
    """Equal in shape, so that what one minibatch has shown says nothing of the next; right at both
    ends, and not between.
    """
    torch.manual_seed(0)
    make, minibatches = DECIDED[name]
    net = make().double()
    objective = cl.Objective(net, Categorical())
    for x in minibatches:
        said = off(net, x, Y, lambda blocks: blocks[-2], objective)
        assert not said, "\n".join(said)


@pytest.mark.parametrize("way", ["no_grad", "data", "weight.data", "detach", "inference_mode"])
def test_what_has_no_gradient_has_no_second_one(way: str) -> None:
    """A factor that the derivative takes for a constant, by every way that torch has; forward mode
    keeps to few of them.
    """

    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.head = nn.Linear(2, 3), nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = torch.tanh(self.inner(x))
            return self.head(h) * self.gate(h)

        def gate(self, h: Tensor) -> Tensor:
            if way == "weight.data":
                return F.linear(h, self.head.weight.data)
            if way == "data":
                return h.data.std(1, keepdim=True)
            if way == "detach":
                return h.std(1, keepdim=True).detach()
            with torch.no_grad() if way == "no_grad" else torch.inference_mode():
                gate = h.std(1, keepdim=True)
            return gate.clone()

    torch.manual_seed(0)
    net, x = Gated().double(), torch.randn(4, 2, dtype=torch.float64)
    for n in range(2):
        said = off(net, x, Y, lambda blocks, n=n: blocks[n])
        objective, plain = cl.Objective(net, Categorical()), Plain(net, x, Y)
        for kind in ("ggn", "hessian"):
            found = {
                b.name: cl.exact.matrix(objective, x, Y, kind, b.name, route="func").dense()
                for b in objective.blocks
            }
            said += [
                f"{kind} by func: {g}"
                for g in gaps(found, {b.name: plain.matrix(kind, b) for b in objective.blocks})
            ]
        assert not said, "\n".join(said)


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """Fails where it takes longer."""

    def stop(number: int, frame: object) -> None:
        pytest.fail(f"not done after {seconds:g} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.skipif(not hasattr(signal, "SIGALRM"), reason="no alarm on this system")
@pytest.mark.parametrize("layout", ["NTF", "TNF", "N·T,F", "T·N,F"])
def test_one_layer_as_all_of_sixteen(layout: str) -> None:
    """Each use may lie in several ways: to try all of all together takes 3¹⁶."""
    into, back = LAYOUTS[layout]

    class Deep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.head = nn.Linear(2, 2), nn.Linear(2, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = into(x)
            for _ in range(16):
                h = torch.tanh(h + self.layer(h))
            return self.head(back(h, x.shape[1]).mean(1))

    torch.manual_seed(0)
    net, x = Deep().double(), torch.randn(4, 8, 2, dtype=torch.float64)
    with within(20):
        said = off(net, x, Y, lambda blocks: blocks[0])
    assert not said, "\n".join(said)


# ------------------------------------------------------------------------------------------------
# four blocks


class Language(nn.Module):
    """Words [N, T] → scores of the next [N, V], of the same table or of one of its own, with equal
    weights.
    """

    def __init__(self, tied: str, causal: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.inner = nn.Embedding(7, 4), nn.Linear(4, 4)
        self.attend = nn.MultiheadAttention(4, 2, batch_first=True) if causal else None
        self.head = None if tied == "by function" else nn.Linear(4, 7, bias=False)
        if tied == "one parameter":
            assert self.head is not None
            self.head.weight = self.table.weight
        if tied == "no":
            assert self.head is not None
            self.head.weight.data.copy_(self.table.weight)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.inner(self.table(x)))
        if self.attend is not None:
            mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
            h = h + self.attend(h, h, h, attn_mask=mask, need_weights=False)[0]
        h = h[:, -1] + h.mean(1)
        return self.head(h) if self.head is not None else F.linear(h, self.table.weight)


def between(
    objective: cl.Objective, x: Tensor, y: Tensor, kind: Kind, rows: str, columns: str
) -> Tensor:
    """The matrix between two parameters, entries in the parameters' own order."""
    a, b = (
        next(block for block in objective.blocks if block.params == (name,))
        for name in (rows, columns)
    )
    places = [
        block.scatter(torch.arange(block.numel))[block.params[0]].flatten() for block in (a, b)
    ]
    block = a.name if rows == columns else (a.name, b.name)
    return cl.exact.matrix(objective, x, y, kind, block=block).dense()[
        places[0][:, None], places[1]
    ]


@pytest.mark.parametrize("kind", ["ggn", "hessian", "ef"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("tied", ["by function", "one parameter"])
def test_a_tied_weights_matrix_is_the_sum_of_four_blocks(
    tied: str, causal: bool, kind: Kind
) -> None:
    """B₁₁ + B₁₂ + B₂₁ + B₂₂ of the untied model at equal weights; half of it is in the cross
    blocks.
    """
    generator = torch.Generator().manual_seed(1)
    x, y = (
        torch.randint(7, (5, 3), generator=generator),
        torch.randint(7, (5,), generator=generator),
    )
    one, two = (cl.Objective(Language(t, causal).double(), Categorical()) for t in (tied, "no"))
    found = between(one, x, y, kind, "table.weight", "table.weight")
    names = ["table.weight", "head.weight"]
    blocks = {(a, b): between(two, x, y, kind, a, b) for a in names for b in names}
    expected = total(blocks.values())
    assert float((found - expected).norm()) <= 1e-12 * float(expected.norm())
    crossed = blocks[names[0], names[1]] + blocks[names[1], names[0]]
    assert float(crossed.norm()) > 0.1 * float(expected.norm())
