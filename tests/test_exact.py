"""The oracle against torch.func, double backward and enumeration, over the whole zoo."""

from __future__ import annotations

import math

import pytest
import torch
from problems import LIKELIHOODS, MODELS, Problem, assert_near, problem
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, jacrev, vmap

import curvlab as cl
from curvlab.errors import CurvlabError
from curvlab.exact import KINDS
from curvlab.layers import Block

zoo = pytest.mark.parametrize(("model", "likelihood"), [(m, k) for m in MODELS for k in LIKELIHOODS])
models = pytest.mark.parametrize("model", MODELS)


def values(p: Problem) -> dict[str, Tensor]:
    return {name: q.detach() for name, q in p.model.named_parameters()}


def gradients(p: Problem, y: Tensor) -> dict[str, Tensor]:
    """∂ℓₙ of each example at labels y, by torch.func: {parameter: [N, …]}."""

    def loss(v: dict[str, Tensor], x: Tensor, label: Tensor) -> Tensor:
        return p.likelihood.loss(functional_call(p.model, v, (x[None],)), label[None])[0]

    return vmap(grad(loss), (None, 0, 0))(values(p), p.x, y)


def jacobians(p: Problem) -> dict[str, Tensor]:
    """∂zₙ of each example, by torch.func: {parameter: [N, C, …]}."""
    return vmap(jacrev(lambda v, x: functional_call(p.model, v, (x[None],))[0]), (None, 0))(values(p), p.x)


def flat(block: Block, tensors: dict[str, Tensor], batch: int) -> Tensor:
    """The block's row-major [O, I] flattening, bias last, after `batch` axes."""
    weight, *bias = (tensors[name] for name in block.params)
    if block.module is None:
        return weight.flatten(batch)
    return torch.cat([weight, *(b[..., None] for b in bias)], -1).flatten(batch)


def mean_outer(rows: Tensor) -> Tensor:
    return sum(torch.outer(r, r) for r in rows) / len(rows)


def ruled(objective: cl.Objective) -> list[Block]:
    return [b for b in objective.blocks if b.module is not None]


def matrix(p: Problem, kind: str, block: Block) -> Tensor:
    return cl.exact.matrix(p.objective(), p.x, p.y, kind, block.name).dense()


@zoo
def test_gradients(model: str, likelihood: str) -> None:
    p = problem(model, likelihood)
    found, expected = cl.exact.gradients(p.objective(), p.x, p.y), gradients(p, p.y)
    assert sorted(found) == sorted(expected)
    for name, g in found.items():
        assert_near(g, expected[name])


@models
def test_jacobians(model: str) -> None:
    p = problem(model)
    found, expected = cl.exact.jacobians(p.objective(), p.x), jacobians(p)
    assert sorted(found) == sorted(expected)
    for name, j in found.items():
        assert_near(j, expected[name])


def test_jacobians_of_outputs_with_several_axes() -> None:
    """[N, T, F] outputs are flattened row-major to C = T·F."""
    net = nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 2)).double()
    x = torch.randn(4, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = cl.exact.jacobians(cl.Objective(net, cl.likelihoods.Gaussian()), x)
    v = {name: q.detach() for name, q in net.named_parameters()}
    expected = vmap(jacrev(lambda v, one: functional_call(net, v, (one[None],))[0].flatten()), (None, 0))(v, x)
    for name, j in found.items():
        assert j.shape[:2] == (4, 6)
        assert_near(j, expected[name])


@zoo
@pytest.mark.parametrize("kind", ["ggn", "fisher"])
def test_ggn_and_fisher(model: str, likelihood: str, kind: str) -> None:
    """(1/N) Σₙ Jᵀ ∂²ℓ/∂z² J, all three by torch.func."""
    p = problem(model, likelihood)
    J = jacobians(p)
    H = vmap(hessian(lambda z, y: p.likelihood.loss(z[None], y[None])[0]))(p.model(p.x).detach(), p.y)
    for block in ruled(p.objective()):
        j = flat(block, J, 2)
        assert_near(matrix(p, kind, block), torch.einsum("nci,ncd,ndj->ij", j, H, j) / len(p.x))


@models
def test_fisher_with_enumerated_labels(model: str) -> None:
    """Σ_c p_c ∂ℓ_c ∂ℓ_cᵀ: the Fisher matrix by its definition."""
    p = problem(model, "categorical")
    probabilities = p.model(p.x).detach().softmax(1)
    by_label = [gradients(p, torch.full_like(p.y, c)) for c in range(3)]
    for block in ruled(p.objective()):
        expected = sum(
            torch.einsum("n,ni,nj->ij", probabilities[:, c], flat(block, g, 1), flat(block, g, 1))
            for c, g in enumerate(by_label)
        )
        assert_near(matrix(p, "ggn", block), expected / len(p.x))


@zoo
def test_empirical_fisher(model: str, likelihood: str) -> None:
    p = problem(model, likelihood)
    g = gradients(p, p.y)
    for block in ruled(p.objective()):
        assert_near(matrix(p, "ef", block), mean_outer(flat(block, g, 1)))


@zoo
def test_monte_carlo_fisher_at_the_labels_drawn(model: str, likelihood: str) -> None:
    p = problem(model, likelihood)
    objective = p.objective(seed=8)
    for block in ruled(objective):
        generator = objective.generator(objective.closures["exact"] + 1, "exact")
        drawn = p.likelihood.sample(p.model(p.x).detach(), generator)
        found = cl.exact.matrix(objective, p.x, p.y, "fisher-mc", block.name).dense()
        assert_near(found, mean_outer(flat(block, gradients(p, drawn), 1)))


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_monte_carlo_fisher_on_average(likelihood: str) -> None:
    """300 draws, each on new labels: every entry within 5 standard errors of the exact one."""
    p = problem("linear", likelihood)
    objective = p.objective()
    draws = torch.stack([cl.exact.matrix(objective, p.x, p.y, "fisher-mc", "1").dense() for _ in range(300)])
    exact = cl.exact.matrix(objective, p.x, p.y, "fisher", "1").dense()
    error = draws.std(0) / math.sqrt(len(draws))
    assert bool(((draws.mean(0) - exact).abs() <= 5 * error).all())
    assert float(error.norm() / exact.norm()) < 0.1


@zoo
def test_hessian(model: str, likelihood: str) -> None:
    """Double backward through the model's own parameters, one row at a time; also for layers without a rule."""
    p = problem(model, likelihood)
    objective = p.objective()
    loss = p.likelihood.loss(p.model(p.x), p.y).mean()
    for block in objective.blocks:
        weights = {name: p.model.get_parameter(name) for name in block.params}
        first = torch.autograd.grad(loss, list(weights.values()), create_graph=True)
        gradient = flat(block, dict(zip(weights, first, strict=True)), 0)
        rows = []
        for entry in gradient:
            second = torch.autograd.grad(entry, list(weights.values()), retain_graph=True, allow_unused=True)
            full = {n: torch.zeros_like(w) if s is None else s for (n, w), s in zip(weights.items(), second, strict=True)}
            rows.append(flat(block, full, 0))
        found = cl.exact.matrix(objective, p.x, p.y, "hessian", block.name).dense()
        assert_near(found, torch.stack(rows).detach())
        assert_near(found, found.T)


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_hessian_of_a_linear_model_is_its_ggn(likelihood: str) -> None:
    p = problem("linear", likelihood)
    block = p.objective().blocks[0]
    assert_near(matrix(p, "hessian", block), matrix(p, "ggn", block))


@zoo
def test_last_block_of_the_hessian_is_its_ggn(model: str, likelihood: str) -> None:
    """The outputs are linear in the last layer."""
    p = problem(model, likelihood)
    block = p.objective().blocks[-1]
    assert_near(matrix(p, "hessian", block), matrix(p, "ggn", block))


@pytest.mark.parametrize("kind", KINDS)
@models
def test_matrices_are_symmetric_of_the_models_dtype_and_leave_it_alone(model: str, kind: str) -> None:
    p = problem(model, dtype=torch.float32)
    objective = p.objective()
    before = {name: t.clone() for name, t in p.model.state_dict().items()}
    for block in ruled(objective):
        found = cl.exact.matrix(objective, p.x, p.y, kind, block.name).dense()
        assert found.dtype == torch.float32
        assert found.shape == (block.numel, block.numel)
        assert_near(found, found.T, 1e-6)
        assert not found.requires_grad
    assert all(torch.equal(t, before[name]) for name, t in p.model.state_dict().items())
    assert all(q.grad is None for q in p.model.parameters())


def test_one_example_and_one_output() -> None:
    """V = N = C = 1."""
    net = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 1)).double()
    p = Problem(net, cl.likelihoods.Bernoulli(), torch.ones(1, 2).double(), torch.ones(1, 1).double())
    z = net(p.x).detach()
    weight = float(z.sigmoid() * (1 - z.sigmoid()))
    for block in p.objective().blocks:
        j = flat(block, jacobians(p), 2)[0, 0]
        assert_near(matrix(p, "ggn", block), weight * torch.outer(j, j))
    for name, j in cl.exact.jacobians(p.objective(), p.x).items():
        assert_near(j, jacobians(p)[name])


def normbatch() -> tuple[cl.Objective, Tensor, Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Tanh(), nn.Linear(3, 2)).double()
        x, y = torch.randn(6, 2).double(), torch.randn(6, 2).double()
    return cl.Objective(net, cl.likelihoods.Gaussian()), x, y


ORACLES = {kind: lambda o, x, y, kind=kind: cl.exact.matrix(o, x, y, kind, "1") for kind in KINDS} | {
    "gradients": cl.exact.gradients,
    "jacobians": lambda o, x, y: cl.exact.jacobians(o, x),
}


@pytest.mark.parametrize("name", [name for name in ORACLES if name != "hessian"])
def test_batchnorm_in_training_leaves_no_example_alone(name: str) -> None:
    """An example's gradient has no meaning there: said in one line, and no statistics moved."""
    objective, x, y = normbatch()
    before = {key: t.clone() for key, t in objective.model.state_dict().items()}
    with pytest.raises(CurvlabError, match=r"'1' normalises over the batch.* call model\.eval\(\) first"):
        ORACLES[name](objective, x, y)
    assert all(torch.equal(t, before[key]) for key, t in objective.model.state_dict().items())


def test_hessian_with_batchnorm_in_training() -> None:
    """The mean loss has a Hessian all the same: through the batch's own statistics, which do not move."""
    objective, x, y = normbatch()
    before = {key: t.clone() for key, t in objective.model.state_dict().items()}
    found = cl.exact.matrix(objective, x, y, "hessian", "1").dense()
    assert all(torch.equal(t, before[key]) for key, t in objective.model.state_dict().items())
    first, last = objective.model[0], objective.model[3]

    def loss(w: Tensor) -> Tensor:
        h = x @ w[:, :-1].T + w[:, -1]
        h = (h - h.mean(0)) / (h.var(0, correction=0) + objective.model[1].eps).sqrt()
        return 0.5 * (torch.tanh(h) @ last.weight.T + last.bias - y).square().sum(1).mean()

    w = torch.cat([first.weight, first.bias[:, None]], 1).detach()
    assert_near(found, torch.autograd.functional.hessian(loss, w).reshape(9, 9), 1e-11)


@pytest.mark.parametrize("name", ORACLES)
def test_looking_does_not_move_buffers(name: str) -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, h: Tensor) -> Tensor:
            self.seen += 1
            return h

    p = problem("tanh", "gaussian")
    objective = cl.Objective(nn.Sequential(p.model, Counting()), p.likelihood)
    ORACLES[name](objective, p.x, p.y)
    assert float(objective.model[1].seen) == 0


@pytest.mark.parametrize("name", ORACLES)
def test_the_oracle_takes_batchnorm_in_eval(name: str) -> None:
    """With fixed statistics BatchNorm is an affine map: the same numbers as with a frozen scale and shift in its place."""
    objective, x, y = normbatch()
    net = objective.model
    net(x)
    net.eval()
    norm = net[1]

    class Affine(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.bias = nn.Parameter(norm.weight.detach().clone()), nn.Parameter(norm.bias.detach().clone())

        def forward(self, h: Tensor) -> Tensor:
            return (h - norm.running_mean) / (norm.running_var + norm.eps).sqrt() * self.weight + self.bias

    plain = cl.Objective(nn.Sequential(net[0], Affine(), net[2], net[3]), cl.likelihoods.Gaussian())
    found, expected = ORACLES[name](objective, x, y), ORACLES[name](plain, x, y)
    if isinstance(found, dict):
        assert list(found) == list(expected)
        for key, value in found.items():
            assert_near(value, expected[key])
    else:
        assert_near(found.dense(), expected.dense())


def test_unknown_kind_and_block_name_the_known() -> None:
    p = problem()
    with pytest.raises(CurvlabError, match=r"unknown kind of matrix 'hesian'; did you mean 'hessian'\? \(known: hessian, ggn"):
        cl.exact.matrix(p.objective(), p.x, p.y, "hesian", "1")
    with pytest.raises(CurvlabError, match=r"unknown block '4' \(known: 1, 2, 3\)"):
        cl.exact.matrix(p.objective(), p.x, p.y, "ggn", "4")


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "hessian"])
def test_layer_without_a_rule(kind: str) -> None:
    p = problem("norm")
    with pytest.raises(CurvlabError, match=rf"block 2 \(norm\.weight\) belongs to a layer without a rule: its {kind}"):
        cl.exact.matrix(p.objective(), p.x, p.y, kind, "2")


def test_matrix_larger_than_the_memory() -> None:
    objective = cl.Objective(nn.Linear(400_000, 4), cl.likelihoods.Gaussian())
    x, y = torch.zeros(1, 400_000), torch.zeros(1, 4)
    with pytest.raises(CurvlabError, match=r"the dense ggn of block 1 \(weight, bias\) would need .* GB"):
        cl.exact.matrix(objective, x, y, "ggn", "1")


@pytest.mark.parametrize("kind", KINDS)
def test_data_that_do_not_fit(kind: str) -> None:
    p = problem()
    with pytest.raises(CurvlabError, match="label 5 is out of range"):
        cl.exact.matrix(p.objective(), p.x, torch.full_like(p.y, 5), kind, "1")
    with pytest.raises(CurvlabError, match="the inputs contain NaN"):
        cl.exact.matrix(p.objective(), p.x * math.nan, p.y, kind, "1")
