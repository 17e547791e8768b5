"""Exact Gauss-Newton blocks of a small language model: curvlab, torch.func, curvlinops, the floor.

The model is a pre-LN GPT of two layers, width 32, four heads and a tied head, at N = 8. All times
are CPU seconds of one thread in one run, least of some repeats. torch.func takes Jacobians by
vmap(jacrev), block by block, and the Hessian of the loss; curvlinops' operator is applied to some
columns of the identity, for as many as there are. The floor is what has to be multiplied (the
vectors through the linear layers, half of it by causality; then the cheaper of pairs of places and
rows of every block, `curvlab.linalg.places`) over the matrix-product peak of this run.

Then a step of KFAC on `gpt-small` (batches of 12, T₁ = 1, T₂ = 20, mean of 20 steps, one refresh
among them) over a forward and a backward pass, beside a plain KFAC of the linear layers, written
here with module hooks.

    python analyses/benchmarks/language.py [--sizes 16 32] [--dtype float32] [--quick]
        [--skip func curvlinops memory kfac]   --quick: T = 8, seconds; the rest: minutes
"""

import argparse
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, hessian, jacrev, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

import curvlab as cl
from curvlab.linalg.places import work_of_pairs, work_of_rows
from curvlab.system.memory import keep_freed_memory

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--sizes", type=int, nargs="*", default=[16, 32], choices=[8, 16, 32])
parser.add_argument("--dtype", default="float32", choices=["float32", "float64"])
parser.add_argument("--quick", action="store_true", help="T = 8, two examples")
parser.add_argument(
    "--skip", nargs="*", default=[], choices=["func", "curvlinops", "memory", "kfac"]
)
parser.add_argument("--memory-of", type=int, help=argparse.SUPPRESS)
options = parser.parse_args()
DTYPE = getattr(torch, options.dtype)
SYMBOLS = {8: 10, 16: 40, 32: 62}
WIDTH, HEADS = (16, 2) if options.quick else (32, 4)
EXAMPLES = 2 if options.quick else 8
COLUMNS = 8 if options.quick else 32  # of the identity, for who has products only
FUNC_EXAMPLES = {8: 8, 16: 8, 32: 1}  # beyond them a single one, times N


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        n, t, width = x.shape
        q, k, v = (
            part.view(n, t, HEADS, -1).transpose(1, 2)
            for part in self.qkv(self.first(x)).chunk(3, 2)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(n, t, width))
        return x + self.down(F.gelu(self.up(self.second(x))))


class GPT(nn.Module):
    def __init__(self, symbols: int, length: int) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(symbols, WIDTH), nn.Embedding(length, WIDTH)
        self.layers = nn.Sequential(Layer(), Layer())
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, symbols, bias=False)
        nn.init.normal_(self.tokens.weight, std=0.1)
        self.head.weight = self.tokens.weight

    def forward(self, x: Tensor) -> Tensor:
        """Logits [N, C, T] of what follows each of the symbols [N, T]."""
        h = self.tokens(x) + self.positions(torch.arange(x.shape[1]).expand(x.shape))
        return self.head(self.norm(self.layers(h))).mT


def made(length: int) -> tuple[cl.Objective, Tensor, Tensor]:
    torch.manual_seed(0)
    symbols = SYMBOLS[length]
    model = GPT(symbols, length).to(DTYPE)
    x, y = torch.randint(symbols, (2, EXAMPLES, length))
    return cl.Objective(model, cl.likelihoods.Categorical()), x, y


def seconds(function: Callable[[], object], repeats: int = 3) -> float:
    """Least CPU seconds of a call."""
    times = []
    for _ in range(repeats):
        start = time.process_time()
        kept = function()
        times.append(time.process_time() - start)
        del kept
    return min(times)


def peak() -> float:
    """Floating-point operations a second of a large matrix product."""
    a = torch.randn(2048, 2048, dtype=DTYPE)
    return 2 * 2048**3 / seconds(lambda: a @ a, 5)


def operations(objective: cl.Objective, length: int) -> float:
    """What has to be multiplied for all blocks."""
    symbols = SYMBOLS[length]
    sent = min(symbols, WIDTH)  # vectors of a place, past the head
    reach = [(t * sent, length * sent) for t in range(length)]
    linear = [m.weight.numel() for m in objective.model.modules() if isinstance(m, nn.Linear)]
    total = (
        2.0 * sum(linear) * length * len(reach) * sent / 2
    )  # back: a vector, the places ≤ its own
    for block in objective.blocks:
        outputs, inputs = block.shape
        if block.groups > 1:
            total += work_of_rows(length * sent, length, outputs, inputs) / 2
        elif block.name == "1":  # the tied head: of all vectors
            total += work_of_rows(length * symbols, length, outputs, inputs)
        else:
            rows = work_of_rows(len(reach) * sent, length, outputs, inputs)
            total += min(rows, work_of_pairs(reach, outputs, inputs))
    return EXAMPLES * total


def func_ggn(objective: cl.Objective, x: Tensor, y: Tensor) -> list[Tensor]:
    """Jᵀ H J of every block, an example at a time; J by vmap(jacrev)."""
    values = {name: p.detach() for name, p in objective.parameters.items()}
    z = objective.model(x).detach()
    loss = objective.likelihood.loss
    H = vmap(hessian(lambda z, y: loss(z[None], y[None])[0]))(z, y)
    H = H.reshape(len(x), z[0].numel(), -1)
    found = []
    for block in objective.blocks:
        own = {name: values[name] for name in block.params}
        rest = {name: v for name, v in values.items() if name not in own}

        def outputs(v: dict[str, Tensor], x: Tensor, rest: dict[str, Tensor] = rest) -> Tensor:
            return functional_call(objective.model, v | rest, (x[None],))[0].flatten()

        total = torch.zeros(block.numel, block.numel, dtype=DTYPE)
        for n in range(len(x)):
            J = vmap(jacrev(outputs), (None, 0))(own, x[n : n + 1])
            rows = torch.cat([j.flatten(2) for j in J.values()], 2)[0]
            total.addmm_(rows.T, H[n] @ rows, alpha=1 / len(x))
        found.append(total)
    return found


def curvlinops_ggn(objective: cl.Objective, x: Tensor, y: Tensor) -> float:
    """Seconds for all columns of all blocks, from `COLUMNS` of each."""
    import curvlinops

    named, total = dict(objective.model.named_parameters()), 0.0
    for block in objective.blocks:
        operator = curvlinops.GGNLinearOperator(
            objective.model,
            nn.CrossEntropyLoss(),
            [named[p] for p in block.params],
            [(x, y)],
            check_deterministic=False,
        )
        some = torch.eye(block.numel, dtype=DTYPE)[:, :COLUMNS]
        total += seconds(partial(operator.__matmul__, some), 1) * block.numel / some.shape[1]
    return total


def resident(which: str) -> int:
    """Bytes of this process in memory: now (VmRSS), or at most (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(which)).split()[1])


def memory(length: int) -> None:
    """Run in a process of its own: the most that it grew by, beside the size of the result."""
    objective, x, y = made(length)
    cl.exact.matrices(objective, x[:1], y[:1], "ggn", "3")
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark (Linux)
    before = resident("VmRSS")
    found = cl.exact.matrices(objective, x, y, "ggn")
    size = sum(m.matrix.numel() * m.matrix.element_size() for m in found.values())
    grown = resident("VmHWM") - before
    print(
        f"  memory: the results {size / 1e6:.0f} MB, the process grew by {grown / 1e6:.0f} MB:"
        f" {(grown - 2 * size) / 1e9:+.2f} GB beside twice the results",
        flush=True,
    )


def compare(length: int, flops: float) -> None:
    objective, x, y = made(length)
    widths = ", ".join(str(b.numel) for b in objective.blocks)
    print(f"\nT = {length}, {SYMBOLS[length]} symbols, N = {EXAMPLES}; blocks of {widths}")
    cl.exact.matrices(objective, x, y, "ggn")
    ours = seconds(lambda: cl.exact.matrices(objective, x, y, "ggn"))
    floor = operations(objective, length) / flops
    print(
        f"  curvlab {ours:.2f} s; floor {floor:.2f} s ({floor * flops / 1e9:.0f} GFLOP at"
        f" {flops / 1e9:.0f} GFLOP/s): {floor / ours:.2f} of the peak",
        flush=True,
    )
    taken = cl.exact.routes(objective, x, y, "ggn")
    print("  routes: " + ", ".join(f"{name} {way}" for name, way in taken.items()))
    if "func" not in options.skip:
        some = min(EXAMPLES, FUNC_EXAMPLES[length])
        theirs = seconds(lambda: func_ggn(objective, x[:some], y[:some]), 1) * EXAMPLES / some
        note = "" if some == EXAMPLES else f" (from {some} of the examples)"
        print(f"  torch.func {theirs:.1f} s: {theirs / ours:.1f} × ours{note}", flush=True)
    if "curvlinops" not in options.skip and find_spec("curvlinops"):
        theirs = curvlinops_ggn(objective, x, y)
        print(f"  curvlinops {theirs:.1f} s: {theirs / ours:.1f} × ours (from {COLUMNS} columns)")
    if "memory" not in options.skip:
        words = [sys.executable, __file__, "--memory-of", str(length), "--dtype", options.dtype]
        subprocess.run([*words, *["--quick"] * options.quick], check=True)


class PlainKFAC:
    """KFAC of all linear layers but the head by hooks; the other parameters follow the gradient.

    Momentum 0.9, factors averaged with 0.9, inverses of (A + π√λ) and (G + √λ/π): as the package's,
    by the shortest code.
    """

    def __init__(self, model: nn.Module, damping: float, every: int) -> None:
        self.model, self.damping, self.every, self.count = model, damping, every, 0
        self.layers = [
            m
            for name, m in model.named_modules()
            if isinstance(m, nn.Linear) and "head" not in name
        ]
        self.A = [torch.zeros(m.in_features, m.in_features) for m in self.layers]
        self.G = [torch.zeros(m.out_features, m.out_features) for m in self.layers]
        self.inverses: list[tuple[Tensor, Tensor]] = []
        self.kept: dict[nn.Linear, Tensor] = {}
        self.momentum = [torch.zeros_like(p) for p in model.parameters()]
        for m in self.layers:
            m.register_forward_hook(self._forth)

    def _forth(self, module: nn.Linear, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        i = self.layers.index(module)
        a = inputs[0].detach().flatten(0, -2)
        self.A[i].mul_(0.9).addmm_(a.T, a, alpha=0.1 / len(inputs[0]))
        self.kept[module] = output

    def step(self, x: Tensor, y: Tensor, lr: float) -> None:
        z = self.model(x).flatten(0, 1)
        outputs = [self.kept[m] for m in self.layers]
        drawn = torch.multinomial(z.detach().softmax(-1), 1)[:, 0]
        loss = F.cross_entropy(z, drawn, reduction="sum") / y.shape[1] ** 0.5
        for G, g in zip(self.G, torch.autograd.grad(loss, outputs, retain_graph=True), strict=True):
            rows = g.flatten(0, -2)
            G.mul_(0.9).addmm_(rows.T, rows, alpha=0.1 / len(rows))
        F.cross_entropy(z, y.flatten()).backward()
        if self.count % self.every == 0:
            self.inverses = [self._inverted(A, G) for A, G in zip(self.A, self.G, strict=True)]
        self.count += 1
        found = {
            m.weight: G @ m.weight.grad @ A
            for m, (A, G) in zip(self.layers, self.inverses, strict=True)
            if m.weight.grad is not None
        }
        with torch.no_grad():
            for p, held in zip(self.model.parameters(), self.momentum, strict=True):
                if p.grad is not None:
                    held.mul_(0.9).add_(found.get(p, p.grad))
                    p.sub_(held, alpha=lr)
                    p.grad = None

    def _inverted(self, A: Tensor, G: Tensor) -> tuple[Tensor, Tensor]:
        ratio = float((A.trace() / len(A) / (G.trace() / len(G))).sqrt())
        root = self.damping**0.5
        return (
            torch.cholesky_inverse(torch.linalg.cholesky(A + ratio * root * torch.eye(len(A)))),
            torch.cholesky_inverse(torch.linalg.cholesky(G + root / ratio * torch.eye(len(G)))),
        )


def kfac_steps() -> None:
    """Seconds of a step of KFAC, of plain KFAC, and of a forward and a backward pass."""
    train, _ = cl.datasets.load("shakespeare")
    steps = 4 if options.quick else 20
    batches = list(islice(train.batches(2 if options.quick else 12, epochs=1), steps))
    plain = PlainKFAC(cl.models.build("gpt-small", seed=0), 0.1, 20)
    bare = cl.models.build("gpt-small", seed=0)
    objective = cl.Objective(cl.models.build("gpt-small", seed=0), cl.likelihoods.Tokens())
    with warnings.catch_warnings():  # norms follow the gradient
        warnings.simplefilter("ignore", cl.CurvlabWarning)
        ours = cl.optimizer("kfac", objective, lr=1e-3, damping=0.1, refresh_every=20)

    def passes() -> None:
        for x, y in batches:
            loss = F.cross_entropy(bare(x).flatten(0, 1), y.flatten())
            torch.autograd.grad(loss, list(bare.parameters()))

    def own() -> None:
        for x, y in batches:
            ours.step(objective.closure(x, y))

    def hooked() -> None:
        for x, y in batches:
            plain.step(x, y, 1e-3)

    for each in (passes, own, hooked):
        each()
    floor, kfac, by_hooks = (seconds(each, 3) / steps for each in (passes, own, hooked))
    print(
        f"\ngpt-small, batches of {len(batches[0][0])}: forward and backward {1e3 * floor:.0f} ms;"
        f" a step of KFAC {kfac / floor:.2f} ×, of the plain KFAC {by_hooks / floor:.2f} × that"
    )


torch.set_num_threads(1)
if options.memory_of:
    memory(options.memory_of)
    sys.exit()
keep_freed_memory()
print(
    f"CPU time of one thread, load {os.getloadavg()[0]:.2f}, torch {torch.__version__},"
    f" {options.dtype}"
)
flops = peak()
for length in [8] if options.quick else options.sizes:
    # the fused kernel has no forward derivative and no rule for vmap, and so would slow the others
    with sdpa_kernel(SDPBackend.MATH):
        compare(length, flops)
if "kfac" not in options.skip:
    kfac_steps()
