"""The watch of a training loop that is not ours, by torch's own hooks of a step.

A pre-hook keeps the weights before a step, a post-hook looks back at it (`watched_step`). Of steps
that are not sampled nothing is kept. The minibatches are those that the loop was handed since the
last step; their inputs are copied as the model was given them, since loops write over theirs.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import TracebackType
from typing import Any, Self

import torch
import xarray as xr
from torch import nn

from curvlab.closure import Closure
from curvlab.errors import CurvlabError, cause_of, shown, warn
from curvlab.logs.log import Log
from curvlab.system.lock import exclusive_lock
from curvlab.watched_batches import HandedBatches, Surroundings, called_with
from curvlab.watched_loop import (
    ForwardHook,
    closure_in,
    decays_of,
    forms_of,
    in_no_block,
    rate_in,
)
from curvlab.watched_ranks import minibatches_of_all
from curvlab.watched_step import Looker, Taken

Take = Callable[[Any], tuple[Any, Any]]
"""A function of a minibatch as the loop has it: (inputs, targets)."""


class Watcher:
    """The watch of a training loop, as of `watch`: ``with … as watch: for x, y in watch(loader)``.

    Args:
        model: as the loop has it.
        optimizers: of the loop.
        looker: looks at the steps that are sampled.
        take: as of `WatchSettings`.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizers: Sequence[torch.optim.Optimizer],
        looker: Looker,
        take: Take | None = None,
    ) -> None:
        self.model, self.optimizers, self.looker, self.take = model, optimizers, looker, take
        self.objective = looker.objective
        self.steps, self.skipped = 0, 0
        self.calls = False
        """Whether the model's own calls in training are the minibatches, where nobody hands
        them."""
        self._names = {id(p): name for name, p in self.objective.parameters.items()}
        self._opened: ExitStack | None = None
        self._looking = False
        self._due = True
        self._handed = HandedBatches(self._read, lambda: Surroundings.of(self.objective))
        self._stepped: set[int] = set()
        self._taken: Taken | None = None
        self._begun = 0.0

    # ---- what a user sees

    @property
    def is_open(self) -> bool:
        """Whether the hooks are in place."""
        return self._opened is not None

    @property
    def log(self) -> Log | None:
        """The log; None before the first sample."""
        return self.looker.log

    @property
    def dataset(self) -> xr.Dataset:
        """All records so far, as of a comparison.

        Raises:
            CurvlabError: there is none.
        """
        if self.log is None:
            raise CurvlabError("watch has logged no step yet")
        return self.log.dataset()

    @property
    def seconds(self) -> float:
        """Time that looks have taken so far."""
        return self.looker.seconds

    def __call__(self, loader: Iterable[Any]) -> WatchedLoader:
        """Return the loader, to go through as before: its minibatches are remembered.

        Raises:
            CurvlabError: it is nothing to go through.
        """
        if not isinstance(loader, Iterable) and not hasattr(loader, "__getitem__"):
            raise CurvlabError(f"watch(…) takes the loop's loader, not {shown(loader)}")
        return WatchedLoader(self, loader)

    @contextmanager
    def batch(self, x: Any, y: Any = None) -> Iterator[None]:
        """Remember a minibatch for the step that is taken inside, or later where gradients add up.

        Args:
            x: inputs as the model takes them; without `y` a minibatch as a loader gives it.
            y: targets.
        """
        self.see(x, y)
        yield

    def see(self, x: Any, y: Any = None) -> None:
        """Remember a minibatch, as `batch` does.

        Raises:
            CurvlabError: the watch is not open.
        """
        if self._opened is None:
            raise CurvlabError("the watch is not open: with curvlab.watch(…) as watch: …")
        if self._stepped:  # one of several optimizers has not stepped this time
            self._finish()
        handed = self._handed
        if not self._due:
            handed.keep_ahead(x, y)
            return
        if len(handed) and self._gradients_are_gone():
            self._forget_skipped()
            for one in handed.waiting:
                one.idle = True
        handed.hand(x, y)

    # ---- opening and closing

    def __enter__(self) -> Self:
        """Register hooks.

        Raises:
            CurvlabError: another watch looks at this model; another run writes the log.
        """
        mine = set(self._names)
        if any(not mine.isdisjoint(other._names) for other in _OPEN):
            raise CurvlabError(
                "this model is being watched already: close the other watch first, or give both"
                " lists of algorithms to one"
            )
        with ExitStack() as stack:
            self.objective.ranks.by_first(lambda: self._locked(stack))
            stack.callback(_OPEN.discard, self)
            _OPEN.add(self)
            for optimizer in self.optimizers:
                stack.callback(optimizer.register_step_pre_hook(self._before_step).remove)
                stack.callback(optimizer.register_step_post_hook(self._after_step).remove)
            for form in forms_of(self.model):
                hook = form.register_forward_pre_hook(
                    ForwardHook(self._before_forward), prepend=True, with_kwargs=True
                )
                stack.callback(hook.remove)
            self._opened = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Remove the hooks and save the log.

        Raises:
            CurvlabError: it cannot be written.
        """
        opened, self._opened = self._opened, None
        assert opened is not None
        with opened:
            if self._stepped and kind is None:
                self._finish()
            self._handed.close()
            if self.log is not None:
                self.log.attributes |= {
                    "steps": self.steps,
                    "skipped_steps": self.skipped,
                    "lost_samples": self.looker.lost,
                }
                self.log.save()
        if kind is not None:
            return
        if not self.steps:
            warn(
                f"watch has seen no step of {', '.join(type(o).__name__ for o in self.optimizers)}:"
                " nothing is logged (did the loop step another optimizer, or skip every step?)"
            )
        elif self.log is None:
            where = (
                "the trainer did not call the model by its forward, with the labels in the call"
                if self.calls
                else "go through watch(loader), or step inside of watch.batch(x, y)"
            )
            warn(
                f"watch has seen {self.steps} steps and no minibatch, so that nothing is logged:"
                f" {where}"
            )

    def _locked(self, stack: ExitStack) -> None:
        if self.looker.path is not None:
            stack.enter_context(exclusive_lock(self.looker.path))

    # ---- hooks

    def _before_forward(self, module: nn.Module, args: Any, named: Any) -> None:
        """Take the inputs as the model is given them, and the generators as they stand."""
        if not self._due or self._looking or not torch.is_grad_enabled():
            return
        labels = self.objective.interface.labels
        inputs = called_with(args, named, labels)
        if self.calls and module.training and (labels in named or self.take is not None):
            if self._handed.knows(inputs):  # a compiled model that calls what it was made of
                return
            self.see(dict(named))
        handed = self._handed.of_call(inputs)
        if handed is None:
            return
        if self._handed.called and self._gradients_are_gone():
            self._forget_skipped()
        self._handed.call(handed, inputs)

    def _before_step(
        self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], named: dict[str, Any]
    ) -> None:
        if id(optimizer) in self._stepped:  # the others have not stepped this time
            self._finish()
        if not self._due or not len(self._handed):
            return
        if self._taken is None:
            self._taken = self._before_it()
        # with a closure the gradient is only made inside of the step
        self._note(self._taken, optimizer, gradients=closure_in(args, named) is None)
        self._begun = time.perf_counter()

    def _before_it(self) -> Taken:
        """Keep the weights before a step: of the blocks, and what is trained besides them now."""
        parameters = self.objective.parameters
        self._names = {id(p): name for name, p in parameters.items()}
        return Taken(
            self.steps,
            {name: p.detach().clone() for name, p in parameters.items()},
            [(p, p.detach().clone()) for p in in_no_block(self.objective, self.optimizers)],
            rate=rate_in(self.optimizers[0].param_groups[0]),
        )

    def _after_step(
        self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], named: dict[str, Any]
    ) -> None:
        taken = self._taken
        if taken is not None:
            taken.seconds += time.perf_counter() - self._begun
            closure = closure_in(args, named)
            # a closure of curvlab fills no p.grad, and those of LBFGS are of other weights
            if closure is not None and not isinstance(closure, Closure):
                self._note(taken, optimizer, not isinstance(optimizer, torch.optim.LBFGS))
            flag = getattr(optimizer, "found_inf", None)  # of a scaler that lets it step in vain
            if flag is not None and float(flag):
                self._taken = None
                self._handed.forget()
                self._skip()
                return
        self._stepped.add(id(optimizer))
        if len(self._stepped) == len(self.optimizers):
            self._finish()

    def _note(self, taken: Taken, optimizer: torch.optim.Optimizer, gradients: bool) -> None:
        """Keep rates, decays and gradients of an optimizer's parameters."""
        scale, decays = getattr(optimizer, "grad_scale", None), decays_of(optimizer)
        for group in optimizer.param_groups:
            rate = rate_in(group)
            for p in group["params"]:
                name = self._names.get(id(p))
                if name is None:
                    continue
                taken.rates[name], taken.decays[name] = rate, decays.get(id(p), 0.0)
                if gradients:
                    g = torch.zeros_like(p) if p.grad is None else p.grad.detach().clone()
                    g = g.to_dense() if g.is_sparse else g
                    taken.gradients[name] = g if scale is None else g / scale

    # ---- steps

    def _finish(self) -> None:
        """Look at the step that is done, if it is due, and get ready for the next."""
        taken, number, due = self._taken, self.steps, self._due
        handed, skipped = self._handed.take()
        self._taken = None
        self._stepped.clear()
        self.steps += 1
        self._due = bool(self.looker.due(self.steps))
        if not due:
            return
        if skipped:
            self._skip()
        own = 0 if taken is None else len(handed)
        count = minibatches_of_all(self.objective, number, own, self.log is not None)
        if not count:
            return
        assert taken is not None
        self._looking = True
        try:
            self.looker.look(taken, handed, count)
        finally:
            self._looking = False

    def _read(self, x: Any, y: Any) -> tuple[Any, Any, bool]:
        """Return inputs and targets of a minibatch, and whether the inputs are final."""
        if y is not None:
            return x, y, True
        if self.take is None:
            return *self.objective.interface.apart(x), False
        try:
            x, y = self.take(x)
        except CurvlabError:
            raise
        except Exception as error:
            raise CurvlabError(
                "take= must return (inputs, targets) of a minibatch, and ended in"
                f" {type(error).__name__}: {cause_of(error)}"
            ) from error
        return x, y, True

    def _gradients_are_gone(self) -> bool:
        parameters = self.objective.parameters.values()
        return all(p.grad is None or not bool(p.grad.any()) for p in parameters)

    def _forget_skipped(self) -> None:
        """Drop minibatches whose gradients are gone: the step that they were for was skipped."""
        if self._handed.called:
            self._handed.called = []
            self._skip()

    def _skip(self) -> None:
        self.skipped += 1
        self.objective.say(
            f"a step was skipped before step {self.steps} (by a GradScaler, say, or taken by an"
            " optimizer that is not watched): it is not logged, nor are its minibatches"
        )


class WatchedLoader:
    """A loader whose minibatches a watch remembers; all else is the loader's own.

    Args:
        watcher: the watch.
        loader: any iterable of minibatches.
    """

    def __init__(self, watcher: Watcher, loader: Iterable[Any]) -> None:
        self._watcher, self._loader = watcher, loader

    def __iter__(self) -> Iterator[Any]:
        for batch in self._loader:
            self._watcher.see(batch)
            yield batch

    def __len__(self) -> int:
        return len(self._loader)  # type: ignore[arg-type]  # where it has a length

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)


_OPEN: weakref.WeakSet[Watcher] = weakref.WeakSet()
