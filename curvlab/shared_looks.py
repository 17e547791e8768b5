"""A look at a minibatch that several ranks share: each goes through its own examples.

The closure is the whole minibatch on every rank, and `observe` alone is shared: what else looks at
a closure (an exact matrix, a line search, a probe's own pass) goes through the whole of it on every
rank, which is right and no faster. So does every look that shared would be another than one
process's: where examples act on each other (batch norm in training mode), the model draws random
numbers (dropout) or writes on its buffers, or some block goes another way on some ranks.

The first look is of the whole too: it shows whether looks can be shared. So a basis that a method
makes of its first minibatch (SOAP, KL-Shampoo) is one process's, also where it is of rounding
alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from curvlab.derivatives import derivatives
from curvlab.errors import CurvlabError, Diverged
from curvlab.fingerprint import each, numbers
from curvlab.nests import Batched, Nest, joined, plain
from curvlab.observation import Observation
from curvlab.parallel import Ranks, Told
from curvlab.shared_statistics import SharedPass
from curvlab.statistics import LayerStatistics
from curvlab.strangers import mixes

if TYPE_CHECKING:
    from curvlab.closure import Closure
    from curvlab.objective import Objective

BY_PARTS = frozenset({"plain", "gradient", "data", "model"})
"""Passes whose vectors are one or a few for every example. Those of ∂²ℓ/∂z² are found together, so
that each rank sends all of them back."""


def shared_look(
    closure: Closure, needs: set[str], move_buffers: bool, draws: int, checked: bool
) -> Observation | None:
    """Return what one process would observe; None where every rank is to look at the whole.

    Args:
        closure: the whole minibatch.
        needs: as of `Closure.observe`, and so are the others.
        move_buffers: likewise.
        draws: likewise.
        checked: likewise.

    Raises:
        CurvlabError: on all ranks, what one of them has raised; fewer examples than ranks;
            minibatches or weights that differ from rank to rank.
    """
    ranks, objective = closure.objective.ranks, closure.objective
    ranks.check_size(len(closure.x))
    known = _mode(closure) in objective.shareable
    why = why_whole(closure)
    if why:
        objective.say(f"{why}: every rank goes through the whole minibatch, and no look is shared")
        return None
    if not known or not needs <= BY_PARTS:
        return None
    own, width = closure.own, _width(objective, needs)
    own.twice, own.told = closure.twice, width
    try:
        seen = own.observe(needs, move_buffers, draws, checked=checked)
    except Told:
        raise
    except Exception as error:
        tell_failure(ranks, error, width)
        raise  # not reached: all raise where one has told
    total = len(closure.x)
    every = agree(ranks, _flags(seen, objective, width))
    if any(flags != every[0] for flags in every):
        return None  # a block that some ranks' examples do not reach, or that goes another way
    (loss,) = ranks.sum([seen.loss * (len(own.x) / total)])
    shared: dict[int, dict[str, LayerStatistics]] = {}
    passes = {}
    for name, found in seen.passes.items():
        if id(found) not in shared:
            shared[id(found)] = SharedPass(ranks, total, found).blocks
        passes[name] = shared[id(found)]
    return Observation(loss, total, passes, closure, seen.pull)


def _flags(seen: Observation, objective: Objective, width: int) -> list[float]:
    """Return of every pass and block how it was found, as one number each: 3, 1, 0, 2."""
    found = [
        float(s.used + 2 * s.structured)
        for name in sorted(seen.passes)
        for s in (seen.passes[name].get(b.name) for b in objective.blocks)
        if s is not None
    ]
    return found + [-1.0] * (width - len(found))


def _width(objective: Objective, needs: set[str]) -> int:
    return (len(needs) + 1) * len(objective.blocks)  # "gradient" is there beside "data"


def agree(ranks: Ranks, flags: list[float]) -> list[list[float]]:
    """Return every rank's flags, once each has come so far.

    Raises:
        Told: one of them has failed.
    """
    every = ranks.numbers([0.0, *flags])
    if any(found[0] for found in every):
        _raise_first(ranks, "")
    return [found[1:] for found in every]


def tell_failure(ranks: Ranks, error: Exception, width: int) -> None:
    """Tell the others, who are or will be at `agree`, of an error, and raise it on all ranks."""
    ranks.numbers([1.0] * (1 + width))
    line = (str(error).splitlines() or [type(error).__name__])[0]
    own = isinstance(error, CurvlabError)
    what = line if own else f"{type(error).__name__}: {line}"
    try:
        _raise_first(ranks, f"{'D' if isinstance(error, Diverged) else 'E'}{what}")
    except CurvlabError as told:
        raise told from error


def _raise_first(ranks: Ranks, own: str) -> None:
    """Raise, on every rank, the error of the first that has one."""
    every = ranks.told(own)
    rank, first = next((r, line) for r, line in enumerate(every) if line)
    if first[0] == "D":
        raise ToldDiverged(first[1:])
    alike = all(line == first for line in every)
    where = "" if alike else f" (in the examples of rank {rank} of {ranks.world})"
    raise Told(f"{first[1:]}{where}")


class ToldDiverged(Diverged, Told):
    """An error of numbers of one rank that left the finite range, that all of them know of."""


def drawn_by_ranks(own: Closure, whole: Closure, z: Tensor, draws: int) -> list[Any]:
    """Return labels of a rank's examples as one process draws them for the whole minibatch.

    Whatever a likelihood draws by, a label may hang on its example's place among all: so all
    outputs come together, and every rank draws all labels and keeps its own.

    Args:
        own: this rank's part.
        whole: the minibatch.
        z: outputs of the part.
        draws: labels of each example.
    """
    ranks, count = whole.objective.ranks, len(whole.x)
    agree(ranks, [0.0] * own.told)
    every = whole.labels(ranks.gathered(z, count), draws)
    return [labels[ranks.part(count)] for labels in every]


def whole_minibatch(objective: Objective, x: Batched, y: Batched) -> tuple[Batched, Batched]:
    """Return the minibatch of all ranks: what each was given, or their parts one after another.

    Which of the two it is shows at the first minibatch, where all ranks have the same or not.

    Args:
        objective: of the ranks.
        x: inputs as this rank was given them.
        y: targets likewise.

    Raises:
        CurvlabError: parts that do not fit together.
    """
    ranks = objective.ranks
    if objective.given_parts is None:
        with derivatives():
            mine = len(x), _checksum(x, y)
        objective.given_parts = ranks.differing(mine) > 0
    if not objective.given_parts:
        return x, y
    every = ranks.told((_on_host(x), _on_host(y)))
    return joined_pairs(objective, every)


def joined_pairs(
    objective: Objective, pairs: Sequence[tuple[Batched, Batched]]
) -> tuple[Batched, Batched]:
    """Return several minibatches as one, in their order.

    Sequences that were brought to another length in each are padded where the inputs say what is
    padding: with 0 (so that `attention_mask` is 0 there), and the targets with `ignore_index`.

    Args:
        objective: of all of them.
        pairs: inputs and targets of each.

    Raises:
        CurvlabError: they do not fit together.
    """
    xs, ys = [x for x, _ in pairs], [y for _, y in pairs]
    ignored = getattr(objective.likelihood, "ignore_index", None)
    masked = all(isinstance(x, Nest) and ("attention_mask",) in x.leaves for x in xs)
    pads = masked and ignored is not None
    return joined(xs, 0 if pads else None), joined(ys, ignored if pads else None)


def _checksum(x: Batched, y: Batched) -> int:
    return int(each(plain(x), plain(y)).sum())


def _on_host(value: Batched) -> Batched:
    if isinstance(value, Nest):
        return value.map(lambda t: t.cpu(), others=True)
    return value.cpu()


def why_whole(closure: Closure) -> str:
    """Return why each rank must look at the whole minibatch; "" where a look can be shared.

    It is found once for a dtype of inputs and modes of the modules, by a look at the whole, which
    the next one is. All ranks find the same.

    Raises:
        CurvlabError: ranks were given other minibatches, or have other weights.
    """
    objective, mode = closure.objective, _mode(closure)
    if mode not in objective.shareable:
        if not objective.shareable:
            check_alike(objective)
        objective.ranks.agreed(
            "another minibatch",
            _checksum(closure.x, closure.y),
            "the first was the same on all, and so is each to be; or give each rank its own part"
            " from the first on",
        )
        objective.shareable[mode] = _found(closure)
    return objective.shareable[mode]


def _mode(closure: Closure) -> Hashable:
    _, *modes = cast(tuple[Hashable, ...], closure._key(closure.x))  # but the shape
    return tuple(modes)


def _found(closure: Closure) -> str:
    objective = closure.objective
    if mixes(objective.modules):
        return "batch norm in training mode lets examples act on each other"
    _ = closure.form
    if closure._key(closure.x) not in objective.quiet:
        ranks = objective.ranks
        ranks.agreed("other random numbers", _chance(closure.x.device), "seed all ranks alike")
        return "the model draws random numbers (dropout)"
    return "the model writes on its buffers" if _moves_buffers(closure) else ""


def _chance(device: torch.device) -> str:
    """Return a digest of torch's generators."""
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return hashlib.sha256(b"".join(state.numpy().tobytes() for state in states)).hexdigest()


def _moves_buffers(closure: Closure) -> bool:
    copies = closure._own_buffers(True)
    if copies is None:
        return False
    before = {name: b.clone() for name, b in copies.items()}
    with derivatives(), torch.no_grad(), closure._same_chance(True):
        closure._forward(closure.x, copies)
    return any(not torch.equal(before[name], b) for name, b in copies.items())


def check_alike(objective: Objective) -> None:
    """Raise CurvlabError, on all ranks, where weights, buffers, blocks or seeds differ."""
    if not objective.ranks.several:
        return
    tensors = [*objective.parameters.values(), *objective.model.buffers()]
    objective.ranks.agreed(
        "other weights, blocks or seeds",
        [
            numbers(tensors).tolist(),
            [(b.name, list(b.shape)) for b in objective.blocks],
            [objective.seed, objective.l2, type(objective.likelihood).__name__],
        ],
        "make the model from the same seed on every rank, or load the same checkpoint; each by"
        " itself: ranks=curvlab.parallel.ALONE",
    )
