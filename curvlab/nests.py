"""Nests: inputs or targets of a minibatch that are several tensors (tuples, mappings, dataclasses).

A `Nest` stands where a tensor would: it has a length, rows can be taken of it, and
`torch.func.vmap` goes through it. What is not an example's (a table, a number) goes along as it is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils import _pytree

from curvlab.errors import CurvlabError
from curvlab.finite import all_finite

Path = tuple[str, ...]


class Nest:
    """Tensors of N examples each, in whatever structure they came.

    >>> x = Nest({"ids": torch.arange(6).view(3, 2), "mask": torch.ones(3, 2)})
    >>> len(x), x[1:]["ids"].tolist()
    (3, [[2, 3], [4, 5]])

    Args:
        tree: a tuple, list, mapping or dataclass of such and of tensors, numbers, None.
        shared: names (a key, a field, a position; with dots between, the whole way) of tensors
            that are not the examples'. Tensors without an axis always are shared.

    Raises:
        CurvlabError: no tensor, tensors of different lengths, a name that is not there.
    """

    def __init__(self, tree: Any, shared: Collection[str] = ()) -> None:
        found = dict(_leaves(tree))
        names = {".".join(path) for path in found} | {path[-1] for path in found if path}
        for name in shared:
            if name not in names:
                raise CurvlabError(
                    f"the minibatch has no tensor '{name}' (known: {', '.join(sorted(names))})"
                )
        apart = {
            path
            for path, t in found.items()
            if not t.ndim or ".".join(path) in shared or (path and path[-1] in shared)
        }
        self.leaves = {path: t for path, t in found.items() if path not in apart}
        self.others = {path: t for path, t in found.items() if path in apart}
        self._form = tree
        if not self.leaves:
            raise CurvlabError("the minibatch holds no tensor with the examples as first axis")
        lengths = {".".join(path): len(t) for path, t in self.leaves.items()}
        if len(set(lengths.values())) > 1:
            told = ", ".join(f"'{name}' {n}" for name, n in lengths.items())
            raise CurvlabError(
                f"the tensors of a minibatch differ in their number of examples ({told}): what is"
                " not the examples' is named by shared=(…,) of the Objective"
            )

    @classmethod
    def _like(
        cls, other: Nest, leaves: Mapping[Path, Tensor], others: Mapping[Path, Tensor]
    ) -> Nest:
        found = cls.__new__(cls)
        found.leaves, found.others, found._form = dict(leaves), dict(others), other._form
        return found

    @property
    def tree(self) -> Any:
        """The tensors in the structure in which they came; a mapping as a dict."""
        return _rebuilt(self._form, self.leaves | self.others)

    def map(self, function: Callable[[Tensor], Tensor], *, others: bool = False) -> Nest:
        """The same structure with a function of each tensor; of the shared ones with `others`."""
        return Nest._like(
            self,
            {path: function(t) for path, t in self.leaves.items()},
            {path: function(t) for path, t in self.others.items()} if others else self.others,
        )

    def __len__(self) -> int:
        return len(next(iter(self.leaves.values())))

    def __getitem__(self, key: Any) -> Any:
        """A part by its name, or rows: a slice, indices, a mask, None for a new first axis."""
        return self.tree[key] if isinstance(key, str) else self.map(lambda t: t[key])

    def __iter__(self) -> Iterator[Any]:
        raise TypeError("a Nest is not gone through: take its .tree")

    def keys(self) -> Collection[str]:
        """Names of the parts at the top; none of a tuple."""
        tree = self.tree
        return tree.keys() if isinstance(tree, dict) else ()

    def index_select(self, axis: int, index: Tensor) -> Nest:
        """Examples by their numbers."""
        return self.map(lambda t: t.index_select(axis, index))

    @property
    def shape(self) -> Hashable:
        """Of every tensor, by its path; and whatever is no tensor."""
        every = (self.leaves | self.others).items()
        return (*((path, t.shape) for path, t in every), *_constants(self._form))

    @property
    def dtype(self) -> Hashable:
        """Of every tensor."""
        return tuple(t.dtype for t in (self.leaves | self.others).values())

    @property
    def device(self) -> torch.device:
        """Of the first tensor."""
        return next(iter(self.leaves.values())).device

    is_sparse = False

    def is_floating_point(self) -> bool:
        """False: no derivative is taken in a nest."""
        return False

    def to(self, *args: Any, **kwargs: Any) -> Nest:
        """Every tensor likewise, as of a tensor."""
        return self.map(lambda t: t.to(*args, **kwargs), others=True)

    def check_finite(self) -> None:
        """Raises CurvlabError, with the tensor's name, for NaN or Inf in one."""
        for path, t in self.leaves.items():
            if t.is_floating_point() and not all_finite(t):
                raise CurvlabError(
                    f"'{'.'.join(path)}' of the minibatch contains NaN or Inf: clean the data first"
                )


Batched = Tensor | Nest
"""Inputs or targets of a minibatch, the examples first."""


def as_nest(value: Any, shared: Collection[str] = ()) -> Batched:
    """Return a tensor as it is, anything else as a `Nest`. Raises CurvlabError as that does."""
    return value if isinstance(value, Tensor | Nest) else Nest(value, shared)


def is_nest(value: Any) -> bool:
    """Whether a value is a tensor, a nest, or something that a nest can be made of."""
    return (
        isinstance(value, Tensor | Nest | Mapping | tuple)
        or (isinstance(value, list) and not any(isinstance(part, int | float) for part in value))
        or (dataclasses.is_dataclass(value) and not isinstance(value, type))
    )


def is_minibatch(x: Any, y: Any) -> bool:
    """Whether (x, y) are one minibatch, where a loader might stand in the place of x."""
    return y is not None or isinstance(x, Tensor | Mapping | Nest)


def plain(value: Batched) -> Any:
    """What was given: a tensor, or the tree of a nest."""
    return value.tree if isinstance(value, Nest) else value


def copied(value: Any) -> Any:
    """Return the same with tensors of its own, which stay as they are: loaders write over theirs.

    It may be a tensor, a nest, or what a nest can be made of; all else is not copied.
    """
    if isinstance(value, Nest):
        return value.map(lambda t: t.detach().clone(), others=True)
    return _rebuilt(value, {path: t.detach().clone() for path, t in _leaves(value)})


def times_written(x: Any) -> list[int]:
    """Return how often each tensor of a structure was written to, by what torch counts."""
    return [0 if t.is_inference() else t._version for _, t in _leaves(x)]


def leaves(tree: Any) -> list[Tensor]:
    """Return all tensors of a structure, in its order; none where there is none."""
    return [t for _, t in _leaves(tree)]


def joined(minibatches: Sequence[Batched], fill: float | None = None) -> Batched:
    """Return the examples of several minibatches as one, in their order.

    Args:
        minibatches: of one form, or of one number of axes, all but the first of any length.
        fill: what stands behind the shorter ones; None where they must have one form.

    Raises:
        CurvlabError: they have other tensors, or tensors of other shapes.
    """
    first, *others = minibatches
    if not others:
        return first
    forms = {described(m[:1]) for m in minibatches}
    if len(forms) > 1:
        if fill is None or len({_axes(m) for m in minibatches}) > 1:
            raise CurvlabError(
                f"minibatches of different forms cannot be joined ({'; '.join(sorted(forms))}):"
                " bring them to one length, or give the model an attention_mask, which says what is"
                " padding"
            )
        minibatches = _of_one_length(minibatches, fill)
        first = minibatches[0]
    if isinstance(first, Tensor):
        return torch.cat([m for m in minibatches if isinstance(m, Tensor)])
    every = [m for m in minibatches if isinstance(m, Nest)]
    leaves = {path: torch.cat([m.leaves[path] for m in every]) for path in first.leaves}
    return Nest._like(first, leaves, first.others)


def _axes(x: Batched) -> Hashable:
    """Return which tensors there are, and the number of axes of each."""
    return x.ndim if isinstance(x, Tensor) else tuple((p, t.ndim) for p, t in x.leaves.items())


def _of_one_length(minibatches: Sequence[Batched], fill: float) -> list[Batched]:
    """Return minibatches in which all tensors but their first axes are as long as the longest."""

    def padded(tensors: list[Tensor]) -> list[Tensor]:
        longest = [max(sizes) for sizes in zip(*(t.shape[1:] for t in tensors), strict=True)]
        found = []
        for t in tensors:
            whole = t.new_full((len(t), *longest), fill)
            whole[tuple(slice(n) for n in t.shape)] = t
            found.append(whole)
        return found

    if isinstance(minibatches[0], Tensor):
        return list(padded([m for m in minibatches if isinstance(m, Tensor)]))
    every = [m for m in minibatches if isinstance(m, Nest)]
    columns = {path: padded([m.leaves[path] for m in every]) for path in every[0].leaves}
    return [
        Nest._like(m, {path: ts[i] for path, ts in columns.items()}, m.others)
        for i, m in enumerate(every)
    ]


def check_inputs(x: Batched) -> None:
    """Raise CurvlabError where inputs contain NaN or Inf, or are nested in the older layout."""
    if isinstance(x, Nest):
        x.check_finite()
        return
    if x.is_meta:
        raise CurvlabError("the inputs are on the meta device and have no numbers")
    if x.is_nested and x.layout == torch.strided:
        raise CurvlabError(
            "nested tensors of the strided layout have no shape to look at: make them with"
            " layout=torch.jagged, or pad them"
        )
    if x.is_sparse and not bool(torch.isfinite(x._values()).all()):
        raise CurvlabError("the inputs contain NaN or Inf: clean the data first")
    if x.is_floating_point() and not all_finite(x):
        bad = int((~torch.isfinite(x.flatten(1) if x.ndim > 1 else x[:, None]).all(1)).nonzero()[0])
        raise CurvlabError(
            f"the inputs contain NaN or Inf (first in example {bad} of the minibatch): clean"
            " the data first"
        )


def described(x: Batched) -> str:
    """Return the shape of a tensor; the shapes of a nest's tensors, by name."""
    if isinstance(x, Tensor):
        return str(tuple(x.shape))
    return ", ".join(f"'{'.'.join(path)}' {list(t.shape)}" for path, t in x.leaves.items())


def call_arguments(x: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return inputs as a model takes them: (by position, by keyword).

    A mapping goes by keyword, a tuple or list by position, anything else is one argument.
    """
    tree = plain(x)
    if isinstance(tree, dict):
        return (), tree
    if isinstance(tree, tuple | list) and not hasattr(tree, "_fields"):
        return tuple(tree), {}
    return (tree,), {}


def _leaves(tree: Any, path: Path = ()) -> Iterator[tuple[Path, Tensor]]:
    if isinstance(tree, Tensor):
        yield path, tree
        return
    for name, part in parts(tree):
        yield from _leaves(part, (*path, name))


def parts(tree: Any) -> list[tuple[str, Any]]:
    """Return (name, part) of what a tuple, list, mapping, dataclass or nest holds; else nothing."""
    tree = tree.tree if isinstance(tree, Nest) else tree
    if isinstance(tree, Mapping):
        return [(str(name), part) for name, part in tree.items()]
    if hasattr(tree, "_fields"):  # a named tuple
        return list(zip(tree._fields, tree, strict=True))
    if isinstance(tree, tuple | list):
        return [(str(i), part) for i, part in enumerate(tree)]
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        return [(f.name, getattr(tree, f.name)) for f in dataclasses.fields(tree)]
    return []


def _constants(tree: Any, path: Path = ()) -> Iterator[Hashable]:
    if isinstance(tree, Tensor):
        return
    inside = parts(tree)
    if not inside:
        yield path, tree if isinstance(tree, int | float | str | None) else type(tree)
    for name, part in inside:
        yield from _constants(part, (*path, name))


def _rebuilt(form: Any, leaves: Mapping[Path, Any], path: Path = ()) -> Any:
    if path in leaves:
        return leaves[path]
    inside = parts(form)
    if not inside and not isinstance(form, Mapping | tuple | list):
        return form
    new = {name: _rebuilt(part, leaves, (*path, name)) for name, part in inside}
    if isinstance(form, Mapping):
        # keys as they were: a model's keywords are strings, a likelihood's may be others
        return dict(zip(form.keys(), new.values(), strict=True))
    if hasattr(form, "_fields"):
        return type(form)(**new)
    if isinstance(form, tuple | list):
        return type(form)(new.values()) if type(form) in (tuple, list) else list(new.values())
    return dataclasses.replace(cast(Any, form), **new)


_pytree.register_pytree_node(
    Nest,
    lambda nest: (list(nest.leaves.values()), nest),
    lambda leaves, nest: Nest._like(nest, dict(zip(nest.leaves, leaves, strict=True)), nest.others),
)
