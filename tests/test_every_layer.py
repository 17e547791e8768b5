"""Every class of `torch.nn` that holds parameters, inside a small model, against plain autograd one
example at a time.

The classes are enumerated, so that one without an example fails by name. N examples, T places
(tokens, pixels, steps) where a layer has places: as many as examples, which confuses one axis with
the other, and not. Train and eval mode.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from _pytest.mark import ParameterSet
from plain import Laid, Named, Plain, gaps
from torch import Tensor, nn

import curvlab as cl
from curvlab.algorithms import ALGORITHMS
from curvlab.errors import CurvlabError
from curvlab.likelihoods import Categorical
from curvlab.observation import Observation

pytestmark = pytest.mark.filterwarnings(
    "ignore::curvlab.errors.CurvlabWarning", "ignore::UserWarning"
)

N, CLASSES, SYMBOLS = 4, 3, 5
PLACES = {"N=T": 4, "N≠T": 6}

NORMALISES, DROPS = r"normalises over the batch", r"drops units at random|draws random numbers"
"""What `cl.exact` says of a model whose examples have no loss of their own."""

OPTIMIZERS = {
    "sgd-m": {"lr": 0.1, "momentum": 0.0},
    "adam": {},
    "kfac": {"damping": 0.1},
    "k-bfgs": {"damping": 0.1},
    "tnt": {"damping": 0.1},
    "shampoo": {"damping": 0.1},
    "smw-ng": {"damping": 1.0},
    "hf": {"damping": 1.0},
    "lbfgs": {"damping": 1.0},
    "skqn-l": {},
    "block-fisher": {"damping": 0.1},
    "s4qn": {},
}
"""One of each family."""


# ------------------------------------------------------------------------------------------------
# the classes

CONTAINERS = {
    "Container",
    "DataParallel",
    "Module",
    "ModuleDict",
    "ModuleList",
    "ParameterDict",
    "ParameterList",
    "Sequential",
}
"""Hold what they are given."""

BASES = {"RNNBase": "RNN, LSTM, GRU", "RNNCellBase": "RNNCell, LSTMCell, GRUCell"}
"""Have no forward of their own; their subclasses are here."""

ARGUMENTS: dict[str, Any] = {
    **dict.fromkeys(
        [
            "in_features",
            "out_features",
            "in_channels",
            "out_channels",
            "num_channels",
            "num_features",
        ],
        4,
    ),
    **dict.fromkeys(
        ["embed_dim", "d_model", "num_embeddings", "normalized_shape", "n_classes", "num_classes"],
        4,
    ),
    **dict.fromkeys(
        [
            "in1_features",
            "in2_features",
            "input_size",
            "hidden_size",
            "embedding_dim",
            "size",
            "output_size",
        ],
        2,
    ),
    **dict.fromkeys(
        [
            "num_heads",
            "nhead",
            "num_groups",
            "groups",
            "kernel_size",
            "upscale_factor",
            "downscale_factor",
        ],
        2,
    ),
    **dict.fromkeys(["num_layers", "dim", "padding"], 1),
    **dict.fromkeys(["value", "threshold", "norm_type"], 1.0),
    "cutoffs": [2],
    "unflattened_size": (2, 2),
}
"""{argument that a class must be given: a value}."""


OTHERS: dict[str, Callable[[], dict[str, Any]]] = {
    **dict.fromkeys(["RNN", "LSTM", "GRU"], lambda: {"input_size": 2, "hidden_size": 2}),
    **dict.fromkeys(
        ["FractionalMaxPool2d", "FractionalMaxPool3d"], lambda: {"kernel_size": 2, "output_size": 2}
    ),
    "TransformerEncoder": lambda: {
        "encoder_layer": nn.TransformerEncoderLayer(4, 2),
        "num_layers": 1,
    },
    "TransformerDecoder": lambda: {
        "decoder_layer": nn.TransformerDecoderLayer(4, 2),
        "num_layers": 1,
    },
}
"""{class whose signature does not tell: its arguments}."""


def _instances(layer: type[nn.Module]) -> Iterator[nn.Module]:
    """As it comes, and with each switch turned."""
    known = inspect.signature(layer).parameters.values()
    given = {
        p.name: ARGUMENTS[p.name] for p in known if p.name in ARGUMENTS and p.default is p.empty
    }
    given = OTHERS.get(layer.__name__, lambda: given)()
    for turned in ({}, *({p.name: not p.default} for p in known if isinstance(p.default, bool))):
        try:
            yield layer(**given, **turned)
        except (
            ValueError,
            AssertionError,
            RuntimeError,
        ):  # a switch that does not go with the rest
            if not turned:
                raise


def layers_with_parameters() -> list[str]:
    """Names of the public classes of `torch.nn` some of whose instances hold parameters."""
    found = []
    for name, layer in vars(nn).items():
        if (
            not inspect.isclass(layer)
            or not issubclass(layer, nn.Module)
            or name in CONTAINERS
            or name in BASES
        ):
            continue
        try:
            if any(len(list(instance.parameters())) for instance in _instances(layer)):
                found.append(name)
        except (TypeError, ValueError, AssertionError, RuntimeError) as error:
            raise AssertionError(
                f"torch.nn.{name} cannot be made: give ARGUMENTS what it asks for ({error})"
            ) from error
    return sorted(found)


def test_every_class_with_parameters_has_an_example() -> None:
    known = layers_with_parameters()
    assert "Linear" in known
    assert "InstanceNorm1d" in known  # affine by a switch only
    assert "LazyLinear" in known
    assert [name for name in known if not EXAMPLES.get(name)] == []
    assert [name for name in EXAMPLES if name not in known and hasattr(nn, name)] == []


def test_bases_are_bases() -> None:
    for name in BASES:
        assert "forward" not in vars(getattr(nn, name))


# ------------------------------------------------------------------------------------------------
# models around a layer

Use = Callable[[Any, Tensor], Tensor]
"""Of a layer, of whose parts mypy knows nothing."""


@dataclass(frozen=True)
class Example:
    """A model of T places and its inputs [N, T, …]; what `cl.exact` says of it in either mode ("":
    nothing, it is right).
    """

    build: Callable[[int], nn.Module]
    inputs: Callable[[int], Tensor]
    places: bool = True
    train: str = ""
    eval: str = ""
    twin: Use | None = None  # the same function, where torch has no second derivative of the layer
    # False: its gradient is no sum over examples by torch's own intent, so that only the mean's
    # counts
    alone: bool = True


class Around(nn.Module):
    """A linear layer before, one after, tanh between; `use` takes [N, …, into] and gives [N, …,
    out].
    """

    def __init__(
        self, layer: nn.Module, use: Use, into: int = 3, out: int = 3, before: bool = True
    ) -> None:
        super().__init__()
        self.before = nn.Linear(2, into) if before else None
        self.layer, self.after = layer, nn.Linear(out, CLASSES)
        self.use = use

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(
            self.use(self.layer, x if self.before is None else torch.tanh(self.before(x)))
        )
        return self.after(h if h.ndim == 2 else h.flatten(1, -2).mean(1))


def spatial(axes: int, T: int) -> tuple[int, ...]:
    """T places along that many axes."""
    return {0: (), 1: (T,), 2: (2, T // 2), 3: (1, 2, T // 2)}[axes]


def numbers(T: int, axes: int = 1) -> Tensor:
    return torch.randn(N, *spatial(axes, T), 2, dtype=torch.float64)


def symbols(T: int) -> Tensor:
    return torch.randint(SYMBOLS, (N, T))


def as_it_is(layer: nn.Module, h: Tensor) -> Tensor:
    return layer(h)


def channels_first(layer: nn.Module, h: Tensor) -> Tensor:
    """Contiguous, the gradient too: of one example with channels last in memory, torch 2.13's
    instance norm is wrong.
    """
    return torch.tanh(layer(h.movedim(-1, 1).contiguous())).flatten(2).mean(2)


def sequence_first(layer: nn.Module, h: Tensor) -> Tensor:
    return layer(h.transpose(0, 1)).transpose(0, 1)


def rows(layer: Callable[[Tensor], Tensor], h: Tensor) -> Tensor:
    """[N·T, F]."""
    return layer(h.flatten(0, 1)).unflatten(0, h.shape[:2])


def rows_of_places(layer: nn.Module, h: Tensor) -> Tensor:
    """[T·N, F]."""
    return rows(layer, h.transpose(0, 1)).transpose(0, 1)


def first(use: Use) -> Use:
    """The first of several results."""
    return lambda layer, h: use(lambda g: layer(g)[0], h)


def steps(layer: nn.Module, h: Tensor) -> Tensor:
    """A cell, from place to place."""
    state, seen = None, []
    for t in range(h.shape[1]):
        state = layer(h[:, t], state)
        seen.append(state[0] if isinstance(state, tuple) else state)
    return torch.stack(seen, 1)


def attending(layer: nn.Module, h: Tensor, order: int = 0, mask: str = "") -> Tensor:
    """h attends to itself; `order` is the batch's axis."""
    h = h.transpose(0, order)
    T = h.shape[1 - order]
    given: dict[str, Any] = {"need_weights": mask != "causal"}
    if mask == "causal":
        given["attn_mask"] = torch.ones(T, T, dtype=torch.bool).triu(1)
    if mask == "padding":
        given["key_padding_mask"] = (torch.arange(T) >= T - 1).expand(h.shape[order], T)
    return layer(h, h, h, **given)[0].transpose(0, order)


def attending_to_another(layer: nn.Module, h: Tensor) -> Tensor:
    """Keys of two features, values of one."""
    return layer(h, torch.sin(h[..., :2]), torch.cos(h[..., :1]))[0]


def decoding(layer: nn.Module, h: Tensor, order: int = 0) -> Tensor:
    """With itself as memory, bent."""
    h = h.transpose(0, order)
    return layer(h, torch.sin(2 * h)).transpose(0, order)


def losses_of_classes(layer: nn.Module, h: Tensor) -> Tensor:
    """The logarithms of the probabilities of all labels, from a layer that gives the loss at
    one.
    """
    return torch.stack([-layer(h, torch.full((len(h),), c)) for c in range(CLASSES)], 1)


def around(
    make: Callable[..., nn.Module],
    use: Use = as_it_is,
    into: int = 3,
    out: int = 3,
    axes: int = 1,
    **expected: Any,
) -> Example:
    """Of a layer on numbers; `make` may ask for T."""
    asks = "T" in inspect.signature(make).parameters

    def build(T: int) -> nn.Module:
        return Around(make(T=T) if asks else make(), use, into, out)

    return Example(build, partial(numbers, axes=axes), **{"places": axes > 0, **expected})


def of_symbols(make: Callable[[], nn.Module], use: Use = as_it_is, **expected: Any) -> Example:
    return Example(lambda T: Around(make(), use, out=3, before=False), symbols, **expected)


def convolutions(axes: int, kind: str) -> dict[str, Example]:
    """Kernels of 3 along every axis, as many places after as before; and with what changes the
    reading of a filter.
    """
    make, on = getattr(nn, f"{kind}{axes}d"), partial(around, use=channels_first, axes=axes)
    lazy, ins = kind.startswith("Lazy"), () if kind.startswith("Lazy") else (3,)
    found = {"padded": on(lambda: make(*ins, 2, 3, padding=1), out=2)}
    if not lazy:
        found["groups"] = on(lambda: make(4, 2, 3, padding=1, groups=2), into=4, out=2)
        found["strided"] = on(
            lambda: make(3, 2, (1,) * (axes - 1) + (2,), stride=2, bias=False), out=2
        )
        if "Transpose" not in kind:
            found["reflected"] = on(
                lambda: make(
                    3,
                    2,
                    3,
                    padding=(0,) * (axes - 1) + (1,) if axes < 2 else "same",
                    padding_mode="circular" if axes == 3 else "reflect",
                ),
                out=2,
            )
    return found


def batch_norms(axes: int, kind: str) -> dict[str, Example]:
    make, on = (
        getattr(nn, f"{kind}{axes}d"),
        partial(around, use=channels_first, axes=axes, train=NORMALISES),
    )
    ins = () if kind.startswith("Lazy") else (3,)
    found = {"channels": on(lambda: make(*ins))}
    if axes == 1:
        found["features"] = around(lambda: make(*ins), axes=0, train=NORMALISES)
    if ins:
        found["no statistics"] = on(lambda: make(3, track_running_stats=False), eval=NORMALISES)
    if ins and axes == 1:
        found["rows"] = on(lambda: make(3), use=rows)
        found["rows of places"] = on(lambda: make(3), use=rows_of_places)
    return found


def instance_norms(axes: int, kind: str) -> dict[str, Example]:
    make, on = getattr(nn, f"{kind}{axes}d"), partial(around, use=channels_first, axes=axes)
    ins = () if kind.startswith("Lazy") else (3,)
    found = {"affine": on(lambda: make(*ins, affine=True))}
    if ins:
        found["statistics"] = on(lambda: make(3, affine=True, track_running_stats=True))
    return found


def recurrent(make: Callable[..., nn.Module]) -> dict[str, Example]:
    return {
        "sequence first": around(lambda: make(3, 2), first(sequence_first), out=2),
        "batch first": around(lambda: make(3, 2, batch_first=True), first(as_it_is), out=2),
        "two ways": around(
            lambda: make(3, 2, num_layers=2, bidirectional=True, bias=False),
            first(sequence_first),
            out=4,
        ),
        "dropout": around(
            lambda: make(3, 2, num_layers=2, dropout=0.5), first(sequence_first), out=2, train=DROPS
        ),
    }


def transformers(make: Callable[..., nn.Module], use: Callable[..., Tensor]) -> dict[str, Example]:
    on = partial(around, into=4, out=4)
    return {
        "sequence first": on(lambda: make(4, 2, dropout=0.0), partial(use, order=1)),
        "batch first": on(
            lambda: make(4, 2, dropout=0.0, batch_first=True, norm_first=True, activation=F.gelu),
            use,
        ),
        "dropout": on(lambda: make(4, 1, batch_first=True), use, train=DROPS),
    }


def encoding(layer: nn.Module, h: Tensor, order: int = 0) -> Tensor:
    return layer(h.transpose(0, order)).transpose(0, order)


def encoder(width: int, heads: int, **options: Any) -> nn.Module:
    return nn.TransformerEncoder(
        nn.TransformerEncoderLayer(width, heads, 3, **options), 2, enable_nested_tensor=False
    )


def decoder(width: int, heads: int, **options: Any) -> nn.Module:
    return nn.TransformerDecoder(nn.TransformerDecoderLayer(width, heads, 3, **options), 1)


_HEAD = partial(around, into=4)

EXAMPLES: dict[str, dict[str, Example]] = {
    "Linear": {
        "features": around(lambda: nn.Linear(3, 3), axes=0),
        "tokens": around(lambda: nn.Linear(3, 3)),
        "pixels": around(lambda: nn.Linear(3, 3, bias=False), axes=2),
        "sequence first": around(lambda: nn.Linear(3, 3), sequence_first),
        "rows": around(lambda: nn.Linear(3, 3), rows),
        "rows of places": around(lambda: nn.Linear(3, 3), rows_of_places),
        "along places": around(lambda T: nn.Linear(T, 2), lambda layer, h: layer(h.mT).mT),
    },
    "Bilinear": {
        "features": around(
            lambda: nn.Bilinear(3, 3, 2), lambda layer, h: layer(h, torch.sin(h)), out=2, axes=0
        ),
        "tokens": around(
            lambda: nn.Bilinear(3, 3, 2), lambda layer, h: layer(h, torch.sin(h)), out=2
        ),
    },
    **{f"Conv{d}d": convolutions(d, "Conv") for d in (1, 2, 3)},
    **{f"ConvTranspose{d}d": convolutions(d, "ConvTranspose") for d in (1, 2, 3)},
    **{f"BatchNorm{d}d": batch_norms(d, "BatchNorm") for d in (1, 2, 3)},
    **{f"InstanceNorm{d}d": instance_norms(d, "InstanceNorm") for d in (1, 2, 3)},
    **{f"LazyConv{d}d": convolutions(d, "LazyConv") for d in (1, 2, 3)},
    **{f"LazyConvTranspose{d}d": convolutions(d, "LazyConvTranspose") for d in (1, 2, 3)},
    **{f"LazyBatchNorm{d}d": batch_norms(d, "LazyBatchNorm") for d in (1, 2, 3)},
    **{f"LazyInstanceNorm{d}d": instance_norms(d, "LazyInstanceNorm") for d in (1, 2, 3)},
    "LazyLinear": {"tokens": around(lambda: nn.LazyLinear(3))},
    "SyncBatchNorm": {
        "channels": around(lambda: nn.SyncBatchNorm(3), channels_first, train=NORMALISES)
    },
    "LayerNorm": {
        "tokens": around(lambda: nn.LayerNorm(3)),
        "sequence first": around(lambda: nn.LayerNorm(3), sequence_first),
        "all places": around(lambda T: nn.LayerNorm((T, 3))),
        "no bias": around(lambda: nn.LayerNorm(3, bias=False), rows_of_places),
    },
    "RMSNorm": {
        "tokens": around(lambda: nn.RMSNorm(3)),
        "rows of places": around(lambda: nn.RMSNorm(3), rows_of_places),
        "all places": around(lambda T: nn.RMSNorm((T, 3))),
    },
    "GroupNorm": {
        "channels": around(lambda: nn.GroupNorm(2, 4), channels_first, into=4, out=4),
        "features": around(lambda: nn.GroupNorm(2, 6), into=6, out=6, axes=0),
        "rows": around(lambda: nn.GroupNorm(1, 3), rows),
        "rows of places": around(lambda: nn.GroupNorm(1, 3), rows_of_places),
    },
    "Embedding": {
        "tokens": of_symbols(lambda: nn.Embedding(SYMBOLS, 3)),
        "sequence first": of_symbols(lambda: nn.Embedding(SYMBOLS, 3), sequence_first),
        "rows of places": of_symbols(lambda: nn.Embedding(SYMBOLS, 3), rows_of_places),
        "padding": of_symbols(lambda: nn.Embedding(SYMBOLS, 3, padding_idx=2)),
        "positions": around(
            lambda: nn.Embedding(7, 3), lambda layer, h: h * layer(torch.arange(h.shape[1]))
        ),
        "sparse": of_symbols(lambda: nn.Embedding(SYMBOLS, 3, sparse=True)),
        "by frequency": of_symbols(
            lambda: nn.Embedding(SYMBOLS, 3, scale_grad_by_freq=True), alone=False
        ),
        "of a greatest norm": of_symbols(
            lambda: nn.Embedding(SYMBOLS, 3, max_norm=0.5), alone=False
        ),
    },
    "EmbeddingBag": {
        "mean": of_symbols(
            lambda: nn.EmbeddingBag(SYMBOLS, 3), twin=lambda layer, x: layer.weight[x].mean(1)
        ),
        "sum": of_symbols(
            lambda: nn.EmbeddingBag(SYMBOLS, 3, mode="sum", padding_idx=1),
            twin=lambda layer, x: (layer.weight[x] * (x != 1)[..., None]).sum(1),
        ),
        "max": of_symbols(
            lambda: nn.EmbeddingBag(SYMBOLS, 3, mode="max"),
            twin=lambda layer, x: layer.weight[x].amax(1),
        ),
        "weighted": of_symbols(
            lambda: nn.EmbeddingBag(SYMBOLS, 3, mode="sum"),
            lambda layer, x: layer(x, per_sample_weights=torch.cos(x.double())),
            twin=lambda layer, x: (layer.weight[x] * torch.cos(x.double())[..., None]).sum(1),
        ),
        "offsets": of_symbols(
            lambda: nn.EmbeddingBag(SYMBOLS, 3),
            lambda layer, x: layer(x.flatten(), torch.arange(len(x)) * x.shape[1]),
            twin=lambda layer, x: layer.weight[x].mean(1),
        ),
    },
    "RNN": recurrent(nn.RNN),
    "GRU": recurrent(nn.GRU),
    "LSTM": {
        **recurrent(nn.LSTM),
        "projected": around(lambda: nn.LSTM(3, 3, proj_size=2), first(sequence_first), out=2),
    },
    "RNNCell": {"steps": around(lambda: nn.RNNCell(3, 2), steps, out=2)},
    "GRUCell": {"steps": around(lambda: nn.GRUCell(3, 2), steps, out=2)},
    "LSTMCell": {"steps": around(lambda: nn.LSTMCell(3, 2), steps, out=2)},
    "MultiheadAttention": {
        "sequence first": _HEAD(
            lambda: nn.MultiheadAttention(4, 2), partial(attending, order=1), out=4
        ),
        "batch first": _HEAD(
            lambda: nn.MultiheadAttention(4, 2, batch_first=True), attending, out=4
        ),
        "causal": _HEAD(
            lambda: nn.MultiheadAttention(4, 2), partial(attending, order=1, mask="causal"), out=4
        ),
        "padding": _HEAD(
            lambda: nn.MultiheadAttention(4, 1, bias=False),
            partial(attending, order=1, mask="padding"),
            out=4,
        ),
        "keys of their own": _HEAD(
            lambda: nn.MultiheadAttention(4, 2, kdim=2, vdim=1, batch_first=True),
            attending_to_another,
            out=4,
        ),
        "further keys": _HEAD(
            lambda: nn.MultiheadAttention(4, 2, add_bias_kv=True, add_zero_attn=True),
            partial(attending, order=1),
            out=4,
        ),
        "dropout": _HEAD(
            lambda: nn.MultiheadAttention(4, 2, dropout=0.3),
            partial(attending, order=1),
            out=4,
            train=DROPS,
        ),
    },
    "TransformerEncoderLayer": transformers(
        partial(nn.TransformerEncoderLayer, dim_feedforward=3), encoding
    ),
    "TransformerDecoderLayer": transformers(
        partial(nn.TransformerDecoderLayer, dim_feedforward=3), decoding
    ),
    "TransformerEncoder": transformers(encoder, encoding),
    "TransformerDecoder": transformers(decoder, decoding),
    "Transformer": transformers(
        partial(nn.Transformer, num_encoder_layers=1, num_decoder_layers=1, dim_feedforward=3),
        decoding,
    ),
    "PReLU": {
        "one": around(lambda: nn.PReLU()),
        "channels": around(lambda: nn.PReLU(3), channels_first),
        "features": around(lambda: nn.PReLU(3), axes=0),
        "rows": around(lambda: nn.PReLU(3), rows_of_places),
    },
    "AdaptiveLogSoftmaxWithLoss": {
        "features": around(
            lambda: nn.AdaptiveLogSoftmaxWithLoss(4, 5, [2, 3], div_value=2.0, head_bias=True),
            lambda layer, h: layer.log_prob(h),
            into=4,
            out=5,
            axes=0,
        ),
        "tokens": around(
            lambda: nn.AdaptiveLogSoftmaxWithLoss(4, 4, [2]),
            lambda layer, h: rows(layer.log_prob, h),
            into=4,
            out=4,
        ),
    },
    "LinearCrossEntropyLoss": {
        "features": around(
            lambda: nn.LinearCrossEntropyLoss(3, CLASSES, bias=True, reduction="none"),
            losses_of_classes,
            axes=0,
        ),
    },
}
"""{class of torch.nn: {variant: a model around it}}."""


# ------------------------------------------------------------------------------------------------
# cases


@dataclass(frozen=True)
class Case:
    model: nn.Module
    x: Tensor
    y: Tensor

    def objective(self) -> cl.Objective:
        return cl.Objective(self.model, Categorical())


def made(example: Example, T: int, mode: str) -> Case:
    """Weights, statistics and data from one seed; nothing that a fresh layer has equal stays
    equal.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model, x = example.build(T).double(), example.inputs(T)
        if any(isinstance(p, nn.UninitializedParameter) for p in model.parameters()):
            model(x)
        with torch.no_grad():
            for weight in model.parameters():
                if bool((weight == weight.flatten()[0]).all()):
                    weight.add_(torch.randn_like(weight), alpha=0.3)
            for name, buffer in model.named_buffers():
                if "running" in name:
                    buffer.uniform_(0.5, 2)
        return Case(model.train(mode == "train"), x, torch.arange(N) * 2 % CLASSES)


def case_of(name: str, variant: str, places: str, mode: str) -> tuple[Example, Case]:
    if not hasattr(nn, name):
        pytest.skip(f"this torch has no {name}")
    example = EXAMPLES[name][variant]
    return example, made(example, PLACES[places], mode)


def cases(only_first: bool = False) -> list[tuple[str, str, str]]:
    """(class, variant, places); what has no places once."""
    found: list[tuple[str, str, str]] = []
    for name, variants in EXAMPLES.items():
        for variant, example in list(variants.items())[: 1 if only_first else None]:
            found.extend(
                (name, variant, places) for places in PLACES if example.places or places == "N≠T"
            )
    return found


FAMILIES = ("sgd-m", "kfac", "k-bfgs", "tnt", "smw-ng", "block-fisher")
"""One of each family of methods."""


def in_short(found: list[tuple[str, str, str]], every: bool = True) -> list[ParameterSet]:
    """The first variant of every class in all its places (or where they are as many as examples),
    the others in one of them in turn; the rest are slow.
    """
    first = {name: next(iter(variants)) for name, variants in EXAMPLES.items()}
    turns = {
        each: i
        for i, each in enumerate(dict.fromkeys((name, variant) for name, variant, _ in found))
    }

    def slow(name: str, variant: str, places: str) -> bool:
        if len([c for c in found if c[:2] == (name, variant)]) == 1:
            return False
        if variant == first[name]:
            return not every and places != "N=T"
        return list(PLACES).index(places) != turns[name, variant] % len(PLACES)

    return [pytest.param(*case, marks=[pytest.mark.slow] if slow(*case) else []) for case in found]


layers = pytest.mark.parametrize(("name", "variant", "places"), in_short(cases()))
modes = pytest.mark.parametrize("mode", ["train", "eval"])


def mean_gradient(case: Case) -> Named:
    """By autograd; dropout draws what a step under the same seed draws."""
    torch.manual_seed(0)
    return Plain(case.model, case.x, case.y).mean_gradient


def scattered(objective: cl.Objective, observation: Observation) -> Named:
    return {
        n: g for b in objective.blocks for n, g in b.scatter(observation.gradients[b.name]).items()
    }


# ------------------------------------------------------------------------------------------------
# tests


@pytest.mark.thinned(2)
@layers
@modes
def test_the_mean_gradient_is_autograds(name: str, variant: str, places: str, mode: str) -> None:
    _, case = case_of(name, variant, places, mode)
    expected = mean_gradient(case)
    objective = case.objective()
    torch.manual_seed(0)
    found = scattered(objective, objective.closure(case.x, case.y).observe({"data"}))
    assert gaps(found, expected) == []


def vectors(block: Laid, weights: Mapping[str, Tensor]) -> Tensor:
    """Two random ones, which no wrong matrix passes; all unit vectors of a small block."""
    size = block.gather(weights).numel()
    if size <= 4:
        return torch.eye(size, dtype=torch.float64)
    return torch.randn(2, size, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def off(objective: cl.Objective, case: Case, plain: Plain, twin: Plain) -> list[str]:
    """What `cl.exact` has wrong."""
    said = [
        f"gradient of {gap}"
        for gap in gaps(cl.exact.gradients(objective, case.x, case.y), plain.gradients)
    ]
    for kind in ("ef", "ggn"):
        found = {
            n: m.dense() for n, m in cl.exact.matrices(objective, case.x, case.y, kind=kind).items()
        }
        said += [
            f"{kind} of block {g}"
            for g in gaps(found, {b.name: plain.matrix(kind, b) for b in objective.blocks})
        ]
    chosen = {b.name: vectors(b, plain.weights) for b in objective.blocks}
    try:
        hessians = cl.exact.matrices(objective, case.x, case.y, kind="hessian")
    except CurvlabError as error:
        if twin is plain or "\n" in str(error):
            raise
        return said
    found = {n: chosen[n] @ m.dense() for n, m in hessians.items()}
    expected = {b.name: twin.columns("hessian", b, chosen[b.name]) for b in objective.blocks}
    return said + [f"hessian of block {gap}" for gap in gaps(found, expected)]


@pytest.mark.thinned(6)
@pytest.mark.parametrize(
    ("name", "variant", "places"),
    in_short([c for c in cases() if EXAMPLES[c[0]][c[1]].alone], every=False),
)
def test_samples_and_matrices(name: str, variant: str, places: str) -> None:
    """Per-sample gradients; EF, GGN and Hessian of every block. Or one line where examples have no
    loss of their own.
    """
    plain = twin = None
    for mode in ("eval", "train"):
        example, case = case_of(name, variant, places, mode)
        objective = case.objective()
        if refusal := getattr(example, mode):
            refused(objective, case, refusal)
            continue
        if (
            plain is None or twin is None or next(case.model.buffers(), None) is not None
        ):  # a mode is nothing without statistics
            plain = twin = Plain(case.model, case.x, case.y)
            if example.twin is not None:
                other: Any = made(example, PLACES[places], mode)
                other.model.use = example.twin
                twin = Plain(other.model, case.x, case.y)
        said = off(objective, case, plain, twin)
        assert not said, "\n".join([mode, *said, *map(str, objective.blocks)])


def refused(objective: cl.Objective, case: Case, words: str) -> None:
    """By all of `cl.exact`, each in one line."""
    exact, x, y = cl.exact, case.x, case.y
    calls: list[Callable[[], object]] = [
        lambda: exact.gradients(objective, x, y),
        lambda: (
            exact.product(objective, x, y, "ggn")
            @ torch.ones(len(objective.layout), dtype=torch.float64)
        ),
        *(partial(exact.matrices, objective, x, y, kind=kind) for kind in ("ef", "ggn", "hessian")),
    ]
    for call in calls:
        with pytest.raises(CurvlabError, match=words) as error:
            call()
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", [name for name in EXAMPLES if name.startswith("Lazy")])
def test_a_lazy_layer_that_has_not_run_is_refused_in_one_line(name: str) -> None:
    model = EXAMPLES[name][next(iter(EXAMPLES[name]))].build(4).double()
    with pytest.raises(CurvlabError, match=r"(?i)lazy|uninitiali[sz]ed|no shape") as error:
        cl.Objective(model, Categorical())
    assert "\n" not in str(error.value)


def stepped() -> list[ParameterSet]:
    """Every class with sgd-m, whose step is known, and with one other family in turn; the rest are
    slow.
    """
    others = FAMILIES[1:]
    by_default = {
        (name, family)
        for i, name in enumerate(EXAMPLES)
        for family in ("sgd-m", others[i % len(others)])
    }
    return [
        pytest.param(
            name, optimizer, marks=[] if (name, optimizer) in by_default else [pytest.mark.slow]
        )
        for name in EXAMPLES
        for optimizer in OPTIMIZERS
    ]


@pytest.mark.parametrize(("name", "optimizer"), stepped())
def test_optimizers_step_along_autograds_gradient(name: str, optimizer: str) -> None:
    """In train mode. Those of the whole vector may refuse, in one line, a layer whose examples have
    no loss of their own.
    """
    variant = next(iter(EXAMPLES[name]))
    example, case = case_of(name, variant, "N≠T", "train")
    expected, old = (
        mean_gradient(case),
        {n: p.detach().clone() for n, p in case.model.named_parameters()},
    )
    objective = case.objective()
    stepping = cl.optimizer(optimizer, objective, **OPTIMIZERS[optimizer])
    closure: Any = objective.closure(case.x, case.y)
    seen: list[Observation] = []
    observe = closure.observe

    def watched(needs: Iterable[str], *args: Any, **options: Any) -> Observation:
        seen.append(observe(needs, *args, **options))
        if {"gradient", "data"} & set(needs) and len(seen) == 1:  # before anything has moved
            assert gaps(scattered(objective, seen[0]), expected) == []
        return seen[-1]

    closure.observe = watched
    if (ALGORITHMS[optimizer].whole and case.model.training and example.train) or example.twin:
        said = ""
        try:
            stepping.step(closure)
        except CurvlabError as error:
            said = str(error)
        assert "\n" not in said
        if said:
            return
    else:
        stepping.step(closure)
    assert seen
    new = {n: p.detach() for n, p in case.model.named_parameters()}
    assert all(bool(w.isfinite().all()) for w in new.values())
    if optimizer == "sgd-m":
        assert (
            gaps(
                new, {n: w - OPTIMIZERS["sgd-m"]["lr"] * expected[n] for n, w in old.items()}, 1e-12
            )
            == []
        )
    else:
        assert any(not torch.equal(new[n], w) for n, w in old.items())
