"""`output_law` on likelihoods of one's own, right and wrong ones: against torch.func, closed forms
and enumerated labels.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from problems import Poisson, assert_near, normal
from torch import Tensor, nn
from torch.func import grad, hessian, vmap

from curvlab import errors, output_law
from curvlab.errors import CurvlabError
from curvlab.likelihoods import Bernoulli, Categorical, Gaussian, Likelihood, root_of, sample_of
from curvlab.output_law import Law, Root, law_of, refusal

W = torch.tensor([1.0, 5.0, 0.2], dtype=torch.float64)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def classes(*shape: int, of: int = 3, seed: int = 3) -> Tensor:
    return torch.randint(of, shape, generator=generator(seed))


def diagonal(root: Tensor) -> Tensor:
    """[N, *C] → the root of a diagonal Hessian, [V, N, *C]."""
    return torch.diag_embed(root.flatten(1)).movedim(1, 0).reshape(-1, *root.shape)


def outer(root: Tensor) -> Tensor:
    s = root.flatten(2) if root.ndim > 2 else root[:, :, None]
    return torch.einsum("vnc,vnd->ncd", s, s)


def output_hessian(likelihood: Likelihood, z: Tensor, y: Tensor) -> Tensor:
    """[N, C', C'] by torch.func, one example at a time."""
    if isinstance(likelihood, Rates):  # whose loss looks at numbers
        return torch.stack([torch.diag(row) for row in y / z.square()])
    found = vmap(hessian(lambda one, label: likelihood.loss(one[None], label[None])[0]))(z, y)
    return found.reshape(len(z), z[0].numel(), -1)


# ----------------------------------------------------------------------
# likelihoods of one's own


class Own:
    """Targets are trusted here."""

    def check(self, z: Tensor, y: Tensor) -> None:
        pass

    def sample(self, z: Tensor, generator: torch.Generator) -> Tensor:
        raise NotImplementedError

    def root(self, z: Tensor) -> Tensor:
        raise NotImplementedError


class Counts(Poisson):
    """ℓ = e^z − y z: right."""


class Margin(Own):
    """Labels −1 and 1: ℓ = softplus(−y z), right."""

    def loss(self, z: Tensor, y: Tensor) -> Tensor:
        return F.softplus(-y * z).flatten(1).sum(1)

    def sample(self, z: Tensor, generator: torch.Generator) -> Tensor:
        return 2 * torch.bernoulli(z.sigmoid(), generator=generator) - 1

    def root(self, z: Tensor) -> Tensor:
        return Bernoulli().root(z)


class Scaled(Own):
    """A Gaussian of variance 1/4, right."""

    def loss(self, z: Tensor, y: Tensor) -> Tensor:
        return 2 * (z - y).square().flatten(1).sum(1)

    def sample(self, z: Tensor, generator: torch.Generator) -> Tensor:
        return z + torch.randn(z.shape, generator=generator, dtype=z.dtype) / 2

    def root(self, z: Tensor) -> Tensor:
        return 2 * Gaussian().root(z)


L = torch.tensor([[2.0, 0, 0], [1, 1, 0], [-1, 0.5, 0.5]], dtype=torch.float64)


class Correlated(Own):
    """A Gaussian of precision L Lᵀ, right, with a root that is no square: its columns come in
    halves.
    """

    def loss(self, z: Tensor, y: Tensor) -> Tensor:
        return 0.5 * ((z - y) @ L).square().sum(1)

    def sample(self, z: Tensor, generator: torch.Generator) -> Tensor:
        return z + torch.randn(z.shape, generator=generator, dtype=z.dtype) @ torch.linalg.inv(L)

    def root(self, z: Tensor) -> Tensor:
        return torch.cat([L.T, L.T])[:, None].expand(6, *z.shape) / math.sqrt(2)


class Heads(Own):
    """Two softmaxes beside each other, of 3 and 2 classes; labels [N, 2]: right."""

    def _each(self, z: Tensor) -> tuple[Tensor, Tensor]:
        return z[:, :3], z[:, 3:]

    def loss(self, z: Tensor, y: Tensor) -> Tensor:
        one, two = (
            F.cross_entropy(part, y[:, i], reduction="none") for i, part in enumerate(self._each(z))
        )
        return one + two

    def sample(self, z: Tensor, generator: torch.Generator) -> Tensor:
        return torch.stack([Categorical().sample(part, generator) for part in self._each(z)], 1)

    def root(self, z: Tensor) -> Tensor:
        one, two = (Categorical().root(part) for part in self._each(z))
        return torch.cat([F.pad(one, (0, 2)), F.pad(two, (3, 0))])


class Precisions(Own):
    """A Gaussian whose precisions are data: y = (targets, precisions) [N, 2, C]. Right, since root
    and sample see them.
    """

    def loss(self, z: Tensor, y: Tensor) -> Tensor:
        return 0.5 * (y[:, 1] * (z - y[:, 0]).square()).sum(1)

    def sample(self, z: Tensor, generator: torch.Generator, y: Tensor) -> Tensor:  # type: ignore[override]  # takes labels, or not, in its own way
        drawn = z + torch.randn(z.shape, generator=generator, dtype=z.dtype) / y[:, 1].sqrt()
        return torch.stack([drawn, y[:, 1]], 1)

    def root(self, z: Tensor, y: Tensor) -> Tensor:  # type: ignore[override]  # takes labels, or not, in its own way
        return diagonal(y[:, 1].sqrt())


class Masked(Own):
    """Tokens [N, C, T], a label of −1 is none: right, since root and sample see the mask."""

    def loss(self, z: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(z, y, ignore_index=-1, reduction="none").sum(1)

    def sample(self, z: Tensor, generator: torch.Generator, y: Tensor) -> Tensor:  # type: ignore[override]  # takes labels, or not, in its own way
        return torch.where(y == -1, -1, Categorical().sample(z, generator))

    def root(self, z: Tensor, y: Tensor) -> Tensor:  # type: ignore[override]  # takes labels, or not, in its own way
        return Categorical(-1).root(z, y)


class RootForgetsTheMask(Masked):
    def root(self, z: Tensor) -> Tensor:  # type: ignore[override]  # takes labels, or not, in its own way
        return Categorical().root(z)


class SampleForgetsTheMask(Masked):
    def sample(self, z: Tensor, generator: torch.Generator) -> Tensor:  # type: ignore[override]  # takes labels, or not, in its own way
        return Categorical().sample(z, generator)


class Learned(nn.Module, Own):
    """A module with a precision of its own, right."""

    def __init__(self) -> None:
        super().__init__()
        self.log_precision = nn.Parameter(torch.tensor(0.7, dtype=torch.float64))

    def loss(self, z: Tensor, y: Tensor) -> Tensor:
        return (
            0.5 * self.log_precision.exp() * (z - y).square().sum(1)
            - 0.5 * z.shape[1] * self.log_precision
        )

    def sample(self, z: Tensor, generator: torch.Generator) -> Tensor:
        return (
            z
            + torch.randn(z.shape, generator=generator, dtype=z.dtype)
            * (-self.log_precision / 2).exp()
        )

    def root(self, z: Tensor) -> Tensor:
        return (self.log_precision / 2).exp() * Gaussian().root(z)


class Weighted(Categorical):
    """Class weights: ∂²ℓ/∂z² = w_y (diag p − p pᵀ), and no law over labels has that loss."""

    def loss(self, z: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(z, y, weight=W.to(z.dtype), reduction="none")


class WeightedKnowingly(Weighted):
    def root(self, z: Tensor, y: Tensor) -> Tensor:  # type: ignore[override]  # takes labels, or not, in its own way
        return super().root(z) * W.to(z.dtype)[y].sqrt()[:, None]


class SlightlyWeighted(Categorical):
    """By so little that 2000 draws do not show it, but the Hessians at other labels do."""

    def loss(self, z: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(
            z, y, weight=torch.tensor([1.0, 1.001, 0.999], dtype=z.dtype), reduction="none"
        )

    def root(self, z: Tensor, y: Tensor) -> Tensor:  # type: ignore[override]  # takes labels, or not, in its own way
        return super().root(z) * torch.tensor([1.0, 1.001, 0.999], dtype=z.dtype)[y].sqrt()[:, None]


class NoHalf(Gaussian):
    """‖z − y‖², as many write it, beside the root and the labels of ½ ‖z − y‖²."""

    def loss(self, z: Tensor, y: Tensor) -> Tensor:
        return (z - y).square().flatten(1).sum(1)


class RatesByExponent(Own):
    """Exponential waiting times, z the logarithm of their mean: ℓ = z + y e^{−z}; the Hessian is y
    e^{−z}, the Fisher 1.
    """

    def loss(self, z: Tensor, y: Tensor) -> Tensor:
        return (z + y * (-z).exp()).flatten(1).sum(1)

    def sample(self, z: Tensor, generator: torch.Generator) -> Tensor:
        return torch.empty_like(z).exponential_(generator=generator) * z.exp()

    def root(self, z: Tensor) -> Tensor:
        return Gaussian().root(z)


class Rates(Own):
    """Poisson counts whose rates are the outputs themselves, which must be positive: ∂²ℓ/∂z² = y /
    z².
    """

    def loss(self, z: Tensor, y: Tensor) -> Tensor:
        if bool((z <= 0).any()):
            raise ValueError("rates must be positive")
        return (z - y * z.log()).flatten(1).sum(1)

    def sample(self, z: Tensor, generator: torch.Generator) -> Tensor:
        return torch.poisson(z, generator=generator)


class StudentT(Own):
    """ℓ = 2 log(1 + r²/3): negative curvature where r² > 3."""

    def loss(self, z: Tensor, y: Tensor) -> Tensor:
        return 2 * torch.log1p((z - y).square() / 3).flatten(1).sum(1)

    def sample(self, z: Tensor, generator: torch.Generator) -> Tensor:
        r = torch.randn(4, *z.shape, generator=generator, dtype=z.dtype)
        return z + r[0] / r[1:].square().mean(0).sqrt()

    def root(self, z: Tensor) -> Tensor:
        return Gaussian().root(z)


class Huber(Gaussian):
    """Curvature 1 near the target, 0 far from it."""

    def loss(self, z: Tensor, y: Tensor) -> Tensor:
        return F.huber_loss(z, y, reduction="none").flatten(1).sum(1)


class Hinge(Own):
    """Straight pieces: no curvature at all."""

    def loss(self, z: Tensor, y: Tensor) -> Tensor:
        return (1 - y * z).clamp_min(0).flatten(1).sum(1)

    def sample(self, z: Tensor, generator: torch.Generator) -> Tensor:
        return Margin().sample(z, generator)

    def root(self, z: Tensor) -> Tensor:
        return Bernoulli().root(z)


class Linear(Own):
    """Linear in the outputs: the score has no graph."""

    def loss(self, z: Tensor, y: Tensor) -> Tensor:
        return (y * z).sum(1)

    def sample(self, z: Tensor, generator: torch.Generator) -> Tensor:
        return torch.zeros_like(z)

    def root(self, z: Tensor) -> Tensor:
        return torch.zeros_like(z)[None]


class Ordinal(Own):
    """One latent number [N] and four ordered classes between three thresholds (proportional odds):
    log-concave.
    """

    edges = torch.tensor([-1e3, -1.0, 0.3, 1.2, 1e3], dtype=torch.float64)

    def loss(self, z: Tensor, y: Tensor) -> Tensor:
        # log(σ(b − z) − σ(a − z)) = log σ(b − z) + log σ(z − a) + log(1 − e^{a−b})
        low, high = (
            self.edges[y],
            self.edges[y + 1],
        )
        return -(F.logsigmoid(high - z) + F.logsigmoid(z - low) + torch.log1p(-(low - high).exp()))

    def sample(self, z: Tensor, generator: torch.Generator) -> Tensor:
        u = torch.rand(z.shape, generator=generator, dtype=z.dtype)
        return (u[:, None] > torch.sigmoid(self.edges[1:4] - z[:, None])).sum(1)

    def root(self, z: Tensor) -> Tensor:
        return torch.ones_like(z)[None]


class Focal(Categorical):
    """(1 − p_y)² times cross-entropy: not convex."""

    def loss(self, z: Tensor, y: Tensor) -> Tensor:
        ce = F.cross_entropy(z, y, reduction="none")
        return (1 - (-ce).exp()) ** 2 * ce


class Hot(Categorical):
    """Labels of another temperature than the loss's."""

    def sample(self, z: Tensor, generator: torch.Generator) -> Tensor:  # type: ignore[override]  # takes labels, or not, in its own way
        return super().sample(z / 3, generator)


class Wide(Gaussian):
    """Labels of twice the variance: their scores have mean zero all the same."""

    def sample(self, z: Tensor, generator: torch.Generator) -> Tensor:  # type: ignore[override]  # takes labels, or not, in its own way
        return z + math.sqrt(2) * torch.randn(z.shape, generator=generator, dtype=z.dtype)


class Global(Gaussian):
    """Draws from the global generator, as torch.distributions does."""

    def sample(self, z: Tensor, generator: torch.Generator) -> Tensor:  # type: ignore[override]  # takes labels, or not, in its own way
        return torch.distributions.Normal(z, torch.ones_like(z)).sample()


class Rootless(Gaussian):
    def root(self, z: Tensor) -> Tensor:  # type: ignore[override]  # takes labels, or not, in its own way
        raise NotImplementedError


class Sampleless(Gaussian):
    def sample(self, z: Tensor, generator: torch.Generator) -> Tensor:  # type: ignore[override]  # takes labels, or not, in its own way
        raise NotImplementedError


class SquareRoot(Gaussian):
    """A root of another shape: [N, C, C] where [V, N, C] is asked for."""

    def root(self, z: Tensor) -> Tensor:  # type: ignore[override]  # takes labels, or not, in its own way
        return torch.eye(z.shape[1], dtype=z.dtype).expand(len(z), -1, -1)


class Misshapen(Gaussian):
    """Labels that the loss does not take."""

    def loss(self, z: Tensor, y: Tensor) -> Tensor:
        return super().loss(z, y + torch.zeros_like(z))

    def sample(self, z: Tensor, generator: torch.Generator) -> Tensor:  # type: ignore[override]  # takes labels, or not, in its own way
        return torch.zeros(len(z) + 1, *z.shape[1:], dtype=z.dtype)


class Overflowing(Gaussian):
    """Labels at which the loss is not finite."""

    def sample(self, z: Tensor, generator: torch.Generator) -> Tensor:  # type: ignore[override]  # takes labels, or not, in its own way
        return torch.full_like(z, math.nan)

    def loss(self, z: Tensor, y: Tensor) -> Tensor:
        return (0.5 * (z - y).square() * torch.where(y.isnan(), y, 1)).sum(1)


class Subclass(Categorical):
    """Nothing changed, but who knows."""


@dataclass(frozen=True)
class Case:
    likelihood: Callable[[], Likelihood]
    z: Tensor
    y: Tensor
    root: str  # whose root: "own", "loss", or "none"
    follows: bool
    why: str = "^$"


Z = normal(6, 3)
Y = classes(6)
TOKENS, MASK = normal(5, 3, 4), torch.where(normal(5, 4, seed=9) > 0.5, -1, classes(5, 4))
PACKED = torch.stack([normal(6, 3, seed=1), normal(6, 3, seed=2).exp()], 1)
SIGNS = normal(6, 3, seed=4).sign()

CASES: dict[str, Case] = {
    # right in everything
    "subclass": Case(Subclass, Z, Y, "own", True),
    "subclass, smoothed": Case(lambda: Subclass(label_smoothing=0.2), Z, Y, "own", True),
    "subclass, a class ignored": Case(
        lambda: Subclass(ignore_index=0), TOKENS, MASK.clamp_min(0), "own", True
    ),
    "subclass, places": Case(lambda: Subclass(ignore_index=-1), TOKENS, MASK, "own", True),
    "subclass, probabilities": Case(
        Subclass, TOKENS, normal(5, 3, 4, seed=8).softmax(1).float().double(), "own", True
    ),
    "poisson": Case(Counts, Z, Y.double()[:, None].expand(6, 3), "own", True),
    "poisson, places": Case(
        Counts,
        TOKENS,
        classes(5, 3, 4).double(),
        "loss",
        True,
        r"root has shape \(3, 5, 4, 4\), not \(V, 5, 3, 4\)",
    ),
    "margin": Case(Margin, Z, SIGNS, "own", True),
    "scaled": Case(Scaled, Z, PACKED[:, 0], "own", True),
    "correlated": Case(Correlated, Z, PACKED[:, 0], "own", True),
    "heads": Case(Heads, normal(6, 5), torch.stack([Y, Y % 2], 1), "own", True),
    "precisions": Case(Precisions, Z, PACKED, "own", True),
    "masked": Case(Masked, TOKENS, MASK, "own", True),
    "module": Case(Learned, Z, PACKED[:, 0], "own", True),
    "global generator": Case(Global, Z, PACKED[:, 0], "own", True),
    "linear": Case(Linear, Z, torch.zeros_like(Z), "own", True),
    # a root that is not that of the loss
    "no root": Case(
        Rootless,
        Z,
        PACKED[:, 0],
        "loss",
        True,
        "^Rootless has no root: it is taken from the loss itself$",
    ),
    "root of another shape": Case(
        SquareRoot, Z, PACKED[:, 0], "loss", True, r"root has shape \(6, 3, 3\), not \(V, 6, 3\)"
    ),
    "root forgets the mask": Case(
        RootForgetsTheMask,
        TOKENS,
        MASK,
        "loss",
        True,
        r"S Sᵀ of RootF.*root is off ∂²ℓ/∂z² by a rel",
    ),
    # labels that are not those of the loss
    "sample forgets the mask": Case(
        SampleForgetsTheMask,
        TOKENS,
        MASK,
        "own",
        False,
        "at drawn labels is off that at the data's",
    ),
    "hot": Case(
        Hot,
        3 * Z,
        Y,
        "own",
        False,
        r"^labels drawn by Hot\.sample have mean score .* standard errors from 0$",
    ),
    "wide": Case(
        Wide,
        Z,
        PACKED[:, 0],
        "own",
        False,
        r"^labels drawn by Wide\.sample have scores of second moment .* apart$",
    ),
    "no sample": Case(Sampleless, Z, PACKED[:, 0], "own", False, "^Sampleless has no sample$"),
    "knowingly weighted": Case(
        WeightedKnowingly,
        Z,
        Y,
        "own",
        False,
        "^∂²ℓ/∂z² of WeightedKnowingly at drawn labels is off",
    ),
    "slightly weighted": Case(SlightlyWeighted, Z, Y, "own", False, r"by a relative 0\.00"),
    "misshapen": Case(
        Misshapen,
        Z,
        PACKED[:, 0],
        "own",
        False,
        "the loss of Misshapen does not take labels drawn by its sample",
    ),
    "overflowing": Case(
        Overflowing, Z, PACKED[:, 0], "own", False, "not finite at labels drawn by its sample"
    ),
    # neither
    "weighted": Case(
        Weighted,
        Z,
        Y,
        "loss",
        False,
        r"S Sᵀ of Weighted\.root is off ∂²ℓ/∂z² by a relative [0-9.]+: it is taken",
    ),
    "no half": Case(
        NoHalf,
        Z,
        PACKED[:, 0],
        "loss",
        False,
        r"relative 0\.5: .*second moment [34]\.\d* where ∂²ℓ/∂z² has 2, ",
    ),
    "waiting times": Case(
        RatesByExponent, Z, PACKED[:, 1], "loss", False, "at drawn labels is off"
    ),
    "rates": Case(
        Rates,
        Z.exp(),
        Y.double()[:, None].expand(6, 3),
        "loss",
        False,
        "Rates has no root.* at drawn labels is off",
    ),
    "huber": Case(Huber, 2 * Z, PACKED[:, 0], "loss", False, "at drawn labels is off"),
    "hinge": Case(Hinge, Z, SIGNS, "loss", False, "mean score"),
    "ordinal": Case(Ordinal, Z[:, 0], classes(6, of=4), "loss", False, "Ordinal.root is off"),
    # no root at all
    "student": Case(
        StudentT,
        3 * Z,
        PACKED[:, 0],
        "none",
        False,
        r"StudentT is not convex in the outputs \(eigenvalues .* -0\.\d",
    ),
    "focal": Case(
        Focal, 3 * Z, Y, "none", False, r"not convex .* no root: take route=\"func\" or `product`"
    ),
}
each = pytest.mark.parametrize("name", CASES)


def whose(law: Law, likelihood: Likelihood, z: Tensor, y: Tensor) -> str:
    if law.root is None:
        return "none"
    try:
        own = root_of(likelihood, z, y)
    except NotImplementedError:
        return "loss"
    found = law.root(z, y)
    return "own" if found.shape == own.shape and torch.equal(found, own) else "loss"


@each
def test_what_is_found_of_a_likelihood(name: str) -> None:
    case = CASES[name]
    likelihood = case.likelihood()
    law = law_of(likelihood, case.z, case.y)
    assert law.why == "" or "\n" not in law.why
    assert (whose(law, likelihood, case.z, case.y), law.follows) == (
        case.root,
        case.follows,
    ), law.why
    assert law.fisher_and_ggn_differ is not law.follows
    assert re.search(case.why, law.why), law.why


def the_root(law: Law) -> Root:
    assert law.root is not None, law.why
    return law.root


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.root != "none"])
def test_the_root_is_that_of_the_loss(name: str) -> None:
    """S Sᵀ = ∂²ℓ/∂z² by torch.func, whoever gave S: at these outputs, and at others."""
    case = CASES[name]
    likelihood = case.likelihood()
    root = the_root(law_of(likelihood, case.z, case.y))
    for z in (case.z, case.z / 2):
        found = root(z, case.y)
        assert found.shape[1:] == z.shape
        assert not found.requires_grad or isinstance(likelihood, nn.Module)
        assert_near(outer(found).detach(), output_hessian(likelihood, z, case.y).detach(), 1e-12)


def test_class_weights_have_the_closed_form() -> None:
    """Faults, row 10: Σ w_y (diag p − p pᵀ)."""
    p = Z.softmax(1)
    expected = W[Y][:, None, None] * (torch.diag_embed(p) - p[:, :, None] * p[:, None])
    for likelihood in (Weighted(), WeightedKnowingly()):
        assert_near(outer(the_root(law_of(likelihood, Z, Y))(Z, Y)), expected)
    # what was taken before
    assert float((outer(Weighted().root(Z)) - expected).norm() / expected.norm()) > 0.5


def test_the_root_is_symmetric_and_follows_the_labels() -> None:
    """Of one example it is the symmetric root; at other labels it is that of their Hessian."""
    root = the_root(law_of(Weighted(), Z, Y))
    found = root(Z, Y)
    assert_near(found.permute(1, 0, 2), found.permute(1, 2, 0))
    other = (Y + 1) % 3
    assert_near(outer(root(Z, other)), output_hessian(Weighted(), Z, other))
    assert not torch.equal(root(Z, other), found)


def test_masked_places_have_no_curvature() -> None:
    for likelihood in (Masked(), RootForgetsTheMask(), Subclass(-1)):
        found = the_root(law_of(likelihood, TOKENS, MASK))(TOKENS, MASK)
        assert float(found.movedim(2, -1)[:, MASK == -1].abs().max()) < 1e-12


def test_enumerated_labels_of_what_follows() -> None:
    """E[score scoreᵀ] over all labels is S Sᵀ where the law says so, and is not where it says that
    it is not.
    """
    p = Z.softmax(1)

    def enumerated(likelihood: Likelihood) -> Tensor:
        total = torch.zeros(6, 3, 3, dtype=Z.dtype)
        for label in range(3):
            g = grad(lambda z, label=label: likelihood.loss(z, torch.full((6,), label)).sum())(Z)
            total += p[:, label, None, None] * g[:, :, None] * g[:, None]
        return total

    assert_near(enumerated(Subclass()), outer(the_root(law_of(Subclass(), Z, Y))(Z, Y)))
    for likelihood in (WeightedKnowingly(), Weighted(), SlightlyWeighted()):
        law = law_of(likelihood, Z, Y)
        assert float((enumerated(likelihood) - outer(the_root(law)(Z, Y))).abs().max()) > 1e-4
        assert not law.follows


@each
def test_single_precision_finds_the_same(name: str) -> None:
    case = CASES[name]
    if name in ("slightly weighted", "module", "correlated", "ordinal"):
        pytest.skip(
            "holds numbers of double precision, or lies within the tolerance of single precision"
        )
    y = case.y.float() if case.y.is_floating_point() else case.y
    law = law_of(case.likelihood(), case.z.float(), y)
    assert (law.root is None, law.follows) == (case.root == "none", case.follows), law.why
    if law.root is not None:
        found = law.root(case.z.float(), y)
        assert found.dtype == torch.float32
        assert_near(outer(found).double(), output_hessian(case.likelihood(), case.z, case.y), 1e-5)


@pytest.mark.thinned(2)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("scale", [0.01, 1.0, 6.0, 50.0, 1000.0])
@pytest.mark.parametrize("outputs", [2, 8, 30])
def test_no_false_alarm_at_outputs_of_any_size(
    dtype: torch.dtype, scale: float, outputs: int
) -> None:
    """Also where every probability rounds to 0 or 1, and where most labels are too rare to be
    drawn.
    """
    for seed in range(4):
        z = (scale * normal(5, outputs, seed=seed)).to(dtype)
        cases: list[Likelihood] = [
            Subclass(),
            type("Two", (Bernoulli,), {})(),
            type("Real", (Gaussian,), {})(),
            Margin(),
        ]
        if scale <= 1:
            cases.append(Counts())
        for likelihood in cases:
            law = law_of(likelihood, z, sample_of(likelihood, z, generator(seed), classes(5)))
            assert (law.follows, law.why) == (True, ""), type(likelihood).__name__
        weighted = type(
            "Weighted",
            (Categorical,),
            {"loss": lambda self, z, y: (1 + y) * Categorical().loss(z, y)},
        )()
        law = law_of(weighted, z, classes(5, of=outputs, seed=seed))
        assert not law.follows
        # convex, though by rounding its Hessians have eigenvalues below 0
        assert law.root is not None, law.why
        assert bool(law.root(z, classes(5, of=outputs, seed=seed)).isfinite().all())


@pytest.mark.parametrize("factor", [1e-6, 1e6])
@pytest.mark.parametrize(
    "name",
    ["subclass", "weighted", "student", "no half", "wide", "sample forgets the mask", "precisions"],
)
def test_what_is_found_does_not_depend_on_the_unit_of_the_outputs(name: str, factor: float) -> None:
    """ℓ(z / c, y) at c z: Hessians are 1/c² as large."""
    case = CASES[name]
    inner = case.likelihood()

    class Units(Own):
        def loss(self, z: Tensor, y: Tensor) -> Tensor:
            return inner.loss(z / factor, y)

        def sample(self, z: Tensor, generator: torch.Generator, y: Tensor) -> Tensor:  # type: ignore[override]  # takes labels, or not, in its own way
            return sample_of(inner, z / factor, generator, y)

        def root(self, z: Tensor, y: Tensor) -> Tensor:  # type: ignore[override]  # takes labels, or not, in its own way
            return root_of(inner, z / factor, y) / factor

    law = law_of(Units(), factor * case.z, case.y)
    assert (law.root is None, law.follows) == (case.root == "none", case.follows), law.why
    assert ("taken from the loss" in law.why) == (case.root == "loss")


def test_a_root_that_leaves_what_is_convex_is_refused() -> None:
    """Student-t is convex near the targets: there it has a root, and farther off the same root says
    that there is none.
    """
    y = PACKED[:, 0]
    law = law_of(StudentT(), y + 0.1 * Z, y)
    assert law.root is not None
    assert_near(outer(law.root(y + 0.2 * Z, y)), output_hessian(StudentT(), y + 0.2 * Z, y))
    with pytest.raises(CurvlabError, match="StudentT is not convex in the outputs"):
        law.root(y + 5, y)


def test_one_bad_example_among_many_is_seen() -> None:
    """A mask at one example of 1000 that the root, or the labels drawn, forget."""
    z, y = normal(1000, 3, 1), classes(1000, 1)
    y[617] = -1
    assert whose(law_of(Masked(), z, y), Masked(), z, y) == "own"
    assert whose(law_of(RootForgetsTheMask(), z, y), RootForgetsTheMask(), z, y) == "loss"
    assert not law_of(SampleForgetsTheMask(), z, y).follows
    for forgets in (RootForgetsTheMask, SampleForgetsTheMask):  # nothing to forget
        assert law_of(forgets(), z, y.clamp_min(0)).why == ""


@pytest.mark.parametrize(
    "likelihood", [Categorical(), Categorical(-1, 0.1), Bernoulli(), Gaussian()]
)
def test_built_in_likelihoods_are_taken_as_they_are(
    likelihood: Likelihood, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No loss is evaluated; the root is their own, with the labels."""
    monkeypatch.setattr(type(likelihood), "loss", None)
    z, y = (TOKENS, MASK) if isinstance(likelihood, Categorical) else (Z, Z.sigmoid())
    law = law_of(likelihood, z, y)
    assert (law.follows, law.why) == (True, "")
    assert torch.equal(the_root(law)(z, y), likelihood.root(z, y))


def test_a_built_in_that_carries_a_loss_of_its_own_is_looked_at() -> None:
    likelihood = Gaussian()
    likelihood.loss = NoHalf().loss  # type: ignore[method-assign]  # on purpose
    law = law_of(likelihood, Z, PACKED[:, 0])
    assert not law.follows
    assert_near(
        outer(the_root(law)(Z, PACKED[:, 0])), 2 * torch.eye(3, dtype=Z.dtype).expand(6, 3, 3)
    )


@each
def test_no_state_moves(name: str) -> None:
    """Global random numbers, the outputs and labels, gradients; and the answer is the same each
    time, in any mode.
    """
    case = CASES[name]
    likelihood, z, y = case.likelihood(), case.z.clone().requires_grad_(), case.y.clone()
    before = torch.random.get_rng_state()
    law = law_of(likelihood, z, y)
    with torch.no_grad():
        again = law_of(likelihood, z, y)
    with torch.inference_mode():
        third = law_of(likelihood, case.z * 1, case.y * 1)
        root = None if law.root is None else law.root(case.z * 1, case.y * 1)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert (torch.equal(z, case.z), torch.equal(y, case.y), z.grad) == (True, True, None)
    if isinstance(likelihood, nn.Module):
        assert likelihood.log_precision.grad is None
    assert law.why == again.why == third.why
    if law.root is not None:
        assert torch.equal(the_root(law)(z, y), the_root(again)(z, y))
        assert root is not None
        assert torch.equal(the_root(law)(z, y), root)


# ----------------------------------------------------------------------
# what is no likelihood


def loss_of(loss: Callable[[Tensor, Tensor], Any], base: type[Likelihood] = Gaussian) -> Likelihood:
    return type("Mine", (base,), {"loss": lambda self, z, y: loss(z, y)})()


def ce(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(z, y, ignore_index=-1, reduction="none")


GAUSS = PACKED[:, 0]
TOKENWISE = torch.tensor(
    [[0, 1, 2, -1], [1, 2, -1, -1], [0, 0, 1, 2], [1, -1, -1, -1], [2, 2, 0, 1]]
)
REFUSED: dict[str, tuple[Callable[[Tensor, Tensor], Any], Tensor, Tensor, str]] = {
    "mean": (
        lambda z, y: (z - y).square().mean(),
        Z,
        GAUSS,
        r"loss of Mine for 6 examples has shape \(\), not \(6,\): return",
    ),
    "not summed over outputs": (
        lambda z, y: (z - y).square(),
        Z,
        GAUSS,
        r"has shape \(6, 3\), not \(6,\): .*\.flatten\(1\)\.sum\(1\)",
    ),
    "not summed over places": (
        ce,
        TOKENS,
        TOKENWISE,
        r"has shape \(5, 4\), not \(5,\): return one number an example",
    ),
    "a number": (lambda z, y: 0.5, Z, GAUSS, r"has shape float, not \(6,\)"),
    "squeezed": (
        lambda z, y: (z - y).square().sum(1).squeeze(),
        Z,
        GAUSS,
        r"for 1 example has shape \(\), not \(1,\)",
    ),
    "no graph": (
        lambda z, y: (z.detach() - y).square().sum(1),
        Z,
        GAUSS,
        "autograd finds no way from the loss of Mine",
    ),
    "over the tokens of the minibatch": (
        lambda z, y: ce(z, y).sum(1) / (y != -1).sum(),
        TOKENS,
        TOKENWISE,
        "the loss that Mine gives an example depends on the rest of the minibatch, or on chance",
    ),
    "over the examples": (
        lambda z, y: (z - y).square().sum(1) / len(z),
        Z,
        GAUSS,
        "depends on the rest of the minibatch",
    ),
    "contrast": (
        lambda z, y: z.square().sum(1) - (z @ z.T).softmax(1).diagonal().log(),
        Z,
        GAUSS,
        "depends on the rest of the minibatch",
    ),
    "outputs centred": (
        lambda z, y: (z - z.mean(0) - y).square().sum(1),
        Z,
        GAUSS,
        "depends on the rest of the minibatch",
    ),
    "ranked": (
        lambda z, y: z.sum(1) - z.sum(1).sort().values,
        Z,
        GAUSS,
        "depends on the rest of the minibatch",
    ),
    "dropout": (
        lambda z, y: F.dropout(z - y).square().sum(1),
        Z,
        GAUSS,
        "depends on the rest of the minibatch, or on chance",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_losses_that_are_none_of_one_example(name: str) -> None:
    loss, z, y, message = REFUSED[name]
    before = torch.random.get_rng_state()
    with pytest.raises(CurvlabError, match=message) as caught:
        law_of(loss_of(loss, Categorical if y is TOKENWISE else Gaussian), z, y)
    assert "\n" not in str(caught.value)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_division_by_an_examples_own_tokens_is_its_own_business() -> None:
    class PerSequence(Masked):
        """The mean over the example's own tokens: no law over labels, but a loss of one example."""

        def loss(self, z: Tensor, y: Tensor) -> Tensor:
            return super().loss(z, y) / (y != -1).sum(1)

    law = law_of(PerSequence(), TOKENS, TOKENWISE)
    assert "PerSequence.root is off" in law.why
    assert not law.follows  # scores of labels drawn have second moment 1/t², and the Hessian 1/t
    assert_near(
        outer(the_root(law)(TOKENS, TOKENWISE)), output_hessian(PerSequence(), TOKENS, TOKENWISE)
    )


def test_one_example_and_one_output() -> None:
    assert law_of(Subclass(), Z[:1], Y[:1]).why == ""
    assert law_of(Margin(), Z[:1, :1], SIGNS[:1, :1]).why == ""
    assert law_of(Subclass(), Z[:, :1], 0 * Y).why == ""  # one class is certain
    real = type("Real", (Gaussian,), {})()
    law = law_of(real, Z[:, 0], GAUSS[:, 0])  # outputs [N]
    assert (law.why, the_root(law)(Z[:, 0], GAUSS[:, 0]).shape) == ("", (1, 6))


def test_all_of_it_ignored() -> None:
    law = law_of(Masked(), TOKENS, torch.full_like(MASK, -1))
    assert (law.follows, law.why) == (True, "")


def test_a_loss_that_is_not_finite_has_no_root() -> None:
    z = Z.clone()
    z[2, 1] = 0.0
    likelihood = loss_of(lambda z, y: z.abs().pow(0.5).sum(1))
    law = law_of(likelihood, z, GAUSS)
    assert law.root is None
    assert "contains NaN or Inf" in law.why


def test_a_loss_that_has_no_second_derivative() -> None:
    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, z: Tensor) -> Tensor:
            ctx.save_for_backward(z)
            return 0.5 * z.square().sum(1)

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx: Any, v: Tensor) -> Tensor:
            return v[:, None] * ctx.saved_tensors[0]

    def ctc(z: Tensor, y: Tensor) -> Tensor:
        n, steps = len(z), torch.full((len(z),), 3)
        logits = torch.stack([z, -z, 0 * z], 2).movedim(1, 0)
        return F.ctc_loss(
            logits.log_softmax(2),
            torch.ones(n, 1).long(),
            steps,
            torch.ones(n).long(),
            reduction="none",
        )

    for loss in (lambda z, y: Once.apply(z - y), ctc):
        law = law_of(loss_of(loss), Z, GAUSS)
        assert (law.root, law.follows) == (None, False)
        assert (
            law.why
            == "the loss of Mine cannot be differentiated twice: write it in functions of torch"
        )


def test_an_error_of_a_likelihoods_own_is_not_hidden() -> None:
    def broken(self: object, z: Tensor) -> Tensor:
        raise KeyError("a bug")

    with pytest.raises(KeyError, match="a bug"):
        law_of(type("Broken", (Gaussian,), {"root": broken})(), Z, GAUSS)


def test_a_root_too_large_is_said_and_not_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(errors, "_memory", lambda: 1500)
    for likelihood, y in ((Weighted(), Y), (Rootless(), GAUSS)):
        law = law_of(likelihood, Z, y)  # one example's fits, all six do not
        assert law.root is None
        assert "the output Hessian of" in law.why
        assert "take route=" in law.why
    monkeypatch.setattr(errors, "_memory", lambda: 100)
    law = law_of(Scaled(), Z, GAUSS)
    assert (law.root, law.follows) == (None, True)  # labels need no root
    assert "\n" not in law.why
    monkeypatch.undo()
    root = the_root(law_of(Weighted(), Z, Y))
    monkeypatch.setattr(errors, "_memory", lambda: 1500)
    with pytest.raises(
        CurvlabError,
        match=r"the output Hessian of Weighted \(3 outputs in each of 6 examples\) would need",
    ):
        root(Z, Y)


@pytest.mark.parametrize("shape", [(40, 200), (3, 30, 20), (2, 1500)])
def test_many_outputs(shape: tuple[int, ...]) -> None:
    """Roots are looked at in parts, and scores in random directions."""
    z, y = normal(*shape), classes(shape[0], *shape[2:], of=shape[1])
    assert law_of(Subclass(), z, y).why == ""
    hot = law_of(Hot(), 3 * z, y)
    assert not hot.follows
    half = type("Half", (Categorical,), {"root": lambda self, z: Categorical().root(z) / 2})()
    if z[0].numel() < 500:
        assert whose(law_of(half, z, y), half, z, y) == "loss"
    else:
        assert "Half.root is off ∂²ℓ/∂z² by a relative 0.75" in law_of(half, z, y).why


def test_very_many_outputs_are_looked_at_in_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output_law, "_NUMBERS", 64)
    sizes: list[int] = []
    likelihood = loss_of(lambda z, y: (sizes.append(len(z)), Gaussian().loss(z, y))[1])  # type: ignore[func-returns-value]  # for its effect
    law = law_of(likelihood, normal(100, 4), normal(100, 4, seed=1))
    assert (law.follows, law.why) == (True, "")
    assert max(sizes) == 64
    law = law_of(NoHalf(), normal(100, 4), normal(100, 4, seed=1))
    assert "by a relative 0.5" in law.why


@pytest.mark.parametrize("kind", ["fisher", "fisher-mc", "ggn"])
def test_refusals_are_one_line_with_the_figure(kind: str) -> None:
    law = law_of(Focal(), 3 * Z, Y)
    line = refusal(law, kind)
    assert line.startswith(f'kind="{kind}" ')
    assert law.why in line
    assert "\n" not in line


def test_a_refusal_of_an_unknown_kind() -> None:
    with pytest.raises(CurvlabError, match=r"unknown kind 'ef'.*\(known: ggn, fisher, fisher-mc\)"):
        refusal(Law(None, False, "x"), "ef")
