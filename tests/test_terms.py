"""Theorem 3: a block is the sum of its Kronecker products, term by term; where its approximations
are exact.
"""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from oracle import total
from problems import LIKELIHOODS, MODELS, REPRESENTATIVE, Problem, assert_near, module_of, problem
from torch import Tensor, nn
from torch.func import functional_call, hessian, jacrev

import curvlab as cl
from curvlab.capture import Capture
from curvlab.exact import KINDS, Kind, KroneckerSum
from curvlab.layers import Block
from curvlab.likelihoods import Likelihood

SUMS = [name for name in MODELS if name != "norm"]
zoo = pytest.mark.parametrize(
    ("model", "likelihood"), [(m, k) for m in MODELS for k in LIKELIHOODS]
)
kinds = pytest.mark.parametrize("kind", KINDS)


def fit(objective: cl.Objective) -> list[Block]:
    return [b for b in objective.blocks if b.layer is not None and b.groups == 1]


def terms(p: Problem, kind: Kind, block: str) -> KroneckerSum:
    return cl.exact.kronecker_terms(p.objective(), p.x, p.y, kind, block)


def near(found: Tensor, expected: Tensor, scale: Tensor, tolerance: float = 1e-12) -> None:
    """Difference against the norm of another matrix, since Π may be zero."""
    assert found.shape == expected.shape
    assert float((found - expected).norm()) <= tolerance * float(scale.norm())


def kron(G: Tensor, A: Tensor) -> Tensor:
    return torch.kron(G.contiguous(), A.contiguous())


@pytest.mark.thinned(4)
@zoo
@kinds
def test_dense_is_the_matrix(model: str, likelihood: str, kind: Kind) -> None:
    p = problem(model, likelihood)
    for block in fit(p.objective()):
        scale = cl.exact.matrix(p.objective(), p.x, p.y, "ggn", block.name).dense()
        found = terms(p, kind, block.name).dense()
        near(found, cl.exact.matrix(p.objective(), p.x, p.y, kind, block.name).dense(), scale)
        assert torch.equal(found, found.T)


@pytest.mark.parametrize("model", [m for m in REPRESENTATIVE if m in MODELS])
@kinds
def test_dense_is_the_matrix_by_the_general_route(model: str, kind: Kind) -> None:
    p = problem(model)
    for block in fit(p.objective()):
        scale = cl.exact.matrix(p.objective(), p.x, p.y, "ggn", block.name).dense()
        expected = cl.exact.matrix(p.objective(), p.x, p.y, kind, block.name, route="func").dense()
        near(terms(p, kind, block.name).dense(), expected, scale, 1e-11)


@pytest.mark.thinned(2)
@pytest.mark.parametrize("model", SUMS)
@kinds
def test_every_sum_term_by_term(model: str, kind: Kind) -> None:
    """Theorem 3, (3.4), (3.7), (3.8) and (3.9), each written out over examples and places."""
    p = problem(model)
    for block in fit(p.objective()):
        s = terms(p, kind, block.name)
        whole, same, averaged = (torch.zeros(len(s), len(s), dtype=torch.float64) for _ in range(3))
        A_mean, G_mean = (
            torch.zeros(s.shape[1], s.shape[1]).double(),
            torch.zeros(s.shape[0], s.shape[0]).double(),
        )
        places = range(s.places)
        for n in range(s.size):
            A, G = s.terms(n)
            assert A.shape == (s.places, s.places, s.shape[1], s.shape[1])
            assert G.shape == (s.places, s.places, s.shape[0], s.shape[0])
            whole += sum(kron(G[t, u], A[t, u]) for t in places for u in places) / s.size
            same += sum(kron(G[t, t], A[t, t]) for t in places) / s.size
            of_places, over_places = (
                total(A[t, t] for t in places),
                total(G[t, t] for t in places) / s.places,
            )
            averaged += kron(over_places, of_places) / s.size
            A_mean += of_places / s.size
            G_mean += over_places / s.size
        scale = cl.exact.matrix(p.objective(), p.x, p.y, "ggn", block.name).dense()
        near(s.dense(), whole, scale)
        near(s.same_place(), same, scale)
        near(s.averaged(), averaged, scale)
        near(s.single().dense(), kron(G_mean, A_mean), scale)


@pytest.mark.parametrize("model", ["tanh", "tokens", "conv", "conv-1d"])
def test_vectors_and_their_second_moments_are_one(model: str) -> None:
    """A sum that keeps g, and one that keeps Σ_v g gᵀ."""
    p = problem(model)
    for block in fit(p.objective()):
        s = terms(p, "fisher", block.name)
        held = KroneckerSum(s.a, s.G)
        assert s.g is not None
        assert s.hessians is None
        for n in (0, -1):
            for one, other in zip(s.terms(n), held.terms(n), strict=True):
                assert_near(one, other)
        for one, other in [
            (s.dense(), held.dense()),
            (s.same_place(), held.same_place()),
            (s.averaged(), held.averaged()),
            (s.single().dense(), held.single().dense()),
        ]:
            assert_near(one, other)


class Moved:
    """Losses and outputs of one example as functions of what is added to a layer's output."""

    def __init__(self, p: Problem, block: Block, n: int) -> None:
        self.p, self.block, self.n = p, block, n
        seen: list[Tensor] = []
        handle = module_of(block).register_forward_hook(
            lambda module, args, output: seen.append(output.detach())
        )
        with Capture(p.model, (block,)) as capture:
            p.model(p.x[n : n + 1])
        handle.remove()
        (self.use,) = capture.uses[block.name]
        self.zero = torch.zeros_like(seen[0])

    def outputs(self, delta: Tensor) -> Tensor:
        weights = {name: w.detach() for name, w in self.p.model.named_parameters()}
        handle = module_of(self.block).register_forward_hook(
            lambda module, args, output: output + delta
        )
        try:
            return functional_call(self.p.model, weights, (self.p.x[self.n : self.n + 1],))
        finally:
            handle.remove()

    def loss(self, delta: Tensor) -> Tensor:
        return self.p.likelihood.loss(self.outputs(delta), self.p.y[self.n : self.n + 1]).sum()

    def by_place(self, matrix: Tensor) -> Tensor:
        """[*out, *out] → [T, O, T, O] by the rule's own reading of an output."""
        count = self.zero.numel()
        order = self.use.rule.outputs(torch.arange(count).view(self.zero.shape))[0]
        return matrix.reshape(count, count)[order.flatten()[:, None], order.flatten()].view(
            *order.shape, *order.shape
        )


@pytest.mark.thinned(2)
@pytest.mark.parametrize("model", ["tanh", "tokens", "conv", "conv-1d", "embedding"])
@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_preactivation_hessians_by_moving_the_output_of_the_layer(
    model: str, likelihood: str
) -> None:
    p = problem(model, likelihood, n=3)
    for block in fit(p.objective()):
        found = {
            kind: cl.exact.preactivation(p.objective(), p.x, p.y, kind, block.name)
            for kind in ("hessian", "ggn", "pi", "ef")
        }
        for n in range(3):
            at = Moved(p, block, n)
            second = at.by_place(hessian(at.loss)(at.zero))
            z = at.outputs(at.zero)
            label = p.y[n : n + 1]
            inner = hessian(lambda z, label=label: p.likelihood.loss(z, label).sum())(z).reshape(
                z.numel(), z.numel()
            )
            J = jacrev(at.outputs)(at.zero).reshape(z.numel(), -1)
            ggn = at.by_place(J.T @ inner @ J)
            slope = jacrev(at.loss)(at.zero).flatten()
            near(found["hessian"][n], second, ggn + second)
            near(found["ggn"][n], ggn, ggn)
            near(found["pi"][n], second - ggn, ggn + second)
            near(found["ef"][n], at.by_place(torch.outer(slope, slope)), ggn)


@pytest.mark.parametrize("model", MODELS)
@kinds
def test_one_place_is_the_same_place_and_its_average(model: str, kind: Kind) -> None:
    """T = 1: (3.4) and (3.7) change nothing, to the bit."""
    p = problem(model)
    for block in fit(p.objective()):
        s = terms(p, kind, block.name)
        if s.places == 1:
            assert torch.equal(s.same_place(), s.dense())
            assert torch.equal(s.averaged(), s.dense())


def per_token(likelihood: Likelihood, x: Tensor) -> Problem:
    """Every place has outputs of its own, and no other place sees it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
        y = torch.rand(*x.shape[:2], 2).double()
    return Problem(net, likelihood, x, y)


@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian"])
@pytest.mark.parametrize("kind", ["hessian", "ggn", "pi", "fisher"])
def test_places_with_outputs_of_their_own_are_apart(likelihood: str, kind: Kind) -> None:
    """Nothing is pooled: G_tt' = 0, and (3.4) is exact. Not for gradients at one label, whose outer
    products mix places.
    """
    x = torch.randn(5, 4, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    p = per_token(LIKELIHOODS[likelihood](), x)
    for block in p.objective().blocks:
        s = terms(p, kind, block.name)
        scale = cl.exact.matrix(p.objective(), p.x, p.y, "ggn", block.name).dense()
        between = s.G * (1 - torch.eye(4, dtype=torch.float64))[None, :, None, :, None]
        assert float(between.norm()) <= 1e-14 * float(s.G.norm())
        near(s.same_place(), s.dense(), scale)
    ef = terms(p, "ef", "1")
    assert float((ef.same_place() - ef.dense()).norm()) > 0.1 * float(ef.dense().norm())


def test_places_that_all_see_the_same_can_be_averaged() -> None:
    """(3.5) is exact where a_t is the same everywhere: Σ_t G_t ⊗ A = (mean G_t) ⊗ (T A)."""
    x = torch.randn(
        5, 1, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    ).expand(5, 4, 3)
    p = per_token(cl.likelihoods.Gaussian(), x)
    for block in p.objective().blocks:
        s = terms(p, "hessian", block.name)
        assert_near(s.averaged(), s.same_place())
        assert_near(s.averaged(), s.dense())


@pytest.mark.parametrize("bias", [True, False])
def test_a_deep_linear_network_with_squared_error_is_one_product(bias: bool) -> None:
    """Linear in each layer: Hessian = GGN = Fisher = E[A] ⊗ G, with G the same for every
    example.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(
            *(nn.Linear(i, o, bias=bias) for i, o in [(5, 4), (4, 6), (6, 3)])
        ).double()
    p = problem("linear", "gaussian", n=9)
    objective = cl.Objective(net, cl.likelihoods.Gaussian())
    J = torch.eye(3, dtype=torch.float64)  # of the outputs in the layer's
    for block, layer in reversed(list(zip(objective.blocks, net, strict=True))):
        found = {
            k: cl.exact.kronecker_terms(objective, p.x, p.y, k, block.name)
            for k in ("hessian", "ggn", "fisher")
        }
        for s in found.values():
            assert_near(s.dense(), found["ggn"].dense())
            assert_near(s.single().dense(), s.dense())
            assert_near(s.G[:, 0, :, 0], (J.T @ J).expand(9, -1, -1))
        weight: Any = layer.weight
        J = J @ weight.detach()
        assert not bool(cl.exact.preactivation(objective, p.x, p.y, "pi", block.name).any())


def test_one_example_of_one_place_is_one_product() -> None:
    """(2.2)."""
    p = problem("tanh", n=1)
    for block in p.objective().blocks:
        for kind in KINDS:
            s = terms(p, kind, block.name)
            scale = terms(p, "ggn", block.name).dense()
            near(s.single().dense(), s.dense(), scale)


@kinds
def test_float32_stays_float32(kind: Kind) -> None:
    p = problem("conv", dtype=torch.float32)
    s = terms(p, kind, "1")
    found = [s.dense(), s.same_place(), s.averaged(), s.single().dense(), s.G, *s.terms(0)]
    assert {t.dtype for t in found} == {torch.float32}
    assert not any(t.requires_grad for t in found)


def test_labels_of_fisher_mc_are_those_of_the_matrix() -> None:
    p = problem("tokens")
    one, other = p.objective(seed=4), p.objective(seed=4)
    s = cl.exact.kronecker_terms(one, p.x, p.y, "fisher-mc", "1", draws=3)
    assert_near(s.dense(), cl.exact.matrix(other, p.x, p.y, "fisher-mc", "1", draws=3).dense())
    again = cl.exact.kronecker_terms(one, p.x, p.y, "fisher-mc", "1", draws=3)
    assert not torch.equal(again.dense(), s.dense())


def test_a_convolution_of_100_examples_at_64_places_fits() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.Tanh(),
            nn.AvgPool2d(4),
            nn.Flatten(),
            nn.Linear(32, 5),
        )
        x, y = torch.randn(100, 3, 8, 8), torch.randint(5, (100,))
    objective = cl.Objective(net, cl.likelihoods.Categorical())
    s = cl.exact.kronecker_terms(objective, x, y, "hessian", "1")
    assert s.hessians is not None
    assert s.hessians.shape == (100, 64, 8, 64, 8)
    assert_near(s.dense(), cl.exact.matrix(objective, x, y, "hessian", "1").dense(), 1e-5)


# ----------------------------------------------------------------------
# bad input


def test_blocks_that_are_no_sum() -> None:
    p = problem("norm")
    with pytest.raises(
        cl.CurvlabError,
        match=r"block 2 \(norm\.weight\) belongs to a layer without a rule, so it is no sum",
    ):
        terms(p, "fisher", "2")
    p = problem("groups")
    with pytest.raises(
        cl.CurvlabError,
        match=r"block 1 .* has 2 groups of outputs with inputs of their own, so it is no sum",
    ):
        terms(p, "hessian", "1")


def test_unknown_names_and_data_that_do_not_fit() -> None:
    p = problem("tanh")
    with pytest.raises(cl.CurvlabError, match=r"unknown block '9' \(known: 1, 2, 3\)"):
        terms(p, "fisher", "9")
    with pytest.raises(
        cl.CurvlabError, match=r"unknown kind of matrix 'fischer'; did you mean 'fisher'\?"
    ):
        terms(p, cast(Kind, "fischer"), "1")
    with pytest.raises(cl.CurvlabError, match="draws must be 1 or more"):
        cl.exact.kronecker_terms(p.objective(), p.x, p.y, "fisher-mc", "1", draws=0)
    with pytest.raises(cl.CurvlabError, match="label 5 is out of range"):
        cl.exact.kronecker_terms(p.objective(), p.x, torch.full_like(p.y, 5), "hessian", "1")


@pytest.mark.parametrize("n", [7, -8])
def test_an_example_that_is_not_there(n: int) -> None:
    with pytest.raises(
        cl.CurvlabError, match=rf"there is no example {n}: the sum has 7, counted from 0"
    ):
        terms(problem("tanh"), "fisher", "1").terms(n)


def test_a_sum_has_one_kind_of_derivatives() -> None:
    a, g = torch.zeros(3, 1, 2), torch.zeros(1, 3, 1, 4)
    with pytest.raises(cl.CurvlabError, match="takes either hessians"):
        KroneckerSum(a)
    with pytest.raises(cl.CurvlabError, match="takes either hessians"):
        KroneckerSum(a, torch.zeros(3, 1, 4, 1, 4), g)
    with pytest.raises(
        cl.CurvlabError,
        match=r"inputs \[3, 1, 2\] and derivatives \[1, 2, 1, 4\] differ in examples or places",
    ):
        KroneckerSum(a, g=g[:, :2])


def test_what_does_not_fit_in_memory() -> None:
    """Nothing is allocated: one expanded number."""
    zero = torch.zeros(1, 1, 1, 1)
    s = KroneckerSum(zero[0].expand(1000, 2000, 9), g=zero.expand(1, 1000, 2000, 50))
    with pytest.raises(
        cl.CurvlabError,
        match=r"the pre-activation Hessians of 1000 examples, 2000 places, .* take fewer examples",
    ):
        _ = s.G
    wide = KroneckerSum(zero[0].expand(2, 1, 100_000), g=zero.expand(1, 2, 1, 100))
    for method in (wide.dense, wide.same_place, wide.averaged):
        with pytest.raises(
            cl.CurvlabError,
            match="a dense block of 2 examples, 1 places, 100 outputs and 100000 inputs would need",
        ):
            method()
    net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    objective = cl.Objective(net, cl.likelihoods.Categorical())
    with pytest.raises(
        cl.CurvlabError,
        match=r"the pre-activation Hessians of block 1 .*, 4 examples at 88804 places, would need",
    ):
        cl.exact.kronecker_terms(
            objective, torch.zeros(4, 1, 300, 300), torch.zeros(4).long(), "hessian", "1"
        )
