"""PROBLEMS: the documents' networks on their data, and small stand-ins for a smoke run.

Such a one is a narrow network of the same kind on random numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import nn

from curvlab import models
from curvlab.datasets import Dataset
from curvlab.errors import CurvlabError, lookup
from curvlab.likelihoods import LIKELIHOODS
from curvlab.networks import Shape
from curvlab.objective import Objective
from curvlab.problem import Problem

Small = tuple[Callable[[], nn.Module], Shape, int]
"""A narrow network, the shape of its input, its number of outputs."""


def _vgg() -> nn.Module:
    convolution = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(4)
    return nn.Sequential(*convolution, nn.Flatten(), nn.Linear(16, 10))


def _resnet() -> nn.Module:
    return models.residual_network(
        (3, 8, 8),
        10,
        (4, 6),
        1,
        lambda fan_in, fan_out, stride: models.PaddedShortcut(fan_out, stride),
    )


def _convnet() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(4), nn.Flatten(), nn.Linear(16, 10)
    )


AUTOENCODER: Small = lambda: models.autoencoder([12, 8, 3, 8, 12]), (12,), 12
VGG: Small = _vgg, (3, 8, 8), 10
RESNET: Small = _resnet, (3, 8, 8), 10
CONVNET: Small = _convnet, (3, 8, 8), 10


def _sigmoid(*widths: int) -> Small:
    return lambda: models.mlp(widths, nn.Sigmoid), (widths[0],), widths[-1]


@dataclass(frozen=True)
class PublishedProblem:
    """A network of MODELS, its data, and its stand-in for a smoke run.

    `part` is a data set with fewer examples, which a budget below the document's takes where it is
    there.
    """

    model: str
    data: str
    small: Small
    part: str | None = None

    def load(self, part: bool, examples: int | None, tests: int | None) -> tuple[Dataset, Dataset]:
        """Return (training, test) examples: the first so many of them.

        Args:
            part: whether to take `part` of the data where that is there.
            examples: of training; all where None.
            tests: of the test data; all where None.
        """
        try:
            found = Problem(
                model=self.model, data=self.part if part and self.part else self.data
            ).parts
        except CurvlabError:
            if not (part and self.part):
                raise
            found = Problem(model=self.model, data=self.data).parts
        return _first(found[0], examples), _first(found[1], tests)

    def objective(self, train: Dataset, seed: int, device: str, l2: float) -> Objective:
        """Return the objective of the network on the device, fitted to the shapes of these data."""
        problem = Problem(model=self.model, data=self.data, l2=l2, seed=seed, device=device)
        return problem.fitted_to((train, train)).objective()

    def smoke(self, seed: int, l2: float) -> tuple[Objective, Dataset]:
        """Return the narrow network's objective, and 64 examples of random numbers."""
        build, shape, outputs = self.small
        chance, kind = torch.Generator().manual_seed(seed), models.find(self.model).likelihood
        x = torch.rand(64, *shape, generator=chance)
        targets = {
            "bernoulli": lambda: x if outputs > 1 else (x.mean(1, keepdim=True) > 0.5).float(),
            "gaussian": lambda: x,
            "categorical": lambda: torch.randint(outputs, (64,), generator=chance),
        }
        with models.seeded(seed):
            model = build()
        return Objective(model, LIKELIHOODS[kind](), seed, l2=l2), Dataset(
            "random", x, targets[kind](), "random numbers"
        )


def _first(data: Dataset, count: int | None) -> Dataset:
    if count is None or count >= len(data):
        return data
    x = data.x[:count]
    return replace(
        data, name=f"{data.name}[:{count}]", x=x, y=x if data.y is data.x else data.y[:count],
        description=f"the first {count:,} examples of: {data.description}",
    )  # fmt: skip


PROBLEMS: dict[str, PublishedProblem] = {
    "MNIST": PublishedProblem("mnist-ae", "mnist-ae", AUTOENCODER),
    "FACES": PublishedProblem("faces-ae", "faces", AUTOENCODER),
    "CURVES": PublishedProblem("curves-ae", "curves", AUTOENCODER),
    "CURVES, 1000": PublishedProblem("curves-ae-1000", "curves", AUTOENCODER),
    "FACES, 1000": PublishedProblem("faces-ae-1000", "faces", AUTOENCODER),
    "MNIST classes": PublishedProblem("mnist-500", "mnist-standard", _sigmoid(12, 8, 10)),
    "CIFAR classes": PublishedProblem(
        "cifar-400", "cifar10-standard", _sigmoid(12, 8, 8, 10), "cifar10-subset-standard"
    ),
    "webspam": PublishedProblem("webspam-400", "webspam", _sigmoid(12, 8, 8, 1)),
    "a9a in webspam's place": PublishedProblem("a9a-400", "a9a-standard", _sigmoid(12, 8, 8, 1)),
    "VGG16, CIFAR-10": PublishedProblem("vgg16", "cifar10", VGG, "cifar10-subset"),
    "VGG16, CIFAR-100": PublishedProblem("vgg16", "cifar100", VGG),
    "ResNet32, CIFAR-10": PublishedProblem("resnet32", "cifar10", RESNET, "cifar10-subset"),
    "ResNet32, CIFAR-100": PublishedProblem("resnet32", "cifar100", RESNET),
    "ResNet32-4, CIFAR-10": PublishedProblem("resnet32-4", "cifar10", RESNET, "cifar10-subset"),
    "ResNet32-4, CIFAR-100": PublishedProblem("resnet32-4", "cifar100", RESNET),
    "All-CNN-C, CIFAR-10": PublishedProblem("all-cnn-c", "cifar10", CONVNET, "cifar10-subset"),
    "All-CNN-C, CIFAR-100": PublishedProblem("all-cnn-c", "cifar100", CONVNET),
    "VGG16 as printed, CIFAR-10": PublishedProblem(
        "vgg16-printed", "cifar10", CONVNET, "cifar10-subset"
    ),
    "VGG16 as printed, CIFAR-100": PublishedProblem("vgg16-printed", "cifar100", CONVNET),
    "ConvNet, CIFAR-10": PublishedProblem("convnet", "cifar10", CONVNET, "cifar10-subset"),
    "ResNet-18, CIFAR-10": PublishedProblem("resnet18", "cifar10", RESNET, "cifar10-subset"),
}
"""{how figures call it: problem}"""


def find_problem(name: str) -> PublishedProblem:
    """Return the entry of PROBLEMS by its name.

    Raises:
        CurvlabError: an unknown name.
    """
    return lookup(PROBLEMS, name, "problem")
