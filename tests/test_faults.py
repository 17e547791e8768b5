"""Reports of this field put to curvlab: the right number, or one line whose remedy works. Models of
the table, and the bodies.

Each model of a table is held against `torch.autograd` alone (`oracle`): the gradient that moves
weights, rows of examples, every matrix by every way, and what the optimizers see while they step.
"""

from __future__ import annotations

import re
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from functools import lru_cache
from typing import Any

import pytest
import torch
from oracle import Case, Net, Reference, apart, names_of, numbers, one_line, tokens, total
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import curvlab as cl
from curvlab.closure import Closure
from curvlab.errors import CurvlabError
from curvlab.likelihoods import Categorical, Gaussian
from curvlab.observation import Observation

pytestmark = pytest.mark.filterwarnings("ignore::curvlab.errors.CurvlabWarning")

KINDS = ("ef", "ggn", "hessian")
WHAT = ("gradient", "rows", *KINDS, "steps")
"""What is asked of every model."""

STEPPERS = ("sgd-m", "kfac", "k-bfgs")
ALL_STEPPERS = (
    *STEPPERS,
    "adam",
    "hf",
    "tnt",
    "shampoo",
    "smw-ng",
    "lbfgs",
    "skqn-l",
    "block-ggn",
    "block-hessian",
)
TOLERANCE = 1e-10


# ------------------------------------------------------------------------------------------------
# the bodies


def refusal(call: Callable[..., object], match: str | None = None) -> str:
    """The one line by which a call refuses."""
    with pytest.raises(CurvlabError, match=match) as caught:
        call()
    one_line(caught.value)
    return str(caught.value)


def right_or_refused(
    call: Callable[..., Tensor],
    wanted: Tensor,
    tolerance: float = TOLERANCE,
    match: str | None = None,
) -> str | None:
    """The right number, or one line; which line."""
    try:
        found = call()
    except CurvlabError as error:
        one_line(error)
        line = str(error)
        if match is not None and not re.search(match, line):
            pytest.fail(f"the line does not say {match}: {line}")
        return line
    assert apart(found, wanted) <= tolerance
    return None


def likelihood(case: Case) -> Categorical | Gaussian:
    return Gaussian() if case.y == "like" else Categorical()


@lru_cache(maxsize=512)
def reference(case: Case) -> Reference:
    return case.reference()


def entries(objective: cl.Objective, r: Reference) -> dict[str, Tensor]:
    """{block: where its numbers stand in the reference's order}; each number in one block."""
    ids = r.named(
        torch.arange(sum(p.numel() for p in r.parameters.values())).double(), objective.model
    )
    found = {b.name: b.gather(ids).flatten().long() for b in objective.blocks}
    assert torch.cat(list(found.values())).sort().values.equal(torch.arange(len(r.gradient)))
    assert list(found) == [str(i) for i in range(1, len(found) + 1)]
    return found


def in_order(objective: cl.Objective, r: Reference, found: dict[str, Tensor]) -> Tensor:
    """{block: …} → one vector in the reference's order."""
    flat = torch.full_like(r.gradient, torch.nan)
    for name, own in entries(objective, r).items():
        flat[own] = found[name].detach().flatten()
    return flat


Asked = Iterator[tuple[str, Callable[[], list[Tensor]], list[Tensor]]]


def asked(o: cl.Objective, x: Tensor, y: Tensor, r: Reference, what: Any) -> Asked:
    """(label, what curvlab says, what is so)."""
    if what == "gradient":
        yield (
            what,
            lambda: [in_order(o, r, o.closure(x, y).observe({"data"}).gradients)],
            [r.gradient],
        )
        return
    if what == "rows":
        yield what, lambda: [r.joined(cl.exact.gradients(o, x, y), o.model, 1)], [r.rows]
        yield "jacobians", lambda: [r.joined(cl.exact.jacobians(o, x), o.model, 2)], [r.jacobian]
        return
    whole = getattr(r, what)
    own = entries(o, r)
    order = torch.cat(list(own.values()))
    blocks, v = [whole[i[:, None], i] for i in own.values()], numbers(len(order), 2, seed=5)

    def each(route: str) -> list[Tensor]:
        return [cl.exact.matrix(o, x, y, what, name, route=route).dense() for name in own]

    def together() -> list[Tensor]:
        found = cl.exact.matrices(o, x, y, what)
        return [found[name].dense() for name in own]

    yield f"matrices {what}", together, blocks
    yield f"func {what}", lambda: each("func"), blocks
    yield (
        f"matrix {what}",
        lambda: [cl.exact.matrix(o, x, y, what, None).dense()],
        [whole[order[:, None], order]],
    )
    yield (
        f"product {what}",
        lambda: [cl.exact.product(o, x, y, what) @ v],
        [whole[order[:, None], order] @ v],
    )
    yield f"diagonal {what}", lambda: [cl.exact.diagonal(o, x, y, what)], [whole.diagonal()[order]]


def lenient(case: Case, label: str) -> bool:
    return any(fnmatch(label, pattern) for pattern in case.lenient)


def verdict(
    case: Case,
    label: str,
    call: Callable[[], list[Tensor]],
    wanted: list[Tensor],
    tolerance: float = TOLERANCE,
) -> str:
    """What is wrong; nothing where nothing is."""
    scale = torch.cat([w.flatten() for w in wanted])
    try:
        found = call()
    except CurvlabError as error:
        line = str(error)
        return "" if "\n" not in line and lenient(case, label) else f"refused: {line}"
    except Exception as error:  # whatever it is, the others are asked too
        return f"raw {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    gap = max(apart(f, w, scale) for f, w in zip(found, wanted, strict=True))
    return "" if gap <= tolerance else f"off by {gap:.2g}"


def wrong_numbers(case: Case, what: str) -> dict[str, str]:
    r, model = reference(case), case.model()
    x, y = case.data()
    for part in ("gradient", "rows", "jacobian") if what == "rows" else ("gradient", what):
        getattr(r, part)  # before the world around it changes
    before = [(name, id(p)) for name, p in model.named_parameters(remove_duplicate=False)]
    with case.around(model):
        try:
            o = cl.Objective(model, likelihood(case))
        except CurvlabError as error:
            return {} if lenient(case, "objective") else {"objective": f"refused: {error}"}
        each = {
            label: verdict(case, label, call, wanted)
            for label, call, wanted in asked(o, x, y, r, what)
        }
        if what == "gradient":
            each["report"] = verdict(case, "report", lambda: reported(o, x, y), [torch.zeros(1)])
    if [
        (name, id(p)) for name, p in model.named_parameters(remove_duplicate=False)
    ] != before or any(not isinstance(p, nn.Parameter) for p in model.parameters()):
        each["model"] = "its parameters are others than before"
    return {label: line for label, line in each.items() if line}


def reported(o: cl.Objective, x: Tensor, y: Tensor) -> list[Tensor]:
    """`check` names every block and a way, and can be read; nothing to compare."""
    report = o.check(x, y)
    assert list(report.ways) == [b.name for b in o.blocks]
    assert set(report.ways.values()) <= {"structured", "general", "unused"}
    assert str(report).splitlines()
    return [torch.zeros(1)]


def wrong_steps(case: Case, algorithms: tuple[str, ...], steps: int = 2) -> dict[str, str]:
    """Whatever an optimizer sees of the gradient is the gradient at the weights of that moment;
    sgd-m moves along it.
    """
    found = {}
    for name in algorithms:
        model = case.model()
        x, y = case.data()
        with case.around(model):

            def now(model: nn.Module = model, x: Tensor = x, y: Tensor = y) -> Reference:
                return Reference(model, x, y, case.loss)

            try:
                o = cl.Objective(model, likelihood(case))
                optimizer = cl.optimizer(name, o, lr=0.01, damping=0.1)
                with listening(o, x, y, now) as seen:
                    before, other = flat(now()), by_torch(case, now())
                    optimizer.step(o.closure(x, y))
                    after = flat(now())
                    for _ in range(steps - 1):
                        optimizer.step(o.closure(x, y))
            except CurvlabError as error:
                if not (lenient(case, name) or lenient(case, "objective")):
                    found[name] = f"refused: {error}"
                continue
            except Exception as error:  # whatever it is, the others are asked too
                found[name] = (
                    f"raw {type(error).__name__}:"
                    f" {str(error).splitlines()[0] if str(error) else ''}"
                )
                continue
            if name == "sgd-m":
                seen.append(apart(after - before, other - before))
            if not seen or not max(seen) <= TOLERANCE:
                found[name] = f"off by {max(seen, default=torch.nan):.2g}"
            elif apart(after, before) == 0:
                found[name] = "does not move"
    return found


def by_torch(case: Case, r: Reference) -> Tensor:
    """The weights after a plain step of torch's along the gradient."""
    other = names_of(case.model())
    for p, g in zip(other.values(), r.split(r.gradient).values(), strict=True):
        p.grad = g
    torch.optim.SGD(list(other.values()), lr=0.01).step()
    return torch.cat([p.detach().flatten() for p in other.values()])


def flat(r: Reference) -> Tensor:
    return torch.cat([p.detach().flatten() for p in r.parameters.values()])


@contextmanager
def listening(
    o: cl.Objective, x: Tensor, y: Tensor, now: Callable[[], Reference]
) -> Iterator[list[float]]:
    """How far each gradient that is observed is from the true one."""
    kind, seen = type(o.closure(x, y)), list[float]()
    true = kind.observe

    def observe(self: Closure, *args: Any, **options: Any) -> Observation:
        observation = true(self, *args, **options)
        if {"gradient", "data"} & set(observation.passes):
            r = now()
            seen.append(apart(in_order(o, r, observation.gradients), r.gradient))
        return observation

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kind, "observe", observe)
        yield seen


def ask(case: Case, what: str, algorithms: tuple[str, ...] = STEPPERS) -> None:
    """One quantity of one model: all that is wrong at once."""
    wrong = wrong_steps(case, algorithms) if what == "steps" else wrong_numbers(case, what)
    assert not wrong, "; ".join(f"{label}: {line}" for label, line in wrong.items())


# ------------------------------------------------------------------------------------------------
# models of the table


def two(width: int = 5) -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, width), nn.Linear(width, 3))


def hooked() -> nn.Module:
    net = two()
    net[0].register_forward_hook(lambda module, args, out: torch.tanh(out))
    return net


def replaced() -> nn.Module:
    net = two()
    net[0].forward = types.MethodType(
        lambda layer, x: F.linear(x, layer.weight / 2, layer.bias), net[0]
    )
    return net


def masked(m: Net, x: Tensor) -> Tensor:
    return torch.func.functional_call(m.net, {"weight": m.net.weight * m.mask}, (x,))


def shared_weight() -> nn.Module:
    net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Linear(4, 3))
    net[2].weight = net[0].weight
    return net


def sequence_first(m: Net, x: Tensor) -> Tensor:
    return m.head(torch.tanh(m.inp(x.transpose(0, 1))).mean(0))


def positions(m: Net, x: Tensor) -> Tensor:
    return m.head(torch.tanh(m.tok(x) + m.pos(torch.arange(x.shape[1]))).mean(1))


def layers(**sizes: tuple[int, int]) -> dict[str, nn.Module]:
    return {name: nn.Linear(*size) for name, size in sizes.items()}


def with_positions() -> nn.Module:
    return Net(positions, tok=nn.Embedding(6, 4), pos=nn.Embedding(8, 4), head=nn.Linear(4, 3))


class Transformer(nn.Module):
    """A layer in either order of batch and places."""

    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.batch_first = batch_first
        self.layer, self.head = (
            nn.TransformerEncoderLayer(4, 2, 3, 0.0, batch_first=batch_first),
            nn.Linear(4, 3),
        )

    def forward(self, x: Tensor) -> Tensor:
        found = self.layer(x) if self.batch_first else self.layer(x.transpose(0, 1)).transpose(0, 1)
        return self.head(found.mean(1))


def lm(m: Net, x: Tensor) -> Tensor:
    return F.linear(torch.tanh(m.lin(m.emb(x))).mean(1), m.emb.weight)


CASES: dict[str, Case] = {
    "plain": Case(two),
    "1 head": Case(
        lambda: Net(lm, emb=nn.Embedding(6, 4), lin=nn.Linear(4, 4)), lambda: tokens(5, 3)
    ),
    "1 decoder": Case(
        lambda: Net(
            lambda m, x: F.linear(torch.tanh(m.enc(x)), m.enc.weight.t()), enc=nn.Linear(4, 3)
        ),
        y="like",
    ),
    "1 norm": Case(
        lambda: Net(lambda m, x: m.b(m.a(x)) * m.a.weight.norm(), **layers(a=(4, 4), b=(4, 3)))
    ),
    "1 cosine": Case(
        lambda: Net(
            lambda m, x: (
                4 * m.cls(F.normalize(torch.tanh(m.a(x)), dim=1)) / m.cls.weight.norm(dim=1)
            ),
            a=nn.Linear(4, 4),
            cls=nn.Linear(4, 3, bias=False),
        )
    ),
    "2 twice": Case(
        lambda: Net(lambda m, x: m.net(x[:, :2]) * m.net(x[:, 2:]), net=nn.Linear(2, 3)), n=6
    ),
    "2 one parameter in two modules": Case(shared_weight),
    "4 hook": Case(hooked),
    "4 replaced forward": Case(replaced),
    "4 masked": Case(
        lambda: Net(masked, net=nn.Linear(4, 3), mask=(torch.rand(3, 4) > 0.5).double())
    ),
    "4 called by forward": Case(
        lambda: Net(lambda m, x: m.b(torch.tanh(m.a.forward(x))), **layers(a=(4, 4), b=(4, 3)))
    ),
    "4 hook and forward": Case(
        lambda: Net(lambda m, x: m.b(m.a(x)) + m.b.forward(x), **layers(a=(4, 4), b=(4, 3)))
    ),
    "4 functional": Case(
        lambda: Net(lambda m, x: F.linear(torch.tanh(x), m.a.weight, m.a.bias), **layers(a=(4, 3)))
    ),
    "5 N = T": Case(lambda: Net(sequence_first, **layers(inp=(3, 4), head=(4, 3))), (4, 3), 4),
    "5 N ≠ T": Case(lambda: Net(sequence_first, **layers(inp=(3, 4), head=(4, 3))), (4, 3), 5),
    "6 N = T": Case(with_positions, lambda: tokens(3, 3)),
    "6 N ≠ T": Case(with_positions, lambda: tokens(5, 3)),
    "6 constant": Case(
        lambda: Net(
            lambda m, x: m.b(torch.tanh(m.a(x) + m.c(m.one))),
            one=torch.ones(1, 2),
            **layers(a=(4, 4), b=(4, 3), c=(2, 4)),
        )
    ),
    "9 pixels": Case(lambda: nn.Conv2d(2, 4, 1), (2, 3, 3), 2, y=lambda: tokens(2, 3, 3, high=4)),
    "9 places last": Case(lambda: nn.Conv1d(2, 3, 1), (2, 4), 2, y=lambda: tokens(2, 4, high=3)),
    "13 checkpoint": Case(
        lambda: Net(
            lambda m, x: m.b(checkpoint(lambda q: torch.tanh(m.a(q)), x, use_reentrant=False)),
            **layers(a=(4, 4), b=(4, 3)),
        ),
        lenient=frozenset(
            {
                "func *",
                "matrix *",
                "product *",
                "diagonal hessian",
                "matrices hessian",
                "hf",
                "block-hessian",
            }
        ),
    ),
    "14 lstm": Case(
        lambda: Net(
            lambda m, x: m.b(m.a(x)[0][:, -1]), a=nn.LSTM(2, 2, batch_first=True), b=nn.Linear(2, 3)
        ),
        (3, 2),
    ),
    "18 attention": Case(lambda: Transformer(True), (3, 4)),
    "18 attention, places first": Case(lambda: Transformer(False), (3, 4)),
    "31 in place": Case(
        lambda: Net(lambda m, x: m.b(m.a(x).add_(x).tanh_()), **layers(a=(4, 4), b=(4, 3))),
        lenient=frozenset({"k-bfgs", "skqn-l"}),
    ),
    "31 flat places": Case(
        lambda: Net(
            lambda m, x: m.b(torch.tanh(m.a(x.reshape(-1, 3))).view(len(x), -1, 4).mean(1)),
            **layers(a=(3, 4), b=(4, 3)),
        ),
        (2, 3),
    ),
}


@pytest.mark.thinned(6)
@pytest.mark.parametrize("what", WHAT)
@pytest.mark.parametrize("name", CASES)
def test_models_of_the_table(name: str, what: str) -> None:
    ask(CASES[name], what, ALL_STEPPERS)


def test_the_reference_itself() -> None:
    """Softmax regression in closed form; nothing of curvlab."""
    r = Case(lambda: nn.Linear(4, 3, bias=False)).reference()
    p = r.model(r.x).softmax(1).detach()
    each = [
        torch.kron(torch.diag(q) - torch.outer(q, q), torch.outer(x, x))
        for q, x in zip(p, r.x, strict=True)
    ]
    rows = [
        torch.outer(q - F.one_hot(y, 3), x).flatten() for q, x, y in zip(p, r.x, r.y, strict=True)
    ]
    assert apart(r.ggn, total(each) / 5) < 1e-14
    assert apart(r.hessian, total(each) / 5) < 1e-14
    assert apart(r.rows, torch.stack(rows)) < 1e-14
    assert apart(r.gradient, r.rows.mean(0)) < 1e-14
