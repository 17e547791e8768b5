"""Layers that are changed from outside: hooks of every sort, other forwards, parametrizations,
pruning, compilation.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import pytest
import torch
from oracle import Case, Net, Reference, apart, numbers, tokens, weight
from test_faults import WHAT, ask, in_order, refusal, right_or_refused, two
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize, prune

import curvlab as cl
from curvlab.likelihoods import Categorical

pytestmark = pytest.mark.filterwarnings(
    "ignore::curvlab.errors.CurvlabWarning", "ignore:.*weight_norm:FutureWarning"
)


def deep() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))


def hooked(
    change: Callable[[nn.Sequential], object], lenient: frozenset[str] = frozenset()
) -> Case:
    """A plain net to which something is done."""

    def build() -> nn.Module:
        net = deep()
        change(net)
        return net

    return Case(build, lenient=lenient)


def forward(hook: Callable[..., Tensor | None], where: int = 2, **options: bool) -> Case:
    return hooked(lambda net: net[where].register_forward_hook(hook, **options))


def before(hook: Callable[..., object], where: int = 2, **options: bool) -> Case:
    return hooked(lambda net: net[where].register_forward_pre_hook(hook, **options))


def in_place(module: nn.Module, args: tuple[Tensor], out: Tensor) -> None:
    out.mul_(2)


def again(module: Any, args: tuple[Tensor], out: Tensor) -> Tensor:
    """The layer's own function once more."""
    return out + F.linear(torch.tanh(out), module.weight)


def ordered(net: nn.Sequential) -> None:
    """Two hooks, the second prepended: it runs first."""
    net[2].register_forward_hook(lambda module, args, out: out.sin())
    net[2].register_forward_hook(lambda module, args, out: out * 2, prepend=True)


def on_a_parent() -> nn.Module:
    net = Net(lambda m, x: m.head(m.body(x)), body=deep()[:4], head=nn.Linear(4, 3))
    net.body.register_forward_hook(lambda module, args, out: out * module[0].weight.sum(1))
    net.body.register_forward_pre_hook(lambda module, args: (args[0].sin(),))
    return net


def removed() -> nn.Module:
    net = deep()
    net[2].register_forward_hook(lambda module, args, out: out.sin()).remove()
    return net


@contextmanager
def everywhere(model: nn.Module) -> Iterator[None]:
    """A hook on every module there is."""
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, args, out: out.sin() * 2 if isinstance(module, nn.Linear) else None
    )
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def before_everywhere(model: nn.Module) -> Iterator[None]:
    handle = nn.modules.module.register_module_forward_pre_hook(
        cast(Any, lambda module, args: (args[0].sin(),) if isinstance(module, nn.Linear) else None)
    )
    try:
        yield
    finally:
        handle.remove()


class Scaled(nn.Linear):
    """A subclass that calls its parent."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.weight.norm() + super().forward(x.sin())


class Symmetric(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return w.triu() + w.triu(1).mT


class Root(nn.Module):
    """Of two parametrizations of one weight."""

    def forward(self, w: Tensor) -> Tensor:
        return w.square().add(0.1).sqrt()


class Norm(nn.Module):
    """Weight norm in plain operations: torch's own has no right second derivative."""

    def forward(self, g: Tensor, v: Tensor) -> Tensor:
        return g * v / v.norm(dim=1, keepdim=True)

    def right_inverse(self, w: Tensor) -> tuple[Tensor, Tensor]:
        return w.norm(dim=1, keepdim=True), w


class OldNorm(nn.Linear):
    """The older weight norm, its names and all, in plain operations."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        w = self.weight.detach()
        del self.weight
        self.weight_g, self.weight_v = (
            nn.Parameter(w.norm(dim=1, keepdim=True)),
            nn.Parameter(w.clone()),
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(
            x, self.weight_g * self.weight_v / self.weight_v.norm(dim=1, keepdim=True), self.bias
        )


def with_parametrization(
    make: Callable[[nn.Module], object], evaluating: bool = False
) -> nn.Module:
    net = deep()
    make(net[2])
    return net.eval() if evaluating else net


def with_old_norm() -> nn.Module:
    net = deep()
    net[2] = OldNorm(4, 4)
    return net


def cut(layer: nn.Module) -> None:
    prune.l1_unstructured(layer, "weight", 0.5)
    prune.random_unstructured(layer, "bias", 1)


def cut_twice(layer: nn.Module) -> None:
    prune.ln_structured(layer, "weight", 1, 2, 0)
    prune.l1_unstructured(layer, "weight", 2)


def shared_parametrization() -> nn.Module:
    """Low rank, two weights by one factor."""

    class Low(nn.Module):
        def __init__(self, a: nn.Parameter) -> None:
            super().__init__()
            self.a = a

        def forward(self, w: Tensor) -> Tensor:
            return w + self.a @ self.a.mT

    net, a = deep(), weight(4, 1)
    for i in (0, 2):
        parametrize.register_parametrization(net[i], "weight", Low(a))
    return net


def compiled(part: bool = False, run: bool = False) -> Any:
    net: Any = two()
    if part:
        net = nn.Sequential(
            cast(
                nn.Module,
                torch.compile(nn.Sequential(nn.Linear(4, 4), nn.Tanh()), backend="eager"),
            ),
            nn.Linear(4, 3),
        )
    else:
        net = torch.compile(net, backend="eager")
    if run:
        net(torch.zeros(2, 4))
    return net


WEIGHT_NORM = frozenset(
    {"matri* hessian", "func hessian", "product hessian", "diagonal hessian", "block-hessian"}
)
COMPILED = frozenset({"*"})

CASES: dict[str, Case] = {
    "tanh": forward(lambda module, args, out: torch.tanh(out)),
    "scale": forward(lambda module, args, out: out * 2),
    "add": forward(lambda module, args, out: out + 1),
    "in place": hooked(lambda net: net[2].register_forward_hook(in_place), frozenset({"k-bfgs"})),
    "by its weight": forward(lambda module, args, out: out * module.weight.norm()),
    "by its input": forward(lambda module, args, out: out * args[0]),
    "once more": forward(again),
    "other shape": forward(lambda module, args, out: torch.cat([out[:, :2], out[:, 2:].sin()], 1)),
    "prepended": forward(lambda module, args, out: out.sin(), prepend=True),
    "two, one prepended": hooked(ordered),
    "with keywords": forward(lambda module, args, words, out: out.sin(), with_kwargs=True),
    "always called": forward(lambda module, args, out: out.sin(), always_call=True),
    "on the net": hooked(
        lambda net: net.register_forward_hook(lambda module, args, out: out * net[4].bias)
    ),
    "on a parent": Case(on_a_parent),
    "removed": Case(removed),
    "that detaches": forward(lambda module, args, out: out.detach() + 0.5 * out),
    "pre": before(lambda module, args: args[0] * 2),
    "pre, in a tuple": before(lambda module, args: (args[0].sin(),)),
    "pre, in place": before(lambda module, args: (args[0].clone().mul_(3),), where=0),
    "pre, by keywords": before(
        lambda module, args, words: ((args[0].sin(),), words), with_kwargs=True
    ),
    "pre, by its weight": before(lambda module, args: (args[0] @ module.weight,)),
    "global": Case(deep, around=everywhere),
    "global pre": Case(deep, around=before_everywhere),
    "other forward": hooked(
        lambda net: setattr(
            net[2],
            "forward",
            types.MethodType(lambda m, x: F.linear(x, m.weight.sin(), m.bias), net[2]),
        )
    ),
    "other function": hooked(
        lambda net: setattr(net[2], "forward", lambda x: (x @ net[2].weight).sin())
    ),
    "other forward around the old": hooked(
        lambda net: setattr(
            net[2], "forward", (lambda old: lambda x: old(x.sin()) + old(x))(net[2].forward)
        )
    ),
    "subclass": Case(lambda: nn.Sequential(nn.Linear(4, 4), nn.Tanh(), Scaled(4, 3))),
    "own parametrization": Case(
        lambda: with_parametrization(
            lambda m: parametrize.register_parametrization(m, "weight", Symmetric())
        )
    ),
    "two parametrizations": Case(
        lambda: with_parametrization(
            lambda m: [
                parametrize.register_parametrization(m, "weight", part)
                for part in (Symmetric(), Root())
            ]
        )
    ),
    "parametrized bias": Case(
        lambda: with_parametrization(
            lambda m: parametrize.register_parametrization(m, "bias", Root())
        )
    ),
    "parametrizations that share": Case(shared_parametrization),
    "weight norm": Case(
        lambda: with_parametrization(parametrizations.weight_norm),
        twin=lambda: with_parametrization(
            lambda m: parametrize.register_parametrization(m, "weight", Norm())
        ),
        lenient=WEIGHT_NORM,
    ),
    "old weight norm": Case(
        lambda: with_parametrization(torch.nn.utils.weight_norm),
        twin=with_old_norm,
        lenient=WEIGHT_NORM,
    ),
    "spectral norm": Case(lambda: with_parametrization(parametrizations.spectral_norm, True)),
    "old spectral norm": Case(lambda: with_parametrization(torch.nn.utils.spectral_norm, True)),
    "orthogonal": Case(
        lambda: with_parametrization(
            lambda m: parametrizations.orthogonal(m, orthogonal_map="cayley")
        )
    ),
    "orthogonal by exponential": Case(
        lambda: with_parametrization(
            lambda m: parametrizations.orthogonal(m, orthogonal_map="matrix_exp")
        )
    ),
    "pruned": Case(lambda: with_parametrization(cut)),
    "pruned twice": Case(lambda: with_parametrization(cut_twice)),
    "compiled": Case(compiled, lenient=frozenset({"func *"})),
    "compiled and run": Case(lambda: compiled(run=True), lenient=COMPILED),
    "compiled part": Case(lambda: compiled(part=True), lenient=frozenset({"func *"})),
    "compiled part, run": Case(lambda: compiled(part=True, run=True), lenient=COMPILED),
}


@pytest.mark.thinned(6)
@pytest.mark.parametrize("what", WHAT)
@pytest.mark.parametrize("name", CASES)
def test_layers_changed_from_outside(name: str, what: str) -> None:
    ask(CASES[name], what)


# ------------------------------------------------------------------------------------------------
# what comes in between


def truth(net: nn.Module, x: Tensor, y: Tensor) -> Reference:
    return Reference(net, x, y)


def test_a_hook_that_comes_and_goes_between_looks() -> None:
    """What was seen at the first look at a form is not taken for what holds for ever."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net: Any = deep().double()
    x, y = numbers(5, 4), tokens(5, high=3)
    o = cl.Objective(net, Categorical())

    def holds() -> None:
        r = truth(net, x, y)
        assert (
            apart(in_order(o, r, o.closure(x, y).observe({"data"}).gradients), r.gradient) < 1e-10
        )
        assert apart(r.joined(cl.exact.gradients(o, x, y), net, 1), r.rows) < 1e-10
        found = cl.exact.matrix(o, x, y, "ggn", None).dense()
        assert apart(found.diagonal().sum()[None], r.ggn.trace()[None]) < 1e-10

    holds()
    handle = net[2].register_forward_hook(
        lambda module, args, out: out.sin() * module.weight.norm()
    )
    holds()
    handle.remove()
    holds()
    net[0].forward = lambda x: F.linear(x.sin(), net[0].weight.sin(), net[0].bias)
    holds()
    del net[0].forward
    holds()
    parametrize.register_parametrization(net[4], "bias", nn.Tanh())
    r = truth(net, x, y)
    right_or_refused(lambda: r.joined(cl.exact.gradients(o, x, y), net, 1), r.rows)


@pytest.mark.parametrize("sort", ["tensor hook", "full backward hook", "full backward pre-hook"])
def test_hooks_of_the_backward_pass(sort: str) -> None:
    """They change what torch calls the gradient: that one, or a line; never a third number."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net: Any = deep().double()
    x, y = numbers(5, 4), tokens(5, high=3)
    if sort == "tensor hook":
        net[2].weight.register_hook(lambda g: g * 3)
    elif sort == "full backward hook":
        net[2].register_full_backward_hook(lambda module, into, out: (into[0] * 3,))
    else:
        net[2].register_full_backward_pre_hook(lambda module, out: (out[0] * 3,))
    r, o = truth(net, x, y), cl.Objective(net, Categorical())
    right_or_refused(
        lambda: in_order(o, r, o.closure(x, y).observe({"data"}).gradients), r.gradient
    )


def test_compiled_and_run_before_is_right_or_names_the_remedy() -> None:
    model, x, y = compiled(run=False).double(), numbers(6, 4), tokens(6, high=3)
    model(x)
    r = truth(model._orig_mod, x, y)

    def rows(o: cl.Objective) -> Tensor:
        return r.joined(cl.exact.gradients(o, x, y), model._orig_mod, 1)

    def of_the_compiled() -> Tensor:
        o = cl.Objective(model, Categorical())
        found = cl.exact.gradients(o, x, y)
        return r.joined(
            {name.removeprefix("_orig_mod."): g for name, g in found.items()}, model._orig_mod, 1
        )

    right_or_refused(of_the_compiled, r.rows, match=r"_orig_mod")
    assert apart(rows(cl.Objective(model._orig_mod, Categorical())), r.rows) < 1e-10


def test_a_compiled_models_hessian_is_no_raw_error() -> None:
    """By the back end of AOT autograd, which has no double backward."""
    model: Any = torch.compile(two().double(), backend="aot_eager")
    x, y = numbers(6, 4), tokens(6, high=3)
    o = cl.Objective(model, Categorical())
    for kind in ("ggn", "hessian"):
        r = truth(model._orig_mod, x, y)
        wanted = getattr(r, kind).trace()[None]
        right_or_refused(
            lambda kind=kind: cl.exact.matrix(o, x, y, kind, None).dense().trace()[None],
            wanted,
            match=r"compile|_orig_mod",
        )


def test_in_place_activations_name_the_block_once() -> None:
    """K-BFGS may refuse them; and then says which block, once."""
    net = nn.Sequential(nn.Linear(4, 5), nn.ReLU(inplace=True), nn.Linear(5, 3)).double()
    x, y = numbers(6, 4), tokens(6, high=3)
    o = cl.Objective(net, Categorical())
    optimizer = cl.optimizer("k-bfgs", o, lr=0.1, damping=0.1)
    try:
        for _ in range(3):
            optimizer.step(o.closure(x, y))
    except cl.CurvlabError:
        line = refusal(lambda: [optimizer.step(o.closure(x, y)) for _ in range(3)])
        assert line.count("block 1") == 1
