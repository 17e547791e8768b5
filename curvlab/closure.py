"""Closure: one minibatch of an objective, and the looks at it.

The loss is the **mean over examples of a per-example sum**. Labels drawn from the model depend only
on the objective's seed and on the number of the closure, never on who asks for them: an algorithm
sees the same labels alone and in company.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from curvlab.capture import Capture
from curvlab.derivatives import derivatives, precise
from curvlab.errors import CurvlabError, Diverged, unknown
from curvlab.independence import some_rows
from curvlab.likelihoods.base import (
    MeanFactor,
    by_output,
    factor_of,
    losses_of,
    places_of,
    root_factor,
    sample_of,
)
from curvlab.looks import Looks
from curvlab.nests import Nest, as_nest, check_inputs, copied
from curvlab.observation import PASSES, Observation, Stream
from curvlab.output_law import Law, law_of, refusal
from curvlab.sent_vectors import guard_pass, pass_of_vectors
from curvlab.shared_looks import drawn_by_ranks, shared_look
from curvlab.statistics import LayerStatistics
from curvlab.strangers import mixes
from curvlab.units import ByPlace

if TYPE_CHECKING:
    from curvlab.objective import Objective

_Batched = TypeVar("_Batched", Tensor, Nest)


class Closure(Looks):
    """A minibatch of an objective.

    ``closure()`` is torch's contract; ``closure.observe(needs)`` is curvlab's.

    Args:
        factor: N/M of the whole of which this minibatch is a part, of heads {head: N/M}; None where
            it is no part.

    Raises:
        CurvlabError: an empty batch, x and y of different lengths, NaN or Inf in x.
    """

    def __init__(
        self,
        objective: Objective,
        x: Any,
        y: Any,
        number: int,
        stream: Stream = "step",
        part: int = 0,
        factor: MeanFactor | None = None,
    ) -> None:
        if not isinstance(x, Tensor | Nest) or not isinstance(y, Tensor | Nest):
            x, y = objective.batch(x, y)
        if any(isinstance(t, Tensor) and not t.ndim for t in (x, y)):
            raise CurvlabError("a minibatch needs the examples as first axis; this one has no axis")
        check_inputs(x)
        if objective.device.type == "meta":
            raise CurvlabError(
                "the model is on the meta device and has no numbers: model.to_empty(…), and load"
                " them first"
            )
        if len(x) != len(y):
            raise CurvlabError(
                f"the minibatch has {len(x)} inputs but {len(y)} targets: they must be as many"
            )
        if len(x) == 0:
            raise CurvlabError("the minibatch is empty")
        super().__init__()
        objective.check_modules()
        self.objective, self.number, self.stream, self.part = objective, number, stream, part
        self._y = y  # checked where it lies, before it moves
        self._factor, self.is_part = factor, factor is not None
        self._checked = self._kept = False
        with derivatives():
            self.x, self.y = self._moved(x, objective.input_dtype), self._moved(y, objective.dtype)

    def _moved(self, t: _Batched, dtype: torch.dtype | None) -> _Batched:
        if isinstance(t, Nest):
            return t.map(lambda t: self._moved(t, dtype), others=True)
        device = self.objective.device
        if t.is_inference():
            t = t.clone()
        if dtype is not None and t.is_floating_point():
            t = t.to(dtype=dtype)
        waits = t.device == device or device.type != "cuda" or t.layout != torch.strided
        if waits:
            return t.to(device)
        # nobody waits for pinned memory: a copy, since a loader may fill its own again meanwhile
        return torch.empty_like(t, pin_memory=True).copy_(t).to(device, non_blocking=True)

    def _loss(self, z: Tensor) -> Tensor:
        return self._losses(z).mean()

    def _losses(self, z: Tensor) -> Tensor:
        self._check(z)
        return self.loss_of(z, self.y)

    @property
    def factor(self) -> MeanFactor:
        """N/M of the minibatch whose mean is taken: this one, or that of which it is a part.

        Of heads with means of their own it is {head: N/M}, each for its own losses and outputs.

        Here alone it enters: losses, and so gradients, their second moments and second derivatives
        at the data's labels, are times it (`loss_of`); the vectors of second moments that stand for
        ∂²ℓ/∂z², S, the scores of drawn labels and those of single places, times its root.
        """
        if self._factor is None:
            self._factor = factor_of(self.objective.likelihood, self._y)
        return self._factor

    def some(self, which: slice) -> Closure:
        """Return some of the examples, with the number and the factor of the whole."""
        x, y = some_rows(self.x, which), self.y[which]
        return Closure(
            self.objective, x, y, self.number, self.stream, self.part, factor=self.factor
        )

    @property
    def data(self) -> tuple[Tensor, Tensor]:
        """Inputs and targets."""
        return self.x, self.y

    def keep(self) -> Closure:
        """Return this minibatch with data of its own, for after the step: loaders reuse theirs."""
        if not self._kept:
            self.x, self.y, self._kept = copied(self.x), copied(self.y), True
            self._y = self.y if self._checked else copied(self._y)
        return self

    def loss_of(self, z: Tensor, y: Tensor, *, drawn: bool = False) -> Tensor:
        """Return the loss of each example at outputs and labels, times `factor`.

        Of labels that were `drawn` it is times the root of it.
        """
        factor = root_factor(self.factor) if drawn else self.factor
        return losses_of(self.objective.likelihood, z, y, factor)

    def __call__(self) -> Tensor:
        """Zero the gradients, go forward and backward, return the loss with ``p.grad`` filled.

        That is torch's contract.
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
        """Return (outputs, loss of each example) of the model as it stands, without a graph.

        It is all that an evaluation needs.
        """
        with torch.inference_mode(False), torch.no_grad():
            z = self._forward(self.x)
            return z, self._losses(z)

    def losses(self) -> Tensor:
        """Return the loss of each example of a trial: without a graph, on cloned buffers.

        The random numbers are those of the first look.
        """
        self._check_restless()
        with torch.inference_mode(False), torch.no_grad(), self._same_chance(True):
            return self._losses(self._forward(self.x, self._own_buffers(True)))

    def labels(self, z: Tensor, draws: int = 1) -> list[Tensor]:
        """Draw labels from the model's own distribution at outputs z: the same at every call."""
        if self.of is not None:  # as one process draws them
            return drawn_by_ranks(self, self.of, z, draws)
        generator = self.objective.generator(self.number, self.stream, self.part)
        likelihood = self.objective.likelihood
        drawn = (sample_of(likelihood, z, generator, self.y) for _ in range(draws))
        found: list[Any] = [as_nest(labels) for labels in drawn]  # of several heads a nest
        return found

    def _check(self, z: Tensor) -> None:
        """Check targets, and at the first look at a form the user's own likelihood."""
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
        """What was found of the likelihood, its root and whether labels follow its loss."""
        key = self._key(self.x)
        if key not in self.objective.laws or not self._checked:
            _ = self.form  # a look, which the next one is
            look = self.forward()
            self._check(look[0].detach())
            self._ahead = *look, self._weights()
        return self.objective.laws[key]

    def look(self) -> tuple[Tensor, Tensor, Capture]:
        """Return (outputs, loss of each example, the capture) of one forward, which is checked.

        It runs on cloned buffers; outputs and losses have their graphs.
        """
        z, capture = self.forward()
        with derivatives():
            losses = self._losses(z)
        self._finite(losses.detach().mean(), z.detach())
        if self.stream == "exact":
            self.check_alone(z.detach())
        return z, losses, capture

    def root(self, z: Tensor) -> Tensor:
        """Return S of each example, S Sᵀ = `factor` ∂²ℓ/∂z², each column a slice: [V, N, *C].

        Raises:
            CurvlabError: the likelihood has none, and its loss is not convex in the outputs.
        """
        law = self.law
        if law.root is None:
            raise CurvlabError(refusal(law, "ggn"))
        if law.why and law.examined:
            self.objective.say(law.why)
        root = law.root(z, self.y)
        if self.factor == 1:
            return root
        return root * by_output(self.objective.likelihood, z, root_factor(self.factor))

    def by_place(self, z: Tensor) -> ByPlace:
        """Return the derivatives of the losses in outputs z at the data's labels, place by place.

        Raises:
            CurvlabError: the likelihood does not say which outputs are one place's.
        """
        z = z.detach().requires_grad_()
        with derivatives():
            (slopes,) = torch.autograd.grad(self._losses(z).sum(), z)
        likelihood = self.objective.likelihood
        root = by_output(likelihood, z.detach(), root_factor(self.factor))
        return ByPlace(slopes, places_of(likelihood, z, self.y), root)

    def check_kind(self, kind: str) -> None:
        """Raise CurvlabError where the likelihood leaves a kind of matrix without one meaning."""
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
        """Go forward once, then backward once for each pass in `needs`.

        Args:
            needs: of "gradient", "data", "model", "exact", "apart", "token", "plain".
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
        if self.objective.ranks.several and self.stream != "exact" and not self.is_part:
            found = shared_look(self, needs, move_buffers, draws, checked)
            if found is not None:
                return found
        unheard = needs <= {"gradient", "plain"} and self._may_go_unheard()
        z, capture = (
            self._unheard(move_buffers) if unheard else self.forward(move_buffers=move_buffers)
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
        in_turn = [p for p in PASSES if p in needs]
        for name in in_turn:
            last = unheard and name == in_turn[-1]  # nobody else has this graph
            if name == "gradient" and "data" in needs:
                continue  # they are one
            if name == "plain":
                vectors = torch.autograd.grad(loss, outputs, retain_graph=True)[0][None]
                with self.as_heard():
                    passes[name] = capture.gradients(z, vectors, 1, last=last)
                continue
            shared = name == "apart" and max(self.form_of_look.places.values(), default=1) > 1
            if name == "apart" and "exact" in passes and not shared:
                passes[name] = passes["exact"]
                continue
            if name in ("exact", "apart"):
                if self.stream != "exact" and mixes(self.objective.modules):
                    self.objective.say(_MIXING)
                vectors = self.root(outputs.detach())
            elif name == "token":
                vectors = self.by_place(outputs).vectors()
            elif name in ("gradient", "data"):
                size = torch.full_like(loss, len(z))  # of the sum, not of the mean
                vectors = torch.autograd.grad(loss, outputs, size)[0][None]
            else:
                drawn = self.labels(outputs.detach(), draws)
                with derivatives():
                    each = [
                        torch.autograd.grad(
                            self.loss_of(outputs, label, drawn=True).sum(), outputs
                        )[0]
                        for label in drawn
                    ]
                vectors = each[0][None] if draws == 1 else torch.stack(each) / draws**0.5
            guard_pass(capture, vectors)
            if name == "gradient" and (unheard or all(map(capture.fine, self.objective.blocks))):
                with self.as_heard():
                    passes[name] = capture.gradients(z, vectors, last=last)
            elif shared:
                passes[name] = pass_of_vectors(capture, z, vectors)
            else:
                passes[name] = capture.backward(
                    z, vectors, leaves=True, gradients=by_leaves and name in ("gradient", "data")
                )
            self.say_unreached(passes[name], capture)
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

    def say_unreached(self, found: Mapping[str, LayerStatistics], capture: Capture) -> None:
        """Warn, once, of trained blocks that a pass back from the outputs has not reached."""
        for statistics in found.values():
            if not statistics.used and statistics.block.name not in capture.frozen:
                self.objective.say(
                    f"{statistics.block} does not reach the model's outputs in a minibatch: its"
                    " gradient is zero there (freeze it if it is never used)"
                )

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
