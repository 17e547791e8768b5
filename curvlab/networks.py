"""The documents' networks, each a function that builds it; `curvlab.models` has their table.

Weights are torch's default initialisation (the documents name none).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

Shape = tuple[int, ...]


def mlp(widths: Sequence[int], activation: Callable[[], nn.Module] = nn.Tanh) -> nn.Sequential:
    """Build linear layers of the given widths, an activation between them, and a linear output.

    The initialisation is torch's default.
    """
    layers: list[nn.Module] = []
    for i, (fan_in, fan_out) in enumerate(pairwise(widths)):
        layers += (
            [nn.Linear(fan_in, fan_out)] if i == 0 else [activation(), nn.Linear(fan_in, fan_out)]
        )
    return nn.Sequential(*layers)


def autoencoder(widths: Sequence[int]) -> nn.Sequential:
    """Build linear layers with ReLU between them (thesis Table 2.4).

    There is none after the middle layer (the code) and none after the last. The sigmoid that Table
    2.4 prints last belongs to the Bernoulli likelihood.
    """
    layers: list[nn.Module] = []
    for i, (fan_in, fan_out) in enumerate(pairwise(widths), 1):
        layers.append(nn.Linear(fan_in, fan_out))
        if i not in (len(widths) // 2, len(widths) - 1):
            layers.append(nn.ReLU())
    return nn.Sequential(*layers)


def autoencoder_1000(inputs: Shape = (784,), outputs: int = 784) -> nn.Sequential:
    """Build D-1000-500-250-30-250-500-1000-D (S2QN 6.2).

    That names no activation: it is ReLU as in the thesis.
    """
    return autoencoder([math.prod(inputs), 1000, 500, 250, 30, 250, 500, 1000, outputs])


def logistic(inputs: Shape = (123,), outputs: int = 1) -> nn.Linear:
    """Build logistic regression with the θ of S2QN (26), without a bias as there."""
    return nn.Linear(math.prod(inputs), outputs, bias=False)


class SparseLinear(nn.Linear):
    """A linear layer on rows that are a sparse tensor (COO).

    An output is one gather and one scatter-add. A product costs its nonzero entries, forward and
    back, and plain operations have all derivatives. It has no rule: a and h are never formed, and
    its weight is a block without structure.
    """

    def forward(self, x: Float[Tensor, "N I"]) -> Float[Tensor, "N O"]:
        """Return x Wᵀ, plus the bias if there is one: a dense tensor, also of sparse rows."""
        if not x.is_sparse:
            return super().forward(x)
        x = x.coalesce()  # itself, where it is
        rows, columns = x.indices()
        each = [
            w.new_zeros(len(x)).index_add(0, rows, x.values() * w.index_select(0, columns))
            for w in self.weight
        ]
        return torch.stack(each, 1) if self.bias is None else torch.stack(each, 1) + self.bias


def logistic_sparse(inputs: Shape = (62_061,), outputs: int = 1) -> SparseLinear:
    """Build the θ of S2QN (26) where the rows stay sparse (`SparseRows.coo`)."""
    return SparseLinear(math.prod(inputs), outputs, bias=False)


def convnet(inputs: Shape = (3, 32, 32), outputs: int = 10) -> nn.Sequential:
    """Build three 5×5 convolutions (32, 32, 64 channels), each with ReLU and 2×2 max-pooling.

    One linear layer follows.

    S2QN (Yang et al. 2021), 6.3 says "three convolutional layers followed by a fully-connected
    layer" and no more. Chosen once: the widths of cuda-convnet's small CIFAR-10 network, its
    pooling simplified.
    """
    layers: list[nn.Module] = []
    for fan_in, fan_out in pairwise((inputs[0], 32, 32, 64)):
        layers += [nn.Conv2d(fan_in, fan_out, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * 4 * 4, outputs))


def all_cnn_c(inputs: Shape = (3, 32, 32), outputs: int = 10) -> nn.Sequential:
    """Build All-CNN-C (Springenberg et al. 2015, table 1): nine convolutions with ReLU.

    The outputs are the mean over 6×6 places.

    Without that document's dropout, which Ren and Goldfarb (2021, B.2) do not mention and under
    which no batch is seen twice alike.
    """
    layers: list[nn.Module] = []
    at = inputs[0]
    for width, kernel, stride, padding in (
        (96, 3, 1, 1), (96, 3, 1, 1), (96, 3, 2, 1), (192, 3, 1, 1), (192, 3, 1, 1), (192, 3, 2, 1),
        (192, 3, 1, 0), (192, 1, 1, 0), (outputs, 1, 1, 0),
    ):  # fmt: skip
        layers += [nn.Conv2d(at, width, kernel, stride, padding), nn.ReLU()]
        at = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())


VGG16 = (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512, 0)
"""Channels of model D of Simonyan and Zisserman (2015), table 1; 0 is 2×2 max-pooling."""


def _vgg(at: int, normalised: bool) -> Iterator[nn.Module]:
    for width in VGG16:
        if not width:
            yield nn.MaxPool2d(2)
            continue
        yield nn.Conv2d(at, width, 3, padding=1)
        if normalised:
            yield nn.BatchNorm2d(width)
        yield nn.ReLU()
        at = width


def vgg16(inputs: Shape = (3, 32, 32), outputs: int = 10) -> nn.Sequential:
    """Build model D with batch normalisation, and one linear layer of 512 inputs (thesis 3.7.2).

    Batch normalisation follows each convolution.

    Convolutions keep their biases.
    """
    return nn.Sequential(*_vgg(inputs[0], normalised=True), nn.Flatten(), nn.Linear(512, outputs))


def vgg16_printed(inputs: Shape = (3, 32, 32), outputs: int = 10) -> nn.Sequential:
    """Build model D with its three linear layers, without batch normalisation and dropout.

    It is that of Ren and Goldfarb 2021, B.2.

    Their widths for images of 32×32 are not published: 4096 as in model D, the first with the 512
    inputs that are left.
    """
    ends = (
        nn.Linear(512, 4096),
        nn.ReLU(),
        nn.Linear(4096, 4096),
        nn.ReLU(),
        nn.Linear(4096, outputs),
    )
    return nn.Sequential(*_vgg(inputs[0], normalised=False), nn.Flatten(), *ends)


class PaddedShortcut(nn.Module):
    """Option A of He et al. (2016): every `stride`-th pixel, further channels zero.

    It has no parameter.
    """

    def __init__(self, channels: int, stride: int) -> None:
        super().__init__()
        self.channels, self.stride = channels, stride

    def forward(self, x: Float[Tensor, "N C H W"]) -> Float[Tensor, "N D h w"]:
        """Take every `stride`-th pixel both ways and add zero channels up to D = `channels`."""
        x = x[:, :, :: self.stride, :: self.stride]
        return F.pad(x, (0, 0, 0, 0, 0, self.channels - x.shape[1]))


class ResidualBlock(nn.Module):
    """Two 3×3 convolutions with batch normalisation, and a shortcut (He et al. 2016, figure 2)."""

    def __init__(self, fan_in: int, fan_out: int, stride: int, shortcut: nn.Module) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(fan_in, fan_out, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(fan_out)
        self.conv2 = nn.Conv2d(fan_out, fan_out, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(fan_out)
        self.shortcut = shortcut

    def forward(self, x: Float[Tensor, "N C H W"]) -> Float[Tensor, "N D h w"]:
        """Return ReLU(F(x) + shortcut(x)), F the two convolutions with a ReLU between."""
        h = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(h)) + self.shortcut(x))


def _padded(fan_in: int, fan_out: int, stride: int) -> nn.Module:
    return nn.Identity() if fan_in == fan_out and stride == 1 else PaddedShortcut(fan_out, stride)


def _projected(fan_in: int, fan_out: int, stride: int) -> nn.Module:
    """Build option B of He et al. (2016): a 1×1 convolution where the shape changes."""
    if fan_in == fan_out and stride == 1:
        return nn.Identity()
    return nn.Sequential(nn.Conv2d(fan_in, fan_out, 1, stride, bias=False), nn.BatchNorm2d(fan_out))


def residual_network(
    inputs: Shape,
    outputs: int,
    widths: Sequence[int],
    depth: int,
    shortcut: Callable[[int, int, int], nn.Module],
) -> nn.Sequential:
    """Build a 3×3 convolution, `depth` blocks of each width, the mean, and a linear layer.

    Blocks are at stride 2 where a later stage begins.
    """
    layers: list[nn.Module] = [
        nn.Conv2d(inputs[0], widths[0], 3, 1, 1, bias=False),
        nn.BatchNorm2d(widths[0]),
        nn.ReLU(),
    ]
    at = widths[0]
    for stage, width in enumerate(widths):
        for i in range(depth):
            stride = 2 if stage and i == 0 else 1
            layers.append(ResidualBlock(at, width, stride, shortcut(at, width, stride)))
            at = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(at, outputs))


def resnet32(inputs: Shape = (3, 32, 32), outputs: int = 10) -> nn.Sequential:
    """Build ResNet-32 of He et al. (2016), table 6, with shortcuts of option A.

    It has three stages of five blocks, 16, 32 and 64 channels.
    """
    return residual_network(inputs, outputs, (16, 32, 64), 5, _padded)


def resnet32_4(inputs: Shape = (3, 32, 32), outputs: int = 10) -> nn.Sequential:
    """Build ResNet-32 with every width times 4 (thesis 3.7.3).

    That is the first convolution's too, as with Zhang et al. (2019).
    """
    return residual_network(inputs, outputs, (64, 128, 256), 5, _padded)


def resnet18(inputs: Shape = (3, 32, 32), outputs: int = 10) -> nn.Sequential:
    """Build ResNet-18 of He et al. (2016), table 1, with shortcuts of option B.

    S2QN 6.4 does not say how it is fitted to 32×32 images: as is usual, the first convolution is
    3×3 at stride 1 and no pooling follows it.
    """
    return residual_network(inputs, outputs, (64, 128, 256, 512), 2, _projected)
