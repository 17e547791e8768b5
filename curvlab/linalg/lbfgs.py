"""L-BFGS: the memory of pairs as a value, and its matrices over any base operator.

Document for a base plus refinement: S2QN (Yang et al.).

The pairs given to a matrix need sᵀy > 0. An update by (s, y) is the same as one by (c s, c y):
pairs are scaled to sᵀy = 1, so that no tiny or huge inner product meets another. Inner products and
what is solved with them are of double precision: with 100 pairs in float32 this makes the matrix as
good as dense updates, where in single precision it lost two digits.

Legend: D order; p pairs as rows S, Y [p, D], the oldest first; H₀ = B₀⁻¹ base; Λ refinement, Λ⁰ its
start; r rank of a base QQᵀ; R rows of a compact form.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from curvlab.errors import CurvlabError, Diverged
from curvlab.linalg.operators import Compact, Diagonal, Operator, packable

_NUMBERS = 1 << 18  # in double precision at once


@packable
@dataclass(frozen=True)
class Memory:
    """The last `capacity` curvature pairs (s, y), as rows, the oldest first."""

    capacity: int
    S: Float[Tensor, "p D"]
    Y: Float[Tensor, "p D"]

    def __post_init__(self) -> None:
        if self.capacity < 1 or self.S.shape != self.Y.shape or len(self.S) > self.capacity:
            raise CurvlabError(
                f"a memory of {self.capacity} pairs got {list(self.S.shape)} and"
                f" {list(self.Y.shape)}: it needs at least 1 pair of room, and as many s as y of"
                " one length"
            )

    def __len__(self) -> int:
        return len(self.S)

    def append(self, s: Float[Tensor, " D"], y: Float[Tensor, " D"]) -> Memory:
        """Return a memory with one more pair; the oldest is dropped where there is no room."""
        first = max(0, len(self) + 1 - self.capacity)
        return replace(
            self, S=torch.cat([self.S[first:], s[None]]), Y=torch.cat([self.Y[first:], y[None]])
        )

    def append_where(
        self, used: Bool[Tensor, ""] | bool, s: Float[Tensor, " D"], y: Float[Tensor, " D"]
    ) -> Memory:
        """Return `append` where `used` is true, else this memory.

        Waits for the device only while there is room.
        """
        if len(self) < self.capacity or not isinstance(used, Tensor):
            return self.append(s, y) if bool(used) else self
        new = self.append(s, y)
        return replace(self, S=torch.where(used, new.S, self.S), Y=torch.where(used, new.Y, self.Y))


def empty_memory(capacity: int, like: Float[Tensor, " D"]) -> Memory:
    """Return a memory without pairs, of the length, dtype and device of `like`."""
    return Memory(capacity, like.new_empty(0, len(like)), like.new_empty(0, len(like)))


def lbfgs_inverse(memory: Memory, base: Operator, *, trusted: bool = False) -> Operator:
    """Return H, the updates (2.6) of H₀ by all pairs, the oldest first, as H₀ + Rᵀ C⁻¹ R.

    R = [S; Y H₀], C = −[[0, T], [Tᵀ, D + Y H₀ Yᵀ]]; T is the upper triangle of S Yᵀ with its
    diagonal D (Byrd, Nocedal, Schnabel 1994, (2.6)). This is the "non-loop" form of thesis 2.3:
    products with a matrix of K columns are matrix products. H₀ itself where there is no pair.

    Args:
        memory: the pairs.
        base: H₀.
        trusted: whether every sᵀy is known to be above 0: nothing then waits for the device.

    Raises:
        Diverged: a pair with sᵀy that is not above 0.
    """
    if not len(memory):
        return base
    S, Y, SY = _scaled(memory, trusted)
    H0Y = (base @ Y.mT).mT
    corner = torch.diag(SY.diagonal()) + _symmetrised(_gram(Y, H0Y))
    return Compact(base, torch.cat([S, H0Y]), -_blocks(torch.zeros_like(SY), SY.triu(), corner))


def compact_is_cheaper(order: int, columns: int, pairs: int) -> bool:
    """Return whether H of `pairs` pairs costs less in compact form than as a dense matrix.

    Operations on `columns` vectors are counted, with R = 2p rows, D = `order`, K = `columns`:
    compact 4 R D K + 2 R² K; as a matrix 2 R² D + 2 R D² to form it and 2 D² K to apply it. For
    many columns the matrix is cheaper where D < 2R = 4p or so, for D = K where D < 2p.
    """
    rows = 2 * pairs
    return (
        4 * rows * order * columns + 2 * rows**2 * columns
        < 2 * rows**2 * order + 2 * rows * order**2 + 2 * order**2 * columns
    )


def lbfgs(memory: Memory, base: Operator) -> Operator:
    """Return B, the updates (2.6) of B₀ by all pairs, as B₀ + Rᵀ C⁻¹ R.

    S2QN (12) with C = −P (Byrd, Nocedal, Schnabel, (2.17)). ``lbfgs(memory, base).inv()`` is
    ``lbfgs_inverse(memory, base.inv())`` but for rounding.
    """
    if not len(memory):
        return base
    return Compact(base, *_correction(memory, base))


def two_loop(memory: Memory, base: Operator, v: Float[Tensor, "D *K"]) -> Float[Tensor, "D *K"]:
    """Return H v by the two-loop recursion (Nocedal and Wright, Alg. 7.4).

    It is the other route to ``lbfgs_inverse(memory, base) @ v``.
    """
    S, Y, SY = _scaled(memory)
    rho = SY.diagonal().reciprocal().to(v.dtype)
    alpha: list[Tensor] = []
    for i in reversed(range(len(S))):
        alpha.append(rho[i] * (S[i] @ v))
        v = v - _times(Y[i], alpha[-1])
    v = base @ v
    for i in range(len(S)):
        v = v + _times(S[i], alpha.pop() - rho[i] * (Y[i] @ v))
    return v


def refined(base: Operator, memory: Memory, initial: Operator) -> Operator:
    """Return B + λI = H̃ − C P⁻¹ Cᵀ, a base matrix refined by L-BFGS of what it misses.

    S2QN (9), (12); its inverse is (13). The pairs are those of the refinement: u and v = v̂ − H_k
    u, S2QN (10).

    Args:
        base: H̃ = H_k + Λ⁰ + λI. A low-rank one of outer products, say `LowRank`, need not be
            formed.
        memory: the pairs (u, v).
        initial: Λ⁰, mostly γI (`multiple_of_identity`).
    """
    if not len(memory):
        return base
    return Compact(base, *_correction(memory, initial))


def refined_low_rank(
    Q: Float[Tensor, "D r"], memory: Memory, gamma: float, damping: float
) -> Operator:
    """Return B + λI = Q Qᵀ + Λ + λI with Λ⁰ = γI as Λ̃ − C̃ P̃⁻¹ C̃ᵀ, Λ̃ = (γ + λ) I.

    Its inverse is S2QN (14), of order r + 2p inside. P̃ = diag(P, −I), where S2QN prints diag(P⁻¹,
    −I) (practice).
    """
    rows, core = Q.mT, torch.eye(Q.shape[1], dtype=torch.float64, device=Q.device)
    if len(memory):
        C, minus_P = _correction(memory, multiple_of_identity(gamma, Q[:, 0]))
        zero = core.new_zeros(len(minus_P), len(core))
        rows, core = torch.cat([C, rows]), _blocks(minus_P, zero, core)  # C̃ᵀ, −P̃
    return Compact(multiple_of_identity(gamma + damping, Q[:, 0]), rows.contiguous(), core)


def multiple_of_identity(c: float, like: Float[Tensor, " D"]) -> Diagonal:
    """Return c I of the length, dtype and device of `like`."""
    return Diagonal(torch.full_like(like, c, memory_format=torch.contiguous_format))


def _correction(
    memory: Memory, initial: Operator
) -> tuple[Float[Tensor, "R D"], Float[Tensor, "R R"]]:
    """Return (Cᵀ, −P) of S2QN (12).

    C = [Λ⁰U, V], P = [[UᵀΛ⁰U, L], [Lᵀ, −D]], L strictly below the diagonal D of UᵀV.
    """
    S, Y, SY = _scaled(memory)
    start = (initial @ S.mT).mT
    P = _blocks(_symmetrised(_gram(S, start)), SY.tril(-1), -torch.diag(SY.diagonal()))
    return torch.cat([start, Y]), -P


def _scaled(
    memory: Memory, trusted: bool = False
) -> tuple[Float[Tensor, "p D"], Float[Tensor, "p D"], Float[Tensor, "p p"]]:
    """Return S and Y, every pair scaled to sᵀy = 1, and S Yᵀ."""
    sy = (memory.S * memory.Y).sum(1)
    if not (trusted or bool((sy > 0).all())):
        first = int((~(sy > 0)).nonzero()[0])
        raise Diverged(
            f"pair {first + 1} of {len(sy)} has sᵀy = {float(sy[first]):.3g}, not above 0: damp or"
            " skip it"
        )
    scale = sy.rsqrt()[:, None]
    S, Y = memory.S * scale, memory.Y * scale
    return S, Y, _gram(S, Y)


def _gram(S: Float[Tensor, "p D"], Y: Float[Tensor, "p D"]) -> Float[Tensor, "p p"]:
    """Return S Yᵀ in float64, some columns at a time.

    Copies of the whole in that precision would leave the cache.
    """
    found = torch.zeros(len(S), len(Y), dtype=torch.float64, device=S.device)
    at_once = max(1024, _NUMBERS // max(1, len(S)))
    for s, y in zip(torch.split(S, at_once, 1), torch.split(Y, at_once, 1), strict=True):
        found.addmm_(s.double(), y.double().mT)
    return found


def _blocks(
    a: Float[Tensor, "m m"], b: Float[Tensor, "m n"], c: Float[Tensor, "n n"]
) -> Float[Tensor, "R R"]:
    """Return the symmetric matrix [[a, b], [bᵀ, c]]."""
    return torch.cat([torch.cat([a, b], 1), torch.cat([b.mT, c], 1)])


def _symmetrised(m: Float[Tensor, "p p"]) -> Float[Tensor, "p p"]:
    return (m + m.mT) / 2


def _times(s: Float[Tensor, " D"], weights: Float[Tensor, "*K"]) -> Float[Tensor, "D *K"]:
    """Return s times a number, or the outer product of s and a row of numbers."""
    return s * weights if weights.ndim == 0 else torch.outer(s, weights)
