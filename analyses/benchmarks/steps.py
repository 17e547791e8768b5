"""What a step costs: every method over plain forward and backward, beside the floating-point floor
and peers, in one run.

    python analyses/benchmarks/steps.py [--problems autoencoder vgg gpt-small] [--names NAME …]
    [--batch-size 1000] [--threads 1]

CPU seconds of one thread, so that other work on the machine matters little; with --threads wall
seconds, for a quiet machine. Forward and backward are timed again before and after each method,
which is divided by their mean. A step with a refresh every T₂ is the mean over T₂ steps in a row,
after the first T₂ (in which every step refreshes). The floor counts products of matrices alone,
symmetric ones by half, over the matrix-product peak of this run. Memory is what a curvature holds
between steps, beside the numbers that the documents' tables (2.1, 3.1, 4.1) give it.

Peers: torch's Adam, AdamW and Muon (with AdamW for what is no hidden matrix), a straightforward
KFAC of forty lines (below), and, where it is installed, pytorch_optimizer's Shampoo, SOAP and Muon;
what is said of them last are turns that they take with ours:
    pip install --no-deps pytorch_optimizer
On gpt-small batches are of 12 windows, and no floor is counted.
"""

import argparse
import itertools
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from recorded import record
from torch import Tensor, nn

import curvlab as cl
from curvlab.system.memory import keep_freed_memory, tensors


@dataclass(frozen=True)
class Method:
    """Name, options, and the ratio that the project has set itself on the autoencoder at batches of
    1000.
    """

    name: str
    options: dict[str, Any]
    goal: float | None = None

    @property
    def label(self) -> str:
        short = {"refresh_every": " T₂=", "update_every": " T="}
        return self.name + "".join(f"{short.get(k, ' ')}{v}" for k, v in self.options.items())

    @property
    def period(self) -> int:
        return self.options.get("refresh_every", self.options.get("update_every", 1))


METHODS = [
    Method("sgd-m", {}),
    Method("adam", {}, 1.1),
    Method("k-bfgs", {}, 2.5),
    Method("k-bfgs", {"update_every": 20}, 1.7),
    Method("k-bfgs-l", {}, 2.4),
    Method("k-bfgs-20", {}),
    Method("kfac", {"refresh_every": 20}, 2.8),
    Method("tnt", {"refresh_every": 20}, 3.0),
    Method("shampoo", {"refresh_every": 20}, 2.4),
    Method("skqn-b2", {"refresh_every": 20}),
    Method("ekfac", {"refresh_every": 20}),
    Method("foof", {"refresh_every": 20}),
    Method("adamw", {}),
    Method("sophia-g", {}),
    Method("asgo", {}),
    Method("muon", {}),
    Method("muon", {"polar": "bfloat16"}),
    Method("soap", {"refresh_every": 10}),
    Method("kl-shampoo", {"refresh_every": 10}),
]
PAIRS = 100
LONG = 10.0  # seconds, of a turn

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument(
    "--problems",
    nargs="+",
    choices=("autoencoder", "vgg", "gpt-small"),
    default=["autoencoder", "vgg", "gpt-small"],
)
parser.add_argument(
    "--names", nargs="+", default=[m.name for m in METHODS], help="of methods; peers always run"
)
parser.add_argument(
    "--batch-size",
    type=int,
    default=1000,
    help="of the autoencoder; a twentieth of it for the convolutions",
)
parser.add_argument("--threads", type=int, default=1)
parser.add_argument("--record", action="store_true", help="write results/{steps,peers}.json")
options = parser.parse_args()
torch.set_num_threads(options.threads)
clock = time.process_time if options.threads == 1 else time.perf_counter


def autoencoder() -> tuple[cl.Objective, list[tuple[Tensor, Tensor]]]:
    model = cl.models.build("mnist-ae", seed=0)
    x = torch.rand(4, options.batch_size, 784, generator=torch.Generator().manual_seed(0)).pow(4)
    return cl.Objective(model, cl.likelihoods.Bernoulli()), [(b, b) for b in x]


def vgg() -> tuple[cl.Objective, list[tuple[Tensor, Tensor]]]:
    """Layers like VGG's at an eighth of its width and a size that fits a CPU."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for channels in ((3, 32), (32, 32), (), (32, 64), (64, 64), (), (64, 128), (128, 128), ()):
        layers += [nn.Conv2d(*channels, 3, padding=1), nn.ReLU()] if channels else [nn.MaxPool2d(2)]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(2048, 10))
    size = max(2, options.batch_size // 20)
    generator = torch.Generator().manual_seed(0)
    x, y = (
        torch.randn(4, size, 3, 32, 32, generator=generator),
        torch.randint(10, (4, size), generator=generator),
    )
    return cl.Objective(model, cl.likelihoods.Categorical()), list(zip(x, y, strict=True))


def gpt() -> tuple[cl.Objective, list[tuple[Tensor, Tensor]]]:
    """nanoGPT's CPU setting."""
    train, _ = cl.datasets.load("shakespeare")
    batches = list(itertools.islice(train.batches(12, seed=0), 4))
    model = cl.models.build("gpt-small", seed=0)
    return cl.Objective(model, cl.likelihoods.Tokens()), batches


PROBLEMS = {"autoencoder": autoencoder, "vgg": vgg, "gpt-small": gpt}


def forward_and_backward(objective: cl.Objective, x: Tensor, y: Tensor) -> None:
    """As a plain loop goes, without curvlab."""
    objective.model.zero_grad()
    loss: Tensor = objective.likelihood.loss(objective.model(x), y).mean()
    loss.backward()


def timed(step: Callable[..., object], period: int = 1) -> float:
    """Mean seconds of `period` steps in a row, or the median of five where the period is 1; the
    first steps are not counted.
    """
    for i in range(max(2, period)):
        step(i)
    times = []
    for i in range(max(5, period)):
        start = clock()
        step(i)
        times.append(clock() - start)
    return statistics.fmean(times) if period > 1 else statistics.median(times)


def peak() -> float:
    """Floating-point operations a second of a large matrix product."""
    a = torch.randn(2048, 2048)
    return 2 * 2048**3 / min(timed(lambda _: a @ a) for _ in range(3))


@dataclass(frozen=True)
class Layer:
    """A layer as products of matrices: N T rows, I inputs without the bias, O outputs."""

    rows: int
    inputs: int
    outputs: int
    biased: bool
    first: bool

    @property
    def ways(self) -> list[int]:
        """Sizes of the factors of a method by layer."""
        return [self.outputs, self.inputs + self.biased]


def layers_of(objective: cl.Objective, x: Tensor, y: Tensor) -> list[Layer]:
    observation = objective.closure(x, y, "warm").observe()
    found: list[Layer] = []
    for block in objective.blocks:
        s = observation.passes["data"][block.name]
        n, t, i = s.bare_a.shape
        found.append(Layer(n * t, i, block.shape[0], block.biased, not found))
    return found


COUNTED = ("sgd-m", "adam", "k-bfgs", "kfac", "skqn-b2", "tnt", "shampoo")


def floor(method: Method, layers: list[Layer], plain: bool = False) -> float | None:
    """Operations of a step's products: forward and backward, and what the documents' tables 2.2,
    3.2 and 4.1 add. None of a method that has no line there.
    """
    if not layers or not method.name.startswith(COUNTED) or method.name == "adamw":
        return None
    every, refreshed = method.options.get("update_every", 1), method.options.get("refresh_every", 1)
    total = 0.0
    for layer in layers:
        # forward; or the gradient; or back
        through = 2.0 * layer.rows * layer.inputs * layer.outputs
        back = 0.0 if layer.first else through
        out, width = layer.ways
        total += through + back + through
        if plain:
            continue
        whole = 2.0 * out * width * (out + width)  # H_g V H_a
        if method.name.startswith("k-bfgs"):
            total += (through + back) / every + whole
            if "-l" in method.name:
                total -= 2.0 * out * width * max(0, out - 4 * PAIRS)
            if method.name.endswith("20"):
                total += layer.rows * width**2
        elif method.name in ("kfac", "skqn-b2"):
            moments = layer.rows * (out**2 + width**2)
            total += whole + (moments + back) / every + (out**3 + width**3) / refreshed
            total += (through + back) if method.name == "skqn-b2" else 0.0
        elif method.name in ("tnt", "shampoo"):
            total += whole + whole / 2 + (back + through if method.name == "tnt" else 0.0)
            total += ((1 if method.name == "tnt" else 10) * (2 * out**3 + width**3)) / refreshed
    return total


def numbers(method: Method, layers: list[Layer]) -> int | None:
    """What the documents' tables of memory give a curvature, beyond gradient and momentum."""
    sums = {
        "adam": lambda o, i: o * i,
        "k-bfgs": lambda o, i: o**2 + i**2,
        "k-bfgs-20": lambda o, i: o**2 + i**2,
        "k-bfgs-l": lambda o, i: i**2 + 2 * min(PAIRS, 10**9) * o,
        "kfac": lambda o, i: o**2 + i**2,
        "tnt": lambda o, i: o**2 + i**2,
        "shampoo": lambda o, i: o**2 + i**2,
        "sgd-m": lambda o, i: 0,
    }
    one = sums.get(method.name) if layers else None
    return None if one is None else sum(one(*layer.ways) for layer in layers)


class PlainKfac:
    """KFAC as one writes it first: hooks, A = aᵀa/N and G = gᵀg/N of drawn labels, inverses every T
    steps.
    """

    def __init__(
        self, model: nn.Module, every: int = 20, decay: float = 0.9, damping: float = 1.0
    ) -> None:
        self.layers = [m for m in model.children() if isinstance(m, nn.Linear)]
        self.model, self.every, self.decay, self.root = model, every, decay, damping**0.5
        self.A: dict[nn.Linear, Tensor] = {}
        self.G: dict[nn.Linear, Tensor] = {}
        self.inverses: dict[nn.Linear, tuple[Tensor, Tensor]] = {}
        self.momentum: dict[nn.Linear, Tensor] = {}
        self.steps, self.recording = 0, False
        for layer in self.layers:
            layer.register_forward_hook(self._inputs)
            layer.register_full_backward_hook(self._derivatives)

    def _average(self, into: dict[nn.Linear, Tensor], layer: nn.Linear, new: Tensor) -> None:
        into[layer] = (
            new if layer not in into else self.decay * into[layer] + (1 - self.decay) * new
        )

    def _inputs(self, layer: nn.Linear, args: tuple[Tensor, ...], output: Tensor) -> None:
        a = torch.cat([args[0], args[0].new_ones(len(args[0]), 1)], 1)
        self._average(self.A, layer, a.T @ a / len(a))

    def _derivatives(self, layer: Any, _: object, grads: Any) -> None:
        if self.recording:
            g = grads[0] * len(grads[0])
            self._average(self.G, layer, g.T @ g / len(g))

    def step(self, x: Tensor, y: Tensor, lr: float) -> None:
        z = self.model(x)
        drawn = torch.bernoulli(torch.sigmoid(z.detach()))
        self.recording = True
        nn.functional.binary_cross_entropy_with_logits(z, drawn, reduction="sum").div(
            len(x)
        ).backward(retain_graph=True)
        self.recording = False
        self.model.zero_grad()
        nn.functional.binary_cross_entropy_with_logits(z, y, reduction="sum").div(len(x)).backward()
        with torch.no_grad():
            for layer in self.layers:
                A, G = self.A[layer], self.G[layer]
                if self.steps % self.every == 0:
                    damped = (m + self.root * torch.eye(len(m)) for m in (A, G))
                    self.inverses[layer] = tuple(torch.linalg.inv(m) for m in damped)
                of_weight, of_bias = layer.weight.grad, layer.bias.grad
                assert of_weight is not None
                assert of_bias is not None
                grad = torch.cat([of_weight, of_bias[:, None]], 1)
                self.momentum[layer] = (
                    grad if layer not in self.momentum else 0.9 * self.momentum[layer] + grad
                )
                step = self.inverses[layer][1] @ self.momentum[layer] @ self.inverses[layer][0]
                layer.weight -= lr * step[:, :-1]
                layer.bias.sub_(lr * step[:, -1])
        self.steps += 1


ROWS: list[list[str | float | None]] = []
PAIRS_IN_TURNS: list[list[str | float | None]] = []


def run(problem: str, flops: float) -> None:
    objective, batches = PROBLEMS[problem]()
    layers = [] if problem == "gpt-small" else layers_of(objective, *batches[0])

    def plain(
        i: int, of: cl.Objective = objective, among: list[tuple[Tensor, Tensor]] = batches
    ) -> None:
        forward_and_backward(of, *among[i % 4])

    # again after every method: neighbours of the machine make it slower and faster
    bases = [timed(plain)]
    least = floor(METHODS[0], layers, plain=True)
    about = f"{problem}, batches of {len(batches[0][0])}"
    bound_of = "" if least is None else f" (floor {1e3 * least / flops:.1f} ms)"
    print(f"\n{about}: forward + backward {1e3 * bases[0]:.1f} ms{bound_of}")
    print(
        f"  {'method':<20}{'ms':>9}{'× f+b':>8}{'floor':>8}"
        f"{'goal':>7}{'memory MB':>12}{'tables':>9}"
    )
    steps: dict[str, tuple[Callable[[int], object], int]] = {}

    def show(
        label: str,
        step: Callable[[int], object],
        period: int,
        seconds: float,
        bound: float | None = None,
        goal: float | None = None,
        memory: str = "",
    ) -> None:
        bases.append(timed(plain))
        base = (bases[-2] + bases[-1]) / 2
        steps[label] = step, period
        ROWS.append([problem, label, round(1e3 * seconds, 1), round(seconds / base, 2)])
        goal = goal if problem == "autoencoder" else None
        ROWS[-1] += [round(bound / flops / base, 2) if bound else None, goal]
        bounds = f"{bound / flops / base:>8.2f}" if bound else " " * 8
        goals = f"{goal:>7.1f}" if goal else " " * 7
        print(
            f"  {label:<20}{1e3 * seconds:>9.1f}{seconds / base:>8.2f}{bounds}{goals}{memory}",
            flush=True,
        )

    for method in (m for m in METHODS if m.name in options.names):
        objective, batches = PROBLEMS[problem]()
        optimizer = cl.optimizer(method.name, objective, lr=1e-7, **method.options)

        def step(
            i: int,
            among: list[tuple[Tensor, Tensor]] = batches,
            of: cl.Objective = objective,
            by: Callable[[Any], object] = optimizer.step,
        ) -> None:
            by(of.closure(*among[i % 4]))

        seconds = timed(step, method.period)
        held = sum(
            t.numel() * t.element_size() for t in tensors(optimizer.descent.curvature.state_dict())
        )
        told = numbers(method, layers)
        memory = f"{held / 1e6:>12.1f}" + ("" if told is None else f"{4 * told / 1e6:>9.1f}")
        bound = floor(method, layers)
        show(method.label, step, method.period, seconds, bound, method.goal, memory)

    peers(problem, show)
    for theirs, mine in PEERS_OF:
        if {theirs, mine} <= steps.keys():
            ratio = in_turns(steps[theirs], steps[mine])
            PAIRS_IN_TURNS.append([problem, theirs, mine, round(ratio, 3)])
            print(f"  {theirs} / {mine} of ours, in turns: {ratio:.2f}", flush=True)


def in_turns(*both: tuple[Callable[[int], object], int], turns: int = 12) -> float:
    """Ratio of the fastest of turns of a period that two take alternately: what else the machine
    does meets both alike. Three turns where a step takes seconds, or a period several.
    """
    times: list[list[float]] = [[], []]
    for turn in range(turns if both[0][1] == 1 else 3):
        if turn >= 3 and min(map(min, times)) > LONG:
            break
        for which in (0, 1) if turn % 2 else (1, 0):
            step, period = both[which]
            start = clock()
            for i in range(max(2, period)):
                step(i)
            times[which].append(clock() - start)
    return min(times[0]) / min(times[1])


PEERS_OF = (
    ("torch Adam", "adam"),
    ("torch AdamW", "adamw"),
    ("torch Muon", "muon"),
    ("torch Muon", "muon bfloat16"),
    ("plain KFAC T₂=20", "kfac T₂=20"),
    ("pytorch_optimizer Shampoo T₂=20", "shampoo T₂=20"),
    ("pytorch_optimizer SOAP T₂=10", "soap T₂=10"),
    ("pytorch_optimizer Muon", "muon bfloat16"),
)


def hidden(model: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    """Return (the matrices that curvlab's muon takes, all other parameters)."""
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    linear = [m.weight for m in model.modules() if isinstance(m, nn.Linear)]
    matrices = [w for w in linear if id(w) not in tables]
    own = {id(w) for w in matrices}
    return matrices, [p for p in model.parameters() if id(p) not in own]


def peers(problem: str, show: Callable[[str, Callable[[int], object], int, float], None]) -> None:
    """Time what others have: plain loops of forward, backward and their step."""
    lr = 1e-7

    def loop(label: str, make: Callable[[nn.Module], list[Any]], period: int = 1) -> None:
        objective, batches = PROBLEMS[problem]()
        optimizers = make(objective.model)

        def step(i: int) -> None:
            forward_and_backward(objective, *batches[i % 4])
            for optimizer in optimizers:
                optimizer.step()

        show(label, step, period, timed(step, period))

    def muon(model: nn.Module) -> list[Any]:
        matrices, rest = hidden(model)
        return [torch.optim.Muon(matrices, lr=lr), torch.optim.AdamW(rest, lr=lr, weight_decay=0.1)]

    loop("torch Adam", lambda model: [torch.optim.Adam(model.parameters(), lr=lr)])
    loop("torch AdamW", lambda model: [torch.optim.AdamW(model.parameters(), lr=lr)])
    loop("torch Muon", muon)
    if problem == "autoencoder":
        objective, batches = PROBLEMS[problem]()
        peer = PlainKfac(objective.model)
        pairs = [(x, y) for x, y in batches]

        def kfac_step(i: int) -> None:
            x, y = pairs[i % 4]
            peer.step(x, y, lr)

        show("plain KFAC T₂=20", kfac_step, 20, timed(kfac_step, 20))
    if not find_spec("pytorch_optimizer"):
        return
    from pytorch_optimizer import SOAP, Muon, Shampoo

    def their_muon(model: nn.Module) -> list[Any]:
        matrices, rest = hidden(model)
        groups: list[dict[str, Any]] = [
            {"params": matrices, "use_muon": True, "weight_decay": 0.1},  # as ours and torch's
            {"params": rest, "use_muon": False, "weight_decay": 0.1},
        ]
        return [Muon(groups, lr=lr)]

    loop(
        "pytorch_optimizer Shampoo T₂=20",
        lambda m: [Shampoo(m.parameters(), lr=lr, preconditioning_compute_steps=20)],
        20,
    )
    loop(
        "pytorch_optimizer SOAP T₂=10",
        lambda m: [SOAP(m.parameters(), lr=lr, precondition_frequency=10)],
        10,
    )
    loop("pytorch_optimizer Muon", their_muon)


keep_freed_memory()
what = (
    "CPU time of one thread" if options.threads == 1 else f"wall time of {options.threads} threads"
)
flops = peak()
print(
    f"{what}, load {os.getloadavg()[0]:.2f}, torch {torch.__version__}, peak {flops / 1e9:.0f}"
    " GFLOP/s"
)
for name in options.problems:
    run(name, flops)
if options.record:
    columns = ["problem", "method", "ms", "× forward + backward", "floor", "goal"]
    record("steps", f"A step, {what}; floor: counted products", columns, ROWS, heads=2)
    columns = ["problem", "theirs", "ours", "theirs / ours"]
    record("peers", f"Steps in turns, {what}", columns, PAIRS_IN_TURNS, heads=3)
