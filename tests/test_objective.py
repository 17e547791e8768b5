"""Objective, closure, observation: one forward, the right gradients, the same labels for everyone,
clear errors.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from problems import LIKELIHOODS, MODELS, assert_near, laid_out, problem
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, jacrev, vmap

import curvlab as cl
from curvlab.capture import Capture
from curvlab.errors import CurvlabError
from curvlab.observation import PASSES

zoo = pytest.mark.parametrize(
    ("model", "likelihood"), [(m, k) for m in MODELS for k in LIKELIHOODS]
)
ALL = frozenset(PASSES)


def count_forwards(model: nn.Module) -> list[int]:
    counted = [0]

    def hook(*_: object) -> None:
        counted[0] += 1

    model.register_forward_pre_hook(hook)
    return counted


def normbatch(seed: int = 0) -> tuple[Any, Tensor, Tensor]:
    """A small model with BatchNorm, in training, and a batch for Gaussian."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Tanh(), nn.Linear(3, 2)).double()
        return net, torch.randn(6, 2).double(), torch.randn(6, 2).double()


@zoo
@pytest.mark.parametrize("needs", [set(), {"data"}, {"model", "exact"}, ALL])
def test_one_forward_serves_all_passes(model: str, likelihood: str, needs: set[str]) -> None:
    p = problem(model, likelihood)
    objective = p.objective()
    # the first look at a form is gone through again, to see that a second one is the same
    objective.check(p.x, p.y)
    counted = count_forwards(p.model)
    observation = objective.closure(p.x, p.y).observe(needs)
    assert counted == [1]
    assert set(observation.passes) == set(needs)
    assert observation.size == len(p.x)


@zoo
def test_gradient_is_the_one_of_autograd(model: str, likelihood: str) -> None:
    """Two routes: the data pass through the captured layers; `closure()` through torch's own
    backward.
    """
    p = problem(model, likelihood)
    objective = p.objective()
    closure = objective.closure(p.x, p.y)
    observation = closure.observe()
    loss = closure()
    assert_near(observation.loss, loss.detach())
    assert_near(loss.detach(), p.likelihood.loss(p.model(p.x), p.y).mean().detach())
    assert not observation.loss.requires_grad
    for block in objective.blocks:
        for name, value in block.scatter(observation.gradients[block.name]).items():
            assert_near(value, p.model.get_parameter(name).grad)


@zoo
def test_a_look_for_the_gradient_alone(model: str, likelihood: str) -> None:
    """The first one listens, the next does not: the same bits, alone and in company, and
    autograd's; nothing else is there.
    """
    p = problem(model, likelihood)
    objective = p.objective()
    heard = objective.closure(p.x, p.y).observe("gradient")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Capture, "__enter__", lambda self: pytest.fail("somebody listens"))
        alone = objective.closure(p.x, p.y).observe("gradient")
    company = objective.closure(p.x, p.y).observe(ALL)
    (p.likelihood.loss(p.model(p.x), p.y).mean()).backward()
    assert torch.equal(heard.loss, alone.loss)
    for block in objective.blocks:
        found = alone.gradients[block.name]
        assert torch.equal(heard.gradients[block.name], found)
        assert torch.equal(company.gradients[block.name], found)
        assert company.passes["gradient"][block.name] is company.passes["data"][block.name]
        assert not alone.passes["gradient"][block.name].structured
        for name, value in block.scatter(found).items():
            assert_near(value, p.model.get_parameter(name).grad)


def test_looks_for_the_gradient_of_a_model_that_draws_are_heard() -> None:
    """A later look must see their masks."""
    objective = cl.Objective(
        nn.Sequential(nn.Linear(3, 8), nn.Dropout(), nn.Linear(8, 2)), cl.likelihoods.Categorical()
    )
    x, y = torch.randn(5, 3), torch.tensor([0, 1, 0, 1, 1])
    objective.closure(x, y).observe("gradient")
    closure = objective.closure(x, y)
    first = closure.observe("gradient")
    second = closure.observe("data", move_buffers=False)
    for name, g in first.gradients.items():
        torch.testing.assert_close(second.gradients[name], g)


@zoo
def test_rows_add_up_to_the_gradient(model: str, likelihood: str) -> None:
    p = problem(model, likelihood)
    observation = p.objective().closure(p.x, p.y).observe()
    for block in p.objective().blocks:
        if block.module is not None:
            rows = observation.passes["data"][block.name].rows
            assert_near(rows.sum((0, 1)) / len(p.x), observation.gradients[block.name])


@zoo
def test_exact_pass_gives_the_gauss_newton_matrix(model: str, likelihood: str) -> None:
    """(1/N) Σᵥ Σₙ of the rows' outer products is (1/N) Σₙ Jᵀ ∂²ℓ/∂z² J."""
    p = problem(model, likelihood)
    objective = p.objective()
    exact = objective.closure(p.x, p.y).observe({"exact"}).passes["exact"]
    values = {name: q.detach() for name, q in p.model.named_parameters()}
    J = vmap(jacrev(lambda v, x: functional_call(p.model, v, (x[None],))[0]), (None, 0))(
        values, p.x
    )
    H = vmap(hessian(lambda z, y: p.likelihood.loss(z[None], y[None])[0]))(
        p.model(p.x).detach(), p.y
    )
    for block in objective.blocks:
        if block.module is None:
            assert block.name not in exact
            continue
        j = laid_out(block, J, 2).flatten(2)
        rows = exact[block.name].rows.flatten(2)
        assert_near(
            torch.einsum("vni,vnj->ij", rows, rows), torch.einsum("nci,ncd,ndj->ij", j, H, j)
        )


@zoo
def test_model_pass_is_the_gradient_at_the_labels_drawn(model: str, likelihood: str) -> None:
    p = problem(model, likelihood)
    objective = p.objective(seed=4)
    closure = objective.closure(p.x, p.y)
    drawn = p.likelihood.sample(p.model(p.x).detach(), objective.generator(closure.number))
    at_drawn = p.objective().closure(p.x, drawn).observe({"data"}).gradients
    for name, s in closure.observe({"model"}).passes["model"].items():
        assert_near(s.gradient, at_drawn[name])


@zoo
def test_several_draws_are_as_many_model_passes(model: str, likelihood: str) -> None:
    """Each vector times 1/√k, so that the second moment of all is the mean over the draws; the
    first is the single one's.
    """
    p = problem(model, likelihood)
    objective = p.objective(seed=4)
    closure = objective.closure(p.x, p.y)
    drawn = closure.labels(p.model(p.x).detach(), 3)
    single = closure.observe({"model"}).passes["model"]
    for name, s in closure.observe({"model"}, draws=3).passes["model"].items():
        if s.block.module is None:
            continue
        assert len(s.g) == 3
        assert_near(s.g[:1] * math.sqrt(3), single[name].g)
        for rows, labels in zip(s.rows, drawn, strict=True):
            at_drawn = p.objective().closure(p.x, labels).observe({"data"}).passes["data"]
            assert_near(rows * math.sqrt(3), at_drawn[name].rows[0])


@pytest.mark.parametrize("model", MODELS)
def test_places_are_those_of_the_derivatives(model: str) -> None:
    p = problem(model)
    closure = p.objective().closure(p.x, p.y)
    exact = closure.observe({"exact"}).passes["exact"]
    assert closure.form.places == {name: s.g.shape[2] for name, s in exact.items()}


def test_a_look_gives_the_loss_of_each_example_and_moves_no_buffers() -> None:
    net, x, y = normbatch()
    before = {name: b.clone() for name, b in net.named_buffers()}
    z, losses, _ = cl.Objective(net, cl.likelihoods.Gaussian()).closure(x, y).look()
    assert all(torch.equal(b, before[name]) for name, b in net.named_buffers())
    assert_near(losses.detach(), cl.likelihoods.Gaussian().loss(net(x), y).detach())
    assert z.requires_grad
    assert losses.requires_grad


def test_several_draws_differ_and_have_no_gradient() -> None:
    p = problem()
    closure = p.objective().closure(p.x, p.y)
    one, two, *_ = closure.labels(p.model(p.x).detach(), 3)
    assert not torch.equal(one, two)
    with pytest.raises(CurvlabError, match="a gradient needs a pass that sends one vector back"):
        _ = closure.observe({"model"}, draws=2).passes["model"]["1"].gradient


def drawn_by(observe: Callable[[cl.Objective], object]) -> Tensor:
    """g of the model pass of closure 3, after `observe` has done something with closures 1 and
    2.
    """
    p = problem()
    objective = p.objective(seed=11)
    observe(objective)
    return observe_third(objective, {"model"})


def observe_third(objective: cl.Objective, needs: set[str]) -> Tensor:
    p = problem()
    while objective.closures["step"] < 2:
        objective.closure(p.x, p.y)
    return objective.closure(p.x, p.y).observe(needs).passes["model"]["3"].g


def test_labels_depend_only_on_the_seed_and_the_number_of_the_closure() -> None:
    p = problem()
    expected = drawn_by(lambda objective: None)
    others = {
        "other passes before": drawn_by(
            lambda o: [o.closure(p.x, p.y).observe(ALL) for _ in range(2)]
        ),
        "observed twice before": drawn_by(
            lambda o: [o.closure(p.x, p.y).observe({"model"}) for _ in range(2)]
        ),
        "plain closures before": drawn_by(lambda o: [o.closure(p.x, p.y)() for _ in range(2)]),
        "in company": observe_third(p.objective(seed=11), {"data", "model", "exact"}),
        "the oracle": drawn_by(lambda o: cl.exact.matrix(o, p.x, p.y, "fisher-mc")),
        "a warm start": drawn_by(lambda o: cl.optimizer("kfac", o).warm_start([(p.x, p.y)] * 3)),
        "the global generator": drawn_by(lambda o: torch.rand(5)),
    }
    for who, found in others.items():
        assert torch.equal(found, expected), who
    assert not torch.equal(observe_third(p.objective(seed=12), {"model"}), expected)
    closure = p.objective(seed=11).closure(p.x, p.y)  # number 1
    assert not torch.equal(closure.observe({"model"}).passes["model"]["3"].g, expected)


def test_the_same_closure_draws_the_same_labels_again() -> None:
    p = problem()
    closure = p.objective().closure(p.x, p.y)
    first, second = (closure.observe({"model"}).passes["model"]["1"].g for _ in range(2))
    assert torch.equal(first, second)


def test_drawing_labels_leaves_the_global_generator_alone() -> None:
    p, state = problem(), torch.random.get_rng_state()
    p.objective().closure(p.x, p.y).observe(ALL)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_state_of_an_objective_continues_its_labels() -> None:
    p = problem()
    first = p.objective(seed=5)
    first.closure(p.x, p.y)
    second = p.objective(seed=99)
    second.load_state_dict(first.state_dict())
    one, other = (
        o.closure(p.x, p.y).observe({"model"}).passes["model"]["1"].g for o in (first, second)
    )
    assert torch.equal(one, other)


def test_observing_leaves_gradients_as_they_are() -> None:
    p = problem("norm")
    closure = p.objective().closure(p.x, p.y)
    closure.observe(ALL)
    assert all(q.grad is None for q in p.model.parameters())
    closure()
    before = [q.grad.clone() for q in p.model.parameters()]
    closure.observe(ALL)
    assert all(torch.equal(q.grad, b) for q, b in zip(p.model.parameters(), before, strict=True))


@pytest.mark.parametrize(
    "build",
    [
        lambda q: torch.optim.SGD(q, 0.1, momentum=0.9),
        lambda q: torch.optim.Adam(q, 0.01),
        lambda q: torch.optim.LBFGS(q, lr=0.1, max_iter=3),
    ],
    ids=["sgd", "adam", "lbfgs"],
)
def test_closure_fulfils_torchs_contract(build: Callable[..., Any]) -> None:
    """Torch's optimizers walk with it exactly as they walk with a closure written by hand."""
    p, q = problem(), problem()
    ours, theirs = build(p.model.parameters()), build(q.model.parameters())

    def by_hand() -> Tensor:
        theirs.zero_grad()
        loss = torch.nn.functional.cross_entropy(q.model(q.x), q.y)
        loss.backward()
        return loss

    objective = p.objective()
    for _ in range(3):
        torch.testing.assert_close(
            ours.step(objective.closure(p.x, p.y)), theirs.step(by_hand), rtol=1e-12, atol=0
        )
    for one, other in zip(p.model.parameters(), q.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_closure_zeroes_old_gradients() -> None:
    p = problem()
    closure = p.objective().closure(p.x, p.y)
    closure()
    first = [q.grad.clone() for q in p.model.parameters()]
    assert closure().requires_grad
    assert all(torch.equal(q.grad, g) for q, g in zip(p.model.parameters(), first, strict=True))


def test_observe_works_under_no_grad() -> None:
    """As torch's optimizers call it: `step` runs without gradients."""
    p = problem("norm")
    expected = p.objective().closure(p.x, p.y).observe(ALL)
    with torch.no_grad():
        found = p.objective().closure(p.x, p.y).observe(ALL)
    for name, gradient in expected.gradients.items():
        assert torch.equal(found.gradients[name], gradient)


@pytest.mark.filterwarnings("ignore:batch norm in training mode:curvlab.errors.CurvlabWarning")
@pytest.mark.parametrize("needs", [set(), ALL])
def test_buffers_move_only_where_they_may(needs: set[str]) -> None:
    net, x, y = normbatch()
    objective = cl.Objective(net, cl.likelihoods.Gaussian())
    before = {name: b.clone() for name, b in net.named_buffers()}
    still = objective.closure(x, y).observe(needs, move_buffers=False)
    assert all(torch.equal(b, before[name]) for name, b in net.named_buffers())
    moved = objective.closure(x, y).observe(needs, move_buffers=True)
    h = net[0](x)
    torch.testing.assert_close(net[1].running_mean, 0.1 * h.mean(0), rtol=1e-12, atol=0)
    torch.testing.assert_close(net[1].running_var, 0.9 + 0.1 * h.var(0), rtol=1e-12, atol=0)
    assert int(net[1].num_batches_tracked) == 1
    assert torch.equal(still.loss, moved.loss)
    assert needs == set() or all(
        torch.equal(still.gradients[name], g) for name, g in moved.gradients.items()
    )


@pytest.mark.filterwarnings("ignore:batch norm in training mode:curvlab.errors.CurvlabWarning")
def test_buffers_of_a_module_under_two_names_move_only_where_they_may() -> None:
    """`torch.func.functional_call` itself does not put such buffers back (2.13)."""
    norm: Any = nn.BatchNorm1d(3).double()
    net = nn.Sequential(norm, nn.Linear(3, 3).double(), norm)
    x = torch.randn(6, 3, generator=torch.Generator().manual_seed(0)).double()
    objective = cl.Objective(net, cl.likelihoods.Gaussian())
    own, before = norm.running_mean, norm.running_mean.clone()
    objective.closure(x, x).observe(ALL, move_buffers=False)
    assert norm.running_mean is own
    assert torch.equal(own, before)
    assert int(norm.num_batches_tracked) == 0
    objective.closure(x, x).observe(ALL, move_buffers=True)
    assert norm.running_mean is own
    assert int(norm.num_batches_tracked) == 2


def test_gradients_with_batchnorm() -> None:
    """An example's loss depends on the whole batch; the gradient of the mean is right all the
    same.
    """
    net, x, y = normbatch()
    objective = cl.Objective(net, cl.likelihoods.Gaussian())
    closure = objective.closure(x, y)
    gradients = closure.observe().gradients
    closure()
    for block in objective.blocks:
        for name, value in block.scatter(gradients[block.name]).items():
            if name == "0.bias":  # cancelled by the mean: rounding on both routes
                assert max(float(value.norm()), float(net[0].bias.grad.norm())) < 1e-15
            else:
                torch.testing.assert_close(
                    value, net.get_parameter(name).grad, rtol=1e-12, atol=1e-15
                )


def test_tensors_follow_the_model() -> None:
    p = problem("tanh", "gaussian", dtype=torch.float32)
    closure = p.objective().closure(p.x.double(), p.y.double())
    assert {closure.x.dtype, closure.y.dtype, closure.observe().loss.dtype} == {torch.float32}
    q = problem("tanh")
    assert q.objective().closure(q.x, q.y).y.dtype == torch.int64


def test_no_gradients_without_the_data_pass() -> None:
    p = problem()
    with pytest.raises(CurvlabError, match='no "gradient" pass'):
        _ = p.objective().closure(p.x, p.y).observe({"exact"}).gradients


def test_unknown_pass_names_the_known() -> None:
    p = problem()
    with pytest.raises(
        CurvlabError,
        match=(
            r"unknown pass 'modle'; did you mean 'model'\?"
            r" \(known: plain, gradient, data, model, exact, apart, token\)"
        ),
    ):
        p.objective().closure(p.x, p.y).observe({"data", "modle"})


@pytest.mark.parametrize(
    "likelihood", [object(), "categorical", None, cl.likelihoods.Categorical, nn.MSELoss()]
)
def test_likelihood_must_be_one(likelihood: Any) -> None:
    """A class in place of its instance is the mistake that is made most."""
    with pytest.raises(
        CurvlabError, match=r"unknown likelihood .*curvlab\.likelihoods\.Categorical\(\)"
    ):
        cl.Objective(nn.Linear(2, 2), likelihood)


def test_own_likelihood() -> None:
    """Any class with the four methods will do; here the Gaussian with another scale."""

    class Scaled:
        def check(self, z: Tensor, y: Tensor) -> None:
            pass

        def loss(self, z: Tensor, y: Tensor) -> Tensor:
            return 2 * (z - y).square().sum(1)

        def sample(self, z: Tensor, generator: torch.Generator) -> Tensor:
            return z + torch.randn(z.shape, dtype=z.dtype, generator=generator) / 2

        def root(self, z: Tensor) -> Tensor:
            return 2 * cl.likelihoods.Gaussian().root(z)

    p = problem("tanh", "gaussian")
    scaled = cl.Objective(p.model, Scaled()).closure(p.x, p.y).observe(ALL)
    plain = p.objective().closure(p.x, p.y).observe(ALL)
    for name, g in plain.gradients.items():
        assert_near(scaled.gradients[name], 4 * g)
        assert_near(scaled.passes["exact"][name].G, 4 * plain.passes["exact"][name].G)


def minibatch(case: str) -> tuple[str, Any, Any, str]:
    x, y = torch.ones(7, 5, dtype=torch.float64), torch.zeros(7, dtype=torch.int64)
    nan, inf = x.clone(), x.clone()
    nan[3, 2], inf[5, 0] = math.nan, math.inf
    return {
        "empty": ("categorical", x[:0], y[:0], "the minibatch is empty"),
        "lengths": ("categorical", x, y[:6], "7 inputs but 6 targets"),
        "nan": (
            "categorical",
            nan,
            y,
            r"inputs contain NaN or Inf \(first in example 3 of the minibatch\)",
        ),
        "inf": ("categorical", inf, y, r"first in example 5 of the minibatch"),
        "no tensors": (
            "categorical",
            x.numpy(),
            y.numpy(),
            "must be tensors, or tuples, mappings and dataclasses of them, not ndarray and nda",
        ),
        "label": ("categorical", x, y + 3, "label 3 is out of range"),
        "float labels": ("categorical", x, y.double(), "categorical targets must be integers"),
        "bernoulli": ("bernoulli", x, x[:, :3] * 2, r"Bernoulli targets must lie in \[0, 1\]"),
        "gaussian": ("gaussian", x, x, r"Gaussian targets have shape \(7, 5\)"),
        "shape": (
            "categorical",
            x[:, :4],
            y,
            r"the model does not take inputs of shape \(7, 4\): mat1 and mat2",
        ),
    }[case]


CASES = (
    "empty",
    "lengths",
    "nan",
    "inf",
    "no tensors",
    "label",
    "float labels",
    "bernoulli",
    "gaussian",
    "shape",
)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("call", [lambda c: c(), lambda c: c.observe()], ids=["call", "observe"])
def test_minibatch_that_does_not_fit(case: str, call: Callable[[object], object]) -> None:
    likelihood, x, y, message = minibatch(case)
    objective = problem("tanh", likelihood).objective()
    with pytest.raises(CurvlabError, match=message) as caught:
        call(objective.closure(x, y))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("outputs", ["tuple", "scalar", "fewer rows"])
@pytest.mark.parametrize("call", [lambda c: c(), lambda c: c.observe()], ids=["call", "observe"])
def test_model_must_return_one_tensor_with_a_row_for_each_example(
    outputs: str, call: Callable[[object], object]
) -> None:
    class Odd(nn.Linear):
        def forward(self, x: Tensor) -> Any:
            z = super().forward(x)
            return {"tuple": (z, x), "scalar": z.sum(), "fewer rows": z[:2]}[outputs]

    objective = cl.Objective(Odd(2, 2), cl.likelihoods.Gaussian())
    message = {
        "tuple": (
            r"the model returned a tuple, not one tensor \(2 parts\): pick one by outputs='…' of"
            r" the Objective, or by outputs=lambda out: out\[0\]"
        ),
        "scalar": (
            r"the model must return one tensor with 4 rows, one for each example, not \[\]: keep"
            r" the batch as its first"
        ),
        "fewer rows": (
            r"the model must return one tensor with 4 rows, one for each example, not \[2, 2\]:"
            r" keep the batch"
        ),
    }[outputs]
    with pytest.raises(CurvlabError, match=message) as caught:
        call(objective.closure(torch.ones(4, 2), torch.ones(4, 2)))
    assert "\n" not in str(caught.value)


def test_errors_of_the_model_itself_pass_through() -> None:
    class Broken(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError("out of paper")

    objective = cl.Objective(Broken(2, 2), cl.likelihoods.Gaussian())
    with pytest.raises(RuntimeError, match="out of paper"):
        objective.closure(torch.ones(4, 2), torch.ones(4, 2)).observe()


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (
            math.nan,
            (
                "the loss is nan: the weights 'weight' contain NaN or Inf; lower the learning rate"
                " or raise the damping"
            ),
        ),
        (1e308, "the loss is inf: the model's outputs contain NaN or Inf"),
        (1e200, "the loss is inf: the outputs are finite, so the likelihood overflows"),
    ],
)
def test_loss_that_is_not_finite_names_the_culprit(weight: float, message: str) -> None:
    net = nn.Linear(2, 2, bias=False).double()
    nn.init.constant_(net.weight, weight)
    objective = cl.Objective(net, cl.likelihoods.Gaussian())
    with pytest.raises(CurvlabError, match=message):
        objective.closure(torch.ones(3, 2), torch.ones(3, 2)).observe()


@zoo
def test_per_sample_gradients_do_not_see_each_other(model: str, likelihood: str) -> None:
    """The data pass of a batch, row by row, is torch.func's gradient of each example."""
    p = problem(model, likelihood)
    values = {name: q.detach() for name, q in p.model.named_parameters()}
    expected = vmap(
        grad(
            lambda v, x, y: p.likelihood.loss(functional_call(p.model, v, (x[None],)), y[None])[0]
        ),
        (None, 0, 0),
    )(values, p.x, p.y)
    statistics = p.objective().closure(p.x, p.y).observe().passes["data"]
    for block in p.objective().blocks:
        if block.module is not None:
            assert_near(statistics[block.name].rows[0], laid_out(block, expected, 1))


def test_bad_seed_and_data_without_axes() -> None:
    p = problem()
    with pytest.raises(cl.CurvlabError, match="seed must be 0 or positive, not -1"):
        p.objective(seed=-1)
    with pytest.raises(cl.CurvlabError, match="needs the examples as first axis"):
        p.objective().closure(torch.tensor(1.0), p.y)
