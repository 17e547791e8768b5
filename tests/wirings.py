"""Random models: operations one after the other, drawn by a small grammar; [N, T, …] in, [N, C]
out.

Every operation keeps the examples apart, however it lays them out: [N, T, F], [T, N, F], [N, F, T],
or rows of N·T in either order. An operation on a weight that is there already takes one that fits,
or makes and uses one first, so that each is itself also when it stands alone. Models look weights
up when they run, so that they may be replaced from outside.

Legend: N examples, T places, F features of a place.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SYMBOLS, CLASSES, FEATURES = 5, 3, 2

Choose = Callable[[Sequence[Any]], Any]
"""One of several."""

Step = Callable[[Tensor], Tensor]


# ------------------------------------------------------------------------------------------------
# layouts

LAYOUTS: dict[str, tuple[Step, Callable[[Tensor, int], Tensor]]] = {
    "NTF": (lambda h: h, lambda h, T: h),
    "TNF": (lambda h: h.transpose(0, 1), lambda h, T: h.transpose(0, 1)),
    "NFT": (lambda h: h.transpose(1, 2), lambda h, T: h.transpose(1, 2)),
    "N·T,F": (lambda h: h.flatten(0, 1), lambda h, T: h.unflatten(0, (-1, T))),
    "T·N,F": (
        lambda h: h.transpose(0, 1).flatten(0, 1),
        lambda h, T: h.unflatten(0, (T, -1)).transpose(0, 1),
    ),
}
"""{name: (from [N, T, F], back to it)}."""

LAST = ["NTF", "TNF", "N·T,F", "T·N,F"]
"""Features last."""

CHANNELS = ["NFT", "N·T,F", "T·N,F"]
"""Features second, as norms over channels take them."""


class Wiring(nn.Module):
    """What was drawn, in order; `words` says it."""

    def __init__(self, T: int) -> None:
        super().__init__()
        self.T = T
        self.words: list[str] = []
        self.steps: list[Step] = []
        self.parts, self.loose = nn.ModuleList(), nn.ParameterList()
        self.tokens: Any = None  # of the minibatch at hand

    def add(self, part: nn.Module) -> Any:
        self.parts.append(part)
        return part

    def add_loose(self, *shape: int) -> Callable[[], Tensor]:
        """A parameter of no layer, read when the model runs."""
        self.loose.append(nn.Parameter(torch.randn(shape)))
        at = len(self.loose) - 1
        return lambda: self.loose[at]

    def linears(self, into: int | None = None, out: int | None = None) -> list[nn.Linear]:
        found = [part for part in self.parts if isinstance(part, nn.Linear)]
        return [p for p in found if into in (None, p.in_features) and out in (None, p.out_features)]

    def embeddings(self, width: int) -> list[nn.Embedding]:
        found = [part for part in self.parts if isinstance(part, nn.Embedding)]
        return [p for p in found if p.embedding_dim == width and p.num_embeddings == SYMBOLS]

    def forward(self, x: Tensor) -> Tensor:
        self.tokens = x
        h = x
        for step in self.steps:
            h = step(h)
        self.tokens = None
        return h


Made = tuple[Step, int]
"""What an operation does, and how many features it leaves."""


def _linear(choose: Choose, net: Wiring, width: int, out: int = 0) -> nn.Linear:
    return net.add(nn.Linear(width, out or choose([2, 4]), bias=choose([True, False])))


def _earlier(
    choose: Choose, net: Wiring, into: int | None = None, out: int | None = None
) -> tuple[nn.Linear, Step]:
    """A linear layer that has been used before, and what is done before it is used again."""
    known = net.linears(into, out)
    if known:
        return choose(known), lambda h: h
    width = into or out
    assert width is not None
    layer = _linear(choose, net, width, width)
    return layer, lambda h: torch.tanh(layer(h))


# ------------------------------------------------------------------------------------------------
# operations


def linear(choose: Choose, net: Wiring, width: int, layout: str) -> Made:
    layer = _linear(choose, net, width)
    return layer, layer.out_features


def again(choose: Choose, net: Wiring, width: int, layout: str) -> Made:
    """One module twice."""
    layer, before = _earlier(choose, net, into=width)
    return lambda h: layer(before(h)), layer.out_features


def functional(choose: Choose, net: Wiring, width: int, layout: str) -> Made:
    """Its weight by another function."""
    layer, before = _earlier(choose, net, into=width)
    ways: dict[str, Step] = {
        "F.linear": lambda h: F.linear(h, layer.weight, layer.bias),
        "@": lambda h: h @ layer.weight.mT,
        "matmul": lambda h: torch.matmul(layer.weight, h.mT).mT,
        "einsum": lambda h: torch.einsum("...i,oi->...o", h, layer.weight),
        "forward": lambda h: layer.forward(h),
        "called by name": lambda h: torch.func.functional_call(
            layer, {"weight": layer.weight * 2}, (h,)
        ),
    }
    way = ways[choose(list(ways))]
    return lambda h: way(before(h)), layer.out_features


def transposed(choose: Choose, net: Wiring, width: int, layout: str) -> Made:
    """Wᵀ of an earlier layer, as tied autoencoders have it."""
    layer, before = _earlier(choose, net, out=width)
    ways: list[Step] = [
        lambda h: F.linear(h, layer.weight.t()),
        lambda h: F.linear(h, layer.weight.T),
        lambda h: h @ layer.weight,
    ]
    way = choose(ways)
    return lambda h: way(before(h)), layer.in_features


def shared(choose: Choose, net: Wiring, width: int, layout: str) -> Made:
    """One Parameter in two modules, the bias of each its own."""
    layer, before = _earlier(choose, net, into=width)
    other = net.add(nn.Linear(width, layer.out_features))
    other.weight = layer.weight
    return lambda h: other(before(h)), layer.out_features


def read(choose: Choose, net: Wiring, width: int, layout: str) -> Made:
    """Scores against a table and what it holds: an embedding's weight as a linear layer, twice."""
    known = net.embeddings(width)
    table = choose(known) if known else net.add(nn.Embedding(SYMBOLS, width))
    return lambda h: F.linear(h, table.weight).softmax(-1) @ table.weight, width


def symbols(choose: Choose, net: Wiring, width: int, layout: str) -> Made:
    """The tokens' embeddings again, or the positions'."""
    into, _ = LAYOUTS[layout]
    known = net.embeddings(width)
    if known and choose([True, False]):
        table = choose(known)
        return lambda h: h + into(table(_tokens(net))), width
    table = net.add(nn.Embedding(net.T + 1, width))
    one = choose([True, False])

    def positions(h: Tensor) -> Tensor:
        at = table(torch.arange(net.T)) if one else table(torch.arange(net.T)[None])[0]
        return h + into(at[None].expand(len(net.tokens), -1, -1))

    return positions, width


def _tokens(net: Wiring) -> Tensor:
    return net.tokens if not net.tokens.is_floating_point() else (net.tokens.sum(-1) > 0).long()


def learned(choose: Choose, net: Wiring, width: int, layout: str) -> Made:
    """Parameters of no layer: a shift of every place, or a scale of every feature, or one of
    all.
    """
    into, _ = LAYOUTS[layout]
    weight = net.add_loose(*choose([(net.T, width), (width,), (1,)]))
    shifts = choose([True, False])

    def apply(h: Tensor) -> Tensor:
        w = into(weight().expand(len(net.tokens), net.T, width))
        return h + w if shifts else h * w

    return apply, width


def looked_up(choose: Choose, net: Wiring, width: int, layout: str) -> Made:
    """A linear layer's weight as a table of the tokens, one of them padding or none; and as a
    layer.
    """
    into, _ = LAYOUTS[layout]
    layer, padding = net.add(nn.Linear(width, SYMBOLS, bias=False)), choose([None, 0])

    def apply(h: Tensor) -> Tensor:
        seen = into(F.embedding(_tokens(net), layer.weight, padding_idx=padding))
        return h * seen + layer(h)[..., :1]

    return apply, width


def shared_bias(choose: Choose, net: Wiring, width: int, layout: str) -> Made:
    """One bias in two modules, or twice in one."""
    one, other = net.add(nn.Linear(width, width)), net.add(nn.Linear(width, width))
    if choose([True, False]):
        other.bias = one.bias
        return lambda h: other(torch.tanh(one(h))), width
    return lambda h: other(torch.tanh(one(h))) + one.bias, width


def scaled(choose: Choose, net: Wiring, width: int, layout: str) -> Made:
    """By a number that a weight makes."""
    layer, before = _earlier(choose, net, into=width)
    return lambda h: before(h) * layer.weight.norm(), width


def normalised(choose: Choose, net: Wiring, width: int, layout: str) -> Made:
    """A layer norm of two features is a sign, almost: not that."""
    kinds: list[Callable[[], nn.Module]] = []
    if layout in LAST:
        kinds += [lambda: nn.RMSNorm(width)]
    if layout in LAST and width > 2:
        kinds += [lambda: nn.LayerNorm(width), lambda: nn.LayerNorm(width, bias=False)]
    if layout == "NTF":
        kinds += [lambda: nn.LayerNorm((net.T, width)), lambda: nn.RMSNorm((net.T, width))]
    if layout in CHANNELS:
        kinds += [lambda: nn.BatchNorm1d(width)]
    if layout == "NFT":
        kinds += [lambda: nn.GroupNorm(1, width), lambda: nn.InstanceNorm1d(width, affine=True)]
    return net.add(choose(kinds)()), width


def normalised_again(choose: Choose, net: Wiring, width: int, layout: str) -> Made:
    """One norm twice; its weight by the function, with another's bias; or by itself."""
    layer, other = net.add(nn.RMSNorm(width)), net.add(nn.LayerNorm(width))
    ways: dict[str, Step] = {
        "module": lambda h: layer(torch.sin(layer(h))),
        "function": lambda h: (
            F.layer_norm(layer(h), (width,), layer.weight, other.bias)
            * F.rms_norm(h, (width,), other.weight)
        ),
        "itself": lambda h: layer(h) * other.weight + other.bias,
    }
    return ways[choose([name for name in ways if width > 2 or name != "function"])], width


def convolution(choose: Choose, net: Wiring, width: int, layout: str) -> Made:
    out = choose([2, 4])
    made: list[Callable[[], nn.Module]] = [
        lambda: nn.Conv1d(width, out, 3, padding=1),
        lambda: nn.Conv1d(width, out, 3, padding=2, dilation=2, groups=2, bias=False),
        lambda: nn.Conv1d(width, out, 1),
        lambda: nn.ConvTranspose1d(width, out, 3, padding=1),
    ]
    layer = net.add(choose(made)())
    if out == width and choose([True, False]):
        return lambda h: layer(torch.tanh(layer(h))), out
    return layer, out


def image(choose: Choose, net: Wiring, width: int, layout: str) -> Made:
    """[N, 1, T, F] as an image of one channel."""
    layer = net.add(nn.Conv2d(1, 1, (3, 1), padding=(1, 0)))
    return lambda h: layer(h[:, None])[:, 0], width


def along_places(choose: Choose, net: Wiring, width: int, layout: str) -> Made:
    """A linear layer whose features are the places, and whose places the features."""
    layer = net.add(nn.Linear(net.T, net.T))
    return layer, width


def attention(choose: Choose, net: Wiring, width: int, layout: str) -> Made:
    first, mask, weights = layout == "NTF", choose(["", "causal", "padding"]), choose([True, False])
    layer = net.add(
        nn.MultiheadAttention(width, choose([1, 2]), batch_first=first, bias=choose([True, False]))
    )

    def attend(h: Tensor) -> Tensor:
        given: dict[str, object] = {"need_weights": weights}
        if mask == "causal":
            given["attn_mask"] = torch.ones(net.T, net.T, dtype=torch.bool).triu(1)
        if mask == "padding":
            given["key_padding_mask"] = (torch.arange(net.T) == net.T - 1).expand(
                len(net.tokens), -1
            )
        return layer(h, h, h, **given)[0]

    return attend, width


def attention_by_hand(choose: Choose, net: Wiring, width: int, layout: str) -> Made:
    """Queries, keys and values of one layer, of three, or of one used three times; heads as an
    axis.
    """
    way, fused, heads = choose(["one", "three", "same"]), choose([True, False]), choose([1, 2])
    count = {"one": 1, "three": 3, "same": 1}[way]
    layers = [
        _linear(choose, net, width, 3 * width if way == "one" else width) for _ in range(count)
    ]

    def split(h: Tensor) -> Tensor:
        return h.unflatten(-1, (heads, -1)).transpose(1, 2)

    def attend(h: Tensor) -> Tensor:
        if way == "one":
            q, k, v = layers[0](h).chunk(3, -1)
        else:
            q, k, v = (layers[min(i, count - 1)](torch.sin(h * (i + 1))) for i in range(3))
        q, k, v = split(q), split(k), split(v)
        if fused:
            seen = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            seen = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1) @ v
        return seen.transpose(1, 2).flatten(2)

    return attend, width


def masked(choose: Choose, net: Wiring, width: int, layout: str) -> Made:
    """Of the weight, or of the last place."""
    layer, before = _earlier(choose, net, into=width)
    if choose([True, False]):
        mask = (torch.arange(layer.weight.numel()) % 3 > 0).view(layer.weight.shape)
        return lambda h: F.linear(before(h), layer.weight * mask), layer.out_features
    into, _ = LAYOUTS[layout]

    def without_the_last(h: Tensor) -> Tensor:
        mask = (torch.arange(net.T) < net.T - 1)[None, :, None].expand(len(net.tokens), -1, 1)
        return layer(before(h)).masked_fill(~into(mask), 0.5)

    return without_the_last, layer.out_features


def hooked(choose: Choose, net: Wiring, width: int, layout: str) -> Made:
    layer = _linear(choose, net, width)
    kind = choose(["after", "before", "replaced"])
    if kind == "after":
        layer.register_forward_hook(
            choose([lambda m, x, h: torch.tanh(h), lambda m, x, h: 2 * h, lambda m, x, h: h + 1])
        )
    elif kind == "before":
        layer.register_forward_pre_hook(lambda m, x: (torch.sin(x[0]),))
    else:
        whole: Any = layer
        whole.forward = lambda h: F.linear(h, layer.weight / 2, layer.bias)
    return layer, layer.out_features


def doubled(choose: Choose, net: Wiring, width: int, layout: str) -> Made:
    """Two views of every example in one batch: all of one first, or side by side."""
    layer, side = _linear(choose, net, width, width), choose([True, False])

    def apply(h: Tensor) -> Tensor:
        if side:
            return (
                layer(torch.stack([h, torch.sin(h)], 1).flatten(0, 1)).unflatten(0, (-1, 2)).sum(1)
            )
        a, b = layer(torch.cat([h, torch.sin(h)])).chunk(2)
        return a * b

    return apply, width


def shuffled(choose: Choose, net: Wiring, width: int, layout: str) -> Made:
    """Examples in another order inside: turned round, by the data (as packed sequences), or two of
    the middle exchanged.
    """
    layer, way, axis = (
        _linear(choose, net, width),
        choose(["turned", "sorted", "exchanged"]),
        1 if layout == "TNF" else 0,
    )

    def apply(h: Tensor) -> Tensor:
        order = torch.arange(h.shape[axis])
        if way == "turned":
            order = order.flip(0)
        if way == "sorted":
            order = h.detach().select(1 - axis, 0).sum(-1).argsort()
        if way == "exchanged" and len(order) > 3:
            order = order[[0, 2, 1, *range(3, len(order))]]
        return layer(h.index_select(axis, order)).index_select(axis, order.argsort())

    return apply, layer.out_features


def routed(choose: Choose, net: Wiring, width: int, layout: str) -> Made:
    """Places go to one of two layers, each of which sees those that are its own, one after the
    other.
    """
    layers = [_linear(choose, net, width, width) for _ in range(2)]

    def apply(h: Tensor) -> Tensor:
        left = h.detach()[..., 0] > 0
        out = torch.zeros_like(h)
        for mine, layer in zip((left, ~left), layers, strict=True):
            out = out.masked_scatter(mine[..., None], layer(h[mine]))
        return out

    return apply, width


def many_times(choose: Choose, net: Wiring, width: int, layout: str) -> Made:
    """One layer as every layer of a deep model."""
    layer, count = _linear(choose, net, width, width), choose([3, 5])

    def apply(h: Tensor) -> Tensor:
        for _ in range(count):
            h = torch.tanh(h + layer(h))
        return h

    return apply, width


def some_places(choose: Choose, net: Wiring, width: int, layout: str) -> Made:
    """A prompt: the first places only, by slice or by mask."""
    layer, by_mask = _linear(choose, net, width, width), choose([True, False])

    def apply(h: Tensor) -> Tensor:
        if by_mask:
            at = torch.arange(h.shape[1]) < 2
            return torch.cat([layer(h[:, at]), h[:, ~at]], 1)
        return torch.cat([layer(h[:, :1]), h[:, 1:]], 1)

    return apply, width


def one_by_one(choose: Choose, net: Wiring, width: int, layout: str) -> Made:
    """A call for every example, or for every place: neither has an axis of examples that a layer
    could see.
    """
    layer, axis = _linear(choose, net, width), choose([0, 1])
    return lambda h: torch.stack([layer(part) for part in h.unbind(axis)], axis), layer.out_features


def vmapped(choose: Choose, net: Wiring, width: int, layout: str) -> Made:
    layer = _linear(choose, net, width)
    return lambda h: torch.vmap(layer)(h), layer.out_features


def recurrent(choose: Choose, net: Wiring, width: int, layout: str) -> Made:
    out = choose([2, 4])
    layer = net.add(choose([nn.GRU, nn.RNN, nn.LSTM])(width, out, batch_first=layout == "NTF"))
    return lambda h: layer(h)[0], out


def bilinear(choose: Choose, net: Wiring, width: int, layout: str) -> Made:
    layer = net.add(nn.Bilinear(width, width, 2))
    return lambda h: layer(h, torch.sin(h)), 2


def held(choose: Choose, net: Wiring, width: int, layout: str) -> Made:
    """A layer that runs, but not for the gradient; one that does both; one that does not run at
    all.
    """
    layer, way = _linear(choose, net, width, width), choose(["detached", "no_grad", "data", "idle"])

    def apply(h: Tensor) -> Tensor:
        if way == "idle":
            return h
        if way == "detached":
            return h + F.linear(h, layer.weight.detach()) * layer(h).detach()
        if way == "data":
            return layer(h) * h.data
        with torch.no_grad():
            gate = layer(h)
        return layer(h) * gate

    return apply, width


_ANYWHERE = [
    linear,
    again,
    functional,
    transposed,
    shared,
    shared_bias,
    read,
    looked_up,
    scaled,
    symbols,
    learned,
    normalised_again,
]
_ANYWHERE += [masked, hooked, doubled, bilinear, held, many_times]

OPERATIONS: dict[str, tuple[Callable[[Choose, Wiring, int, str], Made], list[str]]] = {
    **{f.__name__: (f, LAST) for f in _ANYWHERE},
    **{
        f.__name__: (f, ["NTF", "TNF"])
        for f in (attention, recurrent, one_by_one, vmapped, shuffled, routed)
    },
    **{f.__name__: (f, ["NTF"]) for f in (image, attention_by_hand, some_places)},
    **{f.__name__: (f, ["NFT"]) for f in (convolution, along_places)},
    "normalised": (normalised, list(LAYOUTS)),
}
"""{name: (what makes it, layouts that it can take)}."""

ENDS = ["mean", "last", "flat", "each", "tied"]
"""Outputs from the mean over places, the last one, all of them, as a mean of outputs, or by an
embedding's weight.
"""


# ------------------------------------------------------------------------------------------------
# models


def _end(choose: Choose, net: Wiring, width: int, how: str) -> Step:
    if how == "tied":
        known = net.embeddings(width)
        table = choose(known) if known else net.add(nn.Embedding(SYMBOLS, width))
        return lambda h: F.linear((h + table(_tokens(net))).mean(1), table.weight)
    head = net.add(nn.Linear(width * net.T if how == "flat" else width, CLASSES))
    return {
        "mean": lambda h: head(h.mean(1)),
        "last": lambda h: head(h[:, -1]),
        "flat": lambda h: head(h.flatten(1)),
        "each": lambda h: head(h.transpose(0, 1)).mean(0),
    }[how]


def wiring(
    choose: Choose, T: int, names: Sequence[tuple[str, str]] | None = None, how: str | None = None
) -> tuple[Wiring, bool]:
    """A model in eval mode, and whether it takes symbols. `names`: (operation, layout) of each;
    drawn where there are none.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        net = Wiring(T)
        takes_symbols = choose([True, False])
        width = choose([2, 4]) if takes_symbols else FEATURES
        net.words.append("symbols" if takes_symbols else "numbers")
        if takes_symbols:
            table, first = net.add(nn.Embedding(SYMBOLS, width)), choose([True, False])
            net.steps.append(lambda x: table(x) if first else table(x.t()).transpose(0, 1))
        for _ in range(choose([1, 2, 3, 4]) if names is None else len(names)):
            drawn = choose(list(OPERATIONS)) if names is None else names[len(net.words) - 1][0]
            make, layouts = OPERATIONS[drawn]
            layout = choose(layouts) if names is None else names[len(net.words) - 1][1]
            step, left = make(choose, net, width, layout)
            residual = left == width and choose([True, False])
            net.words.append(f"{drawn} [{layout}]{' +' if residual else ''}")
            net.steps.append(_applied(step, layout, T, residual, choose([torch.tanh, torch.sin])))
            width = left
        how = how or choose(ENDS)
        net.steps.append(_end(choose, net, width, how))
        net.words.append(how)
        net = net.double()
        with torch.no_grad():
            for weight in net.parameters():
                if bool((weight == weight.flatten()[0]).all()):
                    weight.add_(torch.randn_like(weight), alpha=0.3)
            for name, buffer in net.named_buffers():
                if "running" in name:
                    buffer.uniform_(0.5, 2)
        return net.eval(), takes_symbols


def _applied(step: Step, layout: str, T: int, residual: bool, activation: Step) -> Step:
    into, back = LAYOUTS[layout]

    def apply(h: Tensor) -> Tensor:
        g = into(h)
        return back(activation(g + step(g) if residual else step(g)), T)

    return apply


def minibatch(N: int, T: int, takes_symbols: bool) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(6)
    y = torch.arange(N) * 2 % CLASSES
    if takes_symbols:
        return torch.randint(SYMBOLS, (N, T), generator=generator), y
    return torch.randn(N, T, FEATURES, generator=generator, dtype=torch.float64), y
