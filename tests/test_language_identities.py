"""Identities of language models, exact ones and those of Kronecker factors.

A tied weight is the sum of its uses, fused projections are separate ones, one place is the flat
model, padding and permutations change nothing, labels drawn jointly give the Gauss-Newton matrix,
and vectors sent back from all places at once do not.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from problems import assert_near, normal
from test_language_agreement import SMALL, Untied
from torch import Tensor, nn
from torch.func import functional_call, jacrev
from torch.nn.attention import SDPBackend, sdpa_kernel

import curvlab as cl
from curvlab.exact import KINDS, Kind
from curvlab.models import GPT
from curvlab.sequence_networks import TransformerLayer

IGNORED, TIGHT = -100, 1e-12


def kinds(*default: str) -> pytest.MarkDecorator:
    """Every kind that draws nothing, those that are not named when slow."""
    of = [kind for kind in KINDS if kind != "fisher-mc"]
    return pytest.mark.parametrize(
        "kind",
        [pytest.param(k, marks=[] if k in default else [pytest.mark.slow]) for k in of],
    )


no_warning = pytest.mark.filterwarnings("ignore::curvlab.errors.CurvlabWarning")


def spread(model: nn.Module, seed: int = 0) -> Any:
    """In float64, with weights that are not near what they start with."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.double().named_parameters():
            p.copy_(0.6 * torch.randn(p.shape, generator=generator).to(p))
            p.add_(float("norm" in name and name.endswith("weight")))
    return model


def objective(model: nn.Module, per: Any = "token", axis: Any = -1) -> cl.Objective:
    return cl.Objective(model, cl.likelihoods.Categorical(axis=axis, per=per), seed=0)


def words(n: int = 3, places: int = 4, symbols: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randint(symbols, (2, n, places), generator=generator)
    y[0, 1:3] = y[-1, -1] = IGNORED
    return x, y


def factors(o: cl.Objective, x: Any, y: Any, **options: Any) -> dict[str, tuple[Tensor, Tensor]]:
    """{block: (A, G)} of KFAC with the exact Hessian in the outputs."""
    kfac: Any = cl.approximation("kflr", o, **options)
    kfac.update(o.closure(x, y).observe(kfac.needs))
    found = {name: block for name, block in kfac.blocks.items() if hasattr(block, "A")}
    assert len(found) >= 2  # of norms there are none
    return {name: (block.A, block.G) for name, block in found.items()}


# ------------------------------------------------------------------------------------------------
# a tied weight


@kinds("ggn", "ef", "hessian")
@no_warning
def test_a_tied_weight_has_the_four_blocks_of_its_uses(kind: Kind) -> None:
    """B₁₁ + B₁₂ + B₂₁ + B₂₂ of the untied model at equal weights; without what lies between the
    two it is far off.
    """
    tied, untied = spread(GPT(4, 5, **SMALL)), Untied(4, 5, **SMALL).double()
    untied.load_state_dict({**tied.state_dict(), "head.weight": tied.embedding.weight})
    x, y = words()
    whole = cl.exact.matrix(objective(tied), x, y, kind, "embedding.weight").dense()
    table, head = "embedding.weight", "head.weight"
    block = {
        pair: cl.exact.matrix(objective(untied), x, y, kind, pair).dense()
        for pair in ((one, other) for one in (table, head) for other in (table, head))
    }
    assert_near(whole, sum(block.values(), torch.zeros_like(whole)), TIGHT)
    alone = block[table, table] + block[head, head]
    assert float((alone - whole).norm() / whole.norm()) > 0.05


@no_warning
def test_reduced_factors_of_a_tied_weight_are_of_one_vector() -> None:
    """What the head's use of the table reads differs from vector to vector."""
    o, (x, y) = objective(spread(GPT(4, 5, **SMALL))), words()
    with pytest.raises(
        cl.CurvlabError, match=r"take sharing='expand', or labels.* \(kfac"
    ) as caught:
        factors(o, x, y, sharing="reduce")
    assert "\n" not in str(caught.value)
    kfac: Any = cl.approximation("kfac-ef", o, sharing="reduce")
    kfac.update(o.closure(x, y).observe(kfac.needs))
    assert torch.isfinite(kfac.blocks["1"].matrix(0.1).dense()).all()


# ------------------------------------------------------------------------------------------------
# fused projections


class Fused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.head(x + self.attention(x, x, x, need_weights=False)[0])
        return found


class Separate(nn.Module):
    def __init__(self, fused: Fused) -> None:
        super().__init__()
        own = fused.attention
        self.q, self.k, self.v, self.out = (nn.Linear(4, 4).double() for _ in range(4))
        self.head = fused.head
        assert own.in_proj_weight is not None
        parts = zip(own.in_proj_weight.chunk(3), own.in_proj_bias.chunk(3), strict=True)
        for layer, (w, b) in zip((self.q, self.k, self.v), parts, strict=True):
            layer.load_state_dict({"weight": w, "bias": b})
        self.out.load_state_dict(own.out_proj.state_dict())

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(2, (2, 2)).transpose(1, 2) for f in (self.q, self.k, self.v))
        gathered = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        found: Tensor = self.head(x + self.out(gathered))
        return found


def both() -> tuple[cl.Objective, cl.Objective, Tensor, Tensor]:
    fused = spread(Fused())
    x, y = normal(3, 4, 4, seed=2), words()[1] % 3
    return objective(fused), objective(Separate(fused)), x, torch.where(words()[1] < 0, IGNORED, y)


@kinds("ggn", "ef", "hessian")
@no_warning
def test_fused_projections_are_the_separate_ones(kind: Kind) -> None:
    """The block of torch's attention is the nine blocks of q, k and v; the others are the same."""
    fused, separate, x, y = both()
    found = cl.exact.matrices(fused, x, y, kind)
    grid = [
        torch.cat(
            [cl.exact.matrix(separate, x, y, kind, (i, j)).dense() for j in ("1", "2", "3")], 1
        )
        for i in ("1", "2", "3")
    ]
    assert_near(found["1"].dense(), torch.cat(grid), TIGHT)
    assert_near(found["2"].dense(), cl.exact.matrix(separate, x, y, kind, "4").dense(), TIGHT)


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_factors_of_fused_projections(sharing: str) -> None:
    """One A, and the G of each of q, k and v on the diagonal of the fused G.

    Reduced, that of the keys is 0: what is added to all keys changes no softmax, so that their
    derivatives add up to nothing.
    """
    fused, separate, x, y = both()
    A, G = factors(fused, x, y, sharing=sharing)["1"]
    apart = factors(separate, x, y, sharing=sharing)
    diagonal = torch.block_diag(*(apart[name][1] for name in ("1", "2", "3")))
    assert_near(G * (diagonal != 0), diagonal, TIGHT)
    for name in ("1", "2", "3"):
        assert_near(apart[name][0], A, TIGHT)
    keys = float(G[4:8, 4:8].norm() / G.norm())
    assert keys < 1e-25 if sharing == "reduce" else keys > 0.01


# ------------------------------------------------------------------------------------------------
# one place, more places, other orders


class Flat(nn.Module):
    """What a transformer is on sequences of one place, which attends to itself: no place axis."""

    def __init__(self, model: Untied) -> None:
        super().__init__()
        self.embedding, self.positions = model.embedding, model.positions
        self.layers, self.norm, self.head = model.layers, model.norm, model.head

    def forward(self, x: Tensor) -> Tensor:
        h = self.embedding(x) + self.positions(torch.zeros_like(x))
        for layer in self.layers:
            assert isinstance(layer, TransformerLayer)
            own = layer.attention
            assert isinstance(own.qkv, nn.Linear)
            h = h + own.out(own.qkv(layer.norm1(h))[:, 8:])
            h = h + layer.mlp(layer.norm2(h))
        found: Tensor = self.head(self.norm(h))
        return found


@kinds("ggn", "ef")
@no_warning
def test_one_place_is_the_flat_model(kind: Kind) -> None:
    model = spread(Untied(4, 5, **SMALL))
    x, y = words(n=6, places=1)
    y[0] = IGNORED
    long = cl.exact.matrix(objective(model), x, y, kind, None).dense()
    assert_near(
        cl.exact.matrix(objective(Flat(model)), x[:, 0], y[:, 0], kind, None).dense(), long, TIGHT
    )


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@no_warning
def test_factors_of_one_place_are_the_flat_models(sharing: str) -> None:
    model = spread(Untied(4, 5, **SMALL))
    x, y = words(n=6, places=1)
    y[0] = IGNORED
    long = factors(objective(model), x, y, sharing=sharing)
    flat = factors(objective(Flat(model)), x[:, 0], y[:, 0], sharing=sharing)
    assert long.keys() == flat.keys()
    for name, (A, G) in flat.items():
        assert_near(A, long[name][0], TIGHT)
        assert_near(G, long[name][1], TIGHT)


class Padded(nn.Module):
    """An encoder of torch's own layer, and positions for as many places as may come."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.positions = nn.Embedding(5, 4), nn.Embedding(7, 4)
        self.layer = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=True)
        self.head = nn.Linear(4, 5)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        h = self.words(ids) + self.positions(torch.arange(ids.shape[1]).expand(ids.shape))
        found: Tensor = self.head(self.layer(h, src_key_padding_mask=~mask))
        return found


def lengthened(places: int) -> tuple[dict[str, Tensor], Tensor]:
    """The same sequences with padding up to `places`; what stands there is another symbol."""
    mask = torch.arange(places) < torch.tensor([[4], [2], [3]])
    ids, y = (torch.full((3, places), fill) for fill in (places % 5, IGNORED))
    ids[:, :4], y[:, :4] = words()
    y[~mask] = IGNORED
    ids[~mask] = places % 5
    return {"ids": ids, "mask": mask}, y


@pytest.mark.parametrize("per", [pytest.param("sequence", marks=pytest.mark.slow), "token"])
@kinds("ggn", "ef", "hessian")
@no_warning
def test_more_padding_changes_no_matrix(kind: Kind, per: str) -> None:
    o = objective(spread(Padded()), per)
    short, long = (cl.exact.matrices(o, *lengthened(places), kind) for places in (4, 7))
    for name, matrix in short.items():
        assert_near(long[name].dense(), matrix.dense(), TIGHT)


@kinds("ggn", "ef")
@no_warning
def test_places_without_a_label_behind_the_last_change_no_matrix(kind: Kind) -> None:
    """Of a causal model, which needs no mask for them."""
    o = objective(spread(GPT(6, 5, **SMALL)))
    x, y = words()
    behind = torch.full((3, 2), 2)
    long = cl.exact.matrix(
        o, torch.cat([x, behind], 1), torch.cat([y, behind * 0 + IGNORED], 1), kind, None
    )
    assert_near(long.dense(), cl.exact.matrix(o, x, y, kind, None).dense(), TIGHT)


@kinds("ggn", "ef")
@no_warning
def test_the_order_of_sequences_changes_no_matrix(kind: Kind) -> None:
    o, (x, y) = objective(spread(GPT(4, 5, **SMALL))), words(n=5)
    order = torch.tensor([3, 0, 4, 2, 1])
    one, other = (cl.exact.matrix(o, x[i], y[i], kind, None) for i in (slice(None), order))
    assert_near(other.dense(), one.dense(), TIGHT)


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@no_warning
def test_the_order_of_sequences_changes_no_factor(sharing: str) -> None:
    o, (x, y) = objective(spread(Untied(4, 5, **SMALL))), words(n=5)
    order = torch.tensor([3, 0, 4, 2, 1])
    one, other = (factors(o, x[i], y[i], sharing=sharing) for i in (slice(None), order))
    for name, (A, G) in one.items():
        assert_near(other[name][0], A, TIGHT)
        assert_near(other[name][1], G, TIGHT)


@kinds("ggn", "ef")
@no_warning
def test_relabelling_the_vocabulary_relabels_the_matrix(kind: Kind) -> None:
    """Of a tied table: its columns, in the input and in the output, and nothing else."""
    model, other = spread(GPT(4, 5, **SMALL)), GPT(4, 5, **SMALL).double()
    new = torch.tensor([2, 4, 0, 1, 3])
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        other.embedding.weight[new] = model.embedding.weight
    x, y = words()
    one = objective(model)
    renamed = torch.where(y < 0, y, new[y.clamp_min(0)])
    found = cl.exact.matrix(objective(other), new[x], renamed, kind, None).dense()
    places = one.layout.places()
    places["embedding.weight"] = places["embedding.weight"][new.argsort()]
    before = torch.cat([p.flatten() for p in one.layout.places().values()])
    after = torch.cat([p.flatten() for p in places.values()])
    wanted = cl.exact.matrix(one, x, y, kind, None).dense()
    assert_near(found[before][:, before], wanted[after][:, after], TIGHT)


@kinds("ggn", "ef")
@no_warning
def test_a_large_table_has_the_block_of_the_symbols_that_occur(kind: Kind) -> None:
    """All the rest of it is zero."""
    small, large = (spread(Untied(4, 5, **SMALL)) for _ in range(2))
    table = nn.Embedding(40, 4).double()
    new = torch.tensor([31, 0, 17, 39, 8])
    with torch.no_grad():
        table.weight[new] = small.embedding.weight
    large.embedding = table
    x, y = words()
    wanted = cl.exact.matrix(objective(small), x, y, kind, "embedding.weight").dense()
    found = cl.exact.matrix(objective(large), new[x], y, kind, "embedding.weight").dense()
    at = (new[:, None] * 4 + torch.arange(4)).flatten()
    assert_near(found[at][:, at], wanted, TIGHT)
    found[at[:, None], at] = 0
    assert not found.any()


# ------------------------------------------------------------------------------------------------
# labels, and vectors that are sent back


def test_labels_drawn_jointly_give_the_ggn_and_so_do_tokens_one_by_one() -> None:
    """All 3³ labels of a sequence, as often as the model says: scores of tokens, given the input,
    are uncorrelated. Of the data's labels the same two are far apart.
    """
    model, places, symbols = spread(GPT(3, 3, **SMALL)), 3, 3
    x, y = words(n=2, places=places, symbols=symbols)
    y = y.clamp_min(0)
    weights = {name: p.detach() for name, p in model.named_parameters()}
    with sdpa_kernel(SDPBackend.MATH):
        parts = jacrev(lambda w: functional_call(model, w, (x,)))(weights)
    J, p = torch.cat([j.flatten(3) for j in parts.values()], 3), model(x).softmax(2).detach()
    o = objective(model, "sequence")
    order = torch.cat([o.layout.places()[name].flatten() for name in weights])
    eye, at = torch.eye(symbols).double(), torch.arange(places)

    def scores(labels: Tensor) -> Tensor:
        """Of every token: [N, T, D]."""
        return torch.einsum("ntc,ntci->nti", p - eye[labels], J)

    def moments(labels: Tensor) -> tuple[Tensor, Tensor]:
        """Per sequence and per token, of each example: [N, D, D]."""
        s = scores(labels)
        return torch.einsum("nti,nsj->nij", s, s), torch.einsum("nti,ntj->nij", s, s)

    sequence, token = torch.zeros(2, J.shape[3], J.shape[3]).double()
    for drawn in itertools.product(range(symbols), repeat=places):
        chance = p[:, at, torch.tensor(drawn)].prod(1)
        for total, each in zip(
            (sequence, token), moments(torch.tensor([drawn, drawn])), strict=True
        ):
            total += torch.einsum("n,nij->ij", chance, each) / 2
    for kind in ("ggn", "fisher"):
        found = cl.exact.matrix(o, x, y, kind, None).dense()[order][:, order]
        assert_near(found, sequence, TIGHT)
        assert_near(found, token, TIGHT)
    of_data = [m.mean(0) for m in moments(y)]
    ef = cl.exact.matrix(o, x, y, "ef", None).dense()[order][:, order]
    assert_near(ef, of_data[0], TIGHT)
    assert float((of_data[1] - ef).norm() / ef.norm()) > 0.2


class Mixing(nn.Module):
    """Every place from those up to it, or from itself alone."""

    def __init__(self, mixing: bool, axis: int = 2) -> None:
        super().__init__()
        self.mixing, self.axis = mixing, axis
        self.first, self.last = nn.Linear(3, 4, bias=False), nn.Linear(4, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        z: Tensor = self.last(torch.tanh(h.cumsum(1)) if self.mixing else h)
        return z.movedim(2, self.axis)


def sent(model: Mixing, x: Tensor, at_once: bool) -> Tensor:
    """Σ g gᵀ over N and T of the first layer's outputs, by autograd: of the columns of every
    place's own root, sent back from one place or, `at_once`, from all of them.
    """
    h = model.first(x).detach().requires_grad_()
    inner = torch.tanh(h)
    z = model.last(torch.tanh(inner.cumsum(1)) if model.mixing else inner)
    p = z.softmax(2).detach()
    root = torch.diag_embed(p.sqrt()) - p[..., :, None] * p.sqrt()[..., None, :]
    found = torch.zeros(4, 4).double()
    for column in root.unbind(3):
        alone = torch.diag_embed(column.movedim(1, 2)).permute(2, 0, 3, 1)  # [T, N, T, C]
        for vector in [column] if at_once else alone:
            (g,) = torch.autograd.grad(z, h, vector, retain_graph=True)
            found += torch.einsum("nto,ntp->op", g, g)
    return found


def peers(model: Mixing, x: Tensor, y: Tensor, fisher: str) -> Tensor:
    """curvlinops' G ⊗ A of the first layer."""
    curvlinops = pytest.importorskip("curvlinops")
    other = Mixing(model.mixing, axis=1).double()  # classes where torch's loss takes them
    other.load_state_dict(model.state_dict())
    operator = curvlinops.KFACLinearOperator(
        other,
        nn.CrossEntropyLoss(reduction="sum"),
        [other.first.weight],
        [(x, y)],
        fisher_type=fisher,
        check_deterministic=False,
    )
    found: Tensor = operator @ torch.eye(12).double()
    return found


@pytest.mark.parametrize("mixing", [False, True])
def test_vectors_sent_back_from_all_places_at_once_are_wrong_where_places_mix(mixing: bool) -> None:
    """Ours is the mean over labels, enumerated; curvlinops' type 2 has what lies between places.

    Their number and ours are the same where places do not mix.
    """
    model = spread(Mixing(mixing))
    x, y = normal(3, 3, 3, seed=3), torch.zeros(3, 3, dtype=torch.long)
    o = objective(model, "sequence")
    A, G = factors(o, x, y)["1"]
    rows = x.flatten(0, 1)
    assert_near(A, rows.mT @ rows / 3, TIGHT)
    right, crossed = sent(model, x, at_once=False), sent(model, x, at_once=True)
    assert_near(G, right / 9, TIGHT)

    drawn = torch.zeros(4, 4).double()
    p = model(x).softmax(2).detach()
    for labels in itertools.product(range(2), repeat=3):
        for n, chance in enumerate(p[:, torch.arange(3), torch.tensor(labels)].prod(1)):
            kfac: Any = cl.approximation("kfac-ef", o)
            one = o.closure(x[n : n + 1], torch.tensor([labels]))
            kfac.update(one.observe(kfac.needs))
            drawn += chance * kfac.blocks["1"].G / 3
    assert_near(G, drawn, TIGHT)

    theirs = peers(model, x, y, "type-2")
    assert_near(theirs, torch.kron(crossed, rows.mT @ rows) / 9, 1e-10)  # their 1/(N T)
    ours = torch.kron(right, rows.mT @ rows) / 9
    if mixing:
        assert float(theirs.trace() / ours.trace()) > 2
    else:
        assert_near(theirs, ours, 1e-10)
