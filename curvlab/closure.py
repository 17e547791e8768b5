"""Closure, Observation: one minibatch of an objective, and what looks at it show.

The loss is the **mean over examples of a per-example sum**. Labels drawn from the model depend only on the objective's
seed and on the number of the closure, never on who asks for them: an algorithm sees the same labels alone and in company.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor

from curvlab.capture import Capture
from curvlab.derivatives import around, derivatives, differentiable, precise, surrounding
from curvlab.errors import CurvlabError, Diverged, unknown
from curvlab.finite import all_finite
from curvlab.forms import Form, Report, examine, unseen
from curvlab.likelihoods import sample_of
from curvlab.output_law import Law, law_of, refusal
from curvlab.statistics import LayerStatistics
from curvlab.strangers import called, eager, mixes
from curvlab.system import random_state

if TYPE_CHECKING:
    from curvlab.objective import Objective

Pass = Literal["gradient", "data", "model", "exact"]
"""What is sent back: ∂ℓ/∂z at the data's labels ("gradient": for the mean gradient alone), at labels drawn from the model, or
the columns of S, S Sᵀ = ∂²ℓ/∂z²."""

PASSES: tuple[Pass, ...] = get_args(Pass)

Stream = Literal["step", "warm", "exact"]
"""Who made a closure: a step, a warm start, the oracle. Each has labels of its own."""

STREAMS: tuple[Stream, ...] = get_args(Stream)


@dataclass(frozen=True)
class Observation:
    """One look at one minibatch.

    `loss` is the mean loss (no graph), with the objective's L2 term; `passes` holds {pass: {block: LayerStatistics}} for the
    passes asked for, `closure` the minibatch itself, for methods that go through it again (conjugate gradients, trial steps).
    """

    loss: Tensor
    size: int
    passes: dict[str, dict[str, LayerStatistics]]
    closure: Closure
    pull: Mapping[str, Tensor] = field(default_factory=dict)  # {block: gradient of the L2 term}

    @cached_property
    def gradients(self) -> dict[str, Tensor]:
        """{block: gradient of the mean loss at the data's labels, with that of the L2 term}, in the blocks' shapes."""
        seen = self.passes.get("gradient") or self.passes.get("data")
        if seen is None:
            raise CurvlabError('this observation has no "gradient" pass: observe with needs={"gradient", …}')
        found = {name: statistics.gradient for name, statistics in seen.items()}
        return found | {name: found[name] + pull for name, pull in self.pull.items()}


@dataclass(frozen=True)
class Transition:
    """Two looks at one minibatch, before and after a move; `displacement` gives the move when first asked for."""

    before: Observation
    after: Observation
    displacement: Callable[[], dict[str, Tensor]]

    @cached_property
    def step(self) -> dict[str, Tensor]:
        """{block: change of its parameters}, in the blocks' shapes."""
        return self.displacement()


def _numbered(n: int, size: int) -> str:
    return {0: "first", size - 1: "last"}.get(n, f"{n + 1}th")


def some_rows(x: Tensor, which: slice) -> Tensor:
    """Some of the examples of a dense or sparse batch."""
    if not x.is_sparse:
        return x[which]
    return x.index_select(0, torch.arange(len(x), device=x.device)[which]).coalesce()


class Closure:
    """One minibatch of an objective. ``closure()`` is torch's contract; ``closure.observe(needs)`` is curvlab's.

    Raises:
        CurvlabError: an empty batch, x and y of different lengths, NaN or Inf in x.
    """

    def __init__(self, objective: Objective, x: Tensor, y: Tensor, number: int, stream: Stream = "step", part: int = 0) -> None:
        if not isinstance(x, Tensor) or not isinstance(y, Tensor):
            given = f"{type(x).__name__} and {type(y).__name__}"
            raise CurvlabError(f"a minibatch must be two tensors, not {given}: put the inputs side by side in one tensor, and "
                               f"{_WRAP}")  # fmt: skip
        if not x.ndim or not y.ndim:
            raise CurvlabError("a minibatch needs the examples as first axis; this one has no axis")
        if len(x) != len(y):
            raise CurvlabError(f"the minibatch has {len(x)} inputs but {len(y)} targets: they must be as many")
        if len(x) == 0:
            raise CurvlabError("the minibatch is empty")
        if x.is_sparse and not bool(torch.isfinite(x._values()).all()):
            raise CurvlabError("the inputs contain NaN or Inf: clean the data first")
        if x.is_floating_point() and not all_finite(x):
            bad = int((~torch.isfinite(x.flatten(1) if x.ndim > 1 else x[:, None]).all(1)).nonzero()[0])
            raise CurvlabError(f"the inputs contain NaN or Inf (first in example {bad} of the minibatch): clean the data first")
        objective.check_modules()
        self.objective, self.number, self.stream, self.part = objective, number, stream, part
        self._y = y  # checked where it lies, before it moves
        self._checked = False
        self._form: Form | None = None  # as the last look has shown it
        self._ahead: tuple[Tensor, Capture, int] | None = None  # a look that nobody has used yet
        self._trace = 0  # of the calls of the last look
        self._chance: Any = None  # what the generators were before the first look
        self._generators: dict[torch.Generator, Tensor] = {}  # likewise, the model's own
        self._buffers: dict[str, Tensor] | None = None  # likewise, its buffers
        self.twice = False  # whether a second look will follow, so that the first is gone through again, once a form
        self._seen: tuple[Tensor, int] | None = None  # outputs of the last look, and how often weights were written to by then
        self._restless = 0.0  # how far two looks differ though nothing moved
        with derivatives():
            self.x, self.y = self._moved(x, objective.input_dtype), self._moved(y, objective.dtype)

    def _moved(self, t: Tensor, dtype: torch.dtype | None) -> Tensor:
        device = self.objective.device
        if t.is_inference():
            t = t.clone()
        if dtype is not None and t.is_floating_point():
            t = t.to(dtype=dtype)
        waits = t.device == device or device.type != "cuda" or t.layout != torch.strided
        return t.to(device) if waits else t.pin_memory().to(device, non_blocking=True)  # from pinned memory nobody waits

    def _loss(self, z: Tensor) -> Tensor:
        return self._losses(z).mean()

    def _losses(self, z: Tensor) -> Tensor:
        self._check(z)
        return self.objective.likelihood.loss(z, self.y)

    def _forward(
        self, x: Tensor, buffers: dict[str, Tensor] | None = None, heard: AbstractContextManager[Any] | None = None
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
            raise CurvlabError(f"the model does not take one tensor ({line}): {_WRAP}") from error
        except (RuntimeError, ValueError, IndexError) as error:
            if isinstance(error, CurvlabError) or not any(word in str(error) for word in _OF_THE_DATA):
                raise
            line = str(error).splitlines()[0]
            raise CurvlabError(f"the model does not take inputs of shape {tuple(self.x.shape)}: {line}") from error
        if not isinstance(z, Tensor):
            raise CurvlabError(f"the model returned a {type(z).__name__}, not one tensor: {_PICK}")
        if z.shape[:1] != x.shape[:1]:
            rows = f"{len(x)} rows, one for each example, not {list(z.shape)}"
            raise CurvlabError(f"the model must return one tensor with {rows}: "
                               "keep the batch as its first axis (squeeze(-1), not squeeze())")  # fmt: skip
        if not z.is_floating_point():
            raise CurvlabError(f"the model's outputs are {z.dtype}, which have no real derivatives: return real numbers "
                               "(logits rather than classes; torch.view_as_real of complex ones)")  # fmt: skip
        return z.to(self.objective.dtype)

    def _alone(self, n: int) -> Tensor:
        """The outputs of one example by itself. Refuses a model that draws random numbers."""
        before = random_state.states(self.x.device)
        z, capture = self.forward(some_rows(self.x, slice(n, n + 1)))
        if random_state.drawn_since(before, self.x.device):
            raise CurvlabError(
                "the model draws random numbers in its forward pass, so that the loss is no function of the weights: "
                "call model.eval(), and give functional dropout training=self.training"
            )
        if capture.generators:
            raise CurvlabError(_DEPENDS.format("first"))
        return z.detach()

    def check_alone(self, z: Tensor) -> None:
        """Raises CurvlabError where outputs are not finite, or those of an example depend on the others or on chance."""
        if not all_finite(z):
            raise CurvlabError("the model's outputs contain NaN or Inf: check its weights, and the range of the data")
        key = self._key(self.x), self._trace
        if key in self.objective.alone:
            return
        if self._restless:
            raise CurvlabError(_DEPENDS.format("first"))
        self._check_apart()
        for n, which in ((0, "first"), (len(z) - 1, "last")):
            one, own = self._alone(n), z[n : n + 1]
            if float((one - own).abs().max()) > torch.finfo(z.dtype).eps ** 0.25 * float(one.abs().max()):
                raise CurvlabError(_DEPENDS.format(which))
        self.objective.alone.add(key)

    def _check_apart(self) -> None:
        """Raises CurvlabError where an example's outputs depend on another's inputs."""
        size = len(self.x)
        if size == 1 or self.x.is_sparse:
            return
        bad = self._mixed_by_inputs() if self.x.is_floating_point() else None
        if bad is None:  # one by one, 64 of them at most
            z = self.forward()[0].detach()
            near = torch.finfo(z.dtype).eps ** 0.25
            numbers = sorted({int(i) for i in torch.linspace(0, size - 1, min(size, 64))})
            alone = ((n, self._alone(n), z[n : n + 1]) for n in numbers)
            bad = [n for n, one, own in alone if float((one - own).abs().max()) > near * float(one.abs().max())]
        if bad:
            raise CurvlabError(_DEPENDS.format(_numbered(bad[0], size)))

    def _mixed_by_inputs(self) -> list[int] | None:
        """Examples m on which others depend, one pass for all: where not ∂/∂xₘ Σₙ cₙ uₙ·zₙ = cₘ ∂/∂xₘ Σₙ uₙ·zₙ, c, u random.
        None where no derivative leads back to the inputs."""
        size, generator = len(self.x), torch.Generator().manual_seed(0)
        with derivatives():
            x = self.x.detach().clone().requires_grad_()
            try:
                z = self._look_at(x, False)[0]
                u = torch.randn(z.shape, generator=generator, dtype=torch.float64).to(z)
                c = (1 + torch.rand(size, generator=generator, dtype=torch.float64)).to(z)
                sent = (u, c.view(-1, *[1] * (z.ndim - 1)) * u)
                plain, weighted = (torch.autograd.grad(z, x, v, retain_graph=True, allow_unused=True)[0] for v in sent)
            except RuntimeError:
                return None
        if plain is None or weighted is None:
            return None
        scaled = c.to(x.dtype).view(-1, *[1] * (x.ndim - 1)) * plain
        apart = (weighted - scaled).reshape(size, -1).norm(dim=1)
        near = max(torch.finfo(x.dtype).eps, self.form_of_look.precision) ** 0.5 * plain.reshape(size, -1).norm(dim=1).max()
        return (apart > near).nonzero().flatten().tolist()  # type: ignore[no-any-return]  # torch has no types there

    @property
    def form_of_look(self) -> Form:
        """Of the look that was taken last. A look must have been taken."""
        assert self._form is not None
        return self._form

    def _key(self, x: Tensor) -> Hashable:
        """What decides how the model runs, beside its weights: the form of the minibatch, modes, what is trained."""
        objective = self.objective
        modes = tuple([module.training for module in objective.modules])
        trained = tuple([owner[key].requires_grad for _, owner, key in objective._slots])  # type: ignore[union-attr]  # none is None
        return x.shape, x.dtype, modes, trained, around()

    def __call__(self) -> Tensor:
        """Torch's contract: zero the gradients, forward, backward, return the loss with ``p.grad`` filled."""
        self.objective.model.zero_grad()
        loss = self._loss(self._forward(self.x))
        if self.objective.l2:
            loss = loss + self.objective.l2 * sum(p.square().sum() for p in self.objective.parameters.values())
        loss.backward()  # type: ignore[no-untyped-call]  # torch has no types there
        return loss

    def outputs(self) -> tuple[Tensor, Tensor]:
        """(outputs, loss of each example) of the model as it stands, without a graph: all that an evaluation needs."""
        with torch.inference_mode(False), torch.no_grad():
            z = self._forward(self.x)
            return z, self._losses(z)

    def losses(self) -> Tensor:
        """The loss of each example without a graph, on cloned buffers and with the first look's random numbers: a trial."""
        if self._restless:
            raise CurvlabError(_RESTLESS.format(self._restless))
        with torch.inference_mode(False), torch.no_grad(), self._same_chance(True):
            return self._losses(self._forward(self.x, self._own_buffers(True)))

    def labels(self, z: Tensor, draws: int = 1) -> list[Tensor]:
        """Labels drawn from the model's own distribution at outputs z: the same ones at every call."""
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
        """The form of the first and the last example alone, for sizes: what a look at all of a large minibatch would cost."""
        if self._form is not None or len(self.x) <= 2:
            return self.form
        x = some_rows(self.x, slice(0, None, len(self.x) - 1))
        known, key = self.objective.glimpses, self._key(x)
        if key not in known:
            known[key] = self._look_at(x, False)[2]
        return known[key]

    def _versions(self) -> int:
        return sum(p._version for p in self.objective.parameters.values())

    def forward(self, x: Tensor | None = None, move_buffers: bool = False) -> tuple[Tensor, Capture]:
        """One forward of the minibatch, or of x, on cloned buffers: (outputs with their graph, the capture).

        A later look at the minibatch sees the random numbers of the first, and uses up none.
        """
        if x is not None and x is not self.x:
            return self._look_at(x, False)[:2]
        ahead, self._ahead = self._ahead, None
        if ahead is not None and not move_buffers and ahead[2] == self._versions():
            return ahead[:2]
        z, capture, self._form = self._look_at(self.x, True, move_buffers)
        return z, capture

    def _look_at(self, x: Tensor, own: bool, move_buffers: bool = False) -> tuple[Tensor, Capture, Form]:
        model, objective = self.objective.model, self.objective
        objective.check_modules()
        again = own and self._chance is not None
        if again and self._restless:
            raise CurvlabError(_RESTLESS.format(self._restless))
        key = self._key(x)
        if move_buffers and self.twice and not again:
            self._own_buffers(own)  # kept for the second look
        buffers = None if move_buffers else self._own_buffers(own)
        quiet = objective.quiet.get(key)
        capture = Capture(model, objective.blocks, objective.dtype, objective.parameters, differentiable=self.stream == "exact")
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
        """Whether nothing but the mean gradient can be asked of a look: it is of a form that was heard once and draws nothing,
        and no other look will follow."""
        fresh = self._chance is None and self.stream == "step" and not self.twice
        return fresh and self.objective.fine and self._key(self.x) in self.objective.quiet

    def _unheard(self, move_buffers: bool) -> tuple[Tensor, Capture]:
        """`forward` with nobody listening."""
        self.objective.check_modules()
        self._chance = _QUIET
        capture = Capture(self.objective.model, self.objective.blocks, self.objective.dtype, self.objective.parameters)
        with derivatives():
            z = self._forward(self.x, None if move_buffers else self._own_buffers(True))
        self._check_same(z)
        return z, capture

    def _own_buffers(self, own: bool) -> dict[str, Tensor] | None:
        """Copies of the model's buffers for one look to write on: as they were before the first look at this minibatch."""
        if not any(module._buffers for module in self.objective.modules):
            return None
        if own and self._buffers is None:
            self._buffers = {name: b.clone() for name, b in self.objective.model.named_buffers()}
        held = self._buffers if own else dict(self.objective.model.named_buffers())
        assert held is not None
        return {name: b.clone() for name, b in held.items()}

    def _check_steady(self, z: Tensor, key: Hashable) -> None:
        """Once a form: whether a second look, with all random numbers and buffers put back, is the first."""
        if key not in self.objective.steady:
            with derivatives(), torch.no_grad(), self._same_chance(True):
                again = self._forward(self.x, self._own_buffers(True))
            apart = float((again - z.detach()).norm()) if again.shape == z.shape else math.inf
            near = torch.finfo(z.dtype).eps ** 0.5 * float(z.detach().norm())
            self.objective.steady[key] = 0.0 if apart <= near else apart / max(float(z.detach().norm()), 1e-300)
        self._restless = self.objective.steady[key]

    def _check_same(self, z: Tensor) -> None:
        """Raises CurvlabError where a later look differs from the one before although no weight was written to."""
        seen, self._seen = self._seen, (z.detach(), self._versions())
        if seen is not None and seen[1] == self._seen[1] and seen[0].shape == z.shape:
            apart, size = float((z.detach() - seen[0]).norm()), float(seen[0].norm())
            if apart > torch.finfo(z.dtype).eps ** 0.5 * size:
                raise CurvlabError(_RESTLESS.format(apart / size if size else math.inf))

    def _drew(self) -> bool:
        return isinstance(self._chance, random_state.Chance) and random_state.drawn_since(self._chance, self.x.device)

    @contextmanager
    def _same_chance(self, own: bool, quiet: bool = False) -> Iterator[None]:
        """The generators as they were at the first look, inside; at the first look they are remembered, but where the model is
        known to draw nothing."""
        device = self.x.device
        if not own or self._chance is None:
            if own:
                self._chance = _QUIET if quiet else random_state.states(device)
            yield
            return
        if not isinstance(self._chance, random_state.Chance):
            yield
            return
        now = {generator: generator.get_state() for generator in self._generators}
        for generator, state in self._generators.items():
            generator.set_state(state)
        try:
            with random_state.replayed(self._chance, device):
                yield
        finally:
            for generator, state in now.items():
                generator.set_state(state)

    def _settle(self, z: Tensor, capture: Capture, x: Tensor, known_key: Hashable) -> Form:
        """The ways of all blocks: as known of this form, or as a first look shows them."""
        objective = self.objective
        capture.settle(z)
        key = known_key, capture.trace
        if x is self.x:
            self._trace = capture.trace
        known = objective.forms.get(key)
        if known is None and not all_finite(z.detach()):  # nothing can be seen, and the loss will say so
            return unseen(capture, z)
        if known is None or capture.reorders or not known.apply(capture):
            known = self._prove(z, capture, key)
        if known.unproven:
            capture.unproven = {name: uses for name, uses in known.unproven.items() if name in capture.arranged}
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
        """Of targets, and at the first look at a form of the likelihood, where that is the user's."""
        if self._checked:
            return
        self.objective.likelihood.check(z, self._y)
        self._checked = True
        key = self._key(self.x)
        if key not in self.objective.laws or (self.stream == "exact" and self.objective.laws[key].examined):
            with derivatives():
                self.objective.laws[key] = law_of(self.objective.likelihood, z.detach(), self.y)

    @property
    def law(self) -> Law:
        """What was found of the likelihood: its root, and whether labels drawn by it follow its loss."""
        key = self._key(self.x)
        if key not in self.objective.laws or not self._checked:
            _ = self.form  # a look, which the next one is
            look = self.forward()
            self._check(look[0].detach())
            self._ahead = *look, self._versions()
        return self.objective.laws[key]

    def look(self) -> tuple[Tensor, Tensor, Capture]:
        """One forward on cloned buffers, checked: (outputs and loss of each example with their graphs, the capture)."""
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
            move_buffers: False runs on cloned buffers, so that a second look does not move BatchNorm's statistics.
            draws: labels drawn for each example in the "model" pass; with k of them V = k, each vector times 1/√k.
            checked: False leaves it to the caller to see that the loss is finite: nothing then waits for a GPU.

        Raises:
            CurvlabError: targets that do not fit, a loss that is not finite, a module that runs twice in the pass.
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
                    each = [torch.autograd.grad(likelihood.loss(outputs, label).sum(), outputs)[0] for label in drawn]
                vectors = each[0][None] if draws == 1 else torch.stack(each) / draws**0.5
            if name == "gradient" and all(map(capture.fine, self.objective.blocks)):
                passes[name] = capture.gradients(z, vectors)
            else:
                passes[name] = capture.backward(z, vectors, leaves=True, gradients=by_leaves and name in ("gradient", "data"))
            for statistics in passes[name].values():
                if not statistics.used and statistics.block.name not in capture.frozen:
                    self.objective.say(f"{statistics.block} does not reach the model's outputs in a minibatch: its gradient is "
                                       "zero there (freeze it if it is never used)")  # fmt: skip
        if by_leaves and "data" in needs:
            passes["gradient"] = passes["data"]
        value, pull = loss.detach(), dict[str, Tensor]()
        if self.objective.l2:
            weights = {name: p.detach() for name, p in self.objective.parameters.items()}
            pull = {b.name: 2 * self.objective.l2 * b.gather(weights) for b in self.objective.blocks}
            value = value + self.objective.l2 * sum(w.square().sum() for w in weights.values())
        return Observation(value, len(z), passes, self, pull)

    def _finite(self, loss: Tensor, z: Tensor) -> None:
        if math.isfinite(float(loss)):
            return
        weights = [name for name, p in self.objective.model.named_parameters() if not bool(torch.isfinite(p).all())]
        if weights:
            where = f"the weights '{weights[0]}' contain NaN or Inf"
        elif not bool(torch.isfinite(z).all()):
            where = "the model's outputs contain NaN or Inf"
        else:
            where = "the outputs are finite, so the likelihood overflows"
        raise Diverged(f"the loss is {float(loss)}: {where}; lower the learning rate or raise the damping")


_MIXING = (
    "batch norm in training mode lets examples act on each other: the Gauss-Newton matrix is taken as if each stood alone, "
    "without the derivatives that pass from one to another"
)
_RESTLESS = (
    "two looks at one minibatch differ (by a relative {:.2g}) though nothing was moved: the model draws random numbers, or "
    "counts, in a way that cannot be put back; let it draw by a global generator (torch, random, numpy) or a torch.Generator"
)
_DEPENDS = (
    "the {} example's outputs depend on the rest of the minibatch, or on chance: "
    "no example has a loss of its own, and the model no curvature that is a mean over examples"
)
_WRAP = (
    "wrap it in a module that takes its one input apart, class Apart(nn.Module) with "
    "def forward(self, x): return self.net(x[..., :k], x[..., k:])"
)
_PICK = (
    "wrap it in a module that picks one, class Pick(nn.Module) with def forward(self, x): return self.net(x)[0] (or .logits)"
)
_QUIET = "no random number is drawn"
_FORMS = 512  # that are remembered
_OF_THE_DATA = ("shape", "size", "dtype", "type", "channels", "input", "index out of range in self")
"""In torch's messages about data that do not fit a layer."""
