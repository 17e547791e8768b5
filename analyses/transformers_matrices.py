"""Every kind of matrix of models of `transformers`, on the batches that they are given, against
torch.func and curvlinops.

GPT-2, BERT, T5, Llama and ViT in tiny configurations with random weights in float64; nothing is
downloaded. A batch is a mapping by keyword with padding, its mask and its labels, some of them
−100; the loss is the mean per token. The other route is in this file: Jacobians and second
derivatives of torch's own loss by `torch.func`, or, where that refuses a model, by autograd one row
at a time; no curvlab. curvlinops' operators for GGN and Hessian are applied to the identity, with
layer norm and SiLU by plain operations, since their Hessian is wrong with torch's own layer norm
and has no way through its SiLU (2.13). Exit code 1
where a relative error is above 1e-10.

    pip install "curvlab[foreign]"
    pip install --no-deps curvlinops-for-pytorch
    python analyses/transformers_matrices.py [--only NAME …] [--threads 1] [--out FOLDER]

Writes transformers_matrices.md to FOLDER, but with --only.

Legend: N examples, P places (of an image: 1), C classes, D numbers in all parameters.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any, get_args

import torch
import torch.nn.functional as F
import transformers as tf
from foreign_models import IMAGE, T5, TEXT, Double, largest_error, made, versions
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

import curvlab as cl
from curvlab.exact import Kind

try:
    import curvlinops
except ImportError:
    curvlinops = None

THRESHOLD, IGNORED, DRAWS = 1e-10, -100, 2
KINDS: tuple[Kind, ...] = get_args(Kind)
Batch = dict[str, Tensor]

# ----------------------------------------------------------------------
# models and batches


class Casting(nn.Module):
    """A model that casts to float32 inside, kept in float64; what goes in and out is as it was."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net, self.casts = net, True

    def forward(self, **batch: Tensor) -> Any:
        inside: AbstractContextManager[object] = Double() if self.casts else nullcontext()
        with inside:
            return self.net(**batch)


def padded(lengths: list[int], first: int = 3) -> Batch:
    """Sequences of these lengths, filled up with symbol 0, and the mask that says so."""
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    return {"input_ids": torch.randint(first, 12, mask.shape) * mask, "attention_mask": mask}


def next_symbols() -> Batch:
    """The symbol that follows each place; of the last, and of padding, there is none."""
    batch = padded([6, 3, 5])
    y = batch["input_ids"].roll(-1, 1)
    there = batch["attention_mask"].roll(-1, 1) * batch["attention_mask"]
    there[:, -1] = 0
    return {**batch, "labels": torch.where(there == 1, y, IGNORED)}


def some_hidden() -> Batch:
    """Labels of two places in each sequence, at which symbol 2 stands in for what was there."""
    batch = padded([5, 3, 4])
    hidden = torch.zeros_like(batch["input_ids"], dtype=torch.bool)
    hidden[:, :2] = True
    y = torch.where(hidden, batch["input_ids"], IGNORED)
    return {**batch, "input_ids": batch["input_ids"].masked_fill(hidden, 2), "labels": y}


def translated() -> Batch:
    """An encoder's sequences, a decoder's of other lengths."""
    there = padded([4, 3, 2])
    y = torch.where(there["attention_mask"] == 1, torch.randint(3, 12, (3, 4)), IGNORED)
    before = y.roll(1, 1).clamp_min(0)
    before[:, 0] = 0
    return {**padded([5, 2, 4]), "decoder_input_ids": before, "labels": y}


def images() -> Batch:
    pixels = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    return {"pixel_values": pixels, "labels": torch.tensor([2, IGNORED, 0, 1])}


WORDS = {**TEXT, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Batch]]] = {
    "GPT-2": (
        made("AutoModelForCausalLM", "GPT2", {**WORDS, "num_hidden_layers": 2, "use_cache": False}),
        next_symbols,
    ),
    "BERT": (made("AutoModelForMaskedLM", "Bert", {**TEXT, "pad_token_id": 0}), some_hidden),
    "T5": (made("AutoModelForSeq2SeqLM", "T5", {**T5, "use_cache": False}), translated),
    "Llama": (
        made(
            "AutoModelForCausalLM",
            "Llama",
            {**WORDS, "num_key_value_heads": 1, "head_dim": 4, "use_cache": False},
        ),
        next_symbols,
    ),
    "ViT": (made("AutoModelForImageClassification", "ViT", IMAGE), images),
}


def build(name: str) -> tuple[Casting, Batch]:
    """In evaluation mode, weights moved away from zeros and ones."""
    torch.manual_seed(sum(map(ord, name)))
    net, data = MODELS[name]
    model = Casting(net()).double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.3 if p.ndim > 1 else 0.1)
    batch = data()
    with Double() as double, torch.no_grad():
        model.net(**inputs_of(batch))
    model.casts = double.casts > 0
    return model, batch


def inputs_of(batch: Batch) -> Batch:
    return {name: t for name, t in batch.items() if name != "labels"}


# ----------------------------------------------------------------------
# the other route


class Reference:
    """Derivatives of torch's mean per token, in the model's order of parameters."""

    def __init__(self, model: nn.Module, batch: Batch) -> None:
        self.model, self.batch = model, batch
        self.weights = {name: p.detach() for name, p in model.named_parameters()}
        self.size = sum(p.numel() for p in self.weights.values())
        self.y = batch["labels"].reshape(len(batch["labels"]), -1)
        self.tokens = int((self.y != IGNORED).sum())
        self.refused: list[str] = []

    def outputs(self, weights: dict[str, Tensor]) -> Tensor:
        """[N, P, C]."""
        z = functional_call(self.model, weights, (), inputs_of(self.batch)).logits
        return z.reshape(*self.y.shape, -1)

    def loss(self, z: Tensor, y: Tensor) -> Tensor:
        """Torch's own, summed."""
        return F.cross_entropy(z.flatten(0, 1), y.flatten(), ignore_index=IGNORED, reduction="sum")

    def rows(self, of: Callable[[dict[str, Tensor]], Tensor], what: str) -> Tensor:
        """∂of/∂w, [*, D]: by torch.func, or one row at a time."""
        with sdpa_kernel(SDPBackend.MATH):
            try:
                found = jacrev(of)(self.weights)
            except (RuntimeError, NotImplementedError) as error:
                self.refused.append(f"{what}: {str(error).splitlines()[0]}")
                return self._rows_by_autograd(of)
        shape = next(iter(self.weights.values())).shape
        axes = next(iter(found.values())).ndim - len(shape)
        return torch.cat([j.flatten(axes) for j in found.values()], axes)

    def _rows_by_autograd(self, of: Callable[[dict[str, Tensor]], Tensor]) -> Tensor:
        weights = {name: p.clone().requires_grad_() for name, p in self.weights.items()}
        values = of(weights)
        lines = [
            torch.autograd.grad(
                value, [*weights.values()], retain_graph=True, materialize_grads=True
            )
            for value in values.flatten()
        ]
        dense = torch.stack([torch.cat([g.flatten() for g in line]) for line in lines])
        return dense.view(*values.shape, -1)

    @cached_property
    def jacobian(self) -> Tensor:
        """[N, P, C, D]."""
        return self.rows(self.outputs, "Jacobian")

    @cached_property
    def z(self) -> Tensor:
        return self.outputs(self.weights).detach()

    def _slope(self, weights: dict[str, Tensor]) -> Tensor:
        def total(w: dict[str, Tensor]) -> Tensor:
            return self.loss(self.outputs(w), self.y)

        try:
            found = grad(total)(weights)
        except (RuntimeError, NotImplementedError):
            given = {
                name: w if w.requires_grad else w.requires_grad_() for name, w in weights.items()
            }
            each = torch.autograd.grad(
                total(given), [*given.values()], create_graph=True, materialize_grads=True
            )
            found = dict(zip(given, each, strict=True))
        return torch.cat([g.flatten() for g in found.values()])

    @cached_property
    def hessian(self) -> Tensor:
        return self.rows(self._slope, "Hessian")

    def scores(self, y: Tensor) -> Tensor:
        """∂ℓ/∂w of every sequence, [N, D]."""
        return torch.einsum("npc,npci->ni", grad(lambda z: self.loss(z, y))(self.z), self.jacobian)

    def second_moments(self, kind: Kind, labels: list[Tensor]) -> Tensor:
        J, p, there = self.jacobian, self.z.softmax(2), (self.y != IGNORED).double()
        if kind == "ggn":
            middle = torch.diag_embed(p) - p[..., :, None] * p[..., None, :]
            half = torch.einsum("npcd,npdj,np->npcj", middle, J, there)
            return J.flatten(0, 2).mT @ half.flatten(0, 2)
        if kind == "fisher":  # every label of every token, as often as the model says
            g = torch.einsum("npkc,npci->npki", p[..., None, :] - torch.eye(p.shape[2]).double(), J)
            weighted = g * (p * there[..., None])[..., None]
            return g.flatten(0, 2).mT @ weighted.flatten(0, 2)
        found = torch.zeros(self.size, self.size).double()
        for y in labels:
            g = self.scores(y)
            found += g.mT @ g / len(labels)
        return found

    def matrix(self, kind: Kind, drawn: list[Tensor]) -> Tensor:
        """In the scale of the mean per token; EF is of gradients in that scale, and mean over N."""
        if kind == "hessian":
            return self.hessian / self.tokens
        if kind == "pi":
            return self.matrix("hessian", drawn) - self.matrix("ggn", drawn)
        if kind == "ef-token":  # each place's own loss, mean over the counted places
            slopes = grad(lambda z: self.loss(z, self.y))(self.z)
            rows = torch.einsum("npc,npci->npi", slopes, self.jacobian).flatten(0, 1)
            return rows.mT @ rows / self.tokens
        if kind == "ef":
            return self.second_moments(kind, [self.y]) * len(self.y) / self.tokens**2
        return self.second_moments(kind, drawn) / self.tokens


class Plainly(TorchFunctionMode):
    """Layer norm and SiLU by sums and products, the latter as torch has no forward derivative of
    its backward pass.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return PLAIN.get(func, func)(*args, **(kwargs or {}))


def plain_norm(x: Tensor, shape: object, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() * weight + bias


PLAIN: dict[Any, Callable[..., Tensor]] = {
    F.layer_norm: plain_norm,
    F.silu: lambda x, inplace=False: x * x.sigmoid(),
}


class Theirs(nn.Module):
    """One argument, and outputs [N, C, P] as torch's losses take them."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Batch) -> Tensor:
        with Plainly():
            z: Tensor = self.model(**batch).logits
        return z.movedim(-1, 1)


def peers(model: nn.Module, batch: Batch, kind: Kind, tokens: int) -> Tensor:
    """curvlinops' operator on the identity, per token."""
    operators = {
        "ggn": curvlinops.GGNLinearOperator,
        "hessian": curvlinops.HessianLinearOperator,
    }
    parameters = list(model.parameters())
    operator = operators[kind](
        Theirs(model),
        nn.CrossEntropyLoss(reduction="sum", ignore_index=IGNORED),
        parameters,
        [(inputs_of(batch), batch["labels"])],
        check_deterministic=False,
        batch_size_fn=lambda x: len(next(iter(x.values()))),
    )
    with sdpa_kernel(SDPBackend.MATH):
        columns = [
            operator @ some
            for some in torch.eye(sum(p.numel() for p in parameters)).double().split(64, 1)
        ]
    return torch.cat(columns, 1) / tokens


# ----------------------------------------------------------------------
# the comparison

COLUMNS = ("gradient", *KINDS, "curvlinops GGN", "curvlinops Hessian")


class Row:
    """What was found of one model."""

    def __init__(self, name: str) -> None:
        self.name, self.errors, self.said = name, dict[str, float](), list[str]()
        start = time.process_time()
        model, batch = build(name)
        self.reference = reference = Reference(model, batch)
        objective = self._objective(model)
        places = objective.layout.places()
        self.order = torch.cat([places[key].flatten() for key in reference.weights])
        self.blocks = len(objective.blocks)
        whole: dict[str, Tensor] = {}
        for kind in KINDS:
            drawn = self._drawn(objective) if kind == "fisher-mc" else []
            truth = reference.matrix(kind, drawn)
            whole[kind] = truth
            self.errors[kind] = self._compare(model, batch, kind, truth)
        seen = objective.closure(batch).observe().gradients
        flat = torch.cat([seen[b.name].flatten() for b in objective.blocks])[self.order]
        true = reference.scores(reference.y).sum(0) / reference.tokens
        self.errors["gradient"] = float((flat - true).norm() / true.norm())
        if curvlinops is not None:
            for kind, column in (("ggn", "curvlinops GGN"), ("hessian", "curvlinops Hessian")):
                try:
                    found = peers(model, batch, kind, reference.tokens)
                except Exception as error:
                    self.said.append(f"{column}: {str(error).splitlines()[0]}")
                    continue
                ours = self._matrix(model, batch, kind)
                self.errors[column] = float((ours - found).norm() / found.norm())
        self.said += reference.refused
        self.seconds = time.process_time() - start

    @staticmethod
    def _objective(model: nn.Module) -> cl.Objective:
        return cl.Objective(model, cl.likelihoods.Categorical(axis=-1, per="token"), seed=0)

    def _drawn(self, objective: cl.Objective) -> list[Tensor]:
        """The labels of the first closure."""
        generator = objective.generator(1, "exact", 0)
        batch, shape = self.reference.batch, self.reference.y.shape
        z, y = self.reference.z.reshape(*batch["labels"].shape, -1), batch["labels"]
        return [objective.likelihood.sample(z, generator, y).view(shape) for _ in range(DRAWS)]

    def _matrix(self, model: nn.Module, batch: Batch, kind: Kind) -> Tensor:
        """The whole, in the model's order."""
        draws = DRAWS if kind == "fisher-mc" else 1
        found = cl.exact.matrix(self._objective(model), batch, None, kind, None, draws=draws)
        return found.dense()[self.order][:, self.order]

    def _compare(self, model: nn.Module, batch: Batch, kind: Kind, truth: Tensor) -> float:
        """The largest error of the blocks, the whole, and products with three vectors."""
        of: Any = {"draws": DRAWS} if kind == "fisher-mc" else {}
        objective, back = self._objective(model), self.order.argsort()
        ours = truth[back][:, back]
        at = objective.layout.slices
        pairs = [
            (matrix.dense(), ours[at[block], at[block]])
            for block, matrix in cl.exact.matrices(objective, batch, None, kind, **of).items()
        ]
        v = torch.randn(len(truth), 3, dtype=torch.float64)
        product: Any = cl.exact.product(self._objective(model), batch, None, kind, **of)
        pairs += [(self._matrix(model, batch, kind), truth), (product @ v, ours @ v)]
        return largest_error(pairs, float(truth.norm()))

    @property
    def worst(self) -> float:
        return max(self.errors.values())

    @property
    def cells(self) -> list[str]:
        found = [f"{self.errors[c]:.0e}" if c in self.errors else "–" for c in COLUMNS]
        return [self.name, f"{self.reference.size:,d}", str(self.blocks), *found]


def markdown(rows: list[Row]) -> str:
    def line(cells: Iterable[str]) -> str:
        return "| " + " | ".join(cells) + " |"

    headings = ("model", "parameters", "blocks", *COLUMNS)
    worst = max(row.worst for row in rows)
    parts = [
        "# Matrices of models of transformers",
        f"`python analyses/transformers_matrices.py`, {versions()}, float64."
        f" {len(rows)} models, largest relative error {worst:.0e},"
        f" {sum(row.seconds for row in rows):.0f} CPU seconds.",
        "Batches with padding, masks and labels −100, mean per token. Of each kind the largest of"
        " all blocks, the whole matrix and products with three vectors, against `torch.func`;"
        " the last two columns are the whole matrix against curvlinops' operators.",
        "\n".join([line(headings), line(["---"] * len(headings)), *(line(r.cells) for r in rows)]),
    ]
    said = [f"- {row.name}, {text}" for row in rows for text in row.said]
    if said:
        parts += ["Refused, and taken by autograd one row at a time, or left out:", "\n".join(said)]
    return "\n\n".join(parts) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=" ".join(__doc__.split("\n\n")[0].split()))
    parser.add_argument("--only", nargs="+", metavar="NAME", help="only these models")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "figures")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    tf.logging.set_verbosity_error()
    unknown = [name for name in options.only or [] if name not in MODELS]
    if unknown:
        parser.error(f"unknown: {', '.join(unknown)} (known: {', '.join(MODELS)})")
    rows = []
    for name in options.only or MODELS:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            rows.append(Row(name))
        print(f"{name}: {rows[-1].worst:.0e} at most, {rows[-1].seconds:.0f} s", flush=True)
    print(markdown(rows))
    if not options.only:
        options.out.mkdir(parents=True, exist_ok=True)
        path = options.out / "transformers_matrices.md"
        path.write_text(markdown(rows), encoding="utf-8")
    return int(any(row.worst > THRESHOLD for row in rows))


if __name__ == "__main__":
    sys.exit(main())
