"""Exact blocks of small transformers: every kind against `torch.func`, every route against the
others, what causality and the head make unnecessary against doing it all the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from problems import assert_near
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, vmap

import curvlab as cl
from curvlab import autograd, sent_vectors
from curvlab.algorithms import approximation
from curvlab.closure import Closure
from curvlab.curvature.block_diagonal import BlockDiagonal
from curvlab.curvature.kfac import Kfac
from curvlab.exact import KINDS, Kind, route_table, sequences
from curvlab.exact.batches import PASS_OF_KIND
from curvlab.layers import Block
from curvlab.linalg import places
from curvlab.linalg.places import accumulate_pairs_, everywhere, reach_of, symmetrize_

N, T, C, WIDTH, IGNORED, DRAWS = 3, 5, 7, 8, -100, 2


class Layer(nn.Module):
    def __init__(self, causal: bool, norm: type[nn.Module]) -> None:
        super().__init__()
        self.first, self.second = norm(WIDTH), norm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.causal = causal

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(2, (2, -1)).mT for part in self.qkv(self.first(x)).chunk(3, 2))
        score = torch.einsum("ntdh,nsdh->nhts", q, k) / q.shape[2] ** 0.5
        if self.causal:
            later = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
            score = score.masked_fill(later, -torch.inf)
        mixed = torch.einsum("nhts,nsdh->nthd", score.softmax(3), v)
        x = x + self.out(mixed.flatten(2))
        return x + self.down(F.gelu(self.up(self.second(x))))


class Transformer(nn.Module):
    def __init__(
        self,
        symbols: int = C,
        tied: bool = True,
        causal: bool = True,
        norm: type[nn.Module] = nn.LayerNorm,
        sequence_first: bool = False,
    ) -> None:
        super().__init__()
        self.sequence_first = sequence_first
        self.tokens, self.positions = nn.Embedding(symbols, WIDTH), nn.Embedding(T, WIDTH)
        self.layers = nn.Sequential(*[Layer(causal, norm) for _ in range(2)])
        self.norm, self.head = norm(WIDTH), nn.Linear(WIDTH, symbols, bias=False)
        if tied:
            self.head.weight = self.tokens.weight

    def forward(self, x: Tensor) -> Tensor:
        h = self.tokens(x) + self.positions(torch.arange(x.shape[1]).expand(x.shape))
        h = self.norm(self.layers(h))
        return self.head(h).mT if not self.sequence_first else self._turned(h)

    def _turned(self, h: Tensor) -> Tensor:
        """The head sees rows that mix the examples, as nothing says."""
        return self.head((h + h.mean(1, keepdim=True)).transpose(0, 1)).permute(1, 2, 0)


def made(symbols: int = C, **options: object) -> tuple[cl.Objective, Tensor, Tensor]:
    """Labels without a loss: a place of one example, the end of another, and a place of all."""
    torch.manual_seed(0)
    model = Transformer(symbols, **options).double()  # type: ignore[arg-type]
    x, y = torch.randint(symbols, (2, N, T))
    y[0, 2] = y[1, 3:] = y[:, 1] = IGNORED
    return cl.Objective(model, cl.likelihoods.Categorical(), seed=0), x, y


MODELS = [(True, True), (False, True), (True, False)]
models = pytest.mark.parametrize(("tied", "causal"), MODELS)


@cache
def jacobians(tied: bool, causal: bool) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """({parameter: ∂z/∂w of every example [N, C T, *shape]}, z, ∂²ℓ/∂z²), by torch.func."""
    objective, x, y = made(tied=tied, causal=causal)
    weights = {name: p.detach() for name, p in objective.parameters.items()}

    def outputs(w: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(objective.model, w, (x[None],), tie_weights=True)[0].flatten()

    J = vmap(jacrev(outputs), (None, 0))(weights, x)
    z = vmap(outputs, (None, 0))(weights, x)
    return J, z, vmap(hessian(loss))(z, y)


def loss(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(z.view(1, -1, T), y[None], ignore_index=IGNORED, reduction="sum")


def expected(
    objective: cl.Objective, x: Tensor, y: Tensor, kind: Kind, key: tuple[bool, bool]
) -> dict[str, Tensor]:
    """{block: matrix}, from Jacobians and derivatives in the outputs, or a Hessian of the whole."""
    J, z, H = jacobians(*key)
    weights = {name: p.detach() for name, p in objective.parameters.items()}
    found = {}
    if kind in ("ggn", "fisher"):
        middle = H
    elif kind in ("ef", "fisher-mc"):
        generator = objective.generator(1, "exact", 0)
        shaped, sample = z.view(N, C, T), objective.likelihood.sample
        labels = [y] if kind == "ef" else [sample(shaped, generator, y) for _ in range(DRAWS)]
        scores = torch.stack([vmap(grad(loss))(z, label) for label in labels])
        middle = torch.einsum("lnc,lnd->ncd", scores, scores) / len(labels)
    for block in objective.blocks:
        own = {name: weights[name] for name in block.params}
        if kind in ("hessian", "pi"):

            def slope(w: Tensor, block: Block = block) -> Tensor:
                def total(w: Tensor) -> Tensor:
                    given = weights | block.scatter(w.view(block.shape))
                    out = functional_call(objective.model, given, (x,), tie_weights=True)
                    return vmap(loss)(out.flatten(1), y).sum()

                return grad(total)(w)

            found[block.name] = jacfwd(slope)(block.gather(own).flatten()) / N
        if kind != "hessian":
            rows = block.gather({name: J[name] for name in own}, 2).flatten(2)
            moment = torch.einsum("nci,ncd,ndj->ij", rows, H if kind == "pi" else middle, rows) / N
            found[block.name] = found[block.name] - moment if kind == "pi" else moment
    return found


SECOND: list[tuple[Kind, tuple[bool, bool]]] = [
    ("hessian", (True, True)),
    ("pi", (True, True)),
    ("hessian", (True, False)),
]
FIRST = [(kind, key) for kind in KINDS if kind not in ("hessian", "pi") for key in MODELS]


@pytest.mark.parametrize(("kind", "key"), SECOND + FIRST)
def test_every_kind(kind: Kind, key: tuple[bool, bool]) -> None:
    """Π is zero in the last norm, so that what it is relative to is the largest block's norm."""
    objective, x, y = made(tied=key[0], causal=key[1])
    found = cl.exact.matrices(objective, x, y, kind, draws=DRAWS)
    wanted = expected(objective, x, y, kind, key)
    assert found.keys() == wanted.keys()
    largest = max(float(w.norm()) for w in wanted.values()) if kind == "pi" else 0.0
    for name, matrix in found.items():
        apart = float((matrix.dense() - wanted[name]).norm())
        assert apart <= 1e-10 * max(float(wanted[name].norm()), largest)


def blocks_of(route: str, objective: cl.Objective, x: Tensor, y: Tensor, kind: Kind) -> list[str]:
    form = Closure(objective, x, y, 1, "exact").form
    chosen = route_table.ROUTES[route]
    return [b.name for b in objective.blocks if chosen.fits(b, form, kind)]


@pytest.mark.parametrize("kind", ["ggn", "fisher-mc", "ef"])
@models
def test_pairs_of_places_and_rows_are_one_matrix(kind: Kind, tied: bool, causal: bool) -> None:
    objective, x, y = made(tied=tied, causal=causal)
    names = blocks_of("places", objective, x, y, kind)
    assert len(names) >= 9  # of two layers' four weights and the positions
    by = [
        cl.exact.matrices(made(tied=tied, causal=causal)[0], x, y, kind, names, route=route)
        for route in ("places", "rows")
    ]
    for name in names:
        assert_near(by[0][name].dense(), by[1][name].dense())


def sent(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Write down of every call how many vectors were sent to how many targets."""
    calls: list[tuple[int, int]] = []
    own = autograd.send_back

    def counted(z: object, targets: Sequence[object], vectors: Tensor) -> list[Tensor | None]:
        calls.append((len(vectors), len(targets)))
        return own(z, targets, vectors)  # type: ignore[arg-type]

    monkeypatch.setattr(sent_vectors, "send_back", counted)
    return calls


@pytest.mark.parametrize(
    ("symbols", "tied", "causal"), [(11, True, True), (11, False, True), (50, True, False)]
)
def test_vectors_are_sent_once_and_no_more_than_needed(
    symbols: int, tied: bool, causal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Past the head there are as many vectors of a place as it has inputs, however many symbols;
    without a head that is found, the matrices are the same.
    """
    objective, x, y = made(symbols, tied=tied, causal=causal)
    calls = sent(monkeypatch)
    found = cl.exact.matrices(objective, x, y, "ggn")
    kept = T - 1  # one place has no loss in any example
    past = [(count, targets) for count, targets in calls if targets > 2]
    assert sum(count for count, targets in calls if targets <= 2) == kept * symbols
    assert sum(count for count, _ in past) == kept * WIDTH
    monkeypatch.setattr(sent_vectors, "_head", lambda z, heard: None)
    again = cl.exact.matrices(objective, x, y, "ggn")
    for name, matrix in found.items():
        assert_near(matrix.dense(), again[name].dense())


@pytest.mark.parametrize("kind", ["ggn", "fisher", "ef-token"])
@models
def test_the_whole_pairs_diagonals_and_terms(
    kind: Kind, tied: bool, causal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Like blocks, of vectors that are sent once and rotated at the head; by torch.func's rows."""
    objective, x, y = made(tied=tied, causal=causal)
    true = cl.exact.matrix(objective, x, y, kind, None, route="func").dense()
    calls = sent(monkeypatch)
    assert_near(cl.exact.matrix(objective, x, y, kind, None).dense(), true)
    assert sum(count for count, targets in calls if targets > 2) <= (T - 1) * WIDTH
    layout, head = objective.layout.slices, objective.blocks[-1].name
    for pair in (("1", "5"), ("5", head), (head, "1"), (head, head)):
        found = cl.exact.matrix(objective, x, y, kind, pair).dense()
        assert_near(found, true[layout[pair[0]], layout[pair[1]]])
    assert_near(cl.exact.diagonal(objective, x, y, kind), true.diagonal())
    terms = cl.exact.kronecker_terms(objective, x, y, kind, "5")
    assert_near(terms.dense(), true[layout["5"], layout["5"]])
    closure = Closure(objective, x, y, 1, "exact")
    needs = PASS_OF_KIND[kind]
    g = closure.observe({needs}).passes[needs]["5"].g
    assert_near(terms.G, torch.einsum("vnto,vnsp->ntosp", g, g))
    assert len(terms.g) <= len(g)  # type: ignore[arg-type]  # a second moment has vectors


def made_of(name: str, objective: cl.Objective) -> BlockDiagonal:
    found = approximation(name, objective, damping=0.1)
    assert isinstance(found, BlockDiagonal)
    return found


@models
@pytest.mark.filterwarnings("ignore:.*follow the gradient")
def test_a_method_by_block_reads_vectors_of_its_own(
    tied: bool, causal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """block-ggn and KFLR have the matrices of the routes, and of the vectors that all blocks share,
    two minibatches averaged; alone and in company to the bit.
    """
    objective, x, y = made(tied=tied, causal=causal)
    again = made(tied=tied, causal=causal)[0]
    cut = slice(0, 2), slice(1, 3)
    exact = [cl.exact.matrices(again, x[some], y[some], "ggn") for some in cut]
    calls = sent(monkeypatch)
    built = {name: made_of(name, objective) for name in ("block-ggn", "kflr")}
    alone = made_of("block-ggn", objective)
    factors: list[dict[str, Tensor]] = []
    for some in cut:
        closure = objective.closure(x[some], y[some])
        together = closure.observe({"apart", "exact"})
        for curvature in built.values():
            curvature.update(together)
        shared = together.passes["exact"]
        factors.append({name: s.G for name, s in shared.items() if s.provides("moments")})
        alone.update(closure.observe(alone.needs))
    assert sum(n for n, targets in calls if targets > 2) <= 4 * (T - 1) * WIDTH + 2 * T * C
    weight = alone.averaging.weight(2)
    for block in objective.blocks:
        name, kfac = block.name, built["kflr"].blocks[block.name]
        average = torch.lerp(exact[0][name].dense(), exact[1][name].dense(), weight)
        found, company = (c.blocks[name].matrix(0.0) for c in (alone, built["block-ggn"]))
        assert found is not None
        assert company is not None
        assert_near(found.dense(), average)
        assert torch.equal(found.dense(), company.dense())
        if name in factors[0] and isinstance(kfac, Kfac):
            assert kfac.G is not None
            assert_near(kfac.G, torch.lerp(factors[0][name], factors[1][name], weight))


def test_zeros_that_causality_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are found, and the matrix is that of sums over all vectors and places."""
    objective, x, y = made()
    closure = Closure(objective, x, torch.randint(C, (N, T)), 1, "exact")
    g = sequences.exact_statistics(closure, ["7"])["7"].g
    assert reach_of(g) == [(t * C, T * C) for t in range(T)]
    found = cl.exact.matrices(objective, x, y, "ggn", route="auto")
    monkeypatch.setattr(route_table, "reach_of", lambda g: everywhere(*g.shape[::2]))
    for name, matrix in cl.exact.matrices(objective, x, y, "ggn").items():
        assert_near(matrix.dense(), found[name].dense())


def test_many_minibatches_and_few_blocks_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums by one route go on by the other, and blocks whose derivatives do not fit into memory
    together are sent to one after the other.
    """
    objective, x, y = made()
    whole = cl.exact.matrices(objective, x, y, "ggn")
    loader = [(x[:1], y[:1]), (x[1:], y[1:])]
    turns = iter([True, False] * 40)
    monkeypatch.setattr(sequences, "_MOST", 1)
    monkeypatch.setattr(route_table, "by_pairs", lambda s: next(turns))
    for _ in range(2):
        for name, matrix in cl.exact.matrices(objective, loader, None, "ggn").items():
            assert_near(matrix.dense(), whole[name].dense())
        next(turns)


def test_a_head_whose_rows_are_no_examples() -> None:
    """Its vectors are not rotated: each of its rows has all examples."""
    objective, x, y = made(50, sequence_first=True)
    found = cl.exact.matrices(objective, x, y, "ggn")
    wanted = cl.exact.matrices(objective, x, y, "ggn", ["5", "7"], route="func")
    for name, matrix in wanted.items():
        assert_near(found[name].dense(), matrix.dense())


def test_all_places_ignored() -> None:
    objective, x, y = made()
    found = cl.exact.matrices(objective, x, torch.full_like(y, IGNORED), "ggn")
    assert all(not matrix.dense().any() for matrix in found.values())


def test_routes_name_the_cheaper() -> None:
    """With one vector a row is cheaper; pairs are where there are many."""
    objective, x, y = made(symbols=50)
    assert cl.exact.routes(objective, x, y, "ef")["7"] == "rows"
    assert cl.exact.routes(objective, x, y, "ggn")["7"] == "places"


@pytest.mark.parametrize("kind", ["ggn", "hessian"])
def test_against_curvlinops(kind: Kind) -> None:
    """Their Hessian is wrong for layer norm (torch 2.13, `test_curvlinops`): there is none here."""
    curvlinops = pytest.importorskip("curvlinops")
    norm = nn.LayerNorm if kind == "ggn" else nn.Identity
    objective, x, y = made(norm=norm)
    operators = {"ggn": curvlinops.GGNLinearOperator, "hessian": curvlinops.HessianLinearOperator}
    weights = dict(objective.model.named_parameters())
    loss = nn.CrossEntropyLoss(reduction="sum", ignore_index=IGNORED)
    for name in ("1", "4") if kind == "hessian" else ("1", "8", "15"):
        block = next(b for b in objective.blocks if b.name == name)
        operator = operators[kind](
            objective.model, loss, [weights[p] for p in block.params], [(x, y)],
            check_deterministic=False,
        )  # fmt: skip
        dense = operator @ torch.eye(block.numel).double() / N
        order = torch.cat([o.flatten() for o in cl.layers.Layout((block,)).places().values()])
        ours = cl.exact.matrix(objective, x, y, kind, name).dense()
        assert_near(ours[order][:, order], dense)


# ------------------------------------------------------------------------------------------------
# the sums themselves


@pytest.mark.parametrize("at_once", [1, 1 << 30])
def test_sums_over_pairs_of_places(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """More places than are taken at once, and places that no vector reaches."""
    torch.manual_seed(0)
    monkeypatch.setattr(places, "_BYTES", at_once)
    v, n, t, o, i = 12, 3, 11, 5, 4
    g, a = torch.randn(v, n, t, o).double(), torch.randn(n, t, i).double()
    g[:, :, 9] = 0
    for later in range(v):
        g[later, :, later:] = 0  # the first has no place at all
    rows = torch.einsum("vnto,nti->vnoi", g, a).flatten(2).flatten(0, 1)
    matrix = torch.full((o * i, o * i), torch.nan).double()
    accumulate_pairs_(matrix, g, a, reach_of(g), 0.0, 0.5)
    accumulate_pairs_(matrix, g, a, everywhere(v, t), 0.5, 0.25)
    assert_near(symmetrize_(matrix), 0.5 * rows.mT @ rows)
    empty = accumulate_pairs_(matrix, g * 0, a, reach_of(g * 0), 0.0, 1.0)
    assert not empty.any()
