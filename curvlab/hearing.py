"""Hearing: every call of a torch function that takes a block's weight, while a model runs.

What is heard are *calls* (`functions`), wherever they stand: in their module, in a functional call,
behind a hook, in a module that runs twice. Nothing is written on modules. What is done with the
calls is `capture`'s business.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge
from torch.overrides import TorchFunctionMode

from curvlab.autograd import edge_of
from curvlab.control_flow import CONTROL_FLOW
from curvlab.derivatives import weight_norm
from curvlab.functions import COMPOSITE, FUNCTIONS, REORDERING, TRANSPOSITIONS, Rule, indexed
from curvlab.layers import Block
from curvlab.uses import Stored, Use, UseInput

_NONE: dict[str, Any] = {}
_SPECIAL: frozenset[Any] = (
    TRANSPOSITIONS
    | REORDERING
    | {*FUNCTIONS, *COMPOSITE, torch._weight_norm, Tensor.__getitem__, Tensor.__setitem__}
)
"""Functions of which more is asked than what they return."""


class _Listener(TorchFunctionMode):
    """Tells a hearing of every call that the tables know."""

    def __init__(self, hearing: Hearing) -> None:
        super().__init__()
        self.hearing = hearing

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, hearing = kwargs or _NONE, self.hearing
        if func not in _SPECIAL:  # most calls, and every one is waited for
            if kwargs and "generator" in kwargs:
                hearing._draws(kwargs["generator"])
            output = func(*args, **kwargs)
            if isinstance(output, Tensor):
                hearing.calls += (func, output.shape)
                if len(args) > 1:
                    hearing.calls += [a for a in args[1:] if type(a) is int]
            return output
        rule = FUNCTIONS.get(func)
        if rule is not None:
            output = func(*args, **kwargs)
            hearing.calls += (func, output.shape)
            hearing._hear(rule, args, kwargs, output)
            return output
        opened = (
            COMPOSITE.get(func)
            if func is not torch._weight_norm or not hearing.differentiable
            else weight_norm
        )
        if opened is not None:
            hearing.branches = hearing.branches or func in CONTROL_FLOW
            with self:
                return opened(*args, **kwargs)
        if "generator" in kwargs:
            hearing._draws(kwargs["generator"])
        output = func(*args, **kwargs)
        if isinstance(output, Tensor):
            hearing.calls += (func, output.shape, *[a for a in args[1:] if type(a) is int])
        if func in TRANSPOSITIONS:
            hearing._turned(args, output)
        elif not hearing.reorders and indexed(func, args):
            hearing.reorders = True
        return output


class Hearing:
    """A context in which the calls of some blocks' weights are heard, and written down as uses.

    Args:
        parameters: {name: parameter} of the blocks; looked up in the model where None.
        differentiable: whether second and forward derivatives will be taken
            (`derivatives.differentiable`).
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Sequence[Block],
        parameters: Mapping[str, nn.Parameter] | None = None,
        *,
        differentiable: bool = False,
    ) -> None:
        self.differentiable = differentiable
        self.model, self.blocks, self._given = model, tuple(blocks), parameters
        self.parameters: Mapping[str, nn.Parameter] = {} if parameters is None else parameters
        self._listener: _Listener | None = None
        self._clear()

    def _clear(self) -> None:
        self.uses: dict[str, list[Use]] = {}
        self.general: dict[str, str] = {}  # {block: why it goes the general way}
        self.arranged: dict[str, tuple[str, ...]] = {}  # {block: the arrangement of each use}
        self.missed: set[str] = set()  # blocks that a call without a rule uses
        self.silent: set[str] = set()  # blocks with a call without gradients
        self.frozen: set[str] = set()  # blocks that are not trained any more
        self.calls: list[Any] = []  # functions that ran, and their outputs' shapes
        self.trace = 0  # a hash of these
        self.reorders = False  # whether rows were taken by the numbers of a tensor
        self.branches = False  # whether an operator of torch's compiler ran, such as a scan
        self._void: dict[
            Node, tuple[Node, ...]
        ] = {}  # calls with no row: {their output: what lies beyond}
        self.generators: dict[
            torch.Generator, Tensor
        ] = {}  # of the model's own, with their states before it drew
        self.unproven: dict[
            str, tuple[int, ...]
        ] = {}  # {block: uses whose derivatives were all zero when it was examined}
        self.prove: Callable[[], object] | None = None  # examine again
        self._inputs: dict[int, UseInput] = {}
        self._size: int | None = None

    def __enter__(self) -> Self:
        self._clear()
        found = (
            {name: self.model.get_parameter(name) for b in self.blocks for name in b.params}
            if self._given is None
            else self._given
        )
        self.parameters = found
        self._owner = {id(self.parameters[name]): b for b in self.blocks for name in b.params}
        self._weights = {id(self.parameters[b.params[0]]): (b, False) for b in self.blocks}
        self._kept: list[Tensor] = []  # transposed weights, so that their ids stay theirs
        self._listener = _Listener(self)
        self._listener.__enter__()  # type: ignore[no-untyped-call]  # torch has no types there
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._listener is not None
        self._listener.__exit__(kind, error, trace)  # type: ignore[no-untyped-call]  # likewise
        self._listener = None
        self._kept.clear()
        self.trace = hash((*self.calls, *[(name, len(uses)) for name, uses in self.uses.items()]))
        self.calls.clear()

    def _hear(self, rule: Rule, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        call = rule.bind(args, kwargs)
        weight = call.weight
        known = self._weights.get(id(weight))
        if known is None:
            return
        block, turned = known
        if not output.requires_grad:
            self.silent.add(block.name)
            return
        layer = block.layer
        if layer is None or not rule.covers(call) or rule.groups(call) != block.groups:
            return
        swapped = (rule.transposed != turned) != layer.transposed
        if (swapped or turned) and (block.groups > 1 or weight.ndim != 2):
            return
        bias = self.parameters[block.params[1]] if block.biased else None
        biased = bias is not None and call.bias is bias and not swapped
        x, own = call.input, bias if biased else weight
        given = (*args, *kwargs.values()) if kwargs else args
        beyond = [
            t
            for t in given
            if t is not weight and t is not own and isinstance(t, Tensor) and t.requires_grad
        ]
        if x is weight:
            beyond.append(x)
        call.input, call.weight, call.bias = None, weight.detach(), None
        inputs = rule.inputs(call, x.detach()) if rule.stateful else None
        edge, flat = edge_of(output)
        behind = tuple([t.grad_fn or get_gradient_edge(t).node for t in beyond])
        if not output.numel():
            self._void[edge.node] = behind
            return
        use = Use(
            block,
            rule,
            call,
            Stored.of(x),
            Stored.of(output),
            edge,
            flat,
            biased,
            swapped,
            inputs,
            behind,
            None if x.grad_fn is None else GradientEdge(x.grad_fn, x.output_nr),
        )
        found = self.uses.get(block.name)
        if found is None:
            self.uses[block.name] = [use]
        else:
            found.append(use)

    def _turned(self, args: tuple[Any, ...], output: Any) -> None:
        """A weight that is read in the other direction."""
        known = self._weights.get(id(args[0])) if args else None
        if (
            known is None
            or not isinstance(output, Tensor)
            or args[0].ndim != 2
            or len({d % 2 for d in args[1:]}) == 1
        ):
            return
        self._kept.append(output)
        self._weights[id(output)] = known[0], not known[1]

    def _draws(self, generator: Any) -> None:
        if isinstance(generator, torch.Generator) and generator not in self.generators:
            self.generators[generator] = generator.get_state()
