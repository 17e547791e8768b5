"""Objective: a model, the likelihood of its outputs, and the seed of labels drawn from it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from curvlab.closure import Closure
from curvlab.errors import CurvlabError, real, shown, unknown, warn, whole
from curvlab.expendable import Expendable
from curvlab.forms import Form, Report
from curvlab.interface import Interface, Mask, Outputs
from curvlab.layers import Block, Layout, blocks
from curvlab.likelihoods import LIKELIHOODS, Likelihood
from curvlab.likelihoods.base import trainable_in
from curvlab.nests import Batched, as_nest, is_nest
from curvlab.observation import STREAMS, Stream
from curvlab.output_law import Law
from curvlab.parallel import Ranks, ranks_here
from curvlab.shared_looks import whole_minibatch
from curvlab.strangers import check_model, original


class Objective:
    """A model, the likelihood of its outputs, and the seed of the labels that are drawn from it.

    The loss is the mean over examples of a per-example sum.

    Args:
        model: any `nn.Module` that maps [N, …] to [N, …] with the batch as first axis. A compiled
            one is run as it was before.
        likelihood: one of `curvlab.likelihoods` or your own class with `check`, `loss`, `sample`,
            `root`.
        seed: of the labels drawn from the model.
        l2: μ of the term μ ‖θ‖² (S2QN (26)) in loss and gradient, and 2μ I in the matrix of the
            methods of the whole vector and of `smw-ng-bd`: inverse, quadratic model and ρ.
            Statistics of layers, and `curvlab.exact`, are of the likelihood alone (practice: "not
            the curvature passes"). Weight decay is another thing: it is added to the direction.
        outputs: of a model that returns no tensor: the name of the field that the likelihood takes,
            or a function of what the model returns, which picks a tensor [N, …].
        labels: of minibatches that are mappings: the key of the targets; the rest is given to the
            model by keyword. Of tuples of more than two: the targets' position.
        shared: names of tensors in the inputs that are not the examples', such as a table.
        mask: which places of sequences are padding: the name of a tensor [N, T] in the inputs that
            is 1 elsewhere (transformers' "attention_mask"), or a function of the inputs that gives
            one. Places of padding do not count in KFAC's factors: neither in A nor among the places
            over which G is a mean (of K-BFGS in A alone). A layer with another number of places
            than T is not masked. Exact matrices need no mask: what no loss sees has no derivative.
            Labels are no mask: a place without a label may act through attention.
        ranks: that share each minibatch; None takes those of the process group that is initialised.
            Then every rank makes the same calls, with the whole minibatch or each with its part.

    Raises:
        CurvlabError: no trainable parameter, complex ones, sharded parameters, a likelihood that
            lacks a method, or an L2 term below 0.
    """

    def __init__(
        self,
        model: nn.Module,
        likelihood: Likelihood,
        seed: int = 0,
        *,
        l2: float = 0.0,
        outputs: Outputs = "logits",
        labels: str | int = "labels",
        shared: Collection[str] = (),
        mask: Mask = None,
        ranks: Ranks | None = None,
    ) -> None:
        if isinstance(likelihood, type) or not isinstance(
            likelihood, Likelihood
        ):  # the class itself has the methods too
            raise unknown(
                "likelihood",
                likelihood,
                (f"curvlab.likelihoods.{c.__name__}()" for c in LIKELIHOODS.values()),
            )
        own = ", ".join(trainable_in(likelihood))
        if own:
            warn(
                f"the likelihood has trainable tensors of its own ({own}), which are no parameters"
                " of the model: they stand still; let the model's outputs carry them"
            )
        seed, l2 = whole("the seed", seed, 0), real("the L2 term", l2)
        model = original(model)
        check_model(model)
        if ranks is not None and not isinstance(ranks, Ranks):
            raise CurvlabError(
                f"ranks must be curvlab.parallel.Ranks, ALONE or None, not {shown(ranks)}"
            )
        self.ranks = ranks_here() if ranks is None else ranks
        # {form: why each rank goes through the whole minibatch, "" where it does not}
        self.shareable: dict[Hashable, str] = {}
        # whether each rank is given its part of a minibatch, as the first has shown
        self.given_parts: bool | None = None
        self.model, self.likelihood, self.seed = model, likelihood, seed
        self.blocks: tuple[Block, ...] = blocks(model)
        self.modules: tuple[nn.Module, ...] = tuple(model.modules())
        places = [(name, *name.rpartition(".")[::2]) for b in self.blocks for name in b.params]
        self._slots = [
            (name, _held(model.get_submodule(owner)), key) for name, owner, key in places
        ]
        self._lineage = _lineage(model, {owner for _, owner, _ in places})
        self._flags: list[
            bool
        ] = []  # of all parameters, as `check_trained` last saw them to be right
        self.trained: frozenset[str] = frozenset(name for b in self.blocks for name in b.params)
        self.l2 = l2
        self.interface = Interface(labels, outputs, shared, mask)
        self.closures: dict[Stream, int] = dict.fromkeys(STREAMS, 0)  # how many were made of each
        self.forms: dict[Hashable, Form] = {}  # what first looks have shown
        self.may_freeze = (
            False  # whether the oracle goes on where a parameter was frozen: inside of a step
        )
        self.functional: dict[Hashable, bool] = {}  # whether torch.func sees what autograd sees
        self.glimpses: dict[Hashable, Form] = {}  # of two examples, for sizes alone
        self.laws: dict[Hashable, Law] = {}
        self.expendable = Expendable()
        # forms that draw no random number, and run no operator of torch's compiler: their traces
        self.quiet: dict[Hashable, int] = {}
        self.steady: dict[
            Hashable, float
        ] = {}  # how far two looks at one minibatch differ though nothing moved
        # forms that the oracle has seen to be a mean over examples
        self.alone: set[Hashable] = set()
        self.sound: list[int] | None = (
            None  # versions of the weights, and modes of the modules, that it has checked
        )
        self.said: set[str] = set()  # what is said once
        self.tell: Callable[[str], None] | None = (
            None  # is told of the first look, as `check` would report it
        )

    @property
    def l2_hessian(self) -> float:
        """The multiple 2μ of the identity that the L2 term adds to a Hessian."""
        return 2 * self.l2

    @property
    def layout(self) -> Layout:
        """Where the blocks lie in one vector of all parameters."""
        return Layout(self.blocks)

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """Parameters of the blocks, as they stand in the model now, ``{name: parameter}``."""
        return {name: p for name, owner, key in self._slots if (p := owner.get(key)) is not None}

    @property
    def device(self) -> torch.device:
        """The device of the first block's first parameter, on which labels are drawn.

        Of the next one where the model has lost it, which `check_modules` says.
        """
        there = (p for _, owner, key in self._slots if (p := owner.get(key)) is not None)
        return next((p.device for p in there), torch.device("cpu"))

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of all statistics and matrices.

        It is the widest of the blocks' parameters, and at least single precision.
        """
        found = torch.float32
        for dtype in {owner[key].dtype for _, owner, key in self._slots}:  # type: ignore[union-attr]  # none is None
            found = torch.promote_types(found, dtype)
        return found

    @property
    def fine(self) -> bool:
        """Whether autograd's derivatives of all blocks are of the statistics' precision."""
        dtype = self.dtype
        return all(owner[key].dtype == dtype for _, owner, key in self._slots)  # type: ignore[union-attr]  # none is None

    @property
    def input_dtype(self) -> torch.dtype | None:
        """The dtype of all floating weights, to which floating inputs are brought.

        None where they differ: those inputs stay.
        """
        every = {
            w.dtype for module in self.modules for w in module._parameters.values() if w is not None
        }
        found = [dtype for dtype in every if dtype.is_floating_point]
        return found[0] if len(found) == 1 else None

    def batch(self, x: Any, y: Any = None) -> tuple[Batched, Batched]:
        """Return inputs and targets of a minibatch, each as a tensor or a nest.

        Args:
            x: inputs; without `y` a minibatch as a loader gives it.
            y: targets.

        Raises:
            CurvlabError: what holds no tensors, or no labels where they should be.
        """
        if y is None:
            x, y = self.interface.apart(x)
        if not is_nest(x) or not is_nest(y):
            raise CurvlabError(
                "a minibatch must be tensors, or tuples, mappings and dataclasses of them, not"
                f" {type(x).__name__} and {type(y).__name__}: torch.as_tensor makes a tensor of an"
                " array"
            )
        return self.interface.inputs(x), as_nest(y)

    def picked(self, out: Any) -> Any:
        """Return what the likelihood takes of the model's outputs. Raises CurvlabError for none."""
        if isinstance(out, Tensor) and isinstance(self.interface.outputs, str):
            return out
        return self.interface.pick(out, getattr(self.likelihood, "join", None))

    def check(self, x: Any, y: Any = None) -> Report:
        """Return what a look at a minibatch of this form shows.

        It is which block goes which way and why, and how near to autograd. `str` of it is a table,
        `ways` is {block: "structured" | "general" | "unused"}. Moves nothing.

        Args:
            x: inputs, as of `closure`.
            y: targets, as the likelihood wants them.

        Raises:
            CurvlabError: data that do not fit.
        """
        x, y = self.batch(x, y)
        closure = Closure(self, x, y, 0)
        self.forms.clear()
        return Report(self.blocks, closure.form, closure.law.why)

    def say(self, line: str) -> None:
        """Warn by a line, once."""
        if line not in self.said:
            self.said.add(line)
            warn(line)

    def check_modules(self) -> None:
        """Raise CurvlabError where a layer was replaced, or lost a parameter.

        It is seen against what the objective was made with.
        """
        for name, owner, key in self._slots:
            if owner.get(key) is None:
                raise CurvlabError(
                    f"the model has no parameter '{name}' any more: make a new Objective, or begin"
                    " another watch"
                )
        for children, name, module in self._lineage:
            if children.get(name) is not module:
                raise CurvlabError(
                    f"the layer '{name}' was replaced after the objective was made: make a new"
                    " Objective, or begin another watch"
                )

    def check_trained(self) -> None:
        """Raise CurvlabError where other parameters are trained than at the beginning.

        It is seen against what the objective was made with.
        """
        flags = [
            p.requires_grad for m in self.modules for p in m._parameters.values() if p is not None
        ]
        if flags == self._flags:
            return
        for name, p in self.model.named_parameters():
            if self.may_freeze and not p.requires_grad:
                continue
            if p.numel() and p.requires_grad != (name in self.trained):
                change = (
                    "frozen when the objective was made and is trained now"
                    if p.requires_grad
                    else "frozen after the objective was made"
                )
                raise CurvlabError(f"parameter '{name}' was {change}: make a new Objective")
        self._flags = [] if self.may_freeze else flags

    def closure(self, x: Any, y: Any = None, stream: Stream = "step") -> Closure:
        """Return the objective on one minibatch, moved to the model's device.

        Floating tensors are brought to the model's dtype, if it has one. The closures of a stream
        are numbered 1, 2, …; those of warm starts and of the oracle apart, so that the labels drawn
        at a step depend on neither.

        Args:
            x: inputs [N, …]: a tensor, or a nest of tensors (`curvlab.nests.Nest`), of which a
                mapping is given to the model by keyword, a tuple by position. Without `y` a
                minibatch as a loader gives it: a mapping with the labels in it, a pair.
            y: targets, as the likelihood wants them.
            stream: who makes it.

        Raises:
            CurvlabError: data that do not fit.
        """
        x, y = self.batch(x, y)
        if self.ranks.several and stream != "exact":
            x, y = whole_minibatch(self, x, y)
        self.closures[stream] += 1
        return Closure(self, x, y, self.closures[stream], stream)

    def generator(self, number: int, stream: Stream = "step", part: int = 0) -> torch.Generator:
        """Return the generator of the labels of one closure.

        It is a function of (seed, number, stream, part) alone.
        """
        entropy = [self.seed, number, STREAMS.index(stream), part]
        state = int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0])
        return torch.Generator(self.device).manual_seed(state >> 1)

    def state_dict(self) -> dict[str, Any]:
        """Return what draws of labels go on from: the seed, and the closures of each stream."""
        return {"seed": self.seed, "closures": dict(self.closures)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the seed and the numbers of closures from what `state_dict` returned."""
        self.seed, self.closures = state["seed"], dict(state["closures"])


class _Attributes:
    """The parameters of a scripted module, which has no dictionary of them."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def get(self, key: str) -> nn.Parameter | None:
        found: nn.Parameter | None = getattr(self.module, key, None)
        return found

    def __getitem__(self, key: str) -> nn.Parameter | None:
        return self.get(key)


def _held(module: nn.Module) -> dict[str, nn.Parameter | None] | _Attributes:
    """Return a module's own parameters, as they stand."""
    return module._parameters if isinstance(module._parameters, dict) else _Attributes(module)


def _lineage(
    model: nn.Module, owners: set[str]
) -> list[tuple[dict[str, nn.Module | None], str, nn.Module | None]]:
    """Return (children of a module, a name, the child) on every way from the model to its owners.

    Those are the modules that have parameters of blocks.
    """
    found: dict[str, tuple[dict[str, nn.Module | None], str, nn.Module | None]] = {}
    for owner in owners:
        parts = owner.split(".") if owner else []
        for i, name in enumerate(parts):
            children = model.get_submodule(".".join(parts[:i]))._modules
            if isinstance(children, dict):  # what a scripted module holds cannot be replaced
                found[".".join(parts[: i + 1])] = children, name, children[name]
    return list(found.values())


def weights(objective: Objective) -> list[Tensor]:
    """Return a copy of every parameter, for `restore_weights`."""
    return [p.detach().clone() for p in objective.parameters.values()]


def restore_weights(objective: Objective, saved: list[Tensor]) -> None:
    """Take a step back, to the bit."""
    with torch.no_grad():
        for p, old in zip(objective.parameters.values(), saved, strict=True):
            p.copy_(old)
