"""Every matrix by hand: `torch.func` over one flat vector of all parameters, reverse mode twice,
nothing of `curvlab.exact`.

The Fisher matrix is its definition, the mean over the model's own labels: all of them for
categorical and Bernoulli; for Gaussian z ± 1 in every output, which has the moments that count.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property, lru_cache
from itertools import product

import torch
from oracle import total
from problems import Problem, laid_out, problem
from torch import Tensor
from torch.func import functional_call, grad, hessian, jacrev, vmap

import curvlab as cl
from curvlab.layers import Block


class Reference:
    """Legend: N examples, C outputs (flattened), D parameters in the layout's order."""

    def __init__(self, p: Problem) -> None:
        self.p = p
        blocks = p.objective().blocks
        weights = {name: p.model.get_parameter(name).detach() for b in blocks for name in b.params}
        ids = torch.arange(sum(w.numel() for w in weights.values())).split(
            [w.numel() for w in weights.values()]
        )
        self.order = self._flat(
            blocks, {name: i.view_as(w) for (name, w), i in zip(weights.items(), ids, strict=True)}
        )
        self.shapes = {name: w.shape for name, w in weights.items()}
        self.at = torch.cat([w.flatten() for w in weights.values()])
        ends = torch.tensor([b.numel for b in blocks]).cumsum(0).tolist()
        self.slices = {
            b.name: slice(end - b.numel, end) for b, end in zip(blocks, ends, strict=True)
        }
        where = self.order.argsort()  # of each weight, in the matrix
        self.entries = {name: where[i] for name, i in zip(weights, ids, strict=True)}
        self._known: dict[str, Tensor] = {}
        self.entries |= {name: torch.arange(s.start, s.stop) for name, s in self.slices.items()}

    @staticmethod
    def _flat(blocks: Sequence[Block], tensors: dict[str, Tensor]) -> Tensor:
        return torch.cat([laid_out(b, tensors).flatten() for b in blocks])

    def outputs(self, w: Tensor, x: Tensor) -> Tensor:
        parts = w.split([s.numel() for s in self.shapes.values()])
        weights = {
            name: part.view(shape)
            for (name, shape), part in zip(self.shapes.items(), parts, strict=True)
        }
        return functional_call(self.p.model, weights, (x,))

    @cached_property
    def z(self) -> Tensor:
        return self.p.model(self.p.x).detach()

    @cached_property
    def jacobian(self) -> Tensor:
        """∂zₙ: [N, C, D]."""
        each = vmap(jacrev(lambda w, x: self.outputs(w, x[None])[0].flatten()), (None, 0))
        return each(self.at, self.p.x)[..., self.order]

    def gradients(self, y: Tensor) -> Tensor:
        """∂ℓₙ at labels y: [N, D]."""
        each = vmap(
            grad(lambda w, x, y: self.p.likelihood.loss(self.outputs(w, x[None]), y[None])[0]),
            (None, 0, 0),
        )
        return each(self.at, self.p.x, y)[:, self.order]

    @cached_property
    def output_hessian(self) -> Tensor:
        """∂²ℓₙ/∂z²: [N, C, C]."""
        found = vmap(hessian(lambda z, y: self.p.likelihood.loss(z[None], y[None])[0]))(
            self.z, self.p.y
        )
        size = self.z[0].numel()
        return found.reshape(-1, size, size)

    def labels(self) -> list[tuple[Tensor, Tensor]]:
        """(labels, their probability for each example)."""
        z = self.z
        if isinstance(self.p.likelihood, cl.likelihoods.Categorical):
            return [(torch.full((len(z),), c), z.softmax(1)[:, c]) for c in range(z.shape[1])]
        found = []
        for bits in product([0.0, 1.0], repeat=z[0].numel()):
            y = torch.tensor(bits, dtype=z.dtype).view(z.shape[1:]).expand_as(z)
            if isinstance(self.p.likelihood, cl.likelihoods.Bernoulli):
                found.append(
                    (y, torch.where(y > 0, z.sigmoid(), (-z).sigmoid()).reshape(len(z), -1).prod(1))
                )
            else:
                found.append(
                    (z + 2 * y - 1, torch.full((len(z),), 0.5 ** len(bits), dtype=z.dtype))
                )
        return found

    def __getitem__(self, kind: str) -> Tensor:
        """[D, D]; of fisher-mc see `drawn`."""
        if kind not in self._known:
            self._known[kind] = self._make(kind)
        return self._known[kind]

    def _make(self, kind: str) -> Tensor:
        p, n = self.p, len(self.p.x)
        if kind == "hessian":
            return self._second(lambda w: p.likelihood.loss(self.outputs(w, p.x), p.y).mean())
        if kind == "pi":
            slope = grad(lambda z: p.likelihood.loss(z, p.y).mean())(self.z)
            return self._second(lambda w: (self.outputs(w, p.x) * slope).sum())
        if kind == "ggn":
            return (
                torch.einsum("nci,ncd,ndj->ij", self.jacobian, self.output_hessian, self.jacobian)
                / n
            )
        if kind == "fisher":
            each = [(self.gradients(y), weight) for y, weight in self.labels()]
            return total(torch.einsum("n,ni,nj->ij", weight, g, g) for g, weight in each) / n
        assert kind == "ef"
        return self.drawn([p.y])

    def _second(self, f: Callable[[Tensor], Tensor]) -> Tensor:
        # jacrev inside is wrong for layer norm (torch 2.13)
        return jacrev(grad(f))(self.at)[self.order][:, self.order]

    def drawn(self, labels: Sequence[Tensor]) -> Tensor:
        """Second moment of the gradients at several labels of each example."""
        g = torch.cat([self.gradients(y) for y in labels])
        return g.mT @ g / len(g)


@lru_cache(maxsize=64)
def reference(model: str, likelihood: str = "categorical") -> Reference:
    """Of a problem of the zoo; shared, so nobody may change its model."""
    return Reference(problem(model, likelihood))


def sampled(
    p: Problem, objective: cl.Objective, draws: int = 1, number: int = 1, part: int = 0
) -> list[Tensor]:
    """The labels that the oracle's call `number` draws at its chunk `part`, drawn again."""
    generator = objective.generator(number, "exact", part)
    z = p.model(p.x).detach()
    return [p.likelihood.sample(z, generator) for _ in range(draws)]


def assert_block(found: Tensor, expected: Tensor, whole: Tensor, tolerance: float = 1e-12) -> None:
    """Within `tolerance` of the block's own norm, and 1e-15 of the whole's for blocks that are zero
    but for rounding.
    """
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    error = float((found - expected).norm())
    allowed = tolerance * float(expected.norm()) + 1e-15 * float(whole.norm())
    assert error <= allowed, f"error {error:.3g} above {allowed:.3g}"
