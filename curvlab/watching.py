"""`watch`: diagnostics in a training loop that is not ours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from curvlab.comparison_settings import ALWAYS, CompareSettings
from curvlab.errors import CurvlabError, several, shown, whole
from curvlab.interface import Outputs
from curvlab.likelihoods import Likelihood
from curvlab.objective import Objective
from curvlab.parallel import Ranks
from curvlab.probes.base import PROBES, asked
from curvlab.signatures import known_options, shows
from curvlab.strangers import original
from curvlab.system import paths
from curvlab.watched_loop import (
    Optimizers,
    check_held,
    decays_of,
    described_optimizer,
    plain_optimizers,
    rate_in,
)
from curvlab.watched_step import Looker
from curvlab.watcher import Take, Watcher


@dataclass(frozen=True, kw_only=True)
class WatchSettings:
    """The further settings of `watch`.

    `seed` is that of labels drawn from the model; `momentum`, `decay`, `update_every` (T₁) and
    `refresh_every` (T₂) are the compared methods', which learn from the sampled steps alone: hence
    no momentum by default. `outputs`, `labels` and `shared` are those of `Objective`. `take` is a
    function of what the loader yields: (inputs, targets), where it is neither a pair nor a mapping
    with labels; inputs are then taken from it, and not from the model's call. `ranks` are those of
    the loop, which all watch; those of the process group where None, `curvlab.parallel.ALONE` for
    this process by itself.
    """

    seed: int = 0
    momentum: float | None = 0.0
    decay: float | None = None
    update_every: int = 1
    refresh_every: int = 1
    outputs: Outputs = "logits"
    labels: str | int = "labels"
    shared: tuple[str, ...] = ()
    take: Take | None = None
    ranks: Ranks | None = None


@shows(WatchSettings)
def watch(
    model: nn.Module,
    likelihood: Likelihood,
    optimizer: Optimizers,
    *,
    algorithms: Sequence[str] = ("block-fisher", "kfac"),
    probes: Sequence[str] = (),
    path: str | Path | None = None,
    every: int = 1,
    damping: float = 1e-3,
    **options: Any,
) -> Watcher:
    """Return a context in which a loop's own steps are compared with the directions of algorithms.

    The log is one of `compare` whose reference, "watched", is the loop's optimizer: its direction
    is (old − new) / lr, decoupled weight decay apart. No bit of the training changes.

    >>> import torch, curvlab as cl
    >>> model, x, y = torch.nn.Linear(3, 2), torch.randn(8, 3), torch.randint(2, (8,))
    >>> optimizer = torch.optim.AdamW(model.parameters())
    >>> with cl.watch(model, cl.likelihoods.Categorical(), optimizer, algorithms=["kfac"]) as watch:
    ...     for x, y in watch([(x, y)]):
    ...         optimizer.zero_grad()
    ...         torch.nn.functional.cross_entropy(model(x), y).backward()
    ...         optimizer.step()
    >>> watch.dataset["algorithm"].values.tolist()
    ['watched', 'watched+decay', 'kfac']

    Args:
        model: the loop's; compiled or wrapped by `DataParallel` or DDP as it may be.
        likelihood: of `curvlab.likelihoods`, whose mean loss is the loop's.
        optimizer: one, or all, of the loop.
        algorithms: to compare with, of `ALGORITHMS`.
        probes: further ones of `compare`, each as "name" or "name:every".
        path: of the log's file; None keeps it in memory.
        every: steps between samples.
        damping: overall λ; each method's own damping follows from it.
        options: the fields of `WatchSettings`.

    Raises:
        CurvlabError: unknown names, values out of range or of another type, trainable parameters
            that no optimizer has, a path that cannot be written.
    """
    settings = WatchSettings(**known_options(options, WatchSettings, watch))
    if settings.take is not None and not callable(settings.take):
        raise CurvlabError(f"take must be a function of a minibatch, not {shown(settings.take)}")
    optimizers = plain_optimizers(optimizer)
    objective = Objective(
        original(model),
        likelihood,
        settings.seed,
        outputs=settings.outputs,
        labels=settings.labels,
        shared=settings.shared,
        ranks=settings.ranks,
    )
    objective.given_parts = True  # by each rank, its own
    check_held(objective, optimizers)
    names = tuple(several(algorithms))
    if not names:
        raise CurvlabError("algorithms must name one at least, such as sgd-m, the gradient itself")
    every = whole("every", every)
    compared = CompareSettings(
        reference=names[0],
        algorithms=names,
        damping=damping,
        momentum=settings.momentum,
        decay=settings.decay,
        update_every=settings.update_every,
        refresh_every=settings.refresh_every,
        log_every=every,
        probes=paced(probes, every),
    )
    place = objective.ranks.by_first(lambda: _checked(path))
    path = None if place is None else Path(place)
    about = {
        "call": {"function": "curvlab.watch", "path": None if path is None else str(path)},
        "model": type(objective.model).__name__,
        "lr": rate_in(optimizers[0].param_groups[0]),
        "optimizers": [described_optimizer(one) for one in optimizers],
    }
    written = path if objective.ranks.first else None
    decays = any(any(decays_of(one).values()) for one in optimizers)
    looker = Looker(objective, compared, written, about, decays)
    return Watcher(model, optimizers, looker, settings.take)


def _checked(path: str | Path | None) -> str | None:
    return None if path is None else str(paths.check_file(path, "log", "choose another path"))


def paced(probes: Sequence[str], every: int) -> tuple[str, ...]:
    """Return probes with their steps: their own, but no fewer than `every`, where none is said.

    Raises:
        CurvlabError: unknown probes.
    """
    found = []
    for name, own in asked(probes, "compare").items():
        steps = max(PROBES[name].every, every) if own is None and name not in ALWAYS else own
        found.append(name if steps is None else f"{name}:{steps}")
    return tuple(found)
