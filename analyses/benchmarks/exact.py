"""Exact curvature, side by side in one run: curvlab, torch.func, curvlinops, BackPACK, and the
floor.

All times are CPU seconds of one thread, so that other work on the machine matters little; with
--threads wall seconds, for a machine that does nothing else. Freed memory is kept (glibc's mallopt)
for everyone alike. The floor of matrices is their floating-point operations (the packed symmetric
product on the inputs that are not zero) over the matrix-product peak of this run (for the
autoencoder's narrow layers with the passes that their pre-activation Hessians take); of per-sample
gradients, the time to fill that memory.

    python analyses/benchmarks/exact.py [--dtype float32] [--examples 1000] [--threads 1]
        [--skip mlp gradients autoencoder blocks memory]   blocks: of the autoencoder, minutes

curvlinops and BackPACK are optional, beside the extra "test":
    pip install --no-deps curvlinops-for-pytorch backpack-for-pytorch unfoldNd
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, jacrev, jvp, vmap

import curvlab as cl
from curvlab.exact import Kind
from curvlab.layers import Block
from curvlab.system.memory import keep_freed_memory

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--dtype", default="float32", choices=["float32", "float64"])
parser.add_argument("--examples", type=int, default=1000)
parser.add_argument(
    "--skip", nargs="*", default=[], choices=["mlp", "gradients", "autoencoder", "blocks", "memory"]
)
parser.add_argument("--threads", type=int, default=1)
parser.add_argument("--memory-of", help=argparse.SUPPRESS)
options = parser.parse_args()
DTYPE = getattr(torch, options.dtype)
COLUMNS = 64  # of an identity at a time, for those who only have products


def seconds(function: Callable[..., object], repeats: int = 7) -> float:
    """Least seconds of a call, after one that is not counted where there are several."""
    clock = time.process_time if options.threads == 1 else time.perf_counter
    if repeats > 1:
        function()
    times = []
    for _ in range(repeats):
        start = clock()
        kept = function()
        times.append(clock() - start)
        del kept
    return min(times)


def mlp() -> tuple[cl.Objective, Tensor, Tensor]:
    train, _ = cl.datasets.load("mnist16")
    objective = cl.Objective(
        cl.models.build("mlp-256-20", seed=0).to(DTYPE), cl.likelihoods.Categorical()
    )
    x, y = next(iter(train.batches(options.examples, seed=0)))
    return objective, x.to(DTYPE), y


def autoencoder(size: int) -> tuple[cl.Objective, Tensor, Tensor]:
    """The MNIST autoencoder of thesis Table 2.4 on logits."""
    train, _ = cl.datasets.load("mnist")
    widths = [784, 1000, 500, 250, 30, 250, 500, 1000, 784]
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for i in range(8):
        layers += [nn.Linear(widths[i], widths[i + 1])] + ([nn.ReLU()] if i not in (3, 7) else [])
    objective = cl.Objective(nn.Sequential(*layers).to(DTYPE), cl.likelihoods.Bernoulli())
    x = next(iter(train.batches(size, seed=0)))[0].reshape(size, -1).to(DTYPE)
    return objective, x, x


def peak() -> float:
    """Floating-point operations a second of a large matrix product."""
    a = torch.randn(2048, 2048, dtype=DTYPE)
    return 2 * 2048**3 / seconds(lambda: a @ a)


def operations(objective: cl.Objective, x: Tensor, names: Sequence[str]) -> float:
    """Of the packed symmetric products: 2 N · pairs of outputs · pairs of inputs that are not
    always zero.
    """
    total = 0.0
    with torch.no_grad():
        h = x.flatten(1)
        inputs: dict[int, int] = {}
        for layer in objective.model.children():
            if isinstance(layer, nn.Linear):
                inputs[len(inputs) + 1] = int((h != 0).any(0).sum()) + 1
            h = layer(h)
    for block in objective.blocks:
        if block.name in names:
            o, i = block.shape[0], inputs[int(block.name)]
            total += 2 * len(x) * (o * (o + 1) / 2) * (i * (i + 1) / 2)
    return total


def passes(objective: cl.Objective, x: Tensor, name: str, kind: str) -> float:
    """Of the pre-activation Hessians of a narrow layer: its O directions forward through the layers
    that follow (GGN: then JᵀHJ), and for the Hessian back again.
    """
    layers = [layer for layer in objective.model.children() if isinstance(layer, nn.Linear)]
    outputs, following = layers[int(name) - 1].out_features, layers[int(name) :]
    one_way = 2 * outputs * sum(layer.weight.numel() for layer in following)
    return len(x) * (
        one_way + 2 * following[-1].out_features * outputs**2 if kind == "ggn" else 2 * one_way
    )


def forward_backward(objective: cl.Objective, x: Tensor, y: Tensor) -> None:
    closure = objective.closure(x, y, "exact")
    closure()


def parameters(objective: cl.Objective) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in objective.parameters.items()}


def func_ggn(objective: cl.Objective, x: Tensor, y: Tensor, names: Sequence[str]) -> list[Tensor]:
    """Jᵀ H J with J by vmap(jacrev) and H the Hessian of the loss in the outputs."""
    values = parameters(objective)
    z = objective.model(x).detach()
    H = vmap(hessian(lambda z, y: objective.likelihood.loss(z[None], y[None])[0]))(z, y)
    found = []
    for block in objective.blocks:
        if block.name in names:
            own = {name: values[name] for name in block.params}
            rest = {name: v for name, v in values.items() if name not in own}
            J = vmap(
                jacrev(
                    lambda v, x, rest=rest: functional_call(objective.model, v | rest, (x[None],))[
                        0
                    ]
                ),
                (None, 0),
                chunk_size=128,
            )(own, x)
            rows = torch.cat([j.flatten(2) for j in J.values()], 2)
            found.append((rows.flatten(0, 1).T @ (H @ rows).flatten(0, 1)) / len(x))
    return found


def func_hessian(
    objective: cl.Objective, x: Tensor, y: Tensor, names: Sequence[str], columns: int | None = None
) -> list[Tensor]:
    """Forward over reverse, some columns at a time; only the first `columns` where given."""
    values = parameters(objective)
    found = []
    for block in objective.blocks:
        if block.name in names:
            rest = {name: v for name, v in values.items() if name not in block.params}

            def slope(w: Tensor, rest: dict[str, Tensor] = rest, block: Block = block) -> Tensor:
                z = functional_call(objective.model, block.scatter(w) | rest, (x,))
                return objective.likelihood.loss(z, y).mean()

            w = block.gather(values).flatten()
            some = torch.eye(len(w), dtype=DTYPE)[:columns]
            found.append(
                vmap(
                    lambda v, w=w, slope=slope: jvp(grad(slope), (w,), (v,))[1], chunk_size=COLUMNS
                )(some)
            )
    return found


def curvlinops_dense(
    kind: str, objective: cl.Objective, x: Tensor, y: Tensor, name: str, columns: int | None = None
) -> Tensor:
    import curvlinops

    operator = {"ggn": curvlinops.GGNLinearOperator, "hessian": curvlinops.HessianLinearOperator}[
        kind
    ]
    block = next(b for b in objective.blocks if b.name == name)
    loss = {"Categorical": nn.CrossEntropyLoss(), "Bernoulli": nn.BCEWithLogitsLoss()}[
        type(objective.likelihood).__name__
    ]
    named = dict(objective.model.named_parameters())
    op = operator(
        objective.model, loss, [named[p] for p in block.params], [(x, y)], check_deterministic=False
    )
    eye = torch.eye(block.numel, dtype=DTYPE)[:, :columns]
    return torch.cat([op @ part for part in eye.split(COLUMNS, 1)], 1)


def backpack_sqrt_ggn(objective: cl.Objective, x: Tensor, y: Tensor) -> list[Tensor]:
    """V with V Vᵀ = GGN by BackPACK, then the product, block by block."""
    import copy

    from backpack import backpack, extend
    from backpack.extensions import SqrtGGNExact

    model, loss = (
        extend(copy.deepcopy(objective.model)),
        extend(nn.CrossEntropyLoss(reduction="sum")),
    )
    with backpack(SqrtGGNExact()):
        loss(model(x), y).backward()
    found = []
    for layer in model:
        if isinstance(layer, nn.Linear):
            weight, bias = cast(Any, layer.weight), cast(Any, layer.bias)  # as BackPACK leaves them
            rows = torch.cat(
                [
                    weight.sqrt_ggn_exact.flatten(2),
                    bias.sqrt_ggn_exact[..., None].flatten(2),
                ],
                2,
            )
            rows = rows.flatten(0, 1)
            found.append(rows.T @ rows / len(x))
    return found


def backpack_gradients(objective: cl.Objective, x: Tensor, y: Tensor) -> list[Tensor]:
    import copy

    from backpack import backpack, extend
    from backpack.extensions import BatchGrad

    model, loss = (
        extend(copy.deepcopy(objective.model)),
        extend(nn.CrossEntropyLoss(reduction="sum")),
    )
    with backpack(BatchGrad()):
        loss(model(x), y).backward()
    return [p.grad_batch for p in model.parameters()]


def func_gradients(objective: cl.Objective, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    def loss(v: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return objective.likelihood.loss(functional_call(objective.model, v, (x[None],)), y[None])[
            0
        ]

    return vmap(grad(loss), (None, 0, 0))(parameters(objective), x, y)


def has(*names: str) -> bool:
    from importlib.util import find_spec

    return all(find_spec(name) for name in names)


def line(what: str, time_: float, ours: float, note: str = "") -> None:
    print(f"  {what:<42} {time_:9.3f} s   {time_ / ours:7.1f} × ours   {note}", flush=True)


def matrices_of_the_mlp(flops: float) -> None:
    objective, x, y = mlp()
    names = [b.name for b in objective.blocks]
    print(
        f"\nmlp-256-20, N = {len(x)}, all {len(names)} blocks"
        f" ({', '.join(str(b.numel) for b in objective.blocks)})"
    )
    ggn = seconds(lambda: cl.exact.matrices(objective, x, y, "ggn"))
    second = seconds(lambda: cl.exact.matrices(objective, x, y, "hessian"))
    floor = operations(objective, x, names) / flops
    print(
        f"  floor {floor:.3f} s ({operations(objective, x, names) / 1e9:.2f} GFLOP at"
        f" {flops / 1e9:.0f} GFLOP/s)"
    )
    print(f"  GGN     curvlab {ggn:.3f} s: {floor / ggn:.2f} of the peak")
    print(
        f"  Hessian curvlab {second:.3f} s: {floor / second:.2f} of the peak; Hessian / GGN"
        f" {second / ggn:.2f}"
    )
    line("GGN by torch.func", seconds(lambda: func_ggn(objective, x, y, names), 2), ggn)
    if has("backpack"):
        line(
            "GGN by BackPACK (SqrtGGNExact, then VᵀV)",
            seconds(lambda: backpack_sqrt_ggn(objective, x, y), 2),
            ggn,
        )
    if has("curvlinops"):
        line(
            "GGN by curvlinops",
            seconds(lambda: [curvlinops_dense("ggn", objective, x, y, n) for n in names], 1),
            ggn,
        )
    line("Hessian by torch.func", seconds(lambda: func_hessian(objective, x, y, names), 1), second)
    if has("curvlinops"):
        line(
            "Hessian by curvlinops",
            seconds(lambda: [curvlinops_dense("hessian", objective, x, y, n) for n in names], 1),
            second,
        )


def gradients(objective: cl.Objective, x: Tensor, y: Tensor, title: str) -> None:
    out = cl.exact.gradients(objective, x, y)
    megabytes = sum(g.numel() * g.element_size() for g in out.values()) / 1e6
    print(f"\nper-sample gradients, {title}, N = {len(x)}: {megabytes:.0f} MB")
    plain = seconds(lambda: forward_backward(objective, x, y))
    fill = seconds(lambda: [g.fill_(1.0) for g in out.values()])
    both = seconds(
        lambda: (forward_backward(objective, x, y), [g.fill_(1.0) for g in out.values()])  # type: ignore[func-returns-value]  # for its effect
    )
    ours = seconds(lambda: cl.exact.gradients(objective, x, y, out=out))
    fresh = seconds(lambda: cl.exact.gradients(objective, x, y))
    print(
        f"  forward + backward {plain * 1e3:.2f} ms; filling the same memory {fill * 1e3:.2f} ms;"
        f" one after the other {both * 1e3:.2f} ms: {both / plain:.2f} × (with what the passes"
        " evicted from the cache)"
    )
    print(
        f"  curvlab, into memory that is there {ours * 1e3:.2f} ms: {ours / plain:.2f} × forward +"
        f" backward, {ours / fill:.2f} × the fill, {ours / both:.2f} × one after the other"
    )
    print(
        f"  curvlab, into fresh memory         {fresh * 1e3:.2f} ms: {fresh / plain:.2f} × forward"
        " + backward"
    )
    line("torch.func vmap(grad)", seconds(lambda: func_gradients(objective, x, y), 3), ours)
    if has("backpack") and isinstance(objective.likelihood, cl.likelihoods.Categorical):
        line("BackPACK BatchGrad", seconds(lambda: backpack_gradients(objective, x, y), 3), ours)


def blocks_of_the_autoencoder(flops: float) -> None:
    objective, x, y = autoencoder(100)
    for name in ("4", "5"):
        block = next(b for b in objective.blocks if b.name == name)
        ours = seconds(lambda name=name: cl.exact.matrix(objective, x, y, "ggn", name), 3)
        second = seconds(lambda name=name: cl.exact.matrix(objective, x, y, "hessian", name), 3)
        product = operations(objective, x, [name]) / flops
        print(
            f"\nMNIST autoencoder, N = {len(x)}, block {name} ({block.numel}): the product"
            f" {product:.3f} s"
        )
        for kind, taken in (("ggn", ours), ("hessian", second)):
            through = passes(objective, x, name, kind) / flops
            floor = product + through
            print(
                f"  {kind:<8} floor with its passes {floor:.3f} s; curvlab {taken:.3f} s:"
                f" {floor / taken:.2f} of the peak"
            )
        print(
            f"  Hessian / GGN {second / ours:.2f} (its derivatives go forward and back, the GGN's"
            " forward alone)"
        )
        line(
            "GGN by torch.func",
            seconds(lambda name=name: func_ggn(objective, x, y, [name]), 1),
            ours,
        )
        share = block.numel / COLUMNS
        note = f"(from {COLUMNS} columns)"
        hessian_time = seconds(lambda name=name: func_hessian(objective, x, y, [name], COLUMNS), 1)
        line("Hessian by torch.func", share * hessian_time, second, note)
        if has("curvlinops"):
            for kind, own in (("ggn", ours), ("hessian", second)):
                taken = seconds(
                    lambda name=name, kind=kind: curvlinops_dense(
                        kind, objective, x, y, name, COLUMNS
                    ),
                    1,
                )
                line(f"{kind} by curvlinops", share * taken, own, note)


def memory(kind: Kind) -> None:
    """Run in a process of its own: the most that the process grew by, over the size of the
    result.
    """
    objective, x, y = mlp()
    cl.exact.matrix(objective, x, y, kind, "3")
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark (Linux)
    before = resident("VmRSS")
    found = cl.exact.matrices(objective, x, y, kind)
    size = sum(m.matrix.numel() * m.matrix.element_size() for m in found.values())
    print(
        f"  {kind:<8} {size / 1e6:.0f} MB: the process grew by"
        f" {(resident('VmHWM') - before) / size:.2f} × that",
        flush=True,
    )


def resident(which: str) -> int:
    """Bytes of this process in memory: now (VmRSS), or at most (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(which)).split()[1])


torch.set_num_threads(options.threads)
if options.memory_of:
    memory(options.memory_of)
    sys.exit()
keep_freed_memory()
clock = (
    "CPU time of one thread" if options.threads == 1 else f"wall time of {options.threads} threads"
)
print(f"{clock}, load {os.getloadavg()[0]:.2f}, torch {torch.__version__}, {options.dtype}")
flops = peak()
if "gradients" not in options.skip:
    gradients(*mlp(), "mlp-256-20")
    if "autoencoder" not in options.skip:
        gradients(*autoencoder(100), "MNIST autoencoder")
if "memory" not in options.skip:
    print("\npeak memory of all blocks of mlp-256-20, results included")
    for kind in ("ggn", "hessian"):
        words = [
            sys.executable,
            __file__,
            "--memory-of",
            kind,
            "--dtype",
            options.dtype,
            "--examples",
            str(options.examples),
        ]
        subprocess.run(words, check=True)
if "mlp" not in options.skip:
    matrices_of_the_mlp(flops)
if not {"autoencoder", "blocks"} & set(options.skip):
    blocks_of_the_autoencoder(flops)
