"""Operators side by side: on entries by their numbers, or on the columns of a matrix.

Legend: D order, K columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from curvlab.linalg.operators import Operator, Symmetric, packable


@packable
@dataclass(frozen=True)
class DirectSum(Symmetric):
    """Operators side by side: part k acts on the entries `indices[k]`.

    Together the parts cover all entries once.
    """

    indices: tuple[Int[Tensor, " _"], ...]
    parts: tuple[Operator, ...]

    def __len__(self) -> int:
        return sum(len(p) for p in self.parts)

    def __matmul__(self, v: Float[Tensor, "D *K"]) -> Float[Tensor, "D *K"]:
        out = torch.empty_like(v)
        for index, part in zip(self.indices, self.parts, strict=True):
            out[index] = part @ v[index]
        return out

    def inv(self) -> Operator:
        """Return the direct sum of the parts' inverses; raises what theirs raise."""
        return DirectSum(self.indices, tuple(p.inv() for p in self.parts))

    def dense(self) -> Float[Tensor, "D D"]:
        """Return the matrix, [D, D]: each part's on its entries, zeros between parts."""
        blocks = [p.dense() for p in self.parts]
        out = blocks[0].new_zeros(len(self), len(self))
        for index, block in zip(self.indices, blocks, strict=True):
            out[index[:, None], index] = block
        return out

    def eigvalsh(self) -> Float[Tensor, " D"]:
        """Return the eigenvalues of all parts together, ascending."""
        return torch.cat([p.eigvalsh() for p in self.parts]).sort().values

    def diag(self) -> Float[Tensor, " D"]:
        """Return the parts' diagonals in the order of the entries, [D]."""
        return torch.cat([p.diag() for p in self.parts])[torch.cat(self.indices).argsort()]

    def trace(self) -> Float[Tensor, ""]:
        """Return the sum of the parts' traces."""
        return torch.stack([p.trace() for p in self.parts]).sum()


@packable
@dataclass(frozen=True)
class ColumnSum(Symmetric):
    """Operators side by side on the columns of a matrix [outputs, Σ widths].

    Part k acts on the next `widths[k]` of them.
    """

    outputs: int
    widths: tuple[int, ...]
    parts: tuple[Operator, ...]

    def __len__(self) -> int:
        return self.outputs * sum(self.widths)

    def __matmul__(self, v: Float[Tensor, "D *K"]) -> Float[Tensor, "D *K"]:
        matrix = v.reshape(self.outputs, sum(self.widths), *v.shape[1:])
        found = []
        for part, columns in zip(
            self.parts, torch.split(matrix, list(self.widths), 1), strict=True
        ):
            found.append((part @ columns.reshape(-1, *v.shape[1:])).view(columns.shape))
        return torch.cat(found, 1).view(v.shape)

    def inv(self) -> Operator:
        """Return the parts' inverses side by side; raises what theirs raise."""
        return ColumnSum(self.outputs, self.widths, tuple(p.inv() for p in self.parts))

    def dense(self) -> Float[Tensor, "D D"]:
        """Return the matrix, [D, D], on the row-major flattening of [outputs, Σ widths]."""
        return self._by_index.dense()

    def eigvalsh(self) -> Float[Tensor, " D"]:
        """Return the eigenvalues of all parts together, ascending."""
        return self._by_index.eigvalsh()

    def diag(self) -> Float[Tensor, " D"]:
        """Return the parts' diagonals side by side, [outputs, Σ widths], flattened to [D]."""
        parts = zip(self.parts, self.widths, strict=True)
        return torch.cat([p.diag().view(self.outputs, width) for p, width in parts], 1).flatten()

    def trace(self) -> Float[Tensor, ""]:
        """Return the sum of the parts' traces."""
        return self._by_index.trace()

    @property
    def _by_index(self) -> DirectSum:
        entries = torch.arange(len(self), device=self.device).view(self.outputs, -1)
        return DirectSum(
            tuple(e.flatten() for e in torch.split(entries, list(self.widths), 1)), self.parts
        )
