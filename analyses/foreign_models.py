"""Models that others wrote: curvlab on architectures of `transformers` against plain autograd, one
example at a time.

Tiny configurations with random weights in float64, nothing is downloaded. The other route is in
this file: the model on one example alone, `torch.autograd.grad` and double backward; no curvlab, no
torch.func. Compared are the mean gradient, per-sample gradients, EF and GGN blocks, products with
GGN and Hessian, two Hessian blocks, and a step of sgd-m, kfac and adam. Errors are relative,
parameter by parameter and block by block (of one that is nearly zero: to 1e-4 of the largest). Exit
code 1 where one is above 1e-8.

    pip install "curvlab[foreign]"
    python analyses/foreign_models.py [--only NAME …] [--threads 1] [--out FOLDER] [--reference]
    [--thorough] [--warnings]

Writes foreign_models.md to FOLDER, but with --only. --reference does without curvlab and holds the
other route against finite differences and the gradient of the whole minibatch. Some models compute
norms, softmax or logits in float32 whatever their weights are; here these stay in float64, as no
comparison to 1e-8 could be made. The other route takes weight_norm by plain operations, since the
second derivatives of torch's own are wrong (2.13).
"""

from __future__ import annotations

import argparse
import importlib
import math
import sys
import time
import warnings
import zlib
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers as tf
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

THRESHOLD = 1e-8
SMALL = 1e-4  # of the largest: below it a parameter's error is relative to that
LARGEST_BLOCK = 600  # entries of a block whose dense matrix is compared
LARGEST_HESSIAN = 200
OPTIMIZERS = ("sgd-m", "kfac", "adam")

# ----------------------------------------------------------------------
# the models


class Double(TorchFunctionMode):
    """Casts to float32 become casts to float64; `casts` counts them."""

    casts = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.float or torch.float32 in (*args, *kwargs.values()):
            self.casts += 1
            func = torch.Tensor.double if func is torch.Tensor.float else func
            args = tuple(torch.float64 if a is torch.float32 else a for a in args)
            kwargs = {
                name: torch.float64 if a is torch.float32 else a for name, a in kwargs.items()
            }
        return func(*args, **kwargs)


class Plain(TorchFunctionMode):
    """Second derivatives that are there, and right: of torch's own weight_norm they hold the norms
    fixed.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch._weight_norm:
            v, g, dim = args
            return v * (g / torch.norm_except_dim(v, 2, dim))
        return func(*args, **(kwargs or {}))


class Wrapped(nn.Module):
    """One tensor of inputs to one tensor of outputs."""

    def __init__(self, net: nn.Module, run: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.net, self.run = net, run
        self.casts = True

    def forward(self, x: Tensor) -> Tensor:
        inside: AbstractContextManager[object] = Double() if self.casts else nullcontext()
        with inside:
            return self.run(self.net, x)


@dataclass(frozen=True)
class Case:
    """A model with one minibatch."""

    model: Wrapped
    x: Tensor
    y: Tensor
    likelihood: str


Build = Callable[[], Case]


def case(
    net: Callable[[], nn.Module],
    run: Callable[[Any, Tensor], Tensor],
    x: Callable[[], Tensor],
    likelihood: str = "categorical",
    train: bool = False,
) -> Build:
    """Weights and biases are moved away from what they start with, zeros and ones among them."""

    def build() -> Case:
        model = Wrapped(net(), run).double().train(train)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(
                    torch.randn_like(p),
                    alpha=max(0.3, math.prod(p.shape[1:]) ** -0.5) if p.ndim > 1 else 0.1,
                )
        inputs = x()
        with Double() as double, torch.no_grad():
            z = model.run(model.net, inputs)
        model.casts = double.casts > 0
        if likelihood == "categorical":
            y = torch.randint(z.shape[1], (len(z), *z.shape[2:]))
        else:
            y = (
                torch.rand(z.shape, dtype=z.dtype)
                if likelihood == "bernoulli"
                else torch.randn(z.shape, dtype=z.dtype)
            )
        return Case(model, inputs, y, likelihood)

    return build


def made(auto: str, config: str, settings: dict[str, Any]) -> Callable[[], nn.Module]:
    """By an Auto class of transformers, or by a class of its own."""

    def make() -> nn.Module:
        found, values = getattr(tf, auto), getattr(tf, config + "Config")(**settings)
        net: nn.Module = found.from_config(values) if auto.startswith("Auto") else found(values)
        return net

    return make


def tokens(n: int, t: int, first: int = 0) -> Callable[[], Tensor]:
    return lambda: torch.randint(first, 12, (n, t))


def last(out: Any) -> Tensor:
    found: Tensor = out.logits[:, -1]
    return found


def places(out: Any) -> Tensor:
    found: Tensor = out.logits.mT
    return found


def logits(out: Any) -> Tensor:
    found: Tensor = out.logits
    return found


TEXT = {
    "vocab_size": 12,
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 12,
    "max_position_embeddings": 8,
}
ATTENTION: dict[str, Any] = {"num_key_value_heads": 1, "head_dim": 4}
EXPERTS: dict[str, Any] = {
    "num_experts": 3,
    "num_local_experts": 3,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 5,
    "shared_expert_intermediate_size": 5,
    "experts_implementation": "eager",
}
IMAGE: dict[str, Any] = {
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 12,
    "image_size": 8,
    "patch_size": 4,
    "num_labels": 3,
}
STAGES: dict[str, Any] = {"depths": [1, 1], "num_labels": 3}
SPEECH = {
    "vocab_size": 8,
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 12,
    "conv_dim": [6, 6],
    "conv_stride": [4, 2],
    "conv_kernel": [5, 3],
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "classifier_proj_size": 6,
    "num_labels": 3,
    "mask_time_prob": 0.0,
    "mask_feature_prob": 0.0,
}
SEQUENCES: dict[str, Any] = {
    "vocab_size": 12,
    "d_model": 8,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 12,
    "decoder_ffn_dim": 12,
    "max_position_embeddings": 8,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
}
T5: dict[str, Any] = {
    "vocab_size": 12,
    "d_model": 8,
    "d_kv": 4,
    "d_ff": 12,
    "num_layers": 1,
    "num_heads": 2,
    "relative_attention_num_buckets": 4,
    "relative_attention_max_distance": 8,
}


def causal(
    config: str,
    n: int = 3,
    t: int = 4,
    pick: Callable[[Any], Tensor] = last,
    train: bool = False,
    **settings: Any,
) -> Build:
    """A language model's next-token logits: at the last place, or [N, V, T]."""
    settings = {
        **TEXT,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        **settings,
    }
    net = made("AutoModelForCausalLM", config, settings)
    return case(
        net, lambda net, x: pick(net(input_ids=x, use_cache=False)), tokens(n, t), train=train
    )


def masked(
    config: str,
    n: int = 3,
    t: int = 4,
    pick: Callable[[Any], Tensor] = places,
    train: bool = False,
    **settings: Any,
) -> Build:
    """An encoder with its head of masked tokens; the padding token is among the inputs."""
    net = made(
        "AutoModelForMaskedLM", config, {**TEXT, "embedding_size": 8, "pad_token_id": 0, **settings}
    )
    return case(
        net,
        lambda net, x: pick(net(input_ids=x, attention_mask=torch.ones_like(x))),
        tokens(n, t),
        train=train,
    )


def translated(
    config: str, n: int = 3, t: int = 4, pick: Callable[[Any], Tensor] = last, **settings: Any
) -> Build:
    """Sequence to sequence, the decoder's inputs being the encoder's."""
    net = made("AutoModelForSeq2SeqLM", config, settings)
    return case(
        net,
        lambda net, x: pick(net(input_ids=x, decoder_input_ids=x, use_cache=False)),
        tokens(n, t, first=3),
    )


def image(
    config: str,
    n: int = 3,
    size: int = 8,
    auto: str = "AutoModelForImageClassification",
    likelihood: str = "categorical",
    train: bool = False,
    **settings: Any,
) -> Build:
    net = made(auto, config, settings)
    pixels = lambda: torch.randn(n, 3, size, size).double()  # noqa: E731
    return case(net, lambda net, x: logits(net(pixel_values=x)), pixels, likelihood, train)


def speech(
    config: str, n: int = 3, samples: int = 64, train: bool = False, **settings: Any
) -> Build:
    net = made("AutoModelForAudioClassification", config, {**SPEECH, **settings})
    return case(
        net, lambda net, x: logits(net(x)), lambda: torch.randn(n, samples).double(), train=train
    )


def whisper(net: Any, x: Tensor) -> Tensor:
    return places(
        net(
            input_features=x,
            decoder_input_ids=torch.arange(3, 6).expand(len(x), -1),
            use_cache=False,
        )
    )


ARCHITECTURES: dict[str, Build] = {
    # decoders, tied heads first
    "GPT-2": causal("GPT2", n=4, t=4),
    "GPT-2, all places": causal("GPT2", n=3, t=5, pick=places, num_hidden_layers=2),
    "GPT-Neo": causal(
        "GPTNeo", attention_types=[[["global"], 1]], num_layers=1, window_size=4, embed_dropout=0.0
    ),
    "OPT": causal("OPT", ffn_dim=12, word_embed_proj_dim=8),
    "BLOOM": causal("Bloom", n=4, t=4),
    "Falcon": causal("Falcon"),
    "Gemma": causal("Gemma", **ATTENTION),
    "Gemma 2": causal("Gemma2", n=4, t=4, query_pre_attn_scalar=4, **ATTENTION),
    "Cohere": causal("Cohere", n=4, t=3),
    "Gemma 3": causal("Gemma3Text", query_pre_attn_scalar=4, sliding_window=2, **ATTENTION),
    "MPT": causal(
        "Mpt", n=4, t=4, d_model=8, n_heads=2, n_layers=1, expansion_ratio=2, max_seq_len=8
    ),
    "GPT-2, untied": causal("GPT2", n=4, t=4, tie_word_embeddings=False),
    "GPT-NeoX": causal("GPTNeoX"),
    "GPT-J": causal("GPTJ", rotary_dim=2),
    "Llama": causal("Llama", n=4, t=4),
    "Llama, train mode": causal("Llama", pick=places, train=True),
    "Mistral": causal("Mistral", sliding_window=2, **ATTENTION),
    "Qwen 2": causal("Qwen2", n=2, t=6, **ATTENTION),
    "Phi": causal("Phi"),
    "OLMo 2": causal("Olmo2", n=4, t=4),
    "Qwen 3": causal("Qwen3", pick=places, **ATTENTION),
    "Nemotron": causal("Nemotron", n=4, t=4, num_key_value_heads=1),
    "XLNet": case(
        made(
            "XLNetLMHeadModel",
            "XLNet",
            {"vocab_size": 12, "d_model": 8, "n_layer": 1, "n_head": 2, "d_inner": 12, "d_head": 4},
        ),
        lambda net, x: last(net(input_ids=x)),
        tokens(3, 4),
    ),
    # mixtures of experts
    "Mixtral": causal("Mixtral", **ATTENTION, **EXPERTS),
    "Qwen 2 MoE": causal("Qwen2Moe", n=4, t=4, **ATTENTION, **EXPERTS),
    "Granite MoE": causal("GraniteMoe", **ATTENTION, **EXPERTS),
    "Qwen 3 MoE": causal("Qwen3Moe", n=4, t=3, **ATTENTION, **EXPERTS),
    "GPT-OSS": causal("GptOss", layer_types=["full_attention"], **ATTENTION, **EXPERTS),
    "DeepSeek-V2": causal(
        "DeepseekV2",
        kv_lora_rank=4,
        q_lora_rank=4,
        qk_rope_head_dim=2,
        qk_nope_head_dim=2,
        v_head_dim=4,
        n_routed_experts=3,
        num_experts_per_tok=2,
        moe_intermediate_size=4,
        n_shared_experts=1,
        topk_method="greedy",
        n_group=1,
        topk_group=1,
        num_key_value_heads=2,
        experts_implementation="eager",
        first_k_dense_replace=0,
    ),
    # state spaces
    "Mamba": causal("Mamba", n=4, t=4, state_size=3, time_step_rank=2, conv_kernel=2),
    "Mamba 2": causal(
        "Mamba2", num_heads=4, head_dim=4, state_size=3, n_groups=1, chunk_size=4, conv_kernel=2
    ),
    "RecurrentGemma": causal(
        "RecurrentGemma",
        num_key_value_heads=1,
        lru_width=8,
        block_types=["recurrent", "attention"],
        num_hidden_layers=2,
        attention_window_size=4,
        conv1d_width=2,
    ),
    "Jamba": causal(
        "Jamba",
        **ATTENTION,
        **EXPERTS,
        num_hidden_layers=2,
        mamba_d_state=3,
        mamba_expand=1,
        mamba_d_conv=2,
        mamba_dt_rank=2,
        attn_layer_period=2,
        attn_layer_offset=1,
        expert_layer_period=2,
        expert_layer_offset=1,
        use_mamba_kernels=False,
    ),
    # encoders
    "BERT": masked("Bert", n=4, t=4),
    "BERT, train mode": masked(
        "Bert", pick=last, train=True, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    ),
    "BERT, untied": masked("Bert", n=4, t=4, pick=last, tie_word_embeddings=False),
    "RoBERTa": masked("Roberta", max_position_embeddings=10, pad_token_id=1),
    "DistilBERT": masked("DistilBert", pick=last, dim=8, n_layers=1, n_heads=2, hidden_dim=12),
    "ALBERT": masked("Albert", n=4, t=4, num_hidden_layers=2),
    "ELECTRA": masked("Electra"),
    "DeBERTa-v2": masked(
        "DebertaV2",
        relative_attention=True,
        pos_att_type=["p2c", "c2p"],
        max_relative_positions=4,
        position_buckets=-1,
        pooler_hidden_size=8,
    ),
    "SqueezeBERT": masked(
        "SqueezeBert", q_groups=2, k_groups=2, v_groups=2, intermediate_groups=2, output_groups=2
    ),
    "ModernBERT": masked(
        "ModernBert",
        global_attn_every_n_layers=1,
        bos_token_id=1,
        eos_token_id=2,
        cls_token_id=1,
        sep_token_id=2,
    ),
    "ConvBERT": masked("ConvBert", head_ratio=1, conv_kernel_size=3),
    "RoFormer": masked("RoFormer"),
    "RemBERT": masked("RemBert", n=4, t=4, input_embedding_size=6, output_embedding_size=6),
    "XLM": masked("XLM", emb_dim=8, n_layers=1, n_heads=2),
    "MobileBERT": masked(
        "MobileBert", intra_bottleneck_size=4, true_hidden_size=4, num_feedforward_networks=1
    ),
    "FNet": masked("FNet", pick=last, tpu_short_seq_length=4),
    "CLIP, text": case(
        made(
            "CLIPTextModelWithProjection",
            "CLIPText",
            {**TEXT, "projection_dim": 4, "eos_token_id": 2, "bos_token_id": 1},
        ),
        lambda net, x: net(x).text_embeds,
        tokens(4, 4, first=3),
        "gaussian",
    ),
    "SigLIP, text": case(
        made(
            "SiglipTextModel",
            "SiglipText",
            {**TEXT, "max_position_embeddings": 4, "projection_size": 4},
        ),
        lambda net, x: net(x).pooler_output,
        tokens(4, 4),
        "gaussian",
    ),
    # sequence to sequence
    "T5": translated("T5", n=4, t=4, **T5),
    "BART": translated("Bart", **SEQUENCES),
    "Pegasus": translated("Pegasus", n=2, t=3, pick=places, **SEQUENCES),
    "Marian": translated("Marian", **SEQUENCES),
    "M2M100": translated("M2M100", **SEQUENCES),
    "mT5": translated("MT5", **T5),
    # images
    "ViT": image("ViT", **IMAGE),
    "ViT, train mode": image("ViT", n=5, train=True, likelihood="gaussian", **IMAGE),
    "DeiT": image("DeiT", auto="DeiTForImageClassification", **IMAGE),
    "BEiT": image("Beit", likelihood="bernoulli", **IMAGE),
    "DINOv2": image("Dinov2", **{**IMAGE, "num_labels": 2}),
    "Swin": image(
        "Swin",
        image_size=8,
        patch_size=2,
        embed_dim=4,
        num_heads=[1, 2],
        window_size=2,
        mlp_ratio=2.0,
        **STAGES,
    ),
    "ConvNeXt": image(
        "ConvNext", size=16, num_stages=2, hidden_sizes=[4, 6], patch_size=2, **STAGES
    ),
    "ConvNeXt V2": image(
        "ConvNextV2", size=16, num_stages=2, hidden_sizes=[4, 6], patch_size=2, **STAGES
    ),
    "FocalNet": image(
        "FocalNet",
        image_size=8,
        patch_size=2,
        embed_dim=4,
        focal_levels=[1, 1],
        focal_windows=[3, 3],
        mlp_ratio=2.0,
        **STAGES,
    ),
    "ResNet": image(
        "ResNet",
        size=16,
        likelihood="gaussian",
        embedding_size=4,
        hidden_sizes=[4, 6],
        layer_type="basic",
        **STAGES,
    ),
    "RegNet": image(
        "RegNet", size=16, embedding_size=4, hidden_sizes=[4, 8], groups_width=4, **STAGES
    ),
    "MobileNet V1": image("MobileNetV1", size=32, depth_multiplier=0.01, min_depth=4, num_labels=3),
    "PoolFormer": image(
        "PoolFormer",
        hidden_sizes=[4, 6],
        num_encoder_blocks=2,
        patch_sizes=[3, 3],
        strides=[2, 2],
        padding=[1, 1],
        **STAGES,
    ),
    "PVT v2": image(
        "PvtV2",
        size=16,
        image_size=16,
        num_encoder_blocks=2,
        sr_ratios=[2, 1],
        hidden_sizes=[4, 8],
        patch_sizes=[3, 3],
        strides=[4, 2],
        num_attention_heads=[1, 2],
        mlp_ratios=[2, 2],
        **STAGES,
    ),
    "SegFormer": image(
        "Segformer",
        n=2,
        auto="SegformerForSemanticSegmentation",
        num_encoder_blocks=2,
        sr_ratios=[2, 1],
        hidden_sizes=[4, 8],
        patch_sizes=[3, 3],
        strides=[2, 2],
        num_attention_heads=[1, 2],
        mlp_ratios=[2, 2],
        decoder_hidden_size=6,
        **STAGES,
    ),
    # time series, sound
    "PatchTST": case(
        made(
            "PatchTSTForPrediction",
            "PatchTST",
            {
                "num_input_channels": 2,
                "context_length": 8,
                "patch_length": 4,
                "patch_stride": 4,
                "num_hidden_layers": 1,
                "d_model": 8,
                "num_attention_heads": 2,
                "ffn_dim": 12,
                "prediction_length": 2,
                "scaling": None,
                "norm_type": "layernorm",
            },
        ),
        lambda net, x: net(past_values=x).prediction_outputs,
        lambda: torch.randn(3, 8, 2).double(),
        "gaussian",
    ),
    "AST": case(
        made(
            "AutoModelForAudioClassification",
            "AST",
            {**IMAGE, "frequency_stride": 4, "time_stride": 4, "max_length": 8, "num_mel_bins": 4},
        ),
        lambda net, x: logits(net(x)),
        lambda: torch.randn(3, 8, 4).double(),
    ),
    "Wav2Vec2": speech("Wav2Vec2"),
    "Wav2Vec2, train mode": speech(
        "Wav2Vec2",
        train=True,
        apply_spec_augment=False,
        layerdrop=0.0,
        hidden_dropout=0.0,
        activation_dropout=0.0,
        attention_dropout=0.0,
        feat_proj_dropout=0.0,
    ),
    "HuBERT": speech("Hubert", n=4),
    "WavLM": speech("WavLM"),
    "SEW": speech("SEW"),
    "Data2Vec, audio": speech("Data2VecAudio", num_conv_pos_embeddings=1, conv_pos_kernel_size=3),
    "Whisper": case(
        made(
            "WhisperForConditionalGeneration",
            "Whisper",
            {**SEQUENCES, "num_mel_bins": 4, "max_source_positions": 6, "max_target_positions": 8},
        ),
        whisper,
        lambda: torch.randn(3, 4, 12).double(),
    ),
}

# ----------------------------------------------------------------------
# the other route

LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "categorical": lambda z, y: F.cross_entropy(z, y, reduction="sum"),
    "bernoulli": lambda z, y: F.binary_cross_entropy_with_logits(z, y, reduction="sum"),
    "gaussian": lambda z, y: (z - y).square().sum() / 2,
}


class Reference:
    """Derivatives of one example's summed loss, or outputs, in all parameters as one vector of
    length D.
    """

    def __init__(self, case: Case) -> None:
        self.case, self.loss = case, LOSSES[case.likelihood]
        self.named = {name: p for name, p in case.model.named_parameters() if p.requires_grad}
        first = {id(p): name for name, p in self.named.items()}
        every = case.model.named_parameters(remove_duplicate=False)
        # of a tied one each of its names
        self.known_as = {name: first[id(p)] for name, p in every if id(p) in first}
        self.at: dict[str, Tensor] = {}
        self.size = 0
        for name, p in self.named.items():
            self.at[name] = torch.arange(self.size, self.size + p.numel()).view(p.shape)
            self.size += p.numel()

    def flat(self, tensors: Mapping[str, Tensor], batch: int = 0) -> Tensor:
        """{parameter: tensor} as one vector, 0 for those that are not there."""
        leading = next(iter(tensors.values())).shape[:batch]
        found = torch.zeros(*leading, self.size, dtype=torch.float64)
        for name, t in tensors.items():
            found[..., self.at[self.known_as[name]].flatten()] = t.detach().double().flatten(batch)
        return found

    def _gradient(self, of: Tensor, v: Tensor | None = None, again: bool = True) -> Tensor:
        parameters = list(self.named.values())
        if not of.requires_grad:
            return torch.zeros(self.size, dtype=torch.float64)
        found = torch.autograd.grad(
            of, parameters, v, retain_graph=True, create_graph=again, allow_unused=True
        )
        return torch.cat(
            [
                (torch.zeros_like(p) if g is None else g).flatten()
                for g, p in zip(found, parameters, strict=True)
            ]
        )

    def _alone(self, n: int) -> tuple[Tensor, Tensor]:
        with sdpa_kernel(SDPBackend.MATH), Plain():  # fused attention has no second derivatives
            z = self.case.model(self.case.x[n : n + 1])
        return z, self.loss(z, self.case.y[n : n + 1])

    @property
    def examples(self) -> range:
        return range(len(self.case.x))

    @cached_property
    def rows(self) -> Tensor:
        """[N, D]"""
        return torch.stack([self._gradient(self._alone(n)[1], again=False) for n in self.examples])

    @cached_property
    def jacobians(self) -> Tensor:
        """[N, C, D]"""
        each = [self._alone(n)[0].flatten() for n in self.examples]
        return torch.stack(
            [torch.stack([self._gradient(output, again=False) for output in z]) for z in each]
        )

    @cached_property
    def output_hessians(self) -> Tensor:
        """[N, C, C]"""
        found = []
        for n in self.examples:
            z = self._alone(n)[0].detach().requires_grad_()
            (g,) = torch.autograd.grad(self.loss(z, self.case.y[n : n + 1]), z, create_graph=True)
            found.append(
                torch.stack(
                    [torch.autograd.grad(d, z, retain_graph=True)[0].flatten() for d in g.flatten()]
                )
            )
        return torch.stack(found)

    @cached_property
    def _graphs(self) -> list[Tensor]:
        """Each example's gradient with its graph."""
        return [self._gradient(self._alone(n)[1]) for n in self.examples]

    @property
    def gradient(self) -> Tensor:
        return self.rows.mean(0)

    def ggn(self, order: Tensor) -> Tensor:
        j = self.jacobians[:, :, order]
        return (j.mT @ self.output_hessians @ j).mean(0)

    def ggn_product(self, v: Tensor) -> Tensor:
        each = zip(self.jacobians, self.output_hessians, strict=True)
        along: Any = sum(j.T @ (h @ (j @ v)) for j, h in each)
        return along / len(self.jacobians)

    def ef(self, order: Tensor) -> Tensor:
        rows = self.rows[:, order]
        return rows.T @ rows / len(rows)

    def hessian_product(self, v: Tensor) -> Tensor:
        return torch.stack([self._gradient(g @ v, again=False) for g in self._graphs]).mean(0)

    def hessian(self, order: Tensor) -> Tensor:
        names = [name for name, at in self.at.items() if bool(torch.isin(at, order).any())]

        def line(g: Tensor, i: int) -> Tensor:
            found = torch.autograd.grad(
                g[i],
                [self.named[name] for name in names],
                retain_graph=True,
                materialize_grads=True,
            )
            return self.flat(dict(zip(names, found, strict=True)))[order]

        graphs = [g for g in self._graphs if g.requires_grad]
        lines = [torch.stack([line(g, i) for g in graphs]).sum(0) for i in order.tolist()]
        return torch.stack(lines) / len(self._graphs)

    def error(self, found: Tensor, true: Tensor) -> float:
        """Of vectors [*, D]: the largest parameter's."""
        pairs = [(found[..., at.flatten()], true[..., at.flatten()]) for at in self.at.values()]
        return largest_error(pairs, float(true.norm()))

    def restore(self, weights: Tensor) -> None:
        with torch.no_grad():
            for name, p in self.named.items():
                p.copy_(weights[self.at[name]])

    @property
    def weights(self) -> Tensor:
        return self.flat(self.named)


def largest_error(pairs: Iterable[tuple[Tensor, Tensor]], scale: float) -> float:
    """‖found − true‖ / ‖true‖, where ‖true‖ is at least SMALL · scale; infinite where a number is
    not finite.
    """
    worst = 0.0
    for found, true in pairs:
        error = float((found - true).norm()) / max(float(true.norm()), SMALL * scale, 1e-300)
        worst = max(worst, error if math.isfinite(error) else math.inf)
    return worst


def mixing(reference: Reference) -> float:
    """The gradient of the whole minibatch against the mean of the examples alone: shows that they
    do not mix.
    """
    with sdpa_kernel(SDPBackend.MATH):
        loss = reference.loss(reference.case.model(reference.case.x), reference.case.y) / len(
            reference.case.x
        )
    return reference.error(reference._gradient(loss, again=False), reference.gradient)


def validate(reference: Reference) -> dict[str, float]:
    """The route of this file against finite differences (to about 1e-6) and the whole minibatch
    (1e-12).
    """
    at, v, step = reference.weights, torch.randn(reference.size, dtype=torch.float64), 1e-6
    for name, module in reference.case.model.named_modules():
        if (
            isinstance(module, nn.Embedding) and module.padding_idx is not None
        ):  # autograd holds it fixed
            v[reference.at[reference.known_as[f"{name}.weight"]][module.padding_idx]] = 0
    either = []
    for sign in (1, -1):
        reference.restore(at + sign * step * v)
        moved = Reference(reference.case)
        z = torch.stack([moved._alone(n)[0].detach().flatten() for n in moved.examples])
        either.append((z, moved.gradient))
    reference.restore(at)
    (z, g), (z_back, g_back) = either
    jv, hv = reference.jacobians @ v, reference.hessian_product(v)
    full = reference.jacobians.transpose(1, 2) @ reference.output_hessians @ jv[..., None]
    return {
        "minibatch": mixing(reference),
        "Jacobian": float(((z - z_back) / (2 * step) - jv).norm() / jv.norm()),
        "Hessian": float(((g - g_back) / (2 * step) - hv).norm() / hv.norm()),
        "GGN": float((full.mean(0)[:, 0] - reference.ggn_product(v)).norm() / full.mean(0).norm()),
    }


# ----------------------------------------------------------------------
# curvlab


def in_one_line(what: str, error: Exception) -> str:
    first = (str(error).strip().splitlines() or [""])[0]
    return f"{what}: {type(error).__name__}: {first[:300]}"


@dataclass
class Result:
    """What was found of one architecture."""

    name: str
    parameters: int = 0
    ways: dict[str, int] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)  # {quantity: largest}
    refused: dict[str, list[str]] = field(default_factory=dict)  # {quantity: lines}
    said: list[str] = field(default_factory=list)  # warnings
    seconds: float = 0.0  # of CPU

    def note(self, quantity: str, error: float) -> None:
        self.errors[quantity] = max(self.errors.get(quantity, 0.0), error)

    def attempt(self, quantity: str, what: str, measure: Callable[..., float]) -> bool:
        """Notes the error, or what was raised in its place."""
        try:
            self.note(quantity, measure())
        except Exception as error:
            line = in_one_line(what, error)
            if line not in self.refused.setdefault(quantity, []):
                self.refused[quantity].append(line)
            return False
        return True

    @property
    def worst(self) -> float:
        return max(self.errors.values(), default=0.0)

    @property
    def wrong(self) -> bool:
        return self.worst > THRESHOLD

    @property
    def verdict(self) -> str:
        if self.wrong:
            return (
                f"WRONG ({self.worst:.0e}:"
                f" {', '.join(q for q, e in self.errors.items() if e > THRESHOLD)})"
            )
        if self.refused:
            first = next(iter(self.refused.values()))[0]
            return f"refused: {first}"
        general = self.ways.get("general", 0)
        if general:
            return f"general way: {general} of {sum(self.ways.values())} blocks ({self.worst:.0e})"
        return f"right ({self.worst:.0e})"

    def cell(self, quantity: str) -> str:
        found = f"{self.errors[quantity]:.0e}" if quantity in self.errors else ""
        return f"{found} refused".strip() if quantity in self.refused else found or "–"


QUANTITIES = ("gradient", "per-sample", "EF", "GGN", "Hessian", "step")


class Comparison:
    """curvlab on one case, quantity by quantity."""

    def __init__(self, name: str, case: Case, thorough: bool = False) -> None:
        self.cl = importlib.import_module("curvlab")
        self.case, self.reference, self.thorough = case, Reference(case), thorough
        self.result = Result(name, self.reference.size)

    def run(self) -> Result:
        result, case = self.result, self.case
        if (mixed := mixing(self.reference)) > 1e-10:
            result.refused = {q: [f"reference: its examples mix ({mixed:.0e})"] for q in QUANTITIES}
            return result
        likelihood = getattr(self.cl.likelihoods, case.likelihood.capitalize())()

        try:
            self.objective = self.cl.Objective(case.model, likelihood, seed=0)
        except Exception as error:
            result.refused = {q: [in_one_line("objective", error)] for q in QUANTITIES}
            return result
        self.orders = {b.name: self._order(b) for b in self.objective.blocks}
        self.order = torch.cat(list(self.orders.values()))
        self.ways = self._ways()
        result.ways = {
            way: list(self.ways.values()).count(way) for way in ("structured", "general", "unused")
        }
        result.attempt("gradient", "observe", self._mean_gradient)
        result.attempt("per-sample", "gradients", self._per_sample)
        self._blocks("EF", "ef", self.reference.ef)
        self._blocks("GGN", "ggn", self.reference.ggn)
        result.attempt("GGN", "product", lambda: self._product("ggn", self.reference.ggn_product))
        result.attempt(
            "Hessian", "product", lambda: self._product("hessian", self.reference.hessian_product)
        )
        for name in self._hessian_blocks():
            result.attempt(
                "Hessian", f"block {self._of(name)}", lambda name=name: self._hessian_block(name)
            )
        for name in OPTIMIZERS:
            result.attempt("step", name, lambda name=name: self._step(name))
        return result

    def _of(self, block: str) -> str:
        return str(next(", ".join(b.params) for b in self.objective.blocks if b.name == block))

    def _order(self, block: Any) -> Tensor:
        """Where the block's entries lie in the reference's vector."""
        tensors = {
            name: self.reference.at[self.reference.known_as[name]].double() for name in block.params
        }
        gathered = block.gather(tensors)
        again = block.scatter(gathered)
        if any(not torch.equal(again[name], t) for name, t in tensors.items()):
            raise RuntimeError(f"{block}: scatter does not undo gather")
        found: Tensor = gathered.flatten().round().long()
        return found

    def _ways(self) -> dict[str, str]:
        """{block: structured, general, unused}: as the objective says, or else by what the blocks
        know.
        """
        blocks = self.objective.blocks
        if hasattr(self.objective, "check"):
            try:
                return {
                    name: str(way)
                    for name, way in self.objective.check(self.case.x, self.case.y).ways.items()
                }
            except Exception as error:
                self.result.refused["check"] = [in_one_line("check", error)]
        return {
            b.name: "general" if getattr(b, "rule", None) is None else "structured" for b in blocks
        }

    def _scattered(self, by_block: Mapping[str, Tensor]) -> Tensor:
        found: dict[str, Tensor] = {}
        for block in self.objective.blocks:
            if block.name in by_block:
                found |= block.scatter(by_block[block.name])
        return self.reference.flat(found)

    def _closure(self) -> Any:
        return self.objective.closure(self.case.x, self.case.y)

    def _mean_gradient(self) -> float:
        found = self._scattered(self._closure().observe({"data"}).gradients)
        return self.reference.error(found, self.reference.gradient)

    def _per_sample(self) -> float:
        found = self.reference.flat(
            self.cl.exact.gradients(self.objective, self.case.x, self.case.y), 1
        )
        return max(map(self.reference.error, found, self.reference.rows))

    def _blocks(self, quantity: str, kind: str, true: Callable[[Tensor], Tensor]) -> None:
        """All blocks at once; where that is refused, one by one."""
        wanted = [name for name, order in self.orders.items() if len(order) <= LARGEST_BLOCK]
        arguments = self.objective, self.case.x, self.case.y

        @cache
        def truth() -> tuple[dict[str, Tensor], float]:
            found = {name: true(self.orders[name]) for name in wanted}
            return found, max((float(t.norm()) for t in found.values()), default=0.0)

        def all_at_once() -> float:
            each, scale = truth()
            found = self.cl.exact.matrices(*arguments, kind=kind)
            dense = {
                name: found[name].dense() if name in found else torch.zeros_like(t)
                for name, t in each.items()
            }
            return largest_error([(dense[name], t) for name, t in each.items()], scale)

        def one(name: str) -> float:
            each, scale = truth()
            return largest_error(
                [(self.cl.exact.matrix(*arguments, kind=kind, block=name).dense(), each[name])],
                scale,
            )

        if not self.result.attempt(quantity, "matrices", all_at_once):
            for name in wanted:
                self.result.attempt(
                    quantity, f"matrix of {self._of(name)}", lambda name=name: one(name)
                )

    def _product(self, kind: str, true: Callable[[Tensor], Tensor]) -> float:
        product = self.cl.exact.product(self.objective, self.case.x, self.case.y, kind)
        worst = 0.0
        for _ in range(2):
            v = torch.zeros(self.reference.size, dtype=torch.float64)
            v[self.order] = torch.randn(len(self.order), dtype=torch.float64)
            found = torch.zeros_like(v)
            found[self.order] = product @ v[self.order]
            worst = max(worst, self.reference.error(found, true(v)))
        return worst

    def _hessian_blocks(self) -> list[str]:
        """One structured and one general block, neither the smallest nor large; all but the large
        ones if thorough.
        """

        def rank(name: str) -> tuple[bool, int]:
            size = len(self.orders[name])
            return size < 30, size if size >= 30 else -size

        few = sorted(
            (name for name, order in self.orders.items() if len(order) <= LARGEST_HESSIAN), key=rank
        )
        if self.thorough:
            return few
        first = [
            next((name for name in few if self.ways.get(name) == way), None)
            for way in ("structured", "general")
        ]
        found = [name for name in first if name is not None]
        return (
            found + [name for name in few if name not in found and self.ways.get(name) != "unused"]
        )[:2]

    def _hessian_block(self, name: str) -> float:
        found = self.cl.exact.matrix(
            self.objective, self.case.x, self.case.y, kind="hessian", block=name
        ).dense()
        true = self.reference.hessian(self.orders[name])
        return largest_error([(found, true)], float(self.reference.gradient.norm()))

    def _step(self, name: str) -> float:
        """The gradient that the descent is given; of sgd-m also the displacement, of the others
        that it is finite.
        """
        reference, lr = self.reference, 1.0 if name == "sgd-m" else 1e-3
        before = reference.weights
        settings = {} if name == "sgd-m" else {"damping": 0.1}
        optimizer = self.cl.optimizer(name, self.objective, lr=lr, **settings)
        seen: list[Any] = []
        direction = optimizer.descent.direction

        def overheard(observation: Any, *more: Any, **named: Any) -> Any:
            seen.append(observation)
            return direction(observation, *more, **named)

        optimizer.descent.direction = overheard
        try:
            optimizer.step(self._closure())
            moved = reference.weights - before
        finally:
            reference.restore(before)
        found = [reference.error(self._scattered(o.gradients), reference.gradient) for o in seen]
        if name == "sgd-m":
            found.append(reference.error(moved, -lr * reference.gradient))
        return (
            max(found)
            if bool(torch.isfinite(moved).all()) and float(moved.norm()) > 0
            else math.inf
        )


# ----------------------------------------------------------------------
# tables


def compare(name: str, thorough: bool) -> Result:
    start = time.process_time()
    torch.manual_seed(zlib.crc32(name.encode()))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        comparison = Comparison(name, ARCHITECTURES[name](), thorough)
        result = comparison.run()
    own = comparison.cl.errors.CurvlabWarning
    result.said = list(dict.fromkeys(str(w.message) for w in caught if issubclass(w.category, own)))
    result.seconds = time.process_time() - start
    return result


HEADINGS = (
    "architecture",
    "parameters",
    "blocks",
    "structured / general / unused",
    *QUANTITIES,
    "verdict",
    "CPU seconds",
)


def row(result: Result) -> list[str]:
    counts = " / ".join(str(result.ways.get(way, 0)) for way in ("structured", "general", "unused"))
    cells = [result.cell(q) for q in QUANTITIES]
    blocks, seconds = str(sum(result.ways.values())), f"{result.seconds:.1f}"
    return [result.name, f"{result.parameters:,d}", blocks, counts, *cells, result.verdict, seconds]


def versions() -> str:
    return f"torch {torch.__version__}, transformers {tf.__version__}"


def summary(results: list[Result]) -> str:
    wrong, refused = (
        sum(r.wrong for r in results),
        sum(bool(r.refused) and not r.wrong for r in results),
    )
    return (
        f"{len(results)} models: {wrong} wrong, {refused} with a refusal,"
        f" {len(results) - wrong - refused} right."
    )


def markdown(results: list[Result]) -> str:
    def line(cells: Iterable[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    parts = [
        "# Models that others wrote",
        f"`python analyses/foreign_models.py`, {versions()}, float64. {summary(results)}",
        "Largest relative errors against plain autograd, one example at a time.",
        "\n".join(
            [line(HEADINGS), line(["---"] * len(HEADINGS)), *(line(row(r)) for r in results)]
        ),
    ]
    refusals = [
        f"- {r.name}, {q}: {text}"
        for r in results
        for q, lines in r.refused.items()
        for text in lines
    ]
    if refusals:
        parts += ["## Refused", "\n".join(refusals)]
    return "\n\n".join(parts) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", metavar="NAME", help="only these architectures")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "figures")
    parser.add_argument(
        "--reference",
        action="store_true",
        help="only hold the other route against finite differences",
    )
    parser.add_argument(
        "--thorough",
        action="store_true",
        help=f"every Hessian block of at most {LARGEST_HESSIAN} entries",
    )
    parser.add_argument("--warnings", action="store_true", help="print what curvlab warned of")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    tf.logging.set_verbosity_error()
    unknown = [name for name in options.only or [] if name not in ARCHITECTURES]
    if unknown:
        parser.error(f"unknown: {', '.join(unknown)} (known: {', '.join(ARCHITECTURES)})")
    names, console = options.only or list(ARCHITECTURES), Console()
    console.width = max(console.width, 200)
    if options.reference:
        worst = 0.0
        for name in names:
            torch.manual_seed(zlib.crc32(name.encode()))
            found = validate(Reference(ARCHITECTURES[name]()))
            worst = max(
                worst,
                found["minibatch"] * 1e6,
                found["GGN"] * 1e6,
                found["Jacobian"],
                found["Hessian"],
            )
            print(
                f"{name:>24s}  "
                + "  ".join(f"{what} {error:.0e}" for what, error in found.items()),
                flush=True,
            )
        return int(worst > 1e-5)
    results = []
    for name in names:
        results.append(compare(name, options.thorough))
        print(f"{name:>24s}  {results[-1].seconds:5.1f} s  {results[-1].verdict}", flush=True)
        for text in results[-1].said if options.warnings else ():
            print(f"{'':>26s}{text}")
    table = Table(title=versions())
    for heading in HEADINGS:
        widest = 40 if heading == "verdict" else None
        table.add_column(
            heading.replace(" / ", "/\n"), overflow="ellipsis", no_wrap=True, max_width=widest
        )
    for result in results:
        table.add_row(*row(result))
    console.print(table)
    console.print(f"{summary(results)} {sum(r.seconds for r in results):.0f} CPU seconds.")
    if not options.only:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "foreign_models.md").write_text(markdown(results), encoding="utf-8")
    return int(any(r.wrong for r in results))


if __name__ == "__main__":
    sys.exit(main())
