"""Checksums: whether data, or weights, are still what they were.

Numbers are read as the integers that their bytes are, and added up in 64 bits that wrap around: no
rounding, no order of sums, NaN a number like any other, the same on every device. Equal means equal
but for one chance in 2⁶⁴ or, of bad luck, 2³².

Legend: N examples, W words of 64 bits in one of them.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor

from curvlab.errors import CurvlabError
from curvlab.nests import parts

_GOLDEN, _FIRST, _SECOND = (
    -0x61C8864680B583EB,
    -0x40A7B892E31B1A47,
    -0x6B2FB644ECCEEE15,
)  # of splitmix64
_WIDE = 1 << 12  # words of weights that are added up with multipliers of their own
_SMALL = 1 << 16  # numbers in a tensor, below which it is put together with others
# words in the one temporary: what fits the cache; what fits the memory
_AT_ONCE = {
    "cpu": 1 << 16,
    "cuda": 1 << 24,
}


def each(*data: Any) -> Int64[Tensor, " N"]:
    """Return a checksum of each example of a minibatch.

    It is of x and y, tensors or nests (tuples, lists, dictionaries) of tensors.
    """
    found: Tensor | None = None
    for place, t in _tensors(data):
        rows = _of_rows(t if t.ndim and (found is None or len(t) == len(found)) else t[None])
        # x and y, or two parts of a nest, must not change places unseen, nor [2, 3] pass for [3, 2]
        salt = 2 * zlib.crc32(f"{place} {tuple(t.shape[1:])} {t.dtype}".encode()) + 1
        found = (
            rows + salt
            if found is None
            else torch.add(rows.to(found.device) + salt, found, alpha=salt)
        )
    return torch.zeros(0, dtype=torch.int64, device="cpu") if found is None else mixed(found)


def examples(*data: Any) -> Int64[Tensor, ""]:
    """Return a checksum of the examples of a minibatch, in whatever order.

    Of the examples of two minibatches it is the sum.
    """
    return each(*data).sum()


def numbers(tensors: Iterable[Tensor]) -> Int64[Tensor, " K"]:
    """Return a checksum of each tensor, its numbers in their places: signs and their order show.

    Small ones are taken together.
    """
    found: list[Tensor] = []
    small: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for t in tensors:
        if t.numel() < _SMALL:
            small.setdefault((t.dtype, t.device), []).append(t.detach().flatten())
        else:
            found.append(_in_place(t.detach().flatten()))
    found += [_in_place(torch.cat(some)) for some in small.values()]
    return (
        torch.stack([f.to(found[0].device) for f in found])
        if found
        else torch.zeros(0, dtype=torch.int64, device="cpu")
    )


def mixed(h: Int64[Tensor, " N"]) -> Int64[Tensor, " N"]:
    """Mix numbers one to one: every bit of the result hangs on all bits (splitmix64)."""
    for shift, factor in ((30, _FIRST), (27, _SECOND), (31, 1)):
        h = (h ^ ((h >> shift) & ((1 << (64 - shift)) - 1))) * factor
    return h


@lru_cache(maxsize=16)
def _multipliers(count: int, device: torch.device) -> Int64[Tensor, " W"]:
    """Return odd numbers as if drawn at random."""
    return mixed(torch.arange(1, count + 1, device=device) * _GOLDEN) | 1


def _tensors(data: Any, place: str = "") -> Iterator[tuple[str, Tensor]]:
    if isinstance(data, Tensor):
        yield place, data
    for name, part in parts(data):
        yield from _tensors(part, f"{place}/{name}")


def _of_rows(t: Tensor) -> Int64[Tensor, " N"]:
    """Return the checksum of everything behind the first axis."""
    if t.layout == torch.strided:
        return _added(_words(t))
    # the numbers that are there, whatever their order, and where each is
    t = t.to_sparse().coalesce()
    row, *columns = t.indices()
    at = torch.zeros_like(row)
    for column, size in zip(columns, t.shape[1:], strict=False):
        at = at * size + column
    own = mixed(mixed(at + 1) + _added(_words(t.values())))
    return torch.zeros(len(t), dtype=torch.int64, device=t.device).index_add_(0, row, own)


def _words(t: Tensor) -> Int64[Tensor, "N W"]:
    """Return the bytes of every row as words, with zeros behind where they fill no word."""
    t = t.detach().resolve_conj().resolve_neg()
    if not t.numel():
        return torch.zeros(len(t), 0, dtype=torch.int64, device=t.device)
    rows = t.contiguous().view(-1).view(torch.uint8).view(len(t), -1)
    over = rows.shape[1] % 8
    if over:
        rows = torch.nn.functional.pad(rows, (0, 8 - over))
    elif rows.storage_offset() % 8:
        rows = rows.clone()
    return rows.view(torch.int64)


def _added(words: Int64[Tensor, "N W"]) -> Int64[Tensor, " N"]:
    """Return Σ_j r_j (w_j + ⌊w_j / 2³¹⌋), r odd.

    By w_j alone a sign, the highest bit, would add 2⁶³ whatever r, and two of them 0.
    """
    # odd: times an even number a change of the highest bits would be lost modulo 2⁶⁴
    r = _multipliers(words.shape[1], words.device)
    at_once = max(1, _AT_ONCE.get(words.device.type, 1 << 16) // max(1, len(r)))
    temporary = words.new_empty(min(at_once, len(words)), len(r))
    sums = words.new_empty(len(words))
    for some, into in zip(torch.split(words, at_once), torch.split(sums, at_once), strict=True):
        t = torch.bitwise_right_shift(some, 31, out=temporary[: len(some)])
        torch.sum(t.add_(some).mul_(r), 1, out=into)
    return sums


def _in_place(t: Tensor) -> Int64[Tensor, ""]:
    whole = t.element_size() * len(t) // 8 * 8 // t.element_size()  # what fills words
    words = _words(t[None, :whole])[0]
    cut = len(words) // _WIDE * _WIDE
    parts = [
        _added(words[:cut].view(-1, _WIDE)),
        _added(words[None, cut:]),
        _added(_words(t[None, whole:])),
    ]
    return _in_order(mixed(torch.cat(parts)))


def _in_order(sums: Int64[Tensor, " N"]) -> Int64[Tensor, ""]:
    return (sums * _multipliers(len(sums), sums.device)).sum()


@dataclass(frozen=True)
class Seen:
    """The examples that a pass over a loader gave: how many and which.

    And, where that counts, in what order and minibatches.
    """

    count: int
    examples: int
    minibatches: tuple[tuple[int, int], ...]


class Unchanging:
    """A loader that is read again and again, and must give at every pass what it gave at the first.

    Args:
        loader: of minibatches.
        in_order: whether the order of the examples, and where they are cut, must be the same too.
    """

    def __init__(self, loader: Iterable[Any], *, in_order: bool = False) -> None:
        self.loader, self.in_order = loader, in_order
        self.first: Seen | None = None

    @classmethod
    def of(cls, loader: Iterable[Any], *, in_order: bool = False) -> Unchanging:
        """Return the loader itself where it is one that is as strict, else one of it."""
        return (
            loader
            if isinstance(loader, cls) and (loader.in_order or not in_order)
            else cls(loader, in_order=in_order)
        )

    def __iter__(self) -> Iterator[Any]:
        """Yield the minibatches of one pass.

        Raises:
            CurvlabError: at the end, where the pass was not as the first.
        """
        sums: list[tuple[int, Tensor, Tensor]] = []
        for minibatch in self.loader:
            yield minibatch
            own = each(minibatch)  # once it is known to be one
            sums.append((len(own), own.sum(), _in_order(own)))
        if not sums and self.first is None:
            return
        total = sum(int(s) for _, s, _ in sums) % 2**64
        seen = Seen(
            sum(n for n, *_ in sums),
            total,
            tuple((n, int(s)) for n, _, s in sums) if self.in_order else (),
        )
        self.first = self.first or seen
        if seen != self.first:
            raise CurvlabError(self._fault(seen, self.first))

    def _fault(self, seen: Seen, first: Seen) -> str:
        if isinstance(self.loader, list | tuple):
            return (
                "the data have been changed in place since the first pass over them, so that there"
                " is no one matrix: make it again"
            )
        if (seen.count, seen.examples) == (first.count, first.examples):
            return (
                "the loader gave its data in another order than at the first pass, so that labels"
                " would be drawn for other examples: give list(loader), or a loader with"
                " shuffle=False"
            )
        return (
            "the loader gave other data than at the first pass (shuffle with drop_last, a random"
            " sampler, augmentation …), so that there is no one matrix: give list(loader), or a"
            " loader with shuffle=False"
        )

    def check(self) -> None:
        """Go through the loader once, to see whether it gives what it gave.

        Raises:
            CurvlabError: it does not.
        """
        for _ in self:
            pass
