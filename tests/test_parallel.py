"""Several processes share a minibatch: K ranks take the steps of one, to rounding, whatever the
method; what they cannot share every rank does; what cannot be is one line on all of them.

The slow ones are all methods that are promised, on an MLP, a convolutional network and gpt-tiny
with padding, by two and three ranks over 20 steps.
"""

from __future__ import annotations

import itertools
import random
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import by_ranks
from torch import Tensor, nn

import curvlab as cl
from curvlab.algorithms import ALGORITHMS
from curvlab.comparison_settings import ALWAYS
from curvlab.curvature import large
from curvlab.curvature.owners import REFRESHES, owners
from curvlab.errors import CurvlabError
from curvlab.likelihoods import Categorical
from curvlab.nests import plain
from curvlab.parallel import ALONE, Ranks, buckets, ranks_here, shares
from curvlab.probes import PROBES

N = 23
"""Examples of a minibatch: neither 2 nor 3 ranks have as many each."""

PROMISED = (
    "kfac", "ekfac", "k-bfgs", "k-bfgs-l", "tnt", "shampoo", "soap", "kl-shampoo", "muon",
    "smw-ng", "skqn-b2", "sgd-m", "torch:AdamW",
)  # fmt: skip

Batch = tuple[Tensor, Tensor]
Trained = tuple[Tensor, list[float]]


# ------------------------------------------------------------------------------------------------
# problems


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)
    ).double()


def conv() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.Tanh(),
        nn.MaxPool2d(2),
        nn.Conv2d(4, 6, 3),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(24, 3),
    ).double()


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return make()


def numbers(shape: tuple[int, ...], seed: int, size: int = N) -> Batch:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(size, *shape, generator=g, dtype=torch.float64)
    return x, torch.randint(3, (size,), generator=g)


def padded(seed: int, size: int = 7) -> Batch:
    """Sequences of other lengths from example to example, so that ranks count other places."""
    g = torch.Generator().manual_seed(seed)
    x, y = (torch.randint(1, 61, (size, 12), generator=g) for _ in range(2))
    lengths = torch.randint(1, 13, (size,), generator=g)
    there = torch.arange(12) < lengths[:, None]
    return x * there, y.masked_fill(~there, -100)


def objective(kind: str, model: nn.Module | None = None) -> cl.Objective:
    if kind == "gpt-tiny":
        model = cl.models.build("gpt-tiny", seed=0).double()
        tokens = cl.likelihoods.LIKELIHOODS["tokens"]()
        return cl.Objective(model, tokens, seed=3, mask=lambda x: x > 0)
    made = {"mlp": mlp, "conv": conv}
    return cl.Objective(seeded(made[kind]) if model is None else model, Categorical(), seed=3)


def batch_of(kind: str, seed: int) -> Batch:
    if kind == "gpt-tiny":
        return padded(seed)
    return numbers({"mlp": (7,), "conv": (2, 8, 8)}[kind], seed)


def weights(o: cl.Objective) -> Tensor:
    return torch.cat([p.detach().flatten() for p in o.parameters.values()])


def train(
    kind: str, algorithm: str, steps: int, *, rounding: float = 0.0, o: Any = None, **options: Any
) -> Trained:
    """Weights and losses after some steps.

    Args:
        rounding: relative change of the first weights, of random sign.
    """
    o = objective(kind) if o is None else o
    g = torch.Generator().manual_seed(5)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for p in o.parameters.values():
            sign = torch.randint(2, p.shape, generator=g) * 2.0 - 1
            p.mul_(1 + rounding * sign.to(p.dtype))
        optimizer = cl.optimizer(algorithm, o, **options)
        optimizer.warm_start([batch_of(kind, 100 + i) for i in range(2)])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        losses = [float(optimizer.step(o.closure(*batch_of(kind, i)))) for i in range(steps)]
    return weights(o), losses


def apart(found: Tensor, true: Tensor) -> float:
    return float((found - true).norm() / true.norm())


ROUNDS = {"ekfac", "soap", "kl-shampoo", "ssn", "s4qn"}
"""Methods that make something of what is rounding alone in one process too: bases of the null space
of their statistics, conjugate gradients that stop where a residual has a size. They move by so much
where the first weights are rounded otherwise."""


def check(algorithm: str, kind: str, steps: int, found: list[Trained], **options: Any) -> float:
    """Compare ranks with one process, and with each other to the bit; return the distance."""
    true, losses = train(kind, algorithm, steps, **options)
    for own, own_losses in found:
        assert torch.equal(own, found[0][0]), algorithm
        assert own_losses == found[0][1]
    far = apart(found[0][0], true)
    bound = 1e-10
    if algorithm in ROUNDS and far > bound:
        rounded = train(kind, algorithm, steps, rounding=2e-16, **options)[0]
        bound = max(bound, 10 * apart(rounded, true))
    else:
        assert found[0][1] == pytest.approx(losses, rel=1e-9)
    assert far <= bound, (algorithm, kind, far, bound)
    return far


# ------------------------------------------------------------------------------------------------
# sharing out, and what is exchanged


@pytest.mark.parametrize("world", [2, 3, 5])
def test_the_longest_work_goes_first_to_whoever_has_least(world: int) -> None:
    """Never above 4/3 − 1/(3K) of the least time there is, which all ways of sharing show."""
    chance = random.Random(world)
    for _ in range(20):
        costs = {str(i): float(chance.randint(1, 50) ** 3) for i in range(6)}
        found = shares(costs, world)
        assert list(found) == list(costs)

        def longest(ranks: tuple[int, ...], costs: dict[str, float] = costs) -> float:
            loads = [0.0] * world
            for rank, cost in zip(ranks, costs.values(), strict=True):
                loads[rank] += cost
            return max(loads)

        least = min(map(longest, itertools.product(range(world), repeat=len(costs))))
        assert longest(tuple(found.values())) <= (4 / 3 - 1 / (3 * world)) * least * (1 + 1e-12)


def test_work_of_a_textbook() -> None:
    found = shares({"a": 8, "b": 7, "c": 6, "d": 5, "e": 4}, 2)
    assert found == {"a": 0, "b": 1, "c": 1, "d": 0, "e": 0}
    assert shares({}, 3) == {}


def test_parts_cover_the_minibatch_in_order() -> None:
    for world, count in itertools.product(range(1, 9), range(1, 40)):
        parts = [list(range(count))[Ranks(world, r).part(count)] for r in range(world)]
        assert list(itertools.chain(*parts)) == list(range(count))
        assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_buckets_are_of_one_dtype_and_no_larger_than_asked() -> None:
    sizes = [10, 20, 30, 1000, 5, 1]
    tensors = [torch.zeros(n) for n in sizes] + [torch.zeros(3, dtype=torch.float64)]
    assert buckets(tensors, most=4 * 60) == [[0, 1, 2], [3], [4, 5], [6]]


def test_one_process_exchanges_nothing() -> None:
    t = torch.arange(3.0)
    assert ranks_here() is ALONE
    assert not ALONE.several
    assert ALONE.sum([t])[0] is t
    assert ALONE.gathered(t, 3) is t
    assert ALONE.told("x") == ["x"]
    assert ALONE.by_first(lambda: 5) == 5


def test_one_module_knows_collectives() -> None:
    root = Path(cl.__file__).parent
    found = [p.name for p in root.rglob("*.py") if "torch.distributed" in p.read_text("utf-8")]
    assert found == ["parallel.py"]


@contextmanager
def make_believe(monkeypatch: pytest.MonkeyPatch, world: int) -> Iterator[dict[str, int]]:
    """A group of so many ranks without the others, and the bytes of what it exchanges."""
    store = pytest.importorskip("torch.testing._internal.distributed.fake_pg").FakeStore()
    torch.distributed.init_process_group("fake", store=store, rank=0, world_size=world)
    bytes_: dict[str, int] = {}

    def counted(name: str, which: int) -> None:
        true = getattr(torch.distributed, name)

        def call(*args: Any, **named: Any) -> Any:
            t = args[which]
            bytes_[name] = bytes_.get(name, 0) + t.numel() * t.element_size()
            return true(*args, **named)

        monkeypatch.setattr(torch.distributed, name, call)

    try:
        counted("all_reduce", 0)
        yield bytes_
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("world", [4, 256])
def test_bytes_of_a_step(world: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of KFAC: the gradients, A and G of every block, a number of places each, and the loss."""
    with make_believe(monkeypatch, world) as sent:
        o = objective("mlp")
        optimizer = cl.optimizer("kfac", o, refresh_every=1000)
        x, y = numbers((7,), 0, size=2 * world + 1)
        optimizer.step(o.closure(x, y))  # shows the form, of the whole minibatch
        optimizer.step(o.closure(x, y))  # in the first steps statistics are taken up at once
        sent.clear()
        optimizer.step(o.closure(x, y))
    blocks = [b.shape for b in o.blocks]
    factors = sum(o_**2 + i**2 for o_, i in blocks)
    gradient = sum(o_ * i for o_, i in blocks)
    assert sent["all_reduce"] == 8 * (gradient + factors + len(blocks) + 1)
    curvature: Any = optimizer.descent.curvature
    shared = owners(Ranks(world, 0), REFRESHES, curvature.blocks, curvature._partition)
    assert set(shared.values()) == set(range(len(blocks)))


# ------------------------------------------------------------------------------------------------
# two processes


def _cheap() -> dict[str, Any]:
    """All that two ranks do for the tests below; what raises is its line."""
    cases: dict[str, Callable[[], Any]] = {
        f"algorithm {name}": partial(train, "mlp", name, 4) for name in ALGORITHMS
    }
    cases |= {f"case {name}": work for name, work in CASES.items()}
    found: dict[str, Any] = {}
    for name, work in cases.items():
        try:
            found[name] = work()
        except CurvlabError as error:
            found[name] = f"{type(error).__name__}: {error}"
    return found


def wrapped() -> Trained:
    """A model in DistributedDataParallel, every rank with the whole minibatch."""
    model = nn.parallel.DistributedDataParallel(seeded(mlp))
    found = train("mlp", "kfac", 4, o=cl.Objective(model, Categorical(), seed=3))
    assert all(p.grad is None for p in model.parameters())
    return found


def own_parts() -> Trained:
    """Every rank is given its part, one of 9 examples and one of 14."""
    o, rank = objective("mlp"), ranks_here().rank
    optimizer = cl.optimizer("kfac", o)
    losses = []
    for i in range(4):
        x, y = batch_of("mlp", i)
        cut = slice(9) if rank == 0 else slice(9, None)
        losses.append(float(optimizer.step(o.closure(x[cut], y[cut]))))
    return weights(o), losses


def by_products() -> Trained:
    """block-ggn where no block is formed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(large, "_DENSE", 0)
        return train("mlp", "block-ggn", 3)


def in_mode(part: Callable[[], nn.Module]) -> Trained:
    """A layer that lets no look be shared."""
    torch.manual_seed(3)  # of dropout
    model = nn.Sequential(nn.Linear(7, 6), part(), nn.Tanh(), nn.Linear(6, 3)).double()
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.copy_(numbers(tuple(p.shape[1:]), i, len(p))[0])
    o = cl.Objective(model, Categorical(), seed=3)
    found = train("mlp", "kfac", 4, o=o)
    buffers = [b.double().flatten() for b in model.buffers()]
    return torch.cat([found[0], *buffers]), found[1]


def labels() -> list[Tensor]:
    """Labels that ranks draw for their own examples, of every kind of likelihood."""
    found = []
    for likelihood in (Categorical(), cl.likelihoods.Gaussian(), cl.likelihoods.Bernoulli()):
        o = cl.Objective(seeded(mlp), likelihood, seed=3)
        x = numbers((7,), 0)[0]
        y = (
            numbers((7,), 0)[1]
            if isinstance(likelihood, Categorical)
            else torch.zeros(N, 3).double()
        )
        closure = o.closure(x, y)
        closure.observe({"data"})
        z = closure.outputs()[0]
        drawn = closure.labels(z)[0]
        if o.ranks.several:
            own = closure.own
            mine = own.labels(own.outputs()[0])[0]
            drawn = o.ranks.gathered(plain(mine), N)
        found.append(drawn)
    return found


def compared() -> dict[str, Any]:
    """With every probe of `compare`: all of its variables but seconds."""
    o = objective("mlp")
    methods = ["kfac", "tnt", "k-bfgs", "smw-ng", "sgd-m", "block-hessian"]
    batches = [batch_of("mlp", i) for i in range(4)]
    probes = [f"{name}:2" for name, p in PROBES.items() if "compare" in p.where]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run = cl.compare(
            o,
            batches,
            reference="block-fisher",
            algorithms=methods,
            warm=batches[:2],
            probes=[p for p in probes if p.partition(":")[0] not in ALWAYS],
        )
    ds = run.dataset
    return {
        name: ds[name].values
        for name in map(str, ds.data_vars)
        if ds[name].dtype.kind == "f" and "seconds" not in name
    }


def refused_parts() -> None:
    """After a whole minibatch another one on every rank, of inputs in another dtype."""
    o = objective("mlp")
    o.closure(*batch_of("mlp", 0)).observe()
    x, y = batch_of("mlp", 1 + ranks_here().rank)
    o.model.eval()
    o.closure(x, y).observe()


def other_weights() -> None:
    model = seeded(mlp)
    with torch.no_grad():
        next(model.parameters()).add_(ranks_here().rank * 1e-9)
    cl.Objective(model, Categorical()).closure(*batch_of("mlp", 0)).observe()


def a_bad_example() -> None:
    """One label of the second rank is no class; the first look is of the whole, the second not."""
    o = objective("mlp")
    o.closure(*batch_of("mlp", 0)).observe()
    x, y = batch_of("mlp", 1)
    y[-1] = 17
    o.closure(x, y).observe({"data", "model"})


def an_overflow() -> None:
    o = objective("mlp", seeded(lambda: nn.Linear(7, 3).double()))
    x, y = batch_of("mlp", 1)
    o.closure(x, y).observe()
    with torch.no_grad():
        o.model.weight.mul_(1e20)  # type: ignore[operator]  # a tensor
    x[-1] = 1e300
    o.closure(x, y).observe({"data", "model"})


def other_chance() -> None:
    torch.manual_seed(ranks_here().rank)
    model = nn.Sequential(nn.Linear(7, 3), nn.Dropout(0.5)).double()
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(0.1)
    cl.Objective(model, Categorical()).closure(*batch_of("mlp", 0)).observe()


def other_arguments() -> None:
    batches = [batch_of("mlp", 0)]
    cl.train(objective("mlp"), batches, algorithm="sgd-m", lr=0.1 + ranks_here().rank, steps=1)


def trained_in(folder: str, steps: int, resume: bool = False, epochs: int = 5) -> Trained:
    o = objective("mlp")
    batches = [batch_of("mlp", i) for i in range(3)]
    run = cl.train(
        o, batches, algorithm="kfac", epochs=epochs, steps=steps, folder=folder, resume=resume,
        progress=False,
    )  # fmt: skip
    assert (run.path is None) == (ranks_here().rank > 0)
    return weights(o), run.dataset["train_loss"].values.tolist()


def too_few() -> None:
    o = objective("mlp")
    x, y = batch_of("mlp", 0)
    o.closure(x[:1], y[:1]).observe()


CASES: dict[str, Callable[[], Any]] = {
    "wrapped": wrapped,
    "own parts": own_parts,
    "batch norm": partial(in_mode, partial(nn.BatchNorm1d, 6)),
    "dropout": partial(in_mode, partial(nn.Dropout, 0.3)),
    "labels": labels,
    "compared": compared,
    "conv ekfac": partial(train, "conv", "ekfac", 3),
    "gpt kfac": partial(train, "gpt-tiny", "kfac", 2),
    "by products": by_products,
    "soap of outputs": partial(train, "conv", "soap", 6, largest=6, refresh_every=2),
    "refused parts": refused_parts,
    "other weights": other_weights,
    "a bad example": a_bad_example,
    "an overflow": an_overflow,
    "other arguments": other_arguments,
    "other chance": other_chance,
    "too few": too_few,
}


@pytest.fixture(scope="module")
def two() -> list[dict[str, Any]]:
    return by_ranks(2, _cheap)


@pytest.mark.thinned(4)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_two_ranks_take_the_steps_of_one(algorithm: str, two: list[dict[str, Any]]) -> None:
    """The contract: a new entry of the table is proven here, or refused by name."""
    found = [each[f"algorithm {algorithm}"] for each in two]
    if isinstance(found[0], str):
        assert "processes" in found[0]
        assert algorithm in found[0]
        return
    check(algorithm, "mlp", 4, found)


@pytest.mark.parametrize(
    ("case", "kind", "algorithm", "steps"),
    [("conv ekfac", "conv", "ekfac", 3), ("gpt kfac", "gpt-tiny", "kfac", 2)],
)
def test_two_ranks_by_places_and_padding(
    case: str, kind: str, algorithm: str, steps: int, two: list[dict[str, Any]]
) -> None:
    check(algorithm, kind, steps, [each[f"case {case}"] for each in two])


def test_bases_that_two_ranks_turn_in_turns(two: list[dict[str, Any]]) -> None:
    """SOAP without the sides of filters, where a gradient has less than full rank: 1e-10, with no
    allowance for rounding.
    """
    true = train("conv", "soap", 6, largest=6, refresh_every=2)[0]
    found = [each["case soap of outputs"][0] for each in two]
    assert torch.equal(*found)
    assert apart(found[0], true) < 1e-10


def test_blocks_too_large_to_be_formed(two: list[dict[str, Any]]) -> None:
    """Conjugate gradients stop where a residual has a size, ε^¾ (`Solve`): there to 1e-10."""
    true = by_products()[0]
    assert apart(true, train("mlp", "block-ggn", 3)[0]) > 1e-10  # its matrices are averages
    found = [each["case by products"][0] for each in two]
    assert torch.equal(*found)
    assert apart(found[0], true) < 1e-10


def test_a_wrapped_model_is_the_module(two: list[dict[str, Any]]) -> None:
    check("kfac", "mlp", 4, [each["case wrapped"] for each in two])


def test_ranks_that_are_given_their_parts(two: list[dict[str, Any]]) -> None:
    """As a DistributedSampler gives them: the minibatch is all of them together."""
    o = objective("mlp")
    optimizer = cl.optimizer("kfac", o)
    losses = [float(optimizer.step(o.closure(*batch_of("mlp", i)))) for i in range(4)]
    for own, own_losses in (each["case own parts"] for each in two):
        assert apart(own, weights(o)) < 1e-12
        assert own_losses == pytest.approx(losses, rel=1e-12)


@pytest.mark.parametrize("case", ["batch norm", "dropout"])
def test_what_cannot_be_shared_is_as_in_one_process(case: str, two: list[dict[str, Any]]) -> None:
    """To the bit, buffers too: every rank goes through the whole minibatch."""
    true, losses = CASES[case]()
    for own, own_losses in (each[f"case {case}"] for each in two):
        assert apart(own, true) < 1e-12
        assert own_losses == pytest.approx(losses, rel=1e-12)


def test_labels_hang_on_the_place_in_the_whole_minibatch(two: list[dict[str, Any]]) -> None:
    for each in two:
        for mine, true in zip(each["case labels"], labels(), strict=True):
            torch.testing.assert_close(mine, true, rtol=1e-12, atol=1e-12)


def test_a_comparison_logs_what_one_process_logs(two: list[dict[str, Any]]) -> None:
    true = compared()
    for each in two:
        found = each["case compared"]
        assert found.keys() == true.keys()
        for name, values in found.items():
            print(name)  # of the one that differs
            torch.testing.assert_close(
                torch.as_tensor(values),
                torch.as_tensor(true[name]),
                rtol=1e-7,
                atol=1e-9,
                equal_nan=True,
            )


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("refused parts", ("rank 1", "another minibatch", "part")),
        ("other weights", ("rank 1", "other weights", "same seed")),
        ("a bad example", ("17",)),
        ("an overflow", ("Diverged", "loss")),
        ("other arguments", ("rank 1", "other arguments")),
        ("other chance", ("rank 1", "other random numbers", "seed")),
        ("too few", ("2 ranks", "1 example", "fewer ranks")),
    ],
)
def test_bad_input_is_one_line_on_all_ranks(
    case: str, words: tuple[str, ...], two: list[dict[str, Any]]
) -> None:
    first, second = (each[f"case {case}"] for each in two)
    assert isinstance(first, str)
    assert first == second
    assert "\n" not in first
    for word in words:
        assert word in first, first


# ------------------------------------------------------------------------------------------------
# training


def test_a_run_of_ranks_is_one_processes_and_goes_on_by_more_or_fewer(tmp_path: Path) -> None:
    """Rank 0 writes. Begun by two it goes on by one, and by two again: the weights of 12 steps."""
    true = trained_in(str(tmp_path / "one"), 12)
    folder = str(tmp_path / "two")
    begun = by_ranks(2, partial(trained_in, folder, 4))
    assert torch.equal(begun[0][0], begun[1][0])
    assert sorted(p.name for p in (tmp_path / "two").iterdir()) == ["checkpoint.pt", "run.h5"]
    trained_in(folder, 8, resume=True)
    ended = by_ranks(2, partial(trained_in, folder, 12, resume=True))
    for own, losses in ended:
        assert apart(own, true[0]) < 1e-11
        assert losses[-1] == pytest.approx(true[1][-1], rel=1e-10)


# ------------------------------------------------------------------------------------------------
# all of them


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("kind", ["mlp", "conv", "gpt-tiny"])
def test_what_is_promised(world: int, kind: str) -> None:
    """20 steps in double precision, parts of other sizes: 1e-10, or what rounding alone does."""
    found = by_ranks(world, partial(_promised, kind))
    for algorithm in PROMISED:
        far = check(algorithm, kind, 20, [each[algorithm] for each in found])
        print(f"{world} ranks, {kind}, {algorithm}: {far:.1e}")
    if kind == "conv":
        of_outputs = train("conv", "soap", 20, largest=6)[0]
        assert apart(found[0]["soap of outputs"][0], of_outputs) < 1e-10


def _promised(kind: str) -> dict[str, Trained]:
    found = {algorithm: train(kind, algorithm, 20) for algorithm in PROMISED}
    if kind == "conv":  # without the sides of filters, where a gradient has less than full rank
        found["soap of outputs"] = train(kind, "soap", 20, largest=6)
    return found
