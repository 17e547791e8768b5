"""Examples that are coupled, and forms that come later: other sizes, other ways by the data or by a
flag.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracle import Case, Net, Reference, apart, numbers, tokens, total
from test_faults import ALL_STEPPERS, in_order, layers, refusal, right_or_refused, wrong_steps
from test_faults_rows import CASES, positions
from torch import Tensor, nn

import curvlab as cl
from curvlab.errors import CurvlabError
from curvlab.likelihoods import Categorical

pytestmark = pytest.mark.filterwarnings("ignore::curvlab.errors.CurvlabWarning")


def minus_the_mean(m: Net, x: Tensor) -> Tensor:
    return m.b(torch.tanh(m.a(x) - m.c(x.mean(0, keepdim=True))))


def last_by_second(m: Net, x: Tensor) -> Tensor:
    last = x[-1:] + x[1:2] if len(x) > 1 else x[-1:]
    return m.b(m.a(torch.cat([x[:-1], last])).tanh())


def middle_two(m: Net, x: Tensor) -> Tensor:
    """Neither the first nor the last example shows it."""
    return m.b(m.a(torch.cat([x[:2], x[2:3] * x[1:2], x[3:]]) if len(x) > 3 else x).tanh())


COUPLED: dict[str, Case] = {
    "layer on the mean": Case(lambda: Net(minus_the_mean, **layers(a=(4, 4), c=(4, 4), b=(4, 3)))),
    "layer on the mean, expanded": Case(
        lambda: Net(
            lambda m, x: m.b(m.a(x).tanh() * m.c(x.mean(0).expand_as(x))),
            **layers(a=(4, 4), c=(4, 4), b=(4, 3)),
        )
    ),
    "centred": Case(
        lambda: Net(
            lambda m, x: m.b(torch.tanh((h := m.a(x)) - h.mean(0))), **layers(a=(4, 4), b=(4, 3))
        )
    ),
    "batch norm": Case(
        lambda: nn.Sequential(
            nn.Linear(4, 4), nn.BatchNorm1d(4, track_running_stats=False), nn.Linear(4, 3)
        )
    ),
    "attention over the batch": Case(
        lambda: Net(
            lambda m, x: m.b(torch.softmax(x @ x.mT, 1) @ m.a(x)), **layers(a=(4, 4), b=(4, 3))
        )
    ),
    "all but the first": Case(
        lambda: Net(
            lambda m, x: m.b(m.a(x).tanh() + torch.cat([x[:1] * 0, x[:-1]])),
            **layers(a=(4, 4), b=(4, 3)),
        )
    ),
    "the last by the second": Case(lambda: Net(last_by_second, **layers(a=(4, 4), b=(4, 3)))),
    "the middle two": Case(lambda: Net(middle_two, **layers(a=(4, 4), b=(4, 3)))),
}


@pytest.mark.parametrize("name", COUPLED)
def test_examples_that_are_coupled(name: str) -> None:
    """There is no loss of one example: refused in a line. The gradient of the mean loss is there
    all the same.
    """
    case = COUPLED[name]
    x, y = case.data()
    r = Reference(case.model(), x, y, case.loss)
    model = case.model()
    o = cl.Objective(model, Categorical())
    assert apart(in_order(o, r, o.closure(x, y).observe({"data"}).gradients), r.gradient) < 1e-10
    assert not wrong_steps(case, ("sgd-m", "adam"))
    for call in (
        lambda: cl.exact.gradients(o, x, y),
        lambda: cl.exact.jacobians(o, x),
        lambda: cl.exact.matrices(o, x, y, "ggn"),
        lambda: cl.exact.matrix(o, x, y, "ef", None),
        lambda: cl.exact.matrix(o, x, y, "ggn", "1", route="func"),
        lambda: cl.exact.product(o, x, y, "ggn") @ numbers(len(r.gradient)),
        lambda: cl.exact.diagonal(o, x, y, "ef"),
    ):
        refusal(call)


def test_methods_of_all_examples_are_never_silently_wrong_where_they_are_coupled() -> None:
    """What a layer on a mean has is no block of rows: each optimizer steps along the true gradient,
    or refuses.
    """
    wrong = wrong_steps(COUPLED["layer on the mean"], ALL_STEPPERS)
    assert not {name: line for name, line in wrong.items() if not line.startswith("refused")}
    assert not {"sgd-m", "adam"} & wrong.keys()


# ------------------------------------------------------------------------------------------------
# forms that come later


def holds(o: cl.Objective, x: Tensor, y: Tensor) -> None:
    r = Reference(o.model, x, y)
    assert apart(in_order(o, r, o.closure(x, y).observe({"data"}).gradients), r.gradient) < 1e-10
    assert apart(r.joined(cl.exact.gradients(o, x, y), o.model, 1), r.rows) < 1e-10
    found = torch.cat([m.dense().diagonal() for m in cl.exact.matrices(o, x, y, "ggn").values()])
    assert apart(found.sum()[None], r.ggn.trace()[None]) < 1e-10
    assert apart(cl.exact.diagonal(o, x, y, "hessian").sum()[None], r.hessian.trace()[None]) < 1e-10


def test_minibatches_of_several_sizes() -> None:
    """N ≠ T first, N = T then: the form of an example is the same."""
    for name in ("axes 1023, N = 4", "flat, places first", "both orders"):
        o = cl.Objective(CASES[name].model(), Categorical())
        shape = CASES[name].x
        assert isinstance(shape, tuple)
        for n in (5, shape[0], 1, 2, 5):
            holds(o, numbers(n, *shape), tokens(n, high=3))


def test_positions_by_minibatches_of_several_sizes() -> None:
    o = cl.Objective(positions("T").double(), Categorical())
    for n, t in ((5, 3), (3, 3), (3, 2), (2, 2), (1, 1), (4, 1)):
        holds(o, tokens(n, t), tokens(n, high=3))


def test_another_way_by_the_data() -> None:
    """Shapes, dtypes and modes are the same; what runs is not."""

    def run(m: Net, x: Tensor) -> Tensor:
        h = m.a(x) if float(x[0, 0]) > 0 else m.a(x.flip(0)).flip(0) * m.a.weight.norm()
        return m.b(torch.tanh(h))

    x, y = numbers(5, 4).abs(), tokens(5, high=3)
    o = cl.Objective(Net(run, **layers(a=(4, 4), b=(4, 3))).double(), Categorical())
    for data in (x, -x, x):
        r = Reference(o.model, data, y)
        assert (
            apart(in_order(o, r, o.closure(data, y).observe({"data"}).gradients), r.gradient)
            < 1e-10
        )
        right_or_refused(
            lambda r=r, data=data: r.joined(cl.exact.gradients(o, data, y), o.model, 1), r.rows
        )


def test_another_way_by_a_flag() -> None:
    """An attribute of the model that no mode tells of."""

    def run(m: Net, x: Tensor) -> Tensor:
        h = torch.tanh(m.a(x.transpose(0, 1) if m.swapped else x))
        return m.b(h.mean(0 if m.swapped else 1))

    x, y = numbers(4, 4, 3), tokens(4, high=3)
    net: Any = Net(run, **layers(a=(3, 4), b=(4, 3))).double()
    o = cl.Objective(net, Categorical())
    for net.swapped in (False, True, False):
        holds(o, x, y)


def test_a_loader_whose_places_vary() -> None:
    """T = 1 first and 3 then, the Hessian: right, or a remedy that there is."""
    net = Net(lambda m, x: m.b(torch.tanh(m.a(x)).mean(1)), **layers(a=(3, 4), b=(4, 3))).double()
    o = cl.Objective(net, Categorical())
    loader = [(numbers(4, t, 3, seed=t), tokens(4, high=3, seed=t)) for t in (1, 3)]
    each = [Reference(net, *data).hessian for data in loader]
    wanted = (each[0] + each[1]).trace()[None] / 2

    def trace(**options: Any) -> Tensor:
        found = [
            cl.exact.matrix(o, loader, kind="hessian", block=b.name, **options).dense()
            for b in o.blocks
        ]
        return total(m.trace() for m in found)[None]

    try:
        assert apart(trace(), wanted) < 1e-10
    except CurvlabError:
        assert "func" in refusal(trace)
    assert apart(trace(route="func"), wanted) < 1e-10
