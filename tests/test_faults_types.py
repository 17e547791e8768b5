"""Other dtypes than one: halves, autocast, several in one model, complex numbers."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from oracle import Net, Reference, apart, numbers, one_line, seeded, tokens, total
from test_faults import entries, in_order, layers, refusal, right_or_refused
from torch import Tensor, nn
from torch.nn import functional as F

import curvlab as cl
from curvlab.errors import CurvlabError
from curvlab.exact import Kind
from curvlab.likelihoods import Categorical

pytestmark = pytest.mark.filterwarnings("ignore::curvlab.errors.CurvlabWarning")

STEPPERS = (
    "sgd-m",
    "adam",
    "kfac",
    "k-bfgs",
    "tnt",
    "shampoo",
    "smw-ng",
    "hf",
    "lbfgs",
    "skqn-l",
    "block-ggn",
)


def two(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    with seeded():
        return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).to(dtype)


def data(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    return numbers(6, 4).to(dtype), tokens(6, high=3, seed=2)


# ------------------------------------------------------------------------------------------------
# half types


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("algorithm", STEPPERS)
def test_half_types_step_or_name_the_remedy(algorithm: str, dtype: torch.dtype) -> None:
    net, (x, y) = two(dtype), data(dtype)
    o = cl.Objective(net, Categorical())

    def steps(o: cl.Objective, x: Tensor) -> None:
        optimizer = cl.optimizer(algorithm, o, lr=0.05, damping=0.1)
        for _ in range(2):
            optimizer.step(o.closure(x, y))

    try:
        steps(o, x)
    except CurvlabError:
        line = refusal(lambda: steps(o, x), match=r"float")
        assert ".float()" in line
        steps(cl.Objective(two(dtype).float(), Categorical()), x.float())
    else:
        assert all(bool(torch.isfinite(p).all()) for p in net.parameters())
        assert all(p.dtype == dtype for p in net.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["ggn", "hessian", "ef"])
def test_half_types_by_the_oracle(kind: Kind, dtype: torch.dtype) -> None:
    """Numbers in their own dtype, or better; or a line with the remedy."""
    net, (x, y) = two(dtype), data(dtype)
    o, exact = (
        cl.Objective(net, Categorical()),
        Reference(copy.deepcopy(net).double(), x.double(), y),
    )
    order = torch.cat(list(entries(cl.Objective(exact.model, Categorical()), exact).values()))
    wanted = getattr(exact, kind)[order[:, None], order]
    for call in (
        lambda: cl.exact.matrix(o, x, y, kind, None).dense().double(),
        lambda: cl.exact.matrix(o, x, y, kind, None, route="func").dense().double(),
        lambda: cl.exact.product(o, x, y, kind).dense().double(),
    ):
        right_or_refused(call, wanted, 0.1, match=r"\.float\(\)")
    try:
        found = cl.exact.gradients(o, x, y)
    except CurvlabError as error:
        one_line(error, ".float()")
    else:
        assert all(g.dtype == dtype for g in found.values())
        assert (
            apart(
                exact.joined({name: g.double() for name, g in found.items()}, exact.model, 1),
                exact.rows,
            )
            < 0.1
        )
    try:
        cl.spectrum(o, x, y, progress=False)
    except CurvlabError as error:
        one_line(error, ".float()")


# ------------------------------------------------------------------------------------------------
# autocast


def auto(m: Net, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return m.b(torch.tanh(m.a(x))).float()


def inside() -> nn.Module:
    with seeded(dtype=torch.float32):
        return Net(auto, **layers(a=(4, 5), b=(5, 3)))


@contextmanager
def around() -> Iterator[None]:
    with torch.autocast("cpu", torch.bfloat16):
        yield


@contextmanager
def nothing() -> Iterator[None]:
    yield


AUTOCASTS = {"inside": (inside, nothing), "around": (lambda: two(torch.float32), around)}


@pytest.mark.parametrize("where", AUTOCASTS)
@pytest.mark.parametrize("algorithm", STEPPERS)
def test_autocast_steps(algorithm: str, where: str) -> None:
    """Weights are float32 and move as they do without autocast, to bfloat16's rounding; the others
    may refuse in a line.
    """
    build, outside = AUTOCASTS[where]
    net, (x, y) = build(), data(torch.float32)
    plain = two(torch.float32)
    for p, q in zip(plain.parameters(), net.parameters(), strict=True):
        p.data.copy_(q.data)
    before = [p.detach().clone() for p in net.parameters()]
    o = cl.Objective(net, Categorical())
    with outside():
        try:
            optimizer = cl.optimizer(algorithm, o, lr=0.05, damping=0.5)
            optimizer.step(o.closure(x, y))
        except CurvlabError as error:
            one_line(error, "autocast")
            if algorithm in ("sgd-m", "adam"):
                pytest.fail(str(error))
            return
    other = cl.Objective(plain, Categorical())
    cl.optimizer(algorithm, other, lr=0.05, damping=0.5).step(other.closure(x, y))
    for p, q, old in zip(net.parameters(), plain.parameters(), before, strict=True):
        assert p.dtype == torch.float32
        assert apart(p - old, q - old) < 0.1


@pytest.mark.parametrize("where", AUTOCASTS)
def test_autocast_gradients_have_the_parameters_dtype(where: str) -> None:
    build, outside = AUTOCASTS[where]
    net, (x, y) = build(), data(torch.float32)
    o = cl.Objective(net, Categorical())
    with outside():
        r = Reference(net, x, y)
        wanted, rows = r.gradient, r.rows
        seen = o.closure(x, y).observe({"data"}).gradients
        found = cl.exact.gradients(o, x, y)
    assert all(g.dtype == torch.float32 for g in seen.values())
    assert all(g.dtype == torch.float32 for g in found.values())
    assert apart(in_order(o, r, seen), wanted) < 0.02
    assert apart(r.joined(found, net, 1), rows) < 0.02


@pytest.mark.parametrize("where", AUTOCASTS)
@pytest.mark.parametrize("kind", ["ggn", "hessian", "ef"])
def test_autocast_matrices(kind: Kind, where: str) -> None:
    """Those of float32 to bfloat16's rounding, or a line that names autocast."""
    build, outside = AUTOCASTS[where]
    net, (x, y) = build(), data(torch.float32)
    plain = two(torch.float32).double()
    for p, q in zip(plain.parameters(), net.parameters(), strict=True):
        p.data.copy_(q.data)
    wanted = getattr(Reference(plain, x.double(), y), kind).trace()[None]
    o = cl.Objective(net, Categorical())

    def trace(**options: Any) -> Tensor:
        return total(
            cl.exact.matrix(o, x, y, kind, b.name, **options).dense().double().trace()
            for b in o.blocks
        )[None]

    with outside():
        right_or_refused(trace, wanted, 0.1, match="autocast")
        right_or_refused(lambda: trace(route="func"), wanted, 0.1, match="autocast")
        right_or_refused(
            lambda: cl.exact.diagonal(o, x, y, kind).double().sum()[None],
            wanted,
            0.1,
            match="autocast",
        )
        right_or_refused(
            lambda: cl.exact.product(o, x, y, kind).dense().double().trace()[None],
            wanted,
            0.1,
            match="autocast",
        )


# ------------------------------------------------------------------------------------------------
# several dtypes


def test_a_half_backbone_gets_its_inputs_as_they_are() -> None:
    """Frozen in bfloat16 under a float32 head."""
    with seeded(dtype=torch.float32):
        net = Net(
            lambda m, x: m.head(torch.tanh(m.base(x)).float()), **layers(base=(4, 5), head=(5, 3))
        )
    net.base.bfloat16().requires_grad_(False)
    x, y = data(torch.bfloat16)
    o, r = cl.Objective(net, Categorical()), Reference(net, x, y)
    order = torch.cat(list(entries(o, r).values()))
    for kind in ("ggn", "hessian", "ef"):
        wanted = getattr(r, kind)[order[:, None], order]
        assert apart(cl.exact.matrices(o, x, y, kind)["1"].dense(), wanted) < 1e-5
        assert apart(cl.exact.product(o, x, y, kind).dense(), wanted) < 1e-5
    assert apart(in_order(o, r, o.closure(x, y).observe({"data"}).gradients), r.gradient) < 1e-5
    cl.optimizer("kfac", o, lr=0.1, damping=0.1).step(o.closure(x, y))


def double_head() -> Any:
    with seeded(dtype=torch.float32):
        net = Net(
            lambda m, x: m.head(torch.tanh(m.base(x)).double()), **layers(base=(4, 5), head=(5, 3))
        )
    net.head.double()
    return net


@pytest.mark.parametrize("algorithm", STEPPERS)
def test_a_double_head_steps_or_is_refused(algorithm: str) -> None:
    net, (x, y) = double_head(), data(torch.float32)
    o = cl.Objective(net, Categorical())
    try:
        cl.optimizer(algorithm, o, lr=0.1, damping=0.1).step(o.closure(x, y))
    except CurvlabError as error:
        one_line(error, "float")
        if algorithm in ("sgd-m", "adam"):
            pytest.fail(str(error))
    assert (net.base.weight.dtype, net.head.weight.dtype) == (torch.float32, torch.float64)


@pytest.mark.parametrize("kind", ["ggn", "hessian", "ef"])
def test_a_double_head_by_the_oracle(kind: Kind) -> None:
    net, (x, y) = double_head(), data(torch.float32)
    o = cl.Objective(net, Categorical())
    exact = Reference(copy.deepcopy(net).double(), x.double(), y)
    wanted = getattr(exact, kind).trace()[None]
    for call in (
        lambda: cl.exact.matrix(o, x, y, kind, None).dense().double().trace()[None],
        lambda: total(
            m.dense().double().trace() for m in cl.exact.matrices(o, x, y, kind).values()
        )[None],
        lambda: total(
            cl.exact.matrix(o, x, y, kind, b.name, route="func").dense().double().trace()
            for b in o.blocks
        )[None],
        lambda: cl.exact.product(o, x, y, kind).dense().double().trace()[None],
        lambda: cl.exact.diagonal(o, x, y, kind).double().sum()[None],
    ):
        right_or_refused(call, wanted, 1e-5, match="float|dtype")


@pytest.mark.parametrize("given", [torch.float32, torch.float16, torch.bfloat16])
def test_inputs_of_another_dtype(given: torch.dtype) -> None:
    """What a plain layer would not take is cast, or the line says what is wanted."""
    net, (x, y) = two(), data(given)
    o, r = cl.Objective(net, Categorical()), Reference(net, x.double(), y)
    right_or_refused(
        lambda: in_order(o, r, o.closure(x, y).observe({"data"}).gradients),
        r.gradient,
        match="float|dtype",
    )
    right_or_refused(
        lambda: r.joined(cl.exact.gradients(o, x, y), net, 1), r.rows, match="float|dtype"
    )


def test_whole_numbers_and_truths_as_inputs() -> None:
    """Tokens as int32, masks as bool, both inside one model."""
    with seeded():
        net = Net(
            lambda m, x: m.b(torch.tanh(m.e(x)).mean(1)), e=nn.Embedding(6, 4), b=nn.Linear(4, 3)
        )
        mask = Net(
            lambda m, x: m.b(torch.tanh(m.a(x.to(m.a.weight)))), **layers(a=(4, 4), b=(4, 3))
        )
    y = tokens(5, high=3)
    for model, x in (
        (net, tokens(5, 3).int()),
        (mask, numbers(5, 4) > 0),
        (mask, tokens(5, 4).to(torch.uint8)),
    ):
        o, r = cl.Objective(model, Categorical()), Reference(model, x, y)
        assert (
            apart(in_order(o, r, o.closure(x, y).observe({"data"}).gradients), r.gradient) < 1e-10
        )
        assert apart(r.joined(cl.exact.gradients(o, x, y), model, 1), r.rows) < 1e-10
        assert (
            apart(cl.exact.diagonal(o, x, y, "hessian").sum()[None], r.hessian.trace()[None])
            < 1e-10
        )


# ------------------------------------------------------------------------------------------------
# complex


class Complex(nn.Module):
    """A complex weight in front of, or behind, a real one."""

    def __init__(self, first: bool) -> None:
        super().__init__()
        if first:
            self.w = nn.Parameter(torch.randn(4, dtype=torch.cdouble))
        self.head = nn.Linear(4, 3)
        if not first:
            self.w = nn.Parameter(torch.randn(4, dtype=torch.cdouble))

    def forward(self, x: Tensor) -> Tensor:
        return self.head((x * self.w).abs())


def complex_model(first: bool) -> Any:
    with seeded():
        return Complex(first)


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("algorithm", STEPPERS)
def test_complex_weights_step_as_torch_has_them_or_are_refused(algorithm: str, first: bool) -> None:
    net, (x, y) = complex_model(first), data()
    other = copy.deepcopy(net)
    try:
        o = cl.Objective(net, Categorical())
        cl.optimizer(algorithm, o, lr=0.01, damping=1e-8 if algorithm == "adam" else 0.1).step(
            o.closure(x, y)
        )
    except CurvlabError as error:
        one_line(error, "complex")
        return
    assert all(
        bool(torch.isfinite(torch.view_as_real(p) if p.is_complex() else p).all())
        for p in net.parameters()
    )
    if algorithm in ("sgd-m", "adam"):
        torchs = torch.optim.SGD if algorithm == "sgd-m" else torch.optim.Adam
        made = torchs(other.parameters(), lr=0.01)
        F.cross_entropy(other(x), y).backward()
        made.step()
        assert apart(torch.view_as_real(net.w), torch.view_as_real(other.w)) < 1e-6


@pytest.mark.parametrize("first", [False, True])
def test_complex_weights_by_the_oracle(first: bool) -> None:
    """Real and not negative on the diagonal, or refused by name."""
    net, (x, y) = complex_model(first), data()
    try:
        o = cl.Objective(net, Categorical())
        found = cl.exact.diagonal(o, x, y, "ef")
    except CurvlabError as error:
        one_line(error, "complex")
        return
    assert not found.is_complex()
    assert bool((found >= 0).all())


def test_nested_tensors_of_the_older_layout_are_one_line() -> None:
    x = torch.nested.nested_tensor([numbers(n, 4) for n in (2, 3)])
    o = cl.Objective(nn.Linear(4, 3).double(), cl.likelihoods.Categorical())
    with pytest.raises(CurvlabError, match=r"layout=torch\.jagged, or pad them$"):
        o.closure(x, tokens(2, high=3))


def test_the_meta_device_is_one_line() -> None:
    with torch.device("meta"):
        nowhere = nn.Linear(4, 3)
    o = cl.Objective(nowhere, cl.likelihoods.Categorical())  # by which memory can be planned
    with pytest.raises(CurvlabError, match="the model is on the meta device"):
        o.closure(torch.randn(2, 4), tokens(2, high=3))
    o = cl.Objective(nn.Linear(4, 3), cl.likelihoods.Categorical())
    with pytest.raises(CurvlabError, match="inputs are on the meta device"):
        o.closure(torch.randn(2, 4, device="meta"), tokens(2, high=3))


def test_jagged_tensors_are_right() -> None:
    class Mean(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 5).double(), nn.Linear(5, 3).double()

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.stack([h.mean(0) for h in torch.tanh(self.a(x)).unbind()]))

    net, y = Mean(), tokens(3, high=3)
    x = torch.nested.nested_tensor([numbers(n, 4) for n in (2, 4, 3)], layout=torch.jagged)
    o = cl.Objective(net, cl.likelihoods.Categorical())
    found = o.closure(x, y).observe("gradient").gradients
    nn.functional.cross_entropy(net(x), y).backward()
    for block in o.blocks:
        for name, g in block.scatter(found[block.name]).items():
            torch.testing.assert_close(g, net.get_parameter(name).grad, rtol=1e-10, atol=1e-12)


def test_a_likelihoods_own_parameters_stand_still_and_that_is_said() -> None:
    class Tempered(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.log_t = nn.Parameter(torch.zeros((), dtype=torch.float64))

        def check(self, z: Tensor, y: Any) -> None: ...

        def loss(self, z: Tensor, y: Any) -> Tensor:
            return nn.functional.cross_entropy(z * self.log_t.exp(), y, reduction="none")

        def root(self, z: Tensor) -> Tensor:
            return cl.likelihoods.Categorical().root(z * self.log_t.exp()) * self.log_t.exp()

        def sample(self, z: Tensor, generator: torch.Generator) -> Tensor:
            return cl.likelihoods.Categorical().sample(z * self.log_t.exp(), generator)

    for likelihood, name in (
        (Tempered(), "log_t"),
        (cl.likelihoods.Heads({"one": Tempered()}), "one.log_t"),
    ):
        with pytest.warns(cl.CurvlabWarning, match=rf"of its own \({name}\).* stand still"):
            cl.Objective(nn.Linear(4, 3).double(), likelihood)
