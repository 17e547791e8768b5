"""Loss and error of a model on whole data sets.

The model is in eval mode, without a graph; the data go through it in chunks; its state and all
chance are as before. The loss is the objective's, the mean over examples of a per-example sum; an
error is a mean over examples too (`measure_of`), or, of sequences of symbols, over symbols.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd

from curvlab.closure import Closure
from curvlab.datasets import Dataset
from curvlab.datasets.base import SparseRows
from curvlab.errors import CurvlabError
from curvlab.likelihoods import Bernoulli, Categorical, Gaussian, Likelihood
from curvlab.likelihoods.base import Counted, counted_of
from curvlab.likelihoods.heads import Heads
from curvlab.objective import Objective
from curvlab.system import random_state

Data = Dataset | tuple[Any, Any] | Mapping[str, Any] | Iterable[Any]
"""A data set, the pair (x, y) of one, or minibatches that can be gone through again.

Minibatches are pairs, or mappings with the labels in them.
"""


@dataclass(frozen=True)
class Measure:
    """An error of each example at outputs z [N, …] and targets y.

    Args:
        name: what a log calls its mean.
        units: of the error.
        each: (z, y) → the errors [N].
        count: y → how many errors each example has, [N]; `each` is then their sum, and the mean is
            over all of them. None: one.
    """

    name: str
    units: str
    each: Callable[[Tensor, Tensor], Float[Tensor, " N"]]
    count: Callable[[Tensor], Int[Tensor, " N"]] | None = None


def _wrong(likelihood: Categorical, z: Tensor, y: Tensor) -> Tensor:
    """Return the fraction wrong of each example's counted places; 0 where none is counted."""
    axis = likelihood.axis_of(z, y)
    soft = y.is_floating_point()
    wrong = (z.argmax(axis) != (y.argmax(axis) if soft else y)).double()
    if soft:
        return wrong.reshape(len(z), -1).mean(1)
    return _over(wrong, y.long() != likelihood.ignore_index)


def _over(each: Tensor, counted: Tensor) -> Tensor:
    """Return the mean of each example over what is counted; 0 where nothing is."""
    n = len(each)
    number = counted.reshape(n, -1).sum(1)
    return each.masked_fill(~counted, 0.0).reshape(n, -1).sum(1) / number.clamp_min(1)


def _wrong_sign(z: Tensor, y: Tensor) -> Tensor:
    return ((z > 0) != (y > 0.5)).flatten(1).double().mean(1)


def _squared(z: Tensor, y: Tensor) -> Tensor:
    return (z - y).square().flatten(1).mean(1)


WRONG = Measure("fraction of wrong classes", "1", partial(_wrong, Categorical()))
WRONG_SIGN = Measure("fraction of wrong classes", "1", _wrong_sign)
SQUARED_SIGMOID = Measure(
    "mean squared error of sigmoid(output)", "1", lambda z, y: _squared(z.sigmoid(), y)
)
SQUARED = Measure("mean squared error of the outputs", "1", _squared)


# Of symbols: class numbers y [N, T].


def _wrong_symbols(likelihood: Categorical, z: Tensor, y: Int[Tensor, "N T"]) -> Tensor:
    wrong = z.argmax(likelihood.axis_of(z, y)) != y
    return (wrong & (y != likelihood.ignore_index)).sum(1)


def _nats(likelihood: Categorical, z: Tensor, y: Int[Tensor, "N T"]) -> Tensor:
    z = z if likelihood.axis_of(z, y) == 1 else z.movedim(-1, 1)
    ignored = likelihood.ignore_index
    return F.cross_entropy(z, y.long(), reduction="none", ignore_index=ignored).double().sum(1)


def _bits(likelihood: Categorical, z: Tensor, y: Int[Tensor, "N T"]) -> Tensor:
    return _nats(likelihood, z, y) / math.log(2)


def _count(likelihood: Categorical, y: Int[Tensor, "N T"]) -> Tensor:
    return (y != likelihood.ignore_index).sum(1)


def symbol_measures(likelihood: Categorical) -> tuple[Measure, dict[str, Measure]]:
    """Return (the fraction of wrong symbols, {name in a log: cross-entropy per symbol}).

    A log adds the name to "train_" and "val_". Ignored places are left out; class weights and label
    smoothing are too.
    """

    def measure(name: str, units: str, each: Callable[..., Tensor]) -> Measure:
        return Measure(name, units, partial(each, likelihood), partial(_count, likelihood))

    return measure("fraction of wrong symbols", "1", _wrong_symbols), {
        "nats_per_symbol": measure("nats per symbol", "nat", _nats),
        "bits_per_symbol": measure("bits per symbol", "bit", _bits),
    }


@dataclass(frozen=True)
class Evaluated:
    """The data that loss and error are evaluated on.

    Args:
        examples: of the training loss.
        validation: likewise, or None.
        error: of an example (`measure_of`); None: the loss alone.
        size: examples at a time.
        further: {what a log adds to "train_" and "val_": a measure} (`further_of`).
    """

    examples: Data
    validation: Data | None
    error: Measure | None
    size: int
    further: Mapping[str, Measure] = field(default_factory=dict)


def measure_of(likelihood: Likelihood, outputs: int, y: object = None) -> Measure | None:
    """Return the documents' error of a likelihood; None where they have none.

    Classes: the fraction wrong, of each example over its counted places; where the targets y are
    sequences [N, T], of all symbols. Autoencoders (Bernoulli, several outputs): mean squared error
    of sigmoid(output) over pixels (practice). FACES (Gaussian): mean squared error of the outputs.
    Bernoulli with one output is a choice of two classes.
    """
    if isinstance(likelihood, Categorical):
        if _sequences(y):
            return symbol_measures(likelihood)[0]
        plain = likelihood.ignore_index == Categorical.ignore_index and likelihood.axis is None
        return WRONG if plain else replace(WRONG, each=partial(_wrong, likelihood))
    if isinstance(likelihood, Bernoulli):
        if likelihood.ignore_value is not None:
            return None  # a mean over the outputs that are not ignored has no name here
        return WRONG_SIGN if outputs == 1 else SQUARED_SIGMOID
    return SQUARED if isinstance(likelihood, Gaussian) else None


def further_of(likelihood: Likelihood, y: object) -> dict[str, Measure]:
    """Return what is measured beside loss and error.

    Of sequences of symbols it is the cross-entropy per symbol, in nat and in bit.
    """
    if isinstance(likelihood, Categorical) and _sequences(y):
        return symbol_measures(likelihood)[1]
    return {}


def _sequences(y: object) -> bool:
    return isinstance(y, Tensor) and y.ndim == 2 and not y.is_floating_point()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put all modules in eval mode inside; each is in its own mode again afterwards.

    In eval mode no example's loss depends on the others or on chance.
    """
    before = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for (
            module,
            was,
        ) in before.items():  # by its own `train`, which may do more than set the flag
            if module.training != was:
                module.train(was)
        for module, was in before.items():
            module.training = was


def in_eval_mode(model: nn.Module) -> list[str]:
    """Return the names of the modules in eval mode; "all" where that is all.

    Those are left out that lie inside of one that is so with all inside it.
    """
    found: list[str] = []
    whole: list[str] = []
    for name, module in model.named_modules():
        if module.training or any(name.startswith(f"{outer}.") for outer in whole):
            continue
        if not any(part.training for part in module.modules()):
            if not name:
                return ["all"]
            whole.append(name)
        found.append(name or "the model itself")
    return found


def ready_to_train(model: nn.Module) -> nn.Module:
    """Return the model, put into train mode where nothing in it is: for models built for a run."""
    return model if any(module.training for module in model.modules()) else model.train()


def depends_on_mode(module: nn.Module) -> bool:
    """Return whether a module's outputs are others in train mode.

    They are of dropout, also within recurrent and attention layers; batch norm; RReLU.
    """
    if isinstance(module, _NormBase):
        return module.track_running_stats
    if isinstance(module, nn.RNNBase | nn.MultiheadAttention):
        return module.dropout > 0
    return isinstance(module, nn.RReLU) or (isinstance(module, _DropoutNd) and module.p > 0)


def chunks(data: Data, size: int, most: int | None = None) -> Iterator[Any]:
    """Yield the examples in order, `size` at a time (minibatches: as they come).

    Of a data set it is the first `most`.
    """
    if isinstance(data, tuple) and all(isinstance(part, Tensor | SparseRows) for part in data):
        data = Dataset("data", data[0], data[1], "")
    elif isinstance(data, tuple | Mapping):  # nests: one minibatch
        yield data
        return
    if not isinstance(data, Dataset):
        yield from data
        return
    total = len(data) if most is None else min(most, len(data))
    for start in range(0, total, size):
        x = data.x[start : min(start + size, total)]
        yield x, x if data.y is data.x else data.y[start : start + len(x)]


def evaluate(
    objective: Objective,
    data: Data,
    *,
    error: Measure | None = None,
    size: int = 1000,
    most: int | None = None,
) -> tuple[float, float]:
    """Compute the mean loss and mean error (NaN without one) over the examples.

    They are added up in float64, and read from the device once.

    Args:
        objective: whose model and likelihood.
        data: the examples.
        error: of an example; None: the loss alone.
        size: examples at a time.
        most: of a data set the first so many examples; all where None.

    Raises:
        CurvlabError: no examples, targets that do not fit the outputs.
    """
    loss, *wrong = measured(objective, data, () if error is None else (error,), size, most)
    return loss, wrong[0] if wrong else float("nan")


def measured(
    objective: Objective,
    data: Data,
    measures: Sequence[Measure],
    size: int = 1000,
    most: int | None = None,
) -> list[float]:
    """Compute the mean loss, then the mean of each measure, as `evaluate` does."""
    count, counted = 0, Counted()
    heads = dict[str, Tensor]()  # sums of the losses of heads with means of their own
    sums, of = torch.zeros(2, 1 + len(measures), dtype=torch.float64, device=objective.device)
    with evaluating(objective.model), random_state.kept(objective.device), torch.no_grad():
        for batch in chunks(data, size, most):
            # no closure of the objective's own: its labels stay as they are
            closure = Closure(objective, *objective.batch(batch), 0, factor=1.0)
            z, losses = closure.outputs()
            sums[0] += losses.double().sum()
            for i, measure in enumerate(measures, 1):
                sums[i] += measure.each(z, closure.y).double().sum()
                of[i] += len(z) if measure.count is None else measure.count(closure.y).sum()
            count += len(z)
            m = counted_of(objective.likelihood, closure.y)
            counted.add(m)
            for name, own in (
                _losses(objective, z, closure.y).items() if isinstance(m, dict) else ()
            ):
                heads[name] = heads.get(name, 0) + own.double().sum()
    if not count:
        raise CurvlabError("there are no examples to evaluate on")
    of[0] = count
    loss, *means = (sums / of).tolist()
    factor = counted.factor(count)
    if isinstance(factor, dict):
        return [sum(factor[name] * float(own) for name, own in heads.items()) / count, *means]
    return [loss * factor, *means]


def _losses(objective: Objective, z: Tensor, y: Any) -> dict[str, Tensor]:
    """Return {head: its losses}."""
    likelihood = objective.likelihood
    assert isinstance(likelihood, Heads)
    return likelihood.losses(z, y)


def scores_of(objective: Objective, on: Evaluated, most: int | None = None) -> dict[str, float]:
    """Return {train_loss, train_error, and where there is validation val_loss, val_error}.

    Likewise what is measured further. An error is NaN where none is measured.

    Args:
        objective: whose model and likelihood.
        on: the data, and the error.
        most: examples of the training set; all where None.
    """
    scores: dict[str, float] = {}
    for name, data in (("train", on.examples), ("val", on.validation)):
        if data is not None:
            first = most if name == "train" else None
            measures = ([on.error] if on.error else []) + list(on.further.values())
            loss, *means = measured(objective, data, measures, on.size, first)
            error = means.pop(0) if on.error else math.nan
            scores |= {f"{name}_loss": loss, f"{name}_error": error}
            scores |= dict(zip((f"{name}_{kind}" for kind in on.further), means, strict=True))
    return scores


def score_names(on: Evaluated) -> tuple[str, ...]:
    """Return the names of `scores_of` that a log holds."""
    parts = ("train",) if on.validation is None else ("train", "val")
    kinds = ("loss", *(("error",) if on.error else ()), *on.further)
    return tuple(f"{part}_{kind}" for part in parts for kind in kinds)
