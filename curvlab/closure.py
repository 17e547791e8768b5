"""Closure, Observation: one minibatch of an objective, and what looks at it show.

The loss is the **mean over examples of a per-example sum**. Labels drawn from the model depend only
on the objective's seed and on the number of the closure, never on who asks for them: an algorithm
sees the same labels alone and in company.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from curvlab.capture import Capture
from curvlab.derivatives import around, derivatives, differentiable, precise, surrounding
from curvlab.errors import CurvlabError, Diverged, unknown
from curvlab.finite import all_finite
from curvlab.forms import Form, Report, examine, unseen
from curvlab.independence import Independence, some_rows
from curvlab.likelihoods import sample_of
from curvlab.observation import PASSES, Observation, Stream
from curvlab.output_law import Law, law_of, refusal
from curvlab.second_looks import QUIET
from curvlab.statistics import LayerStatistics
from curvlab.strangers import PICK, WRAP, called, eager, mixes

if TYPE_CHECKING:
    from curvlab.objective import Objective


class Closure(Independence):
    """One minibatch of an objective. ``closure()`` is torch's contract; ``closure.observe(needs)``
    is curvlab's.

    Raises:
        CurvlabError: an empty batch, x and y of different lengths, NaN or Inf in x.
    """

    def __init__(
        self,
        objective: Objective,
        x: Tensor,
        y: Tensor,
        number: int,
        stream: Stream = "step",
        part: int = 0,
    ) -> None:
        if not isinstance(x, Tensor) or not isinstance(y, Tensor):
            given = f"{type(x).__name__} and {type(y).__name__}"
            raise CurvlabError(
                f"a minibatch must be two tensors, not {given}: put the inputs side by side in one"
                f" tensor, and {WRAP}"
            )
        if not x.ndim or not y.ndim:
            raise CurvlabError("a minibatch needs the examples as first axis; this one has no axis")
        if len(x) != len(y):
            raise CurvlabError(
                f"the minibatch has {len(x)} inputs but {len(y)} targets: they must be as many"
            )
        if len(x) == 0:
            raise CurvlabError("the minibatch is empty")
        if x.is_sparse and not bool(torch.isfinite(x._values()).all()):
            raise CurvlabError("the inputs contain NaN or Inf: clean the data first")
        if x.is_floating_point() and not all_finite(x):
            bad = int(
                (~torch.isfinite(x.flatten(1) if x.ndim > 1 else x[:, None]).all(1)).nonzero()[0]
            )
            raise CurvlabError(
                f"the inputs contain NaN or Inf (first in example {bad} of the minibatch): clean"
                " the data first"
            )
        super().__init__()
        objective.check_modules()
        self.objective, self.number, self.stream, self.part = objective, number, stream, part
        self._y = y  # checked where it lies, before it moves
        self._checked = False
        self._form: Form | None = None  # as the last look has shown it
        self._ahead: tuple[Tensor, Capture, int] | None = None  # a look that nobody has used yet
        # whether a second look will follow, so that the first is gone through again, once a form
        self.twice = False
        with derivatives():
            self.x, self.y = self._moved(x, objective.input_dtype), self._moved(y, objective.dtype)

    def _moved(self, t: Tensor, dtype: torch.dtype | None) -> Tensor:
        device = self.objective.device
        if t.is_inference():
            t = t.clone()
        if dtype is not None and t.is_floating_point():
            t = t.to(dtype=dtype)
        waits = t.device == device or device.type != "cuda" or t.layout != torch.strided
        # from pinned memory nobody waits
        return t.to(device) if waits else t.pin_memory().to(device, non_blocking=True)

    def _loss(self, z: Tensor) -> Tensor:
        return self._losses(z).mean()

    def _losses(self, z: Tensor) -> Tensor:
        self._check(z)
        return self.objective.likelihood.loss(z, self.y)

    def _forward(
        self,
        x: Tensor,
        buffers: dict[str, Tensor] | None = None,
        heard: AbstractContextManager[Any] | None = None,
    ) -> Tensor:
        model = self.objective.model
        way = differentiable(heard is not None) if self.stream == "exact" else nullcontext()
        try:
            with eager(), surrounding(), way, nullcontext() if heard is None else heard:
                z: Any = model(x) if buffers is None else called(model, buffers, x)
        except TypeError as error:
            if "argument" not in str(error) or "forward()" not in str(error):
                raise
            line = str(error).splitlines()[0]
            raise CurvlabError(f"the model does not take one tensor ({line}): {WRAP}") from error
        except (RuntimeError, ValueError, IndexError) as error:
            if isinstance(error, CurvlabError) or not any(
                word in str(error) for word in _OF_THE_DATA
            ):
                raise
            line = str(error).splitlines()[0]
            raise CurvlabError(
                f"the model does not take inputs of shape {tuple(self.x.shape)}: {line}"
            ) from error
        if not isinstance(z, Tensor):
            raise CurvlabError(f"the model returned a {type(z).__name__}, not one tensor: {PICK}")
        if z.shape[:1] != x.shape[:1]:
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
        """Of the look that was taken last. A look must have been taken."""
        assert self._form is not None
        return self._form

    def _key(self, x: Tensor) -> Hashable:
        """What decides how the model runs, beside its weights: the form of the minibatch, modes,
        what is trained.
        """
        objective = self.objective
        modes = tuple([module.training for module in objective.modules])
        trained = tuple([owner[key].requires_grad for _, owner, key in objective._slots])  # type: ignore[union-attr]  # none is None
        return x.shape, x.dtype, modes, trained, around()

    def __call__(self) -> Tensor:
        """Torch's contract: zero the gradients, forward, backward, return the loss with ``p.grad``
        filled.
        """
        self.objective.model.zero_grad()
        loss = self._loss(self._forward(self.x))
        if self.objective.l2:
            loss = loss + self.objective.l2 * sum(
                p.square().sum() for p in self.objective.parameters.values()
            )
        loss.backward()  # type: ignore[no-untyped-call]  # torch has no types there
        return loss

    def outputs(self) -> tuple[Tensor, Tensor]:
        """(outputs, loss of each example) of the model as it stands, without a graph: all that an
        evaluation needs.
        """
        with torch.inference_mode(False), torch.no_grad():
            z = self._forward(self.x)
            return z, self._losses(z)

    def losses(self) -> Tensor:
        """The loss of each example without a graph, on cloned buffers and with the first look's
        random numbers: a trial.
        """
        self._check_restless()
        with torch.inference_mode(False), torch.no_grad(), self._same_chance(True):
            return self._losses(self._forward(self.x, self._own_buffers(True)))

    def labels(self, z: Tensor, draws: int = 1) -> list[Tensor]:
        """Labels drawn from the model's own distribution at outputs z: the same ones at every
        call.
        """
        generator = self.objective.generator(self.number, self.stream, self.part)
        return [sample_of(self.objective.likelihood, z, generator, self.y) for _ in range(draws)]

    @property
    def form(self) -> Form:
        """What a look at this minibatch shows of its blocks; the next look is that one."""
        if self._form is None:
            z, capture = self.forward()
            if self.stream == "exact":
                self.check_alone(z.detach())
            self._ahead = z, capture, self._versions()
        assert self._form is not None
        return self._form

    @property
    def glimpse(self) -> Form:
        """The form of the first and the last example alone, for sizes: what a look at all of a
        large minibatch would cost.
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
        """One forward of the minibatch, or of x, on cloned buffers: (outputs with their graph, the
        capture).

        A later look at the minibatch sees the random numbers of the first, and uses up none.
        """
        if x is not None and x is not self.x:
            return self._look_at(x, False)[:2]
        ahead, self._ahead = self._ahead, None
        if ahead is not None and not move_buffers and ahead[2] == self._versions():
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
        with derivatives(), self._same_chance(own, quiet is not None):
            z = self._forward(x, buffers, capture)
            if quiet is None and own and not again and not capture.generators and not self._drew():
                objective.quiet[key] = capture.trace
            elif quiet != capture.trace:
                objective.quiet.pop(key, None)
        if own and not again:
            self._generators = dict(capture.generators)
        form = self._settle(z, capture, x, key)
        if own:
            self._check_same(z)
        if own and self.objective.tell is not None:
            told, self.objective.tell = self.objective.tell, None
            told(str(Report(self.objective.blocks, form)))
        if own and not again and self.twice:
            self._check_steady(z, (key, capture.trace))
        return z, capture, form

    def _may_go_unheard(self) -> bool:
        """Whether nothing but the mean gradient can be asked of a look: it is of a form that was
        heard once and draws nothing, and no other look will follow.
        """
        fresh = self._chance is None and self.stream == "step" and not self.twice
        return fresh and self.objective.fine and self._key(self.x) in self.objective.quiet

    def _unheard(self, move_buffers: bool) -> tuple[Tensor, Capture]:
        """`forward` with nobody listening."""
        self.objective.check_modules()
        self._chance = QUIET
        capture = Capture(
            self.objective.model,
            self.objective.blocks,
            self.objective.dtype,
            self.objective.parameters,
        )
        with derivatives():
            z = self._forward(self.x, None if move_buffers else self._own_buffers(True))
        self._check_same(z)
        return z, capture

    def _settle(self, z: Tensor, capture: Capture, x: Tensor, known_key: Hashable) -> Form:
        """The ways of all blocks: as known of this form, or as a first look shows them."""
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
            found = examine(capture, z, mixes(self.objective.modules))
        if len(self.objective.forms) > _FORMS:  # shapes that never come again
            self.objective.forms.clear()
        self.objective.forms[key] = found
        return found

    def _check(self, z: Tensor) -> None:
        """Of targets, and at the first look at a form of the likelihood, where that is the
        user's.
        """
        if self._checked:
            return
        self.objective.likelihood.check(z, self._y)
        self._checked = True
        key = self._key(self.x)
        if key not in self.objective.laws or (
            self.stream == "exact" and self.objective.laws[key].examined
        ):
            with derivatives():
                self.objective.laws[key] = law_of(self.objective.likelihood, z.detach(), self.y)

    @property
    def law(self) -> Law:
        """What was found of the likelihood: its root, and whether labels drawn by it follow its
        loss.
        """
        key = self._key(self.x)
        if key not in self.objective.laws or not self._checked:
            _ = self.form  # a look, which the next one is
            look = self.forward()
            self._check(look[0].detach())
            self._ahead = *look, self._versions()
        return self.objective.laws[key]

    def look(self) -> tuple[Tensor, Tensor, Capture]:
        """One forward on cloned buffers, checked: (outputs and loss of each example with their
        graphs, the capture).
        """
        z, capture = self.forward()
        with derivatives():
            losses = self._losses(z)
        self._finite(losses.detach().mean(), z.detach())
        if self.stream == "exact":
            self.check_alone(z.detach())
        return z, losses, capture

    def root(self, z: Tensor) -> Tensor:
        """S of each example, S Sᵀ = ∂²ℓ/∂z², one column a slice of the first axis: [V, N, *C].

        Raises:
            CurvlabError: the likelihood has none, and its loss is not convex in the outputs.
        """
        law = self.law
        if law.root is None:
            raise CurvlabError(refusal(law, "ggn"))
        if law.why:
            self.objective.say(law.why)
        return law.root(z, self.y)

    def check_kind(self, kind: str) -> None:
        """Raises CurvlabError where the likelihood leaves a kind of matrix without one meaning."""
        if kind == "fisher" and not self.law.follows:
            raise CurvlabError(refusal(self.law, kind))

    @precise()
    def observe(
        self,
        needs: Iterable[str] = frozenset({"data"}),
        move_buffers: bool = True,
        draws: int = 1,
        *,
        checked: bool = True,
    ) -> Observation:
        """One forward, then one backward for each pass in `needs`.

        Args:
            needs: of "gradient", "data", "model", "exact".
            move_buffers: False runs on cloned buffers, so that a second look does not move
                BatchNorm's statistics.
            draws: labels drawn for each example in the "model" pass; with k of them V = k, each
                vector times 1/√k.
            checked: False leaves it to the caller to see that the loss is finite: nothing then
                waits for a GPU.

        Raises:
            CurvlabError: targets that do not fit, a loss that is not finite, a module that runs
                twice in the pass.
        """
        needs = {needs} if isinstance(needs, str) else set(needs)
        for name in needs - set(PASSES):
            raise unknown("pass", name, PASSES)
        likelihood = self.objective.likelihood
        z, capture = (
            self._unheard(move_buffers)
            if needs == {"gradient"} and self._may_go_unheard()
            else self.forward(move_buffers=move_buffers)
        )
        with derivatives():
            outputs = z.detach().requires_grad_()
            loss = self._loss(outputs)
        if checked:
            self._finite(loss.detach(), outputs)
        if self.stream == "exact":
            self.check_alone(outputs.detach())
        passes: dict[str, dict[str, LayerStatistics]] = {}
        by_leaves = "gradient" in needs
        for name in (p for p in PASSES if p in needs):
            if name == "gradient" and "data" in needs:
                continue  # they are one
            if name == "exact":
                if self.stream != "exact" and mixes(self.objective.modules):
                    self.objective.say(_MIXING)
                vectors = self.root(outputs.detach())
            elif name in ("gradient", "data"):
                size = torch.full_like(loss, len(z))  # of the sum, not of the mean
                vectors = torch.autograd.grad(loss, outputs, size)[0][None]
            else:
                drawn = self.labels(outputs.detach(), draws)
                with derivatives():
                    each = [
                        torch.autograd.grad(likelihood.loss(outputs, label).sum(), outputs)[0]
                        for label in drawn
                    ]
                vectors = each[0][None] if draws == 1 else torch.stack(each) / draws**0.5
            if name == "gradient" and all(map(capture.fine, self.objective.blocks)):
                passes[name] = capture.gradients(z, vectors)
            else:
                passes[name] = capture.backward(
                    z, vectors, leaves=True, gradients=by_leaves and name in ("gradient", "data")
                )
            for statistics in passes[name].values():
                if not statistics.used and statistics.block.name not in capture.frozen:
                    self.objective.say(
                        f"{statistics.block} does not reach the model's outputs in a minibatch: its"
                        " gradient is zero there (freeze it if it is never used)"
                    )
        if by_leaves and "data" in needs:
            passes["gradient"] = passes["data"]
        value, pull = loss.detach(), dict[str, Tensor]()
        if self.objective.l2:
            weights = {name: p.detach() for name, p in self.objective.parameters.items()}
            pull = {
                b.name: 2 * self.objective.l2 * b.gather(weights) for b in self.objective.blocks
            }
            value = value + self.objective.l2 * sum(w.square().sum() for w in weights.values())
        return Observation(value, len(z), passes, self, pull)

    def _finite(self, loss: Tensor, z: Tensor) -> None:
        if math.isfinite(float(loss)):
            return
        weights = [
            name
            for name, p in self.objective.model.named_parameters()
            if not bool(torch.isfinite(p).all())
        ]
        if weights:
            where = f"the weights '{weights[0]}' contain NaN or Inf"
        elif not bool(torch.isfinite(z).all()):
            where = "the model's outputs contain NaN or Inf"
        else:
            where = "the outputs are finite, so the likelihood overflows"
        raise Diverged(
            f"the loss is {float(loss)}: {where}; lower the learning rate or raise the damping"
        )


_MIXING = (
    "batch norm in training mode lets examples act on each other: the Gauss-Newton matrix is taken"
    " as if each stood alone, without the derivatives that pass from one to another"
)
_FORMS = 512  # that are remembered
_OF_THE_DATA = ("shape", "size", "dtype", "type", "channels", "input", "index out of range in self")
"""In torch's messages about data that do not fit a layer."""
