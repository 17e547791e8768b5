"""Ranks: the processes that share each minibatch, and every exchange between them.

No other module calls a collective of `torch.distributed`. Every rank is given the whole minibatch
and looks at its own examples; what is a mean over examples is added up, what is of each example is
put in the order of one process. So all ranks hold the same numbers and take the same steps.
"""

from __future__ import annotations

import hashlib
import heapq
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any, Protocol, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from curvlab.errors import CurvlabError
from curvlab.system.interrupt import Shield
from curvlab.system.torchrun import ASKED, several_started

BUCKET = 25 * 2**20
"""Bytes that are added up in one exchange at most, but for a single larger tensor."""

MEET = timedelta(minutes=5)
"""How long a process waits at the beginning for the others to be there."""

WAIT = timedelta(minutes=30)
"""How long a rank waits for another that is there and says nothing. One that has gone is noticed at
once."""

GONE = "another process of this run has gone, and no step can be taken without it"
"""What is said where a rank has died."""

_T = TypeVar("_T")


class Told(CurvlabError):
    """An error that all ranks know of and raise."""


class RankLost(Told):
    """An error of a process of the run that has gone, so that no step can be taken any more."""


@dataclass(frozen=True)
class Ranks:
    """The processes that share a minibatch, and which of them this one is.

    One alone exchanges nothing, and every method returns what it was given.

    Args:
        world: K, how many there are.
        rank: this one's number, from 0 on.
    """

    world: int = 1
    rank: int = 0

    @property
    def several(self) -> bool:
        """Whether there are others."""
        return self.world > 1

    @property
    def first(self) -> bool:
        """Whether this is the one that writes log, checkpoint and pictures."""
        return self.rank == 0

    def part(self, count: int, rank: int | None = None) -> slice:
        """Return the examples of a rank, of `count`: as many as the others', or one more or less.

        Args:
            count: N, of the whole minibatch.
            rank: whose; this one's where None.
        """
        r = self.rank if rank is None else rank
        return slice(r * count // self.world, (r + 1) * count // self.world)

    def check_size(self, count: int) -> None:
        """Raise CurvlabError for a minibatch of fewer examples than there are ranks."""
        if count < self.world:
            raise CurvlabError(
                f"{self.world} ranks share a minibatch of {count} example{'s' * (count > 1)}: start"
                " fewer ranks, or take larger minibatches"
            )

    def sum(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return the sum over ranks of each tensor, the same to the bit on all of them.

        Args:
            tensors: of the same shapes on every rank; they are not written on.

        Raises:
            RankLost: another rank has gone.
        """
        if not self.several:
            return list(tensors)
        found: list[Tensor] = [t.detach() for t in tensors]
        for indices in buckets(found):
            flat = torch.cat([found[i].reshape(-1) for i in indices])
            _exchange(partial(dist.all_reduce, flat))
            for i, piece in zip(indices, _pieces(flat, found, indices), strict=True):
                found[i] = piece
        return found

    def gathered(self, t: Tensor, count: int, axis: int = 0) -> Tensor:
        """Return the examples of all ranks, in the order of the whole minibatch.

        Args:
            t: this rank's, as many along `axis` as `part(count)` has.
            count: N, of the whole minibatch.
            axis: of the examples.

        Raises:
            RankLost: another rank has gone.
        """
        if not self.several:
            return t
        sizes = [len(range(count)[self.part(count, r)]) for r in range(self.world)]
        rows = t.detach().movedim(axis, 0).contiguous()
        boolean = rows.dtype == torch.bool
        rows = rows.to(torch.uint8) if boolean else rows
        widest = max(sizes)
        if len(rows) < widest:
            rows = torch.cat([rows, rows.new_zeros(widest - len(rows), *rows.shape[1:])])
        into = [torch.empty_like(rows) for _ in sizes]
        _exchange(lambda: dist.all_gather(into, rows))
        found = torch.cat([each[:size] for each, size in zip(into, sizes, strict=True)])
        return (found.bool() if boolean else found).movedim(0, axis)

    def broadcast(self, tensors: Sequence[Tensor], owner: int) -> None:
        """Overwrite the tensors by the owner's, of the same shapes.

        Raises:
            RankLost: another rank has gone.
        """
        if not self.several:
            return
        for indices in buckets(tensors):
            flat = torch.cat([tensors[i].detach().reshape(-1) for i in indices])
            _exchange(partial(dist.broadcast, flat, owner))
            if owner != self.rank:
                for i, piece in zip(indices, _pieces(flat, tensors, indices), strict=True):
                    tensors[i].copy_(piece)

    def numbers(self, values: Sequence[float]) -> list[list[float]]:
        """Return each rank's numbers, as many of each: a few words, read by the host at once."""
        if not self.several:
            return [list(values)]
        own = torch.tensor(values, dtype=torch.float64, device=_device_of_words())
        into = [torch.empty_like(own) for _ in range(self.world)]
        _exchange(lambda: dist.all_gather(into, own))
        return cast(list[list[float]], torch.stack(into).tolist())

    def first_number(self, value: float) -> float:
        """Return rank 0's number: what hangs on a clock, or on a file, is decided by one."""
        return self.numbers([value])[0][0] if self.several else value

    def told(self, value: _T) -> list[_T]:
        """Return each rank's value, of plain data: slower than `numbers`, for rare occasions."""
        if not self.several:
            return [value]
        found: list[Any] = [None] * self.world
        _exchange(lambda: dist.all_gather_object(found, value))
        return found

    def of_first(self, value: _T) -> _T:
        """Return rank 0's value, of plain data, on every rank."""
        if not self.several:
            return value
        found = [value]
        _exchange(lambda: dist.broadcast_object_list(found, 0))
        return found[0]

    def by_first(self, work: Callable[[], _T]) -> _T:
        """Let rank 0 do something that one alone must do, and return what comes of it to all.

        Args:
            work: gives plain data.

        Raises:
            CurvlabError: on all ranks, what it has raised.
        """
        if not self.several:
            return work()
        found: tuple[str, Any] = ("", None)
        failed: CurvlabError | None = None
        if self.first:
            try:
                found = "", work()
            except CurvlabError as error:
                failed, found = error, (str(error), None)
        line, value = self.of_first(found)
        if line:
            raise failed or Told(line)
        return cast(_T, value)

    def agreed(self, what: str, value: object, remedy: str) -> None:
        """Raise CurvlabError, on every rank, where they do not have the same value.

        Args:
            what: it is, for the line that says so.
            value: of plain data.
            remedy: what to do.
        """
        rank = self.differing(value)
        if rank:
            raise Told(f"rank {rank} has {what} than rank 0: {remedy}")

    def differing(self, value: object) -> int:
        """Return the first rank whose value is not that of rank 0; 0 where all have the same.

        Args:
            value: of plain data, which its `repr` tells from others.
        """
        if not self.several:
            return 0
        digest = hashlib.sha256(repr(value).encode()).digest()
        words = [float(int.from_bytes(digest[i : i + 6])) for i in (0, 6)]  # exact in a float
        every = self.numbers(words)
        return next((rank for rank, other in enumerate(every) if other != every[0]), 0)


ALONE = Ranks()
"""One process by itself."""


def ranks_here() -> Ranks:
    """Return the ranks of the process group that is initialised; `ALONE` where there is none."""
    if not dist.is_available() or not dist.is_initialized():
        return ALONE
    return Ranks(dist.get_world_size(), dist.get_rank())


def agree_on_signals(ranks: Ranks, shield: Shield, due: float = 0.0) -> float:
    """Let a signal that waits on one rank come on all of them, at the end of this step.

    It is called inside the step's shield, which `waits`, by all ranks.

    Args:
        ranks: that take the step.
        shield: this rank's.
        due: a number of rank 0's own.

    Returns:
        Rank 0's number.
    """
    if not ranks.several:
        return due
    every = ranks.numbers([due, float(shield.asked)])
    asked = int(max(number for _, number in every))
    if asked:
        shield.asked, shield.heard = shield.asked or asked, True
    return every[0][0]


def shares(costs: Mapping[str, float], world: int) -> dict[str, int]:
    """Return the rank that does each piece of work: the longest first, to whoever has least.

    Graham 1969: the longest rank has at most 4/3 − 1/(3K) of the least time possible. Pieces of one
    cost go in the order of their names' places, so that all ranks find the same.

    Args:
        costs: {piece: its cost}, of any unit.
        world: K.
    """
    order = sorted(costs, key=lambda name: -costs[name])  # stable
    load = [(0.0, rank) for rank in range(world)]
    found = {}
    for name in order:
        least, rank = heapq.heappop(load)
        found[name] = rank
        heapq.heappush(load, (least + costs[name], rank))
    return {name: found[name] for name in costs}


def buckets(tensors: Sequence[Tensor], most: int = BUCKET) -> list[list[int]]:
    """Return numbers of tensors that go in one exchange: of one dtype and device, at most `most`.

    Args:
        tensors: in the same order on every rank.
        most: bytes; a larger tensor goes by itself.
    """
    found: list[list[int]] = []
    open_: dict[tuple[torch.dtype, torch.device], tuple[list[int], int]] = {}
    for i, t in enumerate(tensors):
        key, size = (t.dtype, t.device), t.numel() * t.element_size()
        some, held = open_.get(key, ([], 0))
        if not some or held + size > most:
            some, held = [], 0
            found.append(some)
        some.append(i)
        open_[key] = some, held + size
    return found


def _pieces(flat: Tensor, like: Sequence[Tensor], indices: Sequence[int]) -> list[Tensor]:
    """Return the tensors that lie one after another in one vector, in the shapes of `like`."""
    sizes = [like[i].numel() for i in indices]
    flats: Sequence[Tensor] = torch.split(flat, sizes)
    return [piece.view(like[i].shape) for i, piece in zip(indices, flats, strict=True)]


def _device_of_words() -> torch.device:
    """Return where a few numbers are exchanged: on the host, where the process group can."""
    if "cpu" in str(dist.get_backend_config()):
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def _exchange(work: Callable[[], object]) -> None:
    """Run a collective; raise RankLost where another process is not there any more."""
    try:
        work()
    except RuntimeError as error:
        raise RankLost(GONE) from error


# ---- by torchrun


@contextmanager
def together(device: torch.device) -> Iterator[Ranks]:
    """Join the processes that torchrun has started, inside; `ALONE` where it has not.

    Each then has the GPU of its local number, and of what all have to say one says it.

    Args:
        device: that this rank computes on: "cuda" exchanges by NCCL, the CPU by gloo.

    Raises:
        CurvlabError: the others cannot be reached.
    """
    if not several_started() or dist.is_initialized():
        yield ranks_here()
        return
    if device.type == "cuda" and device.index is None:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    try:
        store, rank, world = next(iter(rendezvous("env://", timeout=MEET)))
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=WAIT)
    except (RuntimeError, ValueError) as error:
        line = (str(error).splitlines() or [type(error).__name__])[0]
        raise CurvlabError(
            f"the other processes cannot be reached ({line[:160]}): start all of them by torchrun"
        ) from error
    ASKED.append(partial(_first_to_say, store))
    yield ranks_here()
    dist.destroy_process_group()  # where all are there to the end: it may wait for them


class _Store(Protocol):
    """What torchrun's processes have in common."""

    def add(self, key: str, amount: int) -> int:
        """Add to a number, and return it."""


def _first_to_say(store: _Store, line: str) -> bool:
    """Return whether no other process has asked whether to say this line.

    Where whoever kept the store has gone, it has said what ended all, unless that is what is said.
    """
    try:
        return store.add(f"curvlab said {line}", 1) == 1
    except RuntimeError:
        return line.startswith(GONE)
