"""Capture against perturbation: g is the derivative of each loss in a zero added to the layer's
output.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracle import total
from plain import Plain
from problems import (
    LIKELIHOODS,
    MODELS,
    Problem,
    assert_near,
    laid_out,
    module_of,
    own_inputs,
    problem,
)
from torch import Tensor, nn
from torch.func import functional_call, jacrev
from torch.nn.modules import module as global_hooks
from torch.overrides import _get_current_function_mode_stack

import curvlab as cl
from curvlab.capture import Capture
from curvlab.errors import CurvlabError
from curvlab.exact import Kind
from curvlab.layers import Block
from curvlab.statistics import LayerStatistics

ZOO = [(model, likelihood) for model in MODELS for likelihood in LIKELIHOODS]
zoo = pytest.mark.parametrize(("model", "likelihood"), ZOO)


def ruled(p: Problem) -> list[Block]:
    return [b for b in p.objective().blocks if b.module is not None]


CHANNELS_FIRST = (nn.modules.conv._ConvNd, nn.modules.batchnorm._BatchNorm, nn.GroupNorm)


def places(module: nn.Module, t: Tensor) -> Tensor:
    """[N, F], [N, T, F] or [N, C, *T] → [N, T, F]."""
    if t.ndim > 2 and isinstance(module, CHANNELS_FIRST):
        return t.flatten(2).transpose(1, 2)
    return t[:, None] if t.ndim == 2 else t.flatten(1, -2)


def slopes(block: Block, x: Tensor) -> Tensor:
    """∂h[n, t, o]/∂W[o, :] by torch.func: the inputs that output o sees, [N, T, O, I]; h is linear
    in W.
    """
    module = block.module
    assert module is not None
    own = {name.rpartition(".")[2]: name for name in block.params}
    values = {name: module.get_parameter(name).detach() for name in own}
    J = jacrev(lambda v: places(module, functional_call(module, v, (x,))))(values)
    found = laid_out(block, {own[name]: j for name, j in J.items()}, 3)  # [N, T, O, O, I]
    return found.diagonal(dim1=2, dim2=3).movedim(-1, 2)


def perturbed(p: Problem, vectors: Tensor) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """{block: (∂h/∂W, h, g)} by adding a zero to every layer's output, its derivative taken in that
    zero, vector by vector.
    """
    found: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
    x, h, zeros = {}, {}, {}

    def hook(block: Block) -> Callable[..., Tensor]:
        def add(module: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
            x[block.name] = args[0].detach().clone()
            h[block.name] = places(module, output.detach().clone())
            zeros[block.name] = torch.zeros_like(output, requires_grad=True)
            return output + zeros[block.name]

        return add

    blocks = ruled(p)
    handles = [module_of(block).register_forward_hook(hook(block)) for block in blocks]
    z = p.model(p.x)
    for handle in handles:
        handle.remove()
    for block in blocks:
        g = [torch.autograd.grad(z, zeros[block.name], v, retain_graph=True)[0] for v in vectors]
        a = slopes(block, x[block.name])
        found[block.name] = a, h[block.name], torch.stack([places(module_of(block), v) for v in g])
    return found


def captured(
    p: Problem, count: int = 1, seed: int = 0
) -> tuple[dict[str, LayerStatistics], Tensor]:
    """Statistics of `count` random vectors sent back, and the vectors."""
    with Capture(p.model, p.objective().blocks) as capture:
        z = p.model(p.x)
    vectors = torch.randn(
        count, *z.shape, generator=torch.Generator().manual_seed(seed), dtype=z.dtype
    )
    return capture.backward(z, vectors), vectors


@pytest.mark.thinned(2)
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("model", MODELS)
def test_a_h_and_g_against_perturbation(model: str, count: int) -> None:
    """`a` is the derivative of each pre-activation in its own weights, and that of the bias is
    one.
    """
    p = problem(model)
    statistics, vectors = captured(p, count)
    expected = perturbed(p, vectors)
    assert list(statistics) == list(expected)
    for name, s in statistics.items():
        a, h, g = expected[name]
        if s.block.groups == 1:
            assert torch.equal(own_inputs(s.block, s.a), a)
        assert_near(own_inputs(s.block, s.grouped_a), a)
        assert_near(s.g, g)
        if not (model == "relu" and name == "1"):
            assert torch.equal(s.h, h)


@zoo
@pytest.mark.parametrize("label", ["data", "model", "exact"])
def test_second_moments_by_their_definition(model: str, likelihood: str, label: str) -> None:
    """A = (1/N) Σₙ Σₜ a aᵀ and G = (1/NT) Σᵥ Σₙ Σₜ g gᵀ, one outer product at a time. Groups have a
    G alone.
    """
    p = problem(model, likelihood)
    statistics = p.objective().closure(p.x, p.y).observe({label}).passes[label]
    for block in ruled(p):
        s = statistics[block.name]
        v, n, t, o = s.g.shape
        groups = () if block.groups == 1 else (block.groups,)
        assert s.grouped_a.shape == (n, t, *groups, block.shape[1])
        assert (n, o) == (len(p.x), block.shape[0])
        G = total(
            torch.outer(s.g[u, i, k], s.g[u, i, k])
            for u in range(v)
            for i in range(n)
            for k in range(t)
        ) / (n * t)
        assert_near(s.G, G)
        if not groups:
            assert_near(
                s.A,
                total(torch.outer(s.a[i, k], s.a[i, k]) for i in range(n) for k in range(t)) / n,
            )
            continue
        for name in ("a", "A"):
            with pytest.raises(
                CurvlabError, match=f"block {block.name} .* has {block.groups} groups of outputs"
            ):
                getattr(s, name)


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("model", MODELS)
def test_rows_are_gradients_of_one_example_each(model: str, count: int) -> None:
    """rows[v, n] is the derivative of ⟨vᵥₙ, zₙ⟩ in the block, the example alone in its batch."""
    p = problem(model)
    statistics, vectors = captured(p, count)
    for block in ruled(p):
        rows = statistics[block.name].rows
        weights = {name: p.model.get_parameter(name) for name in block.params}
        for v in range(count):
            for n in range(len(p.x)):
                grads = torch.autograd.grad(
                    (p.model(p.x[n : n + 1])[0] * vectors[v, n]).sum(), list(weights.values())
                )
                assert_near(rows[v, n], laid_out(block, dict(zip(weights, grads, strict=True))))


@pytest.mark.parametrize("at_once", [1, 4, 1000])
@pytest.mark.parametrize("model", MODELS)
def test_rows_in_parts_are_the_rows(model: str, at_once: int) -> None:
    p = problem(model)
    for s in captured(p, 3)[0].values():
        parts = list(s.some_rows(at_once))
        assert all(part.shape[0] <= max(at_once, 3) for part in parts)
        assert_near(torch.cat([part.unflatten(0, (3, -1)) for part in parts], 1), s.rows.flatten(2))


@zoo
def test_gradient_is_the_sum_of_the_rows_over_n(model: str, likelihood: str) -> None:
    p = problem(model, likelihood)
    statistics = p.objective().closure(p.x, p.y).observe({"data"}).passes["data"]
    for block in ruled(p):
        s = statistics[block.name]
        assert_near(s.gradient, s.rows[0].sum(0) / len(p.x))


@pytest.mark.parametrize("model", MODELS)
def test_each_property_is_computed_once_and_inputs_are_shared_by_the_passes(model: str) -> None:
    p = problem(model)
    passes = p.objective().closure(p.x, p.y).observe({"data", "exact"}).passes
    for block in ruled(p):
        data, exact = passes["data"][block.name], passes["exact"][block.name]
        assert data.G is data.G
        assert data.rows is data.rows
        assert data.grouped_a is exact.grouped_a
        if block.groups == 1:
            assert data.a is data.grouped_a
            assert data.A is exact.A


def test_relu_in_place_keeps_g_and_refuses_h() -> None:
    """The same model with ReLU(inplace=False) gives the same numbers; only the overwritten h cannot
    be read.
    """
    p, q = problem("relu"), problem("relu")
    assert p.model[1].inplace
    q.model[1].inplace = False
    (ours, vectors), (theirs, _) = captured(p, 2), captured(q, 2)
    for name in ("1", "2"):
        assert torch.equal(ours[name].a, theirs[name].a)
        assert torch.equal(ours[name].g, theirs[name].g)
    with pytest.raises(
        CurvlabError,
        match=r"block 1 \(0\.weight, 0\.bias\): its pre-activation was overwritten in place",
    ):
        _ = ours["1"].h
    assert torch.equal(ours["2"].h, theirs["2"].h)
    assert torch.equal(theirs["1"].h, perturbed(q, vectors)["1"][1])


def test_input_overwritten_after_the_layer_is_not_used() -> None:
    """`x += …` behind a layer changes the input that the layer saw: never a silent wrong a."""

    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(2, 2), nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            y = self.first(x)
            x += 1
            return self.second(torch.tanh(y))

    net = Residual().double()
    x, y = torch.ones(3, 2, dtype=torch.float64), torch.zeros(3, 2, dtype=torch.float64)
    closure = cl.Objective(net, cl.likelihoods.Gaussian()).closure(x, y)
    with pytest.raises(
        CurvlabError, match=r"block 1 \(first\.weight, first\.bias\).* overwritten in place"
    ):
        _ = closure.observe({"data"}).gradients


HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def traces(model: nn.Module) -> int:
    """Hooks on modules, on all modules and on parameters, and function modes: what somebody who
    listens may have left.
    """
    own = [getattr(m, name) for m in model.modules() for name in HOOKS]
    own += [getattr(global_hooks, f"_global{name}") for name in HOOKS]
    own += [p._backward_hooks or () for p in model.parameters()]
    own += [p._post_accumulate_grad_hooks or () for p in model.parameters()]
    return sum(map(len, own)) + len(_get_current_function_mode_stack())


def test_it_listens_only_inside_with_and_by_no_hook() -> None:
    p = problem()
    blocks = p.objective().blocks
    capture = Capture(p.model, blocks)
    assert traces(p.model) == 0
    with capture:
        assert traces(p.model) == len(_get_current_function_mode_stack()) == 1
        p.model(p.x)
    assert traces(p.model) == 0
    assert {name: len(uses) for name, uses in capture.uses.items()} == {b.name: 1 for b in blocks}
    p.model(p.x)
    assert {name: len(uses) for name, uses in capture.uses.items()} == {b.name: 1 for b in blocks}
    with pytest.raises(RuntimeError, match="broken"), Capture(p.model, blocks):
        raise RuntimeError("broken")
    assert traces(p.model) == 0
    with pytest.raises(RuntimeError, match="mat1 and mat2"), Capture(p.model, blocks):
        p.model(p.x[:, :2])
    assert traces(p.model) == 0
    with pytest.raises(CurvlabError, match="does not take inputs of shape"):
        p.objective().closure(p.x[:, :2], p.y).observe()
    assert traces(p.model) == 0


def test_hooks_of_the_users_own_are_left_alone_and_their_calls_are_heard() -> None:
    """A hook may call the layer's function again: a second use."""
    p = problem("linear", "gaussian")
    handle = p.model.register_forward_hook(
        lambda m, args, z: z + nn.functional.linear(args[0].square(), m.weight)
    )
    objective = p.objective()
    assert objective.check(p.x, p.y).ways == {"1": "structured"}
    found, plain = (
        objective.closure(p.x, p.y).observe(),
        Plain(p.model, p.x, p.y, p.likelihood.loss),
    )
    assert len(found.passes["data"]["1"].parts) == 2
    assert_near(found.gradients["1"], laid_out(objective.blocks[0], plain.mean_gradient))
    assert traces(p.model) == 1
    handle.remove()


def test_nothing_is_written_on_modules_or_gradients() -> None:
    p = problem("norm")
    before = {name: set(vars(m)) for name, m in p.model.named_modules()}
    p.objective().closure(p.x, p.y).observe({"data", "model", "exact"})
    assert {name: set(vars(m)) for name, m in p.model.named_modules()} == before
    assert all(q.grad is None for q in p.model.parameters())


def test_capture_can_be_entered_again() -> None:
    p = problem()
    capture = Capture(p.model, p.objective().blocks)
    for x in (p.x, p.x[:3] + 1):
        with capture:
            z = p.model(x)
        s = capture.backward(z, torch.ones_like(z)[None])
        assert torch.equal(s["1"].a[:, 0, :-1], x)
        assert s["3"].h.shape == (len(x), 1, 3)


class Small(nn.Module):
    """Two layers and a forward to be chosen."""

    def __init__(self, forward: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second, self.run = nn.Linear(2, 2), nn.Linear(2, 2), forward

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def without_gradients(m: Small, x: Tensor) -> Tensor:
    with torch.no_grad():
        h = m.first(x)
    return m.second(h)


Forward = Callable[[Small, Tensor], Tensor]

WIRED: dict[str, tuple[Forward, str, int, str]] = {
    "reused": (lambda m, x: m.second(m.first(torch.tanh(m.first(x)))), "structured", 2, ""),
    "not run": (lambda m, x: m.second(x), "unused", 0, ""),
    "no way out": (lambda m, x: (m.first(x), m.second(x))[1], "unused", 0, ""),
    "one of two ways out": (
        lambda m, x: (m.first(x), m.second(m.first(2 * x)))[1],
        "structured",
        1,
        "",
    ),
    "batch not first": (
        lambda m, x: m.second(m.first(x.repeat(2, 1)))[: len(x)],
        "structured",
        2,
        "",
    ),
    "rows of nobody": (
        lambda m, x: m.second(m.first(torch.cat([x, x[:1]]))[:-1]),
        "general",
        0,
        "saw 4 rows in a batch of 3",
    ),
    "batch second": (lambda m, x: m.second(m.first(x[None])[0]), "structured", 1, ""),
    "sequence first": (
        lambda m, x: m.second(m.first(torch.stack([x, x.sin()]))).sin().sum(0),
        "structured",
        2,
        "",
    ),
    "flattened": (
        lambda m, x: (
            m.second(m.first(torch.stack([x, x.sin()], 1).flatten(0, 1)).view(-1, 2, 2))
            .sin()
            .sum(1)
        ),
        "structured",
        2,
        "",
    ),
    "no batch": (
        lambda m, x: m.second(torch.stack([m.first(one) for one in x])),
        "general",
        0,
        "is used by a call without a rule",
    ),
}
"""{what is done with the first layer: (forward, the way of its block, places of an example, why it
goes the general way)}
"""


def small(forward: Forward) -> tuple[Small, Tensor, Tensor]:
    """With three examples of two numbers."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        return Small(forward).double(), torch.randn(3, 2).double(), torch.randn(3, 2).double()


@pytest.mark.parametrize("case", WIRED)
@pytest.mark.filterwarnings("ignore:.*(does not reach|takes the general route)")
def test_gradients_of_wirings_by_autograd_one_example_at_a_time(case: str) -> None:
    forward, way, places, why = WIRED[case]
    net, x, y = small(forward)
    objective, plain = (
        cl.Objective(net, cl.likelihoods.Gaussian()),
        Plain(net, x, y, cl.likelihoods.Gaussian().loss),
    )
    report = objective.check(x, y)
    assert report.ways == {"1": way, "2": "structured"}
    assert report.form.ways["1"].why == why
    seen = objective.closure(x, y).observe({"data", "exact"})
    samples = cl.exact.gradients(objective, x, y)
    for block in objective.blocks:
        s = seen.passes["data"][block.name]
        assert_near(seen.gradients[block.name], laid_out(block, plain.mean_gradient))
        assert_near(seen.gradients[block.name], laid_out(block, plain.gradients, 1).mean(0))
        assert_near(laid_out(block, samples, 1), laid_out(block, plain.gradients, 1))
        if block.name in report.form.shaped:
            assert_near(s.rows[0], laid_out(block, plain.gradients, 1))
            # a Gaussian's root is the identity
            J = laid_out(block, plain.jacobians, 2).transpose(0, 1)
            assert_near(seen.passes["exact"][block.name].rows, J)
    first = seen.passes["data"]["1"]
    assert (first.used, first.structured) == (way != "unused", way != "general")
    if way == "general":
        assert "1" not in seen.passes["exact"]
        with pytest.raises(
            CurvlabError,
            match=rf"^block 1 \(first\.weight, first\.bias\) {why}: it has a gradient but no a",
        ):
            _ = first.rows
    else:
        assert first.places == places
    assert traces(net) == 0


@pytest.mark.parametrize("case", WIRED)
@pytest.mark.parametrize("kind", ["ef", "ggn", "hessian"])
@pytest.mark.filterwarnings("ignore:.*(does not reach|takes the general route)")
def test_matrices_of_wirings_by_autograd_and_by_the_general_route(case: str, kind: Kind) -> None:
    net, x, y = small(WIRED[case][0])
    objective, plain = (
        cl.Objective(net, cl.likelihoods.Gaussian()),
        Plain(net, x, y, cl.likelihoods.Gaussian().loss),
    )
    one, two = objective.blocks
    whole = cl.exact.matrix(objective, x, y, kind, None).dense()
    wanted = torch.cat(
        [torch.cat([plain.matrix(kind, b, c) for c in (one, two)], 1) for b in (one, two)]
    )
    assert_near(whole, wanted)
    assert_near(cl.exact.product(objective, x, y, kind).dense(), wanted)
    assert_near(cl.exact.diagonal(objective, x, y, kind), wanted.diagonal())
    for block, own in objective.layout.slices.items():
        for route in ("auto", "func"):
            assert_near(
                cl.exact.matrix(objective, x, y, kind, block, route=route).dense(), wanted[own, own]
            )


UNUSED = ["not run", "no way out"]


@pytest.mark.parametrize("case", UNUSED)
def test_what_does_not_reach_the_outputs_is_said_once_and_is_zero(case: str) -> None:
    net, x, y = small(WIRED[case][0])
    objective = cl.Objective(net, cl.likelihoods.Gaussian())
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", cl.CurvlabWarning)
        looks = [objective.closure(x, y).observe({"data", "model", "exact"}) for _ in range(2)]
        matrices = [cl.exact.matrix(objective, x, y, kind, "1").dense() for kind in cl.exact.KINDS]
    lines = [str(w.message) for w in said if issubclass(w.category, cl.CurvlabWarning)]
    assert len(lines) == 1
    assert lines[0].startswith(
        "block 1 (first.weight, first.bias) does not reach the model's outputs"
    )
    for look in looks:
        assert not bool(look.gradients["1"].any())
        assert look.gradients["1"].shape == objective.blocks[0].shape
        for s in (look.passes[name]["1"] for name in look.passes):
            assert not any(bool(t.any()) for t in (s.rows, s.A, s.G, s.a, s.g))
            assert s.rows.shape == (s.vectors, 3, 2, 3)
    assert not any(bool(m.any()) for m in matrices)
    assert {m.shape for m in matrices} == {(6, 6)}
    with pytest.warns(
        cl.CurvlabWarning, match="does not reach the model's outputs"
    ):  # another objective says it again
        cl.Objective(net, cl.likelihoods.Gaussian()).closure(x, y).observe()


def test_what_ran_without_gradients_says_so() -> None:
    net, x, y = small(without_gradients)
    objective = cl.Objective(net, cl.likelihoods.Gaussian())
    with pytest.raises(
        CurvlabError, match=r"block 1 \(first\.weight, first\.bias\) ran without gradients"
    ) as caught:
        objective.closure(x, y).observe()
    assert "\n" not in str(caught.value)
    assert traces(net) == 0


def test_a_call_without_gradients_among_others_adds_nothing() -> None:
    """A target of one's own, say: constant for autograd, so for the capture."""

    def forward(m: Small, x: Tensor) -> Tensor:
        with torch.no_grad():
            fixed = m.first(x)
        return m.second(m.first(x) * fixed)

    net, x, y = small(forward)
    objective, plain = (
        cl.Objective(net, cl.likelihoods.Gaussian()),
        Plain(net, x, y, cl.likelihoods.Gaussian().loss),
    )
    assert objective.check(x, y).ways == {"1": "structured", "2": "structured"}
    seen = objective.closure(x, y).observe()
    for block in objective.blocks:
        assert_near(seen.passes["data"][block.name].rows[0], laid_out(block, plain.gradients, 1))


def test_parameter_without_a_rule_that_is_not_used() -> None:
    net, x, y = small(lambda m, x: m.second(m.first(x)))
    net.spare = nn.Parameter(torch.ones(2).double())
    objective = cl.Objective(net, cl.likelihoods.Gaussian())
    with pytest.warns(
        cl.CurvlabWarning, match=r"^block 1 \(spare\) does not reach the model's outputs"
    ) as said:
        gradients = objective.closure(x, y).observe().gradients
    assert sum(issubclass(w.category, cl.CurvlabWarning) for w in said) == 1
    assert torch.equal(gradients["1"], torch.zeros(2).double())
    again = objective.closure(x, y).observe().gradients  # a warning is an error here
    assert all(torch.equal(again[name], g) for name, g in gradients.items())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", cl.CurvlabWarning)
        for kind in cl.exact.KINDS:
            assert torch.equal(
                cl.exact.matrix(objective, x, y, kind, "1").dense(), torch.zeros(2, 2).double()
            )


def test_input_by_keyword() -> None:
    net = Small(lambda m, x: m.second(m.first(input=x)))
    x = torch.randn(3, 2)
    s = (
        cl.Objective(net, cl.likelihoods.Gaussian())
        .closure(x, torch.ones(3, 2))
        .observe()
        .passes["data"]
    )
    assert torch.equal(s["1"].a[:, 0, :2], x)


def test_layer_without_a_rule_has_a_gradient_and_nothing_else() -> None:
    p = problem("norm")
    s = p.objective().closure(p.x, p.y).observe().passes["data"]["2"]
    assert s.gradient.shape == (4,)
    for name in ("a", "h", "g", "A", "G", "rows"):
        with pytest.raises(
            CurvlabError, match=r"block 2 \(norm\.weight\) belongs to a layer without a rule"
        ):
            getattr(s, name)


def test_statistics_come_in_the_order_of_the_blocks() -> None:
    p = problem("norm")
    objective = p.objective()
    seen = objective.closure(p.x, p.y).observe({"data", "exact"})
    assert (
        list(seen.passes["data"])
        == list(seen.gradients)
        == [b.name for b in objective.blocks]
        == ["1", "2", "3", "4"]
    )
    assert list(seen.passes["exact"]) == ["1", "4"]


def test_several_vectors_have_no_gradient() -> None:
    p = problem("norm")
    exact = p.objective().closure(p.x, p.y).observe({"exact"}).passes["exact"]
    assert list(exact) == ["1", "4"]
    with pytest.raises(CurvlabError, match="a gradient needs a pass that sends one vector back"):
        _ = exact["1"].gradient


@pytest.mark.parametrize("frozen", ["0.bias", "0.weight", "2.weight"])
def test_frozen_parameters_leave_the_other_gradients_as_they_are(frozen: str) -> None:
    p, q = problem(), problem()
    q.model.get_parameter(frozen).requires_grad_(False)
    q.objective().closure(q.x, q.y)()
    everything = {b.name: b for b in q.objective().blocks}
    for name, gradient in q.objective().closure(q.x, q.y).observe().gradients.items():
        block = everything[name]
        assert frozen not in block.params
        for parameter, value in block.scatter(gradient).items():
            assert_near(value, q.model.get_parameter(parameter).grad)
    p.objective().closure(p.x, p.y)()
    for name, parameter in p.model.named_parameters():
        if name != frozen:
            assert_near(q.model.get_parameter(name).grad, parameter.grad)


@pytest.mark.parametrize("model", ["conv", "groups", "conv-1d", "embedding"])
def test_a_gradient_forms_neither_patches_nor_one_hot_rows(model: str) -> None:
    """Which are many times the inputs: a first-order method on a convolution costs what torch's own
    gradient does.
    """
    p = problem(model)
    observation = p.objective().closure(p.x, p.y).observe()
    found = observation.gradients
    for statistics in observation.passes["data"].values():
        (part,) = statistics.parts
        inputs: Any = part.inputs
        rule = inputs.use.rule
        assert ("own" in vars(part.inputs)) == (rule.gradient is None)
        # the other route: a product with the rows
        a = own_inputs(statistics.block, statistics.grouped_a)
        assert_near(
            found[statistics.block.name],
            torch.einsum("nto,ntoi->oi", statistics.g[0], a) / statistics.size,
        )


@pytest.mark.parametrize("model", ["tanh", "no-bias", "tokens", "conv", "conv-1d", "embedding"])
def test_products_with_the_second_moment_of_inputs_form_neither_it_nor_patches(model: str) -> None:
    """(3.15) example by example and place by place: mean over examples of a sum over places; the
    mean is over both.
    """
    p = problem(model)
    for statistics in p.objective().closure(p.x, p.y).observe().passes["data"].values():
        n, t, width = statistics.g.shape[1], statistics.g.shape[2], statistics.block.shape[1]
        v = torch.randn(width, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        if statistics.block.groups > 1:
            with pytest.raises(
                CurvlabError, match="groups of outputs, so there are no inputs for all outputs"
            ):
                statistics.second_moment_product(v)
            continue
        found, mean = statistics.second_moment_product(v), statistics.mean_a
        (part,) = statistics.parts
        inputs: Any = part.inputs
        assert ("own" in vars(inputs)) == (inputs.use.rule.response is None)
        places = [a for example in statistics.a for a in example]
        A = (
            sum((torch.outer(a, a) for a in places), torch.zeros(width, width, dtype=torch.float64))
            / n
        )
        assert_near(found, A @ v)
        assert_near(mean, sum(places, torch.zeros(width, dtype=torch.float64)) / (n * t))
        assert_near(statistics.A, A)
