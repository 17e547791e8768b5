"""Likelihood, and how its methods are called: with the data's labels where it takes them.

Legend: N examples, C outputs or classes, M counted places, V columns of the root.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from curvlab.errors import CurvlabError


@runtime_checkable
class Likelihood(Protocol):
    """The law p(y | z) of labels at outputs, as far as an objective needs to know it."""

    def check(self, z: Float[Tensor, "N *C"], y: Any) -> None:
        """Raise CurvlabError where the targets do not fit the outputs (shape, dtype, range)."""

    def loss(self, z: Float[Tensor, "N *C"], y: Any) -> Float[Tensor, " N"]:
        """Return −log p(y | z) of each example, summed over outputs."""

    def sample(
        self, z: Float[Tensor, "N *C"], generator: torch.Generator, *args: Any, **kwargs: Any
    ) -> Any:
        """Draw labels that `loss` takes from the model's own law.

        The method is `sample(z, generator)` or `sample(z, generator, y)`. Where the data's labels y
        say more than a draw does (a place that has no loss), the labels drawn say the same.
        """

    def root(self, z: Float[Tensor, "N *C"], *args: Any, **kwargs: Any) -> Float[Tensor, "V N *C"]:
        """Return columns v of S, S Sᵀ = ∂²ℓ/∂z² of each example, a slice of the first axis each.

        The method is `root(z)` or `root(z, y)`.
        """


def root_of(likelihood: Likelihood, z: Float[Tensor, "N *C"], y: Tensor) -> Float[Tensor, "V N *C"]:
    """Return columns of S, S Sᵀ = ∂²ℓ/∂z², by the likelihood's own `root`.

    It is `root(z)` or `root(z, y)`, whichever the likelihood has.
    """
    way = _labels_go(likelihood.root, 1)
    if way is None:
        return likelihood.root(z)
    return likelihood.root(z, y) if way == "by place" else likelihood.root(z, y=y)


def sample_of(
    likelihood: Likelihood, z: Float[Tensor, "N *C"], generator: torch.Generator, y: Any
) -> Any:
    """Draw labels from the model's law by the likelihood's own `sample`.

    It is `sample(z, generator)` or `sample(z, generator, y)`, whichever the likelihood has.
    """
    way = _labels_go(likelihood.sample, 2)
    if way is None:
        return likelihood.sample(z, generator)
    return (
        likelihood.sample(z, generator, y)
        if way == "by place"
        else likelihood.sample(z, generator, y=y)
    )


def places_of(likelihood: Likelihood, z: Float[Tensor, "N *C"], y: Any) -> Int[Tensor, " *C"]:
    """Return the number of the place of each output of an example, by the likelihood's `places`.

    Outputs [N, C] of a likelihood without such a method have one place.

    Raises:
        CurvlabError: there is no such method, and the outputs have several axes.
    """
    own = getattr(likelihood, "places", None)
    if callable(own):
        found: Tensor = own(z, y)
        return found
    if z.ndim > 2:
        raise CurvlabError(
            f"{type(likelihood).__name__} does not say which outputs of {list(z.shape)} are one"
            " place's: give it a method places(z, y) that numbers them, or take unit='sequence'"
        )
    return torch.zeros(z.shape[1:], dtype=torch.long, device=z.device)


_Way = Literal["by place", "by name"]


def _labels_go(method: Callable[..., Tensor], given: int) -> _Way | None:
    """Return how a method takes the data's labels behind its `given` other arguments, if it does.

    An argument called `y` is theirs, and one of any other name if it has no default.
    """
    function = getattr(method, "__func__", method)
    return _read(function, given + (function is not method))


@cache  # by function, not by type: an instance may carry a method of its own
def _read(function: Callable[..., Tensor], given: int) -> _Way | None:
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):  # a builtin, which says nothing
        return None
    by_place = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    more = by_place[given:]
    if more and (more[0].name == "y" or more[0].default is inspect.Parameter.empty):
        return "by place"
    kinds, named = (
        {p.kind for p in parameters},
        {p.name for p in parameters if p not in by_place[:given]},
    )
    if not more and inspect.Parameter.VAR_POSITIONAL in kinds:
        return "by place"
    return "by name" if "y" in named or inspect.Parameter.VAR_KEYWORD in kinds else None


def scaled(likelihood: Likelihood) -> bool:
    """Return whether the mean is not over examples, so that `factor_of` may differ from 1."""
    # a number of that name is a likelihood's own affair
    own = callable(getattr(likelihood, "factor", None))
    return own and getattr(likelihood, "per", "token") != "sequence"


def mean_per(likelihood: Likelihood) -> str:
    """Return what a log calls the mean: per "sequence" (example), "token", or by a "factor"."""
    return str(getattr(likelihood, "per", "factor" if scaled(likelihood) else "sequence"))


MeanFactor = float | dict[str, float]
"""N/M of N examples and M that the mean is over; of heads {head: its own}."""


def factor_of(likelihood: Likelihood, y: Any) -> MeanFactor:
    """Return N/M of a minibatch's labels, by the likelihood's `factor(y)`; 1 where it has none.

    Raises:
        CurvlabError: the likelihood's own, where no place is counted.
    """
    if not scaled(likelihood):
        return 1.0
    found = likelihood.factor(y)  # type: ignore[attr-defined]  # `scaled`
    return dict(found) if isinstance(found, Mapping) else float(found)


def counted_of(likelihood: Likelihood, y: Any) -> MeanFactor:
    """Return M of a minibatch's labels: what the mean is over; of heads {head: its own}.

    It is the likelihood's `count(y)`, or N over its factor; N itself for a mean over examples.
    """
    if not scaled(likelihood):
        return float(len(y))
    count = getattr(likelihood, "count", None)
    if count is None:
        factor = factor_of(likelihood, y)
        assert not isinstance(factor, dict)  # heads have a count
        return len(y) / factor
    found = count(y)
    return dict(found) if isinstance(found, Mapping) else float(found)


def factor_over(likelihood: Likelihood, labels: Iterable[Any]) -> MeanFactor:
    """Return N/M of the labels of several minibatches together.

    Raises:
        CurvlabError: no place is counted in any of them.
    """
    examples, counted = 0.0, Counted()
    for y in labels:
        examples += len(y)
        counted.add(counted_of(likelihood, y))
    return counted.factor(examples)


class Counted:
    """Sums of M over minibatches; of heads one for each."""

    def __init__(self) -> None:
        self.sums: dict[str, float] = {}

    def add(self, counted: MeanFactor) -> None:
        """Add what one minibatch counts."""
        each = counted if isinstance(counted, dict) else {"": counted}
        for name, number in each.items():
            self.sums[name] = self.sums.get(name, 0.0) + number

    def factor(self, examples: float) -> MeanFactor:
        """Return N/M. Raises CurvlabError where an M is 0."""
        if list(self.sums) in ([], [""]):
            return ratio(examples, self.sums.get("", 0.0))
        return {name: ratio(examples, number, name) for name, number in self.sums.items()}


def trainable_in(likelihood: Any) -> list[str]:
    """Return the names of a likelihood's own tensors that require a gradient; of heads all."""
    heads = getattr(likelihood, "heads", None)
    if isinstance(heads, Mapping):
        return [f"{name}.{own}" for name, head in heads.items() for own in trainable_in(head)]
    named = likelihood.named_parameters() if isinstance(likelihood, nn.Module) else ()
    every = [*getattr(likelihood, "__dict__", {}).items(), *named]
    return list(dict.fromkeys(n for n, t in every if isinstance(t, Tensor) and t.requires_grad))


def losses_of(likelihood: Any, z: Float[Tensor, "N *C"], y: Any, factor: MeanFactor) -> Tensor:
    """Return the loss of each example times N/M; of heads each head's times its own, [N]."""
    if isinstance(factor, dict):
        found: Tensor = likelihood.loss(z, y, factor)
        return found
    losses: Tensor = likelihood.loss(z, y)
    return losses if factor == 1 else losses * factor


def root_factor(factor: MeanFactor) -> MeanFactor:
    """Return the root of N/M, or of each head's."""
    if isinstance(factor, dict):
        return {name: math.sqrt(own) for name, own in factor.items()}
    return math.sqrt(factor)


def by_output(likelihood: Any, z: Float[Tensor, "N *C"], factor: MeanFactor) -> float | Tensor:
    """Return N/M as a number; of heads that of every output's head, [C]."""
    if not isinstance(factor, dict):
        return factor
    parts = likelihood.split(z[:1]).items()
    return torch.cat([z.new_full((part.numel(),), factor[name]) for name, part in parts])


def ratio(examples: float, counted: float, head: str = "") -> float:
    """Return N/M. Raises CurvlabError, with the head's name, where M is 0."""
    if not counted > 0:
        of = f"head '{head}': " if head else ""
        raise CurvlabError(
            f"{of}no place of the {examples:.0f} examples is counted (all are ignored, or of weight"
            ' 0), so that there is no mean over them: leave them out, or take per="sequence"'
        )
    return examples / counted
