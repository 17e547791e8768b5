"""`watch` as a callback of somebody else's trainer: of `transformers`, of Lightning.

Neither is imported before its callback is asked for: ``pip install curvlab[transformers]`` or
``curvlab[lightning]`` brings it.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from curvlab.errors import CurvlabError, cause_of
from curvlab.likelihoods import Likelihood
from curvlab.watcher import Watcher
from curvlab.watching import watch


def transformers_callback(likelihood: Likelihood, **options: Any) -> Any:
    """Return a `transformers.TrainerCallback` that watches the trainer's own steps.

    ``Trainer(…, callbacks=[transformers_callback(likelihood, path="run.h5", every=100)])``. The
    minibatches are the model's own calls, the labels among their keywords; of a causal model, whose
    own loss shifts them, give ``take=next_symbols``. `callback.watch` is the `Watcher`.

    Args:
        likelihood: whose mean loss is the model's own.
        options: of `curvlab.watch`.

    Raises:
        CurvlabError: `transformers` cannot be imported.
    """
    base = _imported("transformers", "transformers").TrainerCallback

    class Callback(base):  # type: ignore[misc,valid-type]  # of what may not be installed
        watch: Watcher | None = None

        def on_train_begin(
            self, args: Any, state: Any, control: Any, model: Any, optimizer: Any, **rest: Any
        ) -> None:
            self.watch = watch(model, likelihood, optimizer, **options)
            self.watch.calls = True
            self.watch.__enter__()

        def on_train_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
            _close(self.watch)

    return Callback()


def lightning_callback(
    likelihood: Likelihood, model: Callable[[Any], nn.Module] | None = None, **options: Any
) -> Any:
    """Return a Lightning `Callback` that watches the trainer's own steps.

    ``Trainer(…, callbacks=[lightning_callback(likelihood, path="run.h5", every=100)])``.
    `callback.watch` is the `Watcher`.

    Args:
        likelihood: whose mean loss the training step returns.
        model: LightningModule → the network in it that the likelihood takes the outputs of; the
            module itself where None.
        options: of `curvlab.watch`.

    Raises:
        CurvlabError: neither `lightning` nor `pytorch_lightning` can be imported.
    """
    base = _imported("lightning.pytorch", "lightning").Callback

    class Callback(base):  # type: ignore[misc,valid-type]  # of what may not be installed
        watch: Watcher | None = None

        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            network = pl_module if model is None else model(pl_module)
            self.watch = watch(network, likelihood, trainer.optimizers, **options).__enter__()

        def on_train_batch_start(
            self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
        ) -> None:
            if self.watch is not None:
                self.watch.see(batch)

        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            _close(self.watch)

        def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
            _close(self.watch, exception)

    return Callback()


def next_symbols(batch: dict[str, Any]) -> tuple[dict[str, Any], Tensor]:
    """Return (inputs, targets) of a call of a causal model that shifts the labels itself.

    The targets are the labels one place on, −100 at the last: with ``Categorical(axis=-1,
    ignore_index=-100, per="token")`` the loss is the model's own.

    Args:
        batch: the keywords of the call.

    Raises:
        CurvlabError: there are no labels among them.
    """
    if "labels" not in batch:
        raise CurvlabError(
            "the model is called without labels, so that the trainer's loss is not the model's own"
            " (label smoothing, or a compute_loss of its own): give take= a function of the call's"
            " keywords that returns (inputs, targets), or leave label smoothing out"
        )
    labels: Tensor = batch["labels"]
    shifted = torch.nn.functional.pad(labels[..., 1:], (0, 1), value=-100)
    return {key: value for key, value in batch.items() if key != "labels"}, shifted


def _close(opened: Watcher | None, error: BaseException | None = None) -> None:
    if opened is not None and opened.is_open:
        opened.__exit__(None if error is None else type(error), error, None)


def _imported(module: str, extra: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise CurvlabError(
            f"{module} cannot be imported ({cause_of(error)}): pip install 'curvlab[{extra}]'"
        ) from error
