"""Several processes: what a step of each method sends, against the formula; what the exchange costs
at two ranks; how the work of inverses is shared; and, from these, ResNet-50 and a transformer of a
billion parameters on 8 and 256 GPUs, on paper.

    python analyses/benchmarks/scale.py [--world 256] [--names NAME …] [--record]

Bytes are counted in one process, which is rank 0 of a group of torch's tests (`fake`) that answers
without a network; the first step, which every rank takes alone, is left out. Times are of two
processes of one thread each on loopback, MNIST's autoencoder, batches of 1000.

On paper: bytes of the same formulas, in float32; operations of `flops` below at a share of a GPU's
peak that a table names; a ring sends 2 (K − 1)/K of what is added up over every link. So it is an
estimate of what limits a step, and of no more.
"""

import argparse
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from recorded import record
from torch.testing._internal.distributed.fake_pg import FakeStore

import curvlab as cl
from curvlab import parallel

Table = list[list[str | float | None]]
parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--world", type=int, default=256)
parser.add_argument("--names", nargs="+", help="of methods; all of the formulas by default")
parser.add_argument("--record", action="store_true", help="write results/scale-*.json")


@dataclass(frozen=True)
class Layer:
    """A block [O, I], the bias column counted in I where there is one; T places an example."""

    outputs: int
    inputs: int
    biased: bool = True
    places: int = 1

    @property
    def width(self) -> int:
        """Inputs without the bias column."""
        return self.inputs - self.biased

    @property
    def numel(self) -> int:
        return self.outputs * self.inputs


@dataclass(frozen=True)
class Method:
    """Numbers of a layer that a step adds up over ranks, that whoever owns it sends when it
    refreshes, operations of that, and numbers held; passes in forward and backward ones; T₂ in the
    estimate; numbers added up once a step.
    """

    sums: Callable[[Layer], int]
    sent: Callable[[Layer], int] = lambda block: 0
    work: Callable[[Layer], float] = lambda block: 0.0
    held: Callable[[Layer], int] = lambda block: 0
    passes: float = 1.0
    T2: int = 20
    once: int = 1


def numel(block: Layer) -> int:
    return block.numel


def sides(block: Layer) -> int:
    """O² + I²."""
    return block.outputs**2 + block.inputs**2


def ways(block: Layer) -> int:
    """O² + W² of the weight, O² of the bias, whose ways are apart."""
    return (1 + block.biased) * block.outputs**2 + block.width**2


def cubes(block: Layer) -> float:
    return float(block.outputs**3 + block.inputs**3)


def cubes_of_ways(block: Layer) -> float:
    return float((1 + block.biased) * block.outputs**3 + block.width**3)


def least(block: Layer) -> int:
    return min(block.outputs, block.width)


METHODS = {
    "sgd-m": Method(numel),
    "adam": Method(numel, held=numel),
    # A and G, and how many places G is a mean over; inverses by Cholesky: d³
    "kfac": Method(
        lambda b: b.numel + sides(b) + 1, sides, cubes, lambda b: 2 * sides(b), passes=4 / 3
    ),
    # once more second moments in the eigenbasis; symmetric eigenproblems: 9 d³
    "ekfac": Method(
        lambda b: 2 * b.numel + sides(b) + 1,
        lambda b: 2 * sides(b) + 2 * b.numel,
        lambda b: 9 * cubes(b),
        lambda b: 2 * sides(b) + b.numel,
        passes=4 / 3,
    ),
    # means of a, h, g in both looks; nothing is inverted after the first step
    "k-bfgs": Method(
        lambda b: b.numel + 4 * b.outputs + 2 * b.inputs + 1, held=sides, passes=2.0, once=2
    ),
    "tnt": Method(lambda b: 2 * b.numel, ways, cubes_of_ways, lambda b: 2 * ways(b), passes=5 / 3),
    "shampoo": Method(numel, ways, lambda b: 9 * cubes_of_ways(b), lambda b: 2 * ways(b)),
    # one product of the whole iteration for each step; the factor, I on the larger side, the bias
    "muon": Method(
        numel,
        lambda b: least(b) ** 2 + max(b.outputs, b.width) + b.outputs * b.biased,
        lambda b: float(least(b) ** 2 * max(b.outputs, b.width)),
        T2=1,
    ),
}


def layers_of(objective: cl.Objective) -> list[Layer]:
    return [Layer(b.shape[0], b.shape[1], b.biased) for b in objective.blocks]


def autoencoder() -> cl.Objective:
    return cl.Objective(cl.models.build("mnist-ae", seed=0), cl.likelihoods.Bernoulli())


# ---- bytes


class Count:
    """Bytes that go through the collectives of `curvlab.parallel`, by collective."""

    def __init__(self) -> None:
        self.bytes = {"sums": 0, "gathered": 0, "sent": 0}

    def __enter__(self) -> "Count":
        self._held = {n: getattr(dist, n) for n in ("all_reduce", "all_gather", "broadcast")}
        kinds = {"all_reduce": "sums", "all_gather": "gathered", "broadcast": "sent"}
        for name, kind in kinds.items():
            setattr(dist, name, self._counting(self._held[name], kind))
        return self

    def _counting(self, collective: Callable[..., Any], kind: str) -> Callable[..., Any]:
        def counted(what: Any, *args: Any, **options: Any) -> Any:
            tensors = what if isinstance(what, list) else [what]
            self.bytes[kind] += sum(t.numel() * t.element_size() for t in tensors)
            return collective(what, *args, **options)

        return counted

    def __exit__(self, *raised: object) -> None:
        for name, collective in self._held.items():
            setattr(dist, name, collective)


def count(names: Iterable[str], world: int) -> Table:
    """Megabytes of a step that refreshes, counted and by the formula, which must be equal: of sums
    of the whole, of what is sent rank 0's part.
    """
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
    x = torch.rand(max(world, 256), 784, generator=torch.Generator().manual_seed(0))
    rows: Table = []
    print(f"\na step that refreshes, {world} ranks: MB counted (by the formula)")
    print(f"  {'method':<10}{'added up':>22}{'sent by rank 0':>22}{'by all':>9}{'gathered':>10}")
    for name in names:
        method, objective = METHODS[name], autoencoder()
        layers = layers_of(objective)
        optimizer = cl.optimizer(name, objective, lr=1e-7, refresh_every=1)
        for _ in range(2):
            with Count() as found:
                optimizer.step(objective.closure(x, x))
        told = 4 * (sum(map(method.sums, layers)) + method.once)
        costs = {str(i): method.work(b) for i, b in enumerate(layers) if method.work(b)}
        owner = parallel.shares(costs, world)
        own = 4 * sum(method.sent(b) for i, b in enumerate(layers) if owner.get(str(i)) == 0)
        every = 4 * sum(method.sent(b) for b in layers)
        mega = [b / 1e6 for b in (found.bytes["sums"], told, found.bytes["sent"], own, every)]
        gathered = found.bytes["gathered"] / 1e6
        print(
            f"  {name:<10}{mega[0]:>12.3f} ({mega[1]:.3f}){mega[2]:>12.3f} ({mega[3]:.3f})"
            f"{mega[4]:>9.1f}{gathered:>10.3f}",
            flush=True,
        )
        if found.bytes["sums"] != told or found.bytes["sent"] != own:
            print(f"    {name}: the count is not the formula's")
        rows.append([name, *(round(m, 3) for m in mega), round(gathered, 3)])
    dist.destroy_process_group()
    return rows


# ---- times


def timed(rank: int, world: int, names: list[str], port: int, into: Any) -> None:
    """Milliseconds of a step on one rank, and of what it waits in exchanges, into a queue."""
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    if world > 1:
        dist.init_process_group("gloo", rank=rank, world_size=world)
    x = torch.rand(4, 1000, 784, generator=torch.Generator().manual_seed(0))
    waited = 0.0
    exchange = parallel._exchange

    def clocked(work: Callable[[], object]) -> None:
        nonlocal waited
        start = time.perf_counter()
        exchange(work)
        waited += time.perf_counter() - start

    parallel._exchange = clocked
    for name in names:
        objective = autoencoder()
        inverts = METHODS[name].T2 > 1 and METHODS[name].work(Layer(2, 2)) > 0
        period, options = (10, {"refresh_every": 10}) if inverts else (4, {})
        optimizer = cl.optimizer(name, objective, lr=1e-7, **options)
        for i in range(period + 2):  # in the first T₂ steps every step refreshes
            optimizer.step(objective.closure(x[i % 4], x[i % 4]))
        waited, start = 0.0, time.perf_counter()
        for i in range(period):
            optimizer.step(objective.closure(x[i % 4], x[i % 4]))
        seconds = time.perf_counter() - start
        if rank == 0:
            into.put((name, 1e3 * seconds / period, 1e3 * waited / period))
    if world > 1:
        dist.destroy_process_group()


def measure(names: list[str], port: int = 29533) -> Table:
    """A step at one rank and at two."""
    found: dict[int, dict[str, tuple[float, float]]] = {}
    for world in (1, 2):
        into: Any = mp.get_context("spawn").SimpleQueue()
        mp.spawn(  # type: ignore[attr-defined]  # torch leaves it out of __all__
            timed, (world, names, port, into), nprocs=world
        )
        found[world] = {}
        while not into.empty():
            name, step, waited = into.get()
            found[world][name] = step, waited
    rows: Table = []
    print(
        "\na step, ms: one rank, two ranks, of that in exchanges (waiting for the other included)"
    )
    for name in names:
        (one, _), (two, waited) = found[1][name], found[2][name]
        print(f"  {name:<10}{one:>9.1f}{two:>9.1f}{waited:>9.1f}{waited / two:>8.0%}", flush=True)
        rows.append([name, *(round(v, 1) for v in (one, two, waited)), round(one / two, 2)])
    return rows


# ---- how work is shared


def share(names: Iterable[str]) -> Table:
    """The busiest rank's part of the work of refreshes, beside an equal part."""
    rows: Table = []
    print("\nwork of a refresh on the busiest rank, in parts of the whole (an equal part)")
    for label, layers in PROBLEMS.items():
        for world in (2, 8, 256):
            costs = {str(i): cubes(narrow(b)) for i, b in enumerate(layers)}
            loads = [0.0] * world
            for name, rank in parallel.shares(costs, world).items():
                loads[rank] += costs[name]
            part = max(loads) / sum(loads)
            rows.append([label, world, round(part, 4), round(1 / world, 4)])
            print(f"  {label:<22}{world:>4} ranks{part:>9.4f} ({1 / world:.4f})")
    return rows


# ---- on paper


def resnet50() -> list[Layer]:
    """He et al. 2016, Table 1; batch normalisation left out, which is 0.2 % of the parameters."""
    found = [Layer(64, 147, False, 112 * 112)]
    before = 64
    for width, count, size in ((64, 3, 56), (128, 4, 28), (256, 6, 14), (512, 3, 7)):
        for k in range(count):
            found += [
                Layer(width, before, False, size**2),
                Layer(width, 9 * width, False, size**2),
                Layer(4 * width, width, False, size**2),
            ]
            if k == 0:
                found.append(Layer(4 * width, before, False, size**2))
            before = 4 * width
    return [*found, Layer(1000, 2049)]


def transformer() -> list[Layer]:
    """A decoder of 18 layers, width 2048, gated of 5632, 2048 places, 32,000 symbols, tied head."""
    layer = [(3 * 2048, 2048), (2048, 2048), (5632, 2048), (5632, 2048), (2048, 5632)]
    each = [Layer(o, i, False, 2048) for o, i in layer]
    return [*(18 * each), Layer(32000, 2048, False, 2048)]


PROBLEMS = {
    "MNIST autoencoder": [
        Layer(o, i + 1)
        for i, o in zip(
            (784, 1000, 500, 250, 30, 250, 500, 1000),
            (1000, 500, 250, 30, 250, 500, 1000, 784),
            strict=True,
        )
    ],
    "ResNet-50": resnet50(),
    "transformer, 1e9": transformer(),
}
EXAMPLES = {"ResNet-50": 64, "transformer, 1e9": 2}
"""Examples of a rank; of 2048 places of the transformer."""
FLOPS, CUBIC, NVLINK, NETWORK = 4e14, 2e13, 3e11, 4e10
"""Assumed of a GPU of 2023: operations a second in products (bfloat16, 40 % of the peak) and in
factorisations (float32); bytes a second to others of a machine of 8, and of other machines."""
WIDE = 16384
"""No method inverts a side that is wider: it goes by a diagonal (an embedding's)."""


def narrow(block: Layer) -> Layer:
    """The layer with sides of one number for those that are too wide to have a factor."""
    outputs, inputs = (d if d <= WIDE else 1 for d in (block.outputs, block.inputs))
    return Layer(outputs, inputs, block.biased, block.places)


def paper(names: Iterable[str]) -> Table:
    """Memory of a rank, bytes and milliseconds of a step, and what limits it."""
    rows: Table = []
    print("\non paper: GB that a method holds beside weights and gradient, MB a step, ms a step")
    for label, examples in EXAMPLES.items():
        layers = PROBLEMS[label]
        forward = 2.0 * examples * sum(b.numel * b.places for b in layers)
        for world in (8, 256):
            speed = NVLINK if world <= 8 else NETWORK
            for name in names:
                method = METHODS[name]
                each = [narrow(b) for b in layers]
                over = [b.numel - n.numel for b, n in zip(layers, each, strict=True)]
                held = 4 * (sum(map(method.held, each)) + sum(b.numel for b in layers))  # momentum
                sums = 4 * (sum(map(method.sums, each)) + sum(over))
                sent = 4 * sum(map(method.sent, each)) / method.T2
                costs = {str(i): method.work(b) for i, b in enumerate(each)}
                loads = [0.0] * world
                for block, rank in parallel.shares(costs, world).items():
                    loads[rank] += costs[block]
                times = {
                    "passes": 3 * forward * method.passes / FLOPS,
                    "statistics": moments(name, layers, examples) / FLOPS,
                    "refresh": max(loads) / method.T2 / CUBIC,
                    "exchange": (2 * (world - 1) / world * sums + sent) / speed,
                }
                limit = max(times, key=lambda what: times[what])
                total = 1e3 * sum(times.values())
                numbers = [round(held / 1e9, 2), round((sums + sent) / 1e6), round(total, 1)]
                parts = [round(1e3 * t, 1) for t in times.values()]
                rows.append([label, world, name, *numbers, *parts, limit])
                print(
                    f"  {label:<18}{world:>4}  {name:<9}"
                    + "".join(f"{n:>9}" for n in (*numbers, *parts))
                    + f"  {limit}",
                    flush=True,
                )
    return rows


def moments(name: str, layers: Iterable[Layer], examples: int) -> float:
    """Operations of A and G, of those sides that have a factor; symmetric ones by half."""
    if name not in ("kfac", "ekfac"):
        return 0.0
    return sum(float(sides(narrow(b)) * b.places * examples) for b in layers)


def main() -> None:
    options = parser.parse_args()
    names = options.names or list(METHODS)
    torch.set_num_threads(1)
    counted = count(names, options.world)
    measured = measure([n for n in names if n in ("sgd-m", "kfac", "k-bfgs", "tnt")])
    shared = share(names)
    estimated = paper(names)
    if not options.record:
        return
    what = f"A step that refreshes, {options.world} ranks, MNIST's autoencoder, MB in float32"
    columns = ["method", "added up", "formula", "sent by rank 0", "formula", "by all", "gathered"]
    record("scale-bytes", what, columns, counted, heads=1)
    what = "A step on MNIST's autoencoder, batches of 1000, ms, one thread a rank, loopback"
    columns = ["method", "one rank", "two ranks", "of that in exchanges", "ratio"]
    record("scale-times", what, columns, measured, heads=1)
    what = "Work of inverses on the busiest rank, in parts of the whole"
    record("scale-shares", what, ["problem", "ranks", "busiest", "equal part"], shared, heads=2)
    what = (
        f"On paper: {FLOPS:.0e} operations a second in products, {CUBIC:.0e} in factorisations,"
        f" {NVLINK:.0e} bytes a second within 8 GPUs, {NETWORK:.0e} beyond; T₂ = 20, of Muon 1"
    )
    columns = ["problem", "GPUs", "method", "GB held", "MB a step", "ms a step"]
    columns += ["passes", "statistics", "refresh", "exchange", "limit"]
    record("scale-paper", what, columns, estimated, heads=3)


if __name__ == "__main__":
    main()
