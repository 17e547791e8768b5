"""Blocks: names, partition, layout; what cannot be partitioned says so. Rules: every entry of
LAYERS on its EXAMPLES.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from plain import Plain
from problems import MODELS, assert_near, eval_norm, grad_of, laid_out, normal, own_inputs, problem
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

import curvlab as cl
from curvlab.capture import Capture
from curvlab.errors import CurvlabError
from curvlab.exact import Kind
from curvlab.functions import FUNCTIONS
from curvlab.layers import LAYERS, Block, Layout, blocks
from curvlab.likelihoods import Gaussian
from curvlab.statistics import LayerStatistics

FEW = settings(deadline=None, max_examples=60)
models = pytest.mark.parametrize("model", MODELS)


def layout(model: nn.Module) -> list[tuple[str, tuple[str, ...], tuple[int, ...]]]:
    return [(b.name, b.params, b.shape) for b in blocks(model)]


@models
def test_blocks_partition_the_trainable_parameters(model: str) -> None:
    net = problem(model).model
    found = blocks(net)
    assert [b.name for b in found] == [str(i) for i in range(1, len(found) + 1)]
    names = [name for b in found for name in b.params]
    assert sorted(names) == sorted(name for name, _ in net.named_parameters())
    for b in found:
        assert b.numel == sum(net.get_parameter(name).numel() for name in b.params)


BATCHES = [(), (2,), (2, 3)]


@models
@pytest.mark.parametrize("batch", BATCHES)
def test_gather_and_scatter_are_inverse(model: str, batch: tuple[int, ...]) -> None:
    net = problem(model).model
    values = {name: normal(*batch, *p.shape) for name, p in net.named_parameters()}
    for b in blocks(net):
        gathered = b.gather(values, len(batch))
        assert gathered.shape == (*batch, *b.shape)
        assert torch.equal(gathered, laid_out(b, values, len(batch)))
        for value in (gathered, gathered.flatten(len(batch))):
            scattered = b.scatter(value, len(batch))
            assert list(scattered) == list(b.params)
            for name, part in scattered.items():
                assert torch.equal(part, values[name])


# ------------------------------------------------------------------------------------------------
# layouts


@models
@pytest.mark.parametrize("batch", BATCHES)
def test_layout_flattens_block_after_block(model: str, batch: tuple[int, ...]) -> None:
    net = problem(model).model
    found = Layout(blocks(net))
    values = {
        name: normal(*batch, *p.shape, seed=i) for i, (name, p) in enumerate(net.named_parameters())
    }
    flat = found.flatten(values, len(batch))
    assert flat.shape == (*batch, len(found))
    assert len(found) == sum(p.numel() for p in net.parameters())
    assert list(found.slices) == [b.name for b in found.blocks]
    assert [part.start for part in found.slices.values()] == [
        0,
        *(part.stop for part in found.slices.values()),
    ][:-1]
    for block in found.blocks:
        assert torch.equal(
            flat[..., found.slices[block.name]],
            laid_out(block, values, len(batch)).flatten(len(batch)),
        )
    back = found.unflatten(flat, len(batch))
    assert sorted(back) == sorted(values)
    for name, value in back.items():
        assert torch.equal(value, values[name])
    assert torch.equal(found.flatten(back, len(batch)), flat)


@models
def test_places_tell_where_every_entry_lies(model: str) -> None:
    net = problem(model).model
    found = Layout(blocks(net))
    values = {name: normal(*p.shape) for name, p in net.named_parameters()}
    flat, places = found.flatten(values), found.places()
    assert sorted(int(i) for place in places.values() for i in place.flatten()) == list(
        range(len(found))
    )
    for name, value in values.items():
        assert places[name].shape == value.shape
        assert torch.equal(flat[places[name]], value)


def test_layout_of_some_blocks_leaves_the_others_out() -> None:
    net = problem("tanh").model
    one, _, three = blocks(net)
    found = Layout((three, one))
    assert found.slices == {"3": slice(0, 15), "1": slice(15, 39)}
    assert list(found.unflatten(torch.arange(39))) == ["4.weight", "4.bias", "0.weight", "0.bias"]


def test_an_embedding_is_laid_out_as_a_linear_layer_of_one_hot_tokens() -> None:
    """Stored as [I, O], read as [O, I]: row o of the block is column o of the parameter."""
    net = nn.Embedding(5, 2)
    (block,) = blocks(net)
    assert (block.shape, block.biased) == ((2, 5), False)
    assert torch.equal(block.gather({"weight": net.weight}), net.weight.T)
    assert Layout((block,)).places()["weight"].tolist() == [[0, 5], [1, 6], [2, 7], [3, 8], [4, 9]]


# ------------------------------------------------------------------------------------------------
# the partition


def test_bias_is_the_last_column() -> None:
    net = nn.Linear(2, 3)
    (block,) = blocks(net)
    gathered = block.gather(dict(net.named_parameters()))
    assert torch.equal(gathered[:, :2], net.weight)
    assert torch.equal(gathered[:, 2], net.bias)
    assert block.biased
    assert block.layer is LAYERS[nn.Linear]


def test_names_follow_the_order_of_the_modules() -> None:
    assert layout(problem("tanh").model) == [
        ("1", ("0.weight", "0.bias"), (4, 6)),
        ("2", ("2.weight", "2.bias"), (4, 5)),
        ("3", ("4.weight", "4.bias"), (3, 5)),
    ]


def test_layer_without_a_rule_is_a_block_for_each_parameter() -> None:
    net = problem("norm").model
    assert layout(net) == [
        ("1", ("first.weight", "first.bias"), (4, 6)),
        ("2", ("norm.weight",), (4,)),
        ("3", ("norm.bias",), (4,)),
        ("4", ("second.weight", "second.bias"), (3, 5)),
    ]
    assert [b.layer is None for b in blocks(net)] == [False, True, True, False]
    assert str(blocks(net)[0]) == "block 1 (first.weight, first.bias)"


def assert_right(net: nn.Module, x: Tensor, ways: dict[str, str]) -> None:
    """Ways of the blocks; gradients, EF, GGN and Hessian by autograd one example at a time and by
    torch.func.
    """
    objective, before = cl.Objective(net, Gaussian()), list(net.parameters())
    y = normal(*net(x).shape, seed=2)
    assert objective.check(x, y).ways == ways
    plain = Plain(net, x, y, Gaussian().loss)
    seen, samples = objective.closure(x, y).observe(), cl.exact.gradients(objective, x, y)
    kinds: tuple[Kind, ...] = ("ef", "ggn", "hessian")
    matrices = {kind: cl.exact.matrices(objective, x, y, kind) for kind in kinds}
    general = {kind: cl.exact.matrices(objective, x, y, kind, route="func") for kind in kinds}
    for block in objective.blocks:
        assert_near(seen.gradients[block.name], laid_out(block, plain.mean_gradient))
        assert_near(seen.passes["data"][block.name].rows[0], laid_out(block, plain.gradients, 1))
        assert_near(laid_out(block, samples, 1), laid_out(block, plain.gradients, 1))
        for kind in kinds:
            wanted = plain.matrix(kind, block)
            assert_near(matrices[kind][block.name].dense(), wanted)
            assert_near(general[kind][block.name].dense(), wanted)
    for kind in kinds:
        whole = cl.exact.matrix(objective, x, y, kind, None).dense()
        assert_near(whole, cl.exact.matrix(objective, x, y, kind, None, route="func").dense())
    assert all(p is q for p, q in zip(net.parameters(), before, strict=True))


def test_a_subclass_of_a_layer_has_its_parents_layout_and_what_it_does_is_seen() -> None:
    """A subclass may do anything in its forward."""

    class Odd(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).square()

    net = seeded(lambda: Odd(2, 3))
    assert layout(net) == [("1", ("weight", "bias"), (3, 3))]
    assert blocks(net)[0].layer is LAYERS[nn.Linear]
    assert_right(net, normal(5, 2), {"1": "structured"})


def test_a_subclass_that_has_something_else_in_place_of_a_parameter() -> None:
    """Laid out only where the layout fits: a vector is no table, a bias of another length no last
    column.
    """

    class Vector(nn.Embedding):
        def __init__(self) -> None:
            super().__init__(6, 3)
            self.weight = nn.Parameter(torch.ones(6))

        def forward(self, x: Tensor) -> Tensor:
            return self.weight[x]

    class Longer(nn.Linear):
        def __init__(self) -> None:
            super().__init__(2, 3)
            self.bias = nn.Parameter(torch.ones(4))

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([F.linear(x, self.weight), x[:, :1]], 1) + self.bias

    assert layout(Vector()) == [("1", ("weight",), (6,))]
    assert layout(Longer()) == [("1", ("weight",), (3, 2)), ("2", ("bias",), (4,))]
    assert [b.layer for b in blocks(Longer())] == [LAYERS[nn.Linear], None]


def test_parameters_of_the_model_itself() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale, self.inner = nn.Parameter(torch.ones(2)), nn.Linear(2, 2)

    assert layout(Scaled()) == [
        ("1", ("scale",), (2,)),
        ("2", ("inner.weight", "inner.bias"), (2, 3)),
    ]


def test_frozen_bias() -> None:
    net = nn.Linear(2, 3)
    net.bias.requires_grad_(False)
    (block,) = blocks(net)
    assert (block.params, block.shape, block.biased) == (("weight",), (3, 2), False)


def test_frozen_weight_leaves_the_bias_as_a_block_of_its_own() -> None:
    net = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    net[0].weight.requires_grad_(False)
    assert layout(net) == [("1", ("0.bias",), (3,)), ("2", ("1.weight", "1.bias"), (1, 4))]
    assert blocks(net)[0].layer is None


def test_frozen_layer_is_no_block() -> None:
    net = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    net[0].requires_grad_(False)
    assert layout(net) == [("1", ("1.weight", "1.bias"), (1, 4))]


@pytest.mark.parametrize(
    "net", [nn.Linear(2, 3).requires_grad_(False), nn.Tanh(), nn.ParameterList([torch.zeros(0)])]
)
def test_nothing_to_train(net: nn.Module) -> None:
    with pytest.raises(CurvlabError, match="no trainable layer"):
        blocks(net)


def test_tied_parameters_belong_to_the_first_module() -> None:
    """The second one's own bias is a block of its own."""
    net: Any = seeded(lambda: nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3)))
    net[2].weight = net[0].weight
    assert layout(net) == [("1", ("0.weight", "0.bias"), (3, 4)), ("2", ("2.bias",), (3,))]
    assert [b.layer for b in blocks(net)] == [LAYERS[nn.Linear], None]


def test_tied_parameters_in_both_directions() -> None:
    """A decoder with its encoder's weight, transposed, and a bias of its own."""

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.bias = nn.Linear(3, 2), nn.Parameter(torch.ones(3))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(torch.tanh(self.encoder(x)), self.encoder.weight.T, self.bias)

    assert layout(Tied()) == [
        ("1", ("bias",), (3,)),
        ("2", ("encoder.weight", "encoder.bias"), (2, 4)),
    ]


def test_a_module_under_two_names_is_one_block_of_the_first() -> None:
    layer = seeded(lambda: nn.Linear(3, 3))
    net = nn.Sequential(layer, nn.Tanh(), layer)
    assert layout(net) == [("1", ("0.weight", "0.bias"), (3, 4))]
    assert_right(net, normal(5, 3), {"1": "structured"})
    assert_right(nn.Sequential(layer, layer), normal(5, 3), {"1": "structured"})


# ------------------------------------------------------------------------------------------------
# rules

Example = tuple[Callable[[], nn.Module], Callable[[], Tensor]]


def tokens(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.randint(6, shape, generator=torch.Generator().manual_seed(1)).to(dtype)


class Conv1D(nn.Module):
    """GPT-2's linear layer, as transformers has it."""

    def __init__(self, outputs: int, inputs: int) -> None:
        super().__init__()
        self.weight, self.bias = (
            nn.Parameter(torch.ones(inputs, outputs)),
            nn.Parameter(torch.ones(outputs)),
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(*x.shape[:-1], -1)


Conv1D.__module__, Conv1D.__qualname__ = "transformers.pytorch_utils", "Conv1D"


def attention(**hyper: Any) -> nn.MultiheadAttention:
    """Self-attention of which only the projections at its entry are trained."""
    net = nn.MultiheadAttention(4, 2, **hyper)
    net.out_proj.requires_grad_(False)
    return net


EXAMPLES: dict[type[nn.Module] | str, dict[str, Example]] = {
    nn.Linear: {
        "": (lambda: nn.Linear(3, 4), lambda: normal(5, 3)),
        "no bias": (lambda: nn.Linear(3, 4, bias=False), lambda: normal(5, 3)),
        "[N, T, I]": (lambda: nn.Linear(3, 4), lambda: normal(5, 2, 3)),
        "[N, S, T, I]": (lambda: nn.Linear(3, 1), lambda: normal(5, 2, 3, 3)),
    },
    nn.Conv1d: {
        "": (lambda: nn.Conv1d(2, 4, 3), lambda: normal(5, 2, 6)),
        "depthwise": (lambda: nn.Conv1d(3, 6, 2, groups=3), lambda: normal(5, 3, 4)),
    },
    nn.Conv2d: {
        "": (
            lambda: nn.Conv2d(2, 3, (3, 2), padding=(1, 0), stride=(1, 2)),
            lambda: normal(5, 2, 4, 5),
        ),
        "one place": (lambda: nn.Conv2d(2, 3, 2, bias=False), lambda: normal(5, 2, 2, 2)),
        "groups": (lambda: nn.Conv2d(4, 2, 2, groups=2, dilation=2), lambda: normal(5, 4, 4, 3)),
    },
    nn.Conv3d: {
        "": (lambda: nn.Conv3d(2, 3, (1, 2, 2)), lambda: normal(5, 2, 2, 3, 2)),
        "groups": (lambda: nn.Conv3d(2, 2, 2, groups=2, bias=False), lambda: normal(5, 2, 2, 3, 2)),
    },
    nn.Embedding: {
        "[N, T]": (lambda: nn.Embedding(6, 3), lambda: tokens(5, 4)),
        "[N]": (lambda: nn.Embedding(6, 3), lambda: tokens(5)),
        "[N, S, T]": (lambda: nn.Embedding(6, 1), lambda: tokens(5, 2, 3)),
        "padding": (lambda: nn.Embedding(6, 3, padding_idx=2), lambda: tokens(5, 4)),
        "padding counted from the end": (
            lambda: nn.Embedding(6, 3, padding_idx=-1),
            lambda: tokens(5, 4),
        ),
        "int32": (lambda: nn.Embedding(6, 3), lambda: tokens(5, 4, dtype=torch.int32)),
        "sparse": (lambda: nn.Embedding(6, 3, sparse=True), lambda: tokens(5, 4)),
    },
    nn.BatchNorm1d: {
        "[N, C]": (lambda: eval_norm(nn.BatchNorm1d(3)), lambda: normal(5, 3)),
        "[N, C, T]": (lambda: eval_norm(nn.BatchNorm1d(3, eps=0.1)), lambda: normal(5, 3, 4)),
        "one channel": (lambda: eval_norm(nn.BatchNorm1d(1)), lambda: normal(5, 1)),
    },
    nn.BatchNorm2d: {"": (lambda: eval_norm(nn.BatchNorm2d(3)), lambda: normal(5, 3, 2, 3))},
    nn.BatchNorm3d: {"": (lambda: eval_norm(nn.BatchNorm3d(2)), lambda: normal(5, 2, 2, 1, 3))},
    nn.LayerNorm: {
        "[N, C]": (lambda: nn.LayerNorm(4), lambda: normal(5, 4)),
        "[N, T, C]": (lambda: nn.LayerNorm(4, eps=0.1), lambda: normal(5, 3, 4)),
        "no bias": (lambda: nn.LayerNorm(4, bias=False), lambda: normal(5, 2, 4)),
        "one channel": (lambda: nn.LayerNorm(1), lambda: normal(5, 2, 1)),
    },
    nn.RMSNorm: {
        "[N, C]": (lambda: nn.RMSNorm(4), lambda: normal(5, 4)),
        "[N, T, C]": (lambda: nn.RMSNorm(4, eps=0.1), lambda: normal(5, 3, 4)),
        "one channel": (lambda: nn.RMSNorm(1), lambda: normal(5, 1)),
    },
    nn.GroupNorm: {
        "[N, C]": (lambda: nn.GroupNorm(2, 6), lambda: normal(5, 6)),
        "[N, C, T]": (lambda: nn.GroupNorm(1, 4, eps=0.1), lambda: normal(5, 4, 3)),
        "[N, C, S, T]": (lambda: nn.GroupNorm(2, 4), lambda: normal(5, 4, 2, 3)),
        "one channel": (lambda: nn.GroupNorm(1, 1), lambda: normal(5, 1, 3)),
    },
    nn.MultiheadAttention: {
        "": (lambda: attention(batch_first=True), lambda: normal(5, 2, 4)),
        "no bias": (lambda: attention(batch_first=True, bias=False), lambda: normal(5, 3, 4)),
    },
    "transformers.pytorch_utils.Conv1D": {
        "[N, I]": (lambda: Conv1D(4, 3), lambda: normal(5, 3)),
        "[N, T, I]": (lambda: Conv1D(4, 3), lambda: normal(5, 2, 3)),
    },
}
"""{type, or its full name: {what is special: (module, its input)}}: a new rule needs an example."""


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    """In float64, with no two parameters alike: a norm starts at ones and zeros."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        net = make().double()
    for i, w in enumerate(net.parameters()):
        w.data.copy_(normal(*w.shape, seed=20 + i))
    if isinstance(net, nn.Embedding) and net.padding_idx is not None:
        net.weight.data[net.padding_idx] = 0
    return net


def test_every_rule_has_an_example() -> None:
    assert set(EXAMPLES) == set(LAYERS)
    for kind, cases in EXAMPLES.items():
        for own in (type(seeded(make)) for make, _ in cases.values()):
            assert kind in (own, f"{own.__module__}.{own.__qualname__}")


def called(kind: type[nn.Module] | str) -> str:
    return kind.rpartition(".")[2] if isinstance(kind, str) else kind.__name__


examples = pytest.mark.parametrize(
    ("make", "x"),
    [
        pytest.param(*e, id=f"{called(k)} {name}".strip())
        for k, c in EXAMPLES.items()
        for name, e in c.items()
    ],
)


def arguments(net: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
    """What a module is called with: attention takes queries, keys and values."""
    return (x, x, x) if isinstance(net, nn.MultiheadAttention) else (x,)


def output(net: nn.Module, x: Tensor, values: dict[str, Tensor] | None = None) -> Tensor:
    """Of a module, at other parameters too; attention returns its weights beside it."""
    z = functional_call(net, values or {}, arguments(net, x))
    return z[0] if isinstance(z, tuple) else z


def preactivation(net: nn.Module, x: Tensor, z: Tensor) -> Tensor:
    """What the block itself computes: the module's output z, but for attention."""
    if not isinstance(net, nn.MultiheadAttention):
        return z
    return (
        F.linear(x.transpose(0, 1), net.in_proj_weight, net.in_proj_bias).transpose(0, 1).detach()
    )


def passed(
    net: nn.Module, x: Tensor, count: int = 2, seed: int = 5
) -> tuple[Block, LayerStatistics, Tensor, Tensor]:
    """The block of a single layer, what `count` vectors sent back say of it, the vectors, and the
    output.
    """
    (block,) = blocks(net)
    with Capture(net, (block,)) as capture:
        z = output(net, x)
    assert [len(uses) for uses in capture.uses.values()] == [1]
    assert capture.uses[block.name][0].rule in FUNCTIONS.values()
    vectors = normal(count, *z.shape, seed=seed)
    return block, capture.backward(z, vectors)[block.name], vectors, z.detach()


def parameters(net: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in net.named_parameters() if p.requires_grad}


def assert_reads(net: nn.Module, x: Tensor) -> None:
    """h[n, t, o] = Σᵢ W[o, i] a[n, t, γ(o), i], W as the module has it, is the module's own
    output.
    """
    block, s, _, z = passed(net, x)
    W = laid_out(block, parameters(net))
    assert W.shape == block.shape
    a, z = own_inputs(block, s.grouped_a), preactivation(net, x, z)
    features_last = isinstance(
        net, nn.Linear | nn.Embedding | nn.LayerNorm | nn.RMSNorm | nn.MultiheadAttention | Conv1D
    )
    h = (
        z.reshape(len(x), -1, z.shape[-1])
        if features_last
        else z.flatten(2).transpose(1, 2)
        if z.ndim > 2
        else z[:, None]
    )
    assert torch.equal(s.h, h)
    assert a.shape == (*h.shape, block.shape[1])
    assert_near((a * W).sum(-1), h)


def assert_rows(net: nn.Module, x: Tensor) -> None:
    """Per-sample gradients of ⟨v, h⟩ by torch.func, for every vector v sent back; and their mean by
    autograd.
    """
    block, s, vectors, _ = passed(net, x)

    def product(values: dict[str, Tensor], one: Tensor, v: Tensor) -> Tensor:
        return (output(net, one[None], values)[0] * v).sum()

    for row, v in zip(s.rows, vectors, strict=True):
        assert_near(
            row, laid_out(block, vmap(grad(product), (None, 0, 0))(parameters(net), x, v), 1)
        )
    assert_gradient(net, x)


def assert_gradient(net: nn.Module, x: Tensor) -> None:
    """The gradient of the whole batch is autograd's, and the sum of the rows."""
    block, s, (v,), _ = passed(net, x, 1)
    weights = {name: p for name, p in net.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad((output(net, x) * v).sum() / len(x), list(weights.values()))
    dense = [g.to_dense() if g.is_sparse else g for g in grads]
    assert_near(s.gradient, laid_out(block, dict(zip(weights, dense, strict=True))))
    assert_near(s.rows[0].sum(0) / len(x), s.gradient)


@examples
def test_rules_read_the_layer_as_one_matrix(
    make: Callable[[], nn.Module], x: Callable[[], Tensor]
) -> None:
    net = seeded(make)
    block, s, _, _ = passed(net, x())
    assert s.grouped_a.ndim == (3 if block.groups == 1 else 4)
    assert s.grouped_a.shape[2:-1] == (() if block.groups == 1 else (block.groups,))
    assert block.shape[0] % block.groups == 0
    assert_reads(net, x())


@examples
def test_rows_are_per_sample_gradients(
    make: Callable[[], nn.Module], x: Callable[[], Tensor]
) -> None:
    net: Any = seeded(make)
    if getattr(net, "sparse", False):
        assert_gradient(net, x())
        net.sparse = False  # torch.func has no sparse gradients
    assert_rows(net, x())


@examples
def test_statistics_of_one_input_are_refused_where_outputs_see_several(
    make: Callable[[], nn.Module], x: Callable[[], Tensor]
) -> None:
    block, s, _, _ = passed(seeded(make), x())
    for name in ("a", "A"):
        if block.groups == 1:
            assert getattr(s, name).shape[-1] == block.shape[1]
        else:
            with pytest.raises(
                CurvlabError, match=rf"block 1 .* has {block.groups} groups of outputs, .* use rows"
            ):
                getattr(s, name)


BOTH = [
    c for case in EXAMPLES.values() for c in case.values() if len(parameters(seeded(c[0]))) == 2
]


@pytest.mark.parametrize(("make", "x"), BOTH)
@pytest.mark.parametrize("frozen", ["weight", "bias"])
def test_a_frozen_weight_or_bias_of_every_rule(
    make: Callable[[], nn.Module], x: Callable[[], Tensor], frozen: str
) -> None:
    """The one that trains alone has the same gradient as before; a bias alone belongs to no
    rule.
    """
    net = seeded(make)
    everything, s, _, _ = passed(seeded(make), x(), 1)
    weight, bias = everything.params
    still, other = (weight, bias) if frozen == "weight" else (bias, weight)
    net.get_parameter(still).requires_grad_(False)
    (block,) = blocks(net)
    with Capture(net, (block,)) as capture:
        z = output(net, x())
    found = block.scatter(
        capture.backward(z, normal(1, *z.shape, seed=5), leaves=True)["1"].gradient
    )
    assert (list(found), block.layer is None) == ([other], frozen == "weight")
    assert_near(found[other], everything.scatter(s.gradient)[other])


Hyper = dict[str, Any]


@st.composite
def convolutions(draw: st.DrawFn) -> tuple[int, Hyper, tuple[int, ...]]:
    """(spatial axes, hyper-parameters, input shape): every argument that a convolution has."""
    axes, groups = draw(st.integers(1, 3)), draw(st.sampled_from([1, 1, 2, 3]))
    each = st.tuples(*[st.integers(1, 3)] * axes)
    kernel, dilation = draw(each), draw(st.tuples(*[st.integers(1, 2)] * axes))
    extent = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    padding = draw(
        st.sampled_from(["same", "valid"]) | st.tuples(*[st.integers(0, e - 1) for e in extent])
    )
    hyper = {
        "in_channels": groups * draw(st.integers(1, 2)),
        "out_channels": groups * draw(st.integers(1, 2)),
        "kernel_size": kernel,
        "dilation": dilation,
        "groups": groups,
        "padding": padding,
        "stride": 1 if padding == "same" else draw(each),
        "padding_mode": draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"])),
        "bias": draw(st.booleans()),
    }
    return axes, hyper, (hyper["in_channels"], *(e + draw(st.integers(0, 2)) for e in extent))


EVEN: Hyper = {
    "in_channels": 4,
    "out_channels": 2,
    "kernel_size": (4, 2),
    "dilation": (1, 2),
    "padding": "same",
    "groups": 2,
}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@FEW
@example((2, EVEN, (4, 5, 4)))
@example((2, EVEN | {"padding_mode": "circular"}, (4, 5, 4)))
@given(convolutions())
def test_convolutions_of_all_hyperparameters(case: tuple[int, Hyper, tuple[int, ...]]) -> None:
    axes, hyper, shape = case
    net = seeded(lambda: {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[axes](**hyper))
    x = normal(3, *shape)
    (block,) = blocks(net)
    assert block.groups == hyper["groups"]
    assert_reads(net, x)
    assert_rows(net, x)


class Unbatched(nn.Module):
    """A convolution of one example after the other, each without the batch axis."""

    def __init__(self, make: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.layer = make()

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.layer(one) for one in x]).flatten(1).sin()


@pytest.mark.parametrize(
    "make",
    [lambda: nn.Conv1d(2, 3, 2), lambda: nn.Conv2d(2, 3, 2), lambda: nn.Conv3d(2, 3, 2)],
    ids=["1d", "2d", "3d"],
)
@pytest.mark.filterwarnings("ignore:.*takes the general route")
def test_a_convolution_needs_the_batch_axis(make: Callable[[], nn.Module]) -> None:
    """Without one it has no rule: its block goes the general way, and has a gradient but no
    rows.
    """
    net: Any = seeded(lambda: Unbatched(make))
    axes = len(net.layer.kernel_size)
    x = normal(4, 2, *[3] * axes)
    rule = FUNCTIONS[{1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[axes]]
    assert rule.covers(rule.bind((x, net.layer.weight, net.layer.bias), {}))
    assert not rule.covers(rule.bind((x[0], net.layer.weight, net.layer.bias), {}))
    objective, y = cl.Objective(net, Gaussian()), normal(*net(x).shape, seed=2)
    plain, (block,) = Plain(net, x, y, Gaussian().loss), objective.blocks
    assert objective.check(x, y).ways == {"1": "general"}
    s = objective.closure(x, y).observe().passes["data"]["1"]
    assert_near(s.gradient, laid_out(block, plain.mean_gradient))
    with pytest.raises(
        CurvlabError,
        match=r"^block 1 \(layer\.weight, layer\.bias\) is used by a call without a rule",
    ):
        _ = s.rows
    assert_near(
        laid_out(block, cl.exact.gradients(objective, x, y), 1), laid_out(block, plain.gradients, 1)
    )
    for kind in ("ef", "ggn", "hessian"):
        assert_near(cl.exact.matrix(objective, x, y, kind, "1").dense(), plain.matrix(kind, block))


NORMS: dict[str, Example] = {
    "1d": (lambda: nn.BatchNorm1d(3), lambda: normal(5, 3)),
    "1d, places": (lambda: nn.BatchNorm1d(3), lambda: normal(5, 3, 4)),
    "2d": (lambda: nn.BatchNorm2d(3), lambda: normal(5, 3, 2, 2)),
    "3d": (lambda: nn.BatchNorm3d(2), lambda: normal(5, 2, 2, 1, 2)),
    "no running statistics": (
        lambda: nn.BatchNorm1d(3, track_running_stats=False),
        lambda: normal(5, 3),
    ),
    "none in eval either": (
        lambda: nn.BatchNorm1d(3, track_running_stats=False).eval(),
        lambda: normal(5, 3),
    ),
}


@pytest.mark.parametrize("case", NORMS)
def test_batch_norm_in_training(case: str) -> None:
    """It normalises by the batch's own moments: the rows share the batch, their mean is autograd's
    gradient of it.
    """
    make, x = NORMS[case]
    net: Any = seeded(make)
    before = {name: b.clone() for name, b in net.named_buffers()}
    assert_reads(net, x())
    assert_gradient(net, x())
    if before and net.training:
        # one for each forward pass of this test: reading `a` counts none
        assert int(net.num_batches_tracked) == 3
        assert not torch.equal(net.running_mean, before["running_mean"])


def moved(net: nn.Module) -> None:
    """A later pass in training moves the statistics."""
    net.train()
    net(10 + normal(5, 3, seed=9))


LATER: dict[str, Callable[[nn.Module], object]] = {"train": moved, "eval": lambda net: net.eval()}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("later", LATER)
def test_batch_norm_is_read_as_it_stood_in_the_pass(training: bool, later: str) -> None:
    """Statistics are read when first asked for; what the module does after the pass must not
    matter.
    """
    nets = [seeded(lambda: eval_norm(nn.BatchNorm1d(3))).train(training) for _ in range(2)]
    (_, at_once, _, _), (_, late, _, _) = (passed(net, normal(5, 3)) for net in nets)
    expected = at_once.grouped_a
    LATER[later](nets[1])
    assert torch.equal(late.grouped_a, expected)


UNRULED: dict[str, Callable[[], nn.Module]] = {
    "max_norm": lambda: nn.Embedding(6, 3, max_norm=1.0),
    "scale_grad_by_freq": lambda: nn.Embedding(6, 3, scale_grad_by_freq=True),
    "two axes": lambda: nn.LayerNorm((2, 3)),
    "two axes, RMS": lambda: nn.RMSNorm((2, 3)),
    "transposed convolution": lambda: nn.ConvTranspose1d(2, 3, 2),
    "bilinear": lambda: nn.Bilinear(2, 3, 2),
    "instance norm": lambda: nn.InstanceNorm1d(3, affine=True),
}


@pytest.mark.parametrize("case", UNRULED)
def test_what_no_rule_covers_is_a_block_for_each_parameter(case: str) -> None:
    net = UNRULED[case]()
    found = blocks(net)
    assert [(b.params, b.shape) for b in found] == [
        ((n,), tuple(p.shape)) for n, p in net.named_parameters()
    ]
    assert all(b.layer is None and b.module is None and b.groups == 1 for b in found)


def test_the_gradient_of_what_no_rule_covers_is_autograds() -> None:
    net = nn.Sequential(
        nn.Linear(3, 6),
        nn.Unflatten(1, (2, 3)),
        nn.LayerNorm((2, 3)),
        nn.Flatten(),
        nn.Linear(6, 2),
    ).double()
    objective = cl.Objective(net, cl.likelihoods.Gaussian())
    closure = objective.closure(normal(5, 3), normal(5, 2))
    gradients = closure.observe().gradients
    closure()
    assert [b.layer is None for b in objective.blocks] == [False, True, True, False]
    for block in objective.blocks:
        assert_near(
            gradients[block.name],
            laid_out(block, {n: grad_of(net.get_parameter(n)) for n in block.params}),
        )


@pytest.mark.parametrize(
    "make",
    [lambda: nn.LayerNorm(3, elementwise_affine=False), lambda: nn.BatchNorm1d(3, affine=False)],
)
def test_a_norm_without_parameters_is_no_block(make: Callable[[], nn.Module]) -> None:
    assert layout(nn.Sequential(nn.Linear(2, 3), make())) == [("1", ("0.weight", "0.bias"), (3, 3))]


def test_shapes_of_the_blocks_of_every_kind_of_layer() -> None:
    """[O, I] with the bias as last column; one input for each output of a norm; the inputs of one
    group alone.
    """
    assert layout(problem("conv-1d").model) == [
        ("1", ("0.weight", "0.bias"), (4, 5)),
        ("2", ("2.weight", "2.bias"), (3, 13)),
        ("3", ("3.weight", "3.bias"), (3, 2)),
        ("4", ("5.weight", "5.bias"), (3, 7)),
    ]
    assert [b.groups for b in blocks(problem("conv-1d").model)] == [2, 1, 3, 1]
    assert layout(problem("embedding").model)[0] == ("1", ("words.weight",), (4, 6))
