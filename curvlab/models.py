"""MODELS: the documents' networks by name, and the user's own by import path.

Each has its data set, likelihood and source. A network is built for its own data set, or, where it
is `sized`, for the shape of another one's inputs and its number of outputs. `curvlab.networks` and
`curvlab.sequence_networks` have the functions that build them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from torch import nn

from curvlab import moved
from curvlab.errors import CurvlabError, lookup, whole
from curvlab.networks import (
    VGG16,
    PaddedShortcut,
    ResidualBlock,
    Shape,
    SparseLinear,
    all_cnn_c,
    autoencoder,
    autoencoder_1000,
    convnet,
    logistic,
    logistic_sparse,
    mlp,
    residual_network,
    resnet18,
    resnet32,
    resnet32_4,
    vgg16,
    vgg16_printed,
)
from curvlab.own_models import OwnModel, call_own, import_own
from curvlab.own_models import seeded as seeded
from curvlab.sequence_networks import GPT, LSTM, ViT, gpt_small, gpt_tiny, lstm_tiny, vit_tiny

__all__ = [
    "CURVES_AE",
    "FACES_AE",
    "GPT",
    "LSTM",
    "MNIST_AE",
    "MODELS",
    "VGG16",
    "ComparisonDefaults",
    "ModelEntry",
    "PaddedShortcut",
    "ResidualBlock",
    "Shape",
    "Sized",
    "SparseLinear",
    "ViT",
    "all_cnn_c",
    "autoencoder",
    "autoencoder_1000",
    "build",
    "convnet",
    "find",
    "gpt_small",
    "gpt_tiny",
    "imported",
    "logistic",
    "logistic_sparse",
    "lstm_tiny",
    "mlp",
    "residual_network",
    "resnet18",
    "resnet32",
    "resnet32_4",
    "vgg16",
    "vgg16_printed",
    "vit_tiny",
]


@dataclass(frozen=True, kw_only=True)
class ComparisonDefaults:
    """Defaults of `curvlab compare` on a network: its size and its end.

    Args:
        batch_size: examples in a minibatch.
        steps: where neither steps nor epochs are given.
        warm: minibatches of the warm start at most; None: one pass over the data (thesis 4.7.2).
        refresh_every: T₂, steps between inversions.
        damping: overall λ.
    """

    damping: float = 1e-3
    batch_size: int = 1000
    steps: int = 300
    warm: int | None = None
    refresh_every: int = 1


@dataclass(frozen=True)
class ModelEntry:
    """A network, and the problem that it belongs to.

    `build()` makes it for its own data set; where it is `sized`, `build(inputs, outputs)` makes it
    for inputs of that shape and so many outputs.
    """

    summary: str
    build: Callable[..., nn.Module]
    data: str | None
    likelihood: str
    source: str = "yours"
    sized: bool = False
    comparison: ComparisonDefaults = ComparisonDefaults()

    def made(self, seed: int = 0, data: Sized | None = None) -> nn.Module:
        """Return a model with weights drawn from `seed`, on the CPU in float32.

        The global generator is left as it was.

        Args:
            seed: of the weights.
            data: a data set other than the model's own, to whose shapes a `sized` network is
                fitted.
        """
        with seeded(seed):
            if isinstance(self.build, OwnModel):
                return self.build.made(seed)
            return (
                self.build(data.inputs, data.outputs)
                if self.sized and data is not None
                else self.build()
            )

    def data_name(self, chosen: str | None = None) -> str:
        """Return the data set to take: the one chosen, else the network's own.

        Raises:
            CurvlabError: there is neither.
        """
        if chosen or self.data:
            return chosen or str(self.data)
        raise CurvlabError(
            f"{self.summary} names no data set: choose one with --data, or return (module,"
            " likelihood, data set)"
        )


MNIST_AE = (784, 1000, 500, 250, 30, 250, 500, 1000, 784)
FACES_AE = (625, 2000, 1000, 500, 30, 500, 1000, 2000, 625)
CURVES_AE = (784, 400, 200, 100, 50, 25, 6, 25, 50, 100, 200, 400, 784)
"""Widths of thesis Table 2.4."""

MODELS: dict[str, ModelEntry] = {
    "mlp-256-20": ModelEntry(
        "256-20-20-20-20-20-10 tanh, the six layers that Figure 4.1 was run on",
        lambda: mlp([256, 20, 20, 20, 20, 20, 10]),
        "mnist16",
        "categorical",
        "practice",
    ),
    "mlp-256-20-printed": ModelEntry(
        "256-20-20-20-20-10 tanh, the five layers that thesis 4.3.4 prints",
        lambda: mlp([256, 20, 20, 20, 20, 10]),
        "mnist16",
        "categorical",
        "thesis 4.3.4",
    ),
    "mnist-ae": ModelEntry(
        "784-1000-500-250-30-… ReLU autoencoder",
        lambda: autoencoder(MNIST_AE),
        "mnist-ae",
        "bernoulli",
        "thesis Table 2.4; S2QN 6.2",
    ),
    "curves-ae": ModelEntry(
        "784-400-200-100-50-25-6-… ReLU autoencoder",
        lambda: autoencoder(CURVES_AE),
        "curves",
        "bernoulli",
        "thesis Table 2.4",
    ),
    "faces-ae": ModelEntry(
        "625-2000-1000-500-30-… ReLU autoencoder",
        lambda: autoencoder(FACES_AE),
        "faces",
        "gaussian",
        "thesis Table 2.4",
    ),
    "curves-ae-1000": ModelEntry(
        "D-1000-500-250-30-… ReLU autoencoder",
        autoencoder_1000,
        "curves",
        "bernoulli",
        "S2QN 6.2",
        sized=True,
    ),
    "faces-ae-1000": ModelEntry(
        "D-1000-500-250-30-… ReLU autoencoder",
        lambda inputs=(625,), outputs=625: autoencoder_1000(inputs, outputs),
        "faces",
        "gaussian",
        "S2QN 6.2",
        sized=True,
    ),
    "logistic": ModelEntry(
        "logistic regression without a bias", logistic, "a9a", "bernoulli", "S2QN (26)", sized=True
    ),
    "logistic-sparse": ModelEntry(
        "the same on rows that may be sparse tensors",
        logistic_sparse,
        "news20",
        "bernoulli",
        "S2QN (26)",
        sized=True,
    ),
    "mnist-500": ModelEntry(
        "784-500-10 sigmoid",
        lambda: mlp([784, 500, 10], nn.Sigmoid),
        "mnist-standard",
        "categorical",
        "thesis 5.8",
    ),
    "cifar-400": ModelEntry(
        "3072-400-400-10 sigmoid",
        lambda: mlp([3072, 400, 400, 10], nn.Sigmoid),
        "cifar10-standard",
        "categorical",
        "thesis 5.8",
    ),
    "webspam-400": ModelEntry(
        "254-400-400-1 sigmoid",
        lambda: mlp([254, 400, 400, 1], nn.Sigmoid),
        "webspam",
        "bernoulli",
        "thesis 5.8",
    ),
    "a9a-400": ModelEntry(
        "123-400-400-1 sigmoid: webspam-400 on fewer features",
        lambda: mlp([123, 400, 400, 1], nn.Sigmoid),
        "a9a-standard",
        "bernoulli",
        "thesis 5.8, other data",
    ),
    "convnet": ModelEntry(
        "three convolutions and a linear layer; widths not published",
        convnet,
        "cifar10",
        "categorical",
        "S2QN 6.3",
        sized=True,
    ),
    "all-cnn-c": ModelEntry(
        "nine convolutions, no pooling",
        all_cnn_c,
        "cifar10",
        "categorical",
        "Ren and Goldfarb 2021, B.2",
        sized=True,
    ),
    "vgg16": ModelEntry(
        "model D with batch normalisation and one linear layer",
        vgg16,
        "cifar10",
        "categorical",
        "thesis 3.7.2",
        sized=True,
    ),
    "vgg16-printed": ModelEntry(
        "model D as printed: three linear layers, no batch normalisation",
        vgg16_printed,
        "cifar10",
        "categorical",
        "Ren and Goldfarb 2021, B.2",
        sized=True,
    ),
    "resnet32": ModelEntry(
        "ResNet-32 of 16, 32, 64 channels",
        resnet32,
        "cifar10",
        "categorical",
        "thesis 3.7.2",
        sized=True,
    ),
    "resnet32-4": ModelEntry(
        "ResNet-32 four times as wide",
        resnet32_4,
        "cifar10",
        "categorical",
        "thesis 3.7.3",
        sized=True,
    ),
    "resnet18": ModelEntry(
        "ResNet-18 for 32×32 images", resnet18, "cifar10", "categorical", "S2QN 6.4", sized=True
    ),
    "gpt-tiny": ModelEntry(
        "transformer of two layers, width 32, 4 heads; T = 32, tied head",
        gpt_tiny,
        "shakespeare32",
        "tokens",
        "curvlab, after Radford et al. 2019",
        sized=True,
        comparison=ComparisonDefaults(
            damping=0.01, batch_size=32, steps=20, warm=20, refresh_every=2
        ),
    ),
    "gpt-small": ModelEntry(
        "transformer of four layers, width 128, 4 heads, no biases; T = 64, tied head",
        gpt_small,
        "shakespeare",
        "tokens",
        "Karpathy 2022",
        sized=True,
        comparison=ComparisonDefaults(
            damping=0.1, batch_size=12, steps=20, warm=20, refresh_every=2
        ),
    ),
    "vit-tiny": ModelEntry(
        "vision transformer of two layers, width 32, 4 heads; patches of 4×4, mean over places",
        vit_tiny,
        "mnist",
        "categorical",
        "curvlab, after Dosovitskiy et al. 2021",
        sized=True,
    ),
    "lstm-tiny": ModelEntry(
        "embedding, one LSTM layer and a linear head of width 32",
        lstm_tiny,
        "shakespeare32",
        "tokens",
        "curvlab, after Hochreiter and Schmidhuber 1997",
        sized=True,
    ),
}


class Sized(Protocol):
    """The shapes that a model is built for: a `Dataset`, or anything else that says them."""

    @property
    def inputs(self) -> Shape:
        """The shape of one input, without the axis of examples."""

    @property
    def outputs(self) -> int:
        """The number of outputs that a model needs."""


def find(name: str, seed: int = 0) -> ModelEntry:
    """Return the entry of `name`: of the table, or `module:function` of your own.

    Your function takes nothing and returns an `nn.Module`, or (module, likelihood name, data set
    name); a module alone is given the categorical likelihood. The working directory is searched
    too. The function is called once here, under `seed`, to learn the names; the first model of that
    seed (`ModelEntry.made`) is the one that it returned then.

    Raises:
        CurvlabError: an unknown name; a module or function that cannot be imported, fails, or
            returns something else.
    """
    if not isinstance(name, str) or ":" not in name:
        return lookup(MODELS, name, "model")
    function = import_own(name)
    with seeded(whole("the seed", seed, 0)):
        first, likelihood, data = call_own(function, name)
    return ModelEntry(f"model '{name}'", OwnModel(function, name, seed, [first]), data, likelihood)


def imported(name: str) -> None:
    """Import the module of a model of your own; nothing is called.

    It may enter probes and algorithms of yours.

    Raises:
        CurvlabError: an unknown name; a module that cannot be imported.
    """
    if isinstance(name, str) and ":" in name:
        import_own(name)
    else:
        find(name)


def build(name: str, seed: int = 0, data: Sized | None = None) -> nn.Module:
    """Build model `name` with weights drawn from `seed`, on the CPU in float32.

    The global generator is left as it was.

    Args:
        name: of the table, or `module:function` of your own (`find`), which is called once.
        seed: of the weights.
        data: a data set other than the model's own, to whose shapes a `sized` network is fitted.

    Raises:
        CurvlabError: an unknown name, or a function of yours that does not work.
    """
    return find(name, seed).made(whole("the seed", seed, 0), data)


if not TYPE_CHECKING:  # to a type checker the old names are gone
    __getattr__ = moved.old_names(__name__)
