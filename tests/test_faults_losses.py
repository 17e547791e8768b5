"""Losses whose Hessian in the outputs depends on the targets, or is not positive, or is not where
the outputs are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracle import Net, Reference, apart, half_squares, numbers, one_line, seeded, tokens
from test_faults import entries, in_order, layers, refusal, right_or_refused
from torch import Tensor, nn
from torch.nn import functional as F

import curvlab as cl
from curvlab.errors import CurvlabError
from curvlab.exact import Kind
from curvlab.likelihoods import Bernoulli, Categorical, Gaussian, Likelihood

pytestmark = pytest.mark.filterwarnings("ignore::curvlab.errors.CurvlabWarning")

Loss = Callable[[Tensor, Tensor], Tensor]

WEIGHTS = torch.tensor([1.0, 5.0, 0.2]).double()


def of(parent: Any, loss: Loss) -> Likelihood:
    """A likelihood of one's own, as users write them: another loss, and all else of its parent."""

    class Own(parent):  # type: ignore[misc]  # whichever it is
        def check(self, z: Tensor, y: Tensor) -> None:
            """Any target."""

        def loss(self, z: Tensor, y: Tensor) -> Tensor:
            return loss(z, y)

    made: Likelihood = Own()
    return made


def summed(each: Tensor) -> Tensor:
    return each.reshape(len(each), -1).sum(1)


def focal(z: Tensor, y: Tensor) -> Tensor:
    nll = F.cross_entropy(z, y, reduction="none")
    return (1 - (-nll).exp()) ** 2 * nll


def student(z: Tensor, y: Tensor) -> Tensor:
    return summed((1 + (z - y).square() / 2).log())


def huber(z: Tensor, y: Tensor) -> Tensor:
    return summed(F.huber_loss(z, y, reduction="none", delta=0.5))


def heteroscedastic(z: Tensor, y: Tensor) -> Tensor:
    """Mean and log-variance are outputs: [N, 2] for a target [N, 2], whose second column says
    nothing.
    """
    return (z[:, 0] - y[:, 0]).square() * (-z[:, 1]).exp() / 2 + z[:, 1] / 2


def missing(z: Tensor, y: Tensor) -> Tensor:
    """Places without a target are below −1."""
    return summed((z - y).square() * (y > -1) / 2)


def weighted_outputs(z: Tensor, y: Tensor) -> Tensor:
    return summed((z - y).square() * y.exp() / 2)


def positives(z: Tensor, y: Tensor) -> Tensor:
    weight = torch.tensor(4.0).double()
    return summed(F.binary_cross_entropy_with_logits(z, y, reduction="none", pos_weight=weight))


def margins(z: Tensor, y: Tensor) -> Tensor:
    """Squared hinge of all classes."""
    sign = 2 * F.one_hot(y, 3).to(z) - 1
    return (1 - sign * z).clamp(min=0).square().sum(1)


def angular(z: Tensor, y: Tensor) -> Tensor:
    return 1 - F.cosine_similarity(z, F.one_hot(y, 3).to(z))


def ordinal(z: Tensor, y: Tensor) -> Tensor:
    return summed(
        F.binary_cross_entropy_with_logits(
            z, (torch.arange(3) < y[:, None]).to(z), reduction="none"
        )
    )


def quantile(z: Tensor, y: Tensor) -> Tensor:
    d = y - z
    return summed(torch.maximum(0.3 * d, -0.7 * d))


def mixture(z: Tensor, y: Tensor) -> Tensor:
    """Two Gaussians whose means and weight are the outputs."""
    logs = F.logsigmoid(torch.stack([z[:, 2], -z[:, 2]], 1)) - (z[:, :2] - y[:, :1]).square() / 2
    return -logs.logsumexp(1)


def sampled_weight(z: Tensor, y: Tensor) -> Tensor:
    """Weights of examples ride in the targets: class + 10 · weight."""
    return F.cross_entropy(z, y % 10, reduction="none") * (y // 10)


def of_the_first(z: Tensor, y: Tensor) -> Tensor:
    """Class 0 weighs 1 and the others 5."""
    return F.cross_entropy(z, y, reduction="none") * torch.where(y == 0, 1.0, 5.0)


def temperature(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(z * 2, y, reduction="none")


def penalised(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(z, y, reduction="none") + z.square().sum(1) / 2 * (y + 1)


def squared_softmax(z: Tensor, y: Tensor) -> Tensor:
    """Brier's score."""
    return (z.softmax(1) - F.one_hot(y, 3)).square().sum(1)


def ignored(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(z, y, reduction="none", ignore_index=0)


def smooth(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(z, y, reduction="none", label_smoothing=0.2)


def soft(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(z, y, reduction="none")


CLASSES = lambda: tokens(6, high=3, seed=2)  # noqa: E731
VALUES = lambda: numbers(6, 3, seed=2)  # noqa: E731

HIDDEN = "weights that the first and the last do not show"

LOSSES: dict[str, tuple[type, Loss, Callable[[], Tensor]]] = {
    "class weights": (
        Categorical,
        lambda z, y: F.cross_entropy(z, y, weight=WEIGHTS, reduction="none"),
        CLASSES,
    ),
    "ignored class": (Categorical, ignored, CLASSES),
    "weights of examples": (
        Categorical,
        sampled_weight,
        lambda: CLASSES() + 10 * torch.tensor([1, 3, 0, 2, 5, 1]),
    ),
    HIDDEN: (Categorical, of_the_first, lambda: torch.tensor([0, 2, 1, 1, 2, 0])),
    "smoothed": (Categorical, smooth, CLASSES),
    "soft": (Categorical, soft, lambda: VALUES().softmax(1)),
    "soft, not normalised": (Categorical, soft, lambda: VALUES().exp()),
    "temperature": (Categorical, temperature, CLASSES),
    "focal": (Categorical, focal, CLASSES),
    "margins": (Categorical, margins, CLASSES),
    "angular": (Categorical, angular, CLASSES),
    "ordinal": (Categorical, ordinal, CLASSES),
    "penalised": (Categorical, penalised, CLASSES),
    "Brier": (Categorical, squared_softmax, CLASSES),
    "Student": (Gaussian, student, VALUES),
    "Huber": (Gaussian, huber, VALUES),
    "heteroscedastic": (Gaussian, heteroscedastic, VALUES),
    "missing values": (
        Gaussian,
        missing,
        lambda: torch.where(VALUES() > 0.3, -5.0, VALUES().clamp(-0.9)),
    ),
    "weights of outputs": (Gaussian, weighted_outputs, VALUES),
    "whole squares": (Gaussian, lambda z, y: 2 * half_squares(z, y), VALUES),
    "quantile": (Gaussian, quantile, VALUES),
    "mixture": (Gaussian, mixture, VALUES),
    "positives": (Bernoulli, positives, lambda: (VALUES() > 0).double()),
}
"""{name: (class whose root and sample it inherits, loss, targets)}"""

SHARP = {"focal", "angular", "Brier", "Student", "heteroscedastic", "mixture", "Huber", "quantile"}
"""Where ∂²ℓ/∂z² has negative eigenvalues, or none: no S with S Sᵀ, so that a line will do for the
kinds that need it.
"""


def problem(name: str, model: str = "one place") -> tuple[cl.Objective, Tensor, Tensor, Reference]:
    parent, loss, targets = LOSSES[name]
    net: nn.Module
    with seeded(2):
        if model == "one place":
            net, x = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3)), numbers(6, 4)
        else:
            net, x = (
                Net(lambda m, x: m.b(torch.tanh(m.a(x)).mean(1)), **layers(a=(3, 4), b=(4, 3))),
                numbers(6, 2, 3),
            )
    y = targets()
    return cl.Objective(net, of(parent, loss)), x, y, Reference(net, x, y, loss)


def agree(name: str, calls: dict[str, Callable[[], Tensor]], wanted: Tensor, allow: bool) -> None:
    """Every way gives the one number; or a line, where the loss has no root, and then never another
    number.
    """
    wrong = {}
    for label, call in calls.items():
        try:
            error = apart(call(), wanted)
        except CurvlabError as refused:
            one_line(refused)
            if not allow:
                wrong[label] = str(refused)
        else:
            if error > 1e-10:
                wrong[label] = f"off by {error:.2g}"
    assert not wrong, "; ".join(f"{label}: {line}" for label, line in wrong.items())


@pytest.mark.thinned(6)
@pytest.mark.parametrize(
    ("kind", "model"),
    [
        ("ggn", "one place"),
        ("ggn", "places"),
        ("hessian", "places"),
        ("pi", "one place"),
        ("ef", "places"),
    ],
)
@pytest.mark.parametrize("name", LOSSES)
def test_one_number_by_every_way(name: str, kind: Kind, model: str) -> None:
    o, x, y, r = problem(name, model)
    whole = getattr(r, kind)
    own = entries(o, r)
    order = torch.cat(list(own.values()))
    inside = whole[order[:, None], order]
    blocks = torch.cat([whole[i[:, None], i].flatten() for i in own.values()])
    v = numbers(len(order), 2, seed=5)

    def each(**options: Any) -> Tensor:
        return torch.cat(
            [cl.exact.matrix(o, x, y, kind, b, **options).dense().flatten() for b in own]
        )

    calls: dict[str, Callable[[], Tensor]] = {
        "whole": lambda: cl.exact.matrix(o, x, y, kind, None).dense()
    }
    # torch: no forward mode of its backward
    allow = (name in SHARP and kind == "ggn") or (name == "Huber" and kind != "ef")
    agree(name, calls, inside, allow)
    agree(name, {"matrix": each, "func": lambda: each(route="func")}, blocks, allow)
    agree(name, {"product": lambda: cl.exact.product(o, x, y, kind) @ v}, inside @ v, allow)
    agree(name, {"diagonal": lambda: cl.exact.diagonal(o, x, y, kind)}, inside.diagonal(), allow)


@pytest.mark.parametrize("name", LOSSES)
def test_gradients(name: str) -> None:
    o, x, y, r = problem(name)
    assert apart(in_order(o, r, o.closure(x, y).observe({"data"}).gradients), r.gradient) < 1e-10
    assert apart(r.joined(cl.exact.gradients(o, x, y), o.model, 1), r.rows) < 1e-10


@pytest.mark.parametrize("algorithm", ["block-ggn", "full-ggn", "smw-gn", "hf", "kflr"])
@pytest.mark.parametrize(
    "name",
    [
        "class weights",
        "ignored class",
        "weights that the first and the last do not show",
        "missing values",
    ],
)
def test_methods_by_the_gauss_newton_matrix(name: str, algorithm: str) -> None:
    """Directions (G + λI)⁻¹ ∇ of the true G; or a line. KFLR's factors, at least, exist."""
    o, x, y, r = problem(name)
    options: dict[str, Any] = {"adapt": False} if algorithm in ("smw-gn", "hf") else {}
    if algorithm == "smw-gn":
        options["curvature_size"] = 6
    try:
        method = cl.approximation(algorithm, o, damping=0.1, **options)
        observed = o.closure(x, y).observe(method.needs | {"data"})
        method.update(observed)
        found = in_order(o, r, method.precondition(observed.gradients))
    except CurvlabError as error:
        one_line(error)
        return
    G, eye = torch.zeros_like(r.ggn), torch.eye(len(r.ggn)).double()
    if algorithm == "block-ggn":
        for i in entries(o, r).values():
            G[i[:, None], i] = r.ggn[i[:, None], i]
    elif algorithm == "kflr":
        return
    else:
        G = r.ggn
    wanted = torch.linalg.solve(G + 0.1 * eye, r.gradient)
    assert (
        apart(found, wanted)
        < {"block-ggn": 1e-10, "smw-gn": 1e-10, "full-ggn": 1e-5, "hf": 0.05}[algorithm]
    )


@pytest.mark.parametrize(
    "name",
    [
        "class weights",
        "weights that the first and the last do not show",
        "smoothed",
        "ignored class",
    ],
)
def test_a_fisher_that_is_not_the_gauss_newton_matrix_is_not_given_for_it(name: str) -> None:
    """Σ_y p(y) ∂ℓ(y) ∂ℓ(y)ᵀ by its definition, with the loss as it is; or a line."""
    o, x, y, r = problem(name)
    p = r.model(x).softmax(1).detach()
    wanted = torch.zeros_like(r.ggn)
    for c in range(3):
        g = Reference(r.model, x, torch.full_like(y, c), r.loss).rows
        wanted += torch.einsum("n,ni,nj->ij", p[:, c], g, g) / len(x)
    own = torch.cat(list(entries(o, r).values()))
    calls = (
        lambda: cl.exact.matrix(o, x, y, "fisher", None).dense(),
        lambda: cl.exact.product(o, x, y, "fisher").dense(),
        lambda: cl.exact.matrix(o, x, y, "fisher", None, route="func").dense(),
    )
    found = [right_or_refused(call, wanted[own[:, None], own]) for call in calls]
    assert len({line is None for line in found}) == 1  # all, or none


# ------------------------------------------------------------------------------------------------
# losses at several places


class TokenLoss(Categorical):
    """Summed over places, some of which are masked."""

    def check(self, z: Tensor, y: Tensor) -> None:
        """Any target."""

    def loss(self, z: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(z.transpose(1, 2), y, reduction="none", ignore_index=-100).sum(1)

    def sample(self, z: Tensor, generator: torch.Generator) -> Tensor:  # type: ignore[override]  # as users write them
        return super().sample(z.flatten(0, 1), generator).view(z.shape[:2])

    def root(self, z: Tensor) -> Tensor:  # type: ignore[override]  # as users write them
        n, t, c = z.shape
        found = z.new_zeros(t * c, n, t, c)
        each = super().root(z.reshape(-1, c)).view(c, n, t, c)
        for i in range(t):
            found[i * c : (i + 1) * c, :, i] = each[:, :, i]
        return found


def masked_tokens() -> tuple[nn.Module, Tensor, Tensor]:
    with seeded(2):
        net = Net(lambda m, x: m.b(torch.tanh(m.a(x)).cumsum(1)), **layers(a=(3, 4), b=(4, 3)))
    y = tokens(4, 3, high=3, seed=2)
    y[0, 1:], y[2] = -100, -100
    return net, numbers(4, 3, 3), y


@pytest.mark.parametrize("kind", ["ggn", "hessian", "ef"])
def test_masked_places_have_no_curvature(kind: Kind) -> None:
    net, x, y = masked_tokens()
    likelihood = TokenLoss()
    o, r = cl.Objective(net, likelihood), Reference(net, x, y, likelihood.loss)
    order = torch.cat(list(entries(o, r).values()))
    wanted, v = getattr(r, kind)[order[:, None], order], numbers(len(r.gradient), seed=5)
    assert apart(cl.exact.matrix(o, x, y, kind, None).dense(), wanted) < 1e-10
    assert apart(cl.exact.matrix(o, x, y, kind, None, route="func").dense(), wanted) < 1e-10
    assert apart(cl.exact.product(o, x, y, kind) @ v, wanted @ v) < 1e-10
    assert apart(cl.exact.diagonal(o, x, y, kind), wanted.diagonal()) < 1e-10


def test_soft_labels_and_smoothing_are_those_of_cross_entropy() -> None:
    """The table's row 12: their Gauss-Newton matrix is that of the hard ones where they sum to
    1.
    """
    net, x, y = (
        nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3)).double(),
        numbers(6, 4),
        VALUES().softmax(1),
    )
    o, r = cl.Objective(net, Categorical()), Reference(net, x, y, soft)
    order = torch.cat(list(entries(o, r).values()))
    for kind in ("ggn", "hessian", "ef"):
        found = cl.exact.matrix(o, x, y, kind, None).dense()
        assert apart(found, getattr(r, kind)[order[:, None], order]) < 1e-10
    assert apart(in_order(o, r, o.closure(x, y).observe({"data"}).gradients), r.gradient) < 1e-10


def test_targets_of_another_shape_come_with_a_remedy_that_works() -> None:
    net, x, y = nn.Linear(4, 3).double(), numbers(6, 4), CLASSES()
    o = cl.Objective(net, Categorical())
    wanted = cl.exact.matrices(o, x, y, "ggn")["1"].dense()
    hot = F.one_hot(y, 3)
    for given, remedy, cured in (
        (hot, "argmax(1)", hot.argmax(1)),
        (y[:, None], "squeeze(-1)", y[:, None].squeeze(-1)),
    ):
        line = refusal(lambda given=given: cl.exact.matrices(o, x, given, "ggn"))
        assert remedy in line
        assert torch.equal(cl.exact.matrices(o, x, cured, "ggn")["1"].dense(), wanted)
    refusal(lambda: cl.exact.matrices(o, x, y > 0, "ggn"), match=r"long|int")
