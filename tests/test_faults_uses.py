"""A weight that enters otherwise than as h = W a of its layer: in functions, in products, in
pieces, through other weights.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracle import Case, Net, numbers, weight
from test_faults import WHAT, ask, layers
from torch import Tensor, nn
from torch.nn import functional as F

pytestmark = pytest.mark.filterwarnings("ignore::curvlab.errors.CurvlabWarning")


def captured() -> nn.Module:
    """A function that holds the Parameter, not its name."""
    net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))
    w: Any = net[0].weight
    return Net(lambda m, x: m.net(x) + m.last(x @ w), net=net, last=nn.Linear(4, 3))


def captured_bare() -> nn.Module:
    """The same without any use of the module."""
    layer = nn.Linear(4, 3)
    w, b = layer.weight, layer.bias
    return Net(lambda m, x: torch.tanh(x) @ w.t() + b, layer=layer)


def lora(frozen: bool) -> nn.Module:
    net = Net(
        lambda m, x: m.head(torch.tanh(m.base(x) + F.linear(F.linear(x, m.a), m.b))),
        base=nn.Linear(4, 4), a=weight(2, 4), b=weight(4, 2), head=nn.Linear(4, 3),
    )  # fmt: skip
    net.base.requires_grad_(not frozen)
    return net


def merged(m: Net, x: Tensor) -> Tensor:
    """LoRA as it is merged: F.linear(x, W + BA)."""
    return m.head(torch.tanh(F.linear(x, m.base.weight + m.b @ m.a, m.base.bias)))


def hyper(m: Net, x: Tensor) -> Tensor:
    """The weights of each example by another layer."""
    return torch.bmm(m.make(torch.tanh(x[:, :2])).view(-1, 3, 2), x[:, 2:, None])[..., 0]


def hyper_shared(m: Net, x: Tensor) -> Tensor:
    """One weight for all examples, made by a layer from an embedding of its own: one row whatever N
    is.
    """
    return F.linear(torch.tanh(x), m.make(torch.tanh(m.code)).view(3, 4))


def standardised(m: Net, x: Tensor) -> Tensor:
    w = m.a.weight
    w = (w - w.mean(1, keepdim=True)) / (w.var(1, keepdim=True) + 1e-3).sqrt()
    return m.b(torch.tanh(F.linear(x, w, m.a.bias)))


def standardised_conv(m: Net, x: Tensor) -> Tensor:
    w = m.a.weight
    w = (w - w.mean((1, 2, 3), keepdim=True)) / (w.var((1, 2, 3), keepdim=True) + 1e-3).sqrt()
    return m.b(torch.tanh(F.conv2d(x, w, m.a.bias, padding=1)).mean((2, 3)))


def fused_qkv(m: Net, x: Tensor) -> Tensor:
    """One weight in three pieces, by chunk; its own bias by split."""
    q, k, v = (
        F.linear(x, w, b) for w, b in zip(m.qkv.weight.chunk(3), m.qkv.bias.split(4), strict=True)
    )
    return m.head((torch.softmax(q @ k.mT / 2, -1) @ v).mean(1))


def split_output(m: Net, x: Tensor) -> Tensor:
    q, k, v = m.qkv(x).split(4, -1)
    return m.head((torch.softmax(q @ k.mT / 2, -1) @ v).mean(1))


def slices(m: Net, x: Tensor) -> Tensor:
    """A supernet: narrow and wide by one weight."""
    return m.b(torch.tanh(F.linear(x, m.a.weight, m.a.bias))) + F.linear(
        torch.tanh(F.linear(x, m.a.weight[:3])), m.b.weight[:, :3]
    )


class Weighs(torch.autograd.Function):
    """x Wᵀ by a function of one's own, with all that transforms of functions ask for."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, w: Tensor) -> Tensor:
        return x @ w.mT

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        return g @ w, g.mT @ x


class Force(nn.Module):
    """Outputs that are derivatives of an energy in the inputs: every weight enters a backward pass
    of the model's own.
    """

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 1)

    def energy(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x))).sum()

    def forward(self, x: Tensor) -> Tensor:
        return -torch.func.grad(self.energy)(x)


class ForceByAutograd(Force):
    """The same by `torch.autograd.grad` inside forward, which `vmap` and `torch.func.grad` do not
    go through.
    """

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            leaf = x if x.requires_grad else x.detach().requires_grad_()
            return -torch.autograd.grad(self.energy(leaf), leaf, create_graph=True)[0]


def soup(m: Net, x: Tensor) -> Tensor:
    s = torch.sigmoid(m.mix)
    return F.linear(torch.tanh(x), s * m.a.weight + (1 - s) * m.b.weight, m.a.bias)


def straight_through(m: Net, x: Tensor) -> Tensor:
    """Signs of the weights forward, the weights backward."""
    w = m.a.weight
    return m.b(torch.tanh(F.linear(x, w + (w.sign() - w).detach(), m.a.bias)))


def ensemble(m: Net, x: Tensor) -> Tensor:
    """Members by `vmap` over stacked weights."""
    return torch.func.vmap(lambda w, b: F.linear(torch.tanh(x), w, b))(m.w, m.b).mean(0)


def in_place(m: Net, x: Tensor) -> Tensor:
    h = m.a(x)
    h += x
    h[:, 0] = h[:, 1] * 2
    h.mul_(m.a.bias).tanh_()
    return m.b(h)


CONTRACTIONS = {
    "matmul": lambda x, w: torch.matmul(x, w),
    "@": lambda x, w: x @ w,
    "rmatmul": lambda x, w: (w.mT @ x.mT).mT,
    "mm": lambda x, w: torch.mm(x, w),
    "mm with itself": lambda x, w: x @ (w @ w.mT @ w),
    "einsum": lambda x, w: torch.einsum("ni,io->no", x, w),
    "einsum twice": lambda x, w: torch.einsum("ni,io,jo->nj", x, w, w[:3]),
    "tensordot": lambda x, w: torch.tensordot(x, w, 1),
    "addmm": lambda x, w: torch.addmm(w[0], x, w),
    "bmm": lambda x, w: torch.bmm(x[:, None], w.expand(len(x), -1, -1))[:, 0],
    "baddbmm": lambda x, w: torch.baddbmm(
        w[:1, None].expand(len(x), 1, -1), x[:, None], w.expand(len(x), -1, -1)
    )[:, 0],
    "mv": lambda x, w: torch.stack([torch.mv(w.mT, row) for row in x]),
    "addmv": lambda x, w: torch.stack([torch.addmv(w[0], w.mT, row) for row in x]),
    "aten.linear": lambda x, w: torch.ops.aten.linear(x, w.mT),
    "aten.mm": lambda x, w: torch.ops.aten.mm.default(x, w),
    "linear": lambda x, w: F.linear(x, w.t(), w[1]),
    "_C.linear": lambda x, w: torch._C._nn.linear(x, w.t()),
    "bilinear": lambda x, w: F.bilinear(x[:, :2], x[:, 2:], w.view(3, 2, 2)),
    "conv1d": lambda x, w: F.conv1d(x[:, :, None], w.mT[..., None])[..., 0],
    "outer sum": lambda x, w: (x[:, :, None] * w).sum(1),
    "embedding": lambda x, w: F.embedding((x[:, 0] > 0).long(), w) * x[:, 1:],
    "index": lambda x, w: w[(x[:, 0] > 0).long()] * x[:, 1:],
    "gather": lambda x, w: x[:, 1:] * torch.gather(w, 0, (x[:, 1:] > 0).long()),
    "index_select": lambda x, w: torch.index_select(w, 0, (x[:, 0] > 0).long()) * x[:, 1:],
    "one hot": lambda x, w: F.one_hot((x[:, 0] > 0).long(), 4).to(w) @ w * x[:, 1:],
    "distances": lambda x, w: (x[:, None] - w.mT).square().sum(-1),
    "cosine": lambda x, w: F.cosine_similarity(x[:, None], w.mT[None], dim=2),
    "kron": lambda x, w: x @ torch.kron(w[:2, :1], w[:2]),
    "matrix_exp": lambda x, w: x[:, :3] @ torch.linalg.matrix_exp(w[:3] - w[:3].mT),
    "solve": lambda x, w: torch.linalg.solve(torch.eye(3).to(w) * 3 + w[:3], x[:, :3].mT).mT,
    "cat": lambda x, w: F.linear(torch.cat([x, x[:, :2]], 1), torch.cat([w, w[:2]]).mT),
    "lstm's": lambda x, w: torch.sigmoid(x @ w) * torch.tanh(x @ w.flip(0)),
}  # fmt: skip
"""Ways of a Parameter [4, 3] to meet inputs [N, 4]."""

PRODUCTS: dict[str, Case] = {
    name: Case(
        lambda use=use: Net(
            lambda m, x: use(torch.tanh(m.a(x)), m.w), a=nn.Linear(4, 4), w=weight(4, 3)
        )
    )
    for name, use in CONTRACTIONS.items()
}

CASES: dict[str, Case] = {
    "layer and its bias": Case(
        lambda: Net(lambda m, x: m.b(torch.tanh(m.a(x)) * m.a.bias), **layers(a=(4, 4), b=(4, 3)))
    ),
    "in a penalty": Case(
        lambda: Net(
            lambda m, x: m.a(x) + m.a.weight.square().sum() * m.c, c=numbers(3), **layers(a=(4, 3))
        )
    ),
    "captured": Case(captured),
    "captured alone": Case(captured_bare),
    "lora": Case(lambda: lora(True)),
    "lora, base trained": Case(lambda: lora(False)),
    "lora, merged": Case(
        lambda: Net(
            merged, base=nn.Linear(4, 4), a=weight(2, 4), b=weight(4, 2), head=nn.Linear(4, 3)
        )
    ),
    "hypernetwork": Case(lambda: Net(hyper, make=nn.Linear(2, 6))),
    "hypernetwork of a code": Case(
        lambda: Net(hyper_shared, make=nn.Linear(2, 12), code=weight(2))
    ),
    "hypernetwork of a code, N = 1": Case(
        lambda: Net(hyper_shared, make=nn.Linear(2, 12), code=weight(1, 2)), n=1
    ),
    "standardised": Case(lambda: Net(standardised, **layers(a=(4, 4), b=(4, 3)))),
    "standardised convolution": Case(
        lambda: Net(standardised_conv, a=nn.Conv2d(2, 3, 3), b=nn.Linear(3, 3)), (2, 3, 3)
    ),
    "fused weight in pieces": Case(
        lambda: Net(fused_qkv, **layers(qkv=(4, 12), head=(4, 3))), (3, 4)
    ),
    "fused output in pieces": Case(
        lambda: Net(split_output, **layers(qkv=(4, 12), head=(4, 3))), (3, 4)
    ),
    "slices": Case(lambda: Net(slices, **layers(a=(4, 4), b=(4, 3)))),
    "own function": Case(
        lambda: Net(
            lambda m, x: Weighs.apply(torch.tanh(m.a(x)), m.w), a=nn.Linear(4, 4), w=weight(3, 4)
        )
    ),
    "force": Case(Force, (3,), y="like"),
    "force by autograd": Case(
        ForceByAutograd,
        (3,),
        y="like",
        lenient=frozenset(
            {
                "rows",
                "func *",
                "matri*",
                "product *",
                "diagonal *",
                "jacobians",
                "report",
                "hf",
                "block-*",
            }
        ),
    ),
    "soup": Case(
        lambda: Net(soup, mix=weight(1), a=nn.Linear(4, 3), b=nn.Linear(4, 3, bias=False))
    ),
    "straight through": Case(lambda: Net(straight_through, **layers(a=(4, 4), b=(4, 3)))),
    "scaled weight": Case(
        lambda: Net(
            lambda m, x: m.b(torch.tanh(F.linear(x, m.a.weight * 0.5, m.a.bias))),
            **layers(a=(4, 4), b=(4, 3)),
        )
    ),
    "cat of two weights": Case(
        lambda: Net(
            lambda m, x: F.linear(x.tanh(), torch.cat([m.a.weight, m.b.weight])),
            **layers(a=(4, 2), b=(4, 1)),
        )
    ),
    "detached second use": Case(
        lambda: Net(lambda m, x: F.linear(m.a(x), m.a.weight.detach()), **layers(a=(4, 4))),
        y="like",
    ),
    "norm without a graph": Case(
        lambda: Net(
            lambda m, x: m.b(m.a(x).tanh() / m.a.weight.detach().norm()),
            **layers(a=(4, 4), b=(4, 3)),
        )
    ),
    "ensemble": Case(lambda: Net(ensemble, w=weight(2, 3, 4), b=weight(2, 3))),
    "in place": Case(
        lambda: Net(in_place, **layers(a=(4, 4), b=(4, 3))), lenient=frozenset({"k-bfgs", "skqn-l"})
    ),
}


@pytest.mark.parametrize("what", ["gradient", "hessian"])
@pytest.mark.parametrize("name", PRODUCTS)
def test_a_parameter_in_other_products(name: str, what: str) -> None:
    ask(PRODUCTS[name], what)


@pytest.mark.thinned(4)
@pytest.mark.parametrize("what", WHAT)
@pytest.mark.parametrize("name", CASES)
def test_a_weight_in_other_ways(name: str, what: str) -> None:
    ask(CASES[name], what)
