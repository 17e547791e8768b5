"""A look at a minibatch: one forward of the model, and the form of its blocks that it shows."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

from torch import Tensor

from curvlab.capture import Capture
from curvlab.control_flow import raised_by_operator
from curvlab.derivatives import around, derivatives, differentiable, surrounding
from curvlab.errors import CurvlabError, lacks_memory
from curvlab.finite import all_finite
from curvlab.forms import Form, Report, prove_form, unseen
from curvlab.independence import Independence, some_rows
from curvlab.nests import Batched, call_arguments, described, times_written
from curvlab.observation import Stream
from curvlab.second_looks import QUIET
from curvlab.strangers import WRAP, beyond_a_table, called, eager, mixes

if TYPE_CHECKING:
    from curvlab.closure import Closure

_NOT_LOADED = (
    "the model calls an operator of torch's compiler (torch.cond, scan), which was not loaded yet:"
    " import torch._dynamo before"
)
_NOT_MET = (
    "the model calls an operator of torch's compiler (torch.cond, scan), which it did not at its"
    " first look at such a minibatch; nothing was moved: take the step again, or call it each time"
)


class Looks(Independence):
    """The part of a closure that runs the model."""

    stream: Stream

    def __init__(self) -> None:
        super().__init__()
        self._form: Form | None = None  # as the last look has shown it
        # a look that nobody has used yet, and the weights that it saw
        self._ahead: tuple[Tensor, Capture, tuple[int, Tensor]] | None = None
        # whether a second look will follow, so that the first is gone through again, once a form
        self.twice = False
        self.of: Closure | None = None  # the minibatch of which it is this rank's part
        self.told = 0  # flags that its look tells the other ranks
        self._own: Closure | None = None

    def some(self, which: slice) -> Closure:
        """Return some of the examples."""
        raise NotImplementedError

    @property
    def own(self) -> Closure:
        """The examples of this rank, of a minibatch that several share."""
        if self._own is None:
            self._own = self.some(self.objective.ranks.part(len(self.x)))
            self._own.of = self  # type: ignore[assignment]  # a closure
        return self._own

    def _forward(
        self,
        x: Batched,
        buffers: dict[str, Tensor] | None = None,
        heard: AbstractContextManager[Any] | None = None,
        plain: bool = False,
    ) -> Tensor:
        model = self.objective.model
        exact = self.stream == "exact"
        way = differentiable(heard is not None) if exact else nullcontext()
        try:
            with (
                self.objective.expendable.handed(x, model.training) as given,
                eager(alone=not plain and heard is None and not exact),
                surrounding(),
                way,
                nullcontext() if heard is None else heard,
            ):
                if buffers is not None:
                    out = called(model, buffers, given)
                elif isinstance(given, Tensor):
                    out = model(given)
                else:
                    by_place, by_name = call_arguments(given)
                    out = model(*by_place, **by_name)
                z: Any = self.objective.picked(out)
        except TypeError as error:
            if "argument" not in str(error) or "forward()" not in str(error):
                raise
            line = str(error).splitlines()[0]
            what = "one tensor" if isinstance(x, Tensor) else described(x)
            raise CurvlabError(f"the model does not take {what} ({line}): {WRAP}") from error
        except (RuntimeError, ValueError, IndexError) as error:
            if "higher order operator" in str(error):
                raise CurvlabError(_NOT_LOADED) from error
            of_the_data = any(word in str(error) for word in _OF_THE_DATA)
            if isinstance(error, CurvlabError) or lacks_memory(error) or not of_the_data:
                raise
            line = beyond_a_table(error, model) or str(error).splitlines()[0]
            raise CurvlabError(
                f"the model does not take inputs of shape {described(self.x)}: {line}"
            ) from error
        if not isinstance(z, Tensor):
            raise CurvlabError(
                f"the model returned a {type(out).__name__}, of which outputs= picked a"
                f" {type(z).__name__}, not one tensor"
            )
        if not z.ndim or len(z) != len(x):
            rows = f"{len(x)} rows, one for each example, not {list(z.shape)}"
            raise CurvlabError(
                f"the model must return one tensor with {rows}: "
                "keep the batch as its first axis (squeeze(-1), not squeeze())"
            )
        if not z.is_floating_point():
            raise CurvlabError(
                f"the model's outputs are {z.dtype}, which have no real derivatives: return real"
                " numbers (logits rather than classes; torch.view_as_real of complex ones)"
            )
        return z.to(self.objective.dtype)

    @property
    def form_of_look(self) -> Form:
        """The form of the look that was taken last, where one was."""
        assert self._form is not None
        return self._form

    def _key(self, x: Tensor) -> Hashable:
        """Return what decides how the model runs, beside its weights.

        It is the form of the minibatch, modes, and what is trained.
        """
        objective = self.objective
        modes = tuple([module.training for module in objective.modules])
        trained = tuple([owner[key].requires_grad for _, owner, key in objective._slots])  # type: ignore[union-attr]  # none is None
        return x.shape, x.dtype, modes, trained, around()

    @property
    def form(self) -> Form:
        """What a look at this minibatch shows of its blocks; the next look is that one."""
        if self._form is None:
            z, capture = self.forward()
            if self.stream == "exact":
                self.check_alone(z.detach())
            self._ahead = z, capture, self._weights()
        assert self._form is not None
        return self._form

    @property
    def glimpse(self) -> Form:
        """The form of the first and the last example alone, for sizes.

        It says what a look at all of a large minibatch would cost.
        """
        if self._form is not None or len(self.x) <= 2:
            return self.form
        x = some_rows(self.x, slice(0, None, len(self.x) - 1))
        known, key = self.objective.glimpses, self._key(x)
        if key not in known:
            known[key] = self._look_at(x, False)[2]
        return known[key]

    def forward(
        self, x: Tensor | None = None, move_buffers: bool = False
    ) -> tuple[Tensor, Capture]:
        """Return (outputs with their graph, the capture) of one forward on cloned buffers.

        A later look at the minibatch sees the random numbers of the first, and uses up none.

        Args:
            x: inputs; the minibatch's own where None.
            move_buffers: True runs on the model's own buffers.
        """
        if x is not None and x is not self.x:
            return self._look_at(x, False)[:2]
        ahead, self._ahead = self._ahead, None
        if ahead is not None and not self._stands(*ahead[2]):
            self._seen = None  # of other weights, which need not have been counted
        elif ahead is not None and not move_buffers:
            return ahead[:2]
        z, capture, self._form = self._look_at(self.x, True, move_buffers)
        return z, capture

    def _look_at(
        self, x: Tensor, own: bool, move_buffers: bool = False
    ) -> tuple[Tensor, Capture, Form]:
        model, objective = self.objective.model, self.objective
        objective.check_modules()
        again = own and self._chance is not None
        if again:
            self._check_restless()
        key = self._key(x)
        if move_buffers and self.twice and not again:
            self._own_buffers(own)  # kept for the second look
        buffers = None if move_buffers else self._own_buffers(own)
        quiet = objective.quiet.get(key)
        capture = Capture(
            model,
            objective.blocks,
            objective.dtype,
            objective.parameters,
            differentiable=self.stream == "exact",
        )
        capture.mask = objective.interface.places(x)
        with derivatives(), self._same_chance(own, quiet is not None):
            z = self._forward(x, buffers, capture)
            fresh = quiet is None and own and not again
            if fresh and not (capture.generators or capture.branches or self._drew()):
                objective.quiet[key] = capture.trace
            elif quiet != capture.trace:
                objective.quiet.pop(key, None)
        if own and not again:
            self._generators = dict(capture.generators)
        form = self._settle(z, capture, x, key)
        if capture.mask is not None and not any(
            use.masked_by(capture.mask) for use, _ in capture.heard()
        ):
            objective.say(_NO_SUCH_PLACES.format(capture.mask.shape[1]))
        if own:
            self._check_same(z)
        if own and self.objective.tell is not None:
            told, self.objective.tell = self.objective.tell, None
            told(str(Report(self.objective.blocks, form)))
        if own and not again and self.twice:
            self._check_steady(z, (key, capture.trace))
        return z, capture, form

    def _may_go_unheard(self) -> bool:
        """Return whether nothing but the mean gradient can be asked of a look.

        It is of a form that was heard once and draws nothing, and no other look will follow.
        """
        fresh = self._chance is None and self.stream == "step" and not self.twice
        return fresh and self.objective.fine and self._key(self.x) in self.objective.quiet

    def _unheard(self, move_buffers: bool) -> tuple[Tensor, Capture]:
        """Return what `forward` does with nobody listening."""
        self.objective.check_modules()
        self._chance = QUIET
        capture = Capture(
            self.objective.model,
            self.objective.blocks,
            self.objective.dtype,
            self.objective.parameters,
        )
        with derivatives():
            buffers = None if move_buffers else self._own_buffers(True)
            z = self._without_operators(buffers)
        self._check_same(z)
        return z, capture

    def _without_operators(self, buffers: dict[str, Tensor] | None) -> Tensor:
        """Return the outputs of a form that met no operator of torch's compiler when it was heard.

        To look out for them costs every call of the model. What fails is heard again, at once or,
        where it has written on inputs or buffers, at the next step.
        """
        every = (b for module in self.objective.modules for b in module._buffers.values())
        own = [self.x, *(b for b in every if b is not None)]
        before = times_written(own)
        try:
            return self._forward(self.x, buffers, plain=True)
        except Exception as error:
            self.objective.quiet.pop(self._key(self.x), None)
            ours = isinstance(error, CurvlabError) and not raised_by_operator(error)
            if ours or lacks_memory(error) or times_written(own) != before:
                raise
        return self._forward(self.x, buffers)

    @contextmanager
    def as_heard(self) -> Iterator[None]:
        """Go back through such a form.

        Raises:
            CurvlabError: an operator was met after all, which has no derivative of its own.
        """
        try:
            yield
        except Exception as error:
            if raised_by_operator(error):
                self.objective.quiet.pop(self._key(self.x), None)
                raise CurvlabError(_NOT_MET) from error
            raise

    def _settle(self, z: Tensor, capture: Capture, x: Tensor, known_key: Hashable) -> Form:
        """Return the ways of all blocks: as known of this form, or as a first look shows them."""
        objective = self.objective
        key = known_key, capture.trace
        if x is self.x:
            self._trace = capture.trace
        known = objective.forms.get(key)
        proven = known is not None and not capture.reorders
        same = capture.settle(z, known=known.settled if known is not None and proven else None)
        if known is None and not all_finite(
            z.detach()
        ):  # nothing can be seen, and the loss will say so
            return unseen(capture, z)
        if known is None or not (same or (proven and known.apply(capture))):
            known = self._prove(z, capture, key)
        if known.unproven:
            capture.unproven = {
                name: uses for name, uses in known.unproven.items() if name in capture.arranged
            }
            capture.prove = lambda: self._prove(z, capture, key)
        return known

    def _prove(self, z: Tensor, capture: Capture, key: Hashable) -> Form:
        with derivatives():
            found = prove_form(capture, z, mixes(self.objective.modules))
        if len(self.objective.forms) > _FORMS:  # shapes that never come again
            self.objective.forms.clear()
        self.objective.forms[key] = found
        return found


_NO_SUCH_PLACES = (
    "mask= of the Objective has {} places, and no layer has as many: nothing is masked"
)
_FORMS = 512  # that are remembered
_OF_THE_DATA = ("shape", "size", "dtype", "type", "channels", "input", "index out of range in self")
"""Words of torch's messages about data that do not fit a layer."""
