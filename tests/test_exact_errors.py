"""Bad input to the oracle: one clear error that names the thing and the remedy, whatever is asked
for, before any number.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Iterator
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from problems import Poisson, Problem, assert_near, problem
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack
from torch.utils.checkpoint import checkpoint

import curvlab as cl
from curvlab.errors import CurvlabError
from curvlab.exact import KINDS, Kind
from curvlab.likelihoods import Bernoulli, Categorical, Gaussian, Likelihood
from curvlab.linalg.products import Product

Call = Callable[..., Any]
"""Of an objective, x and y."""

MATRICES: dict[str, Call] = {
    kind: lambda o, x, y, kind=kind: cl.exact.matrix(o, x, y, kind, "1") for kind in KINDS
} | {
    "whole": lambda o, x, y: cl.exact.matrix(o, x, y, "hessian", None),
    "pair": lambda o, x, y: cl.exact.matrix(o, x, y, "ggn", ("1", "1")),
    "func": lambda o, x, y: cl.exact.matrix(o, x, y, "ggn", "1", route="func"),
    "product": lambda o, x, y: (
        (p := cast(Product, cl.exact.product(o, x, y, "ef"))) @ torch.ones(len(p), dtype=p.dtype)
    ),
    "diagonal": lambda o, x, y: cl.exact.diagonal(o, x, y, "hessian"),
    "loader": lambda o, x, y: cl.exact.matrix(o, [(x, y)], kind="ggn", block="1"),
}
WITH_TARGETS = MATRICES | {"gradients": cl.exact.gradients}
ALL = WITH_TARGETS | {"jacobians": lambda o, x, y: cl.exact.jacobians(o, x)}

matrices = pytest.mark.parametrize("call", MATRICES.values(), ids=MATRICES)
with_targets = pytest.mark.parametrize("call", WITH_TARGETS.values(), ids=WITH_TARGETS)
everything = pytest.mark.parametrize("call", ALL.values(), ids=ALL)


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def objective(net: nn.Module, likelihood: Likelihood | None = None) -> cl.Objective:
    return cl.Objective(net.double(), likelihood or Gaussian())


# ------------------------------------------------------------------------------------------------
# data


def bad_data() -> dict[str, tuple[str, Tensor, Tensor, str]]:
    """{what: (likelihood, x, y, message)}."""
    x, y = problem().x, problem().y
    hot = torch.zeros(7, 3).double()
    nan, inf = hot.clone(), x.clone()
    nan[2, 0], inf[4, 1] = math.nan, math.inf
    return {
        "label": (
            "categorical",
            x,
            torch.full_like(y, 5),
            "label 5 is out of range: the model has 3 outputs, so .* 0 to 2",
        ),
        "negative label": ("categorical", x, torch.full_like(y, -1), "label -1 is out of range"),
        "float labels": (
            "categorical",
            x,
            y.double(),
            r"categorical targets must be integers, .*: convert them with y.long()",
        ),
        "one-hot labels": (
            "categorical",
            x,
            hot.long(),
            r"targets have shape \(7, 3\) but 7 class numbers, shape \(7,\)",
        ),
        "range": (
            "bernoulli",
            x,
            hot + 1.5,
            r"Bernoulli targets must lie in \[0, 1\]: rescale the data",
        ),
        "integers": (
            "bernoulli",
            x,
            hot.long(),
            r"Bernoulli targets must be floating point.*: convert them with y.float()",
        ),
        "shape": (
            "gaussian",
            x,
            hot[:, :2],
            r"targets have shape \(7, 2\) but the model's outputs have shape \(7, 3\)",
        ),
        "NaN target": (
            "gaussian",
            x,
            nan,
            "Gaussian targets contain NaN or Inf: clean the data first",
        ),
        "length": (
            "gaussian",
            x,
            hot[:5],
            "the minibatch has 7 inputs but 5 targets: they must be as many",
        ),
        "empty": ("gaussian", x[:0], hot[:0], "the minibatch is empty"),
        "Inf input": (
            "gaussian",
            inf,
            hot,
            r"the inputs contain NaN or Inf \(first in example 4 of the minibatch\)",
        ),
        "width": (
            "gaussian",
            x[:, :4],
            hot,
            r"the model does not take inputs of shape \(7, 4\): mat1 and mat2 shapes",
        ),
        "whole numbers": (
            "gaussian",
            x.long(),
            hot,
            r"the model does not take inputs of shape \(7, 5\): .*same dtype",
        ),
    }


@with_targets
@pytest.mark.parametrize("what", bad_data())
def test_data_that_do_not_fit(what: str, call: Call) -> None:
    likelihood, x, y, message = bad_data()[what]
    with pytest.raises(CurvlabError, match=message):
        call(problem("tanh", likelihood).objective(), x, y)


@pytest.mark.parametrize("what", ["empty", "Inf input", "width", "whole numbers"])
def test_inputs_of_jacobians_that_do_not_fit(what: str) -> None:
    _, x, _, message = bad_data()[what]
    with pytest.raises(CurvlabError, match=message):
        cl.exact.jacobians(problem().objective(), x)


@pytest.mark.parametrize(
    ("model", "x", "message"),
    [
        (
            "embedding",
            torch.full((7, 3), 6),
            r"does not take inputs of shape \(7, 3\): index 6 is beyond the 6 rows",
        ),
        (
            "embedding",
            torch.zeros(7, 3).double(),
            r"does not take inputs of shape \(7, 3\): Expected tensor .* 'indices'",
        ),
        (
            "conv",
            torch.zeros(7, 3, 5, 5).double(),
            r"does not take inputs of shape \(7, 3, 5, 5\): .*2 channels",
        ),
        (
            "batch-norm",
            torch.zeros(7, 2, 2, 5).double(),
            r"does not take inputs of shape \(7, 2, 2, 5\): expected 2D or 3D",
        ),
        ("layer-norm", torch.zeros(7).double(), r"does not take inputs of shape \(7,\): "),
    ],
)
def test_inputs_that_a_layer_does_not_take(model: str, x: Tensor, message: str) -> None:
    with pytest.raises(CurvlabError, match=message):
        cl.exact.gradients(problem(model).objective(), x, problem().y)


@matrices
def test_x_without_y_and_what_is_no_data(call: Call) -> None:
    o, p = problem().objective(), problem()
    if call is not MATRICES["loader"]:
        with pytest.raises(
            CurvlabError,
            match=r"targets are missing: give x and y, or a loader of \(x, y\) pairs in place of x",
        ):
            call(o, p.x, None)
        with pytest.raises(
            CurvlabError,
            match=r"must be tensors, or tuples, mappings .*, not ndarray and Tensor: torch.as_",
        ):
            call(o, p.x.numpy(), p.y)
        with pytest.raises(
            CurvlabError,
            match=r"the data must be tensors x, y or a loader of \(x, y\) pairs, not int",
        ):
            call(o, 3, None)
    with pytest.raises(
        CurvlabError,
        match=r"must be tensors, or tuples, mappings and dataclasses .*, not ndarray and T",
    ):
        call(o, p.x.numpy(), p.y)


@pytest.mark.parametrize("kind", KINDS)
def test_loaders_that_are_empty_or_yield_something_else(kind: Kind) -> None:
    o, p = problem().objective(), problem()
    calls = [
        lambda data: cl.exact.matrix(o, data, kind=kind, block="1"),
        lambda data: cl.exact.matrix(o, data, kind=kind, block=None),
        lambda data: cl.exact.matrices(o, data, kind=kind),
        lambda data: cl.exact.product(o, data, kind=kind) @ torch.ones(len(o.layout)).double(),
        lambda data: cl.exact.diagonal(o, data, kind=kind),
    ]
    for call in calls:
        with pytest.raises(
            CurvlabError, match="the loader is empty: there is no example to take a mean over"
        ):
            call([])
        for data, told in (
            ([p.x], "must be a pair (x, y), or a mapping with the key 'labels', not Tensor"),
            ([(p.x, p.y, p.y)], "has 3 parts, which may be several inputs or several targets"),
            ({"x": p.x}, "has no key 'labels' for its labels (keys: 'x')"),
        ):
            with pytest.raises(CurvlabError, match=re.escape(told)):
                call(data)
        with pytest.raises(
            CurvlabError, match=r"a minibatch must be tensors, or tuples, .* not list and Tensor"
        ):
            call([([1.0], p.y)])
        with pytest.raises(CurvlabError, match="label 9 is out of range"):
            call([(p.x, p.y), (p.x, torch.full_like(p.y, 9))])


def test_an_iterator_where_the_data_are_read_again() -> None:
    p = problem()
    with pytest.raises(
        CurvlabError, match="an iterator ends after one pass: give a list or a DataLoader"
    ):
        cl.exact.product(p.objective(), iter([(p.x, p.y)]), kind="ggn")


@pytest.mark.parametrize("kind", ["ggn", "hessian", "fisher-mc"])
def test_an_iterator_where_the_data_are_read_once(kind: Kind) -> None:
    """A diagonal takes one pass, as a matrix does, and a loader that shuffles at the next."""
    p = problem()
    halves = [(p.x[:3], p.y[:3]), (p.x[3:], p.y[3:])]
    diagonal = cl.exact.diagonal(p.objective(), iter(halves), kind=kind)
    assert torch.equal(diagonal, cl.exact.diagonal(p.objective(), halves, kind=kind))
    matrix = cl.exact.matrix(p.objective(), iter(halves), kind=kind, block=None)
    assert_near(diagonal, matrix.dense().diagonal())


# ------------------------------------------------------------------------------------------------
# names, numbers


@pytest.mark.parametrize("call", [cl.exact.matrix, cl.exact.product])
def test_unknown_names_come_with_the_known_ones(call: Callable[..., object]) -> None:
    p = problem()
    with pytest.raises(
        CurvlabError,
        match=(
            r"unknown kind of matrix 'hesian'; did you mean 'hessian'\? \(known: hessian, ggn, pi"
        ),
    ):
        call(p.objective(), p.x, p.y, "hesian", "1")
    known = r"\(known: 1, 2, 3, 0.weight, 0.bias, 2.weight, 2.bias, 4.weight, 4.bias\)"
    for block in ("5", ("1", "5"), ("5", "1")):
        with pytest.raises(CurvlabError, match=rf"unknown block '5' {known}"):
            call(p.objective(), p.x, p.y, "ggn", block)
    with pytest.raises(CurvlabError, match=r"unknown block '0.wieght'; did you mean '0.weight'\?"):
        call(p.objective(), p.x, p.y, "ggn", "0.wieght")


def test_unknown_names_elsewhere() -> None:
    p = problem()
    with pytest.raises(
        CurvlabError,
        match=r"unknown route 'row'; did you mean 'rows'\? \(known: pairs, places, rows, func\)",
    ):
        cl.exact.matrix(p.objective(), p.x, p.y, "ggn", "1", route="row")
    with pytest.raises(CurvlabError, match=r"unknown route 'row'"):
        cl.exact.matrix(p.objective(), p.x, p.y, "ggn", None, route="row")
    with pytest.raises(CurvlabError, match=r"unknown block '5' \(known: 1, 2, 3\)"):
        cl.exact.matrices(p.objective(), p.x, p.y, "ggn", ["5"])
    calls: tuple[Call, ...] = (cl.exact.routes, cl.exact.diagonal)
    for call in calls:
        with pytest.raises(CurvlabError, match="unknown kind of matrix 'f'"):
            call(p.objective(), p.x, p.y, "f")


def test_no_draw() -> None:
    p = problem()
    for call in (cl.exact.matrix, cl.exact.matrices, cl.exact.product, cl.exact.diagonal):
        with pytest.raises(CurvlabError, match="draws must be 1 or more, not 0"):
            call(p.objective(), p.x, p.y, "fisher-mc", draws=0)


@pytest.mark.parametrize("block", ["1", "weight", None, ("1", "weight")])
def test_a_matrix_larger_than_the_memory(block: Any) -> None:
    """With its size, and the form in which it fits."""
    o = cl.Objective(nn.Linear(400_000, 4), Gaussian())
    x, y = torch.zeros(1, 400_000), torch.zeros(1, 4)
    message = (
        r"would need 13\d\d\d\.\d GB and this machine has .* GB of memory; .*its product form:"
        r" curvlab.exact.product"
    )
    with pytest.raises(CurvlabError, match=message):
        cl.exact.matrix(o, x, y, "ggn", block)
    with pytest.raises(
        CurvlabError,
        match=r"a dense 1600004×1600004 matrix would need .* GB .*; use products with vectors",
    ):
        cl.exact.product(o, x, y, "ggn", None).dense()


# ------------------------------------------------------------------------------------------------
# the model's numbers


@everything
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite(value: float, call: Call) -> None:
    """Also where the loss is: tanh of ∞ is 1."""
    p = problem("tanh", "gaussian")
    with torch.no_grad():
        p.model[2].bias[1] = value
    with pytest.raises(CurvlabError, match=r"the weights '2.bias' contain NaN or Inf"):
        call(p.objective(), p.x, p.y)


class Bounded(nn.Module):
    """The layer before it, then something of one's own."""

    def __init__(self, then: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.layer, self.then = nn.Linear(5, 3), then

    def forward(self, x: Tensor) -> Tensor:
        return self.then(self.layer(x))


@everything
def test_outputs_that_are_not_finite(call: Call) -> None:
    p = problem("tanh", "gaussian")
    with pytest.raises(CurvlabError, match="the model's outputs contain NaN or Inf"):
        call(objective(Bounded(lambda h: h / 0)), p.x, p.y)
    o = objective(
        Bounded(lambda h: torch.cat([h[:, :2], h[:, 2:] * 0 - math.inf], 1)), Categorical()
    )
    with pytest.raises(
        CurvlabError, match="the model's outputs contain NaN or Inf"
    ):  # although the loss is finite
        call(o, p.x, torch.zeros(7).long())


def test_a_likelihood_that_overflows() -> None:
    p = problem()
    with pytest.raises(
        CurvlabError, match="the loss is inf: the outputs are finite, so the likelihood overflows"
    ):
        cl.exact.matrix(
            objective(Bounded(lambda h: h + 1000), Poisson()),
            p.x,
            torch.ones(7, 3).double(),
            "ggn",
            "1",
        )


@pytest.mark.parametrize("kind", KINDS)
def test_derivatives_that_are_not_finite(kind: Kind) -> None:
    """A root at 0: the loss is finite, nothing else is."""
    p = problem("linear", "gaussian")
    o = objective(Bounded(lambda h: (h * 0).sqrt()))
    for block in ("1", None, ("1", "1")):
        with pytest.raises(
            CurvlabError,
            match=rf"{kind} .*contains NaN or Inf although the loss is finite|{kind} contains NaN",
        ):
            cl.exact.matrix(o, p.x, p.y, kind, block)


# ------------------------------------------------------------------------------------------------
# models without examples


def normalised(norm: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(5, 3), norm, nn.Tanh(), nn.Linear(3, 3))


@everything
def test_batch_norm_in_training(call: Call) -> None:
    """An example's gradient has no meaning there: said in one line, and no statistics moved."""
    p = problem("tanh", "gaussian")
    net = normalised(nn.BatchNorm1d(3))
    before = {key: t.clone() for key, t in net.double().state_dict().items()}
    with pytest.raises(
        CurvlabError, match=r"'1' normalises over the batch.* call model\.eval\(\) first"
    ):
        call(objective(net), p.x, p.y)
    assert all(torch.equal(t, before[key]) for key, t in net.state_dict().items())
    call(objective(net.eval()), p.x, p.y)


@everything
def test_batch_norm_without_statistics_of_its_own(call: Call) -> None:
    p = problem("tanh", "gaussian")
    with pytest.raises(CurvlabError, match=r"'1' normalises over the batch"):
        call(objective(normalised(nn.BatchNorm1d(3, track_running_stats=False)).eval()), p.x, p.y)


class Wrapped(nn.Module):
    def __init__(self, inner: nn.Module, call: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.inner, self.call, self.last = inner, call, nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.call(self.inner, x))


def dropping(what: str) -> tuple[nn.Module, Tensor, str]:
    """(model, x, the module's name)."""
    tokens = torch.randn(7, 3, 4, generator=torch.Generator().manual_seed(0)).double()
    if what == "attention":
        inner = nn.MultiheadAttention(4, 2, dropout=0.5, batch_first=True)
        return Wrapped(inner, lambda m, x: m(x, x, x)[0].mean(1)), tokens, "inner"
    if what == "recurrent":
        return (
            Wrapped(nn.LSTM(4, 4, 2, dropout=0.5, batch_first=True), lambda m, x: m(x)[0][:, -1]),
            tokens,
            "inner",
        )
    if what == "transformer":
        layer = nn.TransformerEncoderLayer(4, 2, 3, 0.5, batch_first=True)
        return Wrapped(layer, lambda m, x: m(x).mean(1)), tokens, "inner.self_attn"
    drops = {
        "dropout": nn.Dropout(0.5),
        "alpha": nn.AlphaDropout(0.5),
        "channels": nn.Dropout1d(0.5),
    }
    return nn.Sequential(nn.Linear(5, 3), drops[what], nn.Linear(3, 3)), problem().x, "1"


@pytest.mark.thinned(2)
@everything
@pytest.mark.parametrize(
    "what", ["dropout", "alpha", "channels", "attention", "recurrent", "transformer"]
)
@pytest.mark.filterwarnings("ignore::curvlab.errors.CurvlabWarning")
def test_dropout_in_training(what: str, call: Call) -> None:
    net, x, name = dropping(what)
    y = problem("tanh", "gaussian").y
    with pytest.raises(
        CurvlabError, match=rf"'{name}' drops units at random, .*: call model\.eval\(\) first"
    ):
        call(objective(net), x, y)
    call(objective(net.eval()), x, y)


def test_dropout_of_nothing_is_no_dropout() -> None:
    p = problem("tanh", "gaussian")
    net = nn.Sequential(nn.Linear(5, 3), nn.Dropout(0.0)).double()
    found = cl.exact.matrix(objective(net), p.x, p.y, "ggn", "1").dense()
    assert_near(found, cl.exact.matrix(objective(net[0]), p.x, p.y, "ggn", "1").dense())


@everything
@pytest.mark.parametrize(
    "then",
    [lambda h: F.dropout(h, 0.1), lambda h: h + torch.randn(3).double() * 1e-9],
    ids=["dropout", "noise"],
)
def test_randomness_in_the_forward_pass(then: Callable[[Tensor], Tensor], call: Call) -> None:
    """Functional dropout shows in no module: the state of the generator does."""
    p = problem("tanh", "gaussian")
    with pytest.raises(
        CurvlabError,
        match=r"the model draws random numbers in its forward pass.*training=self.training",
    ):
        call(objective(Bounded(then)), p.x, p.y)


@everything
def test_randomness_from_a_generator_of_its_own_and_examples_that_mix(call: Call) -> None:
    p = problem("tanh", "gaussian")
    own = torch.Generator().manual_seed(0)
    noise = Bounded(lambda h: h + torch.randn(h.shape, generator=own, dtype=h.dtype))
    for net in (noise, Bounded(lambda h: h - h.mean(0)), Bounded(lambda h: h / h.norm())):
        with pytest.raises(
            CurvlabError,
            match=(
                "outputs depend on the rest of the minibatch, or on chance: no example has a loss"
            ),
        ):
            call(objective(net), p.x, p.y)


@everything
def test_a_batch_that_is_squeezed_away(call: Call) -> None:
    p = problem("tanh", "gaussian")
    with pytest.raises(
        CurvlabError, match=r"must return one tensor with 1 rows, .*squeeze\(-1\), not squeeze\(\)"
    ):
        call(objective(Bounded(lambda h: h[:, :1].squeeze())), p.x, p.y[:, 0])


@everything
def test_a_layer_that_is_not_used_is_said_at_most_once(call: Call) -> None:
    """No error: its derivatives are zero (test_exact_models)."""

    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.idle = nn.Linear(5, 3), nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x)

    p = problem("tanh", "gaussian")
    o = objective(Unused())
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", cl.CurvlabWarning)
        for _ in range(2):
            call(o, p.x, p.y)
    lines = [str(w.message) for w in said if issubclass(w.category, cl.CurvlabWarning)]
    assert len(lines) <= 1
    assert all(
        line.startswith("block 2 (idle.weight, idle.bias) does not reach the model's outputs")
        for line in lines
    )


@everything
def test_a_layer_that_ran_without_gradients(call: Call) -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.last = nn.Linear(5, 5), nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                h = self.layer(x)
            return self.last(h)

    p = problem("tanh", "gaussian")
    with pytest.raises(
        CurvlabError,
        match=r"block 1 \(layer.weight, layer.bias\) ran without gradients: remove torch.no_grad",
    ):
        call(objective(Fixed()), p.x, p.y)


# ------------------------------------------------------------------------------------------------
# layers without a rule


@pytest.mark.wrong_shapes  # not shapes, but the checker's own frames in the stack
@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_without_a_rule_is_said_once(kind: Kind) -> None:
    p = problem("norm")
    named = (
        rf"block 2 \(norm.weight\), block 3 \(norm.bias\) belong to layers without a rule: {kind}"
        r" takes the general route"
    )
    loader = [(p.x, p.y)] * 3
    for call in (
        lambda: cl.exact.matrices(p.objective(), loader, kind=kind),
        lambda: cl.exact.matrix(p.objective(), loader, kind=kind, block=None),
    ):
        with pytest.warns(cl.CurvlabWarning, match=named) as said:
            call()
        assert [w.filename for w in said if issubclass(w.category, cl.CurvlabWarning)] == [__file__]
    for pair in ("2", ("1", "2"), ("norm.weight", "1")):
        with pytest.warns(
            cl.CurvlabWarning,
            match=rf"^block 2 \(norm.weight\) belongs to a layer without a rule: {kind} ",
        ) as said:
            cl.exact.matrix(p.objective(), p.x, p.y, kind, pair)
        assert [w.filename for w in said if issubclass(w.category, cl.CurvlabWarning)] == [__file__]
    cl.exact.matrix(p.objective(), p.x, p.y, kind, "1")  # a warning is an error here
    cl.exact.matrix(p.objective(), p.x, p.y, kind, "2", route="func")


def test_operations_without_a_second_derivative() -> None:
    net = Wrapped(nn.EmbeddingBag(6, 4), lambda m, x: m(x))
    o, x = objective(net, Categorical()), problem("embedding").x
    with pytest.raises(
        CurvlabError,
        match=(
            r"no second derivative of an operation in the model .*: replace it, or take ggn, fisher"
        ),
    ):
        cl.exact.matrix(o, x, problem().y, "hessian", "1", route="func")


def test_checkpointed_layers() -> None:
    """What recomputes itself on the way back is captured all the same."""

    class Checkpointed(nn.Module):
        def __init__(self, net: nn.Sequential) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: Tensor) -> Tensor:
            return self.net[2:](checkpoint(self.net[:2], x, use_reentrant=False))

    p = problem()
    q = Problem(Checkpointed(p.model), p.likelihood, p.x, p.y)
    for kind in KINDS:
        for block in ("1", "2", "3"):
            plain, found = (
                cl.exact.matrix(r.objective(), p.x, p.y, kind, block).dense() for r in (p, q)
            )
            assert_near(found, plain)


def test_failure_leaves_no_hooks_and_nobody_who_listens() -> None:
    p = problem()
    with pytest.raises(CurvlabError, match=r"does not take inputs of shape \(7, 4\)"):
        cl.exact.matrix(p.objective(), p.x[:, :4], p.y, "ggn", "1")
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in p.model.modules())
    assert not _get_current_function_mode_stack()


def test_targets_in_between_are_bernoullis_too() -> None:
    """Soft targets are no error: the boundary of the range belongs to it."""
    p = problem("tanh", "bernoulli")
    y = torch.linspace(0, 1, 21).double().view(7, 3)
    assert_near(
        cl.exact.matrix(p.objective(), p.x, y, "hessian", "3").dense(),
        cl.exact.matrix(cl.Objective(p.model, Bernoulli()), p.x, 1 - y, "hessian", "3").dense(),
    )
