"""The world between two looks does not stand still: layers frozen and thawed, modes, buffers,
weights that are set anew.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracle import Net, Reference, apart, numbers, one_line, seeded, tokens, total
from test_faults import in_order, layers, refusal, right_or_refused
from test_faults_world import chances, data, net
from torch import Tensor, nn

import curvlab as cl
from curvlab.errors import CurvlabError
from curvlab.exact import Kind
from curvlab.likelihoods import Categorical

pytestmark = pytest.mark.filterwarnings("ignore::curvlab.errors.CurvlabWarning")

MOVERS = (
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


@pytest.mark.parametrize("what", ["first layer", "middle layer", "weight alone", "bias alone"])
@pytest.mark.parametrize("algorithm", MOVERS)
def test_what_is_frozen_between_two_steps_stands_still(algorithm: str, what: str) -> None:
    """As under every torch optimizer; or the step refuses in a line."""
    model: Any = net()
    x, y = data()
    o = cl.Objective(model, Categorical())
    optimizer = cl.optimizer(algorithm, o, lr=0.1, damping=0.1)
    optimizer.step(o.closure(x, y))
    parts: dict[str, Any] = {
        "first layer": model[0].parameters(),
        "middle layer": model[2].parameters(),
        "weight alone": [model[2].weight],
        "bias alone": [model[2].bias],
    }
    frozen = list(parts[what])
    for p in frozen:
        p.requires_grad_(False)
    before, other = [p.clone() for p in frozen], model[4].weight.clone()
    try:
        for _ in range(2):
            optimizer.step(o.closure(x, y))
    except CurvlabError as error:
        one_line(error, without=("no_grad",))  # that is not the cause
    else:
        assert not torch.equal(model[4].weight, other)
    assert all(torch.equal(p, old) for p, old in zip(frozen, before, strict=True))


@pytest.mark.parametrize("algorithm", MOVERS)
def test_what_is_thawed_between_two_steps_moves_or_is_refused(algorithm: str) -> None:
    model: Any = net()
    x, y = data()
    model[2].requires_grad_(False)
    o = cl.Objective(model, Categorical())
    optimizer = cl.optimizer(algorithm, o, lr=0.1, damping=0.1)
    optimizer.step(o.closure(x, y))
    before = model[2].weight.clone()
    model[2].requires_grad_(True)
    try:
        for _ in range(2):
            optimizer.step(o.closure(x, y))
    except CurvlabError as error:
        one_line(error)
    else:
        assert not torch.equal(model[2].weight, before)


@pytest.mark.parametrize("thaw", [False, True])
@pytest.mark.parametrize("kind", ["ggn", "hessian", "ef"])
def test_the_oracle_of_what_was_frozen_or_thawed_since(kind: Kind, thaw: bool) -> None:
    """The blocks of the weights that are trained now, or a line."""
    model: Any = net()
    x, y = data()
    model[2].requires_grad_(not thaw)
    o = cl.Objective(model, Categorical())
    cl.exact.matrices(o, x, y, kind)
    model[2].requires_grad_(thaw)
    r = Reference(model, x, y)

    def trace() -> Tensor:
        return total(m.dense().trace() for m in cl.exact.matrices(o, x, y, kind).values())[None]

    right_or_refused(trace, getattr(r, kind).trace()[None])
    right_or_refused(
        lambda: cl.exact.diagonal(o, x, y, kind).sum()[None], getattr(r, kind).trace()[None]
    )
    right_or_refused(lambda: r.joined(cl.exact.gradients(o, x, y), model, 1), r.rows)
    model[2].requires_grad_(not thaw)
    r = Reference(model, x, y)
    assert apart(trace(), getattr(r, kind).trace()[None]) < 1e-10


# ------------------------------------------------------------------------------------------------
# modes, buffers, weights


def holds(o: cl.Objective, x: Tensor, y: Tensor) -> None:
    r = Reference(o.model, x, y)
    assert apart(in_order(o, r, o.closure(x, y).observe({"data"}).gradients), r.gradient) < 1e-10
    assert apart(r.joined(cl.exact.gradients(o, x, y), o.model, 1), r.rows) < 1e-10
    assert apart(cl.exact.diagonal(o, x, y, "ggn").sum()[None], r.ggn.trace()[None]) < 1e-10
    assert (
        apart(
            cl.exact.matrix(o, x, y, "hessian", None).dense().trace()[None], r.hessian.trace()[None]
        )
        < 1e-10
    )


@pytest.mark.parametrize(
    "layer", [lambda: nn.Dropout(0.5), lambda: nn.BatchNorm1d(4)], ids=["dropout", "norm"]
)
def test_modes_that_change_between_looks(layer: Callable[[], nn.Module]) -> None:
    """Right in eval mode, refused in train mode, and right again."""
    with seeded():
        model = nn.Sequential(nn.Linear(4, 4), layer(), nn.Tanh(), nn.Linear(4, 3))
    x, y = data()
    o = cl.Objective(model, Categorical())
    for _ in range(2):
        model.eval()
        holds(o, x, y)
        model.train()
        for call in (
            lambda: cl.exact.matrices(o, x, y, "ggn"),
            lambda: cl.exact.gradients(o, x, y),
        ):
            with chances():
                refusal(call)


def test_buffers_that_are_edited_between_looks() -> None:
    with seeded():
        model = Net(
            lambda m, x: m.b(m.norm(m.a(x)).tanh() * m.s),
            s=numbers(4),
            norm=nn.BatchNorm1d(4),
            **layers(a=(4, 4), b=(4, 3)),
        )
    x, y = data()
    o = cl.Objective(model.eval(), Categorical())
    product = cl.exact.product(o, x, y, "ggn")
    holds(o, x, y)
    v = numbers(len(o.layout))
    product @ v
    model.s.data.mul_(2)
    right_or_refused(lambda: product @ v, cl.exact.product(o, x, y, "ggn") @ v)
    model.norm.running_mean.add_(1)
    holds(o, x, y)
    model.s = model.s * 3
    holds(o, x, y)


@pytest.mark.parametrize(
    "edit",
    [
        "add_",
        ".data.mul_",
        ".data =",
        "load_state_dict",
        "assign",
        "new Parameter",
        "new layer",
        "numpy",
    ],
)
def test_weights_that_are_set_between_looks(edit: str) -> None:
    """Right at the weights of now, or a line; a product that was made before never says that all is
    as it was.
    """
    model: Any = net()
    x, y = data()
    o = cl.Objective(model, Categorical())
    product, v = cl.exact.product(o, x, y, "ggn"), numbers(len(o.layout))
    product @ v
    with seeded(8):
        other = nn.Linear(5, 4)
    if edit == "add_":
        with torch.no_grad():
            model[2].weight.add_(1)
    elif edit == ".data.mul_":
        model[2].weight.data.mul_(2)
    elif edit == ".data =":
        model[2].weight.data = other.weight.detach().clone()
    elif edit == "load_state_dict":
        model[2].load_state_dict(other.state_dict())
    elif edit == "assign":
        model[2].load_state_dict(other.state_dict(), assign=True)
    elif edit == "new Parameter":
        model[2].weight = other.weight
    elif edit == "new layer":
        model[2] = other
    else:
        model[2].weight.detach().numpy()[:] *= 2
    r = Reference(model, x, y)
    right_or_refused(
        lambda: in_order(o, r, o.closure(x, y).observe({"data"}).gradients), r.gradient
    )
    right_or_refused(lambda: r.joined(cl.exact.gradients(o, x, y), model, 1), r.rows)
    right_or_refused(lambda: cl.exact.diagonal(o, x, y, "ggn").sum()[None], r.ggn.trace()[None])
    right_or_refused(
        lambda: product @ v, cl.exact.product(cl.Objective(model, Categorical()), x, y, "ggn") @ v
    )


@pytest.mark.parametrize("edit", ["assign", "new Parameter", "new layer"])
def test_steps_after_weights_are_replaced(edit: str) -> None:
    """The optimizer moves the weights that the model has now, or says that they are not its own."""
    model: Any = net()
    x, y = data()
    o = cl.Objective(model, Categorical())
    optimizer = cl.optimizer("sgd-m", o, lr=0.1)
    optimizer.step(o.closure(x, y))
    with seeded(8):
        other = nn.Linear(5, 4)
    if edit == "assign":
        model[2].load_state_dict(other.state_dict(), assign=True)
    elif edit == "new Parameter":
        model[2].weight = other.weight
    else:
        model[2] = other
    before = model[2].weight.detach().clone()
    try:
        optimizer.step(o.closure(x, y))
    except CurvlabError as error:
        one_line(error)
    else:
        assert not torch.equal(model[2].weight, before)


# ------------------------------------------------------------------------------------------------
# norms, the table's 19 and 20


def test_a_norm_without_statistics_is_not_told_to_be_in_eval_mode() -> None:
    model = (
        nn.Sequential(
            nn.Linear(4, 3), nn.BatchNorm1d(3, track_running_stats=False), nn.Linear(3, 3)
        )
        .double()
        .eval()
    )
    x, y = data()
    line = refusal(lambda: cl.exact.matrices(cl.Objective(model, Categorical()), x, y, "ggn"))
    assert "eval()" not in line


@pytest.mark.parametrize("algorithm", ["block-ggn", "smw-gn", "kflr", "full-ggn"])
def test_gauss_newton_methods_in_train_mode_say_what_they_are_or_refuse(algorithm: str) -> None:
    with seeded():
        model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
    x, y = data()
    o = cl.Objective(model, Categorical())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", cl.CurvlabWarning)
        said: list[Any] = []
        try:
            cl.optimizer(algorithm, o, lr=0.1, damping=0.1).step(o.closure(x, y))
        except CurvlabError as error:
            said.append(error)
    said += [w.message for w in caught if "examples" in str(w.message)]
    assert said, "nothing is said"
    for line in said:
        one_line(line, "batch", "examples", "coupled")


def test_a_norm_that_is_frozen_in_eval_mode_stays_so_while_training() -> None:
    with seeded():
        model: Any = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))
    model[1].eval().requires_grad_(False)
    before = model[1].running_mean.clone()
    batches = [(numbers(8, 4) + 3, tokens(8, high=3))]
    cl.train(
        cl.Objective(model, Categorical()),
        batches,
        batches,
        algorithm="sgd-m",
        lr=0.01,
        epochs=1,
        progress=False,
    )
    assert torch.equal(model[1].running_mean, before)
    assert [m.training for m in model] == [True, False, True]


@pytest.mark.parametrize("algorithm", MOVERS)
def test_a_model_of_another_dtype_wants_another_optimizer(algorithm: str) -> None:
    model: Any = net()
    x, y = data()
    o = cl.Objective(model, Categorical())
    optimizer = cl.optimizer(algorithm, o, lr=0.1, damping=0.1)
    old, new = next(model.parameters()).dtype, torch.float32
    assert old == torch.float64
    optimizer.step(o.closure(x, y))
    model.to(new)
    before = [p.clone() for p in model.parameters()]
    line = refusal(lambda: optimizer.step(o.closure(x, y)))
    assert line.startswith("the model is float32 on cpu now, but was float64 on cpu")
    assert "make the optimizer again" in line
    assert all(map(torch.equal, before, model.parameters()))
    cl.optimizer(algorithm, o, lr=0.1, damping=0.1).step(o.closure(x, y))
    assert not all(map(torch.equal, before, model.parameters()))
