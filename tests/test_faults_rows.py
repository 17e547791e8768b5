"""Row n of a layer is not example n: other orders of axes, rows that are places, permuted, doubled,
fewer, or of no example.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from oracle import Case, Net, numbers, tokens, weight
from test_faults import WHAT, ask, layers
from torch import Tensor, nn
from torch.nn import functional as F

pytestmark = pytest.mark.filterwarnings("ignore::curvlab.errors.CurvlabWarning")


def axes(*order: int) -> nn.Module:
    """A layer that sees the axes of [N, A, B, F] in another order."""
    back = [order.index(i) for i in range(4)]
    return Net(
        lambda m, x: m.b(torch.tanh(m.a(x.permute(*order))).permute(*back).mean((1, 2))),
        **layers(a=(3, 4), b=(4, 3)),
    )


def batch_last(m: Net, x: Tensor) -> Tensor:
    """The batch is the last axis: a weight times columns."""
    return m.b((m.w @ torch.tanh(m.a(x)).mT).mT)


def channels(m: Net, x: Tensor) -> Tensor:
    """A convolution of one channel over time with the batch among the channels would mix examples;
    with groups it does not.
    """
    h = F.conv1d(x[:, 0][None], m.filter.expand(len(x), -1, -1), groups=len(x), padding=1)[0]
    return m.b(torch.tanh(h))


def flat(m: Net, x: Tensor) -> Tensor:
    return m.b(torch.tanh(m.a(x.reshape(-1, x.shape[-1]))).view(len(x), -1, 4).mean(1))


def flat_places_first(m: Net, x: Tensor) -> Tensor:
    h = torch.tanh(m.a(x.transpose(0, 1).reshape(-1, x.shape[-1])))
    return m.b(h.view(x.shape[1], len(x), 4).mean(0))


def flat_with_norm(m: Net, x: Tensor) -> Tensor:
    return m.b(m.norm(m.a(x.reshape(-1, x.shape[-1]))).tanh().view(len(x), -1, 4).mean(1))


def both(m: Net, x: Tensor) -> Tensor:
    """One layer, batch first here and places first there."""
    return m.b(torch.tanh(m.a(x)).mean(1) * torch.tanh(m.a(x.transpose(0, 1))).mean(0))


def positions(shape: str) -> nn.Module:
    def run(m: Net, x: Tensor) -> Tensor:
        t = torch.arange(x.shape[1])
        place = {"T": t, "1T": t[None], "T1": t[:, None], "NT": t.expand(len(x), -1)}[shape]
        found = m.pos(place)
        return m.head(torch.tanh(m.tok(x) + (found.squeeze(1) if shape == "T1" else found)).mean(1))

    return Net(run, tok=nn.Embedding(6, 4), pos=nn.Embedding(8, 4), head=nn.Linear(4, 3))


def constant(expand: bool, ndim: int = 2) -> nn.Module:
    def run(m: Net, x: Tensor) -> Tensor:
        c = m.c if ndim == 1 else m.c[None]
        c = c.expand(len(x), -1) if expand else c
        return m.b(torch.tanh(m.a(x)) * torch.tanh(m.k(c)))

    return Net(run, c=numbers(2), k=nn.Linear(2, 4), **layers(a=(4, 4), b=(4, 3)))


def relative(m: Net, x: Tensor) -> Tensor:
    """Relative positions: a table of [T, T] entries in attention."""
    t = torch.arange(x.shape[1])
    bias = m.table((t[:, None] - t[None] + 3).clamp(0, 6))[..., 0]
    return m.head((torch.softmax(x @ x.mT + bias, -1) @ m.v(x)).mean(1))


def class_token(m: Net, x: Tensor) -> Tensor:
    h = torch.cat([m.cls.expand(len(x), -1, -1), m.a(x)], 1)
    return m.head(m.layer(h)[:, 0])


def queries(m: Net, x: Tensor) -> Tensor:
    """Learned queries: their projection sees them alone, without the batch."""
    q = m.q(m.codes)
    return m.head((torch.softmax(q @ m.k(x).mT, -1) @ m.v(x)).mean(1))


def repeated(m: Net, x: Tensor) -> Tensor:
    return m.b(torch.tanh(m.a(x[:, None].expand(-1, 3, -1)) * m.s[:, None]).mean(1))


def interleaved(m: Net, x: Tensor) -> Tensor:
    h = m.a(x.repeat_interleave(2, 0) * torch.tensor([1.0, 2.0]).repeat(len(x))[:, None].to(x))
    return m.b(torch.tanh(h).view(len(x), 2, 4).mean(1))


def doubled(m: Net, x: Tensor) -> Tensor:
    """Two views of each example, one batch behind the other, as contrastive learning has them."""
    h = torch.tanh(m.a(torch.cat([x, x.flip(1)])))
    first, second = h.chunk(2)
    return m.b(first * second)


def crops(m: Net, x: Tensor) -> Tensor:
    """As many rows as examples, but each example's are elsewhere."""
    n = len(x)
    h = torch.tanh(m.a(torch.cat([x[:, :2], x[:, 2:]])))
    return m.b(torch.cat([h[:n], h[n:]], 1))


def permuted(m: Net, x: Tensor) -> Tensor:
    """Sorted by length, as recurrent nets were fed, and sorted back."""
    order = x[:, 0].argsort()
    return m.b(torch.tanh(m.a(x[order]))[order.argsort()])


def middle_permuted() -> Tensor:
    """The first and the last example stay where they are."""
    x = numbers(5, 4)
    x[:, 0] = torch.tensor([-3.0, 1.0, 0.0, -1.0, 3.0])
    return x


def reversed_rows(m: Net, x: Tensor) -> Tensor:
    return m.b(torch.tanh(m.a(x.flip(0))).flip(0))


def rolled(m: Net, x: Tensor) -> Tensor:
    return m.b(torch.tanh(m.a(x.roll(1, 0))).roll(-1, 0))


def packed(m: Net, x: Tensor) -> Tensor:
    """Sequences of several lengths, packed: rows are the places of all of them, longest first."""
    lengths = 1 + (x[:, :, 0] > 0).sum(1)
    found = nn.utils.rnn.pack_padded_sequence(
        m.a(x), lengths, batch_first=True, enforce_sorted=False
    )
    out, _ = m.cells(found)
    padded, _ = nn.utils.rnn.pad_packed_sequence(out, batch_first=True, total_length=x.shape[1])
    return m.b(padded.sum(1))


def packed_linear(m: Net, x: Tensor) -> Tensor:
    """Places that count, one behind the other; their number is that of no axis."""
    chosen = x[..., 0] > 0
    h = torch.tanh(m.a(x[chosen]))
    return m.b(
        x.new_zeros(*x.shape[:2], 4).masked_scatter(chosen[..., None].expand(-1, -1, 4), h).sum(1)
    )


def unfolded(m: Net, x: Tensor) -> Tensor:
    """A convolution by F.unfold and a linear layer."""
    return m.b(torch.tanh(m.a(F.unfold(x, 2).mT)).mean(1))


def windows(m: Net, x: Tensor) -> Tensor:
    """Windows of attention, counted with the batch."""
    w = x.reshape(len(x) * 2, 2, 3)
    h = torch.softmax(m.q(w) @ m.k(w).mT, -1) @ m.v(w)
    return m.b(h.view(len(x), 4, 3).mean(1))


def frames(m: Net, x: Tensor) -> Tensor:
    h = torch.tanh(m.c(x.flatten(0, 1))).mean((2, 3)).view(len(x), x.shape[1], -1)
    return m.b(h.mean(1))


def frames_first(m: Net, x: Tensor) -> Tensor:
    h = torch.tanh(m.c(x.transpose(0, 1).flatten(0, 1))).mean((2, 3)).view(x.shape[1], len(x), -1)
    return m.b(h.mean(0))


def transformer_of_space(m: Net, x: Tensor) -> Tensor:
    theta = m.where(x.flatten(1)).view(-1, 2, 3)
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    return m.b(F.grid_sample(x, grid, align_corners=False).flatten(1))


def graph(m: Net, x: Tensor) -> Tensor:
    """Each example its own adjacency, in the last columns of its nodes."""
    nodes, adjacency = x[..., :3], torch.softmax(x[..., 3:], -1)
    return m.b(torch.relu(adjacency @ m.a(nodes)).mean(1))


def block_graph(m: Net, x: Tensor) -> Tensor:
    """The graphs of a batch as one graph of N·V nodes: messages along edges, nodes summed by
    graph.
    """
    n, v = x.shape[:2]
    nodes = m.a(x.reshape(n * v, -1))
    ends = (torch.arange(n)[:, None] * v + (torch.arange(v) + 1) % v).flatten()
    nodes = torch.tanh(nodes + x.new_zeros(n * v, 4).index_add(0, ends, m.edge(nodes)))
    return m.b(x.new_zeros(n, 4).index_add(0, torch.arange(n).repeat_interleave(v), nodes))


def places_first_attention(m: Net, x: Tensor) -> Tensor:
    q = x.transpose(0, 1)
    return m.head(m.att(q, q, q, need_weights=False)[0].transpose(0, 1).mean(1))


def places_first_lstm(m: Net, x: Tensor) -> Tensor:
    return m.head(torch.tanh(m.pre(m.cells(x.transpose(0, 1))[0])).mean(0))


def no_batch_axis(m: Net, x: Tensor) -> Tensor:
    """One example after the other, by a loop."""
    return torch.stack([m.b(torch.tanh(m.a(row))) for row in x])


def by_vmap(m: Net, x: Tensor) -> Tensor:
    return torch.func.vmap(lambda row: m.b(torch.tanh(m.a(row))))(x)


def seq(run: Callable[[Net, Tensor], Tensor], **more: nn.Module) -> nn.Module:
    return Net(run, **layers(a=(3, 4), b=(4, 3)), **more)


CASES: dict[str, Case] = (
    {
        f"axes {''.join(map(str, order))}, N = {n}": Case(
            lambda order=order: axes(*order), (4, 2, 3), n
        )
        for order in ((1, 0, 2, 3), (2, 1, 0, 3), (1, 2, 0, 3), (2, 0, 1, 3))
        for n in (4, 5)
    }
    | {
        f"positions {shape}, N = {n}": Case(
            lambda shape=shape: positions(shape), lambda n=n: tokens(n, 3)
        )
        for shape in ("T", "1T", "T1", "NT")
        for n in (1, 3, 4)
    }
    | {
        "batch last": Case(lambda: Net(batch_last, w=weight(4, 4), **layers(a=(4, 4), b=(4, 3)))),
        "batch last, N = F": Case(
            lambda: Net(batch_last, w=weight(4, 4), **layers(a=(4, 4), b=(4, 3))), n=4
        ),
        "batch among the channels": Case(
            lambda: Net(channels, filter=weight(1, 1, 3), b=nn.Linear(4, 3)), (1, 4)
        ),
        "flat": Case(lambda: seq(flat), (2, 3)),
        "flat, N = T": Case(lambda: seq(flat), (4, 3), 4),
        "flat, T = 1": Case(lambda: seq(flat), (1, 3)),
        "flat, places first": Case(lambda: seq(flat_places_first), (2, 3)),
        "flat, places first, N = T": Case(lambda: seq(flat_places_first), (4, 3), 4),
        "flat, places first, T = 1": Case(lambda: seq(flat_places_first), (1, 3)),
        "flat with a norm": Case(lambda: seq(flat_with_norm, norm=nn.LayerNorm(4)), (2, 3)),
        "both orders": Case(lambda: seq(both), (3, 3)),
        "both orders, N = T": Case(lambda: seq(both), (4, 3), 4),
        "constant": Case(lambda: constant(False)),
        "constant, one axis": Case(lambda: constant(False, 1)),
        "constant, N = 1": Case(lambda: constant(False), n=1),
        "constant, expanded": Case(lambda: constant(True)),
        "relative positions": Case(
            lambda: Net(
                relative, table=nn.Embedding(7, 1), v=nn.Linear(3, 3), head=nn.Linear(3, 3)
            ),
            (4, 3),
            5,
        ),
        "relative positions, N = T": Case(
            lambda: Net(
                relative, table=nn.Embedding(7, 1), v=nn.Linear(3, 3), head=nn.Linear(3, 3)
            ),
            (4, 3),
            4,
        ),
        "class token": Case(
            lambda: Net(
                class_token,
                cls=weight(1, 1, 4),
                a=nn.Linear(3, 4),
                head=nn.Linear(4, 3),
                layer=nn.TransformerEncoderLayer(4, 2, 3, 0.0, batch_first=True),
            ),
            (2, 3),
            4,
        ),
        "learned queries": Case(
            lambda: Net(
                queries,
                codes=weight(2, 3),
                head=nn.Linear(3, 3),
                **layers(q=(3, 3), k=(3, 3), v=(3, 3)),
            ),
            (4, 3),
        ),
        "learned queries, as many as examples": Case(
            lambda: Net(
                queries,
                codes=weight(4, 3),
                head=nn.Linear(3, 3),
                **layers(q=(3, 3), k=(3, 3), v=(3, 3)),
            ),
            (2, 3),
            4,
        ),
        "repeated": Case(lambda: Net(repeated, s=weight(3), **layers(a=(4, 4), b=(4, 3)))),
        "interleaved": Case(lambda: Net(interleaved, **layers(a=(4, 4), b=(4, 3)))),
        "doubled": Case(lambda: Net(doubled, **layers(a=(4, 4), b=(4, 3)))),
        "crops": Case(lambda: Net(crops, **layers(a=(2, 4), b=(8, 3)))),
        "sorted": Case(lambda: Net(permuted, **layers(a=(4, 4), b=(4, 3)))),
        "sorted but for the first and the last": Case(
            lambda: Net(permuted, **layers(a=(4, 4), b=(4, 3))), middle_permuted
        ),
        "reversed": Case(lambda: Net(reversed_rows, **layers(a=(4, 4), b=(4, 3)))),
        "rolled": Case(lambda: Net(rolled, **layers(a=(4, 4), b=(4, 3)))),
        "packed": Case(
            lambda: seq(packed, cells=nn.LSTM(4, 4, batch_first=True)),
            (3, 3),
            lenient=frozenset(
                {
                    "rows",
                    "jacobians",
                    "func *",
                    "matri*",
                    "product *",
                    "diagonal *",
                    "report",
                    "hf",
                    "block-*",
                }
            ),
        ),
        "packed places": Case(
            lambda: seq(packed_linear),
            (3, 3),
            lenient=frozenset(
                {
                    "rows",
                    "jacobians",
                    "func *",
                    "matri*",
                    "product *",
                    "diagonal *",
                    "report",
                    "hf",
                    "block-*",
                }
            ),
        ),
        "unfolded": Case(lambda: Net(unfolded, **layers(a=(8, 4), b=(4, 3))), (2, 3, 3)),
        "windows": Case(
            lambda: Net(windows, **layers(q=(3, 3), k=(3, 3), v=(3, 3), b=(3, 3))), (4, 3)
        ),
        "windows of one example, N = 1": Case(
            lambda: Net(windows, **layers(q=(3, 3), k=(3, 3), v=(3, 3), b=(3, 3))), (4, 3), 1
        ),
        "frames": Case(lambda: Net(frames, c=nn.Conv2d(2, 3, 2), b=nn.Linear(3, 3)), (2, 2, 3, 3)),
        "frames first": Case(
            lambda: Net(frames_first, c=nn.Conv2d(2, 3, 2), b=nn.Linear(3, 3)), (2, 2, 3, 3)
        ),
        "frames first, N = T": Case(
            lambda: Net(frames_first, c=nn.Conv2d(2, 3, 2), b=nn.Linear(3, 3)), (3, 2, 3, 3), 3
        ),
        "spatial transformer": Case(
            lambda: Net(transformer_of_space, where=nn.Linear(9, 6), b=nn.Linear(9, 3)),
            (1, 3, 3),
            4,
        ),
        "graph": Case(lambda: seq(graph), (4, 7)),
        "graph, N = V": Case(lambda: seq(graph), (4, 7), 4),
        "graph of graphs": Case(lambda: seq(block_graph, edge=nn.Linear(4, 4)), (3, 3)),
        "attention, places first": Case(
            lambda: Net(
                places_first_attention, att=nn.MultiheadAttention(4, 2), head=nn.Linear(4, 3)
            ),
            (3, 4),
        ),
        "attention, places first, N = T": Case(
            lambda: Net(
                places_first_attention, att=nn.MultiheadAttention(4, 2), head=nn.Linear(4, 3)
            ),
            (4, 4),
            4,
        ),
        "lstm, places first": Case(
            lambda: Net(
                places_first_lstm, cells=nn.LSTM(2, 2), pre=nn.Linear(2, 2), head=nn.Linear(2, 3)
            ),
            (3, 2),
        ),
        "lstm, places first, N = T": Case(
            lambda: Net(
                places_first_lstm, cells=nn.LSTM(2, 2), pre=nn.Linear(2, 2), head=nn.Linear(2, 3)
            ),
            (4, 2),
            4,
        ),
        "one after the other": Case(lambda: Net(no_batch_axis, **layers(a=(4, 4), b=(4, 3)))),
        "one after the other, N = 1": Case(
            lambda: Net(no_batch_axis, **layers(a=(4, 4), b=(4, 3))), n=1
        ),
        "by vmap": Case(lambda: Net(by_vmap, **layers(a=(4, 4), b=(4, 3)))),
    }
)


@pytest.mark.thinned(6)
@pytest.mark.parametrize("what", WHAT)
@pytest.mark.parametrize("name", CASES)
def test_rows_that_are_not_examples(name: str, what: str) -> None:
    ask(CASES[name], what)
