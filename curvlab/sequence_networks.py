"""Transformers and a recurrent network, each a function that builds it.

`curvlab.models` has their table. Attention is two linear layers and `scaled_dot_product_attention`
between them, so that every parameter of a transformer lies in a layer that a rule reads: embedding,
linear layer or norm.

Legend: N examples, T places, E width, V symbols, C classes, H heads.
"""

from __future__ import annotations

import math
from collections import OrderedDict

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from curvlab.errors import CurvlabError
from curvlab.networks import Shape

SPREAD = 0.02
"""Standard deviation of the first weights (Radford et al. 2019, as their code has it)."""


class Attention(nn.Module):
    """Self-attention of H heads.

    It has q, k and v by one linear layer, the heads' outputs through another.
    """

    def __init__(self, width: int, heads: int, bias: bool, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.qkv = nn.Linear(width, 3 * width, bias)
        self.out = nn.Linear(width, width, bias)

    def forward(self, x: Float[Tensor, "N T E"]) -> Float[Tensor, "N T E"]:
        """Return what every place gathers from all, or, where `causal`, from those up to itself."""
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        gathered = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        found: Tensor = self.out(gathered.transpose(1, 2).flatten(2))
        return found


class TransformerLayer(nn.Module):
    """Attention and a two-layer perceptron of width 4E.

    Each is behind a norm and added to what came in (pre-LN, as in Radford et al. 2019).
    """

    def __init__(self, width: int, heads: int, bias: bool, causal: bool) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, bias=bias)
        self.attention = Attention(width, heads, bias, causal)
        self.norm2 = nn.LayerNorm(width, bias=bias)
        self.mlp = nn.Sequential(
            OrderedDict[str, nn.Module](
                {
                    "in": nn.Linear(width, 4 * width, bias),
                    "gelu": nn.GELU(),
                    "out": nn.Linear(4 * width, width, bias),
                }
            )
        )

    def forward(self, x: Float[Tensor, "N T E"]) -> Float[Tensor, "N T E"]:
        """Return x + attention(norm(x)), and the perceptron added to that likewise."""
        x = x + self.attention(self.norm1(x))
        found: Tensor = x + self.mlp(self.norm2(x))
        return found


class GPT(nn.Module):
    """Symbols and places embedded, causal transformer layers, a norm, the embedding as the head.

    First weights are those of GPT-2 and nanoGPT: normal of deviation 0.02, that of the layers
    which write into the residual stream over √(2 layers), biases 0. There is no dropout.
    """

    def __init__(
        self, places: int, symbols: int, *, layers: int, width: int, heads: int, bias: bool
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(symbols, width)
        self.positions = nn.Embedding(places, width)
        self.layers = nn.ModuleList(
            TransformerLayer(width, heads, bias, causal=True) for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width, bias=bias)
        _begin(self, layers)

    def forward(self, x: Int[Tensor, "N T"]) -> Float[Tensor, "N T V"]:
        """Return the logits of the symbol that follows each place.

        Raises:
            CurvlabError: more places than the model has positions for.
        """
        h = self.embedding(x) + self.positions(_places(x, self.positions.num_embeddings))
        for layer in self.layers:
            h = layer(h)
        return F.linear(self.norm(h), self.embedding.weight)


class ViT(nn.Module):
    """A vision transformer (Dosovitskiy et al. 2021).

    Patches of 4×4 pixels are embedded and their places added; transformer layers, a norm, the mean
    over places and a linear layer follow. The mean stands in for that paper's class token; first
    weights are those of `GPT`. Images may come flattened.
    """

    def __init__(self, inputs: Shape, classes: int, *, layers: int, width: int, heads: int) -> None:
        super().__init__()
        side = math.isqrt(inputs[0])
        self.image = inputs if len(inputs) == 3 else (1, side, side)
        channels, rows, columns = self.image
        if len(inputs) not in (1, 3) or math.prod(self.image) != inputs[0] * math.prod(inputs[1:]):
            raise CurvlabError(f"inputs of shape {inputs} are no images: take (C, H, W) or (S²,)")
        if rows % 4 or columns % 4:
            raise CurvlabError(
                f"images of {rows}×{columns} pixels do not part into patches of 4×4: pad them"
            )
        self.patches = nn.Conv2d(channels, width, 4, 4)
        self.positions = nn.Embedding(rows * columns // 16, width)
        self.layers = nn.ModuleList(
            TransformerLayer(width, heads, bias=True, causal=False) for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)
        _begin(self, layers)

    def forward(self, x: Float[Tensor, "N *S"]) -> Float[Tensor, "N C"]:
        """Return the logits of the classes."""
        h = self.patches(x.reshape(len(x), *self.image)).flatten(2).transpose(1, 2)
        h = h + self.positions(_places(h, self.positions.num_embeddings))
        for layer in self.layers:
            h = layer(h)
        z: Tensor = self.head(self.norm(h).mean(1))
        return z


class LSTM(nn.Module):
    """Symbols embedded, one LSTM layer of torch's, a linear head.

    Hochreiter and Schmidhuber 1997, by torch's default initialisation.
    """

    def __init__(self, symbols: int, *, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(symbols, width)
        self.lstm = nn.LSTM(width, width, batch_first=True)
        self.head = nn.Linear(width, symbols)

    def forward(self, x: Int[Tensor, "N T"]) -> Float[Tensor, "N T V"]:
        """Return the logits of the symbol that follows each place."""
        z: Tensor = self.head(self.lstm(self.embedding(x))[0])
        return z


def _places(x: Tensor, known: int) -> Int[Tensor, "N T"]:
    """0 … T − 1 for every example."""
    if x.shape[1] > known:
        raise CurvlabError(
            f"sequences of {x.shape[1]} places, but the model has positions for {known}: give"
            f" windows of {known} or fewer, or build the model for longer ones"
        )
    return torch.arange(x.shape[1], device=x.device).expand(x.shape[:2])


def _begin(model: nn.Module, layers: int) -> None:
    """The first weights of a transformer: normal, biases 0."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding | nn.Conv2d):
            residual = name.endswith((".attention.out", ".mlp.out"))
            nn.init.normal_(module.weight, 0, SPREAD / math.sqrt(2 * layers if residual else 1))
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]  # seen


def gpt_tiny(inputs: Shape = (32,), outputs: int = 62) -> GPT:
    """Two layers of width 32 with 4 heads, biases as in GPT-2: small enough for exact blocks."""
    return GPT(inputs[0], outputs, layers=2, width=32, heads=4, bias=True)


def gpt_small(inputs: Shape = (64,), outputs: int = 62) -> GPT:
    """Four layers of width 128 with 4 heads: the setting of nanoGPT for a CPU.

    Karpathy 2022, README, which has neither dropout nor, as `bias = False` of its train.py, any
    bias.
    """
    return GPT(inputs[0], outputs, layers=4, width=128, heads=4, bias=False)


def vit_tiny(inputs: Shape = (784,), outputs: int = 10) -> ViT:
    """Two layers of width 32 with 4 heads, on patches of 4×4."""
    return ViT(inputs, outputs, layers=2, width=32, heads=4)


def lstm_tiny(inputs: Shape = (32,), outputs: int = 62) -> LSTM:
    """Width 32; sequences may have any length."""
    return LSTM(outputs, width=32)
