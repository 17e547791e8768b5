"""`curvlab.watch` as a callback of trainers that are not ours: with and without it, bit for bit."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import curvlab as cl
from curvlab import integrations

TOKENS, PLACES, STEPS = 17, 8, 4


def test_a_trainer_that_is_not_installed_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.setitem(sys.modules, "lightning", None)
    monkeypatch.setitem(sys.modules, "lightning.pytorch", None)
    likelihood = cl.likelihoods.Categorical()
    with pytest.raises(cl.CurvlabError, match=r"pip install 'curvlab\[transformers\]'"):
        integrations.transformers_callback(likelihood)
    with pytest.raises(cl.CurvlabError, match=r"pip install 'curvlab\[lightning\]'"):
        integrations.lightning_callback(likelihood)


def same_state(one: nn.Module, other: nn.Module) -> bool:
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def gpt2(callbacks: list[Any], folder: Path, micro: int) -> nn.Module:
    """A tiny random GPT-2, with dropout, trained by the Trainer: decay, clipping, schedule."""
    transformers: Any = pytest.importorskip("transformers")
    transformers.set_seed(0)
    config = transformers.GPT2Config(
        vocab_size=TOKENS, n_positions=PLACES, n_embd=8, n_layer=1, n_head=2
    )
    model: nn.Module = transformers.GPT2LMHeadModel(config)
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(TOKENS, (64, PLACES), generator=generator)
    data = [{"input_ids": row, "labels": row.clone()} for row in rows]
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=micro,
        learning_rate=1e-2,
        weight_decay=0.1,
        max_grad_norm=0.5,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        logging_steps=1000,
    )
    trainer = transformers.Trainer(model, arguments, train_dataset=data, callbacks=callbacks)
    trainer.train()
    return model


@pytest.mark.parametrize("micro", [1, 2])
@pytest.mark.filterwarnings("ignore:the minibatches of a step")
def test_a_watched_trainer_of_transformers_is_the_unwatched_one(tmp_path: Path, micro: int) -> None:
    pytest.importorskip("transformers")
    likelihood = cl.likelihoods.Categorical(axis=-1, ignore_index=-100, per="token")
    path = tmp_path / "run.h5"
    callback = integrations.transformers_callback(
        likelihood, algorithms=["sgd-m"], path=path, every=2, take=integrations.next_symbols
    )
    alone, watched = gpt2([], tmp_path, micro), gpt2([callback], tmp_path, micro)
    assert same_state(alone, watched)
    ds = cl.open(path)
    assert ds["step"].values.tolist() == [0, 2]
    assert (ds["minibatches"] == micro).all()
    if micro == 1:  # of several, masks of dropout are others than each alone has drawn
        np.testing.assert_allclose(ds["optimizer_gradient_cosine"], 1, atol=1e-5)
    assert "watched+decay" in ds["algorithm"].values
    assert (ds["optimizer_gradient_norm"] < ds["minibatch_gradient_norm"]).any()
    assert not watched._forward_pre_hooks


def digits(callbacks: list[Any], folder: Path) -> nn.Module:
    lightning: Any = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(
                nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 3)
            )

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

        def training_step(self, batch: Any, index: int) -> Tensor:
            x, y = batch
            return nn.functional.cross_entropy(self.net(x), y)

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=1e-2)

    lightning.seed_everything(0, verbose=False)
    module: nn.Module = Module()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(8 * STEPS, 6, generator=generator)
    data = torch.utils.data.TensorDataset(x, torch.arange(len(x)) % 3)
    trainer = lightning.Trainer(
        max_epochs=2,
        accelerator="cpu",
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        gradient_clip_val=0.5,
        default_root_dir=str(folder),
    )
    trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=8, shuffle=True))
    return module


@pytest.mark.filterwarnings("ignore:parameters of layers without a rule")
def test_a_watched_trainer_of_lightning_is_the_unwatched_one(tmp_path: Path) -> None:
    pytest.importorskip("lightning")
    path = tmp_path / "run.h5"
    callback = integrations.lightning_callback(
        cl.likelihoods.Categorical(),
        lambda module: module.net,
        algorithms=["kfac", "sgd-m"],
        path=path,
        every=3,
    )
    alone, watched = digits([], tmp_path), digits([callback], tmp_path)
    assert same_state(alone, watched)
    ds = cl.open(path)
    assert ds["step"].values.tolist() == [0, 3, 6]
    np.testing.assert_allclose(ds["optimizer_gradient_cosine"], 1, atol=1e-5)
    net: Any = watched
    assert not net.net._forward_pre_hooks
