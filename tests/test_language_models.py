"""Sequences of symbols, and models of them: windows, causality, the tied head, gradient and GGN."""

from __future__ import annotations

import hashlib
import lzma
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import curvlab as cl
from curvlab.datasets import Dataset, files, sequences
from curvlab.datasets.base import IGNORED
from curvlab.models import GPT, ViT
from curvlab.sequence_networks import Attention, TransformerLayer
from curvlab.show import figures
from curvlab.training.evaluation import (
    Evaluated,
    further_of,
    measure_of,
    score_names,
    scores_of,
    symbol_measures,
)

CAUSAL = ("gpt-tiny", "gpt-small", "lstm-tiny")
KINDS = {"attention.qkv", "attention.out", "mlp.in", "mlp.out", "norm1", "norm2"}


def tiny(places: int = 5, symbols: int = 7, width: int = 4) -> GPT:
    """A transformer small enough for `torch.func`, with weights that are not near 0."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = GPT(places, symbols, layers=2, width=width, heads=2, bias=True).double()
        for p in model.parameters():
            nn.init.normal_(p, 0, 0.5)
    return model


def some(places: int = 5, symbols: int = 7, n: int = 3) -> tuple[Tensor, Tensor]:
    drawn = torch.randint(symbols, (n, places + 1), generator=torch.Generator().manual_seed(1))
    return drawn[:, :-1], drawn[:, 1:]


def of(part: Dataset) -> tuple[Tensor, Tensor]:
    """Return inputs and targets, which are dense."""
    assert isinstance(part.x, Tensor)
    return part.x, part.y


# ---- data


def test_the_text_is_the_one_whose_checksum_is_known() -> None:
    text = sequences.shakespeare_text()
    assert hashlib.sha256(text.encode()).hexdigest() == (
        "e72d589353e726c0bcf613e25e982656bd01d87beb2d578d6bdf77c866197c97"
    )
    assert len(text) == 798_206
    assert text.startswith("Bernardo:\nWho's there?\n")


def test_a_damaged_text_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "shakespeare.txt.xz").write_bytes(lzma.compress(b"to be"))
    monkeypatch.setenv("CURVLAB_DATA", str(tmp_path))
    with pytest.raises(cl.CurvlabError, match=r"damaged .*git checkout -- data"):
        cl.datasets.load("shakespeare")


@pytest.mark.parametrize(("name", "places"), [("shakespeare", 64), ("shakespeare32", 32)])
def test_windows_follow_one_another_and_the_last_tenth_is_for_validation(
    name: str, places: int
) -> None:
    parts = cl.datasets.load(name)
    text, symbols = sequences.shakespeare_text(), sorted(set(sequences.shakespeare_text()))
    assert len(symbols) == parts[0].outputs == 62
    cut = len(text) - len(text) // 10
    for part, own in zip(parts, (text[:cut], text[cut:]), strict=True):
        assert part.symbolic
        assert len(part) == (len(own) - 1) // places
        for shift, numbers in enumerate(of(part)):
            said = "".join(symbols[i] for i in numbers.flatten().tolist())
            assert said == own[shift : shift + len(part) * places]


def test_copying_gives_back_what_it_was_given() -> None:
    train, tested = cl.datasets.load("copying")
    for part in (train, tested):
        x, y = of(part)
        assert (x[:, 8] == 8).all()
        assert torch.equal(y[:, 8:], x[:, :8])
        assert torch.equal(x[:, 9:], x[:, :7])
        assert (y[:, :8] == IGNORED).all()
    assert train.outputs == 9  # the delimiter is no target
    assert not torch.equal(of(sequences.copying(1)[0])[0], of(train)[0])


@pytest.mark.parametrize("modulus", [97, 5])
def test_addition_has_every_pair_once(modulus: int) -> None:
    parts = sequences.addition(modulus)
    x, y = (torch.cat(values) for values in zip(*map(of, parts), strict=True))
    assert len(torch.unique(x, dim=0)) == len(x) == modulus**2
    assert (x[:, 2] == modulus).all()
    assert torch.equal(y[:, 2], (x[:, 0] + x[:, 1]) % modulus)
    assert (y[:, :2] == IGNORED).all()
    assert parts[0].outputs == modulus + 1
    assert len(parts[0]) == modulus**2 // 2


@pytest.mark.parametrize(
    ("name", "sum_"),
    [
        ("copying", "e424b49778f5a9d3ccf87dfa2d7838344bf3136c5750ceb81aa889bd0cc55f33"),
        ("addition", "41c0873008b399ad05b69421dd57ae73a810b7a033ae1876076727cd964cef64"),
    ],
)
def test_what_is_made_is_the_same_everywhere(name: str, sum_: str) -> None:
    made = b"".join(v.numpy().tobytes() for part in cl.datasets.load(name) for v in of(part))
    assert hashlib.sha256(made).hexdigest() == sum_


def test_a_modulus_below_two_is_refused() -> None:
    with pytest.raises(cl.CurvlabError, match="modulus of addition must be 2 or more, not 1"):
        sequences.addition(1)


def test_packaged_files_are_those_of_the_folder() -> None:
    assert set(files.PACKAGED) <= set(files.FILES)
    assert all(files.find_file(name) for name in files.PACKAGED)


# ---- models


@pytest.mark.parametrize("name", CAUSAL)
def test_outputs_do_not_depend_on_later_inputs(name: str) -> None:
    model, data = cl.models.build(name).double(), cl.datasets.load("copying")[0]
    x = data.x[:2]
    with torch.no_grad():
        z = model(x)
        assert z.shape == (2, 16, 62)
        for t in (0, 7, 14):
            other = x.clone()
            other[:, t + 1 :] = (other[:, t + 1 :] + 1) % 9
            changed = model(other)
            torch.testing.assert_close(changed[:, : t + 1], z[:, : t + 1], rtol=0, atol=1e-14)
            assert not torch.allclose(changed[:, t + 1 :], z[:, t + 1 :], rtol=0, atol=1e-6)


def test_a_vision_transformer_sees_all_patches_from_every_place() -> None:
    model = cl.models.build("vit-tiny").double()
    assert isinstance(model, ViT)
    x = torch.rand(1, 784, dtype=torch.float64).requires_grad_()
    (slope,) = torch.autograd.grad(model(x)[0, 0], x)
    assert (slope != 0).all()
    flat, image = model(x), model(x.reshape(1, 1, 28, 28))
    assert torch.equal(flat, image)


def test_the_head_is_the_embedding() -> None:
    model = tiny()
    x, _ = some()
    h: list[Tensor] = []
    model.norm.register_forward_hook(lambda module, given, found: h.append(found))
    z = model(x)
    torch.testing.assert_close(z, h[0] @ model.embedding.weight.T, rtol=0, atol=1e-14)
    assert not [name for name, _ in model.named_parameters() if "head" in name]


@pytest.mark.parametrize("name", ["gpt-tiny", "gpt-small", "vit-tiny"])
def test_names_say_the_kind_of_a_layer_and_first_weights_are_gpt_2s(name: str) -> None:
    model = cl.models.build(name)
    assert isinstance(model, GPT | ViT)
    depth = len(model.layers)
    for i, layer in enumerate(model.layers):
        own = {n for n, _ in layer.named_modules() if n in KINDS}
        assert own == KINDS, i
    for key, p in model.named_parameters():
        if key.endswith("bias"):
            assert not p.any()
        elif "norm" in key:
            assert (p == 1).all()
        else:
            writes = key.endswith(("attention.out.weight", "mlp.out.weight"))
            spread = 0.02 / math.sqrt(2 * depth if writes else 1)
            assert float(p.detach().std()) == pytest.approx(spread, rel=0.15), key
    assert any(key.endswith("bias") for key, _ in model.named_parameters()) == (name != "gpt-small")


def test_attention_is_that_of_multi_head_attention() -> None:
    """torch's module, with the same weights and mask."""
    layer = tiny().layers[0]
    assert isinstance(layer, TransformerLayer)
    own = layer.attention
    assert isinstance(own, Attention)
    other = nn.MultiheadAttention(4, 2, batch_first=True).double()
    other.load_state_dict(
        {
            "in_proj_weight": own.qkv.weight,
            "in_proj_bias": own.qkv.bias,
            "out_proj.weight": own.out.weight,
            "out_proj.bias": own.out.bias,
        }
    )
    x = torch.randn(2, 5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(5, 5, dtype=torch.bool).triu(1)
    found, _ = other(x, x, x, attn_mask=mask)
    torch.testing.assert_close(own(x), found, rtol=0, atol=1e-13)


def test_a_sequence_that_is_too_long_is_one_clear_line() -> None:
    x, y = some(6)
    objective = cl.Objective(tiny(5), cl.likelihoods.Categorical())
    with pytest.raises(
        cl.CurvlabError, match=r"^sequences of 6 places, but the model has positions for 5: give"
    ):
        objective.closure(x, y).observe()
    assert model_shape(tiny(5), x[:, :4]) == (3, 4, 7)


def model_shape(model: nn.Module, x: Tensor) -> tuple[int, ...]:
    return tuple(model(x).shape)


@pytest.mark.parametrize("inputs", [(3, 30, 32), (50,), (784, 2)])
def test_what_is_no_image_of_whole_patches_is_refused(inputs: tuple[int, ...]) -> None:
    with pytest.raises(cl.CurvlabError, match=r"patches of 4×4|are no images"):
        cl.models.vit_tiny(inputs)


@pytest.mark.parametrize("data", ["copying", "addition", "shakespeare"])
def test_a_transformer_is_fitted_to_the_sequences_of_other_data(data: str) -> None:
    train, _ = cl.datasets.load(data)
    model = cl.models.build("gpt-tiny", data=train)
    assert model_shape(model, train.x[:2]) == (2, *train.inputs, train.outputs)


# ---- curvature


def mean_loss(z: Tensor, y: Tensor) -> Tensor:
    """Over sequences, of the sum over places."""
    return F.cross_entropy(z.flatten(0, 1), y.flatten(), reduction="sum") / len(y)


def test_the_gradient_is_that_of_autograd() -> None:
    model, train = cl.models.build("gpt-tiny").double(), cl.datasets.load("shakespeare32")[0]
    x, y = train.x[:4], train.y[:4]
    objective = cl.Objective(model, cl.likelihoods.Categorical())
    assert "general" not in str(objective.check(x, y)), "every block is read by a rule"
    found = objective.closure(x, y).observe().gradients
    parameters = dict(model.named_parameters())
    wanted = dict(
        zip(
            parameters,
            torch.autograd.grad(mean_loss(model(x), y), [*parameters.values()]),
            strict=True,
        )
    )
    for block in objective.blocks:
        g = block.gather(wanted)
        assert float((found[block.name] - g).norm() / g.norm()) < 1e-10


@pytest.mark.parametrize(
    "key", ["norm.weight", "layers.1.attention.out.weight", "embedding.weight"]
)
def test_ggn_blocks_are_those_of_torch_func(key: str) -> None:
    """The tied embedding, which has two uses, among them."""
    model, (x, y) = tiny(), some()
    objective = cl.Objective(model, cl.likelihoods.Categorical())
    block = next(b for b in objective.blocks if key in b.params)
    found = cl.exact.matrix(objective, x, y, kind="ggn", block=block.name)
    weights = {name: p.detach() for name, p in model.named_parameters()}
    own = {name: weights[name] for name in block.params}

    def outputs(w: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(model, {**weights, **w}, (x,))

    with sdpa_kernel(SDPBackend.MATH):  # the fused one is not batched
        jacobian = torch.func.jacrev(outputs)(own)
    j = block.gather({name: v.flatten(0, 2) for name, v in jacobian.items()}, 1)
    j = j.reshape(len(x), 5, 7, -1)
    p = outputs(own).softmax(-1)
    h = torch.diag_embed(p) - p[..., :, None] * p[..., None, :]
    wanted = torch.einsum("ntci,ntcd,ntdj->ij", j, h, j) / len(x)
    assert float((found.dense() - wanted).norm() / wanted.norm()) < 1e-10


# ---- evaluation


def test_evaluation_is_by_symbol_and_leaves_out_what_has_no_target() -> None:
    model = tiny()
    x, y = some(n=6)
    y = torch.where(
        torch.rand(y.shape, generator=torch.Generator().manual_seed(2)) < 0.4, IGNORED, y
    )
    objective = cl.Objective(model, cl.likelihoods.Categorical())
    error, further = (
        measure_of(objective.likelihood, 35, y),
        further_of(objective.likelihood, y),
    )
    assert error is not None
    on = Evaluated(
        examples=Dataset("some", x, y, ""), validation=(x, y), error=error, size=4, further=further
    )
    found = scores_of(objective, on)
    assert tuple(found) == score_names(on)
    z, there = model(x), y != IGNORED
    nats = F.cross_entropy(z.flatten(0, 1), y.flatten()).item()  # torch's mean over tokens
    wrong = (z.argmax(-1) != y)[there].double().mean().item()
    for part in ("train", "val"):
        assert found[f"{part}_nats_per_symbol"] == pytest.approx(nats, rel=1e-13)
        assert found[f"{part}_bits_per_symbol"] == pytest.approx(nats / math.log(2), rel=1e-13)
        assert found[f"{part}_error"] == pytest.approx(wrong, rel=1e-13)
        assert found[f"{part}_loss"] == pytest.approx(nats * int(there.sum()) / 6, rel=1e-13)


def test_symbols_are_counted_whichever_axis_has_the_classes() -> None:
    z = torch.randn(3, 5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    _, y = some()
    wrong, further = symbol_measures(cl.likelihoods.Categorical())
    for measure in (wrong, *further.values()):
        torch.testing.assert_close(measure.each(z, y), measure.each(z.transpose(1, 2), y))


def test_other_data_have_no_measure_of_symbols() -> None:
    y = torch.arange(3)
    assert further_of(cl.likelihoods.Categorical(), y) == {}
    assert further_of(cl.likelihoods.Bernoulli(), y[:, None].double()) == {}


def test_a_run_logs_nats_and_bits_per_symbol() -> None:
    train, tested = (replace(part, x=part.x[:64], y=part.y[:64]) for part in sequences.copying())
    model = cl.models.build("gpt-tiny", data=train)
    objective = cl.Objective(model, cl.likelihoods.Categorical())
    run = cl.train(objective, train.batches(16), tested, algorithm="adam", epochs=2, progress=False)
    ds = run.dataset
    assert ds.attrs["error"] == "fraction of wrong symbols"
    assert ds["val_bits_per_symbol"].attrs["units"] == "bit"
    assert ds["train_nats_per_symbol"].attrs["long_name"].startswith("cross-entropy per symbol")
    nats = ds["train_nats_per_symbol"].values
    np.testing.assert_allclose(nats, ds["train_loss"].values / 8, rtol=1e-6)
    np.testing.assert_allclose(nats / math.log(2), ds["train_bits_per_symbol"].values, rtol=1e-6)
    assert nats[0] == pytest.approx(math.log(9), rel=0.05)
    assert nats[-1] < nats[0]


@pytest.mark.filterwarnings("ignore:parameters of layers without a rule")
def test_the_figure_of_a_comparison_has_a_panel_for_each_kind_of_block() -> None:
    """The middle layer of each."""
    torch.manual_seed(0)
    model: Any = cl.models.build("gpt-tiny", seed=0)
    objective = cl.Objective(model, cl.likelihoods.Tokens())
    ids = torch.randint(62, (2, 33))
    run = cl.compare(
        objective,
        [(ids[:, :-1], ids[:, 1:])] * 2,
        reference="kfac-ef",
        algorithms=["adam", "tnt"],
        progress=False,
    )
    titles = [ax.get_title() for ax in figures.draw(run.dataset, "cosine").axes]
    modules = [t.split("(")[1].removesuffix(")") for t in titles if t]
    parts = ("norm1", "attention.qkv", "attention.out", "norm2", "mlp.in", "mlp.out")
    assert modules == [
        "embedding.weight",
        "positions.weight",
        *(f"layers.1.{part}" for part in parts),
        "norm.weight norm.bias",
    ]
