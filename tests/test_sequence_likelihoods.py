"""Losses of sequences: classes on either axis, class weights, masks, several heads, and the mean
per token against that of torch.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterable
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from problems import assert_near, normal
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, vmap

import curvlab as cl
from curvlab.closure import Closure
from curvlab.curvature.whole_vector import part
from curvlab.errors import CurvlabError
from curvlab.exact import batches as exact_batches
from curvlab.likelihoods import Bernoulli, Categorical, Gaussian, Heads, Likelihood
from curvlab.output_law import law_of
from curvlab.training.evaluation import evaluate, measure_of

C, TIGHT = 3, 1e-12
WEIGHTS = torch.tensor([0.5, 2.0, 1.25], dtype=torch.float64)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def outer(root: Tensor) -> Tensor:
    s = root.flatten(2)
    return torch.einsum("vnc,vnd->ncd", s, s)


def output_hessian(likelihood: Likelihood, z: Tensor, y: Tensor) -> Tensor:
    found = vmap(hessian(lambda one, label: likelihood.loss(one[None], label[None])[0]))(z, y)
    return found.reshape(len(z), z[0].numel(), -1)


def labels(*shape: int, seed: int = 3, ignored: float = 0.4) -> Tensor:
    """Class numbers, some of them −100."""
    y = torch.randint(C, shape, generator=generator(seed))
    return torch.where(torch.rand(shape, generator=generator(seed + 1)) < ignored, -100, y)


# ----------------------------------------------------------------------------------- the axis of
# the classes, and their weights

PLACES: list[tuple[int, ...]] = [(), (4,), (2, 4)]
OPTIONS: list[dict[str, Any]] = [
    {},
    {"label_smoothing": 0.2},
    {"weight": WEIGHTS},
    {"weight": WEIGHTS.tolist(), "label_smoothing": 0.2, "ignore_index": 7},
    {"weight": [0.0, 1.0, 2.0], "ignore_index": 1},
]
every_option = pytest.mark.parametrize("options", OPTIONS)
everywhere = pytest.mark.parametrize("places", PLACES)


def torchs(z: Tensor, y: Tensor, options: dict[str, Any], reduction: str = "none") -> Tensor:
    """F.cross_entropy, the classes on axis 1."""
    own = {"weight": torch.as_tensor(options["weight"]).to(z)} if "weight" in options else {}
    return F.cross_entropy(z, y, reduction=reduction, **(options | own))


@everywhere
@every_option
def test_losses_are_torchs_on_either_axis(places: tuple[int, ...], options: dict[str, Any]) -> None:
    z = 2 * normal(5, C, *places)
    y = labels(5, *places)
    y = torch.where(y == -100, options.get("ignore_index", -100), y)
    each = torchs(z, y, options).reshape(5, -1).sum(1)
    last = z.movedim(1, -1)
    for axis, outputs in ((1, z), (-1, last), (-1, last.contiguous())):
        likelihood = Categorical(axis=axis, **options)  # type: ignore[arg-type]
        likelihood.check(outputs, y)
        assert_near(likelihood.loss(outputs, y), each)
        root = likelihood.root(outputs, y)
        assert root.shape == (z[0].numel(), *outputs.shape)
        assert_near(outer(root), output_hessian(likelihood, outputs, y))
    inferred = Categorical(**options)
    assert_near(inferred.loss(z, y), each)
    assert_near(inferred.loss(last, y), each)
    assert torch.equal(inferred.root(last, y), inferred.root(z, y).movedim(2, -1))


@everywhere
def test_weighted_probabilities(places: tuple[int, ...]) -> None:
    z, q = normal(5, C, *places), normal(5, C, *places, seed=5).softmax(1)
    each = F.cross_entropy(z, q, WEIGHTS, reduction="none").reshape(5, -1).sum(1)
    for axis in (1, -1):
        outputs, targets = (t if axis == 1 else t.movedim(1, -1) for t in (z, q))
        likelihood = Categorical(weight=WEIGHTS, axis=axis)
        likelihood.check(outputs, targets)
        assert_near(likelihood.loss(outputs, targets), each)
        assert_near(
            outer(likelihood.root(outputs, targets)), output_hessian(likelihood, outputs, targets)
        )
        assert_near(
            likelihood.loss(outputs, targets).sum() / likelihood.count(targets),
            F.cross_entropy(z, q, WEIGHTS),
        )


def test_which_axis_is_read_from_the_shapes() -> None:
    z = normal(5, C, 4)
    assert Categorical().axis_of(z, labels(5, 4)) == 1
    assert Categorical().axis_of(z, labels(5, C)) == -1
    assert Categorical().axis_of(z) == Categorical().axis_of(z, z.softmax(1)) == 1
    assert Categorical(axis=-1).axis_of(z) == -1
    assert Categorical(axis=-1).axis_of(z[:, :, 0], labels(5)) == 1  # of two axes there is one
    square = normal(2, 4, 4)
    with pytest.raises(CurvlabError, match=r"4 classes on axis 1 .*axis=1\) or .*axis=-1\)$"):
        Categorical().loss(square, labels(2, 4))
    for axis in (1, -1):
        Categorical(axis=axis).check(square, labels(2, 4))
    with pytest.raises(CurvlabError, match="the root depends on the targets"):
        Categorical(weight=WEIGHTS).root(z)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"axis": 0}, "axis must be 1, -1 or None, not 0"),
        ({"axis": True}, "axis must be 1, -1 or None, not True"),
        ({"per": "place"}, r"unknown mean per 'place' \(known: sequence, token\)"),
        ({"weight": [1.0, -2.0]}, "weight must be finite numbers of 0 or more, not -2"),
        ({"weight": [math.nan]}, "weight must be finite numbers of 0 or more, not nan"),
        ({"weight": "heavy"}, "weight must be finite numbers of 0 or more, not 'heavy'"),
        ({"weight": 2.0}, r"one number a class, \[C\], not of shape \(\)"),
    ],
)
def test_arguments_of_categorical(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(CurvlabError, match=message) as caught:
        Categorical(**arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.2}, {"ignore_index": 0}])
@pytest.mark.parametrize("axis", [1, -1])
def test_enumerated_labels_give_the_root(options: dict[str, Any], axis: Any) -> None:
    """All 9 labels of 3 classes at 2 places, as `sample` returns them."""
    ignore = int(options.get("ignore_index", -100))
    y = torch.tensor([[0, 1], [ignore, 2], [1, ignore], [ignore, ignore]])
    likelihood = Categorical(axis=axis, **options)
    turned: Callable[[Tensor], Tensor] = lambda t: t if axis == 1 else t.movedim(1, -1)  # noqa: E731
    z = normal(4, C, 2)
    p, total = z.softmax(1), torch.zeros(4, 6, 6, dtype=z.dtype)
    for pair in itertools.product(range(C), repeat=2):
        certain = torch.full_like(z, -1e3)
        for place, label in enumerate(pair):
            certain[:, label, place] = 1e3
        drawn = likelihood.sample(turned(certain), generator(), y)
        g = grad(lambda z, drawn=drawn: likelihood.loss(z, drawn).sum())(turned(z)).flatten(1)
        chance = p[:, pair[0], 0] * p[:, pair[1], 1]
        total += torch.einsum("n,nc,nd->ncd", chance, g, g)
    assert_near(total, outer(likelihood.root(turned(z), y)))


# ----------------------------------------------------------------------------------- the mean per
# token


class Tokens(nn.Module):
    """Every place from the mean up to it: places act on later ones. [N, T, 2] → [N, T, C]."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(2, 4), nn.Linear(4, C)

    def forward(self, x: Tensor) -> Tensor:
        count = torch.arange(1, x.shape[1] + 1, dtype=x.dtype)[:, None]
        return self.last(torch.tanh(self.first(x.cumsum(1) / count)))


class Remembered(Tokens):
    """Likewise by activation checkpointing, which `torch.func` does not see through."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.utils.checkpoint.checkpoint(super().forward, x, use_reentrant=False)


def tokens(kind: type[Tokens] = Tokens) -> Tokens:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return kind().double()


X, Y = normal(6, 5, 2, seed=1), labels(6, 5)
Y[2] = -100  # of one sequence nothing is counted
N, M = len(Y), int((Y != -100).sum())


def objective(per: Any = "token", model: nn.Module | None = None, **options: Any) -> cl.Objective:
    return cl.Objective(model or tokens(), Categorical(per=per, **options), seed=0)


def mean_loss(model: nn.Module, weights: dict[str, Tensor], **options: Any) -> Tensor:
    """Torch's own mean per token."""
    z = functional_call(model, weights, (X,))
    return F.cross_entropy(z.reshape(-1, C), Y.reshape(-1), **options)


def true_derivatives(model: nn.Module, **options: Any) -> tuple[Tensor, Tensor]:
    """(gradient, Hessian) of torch's mean, in the objective's order."""
    layout = cl.Objective(model, Gaussian()).layout
    at = layout.flatten({name: p.detach() for name, p in model.named_parameters()})

    def loss(w: Tensor) -> Tensor:
        return mean_loss(model, layout.unflatten(w), **options)

    return grad(loss)(at), hessian(loss)(at)


def flat(found: dict[str, Tensor]) -> Tensor:
    return torch.cat([g.flatten() for g in found.values()])


WEIGHTED = pytest.mark.parametrize(
    "options", [{}, {"weight": WEIGHTS}, {"weight": WEIGHTS, "label_smoothing": 0.1}]
)


@WEIGHTED
def test_gradient_and_hessian_are_those_of_torchs_mean(options: dict[str, Any]) -> None:
    model = tokens()
    g, H = true_derivatives(model, **options)
    o = objective(model=model, axis=-1, **options)
    closure = o.closure(X, Y)
    loss = closure()
    assert_near(loss.detach(), mean_loss(model, {}, **options).detach(), TIGHT)
    assert_near(
        flat({name: p.grad for name, p in o.parameters.items()}),  # type: ignore[misc]  # there is one
        _by_parameter(o, g),
        TIGHT,
    )
    for needs in ({"gradient"}, {"data"}, {"data", "model", "exact"}):
        seen = o.closure(X, Y).observe(needs)
        assert_near(seen.loss, loss.detach(), TIGHT)
        assert_near(flat(seen.gradients), g, TIGHT)
    assert_near(cl.exact.matrix(o, X, Y, "hessian", None).dense(), H, TIGHT)
    product: Any = cl.exact.product(o, X, Y, "hessian")
    v = normal(len(H), 2, seed=9)
    assert_near(product @ v, H @ v, TIGHT)
    assert_near(product.diag(), H.diagonal(), TIGHT)
    assert_near(cl.exact.diagonal(o, X, Y, "hessian"), H.diagonal(), TIGHT)


def _by_parameter(o: cl.Objective, flat_gradient: Tensor) -> Tensor:
    return flat(o.layout.unflatten(flat_gradient))


POWER = {"hessian": 1, "ggn": 1, "pi": 1, "fisher": 1, "fisher-mc": 1, "ef": 2}
every_kind = pytest.mark.parametrize("kind", POWER)
models = pytest.mark.parametrize("model", [Tokens, Remembered])


@every_kind
@models
@pytest.mark.filterwarnings("ignore::curvlab.errors.CurvlabWarning")
def test_every_matrix_is_that_of_the_sequences_times_the_factor(
    kind: Any, model: type[Tokens]
) -> None:
    """By every route: EF, of squared gradients of the data's labels, by its square."""
    one, all_ = (objective(per, tokens(model)) for per in ("token", "sequence"))
    scale = (N / M) ** POWER[kind]

    def both(of: Callable[[cl.Objective], Tensor]) -> None:
        given = []
        for o in (one, all_):
            o.closures["exact"] = 0  # the same labels drawn
            given.append(of(o))
        assert kind == "pi" or float(given[1].norm()) > 0  # Π is 0 in a last linear layer
        assert_near(given[0], scale * given[1], TIGHT)

    both(lambda o: cl.exact.matrix(o, X, Y, kind, None).dense())
    both(lambda o: cl.exact.matrix(o, X, Y, kind, "2").dense())
    both(lambda o: cl.exact.matrix(o, X, Y, kind, "1", route="func").dense())
    both(lambda o: cl.exact.matrix(o, X, Y, kind, ("1", "2"), route="func").dense())
    both(lambda o: cl.exact.diagonal(o, X, Y, kind))
    both(lambda o: cl.exact.product(o, X, Y, kind) @ torch.ones(27, 1, dtype=X.dtype))


def test_per_sample_gradients_are_of_the_loss_times_the_factor() -> None:
    one, all_ = objective(), objective("sequence")
    ours, theirs = (cl.exact.gradients(o, X, Y) for o in (one, all_))
    for name, rows in ours.items():
        assert_near(rows, N / M * theirs[name], TIGHT)
        assert_near(rows.mean(0), cl.exact.gradients(one, X, Y)[name].mean(0))
    assert_near(
        torch.cat([rows.mean(0).flatten() for rows in ours.values()]),
        _by_parameter(one, true_derivatives(one.model)[0]),
        TIGHT,
    )
    jacobians = cl.exact.jacobians(one, X)
    assert torch.equal(jacobians["last.bias"], cl.exact.jacobians(all_, X)["last.bias"])


@pytest.mark.parametrize("kind", ["hessian", "ggn", "ef", "fisher"])
def test_the_factor_is_that_of_all_minibatches_and_of_no_chunk(
    kind: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    o = objective()
    whole = cl.exact.matrix(o, X, Y, kind, None).dense()
    loader = [(X[:1], Y[:1]), (X[1:3], Y[1:3]), (X[2:3], Y[2:3])[:0] or (X[3:], Y[3:])]
    assert_near(cl.exact.matrix(o, loader, kind=kind, block=None).dense(), whole, TIGHT)
    assert_near(cl.exact.matrix(o, iter([(X, Y)]), kind=kind, block=None).dense(), whole, TIGHT)
    data = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(X, Y), batch_size=2, shuffle=True, generator=generator()
    )
    assert_near(cl.exact.matrix(o, data, kind=kind, block=None).dense(), whole, TIGHT)
    v = torch.ones(len(whole), 1, dtype=X.dtype)
    assert_near(cl.exact.product(o, loader, kind=kind) @ v, whole @ v, TIGHT)
    assert_near(cl.exact.diagonal(o, loader, kind=kind), whole.diagonal(), TIGHT)
    monkeypatch.setattr(exact_batches, "_NUMBERS", 1)  # one example at a time
    last = cl.exact.matrix(o, X, Y, kind, "2").dense()
    assert_near(last, whole[-len(last) :, -len(last) :], TIGHT)
    monkeypatch.setattr(exact_batches, "CHUNK", 2)
    assert_near(cl.exact.diagonal(o, X, Y, kind), whole.diagonal(), TIGHT)
    assert_near(cl.exact.matrix(o, X, Y, kind, None).dense(), whole, TIGHT)


def test_an_iterator_of_several_minibatches_is_refused() -> None:
    given = [(X[:3], Y[:3]), (X[3:], Y[3:])]
    with pytest.raises(CurvlabError, match="an iterator shows their labels but once") as caught:
        cl.exact.matrix(objective(), iter(given), kind="ggn", block=None)
    assert "\n" not in str(caught.value)
    found = cl.exact.matrix(objective("sequence"), iter(given), kind="ggn", block=None)
    assert_near(found.dense(), cl.exact.matrix(objective("sequence"), X, Y, "ggn", None).dense())


def test_no_place_is_counted() -> None:
    nothing = torch.full_like(Y, -100)
    o = objective()
    for call in (
        lambda: o.closure(X, nothing)(),
        lambda: o.closure(X, nothing).observe(),
        lambda: cl.exact.matrix(o, X, nothing, "ggn", None),
        lambda: cl.exact.matrix(o, [(X, nothing), (X, nothing)], kind="ggn", block=None),
        lambda: Categorical(per="token").factor(nothing),
        lambda: Categorical(per="token", weight=[0.0, 0, 0]).factor(Y),
    ):
        with pytest.raises(CurvlabError, match=r"no place of the .* examples is counted"):
            call()
    assert Categorical().factor(nothing) == 1.0
    assert not objective("sequence").closure(X, nothing)().detach()


def test_factors() -> None:
    assert Categorical(per="token").factor(Y) == N / M
    assert Categorical(per="token", ignore_index=7).factor(Y) == 1 / 5
    weighted = Categorical(per="token", weight=WEIGHTS)
    assert weighted.factor(Y) == pytest.approx(N / float(WEIGHTS[Y[Y != -100]].sum()), rel=1e-15)
    assert Categorical(per="token", axis=-1).factor(normal(6, 5, C)) == 1 / 5
    assert Categorical(per="token").factor(normal(6, C)) == 1.0


class OwnFactor(Categorical):
    """A user's: half of everything."""

    def factor(self, y: Tensor) -> float:
        return 0.5


class Plainly:
    """A user's without a factor, and without a base."""

    check, loss = Categorical().check, Categorical().loss
    sample, root = Categorical().sample, Categorical().root


def test_likelihoods_of_ones_own() -> None:
    ours = cl.Objective(tokens(), Plainly())
    assert ours.closure(X, Y).factor == 1
    expected = cl.exact.matrix(objective("sequence"), X, Y, "ggn", None).dense()
    assert_near(cl.exact.matrix(ours, X, Y, "ggn", None).dense(), expected, TIGHT)

    class Half(Plainly):
        def factor(self, y: Tensor) -> float:
            return 0.5

    half = cl.Objective(tokens(), Half())
    assert_near(cl.exact.matrix(half, X, Y, "ggn", None).dense(), expected / 2, TIGHT)
    pair = [(X[:2], Y[:2]), (X[2:], Y[2:])]
    assert_near(cl.exact.matrix(half, pair, kind="ggn", block=None).dense(), expected / 2, TIGHT)


def test_padding_and_order_change_nothing() -> None:
    """More ignored places, sequences in another order."""
    padded = torch.cat([X, normal(6, 3, 2, seed=8)], 1), F.pad(Y, (0, 3), value=-100)
    order = torch.tensor([4, 0, 5, 2, 1, 3])
    for per in ("token", "sequence"):
        o = objective(per)
        for kind in ("hessian", "ggn", "fisher", "ef"):
            whole = cl.exact.matrix(o, X, Y, kind, None).dense()
            assert_near(cl.exact.matrix(o, *padded, kind, None).dense(), whole, TIGHT)
            assert_near(cl.exact.matrix(o, X[order], Y[order], kind, None).dense(), whole, TIGHT)
        assert_near(o.closure(*padded)().detach(), o.closure(X, Y)().detach(), TIGHT)


def test_one_place_is_the_flat_model() -> None:
    model = tokens()
    flatly = nn.Sequential(copy.deepcopy(model.first), nn.Tanh(), copy.deepcopy(model.last))
    x, y = X[:, :1], torch.randint(C, (6, 1), generator=generator())
    for per in ("token", "sequence"):
        one = cl.exact.matrix(objective(per, model), x, y, "hessian", None).dense()
        other = cl.Objective(flatly, Categorical(per=per))
        assert_near(one, cl.exact.matrix(other, x[:, 0], y[:, 0], "hessian", None).dense(), TIGHT)


def test_steps_follow_the_gradient_of_torchs_mean() -> None:
    model = tokens()
    g, _ = true_derivatives(model)
    o = objective(model=model)
    before = o.layout.flatten({name: p.detach().clone() for name, p in o.parameters.items()})
    adam = cl.optimizer("adam", o, lr=0.1)
    adam.step(o.closure(X, Y))
    twin = nn.Parameter(before.clone())
    twin.grad = g
    torch.optim.Adam([twin], lr=0.1, eps=adam.descent.curvature.damping).step()
    after = o.layout.flatten({name: p.detach() for name, p in o.parameters.items()})
    assert_near(after, twin.detach(), 1e-10)


@pytest.mark.parametrize("name", ["kfac", "kflr", "block-ggn", "smw-gn", "hf"])
def test_a_factor_is_a_smaller_damping(name: str) -> None:
    """(f B + λ)⁻¹ f g = (B + λ/f)⁻¹ g, for KFAC's split damping too."""
    found = []
    for per, damping in (("token", 0.3), ("sequence", 0.3 * M / N)):
        o = objective(per)
        optimizer = cl.optimizer(name, o, lr=0.1, damping=damping)
        optimizer.step(o.closure(X, Y))
        found.append(torch.cat([p.detach().flatten() for p in o.parameters.values()]))
    assert_near(found[0], found[1], 1e-10)


def test_a_part_of_a_minibatch_has_the_factor_of_the_whole() -> None:
    o = objective()
    closure = o.closure(X, Y)
    some = part(closure, torch.tensor([0, 3]))
    assert some.factor == closure.factor == N / M
    each = Closure(o, X[:2], Y[:2], 0).factor
    assert each == 2 / int((Y[:2] != -100).sum()) != N / M


def test_evaluation_is_the_mean_over_all_tokens() -> None:
    o = objective()
    truth = float(mean_loss(o.model, {}).detach())
    for size in (1, 4, 10):
        loss, wrong = evaluate(o, (X, Y), error=measure_of(o.likelihood, C), size=size)
        assert loss == pytest.approx(truth, rel=1e-12)
    counted = Y != -100
    off = ((o.model(X).argmax(-1) != Y) & counted).sum(1) / counted.sum(1).clamp_min(1)
    assert wrong == pytest.approx(float(off.double().mean()), rel=1e-6)


# ----------------------------------------------------------------------------------- class weights
# and the law of labels


def test_class_weights_have_a_ggn_and_no_fisher() -> None:
    o = objective("sequence", weight=WEIGHTS)
    _, H = true_derivatives(o.model, weight=WEIGHTS)
    scale = float(WEIGHTS[Y[Y != -100]].sum()) / N
    whole = cl.exact.matrix(o, X, Y, "ggn", None).dense()  # and nothing is warned of
    pi = cl.exact.matrix(o, X, Y, "pi", None).dense()
    assert_near(whole + pi, scale * H, TIGHT)
    assert_near(cl.exact.matrix(o, X, Y, "ggn", None, route="func").dense(), whole, TIGHT)
    for call in (
        lambda: cl.exact.matrix(o, X, Y, kind="fisher"),
        lambda: cl.exact.diagonal(o, X, Y, kind="fisher"),
        lambda: cl.exact.product(o, X, Y, kind="fisher") @ torch.ones(27, 1, dtype=X.dtype),
    ):
        with pytest.raises(CurvlabError, match=r"class weights is no −log of a law") as caught:
            call()
        assert "\n" not in str(caught.value)
    ones = objective("sequence", weight=[1.0, 1, 1])
    plain = cl.exact.matrix(objective("sequence"), X, Y, "fisher", None).dense()
    assert_near(cl.exact.matrix(ones, X, Y, "fisher", None).dense(), plain, TIGHT)


class SubCategorical(Categorical):
    """Not taken as it is, but looked at."""


class SubBernoulli(Bernoulli):
    """Likewise."""


class SubGaussian(Gaussian):
    """Likewise."""


Z4 = normal(40, 4, seed=2)
BITS = (normal(40, 4, seed=3) > 0).double()
HOLES = torch.where(torch.rand(40, 4, generator=generator(4)) < 0.3, math.nan, BITS)


@pytest.mark.parametrize(
    ("built", "y"),
    [
        (lambda C: C(SubCategorical, Categorical, weight=[1.0, 3, 0.2, 1]), labels(40)),
        (lambda C: C(SubCategorical, Categorical), labels(40)),
        (lambda C: C(SubBernoulli, Bernoulli, weight=[1.0, 3, 0.2, 1]), BITS),
        (lambda C: C(SubBernoulli, Bernoulli, pos_weight=2.0), BITS),
        (lambda C: C(SubBernoulli, Bernoulli, weight=[1.0, 0, 0, 1]), BITS),
        (lambda C: C(SubBernoulli, Bernoulli, ignore_value=math.nan), HOLES),
        (lambda C: C(SubGaussian, Gaussian, variance=[0.5, 1, 2, 3]), Z4 + 1),
    ],
)
def test_what_is_said_of_the_law_is_what_a_look_finds(
    built: Callable[..., tuple[Likelihood, Likelihood]], y: Tensor
) -> None:
    looked, known = built(lambda sub, own, **kw: (sub(**kw), own(**kw)))
    seen: Any = law_of(looked, Z4, y)
    said: Any = law_of(known, Z4, y)
    assert (seen.examined, said.examined) == (True, False)
    assert seen.follows == said.follows
    assert "root" not in seen.why
    assert_near(outer(seen.root(Z4, y)), outer(said.root(Z4, y)))


# ----------------------------------------------------------------------------------- Bernoulli and
# Gaussian


@pytest.mark.parametrize("weight", [None, [0.5, 2.0, 0.0], 3.0])
@pytest.mark.parametrize("positive", [None, [4.0, 1.0, 0.5], torch.tensor(2.0)])
@pytest.mark.parametrize("ignored", [None, math.nan, -1.0])
def test_bernoulli_is_torchs(weight: Any, positive: Any, ignored: float | None) -> None:
    z, y = 2 * normal(6, 2, 3), (normal(6, 2, 3, seed=1).sigmoid())
    there = torch.ones_like(y, dtype=torch.bool)
    if ignored is not None:
        there = torch.rand(y.shape, generator=generator()) > 0.4
        y = torch.where(there, y, ignored)
    likelihood = Bernoulli(weight, positive, ignored)
    likelihood.check(z, y)
    known = torch.where(there, y, 0.5)
    own: dict[str, Any] = {
        name: None if value is None else torch.as_tensor(value).to(z)
        for name, value in (("weight", weight), ("pos_weight", positive))
    }
    each = F.binary_cross_entropy_with_logits(z, known, reduction="none", **own) * there
    assert_near(likelihood.loss(z, y), each.flatten(1).sum(1))
    score = grad(lambda z: likelihood.loss(z, y).sum())(z)
    assert not score[~there].any()
    assert bool(score.isfinite().all())
    root = likelihood.root(z, y)
    assert root.shape == (6, *z.shape)
    assert_near(outer(root), output_hessian(likelihood, z, y))
    drawn = likelihood.sample(z, generator(1), y)
    assert torch.equal(drawn[there], torch.bernoulli(z.sigmoid(), generator=generator(1))[there])
    likelihood.check(z, drawn)
    if ignored is not None:
        torch.testing.assert_close(
            drawn[~there], torch.full_like(drawn[~there], ignored), equal_nan=True
        )
        assert_near(outer(root), outer(likelihood.root(z, torch.where(there, y, ignored))))


BAD: dict[str, tuple[Callable[[], object], str]] = {
    "negative": (lambda: Bernoulli(weight=-1.0), "weight must be finite numbers of 0 or more"),
    "not finite": (lambda: Bernoulli(pos_weight=[math.inf]), "pos_weight must be finite numbers"),
    "ignored": (lambda: Bernoulli(ignore_value="no"), "ignore_value must be a number, not 'no'"),  # type: ignore[arg-type]  # wrong on purpose
    "shape": (
        lambda: Bernoulli(weight=[1.0, 2.0]).check(Z4, BITS),
        r"weight of shape \(2,\) does not fit the outputs of one example, of shape \(4,\)",
    ),
    "examples": (
        lambda: Bernoulli(weight=torch.ones(40, 4)).check(Z4, BITS),
        r"weight of shape \(40, 4\) does not fit",
    ),
    "not masked": (lambda: Bernoulli().check(Z4, HOLES), "targets contain NaN or Inf"),
    "outside": (
        lambda: Bernoulli(ignore_value=-1).check(Z4, BITS - 2),
        r"must lie in \[0, 1\]",
    ),
    "no targets": (lambda: Bernoulli(pos_weight=2.0).root(Z4), "depends on the targets"),
    "variance": (lambda: Gaussian(0.0), "variance must be finite numbers above 0, not 0"),
    "variances": (lambda: Gaussian([1.0, math.nan]), "variance must be finite numbers above 0"),
    "variances' shape": (
        lambda: Gaussian([1.0, 2.0]).check(Z4, Z4),
        r"variance of shape \(2,\) does not fit",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_arguments_that_do_not_fit(case: str) -> None:
    call, message = BAD[case]
    with pytest.raises(CurvlabError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_masked_targets_have_no_gradient_and_no_curvature() -> None:
    net = nn.Linear(2, 4).double()
    x = normal(40, 2)
    o = cl.Objective(net, Bernoulli(ignore_value=math.nan))
    there = ~HOLES.isnan()
    g = torch.autograd.grad(
        (F.binary_cross_entropy_with_logits(net(x), BITS, reduction="none") * there).sum() / 40,
        net.weight,
    )[0]
    o.closure(x, HOLES)()
    assert net.weight.grad is not None
    assert_near(net.weight.grad, g, TIGHT)
    whole = cl.exact.matrix(o, x, HOLES, "fisher", None).dense()
    assert_near(cl.exact.matrix(o, x, HOLES, "hessian", None).dense(), whole, TIGHT)
    drawn = cl.exact.matrix(o, x, HOLES, "fisher-mc", None, draws=3000).dense()
    assert float((drawn - whole).norm() / whole.norm()) < 0.05


@pytest.mark.parametrize("variance", [1.0, 0.25, [0.5, 1.0, 4.0], torch.tensor([[2.0], [3.0]])])
def test_gaussian_variance(variance: Any) -> None:
    z, y = normal(6, 2, 3), normal(6, 2, 3, seed=1)
    likelihood, known = Gaussian(variance), torch.as_tensor(variance).to(z).expand(2, 3)
    likelihood.check(z, y)
    normals = torch.distributions.Normal(z, known.sqrt().expand_as(z))
    constant = (2 * math.pi * known).log().sum() / 2
    assert_near(likelihood.loss(z, y), -normals.log_prob(y).flatten(1).sum(1) - constant)
    assert_near(outer(likelihood.root(z, y)), output_hessian(likelihood, z, y))
    assert_near(outer(likelihood.root(z))[0], torch.diag(1 / known.flatten()))
    many = likelihood.sample(z[:1].expand(20_000, 2, 3), generator(3)) - z[:1]
    error = 5 * known * math.sqrt(2 / 20_000)
    assert bool(((many.square().mean(0) - known).abs() <= error).all())


# ----------------------------------------------------------------------------------- heads


def two_heads(z: Tensor) -> dict[str, Tensor]:
    """A model of two heads, written as a function of what lies under them."""
    A, B = normal(4, 6, seed=11), normal(4, 2, seed=12)
    return {"kind": (z @ A).reshape(-1, C, 2), "sign": z @ B}


TWO = Heads({"kind": Categorical(axis=1), "sign": Bernoulli()})
UNDER = normal(5, 4, seed=13)
BOTH = {"kind": labels(5, 2), "sign": (normal(5, 2, seed=14) > 0).double()}


def heads_loss(z: Tensor) -> Tensor:
    outputs = two_heads(z)
    return F.cross_entropy(outputs["kind"], BOTH["kind"], reduction="sum") + (
        F.binary_cross_entropy_with_logits(outputs["sign"], BOTH["sign"], reduction="sum")
    )


def test_heads_are_a_sum() -> None:
    z = TWO.join(two_heads(UNDER))
    assert z.shape == (5, 8)
    TWO.check(z, BOTH)
    for name, found in TWO.split(z).items():
        assert torch.equal(found, two_heads(UNDER)[name])
    assert_near(TWO.loss(z, BOTH).sum(), heads_loss(UNDER), TIGHT)
    ours = grad(lambda z: TWO.loss(TWO.join(two_heads(z)), BOTH).sum())(UNDER)
    assert_near(ours, grad(heads_loss)(UNDER), TIGHT)
    root = TWO.root(z, BOTH)
    total = hessian(lambda z: TWO.loss(z, BOTH).sum())(z)
    expected = torch.stack([total[n, :, n] for n in range(5)])
    assert_near(outer(root), expected)
    assert not expected[:, :6, 6:].any()
    law: Any = law_of(TWO, z, BOTH)
    assert (law.follows, law.why, law.examined) == (True, "", False)
    assert_near(outer(law.root(z, BOTH)), expected)


def test_enumerated_labels_of_heads_give_the_root() -> None:
    """9 labels of two places, some of them ignored, and 4 of two signs."""
    outputs = two_heads(UNDER)
    z = TWO.join(outputs)
    p, q = outputs["kind"].softmax(1), outputs["sign"].sigmoid()
    total = torch.zeros(5, 8, 8, dtype=z.dtype)
    for first, second, *bits in itertools.product(range(C), range(C), (0.0, 1.0), (0.0, 1.0)):
        drawn = {
            "kind": torch.tensor([first, second]).expand(5, 2).masked_fill(BOTH["kind"] < 0, -100),
            "sign": torch.tensor(bits, dtype=z.dtype).expand(5, 2),
        }
        signs = torch.where(drawn["sign"] > 0, q, 1 - q).prod(1)
        g = grad(lambda z, drawn=drawn: TWO.loss(z, drawn).sum())(z)
        chance = p[:, first, 0] * p[:, second, 1] * signs
        total += torch.einsum("n,nc,nd->ncd", chance, g, g)
    assert_near(total, outer(TWO.root(z, BOTH)))


def test_heads_draw_labels_for_each() -> None:
    z = TWO.join(two_heads(UNDER))
    drawn = TWO.sample(z, generator(1), BOTH)
    TWO.check(z, drawn)
    assert torch.equal(drawn["kind"] == -100, BOTH["kind"] == -100)
    again = TWO.sample(z, generator(1), BOTH)
    assert all(torch.equal(drawn[name], again[name]) for name in drawn)


def test_a_head_of_ones_own_is_looked_at() -> None:
    class Doubled(Gaussian):
        def loss(self, z: Tensor, y: Tensor) -> Tensor:
            return 2 * super().loss(z, y)

    heads = Heads({"level": Doubled(), "sign": Bernoulli()})
    z = heads.join({"sign": normal(5, 2), "level": normal(5)})
    y = {"level": normal(5, seed=1), "sign": BOTH["sign"]}
    heads.check(z, y)
    law: Any = law_of(heads, z, y)
    assert not law.follows
    assert "head 'level': S Sᵀ of Doubled.root is off" in law.why
    total = hessian(lambda z: heads.loss(z, y).sum())(z)
    assert_near(outer(law.root(z, y)), torch.stack([total[n, :, n] for n in range(5)]))


def _joined(**change: Tensor) -> Callable[[], object]:
    return lambda: TWO.join(two_heads(UNDER) | change)


def _checked(change: Callable[[dict[str, Tensor]], object]) -> Callable[[], object]:
    return lambda: TWO.check(TWO.join(two_heads(UNDER)), change(BOTH))  # type: ignore[arg-type]  # wrong on purpose


HEADS: dict[str, tuple[Callable[[], object], str]] = {
    "missing": (
        lambda: TWO.join({"kind": UNDER}),
        r"the model's outputs lack the head 'sign' \(given: kind\)",
    ),
    "unknown": (_joined(sing=UNDER), "unknown head 'sing'; did you mean 'sign'"),
    "no tensor": (_joined(sign=2.0), r"output 'sign' must be a tensor \[N, …\], not 2"),  # type: ignore[arg-type]  # wrong on purpose
    "counts": (_joined(sign=UNDER[:2]), "have not as many examples: {'kind': 5, 'sign': 2}"),
    "targets missing": (
        _checked(lambda y: {"kind": y["kind"]}),
        "the targets lack the head 'sign'",
    ),
    "targets unknown": (_checked(lambda y: y | {"more": y["sign"]}), "unknown head 'more'"),
    "targets no mapping": (_checked(lambda y: y["kind"]), r"must be {name: tensor}"),
    "targets wrong": (
        _checked(lambda y: y | {"kind": y["kind"] + 5}),
        "head 'kind': label .* out of range",
    ),
    "not joined": (
        lambda: Heads({"a": Gaussian()}).loss(UNDER, {"a": UNDER}),
        "join the outputs of the heads first",
    ),
    "of another size": (lambda: TWO.loss(UNDER, BOTH), r"must be \[N, 6 \+ 2\], not \[5, 4\]"),
    "none": (lambda: Heads({}), "heads must be {name: likelihood}"),
    "a class": (lambda: Heads({"a": Gaussian}), "head 'a' must be a likelihood"),  # type: ignore[dict-item]  # wrong on purpose
}


@pytest.mark.parametrize("case", HEADS)
def test_heads_that_do_not_fit(case: str) -> None:
    TWO.join(two_heads(UNDER))
    call, message = HEADS[case]
    with pytest.raises(CurvlabError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_streams() -> None:
    """A loader of labels of other lengths: M is over all of them."""
    pairs: Iterable[tuple[Tensor, Tensor]] = [(X, Y), (X[:2, :3], Y[:2, :3])]
    o, plain = objective(axis=-1), objective("sequence", axis=-1)
    total = M + int((Y[:2, :3] != -100).sum())
    found = cl.exact.matrix(o, pairs, kind="ggn", block=None).dense()
    expected = cl.exact.matrix(plain, pairs, kind="ggn", block=None).dense()
    assert_near(found, 8 / total * expected, TIGHT)


class TwoHeaded(nn.Module):
    """Outputs by name over one layer."""

    def __init__(self) -> None:
        super().__init__()
        self.under, self.kind, self.sign = nn.Linear(4, 3), nn.Linear(3, 6), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h = torch.tanh(self.under(x))
        return {"sign": self.sign(h), "kind": self.kind(h).reshape(-1, C, 2)}


@pytest.mark.parametrize("route", ["auto", "func"])
def test_a_model_of_two_heads(route: str) -> None:
    """By the objective, against autograd of the sum of torch's losses."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = TwoHeaded().double()
    o = cl.Objective(model, Heads({"kind": Categorical(axis=1), "sign": Bernoulli()}))
    layout = o.layout

    def loss(w: Tensor) -> Tensor:
        out = functional_call(model, layout.unflatten(w), (UNDER,))
        return (
            F.cross_entropy(out["kind"], BOTH["kind"], reduction="sum")
            + F.binary_cross_entropy_with_logits(out["sign"], BOTH["sign"], reduction="sum")
        ) / 5

    at = layout.flatten({name: p.detach() for name, p in model.named_parameters()})
    found = {
        kind: cl.exact.matrix(o, UNDER, BOTH, kind, None, route=route).dense()
        for kind in ("hessian", "ggn", "pi", "fisher", "ef")
    }
    assert_near(found["hessian"], hessian(loss)(at), TIGHT)
    assert_near(found["ggn"] + found["pi"], found["hessian"], TIGHT)
    assert_near(found["fisher"], found["ggn"], TIGHT)
    assert_near(flat(o.closure(UNDER, BOTH).observe().gradients), grad(loss)(at), TIGHT)
    drawn = cl.exact.matrix(o, UNDER, BOTH, "fisher-mc", None, route=route, draws=400).dense()
    assert float((drawn - found["fisher"]).norm() / found["fisher"].norm()) < 0.2


def test_tokens_are_the_mean_per_token() -> None:
    """`Tokens()` is torch's own cross-entropy."""
    z, y = normal(4, 5, 3), labels(4, 5)
    tokens = cl.likelihoods.LIKELIHOODS["tokens"]()
    loss = tokens.loss(z, y).mean() * cast(Any, tokens).factor(y)
    assert_near(loss, F.cross_entropy(z.flatten(0, 1), y.flatten()))
