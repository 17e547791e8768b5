"""Per-sample gradients and Jacobians, by structure and in general, into new memory and into the
caller's.
"""

from __future__ import annotations

import pytest
import torch
from problems import LIKELIHOODS, MODELS, Problem, assert_near, problem
from reference import Reference, reference
from torch import Tensor, nn

import curvlab as cl
from curvlab.errors import CurvlabError
from curvlab.likelihoods import Categorical, Gaussian

zoo = pytest.mark.parametrize(
    ("model", "likelihood"), [(m, k) for m in MODELS for k in LIKELIHOODS]
)
models = pytest.mark.parametrize("model", MODELS)


def assert_each(found: dict[str, Tensor], rows: Tensor, r: Reference, leading: int) -> None:
    """{parameter: [N, …]} against [N, …, D]."""
    assert list(found) == list(r.p.objective().parameters)
    for name, value in found.items():
        places = r.entries[name]
        expected = rows[..., places.flatten()].view(*rows.shape[:leading], *r.shapes[name])
        (
            assert_near(value, expected)
            if float(expected.norm())
            else assert_near(value, torch.zeros_like(value))
        )


@zoo
def test_gradients(model: str, likelihood: str) -> None:
    r = reference(model, likelihood)
    assert_each(cl.exact.gradients(r.p.objective(), r.p.x, r.p.y), r.gradients(r.p.y), r, 1)


@zoo
def test_gradients_into_memory_of_ones_own(model: str, likelihood: str) -> None:
    """What an earlier call returned is filled again: the same tensors, nothing left of the old
    numbers.
    """
    r = reference(model, likelihood)
    objective = r.p.objective()
    out = cl.exact.gradients(objective, r.p.x.flip(0), r.p.y.flip(0))
    for t in out.values():
        t.fill_(torch.nan)
    again = cl.exact.gradients(objective, r.p.x, r.p.y, out=out)
    assert all(again[name].data_ptr() == t.data_ptr() for name, t in out.items())
    assert_each(again, r.gradients(r.p.y), r, 1)
    assert_each(out, r.gradients(r.p.y), r, 1)


@models
def test_jacobians(model: str) -> None:
    r = reference(model)
    assert_each(cl.exact.jacobians(r.p.objective(), r.p.x), r.jacobian, r, 2)


def test_the_mean_of_the_gradients_is_the_gradient_of_the_mean() -> None:
    p = problem("conv")
    p.objective().closure(p.x, p.y)()
    for name, g in cl.exact.gradients(p.objective(), p.x, p.y).items():
        assert_near(g.mean(0), p.model.get_parameter(name).grad)


@pytest.mark.parametrize("shape", [(4, 3), (4, 3, 3), (4, 2, 3, 3)])
def test_outputs_with_several_axes(shape: tuple[int, ...]) -> None:
    """[N, …, F] outputs are flattened row-major to C."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 2)).double()
        x = torch.randn(shape).double()
    r = Reference(Problem(net, Gaussian(), x, torch.zeros(*shape[:-1], 2).double()))
    found = cl.exact.jacobians(r.p.objective(), x)
    assert found["0.bias"].shape == (4, x[0].numel() // 3 * 2, 2)
    assert_each(found, r.jacobian, r, 2)


def test_outputs_without_an_axis() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 1), nn.Flatten(0)).double()
        x = torch.randn(4, 3).double()
    r = Reference(Problem(net, Gaussian(), x, torch.zeros(4).double()))
    assert_each(cl.exact.jacobians(r.p.objective(), x), r.jacobian, r, 2)
    assert_each(cl.exact.gradients(r.p.objective(), x, r.p.y), r.gradients(r.p.y), r, 1)


class Bare(nn.Module):
    """No layer with a rule at all."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.shift = nn.Parameter(torch.randn(5, 3)), nn.Parameter(torch.randn(3))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.w) + self.shift


def test_a_model_without_rules() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = Bare().double()
    q = problem()
    r = Reference(Problem(net, Categorical(), q.x, q.y))
    assert_each(cl.exact.jacobians(r.p.objective(), q.x), r.jacobian, r, 2)
    assert_each(cl.exact.gradients(r.p.objective(), q.x, q.y), r.gradients(q.y), r, 1)


def test_float32_stays_float32() -> None:
    p = problem("conv-norm", dtype=torch.float32)
    double = problem("conv-norm")
    for name, g in cl.exact.gradients(p.objective(), p.x, p.y).items():
        assert_near(
            g.double(), cl.exact.gradients(double.objective(), double.x, double.y)[name], 1e-5
        )
        assert g.dtype == torch.float32
    assert all(j.dtype == torch.float32 for j in cl.exact.jacobians(p.objective(), p.x).values())


# ------------------------------------------------------------------------------------------------
# what does not fit


def wrong(out: dict[str, Tensor], how: str) -> dict[str, Tensor]:
    name = "2.weight"
    return {
        "shape": out | {name: out[name][:-1]},
        "examples": {n: t[:3].clone() for n, t in out.items()},
        "dtype": out | {name: out[name].float()},
        "layout": out | {name: out[name].transpose(1, 2).contiguous().transpose(1, 2)},
        "missing": {n: t for n, t in out.items() if n != name},
    }[how]


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("shape", r"out\['2.weight'\] must be \[7, 4, 4\], torch.float64 on cpu, not \[6, 4, 4\]"),
        (
            "examples",
            r"out\['0.weight'\] must be \[7, 4, 5\], torch.float64 on cpu, not \[3, 4, 5\]",
        ),
        ("dtype", r"out\['2.weight'\] must be .* not \[7, 4, 4\], torch.float32 on cpu"),
        ("layout", r"out\['2.weight'\] must be contiguous: pass what an earlier call returned"),
        ("missing", r"out has no '2.weight': pass what an earlier call returned"),
    ],
)
def test_memory_that_does_not_fit(how: str, message: str) -> None:
    p = problem()
    out = cl.exact.gradients(p.objective(), p.x, p.y)
    with pytest.raises(CurvlabError, match=message):
        cl.exact.gradients(p.objective(), p.x, p.y, out=wrong(out, how))


@pytest.mark.parametrize("model", ["norm", "conv", "embedding"])
def test_memory_that_does_not_fit_a_parameter_of_any_kind(model: str) -> None:
    p = problem(model)
    out = cl.exact.gradients(p.objective(), p.x, p.y)
    for name in out:
        with pytest.raises(CurvlabError, match=rf"out\['{name}'\] must be"):
            cl.exact.gradients(p.objective(), p.x, p.y, out=out | {name: out[name][:, None]})


def test_more_than_the_memory_holds() -> None:
    objective = cl.Objective(nn.Linear(1000, 1000), Gaussian())
    x = torch.zeros(1, 1000).expand(200_000, 1000)
    with pytest.raises(
        CurvlabError,
        match=r"the per-sample gradients would need 800\.8 GB .*; take fewer examples at a time",
    ):
        cl.exact.gradients(objective, x, x)
    with pytest.raises(
        CurvlabError,
        match=(
            r"the Jacobians would need 1001\.0 GB .*; take fewer examples at a time, or a product"
        ),
    ):
        cl.exact.jacobians(objective, x[:250])
