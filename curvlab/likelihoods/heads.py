"""Heads: the sum of likelihoods of several outputs by name.

Legend: N examples, C outputs of a head (flattened), V columns of the root.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from jaxtyping import Float, Int
from torch import Tensor

from curvlab.errors import CurvlabError, shown, unknown
from curvlab.likelihoods.base import (
    Likelihood,
    counted_of,
    mean_per,
    places_of,
    ratio,
    root_of,
    sample_of,
    scaled,
)
from curvlab.likelihoods.outputs import guard_root


class Heads:
    """Sum of likelihoods over named outputs, ℓ = Σ_h ℓ_h(z_h, y_h).

    Heads are independent given the input. Each has the mean that it states: one per token is N/M
    times its losses, M its own count, and so in every matrix. Outputs are {name: [N, *C_h]}, which
    `join` lays side by side in one tensor [N, ΣC]; all other methods take that tensor. Targets are
    {name: what that head's likelihood takes}.

    Args:
        heads: {name: likelihood}, in the order in which outputs are laid side by side.

    Raises:
        CurvlabError: no head, or what is no likelihood.
    """

    def __init__(self, heads: Mapping[str, Likelihood]) -> None:
        if not isinstance(heads, Mapping) or not heads:
            raise CurvlabError(f"heads must be {{name: likelihood}}, not {shown(heads)}")
        for name, head in heads.items():
            if (
                isinstance(head, type)
                or not isinstance(head, Likelihood)
                or isinstance(head, Heads)
            ):
                raise CurvlabError(f"head '{name}' must be a likelihood, not {shown(head)}")
        self.heads: dict[str, Likelihood] = dict(heads)
        self.shapes: dict[str, torch.Size] = {}  # of one example's outputs, as last joined

    def join(self, outputs: Mapping[str, Float[Tensor, "N *C"]]) -> Float[Tensor, "N C"]:
        """Lay the outputs of all heads side by side, [N, ΣC], and remember their shapes.

        The order is that of the heads.

        Raises:
            CurvlabError: a name that is missing or unknown, what is no tensor, other counts of
                examples.
        """
        self._check_names("the model's outputs", outputs)
        for name, z in outputs.items():
            if not isinstance(z, Tensor) or not z.ndim:
                raise CurvlabError(f"output '{name}' must be a tensor [N, …], not {shown(z)}")
        sizes = {name: len(outputs[name]) for name in self.heads}
        if len(set(sizes.values())) > 1:
            raise CurvlabError(f"the heads' outputs have not as many examples: {sizes}")
        self.shapes = {name: outputs[name].shape[1:] for name in self.heads}
        return torch.cat(
            [
                outputs[name].flatten(1) if outputs[name].ndim > 1 else outputs[name][:, None]
                for name in self.heads
            ],
            1,
        )

    def split(self, z: Float[Tensor, "N C"]) -> dict[str, Float[Tensor, "N *C"]]:
        """Return {name: outputs [N, *C_h]}, in the shapes that were joined last.

        Raises:
            CurvlabError: none were, or of other sizes.
        """
        widths = [shape.numel() for shape in self.shapes.values()]
        if not widths or z.shape[1:] != (sum(widths),):
            joined = " + ".join(map(str, widths)) or "none yet"
            raise CurvlabError(
                f"joined outputs must be [N, {joined}], not {list(z.shape)}: join the outputs of"
                " the heads first"
            )
        parts = torch.split(z, widths, 1)
        return {
            name: part.reshape(-1, *shape)
            for (name, shape), part in zip(self.shapes.items(), parts, strict=True)
        }

    def check(self, z: Float[Tensor, "N C"], y: Mapping[str, Tensor]) -> None:
        """Raise CurvlabError unless y has every head's targets and no others, and each fits."""
        if not hasattr(y, "keys"):
            raise CurvlabError(f"targets of heads must be {{name: tensor}}, not {shown(y)}")
        self._check_names("the targets", y)
        for name, part in self.split(z).items():
            try:
                self.heads[name].check(part, y[name])
            except CurvlabError as error:
                raise CurvlabError(f"head '{name}': {error}") from error

    @property
    def per(self) -> str:
        """What the mean is over: "sequence" or "token", or each head's own where they differ."""
        each = {name: mean_per(head) for name, head in self.heads.items()}
        if len(set(each.values())) == 1:
            return next(iter(each.values()))
        return ", ".join(f"{name}: {per}" for name, per in each.items())

    def count(self, y: Mapping[str, Tensor]) -> dict[str, float]:
        """Return {head: M}, what each head's mean is over."""
        found = {name: counted_of(head, y[name]) for name, head in self.heads.items()}
        return {name: count for name, count in found.items() if not isinstance(count, dict)}

    def factor(self, y: Mapping[str, Tensor]) -> dict[str, float]:
        """Return {head: N/M}, which its losses are times; 1 of a mean over examples.

        Raises:
            CurvlabError: a head of which no place is counted.
        """
        return {
            name: ratio(len(y[name]), count, name) if scaled(self.heads[name]) else 1.0
            for name, count in self.count(y).items()
        }

    def losses(
        self, z: Float[Tensor, "N C"], y: Mapping[str, Tensor]
    ) -> dict[str, Float[Tensor, " N"]]:
        """Return {head: its loss of each example}, of the sum over its places."""
        return {name: self.heads[name].loss(part, y[name]) for name, part in self.split(z).items()}

    def loss(
        self,
        z: Float[Tensor, "N C"],
        y: Mapping[str, Tensor],
        factors: Mapping[str, float] | None = None,
    ) -> Float[Tensor, " N"]:
        """Return the sum of the heads' losses of each example, each times its factor, if given."""
        each = self.losses(z, y)
        times = factors or {}
        return torch.stack([each[name] * times.get(name, 1.0) for name in each]).sum(0)

    def sample(
        self, z: Float[Tensor, "N C"], generator: torch.Generator, y: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Return {name: labels drawn of that head}, head after head from one generator."""
        return {
            name: sample_of(self.heads[name], part, generator, y[name])
            for name, part in self.split(z).items()
        }

    def root(self, z: Float[Tensor, "N C"], y: Mapping[str, Tensor]) -> Float[Tensor, "V N C"]:
        """Return the heads' columns one after the other, V = ΣV_h, each zero in the other heads.

        Raises:
            CurvlabError: they would take more than 80 % of the memory.
        """
        guard_root(z)
        roots = (root_of(self.heads[name], part, y[name]) for name, part in self.split(z).items())
        return block_diagonal(z, roots)

    def places(self, z: Float[Tensor, "N C"], y: Mapping[str, Tensor]) -> Int[Tensor, " C"]:
        """Return the number of the place of each output, the heads' places one after the other."""
        found, count = [], 0
        for name, part in self.split(z).items():
            own = places_of(self.heads[name], part, y[name]).flatten()
            found.append(own + count)
            count += int(own.max()) + 1
        return torch.cat(found)

    def _check_names(self, what: str, given: Mapping[str, Tensor]) -> None:
        names = list(given.keys())  # a nest of tensors has them, and is not gone through
        missing = [name for name in self.heads if name not in names]
        if missing:
            raise CurvlabError(
                f"{what} lack the head{'s' if len(missing) > 1 else ''} '{', '.join(missing)}'"
                f" (given: {', '.join(map(str, names)) or 'none'})"
            )
        for name in names:
            if name not in self.heads:
                raise unknown("head", name, self.heads)


def block_diagonal(
    z: Float[Tensor, "N C"], roots: Iterable[Float[Tensor, "V N *C"]]
) -> Float[Tensor, "V N C"]:
    """Return columns of heads that lie side by side in z, each with zeros at the others."""
    found, start = [], 0
    for root in roots:
        own = root.flatten(2) if root.ndim > 2 else root[:, :, None]
        columns = own.new_zeros(len(own), *z.shape)
        columns[:, :, start : start + own.shape[2]] = own
        found.append(columns)
        start += own.shape[2]
    return torch.cat(found)
