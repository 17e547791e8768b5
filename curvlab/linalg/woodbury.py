"""Solves through Gram matrices R Rᵀ of few long rows.

The rows of one layer are outer products and need never be formed.

Legend: R rows, D their length, O and I the block's outputs and inputs (D = O I), K columns; V
vectors sent back, N examples, T places, Γ groups of outputs with inputs of their own (then O
outputs in each, D = Γ O I).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import reduce
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from curvlab.errors import CurvlabError, guard_memory
from curvlab.linalg.cholesky import damped_cholesky, shifted

_NUMBERS = 1 << 24  # of rows formed at once


class RowMatrix(Protocol):
    """Matrix of few long rows, by what the formulas need of it."""

    @property
    def width(self) -> int:
        """Length of the rows, D."""

    def __len__(self) -> int: ...
    def times(self, v: Float[Tensor, "D *K"]) -> Float[Tensor, "R *K"]:
        """Return the inner products of the rows with v: [R], or [R, K] of K columns."""

    def transposed(self, w: Float[Tensor, "R *K"]) -> Float[Tensor, "D *K"]:
        """Return the sum of the rows weighted by w: [D], or [D, K] of K columns."""

    def gram(self) -> Float[Tensor, "R R"]:
        """Return the inner products of the rows with each other, [R, R]."""

    def dense(self) -> Float[Tensor, "R D"]:
        """Return all rows formed, [R, D]."""

    def columns(self) -> Iterator[Float[Tensor, "R _"]]:
        """Yield all columns in their order, some at a time."""

    def squares(self) -> Float[Tensor, " D"]:
        """Return the squared lengths of the columns, [D]."""

    def total(self) -> Float[Tensor, ""]:
        """Return the sum of `squares`, a scalar."""


@dataclass(frozen=True)
class Rows:
    """Matrix with rows vec(g_r a_rᵀ), [R, O I].

    Thesis 5.3.3: ⟨row_i, row_j⟩ = (g_iᵀ g_j)(a_iᵀ a_j). With ``a = None`` the rows are `g` itself,
    [R, D] (weights shared over several places: no outer products).
    """

    g: Float[Tensor, "R O"]
    a: Float[Tensor, "R I"] | None = None

    @property
    def width(self) -> int:
        """Length of the rows: O I, or that of `g` without `a`."""
        return self.g.shape[1] * (1 if self.a is None else self.a.shape[1])

    def __len__(self) -> int:
        return len(self.g)

    def times(self, v: Float[Tensor, "D *K"]) -> Float[Tensor, "R *K"]:
        """Return the rows times v, of outer products g_rᵀ V a_r: [R], or [R, K]."""
        if self.a is None:
            return self.g @ v
        matrix = v.reshape(self.g.shape[1], self.a.shape[1], -1)
        if matrix.shape[2] == 1:  # row · v = gᵀ V a
            return ((self.g @ matrix[:, :, 0]) * self.a).sum(1).reshape(-1, *v.shape[1:])
        return torch.einsum("ro,oik,ri->rk", self.g, matrix, self.a)

    def transposed(self, w: Float[Tensor, "R *K"]) -> Float[Tensor, "D *K"]:
        """Return Σ_r w_r row_r, in the row-major order of [O, I]: [D], or [D, K]."""
        if self.a is None:
            return self.g.mT @ w
        if w.ndim == 1:
            return ((self.g * w[:, None]).mT @ self.a).flatten()
        return torch.einsum("ro,rk,ri->oik", self.g, w, self.a).reshape(-1, w.shape[1])

    def gram(self) -> Float[Tensor, "R R"]:
        """Return (g_iᵀ g_j)(a_iᵀ a_j), [R, R]; without `a` g_iᵀ g_j."""
        inner = self.g @ self.g.mT
        return inner if self.a is None else inner * (self.a @ self.a.mT)

    def dense(self) -> Float[Tensor, "R D"]:
        """Return all rows formed, [R, D]; without `a` that is `g` itself."""
        return self.g if self.a is None else (self.g[:, :, None] * self.a[:, None, :]).flatten(1)

    def columns(self) -> Iterator[Float[Tensor, "R _"]]:
        """Return an iterator over the columns of one output at a time; without `a` all at once."""
        a = self.a
        return iter([self.g]) if a is None else (of_output[:, None] * a for of_output in self.g.mT)

    def squares(self) -> Float[Tensor, " D"]:
        """Return the squared lengths of the columns, [D]; no row is formed."""
        g = self.g.square()
        return g.sum(0) if self.a is None else (g.mT @ self.a.square()).flatten()

    def total(self) -> Float[Tensor, ""]:
        """Return the sum of the squared lengths of the rows; no row is formed."""
        lengths = self.g.square().sum(1)
        return lengths.sum() if self.a is None else lengths @ self.a.square().sum(1)


@dataclass(frozen=True)
class LayerRows:
    """Matrix with rows (v, n) = vec(Σ_t g_vnt a_ntᵀ), group after group, never formed as a whole.

    [V N, Γ O I]. At one place and one group the Gram matrix is (thesis 5.4.7, Alg. 22, line 16) (G
    Gᵀ) ∘ (1 ⊗ A Aᵀ); otherwise it comes from rows that are formed a bounded number at a time.
    """

    g: Float[Tensor, "V N T G O"]
    a: Float[Tensor, "N T G I"]

    @property
    def width(self) -> int:
        """Length of the rows, Γ O I."""
        return self.g.shape[3] * self.g.shape[4] * self.a.shape[3]

    def __len__(self) -> int:
        return self.g.shape[0] * self.g.shape[1]

    @property
    def _single(self) -> bool:
        """Whether there is one place and one group, so that each row is one outer product."""
        return self.g.shape[2] == self.g.shape[3] == 1

    def times(self, v: Float[Tensor, "D *K"]) -> Float[Tensor, "R *K"]:
        """Return the rows times v: [V N], or [V N, K]; no row is formed."""
        if self._single and v.ndim == 1:  # g · V a, as products of matrices: einsum costs more
            g, a = self.g[:, :, 0, 0], self.a[:, 0, 0]
            return (g * (a @ v.view(-1, a.shape[1]).mT)).sum(2).flatten()
        through = torch.einsum(
            "ntgi,goik->ntgok", self.a, v.reshape(*self.g.shape[3:], self.a.shape[3], -1)
        )
        return torch.einsum("vntgo,ntgok->vnk", self.g, through).reshape(-1, *v.shape[1:])

    def transposed(self, w: Float[Tensor, "R *K"]) -> Float[Tensor, "D *K"]:
        """Return the sum of the rows weighted by w: [D], or [D, K]; no row is formed."""
        if self._single and w.ndim == 1:
            g, a = self.g[:, :, 0, 0], self.a[:, 0, 0]
            weighed = (g * w.view(g.shape[:2])[:, :, None]).sum(0)
            return (weighed.mT @ a).flatten()
        back = torch.einsum("vntgo,vnk->ntgok", self.g, w.reshape(*self.g.shape[:2], -1))
        return torch.einsum("ntgok,ntgi->goik", back, self.a).reshape(-1, *w.shape[1:])

    def gram(self) -> Float[Tensor, "R R"]:
        """Return the rows' inner products, [V N, V N].

        Rows are formed only where T or Γ is above 1.
        """
        vectors, size = self.g.shape[:2]
        if self._single:
            g, a = self.g.flatten(0, 3), self.a.flatten(0, 2)
            return ((g @ g.mT).view(vectors, size, vectors, size) * (a @ a.mT)[:, None]).view(
                len(self), -1
            )
        out = self.g.new_empty(vectors, size, vectors, size)
        for some in self._parts():
            for others in self._parts():
                if others.start <= some.start:
                    left = self._rows(some)
                    right = left if others == some else self._rows(others)
                    inner = (left.flatten(0, 1) @ right.flatten(0, 1).mT).view(
                        *left.shape[:2], *right.shape[:2]
                    )
                    out[:, some, :, others] = inner
                    out[:, others, :, some] = inner.permute(2, 3, 0, 1)
        return out.view(len(self), -1)

    def _parts(self) -> list[slice]:
        step = max(1, _NUMBERS // (len(self.g) * self.width))
        return [
            slice(start, min(start + step, len(self.a))) for start in range(0, len(self.a), step)
        ]

    def _rows(self, some: slice) -> Float[Tensor, "V n D"]:
        return torch.einsum("vntgo,ntgi->vngoi", self.g[:, some], self.a[some]).flatten(2)

    def dense(self) -> Float[Tensor, "R D"]:
        """Return all rows formed, [V N, D]."""
        return self._rows(slice(None)).flatten(0, 1)

    def columns(self) -> Iterator[Float[Tensor, "R _"]]:
        """Yield the columns of one output at a time."""
        for group in range(self.g.shape[3]):
            for output in range(self.g.shape[4]):
                yield torch.einsum(
                    "vnt,nti->vni", self.g[:, :, :, group, output], self.a[:, :, group]
                ).flatten(0, 1)

    def squares(self) -> Float[Tensor, " D"]:
        """Return the squared lengths of the columns, [D]; no row is formed at one place."""
        if self._single:
            g, a = self.g[:, :, 0, 0].square().sum(0), self.a[:, 0, 0].square()
            return (g.mT @ a).flatten()
        if self.g.shape[2] == 1:
            return torch.einsum("vntgo,ntgi->goi", self.g.square(), self.a.square()).flatten()
        return torch.cat([part.square().sum(0) for part in self.columns()])

    def total(self) -> Float[Tensor, ""]:
        """Return the sum of `squares`, a scalar."""
        return self.squares().sum()


@dataclass(frozen=True)
class Below:
    """Rows below one another, those of each part times its scale: [Σ R, D]."""

    parts: tuple[Rows, ...]
    scales: tuple[float, ...]

    @property
    def width(self) -> int:
        """Length of the rows, that of each part."""
        return self.parts[0].width

    def __len__(self) -> int:
        return sum(len(p) for p in self.parts)

    def times(self, v: Float[Tensor, "D *K"]) -> Float[Tensor, "R *K"]:
        """Return the parts' products with v, one below the other: [Σ R], or [Σ R, K]."""
        return torch.cat([c * p.times(v) for p, c in self._scaled])

    def transposed(self, w: Float[Tensor, "R *K"]) -> Float[Tensor, "D *K"]:
        """Return the sum of the parts' rows weighted by their stretches of w: [D], or [D, K]."""
        each = torch.split(w, [len(p) for p in self.parts])
        return reduce(
            torch.add,
            [p.transposed(c * some) for (p, c), some in zip(self._scaled, each, strict=True)],
        )

    def gram(self) -> Float[Tensor, "R R"]:
        """Return the inner products of all rows with each other, [Σ R, Σ R]."""
        each = [torch.cat([products_of_rows(p, q) for q in self.parts], 1) for p in self.parts]
        scale = self.row_scales()
        return torch.cat(each) * scale * scale[:, None]

    def row_scales(self) -> Float[Tensor, " R"]:
        """Return each row's scale, [Σ R]."""
        return torch.cat([p.g.new_full((len(p),), c) for p, c in self._scaled])

    def dense(self) -> Float[Tensor, "R D"]:
        """Return all rows formed, [Σ R, D]."""
        return torch.cat([c * p.dense() for p, c in self._scaled])

    def columns(self) -> Iterator[Float[Tensor, "R _"]]:
        """Yield the columns some at a time; all at once where a part's rows are formed."""
        if any(p.a is None for p in self.parts):
            yield self.dense()
            return
        for some in zip(*(p.columns() for p in self.parts), strict=True):
            yield torch.cat([c * of for of, c in zip(some, self.scales, strict=True)])

    def squares(self) -> Float[Tensor, " D"]:
        """Return the squared lengths of the columns, [D]."""
        return reduce(torch.add, [c**2 * p.squares() for p, c in self._scaled])

    def total(self) -> Float[Tensor, ""]:
        """Return the sum of `squares`, a scalar."""
        return reduce(torch.add, [c**2 * p.total() for p, c in self._scaled])

    @property
    def _scaled(self) -> list[tuple[Rows, float]]:
        return list(zip(self.parts, self.scales, strict=True))


def products_of_rows(left: Rows, right: Rows) -> Float[Tensor, "L R"]:
    """Return ⟨row_i, row_j⟩ of two matrices of rows: (g_iᵀ g_j)(a_iᵀ a_j) of outer products."""
    if left.a is not None and right.a is not None:
        return (left.g @ right.g.mT) * (left.a @ right.a.mT)
    if left.a is None and right.a is not None:
        return right.times(left.g.mT).mT
    return left.times(right.g.mT)


@dataclass(frozen=True)
class Beside:
    """Matrices of equally many rows side by side, one for each block: [R, Σ D].

    The Gram matrix is the sum of theirs.
    """

    parts: tuple[RowMatrix, ...]

    @property
    def width(self) -> int:
        """Length of the rows, the sum of the parts' widths."""
        return sum(p.width for p in self.parts)

    def __len__(self) -> int:
        return len(self.parts[0])

    def times(self, v: Float[Tensor, "D *K"]) -> Float[Tensor, "R *K"]:
        """Return the sum of each part's product with its stretch of v: [R], or [R, K]."""
        each = torch.split(v, [p.width for p in self.parts])
        return reduce(torch.add, [p.times(some) for p, some in zip(self.parts, each, strict=True)])

    def transposed(self, w: Float[Tensor, "R *K"]) -> Float[Tensor, "D *K"]:
        """Return the parts' products with w, one after the other: [Σ D], or [Σ D, K]."""
        return torch.cat([p.transposed(w) for p in self.parts])

    def gram(self) -> Float[Tensor, "R R"]:
        """Return the sum of the parts' Gram matrices, [R, R]."""
        out = self.parts[0].gram()
        for p in self.parts[1:]:
            out = out + p.gram()
        return out

    def dense(self) -> Float[Tensor, "R D"]:
        """Return the parts' rows, formed, side by side, [R, Σ D]."""
        return torch.cat([p.dense() for p in self.parts], 1)

    def columns(self) -> Iterator[Float[Tensor, "R _"]]:
        """Yield the columns of one part after the other, as each part gives them."""
        for p in self.parts:
            yield from p.columns()

    def squares(self) -> Float[Tensor, " D"]:
        """Return the squared lengths of the parts' columns, one part after the other, [Σ D]."""
        return torch.cat([p.squares() for p in self.parts])

    def total(self) -> Float[Tensor, ""]:
        """Return the sum of the parts' totals, a scalar."""
        return reduce(torch.add, [p.total() for p in self.parts])


def gram_cholesky(
    rows: RowMatrix, damping: float, what: str = "the Gram matrix"
) -> tuple[Float[Tensor, "R R"], float]:
    """Return the lower Cholesky factor of damping · I + R Rᵀ, and the damping used.

    The matrix is D_t of thesis (5.6). The damping is raised as by `damped_cholesky`.

    Raises:
        CurvlabError: a damping that is not above 0; a Gram matrix larger than the memory.
        Diverged: as `damped_cholesky`.
    """
    if not damping > 0:
        raise CurvlabError(f"the Woodbury formula needs a positive damping, not {damping:g}")
    size = len(rows)
    guard_memory(
        3 * size**2 * 8,
        f"a {size}×{size} Gram matrix",
        "use smaller minibatches or a smaller curvature_size",
    )
    gram = rows.gram()
    return damped_cholesky(lambda d: shifted(gram, d), damping, what)
